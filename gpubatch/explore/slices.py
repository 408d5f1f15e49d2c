"""The loss along one direction or two through the parameters."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpubatch.backend import Array
from gpubatch.errors import ArgumentError, DTypeError, NonFiniteError, ShapeError, check_choice, check_int
from gpubatch.explore.shared import Progress, check_net, grid_of, report
from gpubatch.nn import BatchNorm, Dense, Network, core_of
from gpubatch.params import FlatViews
from gpubatch.shown import Shown

# Samples, and activations of a layer, that a loss slice takes at a time. CPU: measured on two cores with 2 MiB of cache
# each, 784-256-10 and 2,000 samples; half or twice as much is up to 40 % slower. A GPU wants few, large launches.
SLICE_ROWS = {"cpu": 256, "cuda": 8192}
SLICE_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 26}


@dataclass(frozen=True, eq=False, repr=False)
class LossSlice(Shown):
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
    weight: Array | None = None,
) -> LossSlice:
    """The loss around the parameters W of ``net``, in evaluation: along ``a``, or over the grid of ``a`` and ``b``.

    ``a`` and ``b`` are sequences of numbers, ``a`` by default 51 from -1 to 1; with ``b`` the slice has two dimensions.
    ``directions`` is one or two directions, each a mapping with the names and shapes of ``net.parameters`` or a flat
    array of ``net.parameters.size``; by default they are drawn from N(0, 1) by ``seed``. ``normalize="filter"`` scales
    the weights into each unit to the norm of W's and leaves one-dimensional parameters alone (Li et al. 2018,
    arXiv:1712.09913, section 4). ``weight`` is what each sample counts in the loss.

    Many points are evaluated at a time. The first layer with parameters is linear in these, so it runs once for each
    direction, not once for each point. The parameters of ``net`` are not touched.

    >>> net = gb.mlp([3, 4, 2], seed=0)
    >>> X, Y = np.eye(3, dtype=np.float32), np.array([0, 1, 1])
    >>> gb.loss_slice(net, X, Y, [-0.5, 0.0, 0.5]).losses.shape
    (3,)
    """
    check_net(net)
    check_choice("normalize", normalize, ["none", "filter"])
    grid_a = grid_of("a", np.linspace(-1, 1, 51) if a is None else a)
    grid_b = None if b is None else grid_of("b", b)
    count = 1 if grid_b is None else 2
    drawn = _slice_directions(net, directions, count, check_int("seed", seed, 0))
    if normalize == "filter":
        drawn = [_filter_normalized(net, d) for d in drawn]
    net.loss(X, Y, weight=weight)  # finds what is wrong with X and Y
    shape = (len(grid_a),) if grid_b is None else (len(grid_a), len(grid_b))
    axes = np.meshgrid(grid_a, *(() if grid_b is None else (grid_b,)), indexing="ij")
    points = np.stack([np.ones(shape), *axes], axis=-1).reshape(-1, count + 1)  # of W, W1 and W2
    with net.backend.scope(), np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        values = _data_losses(net, X, Y, weight, drawn, points, progress) + _penalties(net, drawn, points)
    values = np.where(np.isnan(values), np.inf, values).reshape(shape)
    return LossSlice(grid_a, grid_b, values, tuple(drawn))


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
    counted = core_of(net).l2_names
    mask = np.concatenate([np.full(math.prod(s), name in counted) for name, s in net.parameters.shapes.items()])
    vectors = np.stack([net.backend.to_numpy(net.parameters.flat).astype(np.float64), *directions])[:, mask]
    return np.asarray(net.l2 / 2 * np.einsum("pi,ij,pj->p", points, vectors @ vectors.T, points))


def _data_losses(
    net: Network,
    X: Array,
    Y: Array,
    weight: Array | None,
    directions: list[np.ndarray],
    points: np.ndarray,
    progress: Progress | None,
) -> np.ndarray:
    """The mean loss at every point, without the l2 term."""
    basis = net.backend.empty((points.shape[1], net.parameters.size), net.dtype)
    for row, values in zip(basis, (net.parameters.flat, *directions), strict=True):
        row[...] = net.backend.asarray(values, net.dtype)
    sums, counted = np.zeros(len(points)), 0.0
    most = SLICE_ROWS[net.backend.name]
    starts = range(0, len(X), most)
    for block, start in enumerate(starts):
        rows = slice(start, min(start + most, len(X)))
        of_rows = None if weight is None else weight[rows]
        side = SideBySide(net, X[rows], Y[rows], of_rows, basis, len(points))
        for begin in range(0, len(points), side.points):
            report(progress, block * len(points) + begin, len(starts) * len(points))
            some = slice(begin, begin + side.points)
            sums[some] += side.evaluate(points[some]) * side.counted if side.counted else 0
        counted += side.counted
    report(progress, len(starts) * len(points), len(starts) * len(points))
    if not counted:
        raise NonFiniteError("the loss has no mean, since all labels are ignored")
    return sums / counted


class SideBySide:
    """Evaluates a network at several points at a time, all on the same rows of X.

    A point has one coordinate for each row of ``basis``, ``(coordinates, parameters)``. Activations are
    ``(points, rows, features)``: to a layer without parameters that is one batch of points * rows, since in evaluation
    every row counts for itself.
    """

    def __init__(self, net: Network, X: Array, Y: Array, weight: Array | None, basis: Array, most: int) -> None:
        core = core_of(net)
        self.net, self.core, self.X, self.Y, self.rows, self.xp = net, core, X, Y, len(X), net.backend.xp
        widest = max(run.needs.outputs for run in core.layers)
        self.points = min(most, max(1, SLICE_ELEMENTS[net.backend.name] // (self.rows * max(net.inputs, widest))))
        self.all = core.apart(self.points * self.rows)  # the points one after another
        self.one = core.apart(self.rows).bind(self.rows)
        weights = core.weights(Y, weight)  # of samples and of ignored labels
        self.loss = self.one.weighing(weights)
        self.counted = self.rows if weights is None else core.sum_of_weights

        # Dense and BatchNorm are linear in their parameters; of one's own layers nobody knows.
        head = next(i for i, run in enumerate(core.layers) if run.needs.parameters)
        self.begin = head + 1 if type(net.layers[head]) in (Dense, BatchNorm) else 0
        self.first = self._head_outputs(basis) if self.begin else None

        # The parameters at each point, without those of such a first layer.
        shapes = net.parameters.shapes
        for name in core.layers[head].needs.parameters if self.begin else ():
            del shapes[core.names[head][name]]
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

    def _empty(self, shape: tuple[int, ...]) -> Array:
        return self.net.backend.empty(shape, self.net.dtype)

    def _head_outputs(self, basis: Array) -> Array:
        """Outputs of the first layer with parameters for each row of the basis, ``(coordinates, rows * features)``."""
        result = self._empty((len(basis), self.one.calls[self.begin - 1][1].size))
        for flat, output in zip(basis, result, strict=True):
            views, x = FlatViews(flat, self.net.parameters.shapes), self.X
            for i in range(self.begin):
                y = self.one.calls[i][1]
                self._at_one_point(i, x, y, views)
                x = y
            output[...] = x.reshape(-1)
        return result

    def evaluate(self, points: np.ndarray) -> np.ndarray:
        """The mean losses at ``points``, ``(points, coordinates)``."""
        n = len(points)
        calls, loss = self.all.bind(n * self.rows).calls, self.loss
        coordinates = self.net.backend.asarray(points, self.net.dtype)
        self.xp.matmul(coordinates, self.basis, out=self.stack[:n])
        x = None
        if self.first is not None:
            x = calls[self.begin - 1][1]
            self.xp.matmul(coordinates, self.first, out=x.reshape(n, -1))
        for i, (layer, y, _, context) in enumerate(calls[self.begin :], self.begin):
            if x is not None and not context.p:
                layer.forward(x, y, context)
            else:
                self._at_each_point(i, x, y, n)
            x = y
        scores = x.reshape(n, self.rows, -1)  # type: ignore[union-attr]  # there is at least one layer
        found = self._empty((n,))
        for k in range(n):
            self.core.loss.run(scores[k], self.Y, loss)
            found[k : k + 1] = loss.work["loss"]
        return self.net.backend.to_numpy(found).astype(np.float64)

    def _at_each_point(self, i: int, x: Array | None, y: Array, n: int) -> None:
        """Layer i, with its parameters at each of n points; x is None for the first, which has X at all of them."""
        layer, names = self.net.layers[i], self.core.names[i]
        ys = y.reshape(n, self.rows, -1)
        xs = None if x is None else x.reshape(n, self.rows, -1)
        if xs is not None and type(layer) is Dense:
            self.xp.matmul(xs, self.stacked[names["W"]][:n], out=ys)
            if layer.bias:
                ys += self.stacked[names["b"]][:n, None, :]
            return
        for k in range(n):
            self._at_one_point(i, self.X if xs is None else xs[k], ys[k], self.views[k])

    def _at_one_point(self, i: int, x: Array, y: Array, parameters: FlatViews) -> None:
        """Layer i on the rows of X, with these parameters."""
        layer, _, _, context = self.one.calls[i]
        names = self.core.names[i]
        layer.forward(x, y, dataclasses.replace(context, p={name: parameters[names[name]] for name in context.p}))


def principal_directions(path: Any, count: int = 2) -> list[np.ndarray]:
    """The directions in which a path of parameters, ``(points, size)``, spreads most from its end, longest first.

    Each is as long as the path reaches along it, so that the path lies within -1 to 1 (Li et al. 2018, section 7).
    """
    points = np.asarray(path, np.float64)
    count = check_int("count", count, 1)
    if points.ndim != 2 or len(points) <= count:
        raise ShapeError(f"path must be (more than {count} points, parameters), got shape {points.shape}")
    offsets = points[:-1] - points[-1]
    axes = np.linalg.svd(offsets, full_matrices=False)[2][:count]
    return [axis * max(float(np.abs(offsets @ axis).max()), np.finfo(np.float64).tiny) for axis in axes]
