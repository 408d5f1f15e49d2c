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
from gpubatch.formula import BoundActivation, BoundScoreLoss, activation_source, score_source
from gpubatch.ops.launch import C_TYPES, cuda_kernel, kernel_source
from gpubatch.ops.numpy_ops import (
    IDENTITY,
    MOST_PROGRAMS,
    PARTS,
    SQUARE_PARTS,
    SUM_PARTS,
    Ops,
    Work,
    labels_or_rows,
    rows_of,
)

__all__ = ["CudaOps"]

THREADS = 256  # of a block, but where the bounds of a kernel are others
MOST_THREADS = 1024  # of kernels/last_block.cuh
SUM_THREADS = 512  # of kernels/total.cuh
WARP = 32
AT_ONCE = 4  # of kernels/block.cuh
WIDEST = 32  # columns of a tile: what a warp reads of a row is then one 128-byte line
MOST_BLOCKS = 1 << 14  # far more than run at a time on any device
WARP_CLASSES = 256  # up to which a warp has a row of scores for itself
BLOCK_CLASSES = 4096  # from which a block of the most threads has it
BLOCK_ROWS = 512  # up to which one block sums a column: another launch would take longer than the block needs

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

    def activate(self, f: BoundActivation, x: Array, b: Array | None, y: Array, work: Work) -> None:
        """See :class:`Ops`; one launch."""
        check_contiguous("x", x)
        slope = work["slope"] if f.keeps else None
        self._on_tiles(elementwise_source(self.dtype.name, f), "activate", x.shape, (x, b, y, slope), ())

    def activation_gradient(
        self, f: BoundActivation, y: Array, dy: Array, dx: Array | None, db: Array | None, work: Work
    ) -> None:
        """See :class:`Ops`; one launch, and one more where there are many rows to sum."""
        if dx is None:
            f = IDENTITY
        source = elementwise_source(self.dtype.name, f)
        kept = work["slope"] if f.keeps else y
        if db is None:
            self._on_tiles(source, "activation_gradient", dy.shape, (kept, dy, dx, None, None), ())
            return
        parts, partial = parts_of(dy.shape), work["partial"]
        sums = (None, db) if parts == 1 else (partial, None)
        self._sum(source, "activation_gradient", dy.shape, (kept, dy, dx, *sums), ())
        if parts > 1:
            self._add_partial(partial, parts, 1.0, db)

    def softmax_cross_entropy(self, z: Array, Y: Array, gradient: bool, work: Work) -> None:
        """See :class:`Ops`; a label out of range makes NaN of the loss and of its row of the gradient."""
        self._over_rows("softmax_cross_entropy", z, labels_or_rows(Y, work), gradient, work)

    def svm(self, z: Array, Y: Array, gradient: bool, work: Work) -> None:
        """See :class:`Ops`; a label out of range makes NaN of the loss and of its row of the gradient."""
        self._over_rows("svm", z, labels_or_rows(Y, work)[:1], gradient, work)

    def score_loss(self, f: BoundScoreLoss, z: Array, Y: Array, gradient: bool, work: Work) -> None:
        """See :class:`Ops`; one launch. Targets are read as they are, of any dtype."""
        if not Y.flags.c_contiguous:
            Y = rows_of(Y, z, work)
        source = score_loss_source(self.dtype.name, Y.dtype.name, f)
        arguments = (z, Y, work["dz"] if gradient else None, work.get("factor"), z.size, 1 / z.size)
        parts = (work["parts"], work["ticket"], work["loss"])
        self._launch(source, "score_loss", total_grid(z.size), SUM_THREADS, *arguments, *parts)

    def l2_loss(self, w: Array, spans: Array, factor: float, loss: Array, work: Work) -> None:
        """See :class:`Ops`; one launch for all parts."""
        source = source_of(self.dtype.name, "total.cuh", "l2.cu")
        arguments = (w, spans, len(spans), factor, work["parts"], work["ticket"], loss)
        self._launch(source, "l2_loss", total_grid(w.size), SUM_THREADS, *arguments)

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
        """See :class:`Ops`; three launches, for the mean, the deviations and y, and two more where rows are many."""
        check_contiguous("x", x)
        source = source_of(self.dtype.name, "batch_norm.cu")
        mean, var, parts = work["mean"], work["var"], parts_of(x.shape)
        for middle, out in ((None, mean), (mean, var)):
            if parts == 1:
                self._sum(source, "moment", x.shape, (x, middle, out), (1 / len(x),))
            else:
                self._sum(source, "moment", x.shape, (x, middle, work["partial"]), (1.0,))
                self._add_partial(work["partial"], parts, 1 / len(x), out)
        arrays = (x, mean, var, gamma, beta, y, work["normal"], work["inverse"])
        self._on_tiles(source, "normalise", x.shape, arrays, (eps,))

    def batch_norm_gradient(
        self, dy: Array, gamma: Array, dgamma: Array, dbeta: Array, dx: Array | None, work: Work
    ) -> None:
        """See :class:`Ops`; one launch for both sums, or two where there are many rows, and one for dx."""
        source = source_of(self.dtype.name, "batch_norm.cu")
        normal, parts, partial = work["normal"], parts_of(dy.shape), work["partial"]
        sums = (None, dgamma, dbeta) if parts == 1 else (partial, None, None)
        self._sum(source, "gradient_sums", dy.shape, (normal, dy, *sums), ())
        if parts > 1:
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
        """See :class:`Ops`; one launch."""
        source = source_of(self.dtype.name, "square_sum.cuh", "square_sum.cu")
        self._launch(source, "square_sum", square_grid(x), MOST_THREADS, x, x.size, out)

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
        text = gather_source(self.dtype.name, source.dtype.name)
        self._take(text, "gather", source, order, batch, out, size, scale, shift)

    def take_batch(self, source: Array, order: Array, batch: Array, out: Array, size: int) -> None:
        """As :meth:`gather_batch`, but elements stay as they are stored, or become int64 where out is; one launch."""
        text = take_source(source.dtype.name, out.dtype.name)
        self._take(text, "take", source, order, batch, out, size)

    def _take(
        self, text: str, name: str, source: Array, order: Array, batch: Array | None, out: Array, *numbers: float
    ) -> None:
        """A kernel that takes rows of ``source``, as kernels/rows.cuh does."""
        rows, features = len(out), math.prod(source.shape[1:])
        lanes = lanes_of(source, out, features)
        across = (rows, features // lanes)
        arguments = (source, order, batch, out, rows, features, tile_width(across[1]), lanes, *numbers)
        self._launch(text, name, tiles(across, THREADS, MOST_BLOCKS), THREADS, *arguments)

    def _add_partial(self, partial: Array, parts: int, factor: float, out: Array, second: Array | None = None) -> None:
        """``out`` = factor times the sums in ``parts`` rows of ``partial``; those of ``second`` stand beside them."""
        source, features = source_of(out.dtype.name, "columns.cu"), out.size
        shape = (parts, features if second is None else 2 * features)
        width = tile_width(shape[1])
        grid = (-(-shape[1] // width), 1)
        self._launch(source, "add_partial", grid, THREADS, partial, out, second, *shape, width, features, factor)

    def _over_rows(self, name: str, z: Array, truth: tuple[Array | None, ...], gradient: bool, work: Work) -> None:
        """A kernel of loss.cu, with a warp for a row of few scores and otherwise a block."""
        source = source_of(self.dtype.name, "total.cuh", "loss.cu")
        rows, classes = z.shape
        threads = THREADS if classes < BLOCK_CLASSES else SUM_THREADS
        team = WARP if classes <= WARP_CLASSES else threads
        blocks = min(-(-rows * team // threads), SUM_PARTS)
        arguments = (z, *truth, work["dz"] if gradient else None, work.get("factor"), rows, classes, team, 1 / rows)
        self._launch(source, name, (blocks,), threads, *arguments, work["parts"], work["ticket"], work["loss"])

    def _on_tiles(
        self,
        source: str,
        name: str,
        shape: tuple[int, ...],
        arrays: tuple[Array | None, ...],
        scalars: tuple[float, ...],
    ) -> None:
        """A kernel over (rows, features) in which every element counts for itself."""
        width = tile_width(shape[1])
        self._launch(source, name, tiles(shape, THREADS, MOST_BLOCKS), THREADS, *arrays, *shape, width, *scalars)

    def _sum(
        self,
        source: str,
        name: str,
        shape: tuple[int, ...],
        arrays: tuple[Array | None, ...],
        scalars: tuple[float, ...],
    ) -> None:
        """A kernel over (rows, features) that sums its columns, in :func:`parts_of` the shape."""
        threads, grid = sum_tiles(shape)
        self._launch(source, name, grid, threads, *arrays, *shape, tile_width(shape[1]), *scalars)

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


def total_grid(n: int) -> tuple[int]:
    """The grid of a kernel that ends as kernels/total.cuh has it, over n numbers."""
    return (max(1, min(-(-n // (SUM_THREADS * AT_ONCE)), SUM_PARTS)),)


def square_grid(x: Array) -> tuple[int]:
    """The grid of a kernel of MOST_THREADS that begins as kernels/square_sum.cuh has it."""
    return (max(1, min(-(-x.nbytes // (MOST_THREADS * AT_ONCE * 16)), SQUARE_PARTS)),)


def lanes_of(source: Array, out: Array, features: int) -> int:
    """How many elements of a row a thread moves at a time: LANES of kernels/rows.cuh where they fit, or one."""
    lanes = 16 // max(source.itemsize, out.itemsize)
    aligned = all(a.data.ptr % (lanes * a.itemsize) == 0 for a in (source, out))
    return lanes if aligned and features % lanes == 0 else 1


def tile_width(features: int) -> int:
    """The columns of a tile: see Tile in kernels/block.cuh."""
    return min(WIDEST, power_of_two(features))


def tiles(shape: tuple[int, ...], threads: int, most: int) -> tuple[int, int]:
    """The grid of blocks of so many threads for a matrix; at most ``most`` of them share the rows."""
    rows, features = shape
    width = tile_width(features)
    across = max(1, -(-features // width))
    down = -(-rows // (threads // width * AT_ONCE))  # so many that each thread has its loads once
    return across, max(1, min(down, most, MOST_BLOCKS // across))


def sum_tiles(shape: tuple[int, ...]) -> tuple[int, tuple[int, int]]:
    """(threads, grid) for sums of the columns of a matrix: one block has all rows of its columns if it can."""
    rows, features = shape
    if rows > BLOCK_ROWS:
        return THREADS, tiles(shape, THREADS, PARTS)
    wanted = power_of_two(tile_width(features) * -(-rows // AT_ONCE))  # so many that each thread has its loads once
    return max(THREADS, min(wanted, MOST_THREADS)), tiles(shape, THREADS, 1)


def parts_of(shape: tuple[int, ...]) -> int:
    """In how many parts the columns of a matrix are summed; one part is the sum itself."""
    return sum_tiles(shape)[1][1]


def power_of_two(n: int) -> int:
    """The least power of two that is not below n."""
    return 1 << max(0, n - 1).bit_length()


@functools.cache
def source_of(dtype: str, *files: str, before: str = "") -> str:
    """The CUDA source of files of ``kernels/`` for arrays of ``dtype``, with ``before`` in front of the last one."""
    types = [f"typedef {C_TYPES[compute_dtype(np.dtype(dtype)).name]} T;", f"typedef {STORED[dtype]} S;"]
    shared = [kernel_source(name) for name in ("math.cuh", "last_block.cuh", "block.cuh", *files[:-1])]
    return "\n".join([kernel_source("half.cuh"), *types, *shared, before, kernel_source(files[-1])])


@functools.lru_cache(maxsize=MOST_PROGRAMS)
def score_loss_source(dtype: str, target: str, f: BoundScoreLoss) -> str:
    """The CUDA source of a loss of single scores, with targets of dtype ``target``."""
    compute = compute_dtype(np.dtype(dtype)).name
    before = [
        f"typedef {STORED[target]} Target;",
        scalars_source("SCALARS", f.scalars(f.loss.form(compute, "loss", "dz"))),
        score_source(f.loss, compute, "Score"),
    ]
    return source_of(dtype, "total.cuh", "score_loss.cu", before="\n".join(before))


@functools.lru_cache(maxsize=MOST_PROGRAMS)
def elementwise_source(dtype: str, f: BoundActivation) -> str:
    """The CUDA source of an activation and its gradient."""
    compute = compute_dtype(np.dtype(dtype)).name
    form = f.activation.form(compute)
    before = [
        scalars_source("FORWARD_SCALARS", f.scalars(form.forward)),
        scalars_source("BACKWARD_SCALARS", f.scalars(form.backward)),
        activation_source(f.activation, compute, "Activation"),
    ]
    return source_of(dtype, "activation.cu", before="\n".join(before))


def scalars_source(name: str, scalars: tuple[float, ...]) -> str:
    """The scalars of a formula as an initializer; they are part of the source, so that they take no memory."""
    return f"#define {name} {{{', '.join(f'T({x!r})' for x in scalars or (0.0,))}}}"


@functools.cache
def gather_source(dtype: str, stored: str) -> str:
    """The CUDA source of gathering samples of the element type ``stored`` into arrays of ``dtype``."""
    return rows_source("gather.cu", dtype, stored, dtype)


@functools.cache
def take_source(stored: str, target: str) -> str:
    """The CUDA source of taking samples of the element type ``stored`` as they are, or as int64: ``target``."""
    return rows_source("take.cu", "float32", stored, target)


def rows_source(file: str, dtype: str, stored: str, target: str) -> str:
    """The CUDA source of a kernel that takes rows, with arithmetic of ``dtype``'s."""
    types = f"typedef {STORED[stored]} Sample;\ntypedef {STORED[target]} Target;"
    return source_of(dtype, file, before=f"{types}\n{kernel_source('rows.cuh')}")
