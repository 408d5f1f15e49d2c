"""The training loop: epochs of mini-batches, each followed by validation, callbacks and a checkpoint."""

from __future__ import annotations

import bisect
import contextlib
import functools
import hashlib
import json
import math
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from gpubatch.checkpoint import Checkpoints, versions
from gpubatch.errors import (
    ArgumentError,
    FewStepsWarning,
    IdleWarning,
    InsufficientMemoryError,
    ResumeWarning,
    UnscaledWarning,
    check_bool,
    check_choice,
    check_int,
    suggesting,
)
from gpubatch.loader import Loader, epochs_of
from gpubatch.metrics import measures_of
from gpubatch.nn import BatchNorm, Network, core_of
from gpubatch.optim import Optimizer, epoch_in, given_hyper, unchecked
from gpubatch.parallel import Ranks, check_ranks
from gpubatch.schedules import is_known
from gpubatch.train.callbacks import AgreedStop, Callbacks
from gpubatch.train.captured import CapturedSteps
from gpubatch.train.checks import check_loader, check_parts, scale_for
from gpubatch.train.compared import describe_callbacks, describe_held_out, digest_of_samples, digest_of_validation
from gpubatch.train.display import display
from gpubatch.train.eager import EagerSteps
from gpubatch.train.history import History, StopTraining, TrainingState
from gpubatch.train.loss_scale import LossScale
from gpubatch.train.memory import evaluate, halve, measured, memory_message, power_below, settle_batches
from gpubatch.train.record import Record, Steps
from gpubatch.train.resume import RunCheckpoints, describe_network, open_checkpoints
from gpubatch.train.signals import BetweenSteps, interruptible
from gpubatch.train.together import Agreement, RanksMemoryError
from gpubatch.train.validation import HeldOut, about_validation, check_held_out, validated

EXECUTIONS = ("auto", "eager", "captured")
PIXELS = 128  # bytes from here on look like those of images
FEW_STEPS = 100  # a run of fewer is warned about
FEW_EPOCHS = 32  # of which it is saved what functions as schedules give
USUAL_SIZES = range(8, 33)  # the batch sizes that are then proposed

Found = TypeVar("Found")


