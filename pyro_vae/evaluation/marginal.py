"""The log marginal likelihood of data, by any of the package's estimators.

====================  =====================================  ===================================================
method                what it is on average                  what it needs
====================  =====================================  ===================================================
"importance"          a lower bound on log p(x)              a guide near the posterior; any latents
"ais"                 a lower bound, tighter with steps      continuous latents
"posterior-density"   an upper bound                         continuous latents, at most five dimensions
"smc"                 a lower bound; of p(x) unbiased        sequences: a Markov chain of latents, and its emissions
====================  =====================================  ===================================================
"""

from __future__ import annotations

import inspect
import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pyro_vae.arguments import one_of, whole_number
from pyro_vae.compile import Recorder
from pyro_vae.data import TensorData
from pyro_vae.data.batches import observed_name
from pyro_vae.evaluation.ais import AIS
from pyro_vae.evaluation.bounds import frozen
from pyro_vae.evaluation.dataset import anneal_dataset, weigh_dataset
from pyro_vae.evaluation.importance import ImportanceSampling, chunk_sizes
from pyro_vae.evaluation.particle_filter import ParticleFilter
from pyro_vae.evaluation.posterior_density import PosteriorDensity
from pyro_vae.evaluation.score import Estimate, Method, Score
from pyro_vae.inputs import Inputs, open_inputs
from pyro_vae.parallel import ranks
from pyro_vae.programs import HasModelAndGuide, Program, as_program, latent_sites

__all__ = ["METHODS", "log_marginal", "make_method"]

METHODS: dict[str, Any] = {
    "importance": ImportanceSampling,
    "ais": AIS,
    "posterior-density": PosteriorDensity,
    "smc": ParticleFilter,
}

# Particles times data times their width in flight: 16 MB a tensor in float32, of which a pass holds about ten. (Tensors
# of twice the size, just below what the C library's allocator gives back at once, made the peak vary by a gigabyte.)
_MAX_ELEMENTS = 4_000_000
# Such numbers in all: some seconds' work for a core or two, and half a minute's.
_WORTH_RECORDING, _WORTH_COMPILING = 400_000_000, 4_000_000_000


def make_method(method: str, num_particles: int | None = None, **options: Any) -> Method:
    """An estimator by name, with its options.

    Raises:
        ValueError: there is none of that name, or it does not take such an option; lists those it takes.
    """
    cls = METHODS[one_of("method", method, METHODS)]
    taken = inspect.signature(cls).parameters
    if unknown := sorted(options.keys() - taken.keys()):
        raise ValueError(f"method {method!r}: expected options among {', '.join(taken)}; got {unknown[0]!r}")
    return cls(**options) if num_particles is None else cls(num_particles=num_particles, **options)  # type: ignore[no-any-return]


