"""Monte Carlo EM: no guide; the posterior of each datum is sampled by Hamiltonian Monte Carlo.

    grad_theta log p(x) = E_{z ~ p(z|x)} grad_theta log p(x, z)                    (Fisher's identity)

E-step: move one chain per datum (or K) by HMC, whose law is the posterior, all the minibatch's chains at once. M-step:
ascend log p(x, z) at the chains' positions, held fixed, ``num_updates`` times. This is the baseline of the paper's
Section 5 and Figure 3: a transition of 10 leapfrog steps, the step size tuned to 90 % acceptance, then 5 updates.

The gradient is unbiased for grad log p(x) if the positions are draws of the posterior: for chains that have forgotten
where they began, and M-steps that move theta little. Chains *persist* where the data have a row number: a chain goes on
from where its datum's last visit left it, and so follows the posterior as theta learns. Where there is no number (plain
``pyro.infer.SVI``, an iterable of batches) each visit begins at draws of the prior; take more transitions there.

There is no bound on log p(x) here. What is logged is log p(x, z) at the chains' positions, the complete-data
log-likelihood: it is no estimate of log p(x), and may fall while log p(x) rises, or rise as the posterior narrows. A
model trained so is scored by what needs no guide (``log_marginal(..., method="ais", initial="prior")``,
``method="posterior-density"``), or after a guide has been fitted with theta held fixed: ``fit(..., trained="guide")``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_vae import hmc
from pyro_vae.arguments import probability, whole_number
from pyro_vae.objectives.base import Objective, value_with_gradient_of
from pyro_vae.programs import LatentSpace, evaluation_mode

__all__ = ["MCEM"]

_FIRST_STEP_SIZE = 0.1
_NO_ROWS = (
    "persistent: chains that persist need the data's row numbers: expected data as tensors or a data set in fit, got "
    "an iterable of batches, or no fit; MCEM(persistent=False, num_transitions=...) begins at the prior"
)


class MCEM(Objective):
    """Monte Carlo EM with batched HMC (Kingma & Welling, arXiv:1312.6114, Sec. 5, "Monte Carlo EM").

    Args:
        num_leapfrog: leapfrog steps of a transition.
        target_accept: acceptance probability that the step size is tuned to, between 0 and 1.
        num_updates: updates of theta by a minibatch's draws (in :func:`pyro_vae.fit`; a step of Pyro's SVI makes one).
        num_particles: K chains per datum.
        num_transitions: transitions at each visit of a datum.
        persistent: whether chains go on from where they were at the datum's last visit, which needs its row number.
            None: wherever it is known.

    Attributes:
        step_size: of the leapfrog steps, the same for all data; a scalar tensor.

    Raises:
        ValueError: an argument is out of its range; or, when used: a latent is discrete or outside the data plate
            (names the site), or chains must persist where rows have no number.

    Example:
        >>> import torch, pyro_vae as pv
        >>> model = pv.LinearGaussian(torch.ones(3, 1))
        >>> run = pv.fit(pv.Program(model.model), torch.randn(50, 3), objective=pv.MCEM(), batch_size=10, epochs=1)
        >>> sorted(run.history[-1])[-1]
        'train_log_joint'
    """

    has_bound = False

    def __init__(
        self,
        num_leapfrog: int = 10,
        target_accept: float = 0.9,
        num_updates: int = 5,
        *,
        num_particles: int = 1,
        num_transitions: int = 1,
        persistent: bool | None = None,
    ) -> None:
        super().__init__(num_particles)
        self.num_leapfrog = whole_number("num_leapfrog", num_leapfrog)
        self.num_updates = whole_number("num_updates", num_updates)
        self.num_transitions = whole_number("num_transitions", num_transitions)
        if persistent not in (None, True, False):
            raise ValueError(f"persistent: expected True, False or None, got {persistent!r}")
        self.target_accept, self.persistent = probability("target_accept", target_accept), persistent
        self.reset()

    def reset(self) -> None:
        """Forget the step size and the chains of an earlier run."""
        self.step_size = torch.tensor(_FIRST_STEP_SIZE)
        self._chains: Tensor | None = None  # (K, N, J); not a number where a datum was never visited
        self._held: tuple[LatentSpace, Tensor] | None = None

    @property
    def config(self) -> dict[str, Any]:
        """The arguments that build this objective again."""
        names = ("num_leapfrog", "target_accept", "num_updates", "num_particles", "num_transitions", "persistent")
        return {name: getattr(self, name) for name in names}

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Minus log p(x, z) at draws of the posterior, summed over the minibatch and scaled by N / M, in nats."""
        space, draws = self._held or self._drawn(model, args, kwargs, None)
        density = space.density(draws)
        log_joint = (density.log_likelihood + density.log_prior).mean(0).sum()
        # The draws are held fixed where no constraint, which may move with theta, bears on them: so Fisher's identity.
        return -space.scale * value_with_gradient_of(log_joint, density.log_joint.mean(0).sum())

    def bound(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        """There is none.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "MCEM has no bound to evaluate: expected an objective that has one, such as SGVB(), after fit(..., "
            'trained="guide"), or log_marginal(..., method="ais", initial="prior")'
        )

    def updates(
        self, model: Any, args: Sequence[Any], kwargs: Mapping[str, Any], index: Tensor | None
    ) -> Iterator[None]:
        """The E-step, and then ``num_updates`` turns of the M-step with its draws held fixed."""
        self._held = self._drawn(model, args, kwargs, index)
        try:
            for _ in range(self.num_updates):
                yield
        finally:
            self._held = None

    def held(self) -> tuple[Tensor, ...]:
        """The draws that an M-step holds fixed."""
        return () if self._held is None else (self._held[1],)

    def _drawn(self, model: Any, args: Any, kwargs: Any, index: Tensor | None) -> tuple[LatentSpace, Tensor]:
        """The E-step: where the minibatch's chains end. Modules are in evaluation mode, for one target to stay one."""
        if index is None and self.persistent:
            raise ValueError(_NO_ROWS)
        with evaluation_mode(model):
            space = LatentSpace(model, None, args, kwargs)
            kept = None if self.persistent is False else index
            draws = self._transitions(space, self._start(space, kept))
        if kept is not None:
            self._keep(kept, draws)
        return space, draws

    def _transitions(self, space: LatentSpace, position: Tensor) -> Tensor:
        state = hmc.init(space.log_density, position)
        for _ in range(self.num_transitions):
            step_size = self.step_size.to(position)
            state, info = hmc.step(
                space.log_density, state, step_size=step_size, num_leapfrog=self.num_leapfrog, jitter=hmc.JITTER
            )
            self.step_size = hmc.tune_step_size(step_size, info.acceptance.mean(), self.target_accept)
        return state.position

    def _start(self, space: LatentSpace, index: Tensor | None) -> Tensor:
        """Where the chains of these rows are; draws of the prior for rows that have none."""
        prior = space.draw_prior(self.num_particles)
        if index is None or self._chains is None:
            return prior
        self._chains = self._chains.to(prior)  # a checkpoint's come without a device
        known = index < self._chains.shape[1]
        chains = self._chains[:, torch.where(known, index, 0)]
        return torch.where(known[:, None] & chains.isfinite(), chains, prior)

    def _keep(self, index: Tensor, positions: Tensor) -> None:
        rows = int(index.max()) + 1
        if self._chains is None:
            self._chains = positions.new_full((len(positions), rows, positions.shape[-1]), math.nan)
        if rows > self._chains.shape[1]:
            more = self._chains.new_full((len(positions), rows - self._chains.shape[1], positions.shape[-1]), math.nan)
            self._chains = torch.cat([self._chains, more], 1)
        self._chains[:, index] = positions

    def state_dict(self) -> dict[str, Tensor]:
        """The step size and the chains, for checkpoints."""
        return {"step_size": self.step_size} | ({} if self._chains is None else {"chains": self._chains})

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on with the step size and the chains of a checkpoint."""
        self.step_size, self._chains = state["step_size"], state.get("chains")
