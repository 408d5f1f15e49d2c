"""Helpers of the explorers: restoring the network, grids of numbers, progress."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias, TypeVar

import numpy as np

from gpubatch.backend import Array
from gpubatch.errors import ArgumentError, DTypeError, NonFiniteError, ShapeError
from gpubatch.nn import Network

Progress: TypeAlias = Callable[[int, int], Any]  # called with (done, total)
Item = TypeVar("Item")


def grid_of(name: str, values: Any) -> np.ndarray:
    """``values`` as float64, one or more finite numbers."""
    grid = np.asarray(values)
    if grid.dtype.kind not in "iuf":
        raise DTypeError(f"{name} must hold real numbers, got dtype {grid.dtype}")
    if grid.ndim != 1 or grid.size == 0:
        raise ShapeError(f"{name} must be a sequence of at least one number, got shape {grid.shape}")
    if not np.isfinite(grid).all():
        raise ArgumentError(f"{name} must hold finite numbers, got {grid[~np.isfinite(grid)][0]}")
    return grid.astype(np.float64)


def check_net(net: Any) -> None:
    """Raise unless ``net`` is a network of full precision."""
    if not isinstance(net, Network):
        raise DTypeError(f"net must be a gpubatch.Network, got {type(net).__name__}")
    if net.dtype == np.float16:
        raise ArgumentError(
            "net must not have precision='mixed' here: what is looked for is lost in the rounding of float16; make one "
            "with precision='full' and give it this one's state_dict()"
        )


@contextlib.contextmanager
def kept_as_it_is(net: Network) -> Iterator[dict[str, Any]]:
    """Give the state of ``net``, its parameters, running statistics and dropout step, and restore it on exit."""
    state = net.state_dict()
    try:
        yield state
    finally:
        net.load_state_dict(state)


def loss_or_inf(net: Network, X: Array, Y: Array, training: bool = False, weight: Array | None = None) -> float:
    """The loss; infinity if it is not finite."""
    try:
        return net.loss(X, Y, training, weight)
    except NonFiniteError:
        return math.inf


def positive_grid(name: str, values: Any) -> tuple[float, ...]:
    """``values`` as numbers above 0."""
    grid = grid_of(name, values)
    if grid.min() <= 0:
        raise ArgumentError(f"{name} must hold numbers above 0, got {grid.min():g}")
    return tuple(grid.tolist())


def report(progress: Progress | None, done: int, total: int) -> None:
    """Call ``progress``, if there is one."""
    if progress is not None:
        progress(done, total)


def counted(items: Sequence[Item], progress: Progress | None) -> Iterator[Item]:
    """Yield the items, and report before each how many are done."""
    for done, item in enumerate(items):
        report(progress, done, len(items))
        yield item
    report(progress, len(items), len(items))
