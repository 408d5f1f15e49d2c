"""Batches on their way to a device: those of the CPU, whatever its streams do, and nothing left of the way."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import runpy
import subprocess
import sys
import threading
import traceback
from pathlib import Path

import numpy as np
import pytest
from families import drawn, every, marks
from hypothesis import strategies as st
from leftovers import threads
from needs import missing
from stand_in import TIMINGS, Event, QueuedStandIn, Stream, found_by_its_arrays, queued_backend

import gpubatch as gb
import gpubatch.loader.feeds
import gpubatch.loader.pinned
import gpubatch.sources
from gpubatch.backend import available_backends, get_backend
from gpubatch.errors import ArgumentError, InsufficientMemoryError, NonFiniteError
from gpubatch.loader import Loader, WeightedOrder, epochs_of
from gpubatch.loader.columns import Columns
from gpubatch.loader.feeds import belongs_on_device

BENCH = Path(__file__).parent.parent / "bench" / "feeding.py"


@pytest.fixture(
    params=[
        *(pytest.param(timing, marks=marks(timing in ("late", "early"))) for timing in TIMINGS),
        pytest.param("cuda:0", marks=pytest.mark.gpu),
    ]
)
def device(request, monkeypatch):
    """A stand-in with adverse timing, or a real device."""
    if request.param in TIMINGS:
        found = queued_backend(request.param)
        found_by_its_arrays(monkeypatch, lambda: found)
        return found
    if request.param not in available_backends():
        missing("gpu", "no CUDA device can be used here")
    return get_backend(request.param)


@pytest.fixture(params=[False, True], ids=["in the caller", "in a thread"])
def threaded(request, monkeypatch):
    monkeypatch.setattr(gpubatch.loader.feeds, "WORTH_A_THREAD", 0 if request.param else 1 << 60)
    return request.param


class Samples:
    """A source of pairs, or with ``labelled=False`` of x only."""

    def __init__(self, X, Y, labelled=True, block=None):
        self.X, self.Y, self.labelled = X, Y, labelled
        if block is not None:
            self.block = block

    def __len__(self):
        return len(self.X)

    def read(self, indices):
        return (self.X[indices], self.Y[indices]) if self.labelled else self.X[indices]


def host(backend, batch):
    return [backend.to_numpy(array) for array in (batch if isinstance(batch, tuple) else (batch,))]


def agree(device, on_cpu, there, epochs=2):
    """Whether both loaders have the same batches. The device's are kept, and compared after the epoch."""
    for _ in range(epochs):
        batches = list(there)
        for expected, found in zip(on_cpu, batches, strict=True):
            for a, b in zip(host(on_cpu.backend, expected), host(device, found), strict=True):
                if (a.dtype, a.shape) != (b.dtype, b.shape) or a.tobytes() != b.tobytes():
                    return False
    return not getattr(device.cupy, "faults", [])


def check(device, X, Y=None, **arguments):
    on_host = {name: value for name, value in arguments.items() if name != "feed"}
    assert agree(device, Loader(X, Y, backend="cpu", **on_host), Loader(X, Y, backend=device, **arguments))


# --- the same batches -----------------------------------------------------------------------------------------------

N = 61
RNG = np.random.default_rng(0)
X8, Y = RNG.integers(0, 256, (N, 7)).astype(np.uint8), RNG.integers(0, 10, N)
X32 = RNG.standard_normal((N, 3, 2)).astype(np.float32)
CASES = {
    "bytes": (X8, Y, {"scale": 1 / 255}),
    "as they are": (X32, Y, {}),
    "no labels": (X8, None, {}),
    "float64": (X32.astype(np.float64), Y.astype(np.float32), {"scale": 0.3}),
    "to float64": (X32, Y, {"dtype": "float64"}),
    "half": (X32.astype(np.float16), Y, {}),
    "booleans": (X8 > 100, Y.astype(np.int16), {}),
    "big-endian": (X8.astype(">i4"), Y.astype(">i8"), {"scale": 0.5}),
    "Fortran": (np.asfortranarray(X8), Y, {"scale": 0.5}),
    "strided": (X8[:, ::-2], Y[::-1], {}),
    "columns": (X8.T, Y, {"sample_axis": 1, "scale": 0.5}),
    "columns of C": (np.ascontiguousarray(X32[..., 0].T), Y, {"sample_axis": 1}),
    "in order": (X8, Y, {"shuffle": False}),
    "replacement": (X8, Y, {"replacement": True}),
    "weighted": (X8, Y, {"order": WeightedOrder(np.arange(N))}),
    "drop_last": (X8, Y, {"drop_last": True}),
    "rank": (X8, Y, {"rank": 1, "world_size": 3}),
    "one batch": (X8, Y, {"batch_size": N}),
    "one sample": (X8[:1], Y[:1], {}),
    "transform": (X8, Y, {"transform": lambda x: x * 2 + 1}),
    "transform of both": (X8, Y, {"transform": lambda x, y: (x[:, ::-1] * 2, y * y)}),
    "prepare and augment": (X8, Y, {"prepare": lambda x: x * 2, "augment": lambda x, y, draw: (x[::-1], y[::-1])}),
    "float64 of a function": (X8, Y, {"prepare": lambda x: x.astype(np.float64) / 3}),
    "window of arrays": (X8, Y, {"window": 20}),
    "no prefetch": (X8, Y, {"prefetch": 0}),
    "far ahead": (X8, Y, {"prefetch": 7}),
}


