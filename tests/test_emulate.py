"""The emulated grid runs what CUDA runs, and has teeth: every planted fault is caught, and its sound twin passes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import emulate
import numpy as np
import pytest
from emulate import (
    ARCHITECTURES,
    ORDERS,
    Table,
    check_compiles,
    check_compiles_everywhere,
    host_kernel,
    launch_bounds,
    sanitized,
)
from families import every
from stand_in import stand_in_backend

every_order = pytest.mark.parametrize("order", ORDERS)

# --- supported features --------------------------------------------------------------------------------------------

SUM = """
__device__ inline float block_sum(float x) {
    __shared__ float at[256];
    at[threadIdx.x] = x;
    for (unsigned n = blockDim.x / 2; n > 0; n /= 2) {
        __syncthreads();
        if (threadIdx.x < n) at[threadIdx.x] += at[threadIdx.x + n];
    }
    __syncthreads();
    return at[0];
}

extern "C" __global__ void __launch_bounds__(256) sum(const float* __restrict__ x, float* sums, int n) {
    float part = 0;
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) part += __ldg(x + i);
    part = block_sum(part);
    if (threadIdx.x == blockDim.x - 1) sums[blockIdx.x] = part;
}
"""

WARP = """
extern "C" __global__ void warp(const float* x, double* shuffled, unsigned* votes) {
    const unsigned lane = threadIdx.x % warpSize, all = 0xFFFFFFFF;
    const double value = x[threadIdx.x];
    double* out = shuffled + 6 * threadIdx.x;
    out[0] = __shfl_sync(all, value, 5);
    out[1] = __shfl_up_sync(all, value, 3);
    out[2] = __shfl_down_sync(all, value, 3);
    out[3] = __shfl_xor_sync(all, value, 6);
    float part = x[threadIdx.x];
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) part += __shfl_down_sync(all, part, distance);
    out[4] = part;
    // Half a warp by itself, while the other half does nothing.
    if (lane < 16) out[5] = __shfl_sync(0x0000FFFF, (int)threadIdx.x, 15);
    __syncwarp();
    votes += 3 * threadIdx.x;
    votes[0] = __ballot_sync(all, value > 0);
    votes[1] = __any_sync(all, value > 0);
    votes[2] = __all_sync(all, value > 0);
}
"""

COUNT = """
extern "C" __global__ void count(const int* x, unsigned* counts, float* total, int* largest, unsigned long long* done) {
    __shared__ unsigned mine[4];
    if (threadIdx.x < 4) mine[threadIdx.x] = 0;
    __syncthreads();
    const int value = x[blockIdx.x * blockDim.x + threadIdx.x];
    atomicAdd(&mine[value % 4], 1u);
    atomicAdd(total, 0.5f);
    atomicMax(largest, value);
    __syncthreads();
    if (threadIdx.x < 4) atomicAdd(counts + threadIdx.x, mine[threadIdx.x]);
    __threadfence();
    if (threadIdx.x == 0) atomicAdd(done, 1ull << 40);
}
"""

LAST = """
extern "C" __global__ void last(unsigned* ticket, unsigned* seen) {
    if (threadIdx.x == 0) seen[atomicInc(ticket, gridDim.x - 1)] += 1;
}
"""

TRANSPOSE = """
extern "C" __global__ void transpose(const float* x, float* y, long long rows, long long columns) {
    __shared__ float tile[8][9];
    const unsigned i = threadIdx.x / 8, j = threadIdx.x % 8;
    const long long row = 8ll * blockIdx.y, column = 8ll * blockIdx.x;
    if (row + i < rows && column + j < columns) tile[i][j] = x[(row + i) * columns + column + j];
    __syncthreads();
    if (row + j < rows && column + i < columns) y[(column + i) * rows + row + j] = tile[j][i];
}
"""

MATH = """
extern "C" __global__ void functions(const T* x, T* y) {
    const T v = x[threadIdx.x];
    T* out = y + 10 * threadIdx.x;
    out[0] = exp(v) + expm1(v);
    out[1] = log(v) + log1p(v);
    out[2] = sqrt(v) * rsqrt(v);
    out[3] = tanh(v);
    out[4] = erf(v);
    out[5] = erfc(v);
    out[6] = fmax(v, T(0) / T(0)) + min(v, T(1)) + fabs(-v);
    out[7] = isfinite(v) && !isnan(v) ? max(threadIdx.x, 1u) : 0;
    out[8] = (T)__umul64hi(1ull << 63, 6);
    out[9] = (T)(__float_as_uint(1.0f) == 0x3F800000 && __popc(7) == 3);
}
"""


@every_order
def test_a_counter_begins_again_by_itself(order: str) -> None:
    ticket, seen = np.zeros(1, np.uint32), np.zeros(5, np.uint32)
    kernel = host_kernel(LAST, "last", "unsigned* ticket", "unsigned* seen")
    for launches in (1, 2, 3):
        kernel(ticket, seen, 5, 32, order=order)
        assert (ticket[0], seen.tolist()) == (0, [launches] * 5)


@every_order
@pytest.mark.parametrize(("blocks", "threads"), [(1, 1), (1, 256), (3, 64), (40, 128)])
@pytest.mark.parametrize("n", [0, 1, 1000, 20_000])
def test_a_block_reduces_in_shared_memory(
    n: int, blocks: int, threads: int, order: str, rng: np.random.Generator
) -> None:
    x = rng.integers(0, 10, n + 1).astype(np.float32)  # whole numbers: any order gives the same sum
    sums = np.full(blocks + 1, -1, np.float32)
    host_kernel(SUM, "sum", "const float* x", "float* sums", "int n")(x, sums, n, blocks, threads, order=order)
    assert sums[:blocks].sum() == x[:n].sum()
    assert sums[blocks] == -1


@every_order
@pytest.mark.parametrize("threads", [32, 96])
def test_the_lanes_of_a_warp_exchange_values(threads: int, order: str, rng: np.random.Generator) -> None:
    x = rng.integers(-9, 9, threads).astype(np.float32)
    x[:32] = np.abs(x[:32]) + 1
    shuffled, votes = np.zeros((threads, 6)), np.zeros((threads, 3), np.uint32)
    host_kernel(WARP, "warp", "const float* x", "double* shuffled", "unsigned* votes")(
        x, shuffled, votes, 1, threads, order=order
    )
    lane = np.arange(threads) % 32
    start = np.arange(threads) - lane
    sources = [5 + 0 * lane, np.where(lane < 3, lane, lane - 3), np.where(lane > 28, lane, lane + 3), lane ^ 6]
    for column, source in enumerate(sources):
        np.testing.assert_array_equal(shuffled[:, column], x[start + source])
    np.testing.assert_array_equal(shuffled[lane == 0, 4], x.reshape(-1, 32).sum(1))
    np.testing.assert_array_equal(shuffled[:, 5], np.where(lane < 16, start + 15, 0))
    positive = x.reshape(-1, 32) > 0
    bits = (positive * 2 ** np.arange(32)).sum(1)
    np.testing.assert_array_equal(votes[lane == 0], np.stack([bits, positive.any(1), positive.all(1)], 1))
    np.testing.assert_array_equal(votes, np.repeat(votes[lane == 0], 32, 0))


@every_order
def test_atomics_count(order: str, rng: np.random.Generator) -> None:
    x = rng.integers(0, 1000, (50, 64)).astype(np.int32)
    counts, total, largest = np.zeros(4, np.uint32), np.zeros(1, np.float32), np.zeros(1, np.int32)
    done = np.zeros(1, np.uint64)
    parameters = ("const int* x", "unsigned* counts", "float* total", "int* largest", "unsigned long long* done")
    host_kernel(COUNT, "count", *parameters)(x, counts, total, largest, done, 50, 64, order=order)
    np.testing.assert_array_equal(counts, np.bincount(x.ravel() % 4))
    assert (total, largest, done) == (1600, x.max(), 50 << 40)


@every_order
@pytest.mark.parametrize("shape", [(1, 1), (8, 8), (20, 35)])
def test_a_grid_has_two_dimensions(shape: tuple[int, int], order: str, rng: np.random.Generator) -> None:
    x, y = rng.standard_normal(shape).astype(np.float32), np.zeros(shape[::-1], np.float32)
    grid = (-(-shape[1] // 8), -(-shape[0] // 8))
    kernel = host_kernel(TRANSPOSE, "transpose", "const float* x", "float* y", "long long rows", "long long columns")
    kernel(x, y, *shape, grid, 64, order=order)
    np.testing.assert_array_equal(y, x.T)


def test_functions_are_those_of_the_type(dtype: np.dtype) -> None:
    source = f"typedef {'float' if dtype == np.float32 else 'double'} T;\n{MATH}"
    x, y = np.array([0.25, 0.5, 3], dtype), np.zeros((3, 10), dtype)
    host_kernel(source, "functions", "const T* x", "T* y")(x, y, 1, 3)
    expected = np.zeros_like(y)
    expected[:, 0], expected[:, 1] = np.exp(x) + np.expm1(x), np.log(x) + np.log1p(x)
    expected[:, 2], expected[:, 3] = 1, np.tanh(x)
    expected[:, 4] = [0.2763263901682369, 0.5204998778130465, 0.9999779095030014]
    expected[:, 5] = [0.7236736098317631, 0.4795001221869535, 2.209049699858544e-05]
    expected[:, 6], expected[:, 7] = x + np.minimum(x, 1) + x, [1, 1, 2]
    expected[:, 8], expected[:, 9] = 3, 1
    np.testing.assert_allclose(y, expected, rtol=4 * np.finfo(dtype).eps)


@every_order
def test_shared_memory_is_spoiled_for_every_block(order: str) -> None:
    source = """
    extern "C" __global__ void left_over(int* seen) {
        __shared__ int at[32];
        seen[blockIdx.x * 32 + threadIdx.x] = at[threadIdx.x];
        at[threadIdx.x] = 5;
    }"""
    seen = np.zeros(96, np.int32)
    host_kernel(source, "left_over", "int* seen")(seen, 3, 32, order=order)
    np.testing.assert_array_equal(seen, -1)


def test_a_launch_that_a_device_refuses_is_an_error() -> None:
    kernel = host_kernel("__global__ void nothing(int n) { (void)n; }", "nothing", "int n")
    for blocks, threads in [(0, 1), (1, 0), (1, 1025), ((1, 0), 1), ((1, 65536), 1)]:
        with pytest.raises(AssertionError, match="no device launches that"):
            kernel(1, blocks, threads)
    with pytest.raises(AssertionError, match=r"0 arguments for nothing\(int n\)"):
        kernel(1, 1)


# --- faults --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fault:
    source: str  # with ``right`` in it once
    right: str
    wrong: str
    message: str
    parameters: tuple[str, ...] = ("const float* x", "float* y", "int n")
    arguments: Callable[[], list[Any]] = lambda: [np.ones(100, np.float32), np.zeros(100, np.float32), 100]
    threads: int = 128


GLOBAL = """extern "C" __global__ void kernel(const float* x, float* y, int n) {
    const int i = threadIdx.x;
    if (i < n) y[i] = 2 * x[i];
}"""
BEFORE = """extern "C" __global__ void kernel(const float* x, float* y, int n) {
    for (int i = threadIdx.x; i < n; i += blockDim.x) y[i] = x[0];
}"""
SHARED = """extern "C" __global__ void kernel(const float* x, float* y, int n) {
    __shared__ float at[100];
    const int i = threadIdx.x;
    if (i < 100) at[i] = x[i % n];
    __syncthreads();
    if (i < n) y[i] = at[n - 1 - i];
}"""
PACKS = """struct alignas(16) Pack { float at[4]; };
extern "C" __global__ void kernel(const float* x, float* y, int n) {
    const int i = 4 * threadIdx.x;
    if (i + 4 <= n) *reinterpret_cast<Pack*>(y + i) = *reinterpret_cast<const Pack*>(x + i);
}"""
INDEX = """extern "C" __global__ void kernel(const float* x, float* y, int n) {
    const long long at = (long long)n * n + threadIdx.x;  // of a matrix with n columns
    y[at % 100] = x[at % 100];
}"""

FAULTS = {
    "a write after the end": Fault(GLOBAL, "i < n", "i <= n", r"(?s)heap-buffer-overflow.*0 bytes to the right"),
    "a read after the end": Fault(GLOBAL, "x[i]", "x[i + 1]", r"(?s)heap-buffer-overflow.*READ of size 4"),
    "a write before the start": Fault(BEFORE, "= threadIdx.x", "= (int)threadIdx.x - 1", "heap-buffer-overflow"),
    # The sanitizer tracks units of 8 bytes; accesses that it misses are found afterwards.
    "a write before a start that is not aligned": Fault(
        BEFORE,
        "= threadIdx.x",
        "= (int)threadIdx.x - 1",
        "4 bytes before array 1 were written",
        arguments=lambda: [np.ones(100, np.float32), np.zeros(101, np.float32)[1:], 100],
    ),
    "a write after shared memory": Fault(
        SHARED.replace("at[i] =", "*(float*)((long long)at + 4 * i) ="), "i < 100", "i < 101", "global-buffer-overflow"
    ),
    "an index beyond a shared array": Fault(SHARED, "i < 100", "i < 101", "index 100 out of bounds for type 'float"),
    "16 bytes that are not aligned": Fault(
        PACKS, "+ i);", "+ i + 1);", "misaligned address .* which requires 16 byte alignment", threads=20
    ),
    "an index of 32 bits": Fault(
        INDEX,
        "(long long)n * n",
        "n * n",
        "signed integer overflow: 70000",
        arguments=lambda: [np.ones(100, np.float32), np.zeros(100, np.float32), 70_000],
    ),
}


@every("fault", FAULTS, ["a write after the end", "an index beyond a shared array", "an index of 32 bits"])
def test_the_sanitizers_catch(fault: Fault) -> None:
    assert fault.source.count(fault.right) == 1
    arguments = fault.arguments()
    before = [a.copy() for a in arguments[:2]]
    x, y = sanitized(fault.source, "kernel", fault.parameters, arguments, 1, fault.threads)
    assert y.sum() > 0
    for a, b in zip(before, [x, arguments[1]], strict=True):
        np.testing.assert_array_equal(a, b)
    wrong = fault.source.replace(fault.right, fault.wrong)
    with pytest.raises(AssertionError, match=fault.message):
        sanitized(wrong, "kernel", fault.parameters, arguments, 1, fault.threads)


DEADLOCK = """extern "C" __global__ void kernel(float* y, int n) {
    __shared__ float at[64];
    const int i = threadIdx.x;
    if (i < n) at[i] = i;
    __syncthreads();
    if (i >= n) return;
    y[i] = at[n - 1 - i] + __shfl_xor_sync(0xFFFFFFFF, 0, 1);
}"""
MEETS = "    __syncthreads();\n    if (i >= n) return;"
DEADLOCKS = {
    "finished": (
        "    if (i >= n) return;\n    __syncthreads();",
        "deadlock: thread 0 waits at line 6, thread 40 has finished",
    ),
    "another barrier": (
        "    if (i < 9) __syncthreads();\n    else __syncthreads();\n    if (i >= n) return;",
        "deadlock: thread 0 waits at line 5, thread 9 waits at line 6",
    ),
    "an exchange": (
        "    if (i < 16) __syncwarp();\n    else __syncthreads();\n    if (i >= n) return;",
        "deadlock: thread 0 waits at line 5, thread 16 waits at line 6",
    ),
    "other masks": (
        "    __syncwarp(i % 32 < 16 ? ~0u : ~1u);\n" + MEETS,
        "deadlock: the masks of line 5 do not agree",
    ),
    "not in its mask": ("    __syncwarp(1);\n" + MEETS, r"thread \d+ is not in the mask 0x1 of line 5"),
}


@every_order
@pytest.mark.parametrize(("wrong", "message"), DEADLOCKS.values(), ids=DEADLOCKS)
def test_threads_that_wait_in_vain_are_named(wrong: str, message: str, order: str) -> None:
    y = np.zeros(40, np.float32)
    host_kernel(DEADLOCK, "kernel", "float* y", "int n")(y, 40, 1, 64, order=order)
    np.testing.assert_array_equal(y, np.arange(40)[::-1])
    assert DEADLOCK.count(MEETS) == 1
    source = DEADLOCK.replace(MEETS, wrong)
    with pytest.raises(AssertionError, match=message):
        host_kernel(source, "kernel", "float* y", "int n")(y, 40, 1, 64, order=order)
    with pytest.raises(AssertionError, match=message):
        sanitized(source, "kernel", ("float* y", "int n"), [y, 40], 1, 64, order)


def test_a_missing_barrier_shows_in_one_of_the_orders(rng: np.random.Generator) -> None:
    x = rng.integers(1, 10, 2000).astype(np.float32)
    for barrier in ("        __syncthreads();\n", "    __syncthreads();\n    return"):
        assert SUM.count(barrier) == 1
        right = {}
        for source in (SUM, SUM.replace(barrier, barrier.replace("__syncthreads();\n", "\n"))):
            for order in ORDERS:
                sums = np.zeros(4, np.float32)
                kernel = host_kernel(source, "sum", "const float* x", "float* sums", "int n")
                kernel(x, sums, 2000, 4, 256, order=order)
                right[source is SUM, order] = sums.sum() == x.sum()
        assert right[True, "forward"]
        assert right[True, "reverse"]
        assert not (right[False, "forward"] and right[False, "reverse"])


def test_the_value_of_a_lane_that_is_not_there_is_spoiled() -> None:
    source = """extern "C" __global__ void kernel(float* y) {
        float part = 1;
        for (int distance = 16; distance > 0; distance /= 2) part += __shfl_down_sync(0xFFFFFFFF, part, distance);
        y[threadIdx.x] = part;
    }"""
    y = np.zeros(64, np.float32)
    kernel = host_kernel(source, "kernel", "float* y")
    kernel(y, 1, 64)
    np.testing.assert_array_equal(y[[0, 32]], 32)
    kernel(y, 1, 60)
    assert y[0] == 32
    assert np.isnan(y[32])


def test_a_wrong_formula_differs_from_float64(rng: np.random.Generator) -> None:
    source = """extern "C" __global__ void softplus(const float* x, float* y) {
        const float v = x[threadIdx.x];
        y[threadIdx.x] = fmax(v, 0.0f) + log1p(exp(-fabs(v)));
    }"""
    assert source.count("exp(-fabs(v))") == 1
    x = rng.uniform(-20, 20, 256).astype(np.float32)
    expected = np.logaddexp(0, x.astype(np.float64))
    worst = []
    for formula in ("exp(-fabs(v))", "exp(fabs(v))", "exp(-fabs(v)) - 1"):
        y = np.zeros_like(x)
        changed = source.replace("exp(-fabs(v))", formula)
        host_kernel(changed, "softplus", "const float* x", "float* y")(x, y, 1, 256)
        worst.append(np.nan_to_num(np.abs(y - expected) / expected, posinf=np.inf).max())
    assert worst[0] < 4 * np.finfo(np.float32).eps
    assert min(worst[1:]) > 1e-2


def test_a_table_of_addresses_leads_to_the_copies(rng: np.random.Generator) -> None:
    source = """extern "C" __global__ void scale(const long long* table, float factor, unsigned long long big) {
        float* at = (float*)table[2 * blockIdx.x];
        if (threadIdx.x < table[2 * blockIdx.x + 1] && big == ~0ull) at[threadIdx.x] *= factor;
    }"""
    parameters = ("const long long* table", "float factor", "unsigned long long big")
    arrays = [rng.standard_normal(n).astype(np.float32)[1:] for n in (4, 9, 1)]
    middle = arrays[1].ctypes.data + 16
    words = np.array([[arrays[0].ctypes.data, 3], [middle, 4]], np.int64)
    scaled = sanitized(source, "scale", parameters, [Table(words, arrays), 2.5, 2**64 - 1], 2, 8)
    np.testing.assert_array_equal(scaled[0], arrays[0] * np.float32(2.5))
    np.testing.assert_array_equal(scaled[1][4:], arrays[1][4:] * np.float32(2.5))
    np.testing.assert_array_equal(scaled[1][:4], arrays[1][:4])
    assert scaled[2].size == 0
    words[1, 1] = 5
    with pytest.raises(AssertionError, match="heap-buffer-overflow"):
        sanitized(source, "scale", parameters, [Table(words, arrays), 2.5, 2**64 - 1], 2, 8)


# --- NVRTC ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SUM", "WARP", "COUNT", "LAST", "TRANSPOSE", "MATH", "DEADLOCK", *FAULTS])
def test_what_runs_here_is_cuda(name: str) -> None:
    source = FAULTS[name].source if name in FAULTS else globals()[name]
    for reports in check_compiles_everywhere(f"typedef float T;\n{source}"):
        assert len(reports) == 1


def test_a_report_tells_what_a_kernel_needs() -> None:
    for architecture in ARCHITECTURES:
        (report,) = check_compiles(SUM, architecture)
        assert (report.name, report.architecture) == ("sum", architecture)
        assert (report.shared_bytes, report.stack_bytes, report.spill_bytes) == (1024, 0, 0)
        assert 8 <= report.registers <= 64
        assert str(report).startswith(f"sm_{architecture:<3} {report.registers:3} registers   1024 shared    0 stack")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_registers_that_spill_are_refused(architecture: int) -> None:
    """1024 threads have 64 registers each: 80 values alive at the same time do not fit, 20 do."""
    source = """extern "C" __global__ void __launch_bounds__(1024) many(const float* x, float* y, int n) {
        float at[80];
        #pragma unroll
        for (int i = 0; i < 80; ++i) at[i] = x[i * n + threadIdx.x];
        __syncthreads();
        #pragma unroll
        for (int i = 0; i < 80; ++i) y[i * n + threadIdx.x] = at[79 - i] * at[7 * i % 80];
    }"""
    check_compiles(source.replace("80", "20").replace("79", "19"), architecture)
    with pytest.raises(AssertionError, match=r"local memory: sm_\d+ +64 registers .* [1-9]\d* spilled  many"):
        check_compiles(source, architecture)
    with pytest.raises(AssertionError, match="spilled"):
        check_compiles(source, architecture, stack=10_000)


def test_more_registers_than_a_device_has_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without bounds the compiler chooses freely: enough registers for 256 threads, the block of such kernels."""
    source = """extern "C" __global__ void many(const float* x, float* y, int n) {
        float at[50];
        #pragma unroll
        for (int i = 0; i < 50; ++i) at[i] = x[i * n + threadIdx.x];
        __syncthreads();
        #pragma unroll
        for (int i = 0; i < 50; ++i) y[i * n + threadIdx.x] = at[49 - i] * at[7 * i % 50];
    }"""
    (report,) = check_compiles(source, 75)
    assert report.registers > 64
    assert report.registers_of(256) == 256 * (report.registers + -report.registers % 8)
    monkeypatch.setattr(emulate, "launch_bounds", lambda source: {"many": 1024})
    with pytest.raises(AssertionError, match=r"too many registers: sm_75 +\d+ registers .* many"):
        check_compiles(source, 75)


