"""Callbacks: functions of the training state, called after every step or epoch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gpubatch.errors import DTypeError
from gpubatch.train.history import TrainingState

__all__ = ["Watcher", "watcher_of"]


@dataclass
class Watcher:
    """A callback, and what is called after every step and every epoch."""

    callback: Any
    on_step: Callable[[TrainingState], Any]
    on_epoch: Callable[[TrainingState], Any]

    @property
    def looks_at_steps(self) -> bool:
        """Whether it is called after every step."""
        return self.on_step is not ignore


def watcher_of(callback: Any) -> Watcher:
    """``callback`` as a watcher; one without ``on_step`` and ``on_epoch`` is called after every epoch."""
    on_step, on_epoch = getattr(callback, "on_step", None), getattr(callback, "on_epoch", None)
    if on_step is None and on_epoch is None:
        if not callable(callback):
            raise DTypeError(f"a callback must be callable or have on_step or on_epoch, got {callback!r}")
        on_epoch = callback
    return Watcher(callback, on_step or ignore, on_epoch or ignore)


def ignore(state: TrainingState) -> None:
    """Stands for the method that a callback does not have."""
