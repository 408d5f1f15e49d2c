"""The core's kernels: what a step does besides matrix products, for NumPy, compiled for the CPU, and for CUDA.

:class:`Ops` says what each computes; :func:`ops_for` chooses the form once, for a backend and an element type, in which
batches, parameters and their gradients are stored. All arrays are C-contiguous; nothing is allocated. ``work`` is
workspace by the names that layers and losses give. For float16 the arithmetic is float32, and so are means, variances,
the loss and scratch: what layers ask for as :data:`COMPUTE`.
"""

from __future__ import annotations

import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np

from gpubatch.backend import Array, compute_dtype
from gpubatch.formula import BoundActivation, BoundScoreLoss, activations
from gpubatch.ops.program import Program, bound_program

__all__ = ["COMPUTE", "IDENTITY", "PARTS", "SQUARE_PARTS", "SQUARE_SUM_SIZE", "SUM_PARTS", "NumpyOps", "Ops"]

Work: TypeAlias = Mapping[str, Array]

COMPUTE = "compute"  # as the dtype of an array of workspace: that of the arithmetic, float32 for float16
PARTS = 64  # partial results of a reduction: a fixed number, so that sums do not depend on how many threads there are
SUM_PARTS = 1024  # likewise for a loss, on a GPU: so many blocks of 256 threads it can run at once
SQUARE_PARTS = 256  # likewise for a sum of squares: so many of 1024 threads
MOST_PROGRAMS = 256  # that are kept for a thread: every activation with every value of its parameters is another one
GATHER_BLOCK = 1 << 18  # elements that NumPy gathers, casts and scales at a time
# float64: the sum, how many elements are not finite, the ticket of kernels/last_block.cuh, and the partial results.
SQUARE_SUM_SIZE = 3 + 2 * SQUARE_PARTS


IDENTITY = activations.identity.bind()


