"""The order of an epoch, of the whole set or by windows of it: a function of seed and epoch alone.

For 2**20 samples and more no order is kept in memory: each sample is computed from its position.
"""

from __future__ import annotations

import functools
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from gpubatch.backend import Array, get_backend
from gpubatch.errors import (
    ArgumentError,
    InsufficientMemoryError,
    ShapeError,
    check_bool,
    check_int,
    check_real,
)
from gpubatch.inputs import checked_array
from gpubatch.loader.deals import Dealing, PartOf
from gpubatch.ops import CELL_WORDS, PERMUTATION_WORDS, CellSplit, Draws, Permutation, permutation_bytes
from gpubatch.passes import Deal
from gpubatch.sources import check_finite

Indices: TypeAlias = np.ndarray[tuple[int], np.dtype[np.int64]]

WORD = 2**64 - 1  # the largest seed and the largest epoch; the two are the key of the generator

DRAWING = 24  # peak bytes a sample while an order by weights is made: words, numbers, samples

LARGE = 1 << 20  # sets of at least so many samples have their order computed as it is used, without an array of it

LEAST = 1 << 12  # fewer numbers are shuffled by sorting in large sets, too: a network of few bits is not random enough

PEAK = 26  # peak bytes a sample while an order is sorted: words, their upper bits, places, sorted words

OF_RANK = 48  # peak bytes a sample while one rank's share of a window is made


def version_of(n: int, holds_out: bool = False) -> int:
    """The version of the order of ``n`` samples: 1 sorts random words, 2 computes a permutation by a formula.

    3 is 2 with a fraction held out, which a formula computes, too.
    """
    return 1 if n < LARGE else 2 + holds_out


def epoch_order(
    n: int, seed: int, epoch: int, shuffle: bool = True, replacement: bool = False, version: int | None = None
) -> Indices:
    """The indices of an epoch's ``n`` samples in order of use, int64 (n,): a function of the arguments alone.

    shuffle: a permutation; False: 0 … n-1
    replacement: ``n`` draws with replacement
    version: of :func:`version_of`; None: the latest for ``n``
    """
    n = check_int("n", n, 1)
    seed, epoch = check_int("seed", seed, 0, WORD), check_int("epoch", epoch, 0, WORD)
    if not check_bool("shuffle", shuffle):
        if check_bool("replacement", replacement):
            raise ArgumentError("replacement=True draws at random, so it needs shuffle=True, got shuffle=False")
        return np.arange(n, dtype=np.int64)
    # The raw words of the counter-based Philox4x64-10 (Salmon et al., 2011) never change. NumPy may change shuffle()
    # and permutation() from one version to the next.
    draw = np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw
    if check_bool("replacement", replacement):
        return _uniform(draw(n), n)
    if (version_of(n) if version is None else version) == 1:
        return _permutation(draw(n))
    return Permutation(n, seed, epoch).between(0, n)


def split(
    n: int, fraction: float, seed: int, labels: np.ndarray | None = None, name: str = "validation"
) -> tuple[Indices, Indices]:
    """A random split of ``n`` samples: those to train on, and a ``fraction`` to validate on; both ascending.

    labels: integers (n,), by which every class has its share of both sides, to one sample
    name: of the argument, for messages
    """
    held = held_of(n, fraction, name)
    # The counter's second word keeps these words apart from those of orders.
    key, counter = np.array([seed, 0], np.uint64), np.array([0, 1, 0, 0], np.uint64)
    words = np.random.Philox(key=key, counter=counter).random_raw(n)
    ranked = words.argsort(kind="stable") if labels is None else np.lexsort((words, labels))
    places = np.arange(n, dtype=np.int64)
    chosen = (places + 1) * held // n > places * held // n  # evenly, so in proportion from each class
    return np.sort(ranked[~chosen]), np.sort(ranked[chosen])


def held_of(n: int, fraction: float, name: str = "validation") -> int:
    """How many of ``n`` samples are held out."""
    held = round(check_real(name, fraction, 0.0, 1.0, open_low=True, open_high=True) * n)
    if not 0 < held < n:
        what = "validate" if name == "validation" else "test"
        raise ArgumentError(f"{name}={fraction:g} of {n} samples leaves {held} to {what} on and {n - held} to train")
    return held


