"""Numerical gradients by finite differences, and the check of analytic gradients against them."""

from __future__ import annotations

import contextlib
import math
import numbers
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from gpubatch.backend import Array, Backend, backend_of, describe, float_dtype
from gpubatch.errors import (
    ArgumentError,
    DTypeError,
    NonFiniteError,
    ShapeError,
    check_bool,
    check_choice,
    check_int,
    check_real,
)
from gpubatch.explore.shared import Progress, check_net, counted, kept_as_it_is
from gpubatch.nn import Network

Index: TypeAlias = tuple[int, ...]
STEPS = {"float32": 1e-2, "float64": 1e-5}  # h: near the cube root of eps, where rounding and truncation balance
TOLERANCES = {"float32": 1e-2, "float64": 1e-7}
ROUNDING = 16  # roundings of f's own size that one evaluation of f may be off by
RATIOS = (1.0, 1 / 3, 1 / 10)  # of h: the steps to compare if one is not enough
STACK_BYTES = 1 << 26  # of points that numerical_gradient hands to a vectorized f at a time


def numerical_gradient(
    f: Callable[[Array], Any],
    x: Array,
    h: float | None = None,
    method: str = "central",
    vectorized: bool = False,
) -> Array:
    """The gradient of ``f`` at ``x`` by differences: an array of x's shape and dtype.

    f: a function of an array that returns one real number
    x: an array of float32 or float64
    h: the step; by default 1e-5, and 1e-2 in float32, whose rounding allows no smaller one
    method: "central", (f(x+h) - f(x-h)) / 2h, or "forward", (f(x+h) - f(x)) / h
    vectorized: f takes many points at a time, ``(points, *x.shape)``, and returns ``(points,)``

    x is changed in place while f is called, so f may also read an array of which x is a view; afterwards, and if f
    raises, x is as before. With ``vectorized`` it is not touched. The difference is divided by the step that was really
    taken, after rounding. A step that rounding swallows is an error.

    >>> numerical_gradient(lambda x: (x**2).sum(), np.array([1.0, -3.0])).round(6).tolist()
    [2.0, -6.0]
    """
    backend, dtype = _check_point(f, x, writable=not check_bool("vectorized", vectorized))
    h = check_real("h", STEPS[dtype.name] if h is None else h, 0, open_low=True)
    central = check_choice("method", method, ["central", "forward"]) == "central"
    start = backend.to_numpy(x).astype(np.float64)
    up = _moved(start, h, dtype)
    down = _moved(start, -h, dtype) if central else start
    with backend.scope():
        if vectorized:
            above = _stacked_values(f, x, up, backend)
            below = _stacked_values(f, x, down, backend) if central else backend.to_numpy(_stack_of(f, x[None], 1))
            return backend.asarray((above - below) / (up - down), dtype).reshape(x.shape)
        result = np.empty(x.shape, np.float64)
        middle = 0.0 if central else _value(f, x, "x")
        for index in np.ndindex(x.shape):
            with _restoring(x, index, start[index]):
                value = _value_at(f, x, index, float(up[index]))
                result[index] = value - (_value_at(f, x, index, float(down[index])) if central else middle)
        return backend.asarray(result / (up - down), dtype)


def _check_point(f: Any, x: Any, writable: bool) -> tuple[Backend, np.dtype[Any]]:
    if not callable(f):
        raise DTypeError(f"f must be callable, got {f!r}")
    backend = backend_of(x)
    dtype = float_dtype(x.dtype, "x")
    if writable and not getattr(x.flags, "writeable", True):
        raise ArgumentError("x is read-only: it is changed in place while f is called, give it a copy")
    return backend, dtype


def _moved(start: np.ndarray, step: float, dtype: np.dtype[Any]) -> np.ndarray:
    """``start`` with every element moved by ``step`` and rounded to ``dtype``, as float64."""
    moved = (start + step).astype(dtype).astype(np.float64)
    if (stuck := moved == start).any():
        index = tuple(int(i) for i in np.argwhere(stuck)[0])
        raise ArgumentError(f"h={abs(step):g} is lost in x{list(index)} = {start[index]:g} of {dtype}: take a larger h")
    return moved


@contextlib.contextmanager
def _restoring(x: Array, index: Any, value: Any) -> Iterator[None]:
    try:
        yield
    finally:
        x[index] = value


