import inspect
import subprocess
import sys

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from scipy.stats import binom, norm

from pyro_vae import plots
from pyro_vae.plots import (
    fan_chart,
    latent_grid,
    latent_paths,
    piano_roll,
    plot_comparison,
    plot_latents,
    plot_learning_curves,
    plot_manifold,
    plot_rank_histograms,
    plot_reconstructions,
    plot_samples,
    plot_sequences,
    plot_traversals,
)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def history():
    samples = np.geomspace(1e4, 1e7, 31)
    bounds = -100 - 400 * (samples / 1e4) ** -0.7
    return [
        {"samples": int(s), "seconds": 1.0, "train_bound": b + 1, "test_bound": b, "test_bound_se": 2.0}
        for s, b in zip(samples, bounds, strict=True)
    ]


def pixels(figure):
    (axes,) = figure.axes
    return np.asarray(axes.images[0].get_array())


def line(figure, label):
    (found,) = [line for line in figure.axes[0].lines if line.get_label() == label]
    return found


def column(history, key):
    return np.array([row[key] for row in history])


def texts(labels):
    return [label.get_text() for label in labels]


def point_colours(figure):
    return {to_hex(c) for scatter in figure.axes[0].collections for c in scatter.get_facecolors()}


# Learning curves.


def test_curves_draw_the_given_values_on_a_log_axis(history):
    figure = plot_learning_curves({"AEVB": history}, title="MNIST")
    axes = figure.axes[0]
    test, train = line(figure, "AEVB (test)"), line(figure, "AEVB (train)")
    np.testing.assert_array_equal(test.get_xdata(), column(history, "samples"))
    np.testing.assert_array_equal(test.get_ydata(), column(history, "test_bound"))
    np.testing.assert_array_equal(train.get_ydata(), column(history, "train_bound"))
    assert test.get_color() == train.get_color()
    assert (test.get_linestyle(), train.get_linestyle()) == ("-", "--")
    assert test.get_linewidth() > train.get_linewidth()
    assert (axes.get_xscale(), axes.get_xlabel(), axes.get_ylabel(), axes.get_title()) == (
        "log",
        "training samples",
        "bound (nats per datum)",
        "MNIST",
    )


def test_a_mapping_of_arrays_draws_what_a_history_does(history):
    keys = ("samples", "train_bound", "test_bound", "test_bound_se")
    columns = {key: column(history, key) for key in keys}
    one, other = plot_learning_curves({"A": history}), plot_learning_curves({"A": columns})
    for a, b in zip(one.axes[0].lines, other.axes[0].lines, strict=True):
        np.testing.assert_array_equal(a.get_xydata(), b.get_xydata())


def test_methods_differ_in_colour_and_have_legend_entries(history):
    figure = plot_learning_curves({"AEVB": history, "wake-sleep": history})
    assert line(figure, "AEVB (test)").get_color() != line(figure, "wake-sleep (test)").get_color()
    expected = ["AEVB (test)", "AEVB (train)", "wake-sleep (test)", "wake-sleep (train)"]
    assert texts(figure.axes[0].get_legend().get_texts()) == expected


def test_band_is_one_standard_error(history):
    band = plot_learning_curves({"AEVB": history}).axes[0].collections[0].get_paths()[0].vertices
    for row in history:
        here = band[np.isclose(band[:, 0], row["samples"]), 1]
        assert here.min() == pytest.approx(row["test_bound"] - 2)
        assert here.max() == pytest.approx(row["test_bound"] + 2)


def test_reference_is_grey_and_dotted(history):
    figure = plot_learning_curves({"AEVB": history}, reference={"paper": ([1e5, 1e6], [-140.0, -120.0])})
    paper = line(figure, "paper")
    np.testing.assert_array_equal(paper.get_xydata(), [[1e5, -140], [1e6, -120]])
    assert len(set(mpl.colors.to_rgb(paper.get_color()))) == 1
    assert paper.is_dashed()
    assert paper.get_linestyle() not in ("-",)


def test_what_cannot_be_drawn_is_skipped():
    rows = [(0, -1.0), (10, None), (20, np.nan), (30, -5.0), (40, -np.inf), (50, -4.0)]
    history = [{"samples": s, "test_bound": b, "test_bound_se": None, "train_bound": None} for s, b in rows]
    figure = plot_learning_curves({"a": history})
    np.testing.assert_array_equal(line(figure, "a (test)").get_xydata(), [[30, -5], [50, -4]])
    assert texts(figure.axes[0].get_legend().get_texts()) == ["a (test)"]


def test_train_alone_and_a_single_evaluation():
    figure = plot_learning_curves({"a": {"samples": [5], "train_bound": [-3.0], "test_bound": None}})
    assert line(figure, "a (train)").get_marker() == "o"
    low, high = figure.axes[0].get_ylim()
    assert low < -3 < high


