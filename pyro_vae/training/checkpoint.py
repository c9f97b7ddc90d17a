"""Run directories and checkpoints: safetensors and JSON, written whole or not at all.

A run directory holds ``config.json`` (what the run is), ``metrics.jsonl`` (a line per evaluation), figures, and the
checkpoint in two files: ``checkpoint.safetensors`` (every tensor) and ``state.json`` (everything else, and the SHA-256
of both). ``state.json`` is the one that counts: it is replaced last, in one step of the file system, and the tensors it
speaks of are kept under ``checkpoint.previous.safetensors`` until then. So whenever the process is killed, a whole
checkpoint can be read.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors.torch import load, save
from torch import Tensor

from pyro_vae.programs import Program

__all__ = [
    "FORMAT_VERSION",
    "Checkpoint",
    "CheckpointError",
    "RunDirectory",
    "RunDirectoryError",
    "copy_into",
    "model_tensors",
    "replace_file",
]

FORMAT_VERSION = 1


class RunDirectoryError(ValueError):
    """A run directory cannot be used; nothing in it was changed."""


class CheckpointError(ValueError):
    """A checkpoint cannot be read, or belongs to something else."""


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """What a run needs to go on: tensors by name, and state that JSON can hold."""

    tensors: dict[str, Tensor]
    state: dict[str, Any]

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The tensors under ``prefix/``, without it."""
        start = f"{prefix}/"
        return {name[len(start) :]: t for name, t in self.tensors.items() if name.startswith(start)}


