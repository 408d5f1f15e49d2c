"""Batches that are dealt to shards and ranks: the same ones for every number of ranks, each sample once an epoch."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from threading import Thread
from typing import Any

import numpy as np
import pytest
from families import drawn, every
from hypothesis import strategies as st
from large_orders import from_64_on

import gpubatch as gb
from gpubatch.backend import CudaBackend
from gpubatch.errors import ArgumentError, DTypeError, InsufficientMemoryError
from gpubatch.loader import epochs_of
from gpubatch.loader.deals import Dealing
from gpubatch.loader.device import DeviceFeed
from gpubatch.passes import deal_of

WORD = 2**64 - 1


class Numbers:
    """A source of n samples, (number, number squared), that is read in groups; counts how often each is decoded.

    A group is decoded again after another one was, as a file that keeps one of them does it.
    """

    def __init__(self, n: int, bounds: list[int] | None = None, block: int | None = None) -> None:
        self._n, self.decoded = n, list[int]()
        if bounds is not None:
            self.boundaries, self.block = np.array(bounds), int(np.diff(bounds).max())
        elif block is not None:
            self.block = block
        self._groups = np.append(np.arange(0, n, getattr(self, "block", n)), n) if bounds is None else np.array(bounds)

    def __len__(self) -> int:
        return self._n

    def read(self, indices: np.ndarray) -> np.ndarray:
        for group in (self._groups.searchsorted(indices, side="right") - 1).tolist():
            if self.decoded[-1:] != [group]:
                self.decoded.append(group)
        return np.stack([indices, indices * indices], 1).astype(np.float64)


def sizes_of(shards: int) -> list[int]:
    """The numbers of ranks that have a power of two of the shards each."""
    return [w for w in range(1, shards + 1) if shards % w == 0 and (shards // w).bit_count() == 1]


def dealt(make: Callable[..., gb.Loader], shards: int, size: int) -> list[gb.Loader]:
    """The loaders of all ranks."""
    if size == 1:
        return [make(shards=shards)]
    return [make(shards=shards, ranks=ranks) for ranks in gb.Ranks.of_threads(size)]


def batches(loaders: list[gb.Loader], axis: int = 0) -> Iterator[tuple[np.ndarray, ...]]:
    """The batches of all ranks together."""
    for of_ranks in zip(*loaders, strict=True):
        columns = [batch if isinstance(batch, tuple) else (batch,) for batch in of_ranks]
        for batch, loader in zip(of_ranks, loaders, strict=True):
            deal = deal_of(batch[0] if isinstance(batch, tuple) else batch)
            assert deal is not None
            assert deal.shards == loader.shards
        yield tuple(np.concatenate(arrays, axis if arrays[0].ndim > 1 else 0) for arrays in zip(*columns, strict=True))


def same(found: Iterator[tuple[np.ndarray, ...]], expected: Iterator[tuple[np.ndarray, ...]]) -> list[np.ndarray]:
    """The samples of the first column, once all batches were equal."""
    samples = []
    for mine, its in zip(found, expected, strict=True):
        for a, b in zip(mine, its, strict=True):
            assert a.dtype == b.dtype
            assert np.array_equal(a, b)
        samples.append(mine[0])
    return samples


@drawn(
    12,
    1000,
    n=st.integers(1, 300),
    batch_size=st.integers(1, 70),
    shards=st.sampled_from([1, 2, 3, 4, 8, 12, 16]),
    seed=st.integers(0, WORD),
    kind=st.sampled_from(
        ["shuffled", "in order", "drawn", "by weights", "array by windows", "blocks", "uneven blocks"]
    ),
    window=st.integers(2, 400),
    block=st.integers(1, 30),
    drop_last=st.sampled_from([False, True, "single"]),
    large=st.booleans(),
    data=st.data(),
)
def test_every_number_of_ranks_makes_the_same_batches(
    n: int,
    batch_size: int,
    shards: int,
    seed: int,
    kind: str,
    window: int,
    block: int,
    drop_last: bool | str,
    large: bool,
    data: st.DataObject,
) -> None:
    if drop_last is True:
        batch_size = min(batch_size, n)
    options: dict[str, Any] = {"batch_size": batch_size, "seed": seed, "drop_last": drop_last, "prefetch": 0}
    options |= {"backend": "cpu", "dtype": "float64"}
    X: Any = np.stack([np.arange(n), np.arange(n) ** 2], 1).astype(np.float64)
    if kind == "blocks":
        X, options["window"] = Numbers(n, block=block), window
    elif kind == "uneven blocks":
        cuts = data.draw(st.sets(st.integers(1, max(n - 1, 1)), max_size=12)) if n > 1 else set[int]()
        X, options["window"] = Numbers(n, [0, *sorted(cuts), n]), window
    elif kind == "array by windows":
        options["window"] = window
    elif kind == "in order":
        options["shuffle"] = False
    elif kind == "drawn":
        options["replacement"] = True
    elif kind == "by weights":
        options["order"] = gb.WeightedOrder(1 + np.arange(n) % 3)
    with pytest.MonkeyPatch.context() as patch:
        if large:  # sets of 64 samples are
            from_64_on(patch)
        make: Callable[..., gb.Loader] = lambda **more: gb.Loader(X, np.arange(n) % 5, **options, **more)  # noqa: E731
        sizes = sizes_of(shards)
        size, middle = data.draw(st.sampled_from(sizes)), data.draw(st.integers(0, 10))
        for number in range(2):  # epochs
            each = {w: dealt(make, shards, w) for w in {sizes[0], size, sizes[-1]}}
            for loader in (loader for of_rank in each.values() for loader in of_rank):
                loader.load_state_dict({**loader.state_dict(), "epoch": number})
            whole = list(batches(each[sizes[0]]))
            for w in {size, sizes[-1]} - {sizes[0]}:
                same(batches(dealt_at(each[w], number)), iter(whole))
            found = np.concatenate([batch[0][:, 0] for batch in whole]).astype(np.int64) if whole else np.empty(0, int)
            left_out = n - len(found)
            assert left_out < max(batch_size if drop_last is True else 2 * shards, 1) * bool(drop_last) + 1
            if kind not in ("drawn", "by weights"):
                assert len(np.unique(found)) == len(found)
            if "window" not in options:
                undealt = make()
                undealt.load_state_dict({**undealt.state_dict(), "epoch": number})
                for its, mine in zip(undealt, whole, strict=False):  # "single" may leave out more
                    assert all(np.array_equal(a, b) for a, b in zip(its, mine, strict=True))
        # A run of `size` ranks that was saved in the middle goes on with as many as can be, and the other way round.
        if middle < len(whole):
            for before, after in ((size, sizes[-1]), (sizes[-1], size)):
                state = json.loads(
                    json.dumps({**dealt(make, shards, before)[-1].state_dict(), "epoch": 1, "batch": middle})
                )
                others = dealt(make, shards, after)
                for loader in others:
                    loader.load_state_dict(state)
                same(batches(others), iter(whole[middle:]))


def dealt_at(loaders: list[gb.Loader], epoch: int) -> list[gb.Loader]:
    for loader in loaders:
        assert loader.epoch == epoch
        assert len(loader) == len(loaders[0])
    return loaders


# --- functions, columns, weights, held-out samples --------------------------------------------------------------------


def shifted(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    assert len(x) > 0
    return np.concatenate([x - x.mean(), x], axis=1), y + 1


def mixed(x: np.ndarray, generator: Any) -> np.ndarray:
    """As mixup does: a sample with another of the same call."""
    assert len(x) > 0
    return x + generator.random(x.shape) * x[generator.permutation(len(x))]


def by_columns(x: np.ndarray, generator: Any) -> np.ndarray:
    return x + generator.random(x.shape) * x[:, generator.permutation(x.shape[1])]


OPTIONS: dict[str, dict[str, Any]] = {
    "prepare": {"prepare": shifted},
    "augment": {"augment": mixed, "prefetch": 2},
    "both, weighted": {"prepare": shifted, "augment": mixed, "weight": np.arange(70) % 4, "class_weight": "balanced"},
    "columns": {"sample_axis": 1},
    "columns, augmented": {"sample_axis": 1, "augment": by_columns},
    "windows, augmented": {"window": 30, "augment": mixed},
    "scaled": {"scale": 0.5, "dtype": "float32"},
}


@every("options", OPTIONS, ["both, weighted", "columns", "windows, augmented"])
def test_functions_weights_and_columns_do_not_depend_on_the_ranks(options: dict[str, Any]) -> None:
    """The last batch has 6 rows for 8 parts, so that ranks have none of it; no function sees that."""
    axis = options.get("sample_axis", 0)
    X, Y = np.random.default_rng(0).normal(size=(70, 3)), np.arange(70) % 3
    x = np.ascontiguousarray(X.T) if axis else X

    def make(**more: Any) -> gb.Loader:
        return gb.Loader(x, Y, batch_size=16, seed=3, backend="cpu", **{"prefetch": 0, **options}, **more)

    whole = list(batches(dealt(make, 8, 1), axis))
    for w in (2, 4, 8):
        samples = same(batches(dealt(make, 8, w), axis), iter(whole))
        assert [array.shape[axis] for array in samples] == [16, 16, 16, 16, 6]
        last = list(dealt(make, 8, w)[-1])[-1]
        assert last[0].shape[axis] == Dealing(8, w - 1, w).own(6)
        assert last[0].shape[1 - axis] == (6 if "prepare" in options else 3)
        assert last[0].flags.c_contiguous
    peeked = [epochs_of(loader).peek()[0] for loader in dealt(make, 8, 4)]
    assert np.array_equal(np.concatenate(peeked), whole[0][0].T if axis else whole[0][0])
    if "augment" not in options and "prepare" not in options and "window" not in options:
        for its, mine in zip(make(), whole, strict=True):
            assert all(np.array_equal(a, b) for a, b in zip(its, mine, strict=True))


def test_each_part_draws_its_own_numbers() -> None:
    X = np.ones((16, 1))
    loader = gb.Loader(X, batch_size=16, backend="cpu", shards=4, augment=lambda x, draw: draw.random(x.shape))
    assert len(np.unique(next(iter(loader)))) == 16


@every("n", {"90": 90, "1100000": 1_100_000}, ["90"])
def test_a_fraction_is_held_out_for_all_ranks_alike(n: int) -> None:
    def make(**more: Any) -> gb.Loader:
        return gb.Loader(np.arange(n)[:, None], batch_size=n // 9, backend="cpu", dtype="float64", seed=2, **more)

    with epochs_of(make()).holding_out(0.1, n) as apart:
        [[held]] = apart.batches(apart.columns.as_rows)
    for w in (1, 4):
        loaders, found = dealt(make, 8, w), list[np.ndarray]()
        for loader in loaders:
            with epochs_of(loader).holding_out(0.1, n) as apart:
                [[its]] = apart.batches(apart.columns.as_rows)
                assert np.array_equal(its, held)
                assert len(loader) == 9
                found += [batch[:, 0] for batch in loader]
        together = np.sort(np.concatenate([*found, held[:, 0]]))
        assert np.array_equal(together, np.arange(n))


# --- sizes and arguments ---------------------------------------------------------------------------------------------


def in_threads(work: Callable[[gb.Ranks], Any], size: int) -> list[Any]:
    """What each of several ranks makes, which talk to each other."""
    found: list[Any] = [None] * size

    def run(ranks: gb.Ranks) -> None:
        try:
            found[ranks.rank] = work(ranks)
        except Exception as error:
            found[ranks.rank] = error

    threads = [Thread(target=run, args=[ranks]) for ranks in gb.Ranks.of_threads(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return found


def test_an_automatic_batch_size_is_the_least_over_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    X = np.zeros((5000, 10), np.float32)

    def with_memory(available: list[int], at_most: int = 512, shards: int = 8) -> list[Any]:
        def work(ranks: gb.Ranks) -> gb.Loader:
            loader = gb.Loader(X, batch_size=8, at_most=at_most, backend="cpu", ranks=ranks, shards=shards)
            epochs = epochs_of(loader)
            epochs.automatic = True
            monkeypatch.setattr(epochs, "_available", lambda: available[ranks.rank])
            epochs.replan(lambda rows: {"model": rows * 1000}, least_rows=2)
            return loader

        return in_threads(work, len(available))

    # A part of 256 / 8 rows takes 32 kB, of 512 64 kB, and an order, while it is made, 130 kB.
    for loader in with_memory([10**9, 200_000, 10**9, 10**9]):
        assert loader.batch_size == 256
        assert "the rank with the least memory" in loader.plan.reason or loader.ranks.rank == 1
    assert {loader.batch_size for loader in with_memory([10**9] * 2)} == {512}
    few = with_memory([10**9] * 2, at_most=4)
    assert {loader.batch_size for loader in few} == {16}  # two rows for each of 8 parts
    assert "8 parts of 2 make a batch of 16" in few[0].plan.reason
    failed = with_memory([10**9, 100])
    assert all(isinstance(error, InsufficientMemoryError) for error in failed)
    assert "another rank" in str(failed[0])


def test_a_last_batch_with_single_rows_in_parts_can_be_left_out() -> None:
    sizes = {
        n: gb.Loader(np.zeros((n, 1)), batch_size=32, shards=4, drop_last="single", backend="cpu")
        for n in range(64, 80)
    }
    assert {n for n, loader in sizes.items() if len(loader) == 2} == set(range(64, 72))
    assert epochs_of(sizes[72]).smallest == 2
    assert epochs_of(gb.Loader(np.zeros((67, 1)), batch_size=32, shards=4, backend="cpu")).smallest == 1
    net = gb.mlp([1, 4, 2], batch_norm=True, backend="cpu")
    loader = gb.Loader(np.zeros((67, 1), "f4"), np.zeros(67, int), batch_size=32, shards=4, backend="cpu")
    with pytest.raises(
        ArgumentError, match="BatchNorm needs 2 samples in each part of a training batch, and one has 1"
    ):
        gb.fit(net, loader, gb.SGD(net.parameters, 0.1), 1, progress=False)


def test_arguments_that_do_not_fit_are_refused() -> None:
    X, (ranks, *_) = np.zeros((100, 1)), gb.Ranks.of_threads(3)
    for more, error, words in (
        ({"ranks": 3}, DTypeError, "ranks must be a gpubatch.Ranks or None, got int"),
        ({"ranks": ranks}, ArgumentError, "a power of two times the 3 ranks.*got shards=8"),
        ({"ranks": ranks, "shards": 9}, ArgumentError, "got shards=9"),
        ({"shards": 6}, ArgumentError, "a power of two times the 1 ranks"),
        ({"shards": 0}, ArgumentError, "shards must be an integer between 1 and 65536, got 0"),
        ({"shards": 4, "rank": 1, "world_size": 2}, ArgumentError, "give one or the other, got rank=1, world_size=2"),
    ):
        with pytest.raises(error, match=words):
            gb.Loader(X, batch_size=10, backend="cpu", **more)
    loader = gb.Loader(X, batch_size=10, backend="cpu", ranks=ranks, shards=6)
    assert (loader.ranks, loader.shards, loader.rank, loader.world_size) == (ranks, 6, 0, 3)
    assert "in 6 parts, rank 0 of 3" in repr(loader)
    state = loader.state_dict()
    assert state["shards"] == 6
    assert not {"rank", "world_size"} & state.keys()
    with pytest.raises(ArgumentError, match="state has shards=12, this loader shards=6"):
        loader.load_state_dict(state | {"shards": 12})
    with pytest.raises(ArgumentError, match="missing or unknown: rank, shards, world_size"):
        gb.Loader(X, batch_size=10, backend="cpu").load_state_dict(state)


# --- reading ---------------------------------------------------------------------------------------------------------


READ: dict[str, Any] = {
    "blocks": lambda: Numbers(2000, block=10),
    "uneven blocks": lambda: Numbers(
        2000, np.unique([0, *np.random.default_rng(4).integers(1, 2000, 190), 2000]).tolist()
    ),
}


@pytest.mark.parametrize("make", READ.values(), ids=READ)
def test_each_rank_reads_its_share_of_the_groups(make: Callable[[], Numbers]) -> None:
    """A group is decoded once by one rank, but for those in which a shard's stretch ends."""
    groups, size = len(np.unique(make()._groups)) - 1, 33
    for w in (1, 4):
        sources = [make() for _ in range(w)]
        loaders = [
            gb.Loader(source, batch_size=size, window=800, backend="cpu", ranks=ranks, prefetch=0)
            for source, ranks in zip(sources, gb.Ranks.of_threads(w), strict=True)
        ]
        for source in sources:
            source.decoded.clear()  # the first row was looked at
        list(batches(loaders))
        decoded = [len(source.decoded) for source in sources]
        assert groups <= sum(decoded) <= groups + 7
        shares = [len({*source.decoded}) for source in sources]
        assert max(shares) <= groups / w * 1.35 + 2


