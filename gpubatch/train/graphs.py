"""Whole training steps as CUDA graphs: captured once for each shape of a batch, then replayed with one launch.

A graph is launched with the same arguments every time, so what differs from step to step lies on the device, in a
:class:`Ledger`: the scalars of the update for the steps to come, computed on the host in double precision, and how far
the steps have come. The steps leave their losses there for the host to read later. A replayed step is the eager one bit
for bit: the same kernels on the same arrays.

A step whose loss or gradient is not finite halts: it and all steps queued behind it change nothing. So the host, which
looks later, can deal with it as if it had looked at once.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar, cast

import numpy as np

from gpubatch.backend import Array, CudaBackend, compute_dtype
from gpubatch.errors import CaptureError
from gpubatch.loader import captured_dtype
from gpubatch.nn import Network, core_of, dealt_of
from gpubatch.ops import MOST_THREADS, SQUARE_SUM_SIZE, cuda_kernel, source_of, square_grid
from gpubatch.optim import Optimizer, captured_key, enqueue_update, scalars_ahead
from gpubatch.parallel import Ranks, first_of
from gpubatch.passes import Deal
from gpubatch.staging import wait_at_the_end
from gpubatch.train.ledger import BATCH, HALTED, STEP, Ledger
from gpubatch.train.parts import StepPart
from gpubatch.train.together import RanksMemoryError

T = TypeVar("T")
UNROLLED = 8  # steps in a graph, if at least eight remain: a launch costs the host as much as a few kernels the device


class Feed(Protocol):
    """Makes the batches of captured steps, in arrays that stay where they are."""

    def arrays(self, rows: int) -> list[Array]:
        """The arrays x and y, and perhaps weights, of a batch of ``rows`` samples."""

    def enqueue(self, rows: int, batch: Array, deal: Deal | None = None) -> None:
        """Enqueue the making of batch number ``*batch``; the number is read on the device when the kernel runs.

        ``deal`` says which rows of the batch these are, where batches are dealt.
        """


class GivenArrays:
    """Batches that the caller writes to these arrays."""

    def __init__(self, *arrays: Array) -> None:
        self._arrays = arrays

    def arrays(self, rows: int) -> list[Array]:
        """Their first rows."""
        return [array[:rows] for array in self._arrays]

    def enqueue(self, rows: int, batch: Array, deal: Deal | None = None) -> None:
        """Nothing: the batch is there already."""


def arrays_like(batch: Sequence[Array]) -> list[Array]:
    """New arrays for batches like this one. Labels become int64, the type that losses expect."""
    return [array.astype(captured_dtype(array.dtype, array.ndim), copy=False) for array in batch]


class Form(NamedTuple):
    """Key of a graph: batch size, over all ranks, micro-batch size, and how many steps it unrolls."""

    rows: int
    micro_batch_size: int
    steps: int


def launches(rows: Sequence[int], unrolled: int) -> list[tuple[int, int]]:
    """The graphs to launch for batches of these ``rows``, in their order: (rows, steps), steps 1 or ``unrolled``."""
    found = list[tuple[int, int]]()
    for size, alike in itertools.groupby(rows):
        several, rest = divmod(len(list(alike)), unrolled)
        found += [(size, unrolled)] * several + [(size, 1)] * rest
    return found


class StepGraphs:
    """The graphs of the steps of ``net`` and ``opt`` on the batches of ``feed``, launched on the current stream.

    With ``guarded``, steps whose loss or gradient is not finite halt, ``max_norm`` bounds the gradient's norm, and
    gradients are divided by the network's loss scale. All memory is taken when a form of batch is prepared. ``parts``
    are what callbacks do in a step.

    Where batches are dealt, ``deal_of`` says how one of so many rows is, and ``ranks`` sum in each step. They all
    prepare the same forms in the same order; where that fails on one of them it fails on all.
    """

    def __init__(
        self,
        net: Network,
        opt: Optimizer,
        feed: Feed,
        max_norm: float | None = None,
        guarded: bool = True,
        parts: Sequence[StepPart] = (),
        deal_of: Callable[[int], Deal | None] = lambda rows: None,
        ranks: Ranks | None = None,
    ) -> None:
        assert isinstance(net.backend, CudaBackend)
        self.net, self.opt, self.feed, self._backend = net, opt, feed, net.backend
        self._guarded, self._max_norm = guarded, max_norm or 0.0
        self._deal_of, self._ranks = deal_of, ranks
        self._launched = captured_key(opt)[0]  # kept with its tables
        rows, _ = scalars_ahead(opt, opt.t, 1)
        self._parts, self._count = parts, sum(part.count for part in parts)
        self.ledger = Ledger(net.backend, rows.shape[1:], rows.dtype, self._count)
        with net.backend.scope():
            self._squares = net.backend.zeros(SQUARE_SUM_SIZE, np.float64)
            self._total = net.backend.zeros(1, np.float64)
            self._before = net.backend.empty(net.buffers.size, net.buffers.dtype)  # of the step, running statistics
        self._graphs = dict[Form, Any]()
        self._kept = list[Any]()  # objects whose memory the graphs use
        self.loss: Array = None  # of the last step
        self._over = net.backend.event()  # of the last graph
        wait_at_the_end(self, [self._over])

    def fits(self, opt: Optimizer) -> bool:
        """Whether the graphs still launch the optimizer's update; a new formula, or other groups, make another one."""
        return self._launched is captured_key(opt)[0]

    def numbers(self, start: int, steps: int) -> np.ndarray | None:
        """The numbers of callbacks for ``steps`` steps from ``start`` on; None if there are none."""
        if not self._parts:
            return None
        return np.array([[x for part in self._parts for x in part.numbers(start + i)] for i in range(steps)])

    def prepare(self, rows: int, micro_batch_size: int | None, steps: int) -> None:
        """Capture the graphs that :meth:`enqueue` may need for ``steps`` batches of ``rows`` samples."""
        for size in (UNROLLED, 1) if steps >= UNROLLED else (1,):
            self._graph(Form(rows, micro_batch_size or rows, size))

    def enqueue(self, rows: Sequence[int], micro_batch_size: int | None) -> None:
        """Queue the steps on the next batches, of these ``rows``; the ledger must have their scalars."""
        for size, steps in launches(rows, UNROLLED):
            self.launch(Form(size, micro_batch_size or size, steps))

    def launch(self, form: Form) -> None:
        """Launch the graph of a form, captured on first use."""
        with self._backend.scope():
            self._graph(form).launch()
            self._backend.current_stream().record(self._over)

    def _graph(self, form: Form) -> Any:
        if form not in self._graphs:
            step = functools.partial(self._step, form.rows, form.micro_batch_size)

            def steps() -> None:
                for _ in range(form.steps):
                    step(self._ranks)

            with self._backend.scope():
                if self._ranks is not None and self._ranks.size > 1:
                    agreed(self._ranks, lambda: self._rehearse_alone(lambda: step(None)))
                self._rehearse(lambda: step(self._ranks))
                if self._ranks is not None:  # no sum is under way while ranks agree
                    self._backend.current_stream().synchronize()
                self._graphs[form] = agreed(self._ranks, lambda: self._backend.capture(steps))
        return self._graphs[form]

    def _rehearse_alone(self, step: Callable[[], None]) -> None:
        """Allocate all memory of a step with ranks: if it ran out before a sum, the other ranks would wait in vain."""
        self._rehearse(step)
        assert self._ranks is not None
        dealt_of(self.net).reserve_sums(self._ranks)

    def _rehearse(self, step: Callable[[], None]) -> None:
        """Make a step that halts before it begins: it allocates and loads kernels, which a capture forbids."""
        now = self.ledger.progress.copy()
        self.ledger.word(HALTED).fill(1)
        try:
            step()
        finally:
            self.ledger.progress[...] = now

    def make_batch(self, rows: int) -> list[Array]:
        """Enqueue the making of the next batch, of ``rows`` samples over all ranks; return what this rank has of it."""
        deal = self._deal_of(rows)
        own = rows if deal is None else sum(deal.parts)
        self.feed.enqueue(own, self.ledger.word(BATCH), deal)
        return self.feed.arrays(own)

    def _step(self, rows: int, micro_batch_size: int, ranks: Ranks | None) -> None:
        """Enqueue a step, which sums over ``ranks``; this is captured."""
        net, ledger, deal = self.net, self.ledger, self._deal_of(rows)
        grads = net.parameters.grads.flat
        losses: list[Array] = []

        def add(loss: Array, share: float) -> None:
            if rows > micro_batch_size:
                self._launch("add_loss", (1,), 1, loss, self._total, np.float64(share))
            losses.append(loss)

        if self._before.size:
            self._before[...] = net.buffers.flat
        x, y, *weights = self.make_batch(rows)
        weight = next(iter(weights), None)
        if deal is None:
            kept = core_of(net).enqueue(x, y, weight, ledger.word(STEP), micro_batch_size, add)
            loss = self.loss = losses[0] if rows <= micro_batch_size else None
        else:
            loss, kept = dealt_of(net).enqueue(x, y, weight, ledger.word(STEP), deal, ranks, micro_batch_size)
            self.loss = loss
        control = ledger.control if self._guarded else None
        self._make_parts(late=False)
        if self._guarded:
            numbers = np.float64(self._max_norm), np.float64(np.finfo(compute_dtype(net.dtype)).max)
            of_gradient = grads, np.int64(grads.size), self._squares
            state = ledger.progress, ledger.losses, control
            arguments = (*of_gradient, loss, self._total, net.loss_scale, *state, *numbers)
            self._launch("judge", square_grid(grads), MOST_THREADS, *arguments)
        running = (net.buffers.flat, self._before) if self._before.size else None
        table = enqueue_update(self.opt, ledger.rows, control, ledger.progress, running)
        self._make_parts(late=True)
        self._kept.append((kept, table))

    def _make_parts(self, late: bool) -> None:
        first = 0
        for part in self._parts:
            if part.late == late:
                part.by_kernels(self.net, self.ledger.numbers[0, first:], self._count, self.ledger.progress)
            first += part.count

    def _launch(self, name: str, grid: tuple[int], threads: int, *arguments: Any) -> None:
        kernel = cuda_kernel(self._backend, step_source(self.net.dtype.name), name)
        kernel(grid, (threads,), tuple(np.uint64(0) if x is None else x for x in arguments))


def agreed(ranks: Ranks | None, work: Callable[[], T]) -> T:
    """Call ``work`` on each rank and return its result; if it fails on one rank, all raise errors of the same kind."""
    if ranks is None or ranks.size == 1:
        return work()
    result, error = None, None
    try:
        result = work()
    except Exception as found:
        error = found
    kind = MemoryError if isinstance(error, MemoryError) else type(error)
    first = first_of(ranks, None if error is None else [kind.__name__, str(error)])
    if first is None:
        return cast(T, result)
    rank, (name, words) = first
    if name == MemoryError.__name__:
        raise RanksMemoryError(words or "out of memory") from None
    if error is not None and kind.__name__ == name:
        raise error
    raise CaptureError(f"{words} (on rank {rank})")


def step_source(dtype: str) -> str:
    """The CUDA source of the kernels that judge the steps of a network that stores ``dtype``."""
    return source_of(dtype, "square_sum.cuh", "step.cuh", "step.cu")
