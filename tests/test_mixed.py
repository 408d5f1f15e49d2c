"""Networks that store float16 and compute in float32, and the loss scale that keeps their gradients from vanishing."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from families import every
from needs import peer
from stand_in import INDEX, StandIn, StandInBackend
from stand_in_lt import StandInLt

import gpubatch as gb
from gpubatch.backend import Array, Backend
from gpubatch.nn import OF_LABELS, Context, Layer, Needs, Parameter, core_of
from gpubatch.ops import cuda_kernel, ops_for
from gpubatch.ops.products import LtProducts
from gpubatch.train import TrainingState
from gpubatch.train.eager import EagerSteps
from gpubatch.train.loss_scale import LARGEST
from gpubatch.train.record import Record

HALF = np.dtype(np.float16)

STACKS: dict[str, Callable[[], list[Layer]]] = {
    "plain": lambda: [gb.Dense(12, 16), gb.ReLU(), gb.Dense(16, 5)],
    "norm and dropout": lambda: [
        *(gb.Dense(12, 16, bias=False), gb.BatchNorm(16), gb.GELU(), gb.Dropout(0.2), gb.Dense(16, 5))
    ],
    "others": lambda: [gb.Tanh(), gb.Dense(12, 16), gb.LeakyReLU(0.1), gb.Sigmoid(), gb.Dense(16, 5, bias=False)],
}
LOSSES = [*OF_LABELS, "sigmoid_cross_entropy", "mse"]
every_stack = pytest.mark.parametrize("stack", STACKS)
every_loss = pytest.mark.parametrize("loss", LOSSES)


def data(rng: np.random.Generator, loss: str, rows: int = 40) -> tuple[np.ndarray, np.ndarray]:
    """X, exact in float16 but stored as float32, and Y."""
    X = rng.standard_normal((rows, 12)).astype(HALF).astype(np.float32)
    if loss in ("sigmoid_cross_entropy", "mse"):
        return X, rng.random((rows, 5)).astype(np.float32)
    return X, rng.integers(0, 5, rows)


def twins(layers: Callable[[], list[Layer]], backend: Any = "cpu", **options: Any) -> tuple[gb.Network, gb.Network]:
    """A mixed network, and a float32 one with the same parameters."""
    mixed = gb.Network(layers(), backend=backend, precision="mixed", **options)
    full = gb.Network(layers(), backend="cpu", **options)
    for name, value in mixed.parameters.items():
        full.parameters[name] = mixed.backend.to_numpy(value)
    return mixed, full


def on(net: gb.Network, X: np.ndarray, Y: np.ndarray) -> tuple[Array, Array]:
    return net.backend.asarray(X, net.dtype), net.backend.asarray(Y)


def distance(found: Any, right: Any) -> float:
    """The norm of the difference, relative."""
    found, right = (np.asarray(a, np.float64) for a in (found, right))
    return float(np.linalg.norm(found - right) / np.linalg.norm(right))


def stand_in(products: str = "CuPy") -> StandInBackend:
    for kept in (cuda_kernel, ops_for):  # by the number of the device
        kept.cache_clear()
    backend = StandInBackend(StandIn(), INDEX, "a test")
    if products == "cuBLASLt":
        backend.cupy.nvmath = StandInLt(backend.cupy)
    return backend


# --- the network -----------------------------------------------------------------------------------------------------


def test_what_is_stored_as_float16() -> None:
    net = gb.Network(STACKS["norm and dropout"](), backend="cpu", precision="mixed")
    assert (net.dtype, net.compute_dtype, net.precision) == (HALF, np.float32, "mixed")
    assert net.parameters.flat.dtype == net.parameters.grads.flat.dtype == HALF
    assert net.buffers.flat.dtype == net.loss_scale.dtype == np.float32
    assert net.loss_scale.tolist() == [1]
    assert "precision='mixed'" in repr(net)
    full = gb.Network(STACKS["norm and dropout"](), backend="cpu")
    assert full.loss_scale is None
    own, others = net.memory_parts(256), full.memory_parts(256)
    for name in ("parameters", "gradients"):
        assert 2 * own[name] == others[name]
    assert own["workspace of a step"] < 0.75 * others["workspace of a step"]
    twin = copy.deepcopy(net)
    assert (twin.dtype, twin.precision) == (HALF, "mixed")
    np.testing.assert_array_equal(twin.parameters.flat, net.parameters.flat)


@every_stack
@every_loss
def test_loss_and_gradients_are_those_of_float32(
    stack: str, loss: str, backend: Backend, rng: np.random.Generator
) -> None:
    net, full = twins(STACKS[stack], backend, loss=loss, l2=0.01, seed=3)
    X, Y = data(rng, loss)
    right, expected = full.loss_and_grad(X, Y)
    with backend.scope():
        net.loss_scale.fill(256)
    value, grads = net.loss_and_grad(*on(net, X, Y))
    assert value == pytest.approx(right, rel=2e-3)
    for name in expected:
        found = backend.to_numpy(grads[name]).astype(np.float64) / 256
        assert distance(found, expected[name]) < 0.01, name
    assert net.evaluate(*on(net, X, Y))[0] == pytest.approx(full.evaluate(X, Y)[0], rel=2e-3)
    for name, value in full.buffers.items():
        np.testing.assert_allclose(backend.to_numpy(net.buffers[name]), value, rtol=2e-3, atol=1e-4)


@every("stack", [*STACKS], ["norm and dropout"])
@every("loss", LOSSES, ["mse"])
@pytest.mark.parametrize("products", ["CuPy", "cuBLASLt"])
def test_cuda_and_cpu_agree_to_the_rounding_of_float16(
    products: str, stack: str, loss: str, rng: np.random.Generator
) -> None:
    """With the real kernels, on the emulated grid."""
    X, Y = data(rng, loss)
    nets = [
        gb.Network(STACKS[stack](), loss, 0.01, backend, seed=3, precision="mixed")
        for backend in ("cpu", stand_in(products))
    ]
    assert isinstance(core_of(nets[1]).products, LtProducts) == (products == "cuBLASLt")
    found = []
    for net in nets:
        net.loss_scale.fill(64)
        value, grads = net.loss_and_grad(*on(net, X, Y))
        found.append((value, net.backend.to_numpy(grads.flat).astype(np.float64), net.loss(*on(net, X, Y))))
    (value, grads, after), (other_value, other_grads, other_after) = found
    assert (value, after) == pytest.approx((other_value, other_after), rel=1e-3)
    assert distance(other_grads, grads) < 2e-3
    np.testing.assert_allclose(
        nets[1].backend.to_numpy(nets[1].buffers.flat), nets[0].buffers.flat, rtol=1e-3, atol=1e-5
    )


def test_scores_are_float32_and_predictions_as_ever(rng: np.random.Generator) -> None:
    net, full = twins(STACKS["plain"])
    X, Y = data(rng, "softmax_cross_entropy")
    x = X.astype(HALF)
    scores = net.scores(x)
    assert scores.dtype == np.float32
    assert distance(scores, full.scores(X)) < 1e-3
    np.testing.assert_array_equal(net.predict(x), scores.argmax(axis=1))
    assert net.accuracy(x, Y) == net.evaluate(x, Y)[1] == np.mean(scores.argmax(axis=1) == Y)


def test_a_state_goes_from_one_precision_to_the_other() -> None:
    mixed, full = (gb.Network(STACKS["norm and dropout"](), backend="cpu", precision=p) for p in ("mixed", "full"))
    full.buffers.flat[:] = 1 / 3
    mixed.load_state_dict(full.state_dict())
    np.testing.assert_array_equal(mixed.parameters.flat, full.parameters.flat.astype(HALF))
    np.testing.assert_array_equal(mixed.buffers.flat, full.buffers.flat)  # not rounded
    full.load_state_dict(mixed.state_dict())
    np.testing.assert_array_equal(full.parameters.flat, mixed.parameters.flat)


def test_small_gradients_vanish_without_a_scale_and_with_one_do_not(rng: np.random.Generator) -> None:
    net, full = twins(lambda: [gb.Dense(12, 5)], loss="mse")
    X, Y = data(rng, "mse")
    X *= 1e-3
    Y = full.scores(X) + (1e-4 * rng.standard_normal(Y.shape)).astype(np.float32)
    _, expected = full.loss_and_grad(X, Y)
    assert np.abs(expected["W1"]).max() < 2.0**-25  # half of the smallest number of float16
    assert not net.loss_and_grad(*on(net, X, Y))[1]["W1"].any()
    net.loss_scale.fill(LARGEST)
    _, grads = net.loss_and_grad(*on(net, X, Y))
    assert np.isfinite(grads.flat).all()
    assert np.count_nonzero(grads["W1"]) > 0.9 * grads["W1"].size


def test_micro_batches_are_added_up_in_float32(rng: np.random.Generator) -> None:
    net, full = twins(STACKS["plain"], l2=0.01)
    X, Y = data(rng, "softmax_cross_entropy", 400)
    right, expected = full.loss_and_grad(X, Y, 3)
    net.loss_scale.fill(1024)
    value, grads = net.loss_and_grad(*on(net, X, Y), 3)
    assert value == pytest.approx(right, rel=2e-3)
    # Of 134 gradients, each rounded, the sum is nearer than any of them; in float16 it would be off by more.
    assert distance(grads.flat.astype(np.float64) / 1024, expected.flat) < 5e-4


class Scale(Layer):
    """A user's layer: x times a learnt factor for each feature."""

    def takes(self) -> None:
        """Any number of features."""

    def needs(self, features: int) -> Needs:
        return Needs(features, {"s": Parameter((features,), 1.0)}, kept={"t": ((-1, features), None)})

    def forward(self, x: Array, y: Array, c: Context) -> None:
        c.xp.multiply(x, c.p["s"], out=y)

    def backward(self, x: Array, y: Array, dy: Array, dx: Array | None, c: Context) -> None:
        c.g["s"][...] = c.xp.multiply(dy, x, out=c.work["t"]).sum(axis=0, dtype=np.float32)
        if dx is not None:
            c.xp.multiply(dy, c.p["s"], out=dx)


