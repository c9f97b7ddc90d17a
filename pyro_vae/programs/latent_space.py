"""The latents of a minibatch as one real vector per datum: what samplers move in."""

from __future__ import annotations

import copy
import functools
import itertools
import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask, sum_rightmost
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor
from torch.distributions import biject_to

from pyro_vae.programs.dimensions import innermost
from pyro_vae.programs.program import PyroFunction, owner_of
from pyro_vae.programs.sites import (
    DATA_PLATE,
    Given,
    T,
    base_name_of,
    data_frame_of,
    each_particle,
    frame_of,
    is_delta,
    observed_and_latent,
    plain_traces,
    plate_nesting,
    scale_of,
    site_log_prob,
    stack_terms,
    sum_of,
    sum_per_datum,
    support_of,
)
from pyro_vae.programs.weights import draw_guide, draw_prior, log_guide

__all__ = ["Density", "LatentSpace"]


@dataclass(frozen=True, eq=False)
class Density:
    """Log densities of a model at given latents, each (K, M), in nats.

    Attributes:
        latents: the values by site, (K, M, *event).
        log_likelihood: log p(x | z).
        log_prior: log p(z).
        log_det: log |dz / du| of the maps from unconstrained u to the latents z: 0 where every latent is real.
    """

    latents: dict[str, Tensor]
    log_likelihood: Tensor
    log_prior: Tensor
    log_det: Tensor

    @property
    def log_joint(self) -> Tensor:
        """Log p(x, z(u)) |dz / du|: the unnormalised posterior of u, (K, M)."""
        return self.log_likelihood + self.log_prior + self.log_det


