"""The three ways of batches to their backend, each with its own memory plan; a loader chooses one."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Generator
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, TypeVar

import numpy as np

from gpubatch.backend import Array, CudaBackend
from gpubatch.errors import InsufficientMemoryError
from gpubatch.loader.ahead import prepared
from gpubatch.loader.columns import Column, Columns, copy_into
from gpubatch.loader.device import DeviceFeed, DeviceOrder, copy_to_device
from gpubatch.loader.order import Order
from gpubatch.loader.pinned import Ring, Slot
from gpubatch.loader.windows import Windows, window_bytes
from gpubatch.ops import Draws, Permutation
from gpubatch.sizing import fits, format_bytes

Batch = TypeVar("Batch")
Finish: TypeAlias = Callable[..., Batch]  # of rows, epoch, number of the batch, and parts where batches are dealt

# Elements of a batch from which on a thread is worth it. Handing a batch over costs 10 to 25 µs; gathering takes 0.2 to
# 0.3 ns an element. Measured on two cores: with batches of 256 x 784 a thread made bare iteration up to twice as slow
# and a consumer no faster. From 2048 x 784 on it hides the gathering where a core is free (-16 %, and -20 % at 4096 x
# 784), and is neutral (±6 %) where OpenBLAS keeps both cores busy.
WORTH_A_THREAD = 1 << 20


@dataclass
class LoaderStats:
    """Statistics of the running epoch so far, or of the last one.

    batches, samples: that were yielded
    bytes_read: that the sources gave
    bytes_copied: from the host to a CUDA device; 0 on the CPU
    wait_first, waited: seconds for which the consumer waited for the first batch, and for all others
    seconds: from the first batch to the latest one
    """

    batches: int = 0
    samples: int = 0
    bytes_read: int = 0
    wait_first: float = 0.0
    waited: float = 0.0
    seconds: float = 0.0
    bytes_copied: int = 0


class BatchFeed(Protocol):
    """A way of batches to the backend."""

    def ahead(self, batch_size: int) -> int:
        """The number of batches that a thread prepares ahead."""

    def memory_parts(self, batch_size: int, kept: int = 0, as_rows: bool = False) -> dict[str, int]:
        """The most bytes that :meth:`batches` needs on the backend, by what they are for.

        kept: batches beyond one that captured steps keep where they do not gather their own; eager steps keep none
        as_rows: whether batches are finished by :meth:`Columns.as_rows`
        """

    def batches(self, epoch: int, starts: range, finish: Finish[Batch], stats: LoaderStats) -> Generator[Batch]:
        """The result of ``finish`` for each batch: of its rows, from each of ``starts`` to the next, epoch and number.

        The generator takes all memory, and gives it back when it ends.
        """


def _ahead(columns: Columns, prefetch: int, batch_size: int) -> int:
    worth_it = columns.readers or batch_size * columns.host_elements >= WORTH_A_THREAD
    return prefetch if worth_it else 0


class LookedAt:
    """The windows of epochs. Where the first batch of an epoch to come was looked at, its windows are kept.

    Else all that was read for that batch would be read and decoded twice.
    """

    def __init__(self, columns: Columns, order: Order) -> None:
        self._columns, self._order = columns, order
        self._kept: tuple[tuple[int, int], Any, Any, Windows] | None = None  # after what they depend on

    def windows(self, epoch: int, size: int) -> Windows:
        """The windows of an epoch in batches of ``size``."""
        kept, self._kept = self._kept, None
        if kept is not None:
            of, chosen, readers, windows = kept
            if of == (epoch, size) and chosen is self._order.chosen and readers is self._columns.readers:
                return windows
        return Windows(self._order, epoch, self._columns.readers, size)

    def first_rows(self, epoch: int, size: int) -> list[Array] | None:
        """The rows of the first batch of an epoch to come; None where the epoch does not read neighbours together."""
        columns = self._columns
        if not self._order.window or all(reader.block is None for reader in columns.readers):
            return None
        windows = self.windows(epoch, size)
        self._kept = (epoch, size), self._order.chosen, columns.readers, windows
        return columns.moved(columns.joined(columns.stored_of_window(*part) for part in windows.parts(0, size)))


class MainMemory:
    """Batches on the CPU. The thread that prepares a batch also finishes it."""

    def __init__(self, columns: Columns, order: Order, prefetch: int, looked_at: LookedAt) -> None:
        self._columns, self._order, self._prefetch, self._looked_at = columns, order, prefetch, looked_at

    def ahead(self, batch_size: int) -> int:
        """See :class:`BatchFeed`."""
        return _ahead(self._columns, self._prefetch, batch_size)

    def memory_parts(self, batch_size: int, kept: int = 0, as_rows: bool = False) -> dict[str, int]:
        """See :class:`BatchFeed`; the peak may be the making of an order, when there is no batch yet."""
        columns, windows, rows = self._columns, self._order.window > 0, self._order.dealing.own(batch_size)
        # Readers' samples are converted from the window itself.
        stored = sum(c.staging_bytes(rows) for c in columns if not windows or c.array is not None)
        # A batch across two windows is joined from its parts, column by column.
        parts = rows * columns.batch_bytes if windows and columns.readers else 0
        staging = max(stored, parts, columns.delivery_bytes(rows, parts=len(self._order.dealing.own_parts)))
        # The batch in use and those prepared ahead. A loop that keeps a batch while it asks for the next has one more.
        batches = (1 + self.ahead(batch_size)) * rows * columns.batch_bytes
        making, order = self._order.memory()
        window = {"window": window_bytes(self._order, columns.readers, batch_size)} if windows else {}
        if decoded := sum(reader.held_bytes for reader in columns.readers):
            window["decoding of files"] = decoded
        if making > order + batches + staging:
            return {"making of an epoch's order": making, **window}
        return {"order of an epoch": order, "batches": batches, "conversion of a batch": staging, **window}

    def batches(self, epoch: int, starts: range, finish: Finish[Batch], stats: LoaderStats) -> Generator[Batch]:
        """See :class:`BatchFeed`."""
        size, share = starts.step, self._order.share
        rows = self._rows(epoch, size)
        make: Callable[[int], Batch] = lambda start: finish(  # noqa: E731
            rows(start, min(start + size, share)), epoch, start // size
        )
        return prepared(make, starts, self.ahead(starts.step))

    def _rows(self, epoch: int, size: int) -> Callable[[int, int], list[Array]]:
        """A function (start, stop) that gives the rows of the samples at these positions."""
        columns = self._columns
        if not (self._order.window and columns.readers):
            index = self._order.between(epoch, size)
            at = columns.at if columns.readers else columns.gathered
            return lambda start, stop: at(index(start, stop))
        windows = self._looked_at.windows(epoch, size)
        return lambda start, stop: columns.joined(columns.of_window(*part) for part in windows.parts(start, stop))


class OnDevice:
    """Batches gathered on the device, which has the data and the order of the epoch: no batch is copied there."""

    def __init__(self, columns: Columns, order: Order, backend: CudaBackend) -> None:
        self._columns, self._order, self._backend = columns, order, backend
        self._there: list[Column] = []  # columns of the arrays on the device
        self._sums: tuple[np.ndarray, Array] | None = None  # the order's cumulative weights, and their copy
        arrays = [source for column in columns if (source := column.array) is not None]
        # Captured steps gather whole rows of contiguous arrays; copies are contiguous.
        self.gathers_whole = (
            not columns.functions
            and not columns.readers
            and all(s.array.flags.c_contiguous or not backend.owns(s.array) for s in arrays)
        )

    def of(self, order: Order) -> OnDevice:
        """Batches of the same data in another order, not augmented."""
        other = OnDevice(self._columns.unaugmented(), order, self._backend)
        other._there = self._there
        return other

    @property
    def copied_bytes(self) -> int:
        """Bytes of the data that were copied to the device."""
        return self._columns.data_bytes if self._there else 0

    def copy_data(self, stats: LoaderStats) -> None:
        """Copy the data that are not on the device, once."""
        if self._there:
            return
        there = list[Column]()
        for column in self._columns:
            assert column.array is not None
            if column.on_backend:
                there.append(column)
            else:
                if column.checks_rows:
                    column.check()
                array = copy_to_device(column.array.array, self._backend)
                stats.bytes_copied += array.nbytes
                there.append(column.on(array))
        self._there = there

    def ahead(self, batch_size: int) -> int:
        """See :class:`BatchFeed`; nothing is left for a thread to do."""
        return 0

    def memory_parts(self, batch_size: int, kept: int = 0, as_rows: bool = False) -> dict[str, int]:
        """See :class:`BatchFeed`."""
        columns, rows = self._columns, self._order.dealing.own(batch_size)
        batches = rows * columns.batch_bytes
        stored = sum(column.staging_bytes(rows, copied=not column.on_backend) for column in columns)
        staging = max(stored, columns.delivery_bytes(rows, as_rows, len(self._order.dealing.own_parts)))
        if kept and self.gathers_whole:
            batches, staging = rows * columns.captured_bytes, 0
        elif kept:
            batches = rows * columns.captured_bytes + kept * batches
        # A computed order is there for one batch at a time; the cumulative weights stay.
        order = 8 * (rows if self._order.by_kernels else self._order.own_share(batch_size))
        order += 8 * self._order.kernel_sums
        data = {"data": columns.data_bytes, "order of an epoch": order}
        return {**data, "batches": batches, "conversion of a batch": staging}

    def batches(self, epoch: int, starts: range, finish: Finish[Batch], stats: LoaderStats) -> Generator[Batch]:
        """See :class:`BatchFeed`."""
        self.copy_data(stats)
        order, size = self._order, starts.step
        found: np.ndarray | Permutation | Draws
        first = 0
        place: Callable[[int, int], tuple[int, int]] = functools.partial(self._place, size)
        if order.by_kernels:
            found, place = self.computed(epoch, stats), order.dealing.positions
        elif order.dealt:
            found = order.whole(epoch, size)
        else:
            found, first = order.between(epoch)(starts.start, order.share), starts.start
        with contextlib.closing(DeviceOrder(self._backend, found, first)) as there:
            stats.bytes_copied += there.nbytes
            for start in starts:
                index = there.part(*place(start, min(start + size, order.share)))
                yield finish(self._gathered(index), epoch, start // size)

    def _place(self, size: int, start: int, stop: int) -> tuple[int, int]:
        """The start and stop of a batch in a list of this rank's samples, in batches of ``size``."""
        first = start // size * self._order.dealing.own(size)
        return first, first + self._order.dealing.own(stop - start)

    def _gathered(self, index: Array) -> list[Array]:
        if not len(index):
            return self._columns.no_rows()
        with self._backend.scope():
            return [column.gather(index) for column in self._there]

    def captured(self, batch_size: int) -> DeviceFeed:
        """The feed that gathers whole batches inside captured steps."""
        columns = [(c.array.array, c.captured_dtype, c.scale) for c in self._there if c.array is not None]
        order, rows = self._order, self._order.dealing.own(batch_size)
        if not order.by_kernels:
            return DeviceFeed(self._backend, columns, order.own_share(batch_size), rows)
        sizes = batch_size, order.share % batch_size
        firsts = list(dict.fromkeys(order.dealing.deal(size).first for size in sizes))
        kind, words = order.kernel
        return DeviceFeed(self._backend, columns, 0, rows, firsts, batch_size, kind, words)

    def computed(self, epoch: int, stats: LoaderStats) -> Permutation | Draws:
        """The order of an epoch for kernels to compute; its cumulative weights are copied once."""
        if self._order.sums is not None and (self._sums is None or self._sums[0] is not self._order.sums):
            self._sums = self._order.sums, copy_to_device(self._order.sums, self._backend)
            stats.bytes_copied += self._order.sums.nbytes
        return self._order.computed(epoch, None if self._sums is None else self._sums[1])