def test_a_layer_of_ones_own(rng: np.random.Generator) -> None:
    net, full = twins(lambda: [gb.Dense(12, 8), Scale(), gb.Dense(8, 5)])
    X, Y = data(rng, "softmax_cross_entropy")
    net.loss_scale.fill(64)
    _, expected = full.loss_and_grad(X, Y)
    _, grads = net.loss_and_grad(*on(net, X, Y))
    assert distance(grads.flat.astype(np.float64) / 64, expected.flat) < 0.01


# --- the loss scale --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interval", [1, 3, 7])
def test_the_scale_goes_up_and_down_as_pytorchs_does(interval: int, rng: np.random.Generator) -> None:
    torch = peer("torch")
    theirs = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=interval)
    ours = gb.LossScale(2.0**12, interval)
    w = torch.nn.Parameter(torch.zeros(3))
    opt = torch.optim.SGD([w], lr=0.0)
    seen = set()
    # Overflows are as frequent as keeps the scale within our bounds: theirs has none.
    for bad in rng.random(300) < 1 / (interval + 1):
        if ours.value in (1, LARGEST):
            break
        theirs.scale(w.sum()).backward()
        if bad:
            w.grad[1] = torch.inf
        theirs.step(opt)
        theirs.update()
        opt.zero_grad()
        if bad:
            assert ours.overflow()
        else:
            ours.good()
        assert ours.value == theirs.get_scale()
        seen.add(ours.value)
    assert len(seen) > 3


