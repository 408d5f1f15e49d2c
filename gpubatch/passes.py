"""Passes over loaders: by them optimizers count epochs, in a loop of one's own as in ``fit``.

A loader has a :class:`DataPass` for each of its epochs, and tells it of every batch that it gives out. A network asks
:func:`pass_of` which pass the batch of a training step is from; an optimizer asks :func:`pass_under_way`.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any

__all__ = ["DataPass", "pass_of", "pass_under_way"]


class Thread(threading.local):
    """The passes that a thread is in the middle of; last the one that gave out a batch last."""

    def __init__(self) -> None:
        self.running: list[DataPass] = []


HERE = Thread()
GIVEN: dict[int, tuple[weakref.ref[Any], DataPass]] = {}  # by id, the samples that loaders gave out and somebody holds
FEW = 256  # entries in GIVEN up to which samples that are gone are left there


class DataPass:
    """An epoch of a loader.

    source: the same object for all passes of a loader, and another for each loader.
    epoch: the loader's number of it.
    batches: how many were given out, of which ``start`` before the iteration that runs, or ran last, began.
    running: whether an iteration over it is under way.
    """

    __slots__ = ("_among", "batches", "epoch", "running", "source", "start")

    def __init__(self, source: object, epoch: int, batches: int = 0) -> None:
        self.source, self.epoch = source, epoch
        self.start = self.batches = batches
        self.running = False
        self._among: list[DataPass] = []

    def begin(self) -> None:
        """An iteration begins in this thread."""
        self.running, self._among = True, HERE.running
        self._among.append(self)

    def give_out(self, batch: Any) -> None:
        """A batch is given out: samples, or a sequence of arrays that begins with the samples."""
        self.batches += 1
        samples = batch[0] if isinstance(batch, (tuple, list)) else batch
        GIVEN[id(samples)] = weakref.ref(samples), self
        if len(GIVEN) > FEW:
            for key in [key for key, (array, _) in list(GIVEN.items()) if array() is None]:
                GIVEN.pop(key, None)
        if self._among[-1] is not self:
            self._among.remove(self)
            self._among.append(self)

    def end(self) -> None:
        """The iteration is over, or was left."""
        if self.running:
            self.running = False
            self._among.remove(self)

    def goes_on(self, last: DataPass) -> bool:
        """Whether it is the rest of ``last``, resumed from a saved state, by this loader or by another like it."""
        return self.epoch == last.epoch and self.start >= max(1, last.batches)


def pass_of(samples: Any) -> DataPass | None:
    """The pass that gave out a batch of samples.

    If none did, as where samples were changed, it is the one of this thread's that gave out a batch last, while it is
    under way; else None.
    """
    found = GIVEN.get(id(samples))
    if found is not None and found[0]() is samples:
        return found[1]
    running = HERE.running
    return running[-1] if running else None


def pass_under_way(fed: DataPass | None) -> DataPass | None:
    """The pass of an optimizer's step, where ``fed`` is the one that the network was last fed from, if it was."""
    if fed is None or not fed.running:
        running = HERE.running
        if running:
            return running[-1]
    return fed
