"""One step of training: loss, gradients, update. The loop calls it and knows nothing of what is inside."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from pyro_vae.objectives import Objective
from pyro_vae.programs import Program, log_weights

__all__ = ["NonFiniteLossError", "Step", "eager_step"]

Step = Callable[[tuple[Any, ...], dict[str, Any], int, Tensor | None], float]
"""(args, kwargs, number of data the loss stands for, the data's rows in the data set if they have any) -> mean loss in
nats per datum before the last update of the parameters."""


class NonFiniteLossError(ValueError):
    """A loss became NaN or infinite, and nothing was updated by it; or a parameter did, by a finite loss's gradient."""


def eager_step(
    program: Program,
    objective: Any,
    optimizer: Optimizer,
    parameters: Mapping[str, Tensor],
    *,
    prior_precision: float = 0.0,
    max_grad_norm: float | None = None,
) -> Step:
    """A step that runs as Python: any program, any objective, any optimiser.

    Args:
        program: what is trained.
        objective: an ELBO of this package or of Pyro's.
        optimizer: over the parameters.
        parameters: leaf tensors by name.
        prior_precision: 1 / (N s^2) of the prior N(0, s^2) on every parameter: its log density over N is part of the
            mean objective (maximum a posteriori; arXiv:1312.6114, Sec. 5).
        max_grad_norm: rescale the gradient of the mean loss to at most this Euclidean norm.

    Returns:
        The step. It raises :class:`NonFiniteLossError`, before anything is updated, naming the sites.
    """
    tensors = list(parameters.values())

    def step(args: tuple[Any, ...], kwargs: dict[str, Any], num_data: int, index: Tensor | None = None) -> float:
        loss = math.nan
        for _ in _updates(objective, program, args, kwargs, index):
            loss = update(args, kwargs, num_data)
        return loss

    def update(args: tuple[Any, ...], kwargs: dict[str, Any], num_data: int) -> float:
        optimizer.zero_grad()
        loss = _backward(objective, program, args, kwargs, num_data)
        if not math.isfinite(loss):
            raise NonFiniteLossError(f"the loss became {loss}: {explain(program, parameters, args, kwargs)}")
        if prior_precision:
            gradients = [(t.grad, t) for t in tensors if t.grad is not None]
            torch._foreach_add_([g for g, _ in gradients], [t.detach() for _, t in gradients], alpha=prior_precision)
        if max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(tensors, max_grad_norm)
        optimizer.step()
        return loss

    return step


def _updates(
    objective: Any, program: Program, args: tuple[Any, ...], kwargs: dict[str, Any], index: Tensor | None
) -> Iterable[None]:
    """As many turns as the objective takes with a minibatch; Pyro's take one."""
    if not isinstance(objective, Objective):
        return (None,)
    return objective.updates(program.model, args, kwargs, index)


def _backward(objective: Any, program: Program, args: tuple[Any, ...], kwargs: dict[str, Any], num_data: int) -> float:
    """Gradients of the mean loss; its value."""
    if hasattr(objective, "differentiable_loss"):
        loss = objective.differentiable_loss(program.model, program.guide, *args, **kwargs) / num_data
        if isinstance(loss, Tensor) and loss.isfinite():
            loss.backward()
        return float(loss.detach())
    total = float(objective.loss_and_grads(program.model, program.guide, *args, **kwargs))
    for tensor in program.named_parameters().values():
        if tensor.grad is not None:
            tensor.grad.div_(num_data)
    return total / num_data


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
