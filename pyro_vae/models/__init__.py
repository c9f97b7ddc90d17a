"""Generative models with their guides. Models know networks and distributions, never how they are trained."""

from pyro_vae.models.belief_network import SigmoidBeliefNetwork
from pyro_vae.models.linear_gaussian import LinearGaussian
from pyro_vae.models.mixture import GaussianMixture
from pyro_vae.models.topic_model import ProdLDA
from pyro_vae.models.vae import VAE

__all__ = ["VAE", "GaussianMixture", "LinearGaussian", "ProdLDA", "SigmoidBeliefNetwork"]
