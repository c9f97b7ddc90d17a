"""Checks of arguments: what was expected, and what came."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

__all__ = ["one_of", "positive_number", "probability", "share", "whole_number"]


def one_of(name: str, value: Any, allowed: Iterable[str]) -> str:
    """A value that is one of a few names.

    Raises:
        ValueError: it is not; lists the names and suggests the nearest.
    """
    known = tuple(allowed)
    if value in known:
        return str(value)
    nearest = get_close_matches(str(value), known, n=1, cutoff=0.0)[0]
    raise ValueError(f"{name}: expected one of {', '.join(known)}, got {value!r}; did you mean {nearest!r}?")


def whole_number(name: str, value: Any, least: int = 1, most: float = math.inf) -> int:
    """A whole number (numpy's, and 1e6, but no boolean) within limits.

    Raises:
        ValueError: it is not; says what was expected of ``name``.
    """
    try:
        number = int(value) if isinstance(value, float) and value.is_integer() else operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool) or not least <= number <= most:
        limits = f"of at least {least}" if most == math.inf else f"from {least} to {most}"
        raise ValueError(f"{name}: expected a whole number {limits}, got {value!r}")
    return number


def positive_number(name: str, value: Any) -> float:
    """A finite number above 0 (numpy's and torch's too, but no boolean and no text).

    Raises:
        ValueError: it is not.
    """
    try:
        is_no_number = isinstance(value, (bool, str, bytes)) or "bool" in str(getattr(value, "dtype", ""))
        number = math.nan if is_no_number else float(value)
    except (TypeError, ValueError, RuntimeError):
        number = math.nan
    if not 0 < number < math.inf:
        raise ValueError(f"{name}: expected a positive number, got {value!r}")
    return number


def probability(name: str, value: Any) -> float:
    """A number strictly between 0 and 1.

    Raises:
        ValueError: it is not.
    """
    if not (isinstance(value, (int, float)) and 0 < value < 1):
        raise ValueError(f"{name}: expected a number between 0 and 1, got {value!r}")
    return float(value)


def share(name: str, value: Any) -> float:
    """A number from 0 to 1, both of them included.

    Raises:
        ValueError: it is not.
    """
    if isinstance(value, bool) or not (isinstance(value, (int, float)) and 0 <= value <= 1):
        raise ValueError(f"{name}: expected a share from 0 to 1, got {value!r}")
    return float(value)
