"""The workspace of a network: where every array of a pass over a batch lies in one block of memory."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from gpubatch.backend import Array
from gpubatch.nn.layers import ACTIVATIONS, ActivationLayer, Dense, DenseActivation, Elementwise, Layer
from gpubatch.nn.losses import LossContext
from gpubatch.nn.needs import Context, Needs, Shape
from gpubatch.ops import workspace_dtype
from gpubatch.own import changed

__all__ = [
    "Layout",
    "Pass",
    "Place",
    "Plan",
    "Stacked",
    "Stage",
    "Workspace",
    "evenly",
    "in_turns",
    "run_layers",
    "stacked",
]

ALIGNMENT = 256  # bytes; what GPU memory accesses like, and a multiple of every CPU's cache line
SIZES_KEPT = 8  # batch sizes whose views are kept; a run has two or three


class Place(NamedTuple):
    """Where an array lies: bytes from the start of the block, shape, dtype."""

    start: int
    shape: Shape
    dtype: np.dtype[Any]


class Layout:
    """Gives out places one after another, from ``start`` on, for a batch of ``rows``."""

    def __init__(self, rows: int, dtype: np.dtype[Any], start: int = 0) -> None:
        self.rows, self.dtype, self.end = rows, dtype, start

    def place(self, shape: Shape, dtype: Any = None) -> Place:
        """A place for an array; -1 in ``shape`` is the batch size."""
        shape = tuple(self.rows if n == -1 else n for n in shape)
        place = Place(self.end, shape, workspace_dtype(dtype, self.dtype))
        size = math.prod(shape) * place.dtype.itemsize
        self.end += -(-size // ALIGNMENT) * ALIGNMENT
        return place

    def places(self, spaces: Mapping[str, tuple[Shape, Any]]) -> dict[str, Place]:
        """Places by name."""
        return {name: self.place(shape, dtype) for name, (shape, dtype) in spaces.items()}

    def branch(self) -> Layout:
        """A layout that goes on from here by itself."""
        return Layout(self.rows, self.dtype, self.end)


def in_turns(layout: Layout, widths: Sequence[int]) -> list[Place]:
    """Places for arrays of rows of these widths, of which only neighbours are needed at a time: two, taken in turns."""
    both = [layout.place((-1, max(widths[turn::2]))) for turn in range(min(2, len(widths)))]
    return [both[i % 2]._replace(shape=(layout.rows, width)) for i, width in enumerate(widths)]


class Stacked(NamedTuple):
    """A layer as it is run: itself, or with the activation after it as one.

    ``place`` is where the layer, the first of two, stands in what the user gave.
    """

    layer: Layer
    place: int
    inputs: int
    needs: Needs


class Stage(NamedTuple):
    """The arrays of one layer in a pass: places while planned, views when bound. ``y`` of one is x of the next."""

    y: Any
    dx: Any
    work: dict[str, Any]


class Plan(NamedTuple):
    """All places of a pass over a batch, and how many bytes they take."""

    stages: list[Stage]
    loss: dict[str, Place]
    size: int


class Pass(NamedTuple):
    """A plan bound to memory: layers with their arrays, the loss's context, and the scores."""

    steps: list[tuple[Layer, Array, Array, Context]]  # layer, y, dx, context
    loss: LossContext
    scores: Array


class Workspace:
    """A block of memory for batches of up to ``rows`` rows, and the views into it for the sizes used last.

    ``ticket`` is what kernels/last_block.cuh counts in, so that it is as much apart as the block is.
    """

    def __init__(self, rows: int, block: Array, offsets: Array, ticket: Array) -> None:
        self.rows, self.block, self.offsets, self.ticket = rows, block, offsets, ticket
        self.passes: dict[int, Pass] = {}


def stacked(layers: Sequence[Layer], widths: Sequence[int]) -> list[Stacked]:
    """The layers as they are run: a Dense layer with bias and the activation after it are one."""
    found: list[Stacked] = []
    for i, (layer, inputs) in enumerate(zip(layers, widths[:-1], strict=True)):
        before = found[-1].layer if found else None
        # By their very types: a subclass may do something else, and so may a method that was put in place of another.
        plain = type(layer) in (Elementwise, *ACTIVATIONS.values()) and type(before) is Dense and before.bias
        if (
            plain
            and not (changed(layer) or changed(before))
            and isinstance(layer, ActivationLayer)
            and isinstance(before, Dense)
        ):
            whole = DenseActivation(before, layer)
            found[-1] = Stacked(whole, i - 1, found[-1].inputs, whole.needs(found[-1].inputs))
        else:
            found.append(Stacked(layer, i, inputs, layer.needs(inputs)))
    return found


def run_layers(run: Pass, x: Array) -> None:
    """All layers forward."""
    for layer, y, _, context in run.steps:
        layer.forward(x, y, context)
        x = y


def evenly(n: int, most: int, least: int = 1) -> Iterator[slice]:
    """``n`` rows in as few parts of at most ``most`` as there can be, as equal as can be.

    Where that would leave one below ``least``, parts are larger instead.
    """
    count = max(1, min(-(-n // most), n // least))
    for i in range(count):
        yield slice(n * i // count, n * (i + 1) // count)