def test_its_bounds() -> None:
    scale = gb.LossScale(2.0, 5)
    assert scale.overflow()
    assert not scale.overflow()  # at 1 it is not to blame
    assert scale.value == 1
    scale = gb.LossScale(LARGEST / 2, 2)
    assert scale.room == 2
    scale.good(2)
    scale.good(2)
    assert (scale.value, scale.room) == (LARGEST, 2)
    scale.good()
    assert scale.overflow()
    assert (scale.value, scale.room) == (LARGEST / 2, 2)  # and counts anew
    assert gb.LossScale().value == 65536
    assert gb.LossScale().growth_interval == 2000


def test_its_state() -> None:
    scale, other = gb.LossScale(64.0, 10), gb.LossScale()
    scale.good(7)
    other.load_state_dict(json.loads(json.dumps(scale.state_dict())))
    assert (other.value, other.good_steps) == (64, 7)
    short = gb.LossScale(growth_interval=3)
    short.load_state_dict(scale.state_dict())
    short.good()
    assert short.value == 128
    with pytest.raises(gb.ArgumentError, match="state must have value and good_steps, got"):
        scale.load_state_dict({"value": 1.0})


# --- training --------------------------------------------------------------------------------------------------------


def parts(
    rng: np.random.Generator, stack: str = "norm and dropout", backend: Any = "cpu", rows: int = 200, **options: Any
) -> tuple[gb.Network, gb.Loader, gb.Optimizer]:
    X, Y = data(rng, "softmax_cross_entropy", rows)
    net = gb.Network(STACKS[stack](), backend=backend, precision="mixed", seed=2, **options)
    loader = gb.Loader(X, Y, batch_size=20, backend=backend, dtype="float16")
    return net, loader, gb.Adam(net.parameters, 1e-2, master_weights=True)


