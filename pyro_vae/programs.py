"""The one bridge from Pyro programs to tensors, and the only file that uses ``pyro.poutine``.

Every objective and every scorer of the package is a small reduction of

    log_w[k, m] = log p(x_m, z_km) - log q(z_km | x_m)          shape (K, M): K particles, M data of a minibatch

and :func:`log_weights` computes it, site by site, for any pair of Pyro functions. A *program* is any object with two
such functions, ``.model`` and ``.guide``; :class:`Program` makes one of two plain functions. What a program must obey:

* data that are independent given the global latents sit in ``pyro.plate("data", ...)``;
* both functions take the same arguments, the observed data among them;
* K particles add one more dimension on the left of all of the program's own, also when K = 1, so z is (K, M, J) and
  code must broadcast over leading dimensions (``z[..., 0]``, not ``z[:, 0]``).

Densities are masked as the program says and summed over every dimension but the particles' and the data plate's, which
are found by their names. The minibatch's scale N / M is kept apart, as :attr:`LogWeights.scale`, since it has no place
inside a log-sum-exp. A ``poutine.scale`` of the program's own is part of its density and stays in it.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable
from weakref import WeakKeyDictionary

import pyro
import torch
from pyro import poutine
from pyro.distributions import Delta, MaskedDistribution
from pyro.distributions.util import broadcast_shape, scale_and_mask
from pyro.params.param_store import ParamStoreDict
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import prune_subsample_sites, site_is_subsample
from torch import Tensor, nn
from torch.distributions import Independent, constraints, kl_divergence

from pyro_vae.numerics import forked_rng

__all__ = [
    "DATA_PLATE",
    "Dream",
    "HasModelAndGuide",
    "LogWeights",
    "Program",
    "ProgramCheck",
    "as_program",
    "bind_arguments",
    "check_program",
    "dream",
    "log_weights",
    "minibatch_scale",
    "same_minibatch",
]

DATA_PLATE = "data"
_PARTICLE_PLATE = "_pyro_vae_particles"

PyroFunction = Callable[..., Any]


@runtime_checkable
class HasModelAndGuide(Protocol):
    """Any object with a Pyro ``model`` and a Pyro ``guide`` of the same arguments."""

    @property
    def model(self) -> PyroFunction:
        """The generative model."""

    @property
    def guide(self) -> PyroFunction:
        """The recognition model."""


class Program:
    """A model and a guide with the parameters that belong to them.

    Parameters named by ``pyro.param`` and ``pyro.module`` live in a store that this program owns, not in Pyro's global
    one: two programs that use the same names do not touch each other, and ``pyro.clear_param_store()`` does not
    reach in. ``program.model`` and ``program.guide`` work anywhere that a Pyro function does.

    Args:
        model: Pyro function, the generative model p(x, z).
        guide: Pyro function of the same arguments, q(z | x).
        vectorize: draw all particles in one call, by a plate on the left. False calls the functions once per particle,
            for code that cannot broadcast.
        data_shape: shape of one datum of the first argument; data with as many elements are reshaped to it.
        data_range: the least and the greatest value that the first argument's data may have; None for any.

    Example:
        >>> import pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))   # the exact posterior
        >>> x = torch.zeros(3)
        >>> log_weights(model, guide, (x,), num_particles=2).log_w     # = log p(x) = log N(0; 0, 2)
        tensor([[-1.2655, -1.2655, -1.2655],
                [-1.2655, -1.2655, -1.2655]])
    """

    def __init__(
        self,
        model: PyroFunction,
        guide: PyroFunction,
        *,
        vectorize: bool = True,
        data_shape: Sequence[int] | None = None,
        data_range: tuple[float, float] | None = None,
    ) -> None:
        for role, function in (("model", model), ("guide", guide)):
            if not callable(function):
                raise ValueError(f"expected the {role} to be a Pyro function, got {type(function).__name__}")
        self.functions = {"model": model, "guide": guide}
        self._own_parameters = _OwnParameters()
        self.vectorize = vectorize
        self.data_shape = None if data_shape is None else tuple(data_shape)
        self.data_range = data_range

    def model(self, *args: Any, **kwargs: Any) -> Any:
        """Run the generative model with this program's parameters."""
        with self._own_parameters:
            return self.functions["model"](*args, **kwargs)

    def guide(self, *args: Any, **kwargs: Any) -> Any:
        """Run the guide with this program's parameters."""
        with self._own_parameters:
            return self.functions["guide"](*args, **kwargs)

    def modules(self) -> dict[str, nn.Module]:
        """Every module that the two functions refer to, by name: their own object, closures, globals and attributes."""
        found: dict[str, nn.Module] = {}
        for role, function in self.functions.items():
            for name, value in _references(function):
                if isinstance(value, nn.Module) and all(value is not known for known in found.values()):
                    found[name if name not in found else f"{role}.{name}"] = value
        return found

    @contextlib.contextmanager
    def evaluation_mode(self) -> Iterator[None]:
        """Every module in evaluation mode, and back afterwards: no dropout, running statistics left as they are."""
        training = [m for module in self.modules().values() for m in module.modules() if m.training]
        for module in training:
            module.training = False
        try:
            yield
        finally:
            for module in training:
                module.training = True

    def named_parameters(self) -> dict[str, Tensor]:
        """The trainable leaf tensors by name, unconstrained; complete once the functions have run once.

        A function that is a module, or a method of one, trains all of that module's parameters, registered or not.
        """
        modules, stored = self.modules(), dict(self._own_parameters.store.named_parameters())
        owners = [owner for f in self.functions.values() if isinstance(owner := _owner(f), nn.Module)]
        trained = {id(tensor) for tensor in stored.values()}
        trained |= {id(tensor) for owner in owners for tensor in owner.parameters() if tensor.requires_grad}
        # By the modules' own names where they are known: the store's may hold a number that no other process shares.
        named: dict[str, Tensor] = {}
        for module_name, module in modules.items():
            for name, tensor in module.named_parameters():
                if id(tensor) in trained:
                    trained.remove(id(tensor))
                    named[name if len(modules) == 1 else f"{module_name}.{name}"] = tensor
        return named | {name: tensor for name, tensor in stored.items() if id(tensor) in trained}

    def param(self, name: str) -> Tensor:
        """The value of a ``pyro.param`` statement of this program, in its constrained space.

        Raises:
            KeyError: no such statement has run.
        """
        with self._own_parameters:
            value: Tensor = pyro.param(name)
            return value.detach()

    def __repr__(self) -> str:
        names = ", ".join(
            f"{role}={getattr(f, '__qualname__', type(f).__name__)}" for role, f in self.functions.items()
        )
        return f"Program({names})"

    def named_buffers(self) -> dict[str, Tensor]:
        """Buffers (running statistics, constants) of every module the functions refer to."""
        return {
            f"{name}.{buffer_name}": buffer
            for name, module in self.modules().items()
            for buffer_name, buffer in module.named_buffers()
        }


