"""Callbacks: objects, or functions, that a run calls at set places."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from gpubatch.errors import ArgumentError, DTypeError, check_known
from gpubatch.own import changed
from gpubatch.params import FlatViews
from gpubatch.train.history import StopTraining, TrainingState
from gpubatch.train.parts import StepPart
from gpubatch.train.together import ALONE, Agreement

# The methods of a callback, each called with the training state; on_gradient with the gradients, too.
HOOKS = ("on_start", "on_gradient", "on_step", "on_validation", "on_epoch", "on_end", "on_exit")
ONCE = "once"  # the attribute of a callback that is called on rank 0 alone
AVERAGED = "averaged"  # the method of gpubatch's own that gives validation other weights


class AgreedStop(StopTraining):
    """All ranks stop at this place."""


class Callbacks:
    """The callbacks of a run in their order, and their methods by the place where they are called.

    given: objects with methods of ``HOOKS``, or functions, which are called after every epoch.
    together: the ranks of the run, which all stop where a callback of one does.
    """

    def __init__(self, given: Any = (), together: Agreement = ALONE) -> None:
        if not isinstance(given, Iterable) or isinstance(given, (str, Mapping)):
            what = "None" if given is None else f"one {named(given)}"
            raise DTypeError(f"callbacks must be a list of callbacks, got {what}: write callbacks=[...]")
        self.all = list(given)
        self._together = together
        for i, callback in enumerate(self.all):
            if any(callback is other for other in self.all[:i]):
                raise ArgumentError(f"callbacks has the same {named(callback)} twice")
        self._averages = [callback for callback in self.all if hasattr(callback, AVERAGED)]
        if (count := len(self._averages)) > 1:
            several = ", ".join(map(named, self._averages))
            raise ArgumentError(f"validation is of one average, and callbacks has {count}: {several}")
        methods = [(methods_of(callback), getattr(callback, ONCE, False) is True) for callback in self.all]
        self._methods = {
            hook: [found[hook] for found, once in methods if hook in found and (self._together.first or not once)]
            for hook in HOOKS
        }
        # Whether a callback may stop the run after a step, on which ranks then agree; the same on all ranks.
        self._may_stop = any(
            hook in found and not isinstance(callback, StepPart)
            for callback, (found, _) in zip(self.all, methods, strict=True)
            for hook in ("on_step", "on_gradient")
        )
        self.on_gradient, self.on_step = self._methods["on_gradient"], self._methods["on_step"]
        self.parts = [callback for callback in self.all if isinstance(callback, StepPart)]
        self._late = [part for part in self.parts if part.late]
        self._stopped: str | None = None

    def start(self, state: TrainingState) -> str | None:
        """Call ``on_start``. Returns the message of a callback that stops the run, maybe empty; None if none does."""
        return self._tell("on_start", state)

    def gradient(self, state: TrainingState, grads: FlatViews) -> None:
        """Between the gradient of a batch and its clipping; who stops the training here, does so after the step."""
        for change in self.on_gradient:
            try:
                check_nothing(change, change(state, grads), "grads is changed in place, as grads['W1'][...] = values")
            except StopTraining as stop:
                self._stopped = self._stopped or str(stop)

    def updated(self, state: TrainingState) -> None:
        """After the update of a step that was made eagerly."""
        for part in self._late:
            part.make(state.net, state.opt.t - 1)

    def why_not_captured(self) -> str:
        """Why a graph cannot hold what callbacks do in a step, in words; empty where it can."""
        for callback in self.all:
            if isinstance(callback, StepPart):
                if name := changed(callback):
                    return f"{name} is not gpubatch's own"
            elif hasattr(callback, "on_step"):
                return f"callback {callback!r} looks at every step"
            elif hasattr(callback, "on_gradient"):
                return f"callback {callback!r} changes every gradient"
        return ""

    def step(self, state: TrainingState) -> None:
        """After a step."""
        if not self._may_stop:
            return
        if self.on_step or self._together.several:
            self._tell_or_stop("on_step", state)
        elif self._stopped is not None:
            raise StopTraining(self._stopped)

    def validation(self, state: TrainingState) -> None:
        """After the validation of an epoch, with the weights that were validated."""
        self._tell_or_stop("on_validation", state)

    def epoch(self, state: TrainingState) -> None:
        """After an epoch."""
        self._tell_or_stop("on_epoch", state)

    def end(self, state: TrainingState) -> None:
        """After the last epoch and its checkpoint. Averages take the place of the weights first."""
        for callback in sorted(self.all, key=lambda callback: not hasattr(callback, AVERAGED)):
            if hasattr(callback, "on_end"):
                callback.on_end(state)

    @contextlib.contextmanager
    def told_of_the_exit(self, state: TrainingState) -> Iterator[None]:
        """Tell them when the run is left, by an error too."""
        try:
            yield
        finally:
            for leave in self._methods["on_exit"]:
                leave(state)

    def validating(self, state: TrainingState) -> contextlib.AbstractContextManager[Any]:
        """Inside a ``with``, the network has the weights to validate."""
        return self._averages[0].averaged(state) if self._averages else contextlib.nullcontext()

    def _tell(self, hook: str, state: TrainingState) -> str | None:
        """Call all, even if one of them stops the training: a log needs the last epoch, too."""
        stopped = self._stopped
        with self._together.phase():
            for look in self._methods[hook]:
                try:
                    found = look(state)
                    if isinstance(found, bool):  # what stops a run elsewhere
                        check_nothing(look, found, "raise gb.StopTraining() to end the run")
                except StopTraining as stop:
                    stopped = stopped or str(stop)
        agreed = self._together.words(stopped)
        return None if agreed is None else agreed[1]

    def _tell_or_stop(self, hook: str, state: TrainingState) -> None:
        if (why := self._tell(hook, state)) is not None:
            raise AgreedStop(why)


def methods_of(callback: Any) -> dict[str, Callable[..., Any]]:
    """The methods of a callback by their names; a function is its ``on_epoch``."""
    if isinstance(callback, type):
        name = callback.__name__
        raise DTypeError(f"a callback must be an object, got the class {name}: write {name}()")
    check_known(f"a callback, {named(callback)},", methods_named_on(callback), HOOKS)
    found = {hook: method for hook in HOOKS if callable(method := getattr(callback, hook, None))}
    if not found:
        if not callable(callback):
            raise DTypeError(f"a callback must be callable or have {', '.join(HOOKS)}, got {callback!r}")
        found = {"on_epoch": callback}
    for hook, method in found.items():
        try:
            signature = inspect.signature(method)
        except (TypeError, ValueError):
            continue  # some built-in functions have none
        takes = ("state", "grads") if hook == "on_gradient" else ("state",)
        try:
            signature.bind(*takes)
        except TypeError:
            what = named(callback) + ("" if method is callback else f".{hook}")
            raise DTypeError(f"a callback, {what}, must take ({', '.join(takes)}), got {signature}") from None
    return found


def check_nothing(method: Callable[..., Any], found: Any, remedy: str) -> None:
    """Raise if a method of a callback returned something, as if that did anything.

    What a lambda returns is the value of its expression, as of ``lambda state: bar.update()``, and seldom an answer;
    new gradients always are one.
    """
    an_answer = found is not None and getattr(method, "__name__", "") != "<lambda>"
    if an_answer or isinstance(found, Mapping):
        where = getattr(method, "__qualname__", named(method))
        returned = found if isinstance(found, bool) else f"a {type(found).__name__}"
        raise DTypeError(f"callback {where} must return nothing, got {returned}: {remedy}")


def methods_named_on(callback: Any) -> Iterator[str]:
    """The names of methods that look as if a run called them."""
    return (name for name in dir(callback) if name.startswith("on_") and callable(getattr(callback, name, None)))


def named(callback: Any) -> str:
    """A callback in words."""
    return getattr(callback, "__name__", type(callback).__name__)