def everything(net: gb.Network, opt: gb.Optimizer) -> list[Any]:
    state = opt.state_dict()
    arrays = [value for views in state["state"].values() for value in views.values()]
    kept = net.state_dict()
    arrays += [*kept["parameters"].values(), *kept["buffers"].values()]
    return [state["t"], kept["dropout_step"], *(net.backend.to_numpy(a).tobytes() for a in arrays)]


@pytest.mark.exhaustive
def test_a_run_learns_as_one_in_float32(backend: Backend) -> None:
    (X, Y), held_out = gb.datasets.mnist_10k()
    accuracy = {}
    for precision in ("full", "mixed"):
        net = gb.mlp([784, 32, 10], batch_norm=True, dropout=0.1, l2=1e-4, backend=backend, precision=precision, seed=1)
        opt = gb.Adam(net.parameters, master_weights=precision == "mixed")
        loader = gb.Loader(X, Y, batch_size=64, backend=backend, dtype=net.dtype, scale=1 / 255)
        history = gb.fit(net, loader, opt, 2, held_out, progress=False)
        accuracy[precision] = history.validation_accuracy[-1]
        assert history.skipped == 0
    assert accuracy["full"] > 0.87
    assert abs(accuracy["mixed"] - accuracy["full"]) < 0.01


def test_a_run_on_cuda_follows_the_cpu(rng: np.random.Generator) -> None:
    """With the real kernels; Adam's step may have either sign where a gradient is near zero."""
    X, Y = data(rng, "softmax_cross_entropy", 60)
    found = []
    for backend in ("cpu", stand_in()):
        net = gb.Network(STACKS["plain"](), backend=backend, precision="mixed", seed=2)
        opt = gb.SGD(net.parameters, 0.1, master_weights=True)
        loader = gb.Loader(X, Y, batch_size=20, backend="cpu", dtype="float16")
        scale = gb.LossScale(2.0**10, 2)
        eager = EagerSteps(Record(TrainingState(net, loader, opt, gb.History(), 0, 0), scale), max_norm=1.0)
        with eager.scaling():
            losses = [eager.step(*(net.backend.asarray(a) for a in batch)).loss for batch in loader]
        found.append((losses, net.backend.to_numpy(opt.state["master"].flat), scale.value))
    (losses, w, scale), (other_losses, other_w, other_scale) = found
    assert scale == other_scale == 2**11
    np.testing.assert_allclose(other_losses, losses, rtol=1e-3)
    np.testing.assert_allclose(other_w, w, atol=2e-4)


def test_a_gradient_that_overflows_leaves_all_as_it_was(rng: np.random.Generator) -> None:
    net, loader, opt = parts(rng)
    gb.fit(net, loader, opt, 1, progress=False)
    before = everything(net, opt)
    state = TrainingState(net, loader, opt, gb.History(), 0, 0)
    record = Record(state, gb.LossScale(LARGEST))
    eager = EagerSteps(record, max_skipped=0)
    x, y = next(iter(loader))
    with eager.scaling():
        result = eager.step(x, y).result  # a warning would be an error
        assert result is None
        assert everything(net, opt) == before
        assert record.scale is not None
        assert record.scale.value == net.loss_scale[0] == LARGEST / 2
        assert (state.history.overflows, state.history.skipped, record.skipped_in_a_row) == (1, 0, 0)
        while eager.step(x, y).result is None:
            assert everything(net, opt) == before
    assert everything(net, opt) != before
    assert state.history.overflows > 1
    assert net.loss_scale[0] == 1


