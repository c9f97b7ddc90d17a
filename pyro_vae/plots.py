"""Pictures of a run: arrays in, a matplotlib `Figure` out.

Nothing here knows a model, shows a window, writes a file or touches pyplot: save with
``figure.savefig(path)``, or, after ``%matplotlib inline``, end a notebook cell with the figure. The style holds while
a figure is built; the caller's `rcParams` stay as they were. Images are floats in [0, 1], bool or uint8, channels
(1 or 3) last.
"""

import difflib
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ParamSpec

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator
from scipy.stats import binom, norm

__all__ = [
    "fan_chart",
    "latent_grid",
    "latent_paths",
    "piano_roll",
    "plot_comparison",
    "plot_latents",
    "plot_learning_curves",
    "plot_manifold",
    "plot_rank_histograms",
    "plot_reconstructions",
    "plot_samples",
    "plot_sequences",
    "plot_traversals",
]

Floats = npt.NDArray[np.float64]
P = ParamSpec("P")

# fmt: off
STYLE: dict[Any, Any] = {
    "axes.axisbelow": True, "axes.edgecolor": "0.4", "axes.facecolor": "white", "axes.grid": True,
    "axes.labelcolor": "0.15", "axes.labelsize": 9, "axes.linewidth": 0.7, "axes.spines.right": False,
    "axes.spines.top": False, "axes.titlesize": 10, "figure.dpi": 200, "figure.facecolor": "white",
    "font.size": 9, "grid.color": "0.91", "grid.linewidth": 0.6, "legend.fontsize": 8, "text.color": "0.15",
    "xtick.color": "0.15", "xtick.labelsize": 8, "ytick.color": "0.15", "ytick.labelsize": 8,
}
# Okabe and Ito's for lines, Paul Tol's "muted" and black for points: colour-blind readers tell them apart.
LINE_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
POINT_COLOURS = ("#CC6677", "#332288", "#DDCC77", "#117733", "#88CCEE",
                 "#882255", "#44AA99", "#999933", "#AA4499", "#222222")
# fmt: on
DASHES = ("-", (0, (4, 1.5)), (0, (4, 1.5, 1, 1.5)), (0, (1.5, 1.5)))  # dotted is the reference
MARKERS = ("o", "^")  # labels 11 to 20 have the same colours again, as triangles
MAX_CLASSES = len(POINT_COLOURS) * len(MARKERS)
METHODS = ("auto", "pca", "tsne")
TSNE_LIMIT = 5000  # points; t-SNE takes about half a minute there
MAX_PANELS = 100
_MAX_VARIABLES = 20  # of sequences, one above another
_KEYS, _LOWEST = 88, 21  # of a piano: columns of a roll, and the MIDI note of the first, A0
CURVE_KEYS = ("samples", "train_bound", "test_bound", "test_bound_se")


