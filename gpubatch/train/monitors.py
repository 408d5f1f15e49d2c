"""Callbacks that watch one number of each epoch: they stop the run, keep its best weights, lower the learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from gpubatch.backend import Array
from gpubatch.errors import ArgumentError, check_bool, check_choice, check_int, check_real, suggesting
from gpubatch.nn import Network
from gpubatch.optim import Optimizer
from gpubatch.own import copied, live
from gpubatch.train.history import StopTraining, TrainingState
from gpubatch.train.parts import OfARun, flats_of, put, take

MODES = ("auto", "min", "max")
HIGHER = ("accuracy", "r2", "f1", "precision", "recall", "top_")  # in the names of numbers that are better if higher


class Monitor:
    """One number of each epoch, and which of two values is better.

    A value is better than the best one before if it differs by more than ``min_delta``, or with ``relative`` by more
    than ``min_delta`` times the best one. NaN is never better.
    """

    def __init__(self, name: str, mode: str, min_delta: float, relative: bool = False) -> None:
        if not isinstance(name, str):
            raise ArgumentError(f"monitor must be the name of a number in the history, got {name!r}")
        self.name, self.relative = name, relative
        self.mode = check_choice("mode", mode, MODES)
        if self.mode == "auto":
            self.mode = "max" if any(part in name for part in HIGHER) else "min"
        self.min_delta = check_real("min_delta", min_delta, 0.0)
        self.best = self._worst
        self.best_epoch = 0  # counted from 1; 0: there was none yet
        self._loaded = False

    def begins(self) -> bool:
        """At the start: whether it begins anew, since no state was loaded; the run before is forgotten then."""
        loaded, self._loaded = self._loaded, False
        if not loaded:
            self.best, self.best_epoch = self._worst, 0
        return not loaded

    def settings(self) -> dict[str, Any]:
        """The arguments that say what is better."""
        return {"monitor": self.name, "mode": self.mode, "min_delta": self.min_delta}

    @property
    def _worst(self) -> float:
        return math.inf if self.mode == "min" else -math.inf

    def take(self, value: float, epoch: int) -> bool:
        """Note the value of an epoch; whether it is better than the best one before."""
        sign = 1 if self.mode == "min" else -1
        if self.relative:
            limit = self.best * (1 - math.copysign(sign * self.min_delta, sign * self.best))
        else:
            limit = self.best - sign * self.min_delta
        if better := sign * value < sign * limit:
            self.best, self.best_epoch = value, epoch
        return better

    def check(self, state: TrainingState) -> None:
        """Raise unless the run has that number."""
        check_choice("monitor", self.name, state.monitors)

    def value(self, state: TrainingState) -> float:
        """The number of the last epoch."""
        return state.history.last(self.name)

    @property
    def validated(self) -> bool:
        """Whether the number is of the weights that are validated, such as averages, and not of those in training."""
        return self.name.startswith("validation_")

    def state_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {"best": self.best if math.isfinite(self.best) else None, "best_epoch": self.best_epoch}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave."""
        self.best = self._worst if state["best"] is None else float(state["best"])
        self.best_epoch, self._loaded = int(state["best_epoch"]), True


