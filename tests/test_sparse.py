"""Sparse matrices of SciPy's against the same samples as dense arrays: the same batches, runs and results."""

from __future__ import annotations

import copy
import tracemalloc
import warnings
from pathlib import Path

import numpy as np
import pytest
from families import drawn, every
from hypothesis import strategies as st
from needs import peer

import gpubatch as gb
from gpubatch import metrics
from gpubatch.backend import Backend
from gpubatch.errors import ConversionWarning, DTypeError, NonFiniteError, ShapeError
from gpubatch.inputs import SparseMatrix
from gpubatch.loader import epochs_of

sparse = peer("scipy.sparse")

N, FEATURES = 203, 40
FORMATS = [
    f"{kind}_{form}" for form in ("matrix", "array") for kind in ("csr", "csc", "coo", "lil", "dok", "bsr", "dia")
]
DTYPES = ["float32", "float64", "int8", "uint8", "int16", "int64", "uint64", "bool"]


def dense(dtype: str = "float32", n: int = N) -> np.ndarray:
    """Samples of which a tenth of the numbers are not 0; the first of a row is its number, so that all differ."""
    rng = np.random.default_rng(3)
    X = rng.integers(1, 100, (n, FEATURES)) * (rng.random((n, FEATURES)) < 0.1)
    X[5] = 0
    return X.astype(dtype) if np.dtype(dtype).kind != "f" else (X / 64).astype(dtype)


Y = np.arange(N) % 3


def given(X: np.ndarray, kind: str = "csr_matrix") -> object:
    with warnings.catch_warnings(action="ignore", category=sparse.SparseEfficiencyWarning):  # so many diagonals
        return getattr(sparse, kind)(X)


def batches(loader: gb.Loader) -> list[bytes]:
    to_numpy = loader.backend.to_numpy
    return [to_numpy(array).tobytes() for _ in range(2) for batch in loader for array in batch]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"shuffle": False, "drop_last": True},
        {"scale": 0.5, "dtype": "float64", "prefetch": 0},
        {"window": 64, "rank": 1, "world_size": 3},
        {"replacement": True, "weight": np.arange(1.0, N + 1)},
        {"class_weight": "balanced", "order": gb.WeightedOrder(np.arange(1.0, N + 1))},
    ],
    ids=str,
)
def test_batches_are_those_of_the_dense_array(options: dict, backend: Backend) -> None:
    X = dense()
    options = {"batch_size": 32, "seed": 4, "backend": backend, **options}
    assert batches(gb.Loader(given(X), Y, **options)) == batches(gb.Loader(X, Y, **options))


@every("kind", FORMATS, ["csr_matrix", "csr_array", "csc_array", "coo_matrix"])
@every("dtype", DTYPES, ["float32", "uint8", "bool"])
def test_every_format_and_element_type(kind: str, dtype: str) -> None:
    X = dense(dtype)
    matrix = given(X, kind)
    before = copy.deepcopy(matrix)
    if kind.startswith("csr"):
        loader = gb.Loader(matrix, Y, batch_size=32, backend="cpu")
    else:
        with pytest.warns(ConversionWarning, match=rf"X is a sparse {kind}, .* it is copied; give X.tocsr\(\)"):
            loader = gb.Loader(matrix, Y, batch_size=32, backend="cpu")
    assert batches(loader) == batches(gb.Loader(X, Y, batch_size=32, backend="cpu"))
    assert (abs(matrix.tocsr().astype(float) - before.tocsr().astype(float))).nnz == 0


@drawn(30, 400, entries=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 4), st.integers(-3, 3)), max_size=40))
def test_entries_of_one_place_are_added_up(entries: list[tuple[int, int, int]]) -> None:
    """Explicit zeros, duplicates and columns out of order, in matrices as people build them."""
    expected = np.zeros((7, 5), np.int16)
    for row, column, value in entries:
        expected[row, column] += value
    rows, columns, values = (np.array(part, np.int64) for part in zip(*entries, strict=True)) if entries else [[]] * 3
    coo = sparse.coo_matrix((np.asarray(values, np.int16), (rows, columns)), shape=(7, 5))
    order = np.argsort(rows, kind="stable")
    counts = np.bincount(np.asarray(rows, np.int64), minlength=7)
    parts = np.asarray(values, np.int16)[order], np.asarray(columns, np.int32)[order], np.r_[0, np.cumsum(counts)]
    csr = sparse.csr_array(parts, shape=(7, 5))
    assert csr.nnz == len(entries)  # nothing is added up yet
    with pytest.warns(ConversionWarning):
        converted = SparseMatrix("X", coo)
    index = np.array([3, 0, 6, 6, 1, 2])
    for matrix in (converted, SparseMatrix("X", csr)):
        assert np.array_equal(matrix.read(index), expected[index])
    assert csr.nnz == len(entries)  # what was given is as it was


