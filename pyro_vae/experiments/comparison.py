"""What a comparison found: a row per training, a summary over seeds, a table, a figure, and a file with all of it."""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

import pyro_vae
from pyro_vae.numerics import mean_and_standard_error
from pyro_vae.training.checkpoint import replace_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Comparison", "load_comparison", "strict", "write_json"]

RESULTS = "results.json"
HEAVY = "num_pareto_k_above_0.7"


@dataclass(frozen=True, eq=False, repr=False)
class Comparison:
    """Objectives x settings x seeds, trained on the same data and scored by the same scorer.

    Attributes:
        rows: one for each training, in the order of the grid: "objective", "setting" ("" where there is one only) and
            "seed"; "log_marginal", its standard error over data "log_marginal_se" and its Monte Carlo error "mc_error";
            "median_ess" and "num_pareto_k_above_0.7" where the scorer has them; "scored_bound", SGVB's lower bound on
            the very data that were scored; "test_bound", on all test data, of the parameters that training kept;
            "samples" and "seconds" of training; "samples_to_bound" and "seconds_to_bound", at the first evaluation that
            was not below ``reference_bound``; "error", the message of a training that failed. Nats per datum; None for
            what is not known.
        histories: label (objective, and setting if there are several) -> the histories of its seeds.
        reference_bound: the test bound that trainings are timed to, nats per datum.
        scored: how log p(x) was estimated: method, particles, data, options, seed.
    """

    rows: list[dict[str, Any]]
    histories: dict[str, list[list[dict[str, Any]]]]
    reference_bound: float | None
    scored: dict[str, Any]

    @classmethod
    def of(
        cls,
        members: Iterable[tuple[Mapping[str, Any], list[dict[str, Any]]]],
        reference_bound: float | None = None,
        scored: Mapping[str, Any] | None = None,
    ) -> Comparison:
        """From a row and a history for each training.

        Args:
            members: rows as in ``rows``, but for the times to the bound, which are taken from the histories.
            reference_bound: None for the lowest final test bound (mean over seeds) among the entries that have one: the
                bound that all of them reach.
            scored: how log p(x) was estimated.

        Example:
            >>> history = [{"samples": 100, "seconds": 0.5, "test_bound": -4.0}]
            >>> row = {"objective": "AEVB", "setting": "", "seed": 0, "log_marginal": -3.0, "test_bound": -4.0}
            >>> result = Comparison.of([({**row, "samples": 100, "seconds": 0.5, "error": None}, history)])
            >>> result.reference_bound, result.rows[0]["samples_to_bound"]
            (-4.0, 100)
        """
        pairs = list(members)
        if reference_bound is None:
            reference_bound = _lowest_final_bound([row for row, _ in pairs])
        histories: dict[str, list[list[dict[str, Any]]]] = {}
        for row, history in pairs:
            if history:
                histories.setdefault(_label(row), []).append(history)
        rows = [{**row, **_reached(history, reference_bound)} for row, history in pairs]
        return cls(rows, histories, reference_bound, dict(scored or {}))

    def __repr__(self) -> str:
        return self.table()

    def _repr_markdown_(self) -> str:
        """In a notebook."""
        return self.table()

    def summary(self) -> list[dict[str, Any]]:
        """A row for each objective and setting, over its seeds, in the order of the grid.

        Returns:
            "objective", "setting"; means over the seeds that did not fail of "log_marginal", "scored_bound" and
            "test_bound", with the standard errors *over seeds* "log_marginal_se", ... (None for one seed); the greatest
            "mc_error"; means of "median_ess", "num_pareto_k_above_0.7", "samples" and "seconds"; means of
            "samples_to_bound" and "seconds_to_bound" over the "n_reached" seeds that reached the reference bound;
            "n_ok" of "n" seeds that did not fail, and the first "error". None where there is nothing to average.
        """
        return [_summarize(rows) for rows in _entries(self.rows).values()]

    def table(self) -> str:
        """The summary as a Markdown table, best log p(x) first, with what one must know to read it beneath."""
        entries = sorted(self.summary(), key=lambda entry: -_or_lowest(entry["log_marginal"]))
        columns = {name: [show(entry) for entry in entries] for name, show in self._columns().items()}
        shown = {name: cells for name, cells in columns.items() if any(cells)}
        table = Table(box=box.MARKDOWN)
        for name in shown:
            table.add_column(name, justify="left" if name in ("objective", "setting") else "right")
        for line in zip(*shown.values(), strict=True):
            table.add_row(*line)
        console = Console(file=(drawn := io.StringIO()), width=10_000, color_system=None, markup=False, emoji=False)
        console.print(table)
        lines = [line.strip() for line in drawn.getvalue().splitlines() if line.strip()]
        return "\n".join([*lines, "", *self._notes(entries)]) + "\n"

    def _columns(self) -> dict[str, Any]:
        """Column names, and the text of each in an entry of the summary."""
        bound = "bound" if self.reference_bound is None else f"{self.reference_bound:.2f}"
        return {
            "objective": lambda e: e["objective"],
            "setting": lambda e: e["setting"],
            "log p(x)": lambda e: _with_error(e["log_marginal"], e["log_marginal_se"]),
            "lower bound": lambda e: _with_error(e["scored_bound"], e["scored_bound_se"]),
            "median ESS": lambda e: _number(e.get("median_ess"), ".1f"),
            "k > 0.7": lambda e: _number(e.get(HEAVY), ".0f"),
            "seconds": lambda e: _number(e["seconds"], ",.1f"),
            f"samples to {bound}": lambda e: _of_those_that_reached(e, "samples_to_bound", ",.0f"),
            f"seconds to {bound}": lambda e: _of_those_that_reached(e, "seconds_to_bound", ",.1f"),
            "seeds": lambda e: str(e["n"]) if e["n_ok"] == e["n"] else f"{e['n_ok']} of {e['n']}",
        }

    def _notes(self, entries: Sequence[Mapping[str, Any]]) -> list[str]:
        errors = [e["mc_error"] for e in entries if e["mc_error"] is not None]
        least = f"; Monte Carlo error at most {max(errors):.2g}" if errors else ""
        heavy = "k > 0.7: test data whose weights are too uneven to trust (Pareto k); log p(x) is too low there."
        notes = [
            "Nats per datum, mean over seeds ± standard error over seeds.",
            f"log p(x): {_describe(self.scored)}{least}.",
            *([heavy] if any(e.get(HEAVY) is not None for e in entries) else []),
            "Lower bound: SGVB's, on the same data. Seconds: of training alone. To a bound: SGVB's on all test data.",
        ]
        failed = [e for e in entries if e["error"] is not None]
        notes += [f"{_label(e)}: {e['n'] - e['n_ok']} of {e['n']} failed: {e['error']}" for e in failed]
        return [f"- {note}" for note in notes]

    def plot(self) -> Figure:
        """Learning curves: the mean over seeds, and a band from the least to the greatest.

        Returns:
            A figure with a colour for each objective and a dash pattern for each setting.

        Raises:
            ValueError: nothing has a test bound.
        """
        from pyro_vae.plots import plot_comparison

        curves: dict[str, dict[str, Any]] = {}
        for (objective, setting), rows in _entries(self.rows).items():
            curves.setdefault(objective, {})[setting] = self.histories.get(_label(rows[0]), [])
        return plot_comparison(curves, reference_bound=self.reference_bound)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write ``results.json`` (everything, read by :func:`load_comparison`), ``table.md`` and ``curves.png``.

        Args:
            folder: where; made if it is not there. ``curves.png`` is left out where nothing has a test bound.
        """
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        write_json(path / RESULTS, {"pyro_vae_version": pyro_vae.__version__, **vars(self)})
        (path / "table.md").write_text(self.table(), encoding="utf-8")
        if any(_bounds(history) for histories in self.histories.values() for history in histories):
            self.plot().savefig(path / "curves.png")


def load_comparison(folder: str | os.PathLike[str]) -> Comparison:
    """Read what :meth:`Comparison.save` wrote, as :func:`pyro_vae.compare` does into its ``run_dir``.

    Raises:
        FileNotFoundError: there is no ``results.json``.
    """
    content = json.loads(Path(folder, RESULTS).read_text(encoding="utf-8"))
    content.pop("pyro_vae_version")
    return Comparison(**content)


def write_json(file: Path, content: Any) -> None:
    """Write strict JSON, whole or not at all; what is NaN or infinite becomes null."""
    replace_file(file, (json.dumps(strict(content), indent=1, allow_nan=False) + "\n").encode())


def strict(value: Any) -> Any:
    """What strict JSON can hold: null for what is NaN or infinite, and the name of what is no value."""
    if isinstance(value, Mapping):
        return {str(name): strict(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if callable(value):
        return getattr(value, "__qualname__", type(value).__qualname__)  # a repr's address differs between processes
    return value if value is None or isinstance(value, (bool, int, float, str)) else repr(value)


def _label(row: Mapping[str, Any]) -> str:
    return ", ".join(filter(None, (row["objective"], row["setting"])))


def _entries(rows: Iterable[Mapping[str, Any]]) -> dict[tuple[str, str], list[Mapping[str, Any]]]:
    """The rows of each objective and setting."""
    entries: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        entries.setdefault((row["objective"], row["setting"]), []).append(row)
    return entries


def _bounds(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of a history that hold a test bound."""
    return [row for row in history if row.get("test_bound") is not None]


