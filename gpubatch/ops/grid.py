"""How kernels are launched on CUDA: grids for shapes, and launches on the current stream.

A launch reads nothing back and takes no memory, so it may be captured in a graph. Sums have the same bits every time:
their order depends on shapes alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from gpubatch.backend import Array, CudaBackend, compute_dtype
from gpubatch.errors import ShapeError
from gpubatch.ops.compile import cuda_kernel, source_of

PARTS = 64  # partial results of a reduction: a fixed number, so that sums do not depend on how many threads there are
SUM_PARTS = 1024  # of a loss, on a GPU: 1024 blocks of 256 threads run at once

THREADS = 256  # of a block, but where the bounds of a kernel are others
MOST_THREADS = 1024  # of kernels/last_block.cuh
SUM_THREADS = 512  # of kernels/total.cuh
WARP = 32
AT_ONCE = 4  # loads that a thread starts before it waits, of kernels/block.cuh
WIDEST = 32  # columns of a tile: what a warp reads of a row is then one 128-byte line
MOST_BLOCKS = 1 << 14  # far more than run at a time on any device
BLOCK_ROWS = 512  # up to which one block sums a column: another launch would take longer than the block needs


class Grid:
    """Launches for arrays of ``dtype`` on the current stream of ``backend``, whose scope the caller has entered."""

    def __init__(self, backend: CudaBackend, dtype: np.dtype[Any]) -> None:
        self.backend, self.dtype, self.compute = backend, dtype, compute_dtype(dtype)

    def source(self, *files: str) -> str:
        """The source of files of ``kernels/`` for arrays of this dtype."""
        return source_of(self.dtype.name, *files)

    def launch(self, source: str, name: str, grid: tuple[int, ...], threads: int, *arguments: Any) -> None:
        """Launch the kernel ``name`` of ``source``."""
        cuda_kernel(self.backend, source, name)(grid, (threads,), tuple(map(self._argument, arguments)))

    def on_tiles(
        self,
        source: str,
        name: str,
        shape: tuple[int, ...],
        arrays: tuple[Array | None, ...],
        scalars: tuple[float, ...] = (),
    ) -> None:
        """A kernel over (rows, features) in which every element counts for itself."""
        width = tile_width(shape[1])
        self.launch(source, name, tiles(shape, THREADS, MOST_BLOCKS), THREADS, *arrays, *shape, width, *scalars)

    def sum_columns(
        self,
        source: str,
        name: str,
        shape: tuple[int, ...],
        arrays: tuple[Array | None, ...],
        scalars: tuple[float, ...] = (),
    ) -> None:
        """A kernel over (rows, features) that sums its columns, in :func:`parts_of` the shape."""
        threads, grid = sum_tiles(shape)
        self.launch(source, name, grid, threads, *arrays, *shape, tile_width(shape[1]), *scalars)

    def add_partial(self, partial: Array, parts: int, factor: float, out: Array, second: Array | None = None) -> None:
        """``out`` = factor times the sums in ``parts`` rows of ``partial``; those of ``second`` stand beside them."""
        source, features = source_of(out.dtype.name, "columns.cu"), out.size
        shape = (parts, features if second is None else 2 * features)
        width = tile_width(shape[1])
        grid = (-(-shape[1] // width), 1)
        self.launch(source, "add_partial", grid, THREADS, partial, out, second, *shape, width, features, factor)

    def _argument(self, x: Any) -> Any:
        """``x`` as a kernel takes it: None is a null pointer, an int is 64-bit, a float is of the arithmetic's type."""
        if x is None:
            return np.uint64(0)
        if isinstance(x, int):
            return np.int64(x)
        return self.compute.type(x) if isinstance(x, float) else x


def check_contiguous(name: str, x: Array) -> None:
    """Raise for a strided array of a user: a kernel takes no strides, and would read other numbers."""
    if not x.flags.c_contiguous:
        raise ShapeError(f"{name} must be C-contiguous on a GPU, got a strided view of shape {x.shape}; copy it first")


def blocks_for(n: int) -> int:
    """The number of blocks for n elements, enough for each thread to load once."""
    return max(1, min(-(-n // (THREADS * AT_ONCE)), MOST_BLOCKS))


def total_grid(n: int) -> tuple[int]:
    """The grid of a kernel that ends as kernels/total.cuh has it, over n numbers."""
    return (max(1, min(-(-n // (SUM_THREADS * AT_ONCE)), SUM_PARTS)),)


def tile_width(features: int) -> int:
    """The columns of a tile: see Tile in kernels/block.cuh."""
    return min(WIDEST, power_of_two(features))


def tiles(shape: tuple[int, ...], threads: int, most: int) -> tuple[int, int]:
    """The grid of blocks of ``threads`` threads for a matrix; at most ``most`` blocks share the rows."""
    rows, features = shape
    width = tile_width(features)
    across = max(1, -(-features // width))
    down = -(-rows // (threads // width * AT_ONCE))  # enough for each thread to load once
    return across, max(1, min(down, most, MOST_BLOCKS // across))


def sum_tiles(shape: tuple[int, ...]) -> tuple[int, tuple[int, int]]:
    """(threads, grid) for sums of the columns of a matrix: one block has all rows of its columns if it can."""
    rows, features = shape
    if rows > BLOCK_ROWS:
        return THREADS, tiles(shape, THREADS, PARTS)
    wanted = power_of_two(tile_width(features) * -(-rows // AT_ONCE))  # enough for each thread to load once
    return max(THREADS, min(wanted, MOST_THREADS)), tiles(shape, THREADS, 1)


def parts_of(shape: tuple[int, ...]) -> int:
    """The number of partial sums of each column of a matrix; with one it is the sum itself."""
    return sum_tiles(shape)[1][1]


def power_of_two(n: int) -> int:
    """The least power of two that is not below n."""
    return 1 << max(0, n - 1).bit_length()
