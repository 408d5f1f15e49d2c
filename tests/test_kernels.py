"""The generated CUDA of every optimizer: it compiles for real architectures, and run on the host gives NumPy's bits."""

from __future__ import annotations

import re
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from emulate import ORDERS, Table, check_compiles_everywhere, host_kernel, launch_bounds, ptx_of, sanitized
from expressions import programs, value
from families import drawn, every
from hypothesis import strategies as st
from kernel_report import sources
from needs import missing
from optimizer_table import CASES, FAST, Case, trace_of

import gpubatch as gb
from gpubatch.backend import compute_dtype
from gpubatch.formula import Trace
from gpubatch.ops import compile, reduce_sources, update_for, update_source
from gpubatch.ops.update import HostUpdate, cpu_update, piece_table

PARAMETERS = (
    *("const long long* table", "const T* scalars", "long long step", "const T* control", "long long* progress"),
    *("T* running", "const T* before", "long long count", "const double* values"),
)
REDUCE_PARAMETERS = (
    *("const long long* table", "const T* scalars", "long long step", "const T* control", "const long long* progress"),
    *("double* totals", "double* values", "unsigned* tickets"),
)
ALONE = (None, None, None, 0, None)  # the arguments after control, for an update outside a captured step
every_case = every("case", CASES, FAST)
EXACT = {"rtol": 0, "atol": 0}


COUNTS = ("sgd", "adam", "amsgrad")  # two, four and five arrays


def table_of(
    groups: list[tuple[np.ndarray, ...]], row_of: Sequence[int] | None = None, reductions: bool = False
) -> np.ndarray:
    rows = row_of or [0] * len(groups)
    words = [[*(a.ctypes.data for a in group), group[0].size, row] for group, row in zip(groups, rows, strict=True)]
    addresses = np.array(words, np.int64)
    return piece_table(addresses, np.array([a.itemsize for a in groups[0]]), 4096, reductions)


def emulate(
    trace: Trace,
    groups: list[tuple[np.ndarray, ...]],
    scalars: list[tuple[float, ...]],
    threads: int = 256,
    control: np.ndarray | None = None,
    row_of: Sequence[int] | None = None,
) -> None:
    storage, master = groups[0][0].dtype, len(groups[0]) > len(trace.arrays)
    dtype = compute_dtype(storage)
    stored = dtype.name, storage.name, master
    count = len(trace.passes[-1].trace.values)
    table = table_of(groups, row_of, count > 0)
    rows = np.array([row or (0.0,) for row in scalars], dtype)
    if not len(table):  # as CudaUpdate: a launch of no blocks is an error
        return
    totals, values = np.full(len(table) * count, np.nan), np.full(len(groups) * count, np.nan)
    tickets = np.zeros(len(groups), np.uint32)
    of_step = table, rows, rows.size, control
    for source in reduce_sources(trace, *stored):
        reduce = host_kernel(source, "reduce_arrays", *REDUCE_PARAMETERS)
        reduce(*of_step, None, totals, values, tickets, len(table), threads)
        assert not tickets.any()
    kernel = host_kernel(update_source(trace, *stored), "update_arrays", *PARAMETERS)
    kernel(*of_step, *ALONE[:-1], values, len(table), threads)


def roundings(trace: Trace, dtype: np.dtype) -> dict[str, float]:
    """How far the emulated device may be off: it has another power, and adds in another order."""
    if len(trace.passes) > 1:
        return dict.fromkeys(("rtol", "atol"), 64 * float(np.finfo(dtype).eps))
    return {"rtol": 8 * float(np.finfo(dtype).eps) if "pow" in trace.c else 0.0}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@every_case
def test_it_compiles_for_real_architectures(case: Case, dtype: str) -> None:
    """Without local memory, where the arrays would be if the loops over them were not unrolled."""
    for (report,) in check_compiles_everywhere(update_source(trace_of(case)[0], dtype)):
        assert report.registers <= 128  # two blocks of 256 threads at the same time, on any device


@every("dtype", {name: np.dtype(name) for name in ("float32", "float64")}, ["float32"])
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
            scalars = [trace.evaluate(5, **hyper)]
            numpy_update([ours], scalars)
            emulate(trace, [emulated], scalars)
            for a, b in zip(emulated, ours, strict=True):
                np.testing.assert_allclose(a, b, **roundings(trace, dtype))
            for whole, before, inner, b, o in zip(theirs, outside, emulated, copies, offsets, strict=False):
                np.testing.assert_array_equal(whole[: b + o], before[: b + o])
                np.testing.assert_array_equal(whole[b + o + inner.size :], before[b + o + inner.size :])


