"""Latent sites dimension by dimension: values laid out by datum, and the KL divergence that each carries."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pyro import poutine
from pyro.distributions import MaskedDistribution
from pyro.distributions.util import broadcast_shape, scale_and_mask, sum_rightmost
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor
from torch.distributions import Independent, kl_divergence

from pyro_vae.programs.program import PyroFunction
from pyro_vae.programs.sites import (
    DATA_PLATE,
    PARTICLE_PLATE,
    each_particle,
    frame_of,
    observed_and_latent,
    plain_traces,
    require_same_sites,
    scale_of,
    stack_terms,
    support_of,
)
from pyro_vae.programs.weights import known_when_drawn, run_guide

__all__ = ["LatentSite", "innermost", "kl_by_dimension", "latent_sites"]


@dataclass(frozen=True)
class LatentSite:
    """A latent site of a model: its kind, and where the data lie among its dimensions.

    Attributes:
        is_discrete: whether its support is.
        ndim: of its value in one run, without particles.
        size: how many numbers that value holds.
        axes: which of these dimensions are the data plate's, any other plate's, or the event's, in this order; None for
            a global latent, which lies outside the data plate.
    """

    is_discrete: bool
    ndim: int
    axes: tuple[int, ...] | None
    size: int = 1

    def by_datum(self, values: Tensor) -> Tensor:
        """Values (K, ...) as :func:`draw_guide` or :func:`dream` gives them, laid out as (K, M, *plates, *event)."""
        if self.axes is None:
            raise ValueError("expected a site in the data plate, got a global latent")
        one_run = values.shape[values.ndim - self.ndim :]
        return _laid_out(values.reshape(len(values), *one_run), [0, *(1 + axis for axis in self.axes)])


def latent_sites(
    model: PyroFunction, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None
) -> dict[str, LatentSite]:
    """A model's latent sites in ancestral order, as one run shows them; torch's generators are left as they were.

    Args:
        model: Pyro function.
        args: positional arguments: a minibatch of M data.
        kwargs: keyword arguments.

    Returns:
        What each site is.
    """
    sites, _ = plain_traces(model, None, args, kwargs or {})
    _, latent = observed_and_latent(sites)
    return {name: _latent_site(site) for name, site in latent.items()}


def _latent_site(site: Any) -> LatentSite:
    support, ndim = support_of(site["fn"]), site["value"].ndim
    axes = tuple(_axes(site, ndim, site["fn"].event_dim)) if frame_of(site, DATA_PLATE) is not None else None
    return LatentSite(support is not None and support.is_discrete, ndim, axes, site["value"].numel())


def kl_by_dimension(
    model: PyroFunction,
    guide: PyroFunction,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    *,
    num_particles: int = 1,
) -> dict[str, Tensor]:
    """KL(q(z | x) || p(z)) of each latent site, term by term over the dimensions over which both densities factorise.

    In closed form where :func:`log_weights` takes it so, else log q - log p at draws of the guide. What a mask hides
    counts as zero. Dimensions over which one of the two does not factorise (those of a MultivariateNormal) are summed,
    those of further plates are not.

    Args:
        model: Pyro function, the generative model. Latents outside the data plate are drawn and have no terms.
        guide: Pyro function of the same arguments.
        args: positional arguments of both: a minibatch of M data.
        kwargs: keyword arguments of both.
        num_particles: K, at least 1.

    Returns:
        Terms by site, (K, M, *plates, *event), in nats; their mean over K estimates the KL without bias.

    Raises:
        ValueError: the guide's sites are not the model's latent ones, or it draws auxiliary sites, so that its density
            does not split into those of the sites.
    """
    kwargs = kwargs or {}

    def run(_: Mapping[str, Tensor]) -> dict[str, Tensor]:
        guide_trace, drawn, auxiliary = run_guide(guide, args, kwargs, {})
        if auxiliary:
            raise ValueError(
                f"the guide draws auxiliary sites {sorted(auxiliary)}, as an automatic guide does, so its density does "
                f"not split into those of {sorted(drawn)}: write a guide that draws those sites themselves"
            )
        model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args, **kwargs)
        _, latent = observed_and_latent(prune_subsample_sites(model_trace).nodes)
        require_same_sites(latent, drawn)
        known = known_when_drawn(latent, drawn)
        own = {name: site for name, site in latent.items() if frame_of(site, DATA_PLATE) is not None}
        return {name: _kl_by_dimension(drawn[name], site, name in known) for name, site in own.items()}

    return stack_terms(each_particle(run, model, guide, args, kwargs, num_particles, {}))


def _kl_by_dimension(drawn: Any, latent: Any, known: bool) -> Tensor:
    """The terms of a site's KL, in closed form where that is ``known`` to be right and registered: (K, M, ...)."""
    (q, q_mask), (p, p_mask) = innermost(drawn), innermost(latent)
    event_dim = max(q.event_dim, p.event_dim)
    if known and _same_mask(q_mask, p_mask) and (q.event_dim == p.event_dim or q_mask is True):
        with contextlib.suppress(NotImplementedError):
            kl = kl_divergence(_joined(q, event_dim), _joined(p, event_dim))
            return _term_by_datum(latent, kl, p_mask, event_dim, event_dim)
    log_q, log_p = (
        _term_by_datum(site, fn.log_prob(drawn["value"]), mask, fn.event_dim, event_dim)
        for site, fn, mask in ((drawn, q, q_mask), (latent, p, p_mask))
    )
    return log_q - log_p


