"""Copies of batches to a CUDA device through pinned memory, while the device computes.

Every batch depends on three rules of :class:`Ring`:

1. The thread that fills pinned memory waits until the copy from it is over.
2. The stream of the copies waits until the buffer's earlier content has been converted.
3. The consumer's stream waits for the copy before it converts.
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

# One core gathers about 10 GB/s, while today's buses copy 25 to 55. A part is large compared with the cost of a task.
HELPERS = min(8, os.cpu_count() or 1)
PART = 1 << 21


@dataclasses.dataclass(eq=False)
class Slot:
    """A batch on its way: flat buffers of the host and the device, and the shapes of their arrays."""

    pinned: list[np.ndarray]
    staged: list[Array]
    copied: Any  # the event after the copy to the device
    used: Any  # the event after the last work on what was copied
    shapes: list[tuple[int, ...]]

    def on_host(self) -> list[np.ndarray]:
        """The arrays to fill."""
        return [_shaped(buffer, shape) for buffer, shape in zip(self.pinned, self.shapes, strict=True)]

    def on_device(self) -> list[Array]:
        """The arrays on the device."""
        return [_shaped(buffer, shape) for buffer, shape in zip(self.staged, self.shapes, strict=True)]

    @property
    def nbytes(self) -> int:
        """The bytes of the batch."""
        return sum(array.nbytes for array in self.on_host())


def _shaped(buffer: Array, shape: tuple[int, ...]) -> Array:
    return buffer[: math.prod(shape)].reshape(shape)


class Ring:
    """Slots through which batches go to the device, in the order in which they are filled.

    forms: the largest shape and the element type of each array of a batch
    slots: the number of batches that may be on their way, including the received one

    One thread fills and sends, another receives. The constructor takes all memory, :meth:`close` gives it back.
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
                # The pool may give memory that earlier work of this stream still uses.
                self._home.record(slot.used)
        self._free = deque(self._slots)
        self.helpers = ThreadPoolExecutor(HELPERS, "gpubatch-gather")  # starts no thread before the first task
        # At the end of the process the driver is gone before generators are closed, so this closes earlier. The thread
        # that fills registers later, so it ends before.
        atexit.register(self.close)

    def acquire(self, shapes: list[tuple[int, ...]]) -> Slot:
        """A slot for arrays of these shapes. Waits for the copy from its pinned memory."""
        slot = self._free.popleft()
        slot.copied.synchronize()
        slot.shapes = shapes
        return slot

    def send(self, slot: Slot) -> None:
        """Start the copy to the device, without waiting for it."""
        with self._backend.scope():
            self._copies.wait_event(slot.used)
            for host, device in zip(slot.on_host(), slot.on_device(), strict=True):
                device.set(host, stream=self._copies)
            self._copies.record(slot.copied)

    @contextlib.contextmanager
    def received(self, slot: Slot) -> Iterator[list[Array]]:
        """The arrays of a slot on the device, for work that the ``with`` block starts on the current stream."""
        with self._backend.scope():
            stream = self._backend.current_stream()
            stream.wait_event(slot.copied)
            try:
                yield slot.on_device()
            finally:
                stream.record(slot.used)
                self._free.append(slot)

    def close(self) -> None:
        """Wait for running copies and give all memory back. The last call."""
        atexit.unregister(self.close)
        if os.getpid() != self._process or not self._slots:
            return  # a forked child cannot use the device
        self.helpers.shutdown()
        with self._backend.scope():
            self._copies.synchronize()
            for slot in self._slots:
                self._home.wait_event(slot.used)  # the pool may give the memory to this stream's next work
        for slot in self._slots:  # a kept traceback may hold slots
            slot.pinned.clear()
            slot.staged.clear()
        self._slots = []
        self._free.clear()


def take_into(array: np.ndarray, index: np.ndarray, out: np.ndarray, helpers: Executor) -> None:
    """Write the rows at ``index``, which must be in range, into ``out``; ``helpers`` share large batches."""
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