@suggesting
def fit(
    net: Network,
    loader: Loader,
    opt: Optimizer,
    epochs: int = 10,
    validation: Any = None,
    callbacks: Iterable[Any] = (),
    checkpoint: str | os.PathLike[str] | Checkpoints | None = None,
    resume: bool = False,
    progress: bool = True,
    max_norm: float | None = None,
    max_skipped: int = 10,
    execution: str = "auto",
    loss_scale: LossScale | None = None,
    metrics: Sequence[str] = (),
    ranks: Ranks | None = None,
) -> History:
    """Train a network by mini-batches.

    net: the network to train
    loader: its batches; with ``batch_size="auto"`` it gets its final batch size here, and one step of that size is
        tried before the first epoch; without a dtype of its own it takes the network's
    opt: the optimizer, bound to ``net.parameters``
    epochs: epochs in all, counted from the run's first
    validation: what the loss and accuracy are measured on after every epoch: (X, Y), perhaps with weights of the
        samples, (X, Y, weight), a source of pairs, or (source, Y), converted and prepared as the loader does its own; a
        Loader; or the fraction of the loader's samples that this run holds out, see below
    callbacks: a list of gpubatch's, such as :class:`EarlyStopping`, and of your own, see below
    checkpoint: a folder, or :class:`~gpubatch.checkpoint.Checkpoints` with one, to save the run in
    resume: go on from the newest checkpoint, if there is one
    progress: show the progress on standard error
    max_norm: an upper bound for the norm over all gradients
    max_skipped: how many steps in a row may be left out because their loss or gradient is not finite
    execution: "auto" captures steps as CUDA graphs where it can, "eager" never, "captured" raises ArgumentError where
        it cannot
    loss_scale: the factor of the loss of a network with ``precision="mixed"``; by default a :class:`LossScale`
    metrics: names of what else is measured on the validation set after every epoch, as :func:`gpubatch.metrics.measure`
        has them, such as "f1"; in ``history.metrics``, and for callbacks "validation_f1"
    ranks: the processes that train together, :class:`Ranks`, which the loader has, too; see below

    Returns the :class:`History` of the run.

    **Callbacks.** A callback is a function of the :class:`TrainingState`, called after every epoch, or an object with
    some of the methods ``on_start``, before the first step; ``on_gradient(state, grads)``, which may change the whole
    gradient of a batch before it is clipped and applied; ``on_step``; ``on_validation``, after the validation of an
    epoch and with the weights that were validated; ``on_epoch``; ``on_end``, after the last checkpoint of a run that
    was not interrupted; and ``on_exit``, however it ends. All callbacks are called in their order. One that raises
    :class:`StopTraining` ends the run after the others were called. gpubatch's forget an earlier run when they are
    given to another one, unless that resumes it.

    **Checkpoints.** The run is saved after every epoch, or every so many steps, and at its end. A run that was killed
    and is resumed ends as if it had never stopped: with the same parameters and the same history, but for ``seconds``.
    Hyper-parameters that are given otherwise than when the run began are used, with a :class:`ResumeWarning` that names
    them; all others are those that were saved. It names ``max_norm``, ``max_skipped``, ``validation``, ``metrics`` and
    the arguments of gpubatch's callbacks, too. Callbacks with ``state_dict`` and ``load_state_dict`` are saved, others
    begin anew. Another network, another optimizer, other batches, or a callback that watches another number are
    refused. Ctrl-C, SIGTERM and SIGHUP let the current step finish, save the run, and raise
    :class:`TrainingInterrupted`, a KeyboardInterrupt, or :class:`TrainingTerminated`, a SystemExit. Both have the
    ``history``, and so has any other error that ends a run.

    **Validation.** The set is checked whole before the first step. Arrays are converted once; what is read, a Loader's
    samples and those of a fraction are converted and moved batch by batch, in order and not augmented, so the set may
    be larger than memory; their loss is that of one array but for rounding. A fraction is drawn at random by the
    loader's seed, the same for every device, rank and resume. Of fewer than 2²⁰ samples it is in proportion from each
    class where Y is an array of integers. Of more nothing is listed: it is the same share of each 4,096 neighbours, at
    random whatever their class. During this run the loader leaves it out. Where samples depend on one another, as in a
    time series, give (X, Y) that you have split yourself.

    **Numbers that are not finite.** A step whose loss or gradient is not finite is left out: parameters, running
    statistics and optimizer stay as they were. ``history.skipped`` counts it, and the first one gives a
    :class:`SkippedStepWarning`. After ``max_skipped`` in a row the next one raises :class:`NonFiniteError`.

    **Mixed precision.** A network with ``precision="mixed"`` takes a loader with ``dtype="float16"`` and an optimizer
    with ``master_weights=True``. Its gradients are those of the loss times the loss scale; ``max_norm`` is for the
    gradients without it. A step whose gradient overflows at a scale above 1 is left out and lowers the scale;
    ``history.overflows`` counts it.

    **Weights.** Where the loader has weights, a step's loss is Σ w l / Σ w over its batch, also in micro-batches;
    ``history.loss`` is the mean of the steps' losses, each times its number of samples. A batch whose weights are all 0
    has no mean: its step is left out as one whose loss is not finite. Weights of the validation samples count in the
    loss and the accuracy on them, those of classes in the loss alone: the loader's, or those that a Loader given as
    ``validation`` has.

    **Frozen parameters.** Those of groups with ``trainable=False`` have gradients of 0 meanwhile, so ``max_norm`` and
    the search for numbers that are not finite do not count them. Where a whole layer is frozen the gradients are not
    computed, and backward ends at the lowest layer that is trained.

    **Memory.** If memory runs out, ``fit`` frees what it can, and from that batch on computes half as many samples at a
    time (``micro_batch_size`` of :meth:`Network.loss_and_grad`), as often as it takes, with a
    :class:`MicroBatchWarning`. Batches and updates stay the same, and no sample is lost. If not even one sample can be
    computed at a time, it raises :class:`InsufficientMemoryError`.

    **Captured steps.** On a GPU, steps are captured as CUDA graphs and replayed if nvmath-python is installed, no
    callback looks at every step, and every method that a step calls is gpubatch's own: no layer of yours, no overridden
    or replaced method of network, optimizer, loader or loss scale. The host then reads the losses some steps later. The
    numbers are those of eager steps; steps that are not finite, memory that runs out and checkpoints are dealt with
    alike. ``history.execution`` says how the steps of the last epoch were run, and why.

    **Ranks.** With ``ranks`` every process computes its parts of each batch, and one sum of the gradients makes the
    step the same on all of them: parameters and history have the same bits on any number of ranks, for a seed and the
    loader's ``shards``, where BLAS has equally many threads. All ranks call ``fit`` with the same arguments; what
    differs is refused before the first step, and parameters that come to differ end the run after their epoch. Whether
    a step is left out, a smaller micro-batch taken, or the run ended by Ctrl-C, SIGTERM or a callback of any rank, all
    decide alike. Rank 0 writes the checkpoints, which all read, and shows progress, notes and warnings; a run is
    resumed on any number of ranks that divides the shards. Each rank evaluates its share of the validation set; rank 0
    computes ``metrics``. Callbacks are called on every rank, but those with ``once = True``, as gpubatch's logs, on
    rank 0 alone; ``state.rank`` tells which rank it is. A rank that raises what others do not, ends all of them with a
    message of which and why. GPUs sum by NCCL, each rank needs its own; captured steps have the sum in their graph, and
    either all ranks capture, or none.

    >>> X, Y = np.random.default_rng(0).random((400, 3)), np.arange(400) % 2
    >>> net = gb.mlp([3, 4, 2], seed=0)
    >>> loader, opt = gb.Loader(X, Y, batch_size=4), gb.Adam(net.parameters)
    >>> history = gb.fit(net, loader, opt, epochs=2, validation=0.1, progress=False)
    >>> len(history.validation_loss)
    2
    """
    together = Agreement(check_ranks(ranks))
    # The caller may use what outlives the run, such as the parameters, on the stream that is current outside.
    with together.ending(), contextlib.ExitStack() as stack:
        with together.phase():
            epochs, progress = check_int("epochs", epochs, 0), check_bool("progress", progress)
            check_choice("execution", execution, EXECUTIONS)
            check_parts(net, loader, opt)
            check_loader(loader, ranks)
            stack.enter_context(core_of(net).training)
            for context in (net.backend.own_stream(), core_of(net).freezing(opt.frozen), unchecked(opt)):
                stack.enter_context(context)
            core_of(net).batches.largest_trained = largest = epochs_of(loader).columns.largest
            stack.callback(setattr, core_of(net).batches, "largest_trained", largest)
            core_of(net).batches.columns = epochs_of(loader).columns.names
            scale = scale_for(net, loss_scale)
            state = TrainingState(net, loader, opt, History(), loader.epoch, opt.t, rank=together.rank)
            record = Record(state, scale, together)
            watching = Callbacks(callbacks, together)
            eager = EagerSteps(record, watching, max_norm, max_skipped)
            captured = CapturedSteps(record, eager, watching)
            may_capture = execution == "captured" or (execution == "auto" and net.backend.name != "cpu")
            held_out = stack.enter_context(validated(net, loader, validation, together.rank, together.size))
            record.state.monitors = monitors(net, held_out, metrics)
            early = list[str]()  # notes from before there is a display
            record.state.note = early.append
            store = stack.enter_context(open_checkpoints(checkpoint, check_bool("resume", resume), together.first))
            arguments = functools.partial(compared_arguments, net, held_out, eager, metrics)
            places = [] if store is None and not together.several else some_places(record, epochs)
            checkpoints = RunCheckpoints(store, record, watching.all, arguments, places)
            common = arguments_of_run(checkpoints, record, epochs, held_out, execution, eager, metrics, resume)
        together.same(common)
        together.connect(net.backend)
        if resume:
            version = epochs_of(loader).order.version
            checkpoints.resume()
            record.state.resumed = True
            with together.phase():
                if held_out is not None and epochs_of(loader).order.version != version:  # others are held out
                    check_held_out(net, held_out, together.rank, together.size)
        together.same(place_of_run(record, places))
        stopped = watching.start(record.state)
        background = store is not None and store.background
        may_run_captured = may_capture and not captured.why_not()
        settle_batches(net, loader, opt, held_out, may_run_captured, background, together)
        record.history.batch_size = loader.batch_size
        warn_if_unscaled(record)
        drivers: list[Steps] = [captured, eager] if may_capture else [eager]
        warn_if_idle(record, (epochs - len(record.history.loss)) * len(loader) - record.epoch.batches)
        warn_if_few(record, epochs)
        warn_if_past(record, epochs)
        run = Run(record, drivers, execution == "captured", held_out, watching, metrics, checkpoints)
        done = len(record.history.loss)
        shown = display(progress and together.first, epochs, len(loader), done * len(loader) + record.epoch.batches)
        with together.phase():
            checkpoints.try_callbacks()
        exits = watching.told_of_the_exit(record.state)
        with history_in_errors(record), exits, checkpoints.completed(), eager.scaling():
            with interruptible(record.signals), shown as record.display:
                record.state.note = record.display.note
                for text in (*first_words(record, checkpoints, epochs), *early):
                    record.state.note(text)
                run.until(epochs, stopped)
            run.between.stop_if_signalled()  # a signal that came after the last look
    return record.history


