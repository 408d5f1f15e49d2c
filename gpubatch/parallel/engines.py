"""What connects the ranks of a run: MPI, for processes; threads of one process, for tests."""

from __future__ import annotations

import array
import itertools
import os
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np

from gpubatch.errors import ArgumentError, DTypeError
from gpubatch.parallel.launchers import check_world, launched
from gpubatch.parallel.watch import Watch, end_all, watched

READING = 3.0  # seconds at most that a process waits for its message to be read before it ends all
PASSING_ON = 0.1  # seconds that the launcher then gets to pass the message on
CALLS = "scatter", "gather", "most", "share", "barrier"  # the methods, each by the tag of its messages
PATIENCE = 120  # seconds that a thread waits for the others: far more than any test computes between two calls

Numbers = np.ndarray[Any, np.dtype[Any]]


class Connection(Protocol):
    """Connects a rank with the others.

    All ranks call the same methods in the same order, all but ``abort``, with arrays of the same sizes.

    name: what it is, for a reader.
    rank, size: this rank, and how many there are.
    local: this rank's place among those on the same machine.
    """

    name: str
    rank: int
    size: int
    local: int

    def scatter(self, flat: Numbers, cuts: Sequence[int], pieces: Numbers) -> None:
        """Send the elements ``cuts[r]`` to ``cuts[r + 1]`` to each rank r; row s of ``pieces`` comes from rank s."""

    def gather(self, piece: Numbers, flat: Numbers, cuts: Sequence[int]) -> None:
        """Put the ``piece`` of each rank r into the elements ``cuts[r]`` to ``cuts[r + 1]`` of ``flat``, on all."""

    def sum_(self, flat: Numbers) -> None:
        """Sum over the ranks, in whatever order is fastest."""

    def most(self, values: Numbers) -> None:
        """The maximum over the ranks, element by element."""

    def share(self, data: bytes) -> bytes:
        """What rank 0 gave, on all ranks."""

    def barrier(self) -> None:
        """Wait until all ranks are here."""

    def abort(self, why: str) -> None:
        """End all ranks."""


