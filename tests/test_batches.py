"""Batches cut by index: every row once, in an order that depends on seed and epoch alone."""

import itertools
import math
from dataclasses import replace
from zlib import crc32

import pytest
import torch

from pyro_vae.data import batches as batches_module
from pyro_vae.data.batches import (
    BatchIterable,
    Reader,
    TensorData,
    as_columns,
    blocks,
    is_grey,
    is_unscaled,
    require_range,
    require_valid,
    trimmed,
)
from pyro_vae.training.provenance import checksum

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
    batches = [(index, data.rows(index)) for index in data.shuffle(*args, **kwargs)]
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
        columns = data.rows(next(data.shuffle(10, seed=1, epoch=epoch)))
        counts[columns["x"].tolist().index(0.0)] += 1
    assert ((counts - 200) ** 2 / 200).sum() < 33.7  # its 0.9999 quantile


# The reader -----------------------------------------------------------------------------------------------------------


def test_stored_data_are_not_changed_by_reading():
    stored = torch.tensor([[0, 255]], dtype=torch.uint8)
    data = TensorData({"x": stored}, PLAIN)
    data.rows(slice(None))["x"].add_(1)
    assert stored.tolist() == [[0, 255]]


@pytest.mark.parametrize("index", [slice(None), slice(1, 3), torch.tensor([1])])
@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.uint8, torch.bool])
def test_a_program_may_write_into_what_it_is_given(dtype, index):
    """Stored data may be a file that is mapped read-only: writing there ends the process."""
    stored = torch.ones(4, 2, dtype=dtype)
    TensorData({"x": stored}, PLAIN).rows(index)["x"].zero_()
    assert stored.all()


def test_float64_rows_that_are_read_are_never_scaled_in_place():
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


# Drawn once -----------------------------------------------------------------------------------------------------------


def grey(num_data=2_500):
    rows = torch.arange(num_data)
    reader = Reader(torch.device("cpu"), torch.float32, data_shape=(3, 2), drawn=frozenset({"x"}))
    return TensorData({"x": (rows % 256).to(torch.uint8)[:, None].expand(-1, 6), "row": rows}, reader)


