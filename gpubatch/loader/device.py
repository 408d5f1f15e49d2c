"""Data on a CUDA device: copied once, and gathered in the order of an epoch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from gpubatch.backend import Array, CudaBackend
from gpubatch.loader.columns import native
from gpubatch.ops import PERMUTATION_WORDS, Draws, Grid, Permutation, gather_batch, permute, take_batch
from gpubatch.passes import Deal
from gpubatch.staging import stages_for


def copy_to_device(array: np.ndarray, backend: CudaBackend) -> Array:
    """A C-contiguous copy of ``array`` on the device, which every stream may use at once."""
    with backend.scope():
        copy = backend.empty(array.shape, native(array.dtype))
        stages_for(backend, copy).copy(array, copy)
        backend.current_stream().synchronize()
    return copy


class DeviceOrder:
    """The order of an epoch from position ``first`` on: a list that is copied to the device, or computed there."""

    def __init__(self, backend: CudaBackend, order: np.ndarray | Permutation | Draws, first: int = 0) -> None:
        self._kind, self._first = ("Listed" if isinstance(order, np.ndarray) else order.kind), first
        order = order if isinstance(order, np.ndarray) else order.words
        self._backend, self._process, self.nbytes = backend, os.getpid(), order.nbytes
        self._home, self._ready = backend.current_stream(), backend.event()
        with backend.scope():
            self._order = backend.empty(order.shape, order.dtype)
            # Not asarray: CuPy's pool would keep as much pinned memory for ever.
            self._stages = stages_for(backend, self._order)
            self._stages.copy(order, self._order)
            self._home.record(self._ready)
        self._others = list[Any]()  # other streams that use it

    def part(self, start: int, stop: int) -> Array:
        """The samples at positions ``start`` to ``stop``, for work on the current stream."""
        stream = self._backend.current_stream()
        if stream != self._home and stream not in self._others:
            stream.wait_event(self._ready)
            self._others.append(stream)
        if self._kind == "Listed":
            return self._order[start - self._first : stop - self._first]
        with self._backend.scope():
            found = self._backend.empty(stop - start, np.int64)
            permute(Grid(self._backend, np.dtype(np.float32)), self._order, start, found, self._kind)
        return found

    def close(self) -> None:
        """Let the home stream wait for all uses; its next work may then reuse the memory."""
        if os.getpid() != self._process or not self._others:
            return  # a forked child cannot use the device
        with self._backend.scope():
            for stream in self._others:
                used = self._backend.event()
                stream.record(used)
                self._home.wait_event(used)
        self._others.clear()


class DeviceFeed:
    """Batches that captured steps gather themselves: data, order and batch keep their places on the device.

    columns: the arrays on the device, each with the element type and the scale of its batches
    share: the samples of an order that is listed
    batch_size: the rows of a batch, on this rank
    firsts: the places in a whole batch at which this rank's rows may begin; empty: the order is listed
    step: the samples of a whole batch, of all ranks
    kind, words: the struct by which kernels compute the order, and its number of words
    """

    def __init__(
        self,
        backend: CudaBackend,
        columns: Sequence[tuple[Array, np.dtype[Any], float | None]],
        share: int,
        batch_size: int,
        firsts: Sequence[int] = (),
        step: int | None = None,
        kind: str = "Listed",
        words: int = PERMUTATION_WORDS,
    ) -> None:
        self._backend, self._columns, self.batch_size = backend, columns, batch_size
        self._firsts, self._step = list(firsts), batch_size if step is None else step
        self._kind = kind
        # Zeros are valid for a rehearsal before the first order: as words they compute sample 0 for all places.
        self._order = backend.zeros((len(firsts), words) if firsts else share, np.int64)
        self._stages = stages_for(backend, self._order)
        self._batch = [backend.empty((batch_size, *array.shape[1:]), dtype) for array, dtype, _ in columns]

    def begin(self, order: np.ndarray | Permutation | Draws) -> int:
        """Copy the order of the next epoch to the device; return the number of bytes."""
        if not isinstance(order, np.ndarray):
            order = np.stack([order.after(first) for first in self._firsts])
        self._stages.copy(order, self._order)
        return order.nbytes

    def arrays(self, rows: int) -> list[Array]:
        """The arrays of a batch of ``rows`` samples."""
        return [array[:rows] for array in self._batch]

    def enqueue(self, rows: int, batch: Array, deal: Deal | None = None) -> None:
        """Enqueue the gathering of batch number ``*batch``, which the kernel reads on the device when it runs.

        deal: which rows of the whole batch these are, where batches are dealt
        """
        if not rows:
            return
        order = self._order
        if self._firsts:
            order = order[self._firsts.index(0 if deal is None else deal.first)]
        for (source, dtype, scale), out in zip(self._columns, self.arrays(rows), strict=True):
            if dtype.kind == "f":
                factor = 1.0 if scale is None else scale
                grid = Grid(self._backend, dtype)
                gather_batch(grid, source, order, batch, out, factor, 0.0, self._step, self._kind)
            else:
                grid = Grid(self._backend, np.dtype(np.float32))
                take_batch(grid, source, order, batch, out, self._step, self._kind)