@pytest.mark.parametrize(
    ("feed", "threaded"), [("device", False), ("host", False), ("host", True)], indirect=["threaded"]
)
@pytest.mark.parametrize("case", CASES)
def test_arrays(case, feed, device, threaded):
    x, y, arguments = CASES[case]
    check(device, x, y, **{"batch_size": 8, "seed": 5, "feed": feed, **arguments})


SOURCES = {
    "a source": {},
    "at random": {"window": None},
    "in windows": {"window": 20},
    "in order": {"window": 20, "shuffle": False},
    "rank": {"window": 30, "rank": 1, "world_size": 2},
    "all ahead": {"prefetch": 9},
    "not ahead": {"prefetch": 0},
    "transform": {"window": 20, "transform": lambda x, y: (x + 1, y * 2)},
}


@pytest.mark.parametrize("case", SOURCES)
@pytest.mark.parametrize("labels", ["read", "array", "none"])
def test_sources(case, labels, device):
    arguments = {"batch_size": 8, "seed": 5, "scale": 0.5, **SOURCES[case]}
    if labels == "none" and "transform" in arguments:
        arguments["transform"] = lambda x: x + 1
    x = Samples(X8, Y, labels == "read", None if case == "a source" else 4)
    check(device, x, Y if labels == "array" else None, **arguments)


@pytest.mark.parametrize("feed", ["host", "device"])
@pytest.mark.parametrize("there", ["X", "Y", "XY"])
def test_arrays_that_are_there_already(there, feed, device, threaded):
    on_cpu = Loader(X8, Y, batch_size=8, scale=0.5, backend="cpu")
    x, y = (device.asarray(a) if name in there else a for name, a in (("X", X8), ("Y", Y)))
    mixed = Loader(x, y, batch_size=8, scale=0.5, backend=device, feed=feed)
    assert agree(device, on_cpu, mixed)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_numbers_that_are_there_as_they_are_wanted_are_gathered_by_the_kernel(dtype):
    device, X = queued_backend("late"), RNG.standard_normal((40, 3)).astype(dtype)
    X[0] = np.finfo(dtype).smallest_subnormal, -0.0, np.finfo(dtype).max
    there, here = (Loader(x, batch_size=8, backend=b) for x, b in ((device.asarray(X), device), (X, "cpu")))
    for x, expected in zip(there, here, strict=True):
        assert device.to_numpy(x).tobytes() == expected.tobytes()
    assert [name for name, *_ in device.cupy.launches] == ["gather"] * 5


def test_labels_that_are_there_already_of_samples_that_are_read(device):
    x = Samples(X8, Y, labelled=False)
    there = Loader(x, device.asarray(Y), batch_size=8, backend=device)
    assert agree(device, Loader(x, Y, batch_size=8, backend="cpu"), there)


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("dtype", ["uint8", ">i2", "<f4", ">f8"])
def test_files(dtype, window, device, tmp_path):
    np.save(tmp_path / "x.npy", X8.astype(dtype))
    np.save(tmp_path / "y.npy", Y.astype("<i4"))
    x, y = (gpubatch.sources.npy(tmp_path / f"{name}.npy") for name in "xy")
    for labels in (None, y, Y):
        check(device, x, labels, batch_size=8, window=window, scale=0.5)


def test_large_batches_are_gathered_by_several(device, threaded, monkeypatch):
    monkeypatch.setattr(gpubatch.loader.pinned, "PART", 16)
    monkeypatch.setattr(gpubatch.loader.pinned, "HELPERS", 3)
    check(device, X8, Y, batch_size=8, feed="host")
    assert not threads()


