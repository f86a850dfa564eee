"""The errors this package raises on purpose, each with a message that says what to do."""

from __future__ import annotations


class InputError(ValueError):
    """An argument, a file or a run folder is not as required; nothing was computed or overwritten."""


class NotLatchedError(InputError, RuntimeError):
    """The dictionary is empty: no class has been latched yet."""


class NumericalError(ArithmeticError):
    """The computation itself broke down (a loss that is not finite, a factorisation that failed)."""