def drawn_at_once(data, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.bernoulli(data.columns["x"].float() / 255, generator=generator).reshape(-1, 3, 2)


@pytest.mark.parametrize("num_data", [1, 999, 1000, 1001, None])
@pytest.mark.parametrize("batch_size", [7, 500, 999, 1000, 5000])
def test_draws_in_order_are_those_of_a_seed_whatever_the_batches(batch_size, num_data):
    found = list(grey().drawn_once(3, num_data).in_order(batch_size))
    assert torch.equal(torch.cat([b["x"] for b in found]), drawn_at_once(grey(), 3)[:num_data])
    assert torch.equal(torch.cat([b["row"] for b in found]), torch.arange(num_data or 2_500))
    assert all(len(b["x"]) == batch_size for b in found[:-1])


@pytest.mark.parametrize(
    "index",
    [slice(None), slice(0, 100), slice(990, 1010), slice(5, -5), torch.tensor([2_400, 3, 3, 1_000])],
)
def test_draws_by_index_are_those_in_order(index):
    found = grey().drawn_once(3).rows(index)
    assert torch.equal(found["x"], drawn_at_once(grey(), 3)[index])
    assert torch.equal(found["row"], torch.arange(2_500)[index])


def test_draws_do_not_depend_on_how_many_are_made_at_a_time(monkeypatch):
    monkeypatch.setattr(batches_module, "_ELEMENTS_PER_DRAW", 6 * 13)  # as for very wide rows
    assert torch.equal(grey().drawn_once(3).rows(slice(None))["x"], drawn_at_once(grey(), 3))


def test_two_drawn_columns_are_drawn_alike_whatever_the_batches():
    reader = Reader(torch.device("cpu"), torch.float64, drawn=frozenset({"a", "b"}))
    data = TensorData({"a": torch.full((1_500, 9), 0.5), "b": torch.full((1_500,), 0.5)}, reader).drawn_once(0)
    whole = data.rows(slice(None))
    for name in ("a", "b"):
        assert torch.equal(torch.cat([batch[name] for batch in data.in_order(70)]), whole[name])
        assert whole[name].mean().item() == pytest.approx(0.5, abs=5 * 0.5 / whole[name].numel() ** 0.5)


def test_drawing_leaves_torchs_generator_alone():
    state = torch.get_rng_state()
    list(grey().drawn_once(0).in_order(100))
    assert torch.equal(torch.get_rng_state(), state)


# Passes in blocks -----------------------------------------------------------------------------------------------------


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(batches_module, "_ELEMENTS_IN_BLOCK", 12)


@pytest.mark.parametrize("shape", [(10,), (10, 3), (10, 5, 7), (0, 3)])
def test_blocks_cover_each_row_once_without_a_copy(small_blocks, shape):
    column = torch.rand(shape)
    found = blocks(column)
    assert torch.equal(torch.cat(found), column)
    assert all(block.untyped_storage().data_ptr() == column.untyped_storage().data_ptr() for block in found)
    assert all(len(block) == 1 or block.numel() <= 12 for block in found)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_bad_rows_are_counted_over_all_blocks(small_blocks, bad, dtype):
    x = torch.rand(50, 4).to(dtype)
    x[[7, 8, 31], [0, 3, 2]] = bad
    with pytest.raises(ValueError, match="3 of 50 rows, the first at row 7"):
        require_valid({"x": x})


def test_what_a_column_holds_is_found_in_its_last_block_too(small_blocks):
    binary, levels = torch.zeros(40, 3), torch.zeros(40, 3, dtype=torch.uint8)
    for column in (binary, levels):
        assert not is_grey("x", column)
        column[-1, -1] = 1
    assert is_unscaled(levels)
    assert not is_grey("x", binary)
    assert not is_grey("x", levels, unscaled=True)
    levels[-1, 0] = 2
    assert not is_unscaled(levels)
    assert is_grey("x", levels)
    binary[-1, 0] = 0.5
    assert is_grey("x", binary)
    binary[0, 0], binary[-1, 0] = -0.5, 1.5
    with pytest.raises(ValueError, match=r"values from -0\.5 to 1\.5"):
        require_range("x", binary, (0.0, 1.0))
    with pytest.raises(ValueError, match="values from 0 to 2"):
        require_range("x", levels, (0.0, 1.0), unscaled=True)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.float16, torch.float64, torch.bool])
def test_a_checksum_does_not_depend_on_blocks_or_strides(small_blocks, dtype):
    column = torch.randint(0, 2, (50, 6, 2)).to(dtype).transpose(0, 1)
    expected = crc32(column.contiguous().view(torch.uint8).numpy().tobytes(), crc32(f"{dtype} (6, 50, 2)".encode()))
    assert checksum([column]) == expected


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


@pytest.mark.parametrize("steps", [1, 2, 7, 160, 1793])
def test_trimmed_sequences_keep_all_that_is_data_and_come_in_few_shapes(steps):
    x, mask = torch.rand(3, steps, 2), torch.rand(3, steps) < 0.5
    found = set()
    for longest in range(1, steps + 1):
        lengths = torch.tensor([1, longest, 1])
        batch = {"x": x, "lengths": lengths, "mask": mask, "label": torch.zeros(3, 2), "one": torch.zeros(3)}
        cut = trimmed(batch, {"x", "mask"})
        kept = cut["x"].shape[1]
        assert longest <= kept <= math.ceil(min(steps, longest * math.sqrt(2)))
        assert torch.equal(cut["x"], x[:, :kept])
        assert torch.equal(cut["mask"], mask[:, :kept])
        assert cut["x"].is_contiguous()
        assert all(cut[name] is batch[name] for name in ("lengths", "one"))
        assert cut["label"] is batch["label"]
        found.add(kept)
    assert steps in found
    assert len(found) <= 2 * math.log2(steps) + 1


def test_a_reader_trims_when_it_is_told_to():
    x, lengths = torch.arange(24.0).reshape(2, 12, 1), torch.tensor([3, 5])
    data = TensorData({"x": x, "lengths": lengths}, PLAIN)
    assert data.rows(slice(None))["x"].shape == (2, 12, 1)
    trimming = TensorData(data.columns, replace(PLAIN, trims=frozenset({"x"})))
    assert torch.equal(trimming.rows(slice(None))["x"], x[:, :6].double())
    assert torch.equal(trimming.rows(slice(0, 1))["x"], x[:1, :3].double())