@drawn(5, 60, data=st.data())
def test_any_batches(data):
    draw = data.draw
    n = draw(st.integers(1, 90), "n")
    world_size = draw(st.integers(1, min(n, 4)), "world_size")
    shuffle = draw(st.booleans(), "shuffle")
    arguments = {
        "batch_size": draw(st.integers(1, 40), "batch_size"),
        "prefetch": draw(st.integers(0, 5), "prefetch"),
        "shuffle": shuffle,
        "replacement": shuffle and draw(st.booleans(), "replacement"),
        "seed": draw(st.integers(0, 9), "seed"),
        "world_size": world_size,
        "rank": draw(st.integers(0, world_size - 1), "rank"),
        "sample_axis": draw(st.integers(0, 1), "sample_axis"),
        "scale": draw(st.sampled_from([None, 0.5]), "scale"),
    }
    x = np.random.default_rng(n).integers(0, 256, (n, 5)).astype(draw(st.sampled_from(["uint8", "float32"]), "dtype"))
    x = x.T if arguments["sample_axis"] else x
    device = queued_backend(draw(st.sampled_from(list(TIMINGS)), "timing"))
    there = Loader(x, np.arange(n), backend=device, feed=draw(st.sampled_from(["host", "device"]), "feed"), **arguments)
    on_cpu = Loader(x, np.arange(n), backend="cpu", **arguments)
    left_at = draw(st.integers(0, len(there) - 1), "left at")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpubatch.loader.feeds, "WORTH_A_THREAD", draw(st.sampled_from([0, 1 << 60]), "worth a thread"))
        assert agree(device, on_cpu, there, 1)
        for loader in (on_cpu, there):  # leave it in the middle, and go on from there
            with contextlib.closing(iter(loader)) as iteration:
                for _ in range(left_at):
                    next(iteration)
            loader.load_state_dict(loader.state_dict())
        assert agree(device, on_cpu, there, 1)
    assert_nothing_is_left(device)


def test_batches_are_new_arrays_and_data_a_copy(device, threaded):
    for feed in ("host", "device"):
        there = Loader(X32, Y, batch_size=8, shuffle=False, backend=device, feed=feed)
        for x, y in there:
            x *= 0
            y *= 0
        assert agree(device, Loader(X32, Y, batch_size=8, shuffle=False, backend="cpu"), there)


def on_other_streams(device, feed):
    """Whether batches are right if each is made on another stream than the last one, twice."""
    on_cpu = Loader(X32, Y, batch_size=8, backend="cpu")
    there = Loader(X32, Y, batch_size=8, backend=device, feed=feed)
    good = []
    for _ in range(2):
        iteration, batches = iter(there), []
        with contextlib.closing(iteration):
            for number in range(len(there)):
                with device.current_stream() if number % 3 == 0 else device.stream() as stream:
                    batches.append((stream, next(iteration)))
        gc.collect()
        for (stream, batch), expected in zip(batches, on_cpu, strict=True):
            with stream:
                pairs = zip(host(device, batch), expected, strict=True)
                good.append(all(np.array_equal(a, b) for a, b in pairs))
    return all(good)


@every("feed", ["host", "device"], ["device"])
def test_each_batch_on_another_stream(feed, device, threaded):
    assert on_other_streams(device, feed)


@pytest.mark.parametrize("feed", ["host", "device"])
def test_the_first_batch_can_be_looked_at_at_any_time(feed, device):
    on_cpu, there = (Loader(X8, Y, batch_size=8, backend=backend, feed=feed) for backend in ("cpu", device))
    for _ in range(2):
        for a, b in zip(epochs_of(on_cpu).peek(), host(device, tuple(epochs_of(there).peek())), strict=True):
            assert np.array_equal(a, b)
        assert agree(device, on_cpu, there, 1)


NOISE = {"augment": lambda x, draw: x + draw.random(x.shape)}


