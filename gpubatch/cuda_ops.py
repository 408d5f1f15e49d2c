"""The core's kernels on CUDA: what is in ``kernels/``, compiled when it is first needed, launched and not waited for.

Nothing is read back and no memory is taken, so every method may be captured in a graph. Sums have the same bits every
time: their order depends on shapes alone.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np

from gpubatch.backend import Array, CudaBackend, compute_dtype, describe
from gpubatch.errors import DTypeError, ShapeError
from gpubatch.launch import C_TYPES, cuda_kernel, kernel_source
from gpubatch.ops import IDENTITY, KINDS, PARTS, SUM_PARTS, Activation, Ops, Work, labels_or_rows, normal_tail_source

__all__ = ["CudaOps"]

THREADS = 256
MOST_THREADS = 1024
SUM_THREADS = 512  # of kernels/total.cuh; exp and log1p in double precision need more registers than 1024 would have
WARP = 32
AT_ONCE = 4  # of kernels/block.cuh
WIDEST = 32  # columns of a tile: what a warp reads of a row is then one 128-byte line
MOST_BLOCKS = 1 << 14  # far more than run at a time on any device
WARP_CLASSES = 256  # up to which a warp has a row of scores for itself
BLOCK_CLASSES = 4096  # from which a block of the most threads has it

# The C type of every element type in which samples may lie in their source.
STORED = {
    "bool": "bool",
    "int8": "signed char",
    "int16": "short",
    "int32": "int",
    "int64": "long long",
    "uint8": "unsigned char",
    "uint16": "unsigned short",
    "uint32": "unsigned int",
    "uint64": "unsigned long long",
    "float16": "Half",
    "float32": "float",
    "float64": "double",
}


class CudaOps(Ops):
    """Launches on the current stream of ``backend``, whose scope the caller has entered."""

    def __init__(self, backend: CudaBackend, dtype: np.dtype[Any]) -> None:
        self.backend, self.dtype, self.compute = backend, dtype, compute_dtype(dtype)

    def activate(self, f: Activation, x: Array, b: Array | None, y: Array, work: Work) -> None:
        """See :class:`Ops`; one launch."""
        check_contiguous("x", x)
        slope = work["slope"] if f.keeps else None
        self._on_tiles(activation_source(self.dtype.name, f.kind), "activate", x.shape, (x, b, y, slope), (f.p,))

    def activation_gradient(
        self, f: Activation, y: Array, dy: Array, dx: Array | None, db: Array | None, work: Work
    ) -> None:
        """See :class:`Ops`; one pass over dy, and one more launch where there are many rows to sum."""
        if dx is None:
            f = IDENTITY
        source = activation_source(self.dtype.name, f.kind)
        kept = work["slope"] if f.keeps else y
        if db is None:
            self._on_tiles(source, "activation_gradient", dy.shape, (kept, dy, dx, None, None), (f.p,))
            return
        alone = tiles(dy.shape, PARTS)[1][1] == 1  # one part is the sum itself
        partial = None if alone else work["partial"]
        arrays = (kept, dy, dx, partial, db if alone else None)
        parts = self._on_tiles(source, "activation_gradient", dy.shape, arrays, (f.p,), PARTS)
        if not alone:
            self._add_partial(partial, parts, 1.0, db)

    def softmax_cross_entropy(self, z: Array, Y: Array, gradient: bool, work: Work) -> None:
        """See :class:`Ops`; a label out of range makes NaN of the loss and of its row of the gradient."""
        self._over_rows("softmax_cross_entropy", z, labels_or_rows(Y, self.compute, work), gradient, work)

    def svm(self, z: Array, Y: Array, gradient: bool, work: Work) -> None:
        """See :class:`Ops`; a label out of range makes NaN of the loss and of its row of the gradient."""
        self._over_rows("svm", z, labels_or_rows(Y, self.compute, work)[:1], gradient, work)

    def sigmoid_cross_entropy(self, z: Array, Y: Array, gradient: bool, work: Work) -> None:
        """See :class:`Ops`; one launch, and one more where there are many scores."""
        self._over_scores("sigmoid_cross_entropy", z, Y, gradient, work)

    def mse(self, z: Array, Y: Array, gradient: bool, work: Work) -> None:
        """See :class:`Ops`; one launch, and one more where there are many scores."""
        self._over_scores("mse", z, Y, gradient, work)

    def l2_loss(self, w: Array, spans: Array, factor: float, loss: Array, work: Work) -> None:
        """See :class:`Ops`; one launch for all parts, and one more where w is large."""
        source = source_of(self.dtype.name, "total.cuh", "l2.cu")
        self._total(source, "l2_loss", w.size, (w, spans, len(spans)), work["parts"], loss, factor, add=True)

    def l2_gradient(self, w: Array, spans: Array, factor: float, g: Array, work: Work) -> None:
        """See :class:`Ops`; one launch for all parts."""
        source = source_of(self.dtype.name, "total.cuh", "l2.cu")
        arguments = (w, spans, len(spans), g, work.get("factor"), factor)
        self._launch(source, "l2_gradient", (blocks_for(w.size),), THREADS, *arguments)

    def normalise(
        self, x: Array, mean: Array, var: Array, eps: float, gamma: Array, beta: Array, y: Array, work: Work
    ) -> None:
        """See :class:`Ops`; one launch."""
        check_contiguous("x", x)
        source = source_of(self.dtype.name, "batch_norm.cu")
        self._on_tiles(source, "normalise", x.shape, (x, mean, var, gamma, beta, y, None, None), (eps,))

    def batch_norm(self, x: Array, eps: float, gamma: Array, beta: Array, y: Array, work: Work) -> None:
        """See :class:`Ops`; two launches for the mean, two for the deviations from it, and one to normalise."""
        check_contiguous("x", x)
        source = source_of(self.dtype.name, "batch_norm.cu")
        mean, var, partial = work["mean"], work["var"], work["partial"]
        for middle, out in ((None, mean), (mean, var)):
            parts = self._on_tiles(source, "moment", x.shape, (x, middle, partial), (), PARTS)
            self._add_partial(partial, parts, 1 / len(x), out)
        arrays = (x, mean, var, gamma, beta, y, work["normal"], work["inverse"])
        self._on_tiles(source, "normalise", x.shape, arrays, (eps,))

    def batch_norm_gradient(
        self, dy: Array, gamma: Array, dgamma: Array, dbeta: Array, dx: Array | None, work: Work
    ) -> None:
        """See :class:`Ops`; two launches for both sums, and one for dx."""
        source = source_of(self.dtype.name, "batch_norm.cu")
        normal, partial = work["normal"], work["partial"]
        parts = self._on_tiles(source, "gradient_sums", dy.shape, (normal, dy, partial), (), PARTS)
        self._add_partial(partial, parts, 1.0, dgamma, dbeta)
        if dx is not None:
            arrays = (normal, dy, gamma, work["inverse"], dgamma, dbeta, dx)
            self._on_tiles(source, "gradient", dy.shape, arrays, (1 / len(dy),))

    def move(self, running: Array, new: Array, weight: float, factor: float, work: Work) -> None:
        """See :class:`Ops`; one launch."""
        source = source_of(self.dtype.name, "batch_norm.cu")
        blocks = max(1, -(-running.size // THREADS))
        self._launch(source, "move", (blocks,), THREADS, running, new, running.size, 1 - weight, weight * factor)

    def dropout(
        self, x: Array, y: Array, rate: float, key: tuple[int, int], step: int | Array, first: int, work: Work
    ) -> None:
        """See :class:`Ops`; one launch, and no uniform numbers in memory."""
        check_contiguous("x", x)
        source = source_of(self.dtype.name, "philox.cuh", "dropout.cu")
        numbers = first % 8 + x.size  # a thread makes eight numbers at a time, the first ones maybe for nobody
        blocks = max(1, min(-(-numbers // (8 * THREADS)), MOST_BLOCKS))
        steps = (np.uint64(step), None) if isinstance(step, int) else (np.uint64(0), step)
        philox = (np.uint64(key[0]), np.uint64(key[1]), *steps, np.uint64(first))
        arguments = (x, y, work["mask"], x.size, *philox, np.float32(rate), 1 / (1 - rate))
        self._launch(source, "dropout", (blocks,), THREADS, *arguments)

    def dropout_gradient(self, dy: Array, dx: Array, work: Work) -> None:
        """See :class:`Ops`; one launch."""
        source = source_of(self.dtype.name, "philox.cuh", "dropout.cu")
        self._launch(source, "dropout_gradient", (blocks_for(dy.size),), THREADS, dy, work["mask"], dx, dy.size)

    def square_sum(self, x: Array, out: Array) -> None:
        """See :class:`Ops`; two launches."""
        source = source_of(self.dtype.name, "square_sum.cu")
        piece = MOST_THREADS * AT_ONCE * (16 // self.dtype.itemsize)
        blocks = max(1, min(-(-x.size // piece), PARTS))
        self._launch(source, "square_sum", (blocks,), MOST_THREADS, x, out, x.size)
        self._launch(source, "add_to_square_sum", (1,), PARTS, out, blocks)

    def gather(self, source: Array, index: Array, out: Array, scale: float, shift: float) -> None:
        """See :class:`Ops`; one launch."""
        self.gather_batch(source, index, None, out, scale, shift)

    def gather_batch(
        self, source: Array, order: Array, batch: Array | None, out: Array, scale: float, shift: float, size: int = 0
    ) -> None:
        """out = scale * source[index] + shift for one of the batches of ``size`` of which ``order`` is the index.

        Which one, the kernel finds in ``batch``, an int64 on the device; without it the first.
        """
        check_contiguous("source", source)
        check_contiguous("out", out)
        if source.dtype.name not in STORED:
            raise DTypeError(f"source must have one of the dtypes {', '.join(STORED)}, got {describe(source)}")
        shape = (len(out), math.prod(source.shape[1:]))
        text = gather_source(self.dtype.name, source.dtype.name)
        self._on_tiles(text, "gather", shape, (source, order, batch, out), (size, scale, shift))

    def take_batch(self, source: Array, order: Array, batch: Array, out: Array, size: int) -> None:
        """As :meth:`gather_batch`, but elements stay as they are stored, or become int64 where out is; one launch."""
        shape = (len(out), math.prod(source.shape[1:]))
        types = f"typedef {STORED[source.dtype.name]} Sample;\ntypedef {STORED[out.dtype.name]} Target;"
        text = source_of(self.dtype.name, "take.cu", before=types)
        self._on_tiles(text, "take", shape, (source, order, batch, out), (size,))

    def _add_partial(self, partial: Array, parts: int, factor: float, out: Array, second: Array | None = None) -> None:
        """``out`` = factor times the sums in ``parts`` rows of ``partial``; those of ``second`` stand beside them."""
        source, features = source_of(out.dtype.name, "columns.cu"), out.size
        shape = (parts, features if second is None else 2 * features)
        self._on_tiles(source, "add_partial", shape, (partial, out, second), (features, factor), 1)

    def _over_rows(self, name: str, z: Array, truth: tuple[Array | None, ...], gradient: bool, work: Work) -> None:
        """A kernel of loss.cu, with a warp for a row of few scores and otherwise a block; then the mean."""
        source = source_of(self.dtype.name, "loss.cu")
        (rows, classes), losses = z.shape, work["row"]
        threads = THREADS if classes < BLOCK_CLASSES else MOST_THREADS
        team = WARP if classes <= WARP_CLASSES else threads
        blocks = min(-(-rows * team // threads), MOST_BLOCKS)
        dz = work["dz"] if gradient else None
        arrays = (z, *truth, dz, losses, work.get("factor"))
        self._launch(source, name, (blocks,), threads, *arrays, rows, classes, team, 1 / rows)
        self._launch(source, "mean", (1,), MOST_THREADS, losses, work["loss"], rows)

    def _over_scores(self, name: str, z: Array, Y: Array, gradient: bool, work: Work) -> None:
        """A kernel of score_loss.cu, which reads targets of any dtype where they are."""
        if not Y.flags.c_contiguous:
            work["t"][...] = Y.reshape(z.shape)
            Y = work["t"]
        source = score_source(self.dtype.name, Y.dtype.name)
        arrays = (z, Y, work["dz"] if gradient else None, work.get("factor"), z.size)
        self._total(source, name, z.size, arrays, work["parts"], work["loss"], 1 / z.size)

    def _total(
        self,
        source: str,
        name: str,
        n: int,
        arguments: tuple[Any, ...],
        parts: Array,
        out: Array,
        share: float,
        add: bool = False,
    ) -> None:
        """A kernel that ends as total.cuh has it: ``out`` = share times a sum over n numbers, or with ``add`` +=."""
        blocks = max(1, min(-(-n // (SUM_THREADS * AT_ONCE)), SUM_PARTS))
        self._launch(source, name, (blocks,), SUM_THREADS, *arguments, parts, out, share)
        if blocks > 1:
            self._launch(source, "add_parts", (1,), SUM_PARTS, parts, out, blocks, share, add)

    def _on_tiles(
        self,
        source: str,
        name: str,
        shape: tuple[int, ...],
        arrays: tuple[Array | None, ...],
        scalars: tuple[float, ...],
        most: int = MOST_BLOCKS,
    ) -> int:
        """A kernel over (rows, features) whose rows are shared out to at most ``most`` blocks; returns to how many."""
        width, grid = tiles(shape, most)
        self._launch(source, name, grid, THREADS, *arrays, *shape, width, *scalars)
        return grid[1]

    def _launch(self, source: str, name: str, grid: tuple[int, ...], threads: int, *arguments: Any) -> None:
        cuda_kernel(self.backend, source, name)(grid, (threads,), tuple(map(self._argument, arguments)))

    def _argument(self, x: Any) -> Any:
        """``x`` as a kernel takes it: None is a null pointer, an int is 64-bit, a float is of the arithmetic's type."""
        if x is None:
            return np.uint64(0)
        if isinstance(x, int):
            return np.int64(x)
        return self.compute.type(x) if isinstance(x, float) else x


