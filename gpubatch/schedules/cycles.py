"""Cycles: values that go up and down."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Annotated

from gpubatch.errors import ArgumentError, check_choice, check_int, check_real
from gpubatch.schedules.counted import Count, Counted, Flag, NonNegative, OrNone, Positive, Unit, cosine, mixed


@dataclass(frozen=True)
class CosineRestarts(Counted):
    """Half a cosine from ``lr`` to ``final``, again and again (Loshchilov & Hutter 2016, SGDR, arXiv:1608.03983).

    It is equation 5 there, PyTorch's ``CosineAnnealingWarmRestarts`` and Keras' ``CosineDecayRestarts``.

    length: how long the first cosine is, at least 1
    factor: how many times as long as the one before each next one is, an integer of at least 1
    final: the value that a cosine falls to, at least 0
    shrink: what the height of a cosine is multiplied by in the next one, from 0 to 1

    >>> [round(CosineRestarts(0.1, length=2, factor=2)(0, n), 3) for n in range(7)]
    [0.1, 0.05, 0.1, 0.085, 0.05, 0.015, 0.1]
    """

    lr: NonNegative
    length: Count
    factor: Count = 1
    final: NonNegative = 0.0
    shrink: Annotated[float, partial(check_real, low=0, high=1)] = 1.0
    per: Unit = "epoch"

    def _at(self, n: int) -> float:
        restarts, length = 0, self.length
        if self.factor == 1:
            restarts, n = divmod(n, length)
        while n >= length:
            restarts, n, length = restarts + 1, n - length, length * self.factor
        return mixed(mixed(self.lr, self.final, self.shrink**restarts), self.final, cosine(n / length))


@dataclass(frozen=True)
class Cyclic(Counted):
    """From ``lr`` up to ``peak`` and down again, in straight lines (Smith 2015, arXiv:1506.01186).

    PyTorch's ``CyclicLR``. A ``peak`` below ``lr`` makes its cycle of momentum.

    peak: the value at n = up, at least 0
    up: how long it rises, at least 1
    down: how long it falls, at least 1; by default as long as it rises
    mode: what the height of cycle i, from 0, is multiplied by: "triangular" 1, "triangular2" 1 / 2**i, and
        "exp_range" gamma**n
    gamma: of "exp_range", above 0
    per: "step" or "epoch", to be given: the paper counts steps

    >>> [Cyclic(0.0, peak=1.0, up=2, per="step")(n, 0) for n in range(6)]
    [0.0, 0.5, 1.0, 0.5, 0.0, 0.5]
    """

    lr: NonNegative
    peak: NonNegative
    up: Count
    down: int | None = None
    mode: Annotated[str, partial(check_choice, choices=["triangular", "triangular2", "exp_range"])] = "triangular"
    gamma: Positive = 1.0
    per: Unit = ""

    def _check(self) -> None:
        if self.down is not None:
            self._put("down", check_int("down", self.down, 1))

    def _at(self, n: int) -> float:
        down = self.down or self.up
        cycle, place = divmod(n, self.up + down)
        height = place / self.up if place <= self.up else 1 - (place - self.up) / down
        if self.mode == "triangular2":
            height /= 2.0**cycle
        elif self.mode == "exp_range":
            height *= self.gamma**n
        return mixed(self.peak, self.lr, height)


@dataclass(frozen=True)
class OneCycle(Counted):
    """From ``first`` up to ``lr``, and down to ``final``: Smith's one cycle.

    Smith & Topin 2017, arXiv:1708.07120; Smith 2018, arXiv:1803.09820. As PyTorch's ``OneCycleLR`` has it, the rise
    ends at n = rise * total - 1, and the fall at n = total - 1. The momentum that falls and rises meanwhile is
    ``beta1=OneCycle(0.85, total, first=0.95, final=0.95, per="step")``.

    lr: the value between rise and fall
    total: how many steps, or epochs, there are, at least 2
    rise: the part of them in which it rises, above 1 / total and below 1; below 1/2 with ``three_phase``
    first: the first value, by default lr / 25
    final: the last value, by default first / 10,000
    anneal: the form of rise and fall, "cosine" or "linear"
    three_phase: fall to ``first`` in as long as it rose, and then to ``final``
    per: "step" or "epoch", to be given: the papers count steps

    >>> cycle = OneCycle(1.0, total=11, rise=6 / 11, final=0.0, anneal="linear", per="step")
    >>> [round(cycle(n, 0), 3) for n in (0, 5, 8, 10)]
    [0.04, 1.0, 0.4, 0.0]
    """

    lr: NonNegative
    total: Annotated[int, partial(check_int, low=2)]
    rise: Annotated[float, partial(check_real, low=0, high=1, open_low=True, open_high=True)] = 0.3
    first: OrNone = None
    final: OrNone = None
    anneal: Annotated[str, partial(check_choice, choices=["cosine", "linear"])] = "cosine"
    three_phase: Flag = False
    per: Unit = ""

    def _check(self) -> None:
        high = 1 / 2 if self.three_phase else 1
        if not 1 < self.rise * self.total < high * self.total:
            raise ArgumentError(
                f"rise must be above 1 / total = {1 / self.total:.3g} and below {high:g} here, got {self.rise}"
            )

    def _at(self, n: int) -> float:
        first = self.lr / 25 if self.first is None else self.first
        final = first / 1e4 if self.final is None else self.final
        top, end = self.rise * self.total - 1, float(self.total - 1)
        if n <= top:
            start, begin, stop, finish = first, 0.0, self.lr, top
        elif not self.three_phase:
            start, begin, stop, finish = self.lr, top, final, end
        elif n <= 2 * top:
            start, begin, stop, finish = self.lr, top, first, 2 * top
        else:
            start, begin, stop, finish = first, 2 * top, final, end
        progress = min((n - begin) / (finish - begin), 1.0)
        return mixed(start, stop, cosine(progress) if self.anneal == "cosine" else 1 - progress)