@pytest.mark.parametrize(("source", "columns"), [("array", False), ("array", True), ("read", False), ("window", False)])
def test_random_numbers_depend_on_seed_epoch_and_batch_alone(source, columns, device, threaded):
    """On every feed, with and without a thread: those of batch 3 of epoch 1 are drawn anew from their key."""
    X = X8.T if columns else X8 if source == "array" else Samples(X8, Y, labelled=False)
    options = {
        "batch_size": 8,
        "seed": 5,
        "sample_axis": int(columns),
        **({"window": 20} if source == "window" else {}),
    }
    ahead, at_once = ({"prefetch": n, **options, **NOISE} for n in (3, 0))
    draws = [Loader(X, Y, backend="cpu", **a) for a in (ahead, at_once)]
    plain = Loader(X, Y, backend="cpu", **options)
    if hasattr(device.cupy, "faults"):  # CuPy's generators draw other numbers
        draws += [Loader(X, Y, backend=device, feed="host", **ahead)]
        draws += [Loader(X, Y, backend=device, feed="device", **ahead)] if source == "array" else []
    for epoch in range(2):
        for number, ((x, _), *augmented) in enumerate(zip(plain, *draws, strict=True)):
            generator = np.random.Philox(key=np.array([5, epoch], "u8"), counter=np.array([0, 0, number + 1, 0], "u8"))
            expected = (x + np.random.Generator(generator).random(x.shape)).astype("f4")
            for batch in augmented:
                assert host(get_backend("cpu") if isinstance(batch[0], np.ndarray) else device, batch)[0].tobytes() == (
                    expected.tobytes()
                )


def test_a_generator_is_the_library_s_own(device):
    kinds = set()
    for feed in ("host", "device"):
        augment = lambda x, draw: kinds.add(type(draw)) or x  # noqa: E731
        list(Loader(X8, batch_size=8, augment=augment, backend=device, feed=feed))
    assert len(kinds) == 1
    if not hasattr(device.cupy, "faults"):
        assert kinds == {device.cupy.random.Generator}


def test_a_transform_runs_in_the_caller(device, threaded):
    seen = []

    def note(x):
        assert device.owns(x)
        seen.append(threading.current_thread())
        return x

    for feed in ("host", "device"):
        list(Loader(X8, batch_size=8, transform=note, backend=device, feed=feed))
    assert seen == [threading.main_thread()] * 16


def test_other_samples_become_batches_and_values_are_checked(device):
    there = Loader(X8, batch_size=8, scale=0.5, backend=device)
    for x in (X8, device.asarray(X8)):
        assert np.array_equal(device.to_numpy(there.to_batch(x)), X8 * np.float32(0.5))
    bad = X32[..., 0].copy()
    bad[5, 1] = np.inf
    for x in (bad, device.asarray(bad)):
        with pytest.raises(NonFiniteError, match=r"X\[5, 1\] is inf"):
            Loader(x, backend=device)


@pytest.mark.parametrize("feed", ["host", "device"])
def test_a_training_run_follows_the_cpu(feed, device):
    histories = []
    for backend in ("cpu", device):
        net = gb.mlp([7, 16, 10], backend=backend, seed=1)
        loader = Loader(X8, Y, batch_size=8, scale=1 / 255, backend=backend, feed=feed)
        opt = gb.SGD(net.parameters, 0.1)
        histories.append(gb.fit(net, loader, opt, epochs=2, validation=(X8, Y), progress=False).to_dict())
    for name in ("step_loss", "validation_loss"):
        np.testing.assert_allclose(histories[1][name], histories[0][name], rtol=1e-5)


@pytest.mark.parametrize("first_on", ["cpu", "the device"])
def test_a_run_goes_on_from_a_checkpoint_of_the_other_backend(first_on, device, tmp_path):
    """In the middle of an epoch, with dropout and running statistics: equal to the run that stayed on the CPU."""

    def run(backend, epochs, **options):
        net = gb.mlp([7, 16, 10], batch_norm=True, dropout=0.2, backend=backend, dtype="float64", seed=1)
        loader = Loader(X8, Y, batch_size=8, scale=1 / 255, backend=backend, dtype="float64")
        opt = gb.Adam(net.parameters, gb.ExponentialDecay(0.01, 0.9, per="step"))
        history = gb.fit(net, loader, opt, epochs, progress=False, **options)
        return history, [backend.to_numpy(views.flat) for views in (net.parameters, net.buffers, *opt.state.values())]

    def leave(state):
        if state.step == len(state.loader) + 3:
            raise gb.StopTraining

    class Leave:
        on_step = staticmethod(leave)

    cpu = get_backend("cpu")
    first, second = (cpu, device) if first_on == "cpu" else (device, cpu)
    expected, arrays = run(cpu, 3)
    run(first, 3, checkpoint=tmp_path, callbacks=[Leave()])
    history, found = run(second, 3, checkpoint=tmp_path, resume=True)
    np.testing.assert_allclose(history.step_loss, expected.step_loss, rtol=1e-9)
    for array, values in zip(found, arrays, strict=True):
        np.testing.assert_allclose(array, values, rtol=1e-6, atol=1e-9)


