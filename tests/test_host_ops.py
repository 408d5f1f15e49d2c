"""The core's kernels compiled for the CPU: they agree with NumPy at every width of SIMD, with any number of threads."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from needs import missing
from ops_cases import CASES, OF_ROWS, Case, F, Place, by_host, by_numpy, compare, same
from stand_in import stand_in_backend

import gpubatch as gb
from gpubatch.ops import COMPUTE, SQUARE_SUM_SIZE, Grid, Ops, host_library, ops_for, recorded
from gpubatch.ops.grid import PARTS

every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@pytest.fixture(scope="module")
def library() -> Any:
    found = host_library()
    if isinstance(found, str):
        missing("compiler", f"the compiled kernels are not there: {found}")
    return found


@pytest.fixture
def restored(library: Any) -> Iterator[Any]:
    """The library; threads and SIMD level are restored after the test."""
    threads, level = library.threads(), library.level()
    yield library
    library.set_threads(threads)
    library.use(level)


class Strict:
    """The library, failing if it leaves work to NumPy."""

    def __init__(self, library: Any) -> None:
        self.library = library

    def __getattr__(self, name: str) -> Any:
        def method(*arguments: Any) -> bool | int:
            done = getattr(self.library, name)(*arguments)
            assert done is not False, f"{name} was declined"
            return done

        return method


def test_the_form_of_this_machine(library: Any) -> None:
    assert ops_for(gb.get_backend("cpu"), F).library is library
    assert library.level() == library.levels()[-1]
    assert library.threads() >= 1
    with pytest.raises(ValueError, match=r"SIMD level must be one of .*; got x86-64-v9"):
        library.use("x86-64-v9")


@every_case
def test_it_agrees_with_numpy_at_every_width(case: Case, dtype: np.dtype, restored: Any) -> None:
    for size in [*case.sizes, (300, 257)]:
        right = by_numpy(case, size, dtype)
        for level in restored.levels():
            restored.use(level)
            for misaligned in (False, True):
                ours = by_host(case, size, dtype, Ops(Strict(restored)), misaligned)
                compare(case, size, ours, right, dtype)
                if case.method == "dropout":
                    np.testing.assert_array_equal(ours["mask"], right["mask"])


@every_case
def test_float16_is_computed_in_float32(case: Case) -> None:
    """By NumPy, and by the compiled kernels if available."""
    half, compiled = np.dtype(np.float16), ops_for(gb.get_backend("cpu"), F)
    for size in case.sizes:
        right = by_numpy(case, size, half)
        for inner in {found.library: found for found in (Ops(), compiled)}.values():
            ours = by_host(case, size, half, Ops(inner.library, half=True))
            if case.exact:
                same(ours, right)
            else:
                compare(case, size, ours, right, half)


def test_dropout_of_float16_keeps_the_mask_that_it_multiplied_by() -> None:
    """Otherwise the gradient would belong to another function: 1/(1 - rate) is rounded."""
    case, size, half = CASES["dropout 0.3 from 0"], (301, 33), np.dtype(np.float16)
    x = Place(Ops(), gb.get_backend("cpu"), half, half, np.random.default_rng(size)).real(*size)
    ours = by_host(case, size, half, Ops(half=True))
    np.testing.assert_array_equal(ours["mask"], by_numpy(case, size, F)["mask"].astype(half))
    np.testing.assert_array_equal(ours["y"], (x.astype(F) * ours["mask"].astype(F)).astype(half))


@pytest.mark.parametrize("name", CASES)
def test_threads_change_no_bit(name: str, restored: Any) -> None:
    case, size = CASES[name], (1000, 200)  # worth four threads or more
    if case.method in OF_ROWS:
        size = (5000, 50)
    restored.set_threads(1)
    alone = by_host(case, size, F, Ops(Strict(restored)))
    for threads in (2, 7):
        restored.set_threads(threads)
        same(by_host(case, size, F, Ops(Strict(restored))), alone)


@pytest.mark.parametrize("name", ["activation_gradient gelu new", "softmax rows", "svm uint8", "batch_norm new"])
@settings(max_examples=40, deadline=None, derandomize=True)
@given(size=st.tuples(st.integers(1, 90), st.integers(2, 70)), misaligned=st.booleans())
def test_any_size(name: str, size: tuple[int, int], misaligned: bool, library: Any) -> None:
    ours = by_host(CASES[name], size, F, Ops(Strict(library)), misaligned)
    compare(CASES[name], size, ours, by_numpy(CASES[name], size, F), F)


@pytest.mark.parametrize("method", ["activate", "activation_gradient", "softmax_cross_entropy", "normalise", "gather"])
def test_what_the_library_declines_goes_to_numpy(method: str, library: Any) -> None:
    """Strided arrays, or of another byte order or type; the results are NumPy's."""
    found = []
    for ops in (Ops(library), Ops()):
        place = Place(ops, gb.get_backend("cpu"), F, F, np.random.default_rng(0))
        x, work, row = place.real(6, 8)[:, ::2], place.work(6, 4), place.real(4)
        y = place.empty(6, 4)
        if method == "activate":
            ops.activate(gb.Sigmoid().function, x, row, y, work)
        elif method == "activation_gradient":
            ops.activation_gradient(gb.Sigmoid().function, x, x, y, row, work)
        elif method == "softmax_cross_entropy":
            ops.softmax_cross_entropy(x, place.labels(6, 4), True, work)
            y = work["dz"]
        elif method == "normalise":
            ops.normalise(x, row, place.positive(4), 1e-3, row, row, y, work)
        else:
            ops.gather(x.astype(">f8"), np.array([5, 0, 0, 3, 2, 1]), y, 0.5, 1.0)
        found.append({"y": y, "row": row})
    same(*found)


