"""Distributions that torch and Pyro lack."""

from pyro_vae.distributions.counts import WordCounts
from pyro_vae.distributions.sequences import (
    Emissions,
    MarkovSequence,
    WithMemory,
    drawn_from,
    observed_log_prob,
    steps_within,
)

__all__ = [
    "Emissions",
    "MarkovSequence",
    "WithMemory",
    "WordCounts",
    "drawn_from",
    "observed_log_prob",
    "steps_within",
]
