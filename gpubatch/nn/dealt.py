"""Training steps of a network on batches in parts: those of this process, and with ranks those of all."""

from __future__ import annotations

import math
import weakref
from typing import Any, NamedTuple, NoReturn

import numpy as np

from gpubatch.backend import Array
from gpubatch.errors import ArgumentError, DTypeError, NonFiniteError, ShapeError
from gpubatch.nn.core import Core, quiet
from gpubatch.nn.layers import BatchNorm
from gpubatch.nn.losses import NO_MEAN
from gpubatch.nn.parts import PartSums, SumsInStep, sums_bytes
from gpubatch.parallel import Ranks, first_of
from gpubatch.params import FAILED, LOSS, OUT_OF_MEMORY, SIGNALLED, TAIL, WEIGHT
from gpubatch.passes import Deal, deal_of, pass_of

# Errors of one rank that all ranks raise.
ALIKE: dict[str, type[Exception]] = {
    kind.__name__: kind for kind in (ArgumentError, DTypeError, MemoryError, NonFiniteError, ShapeError)
}


class WholeStep(NamedTuple):
    """A step on a batch in parts: its loss over all ranks, and whether any of them was ``signalled``."""

    loss: float
    signalled: bool


class DealtSteps:
    """The training steps that ``core`` makes on a batch in parts, here and on other ranks.

    The core has the workspaces, and frees the sums over the parts with them.
    """

    def __init__(self, core: Core) -> None:
        self.core, self.backend, self.compute_dtype = core, core.backend, core.compute_dtype
        self.parameters, self.buffers, self.in_sync = core.parameters, core.buffers, core.in_sync
        self._message_of_half: Array = None
        self._room: Array = None  # scratch memory for the sums of batch norms in sync
        self._met: weakref.WeakSet[Ranks] = weakref.WeakSet()  # the ranks that memory was allocated for

    def step(
        self,
        X: Array,
        Y: Array,
        weight: Array | None,
        deal: Deal,
        ranks: Ranks | None,
        micro_batch_size: int | None = None,
        signalled: bool = False,
    ) -> WholeStep:
        """Make the step of :meth:`Network.loss_and_grad` on the parts of a batch that this rank has.

        Even after an error this rank takes part in the sum over ranks, since the others wait for it. Then all ranks
        raise the same error: of a loss that is not finite, of memory that ran out, or any other of one rank.

        signalled: whether this rank wants all to know that it saw a signal.
        """
        error: Exception | None = None
        with self.core.training, self.backend.scope(), quiet():
            self.core.remember()
            if ranks is not None and ranks not in self._met:
                ranks.allocate(lambda: self._allocate_for(ranks))
                self._met.add(ranks)
            sums: PartSums | None = None
            together = self._together(weight, deal, ranks)
            try:
                self._check_parts(X, Y, weight, deal, ranks)
                if self.in_sync:
                    deal = self._at_once(X, deal, ranks, micro_batch_size)
                sums = self.part_sums(len(deal.parts))
                self.sum_parts(sums, X, Y, weight, deal, micro_batch_size, together)
                self.core.reserve(1)  # for the end of the step, which no rank may fail at alone
            except MemoryError as found:
                error = found.with_traceback(None)  # which would keep the arrays of the step alive
            except Exception as found:
                error = found
            if together is not None:
                together.finish()
            if error is not None or sums is None:  # the others wait for the message, which takes no more memory
                message, statistics = self._message(), None
                message.fill(0)
            else:
                message, statistics = sums.messages()
            memory, of_tail = isinstance(error, MemoryError), message[self.parameters.size :]
            failed = error is not None and not memory
            for place, raised in ((OUT_OF_MEMORY, memory), (SIGNALLED, signalled), (FAILED, failed)):
                if raised:
                    of_tail[place : place + 1].fill(1)
            if ranks is not None:
                ranks.sum_(message)
            tail = self.backend.to_numpy(of_tail).tolist()
            if tail[FAILED] or tail[OUT_OF_MEMORY] or not (math.isfinite(tail[LOSS]) and 0 < tail[WEIGHT] < math.inf):
                self.core.recall()
                own = 0.0 if sums is None or error is not None else self.backend.to_numpy(sums.tail)[LOSS].item()
                self._raise_alike(error, own, X, Y, weight, ranks)
            assert sums is not None
            if statistics is not None and ranks is not None:
                ranks.sum_(statistics)
            loss = self.finish_parts(sums, message, statistics, deal.rows).item()
            if not math.isfinite(loss):
                self.core.recall()
                raise NonFiniteError(
                    f"loss is {loss} after {self.core.mode.step} steps; the l2 term has grown out of range: lower the "
                    "learning rate"
                )
            self.core.mode.step += 1
        return WholeStep(loss, tail[SIGNALLED] > 0)

    def deal(self, X: Array, ranks: Ranks | None) -> Deal | None:
        """How X lies in the batch of all ranks; None if it is the whole batch, in one part."""
        deal, size = deal_of(X), 1 if ranks is None else ranks.size
        if deal is not None:
            return deal
        fed = pass_of(X)
        if fed is not None and fed.deal is not None:
            raise ShapeError(
                f"X must have as many rows as the loader gave{'' if size == 1 else ' this rank'}, "
                f"{sum(fed.deal.parts)}, got {len(X)}: of other rows nobody knows which parts of the batch they are"
            )
        if ranks is None or size == 1:
            return None
        if fed is not None:
            raise ArgumentError(
                "X is a batch of a Loader without ranks=, which gives each rank the same: give it ranks="
            )
        every = ranks.gather(len(X))
        return Deal(sum(every), sum(every[: ranks.rank]), (len(X),), size)

    def part_sums(self, parts: int) -> PartSums:
        """The :class:`PartSums` of ``parts`` parts; its memory is kept for the next steps."""
        if self.core.sums_of_parts is None or self.core.sums_of_parts.parts != parts:
            self.core.sums_of_parts = self.core.released(self.core.sums_of_parts)
            norms = {
                run.place: (run.layer, self.core.names[run.place])
                for run in self.core.layers
                if isinstance(run.layer, BatchNorm) and type(run.layer).backward is BatchNorm.backward
            }
            self.core.sums_of_parts = PartSums(
                self.backend, self.parameters, self.buffers, norms, parts, self._message()
            )
        return self.core.sums_of_parts

    def _message(self) -> Array:
        """The array of the message that ranks sum: the gradients', or where those are float16, another of float32."""
        if self.compute_dtype == self.core.dtype:
            return self.parameters.message
        if self._message_of_half is None:
            self._message_of_half = self.backend.empty(self.parameters.message.size, self.compute_dtype)
        return self._message_of_half

    def _allocate_for(self, ranks: Ranks) -> None:
        """Allocate and keep the message of a step with these ranks: a rank that runs out of memory sends it, too."""
        self._message()
        if self.in_sync and self._room is None:
            self._room = self.backend.zeros(2 * max(self.in_sync), np.float64)
        self.reserve_sums(ranks)

    def sum_parts(
        self,
        sums: PartSums,
        X: Array,
        Y: Array,
        weight: Array | None,
        deal: Deal,
        micro_batch_size: int | None = None,
        together: SumsInStep | None = None,
    ) -> None:
        """Launch this rank's parts of a batch, and their sum, without checks and without waiting for the device.

        together: sums over ranks for batch norms of ``sync=True``, which see all rows of this rank as one part.
        """
        before, start = self.core.statistics_before, 0
        self.core.mode.statistics, self.core.mode.together = sums.note, together
        sums.begin()
        try:
            for rows in deal.parts:
                part, total, of_part = slice(start, start + rows), sums.begin_part(), None

                def one(x: Array, y: Array, weights: Array | None, share: float, total: Array = total) -> None:
                    run = self.core.forward(x, y, weights, l2=False)
                    loss = run.loss.work["loss"]
                    loss *= share
                    total += loss
                    self.core.backward(run, x, l2=False)

                if rows:
                    x, y, self.core.mode.row = X[part], Y[part], deal.first + start
                    weights = self.core.weights(y, None if weight is None else weight[part], part=True)
                    of_part = None if weights is None else self.core.weighing.sum
                    if weights is not None and together is not None:
                        # Over the mean of all ranks' weights: also rows that count nothing are in the statistics.
                        weights *= of_part / together.sum(of_part) * (deal.rows / rows)
                        of_part = None
                    self.core.micro_batches(x, y, weights, micro_batch_size, one)
                sums.end_part(rows, of_part, before)
                start += rows
        finally:
            self.core.mode.statistics, self.core.mode.together, self.core.mode.row = None, None, 0

    def finish_parts(self, sums: PartSums, message: Array, statistics: Array | None, rows: int) -> Array:
        """Take gradients and running statistics from the sums over ranks; return the loss, an array of one element."""
        c = self.core.context_of_loss()
        sums.divide(message, c.work["loss"])
        if self.core.l2_names:
            self.core.add_l2(c)
        self.core.add_l2_gradient(c)
        if statistics is not None:
            sums.update_running(statistics, rows)
        return c.work["loss"]

    def enqueue(
        self,
        X: Array,
        Y: Array,
        weight: Array | None,
        step: Array,
        deal: Deal,
        ranks: Ranks | None,
        micro_batch_size: int | None = None,
    ) -> tuple[Array, Any]:
        """:meth:`Core.enqueue` for this rank's parts of a batch, and for the sum over ``ranks``.

        Returns the loss of the whole batch, an array of one element, and the objects to keep.
        """
        with self.core.enqueueing(step):
            sums = self.part_sums(len(deal.parts))
            self.sum_parts(sums, X, Y, weight, deal, micro_batch_size)
            message, statistics = sums.messages()
            for one in (message, statistics):
                if one is not None and ranks is not None:
                    ranks.sum_(one)
            loss = self.finish_parts(sums, message, statistics, deal.rows)
        of_ranks = None if ranks is None else ranks.owned(self.backend)
        return loss, (*self.core.owned, sums, of_ranks)

    def reserve_sums(self, ranks: Ranks) -> None:
        """Allocate the scratch memory of the sums over ranks, unless it is there already."""
        ranks.reserve(self.backend, self.parameters.size + TAIL, self.compute_dtype)
        ranks.reserve(self.backend, self.buffers.size, np.float64)

    def _together(self, weight: Array | None, deal: Deal, ranks: Ranks | None) -> SumsInStep | None:
        """The sums over ranks during a step; None where there are none."""
        if ranks is None or ranks.size == 1 or not self.in_sync:
            return None
        count = 3 * len(self.in_sync) + self.core.weighs(weight is not None)
        return SumsInStep(ranks, deal.rows, self._room, count)

    def _at_once(self, X: Array, deal: Deal, ranks: Ranks | None, micro_batch_size: int | None) -> Deal:
        """All rows of each rank as one part, for batch norms that take the statistics of the whole batch."""
        if micro_batch_size is not None and micro_batch_size < len(X):
            raise ArgumentError(
                f"micro_batch_size must be at least the {len(X)} rows of this rank with BatchNorm(sync=True), which "
                f"takes the statistics of all at once, got {micro_batch_size}"
            )
        return Deal(deal.rows, deal.first, (len(X),), 1 if ranks is None else ranks.size)

    def check_parts(self, rows: int, shards: int) -> None:
        """Raise if a batch of ``rows`` rows has parts that are too small for batch normalisation."""
        shards = 1 if self.in_sync else shards
        least = max(1, rows // shards)  # of the parts that are not empty
        if least < self.core.least_rows:
            raise ArgumentError(
                f"a batch of {rows} rows in {shards} parts has one of {least}; BatchNorm needs more than one sample: "
                "drop the last batch (drop_last=True), or choose another batch size, or fewer shards"
            )

    def _check_parts(self, X: Any, Y: Any, weight: Any, deal: Deal, ranks: Ranks | None) -> None:
        """Raise unless X and Y can be the parts that this rank has of a batch."""
        size = 1 if ranks is None else ranks.size
        if deal.rows == 0:
            raise ShapeError("X must have at least one row on one of the ranks, got none")
        if len(deal.parts) * size != deal.shards or sum(deal.parts) != len(X):
            raise ArgumentError(
                f"X has {len(X)} rows, {sum(deal.parts)} of the {deal.rows} of a batch in {deal.shards} parts for "
                f"{deal.shards // len(deal.parts)} ranks, but there are {size}: loader and step need the same ranks="
            )
        self.check_parts(deal.rows, deal.shards)
        if len(X):
            self.core.batches.check(X, Y, values=True, weight=weight)

    def _raise_alike(
        self, error: Exception | None, loss: float, X: Array, Y: Array, weight: Array | None, ranks: Ranks | None
    ) -> NoReturn:
        """Raise the same error on all ranks: this one's, or the first one's that has one.

        loss: the sum of this rank's losses.
        """
        if error is None and not math.isfinite(loss):
            try:
                self.core.finite(loss, X, Y, weight)
            except Exception as found:
                error = found
        first = first_of(ranks, None if error is None else [type(error).__name__, str(error) or "out of memory"])
        if error is not None:
            raise error
        if first is not None:
            rank, (kind, words) = first
            raise ALIKE.get(kind, RuntimeError)(f"{words} (on rank {rank})")
        raise NonFiniteError(f"loss is not finite after {self.core.mode.step} steps: {NO_MEAN}, or it overflows")

    def parts_bytes(self, parts: int) -> int:
        """Bytes for the sums over ``parts`` parts."""
        return sums_bytes(self.parameters, self.buffers, parts)

    def ranks_bytes(self, ranks: Ranks) -> int:
        """Bytes for the sums over ranks."""
        message = ranks.sum_bytes(self.parameters.size + TAIL, self.compute_dtype)
        return max(message, ranks.sum_bytes(self.buffers.size, np.float64))
