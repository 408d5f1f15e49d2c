"""What a run does between two steps: it saves itself when that is due, and ends when a signal has come."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

from gpubatch.train.history import TrainingInterrupted, TrainingTerminated
from gpubatch.train.record import Record
from gpubatch.train.resume import RunCheckpoints


class BetweenSteps:
    """Saves the run when that is due, and ends it after a signal, of ranks after a signal to any of them."""

    def __init__(self, record: Record, checkpoints: RunCheckpoints) -> None:
        self._record, self._checkpoints = record, checkpoints

    def __call__(self) -> None:
        """Check once. The last step's sum has told of signals to other ranks."""
        self._checkpoints.after_steps()
        if self._has_come:
            self._stop()

    @property
    def _has_come(self) -> bool:
        """Whether a signal came; with ranks, whether all of them know of it."""
        record = self._record
        return record.signalled if record.together.several else bool(record.signals)

    @property
    def room(self) -> int:
        """Steps until the next checkpoint, at most to the end of the epoch; 0 after a signal."""
        if self._has_come:
            return 0
        remaining, left = self._record.remaining, self._checkpoints.steps_left
        return remaining if left is None else min(remaining, max(1, left))

    def stop_if_signalled(self) -> None:
        """End the run if a signal came, to any of the ranks."""
        if self.signalled():
            self._stop()

    def signalled(self) -> bool:
        """Whether a signal came, to any of the ranks."""
        record = self._record
        record.signalled = record.together.any(bool(record.signals))
        return record.signalled

    def _stop(self) -> None:
        """End the run; the parameters are those of a complete step."""
        state, together, signals = self._record.state, self._record.together, self._record.signals
        number = int(together.most(signals[0] if signals else 0))
        verb = "interrupted" if number == signal.SIGINT else "terminated"
        message = f"{verb} in epoch {state.epoch + 1} after step {state.step}; the model holds this last complete step"
        message += self._checkpoints.save_at_last()
        if number == signal.SIGINT:
            raise together.alike(TrainingInterrupted(message, state.history))
        raise together.alike(TrainingTerminated(message, state.history, number))


@contextlib.contextmanager
def interruptible(noted: list[int]) -> Iterator[None]:
    """Note the first Ctrl-C, SIGTERM or SIGHUP, which comes when a terminal closes, instead of acting on it.

    A second one acts as usual.

    Only in the main thread, and only where Python's own handler is in place: a program's own handler stays.
    """
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    if hasattr(signal, "SIGHUP"):  # not on Windows
        usual[signal.SIGHUP] = signal.SIG_DFL  # nohup ignores it
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
        yield
    finally:
        give_back()
