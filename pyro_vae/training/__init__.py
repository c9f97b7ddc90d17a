"""Training: the loop, its optimisers, checkpoints and run directories."""

from pyro_vae.training.checkpoint import CheckpointError, RunDirectoryError
from pyro_vae.training.loop import Run, TrainingInterrupted, fit
from pyro_vae.training.step import NonFiniteLossError

__all__ = ["CheckpointError", "NonFiniteLossError", "Run", "RunDirectoryError", "TrainingInterrupted", "fit"]
