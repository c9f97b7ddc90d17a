"""The dry run: a program on one batch, its guide compared with its model, site by site."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyro
import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_vae.numerics import forked_rng
from pyro_vae.programs.program import HasModelAndGuide, Program, as_program, bind_arguments, guide_of
from pyro_vae.programs.sites import (
    DATA_PLATE,
    base_name_of,
    base_support_of,
    data_frame_of,
    frame_of,
    plain_traces,
    require_same_sites,
)
from pyro_vae.programs.weights import draw_prior, log_weights

__all__ = ["ProgramCheck", "check_program"]


@dataclass(frozen=True)
class ProgramCheck:
    """What a dry run of a program on one batch found.

    Attributes:
        batch_size: M, the size of the data plate in this batch.
        full_size: N if the plate states it (``pyro.plate("data", N, subsample_size=M)``), else M.
        binary_arguments: names of the arguments that are observed by a site of binary support.
        count_arguments: names of those observed, without a mask, by a site whose support is the counts 0, 1, 2, ...
        level_arguments: of those observed, without a mask, by a site on levels k / L, k = 0, ..., L, the number L.
        global_sites: names of the sites outside the data plate, latent or observed.
        global_latents: those of them that are latent.
    """

    batch_size: int
    full_size: int
    binary_arguments: frozenset[str]
    count_arguments: frozenset[str] = frozenset()
    level_arguments: Mapping[str, int] = field(default_factory=dict)
    global_sites: tuple[str, ...] = ()
    global_latents: tuple[str, ...] = ()

    def data_of(self, batch_size: int) -> int:
        """How many data the loss of a batch stands for: N where the plate scales to N, else the batch's own."""
        return self.full_size if self.full_size != self.batch_size else batch_size


def check_program(
    program: HasModelAndGuide, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None
) -> ProgramCheck:
    """Run a program once on a batch, under full validation, and compare its guide with its model, site by site.

    Torch's generators are left as they were. Parameters that do not exist yet are created.

    Args:
        program: the program.
        args: positional arguments: a minibatch.
        kwargs: keyword arguments.

    Returns:
        What was found about the data plate and the arguments.

    Raises:
        ValueError: the guide misses a latent site or draws another; a site's plates, batch or event shape differ
            between model and guide; a dimension belongs to no plate; there is no data plate; an observation lies
            outside its distribution's support; the program cannot broadcast over particles. The message names the
            site and the shapes.
    """
    program, kwargs = as_program(program), kwargs or {}
    arguments = bind_arguments(program, args, kwargs)
    with pyro.validation_enabled(True), program.evaluation_mode():
        model_sites, guide_trace = _first_run(program, arguments, args, kwargs)
        observed = {name: site for name, site in model_sites.items() if site["is_observed"]}
        latent = {name: site for name, site in model_sites.items() if name not in observed}
        drawn = {n: s for n, s in guide_trace.items() if not s["infer"].get("is_auxiliary")}
        enumerated = {name for name, site in latent.items() if site["infer"].get("enumerate") and name not in drawn}
        latent = {name: site for name, site in latent.items() if name not in enumerated}  # TraceEnum_ELBO sums them out
        for site in (*model_sites.values(), *drawn.values()):
            _require_plates(site)
        if program.has_guide:
            require_same_sites(latent, drawn)
            for name in latent:
                _require_same_shape(name, latent[name], drawn[name])
        frame = data_frame_of(model_sites)
        for name, site in observed.items():
            _require_support(name, site)
        if not enumerated:
            _require_broadcast(program, args, kwargs)
    counts = {name: site for name, site in observed.items() if _is_count(site) and site["mask"] is None}
    levels = {name: site for name, site in observed.items() if _highest(site) and site["mask"] is None}
    shared = tuple(name for name, site in model_sites.items() if _is_global(site))
    return ProgramCheck(
        batch_size=frame.size,
        full_size=frame.full_size or frame.size,
        binary_arguments=_arguments_of({n: s for n, s in observed.items() if _is_binary(s)}, arguments),
        count_arguments=_arguments_of(counts, arguments),
        level_arguments={a: _highest(s) for n, s in levels.items() for a in _arguments_of({n: s}, arguments)},
        global_sites=shared,
        global_latents=tuple(n for n in shared if n not in observed),
    )


def _is_global(site: Any) -> bool:
    return frame_of(site, DATA_PLATE) is None and not site["infer"].get("_deterministic")


