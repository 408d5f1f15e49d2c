"""The three ways of batches to their backend, each with the memory that it takes; a loader chooses one of them."""

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
Finish: TypeAlias = Callable[..., Batch]  # of rows, epoch, the number of the batch in it, and perhaps its parts

# From so many elements a batch on, preparing it is worth a thread. Handing a batch over costs 10 to 25 µs; gathering
# takes 0.2 to 0.3 ns an element. Measured on two cores: a thread made bare iteration over batches of 256 x 784 up to
# twice as slow and a consumer no faster; from 2048 x 784 on it hides the gathering (-16 %, and -20 % at 4096 x 784)
# where a core is free, and is neutral (±6 %) where OpenBLAS keeps both cores.
WORTH_A_THREAD = 1 << 20


@dataclass
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


class BatchFeed(Protocol):
    """How batches get to the backend."""

    def ahead(self, batch_size: int) -> int:
        """Batches that a thread prepares before they are asked for."""

    def memory_parts(self, batch_size: int, kept: int = 0, as_rows: bool = False) -> dict[str, int]:
        """Bytes that :meth:`batches` needs on the backend when it needs most, by what they are for.

        ``kept`` is how many batches more than one captured steps keep that do not gather their own; eager steps keep
        none. ``as_rows`` says whether batches are finished by :meth:`Columns.as_rows`.
        """

    def batches(self, epoch: int, starts: range, finish: Finish[Batch], stats: LoaderStats) -> Generator[Batch]:
        """What ``finish`` makes of each batch: of the rows from each of ``starts`` to the next, epoch and number.

        All memory is taken in here, and given back when the generator ends.
        """


def _ahead(columns: Columns, prefetch: int, batch_size: int) -> int:
    worth_it = columns.readers or batch_size * columns.host_elements >= WORTH_A_THREAD
    return prefetch if worth_it else 0


class LookedAt:
    """The windows of epochs. Those of an epoch to come whose first batch was looked at are kept for it.

    Without that, all that was read for the batch would be read and decoded twice.
    """

    def __init__(self, columns: Columns, order: Order) -> None:
        self._columns, self._order = columns, order
        self._kept: tuple[tuple[int, int], Any, Any, Windows] | None = None  # and which they are

    def windows(self, epoch: int, size: int) -> Windows:
        """Those of an epoch in batches of ``size``."""
        kept, self._kept = self._kept, None
        if kept is not None:
            of, chosen, readers, windows = kept
            if of == (epoch, size) and chosen is self._order.chosen and readers is self._columns.readers:
                return windows
        return Windows(self._order, epoch, self._columns.readers, size)

    def first_rows(self, epoch: int, size: int) -> list[Array] | None:
        """The first rows of an epoch to come; None where it does not read neighbours together."""
        columns = self._columns
        if not self._order.window or all(reader.block is None for reader in columns.readers):
            return None
        windows = self.windows(epoch, size)
        self._kept = (epoch, size), self._order.chosen, columns.readers, windows
        return columns.moved(columns.joined(columns.stored_of_window(*part) for part in windows.parts(0, size)))


class MainMemory:
    """Batches of the CPU, finished by the thread that prepares them."""

    def __init__(self, columns: Columns, order: Order, prefetch: int, looked_at: LookedAt) -> None:
        self._columns, self._order, self._prefetch, self._looked_at = columns, order, prefetch, looked_at

    def ahead(self, batch_size: int) -> int:
        """See :class:`BatchFeed`."""
        return _ahead(self._columns, self._prefetch, batch_size)

    def memory_parts(self, batch_size: int, kept: int = 0, as_rows: bool = False) -> dict[str, int]:
        """See :class:`BatchFeed`; making an order, while there is no batch, may take most."""
        columns, windows, rows = self._columns, self._order.window > 0, self._order.dealing.own(batch_size)
        # What is read by windows is converted from the window.
        stored = sum(c.staging_bytes(rows) for c in columns if not windows or c.array is not None)
        # A batch of two windows is put together from its parts. Each of these is gone before the next is made.
        parts = rows * columns.batch_bytes if windows and columns.readers else 0
        staging = max(stored, parts, columns.delivery_bytes(rows, parts=len(self._order.dealing.own_parts)))
        # The batch in use, and those prepared ahead; a loop that keeps it while it asks for the next has one more.
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
        """A function of two positions: the rows of the samples from one to the other."""
        columns = self._columns
        if not (self._order.window and columns.readers):
            index = self._order.between(epoch, size)
            at = columns.at if columns.readers else columns.gathered
            return lambda start, stop: at(index(start, stop))
        windows = self._looked_at.windows(epoch, size)
        return lambda start, stop: columns.joined(columns.of_window(*part) for part in windows.parts(start, stop))


