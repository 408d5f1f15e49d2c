"""What schedules have in common: checked fields, and a value for the count of steps or epochs."""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Annotated, Any, TypeAlias, get_type_hints

from gpubatch.errors import ArgumentError, DTypeError, check_bool, check_choice, check_int, check_real

Schedule: TypeAlias = Callable[[int, int], float]


def _or_none(check: Callable[[str, Any], Any], name: str, value: Any) -> Any:
    return None if value is None else check(name, value)


# Types of fields, each with its check: check(name, value) returns a plain Python value.
NonNegative: TypeAlias = Annotated[float, partial(check_real, low=0)]
OrNone: TypeAlias = Annotated[float | None, partial(_or_none, partial(check_real, low=0))]
Positive: TypeAlias = Annotated[float, partial(check_real, low=0, open_low=True)]
Count: TypeAlias = Annotated[int, partial(check_int, low=1)]
Unit: TypeAlias = Annotated[str, partial(check_choice, choices=["epoch", "step"])]
Flag: TypeAlias = Annotated[bool, check_bool]


class Counted(ABC):
    """A schedule that is a function of n, the count of steps or epochs; its subclasses are frozen dataclasses."""

    per: str

    def __post_init__(self) -> None:
        """Replace each field by its checked value."""
        for name, kind in get_type_hints(type(self), include_extras=True).items():
            for check in getattr(kind, "__metadata__", ()):
                self._put(name, check(name, getattr(self, name)))
        self._check()

    def _put(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _check(self) -> None:  # noqa: B027  most have nothing more to check
        """Check what concerns several fields."""

    def __call__(self, step: int, epoch: int) -> float:
        """The value at ``step`` and ``epoch``, both counted from 0."""
        # A NumPy integer would turn the result into a NumPy float, which promotes float32 arrays.
        return self._at(int(epoch if self.per == "epoch" else step))

    @abstractmethod
    def _at(self, n: int) -> float:
        """The value at n."""


def cosine(progress: float) -> float:
    """Half a cosine, from 1 at progress 0 to 0 at progress 1."""
    return (1 + math.cos(math.pi * progress)) / 2


def mixed(one: float, other: float, weight: float) -> float:
    """Between two values, with the weight of the first; exact at both ends."""
    return one * weight + other * (1 - weight)


def check_boundaries(boundaries: Any, low: int, what: str, number: int) -> tuple[int, ...]:
    """Strictly increasing integers, one less than there are of ``what``."""
    found = tuple(check_int(f"boundaries[{i}]", n, low) for i, n in enumerate(boundaries))
    if any(left >= right for left, right in pairwise(found)):
        raise ArgumentError(f"boundaries must be strictly increasing, got {list(found)}")
    if number != len(found) + 1:
        raise ArgumentError(f"{what} must be one more than boundaries, got {number} {what} for {len(found)} boundaries")
    return found


def check_schedule(name: str, schedule: Any) -> Schedule:
    """A schedule must take a step and an epoch."""
    found: Schedule = schedule
    if isinstance(schedule, type):
        raise DTypeError(
            f"{name} must be a number or a schedule, got the class {schedule.__name__}: give an object of it"
        )
    try:
        signature = inspect.signature(schedule)
    except (TypeError, ValueError):
        return found  # some built-in functions have none
    try:
        signature.bind(0, 0)
    except TypeError:
        called = getattr(schedule, "__qualname__", type(schedule).__qualname__)
        raise DTypeError(
            f"{name} must be a number or a schedule, a function of (step, epoch), both counted from 0: "
            f"{called}{signature} cannot be called with two arguments"
        ) from None
    return found
