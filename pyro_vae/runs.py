"""Stored runs: the model, the data and the history of a run directory, for whoever comes back to it."""

from __future__ import annotations

import contextlib
import inspect
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyro_vae import models
from pyro_vae.data import Dataset, load_dataset
from pyro_vae.inputs import open_inputs
from pyro_vae.objectives import OBJECTIVES, Objective
from pyro_vae.programs import HasModelAndGuide, as_program
from pyro_vae.training import fit
from pyro_vae.training.checkpoint import CheckpointError, RunDirectory, RunDirectoryError, copy_into, model_tensors
from pyro_vae.training.optimizers import is_name
from pyro_vae.training.provenance import checksum

__all__ = ["StoredRun", "build_model", "build_objective", "fit_settings", "load_run"]


@dataclass(frozen=True, eq=False)
class StoredRun:
    """A run read from its directory.

    Attributes:
        path: the directory.
        program: the model, with its trained parameters: those of the best validation bound where one was sought.
        config: what the run is.
        history: a row per evaluation, as in :class:`pyro_vae.Run`.
    """

    path: Path
    program: Any
    config: dict[str, Any]
    history: list[dict[str, Any]]

    @property
    def has_trained_guide(self) -> bool:
        """Whether the objective trained the guide; Monte Carlo EM leaves it as it was."""
        return bool(self.config.get("trains_guide", True))

    def dataset(self, root: str | os.PathLike[str] | None = None) -> Dataset:
        """The data set that the run was trained on.

        Args:
            root: where named data sets are kept; see :func:`pyro_vae.load_dataset`.

        Raises:
            CheckpointError: the run was trained on data that have no name, or that have changed since.
        """
        described = self.config["data"]
        if not described.get("source"):
            raise CheckpointError(
                f"the run in {self.path} was trained on data without a name or a path; pass them yourself"
            )
        data = load_dataset(described["source"], root=root, binarize=described["binarize"])
        if not any(described["checksum"] == checksum(columns) for columns in _columns_of(data)):
            raise CheckpointError(
                f"{described['source']} has changed since the run in {self.path} was trained on it, and its splits may "
                "hold other data: pass the data yourself"
            )
        return data


def load_run(run_dir: str | os.PathLike[str], program: HasModelAndGuide | None = None, data: Any = None) -> StoredRun:
    """Read a run.

    Args:
        run_dir: the directory that ``fit`` or ``pyro-vae train`` wrote.
        program: the run's program, whose parameters are overwritten in place; None builds a model of this package.
        data: some data that the program takes, for one run of it: a program that names its parameters in its functions
            (``pyro.param``, ``pyro.module``) has none before. A program of your own needs them.

    Returns:
        The run. A program that was built is on the CPU.

    Raises:
        RunDirectoryError: there is no such directory.
        CheckpointError: it holds no run, the checkpoint is corrupt or of another architecture, or the program is not a
            model of this package and was not passed.

    Example:
        >>> import tempfile, pyro_vae as pv
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     vae = pv.VAE((8, 8), 2, (16,))
        ...     run = pv.fit(vae, pv.load_dataset("digits"), epochs=1, run_dir=folder)
        ...     same = load_run(folder).program
        >>> bool((same.decoder[0].weight == vae.decoder[0].weight).all())
        True
    """
    directory = RunDirectory(Path(run_dir))
    if not directory.path.is_dir():
        raise RunDirectoryError(f"expected the directory of a run, but there is no {directory.path}")
    config = directory.read_config()
    checkpoint = directory.load()
    average = {f"parameters/{name}": tensor for name, tensor in checkpoint.part("average").items()}
    tensors = checkpoint.part("best") or checkpoint.part("model") | average
    if program is None:
        kinds = {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}
        program = build_model(config, directory.path).to(next(iter(kinds)))
    bridged = as_program(program)
    if data is not None:
        open_inputs(bridged, data)
    copy_into(model_tensors(bridged, bridged.named_parameters()), tensors)
    return StoredRun(directory.path, program, config, checkpoint.state["position"]["history"])


def _columns_of(data: Dataset) -> Iterator[list[Any]]:
    """The training data with all that a program may have been given beside them, and without."""
    lengths, mask = ([] if column is None else [column] for column in (data.train_lengths, data.observed("train")))
    yield [data.train, *lengths, *mask]
    yield [data.train, *mask]
    yield [data.train, *lengths]
    yield [data.train]


def build_model(config: Mapping[str, Any], path: Path) -> Any:
    """The model of a run's configuration, with new parameters.

    Raises:
        CheckpointError: it is not a model of this package.
    """
    described = config.get("program", {})
    if described.get("type") not in models.__all__ or "config" not in described:
        raise CheckpointError(
            f"the program of {path} is {described.get('type')}, which only its own code can build: "
            "pass it, load_run(run_dir, program, data=data), or go on by fit(program, data, run_dir=..., resume=True)"
        )
    with _config_of(path):
        return getattr(models, described["type"])(**described["config"])


@contextlib.contextmanager
def _config_of(path: Path) -> Iterator[None]:
    """What a damaged configuration leads to is an error of the configuration."""
    try:
        yield
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path / 'config.json'} is corrupt: {type(error).__name__}: {error}") from error


def fit_settings(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The settings of a run's configuration, as arguments of ``fit``.

    Raises:
        CheckpointError: they are not there, not those of ``fit``, or optimiser or schedule are made by a function.
    """
    with _config_of(path):
        settings = dict(config["fit"])
        inspect.signature(fit).bind(None, None, **settings)
    made = {"learning_rate_schedule": settings.get("learning_rate_schedule")}
    if not is_name(settings.get("optimizer", "adagrad")):
        made["optimizer"] = settings["optimizer"]
    for name, text in made.items():
        if isinstance(text, str):
            raise CheckpointError(
                f"the {name} of {path} is {text}, which only its own code can make: go on by "
                f"fit(..., {name}=..., run_dir=..., resume=True)"
            )
    return settings


def build_objective(config: Mapping[str, Any], path: Path) -> Objective:
    """The objective of a run's configuration.

    Raises:
        CheckpointError: it is not an objective of this package.
    """
    described = config.get("objective", {})
    for cls in OBJECTIVES.values():
        if cls.__name__ == described.get("type") and "config" in described:
            with _config_of(path):
                return cls(**described["config"])
    raise CheckpointError(
        f"the objective of {path} is {described.get('type')}, which only its own code can build: go on by "
        "fit(..., objective=..., run_dir=..., resume=True)"
    )
