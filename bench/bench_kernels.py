"""Benchmark each kernel of the core in its NumPy, compiled and CUDA forms.

    pytest bench/bench_kernels.py -m exhaustive --benchmark-enable

Each result is compared with NumPy's. Without ``--benchmark-enable`` each benchmark runs once, as a test.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import pytest

import gpubatch as gb
from gpubatch.formula import activations
from gpubatch.ops import SQUARE_SUM_SIZE, Ops, host_library, ops_for
from gpubatch.ops.grid import PARTS, SUM_PARTS

Arrays: TypeAlias = dict[str, Any]

pytestmark = pytest.mark.exhaustive

FEATURES = 512
FORMS = pytest.mark.parametrize("form", ["numpy", "host", pytest.param("cuda", marks=pytest.mark.gpu)])
BATCHES = pytest.mark.parametrize("batch", [128, 4096])
ACTIVATIONS = pytest.mark.parametrize("kind", activations.__all__)
OUTPUTS = pytest.mark.parametrize("outputs", ["10 classes", "1000 classes"])


def ops_or_skip(form: str) -> tuple[gb.Backend, Ops]:
    if form == "cuda":
        if "cuda:0" not in gb.available_backends():
            pytest.skip("no CUDA device can be used here")
        backend = gb.get_backend("cuda")
        return backend, ops_for(backend, np.dtype(np.float32))
    backend, library = gb.get_backend("cpu"), host_library()
    if form == "numpy":
        return backend, Ops()
    if isinstance(library, str):
        pytest.skip(library)
    return backend, Ops(library)


def measure(
    benchmark: Any,
    form: str,
    call: Callable[[Ops, Arrays], None],
    arrays: Arrays,
    results: str,
    restored: str = "",
) -> None:
    """Time ``call(ops, arrays)``, and compare the arrays named in ``results`` with NumPy's.

    ``restored`` names arrays that the call reads and changes; each call starts from their initial values.
    """
    backend, ops = ops_or_skip(form)
    expected = {name: a.copy() for name, a in arrays.items()}
    with np.errstate(over="ignore"):
        call(Ops(), expected)
    own = {name: backend.asarray(a) for name, a in arrays.items()}
    first = {name: own[name].copy() for name in restored.split()}

    def restore() -> None:
        for name, values in first.items():
            own[name][...] = values

    def run() -> None:
        call(ops, own)
        backend.synchronize()

    with backend.scope(), np.errstate(over="ignore"):
        if restored:
            benchmark.pedantic(run, setup=restore, rounds=100, warmup_rounds=0 if benchmark.disabled else 3)
        else:
            benchmark(run)
    for name in results.split():
        found, wanted = backend.to_numpy(own[name]), expected[name]
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5 * abs(wanted).max(), err_msg=name)


def normal(*shapes: tuple[int, ...]) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape, np.float32) for shape in shapes]


def empty(*names: str, shape: tuple[int, ...], dtype: Any = np.float32) -> Arrays:
    return {name: np.empty(shape, dtype) for name in names}


# --- activations and biases ------------------------------------------------------------------------------------------


@ACTIVATIONS
@FORMS
@BATCHES
def test_activate(benchmark: Any, batch: int, form: str, kind: str) -> None:
    benchmark.group = f"activate {kind}, {FEATURES} features, by batch size"
    f = getattr(activations, kind).bind(**({"slope": 0.01} if kind == "leaky_relu" else {}))
    x, b = normal((batch, FEATURES), (FEATURES,))
    arrays = {"x": x, "b": b, **empty("y", "slope", shape=x.shape)}
    results = "y slope" if f.keeps else "y"
    measure(benchmark, form, lambda ops, a: ops.activate(f, a["x"], a["b"], a["y"], a), arrays, results)


@ACTIVATIONS
@FORMS
@BATCHES
def test_activation_gradient(benchmark: Any, batch: int, form: str, kind: str) -> None:
    benchmark.group = f"gradient of {kind}, {FEATURES} features, by batch size"
    f = getattr(activations, kind).bind(**({"slope": 0.01} if kind == "leaky_relu" else {}))
    y, dy = normal((batch, FEATURES), (batch, FEATURES))
    arrays = {
        "y": y,
        "dy": dy,
        "slope": y.copy(),
        **empty("dx", shape=y.shape),
        **empty("db", shape=(FEATURES,)),
        **empty("partial", shape=(PARTS, FEATURES)),
    }

    def call(ops: Ops, a: Arrays) -> None:
        ops.activation_gradient(f, a["y"], a["dy"], a["dx"], a["db"], a)

    measure(benchmark, form, call, arrays, "dx db")


# --- losses ----------------------------------------------------------------------------------------------------------


def scores(batch: int, outputs: str) -> Arrays:
    """Scores and labels, and the workspace of both losses."""
    classes = int(outputs.split()[0])
    (z,) = normal((batch, classes))
    return {
        "z": z,
        "Y": np.random.default_rng(0).integers(0, classes, batch),
        "offsets": np.arange(batch) * classes,
        **empty("dz", "t", shape=z.shape),
        **empty("row", "sum", "log", "mass", shape=(batch,)),
        **empty("index", shape=(batch,), dtype=np.int64),
        **empty("loss", shape=(1,)),
        **empty("parts", shape=(SUM_PARTS,), dtype=np.float64),
        "ticket": np.zeros(1, np.uint32),
    }


@OUTPUTS
@FORMS
@BATCHES
def test_softmax_cross_entropy(benchmark: Any, batch: int, form: str, outputs: str) -> None:
    benchmark.group = f"softmax cross-entropy and its gradient, {outputs}, by batch size"

    def call(ops: Ops, a: Arrays) -> None:
        ops.softmax_cross_entropy(a["z"], a["Y"], True, a)

    measure(benchmark, form, call, scores(batch, outputs), "loss dz")


@OUTPUTS
@FORMS
@BATCHES
def test_svm(benchmark: Any, batch: int, form: str, outputs: str) -> None:
    benchmark.group = f"SVM loss and its gradient, {outputs}, by batch size"
    measure(benchmark, form, lambda ops, a: ops.svm(a["z"], a["Y"], True, a), scores(batch, outputs), "loss dz")


# --- batch norm ------------------------------------------------------------------------------------------------------


def batch_norm_arrays(batch: int) -> Arrays:
    """The inputs and the workspace of batch norm; ``normalised`` and ``inverse`` stand for forward's results."""
    x, dy, n, gamma, beta = normal(*[(batch, FEATURES)] * 3, *[(FEATURES,)] * 2)
    ones = np.ones(FEATURES, np.float32)
    return {
        "x": x,
        "dy": dy,
        "normalised": n,
        "gamma": gamma,
        "beta": beta,
        "mean": beta.copy(),
        "var": ones,
        "inverse": ones.copy(),
        **empty("y", "dx", "t", shape=x.shape),
        **empty("dgamma", "dbeta", "row", shape=(FEATURES,)),
        **empty("partial", shape=(2 * PARTS, FEATURES)),
    }


