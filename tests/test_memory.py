"""The memory plan against what is then measured: NumPy's allocations, memory of the process, and CuPy's pool."""

from __future__ import annotations

import gc
import itertools
import json
import os
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from families import every
from needs import missing

import gpubatch as gb
from gpubatch.nn import OF_LABELS, Context, Needs, core_of
from gpubatch.sizing import BatchPlan
from gpubatch.train import plan_batches, short_runs
from gpubatch.train.validation import InMemory

HELD_OUT = 1500
AHEAD = 2  # batches, by default
Stack = Callable[[int, int], list[gb.Layer]]


class Case(NamedTuple):
    """A network for ``features``, and its training; tens of megabytes, so that 2 % are more than details."""

    layers: Stack
    features: int = 784
    outputs: int = 10
    loss: str = "softmax_cross_entropy"
    l2: float = 0.0
    dtype: str = "float32"
    stored: str = "uint8"
    optimizer: Callable[..., gb.Optimizer] = gb.Adam
    batch_size: int | str = 256
    n: int = 600
    source: str = "array"
    paced: bool = False
    loader: dict[str, Any] = {}  # noqa: RUF012  never changed


class Pace(gb.Layer):
    """A layer that waits until a thread has prepared all allowed batches, as in a slow step."""

    def __init__(self, loader_length: int) -> None:
        self.length, self.prepared, self.steps, self.news = loader_length, 0, 0, threading.Condition()

    def transform(self, x: Any, draw: Any) -> Any:
        found = x - 1
        with self.news:
            self.prepared += 1
            self.news.notify()
        return found

    def takes(self) -> None:
        pass

    def needs(self, features: int) -> Needs:
        return Needs(features, reads=(), in_place=True)

    def forward(self, x: Any, y: Any, c: Context) -> None:
        y[...] = x
        if c.mode.training and c.backend.name == "cpu":  # on a GPU nothing of a batch is there before its turn
            epoch, batch = divmod(self.steps, self.length)
            wanted = epoch * self.length + min(batch + 1 + AHEAD, self.length)
            with self.news:
                assert self.news.wait_for(lambda: self.prepared >= wanted, timeout=60)
            self.steps += 1

    def backward(self, x: Any, y: Any, dy: Any, dx: Any, c: Context) -> None:
        pass


def wide(features: int, outputs: int) -> list[gb.Layer]:
    return [gb.Dense(features, 1500), gb.ReLU(), gb.Dense(1500, outputs)]


def deep(features: int, outputs: int) -> list[gb.Layer]:
    widths = [features, *[300] * 8]
    hidden = [[gb.Dense(a, b), gb.GELU()] for a, b in itertools.pairwise(widths)]
    return [*itertools.chain.from_iterable(hidden), gb.Dense(300, outputs)]


def everything(features: int, outputs: int) -> list[gb.Layer]:
    hidden = [
        [gb.Dense(a, 300), gb.BatchNorm(300), kind(), gb.Dropout(0.2)]
        for a, kind in [(features, gb.ReLU), (300, gb.Tanh), (300, gb.GELU), (300, gb.LeakyReLU)]
    ]
    return [*itertools.chain.from_iterable(hidden), gb.Dense(300, outputs)]


def linear(features: int, outputs: int) -> list[gb.Layer]:
    return [gb.Dense(features, outputs)]


