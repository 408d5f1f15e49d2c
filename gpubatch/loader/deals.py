"""How a batch is dealt to shards, and the shards to ranks."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np

from gpubatch.errors import ArgumentError, check_int
from gpubatch.parallel import Ranks, check_ranks
from gpubatch.passes import Deal

SHARDS = 8  # the default where ranks are given
MOST_SHARDS = 1 << 16


class PartOf(NamedTuple):
    """A shard's samples in an epoch by windows: positions ``start`` to ``stop`` of the list of shuffled blocks."""

    number: int
    start: int
    stop: int


class Dealing(NamedTuple):
    """The parts of a batch: ``shards`` of them, one after another. Rank ``rank`` of ``size`` has neighbouring parts.

    Parts differ by at most one row; the larger ones come first. They do not depend on the ranks. With one shard the
    batch is one part.
    """

    shards: int
    rank: int = 0
    size: int = 1

    def deal(self, rows: int) -> Deal:
        """How a batch of ``rows`` rows lies among parts and ranks."""
        return _deal(rows, *self)

    def in_batch(self, rows: int) -> dict[int, int]:
        """The number of rows in each of this rank's parts, by the part's number."""
        return dict(zip(self.own_parts, self.deal(rows).parts, strict=True))

    def own(self, rows: int) -> int:
        """The number of rows that this rank has of a batch of ``rows``."""
        return sum(self.deal(rows).parts)

    def smallest(self, rows: int) -> int:
        """The number of rows in the smallest non-empty part of a batch, over all ranks."""
        return max(rows // self.shards, 1)

    def largest(self, rows: int) -> int:
        """The number of rows in the largest part of a batch, over all ranks."""
        return -(-rows // self.shards)

    def positions(self, start: int, stop: int) -> tuple[int, int]:
        """The start and stop of this rank's rows in the batch at positions ``start`` to ``stop``."""
        deal = self.deal(stop - start)
        return start + deal.first, start + deal.first + sum(deal.parts)

    @property
    def own_parts(self) -> range:
        """The numbers of this rank's parts."""
        own = self.shards // self.size
        return range(self.rank * own, (self.rank + 1) * own)

    def in_parts(self, start: int, stop: int, size: int) -> list[tuple[int, int]]:
        """The positions of a batch of ``size``, or of the last one, in each of this rank's parts of the epoch."""
        before, whole, rows = start // size, self.deal(size).parts, self.deal(stop - start).parts
        return [(before * of, before * of + more) for of, more in zip(whole, rows, strict=True)]

    def parts_of(self, n: int, size: int) -> list[PartOf]:
        """This rank's parts of an epoch of ``n`` samples in batches of ``size``."""
        full, rest = divmod(n, size)
        whole, last = (Deal.of(rows, self.shards).parts for rows in (size, rest))
        ends = np.cumsum([0, *(full * a + b for a, b in zip(whole, last, strict=True))]).tolist()
        return [PartOf(number, ends[number], ends[number + 1]) for number in self.own_parts]


_deal = functools.lru_cache(16)(Deal.of)  # an epoch has two sizes of batches, each of which is needed often


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
