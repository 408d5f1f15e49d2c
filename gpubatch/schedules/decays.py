"""Decays: values that fall, or rise, from a first one to a last one."""

from __future__ import annotations

import math
import warnings
from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from gpubatch.errors import check_int, check_real
from gpubatch.schedules.counted import (
    Count,
    Counted,
    Flag,
    NonNegative,
    OrNone,
    Positive,
    Unit,
    check_boundaries,
    cosine,
    mixed,
)


@dataclass(frozen=True)
class InverseTimeDecay(Counted):
    """lr / (1 + decay_rate * n), as in Keras; ``decay_rate`` is at least 0.

    >>> [round(gb.InverseTimeDecay(0.1, decay_rate=1.0)(0, epoch), 4) for epoch in range(3)]
    [0.1, 0.05, 0.0333]
    """

    lr: NonNegative
    decay_rate: NonNegative
    per: Unit = "epoch"
    every: Count = 1
    staircase: Flag = False

    def _at(self, n: int) -> float:
        return self.lr / (1 + self.decay_rate * (n // self.every if self.staircase else n / self.every))


@dataclass(frozen=True)
class ExponentialDecay(Counted):
    """lr * rate**n; PyTorch's ``ExponentialLR`` with ``per="epoch"``. ``rate`` is above 0; above 1 the value grows.

    >>> [round(gb.ExponentialDecay(0.1, rate=0.5)(0, epoch), 4) for epoch in range(3)]
    [0.1, 0.05, 0.025]
    """

    lr: NonNegative
    rate: Positive = 0.95
    per: Unit = "epoch"
    every: Count = 1
    staircase: Flag = False

    def _at(self, n: int) -> float:
        return self.lr * float(self.rate ** (n // self.every if self.staircase else n / self.every))


@dataclass(frozen=True)
class SqrtDecay(Counted):
    """lr * k / sqrt(n + 1); ``k`` is at least 0. The course notes count from 1: k / sqrt(t).

    >>> [round(gb.SqrtDecay(0.1)(0, epoch), 4) for epoch in range(3)]
    [0.1, 0.0707, 0.0577]
    """

    lr: NonNegative
    k: NonNegative = 1.0
    per: Unit = "epoch"

    def _at(self, n: int) -> float:
        return self.lr * self.k / math.sqrt(n + 1)


@dataclass(frozen=True)
class StepDecay(Counted):
    """lr * factor**(n // every), as PyTorch's ``StepLR``; ``factor`` is above 0.

    >>> [gb.StepDecay(0.1, factor=0.5, every=2)(0, epoch) for epoch in range(4)]
    [0.1, 0.1, 0.05, 0.05]
    """

    lr: NonNegative
    factor: Positive = 0.5
    every: Count = 10
    per: Unit = "epoch"

    def _at(self, n: int) -> float:
        return self.lr * float(self.factor ** (n // self.every))


@dataclass(frozen=True)
class Piecewise(Counted):
    """Constant values: ``values[i]`` for ``boundaries[i-1] <= n < boundaries[i]``.

    PyTorch's ``MultiStepLR`` and optax switch at the same n; Keras' ``PiecewiseConstantDecay`` switches one later.

    boundaries: strictly increasing integers, each at least 0
    values: one more than boundaries, each at least 0

    >>> [gb.Piecewise([2], [0.1, 0.01])(0, epoch) for epoch in range(4)]
    [0.1, 0.1, 0.01, 0.01]
    """

    boundaries: Sequence[int]
    values: Sequence[float]
    per: Unit = "epoch"

    def _check(self) -> None:
        self._put("values", tuple(check_real(f"values[{i}]", value, 0) for i, value in enumerate(self.values)))
        self._put("boundaries", check_boundaries(self.boundaries, 0, "values", len(self.values)))

    def _at(self, n: int) -> float:
        return self.values[bisect_right(self.boundaries, n)]


# --- from a warm-up to an end ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Falling(Counted):
    """A warm-up, ``lr``, and the way to ``final``: see :class:`CosineDecay`."""

    lr: NonNegative
    total: Count
    warmup: int = 0
    final: NonNegative = 0.0
    per: Unit = "epoch"
    first: OrNone = None
    start: int | None = None

    def _check(self) -> None:
        self._put("warmup", check_int("warmup", self.warmup, 0, self.total - 1))
        if self.start is not None:
            self._put("start", check_int("start", self.start, self.warmup, self.total - 1))

    def _at(self, n: int) -> float:
        if n < self.warmup:
            if self.first is None:
                return self.lr * (n + 1) / self.warmup
            return mixed(self.lr, self.first, n / self.warmup)
        start = self.warmup if self.start is None else self.start
        progress = min(max(n - start, 0) / (self.total - start), 1.0)
        return mixed(self.lr, self.final, self._weight(progress))

    @abstractmethod
    def _weight(self, progress: float) -> float:
        """How much of ``lr`` is left: from 1 at progress 0 to 0 at progress 1."""


@dataclass(frozen=True)
class LinearDecay(Falling):
    """A straight line from ``lr`` to ``final``; the arguments are those of :class:`CosineDecay`.

    PyTorch's ``LinearLR(start_factor, end_factor, total_iters)`` is ``LinearDecay(lr * start_factor, total_iters,
    final=lr * end_factor)``.

    >>> [LinearDecay(0.4, total=4)(0, n) for n in (0, 1, 2, 4, 5)]
    [0.4, 0.30000000000000004, 0.2, 0.0, 0.0]
    """

    def _weight(self, progress: float) -> float:
        return 1 - progress


@dataclass(frozen=True)
class PolynomialDecay(Falling):
    """final + (lr - final) * (1 - progress)**power, as in PyTorch, Keras and optax.

    ``power`` is above 0; with 1 it is :class:`LinearDecay`. The other arguments are those of :class:`CosineDecay`.

    >>> PolynomialDecay(0.4, total=4, power=2)(0, 2)
    0.1
    """

    power: Positive = 1.0

    def _weight(self, progress: float) -> float:
        return float((1 - progress) ** self.power)


@dataclass(frozen=True)
class CosineDecay(Falling):
    """Half a cosine from ``lr`` to ``final``, after a linear warm-up (Loshchilov & Hutter, SGDR, equation 5).

    n < warmup: lr * (n + 1) / warmup, so the first value is not zero and n = warmup - 1 already has ``lr``; with
    ``first`` it is first + (lr - first) * n / warmup, as in optax and Keras.
    n = warmup, and up to n = start: ``lr``. Then the cosine, down to ``final`` at n = total and ever after.

    total: the last n of the cosine, warm-up included, at least 1
    warmup: length of the warm-up, from 0 to total - 1
    final: the last value, at least 0; not a fraction of ``lr``; where it is above ``lr`` the value rises
    first: the value at n = 0, where the warm-up begins, at least 0
    start: the n up to which ``lr`` is kept, from warmup, which is the default, to total - 1

    Without ``per`` it counts epochs, as the other schedules do, and warns: it counted steps up to version 0.1.

    >>> [round(CosineDecay(0.4, 6, warmup=2, first=0.1, start=4, per="epoch")(0, n), 3) for n in range(7)]
    [0.1, 0.25, 0.4, 0.4, 0.4, 0.2, 0.0]
    """

    per: Unit = ""

    def __post_init__(self) -> None:
        unsaid = self.per == ""
        if unsaid:
            self._put("per", "epoch")
        Counted.__post_init__(self)
        if unsaid:
            warnings.warn(
                "CosineDecay without per= counts epochs now, as the other schedules do; it counted steps up to version "
                "0.1: write per='epoch' or per='step'",
                FutureWarning,
                stacklevel=3,
            )

    def _weight(self, progress: float) -> float:
        return cosine(progress)
