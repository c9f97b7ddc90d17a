"""What every estimator of log p(x) gives: values, their Monte Carlo error, and what can be said against them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from pyro_vae.compile import UNRECORDED, Recorder
from pyro_vae.numerics import mean_and_standard_error, ratio_and_standard_error
from pyro_vae.programs import Program

__all__ = ["Estimate", "Method", "Score"]


@dataclass(frozen=True, eq=False)
class Estimate:
    """Log p(x) of a minibatch.

    Attributes:
        values: (M,), nats.
        variance: Monte Carlo variance of each value, (M,), nats squared; not a number where it is not known.
        diagnostics: per datum, each (M,).
        joint_variance: Monte Carlo variance of the values' sum, a scalar, where data share draws; else None.
    """

    values: Tensor
    variance: Tensor
    diagnostics: dict[str, Tensor] = field(default_factory=dict)
    joint_variance: Tensor | None = None

    @property
    def variance_of_sum(self) -> Tensor:
        """Monte Carlo variance of the sum of the values, a scalar."""
        return self.variance.sum() if self.joint_variance is None else self.joint_variance

    def to(self, device: str | torch.device) -> Estimate:
        """The same on another device."""
        diagnostics = {name: value.to(device) for name, value in self.diagnostics.items()}
        joint = None if self.joint_variance is None else self.joint_variance.to(device)
        return Estimate(self.values.to(device), self.variance.to(device), diagnostics, joint)


class Method(Protocol):
    """An estimator of log p(x)."""

    @property
    def num_particles(self) -> int:
        """K, draws per datum."""

    @property
    def at_once(self) -> int:
        """How many particles of a datum must be in memory together, whatever the chunks."""

    @property
    def passes(self) -> int:
        """How often a particle goes through the model, roughly, for its gradient or its density."""

    def check(self, program: Program, args: Any, kwargs: Any) -> Any:
        """Refuse, with a ValueError, a program that cannot be scored so."""

    def __call__(
        self, program: Program, args: Any, kwargs: Any, rows_at_once: int, recorder: Recorder = UNRECORDED
    ) -> Estimate:
        """Estimate log p(x) of a minibatch, with at most so many particles times data in memory at a time.

        What is done again and again for tensors of the same shapes goes through the recorder.
        """


@dataclass(frozen=True, eq=False)
class Score:
    """Estimates of log p(x), one per datum, in nats.

    Attributes:
        values: shape (N,).
        mc_error: Monte Carlo standard error of ``mean``, given these data, by the jackknife: how a repetition with
            other noise varies. It does not hold the bias, which is downwards for "importance" and "ais" and upwards for
            "posterior-density", and falls with K. Not a number for K = 1.
        diagnostics: per datum, shape (N,): "ess", the effective sample size, between 1 and K (of "posterior-density":
            and the number of chains, each of which counts as one draw); and of
            "importance": "pareto_k", the shape of the weights' tail, to be trusted below 0.7
            (:func:`pyro_vae.evaluation.diagnostics.pareto_k`);
            "ais": "acceptance", the mean over the chains' transitions;
            "posterior-density": "acceptance", and "r_hat", how far the chains agree, 1 where they do.
        num_particles: K.
        method: how it was estimated.
        options: of the method, where they are not its defaults.
        num_data: N where the one value is log p(X) of a whole data set; None where there is a value for each datum.
        num_steps: steps of each sequence, int64 (N,), of a program that takes an argument ``lengths``; else None.
            (Beside the one value of a whole data set, the steps of all of them.)
    """

    values: Tensor
    mc_error: float
    diagnostics: dict[str, Tensor]
    num_particles: int
    method: str
    options: dict[str, Any] = field(default_factory=dict)
    num_data: int | None = None
    num_steps: Tensor | None = None

    @property
    def per_step(self) -> tuple[float, float] | None:
        """Mean and its standard error in nats per step, of sequences; None of data that are none.

        It is the sum of the values over the sum of the steps, over the whole set, as Boulanger-Lewandowski et al.
        (arXiv:1206.6392) and Krishnan et al. (arXiv:1609.09869) report, not a mean over sequences of means over steps.
        The standard error is the delta method's, over sequences.
        """
        return None if self.num_steps is None else ratio_and_standard_error(self.values, self.num_steps)

    @property
    def mean(self) -> float:
        """Mean over data, nats per datum."""
        return mean_and_standard_error(self.values)[0]

    @property
    def std_error(self) -> float:
        """Standard error of the mean over data, nats per datum."""
        return mean_and_standard_error(self.values)[1]

    @property
    def num_heavy(self) -> int | None:
        """Data whose Pareto k is above 0.7; None where no k is known (K < 50, or another method)."""
        k = self.diagnostics.get("pareto_k")
        return None if k is None or bool(k.isnan().all()) else int((k > 0.7).sum())

    def __repr__(self) -> str:
        options = [f"{name}={value}" for name, value in self.options.items()]
        how = ", ".join([self.method, *options, f"K={self.num_particles}"])
        found = f"{self.mean:.2f} ± {self.std_error:.2f} nats over {len(self.values)} data"
        if self.num_data is not None:
            found = f"{self.mean:.2f} nats for the whole of {self.num_data} data"
        return f"Score({how}: {found}; Monte Carlo error {self.mc_error:.2g}, {', '.join(self.remarks())})"

    def remarks(self) -> list[str]:
        """What the diagnostics say, in words."""
        found = self.diagnostics
        median = "median ESS" if self.num_data is None else "ESS"
        said = [self._steps()] if self.num_steps is not None else []
        said += [] if "r_hat" in found else [f"{median} {found['ess'].median().item():.1f}"]
        if self.num_data is not None and "pareto_k" in found:
            said.append(f"Pareto k {found['pareto_k'].item():.2f}")
        elif self.num_heavy is not None:
            said.append(f"Pareto k > 0.7 at {self.num_heavy} of {len(self.values)}")
        if "acceptance" in found:
            said.append(f"acceptance {found['acceptance'].mean().item():.2f}")
        if "r_hat" in found:
            said.append(f"largest R-hat {found['r_hat'].max().item():.3f}")
        return said

    def _steps(self) -> str:
        assert self.per_step is not None
        assert self.num_steps is not None
        return f"{self.per_step[0]:.2f} nats per step over {int(self.num_steps.sum()):,} steps"