class Fraction:
    """A held-out ``fraction`` of ``n`` samples, and the rest: a function of the seed and of the order's version.

    Before version 3 both sides are lists, from :func:`split`; from then on a :class:`CellSplit` computes them.
    """

    def __init__(
        self, n: int, fraction: float, seed: int, labels: Callable[[], np.ndarray | None] = lambda: None
    ) -> None:
        self.n, self.held, self.seed = n, held_of(n, fraction), seed
        self._listed = functools.cache(lambda: split(n, fraction, seed, labels()))

    def side(self, of_held: bool, version: int, ascending: bool) -> Indices | CellSplit:
        """The held-out samples, or the rest. Without ``ascending`` they come in any order, which is faster."""
        if version < 3:
            return self._listed()[of_held]
        return CellSplit(self.n, self.held, self.seed, of_held, ascending)


class WeightedOrder:
    """Samples drawn with replacement, each with a probability in proportion to its weight: ``Loader(order=...)``.

    weights: one for each sample, not negative, not all 0

    An epoch has as many draws as there are samples. It depends on the loader's seed and the epoch alone, so it is the
    same on every device and after a resume. With the weight 1 / (samples of the class) all classes are drawn equally
    often: ``gb.WeightedOrder(1 / np.bincount(Y)[Y])``.

    >>> Y = np.array([0, 0, 0, 1])
    >>> loader = gb.Loader(np.arange(4.0), Y, batch_size=2, order=gb.WeightedOrder(1 / np.bincount(Y)[Y]))
    >>> len(list(loader))
    2
    """

    def __init__(self, weights: Any) -> None:
        array = checked_array("weights", weights, get_backend("cpu"))
        if array.ndim != 1:
            raise ShapeError(f"weights must be one for each sample, of shape (samples,), got shape {array.shape}")
        check_finite("weights", array, array.dtype, None, get_backend("cpu"))
        self.weights = array.astype(np.float64)
        self.weights.flags.writeable = False
        if (low := float(self.weights.min())) < 0:
            raise ArgumentError(f"weights must be at least 0, got {low:g} at {int(self.weights.argmin())}")
        if not 0 < (total := float(self.weights.sum())) < np.inf:
            raise ArgumentError(f"weights must have a finite sum above 0, got {total:g}")

    @property
    def digest(self) -> str:
        """A digest of the weights, by which saved states are compared."""
        return hashlib.sha256(self.weights.astype("<f8").tobytes()).hexdigest()[:16]

    def __len__(self) -> int:
        """How many samples there are."""
        return len(self.weights)

    def __repr__(self) -> str:
        return f"<WeightedOrder of {len(self)} weights from {self.weights.min():.6g} to {self.weights.max():.6g}>"


def _uniform(words: np.ndarray[Any, np.dtype[np.uint64]], n: int) -> Indices:
    """Draws from ``n`` samples with replacement, one for each random word."""
    words %= np.uint64(n)
    return words.view(np.int64)


def _words(key: np.ndarray, start: int, stop: int) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """Words ``start`` to ``stop`` of ``Philox(key).random_raw``, of which each count gives four."""
    first = start // 4
    counter = np.array([first, 0, 0, 0], np.uint64)
    return np.random.Philox(key=key, counter=counter).random_raw(stop - 4 * first)[start - 4 * first :]


def _permutation(words: np.ndarray[Any, np.dtype[np.uint64]]) -> Indices:
    """The permutation of 0 … n-1 that ``n`` random words decide."""
    # Sorting random keys shuffles. Each key ends in the index of its sample, so keys are unique: every sorting
    # algorithm gives the same result, and the sorted keys hold the permutation, without an argsort.
    n = len(words)
    mask = np.uint64((1 << (n - 1).bit_length()) - 1)
    words &= ~mask
    words |= np.arange(n, dtype=np.uint64)
    # A radix sort by the upper 16 bits leaves the keys nearly in order for the second pass: 60,000 keys take 0.5 ms,
    # one sort of them 2.1 ms.
    keys = (words >> np.uint64(48)).astype(np.uint16)
    words = words[keys.argsort(kind="stable")]
    words.sort(kind="stable")
    words &= mask
    return words.view(np.int64)


