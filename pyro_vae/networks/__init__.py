"""Neural networks: tensors in, tensors out, any number of leading dimensions."""

from pyro_vae.networks.convolutional import ConvDecoder, ConvEncoder
from pyro_vae.networks.mlp import ACTIVATIONS, LEAST_SCALE, MLP, GaussianMLP, init_paper, softplus_scale
from pyro_vae.networks.recurrent import CELLS, Recurrent

__all__ = [
    "ACTIVATIONS",
    "CELLS",
    "LEAST_SCALE",
    "MLP",
    "ConvDecoder",
    "ConvEncoder",
    "GaussianMLP",
    "Recurrent",
    "init_paper",
    "softplus_scale",
]
