"""Memory that runs out in the middle of a training: refused anywhere, the run ends as if it had not been."""

from __future__ import annotations

import contextlib
import gc
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from allocations import Refusal, refusing
from hypothesis import given, settings, strategies as st
from stand_in import INDEX, QueuedStandIn, StandInBackend

import gpubatch as gb
from gpubatch.errors import MicroBatchWarning
from gpubatch.loader import epochs_of
from gpubatch.nn import Core, core_of
from gpubatch.nn.workspace import evenly
from gpubatch.ops import cuda_kernel, ops_for
from gpubatch.train import TrainingState
from gpubatch.train.memory import settle_batches
from gpubatch.train.validation import InMemory

SAMPLES, BATCH = 100, 48  # the last batch of an epoch has four

LAYERS: dict[str, Any] = {
    "plain": lambda: [gb.Dense(5, 9), gb.ReLU(), gb.Dense(9, 3)],
    "dropout": lambda: [gb.Dense(5, 9), gb.Tanh(), gb.Dropout(0.3), gb.Dense(9, 7), gb.Dropout(0.5), gb.Dense(7, 3)],
    "batch norm": lambda: [gb.Dense(5, 9, bias=False), gb.BatchNorm(9), gb.GELU(), gb.Dense(9, 3)],
}


def parts(layers: str = "plain", backend: Any = "cpu", **loader: Any) -> tuple[gb.Network, gb.Loader, gb.Optimizer]:
    rng = np.random.default_rng(5)
    X, Y = rng.normal(size=(SAMPLES, 5)), rng.integers(0, 3, SAMPLES)
    net = gb.Network(LAYERS[layers](), l2=0.01, backend=backend, dtype="float64")
    batches = gb.Loader(X, Y, batch_size=BATCH, backend=backend, dtype="float64", **loader)
    return net, batches, gb.Adam(net.parameters, lr=0.01)


def validation() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(6)
    return rng.normal(size=(60, 5)), rng.integers(0, 3, 60)


def run(net: gb.Network, loader: gb.Loader, opt: gb.Optimizer, **options: Any) -> gb.History:
    return gb.fit(net, loader, opt, epochs=2, validation=validation(), progress=False, **options)


def numbers(history: gb.History) -> np.ndarray:
    return np.concatenate([history.step_loss, history.loss, history.validation_loss, history.validation_accuracy])


