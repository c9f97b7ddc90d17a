"""The laws of a program over sequences: what a particle filter walks along, step by step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from pyro import poutine
from pyro.distributions import MaskedDistribution
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor
from torch.distributions import Independent

from pyro_vae.distributions import Emissions, MarkovSequence
from pyro_vae.programs.program import PyroFunction
from pyro_vae.programs.sites import (
    DATA_PLATE,
    base_name_of,
    data_frame_of,
    frame_of,
    observed_and_latent,
    own_scale,
    scale_of,
)
from pyro_vae.programs.weights import run_guide

__all__ = ["SequenceLaws", "sequence_laws"]

_OTHERS = 'SGVB and IWAE, and log_marginal(..., method="importance"), take programs of any latents'


@dataclass(frozen=True, eq=False)
class SequenceLaws:
    """What M sequences of observations are modelled by, and what proposes their latents.

    Attributes:
        proposal: q(z | x), of batch shape (M,) and event shape (T, J); the very prior where that proposes.
        prior: p(z), of the same shape.
        emissions: p(x | z) at some z; its ``law`` gives that of any step.
        x: what is observed, (M, T, D).
        scale: N / M, the number of data over the size of the minibatch.

    Raises:
        ValueError: the shapes do not fit, or one of prior and proposal has lengths and the other has none.
    """

    proposal: MarkovSequence
    prior: MarkovSequence
    emissions: Emissions
    x: Tensor
    scale: float = 1.0

    def __post_init__(self) -> None:
        (T, D), prior, proposal = self.emissions.event_shape, self.prior.event_shape, self.proposal.event_shape
        if proposal != prior or prior[0] != T:
            raise ValueError(
                f"expected a proposal, a prior and emissions of the same steps and latents, got event shapes "
                f"{tuple(proposal)}, {tuple(prior)} and {(T, D)}"
            )
        if self.x.ndim != 3 or self.x.shape[1:] != (T, D):
            raise ValueError(f"x: expected shape (M, {T}, {D}), got {tuple(self.x.shape)}")
        if (self.proposal.valid is None) != (self.prior.valid is None):
            without = "the guide" if self.proposal.valid is None else "the model"
            raise ValueError(f"expected lengths of the latents in model and guide alike, got none in {without}")


def sequence_laws(
    model: PyroFunction,
    guide: PyroFunction | None,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
) -> SequenceLaws:
    """The laws of z_1, ..., z_T and of x given z in a program, found by one run of guide and model.

    The program's latents must be one site in the data plate, a :class:`pyro_vae.distributions.MarkovSequence`, in guide
    and model; and its observation one site, the :class:`pyro_vae.distributions.Emissions` of that site's value.

    Args:
        model: Pyro function, the generative model.
        guide: Pyro function of the same arguments; None to propose by the prior.
        args: positional arguments of both: a minibatch of M sequences.
        kwargs: keyword arguments of both.

    Returns:
        The laws, with gradients to the parameters.

    Raises:
        ValueError: the program is another one; names its sites, and says what was expected.

    Example:
        >>> import torch
        >>> import pyro_vae as pv
        >>> dmm = pv.DeepMarkovModel(data_dim=3, latent_dim=2, transition_dim=4, emission_dim=4, rnn_dim=5)
        >>> laws = sequence_laws(dmm.model, dmm.guide, (torch.zeros(6, 7, 3),))
        >>> laws.proposal.step_law(torch.zeros(10, 6, 2), 3).batch_shape            # of z_4, for 10 particles
        torch.Size([10, 6])
    """
    kwargs = kwargs or {}
    drawn: Mapping[str, Any] = {}
    replayed = model
    if guide is not None:
        guide_trace, drawn, auxiliary = run_guide(guide, args, kwargs, {})
        drawn, replayed = {**drawn, **auxiliary}, poutine.replay(model, trace=guide_trace)
    trace = prune_subsample_sites(poutine.trace(replayed).get_trace(*args, **kwargs))
    observed, latent = observed_and_latent(trace.nodes)
    drawn = latent if guide is None else drawn
    roles = (("latent", latent, MarkovSequence), ("observed", observed, Emissions), ("guide", drawn, MarkovSequence))
    if not all(_is_one(sites, kind) for _, sites, kind in roles) or latent.keys() != drawn.keys():
        _refuse(latent, observed, drawn)
    prior, emitted, proposed = (next(iter(sites.values())) for _, sites, _ in roles)
    for site in (prior, emitted, proposed):
        _require_plain(site)
    emissions = _law_of(emitted)
    if emissions.z is not prior["value"]:
        raise ValueError(
            f"site '{emitted['name']}' is not the Emissions of site '{prior['name']}' itself, so that its law given "
            f"one step of '{prior['name']}' is not known: expected Emissions(law, {prior['name']}, ...), with whatever "
            "is done to the latents in its law"
        )
    x = emitted["value"].expand(emitted["fn"].shape())
    return SequenceLaws(_law_of(proposed), _law_of(prior), emissions, x, scale_of(data_frame_of(observed)))


def _law_of(site: Any) -> Any:
    """A site's law, behind what wraps it without changing it."""
    fn = site["fn"]
    while isinstance(fn, MaskedDistribution) or (isinstance(fn, Independent) and not fn.reinterpreted_batch_ndims):
        fn = fn.base_dist
    return fn


def _is_one(sites: Mapping[str, Any], kind: type) -> bool:
    return len(sites) == 1 and all(isinstance(_law_of(site), kind) for site in sites.values())


def _refuse(latent: Mapping[str, Any], observed: Mapping[str, Any], drawn: Mapping[str, Any]) -> NoReturn:
    def described(sites: Mapping[str, Any]) -> str:
        return ", ".join(f"'{name}' ({base_name_of(site)})" for name, site in sites.items()) or "none"

    raise ValueError(
        "a particle filter expects sequences: one latent site, a MarkovSequence in the data plate that the guide draws "
        "as a MarkovSequence too, and one observed site, its Emissions; got latent sites "
        f"{described(latent)}, drawn as {described(drawn)}, and observed sites {described(observed)}. {_OTHERS}"
    )


def _require_plain(site: Any) -> None:
    """Refuse plates, masks and scales that a filter would not know of.

    Raises:
        ValueError: there are some; names the site.
    """
    name, expected = site["name"], f"expected site '{site['name']}' in the data plate alone, its innermost dimension"
    frames = [frame for frame in site["cond_indep_stack"] if frame.vectorized]
    data = frame_of(site, DATA_PLATE)
    if data is None or len(frames) > 1 or site["fn"].batch_shape != (data.size,):
        plates, shape = [frame.name for frame in frames], tuple(site["fn"].batch_shape)
        raise ValueError(f"{expected}; got plates {plates} and batch shape {shape}. {_OTHERS}")
    masks = [site["mask"], getattr(site["fn"], "_mask", None)]
    if any(mask is not None and mask is not True for mask in masks):
        raise ValueError(f"site '{name}' is masked: expected the mask as Emissions(..., mask=) or lengths")
    scale = own_scale(site)
    if not (bool((scale == 1).all()) if isinstance(scale, Tensor) else scale == 1):
        raise ValueError(f"site '{name}' is scaled (poutine.scale), so that it is no law: expected it unscaled")