class _OwnParameters:
    """A parameter store in the place of Pyro's global one while the context lasts.

    Contents are exchanged, rather than ``pyro.param`` answered from elsewhere, since a PyroModule (every AutoGuide is
    one) reads and writes the global store's dictionaries directly.
    """

    def __init__(self) -> None:
        self.store = ParamStoreDict()
        self._outer: list[dict[str, Any]] = []

    def __enter__(self) -> None:
        contents = vars(pyro.get_param_store())
        self._outer.append(dict(contents))
        contents.update(vars(self.store))

    def __exit__(self, *_: object) -> None:
        contents = vars(pyro.get_param_store())
        vars(self.store).update(contents)
        contents.update(self._outer.pop())


def _owner(function: PyroFunction) -> Any:
    return getattr(function, "__self__", function)


def _references(function: PyroFunction, seen: set[int] | None = None) -> Iterator[tuple[str, Any]]:
    """What a function refers to by name, and what the functions of the same package among it refer to."""
    seen = set() if seen is None else seen
    seen.add(id(function))
    owner = _owner(function)
    if isinstance(owner, nn.Module):
        yield type(owner).__name__, owner
    elif owner is not function:
        yield from vars(owner).items()
    plain = inspect.unwrap(getattr(function, "__func__", function))
    if not inspect.isfunction(plain):
        return
    names = inspect.getclosurevars(plain)
    for name, value in (*names.nonlocals.items(), *names.globals.items()):
        yield name, value
        if inspect.isroutine(value) and id(value) not in seen and _package(value) == _package(plain):
            yield from _references(value, seen)


