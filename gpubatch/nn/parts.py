"""Sums over the parts of a batch, here and on other ranks, whose bits do not depend on the number of ranks."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from gpubatch.backend import Array, Backend
from gpubatch.nn.layers import BatchNorm
from gpubatch.parallel import Ranks
from gpubatch.params import LOSS, TAIL, WEIGHT, FlatViews, Parameters


class Tree:
    """Adds up arrays that come one after another as a binary tree of neighbours: ((0 + 1) + (2 + 3)) + ...

    It keeps as few of them as that takes, in memory of its own: log2 of their number.

    count: how many arrays there are.
    own: an array of the caller's for those that need not be kept.
    """

    def __init__(self, backend: Backend, count: int, own: Array) -> None:
        self.count, self.own = count, own
        self._free = [backend.empty(own.size, own.dtype) for _ in range(kept(count))]
        self._waiting: list[Array] = []  # sums that still lack their right neighbour, the largest first
        self.begin()

    def begin(self, count: int | None = None) -> None:
        """Start again, for ``count`` arrays; by default as many as it was made for."""
        self._free += [array for array in self._waiting if array is not self.own]
        self._waiting, self._added, self._last = [], 0, (count or self.count) - 1

    def leaf(self) -> Array:
        """Where the next array is to be written; then :meth:`add` it."""
        waits = self._added % 2 == 0 and self._added < self._last
        return self._free[-1] if waits else self.own

    def add(self, leaf: Array) -> None:
        """Add what was written to :meth:`leaf`."""
        if leaf is not self.own:
            self._free.pop()
        for _ in range(
            (~self._added & (self._added + 1)).bit_length() - 1
        ):  # once for each 1 at the end of its binary number
            leaf = self._merged(leaf)
        self._waiting.append(leaf)
        self._added += 1

    def total(self) -> Array:
        """The sum, valid until the next :meth:`begin`."""
        while len(self._waiting) > 1:
            self._waiting.append(self._merged(self._waiting.pop()))
        return self._waiting[0]

    def _merged(self, right: Array) -> Array:
        left = self._waiting.pop()
        left += right
        if right is not self.own:
            self._free.append(right)
        return left


def kept(count: int) -> int:
    """The most sums that wait at the same time while ``count`` arrays are added."""
    return count.bit_length() - 1


class PartSums:
    """What a step sums over the parts of a batch: weighted gradients, losses and weights, and running statistics.

    The message is the flat gradient with a tail of a few numbers; the statistics are another, in double precision: of
    each feature Σ rows mean and Σ rows (var + mean²), from which follow mean and variance of the whole batch (Chan,
    Golub & LeVeque 1979). Of buffers that are no batch norm's, a user's, the mean over the parts is taken.

    norms: each batch norm with the names of its buffers, by its place.
    parts: how many parts this rank has.
    own: an array of the compute dtype for the message, ``parameters.message`` where it is that.
    """

    def __init__(
        self,
        backend: Backend,
        parameters: Parameters,
        buffers: FlatViews,
        norms: Mapping[int, tuple[BatchNorm, Mapping[str, str]]],
        parts: int,
        own: Array,
    ) -> None:
        self.parts, self._xp, self._size = parts, backend.xp, parameters.size
        self._grads, self._buffers, self._norms = parameters.grads.flat, buffers, norms
        self._own = parameters.message
        self._sums = Tree(backend, parts, own)
        self.tail = backend.zeros(TAIL, buffers.dtype)  # that of the parts here
        self._statistics: Tree | None = None
        if buffers.size:
            self._statistics = Tree(backend, parts, backend.empty(buffers.size, np.float64))
            self._room = backend.empty(buffers.size, np.float64)
        noted = {name for _, names in norms.values() for name in names.values()}
        self._others = [buffers.spans[name] for name in buffers if name not in noted]
        self._leaf: Array = None
        self._of_leaf: Array = None

    def begin(self) -> None:
        """Begin the sums of a batch."""
        self._sums.begin()
        if self._statistics is not None:
            self._statistics.begin()

    def begin_part(self) -> Array:
        """Begin with a part; return where its loss is to be added up, an array of one element."""
        self._leaf = self._sums.leaf()
        self._leaf[self._size :].fill(0)
        if self._statistics is not None:
            self._of_leaf = self._statistics.leaf()
            self._of_leaf.fill(0)
        return self._in_tail(self._leaf, LOSS)

    def end_part(self, rows: int, weight: Array | None, before: Array) -> None:
        """Add the part, whose gradient is in ``grads``, with its weight: its rows, or an array of one element.

        before: all buffers before this batch, which are put back where they are not a batch norm's.
        """
        leaf = self._leaf
        if rows == 0:
            leaf.fill(0)
        else:
            of_part = self._in_tail(leaf, WEIGHT)
            of_part[...] = rows if weight is None else weight
            self._xp.multiply(self._grads, of_part, out=self._gradient_in(leaf), dtype=leaf.dtype)
            loss = self._in_tail(leaf, LOSS)
            loss *= of_part
        self._sums.add(leaf)
        if self._statistics is not None:
            for start, stop in self._others if rows else ():
                self._xp.multiply(self._buffers.flat[start:stop], rows, out=self._of_leaf[start:stop], dtype=np.float64)
                self._buffers.flat[start:stop] = before[start:stop]
            self._statistics.add(self._of_leaf)

    def note(self, place: int, rows: int, mean: Array, var: Array) -> bool:
        """Add a batch norm's statistics of the rows of a part; return False if it is none of ``norms``."""
        if place not in self._norms:
            return False
        of_mean, of_var = self._of_norm(place, self._of_leaf)
        room = self._room[: mean.size]
        self._xp.multiply(mean, mean, out=room, dtype=np.float64)
        room += var
        room *= rows
        of_var += room
        of_mean += self._xp.multiply(mean, rows, out=room, dtype=np.float64)
        return True

    def messages(self) -> tuple[Array, Array | None]:
        """The sums over the parts here, to be summed over the ranks: the gradient with its tail, and statistics."""
        message = self._sums.total()
        self.tail[...] = message[self._size :]
        return message, None if self._statistics is None else self._statistics.total()

    def divide(self, message: Array, loss: Array) -> None:
        """Make the mean gradient and loss of the whole batch of the message summed over all ranks."""
        weight = self._in_tail(message, WEIGHT)
        out = {"dtype": message.dtype, "casting": "same_kind"}
        self._xp.divide(self._gradient_in(message), weight, out=self._grads, **out)
        self._xp.divide(self._in_tail(message, LOSS), weight, out=loss, **out)

    def update_running(self, sums: Array, rows: int) -> None:
        """Update running statistics by those of the whole batch, and other buffers to their mean.

        sums: the second of :meth:`messages`, summed over all ranks; its memory is used.
        rows: those of the whole batch.
        """
        sums /= rows
        for start, stop in self._others:
            self._buffers.flat[start:stop] = sums[start:stop]
        for place, (norm, _) in self._norms.items():
            (mean, var), running = self._of_norm(place, sums), self._of_norm(place, self._buffers.flat)
            var -= self._xp.multiply(mean, mean, out=self._room[: mean.size])
            self._xp.maximum(var, 0, out=var)
            var *= rows / (rows - 1) if norm.unbiased_running else 1
            for old, new in zip(running, (mean, var), strict=True):
                new *= norm.momentum
                old *= 1 - norm.momentum
                old += new

    def _of_norm(self, place: int, flat: Array) -> list[Array]:
        """Where in an array like the buffers the mean and the variance of a batch norm lie."""
        names = self._norms[place][1]
        return [flat[slice(*self._buffers.spans[names[name]])] for name in ("running_mean", "running_var")]

    def _gradient_in(self, message: Array) -> Array:
        """The part of a message before its tail; of the parameters' own, the very array of gradients.

        CuPy would copy an operand that is another view of the memory of the result.
        """
        return self._grads if message is self._own else message[: self._size]

    def _in_tail(self, message: Array, place: int) -> Array:
        return message[self._size + place : self._size + place + 1]