def test_the_scale_does_not_change_what_is_learnt(rng: np.random.Generator) -> None:
    """With powers of two, and gradients that neither overflow nor vanish, the bits are equal."""
    seeds = rng.integers(2**32, size=2)
    found = []
    for initial, interval in ((16.0, 1000), (256.0, 1000), (8.0, 3)):
        net, loader, opt = parts(np.random.default_rng(seeds), rows=200)
        history = gb.fit(net, loader, opt, 1, progress=False, loss_scale=gb.LossScale(initial, interval), max_norm=1.0)
        assert history.loss_scale == [initial * (1 if interval == 1000 else 8)]
        assert history.overflows == 0
        found.append((np.array(history.step_loss), opt.state["master"].flat))
    for losses, w in found[1:]:
        np.testing.assert_allclose(losses, found[0][0], rtol=1e-3)
        assert distance(w, found[0][1]) < 1e-2


def test_max_norm_is_for_the_gradient_of_the_loss_itself(rng: np.random.Generator) -> None:
    X, Y = data(rng, "softmax_cross_entropy", 20)
    for max_norm, scale in (
        (0.01, 2.0**10),
        (0.01, 1.0),
        (50.0, 2.0**10),
    ):  # the last one: only the scaled part is longer
        net = gb.Network(STACKS["plain"](), backend="cpu", precision="mixed", seed=2)
        opt = gb.SGD(net.parameters, 1.0, master_weights=True)
        loader = gb.Loader(X, Y, batch_size=20, backend="cpu", dtype="float16", shuffle=False)
        before = opt.state["master"].flat.copy()
        _, grads = net.loss_and_grad(X.astype(HALF), Y)
        norm = float(np.linalg.norm(grads.flat.astype(np.float64)))
        gb.fit(net, loader, opt, 1, progress=False, max_norm=max_norm, loss_scale=gb.LossScale(scale))
        moved = float(np.linalg.norm(opt.state["master"].flat - before))
        assert moved == pytest.approx(min(norm, max_norm), rel=2e-3)


@pytest.mark.filterwarnings("ignore::gpubatch.SkippedStepWarning")
def test_what_no_scale_mends_is_left_out_as_ever(rng: np.random.Generator) -> None:
    """A gradient that is not finite at scale 1; a loss that is not finite at any scale."""
    net, loader, opt = parts(rng, "plain")
    X, Y = next(iter(loader))
    state = TrainingState(net, loader, opt, gb.History(), 0, 0)
    record = Record(state, gb.LossScale(1.0))
    eager = EagerSteps(record, max_skipped=1)
    net.parameters["W2"][...] = 0
    net.parameters["W2"][0, 0], net.parameters["W2"][0, 1] = 6e4, -6e4  # y is small, but its factors are large
    net.parameters["W1"][...], net.parameters["b1"][...] = 0, 2.0**-14
    X[...] = 6e4
    assert eager.step(X, Y).result is None
    assert (state.history.skipped, state.history.overflows) == (1, 0)
    net.parameters["b2"][0] = np.inf
    record.scale = gb.LossScale()
    with pytest.raises(gb.NonFiniteError, match="the parameters hold NaN or infinity"):
        eager.step(X, Y)
    assert record.scale.value == 65536


