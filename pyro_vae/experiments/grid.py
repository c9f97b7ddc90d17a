"""The grid of a comparison: what is trained, by what, on what, how it is scored; all of it checked beforehand."""

from __future__ import annotations

import copy
import inspect
import itertools
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from pyro_vae.arguments import one_of, whole_number
from pyro_vae.data import Dataset
from pyro_vae.evaluation import Score, evaluate_bound, log_marginal
from pyro_vae.evaluation.marginal import make_method
from pyro_vae.inputs import open_inputs
from pyro_vae.numerics import seeded
from pyro_vae.objectives import SGVB
from pyro_vae.programs import HasModelAndGuide, Program, as_program, guide_parameters
from pyro_vae.training import fit
from pyro_vae.training.checkpoint import CheckpointError, RunDirectory
from pyro_vae.training.loop import require_objective
from pyro_vae.training.optimizers import make_optimizer, optimizer_name
from pyro_vae.training.provenance import checksum, describe, describe_data, require_same_run
from pyro_vae.training.schedules import schedule_name
from pyro_vae.training.settings import Settings

__all__ = ["Member", "Probe", "Scorer", "held_out", "make_grid", "new_program", "refit_settings", "require_objectives"]

_OWN = ("program", "data", "objective", "seed", "run_dir", "resume", "progress", "evaluate_with")
_FOR_ALL = ("test", "binarize")  # what every member is scored on
_REFIT = (
    *("optimizer", "learning_rate", "learning_rate_schedule", "schedule_every", "ema_decay"),
    *("batch_size", "binarize", "max_grad_norm"),
    *("device", "compile", "evaluate_every", "evaluation_size"),
)
_SEED = 0  # of the scorer's noise and binarisation


def require_objectives(objectives: Mapping[str, Any]) -> None:
    """Refuse what is no mapping from names to objectives that ``fit`` takes."""
    if not isinstance(objectives, Mapping) or not objectives:
        raise ValueError(f"objectives: expected a mapping from names to objectives, got {objectives!r}")
    for name, objective in objectives.items():
        require_objective(objective, f"objective {name!r}")


