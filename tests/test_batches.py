"""Batches cut by index: every row once, in an order that depends on seed and epoch alone."""

import itertools

import pytest
import torch

from pyro_vae.data.batches import BatchIterable, Reader, TensorData, as_columns, is_grey, is_unscaled, require_valid

PLAIN = Reader(torch.device("cpu"), torch.float64)


def numbered(num_data=10):
    rows = torch.arange(float(num_data))
    return TensorData({"x": rows[:, None].expand(-1, 3), "y": -rows}, PLAIN)


def rows_of(batches):
    found = []
    for batch in batches:
        assert torch.equal(batch["x"][:, 0], -batch["y"])  # columns stay together
        found.append(batch["x"][:, 0].int().tolist())
    return found


def shuffled_rows(data, *args, **kwargs):
    batches = list(data.shuffled(*args, **kwargs))
    rows = rows_of(columns for _, columns in batches)
    assert rows == [index.tolist() for index, _ in batches]  # each comes with its index
    return rows


def shuffled_order(*args, **kwargs):
    return list(itertools.chain(*shuffled_rows(*args, **kwargs)))


# Order ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3, 5, 10, 99])
def test_in_order_covers_each_row_once(batch_size):
    batches = rows_of(numbered().in_order(batch_size))
    assert [row for batch in batches for row in batch] == list(range(10))
    assert all(len(batch) == batch_size for batch in batches[:-1])


@pytest.mark.parametrize("batch_size", [1, 3, 5, 10, 99])
def test_shuffled_covers_each_row_once(batch_size):
    batches = shuffled_rows(numbered(), batch_size, seed=0, epoch=0)
    assert sorted(row for batch in batches for row in batch) == list(range(10))
    assert all(len(batch) == min(batch_size, 10) for batch in batches[:-1])


def test_the_order_depends_on_seed_and_epoch_alone():
    data = numbered(50)
    first = shuffled_order(data, 7, seed=3, epoch=2)
    torch.manual_seed(99)
    torch.randn(5)
    assert shuffled_order(data, 7, seed=3, epoch=2) == first
    assert shuffled_order(data, 4, seed=3, epoch=2) == first  # nor on the batch size
    others = [shuffled_order(data, 7, seed=s, epoch=e) for s, e in ((3, 1), (4, 2), (2, 3))]
    assert all(other != first for other in others)
    assert first != list(range(50))


@pytest.mark.parametrize("skip", [0, 1, 3, 4, 9])
def test_skip_leaves_out_batches_at_the_start(skip):
    whole = shuffled_rows(numbered(), 3, seed=0, epoch=5)
    assert shuffled_rows(numbered(), 3, seed=0, epoch=5, skip=skip) == whole[skip:]


def test_shuffling_is_uniform():
    """Where row 0 comes, over 2000 epochs: a chi-square of nine degrees of freedom."""
    data = TensorData({"x": torch.arange(10.0)}, PLAIN)
    counts = torch.zeros(10)
    for epoch in range(2000):
        _, columns = next(data.shuffled(10, seed=1, epoch=epoch))
        counts[columns["x"].tolist().index(0.0)] += 1
    assert ((counts - 200) ** 2 / 200).sum() < 33.7  # its 0.9999 quantile


# The reader -----------------------------------------------------------------------------------------------------------


def test_stored_data_are_not_changed_by_reading():
    stored = torch.tensor([[0, 255]], dtype=torch.uint8)
    data = TensorData({"x": stored}, PLAIN)
    data.rows(slice(None))["x"].add_(1)
    assert stored.tolist() == [[0, 255]]


def test_float64_rows_that_are_read_are_views_or_copies_but_never_scaled_in_place():
    stored = torch.rand(4, 2)
    kept = stored.clone()
    TensorData({"x": stored}, Reader(torch.device("cpu"), torch.float32)).rows(slice(None))
    assert torch.equal(stored, kept)


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        (torch.tensor([0, 1], dtype=torch.uint8), True),
        (torch.tensor([0, 0], dtype=torch.uint8), False),  # blank either way: as a first batch it must not decide
        (torch.tensor([0, 2], dtype=torch.uint8), False),
        (torch.tensor([0, 1]), False),
        (torch.tensor([0.0, 1.0]), False),
    ],
)
def test_uint8_data_without_levels_above_one_are_binary_already(column, expected):
    assert is_unscaled(column) is expected


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        (torch.tensor([0, 255], dtype=torch.uint8), False),
        (torch.tensor([0, 1], dtype=torch.uint8), False),
        (torch.tensor([0, 1, 255], dtype=torch.uint8), True),
        (torch.tensor([0.0, 1.0]), False),
        (torch.tensor([0.0, 0.5]), True),
        (torch.tensor([True, False]), False),
    ],
)
def test_grey_levels_are_seen(column, expected):
    assert is_grey("x", column, is_unscaled(column)) is expected


def test_only_the_named_columns_are_drawn():
    reader = Reader(torch.device("cpu"), torch.float64, drawn=frozenset({"x"}))
    half = torch.full((100, 2), 0.5)
    read = reader({"x": half, "y": half})
    assert set(read["x"].unique().tolist()) == {0.0, 1.0}
    assert torch.equal(read["y"], half)


def test_only_the_first_column_is_reshaped_by_element_count():
    reader = Reader(torch.device("cpu"), torch.float64, data_shape=(2, 3))
    read = reader({"x": torch.arange(12.0).reshape(2, 6), "y": torch.zeros(2, 6)})
    assert read["x"].shape == (2, 2, 3)
    assert read["y"].shape == (2, 6)
    assert read["x"].flatten().tolist() == list(range(12))  # row-major
    with pytest.raises(ValueError, match="5 elements per datum"):
        reader({"x": torch.zeros(2, 5)})


# Columns --------------------------------------------------------------------------------------------------------------


def test_columns_come_in_the_order_of_the_arguments():
    data = {"c": torch.zeros(1), "b": torch.zeros(1), "a": torch.zeros(1)}
    assert list(as_columns(data, ("a", "b"))) == ["a", "b", "c"]


@pytest.mark.parametrize("data", [None, 3, "x", [1, 2], iter([])])
def test_what_is_no_columns(data):
    assert as_columns(data, ("x",)) is None


def test_integers_without_nan_are_valid():
    require_valid({"x": torch.tensor([1, 2]), "y": torch.tensor([True, False])})


def test_infinity_is_refused_in_vectors_too():
    with pytest.raises(ValueError, match="row 1"):
        require_valid({"x": torch.tensor([0.0, float("-inf")])})


def test_an_iterable_is_iterated_anew_each_time():
    batches = BatchIterable([torch.zeros(2, 3), torch.ones(1, 3)], ("x",), PLAIN)
    for _ in range(2):
        assert [len(c["x"]) for c in batches.raw()] == [2, 1]


def test_a_batch_of_something_else_is_refused():
    with pytest.raises(ValueError, match=r"batches of tensors.*str"):
        list(BatchIterable(["a"], ("x",), PLAIN).raw())
