"""The training loop: epochs of mini-batches, validation, a history, a display of the progress."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gpubatch.backend import Array
from gpubatch.checkpoint import Checkpoints
from gpubatch.errors import (
    ArgumentError,
    CaptureWarning,
    CheckpointError,
    DataFormatError,
    GpubatchError,
    InsufficientMemoryError,
    check_bool,
    check_choice,
    check_int,
)
from gpubatch.loader import DeviceFeed, Loader
from gpubatch.nn import Network
from gpubatch.optim import Optimizer, StepResult
from gpubatch.train.callbacks import Watcher, ignored, watched
from gpubatch.train.captured import Queue
from gpubatch.train.checks import HeldOut, as_rows, check_parts, validation_arrays, why_not_captured
from gpubatch.train.display import Display, _Silent, display
from gpubatch.train.eager import Guard, warn_caller
from gpubatch.train.graphs import CapturedSteps, GivenArrays, like
from gpubatch.train.history import History, StopTraining, TrainingInterrupted, TrainingState, TrainingTerminated
from gpubatch.train.ledger import AHEAD
from gpubatch.train.loss_scale import LossScale
from gpubatch.train.memory import lack, settle_batches
from gpubatch.train.resume import check_same_network, describe_network, opened
from gpubatch.train.signals import interruptible

__all__ = ["EXECUTIONS", "fit"]

EXECUTIONS = ("auto", "eager", "captured")


def fit(
    net: Network,
    loader: Loader,
    opt: Optimizer,
    epochs: int = 10,
    validation: tuple[Any, Any] | None = None,
    callbacks: Iterable[Any] = (),
    checkpoint: str | os.PathLike[str] | Checkpoints | None = None,
    resume: bool = False,
    progress: bool = True,
    max_norm: float | None = None,
    max_skipped: int = 10,
    execution: str = "auto",
    loss_scale: LossScale | None = None,
) -> History:
    """Train ``net`` on the batches of ``loader`` with ``opt``, which must be bound to ``net.parameters``.

    ``validation`` is (X, Y), converted as the loader converts its own; loss and accuracy on it are measured after every
    epoch. A callback is called with the :class:`TrainingState` after every epoch; one with methods ``on_step`` or
    ``on_epoch`` has these called instead. A loader with ``batch_size="auto"`` gets its final batch size here, where
    network and optimizer are known, and one step of that size is tried before the first epoch.

    ``checkpoint`` is a folder, or :class:`~gpubatch.checkpoint.Checkpoints` with one: the run is saved there after
    every epoch or every so many steps, and at its end. ``resume=True`` goes on from the newest one, or from the start
    where there is none yet, so that a run that was killed ends as if it had not been: the same parameters and the same
    history, but for ``seconds``. ``epochs`` then counts from the run's first epoch, the hyper-parameters are those that
    were saved. Callbacks with ``state_dict`` and ``load_state_dict`` are saved too; others begin anew. Another network,
    another optimizer or other batches are refused.

    ``max_norm`` bounds the norm over all gradients. A step whose loss or gradient is not finite is left out: it leaves
    parameters, running statistics and optimizer as they were, ``history.skipped`` counts it, and the first one gives a
    :class:`SkippedStepWarning`. After ``max_skipped`` in a row the next one raises :class:`NonFiniteError`.

    A network with ``precision="mixed"`` takes a loader with ``dtype="float16"`` and an optimizer with
    ``master_weights=True``. Its gradients are those of the loss times ``loss_scale``, by default
    :class:`~gpubatch.train.LossScale` as it comes; ``max_norm`` is for them without it. A step whose gradient
    overflows at a scale above 1 is left out like others, but only lowers the scale: ``history.overflows`` counts it.

    Where memory runs out, what can be is given back, and from that batch on half as many samples are computed at a time
    (``micro_batch_size`` of :meth:`Network.loss_and_grad`), as often as it takes: batches and updates stay the same, no
    sample is lost, and a :class:`MicroBatchWarning` says so. Where not even one sample can be computed at a time, it
    raises :class:`InsufficientMemoryError`.

    On a GPU, steps are captured as CUDA graphs and replayed where that can be: nvmath-python is there, samples are
    rows, no callback looks at every step, and all that a step may call is gpubatch's own: no layer is yours,
    no method of network, optimizer, loader or loss scale was overridden or replaced. The host then reads the losses
    some steps later. The numbers are those of eager steps, and what is not finite, memory that runs out and checkpoints
    are dealt with alike. ``execution="eager"`` makes no graphs, ``"captured"`` raises ArgumentError
    where there can be none.

    Ctrl-C and SIGTERM let the step finish, save the run if there is a ``checkpoint``, and raise
    :class:`TrainingInterrupted`, a KeyboardInterrupt, or :class:`TrainingTerminated`, a SystemExit; both have the
    history.
    """
    check_int("epochs", epochs, 0)
    check_bool("progress", progress)
    check_choice("execution", execution, EXECUTIONS)
    check_parts(net, loader, opt)
    # What outlives the run, like the parameters, may be used on the caller's stream afterwards.
    with net.backend.own_stream():
        guard = Guard(net, opt, max_norm, max_skipped, loss_scale)
        watchers = [watched(callback) for callback in callbacks]
        held_out = None if validation is None else validation_arrays(net, loader, validation)
        store = opened(checkpoint, check_bool("resume", resume))
        state = TrainingState(net, loader, opt, History(), loader.epoch, opt.t)
        run = Run(state, Part(), guard, watchers, store, execution)
        if resume and store is not None and (found := store.newest()) is not None:
            run.restore(*found)
        settle_batches(net, loader, opt, held_out, run.captures)
        state.history.batch_size = loader.batch_size
        done = len(state.history.loss)
        shown = display(progress, epochs, len(loader), done * len(loader) + run.part.batches)
        with run.saved(), guard.scaling():
            with interruptible() as run.noted, shown as run.show:
                with contextlib.suppress(StopTraining):
                    for number in range(done + 1, epochs + 1):
                        run.batches()
                        run.close_epoch(number, held_out)
                run.save()
            run.heed()  # a signal that came after the last look
    return state.history


@dataclass
class Part:
    """The epoch that is running: what must be known of it to go on in its middle.

    ``batches`` counts those that the loader gave, ``samples`` those that were learnt from, whose costs make ``total``.
    """

    epoch: int = 0
    batches: int = 0
    samples: int = 0
    total: float = 0.0
    seconds: float = 0.0


class Run:
    """A run of :func:`fit`: its state, the epoch that is running, and what watches, shows, saves and interrupts it."""

    def __init__(
        self,
        state: TrainingState,
        part: Part,
        guard: Guard,
        watchers: list[Watcher],
        store: Checkpoints | None,
        execution: str = "auto",
    ) -> None:
        self.state, self.part, self.guard, self.watchers, self.store = state, part, guard, watchers, store
        self.execution = execution
        self.show: Display = _Silent()
        self.noted: list[int] = []  # signals
        self._seconds: Callable[[], float] = lambda: 0.0  # of the epoch so far
        self._disagreed = ""  # how captured steps did not agree with eager ones
        self._unsaved = False  # whether anything was done since the last checkpoint
        self._saved_at = state.opt.t

    # --- an epoch ---

    def batches(self) -> None:
        """Go through the batches of an epoch, or through those that remain of it."""
        state, part, loader = self.state, self.part, self.state.loader
        if part.batches == 0:
            part.epoch = loader.epoch
        state.epoch = state.opt.epoch = part.epoch
        if part.batches and loader.state_dict()["batch"] == 0:
            return  # saved after the last batch: the loader is at the next epoch already
        while (failure := self._until_memory_ends()) is not None:
            self.guard.halve(failure, state)
            self._go_back()

    def _go_back(self) -> None:
        """Have the loader begin with the batch after those that were learnt from."""
        part, loader = self.part, self.state.loader
        loader.load_state_dict({**loader.state_dict(), "epoch": part.epoch, "batch": part.batches})

    def _until_memory_ends(self) -> str | None:
        """Go through the batches; None at the end of the epoch, or for what there was no memory, in words."""
        before, started = self.part.seconds, time.perf_counter()
        self._seconds = lambda: before + time.perf_counter() - started
        try:
            steps = self._captured_steps()
            if steps is None:
                self._eagerly()
            elif isinstance(steps.feed, DeviceFeed):
                self._replayed(steps, steps.feed)
            else:
                self._handed_over(steps)
            if self._disagreed and self.part.batches < len(self.state.loader):
                self._go_back()
                self._captured_steps()  # which there are none of any more
                self._eagerly()
            return None
        except InsufficientMemoryError:
            raise  # smaller parts would not help
        except MemoryError as error:
            # No array of the batch that failed is held any more when this is left: the traceback would.
            return lack(error)

    def _eagerly(self) -> None:
        """Step by step, each looked at before the next one."""
        loader = self.state.loader
        with contextlib.closing(iter(loader)) as batches:  # its thread ends here, however this is left
            while (batch := next(batches, None)) is not None:
                x, y = (as_rows(array, loader) for array in batch)
                rows, (loss, result) = len(x), self.guard.step(x, y, self.state)
                del batch, x, y  # before the next one is waited for
                self._note(loss, result, rows)
                if result is not None:
                    for watcher in self.watchers:
                        watcher.on_step(self.state)
                self._look_up()

    def _replayed(self, steps: CapturedSteps, feed: DeviceFeed) -> None:
        """By graphs that gather their batches, and looked at later."""
        part, loader = self.part, self.state.loader
        with loader.fed_by(feed) as used, self._queue(steps) as queue:
            while part.batches < len(loader) and not self._disagreed:
                if not self.noted:
                    queue.fill(self._room())
                if part.batches + queue.in_flight == len(loader):
                    loader.foresee()
                used(self._read(queue))
                if queue.halted:
                    self._again(queue, *queue.batch())
                    used(1)
                if not queue.in_flight:
                    self._look_up()

    def _handed_over(self, steps: CapturedSteps) -> None:
        """By graphs on batches of the loader, which are kept until their steps are known to have been applied."""
        part, loader = self.part, self.state.loader
        kept = deque[list[Array]]()
        with contextlib.closing(iter(loader)) as batches, self._queue(steps) as queue:
            while part.batches < len(loader) and not self._disagreed:
                while not self.noted and len(kept) < min(AHEAD, self._room()):
                    kept.append(next(batches))
                while queue.in_flight < len(kept) and queue.hand(*kept[queue.in_flight]):
                    pass
                for _ in range(self._read(queue)):
                    kept.popleft()
                if queue.halted:
                    self._again(queue, *kept.popleft())
                if not kept:
                    self._look_up()
            if part.batches == len(loader):
                next(batches, None)  # which takes the loader to its next epoch

    @contextlib.contextmanager
    def _queue(self, steps: CapturedSteps) -> Iterator[Queue]:
        """The steps of the epoch. However it is left, all that were applied are noted."""
        loader = self.state.loader
        queue = Queue(steps, self.part.batches, loader.size_of, self.state.history.micro_batch_size)
        try:
            yield queue
        finally:
            while queue.in_flight:
                self._read(queue)

    def _read(self, queue: Queue) -> int:
        """Note the steps that were queued first, when they are over; how many were applied."""
        made = queue.read()
        for step in made:
            self._note(step.loss, StepResult(True, self.state.step + 1, step.lr), step.rows)
        if made:
            self.guard.applied(len(made))
        return len(made)

    def _again(self, queue: Queue, x: Array, y: Array) -> None:
        """The step that halted, eagerly: that tells what is wrong with it."""
        loss, result = self.guard.step(x, y, self.state)
        self._note(loss, result, len(x))
        if result is None or self.guard.careful:
            queue.go_on(self.part.batches)
            return
        self.guard.captured = None
        self._disagreed = "a captured step was not finite, and the same step made eagerly was"
        text = f"{self._disagreed} (epoch {self.state.epoch}, step {result.t}); the run goes on with eager steps"
        warn_caller(text, CaptureWarning)

    @property
    def captures(self) -> bool:
        """Whether steps are to be captured, unless CUDA refuses it."""
        return not self._plainly_eager and not self._why_eager()

    @property
    def _plainly_eager(self) -> bool:
        """Whether nobody expects anything else."""
        return self.execution == "eager" or (self.execution == "auto" and self.state.net.backend.name == "cpu")

    def _why_eager(self) -> str:
        """Why steps cannot be captured, in words; empty where they can."""
        scale = [] if self.guard.scale is None else [self.guard.scale]
        why = self._disagreed or why_not_captured(self.state.net, self.state.loader, self.state.opt, *scale)
        looking = next((watcher.callback for watcher in self.watchers if watcher.on_step is not ignored), None)
        return f"callback {looking!r} looks at every step" if not why and looking is not None else why

    def _captured_steps(self) -> CapturedSteps | None:
        """The steps as graphs, those of the epoch before if there are any; None where they are run eagerly."""
        net, loader, opt, guard = self.state.net, self.state.loader, self.state.opt, self.guard
        if self._plainly_eager:
            self.state.history.execution = "eager"  # a run that is resumed may have been captured
            return None
        if guard.captured is not None and not guard.captured.fits(opt):
            guard.captured = None
        if not (why := self._why_eager()):
            if guard.captured is None:
                feed = loader.device_feed() or GivenArrays(*like(loader.peek()))
                guard.captured = CapturedSteps(net, opt, feed, guard.max_norm)
            captured, most = guard.captured, self.state.history.micro_batch_size
            try:
                captured.prepare(loader.batch_size, most, len(loader) if isinstance(captured.feed, DeviceFeed) else 1)
                captured.prepare(loader.last_size, most, 1)
                self.state.history.execution = "captured"
                return captured
            except RuntimeError as error:  # also of CuPy: what CUDA refuses to capture
                why = f"the capture failed: {error}"
        guard.captured = None
        if self.execution == "captured":
            raise ArgumentError(f"execution must be 'auto' or 'eager' here, got 'captured': {why}")
        self.state.history.execution = f"eager, since {why}"
        return None

    def _note(self, loss: float, result: StepResult | None, rows: int) -> None:
        """What became of a batch of so many samples."""
        self._unsaved = True
        self.part.batches += 1
        if result is not None:
            self._count(loss, result, rows)
        self.part.seconds = self._seconds()
        self.show.step(loss)

    def _room(self) -> int:
        """Steps that may be queued: until the end of the epoch, or until the run is saved or the loss scale changes."""
        room = len(self.state.loader) - self.part.batches
        if self.store is not None and self.store.every is not None:
            room = min(room, max(1, self.store.every - (self.state.step - self._saved_at)))
        return room if self.guard.scale is None else min(room, self.guard.scale.room)

    def _look_up(self) -> None:
        """Between two steps: is the run to be saved, or to end?"""
        if self.store is not None and self.store.every and self.state.step - self._saved_at >= self.store.every:
            self.save()
        self.heed()

    def _count(self, loss: float, result: StepResult, samples: int) -> None:
        history = self.state.history
        self.state.step = result.t
        history.step_loss.append(loss)
        if result.lr is not None:
            history.step_lr.append(result.lr)
        self.part.total += loss * samples
        self.part.samples += samples

    def close_epoch(self, number: int, held_out: HeldOut | None) -> None:
        """What comes after the last batch of epoch ``number``, counted from 1."""
        history, part = self.state.history, self.part
        history.loss.append(part.total / part.samples if part.samples else math.nan)
        history.seconds.append(part.seconds)
        if self.guard.scale is not None:
            history.loss_scale.append(self.guard.scale.value)
        self.part = Part()
        self._unsaved = True
        if held_out is not None:
            self.guard.validate(held_out.X, held_out.Y, self.state)
        self.show.epoch(number, history)
        for watcher in self.watchers:
            watcher.on_epoch(self.state)
        if self.store is not None and self.store.every is None:
            self.save()
        self.heed()

    # --- its checkpoints ---

    def save(self) -> None:
        """Save the run as it is now, if it is to be saved and anything was done since it last was."""
        if self.store is None or not self._unsaved:
            return
        net, loader, opt = self.state.net, self.state.loader, self.state.opt
        history = {
            # Lists grow with the run: arrays hold them exactly, and in less space than text.
            name: np.array(value, np.float64) if isinstance(value, list) else value
            for name, value in vars(self.state.history).items()
        }
        saved = {
            "network": net.state_dict(),
            "optimizer": opt.state_dict(),
            "loader": loader.state_dict(),
            "description": describe_network(net),
            "plan": dataclasses.asdict(loader.plan),
            "history": history,
            "part": dataclasses.asdict(self.part),
            "skipped_in_a_row": self.guard.in_a_row,
            "loss_scale": None if self.guard.scale is None else self.guard.scale.state_dict(),
            "callbacks": [callback.state_dict() for callback in self._stateful()],
        }
        self._saved_at = opt.t
        self._unsaved = not self.store.save(saved)

    def _stateful(self) -> list[Any]:
        callbacks = (watcher.callback for watcher in self.watchers)
        return [c for c in callbacks if hasattr(c, "state_dict") and hasattr(c, "load_state_dict")]

    def restore(self, path: Path, saved: Mapping[str, Any]) -> None:
        """Go to where the checkpoint ``path`` was saved; all stays as it is if it is refused."""
        net, loader, opt = self.state.net, self.state.loader, self.state.opt
        before = net.state_dict()
        try:
            check_same_network(saved["description"], describe_network(net))
            copy.copy(loader).load_state_dict(saved["loader"])  # whether it would
            history = {
                name: value.tolist() if isinstance(value, np.ndarray) else value
                for name, value in saved["history"].items()
            }
            self.state.history, self.part = History(**history), Part(**saved["part"])
            self.guard.in_a_row = saved["skipped_in_a_row"]
            callbacks = self._stateful()
            if len(saved["callbacks"]) != len(callbacks):
                raise ArgumentError(
                    f"it has the state of {len(saved['callbacks'])} callbacks, of those given now {len(callbacks)} "
                    "have state_dict and load_state_dict"
                )
            net.load_state_dict(saved["network"])
            opt.load_state_dict(saved["optimizer"])
            loader.load_state_dict(saved["loader"])
            if self.guard.scale is not None:
                self.guard.scale.load_state_dict(saved["loss_scale"])
            for callback, state in zip(callbacks, saved["callbacks"], strict=True):
                callback.load_state_dict(state)
        except Exception as error:
            net.load_state_dict(before)
            if isinstance(error, GpubatchError):
                raise type(error)(f"{path} cannot be resumed here: {error}") from error
            raise DataFormatError(f"{path} was not saved by fit: {error!r}") from error
        self.state.step = self._saved_at = opt.t

    @contextlib.contextmanager
    def saved(self) -> Iterator[None]:
        """In the end, let what is still being written be complete; an error that ends the run comes before its own."""
        try:
            yield
        except BaseException:
            with contextlib.suppress(CheckpointError):
                self._wait()
            raise
        self._wait()

    def _wait(self) -> None:
        if self.store is not None:
            self.store.wait()

    def heed(self) -> None:
        """Act on a signal that was noted, now that the parameters are whole."""
        if not self.noted:
            return
        number, state = self.noted[0], self.state
        verb = "terminated" if number == signal.SIGTERM else "interrupted"
        message = f"{verb} in epoch {state.epoch} after step {state.step}; the model holds this last complete step"
        if self.store is not None:
            try:
                self.save()
                if self.store.wait() and not self._unsaved:
                    message += f", and so does the newest checkpoint in {self.store.folder}"
            except CheckpointError as error:
                message += f"; {error}"
        kind = TrainingTerminated if number == signal.SIGTERM else TrainingInterrupted
        raise kind(message, state.history)
