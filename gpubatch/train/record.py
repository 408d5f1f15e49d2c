"""The record of a run: its history, and its progress within the current epoch."""

from __future__ import annotations

import math
import sys
import time
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from gpubatch.errors import MicroBatchWarning, RankError, suggesting
from gpubatch.loader import epochs_of
from gpubatch.optim import StepResult, follow_pass
from gpubatch.train.display import Display, Silent
from gpubatch.train.history import History, TrainingState
from gpubatch.train.loss_scale import LossScale
from gpubatch.train.together import ALONE, Agreement


@dataclass
class EpochProgress:
    """Progress within the current epoch, enough to resume mid-epoch.

    ``batches`` counts those that the loader gave; ``samples`` those of applied steps, whose costs add up to ``total``.
    """

    epoch: int = 0
    batches: int = 0
    samples: int = 0
    total: float = 0.0
    seconds: float = 0.0


class Record:
    """What a run has done, and where it is.

    ``state`` is what callbacks see, ``scale`` the loss scale of a mixed network, ``epoch`` the progress within the
    current epoch, ``display`` shows it. ``skipped_in_a_row`` counts the steps left out since the last applied one,
    ``unsaved`` tells whether anything happened since the last checkpoint. ``together`` is what ranks agree by;
    ``signals`` are those that came to this process, and ``signalled`` tells whether a rank has said that it has one.
    """

    def __init__(self, state: TrainingState, scale: LossScale | None = None, together: Agreement = ALONE) -> None:
        self.state, self.scale, self.epoch = state, scale, EpochProgress()
        self.together = together
        self.signals: list[int] = []
        self.signalled = False
        self.display: Display = Silent()
        self.skipped_in_a_row = 0
        self.unsaved = False
        self._started = 0.0  # when the current epoch would have begun, had it never been interrupted
        self._halved = ""  # why fewer samples are computed at a time, until a step has shown that it was enough

    @property
    def history(self) -> History:
        """What callbacks see as ``state.history``."""
        return self.state.history

    @property
    def remaining(self) -> int:
        """Batches of the current epoch still to come."""
        return len(self.state.loader) - self.epoch.batches

    @property
    def place(self) -> str:
        """Epoch and step, for messages: both counted from 1, as the progress shows them."""
        return f"epoch {self.state.epoch + 1}, step {self.state.opt.t + 1}"

    # --- an epoch ---

    def begin_epoch(self) -> bool:
        """Begin an epoch, or go on in its middle; False if a checkpoint was saved after its last batch."""
        state = self.state
        if self.epoch.batches == 0:
            self.epoch.epoch = state.loader.epoch
        state.epoch = self.epoch.epoch
        if self.epoch.batches and not state.loader.state_dict()["batch"]:
            return False
        follow_pass(state.opt, epochs_of(state.loader).coming_pass())
        return True

    def start_clock(self) -> None:
        """Count the seconds of the epoch from here on."""
        self._started = time.perf_counter() - self.epoch.seconds

    def rewind(self) -> None:
        """Have the loader go on with the batch after those whose steps are noted."""
        loader = self.state.loader
        loader.load_state_dict({**loader.state_dict(), "epoch": self.epoch.epoch, "batch": self.epoch.batches})

    def note(self, loss: float, result: StepResult | None, samples: int) -> None:
        """Note the loss of a batch and its step, None if the step was left out."""
        self.unsaved = True
        self.epoch.batches += 1
        if result is not None:
            self.state.step = result.t
            self.history.step_loss.append(loss)
            if result.lr is not None:
                self.history.step_lr.append(result.lr)
            self.epoch.total += loss * samples
            self.epoch.samples += samples
        self.epoch.seconds = time.perf_counter() - self._started
        self.display.step(loss)

    def close_epoch(self) -> None:
        """Add the epoch to the history."""
        history, epoch = self.history, self.epoch
        history.loss.append(epoch.total / epoch.samples if epoch.samples else math.nan)
        history.seconds.append(self.together.share(epoch.seconds))
        if self.scale is not None:
            history.loss_scale.append(self.scale.value)
        self.epoch = EpochProgress()
        self.unsaved = True
        self.check_alike()

    def check_alike(self) -> None:
        """Raise RankError on all ranks unless they have the same parameters and running statistics."""
        net, together = self.state.net, self.together
        if not together.several:
            return
        flats = net.parameters.flat, net.buffers.flat
        every = together.all([zlib.crc32(net.backend.to_numpy(flat).data) for flat in flats])
        if others := [str(rank) for rank, mine in enumerate(every) if mine != every[0]]:
            which = f"rank {others[0]} has" if len(others) == 1 else f"ranks {', '.join(others)} have"
            raise together.alike(
                RankError(
                    f"{which} other parameters or running statistics than rank 0 after {self.state.opt.t} steps: a "
                    "callback changes weights, gradients or the learning rate on some ranks only, or their processors "
                    "or libraries compute updates otherwise"
                )
            )

    # --- memory that ran out ---

    def halved(self, rows: int, failure: str) -> None:
        """Compute ``rows`` samples at a time from here on, as memory ran out."""
        self.history.micro_batch_size = rows
        self._halved = self._halved or f"out of memory in {self.place}: {failure}"

    def warn_if_halved(self) -> None:
        """Warn that fewer samples are computed at a time, once that was enough."""
        if self._halved:
            size, rows = self.state.loader.batch_size, self.history.micro_batch_size
            text = f"{self._halved}; batches of {size} are computed {rows} samples at a time, gradients added up"
            self._halved = ""
            self.warn(text, MicroBatchWarning)

    def warn(self, text: str, category: type[Warning]) -> None:
        """Warn at the line that called :func:`fit`; with ranks, rank 0 warns."""
        if self.together.first:
            warn_caller(text, category)


class Between(Protocol):
    """What a run does between two steps, such as saving; called when all steps queued so far are noted."""

    def __call__(self) -> None:
        """Do what is due."""

    @property
    def room(self) -> int:
        """How many steps may be queued before the next call; 0 if it cannot wait."""


class Steps(Protocol):
    """A driver of steps: eager or captured."""

    def run(self, between: Between) -> str:
        """Make the remaining steps of the epoch; empty if it is complete, else why another driver must go on."""

    def release(self) -> None:
        """Let go of the memory that steps work in."""


def warn_caller(text: str, category: type[Warning]) -> None:
    """Warn of the line that called :func:`fit`."""
    level, frame = 1, sys._getframe()
    ours = Path(__file__).parent, Path(suggesting.__code__.co_filename)  # fit is called through a decorator
    while frame.f_back is not None and not {(path := Path(frame.f_code.co_filename)), path.parent}.isdisjoint(ours):
        level, frame = level + 1, frame.f_back
    warnings.warn(text, category, stacklevel=level)
