"""What can go wrong, and the checks that say so.

    GpubatchError
    ├── ArgumentError (ValueError)           an argument outside its range; the message has name, range and value
    │   ├── ShapeError                       two shapes that do not fit each other
    │   └── DataFormatError                  a file that is not what it should be
    ├── UnknownArgumentError (TypeError)     a keyword argument that does not exist; the message lists those that do
    ├── DTypeError (TypeError)               an element type that cannot be used here
    ├── FormulaError (TypeError)             a rule, activation or loss that cannot be recorded
    ├── DeviceMismatchError (TypeError)      arrays of two devices, or of the wrong one
    ├── BackendUnavailableError (RuntimeError)   the device that was asked for cannot be used
    ├── InsufficientMemoryError (MemoryError)    not even one sample fits
    ├── CheckpointError (OSError)            a checkpoint that cannot be written
    ├── CaptureError (RuntimeError)          work that cannot be captured as a CUDA graph
    └── NonFiniteError (ArithmeticError)     NaN or infinity in data, loss or gradient

    BackendFallbackWarning (UserWarning)     the CPU stands in for a device that cannot be used
    CaptureWarning (UserWarning)             captured steps do not agree with eager ones, and are not used any more
    CheckpointWarning (UserWarning)          a checkpoint is passed over, or was not written and the run goes on
    MicroBatchWarning (UserWarning)          memory ran out: batches are computed in parts from here on
    SkippedStepWarning (UserWarning)         a step is left out: its loss or its gradient is not finite
    TuningWarning (UserWarning)              algorithms that were chosen for matrix products cannot be used here

Every one is also the built-in exception that a NumPy user would expect.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable
from typing import Any

__all__ = [
    "ArgumentError",
    "BackendFallbackWarning",
    "BackendUnavailableError",
    "CaptureError",
    "CaptureWarning",
    "CheckpointError",
    "CheckpointWarning",
    "DTypeError",
    "DataFormatError",
    "DeviceMismatchError",
    "FormulaError",
    "GpubatchError",
    "InsufficientMemoryError",
    "MicroBatchWarning",
    "NonFiniteError",
    "ShapeError",
    "SkippedStepWarning",
    "TuningWarning",
    "UnknownArgumentError",
]


class GpubatchError(Exception):
    """Base of everything that gpubatch raises on purpose."""


class ArgumentError(GpubatchError, ValueError):
    """An argument is outside its allowed range."""


class ShapeError(ArgumentError):
    """Two shapes do not fit each other."""


class DataFormatError(ArgumentError):
    """A file is not in the format that its reader expects."""


class UnknownArgumentError(GpubatchError, TypeError):
    """A keyword argument that the callee does not have."""


class DTypeError(GpubatchError, TypeError):
    """An array has an element type that cannot be used here."""


class FormulaError(GpubatchError, TypeError):
    """A function that was declared as a formula does what cannot be recorded."""


class DeviceMismatchError(GpubatchError, TypeError):
    """Arrays of two devices meet, or an array is not on the device where it is needed."""


class BackendUnavailableError(GpubatchError, RuntimeError):
    """A device was asked for that cannot be used; ``cause`` is one of ``CAUSES``, ``remedy`` says what to do."""

    CAUSES = ("not installed", "libraries missing", "driver too old", "no device")

    def __init__(self, message: str, cause: str, remedy: str) -> None:
        RuntimeError.__init__(self, f"{message} Remedy: {remedy}")
        self.message, self.cause, self.remedy = message, cause, remedy


class InsufficientMemoryError(GpubatchError, MemoryError):
    """Not even the smallest piece of work fits in memory."""


class CheckpointError(GpubatchError, OSError):
    """A checkpoint cannot be written; those before it are as they were."""


class CaptureError(GpubatchError, RuntimeError):
    """Work does what a CUDA graph cannot hold."""


class NonFiniteError(GpubatchError, ArithmeticError):
    """NaN or infinity where numbers are needed."""


class BackendFallbackWarning(UserWarning):
    """The CPU is used in place of a device that cannot be used."""


class CaptureWarning(UserWarning):
    """Captured steps do not agree with eager ones; the run goes on with eager ones."""


class CheckpointWarning(UserWarning):
    """A torn or corrupt checkpoint is passed over, or one was not written and the training goes on."""


class MicroBatchWarning(UserWarning):
    """Memory ran out in a training step: batches are computed in parts from here on, their gradients added up."""


class SkippedStepWarning(UserWarning):
    """A training step is left out, since its loss or its gradient is not finite."""


class TuningWarning(UserWarning):
    """Algorithms that were chosen for matrix products, and saved, cannot be used: the last bits may be others."""


def check_real(
    name: str,
    value: Any,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    open_low: bool = False,
    open_high: bool = False,
) -> float:
    """``value`` as a Python float, if it is a finite real number between ``low`` and ``high``."""
    left = "(" if open_low or low == -math.inf else "["
    right = ")" if open_high or high == math.inf else "]"
    inside = f"{left}{low:g}, {high:g}{right}"
    if getattr(value, "shape", None) == () and not isinstance(value, numbers.Real):
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise DTypeError(f"{name} must be a real number in {inside}, got {value!r} of type {type(value).__name__}")
    number = float(value)
    below = number <= low if open_low else number < low
    above = number >= high if open_high else number > high
    if not math.isfinite(number) or below or above:
        raise ArgumentError(f"{name} must be finite and in {inside}, got {number!r}")
    return number


def check_int(name: str, value: Any, low: int, high: int | None = None) -> int:
    """``value`` as a Python int, if it is an integer between ``low`` and ``high``, both included."""
    inside = f">= {low}" if high is None else f"between {low} and {high}"
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise DTypeError(f"{name} must be an integer {inside}, got {value!r} of type {type(value).__name__}")
    number = int(value)
    if number < low or (high is not None and number > high):
        raise ArgumentError(f"{name} must be an integer {inside}, got {number}")
    return number


def check_bool(name: str, value: Any) -> bool:
    """``value``, if it is True or False."""
    if not isinstance(value, bool):
        raise DTypeError(f"{name} must be True or False, got {value!r}")
    return value


def check_choice(name: str, value: Any, choices: Iterable[str]) -> str:
    """``value``, if it is one of ``choices``; otherwise an error that lists them and names the nearest."""
    known = list(choices)
    if isinstance(value, str) and value in known:
        return value
    raise ArgumentError(f"{name} must be one of {', '.join(map(repr, known))}, got {value!r}{_nearest(value, known)}")


def check_known(owner: str, given: Iterable[str], known: Iterable[str]) -> None:
    """An error if ``given`` has a keyword argument that ``owner`` does not take."""
    names = list(known)
    for name in given:
        if name not in names:
            raise UnknownArgumentError(f"{owner} takes {', '.join(names)}; got {name!r}{_nearest(name, names)}")


def _nearest(value: Any, known: list[str]) -> str:
    import difflib  # only where there is an error to describe

    near = difflib.get_close_matches(value, known, n=1) if isinstance(value, str) else []
    return f"; did you mean {near[0]!r}?" if near else ""
