r"""The linear-Gaussian state-space model, whose evidence and posterior are exact: a touchstone of inference in time.

    z_1 ~ N(m, P),    z_t = A z_{t-1} + b + B u_t + w_t,    w_t ~ N(0, Q)
    x_t = C z_t + d + v_t,                                  v_t ~ N(0, R),    R diagonal

The posterior is a Markov chain forwards in time. With p(x_t, ..., x_n | z_t) in proportion to exp(h_t'z - z'L_t z / 2)

    q(z_t | z_{t-1}, x) = N(S_t (h_t + Q^-1 (A z_{t-1} + b)), S_t),      S_t = (Q^-1 + L_t)^-1

where L_t and h_t come from a recursion backwards in time, the information filter (Mayne 1966; Fraser & Potter 1969):

    L_t = C' R^-1 C + A' (L_{t+1}^-1 + Q)^-1 A
    h_t = C' R^-1 (x_t - d) + A' (I + L_{t+1} Q)^-1 (h_{t+1} - L_{t+1} b)

The evidence comes from another one, forwards: the Kalman filter (Kalman 1960). Smoothed moments are the filter's,
corrected backwards (Rauch, Tung & Striebel 1965). Elements of x that are missing, and the steps after a sequence's
end, have R^-1 = 0 in all three. Covariances are only ever sums of products S S', never differences, so that rounding
leaves them what they are however long the sequence is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_vae.arguments import one_of, positive_number
from pyro_vae.distributions import MarkovSequence, steps_within
from pyro_vae.models.state_space import StateSpaceModel
from pyro_vae.recurrence import scan

__all__ = ["LinearEmission", "LinearGaussianSSM"]

PARTS = ("transition", "emission", "process", "noise", "initial")


class _Root(nn.Module):
    """A Cholesky factor of a covariance, of any real parameters.

    Args:
        root: lower triangular with a positive diagonal, (J, J); or standard deviations (J,), and stays diagonal.
        learned: whether its parameters are parameters, or buffers.
    """

    log_diagonal: Tensor
    below: Tensor | None

    def __init__(self, root: Tensor, learned: bool) -> None:
        super().__init__()
        diagonal = root if root.ndim == 1 else root.diagonal()
        _hold(self, "log_diagonal", diagonal.log(), learned)
        _hold(self, "below", None if root.ndim == 1 else root.tril(-1), learned)

    def forward(self) -> Tensor:
        """The factor, (J, J)."""
        diagonal = torch.diag_embed(self.log_diagonal.exp())
        return diagonal if self.below is None else diagonal + self.below.tril(-1)


class _Dynamics(nn.Module):
    """p(z_t | z_{t-1}, u_t) = N(A z_{t-1} + b + B u_t, Q)."""

    weight: Tensor
    bias: Tensor
    input_weight: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor, input_weight: Tensor | None, root: _Root, learned: bool) -> None:
        super().__init__()
        _hold(self, "weight", weight, learned)
        _hold(self, "bias", bias, learned)
        _hold(self, "input_weight", input_weight, learned)
        self.root = root

    def drift(self, inputs: Tensor | None) -> Tensor:
        """B + B u, (..., J), of u (..., U)."""
        return self.bias if inputs is None or self.input_weight is None else self.bias + inputs @ self.input_weight.mT

    def forward(self, z: Tensor, inputs: Tensor | None = None) -> dist.Distribution:
        """The law of z_t, event shape (J,), of z_{t-1} (..., J) and u_t (..., U)."""
        return dist.MultivariateNormal(z @ self.weight.mT + self.drift(inputs), scale_tril=self.root())


class LinearEmission(nn.Module):
    """p(x_t | z_t) = N(C z_t + d, diag(s)^2).

    Args:
        weight: C, (D, J).
        bias: d, (D,).
        scale: s > 0, (D,).
        learned: whether C and d are parameters, or buffers; and
        learned_scale: whether s is.

    Example:
        >>> LinearEmission(torch.ones(3, 2), torch.zeros(3), torch.ones(3))(torch.ones(5, 2)).mean[0]
        tensor([2., 2., 2.], grad_fn=<SelectBackward0>)
    """

    weight: Tensor
    bias: Tensor
    log_scale: Tensor

    def __init__(
        self, weight: Tensor, bias: Tensor, scale: Tensor, learned: bool = True, learned_scale: bool = True
    ) -> None:
        super().__init__()
        _hold(self, "weight", weight, learned)
        _hold(self, "bias", bias, learned)
        _hold(self, "log_scale", scale.log(), learned_scale)

    def forward(self, z: Tensor, inputs: Tensor | None = None) -> dist.Distribution:
        """The law of x_t, event shape (D,), of z_t (..., J); inputs are not read."""
        return dist.Normal(z @ self.weight.mT + self.bias, self.log_scale.exp()).to_event(1)


class _PosteriorStep(nn.Module):
    """q(z_t | z_{t-1}, x) = N(F_t z_{t-1} + c_t, S_t S_t'), of the step's (F_t, c_t, S_t) as one vector.

    S_t has the logarithm of its diagonal in the diagonal's place: a vector of zeros, as padding has, is a law too.
    """

    def forward(self, z: Tensor, given: Tensor) -> dist.Distribution:
        """The law of z_t, event shape (J,), of z_{t-1} (..., J) and what is given (..., J (2 J + 1))."""
        J = z.shape[-1]
        weight, offset, root = given.split([J * J, J, J * J], -1)
        root = _square(root)
        root = root.tril(-1) + torch.diag_embed(root.diagonal(dim1=-2, dim2=-1).exp())
        return dist.MultivariateNormal(_times(_square(weight), z) + offset, scale_tril=root)


class LinearGaussianSSM(StateSpaceModel):
    """A linear-Gaussian state-space model with its exact posterior as guide (Kalman 1960; Rauch et al. 1965).

    Args:
        transition: A, (J, J).
        emission: C, (D, J).
        process_scale: standard deviations of the process noise, (J,) or a number; 1 if None.
        noise_scale: standard deviations of the observation noise, (D,) or a number.
        initial_loc: mean of z_1, (J,); zeros if None.
        initial_covariance: of z_1, (J, J); the identity if None.
        process_covariance: Q, (J, J), in the place of ``process_scale``.
        transition_bias: b, (J,); zeros if None.
        emission_bias: d, (D,); zeros if None.
        input_weight: B, (J, U), for exogenous inputs u_2, ..., u_T; None for a model without.
        learned: which parts have parameters that are learned: some of "transition" (A, b, B), "emission" (C, d),
            "process" (Q), "noise" (R) and "initial" (m, P). The others are buffers.
        guide_shift: added to the guide's means, and
        guide_widening: factor on its covariances' roots; both only to make a guide that is wrong on purpose.

    Raises:
        ValueError: a shape, a scale or a covariance is not as stated; the message says what was expected.

    Example:
        >>> ssm = LinearGaussianSSM(torch.tensor([[0.9]]), torch.ones(3, 1), process_scale=0.5, noise_scale=0.2)
        >>> x, lengths = torch.zeros(2, 7, 3), torch.tensor([7, 4])
        >>> ssm.log_marginal(x, lengths).shape, ssm.encode(x, lengths).sample((5,)).shape
        (torch.Size([2]), torch.Size([5, 2, 7, 1]))
        >>> means, covariances = ssm.kalman_smoother(x, lengths)
        >>> means.shape, covariances.shape
        (torch.Size([2, 7, 1]), torch.Size([2, 7, 1, 1]))
    """

    initial_loc: Tensor
    emission: LinearEmission

    def __init__(
        self,
        transition: Any,
        emission: Any,
        process_scale: Any = None,
        noise_scale: Any = 1.0,
        initial_loc: Any = None,
        initial_covariance: Any = None,
        *,
        process_covariance: Any = None,
        transition_bias: Any = None,
        emission_bias: Any = None,
        input_weight: Any = None,
        learned: Iterable[str] = PARTS,
        guide_shift: float = 0.0,
        guide_widening: float = 1.0,
    ) -> None:
        super().__init__()
        if isinstance(learned, str):
            raise ValueError(f"learned: expected a list of names among {', '.join(PARTS)}, got {learned!r}")
        self.learned = tuple(one_of("learned", part, PARTS) for part in learned)
        positive_number("guide_widening", guide_widening)
        if process_scale is not None and process_covariance is not None:
            raise ValueError("process_scale: expected None beside a process_covariance, got both")
        A, C = _tensor("transition", transition), _tensor("emission", emission)
        if A.ndim != 2 or A.shape[0] != A.shape[1] or not len(A):
            raise ValueError(f"transition: expected shape (J, J), got {tuple(A.shape)}")
        if C.ndim != 2 or C.shape[1] != len(A) or not len(C):
            raise ValueError(f"emission: expected shape (D, {len(A)}), got {tuple(C.shape)}")
        D, J = C.shape
        B = None if input_weight is None else _tensor("input_weight", input_weight).to(A)
        if B is not None and (B.ndim != 2 or len(B) != J):
            raise ValueError(f"input_weight: expected shape ({J}, U), got {tuple(B.shape)}")
        self.latent_dim, self.data_dim, self.input_dim = J, D, 0 if B is None else B.shape[1]
        self.guide_shift, self.guide_widening = float(guide_shift), float(guide_widening)
        if process_covariance is None:
            process = _scales("process_scale", 1.0 if process_scale is None else process_scale, J, A)
        else:
            process = _factor("process_covariance", process_covariance, J, A)
        self.dynamics = _Dynamics(
            A,
            _vector("transition_bias", transition_bias, J, A),
            B,
            _Root(process, "process" in self.learned),
            "transition" in self.learned,
        )
        self.emission = LinearEmission(
            C.to(A),
            _vector("emission_bias", emission_bias, D, A),
            _scales("noise_scale", noise_scale, D, A),
            "emission" in self.learned,
            "noise" in self.learned,
        )
        first = "initial" in self.learned
        _hold(self, "initial_loc", _vector("initial_loc", initial_loc, J, A), first)
        covariance = torch.eye(J) if initial_covariance is None else initial_covariance
        self.initial_root = _Root(_factor("initial_covariance", covariance, J, A), first)
        self.posterior_step = _PosteriorStep()

    @property
    def config(self) -> dict[str, Any]:
        """The arguments that build this model again, with the parameters that it has now, as JSON can hold them."""
        move, emit = self.dynamics, self.emission
        root, first = move.root(), self.initial_root()
        diagonal = move.root.below is None
        found = {
            "transition": move.weight,
            "emission": emit.weight,
            "process_scale": root.diagonal() if diagonal else None,
            "noise_scale": emit.log_scale.exp(),
            "initial_loc": self.initial_loc,
            "initial_covariance": first @ first.mT,
            "process_covariance": None if diagonal else root @ root.mT,
            "transition_bias": move.bias,
            "emission_bias": emit.bias,
            "input_weight": move.input_weight,
        }
        lists = {name: None if value is None else value.tolist() for name, value in found.items()}
        knobs = {"guide_shift": self.guide_shift, "guide_widening": self.guide_widening}
        return lists | {"learned": list(self.learned)} | knobs

    def prior(self, num_steps: int, lengths: Tensor | None = None, inputs: Tensor | None = None) -> MarkovSequence:
        """p(z), of event shape (T, J).

        Args:
            num_steps: T.
            lengths: (...), from 1 to T; None for T.
            inputs: exogenous inputs, (..., T, U), of which the first step is not read.
        """
        first = dist.MultivariateNormal(self.initial_loc, scale_tril=self.initial_root())
        return MarkovSequence(first, self.dynamics, num_steps, self._given(inputs), lengths)

    def encode(
        self, x: Tensor, lengths: Tensor | None = None, inputs: Tensor | None = None, mask: Tensor | None = None
    ) -> MarkovSequence:
        """The guide's q(z | x), of event shape (T, J): the posterior unless made wrong.

        Args:
            x: observations, (M, T, D).
            lengths: (M,), from 1 to T; None for T.
            inputs: exogenous inputs, (M, T, U).
            mask: True where x was observed, (M, T, D) or (M, T, 1).
        """
        seen, known = self._evidence(x, lengths, mask), self._known(x.shape[-2], inputs)
        precision = _run(_PRECISION, seen.precision, known.root, known.whitened, backwards=True)  # L_t, (..., T, J^2)
        root = _posterior_root(_square(precision), _square(known.root))
        covariance = root @ root.mT
        weight = covariance @ torch.cholesky_solve(_square(known.weight), _square(known.root))  # F_t
        linear = _run(_ADJOINT, seen.linear, precision, _flat(weight), known.drift, backwards=True)  # h_t, (..., T, J)
        settled = torch.cholesky_solve(known.drift[..., None], _square(known.root)).squeeze(-1)
        offset = _times(covariance, linear + settled) + self.guide_shift
        root = root * self.guide_widening
        logs = root.tril(-1) + torch.diag_embed(root.diagonal(dim1=-2, dim2=-1).log())
        parts = [_flat(weight), offset, _flat(logs)]
        given = torch.cat([part.expand(*x.shape[:-1], part.shape[-1]) for part in parts], -1)
        first = dist.MultivariateNormal(offset[..., 0, :], scale_tril=root[..., 0, :, :])
        return MarkovSequence(first, self.posterior_step, x.shape[-2], given, lengths)

    def log_marginal(
        self, x: Tensor, lengths: Tensor | None = None, inputs: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """The exact log p(x), in nats, (M,), by the Kalman filter.

        Args:
            x: observations, (M, T, D).
            lengths: (M,), from 1 to T; None for T.
            inputs: exogenous inputs, (M, T, U).
            mask: True where x was observed, (M, T, D) or (M, T, 1).
        """
        seen = self._evidence(x, lengths, mask)
        found = self._filtered(seen, self._known(x.shape[-2], inputs))
        inner = _inner(_square(seen.precision), found.predicted_root)
        residual = seen.x - found.means @ self.emission.weight.mT - self.emission.bias
        moved = torch.linalg.solve_triangular(
            found.predicted_root, (found.means - found.predicted_means)[..., None], upper=False
        ).squeeze(-1)
        # log N(x; C m + d, S), with S^-1 and det S by C'R^-1C alone: the least of its square is at the filtered mean.
        terms = (seen.weight * residual.square()).sum(-1) + moved.square().sum(-1)
        terms = terms + 2 * _cholesky(inner).diagonal(dim1=-2, dim2=-1).log().sum(-1)
        constant = 2 * self.emission.log_scale + math.log(2 * math.pi)
        terms = terms + torch.where(seen.observed, constant, 0.0).sum(-1)
        log_marginal: Tensor = -0.5 * terms.sum(-1)
        return log_marginal

    def kalman_filter(
        self, x: Tensor, lengths: Tensor | None = None, inputs: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Mean and covariance of z_t given x_1, ..., x_t; past a sequence's length they are forecasts.

        Args:
            x: observations, (M, T, D).
            lengths: (M,), from 1 to T; None for T.
            inputs: exogenous inputs, (M, T, U).
            mask: True where x was observed, (M, T, D) or (M, T, 1).

        Returns:
            Means (M, T, J) and covariances (M, T, J, J).
        """
        found = self._filtered(self._evidence(x, lengths, mask), self._known(x.shape[-2], inputs))
        return found.means, found.covariances.expand(*found.means.shape, -1)

    def kalman_smoother(
        self, x: Tensor, lengths: Tensor | None = None, inputs: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Mean and covariance of z_t given the whole sequence; past its length they are forecasts.

        Args:
            x: observations, (M, T, D).
            lengths: (M,), from 1 to T; None for T.
            inputs: exogenous inputs, (M, T, U).
            mask: True where x was observed, (M, T, D) or (M, T, 1).

        Returns:
            Means (M, T, J) and covariances (M, T, J, J).
        """
        known = self._known(x.shape[-2], inputs)
        found = self._filtered(self._evidence(x, lengths, mask), known)
        A, Q = self.dynamics.weight, _square(known.root[1:])
        P, ahead = found.covariances[..., :-1, :, :], found.predicted_root[..., 1:, :, :]
        gain = torch.cholesky_solve(A @ P, ahead).mT  # P A' (A P A' + Q)^-1, (..., T - 1, J, J)
        kept = _eye(A) - gain @ A
        own = kept @ P @ kept.mT + gain @ Q @ Q.mT @ gain.mT
        offset = found.means[..., :-1, :] - _times(gain, found.predicted_means[..., 1:, :])
        gain = torch.nn.functional.pad(_flat(gain), (0, 0, 0, 1))  # the last step has no other after it
        own = torch.cat([_flat(own), _flat(found.covariances[..., -1:, :, :])], -2)
        means = _run(_AFFINE, torch.cat([offset, found.means[..., -1:, :]], -2), gain, backwards=True)
        covariances = _square(_run(_CONGRUENCE, own, gain, backwards=True))
        return means, covariances.expand(*means.shape, -1)

    def _filtered(self, seen: _Evidence, known: _Known) -> _Filtered:
        """The Kalman filter: covariances, which the data do not bear on, and then means."""
        covariances = _square(_run(_FILTERED, seen.precision, known.weight, known.root))
        A, Q = _square(known.weight), _square(known.root)
        before = torch.nn.functional.pad(covariances[..., :-1, :, :], (0, 0, 0, 0, 1, 0))
        predicted_root = _cholesky(A @ before @ A.mT + Q @ Q.mT)
        settled = torch.cholesky_solve(known.drift[..., None], predicted_root).squeeze(-1)
        weight = covariances @ torch.cholesky_solve(A.expand_as(predicted_root), predicted_root)
        means = _run(_AFFINE, _times(covariances, settled + seen.linear), _flat(weight))
        predicted = _times(A, torch.nn.functional.pad(means[..., :-1, :], (0, 0, 1, 0))) + known.drift
        return _Filtered(means, covariances, predicted, predicted_root)

    def _evidence(self, x: Tensor, lengths: Tensor | None, mask: Tensor | None) -> _Evidence:
        if x.ndim < 2 or x.shape[-1] != self.data_dim:
            raise ValueError(f"x: expected shape (M, T, {self.data_dim}), got {tuple(x.shape)}")
        observed = torch.ones(x.shape[-2:], dtype=torch.bool, device=x.device)
        for part in (mask, None if lengths is None else steps_within(lengths, x.shape[-2])[..., None]):
            observed = observed if part is None else observed & part
        x = torch.where(observed, x, 0.0)
        C = self.emission.weight
        weight = torch.where(observed, (-2 * self.emission.log_scale).exp(), 0.0)
        precision = weight @ (C[:, :, None] * C[:, None, :]).flatten(1)
        return _Evidence(x, observed, weight, precision, (weight * (x - self.emission.bias)) @ C)

    def _known(self, num_steps: int, inputs: Tensor | None) -> _Known:
        """What moves z to each step; the first is moved there from nowhere, by its own law."""
        move, first_root = self.dynamics, self.initial_root()
        root, later = move.root(), num_steps - 1
        whitened = torch.linalg.solve_triangular(root, move.weight, upper=False)
        given = self._given(inputs)
        drift = move.drift(None if given is None else given[..., 1:, :])
        drift = drift.expand(*drift.shape[:-2], later, -1) if drift.ndim > 1 else drift.expand(later, -1)
        first_drift = self.initial_loc.expand(*drift.shape[:-2], 1, -1)

        def of_steps(first: Tensor, then: Tensor) -> Tensor:
            return torch.cat([_flat(first)[None], _flat(then).expand(later, -1)])

        none = torch.zeros_like(root)
        return _Known(
            of_steps(none, move.weight),
            of_steps(first_root, root),
            of_steps(none, whitened),
            torch.cat([first_drift, drift], -2),
        )

    def _given(self, inputs: Tensor | None) -> Tensor | None:
        width = 0 if inputs is None else inputs.shape[-1]
        if width != self.input_dim:
            raise ValueError(f"inputs: expected {self.input_dim} values for each step (input_weight), got {width}")
        return inputs


@dataclass(frozen=True)
class _Evidence:
    """What observations say of latents.

    Attributes:
        x: zero where it is missing, (..., T, D).
        observed: where it is not.
        weight: R^-1, zero where it is.
        precision: C' R^-1 C, (..., T, J^2).
        linear: C' R^-1 (x - d), (..., T, J).
    """

    x: Tensor
    observed: Tensor
    weight: Tensor
    precision: Tensor
    linear: Tensor


@dataclass(frozen=True)
class _Known:
    """The moves to each step: A, a root L of Q, L^-1 A, each (T, J^2), and b + B u, (..., T, J)."""

    weight: Tensor
    root: Tensor
    whitened: Tensor
    drift: Tensor


@dataclass(frozen=True)
class _Filtered:
    """Moments given the data up to a step, and up to the one before: a mean, and a covariance's Cholesky factor."""

    means: Tensor
    covariances: Tensor
    predicted_means: Tensor
    predicted_root: Tensor


# Recursions -----------------------------------------------------------------------------------------------------------


class _Precision(nn.Module):
    """L_t of L_{t+1}: what is seen at t, and (L_{t+1}^-1 + Q)^-1 as A sees it."""

    def forward(self, after: Tensor, seen: Tensor, root: Tensor, whitened: Tensor) -> Tensor:
        """The next state, (..., J^2); the moves are those to step t + 1."""
        root, whitened = _square(root), _square(whitened)
        inner = root.mT @ _square(after) @ root  # N: (L^-1 + Q)^-1 = root'^-1 N (I + N)^-1 root^-1
        factor = _cholesky(inner + _eye(inner))
        share = torch.cholesky_solve(inner, factor)
        both = torch.cholesky_solve(share.mT, factor) + share @ share.mT  # a sum, for N (I + N)^-1 is a difference
        return seen + _flat(whitened.mT @ both @ whitened)


class _Adjoint(nn.Module):
    """h_t of h_{t+1}: what is seen at t, and F' (h_{t+1} - L_{t+1} b)."""

    def forward(self, after: Tensor, seen: Tensor, precision: Tensor, weight: Tensor, drift: Tensor) -> Tensor:
        """The next state, (..., J); what moves is that to step t + 1."""
        return seen + _times(_square(weight).mT, after - _times(_square(precision), drift))


class _FilteredCovariance(nn.Module):
    """The covariance of z_t given x_1, ..., x_t, of the one before."""

    def forward(self, before: Tensor, seen: Tensor, weight: Tensor, root: Tensor) -> Tensor:
        """The next state, (..., J^2)."""
        weight, root = _square(weight), _square(root)
        predicted = weight @ _square(before) @ weight.mT + root @ root.mT
        found = _posterior_root(_square(seen), _cholesky(predicted))
        return _flat(found @ found.mT)


class _Affine(nn.Module):
    """F v + c."""

    def forward(self, v: Tensor, offset: Tensor, weight: Tensor) -> Tensor:
        """The next state, (..., J)."""
        return _times(_square(weight), v) + offset


class _Congruence(nn.Module):
    """G V G' + E."""

    def forward(self, v: Tensor, own: Tensor, weight: Tensor) -> Tensor:
        """The next state, (..., J^2)."""
        weight = _square(weight)
        return _flat(weight @ _square(v) @ weight.mT) + own


# One of each, for what is recorded of a cell is kept as long as the cell is.
_PRECISION, _ADJOINT, _FILTERED, _AFFINE = _Precision(), _Adjoint(), _FilteredCovariance(), _Affine()
_CONGRUENCE = _Congruence()
_OF_THE_NEXT = (_PRECISION, _ADJOINT)  # a step's own part comes with the move to the step after it


def _run(cell: nn.Module, own: Tensor, *moves: Tensor, backwards: bool = False) -> Tensor:
    """States of a recursion from nothing, (..., T, H).

    Args:
        cell: of a state, a step's own part and its moves.
        own: (..., T, H).
        moves: each (..., T, ·).
        backwards: begin at the last step.
    """
    batch = torch.broadcast_shapes(own.shape[:-2], *(move.shape[:-2] for move in moves))
    if cell in _OF_THE_NEXT:
        moves = tuple(torch.nn.functional.pad(move[..., 1:, :], (0, 0, 0, 1)) for move in moves)
    given = [tensor.movedim(-2, 0) for tensor in (own, *moves)]
    given = [tensor.flip(0) if backwards else tensor for tensor in given]
    states = scan(cell, own.new_zeros(*batch, own.shape[-1]), given)
    return (states.flip(0) if backwards else states).movedim(0, -2)


# Matrices -------------------------------------------------------------------------------------------------------------


def _square(flat: Tensor) -> Tensor:
    J = math.isqrt(flat.shape[-1])
    return flat.reshape(*flat.shape[:-1], J, J)


def _flat(square: Tensor) -> Tensor:
    return square.flatten(-2)


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector[..., None]).squeeze(-1)


def _eye(like: Tensor) -> Tensor:
    return torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)


