"""What every objective is: a per-datum bound, and a loss whose gradient is the estimator's."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from pyro.infer import ELBO
from torch import Tensor

from pyro_vae.arguments import whole_number

__all__ = ["Objective", "value_with_gradient_of"]


class Objective(ELBO):  # type: ignore[misc]
    """Base of the package's objectives, usable wherever Pyro takes an ELBO.

    A subclass implements :meth:`differentiable_loss`, a scalar whose *value* is minus the bound, summed over the data
    plate with the plate's scale as in Pyro, and whose *gradient* is the estimator's; and :meth:`bound`, the value per
    datum.

    Args:
        num_particles: K, draws per datum, at least 1.

    Raises:
        ValueError: ``num_particles`` is not a whole number of at least 1.

    Example:
        >>> import torch, pyro_vae as pv
        >>> class LowerBound(Objective):
        ...     def bound(self, model, guide, *args, **kwargs):
        ...         weights = pv.log_weights(model, guide, args, kwargs, num_particles=self.num_particles)
        ...         return weights.log_w.mean(0)
        ...     def differentiable_loss(self, model, guide, *args, **kwargs):
        ...         return -self.bound(model, guide, *args, **kwargs).sum()
        >>> pv.fit(pv.VAE((4,), 1, (3,)), torch.ones(20, 4), objective=LowerBound(), epochs=1).samples
        20
    """

    def __init__(self, num_particles: int = 1) -> None:
        super().__init__(num_particles=whole_number("num_particles", num_particles), vectorize_particles=True)

    @abstractmethod
    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Minus the bound of a minibatch, scaled to its plate: a scalar in nats with the estimator's gradient."""

    has_bound = True
    """Whether there is a bound to report; Monte Carlo EM has none."""

    def updates(
        self, model: Any, args: Sequence[Any], kwargs: Mapping[str, Any], index: Tensor | None
    ) -> Iterator[None]:
        """One turn for each update of the parameters that a minibatch gets, in :func:`pyro_vae.fit`: here, one.

        Args:
            model: Pyro function.
            args: the minibatch.
            kwargs: the minibatch by name.
            index: rows of the data set that the minibatch holds, (M,); None where that is not known.
        """
        yield

    def held(self) -> tuple[Tensor, ...]:
        """Tensors of the minibatch, beside its data, that :meth:`updates` made and the loss reads: here, none."""
        return ()

    def reset(self) -> None:
        """Forget what earlier minibatches left behind, as a run of :func:`pyro_vae.fit` begins: here, nothing."""

    @abstractmethod
    def bound(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        """The bound on log p(x) of each datum of a minibatch, shape (M,), in nats."""

    def predictive_bound(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        """The bound of each datum, (M,), given what the guide knows of global latents: without them, the bound.

        It is of data that the guide of the global latents has not seen: their terms are not part of it.
        """
        return self.bound(model, guide, *args, **kwargs)

    @property
    def config(self) -> dict[str, Any]:
        """The arguments that build this objective again, as JSON can hold them."""
        return {"num_particles": self.num_particles}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.config.items())})"

    @torch.no_grad()
    def loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """Value of the loss, in nats."""
        return self.differentiable_loss(model, guide, *args, **kwargs).item()

    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """Value of the loss, in nats; its gradients are added to the parameters' ``.grad``."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        loss.backward()
        return loss.item()

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Any:
        """Part of Pyro's protocol for ELBOs that read traces; the package's read ``programs.log_weights``."""
        raise NotImplementedError("objectives of pyro_vae read programs.log_weights, not traces")


def value_with_gradient_of(value: Tensor, surrogate: Tensor) -> Tensor:
    """A scalar with the value of one expression and the gradient of another."""
    return value.detach() + (surrogate - surrogate.detach())  # in brackets: a large surrogate costs the value no digits