def _overridden(settings: Any, fit_settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The arguments of ``fit`` for each setting."""
    _require_settings("fit", fit_settings, _OWN)
    found = {"": {}} if settings is None else settings
    if not isinstance(found, Mapping) or not found or not all(isinstance(given, Mapping) for given in found.values()):
        raise ValueError(f"settings: expected a mapping from names to arguments of fit, got {settings!r}")
    for name, given in found.items():
        _require_settings(f"settings[{name!r}]", given, (*_OWN, *_FOR_ALL))
        _checked({**fit_settings, **given})
    return {str(name): {**fit_settings, **given} for name, given in found.items()}


def _require_settings(where: str, given: Mapping[str, Any], own: Iterable[str]) -> None:
    for name in given:
        if name in own:
            raise ValueError(f"{where}: {name} cannot be set here: compare sets it, the same way for all")
        one_of(f"{where}: name of a setting", name, inspect.signature(fit).parameters)


def _checked(given: Mapping[str, Any]) -> Settings:
    """The settings of a run, validated as ``fit`` will."""
    values = {name: parameter.default for name, parameter in inspect.signature(fit).parameters.items()} | dict(given)
    values["optimizer"] = optimizer_name(values["optimizer"])
    values["learning_rate_schedule"] = schedule_name(values["learning_rate_schedule"])
    return Settings(**{field.name: values[field.name] for field in fields(Settings)})


def refit_settings(fit_settings: Mapping[str, Any], refit_samples: int) -> dict[str, Any]:
    """The arguments of ``fit`` with which guides are trained anew: no setting's own, so that all have the same."""
    kept = {name: value for name, value in fit_settings.items() if name in _REFIT}
    return kept | {"num_samples": whole_number("refit_samples", refit_samples), "trained": "guide"}


def _which(seeds: int | Sequence[int]) -> list[int]:
    if not isinstance(seeds, Iterable):
        return list(range(whole_number("seeds", seeds)))
    found = [whole_number("seeds", seed, 0, 2**32 - 1) for seed in seeds]
    if not found or len(set(found)) < len(found):
        raise ValueError(f"seeds: expected a number of seeds, or different ones, got {seeds!r}")
    return found


def held_out(data: Any, test: Any) -> Any:
    """The data to score."""
    if test is None and not isinstance(data, Dataset):
        raise ValueError("expected test data to score: a data set of load_dataset, or test=...; got neither")
    return data if test is None else test


def _first(data: Any, count: int | None) -> Any:
    """The first so many data of a test set."""
    if isinstance(data, Dataset):
        return data.with_test(num_data=count)
    if isinstance(data, Mapping):
        return {name: column[:count] for name, column in data.items()}
    return tuple(column[:count] for column in data) if isinstance(data, tuple) else data[:count]


@dataclass(frozen=True, eq=False)
class Member:
    """One training of the grid."""

    name: str
    objective: Any
    setting: str
    seed: int
    fit: dict[str, Any]
    folder: Path | None

    @property
    def settings(self) -> Settings:
        """The settings of its run."""
        return _checked({**self.fit, "seed": self.seed})

    @property
    def refit_folder(self) -> Path | None:
        """Where its guide is trained anew."""
        return None if self.folder is None else self.folder / "refit"

    @property
    def score_file(self) -> Path | None:
        """Where its score is kept."""
        return None if self.folder is None else self.folder / "score.json"


def make_grid(
    objectives: Mapping[str, Any],
    settings: Mapping[str, Mapping[str, Any]] | None,
    fit_settings: Mapping[str, Any],
    seeds: int | Sequence[int],
    run_dir: str | os.PathLike[str] | None,
) -> list[Member]:
    """Every objective by every setting by every seed.

    Raises:
        ValueError: a setting is none of ``fit``'s or out of its range, or two members would share a folder.
    """
    arguments = _overridden(settings, fit_settings)
    members, names = [], set()
    for name, setting, seed in itertools.product(objectives, arguments, _which(seeds)):
        folder = "_".join(re.sub(r"[^\w.=+-]+", "-", part) for part in (str(name), setting, f"seed{seed}") if part)
        if folder.casefold() in names:
            raise ValueError(f"expected names that are told apart as names of folders, got twice {folder!r}")
        names.add(folder.casefold())
        path = None if run_dir is None else Path(run_dir, folder)
        members.append(Member(str(name), objectives[name], setting, seed, arguments[setting], path))
    return members


@dataclass(frozen=True, eq=False)
class Scorer:
    """The estimator of log p(x), the same for all members."""

    method: str
    num_particles: int | None
    num_data: int | None
    options: Mapping[str, Any]
    binarize: Any
    refit_samples: int | None
    refit_objective: Any = None
    estimator: Any = field(init=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("method", "num_particles", "binarize", "seed"):
            if name in self.options:
                raise ValueError(f"scorer_options: {name} cannot be set here: compare sets it, the same way for all")
        options = {name: value for name, value in self.options.items() if name not in ("batch_size", "max_elements")}
        object.__setattr__(self, "estimator", make_method(self.method, self.num_particles, **options))
        object.__setattr__(self, "num_particles", self.estimator.num_particles)
        for name in ("num_data", "refit_samples"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, whole_number(name, value))

    def __call__(self, program: HasModelAndGuide, test: Any) -> Score:
        """Estimate log p(x) of the test data."""
        return log_marginal(
            program,
            _first(test, self.num_data),
            method=self.method,
            num_particles=self.num_particles,
            binarize=self.binarize,
            seed=_SEED,
            **self.options,
        )

    def bound(self, program: HasModelAndGuide, test: Any) -> float:
        """SGVB's lower bound on the data that are scored, nats per datum."""
        bridged = as_program(program)
        inputs = open_inputs(bridged, _first(test, self.num_data), binarize=self.binarize, split="test")
        return evaluate_bound(bridged, inputs, SGVB(), seed=_SEED).mean

    def check(self, program: Program, few: tuple[Any, Any]) -> None:
        """Refuse a program that cannot be scored, or refitted, as it will be: before anything is trained."""
        args, kwargs = few
        with seeded(_SEED), program.evaluation_mode():
            self.estimator.check(program, args, kwargs)
            if self.refit_samples is not None:
                copy.deepcopy(self.refit_objective).loss(program.model, program.guide, *args, **kwargs)
                guide_parameters(program, program.named_parameters(), args, kwargs)

    def require_guide(self, program: Program, objectives: Mapping[str, Any]) -> None:
        """Refuse an estimator that needs a guide where there is none, or where an objective trains none."""
        from_prior = "prior" in (self.options.get("initial"), self.options.get("proposal"))
        if self.method not in ("importance", "ais", "smc") or from_prior:
            return
        untrained = [name for name, objective in objectives.items() if not getattr(objective, "has_bound", True)]
        if not program.has_guide or (untrained and self.refit_samples is None):
            who = f"objective {untrained[0]!r} trains no guide" if program.has_guide else "the program has no guide"
            raise ValueError(
                f'{who}, which method "{self.method}" needs: pass refit_samples (--refit-samples; where the program '
                'has a guide), or method="ais" with scorer_options={"initial": "prior"} (--method ais --initial prior)'
            )

    @property
    def description(self) -> dict[str, Any]:
        """What decides a score, beside the program and the data."""
        names = ("method", "num_particles", "num_data", "options", "refit_samples")
        known = {name: getattr(self, name) for name in names} | {"seed": _SEED}
        return known | ({} if self.refit_samples is None else {"refit_objective": describe(self.refit_objective)})


@dataclass(frozen=True, eq=False)
class Probe:
    """A new program and the data, found to fit each other: what stored runs are checked against."""

    program: Program
    parameters: dict[str, Tensor]
    described: dict[str, Any]
    test_checksum: int
    few: tuple[Any, Any]

    @classmethod
    def of(cls, factory: Any, data: Any, fit_settings: Mapping[str, Any], seed: int) -> Probe:
        """Make programs, and run them once on the data.

        Raises:
            ValueError: they do not fit, there are no test data, or the factory's programs have parameters in common.
        """
        binarize, test = fit_settings.get("binarize"), held_out(data, fit_settings.get("test"))
        made, other = new_program(factory, seed), new_program(factory, seed)
        program = as_program(made)
        with seeded(seed):
            inputs = open_inputs(program, data, binarize=binarize)
            held = open_inputs(program, test, binarize=binarize, split="test")
            scored, few = held.tensors(), held.call(held.tensors().rows(slice(0, 2)))
            open_inputs(as_program(other), data, binarize=binarize)
        parameters = program.named_parameters()
        if not parameters:
            raise ValueError("the program has nothing to train: no pyro.param, pyro.module or module parameters")
        _require_apart(parameters, as_program(other).named_parameters())
        described = {
            "program": describe(made),
            "parameters": {name: list(tensor.shape) for name, tensor in parameters.items()},
            "data": describe_data(data, inputs),
            "environment": {},
        }
        return cls(program, parameters, described, checksum(scored.columns.values()), few)

    def require_optimizers(self, members: Iterable[Member]) -> None:
        """Refuse an optimiser that cannot be made for these parameters."""
        for given in {member.setting: member.fit for member in members}.values():
            optimizer = given.get("optimizer", inspect.signature(fit).parameters["optimizer"].default)
            make_optimizer(optimizer, list(self.parameters.values()), given.get("learning_rate"))

    def require_same(self, member: Member, refit: Mapping[str, Any] | None, refitter: Any) -> None:
        """Refuse what a member's directory holds if it is another training."""
        self._require_same_run(member.folder, member.objective, member.settings)
        if refit is not None:
            self._require_same_run(member.refit_folder, refitter, _checked({**refit, "seed": member.seed}))

    def _require_same_run(self, folder: Path | None, objective: Any, settings: Settings) -> None:
        if folder is None or not (directory := RunDirectory(folder)).config_file.exists():
            return
        stored, here = directory.read_config(), {"objective": describe(objective), "fit": vars(settings)}
        require_same_run(stored, self.described | here, folder)
        if stored["program"] != json.loads(json.dumps(self.described["program"])):
            raise CheckpointError(f"{folder} holds a run of {stored['program']}, got {self.described['program']}")
        for name in ("num_samples", "epochs"):
            if (before := stored["fit"][name] or 0) > (getattr(settings, name) or 0):
                raise CheckpointError(
                    f"{folder} was trained with {name}={before}, got {getattr(settings, name)}: the budget of a "
                    "comparison can be raised, not lowered, for its members must have had the same"
                )


def _require_apart(parameters: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> None:
    known = {id(tensor) for tensor in parameters.values()}
    if any(id(tensor) in known for tensor in others.values()):
        raise ValueError(
            "program_factory: expected a new program at each call, with parameters of its own, so that each training "
            "begins anew; got the same ones twice: make the modules inside the function"
        )


def new_program(factory: Any, seed: int) -> HasModelAndGuide:
    """A program of its own, with the initial parameters of a seed."""
    try:
        if isinstance(factory, HasModelAndGuide) and not isinstance(factory, type):
            raise TypeError("a program, not a function that returns one")
        inspect.signature(factory).bind()
    except TypeError as error:
        raise ValueError(
            "program_factory: expected a function that needs no arguments and returns a new program, got "
            f"{type(factory).__name__} ({error})"
        ) from error
    with seeded(seed):
        return factory()  # type: ignore[no-any-return]
