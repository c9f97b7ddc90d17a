"""Log weights: every log density of draws from a guide, or at given latents, site by site."""

from __future__ import annotations

import contextlib
import functools
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor
from torch.distributions import kl_divergence

from pyro_vae.numerics import forked_rng
from pyro_vae.programs.program import Program, PyroFunction
from pyro_vae.programs.sites import (
    DATA_PLATE,
    Given,
    base_name_of,
    data_frame_of,
    each_particle,
    frame_of,
    is_delta,
    observed_and_latent,
    own_scale,
    require_same_sites,
    scale_of,
    site_log_prob,
    sites_of_guide,
    stack_terms,
    sum_of,
    sum_per_datum,
)

__all__ = [
    "LogWeights",
    "draw_guide",
    "draw_prior",
    "guide_parameters",
    "known_when_drawn",
    "log_guide",
    "log_weights",
    "model_parameters",
    "run_guide",
]


@dataclass(frozen=True, eq=False)
class LogWeights:
    """K draws from the guide for each of M data, and every log density of them, site by site.

    A site inside the data plate has terms of shape (K, M), one outside it (a global latent) of shape (K,); all in nats,
    summed over the event and over every other plate.

    Attributes:
        latents: guide draws by site, auxiliary ones too, (K, M, *event) or (K, *event).
        log_likelihood: log p(x | z) of each observed site.
        log_prior: log p(z) of each latent site, given its parents.
        log_guide: log q(z | x) of each latent site, and of the guide's auxiliary ones: an AutoGuide draws an auxiliary
            variable and maps it to the latent by a Delta, whose density is the map's log Jacobian only.
        analytic_kl: KL(q(z | x) || p(z)) of the sites where it was taken in closed form, absent from the two above.
        scale: N / M, the number of data over the size of the minibatch.
        entangled: sites in the data plate whose guide density is part of an auxiliary site's outside it, as an
            AutoGuide of all latents draws them: their log weights are the data set's, and not a datum's.
    """

    latents: dict[str, Tensor]
    log_likelihood: dict[str, Tensor]
    log_prior: dict[str, Tensor]
    log_guide: dict[str, Tensor]
    analytic_kl: dict[str, Tensor] = field(default_factory=dict)
    scale: float = 1.0
    entangled: tuple[str, ...] = ()

    @property
    def kl(self) -> dict[str, Tensor]:
        """Per latent site, log q - log p at the draws (its KL divergence in expectation) or the analytic KL."""
        sampled = {name: log_q - self.log_prior.get(name, 0.0) for name, log_q in self.log_guide.items()}
        return sampled | self.analytic_kl

    @property
    def log_w(self) -> Tensor:
        """Log p(x, z) - log q(z | x) of the sites in the data plate, shape (K, M)."""
        return self._sum_of_terms(ndim=2)

    @property
    def log_joint(self) -> Tensor:
        """Log p(x, z) of the sites in the data plate, shape (K, M)."""
        return sum_of(self.log_likelihood | self.log_prior, ndim=2)

    @property
    def log_q(self) -> Tensor:
        """Log q(z | x) of the sites in the data plate, shape (K, M)."""
        return sum_of(self.log_guide, ndim=2)

    @property
    def log_w_global(self) -> Tensor | None:
        """Log p - log q of the sites outside the data plate, shape (K,); None if there is no such site."""
        return self._sum_of_terms(ndim=1) if self.global_sites else None

    @property
    def global_sites(self) -> list[str]:
        """Sites outside the data plate, latent or observed."""
        terms = self.log_likelihood | self.log_prior | self.log_guide | self.analytic_kl
        return sorted(name for name, term in terms.items() if term.ndim == 1)

    def _sum_of_terms(self, ndim: int) -> Tensor:
        if self.analytic_kl:
            raise ValueError(f"log weights need sampled terms, but {sorted(self.analytic_kl)} hold an analytic KL")
        terms = [*self.log_likelihood.values(), *self.log_prior.values(), *(-q for q in self.log_guide.values())]
        return functools.reduce(operator.add, (term for term in terms if term.ndim == ndim))


