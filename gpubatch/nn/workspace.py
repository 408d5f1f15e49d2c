"""The workspace of a network: one block of memory, and the arrays in it with which a batch is run.

How large the block must be is known before it is allocated: the function that takes the arrays from a :class:`Layout`
is run once without memory, to count the bytes. A smaller batch runs in views of the same block.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from threading import get_ident
from typing import Any, Generic, TypeAlias, TypeVar

import numpy as np

from gpubatch.backend import Array, Backend
from gpubatch.errors import InUseError
from gpubatch.nn.layers import Layer
from gpubatch.nn.needs import Context, Shape
from gpubatch.nn.stack import Stacked, describe_layer, told
from gpubatch.ops import Ops, Space, workspace_dtype

ALIGNMENT = 256  # bytes; what GPU memory accesses like, and a multiple of every CPU's cache line
SIZES_KEPT = 8  # batch sizes to keep views for; a run has two or three

Bound = TypeVar("Bound")
Arrange: TypeAlias = "Callable[[Layout, Mapping[str, Array]], Bound]"


class Layout:
    """Takes the arrays of a batch of ``rows`` from a ``block`` of bytes, one after another.

    Without a block every array is None, and ``end`` counts the bytes they would take.
    """

    def __init__(self, rows: int, dtype: np.dtype[Any], block: Array = None) -> None:
        self.rows, self.dtype, self.block, self.end = rows, dtype, block, 0

    def array(self, shape: Shape, dtype: Any = None) -> Array:
        """The next array; -1 in ``shape`` is the batch size."""
        shape, start = tuple(self.rows if n == -1 else n for n in shape), self.end
        of = workspace_dtype(dtype, self.dtype)
        self.end += -(-math.prod(shape) * of.itemsize // ALIGNMENT) * ALIGNMENT
        return self._view(start, shape, of)

    def arrays(self, spaces: Mapping[str, Space]) -> dict[str, Array]:
        """Arrays by name."""
        return {name: self.array(shape, dtype) for name, (shape, dtype) in spaces.items()}

    def overlaid(self, calls: Sequence[Mapping[str, Space]]) -> list[dict[str, Array]]:
        """Arrays for successive calls, which share their memory: those of each call begin at the same place."""
        start, ends, found = self.end, [self.end], []
        for spaces in calls:
            self.end = start
            found.append(self.arrays(spaces))
            ends.append(self.end)
        self.end = max(ends)
        return found

    def in_turns(self, widths: Sequence[int]) -> list[Array]:
        """Arrays of rows of these widths in two ping-pong buffers: only neighbours are needed at the same time."""
        starts = []
        for turn in range(min(2, len(widths))):
            starts.append(self.end)
            self.array((-1, max(widths[turn::2])))
        return [self._view(starts[i % 2], (self.rows, width), self.dtype) for i, width in enumerate(widths)]

    def _view(self, start: int, shape: Shape, dtype: np.dtype[Any]) -> Array:
        if self.block is None:
            return None
        return self.block[start : start + math.prod(shape) * dtype.itemsize].view(dtype).reshape(shape)


class Workspace(Generic[Bound]):
    """A block of memory for batches of up to ``rows`` rows.

    ``arrange(layout, constants)`` takes the arrays of a batch from the layout; the workspace keeps what it returns for
    the batch sizes used last. ``constants`` are what a loss reads: ``offsets``, where each row of ``outputs`` scores
    starts, and ``ticket``, the counter of kernels/last_block.cuh. Two workspaces share neither block nor ticket.
    """

    def __init__(
        self, backend: Backend, dtype: np.dtype[Any], rows: int, outputs: int, arrange: Arrange[Bound]
    ) -> None:
        self.rows, self._dtype, self._arrange = rows, dtype, arrange
        self._block = backend.empty(counted(dtype, rows, arrange), np.uint8)
        self._offsets = backend.asarray(np.arange(rows) * outputs)
        self._ticket = backend.zeros(1, np.uint32)
        self._bound: dict[int, Bound] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of all its arrays."""
        return int(self._block.nbytes + self._offsets.nbytes + self._ticket.nbytes)

    def bind(self, rows: int) -> Bound:
        """The arrays for a batch of ``rows``, made when the size is first seen."""
        if (found := self._bound.get(rows)) is None:
            if len(self._bound) == SIZES_KEPT:
                del self._bound[next(iter(self._bound))]
            layout = Layout(rows, self._dtype, self._block)
            found = self._arrange(layout, {"offsets": self._offsets[:rows], "ticket": self._ticket})
            self._bound[rows] = found
        return found


def counted(dtype: np.dtype[Any], rows: int, arrange: Arrange[Any]) -> int:
    """The bytes of the block that a workspace needs."""
    layout = Layout(rows, dtype)
    arrange(layout, {"offsets": None, "ticket": None})
    return layout.end


def workspace_bytes(dtype: np.dtype[Any], rows: int, arrange: Arrange[Any]) -> int:
    """The bytes that a :class:`Workspace` takes; nothing is allocated."""
    return counted(dtype, rows, arrange) + 8 * rows + 4  # and the offsets, and the ticket


