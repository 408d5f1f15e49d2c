"""Captured steps: replayed they are the eager ones bit for bit, whatever happens, on streams that choose badly."""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import inspect
import itertools
import os
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import emulated_gpu
import numpy as np
import pytest
from families import every
from hypothesis import given, strategies as st
from needs import missing
from stand_in import TIMINGS, QueuedStandIn, found_by_its_arrays, queued_backend
from stand_in_lt import StandInLt

import gpubatch as gb
from gpubatch import own
from gpubatch.backend import CudaBackend
from gpubatch.loader import rows_of
from gpubatch.nn import OF_LABELS, core_of, losses
from gpubatch.ops.products import products_for
from gpubatch.own import changed
from gpubatch.train import graphs, ledger
from gpubatch.train.checks import APART, scale_for
from gpubatch.train.eager import EagerSteps
from gpubatch.train.record import Record

N, FEATURES, CLASSES = 38, 12, 5


def stand_in(timing: str) -> CudaBackend:
    device = queued_backend(timing)
    device.cupy.nvmath = StandInLt(device.cupy)
    return device


def gpu() -> CudaBackend:
    if "cuda:0" not in gb.available_backends():
        missing("gpu", "no CUDA device can be used here")
    device = gb.get_backend("cuda:0")
    assert isinstance(device, CudaBackend)
    if not (found := products_for(device, np.dtype("float32"), "full")).capturable:
        missing("gpu", found.reason)
    return device


@pytest.fixture(autouse=True)
def few_steps_in_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """An epoch here has five steps; a replay uses the graph of all of them and that of one."""
    monkeypatch.setattr(graphs, "UNROLLED", 3)