def test_the_device_says_which_row_of_scalars_is_meant(dtype: np.dtype, rng: np.random.Generator) -> None:
    trace, hyper = trace_of(CASES["adam"])
    kernel = host_kernel(update_source(trace, dtype.name), "update_arrays", *PARAMETERS)
    rows = np.array([trace.evaluate(t, **hyper) for t in range(1, 5)], dtype)
    arrays = tuple(np.abs(rng.standard_normal(10)).astype(dtype) for _ in range(4))
    expected = tuple(a.copy() for a in arrays)
    for t in (3, 1):
        HostUpdate(trace, dtype)([expected], [trace.evaluate(t, **hyper)])
        kernel(table_of([arrays]), rows, rows.shape[1], None, np.array([t - 1, 0, 0, 0, 0]), *ALONE[1:], 1, 256)
    for a, b in zip(arrays, expected, strict=True):
        np.testing.assert_array_equal(a, b)


def test_one_launch_serves_arrays_that_lie_apart(dtype: np.dtype, rng: np.random.Generator) -> None:
    trace, _ = trace_of(CASES["adam"])
    scalars = [trace.evaluate(2, lr=0.1, beta1=0.9, beta2=0.999, eps=1e-8)]
    sizes = [0, 1, 5, 4095, 4096, 4097, 20_000]
    groups = [tuple(np.abs(rng.standard_normal(n)).astype(dtype) for _ in range(4)) for n in sizes]
    expected = [tuple(a.copy() for a in group) for group in groups]
    emulate(trace, groups, scalars, threads=64)
    HostUpdate(trace, dtype)(expected, scalars)
    for group, other in zip(groups, expected, strict=True):
        for a, b in zip(group, other, strict=True):
            np.testing.assert_array_equal(a, b)


@every("name", COUNTS, ["adam"])
@every("order", ORDERS, ["forward"])
def test_it_stays_within_its_arrays(name: str, order: str, dtype: np.dtype, rng: np.random.Generator) -> None:
    """Under the sanitizers: no access outside an array, no misaligned access."""
    trace, hyper = trace_of(CASES[name])
    scalars = [trace.evaluate(3, **hyper)]
    count = len(trace.arrays)
    groups = []
    for size in (1, 3, 50, 4097):
        for starts in ([0] * count, [1] * count, [*range(count)]):
            groups.append(tuple(np.abs(rng.standard_normal(size + k)).astype(dtype)[k:] for k in starts))
    arrays = [a for group in groups for a in group]
    arguments = [Table(table := table_of(groups), arrays), np.array(scalars, dtype), len(scalars[0]), None, *ALONE]
    *ours, _ = sanitized(
        update_source(trace, dtype.name), "update_arrays", PARAMETERS, arguments, len(table), 256, order
    )
    HostUpdate(trace, dtype)(groups, scalars)
    for a, b in zip(ours, arrays, strict=True):
        np.testing.assert_array_equal(a, b)


def test_packs_that_are_not_aligned_would_be_caught() -> None:
    source = update_source(trace_of(CASES["sgd"])[0])
    check = "(row[1] + head * (long long)sizeof(S)) % 16 == 0"
    assert source.count(check) == 1
    arrays = np.ones(50, np.float32), np.ones(51, np.float32)[1:]
    arguments = [Table(table_of([arrays]), arrays), np.array([0.5], np.float32), 1, None, *ALONE]
    w, _, _ = sanitized(source, "update_arrays", PARAMETERS, arguments, 1, 256)
    np.testing.assert_array_equal(w, 0.5)
    with pytest.raises(AssertionError, match="which requires 16 byte alignment"):
        sanitized(source.replace(check, "true"), "update_arrays", PARAMETERS, arguments, 1, 256)


def test_the_pieces_cover_every_element_once() -> None:
    sizes = np.array([0, 1, 4096, 4097, 100_000])
    addresses = np.stack([1_000_000 * np.arange(1, 6), 9_000_000 * np.arange(1, 6), sizes, np.arange(5)], axis=1)
    table = piece_table(addresses, 4, 4096)
    assert table[:, -2].min() > 0
    assert table[:, -2].sum() == sizes.sum()
    for address, _, size, number in addresses:
        pieces = [row for row in table if address <= row[0] < address + 4 * max(size, 1)]
        assert all(row[-1] == number for row in pieces)
        assert [row[0] for row in pieces] == list(np.cumsum([address, *(4 * row[-2] for row in pieces)])[:-1])


