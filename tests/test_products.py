"""Matrix products: what cuBLASLt is asked for, on a stand-in that does exactly that; its real descriptors; a GPU."""

from __future__ import annotations

import copy
import ctypes
import gc
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from needs import missing
from stand_in import INDEX, TIMINGS, AnyDevice, DeviceArray, StandIn, StandInBackend, queued_backend
from stand_in_lt import (
    ComputeType,
    CudaDataType,
    Epilogue,
    MatmulDescAttribute,
    MatmulPreferenceAttribute,
    StandInLt,
)

import gpubatch as gb
from gpubatch.backend import CudaBackend, available_backends, get_backend
from gpubatch.errors import ArgumentError, BackendUnavailableError
from gpubatch.formula import activations
from gpubatch.nn import core_of
from gpubatch.ops import IDENTITY, cuda_kernel, ops_for, products
from gpubatch.ops.products import PRECISIONS, WORKSPACE, ArrayProducts, LtProducts, by_columns, products_for
from gpubatch.train.resume import check_same_network

RELU = activations.relu.bind()
DTYPES = ["float64", "float32", "float16"]


def stand_in(lacks: tuple[str, ...] = (), **options: Any) -> StandInBackend:
    for kept in (cuda_kernel, ops_for):  # by the number of the device
        kept.cache_clear()
    backend = StandInBackend(StandIn(), INDEX, "a test")
    backend.cupy.nvmath = StandInLt(backend.cupy, lacks, **options)
    return backend


def lt_products(backend: CudaBackend, dtype: str = "float32", precision: str = "full") -> LtProducts:
    made = products_for(backend, np.dtype(dtype), precision)
    assert isinstance(made, LtProducts), made.reason
    return made


@pytest.fixture(params=["stand-in", pytest.param("cuda:0", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> CudaBackend:
    """A device with cuBLASLt: the stand-in, or a GPU with nvmath-python."""
    return stand_in() if request.param == "stand-in" else gpu()


def gpu() -> CudaBackend:
    if "cuda:0" not in available_backends():
        missing("gpu", "no CUDA device can be used here")
    backend = get_backend("cuda:0")
    if not (found := products_for(backend, np.dtype("float32"), "full")).capturable:
        missing("nvmath", found.reason)
    return backend


def numbers(backend: CudaBackend, shape: tuple[int, ...], dtype: str, order: str = "C", seed: int = 0) -> Any:
    x = np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)
    if order == "F":
        return backend.asarray(np.ascontiguousarray(x.T)).T
    if order == "wide":  # columns of a wider array
        whole = np.full((shape[0], shape[1] + 3), np.nan, dtype)
        whole[:, : shape[1]] = x
        return backend.asarray(whole)[:, : shape[1]]
    if order == "offset":  # badly aligned
        whole = backend.asarray(np.concatenate([[np.nan], x.ravel()]).astype(dtype))
        return whole[1:].reshape(shape)
    return backend.asarray(x)


def exact(x: Any) -> np.ndarray:
    return (x.get() if hasattr(x, "get") else x).astype(np.float64)


def assert_close(found: Any, a: np.ndarray, b: np.ndarray, right: np.ndarray, dtype: str) -> None:
    """Within a rounding of the arithmetic per term, and some of the dtype, relative to the terms' sum of sizes."""
    arithmetic = np.finfo("float64" if dtype == "float64" else "float32").eps
    eps = a.shape[1] * float(arithmetic) + 2 * float(np.finfo(dtype).eps)
    bound = eps * (np.abs(a) @ np.abs(b) + np.abs(right)) + float(np.finfo(dtype).smallest_subnormal)
    assert (np.abs(exact(found) - right) <= bound).all()


# --- products --------------------------------------------------------------------------------------------------------

LIKE = st.sampled_from(["C", "F", "wide", "offset"])


@settings(max_examples=150, deadline=None)
@given(
    shape=st.tuples(*[st.integers(1, 9)] * 3),
    orders=st.tuples(LIKE, LIKE),
    dtype=st.sampled_from(DTYPES),
)
def test_products_of_all_shapes_and_orders(shape: tuple[int, int, int], orders: tuple[str, str], dtype: str) -> None:
    check_multiply(stand_in(), shape, orders, dtype)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(LIKE, LIKE, st.integers(0, 3), st.integers(0, 3), st.booleans()), min_size=2, max_size=6),
    st.sampled_from(DTYPES),
)
def test_a_plan_serves_what_it_was_made_for(calls: list[Any], dtype: str) -> None:
    """Arrays of the same shapes with other strides or alignments, in turn."""
    backend = stand_in()
    made = lt_products(backend, dtype)
    vectors, outs = numbers(backend, (7,), dtype), backend.empty((3 + 5 * 4,), dtype)
    for like_a, like_b, place_of_vector, place_of_out, biased in calls:
        a, b = numbers(backend, (5, 3), dtype, like_a), numbers(backend, (3, 4), dtype, like_b)
        vector = vectors[place_of_vector:][:4]
        out = outs[place_of_out:][:20].reshape(5, 4)
        if biased:
            assert made.affine(IDENTITY, a, b, vector, out)
        else:
            made.multiply(a, b, out)
        assert_close(out, exact(a), exact(b), exact(a) @ exact(b) + (exact(vector) if biased else 0), dtype)
    # And no product was left to NumPy.
    assert made.library.lt.launches.count("DEFAULT") == sum(not biased for *_, biased in calls)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(128, 784, 512), (33, 7, 10), (1, 5, 3), (5, 1, 1), (257, 300, 129)])
