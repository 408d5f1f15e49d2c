"""How samples get from the host to a CUDA device: moved there once, or through pinned memory while it computes.

The rules of :class:`Ring`, on which every batch depends, are three. Pinned memory is written again only when the copy
from it is over, for which the thread that fills it waits. The copy to a buffer of the device begins only after the
conversion of what was there before, for which the stream of the copies waits. The conversion begins only after the
copy, for which the consumer's stream waits.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import itertools
import math
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any, TypeAlias

import numpy as np

from gpubatch.backend import Array, CudaBackend
from gpubatch.errors import InsufficientMemoryError
from gpubatch.ops import Grid, gather_batch, take_batch
from gpubatch.sizing import fits, format_bytes
from gpubatch.sources import ArraySource, Part
from gpubatch.staging import stages_for

__all__ = ["DeviceFeed", "DeviceOrder", "Form", "Ring", "Slot", "moved", "native", "needed", "on_device", "take_into"]

Form: TypeAlias = tuple[tuple[int, ...], np.dtype[Any]]  # shape and element type

# One core gathers about 10 GB/s, a bus of today copies 25 to 55. A part is large beside what handing it over costs.
HELPERS = min(8, os.cpu_count() or 1)
PART = 1 << 21


def native(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """``dtype`` in the byte order of this machine, which is that of the device."""
    return dtype.newbyteorder("=")


def needed(dtype: np.dtype[Any], dimensions: int) -> np.dtype[Any]:
    """In which a captured step needs an array of ``dtype``: labels are int64 to losses, whatever they were."""
    return np.dtype(np.int64) if dimensions == 1 and dtype.kind in "iu" else dtype


def moved(source: ArraySource, backend: CudaBackend) -> ArraySource:
    """``source`` with a C-contiguous copy of its array on the device, complete for every stream."""
    array = source.array
    with backend.scope():
        copy = backend.empty(array.shape, native(array.dtype))
        stages_for(backend, copy).copy(array, copy)
        backend.current_stream().synchronize()
    return dataclasses.replace(source, array=copy)


def on_device(
    sources: Sequence[ArraySource | Part],
    feed: str,
    order: int,
    needed: int,
    planned: int,
    counted: bool,
    backend: CudaBackend,
) -> tuple[bool, str]:
    """Whether batches of ``sources`` are gathered on the device, and how they get there, in words.

    ``feed`` is the loader's argument, ``order`` the number of samples in an epoch, whose order is on the device, too.
    All else needs ``needed`` of the ``planned`` bytes that a plan has found available; ``counted`` says whether a model
    is in it.
    """
    through = f"batches go to {backend.spec} through pinned memory"
    if read := [source.reader.where for source in sources if isinstance(source, Part)]:
        return False, f"{through}, since {read[0]} is read"
    arrays = [source.array for source in sources if isinstance(source, ArraySource)]
    data = sum(array.nbytes for array in arrays if not backend.owns(array))
    if not data:
        return True, f"batches are gathered on {backend.spec}, where the data was given"
    if feed == "host":
        return False, f"{through}, since feed='host' was given"
    total, available = data + 8 * order, backend.memory().available
    there = f"batches are gathered on {backend.spec}, where {format_bytes(data)} of data were copied"
    if feed == "device":
        if total > available:
            raise InsufficientMemoryError(
                f"feed='device' needs {format_bytes(total)} on {backend.spec} for the data and their order, got "
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


def take_into(source: ArraySource, index: np.ndarray, out: np.ndarray, helpers: Executor) -> None:
    """The samples at ``index``, which are in range, as they are stored, in ``out``; ``helpers`` share large ones."""
    if not source.array.flags.c_contiguous or source.dtype != out.dtype:
        out[...] = source.take(index)
        return

    def take(part: slice) -> None:
        # mode="raise" goes through a copy of the result: 3.5 GB/s instead of 11.
        np.take(source.array, index[part], axis=source.axis, out=out[part] if source.axis == 0 else out, mode="clip")

    count = min(HELPERS, out.nbytes // PART) if source.axis == 0 else 1
    if count > 1:
        cuts = [number * len(index) // count for number in range(count + 1)]
        list(helpers.map(take, itertools.starmap(slice, itertools.pairwise(cuts))))
    else:
        take(slice(None))


class DeviceOrder:
    """The samples of an epoch in the order of their use, copied to the device once."""

    def __init__(self, backend: CudaBackend, order: np.ndarray) -> None:
        self._backend, self._process, self.nbytes = backend, os.getpid(), order.nbytes
        self._home, self._ready = backend.current_stream(), backend.event()
        with backend.scope():
            self._order = backend.empty(order.shape, order.dtype)
            # Not asarray, for which CuPy's pool would keep as much pinned memory for good.
            self._stages = stages_for(backend, self._order)
            self._stages.copy(order, self._order)
            self._home.record(self._ready)
        self._others = list[Any]()  # streams that have used it

    def part(self, start: int, stop: int) -> Array:
        """Those from one place to another, for work on the current stream."""
        stream = self._backend.current_stream()
        if stream != self._home and stream not in self._others:
            stream.wait_event(self._ready)
            self._others.append(stream)
        return self._order[start:stop]

    def close(self) -> None:
        """Give the memory back, for work that comes after all that uses it."""
        if os.getpid() != self._process or not self._others:
            return  # a forked child cannot use the device
        with self._backend.scope():
            for stream in self._others:
                used = self._backend.event()
                stream.record(used)
                self._home.wait_event(used)
        self._others.clear()


class DeviceFeed:
    """Batches that captured steps gather by themselves: data, order and batch lie on the device and stay in place.

    ``columns`` are the arrays on the device, with the element type and the scale of what is made of their rows.
    """

    def __init__(
        self,
        backend: CudaBackend,
        columns: Sequence[tuple[Array, np.dtype[Any], float | None]],
        share: int,
        batch_size: int,
    ) -> None:
        self._backend, self._columns, self.batch_size = backend, columns, batch_size
        self._order = backend.zeros(share, np.int64)  # of samples that there are, whatever comes first
        self._stages = stages_for(backend, self._order)
        self._batch = [backend.empty((batch_size, *array.shape[1:]), dtype) for array, dtype, _ in columns]

    def begin(self, order: np.ndarray) -> None:
        """The order of the epoch to come."""
        self._stages.copy(order, self._order)

    def arrays(self, rows: int) -> list[Array]:
        """The arrays in which a batch of ``rows`` samples is made."""
        return [array[:rows] for array in self._batch]

    def enqueue(self, rows: int, batch: Array) -> None:
        """Make the batch whose number ``batch``, an int64 on the device, holds when it comes to that."""
        for (source, dtype, scale), out in zip(self._columns, self.arrays(rows), strict=True):
            if dtype.kind == "f":
                factor = 1.0 if scale is None else scale
                gather_batch(Grid(self._backend, dtype), source, self._order, batch, out, factor, 0.0, self.batch_size)
            else:
                grid = Grid(self._backend, np.dtype(np.float32))
                take_batch(grid, source, self._order, batch, out, self.batch_size)


@dataclasses.dataclass(eq=False)
class Slot:
    """A batch on its way: flat buffers of the host and the device, and what is in them now."""

    pinned: list[np.ndarray]
    staged: list[Array]
    copied: Any  # the event after the copy to the device
    used: Any  # the event after the last work on what was copied
    shapes: list[tuple[int, ...]]

    def on_host(self) -> list[np.ndarray]:
        """The arrays to be filled."""
        return [_shaped(buffer, shape) for buffer, shape in zip(self.pinned, self.shapes, strict=True)]

    def on_device(self) -> list[Array]:
        """The same on the device."""
        return [_shaped(buffer, shape) for buffer, shape in zip(self.staged, self.shapes, strict=True)]

    @property
    def nbytes(self) -> int:
        """The bytes of the batch."""
        return sum(array.nbytes for array in self.on_host())


def _shaped(buffer: Array, shape: tuple[int, ...]) -> Array:
    return buffer[: math.prod(shape)].reshape(shape)


class Ring:
    """Slots through which batches of at most ``forms`` go to the device, in the order in which they are filled.

    One thread fills and sends, one receives; no more than ``slots`` may be on their way, the one that is received
    included. ``rows`` are the numbers of their rows, on the device. All memory is taken here and given back by
    ``close``.
    """

    def __init__(self, backend: CudaBackend, forms: list[Form], slots: int) -> None:
        self._backend, self._process = backend, os.getpid()
        with backend.scope():
            self._home, self._copies = backend.current_stream(), backend.stream()
            self.rows = backend.asarray(np.arange(max(shape[0] for shape, _ in forms), dtype=np.int64))
            self._slots = [
                Slot(
                    [backend.pinned(math.prod(shape), dtype) for shape, dtype in forms],
                    [backend.empty(math.prod(shape), dtype) for shape, dtype in forms],
                    backend.event(),
                    backend.event(),
                    [],
                )
                for _ in range(slots)
            ]
            for slot in self._slots:
                # What the pool gives was given back by work of this stream that may still be going on.
                self._home.record(slot.used)
        self._free = deque(self._slots)
        self.helpers = ThreadPoolExecutor(HELPERS, "gpubatch-gather")  # no thread before there is something to do
        # An iteration that the process ends in is closed after the driver; and before that the thread that fills ends.
        atexit.register(self.close)

    def acquire(self, shapes: list[tuple[int, ...]]) -> Slot:
        """A slot for arrays of these shapes, whose pinned memory nothing reads any more."""
        slot = self._free.popleft()
        slot.copied.synchronize()
        slot.shapes = shapes
        return slot

    def send(self, slot: Slot) -> None:
        """Begin the copy to the device; it is not waited for."""
        with self._backend.scope():
            self._copies.wait_event(slot.used)
            for host, device in zip(slot.on_host(), slot.on_device(), strict=True):
                device.set(host, stream=self._copies)
            self._copies.record(slot.copied)

    @contextlib.contextmanager
    def received(self, slot: Slot) -> Iterator[list[Array]]:
        """The arrays of a slot on the device, for work on the current stream that is started inside the ``with``."""
        with self._backend.scope():
            stream = self._backend.current_stream()
            stream.wait_event(slot.copied)
            try:
                yield slot.on_device()
            finally:
                stream.record(slot.used)
                self._free.append(slot)

    def close(self) -> None:
        """Wait for the copies that are under way and give all memory back; nothing may be sent any more."""
        atexit.unregister(self.close)
        if os.getpid() != self._process or not self._slots:
            return  # a forked child cannot use the device
        self.helpers.shutdown()
        with self._backend.scope():
            self._copies.synchronize()
            for slot in self._slots:
                self._home.wait_event(slot.used)  # its pool may give the memory to the next work of this stream
        for slot in self._slots:  # an exception that somebody keeps has frames that have slots
            slot.pinned.clear()
            slot.staged.clear()
        self._slots, self.rows = [], None
        self._free.clear()
