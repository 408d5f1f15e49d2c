"""The ranks' GPUs, connected by NCCL through CuPy: each rank has one, and no two have the same."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from gpubatch.backend import Array, CudaBackend
from gpubatch.errors import ArgumentError, BackendUnavailableError
from gpubatch.parallel.engines import Connection


class Nccl:
    """Sends arrays between the GPUs of the ranks, as an engine does between main memories.

    All ranks make it at the same time, connected by ``engine``; ``gather`` tells each what all say. Its methods enqueue
    work on the device's current stream, allocate nothing, and can be captured, once each has run before.

    Raises on all ranks: ArgumentError if two of them have the same GPU, BackendUnavailableError without NCCL.
    """

    def __init__(self, engine: Connection, backend: CudaBackend, gather: Callable[[str], list[str]]) -> None:
        self._backend, self._rank, self._size = backend, engine.rank, engine.size
        self._nccl = nccl = agreed(gather, backend)
        # Until CuPy 14.1 an id is a tuple of 128 signed numbers, then bytes.
        own = nccl.get_unique_id()
        found = engine.share(own if isinstance(own, bytes) else np.array(own, np.int8).tobytes())
        shared = found if isinstance(own, bytes) else tuple(np.frombuffer(found, np.int8).tolist())
        with backend.scope():
            self._communicator = nccl.NcclCommunicator(self._size, shared, self._rank)

    def scatter(self, flat: Array, cuts: Sequence[int], pieces: Array) -> None:
        """Send each rank its elements of ``flat``, and get this one's from each."""
        pieces[self._rank][...] = flat[cuts[self._rank] : cuts[self._rank + 1]]
        with self._group(flat) as (kind, stream):
            for other in range(self._size):
                if other != self._rank:
                    sent, received = flat[cuts[other] : cuts[other + 1]], pieces[other]
                    self._communicator.send(sent.data.ptr, sent.size, kind, other, stream)
                    self._communicator.recv(received.data.ptr, received.size, kind, other, stream)

    def gather(self, piece: Array, flat: Array, cuts: Sequence[int]) -> None:
        """Put the pieces of all ranks into ``flat``."""
        with self._group(flat) as (kind, stream):
            if len(set(np.diff(cuts).tolist())) == 1:
                self._communicator.allGather(piece.data.ptr, flat.data.ptr, piece.size, kind, stream)
                return
            for root in range(self._size):
                to = flat[cuts[root] : cuts[root + 1]]
                source = piece if root == self._rank else to
                self._communicator.broadcast(source.data.ptr, to.data.ptr, to.size, kind, root, stream)

    def sum_(self, flat: Array) -> None:
        """Sum over the ranks, in the order that NCCL chooses."""
        with self._group(flat) as (kind, stream):
            place, operation = flat.data.ptr, self._nccl.NCCL_SUM
            self._communicator.allReduce(place, place, flat.size, kind, operation, stream)

    @contextlib.contextmanager
    def _group(self, flat: Array) -> Iterator[tuple[int, int]]:
        """The calls inside a ``with`` become one; yields NCCL's type of the array's numbers, and the current stream."""
        kind = self._nccl.NCCL_FLOAT32 if flat.dtype == np.float32 else self._nccl.NCCL_FLOAT64
        self._nccl.groupStart()
        try:
            yield kind, self._backend.current_stream().ptr
        finally:
            self._nccl.groupEnd()


def agreed(gather: Callable[[str], list[str]], backend: CudaBackend) -> Any:
    """CuPy's NCCL, if all ranks have it, and each a GPU of its own; else all raise."""
    nccl, lacking = None, None
    try:
        nccl = backend.nccl()
    except BackendUnavailableError as error:
        lacking = error
    device = f"{socket.gethostname()}, {backend.cupy.cuda.Device(backend.index).pci_bus_id}"
    found = gather(f"!{lacking}" if lacking else device)
    if lacking:
        raise lacking
    for rank, text in enumerate(found):
        if text.startswith("!"):
            raise BackendUnavailableError(f"On rank {rank}: {text[1:]}", "libraries missing", "install NCCL there.")
        if (first := found.index(text)) < rank:
            raise ArgumentError(
                f"ranks {first} and {rank} have the same GPU ({text}), and NCCL connects ranks with a GPU each: start "
                "as many ranks on a machine as it has GPUs, and make networks and loaders with backend='cuda' or "
                "'auto', by which each rank takes another one"
            )
    return nccl
