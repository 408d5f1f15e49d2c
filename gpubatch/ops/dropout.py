"""Dropout: a mask of random numbers that a key and a counter determine, the same on CPU and GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from gpubatch.backend import Array
from gpubatch.ops.grid import MOST_BLOCKS, THREADS, Grid, blocks_for, check_contiguous
from gpubatch.ops.operation import Widened, Work, operation


@operation(numpy_scratch=lambda features: {"uniform": ((-1, features), np.float32)})
def dropout(x: Array, y: Array, rate: float, key: tuple[int, int], step: int | Array, first: int, work: Work) -> None:
    """y = x mask, ``work["mask"]`` = 1/(1 - rate) where a uniform number is not below the rate, else 0.

    The numbers are float32 of Philox4x64-10 with the key (seed, layer) and the counter (0, step, 0, 0), from number
    ``first`` on. x may be y. On a GPU the step may be one uint64 there, read when the kernel runs.
    """
    uniform, mask = work["uniform"], work["mask"]
    generator = philox_generator(*key, np.array([first // 8, step, 0, 0], np.uint64))  # eight to a counter
    generator.random(first % 8, np.float32)
    generator.random(out=uniform, dtype=np.float32)
    np.greater_equal(uniform, rate, out=mask)
    mask *= 1 / (1 - rate)
    np.multiply(x, mask, out=y)


@dropout.compiled
def compiled_dropout(
    library: Any, x: Array, y: Array, rate: float, key: tuple[int, int], step: int | Array, first: int, work: Work
) -> None:
    """One pass, and no uniform numbers in memory."""
    if not library.dropout(x, y, work["mask"], *key, step, first, rate):
        dropout.numpy(x, y, rate, key, step, first, work)


@dropout.cuda
def cuda_dropout(
    grid: Grid, x: Array, y: Array, rate: float, key: tuple[int, int], step: int | Array, first: int, work: Work
) -> None:
    """One launch, and no uniform numbers in memory."""
    check_contiguous("x", x)
    numbers = first % 8 + x.size  # a thread makes eight numbers at a time, of which the first may be unused
    blocks = max(1, min(-(-numbers // (8 * THREADS)), MOST_BLOCKS))
    steps = (np.uint64(step), None) if isinstance(step, int) else (np.uint64(0), step)
    philox = (np.uint64(key[0]), np.uint64(key[1]), *steps, np.uint64(first))
    arguments = (x, y, work["mask"], x.size, *philox, np.float32(rate), 1 / (1 - rate))
    grid.launch(grid.source("philox.cuh", "dropout.cu"), "dropout", (blocks,), THREADS, *arguments)


@dropout.half
def half_dropout(
    form: Callable[..., None],
    x: Array,
    y: Array,
    rate: float,
    key: tuple[int, int],
    step: int | Array,
    first: int,
    work: Work,
) -> None:
    """y is a product with the mask as it is stored, which backward multiplies by: 1/(1 - rate) is rounded."""
    with Widened(work, work["mask"]) as wide:
        form(wide(x), wide(y), rate, key, step, first, wide)
    np.multiply(x, work["mask"], out=y)


@operation()  # a product of float16 is rounded once, in whatever it is computed
def dropout_gradient(dy: Array, dx: Array, work: Work) -> None:
    """dx = dy ``work["mask"]``. dx may be dy."""
    np.multiply(dy, work["mask"], out=dx)


@dropout_gradient.cuda
def cuda_dropout_gradient(grid: Grid, dy: Array, dx: Array, work: Work) -> None:
    """One launch."""
    arguments = (dy, work["mask"], dx, dy.size)
    source = grid.source("philox.cuh", "dropout.cu")
    grid.launch(source, "dropout_gradient", (blocks_for(dy.size),), THREADS, *arguments)


def philox_generator(seed: int, index: int, counter: Array | int = 0) -> np.random.Generator:
    """The random numbers of one layer; of a list of large integers NumPy would make floats, so the key is an array."""
    return np.random.Generator(np.random.Philox(key=np.array([seed, index], np.uint64), counter=counter))