CASES = {
    "wide": Case(wide),
    "wide, few samples at a time": Case(wide, batch_size=8, n=20),
    "deep": Case(deep, batch_size=1024, n=2500),
    "everything": Case(everything, l2=1e-4, batch_size=1024, n=2500),
    "linear": Case(linear, 3072, 1000, optimizer=lambda p: gb.SGD(p, 0.01)),
    "sigmoid": Case(wide, 300, 200, "sigmoid_cross_entropy", batch_size=1024, n=2500, stored="float32"),
    "mse": Case(wide, 300, 200, "mse", batch_size=1024, n=2500, stored="float32"),
    "svm": Case(wide, loss="svm", stored="float64", l2=0.1),
    "crammer_singer": Case(wide, loss="crammer_singer", stored="float64"),
    "softmax_focal": Case(wide, loss="softmax_focal", stored="float64"),
    "float64": Case(everything, dtype="float64", batch_size=512, n=1200),
    "momentum": Case(wide, optimizer=lambda p: gb.Momentum(p, 0.01)),
    "three states": Case(wide, optimizer=lambda p: gb.RMSProp(p, centered=True, momentum=0.9)),
    "amsgrad": Case(wide, optimizer=lambda p: gb.Adam(p, amsgrad=True)),
    "many samples": Case(linear, 8, n=700_000, batch_size=4096),
    "drawn": Case(linear, 8, n=1_040_000, batch_size=4096, loader={"replacement": True}),
    "in order": Case(
        linear, 512, n=20_480, batch_size=4096, stored="float32", loader={"shuffle": False, "prefetch": 0}
    ),
    "a thread": Case(wide, 1024, batch_size=1250, n=6000, paced=True),
    "no thread": Case(wide, 1024, batch_size=1250, n=6000, loader={"prefetch": 0}),
    "columns": Case(wide, 1024, batch_size=1250, n=6000, loader={"prefetch": 0, "sample_axis": 1}),
    "strided": Case(wide, 1024, batch_size=1250, n=6000, source="strided", loader={"prefetch": 0}),
    "transformed": Case(wide, 1024, batch_size=1250, n=6000, loader={"prefetch": 0, "transform": lambda x: x - 1}),
    "augmented": Case(
        wide,
        1024,
        batch_size=1250,
        n=6000,
        loader={"prefetch": 0, "prepare": lambda x: x - 1, "augment": lambda x, draw: x + 1},
    ),
    "a rank": Case(linear, 8, n=700_000, batch_size=4096, loader={"rank": 1, "world_size": 2}),
    "whole": Case(deep, batch_size="auto", n=1500, loader={"prefetch": 0}),
    "read": Case(linear, 2048, batch_size=600, n=2500, source="npy", stored="float64", loader={"prefetch": 0}),
    "read in a thread": Case(linear, 2048, batch_size=600, n=2500, source="npy", paced=True),
    "read as it is": Case(wide, batch_size=600, n=2500, source="npy", stored="float32", loader={"prefetch": 0}),
    "large": Case(
        lambda n, m: [gb.Dense(n, 2500), gb.GELU(), gb.Dense(2500, 2500), gb.BatchNorm(2500), *wide(2500, m)]
    ),
    "weights": Case(wide, loader={"class_weight": "balanced", "weight": np.linspace(0, 1, 600)}),
    "drawn by weights": Case(
        linear, 8, n=700_000, batch_size=4096, loader={"order": gb.WeightedOrder(np.ones(700_000))}
    ),
    "a window": Case(wide, source="npy", loader={"window": "3 MB"}, n=6000),
}


