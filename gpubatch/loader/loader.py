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
from collections.abc import Callable, Collection, Generator, Iterator, Mapping
from concurrent.futures import Executor
from typing import Any, TypeAlias

import numpy as np

from gpubatch.backend import Array, Backend, CudaBackend, compute_dtype, float_dtype, get_backend
from gpubatch.errors import (
    ArgumentError,
    DTypeError,
    InsufficientMemoryError,
    ShapeError,
    check_bool,
    check_choice,
    check_int,
    check_real,
)
from gpubatch.loader.feeding import (
    DeviceFeed,
    DeviceOrder,
    Form,
    Ring,
    Slot,
    moved,
    native,
    needed,
    on_device,
    take_into,
)
from gpubatch.loader.order import ORDER_PEAK, WORD, Indices, WindowOrder, epoch_order
from gpubatch.own import as_written
from gpubatch.sizing import BatchPlan, ByPart, fits, format_bytes, parse_bytes, plan_batch_size
from gpubatch.sources import ArraySource, Part, Reader, array_source, check_finite, convert, largest_stored

__all__ = ["Loader", "LoaderStats"]

# What prepares the samples from one position to another, and what makes arrays on the backend of what it gives.
Feed: TypeAlias = tuple[Callable[[int, int], Any], Callable[[Any], list[Array]]]

# From so many elements a batch on, preparing it is worth a thread. Handing a batch over costs 10 to 25 µs; gathering
# takes 0.2 to 0.3 ns an element. Measured on two cores: a thread made bare iteration over batches of 256 x 784 up to
# twice as slow and a consumer no faster; from 2048 x 784 on it hides the gathering (-16 %, and -20 % at 4096 x 784)
# where a core is free, and is neutral (±6 %) where OpenBLAS keeps both cores.
WORTH_A_THREAD = 1 << 20

DEFAULT_WINDOW = "256 MiB"  # for sources that read neighbours together
BLOCKS = 32  # in what is shuffled together: so many places of the set meet in a batch
PIECE = 1 << 20  # bytes of a window that are read at once: what is read is then looked at, and should be in the cache


# --- the loader ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class LoaderStats:
    """What the epoch that is running, or the last one, has done so far.

    ``wait_first`` is how many seconds the consumer waited for the first batch, ``waited`` for all the others;
    ``seconds`` is the time from the first batch to the last one so far. ``bytes_read`` is what the sources gave,
    ``bytes_copied`` what went from the host to a CUDA device: nothing on the CPU.
    """

    batches: int = 0
    samples: int = 0
    bytes_read: int = 0
    wait_first: float = 0.0
    waited: float = 0.0
    seconds: float = 0.0
    bytes_copied: int = 0


