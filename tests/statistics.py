"""Assertions about expectations, which fail also when they could not have seen the error they look for."""

import torch
from torch import Tensor


def assert_mean_close(samples: Tensor, truth: Tensor | float, *, z: float = 5.0, min_effect: float) -> None:
    """The mean of independent samples (n, ...) is ``truth``, elementwise, as far as n samples can tell.

    Fails if |mean - truth| > z SE, and also if z SE > min_effect: then an error of that size would go unseen.
    """
    samples = samples.detach().double()
    truth = torch.as_tensor(truth, dtype=torch.float64).detach()
    assert samples.isfinite().all(), "samples are not all finite"
    assert len(samples) >= 30, f"{len(samples)} samples are too few for a normal approximation"
    mean, error = samples.mean(0), samples.std(0) / len(samples) ** 0.5
    assert mean.shape == truth.shape or truth.ndim == 0, f"samples of {mean.shape}, truth of {truth.shape}"
    blind = z * error > min_effect
    assert not blind.any(), f"z SE = {(z * error).max():.3g} > {min_effect}: blind to an effect of that size"
    off = (mean - truth).abs() > z * error + 1e-12  # 1e-12: samples without variance
    assert not off.any(), f"mean {mean.tolist()}, truth {truth.tolist()}, z SE {(z * error).tolist()}"
