"""The core's kernels for CUDA: they compile for real architectures, and on the emulated grid agree with NumPy."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import emulated_gpu
import numpy as np
import pytest
from emulate import ARCHITECTURES, check_compiles
from families import every, first_of_each, marks
from hypothesis import given, settings, strategies as st
from needs import missing
from ops_cases import CASES, FAST, OF_ROWS, Case, F, Place, by_numpy, compare, same
from stand_in import DeviceArray, StandIn, stand_in_backend

import gpubatch as gb
from gpubatch.backend import Array, Backend, CudaBackend, compute_dtype
from gpubatch.formula import Activation, ScoreLoss, scores
from gpubatch.ops import SQUARE_SUM_SIZE, Grid, Ops, compile, elementwise, gather, grid, losses
from gpubatch.ops.grid import SUM_PARTS
from gpubatch.ops.table import OPERATIONS

DTYPES = ("float32", "float64", "float16")  # in which batches are stored
FIRST = first_of_each({name: case.method for name, case in CASES.items()})  # of each method: fast in every dtype
every_case = every("case", CASES, FAST)


def forms(names: Iterable[str]) -> pytest.MarkDecorator:
    """Each case in each dtype; fast are ``FAST`` in float32, and the first case of each method in float16."""
    cases = [(name, dtype) for name in names for dtype in DTYPES]
    of = {"float32": FAST, "float16": FIRST}
    fast = [name in of.get(dtype, ()) for name, dtype in cases]
    return pytest.mark.parametrize(
        ("case", "dtype"),
        [
            pytest.param(CASES[name], np.dtype(dtype), id=f"{dtype}-{name}", marks=marks(is_fast))
            for (name, dtype), is_fast in zip(cases, fast, strict=True)
        ],
    )


every_form = forms(CASES)


def by_cuda(
    case: Case, size: tuple[int, int], dtype: np.dtype, backend: CudaBackend, misaligned: bool = False
) -> dict[str, np.ndarray]:
    """The results of the CUDA forms, on the same numbers."""
    place = Place(Ops(grid=Grid(backend, dtype)), backend, dtype, dtype, np.random.default_rng(size), misaligned)
    with backend.scope():
        return {name: backend.to_numpy(a) for name, a in case.run(place, *size).items()}


@pytest.fixture
def device() -> CudaBackend:
    return stand_in_backend()


@pytest.fixture(params=["float32", pytest.param("float64", marks=pytest.mark.exhaustive), "float16"])
def dtype(request: pytest.FixtureRequest) -> np.dtype:
    """The storage type of batches."""
    return np.dtype(request.param)


# --- the tests -------------------------------------------------------------------------------------------------------


def test_every_method_has_a_case() -> None:
    assert {case.method for case in CASES.values()} == OPERATIONS.keys()
    assert {CASES[name].method for name in FAST} == OPERATIONS.keys()


@pytest.mark.parametrize("special", [np.inf, -np.inf, np.nan])
def test_what_is_not_finite_hides_no_difference(special: float) -> None:
    case, right = CASES["gather int32"], np.array([special, 1, 2], np.float16)
    compare(case, (3, 1), {"out": right.copy()}, {"out": right}, right.dtype)
    for wrong in ([special, 1, 2.01], [1, 1, 2], [special, special, 2], [-special, -special, 2]):
        with pytest.raises(AssertionError):
            compare(case, (3, 1), {"out": np.array(wrong, np.float16)}, {"out": right}, right.dtype)


@functools.cache  # cases share sources
def compiled(source: str, architecture: int) -> None:
    check_compiles(source, architecture)


@every_form
def test_it_compiles_for_real_architectures(case: Case, dtype: np.dtype) -> None:
    for architecture in ARCHITECTURES:
        compiled(case.source(dtype.name), architecture)


@every_form
def test_it_agrees_with_numpy(case: Case, dtype: np.dtype, device: CudaBackend) -> None:
    """The bits are also the same with another order of threads, and for arrays at other addresses."""
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
    "mse float32": (3, 100_000),
    "l2_loss": (1, 2_000_003),
    "l2_gradient": (1, 2_000_003),
}


@every("name", [*LARGE], ["softmax int64", "activation_gradient relu new"])
def test_large_sizes(name: str, device: CudaBackend) -> None:
    dtype = np.dtype(np.float32)
    right = by_numpy(CASES[name], LARGE[name], dtype)
    compare(CASES[name], LARGE[name], by_cuda(CASES[name], LARGE[name], dtype, device), right, dtype)


OF_ANY_SIZE = [
    "activation_gradient gelu new",
    "softmax rows",
    "svm uint8",
    "sigmoid_cross_entropy uint8",
    "l2_loss",
    "batch_norm new",
    "square_sum",
    "dropout 0.3 from 13",
]


@every("stored", ["float32", "float16"], ["float32"])
@every("name", OF_ANY_SIZE, ["softmax rows", "activation_gradient gelu new"])
@settings(max_examples=15, deadline=None, derandomize=True)
@given(size=st.tuples(st.integers(1, 90), st.integers(2, 70)), misaligned=st.booleans())
def test_any_size(name: str, stored: str, size: tuple[int, int], misaligned: bool) -> None:
    dtype, backend, case = np.dtype(stored), stand_in_backend(), CASES[name]
    ours, right = by_cuda(case, size, dtype, backend, misaligned), by_numpy(case, size, dtype)
    if case.exact:
        same(ours, right)
    else:
        compare(case, size, ours, right, dtype)


SANITIZED = [name for name in CASES if "activat" not in name or "gelu " in name]


# Of each way to go over an array one.
TOUCHING = {
    "softmax int64",
    "batch_norm new",
    "gather bool",
}
# Those that look at sixteen bytes at a time, which are more numbers of float16.
PACKED = ["dropout 0.3 from 0", "dropout 0.3 from 13", "square_sum"]


@pytest.mark.parametrize(
    ("name", "stored"),
    [
        *(pytest.param(name, "float32", marks=marks(name in TOUCHING)) for name in SANITIZED),
        *(pytest.param(name, "float16", marks=marks(name == PACKED[0])) for name in PACKED),
    ],
)
def test_nothing_beyond_an_array_is_touched(name: str, stored: str) -> None:
    dtype, backend, case = np.dtype(stored), stand_in_backend(sanitize=True), CASES[name]
    for size in [(37, 5), (3, 301)]:
        ours = by_cuda(case, size, dtype, backend)
        if "in place" not in name and case.method != "normalise":  # the sanitizers get copies, one for each argument
            compare(case, size, ours, by_numpy(case, size, dtype), dtype)


class Sealed:
    """Ops during whose methods any allocation on the device or read from it fails."""

    def __init__(self, ops: Ops, patch: pytest.MonkeyPatch) -> None:
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
    ops: Any = Sealed(Ops(grid=Grid(device, dtype)), monkeypatch)
    case.run(Place(ops, device, dtype, dtype, np.random.default_rng(0)), 3, 5)
    assert device.cupy.launches


# --- beyond the table of cases ---------------------------------------------------------------------------------------


@forms(
    name
    for name, case in CASES.items()
    if case.method not in ("update_running", "square_sum", "gather", "dropout") and "step" not in name
)
def test_nan_and_infinity_go_through_as_in_numpy(case: Case, dtype: np.dtype, device: CudaBackend) -> None:
    special = np.array([[np.nan, 1, -1], [np.inf, 1, 2], [-np.inf, 0, 3], [-np.inf, -np.inf, -np.inf], [0, -0.0, 1]])

    class Special(Place):
        def real(self, *shape: int, dtype: Any = None, **_: Any) -> Array:
            return self.array(special if shape == special.shape else np.full(shape, 0.5), dtype)

        grid = real

    with np.errstate(all="ignore"):
        right, ours = (
            case.run(Special(ops, where, dtype, dtype, np.random.default_rng(0)), *special.shape)
            for ops, where in (
                (Ops(half=True) if dtype == np.float16 else Ops(), gb.get_backend("cpu")),
                (Ops(grid=Grid(device, dtype)), device),
            )
        )
    for key in right:
        np.testing.assert_allclose(ours[key], right[key], rtol=1e-4, atol=1e-6, err_msg=key)


@pytest.mark.parametrize("method", OF_ROWS)
@pytest.mark.parametrize("classes", [3, 300])
@every("label", {"-1": -1, "2**40": 2**40, "-2**63": -(2**63)}, ["2**40"])
def test_a_label_out_of_range_is_nan_and_nothing_else(method: str, classes: int, label: int) -> None:
    """The device cannot raise, but it must not touch memory outside the row."""
    backend = stand_in_backend(sanitize=True)
    place = Place(Ops(grid=Grid(backend, F)), backend, F, F, np.random.default_rng(0))
    z, Y, work = place.real(4, classes), backend.asarray(np.array([0, 1, label, 2])), place.work(4, classes)
    getattr(place.ops, method)(z, Y, True, work)
    assert np.isnan(work["loss"].get()).all()
    np.testing.assert_array_equal(np.isnan(work["dz"].get().sum(axis=1)), [False, False, True, False])


def test_labels_that_are_one_class_too_far(device: CudaBackend) -> None:
    place = Place(Ops(grid=Grid(device, F)), device, F, F, np.random.default_rng(0))
    for label, fits in ((2, True), (3, False)):
        z, work = place.real(2, 3), place.work(2, 3)
        place.ops.softmax_cross_entropy(z, device.asarray(np.array([2, label])), False, work)
        assert np.isfinite(work["loss"].get()).all() == fits


@pytest.mark.parametrize("classes", [2, 10, 300, 5000])
def test_equal_scores(classes: int, dtype: np.dtype, device: CudaBackend) -> None:
    """Closed forms: log(classes), and 1/classes for each class but the label; a margin of 1 for each but the label."""
    place = Place(Ops(grid=Grid(device, dtype)), device, dtype, dtype, np.random.default_rng(0))
    z, Y, work = place.array(np.full((3, classes), 1000.0)), place.labels(3, classes), place.work(3, classes)
    right = 1 / classes - np.eye(classes)[Y.get()]
    tolerance = 100 * np.finfo(dtype).eps
    place.ops.softmax_cross_entropy(z, Y, True, work)
    np.testing.assert_allclose(work["loss"].get(), np.log(classes), rtol=tolerance)
    np.testing.assert_allclose(work["dz"].get(), right / 3, rtol=tolerance, atol=tolerance)
    place.ops.svm(z, Y, True, work)
    np.testing.assert_array_equal(work["loss"].get(), classes - 1)
    np.testing.assert_allclose(work["dz"].get(), right * classes / 3, rtol=tolerance)


def test_scores_that_count_for_themselves(dtype: np.dtype, device: CudaBackend) -> None:
    """Closed forms: 3² and its slope; log 2 without a slope; no loss for a clear score, or all of the distance."""
    place = Place(Ops(grid=Grid(device, dtype)), device, dtype, dtype, np.random.default_rng(0))
    work = place.work(1, 4)
    place.ops.score_loss(
        scores.mse.bind(),
        place.array(np.array([[4.0, -4, 1, 0]])),
        place.array(np.array([[1.0, -1, 1, 0]])),
        True,
        work,
    )
    assert (work["loss"].get(), work["dz"].get().tolist()) == (18 / 4, [[6 / 4, -6 / 4, 0, 0]])
    z, Y = place.array(np.array([[0, 1000, -1000, 200]])), place.array(np.array([[0.5, 1, 0, 0]]))
    place.ops.score_loss(scores.sigmoid_cross_entropy.bind(), z, Y, True, work)
    np.testing.assert_allclose(work["loss"].get(), (np.log(2) + 200) / 4, rtol=4 * np.finfo(dtype).eps)
    np.testing.assert_array_equal(work["dz"].get(), [[0, 0, 0, 1 / 4]])


@every("stored", ["bool", "uint16", "int64", "float64"], ["uint16"])
def test_how_targets_are_stored_changes_no_bit(stored: str, dtype: np.dtype, device: CudaBackend) -> None:
    place = Place(Ops(grid=Grid(device, dtype)), device, dtype, dtype, np.random.default_rng(0))
    z, truth = place.real(300, 9), place.rng.integers(0, 2, (300, 9))
    for method in ("mse", "sigmoid_cross_entropy"):
        found = []
        for kind in ("float16", stored):
            work = place.work(300, 9)
            place.ops.score_loss(getattr(scores, method).bind(), z, device.asarray(truth.astype(kind)), True, work)
            found.append({name: work[name].get() for name in ("loss", "dz")})
        same(*found)


@pytest.mark.parametrize("count", [1, 7, 2000])  # all of them are float16, too
def test_the_l2_term(count: int, dtype: np.dtype, device: CudaBackend) -> None:
    """The sum of 1² to count², and a share of each number; numbers between the parts are unchanged."""
    ops, numbers = Ops(grid=Grid(device, dtype)), np.arange(1, count + 1)
    w = device.asarray(np.concatenate([[np.nan], numbers, [np.nan, np.nan], numbers, [np.nan]]).astype(dtype))
    spans = device.asarray(np.array([[1, count + 1], [count + 3, 2 * count + 3]]))
    loss, g = device.zeros(1, compute_dtype(dtype)), device.zeros(w.shape, dtype)
    parts = device.empty(SUM_PARTS, np.float64)
    loss.fill(5)
    ops.l2_loss(w, spans, 0.25, loss, {"parts": parts, "ticket": device.zeros(1, np.uint32)})
    ops.l2_gradient(w, spans, 0.5, g, {})
    right = 5 + 0.5 * count * (count + 1) * (2 * count + 1) / 6
    np.testing.assert_allclose(loss.get(), right, rtol=np.finfo(loss.dtype).eps)
    np.testing.assert_array_equal(g.get(), np.concatenate([[0], numbers / 2, [0, 0], numbers / 2, [0]]))


def test_the_step_of_dropout_is_read_when_the_kernel_runs(device: CudaBackend) -> None:
    place = Place(Ops(grid=Grid(device, F)), device, F, F, np.random.default_rng(0))
    x, y, work, step = place.real(9, 40), place.empty(9, 40), place.work(9, 40), device.zeros(1, np.uint64)
    for n in (0, 2**63 + 5):
        step.fill(n)
        masks = []
        for given_as in (step, n):
            place.ops.dropout(x, y, 0.5, (1, 2), given_as, 0, work)
            masks.append(work["mask"].get())
        np.testing.assert_array_equal(*masks)


@pytest.mark.parametrize("missing_classes", [0, 30])
def test_classes_that_are_ruled_out_do_not_count(missing_classes: int, dtype: np.dtype, device: CudaBackend) -> None:
    place = Place(Ops(grid=Grid(device, dtype)), device, dtype, dtype, np.random.default_rng(0))
    z, work = np.full((1, 33), -np.inf), place.work(1, 33)
    z[0, missing_classes:] = 0
    Y = device.asarray(np.array([32]))
    place.ops.softmax_cross_entropy(place.array(z), Y, True, work)
    np.testing.assert_allclose(work["loss"].get(), np.log(33 - missing_classes), rtol=1e-6)
    np.testing.assert_array_equal(work["dz"].get()[0, :missing_classes], 0)


def test_square_sum_adds_up_and_counts_what_is_not_finite(dtype: np.dtype, device: CudaBackend) -> None:
    ops, out = Ops(grid=Grid(device, dtype)), device.zeros(SQUARE_SUM_SIZE, np.float64)
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
    Ops(grid=Grid(device, dtype)).gather(device.asarray(source), device.asarray(np.arange(2**16)), out, 1.0, 0.0)
    right = source.astype(dtype)
    np.testing.assert_array_equal(out.get(), right)
    numbers = ~np.isnan(right)
    np.testing.assert_array_equal(np.signbit(out.get())[numbers], np.signbit(right)[numbers])


@every("target", ["float32", "float16", "float64", "as stored", "int64"], ["float32", "as stored"])
@every("stored", ["uint8", "float16", "int32", "float64"], ["uint8", "float16"])
def test_rows_move_sixteen_bytes_at_a_time(stored: str, target: str, rng: np.random.Generator) -> None:
    """For aligned arrays with rows of multiples of 16 bytes: 16 bytes of the larger type at a time."""
    device, kept = stand_in_backend(sanitize=True), target in ("as stored", "int64")
    kinds = np.dtype(stored), np.dtype(stored if target == "as stored" else target)
    if target == "int64" and kinds[0].kind == "f":
        return
    fit, at = 16 // max(kind.itemsize for kind in kinds), device.zeros(1, np.int64)
    order = device.asarray(rng.permutation(20)[:13])
    for features, starts, lanes in (
        *((3 * fit, starts, fit) for starts in ((0, 0), (fit, 0), (0, fit))),
        *((3 * fit, starts, 1) for starts in ((1, 0), (0, 1), (1, 1))),
        *((features, (0, 0), 1) for features in (1, 3 * fit + 1)),
    ):
        source, out = (
            aligned(device, kind, n * features, start).reshape(n, features)
            for kind, n, start in zip(kinds, (20, 13), starts, strict=True)
        )
        source[...] = rng.integers(0, 100, source.shape)
        assert gather.lanes_of(source, out, features) == lanes
        if kept:
            gather.take_batch(Grid(device, F), source, order, at, out, 13)
        else:
            Ops(grid=Grid(device, kinds[1])).gather(source, order, out, 0.5, 1.0)
        right = source.get()[order.get()].astype(kinds[1])
        np.testing.assert_array_equal(out.get(), right if kept else right * kinds[1].type(0.5) + kinds[1].type(1))


def aligned(device: CudaBackend, dtype: np.dtype, n: int, start: int) -> DeviceArray:
    """An array that starts ``start`` elements after a multiple of sixteen bytes."""
    wide = device.empty(n + start + 16, dtype)
    first = -wide.ctypes.data % 16 // dtype.itemsize + start
    return wide[first : first + n]


def test_samples_of_more_dimensions_are_gathered(device: CudaBackend, rng: np.random.Generator) -> None:
    source, index = rng.integers(0, 256, (9, 4, 5, 3)).astype(np.uint8), np.array([8, 0, 0, 3])
    for shape in ((4, 4, 5, 3), (4, 60)):
        out = device.empty(shape, F)
        Ops(grid=Grid(device, F)).gather(device.asarray(source), device.asarray(index), out, 0.5, 0.0)
        np.testing.assert_array_equal(out.get(), (source[index] * F.type(0.5)).reshape(shape))


def test_what_cannot_be_gathered(device: CudaBackend) -> None:
    ops, index = Ops(grid=Grid(device, F)), device.zeros(2, np.int64)
    source, out = device.zeros((4, 6), F), device.zeros((2, 6), F)
    with pytest.raises(gb.ShapeError, match="source must be C-contiguous on a GPU"):
        ops.gather(device.zeros((4, 12), F)[:, ::2], index, out, 1.0, 0.0)
    with pytest.raises(gb.ShapeError, match="out must be C-contiguous on a GPU"):
        ops.gather(source, index, device.zeros((6, 2), F).T, 1.0, 0.0)
    with pytest.raises(gb.DTypeError, match=r"source must have one of the dtypes bool, int8, .*, got .* complex64"):
        ops.gather(device.zeros((4, 6), np.complex64), index, out, 1.0, 0.0)


def test_labels_that_are_strided_are_copied(device: CudaBackend) -> None:
    place = Place(Ops(grid=Grid(device, F)), device, F, F, np.random.default_rng(0))
    z, work = place.real(3, 4), place.work(3, 4)
    place.ops.svm(z, device.asarray(np.array([0, 9, 3, 9, 1, 9]))[::2], True, work)
    np.testing.assert_array_equal(work["index"], [0, 3, 1])
    assert np.isfinite(work["loss"]).all()


def test_the_last_block_leaves_the_ticket_as_it_was(device: CudaBackend) -> None:
    """The next launch, or a replay, needs a ticket of 0: whichever block is last, with any number of blocks."""
    place = Place(Ops(grid=Grid(device, F)), device, F, F, np.random.default_rng(0))
    out, work = device.zeros(SQUARE_SUM_SIZE, np.float64), place.work(300, 40)
    for rows in (300, 1, 77):
        z, Y = place.real(rows, 40), place.labels(rows, 40)
        for order in ("forward", "reverse"):
            device.cupy.order = order
            place.ops.softmax_cross_entropy(z, Y, False, work)
            place.ops.square_sum(place.real(100 * rows, 40), out)
            assert (work["ticket"].get()[0], out[2]) == (0, 0)
    assert {grid for name, grid, _ in device.cupy.launches if name == "square_sum"} > {(1,)}


def test_one_part_needs_no_second_launch(device: CudaBackend) -> None:
    names = []
    for rows in (512, 513):
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
        "    __syncthreads();  // the previous sum",
        "    // the previous sum",
        "batch_norm_gradient new",
    ),
    "a sum is not scaled down": ("mine *= exp(top - of.z);", "", "softmax int64"),
    "the gradient is not scaled": ("share * value_at(scale, 1)", "share", "softmax int64, scaled"),
    "a weight of another row": ("lost * weights[row]", "lost * weights[0]", "softmax int64, weighted"),
    "a weight of another score": ("weights[i / outputs]", "weights[0]", "mse float32, weighted"),
    "weights are not relative": ("T(w * factor)", "w", "weigh float32, labels none"),
    "the label counts as a margin": ("if (j == label) return;", "", "svm int64"),
    "a target is not smoothed": ("* kept + spread", "* kept", "softmax int64, smoothed"),
    "the entropy of the targets is left out": (" - log(of.y)", "", "softmax rows, relative"),
    "an alpha of another class": ("alpha[label]", "alpha[0]", "softmax_focal, alpha"),
    "a place for each thread": ("combine<Smallest>(place, team.size)", "place", "crammer_singer int64"),
    "rows are left out": ("gridDim.y * lanes;", "gridDim.y * lanes + 1;", "activation_gradient relu new"),
    "a bias of another column": ("b[tile.column]", "b[0]", "activate relu with bias"),
    "a moment that is not central": ("value - middle;", "value;", "batch_norm new"),
    "another number": ("uniform[j + lane] >= rate", "uniform[j] >= rate", "dropout 0.3 from 0"),
    "another step": ("if (step_at) step = *step_at;", "", "dropout, its step in memory"),
    "a mask of another element": ("dy[i] * mask[i]", "dy[i] * mask[0]", "dropout_gradient new"),
    "a target of another score": ("T(y[i])", "T(y[0])", "mse float32"),
    "an exponential that overflows": ("exp(-fabs(z))", "exp(-z)", "sigmoid_cross_entropy uint8"),
    "one place for all parts": ("parts[blockIdx.x] = sum", "parts[0] = sum", "mse float32"),
    "any block is the last": ("last = atomicInc(ticket, blocks - 1) == blocks - 1;", "last = true;", "l2_loss"),
    "a ticket that is not 0 again": ("atomicInc(ticket, blocks - 1)", "atomicAdd(ticket, 1)", "square_sum"),
    "the loss is lost": ("T(*loss + sum * factor)", "T(sum * factor)", "l2_loss"),
    "a part that begins elsewhere": ("spans[2 * span] + index", "spans[0] + index", "l2_gradient"),
    "another row": ("from[tile.at(order.at(row))]", "from[tile.at(row)]", "gather uint8"),
    "another lane": ("convert(values.at[lane])", "convert(values.at[0])", "gather uint8"),
    "the last pack goes too far": ("packed && i + WIDTH <= n", "packed", "square_sum"),
}


@every("fault", [*FAULTS], [*FAULTS][:2])
def test_a_planted_fault_is_noticed(fault: str, device: CudaBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new, name = FAULTS[fault]
    hits: list[str] = []

    def planted(write: Callable[..., str]) -> Callable[..., str]:
        def source(*args: object) -> str:
            text = write(*args)
            hits.extend([text] * text.count(old))
            return text.replace(old, new)

        return source

    # Of a file, and of a formula.
    for module, write in (
        (compile, "kernel_source"),
        (gather, "kernel_source"),
        (ScoreLoss, "source"),
        (Activation, "source"),
    ):
        monkeypatch.setattr(module, write, planted(getattr(module, write)))
    for module, write in (
        *((module, "source_of") for module in (compile, grid, gather, losses, elementwise)),
        (elementwise, "elementwise_source"),
        (losses, "score_loss_source"),
        (losses, "weigh_source"),
        (gather, "gather_source"),
    ):
        monkeypatch.setattr(module, write, getattr(module, write).__wrapped__)
    with pytest.raises(AssertionError):
        test_it_agrees_with_numpy(CASES[name], F, device)
    assert len(set(hits)) == 1  # in one text


# --- on a real device ------------------------------------------------------------------------------------------------


@pytest.fixture
def cuda() -> Backend:
    if "cuda:0" not in gb.available_backends():
        missing("gpu", "no CUDA device can be used here")
    return gb.get_backend("cuda:0")


@pytest.mark.gpu
@every_form
def test_on_a_gpu_it_agrees_with_numpy(case: Case, dtype: np.dtype, cuda: CudaBackend) -> None:
    """A GPU contracts a*b + c and flushes denormals, so only the mask's bits must equal NumPy's."""
    # Hundreds of blocks in either case; the emulated device runs one after another.
    for size in [*case.sizes, (410 if emulated_gpu.installed() else 4096, 512)]:
        ours, right = by_cuda(case, size, dtype, cuda), by_numpy(case, size, dtype)
        compare(case, size, ours, right, dtype)
        if case.method == "dropout":
            np.testing.assert_array_equal(ours["mask"], right["mask"])
        same(ours, by_cuda(case, size, dtype, cuda))


@pytest.mark.gpu
def test_on_a_gpu_float16_is_converted_as_numpy_does(cuda: CudaBackend) -> None:
    """The GPU has its own instructions: all 16-bit numbers, and numbers between them, midpoints included."""
    halves = np.arange(2**16, dtype=np.uint16).view(np.float16)
    finite = np.sort(halves[np.isfinite(halves)].astype(F))
    middles = (finite[1:] + finite[:-1]) / 2
    between = np.concatenate([middles, np.nextafter(middles, -np.inf), np.nextafter(middles, np.inf), finite])
    beyond = np.array([65519.99, 65520, 1e30, -np.inf, np.nan, 1e-30, 2.0**-25, -(2.0**-26)], F)
    with np.errstate(over="ignore"):
        for source, dtype in ((halves, F), (np.concatenate([between, beyond]), np.dtype(np.float16))):
            out, index = cuda.empty((len(source), 1), dtype), cuda.asarray(np.arange(len(source)))
            with cuda.scope():
                Ops(grid=Grid(cuda, dtype)).gather(cuda.asarray(source[:, None]), index, out, 1.0, 0.0)
            np.testing.assert_array_equal(cuda.to_numpy(out)[:, 0], source.astype(dtype))