def _cholesky(matrix: Tensor) -> Tensor:
    """The factor; not a number where there is none: that stops a run, as an error in a recorded step could not."""
    factor, failed = torch.linalg.cholesky_ex(matrix)
    return torch.where(failed[..., None, None] == 0, factor, math.nan)


def _inner(precision: Tensor, root: Tensor) -> Tensor:
    """I + L' (precision) L of a root L of a covariance."""
    inner = root.mT @ precision @ root
    return inner + _eye(inner)


def _posterior_root(precision: Tensor, root: Tensor) -> Tensor:
    """The Cholesky factor of ((L L')^-1 + precision)^-1 = L (U U')^-1 L', with U upper triangular: L U'^-1."""
    upper = _cholesky(_inner(precision, root).flip(-1, -2)).flip(-1, -2)
    found: Tensor = torch.linalg.solve_triangular(upper, root.mT.expand_as(upper), upper=True)
    return found.mT


# Arguments ------------------------------------------------------------------------------------------------------------


def _hold(module: nn.Module, name: str, value: Tensor | None, learned: bool) -> None:
    """A parameter, or a buffer."""
    value = None if value is None else value.detach().clone()
    if learned and value is not None:
        module.register_parameter(name, nn.Parameter(value))
    else:
        module.register_buffer(name, value)


