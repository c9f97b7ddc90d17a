"""Distributions that torch and Pyro lack."""

from pyro_vae.distributions.counts import WordCounts
from pyro_vae.distributions.discretized import DiscretizedLogisticMixture
from pyro_vae.distributions.flows import Flow, autoregressive_affine, neural_spline
from pyro_vae.distributions.sequences import (
    Emissions,
    MarkovSequence,
    WithMemory,
    drawn_from,
    observed_log_prob,
    steps_within,
)

__all__ = [
    "DiscretizedLogisticMixture",
    "Emissions",
    "Flow",
    "MarkovSequence",
    "WithMemory",
    "WordCounts",
    "autoregressive_affine",
    "drawn_from",
    "neural_spline",
    "observed_log_prob",
    "steps_within",
]