def test_a_wrong_formula_would_be_caught(rng: np.random.Generator) -> None:
    """With one sign changed in the source, the bits differ."""
    trace, _ = trace_of(CASES["adam"])
    source = update_source(trace).replace("k[0] * m + k[1] * g", "k[0] * m - k[1] * g")
    kernel = host_kernel(source, "update_arrays", *PARAMETERS)
    arrays = [np.abs(rng.standard_normal(10)).astype(np.float32) for _ in range(4)]
    expected = [a.copy() for a in arrays]
    scalars = [trace.evaluate(2, lr=0.1, beta1=0.9, beta2=0.999, eps=1e-8)]
    kernel(table_of([tuple(arrays)]), np.array(scalars, np.float32), len(scalars[0]), None, *ALONE, 1, 256)
    HostUpdate(trace, np.dtype(np.float32))([tuple(expected)], scalars)
    assert np.abs(arrays[0] - expected[0]).max() > 1e-3


@drawn(1, 25, some=st.lists(programs(), min_size=6, max_size=6), single=st.booleans())
def test_any_expression_is_computed_as_numpy_does(some: list[Any], single: bool) -> None:
    """Six expressions in one kernel. Functions of libm may differ in the last bits, and decide at a jump."""

    @gb.rule
    def any_rule(w, g, a, b, c, d, e, f, t, *, lr):
        leaves = [2, -1.25, t, lr, b, a, g, w]
        return *(value(program, leaves) for program in some), g

    dtype = np.dtype(np.float32 if single else np.float64)
    trace, tolerance = any_rule.trace(), 1e4 * np.finfo(dtype).eps
    scalars = [trace.evaluate(3, lr=0.7)]
    arrays = tuple(np.random.default_rng(5).standard_normal((8, 40)).astype(dtype))
    expected = tuple(a.copy() for a in arrays)
    HostUpdate(trace, dtype)([expected], scalars)
    emulate(trace, [arrays], scalars)
    for found, right in zip(arrays, expected, strict=True):
        close = np.isclose(found, right, rtol=tolerance, atol=tolerance)
        assert (~close).sum() <= len(right) // 10, (found[~close], right[~close])


# --- scale and skip, float16 ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adam", "lamb decayed"])
@pytest.mark.parametrize("scale", [1.0, 0.25, 3.0])
@pytest.mark.parametrize("size", [1, 5000])
def test_the_gradient_is_scaled_on_the_device(
    name: str, scale: float, size: int, dtype: np.dtype, rng: np.random.Generator
) -> None:
    trace, hyper = trace_of(CASES[name])
    scalars = [trace.evaluate(3, **hyper)]
    w, g, m, v = (np.abs(rng.standard_normal(size)).astype(dtype) for _ in range(4))
    ours = tuple(a.copy() for a in (w, g, m, v))
    HostUpdate(trace, dtype)([(w, g * dtype.type(scale), m, v)], scalars)
    for update in (emulate_with(trace), HostUpdate(trace, dtype), cpu_update(trace, dtype)):
        arrays = tuple(a.copy() for a in ours)
        update([arrays], scalars, np.array([scale, 0], dtype))
        for a, b in zip(arrays, (w, ours[1], m, v), strict=True):
            np.testing.assert_allclose(
                a, b, **roundings(trace, dtype) if isinstance(update, types.FunctionType) else EXACT
            )


@pytest.mark.parametrize("storage", ["float16", "float32", "float64"])
@pytest.mark.parametrize("name", ["adam", "lamb decayed"])
def test_a_step_that_is_to_be_skipped_changes_nothing(name: str, storage: str, rng: np.random.Generator) -> None:
    trace, hyper = trace_of(CASES[name])
    scalars, dtype = [trace.evaluate(3, **hyper)], compute_dtype(np.dtype(storage))
    arrays = tuple(rng.standard_normal(5000).astype(storage if i < 2 else dtype) for i in range(4))
    arrays[1][7] = np.nan
    before = [a.copy() for a in arrays]
    for update in (emulate_with(trace), update_for(trace, np.dtype(storage), gb.get_backend("cpu"))):
        update([arrays], scalars, np.array([np.nan, 1], dtype))
        for a, b in zip(arrays, before, strict=True):
            np.testing.assert_array_equal(a, b)


def emulate_with(trace: Trace) -> Any:
    return lambda arrays, scalars, control=None, row_of=None: emulate(
        trace, arrays, scalars, control=control, row_of=row_of
    )