def _package(function: PyroFunction) -> str:
    return str(getattr(function, "__module__", "")).partition(".")[0]


def as_program(program: HasModelAndGuide) -> Program:
    """The :class:`Program` of an object with ``.model`` and ``.guide``, the same at each call.

    Raises:
        ValueError: the object lacks one of the two functions.
    """
    if isinstance(program, Program):
        return program
    if not isinstance(program, HasModelAndGuide):
        raise ValueError(
            "expected a program: an object with .model and .guide, for example pyro_vae.Program(model, guide); "
            f"got {type(program).__name__}"
        )
    kept: dict[str, Any] = vars(program)
    if "_pyro_vae_program" not in kept:
        data_shape, data_range = (getattr(program, name, None) for name in ("data_shape", "data_range"))
        kept["_pyro_vae_program"] = Program(program.model, program.guide, data_shape=data_shape, data_range=data_range)
    return kept["_pyro_vae_program"]  # type: ignore[no-any-return]


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
    """

    latents: dict[str, Tensor]
    log_likelihood: dict[str, Tensor]
    log_prior: dict[str, Tensor]
    log_guide: dict[str, Tensor]
    analytic_kl: dict[str, Tensor] = field(default_factory=dict)
    scale: float = 1.0

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
        return _sum_of(self.log_likelihood | self.log_prior, ndim=2)

    @property
    def log_q(self) -> Tensor:
        """Log q(z | x) of the sites in the data plate, shape (K, M)."""
        return _sum_of(self.log_guide, ndim=2)

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


def _sum_of(terms: Mapping[str, Tensor], ndim: int) -> Tensor:
    return functools.reduce(operator.add, (term for term in terms.values() if term.ndim == ndim))


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
    if getattr(_owner(model), "vectorize", True):
        dim = -1 - _plate_nesting(model, guide, args, kwargs)
        with pyro.plate(_PARTICLE_PLATE, num_particles, dim=dim):
            return run(latents or {})
    given = latents or {}
    with same_minibatch():
        return _stack([run({name: z[k] for name, z in given.items()}) for k in range(num_particles)])


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


class _Given(Messenger):  # type: ignore[misc]
    """Sample statements of these names take these values."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.values and not msg["is_observed"]:
            msg["value"], msg["done"] = self.values[msg["name"]], True


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
        guide_trace = poutine.trace(_Given(latents)(guide)).get_trace(*args, **kwargs)
    # Replayed with the subsamples of its plates: a plate that draws its own minibatch draws the guide's.
    model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args, **kwargs)
    observed, latent = _split(prune_subsample_sites(model_trace))
    drawn, auxiliary = _guide_sites(prune_subsample_sites(guide_trace))
    _require_same_sites(latent, drawn)
    if latents and (free := sorted(auxiliary.keys() - latents.keys())):
        raise ValueError(
            f"the guide draws auxiliary sites {free}, as an automatic guide does, so its density at given values of "
            f"{sorted(drawn)} is not known: write a guide that draws those sites themselves"
        )
    if reparameterized:
        _require_reparameterized(drawn | auxiliary)
    data = _data_frame({**observed, **latent})
    analytic = _analytic_kl(latent, drawn) if analytic_kl else {}
    return LogWeights(
        latents={name: site["value"] for name, site in (drawn | auxiliary).items()},
        log_likelihood={name: _log_prob(site) for name, site in observed.items()},
        log_prior={name: _log_prob(site) for name, site in latent.items() if name not in analytic},
        log_guide={name: _log_prob(site) for name, site in (drawn | auxiliary).items() if name not in analytic},
        analytic_kl=analytic,
        scale=_minibatch_scale(data),
    )


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
            the data plate.
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
        elif _frame(site, DATA_PLATE) is None:
            raise ValueError(f"a dream is of data and their latents: site '{name}' is not in the data plate")
        else:
            latents[name] = site["value"].detach()[None]
    # By position where they came by position, for the guide may order its arguments in another way.
    dreamt_args = tuple(dreamt.get(name, value) for name, value in zip(positions, args, strict=False))
    dreamt_kwargs = {name: dreamt.get(name, value) for name, value in (kwargs or {}).items()}
    return Dream(dreamt_args + tuple(args[len(positions) :]), dreamt_kwargs, latents)