def test_a_terrible_start_does_not_squash_the_rest():
    samples = np.geomspace(10, 1e6, 60)
    bound = np.where(samples < 1e3, -1e5, -100 + np.log10(samples))
    low, high = plot_learning_curves({"a": {"samples": samples, "test_bound": bound}}).axes[0].get_ylim()
    assert -110 < low < -97 < -94 < high < -90


def test_steady_curves_and_late_failures_are_shown_whole():
    samples = np.geomspace(10, 1e6, 60)
    steady = -100 + 5 * np.log10(samples)
    low, _ = plot_learning_curves({"a": {"samples": samples, "test_bound": steady}}).axes[0].get_ylim()
    assert low < steady.min()
    failing = np.where(samples > 1e5, -500.0, -100.0)
    low, _ = plot_learning_curves({"a": {"samples": samples, "test_bound": failing}}).axes[0].get_ylim()
    assert low < -500
    assert plot_learning_curves({"a": {"samples": samples, "test_bound": steady}}, ylim=(-90, -80)).axes[
        0
    ].get_ylim() == (-90, -80)


@pytest.mark.parametrize(
    ("curves", "message"),
    [
        ({}, "mapping from labels"),
        ([{"samples": 1, "test_bound": 1}], "mapping from labels to curves, came <class 'list'>"),
        ({"a": 3}, "a: expected a mapping of arrays or a list of dicts"),
        ({"a": []}, "expected the keys 'samples'"),
        ({"a": {"test_bound": [1]}}, r"came \['test_bound'\]"),
        ({"a": {"samples": [1], "bound": [1]}}, r"came \['samples', 'bound'\]"),
        ({"a": {"samples": [1, 2], "test_bound": [1]}}, r"a: test_bound.*\[2, 1\]"),
        ({"a": {"samples": [1], "test_bound": [1], "test_bound_se": [1, 2]}}, r"test_bound_se.*\[1, 1, 2\]"),
        ({"a": {"samples": [[1]], "test_bound": [1]}}, r"expected shape \(n,\).*came \(1, 1\)"),
        ({"a": {"samples": [], "test_bound": []}}, r"came \(0,\)"),
        ({"a": {"samples": {}, "test_bound": [1]}}, "expected numbers"),
        ({"a": {"samples": [1], "test_bound": [np.nan]}}, "at least one finite bound"),
    ],
)
def test_bad_curves_are_refused(curves, message):
    with pytest.raises(ValueError, match=message):
        plot_learning_curves(curves)


@pytest.mark.parametrize("pair", [[1, 2, 3], "ab", ([1, 2], [1])])
def test_bad_references_are_refused(history, pair):
    with pytest.raises(ValueError, match="paper"):
        plot_learning_curves({"a": history}, reference={"paper": pair})


# Comparisons.


def seeds_of(history, *shifts):
    return [[{**row, "test_bound": row["test_bound"] + shift} for row in history] for shift in shifts]


def test_a_comparison_draws_the_mean_over_seeds_in_a_band_of_all(history):
    figure = plot_comparison({"AEVB": {"": seeds_of(history, -3, 0, 6)}}, reference_bound=-110.0)
    mean, reference = figure.axes[0].lines
    np.testing.assert_array_equal(mean.get_xdata(), column(history, "samples"))
    np.testing.assert_allclose(mean.get_ydata(), column(history, "test_bound") + 1)
    assert set(reference.get_ydata()) == {-110.0}
    band = figure.axes[0].collections[0].get_paths()[0].vertices
    for row in history:
        here = band[np.isclose(band[:, 0], row["samples"]), 1]
        assert here.min() == pytest.approx(row["test_bound"] - 3)
        assert here.max() == pytest.approx(row["test_bound"] + 6)
    assert texts(figure.legends[0].get_texts()) == ["AEVB", "reference bound"]


def test_methods_have_colours_and_settings_have_dashes(history):
    curves = {name: {"0.02": [history], "0.1": [history]} for name in ("AEVB", "wake-sleep")}
    lines = plot_comparison(curves).axes[0].lines
    labels = [line.get_label() for line in lines]
    assert labels == ["AEVB, 0.02", "AEVB, 0.1", "wake-sleep, 0.02", "wake-sleep, 0.1"]
    a, b, c, d = lines
    assert a.get_color() == b.get_color() != c.get_color() == d.get_color()
    assert a.get_linestyle() == c.get_linestyle() != b.get_linestyle() == d.get_linestyle()


def test_seeds_are_averaged_where_all_were_evaluated(history):
    figure = plot_comparison({"AEVB": {"": [history, history[:5]]}})
    np.testing.assert_array_equal(figure.axes[0].lines[0].get_xdata(), column(history[:5], "samples"))


