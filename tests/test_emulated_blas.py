"""The emulated device's cuBLAS and cuBLASLt: right against NumPy, and each rule, broken on purpose, is noticed."""

from __future__ import annotations

import ctypes
import importlib
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import emulated_gpu
import numpy as np
import pytest
from emulated_gpu.blas import EMULATED, STUB, STUBS, fast, switches
from emulated_gpu.build import HERE, build
from hypothesis import given, settings, strategies as st
from needs import missing

pytestmark = pytest.mark.exhaustive  # they test only the emulated device

# A device with the functions of device.h: memory with a record of blocks, and one stream that runs on request.
DEVICE = """
#include "device.h"
#include <cstdlib>
#include <map>
#include <string>
#include <vector>
struct Work { void (*run)(void*); void* context; void (*release)(void*); };
static std::map<uint64_t, uint64_t> memory;
static std::vector<Work> queue;
static std::string faults;
extern "C" {
void* test_allocate(uint64_t bytes) {
    void* at = aligned_alloc(256, (bytes + 511) / 256 * 256);
    return memory[(uint64_t)at] = (uint64_t)at + bytes, at;
}
void test_free(void* at) { memory.erase((uint64_t)at); free(at); }
void test_forget(void* at) { memory.erase((uint64_t)at); }
void test_run() { for (Work& work : queue) work.run(work.context); }
void test_clear() { for (Work& work : queue) work.release(work.context); queue.clear(); faults.clear(); }
const char* test_faults() { return faults.c_str(); }
int emulated_enqueue_owned(void* stream, void (*run)(void*), void* context, void (*release)(void*), const char*) {
    if (stream != (void*)99) faults += "another stream; ";
    return queue.push_back({run, context, release}), 0;
}
int emulated_range(uint64_t address, uint64_t* first, uint64_t* last) {
    auto after = memory.upper_bound(address);
    if (after == memory.begin() || (--after)->second <= address) return 0;
    return *first = after->first, *last = after->second, 1;
}
void emulated_fault(const char* sentence) { faults += std::string(sentence) + "; "; }
}
"""
STREAM = ctypes.c_void_p(99)
TYPES = {"float32": 0, "float64": 1, "float16": 2}
COMPUTE = {"float32": 68, "float64": 70, "float16": 68, "tf32": 77}
RELU, BIAS, DRELU, BGRAD, AUX, BGRADA, BGRADB = 2, 4, 8, 16, 128, 256, 512
# Attributes by their numbers in cublasLt.h.
TRANSA, TRANSB, EPILOGUE, BIAS_POINTER, AUX_POINTER, AUX_LD = 3, 4, 7, 8, 11, 12
MAX_WORKSPACE, MIN_ALIGNMENT_A, MIN_ALIGNMENT_D = 1, 5, 8
INVALID_VALUE, EXECUTION_FAILED, NOT_SUPPORTED = 7, 13, 15


class Device:
    """Both libraries with the device above; ``faults`` returns their faults, and clears them."""

    def __init__(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library))
        self.library.test_allocate.restype = ctypes.c_void_p
        self.library.test_faults.restype = ctypes.c_char_p
        self.blocks: list[int] = []
        self.handle = ctypes.c_void_p()
        assert self.call("cublasLtCreate", ctypes.byref(self.handle)) == 0
        self.blas = ctypes.c_void_p()
        assert self.call("cublasCreate_v2", ctypes.byref(self.blas)) == 0
        assert self.call("cublasSetStream_v2", self.blas, STREAM) == 0

    def call(self, name: str, *arguments: Any) -> int:
        plain = [ctypes.c_void_p(x.ctypes.data) if isinstance(x, np.ndarray) else x for x in arguments]
        return int(getattr(self.library, name)(*plain))

    def array(self, x: Any, dtype: str = "float32", offset: int = 0) -> np.ndarray:
        """Numbers in device memory, ``offset`` elements after the start of a block."""
        x = np.asarray(x, dtype)
        whole = x.nbytes + offset * x.itemsize
        self.blocks.append(self.library.test_allocate(ctypes.c_uint64(whole)))
        memory = (ctypes.c_ubyte * whole).from_address(self.blocks[-1])
        made = np.frombuffer(memory, x.dtype, offset=offset * x.itemsize).reshape(x.shape)
        made[...] = x
        return made

    @property
    def faults(self) -> str:
        text = self.library.test_faults().decode()
        self.library.test_clear()
        return text

    def run(self) -> None:
        self.library.test_run()
        assert self.faults == ""

    def close(self) -> None:
        self.library.test_clear()
        assert self.call("cublasLtDestroy", self.handle) == 0
        assert self.call("cublasDestroy_v2", self.blas) == 0
        for block in self.blocks:
            self.library.test_free(ctypes.c_void_p(block))


