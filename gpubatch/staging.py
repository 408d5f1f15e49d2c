"""Pinned memory for asynchronous copies between host and device.

A copy may read the host's memory until its stream has reached it, ordinary memory too where the GPU reads that itself.
So values that the host will change or free are copied from here, where a piece is written again only when the copy
before is over.
"""

from __future__ import annotations

import os
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpubatch.backend import Array, CudaBackend

__all__ = ["Stage", "Stages", "stages_for", "wait_at_the_end"]

PIECE = 1 << 22  # bytes of a large array that are copied at a time: far more than the start of a copy costs
ALIGNMENT = 64  # bytes


@dataclass(eq=False)
class Stage:
    """Pinned memory for a copy between host and device, and the event after the last one."""

    memory: np.ndarray
    over: Any


class Stages:
    """``count`` pieces of ``size`` bytes of pinned memory, used in turn, on one stream at a time."""

    def __init__(self, backend: CudaBackend, size: int, count: int) -> None:
        self._backend, self._size = backend, size
        stride = -(-size // ALIGNMENT) * ALIGNMENT
        with backend.scope():
            block = backend.pinned(stride * count, np.dtype(np.uint8))
            starts = range(0, stride * count, stride)
            self._stages = deque(Stage(block[start : start + size], backend.event()) for start in starts)
        wait_at_the_end(self, [stage.over for stage in self._stages])

    def next(self) -> Stage:
        """The least recently used stage. Waits for its copy, which has normally finished."""
        stage = self._stages.popleft()
        self._stages.append(stage)
        stage.over.synchronize()
        return stage

    def send(self, stage: Stage, source: np.ndarray, out: Array) -> None:
        """Start the copy of ``source``, memory of the piece, to ``out`` on the current stream."""
        with self._backend.scope():
            stream = self._backend.current_stream()
            out.set(source, stream=stream)
            stream.record(stage.over)

    def copy(self, values: np.ndarray, out: Array) -> None:
        """Start the copy of ``values`` to ``out``, of the same shape; they may be changed when this returns."""
        rows = max(1, self._size // max(1, out[:1].nbytes))
        for start in range(0, len(values), rows):
            part = out[start : start + rows]
            stage = self.next()
            place = stage.memory[: part.nbytes].view(part.dtype).reshape(part.shape)
            place[...] = values[start : start + rows]
            self.send(stage, place, part)

    def pieces(self, source: Array) -> Iterator[np.ndarray]:
        """The bytes of ``source``, contiguous on the device, piece by piece; each is valid until the next but one.

        The copy of a piece runs while the caller has the one before, after the work of the current stream.
        """
        flat, coming = source.reshape(-1).view(np.uint8), deque[tuple[Stage, np.ndarray]]()
        for start in range(0, flat.size, self._size):
            part = flat[start : start + self._size]
            stage = self.next()
            out = stage.memory[: part.size]
            with self._backend.scope():
                part.get(out=out, blocking=False)
                self._backend.current_stream().record(stage.over)
            coming.append((stage, out))
            if len(coming) == len(self._stages) - 1:
                yield _arrived(*coming.popleft())
        while coming:
            yield _arrived(*coming.popleft())


def _arrived(stage: Stage, out: np.ndarray) -> np.ndarray:
    stage.over.synchronize()
    return out


def stages_for(backend: CudaBackend, out: Array) -> Stages:
    """Two pieces through which an array of the form of ``out`` is copied, whatever its size."""
    return Stages(backend, min(out.nbytes, max(PIECE, out[:1].nbytes)), 2)


def wait_at_the_end(owner: Any, events: Sequence[Any]) -> None:
    """When ``owner`` is garbage-collected, wait for these events before its memory is reused."""
    # Not at the end of the process, when all goes at once.
    weakref.finalize(owner, wait_for, events, os.getpid()).atexit = False


def wait_for(events: Sequence[Any], process: int) -> None:
    """Wait for events, but not in a forked child, which cannot use the device."""
    if os.getpid() == process:
        for event in events:
            event.synchronize()