class SumsInStep:
    """The sums over ranks that the batch norms of ``sync=True`` make during a step; see :class:`Together`.

    All are of the same size, and each rank makes ``count`` of them, whatever happens on it: :meth:`finish`.

    rows: those of the whole batch.
    room: an array of float64 for the longest.
    """

    def __init__(self, ranks: Ranks, rows: int, room: Array, count: int) -> None:
        self.rows, self._ranks, self._left, self._room = rows, ranks, count, room

    def sum(self, x: Array) -> Array:
        """The sum over the ranks of a short array, valid until the next call."""
        self._left -= 1
        self._room[x.size :] = 0
        self._room[: x.size] = x
        return self._ranks.sum_(self._room)[: x.size]

    def finish(self) -> None:
        """Make the sums that are left with zeros: this rank has no rows, or an error ended its part of the step."""
        while self._left:
            self.sum(self._room[:0])


def sums_bytes(parameters: Parameters, buffers: FlatViews, parts: int) -> int:
    """The bytes of :class:`PartSums`; nothing is allocated."""
    itemsize, mixed = int(buffers.dtype.itemsize), buffers.dtype != parameters.dtype
    of_gradients = (kept(parts) + mixed) * (parameters.size + TAIL) + TAIL
    return of_gradients * itemsize + 8 * buffers.size * (kept(parts) + 2 if buffers.size else 0)
