"""Checks of single arguments, each with a message that names the argument, what it got and what it takes."""

from __future__ import annotations

import math
import numbers

from vmcr2.errors import InputError


def check_number(name: str, value: float, *, positive: bool = True) -> None:
    """Raises InputError unless the value is a finite number, above 0 (or at least 0 where positive is false)."""
    ok = isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
    if not ok or value < 0 or (positive and value == 0):
        raise InputError(f"{name} must be a finite number {'> 0' if positive else '>= 0'}, got {value!r}")


def check_count(name: str, value: int, *, at_least: int = 1, at_most: int | None = None, limit: str = "") -> None:
    """Raises InputError unless the value is an integer in the range; `limit` names what the upper end is."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < at_least:
        raise InputError(f"{name} must be an integer >= {at_least}, got {value!r}")
    if at_most is not None and value > at_most:
        raise InputError(f"{name} must be at most {at_most}{f' ({limit})' if limit else ''}, got {value}")