@dataclass(frozen=True)
class RunDirectory:
    """The files of one run.

    Attributes:
        path: the directory.
    """

    path: Path

    @property
    def config_file(self) -> Path:
        """What the run is."""
        return self.path / "config.json"

    @property
    def metrics_file(self) -> Path:
        """A line per evaluation."""
        return self.path / "metrics.jsonl"

    @property
    def tensors_file(self) -> Path:
        """The checkpoint's tensors."""
        return self.path / "checkpoint.safetensors"

    @property
    def state_file(self) -> Path:
        """The checkpoint's state, and checksums."""
        return self.path / "state.json"

    @property
    def previous_file(self) -> Path:
        """The tensors of the checkpoint before, while a new one is put in place."""
        return self.path / "checkpoint.previous.safetensors"

    @property
    def figures(self) -> Path:
        """Where pictures go."""
        return self.path / "figures"

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes out; the system releases the lock when this process ends, however it ends.

        Raises:
            RunDirectoryError: another process has it, or the path is no directory.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise RunDirectoryError(f"expected a directory for the run, but {self.path} is a file") from error
        lock = FileLock(self.path / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise RunDirectoryError(f"another process is training in {self.path}") from error
        try:
            yield
        finally:
            lock.release()

    def require_new(self) -> None:
        """Refuse a directory that holds a run or anything else.

        Raises:
            RunDirectoryError: it is not empty.
        """
        unfinished = self.config_file.name + ".new"  # of a process killed while it wrote its first file
        if any(entry.name not in (".lock", unfinished) for entry in self.path.iterdir()):
            what = "holds a run" if self.config_file.exists() else "is not empty"
            raise RunDirectoryError(
                f"{self.path} {what}: resume it (resume=True, or --resume {self.path}) or choose another directory"
            )

    def read_config(self) -> dict[str, Any]:
        """The run's configuration.

        Raises:
            CheckpointError: there is none, or it is not JSON.
        """
        return _read_json(self.config_file)

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Write the run's configuration."""
        replace_file(self.config_file, json.dumps(config, indent=2).encode() + b"\n")

    def write_metrics(self, history: list[dict[str, Any]]) -> None:
        """Write the whole history anew, after a resume."""
        replace_file(self.metrics_file, "".join(json.dumps(row) + "\n" for row in history).encode())

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        """Add a line."""
        with self.metrics_file.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def save(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint; the one before stays readable until this one is whole.

        Raises:
            OSError: the disk is full or cannot be written; the checkpoint before is untouched.
        """
        tensors = save(  # of copies: it refuses tensors that share memory, such as tied buffers
            {name: t.clone(memory_format=torch.contiguous_format) for name, t in checkpoint.tensors.items()}
        )
        state = {"format_version": FORMAT_VERSION, **checkpoint.state, "tensors_sha256": _sha256(tensors)}
        state["state_sha256"] = _digest(state)
        new_tensors = _write(self.tensors_file, tensors)
        try:
            new_state = _write(self.state_file, json.dumps(state).encode())
        except OSError:
            new_tensors.unlink(missing_ok=True)
            raise
        if self.tensors_file.exists() and not self._needs_previous():
            os.replace(self.tensors_file, self.previous_file)
        os.replace(new_tensors, self.tensors_file)
        os.replace(new_state, self.state_file)
        _sync_directory(self.path)
        self.previous_file.unlink(missing_ok=True)

    def _needs_previous(self) -> bool:
        """Whether a killed process left a state that speaks of the tensors under the previous name."""
        if not (self.previous_file.exists() and self.state_file.exists()):
            return False
        return _read_json(self.state_file).get("tensors_sha256") == _sha256(self.previous_file.read_bytes())

    def load(self) -> Checkpoint:
        """Read the newest whole checkpoint, also while another process trains in the directory.

        Raises:
            CheckpointError: there is none, a byte of it is wrong, or a newer version wrote it.
        """
        while True:
            read = self.state_file.read_bytes() if self.state_file.exists() else b""
            try:
                return self._load()
            except CheckpointError:
                if not self.state_file.exists() or self.state_file.read_bytes() == read:
                    raise  # otherwise a new checkpoint was put in place in the meantime

    def _load(self) -> Checkpoint:
        state = _read_json(self.state_file)
        version = state.get("format_version")
        if not isinstance(version, int) or version > FORMAT_VERSION:
            raise CheckpointError(
                f"{self.state_file} has format version {version!r}, this version of pyro_vae reads up to "
                f"{FORMAT_VERSION}: install a newer one"
            )
        if state.pop("state_sha256", None) != _digest(state):
            raise CheckpointError(f"{self.state_file} is corrupt: its checksum does not agree with its content")
        wanted = state.pop("tensors_sha256")
        found = []
        for file in (self.tensors_file, self.previous_file):  # in the order in which a save moves them
            with contextlib.suppress(FileNotFoundError):
                content = file.read_bytes()
                if (digest := _sha256(content)) == wanted:
                    return Checkpoint(load(content), state)
                found.append(digest)
        raise CheckpointError(
            f"{self.tensors_file} is corrupt or missing: expected SHA-256 {wanted}, "
            f"got {' and '.join(found) or 'no file'}"
        )


def model_tensors(program: Program, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a checkpoint holds of a program: its parameters, and its modules' buffers, but for constants."""
    kept = {f"{name}.{key}" for name, module in program.modules().items() for key in module.state_dict(keep_vars=True)}
    buffers = {f"buffers/{name}": buffer for name, buffer in program.named_buffers().items() if name in kept}
    return {f"parameters/{name}": tensor for name, tensor in parameters.items()} | buffers


def copy_into(tensors: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    """Copy values into tensors of the same names and shapes, in place.

    Raises:
        CheckpointError: names or shapes differ.
    """
    shapes = {name: tuple(t.shape) for name, t in tensors.items()}
    stored = {name: tuple(t.shape) for name, t in values.items()}
    if shapes != stored:
        name = next(n for n in sorted(shapes.keys() | stored.keys()) if shapes.get(n) != stored.get(n))
        raise CheckpointError(
            f"the checkpoint is of another architecture: {name} has shape {stored.get(name, 'none')} there "
            f"and {shapes.get(name, 'none')} here"
        )
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(values[name])


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _digest(state: Mapping[str, Any]) -> str:
    return _sha256(json.dumps(state, sort_keys=True).encode())


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except FileNotFoundError as error:
        raise CheckpointError(f"{file.parent} holds no run: there is no {file.name}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file} is corrupt: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} is corrupt: expected a JSON object, got {type(content).__name__}")
    return content


def _write(file: Path, content: bytes) -> Path:
    """Write ``content`` beside ``file``, down to the disk; nothing is left behind if that fails."""
    new = file.with_name(file.name + ".new")
    try:
        with new.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
    except OSError:
        new.unlink(missing_ok=True)
        raise
    return new


def replace_file(file: Path, content: bytes) -> None:
    """Write a file whole or not at all, in the place of what it held.

    Raises:
        OSError: the disk is full or cannot be written; the file is untouched.
    """
    os.replace(_write(file, content), file)


def _sync_directory(path: Path) -> None:
    if hasattr(os, "O_DIRECTORY"):  # not on Windows
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
