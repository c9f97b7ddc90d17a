"""Diagnostics of amortised inference: whether the guide is good, what of it is used, and what a gradient is worth.

For each datum a guide loses log p(x) - L(x; q) of the evidence, and that splits into an approximation gap and an
amortisation gap (Cremer, Li & Duvenaud, arXiv:1801.03558, Table 1), with q* the best diagonal Gaussian for this datum:

    log p(x) - L(x; q)  =  [log p(x) - L(x; q*)]  +  [L(x; q*) - L(x; q)]

What a latent dimension carries is told by the spread of its posterior mean over data (:func:`active_units`) and by its
share of the KL (:func:`kl_per_dimension`); whether q is the posterior at all, by data whose latents are known, since
the model drew them (:func:`simulation_based_calibration`); how much of a gradient is noise, by :func:`gradient_snr`.

And whether importance weights can be trusted: the Pareto shape k of the largest (Vehtari, Simpson, Gelman, Yao &
Gabry, arXiv:1507.02646): an estimate is reliable below 0.7, has infinite variance from 0.5 on, and no mean from 1 on.
Computed by ArviZ.

Every function leaves the program's parameters, the modules' modes and the global generators as they were.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro
import torch
from scipy.stats import chisquare
from torch import Tensor
from torch.distributions import Normal

from pyro_vae.arguments import positive_number, whole_number
from pyro_vae.data import TensorData
from pyro_vae.evaluation.bounds import frozen
from pyro_vae.inputs import Inputs, open_inputs
from pyro_vae.numerics import forked_rng, mean_and_standard_error, summarize_weights
from pyro_vae.programs import (
    HasModelAndGuide,
    LatentSite,
    LatentSpace,
    Program,
    as_program,
    draw_guide,
    dream,
    kl_by_dimension,
    latent_sites,
)

__all__ = [
    "MIN_PARTICLES",
    "ActiveUnits",
    "Calibration",
    "InferenceGap",
    "active_units",
    "amortization_gap",
    "gradient_snr",
    "kl_per_dimension",
    "pareto_k",
    "simulation_based_calibration",
]

MIN_PARTICLES = 50

_INITIAL_DRAWS = 100  # of the guide, whose mean and spread start the optimised q
_CHUNK = 100  # particles at a time
_LEAST_SCALE = 1e-3  # of the optimised q at the start, where the guide has none

Args = tuple[Any, ...]
Kwargs = dict[str, Any]


# What the latents carry -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class ActiveUnits:
    """How far each latent dimension's posterior mean moves from datum to datum.

    Attributes:
        variance: by site, shape (*event): Var_x(E_q[z | x]), in the unit of z squared. Unbiased, so it may come out
            slightly below zero at a dimension that ignores the data.
        threshold: above which a dimension is called active.
    """

    variance: dict[str, Tensor]
    threshold: float

    @property
    def active(self) -> dict[str, Tensor]:
        """Which dimensions are active: by site, boolean, shape (*event)."""
        return {name: variance > self.threshold for name, variance in self.variance.items()}

    @property
    def count(self) -> int:
        """The number of active dimensions, of all sites together."""
        return sum(int(active.sum()) for active in self.active.values())

    def __repr__(self) -> str:
        sites = (f"{name} {int(active.sum())} of {active.numel()}" for name, active in self.active.items())
        return f"ActiveUnits(Var > {self.threshold:g}: {', '.join(sites)})"


def active_units(
    program: HasModelAndGuide,
    x: Any,
    *,
    threshold: float = 0.01,
    num_particles: int = 64,
    batch_size: int = 100,
    binarize: str | None = None,
    seed: int = 0,
) -> ActiveUnits:
    """Find the latent dimensions that the guide uses: those whose posterior mean depends on the datum.

    A_u = Var_x(E_{q(u | x)}[u]) > 0.01. A mean of K draws has the variance A_u + E_x[Var_q(u | x)] / K over data; the
    second term is estimated from the spread of the draws and subtracted (one-way analysis of variance), so the estimate
    of A_u is unbiased for any K.

    Args:
        program: an object with ``.model`` and ``.guide``; of its latents, those in the data plate are looked at.
        x: data as for :func:`pyro_vae.log_marginal`, at least two of them; of a data set the test split is taken.
        threshold: of A_u, in the unit of u squared.
        num_particles: K per datum, at least 2.
        batch_size: data at a time.
        binarize: "dynamic" or "none"; None as the data set says, else "dynamic".
        seed: of the noise and of the binarisation.

    Returns:
        Variances and masks by site, of the event's shape (with those of further plates on the left).

    Raises:
        ValueError: an argument is out of range, the data do not fit, or the program has global latents alone.

    Source: Burda, Grosse & Salakhutdinov, arXiv:1509.00519, Sec. 5.2.

    Example:
        >>> import pyro_vae as pv
        >>> model = pv.LinearGaussian(torch.tensor([[1.0, 0.0], [1.0, 0.0]]))     # the second latent changes nothing
        >>> active_units(model, torch.randn(100, 2, generator=torch.Generator().manual_seed(0)))
        ActiveUnits(Var > 0.01: z 1 of 2)
    """
    num_particles = whole_number("num_particles", num_particles, least=2)
    opened = _open(program, x, batch_size, binarize, seed, shared=True)
    if len(opened.data) < 2:
        raise ValueError(f"a variance over data: expected at least 2 data, got {len(opened.data)}")
    means: dict[str, list[Tensor]] = {}
    noise: dict[str, list[Tensor]] = {}
    with frozen(opened.program, seed):
        for args, kwargs in opened.batches():
            for name, z in opened.draw_guide(args, kwargs, num_particles).items():
                means.setdefault(name, []).append(z.double().mean(0))
                noise.setdefault(name, []).append(z.double().var(0) / num_particles)
    variance = {name: torch.cat(parts).var(0) - torch.cat(noise[name]).mean(0) for name, parts in means.items()}
    return ActiveUnits(variance, threshold)


def kl_per_dimension(
    program: HasModelAndGuide,
    x: Any,
    *,
    num_particles: int = 100,
    batch_size: int = 100,
    binarize: str | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Split each latent site's KL among its dimensions.

    1/N sum_n E_q[ log q(z_j | x_n) - log p(z_j) ]. It is taken in closed form where torch has one and both
    distributions are fixed once the sites before are drawn (as in estimator B), else by Monte Carlo over K draws,
    unbiased. Given their parents both q and p have to factorise over the event for its dimensions to have a share each;
    those over which one of them does not, such as a MultivariateNormal's, are given as one number. So the sum of all
    entries is always the KL of all a datum's latents together, Kingma & Welling's regulariser.

    Args:
        program: an object with ``.model`` and ``.guide``; of its latents, those in the data plate are looked at.
        x: data as for :func:`pyro_vae.log_marginal`; of a data set the test split is taken.
        num_particles: K per datum, at least 1; no matter where every term has a closed form that holds no draw.
        batch_size: data at a time.
        binarize: "dynamic" or "none"; None as the data set says, else "dynamic".
        seed: of the noise and of the binarisation.

    Returns:
        By site a tensor (*event), or () where the site does not factorise (with the dimensions of further plates on
        the left), in nats per datum. A single term of a hierarchy that the guide draws in another order than the model
        may be negative.

    Raises:
        ValueError: an argument is out of range, the data do not fit, the program has global latents alone, or the
            guide draws auxiliary sites.

    Source: Kingma & Welling, arXiv:1312.6114, eq. (7) and Appendix B.

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.VAE(data_shape=(4,), latent_dim=3, hidden_dims=(5,))
        >>> kl_per_dimension(vae, torch.ones(10, 4))["z"].shape
        torch.Size([3])
    """
    num_particles = whole_number("num_particles", num_particles)
    opened = _open(program, x, batch_size, binarize, seed, shared=True)
    sums: dict[str, Tensor] = {}
    with frozen(opened.program, seed):
        for args, kwargs in opened.batches():
            model, guide = opened.program.model, opened.program.guide
            for name, kl in kl_by_dimension(model, guide, args, kwargs, num_particles=num_particles).items():
                sums[name] = sums.get(name, 0.0) + kl.double().mean(0).sum(0)
    return {name: total / len(opened.data) for name, total in sums.items()}