@pytest.fixture(params=["stand-in", pytest.param("cuda:0", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[[], CudaBackend]:
    """A factory of devices: each run has a new one, without traces of earlier runs."""
    if request.param != "stand-in":
        return gpu
    made = list[CudaBackend]()
    found_by_its_arrays(monkeypatch, lambda: made[-1])

    def new() -> CudaBackend:
        made.append(stand_in("late"))
        return made[-1]

    return new


@dataclasses.dataclass
class Case:
    """A training to run eagerly and captured."""

    layers: Callable[[], list[gb.Layer]]
    loss: Any = "softmax_cross_entropy"
    optimizer: Callable[[Any], gb.Optimizer] = gb.Adam
    l2: float = 0.0
    dtype: str = "float32"
    precision: str = "full"
    loader: dict[str, Any] = dataclasses.field(default_factory=dict)
    fit: dict[str, Any] = dataclasses.field(default_factory=dict)


def plain() -> list[gb.Layer]:
    return [gb.Dense(FEATURES, 16), gb.ReLU(), gb.Dense(16, CLASSES)]


def everything() -> list[gb.Layer]:
    return [gb.Dense(FEATURES, 16), gb.BatchNorm(16), gb.GELU(), gb.Dropout(0.3), gb.Dense(16, CLASSES)]


def falling(kind: Any, lr: float, **hyper: Any) -> Callable[[Any], gb.Optimizer]:
    return lambda params: kind(params, lr=gb.ExponentialDecay(lr, 0.9, per="step"), **hyper)


def deep() -> list[gb.Layer]:
    return [*everything()[:4], gb.Dense(16, 8), gb.ReLU(), gb.Dense(8, CLASSES)]


def grouped(params: Any, *frozen: str, **options: Any) -> gb.Optimizer:
    rates = {"W*": {"lr": gb.ExponentialDecay(0.02, 0.8, per="step"), "beta1": 0.8}, "b*": {"weight_decay": 0.0}}
    groups = {**{name: {"trainable": False} for name in frozen}, **rates}
    return gb.Adam(params, gb.SqrtDecay(0.01, per="step"), weight_decay=0.1, groups=groups, **options)


def mixed(params: Any) -> gb.Optimizer:
    return gb.Adam(params, lr=0.01, master_weights=True)


@gb.activation
def silu(x, *, beta=1.0):
    return x / (1 + np.exp(-beta * x))


@gb.score_loss
def huber(z, y, *, delta=1.0):
    r = np.abs(z - y)
    return np.where(r < delta, 0.5 * r * r, delta * (r - 0.5 * delta))


@gb.rule
def warm_momentum(w, g, v, t, *, lr=0.05, beta=0.9, limit=0.1):
    """Its first steps, its gradient and its state have conditions."""
    v = np.where(t == 1, g, beta * v + (1 - beta) * np.clip(g, -limit, limit))
    return w - np.minimum(t / 4, 1) * lr * np.where(v * g > 0, v, 0.5 * v), v


def users() -> list[gb.Layer]:
    return [gb.Dense(FEATURES, 16), gb.BatchNorm(16), gb.Elementwise(silu, beta=1.5), gb.Dense(16, CLASSES)]


OWN = "activation, loss and rule of the user's own"
CASES = {
    "plain": Case(plain),
    OWN: Case(users, huber.bind(delta=0.3), lambda p: gb.Optimizer(warm_momentum, p, lr=gb.ExponentialDecay(0.1, 0.9))),
    "norm, dropout, l2, schedule": Case(everything, optimizer=falling(gb.Adam, 0.01), l2=0.01, fit={"max_norm": 0.5}),
    "float64, amsgrad": Case(everything, dtype="float64", optimizer=lambda p: gb.Adam(p, amsgrad=True)),
    "mse, momentum, decay": Case(plain, "mse", lambda p: gb.HeavyBall(p, lr=0.01, weight_decay=0.1)),
    "sigmoid, adamw by epoch": Case(
        plain, "sigmoid_cross_entropy", lambda p: gb.AdamW(p, lr=gb.InverseTimeDecay(0.01, 0.5))
    ),
    "focal": Case(plain, "focal"),
    "smoothed labels": Case(plain, gb.SoftmaxCrossEntropy(label_smoothing=0.1)),
    "smoothed labels, mixed": Case(
        plain,
        gb.SoftmaxCrossEntropy(label_smoothing=0.1),
        precision="mixed",
        optimizer=mixed,
        fit={"loss_scale": (2.0**17, 3)},
    ),
    "smoothed sigmoid": Case(plain, gb.SigmoidCrossEntropy(label_smoothing=0.1)),
    "svm, delta": Case(plain, gb.SVM(delta=0.5)),
    "crammer_singer, delta": Case(plain, gb.CrammerSinger(delta=0.5)),
    "kl_divergence": Case(plain, "kl_divergence"),
    "softmax_focal": Case(plain, gb.SoftmaxFocal(gamma=1.5, alpha=[0.1, 0.2, 0.3, 0.4, 0.5][:CLASSES])),
    "softmax_focal, mixed": Case(
        plain,
        gb.SoftmaxFocal(alpha=0.25),
        precision="mixed",
        optimizer=mixed,
        fit={"loss_scale": (2.0**17, 3)},
    ),
    "svm, sgd, every batch whole": Case(plain, "svm", lambda p: gb.SGD(p, lr=0.1), loader={"drop_last": True}),
    "lamb, norm": Case(everything, optimizer=falling(gb.LAMB, 0.01), fit={"max_norm": 0.5}),
    "mixed, lars": Case(
        plain,
        precision="mixed",
        optimizer=lambda p: gb.LARS(p, 0.1, weight_decay=0.1, master_weights=True),
        fit={"loss_scale": (2.0**17, 3)},
    ),
    "one batch": Case(plain, loader={"batch_size": N}),
    "with replacement, in order of the host": Case(everything, loader={"replacement": True, "feed": "host"}),
    "through pinned memory, norm": Case(everything, loader={"feed": "host"}, fit={"max_norm": 0.5}),
    "transformed": Case(plain, loader={"transform": lambda x: x * 2}),
    # With this interval and first scale, the scale grows amid queued steps, and overflows.
    "mixed": Case(everything, precision="mixed", optimizer=mixed, l2=0.01, fit={"loss_scale": (2.0**17, 3)}),
    "mixed, host, norm": Case(
        plain,
        precision="mixed",
        optimizer=mixed,
        loader={"feed": "host"},
        fit={"loss_scale": (2.0**17, 3), "max_norm": 0.1},
    ),
    "a window and a rank": Case(plain, loader={"window": 20, "rank": 1, "world_size": 2}),
    "groups, norm": Case(everything, optimizer=grouped, l2=0.01, fit={"max_norm": 0.5}),
    "groups, the lowest layers frozen": Case(
        deep, optimizer=lambda p: grouped(p, "[Wb]1", "gamma1", "beta1", "b3"), l2=0.01
    ),
    "groups, mixed": Case(
        deep,
        precision="mixed",
        optimizer=lambda p: grouped(p, "W2", "b2", master_weights=True),
        fit={"loss_scale": (2.0**17, 3)},
    ),
    "columns": Case(everything, loader={"sample_axis": 1}),
    "columns of targets, through pinned memory": Case(plain, "mse", loader={"sample_axis": 1, "feed": "host"}),
    "columns, transformed": Case(plain, loader={"sample_axis": 1, "transform": lambda x: x * 2}),
}
every_case = every(
    "case",
    CASES,
    ["norm, dropout, l2, schedule", "mixed, host, norm"],
)


def data(case: Case) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(5)
    Y: np.ndarray = rng.integers(0, CLASSES, N).astype(np.uint8)
    of_labels = gb.SoftmaxCrossEntropy, gb.SVM, gb.CrammerSinger, gb.SoftmaxFocal
    if case.loss not in OF_LABELS and not isinstance(case.loss, of_labels):
        Y = rng.random((N, CLASSES)).astype(np.float32)
    return rng.integers(0, 256, (N, FEATURES), np.uint8), Y


class Training:
    """One run of a case; ``result`` has what is compared."""

    def __init__(self, case: Case, device: CudaBackend, X: np.ndarray | None = None) -> None:
        self.device, self.options = device, dict(case.fit)
        if "loss_scale" in self.options:
            self.options["loss_scale"] = gb.LossScale(*self.options["loss_scale"])
        self.net = gb.Network(case.layers(), case.loss, case.l2, device, case.dtype, 3, case.precision)
        images, Y = data(case)
        dtype = "float16" if case.precision == "mixed" else case.dtype
        options = {"batch_size": 8, "seed": 1, "dtype": dtype, "scale": 1 / 255, **case.loader}
        if X is not None:
            images, options["scale"] = X, None
        if options.get("sample_axis"):
            images, Y = np.ascontiguousarray(images.T), Y.T
        self.loader = gb.Loader(images, Y, backend=device, **options)
        self.opt = case.optimizer(self.net.parameters)
        self.history = gb.History()

    def fit(self, execution: str, epochs: int = 2, **options: Any) -> Training:
        self.history = gb.fit(
            self.net, self.loader, self.opt, epochs, progress=False, execution=execution, **self.options, **options
        )
        return self

    def result(self) -> dict[str, Any]:
        arrays = {"parameters": self.net.parameters, "buffers": self.net.buffers, **self.opt.state}
        return {
            **{name: self.device.to_numpy(views.flat).tobytes() for name, views in arrays.items()},
            **{k: v for k, v in self.history.to_dict().items() if k not in ("seconds", "execution")},
            "counts": (self.opt.t, self.opt.epoch, core_of(self.net).dropout_step, self.loader.state_dict()),
        }


def assert_no_faults(*trainings: Training) -> None:
    for training in trainings:
        assert not getattr(training.device.cupy, "faults", None)


# --- which graphs ----------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 3), max_size=40), st.integers(2, 9))
def test_the_launches_of_batches(rows: list[int], unrolled: int) -> None:
    planned = graphs.launches(rows, unrolled)
    assert [size for size, steps in planned for _ in range(steps)] == rows
    assert {steps for _, steps in planned} <= {1, unrolled}
    for first in range(len(planned) - unrolled + 1):  # so many single steps alike would be one launch
        some = planned[first : first + unrolled]
        assert len(set(some)) > 1 or some[0][1] == unrolled


def test_the_launches_of_an_epoch() -> None:
    assert graphs.launches([128] * 468 + [96], 8) == [(128, 8)] * 58 + [(128, 1)] * 4 + [(96, 1)]


# --- as eager steps --------------------------------------------------------------------------------------------------


@every_case
def test_replay_is_eager_bit_for_bit(case: Case, device: Callable[[], CudaBackend]) -> None:
    eager, captured = Training(case, device()).fit("eager"), Training(case, device()).fit("captured")
    assert (eager.history.execution, captured.history.execution) == ("eager", "captured")
    assert captured.result() == eager.result()
    history = captured.history
    assert len(history.step_loss) + history.overflows == 2 * len(captured.loader)
    if case.precision == "mixed":
        _, interval = case.fit["loss_scale"]
        assert history.overflows
        assert len(history.step_loss) > interval
    assert_no_faults(captured)


@every("name", [name for name in CASES if name.startswith("columns")], ["columns"])
def test_columns_are_trained_as_rows_are(name: str, device: Callable[[], CudaBackend]) -> None:
    """Captured, on the same numbers: samples are rows on the device in either case."""
    case = CASES[name]
    rows = dataclasses.replace(case, loader={**case.loader, "sample_axis": 0})
    of_columns, of_rows = (Training(each, device()).fit("captured") for each in (case, rows))
    assert of_columns.history.execution == "captured"
    assert of_columns.result() == of_rows.result()
    assert_no_faults(of_columns)


def test_columns_that_are_on_the_device_are_captured_too(device: Callable[[], CudaBackend]) -> None:
    """They are no rows of one piece there, so the loader makes the batches."""
    case = CASES["columns"]
    expected = Training(case, device()).fit("captured").result()
    training = Training(case, device())
    X, Y = data(case)
    there = training.device.asarray(np.ascontiguousarray(X.T))
    training.loader = gb.Loader(there, Y, 8, seed=1, scale=1 / 255, sample_axis=1, backend=training.device)
    assert training.fit("captured").result() == expected
    assert_no_faults(training)


@every("timing", [*TIMINGS], ["late"])
@pytest.mark.parametrize("feed", ["device", "host"])
def test_in_whatever_order_streams_do_their_work(feed: str, timing: str) -> None:
    case = dataclasses.replace(CASES["norm, dropout, l2, schedule"], loader={"feed": feed})
    captured = Training(case, stand_in(timing)).fit("captured")
    assert captured.result() == Training(case, stand_in("early")).fit("eager").result()
    assert_no_faults(captured)


@pytest.mark.exhaustive
def test_more_steps_than_a_chunk_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of five, graphs of two steps: no two boundaries coincide."""
    monkeypatch.setattr(ledger, "CHUNK", 5)
    monkeypatch.setattr(graphs, "UNROLLED", 2)
    case = dataclasses.replace(CASES["norm, dropout, l2, schedule"], loader={"batch_size": 4})
    captured = Training(case, stand_in("late")).fit("captured")
    assert captured.result() == Training(case, stand_in("late")).fit("eager").result()
    assert_no_faults(captured)


def test_auto_is_captured_on_a_gpu_and_eager_on_the_cpu(device: Callable[[], CudaBackend]) -> None:
    assert Training(CASES["plain"], device()).fit("auto", 1).history.execution == "captured"
    net = gb.mlp([FEATURES, CLASSES], backend="cpu")
    loader = gb.Loader(*data(CASES["plain"]), batch_size=8, scale=1 / 255, backend="cpu")
    assert gb.fit(net, loader, gb.Adam(net.parameters), 1, progress=False).execution == "eager"


# --- no allocation, no waiting ---------------------------------------------------------------------------------------


def test_nothing_is_allocated_and_nobody_waits_but_for_the_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the second epoch only an order, a restart and each chunk's scalars go to the device, and losses come back."""
    seen: list[tuple[int, ...]] = []
    case = dataclasses.replace(CASES["norm, dropout, l2, schedule"], loader={"batch_size": 2})
    device = stand_in("late")
    assert isinstance(device.cupy, QueuedStandIn)

    def count(state: gb.TrainingState) -> None:
        cupy = device.cupy
        seen.append((cupy.allocations, len(cupy.copies), cupy.synchronisations, cupy.graph_launches))

    monkeypatch.setattr(ledger, "CHUNK", 8)
    training = Training(case, device).fit("captured", 3, callbacks=[count])
    chunks, batches = -(-N // 2 // 8), N // 2
    launches = batches // graphs.UNROLLED + batches % graphs.UNROLLED
    for before, after in itertools.pairwise(seen):
        allocations, copies, waits, launched = np.subtract(after, before).tolist()
        assert (allocations, copies) == (0, 1 + 1 + chunks)
        assert launched <= launches + chunks * (graphs.UNROLLED - 1)
        # One wait for each report, and one for each copy from reused pinned memory.
        assert waits <= 2 * chunks + copies
    assert training.history.execution == "captured"


@pytest.mark.gpu
def test_on_a_gpu_a_replay_allocates_nothing_and_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    device = gpu()
    cupy, asked = device.cupy, list[int]()

    class Hook(cupy.cuda.MemoryHook):  # type: ignore[misc, name-defined]
        name = "what is asked for"

        def malloc_preprocess(self, **what: Any) -> None:
            asked.append(what["size"])

    def refuse(*_: Any) -> None:
        raise AssertionError("the host waits")

    net = gb.Network(everything(), l2=0.01, backend=device)
    with device.own_stream():
        X, Y = device.zeros((8, FEATURES), "float32"), device.zeros(8, "int64")
        step = gb.CapturedStep(net, gb.Adam(net.parameters), X, Y)
        step()
        with monkeypatch.context() as patch:
            for kind in (cupy.cuda.Stream, cupy.cuda.Event):
                patch.setattr(kind, "synchronize", refuse)
            with Hook():
                for _ in range(20):
                    step()
    assert asked == []


# --- events in a step ------------------------------------------------------------------------------------------------


def with_a_sample_that_is_too_large() -> np.ndarray:
    X = np.random.default_rng(2).standard_normal((N, FEATURES)).astype(np.float32)
    X[[13, 19]] = 3e38  # finite, but no product with it is; never in batches that follow one another
    return X


@every("feed", ["device", "host"], ["device"])
def test_a_step_that_is_not_finite_is_left_out(feed: str, device: Callable[[], CudaBackend]) -> None:
    case = dataclasses.replace(CASES["norm, dropout, l2, schedule"], loader={"feed": feed})
    results, texts = [], []
    for execution in ("eager", "captured"):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            training = Training(case, device(), with_a_sample_that_is_too_large())
            training.fit(execution, max_skipped=1)  # in a row: there are good steps between them
        results.append(training.result())
        texts.append([str(w.message) for w in caught if w.category is gb.SkippedStepWarning])
        assert training.history.skipped == 4  # one batch for each sample and epoch, here
    assert results[0] == results[1]
    assert texts[0] == texts[1]
    assert len(texts[0]) == 1


def test_too_many_in_a_row_raise_after_the_last_whole_step(device: Callable[[], CudaBackend]) -> None:
    results, errors = [], []
    for execution in ("eager", "captured"):
        training = Training(CASES["plain"], device(), with_a_sample_that_is_too_large())
        with pytest.raises(gb.NonFiniteError) as caught:
            training.fit(execution, max_skipped=0)
        errors.append(str(caught.value))
        # The loader may have prepared unused batches; the steps are the same.
        results.append({k: v for k, v in training.result().items() if k != "counts"} | {"t": training.opt.t})
    assert results[0] == results[1]
    assert errors[0] == errors[1]


def test_a_gradient_that_overflows_the_optimizer_is_left_out(device: Callable[[], CudaBackend]) -> None:
    """Its norm is 1e20: the square of that is not a float32, so Adam's state would be infinite."""
    case = Case(lambda: [gb.Dense(FEATURES, 1)], "mse", gb.Adam)

    def training() -> Training:
        made = Training(dataclasses.replace(case, loss="mse"), device())
        made.loader = gb.Loader(
            np.full((N, FEATURES), 1e10, np.float32), np.full(N, 1e10, np.float32), batch_size=8, backend=made.device
        )
        return made

    runs = []
    for execution in ("eager", "captured"):
        run = training()
        with pytest.warns(gb.SkippedStepWarning, match="so large that adam overflows"):
            run.fit(execution, 1)
        runs.append(run.result())
    assert runs[0] == runs[1]


def test_a_schedule_that_fails_does_so_at_its_step(device: Callable[[], CudaBackend]) -> None:
    def rate(step: int, epoch: int) -> float:
        if step == 7:
            raise ValueError("no rate for step 7")
        return 0.01

    results = []
    for execution in ("eager", "captured"):
        case = dataclasses.replace(CASES["plain"], optimizer=lambda p: gb.SGD(p, lr=rate))
        training = Training(case, device())
        with pytest.raises(ValueError, match="no rate for step 7"):
            training.fit(execution)
        assert training.opt.t == 7
        results.append(training.device.to_numpy(training.net.parameters.flat).tobytes())
    assert results[0] == results[1]


def test_a_rate_that_is_changed_by_hand_counts_from_the_next_step(device: Callable[[], CudaBackend]) -> None:
    def slower(state: gb.TrainingState) -> None:
        state.opt.lr = 0.5 * state.opt.lr

    runs = [Training(CASES["plain"], device()).fit(how, 3, callbacks=[slower]) for how in ("eager", "captured")]
    assert runs[0].result() == runs[1].result()
    assert sorted(set(runs[1].history.step_lr), reverse=True) == [1e-3, 5e-4, 2.5e-4]


def test_an_optimizer_that_is_loaded_between_epochs_is_captured_anew(device: Callable[[], CudaBackend]) -> None:
    """The loaded state may change the formula: weight decay does."""

    def load(state: gb.TrainingState) -> None:
        saved = state.opt.state_dict()
        saved["hyper"]["weight_decay"] = 0.1
        state.opt.load_state_dict(saved)

    runs = [Training(CASES["plain"], device()).fit(how, 3, callbacks=[load]) for how in ("eager", "captured")]
    assert runs[0].result() == runs[1].result()
    assert runs[1].history.execution == "captured"


@every("case", ["plain", "norm, dropout, l2, schedule", "through pinned memory, norm"], ["plain"])
def test_after_memory_ran_out_parts_are_captured(
    case: str, device: Callable[[], CudaBackend], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory runs out in the first validation: the graphs are dropped, and later ones use micro-batches."""
    runs = []
    for execution in ("eager", "captured"):
        run = Training(CASES[case], device())
        evaluate, failed = run.net.evaluate, []

        def fails_once(*arguments: Any, evaluate: Any = evaluate, failed: list[int] = failed) -> Any:
            if not failed:
                failed.append(1)
                raise MemoryError("no memory for this")
            return evaluate(*arguments)

        monkeypatch.setattr(run.net, "evaluate", fails_once)
        with pytest.warns(gb.MicroBatchWarning, match="computed 4 samples at a time"):
            run.fit(execution, 3, validation=data(CASES[case]))
        assert run.history.micro_batch_size == 4
        runs.append(run.result())
    assert runs[0] == runs[1]


# --- saved, interrupted ----------------------------------------------------------------------------------------------


@every("case", ["norm, dropout, l2, schedule", "through pinned memory, norm", "mixed"], ["through pinned memory, norm"])
def test_a_run_is_saved_and_resumed_in_the_middle_of_an_epoch(
    case: str, device: Callable[[], CudaBackend], tmp_path: Path
) -> None:
    whole = Training(CASES[case], device()).fit("eager", 3)
    saves = []

    def fails(state: gb.TrainingState) -> None:
        if state.epoch == 1:
            raise RuntimeError("the power goes")

    for execution in ("eager", "captured"):
        store = gb.Checkpoints(tmp_path / execution, every=3, keep=100)
        with pytest.raises(RuntimeError, match="the power goes"):
            Training(CASES[case], device()).fit(execution, 3, checkpoint=store, callbacks=[fails])
        saves.append([path.name.split("-")[1] for path in store.files()])  # the rest is random
    assert saves[0] == saves[1]
    for execution in ("eager", "captured"):  # one goes on from where the other was
        other = {"eager": "captured", "captured": "eager"}[execution]
        resumed = Training(CASES[case], device()).fit(execution, 3, checkpoint=tmp_path / other, resume=True)
        assert resumed.result() == whole.result()
        assert resumed.history.execution == execution


@every("case", ["plain", "through pinned memory, norm"], ["through pinned memory, norm"])
def test_a_signal_ends_between_steps(case: str, device: Callable[[], CudaBackend], tmp_path: Path) -> None:
    def rate(step: int, epoch: int) -> float:
        if step == 7 and not interrupted:
            interrupted.append(1)
            os.kill(os.getpid(), signal.SIGINT)
        return 0.01

    interrupted: list[int] = [1]
    changed = dataclasses.replace(CASES[case], optimizer=lambda p: gb.SGD(p, lr=rate))
    whole = Training(changed, device()).fit("eager", 3)
    interrupted.clear()
    training = Training(changed, device())
    with pytest.raises(gb.TrainingInterrupted) as caught:
        training.fit("captured", 3, checkpoint=tmp_path)
    assert 0 < len(caught.value.history.step_loss) == training.opt.t < 15
    resumed = Training(changed, device()).fit("captured", 3, checkpoint=tmp_path, resume=True)
    assert resumed.result() == whole.result()


# --- what callbacks add to a step ------------------------------------------------------------------------------------

# The makers of callbacks, each with its place in a step.
ADDED: dict[str, Callable[[], list[Any]]] = {
    "clip": lambda: [gb.ClipByValue(0.002)],
    "noise": lambda: [gb.GradientNoise(0.01, seed=3)],
    "average": lambda: [gb.WeightAverage(0.9, every=3)],
    "equal average": lambda: [gb.WeightAverage(None)],
    "all": lambda: [gb.ClipByValue(0.002), gb.WeightAverage(0.9, warmup=True), gb.GradientNoise(0.01)],
}


@every("name", list(ADDED), ["all"])
@every("case", ["norm, dropout, l2, schedule", "mixed, host, norm"], ["mixed, host, norm"])
def test_parts_of_callbacks_are_captured(name: str, case: str, device: Callable[[], CudaBackend]) -> None:
    found = {}
    for execution in ("eager", "captured"):
        made = ADDED[name]()
        training = Training(CASES[case], device()).fit(execution, 2, callbacks=made)
        assert training.history.execution == execution
        averages = [part.state_dict() for part in made if hasattr(part, "state_dict")]
        found[execution] = training.result(), [(of["steps"], to_bytes(of["mean"], training)) for of in averages]
    assert found["captured"] == found["eager"]
    plain = Training(CASES[case], device()).fit("captured", 2).result()
    assert plain["parameters"] != found["captured"][0]["parameters"]


def to_bytes(arrays: dict[str, Any], training: Training) -> dict[str, bytes]:
    return {name: training.device.to_numpy(array).tobytes() for name, array in arrays.items()}


@pytest.mark.exhaustive
def test_parts_and_a_step_that_is_left_out(device: Callable[[], CudaBackend]) -> None:
    """The average does not see it, the noise of the next step is that of its number, and infinity is not clipped."""
    found = []
    for execution in ("eager", "captured"):
        training = Training(CASES["plain"], device(), with_a_sample_that_is_too_large())
        with pytest.warns(gb.SkippedStepWarning):
            training.fit(execution, 2, callbacks=ADDED["all"]())
        assert training.history.skipped == 4
        found.append(training.result())
    assert found[0] == found[1]


def test_a_part_that_the_user_changed_is_not_passed_over(device: Callable[[], CudaBackend]) -> None:
    class Own(gb.ClipByValue):
        def on_gradient(self, state: gb.TrainingState, grads: Any) -> None: ...

    history = Training(CASES["plain"], device()).fit("auto", 1, callbacks=[Own(1.0)]).history
    assert history.execution == "eager, since Own.on_gradient is not gpubatch's own"


@pytest.mark.exhaustive
def test_a_part_is_resumed_in_the_middle_of_an_epoch(device: Callable[[], CudaBackend], tmp_path: Path) -> None:
    case = CASES["norm, dropout, l2, schedule"]
    whole = Training(case, device()).fit("captured", 3, callbacks=ADDED["all"]())

    def fails(state: gb.TrainingState) -> None:
        if state.epoch == 1:
            raise RuntimeError("the power goes")

    store = gb.Checkpoints(tmp_path, every=3, keep=100)
    with pytest.raises(RuntimeError, match="the power goes"):
        Training(case, device()).fit("captured", 3, callbacks=[*ADDED["all"](), fails], checkpoint=store)
    resumed = Training(case, device()).fit("captured", 3, callbacks=ADDED["all"](), checkpoint=tmp_path, resume=True)
    assert resumed.result() == whole.result()


# --- steps that cannot be captured -----------------------------------------------------------------------------------


class Own(gb.ReLU):
    """A user's layer."""


class Looks:
    def on_step(self, state: gb.TrainingState) -> None:
        """Called at every step."""

    def __repr__(self) -> str:
        return "Looks()"


class Changes:
    def on_gradient(self, state: gb.TrainingState, grads: Any) -> None:
        """Called with every gradient."""

    def __repr__(self) -> str:
        return "Changes()"


REASONS: dict[str, tuple[Case, dict[str, Any], str]] = {
    "layer": (
        Case(lambda: [gb.Dense(FEATURES, 16), Own(), gb.Dense(16, CLASSES)]),
        {},
        "layer 2 (Own) is not one of gpubatch's, so it may do what a graph cannot",
    ),
    "callback": (CASES["plain"], {"callbacks": [Looks()]}, "callback Looks() looks at every step"),
    "hook": (CASES["plain"], {"callbacks": [Changes()]}, "callback Changes() changes every gradient"),
}


@pytest.mark.parametrize(("case", "options", "reason"), REASONS.values(), ids=REASONS)
def test_what_cannot_be_captured_is_eager_and_says_why(
    case: Case, options: dict[str, Any], reason: str, device: Callable[[], CudaBackend]
) -> None:
    assert Training(case, device()).fit("auto", 1, **options).history.execution == f"eager, since {reason}"
    with pytest.raises(gb.ArgumentError) as caught:
        Training(case, device()).fit("captured", 1, **options)
    assert str(caught.value) == f"execution must be 'auto' or 'eager' here, got 'captured': {reason}"


# --- user code -------------------------------------------------------------------------------------------------------


class Calls:
    """Counts calls of the methods that a user wrote; each then calls gpubatch's method."""

    def __init__(self) -> None:
        self.count = 0

    def counted(self, method: Any) -> Any:
        def method_of_a_user(*arguments: Any, **named: Any) -> Any:
            self.count += 1
            return method(*arguments, **named)

        return method_of_a_user

    def overridden(self, x: Any, name: str) -> None:
        """``x`` with a subclass that overrides a method."""
        kind = type(x)
        x.__class__ = type(f"My{kind.__name__}", (kind,), {name: self.counted(inspect.getattr_static(kind, name))})

    def replaced(self, x: Any, name: str) -> None:
        """``x`` with a method replaced in the object."""
        vars(x)[name] = self.counted(getattr(x, name))


PARTS: dict[str, Callable[[Training], Any]] = {
    "net": lambda training: training.net,
    "opt": lambda training: training.opt,
    "loader": lambda training: training.loader,
    "loss_scale": lambda training: training.options["loss_scale"],
    "loss": lambda training: training.net.loss_function,
    "layer": lambda training: training.net.layers[1],
}
WRITTEN = [
    ("net", "loss_and_grad", "Network.loss_and_grad"),
    ("net", "step_loss", "Network.step_loss"),
    ("opt", "step", "Adam.step"),
    ("opt", "_scalars", "Adam._scalars"),
    ("loader", "__iter__", "Loader.__iter__"),
    ("loss_scale", "good", "LossScale.good"),
]


WAYS = {  # Python looks up __iter__ in the class, and not in the object
    f"{name}-{how}": (part, method, name, how)
    for part, method, name in WRITTEN
    for how in ("overridden", "replaced")
    if (method, how) != ("__iter__", "replaced")
}


@every("way", WAYS, ["Network.loss_and_grad-overridden", "Adam.step-replaced", "Loader.__iter__-overridden"])
def test_what_the_user_wrote_is_called_as_often_as_on_a_cpu(
    way: tuple[str, str, str, str], device: Callable[[], CudaBackend]
) -> None:
    part, method, name, how = way
    case, counts = CASES["mixed" if part == "loss_scale" else "plain"], []
    for backend in (device(), gb.get_backend("cpu")):
        calls, training = Calls(), Training(case, backend)
        getattr(calls, how)(PARTS[part](training), method)
        training.fit("auto")
        counts.append(calls.count)
        if backend.name == "cuda":
            mine = name if how == "replaced" else f"My{name}"
            assert training.history.execution == f"eager, since {mine} is not gpubatch's own"
            with pytest.raises(gb.ArgumentError, match=f"got 'captured': {mine} is not gpubatch's own"):
                training.fit("captured")
            calls.count = 0
    # Whether a step of mixed precision is counted by the scale depends on rounding.
    assert counts[0] == counts[1] or part == "loss_scale"
    assert (counts[0] > 0) == (method != "step_loss")


@pytest.mark.exhaustive
def test_functions_that_are_put_into_classes_are_called(
    device: Callable[[], CudaBackend], monkeypatch: pytest.MonkeyPatch
) -> None:
    patches = [
        (gb.Network, "step_loss", "Network.step_loss"),
        (gb.Network, "loss_and_grad", "Network.loss_and_grad"),
        (gb.Optimizer, "step", "Adam.step"),
        (gb.Dense, "forward", "Dense.forward"),
        (gb.ReLU, "backward", "ReLU.backward"),
        (type(losses.LOSSES["softmax_cross_entropy"]), "run", "SoftmaxCrossEntropy.run"),
    ]
    for kind, method, name in patches:
        counts = []
        with monkeypatch.context() as patch:
            calls = Calls()
            patch.setattr(kind, method, calls.counted(getattr(kind, method)))
            for backend in (device(), gb.get_backend("cpu")):
                calls.count = 0
                training = Training(CASES["plain"], backend).fit("auto")
                counts.append(calls.count)
                if backend.name == "cuda":
                    assert training.history.execution == f"eager, since {name} is not gpubatch's own"
        assert counts[0] == counts[1]
        assert (counts[0] > 0) == (method != "step_loss")
    assert Training(CASES["plain"], device()).fit("auto").history.execution == "captured"


def test_a_layer_or_a_loss_that_was_changed_is_not_passed_over(device: Callable[[], CudaBackend]) -> None:
    """Not even by the fused pass of a Dense layer and its activation, on any device."""
    for backend in (device(), gb.get_backend("cpu")):
        calls, layers = Calls(), plain()
        calls.replaced(layers[1], "forward")
        training = Training(dataclasses.replace(CASES["plain"], layers=lambda layers=layers: layers), backend)
        training.fit("auto", 1)
        assert calls.count == len(training.loader)
        if backend.name == "cuda":
            assert training.history.execution == "eager, since ReLU.forward is not gpubatch's own"


class OwnLoss(type(losses.LOSSES["mse"])):  # type: ignore[misc]
    """A user's loss."""


def test_a_loss_of_the_user_s_is_eager(device: Callable[[], CudaBackend], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(losses.LOSSES, "own", OwnLoss(losses.LOSSES["mse"].bound))
    training = Training(CASES["mse, momentum, decay"], device())
    training.net = gb.Network(plain(), "own", backend=training.device)
    training.opt = gb.Adam(training.net.parameters)
    training.fit("auto", 1)
    reason = "the loss (OwnLoss) is not one of gpubatch's, so it may do what a graph cannot"
    assert training.history.execution == f"eager, since {reason}"


def test_subclasses_that_change_no_step_are_captured(device: Callable[[], CudaBackend]) -> None:
    class MyNetwork(gb.Network):
        def __init__(self, *arguments: Any) -> None:
            gb.Network.__init__(self, *arguments)
            self.notes = ["mine"]

        def evaluate(self, *arguments: Any) -> Any:
            self.notes.append("evaluated")
            return gb.Network.evaluate(self, *arguments)

        def norm(self) -> float:
            return 1.0

    training = Training(CASES["plain"], device())
    training.net = MyNetwork(plain(), "softmax_cross_entropy", 0.0, training.device, "float32", 3)
    training.opt = type("MyAdam", (gb.Adam,), {})(training.net.parameters)
    training.fit("captured", validation=data(CASES["plain"]))
    assert training.net.notes == ["mine", "evaluated", "evaluated"]
    assert (
        training.result()
        == Training(CASES["plain"], device()).fit("captured", validation=data(CASES["plain"])).result()
    )


@pytest.mark.exhaustive
def test_every_method_that_a_step_calls_is_looked_at() -> None:
    """No method that an eager step calls, on either device, is in the list of methods that no step calls."""
    called = dict[tuple[type, str], int]()
    kinds = (gb.Network, gb.Optimizer, gb.Loader, gb.LossScale, gb.Layer, losses.Loss)

    def note(frame: Any, event: str, _: Any) -> None:
        x = frame.f_locals.get("self")
        if event == "call" and isinstance(x, kinds):
            name = frame.f_code.co_name
            owner = next((k for k in type(x).__mro__ if name in vars(k)), None)
            if owner is not None:
                called[owner, name] = called.get((owner, name), 0) + 1

    cases = [(case, gb.get_backend("cpu")) for case in CASES.values()]
    slow = ("norm, dropout, l2, schedule", "mixed, host, norm", "transformed")
    for case, backend in [*cases, *((CASES[name], stand_in("early")) for name in slow)]:
        training = Training(dataclasses.replace(case, loader={"batch_size": 19, **case.loader}), backend)
        state = gb.TrainingState(training.net, training.loader, training.opt, gb.History(), 0, 0)
        scale = scale_for(training.net, training.options.get("loss_scale"))
        eager = EagerSteps(Record(state, scale), max_norm=case.fit.get("max_norm"))
        for most in (None, 3):
            state.history.micro_batch_size = most
            next(iter(training.loader))  # one-time work belongs to no step
            with warnings.catch_warnings(), eager.scaling():
                warnings.simplefilter("ignore")
                sys.setprofile(note)
                try:
                    for x, y in rows_of(training.loader) if training.loader.sample_axis else training.loader:
                        eager.step(x, y)
                        training.net.step_loss(x, y)
                        training.opt.step()
                finally:
                    sys.setprofile(None)
    names = {name for _, name in called}
    assert {
        "loss_and_grad",
        "step",
        "_first",
        "forward",
        "run",
        "good",
        "overflow",
    } <= names
    assert names & APART == set()
    for kind, name in called:
        assert name in vars(kind)[own.WRITTEN], f"{kind.__name__}.{name} was not remembered"
    for kind in kinds[:4]:  # the list has no unknown names
        assert changed(type("Mine", (kind,), {})) == ""
    known = set().union(*(vars(kind)[own.WRITTEN] for kind in kinds[:4]))
    assert APART - {"__init_subclass__"} <= known


@pytest.mark.parametrize("kind", [gb.Network, gb.Optimizer, gb.Loader, gb.LossScale])
def test_whatever_of_it_a_subclass_overrides_is_found(kind: type) -> None:
    names = set(vars(kind)[own.WRITTEN])
    assert {
        name for name, value in vars(kind).items() if inspect.isfunction(value) or isinstance(value, property)
    } <= names
    for name in names:
        mine = object.__new__(type("Mine", (kind,), {name: vars(kind)[name] if name in APART else None}))
        assert own.changed(mine, APART) == ("" if name in APART else f"Mine.{name}")


def test_a_captured_step_of_what_the_user_wrote_is_refused(device: Callable[[], CudaBackend]) -> None:
    backend = device()
    X, Y = backend.zeros((8, FEATURES), "float32"), backend.zeros(8, "int64")
    for part, method, name in (("net", "step_loss", "Network.step_loss"), ("opt", "step", "Adam.step")):
        training = Training(CASES["plain"], backend)
        Calls().overridden(PARTS[part](training), method)
        with pytest.raises(gb.ArgumentError, match=f"{part} cannot be captured: My{name} is not gpubatch's own"):
            gb.CapturedStep(training.net, training.opt, X, Y)


# --- refused captures ------------------------------------------------------------------------------------------------


def test_without_nvmath_steps_are_eager() -> None:
    training = Training(CASES["plain"], queued_backend("late")).fit("auto", 1)
    assert training.history.execution.startswith("eager, since nvmath-python is not installed")


def test_a_capture_that_fails_leaves_eager_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the driver refuses, the results equal those of eager steps."""

    def refuse(self: CudaBackend, work: Callable[[], None]) -> None:
        raise gb.CaptureError("not today")

    whole = Training(CASES["norm, dropout, l2, schedule"], stand_in("late")).fit("eager")
    monkeypatch.setattr(CudaBackend, "capture", refuse)
    training = Training(CASES["norm, dropout, l2, schedule"], stand_in("late")).fit("auto")
    assert training.history.execution == "eager, since the capture failed: not today"
    assert training.result() == whole.result()


@every("batch", {"2": 2, "4": 4}, ["4"])
@every("feed", ["device", "host"], ["device"])
def test_steps_that_do_not_agree_are_not_trusted(feed: str, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """If a replay disagrees, the run continues without graphs, and warns."""
    case = dataclasses.replace(CASES["norm, dropout, l2, schedule"], loader={"feed": feed})
    whole = Training(case, stand_in("late")).fit("eager", 3)
    original, calls = graphs.StepGraphs.launch, list[int]()

    def halts(self: graphs.StepGraphs, form: graphs.Form) -> None:
        calls.append(form.steps)
        if sum(calls) > batch:
            self.ledger.word(ledger.HALTED).fill(1)
        original(self, form)

    monkeypatch.setattr(graphs.StepGraphs, "launch", halts)
    training = Training(case, stand_in("late"))
    with pytest.warns(gb.CaptureWarning, match=r"epoch 1, step \d\); the run goes on with eager steps"):
        training.fit("auto", 3)
    reason = "a captured step was not finite, and the same step made eagerly was"
    assert training.history.execution == f"eager, since {reason}"
    assert training.result() == whole.result()
    assert_no_faults(training)


def test_execution_is_checked() -> None:
    with pytest.raises(gb.ArgumentError, match="execution must be one of 'auto', 'eager', 'captured', got 'graph'"):
        Training(CASES["plain"], stand_in("late")).fit("graph")
    net = gb.mlp([FEATURES, CLASSES], backend="cpu")
    loader = gb.Loader(*data(CASES["plain"]), batch_size=8, scale=1 / 255, backend="cpu")
    with pytest.raises(gb.ArgumentError, match="graphs are for a GPU, the network is on 'cpu'"):
        gb.fit(net, loader, gb.Adam(net.parameters), 1, progress=False, execution="captured")


# --- in loops of one's own -------------------------------------------------------------------------------------------


def by_hand(
    device: CudaBackend, captured: bool, steps: int, optimizer: Callable[[Any], gb.Optimizer], calls: int = 5
) -> list[bytes]:
    """A loop with its own batches, a new learning rate at the fourth call, and eager steps between two calls."""
    net = gb.Network(everything(), l2=0.01, backend=device, seed=3)
    opt = optimizer(net.parameters)
    rng, losses = np.random.default_rng(4), []
    with device.own_stream():
        X, Y = device.empty((8, FEATURES), "float32"), device.empty(8, "int64")

        def eager() -> Any:
            for _ in range(steps):
                loss = net.step_loss(X, Y)
                opt.step()
            return loss

        step = gb.CapturedStep(net, opt, X, Y, steps) if captured else eager
        for call in range(calls):
            X[...] = device.asarray(rng.standard_normal((8, FEATURES)).astype(np.float32))
            Y[...] = device.asarray(rng.integers(0, CLASSES, 8))
            if call == 3:
                opt.lr = 0.5
            if call == 2:
                eager()
            if call == 4:  # arrays other than the graph's
                opt.step(device.asarray(np.full(net.parameters.size, 0.1, np.float32)))
            losses.append(device.to_numpy(step()).tobytes())
        arrays = [net.parameters, net.buffers, *opt.state.values()]
        found = [*losses, *(device.to_numpy(views.flat).tobytes() for views in arrays)]
    return [*found, bytes([opt.t, core_of(net).dropout_step])]


@every("steps", {"1": 1, "3": 3}, ["3"])
def test_a_captured_step_is_step_loss_and_step(steps: int, device: Callable[[], CudaBackend]) -> None:
    for optimizer in (gb.Adam, falling(gb.Momentum, 0.1), lambda p: grouped(p, "[Wb]1", "gamma1")):
        assert by_hand(device(), True, steps, optimizer) == by_hand(device(), False, steps, optimizer)


@pytest.mark.exhaustive
def test_scalars_go_to_the_device_again_when_they_are_used_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "CHUNK", 4)
    for steps in (1, 3):
        ours = by_hand(stand_in("late"), True, steps, gb.Adam, calls=11)
        assert ours == by_hand(stand_in("late"), False, steps, gb.Adam, calls=11)


def test_a_rate_that_is_another_one_at_every_call() -> None:
    """There are more calls than pieces of pinned memory, and the device is late."""
    found = []
    for captured in (True, False):
        device = stand_in("late")
        net = gb.Network(plain(), backend=device, seed=3)
        opt = gb.SGD(net.parameters, lr=0.0)
        with device.own_stream():
            X, Y = device.empty((8, FEATURES), "float32"), device.zeros(8, "int64")
            X.fill(0.5)
            step = gb.CapturedStep(net, opt, X, Y) if captured else None
            for call in range(2 * ledger.STAGES):
                opt.lr = 0.1 / (1 + call)
                if step is not None:
                    step()
                else:
                    net.step_loss(X, Y)
                    opt.step()
            found.append(device.to_numpy(net.parameters.flat).tobytes())
    assert found[0] == found[1]


def test_a_captured_step_takes_nothing_and_waits_for_nothing() -> None:
    device = stand_in("late")
    net = gb.Network(plain(), backend=device)
    opt = gb.Adam(net.parameters)
    with device.own_stream():
        step = gb.CapturedStep(net, opt, device.zeros((8, FEATURES), "float32"), device.zeros(8, "int64"))
        step()
        cupy = device.cupy
        assert isinstance(cupy, QueuedStandIn)
        before = cupy.allocations, len(cupy.copies), cupy.synchronisations
        for _ in range(10):
            step()
        assert (cupy.allocations, len(cupy.copies), cupy.synchronisations) == before
        assert cupy.graph_launches == 11


def nodes(captured: list[Any], monkeypatch: pytest.MonkeyPatch, run: Callable[[], object]) -> list[int]:
    """The nodes of each graph of one step that ``run`` captures: launches, copies and fills."""
    capturing = CudaBackend.capture
    monkeypatch.setattr(graphs, "UNROLLED", 1)
    monkeypatch.setattr(CudaBackend, "capture", lambda *a: captured.append(capturing(*a)) or captured[-1])
    run()
    return [count_nodes(graph) for graph in captured]


def count_nodes(graph: Any) -> int:
    if hasattr(graph, "work"):  # the stand-in's
        return len(graph.work)
    driver = ctypes.CDLL(None if emulated_gpu.installed() else "libcuda.so.1")
    count = ctypes.c_size_t()
    assert driver.cuGraphGetNodes(ctypes.c_void_p(graph.graph), None, ctypes.byref(count)) == 0
    return count.value


def test_the_nodes_of_a_step(device: Callable[[], CudaBackend], monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight products and three kernels are forward and backward of three layers; the update is the step's end.

    A step of ``fit`` gathers its batch, images and labels, and judges its gradient.
    """
    rng = np.random.default_rng(0)
    where = device()
    net = gb.mlp([784, 512, 256, 10], backend=where)
    X, Y = rng.standard_normal((128, 784)).astype(np.float32), rng.integers(0, 10, 128)
    with where.own_stream():
        step = gb.CapturedStep(net, gb.Adam(net.parameters), where.asarray(X), where.asarray(Y))
        assert nodes([], monkeypatch, step) == [12]
    loader = gb.Loader(X, Y, batch_size=128, backend=where)
    opt = gb.Adam(net.parameters)
    assert nodes([], monkeypatch, lambda: gb.fit(net, loader, opt, 1, progress=False, execution="captured")) == [15]


def test_a_step_that_finds_no_memory_can_be_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    device = stand_in("late")
    net = gb.Network(plain(), backend=device)
    opt = gb.SGD(net.parameters, lr=0.1)
    with device.own_stream():
        X, Y = device.empty((8, FEATURES), "float32"), device.zeros(8, "int64")
        X.fill(0.5)
        step = gb.CapturedStep(net, opt, X, Y)
        with monkeypatch.context() as patch:

            def fails(*_: Any) -> None:
                raise MemoryError

            patch.setattr(core_of(net), "reserve", fails)
            with pytest.raises(MemoryError):
                step()
        before = device.to_numpy(net.parameters.flat)
        step()
        assert (device.to_numpy(net.parameters.flat) != before).any()
        assert opt.t == 1


@every("timing", [*TIMINGS], ["late"])
def test_what_was_captured_is_given_back_when_it_is_over(timing: str) -> None:
    """Step, workspace and batch are freed while their work is queued; then another stream allocates memory."""
    found = []
    for captured in (True, False):
        device = stand_in(timing)
        net = gb.Network(everything(), backend=device, seed=3)
        opt = gb.Adam(net.parameters)
        with device.own_stream():
            X, Y = device.empty((8, FEATURES), "float32"), device.zeros(8, "int64")
            X.fill(0.5)
            step: Any = gb.CapturedStep(net, opt, X, Y) if captured else None
            for rate in (1e-3, 1e-3, 1e-2):
                opt.lr = rate  # another one is copied to the device
                if captured:
                    step()
                else:
                    net.step_loss(X, Y)
                    opt.step()
            del step, X, Y
            gc.collect()
        core_of(net).release()
        with device.stream():
            taken = [device.empty(1 << 12, np.uint8) for _ in range(20)]
        found.append(device.to_numpy(net.parameters.flat).tobytes())
        assert not getattr(device.cupy, "faults", None)
        del taken
    assert found[0] == found[1]


def test_what_a_captured_step_refuses(device: Callable[[], CudaBackend]) -> None:
    made = device()
    net, other = (gb.Network(plain(), backend=made) for _ in range(2))
    X, Y = made.zeros((8, FEATURES), "float32"), made.zeros(8, "int64")
    opt = gb.Adam(net.parameters)
    with pytest.raises(gb.ArgumentError, match=r"opt must be bound to net\.parameters"):
        gb.CapturedStep(net, gb.Adam(other.parameters), X, Y)
    with pytest.raises(gb.ArgumentError, match="steps must be an integer between 1 and 64, got 65"):
        gb.CapturedStep(net, opt, X, Y, 65)
    with pytest.raises(gb.ShapeError, match="X has 3 features"):
        gb.CapturedStep(net, opt, X[:, :3].copy(), Y)
    own = gb.Network([gb.Dense(FEATURES, CLASSES), Own()], backend=made)
    with pytest.raises(gb.ArgumentError, match=r"net cannot be captured: layer 2 \(Own\)"):
        gb.CapturedStep(own, gb.Adam(own.parameters), X, Y)
    cpu = gb.mlp([FEATURES, CLASSES], backend="cpu")
    with pytest.raises(gb.ArgumentError, match="net cannot be captured: graphs are for a GPU"):
        gb.CapturedStep(cpu, gb.Adam(cpu.parameters), np.zeros((8, FEATURES), "float32"), np.zeros(8, int))
