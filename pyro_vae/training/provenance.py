"""What a run is, in words that JSON can hold and a later process can compare itself with."""

from __future__ import annotations

import json
import platform
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from torch import Tensor

from pyro_vae.data import Dataset, TensorData
from pyro_vae.data.batches import as_column, stored_blocks
from pyro_vae.inputs import Inputs
from pyro_vae.training.checkpoint import CheckpointError

__all__ = ["checksum", "describe", "describe_data", "describe_environment", "require_same_run"]


# What older runs do not state.
_SINCE = {"trained": "all", "precision": "full", "schedule_every": "epoch", "kl_by_site": False, "trim_padding": False}
_SINCE |= {"steps": "eager", "processes": 1}


def describe(thing: Any) -> dict[str, Any]:
    """Type and, where it has one, configuration of a program or an objective, as JSON can hold them."""
    config = getattr(thing, "config", None)
    return {"type": type(thing).__name__} | ({"config": config} if isinstance(config, dict) else {})


def describe_data(data: Any, inputs: Inputs) -> dict[str, Any]:
    """Enough of the data to know them again: name and place if they have one, and a checksum of tensors."""
    named = {"source": data.source, "binarize": data.binarize} if isinstance(data, Dataset) else {}
    if not isinstance(inputs.data, TensorData):
        return {**named, "checksum": None}
    return {**named, "num_data": len(inputs.data), "checksum": checksum(inputs.data.columns.values())}


def checksum(columns: Iterable[Any]) -> int:
    """CRC-32 of the shapes, types and bytes of columns: tensors, or sparse rows as they are stored."""
    value = 0
    for column in (as_column("x", given) for given in columns):
        value = crc32(f"{column.dtype} {tuple(column.shape)}".encode(), value)
        for block in stored_blocks(column.detach() if isinstance(column, Tensor) else column):
            value = crc32(block.cpu().contiguous().view(torch.uint8).numpy().data, value)
    return value


def describe_environment(parameters: Mapping[str, Tensor], compile: bool, processes: int = 1) -> dict[str, Any]:
    """What decides, beside the settings, whether a run can be repeated bit for bit."""
    first = next(iter(parameters.values()))
    return {
        "steps": "compiled" if compile else "eager",
        "processes": processes,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "device": str(first.device),
        "dtype": str(first.dtype),
    }


def _is_older_name(before: Any, now: Any) -> bool:
    """Whether a run's optimiser or schedule was recorded by its name alone, as was done before its numbers were."""
    texts = isinstance(before, str) and isinstance(now, str)
    return texts and "(" not in before and before == now.partition("(")[0]


def require_same_run(stored: Mapping[str, Any], config: Mapping[str, Any], path: Path) -> None:
    """Refuse to go on with other settings than the run's, the budget apart; warn of another environment."""
    stored_parameters, parameters = stored.get("parameters", {}), config["parameters"]
    if stored_parameters != parameters:
        names = sorted(stored_parameters.keys() | parameters.keys())
        name = next(n for n in names if stored_parameters.get(n) != parameters.get(n))
        raise CheckpointError(
            f"{path} holds a run of another architecture: '{name}' has shape "
            f"{stored_parameters.get(name)} there and {parameters.get(name)} here"
        )
    config = json.loads(json.dumps(config))
    for section in ("objective", "data", "fit"):
        there, here = stored.get(section) or {}, config[section] or {}
        for name in sorted(there.keys() | here.keys()):
            before, now = there.get(name, _SINCE.get(name)), here.get(name)
            if name not in ("num_samples", "epochs") and before != now and not _is_older_name(before, now):
                if name == "checksum":
                    raise CheckpointError(
                        f"the training data are not those that {path} was trained on: checksums differ"
                    )
                raise CheckpointError(
                    f"{path} holds a run with {name}={there.get(name)!r}, got {here.get(name)!r}: a run "
                    "is resumed with its own settings, except for the budget"
                )
    if "evaluate_with" in stored and stored["evaluate_with"] != config.get("evaluate_with", stored["evaluate_with"]):
        raise CheckpointError(
            f"{path} holds a run evaluated with {stored['evaluate_with']}, got {config['evaluate_with']}: a history "
            "holds the bounds of one objective"
        )
    for name, value in config["environment"].items():
        if (before := stored.get("environment", {}).get(name, _SINCE.get(name))) != value:
            warnings.warn(
                f"this run was trained with {name} {before}, now {value}: it goes on, but not bit for bit", stacklevel=6
            )
