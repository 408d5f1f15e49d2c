"""The training loop: epochs of mini-batches, validation, a history, a display of the progress."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import gc
import math
import os
import re
import signal
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from gpubatch.averages import ewma
from gpubatch.backend import Array
from gpubatch.capture import AHEAD, CapturedSteps, GivenArrays, Queue, check_bound, like, why_eager
from gpubatch.checkpoint import Checkpoints
from gpubatch.errors import (
    ArgumentError,
    CaptureWarning,
    CheckpointError,
    DataFormatError,
    DTypeError,
    GpubatchError,
    InsufficientMemoryError,
    MicroBatchWarning,
    NonFiniteError,
    SkippedStepWarning,
    check_bool,
    check_choice,
    check_int,
    check_real,
)
from gpubatch.loader import DeviceFeed, Loader
from gpubatch.loss_scale import LossScale
from gpubatch.nn import EVALUATION_ROWS, Network, quiet
from gpubatch.ops import SQUARE_SUM_SIZE
from gpubatch.optim import MASTER, Optimizer, StepResult
from gpubatch.params import FlatViews

__all__ = ["EXECUTIONS", "History", "StopTraining", "TrainingInterrupted", "TrainingState", "TrainingTerminated", "fit"]

EXECUTIONS = ("auto", "eager", "captured")


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
    :class:`~gpubatch.loss_scale.LossScale` as it comes; ``max_norm`` is for them without it. A step whose gradient
    overflows at a scale above 1 is left out like others, but only lowers the scale: ``history.overflows`` counts it.

    Where memory runs out, what can be is given back, and from that batch on half as many samples are computed at a time
    (``micro_batch_size`` of :meth:`Network.loss_and_grad`), as often as it takes: batches and updates stay the same, no
    sample is lost, and a :class:`MicroBatchWarning` says so. Where not even one sample can be computed at a time, it
    raises :class:`InsufficientMemoryError`.

    On a GPU, steps are captured as CUDA graphs and replayed (:mod:`gpubatch.capture`) where that can be: nvmath-python
    is there, samples are rows, no callback looks at every step, and all that a step may call is gpubatch's own: no
    layer is yours, no method of network, optimizer, loader or loss scale was overridden or replaced. The host then
    reads the losses some steps later. The numbers are those of eager steps, and what is not finite, memory that runs
    out and checkpoints are dealt with alike. ``execution="eager"`` makes no graphs, ``"captured"`` raises ArgumentError
    where there can be none.

    Ctrl-C and SIGTERM let the step finish, save the run if there is a ``checkpoint``, and raise
    :class:`TrainingInterrupted`, a KeyboardInterrupt, or :class:`TrainingTerminated`, a SystemExit; both have the
    history.
    """
    check_int("epochs", epochs, 0)
    check_bool("progress", progress)
    check_choice("execution", execution, EXECUTIONS)
    _check_parts(net, loader, opt)
    # What outlives the run, like the parameters, may be used on the caller's stream afterwards.
    with net.backend.own_stream():
        guard = Guard(net, opt, max_norm, max_skipped, loss_scale)
        watchers = [_watcher(callback) for callback in callbacks]
        held_out = None if validation is None else _validation_arrays(net, loader, validation)
        store = _opened(checkpoint, check_bool("resume", resume))
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
                x, y = (_rows(array, loader) for array in batch)
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
        looking = next((watcher.callback for watcher in self.watchers if watcher.on_step is not _ignore), None)
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


def _opened(checkpoint: Any, resume: bool) -> Checkpoints | None:
    """Where to save, ready to be written to."""
    if checkpoint is None:
        if resume:
            raise ArgumentError("resume=True needs checkpoint=, the folder that has what to go on from")
        return None
    store = checkpoint if isinstance(checkpoint, Checkpoints) else Checkpoints(checkpoint)
    store.open()
    if not resume and store.files():
        # A new run would remove those of the old one, a few steps after another.
        raise ArgumentError(
            f"{store.folder} has checkpoints of another run: go on from them with resume=True, or take another folder"
        )
    return store


