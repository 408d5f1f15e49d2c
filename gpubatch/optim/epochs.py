"""The epochs of an optimizer, counted by the passes over loaders whose batches its steps are of."""

from __future__ import annotations

from collections.abc import Sequence

from gpubatch.errors import check_int
from gpubatch.passes import DataPass


class EpochCount:
    """Counts epochs from 0: one more for the first step of every pass but the first.

    A pass that goes on where it was left, after its loader's state was loaded, is the same epoch. While the pass
    ``last`` is running, steps on batches of another loader are steps of its epoch, too.
    """

    def __init__(self) -> None:
        self.epoch = 0
        self.last: DataPass | None = None  # None: the pass of the next step will be of this epoch
        self.told = False  # whether the user was told, or has shown to know, that the epoch may have to be assigned
        self._before = -1  # the epoch at the last call of stands_still
        # Another loader's pass meanwhile, and how many batches of the last had been given out when it was met.
        self._visitor: tuple[DataPass, int] | None = None

    def meet(self, found: DataPass | None) -> None:
        """A step is made on a batch of the pass ``found``; None: of no pass that is known."""
        last = self.last
        if found is None or found is last:
            return
        if last is None or self._is_over(last, found):
            self.begin(found)
        else:
            self._visitor = found, last.batches

    def _is_over(self, last: DataPass, found: DataPass) -> bool:
        """Whether the pass ``last`` is over when there is a step in ``found``.

        Something may hold open a pass that was left, as a traceback does: then another loader gave out the batches of a
        whole pass meanwhile, and is at its next.
        """
        left = self._visitor is not None and self._visitor[0] is not found and self._visitor[1] == last.batches
        return left or not last.running

    def begin(self, found: DataPass) -> None:
        """The steps to come are of the pass ``found``."""
        self.epoch = self.in_pass(found)
        self.last, self._visitor = found, None

    def in_pass(self, found: DataPass) -> int:
        """The epoch of steps in the pass ``found``, if that is the next one."""
        last = self.last
        return self.epoch + (last is not None and found is not last and not found.goes_on(last))

    def ahead(self, found: DataPass | None, fed: DataPass | None) -> int:
        """The epoch of the next step, as far as it is certain: its pass is ``fed``, or another one of the loader."""
        last = self.last
        if found is None or last is None or not (found is fed or found.source is last.source):
            return self.epoch
        return self.in_pass(found) if self._is_over(last, found) else self.epoch

    def assign(self, epoch: int) -> None:
        """The next step is of ``epoch``, whatever its pass."""
        self.epoch, self.last, self._visitor, self.told = epoch, None, None, True

    def stands_still(self) -> bool:
        """Whether nothing counts epochs: none since the last call, and no pass is under way."""
        before, self._before = self._before, self.epoch
        return before == self.epoch and not self.told and (self.last is None or not self.last.running)

    def saved(self) -> list[int] | None:
        """The loader's number of the last pass, and how many of its batches were given out."""
        return None if self.last is None else [self.last.epoch, self.last.batches]

    def load(self, epoch: int, place: Sequence[int] | None) -> None:
        """Go back to ``epoch`` at the place that :meth:`saved` gave."""
        last = self.last
        self.epoch, self._visitor = epoch, None
        if place is None:
            self.last = None
            return
        number, batches = (check_int(f"pass[{i}]", n, 0) for i, n in enumerate(place))
        # Otherwise a step is undone within a pass, which goes on.
        if last is None or not last.running or last.epoch != number or last.batches < batches:
            self.last = DataPass(None, number, batches)
