"""What a run did and where it is, and the ways in which it ends early."""

from __future__ import annotations

import dataclasses
import signal
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gpubatch.averages import ewma
from gpubatch.loader import Loader
from gpubatch.nn import Network
from gpubatch.optim import Optimizer

__all__ = ["History", "StopTraining", "TrainingInterrupted", "TrainingState", "TrainingTerminated"]


@dataclass
class History:
    """What a run did: ``step_loss`` and ``step_lr`` have one number a step, the other lists one an epoch.

    ``step_lr`` is empty where the rule has no learning rate. ``skipped`` counts the steps that were left out, which are
    in no list; nor are ``overflows``, those that a loss scale left out to find its size. ``loss_scale`` is what it was
    at the end of each epoch, empty where the network has none.

    ``loss`` is the mean of the epoch's mini-batch costs, weighted by their samples; ``seconds`` leaves the validation
    out. ``validation_accuracy`` is empty where the loss has no classes. ``execution`` says how the steps of the last
    epoch were run: "captured"; "eager", on a CPU or because that was asked for; or "eager, since ..." and why.
    ``micro_batch_size`` is how many samples of a batch are computed at a time since memory ran out, None if it did not.
    """

    step_loss: list[float] = field(default_factory=list)
    step_lr: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    validation_loss: list[float] = field(default_factory=list)
    validation_accuracy: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    loss_scale: list[float] = field(default_factory=list)
    batch_size: int = 0
    micro_batch_size: int | None = None
    skipped: int = 0
    overflows: int = 0
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


class TrainingTerminated(SystemExit):
    """SIGTERM during :func:`fit`, otherwise as :class:`TrainingInterrupted`; ends the program with exit code 143."""

    def __init__(self, message: str, history: History) -> None:
        SystemExit.__init__(self, 128 + signal.SIGTERM)
        self.message, self.history = message, history

    def __str__(self) -> str:
        return self.message