class ListedImages:
    """A permutation as a list of its images."""

    def __init__(self, images: Indices) -> None:
        self.images = images

    def between(self, start: int, stop: int) -> Indices:
        """The images of places ``start`` to ``stop``."""
        return self.images[start:stop]

    def places_of(self, images: Indices) -> Indices:
        """The places whose images these are."""
        return np.flatnonzero(np.isin(self.images, images))


class InBlocks:
    """The samples of blocks, one block after another, as a sequence that computes them when it is indexed.

    firsts: the first sample of each block
    sizes: the number of samples in each block
    """

    def __init__(self, firsts: Indices, sizes: Indices) -> None:
        self.ends = np.cumsum(sizes)
        self._shift = firsts - (self.ends - sizes)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, places: slice | Indices) -> Indices:
        if isinstance(places, slice):
            places = np.arange(*places.indices(len(self)), dtype=np.int64)
        found = self._shift[self.ends.searchsorted(places, side="right")]
        found += places
        return found


Samples: TypeAlias = InBlocks | Indices
Chosen: TypeAlias = Indices | CellSplit
Images: TypeAlias = ListedImages | Permutation


class EpochOf(NamedTuple):
    """One rank's epoch: all that its order depends on besides the samples and the windows.

    chosen: the samples that are used; None: all
    version: of :func:`version_of`
    """

    seed: int
    epoch: int
    shuffle: bool = True
    rank: int = 0
    world_size: int = 1
    chosen: Chosen | None = None
    version: int = 1

    def shuffled(self, count: int, stream: int, first: int = 0, step: int = 1) -> Images:
        """A permutation of ``count`` numbers at places first, first + step, ...; the identity without ``shuffle``."""
        if self.version > 1 and (count >= LEAST or not self.shuffle):
            return Permutation(count, self.seed, self.epoch, stream, first, step, self.shuffle)
        if not self.shuffle:
            return ListedImages(np.arange(first, count, step, dtype=np.int64))
        # The counter's upper word gives the list of blocks and each window words of their own.
        key = np.array([self.seed, self.epoch], np.uint64)
        drawn = _permutation(np.random.Philox(key=key, counter=[0, 0, 0, stream]).random_raw(count))
        return ListedImages(drawn[first::step])