@pytest.fixture(scope="module")
def library() -> Path:
    if shutil.which("g++") is None:
        missing("compiler", "g++ is not installed")
    stub = STUBS.replace("STATUS", "15") + STUB.replace("NAME", "cublasIsamax_v2")
    sources = [DEVICE, stub, *(HERE / name for name in EMULATED.values())]
    return build("test-blas", sources, (*fast(), "-DCUDA_MAJOR=12", "-Wl,-Bsymbolic"))


@pytest.fixture
def device(library: Path) -> Iterator[Device]:
    made = Device(library)
    yield made
    made.close()


class Matmul:
    """D = op(A) op(B) of cuBLASLt, column-major; a row-major argument is its transpose, as in a C program."""

    def __init__(self, device: Device, a: np.ndarray, b: np.ndarray, **options: Any) -> None:
        """``a`` and ``b`` of two dimensions; options: ``turned`` (of a, of b), ``kind``, ``epilogue``, ``vector``..."""
        self.device, self.a, self.b = device, a, b
        dtype = a.dtype.name
        turned = options.get("turned", (0, 0))
        (m, k), (_, n) = (x.shape if turn else x.shape[::-1] for x, turn in zip((a, b), turned, strict=True))
        self.m, self.n, self.k = m, n, k
        self.d = device.array(np.full((n, m), np.nan), dtype, options.get("offset", 0))
        self.scalar = np.float64 if dtype == "float64" else np.float32
        self.alpha, self.beta = (np.array([options.get(x, y)], self.scalar) for x, y in (("alpha", 1), ("beta", 0)))
        self.workspace = device.array(np.zeros(options.get("space", 4 << 20)), "uint8")
        compute = COMPUTE[options.get("kind") or dtype]
        self.operation = self.create("MatmulDesc", compute, TYPES[np.dtype(self.scalar).name])
        self.layouts = [self.layout(x) for x in (a, b, self.d, self.d)]
        self.preference = self.create("MatmulPreference")
        self.set(TRANSA, np.array([turned[0]], np.int32))
        self.set(TRANSB, np.array([turned[1]], np.int32))
        self.set(EPILOGUE, np.array([options.get("epilogue", 1)], np.uint32))
        if (vector := options.get("vector")) is not None:
            self.set(BIAS_POINTER, np.array([vector.ctypes.data]))
        if (mask := options.get("mask")) is not None:
            self.set(AUX_POINTER, np.array([mask.ctypes.data]))
            self.set(AUX_LD, np.array([mask.shape[1] * 8]))
        self.prefer(MAX_WORKSPACE, np.array([options.get("space", 4 << 20)], np.uint64))
        for which in range(MIN_ALIGNMENT_A, MIN_ALIGNMENT_D + 1):
            self.prefer(which, np.array([options.get("aligned", a.itemsize)], np.uint32))

    def create(self, kind: str, *arguments: int) -> ctypes.c_void_p:
        made = ctypes.c_void_p()
        assert self.device.call(f"cublasLt{kind}Create", ctypes.byref(made), *arguments) == 0, self.device.faults
        return made

    def layout(self, x: np.ndarray) -> ctypes.c_void_p:
        rows, columns, stride = x.shape[1], x.shape[0], x.strides[0] // x.itemsize
        numbers = ctypes.c_uint64(rows), ctypes.c_uint64(columns), ctypes.c_int64(stride)
        return self.create("MatrixLayout", TYPES[x.dtype.name], *numbers)

    def set(self, number: int, value: np.ndarray) -> int:
        name = "cublasLtMatmulDescSetAttribute"
        return self.device.call(name, self.operation, number, value, ctypes.c_size_t(value.nbytes))

    def prefer(self, number: int, value: np.ndarray) -> int:
        name = "cublasLtMatmulPreferenceSetAttribute"
        return self.device.call(name, self.preference, number, value, ctypes.c_size_t(value.nbytes))

    def choices(self, wanted: int = 1) -> np.ndarray:
        """The results of the heuristic: 12 words each, of which the first 8 are the algorithm."""
        results, found = np.full((wanted, 12), 7, np.uint64), np.zeros(1, np.int32)
        question = (self.device.handle, self.operation, *self.layouts, self.preference, wanted, results, found)
        self.status = self.device.call("cublasLtMatmulAlgoGetHeuristic", *question)
        return results[: found[0]]

    def launch(self, choice: np.ndarray | None = None, **other: Any) -> int:
        choice = self.choices()[0] if choice is None else choice
        a, b, d, space = (other.get(x, getattr(self, x)) for x in ("a", "b", "d", "workspace"))
        la, lb, lc, ld = self.layouts
        return self.device.call(
            *("cublasLtMatmul", self.device.handle, self.operation, self.alpha, a, la, b, lb),
            *(self.beta, d, lc, d, ld, choice, space, ctypes.c_size_t(space.nbytes), STREAM),
        )

    def result(self, choice: np.ndarray | None = None) -> np.ndarray:
        """op(A) op(B), row-major."""
        assert self.launch(choice) == 0, self.device.faults
        self.device.run()
        return self.d.T

    def right(self) -> tuple[np.ndarray, np.ndarray]:
        """The product in double precision, and the sum of its terms' absolute values."""
        a, b = self.factors()
        return a @ b, np.abs(a) @ np.abs(b)

    def factors(self) -> list[np.ndarray]:
        turned = [self.attribute(x) for x in (TRANSA, TRANSB)]
        return [(x if t else x.T).astype(np.float64) for x, t in zip((self.a, self.b), turned, strict=True)]

    def attribute(self, number: int) -> int:
        value, written = np.zeros(1, np.int32), np.zeros(1, np.uint64)
        name = "cublasLtMatmulDescGetAttribute"
        assert self.device.call(name, self.operation, number, value, ctypes.c_size_t(4), written) == 0
        assert written[0] == 4
        return int(value[0])


