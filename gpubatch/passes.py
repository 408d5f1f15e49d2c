"""Passes over loaders: by them optimizers count epochs, in a loop of one's own as in ``fit``.

A loader has a :class:`DataPass` for each of its epochs, and tells it of every batch that it gives out. A network asks
:func:`pass_of` which pass the batch of a training step is from, and :func:`deal_of` how the rows of the batch lie among
the parts and the ranks of a data-parallel run; an optimizer asks :func:`pass_under_way`.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any, NamedTuple

__all__ = ["DataPass", "Deal", "deal_of", "pass_of", "pass_under_way"]


class Deal(NamedTuple):
    """Where the rows that one rank has of a batch lie in the whole batch.

    The whole batch is ``shards`` parts, one after another; each rank has neighbouring parts.

    rows: the rows of the whole batch, over all ranks.
    first: the place in the whole batch of this rank's first row.
    parts: the rows of each part that this rank has, in order; a part may have none.
    shards: the number of parts over all ranks.
    """

    rows: int
    first: int
    parts: tuple[int, ...]
    shards: int

    @classmethod
    def of(cls, rows: int, shards: int, rank: int = 0, size: int = 1) -> Deal:
        """The rows that rank ``rank`` of ``size`` has of a batch: of ``shards`` parts, the first are a row longer.

        ``size`` divides ``shards``; whether the bits of a run depend on it is the caller's to check.
        """
        each, more = divmod(rows, shards)
        own = shards // size
        begin = rank * own
        parts = tuple(each + (part < more) for part in range(begin, begin + own))
        return cls(rows, begin * each + min(begin, more), parts, shards)


class Thread(threading.local):
    """The passes that a thread is in the middle of; last the one that gave out a batch last."""

    def __init__(self) -> None:
        self.running: list[DataPass] = []


HERE = Thread()
# By id, the samples that loaders gave out and somebody holds, the pass of each, and how it lies among ranks.
GIVEN: dict[int, tuple[weakref.ref[Any], DataPass, Deal | None]] = {}
FEW = 256  # entries in GIVEN up to which samples that are gone are left there


class DataPass:
    """An epoch of a loader.

    source: the same object for all passes of a loader, and another for each loader.
    epoch: the loader's number of it.
    batches: how many were given out, of which ``start`` before the iteration that runs, or ran last, began.
    running: whether an iteration over it is under way.
    deal: that of the batch that was given out last; None where batches are not dealt to parts.
    """

    __slots__ = ("_among", "batches", "deal", "epoch", "running", "source", "start")

    def __init__(self, source: object, epoch: int, batches: int = 0) -> None:
        self.source, self.epoch = source, epoch
        self.start = self.batches = batches
        self.running = False
        self.deal: Deal | None = None
        self._among: list[DataPass] = []

    def begin(self) -> None:
        """An iteration begins in this thread."""
        self.running, self._among = True, HERE.running
        self._among.append(self)

    def give_out(self, batch: Any, deal: Deal | None = None) -> None:
        """A batch is given out: samples, or a sequence of arrays that begins with the samples.

        deal: how its rows lie among the ranks, where they are dealt to parts.
        """
        self.batches += 1
        self.deal = deal
        samples = batch[0] if isinstance(batch, (tuple, list)) else batch
        GIVEN[id(samples)] = weakref.ref(samples), self, deal
        if len(GIVEN) > FEW:
            for key in [key for key, (array, *_) in list(GIVEN.items()) if array() is None]:
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


def latest() -> DataPass | None:
    """This thread's running pass that gave out a batch last; None where none is running."""
    return HERE.running[-1] if HERE.running else None


def pass_of(samples: Any) -> DataPass | None:
    """The pass that gave out a batch of samples, or the :func:`latest` one, where samples were changed since."""
    found = GIVEN.get(id(samples))
    return found[1] if found is not None and found[0]() is samples else latest()


def deal_of(samples: Any) -> Deal | None:
    """How a batch of samples lies among the ranks; None where no loader dealt it to parts.

    Where samples were changed since, it is the deal of the last batch of the :func:`latest` pass, if that has as many
    rows.
    """
    found = GIVEN.get(id(samples))
    if found is not None and found[0]() is samples:
        return found[2]
    last = None if (of := latest()) is None else of.deal
    return last if last is not None and sum(last.parts) == len(samples) else None


def pass_under_way(fed: DataPass | None) -> DataPass | None:
    """The pass of an optimizer's step; ``fed`` is the one from which the network got its last batch, or None."""
    return fed if fed is not None and fed.running else latest() or fed
