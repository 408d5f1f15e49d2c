"""Batches: their order against a Philox written from the paper, their values against float64, their threads counted."""

from __future__ import annotations

import contextlib
import copy
import gc
import itertools
import json
import pickle
import re
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from families import drawn
from hypothesis import given, settings, strategies as st
from needs import missing, peer

import gpubatch as gb
import gpubatch.loader.epochs
import gpubatch.loader.feeds
import gpubatch.loader.order
import gpubatch.sources
from gpubatch.backend import get_backend
from gpubatch.errors import (
    ArgumentError,
    DeviceMismatchError,
    DTypeError,
    InsufficientMemoryError,
    NonFiniteError,
    ShapeError,
)
from gpubatch.loader import Loader, LoaderStats, WeightedOrder, epoch_order, epochs_of
from gpubatch.loader.order import EpochOf, Order, WindowOrder, split
from gpubatch.main_memory import Memory


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "gpubatch-loader"]


@pytest.fixture(params=[False, True], ids=["in the caller", "in a thread"])
def threaded(request, monkeypatch):
    """Whether a thread prepares the batches, even if small."""
    monkeypatch.setattr(gpubatch.loader.feeds, "WORTH_A_THREAD", 0 if request.param else 1 << 60)
    return request.param


def masked(shape: Any) -> np.ma.MaskedArray:
    X = np.ones(shape)
    return np.ma.masked_array(X, np.arange(X.size).reshape(shape) == 2)


# Where numbers are taken besides samples: the value below a mask means nothing.
MASKED: dict[str, Callable[[Path], Any]] = {
    "gradients": lambda folder: gb.SGD([np.zeros(5)], 0.1).step([masked(5)]),
    "a flat gradient": lambda folder: gb.SGD(gb.Parameters({"w": (5,)}, dtype="float64"), 0.1).step(masked(5)),
    "parameters": lambda folder: gb.SGD([masked(5)], 0.1),
    "clipped": lambda folder: gb.clip_by_global_norm([masked(5)], 1.0),
    "a metric": lambda folder: gb.metrics.r2(masked(5), np.ones(5)),
    "a loss of scores": lambda folder: gb.losses.mse(masked((5, 1)), np.ones((5, 1))),
    "labels of a loss": lambda folder: gb.losses.softmax_cross_entropy(np.ones((3, 2)), masked(3).astype(int)),
    "class weights": lambda folder: Loader(np.ones((3, 2)), np.arange(3), class_weight=masked(3), backend="cpu"),
    "first bias": lambda folder: gb.mlp([2, 3], output_bias=masked(3), backend="cpu"),
    "a checkpoint": lambda folder: gb.Checkpoints(folder).save({"a": masked(5)}),
}


@pytest.mark.parametrize("name", MASKED)
def test_masked_numbers_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match=r"must have a value everywhere, but 1 of its \d elements are masked"):
        MASKED[name](tmp_path)


def test_masked_samples_are_refused_as_nan_is():
    X = np.ma.masked_array([[1.0, 2.0], [3.0, 1e20], [5.0, 6.0]], mask=[[0, 0], [0, 1], [0, 0]])
    with pytest.raises(
        NonFiniteError, match=r"^X must have a value everywhere, but 1 of its 6 elements are masked; fill"
    ):
        Loader(X, batch_size=3, backend="cpu")
    with pytest.raises(NonFiniteError, match=r"^Y must have a value everywhere, but 2 of its 3 elements are masked"):
        Loader(X.data, np.ma.masked_array([0, 1, 2], mask=[1, 0, 1]), batch_size=3, backend="cpu")
    (whole,) = Loader(np.ma.masked_array(X.data), batch_size=3, shuffle=False, backend="cpu")
    np.testing.assert_array_equal(whole, X.data)
    loader = Loader(X.data, batch_size=3, backend="cpu")
    with pytest.raises(NonFiniteError, match=r"^X must have a value everywhere"):
        loader.to_batch(X)


# --- the order of an epoch ------------------------------------------------------------------------------------------


def philox(counter, key):
    """Philox4x64-10 of Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3" (2011)."""
    (x0, x1, x2, x3), (k0, k1) = counter, key
    word = 2**64
    for _ in range(10):
        high0, low0 = divmod(0xD2E7470EE14C6C93 * x0, word)
        high1, low1 = divmod(0xCA5A826395121157 * x2, word)
        x0, x1, x2, x3 = high1 ^ x1 ^ k0, low1, high0 ^ x3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) % word, (k1 + 0xBB67AE8584CAA73B) % word
    return x0, x1, x2, x3


def random_words(n, seed, epoch):
    blocks = (philox((block, 0, 0, 0), (seed, epoch)) for block in itertools.count(1))  # NumPy counts from 1
    return list(itertools.islice(itertools.chain.from_iterable(blocks), n))


def test_philox_gives_the_published_vectors():  # Random123, examples/kat_vectors
    assert philox((0, 0, 0, 0), (0, 0)) == (
        0x16554D9ECA36314C,
        0xDB20FE9D672D0FDC,
        0xD7E772CEE186176B,
        0x7E68B68AEC7BA23B,
    )
    ones = 2**64 - 1
    assert philox((ones,) * 4, (ones, ones)) == (
        0x87B092C3013FE90B,
        0x438C3C67BE8D0224,
        0x9CC7D7C69CD777B6,
        0xA09CAEBF594F0BA0,
    )


# (n, seed, epoch) -> the permutation and the draws with replacement: they must never change
GOLDEN = {
    (12, 0, 0): ([0, 2, 11, 9, 1, 8, 5, 4, 3, 10, 6, 7], [11, 2, 9, 0, 3, 9, 11, 0, 9, 10, 10, 2]),
    (12, 0, 1): ([5, 3, 7, 8, 11, 2, 4, 1, 10, 0, 6, 9], [6, 5, 9, 8, 3, 2, 8, 7, 1, 7, 8, 8]),
    (12, 7, 0): ([8, 4, 1, 6, 3, 2, 11, 7, 5, 9, 10, 0], [0, 11, 4, 2, 6, 8, 2, 9, 8, 8, 1, 1]),
    (5, 2**64 - 1, 3): ([3, 2, 0, 1, 4], [2, 4, 2, 4, 4]),
}


@pytest.mark.parametrize("case", GOLDEN, ids=str)
def test_golden_orders(case):
    permutation, draws = GOLDEN[case]
    assert epoch_order(*case).tolist() == permutation
    assert epoch_order(*case, replacement=True).tolist() == draws


@given(n=st.integers(1, 300), seed=st.integers(0, 2**64 - 1), epoch=st.integers(0, 2**64 - 1))
@settings(max_examples=40)
def test_order_sorts_the_samples_by_the_paper_s_words(n, seed, epoch):
    words = random_words(n, seed, epoch)
    bits = (n - 1).bit_length()  # the low bits make room for the index, which also decides between equals
    expected = sorted(range(n), key=lambda i: (words[i] >> bits, i))
    order = epoch_order(n, seed, epoch)
    assert order.dtype == np.int64
    assert order.tolist() == expected
    assert epoch_order(n, seed, epoch, replacement=True).tolist() == [word % n for word in words]
    assert epoch_order(n, seed, epoch, shuffle=False).tolist() == list(range(n))


def test_windows_are_drawn_by_the_paper_s_words():
    n, seed, epoch, together, block = 100, 7, 3, 30, 8

    def permutation(count, stream):
        blocks = (philox((c, 0, 0, stream), (seed, epoch)) for c in itertools.count(1))
        words = list(itertools.islice(itertools.chain.from_iterable(blocks), count))
        bits = (count - 1).bit_length()
        return sorted(range(count), key=lambda i: (words[i] >> bits, i))

    expected, blocks = [], permutation(13, 0)
    for window in range(5):  # three blocks each: 24 samples, or 20 where one is the last block, of 4
        samples = [i for b in blocks[3 * window : 3 * window + 3] for i in range(b * block, min(b * block + block, n))]
        expected += [samples[k] for k in permutation(len(samples), window + 1)]
    assert WindowOrder(n, EpochOf(seed, epoch), together, block).indices(0, n).tolist() == expected


@pytest.mark.parametrize("n", [1, 2, 1023, 1024, 1025, 100_000])
def test_order_is_a_permutation_that_seed_and_epoch_decide(n):
    orders = [epoch_order(n, seed, epoch) for seed, epoch in [(0, 0), (0, 1), (1, 0), (2**64 - 1, 0)]]
    for order in orders:
        assert np.array_equal(np.sort(order), np.arange(n))
    assert np.array_equal(orders[0], epoch_order(n, 0, 0))
    if n > 1000:
        for a, b in itertools.combinations(orders, 2):
            assert np.count_nonzero(a == b) < 20  # 1 is expected of two independent permutations


def chi_square(counts):
    expected = counts.mean()
    return float(((counts - expected) ** 2 / expected).sum()) / (counts.size - 1)


def test_every_place_is_equally_likely_for_every_sample():
    n, epochs = 8, 4000
    counts = np.zeros((n, n))
    for epoch in range(epochs):
        counts[np.arange(n), epoch_order(n, 5, epoch)] += 1
    assert 0.4 < chi_square(counts) < 1.9  # 49 degrees of freedom: 1 ± 0.2