def test_a_run_is_that_of_the_dense_array(backend: Backend) -> None:
    """Training, validation in three forms, prediction and evaluation."""
    X, V = dense(), dense()[::-1].copy()
    found = []
    for form in (np.asarray, given):
        for validation in ((form(V), Y), gb.Loader(form(V), Y, backend=backend, dtype="float32"), 0.25):
            net = gb.mlp([FEATURES, 16, 3], backend=backend)
            loader = gb.Loader(form(X), Y, batch_size=32, backend=backend)
            history = gb.fit(net, loader, gb.Adam(net.parameters), epochs=2, validation=validation, progress=False)
            found.append((history.step_loss, history.validation_loss, history.validation_accuracy))
    assert found[:3] == found[3:]
    x, y = backend.asarray(X), backend.asarray(Y)
    for method in ("predict", "scores", "probabilities"):
        expected, result = (getattr(net, method)(of) for of in (x, given(X, "csr_array")))
        assert backend.owns(result)
        assert bool((result == expected).all())
    assert net.evaluate(given(X), y) == net.evaluate(x, y)
    assert net.loss(given(X), y, training=True) == net.loss(x, y, training=True)
    assert net.accuracy(given(X), y) == net.accuracy(x, y)
    assert metrics.measure(net, given(X), y) == metrics.measure(net, x, y)
    model = gb.Model(net, loader, classes=["a", "b", "c"])
    assert model.predict(given(X)).tolist() == model.predict(X).tolist()
    assert model.evaluate(given(X), np.array(["a", "b", "c"])[Y]) == net.evaluate(x, y)


def test_a_run_is_resumed_with_the_same_bits(tmp_path: Path) -> None:
    X = dense()

    def run(folder: str, **options: object) -> np.ndarray:
        net = gb.mlp([FEATURES, 8, 3], backend="cpu")
        loader = gb.Loader(given(X), Y, batch_size=32, backend="cpu")
        gb.fit(net, loader, gb.Adam(net.parameters), checkpoint=tmp_path / folder, progress=False, **options)
        return net.parameters.flat.copy()

    whole = run("a", epochs=3)
    assert not np.array_equal(run("b", epochs=1), whole)
    assert np.array_equal(run("b", epochs=3, resume=True), whole)
    left, resumed = (gb.Loader(given(X), Y, batch_size=32, backend="cpu") for _ in range(2))
    one_by_one = iter(left)
    for _ in range(3):
        next(one_by_one)
    resumed.load_state_dict(left.state_dict())
    for one, other in zip(resumed, one_by_one, strict=True):
        assert all(map(np.array_equal, one, other))


def test_no_more_is_dense_than_a_batch() -> None:
    """20,000 rows of 10,000 features, 800 MB as an array; the plan has what is taken."""
    rng = np.random.default_rng(0)
    n, features, each = 20_000, 10_000, 5
    X = sparse.csr_matrix(
        (np.ones(n * each, np.float32), rng.integers(0, features, n * each), np.arange(0, n * each + 1, each)),
        shape=(n, features),
    )
    loader = gb.Loader(X, np.zeros(n, np.int64), batch_size=64, prefetch=0, backend="cpu")
    epochs_of(loader).peek()
    tracemalloc.start()
    try:
        for number, _ in enumerate(loader):
            if number == 20:
                break
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    batch = 64 * features * 4
    assert batch < peak < 2 * batch + loader.plan.needed - batch + 200_000
    net = gb.mlp([features, 2], backend="cpu")
    net.predict(X[:1024])
    tracemalloc.start()
    net.predict(X[:8000])
    assert tracemalloc.get_traced_memory()[1] < 1.1 * 1024 * features * 4 + 2**20
    tracemalloc.stop()


def with_nan() -> object:
    X = dense()
    X[77, 4] = np.nan
    return given(X)


def with_index_out_of_range() -> object:
    X = sparse.csr_matrix(dense())
    X.indices[-1] = FEATURES
    return X


WRONG = {
    "nan": (with_nan, NonFiniteError, r"X \(SparseMatrix\): samples must be finite, but sample 77 has nan at \[4\]"),
    "index": (with_index_out_of_range, ShapeError, "X is no whole csr_matrix: .*indices must be < 40"),
    "complex": (lambda: given(dense().astype(complex)), DTypeError, "X must hold integers.* got dtype complex128"),
    "empty": (lambda: sparse.csr_matrix((0, 40)), ShapeError, "X must hold at least one sample"),
    "no features": (lambda: sparse.csr_matrix((N, 0)), ShapeError, "samples of at least one number"),
    "one dimension": (lambda: sparse.coo_array(np.arange(9.0)), ShapeError, r"must be \(samples, features\) where it"),
    "too few": (lambda: given(dense(n=N - 1)), ShapeError, r"equal numbers of samples, got X of shape \(202, 40\)"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_told(name: str) -> None:
    make, error, message = WRONG[name]
    with pytest.raises(error, match=message):
        list(gb.Loader(make(), Y, batch_size=32, backend="cpu"))


def test_sparse_columns_and_features_of_another_number_are_refused() -> None:
    with pytest.raises(gb.ArgumentError, match="sample_axis=1 needs arrays, X is a source of rows"):
        gb.Loader(given(dense()), Y, sample_axis=1, backend="cpu")
    with pytest.raises(ShapeError, match=r"X has 40 features, layer 1 \(Dense\) takes 5: X has shape \(203, 40\)"):
        gb.mlp([5, 3], backend="cpu").predict(given(dense()))
    with pytest.raises(DTypeError, match="X has dtype uint8, as pixels have"):
        gb.mlp([FEATURES, 3], backend="cpu").predict(given(dense("uint8")))