def test_an_index_out_of_range_is_an_error(library: Any) -> None:
    source, out = np.zeros((4, 3), np.uint8), np.zeros((2, 3), F)
    for index in ([0, 4], [-1, 0], [2**40, 0]):
        with pytest.raises(IndexError):
            Ops(library).gather(source, np.array(index), out, 1.0, 0.0)


@pytest.mark.parametrize("dtype", [np.int64, np.uint8])
def test_labels_are_gathered_as_they_are(dtype: Any, library: Any) -> None:
    labels, index = np.arange(7, dtype=dtype), np.array([6, 0, 0, 3])
    for ops in (Ops(), Ops(Strict(library))):
        out = np.full(4, 9, dtype)
        ops.gather(labels, index, out, 1.0, 0.0)
        assert out.tolist() == [6, 0, 0, 3]
    assert not library.gather(labels, index, np.zeros(4, np.int16), 1.0, 0.0)
    assert not library.gather(labels, index, out, 2.0, 0.0)


def test_recorded_calls_are_made_again_on_what_is_there_by_then(library: Any) -> None:
    ops = Ops(library)
    source, index, x = np.arange(12.0).reshape(6, 2), np.array([0, 1]), np.zeros((2, 2))
    with recorded(library) as recording:
        ops.gather(source, index, x, 1.0, 0.0)
        ops.activate(gb.ReLU.function, x, np.array([-3.0, 0]), x, {})
    assert recording.complete(2)
    assert not recording.complete(3)
    index[:] = 4, 1
    assert list(recording.runs(2)) == [2]
    assert x.tolist() == [[5, 9], [0, 3]]
    ops.gather(source, np.array([2, 2]), x, 1.0, 0.0)  # after the block: not recorded
    assert recording.complete(2)
    index[0] = 6
    with pytest.raises(IndexError, match=r"index must be in \[0, 6\), got 6"):
        list(recording.runs(1))


@pytest.mark.parametrize("gap", ["another kernel", "declined"])
def test_a_recording_with_a_gap_is_not_complete(gap: str, library: Any) -> None:
    ops, x = Ops(library), np.ones((2, 2))
    with recorded(library) as recording:
        ops.gather(np.ones((3, 2)), np.array([0, 2]), x, 1.0, 0.0)
        if gap == "declined":
            ops.gather(np.ones((3, 2), ">f8"), np.array([0, 2]), x, 1.0, 0.0)
        else:
            ops.square_sum(x, np.zeros(SQUARE_SUM_SIZE))
    assert not recording.complete(1)


@pytest.mark.parametrize("method", OF_ROWS)
@pytest.mark.parametrize("label", [-1, 3, 2**40])
def test_a_label_out_of_range_is_nan(method: str, label: int) -> None:
    for ops in [Ops()] + ([] if isinstance(host_library(), str) else [Ops(host_library())]):
        place = Place(ops, gb.get_backend("cpu"), F, F, np.random.default_rng(0))
        z, work = place.real(4, 3), place.work(4, 3)
        getattr(ops, method)(z, np.array([0, 1, label, 2]), True, work)
        assert np.isnan(work["loss"]).all()
        assert np.isnan(work["dz"][2]).all()