def test_data_that_was_moved_on_one_stream_is_there_for_every_stream(device):
    on_cpu, there = (Loader(X32, Y, batch_size=8, backend=backend, feed="device") for backend in ("cpu", device))
    for loader in (on_cpu, there):
        next(iter(loader))
    with device.stream():
        assert agree(device, on_cpu, there, 1)


# --- faults ---------------------------------------------------------------------------------------------------------


def kept(device, seed=0):
    loaders = [Loader(X8, Y, batch_size=8, seed=seed, backend=backend, feed="host") for backend in ("cpu", device)]
    return agree(device, *loaders)


def left(device):
    for number, _ in enumerate(Loader(X8, Y, batch_size=8, backend=device, feed="host")):
        if number == 2:
            break
    device.synchronize()
    return not device.cupy.faults


# Waits removed from the way of a batch: which, when, and the use of the loader that shows it.
FAULTS = {
    "the consumer's stream does not wait for the copy": (Stream, "wait_event", lambda s, e: s is s.cupy.null, kept),
    "the copy does not wait for the conversion before": (Stream, "wait_event", lambda s, e: s is not s.cupy.null, kept),
    "nobody waits before pinned memory is filled again": (Event, "synchronize", lambda e: True, kept),
    "memory of the pool is written before it is free": (Stream, "record", lambda s, e: e.ticket is None, kept),
    "pinned memory is given back before it is copied": (Stream, "synchronize", lambda s: s is not s.cupy.null, left),
    "memory goes back to the pool before it is used": (
        *(Stream, "wait_event", lambda s, e: s is s.cupy.null),
        lambda device: on_other_streams(device, "host"),
    ),
    "another stream does not wait for the order": (
        *(Stream, "wait_event", lambda s, e: s is not s.cupy.null),
        lambda device: on_other_streams(device, "device"),
    ),
    "the order goes back to the pool before it is used": (
        *(Stream, "wait_event", lambda s, e: s is s.cupy.null),
        lambda device: on_other_streams(device, "device"),
    ),
}


@every("fault", [*FAULTS], [*FAULTS][:2])
def test_every_wait_is_needed(fault, monkeypatch):
    owner, method, when, use = FAULTS[fault]
    assert all(use(queued_backend(timing)) for timing in TIMINGS)
    original = getattr(owner, method)
    monkeypatch.setattr(owner, method, lambda *a: None if when(*a) else original(*a))
    assert not all(use(queued_backend(timing)) for timing in TIMINGS)


# --- where the data is ----------------------------------------------------------------------------------------------


def test_data_moves_once_and_batches_copy_nothing(threaded):
    device = queued_backend("late")
    there = Loader(X8, Y, batch_size=8, backend=device)
    assert there.feeding == "not decided before the first iteration"
    assert device.cupy.copies == []
    order = 8 * N
    for copies in ([X8.nbytes, Y.nbytes, order], [order], [order]):
        device.cupy.copies.clear()
        list(there)
        assert device.cupy.copies == copies
        assert there.stats.bytes_copied == sum(copies)
        assert there.stats.bytes_read == X8.nbytes + Y.nbytes
    assert there.feeding.startswith("batches are gathered on cuda:99, where 915 bytes of data were copied")
    assert not threads()


def test_a_batch_is_copied_as_it_is_stored():
    device = queued_backend("late")
    there = Loader(X8, Y, batch_size=8, backend=device, feed="host")
    list(there)
    full, last = [8 * 7, 8 * 8], [5 * 7, 5 * 8]
    assert device.cupy.copies == [*full * 7, *last]
    assert there.stats.bytes_copied == X8.nbytes + Y.nbytes
    assert there.feeding == "batches go to cuda:99 through pinned memory, since feed='host' was given"


@pytest.mark.parametrize("prefetch", [0, 1, 2, 5])
def test_memory_of_the_way(prefetch, threaded):
    device = queued_backend("late")
    there = Loader(X8, Y, batch_size=8, backend=device, feed="host", prefetch=prefetch)
    slots = 1 + max(1, prefetch if threaded else 0)
    for x, _ in there:
        assert len(device.cupy.pinned) == 2 * slots
        if len(x) == 8:
            assert device.cupy.used == sum(there.plan.parts.values())
            assert device.cupy.used == slots * (8 * 7 + 8 * 8) + 8 * 7 * 4 + 8 * 8
    del x, _
    device.synchronize()
    assert device.cupy.used == 0


def test_memory_of_data_that_was_moved():
    device = queued_backend("late")
    there = Loader(X8, Y, batch_size=8, scale=0.5, backend=device)
    for x, _ in there:
        if len(x) == 8:
            assert device.cupy.used == sum(there.plan.parts.values())
            assert device.cupy.used == X8.nbytes + Y.nbytes + 8 * N + 8 * 7 * 4 + 8 * 8