class MPI:
    """Ranks are processes, connected by an MPI library through mpi4py."""

    def __init__(self, comm: Any) -> None:
        from mpi4py import MPI as mpi  # noqa: N811 (the name of the class here)

        # One of its own, so that no message here is taken for one of the caller's.
        self._given, self._comm = comm, comm.Dup()
        comm = self._comm
        self._in_place, self._max = mpi.IN_PLACE, mpi.MAX
        self._wait, self._error = mpi.Request.Waitall, mpi.Exception
        self.name = version_of(mpi)
        self.rank, self.size = comm.Get_rank(), comm.Get_size()
        neighbours = comm.Split_type(mpi.COMM_TYPE_SHARED)
        self.local = neighbours.Get_rank()
        # Where messages go through memory, MPICH's own collectives take twice as long as messages one by one.
        self._one_by_one = neighbours.Get_size() == self.size
        self._others = [(self.rank + step) % self.size for step in range(1, self.size)]
        self._statuses = [mpi.Status() for _ in range(2 * len(self._others))]
        neighbours.Free()
        # Its thread calls MPI while this one waits there.
        several = self.size > 1 and mpi.Query_thread() == mpi.THREAD_MULTIPLE
        self.watch = Watch(comm.Dup()) if several else None
        self.left = False  # whether the ranks have been garbage-collected

    def leave(self) -> None:
        """The ranks are garbage-collected: :meth:`close` may be called once that is so in all processes."""
        self.left = True

    def close(self) -> None:
        """Free the communicators and end the watch, in all processes at the same place."""
        if self in WORLDS:
            WORLDS.remove(self)
        if self.watch is not None:
            self.watch.close()
        self._comm.Free()

    @watched
    def scatter(self, flat: Numbers, cuts: Sequence[int], pieces: Numbers) -> None:
        """Send each rank its elements of ``flat``, and get this one's from each."""
        if self._one_by_one:
            self._exchange("scatter", [flat[start:stop] for start, stop in itertools.pairwise(cuts)], pieces)
            return
        counts, own = np.diff(cuts), pieces.shape[1]
        received = [own] * self.size, [own * rank for rank in range(self.size)]
        self._comm.Alltoallv([flat, (counts, cuts[:-1])], [pieces, received])

    @watched
    def gather(self, piece: Numbers, flat: Numbers, cuts: Sequence[int]) -> None:
        """Put together the pieces of all ranks."""
        if self._one_by_one:
            places = [flat[start:stop] for start, stop in itertools.pairwise(cuts)]
            self._exchange("gather", [piece] * self.size, places)
            return
        self._comm.Allgatherv(piece, [flat, (np.diff(cuts), cuts[:-1])])

    @watched
    def sum_(self, flat: Numbers) -> None:
        """The library's own sum."""
        self._comm.Allreduce(self._in_place, flat)

    @watched
    def most(self, values: Numbers) -> None:
        """The maximum over the ranks."""
        if self._one_by_one:
            rows = np.empty((self.size, values.size))
            self._exchange("most", [values] * self.size, rows)
            rows.max(axis=0, out=values)
            return
        self._comm.Allreduce(self._in_place, values, self._max)

    @watched
    def share(self, data: bytes) -> bytes:
        """What rank 0 gave."""
        if self._one_by_one:
            if self.rank == 0:
                self._wait([self._comm.Isend(data, rank, CALLS.index("share")) for rank in self._others])
                return data
            self._comm.Probe(0, status=self._statuses[0])
            self._check_call("share", 0, self._statuses[0])
            received = bytearray(self._statuses[0].Get_count())
            self._comm.Recv(received, 0)
            return bytes(received)
        size = np.array([len(data)], np.int64)
        self._comm.Bcast(size)
        found = np.frombuffer(data, np.uint8).copy() if self.rank == 0 else np.empty(size.item(), np.uint8)
        self._comm.Bcast(found)
        return found.tobytes()

    @watched
    def barrier(self) -> None:
        """Wait for all ranks."""
        if self._one_by_one:
            self._exchange("barrier", [np.zeros(1)] * self.size, np.empty((self.size, 1)))
            return
        self._comm.Barrier()

    def abort(self, why: str) -> None:
        """End all processes, when the launcher has read what this one wrote: it may end without doing so."""
        for stream in (sys.stdout, sys.stderr):
            until_read(stream)
        end_all(self._given)

    def _exchange(self, call: str, sent: Sequence[Numbers], received: Sequence[Numbers] | Numbers) -> None:
        """Send each rank its array of ``sent``, and put what comes from it into its array of ``received``."""
        requests = [self._comm.Irecv(received[rank], rank) for rank in reversed(self._others)]
        requests += [self._comm.Isend(sent[rank], rank, CALLS.index(call)) for rank in self._others]
        received[self.rank][...] = sent[self.rank]
        alike = "arrays must be of the same size and dtype on all ranks"
        try:
            self._wait(requests, self._statuses)
        except self._error as error:  # a message is longer than its buffer
            raise ArgumentError(f"{alike}, which must call the same methods in the same order: {error}") from error
        for rank, status in zip(reversed(self._others), self._statuses, strict=False):
            self._check_call(call, rank, status)
            if (size := status.Get_count()) != (expected := received[rank].nbytes):
                raise ArgumentError(f"{alike}: rank {rank} sent {size} bytes, rank {self.rank} expected {expected}")

    def _check_call(self, call: str, rank: int, status: Any) -> None:
        """Raise unless another rank's message is of the same method."""
        if (theirs := CALLS[status.Get_tag()]) != call:
            raise ArgumentError(
                f"all ranks must call the same methods in the same order: rank {rank} calls {theirs}, rank "
                f"{self.rank} {call}"
            )


WORLDS = list[MPI]()  # those of all processes, in the order in which they were made


class Meeting:
    """Where the threads that are ranks meet: what each brought, and why one of them ended all."""

    def __init__(self, size: int) -> None:
        self.brought: list[Any] = [None] * size
        self.why = "a rank did not come"
        self._barrier = threading.Barrier(size)

    def wait(self) -> None:
        """Wait until all ranks are here; raise if one has ended."""
        try:
            self._barrier.wait(PATIENCE)
        except threading.BrokenBarrierError:
            raise RuntimeError(self.why) from None

    def end(self, why: str) -> None:
        """Make all that wait, or will, raise."""
        self.why = why
        self._barrier.abort()


