"""Sequences: padding, piano rolls and their conversion, tables, simulations, and the user's own files."""

from __future__ import annotations

import functools
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from scipy.io import savemat

import pyro_vae as pv
from pyro_vae.data import datasets
from pyro_vae.data.datasets import DATASETS, Dataset, load_dataset
from pyro_vae.data.sequences import require_lengths

SHARED = Path(os.environ.get("PYRO_VAE_DATA") or Path(__file__).parents[3] / "shared" / "data")
SPLITS = ("train", "valid", "test")
SEQUENCES = [name for name, info in DATASETS.items() if info.num_steps]
MUSIC = {
    "jsb-chorales": (13_807, 4_602, 4_725),
    "nottingham": (176_561, 45_513, 44_463),
    "piano-midi": (75_911, 8_540, 19_036),
    "musedata": (245_202, 82_755, 64_339),
}


@functools.lru_cache(maxsize=2)  # some are large
def load(name: str) -> Dataset:
    if not DATASETS[name].is_local(SHARED):
        pytest.skip(f"{name} is not in {SHARED}")
    return load_dataset(name, SHARED)


# ---- What the sets hold


@pytest.mark.parametrize("name", SEQUENCES)
def test_sequences_are_as_registered(name: str) -> None:
    data, info = load(name), DATASETS[name]
    assert data.name == data.source == info.name
    assert data.binarize == info.binarize == "none"
    assert info.split.endswith(".")
    for split, size, steps in zip(SPLITS, info.sizes, info.num_steps, strict=True):
        x, lengths = getattr(data, split), getattr(data, f"{split}_lengths")
        assert x.shape == (size, steps, *info.shape)
        assert lengths.dtype == torch.int64
        assert lengths.shape == (size,)
        assert lengths.max() == steps
        assert lengths.min() >= 1
        assert not x[torch.arange(steps) >= lengths[:, None]].any()  # padding is zeros
        if x.dtype == torch.uint8:
            assert x.max() == 1  # numbers, not levels


@pytest.mark.parametrize("name", MUSIC)
def test_music_has_the_published_number_of_steps(name: str) -> None:
    data = load(name)
    assert tuple(int(getattr(data, f"{split}_lengths").sum()) for split in SPLITS) == MUSIC[name]


def test_rolls_that_were_stored_one_after_another_are_where_they_belong() -> None:
    data, stored = load("piano-midi"), np.load(SHARED / "piano_midi.npz")
    rolls = np.split(np.unpackbits(stored["valid"], axis=1), np.cumsum(stored["valid_lengths"])[:-1])
    for x, length, roll in zip(data.valid, data.valid_lengths, rolls, strict=True):
        assert np.array_equal(x[:length].numpy(), roll)


def test_a_chorale_has_few_voices() -> None:
    data = load("jsb-chorales")
    sounding = data.train.sum(-1)[torch.arange(129) < data.train_lengths[:, None]]
    assert 3.5 < sounding.double().mean() < 4
    assert sounding.max() <= 6


def test_a_split_goes_in_the_place_of_the_test_with_its_lengths() -> None:
    data = load("pendulum").with_test("train", 7)
    assert len(data.test) == len(data.test_lengths) == len(data.test_states) == 7
    assert torch.equal(data.test, data.train[:7])
    assert data.test_labels is None


# ---- Conversion


def as_matlab(file: Path, rolls: dict[str, list[np.ndarray]]) -> None:
    """A file in the layout of the originals: for each split a row of cells, each of a piano roll."""
    cells = {}
    for split, sequences in rolls.items():
        cells[f"{split}data"] = np.empty((1, len(sequences)), object)
        for number, sequence in enumerate(sequences):
            cells[f"{split}data"][0, number] = sequence.astype(np.float64)
    savemat(file, cells, do_compression=True)


@pytest.mark.parametrize("name", ["jsb-chorales", "piano-midi"])
def test_stored_rolls_in_the_layout_of_the_originals_are_converted_to_themselves(name: str, tmp_path: Path) -> None:
    """The converted arrays have the registered checksums."""
    data, info = load(name), DATASETS[name]
    rolls = {
        split: [x[:length].numpy() for x, length in zip(x, lengths, strict=True)]
        for split, x, lengths in ((s, getattr(data, s), getattr(data, f"{s}_lengths")) for s in SPLITS)
    }
    (original,) = info.originals
    as_matlab(tmp_path / original, rolls)
    again = load_dataset(name, tmp_path)  # by hand, without a network
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted([original, info.files[0]])
    for split in SPLITS:
        assert torch.equal(getattr(again, split), getattr(data, split))
        assert torch.equal(getattr(again, f"{split}_lengths"), getattr(data, f"{split}_lengths"))


