"""The core's kernels compiled for the CPU, and the choice among the forms that there are."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Any

import numpy as np

from gpubatch.backend import Array, Backend, CudaBackend
from gpubatch.formula import BoundActivation, BoundScoreLoss
from gpubatch.ops.cuda_ops import CudaOps
from gpubatch.ops.launch import elementwise_digest, host_library
from gpubatch.ops.numpy_ops import (
    GATHER_BLOCK,
    MOST_PROGRAMS,
    NumpyOps,
    Ops,
    Work,
    labels_or_rows,
    rows_of,
    scale_gradient,
)

__all__ = ["HalfOps", "HostOps", "ops_for"]


@functools.cache
def ops_for(backend: Backend, dtype: np.dtype[Any]) -> Ops:
    """The kernels for arrays of ``dtype`` on ``backend``."""
    if isinstance(backend, CudaBackend):
        return CudaOps(backend, dtype)
    if dtype == np.float16:
        return HalfOps(ops_for(backend, np.dtype(np.float32)))
    library = host_library()
    return NumpyOps() if isinstance(library, str) else HostOps(library)


@functools.lru_cache(maxsize=MOST_PROGRAMS)
def activation_place(library: Any, f: BoundActivation) -> tuple[int, tuple[float, ...], tuple[float, ...]]:
    """Where the library has an activation, -1 for nowhere; and the scalars of its two forms."""
    form = f.activation.form("float64")
    return library.activation_of(elementwise_digest(f.activation)), f.scalars(form.forward), f.scalars(form.backward)


@functools.lru_cache(maxsize=MOST_PROGRAMS)
def score_loss_place(library: Any, f: BoundScoreLoss) -> tuple[int, tuple[float, ...]]:
    """Likewise for a loss of single scores."""
    form = f.loss.form("float64", "loss", "dz")
    return library.score_loss_of(elementwise_digest(f.loss)), f.scalars(form)


class HostOps(Ops):
    """``gpubatch._host``, and NumPy for what it declines: arrays that are strided or of another type."""

    def __init__(self, library: Any) -> None:
        self.library, self.numpy = library, NumpyOps()

    def activate(self, f: BoundActivation, x: Array, b: Array | None, y: Array, work: Work) -> None:
        """See :class:`Ops`."""
        place, forward, _ = activation_place(self.library, f)
        if place < 0 or not self.library.activate(place, forward, x, b, y, work["slope"] if f.keeps else None):
            self.numpy.activate(f, x, b, y, work)

    def activation_gradient(
        self, f: BoundActivation, y: Array, dy: Array, dx: Array | None, db: Array | None, work: Work
    ) -> None:
        """See :class:`Ops`."""
        place, _, backward = activation_place(self.library, f)
        kept, partial = work["slope"] if f.keeps else y, work.get("partial")
        if place < 0 or not self.library.activation_gradient(place, backward, kept, dy, dx, db, partial):
            self.numpy.activation_gradient(f, y, dy, dx, db, work)

    def softmax_cross_entropy(self, z: Array, Y: Array, gradient: bool, work: Work) -> None:
        """See :class:`Ops`."""
        labels, rows = labels_or_rows(Y, work)
        if not self.library.softmax_cross_entropy(z, labels, rows, work["dz"], work["row"], work["loss"], gradient):
            self.numpy.softmax_cross_entropy(z, Y, gradient, work)
        elif gradient:
            scale_gradient(work)

    def svm(self, z: Array, Y: Array, gradient: bool, work: Work) -> None:
        """See :class:`Ops`."""
        labels, _ = labels_or_rows(Y, work)
        if not self.library.svm(z, labels, work["dz"], work["row"], work["loss"], gradient):
            self.numpy.svm(z, Y, gradient, work)
        elif gradient:
            scale_gradient(work)

    def score_loss(self, f: BoundScoreLoss, z: Array, Y: Array, gradient: bool, work: Work) -> None:
        """See :class:`Ops`."""
        place, scalars = score_loss_place(self.library, f)
        results = work["dz"], work["parts"], work["loss"]
        if place < 0 or not self.library.score_loss(place, scalars, z, rows_of(Y, z, work), *results, gradient):
            self.numpy.score_loss(f, z, Y, gradient, work)
        elif gradient:
            scale_gradient(work)

    def l2_loss(self, w: Array, spans: Array, factor: float, loss: Array, work: Work) -> None:
        """See :class:`Ops`; BLAS does it."""
        self.numpy.l2_loss(w, spans, factor, loss, work)

    def l2_gradient(self, w: Array, spans: Array, factor: float, g: Array, work: Work) -> None:
        """See :class:`Ops`; NumPy does it, in the cache."""
        self.numpy.l2_gradient(w, spans, factor, g, work)

    def normalise(
        self, x: Array, mean: Array, var: Array, eps: float, gamma: Array, beta: Array, y: Array, work: Work
    ) -> None:
        """See :class:`Ops`."""
        if not self.library.normalise(x, mean, var, eps, gamma, beta, y, work["inverse"]):
            self.numpy.normalise(x, mean, var, eps, gamma, beta, y, work)

    def batch_norm(self, x: Array, eps: float, gamma: Array, beta: Array, y: Array, work: Work) -> None:
        """See :class:`Ops`."""
        arrays = (work[name] for name in ("normal", "mean", "var", "inverse", "partial"))
        if not self.library.batch_norm(x, eps, gamma, beta, y, *arrays):
            self.numpy.batch_norm(x, eps, gamma, beta, y, work)

    def batch_norm_gradient(
        self, dy: Array, gamma: Array, dgamma: Array, dbeta: Array, dx: Array | None, work: Work
    ) -> None:
        """See :class:`Ops`."""
        arrays = (work[name] for name in ("normal", "inverse", "partial"))
        if not self.library.batch_norm_gradient(dy, gamma, dgamma, dbeta, dx, *arrays):
            self.numpy.batch_norm_gradient(dy, gamma, dgamma, dbeta, dx, work)

    def move(self, running: Array, new: Array, weight: float, factor: float, work: Work) -> None:
        """See :class:`Ops`; one number for each feature, which NumPy does as well."""
        self.numpy.move(running, new, weight, factor, work)

    def dropout(
        self, x: Array, y: Array, rate: float, key: tuple[int, int], step: int | Array, first: int, work: Work
    ) -> None:
        """See :class:`Ops`."""
        if not self.library.dropout(x, y, work["mask"], *key, step, first, rate):
            self.numpy.dropout(x, y, rate, key, step, first, work)

    def dropout_gradient(self, dy: Array, dx: Array, work: Work) -> None:
        """See :class:`Ops`; a product, which NumPy does as well."""
        self.numpy.dropout_gradient(dy, dx, work)

    def square_sum(self, x: Array, out: Array) -> None:
        """See :class:`Ops`."""
        if not self.library.square_sum(x, out):
            self.numpy.square_sum(x, out)

    def gather(self, source: Array, index: Array, out: Array, scale: float, shift: float) -> None:
        """See :class:`Ops`."""
        if not self.library.gather(source, index, out, scale, shift):
            self.numpy.gather(source, index, out, scale, shift)


# --- float16 ---------------------------------------------------------------------------------------------------------


class HalfOps(Ops):
    """float16 on the CPU, by the kernels for float32: on copies that last for one call, whose results are rounded.

    So a network of mixed precision runs without a GPU. It is not meant to be fast there, and these copies, of the
    arrays of one layer at a time, are in no plan.
    """

    def __init__(self, ops: Ops) -> None:
        self.ops, self.plain = ops, ops.plain

    def activate(self, f: BoundActivation, x: Array, b: Array | None, y: Array, work: Work) -> None:
        """See :class:`Ops`."""
        with Widened(work, y, work.get("slope")) as wide:
            self.ops.activate(f, wide(x), wide(b), wide(y), wide)

    def activation_gradient(
        self, f: BoundActivation, y: Array, dy: Array, dx: Array | None, db: Array | None, work: Work
    ) -> None:
        """See :class:`Ops`."""
        with Widened(work, dx, db) as wide:
            self.ops.activation_gradient(f, wide(y), wide(dy), wide(dx), wide(db), wide)

    def softmax_cross_entropy(self, z: Array, Y: Array, gradient: bool, work: Work) -> None:
        """See :class:`Ops`."""
        self._loss(self.ops.softmax_cross_entropy, z, Y, gradient, work)

    def svm(self, z: Array, Y: Array, gradient: bool, work: Work) -> None:
        """See :class:`Ops`."""
        self._loss(self.ops.svm, z, Y, gradient, work)

    def score_loss(self, f: BoundScoreLoss, z: Array, Y: Array, gradient: bool, work: Work) -> None:
        """See :class:`Ops`."""
        self._loss(functools.partial(self.ops.score_loss, f), z, Y, gradient, work)

    def _loss(self, loss: Callable[..., None], z: Array, Y: Array, gradient: bool, work: Work) -> None:
        with Widened(work, work["dz"]) as wide:
            loss(wide(z), Y, gradient, wide)

    def l2_loss(self, w: Array, spans: Array, factor: float, loss: Array, work: Work) -> None:
        """See :class:`Ops`."""
        for start, stop in spans.tolist():
            with Widened(work) as wide:
                self.ops.l2_loss(wide(w[start:stop]), np.array([[0, stop - start]]), factor, loss, wide)

    def l2_gradient(self, w: Array, spans: Array, factor: float, g: Array, work: Work) -> None:
        """See :class:`Ops`."""
        for start, stop in spans.tolist():
            part = g[start:stop]
            with Widened(work, part) as wide:
                self.ops.l2_gradient(wide(w[start:stop]), np.array([[0, stop - start]]), factor, wide(part), wide)

    def normalise(
        self, x: Array, mean: Array, var: Array, eps: float, gamma: Array, beta: Array, y: Array, work: Work
    ) -> None:
        """See :class:`Ops`."""
        with Widened(work, y) as wide:
            self.ops.normalise(wide(x), mean, var, eps, wide(gamma), wide(beta), wide(y), wide)

    def batch_norm(self, x: Array, eps: float, gamma: Array, beta: Array, y: Array, work: Work) -> None:
        """See :class:`Ops`."""
        with Widened(work, y, work["normal"]) as wide:
            self.ops.batch_norm(wide(x), eps, wide(gamma), wide(beta), wide(y), wide)

    def batch_norm_gradient(
        self, dy: Array, gamma: Array, dgamma: Array, dbeta: Array, dx: Array | None, work: Work
    ) -> None:
        """See :class:`Ops`."""
        with Widened(work, dgamma, dbeta, dx) as wide:
            self.ops.batch_norm_gradient(wide(dy), wide(gamma), wide(dgamma), wide(dbeta), wide(dx), wide)

    def move(self, running: Array, new: Array, weight: float, factor: float, work: Work) -> None:
        """See :class:`Ops`; statistics are float32 already."""
        self.ops.move(running, new, weight, factor, work)

    def dropout(
        self, x: Array, y: Array, rate: float, key: tuple[int, int], step: int | Array, first: int, work: Work
    ) -> None:
        """See :class:`Ops`; y is a product with the mask as it is stored, which backward multiplies by."""
        with Widened(work, work["mask"]) as wide:
            self.ops.dropout(wide(x), wide(y), rate, key, step, first, wide)
        np.multiply(x, work["mask"], out=y)

    def dropout_gradient(self, dy: Array, dx: Array, work: Work) -> None:
        """See :class:`Ops`; a product is rounded once, in whatever it is computed."""
        self.ops.dropout_gradient(dy, dx, work)

    def square_sum(self, x: Array, out: Array) -> None:
        """See :class:`Ops`; NumPy widens it to double precision by itself."""
        self.ops.square_sum(x, out)

    def gather(self, source: Array, index: Array, out: Array, scale: float, shift: float) -> None:
        """See :class:`Ops`; a few rows at a time."""
        rows = max(1, GATHER_BLOCK // max(1, math.prod(out.shape[1:])))
        wide = np.empty((min(rows, len(index)), *out.shape[1:]), np.float32)
        for start in range(0, len(index), rows):
            part = wide[: len(index) - start]
            self.ops.gather(source, index[start : start + rows], part, scale, shift)
            with np.errstate(over="ignore"):
                out[start : start + rows] = part


class Widened(Mapping[str, Array]):
    """float32 copies of float16 arrays for as long as a ``with`` lasts; in its end ``results`` are rounded back.

    As a mapping it is the workspace; called with an array, it gives the copy of it, always the same one. An array that
    is not float16 is given as it is.
    """

    def __init__(self, work: Work, *results: Array | None) -> None:
        self.work, self.results = work, results
        self.copies: dict[int, tuple[Array, Array]] = {}
        self.quiet = np.errstate(over="ignore", invalid="ignore")  # what is too large for float16 is infinite

    def __call__(self, x: Array | None) -> Array | None:
        if x is None or x.dtype != np.float16:
            return x
        if id(x) not in self.copies:
            self.copies[id(x)] = x, x.astype(np.float32, order="C")
        return self.copies[id(x)][1]

    def __getitem__(self, name: str) -> Array:
        return self(self.work[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.work)

    def __len__(self) -> int:
        return len(self.work)

    def __enter__(self) -> Widened:
        self.quiet.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if error is None:
            for result in self.results:
                if result is not None:
                    result[...] = self(result)
        self.quiet.__exit__(kind, error, at)