@as_written
class Loader:
    """Mini-batches on a backend: ``for x, y in loader`` is one epoch; ``for x in loader`` where there is no Y.

    X is (samples, ...) and x (batch, ...); with ``sample_axis=1`` X is (features, samples) and x (features, batch). A
    one-dimensional Y has its samples on axis 0 in either case. Every batch is a new C-contiguous array that may be kept
    or changed. The last batch is short where the batch size does not divide the number of samples; ``drop_last`` leaves
    it out. ``batch_size="auto"`` follows :func:`~gpubatch.sizing.choose_batch_size` with ``at_most``; ``plan`` has the
    reason in words.

    Instead of an array, X may be any :class:`~gpubatch.sources.Source`: ``gpubatch.sources`` opens ``.npy``, raw, IDX,
    CIFAR-10, Parquet, Arrow and HDF5 files that may be larger than memory. One that gives pairs has the labels, too;
    otherwise Y is an array or another source. Samples are its rows. Its values are checked as they are read.

    x has ``dtype`` float32 or float64: by default X's own if it is one of these, else float32; ``scale`` multiplies
    after the conversion. ``dtype="float16"``, for a network with ``precision="mixed"``, is converted and multiplied in
    float32 before it is rounded. Y keeps its element type. X and floating Y must be finite. ``transform`` is then
    called with each batch, x or, where it takes two arguments, x and y, and what it returns takes their place: whole
    arrays on the backend, one entry a sample; on the CPU in the thread that prepares. ``to_batch`` leaves it out.

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

    ``feed`` is how batches get to a CUDA device. ``"device"``: arrays of the host are copied there, at the first
    iteration, and batches are gathered there; what is changed in the arrays later is not seen. ``"host"``: batches go
    there as they are stored, through pinned memory, while the device works on those before. ``"auto"`` copies the
    arrays where, with their order and the rest of ``plan``, they need at most 90 % of the memory that is available, or
    of half of it as long as the plan counts no model (``replan``, which fit calls); what is read always goes through
    pinned memory. ``feeding`` says in words what was decided. Batches belong to the stream that is current when they
    are asked for.

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
        feed: str = "auto",
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
            self.dtype = float_dtype(dtype, half=True)
        else:
            self.dtype = np.dtype(np.float64 if x.dtype.kind == "f" and x.dtype.itemsize == 8 else np.float32)
        arithmetic = compute_dtype(self.dtype)
        limit = float(np.finfo(arithmetic).max)
        self.scale = None if scale is None else check_real("scale", scale, -limit, limit)
        factor = None if self.scale is None else float(arithmetic.type(self.scale))  # a Python float promotes nothing

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
        self.feed = check_choice("feed", feed, ["auto", "device", "host"])
        for reader in self._limits:
            if feed == "device":
                raise ArgumentError(f"feed='device' needs arrays, that can be moved there; {reader.where} is read")
        self._placed: list[_Column] | None = None  # those on the device, none where arrays stay on the host
        self.feeding = "in main memory" if self.backend.name == "cpu" else "not decided before the first iteration"

        if self.n_samples < self.world_size:
            raise ArgumentError(f"world_size must be at most the {self.n_samples} samples, got {self.world_size}")
        self._share = len(range(self.rank, self.n_samples, self.world_size))  # this rank's samples in an epoch
        self._epoch = self._batch = 0  # the position: batches of this epoch that were yielded
        self._run: object | None = None  # the iteration that is running
        self._left = False  # whether the iteration before was left in the middle
        self._foreseen: tuple[int, Indices] | None = None  # the order of an epoch to come
        self._why = f"batch_size={batch_size} was given"
        self._model = _Model(_nothing)  # of the plan
        if isinstance(batch_size, str):
            self.plan = self._choose()
        elif self.drop_last and batch_size > self._share:
            raise ArgumentError(
                f"drop_last=True leaves no batch: batch_size={batch_size} is more than the {self._share} samples"
            )
        else:
            self.plan = self._given(min(batch_size, self._share))

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

    @property
    def last_size(self) -> int:
        """Samples in the last batch of an epoch."""
        return self.batch_size if self.drop_last else self._share - (len(self) - 1) * self.batch_size

    def size_of(self, batch: int) -> int:
        """Samples in the batch of this number, counted from 0."""
        return self.batch_size if batch < len(self) - 1 else self.last_size

    @property
    def at_once(self) -> int:
        """Batches that are there at a time: the one in use, and those in main memory that are prepared ahead."""
        return 1 + (self._ahead(self.batch_size) if self.backend.name == "cpu" else 0)

    def replan(
        self,
        parts_of: Callable[[int], ByPart],
        held: int = 0,
        available: int | None = None,
        most: int | None = None,
        kept: int = 0,
    ) -> BatchPlan:
        """Make the plan again with a model, which needs the bytes ``parts_of(batch_size)`` beside the loader's own.

        ``kept`` is as for :meth:`memory_parts`. ``available`` is a number of bytes, by default what the backend has now
        and ``held``, which the model has already. An automatic batch size is chosen again, which must not be in the
        middle of an epoch; one that is decided stays. ``most`` is taken after a step of the size that was chosen found
        no memory.
        """
        self._model = _Model(parts_of, kept)
        if not self.automatic:
            self.plan = self._given(self.batch_size, held, available)
            return self.plan
        if self._run is not None:
            raise ArgumentError(f"replan must come between epochs, epoch {self._epoch} is at batch {self._batch}")
        if most is None:
            plan = self._choose(held, available)
        else:
            self._why = f"a step of {self.batch_size} samples was tried and memory ran out, so the batch is {most}"
            plan = self._given(most, held, available)
        self._epoch, self._batch, self._left = self.epoch, 0, False
        self.plan = plan
        return plan

    def _choose(self, held: int = 0, available: int | None = None) -> BatchPlan:
        # By the largest rank's share, so that every rank of equal devices decides alike.
        share = -(-self.n_samples // self.world_size)
        available = self._available() + held if available is None else available
        plan = plan_batch_size(share, lambda n: self.parts(n, available), available, self.at_most)
        return dataclasses.replace(plan, batch_size=min(plan.batch_size, self._share))

    def _given(self, batch_size: int, held: int = 0, available: int | None = None) -> BatchPlan:
        available = self._available() + held if available is None else available
        parts = self.parts(batch_size, available)
        needed = sum(parts.values())
        reason = self._why + ("" if batch_size < self._share else f", and all {self._share} samples are one batch")
        reason += f"; it needs {format_bytes(needed)} of {format_bytes(available)} available"
        reason += "" if fits(needed, available) else ", more than 90 % of that"
        return BatchPlan(batch_size, reason, needed, available, parts)

    def _available(self) -> int:
        """Bytes for what the plan counts: what is free now, and what samples that were moved to the device take."""
        there = zip(self._placed, self._columns, strict=True) if self._placed else ()
        moved = [placed.source for placed, column in there if placed.source is not column.source]
        return self.backend.memory().available + sum(source.array.nbytes for source in moved)  # type: ignore[union-attr]

    def parts(self, batch_size: int, available: int) -> dict[str, int]:
        """The bytes that the model of the plan and the loader need, by what they are for; ``available`` as in a plan.

        Where the data will be is decided as the first iteration will, if memory stays as it is until then.
        """
        there = bool(self._placed)
        if self._placed is None and isinstance(self.backend, CudaBackend):
            try:
                there = self._place(batch_size, available, self.backend)[0]
            except InsufficientMemoryError:  # which is for the first iteration to say
                there = True
        return {**self._model.parts_of(batch_size), **self._own_parts(batch_size, self._model.kept, there)}

    def _place(self, batch_size: int, available: int, backend: CudaBackend) -> tuple[bool, str]:
        """Whether batches are gathered on the device, and how they get there, in words."""
        model = self._model.parts_of(batch_size)
        needed = sum(model.values()) + sum(self._own_parts(batch_size, self._model.kept, False).values())
        sources = [column.source for column in self._columns]
        return on_device(sources, self.feed, self._share, needed, available, bool(model), backend)

    def memory_parts(self, batch_size: int, kept: int = 0) -> dict[str, int]:
        """What the loader needs on the device when it needs most: while it makes a batch, or the order of an epoch.

        ``kept`` is how many batches more than one are kept by captured steps that do not gather their own; eager steps
        keep none.
        """
        return self._own_parts(batch_size, kept, bool(self._placed))

    def _own_parts(self, batch_size: int, kept: int, there: bool) -> dict[str, int]:
        """:meth:`memory_parts` with the data on the device, if they are ``there``."""
        converted = batch_size * sum(column.source.bytes_per_sample(column.dtype) for column in self._columns)
        stored = sum(self._beside(column, batch_size, there) for column in self._columns)
        beside = max(stored, converted if self.transform else 0)  # one is gone before the other is made
        if self.backend.name != "cpu":
            if not kept:
                made = converted
            else:
                sources = [column.source.bytes_per_sample(column.needed) for column in self._columns]
                made = batch_size * sum(sources)  # the arrays of the graphs
                if self._gathers_whole(there):
                    beside = 0
                else:
                    made += kept * converted
            return {**self._parts_to_feed(batch_size, there), "batches": made, "conversion of a batch": beside}
        making = 0 if self.window or self.replacement or not self.shuffle else ORDER_PEAK * self.n_samples
        order = 0 if self.window else 8 * self.n_samples
        # The batch in use, and those prepared ahead; a loop that keeps it while it asks for the next has one more.
        batches = (1 + self._ahead(batch_size)) * converted
        if self.window and self._limits:
            beside = max(beside, converted)  # a batch of two windows is put together from its parts
        window = {"window": self._window_bytes()} if self.window else {}
        if making > order + batches + beside:
            return {"making of an epoch's order": making, **window}
        return {"order of an epoch": order, "batches": batches, "conversion of a batch": beside, **window}

    def _parts_to_feed(self, batch_size: int, there: bool) -> dict[str, int]:
        """What is on a GPU for the batches to be made from: the data and the order, or buffers for batches."""
        sources = [column.source for column in self._columns]
        apart = [s for s in sources if not (isinstance(s, ArraySource) and self.backend.owns(s.array))]
        if apart and not there:
            stored = batch_size * sum(source.bytes_per_sample(source.dtype) for source in sources)
            return {"buffers of batches": self._slots(batch_size) * stored + 8 * batch_size}
        data = sum(source.n_samples * source.bytes_per_sample(source.dtype) for source in apart)
        return {"data": data, "order of an epoch": 8 * self._share}

    def _ahead(self, batch_size: int) -> int:
        """How many batches a thread prepares ahead."""
        on_host = sum(math.prod(column.source.sample_shape) for column in self._columns if column.source.on_host)
        return self.prefetch if self._limits or batch_size * on_host >= WORTH_A_THREAD else 0

    def _slots(self, batch_size: int) -> int:
        """How many batches are on their way to a GPU at most: the one in use, and those that are filled and copied."""
        return 1 + max(self._ahead(batch_size), 1)

    def _beside(self, column: _Column, batch_size: int, there: bool) -> int:
        """Bytes of samples as they are stored that stand beside a batch while it is made from them."""
        source = column.source
        if isinstance(source, ArraySource) and (there or self.backend.owns(source.array)):
            moved = not self.backend.owns(source.array)
            return source.beside(batch_size, column.dtype, column.scale, self.backend, moved)
        if self.backend.name != "cpu" or self.window or (column.dtype == source.dtype and column.scale is None):
            return 0  # it is made from the buffers, from the window, or not made at all
        return batch_size * source.bytes_per_sample(source.dtype)

    def _window_bytes(self) -> int:
        """What is held of a window on the device when that is most: its halves and their order, and what is read."""
        if self.backend.name != "cpu":
            return 0  # in main memory
        blocks, windows = -(-self.n_samples // self.block), -(-self.n_samples // self.window)
        n = min(self.window, self.n_samples)
        share, peak = -(-n // self.world_size), ORDER_PEAK if self.shuffle else 9  # 9: which samples there are
        rows, order, making = share * sum(r.row_bytes for r in self._limits), 16 * share, (8 + peak) * n
        read = 0
        if self._limits:
            at_once = _read_at_once(self._limits, self.block)
            read = at_once * sum(reader.row_bytes for reader in self._limits if not reader.reads_into)
        if windows == 1:
            held = max(making, rows + order + read)
        elif windows == 2:  # there is room for the second one's rows when its order has been made
            held = max(rows + order + making, 2 * (rows + order) + read)
        else:
            held = 2 * rows + max(order + making, 2 * order + read)
        return max(peak * blocks, 8 * blocks + 16 * windows + held)

    # --- one epoch ----------------------------------------------------------------------------------------------

    @property
    def epoch(self) -> int:
        """The number of the epoch that is running, or else of the next one, counted from 0."""
        return self._epoch + self._left

    @contextlib.contextmanager
    def _iteration(self) -> Iterator[Callable[[], None]]:
        """One iteration, until its epoch ends or it is left; yields what raises when there is a newer one."""
        if self._left or (self._run is not None and self._batch):
            self._epoch, self._batch = self._epoch + 1, 0
        self._left = False
        run = self._run = object()

        def check() -> None:
            if self._run is not run:
                raise ArgumentError("this iteration was ended by a newer one, or by load_state_dict")

        try:
            yield check
            if self._batch == len(self):
                self._epoch, self._batch = self._epoch + 1, 0
        finally:
            if self._run is run:
                self._run, self._left = None, self._batch > 0

    def __iter__(self) -> Generator[Any]:
        with self._iteration() as check, contextlib.ExitStack() as stack:
            stats, first = LoaderStats(), 0.0
            self.stats = stats
            read = sum(reader.bytes_read for reader in self._limits)
            size = self.batch_size
            asked = time.perf_counter()
            starts = range(self._batch * size, len(self) * size, size)
            prepared, deliver = self._fed(starts, stats, stack)
            for part in prepared:
                batch = self._finished(deliver(part))
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
                del part, batch  # so that they can be freed before the next ones are made
                check()

    def device_feed(self) -> DeviceFeed | None:
        """What gathers whole batches on the device without the host, where that can be."""
        if not isinstance(self.backend, CudaBackend) or not self._gathers_whole(True):
            return None
        columns = self._on_device(self.backend, self.stats)
        if columns is None:
            return None
        arrays = [(c.source.array, c.needed, c.scale) for c in columns if isinstance(c.source, ArraySource)]
        return DeviceFeed(self.backend, arrays, self._share, self.batch_size)

    def _gathers_whole(self, there: bool) -> bool:
        """Whether captured steps gather their batches by themselves, from contiguous arrays that are ``there``."""
        sources = [column.source for column in self._columns]
        return (
            there
            and self.transform is None
            and not self.sample_axis
            and all(
                isinstance(s, ArraySource) and (s.array.flags.c_contiguous or not self.backend.owns(s.array))
                for s in sources
            )
        )

    @contextlib.contextmanager
    def fed_by(self, feed: DeviceFeed) -> Iterator[Callable[[int], None]]:
        """An epoch, or its rest, whose batches ``feed`` makes; yields what is told how many more of them were used."""
        with self._iteration() as check:
            stats, first = LoaderStats(bytes_copied=8 * self._share), self._batch
            self.stats = stats
            feed.begin(self._order_of(self._epoch))

            def used(batches: int) -> None:
                check()
                self._batch += batches
                stats.batches += batches
                stats.samples = min(self._batch * self.batch_size, self._share) - first * self.batch_size
                stats.bytes_read = stats.samples * self._array_bytes

            yield used

    def _bytes_read(self, samples: int, before: int) -> int:
        read = sum(reader.bytes_read for reader in self._limits) - before if self._limits else 0
        return read + samples * self._array_bytes

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
        mine = self._order_of(epoch)
        return lambda start, stop: mine[start:stop]

    def foresee(self) -> None:
        """Make the order of the next epoch now, while a device works on this one."""
        if self._foreseen is None or self._foreseen[0] != self._epoch + 1:
            self._foreseen = self._epoch + 1, self._order_of(self._epoch + 1)

    def _order_of(self, epoch: int) -> Indices:
        """The samples of this rank in the order of an epoch."""
        foreseen, self._foreseen = self._foreseen, None
        if foreseen is not None and foreseen[0] == epoch:
            return foreseen[1]
        if self.window:
            return self._windows(epoch).indices(0, self._share)
        order = epoch_order(self.n_samples, self.seed, epoch, self.shuffle, self.replacement)
        return order[self.rank :: self.world_size]

    def _fed(
        self, starts: range, stats: LoaderStats, stack: contextlib.ExitStack
    ) -> tuple[Generator[Any], Callable[[Any], list[Array]]]:
        """What is prepared for the batches that begin at ``starts``, and what makes arrays on the backend of each.

        The first is the work of a thread where that is worth it, the second that of the caller. ``stack`` ends both.
        """
        size, share, ahead = self.batch_size, self._share, self._ahead(self.batch_size)
        if not isinstance(self.backend, CudaBackend):
            prepare, deliver = self._in_main_memory()
        elif (columns := self._on_device(self.backend, stats)) is not None:
            prepare, deliver, ahead = *self._from_the_device(self.backend, columns, starts.start, stats, stack), 0
        else:
            prepare, deliver = self._through_pinned_memory(self.backend, self._slots(size), stats, stack)
        one: Callable[[int], Any] = lambda start: prepare(start, min(start + size, share))  # noqa: E731
        prepared = _prepare_ahead(one, starts, ahead) if ahead else (one(start) for start in starts)
        return stack.enter_context(contextlib.closing(prepared)), deliver

    def _in_main_memory(self) -> Feed:
        make = self._by_windows()
        if make is None:
            indices = self._indices(self._epoch)
            make = lambda start, stop: self._at(indices(start, stop))  # noqa: E731
        return lambda start, stop: self._transformed(make(start, stop), "cpu"), self._delivered

    def _from_the_device(
        self, backend: CudaBackend, columns: list[_Column], first: int, stats: LoaderStats, stack: contextlib.ExitStack
    ) -> Feed:
        """Batches of arrays on the device, where the order from position ``first`` on is, too: none copies anything."""
        order = DeviceOrder(backend, self._indices(self._epoch)(first, self._share))
        stack.enter_context(contextlib.closing(order))
        stats.bytes_copied += order.nbytes

        def deliver(part: tuple[int, int]) -> list[Array]:
            index = order.part(*part)
            return [column.gather(index) for column in columns]

        return lambda start, stop: (start - first, stop - first), deliver

    def _through_pinned_memory(
        self, backend: CudaBackend, slots: int, stats: LoaderStats, stack: contextlib.ExitStack
    ) -> Feed:
        """Batches that go to the device as they are stored, while it works on others."""
        ring = Ring(backend, [column.form(self.batch_size) for column in self._columns], slots)
        stack.enter_context(contextlib.closing(ring))
        fill: Callable[[int, int, list[np.ndarray]], None]
        if (make := self._by_windows()) is not None:
            fill = lambda start, stop, places: _copy(make(start, stop), places)  # noqa: E731
        else:
            indices = self._indices(self._epoch)
            fill = lambda start, stop, places: self._store(indices(start, stop), places, ring.helpers)  # noqa: E731

        def prepare(start: int, stop: int) -> Slot:
            slot = ring.acquire([column.form(stop - start)[0] for column in self._columns])
            fill(start, stop, slot.on_host())
            ring.send(slot)
            return slot

        def deliver(slot: Slot) -> list[Array]:
            stats.bytes_copied += slot.nbytes
            with ring.received(slot) as arrays:
                return [column.made_of(array, ring.rows) for column, array in zip(self._columns, arrays, strict=True)]

        return prepare, deliver

    def _store(self, index: Indices, places: list[np.ndarray], helpers: Executor) -> None:
        """Write what goes to a device of the samples at ``index``."""
        of = dict[Reader, list[np.ndarray]]()
        for column, place in zip(self._columns, places, strict=True):
            if isinstance(column.source, ArraySource):
                column.store(index, place, helpers)
            else:
                of.setdefault(column.source.reader, []).append(place)
        for reader, of_reader in of.items():
            if all(part.dtype == place.dtype for part, place in zip(reader.parts, of_reader, strict=True)):
                reader.read_into(index, of_reader, self._limits[reader])
            else:  # of another byte order
                _copy(reader.read(index, self._limits[reader]), of_reader)

    def _by_windows(self) -> Callable[[int, int], list[Array]] | None:
        """What prepares samples that are read by windows, if they are."""
        if not (self.window and self._limits):
            return None
        return _Windows(self._windows(self._epoch), self._columns, self._limits, self.window).prepare

    def _on_device(self, backend: CudaBackend, stats: LoaderStats) -> list[_Column] | None:
        """The columns with their arrays on the device, or None where these stay on the host; decided once."""
        if self._placed is None:
            there, self.feeding = self._place(self.batch_size, self.plan.available, backend)
            placed: list[_Column] = []
            try:
                for column in self._columns if there else []:
                    source = column.source
                    if isinstance(source, ArraySource) and not backend.owns(source.array):
                        source = moved(source, backend)
                        stats.bytes_copied += source.array.nbytes
                    placed.append(dataclasses.replace(column, source=source))
            except MemoryError:  # what is free is not in one piece, or others took it meanwhile
                if self.feed == "device":
                    raise
                placed = []
                self.feeding = f"batches go to {backend.spec} through pinned memory, since a copy of the data failed"
            self._placed = placed
            # They are others than those planned where memory has become less, or the copy failed.
            parts = self.parts(self.batch_size, self.plan.available)
            self.plan = dataclasses.replace(self.plan, parts=parts, needed=sum(parts.values()))
        return self._placed or None

    def _at(self, index: Indices) -> list[Array]:
        """The samples at ``index``, prepared."""
        if not self._limits:
            return [column.prepare(index) for column in self._columns]
        rows = {reader: reader.read(index, limits) for reader, limits in self._limits.items()}
        return [
            column.prepare(index) if isinstance(column.source, ArraySource) else column.prepare_rows(rows)
            for column in self._columns
        ]

    def _delivered(self, prepared: list[Array]) -> list[Array]:
        if self.backend.name == "cpu":
            return prepared
        return [column.deliver(part) for column, part in zip(self._columns, prepared, strict=True)]

    def _finished(self, arrays: list[Array]) -> Any:
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
        return self._finished(self._delivered(self._transformed(self._at(index), "cpu")))

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
            self._why = f"batch_size={batch_size} was taken from a saved state"
            self._model = _Model(_nothing)
            self.plan = self._given(batch_size)
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


def _copy(arrays: list[np.ndarray], places: list[np.ndarray]) -> None:
    for array, place in zip(arrays, places, strict=True):
        place[...] = array


def _in_scope(backend: Backend, work: Callable[[Array], Array], x: Array) -> Array:
    with backend.scope():
        return work(x)


def _nothing(batch_size: int) -> ByPart:
    """The bytes of no model at all."""
    return {}


@dataclasses.dataclass(frozen=True)
class _Model:
    """What a plan counts beside the loader's own: a model, and the batches that its captured steps keep."""

    parts_of: Callable[[int], ByPart]
    kept: int = 0


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
        return largest_stored(self.dtype, self.scale)

    @property
    def needed(self) -> np.dtype[Any]:
        """In which captured steps need the batches."""
        return needed(self.dtype, 1 + len(self.source.sample_shape))

    def prepare(self, index: Array) -> Array:
        assert isinstance(self.source, ArraySource)
        if self.backend.name == "cpu":
            return self.gather(index)
        # Stored values are smaller to copy to the device than converted ones.
        return index if self._there else self.source.take(index)

    def prepare_rows(self, rows: Mapping[Reader, list[np.ndarray]]) -> Array:
        assert isinstance(self.source, Part)
        array = rows[self.source.reader][self.source.number]
        return convert(array, self.dtype, self.scale) if self.backend.name == "cpu" else array

    def prepare_held(self, rows: Mapping[Reader, list[np.ndarray]], use: Indices) -> Array:
        assert isinstance(self.source, Part)
        held = ArraySource(self.source.reader.name, rows[self.source.reader][self.source.number], 0)
        return held.gather(use, self.dtype, self.scale, self.backend) if self.backend.name == "cpu" else held.take(use)

    def deliver(self, prepared: Array) -> Array:
        with self.backend.scope():
            there = self.backend.asarray(prepared)
            return self.gather(there) if self._there else convert(there, self.dtype, self.scale)

    # Through pinned memory: ``store`` writes what goes to the device, of the ``form`` of so many samples, in another
    # thread; ``made_of`` makes the batch of it there, which does not share memory with it.

    def form(self, samples: int) -> Form:
        if self._there:
            return (samples,), np.dtype(np.int64)
        shape, axis = self.source.sample_shape, self.source.axis
        return (*shape[:axis], samples, *shape[axis:]), native(self.source.dtype)

    def store(self, index: Indices, out: np.ndarray, helpers: Executor) -> None:
        assert isinstance(self.source, ArraySource)
        if self._there:
            out[...] = index
        else:
            take_into(self.source, index, out, helpers)

    def made_of(self, there: Array, rows: Array) -> Array:
        if self._there:
            return self.gather(there)
        if there.dtype == self.dtype and self.scale is None:
            return there.copy()
        # All rows in their order are gathered and converted in one pass; on columns it does the same.
        stored = ArraySource("", there, 0)
        return stored.gather(rows[: len(there)], self.dtype, self.scale, self.backend)

    @functools.cached_property
    def gather(self) -> Callable[[Array], Array]:
        """What makes batches where the source lives."""
        assert isinstance(self.source, ArraySource)
        gather = self.source.gatherer(self.dtype, self.scale, self.backend)
        return gather if self.backend.name == "cpu" else functools.partial(_in_scope, self.backend, gather)

    @functools.cached_property
    def _there(self) -> bool:
        """Whether the source is on the device already, where it is gathered from by number."""
        return isinstance(self.source, ArraySource) and self.backend.owns(self.source.array)


