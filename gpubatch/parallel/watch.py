"""Notices a rank that has ended while others wait for it, which they would do for ever."""

from __future__ import annotations

import atexit
import faulthandler
import functools
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

LOOK = 0.5  # seconds between two looks
PATIENCE = 2.0  # seconds that a rank waits before it asks the others whether they have ended
ENDING = 5.0  # seconds that an MPI library has to end all processes

Result = TypeVar("Result")


class Watch:
    """A thread that looks, while this rank waits for the others, whether one of them has ended.

    comm: a communicator of mpi4py of the same ranks, for nothing else
    since: when this rank began to wait, of ``time.monotonic``; None while it does not
    """

    def __init__(self, comm: Any) -> None:
        self._comm = comm
        self.since: float | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, name="gpubatch-ranks", daemon=True)
        self._thread.start()
        atexit.register(self._leave)

    def _look(self) -> None:
        from mpi4py import MPI as mpi  # noqa: N811 (as in engines.py)

        status = mpi.Status()
        while not self._over.wait(LOOK):
            since = self.since
            if since is None or time.monotonic() - since < PATIENCE:
                continue
            if self._comm.Iprobe(mpi.ANY_SOURCE, mpi.ANY_TAG, status) and self.since == since:
                left = status.Get_source()
                rank, size = self._comm.Get_rank(), self._comm.Get_size()
                print(
                    f"gpubatch: rank {left} of {size} has ended, and rank {rank} waits for it: this ends all",
                    file=sys.stderr,
                    flush=True,
                )
                end_all(self._comm)

    def close(self) -> None:
        """End the thread and free the communicator, in all processes at the same place."""
        atexit.unregister(self._leave)
        self._over.set()
        self._thread.join()
        self._comm.Free()

    def _leave(self) -> None:
        """Tell the others that this process ends."""
        from mpi4py import MPI as mpi  # noqa: N811 (as in engines.py)

        self._over.set()
        self._thread.join()
        if mpi.Is_finalized():  # by the program: then all have come to that
            return
        for rank in range(self._comm.Get_size()):
            if rank != self._comm.Get_rank():
                self._comm.Isend(b"", rank)


def end_all(comm: Any) -> None:
    """End all processes of a communicator.

    Should the library's own way hang, this process ends without it, and its launcher ends the others. A thread of
    Python could not do that: mpi4py keeps Python's lock meanwhile.
    """
    faulthandler.dump_traceback_later(ENDING, exit=True, file=2)
    comm.Abort(1)


def watched(wait: Callable[..., Result]) -> Callable[..., Result]:
    """Decorate a method that waits for other ranks: the object's ``watch`` notices if one has ended meanwhile."""

    @functools.wraps(wait)
    def waits(self: Any, *arguments: Any) -> Result:
        watch = self.watch
        if watch is None:
            return wait(self, *arguments)
        watch.since = time.monotonic()
        try:
            return wait(self, *arguments)
        finally:
            watch.since = None

    return waits
