"""Batches that a thread prepares ahead of their use."""

from __future__ import annotations

import atexit
import os
import queue
import threading
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import TypeVar

from gpubatch.errors import ArgumentError

Batch = TypeVar("Batch")


def prepared(prepare: Callable[[int], Batch], starts: range, depth: int) -> Generator[Batch]:
    """``prepare(start)`` for every start in turn, up to ``depth`` of them ahead in a thread; with 0 in the caller.

    Exceptions of ``prepare`` are raised here. The thread ends with the generator, however that ends.
    """
    return _ahead(prepare, starts, depth) if depth else (prepare(start) for start in starts)


@dataclass
class _Failure:
    """The exception in place of a batch."""

    error: BaseException


def _ahead(prepare: Callable[[int], Batch], starts: range, depth: int) -> Generator[Batch]:
    ready: queue.SimpleQueue[Batch | _Failure] = queue.SimpleQueue()
    room = threading.Semaphore(depth)
    stop = threading.Event()

    def work() -> None:
        try:
            for start in starts:
                room.acquire()
                if stop.is_set():
                    return
                ready.put(prepare(start))
        except BaseException as error:  # of any kind: the caller gets it
            ready.put(_Failure(error))

    thread, process = threading.Thread(target=work, name="gpubatch-loader", daemon=True), os.getpid()

    def end() -> None:
        if os.getpid() != process:
            return  # a forked child has no such thread, and its locks may be held for ever
        stop.set()
        room.release()
        if thread is not threading.current_thread():  # garbage collection may run this in any thread
            thread.join()

    # Python ends a daemon thread where it next takes the interpreter's lock: inside compiled code the process aborts.
    atexit.register(end)
    thread.start()
    try:
        for _ in starts:
            if os.getpid() != process:
                raise ArgumentError("this iteration belongs to the process that began it; begin one in the child")
            batch = ready.get()
            room.release()
            if isinstance(batch, _Failure):
                raise batch.error
            yield batch
            del batch  # before waiting for the next one
    finally:
        atexit.unregister(end)
        end()
