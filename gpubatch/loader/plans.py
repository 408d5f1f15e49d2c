"""The plan of a loader's batches: how large they are, and what they need."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

from gpubatch.errors import InsufficientMemoryError
from gpubatch.loader.order import Order
from gpubatch.parallel import Ranks
from gpubatch.sizing import BatchPlan, ByPart, fits, format_bytes, plan_batch_size


@dataclasses.dataclass(frozen=True)
class Memories:
    """What a plan counts beside the loader's own: a model, and the batches that its captured steps keep.

    ``least_rows`` is the smallest batch that it can train on.
    """

    parts_of: Callable[[int], ByPart] = lambda batch_size: {}
    kept: int = 0
    as_rows: bool = False
    least_rows: int = 1


class Room(NamedTuple):
    """The memory for batches.

    available: bytes
    parts_of: the bytes that batches of a size need, by what they are for
    least_rows: as of :class:`Memories`
    """

    available: int
    parts_of: Callable[[int], dict[str, int]]
    least_rows: int


@dataclasses.dataclass(frozen=True, eq=False)
class BatchSizes:
    """The sizes of the batches of an ``order``, as the arguments of a loader say."""

    order: Order
    drop_last: bool | str
    at_most: int
    ranks: Ranks | None

    def batches_of(self, samples: int, size: int) -> int:
        """How many batches of ``size`` so many samples are."""
        full, rest = divmod(samples, size)
        single = rest > 0 and self.order.dealing.smallest(rest) == 1 and full > 0
        left_out = self.drop_last is True or (self.drop_last == "single" and single)
        return full if left_out else full + (rest > 0)

    def last_of(self, samples: int, size: int) -> int:
        """The samples of the last of these batches."""
        return min(size, samples - (self.batches_of(samples, size) - 1) * size)

    def given(self, size: int, why: str, room: Room) -> BatchPlan:
        """The plan of batches of a given size."""
        parts, share, available = room.parts_of(size), self.order.share, room.available
        needed = sum(parts.values())
        reason = why + ("" if size < share else f", and all {share} samples are one batch")
        reason += f"; it needs {format_bytes(needed)} of {format_bytes(available)} available"
        reason += "" if fits(needed, available) else ", more than 90 % of that"
        return BatchPlan(size, reason, needed, available, parts)

    def chosen(self, room: Room) -> BatchPlan:
        """The plan of the largest batches that fit; all ranks together decide on one size."""
        # By the largest rank's share, so that every rank of equal devices decides alike.
        share = -(-self.order.n // self.order.world_size)
        try:
            plan = plan_batch_size(share, room.parts_of, room.available, self.at_most)
        except InsufficientMemoryError:
            self._least_of_ranks(0)
            raise
        plan = dataclasses.replace(plan, batch_size=min(plan.batch_size, self.order.share))
        if self.order.dealt:
            plan = self._for_all_parts(plan, room)
        return self.without_a_rest(plan, room)

    def _least_of_ranks(self, size: int) -> int:
        return size if self.ranks is None else int(-self.ranks.most([-size])[0])

    def _for_all_parts(self, plan: BatchPlan, room: Room) -> BatchPlan:
        """``plan`` at the batch size of the rank with the least memory, or larger to have rows for every part."""
        shards, rows = self.order.dealing.shards, room.least_rows
        least = self._least_of_ranks(plan.batch_size)
        if not least:
            raise InsufficientMemoryError("not even one sample fits in the memory of another rank")
        enough = min(shards * rows, self.order.share)
        if max(least, enough) == plan.batch_size:
            return plan
        why = f"the rank with the least memory takes batches of {least}"
        if least < enough:
            why = f"{shards} parts of {rows} make a batch of {enough}"
        return self.given(max(least, enough), why, room)

    def without_a_rest(self, plan: BatchPlan, room: Room) -> BatchPlan:
        """``plan``, or one of somewhat smaller batches if its last batch were too small for the model.

        A power of two that leaves one sample is not mended by a smaller one, which leaves one, too.
        """
        size, least, order = plan.batch_size, room.least_rows, self.order
        shares = order.n // order.world_size, -(-order.n // order.world_size)  # every rank decides alike

        def last(size: int) -> int:
            return min(order.dealing.smallest(self.last_of(share, size)) for share in shares)

        sizes = (size, *(size * i // 8 for i in (6, 7, 5)))
        better = next((n for n in sizes if order.dealing.smallest(n) >= least and last(n) >= least), size)
        if better == size:
            return plan
        why = f"batches of {size} would leave {last(size)} to the last one, where the model needs {least}"
        return self.given(better, why, room)
