"""Every test alone: float64, a seed from its own name, an empty parameter store, Pyro's validation on."""

from zlib import crc32

import pyro
import pytest
import torch


@pytest.fixture(autouse=True)
def _alone(request):
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    pyro.clear_param_store()
    pyro.set_rng_seed(crc32(request.node.name.encode()))
    with pyro.validation_enabled(True):
        yield
    torch.set_default_dtype(dtype)
    pyro.clear_param_store()