class Ops(ABC):
    """The kernels of one backend and element type. x, y, dx, dy are ``(batch, features)``."""

    plain = False  # whether NumPy does the work, in what layers ask for as plain

    # --- activations and biases ---

    @abstractmethod
    def activate(self, f: BoundActivation, x: Array, b: Array | None, y: Array, work: Work) -> None:
        """y = f(x + b), and ``work["slope"]`` = f'(x + b) where ``f.keeps``; b is ``(features,)``. x may be y."""

    @abstractmethod
    def activation_gradient(
        self, f: BoundActivation, y: Array, dy: Array, dx: Array | None, db: Array | None, work: Work
    ) -> None:
        """dx = dy f'(x + b), by y or ``work["slope"]``, and db = Σ dx over the rows, or None.

        dx may be dy; with the identity it may be None. ``work["partial"]`` is scratch, (PARTS, features).
        """

    # --- losses: with ``work["factor"]``, of one element, the gradient is multiplied by it before it is stored.
    # ``work["ticket"]``, a uint32, is zero at first; no other kernel may use it at the same time ---

    @abstractmethod
    def softmax_cross_entropy(self, z: Array, Y: Array, gradient: bool, work: Work) -> None:
        """``work["loss"]`` = -Σ_j y_j log softmax(z)_j, mean over the batch, and its gradient in ``work["dz"]``.

        Y are labels ``(batch,)`` of any integer type, or numbers of the shape of z. A label that is out of range makes
        the loss NaN.
        """

    @abstractmethod
    def svm(self, z: Array, Y: Array, gradient: bool, work: Work) -> None:
        """``work["loss"]`` = Σ_{j≠y} max(0, z_j - z_y + 1), mean over the batch, and its gradient in ``work["dz"]``."""

    @abstractmethod
    def score_loss(self, f: BoundScoreLoss, z: Array, Y: Array, gradient: bool, work: Work) -> None:
        """``work["loss"]`` = f(z, y), mean over all elements, and its gradient in ``work["dz"]``.

        Y are numbers of any real dtype, as many as there are in z; they may be strided.
        """

    @abstractmethod
    def l2_loss(self, w: Array, spans: Array, factor: float, loss: Array, work: Work) -> None:
        """loss += factor Σ w² over parts of the flat buffer w.

        spans is int64, (parts, 2): where each begins and where it ends. loss is of one element.
        """

    @abstractmethod
    def l2_gradient(self, w: Array, spans: Array, factor: float, g: Array, work: Work) -> None:
        """g += factor w on the same parts of both."""

    # --- batch norm ---

    @abstractmethod
    def normalise(
        self, x: Array, mean: Array, var: Array, eps: float, gamma: Array, beta: Array, y: Array, work: Work
    ) -> None:
        """y = gamma n + beta, n = (x - mean)/sqrt(var + eps), each row for itself. x may be y."""

    @abstractmethod
    def batch_norm(self, x: Array, eps: float, gamma: Array, beta: Array, y: Array, work: Work) -> None:
        """:meth:`normalise` by the batch's mean and biased variance, which go to ``work["mean"]`` and ``["var"]``.

        n goes to ``work["normal"]``, 1/sqrt(var + eps) to ``work["inverse"]``. x may be y.
        """

    @abstractmethod
    def batch_norm_gradient(
        self, dy: Array, gamma: Array, dgamma: Array, dbeta: Array, dx: Array | None, work: Work
    ) -> None:
        """dbeta = Σ dy, dgamma = Σ dy n, dx = gamma/sqrt(var + eps) (dy - dbeta/m - n dgamma/m). dx may be dy.

        n and 1/sqrt(var + eps) are in ``work`` from :meth:`batch_norm`; n may be overwritten. ``work["partial"]`` of
        both is scratch, (2 PARTS, features).
        """

    @abstractmethod
    def move(self, running: Array, new: Array, weight: float, factor: float, work: Work) -> None:
        """running = (1 - weight) running + weight factor new, of ``(features,)``."""

    # --- dropout ---

    @abstractmethod
    def dropout(
        self, x: Array, y: Array, rate: float, key: tuple[int, int], step: int | Array, first: int, work: Work
    ) -> None:
        """y = x mask, ``work["mask"]`` = 1/(1 - rate) where a uniform number is not below the rate, else 0.

        The numbers are float32 of Philox4x64-10 with the key (seed, layer) and the counter (0, step, 0, 0), from number
        ``first`` on. x may be y. On a GPU the step may be one uint64 there, read when the kernel runs.
        """

    @abstractmethod
    def dropout_gradient(self, dy: Array, dx: Array, work: Work) -> None:
        """dx = dy ``work["mask"]``. dx may be dy."""

    # --- over everything ---

    @abstractmethod
    def square_sum(self, x: Array, out: Array) -> None:
        """``out[0]`` += Σ x², in double precision, and ``out[1]`` += how many elements of x are not finite.

        out is float64 of :data:`SQUARE_SUM_SIZE`, zero at first; what comes after the first two is the kernels' own.
        Always the same bits.
        """

    @abstractmethod
    def gather(self, source: Array, index: Array, out: Array, scale: float, shift: float) -> None:
        """out = scale * source[index] + shift; source is (samples, ...) of any real dtype, index int64 and in range."""


# --- NumPy -----------------------------------------------------------------------------------------------------------


