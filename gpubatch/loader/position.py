"""Where the iterations of a loader are."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from gpubatch.errors import ArgumentError
from gpubatch.passes import DataPass


class Position:
    """The place of a loader: ``batch`` batches of its ``epoch`` were yielded. At most one iteration is running."""

    def __init__(self, epoch: int = 0, batch: int = 0) -> None:
        self.epoch, self.batch = epoch, batch
        self._left = False  # whether the iteration before was left in the middle
        self._run: object | None = None  # the iteration that is running
        self._source = object()  # that of the passes of this loader
        self.of_pass = DataPass(None, 0)

    def __copy__(self) -> Position:
        """The same place, with passes of its own."""
        twin = Position(self.epoch, self.batch)
        twin._left, twin._run = self._left, self._run
        return twin

    @property
    def running(self) -> bool:
        """Whether an iteration is running."""
        return self._run is not None

    @property
    def current(self) -> int:
        """The number of the epoch that is running, or else of the next one, counted from 0."""
        return self.epoch + self._left

    def go_to(self, epoch: int, batch: int) -> None:
        """Let the next iteration begin here; a running one ends."""
        self.epoch, self.batch, self._run, self._left = epoch, batch, None, False
        self.of_pass.end()

    def coming_pass(self) -> DataPass:
        """The pass of the next iteration: that of the epoch, however often it is gone on with."""
        if self.of_pass.source is not self._source or self.of_pass.epoch != self.current:
            self.of_pass.end()
            self.of_pass = DataPass(self._source, self.current)
        self.of_pass.start = self.of_pass.batches = 0 if self._left else self.batch
        return self.of_pass

    @contextlib.contextmanager
    def iteration(self, length: Callable[[], int]) -> Iterator[Callable[[], None]]:
        """One iteration, until its epoch of ``length()`` batches ends or it is left.

        Yields a function that raises ArgumentError when there is a newer iteration.
        """
        if self._left or (self.running and self.batch):
            self.epoch, self.batch = self.epoch + 1, 0
        self._left = False
        run = self._run = object()
        self.of_pass.end()
        self.coming_pass().begin()

        def check() -> None:
            if self._run is not run:
                raise ArgumentError(
                    "this iteration was ended by a newer one, or by load_state_dict: one runs at a time, so another "
                    "loop or thread takes a loader of its own, copy.copy(loader)"
                )

        try:
            yield check
            if self.batch == length():
                self.epoch, self.batch = self.epoch + 1, 0
        finally:
            if self._run is run:
                self._run, self._left = None, self.batch > 0
                self.of_pass.end()