def test_what_has_no_test_bound_is_left_out(history):
    none = [{"samples": 1000, "test_bound": None}]
    lines = plot_comparison({"MCEM": {"": [none]}, "failed": {"": []}, "AEVB": {"": [history]}}).axes[0].lines
    assert [line.get_label() for line in lines] == ["AEVB"]
    with pytest.raises(ValueError, match="at least one finite bound"):
        plot_comparison({"MCEM": {"": [none]}})


def test_the_axis_of_a_comparison_is_given_or_robust(history):
    early = [{"samples": 5000, "test_bound": -1e6}, *history]
    assert plot_comparison({"a": {"": [early]}}).axes[0].get_ylim()[0] > -1000
    assert plot_comparison({"a": {"": [early]}}, ylim=(-5, 0), title="t").axes[0].get_ylim() == (-5, 0)


# Images.


def test_latent_grid_is_symmetric_gaussian_and_in_document_order():
    z = latent_grid(20)
    grid = z.reshape(20, 20, 2)
    np.testing.assert_allclose(z, -z[::-1], atol=1e-12)
    assert (np.diff(grid[:, :, 0], axis=1) > 0).all()
    assert (np.diff(grid[:, :, 1], axis=0) < 0).all()
    assert (np.ptp(grid[:, :, 0], axis=0) == 0).all()
    quantiles = norm.cdf(grid[0, :, 0])
    np.testing.assert_allclose(np.diff(quantiles), 1 / 20)  # linearly spaced on the unit square
    assert quantiles[0] == pytest.approx(1 - quantiles[-1])
    np.testing.assert_allclose(latent_grid(401).std(axis=0), 1, atol=0.01)
    np.testing.assert_array_equal(latent_grid(1), [[0, 0]])


@pytest.mark.parametrize("side", [0, -1, 2.0, True, "3"])
def test_latent_grid_refuses_a_bad_side(side):
    with pytest.raises(ValueError, match="side: expected an integer >= 1, came"):
        latent_grid(side)


def test_manifold_has_no_gaps(rng):
    images = rng.random((9, 5, 4))
    mosaic = pixels(plot_manifold(images))
    assert mosaic.shape == (15, 12)
    for i, image in enumerate(images):
        r, c = divmod(i, 3)
        np.testing.assert_array_equal(mosaic[5 * r : 5 * r + 5, 4 * c : 4 * c + 4], image)
    with pytest.raises(ValueError, match="square number, came 8"):
        plot_manifold(images[:8])


@pytest.mark.parametrize("channels", [(), (1,), (3,)])
def test_samples_have_gaps_and_vacant_places_are_white(rng, channels):
    images = rng.random((5, 4, 6, *channels)) / 2
    figure = plot_samples(images, columns=3)
    mosaic = pixels(figure)
    assert mosaic.shape == (9, 20, *(c for c in channels if c == 3))
    for i, image in enumerate(images):
        r, c = divmod(i, 3)
        place = mosaic[5 * r : 5 * r + 4, 7 * c : 7 * c + 6]
        np.testing.assert_array_equal(place, image.reshape(place.shape))
    assert (mosaic[4] == 1).all()
    assert (mosaic[:, 6] == 1).all()
    assert (mosaic[5:, 14:] == 1).all()
    assert figure.axes[0].images[0].get_clim() == (0, 1)
    assert figure.axes[0].images[0].get_cmap().name == "gray"


def test_columns_default_to_a_square_and_are_no_more_than_images(rng):
    assert pixels(plot_samples(rng.random((9, 4, 4)))).shape == (14, 14)
    assert pixels(plot_samples(rng.random((2, 4, 4)), columns=50)).shape == (4, 9)
    assert plot_samples(rng.random((2, 4, 4)), title="Samples").axes[0].get_title() == "Samples"


def test_bytes_bools_and_values_slightly_outside():
    given = np.array([[[0, 51], [255, 102]]], dtype=np.uint8)
    np.testing.assert_allclose(pixels(plot_samples(given)), [[0, 0.2], [1, 0.4]])
    np.testing.assert_array_equal(pixels(plot_samples(given > 99)), [[0, 0], [1, 1]])
    np.testing.assert_array_equal(pixels(plot_samples([[[-0.1, 0.5], [1.1, 1.0]]])), [[0, 0.5], [1, 1]])


def test_reconstructions_stand_beneath_the_data(rng):
    data, means = rng.random((2, 5, 4, 4)) / 2
    figure = plot_reconstructions(data, means, columns=3)
    mosaic, axes = pixels(figure), figure.axes[0]
    height, down = 4, 2 * 4 + 1 + 4  # a thin seam in a pair, a wide gap between pairs
    for i in range(5):
        r, c = divmod(i, 3)
        pair = mosaic[down * r :, 5 * c : 5 * c + 4]
        np.testing.assert_array_equal(pair[:height], data[i])
        np.testing.assert_array_equal(pair[height + 1 : 2 * height + 1], means[i])
    assert texts(axes.get_yticklabels()) == ["data", "reconstruction"] * 2
    np.testing.assert_array_equal(axes.get_yticks(), [1.5, 6.5, 14.5, 19.5])
    assert pixels(plot_reconstructions(data[..., None], means)).shape == (9, 24)
    with pytest.raises(ValueError, match=r"the shape of data \(5, 4, 4\), came \(4, 4, 4\)"):
        plot_reconstructions(data, means[:4])