def log_weights(
    model: PyroFunction,
    guide: PyroFunction,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    *,
    num_particles: int = 1,
    analytic_kl: bool = False,
    reparameterized: bool = False,
    fixed: bool = False,
    latents: Mapping[str, Tensor] | None = None,
    per_datum: bool = False,
) -> LogWeights:
    """Draw K particles per datum from the guide and give every log density of them.

    Args:
        model: Pyro function, the generative model.
        guide: Pyro function of the same arguments.
        args: positional arguments of both: a minibatch of M data.
        kwargs: keyword arguments of both.
        num_particles: K, at least 1.
        analytic_kl: take KL(q || p) in closed form at the sites that admit it. A site admits it if torch has the pair
            registered and everything the model drew before it the guide drew before it too, for then both
            distributions are fixed when the site is drawn. A bottom-up guide of a two-layer model does not admit it
            at the lower layer.
        reparameterized: insist that gradients flow through every draw.
        fixed: hold the draws fixed: gradients are those of the densities at them, and none flows through a draw.
        latents: take these values, (K, M, *event) by site, instead of drawing; gradients flow to them.
        per_datum: whether global latents may be drawn anew for each datum where the program does so
            (``pyro_vae.bayesian(..., local_reparameterization=True)``), as sums over data of log densities allow. False
            draws them once for all data, as weights need it.

    Returns:
        The draws and their log densities, with gradients.

    Raises:
        ValueError: the program has no data plate, the guide's sites are not the model's latent sites, or a draw has no
            reparameterised sample where one is asked for.
    """
    kwargs = kwargs or {}
    if not isinstance(args, (tuple, list)):
        raise ValueError(f"args: expected a tuple of arguments such as (x,), got {type(args).__name__}")
    run = functools.partial(_run, model, guide, args, kwargs, analytic_kl, reparameterized, fixed)
    return _stack(each_particle(run, model, guide, args, kwargs, num_particles, latents or {}, per_datum=per_datum))


