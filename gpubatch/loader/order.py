"""The order of an epoch: a function of seed and epoch alone, of the whole set or by windows of it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np

from gpubatch.backend import get_backend
from gpubatch.errors import (
    ArgumentError,
    InsufficientMemoryError,
    ShapeError,
    check_bool,
    check_int,
    check_real,
)
from gpubatch.inputs import checked_array
from gpubatch.sources import check_finite

__all__ = ["PEAK", "WORD", "Indices", "Order", "UnevenOrder", "WeightedOrder", "WindowOrder", "epoch_order", "split"]

Indices: TypeAlias = np.ndarray[tuple[int], np.dtype[np.int64]]

WORD = 2**64 - 1  # the largest seed and the largest epoch: together they are the key of the generator

DRAWING = 24  # bytes a sample in the making of an order by weights: words, numbers, and samples

LARGE = 1 << 24  # samples, from which on nothing of 8 bytes a sample is made where it can be avoided

PEAK = 26  # bytes a sample in the making of an order: words, their upper bits, places, and the words there


def epoch_order(n: int, seed: int, epoch: int, shuffle: bool = True, replacement: bool = False) -> Indices:
    """The indices of an epoch's ``n`` samples in the order in which they are used: a function of the arguments alone.

    A permutation; or ``n`` draws with replacement; or 0 … n-1 without ``shuffle``.
    """
    n = check_int("n", n, 1)
    key = np.array([check_int("seed", seed, 0, WORD), check_int("epoch", epoch, 0, WORD)], np.uint64)
    if not check_bool("shuffle", shuffle):
        if check_bool("replacement", replacement):
            raise ArgumentError("replacement=True draws at random, so it needs shuffle=True, got shuffle=False")
        return np.arange(n, dtype=np.int64)
    # The raw words of the counter-based Philox4x64-10 (Salmon et al., 2011) are fixed for good; what NumPy makes of
    # them in shuffle() or permutation() may change from one version to the next.
    draw = np.random.Philox(key=key).random_raw
    if check_bool("replacement", replacement):
        return _uniform(draw(n), n)
    return _permutation(draw(n))


def split(
    n: int, fraction: float, seed: int, labels: np.ndarray | None = None, name: str = "validation"
) -> tuple[Indices, Indices]:
    """``n`` samples split at random: those to train on, and ``fraction`` of them to validate on, each in order.

    Where there are integer ``labels`` every class has its share of both, to one sample.
    """
    held = round(check_real(name, fraction, 0.0, 1.0, open_low=True, open_high=True) * n)
    if not 0 < held < n:
        what = "validate" if name == "validation" else "test"
        raise ArgumentError(f"{name}={fraction:g} of {n} samples leaves {held} to {what} on and {n - held} to train")
    # The counter's second word keeps these numbers apart from those of all orders.
    key, counter = np.array([seed, 0], np.uint64), np.array([0, 1, 0, 0], np.uint64)
    words = np.random.Philox(key=key, counter=counter).random_raw(n)
    ranked = words.argsort(kind="stable") if labels is None else np.lexsort((words, labels))
    places = np.arange(n, dtype=np.int64)
    chosen = (places + 1) * held // n > places * held // n  # evenly, so in proportion from each class
    return np.sort(ranked[~chosen]), np.sort(ranked[chosen])


class WeightedOrder:
    """Samples drawn with replacement, each with a probability in proportion to its weight: ``Loader(order=...)``.

    weights: one for each sample, not negative, not all 0

    An epoch has as many draws as there are samples. It is a function of the loader's seed and of the epoch alone, the
    same on every device and after a resume. Weights of 1 / (samples of its class) show all classes equally often:
    ``gb.WeightedOrder(1 / np.bincount(Y)[Y])``.

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
    """Draws from ``n`` samples that random ``words`` decide."""
    words %= np.uint64(n)
    return words.view(np.int64)


def _words(key: np.ndarray, start: int, stop: int) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """The words from one position to another of those that ``Philox(key).random_raw`` gives: four for each count."""
    first = start // 4
    counter = np.array([first, 0, 0, 0], np.uint64)
    return np.random.Philox(key=key, counter=counter).random_raw(stop - 4 * first)[start - 4 * first :]