def test_other_music_is_refused(tmp_path: Path) -> None:
    rolls = {split: [np.eye(5, 88)] * size for split, size in zip(SPLITS, (229, 76, 77), strict=True)}
    as_matlab(tmp_path / "JSB_Chorales.mat", rolls)
    with pytest.raises(ConnectionError, match="expected `train` with sha256 fb2cc2fe"):
        load_dataset("jsb-chorales", tmp_path)


# ---- Padding


def test_padding() -> None:
    sequences = [torch.arange(1.0, 7.0).reshape(3, 2), torch.full((1, 2), 9.0), torch.full((2, 2), 8.0)]
    x, lengths = pv.pad_sequences(sequences)
    assert x.tolist() == [[[1, 2], [3, 4], [5, 6]], [[9, 9], [0, 0], [0, 0]], [[8, 8], [8, 8], [0, 0]]]
    assert lengths.tolist() == [3, 1, 2]
    assert (x.dtype, lengths.dtype) == (torch.float64, torch.int64)
    assert pv.pad_sequences([np.ones(4, np.uint8), np.ones(2, np.uint8)])[0].shape == (2, 4)


@pytest.mark.parametrize(
    ("sequences", "said"),
    [
        ([], "at least one sequence, got none"),
        ([np.ones((2, 3)), np.ones((0, 3))], r"sequence 1: expected .*one step, got shape \(0, 3\)"),
        ([np.ones((2, 3)), np.float64(1)], r"sequence 1: .*got shape \(\)"),
        ([np.ones((2, 3)), np.ones((2, 3)), np.ones((2, 4))], r"sequence 2: .*of shape \(3,\), got .* of shape \(4,\)"),
        ([np.ones((2, 3)), np.ones((2, 3), np.float32)], r"sequence 1: .*float64 .*got torch.float32"),
    ],
)
def test_sequences_that_cannot_be_padded(sequences: list[np.ndarray], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        pv.pad_sequences(sequences)


@pytest.mark.parametrize(
    ("lengths", "said"),
    [
        ([3, 0, 2], r"3 whole numbers from 1 to 4.*; got 0 in row 1"),
        ([3, 4, 5], r"from 1 to 4.*; got 5 in row 2"),
        ([-1, 4, 9], r"; got -1 in row 0"),
        ([3.0, 2.5, 2.0], r"; got 2\.5 in row 1"),
        ([3.0, 2.0, float("nan")], r"; got nan in row 2"),
        ([1, 2], r"got torch.int64 of shape \(2,\)"),
        ([[1], [2], [3]], r"got torch.int64 of shape \(3, 1\)"),
        ([True, True, True], "got torch.bool"),
    ],
)
def test_what_lengths_must_be(lengths: list[float], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        require_lengths("lengths", torch.tensor(lengths), (3, 4, 2))
    require_lengths("lengths", torch.tensor([1, 4, 2]), (3, 4, 2))
    require_lengths("lengths", np.array([1.0, 4.0, 2.0]), (3, 4))


# ---- The user's own arrays


def test_npz_with_lengths(tmp_path: Path) -> None:
    parts = {"train": np.ones((9, 5, 2), np.float32), "test": np.ones((2, 7, 2), np.float32)}
    np.savez(tmp_path / "a.npz", **parts, train_lengths=np.arange(9) % 5 + 1, test_lengths=np.array([7, 3], np.uint8))
    data = load_dataset(tmp_path / "a.npz")
    assert data.train.shape == (8, 5, 2)
    assert data.valid.shape == (1, 5, 2)
    assert data.test_lengths.tolist() == [7, 3]
    assert data.test_lengths.dtype == torch.int64
    order = np.random.default_rng(0).permutation(9)
    assert torch.cat([data.train_lengths, data.valid_lengths]).tolist() == (order % 5 + 1).tolist()


def test_npz_with_one_array_and_lengths(tmp_path: Path) -> None:
    lengths = np.arange(1, 11)
    x = (np.arange(10) < lengths[:, None]).astype(np.uint8)[..., None]
    np.savez(tmp_path / "a.npz", x=x, lengths=lengths, y=lengths)
    data = load_dataset(tmp_path / "a.npz")
    for split in SPLITS:
        found = getattr(data, f"{split}_lengths")
        assert torch.equal(getattr(data, split).sum((1, 2)), found)
        assert torch.equal(getattr(data, f"{split}_labels"), found)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"train_lengths": np.array([1, 6, 2])}, r"`train_lengths`: .*from 1 to 5.*; got 6 in row 1"),
        ({"train_lengths": np.array([1, 2])}, r"`train_lengths`: .*shape \(2,\)"),
        ({"test_lengths": None}, "of all splits or of none.*`test`"),
        ({"test": np.ones((3, 9, 3))}, r"like `train`, float64 \(3, 5, 2\).*found float64 \(3, 9, 3\)"),
    ],
)
def test_npz_with_lengths_that_will_not_do(tmp_path: Path, change: dict[str, np.ndarray], said: str) -> None:
    arrays = {f"{split}_lengths": np.array([1, 2, 5]) for split in SPLITS} | {s: np.ones((3, 5, 2)) for s in SPLITS}
    np.savez(tmp_path / "a.npz", **{name: array for name, array in (arrays | change).items() if array is not None})
    with pytest.raises(ValueError, match=said) as error:
        load_dataset(tmp_path / "a.npz")
    assert "a.npz" in str(error.value)