def test_a_run_goes_on_where_it_was_saved(tmp_path: Path, rng: np.random.Generator) -> None:
    """In the middle of an epoch; scale and steps since its last change are equal too, bit for bit."""
    seeds = rng.integers(2**32, size=2)
    runs = []
    for stops in ([], [13, 17]):
        folder = tmp_path / str(len(stops))
        for stop in [*stops, None]:
            net, loader, opt = parts(np.random.default_rng(seeds))

            class Stop:
                def on_step(self, state: TrainingState, stop: int | None = stop) -> None:
                    if state.step == stop:
                        raise gb.StopTraining

            saved = gb.Checkpoints(folder, every=1)
            scale = gb.LossScale(LARGEST, 5)
            history = gb.fit(net, loader, opt, 3, None, [Stop()], saved, True, False, loss_scale=scale)
        kept = {name: value for name, value in history.to_dict().items() if name != "seconds"}
        runs.append((everything(net, opt), kept, scale.state_dict()))
    assert runs[0] == runs[1]
    assert runs[0][1]["overflows"] > 0
    assert len(runs[0][1]["loss_scale"]) == 3
    json.dumps(runs[0][1])


def test_micro_batches_after_memory_ran_out_have_the_scale_too(rng: np.random.Generator) -> None:
    seeds = rng.integers(2**32, size=2)
    weights = []
    for rows in (None, 8):
        net, loader, _ = parts(np.random.default_rng(seeds), "plain")
        opt = gb.SGD(net.parameters, 0.1, master_weights=True)
        state = TrainingState(net, loader, opt, gb.History(micro_batch_size=rows), 0, 0)
        eager = EagerSteps(Record(state, gb.LossScale(2.0**8)))
        with eager.scaling():
            for x, y in loader:
                assert eager.step(x, y).result is not None
        weights.append(opt.state["master"].flat.copy())
    assert distance(weights[1], weights[0]) < 1e-3


def test_float16_batches(backend: Backend, rng: np.random.Generator) -> None:
    """Rounded once, after a product in float32, on every way to the network."""
    stored = rng.integers(0, 60000, (50, 7)).astype(np.uint16)
    scale = 1 / 60000
    right = (stored.astype(np.float32) * np.float32(scale)).astype(HALF)
    for X, axis in ((stored, 0), (np.asfortranarray(stored), 0), (np.ascontiguousarray(stored.T), 1)):
        loader = gb.Loader(
            X, np.arange(50), 16, shuffle=False, backend=backend, dtype="float16", scale=scale, sample_axis=axis
        )
        for x, y in loader:
            index = backend.to_numpy(y)
            assert (x.dtype, y.dtype) == (HALF, np.int64)
            found = backend.to_numpy(x)
            np.testing.assert_array_equal(found if axis == 0 else found.T, right[index])
        held_out = loader.to_batch(X)
        np.testing.assert_array_equal(backend.to_numpy(held_out), right if axis == 0 else right.T)