def _tensor(name: str, value: Any) -> Tensor:
    found = value.detach() if isinstance(value, Tensor) else torch.as_tensor(value, dtype=torch.get_default_dtype())
    if not (found.is_floating_point() and bool(found.isfinite().all())):
        raise ValueError(f"{name}: expected finite floating-point numbers, got {found.dtype} {found.flatten()[:6]}")
    return found


def _vector(name: str, value: Any, size: int, like: Tensor) -> Tensor:
    found = like.new_zeros(size) if value is None else _tensor(name, value).to(like)
    if found.shape != (size,):
        raise ValueError(f"{name}: expected shape ({size},), got {tuple(found.shape)}")
    return found


def _scales(name: str, value: Any, size: int, like: Tensor) -> Tensor:
    found = _tensor(name, value)
    found = _vector(name, found.expand(size) if found.ndim == 0 else found, size, like)
    if not bool((found > 0).all()):
        raise ValueError(f"{name}: expected positive numbers, got {found.tolist()}")
    return found


def _factor(name: str, value: Any, size: int, like: Tensor) -> Tensor:
    """The Cholesky factor of a covariance."""
    found = _tensor(name, value).to(like)
    if found.shape != (size, size):
        raise ValueError(f"{name}: expected shape ({size}, {size}), got {tuple(found.shape)}")
    factor: Tensor
    factor, failed = torch.linalg.cholesky_ex(found)
    if bool(failed) or not torch.allclose(found, found.mT):
        raise ValueError(f"{name}: expected a symmetric positive definite matrix, got {found.tolist()}")
    return factor
