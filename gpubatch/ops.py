"""The core's kernels: what a step does besides matrix products, for NumPy, compiled for the CPU, and for CUDA.

:class:`Ops` says what each computes; :func:`ops_for` chooses the form once, for a backend and an element type, in which
batches, parameters and their gradients are stored. All arrays are C-contiguous; nothing is allocated. ``work`` is
workspace by the names that layers and losses give. For float16 the arithmetic is float32, and so are means, variances,
the loss and scratch: what layers ask for as :data:`COMPUTE`.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from gpubatch.backend import Array, compute_dtype

__all__ = [
    "COMPUTE",
    "PARTS",
    "SQUARE_PARTS",
    "SQUARE_SUM_SIZE",
    "SUM_PARTS",
    "Activation",
    "NumpyOps",
    "Ops",
    "normal_tail",
]

Work: TypeAlias = Mapping[str, Array]

COMPUTE = "compute"  # as the dtype of an array of workspace: that of the arithmetic, float32 for float16
PARTS = 64  # partial results of a reduction: a fixed number, so that sums do not depend on how many threads there are
SUM_PARTS = 1024  # likewise for a loss, on a GPU: so many blocks of 256 threads it can run at once
SQUARE_PARTS = 256  # likewise for a sum of squares: so many of 1024 threads
GATHER_BLOCK = 1 << 18  # elements that NumPy gathers, casts and scales at a time
# float64: the sum, how many elements are not finite, the ticket of kernels/last_block.cuh, and the partial results.
SQUARE_SUM_SIZE = 3 + 2 * SQUARE_PARTS


@dataclass(frozen=True)
class Activation:
    """An elementwise function: its ``kind``, a key of :data:`KINDS`, and ``p``, the slope of a leaky ReLU."""

    kind: str
    p: float = 0.0

    @property
    def keeps(self) -> bool:
        """Whether the derivative is kept in ``work["slope"]``; otherwise y tells it."""
        return self.kind in ("gelu", "gelu_tanh")

    @property
    def reads_y(self) -> bool:
        """Whether the derivative is told by y."""
        return not self.keeps and self.kind not in ("identity", "step")

    @property
    def scratch(self) -> dict[str, Any]:
        """The names of the arrays that NumPy works in, and their dtype."""
        if self.kind in ("step", "relu"):
            return {"positive": bool}
        return dict.fromkeys({"gelu": "tu", "gelu_tanh": "tu", "identity": ""}.get(self.kind, "t"), COMPUTE)


IDENTITY = Activation("identity")

# The name in kernels/activations.cuh of every kind.
KINDS = {
    "identity": "Identity",
    "step": "Step",
    "relu": "ReLU",
    "leaky_relu": "LeakyReLU",
    "sigmoid": "Sigmoid",
    "tanh": "Tanh",
    "gelu": "GELU",
    "gelu_tanh": "GELUTanh",
}


class Ops(ABC):
    """The kernels of one backend and element type. x, y, dx, dy are ``(batch, features)``."""

    plain = False  # whether NumPy does the work, in what layers ask for as plain

    # --- activations and biases ---

    @abstractmethod
    def activate(self, f: Activation, x: Array, b: Array | None, y: Array, work: Work) -> None:
        """y = f(x + b), and ``work["slope"]`` = f'(x + b) where ``f.keeps``; b is ``(features,)``. x may be y."""

    @abstractmethod
    def activation_gradient(
        self, f: Activation, y: Array, dy: Array, dx: Array | None, db: Array | None, work: Work
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
    def sigmoid_cross_entropy(self, z: Array, Y: Array, gradient: bool, work: Work) -> None:
        """``work["loss"]`` = -y log σ(z) - (1 - y) log(1 - σ(z)), mean over all elements; ``work["dz"]`` its gradient.

        Y are numbers of any real dtype, as many as there are in z; here and in :meth:`mse` they may be strided.
        """

    @abstractmethod
    def mse(self, z: Array, Y: Array, gradient: bool, work: Work) -> None:
        """``work["loss"]`` = (z - y)², mean over all elements, and its gradient in ``work["dz"]``."""

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

    def activate(self, f: Activation, x: Array, b: Array | None, y: Array, work: Work) -> None:
        """See :class:`Ops`."""
        if b is not None:
            x = np.add(x, b, out=y)
        FORWARD[f.kind](f.p, x, y, work)

    def activation_gradient(
        self, f: Activation, y: Array, dy: Array, dx: Array | None, db: Array | None, work: Work
    ) -> None:
        """See :class:`Ops`."""
        if dx is not None:
            BACKWARD[f.kind](f.p, y, dy, dx, work)
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

    def sigmoid_cross_entropy(self, z: Array, Y: Array, gradient: bool, work: Work) -> None:
        """See :class:`Ops`: L = Σ max(z, 0) - z y + log(1 + exp(-|z|)) / N, σ(z) = exp(min(z, 0)) / (1 + exp(-|z|)).

        So there is no logarithm of zero, and nothing that overflows.
        """
        dz, t, Y = work["dz"], work["t"], Y.reshape(z.shape)
        np.maximum(z, 0, out=dz)
        dz -= np.multiply(z, Y, out=t)
        np.exp(np.negative(np.abs(z, out=t), out=t), out=t)
        dz += np.log1p(t, out=t)
        total(dz, work["loss"], 1 / z.size)
        if gradient:
            np.exp(np.negative(np.abs(z, out=t), out=t), out=t)
            t += 1
            np.exp(np.minimum(z, 0, out=dz), out=dz)
            dz /= t
            dz -= Y
            dz *= 1 / z.size
            scale_gradient(work)

    def mse(self, z: Array, Y: Array, gradient: bool, work: Work) -> None:
        """See :class:`Ops`: dz = 2 (z - y) / N."""
        dz = np.subtract(z, Y.reshape(z.shape), out=work["dz"])
        total(np.multiply(dz, dz, out=work["t"]), work["loss"], 1 / z.size)
        if gradient:
            dz *= 2 / z.size
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


# Forward and backward of each kind: (p, x, y, work) and (p, y, dy, dx, work).


def _step(p: float, x: Array, y: Array, work: Work) -> None:
    y[...] = np.greater(x, 0, out=work["positive"])


def _step_gradient(p: float, y: Array, dy: Array, dx: Array, work: Work) -> None:
    dx.fill(0)


def _relu(p: float, x: Array, y: Array, work: Work) -> None:
    np.maximum(x, 0, out=y)


def _relu_gradient(p: float, y: Array, dy: Array, dx: Array, work: Work) -> None:
    # Twice as fast in NumPy as a masked copy, or as a mask of floats.
    np.multiply(dy, np.greater(y, 0, out=work["positive"]), out=dx)


def _leaky_relu(p: float, x: Array, y: Array, work: Work) -> None:
    np.maximum(x, np.multiply(x, p, out=work["t"]), out=y)


def _leaky_relu_gradient(p: float, y: Array, dy: Array, dx: Array, work: Work) -> None:
    t = np.greater(y, 0, out=work["t"])
    t *= 1 - p
    t += p
    np.multiply(dy, t, out=dx)


def _sigmoid(p: float, x: Array, y: Array, work: Work) -> None:
    # Far below zero exp overflows to infinity, and y is the 0 that it should be.
    np.exp(np.negative(x, out=y), out=y)
    y += 1
    np.reciprocal(y, out=y)


def _sigmoid_gradient(p: float, y: Array, dy: Array, dx: Array, work: Work) -> None:
    t = np.subtract(1, y, out=work["t"])
    t *= y
    np.multiply(dy, t, out=dx)


def _tanh(p: float, x: Array, y: Array, work: Work) -> None:
    np.tanh(x, out=y)


def _tanh_gradient(p: float, y: Array, dy: Array, dx: Array, work: Work) -> None:
    t = np.multiply(y, y, out=work["t"])
    np.multiply(dy, np.subtract(1, t, out=t), out=dx)


def _gelu(p: float, x: Array, y: Array, work: Work) -> None:
    slope, t, u = work["slope"], work["t"], work["u"]
    a, b, c, coefficients = normal_tail(x.dtype.name)
    np.multiply(x, x, out=slope)
    slope *= -0.5
    np.exp(slope, out=slope)
    np.abs(x, out=t)
    t *= c
    t += 1
    np.divide(a, t, out=t)
    t += b
    np.multiply(t, coefficients[0], out=u)
    for coefficient in coefficients[1:-1]:
        u += coefficient
        u *= t
    u += coefficients[-1]
    u *= slope  # Φ(-|x|)
    np.subtract(0.5, u, out=u)
    np.copysign(u, x, out=u)
    u += 0.5  # Φ(x)
    slope *= 1 / math.sqrt(2 * math.pi)
    slope *= x
    slope += u
    np.multiply(x, u, out=y)


def _gelu_tanh(p: float, x: Array, y: Array, work: Work) -> None:
    k, cubic = math.sqrt(2 / math.pi), 0.044715
    slope, t, u = work["slope"], work["t"], work["u"]
    np.multiply(x, x, out=t)
    np.multiply(t, 3 * k * cubic, out=slope)
    slope += k
    t *= k * cubic
    t += k
    t *= x
    np.tanh(t, out=t)
    np.multiply(t, t, out=u)
    np.subtract(1, u, out=u)
    u *= x
    slope *= u
    t += 1
    slope += t
    slope *= 0.5
    t *= 0.5
    np.multiply(x, t, out=y)


def _kept_gradient(p: float, y: Array, dy: Array, dx: Array, work: Work) -> None:
    np.multiply(dy, work["slope"], out=dx)


def _identity(p: float, x: Array, y: Array, work: Work) -> None:
    if y is not x:
        y[...] = x


def _identity_gradient(p: float, y: Array, dy: Array, dx: Array, work: Work) -> None:
    if dx is not dy:
        dx[...] = dy


FORWARD: dict[str, Callable[[float, Array, Array, Work], None]] = {
    "identity": _identity,
    "step": _step,
    "relu": _relu,
    "leaky_relu": _leaky_relu,
    "sigmoid": _sigmoid,
    "tanh": _tanh,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
}
BACKWARD: dict[str, Callable[[float, Array, Array, Array, Work], None]] = {
    "identity": _identity_gradient,
    "step": _step_gradient,
    "relu": _relu_gradient,
    "leaky_relu": _leaky_relu_gradient,
    "sigmoid": _sigmoid_gradient,
    "tanh": _tanh_gradient,
    "gelu": _kept_gradient,
    "gelu_tanh": _kept_gradient,
}


def workspace_dtype(wanted: Any, storage: np.dtype[Any]) -> np.dtype[Any]:
    """The dtype of an array of workspace, where None asks for ``storage`` and :data:`COMPUTE` for its arithmetic's."""
    if wanted is None:
        return storage
    return compute_dtype(storage) if isinstance(wanted, str) and wanted == COMPUTE else np.dtype(wanted)


def labels_or_rows(Y: Array, dtype: np.dtype[Any], work: Work) -> tuple[Array, Array]:
    """Y as kernels take it, (labels, None) or (None, rows): itself, or copied to where work has room for it."""
    if Y.ndim == 1 and Y.dtype == np.int64 and Y.flags.c_contiguous:
        return Y, None
    if Y.ndim > 1 and Y.dtype == dtype and Y.flags.c_contiguous:
        return None, Y
    copy = work["index" if Y.ndim == 1 else "t"]
    copy[...] = Y
    return (copy, None) if Y.ndim == 1 else (None, copy)


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


@functools.cache
def normal_tail(dtype: str) -> tuple[float, float, float, tuple[float, ...]]:
    """(a, b, c, coefficients) such that Φ(-x) = exp(-x²/2) P(a/(1 + c x) + b) for x >= 0; P from its highest power.

    NumPy has no error function. The ratio of the tail to exp(-x²/2) is smooth in 1/(1 + c x), so a Chebyshev
    interpolation through ``math.erfc`` is accurate to 4e-15 in float64 and 3e-8 in float32, and needs no branch.
    """
    degree, limit = {"float32": (8, 14.0), "float64": (19, 37.0)}[dtype]  # beyond the limit exp(-x²/2) is zero
    c = 0.25
    least = 1 / (1 + c * limit)
    a, b = 2 / (1 - least), -(1 + least) / (1 - least)  # takes least..1 to -1..1

    chebyshev = np.polynomial.chebyshev
    nodes = chebyshev.chebpts1(degree + 1)
    x = (a / (nodes - b) - 1) / c
    ratio = [0.5 * math.erfc(v / math.sqrt(2)) * math.exp(v * v / 2) for v in x]
    series = chebyshev.chebfit(nodes, ratio, degree)  # as many nodes as coefficients: through every one
    return a, b, c, tuple(chebyshev.cheb2poly(series)[::-1].tolist())


def normal_tail_source(dtype: str) -> str:
    """:func:`normal_tail` as a function in C, for the GELU of ``kernels/activations.cuh``."""
    a, b, c, coefficients = normal_tail(dtype)
    steps = "".join(f"    p = p * v + T({x!r});\n" for x in coefficients[1:])
    return (
        "__device__ inline T normal_tail(T x) {\n"
        f"    const T v = T({a!r}) / (1 + T({c!r}) * x) + T({b!r});\n"
        f"    T p = T({coefficients[0]!r});\n{steps}    return p;\n}}\n"
    )