@FORMS
@BATCHES
def test_normalise(benchmark: Any, batch: int, form: str) -> None:
    benchmark.group = f"batch norm in evaluation, {FEATURES} features, by batch size"

    def call(ops: Ops, a: Arrays) -> None:
        ops.normalise(a["x"], a["mean"], a["var"], 1e-5, a["gamma"], a["beta"], a["y"], a)

    measure(benchmark, form, call, batch_norm_arrays(batch), "y")


@FORMS
@BATCHES
def test_batch_norm(benchmark: Any, batch: int, form: str) -> None:
    benchmark.group = f"batch norm in training, {FEATURES} features, by batch size"

    def call(ops: Ops, a: Arrays) -> None:
        ops.batch_norm(a["x"], 1e-5, a["gamma"], a["beta"], a["y"], a)

    measure(benchmark, form, call, batch_norm_arrays(batch), "y normalised mean var inverse")


@FORMS
@BATCHES
def test_batch_norm_gradient(benchmark: Any, batch: int, form: str) -> None:
    benchmark.group = f"gradient of batch norm, {FEATURES} features, by batch size"

    def call(ops: Ops, a: Arrays) -> None:
        ops.batch_norm_gradient(a["dy"], a["gamma"], a["dgamma"], a["dbeta"], a["dx"], a)

    measure(benchmark, form, call, batch_norm_arrays(batch), "dx dgamma dbeta", restored="normalised")


@FORMS
@pytest.mark.parametrize("features", [512, 8192])
def test_update_running(benchmark: Any, features: int, form: str) -> None:
    benchmark.group = "running statistics moved, by features"
    running, new = normal((features,), (features,))
    arrays = {"running": running, "new": new, **empty("row", shape=(features,))}

    def call(ops: Ops, a: Arrays) -> None:
        ops.update_running(a["running"], a["new"], 0.1, 1.01, a)

    measure(benchmark, form, call, arrays, "running", restored="running")


# --- dropout, sums of squares, gather --------------------------------------------------------------------------------


@FORMS
@BATCHES
def test_dropout(benchmark: Any, batch: int, form: str) -> None:
    benchmark.group = f"dropout, {FEATURES} features, by batch size"
    (x,) = normal((batch, FEATURES))

    def call(ops: Ops, a: Arrays) -> None:
        ops.dropout(a["x"], a["y"], 0.2, (0, 1), 3, 0, a)

    measure(benchmark, form, call, {"x": x, **empty("y", "mask", "uniform", shape=x.shape)}, "y mask")


@FORMS
@pytest.mark.parametrize("size", [1_000_000, 10_000_000])
def test_square_sum(benchmark: Any, size: int, form: str) -> None:
    benchmark.group = "sum of squares and count of what is not finite, by size"
    (x,) = normal((size,))

    def call(ops: Ops, a: Arrays) -> None:
        a["out"][:2] = 0  # square_sum adds to it
        ops.square_sum(a["x"], a["out"])
        a["found"][...] = a["out"][:2]

    found = empty("found", shape=(2,), dtype=np.float64)
    measure(benchmark, form, call, {"x": x, "out": np.zeros(SQUARE_SUM_SIZE), **found}, "found")


@FORMS
@pytest.mark.parametrize("batch", [64, 256, 1024])
def test_gather(benchmark: Any, batch: int, form: str) -> None:
    # A whole epoch, so that rows come from main memory as in training.
    samples, pixels = 2_000 if benchmark.disabled else 60_000, 784
    benchmark.group = f"epoch of {samples:,} x {pixels} bytes gathered and made float32, by batch size"
    benchmark.extra_info["samples"] = samples  # report.py divides by it
    rng = np.random.default_rng(0)
    source = rng.integers(0, 256, (samples, pixels), np.uint8)
    arrays = {"source": source, "order": rng.permutation(samples), **empty("out", shape=(batch, pixels))}

    def call(ops: Ops, a: Arrays) -> None:
        for start in range(0, samples - batch + 1, batch):
            ops.gather(a["source"], a["order"][start : start + batch], a["out"], 1 / 255, -0.5)

    measure(benchmark, form, call, arrays, "out")