class Pass:
    """All calls for a batch of one size, with their arrays: those of the layers, and that of the ``loss``."""

    def __init__(self, calls: list[tuple[Layer, Array, Array, Context]], loss: Context) -> None:
        self.calls, self.loss = calls, loss  # a call: layer, y, dx, context
        self.scores = calls[-1][1]

    def weighing(self, weights: Array | None) -> Context:
        """What the loss is given where its samples have ``weights``."""
        return self.loss if weights is None else replace(self.loss, weights=weights)

    def forward(self, x: Array) -> None:
        """All layers forward."""
        for layer, y, _, context in self.calls:
            layer.forward(x, y, context)
            x = y

    def backward(self, x: Array, first: int, statistics: Sequence[int]) -> None:
        """All layers from the last to the ``first``, backward from the gradient that the loss left.

        Layers in ``statistics``, below it, only update their running statistics.
        """
        dy = self.loss.work["dz"]
        for i in (*range(len(self.calls) - 1, first - 1, -1), *statistics):
            layer, y, dx, context = self.calls[i]
            dx = dx if i > first else None
            layer.backward(self.calls[i - 1][1] if i else x, y, dy, dx, context)
            dy = dx


# --- threads ----------------------------------------------------------------------------------------------------------


class OwnedByThread:
    """Code that one thread at a time may be in, as often as it likes; another is told so and does not wait."""

    def __init__(self) -> None:
        lock = threading.RLock()
        self._acquire, self._release, self._owner, self._depth = lock.acquire, lock.release, 0, 0

    def __enter__(self) -> None:
        if not self._acquire(False):
            raise InUseError(
                "another thread trains this network: train in one thread, or give each a network of its own, "
                "copy.deepcopy(net)"
            )
        self._depth += 1
        self._owner = get_ident()

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        self._release()

    def check(self) -> None:
        """Raise if another thread is in the block."""
        if self._depth and self._owner != get_ident():
            raise InUseError(
                "another thread trains this network, whose parameters change meanwhile: predict with a copy made "
                "between two steps, copy.deepcopy(net) in a callback, say"
            )


class OfThread(threading.local):
    """The evaluation workspace of each thread, which ends with the thread."""

    workspace: Workspace[Pass] | None = None


# --- where the arrays of a pass lie -----------------------------------------------------------------------------------


def training_arrays(
    layout: Layout,
    stack: Sequence[Stacked],
    scratch: Sequence[Mapping[str, Space]],
    first: int,
    dscores: Array,
    afterwards: Mapping[str, Space],
) -> tuple[list[tuple[Array, Array, dict[str, Array]]], dict[str, Array]]:
    """y, dx and work of each layer, and the arrays for what comes ``afterwards``.

    Outputs and what a layer keeps last until backward, which ends with the ``first`` layer. Gradients alternate between
    two buffers; scratch lasts for one call.
    """
    ys: list[Array] = []
    kept = []
    for i, (_, _, _, needs) in enumerate(stack):
        read = "x" in needs.reads or i == 0 or "y" in stack[i - 1].needs.reads
        ys.append(ys[-1] if needs.in_place and not read else layout.array((-1, needs.outputs)))
        kept.append(layout.arrays(needs.kept))

    dxs: list[Array] = [None] * len(stack)
    wanted = range(len(stack) - 1, first, -1)  # the layers that must write dx
    apart = [i for i in wanted if not stack[i].needs.in_place]
    turns = dict(zip(apart, layout.in_turns([stack[i].inputs for i in apart]), strict=True))
    dx = dscores
    for i in wanted:
        dxs[i] = dx = turns.get(i, dx)

    *calls, last = layout.overlaid([*scratch, afterwards])
    works = [{**own, **call} for own, call in zip(kept, calls, strict=True)]
    return list(zip(ys, dxs, works, strict=True)), last


def evaluation_arrays(
    layout: Layout, stack: Sequence[Stacked], scratch: Sequence[Mapping[str, Space]]
) -> list[tuple[Array, Array, dict[str, Array]]]:
    """y, no dx, and work of each layer: nothing outlasts the next layer, so outputs alternate between two buffers."""
    apart = [i for i, run in enumerate(stack) if not run.needs.in_place or i == 0]
    turns = dict(zip(apart, layout.in_turns([stack[i].needs.outputs for i in apart]), strict=True))
    works = layout.overlaid([{**run.needs.kept, **own} for run, own in zip(stack, scratch, strict=True)])
    y, found = turns[0], []
    for i, work in enumerate(works):
        y = turns.get(i, y)
        found.append((y, None, work))
    return found


def scratch_of(stack: Sequence[Stacked], ops: Ops, training: bool) -> list[Mapping[str, Space]]:
    """The scratch of each layer; the first one is given X, which may be strided."""
    found: list[Mapping[str, Space]] = []
    for i, run in enumerate(stack):
        with told(f"{describe_layer(run.layer, run.place)}.needs({run.inputs})"):
            found.append(run.needs.scratch_in(ops, training, strided=i == 0))
    return found


def evenly(n: int, most: int, least: int = 1) -> Iterator[slice]:
    """``n`` rows in as few parts of at most ``most`` as there can be, as equal as can be.

    Where that would leave one below ``least``, parts are larger instead.
    """
    count = max(1, min(-(-n // most), n // least))
    for i in range(count):
        yield slice(n * i // count, n * (i + 1) // count)