# What the guide loses -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class InferenceGap:
    """What is lost between a guide's bound and the evidence, and where; each a tensor (N,), in nats.

    Attributes:
        bound: L(x; q), the evidence lower bound of the program's own guide.
        optimized_bound: L(x; q*), that of a diagonal Gaussian fitted to this datum alone.
        log_marginal: log p(x) by importance sampling, low on average.
    """

    bound: Tensor
    optimized_bound: Tensor
    log_marginal: Tensor

    @property
    def amortization(self) -> Tensor:
        """L(x; q*) - L(x; q): what one network for all data costs; negative where the guide's family is richer."""
        return self.optimized_bound - self.bound

    @property
    def approximation(self) -> Tensor:
        """Log p(x) - L(x; q*) = KL(q* || p(z | x)): what the Gaussian family costs."""
        return self.log_marginal - self.optimized_bound

    @property
    def total(self) -> Tensor:
        """Log p(x) - L(x; q) = KL(q || p(z | x)): both together."""
        return self.log_marginal - self.bound

    def __repr__(self) -> str:
        names = ("amortization", "approximation", "total", "log_marginal")
        parts = (f"{name} {mean:.3f} ± {error:.2g}" for name in names for mean, error in [self._summary(name)])
        return f"InferenceGap({len(self.bound)} data, nats per datum: {', '.join(parts)})"

    def _summary(self, name: str) -> tuple[float, float]:
        return mean_and_standard_error(getattr(self, name))


