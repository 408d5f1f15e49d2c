"""Sums over everything: of squares, and the l2 term of a loss."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpubatch.backend import Array
from gpubatch.ops.grid import AT_ONCE, MOST_THREADS, SUM_PARTS, SUM_THREADS, THREADS, Grid, blocks_for, total_grid
from gpubatch.ops.operation import COMPUTE, Work, operation

SQUARE_PARTS = 256  # partial results of a sum of squares, on a GPU: 256 blocks of 1024 threads run at once
# float64: the sum, how many elements are not finite, the ticket of kernels/last_block.cuh, and the partial results.
SQUARE_SUM_SIZE = 3 + 2 * SQUARE_PARTS


@operation()  # it widens float16 to double precision by itself
def square_sum(x: Array, out: Array) -> None:
    """``out[0]`` += Σ x², in double precision, and ``out[1]`` += how many elements of x are not finite.

    out is float64 of :data:`SQUARE_SUM_SIZE`, zero at first; what comes after the first two is the kernels' own.
    Always the same bits.
    """
    x, block = x.reshape(-1), 1 << 14  # a cache-sized block after another
    for start in range(0, x.size, block):
        piece = x[start : start + block].astype(np.float64)
        out[0] += np.dot(piece, piece)
        out[1] += piece.size - np.count_nonzero(np.isfinite(piece))


@square_sum.compiled
def compiled_square_sum(library: Any, x: Array, out: Array) -> None:
    """One pass."""
    if not library.square_sum(x, out):
        square_sum.numpy(x, out)


@square_sum.cuda
def cuda_square_sum(grid: Grid, x: Array, out: Array) -> None:
    """One launch."""
    source = grid.source("square_sum.cuh", "square_sum.cu")
    grid.launch(source, "square_sum", square_grid(x), MOST_THREADS, x, x.size, out)


def square_grid(x: Array) -> tuple[int]:
    """The grid of a kernel of MOST_THREADS that begins as kernels/square_sum.cuh has it."""
    return (max(1, min(-(-x.nbytes // (MOST_THREADS * AT_ONCE * 16)), SQUARE_PARTS)),)


# --- parts of a flat buffer: spans, int64 of (parts, 2), is where each begins and where it ends -----------------------


@operation("loss", scratch=lambda features: {"squares": ((1, 1), COMPUTE), "parts": ((SUM_PARTS,), np.float64)})
def l2_loss(w: Array, spans: Array, factor: float, loss: Array, work: Work) -> None:
    """loss += factor Σ w² over the parts; loss is of one element, and may be float64. BLAS does NumPy's sums."""
    for start, stop in spans.tolist():
        part = w[start:stop]
        term = np.matmul(part[None], part[:, None], out=work["squares"])[0]
        term *= factor
        loss += term


@l2_loss.compiled
def compiled_l2_loss(library: Any, w: Array, spans: Array, factor: float, loss: Array, work: Work) -> None:
    """Sums in double precision."""
    if not library.l2_loss(w, spans, factor, loss):
        l2_loss.numpy(w, spans, factor, loss, work)


@l2_loss.cuda
def cuda_l2_loss(grid: Grid, w: Array, spans: Array, factor: float, loss: Array, work: Work) -> None:
    """One launch for all parts."""
    arguments = (w, spans, len(spans), factor, work["parts"], work["ticket"], loss)
    grid.launch(grid.source("total.cuh", "l2.cu"), "l2_loss", total_grid(w.size), SUM_THREADS, *arguments)


@operation("g")
def l2_gradient(w: Array, spans: Array, factor: float, g: Array, work: Work) -> None:
    """g += factor w on the same parts of both; NumPy does as much at a time as ``work["l2"]`` has room for."""
    block, factor = work["l2"], scaled(factor, work)
    for first, last in spans.tolist():
        for start in range(first, last, block.size):
            stop = min(start + block.size, last)
            piece = g[start:stop]
            piece += np.multiply(w[start:stop], factor, out=block[: stop - start])


def scaled(factor: float, work: Work) -> float:
    """``factor`` times ``work["factor"]``, if there is one."""
    return factor * float(work["factor"].item()) if "factor" in work else factor


@l2_gradient.compiled
def compiled_l2_gradient(library: Any, w: Array, spans: Array, factor: float, g: Array, work: Work) -> None:
    """One pass."""
    if not library.l2_gradient(w, spans, scaled(factor, work), g):
        l2_gradient.numpy(w, spans, factor, g, work)


@l2_gradient.cuda
def cuda_l2_gradient(grid: Grid, w: Array, spans: Array, factor: float, g: Array, work: Work) -> None:
    """One launch for all parts."""
    arguments = (w, spans, len(spans), g, work.get("factor"), factor)
    grid.launch(grid.source("total.cuh", "l2.cu"), "l2_gradient", (blocks_for(w.size),), THREADS, *arguments)
