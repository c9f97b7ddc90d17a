"""The log marginal likelihood by importance sampling, with the guide as proposal.

    p(x) = E_q[w],  w = p(x, z) / q(z | x);      log p(x) ~ log 1/K sum_k w_k,   z_k ~ q(z | x)

The mean weight is an unbiased estimate of p(x); its logarithm is, in expectation, a lower bound on log p(x) that rises
with K and is exact in the limit K -> infinity, or for any K, without variance, when the guide is the posterior (Burda
et al., arXiv:1509.00519, Thm. 1; Rezende et al., arXiv:1401.4082, App. E). It is trusted only where the weights are
even: hence the effective sample size beside every value.

Particles come in chunks of bounded memory, and are reduced as if they had come at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pyro_vae.arguments import one_of, whole_number
from pyro_vae.data import TensorData
from pyro_vae.evaluation.bounds import frozen
from pyro_vae.evaluation.diagnostics import pareto_k
from pyro_vae.inputs import Inputs, open_inputs
from pyro_vae.numerics import mean_and_standard_error, summarize_weights
from pyro_vae.programs import HasModelAndGuide, Program, as_program, log_weights

__all__ = ["METHODS", "Score", "log_marginal"]

METHODS = ("importance",)

# Particles times data times their width in flight: 32 MB a tensor in float32, of which a pass holds about ten.
_MAX_ELEMENTS = 8_000_000


@dataclass(frozen=True, eq=False)
class Score:
    """Estimates of log p(x), one per datum, in nats.

    Attributes:
        values: shape (N,).
        mc_error: Monte Carlo standard error of ``mean``, given these data, by the jackknife: how a repetition with
            other noise varies. It does not hold the bias, which is downwards and falls with K; where "pareto_k" is
            above 0.7 that may be larger. Not a number for K = 1.
        diagnostics: per datum, shape (N,): "ess", the effective sample size, between 1 and K; "pareto_k", the shape of
            the weights' tail, to be trusted below 0.7 (:func:`pyro_vae.evaluation.diagnostics.pareto_k`).
        num_particles: K.
        method: how it was estimated.
    """

    values: Tensor
    mc_error: float
    diagnostics: dict[str, Tensor]
    num_particles: int
    method: str

    @property
    def mean(self) -> float:
        """Mean over data, nats per datum."""
        return mean_and_standard_error(self.values)[0]

    @property
    def std_error(self) -> float:
        """Standard error of the mean over data, nats per datum."""
        return mean_and_standard_error(self.values)[1]

    def __repr__(self) -> str:
        ess, heavy = self.diagnostics["ess"].median().item(), int((self.diagnostics["pareto_k"] > 0.7).sum())
        return (
            f"Score({self.method}, K={self.num_particles}: {self.mean:.2f} ± {self.std_error:.2f} nats over "
            f"{len(self.values)} data; Monte Carlo error {self.mc_error:.2g}, median ESS {ess:.1f}, "
            f"Pareto k > 0.7 at {heavy})"
        )


def log_marginal(
    program: HasModelAndGuide,
    x: Any,
    *,
    method: str = "importance",
    num_particles: int = 5000,
    batch_size: int = 100,
    max_elements: int = _MAX_ELEMENTS,
    binarize: str | None = None,
    seed: int = 0,
) -> Score:
    """Estimate log p(x) of each datum, in nats.

    Args:
        program: an object with ``.model`` and ``.guide``, its latents all in the data plate.
        x: a tensor (N, ...); a tuple or dict of tensors; or a data set, whose test split is taken. Images of type uint8
            are scaled to [0, 1]; grey levels that a binary site observes are drawn once (see ``binarize``).
        method: "importance".
        num_particles: K per datum, at least 1.
        batch_size: data at a time, at most; fewer are taken where memory asks for it.
        max_elements: bound on particles times data times the width of a datum or a linear layer, that is on memory; the
            values do not depend on it but for the order of the noise.
        binarize: "dynamic" or "none"; None as the data set says, else "dynamic".
        seed: of the noise and of the binarisation; torch's own generators are left as they were.

    Returns:
        Values per datum, their mean, errors and diagnostics.

    Raises:
        ValueError: an argument is out of range, the data do not fit the program, the program has global latents, or a
            weight is NaN or infinite (the rows are named).

    Example:
        >>> import pyro_vae as pv
        >>> model = pv.LinearGaussian(torch.ones(3, 1))          # its guide is the posterior: exact for any K
        >>> score = log_marginal(model, torch.zeros(2, 3), num_particles=4)
        >>> bool(torch.allclose(score.values, model.log_marginal(torch.zeros(2, 3))))
        True
    """
    one_of("method", method, METHODS)
    num_particles = whole_number("num_particles", num_particles)
    batch_size = whole_number("batch_size", batch_size)
    max_elements = whole_number("max_elements", max_elements)
    bridged = as_program(program)
    inputs = open_inputs(bridged, x, binarize=binarize, split="test", batch_size=batch_size)
    data = inputs.tensors().drawn_once(seed)
    rows_at_once = max(1, max_elements // _elements_per_row(bridged, data))
    with frozen(bridged, seed):
        scored = [
            _summarize(_chunks(bridged, inputs, columns, num_particles, rows_at_once))
            for columns in data.in_order(min(batch_size, rows_at_once, max(1, max_elements // num_particles)))
        ]
    values, variance, ess, k = (torch.cat(parts) for parts in zip(*scored, strict=True))
    _require_finite(values)
    mc_error = math.sqrt(variance.sum().item()) / len(values)
    values = values.to(data.reader.dtype)  # sums were taken in double precision
    return Score(values, mc_error, {"ess": ess, "pareto_k": k}, num_particles, method)


def _elements_per_row(program: Program, data: TensorData) -> int:
    """Numbers in flight for one particle of one datum: the datum's, or the widest linear layer's."""
    layers = (layer for module in program.modules().values() for layer in module.modules())
    widths = [layer.out_features for layer in layers if isinstance(layer, nn.Linear)]
    return max(widths + [column[0].numel() for column in data.columns.values()])


def _summarize(chunks: Iterator[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log mean weight, its Monte Carlo variance, effective sample size and Pareto k of a batch, each (M,)."""
    log_w = list(chunks)
    summary = summarize_weights(log_w)
    return summary.log_mean, summary.log_mean_variance, summary.ess, pareto_k(torch.cat(log_w)).to(summary.ess.device)


def _chunks(program: Program, inputs: Inputs, columns: Any, num_particles: int, rows: int) -> Iterator[Tensor]:
    """Log weights (K_i, M) of a batch, so many particles at a time that K_i M stays within ``rows``."""
    args, kwargs = inputs.call(columns)
    size = len(next(iter(columns.values())))
    most = max(1, rows // size)
    for start in range(0, num_particles, most):
        count = min(most, num_particles - start)
        weights = log_weights(program.model, program.guide, args, kwargs, num_particles=count)
        if weights.log_w_global is not None:
            raise ValueError(
                f"log p(x) per datum needs every latent inside the data plate; sites outside it: {weights.global_sites}"
            )
        yield weights.log_w


def _require_finite(values: Tensor) -> None:
    bad = (values.isnan() | (values == math.inf)).nonzero().flatten()
    if len(bad):
        raise ValueError(
            f"expected finite weights, got NaN or infinite ones at {len(bad)} of {len(values)} data, rows "
            f"{bad[:10].tolist()}: the model or the guide gives no density there"
        )
