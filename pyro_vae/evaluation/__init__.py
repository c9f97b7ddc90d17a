"""Scoring: bounds over data sets, estimators of the log marginal likelihood log p(x), and diagnostics."""

from pyro_vae.evaluation.ais import AIS, Sandwich, bidirectional
from pyro_vae.evaluation.bounds import BoundEstimate, evaluate_bound, evaluate_kl
from pyro_vae.evaluation.diagnostics import (
    ActiveUnits,
    Calibration,
    InferenceGap,
    active_units,
    amortization_gap,
    gradient_snr,
    kl_per_dimension,
    simulation_based_calibration,
)
from pyro_vae.evaluation.importance import ImportanceSampling
from pyro_vae.evaluation.marginal import METHODS, log_marginal
from pyro_vae.evaluation.particle_filter import ParticleFilter
from pyro_vae.evaluation.posterior_density import PosteriorDensity, fit_gaussian
from pyro_vae.evaluation.score import Score

__all__ = [
    "AIS",
    "METHODS",
    "ActiveUnits",
    "BoundEstimate",
    "Calibration",
    "ImportanceSampling",
    "InferenceGap",
    "ParticleFilter",
    "PosteriorDensity",
    "Sandwich",
    "Score",
    "active_units",
    "amortization_gap",
    "bidirectional",
    "evaluate_bound",
    "evaluate_kl",
    "fit_gaussian",
    "gradient_snr",
    "kl_per_dimension",
    "log_marginal",
    "simulation_based_calibration",
]
