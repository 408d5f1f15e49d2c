"""The training loop: epochs of mini-batches, validation, a history, a display of the progress."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from gpubatch.averages import ewma
from gpubatch.backend import Array
from gpubatch.errors import ArgumentError, DTypeError, NonFiniteError, check_bool, check_int
from gpubatch.loader import Loader
from gpubatch.network import Network
from gpubatch.optim import Optimizer

__all__ = ["History", "StopTraining", "TrainingInterrupted", "TrainingState", "fit"]


@dataclass
class History:
    """What a run did: ``step_loss`` and ``step_lr`` have one number a step, the other lists one an epoch.

    ``step_lr`` is empty where the rule has no learning rate.

    ``loss`` is the mean of the epoch's mini-batch costs, weighted by their samples; ``seconds`` leaves the validation
    out. ``validation_accuracy`` is empty where the loss has no classes. ``execution`` says how the steps were run.
    """

    step_loss: list[float] = field(default_factory=list)
    step_lr: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    validation_loss: list[float] = field(default_factory=list)
    validation_accuracy: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    batch_size: int = 0
    execution: str = "eager"

    def smoothed(self, beta: float = 0.9) -> np.ndarray:
        """The cost of each step as an exponentially weighted average over about 1/(1-beta) steps."""
        return np.asarray(ewma(self.step_loss, beta))

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON can hold it."""
        return dataclasses.asdict(self)


@dataclass
class TrainingState:
    """What a callback sees: the parts of the run, the epoch that is running, and how many steps were made in all."""

    net: Network
    loader: Loader
    opt: Optimizer
    history: History
    epoch: int
    step: int


class StopTraining(Exception):  # noqa: N818  like StopIteration: not an error
    """Raise it in a callback to end the training after this step or epoch."""


class TrainingInterrupted(KeyboardInterrupt):
    """Ctrl-C during :func:`fit`: the model holds the last complete step; ``history`` is what was done until then."""

    def __init__(self, message: str, history: History) -> None:
        KeyboardInterrupt.__init__(self, message)
        self.history = history


def fit(
    net: Network,
    loader: Loader,
    opt: Optimizer,
    epochs: int = 10,
    validation: tuple[Any, Any] | None = None,
    callbacks: Iterable[Any] = (),
    progress: bool = True,
) -> History:
    """Train ``net`` on the batches of ``loader`` with ``opt``, which must be bound to ``net.parameters``.

    ``validation`` is (X, Y), converted as the loader converts its own; loss and accuracy on it are measured after every
    epoch. A callback is called with the :class:`TrainingState` after every epoch; one with methods ``on_step`` or
    ``on_epoch`` has these called instead. A loader with ``batch_size="auto"`` gets its final batch size here, where
    network and optimizer are known, and one step of that size is tried before the first epoch.

    Raises :class:`NonFiniteError` when a loss is NaN or infinite; the parameters are those before that step. Ctrl-C
    lets the step finish and raises :class:`TrainingInterrupted`, a KeyboardInterrupt that has the history.
    """
    check_int("epochs", epochs, 0)
    check_bool("progress", progress)
    _check_parts(net, loader, opt)
    watchers = [_watcher(callback) for callback in callbacks]
    held_out = None if validation is None else _validation_arrays(net, loader, validation)
    if loader.automatic:
        plan_batches(net, loader, opt)
    history = History(batch_size=loader.batch_size)
    state = TrainingState(net, loader, opt, history, loader.epoch, opt.t)
    shown = display(progress, epochs, len(loader))
    with interruptible() as interrupted, shown as show, contextlib.suppress(StopTraining):
        for number in range(1, epochs + 1):
            _run_epoch(state, watchers, show, interrupted)
            if held_out is not None:
                _validate(net, history, *held_out)
            show.epoch(number, history)
            for watcher in watchers:
                watcher.on_epoch(state)
            _heed(interrupted, state)
    return history


def _run_epoch(state: TrainingState, watchers: list[Watcher], show: Display, interrupted: list[int]) -> None:
    net, opt, history = state.net, state.opt, state.history
    state.epoch = opt.epoch = state.loader.epoch
    started, total, samples = time.perf_counter(), 0.0, 0
    with contextlib.closing(iter(state.loader)) as batches:  # its thread ends here, however this is left
        for x, y in batches:
            x, y = _rows(x, state.loader), _rows(y, state.loader)
            try:
                loss, grads = net.loss_and_grad(x, y)
            except NonFiniteError as error:
                place = f"epoch {state.epoch}, step {opt.t}, learning rate {getattr(opt, 'lr', None)}"
                raise NonFiniteError(f"{error} ({place})") from None
            result = opt.step(grads)
            state.step = result.t
            history.step_loss.append(loss)
            if result.lr is not None:
                history.step_lr.append(result.lr)
            total += loss * len(x)
            samples += len(x)
            show.step(loss)
            for watcher in watchers:
                watcher.on_step(state)
            _heed(interrupted, state)
    history.loss.append(total / samples)
    history.seconds.append(time.perf_counter() - started)


