"""Memory on the CPU, in processes of their own: its peak on the real MNIST, and data larger than what there is."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(os.environ.get("PYRO_VAE_DATA") or Path(__file__).parents[2] / "shared" / "data")

PRELUDE = """
import sys
import pyro_vae as pv
data = pv.load_dataset("mnist", root=sys.argv[1])
vae = pv.VAE((784,), 20, (500,))
"""
# Not getrusage: its peak is that of the process that started this one, if that was higher. In kilobytes.
REPORT = """
print(next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1e6)
"""
# What is freed is given back. By itself the C library keeps freed blocks of tens of megabytes, in holes of whatever
# size it finds: the peak of the same work then varied from 1.0 to 2.2 gigabytes, and said nothing of what is in use.
TIDY = os.environ | {"MALLOC_MMAP_THRESHOLD_": "100000"}
WORK = {
    "training": (1.3, "pv.fit(vae, data, num_samples=20_000, evaluate_every=10_000, run_dir=sys.argv[2])"),
    "evaluating with K = 5,000": (1.3, "pv.log_marginal(vae, data.test[:200], num_particles=5_000)"),
}


@pytest.mark.skipif(not (ROOT / "MNIST").is_dir(), reason=f"MNIST is not in {ROOT}")
@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read as Linux reports it")
@pytest.mark.parametrize(("limit", "work"), WORK.values(), ids=WORK)
def test_peak_stays_below_the_limit(tmp_path, limit, work):
    """In gigabytes, everything included: torch itself takes about half of one."""
    command = [sys.executable, "-c", PRELUDE + work + REPORT, str(ROOT), str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=TIDY)
    peak = float(done.stdout.split()[-1])
    assert 0.1 < peak < limit


# Data larger than memory ----------------------------------------------------------------------------------------------

# The pages of a file that is mapped read-only do not count towards RLIMIT_DATA; a copy and a temporary do.
MAPPED = """
import resource, sys
import numpy as np, torch
import pyro_vae as pv
path, headroom = sys.argv[1], int(sys.argv[2])
likelihood = "bernoulli" if "uint8" in path else "gaussian"
vae = pv.VAE((784,), 2, (3,), likelihood=likelihood)
x = np.load(path, mmap_mode="r")
pv.fit(vae, np.array(x[:100]), epochs=1, compile=False)  # what is imported and allocated once
with open("/proc/self/status") as status:
    used = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmData"))
resource.setrlimit(resource.RLIMIT_DATA, (used + headroom, resource.RLIM_INFINITY))
"""
# What is stored in how many rows of 784, bytes that the process may take beyond that, what it does, and whether it can.
LARGE = {
    "fit": (np.uint8, 600_000, 120e6, "pv.fit(vae, (x,), num_samples=100, compile=False, run_dir=path[:-4])", True),
    "fit on real numbers": (np.float32, 100_000, 80e6, "pv.fit(vae, {'x': x}, num_samples=100, compile=False)", True),
    "scores": (np.uint8, 40_000, 20e6, "pv.evaluate_bound(vae, x), pv.log_marginal(vae, x, num_particles=1)", True),
    "a copy of a third": (np.uint8, 600_000, 120e6, "np.array(x[:200_000])", False),
}


@pytest.mark.skipif(sys.platform != "linux", reason="Linux limits what a process allocates, mapped files apart")
@pytest.mark.parametrize(("dtype", "rows", "headroom", "work", "fits"), LARGE.values(), ids=LARGE)
def test_mapped_files_are_never_copied(tmp_path, dtype, rows, headroom, work, fits):
    """Files of up to half a gigabyte, without blocks on the disk, in a process that may allocate a fraction of that."""
    path = tmp_path / f"{np.dtype(dtype).name}.npy"
    stored = np.lib.format.open_memmap(path, "w+", dtype, (rows, 784))
    stored[-1] = 7 if dtype == np.uint8 else 0.5  # the last row alone has grey levels
    del stored
    command = [sys.executable, "-W", "error", "-c", MAPPED + work, str(path), str(int(headroom))]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=TIDY)
    path.unlink()
    assert done.returncode == 0 if fits else "allocate" in done.stderr, done.stderr
