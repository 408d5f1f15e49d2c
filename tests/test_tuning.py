"""Algorithms of matrix products that are chosen by their time: which one, that it stays, and a copy for Hopper."""

from __future__ import annotations

import copy
import gc
from pathlib import Path
from typing import Any

import emulated_gpu
import numpy as np
import pytest
from emulate import ORDERS, check_compiles_everywhere, sanitized
from emulated_gpu import blas
from stand_in import found_by_its_arrays, parameters_of, queued_backend
from stand_in_lt import StandInLt, cuBLASLtError
from test_products import REASONS, exact, gpu, numbers

import gpubatch as gb
from gpubatch.backend import CudaBackend
from gpubatch.errors import ArgumentError, BackendUnavailableError, DTypeError, TuningWarning
from gpubatch.formula import activations
from gpubatch.nn import core_of
from gpubatch.ops import IDENTITY, products, source_of
from gpubatch.ops.products import COPY, LtProducts, Plan, products_for

RELU = activations.relu.bind()
SIZES = [40, 32, 5]


def stand_in(*costs: float, **options: Any) -> CudaBackend:
    """A device with an algorithm for each of ``costs``, in milliseconds."""
    backend = queued_backend("late")
    backend.cupy.nvmath = StandInLt(backend.cupy, costs=costs, **options)
    return backend


