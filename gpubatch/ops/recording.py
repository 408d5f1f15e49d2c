"""Calls of compiled kernels that are made again and again at once, on what is in the same arrays by then.

A step on a small batch is a dozen kernels of some microseconds, and Python takes as long between them. What differs
from step to step, kernels take from an array where the last step left off: ``library.next_rows`` the rows of a batch,
:meth:`CompiledUpdate.ahead` the scalars of an update.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

__all__ = ["KernelCalls", "recorded"]


class KernelCalls:
    """The calls that were made in a block of :func:`recorded`; the arrays that they work on are kept.

    What Python or NumPy did in the block is not done again.
    """

    def __init__(self, library: Any) -> None:
        self.calls = library.Recording()
        self._gaps = True

    def runs(self, times: int) -> Iterator[int]:
        """Make the calls so many times; gives how often it has made them, in parts that take a tenth of a second.

        A part is one call from Python, which sees an interrupt after it.
        """
        while times > 0:
            made = self.calls.run(times)
            times -= made
            yield made

    def complete(self, calls: int) -> bool:
        """Whether it has so many calls, and no kernel declined one or is not recorded."""
        return not self._gaps and bool(self.calls.size() == calls)

    def end(self) -> None:
        """Record no more."""
        self._gaps = not self.calls.end()


@contextlib.contextmanager
def recorded(library: Any) -> Iterator[KernelCalls]:
    """Record the calls of kernels that this thread makes in the block, as they are made."""
    recording = KernelCalls(library)
    recording.calls.begin()
    try:
        yield recording
    finally:
        recording.end()
