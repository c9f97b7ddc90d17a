"""Resident memory on the CPU, measured in processes of their own on the real MNIST."""

import os
import subprocess
import sys
from pathlib import Path

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
WORK = {
    "training": (1.5, "pv.fit(vae, data, num_samples=20_000, evaluate_every=10_000, run_dir=sys.argv[2])"),
    "evaluating with K = 5,000": (2.0, "pv.log_marginal(vae, data.test[:200], num_particles=5_000)"),
}


@pytest.mark.skipif(not (ROOT / "MNIST").is_dir(), reason=f"MNIST is not in {ROOT}")
@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read as Linux reports it")
@pytest.mark.parametrize(("limit", "work"), WORK.values(), ids=WORK)
def test_peak_stays_below_the_limit(tmp_path, limit, work):
    """In gigabytes, everything included: torch itself takes about half of one."""
    command = [sys.executable, "-c", PRELUDE + work + REPORT, str(ROOT), str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    peak = float(done.stdout.split()[-1])
    assert 0.1 < peak < limit
