"""Orders that are computed as they are used: their integers, each sample once, chance by tests, memory, old states."""

from __future__ import annotations

import itertools
import json
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from families import drawn, every
from hypothesis import strategies as st
from large_orders import from_64_on
from stand_in import queued_backend

import gpubatch as gb
from gpubatch.backend import CudaBackend
from gpubatch.errors import ArgumentError, NonFiniteError
from gpubatch.loader import Loader, epoch_order, epochs_of
from gpubatch.loader.device import DeviceFeed, DeviceOrder
from gpubatch.loader.order import LARGE, Order
from gpubatch.ops import Grid, Permutation, feistel, gather_batch, permutation, permute, take_batch
from gpubatch.ops.compile import host_library

F = np.dtype(np.float32)
WORD = 2**64 - 1
SIZES = [1, 2, 3, 4, 5, 17, 1000, 4096, LARGE - 1, LARGE, LARGE + 1, 10**9, 10**12, 2**40 + 1, 2**63 - 1]


@pytest.fixture(params=["NumPy", "compiled"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What computes the images on a CPU."""
    if request.param == "NumPy":
        monkeypatch.setattr(permutation, "host_library", lambda: "switched off")
    elif isinstance(host_library(), str):
        pytest.skip(f"no compiled kernels: {host_library()}")
    return request.param


# --- the integers ----------------------------------------------------------------------------------------------------


def textbook(n: int, seed: int, epoch: int, number: int, stream: int = 0) -> int:
    """The image of ``number``, with Python's integers: halves that are exchanged, as Luby and Rackoff draw it."""
    words = np.random.Philox(key=np.array([seed, epoch], np.uint64), counter=[0, 0, 1, stream]).random_raw(8).tolist()
    bits = max(2, (n - 1).bit_length())

    def once(x: int) -> int:
        sizes = bits // 2, bits - bits // 2
        left, right = x >> sizes[1], x % 2 ** sizes[1]
        for round_, word in enumerate(words):
            mixed = (right ^ (word % 2**32)) * 0x85EBCA6B % 2**32
            mixed = ((mixed ^ (mixed >> 16)) ^ (word >> 32)) * 0xC2B2AE35 % 2**32
            left, right = right, left ^ (mixed >> (32 - sizes[round_ % 2]))
        return left << sizes[1] | right

    number = once(number)
    while number >= n:
        number = once(number)
    return number


GOLDEN = {  # (n, seed, epoch) -> the first images: they must never change
    (2**20, 0, 0): [382132, 232499, 724459, 108703, 228732, 144992],
    (10**12, 7, 3): [773729417947, 818124249446, 574359533851, 926135229527, 191194967897, 181132658143],
    (2**40 + 1, 2**64 - 1, 1): [958294706954, 201975569181, 238505984809, 712705878515, 666928707551, 361648586489],
}


@pytest.mark.parametrize("case", GOLDEN, ids=str)
def test_golden_images(case: tuple[int, int, int], form: str) -> None:
    assert Permutation(*case).between(0, 6).tolist() == GOLDEN[case]
    if case[0] == LARGE:
        assert epoch_order(*case)[:6].tolist() == GOLDEN[case]


@pytest.mark.parametrize("n", SIZES)
def test_images_are_those_of_the_textbook(n: int, form: str) -> None:
    for first, step in ((0, 1), (2, 3)):
        found = Permutation(n, 5, WORD, 3, first, step)
        places = len(range(first, n, step))
        for start in {0, places // 2, max(0, places - 20)}:
            stop = min(start + 20, places)
            numbers = first + step * np.arange(start, stop)
            images = found.between(start, stop)
            assert images.tolist() == [textbook(n, 5, WORD, int(x), 3) for x in numbers]
            assert np.array_equal(found.places_of(images), numbers)


def test_every_level_gives_the_same_images() -> None:
    library = host_library()
    if isinstance(library, str):
        pytest.skip(f"no compiled kernels: {library}")
    used = library.level()
    try:
        for n in (5000, 10**9, 2**40 + 1):
            found, expected = Permutation(n, 1, 2), Permutation(n, 1, 2).of(np.arange(100, 3300))
            for level in library.levels():
                library.use(level)
                assert np.array_equal(found.between(100, 3300), expected), (level, n)
    finally:
        library.use(used)


def test_numpy_keeps_what_it_computed_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(permutation, "host_library", lambda: "switched off")
    monkeypatch.setattr(permutation, "TOGETHER", 100)
    whole = Permutation(1000, 3, 4).of(np.arange(1000))
    found = Permutation(1000, 3, 4)
    for start, stop in ((0, 40), (40, 80), (80, 120), (120, 420), (419, 420), (7, 8), (900, 1000), (990, 1000)):
        assert np.array_equal(found.between(start, stop), whole[start:stop])


# --- each sample once ------------------------------------------------------------------------------------------------


@drawn(
    20,
    300,
    n=st.integers(1, 400),
    world_size=st.integers(1, 5),
    seed=st.integers(0, WORD),
    window=st.sampled_from([0, 40, 90, 300]),
    block=st.integers(1, 12),
    shuffle=st.booleans(),
)
def test_ranks_have_each_sample_once(
    n: int, world_size: int, seed: int, window: int, block: int, shuffle: bool
) -> None:
    world_size = min(n, world_size)
    with pytest.MonkeyPatch.context() as patch:
        from_64_on(patch)
        together = window // block * block
        sizes = (together, block) if together else (0, 0)
        whole = Order(n, seed, shuffle, False, 0, 1, *sizes).between(3)(0, n)
        assert np.array_equal(np.sort(whole), np.arange(n))
        assert shuffle or np.array_equal(whole, np.arange(n))
        for rank in range(world_size):
            mine = Order(n, seed, shuffle, False, rank, world_size, *sizes)
            assert mine.version == 1 + (n >= 64)
            found, middle = mine.between(3), mine.share // 2
            parts = [found(a, b) for a, b in ((0, middle), (middle, mine.share)) if a < b]
            assert np.array_equal(np.concatenate(parts), whole[rank::world_size])


@every(
    "n",
    {str(n): n for n in (LARGE - 1, LARGE, LARGE + 1, 1_048_583, 1_299_709, 2**21 - 1)},  # two are primes
    [str(LARGE)],
)
def test_a_large_set_has_each_sample_once(n: int, form: str) -> None:
    for world_size in (1, 3):
        orders = [Order(n, 1, True, False, rank, world_size) for rank in range(world_size)]
        parts = [mine.between(5)(0, mine.share) for mine in orders]
        assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(n))
    places = np.arange(n - 1000, n)
    assert np.array_equal(parts[-1][-10:], orders[-1].between(5)(orders[-1].share - 10, orders[-1].share))
    if n < LARGE:  # the order of old: sorted by the words of Philox, with the number of the sample below them
        words = np.random.Philox(key=[1, 5]).random_raw(n) >> np.uint64(20)
        assert np.array_equal(epoch_order(n, 1, 5), np.argsort(words, kind="stable"))
    else:
        assert np.array_equal(epoch_order(n, 1, 5)[places], Permutation(n, 1, 5).of(places))


def test_a_choice_of_a_large_set_is_shuffled(small: None) -> None:
    order = Order(100, 3)
    for chosen in (np.arange(0, 100, 3), np.arange(0, 100, 17)):  # the few are sorted
        order.choose(chosen)
        assert np.array_equal(np.sort(order.whole(2)), chosen)
        assert not order.by_kernels


# --- loaders ---------------------------------------------------------------------------------------------------------


class Squares:
    """A source of any size: sample i is (i, i² mod 1000)."""

    def __init__(self, n: int, block: int | None = None, dtype: str = "int64") -> None:
        self._n, self._dtype = n, dtype
        if block is not None:
            self.block = block

    def __len__(self) -> int:
        return self._n

    def read(self, indices: np.ndarray) -> np.ndarray:
        assert 0 <= indices.min() <= indices.max() < self._n
        return np.stack([indices, indices * indices % 1000], 1).astype(self._dtype)


def numbers(batches: Iterator[Any], count: int) -> list[int]:
    return [int(i) for batch in itertools.islice(batches, count) for i in batch[:, 0]]


@pytest.mark.parametrize("options", [{}, {"shuffle": False}, {"replacement": True}, {"window": "1 MiB"}], ids=str)
@pytest.mark.parametrize("rank", [0, 3])
def test_a_set_of_any_size_begins_and_resumes_at_once(options: dict[str, Any], rank: int, form: str) -> None:
    n = 10**12
    make: Callable[[], Loader] = lambda: Loader(  # noqa: E731
        Squares(n), batch_size=256, backend="cpu", dtype="float64", prefetch=0, rank=rank, world_size=4, **options
    )
    make()  # imports
    tracemalloc.start()
    try:
        loader = make()
        first = numbers(iter(loader), 2)
        middle = {**loader.state_dict(), "epoch": 3, "batch": len(loader) // 2}
        resumed = make()
        resumed.load_state_dict(json.loads(json.dumps(middle)))
        found = numbers(iter(resumed), 2)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 50e6
    assert sum(loader.plan.parts.values()) < 50e6
    assert len(first) == len(found) == 512
    start = 256 * middle["batch"]
    expected = epochs_of(resumed).order.between(3)(start, start + 512)
    assert found == expected.tolist()
    if not options:
        assert found == [textbook(n, 0, 3, rank + 4 * (start + i)) for i in range(512)]


def test_a_loader_goes_on_with_the_order_of_its_state() -> None:
    X = np.arange(LARGE + 5, dtype=np.int64)[:, None]
    loader = Loader(X, batch_size=1000, backend="cpu", dtype="float64", seed=4)
    state = loader.state_dict()
    assert state["order"] == 2
    assert numbers(iter(loader), 1) == Permutation(LARGE + 5, 4, 0).of(np.arange(1000)).tolist()
    of_old = {name: value for name, value in state.items() if name != "order"} | {"epoch": 1, "batch": 7}
    for before in (of_old, of_old | {"order": 1}):
        loader.load_state_dict(before)
        assert numbers(iter(loader), 1) == epoch_order(LARGE + 5, 4, 1, version=1)[7000:8000].tolist()
        assert loader.state_dict()["order"] == 1
        assert loader.plan.parts["making of an epoch's order"] == 26 * (LARGE + 5)
    with pytest.raises(ArgumentError, match="state has seed=5, this loader seed=4"):
        loader.load_state_dict(state | {"seed": 5})
    assert loader.state_dict()["order"] == 1
    loader.load_state_dict(state)
    assert numbers(iter(loader), 1) == Permutation(LARGE + 5, 4, 0).of(np.arange(1000)).tolist()
    with pytest.raises(ArgumentError, match="state has order=3, this loader order=2"):
        loader.load_state_dict(state | {"order": 3})
    few = Loader(X[:100], batch_size=10, backend="cpu")
    assert few.state_dict()["order"] == 1
    with pytest.raises(ArgumentError, match="state has order=2, this loader order=1"):
        few.load_state_dict(few.state_dict() | {"order": 2})


@every("world_size", {"1": 1, "2": 2}, ["1"])
@every("shuffle", {"shuffled": True, "in order": False}, ["shuffled"])
def test_a_window_of_narrow_rows_is_within_its_bound(shuffle: bool, world_size: int) -> None:
    """The plan counts what the window takes, and this is what was asked for, even of four bytes a sample."""
    n, bound = 3_000_000, 1 << 20
    loader = Loader(
        _Narrow(n),
        batch_size=1000,
        window="1 MiB",
        backend="cpu",
        dtype="float32",
        prefetch=0,
        shuffle=shuffle,
        world_size=world_size,
    )
    half = loader.window
    tracemalloc.start()
    try:
        found = numbers(iter(loader), half // world_size // 1000 + 5)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    del found
    planned = loader.plan.parts["window"]
    assert planned < (1.4 if world_size == 1 else 5) * bound
    assert peak < planned + 45 * 1000 * (half // world_size // 1000 + 5)  # and the numbers that are kept here


class _Narrow:
    """Four bytes a sample, the number of the sample."""

    block = 4096

    def __init__(self, n: int) -> None:
        self._n = n

    def __len__(self) -> int:
        return self._n

    def read(self, indices: np.ndarray) -> np.ndarray:
        return indices.astype(np.int32)[:, None]

    def read_into(self, indices: np.ndarray, out: np.ndarray) -> None:
        out[:, 0] = indices


@pytest.mark.parametrize("sample_axis", [0, 1])
@pytest.mark.parametrize("scale", [None, 0.5])
def test_the_numbers_of_a_mapped_file_are_checked_as_they_are_read(
    scale: float | None, sample_axis: int, tmp_path: Path
) -> None:
    X = np.arange(240, dtype=np.float32).reshape(40, 6)
    np.save(tmp_path / "good.npy", X if sample_axis == 0 else np.ascontiguousarray(X.T))
    X[33, 2] = np.nan
    np.save(tmp_path / "bad.npy", X if sample_axis == 0 else np.ascontiguousarray(X.T))
    mapped = {name: np.load(tmp_path / f"{name}.npy", mmap_mode="r") for name in ("good", "bad")}
    options: dict[str, Any] = {"sample_axis": sample_axis, "scale": scale, "shuffle": False, "batch_size": 8}
    plain = Loader(np.array(mapped["good"]), backend="cpu", **options)
    for x, expected in zip(Loader(mapped["good"], backend="cpu", **options), plain, strict=True):
        assert np.array_equal(x, expected)
        assert x.flags.c_contiguous
    for backend, feed in (("cpu", "auto"), (queued_backend("late"), "host"), (queued_backend("late"), "device")):
        loader = Loader(mapped["bad"], backend=backend, feed=feed, prefetch=0, **options)
        with pytest.raises(NonFiniteError, match=r"X.* must be finite, but .*33.*nan"):
            list(loader)
        assert loader.stats.batches == (0 if feed == "device" else 4)
    with pytest.raises(NonFiniteError, match=r"X must be finite, but X\[.*33.*\] is nan"):
        Loader(np.array(mapped["bad"]), backend="cpu", **options)


# --- on a device -----------------------------------------------------------------------------------------------------


def test_a_device_computes_the_images(device: CudaBackend) -> None:
    for n, first, step in ((5000, 0, 1), (10**12, 3, 8), (2**40 + 1, 0, 1), (77, 0, 1)):
        found, count = Permutation(n, 5, 3, 1, first, step), min(700, -(-(n - first) // step))
        with device.scope():
            words, out = device.asarray(found.words), device.empty(count, np.int64)
            permute(Grid(device, F), words, 0, out)
            assert np.array_equal(device.to_numpy(out), found.between(0, count))
        with device.own_stream():
            order = DeviceOrder(device, found)
            assert np.array_equal(device.to_numpy(order.part(11, 60)), found.between(11, 60))
            order.close()


@every("shape", {str(shape): shape for shape in ((), (3,), (16,), (37,))}, ["(16,)"])
def test_kernels_that_gather_compute_the_order(
    shape: tuple[int, ...], device: CudaBackend, rng: np.random.Generator
) -> None:
    n, size = 300, 16
    source, labels = rng.integers(0, 200, (n, *shape)).astype(np.uint8), rng.integers(0, 9, n).astype(np.int32)
    for shuffle, rank in ((True, 0), (True, 1), (False, 1)):
        found = Permutation(n, 2, 8, 0, rank, 2, shuffle)
        for batch, rows in ((0, size), (5, size), (9, 6)):
            index = found.between(batch * size, batch * size + rows)
            with device.scope():
                words, at = device.asarray(found.words), device.asarray(np.array([batch]))
                x, y = device.empty((rows, *shape), np.float32), device.empty(rows, np.int64)
                there = device.asarray(source), device.asarray(labels)
                gather_batch(Grid(device, F), there[0], words, at, x, 0.5, 0.0, size, "Computed")
                take_batch(Grid(device, F), there[1], words, at, y, size, "Computed")
                assert np.array_equal(device.to_numpy(x), source[index] * F.type(0.5))
                assert np.array_equal(device.to_numpy(y), labels[index])


@every(
    "options",
    {
        str(options): options
        for options in (
            {},
            {"rank": 1, "world_size": 2},
            {"shuffle": False},
            {"seed": 3},
            {"replacement": True},
            {"replacement": True, "seed": WORD, "rank": 1, "world_size": 3},
            {"order": gb.WeightedOrder(np.arange(101) % 3)},
            {"order": gb.WeightedOrder(np.arange(101) ** 2.5), "rank": 1, "world_size": 2},
        )
    },
    ["{}", "{'replacement': True}", "{'order': <WeightedOrder of 101 weights from 0 to 2>}"],
)
def test_a_device_has_the_batches_of_the_cpu(
    options: dict[str, Any], small: None, device: CudaBackend, rng: np.random.Generator
) -> None:
    X, Y = rng.integers(0, 99, (101, 5)).astype(np.uint8), rng.integers(0, 9, 101)
    with device.own_stream():
        loaders = [Loader(X, Y, batch_size=16, backend=b, **options) for b in ("cpu", device)]
        for _ in range(2):
            for (x, y), (there, labels) in zip(*loaders, strict=True):
                assert np.array_equal(device.to_numpy(there), x)
                assert np.array_equal(device.to_numpy(labels), y)
        there = loaders[1]
        assert there.stats.bytes_copied == 8 * permutation.PERMUTATION_WORDS  # and sums of weights before epoch 0
        assert there.plan.parts["order of an epoch"] == 8 * 16 + (8 * 101 if there.order else 0)
        feed = epochs_of(there).device_feed()
        assert isinstance(feed, DeviceFeed)
        expected = [*Loader(X, Y, batch_size=16, backend="cpu", **options)]
        epochs_of(there).load_state_dict(there.state_dict() | {"epoch": 0})
        with epochs_of(there).gathered_by(feed) as used, device.scope():
            for number, (x, y) in enumerate(expected):
                feed.enqueue(len(x), device.asarray(np.array([number])))
                found = [device.to_numpy(array) for array in feed.arrays(len(x))]
                assert np.array_equal(found[0], x)
                assert np.array_equal(found[1], y)
                used(1)
        assert there.epoch == 1


# --- chance ----------------------------------------------------------------------------------------------------------

PLACES, EPOCHS = 1 << 14, 40  # of each epoch, neighbours
Map = Callable[[np.ndarray], np.ndarray]


def z_of(counts: np.ndarray) -> float:
    """How many standard deviations the chi-square of counts that should be equal is from its mean."""
    freedom, mean = counts.size - 1, counts.mean()
    return float((((counts - mean) ** 2 / mean).sum() - freedom) / np.sqrt(2 * freedom))


def part_of(x: np.ndarray, n: int, parts: int) -> np.ndarray:
    """In which of ``parts`` of the numbers below n each is."""
    return np.minimum((x.astype(float) * (parts / n)).astype(np.int64), parts - 1)


def pairs(a: np.ndarray, b: np.ndarray, size: int) -> np.ndarray:
    return np.bincount(a * size + b, minlength=size * size)


def z_scores(n: int, of: Callable[[int, int], Permutation], rng: np.random.Generator) -> dict[str, float]:
    """The tests of the review by name: |z| below 3 is chance."""
    bits, half = (n - 1).bit_length(), 1 << ((n - 1).bit_length() - 1)
    counts: dict[str, Any] = {}
    means: dict[str, list[float]] = {"batches by class": [], "serial correlation": []}

    def count(name: str, found: np.ndarray) -> None:
        counts[name] = counts.get(name, 0) + found

    for epoch in range(EPOCHS):
        this, places = of(7, epoch), int(rng.integers(0, n - PLACES)) + np.arange(PLACES)
        y = this.of(places)
        apart = rng.integers(0, n, PLACES)
        count("place and image", pairs(part_of(apart, n, 32), part_of(this.of(apart), n, 32), 32))
        count("low bits of both", pairs(places % 16, y % 16, 16))
        count("next epoch", pairs(part_of(y, n, 32), part_of(of(7, epoch + 1).of(places), n, 32), 32))
        count("next seed", pairs(part_of(y, n, 32), part_of(of(8, epoch).of(places), n, 32), 32))
        count("difference of neighbours", np.bincount(part_of((y[1:] - y[:-1]) % n, n, 256), minlength=256))
        xor = y[::2] ^ y[1::2]
        count("xor of neighbours", np.bincount(xor % 64, minlength=64))
        low = np.arange(min(PLACES, n - half))
        if len(low) > 64:
            far = this.of(low) ^ this.of(low + half)
            count("xor half apart", np.bincount(far % 64, minlength=64))
        if n == 1 << bits:
            count("high xor of neighbours", np.bincount(xor >> (bits - 6), minlength=64))
            count("high xor half apart", np.bincount(far >> (bits - 6), minlength=64))
        fives = (rng.integers(0, n, 2000)[:, None] + np.arange(5)) % n
        ranks = this.places_of(fives.reshape(-1)).reshape(-1, 5).argsort(axis=1)
        smaller = [(ranks[:, i] > ranks[:, i:].T).sum(axis=0) for i in range(4)]  # Lehmer's code of the order
        count("order of five", np.bincount(np.array([24, 6, 2, 1]) @ smaller, minlength=120))
        batches = part_of(y, n, 10)[: PLACES // 100 * 100].reshape(-1, 100)
        of_class = np.stack([(batches == c).sum(axis=1) for c in range(10)])
        means["batches by class"].append(float((((of_class - 10) ** 2).sum(axis=0) / 90).mean()))
        centred = y / n - 0.5
        means["serial correlation"].append(float((centred[1:] * centred[:-1]).sum() * 12 / np.sqrt(PLACES - 1)))
    found = {name: z_of(counted) for name, counted in counts.items()}
    spread = np.sqrt(2 / 9 / (PLACES // 100) / EPOCHS)  # chi-square / 9 of so many batches
    found["batches by class"] = (float(np.mean(means["batches by class"])) - 10 / 9 * 0.9) / spread
    found["serial correlation"] = float(np.sum(means["serial correlation"]) / np.sqrt(EPOCHS))
    return found


CHANCE = [LARGE, LARGE + 1, 2**21, 2**21 - 9, 10**9, 2**30, 2**30 + 1, 10**12, 2**40 + 1, 2**41]


@pytest.mark.exhaustive
@pytest.mark.parametrize("n", CHANCE)
def test_the_order_is_as_if_by_chance(n: int) -> None:
    found = z_scores(n, lambda seed, epoch: Permutation(n, seed, epoch), np.random.default_rng(n))
    assert len(found) >= 9
    assert all(abs(z) < 3 for z in found.values()), found


@pytest.mark.exhaustive
def test_windows_of_a_large_set_are_as_if_by_chance() -> None:
    """The list of blocks, and the samples of a window, are permutations of other streams of the same key."""
    n = LARGE + 1

    def of(seed: int, epoch: int) -> Permutation:
        return Permutation(n, seed, 0, stream=epoch)

    assert all(abs(z) < 3 for z in z_scores(n, of, np.random.default_rng(2)).values())


@pytest.mark.exhaustive
def test_the_z_scores_find_what_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feistel, "ROUNDS", 2)
    rng = np.random.default_rng(1)
    found = z_scores(LARGE, lambda seed, epoch: Permutation(LARGE, seed, epoch), rng)
    assert max(map(abs, found.values())) > 10