class _Dreaming(Messenger):  # type: ignore[misc]
    """Observed sites are drawn, deterministic ones left alone (``poutine.uncondition`` redraws them, misshapen)."""

    def __init__(self) -> None:
        super().__init__()
        self.sites: set[str] = set()

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] and not msg["infer"].get("_deterministic"):
            self.sites.add(msg["name"])
            msg["is_observed"], msg["value"], msg["done"] = False, None, False


def signature_of(function: PyroFunction) -> inspect.Signature:
    """The signature of a Pyro function: a Program's is its own function's, a module's that of ``forward``."""
    owner = _owner(function)
    plain = owner.functions[function.__name__] if isinstance(owner, Program) else function
    return inspect.signature(plain.forward if isinstance(plain, nn.Module) else plain)


def _stack(draws: Sequence[LogWeights]) -> LogWeights:
    def stacked(terms: str) -> dict[str, Tensor]:
        return {name: torch.stack([getattr(draw, terms)[name] for draw in draws]) for name in getattr(draws[0], terms)}

    names = ("latents", "log_likelihood", "log_prior", "log_guide", "analytic_kl")
    return LogWeights(**{name: stacked(name) for name in names}, scale=draws[0].scale)


# Sites and plates of a trace ------------------------------------------------------------------------------------------