# ---- Tables


def table(folder: Path, text: str, name: str = "series.csv") -> Dataset:
    (folder / name).write_text(text)
    return load_dataset(folder / name)


def test_one_series_is_cut_in_time(tmp_path: Path) -> None:
    data = table(tmp_path, "time,price\n" + "".join(f"{t},{t / 2}\n" for t in range(20)))
    assert data.name == "series.csv"
    assert data.train.dtype == torch.float32
    for split, steps in zip(SPLITS, (range(16), range(16, 18), range(18, 20)), strict=True):
        x, lengths = getattr(data, split), getattr(data, f"{split}_lengths")
        assert x.tolist() == [[[t, t / 2] for t in steps]]
        assert lengths.tolist() == [len(steps)]


def test_a_column_says_which_sequence_a_row_belongs_to(tmp_path: Path) -> None:
    """Rows of two sequences may alternate; those of one are in the order of the file."""
    text = "a, sequence ,b\n1,x,2\n5,y,6\n3,x,4\n" + "".join(f"{n},z{n},0\n" for n in range(8))
    data = table(tmp_path, text)
    found = {}
    for split in SPLITS:
        for x, length in zip(getattr(data, split), getattr(data, f"{split}_lengths"), strict=True):
            found[tuple(map(tuple, x[:length].tolist()))] = x[length:].tolist()
    assert found.pop(((1.0, 2.0), (3.0, 4.0))) == []
    assert found.pop(((5.0, 6.0),)) == [[0.0, 0.0]]
    assert sorted(found) == [((float(n), 0.0),) for n in range(8)]
    assert [len(data.train), len(data.valid), len(data.test)] == [8, 1, 1]


def test_empty_cells_are_nan_and_fit_says_what_to_do(tmp_path: Path) -> None:
    data = table(tmp_path, "a,b\n1,2\n,3\n4,NA\n" + "5,6\n" * 7)
    assert data.train[0, :3].isnan().tolist() == [[False, False], [True, False], [False, True]]
    vae = pv.VAE((8, 2), latent_dim=1, hidden_dims=(2,), likelihood="gaussian")
    with pytest.raises(ValueError, match=r"NaN.*row 0: fill in what is missing, or mask it in a program .* `mask`"):
        pv.fit(vae, data.train, epochs=1)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a,b\n1,2\n3,four\nx,5\n", r"numbers in column 'a', found 'x' in row 2"),
        ("a,b\n1,2\n3,four\n5,six\n", r"numbers in column 'b', found 'four' in row 1"),
        ("a,when\n1,2020-01-01\n2,2020-01-02\n", r"column 'when', found '2020-01-01' in row 0"),
        ("a,sequence\n1,x\n2,\n3,x\n", r"column 'sequence', found none in row 1"),
        ("sequence\n1\n2\n", "expected rows of numbers"),
        ("a,b\n", "found 0 rows"),
        ("", "first line"),
        ("1.5,2.5\n3.5,4.5\n", r"names of columns in the first line, found numbers: 1.5, 2.5"),
        (",a\n0,1\n1,2\n", r"found none for column 0 .*index=False"),
        ("a ,a\n1,2\n", "a name of its own for each column, found 'a' again"),
        ("a,b\n1,2,3\n4,5,6\n", "a name for each column"),
        ("a,b\n1,2\n1,2,3\n", "Expected 2 fields in line 3, saw 3"),
        ("a\n1\n2\n", "at least 3 rows"),
        ("a,sequence\n1,x\n2,y\n", "enough data"),
    ],
)
def test_tables_that_will_not_do(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said) as error:
        table(tmp_path, text)
    assert "series.csv" in str(error.value)


def test_a_table_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "series.CSV").write_bytes(b"a,b\n\xff\xfe\x00,1\n")
    with pytest.raises(ValueError, match="expected a CSV file"):
        load_dataset(tmp_path / "series.CSV")
    with pytest.raises(FileNotFoundError):
        load_dataset("none.csv")


# ---- Simulations


def test_a_pendulum_follows_its_equation() -> None:
    states = pv.pendulum(4, 30, seed=3).train_states.double().numpy()
    for path in states:
        start = path[0]
        times = 0.1 * np.arange(30)
        exact = solve_ivp(lambda t, s: [s[1], -9.81 * np.sin(s[0])], (0, 3), start, t_eval=times, rtol=1e-9, atol=1e-9)
        assert np.abs(path - exact.y.T).max() < 2e-3


