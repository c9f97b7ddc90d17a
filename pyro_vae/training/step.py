"""One step of training: loss, gradients, update. The loop calls it and knows nothing of what is inside."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from pyro_vae.inputs import batch_size_of
from pyro_vae.objectives import Objective
from pyro_vae.programs import Program, log_weights
from pyro_vae.training.exchange import Exchange
from pyro_vae.training.precision import products_in

__all__ = ["Batch", "EagerStep", "Gradients", "NonFiniteLossError"]

Gradients = Sequence[Tensor | None]
"""One for each parameter; None for what the loss does not depend on."""


class NonFiniteLossError(ValueError):
    """A loss became NaN or infinite, and nothing was updated by it; or a parameter did, by a finite loss's gradient."""


@dataclass(frozen=True, eq=False)
class Batch:
    """A minibatch, as a program is called with it.

    Attributes:
        args: positional arguments.
        kwargs: keyword arguments.
        num_data: how many data the loss stands for: its own, or all N where the program's plate scales to N.
        index: its rows in the data set, (M,); None if they have no number.
        stands_in: its rows are another process's, for this one has none, and must not count twice.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    num_data: int
    index: Tensor | None = None
    stands_in: bool = False

    @property
    def tensors(self) -> list[Tensor]:
        """Its tensors, in order."""
        return [*self.args, *self.kwargs.values()]

    @property
    def rows(self) -> int:
        """How many of its data count."""
        return 0 if self.stands_in else batch_size_of(self.args, self.kwargs)


class EagerStep:
    """A step that runs as Python: any program, any objective, any optimiser.

    Args:
        program: what is trained.
        objective: an ELBO of this package or of Pyro's.
        optimizer: over the parameters.
        parameters: leaf tensors by name.
        prior_precision: 1 / (N s^2) of the prior N(0, s^2) on every parameter: its log density over N is part of the
            mean objective (maximum a posteriori; arXiv:1312.6114, Sec. 5).
        max_grad_norm: rescale the gradient of the mean loss to at most this Euclidean norm.
        precision: of the matrix products; see :func:`pyro_vae.training.precision.products_in`.
        exchange: with the other processes that take the same step on other rows; None for a process alone.

    Attributes:
        taken: how many steps the run has taken.
        refused: why its steps are eager for good; None if they need not be.
        say: is told what a step that takes long is doing, and "" when it is done.
    """

    def __init__(
        self,
        program: Program,
        objective: Any,
        optimizer: Optimizer,
        parameters: Mapping[str, Tensor],
        *,
        prior_precision: float = 0.0,
        max_grad_norm: float | None = None,
        precision: str = "full",
        exchange: Exchange | None = None,
    ) -> None:
        self.program, self.objective, self.optimizer = program, objective, optimizer
        self.parameters, self.tensors = parameters, list(parameters.values())
        self.prior_precision, self.max_grad_norm, self.precision = prior_precision, max_grad_norm, precision
        self.exchange, self._own_is_finite = exchange, True
        self.taken = 0
        self.refused: str | None = None
        self.say: Callable[[str], None] = lambda text: None

    @property
    def path(self) -> str:
        """How steps are taken at present."""
        return "eager"

    def __call__(self, batch: Batch) -> float:
        """Take a step.

        Returns:
            The mean loss in nats per datum before the last update of the parameters.

        Raises:
            NonFiniteLossError: before anything is updated; names the sites.
        """
        value = math.nan
        for _ in _updates(self.objective, self.program, batch):
            loss, gradients = self.gradients(batch) if self.exchange is None else self._exchanged(self.exchange, batch)
            value = float(loss)
            if not math.isfinite(value):
                raise NonFiniteLossError(f"the loss became {value}: {self._reason(batch)}")
            self.update(gradients)
        self.taken += 1
        return value

    def _exchanged(self, exchange: Exchange, batch: Batch) -> tuple[float, Gradients]:
        """The mean loss and its gradients over the rows of all processes."""
        exchange.begin()
        loss, gradients = self.gradients(batch)
        self._own_is_finite = math.isfinite(float(loss))
        return exchange(loss, gradients, batch.rows)

    def _reason(self, batch: Batch) -> str:
        if self.exchange is None:
            return explain(self.program, self.parameters, batch.args, batch.kwargs)
        own = "" if self._own_is_finite else explain(self.program, self.parameters, batch.args, batch.kwargs)
        return next(filter(None, self.exchange.ranks.gather(own)), "not finite: the sum over processes")

    def gradients(self, batch: Batch) -> tuple[Tensor | float, Gradients]:
        """The mean loss and its gradients."""
        with products_in(self.precision):
            if hasattr(self.objective, "differentiable_loss"):
                return self._by_autograd(batch)
            return self._by_pyro(batch)

    def _by_autograd(self, batch: Batch) -> tuple[Tensor, Gradients]:
        model, guide = self.program.model, self.program.guide
        loss = self.objective.differentiable_loss(model, guide, *batch.args, **batch.kwargs) / batch.num_data
        if not loss.requires_grad:
            return loss, [None] * len(self.tensors)
        found = torch.autograd.grad(loss, self.tensors, allow_unused=True)
        return loss.detach(), [None if g is None else _laid_out(g, t) for g, t in zip(found, self.tensors, strict=True)]

    def _by_pyro(self, batch: Batch) -> tuple[Tensor | float, Gradients]:
        """For an ELBO that computes its gradients itself, and leaves them in ``.grad``."""
        self.optimizer.zero_grad()
        model, guide = self.program.model, self.program.guide
        loss = self.objective.loss_and_grads(model, guide, *batch.args, **batch.kwargs) / batch.num_data
        return loss, [None if t.grad is None else t.grad / batch.num_data for t in self.tensors]

    def compare(self) -> None:
        """Make sure that steps still do what the program says: eager ones do."""

    def update(self, gradients: Gradients) -> None:
        """Move the parameters by the gradients of the mean loss, which are not written to: two may be one tensor."""
        if self.prior_precision:
            pairs = zip(gradients, self.tensors, strict=True)
            gradients = [None if g is None else g.add(t.detach(), alpha=self.prior_precision) for g, t in pairs]
        if self.max_grad_norm is not None:
            norm = torch.nn.utils.get_total_norm([g for g in gradients if g is not None])
            factor = (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
            gradients = [None if g is None else g * factor for g in gradients]
        for tensor, gradient in zip(self.tensors, gradients, strict=True):
            tensor.grad = gradient
        self.optimizer.step()
        self.optimizer.zero_grad()  # the next gradients come to lie where these were


def _laid_out(gradient: Tensor, tensor: Tensor) -> Tensor:
    """A gradient in the layout of its parameter, as fused optimisers take it for granted."""
    return gradient if gradient.stride() == tensor.stride() else torch.empty_like(tensor).copy_(gradient)


def _updates(objective: Any, program: Program, batch: Batch) -> Iterable[None]:
    """As many turns as the objective takes with a minibatch; Pyro's take one."""
    if not isinstance(objective, Objective):
        return (None,)
    return objective.updates(program.model, batch.args, batch.kwargs, batch.index)


@torch.no_grad()
def explain(program: Program, parameters: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Which parameters and which sites are not finite, in words."""
    found = [f"parameter '{name}'" for name, tensor in parameters.items() if not tensor.isfinite().all()]
    if not program.has_guide:
        found.append("log p(x, z) where the chains are")
        return f"not finite: {'; '.join(found)}"
    try:
        weights = log_weights(program.model, program.guide, args, kwargs)
    except (ValueError, RuntimeError) as error:
        return "; ".join([*found, f"the program fails on this batch: {error}"])
    for what, terms in (("log p", weights.log_likelihood | weights.log_prior), ("log q", weights.log_guide)):
        for site, term in terms.items():
            if bad := int((~term.isfinite()).sum()):
                found.append(f"{what} of site '{site}' at {bad} of {term.numel()} values")
    for site, draw in weights.latents.items():
        if not draw.isfinite().all():
            found.append(f"the guide's draw of site '{site}'")
    return "not finite: " + "; ".join(found) if found else "not seen again with other noise on the same batch"
