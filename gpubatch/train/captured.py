"""Captured steps: an epoch as CUDA graphs, queued some chunks ahead and read as they come back."""

from __future__ import annotations

import contextlib
import functools
from collections import deque
from collections.abc import Callable, Generator, Iterator
from typing import NamedTuple, Protocol

from gpubatch.backend import Array
from gpubatch.errors import CaptureWarning
from gpubatch.loader import DeviceFeed, Epochs, epochs_of, rows_of
from gpubatch.nn import core_of
from gpubatch.optim import StepResult, scalars_ahead
from gpubatch.train.callbacks import Callbacks
from gpubatch.train.checks import why_eager
from gpubatch.train.eager import EagerSteps
from gpubatch.train.graphs import GivenArrays, StepGraphs, agreed, arrays_like
from gpubatch.train.ledger import AHEAD, Report
from gpubatch.train.record import Between, Record


class CapturedSteps:
    """Makes the steps of an epoch by replaying graphs, and notes them some steps later.

    A step that halts is made again by ``eager``, which finds out what is wrong with it. Either all ranks capture, or
    none. They queue the same steps and read them at the same places; there they hear of a signal to one of them.
    """

    def __init__(self, record: Record, eager: EagerSteps, callbacks: Callbacks | None = None) -> None:
        self._record, self._eager, self._callbacks = record, eager, callbacks or Callbacks()
        self._graphs: StepGraphs | None = None
        self._disagreed = ""  # how a captured step differed from the eager one

    def why_not(self) -> str:
        """Why steps cannot be captured, on this rank or another, in words; empty where they can."""
        rank, why = self._record.together.words(self._why_not() or None) or (0, "")
        return f"on rank {rank}, {why}" if rank else why

    def _why_not(self) -> str:
        state, scale = self._record.state, self._record.scale
        others = [] if scale is None else [scale]
        if why := self._disagreed or why_eager(state.net, state.loader, state.opt, *others):
            return why
        return self._callbacks.why_not_captured()

    def release(self) -> None:
        """Let go of the graphs and of the memory that they work in."""
        self._graphs = None

    def run(self, between: Between) -> str:
        """Make the remaining steps of the epoch; empty when it is complete, else why eager steps must go on."""
        record = self._record
        if why := self.why_not() or self._capture():
            self.release()
            return why
        record.history.execution = "captured"
        with self._batches() as batches, self._queue() as queue:
            while record.remaining and not self._disagreed:
                batches.fill(queue, self._room(between))
                batches.used(self._note(queue))
                if queue.halted:
                    self._make_again(queue, *batches.halted(queue))
                    batches.used(1)
                if batches.all_noted(queue):
                    between()
        if not record.remaining:
            return ""
        record.rewind()
        return self._disagreed

    def _capture(self) -> str:
        """Capture the graphs of the loader's batches, as far as they are missing; in words, why CUDA refuses."""
        state = self._record.state
        epochs, together, ranks = epochs_of(state.loader), self._record.together, self._record.together.ranks
        try:
            if self._graphs is None or not self._graphs.fits(state.opt):
                self.release()
                feed: DeviceFeed | GivenArrays | None = agreed(ranks, epochs.device_feed)
                # Ranks that gather batches on the device are ahead of others by chunks; all queue at the same pace.
                if together.any(feed is None) or feed is None:
                    feed = agreed(ranks, lambda: GivenArrays(*arrays_like(epochs.peek())))
                self._graphs = agreed(ranks, functools.partial(self._graphs_on, feed))
            most = state.history.micro_batch_size
            steps = len(epochs) if isinstance(self._graphs.feed, DeviceFeed) else 1
            self._graphs.prepare(epochs.batch_size, most, steps)
            self._graphs.prepare(epochs.rows_of(len(epochs) - 1), most, 1)
        except RuntimeError as error:  # CuPy's errors, too
            return f"the capture failed: {error}"
        return ""

    def _graphs_on(self, feed: DeviceFeed | GivenArrays) -> StepGraphs:
        state, ranks = self._record.state, self._record.together.ranks
        deal_of = epochs_of(state.loader).order.deal
        max_norm, parts = self._eager.max_norm, self._callbacks.parts
        return StepGraphs(state.net, state.opt, feed, max_norm, parts=parts, deal_of=deal_of, ranks=ranks)

    def _room(self, between: Between) -> int:
        """Steps that may be queued, the same on all ranks: until something is due between two steps, as after a signal
        to one of them, or until the loss scale changes.
        """
        record, scale = self._record, self._record.scale
        if record.together.several:
            record.signalled = record.together.any(bool(record.signals))
        return between.room if scale is None else min(between.room, scale.room)

    @contextlib.contextmanager
    def _batches(self) -> Iterator[Batches]:
        """The remaining batches of the epoch. If it is complete, the loader is at its next epoch afterwards."""
        loader = self._record.state.loader
        assert self._graphs is not None
        if isinstance(self._graphs.feed, DeviceFeed):
            epochs = epochs_of(loader)
            with epochs.gathered_by(self._graphs.feed) as count:
                yield GatheredBatches(epochs, self._record, count)
        else:
            with contextlib.closing(rows_of(loader)) as batches:
                yield CopiedBatches(batches)
                if not self._record.remaining:
                    next(batches, None)

    @contextlib.contextmanager
    def _queue(self) -> Iterator[Queue]:
        """A queue of steps. However it is left, all applied steps are noted."""
        record = self._record
        assert self._graphs is not None
        rows_of = epochs_of(record.state.loader).rows_of
        queue = Queue(self._graphs, record.epoch.batches, rows_of, record.history.micro_batch_size)
        try:
            yield queue
        finally:
            while queue.in_flight:
                self._note(queue)

    def _note(self, queue: Queue) -> int:
        """Wait for the steps queued first and note them; how many were applied."""
        applied = queue.read()
        for loss, lr, rows in applied:
            self._record.note(loss, StepResult(True, self._record.state.step + 1, lr), rows)
        if applied:
            self._eager.count_applied(len(applied))
            self._record.warn_if_halved()
        return len(applied)

    def _make_again(self, queue: Queue, x: Array, y: Array, weight: Array | None = None) -> None:
        """Rerun the halted step eagerly to find out what went wrong."""
        record, epochs, number = self._record, epochs_of(self._record.state.loader), self._record.epoch.batches
        outcome = self._eager.step(x, y, weight, epochs.deal_of(number))
        record.note(outcome.loss, outcome.result, epochs.rows_of(number))
        record.warn_if_halved()
        if outcome.result is None or outcome.on_trial:
            queue.go_on(record.epoch.batches)
            return
        self.release()
        self._disagreed = "a captured step was not finite, and the same step made eagerly was"
        place = f"epoch {record.state.epoch + 1}, step {outcome.result.t}"
        record.warn(f"{self._disagreed} ({place}); the run goes on with eager steps", CaptureWarning)