def _first_run(program: Program, arguments: Mapping[str, Any], args: Any, kwargs: Any) -> tuple[Any, Any]:
    try:
        return plain_traces(program.model, guide_of(program), args, kwargs)
    except ValueError as error:
        if "subsample_size" not in str(error):
            raise
        raise ValueError(
            "a plate states fewer data than the batch holds: expected no more than the data set has, or, for data of "
            f'another set, pyro.plate("data", N, subsample=torch.arange(len(x))); Pyro says: {_first_line(error)}'
        ) from error
    except (RuntimeError, IndexError) as error:
        given = {name: (tuple(x.shape), x.dtype) for name, x in arguments.items() if isinstance(x, Tensor)}
        raise ValueError(
            f"the program fails on a batch {given}: {_first_line(error)}. (Program(model, guide, data_shape=(784,)) "
            "reshapes the first argument's data; observed batch dimensions that are one event need .to_event())"
        ) from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _require_plates(site: Any) -> None:
    """Every batch dimension of a site must be some plate's."""
    plates = {frame.dim: frame.size for frame in site["cond_indep_stack"] if frame.vectorized}
    shape = tuple(site["fn"].batch_shape)
    stray = [dim for dim in range(-len(shape), 0) if shape[dim] > 1 and dim not in plates]
    if stray:
        raise ValueError(
            f"site '{site['name']}' has batch shape {shape}, of which dimensions {stray} are no plate's: declare them "
            f"part of one event with .to_event({len(stray)}), or put the site in a plate"
        )


def _describe(site: Any) -> str:
    fn, plates = site["fn"], [frame.name for frame in site["cond_indep_stack"]]
    return f"batch {tuple(fn.batch_shape)}, event {tuple(fn.event_shape)}, plates {plates}"


def _require_same_shape(name: str, model_site: Any, guide_site: Any) -> None:
    def key(site: Any) -> Any:
        frames = {(frame.name, frame.dim, frame.size) for frame in site["cond_indep_stack"]}
        return site["fn"].batch_shape, site["fn"].event_shape, frames

    if key(model_site) != key(guide_site):
        raise ValueError(
            f"site '{name}' has one shape in the model and another in the guide: "
            f"{_describe(model_site)} against {_describe(guide_site)}"
        )


def _is_binary(site: Any) -> bool:
    return base_support_of(site) is constraints.boolean


def _is_count(site: Any) -> bool:
    support = base_support_of(site)
    return isinstance(support, type(constraints.nonnegative_integer)) and support.lower_bound == 0


def _highest(site: Any) -> int:
    """L of a site on levels k / L; 0 of others."""
    return getattr(base_support_of(site), "highest", 0)


def _require_support(name: str, site: Any) -> None:
    """Observed values must lie in the support; those of a binary site in [0, 1], for grey levels can be drawn."""
    support = constraints.unit_interval if _is_binary(site) else base_support_of(site)
    value, shape = site["value"], site["fn"].shape()
    if value.shape[max(0, value.ndim - len(shape)) :] != shape[max(0, len(shape) - value.ndim) :]:
        raise ValueError(f"site '{name}' observes values of shape {tuple(value.shape)}, expected {tuple(shape)}")
    if support is None or site["mask"] is not None:
        return
    within = support.check(value)
    if not bool(within.all()):
        expected = "values in [0, 1]" if _is_binary(site) else str(support)
        first = f", {value[~within][0].item():.4g} among them" if within.shape == value.shape else ""
        raise ValueError(
            f"site '{name}' observes values outside the support of its {base_name_of(site)}: expected {expected}, "
            f"got values from {value.min().item():.4g} to {value.max().item():.4g}{first}"
        )


def _require_broadcast(program: Program, args: Any, kwargs: Any) -> None:
    try:
        with forked_rng(), torch.no_grad(), pyro.validation_enabled(False):
            if program.has_guide:
                log_weights(program.model, program.guide, args, kwargs, num_particles=2)
            else:
                draw_prior(program.model, None, args, kwargs, 2)
    except (RuntimeError, ValueError, IndexError) as error:
        raise ValueError(
            "the program runs, but not with a plate of particles on the left of its own: write code that broadcasts "
            "over leading dimensions (z[..., 0], not z[:, 0]), or use Program(model, guide, vectorize=False). "
            f"The error was: {_first_line(error)}"
        ) from error


def _arguments_of(sites: Mapping[str, Any], arguments: Mapping[str, Any]) -> frozenset[str]:
    found = (_argument_of(name, site, arguments) for name, site in sites.items())
    return frozenset(name for name in found if name is not None)


def _argument_of(name: str, site: Any, arguments: Mapping[str, Any]) -> str | None:
    """The argument a site observes: the one of its name, else the one that is the very tensor."""
    if name in arguments:
        return name
    return next((argument for argument, value in arguments.items() if value is site["value"]), None)
