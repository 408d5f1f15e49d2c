"""The core's kernels compiled for the CPU, and the choice among the forms that there are."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from gpubatch.backend import Array, Backend, CudaBackend
from gpubatch.cuda_ops import CudaOps
from gpubatch.launch import host_library
from gpubatch.ops import KINDS, Activation, NumpyOps, Ops, Work, labels_or_rows

__all__ = ["HostOps", "ops_for"]

NUMBERS = {kind: number for number, kind in enumerate(KINDS)}


@functools.cache
def ops_for(backend: Backend, dtype: np.dtype[Any]) -> Ops:
    """The kernels for arrays of ``dtype`` on ``backend``."""
    if isinstance(backend, CudaBackend):
        return CudaOps(backend, dtype)
    library = host_library()
    return NumpyOps() if isinstance(library, str) else HostOps(library)


class HostOps(Ops):
    """``gpubatch._host``, and NumPy for what it declines: arrays that are strided or of another type."""

    def __init__(self, library: Any) -> None:
        self.library, self.numpy = library, NumpyOps()

    def activate(self, f: Activation, x: Array, b: Array | None, y: Array, work: Work) -> None:
        """See :class:`Ops`."""
        if not self.library.activate(NUMBERS[f.kind], f.p, x, b, y, work["slope"] if f.keeps else None):
            self.numpy.activate(f, x, b, y, work)

    def activation_gradient(
        self, f: Activation, y: Array, dy: Array, dx: Array | None, db: Array | None, work: Work
    ) -> None:
        """See :class:`Ops`."""
        kept, partial = work["slope"] if f.keeps else y, work.get("partial")
        if not self.library.activation_gradient(NUMBERS[f.kind], f.p, kept, dy, dx, db, partial):
            self.numpy.activation_gradient(f, y, dy, dx, db, work)

    def softmax_cross_entropy(self, z: Array, Y: Array, gradient: bool, work: Work) -> None:
        """See :class:`Ops`."""
        labels, rows = labels_or_rows(Y, z.dtype, work)
        if not self.library.softmax_cross_entropy(z, labels, rows, work["dz"], work["row"], work["loss"], gradient):
            self.numpy.softmax_cross_entropy(z, Y, gradient, work)

    def svm(self, z: Array, Y: Array, gradient: bool, work: Work) -> None:
        """See :class:`Ops`."""
        labels, _ = labels_or_rows(Y, z.dtype, work)
        if not self.library.svm(z, labels, work["dz"], work["row"], work["loss"], gradient):
            self.numpy.svm(z, Y, gradient, work)

    def sigmoid_cross_entropy(self, z: Array, Y: Array, gradient: bool, work: Work) -> None:
        """See :class:`Ops`; NumPy does it."""
        self.numpy.sigmoid_cross_entropy(z, Y, gradient, work)

    def mse(self, z: Array, Y: Array, gradient: bool, work: Work) -> None:
        """See :class:`Ops`; NumPy does it."""
        self.numpy.mse(z, Y, gradient, work)

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
