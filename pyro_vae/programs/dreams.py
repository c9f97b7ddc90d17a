"""Joint draws from a model, with nothing observed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor

from pyro_vae.programs.program import PyroFunction, signature_of
from pyro_vae.programs.sites import DATA_PLATE, frame_of

__all__ = ["Dream", "dream"]


@dataclass(frozen=True, eq=False)
class Dream:
    """A joint draw (x, z) from a model, with nothing observed.

    Attributes:
        args: the model's positional arguments, observed ones replaced by what was drawn.
        kwargs: the keyword arguments, likewise.
        latents: draws of z by site, with a particle axis of one: (1, M, *event).
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    latents: dict[str, Tensor]


@torch.no_grad()
def dream(model: PyroFunction, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None) -> Dream:
    """Draw latents and data from the model: what wake-sleep's sleep phase shows the guide.

    Args:
        model: Pyro function. An argument that has the name of an observed site is data, and is replaced by what is
            drawn; any other is a covariate and is kept.
        args: positional arguments: a minibatch of M data, whose shapes are the dream's.
        kwargs: keyword arguments.

    Returns:
        The draw, without gradients.

    Raises:
        ValueError: an observed site has no argument of its name, or one of another shape; or a latent site lies outside
            the data plate, or has a law that depends on the data (an attribute ``follows_data`` that is true).
    """
    positions = [name for name, _ in zip(signature_of(model).parameters, args, strict=False)]
    given = dict(zip(positions, args, strict=False)) | dict(kwargs or {})
    dreaming = _Dreaming()
    trace = prune_subsample_sites(poutine.trace(dreaming(model)).get_trace(*args, **(kwargs or {})))
    latents = {}
    dreamt = {}
    for name, site in trace.nodes.items():
        if site["type"] != "sample" or site["infer"].get("_deterministic"):
            continue
        if name in dreaming.sites:
            if name not in given:
                raise ValueError(
                    f"the observed site '{name}' has no argument of its name to hand a dreamt value to the guide by: "
                    f"expected an argument '{name}', got {list(given)}"
                )
            dreamt[name] = site["value"].detach()
            if dreamt[name].shape != given[name].shape:
                raise ValueError(
                    f"a dream of site '{name}' has shape {tuple(dreamt[name].shape)} and cannot take the place of the "
                    f"argument '{name}' of shape {tuple(given[name].shape)}: observe the argument as it is"
                )
        elif frame_of(site, DATA_PLATE) is None:
            raise ValueError(f"a dream is of data and their latents: site '{name}' is not in the data plate")
        elif _follows_data(site["fn"]):
            raise ValueError(
                f"a dream draws latents before the data that they make, but the law of site '{name}' depends on the "
                "data (it is teacher-forced): use SGVB, IWAE or another objective that needs no dreams"
            )
        else:
            latents[name] = site["value"].detach()[None]
    # By position where they came by position, for the guide may order its arguments in another way.
    dreamt_args = tuple(dreamt.get(name, value) for name, value in zip(positions, args, strict=False))
    dreamt_kwargs = {name: dreamt.get(name, value) for name, value in (kwargs or {}).items()}
    return Dream(dreamt_args + tuple(args[len(positions) :]), dreamt_kwargs, latents)


def _follows_data(fn: Any) -> bool:
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return bool(getattr(fn, "follows_data", False))


class _Dreaming(Messenger):  # type: ignore[misc]
    """Observed sites are drawn, deterministic ones left alone (``poutine.uncondition`` redraws them, misshapen)."""

    def __init__(self) -> None:
        super().__init__()
        self.sites: set[str] = set()

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] and not msg["infer"].get("_deterministic"):
            self.sites.add(msg["name"])
            msg["is_observed"], msg["value"], msg["done"] = False, None, False