def amortization_gap(
    program: HasModelAndGuide,
    x: Any,
    *,
    num_steps: int = 500,
    learning_rate: float = 0.05,
    num_particles: int = 10,
    log_marginal_particles: int = 5000,
    batch_size: int = 100,
    binarize: str | None = None,
    seed: int = 0,
) -> InferenceGap:
    """Split a guide's loss into the amortisation gap and the approximation gap, datum by datum.

    q*(u | x) = N(u; m, diag(s)^2) with m and s of its own for each datum, of all the datum's latents together, each
    mapped to the real line by torch's bijection of its support. It starts at mean and spread of the guide's draws and
    maximises L by Adam, its rate falling to zero along a cosine; theta stands still. The gradient is the path
    derivative only (Roeder et al., arXiv:1703.09194), which has no variance where q* is the posterior.

    Afterwards all three numbers come from the same K fresh draws of each of q and q*: the mean log weights of
    each, and log p(x) with the even mixture of the two as proposal,

        log 1/2K sum_i p(x, u_i) / [q(u_i | x) / 2 + q*(u_i | x) / 2],     u_1..u_K ~ q,  u_K+1..u_2K ~ q*

    (the balance heuristic of multiple importance sampling): unbiased for p(x), so low on average as log p(x), and no
    weight exceeds twice the one that either proposal alone would give.

    Args:
        program: an object with ``.model`` and ``.guide``, its latents continuous and all in the data plate.
        x: data as for :func:`pyro_vae.log_marginal`; of a data set the test split is taken. A hundred are often enough.
        num_steps: of Adam.
        learning_rate: of Adam at the start, in units of the unconstrained latents and of log s.
        num_particles: draws per datum and step.
        log_marginal_particles: K, draws per datum of each of the two when all is done.
        batch_size: data at a time.
        binarize: "dynamic" or "none"; None as the data set says, else "dynamic".
        seed: of the noise and of the binarisation.

    Returns:
        Bounds and evidence per datum, (N,), in nats.

    Raises:
        ValueError: an argument is out of range, the data do not fit, a latent is discrete or global (it is named), or
            the guide draws auxiliary sites.

    Source: Cremer, Li & Duvenaud, arXiv:1801.03558, Table 1.

    Example:
        >>> import pyro_vae as pv
        >>> model = pv.LinearGaussian(torch.ones(3, 1), guide_shift=0.5)     # a wrong mean of a posterior variance 1/4
        >>> gap = amortization_gap(model, torch.zeros(2, 3))
        >>> [f"{value.mean():.1f}" for value in (gap.amortization, gap.total)]   # 0.5^2 / (2 x 1/4)
        ['0.5', '0.5']
    """
    num_steps, num_particles = whole_number("num_steps", num_steps), whole_number("num_particles", num_particles)
    draws = whole_number("log_marginal_particles", log_marginal_particles)
    positive_number("learning_rate", learning_rate)
    opened = _open(program, x, batch_size, binarize, seed)
    if discrete := [name for name, site in opened.sites.items() if site.is_discrete]:
        raise ValueError(f"a Gaussian fitted to each datum: expected continuous latents, got discrete sites {discrete}")
    found = []
    with frozen(opened.program, seed):
        for args, kwargs in opened.batches():
            space = LatentSpace(opened.program.model, opened.program.guide, args, kwargs)
            space.require_unmasked("a Gaussian fitted to each datum")
            best = _fitted_gaussian(space, num_steps, learning_rate, num_particles)
            found.append(_bounds(space, best, draws))
    return InferenceGap(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def _fitted_gaussian(space: LatentSpace, num_steps: int, learning_rate: float, num_particles: int) -> Normal:
    """The diagonal Gaussian of each datum, of shape (M, J), that maximises its evidence lower bound."""
    start = space.draw_guide(_INITIAL_DRAWS)
    loc = start.mean(0).requires_grad_()
    log_scale = start.std(0).clamp(min=_LEAST_SCALE).log().requires_grad_()
    optimizer = torch.optim.Adam([loc, log_scale], lr=learning_rate)
    for step in range(num_steps):
        optimizer.param_groups[0]["lr"] = learning_rate * (1 + math.cos(math.pi * step / num_steps)) / 2
        with torch.enable_grad():
            u = loc + log_scale.exp() * torch.randn(num_particles, *loc.shape).to(loc)
            log_q = Normal(loc.detach(), log_scale.detach().exp()).log_prob(u).sum(-1)
            bound = (space.density(u).log_joint - log_q).mean(0).sum()
            loc.grad, log_scale.grad = torch.autograd.grad(-bound, [loc, log_scale])  # of nothing else: theta stays
        optimizer.step()
    return Normal(loc.detach(), log_scale.detach().exp())


def _bounds(space: LatentSpace, best: Normal, num_draws: int) -> tuple[Tensor, Tensor, Tensor]:
    """L(x; q), L(x; q*) and log p(x), each (M,), from K draws of each of q and q*."""
    chunks = [_log_densities(space, best, min(_CHUNK, num_draws - start)) for start in range(0, num_draws, _CHUNK)]
    bound, optimized = (torch.cat([part[:, i] - parts[i][:, i] for part, *parts in chunks]).mean(0) for i in (0, 1))
    log_w = (p - torch.logaddexp(q, q_best) + math.log(2) for p, q, q_best in chunks)
    return bound, optimized, summarize_weights(w.flatten(0, 1) for w in log_w).log_mean


def _log_densities(space: LatentSpace, best: Normal, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log p(x, u), log q and log q* at as many draws u of q (index 0) as of q* (index 1), each (K, 2, M)."""
    u = torch.cat([space.draw_guide(count), best.sample((count,))])
    density = space.density(u)
    terms = (density.log_joint, space.log_guide(density), best.log_prob(u).sum(-1))
    log_p, log_q, log_q_best = (term.double().unflatten(0, (2, count)).transpose(0, 1) for term in terms)
    return log_p, log_q, log_q_best


# What a gradient is worth ---------------------------------------------------------------------------------------------


def gradient_snr(
    program: HasModelAndGuide,
    x: Any,
    objective: Any,
    *,
    num_draws: int = 100,
    binarize: str | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Measure the signal-to-noise ratio of an objective's gradient on one minibatch: the same data, other noise.

    SNR = |mean g| / std g over draws of the gradient g, one number for each parameter's each element. Where the true
    ratio is far below 1 / sqrt(num_draws), the estimate is about that. Modules are in evaluation mode.

    To summarise a group of parameters, take the median over its elements:
    ``torch.cat([snr[name].flatten() for name in snr if name.startswith("encoder")]).nanmedian()``.

    Args:
        program: an object with ``.model`` and ``.guide``.
        x: the minibatch, as for :func:`pyro_vae.log_marginal`, all of it at once.
        objective: one of this package's, or any ELBO of Pyro's.
        num_draws: of the gradient, at least 2.
        binarize: "dynamic" or "none"; None as the data set says, else "dynamic".
        seed: of the noise and of the binarisation.

    Returns:
        By parameter name a tensor of the parameter's shape; NaN at elements whose gradient is always 0 (the weights
        of a dead pixel), infinite where it is always the same. Parameters that get no gradient, or always 0 in
        every element, are left out.

    Raises:
        ValueError: ``num_draws`` is out of range, or the data do not fit.

    Source: Rainforth et al., arXiv:1802.04537, Sec. 3.

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.VAE(data_shape=(4,), latent_dim=1, hidden_dims=(3,))
        >>> snr = gradient_snr(vae, torch.ones(5, 4), pv.IWAE(num_particles=2), num_draws=10)
        >>> snr.keys() == dict(vae.named_parameters()).keys()
        True
    """
    num_draws = whole_number("num_draws", num_draws, least=2)
    bridged = as_program(program)
    inputs = open_inputs(bridged, x, binarize=binarize, split="test")
    args, kwargs = inputs.call(inputs.tensors().drawn_once(seed).rows(slice(None)))
    moments: dict[str, _Moments] = {}
    objective = copy.deepcopy(objective)  # one that keeps chains would move them
    with bridged.evaluation_mode(), forked_rng(), pyro.validation_enabled(False):
        pyro.set_rng_seed(seed)
        for _ in range(num_draws):
            for name, gradient in _gradients(bridged, objective, args, kwargs).items():
                moments.setdefault(name, _Moments(torch.zeros_like(gradient))).add(gradient)
    return {name: found.ratio for name, found in moments.items() if found.ever}


def _gradients(program: Program, objective: Any, args: Args, kwargs: Kwargs) -> dict[str, Tensor]:
    """One draw of an objective's gradient, in double precision; the parameters' ``.grad`` is what it was."""
    parameters = program.named_parameters()
    kept = {name: tensor.grad for name, tensor in parameters.items()}
    try:
        for tensor in parameters.values():
            tensor.grad = None
        objective.loss_and_grads(program.model, program.guide, *args, **kwargs)
        drawn = {n: torch.zeros_like(t) if t.grad is None else t.grad for n, t in parameters.items()}
        return {name: gradient.double() for name, gradient in drawn.items()}
    finally:
        for name, tensor in parameters.items():
            tensor.grad = kept[name]


class _Moments:
    """Mean and sum of squared deviations, draw by draw (Welford 1962)."""

    def __init__(self, zero: Tensor) -> None:
        self.count, self.mean, self.squares = 0, zero, zero.clone()
        self.ever = False  # anything but zero

    def add(self, value: Tensor) -> None:
        self.count += 1
        difference = value - self.mean
        self.mean = self.mean + difference / self.count
        self.squares = self.squares + difference * (value - self.mean)
        self.ever = self.ever or bool(value.any())

    @property
    def ratio(self) -> Tensor:
        """|mean| / std."""
        return self.mean.abs() / (self.squares / (self.count - 1)).sqrt()


# Whether the guide is the posterior -----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Calibration:
    """Ranks of known latents among the guide's draws: uniform on 0, ..., num_draws if the guide is the posterior.

    Attributes:
        ranks: by site, whole numbers (n, *event), n simulations.
        num_draws: of the guide per simulation.
        bins: of :meth:`p_values`, if not said there.
    """

    ranks: dict[str, Tensor]
    num_draws: int
    bins: int

    def p_values(self, bins: int | None = None) -> dict[str, Tensor]:
        """The chi-squared test of uniform ranks, dimension by dimension.

        Args:
            bins: of equal width, a divisor of ``num_draws`` + 1; each should expect five simulations or more.

        Returns:
            By site p-values (*event). Of many dimensions some are small by chance: compare the least with 0.05 over
            their number.

        Raises:
            ValueError: ``bins`` does not divide ``num_draws`` + 1.
        """
        bins = _require_bins(self.bins if bins is None else bins, self.num_draws)
        width = (self.num_draws + 1) // bins
        return {name: _uniformity(ranks // width, bins) for name, ranks in self.ranks.items()}

    def __repr__(self) -> str:
        p_values = self.p_values()
        n = len(next(iter(self.ranks.values())))
        sites = (f"{name} {p.min():.2g} over {p.numel()} dimensions" for name, p in p_values.items())
        return f"Calibration({n} simulations, {self.num_draws} draws; least p-value: {', '.join(sites)})"


def simulation_based_calibration(
    program: HasModelAndGuide,
    x: Any,
    *,
    num_simulations: int = 1000,
    num_draws: int = 99,
    bins: int = 20,
    batch_size: int = 100,
    binarize: str | None = None,
    seed: int = 0,
) -> Calibration:
    """Test the guide against posteriors whose latents are known: those of data that the model itself draws.

    (z*, x*) ~ p(z, x),   z_1, ..., z_L ~ q(z | x*),   rank = #{l : z_l < z*}. If q(z | x) = p(z | x) the rank of each
    dimension is uniform on 0, ..., L. A q too wide piles ranks up in the middle, one too narrow at both ends, one that
    is too low at the right. Ties, of discrete latents, are broken at random. Ranks are of single dimensions: a wrong
    correlation of two does not show.

    Args:
        program: an object with ``.model`` and ``.guide``, its latents all in the data plate, and each observed site
            named like the argument that it observes.
        x: data as for :func:`pyro_vae.log_marginal`. Their values are replaced by dreams; they give shapes, and the
            covariates, again and again from the first where there are fewer than simulations.
        num_simulations: n.
        num_draws: L of the guide per simulation.
        bins: of the test, a divisor of L + 1.
        batch_size: simulations at a time.
        binarize: "dynamic" or "none"; None as the data set says, else "dynamic".
        seed: of the noise and of the binarisation.

    Returns:
        Ranks by site, (n, *event), and the test of their uniformity.

    Raises:
        ValueError: an argument is out of range, the data do not fit, the program has global latents, or it cannot dream
            (:func:`pyro_vae.programs.dream`).

    Source: Talts, Betancourt, Simpson, Vehtari & Gelman, arXiv:1804.06788, Algorithm 1 and Theorem 1.

    Example:
        >>> import pyro_vae as pv
        >>> model = pv.LinearGaussian(torch.ones(3, 1), guide_widening=2.0)
        >>> bool(simulation_based_calibration(model, torch.zeros(100, 3)).p_values()["z"] < 1e-6)
        True
    """
    num_simulations = whole_number("num_simulations", num_simulations)
    bins = _require_bins(bins, whole_number("num_draws", num_draws))
    opened = _open(program, x, batch_size, binarize, seed)
    ranks: dict[str, list[Tensor]] = {}
    with frozen(opened.program, seed):
        for args, kwargs in opened.repeated(num_simulations):
            for name, found in _ranks(opened, args, kwargs, num_draws).items():
                ranks.setdefault(name, []).append(found)
    return Calibration({name: torch.cat(parts) for name, parts in ranks.items()}, num_draws, bins)


def _ranks(opened: _Opened, args: Args, kwargs: Kwargs, num_draws: int) -> dict[str, Tensor]:
    """Ranks (M, *event) by site of a dream's latents."""
    dreamt = dream(opened.program.model, args, kwargs)
    draws = opened.draw_guide(dreamt.args, dreamt.kwargs, num_draws)
    truth = opened.by_datum({name: dreamt.latents[name] for name in draws})
    return {name: _rank(truth[name], z) for name, z in draws.items()}


def _rank(truth: Tensor, draws: Tensor) -> Tensor:
    below, ties = (draws < truth).sum(0), (draws == truth).sum(0)
    return below + (torch.rand(ties.shape, dtype=torch.float64).to(ties.device) * (ties + 1)).floor().long()


def _uniformity(binned: Tensor, bins: int) -> Tensor:
    columns = binned.reshape(len(binned), -1).long().cpu()
    counts = torch.stack([(columns == i).sum(0) for i in range(bins)])
    return torch.as_tensor(chisquare(counts.numpy(), axis=0).pvalue).reshape(binned.shape[1:])


def _require_bins(bins: int, num_draws: int) -> int:
    bins = whole_number("bins", bins, least=2)
    if (num_draws + 1) % bins:
        raise ValueError(f"bins: expected a divisor of num_draws + 1 = {num_draws + 1}, got {bins}")
    return bins


# Data and latents -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Opened:
    """A program whose latents are all per datum, and its data."""

    program: Program
    sites: Mapping[str, LatentSite]
    inputs: Inputs
    data: TensorData
    batch_size: int

    def batches(self) -> Iterator[tuple[Args, Kwargs]]:
        """Every datum once, in order."""
        return map(self.inputs.call, self.data.in_order(self.batch_size))

    def repeated(self, num_data: int) -> Iterator[tuple[Args, Kwargs]]:
        """As many data as are asked for, in order, again from the first where they end."""
        index = torch.arange(num_data) % len(self.data)
        return (self.inputs.call(self.data.rows(rows)) for rows in index.split(self.batch_size))

    def draw_guide(self, args: Args, kwargs: Kwargs, num_particles: int) -> dict[str, Tensor]:
        """Draws by site, (K, M, *event)."""
        return self.by_datum(draw_guide(self.program.model, self.program.guide, args, kwargs, num_particles))

    def by_datum(self, latents: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Values by site, as they come, laid out as (K, M, *event)."""
        return {name: site.by_datum(latents[name]) for name, site in self.sites.items()}


def _open(
    program: HasModelAndGuide, x: Any, batch_size: int, binarize: str | None, seed: int, *, shared: bool = False
) -> _Opened:
    """A program and its data; latents that data share are refused, or left out, for others are looked at."""
    bridged, batch_size = as_program(program), whole_number("batch_size", batch_size)
    inputs = open_inputs(bridged, x, binarize=binarize, split="test", batch_size=batch_size)
    data = inputs.tensors().drawn_once(seed)
    args, kwargs = inputs.call(data.rows(slice(batch_size)))
    sites = latent_sites(bridged.model, args, kwargs)
    own = {name: site for name, site in sites.items() if site.axes is not None}
    if not own or (len(own) < len(sites) and not shared):
        raise ValueError(
            f"a diagnosis per datum needs {'a' if shared else 'every'} latent inside the data plate; sites outside it: "
            f"{[name for name in sites if name not in own]}"
        )
    return _Opened(bridged, own, inputs, data, batch_size)


# Importance weights ---------------------------------------------------------------------------------------------------


def pareto_k(log_w: Tensor) -> Tensor:
    """Shape k of the generalised Pareto distribution fitted to each datum's largest importance weights.

    Args:
        log_w: log weights, (K, M).

    Returns:
        Tensor (M,); NaN where there is no tail to fit: K < 50, weights that are all alike, or not finite ones.

    Example:
        >>> torch.manual_seed(0)  # doctest: +ELLIPSIS
        <torch._C.Generator object at ...>
        >>> bool(pareto_k(torch.randn(1000, 1)) < 0.7)
        True
    """
    k = torch.full((log_w.shape[1],), math.nan, dtype=torch.float64)
    if len(log_w) < MIN_PARTICLES:
        return k
    wide = log_w.detach().double().cpu()
    tail = wide.topk(math.ceil(min(len(wide) / 5, 3 * math.sqrt(len(wide)))) + 1, dim=0).values
    fits = wide.isfinite().all(0) & (tail[0] - tail[-1] > 1e-9)
    if fits.any():
        with np.errstate(over="ignore"):  # in ArviZ's profile of the fit, where infinity is the right limit
            k[fits] = torch.from_numpy(_arviz_k()(wide[:, fits].T.contiguous().numpy()))
    return k


def _arviz_k() -> Callable[[Any], Any]:
    """ArviZ's fit for rows of log weights: 1.x has it in arviz-stats, for log *likelihoods*; 0.x for log weights."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # 0.23 announces 1.0 on import
        try:
            from arviz_stats.base import array_stats
        except ImportError:
            from arviz import psislw

            return lambda rows: np.atleast_1d(psislw(rows)[1])
    return lambda rows: np.atleast_1d(array_stats.psislw(-rows, axis=-1)[1])
