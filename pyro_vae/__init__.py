"""Auto-Encoding Variational Bayes (Kingma & Welling, arXiv:1312.6114) in Pyro.

Notation, used in every docstring:

==========  =======================================================  ==========================
symbol      meaning                                                  word in public arguments
==========  =======================================================  ==========================
N           data in the data set
M           data in a minibatch                                      ``batch_size``
K           particles, draws of z per datum (the paper's L)          ``num_particles``
J           dimension of z                                           ``latent_dim``
D           dimension of x                                           ``data_shape``
T           steps of the longest sequence, padding included          ``num_steps``
theta       parameters of the generative model p(x, z)
phi         parameters of the recognition model q(z | x)
log_w       log p(x, z) - log q(z | x), axes (K, M)
bound       a lower bound on log p(x): maximised, in nats per datum
loss        minus a bound, summed over the data plate: minimised
==========  =======================================================  ==========================

Axes are particles, then batch, then event: (K, M, J). Units are nats per datum: sums over the event, means over data.
A sequence is one datum; what is in nats per step says so.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyro_vae import evaluation as evaluation
    from pyro_vae import plots as plots
    from pyro_vae.data import Dataset as Dataset
    from pyro_vae.data import bouncing_balls as bouncing_balls
    from pyro_vae.data import load_dataset as load_dataset
    from pyro_vae.data import pad_sequences as pad_sequences
    from pyro_vae.data import pendulum as pendulum
    from pyro_vae.evaluation import Score as Score
    from pyro_vae.evaluation import bidirectional as bidirectional
    from pyro_vae.evaluation import evaluate_bound as evaluate_bound
    from pyro_vae.evaluation import log_marginal as log_marginal
    from pyro_vae.experiments import Comparison as Comparison
    from pyro_vae.experiments.compare import compare as compare
    from pyro_vae.models import VAE as VAE
    from pyro_vae.models import GaussianMixture as GaussianMixture
    from pyro_vae.models import HierarchicalVAE as HierarchicalVAE
    from pyro_vae.models import LinearGaussian as LinearGaussian
    from pyro_vae.models import LinearGaussianSSM as LinearGaussianSSM
    from pyro_vae.models import ProdLDA as ProdLDA
    from pyro_vae.models import SemiAmortized as SemiAmortized
    from pyro_vae.models import SigmoidBeliefNetwork as SigmoidBeliefNetwork
    from pyro_vae.models import StochasticVolatility as StochasticVolatility
    from pyro_vae.models import SwitchingLDS as SwitchingLDS
    from pyro_vae.models import VariationalRNN as VariationalRNN
    from pyro_vae.models.full_bayes import bayesian as bayesian
    from pyro_vae.objectives import FIVO as FIVO
    from pyro_vae.objectives import IWAE as IWAE
    from pyro_vae.objectives import MCEM as MCEM
    from pyro_vae.objectives import SGVB as SGVB
    from pyro_vae.objectives import VIMCO as VIMCO
    from pyro_vae.objectives import DReG as DReG
    from pyro_vae.objectives import Objective as Objective
    from pyro_vae.objectives import Renyi as Renyi
    from pyro_vae.objectives import ReweightedWakeSleep as ReweightedWakeSleep
    from pyro_vae.objectives import WakeSleep as WakeSleep
    from pyro_vae.programs import Program as Program
    from pyro_vae.programs import check_program as check_program
    from pyro_vae.programs import log_weights as log_weights
    from pyro_vae.runs import StoredRun as StoredRun
    from pyro_vae.runs import load_run as load_run
    from pyro_vae.training import Run as Run
    from pyro_vae.training import fit as fit

__version__ = "0.1.0"

# Imported on first use: `pyro-vae --help` need not wait for torch.
_HOMES = {
    "FIVO": "objectives",
    "IWAE": "objectives",
    "MCEM": "objectives",
    "VIMCO": "objectives",
    "DReG": "objectives",
    "Renyi": "objectives",
    "ReweightedWakeSleep": "objectives",
    "WakeSleep": "objectives",
    "SGVB": "objectives",
    "VAE": "models",
    "Comparison": "experiments",
    "Dataset": "data",
    "DeepMarkovModel": "models",
    "GaussianMixture": "models",
    "HierarchicalVAE": "models",
    "LinearGaussian": "models",
    "LinearGaussianSSM": "models",
    "Objective": "objectives",
    "ProdLDA": "models",
    "Program": "programs",
    "Run": "training",
    "Score": "evaluation",
    "SemiAmortized": "models",
    "SigmoidBeliefNetwork": "models",
    "StochasticVolatility": "models",
    "SwitchingLDS": "models",
    "VariationalRNN": "models",
    "StoredRun": "runs",
    "bayesian": "models.full_bayes",
    "bidirectional": "evaluation",
    "bouncing_balls": "data",
    "check_program": "programs",
    "compare": "experiments.compare",
    "evaluate_bound": "evaluation",
    "fit": "training",
    "load_dataset": "data",
    "load_run": "runs",
    "log_marginal": "evaluation",
    "log_weights": "programs",
    "pad_sequences": "data",
    "pendulum": "data",
}

_MODULES = ("evaluation", "plots")

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *_HOMES, *_MODULES]
