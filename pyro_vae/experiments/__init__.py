"""Experiments: learning objectives beside each other, under one scorer."""

from pyro_vae.experiments.comparison import Comparison, load_comparison

__all__ = ["Comparison", "load_comparison"]