def test_weighted_draws_follow_the_paper_s_words():
    weights = [0.0, 2.0, 0.5, 0.0, 1.25, 3.25, 0.0]
    loader = Loader(np.arange(7)[:, None], batch_size=7, seed=3, order=WeightedOrder(weights), backend="cpu")
    for epoch in range(50):
        (x,) = loader
        numbers = [(word >> 11) / 2**53 * sum(weights) for word in random_words(7, 3, epoch)]
        expected = [next(i for i in range(7) if sum(weights[: i + 1]) > number) for number in numbers]
        assert x[:, 0].tolist() == expected


def test_weighted_draws_have_the_probabilities_of_their_weights():
    """Counts against n p, by chi-square with 9 degrees of freedom; its 0.999 quantile is 27.9."""
    weights = np.arange(10.0)
    order = Order(200_000, 1, True, True, weighted=WeightedOrder(np.tile(weights, 20_000)))
    counts = np.bincount(order.whole(0) % 10, minlength=10)
    assert counts[0] == 0
    expected = 200_000 * weights / weights.sum()
    assert ((counts - expected)[1:] ** 2 / expected[1:]).sum() < 27.9
    Y = np.repeat([0, 1, 2], [900, 90, 10])
    balanced = Order(1000, 1, True, True, weighted=WeightedOrder(1 / np.bincount(Y)[Y]))
    drawn = np.bincount(Y[np.concatenate([balanced.whole(epoch) for epoch in range(100)])])
    assert (abs(drawn - 100_000 / 3) < 4 * (100_000 * 2 / 9) ** 0.5).all()  # four standard deviations


@pytest.mark.parametrize("weighted", [None, WeightedOrder(np.arange(1003))], ids=["uniform", "weighted"])
@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("shuffle", [True, False])
def test_a_huge_set_is_drawn_and_used_in_order_without_an_array_of_all(shuffle, rank, weighted, monkeypatch):
    if weighted and not shuffle:
        pytest.skip("weights are for drawing")
    order = Order(1003, 5, shuffle, shuffle, rank, 3, weighted=weighted)
    whole = order.whole(4)
    monkeypatch.setattr(gpubatch.loader.order, "LARGE", 1)
    between = order.between(4)
    for start, stop in ((0, 1), (0, 334), (1, 6), (97, 230), (331, 334)):
        assert np.array_equal(between(start, stop), whole[start:stop])
    huge = Order(1 << 33, 5, shuffle, shuffle)
    assert (huge.between(0)(1 << 32, (1 << 32) + 3) < 1 << 33).all()
    assert huge.memory() == (0, 0)


def test_there_is_no_memory_for_the_order_of_a_huge_set():
    order = Order(1 << 50)
    order.take_version(1)
    with pytest.raises(InsufficientMemoryError, match=r"order of 1125899906842624 samples.*; a new run needs none"):
        order.between(0)


WEIGHTS = [
    ([[1.0, 2.0]], ShapeError, "weights must be one for each sample, of shape (samples,), got shape (1, 2)"),
    ([1.0, -1.0], ArgumentError, "weights must be at least 0, got -1 at 1"),
    ([0, 0], ArgumentError, "weights must have a finite sum above 0, got 0"),
    ([1.0, np.nan], NonFiniteError, "weights must be finite, but weights[1] is nan"),
    (["a"], DTypeError, "weights must hold integers"),
]


@pytest.mark.parametrize(("weights", "error", "message"), WEIGHTS, ids=lambda v: v if isinstance(v, str) else "")
def test_weights_that_are_wrong(weights, error, message):
    with pytest.raises(error, match=re.escape(message)):
        WeightedOrder(weights)


def test_a_weighted_loader_is_told_from_others():
    order = WeightedOrder([1.0, 2, 3, 4, 5])
    loader = Loader(X5, order=order, batch_size=2, backend="cpu")
    assert (loader.order, loader.replacement) == (order, True)
    assert "drawn by weights" in repr(loader)
    state = loader.state_dict()
    Loader(X5, order=WeightedOrder([1, 2, 3, 4, 5]), batch_size=2, backend="cpu").load_state_dict(state)
    for other in (WeightedOrder([1, 2, 3, 4, 6]), None):
        with pytest.raises(ArgumentError, match="weights"):
            Loader(X5, order=other, batch_size=2, replacement=True, backend="cpu").load_state_dict(state)
    for arguments, message in (
        ({"order": WeightedOrder([1, 2])}, "order must have a weight for each of the 5 samples, got 2"),
        ({"order": order, "shuffle": False}, r"order=WeightedOrder\(...\) draws at random, so it needs shuffle=True"),
        ({"order": [1] * 5}, "order must be a gpubatch.WeightedOrder or None, got list"),
        ({"order": order, "window": 4}, "so it has no window"),
    ):
        with pytest.raises((ArgumentError, DTypeError), match=message):
            Loader(X5, backend="cpu", **arguments)


@pytest.mark.parametrize("labels", [None, np.repeat([3, 0, 7], [700, 290, 13])], ids=["no labels", "classes"])
def test_a_split_is_at_random_and_takes_its_share_of_each_class(labels):
    kept, held = split(1003, 0.1, 5, labels)
    assert np.array_equal(np.sort(np.concatenate([kept, held])), np.arange(1003))
    assert len(held) == 100
    assert all((np.diff(part) > 0).all() for part in (kept, held))
    again, other = split(1003, 0.1, 5, labels)[1], split(1003, 0.1, 6, labels)[1]
    assert np.array_equal(again, held)
    assert len(np.intersect1d(held, other)) < 30  # 10 of 100 by chance
    if labels is not None:
        for label in (3, 0, 7):
            assert abs((labels[held] == label).sum() - 0.1 * (labels == label).sum()) <= 1


def test_draws_with_replacement_are_uniform_and_repeat():
    n = 20_000
    counts = np.bincount(epoch_order(n, 3, 0, replacement=True), minlength=n)
    assert counts.sum() == n
    assert abs(np.count_nonzero(counts == 0) / n - np.exp(-1)) < 0.02  # a sample is left out with probability 1/e
    assert 0.7 < chi_square(counts.reshape(200, 100).sum(axis=1)) < 1.3  # 199 degrees of freedom: 1 ± 0.1
    loader = Loader(np.arange(100.0), batch_size=10, replacement=True, seed=3, backend="cpu")
    drawn = np.concatenate(list(loader))
    assert drawn.tolist() == epoch_order(100, 3, 0, replacement=True).tolist()


# (n, seed, epoch, samples together, block) -> the order by windows: it must never change
GOLDEN_WINDOWS = {
    (14, 0, 0, 6, 3): [7, 2, 8, 0, 1, 6, 4, 13, 12, 3, 5, 9, 10, 11],
    (14, 0, 1, 6, 3): [9, 10, 8, 7, 11, 6, 4, 5, 3, 12, 13, 1, 2, 0],
    (14, 7, 0, 4, 2): [2, 9, 3, 8, 7, 6, 13, 12, 10, 4, 11, 5, 0, 1],
}


@pytest.mark.parametrize("case", GOLDEN_WINDOWS, ids=str)
def test_golden_orders_by_windows(case):
    n, seed, epoch, *windows = case
    assert WindowOrder(n, EpochOf(seed, epoch), *windows).indices(0, n).tolist() == GOLDEN_WINDOWS[case]


