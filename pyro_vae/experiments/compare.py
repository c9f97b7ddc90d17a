"""Learning objectives beside each other: the same programs, data, budget and scorer; one table.

A comparison is a grid of objectives x settings x seeds. Each member of it is one training, from initial parameters that
depend on the seed alone, followed by one estimate of log p(x) on the same test data with the same noise. Learning
curves show the same lower bound for all of them, whatever each one maximises; Monte Carlo EM has none.

Members know nothing of each other, so they run in as many processes as joblib is asked for. Each has a directory in
``run_dir``: its training can be resumed bit for bit, and its score is written once it is whole. A comparison that was
killed is finished by the same call.
"""

from __future__ import annotations

import copy
import functools
import json
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import joblib
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import pyro_vae
from pyro_vae.evaluation import Score
from pyro_vae.experiments.comparison import HEAVY, Comparison, strict, write_json
from pyro_vae.experiments.grid import (
    Member,
    Probe,
    Scorer,
    held_out,
    make_grid,
    new_program,
    refit_settings,
    require_objectives,
)
from pyro_vae.objectives import SGVB
from pyro_vae.parallel import require_alone
from pyro_vae.programs import HasModelAndGuide
from pyro_vae.training import Run, fit
from pyro_vae.training.checkpoint import CheckpointError, RunDirectory, RunDirectoryError
from pyro_vae.training.interrupts import TrainingInterrupted

__all__ = ["compare"]

_MEASURED = ("log_marginal", "log_marginal_se", "mc_error", "scored_bound", "test_bound", "samples", "seconds")


def compare(
    objectives: Mapping[str, Any],
    program_factory: Callable[[], HasModelAndGuide],
    data: Any,
    *,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    seeds: int | Sequence[int] = 3,
    run_dir: str | os.PathLike[str] | None = None,
    method: str = "importance",
    num_particles: int | None = None,
    num_data: int | None = None,
    scorer_options: Mapping[str, Any] | None = None,
    refit_samples: int | None = None,
    refit_objective: Any = None,
    reference_bound: float | None = None,
    n_jobs: int | None = None,
    progress: bool = True,
    **fit_settings: Any,
) -> Comparison:
    """Train the same programs by different objectives, and score all of them with the same estimator of log p(x).

    Args:
        objectives: name -> objective: of this package, of Pyro's, or your own; each training works on a copy.
        program_factory: function without arguments that returns a *new* program, with parameters of its own. It is
            called with torch seeded by the member's seed: all objectives start from the same parameters.
        data: as for :func:`pyro_vae.fit`. The test split of a data set is scored; else ``test=`` must be given.
        settings: name -> arguments of ``fit`` that override ``fit_settings``, such as a grid of learning rates
            ``{"0.02": {"learning_rate": 0.02}, "0.1": {"learning_rate": 0.1}}``; None: one setting.
        seeds: how many, from 0 on; or which.
        run_dir: a directory for the comparison. It will hold a run directory for each training, with its ``score.json``
            when it is done, and in the end ``results.json``, ``table.md`` and ``curves.png`` (see
            :meth:`Comparison.save`). The same call goes on where one that was stopped or killed left off, and tries
            again what failed; a call with a larger budget trains all of them further. Of a training that was killed,
            the last minute at most is done again.
        method: "importance", or another of :func:`pyro_vae.log_marginal`.
        num_particles: of the scorer; None for the method's default.
        num_data: score only the first so many test data.
        scorer_options: further arguments of ``log_marginal``.
        refit_samples: before scoring, train every program's guide for so many samples with theta held fixed, by the
            optimiser of ``fit_settings``, from where training left it: the same for every row, so that a score tells
            about the model and not about how its guide was trained.
        refit_objective: by what; None for ``SGVB()``. Discrete latents need another: ``ReweightedWakeSleep()``.
        reference_bound: test bound, in nats per datum, to which trainings are timed; None for the lowest that an
            objective and setting ends at (mean over seeds).
        n_jobs: processes, as joblib counts them (-1: one per core); None: as ``joblib.parallel_config`` says, else 1.
            Under ``parallel_config(backend="dask")`` or ``"ray"`` they are those of the cluster, which must share the
            file system of ``run_dir``. Times are comparable only among trainings that did not compete for the cores.
        progress: show how many trainings are done if standard error is a terminal.
        **fit_settings: arguments of ``fit`` for all trainings; a budget (``num_samples`` or ``epochs``) at least.

    Returns:
        Rows, summary, table and figure. A training that failed is a row with its error, and stops no other.

    Raises:
        ValueError: before any training, for arguments, data or programs that are not as stated; the message says what
            was expected and what came.
        RunDirectoryError: another process works in ``run_dir``, or it holds something else than a comparison.
        CheckpointError: ``run_dir`` holds a comparison with other settings.
        TrainingInterrupted: Ctrl-C or SIGTERM; what is done is kept in ``run_dir``.

    Example:
        >>> import pyro_vae as pv
        >>> result = pv.compare(
        ...     {"AEVB": pv.SGVB(), "wake-sleep": pv.WakeSleep()},
        ...     lambda: pv.VAE(data_shape=(8, 8), latent_dim=2, hidden_dims=(8,)),
        ...     pv.load_dataset("digits"),
        ...     seeds=1, num_samples=300, num_particles=10, num_data=20, evaluation_size=50,
        ... )
        >>> [row["objective"] for row in result.rows], len(result.histories["AEVB"])
        (['AEVB', 'wake-sleep'], 1)
    """
    require_alone("compare", "its trainings run in as many processes as n_jobs says")
    require_objectives(objectives)
    members = make_grid(objectives, settings, fit_settings, seeds, run_dir)
    binarize = fit_settings.get("binarize")
    refitter = SGVB() if refit_objective is None else refit_objective
    require_objectives({"refit_objective": refitter})
    scorer = Scorer(method, num_particles, num_data, scorer_options or {}, binarize, refit_samples, refitter)
    probe = Probe.of(program_factory, data, fit_settings, members[0].seed)
    probe.require_optimizers(members)
    scorer.require_guide(probe.program, objectives)
    scorer.check(probe.program, probe.few)
    refit = None if refit_samples is None else refit_settings(fit_settings, refit_samples)
    plan = _Plan(program_factory, data, fit_settings.get("test"), scorer, probe.test_checksum, refit)
    with _alone_in(run_dir):
        for member in members:
            probe.require_same(member, refit, refitter)
        outcomes = _run_all(plan, members, n_jobs, progress)
        comparison = Comparison.of([(o["row"], o["history"]) for o in outcomes], reference_bound, plan.scored)
        if run_dir is not None:
            comparison.save(run_dir)
    return comparison


