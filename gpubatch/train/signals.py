"""Ctrl-C and SIGTERM during a run: noted, and acted on between two steps."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

__all__ = ["interruptible"]


@contextlib.contextmanager
def interruptible() -> Iterator[list[int]]:
    """Note the first Ctrl-C or SIGTERM in the list instead of acting on it anywhere; a second one acts as usual.

    Only where Python's own handler is in place, in the main thread: a program that has its own keeps it.
    """
    noted: list[int] = []
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    ours = threading.current_thread() is threading.main_thread()
    taken = {number: handler for number, handler in usual.items() if ours and signal.getsignal(number) is handler}

    def note(number: int, frame: Any) -> None:
        noted.append(number)
        give_back()

    def give_back() -> None:
        for number, handler in taken.items():
            signal.signal(number, handler)

    for number in taken:
        signal.signal(number, note)
    try:
        yield noted
    finally:
        give_back()