@given(
    n=st.integers(1, 200),
    together=st.integers(1, 60),
    block=st.integers(1, 20),
    seed=st.integers(0, 2**64 - 1),
    world_size=st.integers(1, 7),
)
def test_windows_hold_whole_blocks_shuffled(n, together, block, seed, world_size):
    order = WindowOrder(n, EpochOf(seed, 3), together, block)
    whole = order.indices(0, n).tolist()
    assert sorted(whole) == list(range(n))
    at_most = max(block, together // block * block)
    start, blocks = 0, []
    for window in range(len(order)):
        samples, use = order.part(window)
        assert len(samples) <= at_most
        assert samples[use.between(0, len(samples))].tolist() == whole[start : start + len(samples)]
        start += len(samples)
        numbers = samples[:] // block
        blocks += [b for b, previous in zip(numbers, [-1, *numbers], strict=False) if b != previous]
    assert start == n
    assert sorted(blocks) == list(range(-(-n // block)))  # each is in one window only, in one piece
    assert WindowOrder(n, EpochOf(seed, 3, shuffle=False), together, block).indices(0, n).tolist() == list(range(n))
    for rank in range(min(world_size, n)):
        mine = whole[rank::world_size]
        part = WindowOrder(n, EpochOf(seed, 3, True, rank, world_size), together, block)
        assert part.indices(0, len(mine)).tolist() == mine
        middle = len(mine) // 2
        if middle:
            assert part.indices(0, middle).tolist() + part.indices(middle, len(mine)).tolist() == mine


def test_every_place_is_equally_likely_by_windows_too():
    n, epochs = 8, 4000
    counts = np.zeros((n, n))
    for epoch in range(epochs):
        counts[np.arange(n), WindowOrder(n, EpochOf(5, epoch), 4, 2).indices(0, n)] += 1
    assert 0.4 < chi_square(counts) < 1.9  # 49 degrees of freedom: 1 ± 0.2


# --- the batches of an epoch ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("m", "batch_size", "steps"), [(5_000_000, 1_000, 5_000), (60_000, 100, 600), (148, 64, 3)])
def test_course_arithmetic(m, batch_size, steps):
    X = np.broadcast_to(np.float32(0), (m, 1))
    assert len(Loader(X, batch_size=batch_size, backend="cpu")) == steps


def test_course_layout_has_samples_in_columns(backend):
    X, Y = np.arange(12288 * 148, dtype=np.float32).reshape(12288, 148), np.arange(148.0).reshape(1, 148)
    batches = list(Loader(X, Y, batch_size=64, sample_axis=1, backend=backend))
    assert [(x.shape, y.shape) for x, y in batches] == [((12288, 64), (1, 64))] * 2 + [((12288, 20), (1, 20))]
    for x, y in batches:
        assert backend.owns(x)
        assert x.flags.c_contiguous
        columns = backend.to_numpy(y)[0].astype(int)
        assert np.array_equal(backend.to_numpy(x), X[:, columns])


@st.composite
def loaders(draw):
    """Arguments of a loader for n samples, and its world_size."""
    n = draw(st.integers(1, 60))
    world_size = draw(st.integers(1, min(n, 5)))
    batch_size = draw(st.integers(1, n + 3))
    drop_last = draw(st.sampled_from([False, True, "single"]))
    if drop_last is True and batch_size > n // world_size:
        drop_last = False
    return {
        "n": n,
        "batch_size": batch_size,
        "drop_last": drop_last,
        "world_size": world_size,
        "shuffle": draw(st.booleans()),
        "seed": draw(st.integers(0, 2**64 - 1)),
        "sample_axis": draw(st.integers(0, 1)),
        "prefetch": draw(st.integers(0, 3)),
    }


def make(n, sample_axis, rank=0, **arguments):
    """A loader of samples (i, -i) with labels i."""
    X = np.stack([np.arange(n), -np.arange(n)], axis=1).astype(np.int16)
    X = np.ascontiguousarray(X.T) if sample_axis else X
    return Loader(X, np.arange(n), sample_axis=sample_axis, rank=rank, backend="cpu", **arguments)


def labels(batches):
    return [y.tolist() for _, y in batches]


@given(case=loaders(), epoch=st.integers(0, 3))
def test_ranks_together_see_each_sample_once(case, epoch):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpubatch.loader.feeds, "WORTH_A_THREAD", 0)
        seen, sizes = [], []
        for rank in range(case["world_size"]):
            loader = make(**case, rank=rank)
            loader.load_state_dict({**loader.state_dict(), "epoch": epoch})
            batches = list(loader)
            assert len(batches) == len(loader)
            for x, y in batches:
                assert x.dtype == np.float32
                assert x.flags.c_contiguous
                assert x.shape == ((2, len(y)) if case["sample_axis"] else (len(y), 2))
                first, second = x if case["sample_axis"] else x.T
                assert first.tolist() == y.tolist() == (-second).tolist()
            lengths = [len(y) for _, y in batches]
            assert set(lengths[:-1]) <= {loader.batch_size}
            assert lengths[-1] <= loader.batch_size
            if case["drop_last"] is True:
                assert lengths[-1] == case["batch_size"]
            if case["drop_last"] == "single":
                share = len(range(rank, case["n"], case["world_size"]))
                alone = share > loader.batch_size and share % loader.batch_size == 1
                assert sum(lengths) == share - alone
            seen += itertools.chain.from_iterable(labels(batches))
            sizes.append(sum(lengths))
            order = epoch_order(case["n"], case["seed"], epoch, case["shuffle"])
            assert (
                list(itertools.chain.from_iterable(labels(batches)))
                == order[rank :: case["world_size"]].tolist()[: sum(lengths)]
            )
        if not case["drop_last"]:
            assert sorted(seen) == list(range(case["n"]))
            assert max(sizes) - min(sizes) <= 1
        assert len(set(seen)) == len(seen)
        assert not threads()


@given(case=loaders(), data=st.data())
def test_resumed_is_as_if_never_stopped(case, data):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpubatch.loader.feeds, "WORTH_A_THREAD", 0)
        whole = make(**case)
        expected = [labels(whole) for _ in range(3)]
        stop = data.draw(st.integers(0, 2 * len(whole)))

        stopped = make(**case)
        done = []
        while len(done) < stop:
            done += labels(itertools.islice(stopped, stop - len(done)))
        state = json.loads(json.dumps(stopped.state_dict()))
        assert (state["epoch"], state["batch"]) == divmod(stop, len(whole))
        assert set(state) == {
            "order", "seed", "epoch", "batch", "batch_size", "n_samples",
            "shuffle", "replacement", "drop_last", "rank", "world_size", "window", "block",
        }  # fmt: skip

        resumed = make(**case)
        resumed.load_state_dict(state)
        assert resumed.epoch == stop // len(whole)
        for _ in range(3 - resumed.epoch):
            done += labels(resumed)
        assert done == list(itertools.chain.from_iterable(expected))


class Source:
    """Samples (i, -i) and labels i, to be read."""

    block = None

    def __init__(self, n):
        self.n, self.most = n, 0

    def __len__(self):
        return self.n

    def read(self, indices):
        self.most = max(self.most, len(indices))
        return np.stack([indices, -indices], axis=1).astype(np.int16), indices.copy()


@drawn(100, 1000, data=st.data())
def test_any_epoch_of_any_ranks_with_any_resume(data):
    n = data.draw(st.integers(1, 120), "n")
    world_size = data.draw(st.integers(1, min(n, 6)), "world_size")
    batch_size = data.draw(st.integers(1, n + 3), "batch_size")
    epoch = data.draw(st.integers(0, 2**64 - 2), "epoch")
    window = data.draw(st.none() | st.integers(2, 150), "window")
    source = Source(n) if data.draw(st.booleans(), "read") else None
    arguments = {"batch_size": batch_size, "window": window, "world_size": world_size, "prefetch": 0, "backend": "cpu"}
    seen = []
    for rank in range(world_size):

        def make_one(rank=rank):
            if source is not None:
                return Loader(source, rank=rank, **arguments)
            return make(n, 0, rank=rank, **{k: v for k, v in arguments.items() if k != "backend"})

        whole = make_one()
        whole.load_state_dict({**whole.state_dict(), "epoch": epoch})
        expected = list(whole)
        stop = data.draw(st.integers(0, len(whole) - 1), "stop")
        begun = make_one()
        begun.load_state_dict({**begun.state_dict(), "epoch": epoch})
        done = list(itertools.islice(begun, stop))
        resumed = make_one()
        resumed.load_state_dict(json.loads(json.dumps(begun.state_dict())))
        done += resumed
        assert labels(done) == labels(expected)
        for (x, y), (other, _) in zip(done, expected, strict=True):
            assert x.dtype == np.float32
            assert np.array_equal(x, other)
            assert np.array_equal(x, np.stack([y, -y], axis=1))
        assert whole.stats.samples == sum(len(y) for _, y in expected) == len(range(rank, n, world_size))
        seen += itertools.chain.from_iterable(labels(expected))
    assert sorted(seen) == list(range(n))


def test_a_resumed_epoch_reads_no_more_than_its_window():
    loader = Loader(Source(1000), batch_size=10, window=100, prefetch=0, backend="cpu")
    loader.load_state_dict({**loader.state_dict(), "batch": 58})
    next(iter(loader))
    assert loader.stats.bytes_read <= (50 + 50) * (4 + 8)
    with pytest.raises(ArgumentError, match="state has window=50, this loader window=40"):
        Loader(Source(1000), batch_size=10, window=80, backend="cpu").load_state_dict(loader.state_dict())


def test_a_window_is_a_number_or_bytes_and_counts_in_the_plan():
    X = np.zeros((5000, 25), np.float32)
    for window, half in [(640, 320), ("64 KB", 320), ("10 TiB", 5000), (2, 1), (10**9, 5000)]:
        loader = Loader(X, batch_size=10, window=window, backend="cpu")
        assert loader.window == half - half % loader.block + (
            loader.block if half % loader.block and half == 5000 else 0
        )
    read = Loader(Source(5000), batch_size=10, window=640, backend="cpu")
    halves = 2 * 320 * 12
    order = 8 * 500 + (16 + 32) * 320  # blocks; one half's order, and the other's under construction
    assert read.plan.parts["window"] == halves + order
    assert read.plan.needed == halves + order + 10 * 4 * 16  # two ahead, and a batch of two windows
    assert "shuffled by blocks of 10, 320 together" in repr(read)


def test_epoch_counts_and_an_abandoned_one_is_over(threaded):
    loader = make(10, 0, batch_size=3)
    assert loader.epoch == 0
    assert [loader.epoch for _ in loader] == [0, 0, 0, 0]
    assert (loader.epoch, loader.state_dict()["batch"]) == (1, 0)
    for k, _ in enumerate(loader):
        if k == 1:
            break
    assert loader.epoch == 2
    assert (loader.state_dict()["epoch"], loader.state_dict()["batch"]) == (1, 2)  # where it was left
    third = epoch_order(10, 0, 2).tolist()
    assert labels(loader) == [third[:3], third[3:6], third[6:9], third[9:]]  # a new iteration: the next epoch, whole
    assert loader.epoch == 3


def test_state_counts_what_was_yielded_not_what_was_prepared(threaded):
    loader = make(50, 0, batch_size=5, prefetch=4)
    for k, _ in enumerate(loader):
        state = loader.state_dict()
        assert (state["epoch"], state["batch"]) == divmod(k + 1, 10)


def test_an_iteration_that_begins_while_another_makes_a_batch_ends_that():
    """As two threads on one loader do, which met a list without the iteration."""
    others: list[Any] = []

    def prepare(x: np.ndarray) -> np.ndarray:
        if begin and not others:
            others.append(iter(loader))
            next(others[0])
        return x

    loader, begin = make(10, 0, batch_size=3, prepare=prepare), False
    first = iter(loader)
    next(first)
    begin = True
    with pytest.raises(ArgumentError, match="ended by a newer one"):
        next(first)
    assert len(list(others[0])) == 3


def test_a_second_iteration_ends_the_first(threaded):
    loader = make(10, 0, batch_size=3)
    first = iter(loader)
    next(first)
    assert labels(loader)[0] == epoch_order(10, 0, 1)[:3].tolist()
    with pytest.raises(ArgumentError, match="ended by a newer one"):
        next(first)
    assert (loader.epoch, loader.state_dict()["batch"]) == (2, 0)
    last = iter(loader)
    for _ in range(4):
        next(last)
    loader.load_state_dict({**loader.state_dict(), "epoch": 7, "batch": 1})
    with pytest.raises(ArgumentError, match="load_state_dict"):
        next(last)
    assert (loader.epoch, loader.state_dict()["batch"]) == (7, 1)
    assert not threads()


# --- values and element types ---------------------------------------------------------------------------------------

# source dtype -> dtype of the batches by default
DTYPES = {
    "bool": "float32", "uint8": "float32", "int8": "float32", "uint16": "float32", "int16": "float32",
    "uint32": "float32", "int32": "float32", "uint64": "float32", "int64": "float32",
    "float16": "float32", "float32": "float32", "float64": "float64",
    ">f4": "float32", ">f8": "float64", ">i2": "float32",
}  # fmt: skip


def test_every_real_dtype_is_in_the_table():
    real = {np.dtype(c).name for c in np.typecodes["AllInteger"] + "?efd"}
    assert real <= set(DTYPES)


@pytest.mark.parametrize("scale", [None, 1 / 255])
@pytest.mark.parametrize("wanted", [None, "float32", "float64"])
@pytest.mark.parametrize("source", DTYPES)
def test_dtypes(source, wanted, scale, backend, rng):
    X = rng.integers(0, 2 if source == "bool" else 128, (40, 3)).astype(source)
    loader = Loader(X, X[:, 0], batch_size=16, shuffle=False, dtype=wanted, scale=scale, backend=backend)
    expected = np.dtype(wanted or DTYPES[source])
    assert (loader.dtype, epochs_of(loader).columns.source_dtype, loader.scale) == (expected, X.dtype, scale)
    batches = list(loader)
    for array in itertools.chain.from_iterable(batches):
        assert backend.owns(array)
        assert array.dtype.isnative
    x = np.concatenate([backend.to_numpy(x) for x, _ in batches])
    y = np.concatenate([backend.to_numpy(y) for _, y in batches])
    assert x.dtype == expected
    assert np.array_equal(x, X.astype(expected) * expected.type(1 if scale is None else scale))
    assert y.dtype == X.dtype.newbyteorder("=")  # labels keep their type
    assert np.array_equal(y, X[:, 0])


def test_scaled_bytes_are_the_nearest_float32_products():
    X = np.arange(256, dtype=np.uint8)[:, None]
    x = next(iter(Loader(X, batch_size=256, shuffle=False, scale=1 / 255, backend="cpu")))
    factor = np.float64(np.float32(1 / 255))
    assert np.array_equal(x, (np.arange(256) * factor).astype(np.float32)[:, None])  # one rounding of the exact product


LAYOUTS = {
    "C": lambda X: X,
    "Fortran": np.asfortranarray,
    "every other": lambda X: np.repeat(X, 2, axis=0)[::2],
    "reversed": lambda X: np.ascontiguousarray(X[::-1])[::-1],
    "read-only": lambda X: np.frombuffer(X.tobytes(), X.dtype).reshape(X.shape),
    "lists": lambda X: X.tolist(),
    "subclass": lambda X: X.view(np.memmap),
}


@pytest.mark.parametrize("sample_axis", [0, 1])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("scale", [None, 0.5])
def test_any_layout_gives_the_same_batches(layout, sample_axis, scale, rng):
    X = rng.integers(0, 1000, (30, 20)).astype(float)
    source = LAYOUTS[layout](X)
    before = X.copy()
    loader = Loader(source, batch_size=8, sample_axis=sample_axis, seed=3, scale=scale, backend="cpu")
    order = epoch_order(X.shape[sample_axis], 3, 0)
    got = list(loader)
    assert np.array_equal(np.concatenate(got, axis=sample_axis), X.take(order, sample_axis) * (scale or 1))
    for x in got:
        assert type(x) is np.ndarray
        assert x.flags.c_contiguous
        assert not np.shares_memory(x, X)
        x[...] = -1  # a delivered batch belongs to the caller
    assert np.array_equal(X, before)
    assert np.array_equal(np.asarray(source), before)
    assert not any(np.shares_memory(a, b) for a, b in itertools.combinations(got, 2))


@pytest.mark.parametrize("shape", [(7, 3), (7,), (7, 2, 3), (7, 1)])
def test_samples_may_have_any_shape(shape, threaded, monkeypatch, rng):
    monkeypatch.setattr(gpubatch.ops.gather, "BLOCK", 8)  # several blocks in each batch
    X = rng.integers(0, 256, shape).astype(np.uint8)
    got = np.concatenate(list(Loader(X, batch_size=5, shuffle=False, scale=0.25, backend="cpu")))
    assert np.array_equal(got, X.astype(np.float32) / 4)


def test_a_large_batch_goes_through_blocks_and_a_thread():
    X = np.arange(3 * 2**20, dtype=np.uint32).reshape(24, -1)
    loader = Loader(X, batch_size=9, scale=2.0, seed=1, backend="cpu")
    iteration = iter(loader)
    x = next(iteration)
    assert len(threads()) == 1
    assert np.array_equal(x, X[epoch_order(24, 1, 0)[:9]].astype(np.float32) * 2)
    iteration.close()
    assert not threads()


def test_small_batches_of_arrays_in_memory_start_no_thread():
    iteration = iter(make(100, 0, batch_size=10))
    next(iteration)
    assert not threads()


def test_device_arrays_stay_on_their_device(backend, rng):
    X, Y = rng.integers(0, 256, (50, 4)).astype(np.uint8), rng.integers(0, 10, 50)
    here = Loader(X, Y, batch_size=16, seed=2, scale=1 / 255, backend="cpu")
    there = Loader(backend.asarray(X), backend.asarray(Y), batch_size=16, seed=2, scale=1 / 255, backend=backend)
    mixed = Loader(X, backend.asarray(Y), batch_size=16, seed=2, scale=1 / 255, backend=backend)
    for (x, y), (xd, yd), (xm, ym) in zip(here, there, mixed, strict=True):
        for array in (xd, yd, xm, ym):
            assert backend.owns(array)
        for a, b in [(x, xd), (y, yd), (x, xm), (y, ym)]:
            assert np.array_equal(a, backend.to_numpy(b))
            assert a.dtype == b.dtype


@pytest.mark.parametrize("backend", [pytest.param("cuda:0", marks=pytest.mark.gpu)], indirect=True)
def test_device_array_needs_its_own_backend(backend):
    with pytest.raises(DeviceMismatchError, match="X must be"):
        Loader(backend.asarray(np.zeros((3, 2))), backend="cpu")


# --- validation arrays ----------------------------------------------------------------------------------------------


def test_to_batch_converts_as_the_loader_does(backend, rng):
    X = rng.integers(0, 256, (20, 4)).astype(np.uint8)
    loader = Loader(X, batch_size=20, shuffle=False, scale=1 / 255, backend=backend)
    (x,) = loader
    assert backend.owns(loader.to_batch(X))
    assert np.array_equal(backend.to_numpy(loader.to_batch(X)), backend.to_numpy(x))
    ready = X[:5].astype(np.float32)
    assert np.array_equal(backend.to_numpy(loader.to_batch(ready)), ready)  # used without a copy
    assert np.array_equal(
        backend.to_numpy(loader.to_batch(ready.astype(np.float64))), ready
    )  # prepared, as pixels / 255
    assert np.array_equal(backend.to_numpy(loader.to_batch(X.astype(np.int64))), backend.to_numpy(x))
    with pytest.raises(ShapeError, match=r"X must have samples of shape \(4,\).* got shape \(20, 3\)"):
        loader.to_batch(X[:, :3])


def test_to_batch_where_source_and_batches_have_one_dtype():
    X = np.ones((6, 2), np.float32)
    scaled = Loader(X, scale=0.5, backend="cpu")
    assert np.array_equal(scaled.to_batch(X), X * np.float32(0.5))
    assert np.shares_memory(Loader(X, backend="cpu").to_batch(X), X)  # nothing to be done, nothing copied
    X[3, 1] = np.nan
    with pytest.raises(NonFiniteError, match=r"X\[3, 1\] is nan"):
        scaled.to_batch(X)


# --- sizes ----------------------------------------------------------------------------------------------------------


def cpu_with(monkeypatch, available):
    """A CPU backend with ``available`` bytes."""
    backend = get_backend("cpu")
    monkeypatch.setattr(backend, "memory", lambda: Memory(2**40, available))
    return backend


def test_automatic_batch_size_follows_the_rule(monkeypatch):
    assert Loader(np.zeros((2000, 3)), backend="cpu").batch_size == 2000
    large = Loader(np.zeros((2001, 3)), backend="cpu")
    assert (large.batch_size, epochs_of(large).automatic, len(large)) == (512, True, 4)
    # 100 float32 features, used without a copy, a 64-bit label, and the position of every sample in the epoch
    X, Y = np.zeros((2001, 100), np.float32), np.zeros(2001, np.int64)
    needed = 128 * (400 + 8) + 8 * 2001
    small = cpu_with(monkeypatch, needed * 10 // 9 + 9)
    loader = Loader(X, Y, backend=small)
    assert (loader.batch_size, loader.plan.needed) == (128, needed)
    assert "memory limits the batch to 128" in loader.plan.reason
    given = Loader(X, Y, batch_size=7, backend=small).plan
    assert given.reason == "batch_size=7 was given; it needs 50.8 KiB of 74.0 KiB available"
    assert given.parts == {"making of an epoch's order": 26 * 2001} != loader.plan.parts
    large = Loader(X, Y, batch_size=1000, backend=small).plan
    assert large.reason == "batch_size=1000 was given; it needs 414.1 KiB of 74.0 KiB available, more than 90 % of that"


def test_replan_counts_the_model_too(monkeypatch):
    X = np.zeros((5000, 10), np.float32)
    backend = cpu_with(monkeypatch, 10**6)
    loader = Loader(X, replacement=True, backend=backend)
    assert loader.batch_size == 512
    model = lambda n: {"steady": 60_000, "a step": 9_960 * n + n // 65}  # noqa: E731
    plan = epochs_of(loader).replan(model)  # (900,000 - 60,000 - 8 * 5,000) / 10,000 = 80
    assert plan is loader.plan
    assert (loader.batch_size, plan.needed, plan.available) == (64, 740_000, 10**6)
    assert sum(plan.parts.values()) == plan.needed
    assert plan.parts == {**model(64), "order of an epoch": 40_000, "batches": 40 * 64, "conversion of a batch": 0}
    assert str(plan).splitlines()[1:] == [
        "  steady              58.6 KiB",
        "  a step             622.5 KiB",
        "  order of an epoch   39.1 KiB",
        "  batches              2.5 KiB",
        "needed               722.7 KiB",
        "available            976.6 KiB",
    ]
    # Memory that the model already uses does not count again; the available memory can be given.
    assert epochs_of(loader).replan(model, held=533_335).batch_size == 128
    assert loader.plan.available == 1_533_335
    # 1,380,001 bytes, not a mean, are more than 90 %.
    assert epochs_of(loader).replan(model, held=533_334).batch_size == 64
    assert epochs_of(loader).replan(model, available=400_000).batch_size == 16
    epochs_of(loader).replan(model)
    assert len(loader) == len(list(loader)) == 79
    assert Loader(X, batch_size="auto", backend="cpu", at_most=128).batch_size == 128
    for _ in loader:
        with pytest.raises(ArgumentError, match="replan must come between epochs, epoch 1"):
            epochs_of(loader).replan(lambda n: {})
        break
    epochs_of(loader).replan(lambda n: {})
    assert (loader.epoch, loader.state_dict()["batch"]) == (2, 0)
    loader.load_state_dict({**loader.state_dict(), "batch": 3})
    # What is loaded decides the size; the same words as for a size that was given.
    for decided in (loader, Loader(X, batch_size=512, backend="cpu")):
        before = decided.state_dict()
        assert epochs_of(decided).replan(lambda n: {"model": 10**5 * n}).batch_size == 512
        assert decided.plan.parts["model"] == 512 * 10**5
        assert decided.state_dict() == before


def test_peek_shows_the_next_epochs_first_batch_and_moves_nothing():
    loader = Loader(np.arange(20.0)[:, None], np.arange(20), batch_size=6, backend="cpu")
    list(loader)
    before = loader.state_dict()
    x, y = epochs_of(loader).peek()
    assert loader.state_dict() == before
    first = next(iter(loader))
    np.testing.assert_array_equal(x, first[0])
    np.testing.assert_array_equal(y, first[1])


@pytest.mark.parametrize("n", [2001, 4001, 4002])
def test_ranks_choose_alike(n):
    sizes = [Loader(np.zeros(n), rank=r, world_size=2, backend="cpu").batch_size for r in range(2)]
    assert max(sizes) - min(sizes) <= 1
    assert (max(sizes) == 512) == (n > 4000)


def test_automatic_loader_takes_the_batch_size_of_a_state():
    X = np.zeros((5000, 2))
    given = Loader(X, batch_size=100, backend="cpu")
    automatic = Loader(X, backend="cpu")
    with pytest.raises(ArgumentError, match="state has batch_size=512, this loader batch_size=100"):
        given.load_state_dict(automatic.state_dict())
    next(iter(given))
    automatic.load_state_dict({**given.state_dict(), "batch": 49})
    assert (automatic.batch_size, len(automatic), len(list(automatic))) == (100, 50, 1)
    assert "taken from a saved state" in automatic.plan.reason


@pytest.mark.parametrize(
    "change",
    [
        ("seed", 1), ("n_samples", 51), ("shuffle", False), ("replacement", True),
        ("drop_last", True), ("rank", 1), ("world_size", 2), ("batch_size", 6),
    ],
    ids=str,
)  # fmt: skip
def test_state_of_other_batches_is_refused(change):
    loader = make(50, 0, batch_size=5)
    (name, value), own = change, loader.state_dict()
    with pytest.raises(ArgumentError, match=f"state has {name}={value}, this loader {name}={own[name]}"):
        loader.load_state_dict({**own, name: value})
    assert loader.state_dict() == own


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"batch": 10}, ArgumentError, "state['batch'] must be an integer between 0 and 9, got 10"),
        ({"epoch": -1}, ArgumentError, "state['epoch'] must be an integer between 0"),
        ({"epoch": 1.5}, DTypeError, "state['epoch'] must be an integer"),
        ({"step": 3}, ArgumentError, "missing or unknown: step"),
    ],
)
def test_bad_states(change, error, message):
    loader = make(50, 0, batch_size=5)
    with pytest.raises(error, match=re.escape(message)):
        loader.load_state_dict({**loader.state_dict(), **change})
    with pytest.raises(DTypeError, match="state must be a mapping"):
        loader.load_state_dict([1])
    with pytest.raises(ArgumentError, match="missing or unknown: batch"):
        loader.load_state_dict({k: v for k, v in loader.state_dict().items() if k != "batch"})