def bound(size: np.ndarray, k: int, dtype: str) -> np.ndarray:
    """As many roundings of the arithmetic as terms, and two of the dtype."""
    arithmetic = np.finfo("float64" if dtype == "float64" else "float32").eps
    return (k * float(arithmetic) + 2 * float(np.finfo(dtype).eps)) * size + float(np.finfo(dtype).smallest_subnormal)


def numbers(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape)


def small(device: Device, dtype: str = "float32", **options: Any) -> Matmul:
    """A product of three by five and five by four."""
    a, b = (device.array(numbers(shape), dtype) for shape in ((5, 3), (4, 5)))
    return Matmul(device, a, b, **options)


# --- numbers ---------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(*[st.integers(1, 40)] * 3),
    turned=st.tuples(st.integers(0, 1), st.integers(0, 1)),
    wide=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    dtype=st.sampled_from(sorted(TYPES)),
)
def test_products(
    library: Path, shape: tuple[int, int, int], turned: tuple[int, int], wide: tuple[int, int], dtype: str
) -> None:
    """Of both libraries, for all transpositions and strides."""
    device = Device(library)
    m, n, k = shape
    factors = []
    for (rows, columns), turn, more, seed in zip([(k, m), (n, k)], turned, wide, (1, 2), strict=True):
        if turn:
            rows, columns = columns, rows
        factors.append(device.array(numbers((rows, columns + more), seed), dtype)[:, :columns])
    product = Matmul(device, *factors, turned=turned)
    right, size = product.right()
    for choice in product.choices(9):
        assert (np.abs(product.result(choice) - right) <= bound(size, k, dtype)).all()
    product.d[...] = np.nan
    a, b = factors
    lda, ldb = (x.strides[0] // x.itemsize for x in factors)
    kinds = [TYPES[dtype]] * 3
    status = device.call(
        *("cublasGemmEx", device.blas, *turned, m, n, k, product.alpha, a, kinds[0], lda, b, kinds[1], ldb),
        *(product.beta, product.d, kinds[2], m, COMPUTE[dtype], 0),
    )
    assert status == 0, device.faults
    device.run()
    assert (np.abs(product.d.T - right) <= bound(size, k, dtype)).all()
    device.close()


@pytest.mark.parametrize("shape", [(512, 128, 784), (17, 7, 1000), (1, 300, 5), (33, 6, 256), (16, 1, 257)])
def test_large_products(device: Device, shape: tuple[int, int, int]) -> None:
    m, n, k = shape
    product = Matmul(device, device.array(numbers((k, m))), device.array(numbers((n, k))))
    right, size = product.right()
    assert (np.abs(product.result() - right) <= bound(size, k, "float32")).all()


def test_alpha_and_beta(device: Device) -> None:
    product = small(device, alpha=3, beta=-2)
    product.d[...] = before = numbers((4, 3), 7).astype(np.float32)
    np.testing.assert_allclose(product.result(), 3 * product.right()[0] - 2 * before.T, rtol=1e-5)
    still = small(device)  # beta is 0: the NaN in C is not read
    assert np.isfinite(still.result()).all()


def test_float16_adds_up_in_float32(device: Device) -> None:
    """In float16, 2048 + 1 would be 2048."""
    a, b = device.array(np.ones((2048 + 4, 1)), "float16"), device.array(np.ones((1, 2048 + 4)), "float16")
    assert Matmul(device, a, b).result().tolist() == [[2052]]


def test_tf32_rounds_the_factors(device: Device) -> None:
    """To ten bits of mantissa, half to even; infinity and NaN stay."""
    x = [1 + 2**-11, 1 + 2**-11 + 2**-20, 1 + 3 * 2**-11, 1 + 2**-10, np.inf, -(1 + 2**-12)]
    rounded = [1, 1 + 2**-10, 1 + 2**-9, 1 + 2**-10, np.inf, -1]
    for given_, right in zip(x, rounded, strict=True):
        one, number = device.array([[1]]), device.array([[given_]])
        assert Matmul(device, number, one, kind="tf32").result()[0, 0] == right
        assert Matmul(device, one, number, kind="tf32").result()[0, 0] == right
        assert Matmul(device, one, number).result()[0, 0] == np.float32(given_)


@pytest.mark.parametrize("dtype", TYPES)
def test_epilogues(device: Device, dtype: str) -> None:
    """Against formulas; the mask of a RELU_AUX_BIAS is the input of a DRELU_BGRAD."""
    rows, columns = 3, 4
    right = small(device, dtype).right()[0]
    bias = device.array(numbers((rows,), 5), dtype)
    biased = right + bias.astype(np.float64)[:, None]
    mask = device.array(np.full((columns, 16), 0xFF), "uint8")  # 128 bits a column
    close = {"rtol": 20 * float(np.finfo(dtype).eps), "atol": 20 * float(np.finfo(dtype).eps)}
    cases: dict[int, np.ndarray] = {BIAS: biased, RELU: np.maximum(right, 0), RELU | BIAS: np.maximum(biased, 0)}
    for epilogue, wanted in cases.items():
        found = small(device, dtype, epilogue=epilogue, vector=bias).result()
        np.testing.assert_allclose(found, wanted, **close)
    found = small(device, dtype, epilogue=RELU | AUX | BIAS, vector=bias, mask=mask).result()
    np.testing.assert_allclose(found, np.maximum(biased, 0), **close)
    bits = np.unpackbits(mask, axis=1, bitorder="little")
    np.testing.assert_array_equal(bits[:, :rows].T, biased > 0)
    assert bits[:, rows:].all()  # padding, unchanged

    sums = device.array(np.zeros(rows), dtype)
    found = small(device, dtype, epilogue=DRELU | AUX | BGRAD, vector=sums, mask=mask).result()
    np.testing.assert_allclose(found, right * (biased > 0), **close)
    np.testing.assert_allclose(sums, (right * (biased > 0)).sum(axis=1), **close)
    found = small(device, dtype, epilogue=DRELU | AUX, mask=mask).result()
    np.testing.assert_allclose(found, right * (biased > 0), **close)

    for epilogue, factor, axis, length in ((BGRADA, 0, 1, rows), (BGRADB, 1, 0, columns)):
        sums = device.array(np.zeros(length), dtype)
        product = small(device, dtype, epilogue=epilogue, vector=sums)
        np.testing.assert_allclose(product.result(), right, **close)
        np.testing.assert_allclose(sums, product.factors()[factor].sum(axis=axis), **close)


def test_relu_of_nan_is_nan(device: Device) -> None:
    a, b = device.array([[np.nan, 1, -1]]), device.array([[1]])
    np.testing.assert_array_equal(Matmul(device, a, b, epilogue=RELU).result().ravel(), [np.nan, 1, 0])


def test_other_products_of_cublas(device: Device) -> None:
    """A batched product, and products with vectors."""
    a, b = device.array(numbers((3, 5, 4)), "float64"), device.array(numbers((3, 2, 5)), "float64")
    c, one, zero = device.array(np.zeros((3, 2, 4)), "float64"), np.ones(1), np.zeros(1)
    apart = [ctypes.c_longlong(x[0].size) for x in (a, b, c)]
    status = device.call(
        *("cublasGemmStridedBatchedEx", device.blas, 0, 0, 4, 2, 5, one, a, 1, 4, apart[0], b, 1, 5, apart[1]),
        *(zero, c, 1, 4, apart[2], 3, 70, 0),
    )
    assert status == 0, device.faults
    device.run()
    np.testing.assert_allclose(c, b @ a, rtol=1e-13)
    x, y, to = (device.array(numbers((n,)), "float64") for n in (9, 9, 1))
    vectors = device.blas, 5, x, 2, y, 2, to
    assert device.call("cublasDdot_v2", *vectors) == NOT_SUPPORTED
    assert "a result in host memory" in device.faults
    assert device.call("cublasSetPointerMode_v2", device.blas, 1) == 0
    assert device.call("cublasDdot_v2", *vectors) == 0
    device.run()
    np.testing.assert_allclose(to[0], x[::2] @ y[::2], rtol=1e-13)


# --- the choice of an algorithm --------------------------------------------------------------------------------------


def test_the_heuristic_offers_several(device: Device) -> None:
    """As many as requested whose workspace fits, all different, with different last bits."""
    a, b = device.array(numbers((784, 20))), device.array(numbers((30, 784)))
    for space, wanted, count in [(32 << 20, 8, 8), (32 << 20, 3, 3), (32 << 20, 20, 9), (4 << 20, 20, 8), (0, 20, 3)]:
        product = Matmul(device, a, b, space=space)
        choices = product.choices(wanted)
        assert len(choices) == count
        assert len({choice[:8].tobytes() for choice in choices}) == count
        assert (choices[:, 8] <= space).all()
        assert (choices[:, 9].astype(np.uint32) == 0).all()  # the state
        bits = {product.result(choice).tobytes() for choice in choices}
        assert len(bits) == count
    assert product.choices(1)[0].tobytes() == choices[0].tobytes()


def test_a_choice_is_for_its_product_alone(device: Device) -> None:
    product = small(device)
    choice, result = product.choices()[0], np.zeros(12, np.uint64)
    check = lambda p, c: device.call("cublasLtMatmulAlgoCheck", device.handle, p.operation, *p.layouts, c, result)  # noqa: E731
    assert check(product, choice) == 0
    assert (result[8], result[9:10].view(np.int32)[0]) == (choice[8], 0)
    others = [small(device, kind="tf32"), small(device, "float64"), small(device, epilogue=RELU)]
    others.append(Matmul(device, device.array(numbers((5, 2))), product.b))
    for other in others:
        assert check(other, choice) == INVALID_VALUE
        assert other.launch(choice) == INVALID_VALUE
        assert "an algorithm for another product" in device.faults
    broken = choice.copy()
    broken[0] = 0
    assert product.launch(broken) == INVALID_VALUE
    later = choice.copy()
    later[1] += 1  # the version
    assert check(product, later) == NOT_SUPPORTED
    assert product.launch(later) == NOT_SUPPORTED
    assert device.faults.count("of another version") == 2


def test_what_does_not_go_together_is_refused(device: Device) -> None:
    """By the status of the heuristic alone, which means that there is no such product."""
    product = Matmul(device, device.array(numbers((5, 3))), device.array(numbers((4, 6))))
    assert len(product.choices()) == 0
    assert product.status == INVALID_VALUE
    mixed = Matmul(device, device.array(numbers((5, 3))), device.array(numbers((4, 5)), "float16"))
    assert len(mixed.choices()) == 0
    assert mixed.status == NOT_SUPPORTED
    half = small(device, "float16", kind="tf32")
    assert len(half.choices()) == 0
    assert half.status == NOT_SUPPORTED
    assert device.faults == ""
    assert half.launch(small(device).choices()[0]) == NOT_SUPPORTED
    assert "do not go together" in device.faults


# --- rules, each broken ----------------------------------------------------------------------------------------------


def test_alignment_that_was_promised(device: Device) -> None:
    for name in ("a", "b", "d"):
        product = small(device, aligned=16)
        assert product.launch() == 0
        moved = device.array(np.zeros(getattr(product, name).shape), offset=1)
        assert product.launch(**{name: moved}) == INVALID_VALUE
        assert f"{name.upper() if name != 'd' else 'C'} at" in (fault := device.faults)
        assert "not aligned to 16 bytes" in fault
        assert small(device, aligned=4).launch(**{name: moved}) == 0
    vectors = device.array(np.zeros(8))
    product = small(device, epilogue=BIAS, vector=vectors)
    choice = product.choices()[0]
    product.set(BIAS_POINTER, np.array([vectors[1:].ctypes.data]))
    assert product.launch(choice) == INVALID_VALUE
    assert "the vector of the epilogue" in device.faults
    assert product.launch() == 0  # a new choice knows how the vector lies


@pytest.mark.parametrize("name", ["a", "b", "d", "workspace"])
def test_what_is_no_memory_of_the_device(device: Device, name: str) -> None:
    """Found at the call or when the launch runs; nothing is then written."""
    product = small(device)
    shape, dtype = getattr(product, name).shape, getattr(product, name).dtype
    host = np.zeros(np.prod(shape) + 64, dtype)
    host = host[-host.ctypes.data % 64 // host.itemsize :][: np.prod(shape)].reshape(shape)
    assert product.launch(**{name: host}) == EXECUTION_FAILED
    assert "device memory" in device.faults
    # Memory enough but for one element.
    if name != "workspace":
        whole = device.array(np.zeros(np.prod(shape) - 1))
        less = np.lib.stride_tricks.as_strided(whole, shape, (shape[1] * 4, 4))
        assert product.launch(**{name: less}) == EXECUTION_FAILED
        assert f"is not {4 * np.prod(shape)} bytes of device memory" in device.faults
    assert product.launch() == 0
    before = product.d.copy()
    device.library.test_forget(ctypes.c_void_p(getattr(product, name).ctypes.data))
    device.library.test_run()
    assert "device memory" in device.faults
    np.testing.assert_array_equal(product.d, before)


def test_the_vector_and_the_mask_are_memory_too(device: Device) -> None:
    mask, bias = device.array(np.zeros((4, 16)), "uint8"), device.array(np.zeros(3))
    for wrong in (
        {"vector": np.zeros(64, np.float32)[:3]},
        {"mask": np.zeros((4, 16), np.uint8)},
        {"vector": bias[1:]},
    ):
        product = small(device, epilogue=RELU | AUX | BIAS, **{"vector": bias, "mask": mask, **wrong})
        assert product.launch() == EXECUTION_FAILED
        assert "of the epilogue" in device.faults


def test_the_workspace_is_overwritten_and_must_be_there(device: Device) -> None:
    product = small(device)
    choice = product.choices()[0]
    product.result(choice)
    assert (product.workspace[: int(choice[8])] == 0xA5).all()
    assert not product.workspace[int(choice[8]) :].any()
    assert product.launch(choice, workspace=product.workspace[:16]) == INVALID_VALUE
    assert "a workspace of 16 bytes" in device.faults
    assert product.launch(choice, workspace=product.workspace[1:]) == INVALID_VALUE
    assert "aligned to 16" in device.faults


def test_a_product_over_its_own_factor(device: Device) -> None:
    a = device.array(numbers((3, 3)))
    product = Matmul(device, a, device.array(numbers((3, 3))))
    assert product.launch(d=a) == INVALID_VALUE
    assert "D lies over A" in device.faults


def test_attributes_have_sizes(device: Device) -> None:
    product = small(device)
    assert product.set(EPILOGUE, np.array([1], np.uint64)) == INVALID_VALUE
    assert product.set(BIAS_POINTER, np.array([1], np.int32)) == INVALID_VALUE
    assert product.prefer(MAX_WORKSPACE, np.array([1], np.int32)) == INVALID_VALUE
    assert "attribute 7 has 4 bytes, not 8; " in device.faults
    assert product.set(77, np.array([1], np.int32)) == NOT_SUPPORTED
    assert "attribute 77 is not emulated" in device.faults
    assert product.set(EPILOGUE, np.array([32], np.uint32)) == 0
    assert len(product.choices()) == 0
    assert "epilogue 32 is not emulated" in device.faults


def test_the_mask_has_rows_of_128_bits(device: Device) -> None:
    for columns in (8, 24):
        mask = device.array(np.zeros((4, columns)), "uint8")
        product = small(device, epilogue=DRELU | AUX, mask=mask)
        assert len(product.choices()) == 0
        assert "a multiple of 128" in device.faults


def test_descriptors_that_are_gone(device: Device) -> None:
    living = device.library.emulated_lt_living
    before = living()
    product = small(device)
    assert living() == before + 6
    choice = product.choices()[0]
    for kind, descriptors in (
        ("MatmulDesc", [product.operation]),
        ("MatmulPreference", [product.preference]),
        ("MatrixLayout", product.layouts),
    ):
        for descriptor in descriptors:
            assert device.call(f"cublasLt{kind}Destroy", descriptor) == 0
            assert device.call(f"cublasLt{kind}Destroy", descriptor) == INVALID_VALUE
    assert living() == before
    assert "is no handle or descriptor, or no longer" in device.faults
    assert product.launch(choice) == INVALID_VALUE
    assert len(product.choices()) == 0


def test_what_is_not_emulated_says_its_name(device: Device) -> None:
    assert device.call("cublasIsamax_v2") == NOT_SUPPORTED
    assert device.faults == "cublasIsamax_v2 is not emulated; "
    x = device.array(np.zeros((2, 2)))
    gemm = device.blas, 0, 0, 2, 2, 2, np.ones(1), x, 0, 2, x, 0, 2, np.ones(1), x, 0, 2
    assert device.call("cublasGemmEx", *gemm, 64, 0) == NOT_SUPPORTED
    assert "compute type 64" in device.faults
    assert device.call("cublasSetMathMode", device.blas, 3) == NOT_SUPPORTED


# --- in a stream -----------------------------------------------------------------------------------------------------


def test_a_product_is_put_into_its_stream(device: Device) -> None:
    """It reads numbers when called, and arrays when it runs, possibly several times, as in a graph."""
    product = small(device)
    assert product.launch() == 0
    assert np.isnan(product.d).all()
    product.alpha[0] = 1000
    for scale in (1, 2):
        product.a *= scale
        device.library.test_run()
        np.testing.assert_allclose(product.d.T, product.right()[0], rtol=1e-5)
    assert device.faults == ""


def test_faults_that_a_library_may_have(device: Device) -> None:
    """gpubatch tests for these; the emulation can switch them on."""
    set_to = switches(device.library)
    before = set_to.copy()
    try:
        set_to["lacks"][0] = RELU
        assert len(small(device, epilogue=RELU).choices()) == 0
        set_to["lacks"][0] = 0
        set_to["relu_of_nan"] = 0
        a, b = device.array([[np.nan, 1]]), device.array([[1]])
        assert Matmul(device, a, b, epilogue=RELU).result().ravel().tolist() == [0, 1]
        set_to["whole_bias"] = 0
        bias = device.array(np.full(3, np.nan))
        found = small(device, epilogue=BIAS, vector=bias).result()
        np.testing.assert_array_equal(np.isnan(found).all(axis=0), [True, True, True, False])
        set_to["whole_sums"] = 0
        sums = device.array(np.zeros(2))
        ones = device.array(np.ones((6, 2))), device.array(np.ones((1, 6)))
        Matmul(device, *ones, epilogue=BGRADA, vector=sums).result()
        assert sums.tolist() == [5, 5]
        product = small(device)
        choice = product.choices()[0]
        set_to["version"] += 1
        assert product.launch(choice) == NOT_SUPPORTED
        assert "of another version" in device.faults
        set_to["version"] -= 1
        set_to["microseconds"][0] = 20_000
        start = time.perf_counter()
        product.result(choice)
        assert time.perf_counter() - start > 0.02
    finally:
        for name in before.dtype.names:
            set_to[name] = before[name]


# --- under CuPy ------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_cupy_finds_its_libraries_and_what_is_not_emulated_says_so() -> None:
    if emulated_gpu.installed() is None:
        pytest.skip("the libraries are not the emulated ones")
    for module in ("cublas", "curand", "cusolver", "cusparse"):
        importlib.import_module(f"cupy_backends.cuda.libs.{module}")
    importlib.import_module("cupy.cuda.cufft")
    cusparse = importlib.import_module("cupy_backends.cuda.libs.cusparse")
    with pytest.raises(cusparse.CuSparseError):
        cusparse.create()
    assert emulated_gpu.faults()[0] == "cusparseCreate is not emulated"