@pytest.mark.parametrize("orders", [("C", "C"), ("F", "C"), ("C", "F"), ("wide", "offset")])
def test_products_on_a_device(
    device: CudaBackend, shape: tuple[int, int, int], orders: tuple[str, str], dtype: str
) -> None:
    check_multiply(device, shape, orders, dtype)


def check_multiply(backend: CudaBackend, shape: tuple[int, int, int], orders: tuple[str, str], dtype: str) -> None:
    m, k, n = shape
    made = lt_products(backend, dtype)
    a, b = numbers(backend, (m, k), dtype, orders[0], 1), numbers(backend, (k, n), dtype, orders[1], 2)
    out = backend.empty((m, n), dtype)
    with backend.scope():
        made.multiply(a, b, out)
    assert_close(out, exact(a), exact(b), exact(a) @ exact(b), dtype)
    if isinstance(made.library.lt, StandInLt):
        assert made.library.lt.launches == ["DEFAULT"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["identity", "relu"])
@pytest.mark.parametrize("shape", [(128, 784, 512), (33, 7, 10), (1, 5, 3)])
def test_bias_and_activation_with_the_product(
    device: CudaBackend, shape: tuple[int, int, int], kind: str, dtype: str
) -> None:
    m, k, n = shape
    made = lt_products(device, dtype)
    x, W = numbers(device, (m, k), dtype), numbers(device, (k, n), dtype, "offset")
    b, y = numbers(device, (n,), dtype), device.empty((m, n), dtype)
    with device.scope():
        if not made.affine(getattr(activations, kind).bind(), x, W, b, y):
            assert not isinstance(made.library.lt, StandInLt)
            pytest.skip("this device has no such kernel")
    right = exact(x) @ exact(W) + exact(b)
    if kind == "relu":
        right = np.maximum(right, 0)
    assert_close(y, exact(x), exact(W), right, dtype)
    if isinstance(made.library.lt, StandInLt):
        assert made.library.lt.launches[-1] == {"identity": "BIAS", "relu": "RELU_BIAS"}[kind]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(128, 784, 512), (33, 7, 10), (1, 5, 3)])
def test_the_gradient_of_the_bias_with_the_product(
    device: CudaBackend, shape: tuple[int, int, int], dtype: str
) -> None:
    m, k, n = shape
    made = lt_products(device, dtype)
    x, dy = numbers(device, (m, k), dtype), numbers(device, (m, n), dtype, seed=1)
    dW, db = device.empty((k, n), dtype), device.empty((n,), dtype)
    with device.scope():
        if not made.weight_gradient(x, dy, dW, db):
            assert not isinstance(made.library.lt, StandInLt)
            pytest.skip("this device has no such kernel")
    assert_close(dW, exact(x).T, exact(dy), exact(x).T @ exact(dy), dtype)
    assert_close(db, np.ones((1, m)), exact(dy), exact(dy).sum(axis=0), dtype)
    if isinstance(made.library.lt, StandInLt):
        assert made.library.lt.launches == ["BGRADA"] * 2  # the first is a trial


def test_fast_is_tf32(device: CudaBackend) -> None:
    a, b = numbers(device, (64, 96), "float32", seed=1), numbers(device, (96, 80), "float32", seed=2)
    found = {}
    for precision in PRECISIONS:
        out = device.empty((64, 80), "float32")
        with device.scope():
            lt_products(device, "float32", precision).multiply(a, b, out)
        found[precision] = exact(out)
    right, size = exact(a) @ exact(b), np.abs(exact(a)) @ np.abs(exact(b))
    error = {name: float((np.abs(out - right) / size).max()) for name, out in found.items()}
    assert error["full"] < 1e-6
    assert 1e-5 < error["fast"] < 1e-3