class Windowed(ABC):
    """The order of an epoch that is shuffled by blocks. Memory holds one window of it at a time.

    The list of blocks is shuffled; each window is the next few blocks, and its samples are shuffled. The order is a
    function of the arguments; without ``shuffle`` it is that of the set. Positions count one rank's samples: rank,
    rank + world_size, ... of the epoch.

    ``part`` is one shard of the epoch. Shards own neighbouring stretches of the list of shuffled blocks, as long as
    their number of samples in an epoch, and each shard cuts its stretch into windows. So each sample is in one shard,
    and shards differ by at most one sample a batch. Where a stretch ends inside a block, both neighbours read that
    block: each of k ranks reads its share of the blocks and at most two more.
    """

    def __init__(self, of: EpochOf, part: PartOf) -> None:
        self._of, self._low, self._high = of, part.start, part.stop
        self._streams = 1 + (part.number << 48)  # stream 0 is that of the list of blocks
        self.size = part.stop - part.start
        self._last: tuple[int, tuple[Samples, Images], Indices] | None = None

    @abstractmethod
    def __len__(self) -> int:
        """How many windows there are."""

    @abstractmethod
    def pieces(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """Positions ``start`` to ``stop`` as triples (window, first, end), the last two counted within the window."""

    @abstractmethod
    def _listed(self, window: int) -> tuple[InBlocks, int]:
        """All ranks' samples of a window in the order of reading, and the position where the window begins."""

    def part(self, window: int) -> tuple[Samples, Images]:
        """A window's samples in the order of reading, and the places among them in the order of use."""
        return self._made(window)[1]

    def ends(self, window: int) -> Indices:
        """Where the blocks of a window end among its samples; for one rank alone."""
        return self._made(window)[2]

    def indices(self, start: int, stop: int) -> Indices:
        """The samples at positions ``start`` to ``stop``."""
        found = [np.empty(0, np.int64)]
        for window, a, b in self.pieces(start, stop) if start < stop else ():
            samples, use = self.part(window)
            found.append(samples[use.between(a, b)])
        return np.concatenate(found)

    def _made(self, window: int) -> tuple[int, tuple[Samples, Images], Indices]:
        """A window's number, its :meth:`part` and its :meth:`ends`; the latest one is kept."""
        if self._last is None or self._last[0] != window:
            listed, start = self._listed(window)
            self._last = window, self._of_rank(window, listed, start), listed.ends
        return self._last

    def _of_rank(self, window: int, samples: Samples, start: int) -> tuple[Samples, Images]:
        """This rank's share of a window's ``samples``, which begin at ``start``, and the order of their use."""
        rank, world_size, chosen = self._of.rank, self._of.world_size, self._of.chosen
        first = (rank - start) % world_size
        use = self._of.shuffled(len(samples), self._streams + window, first, world_size)
        if world_size > 1:
            mine = use.between(0, len(range(first, len(samples), world_size)))
            kept = np.sort(mine)
            samples, use = samples[kept], ListedImages(np.searchsorted(kept, mine))
        elif self._of.version == 1:
            samples = samples[:]
        return samples if chosen is None else chosen[samples[:]], use

    def _before(self, start: Any) -> Any:
        """The number of this rank's positions before ``start``."""
        return (start - self._of.rank + self._of.world_size - 1) // self._of.world_size


class WindowOrder(Windowed):
    """Windows of ``together`` of the ``n`` samples, in blocks of ``block`` neighbours."""

    def __init__(self, n: int, of: EpochOf, together: int, block: int, part: PartOf | None = None) -> None:
        Windowed.__init__(self, of, part or PartOf(0, 0, n))
        self.n, self.block = n, block
        count, self._step = -(-n // block), max(1, together // block)  # blocks in all, and in a window
        self._blocks = of.shuffled(count, 0)
        # The place of the set's last block, which may be short, and the number of samples that it lacks.
        self._short = int(self._blocks.places_of(np.array([count - 1]))[0]) if of.shuffle else count - 1
        self._lacking = count * block - n
        self._first = self._block_at(self._low)
        self._count = self._block_at(self._high - 1) + 1 - self._first if self.size else 0

    def __len__(self) -> int:
        return -(-self._count // self._step)

    def _begin(self, block: int) -> int:
        """The position at which a block of the list begins, in samples."""
        return block * self.block - (self._lacking if block > self._short else 0)

    def _block_at(self, position: int) -> int:
        """The block of the list that has the sample at a position."""
        block = position // self.block
        later = (position + self._lacking) // self.block
        return later if later > self._short else block

    def _start(self, window: int) -> int:
        """The position of the epoch at which a window begins."""
        begin = self._begin(self._first + min(window * self._step, self._count))
        return min(max(begin, self._low), self._high) - self._low

    def _listed(self, window: int) -> tuple[InBlocks, int]:
        first = self._first + window * self._step
        end = self._first + min((window + 1) * self._step, self._count)
        firsts = self._blocks.between(first, end) * self.block
        sizes = np.minimum(self.n - firsts, self.block)
        sizes[-1] -= max(self._begin(end) - self._high, 0)
        before = max(self._low - self._begin(first), 0)
        firsts[0] += before
        sizes[0] -= before
        return InBlocks(firsts, sizes), self._start(window)

    def pieces(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """See :class:`Windowed`."""
        found = []
        position = self._low + self._of.rank + start * self._of.world_size
        window = (self._block_at(position) - self._first) // self._step
        while window < len(self) and (low := self._before(self._start(window))) < stop:
            high = self._before(self._start(window + 1))
            if max(start, low) < min(stop, high):
                found.append((window, max(start - low, 0), min(stop, high) - low))
            window += 1
        return found


class UnevenBlocks:
    """An epoch's shuffled list of blocks of unequal sizes.

    bounds: the first sample of each block, then the number of samples

    ``begins`` and ``ends`` are positions in the list, in samples. A position plus the block's ``shift`` is the sample.
    """

    def __init__(self, bounds: Indices, of: EpochOf) -> None:
        blocks = of.shuffled(len(bounds) - 1, 0).between(0, len(bounds) - 1)
        self.ends: Indices = np.cumsum(np.diff(bounds)[blocks])
        self.begins: Indices = np.concatenate([[0], self.ends[:-1]])
        self.shift: Indices = bounds[:-1][blocks] - self.begins


class UnevenOrder(Windowed):
    """Windows of at most ``together`` samples, in blocks of unequal sizes, such as the row groups of several files.

    A block is in one window; a larger block is in several windows that follow one another, so that it is decoded once.
    The orders of several parts share one list of ``blocks``.
    """

    def __init__(self, blocks: UnevenBlocks, of: EpochOf, together: int, part: PartOf | None = None) -> None:
        part = part or PartOf(0, 0, int(blocks.ends[-1]))
        Windowed.__init__(self, of, part)
        self._blocks = blocks
        ends, starts = self._blocks.ends, [part.start]
        while (start := starts[-1]) < part.stop:
            whole = int(ends.searchsorted(start + together, side="right"))
            end = int(ends[whole - 1]) if whole else 0
            starts.append(min(end if end > start else start + together, part.stop))
        self._starts = np.array(starts, np.int64)
        self._first = self._before(self._starts - part.start)

    def __len__(self) -> int:
        return len(self._starts) - 1

    def _listed(self, window: int) -> tuple[InBlocks, int]:
        blocks = self._blocks
        start, stop = self._starts[window : window + 2]
        of = slice(blocks.ends.searchsorted(start, side="right"), blocks.ends.searchsorted(stop, side="left") + 1)
        begins = np.maximum(blocks.begins[of], start)
        return InBlocks(begins + blocks.shift[of], np.minimum(blocks.ends[of], stop) - begins), int(start)

    def pieces(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """See :class:`Windowed`."""
        first, end = self._first.searchsorted((start, stop - 1), side="right").tolist()
        return [
            (window, max(start - low, 0), min(stop, high) - low)
            for window in range(first - 1, end)
            for low, high in [(int(self._first[window]), int(self._first[window + 1]))]
            if low < high
        ]


class Order:
    """The samples of every epoch of one rank, in the order of their use.

    n: the samples of the set
    seed, shuffle, replacement, rank, world_size: the loader's arguments
    window: samples that are shuffled together; 0: the whole set
    block: neighbours that stay together in a window; 0: none
    weighted: the weights by which samples are drawn
    bounds: those of the blocks of an :class:`UnevenOrder`, of at most ``block`` samples
    dealing: how batches are dealt to parts and ranks; None: they are not

    Where batches are dealt, positions of an epoch count all ranks' samples, and this rank has its own parts of a batch:
    a stretch of the batch, or by windows some of each part's own order, whose windows share ``window`` equally. There
    an order depends on the ``size`` of batches, which may be left out otherwise.
    """

    def __init__(
        self,
        n: int,
        seed: int = 0,
        shuffle: bool = True,
        replacement: bool = False,
        rank: int = 0,
        world_size: int = 1,
        window: int = 0,
        block: int = 0,
        weighted: WeightedOrder | None = None,
        bounds: Indices | None = None,
        dealing: Dealing | None = None,
    ) -> None:
        self._bounds, self.dealt, self.dealing = bounds, dealing is not None, dealing or Dealing(1)
        self.seed, self.shuffle, self.replacement, self.weighted = seed, shuffle, replacement, weighted
        self.rank, self.world_size, self.window, self.block = rank, world_size, window, block
        self._all, self.version = n, version_of(n)
        self._side: tuple[Fraction, bool, bool] | None = None  # the arguments of choose_side
        self.choose(None)

    def deal(self, rows: int) -> Deal | None:
        """How a batch of so many rows lies among parts and ranks; None where batches are not dealt."""
        return self.dealing.deal(rows) if self.dealt else None

    def own_share(self, size: int, of: int | None = None) -> int:
        """This rank's samples of an epoch in batches of ``size``, or of its first ones, to position ``of``."""
        full, rest = divmod(self.share if of is None else of, size)
        return full * self.dealing.own(size) + self.dealing.own(rest)

    @property
    def together(self) -> int:
        """Samples that are shuffled together: a part's share of ``window``."""
        return self.window // self.dealing.shards

    def choose_side(self, of: Fraction, of_held: bool, ascending: bool) -> None:
        """Use only the held-out samples, or only the rest, from now on; ``ascending`` where they are read in order."""
        self._side = of, of_held, ascending
        self.version = version_of(self._all, True) if self.version == version_of(self._all) else self.version
        self._choose(of.side(of_held, self.version, ascending))

    def choose(self, chosen: Chosen | None) -> None:
        """Use only the samples ``chosen`` from now on; None: all."""
        self._side = None
        self.version = min(self.version, version_of(self._all))
        self._choose(chosen)

    def _choose(self, chosen: Chosen | None) -> None:
        self.chosen, self.n = chosen, self._all if chosen is None else len(chosen)
        # An epoch's samples: this rank's, or those of all ranks where each batch is dealt.
        self.share = len(range(self.rank, self.n, self.world_size))
        self._next: tuple[int, int, Indices] | None = None  # a prepared epoch, the batch size, and the order
        self.bounds = self._bounds
        if chosen is not None and self._bounds is not None:
            self.bounds = np.unique(chosen.searchsorted(self._bounds))
        self.sums: np.ndarray | None = None  # cumulative weights; only chosen samples have any
        if self.weighted is not None:
            weights = self.weighted.weights
            if chosen is not None:
                index = chosen if isinstance(chosen, np.ndarray) else chosen[np.arange(len(chosen))]
                weights = np.zeros_like(weights)
                weights[index] = self.weighted.weights[index]
            self.sums = np.cumsum(weights)

    def take_version(self, version: int) -> None:
        """Make orders of ``version``, that of a saved state."""
        latest = version_of(self._all, self._side is not None)
        if version > latest:
            raise ArgumentError(f"state has order={version}, this loader order={latest}")
        if version != self.version:
            self.version, self._next = version, None
            if self._side is not None:
                of, of_held, ascending = self._side
                self._choose(of.side(of_held, version, ascending))

    def windows(self, epoch: int, size: int = 1) -> Sequence[Windowed]:
        """The orders of an epoch by windows, in batches of ``size``: one for each of this rank's parts."""
        parts = self.dealing.parts_of(self.n, size)
        of = EpochOf(self.seed, epoch, self.shuffle, self.rank, self.world_size, self.chosen, self.version)
        if self.bounds is None:
            return [WindowOrder(self.n, of, self.together, self.block, part) for part in parts]
        blocks = UnevenBlocks(self.bounds, of)
        return [UnevenOrder(blocks, of, self.together, part) for part in parts]

    def whole(self, epoch: int, size: int = 1) -> Indices:
        """All of this rank's samples of an epoch in batches of ``size``, batch by batch."""
        prepared, self._next = self._next, None
        if prepared is not None and prepared[:2] == (epoch, size):
            return prepared[2]
        if self.dealing.shards == 1:
            return self.between(epoch, size)(0, self.share) if self.window else self._listed(epoch)
        if self.window:
            at = self.between(epoch, size)
            return np.concatenate([at(start, min(start + size, self.n)) for start in range(0, self.n, size)])
        listed, full = self._listed(epoch), self.n // size
        (start, stop), rest = self.dealing.positions(0, size), self.dealing.positions(full * size, self.n)
        return np.concatenate([listed[: full * size].reshape(full, size)[:, start:stop].ravel(), listed[slice(*rest)]])

    def between(self, epoch: int, size: int = 1) -> Callable[[int, int], Indices]:
        """A function (start, stop) that gives this rank's samples of the batch of ``size``, or the last one, there.

        Where batches are not dealt, ``start`` and ``stop`` may be any positions.
        """
        if self.window:
            orders, in_parts = self.windows(epoch, size), self.dealing.in_parts
            if not self.dealt:
                return orders[0].indices
            return lambda start, stop: np.concatenate(
                [of.indices(*cut) for of, cut in zip(orders, in_parts(start, stop, size), strict=True)]
            )
        at, positions = self._at_positions(epoch, size), self.dealing.positions
        return (lambda start, stop: at(*positions(start, stop))) if self.dealt else at

    def _at_positions(self, epoch: int, size: int) -> Callable[[int, int], Indices]:
        """A function (start, stop) that gives the samples at these positions of an epoch without windows."""
        if self._by_arithmetic:
            return lambda start, stop: self._at(epoch, start, stop)
        if self._by_formula:
            found = Permutation(self.n, self.seed, epoch, 0, self.rank, self.world_size, among=self._among)
            return found.between if self._among is self.chosen else lambda a, b: self._samples(found.between(a, b))
        mine = self._listed(epoch) if self.dealt else self.whole(epoch, size)
        return lambda start, stop: mine[start:stop]

    def _listed(self, epoch: int) -> Indices:
        """The samples at all positions of an epoch without windows."""
        if self.weighted is not None:
            return self._at(epoch, 0, self.share)
        if self._by_arithmetic or self._by_formula:
            return self._at_positions(epoch, self.n)(0, self.share)
        try:
            order = epoch_order(self.n, self.seed, epoch, self.shuffle, self.replacement, 1)
        except MemoryError as error:
            if self.n < LARGE:
                raise
            raise InsufficientMemoryError(
                f"there is no memory for the order of {self.n} samples, {PEAK} bytes each while it is made, which a "
                f"state of gpubatch 0.1 goes on with ({error}); a new run needs none"
            ) from error
        return self._samples(order[self.rank :: self.world_size])

    @property
    def _among(self) -> CellSplit | None:
        """The samples that are used, where they are computed and not listed."""
        return self.chosen if isinstance(self.chosen, CellSplit) else None

    @property
    def by_kernels(self) -> bool:
        """Whether kernels can compute the samples of an epoch, see :meth:`computed`."""
        if self.window or self.sums is not None:
            return not self.window
        if self._among is not self.chosen or (self._among is not None and self._among.ascending):
            return False
        return self.replacement or (self._all >= LARGE and (self._by_formula or not self.shuffle))

    @property
    def kernel_sums(self) -> int:
        """The number of cumulative weights, 8 bytes each, by which kernels draw; 0 where they do not."""
        return 0 if self.sums is None or not self.by_kernels else len(self.sums)

    @property
    def kernel(self) -> tuple[str, int]:
        """The struct by which kernels compute the samples of an epoch, and its number of words."""
        kind = "Drawn" if self.replacement else "Computed"
        if self._among is None or self.sums is not None:
            return kind, PERMUTATION_WORDS
        return f"Among<{kind}>", PERMUTATION_WORDS + CELL_WORDS

    def computed(self, epoch: int, sums: Array = None) -> Permutation | Draws:
        """An epoch's samples for kernels to compute; ``sums`` is :attr:`sums` on the device."""
        of_rank = self.seed, epoch, self.rank, self.world_size
        if self.sums is not None:
            return Draws(len(self.sums), *of_rank, sums.data.ptr, float(self.sums[-1]))
        if self.replacement:
            return Draws(self.n, *of_rank, among=self._among)
        return Permutation(self.n, self.seed, epoch, 0, self.rank, self.world_size, self.shuffle, self._among)

    def prepare(self, epoch: int, size: int = 1) -> None:
        """Make the order of an epoch now, while a device works on the epoch before."""
        if not self.by_kernels and (self._next is None or self._next[:2] != (epoch, size)):
            self._next = epoch, size, self.whole(epoch, size)

    def memory(self) -> tuple[int, int]:
        """Bytes of main memory while the order of an epoch is made, and while it is used; without those of windows."""
        held = 0 if self.sums is None else self.sums.nbytes
        held += 0 if self.chosen is None else self.chosen.nbytes
        if self.window or self._by_arithmetic:
            return held, held
        if self._by_formula:
            return held, held + permutation_bytes()
        making = DRAWING if self.weighted is not None else 0 if self.replacement else PEAK
        return held + making * self.n, held + 8 * self.n

    @property
    def _by_arithmetic(self) -> bool:
        """Whether a position alone gives its sample, without the order of the epoch."""
        return not self.window and (not self.shuffle or (self.replacement and self.n >= LARGE))

    @property
    def _by_formula(self) -> bool:
        """Whether the samples are images of a permutation that is computed."""
        shuffled = self.shuffle and not (self.window or self.replacement)
        return shuffled and self.version > 1 and self.n >= LEAST

    def _at(self, epoch: int, start: int, stop: int) -> Indices:
        """The samples at these positions: in order, or drawn."""
        first, end, step = self.rank + start * self.world_size, self.rank + stop * self.world_size, self.world_size
        if not self.shuffle:
            return self._samples(np.arange(first, end, step, dtype=np.int64))
        words = _words(np.array([self.seed, epoch], np.uint64), first, end)[::step]
        if self.sums is None:
            return self._samples(_uniform(words, self.n))
        numbers = (words >> np.uint64(11)) * (2.0**-53 * self.sums[-1])  # of 53 bits, from 0 to the sum of the weights
        found: Indices = self.sums.searchsorted(numbers, side="right")
        return found

    def _samples(self, places: Indices) -> Indices:
        return places if self.chosen is None else self.chosen[places]
