"""Mini-batches of a set: shuffled, sharded, converted, prepared ahead; the same ones on every device."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import functools
import inspect
import math
import os
import queue
import threading
import time
from collections.abc import Callable, Generator, Mapping
from typing import Any, TypeAlias

import numpy as np

from gpubatch.backend import Array, Backend, float_dtype, get_backend
from gpubatch.errors import ArgumentError, DTypeError, ShapeError, check_bool, check_choice, check_int, check_real
from gpubatch.sizing import BatchPlan, choose_batch_size, format_bytes, parse_bytes
from gpubatch.sources import ArraySource, Part, Reader, array_source, check_finite, convert

__all__ = ["Loader", "LoaderStats", "WindowOrder", "epoch_order"]

Indices: TypeAlias = np.ndarray[tuple[int], np.dtype[np.int64]]

# From so many elements a batch on, preparing it is worth a thread. Handing a batch over costs 10 to 25 µs; gathering
# takes 0.2 to 0.3 ns an element. Measured on two cores: a thread made bare iteration over batches of 256 x 784 up to
# twice as slow and a consumer no faster; from 2048 x 784 on it hides the gathering (-16 %, and -20 % at 4096 x 784)
# where a core is free, and is neutral (±6 %) where OpenBLAS keeps both cores.
WORTH_A_THREAD = 1 << 20

WORD = 2**64 - 1  # the largest seed and the largest epoch: together they are the key of the generator

DEFAULT_WINDOW = "256 MiB"  # for sources that read neighbours together
BLOCKS = 32  # in what is shuffled together: so many places of the set meet in a batch


# --- the order of an epoch ----------------------------------------------------------------------------------------


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
    words = np.random.Philox(key=key).random_raw(n)
    if check_bool("replacement", replacement):
        return (words % np.uint64(n)).astype(np.int64)
    return _permutation(words)


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
    words = words[(words >> np.uint64(48)).astype(np.uint16).argsort(kind="stable")]
    words.sort(kind="stable")
    words &= mask
    return words.astype(np.int64)


class WindowOrder:
    """The order of an epoch that is shuffled by blocks: of ``n`` samples, in memory for one window at a time.

    The set is cut into blocks of ``block`` neighbours, their list is shuffled, and each window is as many of the next
    blocks as hold ``together`` samples, shuffled. All of it is a function of the arguments; without ``shuffle`` the
    order is that of the set. Positions are those of ``rank``: of the epoch's, rank, rank + world_size, ...
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
    ) -> None:
        self.n, self.block, self.shuffle, self.rank, self.world_size = n, block, shuffle, rank, world_size
        self._key = np.array([seed, epoch], np.uint64)
        count = -(-n // block)
        self._blocks = self._shuffled(count, 0)
        lengths = np.full(count, block)
        lengths[self._blocks == count - 1] = n - (count - 1) * block
        self._step = max(1, together // block)
        self._starts = np.cumsum([0, *np.add.reduceat(lengths, np.arange(0, count, self._step))])
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
        self._last = window, (samples, use)
        return samples, use

    def pieces(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """Positions ``start`` to ``stop`` as (window, from, to), counted in the window."""
        first, last = np.searchsorted(self._first, [start, stop - 1], side="right") - 1
        return [
            (window, max(start - low, 0), min(stop, high) - low)
            for window in range(int(first), int(last) + 1)
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


# --- the loader ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class LoaderStats:
    """What the epoch that is running, or the last one, has done so far.

    ``wait_first`` is how many seconds the consumer waited for the first batch, ``waited`` for all the others;
    ``seconds`` is the time from the first batch to the last one so far. ``bytes_read`` is what the sources gave.
    """

    batches: int = 0
    samples: int = 0
    bytes_read: int = 0
    wait_first: float = 0.0
    waited: float = 0.0
    seconds: float = 0.0


class Loader:
    """Mini-batches on a backend: ``for x, y in loader`` is one epoch; ``for x in loader`` where there is no Y.

    X is (samples, ...) and x (batch, ...); with ``sample_axis=1`` X is (features, samples) and x (features, batch). A
    one-dimensional Y has its samples on axis 0 in either case. Every batch is a new C-contiguous array that may be kept
    or changed. The last batch is short where the batch size does not divide the number of samples; ``drop_last`` leaves
    it out. ``batch_size="auto"`` follows :func:`~gpubatch.sizing.choose_batch_size` with ``at_most``; ``plan`` has the
    reason in words.

    Instead of an array, X may be any :class:`~gpubatch.sources.Source`: ``gpubatch.sources`` opens ``.npy``, raw, IDX,
    Parquet, Arrow and HDF5 files that may be larger than memory. One that gives pairs has the labels, too; otherwise Y
    is an array or another source. Samples are its rows. Its values are checked as they are read.

    x has ``dtype`` float32 or float64: by default X's own if it is one of these, else float32; ``scale`` multiplies
    after the conversion. Y keeps its element type. X and floating Y must be finite. ``transform`` is then called with
    each batch, x or, where it takes two arguments, x and y, and what it returns takes their place: whole arrays on the
    backend, one entry a sample; on the CPU in the thread that prepares. ``to_batch`` leaves it out.

    The order is :func:`epoch_order` of ``seed`` and ``epoch``, the same on every device and after a resume. ``rank``
    takes its positions rank, rank + world_size, ...: together the ranks see each sample once, and their numbers of
    samples differ by at most one. ``prefetch`` is how many batches a background thread prepares ahead where they are
    read or large (2²⁰ elements on the host); others are not worth a thread: they are prepared in the caller, as all
    with ``prefetch=0``.

    ``window``, a number of samples or of bytes such as ``"1 GiB"``, bounds what is held of a set that is read: half of
    it is in use while the other half is read, so it is for sets larger than memory. Neighbours are read together: the
    set is cut into blocks, the list of blocks is shuffled, as many as fill half a window come together, and their
    samples are shuffled. Unlike in a full shuffle, where any two samples may meet in a batch, those of a block always
    share a window, and a batch comes from at most 32 places of the set (a block is a 32nd of the half, or what the
    source decodes at once where that is more). Where the set is sorted, by class or by time, make the window large
    enough for a fair mixture, or shuffle the file once. Sources that read single samples at a cost have a window of 256
    MiB by default. ``shuffle=False`` keeps the order of the set.

    ``stats`` has what the running epoch, or the last one, did so far, and how long its consumer waited.
    ``epoch`` is the epoch that is running, or the next one. An iteration that was left early ends its epoch: the next
    one starts the next epoch from its beginning. ``state_dict`` still has the place where it was left, and
    ``load_state_dict`` returns there. One iteration runs at a time; a second one ends the first.

    >>> loader = Loader(np.eye(5, dtype="float32"), np.arange(5), batch_size=2, backend="cpu")
    >>> [(x.shape, y.shape) for x, y in loader]
    [((2, 5), (2,)), ((2, 5), (2,)), ((1, 5), (1,))]
    """

    def __init__(
        self,
        X: Any,
        Y: Any = None,
        batch_size: int | str = "auto",
        shuffle: bool = True,
        replacement: bool = False,
        seed: int = 0,
        drop_last: bool = False,
        sample_axis: int = 0,
        backend: str | Backend = "auto",
        dtype: Any = None,
        scale: float | None = None,
        prefetch: int = 2,
        rank: int = 0,
        world_size: int = 1,
        at_most: int = 512,
        window: int | str | None = None,
        transform: Callable[..., Any] | None = None,
    ) -> None:
        self.shuffle = check_bool("shuffle", shuffle)
        self.replacement = check_bool("replacement", replacement)
        if replacement and not shuffle:
            raise ArgumentError("replacement=True draws at random, so it needs shuffle=True, got shuffle=False")
        self.seed = check_int("seed", seed, 0, WORD)
        self.drop_last = check_bool("drop_last", drop_last)
        self.sample_axis = check_int("sample_axis", sample_axis, 0, 1)
        self.prefetch = check_int("prefetch", prefetch, 0)
        self.world_size = check_int("world_size", world_size, 1)
        self.rank = check_int("rank", rank, 0, self.world_size - 1)
        self.at_most = check_int("at_most", at_most, 1)
        self.automatic = isinstance(batch_size, str)
        if isinstance(batch_size, str):
            check_choice("batch_size, if not an integer,", batch_size, ["auto"])
        else:
            batch_size = check_int("batch_size", batch_size, 1)

        self.backend = get_backend(backend)
        inputs = self._inputs(X, Y)
        x = inputs[0]
        self.source_dtype, self.n_samples = x.dtype, x.n_samples
        if dtype is not None:
            self.dtype = float_dtype(dtype)
        else:
            self.dtype = np.dtype(np.float64 if x.dtype.kind == "f" and x.dtype.itemsize == 8 else np.float32)
        limit = float(np.finfo(self.dtype).max)
        self.scale = None if scale is None else check_real("scale", scale, -limit, limit)
        factor = None if self.scale is None else float(self.dtype.type(self.scale))  # a Python float promotes nothing

        self._columns = [_Column(x, self.dtype, factor, self.backend)]
        for y in inputs[1:]:
            if y.n_samples != self.n_samples:
                raise ShapeError(
                    f"X and Y must have equal numbers of samples, got X of shape {x.shape} with {self.n_samples} along "
                    f"axis {x.axis} and Y of shape {y.shape} with {y.n_samples} along axis {y.axis}"
                )
            self._columns.append(_Column(y, y.dtype.newbyteorder("="), None, self.backend))
        for column in self._columns:
            if isinstance(column.source, ArraySource):
                check_finite(column.source, column.dtype, column.scale, self.backend)
        self._limits: dict[Reader, list[float]] = {}  # of each reader's arrays, the largest number that batches hold
        for column in self._columns:
            if isinstance(column.source, Part):
                self._limits.setdefault(column.source.reader, []).append(column.limit)
        self.window, self.block = self._window(window)
        self.transform, self._both = transform, transform is not None and self._takes_both(transform)
        self.stats = LoaderStats()

        if self.n_samples < self.world_size:
            raise ArgumentError(f"world_size must be at most the {self.n_samples} samples, got {self.world_size}")
        self._share = len(range(self.rank, self.n_samples, self.world_size))  # this rank's samples in an epoch
        self._epoch = self._batch = 0  # the position: batches of this epoch that were yielded
        self._run: object | None = None  # the iteration that is running
        self._left = False  # whether the iteration before was left in the middle
        if isinstance(batch_size, str):
            self.plan = self._choose(0, 0)
        elif self.drop_last and batch_size > self._share:
            raise ArgumentError(
                f"drop_last=True leaves no batch: batch_size={batch_size} is more than the {self._share} samples"
            )
        else:
            self.plan = self._given(min(batch_size, self._share), f"batch_size={batch_size} was given")

    def _inputs(self, X: Any, Y: Any) -> list[ArraySource | Part]:
        """The sources of x and of the labels."""
        inputs: list[ArraySource | Part] = []
        for name, given in (("X", X), ("Y", Y)):
            if given is None and name == "Y":
                continue
            if not (hasattr(given, "read") and hasattr(given, "__len__")):
                inputs.append(array_source(name, given, self.sample_axis, self.backend))
                if name == "X" and len(inputs[0].shape) <= self.sample_axis:
                    raise ShapeError(f"X must be (features, samples) with sample_axis=1, got shape {inputs[0].shape}")
                continue
            parts = Reader(name, given).parts
            if self.sample_axis:
                raise ArgumentError(f"sample_axis=1 needs arrays, {name} is a source of rows")
            if len(parts) > (1 if name == "Y" or Y is not None else 2):
                raise ArgumentError(
                    f"X and Y must be two arrays in all, {parts[0].reader.where} alone gives {len(parts)} for {name}"
                )
            inputs += parts
        return inputs

    def _window(self, window: int | str | None) -> tuple[int, int]:
        """Samples that are shuffled together and how many neighbours among them are a block; zeros: all of the set."""
        blocks = [reader.block for reader in self._limits if reader.block is not None]
        if window is None and (not blocks or self.replacement):
            return 0, 0
        if self.replacement:
            raise ArgumentError(
                f"replacement=True draws from the whole set, so it has no window, got window={window!r}"
            )
        window = DEFAULT_WINDOW if window is None else window
        if isinstance(window, str):
            per_sample = sum(column.source.bytes_per_sample(column.source.dtype) for column in self._columns)
            half = parse_bytes("window", window) // per_sample // 2
        else:
            half = check_int("window", window, 2) // 2
        half = max(1, min(half, self.n_samples))
        least = max(1, half // BLOCKS)
        whole = max(blocks, default=1)
        # Whole blocks of the source, so that none is read twice, unless not even one of them is within the bound.
        block = min(-(-least // whole) * whole, half)
        return (half if half < self.n_samples else self.n_samples + block - 1) // block * block, block

    def _takes_both(self, transform: Callable[..., Any]) -> bool:
        """Whether ``transform`` takes x and y, and not x alone."""
        if not callable(transform):
            raise DTypeError(f"transform must be a function of x, or of x and y, got {type(transform).__name__}")
        try:
            parameters = inspect.signature(transform).parameters.values()
        except ValueError:  # some builtins do not tell
            return False
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        needed = sum(p.kind in kinds and p.default is inspect.Parameter.empty for p in parameters)
        if needed > len(self._columns):
            raise ArgumentError(f"transform must take x{', or x and y' * self.labelled}; it takes {needed} arguments")
        return needed == 2

    # --- sizes --------------------------------------------------------------------------------------------------

    @property
    def labelled(self) -> bool:
        """Whether batches are pairs (x, y)."""
        return len(self._columns) > 1

    @property
    def batch_size(self) -> int:
        """Samples in a batch; the last one of an epoch may have fewer."""
        return self.plan.batch_size

    def __len__(self) -> int:
        """Batches in an epoch of this rank."""
        return self._share // self.batch_size if self.drop_last else -(-self._share // self.batch_size)

    def replan(self, bytes_per_sample: int, fixed_bytes: int) -> BatchPlan:
        """Choose the batch size again, with a model's ``bytes_per_sample`` and ``fixed_bytes`` beside the loader's own.

        Only for ``batch_size="auto"``, and not in the middle of an epoch.
        """
        if not self.automatic:
            raise ArgumentError(f"replan needs batch_size='auto', this loader's is decided: {self.batch_size}")
        if self._run is not None:
            raise ArgumentError(f"replan must come between epochs, epoch {self._epoch} is at batch {self._batch}")
        plan = self._choose(check_int("bytes_per_sample", bytes_per_sample, 0), fixed_bytes)
        self._epoch, self._batch, self._left = self.epoch, 0, False
        self.plan = plan
        return plan

    def _choose(self, bytes_per_sample: int, fixed_bytes: int) -> BatchPlan:
        # By the largest rank's share, so that every rank of equal devices decides alike.
        share = -(-self.n_samples // self.world_size)
        per_sample = bytes_per_sample + self._bytes_per_sample()
        fixed_bytes += self._window_bytes()
        plan = choose_batch_size(share, per_sample, fixed_bytes, self.backend.memory(), self.at_most)
        return dataclasses.replace(plan, batch_size=min(plan.batch_size, self._share))

    def _given(self, batch_size: int, reason: str) -> BatchPlan:
        needed = batch_size * self._bytes_per_sample() + self._window_bytes()
        reason += "" if batch_size < self._share else f", and all {self._share} samples are one batch"
        return BatchPlan(
            batch_size, f"{reason}; its batches need {format_bytes(needed)}", needed, self.backend.memory().available
        )

    def _bytes_per_sample(self) -> int:
        """The loader's buffers on the device: the batch in use, the one that replaces it, and those prepared ahead."""
        ahead = self.prefetch if self.backend.name == "cpu" else 0  # what waits for a GPU waits in main memory
        converted = sum(column.source.bytes_per_sample(column.dtype) for column in self._columns)
        stored = sum(column.source.bytes_per_sample(column.source.dtype) for column in self._columns)
        return (2 + ahead) * converted + stored

    def _window_bytes(self) -> int:
        """What is held of a window on the device: both of its halves, and where a batch leaves one, never more."""
        if self.backend.name != "cpu":
            return 0  # in main memory
        per_sample = sum(part.bytes_per_sample(part.dtype) for reader in self._limits for part in reader.parts)
        return 2 * per_sample * -(-self.window // self.world_size)

    # --- one epoch ----------------------------------------------------------------------------------------------

    @property
    def epoch(self) -> int:
        """The number of the epoch that is running, or else of the next one, counted from 0."""
        return self._epoch + self._left

    def __iter__(self) -> Generator[Any]:
        if self._left or (self._run is not None and self._batch):
            self._epoch, self._batch = self._epoch + 1, 0
        run = self._run = object()
        self._left = False
        stats, first = LoaderStats(), 0.0
        self.stats = stats
        read = sum(reader.bytes_read for reader in self._limits)
        try:
            size = self.batch_size
            asked = time.perf_counter()
            starts = range(self._batch * size, len(self) * size, size)
            with contextlib.closing(self._prepared(starts)) as prepared:
                for parts in prepared:
                    batch = self._deliver(parts)
                    self._batch += 1
                    now = time.perf_counter()
                    if stats.batches:
                        stats.waited += now - asked
                        stats.seconds = now - first
                    else:
                        stats.wait_first, first = now - asked, now
                    stats.batches += 1
                    stats.samples = min(self._batch * size, self._share) - starts.start
                    stats.bytes_read = self._bytes_read(stats.samples, read)
                    yield batch
                    asked = time.perf_counter()
                    del parts, batch  # so that they can be freed before the next ones are made
                    if self._run is not run:
                        raise ArgumentError("this iteration was ended by a newer one, or by load_state_dict")
            self._epoch, self._batch = self._epoch + 1, 0
        finally:
            if self._run is run:
                self._run, self._left = None, self._batch > 0

    def _bytes_read(self, samples: int, before: int) -> int:
        return sum(reader.bytes_read for reader in self._limits) - before + samples * self._array_bytes

    @functools.cached_property
    def _array_bytes(self) -> int:
        """A sample's bytes in those of the sources that are arrays."""
        arrays = (column.source for column in self._columns if isinstance(column.source, ArraySource))
        return sum(source.bytes_per_sample(source.dtype) for source in arrays)

    def _windows(self, epoch: int) -> WindowOrder:
        return WindowOrder(
            self.n_samples, self.seed, epoch, self.window, self.block, self.shuffle, self.rank, self.world_size
        )

    def _indices(self, epoch: int) -> Callable[[int, int], Indices]:
        """A function of two positions of this rank: the samples from one to the other."""
        if self.window:
            return self._windows(epoch).indices
        order = epoch_order(self.n_samples, self.seed, epoch, self.shuffle, self.replacement)
        mine = order[self.rank :: self.world_size]
        return lambda start, stop: mine[start:stop]

    def _prepared(self, starts: range) -> Generator[list[Array]]:
        size, share = self.batch_size, self._share
        if self.window and self._limits:
            make = _Windows(self._windows(self._epoch), self._columns, self._limits, self.window).prepare
        else:
            indices = self._indices(self._epoch)
            make = lambda start, stop: self._at(indices(start, stop))  # noqa: E731

        def prepare(start: int) -> list[Array]:
            return self._transformed(make(start, min(start + size, share)), "cpu")

        on_host = sum(math.prod(column.source.sample_shape) for column in self._columns if column.source.on_host)
        if self.prefetch and (self._limits or size * on_host >= WORTH_A_THREAD):
            return _prepare_ahead(prepare, starts, self.prefetch)
        return (prepare(start) for start in starts)

    def _at(self, index: Indices) -> list[Array]:
        """The samples at ``index``, prepared."""
        rows = {reader: reader.read(index, limits) for reader, limits in self._limits.items()}
        return [
            column.prepare(index) if isinstance(column.source, ArraySource) else column.prepare_rows(rows)
            for column in self._columns
        ]

    def _deliver(self, prepared: list[Array]) -> Any:
        arrays = [column.deliver(part) for column, part in zip(self._columns, prepared, strict=True)]
        arrays = self._transformed(arrays, "cuda")
        return tuple(arrays) if len(arrays) > 1 else arrays[0]

    def _transformed(self, arrays: list[Array], device: str) -> list[Array]:
        """What ``transform`` makes of a batch, on the backend that is a ``device``; on others the batch as it is."""
        if self.transform is None or self.backend.name != device:
            return arrays
        with self.backend.scope():
            found = self.transform(*arrays) if self._both else (self.transform(arrays[0]), *arrays[1:])
        if not isinstance(found, tuple) or len(found) != len(arrays):
            raise DTypeError(f"transform must return a pair, as it takes x and y, got {type(found).__name__}")
        for column, before, after in zip(self._columns, arrays, found, strict=True):
            axis = column.source.axis
            self.backend.check("what transform returns", after)
            if after.ndim <= axis or after.shape[axis] != before.shape[axis]:
                raise ShapeError(
                    f"transform must keep the {before.shape[axis]} samples along axis {axis}, it made shape "
                    f"{after.shape} of {before.shape}"
                )
        return list(found)

    def peek(self) -> Any:
        """The first batch of epoch ``epoch``, as an iteration would yield it; the position stays as it is."""
        index = self._indices(self.epoch)(0, min(self.batch_size, self._share))
        return self._deliver(self._transformed(self._at(index), "cpu"))

    def to_batch(self, X: Any, name: str = "X") -> Array:
        """``X``, samples of the same shape, as the loader would yield them; what fit does to the validation set.

        An array of the source's dtype is converted and scaled. One that has the dtype of the batches already, where the
        source's is another, is taken as it is. Where nothing is to be done the result is ``X`` itself. Anything else is
        a ``DTypeError``.
        """
        x = self._columns[0]
        source = array_source(name, X, self.sample_axis, self.backend)
        if source.axis != x.source.axis or source.sample_shape != x.source.sample_shape:
            raise ShapeError(
                f"{name} must have samples of shape {x.source.sample_shape} along axis {x.source.axis}, as the "
                f"loader's X has, got shape {source.array.shape}"
            )
        if source.dtype not in (self.source_dtype, self.dtype):
            raise DTypeError(
                f"{name} must have the loader's source dtype {self.source_dtype}, to be converted, or its batch dtype "
                f"{self.dtype}, to be taken as it is, got {source.dtype}"
            )
        scale = x.scale if source.dtype == self.source_dtype else None
        check_finite(source, self.dtype, scale, self.backend)
        with self.backend.scope():
            return convert(self.backend.asarray(source.array), self.dtype, scale)

    # --- state --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The position and what decides the batches, as JSON can hold it; ``batch`` counts those that were yielded."""
        complete = self._batch == len(self)
        return {
            "seed": self.seed,
            "epoch": self._epoch + complete,
            "batch": 0 if complete else self._batch,
            "batch_size": self.batch_size,
            "n_samples": self.n_samples,
            "shuffle": self.shuffle,
            "replacement": self.replacement,
            "drop_last": self.drop_last,
            "rank": self.rank,
            "world_size": self.world_size,
            "window": self.window,
            "block": self.block,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to the position of ``state``: the next iteration goes on with the batch that would have come next.

        A loader that would give other batches refuses it. With ``batch_size="auto"`` the state's batch size is taken.
        """
        if not isinstance(state, Mapping):
            raise DTypeError(f"state must be a mapping from state_dict(), got {type(state).__name__}")
        own = self.state_dict()
        if wrong := sorted(set(own) ^ set(state)):
            raise ArgumentError(f"state must have the keys {', '.join(own)}; missing or unknown: {', '.join(wrong)}")
        position = ("epoch", "batch", "batch_size") if self.automatic else ("epoch", "batch")
        for name in own:
            if name not in position and state[name] != own[name]:
                raise ArgumentError(f"state has {name}={state[name]!r}, this loader {name}={own[name]!r}")
        epoch = check_int("state['epoch']", state["epoch"], 0, WORD)
        batch_size = check_int("state['batch_size']", state["batch_size"], 1, self._share)
        batches = self._share // batch_size if self.drop_last else -(-self._share // batch_size)
        batch = check_int("state['batch']", state["batch"], 0, batches - 1)
        if batch_size != self.batch_size:
            self.plan = self._given(batch_size, f"batch_size={batch_size} was taken from a saved state")
        self.automatic = False  # it is decided: another size would make other batches of the epoch
        self._epoch, self._batch, self._run, self._left = epoch, batch, None, False

    def __repr__(self) -> str:
        x = self._columns[0].source
        order = "drawn with replacement" if self.replacement else "shuffled" if self.shuffle else "in order"
        order += f" by blocks of {self.block}, {self.window} together" if self.window and self.shuffle else ""
        conversion = f"{x.dtype} as {self.dtype}" + ("" if self.scale is None else f" times {self.scale:.6g}")
        shard = "" if self.world_size == 1 else f", rank {self.rank} of {self.world_size}"
        labels = "" if len(self._columns) == 1 else f" with labels {self._columns[1].source.dtype}"
        return (
            f"<Loader of {self.n_samples} samples {x.sample_shape} {conversion}{labels}: {len(self)} batches of "
            f"{self.batch_size} an epoch, {order}, on {self.backend.spec}{shard}>"
        )


@dataclasses.dataclass(frozen=True, eq=False)
class _Column:
    """One of the arrays of a batch: its source, and what is made of it.

    ``prepare`` is the host's work and may run in another thread. ``deliver`` is the device's and runs in the caller's,
    hence in the order of the caller's CUDA stream.
    """

    source: ArraySource | Part
    dtype: np.dtype[Any]
    scale: float | None
    backend: Backend

    @property
    def limit(self) -> float:
        """The largest stored number that the batches can hold."""
        return (
            float(np.finfo(self.dtype).max) / max(1.0, abs(self.scale or 1.0)) if self.dtype.kind == "f" else math.inf
        )

    def prepare(self, index: Array) -> Array:
        assert isinstance(self.source, ArraySource)
        if self.backend.owns(self.source.array):
            return self._gather(index) if self.backend.name == "cpu" else index
        return self.source.take(index)  # stored values are smaller to copy to the device than converted ones

    def prepare_rows(self, rows: Mapping[Reader, list[np.ndarray]]) -> Array:
        assert isinstance(self.source, Part)
        array = rows[self.source.reader][self.source.number]
        return convert(array, self.dtype, self.scale) if self.backend.name == "cpu" else array

    def prepare_held(self, rows: Mapping[Reader, list[np.ndarray]], use: Indices) -> Array:
        assert isinstance(self.source, Part)
        held = ArraySource(self.source.reader.name, rows[self.source.reader][self.source.number], 0)
        return held.gather(use, self.dtype, self.scale, self.backend) if self.backend.name == "cpu" else held.take(use)

    def deliver(self, prepared: Array) -> Array:
        if self.backend.name == "cpu":
            return prepared
        with self.backend.scope():
            on_device = self.backend.asarray(prepared)
            if isinstance(self.source, ArraySource) and self.backend.owns(self.source.array):
                return self._gather(on_device)
            return convert(on_device, self.dtype, self.scale)

    def _gather(self, index: Array) -> Array:
        assert isinstance(self.source, ArraySource)
        return self.source.gather(index, self.dtype, self.scale, self.backend)


@dataclasses.dataclass(eq=False)
class _Held:
    """A window's samples as they are read and used, and the rows of the first ``count`` of them."""

    samples: Indices
    use: Indices
    rows: dict[Reader, list[np.ndarray]]
    count: int = 0


class _Windows:
    """The rows of the window in use and of the next one, which is read as the first is used up.

    So the reading is spread evenly over the batches, and no more than two windows are in memory.
    """

    def __init__(
        self, order: WindowOrder, columns: list[_Column], limits: dict[Reader, list[float]], capacity: int
    ) -> None:
        self._order, self._columns, self._limits = order, columns, limits
        self._capacity = -(-capacity // order.world_size)
        self._at_once = max((reader.block or 1) for reader in limits)
        self._held: dict[int, _Held] = {}
        self._spare: list[dict[Reader, list[np.ndarray]]] = []

    def prepare(self, start: int, stop: int) -> list[Array]:
        found = []
        for window, a, b in self._order.pieces(start, stop):
            for past in [w for w in self._held if w < window]:
                self._spare.append(self._held.pop(past).rows)
            held = self._read(window, 1, 1)
            rows, index, use = held.rows, held.samples[held.use[a:b]], held.use[a:b]
            found.append(
                [
                    column.prepare(index) if isinstance(column.source, ArraySource) else column.prepare_held(rows, use)
                    for column in self._columns
                ]
            )
            if window + 1 < len(self._order):
                self._read(window + 1, b, len(held.use))
        if len(found) == 1:
            return found[0]
        return [np.concatenate(parts) for parts in zip(*found, strict=True)]

    def _read(self, window: int, part: int, whole: int) -> _Held:
        """The window of which at least part/whole has been read."""
        if window not in self._held:
            self._held[window] = _Held(*self._order.part(window), self._spare.pop() if self._spare else self._empty())
        held, at_once = self._held[window], self._at_once
        wanted = -(-part * len(held.samples) // whole)
        wanted = min(-(-wanted // at_once) * at_once, len(held.samples))
        while held.count < wanted:
            stop = min(wanted, held.count + max(at_once, self._order.block))
            for reader, limits in self._limits.items():
                read = reader.read(held.samples[held.count : stop], limits)
                for array, rows in zip(held.rows[reader], read, strict=True):
                    array[held.count : stop] = rows
            held.count = stop
        return held

    def _empty(self) -> dict[Reader, list[np.ndarray]]:
        return {
            reader: [np.empty((self._capacity, *part.sample_shape), part.dtype) for part in reader.parts]
            for reader in self._limits
        }


def _prepare_ahead(prepare: Callable[[int], list[Array]], starts: range, depth: int) -> Generator[list[Array]]:
    """``prepare`` of every start in turn, up to ``depth`` of them ahead of the caller, in a thread of its own.

    What ``prepare`` raises is raised here. The thread ends with the generator, also when that is closed or collected.
    """
    ready: queue.SimpleQueue[tuple[list[Array], BaseException | None]] = queue.SimpleQueue()
    room = threading.Semaphore(depth)
    stop = threading.Event()

    def work() -> None:
        try:
            for start in starts:
                room.acquire()
                if stop.is_set():
                    return
                ready.put((prepare(start), None))
        except BaseException as error:  # whatever it is, it belongs to the caller
            ready.put(([], error))

    thread, process = threading.Thread(target=work, name="gpubatch-loader", daemon=True), os.getpid()

    def end() -> None:
        if os.getpid() != process:
            return  # a forked child does not have the thread, and may have its locks for good
        stop.set()
        room.release()
        if thread is not threading.current_thread():  # garbage collection may run this in any thread
            thread.join()

    # Python ends a daemon thread where it next waits for the interpreter's lock: in compiled code the process aborts.
    atexit.register(end)
    thread.start()
    try:
        for _ in starts:
            if os.getpid() != process:
                raise ArgumentError("this iteration belongs to the process that began it; begin one in the child")
            parts, error = ready.get()
            room.release()
            if error is not None:
                raise error
            yield parts
            del parts  # before waiting for the next ones
    finally:
        atexit.unregister(end)
        end()
