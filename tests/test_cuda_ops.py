"""The core's kernels for CUDA: they compile for real architectures, and on the emulated grid agree with NumPy.

A case runs one method on arrays that it draws; it is run twice, by NumPy in float64 and by CUDA, on the same numbers.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from emulate import ARCHITECTURES, check_compiles
from hypothesis import given, settings, strategies as st
from needs import missing
from stand_in import DeviceArray, StandIn, stand_in_backend

import gpubatch as gb
from gpubatch import cuda_ops
from gpubatch.backend import Array, Backend, CudaBackend
from gpubatch.cuda_ops import CudaOps
from gpubatch.launch import kernel_source
from gpubatch.ops import KINDS, PARTS, SQUARE_SUM_SIZE, Activation, NumpyOps, Ops

F = np.dtype(np.float32)
SIZES = [(1, 1), (1, 3), (5, 10), (1030, 1), (301, 3), (67, 257), (7, 1000), (2100, 33)]
CLASSES = [(1, 2), (40, 2), (301, 3), (33, 10), (9, 257), (3, 5000)]


@dataclass(frozen=True)
class Place:
    """Where a case runs: by whom, on what kind of arrays, and where its numbers come from.

    Numbers are rounded to ``precision`` before they become ``dtype``: what is computed with is the same everywhere.
    """

    ops: Ops
    backend: Backend
    dtype: np.dtype
    precision: np.dtype
    rng: np.random.Generator
    misaligned: bool = False

    def real(self, *shape: int) -> Array:
        return self.array(self.rng.standard_normal(shape).astype(self.precision))

    def grid(self, *shape: int) -> Array:
        """Multiples of 1/8: sums and differences have no rounding, and some are equal."""
        return self.array(np.round(8 * self.rng.standard_normal(shape)) / 8)

    def positive(self, *shape: int) -> Array:
        return self.array(self.rng.uniform(0.1, 2, shape).astype(self.precision))

    def labels(self, rows: int, classes: int, dtype: str = "int64") -> Array:
        return self.backend.asarray(self.rng.integers(0, classes, rows).astype(dtype))

    def array(self, values: np.ndarray) -> Array:
        out = self.empty(*values.shape)
        out[...] = self.backend.asarray(values.astype(self.dtype))
        return out

    def empty(self, *shape: int, dtype: Any = None) -> Array:
        dtype = np.dtype(dtype or self.dtype)
        if not self.misaligned or dtype != self.dtype:
            return self.backend.empty(shape, dtype)
        # One element after a 16-byte boundary; memory of a device begins at one, but that of NumPy may not.
        wide = self.backend.empty(int(np.prod(shape)) + 32 // dtype.itemsize, dtype)
        start = (-wide.ctypes.data % 16) // dtype.itemsize + 1 if isinstance(wide, np.ndarray) else 1
        return wide[start : start + int(np.prod(shape))].reshape(shape)

    def work(self, rows: int, features: int, **more: Array) -> dict[str, Array]:
        """Everything that any of the methods works in, for NumPy and CUDA."""
        full = {name: self.empty(rows, features) for name in ("slope", "t", "u", "dz", "normal", "mask")}
        columns = {name: self.empty(features) for name in ("mean", "var", "inverse")}
        lines = {name: self.empty(rows) for name in ("sum", "log", "weight")}
        return {
            **full,
            **columns,
            **lines,
            "row": self.empty(features if more.pop("by_columns", None) else rows),
            "loss": self.empty(1),
            "partial": self.empty(2 * PARTS, features),
            "index": self.empty(rows, dtype=np.int64),
            "offsets": self.backend.asarray(np.arange(rows, dtype=np.int64) * features),
            "uniform": self.empty(rows, features, dtype=np.float32),
            "positive": self.empty(rows, features, dtype=bool),
            **more,
        }


Results = dict[str, Array]


@dataclass(frozen=True)
class Case:
    """One use of a method. ``run`` returns what it wrote.

    ``exact``: no number is rounded differently, so that NumPy gives the same bits in the same element type. ``grows``:
    errors grow as the root of this many numbers that are added up, of (rows, features).
    """

    method: str
    source: Callable[[str], str]
    run: Callable[[Place, int, int], Results]
    sizes: list[tuple[int, int]]
    exact: bool = False
    grows: Callable[[int, int], int] = lambda rows, features: 1


# --- the cases -------------------------------------------------------------------------------------------------------


def activate(kind: str, bias: bool, in_place: bool, p: Place, rows: int, features: int) -> Results:
    x, b, work = p.real(rows, features), p.real(features), p.work(rows, features)
    y = x if in_place else p.empty(rows, features)
    f = Activation(kind, 0.1)
    p.ops.activate(f, x, b if bias else None, y, work)
    return {"y": y, **({"slope": work["slope"]} if f.keeps else {})}


def activation_gradient(kind: str, dx: str, bias: bool, p: Place, rows: int, features: int) -> Results:
    y, dy, work = p.real(rows, features), p.real(rows, features), p.work(rows, features)
    work["slope"][...] = p.real(rows, features)
    out = {"new": p.empty(rows, features), "in place": dy, "none": None}[dx]
    db = p.empty(features) if bias else None
    p.ops.activation_gradient(Activation(kind, 0.1), y, dy, out, db, work)
    return {name: a for name, a in (("dx", out), ("db", db)) if a is not None}


def softmax(truth: str, gradient: bool, p: Place, rows: int, classes: int) -> Results:
    z, work = p.real(rows, classes), p.work(rows, classes)
    z *= 5
    if truth == "rows":
        Y = p.positive(rows, classes)
    elif truth == "one-hot":
        Y = p.backend.asarray(np.eye(classes, dtype=np.uint8)[p.rng.integers(0, classes, rows)])
    else:
        Y = p.labels(rows, min(classes, 100), truth)
    p.ops.softmax_cross_entropy(z, Y, gradient, work)
    return {"loss": work["loss"], **({"dz": work["dz"]} if gradient else {})}


def svm(labels: str, gradient: bool, p: Place, rows: int, classes: int) -> Results:
    z, Y, work = p.grid(rows, classes), p.labels(rows, min(classes, 100), labels), p.work(rows, classes)
    p.ops.svm(z, Y, gradient, work)
    return {"loss": work["loss"], **({"dz": work["dz"]} if gradient else {})}


def normalise(p: Place, rows: int, features: int) -> Results:
    x, work = p.real(rows, features), p.work(rows, features)
    mean, var, gamma, beta = p.real(features), p.positive(features), p.real(features), p.real(features)
    p.ops.normalise(x, mean, var, 1e-5, gamma, beta, x, work)
    return {"y": x}


def batch_norm(in_place: bool, p: Place, rows: int, features: int) -> Results:
    x, gamma, beta, work = p.real(rows, features), p.real(features), p.real(features), p.work(rows, features)
    x += 3  # where E[x²] - mean² would lose digits
    y = x if in_place else p.empty(rows, features)
    p.ops.batch_norm(x, 1e-3, gamma, beta, y, work)
    return {"y": y, **{name: work[name] for name in ("mean", "var", "normal", "inverse")}}


def batch_norm_gradient(dx: str, p: Place, rows: int, features: int) -> Results:
    dy, gamma, dgamma, dbeta = p.real(rows, features), p.real(features), p.empty(features), p.empty(features)
    work = p.work(rows, features, by_columns=True)
    work["normal"][...], work["inverse"][...] = p.real(rows, features), p.positive(features)
    out = {"new": p.empty(rows, features), "in place": dy, "none": None}[dx]
    p.ops.batch_norm_gradient(dy, gamma, dgamma, dbeta, out, work)
    return {"dgamma": dgamma, "dbeta": dbeta, **({} if out is None else {"dx": out})}


def move(p: Place, rows: int, features: int) -> Results:
    running, new = p.real(features), p.real(features)
    p.ops.move(running, new, 0.1, 1.25, p.work(rows, features, by_columns=True))
    return {"running": running}


def dropout(rate: float, p: Place, rows: int, features: int) -> Results:
    x, y, work = p.real(rows, features), p.empty(rows, features), p.work(rows, features)
    p.ops.dropout(x, y, rate, (2**63 + 11, 3), 2**40 + 1, work)
    return {"y": y, "mask": work["mask"]}


def square_sum(p: Place, rows: int, features: int) -> Results:
    out = p.backend.zeros(SQUARE_SUM_SIZE, np.float64)
    for _ in range(2):  # it adds to what is there
        p.ops.square_sum(p.real(rows, features), out)
    return {"sum": out[:2]}


def gather(stored: str, scale: float, shift: float, p: Place, rows: int, features: int) -> Results:
    samples, dtype = 2 * rows + 1, np.dtype(stored)
    if dtype.kind == "f":
        values = p.rng.standard_normal((samples, features)).astype(stored)
    elif dtype.kind == "b":
        values = p.rng.integers(0, 2, (samples, features)).astype(bool)
    else:
        values = p.rng.integers(np.iinfo(stored).min, np.iinfo(stored).max, (samples, features), stored, endpoint=True)
    index = p.backend.asarray(p.rng.integers(0, samples, rows))
    out = p.empty(rows, features)
    p.ops.gather(p.backend.asarray(values), index, out, scale, shift)
    return {"out": out}


def file(name: str, *before: str) -> Callable[[str], str]:
    return lambda dtype: cuda_ops.source_of(dtype, *before, name)


CASES: dict[str, Case] = {}
for kind in KINDS:
    source = functools.partial(lambda kind, dtype: cuda_ops.activation_source(dtype, kind), kind)
    sizes = SIZES if kind in ("identity", "gelu") else [(301, 3)]  # one says about sizes what all do
    for bias, in_place in ((True, False), (False, True)):
        CASES[f"activate {kind} {'with' if bias else 'without'} bias"] = Case(
            "activate", source, functools.partial(activate, kind, bias, in_place), sizes
        )
    for dx, bias in (("new", True), ("in place", False)):
        CASES[f"activation_gradient {kind} {dx}"] = Case(
            "activation_gradient",
            source,
            functools.partial(activation_gradient, kind, dx, bias),
            [*sizes, (0, 5)],
            grows=lambda rows, features: rows,
        )
CASES["activation_gradient of biases alone"] = replace(
    CASES["activation_gradient identity new"], run=functools.partial(activation_gradient, "identity", "none", True)
)
for truth in ("int64", "uint8", "int32", "rows", "one-hot"):
    CASES[f"softmax {truth}"] = Case(
        "softmax_cross_entropy", file("loss.cu"), functools.partial(softmax, truth, True), CLASSES
    )
    if truth in ("int64", "uint8"):
        CASES[f"svm {truth}"] = Case("svm", file("loss.cu"), functools.partial(svm, truth, True), CLASSES)
for truth in ("int64", "rows"):
    CASES[f"softmax {truth}, loss alone"] = replace(
        CASES[f"softmax {truth}"], run=functools.partial(softmax, truth, False)
    )
CASES["svm, loss alone"] = replace(CASES["svm int64"], run=functools.partial(svm, "int64", False))
CASES["normalise"] = Case("normalise", file("batch_norm.cu"), normalise, SIZES)
for in_place in (True, False):
    CASES[f"batch_norm {'in place' if in_place else 'new'}"] = Case(
        "batch_norm",
        file("batch_norm.cu"),
        functools.partial(batch_norm, in_place),
        SIZES,
        grows=lambda rows, features: rows,
    )
for dx in ("new", "in place", "none"):
    CASES[f"batch_norm_gradient {dx}"] = Case(
        "batch_norm_gradient",
        file("batch_norm.cu"),
        functools.partial(batch_norm_gradient, dx),
        SIZES,
        grows=lambda rows, features: rows,
    )
CASES["move"] = Case("move", file("batch_norm.cu"), move, SIZES)
for rate in (0.0, 0.3):
    CASES[f"dropout {rate}"] = Case(
        "dropout", file("dropout.cu", "philox.cuh"), functools.partial(dropout, rate), SIZES, exact=True
    )
CASES["square_sum"] = Case(
    "square_sum", file("square_sum.cu"), square_sum, [*SIZES, (0, 1), (150, 1000)], grows=lambda r, f: 0
)
for stored, c_type in cuda_ops.STORED.items():
    source = functools.partial(
        lambda c_type, dtype: cuda_ops.source_of(dtype, "half.cuh", "gather.cu", before=f"typedef {c_type} S;"), c_type
    )
    sizes = SIZES if stored == "uint8" else [(67, 257)]
    CASES[f"gather {stored}"] = Case(
        "gather", source, functools.partial(gather, stored, 1.0, 0.0), [*sizes, (0, 5)], exact=True
    )
CASES["gather scaled"] = replace(CASES["gather uint8"], run=functools.partial(gather, "uint8", 1 / 255, -0.5))
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


# --- how they are compared -------------------------------------------------------------------------------------------


def by_numpy(case: Case, size: tuple[int, int], dtype: np.dtype) -> Results:
    """The results that are right: in float64, or in ``dtype`` where bits are compared."""
    computed = dtype if case.exact else np.dtype(np.float64)
    place = Place(NumpyOps(), gb.get_backend("cpu"), computed, dtype, np.random.default_rng(size))
    return case.run(place, *size)


def by_cuda(
    case: Case, size: tuple[int, int], dtype: np.dtype, backend: CudaBackend, misaligned: bool = False
) -> dict[str, np.ndarray]:
    """The results of :class:`CudaOps`, on the same numbers."""
    place = Place(CudaOps(backend, dtype), backend, dtype, dtype, np.random.default_rng(size), misaligned)
    with backend.scope():
        return {name: backend.to_numpy(a) for name, a in case.run(place, *size).items()}


def compare(case: Case, size: tuple[int, int], ours: Results, right: Results, dtype: np.dtype) -> None:
    """Within some roundings of the largest number; sums of many numbers within the root of how many times that."""
    assert ours.keys() == right.keys()
    eps = np.finfo(np.float64 if case.method == "square_sum" else dtype).eps
    bound = 16 * eps * (1 + case.grows(*size)) ** 0.5
    for name in ours:
        largest = np.abs(right[name]).max(initial=1)
        np.testing.assert_allclose(ours[name], right[name], rtol=bound, atol=bound * largest, err_msg=f"{name} {size}")


def same(ours: Results, others: Results) -> None:
    assert ours.keys() == others.keys()
    for name in ours:
        np.testing.assert_array_equal(ours[name], others[name], err_msg=name)


@pytest.fixture
def device() -> CudaBackend:
    return stand_in_backend()


# --- the tests -------------------------------------------------------------------------------------------------------


def test_every_method_has_a_case() -> None:
    assert {case.method for case in CASES.values()} == Ops.__abstractmethods__
    assert not inspect.isabstract(CudaOps)


@functools.cache  # cases share sources
def compiled(source: str, architecture: int) -> None:
    check_compiles(source, architecture)


@every_case
def test_it_compiles_for_real_architectures(case: Case, dtype: np.dtype) -> None:
    for architecture in ARCHITECTURES:
        compiled(case.source(dtype.name), architecture)


@every_case
def test_it_agrees_with_numpy(case: Case, dtype: np.dtype, device: CudaBackend) -> None:
    """And has the same bits when the threads run in another order, and on arrays that begin elsewhere."""
    for size in case.sizes:
        right = by_numpy(case, size, dtype)
        ours = by_cuda(case, size, dtype, device)
        if case.exact:
            same(ours, right)
        else:
            compare(case, size, ours, right, dtype)
        if case.method in ("dropout", "square_sum"):  # which look at sixteen bytes at a time
            same(ours, by_cuda(case, size, dtype, device, misaligned=True))
        device.cupy.order = "reverse"
        same(ours, by_cuda(case, size, dtype, device))
        device.cupy.order = "forward"


LARGE = {
    "softmax int64": (2, 100_000),
    "softmax rows": (1, 100_000),
    "svm int64": (2, 100_000),
    "activate relu with bias": (3, 100_000),
    "activation_gradient relu new": (40, 30_000),
    "batch_norm new": (40, 9_000),
    "square_sum": (1, 2_000_003),
}


@pytest.mark.parametrize("name", LARGE)
def test_large_sizes(name: str, device: CudaBackend) -> None:
    dtype = np.dtype(np.float32)
    right = by_numpy(CASES[name], LARGE[name], dtype)
    compare(CASES[name], LARGE[name], by_cuda(CASES[name], LARGE[name], dtype, device), right, dtype)


OF_ANY_SIZE = [
    "activation_gradient gelu new",
    "softmax rows",
    "svm uint8",
    "batch_norm new",
    "square_sum",
    "dropout 0.3",
]


@pytest.mark.parametrize("name", OF_ANY_SIZE)
@settings(max_examples=15, deadline=None, derandomize=True)
@given(size=st.tuples(st.integers(1, 90), st.integers(2, 70)), misaligned=st.booleans())
def test_any_size(name: str, size: tuple[int, int], misaligned: bool) -> None:
    dtype, backend = np.dtype(np.float32), stand_in_backend()
    ours = by_cuda(CASES[name], size, dtype, backend, misaligned)
    compare(CASES[name], size, ours, by_numpy(CASES[name], size, dtype), dtype)


SANITIZED = [name for name in CASES if "activat" not in name or "gelu " in name]


@pytest.mark.parametrize("name", SANITIZED)
def test_nothing_beyond_an_array_is_touched(name: str) -> None:
    dtype, backend, case = np.dtype(np.float32), stand_in_backend(sanitize=True), CASES[name]
    for size in [(37, 5), (3, 301)]:
        ours = by_cuda(case, size, dtype, backend)
        if "in place" not in name and case.method != "normalise":  # the sanitizers get copies, one for each argument
            compare(case, size, ours, by_numpy(case, size, dtype), dtype)


class Sealed:
    """Ops during whose methods nothing can be allocated on the device or read from it."""

    def __init__(self, ops: CudaOps, patch: pytest.MonkeyPatch) -> None:
        self.ops, self.patch = ops, patch

    def __getattr__(self, name: str) -> Callable[..., None]:
        def method(*arguments: Any) -> None:
            with self.patch.context() as patch:
                for owner, names in (
                    (StandIn, ("empty", "zeros", "asarray")),
                    (DeviceArray, ("get", "item", "tolist", "__float__", "__int__", "__bool__", "astype", "copy")),
                ):
                    for refused in names:
                        patch.setattr(owner, refused, None)
                getattr(self.ops, name)(*arguments)

        return method


@every_case
def test_nothing_is_allocated_or_read_back(case: Case, device: CudaBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    dtype = np.dtype(np.float32)
    ops: Any = Sealed(CudaOps(device, dtype), monkeypatch)
    case.run(Place(ops, device, dtype, dtype, np.random.default_rng(0)), 3, 5)
    assert device.cupy.launches


# --- what a table of sizes does not show -----------------------------------------------------------------------------


def test_nan_and_infinity_go_through_as_in_numpy(dtype: np.dtype, device: CudaBackend) -> None:
    special = np.array([[np.nan, 1, -1], [np.inf, 1, 2], [-np.inf, 0, 3], [-np.inf, -np.inf, -np.inf], [0, -0.0, 1]])
    for name in CASES:
        case = CASES[name]
        if case.method in ("move", "square_sum", "gather", "dropout") or "step" in name:
            continue

        class Special(Place):
            def real(self, *shape: int) -> Array:
                return self.array(special if shape == special.shape else np.full(shape, 0.5))

            grid = real

        with np.errstate(all="ignore"):
            right, ours = (
                case.run(Special(ops, where, dtype, dtype, np.random.default_rng(0)), *special.shape)
                for ops, where in ((NumpyOps(), gb.get_backend("cpu")), (CudaOps(device, dtype), device))
            )
        for key in right:
            np.testing.assert_allclose(ours[key], right[key], rtol=1e-4, atol=1e-6, err_msg=f"{name}: {key}")


@pytest.mark.parametrize("method", ["softmax_cross_entropy", "svm"])
@pytest.mark.parametrize("classes", [3, 300])
@pytest.mark.parametrize("label", [-1, 2**40, -(2**63)])
def test_a_label_out_of_range_is_nan_and_nothing_else(method: str, classes: int, label: int) -> None:
    """The device cannot raise; what it must not do is touch memory that is not the row's."""
    backend = stand_in_backend(sanitize=True)
    place = Place(CudaOps(backend, F), backend, F, F, np.random.default_rng(0))
    z, Y, work = place.real(4, classes), backend.asarray(np.array([0, 1, label, 2])), place.work(4, classes)
    getattr(place.ops, method)(z, Y, True, work)
    assert np.isnan(work["loss"].get()).all()
    for of_row in (work["row"].get(), work["dz"].get().sum(axis=1)):
        np.testing.assert_array_equal(np.isnan(of_row), [False, False, True, False])