def test_traversals_have_a_row_per_dimension(rng):
    images = rng.random((3, 5, 4, 6))
    figure = plot_traversals(images, values=np.linspace(-2, 2, 5))
    mosaic, axes = pixels(figure), figure.axes[0]
    assert mosaic.shape == (14, 34)
    np.testing.assert_array_equal(mosaic[10:14, 7:13], images[2, 1])
    assert texts(axes.get_yticklabels()) == ["$z_{1}$", "$z_{2}$", "$z_{3}$"]
    assert texts(axes.get_xticklabels()) == ["−2", "−1", "0", "1", "2"]
    np.testing.assert_array_equal(axes.get_xticks(), 7 * np.arange(5) + 2.5)
    assert texts(plot_traversals(images).axes[0].get_xticklabels()) == []
    assert pixels(plot_traversals(rng.random((2, 3, 4, 4, 3)))).shape == (9, 14, 3)
    with pytest.raises(ValueError, match="one for each of 5 columns, came 4"):
        plot_traversals(images, values=range(4))


def test_many_traversal_values_are_thinned(rng):
    axes = plot_traversals(rng.random((1, 30, 4, 4)), values=np.arange(30)).axes[0]
    assert texts(axes.get_xticklabels()) == [str(i) for i in range(0, 30, 3)]


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((3, 784)), r"images of shape \(n, H, W\) or \(n, H, W, C\).*came \(3, 784\)"),
        (np.zeros((3, 3, 8, 8)), r"came \(3, 3, 8, 8\)"),
        (np.zeros((0, 8, 8)), r"empty; came \(0, 8, 8\)"),
        (np.zeros((2, 8, 8), dtype=int), "bool or uint8, came int64"),
        (np.full((2, 8, 8), 255.0), "came values from 255 to 255"),
        (np.full((2, 8, 8), np.nan), "came 128 NaN"),
        (np.full((2, 8, 8), np.inf), "infinite"),
    ],
)
@pytest.mark.parametrize("plot", [plot_manifold, plot_samples, lambda x: plot_reconstructions(x, x)])
def test_what_is_not_images_is_refused(plot, images, message):
    with pytest.raises(ValueError, match=message):
        plot(images)


def test_traversals_name_the_shape_they_want():
    with pytest.raises(ValueError, match=r"\(J, steps, H, W\) or \(J, steps, H, W, C\).*came \(5, 8, 8\)"):
        plot_traversals(np.zeros((5, 8, 8)))


@pytest.mark.parametrize("columns", [0, 1.5])
def test_bad_columns_are_refused(columns):
    with pytest.raises(ValueError, match="columns: expected an integer >= 1"):
        plot_samples(np.zeros((2, 4, 4)), columns=columns)


# Latents.


def test_two_dimensions_are_drawn_as_they_are(rng):
    z, labels = rng.normal(size=(60, 2)), np.arange(60) % 10
    figure = plot_latents(z, labels, title="Codes")
    axes = figure.axes[0]
    np.testing.assert_array_equal(axes.collections[0].get_offsets(), z)
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_title()) == ("$z_1$", "$z_2$", "Codes")
    assert len(point_colours(figure)) == 10
    assert texts(figure.legends[0].get_texts()) == [str(i) for i in range(10)]


def test_legend_colours_are_the_points_colours(rng):
    labels = np.array(["b", "a", "c", "a"])
    figure = plot_latents(rng.normal(size=(4, 2)), labels)
    legend = figure.legends[0]
    colour_of = {
        text: to_hex(handle.get_color())
        for text, handle in zip(texts(legend.get_texts()), legend.legend_handles, strict=True)
    }
    drawn = [to_hex(c) for c in figure.axes[0].collections[0].get_facecolors()]
    assert drawn == [colour_of[label] for label in labels]


def test_unlabelled_points_have_one_colour(rng):
    figure = plot_latents(rng.normal(size=(30, 2)))
    assert len(point_colours(figure)) == 1
    assert not figure.legends


def test_twenty_labels_differ_by_colour_and_marker(rng):
    z, labels = rng.normal(size=(40, 2)), np.arange(40) % 20
    figure = plot_latents(z, labels)
    circles, triangles = figure.axes[0].collections
    np.testing.assert_array_equal(circles.get_offsets(), z[labels < 10])
    np.testing.assert_array_equal(triangles.get_offsets(), z[labels >= 10])
    looks = {(to_hex(h.get_color()), h.get_marker()) for h in figure.legends[0].legend_handles}
    assert len(looks) == 20


