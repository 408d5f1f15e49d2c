"""Whole training steps as CUDA graphs: captured once for each shape of a batch, then replayed with one launch.

A graph is launched with the same arguments every time, so what differs from step to step lies on the device, in a
:class:`Ledger`: the scalars of the update for the steps to come, computed on the host in double precision, and how far
the steps have come. The steps leave their losses there, and the host reads them when it likes. A replayed step is the
eager one bit for bit: the same kernels on the same arrays.

A step that finds a loss or a gradient that is not finite halts: it and all that are queued behind it change nothing. So
the host, which looks later, can deal with it as if it had looked at once.
"""

from __future__ import annotations

import functools
import itertools
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from gpubatch.backend import Array, CudaBackend, compute_dtype
from gpubatch.errors import ArgumentError, check_int
from gpubatch.loader import needed
from gpubatch.nn import Network, layers, losses
from gpubatch.ops import MOST_THREADS, SQUARE_SUM_SIZE, cuda_kernel, source_of, square_grid
from gpubatch.optim import Optimizer
from gpubatch.own import changed
from gpubatch.staging import Stage, Stages, wait_at_the_end

__all__ = ["AHEAD", "CapturedStep", "CapturedSteps", "GivenArrays", "Made", "Queue", "check_bound", "like", "why_eager"]

CHUNK = 64  # steps whose scalars go to the device, and whose losses come back, in one copy
AHEAD = 2  # chunks that are queued beyond the one that the host waits for, or batches that are kept
UNROLLED = 8  # steps in a graph, where there are so many: a launch costs the host as much as a few kernels the device
STAGES = 2 * (AHEAD + 2)  # copies between host and device that may be under way

WORDS = 5  # of kernels/step.cuh, in this order
SLOT, HALTED, BATCH, STEP, TICKET = range(WORDS)


# Captured steps stand for all that the classes of network, optimizer, loader, loss and layers define, but for what no
# step calls. What else of it a user has written is to be run as often as on a CPU, so the steps are eager then.
APART = frozenset(
    "__deepcopy__ __init__ __init_subclass__ __reduce__ __repr__ accuracy evaluate hyper load_state_dict memory "
    "memory_parts predict release replan scores state_dict to_batch _choose _common_dtype _evaluate _given _inputs "
    "_lay_out_evaluation _loaded _loaded_state _make_parameters _take _takes_both _window".split()
)


def why_eager(net: Network, *others: Any) -> str:
    """Why the steps of ``net`` cannot be captured, in words; empty where they can.

    ``others`` are what else takes part in the steps, such as optimizer and loader.
    """
    if not isinstance(net.backend, CudaBackend):
        return f"graphs are for a GPU, the network is on {net.backend.spec!r}"
    if not net.products.capturable:
        return net.products.reason
    for i, layer in enumerate(net.layers):
        if type(layer).__module__ != layers.__name__:
            return f"layer {i + 1} ({type(layer).__name__}) is not one of gpubatch's, so it may do what a graph cannot"
    if type(net.loss_function).__module__ != losses.__name__:
        return (
            f"the loss ({type(net.loss_function).__name__}) is not one of gpubatch's, so it may do what a graph cannot"
        )
    found = (changed(x, APART) for x in (net, *net.layers, net.loss_function, *others))
    return next((f"{name} is not gpubatch's own" for name in found if name), "")


def check_bound(net: Network, opt: Optimizer) -> None:
    """Raise unless ``opt`` changes the parameters of ``net``."""
    if any(opt.params.get(name) is not p for name, p in net.parameters.items()):
        raise ArgumentError("opt must be bound to net.parameters, this one is bound to other arrays")


