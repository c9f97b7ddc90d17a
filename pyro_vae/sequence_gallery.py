"""What a stored run of a state-space model says of its sequences: forecasts, latents, gaps filled; with pictures."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from pyro_vae import plots
from pyro_vae.arguments import one_of, probability, whole_number
from pyro_vae.data import LENGTHS, MASK, Dataset
from pyro_vae.data.batches import observed_name
from pyro_vae.data.dataset import SPLITS
from pyro_vae.inputs import open_inputs
from pyro_vae.models.state_space import StateSpaceModel
from pyro_vae.programs import as_program
from pyro_vae.runs import StoredRun

__all__ = ["LEVELS", "Findings", "SequenceGallery", "draw_samples", "read_mask"]

LEVELS = (0.05, 0.25, 0.5, 0.75, 0.95)

_KEYS = 88  # of a piano
_FEW = 6  # panels, if nobody says which
_ROLLS = 4
_UNTOLD = "the guide was not trained on gaps (train --missing, of data that have some), and reads 0 in them"

Array = NDArray[Any]


@dataclass(frozen=True, eq=False)
class Findings:
    """What was found of some rows.

    Attributes:
        arrays: by name. The rows R are the first axis, and in "draws" (S, R, ..., D) the second; steps that a sequence
            does not have are NaN. "quantiles" (R, 5, ..., D) are at "levels".
        figures: by row.
        remarks: a sentence for each thing worth saying.
    """

    arrays: dict[str, Array]
    figures: dict[int, Figure]
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class _Row:
    """A sequence as its model takes it.

    Attributes:
        number: in its split.
        x: (1, T, D), without padding; 0 where nothing was observed.
        mask: where it was observed, bool (1, T, D); None where all was.
    """

    number: int
    x: Tensor
    mask: Tensor | None

    @property
    def num_steps(self) -> int:
        return self.x.shape[1]

    @property
    def seen(self) -> Array:
        """X (T, D), NaN where nothing was observed."""
        return _visible(self.x, self.mask)


class SequenceGallery:
    """Forecasts, latents and filled gaps of some of the sequences that a run was made for.

    Rows are taken one at a time, so that memory is bounded whatever their number.

    Args:
        stored: the run, of a state-space model.
        root: where named data sets are kept; see :func:`pyro_vae.load_dataset`.
        split: "train", "valid" or "test".
        rows: of that split; None for the first three.
        seed: of what is drawn.

    Raises:
        ValueError: the run is of another model, or there is no such split or row.
    """

    def __init__(
        self,
        stored: StoredRun,
        root: str | os.PathLike[str] | None = None,
        *,
        split: str = "test",
        rows: Sequence[int] | None = None,
        seed: int = 0,
    ) -> None:
        one_of("split", split, SPLITS)
        if not isinstance(stored.program, StateSpaceModel):
            raise ValueError(
                f"{stored.path} holds a {type(stored.program).__name__}, which is no model of sequences: expected a "
                "run of a state-space model, such as train --model deep-markov makes"
            )
        self.stored, self.model, self.root, self.split, self.seed = stored, stored.program, root, split, seed
        size = len(self._columns[observed_name(self._columns)])
        if unknown := [row for row in rows or () if not 0 <= row < size]:
            raise ValueError(f"rows: expected rows of the {split} split, from 0 to {size - 1}, got {unknown[0]}")
        self.rows = tuple(dict.fromkeys(range(min(3, size)) if rows is None else rows))

    def forecast(
        self,
        horizon: int | None = None,
        *,
        start: int | None = None,
        num_samples: int = 1000,
        num_particles: int = 1000,
        variables: Sequence[int] | None = None,
    ) -> Findings:
        """Observations to come, with what came beside them where it is known.

        Args:
            horizon: H, steps; by default 10, and with a start to the end of the longest of the sequences.
            start: the first step to forecast, from which on observations are held back; None for what comes after the
                sequences' ends.
            num_samples: S.
            num_particles: K of the filter.
            variables: which to draw; None for the first six, or for piano rolls all.

        Returns:
            "draws" (S, R, H, D), "mean", "quantiles", "start" (R,), "history" (R, T, D) and "truth" (R, H, D).

        Raises:
            ValueError: a sequence has no observations to hold back, or an argument is out of its range.
        """
        self._require_guide("forecast")
        rows = [self._row(number) for number in self.rows]
        if start is not None:
            for row in rows:
                if not 1 <= start < row.num_steps:
                    raise ValueError(
                        f"start: expected a step from 1 to {row.num_steps - 1}, for row {row.number} has "
                        f"{row.num_steps} steps, got {start}"
                    )
        longest = max(row.num_steps for row in rows)
        if horizon is None:
            horizon = 10 if start is None else longest - start
        whole_number("horizon", horizon)
        shown = self._shown(rows, variables)
        torch.manual_seed(self.seed)
        found, figures = [], {}
        for row in rows:
            at = row.num_steps if start is None else start
            past = None if row.mask is None else row.mask[:, :at]
            draws = self.model.forecast(
                row.x[:, :at], horizon, mask=past, num_samples=num_samples, num_particles=num_particles
            )
            truth = _ended(row.seen[at : at + horizon], horizon)
            one = _summary(draws[:, 0]) | {"start": np.array(at), "history": row.seen[:at], "truth": truth}
            found.append(one)
            figures[row.number] = _fan(one, shown, f"row {row.number}")
        arrays = _together(found)
        remarks = self._judged(arrays["truth"], arrays) if start is not None else ()
        if any(row.mask is not None for row in rows) and not self._knows_gaps:
            remarks += (f"{_UNTOLD}: take many particles",)
        return Findings(arrays | self._labels(), figures, remarks)

    def smooth(
        self,
        *,
        num_samples: int = 100,
        num_particles: int | None = None,
        proposal: str | None = None,
        latents: Sequence[int] | None = None,
    ) -> Findings:
        """Latents given whole sequences: "draws" (S, R, T, J), "mean" and "quantiles".

        Args:
            num_samples: S.
            num_particles: K. With the guide, draws from the paths of a particle filter that proposes by it, instead of
                from the guide itself; see :meth:`~pyro_vae.models.state_space.StateSpaceModel.smooth`. With the prior,
                1,000 by default.
            proposal: "guide", or "prior": paths of a particle filter that proposes by the prior. None: the guide, but
                where sequences have gaps only one that was trained on gaps.
            latents: which to draw; None for the six whose means vary most.
        """
        gaps = any(self._row(number).mask is not None for number in self.rows)
        chosen, remarks = self._proposal(proposal, "smooth", gaps)
        how: dict[str, Any] = {"num_samples": num_samples, "num_particles": num_particles, "proposal": chosen}

        def of(row: _Row) -> dict[str, Array]:
            return _summary(self.model.smooth(row.x, mask=row.mask, **how)[:, 0])

        found = self._paths(of, latents)
        return Findings(found.arrays, found.figures, remarks)

    def filter(
        self, *, num_samples: int = 100, num_particles: int = 1000, latents: Sequence[int] | None = None
    ) -> Findings:
        """Latents given what came before and with them, by a particle filter that proposes by the prior.

        Args:
            num_samples: S.
            num_particles: K.
            latents: which to draw; None for the six whose means vary most.

        Returns:
            "draws" (S, R, T, J) of each step by itself, "mean" and "quantiles", "log_evidence" (R,) in nats and the
            effective sample sizes "ess" (R, T).
        """

        def of(row: _Row) -> dict[str, Array]:
            found = self.model.filter(row.x, mask=row.mask, num_particles=num_particles)
            weights = found.log_weights[..., 0].exp()  # (T, K)
            chosen = torch.multinomial(weights, num_samples, replacement=True)  # (T, S)
            steps = torch.arange(len(weights), device=weights.device)[:, None]
            draws = found.particles[steps, chosen, 0].transpose(0, 1)
            further = {"log_evidence": found.log_evidence[0], "ess": found.ess[:, 0]}
            return _summary(draws) | {"mean": _numpy(found.means[0])} | {n: _numpy(v) for n, v in further.items()}

        found = self._paths(of, latents)
        evidence, least = found.arrays["log_evidence"], np.nanmin(found.arrays["ess"])
        said = (
            f"log p(x): {evidence.mean():.2f} nats per sequence; least effective sample size {least:.1f} of "
            f"{num_particles:,} particles"
        )
        return Findings(found.arrays, found.figures, (said,))

    def fill(
        self,
        *,
        mask: Array | None = None,
        drop: float | None = None,
        num_samples: int = 100,
        num_particles: int | None = None,
        proposal: str | None = None,
        variables: Sequence[int] | None = None,
    ) -> Findings:
        """What was not observed, or is hidden, given what was.

        Args:
            mask: True where x may be seen, bool (N, T) or (N, T, D) of the split or of the rows.
            drop: hides this share of the steps, at random, instead. With neither, the gaps that the data have are
                filled.
            num_samples: S.
            num_particles: as of :meth:`smooth`.
            proposal: as of :meth:`smooth`.
            variables: which to draw; None for the first six, or for piano rolls all.

        Returns:
            "draws" (S, R, T, D), "mean" and "quantiles", equal to x where it was seen; "observed" (R, T, D), bool; and
            "truth" (R, T, D), what is known of x.

        Raises:
            ValueError: the mask does not fit, or there is nothing to fill.
        """
        chosen, remarks = self._proposal(proposal, "fill", gaps=True)
        how: dict[str, Any] = {"num_samples": num_samples, "num_particles": num_particles, "proposal": chosen}
        if mask is not None and drop is not None:
            raise ValueError("expected --mask or --drop, got both")
        rows = [self._row(number) for number in self.rows]
        visible = self._visible_steps(rows, mask, drop)
        shown = self._shown(rows, variables)
        torch.manual_seed(self.seed)
        found, figures = [], {}
        for row, seen in zip(rows, visible, strict=True):
            draws = self.model.fill(row.x, seen, **how)[:, 0]
            one = _summary(draws) | {"observed": seen[0].cpu().numpy(), "truth": row.seen}
            found.append(one)
            drawn = one | {"history": _visible(row.x, seen), "start": np.array(0)}
            drawn["truth"] = np.where(one["observed"], np.nan, row.seen)
            figures[row.number] = _fan(drawn, shown, f"row {row.number}")
        arrays = _together(found)
        hidden = np.where(arrays["observed"], np.nan, arrays["truth"])
        return Findings(arrays | self._labels(), figures, self._judged(hidden, arrays) + remarks)

    # ---- Proposals

    @property
    def _knows_gaps(self) -> bool:
        """Whether the guide allows for gaps: by its form, or because it was told of them and trained on some."""
        trained = not hasattr(self.model, "missing") or self._data.observed("train") is not None
        return bool(self.model.sees_gaps) and trained

    def _proposal(self, proposal: str | None, task: str, gaps: bool) -> tuple[str, tuple[str, ...]]:
        """Which proposal to take, and what is to be said of it."""
        untold = gaps and not self._knows_gaps
        chosen = one_of("proposal", proposal or ("prior" if untold else "guide"), ("guide", "prior"))
        if chosen == "guide":
            self._require_guide(task)
            return chosen, (f"{_UNTOLD}: draws may be far off; --proposal prior does without it",) if untold else ()
        return chosen, () if proposal else (f"{_UNTOLD}: drawn by a particle filter that proposes by the prior",)

    # ---- Rows

    @functools.cached_property
    def _data(self) -> Dataset:
        return self.stored.dataset(self.root).with_test(self.split)

    @functools.cached_property
    def _opened(self) -> Any:
        inputs = open_inputs(as_program(self.model), self._data, split="test")
        return inputs.tensors().drawn_once(self.seed)

    @property
    def _columns(self) -> Mapping[str, Any]:
        columns: Mapping[str, Any] = self._opened.columns
        return columns

    def _row(self, number: int) -> _Row:
        read = self._opened.rows(torch.tensor([number]))
        x = read[observed_name(read)]
        steps = int(read[LENGTHS][0]) if LENGTHS in read else x.shape[1]
        mask = read[MASK][:, :steps] if MASK in read else None
        return _Row(number, x[:, :steps], mask)

    def _labels(self) -> dict[str, Array]:
        return {"rows": np.array(self.rows), "levels": np.array(LEVELS)}

    def _require_guide(self, task: str) -> None:
        if not self.stored.has_trained_guide:
            raise ValueError(f"{self.stored.path} trained no guide, by which {task} proposes; filter needs none")

    def _visible_steps(self, rows: Sequence[_Row], mask: Array | None, drop: float | None) -> list[Tensor]:
        """Where x may be seen, bool (1, T, D) of each row."""
        given = self._given(mask)
        visible = []
        for place, row in enumerate(rows):
            seen = torch.ones_like(row.x, dtype=torch.bool) if row.mask is None else row.mask.expand(row.x.shape)
            if given is not None:
                seen = seen & torch.from_numpy(given[place, : row.num_steps]).to(seen.device)
            if drop is not None:
                count = max(1, round(probability("drop", drop) * row.num_steps))
                rng = np.random.default_rng([self.seed, row.number])
                seen = seen.clone()
                seen[:, torch.from_numpy(rng.permutation(row.num_steps)[:count])] = False
            visible.append(seen)
        if all(bool(seen.all()) for seen in visible):
            raise ValueError("nothing to fill: all of these sequences is observed; expected --mask or --drop")
        return visible

    def _given(self, mask: Array | None) -> Array | None:
        """A mask of the rows, (R, T, D) or (R, T, 1)."""
        if mask is None:
            return None
        size, steps, width = (int(n) for n in self._columns[observed_name(self._columns)].shape)
        fits = mask.ndim in (2, 3) and len(mask) in (size, len(self.rows)) and mask.shape[1] == steps
        if mask.dtype != bool or not fits or (mask.ndim == 3 and mask.shape[2] not in (1, width)):
            raise ValueError(
                f"mask: expected bool, True where x may be seen, of shape ({size}, {steps}) or ({size}, {steps}, "
                f"{width}), or of the {len(self.rows)} rows alone; got {mask.dtype} of shape {mask.shape}"
            )
        chosen = mask[list(self.rows)] if len(mask) == size else mask
        return chosen if chosen.ndim == 3 else chosen[..., None]

    # ---- What is said and drawn

    def _paths(self, find: Callable[[_Row], dict[str, Array]], latents: Sequence[int] | None) -> Findings:
        torch.manual_seed(self.seed)
        rows = [self._row(number) for number in self.rows]
        found, figures = [], {}
        for row in rows:
            one = find(row)
            shown = _varied(one["mean"]) if latents is None else _checked("latents", latents, one["mean"].shape[-1])
            outer = one["quantiles"][[0, 1, 3, 4]][..., shown]
            figures[row.number] = plots.latent_paths(
                one["mean"][:, shown], outer, names=[f"z[{j}]" for j in shown], title=f"row {row.number}"
            )
            found.append(one)
        return Findings(_together(found) | self._labels(), figures)

    def _shown(self, rows: Sequence[_Row], variables: Sequence[int] | None) -> list[int] | None:
        """Which variables a fan chart has; None for piano rolls."""
        width = rows[0].x.shape[-1]
        if variables is not None:
            return _checked("variables", variables, width)
        return None if all(_is_roll(row.seen) for row in rows) else list(range(min(_FEW, width)))

    def _judged(self, truth: Array, arrays: Mapping[str, Array]) -> tuple[str, ...]:
        """How far the means are off what is known, and how often it lies in the intervals."""
        known = np.isfinite(truth)
        if not known.any():
            return ()
        error = np.sqrt(np.square(arrays["mean"] - truth)[known].mean())
        low, high = arrays["quantiles"][:, 0], arrays["quantiles"][:, -1]
        inside = ((low <= truth) & (truth <= high))[known].mean()
        binary = np.isin(truth[known], (0, 1)).all()  # of which intervals say little
        covered = "" if binary else f"; {inside:.0%} of them lie in the 90 % intervals"
        return (
            f"root mean square error of the means: {error:.3g}, of {known.sum():,} values that were hidden{covered}",
        )


def draw_samples(x: Array) -> Figure:
    """A picture of sequences (n, T, D) that were drawn from a model: piano rolls of 88 keys, else lines."""
    if _is_roll(x):
        few = x[:_ROLLS]
        return plots.piano_roll(list(few), [f"sample {n}" for n in range(len(few))])
    shown = list(range(min(_FEW, x.shape[-1])))
    return plots.plot_sequences(x[: len(plots.LINE_COLOURS), :, shown])


def read_mask(file: Path) -> Array:
    """The mask in a .npy file.

    Raises:
        ValueError: it is no array of bool.
    """
    try:
        mask = np.load(file, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{file}: expected a .npy file that holds a mask of bool ({error})") from error
    if not isinstance(mask, np.ndarray) or mask.dtype != bool:
        kind = mask.dtype if isinstance(mask, np.ndarray) else "an archive"
        raise ValueError(f"{file}: expected a mask of bool, True where x may be seen, got {kind}")
    return mask


def _fan(one: Mapping[str, Array], shown: list[int] | None, title: str) -> Figure:
    """A picture of draws of observations, beside what was observed; of the variables shown, or of a piano roll."""
    start = int(one["start"])
    if shown is not None:
        return plots.fan_chart(
            one["history"][:, shown],
            one["truth"][:, shown],
            one["draws"][..., shown],
            start=start,
            names=[f"x[{d}]" for d in shown],
            title=title,
        )
    if not start:  # gaps filled: the draws are of all steps
        seen = one["history"]
        truth = np.where(np.isfinite(seen), seen, one["truth"])
        labels = ["observed", "mean of the draws", "a draw", "truth"]
        return plots.piano_roll([seen, one["mean"], one["draws"][0], truth], labels, title=title)
    past = one["history"]
    rolls = [np.concatenate([past, ahead]) for ahead in (one["mean"], one["draws"][0])]
    labels = ["observed, then the mean of the draws", "observed, then a draw"]
    if np.isfinite(one["truth"]).any():
        rolls, labels = [*rolls, np.concatenate([past, one["truth"]])], [*labels, "truth"]
    return plots.piano_roll(rolls, labels, start=start, title=title)


def _summary(draws: Tensor) -> dict[str, Array]:
    """Draws (S, T, D), their means (T, D) and quantiles (5, T, D)."""
    drawn = _numpy(draws)
    return {
        "draws": drawn,
        "mean": drawn.mean(0),
        "quantiles": np.quantile(drawn, LEVELS, axis=0).astype(drawn.dtype),
    }


def _together(found: Sequence[Mapping[str, Array]]) -> dict[str, Array]:
    """The arrays of all rows, filled with NaN to the longest; the rows are the first axis, of draws the second."""
    return {name: _padded([one[name] for one in found], axis=int(name == "draws")) for name in found[0]}


def _padded(arrays: Sequence[Array], axis: int) -> Array:
    time = -1 if arrays[0].ndim == 1 else -2
    longest = max(array.shape[time] for array in arrays) if arrays[0].ndim else 0
    same = [_ended(array, longest, time) if array.ndim else array for array in arrays]
    return np.stack(same, axis if arrays[0].ndim else 0)


def _ended(array: Array, num_steps: int, time: int = 0) -> Array:
    """An array with so many steps, NaN (of bool True: nothing to fill) where it had none."""
    widths = [(0, 0)] * array.ndim
    widths[time] = (0, num_steps - array.shape[time])
    return np.pad(array, widths, constant_values=True if array.dtype == bool else np.nan)


def _checked(name: str, chosen: Sequence[int], width: int) -> list[int]:
    if unknown := [index for index in chosen if not 0 <= index < width]:
        raise ValueError(f"{name}: expected numbers from 0 to {width - 1}, got {unknown[0]}")
    return list(dict.fromkeys(chosen))


def _varied(means: Array) -> list[int]:
    """The few latents whose means (T, J) vary most, in their order."""
    order: Iterable[int] = np.argsort(-means.var(0), kind="stable")[:_FEW].tolist()
    return sorted(order)


def _is_roll(x: Array) -> bool:
    known = x[np.isfinite(x)]
    return x.shape[-1] == _KEYS and bool(((known >= 0) & (known <= 1)).all())


def _visible(x: Tensor, mask: Tensor | None) -> Array:
    """X (T, D) of (1, T, D), NaN where the mask is False."""
    seen = _numpy(x[0])
    return seen if mask is None else np.where(mask[0].expand(x.shape[1:]).cpu().numpy(), seen, np.nan)


def _numpy(tensor: Tensor) -> Array:
    array: Array = tensor.detach().cpu().numpy()
    return array