@pytest.mark.parametrize("given", ["weights", "labels", "both"])
def test_weights_have_the_bits_of_numpy(given: str, dtype: np.dtype, library: Any, rng: np.random.Generator) -> None:
    """Its sums, too, over as many numbers as it converts at a time and more; whatever a weight is."""
    for n in (*range(1, 40), 127, 128, 129, 1000, 8191, 8192, 8193, 20_000):
        weight = None if given == "labels" else rng.uniform(0, 3, n).astype(dtype)
        labels = None if given == "weights" else rng.integers(0, 4, n)
        for wrong in (None, -1.0, np.nan, np.inf, 0.0):
            if wrong is not None and weight is not None:
                weight[rng.integers(n)] = wrong
            found: list[dict[str, np.ndarray]] = []
            for ops in (Ops(Strict(library)), Ops()):
                out, whole = np.empty(n, dtype), np.empty(1)
                with np.errstate(all="ignore"):
                    ops.weigh(weight, labels, 2, out, whole, {})
                found.append({"out": out, "sum": whole})
            same(*found)


def test_what_is_not_finite_is_counted(dtype: np.dtype, library: Any) -> None:
    x = np.ones(100_000, dtype)
    x[[0, 17, 99_999]] = np.nan, np.inf, -np.inf
    for ops in (Ops(library), Ops()):
        out = np.zeros(SQUARE_SUM_SIZE)
        ops.square_sum(x, out)
        assert (np.isnan(out[0]), out[1]) == (True, 3)


@pytest.mark.parametrize("kind", ["sigmoid", "tanh"])
def test_exp_and_tanh_are_right_to_a_few_units(kind: str, dtype: np.dtype, restored: Any) -> None:
    """Over the whole range, against the C library in higher precision; at its ends, and for NaN."""
    limit = 90 if dtype == np.float32 else 720
    x = np.concatenate([np.linspace(-limit, limit, 40_001), np.logspace(-30, 0, 2001), -np.logspace(-30, 0, 2001)])
    x = np.concatenate([x, [0.0, np.inf, -np.inf, np.nan, 1e30, -1e30]]).astype(dtype)[None]
    wide = x.astype(np.longdouble)
    with np.errstate(over="ignore"):
        right = np.tanh(wide) if kind == "tanh" else 1 / (1 + np.exp(-wide))
    for level in restored.levels():
        restored.use(level)
        y = np.empty_like(x)
        function = (gb.Tanh() if kind == "tanh" else gb.Sigmoid()).function
        Ops(Strict(restored)).activate(function, x, None, y, {})
        tiny = np.finfo(dtype).tiny
        np.testing.assert_allclose(y, right.astype(dtype), rtol=5 * np.finfo(dtype).eps, atol=tiny)


def test_callers_at_the_same_time_do_not_disturb_each_other(library: Any) -> None:
    x = np.random.default_rng(0).standard_normal((2000, 300)).astype(F)
    right, wrong = np.maximum(x, 0), []

    def work() -> None:
        y = np.empty_like(x)
        for _ in range(50):
            y.fill(7)
            Ops(library).activate(gb.ReLU().function, x, None, y, {})
            wrong.append(int((y != right).sum()))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(wrong), sum(wrong)) == (200, 0)


# --- scratch ---------------------------------------------------------------------------------------------------------


def test_an_operation_gets_the_scratch_of_the_form_that_will_run(library: Any) -> None:
    uniform = {"uniform": ((-1, 7), np.float32)}  # of NumPy alone
    on_gpu = Ops(grid=Grid(stand_in_backend(), F))
    assert Ops().scratch(["dropout"], 7) == uniform
    assert Ops(library).scratch(["dropout"], 7) == {}
    assert Ops(library).scratch(["dropout"], 7, strided=True) == uniform  # a compiled form leaves these to NumPy
    assert on_gpu.scratch(["dropout"], 7, strided=True) == {}


def test_without_a_compiled_form_numpy_may_do_it(library: Any) -> None:
    assert Ops.update_running.numpy_may_do_it(Ops(library), strided=False)
    assert not Ops.batch_norm.numpy_may_do_it(Ops(library), strided=False)


def test_operations_of_one_layer_share_the_larger_array() -> None:
    for names in (["activation_gradient", "batch_norm"], ["batch_norm", "activation_gradient"]):
        assert Ops().scratch(names, 5) == {"partial": ((2 * PARTS, 5), COMPUTE)}


def test_what_a_layer_keeps_is_no_scratch() -> None:
    """Or the next layer would write over it before backward."""
    needs = gb.Needs(5, kept={"inverse": ((5,), COMPUTE)}, scratch={"own": ((2,), None)}, uses=("normalise",))
    assert needs.scratch_in(Ops(), training=True) == {"own": ((2,), None)}


def test_an_operation_that_is_not_there_is_named() -> None:
    with pytest.raises(gb.ArgumentError, match=r"uses must be one of 'activate', .*, got 'batchnorm'"):
        gb.Needs(5, uses=("batchnorm",)).scratch_in(Ops(), training=False)