def test_data_that_was_moved_does_not_count_twice():
    """The plan has its bytes, so they no longer count as used by others."""
    device = queued_backend("early", available=6000)
    loader = Loader(X8, Y, batch_size="auto", scale=0.5, backend=device, feed="device")
    before = epochs_of(loader).replan(lambda n: {"a model": 30 * n})
    list(loader)
    assert device.cupy.used >= X8.nbytes + Y.nbytes
    after = epochs_of(loader).replan(lambda n: {"a model": 30 * n})
    assert after.batch_size == before.batch_size
    assert after.available == 6000 - device.cupy.used + X8.nbytes + Y.nbytes


# available, needed by the plan, whether it counts a model, feed -> whether the data moves, which with its order is 1403
PLACES = [
    (2800, 0, False, "auto", False),
    (2 * 1559, 0, False, "auto", True),  # 1559 is the smallest number whose 90 % are at least 1403
    (2 * 1558, 0, False, "auto", False),
    (1559, 0, True, "auto", True),
    (1558, 0, True, "auto", False),
    (1559, 1, True, "auto", False),
    (10_000, 7597, True, "auto", True),
    (10_000, 7598, True, "auto", False),
    (1403, 1402, True, "device", True),
    (10**9, 0, True, "host", False),
]


@pytest.mark.parametrize(("available", "needed", "counted", "feed", "expected"), PLACES)
def test_what_fits_moves(available, needed, counted, feed, expected):
    columns = Columns(X8, Y, backend=queued_backend("late", available))
    moves, words = belongs_on_device(columns, feed, N, needed, available, counted)
    assert moves == expected
    assert words.startswith("batches are gathered on cuda:99" if moves else "batches go to cuda:99 through pinned mem")
    if feed == "auto":
        assert ("at most 90 % of the" if moves else "more than 90 % of the") in words
        assert ("half of what is available" in words) == (not counted)


def test_memory_that_others_took_since_the_plan_counts():
    for available in (2000, 1000):
        columns = Columns(X8, backend=queued_backend("late", available))
        assert belongs_on_device(columns, "auto", N, 0, 10**6, True)[0] == (available == 2000)


@pytest.mark.parametrize("kept", [0, 2])
@pytest.mark.parametrize(
    "options",
    [{}, {"feed": "host"}, {"feed": "device"}, {"transform": lambda x: x}, {"given": "there"}, {"available": 3000}],
    ids=["auto", "host", "device", "transformed", "given", "short of memory"],
)
def test_the_plan_decides_where_the_data_will_be_as_the_first_iteration_does(options, kept):
    """It also counts the memory of steps that gather their batches themselves, or receive them."""
    options = dict(options)
    device = queued_backend("late", options.pop("available", 1 << 30))
    given = options.pop("given", "here")
    X, labels = (device.asarray(a) if given == "there" else a for a in (X8, Y))
    loader = Loader(X, labels, batch_size=8, scale=0.5, backend=device, **options)
    epochs_of(loader).replan(lambda n: {"a model": 100 * n}, kept=kept)
    planned = loader.plan
    gathers = epochs_of(loader).device_feed() is not None
    list(loader)
    moves = loader.feeding.startswith("batches are gathered on")
    assert gathers == (moves and loader.transform is None)
    assert loader.plan == planned
    assert loader.plan.parts == planned.parts
    there = {"data": X8.nbytes + Y.nbytes if given == "here" else 0, "order of an epoch": 8 * N}
    here = {"buffers of batches": 2 * (8 * 7 + 8 * 8)}
    converted = 8 * 7 * 4 + 8 * 8
    assert planned.parts == {
        "a model": 800,
        **(there if moves else here),
        "batches": converted * (1 if gathers else 1 + kept),
        "conversion of a batch": converted if loader.transform is not None else 0,
    }
    assert moves == (options.get("feed") != "host" and device.cupy.available > 3000)


def test_a_plan_says_where_the_data_is_after_memory_has_become_less(monkeypatch):
    device = queued_backend("late", 10_000)
    loader = Loader(X8, Y, batch_size=8, backend=device)
    assert "data" in loader.plan.parts
    taken = device.empty(9_000, np.uint8)
    list(loader)
    assert loader.feeding.startswith("batches go to cuda:99 through pinned memory")
    assert "data" not in loader.plan.parts
    assert sum(loader.plan.parts.values()) == loader.plan.needed
    del taken


