"""Windows of a set that is read and shuffled by windows: their sizes, their memory, and their reading."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from gpubatch.errors import ArgumentError, InsufficientMemoryError, check_int
from gpubatch.loader.columns import Columns, Rows
from gpubatch.loader.order import LEAST, OF_RANK, PEAK, Images, Indices, Order, Samples, Windowed
from gpubatch.ops import permutation_bytes
from gpubatch.sizing import parse_bytes
from gpubatch.sources import Reader

DEFAULT_WINDOW = "256 MiB"  # for sources that read neighbours together
BLOCKS = 32  # blocks in half a window: so many places of the set meet in a batch
UNEVEN = 72  # peak bytes for each uneven block: its bounds, its begin and end in an epoch's list, temporaries
LISTING = 32  # peak bytes a sample while a window is listed: the order of use, places, their blocks and samples
PIECE = 1 << 20  # bytes of a window that are read at a time: they are checked next and should still be in the cache


def window_and_block(
    window: int | str | None, replacement: bool, columns: Columns, shards: int = 1
) -> tuple[int, int, Indices | None]:
    """The samples that are shuffled together, the neighbours in a block, and the bounds of uneven blocks or None.

    window, replacement: the loader's arguments
    shards: the parts of a batch, each of which shuffles its own share of these samples

    Zeros mean that the whole set is shuffled.
    """
    blocks = [reader.block for reader in columns.readers if reader.block is not None]
    if window is None and (not blocks or replacement):
        return 0, 0, None
    if replacement:
        raise ArgumentError(f"replacement=True draws from the whole set, so it has no window, got window={window!r}")
    n, bounds, whole = columns.n_samples, _common_bounds(columns), max(blocks, default=1)
    if window is None:
        half = parse_bytes("window", DEFAULT_WINDOW) // columns.stored_bytes // 2
        # Shards read in turn, so each needs room for a whole block; else it is decoded again and again.
        half = max(half, shards * whole) if shards > 1 else half
    elif isinstance(window, str):
        half = parse_bytes("window", window) // columns.stored_bytes // 2
    else:
        half = check_int("window", window, 2) // 2
    half = max(1, min(half, n))
    least, most = max(1, half // BLOCKS), half if half == n else max(1, half // shards)
    if bounds is not None:
        bounds = _merged(bounds, least, most)
        return most * shards, int(np.diff(bounds).max()), bounds
    # Whole blocks of the source, so that none is read twice, unless one block is more than the bound.
    block = min(-(-least // whole) * whole, most)
    return (most if half < n else n + block - 1) // block * block * shards, block, None


def _common_bounds(columns: Columns) -> Indices | None:
    """The bounds that the blocks of all sources have in common; None where all sources have even blocks."""
    if all(reader.boundaries is None for reader in columns.readers):
        return None
    found = np.array([0, columns.n_samples])
    given = [reader.boundaries for reader in columns.readers if reader.boundaries is not None]
    n, even = columns.n_samples, [r.block for r in columns.readers if r.boundaries is None and (r.block or 1) > 1]
    given += [np.append(np.arange(0, n, block), n) for block in even if block is not None]
    for number, bounds in enumerate(given):
        found = np.intersect1d(found, bounds, assume_unique=True) if number else bounds
    return found


def _merged(bounds: Indices, least: int, most: int) -> Indices:
    """Bounds of larger blocks: neighbours are joined until they have ``least`` samples, but not beyond ``most``."""
    found, last = [0], len(bounds) - 1
    place = 0
    while place < last:
        end = int(bounds.searchsorted(bounds[place] + least))
        end = min(end, int(bounds.searchsorted(bounds[place] + most, side="right")) - 1, last)
        place = max(place + 1, end)
        found.append(int(bounds[place]))
    return np.array(found, np.int64)


def window_bytes(order: Order, readers: Collection[Reader], size: int = 1) -> int:
    """The most bytes of main memory for windows: two halves, their orders, and what is being read.

    Where batches of ``size`` are dealt, the windows are those of all parts of this rank.
    """
    n, parts, cut = order.n, 1, 0
    if order.dealt:
        sizes = [part.stop - part.start for part in order.dealing.parts_of(order.n, size)]
        n, parts, cut = max(1, *sizes), sum(of > 0 for of in sizes), 1  # a stretch may begin and end inside blocks
    blocks, windows = -(-order.n // order.block), -(-n // order.together) + cut
    of_blocks = 8 * blocks
    if order.bounds is not None:
        blocks = len(order.bounds) - 1
        of_blocks = UNEVEN * blocks
        windows = windows if windows < 2 else 2 * windows  # two in a row have more samples than a full one
        of_blocks += 16 * windows * parts
    n = min(order.together, n)
    share, peak = -(-n // order.world_size), PEAK if order.shuffle else 9  # 9: the samples themselves
    rows, used = share * sum(reader.row_bytes for reader in readers), 16 * share
    if order.version > 1:  # what is large is computed as it is used
        formula = permutation_bytes()
        blocks = blocks if blocks < LEAST else 0
        of_blocks = 8 * blocks if order.bounds is None else of_blocks
        if order.chosen is not None or order.world_size > 1:
            making = OF_RANK * share + formula
        elif n >= LEAST:
            used, making = 0, formula
        else:
            making = LISTING * n
    elif order.world_size > 1:
        making = max(peak * n, OF_RANK * share)
    else:
        making = LISTING * n
    if order.bounds is None:
        of_blocks *= max(parts, 1)  # each part lists even blocks itself, where they are few
    read = 0
    if readers:
        read = _read_at_once(readers, order) * sum(r.row_bytes for r in readers if not r.reads_into)
    if windows == 1:
        held = max(making, rows + used + read)
    elif windows == 2:  # the second one's rows are allocated after its order has been made
        held = max(rows + used + making, 2 * (rows + used) + read)
    else:
        held = 2 * rows + max(used + making, 2 * used + read)
    held += max(parts - 1, 0) * min(windows, 2) * (rows + used)
    return max(peak * blocks, of_blocks + held)


def _read_at_once(readers: Collection[Reader], order: Order) -> int:
    """The samples of a window that are read at a time: at least as many as any source decodes at once."""
    piece, block = PIECE // max(reader.row_bytes for reader in readers), order.block
    piece = min(block, order.together) if order.dealt else min(piece, block)
    return max(piece, *(reader.block or 1 for reader in readers))


@dataclass(eq=False)
class _Held:
    """A window in memory.

    samples, use: in the order of reading, and the places among them in the order of use
    rows: of the first ``count`` samples
    ends: of its blocks
    told: the number of samples whose reading was announced
    """

    samples: Samples
    use: Images
    rows: Rows
    ends: Indices
    count: int = 0
    told: int = 0


class WindowPart(NamedTuple):
    """A batch's samples in one window: those at ``use`` of the window's ``samples`` and ``rows``."""

    rows: Rows
    samples: Samples
    use: Indices


class Windows:
    """An epoch by windows: the window in use, and the next one, which is read while the first is used up.

    So reading is spread evenly over the batches, and memory holds at most two windows, or two for each part of a batch
    of ``size``.
    """

    def __init__(self, order: Order, epoch: int, readers: dict[Reader, list[float]], size: int) -> None:
        self._order, self._size = order, size
        self._parts = [WindowsOfPart(order, part, readers) for part in order.windows(epoch, size)]

    def parts(self, start: int, stop: int) -> Iterator[WindowPart]:
        """The samples of the batch at positions ``start`` to ``stop``; rows are valid until the next part."""
        for part, cut in zip(self._parts, self._order.dealing.in_parts(start, stop, self._size), strict=True):
            yield from part.pieces(*cut)


class WindowsOfPart:
    """The windows of an epoch, or of one part of its batches."""

    def __init__(self, order: Order, windows: Windowed, readers: dict[Reader, list[float]]) -> None:
        self._order, self._block, self._limits = windows, order.block, readers
        self._capacity = -(-min(order.together, windows.size) // order.world_size)
        self._at_once, self._by_blocks = _read_at_once(readers, order), order.dealt
        self._held: dict[int, _Held] = {}
        self._spare: list[Rows] = []

    def pieces(self, start: int, stop: int) -> Iterator[WindowPart]:
        """The samples at positions ``start`` to ``stop``; rows are valid until the next piece."""
        for window, a, b in self._order.pieces(start, stop) if start < stop else ():
            for past in [w for w in self._held if w < window]:
                self._spare.append(self._held.pop(past).rows)
            held = self._read(window, 1, 1)
            yield WindowPart(held.rows, held.samples, held.use.between(a, b))
            if window + 1 < len(self._order):
                self._read(window + 1, b, len(held.samples))

    def _read(self, window: int, part: int, whole: int) -> _Held:
        """A window, after at least part/whole of it was read."""
        if window not in self._held:
            listed = self._order.part(window)  # before the rows are allocated, since listing takes memory, too
            rows = self._spare.pop() if self._spare else self._empty()
            self._held[window] = _Held(*listed, rows, self._order.ends(window))
        held, at_once = self._held[window], self._at_once
        wanted = -(-part * len(held.samples) // whole)
        wanted = min(-(-wanted // at_once) * at_once, len(held.samples))
        while held.count < wanted:
            self._announce(held)
            start, stop = held.count, min(wanted, held.count + at_once)
            if self._by_blocks:
                # Reading for other parts replaces what a source has decoded, so no block is cut.
                stop = int(held.ends[held.ends.searchsorted(start, side="right")])
            for reader, limits in self._limits.items():
                reader.read_into(held.samples[start:stop], [rows[start:stop] for rows in held.rows[reader]], limits)
            held.count = stop
        return held

    def _announce(self, held: _Held) -> None:
        """Tell the sources of the next two blocks, which lie anywhere in a file, while earlier ones are used."""
        block = self._block
        while held.told < min(held.count + 2 * block, len(held.samples)):
            for reader in self._limits:
                reader.expect(held.samples[held.told : held.told + block])
            held.told += block

    def _empty(self) -> Rows:
        try:
            return {
                reader: [np.empty((self._capacity, *part.sample_shape), part.dtype) for part in reader.parts]
                for reader in self._limits
            }
        except MemoryError as error:
            raise InsufficientMemoryError(
                f"there is no memory for half a window, {self._capacity} samples of {next(iter(self._limits)).where} "
                f"({error}); take a smaller one, as Loader(window='64 MiB')"
            ) from error