def test_float64_and_the_cpu_know_no_other_precision(rng: np.random.Generator) -> None:
    assert products.COMPUTE["float64", "fast"] == products.COMPUTE["float64", "full"]
    X, Y = rng.standard_normal((9, 5)).astype(np.float32), rng.integers(0, 3, 9)
    nets = [gb.mlp([5, 4, 3], backend="cpu", precision=precision) for precision in PRECISIONS]
    assert len({net.loss_and_grad(X, Y)[1].flat.tobytes() for net in nets}) == 1


def test_nan_goes_through(device: CudaBackend) -> None:
    """A ReLU that turned NaN into 0 would hide it."""
    made = lt_products(device)
    x, W, b = (numbers(device, shape, "float32") for shape in ((4, 3), (3, 5), (5,)))
    x[2] = np.nan
    y = device.empty((4, 5), "float32")
    with device.scope():
        for f in (IDENTITY, RELU):
            if made.affine(f, x, W, b, y):
                np.testing.assert_array_equal(np.isnan(exact(y)).all(axis=1), [False, False, True, False])
                assert not np.isnan(exact(y)[[0, 1, 3]]).any()


@pytest.mark.parametrize(
    ("fault", "used"), [({"relu_of_nan": False}, [IDENTITY]), ({"whole_bias": False}, []), ({}, [IDENTITY, RELU])]
)
def test_an_epilogue_that_hides_nan_is_tried_once_and_not_used(fault: dict[str, bool], used: list[Any]) -> None:
    backend = stand_in(**fault)
    made = lt_products(backend)
    x, W, b, y = (numbers(backend, shape, "float32") for shape in ((4, 3), (3, 5), (5,), (4, 5)))
    for f, epilogue in ((IDENTITY, "BIAS"), (RELU, "RELU_BIAS")):
        launches = made.library.lt.launches = []
        for _ in range(3):
            assert made.affine(f, x, W, b, y) is (f in used)
        assert launches == [epilogue] * (1 + 3 * (f in used))


