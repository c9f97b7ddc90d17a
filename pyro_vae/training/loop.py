"""The training loop: stochastic gradient ascent on a bound, with evaluations, checkpoints and exact resumption.

With :class:`pyro_vae.SGVB` it is the paper's Algorithm 1 (AEVB): draw a minibatch, draw noise, follow the gradient of
the estimator, until the budget of training samples is spent.

Several processes of torchrun are one run: each takes its part of every minibatch, and all take the same step by the
gradient of the whole. Whatever they decide, they decide by numbers that are the same on all of them: the budget, sums
over ranks (:mod:`pyro_vae.training.exchange`) and evaluations. Rank 0 alone writes.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import signal
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import pyro
import torch
from torch import Tensor
from torch.optim import Optimizer

import pyro_vae
from pyro_vae.data import BatchIterable, Columns, Dataset, TensorData
from pyro_vae.evaluation import BoundEstimate, evaluate_bound, evaluate_kl
from pyro_vae.inputs import Inputs, batch_size_of, device_of, move_to, open_inputs
from pyro_vae.numerics import seeded
from pyro_vae.objectives import MCEM, SGVB, Objective
from pyro_vae.parallel import Ranks, is_sharded, ranks, restarted
from pyro_vae.programs import HasModelAndGuide, Program, as_program, check_program, guide_parameters
from pyro_vae.training import random_state
from pyro_vae.training.checkpoint import Checkpoint, RunDirectory, copy_into, model_tensors
from pyro_vae.training.compiled import CompiledStep
from pyro_vae.training.exchange import Asked, Exchange
from pyro_vae.training.interrupts import Signals, TrainingInterrupted
from pyro_vae.training.optimizers import OptimizerLike, load_state, make_optimizer, optimizer_name, state_tensors
from pyro_vae.training.progress import progress_bar
from pyro_vae.training.provenance import describe, describe_data, describe_environment, require_same_run
from pyro_vae.training.schedules import Average, Schedule, ScheduleLike, schedule_name
from pyro_vae.training.settings import Settings
from pyro_vae.training.step import Batch, EagerStep, NonFiniteLossError

__all__ = ["Run", "fit", "require_objective"]

_SECONDS_BETWEEN_CHECKPOINTS = 60.0


@dataclass(frozen=True, eq=False)
class Run:
    """A finished training.

    Attributes:
        program: what was trained, in place.
        history: a row per evaluation: "samples" (training samples seen), "seconds" (of training alone),
            "train_bound", "train_bound_se", "test_bound", "test_bound_se" (nats per datum; None without such data), and
            "valid_bound", "valid_bound_se" if validation data were asked for. Monte Carlo EM has no bound: these are
            None, and "train_log_joint" is the mean log p(x, z) over the samples since the row before. With global
            latents, "train_bound" has its share of their terms, a "dataset_bound" bounds the log evidence of all N
            training data together (nats: N times the mean), and bounds of held-out data are predictive: see
            :func:`pyro_vae.evaluate_bound`. Of sequences (a program that takes ``lengths``) there is also a
            "train_bound_per_step", "test_bound_per_step" and so on: sum of the bounds over sum of the steps, in nats.
            With ``kl_by_site`` there is a "train_kl_z", "test_kl_z" of each latent site "z".
        samples: training samples seen.
        stopped_early: whether ``patience`` ended the run. Wherever ``patience`` was set, the parameters are those of
            the best validation bound, and not of the last row.
        run_dir: where it is stored, if it is.
        best_bound: the best validation bound, if ``patience`` was set.
        path: how its last steps were taken: "eager", "captured" (recorded as a graph) or "compiled".
    """

    program: Any
    history: list[dict[str, Any]]
    samples: int
    stopped_early: bool
    run_dir: Path | None
    best_bound: float | None = None
    path: str = "eager"

    @property
    def kept(self) -> dict[str, Any]:
        """The row of the history whose parameters the program has."""
        best = (row for row in self.history if self.best_bound is not None and row["valid_bound"] == self.best_bound)
        return next(best, self.history[-1])

    def __repr__(self) -> str:
        last = self.history[-1] if self.history else {}
        shown = ", ".join(f"{k} {last[k]:.2f}" for k in ("train_bound", "test_bound") if last.get(k) is not None)
        return f"Run({self.samples:,} samples{', ' + shown if shown else ''})"


@dataclass
class _Position:
    """Where a run stands. Everything but tensors that a resumed run must know."""

    samples: int = 0
    epoch: int = 0
    batch: int = 0
    seconds: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)
    best_bound: float | None = None
    evaluations_since_best: int = 0
    stopped_early: bool = False
    steps: int = 0
    refused: str | None = None  # why its steps are eager for good
    seen_bounds: list[float] = field(default_factory=list)  # by a schedule that waits for a plateau
    log_joint: float = 0.0  # mean over the samples since the last row, for objectives without a bound
    since_row: int = 0


def fit(
    program: HasModelAndGuide,
    data: Any,
    *,
    objective: Any = None,
    optimizer: OptimizerLike = "adagrad",
    learning_rate: float | None = None,
    learning_rate_schedule: ScheduleLike | None = None,
    schedule_every: Literal["epoch", "step"] = "epoch",
    ema_decay: float | None = None,
    batch_size: int = 100,
    num_samples: int | None = None,
    epochs: int | None = None,
    test: Any = None,
    valid: Any = None,
    binarize: Literal["dynamic", "none"] | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    compile: bool = True,
    run_dir: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: bool = True,
    evaluate_every: int | None = None,
    evaluation_size: int = 10_000,
    checkpoint_every: int | None = None,
    prior_scale: float | None = None,
    kl_warmup: int | None = None,
    free_bits: float | None = None,
    kl_by_site: bool = False,
    max_grad_norm: float | None = None,
    trim_padding: bool = False,
    patience: int | None = None,
    tensorboard: bool = False,
    trained: Literal["all", "guide"] = "all",
    evaluate_with: Any = None,
    precision: Literal["full", "bf16"] = "full",
) -> Run:
    """Train a program on data by stochastic gradients of a bound (arXiv:1312.6114, Algorithm 1).

    Under torchrun (``torchrun --nproc-per-node=4 script.py``) all processes train one program, from rank 0's initial
    parameters: each draws noise of its own for its part of every minibatch, and rank 0 alone writes. Latents outside
    the data plate are drawn by each process for itself; the mean over processes is an estimate of the same bound, with
    less noise. Running statistics of a batch are the mean over processes. An objective must be a sum over data, as all
    of this package are; Pyro's RenyiELBO becomes that of each process's part.

    Args:
        program: an object with ``.model`` and ``.guide``, trained in place: a model of this package, or
            ``Program(model, guide)`` of your own functions. With latents outside the data plate, the plate states the
            number of data; an attribute ``num_data`` of the object that is None is set to it.
        data: a tensor (N, ...); a tuple (by position) or dict (by name) of tensors with an equal first dimension, which
            is one data set; a result of :func:`pyro_vae.load_dataset`, whose test split is then evaluated; or an
            iterable of batches (a DataLoader), which can be iterated over again. Matrices of scipy.sparse serve as
            tensors, of which a minibatch's rows alone are made dense. Arrays mapped from files
            (``numpy.load(path, mmap_mode="r")``) may be larger than memory: they are read in blocks and by minibatch,
            never copied as a whole and never written to. Sequences of unequal length are x (N, T, ...), padded, and
            lengths (N,), for a program with an argument ``lengths`` (:func:`pyro_vae.pad_sequences` makes them, a data
            set has them). NaN in x is refused, but where a column of bool for an argument ``mask``, of x's shape or its
            first axes, is False: ``{"x": x, "mask": x.isfinite()}``; the program reads 0 there, and leaves it out.
        objective: what to maximise: an objective of this package (None: ``SGVB()``) or any ELBO of Pyro's.
        optimizer: a name or class of ``torch.optim``, or a function of the parameters that returns an optimiser.
        learning_rate: None for 0.02 with Adagrad (as in the paper) and torch's default elsewhere.
        learning_rate_schedule: a function of the optimiser that returns a scheduler of ``torch.optim.lr_scheduler``,
            such as ``functools.partial(CosineAnnealingLR, T_max=100)``; or a number, by which the rate is multiplied
            after each epoch. ``ReduceLROnPlateau``, with mode="max" and threshold_mode="abs", is shown each
            evaluation's bound, of the validation data if there are any, else of the training data.
        schedule_every: what a unit of the schedule is, an "epoch" or a "step".
        ema_decay: d, above 0 and below 1, such as 0.999: keep an exponential moving average of the parameters, which
            looks back about 1 / (1 - d) steps (the plain mean until there are as many). It is what is evaluated, kept
            as the best, and left in the program at the end.
        batch_size: M, of all processes together; an iterable brings its own, of which each process takes its part. (A
            DataLoader with torch's DistributedSampler gives each process batches of its own, taken whole.)
        num_samples: training samples to see, the paper's x axis, counted from the start of the run (the batch that
            reaches them is the last); or
        epochs: passes through the data. One of the two.
        test: data to evaluate on, if ``data`` is no data set.
        valid: data to stop early on, if ``data`` is no data set.
        binarize: "dynamic" draws grey levels that a binary site observes anew at each read; "none" refuses them; None
            as the data set says, else "dynamic".
        seed: of every random number of the run. The generators of the surrounding code are left as they were.
        device: where to train; None leaves the program where it is.
        compile: record the step as a graph after 10 steps and compile it after 1,000; compiled steps were 1.3 to 1.8
            times as fast as eager ones (docs/performance.md). It needs nothing of the program: what cannot be recorded
            runs eagerly, and a warning says why. The first steps give the same bits as ``compile=False``, compiled ones
            the same numbers but for rounding.
        run_dir: a new directory for configuration, metrics and checkpoints. A process that torchrun started again after
            a failure goes on from the checkpoint in it.
        resume: go on from the checkpoint in ``run_dir``, bit for bit as if the run had never stopped; a directory
            without one starts from scratch. Settings must be those of the run, except that the budget may be raised.
        progress: show a bar if standard error is a terminal.
        evaluate_every: samples between evaluations (None: an epoch, or a hundredth of the budget if that is more).
        evaluation_size: evaluate on at most so many data of each split (the first ones).
        checkpoint_every: samples between checkpoints (None: at each evaluation); at least once a minute in any case.
        prior_scale: s of a prior N(0, s^2) on every parameter (maximum a posteriori; the paper's is 1). None: none.
            (A posterior over weights is the model's: ``pyro_vae.VAE(bayesian=True)``, :func:`pyro_vae.bayesian`.)
        kl_warmup: raise the weight of the KL term linearly from 0 to 1 over so many samples.
        free_bits: nats that the mean KL of each latent site may have at no cost (arXiv:1606.04934, eq. (15)). It is
            meant for sites that the guide draws in the model's order: of others log q - log p may be below 0. The mean
            is a minibatch's, so that the objective is no sum over data: several processes refuse it.
        kl_by_site: add to the history what each latent site costs, as "train_kl_z", "test_kl_z" and so on: see
            :func:`pyro_vae.evaluation.evaluate_kl`.
        max_grad_norm: clip the gradient of the mean loss, in nats per datum, to this Euclidean norm.
        trim_padding: leave out steps that are padding in all sequences of a minibatch, where one long sequence has made
            them all long: of T stored steps it keeps T, T / sqrt(2), T / 2 and so on, as many as its longest needs. It
            is cut from x, its mask, exogenous ``inputs``, and every argument that has x's first two axes and is 0 in
            all steps beyond the lengths (of an iterable's batches, from the first three). For programs that take any
            number of steps. Steps of the whole length are compiled, those of others captured.
        patience: stop after so many evaluations without a better validation bound, and return to the best parameters.
        tensorboard: write TensorBoard events into ``run_dir`` (needs the extra ``pyro-vae[tensorboard]``).
        trained: "all" parameters, or those of the "guide" alone: what the model's density depends on stays as it is.
        evaluate_with: the objective whose bound is evaluated, for curves of different objectives that can be compared;
            None: the one that is trained.
        precision: "full" is that of the parameters; "bf16" takes matrix products and convolutions in bfloat16, with
            weights, gradients, densities and all sums as they are.

    Returns:
        The program, trained, and the history of its bounds.

    Raises:
        ValueError: an argument, the data or the program is not as stated; the message says what was expected and came.
        RunDirectoryError: ``run_dir`` is in use or holds something else.
        CheckpointError: the checkpoint is corrupt, or of another run, architecture or newer version.
        NonFiniteLossError: the loss became NaN or infinite; the last good checkpoint is kept.
        TrainingInterrupted: Ctrl-C or SIGTERM, after a checkpoint was saved.

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.VAE(data_shape=(8, 8), latent_dim=2, hidden_dims=(16,))
        >>> run = fit(vae, pv.load_dataset("digits"), epochs=2)
        >>> run.samples, len(run.history)
        (2594, 2)
    """
    settings = Settings(
        optimizer=optimizer_name(optimizer),
        learning_rate=learning_rate,
        learning_rate_schedule=schedule_name(learning_rate_schedule),
        schedule_every=schedule_every,
        ema_decay=ema_decay,
        batch_size=batch_size,
        num_samples=num_samples,
        epochs=epochs,
        binarize=binarize,
        seed=seed,
        evaluate_every=evaluate_every,
        evaluation_size=evaluation_size,
        checkpoint_every=checkpoint_every,
        prior_scale=prior_scale,
        kl_warmup=kl_warmup,
        free_bits=free_bits,
        kl_by_site=kl_by_site,
        max_grad_norm=max_grad_norm,
        trim_padding=trim_padding,
        patience=patience,
        trained=trained,
        precision=precision,
    )
    directory = None if run_dir is None else RunDirectory(Path(run_dir))
    if directory is None and (resume or tensorboard):
        raise ValueError("resume and tensorboard need a run_dir")
    bridged, team = as_program(program), ranks()
    if device is None and team.size > 1 and device_of(bridged)[0].type == "cuda":
        device = "cuda"  # the process's own
    if device is not None:
        move_to(bridged, device)
    with team.one_warning(), seeded(settings.seed):
        learner = SGVB() if objective is None else objective
        how = optimizer, learning_rate_schedule
        trainer = _Trainer(bridged, learner, evaluate_with, how, settings, team, told=program)
        try:
            trainer.open(data, test, valid, compile)
        except BaseException:
            trainer.untell()
            raise
    with team.one_warning(), seeded(team.seed(settings.seed)), contextlib.ExitStack() as stack:
        stack.enter_context(trainer.kl_terms())
        if directory is not None:
            team.from_first(lambda: stack.enter_context(directory.locked()))
            trainer.attach(directory, resume or any(team.gather(restarted())), program, data)
            if tensorboard:
                team.from_first(
                    lambda: trainer.show(stack.enter_context(_tensorboard(directory, trainer.position.samples)))
                )
        stack.enter_context(pyro.validation_enabled(False))
        stack.enter_context(_held_fixed(bridged, trainer.parameters, trainer.trained))
        trainer.train(progress)
    position = trainer.position
    return Run(
        program,
        position.history,
        position.samples,
        position.stopped_early,
        None if directory is None else directory.path,
        position.best_bound,
        trainer.step.path,
    )


def _number_of(inputs: Inputs) -> int | None:
    """How many data there are; None if their iterable does not say."""
    if isinstance(inputs.data, TensorData):
        return len(inputs.data)
    try:
        return len(inputs.data.batches.dataset)  # type: ignore[attr-defined]
    except (AttributeError, TypeError):
        return None


def _parameters_of(module: torch.nn.Module) -> set[int]:
    return {id(tensor) for tensor in module.parameters()}


@contextlib.contextmanager
def _held_fixed(program: Program, parameters: Mapping[str, Tensor], trained: Mapping[str, Tensor]) -> Iterator[None]:
    """No gradients for the parameters that are not trained, and evaluation mode for modules that have no others."""
    fixed = [tensor for name, tensor in parameters.items() if name not in trained]
    known = {id(tensor) for tensor in fixed}
    modules = [m for module in program.modules().values() for m in module.modules()]
    whole = [m for m in modules if known and _parameters_of(m) and _parameters_of(m) <= known]
    quiet = [part for m in whole for part in m.modules() if part.training]
    for tensor in fixed:
        tensor.requires_grad_(False)
    for part in quiet:
        part.training = False
    try:
        with warnings.catch_warnings():
            if fixed:  # as is meant here
                warnings.filterwarnings("ignore", message=".* was not registered in the param store because requires_")
            yield
    finally:
        for tensor in fixed:
            tensor.requires_grad_(True)
        for part in quiet:
            part.training = True


def require_objective(objective: Any, argument: str = "objective") -> None:
    """Refuse what cannot be an objective.

    Raises:
        ValueError: it is a class, or has no loss to take a step by.
    """
    takes_steps = any(hasattr(objective, method) for method in ("loss_and_grads", "differentiable_loss"))
    if isinstance(objective, type) or not takes_steps:
        raise ValueError(f"{argument}: expected one such as pyro_vae.SGVB() or an ELBO of Pyro's, got {objective!r}")


def _require_usable(objective: Any, argument: str = "objective", *, bound: bool = False) -> None:
    require_objective(objective, argument)
    name = type(objective).__name__
    if bound and not getattr(objective, "has_bound", True):
        raise ValueError(f"{argument}: expected an objective with a bound, such as pyro_vae.SGVB(), got {objective!r}")
    if not isinstance(objective, Objective) and name.startswith(("Jit", "ReweightedWakeSleep")):
        raise ValueError(
            f"{argument}: Pyro's {name} has a protocol of its own that fit does not speak; Trace_ELBO, "
            "TraceMeanField_ELBO, TraceGraph_ELBO, TraceEnum_ELBO, RenyiELBO and pyro_vae.ReweightedWakeSleep work"
        )


class _Trainer:
    """A run in progress: what is trained, by what, on what, and how far it is."""

    def __init__(
        self,
        program: Program,
        objective: Any,
        evaluate_with: Any,
        how: tuple[OptimizerLike, ScheduleLike | None],
        settings: Settings,
        ranks: Ranks,
        told: Any,
    ) -> None:
        self.told, self._is_told = told, False
        self.program, self.objective, self.settings, self.ranks = program, objective, settings, ranks
        self._make_optimizer, self._make_schedule = how
        self.position = _Position()
        self.directory: RunDirectory | None = None
        self.board: Any = None
        self.best: dict[str, Tensor] = {}
        _require_usable(objective)
        self.has_bound = getattr(objective, "has_bound", True)
        self.evaluated = evaluate_with if evaluate_with is not None else objective if self.has_bound else None
        if self.evaluated is not None:
            _require_usable(self.evaluated, "evaluate_with", bound=True)
        if self.evaluated is not None and not program.has_guide:
            raise ValueError(
                f"expected a program with a guide, Program(model, guide), for {self.evaluated!r}; got {program!r}, "
                "which only MCEM() trains"
            )
        if settings.kl_by_site and not program.has_guide:
            raise ValueError(f"kl_by_site: expected a program with a guide, Program(model, guide), got {program!r}")
        if self.evaluated is None and settings.patience is not None:
            raise ValueError(f"patience: {type(objective).__name__} has no bound to stop early on; see evaluate_with")
        if settings.trained == "guide" and not self.has_bound:
            raise ValueError(
                f'trained="guide": {type(objective).__name__} trains no guide; expected one such as SGVB()'
            )
        for name, tensor in (("kl_warmup", "kl_weight"), ("free_bits", "free_bits")):
            if getattr(settings, name) is not None and not isinstance(getattr(objective, tensor, None), Tensor):
                raise ValueError(f"{name}: expected an objective with a {tensor}, got {objective!r}")
        if ranks.size > 1 and settings.free_bits is not None:
            raise ValueError(f"free_bits: expected one process, which knows a minibatch's mean KL, got {ranks.size}")
        if ranks.size > 1 and isinstance(objective, MCEM) and objective.persistent is not False:
            raise ValueError(
                "MCEM keeps the chains of all data in one process: expected one process, or MCEM(persistent=False, "
                f"num_transitions=...), whose chains begin at the prior; got {ranks.size} processes"
            )

    # Setting up -------------------------------------------------------------------------------------------------------

    def open(self, data: Any, test: Any, valid: Any, compile: bool) -> None:
        """Check the data against the program, and make the optimiser and the step."""
        s = self.settings
        if isinstance(self.objective, Objective):
            self.objective.reset()  # it may have served before
        self.train_inputs = self._checked_on_fewer(self._stated(self._inputs(data, "train")))
        self._require_stated_size()
        self.test_inputs = self._held_out(data, test, "test")
        self.valid_inputs = self._held_out(data, valid, "valid") if s.patience or valid is not None else None
        self.every = self._default_rhythm() if s.evaluate_every is None else s.evaluate_every
        if s.patience is not None and self.valid_inputs is None:
            raise ValueError("patience: expected validation data (valid=...) to stop early on, got none")
        self.parameters = self.program.named_parameters()
        if not self.parameters:
            raise ValueError("the program has nothing to train: no pyro.param, pyro.module or module parameters")
        self.ranks.copy_first(self._model_tensors().values())
        for name, tensor in self._terms().items():  # a CUDA graph reads nothing but its own device
            setattr(self.objective, name, tensor.to(next(iter(self.parameters.values())).device))
        self.trained = self._guide_parameters() if s.trained == "guide" else self.parameters
        self.optimizer: Optimizer = make_optimizer(self._make_optimizer, list(self.trained.values()), s.learning_rate)
        self.schedule = None if self._make_schedule is None else Schedule(self._make_schedule, self.optimizer)
        if self.schedule is not None and self.schedule.by_bound:
            self._require_a_bound_to_wait_for()
        self.average = None if s.ema_decay is None else Average(self.trained, s.ema_decay)
        buffers = self.program.named_buffers().values()
        self.exchange = Exchange(self.ranks, list(self.trained.values()), buffers) if self.ranks.size > 1 else None
        if s.prior_scale is not None and (shared := self.train_inputs.check.global_latents):
            raise ValueError(
                f"prior_scale: expected parameters without a posterior, got latents {list(shared)}, which have priors "
                "of their own; it would be on their posterior's parameters"
            )
        prior_precision = 0.0 if s.prior_scale is None else 1 / (s.prior_scale**2 * self._num_data())
        parts = (self.program, self.objective, self.optimizer, self.trained)
        options: dict[str, Any] = {
            "prior_precision": prior_precision,
            "max_grad_norm": s.max_grad_norm,
            "precision": s.precision,
            "exchange": self.exchange,
        }
        self.step = (
            CompiledStep(*parts, **options, shapes=self._usual_shapes()) if compile else EagerStep(*parts, **options)
        )
        if s.trim_padding:
            self._trim()

    def _trim(self) -> None:
        """Read minibatches without the steps that are padding in all of their sequences."""
        rows = isinstance(self.train_inputs.data, TensorData)  # without them it keeps no chains
        if rows and isinstance(self.objective, MCEM) and self.objective.persistent is not False:
            raise ValueError(
                "trim_padding: MCEM keeps chains of the longest sequence's steps; expected MCEM(persistent=False, "
                "num_transitions=...)"
            )
        self.train_inputs = self.train_inputs.trimming(self.program)
        for name in ("test_inputs", "valid_inputs"):
            if (inputs := getattr(self, name)) is not None:
                setattr(self, name, inputs.trimming(self.program))

    def _require_a_bound_to_wait_for(self) -> None:
        expected = "learning_rate_schedule: expected a bound for ReduceLROnPlateau to wait for"
        if self.evaluated is None:
            raise ValueError(f"{expected}, got {type(self.objective).__name__}, which has none; see evaluate_with")
        if self.valid_inputs is None and not isinstance(self.train_inputs.data, TensorData):
            raise ValueError(f"{expected}: of validation data (valid=...), for an iterable's is not known")

    def _terms(self) -> dict[str, Tensor]:
        """The weights of the objective's KL terms that a run may change."""
        found = {name: getattr(self.objective, name, None) for name in ("kl_weight", "free_bits")}
        return {name: tensor for name, tensor in found.items() if isinstance(tensor, Tensor)}

    @contextlib.contextmanager
    def kl_terms(self) -> Iterator[None]:
        """The KL terms as the run wants them; the objective may serve again."""
        kept = {name: tensor.clone() for name, tensor in self._terms().items()}
        if self.settings.free_bits is not None:
            self.objective.free_bits.fill_(self.settings.free_bits)
        try:
            yield
        finally:
            for name, tensor in kept.items():
                getattr(self.objective, name).copy_(tensor)

    def _usual_shapes(self) -> list[torch.Size]:
        """Shapes of the tensors of a batch that is not short."""
        args, kwargs = self.train_inputs.first()
        data, tensors = self.train_inputs.data, [*args, *kwargs.values()]
        size = min(self.settings.batch_size, len(data)) if isinstance(data, TensorData) else len(tensors[0])
        own = self._own_rows(size)
        return [torch.Size((own.stop - own.start, *tensor.shape[1:])) for tensor in tensors]

    def _own_rows(self, count: int) -> slice:
        """Which rows of a minibatch this process takes: its part, or the first one where that is empty."""
        own = slice(0, count) if self._is_sharded else self.ranks.part(count)
        return own if own.start < own.stop else slice(0, 1)

    @property
    def _is_sharded(self) -> bool:
        return is_sharded(getattr(self.train_inputs.data, "batches", None))

    def _checked_on_fewer(self, inputs: Inputs) -> Inputs:
        """Whether the program's plate states N does not show on a batch that is all of the data; on a part it does."""
        if self.ranks.size == 1:
            return inputs
        args, kwargs = inputs.first()
        few = slice(0, max(1, batch_size_of(args, kwargs) - 1))
        part = [tensor[few] for tensor in args], {name: tensor[few] for name, tensor in kwargs.items()}
        return replace(inputs, check=check_program(self.program, *part))

    def _stated(self, inputs: Inputs) -> Inputs:
        """Tell a program that wants to know how many data there are; it is looked at anew then."""
        unknown = bool(inputs.check.global_sites) and getattr(self.told, "num_data", 0) is None
        if not unknown or (count := _number_of(inputs)) is None:
            return inputs
        self.told.num_data, self._is_told = count, True
        return replace(inputs, check=check_program(self.program, *inputs.first()))

    def untell(self) -> None:
        """Forget the number of data, of a run that did not begin."""
        if self._is_told:
            self.told.num_data = None

    def _require_stated_size(self) -> None:
        """With global latents, the loss of a minibatch is that of all data, whose number the data plate must state."""
        check, count = self.train_inputs.check, _number_of(self.train_inputs)
        if not check.global_sites or check.full_size == count or (count is None and check.full_size > check.batch_size):
            return
        size = "N" if count is None else count
        raise ValueError(
            f"sites {list(check.global_sites)} are outside the data plate, so that a minibatch's loss stands for the "
            f'whole data set: expected the plate "data" to state its {size} data, as by '
            f'pyro.plate("data", {size}, subsample=torch.arange(len(x))) or, in a model of this package, by '
            f"num_data={size}; it states {check.full_size}"
        )

    def _guide_parameters(self) -> dict[str, Tensor]:
        return guide_parameters(self.program, self.parameters, *self.train_inputs.first())

    def _inputs(self, data: Any, split: str) -> Inputs:
        s = self.settings
        return open_inputs(self.program, data, binarize=s.binarize, split=split, batch_size=s.batch_size)

    def _held_out(self, data: Any, given: Any, split: str) -> Inputs | None:
        if given is not None:
            return self._inputs(given, split)
        return self._inputs(data, split) if isinstance(data, Dataset) else None

    def _num_data(self) -> int:
        count = _number_of(self.train_inputs)
        if count is None:
            raise ValueError("prior_scale: the number of data must be known; this iterable does not say it")
        return count

    def attach(self, directory: RunDirectory, resume: bool, program: Any, data: Any) -> None:
        """Start a new run directory, or go on from the checkpoint in it."""
        self.directory = directory
        config, checkpoint = self.ranks.from_first(lambda: self._prepare(directory, resume, program, data))
        self.every = config["evaluate_every"]
        if checkpoint is not None:
            self._load(checkpoint)
        self.ranks.from_first(lambda: self._begin(directory, config))
        self._save()

    def _prepare(
        self, directory: RunDirectory, resume: bool, program: Any, data: Any
    ) -> tuple[dict[str, Any], Checkpoint | None]:
        config = self._config(program, data)
        if resume and directory.config_file.exists():
            stored = directory.read_config()
            require_same_run(stored, config, directory.path)
            config["evaluate_every"] = stored.get("evaluate_every", self.every)
        else:
            directory.require_new()
        return config, directory.load() if resume and directory.state_file.exists() else None

    def _begin(self, directory: RunDirectory, config: dict[str, Any]) -> None:
        directory.write_config(config)
        directory.write_metrics(self.position.history)

    def show(self, board: Any) -> None:
        """Write events to a TensorBoard writer from now on."""
        self.board = board

    def _config(self, program: Any, data: Any) -> dict[str, Any]:
        return {
            "pyro_vae_version": pyro_vae.__version__,
            "program": describe(program),
            "objective": describe(self.objective),
            "trains_guide": self.has_bound,
            "evaluate_with": None if self.evaluated is None else describe(self.evaluated),
            "parameters": {name: list(tensor.shape) for name, tensor in self.parameters.items()},
            "data": describe_data(data, self.train_inputs),
            "fit": vars(self.settings),
            "evaluate_every": self.every,
            "environment": describe_environment(self.parameters, isinstance(self.step, CompiledStep), self.ranks.size),
        }

    # The loop ---------------------------------------------------------------------------------------------------------

    def train(self, progress: bool) -> None:
        """Take steps until the budget is spent; evaluate, save and stop on the way as the settings say."""
        self._saved_at = time.monotonic()
        bar = progress_bar(progress and self.ranks.first, self._budget(), self.position.samples)
        with bar as self._report, Signals() as self._signals:
            if self.exchange is not None:
                self.exchange.asks = self._asks
            while not self._finished():
                for batch in self._rest_of_epoch():
                    self._take_step(batch)
                    self._evaluate_and_save_if_due()
                    if (received := self._received()) is not None:
                        self._interrupt(received)
                    if self._finished():
                        break
                else:
                    if self.position.batch == 0:
                        raise ValueError(
                            f"the iterable gave no batch in epoch {self.position.epoch}: expected one that can be "
                            "iterated over again, such as a DataLoader or a list"
                        )
                    self.position.epoch, self.position.batch = self.position.epoch + 1, 0
                    if self.schedule is not None and self.settings.schedule_every == "epoch":
                        self.schedule.step()
                    if self.every is None:
                        self._evaluate()
            self._finish()
            if received := next(filter(None, self.ranks.gather(self._signals.received)), None):
                self._interrupt(received)

    def _asks(self) -> Asked:
        received = self._signals.received
        save = self.ranks.first and self._is_long_unsaved()
        return Asked(received == signal.SIGINT, received == signal.SIGTERM, save, self.step.refused is not None)

    def _received(self) -> int | None:
        """The signal to stop by, if this process has received one, or one of those that it works with."""
        return self._signals.received if self.exchange is None else self.exchange.agreed.signal

    def _is_long_unsaved(self) -> bool:
        return time.monotonic() - self._saved_at > _SECONDS_BETWEEN_CHECKPOINTS

    def _take_step(self, batch: Batch) -> None:
        position, started = self.position, time.perf_counter()
        if self.settings.kl_warmup is not None:
            self.objective.kl_weight.fill_(min(1.0, position.samples / self.settings.kl_warmup))
        try:
            loss = self.step(batch)
        except NonFiniteLossError as error:
            raise NonFiniteLossError(
                f"epoch {position.epoch}, batch {position.batch}, after {position.samples:,} samples: "
                f"{error}{self._kept()}"
            ) from None
        if self.exchange is not None and self.exchange.agreed.eager:
            self._refuse_with_the_others()
        size = batch.rows if self.exchange is None else self.exchange.rows
        position.samples += size
        position.batch += 1
        position.steps, position.refused = self.step.taken, self.step.refused
        if self.average is not None:
            self.average.update(position.steps)
        if self.schedule is not None and self.settings.schedule_every == "step":
            self.schedule.step()
        if not self.has_bound:
            position.log_joint = (position.log_joint * position.since_row - loss * size) / (position.since_row + size)
            position.since_row += size
        position.seconds += time.perf_counter() - started
        self._newest = size

    def _refuse_with_the_others(self) -> None:
        """Eager steps where another process cannot do otherwise: paths differ by rounding, and parameters must not."""
        if self.step.refused is None:
            assert isinstance(self.step, CompiledStep)
            self.step.refuse("another process's step cannot be recorded")

    def _evaluate_and_save_if_due(self) -> None:
        save_every = self.settings.checkpoint_every
        self._report(self.position.samples, None)
        if self.every is not None and self._crossed(self.every):
            self._evaluate()
        due = save_every is not None and self._crossed(save_every)
        if due or (self._is_long_unsaved() if self.exchange is None else self.exchange.agreed.save):
            self._save()

    def _crossed(self, every: int) -> bool:
        return self.position.samples // every > (self.position.samples - self._newest) // every

    def _default_rhythm(self) -> int | None:
        """Samples between evaluations; None for the end of each epoch, where an epoch's length is not known."""
        data = self.train_inputs.data
        return max(len(data), (self._budget() or 0) // 100) if isinstance(data, TensorData) else None

    def _budget(self) -> int | None:
        s = self.settings
        if s.num_samples is not None or s.epochs is None:
            return s.num_samples
        return s.epochs * len(self.train_inputs.data) if isinstance(self.train_inputs.data, TensorData) else None

    def _finished(self) -> bool:
        budget, epochs = self._budget(), self.settings.epochs
        spent = self.position.samples >= budget if budget is not None else self.position.epoch >= (epochs or 0)
        return spent or self.position.stopped_early

    def _rest_of_epoch(self) -> Iterator[Batch]:
        """The minibatches, or this process's part of each; only what is taken is read."""
        data, position, s = self.train_inputs.data, self.position, self.settings
        if isinstance(data, TensorData):
            for index in data.shuffle(s.batch_size, s.seed, position.epoch, skip=position.batch):
                own = index[self._own_rows(len(index))]
                yield self._batch(data.rows(own), len(index), own.to(data.reader.device))
            return
        if not hasattr(self, "_replay"):
            self._replay = _replay(data, s.seed, position.epoch, position.batch)
        for columns in next(self._replay):
            count = len(next(iter(columns.values())))
            own_rows = self._own_rows(count)
            yield self._batch(data.reader({name: c[own_rows] for name, c in columns.items()}), count)

    def _batch(self, columns: Columns, count: int, index: Tensor | None = None) -> Batch:
        """This process's part of a minibatch of so many rows."""
        args, kwargs = self.train_inputs.call(columns)
        num_data = self.train_inputs.check.data_of(len(next(iter(columns.values()))))
        return Batch(args, kwargs, num_data, index, stands_in=count <= self.ranks.rank and not self._is_sharded)

    def _finish(self) -> None:
        self._evaluate(on_rhythm=False)
        self._save()
        if self.best:
            copy_into(self._model_tensors(), self.best)
        elif self.average is not None:
            copy_into(dict(self.trained), self.average.values)

    # Evaluating -------------------------------------------------------------------------------------------------------

    def _evaluate(self, on_rhythm: bool = True) -> None:
        """Add a row to the history, if this position has none yet.

        Only evaluations on the rhythm count for early stopping and are saved: where a budget ends must not matter to a
        run that goes on.
        """
        history = self.position.history
        if history and history[-1]["samples"] == self.position.samples:
            return
        self.step.compare()
        self.position.refused = self.step.refused
        with contextlib.nullcontext() if self.average is None else self.average.in_place():
            row = self._row()
            history.append(row := self.ranks.from_first(lambda: row))  # every process has a clock of its own
            if on_rhythm and self.settings.patience is not None:
                self._note_best(row["valid_bound"])
        if on_rhythm:
            self.position.log_joint, self.position.since_row = 0.0, 0
            self._show_schedule(row)
        if self.directory is not None and self.ranks.first:
            self.directory.append_metrics(row)
        if self.board is not None:
            for name, value in row.items():
                if (name.endswith(("bound", "per_step")) or "_kl_" in name) and value is not None:
                    self.board.add_scalar(name, value, self.position.samples)
        self._report(self.position.samples, row)
        if on_rhythm and self.settings.checkpoint_every is None:
            self._save()

    def _show_schedule(self, row: Mapping[str, Any]) -> None:
        if self.schedule is not None and self.schedule.by_bound:
            self.position.seen_bounds.append(row.get("valid_bound", row["train_bound"]))
            self.schedule.see(self.position.seen_bounds[-1])

    def _row(self) -> dict[str, Any]:
        position = self.position
        train = self._bound(self.train_inputs) if isinstance(self.train_inputs.data, TensorData) else None
        test = self._bound(self.test_inputs)
        row: dict[str, Any] = {"samples": position.samples, "seconds": position.seconds}
        if not self.has_bound:
            row["train_log_joint"] = position.log_joint if position.since_row else None
        if train is not None and self.train_inputs.check.global_sites:
            row["dataset_bound"] = train.mean * self._num_data()
        row |= _columns("train", train) | _columns("test", test)
        if self.valid_inputs is not None:
            row |= _columns("valid", self._bound(self.valid_inputs))
        return row | (self._kl_by_site() if self.settings.kl_by_site else {})

    def _kl_by_site(self) -> dict[str, float]:
        splits = {"train": self.train_inputs, "test": self.test_inputs, "valid": self.valid_inputs}
        size, seed = self.settings.evaluation_size, self.settings.seed
        return {
            f"{split}_kl_{site}": kl
            for split, inputs in splits.items()
            if inputs is not None and isinstance(inputs.data, TensorData)
            for site, kl in evaluate_kl(self.program, inputs, num_data=size, seed=seed).items()
        }

    def _bound(self, inputs: Inputs | None) -> BoundEstimate | None:
        if inputs is None or self.evaluated is None:
            return None
        s = self.settings
        num_data = s.evaluation_size if isinstance(inputs.data, TensorData) else None
        held_out = inputs is not self.train_inputs
        return evaluate_bound(self.program, inputs, self.evaluated, num_data=num_data, predictive=held_out, seed=s.seed)

    def _note_best(self, bound: float) -> None:
        position, bound = self.position, -math.inf if math.isnan(bound) else bound
        if position.best_bound is None or bound > position.best_bound:
            position.best_bound, position.evaluations_since_best = bound, 0
            self.best = {name: tensor.detach().clone() for name, tensor in self._model_tensors().items()}
        else:
            position.evaluations_since_best += 1
            position.stopped_early = position.evaluations_since_best >= (self.settings.patience or math.inf)

    # Checkpoints ------------------------------------------------------------------------------------------------------

    def _model_tensors(self) -> dict[str, Tensor]:
        return model_tensors(self.program, self.parameters)

    def _save(self) -> None:
        self._saved_at = time.monotonic()
        if self.directory is None:
            return
        for name, tensor in self.parameters.items():
            if not tensor.isfinite().all():
                raise NonFiniteLossError(
                    f"parameter '{name}' became NaN or infinite by a gradient, after {self.position.samples:,} "
                    f"samples{self._kept()}"
                )
        own = {"objective": self._objective_state(), "random": random_state.capture()}
        directory, everyones = self.directory, self.ranks.gather(_on_cpu(own))
        self.ranks.from_first(lambda: self._write(directory, everyones))

    def _write(self, directory: RunDirectory, everyones: list[dict[str, dict[str, Tensor]]]) -> None:
        parts = {
            "model": self._model_tensors(),
            "best": self.best,
            "average": {} if self.average is None else self.average.values,
            "optimizer": state_tensors(self.optimizer, list(self.trained)),
        }
        for rank, own in enumerate(everyones):
            parts |= {_of_rank(part, rank): named for part, named in own.items()}
        tensors = {f"{part}/{n}": t.detach() for part, named in parts.items() for n, t in named.items()}
        try:
            directory.save(Checkpoint(tensors, {"position": vars(self.position)}))
        except OSError as error:
            raise OSError(
                error.errno, f"could not write a checkpoint in {directory.path}: {error.strerror}{self._kept()}"
            ) from error

    def _load(self, checkpoint: Checkpoint) -> None:
        self.position = _Position(**checkpoint.state["position"])
        self.step.taken, self.step.refused = self.position.steps, self.position.refused
        copy_into(self._model_tensors(), checkpoint.part("model"))
        self.best = checkpoint.part("best")
        load_state(self.optimizer, list(self.trained), checkpoint.part("optimizer"))
        if self.average is not None:
            copy_into(self.average.values, checkpoint.part("average"))
        if self.schedule is not None:
            by_epoch = self.settings.schedule_every == "epoch"
            turns = self.position.epoch if by_epoch else self.position.steps
            self.schedule.replay(turns, self.position.seen_bounds)
        own = {part: checkpoint.part(_of_rank(part, self.ranks.rank)) for part in ("objective", "random")}
        if objective := own["objective"] or checkpoint.part("objective"):
            self.objective.load_state_dict(objective)
        if not own["random"]:  # the run had fewer processes
            with seeded(self.ranks.seed(self.settings.seed, self.position.samples)):
                own["random"] = random_state.capture()
        random_state.restore(own["random"])

    def _objective_state(self) -> dict[str, Tensor]:
        state_dict = getattr(self.objective, "state_dict", None)
        return state_dict() if callable(state_dict) else {}

    def _kept(self) -> str:
        if self.directory is None or not self.directory.state_file.exists():
            return ""
        return f"; the last good checkpoint is kept in {self.directory.path}"

    def _interrupt(self, number: int) -> None:
        name = signal.Signals(number).name
        message = f"stopped by {name} after {self.position.samples:,} samples"
        if self.directory is None:
            raise TrainingInterrupted(f"{message}; nothing was saved, for there is no run_dir", number)
        self._save()
        raise TrainingInterrupted(
            f"{message}; saved in {self.directory.path}: go on with resume=True, or "
            f"pyro-vae train --resume {self.directory.path}",
            number,
        )


def _of_rank(part: str, rank: int) -> str:
    """What a checkpoint calls a part that each process has of its own."""
    return part if rank == 0 else f"{part}-{rank}"


def _on_cpu(parts: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    return {part: {name: tensor.cpu() for name, tensor in named.items()} for part, named in parts.items()}


def _replay(data: BatchIterable, seed: int, epoch: int, batch: int) -> Iterator[Iterator[Columns]]:
    """The epochs of an iterable from a position on, not yet read; what came before is made again and left out.

    The iterable draws from a random stream of its own, so that its order does not depend on what training draws.
    """
    stream = random_state.Stream(seed)

    def one_epoch(number: int) -> Iterator[Columns]:
        if is_sharded(data.batches):
            data.batches.sampler.set_epoch(number)  # type: ignore[attr-defined]
        with stream.active():
            batches = data.raw()
        while True:
            with stream.active():
                columns = next(batches, None)
            if columns is None:
                return
            yield columns

    for number in range(epoch):
        for _ in one_epoch(number):
            pass
    # What is skipped is not read: reading may draw, and those draws are behind the training stream already.
    yield itertools.islice(one_epoch(epoch), batch, None)
    for number in itertools.count(epoch + 1):
        yield one_epoch(number)


def _columns(split: str, bound: BoundEstimate | None) -> dict[str, float | None]:
    """A bound as columns of the history; None for what is not known, since JSON has no NaN."""
    mean, error = (None, None) if bound is None else (bound.mean, bound.std_error)
    row = {f"{split}_bound": mean, f"{split}_bound_se": None if error is None or math.isnan(error) else error}
    per_step = {} if bound is None or bound.per_step is None else {f"{split}_bound_per_step": bound.per_step}
    return row | per_step


@contextlib.contextmanager
def _tensorboard(directory: RunDirectory, samples: int) -> Iterator[Any]:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError("tensorboard: expected the package to be installed: pip install tensorboard") from error
    with SummaryWriter(str(directory.path), purge_step=samples + 1) as writer:  # what a killed process wrote beyond
        yield writer