class Threads:
    """Ranks are threads of one process, so that tests can have any number of them."""

    name = "threads"

    def __init__(self, rank: int, size: int, meeting: Meeting) -> None:
        self.rank = self.local = rank
        self.size, self._meeting = size, meeting

    def scatter(self, flat: Numbers, cuts: Sequence[int], pieces: Numbers) -> None:
        """Send each rank its elements of ``flat``, and get this one's from each."""
        brought = self._bring(flat)
        check_alike(len(flat), map(len, brought))
        for row, other in zip(pieces, brought, strict=True):
            row[...] = other[cuts[self.rank] : cuts[self.rank + 1]]
        self._meeting.wait()

    def gather(self, piece: Numbers, flat: Numbers, cuts: Sequence[int]) -> None:
        """Put together the pieces of all ranks."""
        for start, stop, other in zip(cuts[:-1], cuts[1:], self._bring(piece), strict=True):
            check_alike(stop - start, [len(other)])
            flat[start:stop] = other
        self._meeting.wait()

    def sum_(self, flat: Numbers) -> None:
        """The sum in the order of the ranks."""
        total = np.sum(self._bring(flat), axis=0, dtype=flat.dtype)
        self._meeting.wait()
        flat[...] = total

    def most(self, values: Numbers) -> None:
        """The maximum over the ranks."""
        largest = np.max(self._bring(values), axis=0)
        self._meeting.wait()
        values[...] = largest

    def share(self, data: bytes) -> bytes:
        """What rank 0 gave."""
        found: bytes = self._bring(data)[0]
        self._meeting.wait()
        return found

    def barrier(self) -> None:
        """Wait for all ranks."""
        self._meeting.wait()

    def abort(self, why: str) -> None:
        """Make the other threads raise when they wait."""
        self._meeting.end(why)

    def _bring(self, value: Any) -> list[Any]:
        """Gather the values of all ranks, ``value`` from this one; they may be read until the next wait."""
        self._meeting.brought[self.rank] = value
        self._meeting.wait()
        return self._meeting.brought


def check_alike(size: int, sizes: Iterable[int]) -> None:
    """Raise unless the arrays of all ranks have the same number of elements."""
    for other in sizes:
        if other != size:
            raise ArgumentError(f"arrays must be of the same size on all ranks: one has {other}, another {size}")


def threads(size: int) -> list[Threads]:
    """``size`` connected ranks, each for a thread of its own."""
    meeting = Meeting(size)
    return [Threads(rank, size, meeting) for rank in range(size)]


def until_read(stream: Any) -> None:
    """Wait, for a limited time, until the reader of a pipe has read what was written to it."""
    last = time.monotonic() + READING
    try:
        import fcntl  # here, as Windows has neither
        import termios

        stream.flush()
        unread = array.array("i", [1])
        while unread[0] and time.monotonic() < last:
            fcntl.ioctl(stream.fileno(), termios.FIONREAD, unread)
            time.sleep(PASSING_ON)
    except (ImportError, OSError, ValueError, AttributeError):  # no pipe, or closed
        return


def version_of(mpi: Any) -> str:
    """The name and version of the MPI library."""
    found: str = mpi.Get_library_version().splitlines()[0].strip(" \0")
    return found


def connected(comm: Any) -> Connection | None:
    """The engine of a communicator of mpi4py; without one, of all processes of a launcher, or None where none is."""
    if comm is not None:
        if not hasattr(comm, "Split_type"):
            raise DTypeError(f"comm must be a communicator of mpi4py or None, got {type(comm).__name__}")
        return MPI(comm)
    count = launched(os.environ)
    if count == 1:
        return None
    told = "processes" if count is None else f"{count} processes"
    try:
        from mpi4py import MPI as mpi  # noqa: N811 (the name of the class here)
    except (ImportError, RuntimeError) as error:  # RuntimeError: there is no MPI library
        raise ImportError(
            f"a launcher started {told}, and gb.Ranks needs the extra parallel and an MPI library to connect them "
            f"({error}): pip install 'gpubatch[parallel]' mpich"
        ) from error
    check_world(mpi.COMM_WORLD.Get_size(), version_of(mpi), os.environ)
    if WORLDS:
        # The processes let go of ranks at different moments, but free them in the same order.
        held = np.array([not engine.left for engine in WORLDS], np.float64)
        WORLDS[-1].most(held)
        for engine in [engine for engine, is_held in zip(WORLDS, held.tolist(), strict=True) if not is_held]:
            engine.close()
    WORLDS.append(MPI(mpi.COMM_WORLD))
    return WORLDS[-1]
