"""Learning-rate decay: callables ``(step, epoch) -> value``, both counted from 0.

``per`` says which of the two is the n of a formula, ``every`` is the unit in which n is counted (n / every, and with
``staircase=True`` its floor). The value is a Python float, computed in double precision. A schedule may stand for any
float hyper-parameter, and so may any other callable of this form.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from itertools import pairwise
from typing import Any, TypeAlias

from gpubatch.errors import ArgumentError, DTypeError, check_bool, check_choice, check_int, check_real

__all__ = [
    "CosineDecay",
    "ExponentialDecay",
    "InverseTimeDecay",
    "Piecewise",
    "Schedule",
    "SqrtDecay",
    "StepDecay",
    "from_dict",
    "to_dict",
]

Schedule: TypeAlias = Callable[[int, int], float]


@dataclass(frozen=True)
class InverseTimeDecay:
    """lr / (1 + decay_rate * n), as in Keras."""

    lr: float
    decay_rate: float
    per: str = "epoch"
    every: int = 1
    staircase: bool = False

    def __post_init__(self) -> None:
        _store(
            self,
            lr=check_real("lr", self.lr, 0),
            decay_rate=check_real("decay_rate", self.decay_rate, 0),
            per=_check_per(self.per),
            every=check_int("every", self.every, 1),
            staircase=check_bool("staircase", self.staircase),
        )

    def __call__(self, step: int, epoch: int) -> float:
        """The value at ``step`` and ``epoch``, both counted from 0."""
        n = _count(self.per, step, epoch)
        return self.lr / (1 + self.decay_rate * (n // self.every if self.staircase else n / self.every))


@dataclass(frozen=True)
class ExponentialDecay:
    """lr * rate**n; PyTorch's ``ExponentialLR`` with ``per="epoch"``. A rate above 1 grows."""

    lr: float
    rate: float = 0.95
    per: str = "epoch"
    every: int = 1
    staircase: bool = False

    def __post_init__(self) -> None:
        _store(
            self,
            lr=check_real("lr", self.lr, 0),
            rate=check_real("rate", self.rate, 0, open_low=True),
            per=_check_per(self.per),
            every=check_int("every", self.every, 1),
            staircase=check_bool("staircase", self.staircase),
        )

    def __call__(self, step: int, epoch: int) -> float:
        """The value at ``step`` and ``epoch``, both counted from 0."""
        n = _count(self.per, step, epoch)
        return self.lr * float(self.rate ** (n // self.every if self.staircase else n / self.every))


@dataclass(frozen=True)
class SqrtDecay:
    """lr * k / sqrt(n + 1): k/sqrt(t) in the notes, where epochs and steps are counted from 1."""

    lr: float
    k: float = 1.0
    per: str = "epoch"

    def __post_init__(self) -> None:
        _store(self, lr=check_real("lr", self.lr, 0), k=check_real("k", self.k, 0), per=_check_per(self.per))

    def __call__(self, step: int, epoch: int) -> float:
        """The value at ``step`` and ``epoch``, both counted from 0."""
        return self.lr * self.k / math.sqrt(_count(self.per, step, epoch) + 1)


@dataclass(frozen=True)
class StepDecay:
    """lr * factor**(n // every), the discrete staircase: PyTorch's ``StepLR``."""

    lr: float
    factor: float = 0.5
    every: int = 10
    per: str = "epoch"

    def __post_init__(self) -> None:
        _store(
            self,
            lr=check_real("lr", self.lr, 0),
            factor=check_real("factor", self.factor, 0, open_low=True),
            every=check_int("every", self.every, 1),
            per=_check_per(self.per),
        )

    def __call__(self, step: int, epoch: int) -> float:
        """The value at ``step`` and ``epoch``, both counted from 0."""
        return self.lr * float(self.factor ** (_count(self.per, step, epoch) // self.every))


@dataclass(frozen=True)
class Piecewise:
    """Values by hand: ``values[i]`` from n = ``boundaries[i-1]`` on, up to but not at ``boundaries[i]``.

    PyTorch's ``MultiStepLR`` and optax switch at the same n; Keras' ``PiecewiseConstantDecay`` switches one later.
    """

    boundaries: Sequence[int]
    values: Sequence[float]
    per: str = "epoch"

    def __post_init__(self) -> None:
        boundaries = tuple(check_int(f"boundaries[{i}]", n, 0) for i, n in enumerate(self.boundaries))
        values = tuple(check_real(f"values[{i}]", value, 0) for i, value in enumerate(self.values))
        if any(left >= right for left, right in pairwise(boundaries)):
            raise ArgumentError(f"boundaries must be strictly increasing, got {list(boundaries)}")
        if len(values) != len(boundaries) + 1:
            raise ArgumentError(
                f"values must be one more than boundaries, got {len(values)} values for {len(boundaries)} boundaries"
            )
        _store(self, boundaries=boundaries, values=values, per=_check_per(self.per))

    def __call__(self, step: int, epoch: int) -> float:
        """The value at ``step`` and ``epoch``, both counted from 0."""
        return self.values[bisect_right(self.boundaries, _count(self.per, step, epoch))]


@dataclass(frozen=True)
class CosineDecay:
    """Half a cosine from ``lr`` to ``final``, after a linear warm-up (Loshchilov & Hutter, SGDR, equation 5).

    ``total`` counts the warm-up too. n < warmup: lr * (n + 1) / warmup, so that the first value is not zero and
    n = warmup - 1 has ``lr`` already. n = warmup: ``lr``; from there the cosine, to ``final`` at n = total and
    ever after. ``final`` is itself a learning rate, not a fraction of ``lr``.
    """

    lr: float
    total: int
    warmup: int = 0
    final: float = 0.0
    per: str = "step"

    def __post_init__(self) -> None:
        total = check_int("total", self.total, 1)
        _store(
            self,
            lr=check_real("lr", self.lr, 0),
            total=total,
            warmup=check_int("warmup", self.warmup, 0, total - 1),
            final=check_real("final", self.final, 0),
            per=_check_per(self.per),
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
    """``schedule`` as plain values, ``{"schedule": "CosineDecay", "lr": 0.1, ...}``; those of this module only."""
    kind: type[Any] = type(schedule)
    if kind not in KINDS.values():
        raise DTypeError(f"schedule must be one of {', '.join(KINDS)} to be written as a dict, got {schedule!r}")
    values = {field.name: getattr(schedule, field.name) for field in fields(kind)}
    return {"schedule": kind.__name__} | {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}


def from_dict(d: Mapping[str, Any]) -> Schedule:
    """The schedule that :func:`to_dict` wrote."""
    kind = KINDS[check_choice("schedule", d.get("schedule"), KINDS)]
    given = {name: value for name, value in d.items() if name != "schedule"}
    known = [field.name for field in fields(kind)]
    if unknown := [name for name in given if name not in known]:
        raise ArgumentError(f"{kind.__name__} has {', '.join(known)}, got {', '.join(map(repr, unknown))}")
    if missing := [field.name for field in fields(kind) if field.default is MISSING and field.name not in given]:
        raise ArgumentError(f"{kind.__name__} needs {', '.join(missing)}, got {', '.join(given) or 'nothing'}")
    schedule: Schedule = kind(**given)
    return schedule


def _store(schedule: object, **checked: Any) -> None:
    """Replace the fields of a frozen dataclass by their checked values, which are plain Python numbers."""
    for name, value in checked.items():
        object.__setattr__(schedule, name, value)


def _check_per(per: Any) -> str:
    return check_choice("per", per, ["epoch", "step"])


def _count(per: str, step: int, epoch: int) -> int:
    """n as a Python int: a NumPy integer would turn the result into a NumPy float, which promotes float32 arrays."""
    return int(epoch if per == "epoch" else step)
