"""What the host and captured steps tell each other, in one block of device memory."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpubatch.backend import Array, CudaBackend
from gpubatch.staging import Stage, Stages

__all__ = ["AHEAD", "BATCH", "CHUNK", "HALTED", "STEP", "Ledger", "Report"]

CHUNK = 64  # steps whose scalars go to the device, and whose losses come back, in one copy
AHEAD = 2  # chunks that are queued beyond the one that the host waits for, or batches that are kept
STAGES = 2 * (AHEAD + 2)  # copies between host and device that may be under way
WORDS = 5  # of kernels/step.cuh, in this order
SLOT, HALTED, BATCH, STEP, TICKET = range(WORDS)


class Report:
    """How far the steps had come at one point of the stream; ``read`` waits for it."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage

    def read(self) -> tuple[list[float], bool]:
        """The losses of the steps that were applied since the ledger was written, and whether one halted."""
        self._stage.over.synchronize()
        words = self._stage.memory[: 8 * WORDS].view(np.int64)
        losses = self._stage.memory[8 * WORDS :].view(np.float64)
        return losses[: words[SLOT]].tolist(), bool(words[HALTED])


class Ledger:
    """What the host and the captured steps tell each other, in one block on the device.

    First the scalars of ``capacity`` steps, in ``rows``; then the words of kernels/step.cuh, ``progress``; then the
    ``losses`` of as many steps. So what the host writes is in one piece, and what it reads in another; the slot is in
    both.
    """

    def __init__(self, backend: CudaBackend, scalars: int, dtype: np.dtype[Any]) -> None:
        self._backend, self.capacity = backend, CHUNK
        self._start = -(-CHUNK * scalars * dtype.itemsize // 8) * 8  # of the words
        size = self._start + 8 * WORDS + 8 * CHUNK
        with backend.scope():
            self._block = backend.zeros(size, np.uint8)
            self.rows = self._block[: CHUNK * scalars * dtype.itemsize].view(dtype).reshape(CHUNK, scalars)
            self.progress = self._block[self._start : self._start + 8 * WORDS].view(np.int64)
            self.losses = self._block[self._start + 8 * WORDS :].view(np.float64)
            self.control = backend.zeros(2, dtype)  # of the update
        self._stages = Stages(backend, size, STAGES)

    def word(self, number: int) -> Array:
        """One of the words, where kernels find it."""
        return self.progress[number : number + 1]

    def write(self, rows: np.ndarray) -> None:
        """The scalars of the steps to come, for those that are given to the stream after this."""
        stage = self._stages.next()
        table = stage.memory[: rows.nbytes]
        table[...] = np.ascontiguousarray(rows).reshape(-1).view(np.uint8)
        stage.memory[self._start : self._start + 8].view(np.int64)[0] = 0
        self._send(stage, 0, self._start + 8)

    def restart(self, batch: int, step: int) -> None:
        """Go on with these, after whatever halted."""
        stage = self._stages.next()
        start, stop = self._start + 8 * HALTED, self._start + 8 * TICKET
        stage.memory[start:stop].view(np.int64)[:] = 0, batch, step
        self._send(stage, start, stop)

    def report(self) -> Report:
        """Have the words and the losses copied when the steps given so far are over; nothing is waited for."""
        stage = self._stages.next()
        report = Stage(stage.memory[: self._block.size - self._start], stage.over)
        with self._backend.scope():
            self._block[self._start :].get(out=report.memory, blocking=False)
            self._backend.current_stream().record(stage.over)
        return Report(report)

    def _send(self, stage: Stage, start: int, stop: int) -> None:
        self._stages.send(stage, stage.memory[start:stop], self._block[start:stop])