@pytest.fixture(params=["stand-in", pytest.param("cuda:0", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> CudaBackend:
    """A device with several algorithms."""
    if request.param != "stand-in":
        return gpu()
    found = stand_in(3, 1, 2)
    found_by_its_arrays(monkeypatch, lambda: found)
    return found


def tuned(backend: CudaBackend, precision: str = "full", largest: int = 40 * 32) -> LtProducts:
    made = products_for(backend, np.dtype(np.float32), precision, True, largest)
    assert isinstance(made, LtProducts), made.reason
    return made


def arrays(backend: CudaBackend) -> list[Any]:
    return [numbers(backend, shape, "float32", seed=i) for i, shape in enumerate([(20, 40), (40, 32), (32,), (20, 32)])]


def batch(net: gb.Network, rows: int = 20) -> tuple[Any, Any]:
    rng = np.random.default_rng(rows)
    X, Y = rng.standard_normal((rows, SIZES[0])).astype(np.float32), rng.integers(0, SIZES[-1], rows)
    return net.backend.asarray(X), net.backend.asarray(Y)


def take(monkeypatch: pytest.MonkeyPatch, wanted: Any) -> list[list[tuple[bool, int]]]:
    """Make the last candidate with ``wanted(copied, number)`` win; returns the list of candidates."""
    asked = []

    def fastest(self: LtProducts, found: list[tuple[Plan, int]], at: Any) -> Plan:
        asked.append([(plan.transpose is not None, number) for plan, number in found])
        plan, number = [candidate for candidate, kind in zip(found, asked[-1], strict=True) if wanted(*kind)][-1]
        plan.choose(number)
        return plan

    monkeypatch.setattr(LtProducts, "_fastest", fastest)
    return asked


def last(copied: bool, number: int) -> bool:
    return not copied


# --- which one -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("costs", "best"), [((3, 1, 2), 1), ((1, 3, 2), 0), ((1.02, 1.0), 0), ((1.05, 1.0), 1), ((2,) * 7 + (1, 0.1), 7)]
)
def test_the_fastest_is_taken_and_noise_changes_nothing(costs: tuple[float, ...], best: int) -> None:
    """Of eight algorithms."""
    backend = stand_in(*costs)
    made, lt = tuned(backend), backend.cupy.nvmath
    x, W, b, y = arrays(backend)
    for call in (
        lambda: made.multiply(x, W, y),
        lambda: made.affine(RELU, x, W, b, y),
        lambda: made.weight_gradient(x, y.copy(), W, b),
    ):
        call()
        backend.synchronize()
        before = backend.cupy.clock
        call()
        backend.synchronize()
        assert backend.cupy.clock - before == pytest.approx(costs[best])
    assert lt.calls["heuristic"] == 3
    assert len(made.choices()["algorithms"]) == 3
    assert backend.cupy.faults == []


@pytest.mark.gpu
def test_the_emulated_device_is_timed_by_its_events() -> None:
    """All algorithms but the third take two milliseconds."""
    device = gpu()
    if emulated_gpu.installed() is None:
        pytest.skip("the speed of a real GPU's algorithms cannot be set")
    switches = blas.switches()
    before = switches["microseconds"].copy()
    try:
        switches["microseconds"][...] = 2000
        switches["microseconds"][2] = 0
        made = tuned(device)
        x, W, _, y = arrays(device)
        with device.scope():
            made.multiply(x, W, y)
    finally:
        switches["microseconds"][...] = before
    (choice,) = made.choices()["algorithms"].values()
    assert np.frombuffer(bytes.fromhex(choice), np.uint64)[2] == 2


def test_results_are_right_whatever_is_chosen(device: CudaBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    x, W, b, y = arrays(device)
    dW, db = device.empty(W.shape, np.float32), device.empty(b.shape, np.float32)
    affine = exact(x) @ exact(W) + exact(b)
    for wanted in (None, last, lambda copied, number: number == 0):
        if wanted is not None:
            take(monkeypatch, wanted)
        made = tuned(device)
        with device.scope():
            for _ in range(2):
                made.multiply(x, W, y)
                np.testing.assert_allclose(exact(y), exact(x) @ exact(W), rtol=1e-4, atol=1e-4)
                if made.affine(RELU, x, W, b, y):
                    np.testing.assert_allclose(exact(y), np.maximum(affine, 0), rtol=1e-4, atol=1e-4)
                if made.affine(IDENTITY, x, W, b, y):
                    np.testing.assert_allclose(exact(y), affine, rtol=1e-4, atol=1e-4)
                if made.weight_gradient(x, y, dW, db):
                    np.testing.assert_allclose(exact(dW), exact(x).T @ exact(y), rtol=1e-4, atol=1e-3)
                    np.testing.assert_allclose(exact(db), exact(y).sum(axis=0), rtol=1e-4, atol=1e-4)


def test_without_it_the_heuristic_is_asked_for_one_and_nothing_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = stand_in(3, 1, 2)
    monkeypatch.setattr(CudaBackend, "milliseconds", lambda *_: pytest.fail("something was timed"))
    made = products_for(backend, np.dtype(np.float32), "full")
    x, W, _, y = arrays(backend)
    made.multiply(x, W, y)
    backend.synchronize()
    assert backend.cupy.clock == 3
    assert made.choices() == {}
    assert "products" not in gb.mlp(SIZES, backend=backend).state_dict()


def test_one_algorithm_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = stand_in(3)
    monkeypatch.setattr(CudaBackend, "milliseconds", lambda *_: pytest.fail("something was timed"))
    made = tuned(backend)
    x, W, _, y = arrays(backend)
    made.multiply(x, W, y)
    assert len(made.choices()["algorithms"]) == 1


def test_an_algorithm_that_fails_or_hides_something_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = stand_in(3, 1, 2, 4)
    lt, launch, shows = backend.cupy.nvmath, Plan.launch, LtProducts._shows_nan

    def failing(self: Plan, *at: int) -> None:
        if self.number == 1:
            raise cuBLASLtError("CUBLAS_STATUS_NOT_SUPPORTED")
        launch(self, *at)

    monkeypatch.setattr(Plan, "launch", failing)
    monkeypatch.setattr(
        LtProducts, "_shows_nan", lambda self, plan, *rest: shows(self, plan, *rest) and plan.number != 2
    )
    asked = take(monkeypatch, last)
    made = tuned(backend)
    x, W, b, y = arrays(backend)
    made.multiply(x, W, y)
    assert made.affine(RELU, x, W, b, y)
    assert asked == [[(False, 0), (False, 2), (False, 3)], [(False, 0), (False, 3)]]
    lt.lacks = ("BIAS",)
    assert not made.affine(IDENTITY, x, W, b, y)
    assert len(made.choices()["algorithms"]) == 2


def test_after_the_choice_nothing_is_made(device: CudaBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    net = gb.mlp(SIZES, backend=device, tune=True)
    X, Y = batch(net)
    net.loss_and_grad(X, Y)
    chosen = core_of(net).products.choices()
    assert chosen["library"] == core_of(net).products.reason
    monkeypatch.setattr(Plan, "__init__", lambda *_: pytest.fail("a plan was made"))
    monkeypatch.setattr(CudaBackend, "milliseconds", lambda *_: pytest.fail("something was timed"))
    net.loss_and_grad(X, Y)
    assert core_of(net).products.choices() == chosen


# --- that it stays ---------------------------------------------------------------------------------------------------


def test_a_state_has_what_was_chosen(device: CudaBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network that loads it computes the same bits, tuned or not, and saves the choices again."""
    take(monkeypatch, last)
    net = gb.mlp(SIZES, backend=device, tune=True)
    X, Y = batch(net)
    loss, grads = net.loss_and_grad(X, Y)
    bits = device.to_numpy(grads.flat).tobytes()
    state = net.state_dict()
    assert state["products"]["algorithms"]
    monkeypatch.setattr(LtProducts, "_fastest", lambda *_: pytest.fail("something was chosen anew"))
    for tune in (True, False):
        other = gb.mlp(SIZES, backend=device, seed=1, tune=tune)
        other.load_state_dict(state)
        assert other.loss_and_grad(X, Y)[0] == loss
        assert device.to_numpy(other.parameters.grads.flat).tobytes() == bits
        assert other.state_dict()["products"] == state["products"]
    plain = gb.mlp(SIZES, backend=device)
    assert plain.loss_and_grad(X, Y)[0] == pytest.approx(loss, rel=1e-5)
    assert device.to_numpy(plain.parameters.grads.flat).tobytes() != bits
    plain.load_state_dict(state)  # its earlier plans had other algorithms
    assert plain.loss_and_grad(X, Y)[0] == loss
    assert device.to_numpy(plain.parameters.grads.flat).tobytes() == bits
    assert copy.deepcopy(net).state_dict()["products"] == state["products"]


def test_what_was_forgotten_is_made_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "PLANS_KEPT", 1)
    backend = stand_in(3, 1, 2)
    made = tuned(backend)
    x, W, b, y = arrays(backend)
    made.multiply(x, W, y)
    chosen = made.choices()
    made.affine(IDENTITY, x, W, b, y)
    monkeypatch.setattr(LtProducts, "_fastest", lambda *_: pytest.fail("something was chosen anew"))
    made.multiply(x, W, y)
    assert chosen["algorithms"].items() <= made.choices()["algorithms"].items()
    del made
    gc.collect()
    assert backend.cupy.nvmath.alive == 0


@pytest.mark.parametrize("execution", ["captured", "eager"])
def test_a_resumed_run_has_the_same_bits(
    device: CudaBackend, execution: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if another algorithm is the fastest on that day."""
    rng = np.random.default_rng(0)
    X, Y = rng.standard_normal((70, SIZES[0])).astype(np.float32), rng.integers(0, SIZES[-1], 70)

    def run(epochs: int, folder: Path | None) -> bytes:
        net = gb.mlp(SIZES, backend=device, tune=True)
        loader = gb.Loader(X, Y, batch_size=20, backend=device)
        options = {} if folder is None else {"checkpoint": folder, "resume": True}
        gb.fit(net, loader, gb.Adam(net.parameters), epochs, execution=execution, validation=(X, Y), **options)
        return device.to_numpy(net.parameters.flat).tobytes()

    take(monkeypatch, last)
    whole = run(3, None)
    run(1, tmp_path)
    take(monkeypatch, lambda copied, number: number == 0)
    assert run(3, tmp_path) == whole
    assert run(3, None) != whole


def test_what_was_chosen_elsewhere_is_said_and_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = stand_in(3, 1, 2)
    net = gb.mlp(SIZES, backend=backend, tune=True)
    net.loss_and_grad(*batch(net))
    state = net.state_dict()
    for name, other in (("library", "cuBLASLt 11.0.0"), ("device", "another card")):
        elsewhere = {**state, "products": {**state["products"], name: other}}
        fresh = gb.mlp(SIZES, backend=backend)
        with pytest.warns(TuningWarning, match=f"chosen with .*{other}.*this is cuBLASLt 12.9.3 on stand-in"):
            fresh.load_state_dict(elsewhere)
        assert core_of(fresh).products.choices() == {}
    with pytest.warns(TuningWarning, match="products are not cuBLASLt's: they are not used"):
        gb.mlp(SIZES, backend="cpu", tune=True).load_state_dict(
            {**state, "parameters": {k: backend.to_numpy(v) for k, v in state["parameters"].items()}}
        )


def test_an_algorithm_that_is_no_longer_there_is_said_and_chosen_anew() -> None:
    backend = stand_in(3, 1, 2)
    net = gb.mlp(SIZES, backend=backend, tune=True)
    net.loss_and_grad(*batch(net))
    state = net.state_dict()
    algorithms = state["products"]["algorithms"]
    name = next(name for name in algorithms if "RELU_BIAS" in name)
    for wrong in ("0" * 128, COPY + algorithms[name]):
        fresh = gb.mlp(SIZES, backend=backend, tune=True)
        fresh.load_state_dict({**state, "products": {**state["products"], "algorithms": {**algorithms, name: wrong}}})
        with pytest.warns(TuningWarning, match="RELU_BIAS .* cannot be used any more"):
            fresh.loss_and_grad(*batch(fresh))
        assert core_of(fresh).products.choices() == state["products"]


def test_choices_are_checked_before_anything_is_taken_over() -> None:
    backend = stand_in(3, 1)
    net = gb.mlp(SIZES, backend=backend)
    good = {"library": "", "device": "", "algorithms": {}}
    for bad, error, words in (
        (7, DTypeError, "products must be a mapping, got int"),
        ({}, ArgumentError, "must hold library, device, algorithms"),
        ({**good, "more": 1}, ArgumentError, "must hold library, device, algorithms"),
        ({**good, "device": 1}, ArgumentError, "must hold library, device, algorithms"),
        ({**good, "algorithms": {"a": "0" * 126}}, ArgumentError, "64 bytes as hexadecimal digits, a is '00"),
        ({**good, "algorithms": {"a": 1}}, ArgumentError, "64 bytes as hexadecimal digits, a is 1"),
    ):
        with pytest.raises(error, match=words):
            net.load_state_dict({**gb.mlp(SIZES, backend=backend, seed=3).state_dict(), "products": bad})
    with pytest.raises(DTypeError, match="tune must be True or False"):
        gb.mlp(SIZES, backend=backend, tune="yes")
    assert "tune=True" in repr(gb.mlp(SIZES, backend="cpu", tune=True))


@pytest.mark.parametrize("case", REASONS)
def test_without_the_library_it_cannot_be_had(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    error, words = REASONS[case]
    backend = stand_in(1)

    def library(name: str) -> Any:
        raise error

    monkeypatch.setattr(backend, "library", library)
    with pytest.raises(BackendUnavailableError) as caught:
        gb.mlp(SIZES, backend=backend, tune=True)
    assert str(caught.value).startswith(f"tune=True cannot be had on 'cuda:99': {words}.")


# --- a copy for Hopper -----------------------------------------------------------------------------------------------


def hopper(device: CudaBackend) -> CudaBackend:
    if device.capability != products.HOPPER:
        pytest.skip("this is no Hopper")
    return device


def test_where_a_copy_of_the_weights_is_tried(device: CudaBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only for x W in TF32: the other products have suitable layouts, or would need two copies."""
    asked = take(monkeypatch, last)
    x, W, b, y = arrays(hopper(device))
    for precision in ("fast", "full"):
        made = tuned(device, precision)
        with device.scope():
            copied = {}
            for name, call in (
                ("x W", lambda made=made: made.multiply(x, W, y)),
                ("f(x W + b)", lambda made=made: made.affine(RELU, x, W, b, y)),
                ("dy Wᵀ", lambda made=made: made.multiply(y, W.T, x)),
                ("xᵀ dy", lambda made=made: made.multiply(x.T, y, W)),
                ("both", lambda made=made: made.weight_gradient(x, y, W, b)),
            ):
                asked.clear()
                call()
                copied[name] = any(is_copy for is_copy, _ in asked[0]) if asked else None
        fast = precision == "fast"
        assert copied == {"x W": fast, "f(x W + b)": fast, "dy Wᵀ": False, "xᵀ dy": False, "both": False}
        workspace = products.WORKSPACE[True]
        assert made.memory_parts() == {"matrix products": workspace + 4 * 40 * 32 * fast}
    assert not any(is_copy for is_copy, _ in asked[0])


@pytest.mark.parametrize("capability", [8, 10])
def test_other_devices_have_no_copy(capability: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CudaBackend, "capability", capability)
    backend = stand_in(1, 2)
    asked = take(monkeypatch, last)
    x, W, _, y = arrays(backend)
    made = tuned(backend, "fast")
    made.multiply(x, W, y)
    assert asked == [[(False, 0), (False, 1)]]
    assert made.memory_parts() == {"matrix products": products.WORKSPACE[capability >= 9]}


@pytest.mark.parametrize("how", ["C", "wide", "offset"])
@pytest.mark.parametrize("shape", [(1, 1), (33, 31), (64, 32), (100, 130)])
def test_a_product_with_the_copy(
    device: CudaBackend, shape: tuple[int, int], how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copy is refreshed from W before each product, in a graph too."""
    take(monkeypatch, lambda copied, number: copied)
    made = tuned(hopper(device), "fast", shape[0] * shape[1])
    x, W = numbers(device, (17, shape[0]), "float32"), numbers(device, shape, "float32", how)
    b, y = numbers(device, (shape[1],), "float32"), device.empty((17, shape[1]), np.float32)
    with device.scope(), device.own_stream():
        for scale in (1, 3):
            W *= scale
            made.multiply(x, W, y)
            np.testing.assert_allclose(exact(y), exact(x) @ exact(W), rtol=2e-3, atol=0.05)
            if made.affine(RELU, x, W, b, y):
                right = np.maximum(exact(x) @ exact(W) + exact(b), 0)
                np.testing.assert_allclose(exact(y), right, rtol=2e-3, atol=0.05)
        made.multiply(x, W, y)
        before = device.to_numpy(y).tobytes()
        graph = device.capture(lambda: made.multiply(x, W, y))
        y.fill(0)
        graph.launch()
        assert device.to_numpy(y).tobytes() == before
    assert all(choice.startswith(COPY) for choice in made.choices()["algorithms"].values())


def test_a_network_with_copies(device: CudaBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    """``parameters`` is unchanged; the plan counts the copy; a network that loads the state makes it too."""
    take(monkeypatch, lambda copied, number: True)
    net = gb.mlp(SIZES, backend=hopper(device), precision="fast", tune=True)
    assert net.memory_parts(20)["matrix products"] == products.WORKSPACE[True] + 4 * 40 * 32
    X, Y = batch(net)
    loss, grads = net.loss_and_grad(X, Y)
    assert net.parameters["W1"].shape == (40, 32)
    right = gb.mlp(SIZES, backend="cpu")
    right_loss, right_grads = right.loss_and_grad(device.to_numpy(X), device.to_numpy(Y))
    assert loss == pytest.approx(right_loss, rel=1e-2)
    np.testing.assert_allclose(device.to_numpy(grads.flat), right_grads.flat, atol=5e-3)
    state = net.state_dict()
    assert sum(choice.startswith(COPY) for choice in state["products"]["algorithms"].values()) == 2
    other = gb.mlp(SIZES, backend=device, precision="fast")
    assert other.memory_parts(20)["matrix products"] == products.WORKSPACE[True]
    other.load_state_dict(state)
    assert other.memory_parts(20) == net.memory_parts(20)
    assert other.loss_and_grad(X, Y)[0] == loss
    assert device.to_numpy(other.parameters.grads.flat).tobytes() == device.to_numpy(grads.flat).tobytes()


# --- the kernel ------------------------------------------------------------------------------------------------------


def test_the_kernel_compiles_for_real_architectures() -> None:
    for (report,) in check_compiles_everywhere(source_of("float32", "transpose.cu")):
        assert report.registers <= 64


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("shape", [(1, 1), (1, 70), (33, 1), (32, 64), (65, 95)])
def test_the_kernel_transposes(shape: tuple[int, int], order: str) -> None:
    """Under the sanitizers, for a matrix with strided rows."""
    source, (rows, columns), apart = source_of("float32", "transpose.cu"), shape, shape[1] + 3
    x = np.random.default_rng(0).standard_normal((rows, apart)).astype(np.float32)
    given = x.reshape(-1)[: (rows - 1) * apart + columns]
    out = np.full((columns, rows), np.nan, np.float32)
    blocks = -(-rows // 32) * -(-columns // 32)
    sizes = np.int64(rows), np.int64(columns), np.int64(apart)
    arguments = [np.ascontiguousarray(given), out, *sizes]
    _, found = sanitized(source, "transpose", parameters_of(source, "transpose"), arguments, blocks, 256, order)
    np.testing.assert_array_equal(found, x[:, :columns].T)
