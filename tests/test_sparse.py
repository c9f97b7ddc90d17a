"""Sparse columns: read as the dense ones would be, and never made dense as a whole."""

import subprocess
import sys
import warnings
from dataclasses import replace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.sparse as sp
import torch

import pyro_vae as pv
from pyro_vae.data import Dataset, Reader, TensorData, as_columns
from pyro_vae.data import sparse as sparse_module
from pyro_vae.data.batches import BatchIterable, blocks, is_grey, is_unscaled, require_range, require_valid
from pyro_vae.data.sparse import SparseRows, sparse_rows
from pyro_vae.inputs import open_inputs
from pyro_vae.programs import as_program
from pyro_vae.training.provenance import checksum
from tests.test_memory import TIDY

PLAIN = Reader(torch.device("cpu"), torch.float64)
DENSE = np.random.default_rng(0).poisson(0.3, (30, 7))
FORMATS = ("csr", "csc", "coo", "lil", "dok", "bsr", "dia")


def column(dense, **changes):
    return sparse_rows("x", sp.csr_array(dense, **changes))


def lda(vocab_size=7, **changes):
    return pv.ProdLDA(vocab_size, 3, (5,), **changes)


def train(data, **options):
    """Parameters and history after some steps on the data."""
    torch.manual_seed(0)
    model = lda()
    options = {"batch_size": 4, "epochs": 3, "optimizer": "adam", "progress": False} | options
    run = pv.fit(model, data, **options)
    return torch.cat([p.detach().flatten() for p in model.parameters()]), run


# Reading --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["array", "matrix"])
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", [np.int32, np.uint8, np.uint16, np.float32, np.float64, bool])
def test_every_format_reads_as_the_dense_array(form, kind, dtype):
    dense = DENSE.astype(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", sp.SparseEfficiencyWarning)
        given = getattr(sp, f"{form}_{kind}")(dense)
    stored = given.copy()
    sparse, plain = (open_inputs(as_program(lda()), x).tensors() for x in (given, dense))
    index = torch.tensor([3, 3, 29, 0])
    for part in (slice(None), slice(2, 9), slice(1, None, 3), index):
        ours, theirs = sparse.rows(part)["x"], plain.rows(part)["x"]
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)
    assert (given != stored).nnz == 0  # nor has it been written to


def test_entries_stored_in_parts_are_their_sum_and_the_array_given_stays_as_it_was():
    given = sp.csr_array((np.array([1.0, 2.0, 4.0]), np.array([1, 0, 1]), np.array([0, 3])), (1, 3))
    assert column(given).dense().tolist() == [[2.0, 5.0, 0.0]]
    assert given.data.tolist() == [1.0, 2.0, 4.0]


@pytest.mark.parametrize("form", [lambda x: x, lambda x: (x,), lambda x: {"x": x}])
def test_every_form_of_the_data(form):
    inputs = open_inputs(as_program(lda()), form(sp.csc_matrix(DENSE)))
    assert len(inputs.tensors()) == 30
    assert torch.equal(inputs.tensors().rows(slice(None))["x"], torch.from_numpy(DENSE).double())


def test_beside_a_dense_column_and_in_a_data_set():
    def model(x, y):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("y", dist.Normal(z + x.sum(-1), 1.0), obs=y)

    def guide(x, y):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.5 * (y - x.sum(-1)), 0.5**0.5))

    y, program = torch.randn(30), pv.Program(model, guide)
    x = DENSE.astype(float)
    expected = pv.log_marginal(program, (torch.from_numpy(x), y), num_particles=2).values
    for data in ((sp.csr_array(x), y), {"y": y, "x": sp.coo_array(x)}):
        assert torch.equal(pv.log_marginal(program, data, num_particles=2).values, expected)
    data = Dataset("toy", *(sp.csr_array(DENSE[:n]) for n in (30, 4, 9)))
    for split, count in (("train", 30), ("valid", 4), ("test", 9)):
        assert len(open_inputs(as_program(lda()), data, split=split).tensors()) == count


def test_batches_that_somebody_else_makes():
    batches = [sp.csr_array(DENSE[:20]), sp.coo_array(DENSE[20:])]
    found = list(BatchIterable(batches, ("x",), PLAIN).raw())
    assert [len(c["x"]) for c in found] == [20, 10]
    ours, theirs = train(batches)[0], train([torch.from_numpy(DENSE[:20]), torch.from_numpy(DENSE[20:])])[0]
    assert torch.equal(ours, theirs)


def test_batches_of_every_kind_are_those_of_the_dense_column():
    sparse, plain = (TensorData({"x": c}, PLAIN) for c in (column(DENSE), torch.from_numpy(DENSE)))
    assert len(sparse) == 30
    assert sparse.resident().columns["x"] is sparse.columns["x"]
    for ours, theirs in zip(sparse.in_order(8, slice(3, 27)), plain.in_order(8, slice(3, 27)), strict=True):
        assert torch.equal(ours["x"], theirs["x"])
    for ours, theirs in zip(sparse.shuffle(8, 0, 1), plain.shuffle(8, 0, 1), strict=True):
        assert torch.equal(sparse.rows(ours)["x"], plain.rows(theirs)["x"])


