"""The log evidence of a whole data set, log p(X), of programs whose data share latents theta.

By importance sampling, with K draws of theta from the guide and L of each datum's own latents for each of them,

    p(X) = E_q[w],    w_k = p(theta_k) / q(theta_k)  prod_m  1/L sum_l p(x_m, z_kml | theta_k) / q(z_kml | x_m, theta_k)

which is unbiased for any K and L: given theta the factors are independent, each unbiased for p(x_m | theta). So
log 1/K sum_k w_k is a lower bound on average; exact, without variance, where the guide is the posterior (without
latents of a datum's own: that of theta). The variance of log w grows with the number of data that have latents of
their own, and falls with L.

Or by annealed importance sampling (:mod:`pyro_vae.evaluation.ais`) over theta and all data's latents as one vector.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from pyro_vae.compile import Recorder
from pyro_vae.data import Columns
from pyro_vae.evaluation.ais import AIS
from pyro_vae.evaluation.diagnostics import pareto_k
from pyro_vae.evaluation.importance import chunk_sizes
from pyro_vae.evaluation.score import Estimate
from pyro_vae.numerics import log_mean_exp, summarize_weights
from pyro_vae.programs import LatentSpace, Program, guide_of, log_weights

__all__ = ["anneal_dataset", "weigh_dataset"]

Batches = Callable[[], Iterator[Columns]]
Call = Callable[[Columns], tuple[tuple[Tensor, ...], dict[str, Tensor]]]


def weigh_dataset(program: Program, batches: Batches, call: Call, counts: Iterable[int], num_local: int) -> Estimate:
    """Log p(X) by importance sampling.

    Args:
        program: with latents outside the data plate.
        batches: gives the minibatches of the data set, each time it is asked.
        call: the arguments of the program's functions for a minibatch.
        counts: draws of the shared latents at a time; their sum is K.
        num_local: L, draws of a datum's own latents for each of them.

    Returns:
        An estimate of one value, with the effective sample size and Pareto k of the K weights.
    """
    log_w = [_log_weights(program, batches, call, count, num_local)[:, None] for count in counts]
    summary = summarize_weights(log_w)
    diagnostics = {"ess": summary.ess, "pareto_k": pareto_k(torch.cat(log_w)).to(summary.ess.device)}
    return Estimate(summary.log_mean, summary.log_mean_variance, diagnostics)


def _log_weights(program: Program, batches: Batches, call: Call, count: int, num_local: int) -> Tensor:
    """Log weights (K,) of as many draws of the shared latents, each the same for all minibatches."""
    shared: dict[str, Tensor] = {}
    total = None
    for columns in batches():
        args, kwargs = call(columns)
        draw = functools.partial(log_weights, program.model, program.guide, args, kwargs, num_particles=count)
        weights = draw(latents=shared)
        if weights.entangled and (num_local > 1 or total is not None):
            raise ValueError(
                f"the guide draws {weights.entangled} together with those of other data, as an automatic guide of all "
                "latents does: expected num_local = 1 and a batch_size that takes all data at once"
            )
        if total is None:
            shared = {n: weights.latents[n] for n, term in weights.log_guide.items() if term.ndim == 1}
            assert weights.log_w_global is not None
            total = weights.log_w_global.double()
        own = [weights.log_w]
        if shared.keys() != weights.latents.keys():
            own += [draw(latents=shared).log_w for _ in range(num_local - 1)]
        total = total + log_mean_exp(torch.stack(own).double()).sum(-1)
    assert total is not None
    return total


def anneal_dataset(
    program: Program, args: Any, kwargs: Any, sampler: AIS, rows_at_once: int, recorder: Recorder
) -> Estimate:
    """Log p(X) by annealed importance sampling of the shared latents and the data's own, all data at once."""
    space = LatentSpace(program.model, guide_of(program), args, kwargs, whole=True)
    size = len(space.tensors[0])
    return sampler.estimate(space, chunk_sizes(sampler.num_particles, size, rows_at_once), recorder)