def _lowest_final_bound(rows: Sequence[Mapping[str, Any]]) -> float | None:
    finals = [_mean(rows, "test_bound")[0] for rows in _entries(rows).values()]
    return min((bound for bound in finals if bound is not None), default=None)


def _reached(history: list[dict[str, Any]], bound: float | None) -> dict[str, Any]:
    """Samples and seconds of the first evaluation that was not below a bound."""
    first = next((row for row in _bounds(history) if bound is not None and row["test_bound"] >= bound), {})
    return {"samples_to_bound": first.get("samples"), "seconds_to_bound": first.get("seconds")}


def _mean(rows: Iterable[Mapping[str, Any]], name: str) -> tuple[float | None, float | None]:
    """Mean and standard error of what is known of a column."""
    known = [row[name] for row in rows if row.get(name) is not None]
    if not known:
        return None, None
    mean, error = mean_and_standard_error(torch.tensor(known, dtype=torch.float64))
    return mean, None if math.isnan(error) else error


def _summarize(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    entry: dict[str, Any] = {"objective": rows[0]["objective"], "setting": rows[0]["setting"]}
    for name in ("log_marginal", "scored_bound", "test_bound"):
        entry[name], entry[f"{name}_se"] = _mean(rows, name)
    entry["mc_error"] = max((row["mc_error"] for row in rows if row.get("mc_error") is not None), default=None)
    for name in ("median_ess", HEAVY, "samples", "seconds", "samples_to_bound", "seconds_to_bound"):
        entry[name] = _mean(rows, name)[0]
    errors = [row["error"] for row in rows if row["error"] is not None]
    entry["n_reached"] = sum(row.get("samples_to_bound") is not None for row in rows)
    return entry | {"n_ok": len(rows) - len(errors), "n": len(rows), "error": errors[0] if errors else None}


def _or_lowest(value: float | None) -> float:
    return -math.inf if value is None else value


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _with_error(value: float | None, error: float | None) -> str:
    return _number(value, ".2f") + ("" if error is None else f" ± {error:.2f}")


def _of_those_that_reached(entry: Mapping[str, Any], name: str, form: str) -> str:
    few = f" ({entry['n_reached']} of {entry['n']})" if 0 < entry["n_reached"] < entry["n"] else ""
    missed = "not reached" if entry["test_bound"] is not None else ""
    return _number(entry[name], form) + few or missed


def _describe(scored: Mapping[str, Any]) -> str:
    """The scorer in words."""
    particles, data = scored.get("num_particles"), scored.get("num_data")
    options = [f"{name}={value}" for name, value in (scored.get("options") or {}).items()]
    parts = [
        str(scored.get("method", "unknown method")),
        "" if particles is None else f"{particles:,} particles",
        *options,
        "test data" if data is None else f"the first {data:,} test data",
        "after a refit of the guide" if scored.get("refit_samples") else "",
    ]
    return ", ".join(filter(None, parts))