# --- functions of a batch -------------------------------------------------------------------------------------------


def test_a_transform_is_applied_to_whole_batches(backend, threaded, rng):
    X, Y = rng.integers(0, 256, (50, 4)).astype(np.uint8), np.arange(50)
    arguments = {"batch_size": 16, "seed": 2, "scale": 1 / 255, "backend": backend}
    plain = list(Loader(X, Y, **arguments))
    of_x = Loader(X, Y, transform=lambda x: x[:, ::-1] * 2, **arguments)
    of_both = Loader(X, Y, transform=lambda x, y: (x + 1, y % 2), **arguments)
    unlabelled = Loader(X, transform=lambda x, factor=3: x * factor, **arguments)
    for (x, y), (x1, y1), (x2, y2), x3 in zip(plain, of_x, of_both, unlabelled, strict=True):
        assert all(backend.owns(array) for array in (x1, y1, x2, y2, x3))
        assert bool((x1 == x[:, ::-1] * 2).all() and (y1 == y).all())
        assert bool((x2 == x + 1).all() and (y2 == y % 2).all())
        assert bool((x3 == x * 3).all())
    assert bool((epochs_of(of_both).peek()[0] == plain[0][0] + 1).all()) or of_both.epoch == 1
    assert np.array_equal(backend.to_numpy(of_x.to_batch(X)), (X * np.float32(1 / 255))[:, ::-1] * 2)
    x, y = of_both.to_batch(X, Y)
    assert np.array_equal(backend.to_numpy(x), X * np.float32(1 / 255) + 1)
    assert np.array_equal(backend.to_numpy(y), Y % 2)
    with pytest.raises(ArgumentError, match=r"transform takes x and y, so to_batch needs both: to_batch\(X, Y\)"):
        of_both.to_batch(X)