@pytest.mark.parametrize("feed", ["auto", "device"])
def test_a_copy_that_fails_is_an_end_only_where_it_was_asked_for(feed, monkeypatch):
    device = queued_backend("late")
    there = Loader(X8, Y, batch_size=8, backend=device, feed=feed)
    original = gpubatch.loader.feeds.copy_to_device

    def full(array, backend):
        if array.ndim == 1:  # that of Y
            raise MemoryError("out of memory")
        return original(array, backend)

    monkeypatch.setattr(gpubatch.loader.feeds, "copy_to_device", full)
    if feed == "device":
        with pytest.raises(MemoryError, match="out of memory"):
            next(iter(there))
        monkeypatch.undo()
    assert agree(device, Loader(X8, Y, batch_size=8, seed=0, backend="cpu"), there)
    assert there.feeding.startswith("batches go to" if feed == "auto" else "batches are gathered on")


def test_a_model_that_is_planned_for_counts(monkeypatch):
    there = Loader(X8, Y, batch_size=8, backend=queued_backend("late", 10_000))
    epochs_of(there).replan(lambda batch_size: {"model": 9_000})
    list(there)
    assert there.feeding.startswith("batches go to cuda:99 through pinned memory, since 915 bytes of data are with")
    assert "half" not in there.feeding


@pytest.mark.parametrize("backend", ["cpu", "cuda"])
def test_what_is_read_cannot_be_moved(backend):
    with pytest.raises(ArgumentError, match=r"feed='device' needs arrays, .*; X \(Samples\) is read"):
        Loader(Samples(X8, Y), backend="cpu" if backend == "cpu" else queued_backend("late"), feed="device")


def test_what_does_not_fit_cannot_be_moved():
    there = Loader(X8, Y, batch_size=8, backend=queued_backend("late", 1402), feed="device")
    with pytest.raises(InsufficientMemoryError, match=r"feed='device' needs 1\.4 KiB on cuda:99 .* got 1\.4 KiB avail"):
        next(iter(there))


def test_feed_is_checked():
    with pytest.raises(ArgumentError, match="feed must be one of 'auto', 'device', 'host', got 'gpu'"):
        Loader(X8, feed="gpu", backend="cpu")


def test_on_the_cpu_all_is_there():
    for feed in ("auto", "device", "host"):
        loader = Loader(X8, feed=feed, backend="cpu")
        list(loader)
        assert loader.feeding == "in main memory"
        assert loader.stats.bytes_copied == 0


# --- nothing is left behind -----------------------------------------------------------------------------------------


def assert_nothing_is_left(device):
    assert not threads()
    if isinstance(device.cupy, QueuedStandIn):
        device.synchronize()  # run the queues, which hold the last references to events
        gc.collect()
        assert not device.cupy.pinned
        assert not device.cupy.events
        assert set(device.cupy.streams) == {device.cupy.null}
        assert not device.cupy.faults


def leave_by_break(loader):
    for number, _ in enumerate(loader):
        if number == 2:
            break


def leave_by_exception(loader):
    with contextlib.suppress(ZeroDivisionError):
        for _ in loader:
            raise ZeroDivisionError


def leave_by_interrupt(loader):
    iteration = iter(loader)
    next(iteration)
    with contextlib.suppress(KeyboardInterrupt):
        iteration.throw(KeyboardInterrupt)


def leave_by_the_end(loader):
    assert len(list(loader)) == len(loader)


def leave_before_the_first_batch(loader):
    iter(loader).close()


def leave_to_the_garbage_collector(loader):
    holder = [iter(loader)]
    next(holder[0])
    holder.append(holder)  # a cycle: no reference count will free it
    del holder
    gc.collect()


LEAVES = [
    *(leave_by_break, leave_by_exception, leave_by_interrupt, leave_by_the_end),
    *(leave_before_the_first_batch, leave_to_the_garbage_collector),
]


@every("feed", ["host", "device"], ["device"])
@every("leave", {leave.__name__: leave for leave in LEAVES}, ["leave_by_break", "leave_to_the_garbage_collector"])
def test_nothing_is_left(leave, feed, device, threaded):
    loader = Loader(X8, Y, batch_size=4, backend=device, feed=feed)
    for _ in range(2):
        leave(loader)
        assert_nothing_is_left(device)