class LatentSpace:
    """A minibatch's latents as one real vector per datum, u of shape (K, M, J): what samplers move in.

    Or the latents of all the data and those that they share as one vector, u of shape (K, 1, J), whose densities are
    those of the data set.

    Constrained latents are mapped by torch's bijections (``biject_to`` of the site's support, which may depend on the
    latents drawn before it), with their Jacobians; sites are laid side by side, whatever their plates within a datum.

    Args:
        model: Pyro function whose latents are continuous and all in the data plate.
        guide: Pyro function of the same arguments; None for a program without one.
        args: positional arguments: a minibatch of M data.
        kwargs: keyword arguments.
        whole: one vector for all: latents may lie outside the data plate. M is 1 in the shapes below.
        hold_shared: latents outside the data plate are drawn from the guide, one for each particle, when points are
            drawn, and are held from then on: densities are those of the data's own latents given them.

    Attributes:
        dim: J.
        scale: N / M, the number of data over the size of the minibatch.
        sites: names of the latent sites, in ancestral order.
        masked: those of which a mask hides values: the density of u does not depend on them, nor has it an integral.

    Raises:
        ValueError: a latent is discrete, or lies outside the data plate; names the site.

    Example:
        >>> import pyro_vae as pv
        >>> model = pv.LinearGaussian(torch.ones(3, 2))
        >>> space = LatentSpace(model.model, model.guide, (torch.zeros(5, 3),))
        >>> space.dim, space.density(torch.zeros(4, 5, 2)).log_joint.shape
        (2, torch.Size([4, 5]))
    """

    def __init__(
        self,
        model: PyroFunction,
        guide: PyroFunction | None,
        args: Sequence[Any],
        kwargs: Mapping[str, Any] | None = None,
        *,
        whole: bool = False,
        hold_shared: bool = False,
    ) -> None:
        self.whole = whole
        self._model, self._guide, self._args, self._kwargs = model, guide, args, kwargs or {}
        model_sites, _ = plain_traces(model, None, args, self._kwargs)
        _, latent = observed_and_latent(model_sites)
        if not latent:
            raise ValueError("expected a model with latent sites, got one that only observes")
        self._vectorized = getattr(owner_of(model), "vectorize", True)
        nesting = plate_nesting(model, guide, args, self._kwargs) if self._vectorized else 0
        held = {name for name, site in latent.items() if hold_shared and frame_of(site, DATA_PLATE) is None}
        self._held: dict[str, Tensor] = dict.fromkeys(held, torch.zeros(0))  # values, once points are drawn
        latent = {name: site for name, site in latent.items() if name not in held}
        if not latent:
            raise ValueError(f"expected latents that belong to a datum each, got {sorted(held)}, which data share")
        self._layouts = {name: _layout(name, site, nesting, whole) for name, site in latent.items()}
        self.sites, self.dim = list(latent), sum(layout.size for layout in self._layouts.values())
        self.scale = scale_of(data_frame_of(model_sites))
        self.masked = [name for name, site in latent.items() if not torch.as_tensor(innermost(site)[1]).all()]

    @property
    def tensors(self) -> list[Tensor]:
        """The minibatch's tensors: positional arguments, then the others, then the shared latents that are held."""
        return [*self._args, *self._kwargs.values(), *self._held.values()]

    @property
    def holds_shared(self) -> bool:
        """Whether there are shared latents that are held."""
        return bool(self._held)

    def at(self, *tensors: Tensor) -> LatentSpace:
        """The same space for another minibatch of the same shapes.

        Args:
            *tensors: in the places of :attr:`tensors`.
        """
        other, rest = copy.copy(self), iter(tensors)
        other._args = tuple(itertools.islice(rest, len(self._args)))
        other._kwargs = dict(zip(self._kwargs, itertools.islice(rest, len(self._kwargs)), strict=True))
        other._held = dict(zip(self._held, rest, strict=True))
        return other

    def log_density(self, u: Tensor) -> Tensor:
        """The unnormalised log posterior of vectors u (K, M, J), as one of u: (K, M), in nats."""
        return self.density(u).log_joint

    def require_unmasked(self, what: str) -> None:
        """Refuse masked latents, over which the density of u has no integral.

        Raises:
            ValueError: there are some; names them, and ``what`` is asked for.
        """
        if self.masked:
            raise ValueError(
                f"{what} expects a density that can be normalised, but a mask hides values of the latent sites "
                f'{self.masked}: use log_marginal(..., method="ais")'
            )

    def draw_prior(self, num_particles: int) -> Tensor:
        """K draws of the prior, (K, M, J)."""
        if self._held:
            self._hold(self._draw_guide(num_particles))
        draws = draw_prior(self._model, self._guide, self._args, self._kwargs, num_particles, self._held)
        return self.from_latents(draws)

    @torch.no_grad()
    def draw_guide(self, num_particles: int) -> Tensor:
        """K draws of the guide, (K, M, J).

        Raises:
            ValueError: there is no guide.
        """
        drawn = self._draw_guide(num_particles)
        self._hold(drawn)
        return self.from_latents(drawn)

    def _draw_guide(self, num_particles: int) -> dict[str, Tensor]:
        return draw_guide(self._model, self._required_guide(), self._args, self._kwargs, num_particles)

    def _hold(self, drawn: Mapping[str, Tensor]) -> None:
        self._held = {name: drawn[name] for name in self._held}

    def log_guide(self, density: Density) -> Tensor:
        """Log density of the guide at the point that a density was taken at, as one of u: (K, M)."""
        latents = {name: density.latents[name] for name in self.sites} | self._held
        terms = log_guide(self._model, self._required_guide(), self._args, self._kwargs, latents)
        return self._sum_of_stacked(terms) + density.log_det

    def _sum_of_stacked(self, terms: Mapping[str, Tensor]) -> Tensor:
        if not self.whole:
            return sum_of(terms, ndim=2)
        return functools.reduce(operator.add, (term.reshape(len(term), -1).sum(-1, True) for term in terms.values()))

    def _required_guide(self) -> PyroFunction:
        if self._guide is None:
            raise ValueError("expected a program with a guide: Program(model, guide), got one without")
        return self._guide

    @torch.no_grad()
    def from_latents(self, latents: Mapping[str, Tensor]) -> Tensor:
        """The vectors (K, M, J) of latents by site, (K, M, *event)."""

        def run(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
            own, held = self._parted(values)
            with Given(held), _ToReal(own) as mapped:
                self._model(*self._args, **self._kwargs)
            return dict(mapped.real)

        own = {name: latents[name] for name in self.sites}
        real = stack_terms(self._each_particle(run, own | self._held))
        return torch.cat([layout.flatten(real[name]) for name, layout in self._layouts.items()], -1)

    def density(self, u: Tensor) -> Density:
        """Log densities of the model at vectors u (K, M, J), with gradients to u and to theta."""
        parts = u.split([layout.size for layout in self._layouts.values()], -1)
        real = {name: layout.unflatten(part) for (name, layout), part in zip(self._layouts.items(), parts, strict=True)}
        runs = self._each_particle(self._density, real | self._held)
        if isinstance(runs, Density):
            return runs
        terms = (torch.stack([getattr(r, n) for r in runs]) for n in ("log_likelihood", "log_prior", "log_det"))
        return Density(stack_terms([run.latents for run in runs]), *terms)

    def _parted(self, values: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The data's own latents, and the shared ones that are held."""
        own = {name: value for name, value in values.items() if name not in self._held}
        return own, {name: values[name] for name in self._held}

    def _density(self, values: Mapping[str, Tensor]) -> Density:
        real, held = self._parted(values)
        with Given(held), _FromReal(real) as maps:
            trace = poutine.trace(self._model).get_trace(*self._args, **self._kwargs)
        observed, latent = observed_and_latent(prune_subsample_sites(trace).nodes)
        latent = {name: site for name, site in latent.items() if name not in held}
        stray = [name for name, site in observed.items() if frame_of(site, DATA_PLATE) is None]
        if stray and not self.whole:
            raise ValueError(f"log p(x, z) per datum needs every site in the data plate; outside it: {stray}")
        # A program's own scale is part of its density, not of the map.
        maps_alone = {name: {**site, "scale": _minibatch_scale(site)} for name, site in latent.items()}
        return Density(
            {name: site["value"] for name, site in latent.items()},
            self._sum(site_log_prob(site) for site in observed.values()),
            self._sum(site_log_prob(site) for site in latent.values()),
            self._sum(sum_per_datum(site, maps.log_det[name]) for name, site in maps_alone.items()),
        )

    def _sum(self, terms: Iterable[Tensor]) -> Tensor:
        """The sum of sites' terms, by datum, (K, M), or of all data, (K, 1); without K where particles come singly."""
        if not self.whole:
            return functools.reduce(operator.add, terms)
        kept = 1 if self._vectorized else 0
        return functools.reduce(operator.add, (term.reshape(*term.shape[:kept], -1).sum(-1, True) for term in terms))

    def _each_particle(self, run: Callable[[Mapping[str, Tensor]], T], values: Mapping[str, Tensor]) -> T | list[T]:
        count = len(next(iter(values.values())))
        return each_particle(run, self._model, self._guide, self._args, self._kwargs, count, values)


@dataclass(frozen=True)
class _Layout:
    """How a site's unconstrained values, of shape (*batch, *event) for one particle, lie in a vector per datum."""

    shape: tuple[int, ...]
    data: int | None  # the data plate's dimension in it, from the right; None in one vector for all data
    missing: int  # batch dimensions between the particles' and its own

    @property
    def size(self) -> int:
        return math.prod(self.shape) // (1 if self.data is None else self.shape[self.data])

    def flatten(self, real: Tensor) -> Tensor:
        if self.data is None:
            return real.reshape(len(real), 1, self.size)
        by_datum = real.reshape(len(real), *self.shape).movedim(self.data, 1)
        return by_datum.reshape(*by_datum.shape[:2], self.size)

    def unflatten(self, part: Tensor) -> Tensor:
        value = part
        if self.data is not None:
            others = [size for dim, size in enumerate(self.shape, -len(self.shape)) if dim != self.data]
            value = part.reshape(*part.shape[:2], *others).movedim(1, self.data)
        return value.reshape(len(part), *(1,) * self.missing, *self.shape)


def _minibatch_scale(site: Any) -> float:
    frame = frame_of(site, DATA_PLATE)
    return 1.0 if frame is None else scale_of(frame)


def _layout(name: str, site: Any, nesting: int, whole: bool) -> _Layout:
    frame, fn = frame_of(site, DATA_PLATE), site["fn"]
    if frame is None and not whole:
        raise ValueError(
            f"expected latents that belong to a datum each, but site '{name}' is outside the data plate: "
            'SGVB() trains such a program, and log_marginal(..., of="dataset") takes all data together'
        )
    support = support_of(fn)
    if support is None or support.is_discrete or is_delta(fn):
        raise ValueError(
            f"expected continuous latents, but site '{name}' is drawn from {base_name_of(site)}: "
            'use log_marginal(..., method="importance"), or a learning objective such as ReweightedWakeSleep'
        )
    batch_rank = site["value"].ndim - fn.event_dim
    try:
        real = biject_to(support).inv(site["value"])
    except NotImplementedError as error:
        raise ValueError(
            f"Hamiltonian Monte Carlo moves in real space, and torch has no bijection from there to the support of "
            f"{base_name_of(site)}, the distribution of site '{name}'"
        ) from error
    data = None if whole or frame is None else frame.dim - (real.ndim - batch_rank)
    return _Layout(tuple(real.shape), data, max(0, nesting - batch_rank))


class _ToReal(Messenger):  # type: ignore[misc]
    """Latents take these values; what they are without constraints is kept."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.values = values
        self.real: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: Any) -> None:
        if (name := msg["name"]) in self.values and not msg["is_observed"]:
            self.real[name] = biject_to(msg["fn"].support).inv(self.values[name])
            msg["value"], msg["done"] = self.values[name], True


class _FromReal(Messenger):  # type: ignore[misc]
    """Latents take the values that real ones map to; the maps' log Jacobians are kept."""

    def __init__(self, real: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.real = real
        self.log_det: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: Any) -> None:
        if (name := msg["name"]) in self.real and not msg["is_observed"]:
            (fn, mask), real = innermost(msg), self.real[name]
            bijection = biject_to(fn.support)
            msg["value"], msg["done"] = bijection(real), True
            log_det = bijection.log_abs_det_jacobian(real, msg["value"])
            log_det = scale_and_mask(sum_rightmost(log_det, fn.event_dim - bijection.codomain.event_dim), mask=mask)
            self.log_det[name] = sum_rightmost(log_det, msg["fn"].event_dim - fn.event_dim)
