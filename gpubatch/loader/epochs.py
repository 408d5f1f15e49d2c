"""The epochs of a loader, as training needs them: the plan of a batch, the feed, the position, the batches."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
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
    LookedAt,
    MainMemory,
    OnDevice,
    ThroughPinned,
    belongs_on_device,
)
from gpubatch.loader.order import WORD, Fraction, Order
from gpubatch.loader.plans import BatchSizes, Memories, Room
from gpubatch.loader.position import Position
from gpubatch.parallel import Ranks
from gpubatch.passes import DataPass, Deal
from gpubatch.sizing import BatchPlan, ByPart

Batch = TypeVar("Batch")


class Epochs:
    """The epochs of a loader, one after another; a :class:`Loader` shows what users need of them.

    batch_size: the loader's argument; None: "auto", which ``ranks`` decide together
    at_most, drop_last, prefetch, feed, ranks: the loader's arguments

    ``plan`` is the batch size and its reason, ``feeding`` says how batches get to the backend, and ``stats`` is what
    the running epoch, or the last one, did.
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
        self.sizes = BatchSizes(order, drop_last, at_most, ranks)
        self.prefetch, self.feed, self.automatic = prefetch, feed, batch_size is None
        self.stats = LoaderStats()
        self._choose_feeds()
        self._position = Position()
        self._why = "the batch size was chosen" if batch_size is None else f"batch_size={batch_size} was given"
        self._model = Memories()
        self._trained: Epochs | None = None  # the epochs whose data these share
        self._held_out: Epochs | None = None  # a fraction that is left out now
        if batch_size is None:
            self.plan = self.sizes.chosen(self._room())
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
        twin._position = copy.copy(self._position)
        return twin

    def _choose_feeds(self) -> None:
        """Start anew; the first iteration chooses the feed of a device."""
        self._feed: BatchFeed | None = None  # None: not chosen yet
        self._looked_at = LookedAt(self.columns, self.order)
        given = self.columns, self.order, self.prefetch, self._looked_at
        if isinstance(self.backend, CudaBackend):
            self._on_device = OnDevice(self.columns, self.order, self.backend)
            self._through_pinned = ThroughPinned(*given, self.backend)
            self.feeding = "not decided before the first iteration"
        else:
            self._feed, self.feeding = MainMemory(*given), "in main memory"

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
        return self.sizes.batches_of(self.order.share, self.batch_size)

    def rows_of(self, batch: int) -> int:
        """Samples in the batch of this number, on all ranks if batches are dealt."""
        return self.batch_size if batch < len(self) - 1 else self.sizes.last_of(self.order.share, self.batch_size)

    def deal_of(self, batch: int) -> Deal | None:
        """How the batch of this number lies among parts and ranks; None where batches are not dealt."""
        return self.order.deal(self.rows_of(batch))

    @property
    def smallest(self) -> int:
        """The fewest samples that a step computes together: of a batch, or of a part of one."""
        return min(self.order.dealing.smallest(rows) for rows in (self.rows_of(0), self.rows_of(len(self) - 1)))

    @property
    def batches_held(self) -> int:
        """The number of batches in the backend's memory: the one in use, and those prepared ahead."""
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
        """Make the plan again, with a model. An automatic batch size is chosen again, a decided one stays.

        parts_of: the bytes that the model needs for a batch size, by what they are for
        held: bytes that the model has already
        available: bytes; None: those that the backend has now, and ``held``
        most: the batch size, after a step of the size that was chosen ran out of memory
        kept, least_rows: as of :class:`Memories`; no batch of an automatic size is smaller, where that can be

        Raises ArgumentError in the middle of an epoch if the batch size is automatic.
        """
        self._model = Memories(parts_of, kept, True, least_rows)
        if not self.automatic:
            self.plan = self._given(self.batch_size, held, available)
            return self.plan
        at, room = self._position, self._room(held, available)
        if at.running:
            raise ArgumentError(f"replan must come between epochs, epoch {at.epoch} is at batch {at.batch}")
        if most is None:
            self.plan = self.sizes.chosen(room)
        else:
            self._why = f"a step of {self.batch_size} samples was tried and memory ran out, so the batch is {most}"
            self.plan = self.sizes.without_a_rest(self.sizes.given(most, self._why, room), room)
        at.go_to(at.current, 0)
        return self.plan

    def _given(self, batch_size: int, held: int = 0, available: int | None = None) -> BatchPlan:
        return self.sizes.given(batch_size, self._why, self._room(held, available))

    def _room(self, held: int = 0, available: int | None = None) -> Room:
        """The memory for batches: of ``available`` bytes, or of those that the backend has now and ``held``."""
        available = self._available() + held if available is None else available
        return Room(available, functools.partial(self.parts, available=available), self._model.least_rows)

    def _available(self) -> int:
        """Bytes for all that a plan counts: those free now, and those of the data copied to the device."""
        copied = self._feed.copied_bytes if isinstance(self._feed, OnDevice) else 0
        return self.backend.memory().available + copied

    def parts(self, batch_size: int, available: int) -> dict[str, int]:
        """The bytes that the model and the loader need, by what they are for, where ``available`` bytes are there.

        Before the first iteration the feed is the one that it would choose now.
        """
        feed = self._feed
        if feed is None:
            try:
                feed, _ = self._choice(batch_size, available)
            except InsufficientMemoryError:  # the first iteration will raise it
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
        """Leave out a ``fraction`` of the samples, a function of the seed, inside the ``with``; yields their epochs.

        Held-out samples are neither shuffled nor augmented, and each rank has all of them. They are gathered on the
        device where the data are there, and go there through pinned memory otherwise.
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
            self._position.go_to(self.epoch, 0)
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
        """The feed of a device, and the reason in words."""
        model = self._model.parts_of(self.order.dealing.largest(batch_size))
        pinned = self._through_pinned.memory_parts(batch_size, self._model.kept, self._model.as_rows)
        needed = sum(model.values()) + sum(pinned.values())
        listed = 0 if self.order.by_kernels else self.order.own_share(batch_size)
        listed += self.order.kernel_sums
        there, words = belongs_on_device(self.columns, self.feed, listed, needed, available, bool(model))
        return self._on_device if there else self._through_pinned, words

    def _chosen(self, stats: LoaderStats) -> BatchFeed:
        """The feed, which the first iteration chooses."""
        if self._feed is not None:
            return self._feed
        if self._trained is not None and isinstance(there := self._trained._feed, OnDevice):
            self._feed, self.feeding = there.of(self.order), self._trained.feeding
            return self._feed
        feed, self.feeding = self._choice(self.batch_size, self.plan.available)
        if isinstance(feed, OnDevice):
            try:
                feed.copy_data(stats)
            except MemoryError:  # free memory is in pieces, or others took it meanwhile
                if self.feed == "device":
                    raise
                feed, why = self._through_pinned, "since a copy of the data failed"
                self.feeding = f"batches go to {self.backend.spec} through pinned memory, {why}"
        self._feed = feed
        # Not the planned feed where less memory is free now, or the copy failed.
        parts = self.parts(self.batch_size, self.plan.available)
        self.plan = dataclasses.replace(self.plan, parts=parts, needed=sum(parts.values()))
        return feed

    def device_feed(self) -> DeviceFeed | None:
        """The feed that gathers whole batches on the device without the host; None where that cannot be."""
        if not isinstance(self.backend, CudaBackend) or not self._on_device.gathers_whole:
            return None
        feed = self._chosen(self.stats)
        return feed.captured(self.batch_size) if isinstance(feed, OnDevice) else None

    # --- one epoch ----------------------------------------------------------------------------------------------

    @property
    def epoch(self) -> int:
        """The number of the epoch that is running, or else of the next one, counted from 0."""
        return self._position.current

    def coming_pass(self) -> DataPass:
        """The pass of the next iteration."""
        return self._position.coming_pass()

    def batches(self, finish: Finish[Batch]) -> Generator[Batch]:
        """An epoch, or its rest: the result of ``finish`` for each batch."""
        at = self._position
        with at.iteration(self.__len__) as check:
            stats, first = LoaderStats(), 0.0
            self.stats = stats
            read, size = self.columns.bytes_read(), self.batch_size
            asked = time.perf_counter()
            starts = range(at.batch * size, len(self) * size, size)
            feed = self._chosen(stats)
            dealt = self.order.dealt
            made: Finish[Batch] = self._in_parts(finish) if dealt else finish
            with contextlib.closing(feed.batches(at.epoch, starts, made, stats)) as batches:
                for batch in batches:
                    check()  # a function of the user's, or another thread, may have begun a newer iteration
                    deal = self.deal_of(at.batch) if dealt else None
                    at.batch += 1
                    now = time.perf_counter()
                    if stats.batches:
                        stats.waited += now - asked
                        stats.seconds = now - first
                    else:
                        stats.wait_first, first = now - asked, now
                    stats.batches += 1
                    done = min(at.batch * size, self.order.share)
                    stats.samples = done - starts.start if deal is None else stats.samples + sum(deal.parts)
                    stats.bytes_read = self.columns.bytes_read(stats.samples) - read
                    at.of_pass.give_out(batch, deal)
                    yield batch
                    asked = time.perf_counter()
                    del batch  # it can be freed before the next one is made
                    check()

    def _in_parts(self, finish: Finish[Batch]) -> Finish[Batch]:
        """``finish`` for rows that are parts of a batch."""
        in_batch = self.order.dealing.in_batch
        return lambda rows, epoch, number: finish(rows, epoch, number, in_batch(self.rows_of(number)))

    @contextlib.contextmanager
    def gathered_by(self, feed: DeviceFeed) -> Iterator[Callable[[int], None]]:
        """An epoch, or its rest, whose batches ``feed`` gathers; yields a function to call with the number used."""
        at = self._position
        with at.iteration(self.__len__) as check:
            of, epoch, stats, first = self.order, at.epoch, LoaderStats(), at.batch
            # Captured steps gather their batches where the data are on the device.
            order = self._on_device.computed(epoch, stats) if of.by_kernels else of.whole(epoch, self.batch_size)
            stats.bytes_copied += feed.begin(order)
            before = of.dealing.own(self.batch_size) * first
            self.stats = stats

            def used(batches: int) -> None:
                check()
                at.batch += batches
                at.of_pass.batches += batches
                stats.batches += batches
                done = min(at.batch * self.batch_size, of.share)
                stats.samples = of.own_share(self.batch_size, done) - before
                stats.bytes_read = self.columns.bytes_read(stats.samples)

            yield used

    def prepare_next_order(self) -> None:
        """Make the order of the next epoch now, while a device works on this epoch."""
        self.order.prepare(self._position.epoch + 1, self.batch_size)

    def peek(self) -> list[Array]:
        """The first batch of epoch ``epoch`` as rows; the position does not change."""
        size, rows = min(self.batch_size, self.order.share), None
        if self.order.dealing.own(size) and not self._position.running:
            rows = self._looked_at.first_rows(self.epoch, size)
        if rows is None:
            index = self.order.between(self.epoch, size)(0, size)
            rows = self.columns.at(index) if len(index) else self.columns.no_rows()
        parts = self.order.dealing.in_batch(size) if self.order.dealt else None
        return self.columns.as_rows(rows, self.epoch, 0, parts)

    # --- state --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """See :meth:`Loader.state_dict`."""
        at, order = self._position, self.order
        complete = at.batch == len(self)
        of_rank = {"rank": order.rank, "world_size": order.world_size}
        return {
            "order": order.version,
            "seed": order.seed,
            "epoch": at.epoch + complete,
            "batch": 0 if complete else at.batch,
            "batch_size": self.batch_size,
            "n_samples": order.n,
            "shuffle": order.shuffle,
            "replacement": order.replacement,
            "drop_last": self.sizes.drop_last,
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
        state, version = {"order": 1, **state}, self.order.version  # old states have no version of the order
        self._take_version(check_int("state['order']", state["order"], 1))
        try:
            epoch, batch, batch_size = self._place_of(state)
        except BaseException:
            self._take_version(version)
            raise
        if self.automatic:
            self._why = f"batch_size={batch_size} was taken from a saved state"
        if batch_size != self.batch_size or self.order.version != version:
            self._model = Memories()
            self.plan = self._given(batch_size)
        self.automatic = False  # another size would make other batches of the epoch
        self._position.go_to(epoch, batch)

    def _take_version(self, version: int) -> None:
        """Make orders, and hold samples out, as ``version`` does."""
        self.order.take_version(version)
        if (held_out := self._held_out) is not None and held_out.order.version != version:
            held_out.order.take_version(version)
            held_out.plan = held_out._given(held_out.batch_size)

    def _place_of(self, state: Mapping[str, Any]) -> tuple[int, int, int]:
        """Epoch, batch and batch size of a state, after the check that it is a state of these epochs."""
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
        last = self.sizes.batches_of(self.order.share, batch_size) - 1
        return epoch, check_int("state['batch']", state["batch"], 0, last), batch_size