def _permutation(words: np.ndarray[Any, np.dtype[np.uint64]]) -> Indices:
    """The permutation of as many numbers that random ``words`` decide."""
    # Sorting random keys shuffles. Each key ends in the index of its sample: so no two keys are equal, every sorting
    # algorithm gives the same result, stable or not, and the permutation comes with the keys, without an argsort.
    n = len(words)
    mask = np.uint64((1 << (n - 1).bit_length()) - 1)
    words &= ~mask
    words |= np.arange(n, dtype=np.uint64)
    # A radix sort by the upper 16 bits leaves little to the second pass, which goes through what is nearly in order:
    # 60,000 keys in 0.5 ms, sorted at once 2.1 ms.
    keys = (words >> np.uint64(48)).astype(np.uint16)
    words = words[keys.argsort(kind="stable")]
    words.sort(kind="stable")
    words &= mask
    return words.view(np.int64)


class WindowOrder:
    """The order of an epoch that is shuffled by blocks: of ``n`` samples, in memory for one window at a time.

    The set is cut into blocks of ``block`` neighbours, their list is shuffled, and each window is as many of the next
    blocks as hold ``together`` samples, shuffled. All of it is a function of the arguments; without ``shuffle`` the
    order is that of the set. Positions are those of ``rank``: of the epoch's, rank, rank + world_size, ... The
    samples are those in ``chosen``, or all.
    """

    def __init__(
        self,
        n: int,
        seed: int,
        epoch: int,
        together: int,
        block: int,
        shuffle: bool = True,
        rank: int = 0,
        world_size: int = 1,
        chosen: Indices | None = None,
    ) -> None:
        self.n, self.block, self.shuffle, self.rank, self.world_size = n, block, shuffle, rank, world_size
        self._chosen = chosen
        self._key = np.array([seed, epoch], np.uint64)
        count = -(-n // block)
        self._blocks = self._shuffled(count, 0)
        self._step = max(1, together // block)
        self._starts = np.arange(-(-count // self._step) + 1, dtype=np.int64)
        self._starts *= self._step * block
        self._starts[-1] = count * block
        short = int(np.flatnonzero(self._blocks == count - 1)[0]) // self._step  # the window of the last block
        self._starts[short + 1 :] -= count * block - n
        # The window's first position among this rank's: as many as there are of its positions before it.
        self._first = (self._starts - rank + world_size - 1) // world_size
        self._last: tuple[int, tuple[Indices, Indices]] | None = None

    def _shuffled(self, count: int, stream: int) -> Indices:
        if not self.shuffle:
            return np.arange(count, dtype=np.int64)
        # The counter's upper word keeps apart what is drawn for the list of blocks and for each window.
        return _permutation(np.random.Philox(key=self._key, counter=[0, 0, 0, stream]).random_raw(count))

    def __len__(self) -> int:
        """How many windows there are."""
        return len(self._starts) - 1

    def part(self, window: int) -> tuple[Indices, Indices]:
        """The samples of a window in the order in which they are read, and the places among them in order of use."""
        if self._last is not None and self._last[0] == window:
            return self._last[1]
        blocks = self._blocks[window * self._step : (window + 1) * self._step]
        samples = (blocks[:, None] * self.block + np.arange(self.block)).reshape(-1)
        samples = samples[samples < self.n]
        use = self._shuffled(len(samples), window + 1)
        if self.world_size > 1:
            use = use[(self.rank - int(self._starts[window])) % self.world_size :: self.world_size]
            kept = np.sort(use)
            samples, use = samples[kept], np.searchsorted(kept, use)
        if self._chosen is not None:
            samples = self._chosen[samples]
        self._last = window, (samples, use)
        return samples, use

    def pieces(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """Positions ``start`` to ``stop`` as (window, from, to), counted in the window."""
        first, end = self._first.searchsorted((start, stop - 1), side="right").tolist()
        return [
            (window, max(start - low, 0), min(stop, high) - low)
            for window in range(first - 1, end)
            for low, high in [(int(self._first[window]), int(self._first[window + 1]))]
            if low < high
        ]

    def indices(self, start: int, stop: int) -> Indices:
        """The samples at positions ``start`` to ``stop``."""
        found = []
        for window, a, b in self.pieces(start, stop):
            samples, use = self.part(window)
            found.append(samples[use[a:b]])
        return np.concatenate(found)


class UnevenOrder:
    """:class:`WindowOrder` of a set whose blocks have unequal sizes: the row groups of several files, say.

    Each begins where ``bounds`` says, whose last number is that of the samples. Their list is shuffled and cut into
    windows of at most ``together`` samples. A block goes to one window, unless it is larger: then to several that
    follow one another, so that what was decoded of it serves them all.
    """

    def __init__(
        self,
        bounds: Indices,
        seed: int,
        epoch: int,
        together: int,
        shuffle: bool = True,
        rank: int = 0,
        world_size: int = 1,
        chosen: Indices | None = None,
    ) -> None:
        self.shuffle, self.rank, self.world_size, self._chosen = shuffle, rank, world_size, chosen
        self._key = np.array([seed, epoch], np.uint64)
        blocks = self._shuffled(len(bounds) - 1, 0)
        self._ends = np.cumsum(np.diff(bounds)[blocks])
        self._begins = np.concatenate([[0], self._ends[:-1]])
        self._shift = bounds[:-1][blocks] - self._begins  # from a position in the list of blocks to its sample
        starts = [0]
        while (start := starts[-1]) < self._ends[-1]:
            whole = int(self._ends.searchsorted(start + together, side="right"))
            end = int(self._ends[whole - 1]) if whole else 0
            starts.append(end if end > start else start + together)
        self._starts = np.array(starts, np.int64)
        self._first = (self._starts - rank + world_size - 1) // world_size  # as in WindowOrder
        self._last: tuple[int, tuple[Indices, Indices]] | None = None

    def _shuffled(self, count: int, stream: int) -> Indices:
        if not self.shuffle:
            return np.arange(count, dtype=np.int64)
        return _permutation(np.random.Philox(key=self._key, counter=[0, 0, 0, stream]).random_raw(count))

    def __len__(self) -> int:
        """How many windows there are."""
        return len(self._starts) - 1

    def part(self, window: int) -> tuple[Indices, Indices]:
        """See :class:`WindowOrder`."""
        if self._last is not None and self._last[0] == window:
            return self._last[1]
        start, stop = self._starts[window : window + 2]
        of = slice(self._ends.searchsorted(start, side="right"), self._ends.searchsorted(stop, side="left") + 1)
        sizes = np.minimum(self._ends[of], stop) - np.maximum(self._begins[of], start)
        samples = np.arange(start, stop) + np.repeat(self._shift[of], sizes)
        use = self._shuffled(len(samples), window + 1)
        if self.world_size > 1:
            use = use[(self.rank - int(start)) % self.world_size :: self.world_size]
            kept = np.sort(use)
            samples, use = samples[kept], np.searchsorted(kept, use)
        if self._chosen is not None:
            samples = self._chosen[samples]
        self._last = window, (samples, use)
        return samples, use

    def pieces(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """See :class:`WindowOrder`."""
        first, end = self._first.searchsorted((start, stop - 1), side="right").tolist()
        return [
            (window, max(start - low, 0), min(stop, high) - low)
            for window in range(first - 1, end)
            for low, high in [(int(self._first[window]), int(self._first[window + 1]))]
            if low < high
        ]

    def indices(self, start: int, stop: int) -> Indices:
        """See :class:`WindowOrder`."""
        found = []
        for window, a, b in self.pieces(start, stop):
            samples, use = self.part(window)
            found.append(samples[use[a:b]])
        return np.concatenate(found)


class Order:
    """The samples of every epoch of one rank, in the order of their use.

    ``window`` samples are shuffled together, in blocks of ``block`` neighbours; 0 and 0: the whole set is. With
    ``bounds`` the blocks are those of :class:`UnevenOrder`, of at most ``block`` samples. With ``weighted`` samples are
    drawn by its weights.
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
    ) -> None:
        self._bounds = bounds
        self.seed, self.shuffle, self.replacement, self.weighted = seed, shuffle, replacement, weighted
        self.rank, self.world_size, self.window, self.block = rank, world_size, window, block
        self._all = n
        self.choose(None)

    def choose(self, chosen: Indices | None) -> None:
        """Use the samples at ``chosen`` alone from now on; None: all."""
        self.chosen, self.n = chosen, self._all if chosen is None else len(chosen)
        self.share = len(range(self.rank, self.n, self.world_size))  # this rank's samples in an epoch
        self._next: tuple[int, Indices] | None = None  # an epoch to come and its order
        self.bounds = self._bounds
        if chosen is not None and self._bounds is not None:
            self.bounds = np.unique(chosen.searchsorted(self._bounds))
        self._sums: np.ndarray | None = None  # of the weights up to each sample
        if self.weighted is not None:
            weights = self.weighted.weights
            self._sums = np.cumsum(weights if chosen is None else weights[chosen])

    def windows(self, epoch: int) -> WindowOrder | UnevenOrder:
        """The order of an epoch that is shuffled by windows."""
        of_rank = self.rank, self.world_size, self.chosen
        if self.bounds is not None:
            return UnevenOrder(self.bounds, self.seed, epoch, self.window, self.shuffle, *of_rank)
        return WindowOrder(self.n, self.seed, epoch, self.window, self.block, self.shuffle, *of_rank)

    def whole(self, epoch: int) -> Indices:
        """All samples of an epoch."""
        prepared, self._next = self._next, None
        if prepared is not None and prepared[0] == epoch:
            return prepared[1]
        if self._by_arithmetic or self.weighted is not None:
            return self._at(epoch, 0, self.share)
        if self.window:
            return self.windows(epoch).indices(0, self.share)
        try:
            order = epoch_order(self.n, self.seed, epoch, self.shuffle, self.replacement)
        except MemoryError as error:
            if self.n < LARGE:
                raise
            raise InsufficientMemoryError(
                f"there is no memory for the order of {self.n} samples, {PEAK} bytes each while it is made ({error}); "
                "shuffle by parts of the set: Loader(window='1 GiB')"
            ) from error
        return self._samples(order[self.rank :: self.world_size])

    def between(self, epoch: int) -> Callable[[int, int], Indices]:
        """A function of two positions: the samples from one to the other."""
        if self.window:
            return self.windows(epoch).indices
        if self._by_arithmetic:
            return lambda start, stop: self._at(epoch, start, stop)
        mine = self.whole(epoch)
        return lambda start, stop: mine[start:stop]

    def prepare(self, epoch: int) -> None:
        """Make the order of an epoch now, while a device works on the one before."""
        if self._next is None or self._next[0] != epoch:
            self._next = epoch, self.whole(epoch)

    def memory(self) -> tuple[int, int]:
        """Bytes of main memory: while the order of an epoch is made, and while it is used. Windows have their own."""
        held = 8 * self.n * ((self.chosen is not None) + (self._sums is not None))
        if self.window or self._by_arithmetic:
            return held, held
        drawing = DRAWING if self.chosen is None else DRAWING + 8  # places among the chosen, and the samples there
        making = drawing if self.weighted is not None else 0 if self.replacement else PEAK
        return held + making * self.n, held + 8 * self.n

    @property
    def _by_arithmetic(self) -> bool:
        """Whether the samples at any positions are known without the order of the epoch."""
        return not self.window and (not self.shuffle or (self.replacement and self.n >= LARGE))

    def _at(self, epoch: int, start: int, stop: int) -> Indices:
        """The samples at these positions, in order or drawn."""
        first, end, step = self.rank + start * self.world_size, self.rank + stop * self.world_size, self.world_size
        if not self.shuffle:
            return self._samples(np.arange(first, end, step, dtype=np.int64))
        words = _words(np.array([self.seed, epoch], np.uint64), first, end)[::step]
        if self._sums is None:
            return self._samples(_uniform(words, self.n))
        numbers = (words >> np.uint64(11)) * (2.0**-53 * self._sums[-1])  # of 53 bits, from 0 to the sum of the weights
        return self._samples(self._sums.searchsorted(numbers, side="right"))

    def _samples(self, places: Indices) -> Indices:
        return places if self.chosen is None else self.chosen[places]