def test_an_exception_while_reading_surfaces_at_its_batch(device):
    class Failing(Samples):
        def read(self, indices):
            if 37 in indices:
                raise OSError("unreadable sector")
            return Samples.read(self, indices)

    bad = gpubatch.loader.epoch_order(N, 0, 0).tolist().index(37) // 8
    loader = Loader(Failing(X8, Y), batch_size=8, backend=device)
    iteration = iter(loader)
    for _ in range(bad):
        next(iteration)
    with pytest.raises(OSError, match="unreadable sector") as caught:
        next(iteration)
    assert "in read\n" in "".join(traceback.format_exception(caught.value))
    assert loader.state_dict()["batch"] == bad
    assert not threads()
    del caught  # its frames have arrays in pinned memory
    assert_nothing_is_left(device)


def test_those_who_gather_are_gone_while_an_exception_is_kept(monkeypatch, threaded):
    monkeypatch.setattr(gpubatch.loader.pinned, "PART", 16)
    monkeypatch.setattr(gpubatch.loader.pinned, "HELPERS", 3)

    def broken(*_):
        assert any(thread.name.startswith("gpubatch-gather") for thread in threads())
        raise OSError("the bus is broken")

    monkeypatch.setattr(gpubatch.loader.pinned.Ring, "send", broken)
    with pytest.raises(OSError, match="the bus is broken") as caught:
        next(iter(Loader(X8, Y, batch_size=8, backend=queued_backend("late"), feed="host")))
    assert not threads()
    del caught


def test_out_of_memory_on_the_device_surfaces(monkeypatch, threaded):
    device = queued_backend("late")
    loader = Loader(X8, Y, batch_size=8, backend=device, feed="host")
    iteration = iter(loader)
    next(iteration)

    def full(*_):
        raise MemoryError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(device.cupy, "empty", full)
        with pytest.raises(MemoryError, match="out of memory"):
            next(iteration)
    assert not device.cupy.pinned
    assert kept(device, seed=1)


def test_a_forked_child_leaves_the_device_alone(monkeypatch):
    device = queued_backend("late")
    for feed in ("host", "device"):
        iteration = iter(Loader(X8, Y, batch_size=8, backend=device, feed=feed))
        next(iteration)
        with monkeypatch.context() as patch:
            patch.setattr(os, "getpid", lambda: 0)
            for method in ("synchronize", "wait_event"):
                patch.setattr(Stream, method, lambda *_: pytest.fail("the child used the device"))
            iteration.close()


ENDING = """
import atexit, sys

sys.path.insert(0, sys.argv[1])
import numpy as np
from stand_in import Stream, queued_backend
import gpubatch.loader.feeds

def gone(*_):
    raise RuntimeError("the driver is gone")

def end():
    Stream.synchronize = Stream.wait_event = Stream.record = gone

atexit.register(end)  # handlers run in reverse order, as gpubatch's before CuPy's
gpubatch.loader.feeds.WORTH_A_THREAD = int(sys.argv[3])
loader = gpubatch.Loader(np.zeros((100, 4), np.uint8), batch_size=8, backend=queued_backend("late"), feed=sys.argv[2])
iteration = iter(loader)
next(iteration)
"""


@pytest.mark.parametrize("worth_a_thread", [0, 1 << 60])
@pytest.mark.parametrize("feed", ["host", "device"])
def test_a_process_ends_in_the_middle(feed, worth_a_thread):
    command = [sys.executable, "-c", ENDING, str(Path(__file__).parent), feed, str(worth_a_thread)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


# --- bench/feeding.py -----------------------------------------------------------------------------------------------


def test_the_bench_of_the_cpu_runs(tmp_path):
    command = [sys.executable, str(BENCH), "--batches", "5", "--out", str(tmp_path / "result.json")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "result.json").read_text())["cpu"]
    assert len(rows) == 4
    assert all(0 < row["waited"] < 1 for row in rows)


@pytest.mark.exhaustive
def test_the_bench_of_a_gpu_runs(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH.parent))  # as where it is run as a script
    bench = runpy.run_path(str(BENCH))
    device = queued_backend("early")
    rows = bench["through_pinned_memory"](device, 128, 6, 10)
    rows += [bench["gathered_on_the_device"](device, dtype, 64, 6) for dtype in ("uint8", "float32")]
    assert [row["work"] for row in rows] == [
        "batches of 2 x 6 uint8 through pinned memory",
        "batches of 2 x 6 uint8 through pinned memory and as much compute",
        "batches of 8 x 6 uint8 gathered on the device",
        "batches of 8 x 6 float32 gathered on the device",
    ]
    assert all(row["seconds"]["gpubatch"]["median"] > 0 for row in rows)
    assert [row["asked"]["share"] for row in rows] == [0.85, 0.9, 0.8, 0.8]
