"""Training: the loop, its optimisers, checkpoints and run directories."""

from pyro_vae.training.checkpoint import CheckpointError, RunDirectoryError
from pyro_vae.training.interrupts import TrainingInterrupted
from pyro_vae.training.loop import Run, fit
from pyro_vae.training.step import NonFiniteLossError

__all__ = ["CheckpointError", "NonFiniteLossError", "Run", "RunDirectoryError", "TrainingInterrupted", "fit"]