def innermost(site: Any) -> tuple[Any, Any]:
    """A site's distribution without what is around it, and the masks around it, as one of its batch dimensions."""
    fn, mask = site["fn"], True if site["mask"] is None else site["mask"]
    while isinstance(fn, (Independent, MaskedDistribution)):
        if isinstance(fn, MaskedDistribution):
            mask = mask & fn._mask
        else:
            mask = _with_events(mask, fn.reinterpreted_batch_ndims)
        fn = fn.base_dist
    return fn, mask


def _with_events(batch: Any, event_dim: int) -> Any:
    return batch[(..., *[None] * event_dim)] if isinstance(batch, Tensor) and batch.ndim else batch


def _same_mask(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        return bool((left == right).all())
    return left is right


def _joined(fn: Any, event_dim: int) -> Any:
    return Independent(fn, event_dim - fn.event_dim) if event_dim > fn.event_dim else fn


def _term_by_datum(site: Any, term: Tensor, mask: Any, summed: int, event_dim: int) -> Tensor:
    """Mask and scale a term of a site, and lay it out as (K, M, *plates, *event).

    Of the event's last ``event_dim`` dimensions, all of which go, the last ``summed`` are gone already.
    """
    split = site["fn"].event_dim - summed
    sizes = {frame.dim: frame.size for frame in site["cond_indep_stack"] if frame.vectorized}
    batch = term.shape[: term.ndim - split]
    rank = max([len(batch), *(-dim for dim in sizes)])
    batch = broadcast_shape(batch, tuple(sizes.get(dim, 1) for dim in range(-rank, 0)))
    scale = _with_events(site["scale"], split) / scale_of(frame_of(site, DATA_PLATE))
    term = scale_and_mask(term.expand(*batch, *term.shape[term.ndim - split :]), scale, mask)
    term = sum_rightmost(term, event_dim - summed)
    return _laid_out(term, _axes(site, term.ndim, site["fn"].event_dim - event_dim))


def _axes(site: Any, ndim: int, event_dim: int) -> list[int]:
    """Of a site's tensor: the dimension of the particles if there is one, the data plate's, other plates', events'."""
    frames = [frame for frame in site["cond_indep_stack"] if frame.vectorized]
    plates = sorted(frames, key=lambda f: (f.name != PARTICLE_PLATE, f.name != DATA_PLATE, f.dim))
    return [ndim - event_dim + frame.dim for frame in plates] + list(range(ndim - event_dim, ndim))


def _laid_out(values: Tensor, axes: Sequence[int]) -> Tensor:
    """Values with these dimensions, in this order; the others have size one."""
    others = [axis for axis in range(values.ndim) if axis not in axes]
    return values.permute(*axes, *others).reshape([values.shape[axis] for axis in axes])