def test_labels_that_are_one_class_too_far(device: CudaBackend) -> None:
    place = Place(CudaOps(device, F), device, F, F, np.random.default_rng(0))
    z, work = place.real(2, 3), place.work(2, 3)
    place.ops.softmax_cross_entropy(z, device.asarray(np.array([2, 3])), False, work)
    np.testing.assert_array_equal(np.isnan(work["row"].get()), [False, True])


@pytest.mark.parametrize("classes", [2, 10, 300, 5000])
def test_equal_scores(classes: int, dtype: np.dtype, device: CudaBackend) -> None:
    """The closed form: log(classes), and 1/classes for each but the label; a margin of 1 for each but the label."""
    place = Place(CudaOps(device, dtype), device, dtype, dtype, np.random.default_rng(0))
    z, Y, work = place.array(np.full((3, classes), 1000.0)), place.labels(3, classes), place.work(3, classes)
    right = 1 / classes - np.eye(classes)[Y.get()]
    tolerance = 100 * np.finfo(dtype).eps
    place.ops.softmax_cross_entropy(z, Y, True, work)
    np.testing.assert_allclose(work["loss"].get(), np.log(classes), rtol=tolerance)
    np.testing.assert_allclose(work["dz"].get(), right / 3, rtol=tolerance, atol=tolerance)
    place.ops.svm(z, Y, True, work)
    np.testing.assert_array_equal(work["loss"].get(), classes - 1)
    np.testing.assert_allclose(work["dz"].get(), right * classes / 3, rtol=tolerance)