def _split(model_trace: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Observed and latent sample sites of a model's trace, in ancestral order; deterministic ones are neither."""
    sites = {name: site for name, site in model_trace.nodes.items() if site["type"] == "sample"}
    sites = {name: site for name, site in sites.items() if not site["infer"].get("_deterministic")}  # no density
    observed = {name: site for name, site in sites.items() if site["is_observed"]}
    return observed, {name: site for name, site in sites.items() if name not in observed}


def _guide_sites(guide_trace: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Sites that a guide draws, in order: the model's latents, and ``infer={"is_auxiliary": True}`` ones."""
    sites = {n: s for n, s in guide_trace.nodes.items() if s["type"] == "sample" and not s["is_observed"]}
    auxiliary = {name: site for name, site in sites.items() if site["infer"].get("is_auxiliary")}
    return {name: site for name, site in sites.items() if name not in auxiliary}, auxiliary


def _require_same_sites(latent: Mapping[str, Any], drawn: Mapping[str, Any]) -> None:
    if missing := sorted(latent.keys() - drawn.keys()):
        raise ValueError(f"the guide draws no value for the model's latent sites {missing}; it draws {sorted(drawn)}")
    if unknown := sorted(drawn.keys() - latent.keys()):
        raise ValueError(
            f"the guide draws sites {unknown} that are not latent in the model, whose latent sites are {sorted(latent)}"
        )


def _require_reparameterized(drawn: Mapping[str, Any]) -> None:
    for name, site in drawn.items():
        if not site["fn"].has_rsample:
            raise ValueError(
                f"site '{name}' is drawn from {_base_name(site)}, which has no reparameterised sample, so the "
                "draw has no gradient: use VIMCO, ReweightedWakeSleep or WakeSleep, or a continuous relaxation"
            )


def _frame(site: Any, name: str) -> Any | None:
    return next((frame for frame in site["cond_indep_stack"] if frame.name == name and frame.vectorized), None)


def _data_frame(sites: Mapping[str, Any]) -> Any:
    frames = (_frame(site, DATA_PLATE) for site in sites.values())
    frame = next((frame for frame in frames if frame is not None), None)
    if frame is None:
        plates = sorted({f.name for site in sites.values() for f in site["cond_indep_stack"]} - {_PARTICLE_PLATE})
        raise ValueError(
            f'the model has no vectorized plate named "{DATA_PLATE}": put what is independent given the global latents '
            f'in `with pyro.plate("{DATA_PLATE}", len(x)):`; its plates are {plates}'
        )
    return frame


def minibatch_scale(model: PyroFunction, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None) -> float:
    """N / M as the model's data plate states it for this batch; torch's generators are left as they were."""
    with forked_rng(), torch.no_grad(), poutine.block():
        trace = prune_subsample_sites(poutine.trace(model).get_trace(*args, **(kwargs or {})))
    return _minibatch_scale(_data_frame({n: site for n, site in trace.nodes.items() if site["type"] == "sample"}))


def _minibatch_scale(frame: Any) -> float:
    return float((frame.full_size or frame.size) / frame.size)


def _log_prob(site: Any) -> Tensor:
    return _reduce(site, site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"]))


def _reduce(site: Any, log_prob: Tensor) -> Tensor:
    """Mask a site's log density and sum it over all dimensions but those of the particles and the data."""
    sizes = {frame.dim: frame.size for frame in site["cond_indep_stack"] if frame.vectorized}
    kept = {frame.dim for name in (_PARTICLE_PLATE, DATA_PLATE) if (frame := _frame(site, name)) is not None}
    data = _frame(site, DATA_PLATE)
    scale = site["scale"] / (1.0 if data is None else _minibatch_scale(data))
    rank = max([log_prob.ndim, *(-dim for dim in sizes)])
    shape = broadcast_shape(log_prob.shape, tuple(sizes.get(dim, 1) for dim in range(-rank, 0)))
    if log_prob.shape != shape:
        log_prob = log_prob.expand(shape)
    log_prob = scale_and_mask(log_prob, scale, site["mask"])
    summed = [dim for dim in range(-rank, 0) if dim not in kept]
    return log_prob.sum(summed) if summed else log_prob


def _analytic_kl(latent: Mapping[str, Any], drawn: Mapping[str, Any]) -> dict[str, Tensor]:
    """KL(q || p) at each site whose two distributions are fixed once its predecessors are drawn, and registered."""
    found = {}
    model_order, guide_order = list(latent), list(drawn)
    for name, site in latent.items():
        before_in_model = set(model_order[: model_order.index(name)])
        # A Delta has no KL; the one that Pyro registers for it leaves its log_density out.
        if before_in_model <= set(guide_order[: guide_order.index(name)]) and not _is_delta(drawn[name]["fn"]):
            with contextlib.suppress(NotImplementedError):
                found[name] = _reduce(site, kl_divergence(drawn[name]["fn"], site["fn"]))
    return found


def _is_delta(fn: Any) -> bool:
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return isinstance(fn, Delta)


_nestings: WeakKeyDictionary[Any, WeakKeyDictionary[Any, dict[tuple[str, str], int]]] = WeakKeyDictionary()


def _plate_nesting(model: PyroFunction, guide: PyroFunction, args: Any, kwargs: Any) -> int:
    """How many dimensions a program's own plates take, found by one run and remembered with the two functions."""
    known = _nestings.setdefault(_owner(model), WeakKeyDictionary()).setdefault(_owner(guide), {})
    key = (getattr(model, "__qualname__", ""), getattr(guide, "__qualname__", ""))
    if key not in known:
        traces = _plain_traces(model, guide, args, kwargs)
        dims = [frame.dim for trace in traces for site in trace.values() for frame in site["cond_indep_stack"]]
        known[key] = max((-dim for dim in dims if dim is not None), default=0)
    return known[key]


def _plain_traces(model: PyroFunction, guide: PyroFunction, args: Any, kwargs: Any) -> tuple[dict[str, Any], Any]:
    """Sample sites of one run of model and guide each, apart, leaving torch's generators as they were."""
    with forked_rng(), torch.no_grad(), poutine.block():
        runs = (prune_subsample_sites(poutine.trace(f).get_trace(*args, **kwargs)) for f in (model, guide))
        model_sites, guide_sites = ({n: s for n, s in t.nodes.items() if s["type"] == "sample"} for t in runs)
    return model_sites, guide_sites


# The dry run ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ProgramCheck:
    """What a dry run of a program on one batch found.

    Attributes:
        batch_size: M, the size of the data plate in this batch.
        full_size: N if the plate states it (``pyro.plate("data", N, subsample_size=M)``), else M.
        binary_arguments: names of the arguments that are observed by a site of binary support.
    """

    batch_size: int
    full_size: int
    binary_arguments: frozenset[str]

    def data_of(self, batch_size: int) -> int:
        """How many data the loss of a batch stands for: N where the plate scales to N, else the batch's own."""
        return self.full_size if self.full_size != self.batch_size else batch_size


def bind_arguments(program: Program, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a program's functions by name.

    Raises:
        ValueError: they do not fit the model's signature.
    """
    signature = signature_of(program.model)
    try:
        return dict(signature.bind(*args, **kwargs).arguments)
    except TypeError as error:
        raise ValueError(f"the data do not fit the model's arguments {signature}: {error}") from error


def check_program(program: Program, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None) -> ProgramCheck:
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
    kwargs = kwargs or {}
    arguments = bind_arguments(program, args, kwargs)
    with pyro.validation_enabled(True), program.evaluation_mode():
        model_sites, guide_trace = _first_run(program, arguments, args, kwargs)
        observed = {name: site for name, site in model_sites.items() if site["is_observed"]}
        latent = {name: site for name, site in model_sites.items() if name not in observed}
        drawn = {n: s for n, s in guide_trace.items() if not s["infer"].get("is_auxiliary")}
        enumerated = {name for name, site in latent.items() if site["infer"].get("enumerate") and name not in drawn}
        latent = {name: site for name, site in latent.items() if name not in enumerated}  # TraceEnum_ELBO sums them out
        _require_same_sites(latent, drawn)
        for site in (*model_sites.values(), *drawn.values()):
            _require_plates(site)
        for name in latent:
            _require_same_shape(name, latent[name], drawn[name])
        frame = _data_frame(model_sites)
        for name, site in observed.items():
            _require_support(name, site)
        if not enumerated:
            _require_broadcast(program, args, kwargs)
    binary = {_argument_of(n, s, arguments) for n, s in observed.items() if _is_binary(s)} - {None}
    return ProgramCheck(frame.size, frame.full_size or frame.size, frozenset(map(str, binary)))


def _first_run(program: Program, arguments: Mapping[str, Any], args: Any, kwargs: Any) -> tuple[Any, Any]:
    try:
        return _plain_traces(program.model, program.guide, args, kwargs)
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


def _base_support(site: Any) -> Any | None:
    try:
        support = site["fn"].support
    except NotImplementedError:
        return None
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support


def _base_name(site: Any) -> str:
    fn = site["fn"]
    while isinstance(fn, (Independent, MaskedDistribution)):  # not a transformed distribution, whose base is another
        fn = fn.base_dist
    return type(fn).__name__


def _is_binary(site: Any) -> bool:
    return _base_support(site) is constraints.boolean


def _require_support(name: str, site: Any) -> None:
    """Observed values must lie in the support; those of a binary site in [0, 1], for grey levels can be drawn."""
    support = constraints.unit_interval if _is_binary(site) else _base_support(site)
    value, shape = site["value"], site["fn"].shape()
    if value.shape[max(0, value.ndim - len(shape)) :] != shape[max(0, len(shape) - value.ndim) :]:
        raise ValueError(f"site '{name}' observes values of shape {tuple(value.shape)}, expected {tuple(shape)}")
    if support is None or site["mask"] is not None:
        return
    if not bool(support.check(value).all()):
        expected = "values in [0, 1]" if _is_binary(site) else str(support)
        raise ValueError(
            f"site '{name}' observes values outside the support of its {_base_name(site)}: expected {expected}, "
            f"got values from {value.min().item():.4g} to {value.max().item():.4g}"
        )


def _require_broadcast(program: Program, args: Any, kwargs: Any) -> None:
    try:
        with forked_rng(), torch.no_grad(), pyro.validation_enabled(False):
            log_weights(program.model, program.guide, args, kwargs, num_particles=2)
    except (RuntimeError, ValueError, IndexError) as error:
        raise ValueError(
            "the program runs, but not with a plate of particles on the left of its own: write code that broadcasts "
            "over leading dimensions (z[..., 0], not z[:, 0]), or use Program(model, guide, vectorize=False). "
            f"The error was: {_first_line(error)}"
        ) from error


def _argument_of(name: str, site: Any, arguments: Mapping[str, Any]) -> str | None:
    """The argument a site observes: the one of its name, else the one that is the very tensor."""
    if name in arguments:
        return name
    return next((argument for argument, value in arguments.items() if value is site["value"]), None)
