"""The way of batches to a CUDA device through pinned memory, while it computes.

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
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any, TypeAlias

import numpy as np

from gpubatch.backend import Array, CudaBackend

Form: TypeAlias = tuple[tuple[int, ...], np.dtype[Any]]  # shape and element type

# One core gathers about 10 GB/s, a bus of today copies 25 to 55. A part is large beside what handing it over costs.
HELPERS = min(8, os.cpu_count() or 1)
PART = 1 << 21


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

    One thread fills and sends, another receives; at most ``slots`` are on their way, the received one included. All
    memory is taken here and given back by :meth:`close`.
    """

    def __init__(self, backend: CudaBackend, forms: list[Form], slots: int) -> None:
        self._backend, self._process = backend, os.getpid()
        with backend.scope():
            self._home, self._copies = backend.current_stream(), backend.stream()
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
                # The pool may hand out memory that earlier work of this stream still uses.
                self._home.record(slot.used)
        self._free = deque(self._slots)
        self.helpers = ThreadPoolExecutor(HELPERS, "gpubatch-gather")  # starts no thread before the first task
        # At the end of the process the driver is gone before a generator is closed, so close before. The thread that
        # fills registers later and ends earlier.
        atexit.register(self.close)

    def acquire(self, shapes: list[tuple[int, ...]]) -> Slot:
        """A slot for arrays of these shapes; waits until its pinned memory has been copied."""
        slot = self._free.popleft()
        slot.copied.synchronize()
        slot.shapes = shapes
        return slot

    def send(self, slot: Slot) -> None:
        """Begin the copy to the device; nobody waits for it."""
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
        """Wait for the copies that are under way and give all memory back. Nothing may be sent afterwards."""
        atexit.unregister(self.close)
        if os.getpid() != self._process or not self._slots:
            return  # a forked child cannot use the device
        self.helpers.shutdown()
        with self._backend.scope():
            self._copies.synchronize()
            for slot in self._slots:
                self._home.wait_event(slot.used)  # its pool may give the memory to the next work of this stream
        for slot in self._slots:  # a traceback that somebody keeps holds slots
            slot.pinned.clear()
            slot.staged.clear()
        self._slots = []
        self._free.clear()


def take_into(array: np.ndarray, index: np.ndarray, out: np.ndarray, helpers: Executor) -> None:
    """Write the rows at ``index``, which are in range, into ``out``; ``helpers`` share the work on large ones."""
    if not array.flags.c_contiguous or array.dtype != out.dtype:
        out[...] = array[index]
        return

    def take(part: slice) -> None:
        # mode="raise" goes through a copy of the result: 3.5 GB/s instead of 11.
        np.take(array, index[part], axis=0, out=out[part], mode="clip")

    count = min(HELPERS, out.nbytes // PART)
    if count > 1:
        cuts = [number * len(index) // count for number in range(count + 1)]
        list(helpers.map(take, itertools.starmap(slice, itertools.pairwise(cuts))))
    else:
        take(slice(None))
