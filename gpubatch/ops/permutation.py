"""A random permutation that is computed place by place, by NumPy, compiled or on CUDA: the same integers everywhere."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpubatch.backend import Array
from gpubatch.ops.cells import CellSplit
from gpubatch.ops.compile import host_library, kernel_source
from gpubatch.ops.feistel import ROUNDS, TOGETHER, Integers, feistel
from gpubatch.ops.grid import AT_ONCE, MOST_BLOCKS, THREADS, Grid

PERMUTATION_WORDS = 4 + ROUNDS  # n, bits, first, step and keys, as kernels/permutation.cuh has them
TAKEN = 56  # bytes of scratch memory that NumPy takes for each place, at most


class Permutation:
    """A permutation of the numbers below ``n`` that seed, epoch and stream decide, or with ``shuffle=False`` no change.

    A Feistel network of 8 rounds (Luby & Rackoff, 1988) on the bits of n - 1, applied again to what is not below n
    (Black & Rogaway, 2002). Its keys are words of Philox4x64-10 with the key (seed, epoch) and the counter (0, 0, 1,
    stream). It knows the images of ``first``, ``first + step``, ...; with ``among`` it has the numbers of that side at
    these places instead. ``words`` are its numbers as kernels take them, and ``kind`` is their struct.
    """

    def __init__(
        self,
        n: int,
        seed: int,
        epoch: int,
        stream: int = 0,
        first: int = 0,
        step: int = 1,
        shuffle: bool = True,
        among: CellSplit | None = None,
    ) -> None:
        self.n, self.bits = n, max(2, (n - 1).bit_length()) if shuffle else 0
        # The counter's third word keeps these numbers apart from those of orders that are sorted, and of splits.
        draw = np.random.Philox(key=np.array([seed, epoch], np.uint64), counter=[0, 0, 1, stream]).random_raw
        self._keys = draw(ROUNDS)
        words = np.array([n, self.bits, first, step, *self._keys], np.uint64).view(np.int64)
        self._among, (self.kind, self.words) = among, placed("Computed", words, among)
        self._held: tuple[int, Integers] = 0, np.empty(0, np.int64)  # images that NumPy has computed, from a place on

    def between(self, start: int, stop: int) -> Integers:
        """The images of places ``start`` to ``stop``; a place is counted in steps from the first."""
        library = host_library()
        if not isinstance(library, str):
            out = np.empty(stop - start, np.int64)
            if library.permute(self.words[:PERMUTATION_WORDS], start, out):
                return out if self._among is None else self._among[out]
        begin, held = self._held
        if not begin <= start <= stop <= begin + len(held):
            first, step = int(self.words[2]), int(self.words[3])
            ahead = -(-(self.n - first) // step) if step else stop  # places that there are
            begin = start
            held = np.empty(max(stop, min(start + TOGETHER, ahead)) - start, np.int64)
            for at in range(0, len(held), TOGETHER):
                part = held[at : at + TOGETHER]
                part[...] = np.arange(start + at, start + at + len(part))
                part *= step
                part += first
                part[...] = self.of(part)
                part[...] = part if self._among is None else self._among[part]
            self._held = (begin, held) if len(held) <= TOGETHER else self._held
        return held[start - begin : stop - begin]

    def after(self, places: int) -> Integers:
        """The ``words`` of the same permutation, shifted by ``places``."""
        return after(self.words, places)

    def of(self, numbers: Integers) -> Integers:
        """The images of ``numbers``, by NumPy."""
        return self._walk(numbers)

    def places_of(self, images: Integers) -> Integers:
        """The numbers whose images these are: the rounds in reverse."""
        return self._walk(images, -1)

    def _walk(self, numbers: Integers, way: int = 1) -> Integers:
        found: Integers = np.array(numbers, np.int64)
        if not self.bits:
            return found
        left: Any = slice(None)  # which are not below n yet
        while len(found[left]):
            x = found[left] = feistel(found[left], self.bits, self._keys, way=way)
            left = np.flatnonzero(x >= self.n) if isinstance(left, slice) else left[x >= self.n]
        return found


def permutation_bytes() -> int:
    """Bytes that :meth:`Permutation.between` takes beside its result."""
    return TAKEN * TOGETHER if isinstance(host_library(), str) else 0


class Draws:
    """Draws with replacement from ``n`` samples as kernels make them: those that seed and epoch decide.

    It knows draws ``first``, ``first + step``, ... With ``sums``, the address of the samples' weights up to each, which
    are ``total`` in all, they are by weights. ``among``, ``words`` and ``kind`` are as those of a permutation.
    """

    def __init__(
        self,
        n: int,
        seed: int,
        epoch: int,
        first: int = 0,
        step: int = 1,
        sums: int = 0,
        total: float = 0.0,
        among: CellSplit | None = None,
    ) -> None:
        factor = int(np.float64(total * 2.0**-53).view(np.uint64))
        numbers = [n, 0, first, step, seed, epoch, sums, factor]
        words = np.array(numbers + [0] * (PERMUTATION_WORDS - len(numbers)), np.uint64).view(np.int64)
        self.kind, self.words = placed("Drawn", words, among)

    def after(self, places: int) -> Integers:
        """The ``words`` of the same draws, shifted by ``places``."""
        return after(self.words, places)


def placed(kind: str, words: Integers, among: CellSplit | None) -> tuple[str, Integers]:
    """The struct and the words of an order of a ``kind``, whose samples may be ``among`` those of a side."""
    return (kind, words) if among is None else (f"Among<{kind}>", np.concatenate([words, among.words]))


def after(words: Integers, places: int) -> Integers:
    """The words of a permutation or of draws, shifted by ``places``."""
    found = words.copy()
    found[2] += places * found[3]
    return found


def permute(grid: Grid, words: Array, start: int, out: Array, kind: str = "Computed") -> None:
    """Write the samples at places from ``start`` on to ``out``, int64; ``words`` are those of an order of some kind."""
    blocks = max(1, min(-(-out.size // (THREADS * AT_ONCE)), MOST_BLOCKS))
    grid.launch(permutation_source(kind), "permute", (blocks,), THREADS, words, out, out.size, start)


def permutation_source(kind: str = "Computed") -> str:
    """The CUDA source of the samples of an order as an array."""
    return f"{order_source(kind)}\n{kernel_source('permutation.cu')}"


def order_source(kind: str) -> str:
    """The CUDA source of an order: Listed, Computed, Drawn, or Among<...> of the last two."""
    shared = "\n".join(kernel_source(name) for name in ("permutation.cuh", "philox.cuh", "orders.cuh"))
    return f"{shared}\ntypedef struct {kind} Order;"