class ThroughPinned:
    """Batches that are copied to the device as they are stored, while it works on earlier ones."""

    def __init__(
        self, columns: Columns, order: Order, prefetch: int, looked_at: LookedAt, backend: CudaBackend
    ) -> None:
        self._columns, self._order, self._prefetch, self._backend = columns, order, prefetch, backend
        self._looked_at = looked_at

    def ahead(self, batch_size: int) -> int:
        """See :class:`BatchFeed`."""
        return _ahead(self._columns, self._prefetch, batch_size)

    def _slots(self, batch_size: int) -> int:
        """The most batches on their way: the one in use, and those that are being filled and copied."""
        return 1 + max(self.ahead(batch_size), 1)

    def memory_parts(self, batch_size: int, kept: int = 0, as_rows: bool = False) -> dict[str, int]:
        """See :class:`BatchFeed`."""
        columns, rows = self._columns, self._order.dealing.own(batch_size)
        batches = rows * columns.batch_bytes
        # Only columns on the device stage samples there; the others are made from the buffers.
        stored = sum(column.staging_bytes(rows) for column in columns if column.on_backend)
        staging = max(stored, columns.delivery_bytes(rows, as_rows, len(self._order.dealing.own_parts)))
        if kept:
            batches = rows * columns.captured_bytes + kept * batches
        buffers = self._slots(batch_size) * rows * columns.stored_bytes
        return {"buffers of batches": buffers, "batches": batches, "conversion of a batch": staging}

    def batches(self, epoch: int, starts: range, finish: Finish[Batch], stats: LoaderStats) -> Generator[Batch]:
        """See :class:`BatchFeed`."""
        columns, size, order = self._columns, starts.step, self._order
        forms = [((order.dealing.own(size), *shape), dtype) for shape, dtype in (column.form for column in columns)]
        with contextlib.closing(Ring(self._backend, forms, self._slots(size))) as ring:
            fill = self._fill(epoch, size, ring.helpers)

            def prepare(start: int) -> Slot | None:
                stop = min(start + size, order.share)
                if not (rows := order.dealing.own(stop - start)):
                    return None
                slot = ring.acquire([(rows, *shape[1:]) for shape, _ in forms])
                fill(start, stop, slot.on_host())
                ring.send(slot)
                return slot

            with contextlib.closing(prepared(prepare, starts, self.ahead(size))) as slots:
                for start, slot in zip(starts, slots, strict=True):
                    stats.bytes_copied += 0 if slot is None else slot.nbytes
                    rows = columns.no_rows() if slot is None else self._received(ring, slot)
                    yield finish(rows, epoch, start // size)

    def _fill(self, epoch: int, size: int, helpers: Executor) -> Callable[[int, int, list[np.ndarray]], None]:
        """A function (start, stop, places) that writes the samples at these positions into pinned memory."""
        columns = self._columns
        if not (self._order.window and columns.readers):
            index = self._order.between(epoch, size)
            return lambda start, stop, places: columns.store(index(start, stop), places, helpers)
        windows = self._looked_at.windows(epoch, size)

        def fill(start: int, stop: int, places: list[np.ndarray]) -> None:
            done = 0
            for part in windows.parts(start, stop):
                rows = len(part.use)
                copy_into([place[done : done + rows] for place in places], columns.stored_of_window(*part))
                done += rows

        return fill

    def _received(self, ring: Ring, slot: Slot) -> list[Any]:
        with ring.received(slot) as arrays:
            return [column.received(array) for column, array in zip(self._columns, arrays, strict=True)]


def belongs_on_device(
    columns: Columns, feed: str, order: int, needed: int, planned: int, counted: bool
) -> tuple[bool, str]:
    """Whether batches are gathered on the device, and in words how they get there and why.

    feed: the loader's argument
    order: the numbers of 8 bytes that an order has on the device
    needed: the bytes of the plan besides the data and the order
    planned: the bytes that the plan has found available
    counted: whether the plan counts a model
    """
    spec, data = columns.backend.spec, columns.data_bytes
    through = f"batches go to {spec} through pinned memory"
    if columns.readers:
        return False, f"{through}, since {next(iter(columns.readers)).where} is read"
    if not data:
        return True, f"batches are gathered on {spec}, where the data was given"
    if feed == "host":
        return False, f"{through}, since feed='host' was given"
    total, available = data + 8 * order, columns.backend.memory().available
    there = f"batches are gathered on {spec}, where {format_bytes(data)} of data were copied"
    if feed == "device":
        if total > available:
            raise InsufficientMemoryError(
                f"feed='device' needs {format_bytes(total)} on {spec} for the data and their order, got "
                f"{format_bytes(available)} available"
            )
        return True, f"{there}, since feed='device' was given"
    needed += total
    # A plan without a model leaves half of the memory to it.
    room, of = (planned, "available") if counted else (available // 2, "that are half of what is available")
    fit = fits(needed, room) and fits(total, available)
    why = (
        f"with their order and the plan's bytes {format_bytes(needed)}, {'at most' if fit else 'more than'} 90 % of the"
    )
    through = f"{through}, since {format_bytes(data)} of data are"
    return fit, f"{f'{there}:' if fit else through} {why} {format_bytes(room)} {of}"
