"""The progress of a run: a live bar in a terminal, lines elsewhere."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any, Protocol

from gpubatch.train.history import History

__all__ = ["Display", "_Silent", "display"]


class Display(Protocol):
    """What shows the progress."""

    def step(self, loss: float) -> None:
        """A step was made."""

    def epoch(self, number: int, history: History) -> None:
        """Epoch ``number``, counted from 1, is complete."""


@contextlib.contextmanager
def display(progress: bool, epochs: int, steps: int, done: int = 0) -> Iterator[Display]:
    """A live bar in a terminal (where rich is installed), plain lines elsewhere, nothing without ``progress``.

    ``done`` steps of ``epochs * steps`` are made already. On standard error: standard output is for results.
    """
    if not progress or epochs == 0:
        yield _Silent()
    elif (bar := _rich_progress()) is not None:
        with bar:
            yield _Live(bar, epochs, steps, done)
    else:
        yield _Lines(epochs)


def _rich_progress() -> Any:
    try:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
    except ImportError:
        return None
    console = Console(stderr=True)
    if not console.is_terminal and not console.is_jupyter:
        return None
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[loss]}"), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True)


class _Silent:
    def step(self, loss: float) -> None:
        pass

    def epoch(self, number: int, history: History) -> None:
        pass


class _Lines:
    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def step(self, loss: float) -> None:
        pass

    def epoch(self, number: int, history: History) -> None:
        print(epoch_line(number, self.epochs, history), file=sys.stderr, flush=True)


class _Live:
    """One bar for the whole run, so that the time that remains is the run's; a line for each epoch above it."""

    def __init__(self, bar: Any, epochs: int, steps: int, done: int) -> None:
        self.bar, self.epochs, self.steps, self.done = bar, epochs, steps, done
        self.task = bar.add_task(self._title(), total=epochs * steps, completed=done, loss="")

    def _title(self) -> str:
        return f"epoch {min(self.done // self.steps + 1, self.epochs):>3}/{self.epochs}"

    def step(self, loss: float) -> None:
        self.done += 1
        self.bar.update(self.task, advance=1, loss=f"loss {loss:.4f}", description=self._title())

    def epoch(self, number: int, history: History) -> None:
        self.bar.console.print(epoch_line(number, self.epochs, history), highlight=False)


def epoch_line(number: int, epochs: int, history: History) -> str:
    """An epoch in one line."""
    parts = [f"epoch {number:>{len(str(epochs))}}/{epochs}", f"loss {history.loss[-1]:.4f}"]
    if history.validation_loss:
        parts.append(f"validation loss {history.validation_loss[-1]:.4f}")
    if history.validation_accuracy:
        parts.append(f"accuracy {100 * history.validation_accuracy[-1]:6.2f} %")
    parts.append(f"{history.seconds[-1]:.2f} s")
    return "  ".join(parts)
