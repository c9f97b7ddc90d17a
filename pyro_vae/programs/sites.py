"""Sites, plates and particles of a trace: which there are, how densities are reduced, how particles are laid out."""

from __future__ import annotations

import contextlib
import functools
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import pyro
import torch
from pyro import poutine
from pyro.distributions import Delta, MaskedDistribution
from pyro.distributions.util import broadcast_shape, scale_and_mask
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import prune_subsample_sites, site_is_subsample
from torch import Tensor
from torch.distributions import Independent, constraints

from pyro_vae.numerics import forked_rng
from pyro_vae.programs.program import PyroFunction, evaluation_mode, owner_of

__all__ = [
    "DATA_PLATE",
    "PARTICLE_PLATE",
    "Given",
    "T",
    "base_name_of",
    "base_support_of",
    "data_frame_of",
    "draws_per_datum",
    "each_particle",
    "frame_of",
    "is_delta",
    "minibatch_scale",
    "observed_and_latent",
    "own_scale",
    "plain_traces",
    "plate_nesting",
    "require_same_sites",
    "same_minibatch",
    "scale_of",
    "site_log_prob",
    "sites_of_guide",
    "stack_terms",
    "sum_of",
    "sum_per_datum",
    "support_of",
]

DATA_PLATE = "data"

PARTICLE_PLATE = "_pyro_vae_particles"

T = TypeVar("T")

_nestings: WeakKeyDictionary[Any, WeakKeyDictionary[Any, dict[tuple[str, str], int]]] = WeakKeyDictionary()


_per_datum: ContextVar[bool] = ContextVar("_per_datum", default=True)


def draws_per_datum() -> bool:
    """Whether each datum may see global latents that are drawn for it alone, if a program does so.

    The mean over draws of a sum of functions of one datum each is the same, whether data share the draws or not. A
    weight, such as p(X, theta) / q(theta), takes one draw for all that is multiplied.
    """
    return _per_datum.get()


@contextlib.contextmanager
def _drawn_per_datum(allowed: bool) -> Iterator[None]:
    token = _per_datum.set(allowed)
    try:
        yield
    finally:
        _per_datum.reset(token)


def sum_of(terms: Mapping[str, Tensor], ndim: int) -> Tensor:
    """The sum of the terms of so many dimensions: 2 in the data plate, 1 outside it."""
    return functools.reduce(operator.add, (term for term in terms.values() if term.ndim == ndim))


def each_particle(
    run: Callable[[Mapping[str, Tensor]], T],
    model: PyroFunction,
    guide: PyroFunction | None,
    args: Any,
    kwargs: Any,
    num_particles: int,
    latents: Mapping[str, Tensor],
    *,
    per_datum: bool = False,
) -> T | list[T]:
    """What ``run`` gives in a plate of particles on the left of the program's own; or a list, of one particle each."""
    with _drawn_per_datum(per_datum):
        if getattr(owner_of(model), "vectorize", True):
            dim = -1 - plate_nesting(model, guide, args, kwargs)
            with pyro.plate(PARTICLE_PLATE, num_particles, dim=dim):
                return run(latents)
        with same_minibatch():
            return [run({name: z[k] for name, z in latents.items()}) for k in range(num_particles)]


class same_minibatch(Messenger):  # type: ignore[misc]
    """A context in which a plate that draws its own minibatch draws the same one each time."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: Any) -> None:
        if site_is_subsample(msg) and msg["name"] in self.drawn:
            msg["value"], msg["done"] = self.drawn[msg["name"]], True

    def _pyro_post_sample(self, msg: Any) -> None:
        if site_is_subsample(msg):
            self.drawn[msg["name"]] = msg["value"]


class Given(Messenger):  # type: ignore[misc]
    """Sample statements of these names take these values."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.values and not msg["is_observed"]:
            msg["value"], msg["done"] = self.values[msg["name"]], True