@pytest.mark.parametrize("part", [slice(None), slice(3, 12), torch.tensor([20, 3, 3])])
def test_grey_levels_are_drawn_as_of_the_dense_column(part):
    levels, reader = DENSE / DENSE.max(), replace(PLAIN, drawn=frozenset({"x"}))
    ours, theirs = (TensorData({"x": c}, reader).drawn_once(3) for c in (column(levels), torch.from_numpy(levels)))
    assert torch.equal(ours.rows(part)["x"], theirs.rows(part)["x"])
    assert ours.rows(slice(None))["x"].unique().tolist() == [0.0, 1.0]


# Checks ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (sp.csr_array(DENSE * 1j), "dtype complex128"),
        (sp.csr_array(DENSE.astype(np.longdouble)), "dtype float128|dtype longdouble"),
        (sp.coo_array(DENSE[0]), r"shape \(N, D\), got shape \(7,\)"),
        (sp.csr_array((0, 7)), r"N > 0, got torch.float64 of shape \(0, 7\)"),
        (torch.from_numpy(DENSE).to_sparse(), "dense tensor or a scipy.sparse matrix.*layout torch.sparse_coo"),
        (sp.csr_array(-DENSE), "expected counts, whole numbers of at least 0, got values from -3 to 0"),
        (sp.csr_array(0.5 * DENSE), "expected counts, whole numbers of at least 0, got values from 0 to 1.5"),
        (
            sp.vstack([sp.csr_array((200, 7)), sp.csr_array(-DENSE)]),
            "expected counts, whole numbers of at least 0, got -2 among them",
        ),
        ((sp.csr_array(DENSE), torch.zeros(30)), "at most 1 tensors"),
        ({"x": sp.csr_array(DENSE), "y": torch.zeros(29)}, "equal first dimension, got .*30.*29"),
    ],
)
def test_what_cannot_be_used_is_refused(given, said):
    with pytest.raises(ValueError, match=said):
        pv.fit(lda(), given, epochs=1)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_bad_rows_are_counted(bad):
    dense = DENSE.astype(float)
    dense[3] = dense[5] = 0
    dense[[4, 4, 29], [0, 2, 6]] = bad
    with pytest.raises(ValueError, match="2 of 30 rows, the first at row 4"):
        require_valid({"x": column(dense)})
    require_valid({"x": column(DENSE.astype(float))})


def test_zeros_that_are_not_stored_count_as_values():
    full = np.full((3, 2), 2.0)
    with pytest.raises(ValueError, match="values from 2 to 2"):
        require_range("x", column(full), (0.0, 1.0))
    full[1, 1] = 0
    with pytest.raises(ValueError, match="values from 0 to 2"):
        require_range("x", column(full), (0.5, 1.0))
    assert not is_grey("x", column(np.eye(3)))
    assert is_grey("x", column(0.5 * np.eye(3)))
    assert is_unscaled(column(np.eye(3, dtype=np.uint8)))
    assert not is_unscaled(column(3 * np.eye(3, dtype=np.uint8)))
    assert not is_unscaled(column(np.zeros((3, 3), np.uint8)))


@pytest.mark.parametrize("given", [lambda x: x, sp.csr_array])
def test_bytes_are_counts_to_a_model_of_counts_and_grey_levels_to_others(given):
    """Without the rule a count of 3 would be read as 3 / 255, and refused."""
    few = given(DENSE.astype(np.uint8))
    assert torch.equal(
        open_inputs(as_program(lda()), few).tensors().rows(slice(None))["x"], torch.from_numpy(DENSE).double()
    )
    vae = as_program(pv.VAE((7,), 1, (2,)))
    assert open_inputs(vae, few).tensors().drawn_once(0).columns["x"].dtype == torch.uint8
    grey = open_inputs(as_program(pv.VAE((7,), 1, (2,), likelihood="gaussian")), few).tensors().rows(slice(None))["x"]
    assert torch.equal(grey, torch.from_numpy(DENSE).double() / 255)


def test_a_checksum_knows_the_values_their_places_and_the_shape(monkeypatch):
    first = checksum([column(DENSE)])
    same = (sp.csc_matrix(DENSE), sp.coo_array(DENSE), column(DENSE))
    assert [checksum([x]) for x in same] == [first] * 3
    wide = sp.csr_array(DENSE)
    wide.indices, wide.indptr = wide.indices.astype(np.int64), wide.indptr.astype(np.int64)
    assert checksum([wide]) == first
    monkeypatch.setattr(sparse_module, "_VALUES_IN_BLOCK", 3)
    assert checksum([column(DENSE)]) == first
    moved, other = DENSE.copy(), DENSE.copy()
    moved[0] = np.roll(moved[0], 1)
    other[other > 0] += 1
    changed = (moved, other, np.pad(DENSE, ((0, 0), (0, 1))), DENSE[::-1], DENSE.astype(float))
    assert len({first, *(checksum([column(x)]) for x in changed)}) == 6


