"""What a run did, what its callbacks see, and the ways to end it early."""

from __future__ import annotations

import dataclasses
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gpubatch.averages import ewma
from gpubatch.errors import ArgumentError, no_attribute
from gpubatch.loader import Loader
from gpubatch.nn import Network
from gpubatch.optim import Optimizer
from gpubatch.series import Series
from gpubatch.shown import Shown


@dataclass(repr=False)
class History(Shown):
    """What a run did. A list has one number per epoch, ``step_loss`` and ``step_lr`` one per applied step.

    These two take 8 bytes a number. They index, slice, append, compare and iterate as lists do; ``np.asarray`` makes an
    array of them, and ``tolist()`` a list, for JSON or tables.

    step_loss: the cost of the mini-batch
    step_lr: the learning rate; empty if the rule has none
    loss: the mean of the epoch's mini-batch costs, weighted by their samples
    validation_loss: the loss on the validation set
    validation_accuracy: the accuracy on it; empty if the loss has no classes
    metrics: a list for each of the ``metrics`` that ``fit`` was given, on the validation set, by name; NaN for epochs
        before it was given
    seconds: the time of the epoch without validation
    loss_scale: the loss scale at the end of the epoch; empty if the network has none
    batch_size: samples in a batch
    micro_batch_size: how many of them are computed at a time since memory ran out; None if it did not
    skipped: how many steps were left out because their loss or gradient was not finite
    overflows: how many steps were left out because the gradient overflowed at that loss scale
    execution: how the steps of the last epoch were run: "captured"; "eager", on a CPU or on request; or "eager, since
        ..." with the reason

    >>> X, Y = np.random.default_rng(0).random((400, 3)), np.arange(400) % 2
    >>> net = gb.mlp([3, 4, 2], seed=0)
    >>> opt = gb.Adam(net.parameters)
    >>> history = gb.fit(net, gb.Loader(X, Y, batch_size=4), opt, epochs=2, progress=False)
    >>> len(history.step_loss), len(history.loss)
    (200, 2)
    """

    step_loss: Series = field(default_factory=Series)
    step_lr: Series = field(default_factory=Series)
    loss: list[float] = field(default_factory=list)
    validation_loss: list[float] = field(default_factory=list)
    validation_accuracy: list[float] = field(default_factory=list)
    metrics: dict[str, list[float]] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    loss_scale: list[float] = field(default_factory=list)
    batch_size: int = 0
    micro_batch_size: int | None = None
    skipped: int = 0
    overflows: int = 0
    execution: str = "eager"

    def __post_init__(self) -> None:
        self.step_loss, self.step_lr = Series.of(self.step_loss), Series.of(self.step_lr)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(no_attribute(self, name, {"history": "history.loss, for one", "lr": "history.step_lr"}))

    def smoothed(self, beta: float = 0.9) -> np.ndarray:
        """The cost of each step as an exponentially weighted average over about 1/(1-beta) steps."""
        return np.asarray(ewma(self.step_loss, beta))

    def last(self, name: str) -> float:
        """The number of the last epoch by its name, that of a metric after "validation_": "validation_f1"."""
        metric = self.metrics.get(name.removeprefix("validation_"))
        values: Sequence[float] = getattr(self, name) if metric is None or hasattr(self, name) else metric
        return values[-1]

    def to_dict(self) -> dict[str, Any]:
        """The history as JSON can hold it, in plain lists."""
        found = dataclasses.asdict(self)
        return {name: value.tolist() if isinstance(value, Series) else value for name, value in found.items()}


# What people assign to the state, and what does what they mean.
STOP, RATE = "raise gb.StopTraining() to end the run", "assign state.opt.lr"
IN_VAIN = {
    **dict.fromkeys(("stop", "stopped", "should_stop", "stop_training", "done"), STOP),
    **dict.fromkeys(("lr", "learning_rate"), RATE),
    "grads": "on_gradient(state, grads) may change the gradients, in place",
    "loss": "on_gradient(state, grads) may change the gradients",
    "batch_size": "a loader's batch size is that of the run",
}
# Where the state has what it is asked for.
FOUND_AT = {
    "loss": "state.history.loss, and of every step state.history.step_loss",
    **dict.fromkeys(("logs", "metrics", "validation_loss", "validation_accuracy"), "state.history"),
    "grads": "those of on_gradient(state, grads), or state.net.parameters.grads",
    **dict.fromkeys(("lr", "learning_rate"), "state.opt.lr"),
    **dict.fromkeys(("model", "network"), "state.net"),
    "optimizer": "state.opt",
    "batch_size": "state.loader.batch_size",
    "parameters": "state.net.parameters",
}


@dataclass
class TrainingState:
    """What a callback sees: network, loader, optimizer and history, the current epoch, and all steps made so far.

    monitors: the names of the numbers that the history has for every epoch of this run
    resumed: whether :func:`fit` was called with ``resume=True``
    note: shows a line where the run shows its progress
    rank: which of the run's processes this is; 0 writes files and shows the progress
    """

    net: Network
    loader: Loader
    opt: Optimizer
    history: History
    epoch: int
    step: int
    monitors: tuple[str, ...] = ("loss",)
    resumed: bool = False
    note: Callable[[str], None] = field(default=lambda text: None, repr=False)
    rank: int = 0

    def __setattr__(self, name: str, value: Any) -> None:
        if name in IN_VAIN:
            raise ArgumentError(f"state.{name} = {value!r} changes nothing: {IN_VAIN[name]}")
        object.__setattr__(self, name, value)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(no_attribute(self, name, FOUND_AT))


class StopTraining(Exception):  # noqa: N818  like StopIteration: not an error
    """Raise it in a callback to end the training after this step or epoch; its words, if any, are shown.

    >>> def stop(state):
    ...     raise gb.StopTraining("good enough")
    >>> gb.fit(net, loader, opt, epochs=100, callbacks=[stop])  # doctest: +SKIP
    """


class TrainingInterrupted(KeyboardInterrupt):
    """Ctrl-C during :func:`fit`: the model holds the last complete step, ``history`` the run until then."""

    def __init__(self, message: str, history: History) -> None:
        KeyboardInterrupt.__init__(self, message)
        self.message, self.history = message, history

    def __str__(self) -> str:
        return f"{self.message}; the history until then is .history of this error, in a REPL sys.last_value.history"

    def __reduce__(self) -> Any:
        return type(self), (self.message, self.history)


class TrainingTerminated(SystemExit):
    """SIGTERM or SIGHUP during :func:`fit`, otherwise like :class:`TrainingInterrupted`.

    It ends the program with the exit code 128 + ``number`` of the signal: 143 after SIGTERM, 129 after SIGHUP.
    """

    def __init__(self, message: str, history: History, number: int = signal.SIGTERM) -> None:
        SystemExit.__init__(self, 128 + number)
        self.message, self.history, self.number = message, history, number

    def __str__(self) -> str:
        return self.message

    def __reduce__(self) -> Any:
        return type(self), (self.message, self.history, self.number)
