"""Neural networks: tensors in, tensors out, any number of leading dimensions."""

from pyro_vae.networks.mlp import ACTIVATIONS, MLP, GaussianMLP, init_paper

__all__ = ["ACTIVATIONS", "MLP", "GaussianMLP", "init_paper"]