@pytest.mark.parametrize("missing_classes", [0, 30])
def test_classes_that_are_ruled_out_do_not_count(missing_classes: int, dtype: np.dtype, device: CudaBackend) -> None:
    place = Place(CudaOps(device, dtype), device, dtype, dtype, np.random.default_rng(0))
    z, work = np.full((1, 33), -np.inf), place.work(1, 33)
    z[0, missing_classes:] = 0
    Y = device.asarray(np.array([32]))
    place.ops.softmax_cross_entropy(place.array(z), Y, True, work)
    np.testing.assert_allclose(work["loss"].get(), np.log(33 - missing_classes), rtol=1e-6)
    np.testing.assert_array_equal(work["dz"].get()[0, :missing_classes], 0)


def test_square_sum_adds_up_and_counts_what_is_not_finite(dtype: np.dtype, device: CudaBackend) -> None:
    ops, out = CudaOps(device, dtype), device.zeros(SQUARE_SUM_SIZE, np.float64)
    for x in ([3.0, -4.0], [1.0], []):
        ops.square_sum(device.asarray(np.array(x, dtype)), out)
    assert out[:2].get().tolist() == [26, 0]
    x = np.ones(5000, dtype)
    x[[0, 17, 4999]] = np.nan, np.inf, -np.inf
    ops.square_sum(device.asarray(x), out)
    assert (np.isnan(out[0]), out[1]) == (True, 3)
    out[:] = 0
    ops.square_sum(device.asarray(np.full(3, np.finfo(dtype).max)), out)
    assert out[1] == 0  # each is finite, whatever becomes of its square


