"""Stored runs: the model, the data and the history of a run directory, for whoever comes back to it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from pyro_vae import models
from pyro_vae.data import Dataset, load_dataset
from pyro_vae.objectives import OBJECTIVES, Objective
from pyro_vae.training.checkpoint import CheckpointError, RunDirectory, RunDirectoryError

__all__ = ["StoredRun", "build_model", "build_objective", "load_run"]


@dataclass(frozen=True, eq=False)
class StoredRun:
    """A run read from its directory.

    Attributes:
        path: the directory.
        program: the model, with its trained parameters: those of the best validation bound where the run stopped early.
        config: what the run is.
        history: a row per evaluation, as in :class:`pyro_vae.Run`.
    """

    path: Path
    program: Any
    config: dict[str, Any]
    history: list[dict[str, Any]]

    def dataset(self, root: str | os.PathLike[str] | None = None) -> Dataset:
        """The data set that the run was trained on.

        Args:
            root: where named data sets are kept; see :func:`pyro_vae.load_dataset`.

        Raises:
            CheckpointError: the run was trained on data that have no name.
        """
        described = self.config["data"]
        if "source" not in described:
            raise CheckpointError(
                f"the run in {self.path} was trained on data without a name or a path; pass them yourself"
            )
        return load_dataset(described["source"], root=root, binarize=described["binarize"])


def load_run(run_dir: str | os.PathLike[str]) -> StoredRun:
    """Read a run whose program is a model of this package.

    A program of your own functions is restored by ``fit(program, data, run_dir=..., resume=True)`` with the settings of
    the run, which does nothing more once the budget is spent.

    Args:
        run_dir: the directory that ``fit`` or ``pyro-vae train`` wrote.

    Returns:
        The run; its program is on the CPU.

    Raises:
        RunDirectoryError: there is no such directory.
        CheckpointError: it holds no run, the checkpoint is corrupt, or its program is not a model of this package.
    """
    directory = RunDirectory(Path(run_dir))
    if not directory.path.is_dir():
        raise RunDirectoryError(f"expected the directory of a run, but there is no {directory.path}")
    config = directory.read_config()
    checkpoint = directory.load()
    program = build_model(config, directory.path)
    tensors = checkpoint.part("best") or checkpoint.part("model")
    program.to(next(iter(tensors.values())).dtype)
    _load_parameters(program, tensors)
    return StoredRun(directory.path, program, config, checkpoint.state["position"]["history"])


def build_model(config: Mapping[str, Any], path: Path) -> Any:
    """The model of a run's configuration, with new parameters.

    Raises:
        CheckpointError: it is not a model of this package.
    """
    described = config.get("program", {})
    if described.get("type") not in models.__all__ or "config" not in described:
        raise CheckpointError(
            f"the program of {path} is {described.get('type')}, which only its own code can build: "
            "restore it by fit(program, data, run_dir=..., resume=True)"
        )
    return getattr(models, described["type"])(**described["config"])


def build_objective(config: Mapping[str, Any], path: Path) -> Objective:
    """The objective of a run's configuration.

    Raises:
        CheckpointError: it is not an objective of this package.
    """
    described = config.get("objective", {})
    for cls in OBJECTIVES.values():
        if cls.__name__ == described.get("type") and "config" in described:
            return cls(**described["config"])
    raise CheckpointError(
        f"the objective of {path} is {described.get('type')}, which only its own code can build: go on by "
        "fit(..., objective=..., run_dir=..., resume=True)"
    )


def _load_parameters(program: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    prefix = "parameters/"
    values = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    try:
        program.load_state_dict(values)
    except RuntimeError as error:
        raise CheckpointError(f"the checkpoint is of another architecture: {error}") from error