class NumpyOps(Ops):
    """The reference: the formulas as NumPy calls, one pass each."""

    plain = True

    def __init__(self) -> None:
        self._local = threading.local()  # the registers of a program are for one thread

    def _program(self, f: BoundActivation | BoundScoreLoss, form: str, dtype: np.dtype[Any], *same: str) -> Program:
        """One form of a formula for arrays of ``dtype``, in which the arrays named in ``same`` are one."""
        if not hasattr(self._local, "programs"):
            self._local.programs = {}
        programs: dict[Any, Program] = self._local.programs
        key = f, form, dtype, same
        if key not in programs:
            if len(programs) >= MOST_PROGRAMS:
                programs.clear()
            if isinstance(f, BoundScoreLoss):
                trace = f.loss.form(dtype.name, form)
            else:
                trace = getattr(f.activation.form(dtype.name), form)
            programs[key] = bound_program(f, trace, {same[0]: same[1]} if same else None)
        return programs[key]

    def activate(self, f: BoundActivation, x: Array, b: Array | None, y: Array, work: Work) -> None:
        """See :class:`Ops`."""
        if b is not None:
            x = np.add(x, b, out=y)
        if f == IDENTITY and x is y:
            return
        kept = [work["slope"]] if f.keeps else []
        if x is y or np.may_share_memory(x, y):
            self._program(f, "forward", y.dtype, "y", "x").run(y, *kept)
        else:
            self._program(f, "forward", y.dtype).run(x, y, *kept)

    def activation_gradient(
        self, f: BoundActivation, y: Array, dy: Array, dx: Array | None, db: Array | None, work: Work
    ) -> None:
        """See :class:`Ops`."""
        if dx is not None:
            kept = [work["slope"]] if f.keeps else [y] if f.reads_y else []
            if dx is dy or np.may_share_memory(dx, dy):
                self._program(f, "backward", dx.dtype, "dx", "dy").run(*kept, dx)
            else:
                self._program(f, "backward", dx.dtype).run(*kept, dy, dx)
            dy = dx
        if db is not None:
            dy.sum(axis=0, out=db)

    def softmax_cross_entropy(self, z: Array, Y: Array, gradient: bool, work: Work) -> None:
        """See :class:`Ops`; the largest exponential is 1, so the logarithm is finite."""
        dz, row, sums, log, index = (work[name] for name in ("dz", "row", "sum", "log", "index"))
        if Y.ndim == 1 and not labels_fit(Y, z, work):
            return
        z.max(axis=1, out=row)
        np.subtract(z, row[:, None], out=dz)
        if Y.ndim == 1:
            places_of(Y, work)
            take(dz, index, row)
        else:
            np.multiply(dz, Y, out=work["t"]).sum(axis=1, out=row)
        np.exp(dz, out=dz)
        dz.sum(axis=1, out=sums)
        np.log(sums, out=log)
        if Y.ndim == 2:
            log *= Y.sum(axis=1, dtype=z.dtype, out=work["weight"])
        total(np.subtract(log, row, out=log), work["loss"], 1 / len(z))
        if not gradient:
            return
        np.divide(1 / len(z), sums, out=row)
        if Y.ndim == 1:
            dz *= row[:, None]
            take(dz, index, row)
            row -= 1 / len(z)
            dz.reshape(-1)[index] = row
        else:
            row *= work["weight"]
            dz *= row[:, None]
            t = work["t"]
            t[...] = Y  # into the scores' dtype before anything is rounded
            t *= 1 / len(z)
            dz -= t
        scale_gradient(work)

    def svm(self, z: Array, Y: Array, gradient: bool, work: Work) -> None:
        """See :class:`Ops`: dz_j = 1/n for a violated margin, dz_y = -(how many there are)/n."""
        dz, row, index = work["dz"], work["row"], work["index"]
        if not labels_fit(Y, z, work):
            return
        places_of(Y, work)
        take(z, index, row)
        np.subtract(z, row[:, None], out=dz)
        dz += 1
        np.maximum(dz, 0, out=dz)
        dz.reshape(-1)[index] = 0
        total(dz, work["loss"], 1 / len(z))
        if gradient:
            np.sign(dz, out=dz)  # margins are not negative, so this is 1 where one is violated
            dz.sum(axis=1, out=row)
            dz.reshape(-1)[index] = np.negative(row, out=row)
            dz *= 1 / len(z)
            scale_gradient(work)

    def score_loss(self, f: BoundScoreLoss, z: Array, Y: Array, gradient: bool, work: Work) -> None:
        """See :class:`Ops`; dz holds the losses of the scores before it holds their gradient."""
        dz, Y = work["dz"], Y.reshape(z.shape)
        self._program(f, "loss", z.dtype).run(z, Y, dz)
        total(dz, work["loss"], 1 / z.size)
        if gradient:
            self._program(f, "dz", z.dtype).run(z, Y, dz)
            dz *= 1 / z.size
            scale_gradient(work)

    def l2_loss(self, w: Array, spans: Array, factor: float, loss: Array, work: Work) -> None:
        """See :class:`Ops`; BLAS does the sums."""
        for start, stop in spans.tolist():
            part = w[start:stop]
            term = np.matmul(part[None], part[:, None], out=work["squares"])[0]
            term *= factor
            loss += term

    def l2_gradient(self, w: Array, spans: Array, factor: float, g: Array, work: Work) -> None:
        """See :class:`Ops`; as much at a time as ``work["l2"]`` has room for."""
        block, factor = work["l2"], factor * work["factor"].item() if "factor" in work else factor
        for first, last in spans.tolist():
            for start in range(first, last, block.size):
                stop = min(start + block.size, last)
                piece = g[start:stop]
                piece += np.multiply(w[start:stop], factor, out=block[: stop - start])

    def normalise(
        self, x: Array, mean: Array, var: Array, eps: float, gamma: Array, beta: Array, y: Array, work: Work
    ) -> None:
        """See :class:`Ops`."""
        np.subtract(x, mean, out=y)
        y *= inverse_root(var, eps, work["inverse"])
        y *= gamma
        y += beta

    def batch_norm(self, x: Array, eps: float, gamma: Array, beta: Array, y: Array, work: Work) -> None:
        """See :class:`Ops`."""
        normal, mean, var = work["normal"], work["mean"], work["var"]
        x.sum(axis=0, out=mean)
        mean *= 1 / len(x)
        np.subtract(x, mean, out=normal)
        np.multiply(normal, normal, out=y).sum(axis=0, out=var)
        var *= 1 / len(x)
        normal *= inverse_root(var, eps, work["inverse"])
        np.multiply(normal, gamma, out=y)
        y += beta

    def batch_norm_gradient(
        self, dy: Array, gamma: Array, dgamma: Array, dbeta: Array, dx: Array | None, work: Work
    ) -> None:
        """See :class:`Ops`."""
        normal, row, m = work["normal"], work["row"], len(dy)
        np.multiply(dy, normal, out=work["t"]).sum(axis=0, out=dgamma)
        dy.sum(axis=0, out=dbeta)
        if dx is not None:
            normal *= np.multiply(dgamma, 1 / m, out=row)
            np.subtract(dy, np.multiply(dbeta, 1 / m, out=row), out=dx)
            dx -= normal
            dx *= np.multiply(gamma, work["inverse"], out=row)

    def move(self, running: Array, new: Array, weight: float, factor: float, work: Work) -> None:
        """See :class:`Ops`."""
        running *= 1 - weight
        running += np.multiply(new, weight * factor, out=work["row"])

    def dropout(
        self, x: Array, y: Array, rate: float, key: tuple[int, int], step: int | Array, first: int, work: Work
    ) -> None:
        """See :class:`Ops`."""
        uniform, mask = work["uniform"], work["mask"]
        generator = philox_generator(*key, np.array([first // 8, step, 0, 0], np.uint64))  # eight to a counter
        generator.random(first % 8, np.float32)
        generator.random(out=uniform, dtype=np.float32)
        np.greater_equal(uniform, rate, out=mask)
        mask *= 1 / (1 - rate)
        np.multiply(x, mask, out=y)

    def dropout_gradient(self, dy: Array, dx: Array, work: Work) -> None:
        """See :class:`Ops`."""
        np.multiply(dy, work["mask"], out=dx)

    def square_sum(self, x: Array, out: Array) -> None:
        """See :class:`Ops`; a cache-sized block after another."""
        x, block = x.reshape(-1), 1 << 14
        for start in range(0, x.size, block):
            piece = x[start : start + block].astype(np.float64)
            out[0] += np.dot(piece, piece)
            out[1] += piece.size - np.count_nonzero(np.isfinite(piece))

    def gather(self, source: Array, index: Array, out: Array, scale: float, shift: float) -> None:
        """See :class:`Ops`; a few rows at a time, so that the passes (gather, cast, scale) meet in the cache.

        uint8 to scaled float32, batch 1024 x 784, Xeon (Sapphire Rapids, 2 MB of second-level cache): 0.30 ns an
        element, in one piece 0.40.
        """
        rows = max(1, GATHER_BLOCK // max(1, math.prod(source.shape[1:])))
        for start in range(0, len(index), rows):
            part = out[start : start + rows]
            part[...] = source.take(index[start : start + rows], axis=0)
            if scale != 1:
                part *= scale
            if shift != 0:
                part += shift


def workspace_dtype(wanted: Any, storage: np.dtype[Any]) -> np.dtype[Any]:
    """The dtype of an array of workspace, where None asks for ``storage`` and :data:`COMPUTE` for its arithmetic's."""
    if wanted is None:
        return storage
    return compute_dtype(storage) if isinstance(wanted, str) and wanted == COMPUTE else np.dtype(wanted)


def labels_or_rows(Y: Array, work: Work) -> tuple[Array, Array]:
    """Y as kernels take it, (labels, None) or (None, rows): itself, or copied to where work has room for it."""
    if Y.ndim == 1 and Y.dtype == np.int64 and Y.flags.c_contiguous:
        return Y, None
    if Y.ndim > 1:
        return None, rows_of(Y, Y, work)
    index = work["index"]
    index[...] = Y
    return index, None


def rows_of(Y: Array, z: Array, work: Work) -> Array:
    """Y, contiguous, in the shape of z and the dtype of ``work["t"]``: itself, or copied there."""
    t = work["t"]
    if Y.dtype == t.dtype and Y.flags.c_contiguous:
        return Y
    t[...] = Y.reshape(z.shape)
    return t


def scale_gradient(work: Work) -> None:
    """Multiply the gradient of a loss by ``work["factor"]``, if there is one."""
    if "factor" in work:
        dz = work["dz"]
        dz *= work["factor"]


def total(x: Array, out: Array, scale: float) -> None:
    """Write scale * Σ x to ``out``, of one element."""
    x.reshape(-1).sum(keepdims=True, out=out)
    out *= scale


def labels_fit(labels: Array, z: Array, work: Work) -> bool:
    """Whether all labels are columns of z; the loss is NaN if not."""
    if labels.min() >= 0 and labels.max() < z.shape[1]:
        return True
    work["loss"].fill(math.nan)
    work["dz"].fill(math.nan)
    return False


def places_of(labels: Array, work: Work) -> None:
    """Write to ``work["index"]`` where the score of each row's label stands among all scores."""
    index = work["index"]
    index[...] = labels  # any integer type becomes int64 here
    index += work["offsets"]


def take(x: Array, index: Array, out: Array) -> None:
    """``out = x.reshape(-1)[index]``."""
    x.reshape(-1).take(index, out=out, mode="clip")  # the other mode makes NumPy fill a copy of out first


def inverse_root(var: Array, eps: float, out: Array) -> Array:
    """``out = 1/sqrt(var + eps)``."""
    np.add(var, eps, out=out)
    return np.reciprocal(np.sqrt(out, out=out), out=out)


def philox_generator(seed: int, index: int, counter: Array | int = 0) -> np.random.Generator:
    """The random numbers of one layer; of a list of large integers NumPy would make floats, so the key is an array."""
    return np.random.Generator(np.random.Philox(key=np.array([seed, index], np.uint64), counter=counter))