@pytest.mark.parametrize("dims", [1, 2])
def test_more_labels_have_a_colour_bar(rng, dims):
    labels = np.arange(42) % 21
    figure = plot_latents(rng.normal(size=(42, dims)), labels)
    assert not figure.legends
    if dims == 2:
        assert figure.axes[1].get_ylabel() == "label"
        np.testing.assert_array_equal(figure.axes[0].collections[0].get_array(), labels)
    else:  # the axis says it
        np.testing.assert_array_equal(figure.axes[0].collections[0].get_offsets()[:, 1], labels)


def test_label_names():
    z, labels = np.eye(2), [2, 0]
    for names in (["zero", "one", "two"], {0: "zero", 2: "two"}):
        legend = plot_latents(z, labels, label_names=names).legends[0]
        assert texts(legend.get_texts()) == ["zero", "two"]
    with pytest.raises(ValueError, match=r"a name for every label, came none for \[2\]"):
        plot_latents(z, labels, label_names=["zero", "one"])


def test_one_dimension_is_a_histogram_or_strips(rng):
    z, labels = rng.normal(size=(50, 1)), np.arange(50) % 3
    bars = plot_latents(z).axes[0].patches
    assert sum(bar.get_height() for bar in bars) == 50
    axes = plot_latents(z, labels, label_names="abc").axes[0]
    points = np.asarray(axes.collections[0].get_offsets())
    np.testing.assert_array_equal(points[:, 0], z[:, 0])
    np.testing.assert_array_equal(np.round(points[:, 1]), labels)
    assert texts(axes.get_yticklabels()) == ["a", "b", "c"]
    assert axes.get_xlabel() == "$z_1$"


def test_pca_is_the_best_plane_and_says_how_good(rng):
    scales = np.array([3.0, 2.0, 1.0])
    z = rng.normal(size=(400, 3)) * scales
    axes = plot_latents(z, method="pca").axes[0]
    points = np.asarray(axes.collections[0].get_offsets())
    eigenvalues = np.linalg.eigvalsh(np.cov(z.T))[::-1]
    np.testing.assert_allclose(points.var(axis=0, ddof=1), eigenvalues[:2])
    shares = eigenvalues / eigenvalues.sum()
    assert axes.get_xlabel() == f"PC 1 ({shares[0]:.1%} of variance)"
    assert axes.get_ylabel() == f"PC 2 ({shares[1]:.1%} of variance)"


def test_auto_is_tsne_for_few_points_and_pca_for_many(rng, monkeypatch):
    z = np.concatenate([rng.normal(size=(30, 4)), rng.normal(size=(30, 4)) + 20])
    axes = plot_latents(z, seed=1).axes[0]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("t-SNE 1", "t-SNE 2")
    points = np.asarray(axes.collections[0].get_offsets())
    again = plot_latents(z, method="tsne", seed=1).axes[0].collections[0].get_offsets()
    np.testing.assert_array_equal(points, again)
    centres = points[:30].mean(axis=0), points[30:].mean(axis=0)
    spread = np.linalg.norm(points[:30] - centres[0], axis=1).mean()
    assert np.linalg.norm(centres[0] - centres[1]) > spread  # neighbours stay neighbours
    monkeypatch.setattr(plots, "TSNE_LIMIT", 59)
    assert plot_latents(z).axes[0].get_xlabel().startswith("PC 1")