def test_a_pendulum_is_observed_with_the_noise_it_is_told() -> None:
    data = pv.pendulum(500, 40, noise=0.3)
    angle = data.train_states[..., 0]
    error = data.train - torch.stack([angle.sin(), angle.cos()], -1)
    assert error.std().item() == pytest.approx(0.3, rel=0.02)
    assert error.mean().item() == pytest.approx(0, abs=0.01)
    clean = pv.pendulum(500, 40, noise=0.0)
    torch.testing.assert_close(clean.train.square().sum(-1), torch.ones(400, 40, dtype=torch.float32))


def test_a_pendulum_that_is_kicked_gains_the_energy_of_the_kicks() -> None:
    """Of E = v^2 / 2 - g / l cos(a), the mean grows by process_noise^2 / 2 a second, whatever the angle."""

    def energy(states: torch.Tensor) -> torch.Tensor:
        states = states.double()
        return states[..., 1] ** 2 / 2 - 9.81 * states[..., 0].cos()

    gained = {s: energy(pv.pendulum(5000, 21, process_noise=s).train_states).diff(dim=1).sum(1) for s in (0.0, 1.5)}
    assert gained[0.0].abs().max() < 0.02
    error = gained[1.5].std() / 4000**0.5
    assert error < 0.15
    assert gained[1.5].mean().item() == pytest.approx(1.5**2 / 2 * 2.0, abs=5 * error.item())


@pytest.mark.parametrize("num_balls", [1, 2, 3])
def test_balls_stay_in_the_box_and_lose_nothing(num_balls: int) -> None:
    states = pv.bouncing_balls(40, 100, num_balls=num_balls).train_states.double().unflatten(-1, (num_balls, 4))
    place, velocity = states[..., :2], states[..., 2:]
    assert place.min() > 0.12 - 0.03
    assert place.max() < 0.88 + 0.03
    energy = velocity.square().sum((-1, -2))
    torch.testing.assert_close(energy, torch.full_like(energy, num_balls * 0.06**2), rtol=1e-5, atol=0)
    if num_balls == 1:
        assert (velocity[:, 1:].abs() - velocity[:, :1].abs()).abs().max() < 1e-6  # walls turn signs round alone
    else:
        apart = (place[..., 0, :] - place[..., 1, :]).norm(dim=-1)
        assert apart.min() > 2 * 0.12 - 0.03
        changed = (velocity[:, 1:].abs() - velocity[:, :1].abs()).abs().amax((-1, -2)) > 1e-6
        assert changed.any(1).double().mean() > 0.5  # most have met another ball


def test_balls_are_drawn_where_they_are() -> None:
    data = pv.bouncing_balls(10, 6, size=32, num_balls=1)
    films = data.test.reshape(-1, 32, 32).double()
    centres = (torch.arange(32) + 0.5) / 32
    place = data.test_states[..., :2].reshape(-1, 2).double()
    area = films.sum((1, 2))
    assert (area / 32**2 - np.pi * 0.12**2).abs().max() < 0.008
    down, right = (films.sum(2) @ centres / area, films.sum(1) @ centres / area)
    assert (torch.stack([down, right], -1) - place).abs().max() < 0.01


def test_simulations_are_of_their_seeds() -> None:
    for simulate in (pv.pendulum, pv.bouncing_balls):
        first, again, other = simulate(10, 5, seed=1), simulate(10, 5, seed=1), simulate(10, 5, seed=2)
        assert torch.equal(first.train, again.train)
        assert not torch.equal(first.train, other.train)
        assert [len(getattr(first, split)) for split in SPLITS] == [8, 1, 1]
    assert torch.equal(load("pendulum").valid, pv.pendulum().valid)
    assert torch.equal(load("bouncing-balls").valid, pv.bouncing_balls().valid)


@pytest.mark.parametrize(
    ("simulate", "said"),
    [
        (lambda: pv.pendulum(2), "num_sequences: expected a whole number of at least 3, got 2"),
        (lambda: pv.pendulum(10, 0), "num_steps: .* got 0"),
        (lambda: pv.pendulum(noise=-1.0), "noise: expected a number of at least 0, got -1"),
        (lambda: pv.pendulum(interval=0.0), "interval: expected a number above 0, got 0"),
        (lambda: pv.bouncing_balls(num_balls=4), "num_balls: expected a whole number from 1 to 3, got 4"),
        (lambda: pv.bouncing_balls(size=2.5), "size: .*got 2.5"),  # type: ignore[arg-type]
    ],
)
def test_simulations_that_cannot_be(simulate: functools.partial[Dataset], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        simulate()


def test_pandas_is_imported_by_tables_alone() -> None:
    assert not hasattr(datasets, "pandas")
