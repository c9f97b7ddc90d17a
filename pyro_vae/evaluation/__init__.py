"""Scoring: bounds over data sets, and estimators of the log marginal likelihood log p(x)."""

from pyro_vae.evaluation.bounds import BoundEstimate, evaluate_bound
from pyro_vae.evaluation.importance import Score, log_marginal

__all__ = ["BoundEstimate", "Score", "evaluate_bound", "log_marginal"]