@every("storage", ["float16", "float32", "float64"], ["float16"])
@every("case", CASES, COUNTS)
def test_arrays_take_their_own_rows_of_scalars(case: Case, storage: str, rng: np.random.Generator) -> None:
    """As if each were updated alone, with one thread or more, in every form."""
    trace, hyper = trace_of(case)
    dtype, wide = np.dtype(storage), compute_dtype(np.dtype(storage))
    rows = [trace.evaluate(t, **hyper) for t in (1, 5, 2)]
    row_of = [2, 0, 0, 1, 2, 1, 0]
    sizes = [5, 40_000, 1, 30_000, 0, 9000, 3]
    kinds = [dtype, dtype, *[wide] * (len(trace.arrays) - 2)]
    start = [tuple(np.abs(rng.standard_normal(n)).astype(kind) for kind in kinds) for n in sizes]
    alone = update_for(trace, dtype, gb.get_backend("cpu"))
    forms = [update_for(trace, dtype, gb.get_backend("cpu")), emulate_with(trace)]
    if dtype == wide:
        forms.append(HostUpdate(trace, dtype))
    for update in forms:
        found, expected = ([tuple(a.copy() for a in arrays) for arrays in start] for _ in range(2))
        update(found, rows, None, row_of)
        for arrays, row in zip(expected, row_of, strict=True):
            alone([arrays], [rows[row]])
        for ours, theirs in zip(found, expected, strict=True):
            for a, b in zip(ours, theirs, strict=True):
                np.testing.assert_allclose(a, b, **roundings(trace, dtype))


@pytest.mark.parametrize("master", [False, True], ids=["rounded", "master"])
@pytest.mark.parametrize("name", ["sgd", "adam", "amsgrad"])
def test_float16_is_computed_in_float32(name: str, master: bool, rng: np.random.Generator) -> None:
    """The oracle: the same rule on float32 copies, and NumPy's own rounding to float16."""
    trace, hyper = trace_of(CASES[name])
    scalars = [trace.evaluate(5, **hyper)]
    for size in (0, 1, 7, 4097, 20_001):
        for start in (0, 1, 5):
            arrays = [np.abs(rng.standard_normal(size + start))[start:] for _ in range(len(trace.arrays) + master)]
            group = tuple(a.astype(np.float16 if i < 2 else np.float32) for i, a in enumerate(arrays))
            if master:
                group[0][...] = group[-1]
            wide = tuple(a.astype(np.float32) for a in group[: len(trace.arrays)])
            if master:
                wide[0][...] = group[-1]
            HostUpdate(trace, np.dtype(np.float32))([wide], scalars)
            on_host = tuple(a.copy() for a in group)
            emulate(trace, [group], scalars)
            update_for(trace, np.dtype(np.float16), gb.get_backend("cpu"), master)([on_host], scalars)
            for found in (group, on_host):
                np.testing.assert_array_equal(found[0], wide[0].astype(np.float16))
                for a, b in zip(found[2:], [*wide[2:], *([wide[0]] if master else [])], strict=True):
                    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("master", [False, True], ids=["rounded", "master"])
@every("name", COUNTS, ["adam"])
def test_float16_compiles_and_stays_within_its_arrays(name: str, master: bool, rng: np.random.Generator) -> None:
    trace, hyper = trace_of(CASES[name])
    source = update_source(trace, "float32", "float16", master)
    for (report,) in check_compiles_everywhere(source):
        assert report.registers <= 128
    count = len(trace.arrays) + master
    groups = []
    for size in (1, 9, 50, 4097):
        for starts in ([0] * count, [1] * count, [*range(count)]):
            kinds = [np.float16] * 2 + [np.float32] * (count - 2)
            numbers = (np.abs(rng.standard_normal(size + k)).astype(d)[k:] for k, d in zip(starts, kinds, strict=True))
            groups.append(tuple(numbers))
    words = np.concatenate([table_of([group]) for group in groups])
    arrays = [a for group in groups for a in group]
    arguments = [
        Table(words, arrays),
        np.array(trace.evaluate(3, **hyper), np.float32),
        len(trace.scalars),
        None,
        *ALONE,
    ]
    *ours, _ = sanitized(source, "update_arrays", PARAMETERS, arguments, len(words), 256)
    update_for(trace, np.dtype(np.float16), gb.get_backend("cpu"), master)(groups, [trace.evaluate(3, **hyper)])
    for a, b in zip(ours, arrays, strict=True):
        np.testing.assert_array_equal(a, b)


