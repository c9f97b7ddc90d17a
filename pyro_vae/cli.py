"""The command line, the only file that prints.

    pyro-vae train | evaluate | compare | sample | plot | forecast | smooth | filter | fill | datasets

Exit codes: 0 done; 1 an error of this program's own; 2 bad input, an unusable file or a loss that is not finite;
128 + n stopped by signal n (130 Ctrl-C, 143 SIGTERM). torch is imported inside the commands, so that ``--help`` is
quick.
"""

from __future__ import annotations

import functools
import inspect
import math
import os
import sys
import time
import tomllib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ParamSpec, TypeVar

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pyro_vae.arguments import one_of
from pyro_vae.cli_models import MODEL_OPTIONS, make_model, require_own_options, whole_numbers

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from pyro_vae.data import Dataset
    from pyro_vae.runs import StoredRun
    from pyro_vae.sequence_gallery import Findings, SequenceGallery
    from pyro_vae.training import Run

__all__ = ["app", "main"]

app = typer.Typer(
    name="pyro-vae",
    help="Auto-Encoding Variational Bayes in Pyro: train, score and look at variational auto-encoders.",
    epilog="Example: pyro-vae train --dataset digits --epochs 100 --run-dir runs/digits",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
console = Console(highlight=False)
errors = Console(stderr=True)

P = ParamSpec("P")
R = TypeVar("R")


@contextmanager
def _readable_errors() -> Iterator[None]:
    """Turn what goes wrong into one message and an exit code; never a traceback, unless PYRO_VAE_DEBUG is set."""
    shown = warnings.showwarning
    warnings.showwarning = lambda message, *_, **__: errors.print(f"[yellow]warning:[/] {escape(str(message))}")
    try:
        yield
    except typer.Exit:
        raise
    except KeyboardInterrupt as error:
        _fail(str(error) or "interrupted", 128 + getattr(error, "signal", 2))
    except (ValueError, OSError) as error:
        _fail(str(error), 2)
    except Exception as error:
        if os.environ.get("PYRO_VAE_DEBUG"):
            raise
        errors.quiet = False
        _fail(f"{type(error).__name__}: {error} (PYRO_VAE_DEBUG=1 shows where)", 1)
    finally:
        warnings.showwarning = shown


def _fail(message: str, code: int) -> None:
    errors.print("[bold red]error:[/]", end=" ")
    errors.print(message, markup=False, soft_wrap=True)
    raise typer.Exit(code)


def _is_first() -> bool:
    """Whether this process is alone, or the first of those that torchrun started."""
    if "RANK" not in os.environ:
        return True
    from pyro_vae.parallel import ranks

    return ranks().first


def _command(
    example: str, parallel: bool = False, name: str | None = None
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Register a command with an example in its help and readable errors.

    Of torchrun's processes the first one speaks for all, and does alone what is not parallel.
    """

    def register(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
            with _readable_errors():
                if not _is_first():
                    console.quiet, errors.quiet = True, not os.environ.get("PYRO_VAE_DEBUG")
                    if not parallel:
                        raise typer.Exit
                return function(*args, **kwargs)

        return app.command(name, epilog=f"Example: [cyan]{example}[/]")(wrapped)

    return register


def _read_config(context: typer.Context, file: Path | None) -> Path | None:
    """Make the values of a TOML file the defaults of the command's options."""
    if file is None or context.resilient_parsing:
        return file
    try:
        values = tomllib.loads(file.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise typer.BadParameter(f"cannot read {file}: {error}") from error
    known = {p.name: p for p in context.command.params if p.name not in (None, "config", "resume", "help")}
    defaults = {}
    for key, value in values.items():
        name = key.replace("-", "_")
        if name not in known:
            near = get_close_matches(name, [str(n) for n in known], n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise typer.BadParameter(f"unknown key {key!r} in {file}{hint}")
        if isinstance(value, dict):
            raise typer.BadParameter(f"{file}: expected a value for {key!r}, got a table")
        defaults[name] = [str(part) for part in value] if isinstance(value, list) else value
    context.default_map = {**(context.default_map or {}), **defaults}
    return file


_data = functools.partial(typer.Option, rich_help_panel="Data")
_model = functools.partial(typer.Option, rich_help_panel="Model")
_markov = functools.partial(typer.Option, rich_help_panel="Deep Markov model (--model deep-markov)")
_objective = functools.partial(typer.Option, rich_help_panel="Objective")
_training = functools.partial(typer.Option, rich_help_panel="Training")
_storage = functools.partial(typer.Option, rich_help_panel="Run directory")
_grid = functools.partial(typer.Option, rich_help_panel="Comparison")
_scoring = functools.partial(typer.Option, rich_help_panel="Scoring")

_ROOT_HELP = "Folder with the data sets, or where to download them to."
_BINARIZE_HELP = "'dynamic' draws grey levels anew at each read, 'none' refuses them; by default as the data set says."
_OBJECTIVE_HELP = "sgvb, iwae, dreg, renyi, vimco, wake-sleep, reweighted-wake-sleep or mcem; fivo of sequences."
_COMPARED_HELP = "NAME or NAME:key=value,key=value, such as sgvb or iwae:num_particles=10; repeat it. " + (
    "sgvb, iwae, dreg, renyi, vimco, wake-sleep, reweighted-wake-sleep or mcem; fivo of sequences."
)
_MAKING = ("model", *sorted({name for names in MODEL_OPTIONS.values() for name in names}))
_COMPARED_SETTINGS = (
    *("optimizer", "batch_size", "kl_warmup", "free_bits", "learning_rate_schedule", "ema_decay", "max_grad_norm"),
    *("trim_padding", "evaluate_every", "device"),
)
_OBJECTIVE_OPTIONS = (
    "num_particles",
    "estimator",
    "alpha",
    "gradient",
    "insomnia",
    "num_leapfrog",
    "num_updates",
    "threshold",
    "resampling",
)
_LIKELIHOOD_HELP = (
    "bernoulli (binary data), gaussian, gaussian-shared, continuous-bernoulli, beta (data from 0 to 1),"
    + (" discretized-logistic (8-bit images) or negative-binomial (counts).")
)
_PRIOR_NAME_HELP = "p(z), of hierarchical p(z_L): standard, mixture, vamp or flow."
_COMPONENTS_HELP = "--prior mixture, vamp: how many components; by default 100, of vamp 500."
_PSEUDO_INPUTS_HELP = "--prior vamp: begin at random ones (the default) or at data of the training split."
_POSTERIOR_HELP = "diagonal, full, iaf or spline; laplace, logistic, student-t, cauchy, gumbel, exponential," + (
    " log-normal, gamma, beta, kumaraswamy or dirichlet."
)
_GUIDE_HELP = "st-r (the default), st-l, st-lr, mf-lr or mf-r; hierarchical: bottom-up (the default) or top-down."
_LAYERS_HELP = "hierarchical: dimensions of the layers of latents, that of the data first: 100,50."
_EMISSION_HELP = (
    "bernoulli, gaussian, student-t or poisson; by default bernoulli of data that are 0 and 1, else gaussian."
)
_METHOD_HELP = "importance (a lower bound on average), ais (likewise), posterior-density (an upper bound)" + (
    " or, of sequences, smc (a lower bound)."
)
_PARTICLES_HELP = "Draws or chains per datum (K); by default 1,000, of ais 16."
_HIDDEN_HELP = "Widths of the encoder's hidden layers: 500, or 500,200, or repeated; the decoder mirrors them."
_CHANNELS_HELP = "conv, resnet: channels of the levels, each of which halves the image; the decoder mirrors them."
_GUIDELESS = "--method ais --initial prior"
_METHOD_OPTIONS = ("defensive", "num_steps", "initial", "num_leapfrog")
_FILTER_OPTIONS = ("proposal", "resampling", "threshold", "num_repeats")
_KIND_HELP = "curves, samples, reconstructions, latents, manifold or traversals; may be repeated; by default all."
_PRIOR_HELP = "Maximum a posteriori: scale of a Gaussian prior on every parameter (the paper: 1)." + (
    " With --bayesian, of the weights' prior, by default 1."
)
_BAYESIAN_HELP = "Full variational Bayes (App. F): a posterior over the weights of the decoder, of all, or none."
_LOCAL_HELP = "--bayesian: draw the layers' outputs for each datum, not the weights (arXiv:1506.02557)."
_LEARN_HELP = "--bayesian: learn the scales of the weights' prior (empirical Bayes)."
_EVALUATE_HELP = "Samples between evaluations; by default an epoch, or a hundredth of the budget."
_CHECKPOINT_HELP = "Samples between checkpoints; by default at each evaluation, and once a minute."
_TRIM_HELP = "Leave out steps that are padding in all of a minibatch's sequences."
_EMA_HELP = "Evaluate and keep an exponential moving average of the weights: 0.999 looks back about 1,000 steps."
_ROWS_HELP = "Which sequences of the split: 0,1,2, or repeated; by default the first three."
_ARRAYS_HELP = "A .npz file; figures are written beside it. By default RUN/figures/"
_PATHS_HELP = "Draw from the paths of so many particles; by default from the guide itself, of the prior 1,000."
_PATH_PROPOSAL_HELP = "guide, or prior: a particle filter that needs no guide; by default the guide," + (
    " but where there are gaps only one that was trained on gaps."
)

DatasetName = Annotated[str, _data(help="A name (see `datasets`), a .npy, .npz or .csv file, or a folder of images.")]
DataRoot = Annotated[Path | None, _data(help=_ROOT_HELP, envvar="PYRO_VAE_DATA")]
Binarize = Annotated[str | None, _data(help=_BINARIZE_HELP)]
HiddenDims = Annotated[list[str], _model(help=_HIDDEN_HELP)]
Likelihood = Annotated[str, _model(help=_LIKELIHOOD_HELP)]
ModelName = Annotated[str, _model(help="vae, hierarchical, or deep-markov of sequences.")]
ModelDim = Annotated[int | None, _model(help="Dimension of z, of z_t; by default 20, of deep-markov 100.")]
Activation = Annotated[str, _model(help="tanh, relu or softplus.")]
Network = Annotated[str, _model(help="mlp; of images conv or resnet.")]
Channels = Annotated[list[str], _model(help=_CHANNELS_HELP)]
PriorName = Annotated[str, _model(help=_PRIOR_NAME_HELP)]
NumComponents = Annotated[int | None, _model(help=_COMPONENTS_HELP, min=1)]
PseudoInputs = Annotated[str | None, _model(help=_PSEUDO_INPUTS_HELP)]
PosteriorName = Annotated[str, _model(help=_POSTERIOR_HELP)]
LatentDims = Annotated[list[str], _model(help=_LAYERS_HELP)]
Bayesian = Annotated[str, _model(help=_BAYESIAN_HELP)]
LocalReparameterization = Annotated[bool, _model("--local-reparameterization", help=_LOCAL_HELP)]
LearnPrior = Annotated[bool, _model("--learn-prior", help=_LEARN_HELP)]
TransitionDim = Annotated[int | None, _markov(help="Width of the transition's layers; by default 200.")]
EmissionDim = Annotated[int | None, _markov(help="Width of the emission's layers; by default 100.")]
RnnDim = Annotated[int | None, _markov(help="Width of the guide's recurrent network; by default 600.")]
GuideName = Annotated[str | None, _markov(help=_GUIDE_HELP)]
EmissionName = Annotated[str | None, _markov(help=_EMISSION_HELP)]
CellName = Annotated[str | None, _markov(help="tanh (the default), relu, gru or lstm.")]
NumFlows = Annotated[int | None, _markov(help="Layers of an inverse autoregressive flow; by default none.")]
Missing = Annotated[bool, _markov("--missing", help="Tell the guide which values were observed.")]
Init = Annotated[str, _model(help="default (torch's) or paper: N(0, 0.01).")]
OptimizerName = Annotated[str, _training(help="Any of torch.optim by name, such as adagrad or adam.")]
BatchSize = Annotated[int, _training(help="Data per step.")]
KLWarmup = Annotated[int | None, _objective(help="Raise the KL weight from 0 to 1 over so many samples.")]
FreeBits = Annotated[float | None, _objective(help="Nats of each latent site's KL that cost nothing.")]
MaxGradNorm = Annotated[float | None, _training(help="Clip the gradient to this norm.")]
TrimPadding = Annotated[bool, _training("--trim-padding", help=_TRIM_HELP)]
RateSchedule = Annotated[float | None, _training(help="Factor of the rate after each epoch.")]
EMADecay = Annotated[float | None, _training(help=_EMA_HELP)]
EvaluateEvery = Annotated[int | None, _training(help=_EVALUATE_HELP)]
TrainingDevice = Annotated[str | None, _training(help="Such as cpu or cuda.")]
Method = Annotated[str, _scoring(help=_METHOD_HELP)]
ScoreParticles = Annotated[int | None, _scoring(help=_PARTICLES_HELP)]
Defensive = Annotated[float | None, _scoring(help="importance: share of draws from the prior.")]
NumSteps = Annotated[int | None, _scoring(help="ais: laws between start and posterior.")]
Initial = Annotated[str | None, _scoring(help="ais: start at draws of the guide or of the prior.")]
NumLeapfrog = Annotated[int | None, _scoring(help="ais, posterior-density: leapfrog steps of a transition.")]
Proposal = Annotated[str | None, _scoring(help="smc: propose by the guide or by the prior.")]
Resampling = Annotated[str | None, _scoring(help="smc: systematic or multinomial.")]
Threshold = Annotated[float | None, _scoring(help="smc: resample below this share of K, in effective sample size.")]
NumRepeats = Annotated[int | None, _scoring(help="smc: independent filters, whose estimates are averaged.", min=1)]
Root = Annotated[Path | None, typer.Option(help=_ROOT_HELP, envvar="PYRO_VAE_DATA")]
RunPath = Annotated[Path, typer.Argument(help="Directory of a run, as written by train.", metavar="RUN")]
Seed = Annotated[int, typer.Option(help="Seed of the random numbers.", min=0, max=2**32 - 1)]
Device = Annotated[str | None, typer.Option(help="Such as cpu or cuda.")]
Rows = Annotated[list[str] | None, typer.Option(help=_ROWS_HELP)]
Split = Annotated[str, typer.Option(help="train, valid or test.")]
Draws = Annotated[int, typer.Option(help="Draws of each sequence.", min=1)]
Particles = Annotated[int, typer.Option(help="Particles of the filter.", min=1)]
PathProposal = Annotated[str | None, typer.Option("--proposal", help=_PATH_PROPOSAL_HELP)]
PathParticles = Annotated[int | None, typer.Option(help=_PATHS_HELP, min=1)]
Variables = Annotated[list[str] | None, typer.Option(help="Which variables to draw: 0,3. By default the first six.")]
Latents = Annotated[
    list[str] | None, typer.Option(help="Which latents to draw: 0,3. By default the six that vary most.")
]


@_command("pyro-vae train --dataset mnist --latent-dim 20 --num-samples 1000000 --run-dir runs/mnist", parallel=True)
def train(
    context: typer.Context,
    dataset: DatasetName = "digits",
    root: DataRoot = None,
    binarize: Binarize = None,
    model: ModelName = "vae",
    latent_dim: ModelDim = None,
    hidden_dims: HiddenDims = ["500"],  # noqa: B006 - typer copies it
    likelihood: Likelihood = "bernoulli",
    activation: Activation = "tanh",
    init: Init = "default",
    network: Network = "mlp",
    channels: Channels = ["32,64"],  # noqa: B006
    prior: PriorName = "standard",
    num_components: NumComponents = None,
    pseudo_inputs: PseudoInputs = None,
    posterior: PosteriorName = "diagonal",
    latent_dims: LatentDims = ["100,50"],  # noqa: B006
    bayesian: Bayesian = "none",
    local_reparameterization: LocalReparameterization = False,
    learn_prior: LearnPrior = False,
    transition_dim: TransitionDim = None,
    emission_dim: EmissionDim = None,
    rnn_dim: RnnDim = None,
    guide: GuideName = None,
    emission: EmissionName = None,
    cell: CellName = None,
    num_flows: NumFlows = None,
    missing: Missing = False,
    objective: Annotated[str, _objective(help=_OBJECTIVE_HELP)] = "sgvb",
    num_particles: Annotated[int | None, _objective(help="Draws of z per datum and step (the paper's L).")] = None,
    estimator: Annotated[str | None, _objective(help="sgvb: A samples the KL term, B takes it in closed form.")] = None,
    alpha: Annotated[float | None, _objective(help="renyi: order of the bound, below 1.")] = None,
    gradient: Annotated[str | None, _objective(help="dreg: dreg or stl.")] = None,
    insomnia: Annotated[float | None, _objective(help="reweighted-wake-sleep: share of the wake phase.")] = None,
    num_leapfrog: Annotated[int | None, _objective(help="mcem: leapfrog steps of a transition.")] = None,
    num_updates: Annotated[int | None, _objective(help="mcem: updates for each minibatch's draws.")] = None,
    threshold: Annotated[float | None, _objective(help="fivo: resample below this share of K.")] = None,
    resampling: Annotated[str | None, _objective(help="fivo: systematic or multinomial.")] = None,
    kl_warmup: KLWarmup = None,
    free_bits: FreeBits = None,
    kl_by_site: Annotated[bool, _objective("--kl-by-site", help="Note the KL of each latent site.")] = False,
    prior_scale: Annotated[float | None, _objective(help=_PRIOR_HELP)] = None,
    optimizer: OptimizerName = "adagrad",
    learning_rate: Annotated[float | None, _training(help="By default 0.02 for adagrad, else torch's own.")] = None,
    batch_size: BatchSize = 100,
    num_samples: Annotated[int | None, _training(help="Budget in training samples; 1,000,000 if no --epochs.")] = None,
    epochs: Annotated[int | None, _training(help="Budget in passes through the data.")] = None,
    learning_rate_schedule: RateSchedule = None,
    ema_decay: EMADecay = None,
    max_grad_norm: MaxGradNorm = None,
    trim_padding: TrimPadding = False,
    patience: Annotated[int | None, _training(help="Stop after so many evaluations without a better bound.")] = None,
    evaluate_every: EvaluateEvery = None,
    seed: Annotated[int, _training(help="Seed of the random numbers.", min=0, max=2**32 - 1)] = 0,
    device: TrainingDevice = None,
    precision: Annotated[str, _training(help="full, or bf16 for the factors of matrix products.")] = "full",
    compile: Annotated[bool, _training(help="Record the step as a graph and, from 1,000 steps on, compile it.")] = True,
    run_dir: Annotated[Path | None, _storage(help="New directory of the run; by default runs/DATASET-TIME.")] = None,
    resume: Annotated[Path | None, _storage(help="Go on with the run in this directory, bit for bit.")] = None,
    checkpoint_every: Annotated[int | None, _storage(help=_CHECKPOINT_HELP)] = None,
    tensorboard: Annotated[bool, _storage("--tensorboard", help="Write TensorBoard events too.")] = False,
    config: Annotated[
        Path | None,
        _storage(
            help="TOML file of these options; the command line overrides it.", callback=_read_config, is_eager=True
        ),
    ] = None,
) -> None:
    """Train a variational auto-encoder, or a deep Markov model, by AEVB (arXiv:1312.6114, Algorithm 1).

    In several processes or machines: torchrun --nproc-per-node=4 -m pyro_vae train ...
    """
    options = {name: value for name, value in context.params.items() if name not in ("config", "context")}
    if resume is not None:
        _resume(context, options)
        return
    import torch

    import pyro_vae as pv
    from pyro_vae.parallel import ranks

    require_own_options(model, given := _set_by_user(context))
    learner = _make_objective(objective, {name: options[name] for name in _OBJECTIVE_OPTIONS})
    data = pv.load_dataset(dataset, root=root, binarize=binarize)  # type: ignore[arg-type]
    torch.manual_seed(seed)  # the initial parameters
    made = make_model(data, options, "model" in given)
    if model == "deep-markov" and not missing and _has_gaps(data):
        _say(f"{data.name} has gaps: with --missing the guide is told where")
    directory = run_dir or Path("runs", f"{data.name}-{ranks().from_first(lambda: time.strftime('%Y%m%d-%H%M%S'))}")
    _say(f"training {_described(made)} on {data.name} ({data.train.shape[0]:,} training {_units(data)}) in {directory}")
    budget = 1_000_000 if num_samples is None and epochs is None else num_samples
    passed = ("optimizer", "learning_rate", "batch_size", "epochs", "seed", "device", "evaluate_every")
    more = (
        "checkpoint_every",
        "prior_scale",
        "kl_warmup",
        "free_bits",
        "kl_by_site",
        "learning_rate_schedule",
        "ema_decay",
        "max_grad_norm",
        "trim_padding",
        "patience",
        "tensorboard",
        "precision",
        "compile",
    )
    settings = {name: options[name] for name in (*passed, *more)}
    if bayesian != "none":
        settings["prior_scale"] = None  # it is the weights'
    run = pv.fit(
        made,
        data,
        objective=learner,
        num_samples=budget,
        run_dir=directory,
        **settings,
    )
    _report_training(type(learner).__name__, run, directory)


def _set_by_user(context: typer.Context) -> set[str]:
    """The options that the command line or a configuration file gives."""
    given = ("COMMANDLINE", "DEFAULT_MAP")
    return {name for name in context.params if getattr(context.get_parameter_source(name), "name", "") in given}


def _described(model: Any) -> str:
    if _is_sequential(model):
        return f"a deep Markov model {model.data_dim} -> {model.latent_dim}, {model.config['emission']} emissions,"
    if hasattr(model, "latent_dims"):
        return f"a hierarchical VAE {tuple(model.data_shape)} -> {' -> '.join(map(str, model.latent_dims))}"
    return f"a VAE {tuple(model.data_shape)} -> {model.latent_dim}"


def _has_gaps(data: Dataset) -> bool:
    return any(data.observed(split) is not None for split in ("train", "valid", "test"))


def _units(data: Dataset) -> str:
    return "data" if data.train_lengths is None else "sequences"


def _is_sequential(model: Any) -> bool:
    from pyro_vae.models.state_space import StateSpaceModel

    return isinstance(model, StateSpaceModel)


def _say(text: str) -> None:
    """Print plain text: paths may look like markup, and must not be broken."""
    console.print(text, markup=False, soft_wrap=True)


def _make_objective(name: str, options: Mapping[str, Any]) -> Any:
    """The objective of a name, with the options that were given; one that it does not take is an error."""
    from pyro_vae.objectives import OBJECTIVES

    given = {option: value for option, value in options.items() if value is not None}
    return _require_options("--objective", name.lower(), OBJECTIVES, given)(**given)


def _require_options(flag: str, name: str, known: Mapping[str, Any], given: Mapping[str, Any]) -> Any:
    """What a name stands for, if it takes the options that were given."""
    taken = inspect.signature(known[one_of(flag, name, known)]).parameters
    flagged = {"num_particles", *_OBJECTIVE_OPTIONS, *_METHOD_OPTIONS, *_FILTER_OPTIONS}
    for option in given.keys() - taken.keys():
        flags = ", ".join(f"--{n.replace('_', '-')}" for n in taken if n in flagged) or "none"
        raise ValueError(f"--{option.replace('_', '-')} is not for {flag} {name}, whose options are: {flags}")
    return known[name]


def _given(context: typer.Context, names: Iterable[str]) -> dict[str, Any]:
    return {name: context.params[name] for name in names if context.params[name] is not None}


def _resume(context: typer.Context, options: Mapping[str, Any]) -> None:
    """Go on with a run from its directory: everything but the budget is read there."""
    import torch

    from pyro_vae.runs import StoredRun, build_model, build_objective, fit_settings
    from pyro_vae.training import fit
    from pyro_vae.training.checkpoint import RunDirectory, RunDirectoryError

    free = {"resume", "root", "num_samples", "epochs", "device", "tensorboard", "compile", "config"}
    given = {n for n in options if getattr(context.get_parameter_source(n), "name", "") == "COMMANDLINE"}
    if fixed := sorted(given - free):
        raise ValueError(
            f"--resume takes every setting but the budget from the run; got also --{fixed[0].replace('_', '-')}"
        )
    directory = RunDirectory(Path(options["resume"]))
    if not directory.path.is_dir():
        raise RunDirectoryError(f"expected the directory of a run, but there is no {directory.path}")
    config = directory.read_config()
    torch.manual_seed(config.get("fit", {}).get("seed", 0))  # the run may have been killed before its first checkpoint
    model = build_model(config, directory.path)
    data = StoredRun(directory.path, model, config, []).dataset(options["root"])
    settings = fit_settings(config, directory.path)
    learner = build_objective(config, directory.path)
    if options["num_samples"] is not None or options["epochs"] is not None:
        settings |= {"num_samples": options["num_samples"], "epochs": options["epochs"]}
    before = config.get("environment", {}).get("steps", "eager")
    run = fit(
        model,
        data,
        objective=learner,
        run_dir=directory.path,
        resume=True,
        device=options["device"],
        tensorboard=options["tensorboard"],
        compile=options["compile"] if "compile" in given else before == "compiled",
        **settings,
    )
    _report_training(type(learner).__name__, run, directory.path)


def _report_training(objective: str, run: Run, directory: Path) -> None:
    if not _is_first():
        return
    row = run.kept
    table = Table(title=f"after {row['samples']:,} training samples, {row['seconds']:.0f} s of training")
    quantity = "bound on log p(x)" if row.get("train_log_joint") is None else ""
    steps = ["nats per step"] if any(name.endswith("_per_step") for name in row) else []
    for column in (quantity, "nats per datum", "standard error", *steps):
        table.add_column(column, justify="right" if column.endswith(("datum", "error", "step")) else "left")
    if (whole := row.get("dataset_bound")) is not None:
        _say(f"bound on the log evidence of all training data: {whole:,.1f} nats; by datum:")
    for split in ("train", "valid", "test"):
        if (bound := row.get(f"{split}_bound")) is not None:
            error = row.get(f"{split}_bound_se")
            by_step = row.get(f"{split}_bound_per_step")
            cells = [] if by_step is None else [f"{by_step:.3f}"]
            table.add_row(split, f"{bound:.2f}", "" if error is None else f"{error:.2f}", *cells)
    if (log_joint := row.get("train_log_joint")) is not None:  # Monte Carlo EM has no bound
        table.add_row("train, log p(x, z)", f"{log_joint:.2f}", "")
    console.print(table)
    if "valid_bound" in row:
        console.print(
            f"{'stopped early: ' if run.stopped_early else ''}parameters are those of the best validation bound"
        )
    from pyro_vae.gallery import learning_curves

    _save(learning_curves(objective, run.history), directory / "figures" / "curves.png")
    scored = f"{directory} {_GUIDELESS}" if row.get("train_log_joint") is not None else directory
    then = "forecast" if _is_sequential(run.program) else "plot"
    _say(f"run directory: {directory}\nnext: pyro-vae evaluate {scored}\n      pyro-vae {then} {directory}")


@_command("pyro-vae evaluate runs/mnist --num-particles 5000", parallel=True)
def evaluate(
    context: typer.Context,
    run: RunPath,
    method: Method = "importance",
    num_particles: ScoreParticles = None,
    defensive: Defensive = None,
    num_steps: NumSteps = None,
    initial: Initial = None,
    num_leapfrog: NumLeapfrog = None,
    proposal: Proposal = None,
    resampling: Resampling = None,
    threshold: Threshold = None,
    num_repeats: NumRepeats = None,
    split: Annotated[str, typer.Option(help="train, valid or test.")] = "test",
    num_data: Annotated[int | None, typer.Option(help="Score only the first so many data.", min=1)] = None,
    batch_size: Annotated[int, typer.Option(help="Data at a time.")] = 100,
    trim_padding: Annotated[bool, typer.Option("--trim-padding", help=_TRIM_HELP)] = False,
    root: Root = None,
    device: Device = None,
    seed: Seed = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the scores to this file too.")] = None,
) -> None:
    """Score a run: its bound and its log p(x), with standard errors."""
    import pyro_vae as pv
    from pyro_vae.evaluation import METHODS
    from pyro_vae.experiments.comparison import write_json

    _require_folder("--json", json_file)
    options = _given(context, (*_METHOD_OPTIONS, *_FILTER_OPTIONS))
    _require_options("--method", method, METHODS, options)
    if num_particles is None and method == "importance":
        num_particles = 1000
    stored = _load(run, device)
    needs_guide = {"importance": True, "ais": initial != "prior", "smc": proposal != "prior"}
    if not stored.has_trained_guide and needs_guide.get(method, False):
        raise ValueError(f"{run} trained no guide to draw from: expected {_GUIDELESS} or --method posterior-density")
    data = stored.dataset(root).with_test(one_of("--split", split, ("train", "valid", "test")), num_data)
    held_out = split != "train"
    how: dict[str, Any] = {"seed": seed, "trim_padding": trim_padding}
    bound = pv.evaluate_bound(stored.program, data, predictive=held_out, **how) if stored.has_trained_guide else None
    options |= {"method": method, "num_particles": num_particles} | how
    score = pv.log_marginal(stored.program, data, batch_size=batch_size, **options)
    table = Table(title=f"{data.name}, {split}: {len(score.values):,} data")
    per_step = score.per_step
    for column in ("score", "nats per datum", "standard error", *(("nats per step", "its error") if per_step else ())):
        table.add_column(column, justify="left" if column == "score" else "right")
    if bound is not None:
        by_step = _cells((bound.per_step, bound.per_step_std_error))
        table.add_row("lower bound (SGVB)", f"{bound.mean:.2f}", f"{bound.std_error:.2f}", *by_step)
    chosen = "".join(f", {name}={value}" for name, value in score.options.items())
    label = f"log p(x), {method}{chosen}, K = {score.num_particles:,}"
    table.add_row(label, f"{score.mean:.2f}", f"{score.std_error:.2f}", *_cells(per_step or (None, None)))
    console.print(table)
    if not math.isnan(score.mc_error):
        _say(f"Monte Carlo error of log p(x): {score.mc_error:.3f} nats")
    if (bits := _bits(stored.program, score.mean)) is not None:
        _say(f"bits per dimension: {bits:.4f}")
    for remark in score.remarks():
        _say(remark)
    if json_file is not None and _is_first():
        result = {
            "run": str(run),
            "split": split,
            "num_data": len(score.values),
            "bound": None if bound is None else bound.mean,
            "bound_se": None if bound is None else bound.std_error,
            "log_marginal": score.mean,
            "log_marginal_se": score.std_error,
            "log_marginal_mc_error": score.mc_error,
            "bits_per_dim": bits,
            "method": method,
            "num_particles": score.num_particles,
            "options": score.options,
            "seed": seed,
            "median_ess": score.diagnostics["ess"].median().item(),
            "least_ess": score.diagnostics["ess"].min().item(),
        }
        if per_step is not None and score.num_steps is not None:
            result |= {"log_marginal_per_step": per_step[0], "log_marginal_per_step_se": per_step[1]}
            result |= {"num_steps": int(score.num_steps.sum())}
            result |= {} if bound is None else {"bound_per_step": bound.per_step}
        if "pareto_k" in score.diagnostics:
            result["num_pareto_k_above_0.7"] = score.num_heavy
        write_json(json_file, result)


def _bits(model: Any, log_prob: float) -> float | None:
    """Bits per dimension of log p(x), in nats, where the data are levels of a grid; else None."""
    from pyro_vae.models.likelihoods import bits_per_dim

    if getattr(getattr(model, "likelihood", None), "num_levels", None) is None:
        return None
    return bits_per_dim(log_prob, math.prod(model.data_shape))


@_command("pyro-vae compare --objective sgvb --objective iwae:num_particles=10 --learning-rate 0.02 --run-dir runs/c")
def compare(
    context: typer.Context,
    objective: Annotated[list[str], _grid(help=_COMPARED_HELP)] = ["sgvb", "wake-sleep"],  # noqa: B006 - typer copies it
    learning_rate: Annotated[list[float] | None, _grid(help="Repeat it for a grid of learning rates.")] = None,
    seeds: Annotated[int, _grid(help="Trainings of each, with seeds 0, 1, ...", min=1)] = 3,
    n_jobs: Annotated[int, _grid(help="Trainings at a time, each in a process of its own; -1: one per core.")] = 1,
    dataset: DatasetName = "digits",
    root: DataRoot = None,
    binarize: Binarize = None,
    model: ModelName = "vae",
    latent_dim: ModelDim = None,
    hidden_dims: HiddenDims = ["500"],  # noqa: B006
    likelihood: Likelihood = "bernoulli",
    activation: Activation = "tanh",
    init: Init = "default",
    network: Network = "mlp",
    channels: Channels = ["32,64"],  # noqa: B006
    prior: PriorName = "standard",
    num_components: NumComponents = None,
    posterior: PosteriorName = "diagonal",
    latent_dims: LatentDims = ["100,50"],  # noqa: B006
    bayesian: Bayesian = "none",
    local_reparameterization: LocalReparameterization = False,
    learn_prior: LearnPrior = False,
    transition_dim: TransitionDim = None,
    emission_dim: EmissionDim = None,
    rnn_dim: RnnDim = None,
    guide: GuideName = None,
    emission: EmissionName = None,
    cell: CellName = None,
    num_flows: NumFlows = None,
    missing: Missing = False,
    kl_warmup: KLWarmup = None,
    free_bits: FreeBits = None,
    optimizer: OptimizerName = "adagrad",
    batch_size: BatchSize = 100,
    num_samples: Annotated[int | None, _training(help="Budget of each in training samples; 100,000 if none.")] = None,
    epochs: Annotated[int | None, _training(help="Budget of each in passes through the data.")] = None,
    learning_rate_schedule: RateSchedule = None,
    ema_decay: EMADecay = None,
    max_grad_norm: MaxGradNorm = None,
    trim_padding: TrimPadding = False,
    evaluate_every: EvaluateEvery = None,
    device: TrainingDevice = None,
    method: Method = "importance",
    num_particles: ScoreParticles = None,
    num_data: Annotated[int | None, _scoring(help="Score only the first so many test data.")] = None,
    defensive: Defensive = None,
    num_steps: NumSteps = None,
    initial: Initial = None,
    num_leapfrog: NumLeapfrog = None,
    refit_samples: Annotated[
        int | None, _scoring(help="Train every guide for so many samples more, the model held fixed, before scoring.")
    ] = None,
    run_dir: Annotated[
        Path | None, _storage(help="Directory of the comparison: the same command goes on where it was stopped.")
    ] = None,
) -> None:
    """Train by several objectives, learning rates and seeds, and score all with the same estimator of log p(x)."""
    import pyro_vae as pv
    from pyro_vae.evaluation import METHODS

    _require_options("--method", method, METHODS, options := _given(context, _METHOD_OPTIONS))
    objectives = {text: _parse_objective(text) for text in objective}
    data = pv.load_dataset(dataset, root=root, binarize=binarize)  # type: ignore[arg-type]
    require_own_options(model, given := _set_by_user(context))
    make = functools.partial(make_model, data, {name: context.params.get(name) for name in _MAKING}, "model" in given)
    make()  # what is wrong with it is said before anything begins
    directory = run_dir or Path("runs", f"compare-{data.name}-{time.strftime('%Y%m%d-%H%M%S')}")
    rates = {f"lr={rate:g}": {"learning_rate": rate} for rate in learning_rate or ()}
    _say(f"{len(objectives) * max(1, len(rates)) * seeds} trainings on {data.name} in {directory}")
    found = pv.compare(
        objectives,
        make,
        data,
        settings=rates or None,
        seeds=seeds,
        n_jobs=n_jobs,
        run_dir=directory,
        **{name: context.params[name] for name in _COMPARED_SETTINGS},
        num_samples=100_000 if num_samples is None and epochs is None else num_samples,
        epochs=epochs,
        method=method,
        num_particles=1000 if num_particles is None and method == "importance" else num_particles,
        num_data=num_data,
        scorer_options=options,
        refit_samples=refit_samples,
    )
    _say(found.table())
    if all(row["error"] is not None for row in found.rows):
        _fail(f"every training failed: {found.rows[0]['error']}", 2)
    _say(f"{directory}: results.json, table.md, curves.png, and a run directory for each training")


def _cells(per_step: tuple[float | None, float | None]) -> list[str]:
    """A mean per step and its standard error in a table; nothing of data that are no sequences."""
    return [f"{value:.3f}" for value in per_step if value is not None]


def _parse_objective(text: str) -> Any:
    """The objective that NAME or NAME:key=value,key=value stands for."""
    from pyro_vae.objectives import OBJECTIVES

    name, _, listed = text.partition(":")
    made = OBJECTIVES[one_of("--objective", name.lower(), OBJECTIVES)]
    options: dict[str, Any] = {}
    taken = inspect.signature(made).parameters
    for part in filter(None, listed.split(",")):
        key, equals, value = part.partition("=")
        options[key.strip().replace("-", "_")] = _number_or_text(value)
        if not equals or options.keys() - taken.keys():
            keys = f"key=value,... of {', '.join(taken)}" if taken else "no options"
            raise ValueError(f"--objective {name}: expected {keys}; got {part!r}")
    try:
        return made(**options)
    except TypeError as error:
        raise ValueError(f"--objective {text}: {error}") from error


def _number_or_text(text: str) -> int | float | str | bool | None:
    words = {"true": True, "false": False, "none": None}
    if text.strip().lower() in words:
        return words[text.strip().lower()]
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    return text.strip()


def _require_folder(option: str, file: Path | None) -> None:
    """Refuse a file in a folder that is not there, before any work is done."""
    if file is not None and not file.parent.is_dir():
        raise ValueError(f"{option}: expected a file in a folder that exists, got {file}")


@_command("pyro-vae sample runs/mnist --num 100 --output samples.png")
def sample(
    run: RunPath,
    num: Annotated[int, typer.Option(help="How many.", min=1)] = 64,
    num_steps: Annotated[int | None, typer.Option(help="Of sequences: steps of each, by default 100.", min=1)] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="A .png or .npy file; by default RUN/figures/samples.png, and .npy of sequences."),
    ] = None,
    mean: Annotated[bool, typer.Option("--mean/--draw", help="Means of p(x | z), or draws of x.")] = True,
    device: Device = None,
    seed: Seed = 0,
) -> None:
    """Draw data from a trained model: images, or sequences of --num-steps steps."""
    import numpy as np
    import torch

    from pyro_vae.gallery import as_images
    from pyro_vae.plots import plot_samples
    from pyro_vae.sequence_gallery import draw_samples

    if output is not None and output.suffix not in (".png", ".npy"):
        raise ValueError(f"--output: expected a file ending in .png or .npy, got {output}")
    _require_folder("--output", output)
    stored = _load(run, device)
    sequential = _is_sequential(stored.program)
    if num_steps is not None and not sequential:
        raise ValueError(f"--num-steps is for models of sequences, and {run} holds none")
    torch.manual_seed(seed)
    steps = {"num_steps": num_steps or 100} if sequential else {}
    x = stored.program.sample(num, mean=mean, **steps).cpu()
    default = stored.path / "figures" / "samples.png"
    for file in [output] if output else [default.with_suffix(".npy"), default] if sequential else [default]:
        if file.suffix == ".npy":
            file.parent.mkdir(parents=True, exist_ok=True)
            np.save(file, x.numpy())
        else:
            _save(draw_samples(x.numpy()) if sequential else plot_samples(as_images(x)), file)
        _say(f"wrote {file}")


@_command("pyro-vae plot runs/mnist --kind curves --kind samples")
def plot(
    run: RunPath,
    kind: Annotated[list[str] | None, typer.Option(help=_KIND_HELP)] = None,
    output: Annotated[Path | None, typer.Option(help="Folder for the pictures; RUN/figures by default.")] = None,
    root: Root = None,
    device: Device = None,
    seed: Seed = 0,
) -> None:
    """Draw a run's pictures: learning curves, samples, reconstructions, latents, manifold, traversals."""
    from pyro_vae.gallery import KINDS, Gallery

    for name in kind or ():
        one_of("--kind", name, KINDS)
    stored = _load(run, device)
    gallery = Gallery(stored, root, seed)
    missing = gallery.missing()
    if refused := [name for name in kind or () if name in missing]:
        raise ValueError(f"--kind {refused[0]} does not apply to this run: it needs {missing[refused[0]]}")
    for name in kind or KINDS:
        if name in missing:
            _say(f"left out {name}: it needs {missing[name]}")
        else:
            file = (output or stored.path / "figures") / f"{name}.png"
            _save(gallery.draw(name), file)
            _say(f"wrote {file}")


@_command("pyro-vae forecast runs/pendulum --rows 0,1 --start 30 --horizon 20")
def forecast(
    run: RunPath,
    split: Split = "test",
    rows: Rows = None,
    horizon: Annotated[
        int | None, typer.Option(help="Steps; by default 10, with --start to the sequences' end.", min=1)
    ] = None,
    start: Annotated[
        int | None, typer.Option(help="Forecast from this step on, and lay the truth beside; else from the end.", min=1)
    ] = None,
    num_samples: Draws = 1000,
    num_particles: Particles = 1000,
    variables: Variables = None,
    output: Annotated[Path | None, typer.Option(help=_ARRAYS_HELP + "forecast.npz.")] = None,
    root: Root = None,
    device: Device = None,
    seed: Seed = 0,
) -> None:
    """Forecast sequences by a model of them: draws, means, quantiles and pictures."""
    chosen = _numbers("--variables", variables)
    gallery = _sequences(run, output, device, root=root, split=split, rows=_numbers("--rows", rows), seed=seed)
    found = gallery.forecast(
        horizon, start=start, num_samples=num_samples, num_particles=num_particles, variables=chosen
    )
    _write(found, output or run / "figures" / "forecast.npz")


@_command("pyro-vae smooth runs/pendulum --rows 0,1 --latents 0,2")
def smooth(
    run: RunPath,
    split: Split = "test",
    rows: Rows = None,
    num_samples: Draws = 100,
    num_particles: PathParticles = None,
    proposal: PathProposal = None,
    latents: Latents = None,
    output: Annotated[Path | None, typer.Option(help=_ARRAYS_HELP + "smooth.npz.")] = None,
    root: Root = None,
    device: Device = None,
    seed: Seed = 0,
) -> None:
    """Infer latents given whole sequences: draws of their paths, means, quantiles and pictures."""
    chosen = _numbers("--latents", latents)
    _require_proposal(proposal)
    gallery = _sequences(run, output, device, root=root, split=split, rows=_numbers("--rows", rows), seed=seed)
    found = gallery.smooth(num_samples=num_samples, num_particles=num_particles, proposal=proposal, latents=chosen)
    _write(found, output or run / "figures" / "smooth.npz")


@_command("pyro-vae filter runs/pendulum --rows 0,1 --num-particles 5000", name="filter")
def filter_(
    run: RunPath,
    split: Split = "test",
    rows: Rows = None,
    num_samples: Draws = 100,
    num_particles: Particles = 1000,
    latents: Latents = None,
    output: Annotated[Path | None, typer.Option(help=_ARRAYS_HELP + "filter.npz.")] = None,
    root: Root = None,
    device: Device = None,
    seed: Seed = 0,
) -> None:
    """Infer latents step by step, given no later observations: draws, means, quantiles and pictures."""
    chosen = _numbers("--latents", latents)
    gallery = _sequences(run, output, device, root=root, split=split, rows=_numbers("--rows", rows), seed=seed)
    found = gallery.filter(num_samples=num_samples, num_particles=num_particles, latents=chosen)
    _write(found, output or run / "figures" / "filter.npz")


@_command("pyro-vae fill runs/pendulum --drop 0.3")
def fill(
    run: RunPath,
    mask: Annotated[
        Path | None,
        typer.Option(help="A .npy file of bool, (N, T) or (N, T, D) of the split or of the rows: True may be seen."),
    ] = None,
    drop: Annotated[float | None, typer.Option(help="Hide this share of the steps, at random.")] = None,
    split: Split = "test",
    rows: Rows = None,
    num_samples: Draws = 100,
    num_particles: PathParticles = None,
    proposal: PathProposal = None,
    variables: Variables = None,
    output: Annotated[Path | None, typer.Option(help=_ARRAYS_HELP + "fill.npz.")] = None,
    root: Root = None,
    device: Device = None,
    seed: Seed = 0,
) -> None:
    """Fill gaps in sequences: those the data have, and those of --mask or --drop, with the truth beside."""
    from pyro_vae.arguments import probability
    from pyro_vae.sequence_gallery import read_mask

    if mask is not None and drop is not None:
        raise ValueError("expected --mask or --drop, got both")
    if drop is not None:
        probability("--drop", drop)
    _require_proposal(proposal)
    visible = None if mask is None else read_mask(mask)
    chosen = _numbers("--variables", variables)
    gallery = _sequences(run, output, device, root=root, split=split, rows=_numbers("--rows", rows), seed=seed)
    found = gallery.fill(
        mask=visible,
        drop=drop,
        num_samples=num_samples,
        num_particles=num_particles,
        proposal=proposal,
        variables=chosen,
    )
    _write(found, output or run / "figures" / "fill.npz")


def _require_proposal(proposal: str | None) -> None:
    if proposal is not None:
        one_of("--proposal", proposal, ("guide", "prior"))


def _numbers(flag: str, texts: list[str] | None) -> tuple[int, ...] | None:
    if not texts:
        return None
    numbers = whole_numbers(texts, flag, "0 or 0,1,2")
    if not numbers or min(numbers) < 0:
        raise ValueError(f"{flag}: expected whole numbers of at least 0, got {','.join(texts)!r}")
    return numbers


def _sequences(run: Path, output: Path | None, device: str | None, **options: Any) -> SequenceGallery:
    """What there is to say of a run's sequences; what cannot be is refused first."""
    from pyro_vae.sequence_gallery import SequenceGallery

    if output is not None and output.suffix != ".npz":
        raise ValueError(f"--output: expected a file ending in .npz, got {output}")
    _require_folder("--output", output)
    one_of("--split", options["split"], ("train", "valid", "test"))
    return SequenceGallery(_load(run, device), **options)


def _write(found: Findings, file: Path) -> None:
    """Write arrays, and a picture of each row beside them."""
    import numpy as np

    file.parent.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, Any] = found.arrays
    np.savez_compressed(file, **arrays)
    _say(f"wrote {file}: {', '.join(f'{name} {array.shape}' for name, array in arrays.items())}")
    for row, figure in found.figures.items():
        picture = file.with_name(f"{file.stem}-row{row}.png")
        _save(figure, picture)
        _say(f"wrote {picture}")
    for remark in found.remarks:
        _say(remark)


@_command("pyro-vae datasets --root /data")
def datasets(root: Root = None) -> None:
    """List the data sets that train knows by name."""
    from pyro_vae.data import DATASETS, is_available
    from pyro_vae.data.datasets import data_root

    table = Table(title=f"data sets (root: {data_root(root)})")
    for column in ("name", "shape", "train/valid/test", "binarize", "on disk"):
        table.add_column(column, no_wrap=True)
    for name, info in DATASETS.items():
        sizes = "/".join(f"{size:,}" for size in info.sizes)
        on_disk = "yes" if is_available(name, root) else "no"
        longest = () if info.num_steps is None else (f"T={max(info.num_steps):,}",)
        table.add_row(name, "x".join(map(str, (*longest, *info.shape))), sizes, info.binarize, on_disk)
    console.print(table)
    for name, info in DATASETS.items():
        console.print(f"[bold]{name}[/]: {info.split} {info.citation}.")
    console.print("T: steps of the longest sequence; the others are padded, and come with their lengths")
    console.print("or the path of a .npy, .npz or .csv file or of a folder of images")


def _load(run: Path, device: str | None) -> StoredRun:
    from pyro_vae.inputs import move_to
    from pyro_vae.runs import load_run

    stored = load_run(run)
    if device is not None:
        move_to(stored.program, device)
    return stored


def _save(figure: Figure, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)


def _version(wanted: bool) -> None:
    if wanted:
        from pyro_vae import __version__

        _say(f"pyro-vae {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line."""
    app(prog_name="pyro-vae" if not sys.argv[0].endswith("__main__.py") else "python -m pyro_vae")


if __name__ == "__main__":
    main()