# --- what lies on the device ---------------------------------------------------------------------------------------


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

    First the scalars of CHUNK steps, in ``rows``; then the words of kernels/step.cuh, ``progress``; then the ``losses``
    of as many steps. So what the host writes is in one piece, and what it reads in another; the slot is in both.
    """

    def __init__(self, backend: CudaBackend, scalars: int, dtype: np.dtype[Any]) -> None:
        self._backend = backend
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


# --- the steps ----------------------------------------------------------------------------------------------------


class Feed(Protocol):
    """Where the batches of captured steps come from."""

    def arrays(self, rows: int) -> list[Array]:
        """The arrays x and y of a batch of ``rows`` samples: always the same."""

    def enqueue(self, rows: int, batch: Array) -> None:
        """Start what makes the batch whose number ``batch``, an int64 on the device, holds when it comes to that."""


class GivenArrays:
    """Batches that somebody writes to arrays which stay where they are."""

    def __init__(self, *arrays: Array) -> None:
        self._arrays = arrays

    def arrays(self, rows: int) -> list[Array]:
        """Their first rows."""
        return [array[:rows] for array in self._arrays]

    def enqueue(self, rows: int, batch: Array) -> None:
        """The batch is there already."""


def like(batch: Sequence[Array]) -> list[Array]:
    """New arrays for such batches; labels become int64, as which losses need them."""
    return [array.astype(needed(array.dtype, array.ndim), copy=False) for array in batch]


class Form(NamedTuple):
    """What a graph is for: batches of ``rows`` samples, of which so many at a time, and ``steps`` of them."""

    rows: int
    micro_batch_size: int
    steps: int


def launches(rows: Sequence[int], unrolled: int) -> list[tuple[int, int]]:
    """The graphs for batches of so many ``rows`` each, in their order: (rows, steps), steps 1 or ``unrolled``."""
    found = list[tuple[int, int]]()
    for size, alike in itertools.groupby(rows):
        several, rest = divmod(len(list(alike)), unrolled)
        found += [(size, unrolled)] * several + [(size, 1)] * rest
    return found


class CapturedSteps:
    """The steps of ``net`` and ``opt`` on the batches of ``feed``, queued on the current stream and not waited for.

    With ``guarded``, steps whose loss or gradient is not finite halt, ``max_norm`` bounds the gradient's norm, and
    gradients are divided by the network's loss scale. All memory is taken when a form of batch is prepared.
    """

    def __init__(
        self, net: Network, opt: Optimizer, feed: Feed, max_norm: float | None = None, guarded: bool = True
    ) -> None:
        assert isinstance(net.backend, CudaBackend)
        self.net, self.opt, self.feed, self._backend = net, opt, feed, net.backend
        self._guarded, self._max_norm = guarded, max_norm or 0.0
        self._update = opt.plan[0]  # what the graphs launch, kept with its tables
        rows, _ = opt.ahead(opt.t, 1)
        self.ledger = Ledger(net.backend, rows.shape[1], rows.dtype)
        with net.backend.scope():
            self._squares = net.backend.zeros(SQUARE_SUM_SIZE, np.float64)
            self._total = net.backend.zeros(1, np.float64)
            self._before = net.backend.empty(net.buffers.size, net.buffers.dtype)  # of the step, running statistics
        self._graphs = dict[Form, Any]()
        self._kept = list[Any]()  # what has the memory that graphs work in
        self.loss: Array = None  # of the step that was made last
        self._over = net.backend.event()  # of the last graph
        wait_at_the_end(self, [self._over])

    def fits(self, opt: Optimizer) -> bool:
        """Whether the graphs are still those of the optimizer, whose formula may have become another one."""
        return self._update is opt.plan[0]

    def prepare(self, rows: int, micro_batch_size: int | None, steps: int) -> None:
        """Capture what :meth:`enqueue` may need for ``steps`` batches of ``rows`` samples."""
        for size in (UNROLLED, 1) if steps >= UNROLLED else (1,):
            self._graph(Form(rows, micro_batch_size or rows, size))

    def enqueue(self, rows: Sequence[int], micro_batch_size: int | None) -> None:
        """The steps on the next batches, of so many ``rows`` each; the ledger must have their scalars."""
        for size, steps in launches(rows, UNROLLED):
            self.launch(Form(size, micro_batch_size or size, steps))

    def launch(self, form: Form) -> None:
        """The graph of a form, captured if it has not been."""
        with self._backend.scope():
            self._graph(form).launch()
            self._backend.current_stream().record(self._over)

    def _graph(self, form: Form) -> Any:
        if form not in self._graphs:
            step = functools.partial(self._step, form.rows, form.micro_batch_size)

            def steps() -> None:
                for _ in range(form.steps):
                    step()

            with self._backend.scope():
                self._rehearse(step)
                self._graphs[form] = self._backend.capture(steps)
        return self._graphs[form]

    def _rehearse(self, step: Callable[[], None]) -> None:
        """A step that halts before it begins: memory is taken and kernels are loaded, which a capture forbids."""
        now = self.ledger.progress.copy()
        self.ledger.word(HALTED).fill(1)
        try:
            step()
        finally:
            self.ledger.progress[...] = now

    def _step(self, rows: int, micro_batch_size: int) -> None:
        """What is captured."""
        net, ledger = self.net, self.ledger
        x, y = self.feed.arrays(rows)
        grads = net.parameters.grads.flat
        losses: list[Array] = []

        def add(loss: Array, share: float) -> None:
            if rows > micro_batch_size:
                self._launch("add_loss", (1,), 1, loss, self._total, np.float64(share))
            losses.append(loss)

        if self._before.size:
            self._before[...] = net.buffers.flat
        self.feed.enqueue(rows, ledger.word(BATCH))
        kept = net.enqueue(x, y, ledger.word(STEP), micro_batch_size, add)
        loss = self.loss = losses[0] if rows <= micro_batch_size else None
        control = ledger.control if self._guarded else None
        if self._guarded:
            numbers = np.float64(self._max_norm), np.float64(np.finfo(compute_dtype(net.dtype)).max)
            of_gradient = grads, np.int64(grads.size), self._squares
            state = ledger.progress, ledger.losses, control
            arguments = (*of_gradient, loss, self._total, net.loss_scale, *state, *numbers)
            self._launch("judge", square_grid(grads), MOST_THREADS, *arguments)
        running = (net.buffers.flat, self._before) if self._before.size else None
        table = self.opt.enqueue(ledger.rows, control, ledger.progress, running)
        self._kept.append((kept, table))

    def _launch(self, name: str, grid: tuple[int], threads: int, *arguments: Any) -> None:
        kernel = cuda_kernel(self._backend, step_source(self.net.dtype.name), name)
        kernel(grid, (threads,), tuple(np.uint64(0) if x is None else x for x in arguments))


def step_source(dtype: str) -> str:
    """The CUDA source of what looks at the steps of a network that stores ``dtype``."""
    return source_of(dtype, "square_sum.cuh", "step.cuh", "step.cu")


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
        self._steps.ledger.restart(batch, self._steps.net.dropout_step)

    def fill(self, room: int) -> None:
        """Queue what comes next, at most ``room`` steps beyond what was read."""
        while len(self._chunks) <= AHEAD and (count := min(room - self.in_flight, CHUNK)) > 0:
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
        scalars, rates = opt.ahead(opt.t + self.in_flight, count, 0 if self._chunks else 1)
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
        self._steps.net.passed(len(losses))
        return [Made(*made) for made in zip(losses, rates, rows, strict=False)]

    def batch(self) -> list[Array]:
        """The batch of the step that halted."""
        steps, rows = self._steps, self._rows_of(self._batch)
        steps.feed.enqueue(rows, steps.ledger.word(BATCH))
        return steps.feed.arrays(rows)


# --- one by one ----------------------------------------------------------------------------------------------------


class CapturedStep:
    """``net.step_loss(X, Y)`` and ``opt.step()`` as one launch, for loops of your own.

    X and Y are arrays on the device, as for :meth:`Network.step_loss`. The first call captures, which takes memory and
    time. A call queues ``steps`` steps, from 1 to 64, all on what X and Y hold when it comes to that, and waits for
    nothing; the next batch is written into them afterwards: ``X[...] = batch``. It returns the loss of the last step,
    an array of one element on the device, which the next call overwrites. Whether loss and gradients are finite is not
    looked at. A new learning rate, ``opt.lr = ...``, takes effect at the next call. All of it happens on the stream
    that is current.

    Raises ArgumentError where the steps cannot be captured, and says why.
    """

    def __init__(self, net: Network, opt: Optimizer, X: Array, Y: Array, steps: int = 1) -> None:
        for name, reason in {"net": why_eager(net), "opt": why_eager(net, opt)}.items():
            if reason:
                raise ArgumentError(f"{name} cannot be captured: {reason}")
        self.net, self.opt, self.steps = net, opt, check_int("steps", steps, 1, CHUNK)
        check_bound(net, opt)
        net.check_batch(X, Y)
        self._feed = GivenArrays(X, Y)
        self._form = Form(len(X), len(X), self.steps)
        self._captured: CapturedSteps | None = None
        self._left = 0  # steps whose scalars are on the device
        self._expected: tuple[Any, ...] = ()  # the state of optimizer and network that they are for

    def __call__(self) -> Array:
        """Queue the steps; the loss of the last one."""
        if self._captured is None or not self._captured.fits(self.opt):
            self._captured, self._expected = CapturedSteps(self.net, self.opt, self._feed, guarded=False), ()
        captured = self._captured
        if self._left < self.steps or self._expected != (*self.opt.plan, self.net.dropout_step):
            scalars, _ = self.opt.ahead(self.opt.t, CHUNK, self.steps)
            captured.ledger.write(scalars)
            captured.ledger.restart(0, self.net.dropout_step)
            self._left = len(scalars)
        captured.launch(self._form)
        self.opt.t += self.steps
        self.net.passed(self.steps)
        self._left -= self.steps
        self._expected = (*self.opt.plan, self.net.dropout_step)
        return captured.loss