@dataclass(frozen=True, eq=False)
class _Plan:
    """What all members share, as it travels to the processes that run them."""

    factory: Callable[[], HasModelAndGuide]
    data: Any
    test: Any
    scorer: Scorer
    test_checksum: int
    refit: dict[str, Any] | None
    dtype: torch.dtype = field(default_factory=torch.get_default_dtype)
    process: int = field(default_factory=os.getpid)

    @property
    def scored(self) -> dict[str, Any]:
        return self.scorer.description | {"test_data": self.test_checksum}

    def scored_after(self, member: Member) -> dict[str, Any]:
        """How and after what a member is scored, as JSON keeps it."""
        settings = member.settings
        budget = {"num_samples": settings.num_samples, "epochs": settings.epochs}
        return strict(self.scored | budget)  # type: ignore[no-any-return]


@contextmanager
def _alone_in(run_dir: str | os.PathLike[str] | None) -> Iterator[None]:
    """The only comparison in a directory, which says where things are when it is stopped."""
    try:
        with nullcontext() if run_dir is None else RunDirectory(Path(run_dir)).locked():
            if run_dir is not None:
                _claim(Path(run_dir))
            yield
    except KeyboardInterrupt as error:
        kept = "nothing was kept, for there is no run_dir"
        if run_dir is not None:
            kept = f"what was done is kept in {run_dir}: the same call goes on from there"
        number = getattr(error, "signal", signal.SIGINT)
        raise TrainingInterrupted(f"stopped by {signal.Signals(number).name}; {kept}", number) from None


def _claim(folder: Path) -> None:
    """Mark a new directory as a comparison's; refuse one that holds anything else."""
    marker = folder / "comparison.json"
    if not marker.exists():
        if any(entry.name != ".lock" for entry in folder.iterdir()):
            raise RunDirectoryError(f"{folder} is not empty and holds no comparison: choose another directory")
        write_json(marker, {"pyro_vae_version": pyro_vae.__version__})


class _Parallel(joblib.Parallel):  # type: ignore[misc]
    """joblib's, with a bar in the place of lines of text."""

    def __init__(self, report: Callable[[int], None], **options: Any) -> None:
        super().__init__(batch_size=1, prefer="processes", **options)
        self.report = report

    def print_progress(self) -> None:
        self.report(self.n_completed_tasks)


