"""Learning-rate decay: callables ``(step, epoch) -> value``, both counted from 0.

The same arguments in every schedule:

lr: the learning rate at n = 0, at least 0
per: what n counts, "epoch" or "step"
every: the unit of n, at least 1: the formula gets n / every
staircase: use the floor of n / every

The value is a Python float, computed in double precision. Any float hyper-parameter can be a schedule, or another
callable of this form.
"""

from __future__ import annotations

import math
import warnings
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from functools import partial
from itertools import pairwise
from typing import Annotated, Any, TypeAlias, get_type_hints

from gpubatch.errors import ArgumentError, DTypeError, check_bool, check_choice, check_int, check_real

__all__ = [
    "CosineDecay",
    "ExponentialDecay",
    "InverseTimeDecay",
    "Piecewise",
    "Schedule",
    "SqrtDecay",
    "StepDecay",
    "counts_epochs",
    "from_dict",
    "to_dict",
]

Schedule: TypeAlias = Callable[[int, int], float]

# Types of fields, each with its check: check(name, value) returns a plain Python value.
NonNegative: TypeAlias = Annotated[float, partial(check_real, low=0)]
Positive: TypeAlias = Annotated[float, partial(check_real, low=0, open_low=True)]
Count: TypeAlias = Annotated[int, partial(check_int, low=1)]
Unit: TypeAlias = Annotated[str, partial(check_choice, choices=["epoch", "step"])]
Flag: TypeAlias = Annotated[bool, check_bool]


def _check_fields(schedule: object) -> None:
    """Replace each field of a frozen dataclass by its checked value."""
    for name, kind in get_type_hints(type(schedule), include_extras=True).items():
        for check in getattr(kind, "__metadata__", ()):
            object.__setattr__(schedule, name, check(name, getattr(schedule, name)))