def test_the_threads_that_a_kernel_is_compiled_for() -> None:
    source = """constexpr int FEW = 128, MANY = 1024;
    extern "C" __global__ void plain(long long* x) {}
    extern "C" __global__ void __launch_bounds__(64) bounded(long long* x) {}
    extern "C" __global__ void __launch_bounds__(MANY, 1)
        named(long long* x) {}"""
    assert launch_bounds(source) == {"plain": 256, "bounded": 64, "named": 1024}
    device = stand_in_backend()
    for name, most in launch_bounds(source).items():
        kernel, argument = device.compile(source, name), device.zeros(1, np.int64)
        with pytest.raises(AssertionError, match=f"{name} is compiled for {most} threads at most, got {most + 32}"):
            kernel((1,), (most + 32,), (argument,))


def test_an_array_in_local_memory_is_refused_unless_it_is_asked_for() -> None:
    source = """extern "C" __global__ void sort(const int* x, int* y, int n) {
        int at[32];
        for (int i = 0; i < n; ++i) at[x[i] & 31] = i;
        for (int i = 0; i < n; ++i) y[i] = at[y[i] & 31];
    }"""
    with pytest.raises(AssertionError, match="128 stack    0 spilled  sort"):
        check_compiles(source, 80)
    (report,) = check_compiles(source, 80, stack=128)
    assert report.stack_bytes == 128


def test_warnings_of_the_compiler_are_refused() -> None:
    source = 'extern "C" __global__ void kernel(int* y) { int unused; *y = 1; }'
    with pytest.raises(AssertionError, match=r'sm_90: .*"unused" was declared but never referenced'):
        check_compiles(source, 90)
    with pytest.raises(AssertionError, match="names no kernel"):
        check_compiles("", 90)