TRANSFORMS = [
    (lambda x: x[1:], ShapeError, "transform must keep the 5 samples along axis 0, it made shape (4, 2) of (5, 2)"),
    (lambda x, y: x, DTypeError, "transform must return a pair, as it takes x and y, got ndarray"),
    (lambda x: None, DTypeError, "transform must return what takes the place of x, got None; a function that changes"),
    (lambda x: [1] * 5, DeviceMismatchError, "what transform returns must be an array on 'cpu', got a list"),
    (lambda x: x.astype(complex), DTypeError, "what transform returns must hold integers"),
    (lambda x, y, z: x, ArgumentError, "transform must take x, or x and y; it takes 3 arguments"),
    ("flip", DTypeError, "transform must be a function of x, or of x and y, got str"),
]


@pytest.mark.parametrize(("transform", "error", "message"), TRANSFORMS, ids=lambda v: v if isinstance(v, str) else "")
def test_transforms_that_are_wrong(transform, error, message):
    with pytest.raises(error, match=re.escape(message)):
        list(Loader(X5, np.arange(5), transform=transform, backend="cpu"))


def test_a_loader_cannot_be_pickled_and_says_what_to_do():
    loader = Loader(X5, backend="cpu")
    with pytest.raises(DTypeError, match="make it again in the other process"):
        pickle.dumps(loader)
    assert copy.deepcopy(loader).state_dict() == loader.state_dict()