def test_a_collapsed_posterior_is_drawn(tmp_path):
    figure = plot_latents(np.ones((10, 3)))
    assert figure.axes[0].get_xlabel() == "PC 1 (0.0% of variance)"
    figure.savefig(tmp_path / "collapsed.png")
    plot_latents(np.ones((10, 2))).savefig(tmp_path / "point.png")
    with pytest.raises(ValueError, match="not all equal"):
        plot_latents(np.ones((10, 3)), method="tsne")


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((np.zeros(3),), {}, r"shape \(n, J\).*came float64 \(3,\)"),
        ((np.zeros((0, 2)),), {}, r"came float64 \(0, 2\)"),
        ((np.array([["a", "b"]]),), {}, "expected numbers"),
        ((np.full((3, 2), np.nan),), {}, "came 6 NaN"),
        ((np.zeros((3, 2)), [1, 2]), {}, r"expected shape \(3,\), one per row of z, came \(2,\)"),
        ((np.zeros((3, 2)), [1, 2, np.nan]), {}, "finite numbers or strings"),
        ((np.zeros((3, 2)), [None, 2, 3]), {}, "finite numbers or strings, came object"),
        ((np.zeros((21, 2)), [f"s{i}" for i in range(21)]), {}, "at most 20 different strings, came 21"),
        ((np.zeros((3, 2)),), {"method": "t-SNE"}, r"came 't-SNE' \(did you mean 'tsne'\?\)"),
        ((np.zeros((3, 2)),), {"method": "umap"}, "expected one of 'auto', 'pca', 'tsne', came 'umap'"),
        ((np.zeros((3, 1)),), {"method": "pca"}, r"J >= 2, came z of shape \(3, 1\)"),
        ((np.zeros((1, 3)),), {}, "'pca' expected n >= 2"),
        ((np.eye(3),), {"method": "tsne"}, "'tsne' expected n >= 4"),
    ],
)
def test_bad_latents_are_refused(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        plot_latents(*arguments, **options)


# Ranks of simulation-based calibration.


def test_rank_histograms_count_each_dimension(rng):
    ranks = {"z": rng.integers(0, 40, (400, 2, 3)), "b": rng.integers(0, 40, 400)}
    figure = plot_rank_histograms(ranks, num_draws=39, bins=8, columns=3)
    titles = ["z[0, 0]", "z[0, 1]", "z[0, 2]", "z[1, 0]", "z[1, 1]", "z[1, 2]", "b"]
    assert [axes.get_title() for axes in figure.axes] == titles
    for axes, values in zip(figure.axes, [*ranks["z"].reshape(400, 6).T, ranks["b"]], strict=True):
        bars = [patch for patch in axes.patches if patch.get_width() == pytest.approx(5)]
        np.testing.assert_array_equal([bar.get_height() for bar in bars], np.bincount(values // 5, minlength=8))
        assert axes.get_xlim() == (-0.5, 39.5)


def test_rank_histograms_show_what_is_expected_of_a_calibrated_guide(rng):
    (axes,) = plot_rank_histograms({"z": rng.integers(0, 40, 400)}, num_draws=39, bins=8).axes
    (mean,) = axes.lines
    assert set(mean.get_ydata()) == {50.0}
    band = axes.patches[0]
    assert (band.get_y(), band.get_y() + band.get_height()) == binom.interval(0.99, 400, 1 / 8)
    assert axes.get_title() == "z"


@pytest.mark.parametrize(
    ("ranks", "options", "message"),
    [
        ([1, 2], {}, "expected a mapping"),
        ({}, {}, "maybe empty"),
        ({"z": 3}, {}, r"z: expected ranks of shape \(n, \.\.\.\)"),
        ({"z": []}, {}, r"\(0,\)"),
        ({"z": ["a"]}, {}, "came <U1"),
        ({"z": [0.5]}, {}, "expected whole numbers from 0 to num_draws = 19"),
        ({"z": [np.nan]}, {}, "expected whole numbers"),
        ({"z": [-1, 3]}, {}, "from -1 to 3"),
        ({"z": [20]}, {}, "from 20 to 20"),
        ({"z": [1]}, {"bins": 3}, "divisor of num_draws \\+ 1 = 20, came 3"),
        ({"z": [1]}, {"columns": 0}, "columns"),
        ({"z": np.zeros((2, 101), int)}, {}, "at most 100 dimensions, came 101"),
    ],
)
def test_bad_ranks_are_refused(ranks, options, message):
    with pytest.raises(ValueError, match=message):
        plot_rank_histograms(ranks, num_draws=19, **options)


# All of them.


# Sequences.


def labelled(axes, label):
    (found,) = [line for line in axes.lines if line.get_label() == label]
    return found.get_xdata().tolist(), found.get_ydata().tolist()


def band(axes, label):
    """Steps, lower and upper edge of the band of a label."""
    (found,) = [patch for patch in axes.collections if patch.get_label() == label]
    vertices = found.get_paths()[0].vertices
    steps = np.unique(vertices[:, 0])
    return steps, *(np.array([edge(vertices[vertices[:, 0] == t, 1]) for t in steps]) for edge in (np.min, np.max))


def test_a_fan_is_of_the_draws_after_the_history(rng):
    history, truth, draws = rng.normal(size=(6, 2)), rng.normal(size=(3, 2)), rng.normal(size=(50, 4, 2))
    figure = fan_chart(history, truth, draws, names=["a", "b"], title="t")
    assert [axes.get_ylabel() for axes in figure.axes] == ["a", "b"]
    assert figure.axes[0].get_title() == "t"
    assert texts(figure.legends[0].get_texts()) == ["90 % interval", "50 % interval", "median", "observed", "truth"]
    for d, axes in enumerate(figure.axes):
        assert labelled(axes, "observed") == ([0, 1, 2, 3, 4, 5], history[:, d].tolist())
        assert labelled(axes, "truth") == ([6, 7, 8], truth[:, d].tolist())
        steps, median = labelled(axes, "median")
        assert steps == [6, 7, 8, 9]
        np.testing.assert_allclose(median, np.median(draws[..., d], 0))
        for label, levels in (("90 % interval", (0.05, 0.95)), ("50 % interval", (0.25, 0.75))):
            steps, low, high = band(axes, label)
            assert steps.tolist() == [6, 7, 8, 9]
            np.testing.assert_allclose([low, high], np.quantile(draws[..., d], levels, axis=0))


def test_a_fan_over_gaps_and_one_of_a_single_step(rng):
    x = rng.normal(size=(6, 1))
    gaps = x.copy()
    gaps[2:4] = np.nan
    axes = fan_chart(gaps, None, rng.normal(size=(9, 6, 1)), start=0).axes[0]
    assert labelled(axes, "median")[0] == [0, 1, 2, 3, 4, 5]
    assert np.isnan(labelled(axes, "observed")[1]).sum() == 2
    assert "truth" not in [line.get_label() for line in axes.lines]
    axes = fan_chart(x, None, rng.normal(size=(9, 1, 1))).axes[0]
    assert labelled(axes, "median")[0] == [5.5, 6.5]
    assert band(axes, "90 % interval")[0].tolist() == [5.5, 6.5]
    assert fan_chart(np.zeros((0, 1)), None, np.zeros((3, 2, 1))).axes


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((np.zeros(5), None, np.zeros((3, 4, 1))), {}, r"history: expected numbers of shape \(T, D\).*\(5,\)"),
        ((np.zeros((5, 2)), None, np.zeros((3, 4, 1))), {}, r"history: expected the 1 variables of draws"),
        ((np.zeros((5, 1)), np.zeros((9, 1)), np.zeros((3, 4, 1))), {}, "truth: expected at most the 4 steps"),
        ((np.zeros((5, 1)), None, np.zeros((0, 4, 1))), {}, "draws: expected numbers of shape"),
        ((np.zeros((5, 1)), None, np.full((3, 4, 1), np.nan)), {}, "draws: expected finite"),
        ((np.zeros((5, 1)), None, np.zeros((3, 4, 1))), {"start": -1}, "start: expected an integer >= 0"),
        ((np.zeros((5, 1)), None, np.zeros((3, 4, 1))), {"names": ["a", "b"]}, "names: expected one for each of 1"),
        ((np.zeros((5, 21)), None, np.zeros((3, 4, 21))), {}, "at most 20 variables, came 21"),
    ],
)
def test_bad_fans(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        fan_chart(*arguments, **options)


def test_latent_paths_are_means_between_quantiles(rng):
    means = rng.normal(size=(7, 2))
    edges = np.stack([means - 2, means - 1, means, means + 1, means + 2])
    figure = latent_paths(means, edges, levels=(0.1, 0.25, 0.5, 0.75, 0.9), names=["u", "v"])
    for j, axes in enumerate(figure.axes):
        assert labelled(axes, "mean") == (list(range(7)), means[:, j].tolist())
        _, low, high = band(axes, "80 % interval")
        np.testing.assert_allclose([low, high], edges[[0, -1], :, j])
        _, low, high = band(axes, "50 % interval")
        np.testing.assert_allclose([low, high], edges[[1, 3], :, j])
    for levels in ((0.5, 0.4), (0.0, 0.5), (0.5, 1.0)):
        with pytest.raises(ValueError, match="levels: expected increasing numbers between 0 and 1"):
            latent_paths(means, edges[:2], levels=levels)
    with pytest.raises(ValueError, match=r"quantiles: expected shape \(4, 7, 2\)"):
        latent_paths(means, edges)


def test_piano_rolls_name_their_notes():
    roll = np.zeros((5, 88))
    roll[1, 60 - 21] = roll[3, 75 - 21] = 1  # C4, E flat 5
    figure = piano_roll(roll)
    (axes,) = figure.axes
    assert texts(axes.get_yticklabels()) == ["C4", "C5", "C6"]
    assert axes.get_yticks().tolist() == [60, 72, 84]
    assert axes.get_ylim() == (59.5, 84.5)
    left, right, bottom, top = axes.images[0].get_extent()
    assert (left, right, bottom, top) == (-0.5, 4.5, 20.5, 108.5)
    image = np.asarray(axes.images[0].get_array())
    assert np.argwhere(image).tolist() == [[39, 1], [54, 3]]
    assert axes.images[0].origin == "lower"
    whole = piano_roll(np.zeros((5, 88))).axes[0]
    assert whole.get_ylim() == (20.5, 108.5)
    assert texts(whole.get_yticklabels()) == [f"C{octave}" for octave in range(1, 9)]
    edges = np.zeros((5, 88))
    edges[0, [0, 87]] = 1  # A0 and C8
    assert piano_roll(edges).axes[0].get_ylim() == (20.5, 108.5)


def test_several_piano_rolls_share_their_axes(rng):
    rolls = [rng.random((n, 88)) for n in (4, 9)]
    rolls[0][1] = np.nan
    figure = piano_roll(rolls, ["a", "b"], start=3)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["a", "b"]
    assert all(axes.get_xlim() == (-0.5, 8.5) for axes in figure.axes)
    assert [axes.lines[0].get_xdata()[0] for axes in figure.axes] == [2.5, 2.5]
    assert np.ma.getmaskarray(figure.axes[0].images[0].get_array())[:, 1].all()


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        (np.zeros((5, 87)), {}, r"expected piano rolls of shape \(T, 88\)"),
        (np.full((5, 88), 60.0), {}, "expected numbers from 0 to 1, came values from 60"),
        ([], {}, "expected a piano roll"),
        (3, {}, "expected a piano roll"),
        (np.zeros((2, 5, 88)), {"labels": ["a"]}, "labels: expected one for each of 2 rolls, came 1"),
    ],
)
def test_bad_piano_rolls(x, options, message):
    with pytest.raises(ValueError, match=message):
        piano_roll(x, **options)