def _heed(interrupted: list[int], state: TrainingState) -> None:
    """Act on a Ctrl-C that was noted, now that the parameters are whole."""
    if interrupted:
        message = f"interrupted in epoch {state.epoch} after step {state.step}; the model holds this last complete step"
        raise TrainingInterrupted(message, state.history)


def _validate(net: Network, history: History, X: Array, Y: Array) -> None:
    loss, accuracy = net.evaluate(X, Y)
    history.validation_loss.append(loss)
    if accuracy is not None:
        history.validation_accuracy.append(accuracy)


def plan_batches(net: Network, loader: Loader, opt: Optimizer) -> None:
    """Choose the batch size of an automatic loader with network and optimizer counted, and try a step of that size."""
    per_sample = -(-(net.memory(4097) - net.memory(1)) // 4096)  # the mean, since places are rounded up
    loader.replan(per_sample, net.memory(1) - per_sample + opt.memory())
    x, y = loader.peek()
    net.rehearse(_rows(x, loader), _rows(y, loader))


# --- checks --------------------------------------------------------------------------------------------------------


def _check_parts(net: Network, loader: Loader, opt: Optimizer) -> None:
    for name, value, kind in (("net", net, Network), ("loader", loader, Loader), ("opt", opt, Optimizer)):
        if not isinstance(value, kind):
            raise DTypeError(f"{name} must be a gpubatch.{kind.__name__}, got {type(value).__name__}")
    if loader.backend != net.backend:
        raise ArgumentError(
            f"loader is on {loader.backend.spec!r}, net on {net.backend.spec!r}; give both one backend="
        )
    if loader.dtype != net.dtype:
        raise ArgumentError(f"loader makes {loader.dtype} batches, net computes in {net.dtype}; give the loader dtype=")
    if not loader.labelled:
        raise ArgumentError("loader must have labels: Loader(X, Y), this one has X alone")
    if any(opt.params.get(name) is not p for name, p in net.parameters.items()):
        raise ArgumentError("opt must be bound to net.parameters, this one is bound to other arrays")


def _rows(array: Array, loader: Loader) -> Array:
    """Samples as rows, as a network takes them."""
    return array.T if loader.sample_axis == 1 and array.ndim == 2 else array


def _validation_arrays(net: Network, loader: Loader, validation: Any) -> tuple[Array, Array]:
    if not isinstance(validation, (tuple, list)) or len(validation) != 2:
        raise DTypeError(f"validation must be a pair (X, Y), got {type(validation).__name__}")
    X = loader.to_batch(validation[0], "validation[0]")
    Y = net.backend.asarray(validation[1])
    return _rows(X, loader), _rows(Y, loader)


# --- callbacks, Ctrl-C ---------------------------------------------------------------------------------------------


@dataclass
class Watcher:
    """A callback's two ends, each a function of the :class:`TrainingState`."""

    on_step: Callable[[TrainingState], Any]
    on_epoch: Callable[[TrainingState], Any]


def _watcher(callback: Any) -> Watcher:
    on_step, on_epoch = getattr(callback, "on_step", None), getattr(callback, "on_epoch", None)
    if on_step is None and on_epoch is None:
        if not callable(callback):
            raise DTypeError(f"a callback must be callable or have on_step or on_epoch, got {callback!r}")
        on_epoch = callback
    return Watcher(on_step or _ignore, on_epoch or _ignore)


def _ignore(state: TrainingState) -> None:
    pass


@contextlib.contextmanager
def interruptible() -> Iterator[list[int]]:
    """Note the first Ctrl-C in the list instead of raising it anywhere; a second one raises as usual.

    Only where Python's own handler is in place, in the main thread: a program that has its own keeps it.
    """
    noted: list[int] = []
    ours = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGINT) if ours else None
    if before is not signal.default_int_handler:
        yield noted
        return

    def note(number: int, frame: Any) -> None:
        noted.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    signal.signal(signal.SIGINT, note)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


# --- progress ------------------------------------------------------------------------------------------------------


class Display(Protocol):
    """What shows the progress."""

    def step(self, loss: float) -> None:
        """A step was made."""

    def epoch(self, number: int, history: History) -> None:
        """Epoch ``number``, counted from 1, is complete."""


@contextlib.contextmanager
def display(progress: bool, epochs: int, steps: int) -> Iterator[Display]:
    """A live bar in a terminal (where rich is installed), plain lines elsewhere, nothing without ``progress``.

    On standard error: standard output is for results.
    """
    if not progress or epochs == 0:
        yield _Silent()
    elif (bar := _rich_progress()) is not None:
        with bar:
            yield _Live(bar, epochs, steps)
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

    def __init__(self, bar: Any, epochs: int, steps: int) -> None:
        self.bar, self.epochs, self.steps = bar, epochs, steps
        self.done = 0
        self.task = bar.add_task(self._title(), total=epochs * steps, loss="")

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