AUGMENTS = [
    (lambda x: x, ArgumentError, "augment must take x, or x and y and a generator; it takes 1 arguments"),
    (lambda x, y, g, z: x, ArgumentError, "augment must take x, or x and y and a generator; it takes 4 arguments"),
    (lambda x, y, g: x, DTypeError, "augment must return a pair, as it takes x and y, got ndarray"),
    (lambda x, g: g, DeviceMismatchError, "what augment returns must be an array on 'cpu', got a numpy.random"),
    (5, DTypeError, "augment must be a function of x, or of x and y and a generator, got int"),
]


@pytest.mark.parametrize(("augment", "error", "message"), AUGMENTS, ids=lambda v: v if isinstance(v, str) else "")
def test_augmentations_that_are_wrong(augment, error, message):
    with pytest.raises(error, match=re.escape(message)):
        list(Loader(X5, np.arange(5), augment=augment, backend="cpu"))


def test_prepare_is_for_all_samples_and_augment_for_training_alone(rng):
    X, Y = rng.integers(0, 256, (50, 4)).astype(np.uint8), np.arange(50)
    centre = lambda x: x - np.float64(0.5)  # noqa: E731  float64, which batches are not
    loader = Loader(X, Y, 16, scale=1 / 255, prepare=centre, augment=lambda x, g: x * 0, backend="cpu")
    assert (loader.prepare, loader.transform) == (centre, centre)
    assert [x.dtype for x, _ in loader] == [np.float32] * 4
    assert not any(x.any() for x, _ in loader)
    assert np.array_equal(loader.to_batch(X), X * np.float32(1 / 255) - np.float32(0.5))
    with pytest.raises(ArgumentError, match="transform is another name of prepare: give one of them, got both"):
        Loader(X, Y, prepare=centre, transform=centre, backend="cpu")


@pytest.mark.parametrize("form", ["array", "list", "source", "images", "float32", "pairs"])
def test_standardisation_is_that_of_all_rows(form, tmp_path, rng, monkeypatch):
    """Blocks are combined; a column of one value becomes 0, though its mean is rounded."""
    monkeypatch.setattr("gpubatch.loader.standardize.AT_ONCE", 1000)
    X = rng.normal(size=(300, 6)) * [1, 1e3, 1e-3, 1, 1, 1] + [0, 1e6, 0, -4, 0, 9]
    X[:, 4] = 0.1
    X = X.astype(np.float32) if form == "float32" else X
    X = X.reshape(300, 2, 3) if form == "images" else X
    np.save(tmp_path / "x.npy", X)
    given = {"list": X.tolist(), "source": gb.sources.npy(tmp_path / "x.npy")}.get(form, X)
    if form == "pairs":
        given = type("Pairs", (), {"__len__": lambda _: 300, "read": lambda _, i: (X[i], np.zeros(len(i), int))})()
    prepare = gb.Standardize.of(given)
    wide = X.astype(np.float64)
    np.testing.assert_allclose(prepare.mean, wide.mean(axis=0), rtol=1e-9, atol=1e-12)
    varies = np.ptp(wide, axis=0) > 0
    np.testing.assert_allclose(prepare.deviation[varies], wide.std(axis=0)[varies], rtol=1e-7)
    assert (prepare.deviation[~varies] == 1).all()
    found = prepare(wide)
    np.testing.assert_allclose(found.mean(axis=0), 0, atol=1e-9)
    np.testing.assert_allclose(found.std(axis=0), varies, atol=1e-7)
    assert prepare(X[:5].astype(np.float32)).dtype == np.float32
    assert pickle.loads(pickle.dumps(prepare))(wide).tolist() == found.tolist()


def test_what_standardisation_refuses(rng):
    X = rng.normal(size=(9, 2))
    X[7, 1] = np.nan
    with pytest.raises(gb.NonFiniteError, match="X must hold finite numbers, got others in sample 7"):
        gb.Standardize.of(X)
    for mean, deviation in ((0.0, 0.0), (0.0, 1e-300), (1e300, 1.0), (np.nan, 1.0), (0.0, np.inf)):
        words = rf"and deviation between 1\.2e-38 and 3\.4e\+38, got mean {mean:g} and deviation {deviation:g}"
        with pytest.raises(ArgumentError, match=f"mean must be finite in float32, {words.replace('e+3', 'e.3')}"):
            gb.Standardize([0.0, mean], [1.0, deviation])
    with pytest.raises(gb.ShapeError, match=r"must have one shape, got \(2,\) and \(1,\)"):
        gb.Standardize([0.0, 1.0], [1.0])
    with pytest.raises(gb.ShapeError, match=r"samples must have the shape \(1,\) of the means, got \(2,\)"):
        gb.Standardize([0.0], [1.0])(X)
    with pytest.raises(ArgumentError, match=r"prepare=gb\.Standardize takes samples that are rows, got sample_axis=1"):
        Loader(rng.normal(size=(2, 9)), batch_size=2, sample_axis=1, prepare=gb.Standardize([0.0] * 2, [1.0] * 2))


@pytest.mark.gpu
def test_standardised_batches_of_a_gpu(rng):
    if "cuda:0" not in gb.available_backends():
        missing("gpu", "no CUDA device can be used here")
    X, Y = rng.normal(size=(60, 3)) * [1, 10, 100], np.arange(60) % 2
    backend, prepare = gb.get_backend("cuda:0"), gb.Standardize.of(X)
    for dtype in ("float32", "float16"):
        here, there = (
            Loader(X, Y, 20, seed=1, prepare=prepare, dtype=dtype, backend=name) for name in ("cpu", "cuda:0")
        )
        for (x, _), (z, _) in zip(here, there, strict=True):
            np.testing.assert_allclose(backend.to_numpy(z), x, rtol=1e-3 if dtype == "float16" else 1e-6, atol=1e-3)
    net = gb.mlp([3, 2], backend="cuda:0", seed=0)
    loader = Loader(X, Y, 20, prepare=prepare, dtype="float32", backend="cuda:0")
    gb.fit(net, loader, gb.SGD(net.parameters, 0.1), 3, validation=(X, Y), progress=False)


def test_prepare_may_work_in_place_and_changes_no_array_of_the_caller():
    def shift(x):
        x -= 1
        return x

    X = np.ones((5, 2), np.float32)
    loader = Loader(X, prepare=shift, shuffle=False, backend="cpu")
    assert not loader.to_batch(X).any()
    assert not next(iter(loader)).any()
    assert X.all()


# --- statistics -----------------------------------------------------------------------------------------------------