def first_words(record: Record, checkpoints: RunCheckpoints, epochs: int) -> Iterator[str]:
    """How the run begins, for its display."""
    loader = record.state.loader
    if checkpoints.resumed:
        done = len(record.history.loss) >= epochs
        left = f"; the run has made its {epochs} epochs, nothing is left to do" if done else ""
        yield checkpoints.resumed + left
    elif epochs:
        yield f"{in_steps(loader, epochs)}, batches of {loader.batch_size:,}"


def compared_arguments(
    net: Network, held_out: HeldOut | None, eager: EagerSteps, metrics: Sequence[str]
) -> dict[str, Any]:
    """The arguments of which a resumed run says that they differ, by name, as JSON can hold them."""
    with net.backend.scope():
        validation = describe_held_out(held_out, net.backend)
    limits = {"max_norm": eager.max_norm, "max_skipped": eager.max_skipped}
    return {**limits, "validation": validation, "metrics": list(metrics)}


def arguments_of_run(
    checkpoints: RunCheckpoints,
    record: Record,
    epochs: int,
    held_out: HeldOut | None,
    execution: str,
    eager: EagerSteps,
    metrics: Sequence[str],
    resume: bool,
) -> dict[str, Any]:
    """The settings that all ranks must share, by name, for JSON; empty for a single process."""
    state, store = record.state, checkpoints.store
    if not record.together.several:
        return {}
    return {
        "network": describe_network(state.net),
        "backend": state.net.backend.name,
        "optimizer": f"{type(state.opt).__name__}, rule {state.opt.rule.name}",
        "versions": {name: found for name, found in json.loads(versions()).items() if name != "python"},
        "samples": {**checkpoints.batches, "more": digest_of_samples(state.loader)},
        "loader": state.loader.state_dict(),
        "batch_size": "auto" if epochs_of(state.loader).automatic else state.loader.batch_size,
        "epochs": epochs,
        "validation": digest_of_validation(held_out, state.net.backend),
        "callbacks": [
            [f"{type(callback).__module__}.{type(callback).__qualname__}", described["settings"]]
            for callback, described in zip(
                checkpoints.callbacks, describe_callbacks(checkpoints.callbacks), strict=True
            )
        ],
        "checkpoint": None if store is None else [str(store.folder), store.every, store.background],
        "resume": resume,
        "max_norm": eager.max_norm,
        "max_skipped": eager.max_skipped,
        "execution": execution,
        "loss_scale": None if record.scale is None else repr(record.scale),
        "metrics": list(metrics),
    }