def test_a_window_holds_what_each_shard_reads_at_once() -> None:
    """By default there is room for groups that are larger than a shard's part of 256 MiB."""
    source = Numbers(1_000_000, block=1)
    source.block = 600_000
    assert gb.Loader(source, batch_size=10, backend="cpu", shards=8).window >= 8 * 600_000
    assert gb.Loader(source, batch_size=10, backend="cpu", shards=8, window="8 MiB").block < 600_000


def test_windows_of_ranks_are_within_the_plan() -> None:
    for w in (1, 4):
        loaders = [
            gb.Loader(Numbers(40_000, block=100), batch_size=64, window=8000, backend="cpu", ranks=ranks, prefetch=0)
            for ranks in gb.Ranks.of_threads(w)
        ]
        parts = loaders[0].plan.parts["window"]
        assert 8000 * 16 / w <= parts <= 8000 * 16 / w * 4


def test_validation_batches_are_whole_on_every_rank() -> None:
    X = np.arange(103.0)[:, None]
    for ranks in gb.Ranks.of_threads(8):
        whole = epochs_of(gb.Loader(X, batch_size=10, backend="cpu", ranks=ranks)).in_order(16)
        assert np.array_equal(np.concatenate([x for (x,) in whole.batches(whole.columns.as_rows)]), X)


