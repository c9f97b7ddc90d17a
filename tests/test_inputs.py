"""A user's data in every accepted form, checked against the program before anything is trained or scored."""

import sys
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_vae as pv
from pyro_vae.data import Dataset, Reader, TensorData, as_columns
from pyro_vae.inputs import device_of, open_inputs
from pyro_vae.programs import as_program
from tests import oracles


def bernoulli():
    return as_program(pv.VAE((2, 3), latent_dim=1, hidden_dims=(3,)))


def gaussian():
    return as_program(pv.VAE((2, 3), latent_dim=1, hidden_dims=(3,), likelihood="gaussian"))


def regression(data_shape=None):
    """Two arguments: inputs, a covariate, and y, observed."""

    def model(inputs, y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("y", dist.Normal(z + inputs.flatten(1).sum(-1), 1.0), obs=y)

    def guide(inputs, y):
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Normal(0.5 * y, 0.8))

    return pv.Program(model, guide, data_shape=data_shape)


def read(inputs):
    """All data of opened inputs, by argument name, as the program gets them."""
    return inputs.tensors().rows(slice(None))


# Forms ----------------------------------------------------------------------------------------------------------------

X = np.round(np.random.default_rng(0).random((7, 2, 3)))
FORMS = {
    "tensor": lambda: torch.from_numpy(X),
    "array": lambda: X,
    "read-only array": lambda: np.broadcast_to(X, X.shape),
    "float32": lambda: torch.from_numpy(X).float(),
    "flat": lambda: X.reshape(7, 6),
    "with a channel": lambda: X.reshape(7, 2, 3, 1),
    "tuple": lambda: (torch.from_numpy(X),),
    "dict": lambda: {"x": torch.from_numpy(X)},
    "uint8 0 and 255": lambda: (255 * X).astype(np.uint8),
    "uint8 0 and 1": lambda: X.astype(np.uint8),
    "bool": lambda: X.astype(bool),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_the_same_data_reads_the_same(form):
    inputs = open_inputs(bernoulli(), FORMS[form]())
    columns = read(inputs)
    assert columns.keys() == {"x"}
    torch.testing.assert_close(columns["x"], torch.from_numpy(X), rtol=0, atol=0)
    args, kwargs = inputs.call(columns)
    assert (len(args), set(kwargs)) == ((0, {"x"}) if form == "dict" else (1, set()))


def test_a_data_set_of_which_a_split_is_taken():
    splits = [torch.full((n, 6), float(n % 2)) for n in (3, 4, 5)]
    data = Dataset("toy", *splits)
    for split, expected in zip(("train", "valid", "test"), splits, strict=True):
        assert len(open_inputs(bernoulli(), data, split=split).tensors()) == len(expected)


def test_two_columns_by_position_and_by_name():
    inputs, y = torch.randn(5, 2), torch.randn(5)
    for data in ((inputs, y), {"inputs": inputs, "y": y}, {"y": y, "inputs": inputs}):
        columns = read(open_inputs(regression(), data))
        assert torch.equal(columns["inputs"], inputs)
        assert torch.equal(columns["y"], y)


@pytest.mark.parametrize("names", [("inputs", "y"), ("y", "inputs")])
def test_the_first_argument_is_reshaped_whatever_the_order_of_a_dict(names):
    data = {"inputs": torch.randn(5, 4), "y": torch.randn(5)}
    columns = read(open_inputs(regression(data_shape=(2, 2)), {name: data[name] for name in names}))
    assert columns["inputs"].shape == (5, 2, 2)
    assert columns["y"].shape == (5,)


@pytest.mark.parametrize("batches", [list, tuple])
def test_batches_that_somebody_else_makes(batches):
    x, y = torch.randn(6, 2), torch.randn(6)
    data = batches([(x[:4], y[:4]), (x[4:], y[4:])])
    inputs = open_inputs(regression(), data)
    found = [inputs.call(inputs.data.reader(columns)) for columns in inputs.data.raw()]
    assert [len(args[0]) for args, _ in found] == [4, 2]
    assert torch.equal(torch.cat([args[1] for args, _ in found]), y)


def test_a_list_of_tensors_is_batches_not_columns():
    inputs = open_inputs(bernoulli(), [torch.zeros(4, 6), torch.ones(3, 6)])
    assert [len(columns["x"]) for columns in inputs.data.raw()] == [4, 3]


def test_a_data_loader_and_batches_by_name():
    x = torch.randn(6)
    loader = torch.utils.data.DataLoader([{"inputs": x[[i]], "y": x[i]} for i in range(6)], batch_size=4)
    inputs = open_inputs(regression(), loader)
    for _ in range(2):  # again and again
        assert [len(c["y"]) for c in inputs.data.raw()] == [4, 2]
    args, kwargs = inputs.call(next(inputs.data.raw()))
    assert args == ()
    assert kwargs.keys() == {"inputs", "y"}


# Arrays that are mapped from files ------------------------------------------------------------------------------------


def mapped(folder, array, mode="r"):
    np.save(folder / "stored.npy", array)
    return np.load(folder / "stored.npy", mmap_mode=mode)


def starts_in(tensor, array):
    return array.ctypes.data <= tensor.data_ptr() < array.ctypes.data + array.nbytes


@pytest.mark.parametrize("mode", ["r", "c", "r+"])
@pytest.mark.parametrize("form", [lambda x: x, lambda x: (x[1:],), lambda x: {"x": x}])
@pytest.mark.parametrize("dtype", [np.float64, np.uint8, np.float16, bool])
def test_columns_are_the_mapped_memory_itself(tmp_path, dtype, form, mode):
    array = mapped(tmp_path, X.astype(dtype), mode)
    data = open_inputs(bernoulli(), form(array)).tensors()
    assert starts_in(data.columns["x"], array)
    assert starts_in(data.drawn_once(0, 5).columns["x"], array)
    columns = data.rows(next(data.shuffle(3, seed=0, epoch=0)))
    assert len(columns["x"]) == 3
    assert not starts_in(columns["x"], array)
    assert np.array_equal(array, X.astype(dtype))


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells which pages of a file a process has touched")
def test_a_minibatch_reads_its_own_rows_alone(tmp_path):
    """Of 4,000 rows of 64 kB, ten; the system may read their neighbours ahead."""
    np.lib.format.open_memmap(tmp_path / "stored.npy", "w+", np.uint8, (4_000, 2**16)).flush()
    array = np.load(tmp_path / "stored.npy", mmap_mode="r")
    data = TensorData(as_columns(array, ("x",)), Reader(torch.device("cpu"), torch.float32))
    before = pages_of_files()
    data.rows(next(data.shuffle(10, seed=0, epoch=0)))
    assert 0 < pages_of_files() - before < 20e6 < array.nbytes / 10


def pages_of_files():
    """Bytes of mapped files that this process has touched."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssFile"))


def test_training_is_the_same_from_a_file(tmp_path):
    bounds = []
    for x in (np.random.default_rng(0).random((60, 6)), mapped(tmp_path, np.random.default_rng(0).random((60, 6)))):
        torch.manual_seed(0)
        run = pv.fit(pv.VAE((6,), latent_dim=1, hidden_dims=(3,)), x, test=x, batch_size=8, epochs=2)
        bounds.append([(row["train_bound"], row["test_bound"]) for row in run.history])
    assert bounds[0] == bounds[1]


@pytest.mark.parametrize("kind", ["loader", "slices"])
def test_batches_of_a_mapped_file(tmp_path, kind):
    array = mapped(tmp_path, X)
    loader = torch.utils.data.DataLoader(_Rows(array), batch_size=4)
    batches = loader if kind == "loader" else [array[:4], array[4:]]
    inputs = open_inputs(bernoulli(), batches)
    found = [inputs.data.reader(columns)["x"] for columns in inputs.data.raw()]
    assert torch.equal(torch.cat(found), torch.from_numpy(X))
    assert not any(starts_in(x, array) for x in found)
    assert pv.fit(pv.VAE((2, 3), latent_dim=1, hidden_dims=(3,)), batches, epochs=2).samples == 14


class _Rows(torch.utils.data.Dataset):
    def __init__(self, array):
        self.array = array

    def __len__(self):
        return len(self.array)

    def __getitem__(self, row):
        return torch.tensor(self.array[row])


def test_unsigned_integers_that_torch_hardly_knows(tmp_path):
    levels = np.arange(42, dtype=np.uint16).reshape(7, 6)
    columns = read(open_inputs(gaussian_without_range(), mapped(tmp_path, levels)))
    assert torch.equal(columns["x"].flatten(1), torch.from_numpy(levels.astype(float)))
    with pytest.raises(ValueError, match=r"x.*\[0, 1\].*0 to 41"):
        open_inputs(bernoulli(), levels)


def gaussian_without_range():
    vae = pv.VAE((2, 3), latent_dim=1, hidden_dims=(3,), likelihood="gaussian")
    return pv.Program(vae.model, vae.guide, data_shape=(2, 3))


UNUSABLE = {
    "big-endian": lambda: X.astype(">f4"),
    "backwards": lambda: X[::-1],
    "of a type that torch lacks": lambda: X.astype(np.longdouble),
    "unaligned": lambda: np.zeros(42 * 4 + 1, np.uint8)[1:].view(np.float32).reshape(7, 6),
    "a field": lambda: np.zeros((7, 6), [("label", "u1"), ("x", "f4")])["x"],
}


@pytest.mark.parametrize("array", UNUSABLE.values(), ids=UNUSABLE)
@pytest.mark.parametrize("writeable", [True, False])
def test_arrays_that_cannot_be_used_without_a_copy_are_refused(array, writeable):
    x = array()
    x.flags.writeable = writeable
    with pytest.raises(ValueError, match=r"'x': expected an.* array.*got.*numpy\.array\(x"):
        open_inputs(bernoulli(), x)


# Binarisation ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grey", [torch.full((2000, 6), 0.3), torch.full((2000, 6), 76, dtype=torch.uint8)])
def test_grey_levels_of_a_binary_site_are_drawn_anew_at_each_read(grey):
    inputs = open_inputs(bernoulli(), grey)
    first, second = read(inputs)["x"], read(inputs)["x"]
    assert set(first.unique().tolist()) == {0.0, 1.0}
    assert not torch.equal(first, second)
    level = 0.3 if grey.is_floating_point() else 76 / 255
    sd = (level * (1 - level) / 24_000) ** 0.5
    assert torch.cat([first, second]).mean().item() == pytest.approx(level, abs=5 * sd)


def test_each_pixel_is_drawn_with_its_own_level():
    levels = torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0, 0.3])
    means = read(open_inputs(bernoulli(), levels.expand(4000, 6)))["x"].flatten(1).mean(0)
    torch.testing.assert_close(means, levels, rtol=0, atol=5 * 0.5 / 4000**0.5)
    assert means[0] == 0
    assert means[4] == 1


def test_binary_data_are_not_drawn():
    inputs = open_inputs(bernoulli(), torch.from_numpy(X), binarize="dynamic")
    assert inputs.tensors().reader.drawn == frozenset()


def test_real_data_are_not_drawn_for_a_gaussian_likelihood():
    grey = torch.rand(5, 6)
    assert torch.equal(read(open_inputs(gaussian(), grey))["x"].flatten(1), grey)


def test_uint8_levels_are_divided_by_255():
    grey = torch.tensor([[0, 51, 102, 153, 204, 255]], dtype=torch.uint8)
    expected = torch.tensor([0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
    torch.testing.assert_close(read(open_inputs(gaussian(), grey))["x"].flatten(), expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize("grey", [torch.full((3, 6), 0.5), torch.full((3, 6), 9, dtype=torch.uint8)])
def test_binarize_none_refuses_grey_levels_under_a_binary_site(grey):
    with pytest.raises(ValueError, match=r"\['x'\].*binary.*grey"):
        open_inputs(bernoulli(), grey, binarize="none")
    open_inputs(gaussian(), grey, binarize="none")


def test_a_data_set_states_its_own_binarisation():
    data = Dataset("toy", *[torch.full((3, 6), 0.5)] * 3, binarize="none")
    with pytest.raises(ValueError, match="grey"):
        open_inputs(bernoulli(), data)
    assert open_inputs(bernoulli(), data, binarize="dynamic").tensors().reader.drawn == {"x"}


@pytest.mark.parametrize("level", [-0.1, 1.1])
def test_values_no_binary_site_can_have_are_refused(level):
    with pytest.raises(ValueError, match=r"x.*1\.1|x.*-0\.1"):
        open_inputs(bernoulli(), torch.full((3, 6), level))


def test_values_outside_the_range_beyond_the_first_batch_are_refused():
    x = torch.zeros(300, 6)
    x[250] = 1.5
    with pytest.raises(ValueError, match=r"x.*\[0, 1\].*1\.5"):
        open_inputs(bernoulli(), x)


# Refusals -------------------------------------------------------------------------------------------------------------

NAN = torch.zeros(5, 6)
NAN[3, 2] = float("nan")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (NAN, "x.*1 of 5 rows, the first at row 3"),
        (torch.full((5, 6), float("inf")), "x.*5 of 5 rows, the first at row 0"),
        (torch.zeros(0, 6), r"x.*\(0, 6\)"),
        (torch.tensor(1.0), r"x.*shape \(\)"),
        (torch.zeros(5, 6, dtype=torch.complex64), "x.*complex"),
        (torch.zeros(5, 7), r"\(N, 2, 3\).*6; got \(5, 7\), which is 7"),
        (np.array(["a", "b"]), "x.*numbers"),
        ({"y": torch.zeros(5, 6)}, r"arguments \(x"),
        ({"x": [0.0, 1.0]}, "x.*tensor"),
        ({}, "at least one"),
        ((torch.zeros(5, 6), torch.zeros(5)), "at most 1"),
        ([], "at least one|empty"),
        (None, "NoneType"),
        ("mnist", "str"),
        (3, "int"),
        ((row for row in torch.zeros(5, 1, 6)), "one-shot generator"),
        (iter([torch.zeros(5, 6)]), "one-shot list_iterator"),
    ],
)
def test_data_that_no_program_can_use_are_refused(data, said):
    with pytest.raises(ValueError, match=said):
        open_inputs(bernoulli(), data)


def test_unequal_lengths_are_refused():
    with pytest.raises(ValueError, match="'inputs': 5, 'y': 4"):
        open_inputs(regression(), (torch.zeros(5, 2), torch.zeros(4)))


def test_a_missing_argument_is_refused():
    with pytest.raises(ValueError, match=r"\(inputs, y\).*'y'"):
        open_inputs(regression(), torch.zeros(5, 2))


def test_a_bad_batch_in_an_iterable_is_refused_when_it_comes():
    batches = [(torch.zeros(2, 1), torch.zeros(2)), (torch.zeros(2, 1), torch.full((2,), torch.nan))]
    inputs = open_inputs(regression(), batches)
    with pytest.raises(ValueError, match=r"y.*NaN"):
        list(inputs.data.raw())


def test_an_empty_iterable_is_refused():
    with pytest.raises(ValueError, match="empty"):
        open_inputs(regression(), torch.utils.data.DataLoader([]))


def test_a_program_that_subsamples_by_itself_is_refused():
    """Its weights belong to rows that nobody outside knows: ten values for forty data."""

    def model(x):
        with pyro.plate("data", len(x), subsample_size=10) as index:
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])

    def guide(x):
        with pyro.plate("data", len(x), subsample_size=10) as index:
            pyro.sample("z", dist.Normal(x[index] / 2, 0.5**0.5))

    with pytest.raises(ValueError, match=r"10 data .* 40 rows.*subsample_size=len"):
        open_inputs(pv.Program(model, guide), torch.randn(40))


# Device and type ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_data_take_the_floating_point_type_of_the_program(dtype):
    vae = pv.VAE((6,), latent_dim=1, hidden_dims=(3,)).to(dtype)
    program = as_program(vae)
    assert device_of(program) == (torch.device("cpu"), dtype)
    assert read(open_inputs(program, torch.zeros(5, 6, dtype=torch.uint8)))["x"].dtype == dtype
    assert read(open_inputs(program, np.zeros((5, 6), dtype=np.float16)))["x"].dtype == dtype


def test_labels_and_lengths_keep_their_integers():
    """Wider integers are no grey levels."""
    columns = read(open_inputs(regression(), (torch.randint(0, 9, (5, 2)), torch.randn(5))))
    assert columns["inputs"].dtype == torch.int64


def test_opening_leaves_generators_and_the_users_data_alone():
    x, state = torch.rand(5, 6), torch.get_rng_state()
    kept = x.clone()
    read(open_inputs(gaussian(), x))
    assert torch.equal(x, kept)
    state_after_program = torch.get_rng_state()
    program = bernoulli()
    state = torch.get_rng_state()
    open_inputs(program, x)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(state_after_program, state)  # building a program draws its weights


def test_the_dry_run_uses_the_batch_size_it_is_told():
    toy = oracles.SharedMean(20)
    found = open_inputs(pv.Program(toy.model, toy.guide), torch.randn(20), batch_size=7).check
    assert (found.batch_size, found.full_size) == (7, 20)


# Sequences ------------------------------------------------------------------------------------------------------------


def sequence_model(x, lengths):
    """A level of each sequence, and steps of D binary numbers that know it."""
    steps = torch.arange(x.shape[-2]) < lengths[:, None]
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        logits = z[..., None, None].expand(*z.shape, *x.shape[-2:])
        pyro.sample("x", dist.Bernoulli(logits=logits).mask(steps[..., None]).to_event(2), obs=x)


def sequence_guide(x, lengths):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))


def sequences():
    return pv.Program(sequence_model, sequence_guide)


def rolls(num_data=5, num_steps=4):
    lengths = torch.arange(num_data) % num_steps + 1
    x = (torch.rand(num_data, num_steps, 3) < 0.5) & (torch.arange(num_steps) < lengths[:, None])[..., None]
    x[:, 0, 0] = True
    return x.to(torch.uint8), lengths


def music(**changes):
    splits = {split: rolls(size) for split, size in (("train", 6), ("valid", 4), ("test", 5))}
    parts = {name: x for name, (x, _) in splits.items()}
    return Dataset("toy", **(parts | {f"{n}_lengths": lengths for n, (_, lengths) in splits.items()} | changes))


@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_a_data_sets_lengths_are_given_to_a_program_that_takes_them(split):
    data = music()
    inputs = open_inputs(sequences(), data, split=split)
    columns = read(inputs)
    assert torch.equal(columns["x"], getattr(data, split).double())  # 0 and 1 are numbers
    assert torch.equal(columns["lengths"], getattr(data, f"{split}_lengths"))
    assert inputs.takes_lengths
    args, kwargs = inputs.first()
    assert torch.equal({**dict(zip(("x", "lengths"), args, strict=False)), **kwargs}["lengths"], columns["lengths"])


def test_lengths_go_by_name_wherever_the_argument_stands():
    def model(x, inputs=None, *, lengths):
        assert inputs is None
        sequence_model(x, lengths)

    def guide(x, inputs=None, *, lengths):
        sequence_guide(x, lengths)

    assert read(open_inputs(pv.Program(model, guide), music())).keys() == {"x", "lengths"}


def fixed():
    return as_program(pv.VAE((4, 3), latent_dim=1, hidden_dims=(3,)))


def test_sequences_of_one_length_serve_a_program_that_takes_none():
    equal = music(train_lengths=torch.full((6,), 4))
    inputs = open_inputs(fixed(), equal)
    assert read(inputs).keys() == {"x"}
    assert not inputs.takes_lengths
    assert inputs.num_steps(read(inputs)) is None
    with pytest.raises(ValueError, match=r"toy: sequences of 1 to 4 steps .* `lengths`.*got arguments \(x\)"):
        open_inputs(fixed(), music())


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.int64, torch.float32, np.int16])
@pytest.mark.parametrize("form", [lambda x, n: (x, n), lambda x, n: {"lengths": n, "x": x}, lambda x, n: [(x, n)]])
def test_lengths_of_any_type_are_read_as_whole_numbers(form, dtype):
    x, lengths = rolls()
    given = lengths.numpy().astype(dtype) if dtype is np.int16 else lengths.to(dtype)
    inputs = open_inputs(sequences(), form(x, given))
    args, kwargs = inputs.first()
    found = {**dict(zip(("x", "lengths"), args, strict=False)), **kwargs}
    assert found["lengths"].dtype == torch.int64
    assert torch.equal(found["lengths"], lengths)
    assert torch.equal(found["x"], x.double())
    assert torch.equal(inputs.num_steps(found), lengths)


BAD_LENGTHS = {
    "zero": (torch.tensor([1, 2, 0, 4, 0]), r"5 whole numbers from 1 to 4.*; got 0 in row 2"),
    "too long": (torch.tensor([1, 2, 3, 4, 5]), r"from 1 to 4.*\(5, 4, 3\); got 5 in row 4"),
    "no whole number": (torch.tensor([1, 2.5, 3, 4, 1]), r"got 2\.5 in row 1"),
    "of another shape": (torch.ones(5, 4).long(), r"got torch.int64 of shape \(5, 4\)"),
    "of bool": (torch.ones(5, dtype=torch.bool), "got torch.bool"),
}


@pytest.mark.parametrize("bad", BAD_LENGTHS)
def test_lengths_that_do_not_fit_are_refused(bad):
    x, good = rolls()
    lengths, said = BAD_LENGTHS[bad]
    for data in ((x, lengths), {"x": x, "lengths": lengths}, [(x, lengths)]):
        with pytest.raises(ValueError, match=f"data 'lengths': expected .*{said}"):
            open_inputs(sequences(), data)
    inputs = open_inputs(sequences(), [(x, good), (x, lengths)])
    with pytest.raises(ValueError, match=said):
        list(inputs.data.raw())


def test_lengths_beside_what_has_no_steps():
    with pytest.raises(ValueError, match=r"sequences of shape \(N, T, ...\) beside them, got shape \(5,\)"):
        open_inputs(sequences(), (torch.ones(5), torch.ones(5)))


def test_the_steps_are_those_of_the_shape_that_the_program_states():
    x, lengths = rolls()
    program = pv.Program(sequence_model, sequence_guide, data_shape=(4, 3))
    assert read(open_inputs(program, (x.flatten(1), lengths)))["x"].shape == (5, 4, 3)
    with pytest.raises(ValueError, match=r"from 1 to 4.*got 5 in row 0"):
        open_inputs(program, (x.flatten(1), lengths + 4))


def test_without_lengths_every_step_counts():
    def model(x, lengths=None):
        sequence_model(x, torch.full((len(x),), x.shape[1]) if lengths is None else lengths)

    program = pv.Program(model, lambda x, lengths=None: sequence_guide(x, lengths), data_shape=(4, 3))
    for x in (rolls()[0], rolls()[0].flatten(1)):
        inputs = open_inputs(program, x)
        assert inputs.num_steps(inputs.tensors().columns).tolist() == [4] * 5


@pytest.mark.parametrize("silent", [1, 2])
def test_a_first_batch_of_zeros_does_not_turn_numbers_into_levels(silent):
    """0 and 1 of type uint8 are numbers, also where the first batches hold no 1 to tell by."""
    x, lengths = rolls()
    batches = [(torch.zeros_like(x), lengths)] * silent + [(x, lengths)]
    inputs = open_inputs(sequences(), batches)
    *_, last = (inputs.data.reader(columns) for columns in inputs.data.raw())
    assert torch.equal(last["x"], x.double())
    grey = open_inputs(sequences(), [(torch.zeros_like(x), lengths), (255 * x, lengths)])
    *_, last = (grey.data.reader(columns) for columns in grey.data.raw())
    assert torch.equal(last["x"], x.double())


def test_batches_that_are_all_zero_stay_so():
    x, lengths = rolls()
    inputs = open_inputs(sequences(), [(0 * x, lengths), (0 * x, lengths)])
    assert not any(inputs.data.reader(columns)["x"].any() for columns in inputs.data.raw())


# Missing observations -------------------------------------------------------------------------------------------------


def masked_model(x, mask):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        law = dist.Normal(z[..., None].expand(*z.shape, x.shape[-1]), 1.0)
        pyro.sample("x", law.mask(mask).to_event(1), obs=x)


def masked_guide(x, mask):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x.sum(-1) / 2, 1.0))


def masked():
    return pv.Program(masked_model, masked_guide)


def with_gaps():
    x = torch.randn(6, 3)
    x[1, 2], x[4, 0], x[4, 1] = float("nan"), float("inf"), float("nan")
    return x


@pytest.mark.parametrize("form", [lambda x, m: (x, m), lambda x, m: {"mask": m, "x": x}, lambda x, m: [(x, m)]])
def test_what_is_missing_is_read_as_zero(form):
    x = with_gaps()
    kept = x.clone()
    inputs = open_inputs(masked(), form(x, x.isfinite()))
    args, kwargs = inputs.first()
    found = {**dict(zip(("x", "mask"), args, strict=False)), **kwargs}
    assert found["mask"].dtype == torch.bool
    assert torch.equal(found["mask"], x.isfinite())
    assert torch.equal(found["x"], x.where(x.isfinite(), 0))
    torch.testing.assert_close(x, kept, equal_nan=True, rtol=0, atol=0)  # the user's own are not written to


def test_what_is_missing_has_no_influence():
    x = with_gaps()
    mask, filled = x.isfinite(), x.where(x.isfinite(), 0)
    bounds = [pv.evaluate_bound(masked(), {"x": data, "mask": mask}) for data in (x, filled)]
    assert bounds[0] == bounds[1]
    assert pv.evaluate_bound(masked(), {"x": filled, "mask": torch.ones_like(mask)}).mean != bounds[0].mean


@pytest.mark.parametrize("form", [lambda x, m: (x, m), lambda x, m: [(x, m)]])
def test_nan_where_the_mask_is_true_is_refused(form):
    x = with_gaps()
    mask = x.isfinite()
    mask[4, 1] = True
    with pytest.raises(
        ValueError, match=r"'x'.*1 of 6 rows, the first at row 4; expected NaN only where mask is False"
    ):
        open_inputs(masked(), form(x, mask))


def test_a_mask_of_rows_or_of_steps():
    x = torch.randn(4, 3, 2)
    x[1, 2] = float("nan")
    steps, pixels = x.isfinite().all(-1), x.isfinite()

    def model(x, mask):
        with pyro.plate("data", len(x)):
            law = dist.Normal(pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))[..., None, None], 1.0)
            law = law.expand((*law.batch_shape[:-2], 3, 2))
            keep = mask.reshape(*mask.shape, *(1,) * (3 - mask.ndim))
            pyro.sample("x", law.mask(keep).to_event(2), obs=x)

    program = pv.Program(model, lambda x, mask: sequence_guide(x, None))
    for mask in (steps, pixels, pixels.all(-1).all(-1)):
        assert torch.equal(read(open_inputs(program, (x, mask)))["x"], x.where(pixels, 0))
    steps[1, 2] = True
    with pytest.raises(ValueError, match="1 of 4 rows, the first at row 1; expected NaN only where mask is False"):
        open_inputs(program, (x, steps))


@pytest.mark.parametrize("mask", [torch.ones(6, 3), torch.ones(6, 2, dtype=torch.bool), torch.ones(6, 3).long()])
def test_a_mask_must_be_of_bool_and_fit(mask):
    with pytest.raises(ValueError, match=r"'mask': expected bool of the shape of 'x', \(6, 3\).*got torch"):
        open_inputs(masked(), (with_gaps(), mask))


def test_nan_is_refused_with_what_to_do():
    x = torch.full((3, 6), float("nan"))
    with pytest.raises(ValueError, match=r"row 0: fill in what is missing, or mask it in a program .*`mask`"):
        open_inputs(gaussian(), x)
    with pytest.raises(ValueError, match=r"row 1; expected NaN only where mask is False"):
        open_inputs(masked(), {"x": with_gaps()})


def test_missing_binary_numbers_are_not_drawn():
    """Neither grey because they are missing, nor drawn at another level."""

    def model(x, mask):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            law = dist.Bernoulli(logits=z[..., None].expand(*z.shape, x.shape[-1]))
            pyro.sample("x", law.mask(mask).to_event(1), obs=x)

    binary = (torch.rand(50, 3) < 0.5).double()
    binary[7] = float("nan")
    program = pv.Program(model, masked_guide)
    inputs = open_inputs(program, (binary, binary.isfinite()), binarize="none")
    assert inputs.tensors().reader.drawn == frozenset()
    assert torch.equal(read(inputs)["x"], binary.nan_to_num(0.0))
    grey = open_inputs(program, (binary / 2, binary.isfinite()))
    assert torch.equal(grey.tensors().drawn_once(0).rows(slice(None))["x"][7], torch.zeros(3))
    with pytest.raises(ValueError, match=r"\[0, 1\].*to 2"):
        open_inputs(program, (2 * binary, binary.isfinite()))


def test_all_of_a_masked_column_may_be_missing():
    x = torch.full((3, 2), float("nan"))
    assert not read(open_inputs(masked(), (x, x.isfinite())))["x"].any()
