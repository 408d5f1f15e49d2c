"""The ledger of captured steps: the block of device memory through which they and the host communicate."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpubatch.backend import Array, CudaBackend
from gpubatch.staging import Stage, Stages

CHUNK = 64  # steps whose scalars are copied to the device at a time, and whose losses are copied back
AHEAD = 2  # chunks queued beyond the one that the host waits for; or batches kept
STAGES = 2 * (AHEAD + 2)  # copies between host and device in flight
WORDS = 5  # as kernels/step.cuh numbers them
SLOT, HALTED, BATCH, STEP, TICKET = range(WORDS)


class Report:
    """The progress of the steps at one point of the stream; ``read`` waits for it."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage

    def read(self) -> tuple[list[float], bool]:
        """The losses of the steps applied since the ledger was written, and whether a step halted."""
        self._stage.over.synchronize()
        words = self._stage.memory[: 8 * WORDS].view(np.int64)
        losses = self._stage.memory[8 * WORDS :].view(np.float64)
        return losses[: words[SLOT]].tolist(), bool(words[HALTED])


class Ledger:
    """A block on the device with the scalars and the losses of ``capacity`` steps, and their progress.

    ``shape`` is that of the scalars of a step: groups of parameters, scalars of the formula; ``count`` is how many
    numbers callbacks have for a step.

    First come the scalars, in ``rows``; then the ``numbers`` of callbacks; then ``progress``, the words of
    kernels/step.cuh; then the ``losses``. So the host writes one piece and reads another; both contain the slot.
    """

    def __init__(self, backend: CudaBackend, shape: tuple[int, int], dtype: np.dtype[Any], count: int = 0) -> None:
        self._backend, self.capacity = backend, CHUNK
        nbytes = CHUNK * shape[0] * shape[1] * dtype.itemsize
        self._of_parts = -(-nbytes // 8) * 8  # where the numbers of parts begin, aligned to 8 bytes
        self._start = self._of_parts + 8 * CHUNK * count  # of the words
        size = self._start + 8 * WORDS + 8 * CHUNK
        with backend.scope():
            self._block = backend.zeros(size, np.uint8)
            self.rows = self._block[:nbytes].view(dtype).reshape(CHUNK, *shape)
            self.numbers = self._block[self._of_parts : self._start].view(np.float64).reshape(CHUNK, count)
            self.progress = self._block[self._start : self._start + 8 * WORDS].view(np.int64)
            self.losses = self._block[self._start + 8 * WORDS :].view(np.float64)
            self.control = backend.zeros(2, dtype)  # of the update
        self._stages = Stages(backend, size, STAGES)

    def word(self, number: int) -> Array:
        """One of the words, as an array on the device."""
        return self.progress[number : number + 1]

    def write(self, rows: np.ndarray, numbers: np.ndarray | None = None) -> None:
        """Write the scalars of the steps to be queued after this, and the numbers of callbacks."""
        stage = self._stages.next()
        if numbers is not None:
            stage.memory[self._of_parts : self._of_parts + numbers.nbytes].view(np.float64)[:] = numbers.reshape(-1)
        table = stage.memory[: rows.nbytes]
        table[...] = np.ascontiguousarray(rows).reshape(-1).view(np.uint8)
        stage.memory[self._start : self._start + 8].view(np.int64)[0] = 0
        self._send(stage, 0, self._start + 8)

    def restart(self, batch: int, step: int) -> None:
        """Have the steps queued after this begin with ``batch`` and dropout step ``step``, even after a halt."""
        stage = self._stages.next()
        start, stop = self._start + 8 * HALTED, self._start + 8 * TICKET
        stage.memory[start:stop].view(np.int64)[:] = 0, batch, step
        self._send(stage, start, stop)

    def report(self) -> Report:
        """Queue a copy of words and losses behind the steps queued so far; does not wait."""
        stage = self._stages.next()
        report = Stage(stage.memory[: self._block.size - self._start], stage.over)
        with self._backend.scope():
            self._block[self._start :].get(out=report.memory, blocking=False)
            self._backend.current_stream().record(stage.over)
        return Report(report)

    def _send(self, stage: Stage, start: int, stop: int) -> None:
        self._stages.send(stage, stage.memory[start:stop], self._block[start:stop])