def test_every_number_of_16_bits(dtype: np.dtype, device: CudaBackend) -> None:
    source = np.arange(2**16, dtype=np.uint16).view(np.float16)[:, None]
    out = device.empty((2**16, 1), dtype)
    CudaOps(device, dtype).gather(device.asarray(source), device.asarray(np.arange(2**16)), out, 1.0, 0.0)
    right = source.astype(dtype)
    np.testing.assert_array_equal(out.get(), right)
    numbers = ~np.isnan(right)
    np.testing.assert_array_equal(np.signbit(out.get())[numbers], np.signbit(right)[numbers])


def test_samples_of_more_dimensions_are_gathered(device: CudaBackend, rng: np.random.Generator) -> None:
    source, index = rng.integers(0, 256, (9, 4, 5, 3)).astype(np.uint8), np.array([8, 0, 0, 3])
    for shape in ((4, 4, 5, 3), (4, 60)):
        out = device.empty(shape, F)
        CudaOps(device, F).gather(device.asarray(source), device.asarray(index), out, 0.5, 0.0)
        np.testing.assert_array_equal(out.get(), (source[index] * F.type(0.5)).reshape(shape))


def test_what_cannot_be_gathered(device: CudaBackend) -> None:
    ops, index = CudaOps(device, F), device.zeros(2, np.int64)
    source, out = device.zeros((4, 6), F), device.zeros((2, 6), F)
    with pytest.raises(gb.ShapeError, match="source must be C-contiguous to gather on a GPU"):
        ops.gather(device.zeros((4, 12), F)[:, ::2], index, out, 1.0, 0.0)
    with pytest.raises(gb.ShapeError, match="out must be C-contiguous to gather on a GPU"):
        ops.gather(source, index, device.zeros((6, 2), F).T, 1.0, 0.0)
    with pytest.raises(gb.DTypeError, match=r"source must have one of the dtypes bool, int8, .*, got .* complex64"):
        ops.gather(device.zeros((4, 6), np.complex64), index, out, 1.0, 0.0)


