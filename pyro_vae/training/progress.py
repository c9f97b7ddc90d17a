"""The progress bar: what a person watches while a run trains."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

__all__ = ["Report", "progress_bar"]

Report = Callable[[int, "dict[str, Any] | str | None"], None]
"""(samples seen, newest row of the history or what a step is doing that takes long) -> None."""


@contextlib.contextmanager
def progress_bar(enabled: bool, total: int | None, done: int) -> Iterator[Report]:
    """A bar on standard error with the newest bounds; silent where that is not a terminal.

    Args:
        enabled: False shows nothing.
        total: samples of the whole run, None if not known.
        done: samples seen already.
    """
    console = Console(stderr=True)
    if not (enabled and console.is_terminal):
        yield lambda samples, news: None
        return
    columns = (
        BarColumn(bar_width=10),  # all of it on a line of 80 characters
        TextColumn("{task.completed:,.0f} samples"),
        TextColumn("[bold]{task.fields[bounds]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("training", total=total, completed=done, bounds="")

        def report(samples: int, news: dict[str, Any] | str | None) -> None:
            progress.update(task, completed=samples)
            if news is not None:
                progress.update(task, bounds=news if isinstance(news, str) else _bounds(news), refresh=True)

        yield report


def _bounds(row: dict[str, Any]) -> str:
    shown = [f"{name[:-6]} {row[name]:.2f}" for name in ("train_bound", "test_bound") if row.get(name) is not None]
    return ", ".join(shown) + " nats"