class OnDevice:
    """Batches gathered on the device, where the data and the order of the epoch are: none copies anything."""

    def __init__(self, columns: Columns, order: Order, backend: CudaBackend) -> None:
        self._columns, self._order, self._backend = columns, order, backend
        self._there: list[Column] = []  # with the arrays that were copied
        self._sums: tuple[np.ndarray, Array] | None = None  # of the order's weights, and their copy
        arrays = [source for column in columns if (source := column.array) is not None]
        # Captured steps gather whole rows of contiguous arrays, as copies are.
        self.gathers_whole = (
            not columns.functions
            and not columns.readers
            and all(s.array.flags.c_contiguous or not backend.owns(s.array) for s in arrays)
        )

    def of(self, order: Order) -> OnDevice:
        """Batches of the same data in another order."""
        other = OnDevice(self._columns.unaugmented(), order, self._backend)
        other._there = self._there
        return other

    @property
    def copied_bytes(self) -> int:
        """Bytes of data that were copied to the device."""
        return self._columns.data_bytes if self._there else 0

    def copy_data(self, stats: LoaderStats) -> None:
        """Copy what is not on the device, once."""
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
        # A computed order is there for one batch at a time; the sums of weights for good.
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
        """Where a batch is in a list of this rank's samples, in batches of ``size``."""
        first = start // size * self._order.dealing.own(size)
        return first, first + self._order.dealing.own(stop - start)

    def _gathered(self, index: Array) -> list[Array]:
        if not len(index):
            return self._columns.no_rows()
        with self._backend.scope():
            return [column.gather(index) for column in self._there]

    def captured(self, batch_size: int) -> DeviceFeed:
        """What gathers whole batches inside captured steps."""
        columns = [(c.array.array, c.captured_dtype, c.scale) for c in self._there if c.array is not None]
        order, rows = self._order, self._order.dealing.own(batch_size)
        if not order.by_kernels:
            return DeviceFeed(self._backend, columns, order.own_share(batch_size), rows)
        sizes = batch_size, order.share % batch_size
        firsts = list(dict.fromkeys(order.dealing.deal(size).first for size in sizes))
        kind, words = order.kernel
        return DeviceFeed(self._backend, columns, 0, rows, firsts, batch_size, kind, words)

    def computed(self, epoch: int, stats: LoaderStats) -> Permutation | Draws:
        """The order of an epoch that kernels compute; the sums of its weights are copied once."""
        if self._order.sums is not None and (self._sums is None or self._sums[0] is not self._order.sums):
            self._sums = self._order.sums, copy_to_device(self._order.sums, self._backend)
            stats.bytes_copied += self._order.sums.nbytes
        return self._order.computed(epoch, None if self._sums is None else self._sums[1])


class ThroughPinned:
    """Batches that go to the device as they are stored, while it works on others."""

    def __init__(
        self, columns: Columns, order: Order, prefetch: int, looked_at: LookedAt, backend: CudaBackend
    ) -> None:
        self._columns, self._order, self._prefetch, self._backend = columns, order, prefetch, backend
        self._looked_at = looked_at

    def ahead(self, batch_size: int) -> int:
        """See :class:`BatchFeed`."""
        return _ahead(self._columns, self._prefetch, batch_size)

    def _slots(self, batch_size: int) -> int:
        """Batches that are on their way at most: the one in use, and those that are filled and copied."""
        return 1 + max(self.ahead(batch_size), 1)

    def memory_parts(self, batch_size: int, kept: int = 0, as_rows: bool = False) -> dict[str, int]:
        """See :class:`BatchFeed`."""
        columns, rows = self._columns, self._order.dealing.own(batch_size)
        batches = rows * columns.batch_bytes
        # Samples that are there already are gathered there; what comes through the buffers is made from these.
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
        """A function of two positions that writes the samples from one to the other to places in pinned memory."""
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
    """Whether batches are gathered on the device, and how they get there, in words.

    ``feed`` is the loader's argument, ``order`` the number of samples whose places in an epoch are on the device, too.
    All else needs ``needed`` of the ``planned`` bytes that a plan has found available; ``counted`` says whether a model
    is in it.
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
    # A plan that counts no model leaves half of the memory to it.
    room, of = (planned, "available") if counted else (available // 2, "that are half of what is available")
    fit = fits(needed, room) and fits(total, available)
    why = (
        f"with their order and the plan's bytes {format_bytes(needed)}, {'at most' if fit else 'more than'} 90 % of the"
    )
    through = f"{through}, since {format_bytes(data)} of data are"
    return fit, f"{f'{there}:' if fit else through} {why} {format_bytes(room)} {of}"