class FromMemory:
    """A user's source."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __len__(self) -> int:
        return len(self.array)

    def read(self, index: np.ndarray) -> np.ndarray:
        return self.array[index]


def test_what_float16_cannot_hold_is_told(rng: np.random.Generator) -> None:
    for kind in ("float32", "int32"):
        X = np.ones((30, 3), kind)
        X[17, 1] = 81920
        load = lambda X, **more: gb.Loader(X, np.arange(30), 10, backend="cpu", dtype="float16", **more)  # noqa: E731
        with pytest.raises(gb.NonFiniteError, match=r"X\[17, 1\] is 81920.0, beyond the range of float16"):
            load(X)
        with pytest.raises(gb.NonFiniteError, match=r"sample 17 has 81920.0 at \[1\], beyond the range"):
            list(load(FromMemory(X)))
        for source in (X, FromMemory(X)):
            assert sum(float(x.max()) for x, _ in load(source, scale=0.5)) == 40960 + 2 * 0.5
    X = np.full((30, 3), 255, np.uint8)
    assert next(iter(load(X)))[0][0, 0] == 255  # nothing to look for


def test_bad_arguments(rng: np.random.Generator) -> None:
    net, loader, opt = parts(rng)
    full = gb.Network(STACKS["plain"](), backend="cpu")
    X, Y = data(rng, "softmax_cross_entropy")
    wide = gb.Loader(X, Y, batch_size=20, dtype="float32", backend="cpu")
    for call, error, message in (
        (
            lambda: gb.mlp([4, 3], backend="cpu", precision="mixed", dtype="float64"),
            gb.ArgumentError,
            "dtype must be float32 with precision='mixed', which computes in it, got 'float64'",
        ),
        (
            lambda: net.loss_and_grad(X, Y),
            gb.DTypeError,
            r"X has dtype float32, the network stores float16; .*astype\('float16'\)",
        ),
        (
            lambda: gb.fit(net, loader, gb.Adam(net.parameters), progress=False),
            gb.ArgumentError,
            "opt must keep the float16 parameters in float32, too.*: make it with master_weights=True",
        ),
        (
            lambda: gb.fit(net, wide, opt, progress=False),
            gb.ArgumentError,
            "loader makes float32 batches, net stores float16; give the loader dtype='float16'",
        ),
        (
            lambda: gb.fit(full, wide, gb.Adam(full.parameters), progress=False, loss_scale=gb.LossScale()),
            gb.ArgumentError,
            "loss_scale is for a network with precision='mixed', this one has 'full'",
        ),
        (
            lambda: gb.fit(net, loader, opt, progress=False, loss_scale=2.0),  # type: ignore[arg-type]
            gb.DTypeError,
            "loss_scale must be a gpubatch.LossScale, got float",
        ),
        (lambda: gb.LossScale(3.0), gb.ArgumentError, r"initial must be a power of two from 1 to 2\*\*24, got 3.0"),
        (lambda: gb.LossScale(2.0**25), gb.ArgumentError, "initial must be finite and in"),
        (lambda: gb.LossScale(growth_interval=0), gb.ArgumentError, "growth_interval must be an integer >= 1, got 0"),
        (
            lambda: gb.loss_slice(net, X.astype(HALF), Y),
            gb.ArgumentError,
            "net must not have precision='mixed' here: .*precision='full'",
        ),
    ):
        with pytest.raises(error, match=message):
            call()


def loaded(path: Path, other: gb.Network, net: gb.Network) -> None:
    gb.save(path, other)
    gb.load(path, into=net)


# Ways in which something else than the optimizer changes the float16 parameters after it was made.
CHANGED: dict[str, Callable[[gb.Network, gb.Network, Path], Any]] = {
    "load_state_dict": lambda net, other, folder: net.load_state_dict(other.state_dict()),
    "gb.load": lambda net, other, folder: loaded(folder / "m.safetensors", other, net),
    "in place": lambda net, other, folder: net.parameters.flat.__setitem__(..., other.parameters.flat),
    "one": lambda net, other, folder: net.parameters.__setitem__("W1", other.parameters["W1"]),
}


@every("change", CHANGED, ["load_state_dict"])
@pytest.mark.parametrize("place", ["fit", "step", "loop", "callback", "after each step"])
def test_weights_that_are_loaded_are_not_lost(
    change: Any, place: str, backend: Backend, rng: np.random.Generator, tmp_path: Path
) -> None:
    """With a learning rate of 0 they stay; the float32 copies of the others keep what float16 cannot hold."""
    net, loader, opt = parts(rng, "norm and dropout", backend)
    other = gb.Network(STACKS["norm and dropout"](), backend=backend, precision="mixed", seed=9)
    gb.fit(net, loader, opt, 1, progress=False)
    copies = opt.state["master"].flat.copy()
    seen: list[Array] = []

    def changing(state: Any = None) -> None:
        if not seen:
            change(net, other, tmp_path)
            seen.append(net.parameters.flat.copy())

    with net.backend.scope():
        kept = copies.astype(np.float16)
    opt.lr = 0.0
    if place == "callback":
        gb.fit(net, loader, opt, 2, callbacks=[changing], progress=False)
    elif place == "after each step":
        watching = SimpleNamespace(on_step=changing)
        gb.fit(net, loader, opt, 1, callbacks=[watching], progress=False)
    else:
        if place == "loop":
            opt.step()
        changing()
        if place == "fit":
            gb.fit(net, loader, opt, 1, progress=False)
        else:
            if place == "step":
                opt.load_state_dict(opt.state_dict())
            opt.step()
    now, master = net.parameters.flat, opt.state["master"].flat
    assert bool((now == seen[0]).all())
    assert bool((master[now == kept] == copies[now == kept]).all())
    with net.backend.scope():
        assert bool((master.astype(np.float16) == now).all())