def _run_all(plan: _Plan, members: Sequence[Member], n_jobs: int | None, progress: bool) -> list[dict[str, Any]]:
    """An outcome for each member: of its score file if it is finished, else by training and scoring it."""
    outcomes = [_finished(plan, member) for member in members]
    left = [i for i, outcome in enumerate(outcomes) if outcome is None]
    done = len(members) - len(left)
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not (progress and console.is_terminal)) as bar:
        task = bar.add_task("trainings", total=len(members), completed=done)
        run = _Parallel(lambda count: bar.update(task, completed=done + count), n_jobs=n_jobs)
        new = run(joblib.delayed(_run_member)(plan, members[i]) for i in left)
    for i, outcome in zip(left, new, strict=True):
        outcomes[i] = outcome
    return [outcome for outcome in outcomes if outcome is not None]


def _finished(plan: _Plan, member: Member) -> dict[str, Any] | None:
    """A member's outcome, if it was scored as it would be now."""
    try:
        stored = json.loads(member.score_file.read_text(encoding="utf-8")) if member.score_file else None
    except (FileNotFoundError, ValueError):  # not there, or not whole: it is scored again
        return None
    if stored is not None and stored["scored"]["test_data"] != plan.test_checksum:
        raise CheckpointError(f"the test data are not those that {member.folder} was scored on: checksums differ")
    return stored if stored is not None and stored["scored"] == plan.scored_after(member) else None


_one_at_a_time = threading.Lock()  # random generators and the default type belong to the process


class _Stopped(KeyboardInterrupt):
    """A training stopped on a signal, as it can travel between processes."""

    @property
    def signal(self) -> int:
        return int(self.args[0])


def _run_member(plan: _Plan, member: Member) -> dict[str, Any]:
    """Train and score a member; what goes wrong is its outcome."""
    row = {"objective": member.name, "setting": member.setting, "seed": member.seed}
    _follow(plan.process)
    with _one_at_a_time:
        torch.set_default_dtype(plan.dtype)  # a new process has torch's own
        try:
            found, history = _train_and_score(plan, member)
        except TrainingInterrupted as error:
            raise _Stopped(error.signal) from None
        except Exception as error:
            return {"row": row | dict.fromkeys(_MEASURED) | {"error": _message(error)}, "history": []}
    outcome: dict[str, Any] = strict(
        {"scored": plan.scored_after(member), "row": row | found | {"error": None}, "history": history}
    )
    if member.score_file is not None:
        write_json(member.score_file, outcome)
    return outcome


@functools.cache
def _follow(process: int) -> None:
    """Save and stop when the process that started this one is gone, killed with no time to say so."""

    def watch() -> None:
        while os.getppid() == process:
            time.sleep(0.5)
        while True:  # at the first, fit saves and stops; the next ends the process, which waits for more to do
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5.0)

    if os.getppid() == process:
        threading.Thread(target=watch, daemon=True).start()


def _message(error: Exception) -> str:
    """The message of an error; with type and place where it is not one that the package words."""
    if isinstance(error, ValueError):
        return str(error)
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({Path(frame.filename).name}, line {frame.lineno})"


def _train_and_score(plan: _Plan, member: Member) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A member's measurements and its history."""
    program = new_program(plan.factory, member.seed)
    stored: dict[str, Any] = {"seed": member.seed, "resume": member.folder is not None, "progress": False}
    run = fit(
        program,
        plan.data,
        objective=copy.deepcopy(member.objective),
        evaluate_with=SGVB() if getattr(member.objective, "has_bound", True) else None,
        run_dir=member.folder,
        **stored,
        **member.fit,
    )
    if plan.refit is not None:
        refitter = copy.deepcopy(plan.scorer.refit_objective)
        fit(program, plan.data, objective=refitter, run_dir=member.refit_folder, **stored, **plan.refit)
    test = held_out(plan.data, plan.test)
    score, trains_guide = plan.scorer(program, test), plan.refit is not None or run.kept.get("test_bound") is not None
    bound = plan.scorer.bound(program, test) if trains_guide else None
    return _measured(run, score, bound), run.history


def _measured(run: Run, score: Score, bound: float | None) -> dict[str, Any]:
    """A training's numbers, in the order of a row."""
    return {
        "log_marginal": score.mean,
        "log_marginal_se": score.std_error,
        "mc_error": score.mc_error,
        **({} if "r_hat" in score.diagnostics else {"median_ess": score.diagnostics["ess"].median().item()}),
        **({} if score.num_heavy is None else {HEAVY: score.num_heavy}),
        "scored_bound": bound,
        "test_bound": run.kept.get("test_bound"),
        "samples": run.samples,
        "seconds": run.history[-1]["seconds"],
    }