class Clock:
    """A clock that advances only when told to."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now

    def pass_by(self, seconds):
        self.now += seconds


def test_statistics_tell_who_waits(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(gpubatch.loader.epochs, "time", clock)
    X = np.zeros((100, 6), np.uint8)
    loader = Loader(X, np.arange(100), batch_size=16, backend="cpu", transform=lambda x: clock.pass_by(2) or x)
    assert loader.stats == LoaderStats()
    list(loader)
    stats = loader.stats
    assert stats == LoaderStats(7, 100, 100 * (6 + 8), wait_first=2, waited=6 * 2, seconds=6 * 2)
    for _ in loader:
        clock.pass_by(4)
    assert loader.stats is not stats
    assert loader.stats == LoaderStats(7, 100, 100 * (6 + 8), wait_first=2, waited=6 * 2, seconds=6 * (2 + 4))


def test_nobody_waits_for_what_was_prepared_while_the_consumer_worked(monkeypatch):
    monkeypatch.setattr(gpubatch.loader.feeds, "WORTH_A_THREAD", 0)
    clock, prepared = Clock(), threading.Semaphore(0)
    monkeypatch.setattr(gpubatch.loader.epochs, "time", clock)
    loader = Loader(
        np.zeros((96, 6), np.uint8), batch_size=16, backend="cpu", transform=lambda x: prepared.release() or x
    )
    for number, _ in enumerate(loader):
        if number < 5:  # the next batch comes without being asked for
            assert prepared.acquire(timeout=60)
        clock.pass_by(4)
    assert loader.stats.seconds == 5 * 4
    assert loader.stats.waited == 0


# --- the thread -----------------------------------------------------------------------------------------------------


def leave_by_break(loader):
    for _ in loader:
        assert len(threads()) == 1
        break


def leave_by_exception(loader):
    with contextlib.suppress(ZeroDivisionError):
        for _ in loader:
            assert len(threads()) == 1
            raise ZeroDivisionError


def leave_by_the_end(loader):
    assert len(list(loader)) == len(loader)


def leave_to_the_garbage_collector(loader):
    holder = [iter(loader)]
    next(holder[0])
    assert len(threads()) == 1
    holder.append(holder)  # a cycle: no reference count will free it
    del holder
    gc.collect()


@pytest.mark.parametrize(
    "leave", [leave_by_break, leave_by_exception, leave_by_the_end, leave_to_the_garbage_collector]
)
@pytest.mark.parametrize("prefetch", [1, 2, 5])
def test_no_thread_is_left(leave, prefetch, monkeypatch):
    monkeypatch.setattr(gpubatch.loader.feeds, "WORTH_A_THREAD", 0)
    leave(make(40, 0, batch_size=4, prefetch=prefetch))
    assert not threads()


def test_thread_prepares_no_more_than_asked(monkeypatch):
    monkeypatch.setattr(gpubatch.loader.feeds, "WORTH_A_THREAD", 0)
    prepared, enough = [], threading.Semaphore(0)

    def count(x):
        prepared.append(x)
        enough.release()
        return x

    loader = make(40, 0, batch_size=1, prefetch=3, transform=count)
    iteration = iter(loader)
    next(iteration)
    for _ in range(1 + 3):  # one batch taken, three ahead
        assert enough.acquire(timeout=60)
    assert not enough.acquire(timeout=0.05)
    assert len(prepared) == 4
    iteration.close()


def test_an_exception_in_the_thread_surfaces_with_its_traceback(threaded):
    def a_disk_that_fails(x):
        if 0 in x:
            raise OSError("unreadable sector")
        return x

    loader = make(40, 0, batch_size=4, transform=a_disk_that_fails)
    bad = epoch_order(40, 0, 0).tolist().index(0) // 4
    iteration = iter(loader)
    for _ in range(bad):
        next(iteration)
    with pytest.raises(OSError, match="unreadable sector") as caught:
        next(iteration)
    assert "a_disk_that_fails" in "".join(traceback.format_exception(caught.value))
    assert loader.state_dict()["batch"] == bad
    assert not threads()


# --- errors ---------------------------------------------------------------------------------------------------------

X5 = np.zeros((5, 2), np.float32)
ERRORS = [
    (lambda: Loader(X5, np.zeros(4)), ShapeError, "X of shape (5, 2) with 5 along axis 0 and Y of shape (4,) with 4"),
    (lambda: Loader(X5, np.zeros((1, 5)), sample_axis=1), ShapeError, "X of shape (5, 2) with 2 along axis 1 and Y"),
    (lambda: Loader(np.zeros((0, 3))), ShapeError, "X must hold at least one sample of at least one number, got"),
    (lambda: Loader(np.zeros((3, 0))), ShapeError, "got shape (3, 0)"),
    (lambda: Loader([]), ShapeError, "got shape (0,)"),
    (lambda: Loader(3.0), ShapeError, "got shape ()"),
    (lambda: Loader([[1, 2], [3]]), ShapeError, "X must be an array, or nested lists of equal lengths"),
    (lambda: Loader(np.zeros(5), sample_axis=1), ShapeError, "X must be (features, samples) with sample_axis=1"),
    (lambda: Loader(X5.astype(complex)), DTypeError, "X must hold integers, booleans, float16, float32 or float64"),
    (lambda: Loader(np.array(["a", "b"])), DTypeError, "got dtype <U1"),
    (lambda: Loader(np.array([None, 1])), DTypeError, "got dtype object"),
    (lambda: Loader(X5.astype(np.longdouble)), DTypeError, "got dtype"),
    (lambda: Loader(X5, np.array(list("abcde"))), DTypeError, "Y must hold integers"),
    (lambda: Loader(X5, dtype="int32"), DTypeError, "dtype must be float32 or float64 or float16, got 'int32'"),
    (lambda: Loader(X5, sample_axis=2), ArgumentError, "sample_axis must be an integer between 0 and 1, got 2"),
    (lambda: Loader(X5, batch_size=0), ArgumentError, "batch_size must be an integer >= 1, got 0"),
    (lambda: Loader(X5, batch_size=2.5), DTypeError, "batch_size must be an integer >= 1, got 2.5"),
    (lambda: Loader(X5, batch_size="large"), ArgumentError, "if not an integer, must be one of 'auto', got 'large'"),
    (lambda: Loader(X5, seed=-1), ArgumentError, "seed must be an integer between 0 and 18446744073709551615, got -1"),
    (lambda: Loader(X5, seed=2**64), ArgumentError, "got 18446744073709551616"),
    (lambda: Loader(X5, scale=np.nan), ArgumentError, "scale must be finite"),
    (lambda: Loader(X5, scale=1e39), ArgumentError, "scale must be finite and in [-3.40282e+38, 3.40282e+38]"),
    (lambda: Loader(X5, scale="1/255"), DTypeError, "scale must be a real number"),
    (lambda: Loader(X5, prefetch=-1), ArgumentError, "prefetch must be an integer >= 0, got -1"),
    (lambda: Loader(X5, shuffle=1), DTypeError, "shuffle must be True or False, got 1"),
    (lambda: Loader(X5, drop_last=None), DTypeError, "drop_last must be False, True or 'single', got None"),
    (lambda: Loader(X5, shuffle=False, replacement=True), ArgumentError, "replacement=True draws at random, so it"),
    (lambda: Loader(X5, rank=2, world_size=2), ArgumentError, "rank must be an integer between 0 and 1, got 2"),
    (lambda: Loader(X5, world_size=6), ArgumentError, "world_size must be at most the 5 samples, got 6"),
    (lambda: Loader(X5, batch_size=6, drop_last=True), ArgumentError, "drop_last=True leaves no batch: batch_size=6"),
    (lambda: Loader(X5, batch_size=3, drop_last=True, rank=1, world_size=2), ArgumentError, "more than the 2 samples"),
    (lambda: Loader(X5, backend="gpu"), ArgumentError, "backend must be"),
    (lambda: epoch_order(5, 0, 0, shuffle=False, replacement=True), ArgumentError, "replacement=True draws at random"),
    (lambda: epoch_order(0, 0, 0), ArgumentError, "n must be an integer >= 1, got 0"),
    (lambda: epoch_order(5, 0, -1), ArgumentError, "epoch must be an integer between 0"),
]


@pytest.mark.parametrize(("make_it", "error", "message"), ERRORS, ids=lambda v: v if isinstance(v, str) else "")
def test_errors(make_it, error, message, monkeypatch):
    monkeypatch.setenv("GPUBATCH_BACKEND", "cpu")
    with pytest.raises(error, match=re.escape(message)) as caught:
        make_it()
    assert type(caught.value) is error


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("source", ["float16", "float32", "float64", ">f8"])
@pytest.mark.parametrize("where", [(0, 0), (6, 1), (19, 2)])
def test_values_that_are_not_finite(value, source, where, backend, monkeypatch):
    monkeypatch.setattr(gpubatch.sources.arrays, "BLOCK", 12)  # four samples at a time
    X = np.ones((20, 3), source)
    X[where] = X[19, 2] = value  # the first one is named
    message = re.escape(f"X must be finite, but X[{where[0]}, {where[1]}] is {float(value)!r}")
    with pytest.raises(NonFiniteError, match=message):
        Loader(X, backend=backend)
    with pytest.raises(NonFiniteError, match=message.replace("X", "Y")):
        Loader(np.ones(20), X, backend=backend)


def test_a_value_beyond_the_batch_dtype_is_not_finite_either():
    X = np.array([[1.0, 2.0], [3.0, -1e300]])
    assert Loader(X, backend="cpu").dtype == np.float64
    with pytest.raises(NonFiniteError, match=re.escape("X[1, 1] is -1e+300, beyond the range of float32")):
        Loader(X, dtype="float32", backend="cpu")


def test_repr_is_readable():
    loader = Loader(np.zeros((60, 784), np.uint8), np.zeros(60, np.int64), batch_size=25, scale=1 / 255, backend="cpu")
    assert repr(loader) == (
        "<Loader of 60 samples (784,) uint8 as float32 times 0.00392157 with labels int64: "
        "3 batches of 25 an epoch, shuffled, on cpu>"
    )
    sharded = Loader(np.zeros(6), batch_size=2, shuffle=False, rank=1, world_size=2, backend="cpu")
    assert "in order, on cpu, rank 1 of 2" in repr(sharded)
    assert "drawn with replacement" in repr(Loader(np.zeros(6), replacement=True, backend="cpu"))


def test_an_order_that_was_foreseen_is_not_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    X = np.arange(20, dtype=np.float32).reshape(20, 1)
    plain, loader = (Loader(X, batch_size=8, backend="cpu", world_size=2, rank=1) for _ in range(2))
    made: list[int] = []
    original = gpubatch.loader.order.epoch_order
    monkeypatch.setattr(gpubatch.loader.order, "epoch_order", lambda *a: made.append(a[2]) or original(*a))
    for _ in range(3):
        for x, expected in zip(loader, plain, strict=True):
            epochs_of(loader).prepare_next_order()
            np.testing.assert_array_equal(x, expected)
    assert sorted(made) == [0, 0, 1, 1, 2, 2, 3]  # by each of the two once, and one that was not used
    loader.load_state_dict({**loader.state_dict(), "epoch": 7})
    next(iter(loader))
    assert made[-1] == 7


def frames() -> tuple[Any, Any, Any]:
    """A frame, its labels and its weights, with the same index."""
    pd, rng = peer("pandas"), np.random.default_rng(0)
    index = pd.Index([f"s{i}" for i in range(40)])
    X = pd.DataFrame(rng.random((40, 3), np.float32), columns=["a", "b", "c"], index=index)
    return X, pd.Series(np.arange(40) % 2, index=index), pd.Series(rng.random(40), index=index)


def test_frames_in_different_orders_are_refused() -> None:
    X, Y, weight = frames()
    turned = "have the same index in different orders, and samples are paired by their places"
    gb.Loader(X[::-1], Y[::-1], weight=weight[::-1], backend="cpu")
    gb.Loader(X, Y.reset_index(drop=True), backend="cpu")  # of other labels nobody knows which belongs to which
    gb.Loader(X, Y[::-1].to_numpy(), backend="cpu")
    for arrays, words in (
        ((X, Y[::-1], None), rf"X and Y {turned}: give Y\.loc\[X\.index\]"),
        ((X, Y, weight[::-1]), rf"Y and weight {turned}: give weight\.loc\[Y\.index\]"),
        ((X, Y.to_numpy(), weight[::-1]), rf"X and weight {turned}"),
    ):
        with pytest.raises(ArgumentError, match=words):
            gb.Loader(*arrays[:2], weight=arrays[2], backend="cpu")


ORDER = r"has the columns of training in another order: give .*\[\['a', 'b', 'c'\]\]"
LACKS = r"must have the columns of training, .*; it has \['d', 'b', 'c'\], and lacks"
# A frame as samples of X, a frame of pandas with the columns a, b and c, and what is wrong with it.
FRAMES: dict[str, tuple[Callable[[Any], Any], str | None]] = {
    "the columns of training": (lambda X: X, None),
    "an array": (lambda X: X.to_numpy(), None),
    "numbered columns": (lambda X: X.set_axis([0, 1, 2], axis=1), None),
    "another order": (lambda X: X[["c", "b", "a"]], ORDER),
    "another order, Polars": (lambda X: peer("polars").from_pandas(X)["c", "b", "a"], ORDER),
    "another order, Arrow": (lambda X: peer("pyarrow").table({name: X[name] for name in "cba"}), ORDER),
    "another column": (lambda X: X.rename(columns={"a": "d"}), LACKS),
    "a column fewer": (lambda X: X[["a", "b"]], r"it has \['a', 'b'\], and lacks \['c'\]"),
}


def test_frames_of_several_types_of_numbers() -> None:
    """Booleans among numbers, and pandas' own types, are numbers; what is none is named, and no value is NaN."""
    pd = peer("pandas")
    frame = pd.DataFrame({"i": range(4), "b": [True, False] * 2, "f": [0.5, 1.5, 2.5, 3.5]})
    wanted = [[0, 1, 0.5], [1, 0, 1.5], [2, 1, 2.5], [3, 0, 3.5]]
    for X in (
        frame,
        frame.convert_dtypes(),
        frame.astype({"f": "Float64"}),
        frame.convert_dtypes(dtype_backend="pyarrow"),
    ):
        x, y = next(iter(gb.Loader(X, X["b"], batch_size=4, shuffle=False, backend="cpu")))
        assert (x.tolist(), x.dtype, y.tolist()) == (wanted, np.float64, [1, 0, 1, 0])
    gaps = frame.astype("Int64", errors="ignore").mask(frame["i"] == 2)
    for X, y in ((gaps, None), (frame, gaps["b"].astype("boolean"))):
        with pytest.raises(gb.NonFiniteError, match=r"(X\[2, 0\]|Y\[2\]) is nan"):
            gb.Loader(X, y, backend="cpu")
    for others, named in (({"s": "x"}, "column 's' hold"), ({"s": "x", "t": "y"}, "columns 's', 't' hold")):
        with pytest.raises(
            DTypeError, match=f"X must hold numbers, and its {named} others; gb.read_table makes numbers"
        ):
            gb.Loader(frame.assign(**others), backend="cpu")


