"""The pictures of a stored run of a VAE."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor
from torch.distributions import Independent, Normal

from pyro_vae import plots
from pyro_vae.data import Dataset
from pyro_vae.inputs import open_inputs
from pyro_vae.programs import as_program, log_weights
from pyro_vae.runs import StoredRun

__all__ = ["KINDS", "Gallery", "as_images", "learning_curves"]

KINDS = ("curves", "samples", "reconstructions", "latents", "manifold", "traversals")

_AT_MOST = 2000  # points of a scatter plot
_DRAWS = 100  # of latents whose mean is not known


class Gallery:
    """Pictures of a run, each a method of the name of its kind.

    Args:
        stored: the run; its program has ``encode``, ``decode`` and ``sample``.
        root: where named data sets are kept; see :func:`pyro_vae.load_dataset`.
        seed: of what is drawn.
    """

    def __init__(self, stored: StoredRun, root: str | os.PathLike[str] | None = None, seed: int = 0) -> None:
        self.stored, self.model, self.root, self.seed = stored, stored.program, root, seed

    def missing(self) -> dict[str, str]:
        """The kinds that do not apply to the run, and what they need."""
        needs: dict[str, str] = {}
        if not hasattr(self.model, "data_shape"):  # of sequences, which have pictures of their own
            return dict.fromkeys(KINDS[1:], "a VAE; of a model of sequences see sample, forecast, smooth, filter, fill")
        if not is_image(self.model.data_shape):
            needs = dict.fromkeys(
                ("samples", "reconstructions", "manifold", "traversals"), "images (H, W) or (H, W, C)"
            )
        elif hasattr(self.model, "descend"):
            needs = dict.fromkeys(("manifold", "traversals"), "one layer of latents")
        elif not _has_normal_prior(self.model):
            needs = dict.fromkeys(("manifold", "traversals"), "a standard normal prior")
        elif self.model.latent_dim != 2:
            needs = {"manifold": "latent_dim 2"}
        if not self.stored.has_trained_guide:
            needs |= dict.fromkeys(("reconstructions", "latents"), "a trained guide")
        return needs

    @torch.no_grad()
    def draw(self, kind: str) -> Figure:
        """The picture of a kind in ``KINDS`` that applies."""
        torch.manual_seed(self.seed)
        make: Callable[[], Figure] = getattr(self, kind)
        return make()

    def curves(self) -> Figure:
        """Bounds over training samples, or log p(x, z) where there is no bound."""
        return learning_curves(self.stored.config["objective"]["type"], self.stored.history)

    def samples(self) -> Figure:
        """Means of p(x | z), z from the prior."""
        return plots.plot_samples(as_images(self.model.sample(100, mean=True)), columns=10)

    def reconstructions(self) -> Figure:
        """Test data, and the means of p(x | z) at the means of q(z | x)."""
        x, _ = self._held_out
        return plots.plot_reconstructions(as_images(x[:12]), self._decoded(self._encoded(x[:12])))

    def latents(self) -> Figure:
        """Means of q(z | x) of test data, coloured by label."""
        x, index = self._held_out
        labels = self._data.test_labels
        z = self._encoded(x)
        return plots.plot_latents(
            z.cpu().numpy(),
            None if labels is None else labels[index].numpy(),
            label_names=self._data.label_names,
            seed=self.seed,
        )

    def manifold(self) -> Figure:
        """Means of p(x | z) over a grid of z through the Gaussian inverse CDF."""
        images = self._decoded(torch.as_tensor(plots.latent_grid(20)))
        return plots.plot_manifold(images, pad=int(images.shape[1] <= 16))  # small images fill their frame

    def traversals(self) -> Figure:
        """Means of p(x | z) as one latent dimension varies and the others are zero."""
        values = torch.linspace(-2.5, 2.5, 11)
        z = torch.diag_embed(values[:, None].expand(-1, self.model.latent_dim)).transpose(0, 1)  # (J, steps, J)
        images = self._decoded(z.flatten(0, 1))
        return plots.plot_traversals(images.reshape(*z.shape[:2], *images.shape[1:]), values=values.numpy())

    @functools.cached_property
    def _data(self) -> Dataset:
        return self.stored.dataset(self.root)

    @functools.cached_property
    def _held_out(self) -> tuple[Tensor, Tensor]:
        """Some of the test data, read as the model takes them, and their rows."""
        rows = open_inputs(as_program(self.model), self._data, split="test").tensors().drawn_once(self.seed)
        index = torch.randperm(len(rows))[:_AT_MOST]
        return next(iter(rows.rows(index).values())), index

    def _encoded(self, x: Tensor) -> Tensor:
        """Means of the latents next to the data, given these; medians of draws where no mean is known."""
        if hasattr(self.model, "descend"):  # several layers, of which a guide may draw that one last
            return log_weights(self.model.model, self.model.guide, (x,), num_particles=_DRAWS).latents["z_1"].mean(0)
        law = self.model.encode(x)
        with contextlib.suppress(NotImplementedError):
            if law.mean.isfinite().all():
                mean: Tensor = law.mean
                return mean
        median: Tensor = law.sample((_DRAWS,)).median(0).values
        return median

    def _decoded(self, z: Tensor) -> NDArray[Any]:
        return as_images(self.model.decode(z.to(next(self.model.parameters()))).mean)


def _has_normal_prior(model: Any) -> bool:
    """Whether latents have a standard normal law, along whose quantiles pictures may go."""
    law = model.prior(model.encode) if hasattr(model, "prior") else None
    return law is None or (isinstance(law, Independent) and isinstance(law.base_dist, Normal))


def learning_curves(objective: str, history: Sequence[Mapping[str, Any]]) -> Figure:
    """Bounds over training samples; log p(x, z) of an objective that has no bound.

    Args:
        objective: its name, for the legend.
        history: a row per evaluation, as in :class:`pyro_vae.Run`.
    """
    if any(row.get("train_log_joint") is not None for row in history):
        curve = [{"samples": row["samples"], "train_bound": row["train_log_joint"]} for row in history]
        return plots.plot_learning_curves({objective: curve}, ylabel="log p(x, z) (nats per datum)")
    return plots.plot_learning_curves({objective: history})


def is_image(shape: tuple[int, ...]) -> bool:
    """Whether a datum of this shape is a picture."""
    return len(shape) == 2 or (len(shape) == 3 and shape[-1] in (1, 3))


def as_images(x: Tensor) -> NDArray[Any]:
    """Data (n, H, W[, C]) as pictures: a single channel is dropped.

    Raises:
        ValueError: they are not pictures.
    """
    if not is_image(tuple(x.shape[1:])):
        raise ValueError(f"expected images (n, H, W) or (n, H, W, C), got shape {tuple(x.shape)}: choose a .npy output")
    images: NDArray[Any] = x.cpu().numpy()
    return images[..., 0] if images.ndim == 4 and images.shape[-1] == 1 else images
