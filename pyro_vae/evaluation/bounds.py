"""The value of a bound over a data set, with its standard error.

What is evaluated is the bound itself, never a surrogate loss and never an annealed one; nothing of the program changes.
The estimate is unbiased for the mean bound over the data's distribution; its error is over data and noise together.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import pyro
import torch
from torch import Tensor

from pyro_vae.data import BatchIterable, Columns, TensorData
from pyro_vae.inputs import Inputs, batch_size_of, open_inputs
from pyro_vae.numerics import forked_rng, mean_and_standard_error, ratio_and_standard_error, seeded
from pyro_vae.objectives import SGVB, Objective
from pyro_vae.parallel import Ranks, is_sharded, ranks
from pyro_vae.programs import HasModelAndGuide, Program, as_program, log_weights, minibatch_scale

__all__ = ["BoundEstimate", "evaluate_bound", "evaluate_kl", "frozen"]

_MAX_NUMBERS = 20_000_000  # of a batch's data, times particles: 80 MB in single precision

Found: TypeAlias = tuple[Tensor, Tensor | None]  # values and steps of a batch, (M,) each


@dataclass(frozen=True)
class BoundEstimate:
    """A bound's mean over data and its standard error, both in nats per datum.

    Attributes:
        mean: nats per datum.
        std_error: of the mean, nats per datum.
        per_step: of sequences (a program that takes an argument ``lengths``), the sum of their bounds over the sum of
            their steps, over the whole set: nats per step, as :attr:`pyro_vae.Score.per_step`. None of other data.
        per_step_std_error: its standard error, by the delta method, over sequences.
    """

    mean: float
    std_error: float
    per_step: float | None = None
    per_step_std_error: float | None = None


@contextlib.contextmanager
def frozen(program: Program, seed: int) -> Iterator[None]:
    """Evaluate without a trace: no gradients, modules in evaluation mode, and noise of its own from ``seed``.

    The global generators (torch's, numpy's, Python's) and the modules' modes are put back afterwards.
    """
    with (
        program.evaluation_mode(),
        forked_rng(),
        torch.no_grad(),
        pyro.validation_enabled(False),
    ):
        pyro.set_rng_seed(seed)
        yield


def evaluate_bound(
    program: HasModelAndGuide,
    data: Any,
    objective: Any = None,
    *,
    batch_size: int = 500,
    num_data: int | None = None,
    predictive: bool = False,
    trim_padding: bool = False,
    seed: int = 0,
) -> BoundEstimate:
    """The mean of an objective's bound over data, in nats per datum.

    Under torchrun each process takes a part of the data, and all of them return the same; all of them must call it.

    Args:
        program: an object with ``.model`` and ``.guide``.
        data: as for :func:`pyro_vae.fit`; of a data set the test split is taken.
        objective: one of this package's (None: ``SGVB()``), or any ELBO of Pyro's. Pyro's give one number a batch, so
            the standard error is then that of the mean over batches.
        batch_size: data at a time, at most; fewer are taken of large ones. It does not change the expected value.
        num_data: take only the first so many (of an iterable of batches, all are taken).
        predictive: leave out the terms of global latents, for data that were not trained on: a bound on the log density
            that the posterior of the global latents predicts. (Of Pyro's ELBOs they cannot be left out.)
        trim_padding: leave out steps that are padding in all sequences of a batch, as in :func:`pyro_vae.fit`.
        seed: of the noise and of the binarisation, which depends on nothing else.

    Returns:
        Mean and standard error, and of sequences both per step.

    Raises:
        ValueError: the data do not fit the program.

    Example:
        >>> import pyro_vae as pv
        >>> model = pv.LinearGaussian(torch.ones(3, 1))          # its guide is the posterior: the bound is log p(x)
        >>> x = torch.zeros(2, 3)
        >>> abs(evaluate_bound(model, x).mean - model.log_marginal(x).mean().item()) < 1e-5
        True
    """
    program, objective = as_program(program), SGVB() if objective is None else objective
    inputs = data if isinstance(data, Inputs) else open_inputs(program, data, split="test", batch_size=batch_size)
    inputs = inputs.trimming(program) if trim_padding else inputs
    per_datum, team = isinstance(objective, Objective), ranks()
    predictive = predictive and bool(inputs.check.global_sites)
    with _unannealed(objective):
        if isinstance(inputs.data, BatchIterable):
            found = _values_of_batches(program, objective, inputs, inputs.data, predictive, seed, team)
        else:
            size = min(batch_size if per_datum else min(batch_size, 100), _rows_at_once(inputs.data, objective))
            if inputs.check.global_sites and inputs.check.full_size == inputs.check.batch_size:
                size = max(size, len(inputs.data))  # a plate that does not state N: global terms count once, for all
            rows = inputs.data.drawn_once(seed, num_data)
            with frozen(program, team.seed(seed)):
                own = rows.in_order(size, team.part(len(rows)))
                found = [_values(program, objective, predictive, inputs, columns) for columns in own]
    if team.size > 1:
        found = [pair for part in team.gather([_on_cpu(pair) for pair in found]) for pair in part]
    return _estimate([values for values, _ in found], [steps for _, steps in found if steps is not None], per_datum)


def _rows_at_once(data: TensorData, objective: Any) -> int:
    numbers = max(column[:1].numel() for column in data.columns.values()) * getattr(objective, "num_particles", 1)
    return max(1, _MAX_NUMBERS // max(1, numbers))


def evaluate_kl(
    program: HasModelAndGuide, data: Any, *, batch_size: int = 500, num_data: int | None = None, seed: int = 0
) -> dict[str, float]:
    """What each latent site of the data plate costs: the mean over data of log q - log p at a draw, in nats per datum.

    Over draws that is the KL divergence of the guide's law of the site from the model's, where the guide draws in the
    model's order; lower layers of a bottom-up guide may cost less than nothing, and the sum over sites is a divergence
    always. Near 0 for a whole layer, its latents say nothing of the data: "posterior collapse".

    Args:
        program: an object with ``.model`` and ``.guide``.
        data: as for :func:`evaluate_bound`, but no iterable of batches.
        batch_size: data at a time.
        num_data: take only the first so many.
        seed: of the noise and of the binarisation.

    Returns:
        By site, in the order of the guide.

    Raises:
        ValueError: the data do not fit the program, or are an iterable of batches.

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.VAE(data_shape=(4,), latent_dim=2, hidden_dims=(3,))
        >>> list(evaluate_kl(vae, torch.ones(10, 4)))
        ['z']
    """
    program = as_program(program)
    inputs = data if isinstance(data, Inputs) else open_inputs(program, data, split="test", batch_size=batch_size)
    rows, team, sums = inputs.tensors().drawn_once(seed, num_data), ranks(), dict[str, Tensor]()
    with frozen(program, team.seed(seed)):
        for columns in rows.in_order(batch_size, team.part(len(rows))):
            args, kwargs = inputs.call(columns)
            weights = log_weights(program.model, program.guide, args, kwargs)
            for site, kl in weights.kl.items():
                if kl.ndim == 2:
                    sums[site] = sums.get(site, 0.0) + kl.mean(0).sum().cpu()
    parts = team.gather(sums)
    return {site: float(sum(part.get(site, 0.0) for part in parts)) / len(rows) for site in parts[0]}


def _estimate(values: list[Tensor], steps: list[Tensor], per_datum: bool) -> BoundEstimate:
    """Of values and steps of batches; where a batch's values are all their mean, errors are over batches."""
    if not per_datum:
        counts = torch.tensor([len(v) for v in values], dtype=torch.float64)
        means = torch.stack([v.double().mean() for v in values]).cpu()
        mean, error = float((means * counts).sum() / counts.sum()), mean_and_standard_error(means)[1]
        sums = [part.sum()[None].cpu() for part in steps]
        return BoundEstimate(mean, error, *(ratio_and_standard_error(means * counts, torch.cat(sums)) if sums else ()))
    whole = torch.cat(values)
    per_step = ratio_and_standard_error(whole, torch.cat(steps)) if steps else ()
    return BoundEstimate(*mean_and_standard_error(whole), *per_step)


def _on_cpu(pair: Found) -> Found:
    return pair[0].cpu(), None if pair[1] is None else pair[1].cpu()


def _values_of_batches(
    program: Program, objective: Any, inputs: Inputs, data: BatchIterable, predictive: bool, seed: int, team: Ranks
) -> list[Found]:
    """Of an iterable's batches, of which each of several ranks takes every so many-th.

    All ranks draw the same while they iterate, for the iterable may shuffle; each draws its own for its own batches.
    """
    found = []
    with frozen(program, seed):  # the iterable is opened in here: a DataLoader draws a number when it is
        for number, columns in enumerate(data.raw()):
            if is_sharded(data.batches) or number % team.size == team.rank:
                with contextlib.nullcontext() if team.size == 1 else seeded(team.seed(seed, number)):
                    found.append(_values(program, objective, predictive, inputs, data.reader(columns)))
    return found


def _values(program: Program, objective: Any, predictive: bool, inputs: Inputs, columns: Columns) -> Found:
    """The bound of each datum of a batch, and its steps."""
    args, kwargs = inputs.call(columns)
    steps = inputs.num_steps(columns)
    if isinstance(objective, Objective):
        bound = objective.predictive_bound if predictive else objective.bound
        return bound(program.model, program.guide, *args, **kwargs), steps
    size = batch_size_of(args, kwargs)
    total = -objective.loss(program.model, program.guide, *args, **kwargs)
    scale = minibatch_scale(program.model, args, kwargs)  # N / M of this very batch, short or not
    return torch.full((size,), total / (scale * size)), steps


@contextlib.contextmanager
def _unannealed(objective: Any) -> Iterator[None]:
    weight = getattr(objective, "kl_weight", None)
    if not isinstance(weight, Tensor):
        yield
        return
    kept = weight.clone()
    weight.fill_(1.0)
    try:
        yield
    finally:
        weight.copy_(kept)
