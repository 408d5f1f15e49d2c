"""Look into training: check gradients, search without them, see the loss, find the step size and the batch size.

What is given is left as it was: parameters, running statistics and the dropout step of a network are the same after a
call as before it. Only the two random searches, which are asked for better parameters, leave these in the network.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import numbers
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from gpubatch import losses
from gpubatch.averages import ewma
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
from gpubatch.layers import BatchNorm, Context, Dense, Mode
from gpubatch.loader import Loader
from gpubatch.network import Network, parameter_names
from gpubatch.ops import workspace_dtype
from gpubatch.optim import SGD, Adam, Momentum, Optimizer, RMSProp
from gpubatch.params import FlatViews, Parameters
from gpubatch.train import History, StopTraining, TrainingState, fit

__all__ = [
    "BatchSizeTrial",
    "GradientCheck",
    "Kink",
    "LossSlice",
    "OptimizerTrial",
    "RangeTest",
    "SearchResult",
    "StepSizeSweep",
    "StrategyResult",
    "batch_size_sweep",
    "check_network",
    "compare_strategies",
    "gradient_check",
    "learning_rate_range_test",
    "loss_slice",
    "numerical_gradient",
    "optimizer_sweep",
    "principal_directions",
    "random_local_search",
    "random_search",
    "step_size_sweep",
]

Index: TypeAlias = tuple[int, ...]
Progress: TypeAlias = Callable[[int, int], Any]  # called with what is done and how much there is in all
MakeOptimizer: TypeAlias = Callable[[Parameters, float], Optimizer]

STEPS = {"float32": 1e-2, "float64": 1e-5}  # h: near the cube root of eps, where rounding and truncation balance
TOLERANCES = {"float32": 1e-2, "float64": 1e-7}
ROUNDING = 16  # roundings of f's own size that one evaluation of f may be off by
RATIOS = (1.0, 1 / 3, 1 / 10)  # of h, the steps that are looked at where one is not enough
STACK_BYTES = 1 << 26  # of points that numerical_gradient hands to a vectorized f at a time
# Samples, and activations of a layer, that a loss slice takes at a time. CPU: measured on two cores with 2 MiB of cache
# each, 784-256-10 and 2,000 samples; half or twice as much is up to 40 % slower. A GPU wants few, large launches.
SLICE_ROWS = {"cpu": 256, "cuda": 8192}
SLICE_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 26}


# --- numerical gradients ---------------------------------------------------------------------------------------------


def numerical_gradient(
    f: Callable[[Array], Any],
    x: Array,
    h: float | None = None,
    method: str = "central",
    vectorized: bool = False,
) -> Array:
    """The gradient of ``f`` at ``x`` by differences: an array of x's shape and dtype.

    "central" is (f(x+h) - f(x-h)) / 2h and "forward" (f(x+h) - f(x)) / h, for each element; f takes an array and
    returns one real number. x, float32 or float64, is changed in place while f is called, so f may also look at an
    array of which x is a view; afterwards, and if f raises, it is as before. ``h`` is 1e-5, in float32 1e-2, where
    rounding leaves no more; what is divided by is the step that was really taken, after rounding. A step that rounding
    swallows is an error.

    With ``vectorized=True`` f takes many points at a time, ``(points, *x.shape)``, and returns ``(points,)``; x itself
    is then not touched.

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
    """Every element moved by ``step`` and rounded to ``dtype``, in double precision."""
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
    """f at the points at which one element of x after the other is moved, so many at a time as memory allows."""
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
    """Where a slope jumps: the gradient that was given there, and the slopes by one-sided differences."""

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
    """
    backend, dtype = _check_point(f, x, writable=True)
    backend_of(x, grad)
    if grad.shape != x.shape:
        raise ShapeError(f"grad must have the shape of x, {x.shape}, got {grad.shape}")
    if grad.dtype.kind != "f":
        raise DTypeError(f"grad must hold floating-point numbers, got {describe(grad)}")
    h = check_real("h", STEPS[dtype.name] if h is None else h, 0, open_low=True)
    tolerance = check_real("tolerance", TOLERANCES[dtype.name] if tolerance is None else tolerance, 0, open_low=True)
    check_int("directions", directions, 0)
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
    """Every element moves by the whole step, so that the change of f stands out of its rounding."""
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
    _check_net(net)
    with _kept(net):
        _, grads = net.loss_and_grad(X, Y)
        claimed = {name: grad.copy() for name, grad in grads.items()}
    results = {}
    for done, (name, p) in enumerate(net.parameters.items()):
        _report(progress, done, len(net.parameters))
        results[name] = gradient_check(
            lambda _: net.loss(X, Y, training=True), p, claimed[name], h, tolerance, directions, elements, seed, floor
        )
    _report(progress, len(net.parameters), len(net.parameters))
    return results


# --- search without a gradient ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SearchResult:
    """The best that a search found, which the network now holds, and the best loss after each trial.

    ``accuracy`` is None where the loss has no classes.
    """

    loss: float
    accuracy: float | None
    history: tuple[float, ...]


def random_search(
    net: Network,
    X: Array,
    Y: Array,
    trials: int = 1000,
    scale: float = 0.01,
    seed: int = 0,
    progress: Progress | None = None,
) -> SearchResult:
    """Try ``trials`` times parameters drawn from N(0, scale²), and load the best into ``net`` (CS231n, "Strategy #1").

    The same seed draws the same parameters on every backend. The loss is that of :meth:`Network.loss`, in evaluation.
    """
    return _search(net, X, Y, trials, scale, seed, False, progress)


def random_local_search(
    net: Network,
    X: Array,
    Y: Array,
    trials: int = 1000,
    scale: float = 0.01,
    seed: int = 0,
    progress: Progress | None = None,
) -> SearchResult:
    """Start from the parameters of ``net``, and take a step drawn from N(0, scale²) if it lowers the loss, else not.

    ``trials`` steps are tried; the best parameters are in ``net`` at the end (CS231n, "Strategy #2").
    """
    return _search(net, X, Y, trials, scale, seed, True, progress)


def _search(
    net: Network, X: Array, Y: Array, trials: int, scale: float, seed: int, local: bool, progress: Progress | None
) -> SearchResult:
    _check_net(net)
    check_int("trials", trials, 1)
    check_real("scale", scale, 0, open_low=True)
    draw = np.random.default_rng(check_int("seed", seed, 0))
    flat, backend = net.parameters.flat, net.backend
    start = net.loss(X, Y)  # finds what is wrong with X and Y before anything is changed
    best, history = start if local else math.inf, []
    with backend.scope(), np.errstate(over="ignore"):
        best_flat = flat.copy()
        try:
            for trial in range(trials):
                _report(progress, trial, trials)
                candidate = backend.asarray(draw.standard_normal(flat.size) * scale, net.dtype)
                flat[...] = best_flat + candidate if local else candidate
                loss = _loss_or_inf(net, X, Y)
                if loss < best:
                    best = loss
                    best_flat[...] = flat
                history.append(best)
        finally:
            flat[...] = best_flat
    _report(progress, trials, trials)
    if not math.isfinite(best):
        raise NonFiniteError(f"no trial of {trials} had a finite loss with scale={scale:g}: take a smaller one")
    loss, accuracy = net.evaluate(X, Y)
    return SearchResult(loss, accuracy, tuple(history))


# --- slices of the loss ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class LossSlice:
    """L(W + a W1), or L(W + a W1 + b W2): ``losses`` is ``(len(a),)`` or ``(len(a), len(b))``, inf where it overflows.

    ``directions`` are W1 and W2 as flat NumPy arrays in the order of ``net.parameters.flat``.
    """

    a: np.ndarray
    b: np.ndarray | None
    losses: np.ndarray
    directions: tuple[np.ndarray, ...]

    def project(self, flat: Any, center: Any) -> np.ndarray:
        """The coordinates in the slice of parameters, rows of ``flat``, seen from ``center``, by least squares.

        NumPy arrays: ``(points, size)`` and ``(size,)`` give ``(points, 1 or 2)``.
        """
        offsets = np.atleast_2d(np.asarray(flat, np.float64)) - np.asarray(center, np.float64)
        basis = np.stack(self.directions, axis=1).astype(np.float64)
        return np.linalg.lstsq(basis, offsets.T, rcond=None)[0].T


def loss_slice(
    net: Network,
    X: Array,
    Y: Array,
    a: Any = None,
    b: Any = None,
    directions: Any = None,
    normalize: str = "none",
    seed: int = 0,
    progress: Progress | None = None,
) -> LossSlice:
    """The loss around the parameters W of ``net``, in evaluation: along ``a``, or over the grid of ``a`` and ``b``.

    ``a`` and ``b`` are sequences of numbers, ``a`` by default 51 from -1 to 1; with ``b`` the slice has two dimensions.
    ``directions`` is one or two directions, each a mapping with the names and shapes of ``net.parameters`` or a flat
    array of ``net.parameters.size``; by default they are drawn from N(0, 1) by ``seed``. ``normalize="filter"`` scales
    the weights into each unit to the norm of W's and leaves one-dimensional parameters alone (Li et al. 2018,
    arXiv:1712.09913, section 4).

    Many points are evaluated at a time. The first layer with parameters is linear in these, so it runs once for each
    direction, not once for each point. The parameters of ``net`` are not touched.
    """
    _check_net(net)
    check_choice("normalize", normalize, ["none", "filter"])
    grid_a = _grid("a", np.linspace(-1, 1, 51) if a is None else a)
    grid_b = None if b is None else _grid("b", b)
    count = 1 if grid_b is None else 2
    drawn = _slice_directions(net, directions, count, check_int("seed", seed, 0))
    if normalize == "filter":
        drawn = [_filter_normalized(net, d) for d in drawn]
    net.loss(X, Y)  # finds what is wrong with X and Y
    shape = (len(grid_a),) if grid_b is None else (len(grid_a), len(grid_b))
    axes = np.meshgrid(grid_a, *(() if grid_b is None else (grid_b,)), indexing="ij")
    points = np.stack([np.ones(shape), *axes], axis=-1).reshape(-1, count + 1)  # of W, W1 and W2
    with net.backend.scope(), np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        values = _data_losses(net, X, Y, drawn, points, progress) + _penalties(net, drawn, points)
    values = np.where(np.isnan(values), np.inf, values).reshape(shape)
    return LossSlice(grid_a, grid_b, values, tuple(drawn))


def _grid(name: str, values: Any) -> np.ndarray:
    grid = np.asarray(values)
    if grid.dtype.kind not in "iuf":
        raise DTypeError(f"{name} must hold real numbers, got dtype {grid.dtype}")
    if grid.ndim != 1 or grid.size == 0:
        raise ShapeError(f"{name} must be a sequence of at least one number, got shape {grid.shape}")
    if not np.isfinite(grid).all():
        raise ArgumentError(f"{name} must hold finite numbers, got {grid[~np.isfinite(grid)][0]}")
    return grid.astype(np.float64)


def _slice_directions(net: Network, given: Any, count: int, seed: int) -> list[np.ndarray]:
    if given is None:
        draw = np.random.default_rng(seed)
        return [draw.standard_normal(net.parameters.size) for _ in range(count)]
    given = [given] if isinstance(given, Mapping) or getattr(given, "ndim", None) == 1 else list(given)
    if len(given) != count:
        needs = "a alone needs one direction" if count == 1 else "a and b need two directions"
        raise ArgumentError(f"directions must fit the slice: {needs}, got {len(given)}")
    return [_direction(net, f"directions[{k}]", d) for k, d in enumerate(given)]


def _direction(net: Network, name: str, given: Any) -> np.ndarray:
    shapes = net.parameters.shapes
    if isinstance(given, Mapping):
        if set(given) != set(shapes):
            raise ArgumentError(f"{name} must have {', '.join(shapes)}; got {', '.join(map(str, given)) or 'nothing'}")
        parts = {key: net.backend.to_numpy(given[key]) for key in shapes}
        for key, part in parts.items():
            if part.shape != shapes[key]:
                raise ShapeError(f"{name}[{key!r}] has shape {part.shape}, the parameter has {shapes[key]}")
        flat = np.concatenate([part.reshape(-1) for part in parts.values()])
    else:
        flat = net.backend.to_numpy(given)
        if flat.shape != (net.parameters.size,):
            raise ShapeError(f"{name} must have shape ({net.parameters.size},), all parameters, got {flat.shape}")
    if flat.dtype.kind not in "iuf":
        raise DTypeError(f"{name} must hold real numbers, got dtype {flat.dtype}")
    if not np.isfinite(flat).all():
        raise ArgumentError(f"{name} must hold finite numbers, got {flat[~np.isfinite(flat)][0]}")
    return flat.astype(np.float64)


def _filter_normalized(net: Network, direction: np.ndarray) -> np.ndarray:
    shapes = net.parameters.shapes
    result = FlatViews(direction.copy(), shapes)
    w = FlatViews(net.backend.to_numpy(net.parameters.flat).astype(np.float64), shapes)
    for name, d in result.items():
        if d.ndim < 2:
            d.fill(0)
            continue
        inputs = tuple(range(d.ndim - 1))  # the last axis counts the units, as in x W
        norms = np.sqrt((d**2).sum(axis=inputs))
        d *= np.sqrt((w[name] ** 2).sum(axis=inputs)) / np.where(norms > 0, norms, 1)
    return np.asarray(result.flat)


def _penalties(net: Network, directions: list[np.ndarray], points: np.ndarray) -> np.ndarray:
    """The l2 term at every point, a polynomial of second degree: |W + a W1 + b W2|² of the weights."""
    if not net.l2:
        return np.zeros(len(points))
    names = parameter_names(net.layers, net.needs)
    counted = {names[i][k] for i, needs in enumerate(net.needs) for k, p in needs.parameters.items() if p.l2}
    mask = np.concatenate([np.full(math.prod(s), name in counted) for name, s in net.parameters.shapes.items()])
    vectors = np.stack([net.backend.to_numpy(net.parameters.flat).astype(np.float64), *directions])[:, mask]
    return np.asarray(net.l2 / 2 * np.einsum("pi,ij,pj->p", points, vectors @ vectors.T, points))


def _data_losses(
    net: Network, X: Array, Y: Array, directions: list[np.ndarray], points: np.ndarray, progress: Progress | None
) -> np.ndarray:
    """The mean loss at every point, without the l2 term."""
    basis = net.backend.empty((points.shape[1], net.parameters.size), net.dtype)
    for row, values in zip(basis, (net.parameters.flat, *directions), strict=True):
        row[...] = net.backend.asarray(values, net.dtype)
    sums = np.zeros(len(points))
    most = SLICE_ROWS[net.backend.name]
    starts = range(0, len(X), most)
    for block, start in enumerate(starts):
        rows = slice(start, min(start + most, len(X)))
        side = _SideBySide(net, X[rows], Y[rows], basis, len(points))
        for begin in range(0, len(points), side.points):
            _report(progress, block * len(points) + begin, len(starts) * len(points))
            some = slice(begin, begin + side.points)
            sums[some] += side.evaluate(points[some]) * (rows.stop - rows.start)
    _report(progress, len(starts) * len(points), len(starts) * len(points))
    return sums / len(X)


class _SideBySide:
    """Evaluation of a network at several points at a time, all on the same rows of X.

    A point has one coordinate for each row of ``basis``, ``(coordinates, parameters)``. Activations are
    ``(points, rows, features)``: to a layer without parameters that is one batch of points * rows, since in evaluation
    every row counts for itself.
    """

    def __init__(self, net: Network, X: Array, Y: Array, basis: Array, most: int) -> None:
        self.net, self.X, self.Y, self.rows = net, X, Y, len(X)
        self.xp, self.mode = net.backend.xp, Mode(net.seed)
        self.points = min(most, max(1, SLICE_ELEMENTS[net.backend.name] // (self.rows * max(net.widths))))
        self.names = parameter_names(net.layers, net.needs)
        self.outputs = [self._empty((self.points * self.rows, width)) for width in net.widths[1:]]
        self.works = [self._work({**n.kept, **n.scratch, **n.plain}, self.points * self.rows) for n in net.needs]
        self.loss = net.loss_object
        work = self._work(self.loss.workspace(net.outputs), self.rows)
        work["offsets"] = net.backend.asarray(np.arange(self.rows) * net.outputs)
        work["ticket"] = net.backend.zeros(1, np.uint32)
        self.context = losses.LossContext(net.backend, self.xp, net.ops, work, False)

        # Dense and BatchNorm are linear in their parameters; of one's own layers nobody knows.
        head = next(i for i, needs in enumerate(net.needs) if needs.parameters)
        self.begin = head + 1 if type(net.layers[head]) in (Dense, BatchNorm) else 0
        self.first = self._head_outputs(basis) if self.begin else None

        # The parameters at each point, without those of such a first layer.
        shapes = net.parameters.shapes
        known = [self.names[head][name] for name in net.needs[head].parameters] if self.begin else []
        for name in known:
            del shapes[name]
        columns = [slice(*net.parameters.spans[name]) for name in shapes]
        self.basis = self._empty((len(basis), sum(map(math.prod, shapes.values()))))
        self.xp.concatenate([basis[:, :0], *(basis[:, part] for part in columns)], axis=1, out=self.basis)
        self.stack = self._empty((self.points, self.basis.shape[1]))
        self.views = [FlatViews(flat, shapes) for flat in self.stack]
        ends = itertools.accumulate(math.prod(shape) for shape in shapes.values())
        self.stacked = {
            name: self.stack[:, end - math.prod(shape) : end].reshape(self.points, *shape)
            for (name, shape), end in zip(shapes.items(), ends, strict=True)
        }

    def _empty(self, shape: tuple[int, ...], dtype: Any = None) -> Array:
        return self.net.backend.empty(shape, workspace_dtype(dtype, self.net.dtype))

    def _work(self, spaces: Mapping[str, tuple[tuple[int, ...], Any]], rows: int) -> dict[str, Array]:
        return {
            name: self._empty(tuple(rows if n == -1 else n for n in shape), dtype)
            for name, (shape, dtype) in spaces.items()
        }

    def _head_outputs(self, basis: Array) -> Array:
        """What the first layer with parameters gives for each row of the basis, ``(coordinates, rows * features)``."""
        result = self._empty((len(basis), self.rows * self.net.widths[self.begin]))
        for flat, output in zip(basis, result, strict=True):
            views, x = FlatViews(flat, self.net.parameters.shapes), self.X
            for i in range(self.begin):
                y = self._empty((self.rows, self.net.widths[i + 1]))
                self._run(i, x, y, views)
                x = y
            output[...] = x.reshape(-1)
        return result

    def evaluate(self, points: np.ndarray) -> np.ndarray:
        """The mean losses at ``points``, ``(points, coordinates)``."""
        n = len(points)
        coordinates = self.net.backend.asarray(points, self.net.dtype)
        self.xp.matmul(coordinates, self.basis, out=self.stack[:n])
        x = None
        if self.first is not None:
            x = self.outputs[self.begin - 1][: n * self.rows]
            self.xp.matmul(coordinates, self.first, out=x.reshape(n, -1))
        for i in range(self.begin, len(self.net.layers)):
            y = x if x is not None and self.net.needs[i].in_place else self.outputs[i][: n * self.rows]
            self._layer(i, x, y, n)
            x = y
        scores = x.reshape(n, self.rows, -1)  # type: ignore[union-attr]  # there is at least one layer
        found = self._empty((n,))
        for k in range(n):
            self.loss.run(scores[k], self.Y, self.context)
            found[k : k + 1] = self.context.work["loss"]
        return self.net.backend.to_numpy(found).astype(np.float64)

    def _layer(self, i: int, x: Array | None, y: Array, n: int) -> None:
        """Layer i at n points; x is None for the first, which has X at all of them."""
        layer, needs = self.net.layers[i], self.net.needs[i]
        if x is not None and not needs.parameters:
            self._run(i, x, y, self.views[0])
            return
        ys = y.reshape(n, self.rows, -1)
        xs = None if x is None else x.reshape(n, self.rows, -1)
        if xs is not None and type(layer) is Dense:
            self.xp.matmul(xs, self.stacked[self.names[i]["W"]][:n], out=ys)
            if layer.bias:
                ys += self.stacked[self.names[i]["b"]][:n, None, :]
            return
        for k in range(n):
            self._run(i, self.X if xs is None else xs[k], ys[k], self.views[k])

    def _run(self, i: int, x: Array, y: Array, parameters: FlatViews) -> None:
        """Layer i on any number of rows up to those of its workspace."""
        net, names, needs = self.net, self.names[i], self.net.needs[i]
        spaces = {**needs.kept, **needs.scratch, **needs.plain}
        work = {name: array[: len(x)] if -1 in spaces[name][0] else array for name, array in self.works[i].items()}
        p = {name: parameters[names[name]] for name in needs.parameters}
        buffers = {name: net.buffers[names[name]] for name in needs.buffers}
        context = Context(net.backend, self.xp, net.ops, i, self.mode, p, {}, buffers, work, net.products)
        net.layers[i].forward(x, y, context)


def principal_directions(path: Any, count: int = 2) -> list[np.ndarray]:
    """The directions in which a path of parameters, ``(points, size)``, spreads most from its end, longest first.

    Each is as long as the path reaches along it, so that the path lies within -1 to 1 (Li et al. 2018, section 7).
    """
    points = np.asarray(path, np.float64)
    check_int("count", count, 1)
    if points.ndim != 2 or len(points) <= count:
        raise ShapeError(f"path must be (more than {count} points, parameters), got shape {points.shape}")
    offsets = points[:-1] - points[-1]
    axes = np.linalg.svd(offsets, full_matrices=False)[2][:count]
    return [axis * max(float(np.abs(offsets @ axis).max()), np.finfo(np.float64).tiny) for axis in axes]


# --- the step size ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StepSizeSweep:
    """The loss before a step, ``start``, and after one step of each size, inf where it overflows.

    ``best`` is the step size with the lowest of all; None where every step raises the loss.
    """

    step_sizes: tuple[float, ...]
    losses: tuple[float, ...]
    start: float
    best: float | None
    reason: str


def step_size_sweep(net: Network, X: Array, Y: Array, step_sizes: Any = None) -> StepSizeSweep:
    """The loss after one step of gradient descent, W - s dW, for each step size s, by default 1e-10, 1e-9, ..., 1e-1.

    Loss and gradient are those of a training step on the batch X, Y, all with the same dropout mask.
    """
    _check_net(net)
    sizes = _positive_grid("step_sizes", [float(f"1e{k}") for k in range(-10, 0)] if step_sizes is None else step_sizes)
    found = []
    with _kept(net), net.backend.scope():
        w = net.parameters.flat.copy()
        state = net.state_dict()
        start, grads = net.loss_and_grad(X, Y)
        descent = grads.flat.copy()
        net.load_state_dict(state)  # the same dropout mask for the losses as for the gradient
        for size in sizes:
            net.parameters.flat[...] = w - size * descent
            found.append(_loss_or_inf(net, X, Y, training=True))
    lowest = min(found)
    if not lowest < start:
        return StepSizeSweep(sizes, tuple(found), start, None, f"every step raises the loss, which is {start:.4g}")
    best = sizes[found.index(lowest)]
    reason = f"one step of {best:g} lowers the loss most, from {start:.4g} to {lowest:.4g}"
    if (above := [(s, loss) for s, loss in zip(sizes, found, strict=True) if s > best]) and above[0][1] > start:
        reason += f"; one of {above[0][0]:g} raises it to {above[0][1]:.4g}"
    return StepSizeSweep(sizes, tuple(found), start, best, reason)


@dataclass(frozen=True)
class RangeTest:
    """A run in which the learning rate rose from step to step: the cost at each rate, raw and smoothed.

    ``suggestion`` is a learning rate to train with, ``reason`` says why; None where the cost never fell.
    """

    rates: tuple[float, ...]
    losses: tuple[float, ...]
    smoothed: tuple[float, ...]
    suggestion: float | None
    reason: str


def learning_rate_range_test(
    net: Network,
    X: Array,
    Y: Array,
    optimizer: MakeOptimizer = SGD,
    low: float = 1e-5,
    high: float = 10.0,
    steps: int = 200,
    batch_size: int = 128,
    beta: float = 0.9,
    seed: int = 0,
    progress: Progress | None = None,
) -> RangeTest:
    """Train while the learning rate rises exponentially from ``low`` to ``high`` (Smith 2017, arXiv:1506.01186).

    ``optimizer(parameters, lr)`` makes the optimizer. The run ends early where the smoothed cost is above four times
    its lowest. The suggestion is a tenth of the rate at which the smoothed cost is lowest.
    """
    _check_net(net)
    low = check_real("low", low, 0, open_low=True)
    high = check_real("high", high, low, open_low=True)
    check_int("steps", steps, 2)
    check_real("beta", beta, 0, 1, open_high=True)
    net.loss(X, Y)
    loader = Loader(X, Y, batch_size=batch_size, seed=seed, backend=net.backend, dtype=net.dtype)
    planned = np.geomspace(low, high, steps).tolist()
    found: list[float] = []
    with _kept(net):
        opt = optimizer(net.parameters, low)
        with contextlib.closing(_endless(loader)) as batches:
            for rate, (x, y) in zip(planned, batches, strict=False):
                _report(progress, len(found), steps)
                try:
                    loss, grads = net.loss_and_grad(x, y)
                except NonFiniteError:
                    break
                found.append(loss)
                smoothed = ewma(found, beta)
                if smoothed[-1] > 4 * smoothed.min() and smoothed.min() > 0:
                    break
                opt.lr = rate
                opt.step(grads)
    _report(progress, steps, steps)
    return _range_test(planned[: len(found)], found, ewma(found, beta).tolist(), steps)


def _endless(loader: Loader) -> Generator[Any]:
    while True:
        yield from loader


def _range_test(rates: list[float], found: list[float], smoothed: list[float], steps: int) -> RangeTest:
    lowest = smoothed.index(min(smoothed))
    if lowest == 0:
        words = f"the smoothed cost never falls below its start, {smoothed[0]:.4g}: take a lower range"
        return RangeTest(tuple(rates), tuple(found), tuple(smoothed), None, words)
    suggestion = float(f"{rates[lowest] / 10:.2g}")
    end = "was given up" if len(rates) < steps else "ended"
    words = (
        f"the smoothed cost is lowest, {smoothed[lowest]:.4g}, at {rates[lowest]:.2g}, and the run {end} at "
        f"{rates[-1]:.2g}; a tenth of the first leaves room, and the cost falls there"
    )
    return RangeTest(tuple(rates), tuple(found), tuple(smoothed), suggestion, words)


# --- training runs side by side --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BatchSizeTrial:
    """A training run with one batch size: times of the training alone, the median epoch's, and memory in bytes.

    ``epochs_to_target`` and ``seconds_to_target`` are None where the loss was not reached; ``loss`` is that of the
    whole set at the end of the run, None where it diverged. Memory is that of network and optimizer.
    """

    batch_size: int
    seconds_per_sample: float | None
    seconds_per_epoch: float | None
    memory: int
    epochs_to_target: int | None
    seconds_to_target: float | None
    loss: float | None


def batch_size_sweep(
    net: Network,
    X: Array,
    Y: Array,
    sizes: Sequence[int] | None = None,
    target: float | None = None,
    optimizer: MakeOptimizer = Adam,
    lr: float | Callable[[int], float] = 1e-3,
    epochs: int = 5,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[BatchSizeTrial]:
    """Train from the same parameters with each batch size, until the loss of the whole set is ``target``.

    At most ``epochs`` each, and all of them without a target. ``sizes`` are by default the powers of two from 16 to
    1024 and one size between each two, as far as there are samples. ``lr`` is a number, or a function of the batch
    size. The loss is looked at after every epoch, and that takes no part in the times.
    """
    _check_net(net)
    default = [n for power in range(4, 11) for n in (1 << power, 3 << (power - 1)) if n <= min(1024, len(X))]
    sizes = [check_int("sizes", n, 1, len(X)) for n in (default if sizes is None else sizes)]
    if not sizes:
        raise ArgumentError(f"sizes must hold at least one batch size, got {sizes}")
    if target is not None:
        target = check_real("target", target, 0, open_low=True)
    check_int("epochs", epochs, 1)
    net.loss(X, Y)
    trials = []
    with _kept(net):
        state = net.state_dict()
        for done, size in enumerate(sizes):
            _report(progress, done, len(sizes))
            run = _train(net, state, X, Y, optimizer, lr(size) if callable(lr) else lr, size, epochs, seed, target)
            per_epoch = float(np.median(run.seconds)) if run.seconds else None
            trials.append(
                BatchSizeTrial(
                    batch_size=size,
                    seconds_per_sample=None if per_epoch is None else per_epoch / len(X),
                    seconds_per_epoch=per_epoch,
                    memory=run.memory,
                    epochs_to_target=len(run.seconds) if run.reached else None,
                    seconds_to_target=sum(run.seconds) if run.reached else None,
                    loss=run.loss,
                )
            )
    _report(progress, len(sizes), len(sizes))
    return trials


@dataclass(frozen=True)
class OptimizerTrial:
    """An optimizer at its own best learning rate: the loss of the whole set at the end, and how it fell.

    ``losses`` are those at each rate of the grid, inf where it diverged; ``at_edge`` says that the best rate is the
    first or last of the grid, so that a better one may lie outside.
    """

    name: str
    best_lr: float
    loss: float
    accuracy: float | None
    at_edge: bool
    rates: tuple[float, ...]
    losses: tuple[float, ...]
    history: History


OPTIMIZERS: dict[str, MakeOptimizer] = {"sgd": SGD, "momentum": Momentum, "rmsprop": RMSProp, "adam": Adam}


def optimizer_sweep(
    net: Network,
    X: Array,
    Y: Array,
    optimizers: Mapping[str, MakeOptimizer] | None = None,
    rates: Any = None,
    epochs: int = 2,
    batch_size: int = 128,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[OptimizerTrial]:
    """Compare optimizers on equal terms: same start, same batches, and each at its own best rate of the same grid.

    By default SGD, momentum, RMSProp and Adam; ``optimizers`` maps names to functions (parameters, lr) -> optimizer.
    ``rates`` are by default 1e-4 to 10, two in a decade. The best rate is the one with the lowest loss of the whole set
    after ``epochs``.
    """
    _check_net(net)
    makers = dict(OPTIMIZERS if optimizers is None else optimizers)
    if not makers:
        raise ArgumentError("optimizers must hold at least one, got none")
    grid = _positive_grid(
        "rates", [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0] if rates is None else rates
    )
    net.loss(X, Y)
    trials = []
    with _kept(net):
        state = net.state_dict()
        for done, (name, make) in enumerate(makers.items()):
            runs = []
            for k, rate in enumerate(grid):
                _report(progress, done * len(grid) + k, len(makers) * len(grid))
                runs.append(_train(net, state, X, Y, make, rate, batch_size, epochs, seed, None))
            found = [math.inf if run.loss is None else run.loss for run in runs]
            best = found.index(min(found))
            if not math.isfinite(found[best]):
                raise NonFiniteError(f"{name} diverged at every rate from {min(grid):g} to {max(grid):g}")
            edge = grid[best] in (min(grid), max(grid))
            run = runs[best]
            trials.append(
                OptimizerTrial(name, grid[best], found[best], run.accuracy, edge, grid, tuple(found), run.history)
            )
    _report(progress, len(makers) * len(grid), len(makers) * len(grid))
    return trials


@dataclass(frozen=True)
class StrategyResult:
    """What a strategy reached: loss and accuracy on the training set, accuracy on the test set, and in what time."""

    name: str
    loss: float
    accuracy: float | None
    test_accuracy: float | None
    seconds: float
    history: tuple[float, ...]


def compare_strategies(
    net: Network,
    X: Array,
    Y: Array,
    test: tuple[Array, Array],
    trials: int = 1000,
    scale: float = 0.01,
    optimizer: MakeOptimizer = SGD,
    lr: float = 0.1,
    epochs: int = 10,
    batch_size: int = 128,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[StrategyResult]:
    """Random search, random local search and gradient descent on the same data, as CS231n compares them.

    The two searches try ``trials`` parameters each, local search from those of ``net``; gradient descent starts there,
    too, and makes ``epochs``. ``history`` has the best loss after each trial, or the mean cost of each epoch.
    """
    _check_net(net)
    check_int("epochs", epochs, 1)
    net.loss(*test)
    total = 2 * trials + epochs
    results = []
    with _kept(net):
        state = net.state_dict()
        for k, (name, search) in enumerate(
            {"random search": random_search, "local search": random_local_search}.items()
        ):

            def show(done: int, _: int, before: int = k * trials) -> None:
                _report(progress, before + done, total)

            began = time.perf_counter()
            found = search(net, X, Y, trials, scale, seed, show)
            seconds = time.perf_counter() - began
            accuracy = net.evaluate(*test)[1]
            results.append(StrategyResult(name, found.loss, found.accuracy, accuracy, seconds, found.history))
            net.load_state_dict(state)
        run = _train(net, state, X, Y, optimizer, lr, batch_size, epochs, seed, None)
        if run.loss is None:
            raise NonFiniteError(f"gradient descent diverged with lr={lr:g}: take a lower one")
        accuracy, costs = net.evaluate(*test)[1], tuple(run.history.loss)
        results.append(StrategyResult("gradient descent", run.loss, run.accuracy, accuracy, sum(run.seconds), costs))
    _report(progress, total, total)
    return results


class Run(NamedTuple):
    """A training run: its loss and accuracy on the whole set at the end, None where it diverged."""

    history: History
    reached: bool
    loss: float | None
    accuracy: float | None
    memory: int

    @property
    def seconds(self) -> list[float]:
        """Of each epoch."""
        return self.history.seconds


def _train(
    net: Network,
    state: Mapping[str, Any],
    X: Array,
    Y: Array,
    make: MakeOptimizer,
    lr: float,
    batch_size: int,
    epochs: int,
    seed: int,
    target: float | None,
) -> Run:
    """Train from ``state``, without a display, until the loss of the whole set is down to ``target``."""
    net.load_state_dict(state)
    loader = Loader(X, Y, batch_size=batch_size, seed=seed, backend=net.backend, dtype=net.dtype)
    opt = make(net.parameters, lr)
    net.rehearse(*loader.peek())  # allocates and compiles before any time is taken
    history = History()
    reached = False

    def watch(training: TrainingState) -> None:
        nonlocal history, reached
        history = training.history
        if target is not None and net.loss(X, Y) <= target:
            reached = True
            raise StopTraining

    memory = net.memory(batch_size) + opt.memory()
    try:
        fit(net, loader, opt, epochs, callbacks=[watch], progress=False, max_skipped=0)
        loss, accuracy = net.evaluate(X, Y)
    except NonFiniteError:
        return Run(history, False, None, None, memory)
    return Run(history, reached, loss, accuracy, memory)


# --- pieces ----------------------------------------------------------------------------------------------------------


def _check_net(net: Any) -> None:
    if not isinstance(net, Network):
        raise DTypeError(f"net must be a gpubatch.Network, got {type(net).__name__}")
    if net.dtype == np.float16:
        raise ArgumentError(
            "net must not have precision='mixed' here: what is looked for is lost in the rounding of float16; make one "
            "with precision='full' and give it this one's state_dict()"
        )


@contextlib.contextmanager
def _kept(net: Network) -> Iterator[None]:
    """Everything that ``net`` is made of is afterwards as it was before, gradients apart."""
    state = net.state_dict()
    try:
        yield
    finally:
        net.load_state_dict(state)


def _loss_or_inf(net: Network, X: Array, Y: Array, training: bool = False) -> float:
    try:
        return net.loss(X, Y, training)
    except NonFiniteError:
        return math.inf


def _positive_grid(name: str, values: Any) -> tuple[float, ...]:
    grid = _grid(name, values)
    if grid.min() <= 0:
        raise ArgumentError(f"{name} must hold numbers above 0, got {grid.min():g}")
    return tuple(grid.tolist())


def _report(progress: Progress | None, done: int, total: int) -> None:
    if progress is not None:
        progress(done, total)
