"""How batches are dealt to shards, and the shards to ranks."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np

from gpubatch.errors import ArgumentError, check_int
from gpubatch.parallel import Ranks, check_ranks
from gpubatch.passes import Deal

SHARDS = 8  # where ranks are given and their number is not
MOST_SHARDS = 1 << 16


class PartOf(NamedTuple):
    """The samples of a shard in an epoch by windows: those at ``start`` to ``stop`` of the list of shuffled blocks."""

    number: int
    start: int
    stop: int


class Dealing(NamedTuple):
    """A batch is ``shards`` parts, one after another; rank ``rank`` of ``size`` has neighbouring ones.

    Parts differ by one row at most, and the first ones are the larger. What they are does not depend on the ranks.
    A batch of one part is a whole batch.
    """

    shards: int
    rank: int = 0
    size: int = 1

    def deal(self, rows: int) -> Deal:
        """How a batch of so many rows lies."""
        return _deal(rows, *self)

    def in_batch(self, rows: int) -> dict[int, int]:
        """The rows of each of this rank's parts, by its number."""
        return dict(zip(self.own_parts, self.deal(rows).parts, strict=True))

    def own(self, rows: int) -> int:
        """The rows that this rank has of a batch."""
        return sum(self.deal(rows).parts)

    def smallest(self, rows: int) -> int:
        """The rows of the smallest part of a batch, over all ranks, that is not empty."""
        return max(rows // self.shards, 1)

    def largest(self, rows: int) -> int:
        """The rows of the largest part of a batch, over all ranks."""
        return -(-rows // self.shards)

    def positions(self, start: int, stop: int) -> tuple[int, int]:
        """From where to where this rank's rows are, of the batch at positions ``start`` to ``stop`` of an epoch."""
        deal = self.deal(stop - start)
        return start + deal.first, start + deal.first + sum(deal.parts)

    @property
    def own_parts(self) -> range:
        """The numbers of this rank's parts."""
        own = self.shards // self.size
        return range(self.rank * own, (self.rank + 1) * own)

    def in_parts(self, start: int, stop: int, size: int) -> list[tuple[int, int]]:
        """The same batch, one of ``size`` or the last one, in each of this rank's parts, counted from its beginning."""
        before, whole, rows = start // size, self.deal(size).parts, self.deal(stop - start).parts
        return [(before * of, before * of + more) for of, more in zip(whole, rows, strict=True)]

    def parts_of(self, n: int, size: int) -> list[PartOf]:
        """This rank's parts of an epoch of ``n`` samples in batches of ``size``."""
        full, rest = divmod(n, size)
        whole, last = (Deal.of(rows, self.shards).parts for rows in (size, rest))
        ends = np.cumsum([0, *(full * a + b for a, b in zip(whole, last, strict=True))]).tolist()
        return [PartOf(number, ends[number], ends[number + 1]) for number in self.own_parts]


_deal = functools.lru_cache(16)(Deal.of)  # an epoch has two sizes of batches, and each is asked for often


def check_dealing(ranks: Ranks | None, shards: Any, rank: int, world_size: int) -> Dealing | None:
    """The loader's arguments ``ranks`` and ``shards``; None where neither is given."""
    if ranks is None and shards is None:
        return None
    check_ranks(ranks)
    if world_size != 1 or rank != 0:
        given = "ranks" if shards is None else "shards"
        raise ArgumentError(
            f"rank and world_size divide the samples of an epoch, {given} the rows of a batch: give one or the other, "
            f"got rank={rank}, world_size={world_size}"
        )
    shards = SHARDS if shards is None else check_int("shards", shards, 1, MOST_SHARDS)
    number, size = (0, 1) if ranks is None else (ranks.rank, ranks.size)
    each, rest = divmod(shards, size)
    if rest or each & (each - 1):
        raise ArgumentError(
            f"shards must be a power of two times the {size} ranks, so that the sum over them does not depend on their "
            f"number, got shards={shards}"
        )
    return Dealing(shards, number, size)