def log_marginal(
    program: HasModelAndGuide,
    x: Any,
    *,
    method: str = "importance",
    of: Literal["datum", "dataset"] = "datum",
    num_particles: int | None = None,
    batch_size: int = 100,
    max_elements: int = _MAX_ELEMENTS,
    binarize: str | None = None,
    seed: int = 0,
    compile: bool = True,
    trim_padding: bool = False,
    **options: Any,
) -> Score:
    """Estimate log p(x) of each datum, in nats, or log p(X) of a whole data set whose data share latents.

    With latents theta outside the data plate, ``of="datum"`` estimates log E_q(theta)[p(x | theta)] of each datum by
    itself, the log density that the guide of theta, as a posterior, predicts ("importance" and "ais"), and
    ``of="dataset"`` one value, the log evidence log p(X) = log E_p(theta)[prod_m p(x_m | theta)] of the data given.

    Under torchrun each process takes a part of the data, and all of them return the same; all of them must call it.

    Args:
        program: an object with ``.model`` and ``.guide``.
        x: a tensor (N, ...); a tuple or dict of tensors; or a data set, whose test split is taken. Images of type uint8
            are scaled to [0, 1]; grey levels that a binary site observes are drawn once (see ``binarize``).
        method: "importance" (:class:`pyro_vae.evaluation.ImportanceSampling`), "ais"
            (:class:`pyro_vae.evaluation.AIS`), "posterior-density" (:class:`pyro_vae.evaluation.PosteriorDensity`) or,
            of sequences, "smc" (:class:`pyro_vae.evaluation.ParticleFilter`).
        of: "datum" or "dataset" ("importance" or "ais").
        num_particles: K per datum, or for the data set, at least 1; None for the method's default: 5000, 16, 1000 and
            1000.
        batch_size: data at a time, at most; fewer are taken where memory asks for it.
        max_elements: bound on particles times data times the width of a datum or a linear layer, that is on memory; the
            values do not depend on it but for the order of the noise.
        binarize: "dynamic" or "none"; None as the data set says, else "dynamic".
        seed: of the noise and of the binarisation; torch's own generators are left as they were.
        compile: where there is work for some seconds, record what is computed for one minibatch after the other as a
            graph, and where there is work for half a minute, compile it; the numbers are the same but for rounding.
        trim_padding: leave out steps that are padding in all sequences of a batch, as in :func:`pyro_vae.fit`.
        **options: of the method: ``defensive`` of "importance", and of a data set ``num_local``, draws of each datum's
            own latents for each draw of those that are shared; ``num_steps``, ``num_leapfrog``, ``initial``,
            ``target_accept``, ``num_pilot`` of "ais"; ``num_chains``, ``num_warmup``, ``num_leapfrog``,
            ``target_accept``, ``density`` of "posterior-density"; ``proposal``, ``threshold``, ``resampling``,
            ``num_repeats`` of "smc". Their classes say what they mean.

    Returns:
        Values per datum, their mean, errors and diagnostics; of sequences (a program that takes ``lengths``) also
        nats per step, :attr:`pyro_vae.Score.per_step`.

    Raises:
        ValueError: an argument is out of range, the data do not fit the program, the method cannot do with latents
            that data share, or a weight is NaN or infinite (the rows are named).

    Example:
        >>> import pyro_vae as pv
        >>> model = pv.LinearGaussian(torch.ones(3, 1))          # its guide is the posterior: exact for any K
        >>> score = log_marginal(model, torch.zeros(2, 3), num_particles=4)
        >>> bool(torch.allclose(score.values, model.log_marginal(torch.zeros(2, 3))))
        True
        >>> log_marginal(model, torch.zeros(2, 3), method="ais", num_steps=20, initial="prior").num_particles
        16
    """
    one_of("of", of, ("datum", "dataset"))
    given = {"num_local": options.pop("num_local")} if of == "dataset" and "num_local" in options else {}
    num_local = whole_number("num_local", given.get("num_local", 1))
    estimator = make_method(method, num_particles, **options)
    batch_size = whole_number("batch_size", batch_size)
    max_elements = whole_number("max_elements", max_elements)
    bridged = as_program(program)
    inputs = open_inputs(bridged, x, binarize=binarize, split="test", batch_size=batch_size)
    inputs = inputs.trimming(bridged) if trim_padding else inputs
    if method == "posterior-density":
        _require_no_padding(inputs)
    data = inputs.tensors().drawn_once(seed)
    rows_at_once = max(1, max_elements // _elements_per_row(bridged, data, inputs, batch_size))
    if of == "dataset":
        _require_for_dataset(estimator, inputs)
        with frozen(bridged, seed):
            estimate = _of_dataset(estimator, bridged, inputs, data, num_local, batch_size, rows_at_once, compile)
        total = None if (steps := _num_steps(inputs, data)) is None else steps.sum()[None]
        return _score([estimate], data, estimator, method, options | given, len(data), total)
    size = min(batch_size, max(1, rows_at_once // estimator.at_once), max(1, max_elements // estimator.num_particles))
    team = ranks()
    rows = len(data) * estimator.num_particles * estimator.passes
    work = rows * max_elements // (rows_at_once * team.size)
    recorder = Recorder(compile and work > _WORTH_RECORDING, compiled=work > _WORTH_COMPILING)
    with frozen(bridged, team.seed(seed)):
        own = data.in_order(size, team.part(len(data)))
        found = [estimator(bridged, *inputs.call(columns), rows_at_once, recorder) for columns in own]
    if team.size > 1:
        parts = team.gather([estimate.to("cpu") for estimate in found])
        found = [estimate.to(data.reader.device) for part in parts for estimate in part]
    return _score(found, data, estimator, method, options, num_steps=_num_steps(inputs, data))


def _score(
    found: list[Estimate],
    data: TensorData,
    estimator: Method,
    method: str,
    options: dict[str, Any],
    num_data: int | None = None,
    num_steps: Tensor | None = None,
) -> Score:
    values = torch.cat([estimate.values for estimate in found])
    _require_finite(values)
    diagnostics = {n: torch.cat([estimate.diagnostics[n] for estimate in found]) for n in found[0].diagnostics}
    mc_error = math.sqrt(sum(estimate.variance_of_sum.item() for estimate in found)) / len(values)
    values = values.to(data.reader.dtype)  # sums were taken in double precision
    return Score(values, mc_error, diagnostics, estimator.num_particles, method, options, num_data, num_steps)


def _num_steps(inputs: Inputs, data: TensorData) -> Tensor | None:
    """Steps of each sequence of the data, (N,); None of data that are no sequences."""
    return inputs.num_steps(data.columns)


def _require_no_padding(inputs: Inputs) -> None:
    """Latents of padded steps follow their prior, and would count among those whose posterior is estimated."""
    columns = inputs.tensors().columns
    steps = inputs.num_steps(columns)
    if steps is not None and bool((steps < columns[observed_name(columns)].shape[1]).any()):
        raise ValueError(
            'method="posterior-density": expected sequences without padding, got some; score those of each length T by '
            'themselves, cut to it (x[:, :T]), or by method="smc"'
        )


def _require_for_dataset(estimator: Method, inputs: Inputs) -> None:
    defended = isinstance(estimator, ImportanceSampling) and estimator.defensive > 0
    if defended or not isinstance(estimator, (ImportanceSampling, AIS)):
        raise ValueError('of="dataset": expected method "importance" without a defensive share, or "ais"')
    if not inputs.check.global_sites:
        raise ValueError(
            'of="dataset": expected a program with latents outside the data plate; without them log p(X) is the sum of '
            "the values of its data"
        )


def _of_dataset(
    estimator: Any,
    program: Program,
    inputs: Inputs,
    data: TensorData,
    num_local: int,
    batch_size: int,
    rows_at_once: int,
    compile: bool,
) -> Estimate:
    if isinstance(estimator, AIS):
        args, kwargs = inputs.call(data.rows(slice(None)))
        work = len(data) * estimator.num_particles * estimator.passes
        recorder = Recorder(compile and work // rows_at_once > _WORTH_RECORDING // _MAX_ELEMENTS)
        return anneal_dataset(program, args, kwargs, estimator, rows_at_once, recorder)
    counts = chunk_sizes(estimator.num_particles, min(batch_size, len(data)), rows_at_once)
    return weigh_dataset(program, lambda: data.in_order(batch_size), inputs.call, counts, num_local)


def _elements_per_row(program: Program, data: TensorData, inputs: Inputs, batch_size: int) -> int:
    """Numbers in flight for one particle of one datum: the datum's, a layer's, or shared latents', whichever are most.

    A module that is no linear layer may say what it makes of a row by an attribute ``elements_per_row``.
    """
    layers = [layer for module in program.modules().values() for layer in module.modules()]
    widths = [layer.out_features for layer in layers if isinstance(layer, nn.Linear)]
    stated: list[Any] = [getattr(layer, "elements_per_row", None) for layer in layers]
    widths += [elements for elements in stated if isinstance(elements, int)]
    widths += [column[0].numel() for column in data.columns.values()]
    if inputs.check.global_sites:  # drawn once for a minibatch
        sites = latent_sites(program.model, *inputs.first()).values()
        widths.append(sum(site.size for site in sites if site.axes is None) // min(batch_size, len(data)))
    return max(widths)


def _require_finite(values: Tensor) -> None:
    bad = (values.isnan() | (values == math.inf)).nonzero().flatten()
    if len(bad):
        raise ValueError(
            f"expected finite weights, got NaN or infinite ones at {len(bad)} of {len(values)} data, rows "
            f"{bad[:10].tolist()}: the model or the guide gives no density there"
        )
