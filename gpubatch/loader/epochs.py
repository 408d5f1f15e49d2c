"""The epochs of a loader as training goes through them: the plan of a batch, the feed, the position, the batches."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import Any, TypeVar

import numpy as np

from gpubatch.backend import Array, CudaBackend
from gpubatch.errors import ArgumentError, DTypeError, InsufficientMemoryError, check_int
from gpubatch.loader.columns import Columns
from gpubatch.loader.device import DeviceFeed
from gpubatch.loader.feeds import (
    BatchFeed,
    Finish,
    LoaderStats,
    MainMemory,
    OnDevice,
    ThroughPinned,
    belongs_on_device,
)
from gpubatch.loader.order import WORD, Fraction, Order
from gpubatch.parallel import Ranks
from gpubatch.passes import DataPass, Deal
from gpubatch.sizing import BatchPlan, ByPart, fits, format_bytes, plan_batch_size

Batch = TypeVar("Batch")


@dataclasses.dataclass(frozen=True)
class Memories:
    """What a plan counts beside the loader's own: a model, and the batches that its captured steps keep.

    ``least_rows`` is the smallest batch that it can train on.
    """

    parts_of: Callable[[int], ByPart] = lambda batch_size: {}
    kept: int = 0
    as_rows: bool = False
    least_rows: int = 1


class Epochs:
    """The epochs of a loader, one after another; a :class:`Loader` shows what users need of them.

    ``at_most``, ``drop_last``, ``prefetch`` and ``feed`` are the loader's arguments; ``batch_size`` too, None for
    "auto", which ``ranks`` decide together. ``plan`` is the batch size and its reason, ``feeding`` says how batches get
    to the backend, and ``stats`` what the epoch that is running, or the last one, did.
    """

    def __init__(
        self,
        columns: Columns,
        order: Order,
        batch_size: int | None,
        at_most: int = 512,
        drop_last: bool | str = False,
        prefetch: int = 2,
        feed: str = "auto",
        ranks: Ranks | None = None,
    ) -> None:
        self.columns, self.order, self.backend, self.ranks = columns, order, columns.backend, ranks
        self.at_most, self.drop_last, self.prefetch, self.feed = at_most, drop_last, prefetch, feed
        self.automatic = batch_size is None
        self.stats = LoaderStats()
        self._choose_feeds()
        self._epoch = self._batch = 0  # the position: batches of this epoch that were yielded
        self._run: object | None = None  # the iteration that is running
        self._left = False  # whether the iteration before was left in the middle
        self._source, self._pass = object(), DataPass(None, 0)  # the source is that of the passes of this loader
        self._why = f"batch_size={batch_size} was given"
        self._model = Memories()
        self._trained: Epochs | None = None  # those whose data these share
        self._held_out: Epochs | None = None  # a fraction of these, meanwhile
        if batch_size is None:
            self.plan = self._choose()
        elif drop_last is True and batch_size > order.share:
            raise ArgumentError(
                f"drop_last=True leaves no batch: batch_size={batch_size} is more than the {order.share} samples"
            )
        else:
            self.plan = self._given(min(batch_size, order.share))

    def __copy__(self) -> Epochs:
        """The same epochs, with a position and passes of their own."""
        twin = object.__new__(type(self))
        vars(twin).update(vars(self))
        twin._source, twin._pass = object(), DataPass(None, 0)
        return twin

    def _choose_feeds(self) -> None:
        """Begin with no batch made: the feed of a device is chosen by the first iteration."""
        self._feed: BatchFeed | None = None  # None: not decided
        if isinstance(self.backend, CudaBackend):
            self._on_device = OnDevice(self.columns, self.order, self.backend)
            self._through_pinned = ThroughPinned(self.columns, self.order, self.prefetch, self.backend)
            self.feeding = "not decided before the first iteration"
        else:
            self._feed, self.feeding = MainMemory(self.columns, self.order, self.prefetch), "in main memory"

    def take_dtype(self, dtype: np.dtype[Any]) -> None:
        """Make batches of ``dtype`` from the next iteration on."""
        self.columns.take(dtype)
        self._choose_feeds()

    # --- sizes --------------------------------------------------------------------------------------------------

    @property
    def batch_size(self) -> int:
        """Samples in a batch; the last one of an epoch may have fewer."""
        return self.plan.batch_size

    def __len__(self) -> int:
        """Batches in an epoch."""
        return self._batches_of(self.order.share, self.batch_size)

    def _batches_of(self, samples: int, batch_size: int) -> int:
        full, rest = divmod(samples, batch_size)
        single = rest > 0 and self.order.dealing.smallest(rest) == 1 and full > 0
        left_out = self.drop_last is True or (self.drop_last == "single" and single)
        return full if left_out else full + (rest > 0)

    def _last_of(self, samples: int, batch_size: int) -> int:
        return min(batch_size, samples - (self._batches_of(samples, batch_size) - 1) * batch_size)

    def rows_of(self, batch: int) -> int:
        """Samples in the batch of this number, on all ranks if batches are dealt."""
        return self.batch_size if batch < len(self) - 1 else self._last_of(self.order.share, self.batch_size)

    def deal_of(self, batch: int) -> Deal | None:
        """How the batch of this number lies among parts and ranks, where it is dealt."""
        return self.order.deal(self.rows_of(batch))

    @property
    def smallest(self) -> int:
        """The samples that are computed together in a step where these are fewest: of a batch, or of a part of one."""
        return min(self.order.dealing.smallest(rows) for rows in (self.rows_of(0), self.rows_of(len(self) - 1)))

    @property
    def batches_held(self) -> int:
        """Batches that are in the backend's memory at a time: the one in use, and those prepared ahead."""
        return 1 + (self._feed.ahead(self.batch_size) if isinstance(self._feed, MainMemory) else 0)

    # --- the plan -----------------------------------------------------------------------------------------------

    def replan(
        self,
        parts_of: Callable[[int], ByPart],
        held: int = 0,
        available: int | None = None,
        most: int | None = None,
        kept: int = 0,
        least_rows: int = 1,
    ) -> BatchPlan:
        """Make the plan again with a model, which needs the bytes ``parts_of(batch_size)`` beside the loader's own.

        ``kept`` is how many batches more than one captured steps keep that do not gather their own. ``available`` is a
        number of bytes, by default what the backend has now and ``held``, which the model has already. An automatic
        batch size is chosen again, which must not be in the middle of an epoch; one that is decided stays. ``most`` is
        taken after a step of the size that was chosen found no memory. No batch of an automatic size has fewer than
        ``least_rows`` samples, where such a size is found.
        """
        self._model = Memories(parts_of, kept, True, least_rows)
        if not self.automatic:
            self.plan = self._given(self.batch_size, held, available)
            return self.plan
        if self._run is not None:
            raise ArgumentError(f"replan must come between epochs, epoch {self._epoch} is at batch {self._batch}")
        if most is None:
            plan = self._choose(held, available)
        else:
            self._why = f"a step of {self.batch_size} samples was tried and memory ran out, so the batch is {most}"
            plan = self._without_a_rest(self._given(most, held, available), held, available)
        self._epoch, self._batch, self._left = self.epoch, 0, False
        self.plan = plan
        return plan

    def _choose(self, held: int = 0, available: int | None = None) -> BatchPlan:
        # By the largest rank's share, so that every rank of equal devices decides alike.
        share = -(-self.order.n // self.order.world_size)
        available = self._available() + held if available is None else available
        try:
            plan = plan_batch_size(share, lambda n: self.parts(n, available), available, self.at_most)
        except InsufficientMemoryError:
            self._least_of_ranks(0)
            raise
        plan = dataclasses.replace(plan, batch_size=min(plan.batch_size, self.order.share))
        if self.order.dealt:
            plan = self._for_all_parts(plan, held, available)
        return self._without_a_rest(plan, held, available)

    def _least_of_ranks(self, size: int) -> int:
        return size if self.ranks is None else int(-self.ranks.most([-size])[0])

    def _for_all_parts(self, plan: BatchPlan, held: int, available: int) -> BatchPlan:
        """``plan`` at the batch size of the rank with the least memory, or larger to have rows for every part."""
        least = self._least_of_ranks(plan.batch_size)
        if not least:
            raise InsufficientMemoryError("not even one sample fits in the memory of another rank")
        enough = min(self.order.dealing.shards * self._model.least_rows, self.order.share)
        if max(least, enough) == plan.batch_size:
            return plan
        self._why = f"the rank with the least memory takes batches of {least}"
        if least < enough:
            self._why = f"{self.order.dealing.shards} parts of {self._model.least_rows} make a batch of {enough}"
        return self._given(max(least, enough), held, available)

    def _without_a_rest(self, plan: BatchPlan, held: int, available: int | None) -> BatchPlan:
        """``plan``, or one of somewhat smaller batches if its last batch were too small for the model.

        A power of two that leaves one sample is not mended by a smaller one, which leaves one, too.
        """
        size, least, order = plan.batch_size, self._model.least_rows, self.order
        shares = order.n // order.world_size, -(-order.n // order.world_size)  # every rank decides alike

        def last(batch_size: int) -> int:
            return min(order.dealing.smallest(self._last_of(share, batch_size)) for share in shares)

        sizes = (size, *(size * i // 8 for i in (6, 7, 5)))
        better = next((n for n in sizes if order.dealing.smallest(n) >= least and last(n) >= least), size)
        if better == size:
            return plan
        self._why = f"batches of {size} would leave {last(size)} to the last one, where the model needs {least}"
        return self._given(better, held, available)

    def _given(self, batch_size: int, held: int = 0, available: int | None = None) -> BatchPlan:
        available = self._available() + held if available is None else available
        parts, share = self.parts(batch_size, available), self.order.share
        needed = sum(parts.values())
        reason = self._why + ("" if batch_size < share else f", and all {share} samples are one batch")
        reason += f"; it needs {format_bytes(needed)} of {format_bytes(available)} available"
        reason += "" if fits(needed, available) else ", more than 90 % of that"
        return BatchPlan(batch_size, reason, needed, available, parts)

    def _available(self) -> int:
        """Bytes for what the plan counts: those free now, and those of the data that were copied to the device."""
        copied = self._feed.copied_bytes if isinstance(self._feed, OnDevice) else 0
        return self.backend.memory().available + copied

    def parts(self, batch_size: int, available: int) -> dict[str, int]:
        """The bytes that the model of the plan and the loader need, by what they are for; ``available`` as in a plan.

        The feed is the one that the first iteration will choose, if memory stays as it is until then.
        """
        feed = self._feed
        if feed is None:
            try:
                feed, _ = self._choice(batch_size, available)
            except InsufficientMemoryError:  # which is for the first iteration to say
                feed = self._on_device
        own = feed.memory_parts(batch_size, self._model.kept, self._model.as_rows)
        return {**self._model.parts_of(self.order.dealing.largest(batch_size)), **own}

    # --- validation ---------------------------------------------------------------------------------------------

    @classmethod
    def of_columns(cls, columns: Columns, batch_size: int) -> Epochs:
        """All samples of ``columns`` in their order."""
        return cls(columns, Order(columns.n_samples, shuffle=False), min(batch_size, columns.n_samples), feed="host")

    def in_order(self, batch_size: int) -> Epochs:
        """The same samples for validation, in the order of the set, without augmentation.

        Where batches are dealt, each rank has all of these.
        """
        order = Order(self.order.n, 0, False, False, self.order.rank, self.order.world_size)
        feed = "device" if self.feed == "device" else "host"
        return Epochs(self.columns.unaugmented(), order, batch_size, prefetch=self.prefetch, feed=feed)

    @contextlib.contextmanager
    def holding_out(self, fraction: float, batch_size: int) -> Iterator[Epochs]:
        """Meanwhile leave out ``fraction`` of the samples, a function of the seed; yields them for validation.

        Those are neither shuffled nor augmented, and each rank has all. On a device they are taken from where they
        are, and move there through pinned memory.
        """
        columns, order, before = self.columns, self.order, self.plan
        of = Fraction(columns.n_samples, fraction, order.seed, columns.labels)
        if of.n - of.held < order.world_size:
            raise ArgumentError(f"validation={fraction:g} leaves {of.n - of.held} samples to {order.world_size} ranks")
        held_out = Order(columns.n_samples, shuffle=False)
        held_out.take_version(min(order.version, held_out.version))
        try:
            order.choose_side(of, False, order.window > 0 or not order.shuffle)
            held_out.choose_side(of, True, bool(columns.readers))
            self._epoch, self._batch, self._run, self._left = self.epoch, 0, None, False
            if self.batch_size > order.share:
                self.plan = self._given(order.share)
            self._held_out = Epochs(columns.unaugmented(), held_out, batch_size, prefetch=self.prefetch, feed="host")
            self._held_out._trained = self
            yield self._held_out
        finally:
            self._held_out = None
            order.choose(None)
            if before.batch_size > self.batch_size and not self.automatic:
                self.plan = before

    # --- the feed -----------------------------------------------------------------------------------------------

    def _choice(self, batch_size: int, available: int) -> tuple[OnDevice | ThroughPinned, str]:
        """The feed of a device, and in words why."""
        model = self._model.parts_of(self.order.dealing.largest(batch_size))
        pinned = self._through_pinned.memory_parts(batch_size, self._model.kept, self._model.as_rows)
        needed = sum(model.values()) + sum(pinned.values())
        listed = 0 if self.order.by_kernels else self.order.own_share(batch_size)
        listed += self.order.kernel_sums
        there, words = belongs_on_device(self.columns, self.feed, listed, needed, available, bool(model))
        return self._on_device if there else self._through_pinned, words

    def _chosen(self, stats: LoaderStats) -> BatchFeed:
        """The feed, chosen by the first iteration."""
        if self._feed is not None:
            return self._feed
        if self._trained is not None and isinstance(there := self._trained._feed, OnDevice):
            self._feed, self.feeding = there.of(self.order), self._trained.feeding
            return self._feed
        feed, self.feeding = self._choice(self.batch_size, self.plan.available)
        if isinstance(feed, OnDevice):
            try:
                feed.copy_data(stats)
            except MemoryError:  # what is free is not in one piece, or others took it meanwhile
                if self.feed == "device":
                    raise
                feed, why = self._through_pinned, "since a copy of the data failed"
                self.feeding = f"batches go to {self.backend.spec} through pinned memory, {why}"
        self._feed = feed
        # It is not the one that was planned where memory has become less, or the copy failed.
        parts = self.parts(self.batch_size, self.plan.available)
        self.plan = dataclasses.replace(self.plan, parts=parts, needed=sum(parts.values()))
        return feed

    def device_feed(self) -> DeviceFeed | None:
        """What gathers whole batches on the device without the host, where that can be."""
        if not isinstance(self.backend, CudaBackend) or not self._on_device.gathers_whole:
            return None
        feed = self._chosen(self.stats)
        return feed.captured(self.batch_size) if isinstance(feed, OnDevice) else None

    # --- one epoch ----------------------------------------------------------------------------------------------

    @property
    def epoch(self) -> int:
        """The number of the epoch that is running, or else of the next one, counted from 0."""
        return self._epoch + self._left

    def coming_pass(self) -> DataPass:
        """The pass of the next iteration: that of the epoch, however often it is gone on with."""
        if self._pass.source is not self._source or self._pass.epoch != self.epoch:
            self._pass.end()
            self._pass = DataPass(self._source, self.epoch)
        self._pass.start = self._pass.batches = 0 if self._left else self._batch
        return self._pass

    @contextlib.contextmanager
    def _iteration(self) -> Iterator[Callable[[], None]]:
        """One iteration, until its epoch ends or it is left; yields what raises when there is a newer one."""
        if self._left or (self._run is not None and self._batch):
            self._epoch, self._batch = self._epoch + 1, 0
        self._left = False
        run = self._run = object()
        self._pass.end()
        self.coming_pass().begin()

        def check() -> None:
            if self._run is not run:
                raise ArgumentError(
                    "this iteration was ended by a newer one, or by load_state_dict: one runs at a time, so another "
                    "loop or thread takes a loader of its own, copy.copy(loader)"
                )

        try:
            yield check
            if self._batch == len(self):
                self._epoch, self._batch = self._epoch + 1, 0
        finally:
            if self._run is run:
                self._run, self._left = None, self._batch > 0
                self._pass.end()

    def batches(self, finish: Finish[Batch]) -> Generator[Batch]:
        """An epoch, or its rest: what ``finish`` makes of each batch."""
        with self._iteration() as check:
            stats, first = LoaderStats(), 0.0
            self.stats = stats
            read, size = self.columns.bytes_read(), self.batch_size
            asked = time.perf_counter()
            starts = range(self._batch * size, len(self) * size, size)
            feed = self._chosen(stats)
            dealt = self.order.dealt
            made: Finish[Batch] = self._in_parts(finish) if dealt else finish
            with contextlib.closing(feed.batches(self._epoch, starts, made, stats)) as batches:
                for batch in batches:
                    check()  # what made the batch, or another thread, may have begun a newer one
                    deal = self.deal_of(self._batch) if dealt else None
                    self._batch += 1
                    now = time.perf_counter()
                    if stats.batches:
                        stats.waited += now - asked
                        stats.seconds = now - first
                    else:
                        stats.wait_first, first = now - asked, now
                    stats.batches += 1
                    done = min(self._batch * size, self.order.share)
                    stats.samples = done - starts.start if deal is None else stats.samples + sum(deal.parts)
                    stats.bytes_read = self.columns.bytes_read(stats.samples) - read
                    self._pass.give_out(batch, deal)
                    yield batch
                    asked = time.perf_counter()
                    del batch  # so that it can be freed before the next one is made
                    check()

    def _in_parts(self, finish: Finish[Batch]) -> Finish[Batch]:
        """``finish`` for rows that are parts of a batch."""
        in_batch = self.order.dealing.in_batch
        return lambda rows, epoch, number: finish(rows, epoch, number, in_batch(self.rows_of(number)))

    @contextlib.contextmanager
    def gathered_by(self, feed: DeviceFeed) -> Iterator[Callable[[int], None]]:
        """An epoch, or its rest, whose batches ``feed`` gathers; yields a function that is told how many were used."""
        with self._iteration() as check:
            of, epoch, stats, first = self.order, self._epoch, LoaderStats(), self._batch
            # Captured steps gather their batches where the data are on the device.
            order = self._on_device.computed(epoch, stats) if of.by_kernels else of.whole(epoch, self.batch_size)
            stats.bytes_copied += feed.begin(order)
            before = of.dealing.own(self.batch_size) * first
            self.stats = stats

            def used(batches: int) -> None:
                check()
                self._batch += batches
                self._pass.batches += batches
                stats.batches += batches
                done = min(self._batch * self.batch_size, of.share)
                stats.samples = of.own_share(self.batch_size, done) - before
                stats.bytes_read = self.columns.bytes_read(stats.samples)

            yield used

    def prepare_next_order(self) -> None:
        """Make the order of the next epoch now, while a device works on this one."""
        self.order.prepare(self._epoch + 1, self.batch_size)

    def peek(self) -> list[Array]:
        """The first batch of epoch ``epoch`` as rows; the position stays as it is."""
        size, rows = min(self.batch_size, self.order.share), None
        feed = self._through_pinned if self._feed is None and self.columns.readers else self._feed
        if isinstance(feed, (MainMemory, ThroughPinned)) and self.order.dealing.own(size) and self._run is None:
            rows = feed.first_rows(self.epoch, size)
        if rows is None:
            index = self.order.between(self.epoch, size)(0, size)
            rows = self.columns.at(index) if len(index) else self.columns.no_rows()
        parts = self.order.dealing.in_batch(size) if self.order.dealt else None
        return self.columns.as_rows(rows, self.epoch, 0, parts)

    # --- state --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """See :meth:`Loader.state_dict`."""
        complete, order = self._batch == len(self), self.order
        of_rank = {"rank": order.rank, "world_size": order.world_size}
        return {
            "order": order.version,
            "seed": order.seed,
            "epoch": self._epoch + complete,
            "batch": 0 if complete else self._batch,
            "batch_size": self.batch_size,
            "n_samples": order.n,
            "shuffle": order.shuffle,
            "replacement": order.replacement,
            "drop_last": self.drop_last,
            **({"shards": order.dealing.shards} if order.dealt else of_rank),
            "window": order.window,
            "block": order.block,
            **({} if order.weighted is None else {"weights": order.weighted.digest}),
            **({"files": files} if (files := self.columns.files) else {}),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See :meth:`Loader.load_state_dict`."""
        if not isinstance(state, Mapping):
            raise DTypeError(f"state must be a mapping from state_dict(), got {type(state).__name__}")
        state, version = {"order": 1, **state}, self.order.version  # states of old have no version of the order
        self._take_version(check_int("state['order']", state["order"], 1))
        try:
            epoch, batch, batch_size = self._position(state)
        except BaseException:
            self._take_version(version)
            raise
        if self.automatic:
            self._why = f"batch_size={batch_size} was taken from a saved state"
        if batch_size != self.batch_size or self.order.version != version:
            self._model = Memories()
            self.plan = self._given(batch_size)
        self.automatic = False  # it is decided: another size would make other batches of the epoch
        self._epoch, self._batch, self._run, self._left = epoch, batch, None, False
        self._pass.end()

    def _take_version(self, version: int) -> None:
        """Make the order as ``version`` does, and hold out the samples that it does."""
        self.order.take_version(version)
        if (held_out := self._held_out) is not None and held_out.order.version != version:
            held_out.order.take_version(version)
            held_out.plan = held_out._given(held_out.batch_size)

    def _position(self, state: Mapping[str, Any]) -> tuple[int, int, int]:
        """Epoch, batch and batch size of a state, which is compared with these epochs."""
        own = self.state_dict()
        if wrong := sorted(set(own) ^ set(state)):
            raise ArgumentError(f"state must have the keys {', '.join(own)}; missing or unknown: {', '.join(wrong)}")
        if state.get("files") != own.get("files"):
            raise ArgumentError(
                f"state has other files, {state['files']}; this loader has {own['files']}: some were added, removed or "
                "changed, or have another time of change, as copies may"
            )
        position = ("epoch", "batch", "batch_size") if self.automatic else ("epoch", "batch")
        for name in own:
            if name not in position and state[name] != own[name]:
                raise ArgumentError(f"state has {name}={state[name]!r}, this loader {name}={own[name]!r}")
        epoch = check_int("state['epoch']", state["epoch"], 0, WORD)
        batch_size = check_int("state['batch_size']", state["batch_size"], 1, self.order.share)
        last = self._batches_of(self.order.share, batch_size) - 1
        return epoch, check_int("state['batch']", state["batch"], 0, last), batch_size