# --- on a device -----------------------------------------------------------------------------------------------------


ON_DEVICE: dict[str, dict[str, Any]] = {
    "shuffled": {},
    "computed": {"large": True},
    "in order, computed": {"large": True, "shuffle": False},
    "drawn": {"replacement": True},
    "by weights": {"order": gb.WeightedOrder(np.arange(101) % 3)},
    "by windows": {"window": 40},
    "through pinned memory": {"feed": "host"},
    "augmented": {"augment": lambda x, draw: x + 1},
}


@every("options", ON_DEVICE, ["computed"])
def test_a_device_has_a_ranks_part_of_the_batches(
    options: dict[str, Any], device: CudaBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = dict(options)
    if options.pop("large", False):
        from_64_on(monkeypatch)
    rng = np.random.default_rng(1)
    X, Y = rng.integers(0, 99, (101, 5)).astype(np.uint8), rng.integers(0, 9, 101)
    for rank in (0, 2, 3):  # of 4; the last two have one row of the last batch of 5, and none
        here, there = gb.Ranks.of_threads(4)[rank], gb.Ranks.of_threads(4)[rank]
        with device.own_stream():
            of_cpu = gb.Loader(X, Y, batch_size=16, backend="cpu", ranks=here, **options)
            loader = gb.Loader(X, Y, batch_size=16, backend=device, ranks=there, **options)
            for _ in range(2):
                expected = list(of_cpu)
                for (x, y), (a, b) in zip(expected, loader, strict=True):
                    assert np.array_equal(device.to_numpy(a), x)
                    assert np.array_equal(device.to_numpy(b), y)
                    assert deal_of(a) is not None
            epochs = epochs_of(loader)
            feed = epochs.device_feed()
            assert (feed is None) == ("augment" in options or "feed" in options)
            if feed is None:
                continue
            assert isinstance(feed, DeviceFeed)
            epochs.load_state_dict(loader.state_dict() | {"epoch": 1})
            with epochs.gathered_by(feed) as used, device.scope():
                for number, (x, y) in enumerate(expected):
                    assert epochs.order.dealing.own(epochs.rows_of(number)) == len(x)
                    feed.enqueue(len(x), device.asarray(np.array([number])), epochs.deal_of(number))
                    found = [device.to_numpy(array) for array in feed.arrays(len(x))]
                    assert np.array_equal(found[0], x)
                    assert np.array_equal(found[1], y)
                    used(1)
            assert loader.stats.samples == sum(len(x) for x, _ in expected)