def place_of_run(record: Record, places: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """The state that all ranks must share before the first step: digests of arrays, and numbers."""
    net, opt, backend = record.state.net, record.state.opt, record.state.net.backend
    if not record.together.several:
        return {}
    arrays = {"parameters": net.parameters.flat, "running statistics": net.buffers.flat}
    arrays |= {f"optimizer's {name}": views.flat for name, views in opt.state.items()}
    return {
        **{name: hashlib.sha256(backend.to_numpy(flat).data).hexdigest()[:16] for name, flat in arrays.items()},
        "steps": [opt.t, core_of(net).dropout_step],
        # A function in a schedule is shown with its address, which differs from process to process.
        "hyper-parameters": re.sub(r" at 0x[0-9a-fA-F]+", "", json.dumps(given_hyper(opt, places))),
    }


def some_places(record: Record, epochs: int) -> list[tuple[int, int]]:
    """Steps of a run and beyond, each with its epoch, by which two functions as schedules are told apart."""
    opt, steps = record.state.opt, max(1, len(record.state.loader))
    first = epoch_in(opt, epochs_of(record.state.loader).coming_pass())
    ends = {round(epochs * i / FEW_EPOCHS) for i in range(2 * FEW_EPOCHS)}
    at = {steps * n for n in ends} | {1 << i for i in range((steps * epochs).bit_length())}
    return [(opt.t + n, first + n // steps) for n in sorted(at)]


def monitors(net: Network, held_out: HeldOut | None, metrics: Sequence[str]) -> tuple[str, ...]:
    """The names of the numbers that the history will have for every epoch; metrics must be numbers of the network."""
    measures_of(net, metrics)
    if held_out is None and len(metrics):
        raise ArgumentError("metrics are measured on the validation set: give validation=, too")
    if "confusion_matrix" in metrics:
        raise ArgumentError("metrics of a run are numbers, and 'confusion_matrix' is none; gb.metrics.measure has it")
    if held_out is None:
        return ("loss",)
    accuracy = ("validation_accuracy",) if core_of(net).loss.classifies else ()
    others = (f"validation_{name}" for name in metrics if f"validation_{name}" not in accuracy)
    return ("loss", "validation_loss", *accuracy, *others)


def in_steps(loader: Loader, epochs: int) -> str:
    """The steps of an epoch and of a run, in words."""
    steps = len(loader)
    return f"{steps:,} step{'s' * (steps != 1)} an epoch, {epochs * steps:,} in all"


def warn_if_few(record: Record, epochs: int) -> None:
    """Warn of a whole run with so few steps that hardly any network learns in them."""
    loader = record.state.loader
    total, samples = epochs * len(loader), epochs * epochs_of(loader).order.share
    if not 0 < total < FEW_STEPS or len(record.history.loss) >= epochs:
        return
    size = min(USUAL_SIZES[-1], power_below(samples // FEW_STEPS + 1)) if samples >= FEW_STEPS else 0
    smaller = f"a smaller batch_size, such as {size}, or " if size in USUAL_SIZES and size < loader.batch_size else ""
    record.warn(
        f"the run has few steps: {in_steps(loader, epochs)}, with batches of {loader.batch_size:,} samples; a network "
        f"needs hundreds: take {smaller}more epochs",
        FewStepsWarning,
    )


def warn_if_unscaled(record: Record) -> None:
    """Warn of pixels that the loader takes as they are: a network hardly learns of inputs up to 255."""
    net, epochs = record.state.net, epochs_of(record.state.loader)
    if epochs.columns.takes_bytes and not isinstance(net.layers[0], BatchNorm):
        with net.backend.scope():
            x = epochs.peek()[0]  # a rank may have no row of it
            largest = x.max().item() if x.size else 0
        if largest >= PIXELS:
            record.warn(
                f"X has dtype uint8 and reaches {largest:.0f} in batches, and numbers near 1 are learnt from best: "
                "give the loader scale=1/255, as for pixels, or prepare=gb.Standardize.of(X)",
                UnscaledWarning,
            )


def warn_if_past(record: Record, epochs: int) -> None:
    """Warn if a resumed run has already made more than ``epochs``, which counts all epochs of the run."""
    if (done := len(record.history.loss)) > epochs:
        text = f"the run has made {done} epochs, and epochs={epochs} in all are asked for: nothing is left to do"
        record.warn(text, ResumeWarning)


@contextlib.contextmanager
def short_runs() -> Iterator[None]:
    """Runs that are meant to be short, as a sweep's are: no warning of few steps."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FewStepsWarning)
        yield


def warn_if_idle(record: Record, steps: int) -> None:
    """Warn if a schedule is at 0 in every step to come, as after an earlier run, or ends an epoch or more too early."""
    opt, loader = record.state.opt, record.state.loader
    schedule = opt.hyper.get("lr")
    if steps < 1 or not callable(schedule) or not is_known(schedule):
        return
    epoch, made = epoch_in(opt, epochs_of(loader).coming_pass()), record.epoch.batches

    def ended(n: int) -> bool:
        return bool(schedule(opt.t + n, epoch + (made + n) // len(loader)) == 0)

    if not ended(steps - 1):
        return
    first = bisect.bisect_left(range(steps), True, key=ended)  # a schedule that has ended stays where it is
    idle = steps - first
    if not all(ended(first + idle * i // 8) for i in range(8)) or (first and idle < len(loader)):
        return
    where = f"in all {steps} steps" if first == 0 else f"in the last {idle:,} of the {steps:,} steps"
    ends = f"has ended by step {opt.t}, epoch {epoch}" if first == 0 else "ends before"
    remedy = "" if first == 0 else ", of which total= is in the unit of per="
    record.warn(
        f"the learning rate is 0 {where} of this run: {schedule!r} {ends}; give the optimizer another: opt.lr = ..."
        f"{remedy}",
        IdleWarning,
    )


@contextlib.contextmanager
def history_in_errors(record: Record) -> Iterator[None]:
    """Put the history into whatever error ends the run: the numbers of the epochs before are not lost."""
    try:
        yield
    except BaseException as error:  # a second Ctrl-C, too
        with contextlib.suppress(AttributeError):  # an error of the user's may have no room for it
            error.history = record.history  # type: ignore[attr-defined]
        raise


class Run:
    """Makes the epochs of a run: by the first of its drivers that can, within the memory there is."""

    def __init__(
        self,
        record: Record,
        drivers: Sequence[Steps],
        must_capture: bool,
        held_out: HeldOut | None,
        callbacks: Callbacks,
        metrics: Sequence[str],
        checkpoints: RunCheckpoints,
    ) -> None:
        self._record, self._drivers, self._must_capture, self._held_out = record, drivers, must_capture, held_out
        self._callbacks, self._metrics, self._checkpoints = callbacks, metrics, checkpoints
        self.between = BetweenSteps(record, checkpoints)

    def until(self, epochs: int, stopped: str | None) -> None:
        """Make the epochs up to number ``epochs``, save the run, and tell the callbacks of its end.

        stopped: the message of the callback that stopped the run before its first step, maybe empty; None if none did.
        """
        record, together = self._record, self._record.together
        try:
            for number in range(len(record.history.loss) + 1, epochs + 1) if stopped is None else ():
                self._epoch()
                record.display.epoch(number, record.history)
                self._callbacks.epoch(record.state)
                self._checkpoints.after_epoch()
                self.between.stop_if_signalled()
        except StopTraining as stop:
            if together.several and not isinstance(stop, AgreedStop):
                raise  # from where only callbacks should: the other ranks do not stop
            stopped = str(stop)
        if stopped:
            record.state.note(stopped)
        record.check_alike()
        self._checkpoints.save()
        if not self.between.signalled():
            self._callbacks.end(record.state)

    def _epoch(self) -> None:
        """Make an epoch, or what remains of it, and add it to the history with its validation."""
        record = self._record
        if record.begin_epoch():
            while (failure := self._steps_or_failure()) is not None:
                halve(record, self._drivers, failure)
                record.rewind()
        record.close_epoch()
        if self._held_out is not None:
            with self._callbacks.validating(record.state):
                self._validate(self._held_out)
                self._callbacks.validation(record.state)

    def _steps_or_failure(self) -> str | None:
        """Make the remaining steps; None if the epoch is complete, else a message of what memory ran out for."""
        try:
            self._make_steps()
        except InsufficientMemoryError:
            raise  # smaller micro-batches would not help
        except MemoryError as error:
            if self._record.together.several and not isinstance(error, RanksMemoryError):
                raise  # the other ranks have not raised it
            return memory_message(error)  # leaving this block frees the failed batch, which the traceback holds
        return None

    def _make_steps(self) -> None:
        record = self._record
        record.history.execution = "eager"
        record.start_clock()
        for steps in self._drivers:
            if not (why := steps.run(self.between)):
                return
            if self._must_capture:
                refused = ArgumentError(f"execution must be 'auto' or 'eager' here, got 'captured': {why}")
                raise record.together.alike(refused)
            record.history.execution = f"eager, since {why}"

    def _validate(self, held_out: HeldOut) -> None:
        history = self._record.history
        loss, accuracy = self._within_memory(lambda: evaluate(self._record, held_out))
        self._add(history.validation_loss, loss)
        if accuracy is not None:
            self._add(history.validation_accuracy, accuracy)
        if self._metrics:
            measures = self._within_memory(lambda: measured(self._record, held_out, self._metrics))
            for name, value in measures.items():
                self._add(history.metrics.setdefault(name, []), value)

    def _within_memory(self, measure: Callable[[], Found | str]) -> Found:
        """What ``measure`` finds on the validation set; while it says what memory ran out for, by fewer samples."""
        with about_validation():
            while isinstance(found := measure(), str):
                halve(self._record, self._drivers, found)
        self._record.warn_if_halved()
        return found

    def _add(self, values: list[float], value: float) -> None:
        """Add the number of this epoch; epochs before without it have NaN, as a resumed run may have been given it."""
        values += [math.nan] * (len(self._record.history.loss) - 1 - len(values))
        values.append(value)