# --- a batch in parts -----------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 500), st.integers(1, 500), st.sampled_from([1, 2]))
def test_parts_are_all_of_it_and_equal(n: int, most: int, least: int) -> None:
    rows = list(evenly(n, most, least))
    assert [i for part in rows for i in range(n)[part]] == list(range(n))
    sizes = [part.stop - part.start for part in rows]
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= min(least, n)
    assert max(sizes) <= most or len(rows) == max(1, n // least)


@pytest.mark.parametrize("rows", [1, 2, 5, 16, 47, 48, 100])
@pytest.mark.parametrize("layers", ["plain", "dropout"])
def test_micro_batches_give_the_gradients_of_the_batch(backend: gb.Backend, layers: str, rows: int) -> None:
    net, loader, _ = parts(layers, backend)
    twin = parts(layers, backend)[0]
    for x, y in loader:
        loss, grads = net.loss_and_grad(x, y)
        found, sums = twin.loss_and_grad(x, y, micro_batch_size=rows)
        assert found == pytest.approx(loss, rel=1e-13)
        np.testing.assert_allclose(backend.to_numpy(sums.flat), backend.to_numpy(grads.flat), rtol=1e-11, atol=1e-15)
        assert core_of(twin).dropout_step == core_of(net).dropout_step
    assert core_of(twin).planned <= rows


def test_batch_norm_takes_its_statistics_from_micro_batches() -> None:
    net, loader, _ = parts("batch norm")
    x, y = next(iter(loader))
    x[24:] += 3
    net.loss_and_grad(x, y, micro_batch_size=24)
    dense = net.parameters["W1"]
    expected = np.zeros(9)
    for half in (x[:24], x[24:]):
        expected = 0.9 * expected + 0.1 * (half @ dense).mean(0)
    np.testing.assert_allclose(net.buffers["running_mean1"], expected, rtol=1e-12)


def test_a_micro_batch_that_is_not_finite_changes_nothing() -> None:
    net, loader, _ = parts("batch norm")
    x, y = next(iter(loader))
    before, step = net.buffers.flat.copy(), core_of(net).dropout_step
    x[40] = np.inf
    with pytest.raises(gb.NonFiniteError):
        net.loss_and_grad(x, y, micro_batch_size=16)
    np.testing.assert_array_equal(net.buffers.flat, before)
    assert core_of(net).dropout_step == step
    assert core_of(net).mode.row == 0


def test_the_size_of_a_micro_batch_is_checked() -> None:
    net, loader, _ = parts()
    with pytest.raises(gb.ArgumentError, match="micro_batch_size must be"):
        net.loss_and_grad(*next(iter(loader)), micro_batch_size=0)


# --- refused --------------------------------------------------------------------------------------------------------


class From:
    """Refuses allocation ``number`` after the first batch was made, or after ``steps`` steps."""

    def __init__(self, refusal: Refusal, number: int, steps: int = 0) -> None:
        self.refusal, self.number, self.steps, self.begun = refusal, number, steps, False

    def augment(self, x: np.ndarray, draw: Any) -> np.ndarray:
        if self.steps == 0 and not self.begun:
            self.begin()
        return x

    def on_step(self, state: TrainingState) -> None:
        if state.step == self.steps and not self.begun:
            self.begin()

    def begin(self) -> None:
        self.begun = True
        self.refusal.refuse(self.number)


@contextlib.contextmanager
def told() -> Iterator[list[warnings.WarningMessage]]:
    """All warnings, also repeated ones."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        yield found


@pytest.fixture(autouse=True)
def collected() -> Iterator[None]:
    """Each halving collects garbage; collect that of earlier tests first."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def refusal() -> Iterator[Refusal]:
    with refusing() as found:
        yield found


@pytest.mark.parametrize(("layers", "window"), [("plain", None), ("plain", 40), ("dropout", None)])
def test_every_allocation_of_a_training_is_refused_once(refusal: Refusal, layers: str, window: int | None) -> None:
    expected_net, *others = parts(layers, window=window, augment=From(refusal, 0).augment)
    expected = run(expected_net, *others)
    total = refusal.count
    assert total > 50
    refusal.refuse(0)
    for number in range(1, total + 1):
        net, loader, opt = parts(layers, window=window, augment=From(refusal, number).augment)
        with told() as warned:
            history = run(net, loader, opt)
        refusal.refuse(0)
        assert [w.category for w in warned] == [MicroBatchWarning], number
        assert history.micro_batch_size == 32
        np.testing.assert_allclose(numbers(history), numbers(expected), rtol=1e-11)
        np.testing.assert_allclose(net.parameters.flat, expected_net.parameters.flat, rtol=1e-9, atol=1e-13)
        assert (opt.t, loader.epoch, loader.state_dict()["batch"]) == (6, 2, 0)
        assert core_of(net).dropout_step == 6


class Scarce(QueuedStandIn):
    """A device on which one allocation fails, with a kind of MemoryError, as in CuPy."""

    class OutOfMemoryError(MemoryError):
        pass

    count = refused = 0

    def empty(self, shape: Any, dtype: Any) -> Any:
        self.count += 1
        if self.count == self.refused:
            raise self.OutOfMemoryError("Out of memory allocating 123 bytes")
        return QueuedStandIn.empty(self, shape, dtype)


def on_a_device(refused: int) -> tuple[gb.Network, gb.History, Scarce]:
    for kept in (cuda_kernel, ops_for):  # by the number of the device
        kept.cache_clear()
    cupy = Scarce("late")
    device = StandInBackend(cupy, INDEX, "a test")
    net, loader, opt = parts("dropout", device, feed="host")
    cupy.count, cupy.refused = 0, refused
    return net, gb.fit(net, loader, opt, epochs=1, validation=validation(), progress=False), cupy


@pytest.mark.exhaustive
def test_every_allocation_on_a_device_is_refused_once() -> None:
    expected_net, expected_history, cupy = on_a_device(0)
    expected = expected_net.parameters.flat.get()
    total, first = cupy.count, None
    for number in range(1, total + 1):
        try:
            with told() as warned:
                net, history, cupy = on_a_device(number)
        except MemoryError:
            assert first is None, "before the first batch, and then no more"
            continue
        first = first or number
        assert [w.category for w in warned] == [MicroBatchWarning], number
        assert history.micro_batch_size == 32
        np.testing.assert_allclose(numbers(history), numbers(expected_history), rtol=1e-11)
        np.testing.assert_allclose(net.parameters.flat.get(), expected, rtol=1e-9, atol=1e-13)
    assert first is not None
    assert first < total - 5


def automatic(layers: str = "dropout") -> tuple[gb.Network, gb.Loader, gb.Optimizer]:
    rng = np.random.default_rng(5)
    net = gb.Network(LAYERS[layers](), backend="cpu", dtype="float64")
    loader = gb.Loader(rng.normal(size=(2500, 5)), rng.integers(0, 3, 2500), backend="cpu", dtype="float64")
    return net, loader, gb.Adam(net.parameters, lr=0.01)


def test_a_batch_size_that_was_chosen_is_a_size_that_was_run(refusal: Refusal, monkeypatch: pytest.MonkeyPatch) -> None:
    """If a trial fails at any allocation, half the size is tried, and nothing of either trial remains."""
    run, evaluated = [], []

    def noted(way: Any, rows: list[int]) -> Any:
        def seen(net: gb.Network, x: np.ndarray, *others: Any) -> Any:
            found = way(net, x, *others)
            rows.append(len(x))
            return found

        return seen

    monkeypatch.setattr(Core, "forward", noted(Core.forward, run))
    monkeypatch.setattr(gb.Network, "evaluate", noted(gb.Network.evaluate, evaluated))
    held_out = InMemory(*validation(), {}, 0)
    tried = []

    def settled(number: int) -> gb.Loader:
        net, loader, opt = automatic()
        opt.step(net.parameters.grads)
        before = [a.copy() for a in (net.parameters.flat, *(s.flat for s in opt.state.values()))]
        refusal.refuse(number)
        settle_batches(net, loader, opt, held_out)
        tried.append(refusal.count)
        refusal.refuse(0)
        for array, values in zip((net.parameters, *opt.state.values()), before, strict=True):
            np.testing.assert_array_equal(array.flat, values)
        assert (opt.t, core_of(net).dropout_step, loader.epoch, epochs_of(loader).automatic) == (1, 0, 0, True)
        return loader

    assert settled(0).batch_size == 512
    assert run == [512, 2500 % 512]
    assert evaluated == [60]
    for number in range(1, tried[0] + 1):
        run.clear()
        evaluated.clear()
        loader = settled(number)
        assert loader.batch_size == 256
        assert "a step of 512 samples was tried and memory ran out, so the batch is 256" in loader.plan.reason
        assert run[-2:] == [256, 2500 % 256]
        assert evaluated[-1:] == [60]


def test_where_no_size_can_be_run_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    net, loader, opt = automatic()

    def scarce(x: np.ndarray, y: np.ndarray) -> None:
        raise MemoryError("Unable to allocate 1.00 TiB")

    monkeypatch.setattr(core_of(net), "rehearse", scarce)
    with pytest.raises(gb.InsufficientMemoryError, match="no memory for a step of 1 samples: Unable to allocate"):
        gb.fit(net, loader, opt, progress=False)


def test_memory_that_does_not_come_back_ends_in_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    net, loader, opt = parts()
    tried = []

    def scarce(x: np.ndarray, y: np.ndarray, micro_batch_size: int | None) -> Any:
        tried.append(micro_batch_size)
        raise MemoryError("Unable to allocate 1.00 TiB")

    monkeypatch.setattr(net, "loss_and_grad", scarce)
    with pytest.raises(gb.InsufficientMemoryError, match=r"one sample at a time .* Unable to allocate 1.00 TiB"):
        run(net, loader, opt)
    assert tried == [None, 32, 16, 8, 4, 2, 1]
    assert opt.t == 0


def test_batch_norm_is_never_left_with_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    net, loader, opt = parts("batch norm")
    most = {"rows": 48}
    original = core_of(net).batch

    def scarce(x: np.ndarray, y: np.ndarray, *weights: Any) -> float:
        if len(x) > most["rows"]:
            raise MemoryError
        return original(x, y, *weights)

    monkeypatch.setattr(core_of(net), "batch", scarce)
    most["rows"] = 3
    with told() as warned:
        history = run(net, loader, opt)
    assert history.micro_batch_size == 2
    assert len(warned) == 1
    assert "batches of 48 are computed 2 samples at a time" in str(warned[0].message)
    assert warned[0].filename == __file__
    most["rows"] = 1
    with pytest.raises(gb.InsufficientMemoryError, match="not even 2 samples"):
        run(net, loader, opt)


def test_the_size_is_kept_in_checkpoints(tmp_path: Path, refusal: Refusal) -> None:
    """A run resumed after memory ran out ends as the uninterrupted run, to the last bit."""

    def scarce() -> tuple[gb.Network, gb.Loader, gb.Optimizer]:
        return parts("dropout", augment=From(refusal, 3).augment)

    net, loader, opt = scarce()
    with pytest.warns(MicroBatchWarning):
        expected = gb.fit(net, loader, opt, epochs=3, progress=False)
    first, *others = scarce()
    with pytest.warns(MicroBatchWarning):
        gb.fit(first, *others, epochs=1, progress=False, checkpoint=tmp_path)
    again, loader, opt = parts("dropout", augment=lambda x, draw: x)
    with told() as warned:
        history = gb.fit(again, loader, opt, epochs=3, progress=False, checkpoint=tmp_path, resume=True)
    assert not warned
    assert history.micro_batch_size == 32
    assert history.step_loss == expected.step_loss
    np.testing.assert_array_equal(again.parameters.flat, net.parameters.flat)


CHILD = """
import resource, warnings
import numpy as np
import gpubatch as gb
from gpubatch.nn import core_of
from gpubatch.ops import host_library

if not isinstance(host_library(), str):
    host_library().set_threads(1)  # the stacks of threads are address space, too
X, Y = np.random.default_rng(0).random((1 << 15, 8), np.float32), np.arange(1 << 15) % 3
net = gb.mlp([8, 1 << 10, 3], backend="cpu")
loader = gb.Loader(X, Y, batch_size=1 << 14, backend="cpu", prefetch=0)
opt = gb.Adam(net.parameters, lr=1e-3)
net.loss_and_grad(X[:64], Y[:64])  # BLAS has its buffers
core_of(net).release()
pages = int(open("/proc/self/statm").read().split()[0])
room = net.memory(1 << 13) + (32 << 20)
assert room < net.memory(1 << 14)
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + room, resource.RLIM_INFINITY))
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    history = gb.fit(net, loader, opt, epochs=1, progress=False)
print(history.micro_batch_size, len(history.step_loss), opt.t, [w.category.__name__ for w in told])
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ulimit -v is Linux's")
def test_a_limit_of_the_process_is_met_with_micro_batches() -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split(maxsplit=3) == ["8192", "2", "2", "['FewStepsWarning', 'MicroBatchWarning']\n"]