@pytest.mark.parametrize("used", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_that_leave_something_out_are_tried_once_and_not_used(used: bool, dtype: str) -> None:
    backend = stand_in(whole_sums=used)
    made = lt_products(backend, dtype)
    launches = made.library.lt.launches
    for rows in (4, 3001):  # which is 3000 in float16
        x, dy, dW, db = (numbers(backend, shape, dtype) for shape in ((rows, 3), (rows, 5), (3, 5), (5,)))
        launches.clear()
        for _ in range(3):
            assert made.weight_gradient(x, dy, dW, db) is (used or (rows, dtype) == (3001, "float16"))
        assert launches == ["BGRADA"] * (4 if used or (rows, dtype) == (3001, "float16") else 1)
    strided = numbers(backend, (4, 10), dtype)[:, :5]
    assert not made.weight_gradient(numbers(backend, (4, 3), dtype), strided, dW, db)


# --- arrays that do not fit ------------------------------------------------------------------------------------------


def test_what_the_library_lacks_is_asked_for_once_and_declined() -> None:
    backend = stand_in(lacks=("BIAS", "RELU_BIAS", "BGRADA"))
    made = lt_products(backend)
    x, W, b, y = (numbers(backend, shape, "float32") for shape in ((4, 3), (3, 5), (5,), (4, 5)))
    before = y.copy()
    for _ in range(3):
        assert not made.affine(IDENTITY, x, W, b, y)
        assert not made.affine(RELU, x, W, b, y)
        assert not made.weight_gradient(x, y, W, b)
        assert made.library.lt.calls["heuristic"] == 3
    assert not made.affine(activations.tanh.bind(), x, W, b, y)
    np.testing.assert_array_equal(y, before)
    assert made.library.lt.launches == []
    gc.collect()
    assert made.library.lt.alive == 1  # the handle


def in_records(x: Any, record: np.dtype) -> Any:
    """The same numbers, in rows whose stride is no multiple of an element."""
    records = np.zeros(len(x), record)
    records["row"] = x
    return records["row"].view(DeviceArray)


STRANGE = {
    "every other column": lambda x: x[:, ::2],
    "upside down": lambda x: x[::-1],
    "one row for all": lambda x: np.broadcast_to(x[:1], x.shape).view(DeviceArray),
    "of another dtype": lambda x: x.astype(np.float64),
    "integers": lambda x: x.astype(np.int32),
    "in records": lambda x: in_records(x, np.dtype([("row", np.float32, x.shape[1]), ("more", np.uint8, 2)])),
}


@pytest.mark.parametrize("strange", STRANGE)
def test_arrays_that_the_library_cannot_read_go_to_the_namespace(strange: str) -> None:
    backend = stand_in()
    made = lt_products(backend)
    a = STRANGE[strange](numbers(backend, (6, 8), "float32"))
    b = numbers(backend, (a.shape[1], 3), "float32")
    out = backend.empty((6, 3), "float64" if a.dtype == "float64" else "float32")
    made.multiply(a, b, out)
    np.testing.assert_allclose(out, a @ b, rtol=1e-5)
    assert made.library.lt.launches == []


@pytest.mark.parametrize("order", ["F", "wide"])
def test_a_product_that_is_not_in_one_piece_goes_to_the_namespace(order: str) -> None:
    backend = stand_in()
    made = lt_products(backend)
    a, b = numbers(backend, (6, 8), "float32"), numbers(backend, (8, 6), "float32")
    out, vector = numbers(backend, (6, 6), "float32", order), numbers(backend, (6,), "float32")
    made.multiply(a, b, out)
    np.testing.assert_allclose(out, a @ b, rtol=1e-5)
    assert not made.affine(IDENTITY, a, b, vector, out)
    assert made.library.lt.launches == []


@pytest.mark.parametrize("first", [True, False])
def test_arrays_that_do_not_fit_are_not_launched(first: bool) -> None:
    """Neither as the first arrays, nor after arrays that fit."""
    backend = stand_in()
    made = lt_products(backend)
    x, W, b, y = (numbers(backend, shape, "float32") for shape in ((4, 3), (3, 5), (5,), (4, 5)))
    if not first:
        assert made.affine(IDENTITY, x, W, b, y)
    before = made.library.lt.launches.copy()
    poor = b[:4], numbers(backend, (10,), "float32")[::2], b.astype(np.int32)
    for arrays in [(x, x, b, y), (x, W, b, y[:3]), *((x, W, vector, y) for vector in poor)]:
        assert not made.affine(IDENTITY, *arrays)
    assert made.library.lt.launches == before
    assert made.affine(IDENTITY, x, W, b, y)
    before = made.library.lt.launches.copy()
    with pytest.raises(ValueError, match="mismatch"):
        made.multiply(x, x, y)
    assert made.library.lt.launches == before


@settings(max_examples=200, deadline=None)
@given(shape=st.tuples(st.integers(1, 4), st.integers(1, 4)), extra=st.tuples(st.integers(0, 2), st.integers(0, 2)))
def test_what_is_seen_by_columns_is_the_array_or_its_transpose(shape: Any, extra: Any) -> None:
    whole = np.arange(float((shape[0] + extra[0]) * (shape[1] + extra[1]))).reshape(shape[0] + extra[0], -1)
    for x in (whole[: shape[0], : shape[1]], whole[: shape[0], : shape[1]].T):
        seen = by_columns(x, np.dtype("float64"))
        assert seen is not None
        flat = np.ndarray(1 << 10, "u1", (ctypes.c_ubyte * (1 << 10)).from_address(x.ctypes.data))
        columns = [
            [flat[8 * (j * seen.stride + i) :][:8].view("f8")[0] for i in range(seen.rows)] for j in range(seen.columns)
        ]
        np.testing.assert_array_equal(np.array(columns).T if seen.transposed else np.array(columns), x)


# --- costs -----------------------------------------------------------------------------------------------------------


def test_after_the_first_time_nothing_is_made() -> None:
    backend = queued_backend("late")
    lt = backend.cupy.nvmath = StandInLt(backend.cupy)
    made = lt_products(backend)
    arrays = [backend.empty(shape, "float32") for shape in ((8, 3), (3, 5), (5,), (8, 5))]

    def all_of_them() -> None:
        x, W, b, y = arrays
        made.multiply(x, W, y)
        made.affine(IDENTITY, x, W, b, y)
        made.affine(RELU, x, W, b, y)
        made.weight_gradient(x, y, W, b)

    all_of_them()
    backend.synchronize()
    seen, used = dict(lt.calls), backend.cupy.used
    assert seen["heuristic"] == 4
    backend.cupy.empty = lambda *_: pytest.fail("memory was taken")
    waiting = backend.cupy.null.given
    all_of_them()
    assert dict(lt.calls) == seen
    assert backend.cupy.null.given == waiting + 4  # and none of it done
    assert backend.cupy.null.done == waiting
    assert backend.cupy.used == used


def test_another_vector_is_another_attribute_and_no_other_plan() -> None:
    backend = stand_in()
    made, lt = lt_products(backend), backend.cupy.nvmath
    x, W, y = (numbers(backend, shape, "float32") for shape in ((4, 3), (3, 8), (4, 8)))
    biases = numbers(backend, (2, 8), "float32", seed=3)
    plain = x @ W
    for i in (0, 1, 1, 0):
        assert made.affine(IDENTITY, x, W, biases[i], y)
        np.testing.assert_allclose(y, plain + biases[i], rtol=1e-5, atol=1e-6)
    assert lt.calls["heuristic"] == 1


def test_descriptors_go_with_their_network() -> None:
    backend = stand_in()
    lt = backend.cupy.nvmath
    made = lt_products(backend)
    made.multiply(*(numbers(backend, shape, "float32") for shape in ((4, 3), (3, 5), (4, 5))))
    assert lt.alive == 6  # handle, operation, three layouts, preference
    del made
    gc.collect()
    assert lt.alive == 0


def test_plans_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "PLANS_KEPT", 3)
    backend = stand_in()
    made = lt_products(backend)
    for rows in range(1, 9):
        a, b = numbers(backend, (rows, 3), "float32"), numbers(backend, (3, 2), "float32")
        made.multiply(a, b, out := backend.empty((rows, 2), "float32"))
        np.testing.assert_allclose(out, a @ b, rtol=1e-5, atol=1e-6)
    gc.collect()
    assert backend.cupy.nvmath.alive == 1 + 3 * 5


