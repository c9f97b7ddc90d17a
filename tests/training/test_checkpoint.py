"""Checkpoints are whole or refused, whatever happens to the process, the disk or the bytes."""

import errno
import itertools
import json
import os

import pytest
import torch

import pyro_vae as pv
from pyro_vae.training import CheckpointError
from pyro_vae.training import checkpoint as module
from pyro_vae.training.checkpoint import FORMAT_VERSION, Checkpoint, RunDirectory


def checkpoint(number):
    return Checkpoint({"a/b": torch.full((3,), float(number)), "c": torch.arange(number)}, {"position": {"n": number}})


@pytest.fixture
def directory(tmp_path):
    return RunDirectory(tmp_path)


def test_round_trip(directory):
    directory.save(checkpoint(4))
    read = directory.load()
    assert read.state["position"] == {"n": 4}
    assert torch.equal(read.part("a")["b"], torch.full((3,), 4.0))
    assert read.tensors["c"].tolist() == [0, 1, 2, 3]
    assert not directory.previous_file.exists()


class Killed(BaseException):
    """Stands for SIGKILL: nothing of the writer runs after it."""


OPERATIONS = ("replace", "fsync", "unlink")


def test_killed_between_any_two_operations_a_whole_checkpoint_is_left(directory, monkeypatch):
    """Cut the writer off before its 1st, 2nd, ... operation on the file system, until it gets through."""
    directory.save(checkpoint(1))
    real = {name: getattr(os, name) for name in OPERATIONS}
    seen = []
    for survived in itertools.count():
        left = iter(range(survived))

        def limited(name, left=left):
            def call(*args, **kwargs):
                if next(left, None) is None:
                    raise Killed
                return real[name](*args, **kwargs)

            return call

        for name in OPERATIONS:
            monkeypatch.setattr(module.os, name, limited(name))
        try:
            directory.save(checkpoint(2))
            finished = True
        except Killed:
            finished = False
        monkeypatch.undo()
        seen.append(directory.load().state["position"]["n"])
        if finished:
            break
    assert seen[0] == 1
    assert seen[-1] == 2
    assert seen == sorted(seen)
    assert len(seen) >= 6


@pytest.mark.parametrize("file", ["checkpoint.safetensors", "state.json"])
def test_any_flipped_byte_is_found(directory, file):
    directory.save(checkpoint(5))
    path = directory.path / file
    whole = path.read_bytes()
    for position in range(0, len(whole), max(1, len(whole) // 40)):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        with pytest.raises(CheckpointError, match=r"corrupt|format version"):
            directory.load()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="corrupt"):
        directory.load()


def test_newer_version_is_refused(directory):
    directory.save(checkpoint(1))
    state = json.loads(directory.state_file.read_text())
    del state["state_sha256"]
    state["format_version"] = FORMAT_VERSION + 1
    state["state_sha256"] = module._digest(state)
    directory.state_file.write_text(json.dumps(state))
    with pytest.raises(CheckpointError, match=f"format version {FORMAT_VERSION + 1}.*install a newer"):
        directory.load()


def test_no_run_at_all(directory):
    with pytest.raises(CheckpointError, match="holds no run"):
        directory.load()


def test_full_disk_keeps_the_checkpoint_before(tmp_path, monkeypatch):
    """The second write of tensors finds no space: the run stops, says so, and what was saved is whole."""
    directory = RunDirectory(tmp_path / "r")
    real, writes = module.os.fsync, []

    def full(descriptor):
        writes.append(descriptor)
        if len(writes) > 8:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr(module.os, "fsync", full)
    vae = pv.VAE((8, 8), 2, (8,))
    with pytest.raises(OSError, match=r"No space left on device; the last good checkpoint is kept in"):
        pv.fit(vae, pv.load_dataset("digits"), epochs=3, checkpoint_every=100, run_dir=directory.path)
    monkeypatch.undo()
    assert directory.load().state["position"]["samples"] == 100
    assert not list(directory.path.glob("*.new"))


def test_two_kills_in_a_row_leave_the_checkpoint_that_counts(directory, monkeypatch):
    """The second save must not move the tensors of the first, which no state speaks of, over the ones that count."""
    directory.save(checkpoint(1))
    for survived in (2, 1):  # killed before the state is put in place, then between the two moves of the tensors
        left, real = iter(range(survived)), os.replace

        def limited(*args, left=left, real=real):
            if next(left, None) is None:
                raise Killed
            return real(*args)

        monkeypatch.setattr(module.os, "replace", limited)
        with pytest.raises(Killed):
            directory.save(checkpoint(2))
        monkeypatch.undo()
        assert directory.load().state["position"]["n"] == 1
    directory.save(checkpoint(3))
    assert directory.load().state["position"]["n"] == 3


def test_reading_while_another_process_saves(directory, monkeypatch):
    """A save between reading the state and reading the tensors is met by reading again."""
    directory.save(checkpoint(1))
    real, saves = module._read_json, iter([2, 3])

    def slow(file):
        content = real(file)
        if file == directory.state_file and (number := next(saves, None)) is not None:
            directory.save(checkpoint(number))
        return content

    monkeypatch.setattr(module, "_read_json", slow)
    assert directory.load().state["position"]["n"] == 3


def test_tensors_that_share_memory(directory):
    shared = torch.arange(6.0)
    directory.save(Checkpoint({"a": shared, "b": shared, "c": shared[2:]}, {}))
    read = directory.load().tensors
    assert torch.equal(read["b"], shared)
    assert torch.equal(read["c"], shared[2:])


def test_killed_while_writing_the_first_file(directory):
    (directory.path / "config.json.new").write_text("{")
    directory.require_new()
    (directory.path / "other").touch()
    with pytest.raises(module.RunDirectoryError, match="not empty"):
        directory.require_new()