def _styled(function: Callable[P, Figure]) -> Callable[P, Figure]:
    """Build the figure under `STYLE` (doctest overlooks functions decorated by `rc_context` itself)."""

    @functools.wraps(function)
    def styled(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with mpl.rc_context(STYLE):
            return function(*args, **kwargs)

    return styled


@_styled
def plot_learning_curves(
    curves: Mapping[str, Any],
    *,
    reference: Mapping[str, Any] | None = None,
    ylabel: str = "bound (nats per datum)",
    title: str | None = None,
    ylim: tuple[float, float] | None = None,
) -> Figure:
    """Draw bounds against training samples, test solid and train dashed in one colour per method.

    The early, terrible part of training does not squash the rest: the y axis shows the later half of each
    curve (in log samples) whole, the earlier half as far below its median as its maximum lies above.

    Args:
        curves: Label to curve. A curve is a mapping with "samples" (n,) and any of "train_bound",
            "test_bound" and "test_bound_se" (n,), a band of ±1 standard error; or a list of dicts with
            these keys (`run.history`). Other keys are ignored; None, NaN, infinite values and, the axis being
            logarithmic, samples <= 0 are skipped.
        reference: Label to (samples (n,), values (n,)): published curves, drawn grey and dotted.
        ylabel: Name and unit of the values.
        title: Title, if any.
        ylim: Lower and upper end of the y axis.

    Returns:
        A figure with one axes.

    Raises:
        ValueError: If a curve lacks samples or any bound, lengths differ, or nothing finite is left to draw.

    Source: Kingma & Welling, arXiv:1312.6114, Fig. 2.

    >>> history = [{"samples": 100, "test_bound": -300.0}, {"samples": 1000, "test_bound": -150.0}]
    >>> figure = plot_learning_curves({"AEVB": history})
    >>> figure.axes[0].get_xscale(), figure.axes[0].get_xlabel()
    ('log', 'training samples')
    """
    if not isinstance(curves, Mapping) or not curves:
        raise ValueError(f"curves: expected a mapping from labels to curves, came {type(curves)}, maybe empty")
    figure = Figure(figsize=(4.6, 3.2), layout="constrained")
    axes = figure.add_subplot(xlabel="training samples", ylabel=ylabel, xscale="log", title=title or "")
    for i, (label, curve) in enumerate(curves.items()):
        _draw_curve(axes, label, _columns(label, curve), LINE_COLOURS[i % len(LINE_COLOURS)])
    for i, (label, pair) in enumerate((reference or {}).items()):
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise ValueError(f"reference {label!r}: expected (samples, values), came {type(pair)}")
        dots = (0, (1, 1.2 + 1.6 * i))  # further references are dotted more loosely
        x, y = _aligned(f"reference {label!r}", *pair)
        axes.plot(x, y, color="0.45", lw=1.3, ls=dots, label=label, zorder=1.9)
    axes.xaxis.set_minor_locator(LogLocator(subs=(2, 5)))  # more would run into each other
    limits = _robust_limits(axes.lines)
    axes.set_ylim(limits if ylim is None else ylim)
    axes.ticklabel_format(axis="y", useOffset=False)
    axes.legend(loc="lower right", framealpha=0.8, edgecolor="none")
    return figure


@_styled
def plot_comparison(
    curves: Mapping[str, Mapping[str, Sequence[Any]]],
    *,
    reference_bound: float | None = None,
    ylabel: str = "test bound (nats per datum)",
    title: str | None = None,
    ylim: tuple[float, float] | None = None,
) -> Figure:
    """Draw test bounds of several methods: the mean over seeds, in a band from the least to the greatest.

    A method has a colour, a setting a dash pattern. The y axis is that of `plot_learning_curves`.

    Args:
        curves: Method to setting ("" if there is one) to its seeds' curves, each as in `plot_learning_curves`;
            seeds are averaged where all were evaluated. Those without a test bound are left out.
        reference_bound: A dotted line across.
        ylabel: Name and unit of the values.
        title: Title, if any.
        ylim: Lower and upper end of the y axis.

    Returns:
        A figure with one axes, and the legend beside it.

    Raises:
        ValueError: If a curve lacks samples or any bound, lengths differ, or nothing finite is left to draw.

    Source: Kingma & Welling, arXiv:1312.6114, Fig. 2.

    >>> seeds = [[{"samples": 100, "test_bound": -3.0}], [{"samples": 100, "test_bound": -1.0}]]
    >>> figure = plot_comparison({"AEVB": {"": seeds}})
    >>> figure.axes[0].lines[0].get_xydata().tolist()
    [[100.0, -2.0]]
    """
    figure = Figure(figsize=(6.0, 3.2), layout="constrained")
    axes = figure.add_subplot(xlabel="training samples", ylabel=ylabel, xscale="log", title=title or "")
    for colour, (method, settings) in zip(itertools.cycle(LINE_COLOURS), curves.items(), strict=False):
        for dashes, (setting, seeds) in zip(itertools.cycle(DASHES), settings.items(), strict=False):
            label = ", ".join(filter(None, (method, setting)))
            x, bounds = _over_seeds(label, seeds)
            if x.size:
                marker = "o" if x.size == 1 else None
                axes.plot(x, bounds.mean(0), color=colour, lw=1.6, ls=dashes, marker=marker, ms=4, label=label)
                axes.fill_between(x, bounds.min(0), bounds.max(0), color=colour, alpha=0.15, linewidth=0)
    axes.xaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    axes.set_ylim(_robust_limits(axes.lines) if ylim is None else ylim)
    axes.ticklabel_format(axis="y", useOffset=False)
    if reference_bound is not None:
        axes.axhline(reference_bound, color="0.45", lw=1.3, ls=(0, (1, 1.2)), label="reference bound", zorder=1.9)
    figure.legend(loc="outside right upper", frameon=False, handlelength=2.6)
    return figure


def _over_seeds(label: str, seeds: Sequence[Any]) -> tuple[Floats, Floats]:
    """Samples (n,) at which every seed was evaluated, and the test bounds there (seeds, n)."""
    columns = [_columns(label, curve) for curve in seeds]
    found = [_aligned(label, c["samples"], c["test_bound"]) for c in columns if "test_bound" in c]
    found = [table for table in found if table.size]
    if not found:
        return np.empty(0), np.empty((0, 0))
    common = functools.reduce(np.intersect1d, [x for x, _ in found])
    return common, np.stack([y[np.isin(x, common)] for x, y in found])


def _draw_curve(axes: Axes, label: str, columns: Mapping[str, Any], colour: str) -> None:
    samples, test, error = (columns.get(key) for key in ("samples", "test_bound", "test_bound_se"))
    for split, width, dashes in (("test", 1.6, "-"), ("train", 0.9, "--")):
        if (bound := columns.get(f"{split}_bound")) is not None:
            x, y = _aligned(f"{label}: {split}_bound", samples, bound)
            marker = "o" if x.size == 1 else None  # a single evaluation makes no line
            text = f"{label} ({split})" if x.size else None
            axes.plot(x, y, color=colour, lw=width, ls=dashes, marker=marker, ms=4, label=text)
    if test is not None and error is not None:
        x, y, band = _aligned(f"{label}: test_bound_se", samples, test, error)
        axes.fill_between(x, y - band, y + band, color=colour, alpha=0.18, linewidth=0)


def _columns(label: str, curve: Any) -> Mapping[str, Any]:
    """A curve as a mapping of columns, whichever of its two forms came."""
    if isinstance(curve, Sequence) and all(isinstance(row, Mapping) for row in curve):
        found = [key for key in CURVE_KEYS if any(key in row for row in curve)]
        curve = {key: [row.get(key) for row in curve] for key in found}
    if not isinstance(curve, Mapping):
        raise ValueError(f"{label}: expected a mapping of arrays or a list of dicts, came {type(curve)}")
    if "samples" not in curve or not {"train_bound", "test_bound"} & set(curve):
        expected = "'samples' and at least one of 'train_bound', 'test_bound'"
        raise ValueError(f"{label}: expected the keys {expected}, came {list(curve)}")
    return curve


def _aligned(name: str, *columns: Any) -> Floats:
    """Columns (k, n), samples first, without what a logarithmic axis cannot show, by increasing samples."""
    vectors = [_vector(name, column) for column in columns]
    if len({vector.size for vector in vectors}) > 1:
        sizes = [vector.size for vector in vectors]
        raise ValueError(f"{name}: expected as many values as samples, came lengths {sizes} (samples first)")
    table = np.stack(vectors)
    table = table[:, np.isfinite(table).all(axis=0) & (table[0] > 0)]
    return table[:, np.argsort(table[0], kind="stable")]


def _vector(name: str, values: Any) -> Floats:
    try:
        vector = np.asarray(values, dtype=float)  # None becomes NaN
    except TypeError as error:
        raise ValueError(f"{name}: expected numbers of shape (n,), came {type(values)}") from error
    if vector.ndim != 1 or vector.size == 0:
        raise ValueError(f"{name}: expected shape (n,) with n >= 1, came {vector.shape}")
    return vector


def _robust_limits(lines: Sequence[Line2D]) -> tuple[float, float]:
    tops, bottoms = [], []
    for x, y in (np.asarray(line.get_data(), dtype=float) for line in lines):
        if x.size:
            log_x = np.log(x)
            middle = (log_x[0] + log_x[-1]) / 2
            # Evaluations may be spaced in any way; the eye sees log samples.
            median = np.median(np.interp(np.linspace(log_x[0], log_x[-1], 201), log_x, y))
            tops.append(y.max())
            bottoms.append(max(y.min(), min(y[log_x >= middle].min(), 2 * median - y.max())))
    if not tops:
        raise ValueError("curves: expected at least one finite bound at samples > 0, came none")
    margin = 0.05 * (max(tops) - min(bottoms)) or 1.0
    return float(min(bottoms) - margin), float(max(tops) + margin)


def latent_grid(side: int) -> Floats:
    """Return codes for a learned manifold: evenly spaced quantiles through the inverse Gaussian CDF.

    The quantiles are (i + 1/2) / side, so each code stands for the same prior mass. The first code is the
    picture's top left: z_1 grows along a row, z_2 falls from row to row.

    Args:
        side: Number of codes along an axis, >= 1.

    Returns:
        Codes (side * side, 2), row by row, for `plot_manifold`.

    Raises:
        ValueError: If `side` is not a positive integer.

    Source: Kingma & Welling, arXiv:1312.6114, Appendix A and Fig. 4.

    >>> latent_grid(2).round(2).tolist()
    [[-0.67, 0.67], [0.67, 0.67], [-0.67, -0.67], [0.67, -0.67]]
    """
    _require_positive("side", side)
    quantiles = norm.ppf((np.arange(side) + 0.5) / side)
    z2, z1 = np.meshgrid(quantiles[::-1], quantiles, indexing="ij")
    return np.stack([z1.ravel(), z2.ravel()], axis=1)


@_styled
def plot_manifold(images: npt.ArrayLike, *, pad: int = 0, title: str | None = None) -> Figure:
    """Show the images decoded from `latent_grid` as one mosaic without gaps.

    Args:
        images: Images (side * side, H, W[, C]), row by row.
        pad: Black pixels around each image, for images that fill their frame and would run into each other.
        title: Title, if any.

    Returns:
        A figure whose only image is the mosaic, (side * H, side * W[, C]) without padding.

    Raises:
        ValueError: If `images` are not images, or their number is not a square.

    Source: Kingma & Welling, arXiv:1312.6114, Fig. 4.

    >>> plot_manifold(np.zeros((9, 4, 5))).axes[0].images[0].get_array().shape
    (12, 15)
    """
    array = _as_images("images", images)
    side = round(len(array) ** 0.5)
    if side**2 != len(array):
        raise ValueError(f"images: expected side * side of them, a square number, came {len(array)}")
    array = np.pad(array, [(0, 0), (pad, pad), (pad, pad)] + [(0, 0)] * (array.ndim - 3))
    return _show(_mosaic(array, side), title)[0]


@_styled
def plot_samples(images: npt.ArrayLike, *, columns: int | None = None, title: str | None = None) -> Figure:
    """Show images row by row in a mosaic with thin gaps; places that remain in the last row stay white.

    Args:
        images: Images (n, H, W[, C]).
        columns: Images in a row, >= 1; by default about as many as there are rows.
        title: Title, if any.

    Returns:
        A figure whose only image is the mosaic.

    Raises:
        ValueError: If `images` are not images or `columns` is not a positive integer.

    Source: Kingma & Welling, arXiv:1312.6114, Fig. 5.

    >>> plot_samples(np.zeros((5, 4, 4)), columns=3).axes[0].images[0].get_array().shape
    (9, 14)
    """
    array = _as_images("images", images)
    columns = int(np.ceil(len(array) ** 0.5)) if columns is None else columns
    return _show(_mosaic(array, columns, _gap(array)), title)[0]


@_styled
def plot_reconstructions(
    data: npt.ArrayLike, reconstructions: npt.ArrayLike, *, columns: int = 12, title: str | None = None
) -> Figure:
    """Show pairs of rows: data above, their reconstructions beneath.

    Args:
        data: Images (n, H, W[, C]).
        reconstructions: Images of the same shape, such as the means of p(x|z) at the means of q(z|x).
        columns: Pairs in a row, >= 1.
        title: Title, if any.

    Returns:
        A figure whose only image is the mosaic.

    Raises:
        ValueError: If either are not images, their shapes differ, or `columns` is not a positive integer.

    Source: the autoencoder of Kingma & Welling, arXiv:1312.6114, section 3.

    >>> axes = plot_reconstructions(np.zeros((3, 4, 4)), np.ones((3, 4, 4))).axes[0]
    >>> [label.get_text() for label in axes.get_yticklabels()]
    ['data', 'reconstruction']
    """
    above, beneath = _as_images("data", data), _as_images("reconstructions", reconstructions)
    if above.shape != beneath.shape:
        shapes = f"{np.shape(data)}, came {np.shape(reconstructions)}"
        raise ValueError(f"reconstructions: expected the shape of data {shapes}")
    gap, height = _gap(above), above.shape[1]
    seam = np.ones_like(above[:, :gap])
    pairs = np.concatenate([above, seam, beneath], axis=1)  # (n, 2 H + gap, W, C)
    figure, axes = _show(_mosaic(pairs, columns, (4 * gap, gap)), title, left=0.92)
    starts = np.arange(-(-len(pairs) // columns)) * (2 * height + 5 * gap)
    centres = starts[:, None] + (height - 1) / 2 + np.array([0, height + gap])
    axes.set_yticks(centres.ravel(), ["data", "reconstruction"] * len(starts))
    return figure


@_styled
def plot_traversals(images: npt.ArrayLike, *, values: npt.ArrayLike | None = None, title: str | None = None) -> Figure:
    """Show what each latent dimension does: a row per dimension, a column per value it takes.

    Args:
        images: Images (J, steps, H, W[, C]).
        values: Values (steps,) of the traversed dimension, written under the columns.
        title: Title, if any.

    Returns:
        A figure whose only image is the mosaic.

    Raises:
        ValueError: If `images` are not images or `values` has another length than their columns.

    Source: one dimension at a time of the manifolds of Kingma & Welling, arXiv:1312.6114, Fig. 4.

    >>> axes = plot_traversals(np.zeros((2, 3, 4, 4)), values=[-1, 0, 1]).axes[0]
    >>> [label.get_text() for label in axes.get_xticklabels()]
    ['−1', '0', '1']
    """
    array = _as_images("images", images, ("J", "steps"))
    (rows, steps, height, width, _), gap = array.shape, _gap(array)
    mosaic = _mosaic(array.reshape(-1, *array.shape[2:]), steps, gap)
    figure, axes = _show(mosaic, title, left=0.25, below=0.2)
    names = [f"$z_{{{j}}}$" for j in range(1, rows + 1)]
    axes.set_yticks(np.arange(rows) * (height + gap) + (height - 1) / 2, names)
    if values is not None:
        ticks = _vector("values", values)
        if len(ticks) != steps:
            raise ValueError(f"values: expected one for each of {steps} columns, came {len(ticks)}")
        every = int(np.ceil(0.45 * steps / (figure.get_figwidth() - 0.25)))  # a number needs 0.45 inches
        texts = [f"{value:.3g}".replace("-", "−") for value in ticks.round(6) + 0.0]  # no −0, no 1e-17
        axes.set_xticks((np.arange(steps) * (width + gap) + (width - 1) / 2)[::every], texts[::every])
    return figure


def _as_images(name: str, images: npt.ArrayLike, leading: tuple[str, ...] = ("n",)) -> Floats:
    """Images as floats in [0, 1], (*leading, H, W, C)."""
    array, dims = np.asarray(images), ", ".join(leading)
    shape = array.shape
    if array.ndim == len(leading) + 2:
        array = array[..., None]
    if array.ndim != len(leading) + 3 or array.shape[-1] not in (1, 3) or array.size == 0:
        expected = f"({dims}, H, W) or ({dims}, H, W, C), C = 1 or 3, none of them empty"
        raise ValueError(f"{name}: expected images of shape {expected}; came {shape}")
    if array.dtype == np.uint8:
        return array / 255
    if array.dtype.kind not in "bf":
        raise ValueError(f"{name}: expected floats in [0, 1], bool or uint8, came {array.dtype}")
    _require_finite(name, array)
    low, high = array.min(), array.max()
    if low < -1 or high > 2:  # a noisy mean is clipped, another scale is a mistake
        raise ValueError(f"{name}: expected floats in [0, 1], came values from {low:.4g} to {high:.4g}")
    return np.asarray(np.clip(array, 0, 1), dtype=float)


def _gap(images: Floats) -> int:
    return max(1, int(images.shape[-3]) // 28)  # pixels


def _mosaic(images: Floats, columns: int, gap: int | tuple[int, int] = 0) -> Floats:
    """(n, H, W, C) to one image, row by row; gaps (vertical, horizontal) and vacant places are white."""
    _require_positive("columns", columns)
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    down, right = (gap, gap) if isinstance(gap, int) else gap
    vacant = rows * columns - len(images)
    padded = np.pad(images, ((0, vacant), (0, down), (0, right), (0, 0)), constant_values=1.0)
    _, height, width, channels = padded.shape
    grid = padded.reshape(rows, columns, height, width, channels).swapaxes(1, 2)
    mosaic = grid.reshape(rows * height, columns * width, channels)
    return mosaic[: len(mosaic) - down, : columns * width - right]


def _show(mosaic: Floats, title: str | None, *, left: float = 0, below: float = 0) -> tuple[Figure, Axes]:
    """The mosaic on its own figure, with room (inches) for names at its left and below."""
    height, width, channels = mosaic.shape
    scale = min(5.5 / width, 8.0 / height)  # inches per pixel: within a page
    above = 0.3 if title else 0.0
    size = (max(1.0, width * scale) + left, max(0.5, height * scale) + below + above)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot(xticks=[], yticks=[], frame_on=False, title=title or "")
    pixels = mosaic[..., 0] if channels == 1 else mosaic
    axes.imshow(pixels, cmap="gray", vmin=0, vmax=1, interpolation="antialiased")
    axes.set_anchor("SW")  # constrained layout cuts names off where it centres an image
    axes.grid(visible=False)
    axes.tick_params(length=0)
    return figure, axes


def _require_positive(name: str, value: object) -> None:
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}: expected an integer >= 1, came {value!r}")


def _require_finite(name: str, array: npt.NDArray[Any]) -> None:
    if bad := int(np.sum(~np.isfinite(array))):
        raise ValueError(f"{name}: expected finite values, came {bad} NaN or infinite ones")


@_styled
def plot_latents(
    z: npt.ArrayLike,
    labels: npt.ArrayLike | None = None,
    *,
    label_names: Sequence[str] | Mapping[Any, str] | None = None,
    method: str = "auto",
    seed: int = 0,
    title: str | None = None,
) -> Figure:
    """Scatter latent codes, coloured by label.

    Two dimensions are shown as they are; one is a histogram, or with labels a strip per label; more are
    projected to two. Points are drawn in the order given: codes sorted by label hide one another.

    Args:
        z: Latent codes (n, J), n >= 1, J >= 1.
        labels: Labels (n,). Up to 20 different ones have colours (11 to 20 as triangles) and a legend; more
            must be numbers and have a colour bar.
        label_names: Legend texts: by label in a mapping, by position for labels 0, 1, ... in a sequence.
            A colour bar does without.
        method: "auto" (J <= 2 as it is; above, "tsne" up to 5000 points, else "pca"), "pca" or "tsne".
        seed: Seed of t-SNE and of the strips' jitter.
        title: Title, if any.

    Returns:
        A figure whose first axes hold the points.

    Raises:
        ValueError: If shapes do not agree, a value is not finite, a name is missing or the method is unknown.

    Source: Kingma & Welling, arXiv:1312.6114, section 3; van der Maaten & Hinton, JMLR 9:2579, 2008 (t-SNE).

    >>> axes = plot_latents([[0.0, 1.0], [1.0, 0.0]], ["a", "b"]).axes[0]
    >>> axes.get_xlabel(), len(axes.collections[0].get_offsets())
    ('$z_1$', 2)
    """
    codes = _as_codes(z)
    tags = None if labels is None else _as_labels(labels, len(codes))
    texts = {} if tags is None else _legend_texts(tags, label_names)
    points, axis_names = _project(codes, _choose_method(method, codes), seed)
    figure = Figure(figsize=(4.6, 3.6), layout="constrained")
    axes = figure.add_subplot(xlabel=axis_names[0], title=title or "")
    if points.shape[1] == 1:
        _draw_strip(axes, points[:, 0], tags, texts, seed)
        return figure
    axes.set_ylabel(axis_names[1])
    axes.set_aspect("equal", adjustable="datalim")
    if axis_names[0].startswith("t-SNE"):
        axes.tick_params(labelbottom=False, labelleft=False, length=0)  # its coordinates mean nothing
        axes.grid(visible=False)
    _draw_points(axes, points, tags, texts)
    if texts:
        handles = _legend_handles(texts)
        figure.legend(handles=handles, loc="outside right center", frameon=False, handletextpad=0.2)
    return figure


def _as_codes(z: npt.ArrayLike) -> Floats:
    codes = np.asarray(z)
    if codes.ndim != 2 or codes.size == 0 or codes.dtype.kind not in "biuf":
        raise ValueError(f"z: expected numbers of shape (n, J), none empty, came {codes.dtype} {codes.shape}")
    _require_finite("z", codes)
    return codes.astype(float)


def _as_labels(labels: npt.ArrayLike, n: int) -> npt.NDArray[Any]:
    tags = np.asarray(labels)
    if tags.shape != (n,):
        raise ValueError(f"labels: expected shape ({n},), one per row of z, came {tags.shape}")
    if tags.dtype.kind not in "biufU" or (tags.dtype.kind == "f" and not np.isfinite(tags).all()):
        raise ValueError(f"labels: expected finite numbers or strings, came {tags.dtype} with {tags[:3]} ...")
    return tags


def _legend_texts(tags: npt.NDArray[Any], names: Sequence[str] | Mapping[Any, str] | None) -> dict[Any, str]:
    """Legend text per label in increasing order; empty where a colour bar stands instead."""
    classes = np.unique(tags).tolist()
    if len(classes) > MAX_CLASSES:
        if tags.dtype.kind == "U":
            raise ValueError(f"labels: expected at most {MAX_CLASSES} different strings, came {len(classes)}")
        return {}
    if names is None:
        return {c: f"{c:g}" if isinstance(c, float) else str(c) for c in classes}
    known = names if isinstance(names, Mapping) else dict(enumerate(names))
    missing = [c for c in classes if c not in known]
    if missing:
        raise ValueError(f"label_names: expected a name for every label, came none for {missing}")
    return {c: known[c] for c in classes}


def _choose_method(method: str, codes: Floats) -> str:
    if method not in METHODS:
        near = difflib.get_close_matches(str(method).lower(), METHODS, n=1, cutoff=0.3)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(f"method: expected one of {', '.join(map(repr, METHODS))}, came {method!r}{hint}")
    n, dims = codes.shape
    varied = bool(np.ptp(codes, axis=0).any())  # a collapsed posterior has no neighbours
    if method == "auto":
        method = "none" if dims <= 2 else "tsne" if 4 <= n <= TSNE_LIMIT and varied else "pca"
    least = {"none": 1, "pca": 2, "tsne": 4}[method]
    if n < least or (method != "none" and dims < 2) or (method == "tsne" and not varied):
        needs = f"n >= {least}, J >= 2" + " and codes that are not all equal" * (method == "tsne")
        raise ValueError(f"z: {method!r} expected {needs}, came z of shape {codes.shape}")
    return method


def _project(codes: Floats, method: str, seed: int) -> tuple[Floats, list[str]]:
    """Points (n, 2), or (n, 1) of one-dimensional codes, and the names of their axes."""
    if method == "none":
        return codes, ["$z_1$", "$z_2$"]
    # scikit-learn takes a second to import; most figures do without.
    if method == "tsne":
        from sklearn.manifold import TSNE

        perplexity = min(30.0, (len(codes) - 1) / 3)
        points = TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(codes)
        return points, ["t-SNE 1", "t-SNE 2"]
    from sklearn.decomposition import PCA

    pca = PCA()
    with np.errstate(invalid="ignore"):  # 0 / 0 where all codes are equal
        points = pca.fit_transform(codes)[:, :2]
    shares = np.nan_to_num(pca.explained_variance_ratio_[:2])
    return points, [f"PC {i} ({share:.1%} of variance)" for i, share in enumerate(shares, 1)]


def _draw_strip(axes: Axes, x: Floats, tags: npt.NDArray[Any] | None, texts: dict[Any, str], seed: int) -> None:
    if tags is None:
        axes.hist(x, bins=int(np.clip(len(x) ** 0.5, 5, 60)), color=LINE_COLOURS[0], alpha=0.8)
        axes.set_ylabel("count")
    elif not texts:
        _draw_points(axes, np.stack([x, tags], axis=1), None, texts)  # the y axis already tells the label
        axes.set_ylabel("label")
    else:
        jitter = np.random.default_rng(seed).uniform(-0.3, 0.3, len(x))
        rows = np.unique(tags, return_inverse=True)[1]
        _draw_points(axes, np.stack([x, rows + jitter], axis=1), tags, texts)
        axes.set_yticks(np.arange(len(texts)), list(texts.values()))
        axes.invert_yaxis()


def _draw_points(axes: Axes, points: Floats, tags: npt.NDArray[Any] | None, texts: dict[Any, str]) -> None:
    size = float(np.clip(2e4 / len(points), 3, 16))
    # Points as pixels, text as vectors: a PDF of 10,000 points stays small.
    scatter = functools.partial(axes.scatter, s=size, linewidths=0, rasterized=True)
    if tags is None:
        scatter(points[:, 0], points[:, 1], color=LINE_COLOURS[0], alpha=0.7)
    elif not texts:
        drawn = scatter(points[:, 0], points[:, 1], c=tags, cmap="viridis")
        drawn.figure.colorbar(drawn, ax=axes, label="label")
    else:
        marker, colour = np.divmod(np.unique(tags, return_inverse=True)[1], len(POINT_COLOURS))
        for i in np.unique(marker):
            here = marker == i
            colours = np.array(POINT_COLOURS)[colour[here]]
            scatter(points[here, 0], points[here, 1], c=colours, marker=MARKERS[i], alpha=0.85)


def _legend_handles(texts: dict[Any, str]) -> list[Line2D]:
    looks = [(marker, colour) for marker in MARKERS for colour in POINT_COLOURS]
    return [
        Line2D([], [], linestyle="", marker=marker, color=colour, markeredgewidth=0, markersize=5, label=text)
        for (marker, colour), text in zip(looks, texts.values(), strict=False)
    ]


@_styled
def plot_rank_histograms(
    ranks: Mapping[str, npt.ArrayLike],
    *,
    num_draws: int,
    bins: int = 20,
    columns: int = 5,
    title: str | None = None,
) -> Figure:
    """Draw the ranks of simulation-based calibration, a histogram for each latent dimension.

    Bars are counts; the line is what a calibrated guide gives on average, and 99 % of its bars lie in the grey band
    (binomial). Bars that rise in the middle mean a guide too wide, at both ends one too narrow, at the right one
    that is too low.

    Args:
        ranks: Site to whole numbers (n, *event), n >= 1, from 0 to `num_draws`: a `Calibration`'s `ranks`.
        num_draws: Draws that each was ranked among, >= 1.
        bins: Bars, a divisor of `num_draws` + 1.
        columns: Panels in a row, >= 1.
        title: Title, if any.

    Returns:
        A figure with one axes per dimension, in the order given, on common axes.

    Raises:
        ValueError: If ranks are not such numbers, `bins` does not divide, or there are more than 100 dimensions.

    Source: Talts et al., arXiv:1804.06788, Fig. 1, for the guide of Kingma & Welling, arXiv:1312.6114.

    >>> figure = plot_rank_histograms({"z": np.arange(200).reshape(100, 2) // 2}, num_draws=99)
    >>> [axes.get_title() for axes in figure.axes]
    ['z[0]', 'z[1]']
    """
    for name, value in (("num_draws", num_draws), ("bins", bins), ("columns", columns)):
        _require_positive(name, value)
    if (num_draws + 1) % bins:
        raise ValueError(f"bins: expected a divisor of num_draws + 1 = {num_draws + 1}, came {bins}")
    panels = _rank_panels(ranks, num_draws)
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(max(2.4, 1.4 * columns + 0.5), 1.15 * rows + 0.7), layout="constrained")
    if title:
        figure.suptitle(title)
    first: Axes | None = None
    for i, (name, values) in enumerate(panels.items()):
        axes = figure.add_subplot(rows, columns, i + 1, title=name, sharex=first, sharey=first)
        first = axes if first is None else first
        axes.tick_params(labelbottom=i + columns >= len(panels), labelleft=i % columns == 0)
        _draw_ranks(axes, values, num_draws, bins)
    figure.supxlabel(f"rank among {num_draws} draws", fontsize="medium")
    figure.supylabel("simulations", fontsize="medium")
    return figure


def _draw_ranks(axes: Axes, ranks: Floats, num_draws: int, bins: int) -> None:
    edges = np.linspace(-0.5, num_draws + 0.5, bins + 1)
    low, high = binom.interval(0.99, len(ranks), 1 / bins)
    axes.axhspan(low, high, color="0.9", zorder=0)
    axes.hist(ranks, bins=edges.tolist(), color=LINE_COLOURS[0], alpha=0.8)
    axes.axhline(len(ranks) / bins, color="0.3", lw=0.8)
    axes.set_xlim(edges[0], edges[-1])
    axes.grid(visible=False)


def _rank_panels(ranks: Any, num_draws: int) -> dict[str, Floats]:
    """Ranks (n,) of each dimension by its name."""
    if not isinstance(ranks, Mapping) or not ranks:
        raise ValueError(f"ranks: expected a mapping from sites to ranks, came {type(ranks)}, maybe empty")
    panels = {}
    for site, values in ranks.items():
        array = np.asarray(values)
        if array.ndim == 0 or array.size == 0 or array.dtype.kind not in "iuf":
            raise ValueError(f"{site}: expected ranks of shape (n, ...), none empty, came {array.dtype} {array.shape}")
        if (array % 1 != 0).any() or array.min() < 0 or array.max() > num_draws:
            raise ValueError(
                f"{site}: expected whole numbers from 0 to num_draws = {num_draws}, "
                f"came values from {array.min():.4g} to {array.max():.4g}"
            )
        for index in np.ndindex(array.shape[1:]):
            panels[site + (f"[{', '.join(map(str, index))}]" if index else "")] = array[:, *index].astype(float)
    if len(panels) > MAX_PANELS:
        raise ValueError(f"ranks: expected at most {MAX_PANELS} dimensions, came {len(panels)}: choose some of them")
    return panels


# ---- Sequences


@_styled
def plot_sequences(x: npt.ArrayLike, *, names: Sequence[str] | None = None, title: str | None = None) -> Figure:
    """Draw sequences as lines, one above another in a panel per variable.

    Args:
        x: Sequences (n, T, D), D at most 20; NaN where there is nothing to draw.
        names: D names of the variables; by default x[0], x[1], ...
        title: Title, if any.

    Returns:
        A figure with D axes, each of n lines.

    Raises:
        ValueError: If `x` has another shape or infinite values, or the names do not agree with it.

    Source: draws from the model of Krishnan, Shalit & Sontag, arXiv:1609.09869, section 3.

    >>> figure = plot_sequences(np.zeros((4, 9, 2)))
    >>> [(axes.get_ylabel(), len(axes.lines)) for axes in figure.axes]
    [('x[0]', 4), ('x[1]', 4)]
    """
    array = _as_steps("x", x, "n, T, D")
    figure, panels = _variable_panels(array.shape[-1], names, "x", title)
    for values, axes in zip(np.moveaxis(array, -1, 0), panels, strict=True):
        for i, line in enumerate(values):
            axes.plot(line, color=LINE_COLOURS[i % len(LINE_COLOURS)], lw=1.0, marker=_lone(line), ms=2.5)
    return figure


@_styled
def fan_chart(
    history: npt.ArrayLike,
    truth: npt.ArrayLike | None,
    draws: npt.ArrayLike,
    *,
    start: int | None = None,
    names: Sequence[str] | None = None,
    title: str | None = None,
) -> Figure:
    """Draw what draws say of a sequence: their median in bands that hold 50 % and 90 % of them, over what was observed.

    Args:
        history: What was observed (T, D), D at most 20; NaN where nothing was. T may be 0.
        truth: What the draws are of, as far as it is known, (n, D), n at most H; NaN where it is not. Or None.
        draws: Draws (S, H, D): of the steps to come, or of steps that have gaps.
        start: The step of the first of the draws, counted from 0; by default T, after the history.
        names: D names of the variables; by default x[0], x[1], ...
        title: Title, if any.

    Returns:
        A figure with an axes per variable on a common axis of steps, and the legend above.

    Raises:
        ValueError: If shapes do not agree, or draws are not finite.

    Source: intervals of the forecasts of Krishnan, Shalit & Sontag, arXiv:1609.09869, whose model section 3 defines.

    >>> figure = fan_chart(np.zeros((5, 1)), np.zeros((3, 1)), np.arange(40.0).reshape(10, 4, 1))
    >>> median, = [line for line in figure.axes[0].lines if line.get_label() == "median"]
    >>> median.get_xdata().tolist()
    [5.0, 6.0, 7.0, 8.0]
    """
    drawn = _as_steps("draws", draws, "S, H, D")
    _require_finite("draws", drawn)
    observed = _as_steps("history", history, "T, D", empty=True)
    known = np.full_like(drawn[0], np.nan) if truth is None else _as_steps("truth", truth, "n, D", empty=True)
    first = len(observed) if start is None else start
    if not isinstance(first, (int, np.integer)) or isinstance(first, bool) or first < 0:
        raise ValueError(f"start: expected an integer >= 0, came {start!r}")
    for name, array in (("history", observed), ("truth", known)):
        if array.shape[-1] != drawn.shape[-1]:
            raise ValueError(f"{name}: expected the {drawn.shape[-1]} variables of draws, came shape {array.shape}")
    if len(known) > drawn.shape[1]:
        raise ValueError(f"truth: expected at most the {drawn.shape[1]} steps of draws, came shape {known.shape}")
    figure, panels = _variable_panels(drawn.shape[-1], names, "x", title)
    quantiles = np.quantile(drawn, (0.05, 0.25, 0.5, 0.75, 0.95), axis=0)
    steps = np.arange(first, first + drawn.shape[1], dtype=float)
    for d, axes in enumerate(panels):
        _draw_bands(axes, steps, quantiles[[0, 1, 3, 4], :, d], (0.05, 0.25, 0.75, 0.95))
        _draw_line(axes, steps, quantiles[2, :, d], color=LINE_COLOURS[0], lw=1.3, label="median")
        _draw_observed(axes, 0, observed[:, d], "observed", "0.15", "o")
        _draw_observed(axes, first, known[:, d], "truth", LINE_COLOURS[1], "x")
    _legend_above(figure, panels[0])
    return figure


@_styled
def latent_paths(
    means: npt.ArrayLike,
    quantiles: npt.ArrayLike,
    *,
    levels: Sequence[float] = (0.05, 0.25, 0.75, 0.95),
    names: Sequence[str] | None = None,
    title: str | None = None,
) -> Figure:
    """Draw where latents are, step by step: their means in bands between quantiles.

    Args:
        means: Means (T, J), J at most 20; NaN where there is nothing to draw.
        quantiles: Quantiles (Q, T, J) at the levels.
        levels: Q increasing levels between 0 and 1; a band lies between the first and the last, and so on inwards.
            The one in the middle of an odd number is left out.
        names: J names of the latents; by default z[0], z[1], ...
        title: Title, if any.

    Returns:
        A figure with an axes per latent on a common axis of steps, and the legend above.

    Raises:
        ValueError: If shapes do not agree, or the levels do not increase.

    Source: the posterior of Krishnan, Shalit & Sontag, arXiv:1609.09869, section 4.

    >>> means = np.zeros((5, 2))
    >>> figure = latent_paths(means, [means - 1, means + 1], levels=(0.1, 0.9))
    >>> [axes.get_ylabel() for axes in figure.axes], figure.legends[0].get_texts()[0].get_text()
    (['z[0]', 'z[1]'], '80 % interval')
    """
    centre, edges = _as_steps("means", means, "T, J"), _as_steps("quantiles", quantiles, "Q, T, J")
    places = _vector("levels", levels)
    if (np.diff(places) <= 0).any() or places[0] <= 0 or places[-1] >= 1:
        raise ValueError(f"levels: expected increasing numbers between 0 and 1, came {list(levels)}")
    if edges.shape != (len(places), *centre.shape):
        expected = (len(places), *centre.shape)
        raise ValueError(f"quantiles: expected shape {expected}, levels first, came {edges.shape}")
    figure, panels = _variable_panels(centre.shape[-1], names, "z", title)
    steps = np.arange(len(centre), dtype=float)
    for j, axes in enumerate(panels):
        _draw_bands(axes, steps, edges[..., j], places)
        _draw_line(axes, steps, centre[:, j], color=LINE_COLOURS[0], lw=1.3, label="mean")
    _legend_above(figure, panels[0])
    return figure


@_styled
def piano_roll(
    x: npt.ArrayLike | Sequence[npt.ArrayLike],
    labels: Sequence[str] | None = None,
    *,
    start: int | None = None,
    title: str | None = None,
) -> Figure:
    """Show piano rolls one above another, time to the right and pitch upwards, the darker the likelier a note sounds.

    Column k of a roll is MIDI note 21 + k, from A0 to C8; C4 is note 60. Only the octaves in which some note of some
    roll is at least 0.1 are shown.

    Args:
        x: A roll (T, 88), or several, which may be of unequal length: numbers from 0 to 1. NaN, where nothing was
            observed, is shaded.
        labels: A title for each roll.
        start: A step at which to draw a dashed line, such as the first of a forecast.
        title: Title, if any.

    Returns:
        A figure with an axes per roll, on common axes.

    Raises:
        ValueError: If a roll is of another shape or its values are out of range, or the labels do not agree.

    Source: piano rolls as of Boulanger-Lewandowski, Bengio & Vincent, arXiv:1206.6392.

    >>> roll = np.zeros((8, 88))
    >>> roll[:, [39, 43]] = 1  # C4 and E4
    >>> [label.get_text() for label in piano_roll(roll).axes[0].get_yticklabels()]
    ['C4', 'C5']
    """
    rolls = _as_rolls(x)
    if labels is not None and len(labels) != len(rolls):
        raise ValueError(f"labels: expected one for each of {len(rolls)} rolls, came {len(labels)}")
    longest = max(len(roll) for roll in rolls)
    low, high = _octaves(rolls)
    octaves = np.arange(-(-low // 12) * 12, high + 1, 12)
    size = float(np.clip(0.05 * longest, 4.6, 9)), 0.5 + len(rolls) * max(0.9, 0.03 * (high - low))
    figure = Figure(figsize=size, layout="constrained")
    if title:
        figure.suptitle(title, fontsize="medium")
    colours = mpl.colormaps["Greys"].with_extremes(bad="#F3DDBE")
    panels = figure.subplots(len(rolls), sharex=True, sharey=True, squeeze=False)[:, 0]
    for i, (roll, axes) in enumerate(zip(rolls, panels, strict=True)):
        extent = (-0.5, len(roll) - 0.5, _LOWEST - 0.5, _LOWEST + _KEYS - 0.5)
        masked = np.ma.masked_invalid(roll.T)
        axes.imshow(
            masked, cmap=colours, vmin=0, vmax=1, origin="lower", aspect="auto", extent=extent, interpolation="none"
        )
        axes.set_title("" if labels is None else labels[i], loc="left", fontsize=8)
        axes.grid(visible=False)
        axes.hlines(octaves - 0.5, -0.5, longest - 0.5, color="0.85", lw=0.6, zorder=1)  # below each C
        if start is not None:
            axes.axvline(start - 0.5, color=LINE_COLOURS[1], lw=1.0, ls=DASHES[1])
    panels[0].set_yticks(octaves, [f"C{note // 12 - 1}" for note in octaves])
    panels[0].set_xlim(-0.5, longest - 0.5)
    panels[0].set_ylim(low - 0.5, high + 0.5)
    panels[-1].set_xlabel("step")
    return figure


def _as_rolls(x: Any) -> list[Floats]:
    if isinstance(x, np.ndarray):
        return [_as_roll(x)] if x.ndim < 3 else [_as_roll(roll) for roll in x]
    if not isinstance(x, (list, tuple)) or not x:
        raise ValueError(f"x: expected a piano roll (T, {_KEYS}) or a list of them, came {type(x)}, maybe empty")
    return [_as_roll(np.asarray(x))] if np.ndim(x[0]) < 2 else [_as_roll(roll) for roll in x]


def _as_roll(roll: npt.ArrayLike) -> Floats:
    array = np.asarray(roll)
    if array.ndim != 2 or array.shape[1] != _KEYS or array.size == 0 or array.dtype.kind not in "biuf":
        raise ValueError(f"x: expected piano rolls of shape (T, {_KEYS}), came {array.dtype} {array.shape}")
    array = array.astype(float)
    known = array[~np.isnan(array)]
    if known.size and (known.min() < 0 or known.max() > 1):
        raise ValueError(f"x: expected numbers from 0 to 1, came values from {known.min():.4g} to {known.max():.4g}")
    return array


def _octaves(rolls: Sequence[Floats]) -> tuple[int, int]:
    """The lowest and the highest note of the octaves, from a C to the next, that hold what sounds in any roll."""
    sounding = np.flatnonzero(np.any([(roll >= 0.1).any(0) for roll in rolls], axis=0)) + _LOWEST
    if not sounding.size:
        return _LOWEST, _LOWEST + _KEYS - 1
    low, high = int(sounding.min()) // 12 * 12, -(-int(sounding.max() + 1) // 12) * 12
    return max(low, _LOWEST), min(high, _LOWEST + _KEYS - 1)


def _as_steps(name: str, values: npt.ArrayLike, dims: str, *, empty: bool = False) -> Floats:
    array = np.asarray(values)
    wrong = array.ndim != len(dims.split(", ")) or array.shape[-1] == 0 or (array.size == 0 and not empty)
    if wrong or array.dtype.kind not in "biuf":
        raise ValueError(f"{name}: expected numbers of shape ({dims}), came {array.dtype} {array.shape}")
    if np.isinf(array).any():
        raise ValueError(f"{name}: expected no infinite values, came {int(np.isinf(array).sum())} of them")
    return array.astype(float)


def _variable_panels(
    count: int, names: Sequence[str] | None, letter: str, title: str | None
) -> tuple[Figure, list[Axes]]:
    """An axes for each variable, one above another on a common axis of steps."""
    if count > _MAX_VARIABLES:
        raise ValueError(f"expected at most {_MAX_VARIABLES} variables, came {count}: choose some of them")
    if names is not None and len(names) != count:
        raise ValueError(f"names: expected one for each of {count} variables, came {len(names)}")
    figure = Figure(figsize=(6.0, 1.1 * count + 0.9), layout="constrained")
    panels: list[Axes] = list(figure.subplots(count, sharex=True, squeeze=False)[:, 0])
    panels[0].set_title(title or "")
    for i, axes in enumerate(panels):
        axes.set_ylabel(f"{letter}[{i}]" if names is None else names[i])
    figure.align_ylabels(panels)
    panels[-1].set_xlabel("step")
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure, panels


def _draw_bands(axes: Axes, steps: Floats, quantiles: Floats, levels: Sequence[float] | Floats) -> None:
    """Bands between the outermost quantiles (Q, T), the next ones inwards, and so on."""
    for i in range(len(quantiles) // 2):
        x, low, high = _widened(steps, quantiles[i], quantiles[-1 - i])
        label = f"{100 * (levels[-1 - i] - levels[i]):.3g} % interval"
        shade = 0.2 + 0.3 * (i > 0)
        axes.fill_between(x, low, high, color=LINE_COLOURS[0], alpha=shade, linewidth=0, label=label)


def _draw_line(axes: Axes, steps: Floats, values: Floats, **style: Any) -> None:
    axes.plot(*_widened(steps, values), **style)


def _widened(steps: Floats, *values: Floats) -> tuple[Floats, ...]:
    """A single step has no width: it is drawn half a step to either side."""
    if len(steps) > 1:
        return steps, *values
    return np.array([steps[0] - 0.5, steps[0] + 0.5]), *(np.repeat(value, 2) for value in values)


def _draw_observed(axes: Axes, first: int, values: Floats, label: str, colour: str, marker: str) -> None:
    if np.isfinite(values).any():
        size = 2.0 if marker == "o" else 3.0
        steps = np.arange(first, first + len(values))
        axes.plot(steps, values, color=colour, lw=0.5, marker=marker, ms=size, mew=0.8, label=label)


def _lone(values: Floats) -> str | None:
    """A marker for a line in which some point has no neighbour, and would be invisible."""
    known = np.isfinite(np.pad(values, 1, constant_values=np.nan))
    return "o" if (known[1:-1] & ~known[:-2] & ~known[2:]).any() else None


def _legend_above(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False, columnspacing=1.2)