@pytest.mark.parametrize(
    ("capability", "size"), [("75", 4 << 20), ("89", 4 << 20), ("90", 32 << 20), ("120", 32 << 20)]
)
def test_the_workspace_is_in_the_plan(capability: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "WORKSPACE", WORKSPACE)  # the real size; other tests use a smaller one
    backend = stand_in()
    backend.cupy.cuda.Device = lambda index: AnyDevice(index, capability)
    net = gb.mlp([5, 4, 3], backend=backend)
    assert net.memory_parts(8)["matrix products"] == size
    assert net.memory(8) == sum(net.memory_parts(8).values())
    net.step_loss(numbers(backend, (8, 5), "float32"), backend.asarray(np.zeros(8, np.int64)))
    assert backend.cupy.nvmath.most_workspace == size


# --- the choice ------------------------------------------------------------------------------------------------------


def test_the_cpu_multiplies_by_numpy() -> None:
    made = products_for(get_backend("cpu"), np.dtype("float32"), "full")
    assert isinstance(made, ArrayProducts)
    assert (made.capturable, made.memory_parts()) == (False, {})
    assert made.reason == "the CPU has no graphs to capture"


def test_with_the_library_products_can_be_captured() -> None:
    made = lt_products(stand_in())
    assert (made.capturable, made.reason) == (True, "cuBLASLt 12.9.3")


REASONS = {
    "not installed": (
        ModuleNotFoundError("No module named 'nvmath'", name="nvmath"),
        "nvmath-python is not installed",
    ),
    "of another version": (
        ModuleNotFoundError("No module named 'cuda.core.experimental'", name="cuda.core.experimental"),
        "cuBLASLt cannot be loaded (No module named 'cuda.core.experimental')",
    ),
    "libraries missing": (
        RuntimeError("Failed to dlopen libcublasLt\nand more"),
        "cuBLASLt cannot be loaded (Failed to dlopen libcublasLt)",
    ),
}