def samples(case: Case, n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    if case.stored == "uint8":
        X = rng.integers(0, 256, (n, case.features), np.uint8)
    else:
        X = rng.random((n, case.features), np.float32).astype(case.stored)
    Y = rng.integers(0, case.outputs, n) if case.loss in OF_LABELS else rng.random((n, case.outputs), np.float32)
    return X, Y


def train(case: Case, X: Any, Y: Any, held_out: Any, backend: Any = "cpu") -> tuple[BatchPlan, int]:
    """The plan, made before the first step, and how many epochs were run."""
    scale = 0.01 if case.stored == "uint8" else None
    layers, options = case.layers(case.features, case.outputs), case.loader
    if case.paced:
        pace = Pace(-(-case.n // int(case.batch_size)))
        layers, options = [pace, *layers], {"augment": pace.transform}
    net = gb.Network(layers, case.loss, case.l2, backend, case.dtype)
    loader = gb.Loader(X, Y, case.batch_size, backend=backend, dtype=case.dtype, scale=scale, **options)
    opt = case.optimizer(net.parameters)
    # What is on the device already, as the labels are then, is not copied.
    copied = held_out[0].size * net.dtype.itemsize if case.stored != case.dtype or net.backend.name == "cuda" else 0
    plan_batches(net, loader, opt, InMemory(*held_out, {}, copied))
    plan = loader.plan
    assert core_of(net).planned == 0  # nothing is allocated for it
    history = gb.fit(net, loader, opt, 2, validation=held_out, progress=False)
    return plan, len(history.validation_loss)


def warm_up(backend: Any = "cpu") -> None:
    """Let everything be done that is done once in a process: imports, kernels, the registers of formulas."""
    for changed in ({}, {"loss": "mse"}, {"loss": "sigmoid_cross_entropy"}, {"dtype": "float64"}):
        case = Case(everything, 5, n=50, batch_size=20, **changed)
        train(case, *arrays_of(case, Path()), backend)


def arrays_of(case: Case, folder: Path) -> tuple[Any, ...]:
    rng = np.random.default_rng(0)
    X, Y = samples(case, case.n, rng)
    Xv, Yv = samples(case, HELD_OUT, rng)
    if case.loader.get("sample_axis"):
        X, Xv = np.ascontiguousarray(X.T), np.ascontiguousarray(Xv.T)
    if case.source == "strided":
        X = np.asfortranarray(X)
    if case.source == "npy":
        np.save(folder / "X.npy", X)
        return gb.sources.npy(folder / "X.npy"), Y, (Xv, Yv)
    return X, Y, (Xv, Yv)


@every("name", [*CASES], ["everything", "sigmoid", "three states", "many samples", "a thread", "transformed"])
def test_the_plan_is_what_numpy_is_asked_for(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    arguments = arrays_of(case, tmp_path)
    warm_up()
    gc.collect()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        plan, epochs = train(case, *arguments)
        peak = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    assert epochs == 2
    assert sum(plan.parts.values()) == plan.needed > 9e6
    assert plan.needed == pytest.approx(peak, rel=0.02), f"{peak} measured:\n{plan}"


# The parts that differ, and the changed setting.
CHANGES: list[tuple[set[str], dict[str, Any]]] = [
    (set(), {"optimizer": gb.AdamW}),
    (set(), {"loader": {"seed": 5}}),
    ({"optimizer state m", "optimizer state v", "optimizer state s"}, {"optimizer": gb.Adagrad}),
    ({"workspace of a step", "batches"}, {"batch_size": 100}),
    ({"workspace of a step", "workspace of evaluation"}, {"loss": "svm"}),
    ({"conversion of a batch"}, {"loader": {"transform": lambda x: x}}),
]


def test_the_parts_are_each_their_own() -> None:
    """Some parts are computed by hand; a setting changes only its own part."""

    def parts(**changed: Any) -> dict[str, int]:
        case = Case(wide, n=700, stored="float32", **changed)
        X, Y = samples(case, case.n, np.random.default_rng(0))
        net = gb.Network(case.layers(784, 10), case.loss, case.l2, "cpu", case.dtype)
        loader = gb.Loader(X, Y, case.batch_size, backend="cpu", dtype=case.dtype, **case.loader)
        plan_batches(net, loader, case.optimizer(net.parameters), InMemory(X[:100], Y[:100], {}, 12345))
        return dict(loader.plan.parts)

    usual, size = parts(), (784 + 1) * 1500 + (1500 + 1) * 10
    assert usual["parameters"] == usual["gradients"] == usual["optimizer state m"] == 4 * size
    assert usual["validation set"] == 12345
    assert usual["order of an epoch"] == 8 * 700
    assert usual["batches"] == 256 * (4 * 784 + 8)
    for names, changed in CHANGES:
        found = parts(**changed)
        assert {name for name in {*found, *usual} if found.get(name) != usual.get(name)} == names


CHILD = """
import ctypes, gc, json, sys
from pathlib import Path
import numpy as np
from test_memory import CASES, arrays_of, train, warm_up
from gpubatch.sizing import _resident

case = CASES["large"]
warm_up()
a = np.ones((2500, 2500), np.float32)
a @ a, a.T @ a, a @ a.T  # BLAS keeps its scratch
del a
arguments = arrays_of(case, Path())
gc.collect()
ctypes.CDLL(None).malloc_trim(0)
Path("/proc/self/clear_refs").write_text("5")
before = _resident("VmRSS")
plan, epochs = train(case, *arguments)
print(json.dumps([plan.needed, _resident("VmHWM") - before, epochs]))
"""


def test_the_plan_is_what_the_process_takes() -> None:
    if not Path("/proc/self/clear_refs").exists() or not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("only Linux tells the memory of a process at its peak, and may be told to begin a new one")
    # Large arrays get their own memory maps: memory that glibc keeps in its heap is not in the plan.
    env = {
        **os.environ,
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
    }
    done = subprocess.run([sys.executable, "-c", CHILD], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    needed, peak, epochs = json.loads(done.stdout)
    assert epochs == 2
    assert needed > 150e6
    assert needed == pytest.approx(peak, rel=0.02)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_the_plan_is_what_the_pool_gives(name: str, tmp_path: Path) -> None:
    if "cuda:0" not in gb.available_backends():
        missing("gpu", "no CUDA device can be used here")
    case, backend = CASES[name], gb.get_backend("cuda:0")

    class Most(backend.cupy.cuda.MemoryHook):  # type: ignore[attr-defined, name-defined, misc]
        name, now, most = "most", 0, 0

        def malloc_postprocess(self, *, mem_size: int, **rest: int) -> None:
            self.now += mem_size
            self.most = max(self.most, self.now)

        def free_postprocess(self, *, mem_size: int, **rest: int) -> None:
            self.now -= mem_size

    X, Y, (Xv, Yv) = arrays_of(case, tmp_path)
    held_out = Xv, backend.asarray(Yv)  # the labels are on the device before
    warm_up(backend)
    gc.collect()
    with Most() as pool:
        plan, epochs = train(case, X, Y, held_out, backend)
    assert epochs == 2
    assert plan.needed == pytest.approx(pool.most, rel=0.02), f"{pool.most} measured:\n{plan}"


def test_copies_for_a_checkpoint_in_the_background_are_planned(tmp_path: Path) -> None:
    """They are there once, however soon the next checkpoint is due; without them nothing is planned."""
    parts, peaks = list[dict[str, int]](), list[int]()
    for background in (False, True):
        net = gb.Network([gb.Dense(1000, 1000)], "mse", backend="cpu", seed=0)
        opt = gb.Adam(net.parameters)
        loader = gb.Loader(np.zeros((32, 1000), np.float32), np.zeros((32, 1000), np.float32), 4, backend="cpu")
        store = gb.Checkpoints(tmp_path / str(background), every=1, keep=1, background=background)
        tracemalloc.start()
        try:
            with short_runs():
                gb.fit(net, loader, opt, 1, checkpoint=store, progress=False)
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
        parts.append(dict(loader.plan.parts))
    planned = parts[1].pop("copies for a checkpoint in the background")
    assert parts[0] == parts[1]
    assert planned == 3 * net.parameters.flat.nbytes
    assert peaks[1] - peaks[0] == pytest.approx(planned, rel=0.05)