class KeptWeights:
    """A copy of a network's weights and running statistics, on its device."""

    def __init__(self) -> None:
        self.filled = False
        self._arrays: dict[str, Array] = {}

    def bind(self, net: Network) -> None:
        """Have what was loaded on the network's device, or else memory there, so that the plan of a run counts it."""
        for name, flat in flats_of(net).items():
            array = self._arrays.get(name)
            if array is None or array.shape != flat.shape:
                if self.filled:
                    raise ArgumentError(f"the {name} kept are of another network than this one, of {flat.size:,}")
                array = net.backend.zeros(flat.size, flat.dtype)
            self._arrays[name] = net.backend.asarray(array, flat.dtype)

    def keep(self, net: Network) -> None:
        """Copy them."""
        self.bind(net)
        self.filled = True
        take(net, self._arrays)

    def restore(self, net: Network, opt: Optimizer | None = None) -> None:
        """Put them back, into an optimizer's float32 copies, too."""
        put(net, self._arrays, opt)

    def live_state(self) -> dict[str, Any]:
        """The kept weights themselves; empty if there are none."""
        return self._arrays if self.filled else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take them over."""
        self.filled, self._arrays = bool(state), dict(state)


class Watching(OfARun):
    """What has a best number so far, which ``monitor`` knows."""

    monitor: Monitor

    @property
    def best(self) -> float:
        """The best number so far; infinite if there was none."""
        return self.monitor.best

    @property
    def best_epoch(self) -> int:
        """Its epoch, counted from 1; 0 if there was none."""
        return self.monitor.best_epoch


class BestWeights(Watching):
    """Keeps the weights of the best epoch, and puts them back when the run is complete.

    monitor: the number of an epoch that says how good it was: "loss", "validation_loss" or "validation_accuracy"
    mode: whether the number is better if it is lower, "min", or higher, "max"; "auto" takes "max" for an accuracy
    min_delta: by how much it must be better than the best one before
    restore: False leaves the network as it is after the last epoch; :meth:`restore_best` is then yours to call

    The copy is on the network's device: weights and running statistics once more. A run that Ctrl-C, SIGTERM or an
    error ends is left with its last weights. NaN is never better. The last checkpoint has the weights of the last step,
    and the best ones beside them, so a run can be resumed to more epochs.

    >>> best = BestWeights("validation_accuracy")  # fit(callbacks=[best])
    >>> best.monitor.mode
    'max'
    """

    def __init__(
        self, monitor: str = "validation_loss", mode: str = "auto", min_delta: float = 0.0, restore: bool = True
    ) -> None:
        self.monitor, self.kept = Monitor(monitor, mode, min_delta), KeptWeights()
        self.restore = check_bool("restore", restore)

    def update(self, value: float, net: Network, epoch: int = 0) -> bool:
        """By hand, after an epoch: keep the weights if ``value`` is better than all before; whether it is."""
        better = self.monitor.take(float(value), epoch)
        if better:
            self.kept.keep(net)
        return better

    def restore_best(self, net: Network, opt: Optimizer | None = None) -> bool:
        """Put the best weights into the network, and into master weights of ``opt``; False if there are none."""
        if self.kept.filled:
            self.kept.restore(net, opt)
        return self.kept.filled

    def settings(self) -> dict[str, Any]:
        """The arguments, which a resumed run compares."""
        return {**self.monitor.settings(), "restore": self.restore}

    def on_start(self, state: TrainingState) -> None:
        """Check that there is such a number, and allocate the memory; an earlier run is forgotten."""
        self.monitor.check(state)
        if self.monitor.begins():
            self.kept.filled = False
        self.kept.bind(state.net)

    def on_validation(self, state: TrainingState) -> None:
        """Keep the weights that were validated."""
        if self.monitor.validated:
            self.update(self.monitor.value(state), state.net, len(state.history.loss))

    def on_epoch(self, state: TrainingState) -> None:
        """Keep the weights in training, where the number is of them."""
        if not self.monitor.validated:
            self.update(self.monitor.value(state), state.net, len(state.history.loss))

    def on_end(self, state: TrainingState) -> None:
        """Put the best ones back."""
        if self.restore and self.restore_best(state.net, state.opt) and self.best_epoch < len(state.history.loss):
            state.note(f"the network has the weights of epoch {self.best_epoch}: {self.monitor.name} {self.best:.4g}")

    def state_dict(self) -> dict[str, Any]:
        """For checkpoints: copies of the weights, too."""
        return copied(self._live_state())

    def _live_state(self) -> dict[str, Any]:
        return {**self.monitor.state_dict(), "weights": self.kept.live_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave."""
        self.monitor.load_state_dict(state)
        self.kept.load_state_dict(state["weights"])