def test_sequences_are_lines(rng):
    x = rng.normal(size=(3, 6, 2))
    x[1, [1, 3]] = np.nan
    figure = plot_sequences(x)
    for d, axes in enumerate(figure.axes):
        np.testing.assert_array_equal([line.get_ydata() for line in axes.lines], x[..., d])
        assert [line.get_marker() for line in axes.lines] == ["None", "o", "None"]  # a lone point would be invisible
    with pytest.raises(ValueError, match="infinite"):
        plot_sequences(np.full((1, 2, 1), np.inf))


def each_figure():
    rng = np.random.default_rng(0)
    images, labels = rng.random((4, 3, 8, 8)), np.arange(40) % 4
    curve = {"samples": np.array([10.0, 0, 100]), "test_bound": np.array([-2.0, -5, -1])}
    z = rng.normal(size=(40, 2))
    return {
        "curves": (plot_learning_curves, ({"a": curve},), {"title": "t"}),
        "comparison": (plot_comparison, ({"a": {"0.1": [curve, curve]}},), {"title": "t", "reference_bound": -2.0}),
        "manifold": (plot_manifold, (images[:, 0],), {"title": "t"}),
        "samples": (plot_samples, (images[:, 0] * 1.1,), {}),
        "reconstructions": (plot_reconstructions, (images[:, 0], images[:, 1]), {}),
        "traversals": (plot_traversals, (images,), {"values": np.arange(3.0)}),
        "latents": (plot_latents, (z, labels), {}),
        "histogram": (plot_latents, (z[:, :1],), {}),
        "strips": (plot_latents, (z[:, :1], labels), {}),
        "colour bar": (plot_latents, (z, z[:, 0]), {}),
        "tsne": (plot_latents, (rng.normal(size=(40, 3)), labels), {}),
        "ranks": (plot_rank_histograms, ({"z": rng.integers(0, 20, (50, 7))},), {"num_draws": 19, "title": "t"}),
        "sequences": (plot_sequences, (rng.normal(size=(9, 5, 2)),), {"title": "t"}),
        "fan": (fan_chart, (z[:30], z[30:], rng.normal(size=(20, 10, 2))), {"title": "t"}),
        "latent paths": (latent_paths, (z, np.stack([z - 2, z - 1, z + 1, z + 2])), {"title": "t"}),
        "piano roll": (piano_roll, (rng.random((2, 9, 88)),), {"labels": ["a", "b"], "title": "t", "start": 4}),
    }


