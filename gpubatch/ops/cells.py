"""A fixed split of a large set at random, a part to train on and a part that is held out, computed place by place."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from gpubatch.ops.compile import host_library
from gpubatch.ops.feistel import ROUNDS, TOGETHER, Integers, feistel

CELL = 1 << 12  # neighbours of which equal shares are held out: the fewest whose network of 8 rounds is as if by chance
CELL_WORDS = 6 + ROUNDS  # the numbers of a side, as kernels/permutation.cuh has them
MANY, FEW = 1, 2  # the two sides, as kernels/permutation.cuh has them
TAKEN = 80  # bytes of scratch memory that NumPy and an ascending side take for each place, at most


class CellSplit:
    """One side of the numbers below ``n``, of which ``held`` are held out at random: those, or the rest.

    The numbers are cut into cells of 4,096 neighbours. Of each the same share is held out, to one number: the last
    images of a random permutation of the cell, a Feistel network as :class:`Permutation`'s, whose keys are changed by
    the number of the cell. So a cell's numbers are found without those of others, and neighbours in a file stay
    neighbours on both sides. The keys are words of Philox4x64-10 with the key (seed, 0) and the counter (0, 0, 2, 0).

    n: how many numbers there are
    held: how many of them are held out, between 1 and n - 1
    seed: decides which
    of_held: the side of those that are held out; or that of the rest
    ascending: whether the side is in the order of its numbers; or in that of the permutations within each cell, as
        kernels compute it
    """

    def __init__(self, n: int, held: int, seed: int, of_held: bool = False, ascending: bool = False) -> None:
        self.n, self.ascending, few = n, ascending, min(held, n - held)
        self._count = held if of_held else n - held
        # Images are counted from the front for the larger side, and from the back for the smaller one.
        self._side = FEW if (held <= n - held) == of_held else MANY
        self._cells = -(-n // CELL)
        self._last = n - (self._cells - 1) * CELL  # numbers of the last cell
        self._each = CELL * few / n  # of the smaller side in a cell, on average
        # Of all cells before the last one, which has room for what is left.
        self._before = min(max(int((self._cells - 1) * self._each), few - self._last), few)
        per_place = 1 / (self._each if self._side == FEW else CELL - self._each)
        self._keys = np.random.Philox(key=np.array([seed, 0], np.uint64), counter=[0, 0, 2, 0]).random_raw(ROUNDS)
        numbers = np.array([self._each, per_place]).view(np.uint64)
        self.words = np.array([n, self._side, self._cells, self._before, *numbers, *self._keys], np.uint64).view(
            np.int64
        )
        self._per_place = per_place
        self._given = n, held, seed, not of_held

    @functools.cached_property
    def _few(self) -> CellSplit:
        """The smaller side."""
        return self if self._side == FEW else CellSplit(*self._given)

    def __len__(self) -> int:
        return self._count

    @property
    def nbytes(self) -> int:
        """Bytes that are taken while numbers are found, beside them."""
        return TAKEN * TOGETHER if self.ascending or isinstance(host_library(), str) else 0

    def __getitem__(self, places: Integers) -> Integers:
        """The numbers at ``places`` of the side."""
        return self._in_order(places) if self.ascending else self._of(places)

    def searchsorted(self, numbers: Integers) -> Integers:
        """How many of the side are below each of ``numbers``, which are at most n."""
        found = np.empty(len(numbers), np.int64)
        at_once = max(1, TOGETHER // CELL)
        for start in range(0, len(numbers), at_once):
            below = np.array(numbers[start : start + at_once], np.int64)
            cells = np.minimum(below // CELL, self._cells - 1)
            few, of = self._few_of(cells)
            less = self._few_before(cells) + np.bincount(of, few < below[of], len(cells)).astype(np.int64)
            found[start : start + at_once] = less if self._side == FEW else below - less
        return found

    def _few_before(self, cells: Integers) -> Integers:
        """Of the smaller side, how many are in the cells before these."""
        found = (cells * self._each).astype(np.int64)
        return np.where(cells == self._cells - 1, self._before, found)

    def _begin(self, cells: Integers) -> Integers:
        """The first place of each of these cells."""
        few = self._few_before(cells)
        return few if self._side == FEW else cells * CELL - few

    def _cells_of(self, places: Integers) -> Integers:
        """The cells of places: as far as floating-point numbers tell, and then the right ones."""
        last = self._cells - 1
        cells = np.minimum(((places + 1) * self._per_place).astype(np.int64), last)
        while (high := self._begin(cells) > places).any():
            cells -= high
        while (low := (cells < last) & (self._begin(np.minimum(cells + 1, last)) <= places)).any():
            cells += low
        return cells

    def _of(self, places: Integers) -> Integers:
        found: Integers = np.array(places, np.int64)
        library = host_library()
        if not isinstance(library, str) and library.in_cells(self.words, found):
            return found
        for start in range(0, len(found), TOGETHER):
            part = found[start : start + TOGETHER]
            part[...] = self._by_numpy(part)
        return found

    def _by_numpy(self, places: Integers) -> Integers:
        cells = self._cells_of(places)
        inside = places - self._begin(cells)
        whole = cells < self._cells - 1
        if self._side == FEW:
            inside = np.where(whole, CELL, self._last) - 1 - inside
        changes = mixed(cells)
        found = feistel(inside, (CELL - 1).bit_length(), self._keys, changes)
        bits, left = max(2, (self._last - 1).bit_length()), np.flatnonzero(~whole)
        x = inside[left]
        while len(left):
            x = found[left] = feistel(x, bits, self._keys, changes[left])
            beyond = x >= self._last
            left, x = left[beyond], x[beyond]
        found += cells * CELL
        return found

    def _few_of(self, cells: Integers) -> tuple[Integers, Integers]:
        """The numbers of the smaller side in these cells, and which of ``cells`` each is in."""
        begin, total = self._few_before(cells), min(self._count, self.n - self._count)
        ends = np.where(cells == self._cells - 1, total, self._few_before(np.minimum(cells + 1, self._cells - 1)))
        counts = ends - begin
        of = np.repeat(np.arange(len(cells)), counts)
        shift = begin - (np.cumsum(counts) - counts)
        return self._few._of(np.arange(len(of)) + shift[of]), of

    def _in_order(self, places: Integers) -> Integers:
        """The numbers at ``places`` of a side that ascends; neighbours are found together."""
        found = np.empty(len(places), np.int64)
        for start in range(0, len(places), TOGETHER):
            part = np.asarray(places[start : start + TOGETHER], np.int64)
            cells = self._cells_of(part)
            runs = np.flatnonzero(np.append(True, cells[1:] != cells[:-1]))
            of_run = np.repeat(np.arange(len(runs)), np.diff(np.append(runs, len(part))))
            at_once = max(1, TOGETHER // CELL)
            for first in range(0, len(runs), at_once):
                several = cells[runs[first : first + at_once]]
                these = slice(runs[first], runs[first + at_once] if first + at_once < len(runs) else len(part))
                few, of = self._few_of(several)
                chosen = np.full((len(several), CELL), self._side == MANY)
                chosen[of, few - several[of] * CELL] = self._side == FEW
                ends = np.cumsum(chosen.sum(axis=1))
                listed, run = np.flatnonzero(chosen), of_run[these] - first
                begin = np.append(0, ends[:-1]) - self._begin(several)
                inside = listed[part[these] + begin[run]]
                found[start:][these] = inside + (several * CELL - np.arange(len(several)) * CELL)[run]
        return found


def mixed(numbers: Integers) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """Word ``number`` of SplitMix64 (Steele, Lea & Flood, 2014), from the state 0 on."""
    x = (numbers.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