@pytest.mark.parametrize("case", REASONS)
def test_without_the_library_products_are_cupys_and_say_why(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    error, words = REASONS[case]
    backend = stand_in()

    def library(name: str) -> Any:
        raise error

    monkeypatch.setattr(backend, "library", library)
    net = gb.mlp([5, 4, 3], backend=backend)
    assert isinstance(core_of(net).products, ArrayProducts)
    assert not core_of(net).products.capturable
    assert (
        core_of(net).products.reason
        == f"{words}: pip install 'gpubatch[cuda13]' (CUDA 13) or 'gpubatch[cuda12]' (CUDA 12)"
    )
    with pytest.raises(BackendUnavailableError) as caught:
        gb.mlp([5, 4, 3], backend=backend, precision="fast")
    assert caught.value.cause == ("not installed" if case == "not installed" else "libraries missing")
    assert str(caught.value) == (
        f"precision='fast' cannot be had on 'cuda:99': {words}. "
        "Remedy: pip install 'gpubatch[cuda13]' (CUDA 13) or 'gpubatch[cuda12]' (CUDA 12)."
    )


def test_precision_is_checked_and_kept() -> None:
    with pytest.raises(
        ArgumentError, match=r"precision must be one of 'full', 'fast', 'mixed', got 'fats'; did you mean 'fast'\?$"
    ):
        gb.mlp([5, 3], backend="cpu", precision="fats")
    net = gb.mlp([5, 3], backend="cpu", precision="fast")
    assert (net.precision, copy.deepcopy(net).precision) == ("fast", "fast")
    assert gb.Network([gb.Dense(5, 3)], backend="cpu").precision == "full"
    assert net.state_dict().keys() == gb.mlp([5, 3], backend="cpu").state_dict().keys()


def test_checkpoints_from_before_there_was_a_choice_are_in_full() -> None:
    check_same_network({"seed": 1}, {"seed": 1, "precision": "full"})
    with pytest.raises(ArgumentError, match="whose precision is full, this one's is fast"):
        check_same_network({"seed": 1}, {"seed": 1, "precision": "fast"})
    with pytest.raises(ArgumentError, match="whose precision is fast, this one's is full"):
        check_same_network({"seed": 1, "precision": "fast"}, {"seed": 1, "precision": "full"})


def test_a_run_is_not_resumed_in_another_precision(tmp_path: Path, rng: np.random.Generator) -> None:
    X, Y = rng.standard_normal((20, 5)), rng.integers(0, 3, 20)
    for precision, refused in (("full", False), ("fast", True), ("full", False)):
        net = gb.mlp([5, 3], backend="cpu", precision=precision)
        loader = gb.Loader(X, Y, batch_size=10, backend="cpu", dtype="float32")
        train = lambda: gb.fit(net, loader, gb.SGD(net.parameters, 0.1), 1, checkpoint=tmp_path, resume=True)  # noqa: B023, E731
        if refused:
            with pytest.raises(ArgumentError, match="network whose precision is full, this one's is fast"):
                train()
        else:
            train()


# --- a network -------------------------------------------------------------------------------------------------------

STACKS = {
    "mlp": lambda: [gb.Dense(12, 16), gb.ReLU(), gb.Dense(16, 8), gb.ReLU(), gb.Dense(8, 5)],
    "other activations": lambda: [gb.Dense(12, 16), gb.GELU(), gb.Dense(16, 8), gb.Tanh(), gb.Dense(8, 5)],
    "no bias": lambda: [gb.Dense(12, 16, bias=False), gb.BatchNorm(16), gb.ReLU(), gb.Dense(16, 5, bias=False)],
}


@pytest.mark.parametrize("lacks", [(), ("BIAS", "RELU_BIAS"), ("BGRADA",)])
@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("timing", ["late", "early"])
def test_a_step_has_the_numbers_of_the_cpu(
    stack: str, timing: str, lacks: tuple[str, ...], rng: np.random.Generator
) -> None:
    device = queued_backend(timing)
    lt = device.cupy.nvmath = StandInLt(device.cupy, lacks)
    nets = [gb.Network(STACKS[stack](), l2=0.0, backend=backend, dtype="float64") for backend in ("cpu", device)]
    for rows in (33, 7, 33):
        X, Y = rng.standard_normal((rows, 12)), rng.integers(0, 5, rows)
        found = []
        for net in nets:
            loss, grads = net.loss_and_grad(net.backend.asarray(X), net.backend.asarray(Y))
            found.append((loss, net.backend.to_numpy(grads.flat), net.evaluate(*map(net.backend.asarray, (X, Y)))))
        np.testing.assert_allclose(found[1][0], found[0][0], rtol=1e-12)
        np.testing.assert_allclose(found[1][1], found[0][1], rtol=1e-10, atol=1e-14)
        np.testing.assert_allclose(found[1][2], found[0][2], rtol=1e-12)
    names = set(lt.launches)
    wanted = {"mlp": {"DEFAULT", "BIAS", "RELU_BIAS", "BGRADA"}, "other activations": {"DEFAULT", "BIAS", "BGRADA"}}
    assert names == wanted.get(stack, {"DEFAULT"}) - set(lacks)
    assert device.cupy.faults == []


def test_the_launches_of_a_step(rng: np.random.Generator) -> None:
    """With its products, a step of the usual network is eight launches of cuBLASLt and three others at present."""
    backend = stand_in()
    net = gb.mlp([12, 16, 8, 5], backend=backend)
    X, Y = backend.asarray(rng.standard_normal((20, 12)).astype(np.float32)), backend.asarray(rng.integers(0, 5, 20))
    net.step_loss(X, Y)
    backend.cupy.launches.clear()
    backend.cupy.nvmath.launches.clear()
    net.step_loss(X, Y)
    assert backend.cupy.nvmath.launches == ["RELU_BIAS", "RELU_BIAS", "BIAS", "BGRADA", *["DEFAULT"] * 4]
    names = [name for name, _, _ in backend.cupy.launches]
    assert names == ["softmax_cross_entropy", "activation_gradient", "activation_gradient"]


# --- the real library ------------------------------------------------------------------------------------------------

# Without a driver nvmath-python calls nothing of cuBLASLt. All that it asks a driver is the version; descriptors need
# no device.
READ_BACK = """
import ctypes, sys
import numpy as np
{driver}
from nvmath.bindings import cublas, cublasLt as lt
import nvmath
from gpubatch.ops.products import Library, Matrix, Plan

try:
    version = lt.get_version()
except Exception as error:
    sys.exit(f"missing: {error}")

class Recorder:
    asked = launched = None
    def __getattr__(self, name):
        return getattr(lt, name)
    def matmul_algo_get_heuristic(self, *arguments):
        self.asked = arguments
        raise lt.cuBLASLtError(15)
    def matmul(self, *arguments):
        self.launched = arguments

def attribute(get, descriptor, which, dtype):
    value, written = np.zeros(1, dtype), np.zeros(1, np.uint64)
    get(descriptor, which, value.ctypes.data, value.nbytes, written.ctypes.data)
    assert written[0] == value.nbytes
    return int(value[0])

class Block:
    nbytes = 4 << 20
    class data:
        ptr = 4096

class Owner:
    handle, workspace = 77, Block

for dtype, precision, compute, scale, stored in {cases}:
    recorder, owner = Recorder(), Owner()
    owner.library = Library(recorder, cublas.ComputeType, nvmath.CudaDataType)
    owner.dtype, owner.precision = np.dtype(dtype), precision
    matrices = Matrix(5, 3, 6, False), Matrix(7, 3, 8, True), Matrix(5, 7, 5, False)
    plan = Plan(owner, "RELU_BIAS", matrices, (1024, 1032, 1028, 1026))
    assert plan.algorithm == 0
    handle, operation, *layouts, preference, most, found, count = recorder.asked
    assert (handle, most, layouts[2]) == (77, 1, layouts[3])
    got = [attribute(lt.matmul_desc_get_attribute, operation, a, lt.get_matmul_desc_attribute_dtype(a))
           for a in (0, 1, 2, 3, 4, 7, 8)]
    assert got == [compute, scale, 0, 0, 1, 6, 1026], got
    for layout, m in zip(layouts, matrices):
        got = [attribute(lt.matrix_layout_get_attribute, layout, a, lt.get_matrix_layout_attribute_dtype(a))
               for a in (0, 1, 2, 3, 4)]
        assert got == [stored, 0, m.rows, m.columns, m.stride], got
    got = [attribute(lt.matmul_preference_get_attribute, preference, a, lt.get_matmul_preference_attribute_dtype(a))
           for a in (1, 5, 6, 7, 8)]
    assert got == [4 << 20, 16, 8, 4, 2], got
    plan.launch(1024, 1032, 1028, 2048, 99)
    assert attribute(lt.matmul_desc_get_attribute, operation, 8, np.int64) == 2048
    a, b, d = layouts[:3]
    one, zero = recorder.launched[2], recorder.launched[7]
    number = ctypes.c_double if scale == 1 else ctypes.c_float
    assert (number.from_address(one).value, number.from_address(zero).value) == (1, 0)
    assert recorder.launched == (77, operation, one, 1024, a, 1032, b, zero, 1028, d, 1028, d, 0, 4096, 4 << 20, 99)
    del plan
print("read back")
"""
CASES = [
    ("float64", "full", 70, 1, 1),
    ("float64", "fast", 70, 1, 1),
    ("float32", "full", 68, 0, 0),
    ("float32", "fast", 77, 0, 0),
    ("float16", "full", 68, 0, 2),
]


def nvmath(*names: str) -> list[Any]:
    try:
        return [__import__(name, fromlist=["_"]) for name in names]
    except ImportError as error:
        missing("nvmath", f"nvmath-python cannot be imported ({error})")


def test_the_stand_in_has_the_numbers_of_the_library() -> None:
    top, cublas, lt = nvmath("nvmath", "nvmath.bindings.cublas", "nvmath.bindings.cublasLt")
    theirs = {"ComputeType": cublas, "CudaDataType": top}
    for ours in (ComputeType, CudaDataType, Epilogue, MatmulDescAttribute, MatmulPreferenceAttribute):
        real = getattr(theirs.get(ours.__name__, lt), ours.__name__)
        assert {m.name: int(real[m.name]) for m in ours} == {m.name: int(m) for m in ours}
    own = StandInLt(StandIn())
    for kind in ("desc", "preference"):
        name = f"get_matmul_{kind}_attribute_dtype"
        for attribute in MatmulDescAttribute if kind == "desc" else MatmulPreferenceAttribute:
            assert np.dtype(getattr(lt, name)(attribute)) == np.dtype(getattr(own, name)(attribute))
    assert products.RESULT.itemsize == 96
    assert set(products.COMPUTE.values()) == {m.name for m in ComputeType}


def test_the_descriptors_of_the_real_library_read_back(tmp_path: Path) -> None:
    nvmath("nvmath.bindings.cublasLt")
    driver = ""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        source, library = tmp_path / "driver.c", tmp_path / "driver.so"
        source.write_text("int cuDriverGetVersion(int* version) { *version = 13000; return 0; }\n")
        try:
            options = ["-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", str(library), str(source)]
            subprocess.run(["cc", *options], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            missing("compiler", f"no C compiler made a library that stands for the driver ({error})")
        driver = f"ctypes.CDLL({str(library)!r}, mode=ctypes.RTLD_GLOBAL)"
    code = READ_BACK.replace("{driver}", driver).replace("{cases}", repr(CASES))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.stderr.startswith("missing"):
        missing("nvmath", f"cuBLASLt cannot be loaded ({done.stderr})")
    assert done.stdout == "read back\n", done.stderr


# --- captured --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("timing", TIMINGS)
def test_the_products_of_a_step_are_captured_with_it(timing: str, rng: np.random.Generator) -> None:
    device = queued_backend(timing)
    lt = device.cupy.nvmath = StandInLt(device.cupy)
    net = gb.mlp([12, 16, 8, 5], backend=device, l2=0.01)
    batches = [(rng.standard_normal((20, 12)).astype(np.float32), rng.integers(0, 5, 20)) for _ in range(2)]
    x, y = map(device.asarray, batches[0])
    step = device.zeros((), np.int64)

    def work() -> None:
        kept.append(core_of(net).enqueue(x, y, None, step, 20, lambda loss, share: None))

    kept: list[Any] = []
    eager = [device.to_numpy(net.loss_and_grad(*map(device.asarray, batch))[1].flat) for batch in batches]
    with device.own_stream():
        work()
        before = dict(lt.calls), device.cupy.allocations
        graph = device.capture(work)
        assert (dict(lt.calls), device.cupy.allocations) == before
        launched = len(lt.launches)
        for batch, right in zip(batches, eager, strict=True):
            x[...], y[...] = map(device.asarray, batch)
            net.parameters.grads.flat.fill(0)
            graph.launch()
            assert device.to_numpy(net.parameters.grads.flat).tobytes() == right.tobytes()
    assert len(lt.launches) == launched  # a replay repeats the work, not the calls
    assert core_of(net).products in kept[-1]  # the graph uses its workspace


@pytest.mark.parametrize("where", ["stand-in", pytest.param("cuda:0", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_captured_product_is_the_eager_one_bit_for_bit(precision: str, where: str) -> None:
    backend = gpu() if where == "cuda:0" else queued_backend("late")
    if where == "stand-in":
        backend.cupy.nvmath = StandInLt(backend.cupy)
    made = lt_products(backend, "float32", precision)
    x, W, b, dy = (numbers(backend, shape, "float32") for shape in ((128, 784), (784, 512), (512,), (128, 512)))
    outs = [
        [backend.empty(shape, "float32") for shape in ((128, 512), (784, 512), (784, 512), (512,))] for _ in range(2)
    ]

    def work(y: Any, dW: Any, other: Any, db: Any) -> None:
        if not made.affine(RELU, x, W, b, y):
            made.multiply(x, W, y)
        made.multiply(x.T, y, dW)
        if not made.weight_gradient(x, dy, other, db):
            made.multiply(x.T, dy, other)

    def bits(number: int) -> list[bytes]:
        return [backend.to_numpy(out).tobytes() for out in outs[number][:3]]

    with backend.scope(), backend.own_stream():
        for out in outs:
            work(*out)
        graph = backend.capture(lambda: work(*outs[1]))
        for out in outs[1]:
            out.fill(0)
        graph.launch()
        assert bits(0) == bits(1)
        x *= 2  # a launch reads the current content
        before = bits(1)
        graph.launch()
        work(*outs[0])
        assert bits(0) == bits(1)
        assert bits(1) != before