class EarlyStopping(Watching):
    """Stops a run whose number of an epoch gets no better, and puts the weights of its best epoch back.

    patience: how many epochs in a row may be no better than the best one before; the run stops after them, as Keras,
        Lightning and scikit-learn (``n_iter_no_change``) do
    min_delta: by how much the number must be better to count
    monitor: the number: "validation_loss", "validation_accuracy" or "loss"
    mode: whether it is better if it is lower, "min", or higher, "max"; "auto" takes "max" for an accuracy
    restore_best: whether the network has the weights of the best epoch after the run, stopped or not; False keeps no
        copy and leaves the last ones

    NaN is no better than any number. ``stopped_epoch`` is the epoch, counted from 1, after which the run was stopped, 0
    if it was not. A stopped run that is resumed makes no more steps, unless ``patience`` is larger now.

    >>> gb.fit(net, loader, opt, 100, validation=(X, Y), callbacks=[gb.EarlyStopping(patience=5)])  # doctest: +SKIP

    By hand:

    >>> stop = EarlyStopping(patience=2)
    >>> [stop.update(loss) for loss in (0.5, 0.4, 0.41, float("nan"))]
    [False, False, False, True]
    """

    @suggesting
    def __init__(
        self,
        patience: int = 5,
        min_delta: float = 0.0,
        monitor: str = "validation_loss",
        mode: str = "auto",
        restore_best: bool = True,
    ) -> None:
        self.patience = check_int("patience", patience, 1)
        self.restore_best = check_bool("restore_best", restore_best)
        self.weights = BestWeights(monitor, mode, min_delta)
        self.monitor = self.weights.monitor
        self.wait = self.stopped_epoch = self._epochs = 0

    def update(self, value: float, net: Network | None = None) -> bool:
        """By hand, after an epoch: whether to stop; with ``net`` and ``restore_best`` the best weights are kept."""
        self._epochs += 1
        if net is not None and self.restore_best:
            better = self.weights.update(value, net, self._epochs)
        else:
            better = self.monitor.take(float(value), self._epochs)
        self.wait = 0 if better else self.wait + 1
        return self.wait >= self.patience

    def settings(self) -> dict[str, Any]:
        """The arguments, which a resumed run compares."""
        return {**self.monitor.settings(), "patience": self.patience, "restore_best": self.restore_best}

    def on_start(self, state: TrainingState) -> None:
        """Check that there is such a number; stop a resumed run at once if it was stopped before."""
        self.monitor.check(state)
        if self.monitor.begins():
            self.wait = self._epochs = 0
            self.weights.kept.filled = False
        if self.restore_best:
            self.weights.kept.bind(state.net)
        if self.wait >= self.patience:
            raise StopTraining(f"stopped early in epoch {self.stopped_epoch}; a larger patience would go on")
        self.stopped_epoch = 0

    def on_validation(self, state: TrainingState) -> None:
        """Look at the number of weights that were validated."""
        if self.monitor.validated:
            self.update(self.monitor.value(state), state.net)

    def on_epoch(self, state: TrainingState) -> None:
        """Stop the run if it is time."""
        if not self.monitor.validated:
            self.update(self.monitor.value(state), state.net)
        if self.wait >= self.patience:
            self.stopped_epoch = self._epochs
            raise StopTraining(
                f"stopped early: {self.monitor.name} was no better in {self.wait} epochs"
                + (f" than {self.best:.4g} in epoch {self.best_epoch}" if self.best_epoch else ", it was NaN in all")
            )

    def on_end(self, state: TrainingState) -> None:
        """Put the best weights back."""
        if self.restore_best:
            self.weights.on_end(state)

    def state_dict(self) -> dict[str, Any]:
        """For checkpoints: copies of the weights, too."""
        return copied(self._live_state())

    def _live_state(self) -> dict[str, Any]:
        own = {"wait": self.wait, "epochs": self._epochs, "stopped_epoch": self.stopped_epoch}
        return {**own, **live(self.weights)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave."""
        self.wait, self._epochs = int(state["wait"]), int(state["epochs"])
        self.stopped_epoch = int(state["stopped_epoch"])
        self.weights.load_state_dict(state)


@dataclass(frozen=True)
class Reduced:
    """A schedule times a factor, but not below ``least`` where the schedule itself is above it."""

    schedule: Callable[[int, int], float]
    factor: float
    least: float

    def __call__(self, step: int, epoch: int) -> float:
        """The value at ``step`` and ``epoch``, both counted from 0."""
        value = self.schedule(step, epoch)
        return min(value, max(value * self.factor, self.least))


class ReduceOnPlateau(OfARun):
    """Lowers the learning rate when the number of an epoch gets no better; PyTorch's ReduceLROnPlateau.

    factor: what the learning rate is multiplied by, above 0 and below 1
    patience: how many epochs in a row may be no better; the one after them lowers the rate
    monitor: the number: "validation_loss", "validation_accuracy" or "loss"
    mode: whether it is better if it is lower, "min", or higher, "max"; "auto" takes "max" for an accuracy
    threshold: by how much it must be better to count
    threshold_mode: "rel", times the best number, or "abs"
    cooldown: how many epochs after a reduction do not count
    min_lr: no learning rate is made lower than this
    eps: a reduction by no more than this is not made

    NaN is no better than any number. A schedule goes on and is multiplied by the factors so far. Groups of parameters
    that have a learning rate of their own are treated alike. A learning rate that is given anew when a run is resumed
    is used as it is; a schedule that is given anew is multiplied.

    >>> gb.fit(net, loader, opt, validation=(X, Y), callbacks=[gb.ReduceOnPlateau(0.5, patience=2)])  # doctest: +SKIP

    By hand, after each epoch: ``plateau.update(net.loss(X, Y), opt)``.
    """

    @suggesting
    def __init__(
        self,
        factor: float = 0.1,
        patience: int = 10,
        monitor: str = "validation_loss",
        mode: str = "auto",
        threshold: float = 1e-4,
        threshold_mode: str = "rel",
        cooldown: int = 0,
        min_lr: float = 0.0,
        eps: float = 1e-8,
    ) -> None:
        self.factor = check_real("factor", factor, 0, 1, open_low=True, open_high=True)
        self.patience, self.cooldown = check_int("patience", patience, 0), check_int("cooldown", cooldown, 0)
        self.min_lr, self.eps = check_real("min_lr", min_lr, 0), check_real("eps", eps, 0)
        self.threshold_mode = check_choice("threshold_mode", threshold_mode, ("rel", "abs"))
        relative = self.threshold_mode == "rel"
        most = 1 if relative else math.inf
        self.monitor = Monitor(monitor, mode, check_real("threshold", threshold, 0, most, open_high=True), relative)
        self.wait = self.cooling = self.reductions = 0
        self._made: dict[str, Reduced] = {}  # the schedules in force, by the pattern of their group

    def update(self, value: float, opt: Optimizer) -> bool:
        """By hand, after an epoch: take its number; whether the learning rate was lowered."""
        self.wait = 0 if self.monitor.take(float(value), 0) else self.wait + 1
        if self.cooling:
            self.cooling, self.wait = self.cooling - 1, 0
        if self.wait <= self.patience:
            return False
        self.wait, self.cooling = 0, self.cooldown
        self.reductions += 1
        return self._reduce(opt)

    def _reduce(self, opt: Optimizer, numbers: bool = True) -> bool:
        """Lower every learning rate, or the schedules alone; whether one of them is lower now."""
        rates = {"": opt.hyper["lr"], **{name: group["lr"] for name, group in opt.groups.items() if "lr" in group}}
        lowered = False
        for pattern, lr in rates.items():
            new: Any
            if callable(lr):
                # All factors at once, as a resumed run has it: one after another they would be rounded otherwise.
                made = self._made.get(pattern)
                given = made.schedule if made is not None and lr is made else lr
                new = self._made[pattern] = Reduced(given, self.factor**self.reductions, self.min_lr)
                lower = lr(opt.t, opt.epoch) - new(opt.t, opt.epoch)
            elif numbers:
                new = max(lr * self.factor, self.min_lr)
                lower = lr - new
                if lower <= self.eps:
                    continue
            else:
                continue
            lowered = lowered or lower > self.eps
            if pattern:
                opt.set_group(pattern, lr=new)
            else:
                opt.lr = new
        return lowered

    def settings(self) -> dict[str, Any]:
        """The arguments, which a resumed run compares."""
        names = "factor", "patience", "cooldown", "threshold_mode", "min_lr", "eps"
        watched = self.monitor.settings()
        watched["threshold"] = watched.pop("min_delta")
        return {**watched, **{name: getattr(self, name) for name in names}}

    def on_start(self, state: TrainingState) -> None:
        """Look whether there are such a number and a learning rate; go on with the factors of a resumed run."""
        self.monitor.check(state)
        if "lr" not in state.opt.hyper:
            raise ArgumentError(f"opt must have a learning rate to reduce, {state.opt.rule.name} has none")
        if self.monitor.begins():
            self.wait = self.cooling = self.reductions = 0
            self._made = {}
        elif self.reductions:
            self._reduce(state.opt, numbers=False)

    def on_epoch(self, state: TrainingState) -> None:
        """Take the epoch's number."""
        before = state.opt.lr
        if self.update(self.monitor.value(state), state.opt):
            state.note(f"{self.monitor.name} got no better: learning rate {before:.4g}, from now on {state.opt.lr:.4g}")

    def state_dict(self) -> dict[str, Any]:
        """For checkpoints."""
        own = {"wait": self.wait, "cooling": self.cooling, "reductions": self.reductions}
        return {**own, **self.monitor.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave."""
        self.wait, self.cooling = int(state["wait"]), int(state["cooling"])
        self.reductions = int(state["reductions"])
        self.monitor.load_state_dict(state)
