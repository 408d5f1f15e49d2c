"""The progress of long work on standard error: a live bar in a terminal, lines elsewhere."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from gpubatch.train.history import History

MOVED = 0.05  # seconds from one move of a run's bar to the next; Rich draws it ten times a second

REWRITTEN, LINE, WIDTH = 0.2, 79, 30  # seconds between two bars of characters, and columns of a line and of its bar


def live_bar(column: str) -> Any:
    """Rich's progress bar, ``column`` behind it; None if rich is not installed or nobody would see the bar.

    A notebook shows it by ipywidgets. Without them rich would warn of that and show nothing.
    """
    try:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
    except ImportError:
        return None
    console = Console(stderr=True)
    shown = importlib.util.find_spec("ipywidgets") is not None if console.is_jupyter else console.is_terminal
    if not shown:
        return None
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn(column), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True)


@contextlib.contextmanager
def bar(words: str, progress: bool) -> Iterator[Callable[[int, int], Any]]:
    """A function of what is done, and of how much there is in all; it moves a bar if there is a terminal."""
    if not progress or (live := live_bar("{task.percentage:>3.0f} %")) is None:
        yield lambda done, total: None
        return
    with live:
        task = live.add_task(words, total=None)
        yield lambda done, total: live.update(task, completed=done, total=total)


@contextlib.contextmanager
def unseen() -> Iterator[None]:
    """Within it nothing that cannot be written ends a run: a terminal may be closed, the disk with a log full."""
    with contextlib.suppress(OSError):
        yield


# --- of a run ------------------------------------------------------------------------------------------------------


class Display(Protocol):
    """Shows the progress of a run."""

    def step(self, loss: float) -> None:
        """A step was made."""

    def epoch(self, number: int, history: History) -> None:
        """Epoch ``number``, counted from 1, is complete."""

    def note(self, text: str) -> None:
        """Something to know of the run, in a line."""


@contextlib.contextmanager
def display(progress: bool, epochs: int, steps: int, done: int = 0) -> Iterator[Display]:
    """A live bar in a terminal or a notebook, plain lines elsewhere, nothing without ``progress``.

    ``done`` of the ``epochs * steps`` steps were made before.
    """
    if not progress or epochs == 0:
        yield Silent()
    elif (live := live_bar("{task.fields[loss]}")) is not None:
        shown = Live(live, epochs, steps, done)
        with unseen():
            live.start()
        try:
            yield shown
        finally:
            with unseen():
                live.stop()
    elif in_a_notebook():
        yield Rewritten(epochs, steps, done)
    else:
        yield Lines(epochs)


def in_a_notebook() -> bool:
    """Whether this process is the kernel of a notebook."""
    return "ipykernel" in sys.modules


class Silent:
    """Shows nothing."""

    def step(self, loss: float) -> None:
        """Nothing."""

    def epoch(self, number: int, history: History) -> None:
        """Nothing."""

    def note(self, text: str) -> None:
        """Nothing."""


class Lines:
    """A line for each epoch."""

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def step(self, loss: float) -> None:
        """Nothing."""

    def epoch(self, number: int, history: History) -> None:
        """Print it."""
        self.note(epoch_line(number, self.epochs, history))

    def note(self, text: str) -> None:
        """Print it."""
        with unseen():
            print(text, file=sys.stderr, flush=True)


class Rewritten(Lines):
    """A line for each epoch, and below it a bar of characters that is written over: what a notebook shows of itself."""

    def __init__(self, epochs: int, steps: int, done: int) -> None:
        self.epochs, self.steps, self.done = epochs, steps, done
        self._shown = time.perf_counter()  # when the bar was written last

    def step(self, loss: float) -> None:
        """Write the bar anew, some times a second."""
        self.done += 1
        if (now := time.perf_counter()) - self._shown >= REWRITTEN:
            self._shown = now
            share = self.done / (self.epochs * self.steps)
            drawn = "█" * round(WIDTH * share)
            epoch = min(self.done // self.steps + 1, self.epochs)
            text = f"epoch {epoch}/{self.epochs} {drawn:░<{WIDTH}} {share:4.0%}  loss {loss:.4f}"
            with unseen():
                print(f"\r{text:<{LINE}}", end="", file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        """Print it over the bar."""
        with unseen():
            print(f"\r{text:<{LINE}}", file=sys.stderr, flush=True)


class Live:
    """One bar for the whole run, so that the remaining time is the run's; a line for each epoch above it."""

    def __init__(self, live: Any, epochs: int, steps: int, done: int) -> None:
        self.live, self.epochs, self.steps, self.done = live, epochs, steps, done
        self._shown = 0.0  # when the bar was moved last
        self.task = live.add_task(self._title(), total=epochs * steps, completed=done, loss="")

    def _title(self) -> str:
        return f"epoch {min(self.done // self.steps + 1, self.epochs):>3}/{self.epochs}"

    def step(self, loss: float) -> None:
        """Move the bar, as often as it is drawn: doing that takes as long as a small step."""
        self.done += 1
        if (now := time.perf_counter()) - self._shown >= MOVED:
            self._shown = now
            self.live.update(self.task, completed=self.done, loss=f"loss {loss:.4f}", description=self._title())

    def epoch(self, number: int, history: History) -> None:
        """Print it above the bar."""
        self.note(epoch_line(number, self.epochs, history))

    def note(self, text: str) -> None:
        """Print it above the bar."""
        with unseen():
            self.live.console.print(text, highlight=False)


def epoch_line(number: int, epochs: int, history: History) -> str:
    """An epoch in one line."""
    parts = [f"epoch {number:>{len(str(epochs))}}/{epochs}", f"loss {history.loss[-1]:.4f}"]
    if history.validation_loss:
        parts.append(f"validation loss {history.validation_loss[-1]:.4f}")
    if history.validation_accuracy:
        parts.append(f"accuracy {100 * history.validation_accuracy[-1]:6.2f} %")
    parts += [f"{name} {values[-1]:.4f}" for name, values in history.metrics.items()]
    parts.append(f"{history.seconds[-1]:.2f} s")
    return "  ".join(parts)