@pytest.mark.filterwarnings("ignore::gpubatch.FewStepsWarning")
@pytest.mark.parametrize("name", FRAMES)
def test_frames_are_held_against_the_columns_of_training(name: str, tmp_path: Path) -> None:
    """Wherever samples are given: to a loader, to fit, to a network, to a model, also one from a file."""
    X, Y, _ = frames()
    loader, net = gb.Loader(X, Y, batch_size=10, backend="cpu"), gb.mlp([3, 2], backend="cpu")
    opt = gb.SGD(net.parameters, 0.1)
    gb.fit(net, loader, opt, 1, progress=False)
    gb.save(tmp_path / "m.safetensors", net, loader)
    gb.save(tmp_path / "bare.safetensors", net)
    models = [gb.Model(net, loader), *(gb.load(tmp_path / f"{file}.safetensors", "cpu") for file in ("m", "bare"))]
    make, words = FRAMES[name]
    other = make(X)
    uses = [
        lambda: loader.to_batch(other),
        lambda: gb.fit(net, loader, opt, 1, (other, Y), progress=False),
        lambda: gb.fit(net, loader, opt, 1, gb.Loader(other, Y, dtype="float32", backend="cpu"), progress=False),
        lambda: gb.Loader(other, Y, prepare=gb.Standardize.of(X), backend="cpu"),
        lambda: net.evaluate(other, Y),
        lambda: net.accuracy(other, Y),
        lambda: net.loss(other, Y, training=True),
        *(lambda model=model: model.evaluate(other, Y) for model in models),
        *(lambda of=of: of.predict(other) for of in (net, *models, models[1].net)),
    ]
    for use in uses:
        if words is None:
            use()
        else:
            with pytest.raises(ArgumentError, match=words):
                use()


@pytest.mark.filterwarnings("ignore::gpubatch.FewStepsWarning")
def test_frames_whose_columns_say_something_else(tmp_path: Path) -> None:
    """Labels in several columns, samples in another order, numbered columns in another order, and a table's network."""
    X, Y, _ = frames()
    targets = peer("pandas").DataFrame({"p": X["a"], "q": X["b"]})
    loader, net = gb.Loader(X, targets, batch_size=10, backend="cpu"), gb.mlp([3, 2], loss="mse", backend="cpu")
    opt = gb.SGD(net.parameters, 0.1)
    gb.fit(net, loader, opt, 1, progress=False)
    model, turned = gb.Model(net, loader), targets[["q", "p"]]
    for use in (
        lambda: gb.fit(net, loader, opt, 1, (X, turned), progress=False),
        lambda: gb.fit(net, loader, opt, 1, gb.Loader(X, turned, dtype="float32", backend="cpu"), progress=False),
        lambda: net.evaluate(X, turned),
        lambda: model.evaluate(X, turned),
    ):
        with pytest.raises(ArgumentError, match=r"has the columns of training in another order: give .*\['p', 'q'\]"):
            use()
    classifier = gb.Model(gb.mlp([3, 2], backend="cpu"), classes=["no", "yes"])
    for use in (
        lambda: gb.fit(net, loader, opt, 1, (X, targets[::-1]), progress=False),
        lambda: model.evaluate(X, targets[::-1]),
        lambda: net.loss(X, targets[::-1]),
        lambda: classifier.confusion_matrix(X, Y[::-1]),
    ):
        with pytest.raises(ArgumentError, match="have the same index in different orders"):
            use()
    numbered = X.set_axis([2, 1, 0], axis=1)
    levels = X.set_axis(peer("pandas").MultiIndex.from_product([["a"], [1, 2, 3]]), axis=1)
    gb.save(tmp_path / "m.safetensors", net, gb.Loader(levels, targets, batch_size=10, backend="cpu"))
    assert gb.load(tmp_path / "m.safetensors", "cpu").predict(levels).shape == (40, 2)
    for use in (
        lambda: model.predict(numbered[[2, 1, 0]].set_axis(range(2, -1, -1), axis=1)),
        lambda: classifier.predict(numbered),
        lambda: gb.load(tmp_path / "m.safetensors", "cpu").predict(levels[levels.columns[::-1]]),
    ):
        with pytest.raises(ArgumentError, match=r"must have the columns of training|in another order"):
            use()
    table = gb.read_table({**{name: X[name] for name in X}, "y": ["p", "q"] * 20}, label="y")
    net = gb.mlp([table.features, 2], backend="cpu")
    loader = gb.Loader(table, batch_size=10, backend="cpu")
    gb.fit(net, loader, gb.SGD(net.parameters, 0.1), 1, progress=False)
    gb.save(tmp_path / "m.safetensors", net)
    for use in (net.predict, loader.to_batch, gb.load(tmp_path / "m.safetensors", "cpu").predict):
        with pytest.raises(ArgumentError, match=r"trained on a table; a DataFrame goes to gb.Model\(net, table\)"):
            use(X)
    assert gb.Model(net, table).predict(X).shape == (40,)


@pytest.mark.parametrize("x", [None, {1, 2}, object(), 3 + 0j])
def test_what_is_no_array_is_told_by_its_type(x: Any) -> None:
    words = "got None" if x is None else f"got a {type(x).__name__}|got dtype complex128"
    with pytest.raises(DTypeError, match=words):
        gb.Loader(x, np.arange(3), backend="cpu")