# --- what is queued ------------------------------------------------------------------------------------------------


class AppliedStep(NamedTuple):
    """A step that was applied: its loss, its learning rate, and its samples."""

    loss: float
    lr: float | None
    rows: int


class Chunk(NamedTuple):
    """Steps that were queued together."""

    report: Report
    rates: list[float | None]
    rows: list[int]


class Queue:
    """The steps of an epoch from ``batch`` on, queued some chunks ahead of those that are read.

    ``rows_of`` is the size of a batch, over all ranks. Optimizer and network count the steps as they are read. After a
    step that ``halted``, nothing is in flight until :meth:`go_on`.
    """

    def __init__(
        self, graphs: StepGraphs, batch: int, rows_of: Callable[[int], int], micro_batch_size: int | None
    ) -> None:
        self._graphs, self._rows_of, self._most = graphs, rows_of, micro_batch_size
        self._chunks = deque[Chunk]()
        self.go_on(batch)

    @property
    def in_flight(self) -> int:
        """Steps that are queued and not yet read."""
        return sum(len(chunk.rows) for chunk in self._chunks)

    def go_on(self, batch: int) -> None:
        """Begin at a batch, with optimizer and network as they are."""
        self.halted, self._batch = False, batch
        self._graphs.ledger.restart(batch, core_of(self._graphs.net).dropout_step)

    def fill(self, room: int) -> None:
        """Queue the next steps, at most ``room`` beyond those that were read."""
        most = self._graphs.ledger.capacity
        while len(self._chunks) <= AHEAD and (count := min(room - self.in_flight, most)) > 0:
            if not self._add(count):
                return

    def queue_batch(self, *batch: Array) -> bool:
        """Queue the step on a batch, which is copied; False if those in flight must be read first."""
        for place, array in zip(self._graphs.feed.arrays(len(batch[0])), batch, strict=True):
            place[...] = array
        return self._add(1)

    def _add(self, count: int) -> bool:
        opt, ledger = self._graphs.opt, self._graphs.ledger
        first = self._batch + self.in_flight
        # A schedule that fails raises only when nothing is in flight: as late as it would in eager steps.
        scalars, rates = scalars_ahead(opt, opt.t + self.in_flight, count, 0 if self._chunks else 1)
        rows = [self._rows_of(first + i) for i in range(len(rates))]
        if rows:
            ledger.write(scalars, self._graphs.numbers(opt.t + self.in_flight, len(rows)))
            self._graphs.enqueue(rows, self._most)
            self._chunks.append(Chunk(ledger.report(), rates, rows))
        return bool(rows)

    def read(self) -> list[AppliedStep]:
        """Wait for the chunk that was queued first; return its steps that were applied."""
        if not self._chunks:
            return []
        report, rates, rows = self._chunks.popleft()
        losses, self.halted = report.read()
        if self.halted:
            self._chunks.clear()  # these steps change nothing
        self._batch += len(losses)
        self._graphs.opt.t += len(losses)
        core_of(self._graphs.net).count_steps(len(losses))
        return [AppliedStep(*step) for step in zip(losses, rates, rows, strict=False)]

    def halted_batch(self) -> list[Array]:
        """Make the batch of the step that halted once more."""
        return self._graphs.make_batch(self._rows_of(self._batch))


