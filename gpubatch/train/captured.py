"""The captured steps of an epoch: queued some chunks ahead, and read as they come back."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from gpubatch.backend import Array
from gpubatch.nn import core_of
from gpubatch.optim import scalars_ahead
from gpubatch.train.graphs import CapturedSteps
from gpubatch.train.ledger import AHEAD, BATCH, Report

__all__ = ["Queue"]


class Made(NamedTuple):
    """A step that was applied: its loss, its learning rate, and how many samples it learnt from."""

    loss: float
    lr: float | None
    rows: int


class Chunk(NamedTuple):
    """Steps that are queued."""

    report: Report
    rates: list[float | None]
    rows: list[int]


class Queue:
    """The steps of an epoch, from ``batch`` on: queued some chunks ahead of what is read.

    ``rows_of`` tells the samples of a batch. What is read is counted by optimizer and network. After a step that
    ``halted``, nothing is in flight until :meth:`go_on`.
    """

    def __init__(
        self,
        steps: CapturedSteps,
        batch: int,
        rows_of: Callable[[int], int],
        micro_batch_size: int | None,
    ) -> None:
        self._steps, self._rows_of, self._most = steps, rows_of, micro_batch_size
        self._chunks = deque[Chunk]()
        self.go_on(batch)

    @property
    def in_flight(self) -> int:
        """Steps that are queued and have not been read."""
        return sum(len(chunk.rows) for chunk in self._chunks)

    def go_on(self, batch: int) -> None:
        """Begin at a batch, with the optimizer and the network as they are."""
        self.halted, self._batch = False, batch
        self._steps.ledger.restart(batch, core_of(self._steps.net).dropout_step)

    def fill(self, room: int) -> None:
        """Queue what comes next, at most ``room`` steps beyond what was read."""
        while len(self._chunks) <= AHEAD and (count := min(room - self.in_flight, self._steps.ledger.capacity)) > 0:
            if not self._add(count):
                return

    def hand(self, x: Array, y: Array) -> bool:
        """Queue the step on this batch, which is copied; False where that must wait for those in flight."""
        for place, array in zip(self._steps.feed.arrays(len(x)), (x, y), strict=True):
            place[...] = array
        return self._add(1)

    def _add(self, count: int) -> bool:
        opt, ledger = self._steps.opt, self._steps.ledger
        first = self._batch + self.in_flight
        # A schedule that fails does so when everything before is over, as if it had not been asked ahead of time.
        scalars, rates = scalars_ahead(opt, opt.t + self.in_flight, count, 0 if self._chunks else 1)
        rows = [self._rows_of(first + i) for i in range(len(rates))]
        if rows:
            ledger.write(scalars)
            self._steps.enqueue(rows, self._most)
            self._chunks.append(Chunk(ledger.report(), rates, rows))
        return bool(rows)

    def read(self) -> list[Made]:
        """Wait for the chunk that was queued first; the steps of it that were applied."""
        if not self._chunks:
            return []
        report, rates, rows = self._chunks.popleft()
        losses, self.halted = report.read()
        if self.halted:
            self._chunks.clear()  # they change nothing
        self._batch += len(losses)
        self._steps.opt.t += len(losses)
        core_of(self._steps.net).count_steps(len(losses))
        return [Made(*made) for made in zip(losses, rates, rows, strict=False)]

    def batch(self) -> list[Array]:
        """The batch of the step that halted."""
        steps, rows = self._steps, self._rows_of(self._batch)
        steps.feed.enqueue(rows, steps.ledger.word(BATCH))
        return steps.feed.arrays(rows)
