"""Schedules of schedules: one after another, and multiplied."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gpubatch.errors import ArgumentError, check_choice, check_real
from gpubatch.schedules.counted import Schedule, check_boundaries, check_schedule


@dataclass(frozen=True, repr=False)
class Chain:
    """See :func:`chain`."""

    schedules: Sequence[Schedule | float]
    boundaries: Sequence[int]
    per: str = "epoch"

    def __post_init__(self) -> None:
        object.__setattr__(self, "schedules", check_parts("chain", self.schedules))
        boundaries = check_boundaries(self.boundaries, 1, "schedules", len(self.schedules))
        object.__setattr__(self, "boundaries", boundaries)
        check_choice("per", self.per, ["epoch", "step"])

    def __call__(self, step: int, epoch: int) -> float:
        """The value at ``step`` and ``epoch``, both counted from 0."""
        step, epoch = int(step), int(epoch)
        part = bisect_right(self.boundaries, epoch if self.per == "epoch" else step)
        begin = self.boundaries[part - 1] if part else 0
        at = (step, epoch - begin) if self.per == "epoch" else (step - begin, epoch)
        return value_of(self.schedules[part], *at)

    def __repr__(self) -> str:
        return f"chain({list(self.schedules)}, {list(self.boundaries)}, per={self.per!r})"


@dataclass(frozen=True, repr=False)
class Product:
    """See :func:`product`."""

    schedules: Sequence[Schedule | float]

    def __post_init__(self) -> None:
        object.__setattr__(self, "schedules", check_parts("product", self.schedules))

    def __call__(self, step: int, epoch: int) -> float:
        """The value at ``step`` and ``epoch``, both counted from 0."""
        return math.prod(value_of(part, int(step), int(epoch)) for part in self.schedules)

    def __repr__(self) -> str:
        return f"product({', '.join(map(repr, self.schedules))})"


def chain(schedules: Sequence[Schedule | float], boundaries: Sequence[int], per: str = "epoch") -> Chain:
    """Schedules one after another, as PyTorch's ``SequentialLR`` and optax's ``join_schedules``.

    schedules: two or more schedules; a number is a constant
    boundaries: where each but the first begins, strictly increasing integers, each at least 1
    per: what the boundaries count, "epoch" or "step"

    Each counts from its own boundary, in the unit of ``per``: at ``boundaries[0]`` the second one has n = 0. One that
    counts the other unit counts it from the start of the run.

    >>> warm = chain([LinearDecay(0.01, total=5, final=0.1), ExponentialDecay(0.1, rate=0.5)], [5])
    >>> [warm(0, epoch) for epoch in (0, 5, 6)]
    [0.01, 0.1, 0.05]
    """
    return Chain(schedules, boundaries, per)


def product(*schedules: Schedule | float) -> Product:
    """The product of two or more schedules, as PyTorch's ``ChainedScheduler``: one has the rate, others are factors.

    >>> product(ExponentialDecay(0.1, rate=0.5), Piecewise([4], [0.1, 1.0]))(0, 4)
    0.00625
    """
    return Product(schedules)


def value_of(part: Schedule | float, step: int, epoch: int) -> float:
    """A schedule's value, or the number itself."""
    return part(step, epoch) if callable(part) else part


def check_parts(what: str, parts: Any) -> tuple[Schedule | float, ...]:
    """The parts of a :func:`chain` or :func:`product`, checked."""
    if not isinstance(parts, Sequence) or len(parts) < 2:
        raise ArgumentError(f"schedules of {what} must be two or more, got {parts!r}")
    checked = list[Schedule | float]()
    for i, part in enumerate(parts):
        name = f"schedules[{i}] of {what}"
        checked.append(check_schedule(name, part) if callable(part) else check_real(name, part, 0))
    return tuple(checked)
