"""The generated CUDA of every optimizer: it compiles for real architectures, and run on the host gives NumPy's bits."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
from emulate import check_compiles, host_kernel
from optimizer_table import CASES, Case, trace_of

import gpubatch as gb
from gpubatch.formula import Trace
from gpubatch.launch import HostUpdate, piece_table, update_source

ARCHITECTURES = (70, 80, 90, 100)
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def emulate(trace: Trace, groups: list[tuple[np.ndarray, ...]], scalars: tuple[float, ...], threads: int = 256) -> None:
    dtype = groups[0][0].dtype
    kernel = host_kernel(
        update_source(trace, dtype.name), "update_arrays", "const long long* table", "const T* scalars"
    )
    addresses = np.array([[*(a.ctypes.data for a in group), group[0].size] for group in groups], np.int64)
    table = piece_table(addresses, dtype.itemsize, 4096)
    device_scalars = np.array([*scalars, 0.0], dtype)
    kernel(table.ctypes.data_as(ctypes.c_void_p), device_scalars.ctypes.data_as(ctypes.c_void_p), len(table), threads)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@every_case
def test_it_compiles_for_real_architectures(case: Case, dtype: str) -> None:
    source = update_source(trace_of(case)[0], dtype)
    for architecture in ARCHITECTURES:
        check_compiles(source, architecture)


@every_case
def test_the_emulated_kernel_gives_the_bits_of_numpy(case: Case, dtype: np.dtype, rng: np.random.Generator) -> None:
    trace, hyper = trace_of(case)
    numpy_update = HostUpdate(trace, dtype)
    # Empty, one element, a tail, several blocks; then starts that are aligned alike and not alike.
    for size in (0, 1, 7, 4096, 10_001):
        for offsets in ((0, 0, 0, 0, 0), (1, 1, 1, 1, 1), (0, 1, 2, 3, 1)):
            wide = [np.abs(rng.standard_normal(size + 8)).astype(dtype) for _ in trace.arrays]
            base = [(-a.ctypes.data // dtype.itemsize) % (16 // dtype.itemsize) for a in wide]
            theirs = [a.copy() for a in wide]
            ours = tuple(a[b + o :][:size] for a, b, o in zip(wide, base, offsets, strict=False))
            copies = [(-a.ctypes.data // dtype.itemsize) % (16 // dtype.itemsize) for a in theirs]
            emulated = tuple(a[b + o :][:size] for a, b, o in zip(theirs, copies, offsets, strict=False))
            for a, b in zip(emulated, ours, strict=True):
                a[...] = b
            outside = [a.copy() for a in theirs]
            scalars = trace.evaluate(5, **hyper)
            numpy_update([ours], scalars)
            emulate(trace, [emulated], scalars)
            for a, b in zip(emulated, ours, strict=True):
                np.testing.assert_allclose(a, b, rtol=8 * np.finfo(dtype).eps if "pow" in trace.c else 0)
            for whole, before, inner, b, o in zip(theirs, outside, emulated, copies, offsets, strict=False):
                np.testing.assert_array_equal(whole[: b + o], before[: b + o])
                np.testing.assert_array_equal(whole[b + o + inner.size :], before[b + o + inner.size :])


def test_one_launch_serves_arrays_that_lie_apart(dtype: np.dtype, rng: np.random.Generator) -> None:
    trace, _ = trace_of(CASES["adam"])
    scalars = trace.evaluate(2, lr=0.1, beta1=0.9, beta2=0.999, eps=1e-8)
    sizes = [0, 1, 5, 4095, 4096, 4097, 20_000]
    groups = [tuple(np.abs(rng.standard_normal(n)).astype(dtype) for _ in range(4)) for n in sizes]
    expected = [tuple(a.copy() for a in group) for group in groups]
    emulate(trace, groups, scalars, threads=64)
    HostUpdate(trace, dtype)(expected, scalars)
    for group, other in zip(groups, expected, strict=True):
        for a, b in zip(group, other, strict=True):
            np.testing.assert_array_equal(a, b)


def test_the_pieces_cover_every_element_once() -> None:
    sizes = np.array([0, 1, 4096, 4097, 100_000])
    addresses = np.stack([1_000_000 * np.arange(1, 6), 9_000_000 * np.arange(1, 6), sizes], axis=1)
    table = piece_table(addresses, 4, 4096)
    assert table[:, -1].min() > 0
    assert table[:, -1].sum() == sizes.sum()
    for address, _, size in addresses:
        pieces = [row for row in table if address <= row[0] < address + 4 * max(size, 1)]
        assert [row[0] for row in pieces] == list(np.cumsum([address, *(4 * row[-1] for row in pieces)])[:-1])


def test_a_wrong_formula_would_be_caught(rng: np.random.Generator) -> None:
    """The comparison has teeth: one sign changed in the source, and the bits differ."""
    trace, _ = trace_of(CASES["adam"])
    source = update_source(trace).replace("k[0] * m + k[1] * g", "k[0] * m - k[1] * g")
    kernel = host_kernel(source, "update_arrays", "const long long* table", "const T* scalars")
    arrays = [np.abs(rng.standard_normal(10)).astype(np.float32) for _ in range(4)]
    expected = [a.copy() for a in arrays]
    scalars = trace.evaluate(2, lr=0.1, beta1=0.9, beta2=0.999, eps=1e-8)
    table = piece_table(np.array([[*(a.ctypes.data for a in arrays), 10]], np.int64), 4, 4096)
    k = np.array(scalars, np.float32)
    kernel(table.ctypes.data_as(ctypes.c_void_p), k.ctypes.data_as(ctypes.c_void_p), 1, 256)
    HostUpdate(trace, np.dtype(np.float32))([tuple(expected)], scalars)
    assert np.abs(arrays[0] - expected[0]).max() > 1e-3


@pytest.mark.gpu
@every_case
def test_on_a_gpu_the_kernel_follows_numpy(case: Case, dtype: np.dtype, rng: np.random.Generator) -> None:
    if "cuda:0" not in gb.available_backends():
        pytest.skip("no CUDA device can be used here")
    cuda = gb.get_backend("cuda")
    w = rng.standard_normal(100_003).astype(dtype)
    on_gpu = cuda.asarray(w)
    a, b = case.make([w]), case.make([on_gpu])
    for _ in range(5):
        g = rng.standard_normal(w.shape).astype(dtype)
        a.step([g])
        b.step([cuda.asarray(g)])
    # The device contracts a*b + c; a sign or a condition may fall the other way where its operand is near zero.
    error = np.abs(cuda.to_numpy(on_gpu) - w) / (np.abs(w) + 1e-3)
    assert np.quantile(error, 0.999) < 64 * np.finfo(dtype).eps