def check_contiguous(name: str, x: Array) -> None:
    """Where an array may be the user's own: a kernel takes no strides, and would read other numbers."""
    if not x.flags.c_contiguous:
        raise ShapeError(f"{name} must be C-contiguous on a GPU, got a strided view of shape {x.shape}; copy it first")


def blocks_for(n: int) -> int:
    """Blocks for n elements: so many that each thread has its loads once."""
    return max(1, min(-(-n // (THREADS * AT_ONCE)), MOST_BLOCKS))


def tiles(shape: tuple[int, ...], most: int) -> tuple[int, tuple[int, int]]:
    """(columns of a tile, grid) for a matrix: see Tile in kernels/block.cuh. At most ``most`` blocks share the rows."""
    rows, features = shape
    width = min(WIDEST, 1 << max(0, features - 1).bit_length())
    across = max(1, -(-features // width))
    down = -(-rows // (THREADS // width * AT_ONCE))  # so many that each thread has its loads once
    return width, (across, max(1, min(down, most, MOST_BLOCKS // across)))


@functools.cache
def source_of(dtype: str, *files: str, before: str = "") -> str:
    """The CUDA source of files of ``kernels/`` for arrays of ``dtype``, with ``before`` in front of the last one."""
    types = [f"typedef {C_TYPES[compute_dtype(np.dtype(dtype)).name]} T;", f"typedef {STORED[dtype]} S;"]
    shared = [kernel_source(name) for name in ("math.cuh", "block.cuh", *files[:-1])]
    return "\n".join([kernel_source("half.cuh"), *types, *shared, before, kernel_source(files[-1])])


@functools.cache
def score_source(dtype: str, target: str) -> str:
    """The CUDA source of the losses over scores, with targets of dtype ``target``."""
    before = f"typedef {STORED[target]} Target;"
    return source_of(dtype, "total.cuh", "score_loss.cu", before=before)


@functools.cache
def activation_source(dtype: str, kind: str) -> str:
    """The CUDA source of one activation, a key of :data:`gpubatch.ops.KINDS`."""
    tail = normal_tail_source(compute_dtype(np.dtype(dtype)).name)
    before = f"{tail}\n{kernel_source('activations.cuh')}\ntypedef {KINDS[kind]} Activation;"
    return source_of(dtype, "activation.cu", before=before)


@functools.cache
def gather_source(dtype: str, stored: str) -> str:
    """The CUDA source of gathering samples of the element type ``stored`` into arrays of ``dtype``."""
    return source_of(dtype, "gather.cu", before=f"typedef {STORED[stored]} Sample;")