def stack_terms(terms: dict[str, Tensor] | Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Terms of particles that came one by one, as if they had come at once."""
    if isinstance(terms, dict):
        return terms
    return {name: torch.stack([term[name] for term in terms]) for name in terms[0]}


def observed_and_latent(nodes: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Observed and latent sample sites among a model trace's nodes, in their order; deterministic ones are neither."""
    sites = {name: site for name, site in nodes.items() if site["type"] == "sample"}
    sites = {name: site for name, site in sites.items() if not site["infer"].get("_deterministic")}  # no density
    observed = {name: site for name, site in sites.items() if site["is_observed"]}
    return observed, {name: site for name, site in sites.items() if name not in observed}


def sites_of_guide(guide_trace: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Sites that a guide draws, in order: the model's latents, and ``infer={"is_auxiliary": True}`` ones."""
    sites = {n: s for n, s in guide_trace.nodes.items() if s["type"] == "sample" and not s["is_observed"]}
    auxiliary = {name: site for name, site in sites.items() if site["infer"].get("is_auxiliary")}
    return {name: site for name, site in sites.items() if name not in auxiliary}, auxiliary


def require_same_sites(latent: Mapping[str, Any], drawn: Mapping[str, Any]) -> None:
    """Refuse a guide that draws other sites than the model's latent ones.

    Raises:
        ValueError: it does; names them.
    """
    if missing := sorted(latent.keys() - drawn.keys()):
        raise ValueError(f"the guide draws no value for the model's latent sites {missing}; it draws {sorted(drawn)}")
    if unknown := sorted(drawn.keys() - latent.keys()):
        raise ValueError(
            f"the guide draws sites {unknown} that are not latent in the model, whose latent sites are {sorted(latent)}"
        )


def frame_of(site: Any, name: str) -> Any | None:
    """The vectorised plate of a name that a site is in; None if it is in none."""
    return next((frame for frame in site["cond_indep_stack"] if frame.name == name and frame.vectorized), None)


def data_frame_of(sites: Mapping[str, Any]) -> Any:
    """The data plate of a trace.

    Raises:
        ValueError: there is none; names the plates that there are.
    """
    frames = (frame_of(site, DATA_PLATE) for site in sites.values())
    frame = next((frame for frame in frames if frame is not None), None)
    if frame is None:
        plates = sorted({f.name for site in sites.values() for f in site["cond_indep_stack"]} - {PARTICLE_PLATE})
        raise ValueError(
            f'the model has no vectorized plate named "{DATA_PLATE}": put what is independent given the global latents '
            f'in `with pyro.plate("{DATA_PLATE}", len(x)):`; its plates are {plates}'
        )
    return frame


def minibatch_scale(model: PyroFunction, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None) -> float:
    """N / M as the model's data plate states it for this batch; torch's generators are left as they were."""
    return scale_of(data_frame_of(plain_traces(model, None, args, kwargs or {})[0]))


def scale_of(frame: Any) -> float:
    """N / M of a data plate."""
    return float((frame.full_size or frame.size) / frame.size)


def site_log_prob(site: Any) -> Tensor:
    """Log density of a site's value, summed to (K, M) or (K,)."""
    return sum_per_datum(site, site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"]))


def own_scale(site: Any) -> Any:
    """A site's scale without the minibatch's."""
    data = frame_of(site, DATA_PLATE)
    return site["scale"] / (1.0 if data is None else scale_of(data))


def sum_per_datum(site: Any, log_prob: Tensor) -> Tensor:
    """Mask a site's log density and sum it over all dimensions but those of the particles and the data."""
    sizes = {frame.dim: frame.size for frame in site["cond_indep_stack"] if frame.vectorized}
    kept = {frame.dim for name in (PARTICLE_PLATE, DATA_PLATE) if (frame := frame_of(site, name)) is not None}
    scale = own_scale(site)
    rank = max([log_prob.ndim, *(-dim for dim in sizes)])
    shape = broadcast_shape(log_prob.shape, tuple(sizes.get(dim, 1) for dim in range(-rank, 0)))
    if log_prob.shape != shape:
        log_prob = log_prob.expand(shape)
    log_prob = scale_and_mask(log_prob, scale, site["mask"])
    summed = [dim for dim in range(-rank, 0) if dim not in kept]
    return log_prob.sum(summed) if summed else log_prob


def is_delta(fn: Any) -> bool:
    """Whether a distribution is a point mass, behind whatever wraps it."""
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return isinstance(fn, Delta)


def plate_nesting(model: PyroFunction, guide: PyroFunction | None, args: Any, kwargs: Any) -> int:
    """How many dimensions a program's own plates take, found by one run and remembered with the two functions."""
    partner = model if guide is None else guide
    known = _nestings.setdefault(owner_of(model), WeakKeyDictionary()).setdefault(owner_of(partner), {})
    key = (getattr(model, "__qualname__", ""), getattr(partner, "__qualname__", ""))
    if key not in known:
        traces = plain_traces(model, guide, args, kwargs)
        dims = [frame.dim for trace in traces for site in trace.values() for frame in site["cond_indep_stack"]]
        known[key] = max((-dim for dim in dims if dim is not None), default=0)
    return known[key]


def plain_traces(
    model: PyroFunction, guide: PyroFunction | None, args: Any, kwargs: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Sample sites of one run of model and guide each, apart, leaving generators and modules as they were."""
    with forked_rng(), torch.no_grad(), poutine.block(), evaluation_mode(model):
        model_sites = _sample_sites(model, args, kwargs)
        return model_sites, {} if guide is None else _sample_sites(guide, args, kwargs)


def _sample_sites(function: PyroFunction, args: Any, kwargs: Any) -> dict[str, Any]:
    trace = prune_subsample_sites(poutine.trace(function).get_trace(*args, **kwargs))
    return {name: site for name, site in trace.nodes.items() if site["type"] == "sample"}


def support_of(fn: Any) -> Any | None:
    """A distribution's support; None where it has none to tell."""
    try:
        return fn.support
    except NotImplementedError:
        return None


def base_support_of(site: Any) -> Any | None:
    """The support of one element of a site's event."""
    support = support_of(site["fn"])
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support


def base_name_of(site: Any) -> str:
    """The name of a site's distribution, without what wraps it."""
    fn = site["fn"]
    while isinstance(fn, (Independent, MaskedDistribution)):  # not a transformed distribution, whose base is another
        fn = fn.base_dist
    return type(fn).__name__
