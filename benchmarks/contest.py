"""Fair timing in one process: who computes the right bound, and then how long everyone takes, in turns.

A turn is one call that is not timed, and then as many as fill a tenth of a second. The untimed call brings a
contestant's own parameters back into the caches, and gives the threads of the one before time to fall asleep: OpenMP's
spin for a moment after their last task, XLA's do not. OMP_WAIT_POLICY is left as the system has it, for "passive" would
slow down everyone who uses OpenMP, and them alone. Every round has an order of its own.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from peers import Peer
from torch import Tensor

import pyro_vae as pv
from pyro_vae.numerics import log_mean_exp

__all__ = ["Entry", "admit", "measure", "quartiles", "reference_bounds", "summaries"]

TOLERANCE = 2e-4  # nats per datum: three times the distance of neighbouring float32 numbers at 550 nats
SECONDS_A_TURN = 0.1
STEPS_OF_TRIAL = 20  # before a bound is read again, to see that it was trained

Maker = Callable[[], Peer]


@dataclass
class Entry:
    """What is known of one contestant.

    Attributes:
        name: what it is called.
        peer: who takes part; None for those who do not.
        absent: why not.
        facts: what the check found.
        seconds: per training step, or per datum scored, of each round.
        processor: seconds of processor time per second of time, of each round: threads at work, on average.
    """

    name: str
    peer: Peer | None = None
    absent: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)


@torch.no_grad()
def reference_bounds(vae: pv.VAE, x: Tensor, eps: Tensor) -> dict[str, float]:
    """Every estimator that a peer may compute, by ``pyro_vae.log_weights`` in double precision, in nats per datum."""
    exact = pv.VAE(**vae.config).double()
    exact.load_state_dict(vae.state_dict())
    x, normal = x.double(), exact.encode(x.double()).base_dist
    given: dict[str, Any] = {"num_particles": len(eps), "latents": {"z": normal.loc + normal.scale * eps.double()}}
    log_w = pv.log_weights(exact.model, exact.guide, (x,), **given).log_w
    closed = pv.log_weights(exact.model, exact.guide, (x,), analytic_kl=True, **given)
    bounds = {
        "A": log_w,
        "B": closed.log_likelihood["x"] - closed.kl["z"],
        "IWAE": log_mean_exp(log_w),
        "weighted": (log_w.softmax(0) * log_w).sum(0),
    }
    return {name: values.mean().item() for name, values in bounds.items()}


def admit(makers: Mapping[str, Maker], vae: pv.VAE, x: Tensor, num_particles: int, trains: bool = True) -> list[Entry]:
    """Everyone who can take part: whose software is there, whose bound is right, and whose steps train.

    Args:
        makers: a function that makes each contestant, by name.
        vae: the model whose parameters all have.
        x: the minibatch, (M, 784).
        num_particles: K.
        trains: whether a step is a step of training, and not the scoring of data.
    """
    eps = torch.randn(num_particles, len(x), vae.latent_dim)
    expected = reference_bounds(vae, x, eps)
    entries = [_admit(name, make, expected, x, eps) for name, make in makers.items()]
    if trains:
        _refuse_untrained(entries, x, eps)
    return entries


def _admit(name: str, make: Maker, expected: Mapping[str, float], x: Tensor, eps: Tensor) -> Entry:
    try:
        peer = make()
    except (ImportError, NotImplementedError) as reason:
        return Entry(name, absent=str(reason))
    if peer.estimator is None:
        return Entry(name, peer)
    found, wanted = peer.bound(x, eps), expected[peer.estimator]
    facts = {"estimator": peer.estimator, "bound": found, "difference": found - wanted}
    if peer.estimator == "weighted":
        facts["difference_from_the_bound"] = found - expected["IWAE"]
    if abs(found - wanted) <= TOLERANCE:
        return Entry(name, peer, facts=facts)
    return Entry(name, absent=f"its bound is {found:.5f}, expected {wanted:.5f} nats per datum", facts=facts)


def _refuse_untrained(entries: Iterable[Entry], x: Tensor, eps: Tensor) -> None:
    """Drop those whose bound has not risen, after some steps, by about as much as the others' has."""
    trained = [entry for entry in entries if entry.peer is not None and entry.peer.estimator is not None]
    for entry in trained:
        entry.facts["rise"] = _rise(entry, x, eps)
    usual = float(np.median([entry.facts["rise"] for entry in trained]))
    for entry in trained:
        if not 0.5 * usual < entry.facts["rise"] < 2 * usual:
            entry.peer = None
            entry.absent = f"its bound rose by {entry.facts['rise']:.2f} nats, others' by {usual:.2f}"


def _rise(entry: Entry, x: Tensor, eps: Tensor) -> float:
    peer = entry.peer
    assert peer is not None
    with peer.context():
        for _ in range(STEPS_OF_TRIAL // peer.steps):
            peer.step()
    return peer.bound(x, eps) - entry.facts["bound"]


def measure(entries: Sequence[Entry], rounds: int, seed: int) -> None:
    """Let everyone take turns, and note the times.

    Args:
        entries: contestants; times are added to them.
        rounds: turns of each.
        seed: of the order in each round.
    """
    present = [entry for entry in entries if entry.peer is not None]
    calls = {entry.name: _calls_a_turn(entry.peer) for entry in present}
    order = random.Random(seed)
    for _ in range(rounds):
        for entry in order.sample(present, len(present)):
            seconds, processor = _turn(entry.peer, calls[entry.name])
            entry.seconds.append(seconds)
            entry.processor.append(processor)


def _calls_a_turn(peer: Peer) -> int:
    seconds, _ = _turn(peer, 1)
    return max(1, round(SECONDS_A_TURN / (seconds * peer.steps)))


def _turn(peer: Peer, calls: int) -> tuple[float, float]:
    """Seconds per step, and processor time per time."""
    with peer.context():
        peer.step()
        start, start_processor = time.perf_counter(), time.process_time()
        for _ in range(calls):
            peer.step()
        seconds, processor = time.perf_counter() - start, time.process_time() - start_processor
    return seconds / (calls * peer.steps), processor / seconds


def summaries(entries: Sequence[Entry]) -> dict[str, dict[str, Any]]:
    """Medians and quartiles, by contestant, and ratios to the package's best and to the floor, round by round."""
    timed = [entry for entry in entries if entry.seconds]
    ours = [entry for entry in timed if entry.name.startswith("pyro_vae")]
    floors = [entry for entry in timed if entry.peer is not None and entry.peer.estimator is None]
    against = {
        "pyro_vae": min(ours, key=lambda entry: float(np.median(entry.seconds)), default=None),
        "floor": floors[0] if floors else None,
    }
    return {entry.name: _summary(entry, against) for entry in entries}


def _summary(entry: Entry, against: Mapping[str, Entry | None]) -> dict[str, Any]:
    if not entry.seconds:
        return {"absent": entry.absent, **entry.facts}
    ratios = {
        f"times_{name}": quartiles(np.divide(entry.seconds, other.seconds))
        for name, other in against.items()
        if other is not None
    }
    threads = float(np.median(entry.processor))
    return {"seconds": quartiles(entry.seconds), **ratios, "threads_at_work": threads, **entry.facts}


def quartiles(values: Iterable[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, median, high = np.quantile(list(values), [0.25, 0.5, 0.75]).tolist()
    return {"median": median, "lower_quartile": low, "upper_quartile": high}