def arrays_in(value):
    if isinstance(value, np.ndarray):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else ()
    return [array for item in inner for array in arrays_in(item)]


@pytest.mark.parametrize("name", list(each_figure()))
def test_each_figure_is_saved_and_leaves_no_trace(name, tmp_path):
    plot, arguments, options = each_figure()[name]
    before = [array.copy() for array in arrays_in((arguments, options))]
    with mpl.rc_context({"font.size": 31.0, "axes.grid": False}):
        settings = dict(mpl.rcParams)
        figure = plot(*arguments, **options)
        assert dict(mpl.rcParams) == settings
    assert type(figure) is Figure
    for old, new in zip(before, arrays_in((arguments, options)), strict=True):
        np.testing.assert_array_equal(old, new)
    figure.savefig(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    # Nothing is cut off: all text lies inside the figure.
    box, canvas = figure.get_tightbbox(), figure.get_size_inches()
    assert box.x0 >= -0.01
    assert box.y0 >= -0.01
    assert box.x1 <= canvas[0] + 0.01
    assert box.y1 <= canvas[1] + 0.01


def test_neither_pyplot_nor_torch_is_imported():
    source = inspect.getsourcefile(plots)
    code = (
        f"import sys, runpy; runpy.run_path({source!r}); "
        "sys.exit(any(m in sys.modules for m in ('matplotlib.pyplot', 'torch', 'pyro', 'sklearn')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_public_functions_keep_their_docstrings_and_examples():
    for name in plots.__all__:
        doc = getattr(plots, name).__doc__
        assert all(part in doc for part in ("Args:", "Returns:", "Raises:", "arXiv:", ">>> ")), name
