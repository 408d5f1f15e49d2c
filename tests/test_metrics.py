"""Metrics against scikit-learn and closed forms, at once and over batches, on every backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from needs import peer

import gpubatch as gb
from gpubatch import metrics
from gpubatch.backend import Backend
from gpubatch.errors import ArgumentError, ShapeError

# What gpubatch and scikit-learn call each metric of labels, and further arguments of scikit-learn's.
OF_LABELS: dict[str, tuple[Callable[..., Any], str]] = {
    "accuracy": (metrics.accuracy, "accuracy_score"),
    "confusion_matrix": (metrics.confusion_matrix, "confusion_matrix"),
    "precision": (metrics.precision, "precision_score"),
    "recall": (metrics.recall, "recall_score"),
    "f1": (metrics.f1, "f1_score"),
}
OF_NUMBERS: dict[str, tuple[Callable[..., Any], str]] = {
    "r2": (metrics.r2, "r2_score"),
    "mse": (metrics.mse, "mean_squared_error"),
    "rmse": (metrics.rmse, "root_mean_squared_error"),
    "mae": (metrics.mae, "mean_absolute_error"),
}


def test_the_tables_have_every_metric() -> None:
    functions = {name for name in metrics.__all__ if name[0].islower()} - {"of_batches"}
    assert functions == {*OF_LABELS, *OF_NUMBERS, "top_k_accuracy", "measure", "measures_of"}


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", ["labels", "absent class", "two classes", "columns"])
def test_labels_as_in_scikit_learn(shape: str, weighted: bool, backend: Backend, rng: np.random.Generator) -> None:
    theirs = peer("sklearn.metrics")
    size = (200, 3) if shape == "columns" else 200
    most = 2 if shape in ("columns", "two classes") else 5
    y, p = rng.integers(0, most, size), rng.integers(0, most, size)
    if shape == "absent class":
        y[y == 3], p[p >= 2] = 1, 0
    w = rng.uniform(0, 2, 200) if weighted else None
    given = [backend.asarray(a) for a in (y, p)]
    own_weight = None if w is None else backend.asarray(w)
    for name, (ours, of) in OF_LABELS.items():
        if name in ("accuracy", "confusion_matrix"):
            if shape != "columns":
                options = {"labels": np.arange(most)} if name == "confusion_matrix" else {}
                expected = getattr(theirs, of)(y, p, sample_weight=w, **options)
                np.testing.assert_allclose(ours(*given, weight=own_weight), expected, rtol=1e-12)
            continue
        averages = ("macro", "micro", "weighted", *(["binary"] if shape == "two classes" else []))
        for average in averages:
            for zero in (0.0, 1.0):
                expected = getattr(theirs, of)(y, p, average=average, sample_weight=w, zero_division=zero)
                found = ours(*given, average=average, weight=own_weight, zero_division=zero)
                assert found == pytest.approx(expected, rel=1e-12), (name, average, zero)
        labels = np.unique([*y.reshape(-1), *p.reshape(-1)]) if shape != "columns" else np.arange(3)
        expected = getattr(theirs, of)(y, p, average=None, sample_weight=w, zero_division=0)
        np.testing.assert_allclose(ours(*given, average=None, weight=own_weight)[labels], expected, rtol=1e-12)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", [(50,), (50, 3)])
def test_numbers_as_in_scikit_learn(
    shape: tuple[int, ...], weighted: bool, backend: Backend, rng: np.random.Generator
) -> None:
    theirs = peer("sklearn.metrics")
    y = 1e3 + rng.normal(size=shape)
    p = y + 0.3 * rng.normal(size=shape)
    w = rng.uniform(0, 2, 50) if weighted else None
    given = [backend.asarray(a) for a in (y, p)]
    own_weight = None if w is None else backend.asarray(w)
    for name, (ours, of) in OF_NUMBERS.items():
        expected = getattr(theirs, of)(y, p, sample_weight=w)
        assert ours(*given, weight=own_weight) == pytest.approx(expected, rel=1e-11), name
    parts = metrics.Residuals()
    for part in (slice(0, 7), slice(7, 30), slice(30, 50)):
        parts.add(*(a[part] for a in given), None if own_weight is None else own_weight[part])
    for name, (_, of) in OF_NUMBERS.items():
        assert getattr(parts, name)() == pytest.approx(getattr(theirs, of)(y, p, sample_weight=w), rel=1e-11), name


def test_r2_of_constant_targets_is_that_of_scikit_learn() -> None:
    assert metrics.r2(np.ones(4), np.ones(4)) == 1.0
    assert metrics.r2(np.ones(4), np.array([1, 1, 1, 2.0])) == 0.0


@pytest.mark.parametrize("k", [1, 2, 4])
def test_top_k_as_in_scikit_learn(k: int, backend: Backend, rng: np.random.Generator) -> None:
    """With ties among the scores."""
    theirs = peer("sklearn.metrics")
    y, z, w = rng.integers(0, 5, 300), rng.integers(0, 4, (300, 5)).astype(float), rng.uniform(0, 1, 300)
    given = [backend.asarray(a) for a in (y, z)]
    expected = theirs.top_k_accuracy_score(y, z, k=k, labels=np.arange(5))
    assert metrics.top_k_accuracy(*given, k=k) == pytest.approx(expected, rel=1e-12)
    expected = theirs.top_k_accuracy_score(y, z, k=k, labels=np.arange(5), sample_weight=w)
    assert metrics.top_k_accuracy(*given, k=k, weight=backend.asarray(w)) == pytest.approx(expected, rel=1e-12)


# --- of a network ----------------------------------------------------------------------------------------------------

EVERY_NAME = ["accuracy", "top_2", "confusion_matrix", "precision", "recall_micro", "f1", "f1_weighted"]


def test_a_network_is_measured_over_arrays_and_loaders(backend: Backend, rng: np.random.Generator) -> None:
    net = gb.mlp([6, 8, 4], backend=backend, dtype="float64", seed=1)
    X, Y = rng.normal(size=(2500, 6)), rng.integers(0, 4, 2500)
    x, y = backend.asarray(X), backend.asarray(Y)
    found = metrics.measure(net, x, y, EVERY_NAME)
    predicted = backend.to_numpy(net.predict(x))
    assert found["accuracy"] == pytest.approx(net.accuracy(x, y), rel=1e-14)
    assert found["top_2"] == metrics.top_k_accuracy(Y, backend.to_numpy(net.scores(x)), 2)
    np.testing.assert_array_equal(found["confusion_matrix"], metrics.confusion_matrix(Y, predicted, 4))
    assert found["f1"] == metrics.f1(Y, predicted)
    assert found["f1_weighted"] == metrics.f1(Y, predicted, "weighted")
    assert found["recall_micro"] == metrics.recall(Y, predicted, "micro") == found["accuracy"]
    loader = gb.Loader(X, Y, batch_size=300, backend=backend, dtype="float64")
    by_loader = metrics.measure(net, loader, metrics=EVERY_NAME)
    for name, value in found.items():
        np.testing.assert_allclose(by_loader[name], value, rtol=1e-13)


def test_other_losses_are_measured(rng: np.random.Generator) -> None:
    X = rng.normal(size=(40, 3)).astype(np.float32)
    net = gb.mlp([3, 1], loss="mse", backend="cpu")
    Y = rng.normal(size=40)
    found = metrics.measure(net, X, Y, ["r2", "mae"])
    assert found == {"r2": metrics.r2(Y, net.predict(X)), "mae": metrics.mae(Y, net.predict(X))}
    for outputs in (1, 3):
        net = gb.mlp([3, outputs], loss="hinge", backend="cpu")
        Y = rng.integers(0, 2, (40, outputs))
        found = metrics.measure(net, X, Y, ["accuracy", "f1", *(["f1_binary"] if outputs == 1 else [])])
        assert found["accuracy"] == pytest.approx(net.accuracy(X, Y), rel=1e-14)
        predicted = net.predict(X)
        assert found["f1"] == metrics.f1(Y.reshape(predicted.shape), predicted)
    ignoring = gb.mlp([3, 4], loss=gb.SoftmaxCrossEntropy(ignore_label=-1), backend="cpu")
    Y = rng.integers(-1, 4, 40)
    assert metrics.measure(ignoring, X, Y)["accuracy"] == pytest.approx(ignoring.accuracy(X, Y), rel=1e-14)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda net: metrics.measure(net, np.zeros((2, 3), "f4"), [0, 1], ["f2"]), ArgumentError, "one of .* got 'f2'"),
        (lambda net: metrics.measure(net, np.zeros((2, 3), "f4"), [0, 1], "f1"), ArgumentError, r"write \['f1'\]"),
        (lambda net: metrics.measure(net, np.zeros((2, 3), "f4")), ArgumentError, "Y must be given"),
        (lambda net: metrics.f1(np.zeros(3, int), np.zeros(2, int)), ShapeError, r"one shape, .* \(3,\), \(2,\)"),
        (lambda net: metrics.f1(np.zeros(0, int), np.zeros(0, int)), ArgumentError, "no samples"),
        (lambda net: metrics.f1(np.array([0, -1]), np.zeros(2, int)), ArgumentError, "truth must hold labels from 0"),
        (lambda net: metrics.f1(np.zeros(2, int), np.zeros(2, int), "mean"), ArgumentError, "average must be one of"),
        (lambda net: metrics.f1(np.arange(3), np.arange(3), "binary"), ArgumentError, "needs two classes, got 3"),
    ],
)
def test_what_is_refused(call: Callable[[gb.Network], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(gb.mlp([3, 2], backend="cpu"))
    with pytest.raises(ArgumentError, match="'f1' needs a loss with classes, and mse has none"):
        metrics.measure(gb.mlp([3, 1], loss="mse", backend="cpu"), np.zeros((2, 3), "f4"), np.zeros(2), ["f1"])


# --- of a run --------------------------------------------------------------------------------------------------------


def run(folder: Any, epochs: int, backend: Backend, resume: bool = False, **options: Any) -> tuple[gb.Network, Any]:
    draw = np.random.default_rng(5)
    X, Y = draw.normal(size=(90, 4)).astype("f4"), draw.integers(0, 3, 90)
    net = gb.mlp([4, 8, 3], seed=0, backend=backend)
    loader = gb.Loader(X[:60], Y[:60], batch_size=20, backend=backend)
    options = {"checkpoint": folder, "resume": resume, "progress": False, "metrics": ["f1", "top_2"], **options}
    history = gb.fit(net, loader, gb.Adam(net.parameters, lr=0.05), epochs, (X[60:], Y[60:]), **options)
    return net, history


def test_metrics_of_a_run(backend: Backend, tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    net, history = run(tmp_path / "whole", 4, backend, progress=True)
    draw = np.random.default_rng(5)
    X, Y = (backend.asarray(a) for a in (draw.normal(size=(90, 4)).astype("f4"), draw.integers(0, 3, 90)))
    last = metrics.measure(net, X[60:], Y[60:], ["f1", "top_2"])
    assert {name: values[-1] for name, values in history.metrics.items()} == last
    assert [len(values) for values in history.metrics.values()] == [4, 4]
    assert f"f1 {last['f1']:.4f}  top_2 {last['top_2']:.4f}" in capsys.readouterr().err
    run(tmp_path / "parts", 2, backend)
    _, resumed = run(tmp_path / "parts", 4, backend, resume=True)
    assert resumed.metrics == history.metrics
    assert resumed.to_dict()["metrics"] == history.metrics
    run(tmp_path / "later", 2, backend, metrics=[])
    with pytest.warns(gb.ResumeWarning, match=r"metrics: \[\] before, \['f1', 'top_2'\] now"):
        _, later = run(tmp_path / "later", 4, backend, resume=True)
    assert np.isnan(later.metrics["f1"][:2]).all()
    assert later.metrics["f1"][2:] == history.metrics["f1"][2:]


def test_a_metric_is_a_monitor(tmp_path: Any) -> None:
    best = gb.BestWeights("validation_f1")
    log = gb.CSVLog(tmp_path / "log.csv")
    _, history = run(None, 5, gb.get_backend("cpu"), callbacks=[best, log])
    assert best.best == max(history.metrics["f1"])
    text = (tmp_path / "log.csv").read_text().splitlines()
    assert text[0] == "epoch,step,loss,validation_loss,validation_accuracy,validation_f1,validation_top_2,lr,seconds"
    assert [float(line.split(",")[5]) for line in text[1:]] == history.metrics["f1"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metrics": ["f2"]}, "a metric must be one of .* got 'f2'"),
        ({"metrics": "f1"}, "metrics must be a list"),
        ({"metrics": ["confusion_matrix"]}, "metrics of a run are numbers, and 'confusion_matrix' is none"),
        ({"metrics": ["f1"], "validation": None}, "metrics are measured on the validation set: give validation="),
    ],
)
def test_metrics_that_a_run_cannot_have(options: dict[str, Any], message: str) -> None:
    X, Y = np.zeros((9, 4), "f4"), np.zeros(9, int)
    net = gb.mlp([4, 3], backend="cpu")
    options = {"validation": (X, Y), **options}
    with pytest.raises(ArgumentError, match=message):
        gb.fit(net, gb.Loader(X, Y, batch_size=3, backend="cpu"), gb.Adam(net.parameters), 1, progress=False, **options)
