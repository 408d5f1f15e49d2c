"""Callbacks: functions of the training state, called after every step or epoch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gpubatch.errors import DTypeError
from gpubatch.train.history import TrainingState

__all__ = ["Watcher", "ignored", "watched"]


@dataclass
class Watcher:
    """A callback and its two ends, each a function of the :class:`TrainingState`."""

    callback: Any
    on_step: Callable[[TrainingState], Any]
    on_epoch: Callable[[TrainingState], Any]


def watched(callback: Any) -> Watcher:
    """The two ends of a callback; one without ``on_step`` and ``on_epoch`` is called after every epoch."""
    on_step, on_epoch = getattr(callback, "on_step", None), getattr(callback, "on_epoch", None)
    if on_step is None and on_epoch is None:
        if not callable(callback):
            raise DTypeError(f"a callback must be callable or have on_step or on_epoch, got {callback!r}")
        on_epoch = callback
    return Watcher(callback, on_step or ignored, on_epoch or ignored)


def ignored(state: TrainingState) -> None:
    """The end that a callback does not have."""