def describe_network(net: Network) -> dict[str, Any]:
    """What a network must share with another one to go on with its parameters, as JSON can hold it."""
    layers = {
        # The functions that a user's layer may hold are shown with an address, which is another one in every process.
        f"layer {i + 1}": re.sub(r" at 0x[0-9a-fA-F]+", "", repr(layer))
        for i, layer in enumerate(net.layers)
    }
    common = {"dtype": net.dtype.name, "precision": net.precision, "loss": net.loss_name, "l2": net.l2}
    return {**common, "seed": net.seed, "number of layers": len(layers), **layers}


def check_same_network(saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """An error that names the first thing in which two networks differ."""
    saved = {"precision": "full", **saved}  # in checkpoints of a time when there was no other
    for name, value in own.items():
        if saved[name] != value:
            raise ArgumentError(f"it is of a network whose {name} is {saved[name]}, this one's is {value}")


# --- a step --------------------------------------------------------------------------------------------------------


class Guard:
    """Makes the steps, and leaves out those whose loss or gradient is not finite.

    One pass over the gradients tells their norm, for ``max_norm``, and whether all of them are finite. Those of a mixed
    network are multiplied by ``scale``, which is lowered before anything else is said to be wrong with them.
    """

    def __init__(
        self,
        net: Network,
        opt: Optimizer,
        max_norm: float | None,
        max_skipped: int,
        loss_scale: LossScale | None = None,
    ) -> None:
        self.net, self.opt = net, opt
        self.max_norm = None if max_norm is None else check_real("max_norm", max_norm, 0.0, open_low=True)
        self.max_skipped = check_int("max_skipped", max_skipped, 0)
        self.in_a_row = 0
        self._squares = net.backend.zeros(SQUARE_SUM_SIZE, np.float64)
        self._control = net.backend.zeros(2, net.compute_dtype)
        self.scale: LossScale | None = None
        if loss_scale is not None and not isinstance(loss_scale, LossScale):
            raise DTypeError(f"loss_scale must be a gpubatch.LossScale, got {type(loss_scale).__name__}")
        if net.loss_scale is not None:
            self.scale = loss_scale or LossScale()
        elif loss_scale is not None:
            raise ArgumentError(f"loss_scale is for a network with precision='mixed', this one has {net.precision!r}")
        self._halved = ""  # why, until it is known that it was enough
        self.captured: CapturedSteps | None = None
        self.careful = False  # whether the last step was looked at afterwards

    def step(self, x: Array, y: Array, state: TrainingState) -> tuple[float, StepResult | None]:
        """The loss of a batch, and the step that was made; None for one that was left out."""
        self.net.remember()
        try:
            found = self._step(x, y, state)
        except MemoryError:
            self.net.recall()  # it will be made again
            raise
        self._warn_of_halves(state)
        return found

    def _step(self, x: Array, y: Array, state: TrainingState) -> tuple[float, StepResult | None]:
        try:
            loss, grads = self.net.loss_and_grad(x, y, state.history.micro_batch_size)
        except NonFiniteError as error:
            self._leave_out(str(error), state)
            return math.nan, None
        squares, not_finite = self._look_at(grads)
        if not_finite or not math.isfinite(squares):
            self.net.recall()  # that the gradient is not finite was found after they had changed
            if self.scale is not None and self.scale.overflow():
                self._write_scale(self.scale.value)
                state.history.overflows += 1
            else:
                self._leave_out(self._what_is_wrong(grads, not_finite), state)
            return loss, None
        control = self._clipping(math.sqrt(squares))
        self.careful = control is None and squares > float(np.finfo(self.net.compute_dtype).max)
        result = self._step_if_finite(grads, state) if self.careful else self.opt.step(grads, control)
        if result is not None:
            self.applied()
        return loss, result

    def applied(self, steps: int = 1) -> None:
        """Count steps that were made."""
        self.in_a_row = 0
        if self.scale is not None:
            before = self.scale.value
            self.scale.good(steps)
            if self.scale.value != before:
                self._write_scale(self.scale.value)

    @contextlib.contextmanager
    def scaling(self) -> Iterator[None]:
        """While it lasts, the network's gradients are scaled; those that a caller computes afterwards are not."""
        if self.scale is not None:
            self._write_scale(self.scale.value)
        try:
            yield
        finally:
            if self.scale is not None:
                self._write_scale(1.0)

    def _write_scale(self, value: float) -> None:
        with self.net.backend.scope():
            self.net.loss_scale.fill(value)

    def _step_if_finite(self, grads: FlatViews, state: TrainingState) -> StepResult | None:
        """A step on gradients whose squares may overflow, as Adam's would; taken back if something is infinite then."""
        xp, t = self.net.backend.xp, self.opt.t
        arrays = [self.net.parameters.flat, *(views.flat for views in self.opt.state.values())]
        with self.net.backend.scope(), quiet():
            before = [array.copy() for array in arrays]
            result = self.opt.step(grads)
            if all(xp.isfinite(array).all().item() for array in arrays):
                return result
            for array, values in zip(arrays, before, strict=True):
                array[...] = values
        self.net.recall()
        self.opt.t = t
        self._leave_out(f"the gradient is so large that {self.opt.rule.name} overflows {self.net.compute_dtype}", state)
        return None

    def validate(self, X: Array, Y: Array, state: TrainingState) -> None:
        """Loss and accuracy on the validation set, into the history."""
        while isinstance(found := self._evaluate(X, Y, state.history.micro_batch_size or EVALUATION_ROWS), str):
            self.halve(found, state)
        self._warn_of_halves(state)
        loss, accuracy = found
        state.history.validation_loss.append(loss)
        if accuracy is not None:
            state.history.validation_accuracy.append(accuracy)

    def _evaluate(self, X: Array, Y: Array, rows: int) -> tuple[float, float | None] | str:
        """Loss and accuracy, or for what there was no memory, in words."""
        try:
            return self.net.evaluate(X, Y, min(rows, EVALUATION_ROWS))
        except MemoryError as error:
            return lack(error)

    def halve(self, failure: str, state: TrainingState) -> None:
        """Compute fewer samples at a time, after there was no memory for ``failure``."""
        size = state.history.micro_batch_size or state.loader.batch_size
        if size <= self.net.least_rows:
            rows = "one sample" if size == 1 else f"{size} samples"
            raise InsufficientMemoryError(
                f"not even {rows} at a time can be computed in the memory there is: {failure}"
            )
        state.history.micro_batch_size = power_below(size)
        self._halved = self._halved or f"out of memory in epoch {state.epoch}, step {self.opt.t}: {failure}"
        self.captured = None  # graphs keep the memory that they work in
        release(self.net)

    def _warn_of_halves(self, state: TrainingState) -> None:
        if self._halved:
            size, rows = state.loader.batch_size, state.history.micro_batch_size
            text = f"{self._halved}; batches of {size} are computed {rows} samples at a time, gradients added up"
            self._halved = ""
            warn_caller(text, MicroBatchWarning)

    def _look_at(self, grads: FlatViews) -> tuple[float, int]:
        """Σ g², and how many g are not finite."""
        if self.max_norm is None and self.net.backend.name == "cpu" and self.scale is None:
            # BLAS is the quickest to tell that all is well: nothing that is not finite has a finite sum of squares.
            with quiet():
                squares = float(np.dot(grads.flat, grads.flat))
            if math.isfinite(squares):
                return squares, 0
        with self.net.backend.scope():
            self._squares[:2] = 0
            self.net.ops.square_sum(grads.flat, self._squares)
            squares, not_finite = self.net.backend.to_numpy(self._squares[:2]).tolist()
        return squares, int(not_finite)

    def _clipping(self, norm: float) -> Array | None:
        """What the optimizer multiplies the gradients by, where they are scaled, or their norm is too large."""
        scale = 1.0 if self.scale is None else self.scale.value
        factor = 1 / scale
        if self.max_norm is not None and norm / scale > self.max_norm:
            factor = self.max_norm / norm
        if factor == 1:
            return None
        with self.net.backend.scope():
            self._control[0] = factor
        return self._control

    def _what_is_wrong(self, grads: FlatViews, not_finite: int) -> str:
        if not not_finite:
            return "the gradient is too large for its norm to be computed"
        names = [name for name, g in grads.items() if not np.isfinite(self.net.backend.to_numpy(g)).all()]
        return f"{not_finite} of {grads.size} numbers of the gradient are NaN or infinite, in {', '.join(names)}"

    def _leave_out(self, what: str, state: TrainingState) -> None:
        place = f"epoch {state.epoch}, step {self.opt.t}, learning rate {getattr(self.opt, 'lr', None)}"
        if self.in_a_row == self.max_skipped:
            before = f"; {self.in_a_row} steps in a row before it were left out" if self.in_a_row else ""
            raise NonFiniteError(f"{what} ({place}){before}")
        self.in_a_row += 1
        state.history.skipped += 1
        if state.history.skipped == 1:
            text = f"{what} ({place}); this step is left out, and so will others be, up to {self.max_skipped} in a row"
            warn_caller(text, SkippedStepWarning)


def warn_caller(text: str, category: type[Warning]) -> None:
    """Warn of the line that called :func:`fit`."""
    level, frame = 1, sys._getframe()
    while frame.f_code.co_filename == __file__ and frame.f_back is not None:
        level, frame = level + 1, frame.f_back
    warnings.warn(text, category, stacklevel=level)


def why_not_captured(net: Network, loader: Loader, opt: Optimizer, *others: Any) -> str:
    """Why the steps of a run cannot be captured, in words; empty where they can."""
    return why_eager(net, opt, loader, *others) or ("samples are columns" if loader.sample_axis else "")


def memory_parts(net: Network, opt: Optimizer, batch_size: int, evaluated: int = 0, copied: int = 0) -> dict[str, int]:
    """The bytes that training needs beside those of the loader, by what they are for; nothing is allocated.

    ``evaluated`` is how many samples are evaluated after an epoch, ``copied`` how many bytes of them were made for it.
    """
    norm = 8 * SQUARE_SUM_SIZE + 2 * net.compute_dtype.itemsize
    of_net = net.memory_parts(batch_size, evaluated)
    return {**of_net, **opt.memory_parts(), "norm of the gradient": norm, "validation set": copied}


def plan_batches(
    net: Network,
    loader: Loader,
    opt: Optimizer,
    evaluated: int = 0,
    copied: int = 0,
    most: int | None = None,
    captured: bool | None = None,
) -> None:
    """Make the loader's plan with :func:`memory_parts` counted; ``most`` is the largest batch size to choose.

    ``captured`` says whether steps are captured, by default where they can be.
    """
    held = memory_parts(net, opt, 1, 0, copied)
    if net.backend.name == "cpu" and opt.t == 0:  # main memory is taken when it is first written to
        held = {name: held[name] for name in ("parameters", "running statistics", "validation set")}
    allocated = sum(n for name, n in held.items() if not name.startswith("workspace"))
    if captured is None:
        captured = not why_not_captured(net, loader, opt)
    parts_of = functools.partial(memory_parts, net, opt, evaluated=evaluated, copied=copied)
    loader.replan(parts_of, allocated, most=most, kept=AHEAD if captured else 0)


def settle_batches(
    net: Network, loader: Loader, opt: Optimizer, held_out: HeldOut | None, captured: bool | None = None
) -> None:
    """Make the loader's plan; a batch size that it chose is tried, and a smaller one where memory runs out."""
    evaluated, copied = (0, 0) if held_out is None else (len(held_out.X), held_out.copied)
    plan_batches(net, loader, opt, evaluated, copied, captured=captured)
    while loader.automatic and (failure := rehearse(net, loader, opt, held_out)) is not None:
        release(net)
        if loader.batch_size <= net.least_rows:
            raise InsufficientMemoryError(f"there is no memory for a step of {loader.batch_size} samples: {failure}")
        plan_batches(net, loader, opt, evaluated, copied, power_below(loader.batch_size), captured)


def rehearse(net: Network, loader: Loader, opt: Optimizer, held_out: HeldOut | None) -> str | None:
    """A whole step that leaves no trace, the last batch and validation too; for what there was no memory, in words."""
    try:
        held = [loader.peek()]
        held += [[array.copy() for array in held[0]] for _ in range(1, loader.at_once)]  # those prepared ahead
        x, y = (_rows(array, loader) for array in held[0])
        net.rehearse(x, y)
        if loader.last_size < len(x):
            net.rehearse(x[: loader.last_size], y[: loader.last_size])
        opt.rehearse(net.parameters.grads)
        if held_out is not None:
            with contextlib.suppress(NonFiniteError):  # what the numbers are is not the question here
                net.evaluate(held_out.X[:EVALUATION_ROWS], held_out.Y[:EVALUATION_ROWS])
    except MemoryError as error:
        return lack(error)
    return None


def lack(error: MemoryError) -> str:
    """For what there was no memory, in words; the error itself would keep the arrays of its traceback."""
    return str(error) or "out of memory"


def release(net: Network) -> None:
    """Give back all memory that can be had again."""
    net.release()
    gc.collect()
    net.backend.free_unused()


def power_below(n: int) -> int:
    """The largest power of two below ``n``."""
    return 1 << ((n - 1).bit_length() - 1)


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
        verb = "computes in" if net.loss_scale is None else "stores"
        raise ArgumentError(
            f"loader makes {loader.dtype} batches, net {verb} {net.dtype}; give the loader dtype={net.dtype.name!r}"
        )
    if not loader.labelled:
        raise ArgumentError("loader must have labels: Loader(X, Y), this one has X alone")
    check_bound(net, opt)
    if net.dtype == np.float16 and MASTER not in opt.state:
        raise ArgumentError(
            "opt must keep the float16 parameters in float32, too, where small steps are not lost in rounding: make it "
            "with master_weights=True"
        )


def _rows(array: Array, loader: Loader) -> Array:
    """Samples as rows, as a network takes them."""
    return array.T if loader.sample_axis == 1 and array.ndim == 2 else array


class HeldOut(NamedTuple):
    """The validation set as a network takes it, and how many bytes of it were newly made."""

    X: Array
    Y: Array
    copied: int


def _validation_arrays(net: Network, loader: Loader, validation: Any) -> HeldOut:
    if not isinstance(validation, (tuple, list)) or len(validation) != 2:
        raise DTypeError(f"validation must be a pair (X, Y), got {type(validation).__name__}")
    X = loader.to_batch(validation[0], "validation[0]")
    Y = net.backend.asarray(validation[1])
    copied = sum(new.nbytes for new, given in zip((X, Y), validation, strict=True) if new is not given)
    return HeldOut(_rows(X, loader), _rows(Y, loader), copied)


# --- callbacks, Ctrl-C ---------------------------------------------------------------------------------------------


@dataclass
class Watcher:
    """A callback and its two ends, each a function of the :class:`TrainingState`."""

    callback: Any
    on_step: Callable[[TrainingState], Any]
    on_epoch: Callable[[TrainingState], Any]


def _watcher(callback: Any) -> Watcher:
    on_step, on_epoch = getattr(callback, "on_step", None), getattr(callback, "on_epoch", None)
    if on_step is None and on_epoch is None:
        if not callable(callback):
            raise DTypeError(f"a callback must be callable or have on_step or on_epoch, got {callback!r}")
        on_epoch = callback
    return Watcher(callback, on_step or _ignore, on_epoch or _ignore)


def _ignore(state: TrainingState) -> None:
    pass


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


# --- progress ------------------------------------------------------------------------------------------------------


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