# --- where its batches come from -----------------------------------------------------------------------------------


class Batches(Protocol):
    """The batches of the queued steps; keeps the loader's place."""

    def fill(self, queue: Queue, room: int) -> None:
        """Queue the next steps, at most ``room`` beyond those that were noted."""

    def used(self, batches: int) -> None:
        """Count used batches, those queued first."""

    def halted(self, queue: Queue) -> list[Array]:
        """The batch of the step that halted."""

    def all_noted(self, queue: Queue) -> bool:
        """Whether the loader is at the batch after the last step that was noted."""


class GatheredBatches:
    """Batches that graphs gather from the data on the device; ``count`` tells the loader how many more were used."""

    def __init__(self, epochs: Epochs, record: Record, count: Callable[[int], None]) -> None:
        self._epochs, self._record, self._count = epochs, record, count

    def fill(self, queue: Queue, room: int) -> None:
        """Queue steps; during the last ones, make the order of the next epoch."""
        queue.fill(room)
        if queue.in_flight == self._record.remaining:
            self._epochs.prepare_next_order()

    def used(self, batches: int) -> None:
        """Move the loader on."""
        self._count(batches)

    def halted(self, queue: Queue) -> list[Array]:
        """Gather it again."""
        return queue.halted_batch()

    def all_noted(self, queue: Queue) -> bool:
        """Whether no step is in flight."""
        return not queue.in_flight


class CopiedBatches:
    """Batches of the loader, each copied to where graphs read it, and kept until its step was applied."""

    def __init__(self, batches: Generator[list[Array]]) -> None:
        self._batches, self._kept = batches, deque[list[Array]]()

    def fill(self, queue: Queue, room: int) -> None:
        """Queue steps on the next batches, as many as may be kept."""
        while len(self._kept) < min(AHEAD, room):
            self._kept.append(next(self._batches))
        while queue.in_flight < len(self._kept) and queue.queue_batch(*self._kept[queue.in_flight]):
            pass

    def used(self, batches: int) -> None:
        """Let go of them."""
        for _ in range(batches):
            self._kept.popleft()

    def halted(self, queue: Queue) -> list[Array]:
        """The oldest that is kept."""
        return self._kept[0]

    def all_noted(self, queue: Queue) -> bool:
        """Whether no batch is kept."""
        return not self._kept
