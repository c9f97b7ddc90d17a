"""Generative models with their guides. Models know networks and distributions, never how they are trained."""

from pyro_vae.models.belief_network import SigmoidBeliefNetwork
from pyro_vae.models.deep_markov import DeepMarkovModel
from pyro_vae.models.hierarchical import HierarchicalVAE
from pyro_vae.models.linear_gaussian import LinearGaussian
from pyro_vae.models.linear_gaussian_ssm import LinearGaussianSSM
from pyro_vae.models.mixture import GaussianMixture
from pyro_vae.models.semi_amortized import SemiAmortized
from pyro_vae.models.stochastic_volatility import StochasticVolatility
from pyro_vae.models.switching import SwitchingLDS
from pyro_vae.models.topic_model import ProdLDA
from pyro_vae.models.vae import VAE
from pyro_vae.models.variational_rnn import VariationalRNN

__all__ = [
    "VAE",
    "DeepMarkovModel",
    "GaussianMixture",
    "HierarchicalVAE",
    "LinearGaussian",
    "LinearGaussianSSM",
    "ProdLDA",
    "SemiAmortized",
    "SigmoidBeliefNetwork",
    "StochasticVolatility",
    "SwitchingLDS",
    "VariationalRNN",
]
