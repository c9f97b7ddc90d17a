"""A model and a guide with the parameters that belong to them."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import pyro
from pyro.params.param_store import ParamStoreDict
from torch import Tensor, nn

__all__ = [
    "HasModelAndGuide",
    "Program",
    "PyroFunction",
    "as_program",
    "bind_arguments",
    "evaluation_mode",
    "guide_of",
    "owner_of",
    "signature_of",
]

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
        guide: Pyro function of the same arguments, q(z | x). None for what needs no guide: Monte Carlo EM, and annealed
            importance sampling from the prior.
        vectorize: draw all particles in one call, by a plate on the left. False calls the functions once per particle,
            for code that cannot broadcast.
        data_shape: shape of one datum of the first argument; data with as many elements are reshaped to it.
        data_range: the least and the greatest value that the first argument's data may have; None for any.

    Example:
        >>> import torch, pyro_vae as pv
        >>> import pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))   # the exact posterior
        >>> x = torch.zeros(3)
        >>> pv.log_weights(model, guide, (x,), num_particles=2).log_w     # = log p(x) = log N(0; 0, 2)
        tensor([[-1.2655, -1.2655, -1.2655],
                [-1.2655, -1.2655, -1.2655]])
    """

    def __init__(
        self,
        model: PyroFunction,
        guide: PyroFunction | None = None,
        *,
        vectorize: bool = True,
        data_shape: Sequence[int] | None = None,
        data_range: tuple[float, float] | None = None,
    ) -> None:
        self.functions = {"model": model} if guide is None else {"model": model, "guide": guide}
        for role, function in self.functions.items():
            if not callable(function):
                raise ValueError(f"expected the {role} to be a Pyro function, got {type(function).__name__}")
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
        if not self.has_guide:
            raise ValueError(
                "this program has no guide: expected Program(model, guide). Without one it is trained by MCEM() and "
                'scored by log_marginal(..., method="ais", initial="prior") or method="posterior-density"'
            )
        with self._own_parameters:
            return self.functions["guide"](*args, **kwargs)

    @property
    def has_guide(self) -> bool:
        """Whether there is a guide."""
        return "guide" in self.functions

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
        owners = [owner for f in self.functions.values() if isinstance(owner := owner_of(f), nn.Module)]
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


def evaluation_mode(function: PyroFunction) -> contextlib.AbstractContextManager[None]:
    """The modules of a program's function in evaluation mode; nothing for a function of no Program."""
    owner = owner_of(function)
    return owner.evaluation_mode() if isinstance(owner, Program) else contextlib.nullcontext()


def owner_of(function: PyroFunction) -> Any:
    """The object that a method belongs to; a plain function itself."""
    return getattr(function, "__self__", function)


def _references(function: PyroFunction, seen: set[int] | None = None) -> Iterator[tuple[str, Any]]:
    """What a function refers to by name, and what the functions of the same package among it refer to."""
    seen = set() if seen is None else seen
    seen.add(id(function))
    owner = owner_of(function)
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


def guide_of(program: Program) -> PyroFunction | None:
    """The guide of a program; None if it has none."""
    return program.guide if program.has_guide else None


def signature_of(function: PyroFunction) -> inspect.Signature:
    """The signature of a Pyro function: a Program's is its own function's, a module's that of ``forward``."""
    owner = owner_of(function)
    plain = owner.functions[function.__name__] if isinstance(owner, Program) else function
    return inspect.signature(plain.forward if isinstance(plain, nn.Module) else plain)


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