@dataclass(frozen=True)
class InverseTimeDecay:
    """lr / (1 + decay_rate * n), as in Keras; ``decay_rate`` is at least 0."""

    lr: NonNegative
    decay_rate: NonNegative
    per: Unit = "epoch"
    every: Count = 1
    staircase: Flag = False

    def __post_init__(self) -> None:
        _check_fields(self)

    def __call__(self, step: int, epoch: int) -> float:
        """The value at ``step`` and ``epoch``, both counted from 0."""
        n = _count(self.per, step, epoch)
        return self.lr / (1 + self.decay_rate * (n // self.every if self.staircase else n / self.every))


@dataclass(frozen=True)
class ExponentialDecay:
    """lr * rate**n; PyTorch's ``ExponentialLR`` with ``per="epoch"``. ``rate`` is above 0; above 1 the value grows."""

    lr: NonNegative
    rate: Positive = 0.95
    per: Unit = "epoch"
    every: Count = 1
    staircase: Flag = False

    def __post_init__(self) -> None:
        _check_fields(self)

    def __call__(self, step: int, epoch: int) -> float:
        """The value at ``step`` and ``epoch``, both counted from 0."""
        n = _count(self.per, step, epoch)
        return self.lr * float(self.rate ** (n // self.every if self.staircase else n / self.every))


@dataclass(frozen=True)
class SqrtDecay:
    """lr * k / sqrt(n + 1); ``k`` is at least 0. The course notes count from 1: k / sqrt(t)."""

    lr: NonNegative
    k: NonNegative = 1.0
    per: Unit = "epoch"

    def __post_init__(self) -> None:
        _check_fields(self)

    def __call__(self, step: int, epoch: int) -> float:
        """The value at ``step`` and ``epoch``, both counted from 0."""
        return self.lr * self.k / math.sqrt(_count(self.per, step, epoch) + 1)


@dataclass(frozen=True)
class StepDecay:
    """lr * factor**(n // every), as PyTorch's ``StepLR``; ``factor`` is above 0."""

    lr: NonNegative
    factor: Positive = 0.5
    every: Count = 10
    per: Unit = "epoch"

    def __post_init__(self) -> None:
        _check_fields(self)

    def __call__(self, step: int, epoch: int) -> float:
        """The value at ``step`` and ``epoch``, both counted from 0."""
        return self.lr * float(self.factor ** (_count(self.per, step, epoch) // self.every))


@dataclass(frozen=True)
class Piecewise:
    """Constant values: ``values[i]`` for ``boundaries[i-1] <= n < boundaries[i]``.

    PyTorch's ``MultiStepLR`` and optax switch at the same n; Keras' ``PiecewiseConstantDecay`` switches one later.

    boundaries: strictly increasing integers, each at least 0
    values: one more than boundaries, each at least 0
    """

    boundaries: Sequence[int]
    values: Sequence[float]
    per: Unit = "epoch"

    def __post_init__(self) -> None:
        _check_fields(self)
        boundaries = tuple(check_int(f"boundaries[{i}]", n, 0) for i, n in enumerate(self.boundaries))
        values = tuple(check_real(f"values[{i}]", value, 0) for i, value in enumerate(self.values))
        if any(left >= right for left, right in pairwise(boundaries)):
            raise ArgumentError(f"boundaries must be strictly increasing, got {list(boundaries)}")
        if len(values) != len(boundaries) + 1:
            raise ArgumentError(
                f"values must be one more than boundaries, got {len(values)} values for {len(boundaries)} boundaries"
            )
        object.__setattr__(self, "boundaries", boundaries)
        object.__setattr__(self, "values", values)

    def __call__(self, step: int, epoch: int) -> float:
        """The value at ``step`` and ``epoch``, both counted from 0."""
        return self.values[bisect_right(self.boundaries, _count(self.per, step, epoch))]


@dataclass(frozen=True)
class CosineDecay:
    """Half a cosine from ``lr`` to ``final``, after a linear warm-up (Loshchilov & Hutter, SGDR, equation 5).

    n < warmup: lr * (n + 1) / warmup, so the first value is not zero and n = warmup - 1 already has ``lr``.
    n = warmup: ``lr``. Then the cosine, down to ``final`` at n = total and ever after.

    total: the last n of the cosine, warm-up included, at least 1
    warmup: length of the warm-up, from 0 to total - 1
    final: the last learning rate, at least 0; not a fraction of ``lr``

    Without ``per`` it counts epochs, as the other schedules do, and warns: it counted steps up to version 0.1.
    """

    lr: NonNegative
    total: Count
    warmup: int = 0
    final: NonNegative = 0.0
    per: Unit = ""

    def __post_init__(self) -> None:
        unsaid = self.per == ""
        if unsaid:
            object.__setattr__(self, "per", "epoch")
        _check_fields(self)
        object.__setattr__(self, "warmup", check_int("warmup", self.warmup, 0, self.total - 1))
        if unsaid:
            warnings.warn(
                "CosineDecay without per= counts epochs now, as the other schedules do; it counted steps up to version "
                "0.1: write per='epoch' or per='step'",
                FutureWarning,
                stacklevel=3,
            )

    def __call__(self, step: int, epoch: int) -> float:
        """The value at ``step`` and ``epoch``, both counted from 0."""
        n = _count(self.per, step, epoch)
        if n < self.warmup:
            return self.lr * (n + 1) / self.warmup
        progress = min((n - self.warmup) / (self.total - self.warmup), 1.0)
        weight = (1 + math.cos(math.pi * progress)) / 2
        return self.lr * weight + self.final * (1 - weight)  # exact at both ends


# --- as JSON, for checkpoints -------------------------------------------------------------------------------------

KINDS: dict[str, type[Any]] = {
    kind.__name__: kind for kind in (InverseTimeDecay, ExponentialDecay, SqrtDecay, StepDecay, Piecewise, CosineDecay)
}


def to_dict(schedule: Schedule) -> dict[str, Any]:
    """``schedule`` of this module as plain values, ``{"schedule": "CosineDecay", "lr": 0.1, ...}``."""
    kind: type[Any] = type(schedule)
    if kind not in KINDS.values():
        raise DTypeError(f"schedule must be one of {', '.join(KINDS)} to be written as a dict, got {schedule!r}")
    values = {field.name: getattr(schedule, field.name) for field in fields(kind)}
    return {"schedule": kind.__name__} | {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}


def from_dict(d: Mapping[str, Any]) -> Schedule:
    """The schedule in a dict of :func:`to_dict`."""
    kind = KINDS[check_choice("schedule", d.get("schedule"), KINDS)]
    given = {name: value for name, value in d.items() if name != "schedule"}
    known = [field.name for field in fields(kind)]
    if unknown := [name for name in given if name not in known]:
        raise ArgumentError(f"{kind.__name__} has {', '.join(known)}, got {', '.join(map(repr, unknown))}")
    if missing := [field.name for field in fields(kind) if field.default is MISSING and field.name not in given]:
        raise ArgumentError(f"{kind.__name__} needs {', '.join(missing)}, got {', '.join(given) or 'nothing'}")
    schedule: Schedule = kind(**given)
    return schedule


def counts_epochs(value: Any) -> bool:
    """Whether a hyper-parameter is a schedule of this module by epoch."""
    return type(value) in KINDS.values() and value.per == "epoch"


def _count(per: str, step: int, epoch: int) -> int:
    """n as a Python int: a NumPy integer would turn the result into a NumPy float, which promotes float32 arrays."""
    return int(epoch if per == "epoch" else step)