@dataclasses.dataclass(eq=False)
class _Held:
    """A window's samples as they are read and used, and the rows of the first ``count``; ``told`` are announced."""

    samples: Indices
    use: Indices
    rows: dict[Reader, list[np.ndarray]]
    count: int = 0
    told: int = 0


def _read_at_once(readers: Collection[Reader], block: int) -> int:
    """How many samples of a window are read in a piece: at least what any of its sources decodes at once."""
    piece = PIECE // max(reader.row_bytes for reader in readers)
    return max(min(piece, block), *(reader.block or 1 for reader in readers))


class _Windows:
    """The rows of the window in use and of the next one, which is read as the first is used up.

    So the reading is spread evenly over the batches, and no more than two windows are in memory.
    """

    def __init__(
        self, order: WindowOrder, columns: list[_Column], limits: dict[Reader, list[float]], capacity: int
    ) -> None:
        self._order, self._columns, self._limits = order, columns, limits
        self._capacity = -(-min(capacity, order.n) // order.world_size)
        self._at_once = _read_at_once(limits, order.block)
        self._held: dict[int, _Held] = {}
        self._spare: list[dict[Reader, list[np.ndarray]]] = []

    def prepare(self, start: int, stop: int) -> list[Array]:
        found = []
        for window, a, b in self._order.pieces(start, stop):
            for past in [w for w in self._held if w < window]:
                self._spare.append(self._held.pop(past).rows)
            held = self._read(window, 1, 1)
            use = held.use[a:b]
            found.append(
                [
                    column.prepare(held.samples[use])
                    if isinstance(column.source, ArraySource)
                    else column.prepare_held(held.rows, use)
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
            self._announce(held)
            start, stop = held.count, min(wanted, held.count + at_once)
            for reader, limits in self._limits.items():
                reader.read_into(held.samples[start:stop], [rows[start:stop] for rows in held.rows[reader]], limits)
            held.count = stop
        return held

    def _announce(self, held: _Held) -> None:
        """Tell the sources of the two blocks that come next, which lie anywhere in a file, while others are used."""
        block = self._order.block
        while held.told < min(held.count + 2 * block, len(held.samples)):
            for reader in self._limits:
                reader.expect(held.samples[held.told : held.told + block])
            held.told += block

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