def log_guide(
    model: PyroFunction,
    guide: PyroFunction,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None,
    latents: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Log q(z | x) at given latents, without the cost of running the model.

    Args:
        model: Pyro function, whose plates tell where the particles' goes; it is not run.
        guide: Pyro function of the same arguments.
        args: positional arguments of both: a minibatch of M data.
        kwargs: keyword arguments of both.
        latents: values (K, M, *event) of every site that the guide draws.

    Returns:
        Log densities by site, (K, M), in nats, with gradients to the guide's parameters and the latents.

    Raises:
        ValueError: the guide draws auxiliary sites, so that its density at given latents is not known.
    """
    kwargs = kwargs or {}

    def run(given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        _, drawn, _ = run_guide(guide, args, kwargs, given)
        return {name: site_log_prob(site) for name, site in drawn.items()}

    count = len(next(iter(latents.values())))
    return stack_terms(each_particle(run, model, guide, args, kwargs, count, latents))


def model_parameters(
    program: Program, parameters: Mapping[str, Tensor], args: Sequence[Any], kwargs: Mapping[str, Any] | None = None
) -> set[str]:
    """Names of the parameters that log p(x, z) depends on: theta, with what model and guide share.

    Args:
        program: with a guide.
        parameters: leaf tensors by name.
        args: positional arguments: a minibatch.
        kwargs: keyword arguments.
    """
    with forked_rng(), torch.enable_grad(), program.evaluation_mode():
        weights = log_weights(program.model, program.guide, args, kwargs, fixed=True)
        density = torch.stack([term.sum() for term in (weights.log_likelihood | weights.log_prior).values()]).sum()
        if not density.requires_grad:
            return set()
        gradients = torch.autograd.grad(density, list(parameters.values()), allow_unused=True)
    return {name for name, gradient in zip(parameters, gradients, strict=True) if gradient is not None}


def guide_parameters(
    program: Program, parameters: Mapping[str, Tensor], args: Sequence[Any], kwargs: Mapping[str, Any] | None = None
) -> dict[str, Tensor]:
    """The parameters that are the guide's alone: those that log p(x, z) does not depend on.

    Args:
        program: with a guide.
        parameters: leaf tensors by name.
        args: positional arguments: a minibatch.
        kwargs: keyword arguments.

    Raises:
        ValueError: there are none.
    """
    theta = model_parameters(program, parameters, args, kwargs)
    phi = {name: tensor for name, tensor in parameters.items() if name not in theta}
    if not phi:
        raise ValueError('trained="guide": expected parameters that are the guide\'s alone, got none')
    return phi


class _Fixed(Messenger):  # type: ignore[misc]
    """What is drawn inside has no gradient."""

    def _pyro_post_sample(self, msg: Any) -> None:
        if not msg["is_observed"] and isinstance(msg["value"], Tensor):
            msg["value"] = msg["value"].detach()


def _run(
    model: PyroFunction,
    guide: PyroFunction,
    args: Any,
    kwargs: Any,
    analytic_kl: bool,
    reparameterized: bool,
    fixed: bool,
    latents: Mapping[str, Tensor],
) -> LogWeights:
    with _Fixed() if fixed else contextlib.nullcontext():
        guide_trace, drawn, auxiliary = run_guide(guide, args, kwargs, latents)
    # Replayed with the subsamples of its plates: a plate that draws its own minibatch draws the guide's.
    model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args, **kwargs)
    observed, latent = observed_and_latent(prune_subsample_sites(model_trace).nodes)
    require_same_sites(latent, drawn)
    if reparameterized:
        _require_reparameterized(drawn | auxiliary)
    data = data_frame_of({**observed, **latent})
    analytic = _analytic_kl(latent, drawn) if analytic_kl else {}
    return LogWeights(
        latents={name: site["value"] for name, site in (drawn | auxiliary).items()},
        log_likelihood={name: site_log_prob(site) for name, site in observed.items()},
        log_prior={name: site_log_prob(site) for name, site in latent.items() if name not in analytic},
        log_guide={name: site_log_prob(site) for name, site in (drawn | auxiliary).items() if name not in analytic},
        analytic_kl=analytic,
        scale=scale_of(data),
        entangled=_entangled(drawn, auxiliary),
    )


def _entangled(drawn: Mapping[str, Any], auxiliary: Mapping[str, Any]) -> tuple[str, ...]:
    if all(frame_of(site, DATA_PLATE) is not None for site in auxiliary.values()):
        return ()
    return tuple(n for n, s in drawn.items() if frame_of(s, DATA_PLATE) is not None and is_delta(s["fn"]))


def run_guide(
    guide: PyroFunction, args: Any, kwargs: Any, latents: Mapping[str, Tensor]
) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """The guide's trace, the sites of the model's latents in it, and auxiliary ones."""
    trace = poutine.trace(Given(latents)(guide)).get_trace(*args, **kwargs)
    drawn, auxiliary = sites_of_guide(prune_subsample_sites(trace))
    if latents and (free := sorted(auxiliary.keys() - latents.keys())):
        raise ValueError(
            f"the guide draws auxiliary sites {free}, as an automatic guide does, so its density at given values of "
            f"{sorted(drawn)} is not known: write a guide that draws those sites themselves"
        )
    return trace, drawn, auxiliary


def _stack(draws: LogWeights | Sequence[LogWeights]) -> LogWeights:
    if isinstance(draws, LogWeights):
        return draws
    names = ("latents", "log_likelihood", "log_prior", "log_guide", "analytic_kl")
    stacked = {name: stack_terms([getattr(draw, name) for draw in draws]) for name in names}
    return LogWeights(**stacked, scale=draws[0].scale, entangled=draws[0].entangled)


@torch.no_grad()
def draw_prior(
    model: PyroFunction,
    guide: PyroFunction | None,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    num_particles: int = 1,
    given: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Draw K particles per datum from the model's prior: z ~ p(z), whatever is observed.

    Args:
        model: Pyro function.
        guide: Pyro function of the same arguments, whose plates count too; it is not run. None for a program without.
        args: positional arguments: a minibatch of M data.
        kwargs: keyword arguments.
        num_particles: K, at least 1.
        given: values by site that are taken, and not drawn: those of the others are drawn given them.

    Returns:
        Latents by site, (K, M, *event), without gradients.

    Raises:
        ValueError: ``poutine.scale`` acts on a latent site (names it): its density is not that of its draws.
    """
    kwargs = kwargs or {}

    def run(given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        trace = prune_subsample_sites(poutine.trace(Given(given)(model)).get_trace(*args, **kwargs))
        _, latent = observed_and_latent(trace.nodes)
        for name, site in latent.items():
            scale = own_scale(site)
            if not (bool((scale == 1).all()) if isinstance(scale, Tensor) else scale == 1):
                raise ValueError(
                    f"site '{name}' has its prior scaled (poutine.scale), so that draws of it do not have the density "
                    'it is given: what begins at the prior cannot be used here; log_marginal(..., method="importance") '
                    "begins at the guide"
                )
        return {name: site["value"] for name, site in latent.items()}

    return stack_terms(each_particle(run, model, guide, args, kwargs, num_particles, given or {}))


@torch.no_grad()
def draw_guide(
    model: PyroFunction,
    guide: PyroFunction,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    num_particles: int = 1,
) -> dict[str, Tensor]:
    """Draw K particles per datum from the guide, z ~ q(z | x), without the cost of running the model.

    Args:
        model: Pyro function, whose plates tell where the particles' goes; it is not run.
        guide: Pyro function of the same arguments.
        args: positional arguments of both: a minibatch of M data.
        kwargs: keyword arguments of both.
        num_particles: K, at least 1.

    Returns:
        Latents by site, (K, M, *event), without gradients; auxiliary sites are left out.
    """
    kwargs = kwargs or {}

    def run(_: Mapping[str, Tensor]) -> dict[str, Tensor]:
        _, drawn, _ = run_guide(guide, args, kwargs, {})
        return {name: site["value"] for name, site in drawn.items()}

    return stack_terms(each_particle(run, model, guide, args, kwargs, num_particles, {}))


def _require_reparameterized(drawn: Mapping[str, Any]) -> None:
    for name, site in drawn.items():
        if not site["fn"].has_rsample:
            raise ValueError(
                f"site '{name}' is drawn from {base_name_of(site)}, which has no reparameterised sample, so the "
                "draw has no gradient: use VIMCO, ReweightedWakeSleep or WakeSleep, or a continuous relaxation"
            )


def _analytic_kl(latent: Mapping[str, Any], drawn: Mapping[str, Any]) -> dict[str, Tensor]:
    """KL(q || p) at each site whose two distributions are fixed once its predecessors are drawn, and registered."""
    found = {}
    for name in known_when_drawn(latent, drawn):
        with contextlib.suppress(NotImplementedError):
            found[name] = sum_per_datum(latent[name], kl_divergence(drawn[name]["fn"], latent[name]["fn"]))
    return found


def known_when_drawn(latent: Mapping[str, Any], drawn: Mapping[str, Any]) -> list[str]:
    """Sites whose two distributions are fixed once their predecessors are drawn, in the model's order."""
    model_order, guide_order = list(latent), list(drawn)
    # A Delta has no KL; the one that Pyro registers for it leaves its log_density out.
    return [
        name
        for i, name in enumerate(model_order)
        if set(model_order[:i]) <= set(guide_order[: guide_order.index(name)]) and not is_delta(drawn[name]["fn"])
    ]
