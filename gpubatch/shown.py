"""What a result looks like at the prompt: a few lines, however many numbers it holds."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import MutableSequence
from typing import Any

import numpy as np

__all__ = ["Shown", "numbers"]

FEW = 5  # numbers that are shown whole


class Shown:
    """A dataclass whose ``repr`` shortens long lists and arrays, and leaves out what is empty."""

    def __repr__(self) -> str:
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.repr}  # type: ignore[arg-type]
        parts = ", ".join(f"{name}={_short(value)}" for name, value in fields.items() if not _is_empty(value))
        return "\n".join(
            textwrap.wrap(f"{type(self).__name__}({parts})", 110, subsequent_indent="  ", break_on_hyphens=False)
        )


def numbers(first: Any, last: float, count: int) -> str:
    """A few numbers of many: the first ones, the last one, and how many there are."""
    shown = ", ".join(f"{x:.4g}" for x in first)
    return f"[{shown}]" if count <= len(first) else f"[{shown}, …, {last:.4g}] ({count:,})"


def _short(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"array of {value.shape}" if value.ndim != 1 else _short(value.tolist())
    if isinstance(value, (tuple, MutableSequence)) and value and all(isinstance(x, (int, float)) for x in value):
        return numbers(value[: FEW if len(value) <= FEW else 2], value[-1], len(value))
    if isinstance(value, tuple) and any(isinstance(x, np.ndarray) for x in value):
        return f"({', '.join(map(_short, value))})"
    return f"{value:.6g}" if isinstance(value, float) else repr(value)


def _is_empty(value: Any) -> bool:
    return isinstance(value, (tuple, MutableSequence, dict, str)) and not value