def _value_at(f: Callable[[Array], Any], x: Array, index: Index, value: float) -> float:
    x[index] = value
    return _value(f, x, f"x with x{list(index)} = {value!r}")


def _value(f: Callable[[Array], Any], x: Array, where: str) -> float:
    """f(x) as a Python float: the number, or the only element of an array."""
    found = f(x)
    if getattr(found, "size", None) == 1 and hasattr(found, "item"):
        found = found.item()
    if isinstance(found, bool) or not isinstance(found, numbers.Real):
        words = describe(found) if hasattr(found, "shape") else f"{found!r} of type {type(found).__name__}"
        raise DTypeError(f"f must return one real number, got {words}")
    if not math.isfinite(found):
        raise NonFiniteError(f"f is {float(found)} at {where}")
    return float(found)


def _stacked_values(f: Callable[[Array], Any], x: Array, moved: np.ndarray, backend: Backend) -> np.ndarray:
    """f at x with one element moved, for each element; in stacks of at most STACK_BYTES."""
    values = backend.asarray(moved.reshape(-1), x.dtype)
    results = np.empty(x.shape, np.float64)
    most = max(1, STACK_BYTES // max(x.nbytes, 1))
    for begin in range(0, x.size, most):
        count = min(most, x.size - begin)
        points = backend.empty((count, *x.shape), x.dtype)
        points[...] = x
        rows = backend.asarray(np.arange(count))
        points.reshape(count, -1)[rows, rows + begin] = values[begin : begin + count]
        results.reshape(-1)[begin : begin + count] = backend.to_numpy(_stack_of(f, points, count))
    return results


def _stack_of(f: Callable[[Array], Any], points: Array, count: int) -> Any:
    found = f(points)
    if getattr(found, "shape", None) != (count,):
        words = describe(found) if hasattr(found, "shape") else repr(found)
        raise ShapeError(f"f must return shape ({count},) for {count} points with vectorized=True, got {words}")
    return found


# --- gradient check --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kink:
    """An element where the slope jumps: the given gradient, and the one-sided differences on both sides."""

    index: Index
    analytic: float
    left: float
    right: float


@dataclass(frozen=True)
class GradientCheck:
    """Whether a gradient is right: ``ok`` if no relative error is above ``tolerance``.

    ``worst_index`` has the largest error; there the gradient that was given is ``analytic`` and the one by differences
    ``numerical``. With directions it is the direction's number; None where nothing was compared but kinks.
    ``kinks`` are elements that cannot be compared, as the slope jumps there. ``compared`` is how many could.

    >>> x = np.array([0.5, -1.0])
    >>> gb.gradient_check(lambda x: (x**2).sum(), x, 2 * x).ok
    True
    """

    max_relative_error: float
    worst_index: Index | None
    ok: bool
    tolerance: float
    floor: float
    analytic: float
    numerical: float
    compared: int
    kinks: tuple[Kink, ...]

    def __str__(self) -> str:
        at_kinks = f", {len(self.kinks)} at kinks" if self.kinks else ""
        if self.worst_index is None:
            return f"nothing was compared{at_kinks}"
        place = f"{self.worst_index}: {self.analytic:.6g}, numerically {self.numerical:.6g}"
        error = f"relative error {self.max_relative_error:.2g}, tolerance {self.tolerance:.2g}"
        return f"{'right, worst' if self.ok else 'wrong'} at {place}; {error}, {self.compared} compared{at_kinks}"


@dataclass(frozen=True)
class Probe:
    """A line through x: its name, the derivative claimed along it, and f at a signed step with the step that it was."""

    index: Index
    analytic: float
    at: Callable[[float], tuple[float, float]]


def gradient_check(
    f: Callable[[Array], Any],
    x: Array,
    grad: Array,
    h: float | None = None,
    tolerance: float | None = None,
    directions: int = 0,
    elements: int | None = None,
    seed: int = 0,
    floor: float | None = None,
) -> GradientCheck:
    """Compare ``grad`` with central differences of ``f`` at ``x``, which is left as it was.

    The relative error of an element is |a - n| / max(|a|, |n|, floor) (CS231n, "Gradient checks"). ``h`` is 1e-5 and
    ``tolerance`` 1e-7, in float32 both are 1e-2. ``floor`` is by default the least gradient that can be measured to
    the tolerance, since f is rounded: 16 eps |f(x)| / (h tolerance). Give a smaller one, or 0, to see plain ratios.
    Where the error is above the tolerance, smaller steps tell what h itself is to blame for.

    ``elements`` compares so many at random instead of all. ``directions=k`` compares the derivatives along k random
    directions of ±1 instead, at two evaluations of f each, however many elements x has. ``seed`` decides both.

    Where x is on a kink, or closer to one than h, the one-sided differences disagree, and by more than curvature
    explains, which falls with h. If ``grad`` is one of these slopes or between them, the element is reported in
    ``kinks`` and does not fail.

    >>> x = np.array([0.5, -1.0, 2.0])
    >>> gb.gradient_check(lambda x: (x**2).sum(), x, 2 * x).ok
    True
    """
    backend, dtype = _check_point(f, x, writable=True)
    backend_of(x, grad)
    if grad.shape != x.shape:
        raise ShapeError(f"grad must have the shape of x, {x.shape}, got {grad.shape}")
    if grad.dtype.kind != "f":
        raise DTypeError(f"grad must hold floating-point numbers, got {describe(grad)}")
    h = check_real("h", STEPS[dtype.name] if h is None else h, 0, open_low=True)
    tolerance = check_real("tolerance", TOLERANCES[dtype.name] if tolerance is None else tolerance, 0, open_low=True)
    directions = check_int("directions", directions, 0)
    claimed = backend.to_numpy(grad).astype(np.float64)
    if not np.isfinite(claimed).all():
        index = tuple(int(i) for i in np.argwhere(~np.isfinite(claimed))[0])
        raise NonFiniteError(f"grad{list(index)} is {claimed[index]}")
    draw = np.random.default_rng(check_int("seed", seed, 0))
    with backend.scope(), _restoring(x, ..., x.copy()):
        if directions:
            probes = _directions(f, x, claimed, directions, draw, backend)
        else:
            start = backend.to_numpy(x).astype(np.float64)
            _moved(start, h, dtype)
            probes = _elements(f, x, start, claimed, _chosen(x, elements, draw), dtype)
        middle = _value(f, x, "x")
        noise = ROUNDING * float(np.finfo(dtype).eps) * abs(middle) / h
        floor = noise / tolerance if floor is None else check_real("floor", floor, 0)
        return _compare(probes, middle, h, tolerance, noise, floor)


def _chosen(x: Array, elements: int | None, draw: np.random.Generator) -> Iterator[Index]:
    if elements is None or check_int("elements", elements, 1) >= x.size:
        return iter(np.ndindex(x.shape))
    flat = np.sort(draw.choice(x.size, elements, replace=False))
    return (tuple(int(i) for i in np.unravel_index(k, x.shape)) for k in flat)


def _elements(
    f: Callable[[Array], Any],
    x: Array,
    start: np.ndarray,
    claimed: np.ndarray,
    chosen: Iterator[Index],
    dtype: np.dtype[Any],
) -> Iterator[Probe]:
    for index in chosen:
        old = float(start[index])

        def at(step: float, index: Index = index, old: float = old) -> tuple[float, float]:
            value = float(dtype.type(old + step))
            with _restoring(x, index, old):
                return _value_at(f, x, index, value), value - old

        yield Probe(index, float(claimed[index]), at)


def _directions(
    f: Callable[[Array], Any], x: Array, claimed: np.ndarray, count: int, draw: np.random.Generator, backend: Backend
) -> Iterator[Probe]:
    """Probes along random directions of ±1: every element moves by the whole step, well above the rounding of f."""
    start = x.copy()
    for k in range(count):
        signs = draw.integers(0, 2, x.shape) * 2.0 - 1
        direction = backend.asarray(signs, x.dtype)

        def at(step: float, direction: Array = direction, k: int = k) -> tuple[float, float]:
            with _restoring(x, ..., start):
                x[...] = start + step * direction
                return _value(f, x, f"x + {step:g} times direction {k}"), step

        yield Probe((k,), float((claimed * signs).sum()), at)


def _compare(
    probes: Iterator[Probe], middle: float, h: float, tolerance: float, noise: float, floor: float
) -> GradientCheck:
    worst, worst_index, analytic, numerical = 0.0, None, math.nan, math.nan
    compared, kinks = 0, []
    for probe in probes:
        slopes = [_differences(probe, middle, h).central]
        error = _relative_error(probe.analytic, slopes[0], floor)
        if error > tolerance:
            near = [_differences(probe, middle, ratio * h) for ratio in RATIOS]
            slopes += _extrapolated([d.central for d in near])
            error = min(_relative_error(probe.analytic, slope, floor) for slope in slopes)
            if error > tolerance and (kink := _kink(probe, near, noise)):
                kinks.append(kink)
                continue
        compared += 1
        if error > worst or worst_index is None:
            slope = min(slopes, key=lambda n: abs(n - probe.analytic))
            worst, worst_index, analytic, numerical = error, probe.index, probe.analytic, slope
    ok = worst <= tolerance
    return GradientCheck(worst, worst_index, ok, tolerance, floor, analytic, numerical, compared, tuple(kinks))


class Differences(NamedTuple):
    """Slopes from x down, from x up, and across x."""

    left: float
    right: float
    central: float


def _differences(probe: Probe, middle: float, step: float) -> Differences:
    (above, up), (below, down) = probe.at(step), probe.at(-step)
    return Differences((below - middle) / down, (above - middle) / up, (above - below) / (up - down))


def _relative_error(a: float, n: float, floor: float) -> float:
    return abs(a - n) / max(abs(a), abs(n), floor) if a != n else 0.0


def _extrapolated(slopes: list[float]) -> list[float]:
    """Central differences at the steps of RATIOS taken to step 0, in powers of the step squared: by two, by all three.

    This is for a function that bends so much within h that the error of the difference itself shows (Richardson 1911).
    """
    x0, x1, x2 = (ratio**2 for ratio in RATIOS)
    n0, n1, n2 = slopes
    n01, n12 = n1 + (n1 - n0) * x1 / (x0 - x1), n2 + (n2 - n1) * x2 / (x1 - x2)
    return [n01, n12 + (n12 - n01) * x2 / (x0 - x2)]


def _kink(probe: Probe, near: list[Differences], noise: float) -> Kink | None:
    """The kink that explains why the derivative along a probe is not the central difference, if there is one.

    The gap between the one-sided differences of a smooth function is in proportion to the step; at a kink it stays,
    and beside one it vanishes. Two smaller steps, since a kink at an unlucky place looks smooth to one of them.
    """
    gaps = [d.right - d.left for d in near]
    smooth = all(
        abs(gap - ratio * gaps[0]) <= 0.05 * abs(gaps[0]) + 4 * noise / ratio
        for gap, ratio in zip(gaps, RATIOS, strict=True)
    )
    slopes = [slope for d in near for slope in (d.left, d.right)]
    slopes += [_limit([d.left for d in near], noise), _limit([d.right for d in near], noise)]
    if smooth or not min(slopes) - 10 * noise <= probe.analytic <= max(slopes) + 10 * noise:
        return None
    return Kink(probe.index, probe.analytic, near[0].left, near[0].right)


def _limit(sides: list[float], noise: float) -> float:
    """One-sided differences at the steps of RATIOS taken to step 0: in proportion, unless a kink lies on that side."""
    x0, x1, x2 = RATIOS
    s0, s1, s2 = sides
    bent = abs((s1 - s2) - (s0 - s2) * (x1 - x2) / (x0 - x2)) > 0.05 * abs(s0 - s2) + 2 * noise / x2
    return s2 if bent else s2 + (s2 - s0) * x2 / (x0 - x2)


def check_network(
    net: Network,
    X: Array,
    Y: Array,
    h: float | None = None,
    tolerance: float | None = None,
    directions: int = 0,
    elements: int | None = None,
    seed: int = 0,
    floor: float | None = None,
    progress: Progress | None = None,
) -> dict[str, GradientCheck]:
    """:func:`gradient_check` of every parameter of ``net``, by name, on one training batch.

    Batch statistics and the dropout mask are those of the step to come, the same in every evaluation. float32 has room
    for the coarsest errors only; make the network with dtype="float64".
    """
    check_net(net)
    with kept_as_it_is(net):
        _, grads = net.loss_and_grad(X, Y)
        claimed = {name: grad.copy() for name, grad in grads.items()}
    results = {}
    for name, p in counted(list(net.parameters.items()), progress):
        results[name] = gradient_check(
            lambda _: net.loss(X, Y, training=True), p, claimed[name], h, tolerance, directions, elements, seed, floor
        )
    return results