# Training -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("epochs", "path"), [(1, "eager"), (3, "captured")])
def test_training_is_bit_for_bit_that_on_the_dense_array(epochs, path):
    (ours, sparse), (theirs, plain) = (train(x, epochs=epochs, test=x[:9]) for x in (sp.csr_array(DENSE), DENSE))
    assert sparse.path == plain.path == path
    assert torch.equal(ours, theirs)
    assert [{k: v for k, v in row.items() if k != "seconds"} for row in sparse.history] == [
        {k: v for k, v in row.items() if k != "seconds"} for row in plain.history
    ]
    assert not torch.equal(ours, train(DENSE[::-1].copy(), epochs=epochs)[0])


@pytest.mark.slow
def test_compiled_training_is_bit_for_bit_that_on_the_dense_array(monkeypatch):
    monkeypatch.setattr("pyro_vae.training.compiled.COMPILE_AFTER", 15)
    (ours, sparse), (theirs, plain) = (train(x, epochs=4) for x in (sp.csr_array(DENSE), DENSE))
    assert sparse.path == plain.path == "compiled"
    assert torch.equal(ours, theirs)


def test_scores_are_those_of_the_dense_array():
    model, x = lda(), sp.csr_array(DENSE)
    assert pv.evaluate_bound(model, x, batch_size=7) == pv.evaluate_bound(model, DENSE, batch_size=7)
    ours, theirs = (pv.log_marginal(model, data, num_particles=20, batch_size=7).values for data in (x, DENSE))
    assert torch.equal(ours, theirs)


def test_a_run_on_sparse_data_is_resumed_bit_for_bit_and_knows_its_data(tmp_path):
    x = sp.csr_array(DENSE)
    whole, _ = train(x, epochs=4)
    train(x, epochs=2, run_dir=tmp_path / "run")
    resumed, _ = train(x.tocsc(), epochs=4, run_dir=tmp_path / "run", resume=True)
    assert torch.equal(resumed, whole)
    x.data[0] += 1
    with pytest.raises(Exception, match="checksums differ"):
        train(x, epochs=5, run_dir=tmp_path / "run", resume=True)


# Memory ---------------------------------------------------------------------------------------------------------------

# A million documents of 20,000 words: 80 gigabytes as float32. Three words a document.
LARGE = """
import resource, sys
import numpy as np, scipy.sparse as sp, torch
import pyro_vae as pv
rng = np.random.default_rng(0)
def documents(count):
    words = rng.integers(0, 20_000, (count, 3), np.int32)
    words[:, 1] = (words[:, 0] + 1) % 20_000
    words[:, 2] = (words[:, 0] + 2) % 20_000
    starts = np.arange(0, 3 * count + 1, 3)
    return sp.csr_array((np.ones(3 * count, np.float32), np.sort(words).ravel(), starts), (count, 20_000))
lda = pv.ProdLDA(20_000, 2, (3,))
x = documents(1_000_000)
pv.fit(lda, documents(500), epochs=1, compile=False, progress=False)  # what is imported and allocated once
with open("/proc/self/status") as status:
    used = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmData"))
resource.setrlimit(resource.RLIMIT_DATA, (used + 400_000_000, resource.RLIM_INFINITY))
"""
WORK = {
    "fit": (
        "pv.fit(lda, x, num_samples=500, compile=False, progress=False, evaluation_size=500, run_dir=sys.argv[1])",
        True,
    ),
    "scores": ("pv.evaluate_bound(lda, x, num_data=500), pv.log_marginal(lda, x[:200], num_particles=1)", True),
    "a hundredth of it, dense": ("x[:10_000].toarray()", False),
}


@pytest.mark.skipif(sys.platform != "linux", reason="Linux limits what a process allocates")
@pytest.mark.parametrize(("work", "fits"), WORK.values(), ids=WORK)
def test_memory_does_not_grow_to_the_dense_size(tmp_path, work, fits):
    command = [sys.executable, "-W", "error", "-c", LARGE + work, str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=TIDY)
    assert done.returncode == 0 if fits else "allocate" in done.stderr, done.stderr


def test_slices_are_sparse_and_a_whole_one_is_the_column_itself():
    rows = column(DENSE)
    assert rows[:] is rows
    assert rows[0:30] is rows
    assert isinstance(rows[2:5], SparseRows)
    assert len(rows[2:5]) == 3
    assert torch.equal(rows[-1], torch.from_numpy(DENSE[-1]))
    assert as_columns(rows, ("x",)) == {"x": rows}
    assert sum(len(b) for b in blocks(rows)) == rows.matrix.nnz + 1