def test_every_kernel_is_in_the_report() -> None:
    """CI compiles the kernels of the report in every element type, and checks registers and spills."""
    folder, reported = Path(__file__).parents[1] / "kernels", sources()
    names = launch_bounds("\n".join(path.read_text(encoding="utf-8") for path in folder.glob("*.cu*"))).keys()
    assert names == {name for source in reported.values() for name in launch_bounds(source)}
    for name in names - {"take", "permute"}:  # of integers alone
        of_it = [source for source in reported.values() if name in launch_bounds(source)]
        kinds = {re.search(r"typedef (\w+) S;", source)[1] for source in of_it}  # type: ignore[index]
        of_rules = name in ("update_arrays", "reduce_arrays")
        assert kinds >= ({"T", "Half"} if of_rules else {"float", "double", "Half"}), name


@pytest.mark.parametrize("storage", ["float32", "float64", "float16"])
def test_the_compiler_knows_that_arrays_are_in_global_memory(storage: str) -> None:
    """Their addresses come from a table; otherwise each load would have to check the kind of memory."""
    wide = compute_dtype(np.dtype(storage)).name
    text = ptx_of(update_source(trace_of(CASES["adam"])[0], wide, storage, storage == "float16"), 90)
    kinds = set(re.findall(r"\b(?:ld|st)\.(\w+)", text))
    assert kinds == {"global", "param", "shared"}


def test_float16_is_read_and_rounded_as_numpy_does() -> None:
    """All float16 numbers, and the float32 numbers at, next to and halfway between them."""
    source = (
        compile.kernel_source("half.cuh")
        + """
extern "C" __global__ void convert(const unsigned short* bits, float* wide, const float* x, unsigned short* narrow,
                                   long long n, long long m) {
    for (long long i = threadIdx.x; i < n; i += blockDim.x) wide[i] = Half{bits[i]};
    for (long long i = threadIdx.x; i < m; i += blockDim.x) narrow[i] = Half::of(x[i]).bits;
}"""
    )
    every = np.arange(1 << 16, dtype=np.uint16)
    finite = np.sort(every.view(np.float16)[np.isfinite(every.view(np.float16))]).astype(np.float32)
    middle = (finite[1:] + finite[:-1]) / 2
    points = np.concatenate([finite, middle, [65504, 65519.99, 65520, 1e30, np.inf, 1e-30]]).astype(np.float32)
    x = np.concatenate(
        [points, np.nextafter(points, np.float32(np.inf)), np.nextafter(points, np.float32(-np.inf)), -points]
    )
    wide, narrow = np.empty(every.size, np.float32), np.empty(x.size, np.uint16)
    parameters = ("const unsigned short* bits", "float* wide", "const float* x", "unsigned short* narrow")
    kernel = host_kernel(source, "convert", *parameters, "long long n", "long long m")
    kernel(every, wide, x, narrow, every.size, x.size, 1, 32)
    np.testing.assert_array_equal(wide, every.view(np.float16).astype(np.float32))
    assert np.array_equal(np.signbit(wide), np.signbit(every.view(np.float16)))
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(narrow, x.astype(np.float16).view(np.uint16))


@pytest.mark.gpu
@every_case
def test_on_a_gpu_the_kernel_follows_numpy(case: Case, dtype: np.dtype, rng: np.random.Generator) -> None:
    """As far as roundings allow: the device contracts a*b + c, and divides and takes roots in its own way.

    How many roundings a formula loses on these numbers is a property of the formula, not of the dtype; NumPy in
    float32 against float64 shows it. The device and NumPy lose that many each; the rest is for quotients and powers.
    """
    if "cuda:0" not in gb.available_backends():
        missing("gpu", "no CUDA device can be used here")
    cuda = gb.get_backend("cuda")
    start, *gradients = (rng.standard_normal(100_003).astype(np.float32) for _ in range(6))
    narrow, wide = after(case, start.copy(), gradients), after(case, start.astype(np.float64), gradients)
    roundings = max(1.0, loss(narrow, wide) / np.finfo(np.float32).eps)
    ours = cuda.to_numpy(after(case, cuda.asarray(start.astype(dtype)), [cuda.asarray(g) for g in gradients]))
    right = after(case, start.astype(dtype), gradients)
    assert loss(ours, right) < 4 * roundings * np.finfo(dtype).eps


def after(case: Case, w: Any, gradients: list[Any]) -> Any:
    """The weights after a step for each gradient, in the arithmetic of ``w``, in place."""
    opt = case.make([w])
    for g in gradients:
        opt.step([g.astype(w.dtype)])
    return w


def loss(found: np.ndarray, right: np.ndarray) -> float:
    """The relative error, without the largest thousandth: an operand near zero, or a condition that rounding flips."""
    return float(np.quantile(np.abs(found - right) / (np.abs(right) + 1e-3), 0.999))