def test_labels_that_are_strided_are_copied(device: CudaBackend) -> None:
    place = Place(CudaOps(device, F), device, F, F, np.random.default_rng(0))
    z, work = place.real(3, 4), place.work(3, 4)
    place.ops.svm(z, device.asarray(np.array([0, 9, 3, 9, 1, 9]))[::2], True, work)
    np.testing.assert_array_equal(work["index"], [0, 3, 1])
    assert np.isfinite(work["loss"]).all()


def test_one_part_needs_no_second_launch(device: CudaBackend) -> None:
    names = []
    for rows in (32, 33):
        by_cuda(CASES["activation_gradient relu new"], (rows, 64), F, device)
        names.append([name for name, _, _ in device.cupy.launches])
        device.cupy.launches.clear()
    assert names == [["activation_gradient"], ["activation_gradient", "add_partial"]]


# What is planted in a kernel, and the case that must notice.
FAULTS = {
    "a barrier is missing": (
        "        __syncthreads();\n        if (threadIdx.x < n)",
        "        if (threadIdx.x < n)",
        "batch_norm new",
    ),
    "a barrier between two sums is missing": (
        "    __syncthreads();  // those",
        "    // those",
        "batch_norm_gradient new",
    ),
    "a sum is not scaled down": ("sum *= exp(top - of.z);", "", "softmax int64"),
    "the label counts as a margin": ("if (j == label) return;", "", "svm int64"),
    "rows are left out": ("gridDim.y * lanes;", "gridDim.y * lanes + 1;", "activation_gradient relu new"),
    "a bias of another column": ("b[tile.column]", "b[0]", "activate relu with bias"),
    "a moment that is not central": ("value - middle;", "value;", "batch_norm new"),
    "another number": ("uniform[j + lane] >= rate", "uniform[j] >= rate", "dropout 0.3"),
    "the last pack goes too far": ("packed && i + WIDTH <= n", "packed", "square_sum"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_noticed(fault: str, device: CudaBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new, name = FAULTS[fault]
    hits: list[str] = []

    def planted(file: str) -> str:
        text = kernel_source(file)
        hits.extend([file] * text.count(old))
        return text.replace(old, new)

    monkeypatch.setattr(cuda_ops, "kernel_source", planted)
    monkeypatch.setattr(cuda_ops, "source_of", cuda_ops.source_of.__wrapped__)
    monkeypatch.setattr(cuda_ops, "activation_source", cuda_ops.activation_source.__wrapped__)
    with pytest.raises(AssertionError):
        test_it_agrees_with_numpy(CASES[name], F, device)
    assert len(set(hits)) == 1


# --- on a real device ------------------------------------------------------------------------------------------------


@pytest.fixture
def cuda() -> Backend:
    if "cuda:0" not in gb.available_backends():
        missing("gpu", "no CUDA device can be used here")
    return gb.get_backend("cuda:0")


@pytest.mark.gpu
@every_case
def test_on_a_gpu_it_agrees_with_numpy(case: Case, dtype: np.dtype, cuda: CudaBackend) -> None:
    """A GPU contracts a*b + c and flushes denormals: no bits are compared with NumPy's but those of the mask."""
    for size in [*case.sizes, (4096, 512)]:
        ours, right = by_cuda(case, size, dtype, cuda), by_numpy(case, size, dtype)
        compare(case, size, ours, right, dtype)
        if case.method == "dropout":
            np.testing.assert_array_equal(ours["mask"], right["mask"])
        same(ours, by_cuda(case, size, dtype, cuda))
