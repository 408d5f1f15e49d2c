"""Callbacks that write down each epoch: to a CSV file, to TensorBoard, by the logging module."""

from __future__ import annotations

import csv
import io
import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gpubatch.errors import ArgumentError, DTypeError, check_bool, check_int
from gpubatch.train.history import TrainingState


def columns_of(state: TrainingState) -> list[str]:
    """The names of what :func:`row_of` gives."""
    return ["epoch", "step", *state.monitors, "lr", "seconds"]


def row_of(state: TrainingState) -> list[float | None]:
    """An epoch, counted from 1: the steps until its end, its numbers, the last learning rate if there is one."""
    history = state.history
    rate = history.step_lr[-1] if history.step_lr else None
    return [state.epoch + 1, state.step, *(history.last(x) for x in state.monitors), rate, history.seconds[-1]]


class CSVLog:
    """Writes a row for every epoch to a CSV file, each as soon as its epoch is complete.

    path: the file; a folder that is not there is an error before the first step, and so is a file that is not empty,
        unless the run is resumed

    The columns are epoch, counted from 1, step, loss, what there is of validation, lr and seconds, the numbers with all
    their digits. A resumed run writes the rows of its checkpoint anew: rows of epochs that a killed run made after it
    are replaced, not doubled. A disk that is full ends the run with an OSError that names the file.

    >>> gb.fit(net, loader, opt, callbacks=[gb.CSVLog("run.csv")])  # doctest: +SKIP
    """

    once = True

    def __init__(self, path: str | os.PathLike[str]) -> None:
        if not isinstance(path, (str, os.PathLike)):
            raise DTypeError(f"path must be the path of a file, got {path!r}")
        self.path = Path(os.path.expanduser(path))
        self._columns: list[str] = []
        self._rows: list[list[float | None]] = []

    def __repr__(self) -> str:
        return f"CSVLog({str(self.path)!r})"

    def on_start(self, state: TrainingState) -> None:
        """Write the rows so far, none in a new run."""
        columns = columns_of(state)
        if self._rows and self._columns != columns:
            raise ArgumentError(f"{self.path} has the columns {', '.join(self._columns)}, now {', '.join(columns)}")
        if not (state.resumed or self._rows) and self.path.exists() and self.path.stat().st_size:
            raise ArgumentError(f"{self.path} has a log: take another path, remove it, or go on with resume=True")
        self._columns = columns
        if self.path.exists() and not self.path.is_file():  # such as a pipe, whose place no file may take
            self._write(self.path, "w", [columns, *self._rows])
            return
        beside = self.path.with_name(self.path.name + ".new")
        self._write(beside, "w", [columns, *self._rows])
        beside.replace(self.path)  # whole, whenever the process is killed

    def on_epoch(self, state: TrainingState) -> None:
        """Add a row."""
        self._rows.append(row_of(state))
        self._write(self.path, "a", self._rows[-1:])

    def state_dict(self) -> dict[str, Any]:
        """For checkpoints: the rows."""
        return {"columns": self._columns, "rows": self._rows}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave."""
        self._columns, self._rows = list(state["columns"]), [list(row) for row in state["rows"]]

    def _write(self, path: Path, mode: str, rows: list[Any]) -> None:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(rows)
        try:
            with open(path, mode, encoding="utf-8", newline="") as file:
                file.write(text.getvalue())
        except OSError as error:  # a full disk does not say which file it was
            raise OSError(error.errno, error.strerror, str(self.path)) from error


class Logging:
    """Logs a line for every epoch by the standard library's logging.

    logger: a logger, or the name of one; by default "gpubatch"
    level: the level of the lines

    The numbers are in the record too, as a dictionary ``record.epoch``. An epoch that a killed run made after its last
    checkpoint is made again when it is resumed, and logged again: a line that is with its handlers cannot be taken
    back. It has the same epoch, step and numbers; :class:`CSVLog` and :class:`TensorBoard` have each epoch once.

    >>> gb.fit(net, loader, opt, callbacks=[gb.Logging()], progress=False)  # doctest: +SKIP
    """

    once = True

    def __init__(self, logger: logging.Logger | str | None = None, level: int = logging.INFO) -> None:
        if logger is not None and not isinstance(logger, (str, logging.Logger)):
            raise DTypeError(f"logger must be a logging.Logger or its name, got {logger!r}")
        self.logger = logger if isinstance(logger, logging.Logger) else logging.getLogger(logger or "gpubatch")
        self.level = check_int("level", level, 0)

    def on_epoch(self, state: TrainingState) -> None:
        """Log it."""
        row = dict(zip(columns_of(state), row_of(state), strict=True))
        words = ", ".join(f"{name} {value:.6g}" for name, value in row.items() if value is not None)
        self.logger.log(self.level, "%s", words, extra={"epoch": row})


class TensorBoard:
    """Writes the curves of a run for TensorBoard: loss and learning rate of every step, the numbers of every epoch.

    folder: where the event files go, one folder for each run
    steps: False leaves the curves of steps out

    Needs tensorboardX: ``pip install 'gpubatch[tensorboard]'``. All is written, and flushed, after each epoch, so that
    steps may be captured. A resumed run begins a file that has TensorBoard discard what a killed one had written beyond
    the checkpoint: no point is doubled or lost.

    >>> gb.fit(net, loader, opt, callbacks=[gb.TensorBoard("runs/a")])  # doctest: +SKIP
    """

    once = True

    def __init__(self, folder: str | os.PathLike[str], steps: bool = True) -> None:
        if not isinstance(folder, (str, os.PathLike)):
            raise DTypeError(f"folder must be the path of a folder, got {folder!r}")
        self.folder, self.steps = Path(os.path.expanduser(folder)), check_bool("steps", steps)
        self._written = 0  # steps of the history
        self._writer: Any = None

    def __repr__(self) -> str:
        return f"TensorBoard({str(self.folder)!r})"

    def on_start(self, state: TrainingState) -> None:
        """Begin a file of events."""
        try:
            # Not its SummaryWriter, whose thread may not yet have written what was given to it when it is flushed.
            from tensorboardX.event_file_writer import EventsWriter
            from tensorboardX.proto.event_pb2 import SessionLog
        except ImportError:
            raise ArgumentError("TensorBoard needs tensorboardX: pip install 'gpubatch[tensorboard]'") from None
        if not state.resumed:
            self._written = 0
        self.folder.mkdir(parents=True, exist_ok=True)
        # By default two files of one second have one name, and the second replaces the first.
        self._writer = EventsWriter(str(self.folder / "events"), f".{time.time_ns()}")
        if state.resumed:
            first = state.step - len(state.history.step_loss) + self._written + 1
            self._write(first, session_log=SessionLog(status=SessionLog.START))

    def on_epoch(self, state: TrainingState) -> None:
        """Write what came since the epoch before."""
        history = state.history
        before = state.step - len(history.step_loss)
        if self.steps:
            for name, values in (("loss", history.step_loss), ("lr", history.step_lr)):
                for i in range(self._written, len(values)):
                    self._point(f"step/{name}", values[i], before + i + 1)
        for name in (*state.monitors, "seconds"):
            self._point(f"epoch/{name}", history.last(name), state.step)
        self._written = len(history.step_loss)
        self._writer.flush()

    def on_exit(self, state: TrainingState) -> None:
        """Close the file."""
        self._writer.close()

    def _point(self, tag: str, value: float, step: int) -> None:
        from tensorboardX.summary import scalar

        self._write(step, summary=scalar(tag, value))

    def _write(self, step: int, **content: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self._writer.write_event(Event(wall_time=time.time(), step=step, **content))

    def state_dict(self) -> dict[str, Any]:
        """For checkpoints: how many steps are written."""
        return {"written": self._written}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave."""
        self._written = check_int("state['written']", state["written"], 0)
