"""Neural networks: tensors in, tensors out, any number of leading dimensions."""

from pyro_vae.networks.mlp import ACTIVATIONS, MLP, GaussianMLP, init_paper
from pyro_vae.networks.recurrent import CELLS, Recurrent

__all__ = ["ACTIVATIONS", "CELLS", "MLP", "GaussianMLP", "Recurrent", "init_paper"]
