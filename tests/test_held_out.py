"""A fraction of a large set that is held out: its integers, both sides, files, ranks, devices, old states, chance."""

from __future__ import annotations

import itertools
import json
import tracemalloc
from collections.abc import Callable
from fractions import Fraction as Exact
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from families import drawn, every
from hypothesis import strategies as st
from large_orders import from_64_on
from test_order import Squares, pairs, z_of

import gpubatch as gb
from gpubatch.backend import CudaBackend
from gpubatch.errors import ArgumentError
from gpubatch.loader import Loader, epochs_of, order as order_module
from gpubatch.loader.device import DeviceFeed, DeviceOrder
from gpubatch.loader.order import LARGE, Order, split
from gpubatch.ops import Draws, Permutation, cells
from gpubatch.ops.cells import CELL, CellSplit
from gpubatch.ops.compile import host_library

SEED = 7


@pytest.fixture(params=["NumPy", "compiled"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What computes the sides on a CPU."""
    if request.param == "NumPy":
        monkeypatch.setattr(cells, "host_library", lambda: "switched off")
    elif isinstance(host_library(), str):
        pytest.skip(f"no compiled kernels: {host_library()}")
    return request.param


def every_number(side: CellSplit) -> np.ndarray:
    return side[np.arange(len(side))]


# --- the integers ----------------------------------------------------------------------------------------------------


def in_cell(x: int, cell: int, size: int, seed: int) -> int:
    """The image of x under the permutation of a cell, with Python's integers."""
    words = np.random.Philox(key=np.array([seed, 0], np.uint64), counter=[0, 0, 2, 0]).random_raw(8).tolist()
    change = (cell + 1) * 0x9E3779B97F4A7C15 % 2**64
    change = (change ^ change >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    change = (change ^ change >> 27) * 0x94D049BB133111EB % 2**64
    change ^= change >> 31
    bits = max(2, (size - 1).bit_length())
    sizes = bits // 2, bits - bits // 2
    while True:
        left, right = x >> sizes[1], x % 2 ** sizes[1]
        for number, word in enumerate(words):
            word ^= change
            mixed = (right ^ word % 2**32) * 0x85EBCA6B % 2**32
            mixed = (mixed ^ mixed >> 16 ^ word >> 32) * 0xC2B2AE35 % 2**32
            left, right = right, left ^ mixed >> (32 - sizes[number % 2])
        x = left << sizes[1] | right
        if x < size:
            return x


GOLDEN = {  # (n, held) -> from the middle on, numbers that are left and that are held out: they must never change
    (2**20, 104858): [[528075, 524311, 525630, 526121, 526915], [524468, 524492, 524816, 526100, 525410]],
    (10**12, 10**11): [
        [499999999376, 500000000988, 500000000248, 499999999469, 500000000803],
        [500000000143, 500000000679, 499999997991, 499999998974, 499999998838],
    ],
}


@pytest.mark.parametrize("case", GOLDEN, ids=str)
def test_golden_sides(case: tuple[int, int], form: str) -> None:
    sides = [CellSplit(*case, SEED, of_held) for of_held in (False, True)]
    assert [side[len(side) // 2 + np.arange(5)].tolist() for side in sides] == GOLDEN[case]


SIZES = [(2, 1), (5, 4), (4096, 1), (4097, 4096), (9000, 4500), (12345, 2), (LARGE + 1, 314573), (2**22 - 5, 4 * 10**6)]
LARGEST = [(10**9, 10**8), (10**12, 3), (10**12, 10**11), (2**40 + 1, 2**39 + 7), (2**61 + 9, 2**60)]


@every("case", {str(case): case for case in SIZES + LARGEST}, ["(12345, 2)", "(1000000000000, 100000000000)"])
def test_a_side_is_what_the_permutations_of_its_cells_give(case: tuple[int, int], form: str) -> None:
    n, held = case
    last, few = (n - 1) // CELL, min(held, n - held)
    for of_held in (False, True):
        side = CellSplit(n, held, SEED, of_held)
        count = held if of_held else n - held
        assert len(side) == count
        smaller = count == few and (of_held or few < n - few)
        for place in {0, 1, count // 3, count // 2, count - 2, count - 1}:
            if not 0 <= place < count:
                continue
            number = int(side[np.array([place])][0])
            cell = number // CELL
            begin = int(side._begin(np.array([cell]))[0])
            exact = Exact(cell * CELL * (few if smaller else n - few), n)  # its share of the cells before
            assert abs(begin - exact) < 2 or n > 2**53
            size = n - last * CELL if cell == last else CELL
            inside = size - 1 - (place - begin) if smaller else place - begin
            assert number == cell * CELL + in_cell(inside, cell, size, SEED)


@every("case", {str(case): case for case in SIZES}, ["(4097, 4096)", "(9000, 4500)"])
def test_both_sides_are_all_numbers_and_ascend(case: tuple[int, int], form: str, rng: np.random.Generator) -> None:
    n, held = case
    both = []
    for of_held in (False, True):
        side, ascending = (CellSplit(n, held, SEED, of_held, ascends) for ascends in (False, True))
        found, expected = every_number(ascending), np.sort(every_number(side))
        assert np.array_equal(found, expected)
        places = rng.integers(0, len(side), 100)
        assert np.array_equal(ascending[places], expected[places])
        limits = np.append(rng.integers(0, n + 1, 50), [0, n])
        for one in (side, ascending):
            assert np.array_equal(one.searchsorted(limits), expected.searchsorted(limits))
        assert np.array_equal(side[places], CellSplit(n, held, SEED, of_held)[places])
        share = np.diff(ascending.searchsorted(np.append(np.arange(0, n, CELL), n)))[:-1]
        assert len(share) == 0 or np.ptp(share) <= 2
        both.append(found)
    assert np.array_equal(np.sort(np.concatenate(both)), np.arange(n))


def test_every_level_gives_the_same_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    library = host_library()
    if isinstance(library, str):
        pytest.skip(f"no compiled kernels: {library}")
    used, side = library.level(), CellSplit(10**12, 10**11, 2)
    places = np.arange(10**11, 10**11 + 9000)
    found = []
    try:
        for level in library.levels():
            library.use(level)
            found.append(side[places])
    finally:
        library.use(used)
    monkeypatch.setattr(cells, "host_library", lambda: "switched off")
    assert all(np.array_equal(level, side[places]) for level in found)


# --- loaders ---------------------------------------------------------------------------------------------------------


def samples_of(batches: Any) -> list[int]:
    return [int(i) for x, *_ in batches for i in x[:, 0]]


@drawn(
    5,
    200,
    n=st.integers(64, 9000),
    fraction=st.sampled_from([0.1, 0.3, 0.5, 0.98]),
    world_size=st.integers(1, 3),
    seed=st.integers(0, 2**64 - 1),
    window=st.sampled_from([None, 600]),
    shuffle=st.booleans(),
)
def test_ranks_train_on_each_sample_once_and_hold_out_the_others(
    n: int, fraction: float, world_size: int, seed: int, window: int | None, shuffle: bool
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        from_64_on(patch)
        held, trained = [], list[int]()
        for rank in range(min(world_size, n - round(fraction * n))):
            options: dict[str, Any] = {"rank": rank, "world_size": min(world_size, n - round(fraction * n))}
            loader = Loader(
                np.arange(n)[:, None],
                batch_size=100,
                backend="cpu",
                dtype="float64",
                seed=seed,
                window=window,
                shuffle=shuffle,
                **options,
            )
            with epochs_of(loader).holding_out(fraction, 1000) as apart:
                assert loader.state_dict()["order"] == 3
                assert loader.n_samples == n - round(fraction * n)
                mine = samples_of((x,) for x in loader)
                assert shuffle or mine == sorted(mine)
                trained += mine
                held.append(samples_of(apart.batches(apart.columns.as_rows)))
            assert loader.state_dict()["order"] == 2
            assert loader.n_samples == n
        assert all(of == held[0] for of in held)
        assert sorted(trained + held[0]) == list(range(n))


ANY_SIZE: list[dict[str, Any]] = [{}, {"shuffle": False}, {"replacement": True}, {"window": "1 MiB"}, {"shards": 8}]


@every("options", {str(options): options for options in ANY_SIZE}, ["{}"])
def test_a_fraction_of_a_set_of_any_size_is_left_out_at_once(options: dict[str, Any], form: str) -> None:
    n = 10**12

    def make() -> Loader:
        return Loader(Squares(n), batch_size=256, backend="cpu", dtype="float64", prefetch=0, **options)

    make()  # imports
    tracemalloc.start()
    try:
        loader = make()
        with epochs_of(loader).holding_out(0.1, 256) as apart:
            first = samples_of((x,) for x in itertools.islice(loader, 2))
            middle = {**loader.state_dict(), "epoch": 3, "batch": len(loader) // 2}
        resumed = make()
        with epochs_of(resumed).holding_out(0.1, 256) as apart:
            resumed.load_state_dict(json.loads(json.dumps(middle)))
            found = samples_of((x,) for x in itertools.islice(resumed, 2))
            held = samples_of(itertools.islice(apart.batches(apart.columns.as_rows), 2))
            of_plan = epochs_of(resumed).plan.needed + apart.plan.needed
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert max(peak, of_plan) < 50e6
    assert held == sorted(held)
    sides = CellSplit(n, n // 10, 0, True, True)
    inside = np.diff(sides.searchsorted(np.array([*first, *found, *held])[:, None].repeat(2, 1).reshape(-1) + ZERO_ONE))
    assert not inside[0 : 2 * 1024 : 2].any()
    assert inside[2 * 1024 :: 2].all()


ZERO_ONE = np.tile([0, 1], 1536)


def test_weights_are_of_the_samples_that_are_left(small: None, rng: np.random.Generator) -> None:
    """The draws are those of the listed ones' weights, which were cut out: other samples have none."""
    n, weights = 3000, rng.integers(0, 4, 3000) + rng.random(3000)
    order = Order(n, 5, True, True, weighted=gb.WeightedOrder(weights))
    chosen = np.flatnonzero(rng.random(n) < 0.7)
    order.choose(chosen)
    words = np.random.Philox(key=np.array([5, 2], np.uint64)).random_raw(len(chosen))
    sums = np.cumsum(weights[chosen])
    expected = chosen[sums.searchsorted((words >> np.uint64(11)) * (2.0**-53 * sums[-1]), side="right")]
    assert np.array_equal(order.whole(2), expected)
    loader = Loader(np.arange(n)[:, None], batch_size=500, backend="cpu", order=gb.WeightedOrder(weights))
    with epochs_of(loader).holding_out(0.5, n) as apart:
        [[held]] = apart.batches(apart.columns.as_rows)
        assert not set(samples_of((x,) for x in loader)) & set(held[:, 0].astype(int))


@every("kind", {kind: kind for kind in ("array", "source", "windows")}, ["windows"])
def test_a_run_goes_on_with_what_it_held_out(
    kind: str, small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    """Runs of before and runs of now; of before the listed samples are held out, in proportion from each class."""
    n = 300
    X, Y = rng.normal(size=(n, 3)).astype(np.float32), np.arange(n) % 3

    class Source:
        block = 10

        def __len__(self) -> int:
            return n

        def read(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            return X[indices], Y[indices]

    def run(epochs: int, folder: str | None = None) -> tuple[Any, gb.History]:
        net = gb.mlp([3, 4, 3], backend="cpu", seed=1)
        options: dict[str, Any] = {"window": 80} if kind == "windows" else {}
        data = (X, Y) if kind == "array" else (Source(),)
        loader = Loader(*data, batch_size=32, backend="cpu", seed=3, **options)
        places: dict[str, Any] = {} if folder is None else {"checkpoint": tmp_path / folder, "resume": True}
        opt = gb.Adam(net.parameters)
        history = gb.fit(net, loader, opt, epochs, validation=0.2, progress=False, **places)
        return net.parameters.flat.copy(), history

    for now in (False, True):
        if not now:
            monkeypatch.setattr(order_module, "version_of", lambda n, holds_out=False: 1 + (n >= 64))
        whole = run(4)
        run(2, f"{now}")
        monkeypatch.setattr(order_module, "version_of", VERSION_OF)
        resumed = run(4, f"{now}")
        assert np.array_equal(resumed[0], whole[0])
        assert resumed[1].validation_loss == whole[1].validation_loss
        assert resumed[1].loss == whole[1].loss
    labels = Y if kind == "array" else None
    listed = order_module.Fraction(n, 0.2, 3, lambda: labels)
    for of_held, expected in enumerate(split(n, 0.2, 3, labels)):
        assert np.array_equal(listed.side(bool(of_held), 2, False), expected)


VERSION_OF = order_module.version_of


def test_a_state_that_held_out_is_for_a_loader_that_does(small: None) -> None:
    loader = Loader(np.arange(100)[:, None], batch_size=10, backend="cpu")
    with epochs_of(loader).holding_out(0.1, 10):
        state = loader.state_dict()
        assert state["order"] == 3
        with pytest.raises(ArgumentError, match="state has order=4, this loader order=3"):
            loader.load_state_dict(state | {"order": 4})
        with pytest.raises(ArgumentError, match="state has seed=1, this loader seed=0"):
            loader.load_state_dict(state | {"order": 2, "seed": 1})
        assert loader.state_dict() == state
    with pytest.raises(ArgumentError, match="state has order=3, this loader order=2"):
        loader.load_state_dict(state)
    few = Loader(np.arange(50)[:, None], batch_size=10, backend="cpu")
    with epochs_of(few).holding_out(0.1, 10):
        assert few.state_dict()["order"] == 1


def test_each_group_of_a_file_is_decoded_once_on_either_side(small: None) -> None:
    """Blocks of the order are those of the file, however many of their samples are held out."""
    bounds = np.append(np.arange(0, 20_000, 700), 20_000)
    order = Order(20_000, 2, window=3000, block=700, bounds=bounds)
    order.choose_side(order_module.Fraction(20_000, 0.1, 2), False, True)
    [windows] = order.windows(0)
    seen = [
        np.unique(bounds.searchsorted(samples[:], side="right")).tolist()
        for samples in (windows.part(w)[0] for w in range(len(windows)))
    ]
    assert sorted(itertools.chain(*seen)) == list(range(1, len(bounds)))


# --- on a device -----------------------------------------------------------------------------------------------------


def test_a_device_computes_a_side(device: CudaBackend) -> None:
    n, held = 10**12, 10**11
    side = CellSplit(n, held, 3)
    orders: list[tuple[Any, Callable[[int, int], np.ndarray]]] = []
    for among in (side, CellSplit(n, held, 3, True)):
        count = len(among)
        shuffled = Permutation(count, 5, 3, 0, 1, 4, among=among)
        plain = Permutation(count, 5, 3, 0, 1, 4)
        orders.append((shuffled, lambda a, b, plain=plain, among=among: among[plain.between(a, b)]))
        in_order = Permutation(count, 5, 3, shuffle=False, among=among)
        orders.append((in_order, lambda a, b, among=among: among[np.arange(a, b)]))
        words = np.random.Philox(key=np.array([5, 3], np.uint64)).random_raw(700)
        drawn_ = (words % np.uint64(count)).astype(np.int64)
        orders.append((Draws(count, 5, 3, among=among), lambda a, b, d=drawn_, among=among: among[d[a:b]]))
    with device.own_stream():
        for order, expected in orders:
            there = DeviceOrder(device, order)
            assert np.array_equal(device.to_numpy(there.part(11, 600)), expected(11, 600)), order.kind
            if isinstance(order, Permutation):
                assert np.array_equal(order.between(11, 600), expected(11, 600))
            there.close()


@every(
    "options",
    {
        str(options): options
        for options in (
            {},
            {"rank": 1, "world_size": 2},
            {"shards": 8},
            {"shuffle": False},
            {"replacement": True},
            {"order": gb.WeightedOrder(np.arange(5001) ** 2.5)},
            {"window": 900},
        )
    },
    ["{}"],
)
@every("fraction", {"0.1": 0.1, "0.7": 0.7}, ["0.1"])
def test_a_device_has_the_batches_of_the_cpu(
    options: dict[str, Any], fraction: float, small: None, device: CudaBackend, rng: np.random.Generator
) -> None:
    n, size = 5001, 512
    X, Y = rng.integers(0, 99, (n, 5)).astype(np.uint8), rng.integers(0, 9, n)
    listed = "window" in options or not options.get("shuffle", True)
    with device.own_stream():
        loaders = [Loader(X, Y, batch_size=size, backend=b, **options) for b in ("cpu", device)]
        with (
            epochs_of(loaders[0]).holding_out(fraction, 400) as apart,
            epochs_of(loaders[1]).holding_out(fraction, 400) as there,
        ):
            for epoch in range(2):
                for (x, y), (its, labels) in zip(*loaders, strict=True):
                    assert np.array_equal(device.to_numpy(its), x)
                    assert np.array_equal(device.to_numpy(labels), y)
                rows = [held.batches(held.columns.as_rows) for held in (apart, there)]
                for (x, y), (its, labels) in zip(*rows, strict=True):
                    assert np.array_equal(device.to_numpy(its), x)
                    assert np.array_equal(device.to_numpy(labels), y)
                if epoch:
                    assert there.stats.bytes_copied == 26 * 8
                    assert (loaders[1].stats.bytes_copied > 26 * 8) == listed
            feed = epochs_of(loaders[1]).device_feed()
            assert isinstance(feed, DeviceFeed)
            assert there.device_feed() is not None
            state = loaders[1].state_dict()
            epochs_of(loaders[0]).load_state_dict(state)
            with epochs_of(loaders[1]).gathered_by(feed) as used, device.scope():
                for number, (x, y) in enumerate(loaders[0]):
                    deal = epochs_of(loaders[1]).deal_of(number)
                    feed.enqueue(len(x), device.asarray(np.array([number])), deal)
                    found = [device.to_numpy(array) for array in feed.arrays(len(x))]
                    assert np.array_equal(found[0], x)
                    assert np.array_equal(found[1], y)
                    used(1)


# --- chance ----------------------------------------------------------------------------------------------------------


def z_scores(n: int, fraction: float, seeds: int = 200) -> dict[str, float]:
    """By name, how far what is held out of some neighbouring cells is from chance: |z| below 3 is chance.

    Of each cell a fixed number is held out, so counts vary less than those of independent samples, by 1 - fraction.
    """
    rng, together = np.random.default_rng(n), 4
    size = together * CELL
    counts: dict[str, Any] = dict.fromkeys(
        ("place in the cell", "low bits", "neighbours", "half a cell apart", "next cell", "other seed", "classes"), 0
    )
    trials = dict.fromkeys(counts, 0)
    for seed in range(seeds):
        first = int(rng.integers(0, n // CELL - together)) * CELL
        masks = []
        for of in (seed, seed + 1000):
            side = CellSplit(n, round(fraction * n), of, True, True)
            found = side[np.arange(*side.searchsorted(np.array([first, first + size])))] - first
            masks.append(np.bincount(found, minlength=size).astype(bool))
        mask = masks[0]
        inside = np.flatnonzero(mask) % CELL
        halves, of_cell = mask.reshape(together, 2, -1), mask.reshape(together, -1)
        counts["place in the cell"] += np.bincount(inside // 64, minlength=64)
        counts["low bits"] += np.bincount(inside % 64, minlength=64)
        counts["classes"] += np.bincount(rng.integers(0, 10, size)[mask], minlength=10)
        for name, a, b in (
            ("neighbours", mask[1:], mask[:-1]),
            ("half a cell apart", halves[:, 0], halves[:, 1]),
            ("next cell", of_cell[1:], of_cell[:-1]),
            ("other seed", mask, masks[1]),
        ):
            counts[name] += int(np.count_nonzero(a & b))
            trials[name] += a.size
    found = {}
    for name, count in counts.items():
        if trials[name]:
            mean = trials[name] * fraction**2
            found[name] = (count - mean) / np.sqrt(mean * (1 - fraction) ** 2)
        else:
            free, chi = count.size - 1, (count.size - 1) + z_of(count) * np.sqrt(2 * (count.size - 1))
            found[name] = (chi / (1 if name == "classes" else 1 - fraction) - free) / np.sqrt(2 * free)
    return {name: float(z) for name, z in found.items()}


@pytest.mark.exhaustive
@pytest.mark.parametrize("fraction", [0.02, 0.1, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("n", [LARGE, 2**21 - 9, 10**9, 10**12])
def test_what_is_held_out_is_as_if_by_chance(n: int, fraction: float) -> None:
    found = z_scores(n, fraction)
    assert all(abs(z) < 3 for z in found.values()), found


@pytest.mark.exhaustive
def test_the_z_scores_find_what_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cells, "mixed", lambda numbers: np.zeros(len(numbers), np.uint64))
    monkeypatch.setattr(cells, "host_library", lambda: "switched off")
    assert abs(z_scores(LARGE, 0.1)["next cell"]) > 10  # the same places in every cell


@pytest.mark.exhaustive
def test_what_is_left_is_shuffled_as_if_by_chance() -> None:
    """Pairs of place and sample, and of neighbours, of epochs of what is left."""
    n, places = 10**9, 1 << 14
    side = CellSplit(n, n // 10, 1)
    rng, counts, next_to = np.random.default_rng(5), 0, 0
    for epoch in range(40):
        order = Permutation(len(side), 1, epoch, among=side)
        start = int(rng.integers(0, len(side) - places))
        y = order.between(start, start + places)
        apart = rng.integers(0, len(side), places)
        cell_of = lambda x, of: np.minimum(x * 32 // of, 31)  # noqa: E731
        images = np.concatenate([order.between(int(p), int(p) + 1) for p in apart[:2000]])
        counts = counts + pairs(cell_of(apart[:2000], len(side)), cell_of(images, n), 32)
        next_to = next_to + np.bincount((y[1:] - y[:-1]) % n * 256 // n, minlength=256)
    assert abs(z_of(np.asarray(counts))) < 3
    assert abs(z_of(np.asarray(next_to))) < 3
