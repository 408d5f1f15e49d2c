"""Reductions of an update rule by NumPy: a pass over an array, a block after another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from gpubatch.backend import Array
from gpubatch.formula import PIECE, FormulaPass, reduction_room, total_of
from gpubatch.ops.program import Program, blocks_of


class Reducer:
    """A pass that reduces: ``add`` takes the blocks of an array one after another, ``finish`` gives the values."""

    def __init__(self, of_pass: FormulaPass, dtype: np.dtype[Any]) -> None:
        self.program = Program(of_pass.trace, dtype)
        assert self.program.block % PIECE == 0, "a total has whole pieces, in whatever blocks they come"
        self.reductions = of_pass.reductions
        self.operands = [np.empty(self.program.block, dtype) for _ in self.reductions]
        self.room = reduction_room()
        self.totals = [0.0] * len(self.reductions)
        self.size = 0

    def add(self, blocks: Sequence[Array], values: Sequence[Array]) -> None:
        """Go on with the next block of each array; all but the last are whole. ``values`` are of earlier passes."""
        n = blocks[0].size
        operands = [x[:n] for x in self.operands]
        self.program.on(*blocks, *values, *operands)
        for i, (reduction, x) in enumerate(zip(self.reductions, operands, strict=True)):
            self.totals[i] = total_of(reduction, x, self.room, self.totals[i])
        self.size += n

    def finish(self) -> list[Array]:
        """The value of each reduction, in an array of one number; the next block begins another array."""
        dtype = self.program.dtype
        found = [r.finish(total, self.size) for r, total in zip(self.reductions, self.totals, strict=True)]
        self.totals, self.size = [0.0] * len(self.reductions), 0
        return [np.array([x], dtype) for x in found]


def blocks_in_order(arrays: Sequence[Array], size: int) -> Iterator[tuple[Array, ...]]:
    """Pieces of the arrays as :func:`blocks_of` makes them, to read: of exactly ``size`` elements, in C order."""
    if all(a.flags.c_contiguous for a in arrays):
        yield from blocks_of(arrays, size, ())
    else:
        for start in range(0, arrays[0].size, size):
            yield tuple(a.flat[start : start + size] for a in arrays)
