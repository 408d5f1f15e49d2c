"""Weights of samples and ignored labels: against PyTorch, scikit-learn, and batches in which samples are repeated."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from needs import peer

import gpubatch as gb
from gpubatch import nn
from gpubatch.backend import Backend
from gpubatch.loader import weights
from gpubatch.nn import LOSSES, losses

ROWS, CLASSES = 12, 4


def labels(draw: np.random.Generator) -> np.ndarray:
    return draw.integers(0, CLASSES, ROWS)


def rows(draw: np.random.Generator) -> np.ndarray:
    return draw.dirichlet(np.ones(CLASSES), ROWS)


def numbers(draw: np.random.Generator) -> np.ndarray:
    return draw.normal(size=(ROWS, CLASSES))


# Every loss: its targets, and PyTorch's losses of single samples.
CASES: dict[str, tuple[str, Callable[..., Any], Callable[..., Any]]] = {
    "softmax, labels": ("softmax_cross_entropy", labels, lambda F, z, y: F.cross_entropy(z, y, reduction="none")),
    "softmax, rows": ("softmax_cross_entropy", rows, lambda F, z, y: F.cross_entropy(z, y, reduction="none")),
    "svm": ("svm", labels, lambda F, z, y: F.multi_margin_loss(z, y, reduction="none") * CLASSES),
    "crammer_singer": (
        "crammer_singer",
        labels,
        lambda F, z, y: (z.masked_fill(F.one_hot(y, CLASSES) == 1, -1e9).amax(1) - z[range(ROWS), y] + 1).clamp(min=0),
    ),
    "kl_divergence": (
        "kl_divergence",
        rows,
        lambda F, z, y: F.kl_div(F.log_softmax(z, 1), y, reduction="none").sum(1),
    ),
    "softmax_focal": (
        "softmax_focal",
        labels,
        lambda F, z, y: (1 - F.softmax(z, 1)[range(ROWS), y]) ** 2 * F.cross_entropy(z, y, reduction="none"),
    ),
    "mse": ("mse", numbers, lambda F, z, y: F.mse_loss(z, y, reduction="none").mean(1)),
    "sigmoid": (
        "sigmoid_cross_entropy",
        rows,
        lambda F, z, y: F.binary_cross_entropy_with_logits(z, y, reduction="none").mean(1),
    ),
}
every_case = pytest.mark.parametrize("case", CASES)


def test_the_table_is_complete() -> None:
    """Losses of single scores all run in the kernels of mse and sigmoid_cross_entropy."""
    others = {name for name, loss in LOSSES.items() if not isinstance(loss, losses.OverScores)}
    assert {name for name, _, _ in CASES.values()} == others | {"mse", "sigmoid_cross_entropy"}


def alone(name: str) -> Callable[..., Any]:
    return getattr(losses, name)


# --- losses ----------------------------------------------------------------------------------------------------------


@every_case
def test_weighted_losses_and_gradients_are_pytorchs(case: str, rng: np.random.Generator) -> None:
    torch = peer("torch")
    name, targets, theirs = CASES[case]
    z, y, w = 3 * rng.normal(size=(ROWS, CLASSES)), targets(rng), rng.uniform(0, 3, ROWS)
    w[5] = 0
    scores, weight = torch.tensor(z, requires_grad=True), torch.tensor(w)
    expected = (weight * theirs(torch.nn.functional, scores, torch.tensor(y))).sum() / weight.sum()
    expected.backward()
    loss, gradient = alone(name)(z, y, weight=w)
    np.testing.assert_allclose(loss, expected.item(), rtol=1e-12)
    np.testing.assert_allclose(gradient, scores.grad.numpy(), rtol=1e-12, atol=1e-15)


def test_class_weights_and_ignored_labels_are_pytorchs(rng: np.random.Generator) -> None:
    F = peer("torch").nn.functional
    import torch

    z, y, of_class = rng.normal(size=(ROWS, CLASSES)), rng.integers(0, CLASSES, ROWS), rng.uniform(0.1, 3, CLASSES)
    y[[2, 7]] = -100
    scores = torch.tensor(z, requires_grad=True)
    expected = F.cross_entropy(scores, torch.tensor(y), torch.tensor(of_class), ignore_index=-100)
    expected.backward()
    weight = of_class[np.clip(y, 0, None)]
    loss, gradient = losses.softmax_cross_entropy(z, y, weight, ignore_label=-100)
    np.testing.assert_allclose(loss, expected.item(), rtol=1e-12)
    np.testing.assert_allclose(gradient, scores.grad.numpy(), rtol=1e-12, atol=1e-15)


def test_smoothed_labels_take_weights_as_pytorchs_do(rng: np.random.Generator) -> None:
    torch = peer("torch")
    z, y, w = rng.normal(size=(ROWS, CLASSES)), rng.integers(0, CLASSES, ROWS), rng.uniform(0, 3, ROWS)
    y[4] = -1
    scores, weight = torch.tensor(z, requires_grad=True), torch.tensor(w * (y >= 0))
    options = {"reduction": "none", "label_smoothing": 0.2, "ignore_index": -1}
    each = torch.nn.functional.cross_entropy(scores, torch.tensor(y), **options)
    expected = (weight * each).sum() / weight.sum()
    expected.backward()
    loss, gradient = losses.softmax_cross_entropy(z, y, w, ignore_label=-1, label_smoothing=0.2)
    np.testing.assert_allclose(loss, expected.item(), rtol=1e-12)
    np.testing.assert_allclose(gradient, scores.grad.numpy(), rtol=1e-12, atol=1e-15)


@every_case
def test_whole_weights_are_repeated_samples(case: str, rng: np.random.Generator) -> None:
    name, targets, _ = CASES[case]
    z, y, times = rng.normal(size=(ROWS, CLASSES)), targets(rng), rng.integers(0, 4, ROWS)
    loss, gradient = alone(name)(z, y, weight=times)
    repeated = alone(name)(np.repeat(z, times, axis=0), np.repeat(y, times, axis=0))
    np.testing.assert_allclose(loss, repeated[0], rtol=1e-12)
    starts = np.cumsum(times) - times
    for i, count in enumerate(times):
        of_sample = count * repeated[1][starts[i]] if count else 0
        np.testing.assert_allclose(gradient[i], of_sample, rtol=1e-12, atol=1e-16)


@every_case
def test_weights_of_one_change_no_bit(case: str, dtype: np.dtype, rng: np.random.Generator) -> None:
    name, targets, _ = CASES[case]
    z, y = rng.normal(size=(ROWS, CLASSES)).astype(dtype), targets(rng)
    plain, weighted = alone(name)(z, y), alone(name)(z, y, weight=np.ones(ROWS))
    assert weighted[0] == plain[0]
    np.testing.assert_array_equal(weighted[1], plain[1])


@every_case
def test_only_ratios_of_weights_count(case: str, dtype: np.dtype, rng: np.random.Generator) -> None:
    """Weights that are far apart from 1 neither overflow nor vanish."""
    name, targets, _ = CASES[case]
    z, y, w = rng.normal(size=(ROWS, CLASSES)).astype(dtype), targets(rng), rng.uniform(1, 3, ROWS)
    right = alone(name)(z, y, weight=w)
    for factor in (1e-30, 1e30):
        found = alone(name)(z, y, weight=factor * w)
        assert found[0] == pytest.approx(right[0], rel=1e-6)
        np.testing.assert_allclose(found[1], right[1], rtol=1e-5)


@every_case
def test_a_sample_of_weight_0_is_not_looked_at(case: str, rng: np.random.Generator) -> None:
    name, targets, _ = CASES[case]
    z, y, w = rng.normal(size=(ROWS, CLASSES)), targets(rng), np.ones(ROWS)
    z[3], w[3] = math.inf, 0
    loss, gradient = alone(name)(z, y, weight=w)
    rest = np.arange(ROWS) != 3
    expected = alone(name)(z[rest], y[rest])
    assert loss == pytest.approx(expected[0], rel=1e-14)
    np.testing.assert_allclose(gradient[rest], expected[1], rtol=1e-13)
    assert not gradient[3].any()


BAD = {
    "negative": (np.array([1.0, -2, 1]), gb.ArgumentError, r"weight must hold finite .* got weight\[1\] = -2"),
    "NaN": (np.array([1.0, 1, math.nan]), gb.ArgumentError, r"weight\[2\] = nan"),
    "infinite": (np.array([math.inf, 1, 1]), gb.ArgumentError, r"weight\[0\] = inf"),
    "too few": (np.ones(2), gb.ShapeError, r"weight must have shape \(3,\).*got \(2,\)"),
    "a column": (np.ones((3, 1)), gb.ShapeError, r"got \(3, 1\)"),
    "text": (np.array(["a", "b", "c"]), gb.DTypeError, "weight must hold real numbers, got dtype <U1"),
    "all 0": (np.zeros(3), gb.NonFiniteError, "all its weights are 0, or all its labels are ignored"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_weights_are_named(kind: str, rng: np.random.Generator) -> None:
    weight, error, message = BAD[kind]
    X, Y = rng.normal(size=(3, 2)), np.array([0, 1, 2])
    net = gb.mlp([2, 3], dtype="float64", backend="cpu")
    for call in (net.loss_and_grad, net.loss, net.evaluate, net.accuracy):
        with pytest.raises(error, match=message):
            call(X, Y, weight=weight)
    with pytest.raises(error, match=message):
        net.loss_and_grad(X, Y, 2, weight)
    with pytest.raises(error, match=message):
        losses.softmax_cross_entropy(X @ np.ones((2, 3)), Y, weight)


# --- networks --------------------------------------------------------------------------------------------------------


@pytest.fixture
def net() -> gb.Network:
    return gb.mlp([5, 6, CLASSES], loss=gb.SoftmaxCrossEntropy(ignore_label=-1), l2=0.1, dtype="float64", backend="cpu")


@pytest.fixture
def data(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    Y = rng.integers(-1, CLASSES, 40)
    weight = rng.uniform(0, 2, 40)
    weight[:9] = 0
    return rng.normal(size=(40, 5)), Y, weight


def test_micro_batches_are_the_batch(net: gb.Network, data: Any) -> None:
    X, Y, weight = data
    loss, grads = net.loss_and_grad(X, Y, weight=weight)
    whole = grads.flat.copy()
    for rows_at_once in (1, 7, 39):  # of some of the first, all samples have the weight 0
        part, grads = net.loss_and_grad(X, Y, rows_at_once, weight)
        assert part == pytest.approx(loss, rel=1e-12)
        np.testing.assert_allclose(grads.flat, whole, rtol=1e-11, atol=1e-15)
    assert net.step_loss(X, Y, weight).item() == pytest.approx(loss, rel=1e-14)
    np.testing.assert_allclose(net.parameters.grads.flat, whole, rtol=1e-13)
    assert net.loss(X, Y, training=True, weight=weight) == pytest.approx(loss, rel=1e-14)
    for at_once in (1, 7, 1024):
        assert net.evaluate(X, Y, at_once, weight)[0] == pytest.approx(loss, rel=1e-12)


def test_the_gradient_is_that_of_the_loss(net: gb.Network, data: Any) -> None:
    X, Y, weight = data
    _, grads = net.loss_and_grad(X, Y, weight=weight)
    of_loss = lambda flat: net.loss(X, Y, weight=weight)  # noqa: E731  flat is the network's own
    assert gb.gradient_check(of_loss, net.parameters.flat, grads.flat).ok


def test_accuracy_is_scikit_learns(net: gb.Network, data: Any) -> None:
    metrics = peer("sklearn.metrics")
    X, Y, weight = data
    kept = Y >= 0
    right = metrics.accuracy_score(Y[kept], net.predict(X)[kept])
    assert net.accuracy(X, Y) == net.evaluate(X, Y, 3)[1] == right
    right = metrics.accuracy_score(Y[kept], net.predict(X)[kept], sample_weight=weight[kept])
    assert net.accuracy(X, Y, weight) == pytest.approx(right, rel=1e-14)
    loss, accuracy = net.evaluate(X, Y, 7, weight)
    assert accuracy == pytest.approx(right, rel=1e-14)
    assert net.evaluate(X, Y, 7, np.ones(40), weight) == pytest.approx((loss, net.accuracy(X, Y)), rel=1e-14)


def test_a_slice_leaves_ignored_labels_out(net: gb.Network, data: Any) -> None:
    X, Y, _ = data
    found = gb.loss_slice(net, X, Y, [-1, 0, 1])
    assert found.losses[1] == pytest.approx(net.loss(X, Y), rel=1e-12)


def test_an_ignored_label_is_part_of_the_losss_name() -> None:
    assert gb.SoftmaxCrossEntropy().name == "softmax_cross_entropy"
    assert gb.SVM(ignore_label=-1).name == "svm(ignore_label=-1)"
    assert repr(gb.SoftmaxCrossEntropy(ignore_label=255)) == "<loss softmax_cross_entropy(ignore_label=255)>"
    net = gb.mlp([2, 3], loss=gb.SVM(ignore_label=-1), backend="cpu")
    assert copy.deepcopy(net).loss_name == net.loss_name
    with pytest.raises(gb.GpubatchError, match="ignore_label must be an integer"):
        gb.SVM(ignore_label=0.5)


@pytest.mark.parametrize("loss", [gb.SoftmaxCrossEntropy(ignore_label=255), gb.SVM(ignore_label=255)], ids=repr)
def test_other_labels_out_of_range_are_still_refused(loss: gb.Loss) -> None:
    net, X = gb.mlp([2, 3], loss=loss, backend="cpu"), np.ones((3, 2), np.float32)
    for call in (net.loss_and_grad, net.step_loss, net.loss, net.accuracy):
        with pytest.raises(gb.ArgumentError, match="labels from 0 to 2, or 255, which is ignored, got 254"):
            call(X, np.array([0, 255, 254], np.uint8))
    with pytest.raises(gb.NonFiniteError, match="all its labels are ignored"):
        net.loss(X, np.full(3, 255))


# --- losses of the user's own ----------------------------------------------------------------------------------------


class Absolute(gb.Loss):
    """The mean distance of a score, without weights, as losses were written before there were any."""

    def workspace(self, outputs: int) -> Any:
        return {"loss": ((1,), None), "dz": ((-1, outputs), None)}

    def check(self, Y: Any, rows: int, outputs: int) -> None:
        pass

    def check_values(self, Y: Any, outputs: int) -> None:
        pass

    def run(self, z: Any, Y: Any, c: Any) -> None:
        c.work["loss"][...] = abs(z - Y).mean()
        c.work["dz"][...] = np.sign(z - Y) / z.size

    def predict(self, z: Any) -> Any:
        return z

    def truth(self, Y: Any, outputs: int) -> Any:
        return Y


class Weighted(Absolute):
    takes_weights = True

    def run(self, z: Any, Y: Any, c: Any) -> None:
        weights = np.ones((len(z), 1)) if c.weights is None else c.weights[:, None]
        c.work["loss"][...] = (weights * abs(z - Y)).mean()
        c.work["dz"][...] = weights * np.sign(z - Y) / z.size


@gb.score_loss
def absolute(z, y):
    return np.abs(z - y)


class Softer(gb.SoftmaxCrossEntropy):
    def run(self, z: Any, Y: Any, c: Any) -> None:
        c.ops.softmax_cross_entropy(z, Y, c.gradient, c.work)


def test_a_users_loss_takes_weights_or_refuses_them(rng: np.random.Generator) -> None:
    X, Y, w = rng.normal(size=(9, 3)), rng.normal(size=(9, 2)), rng.uniform(0, 2, 9)
    plain, weighted, formula = (
        gb.mlp([3, 2], loss=loss, dtype="float64", backend="cpu", seed=1) for loss in (Absolute(), Weighted(), absolute)
    )
    for net in (weighted, formula):
        net.parameters.flat[...] = plain.parameters.flat  # first weights depend on the loss
    right = (w * abs(plain.scores(X) - Y).mean(axis=1)).sum() / w.sum()
    assert plain.loss(X, Y) == pytest.approx(abs(plain.scores(X) - Y).mean(), rel=1e-14)
    for net in (weighted, formula):
        loss, grads = net.loss_and_grad(X, Y, weight=w)
        assert loss == pytest.approx(right, rel=1e-13)
        assert net.loss_and_grad(X, Y, 2, w)[0] == pytest.approx(right, rel=1e-13)
        assert gb.gradient_check(lambda _, n=net: n.loss(X, Y, weight=w), net.parameters.flat, grads.flat).ok
    message = r"{} takes no weights: its run\(z, Y, c\) must multiply .* takes_weights = True"
    for call in (plain.loss_and_grad, plain.step_loss, plain.loss, plain.evaluate):
        with pytest.raises(gb.ArgumentError, match=message.format("Absolute")):
            call(X, Y, weight=w)
    softer = gb.mlp([3, 2], loss=Softer(), dtype="float64", backend="cpu")
    with pytest.raises(gb.ArgumentError, match=message.format("Softer")):
        softer.loss_and_grad(X, np.zeros(9, int), weight=w)
    with pytest.raises(gb.ArgumentError, match=r"Softer.* has ignore_label, but takes no weights"):
        gb.mlp([3, 2], loss=Softer(ignore_label=-1), backend="cpu")


# --- loaders ---------------------------------------------------------------------------------------------------------

N = 301


def numbered(draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Samples, labels and weights, all of which tell the number of the sample."""
    X = np.arange(N, dtype=np.float32)[:, None] * np.ones((1, 3), np.float32)
    return X, np.arange(N) % 7, np.arange(N) / 8  # exact in float32


LOADERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "in order": {"shuffle": False, "batch_size": 64, "drop_last": True},
    "drawn": {"replacement": True, "seed": 3},
    "columns": {"sample_axis": 1},
    "the second rank": {"rank": 1, "world_size": 3},
    "a window": {"window": 40, "source": True},
    "prepared": {"prepare": lambda x, y: (x + 0, y), "augment": lambda x, draw: x + 0},
    "half": {"dtype": "float16"},
    "through pinned memory": {"feed": "host"},
    "no feature but one": {"sample_axis": 1, "feed": "host"},
}


@pytest.mark.parametrize("case", LOADERS)
def test_weights_go_with_their_samples(case: str, backend: Backend, tmp_path: Path, rng: np.random.Generator) -> None:
    options = dict(LOADERS[case])
    X, Y, weight = numbered(rng)
    given: Any = X.T if options.get("sample_axis") else X
    if options.pop("source", False):
        np.save(tmp_path / "X.npy", X)
        given = gb.sources.npy(tmp_path / "X.npy")
    loader = gb.Loader(given, Y, **{"batch_size": 32, **options}, backend=backend, weight=weight, class_weight={2: 3.0})
    for x, y, w in loader:
        numbers = backend.to_numpy(x[0] if loader.sample_axis else x[:, 0]).astype(int)
        np.testing.assert_array_equal(backend.to_numpy(y), numbers % 7)
        np.testing.assert_array_equal(backend.to_numpy(w), numbers / 8 * np.where(numbers % 7 == 2, 3, 1))
        assert w.dtype == np.float32


def test_balanced_weights_are_scikit_learns(backend: Backend, rng: np.random.Generator) -> None:
    utils = peer("sklearn.utils.class_weight")
    X, Y = np.zeros((200, 1)), rng.choice([0, 1, 4], 200, p=[0.7, 0.1, 0.2])
    right = utils.compute_sample_weight("balanced", Y)
    one = gb.Loader(X, backend.asarray(Y), 200, shuffle=False, backend=backend, class_weight="balanced")
    np.testing.assert_allclose(backend.to_numpy(next(iter(one))[2]), right, rtol=1e-15)
    mapping = {0: 0.5, 4: 2.0}
    two = gb.Loader(X, Y, 200, shuffle=False, backend=backend, class_weight=mapping)
    np.testing.assert_array_equal(backend.to_numpy(next(iter(two))[2]), [mapping.get(y, 1) for y in Y])
    table = np.array([0.5, 1, 9, 9, 2])
    three = gb.Loader(X, Y.astype(np.uint8), 200, shuffle=False, backend=backend, class_weight=table)
    np.testing.assert_array_equal(backend.to_numpy(next(iter(three))[2]), table[Y])


class Told:
    """A source of samples with their labels, or of labels alone, that counts how often each sample was read."""

    def __init__(self, *arrays: np.ndarray) -> None:
        self.arrays, self.times = arrays, np.zeros(len(arrays[0]), int)

    def __len__(self) -> int:
        return len(self.arrays[0])

    def read(self, indices: np.ndarray) -> Any:
        np.add.at(self.times, indices, 1)
        found = tuple(array[indices] for array in self.arrays)
        return found if len(found) > 1 else found[0]


@pytest.mark.parametrize("together", [False, True], ids=["labels alone", "X and labels"])
@pytest.mark.parametrize("class_weight", ["balanced", {2: 3.0}], ids=repr)
def test_labels_of_a_source_are_read_once_for_their_weights(
    class_weight: Any, together: bool, backend: Backend, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    monkeypatch.setattr(weights, "READ_BYTES", 400)
    X, Y, w = numbered(rng)
    source = Told(X, Y) if together else Told(Y)
    given = (source,) if together else (X, source)
    options: dict[str, Any] = {"batch_size": 32, "backend": backend, "weight": w, "class_weight": class_weight}
    loader = gb.Loader(*given, **options)
    assert set(source.times[1:]) == {1}  # the first is also read to see what a sample is
    for (x, y, weight), (x_right, y_right, right) in zip(loader, gb.Loader(X, Y, **options), strict=True):
        for found, expected in ((x, x_right), (y, y_right), (weight, right)):
            np.testing.assert_array_equal(backend.to_numpy(found), backend.to_numpy(expected))
    with pytest.raises(gb.DTypeError, match=r"class_weight needs integer labels .*, Y \(Told\) has shape .*float64"):
        gb.Loader(X, Told(w), **options)


REFUSED: dict[str, tuple[dict[str, Any], Any, str]] = {
    "negative": ({"weight": [1.0, -1, 1]}, gb.ArgumentError, r"weight must hold finite .* got weight\[1\] = -1"),
    "NaN": ({"weight": [1.0, 1, math.nan]}, gb.ArgumentError, r"weight\[2\] = nan"),
    "all 0": ({"weight": [0.0, 0, 0]}, gb.ArgumentError, "weight must be above 0 for some of the samples"),
    "none by class": (
        {"weight": [1, 0, 0], "class_weight": {0: 0}},
        gb.ArgumentError,
        "weight times class_weight must be above 0",
    ),
    "too small for float32": ({"weight": [1e-60] * 3}, gb.ArgumentError, "must be above 0 for some"),
    "too large for float32": ({"weight": [1, 1, 1e60]}, gb.ArgumentError, r"weight\[2\] = inf"),
    "shape": ({"weight": [1.0, 2]}, gb.ShapeError, r"weight must have shape \(3,\).*got \(2,\)"),
    "text": ({"class_weight": "even"}, gb.ArgumentError, "class_weight.* 'balanced', got 'even'"),
    "an unknown label": ({"class_weight": {5: 1.0}}, gb.ArgumentError, "the label 5, which Y does not have"),
    "a negative class": ({"class_weight": {1: -1.0}}, gb.GpubatchError, r"class_weight\[1\] must be"),
    "few classes": ({"class_weight": [1, 2]}, gb.ShapeError, r"labels 0 to 2, got an array of shape \(2,\)"),
    "an object": ({"class_weight": object()}, gb.DTypeError, "class_weight must be 'balanced', a mapping"),
    "floating labels": ({"Y": np.ones(3), "class_weight": "balanced"}, gb.DTypeError, "needs integer labels"),
    "no labels": ({"Y": None, "weight": [1, 1, 1]}, gb.ArgumentError, "weight needs Y"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_weights_of_loaders_are_named(case: str) -> None:
    options, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        gb.Loader(np.zeros((3, 1), np.float32), **{"Y": np.array([0, 1, 2]), "backend": "cpu", **options})


# --- runs ------------------------------------------------------------------------------------------------------------


def run(
    folder: Path | None = None,
    epochs: int = 3,
    backend: Any = "cpu",
    weight: Any = "given",
    loader: Any = (),
    **options: Any,
) -> tuple[gb.Network, gb.History]:
    draw = np.random.default_rng(5)
    X, Y, w = draw.normal(size=(150, 5)).astype("f4"), draw.integers(-1, CLASSES, 150), draw.uniform(0, 2, 150)
    mixed = "dtype" in dict(loader)
    loss, precision = gb.SoftmaxCrossEntropy(ignore_label=-1), "mixed" if mixed else "full"
    net = gb.mlp([5, 8, CLASSES], loss=loss, dropout=0.2, backend=backend, precision=precision)
    weight = w if isinstance(weight, str) else weight
    batches = gb.Loader(X, Y, 32, backend=backend, weight=weight, **{"class_weight": "balanced", **dict(loader)})
    opt = gb.Adam(net.parameters, 0.01, master_weights=mixed)
    return net, gb.fit(net, batches, opt, epochs, (X, Y, w), checkpoint=folder, progress=False, **options)


def test_fit_is_the_loop_by_hand(rng: np.random.Generator) -> None:
    X, Y, w = rng.normal(size=(90, 5)), rng.integers(0, CLASSES, 90), rng.uniform(0, 2, 90)
    found = []
    for by_hand in (True, False):
        net = gb.mlp([5, 8, CLASSES], dtype="float64", backend="cpu")
        loader = gb.Loader(X, Y, 32, backend="cpu", weight=w, class_weight="balanced")
        opt = gb.Adam(net.parameters, 0.01)
        if by_hand:
            for _ in range(2):
                for x, y, weight in loader:
                    net.loss_and_grad(x, y, weight=weight)
                    opt.step()
        else:
            gb.fit(net, loader, opt, 2, progress=False)
        found.append(net.parameters.flat.copy())
    np.testing.assert_array_equal(*found)


def test_a_loader_of_float64_takes_the_dtype_of_the_network(rng: np.random.Generator) -> None:
    loader = gb.Loader(rng.normal(size=(300, 5)), rng.integers(0, 2, 300), 2, backend="cpu", class_weight={1: 2.0})
    assert next(iter(loader))[2].dtype == np.float64
    net = gb.mlp([5, 2], backend="cpu")
    gb.fit(net, loader, gb.SGD(net.parameters, 0.1), 1, progress=False)
    assert {array.dtype.name for array in next(iter(loader))} == {"float32", "int64"}


def test_weights_are_repeated_samples_in_fit(rng: np.random.Generator) -> None:
    X, Y, times = rng.normal(size=(40, 5)), rng.integers(0, CLASSES, 40), rng.integers(0, 4, 40)
    found = []
    for x, y, more in ((X, Y, {"weight": times}), (np.repeat(X, times, 0), np.repeat(Y, times), {})):
        net = gb.mlp([5, 8, CLASSES], dtype="float64", backend="cpu")
        loader = gb.Loader(x, y, len(x), backend="cpu", **more)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("warnings.warn", lambda *_, **__: None)  # a run of few steps is warned about
            gb.fit(net, loader, gb.SGD(net.parameters, 0.1), 5, (x, y, *more.values()), progress=False)
        found.append(net.parameters.flat.copy())
    np.testing.assert_allclose(*found, rtol=1e-10)


def test_steps_are_scikit_learns_with_sample_weight(rng: np.random.Generator) -> None:
    """Three steps of gradient descent on all samples, from the same first weights."""
    neural = peer("sklearn.neural_network")
    X, Y, w = rng.normal(size=(60, 5)), rng.integers(0, 3, 60), rng.uniform(0.1, 2, 60)
    theirs = neural.MLPClassifier((8,), solver="sgd", alpha=0, learning_rate_init=0.5, momentum=0, batch_size=60)
    theirs.partial_fit(X, Y, classes=[0, 1, 2])
    net = gb.mlp([5, 8, 3], dtype="float64", backend="cpu")
    for i, (W, b) in enumerate(zip(theirs.coefs_, theirs.intercepts_, strict=True)):
        net.parameters[f"W{i + 1}"], net.parameters[f"b{i + 1}"] = W, b
    opt = gb.SGD(net.parameters, 0.5)
    for _ in range(3):
        theirs.partial_fit(X, Y, sample_weight=w)
        net.loss_and_grad(X, Y, weight=w)
        opt.step()
    for i, (W, b) in enumerate(zip(theirs.coefs_, theirs.intercepts_, strict=True)):
        np.testing.assert_allclose(net.parameters[f"W{i + 1}"], W, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(net.parameters[f"b{i + 1}"], b, rtol=1e-9, atol=1e-12)


def test_validation_is_weighted() -> None:
    net, history = run()
    draw = np.random.default_rng(5)
    X, Y, w = draw.normal(size=(150, 5)).astype("f4"), draw.integers(-1, CLASSES, 150), draw.uniform(0, 2, 150)
    kept = Y >= 0
    scores = net.scores(X).astype(np.float64)
    each = np.log(np.exp(scores).sum(axis=1)) - scores[np.arange(150), Y]
    of_class = 150 / np.bincount(Y[kept])  # but for a factor
    both = w * of_class[Y]
    assert history.validation_loss[-1] == pytest.approx((both * each)[kept].sum() / both[kept].sum(), rel=1e-5)
    right = net.predict(X) == Y
    assert history.validation_accuracy[-1] == pytest.approx((w * right)[kept].sum() / w[kept].sum(), rel=1e-6)


FORMS = ["a Loader", "a fraction", "a source"]


@pytest.mark.parametrize("form", FORMS)
def test_validation_is_weighted_in_every_form(form: str, tmp_path: Path, rng: np.random.Generator) -> None:
    """Several batches of validation are what net.evaluate gives at once: of a fraction, of the samples held out."""
    X, Y, w = rng.normal(size=(4000, 5)), rng.integers(0, CLASSES, 4000), rng.uniform(0, 2, 4000)
    w[:1500] = 0  # a whole batch of validation has no mean
    net = gb.mlp([5, 8, CLASSES], dtype="float64", backend="cpu")
    loader = gb.Loader(X, Y, 64, backend="cpu", weight=w, class_weight=[1, 2, 3, 4])
    of_class, validation, given = np.array([1.0, 2, 3, 4])[Y], None, w
    if form == "a Loader":
        validation = gb.Loader(X, Y, 64, backend="cpu", weight=w, class_weight=[1, 2, 3, 4])
    elif form == "a source":
        np.save(tmp_path / "X.npy", X)
        validation, given = (gb.sources.npy(tmp_path / "X.npy"), Y), np.ones(4000)
    else:
        validation = 0.5
    seen: list[np.ndarray] = []  # of the samples that a run trains on

    def look(state: gb.TrainingState) -> None:
        seen.append(np.concatenate([x[:, 0] for x, _, _ in copy.copy(state.loader)]))

    history = gb.fit(net, loader, gb.SGD(net.parameters, 0.0), 1, validation, [look], progress=False)
    rows = ~np.isin(X[:, 0], seen[0]) if form == "a fraction" else np.ones(4000, bool)
    assert rows.sum() == (2000 if form == "a fraction" else 4000)
    right = net.evaluate(X[rows], Y[rows], 1024, given[rows], (given * of_class)[rows])
    found = history.validation_loss[-1], history.validation_accuracy[-1]
    assert found == pytest.approx(right, rel=1e-12)


def test_validation_weights_are_checked_before_the_first_step() -> None:
    net = gb.mlp([2, 3], backend="cpu")
    X, Y = np.zeros((6, 2), np.float32), np.array([0, 0, 0, 1, 1, 1])
    loader = gb.Loader(X, Y, 2, backend="cpu", class_weight="balanced")
    opt = gb.SGD(net.parameters, 0.1)
    for validation, message in (
        ((X, Y, -np.ones(6)), r"^validation.*got validation\[2\]\[0\] = -1"),
        ((X, Y, np.ones(5)), r"^validation.* shape \(6,\)"),
        ((X, np.full(6, 2)), r"^validation.* has the label 2, for which class_weight has no weight"),
    ):
        with pytest.raises(gb.GpubatchError, match=message):
            gb.fit(net, loader, opt, 1, validation, progress=False)
    plain = gb.mlp([2, 2], loss=Absolute(), backend="cpu")
    with pytest.raises(gb.ArgumentError, match="loader has weights, which the loss of net, Absolute, does not take"):
        gb.fit(plain, loader, gb.SGD(plain.parameters, 0.1), 1, progress=False)


def test_a_resumed_run_has_the_same_bits_and_refuses_other_weights(tmp_path: Path) -> None:
    whole, _ = run(epochs=4)
    run(tmp_path, epochs=2)
    resumed, _ = run(tmp_path, epochs=4, resume=True)
    np.testing.assert_array_equal(resumed.parameters.flat, whole.parameters.flat)
    for changed in (
        {"weight": np.linspace(0, 1, 150)},
        {"weight": None},
        {"loader": {"class_weight": {0: 2.0}}},
        {"loader": {"class_weight": None}},
    ):
        with pytest.raises(gb.ArgumentError, match="it is of a loader with other weights of samples or classes"):
            run(tmp_path, epochs=6, resume=True, **changed)
    with pytest.raises(gb.ArgumentError, match=r"with other weights .*, this one has none"):
        run(tmp_path, epochs=6, resume=True, weight=None, loader={"class_weight": None})


def test_a_batch_of_nothing_is_left_out_and_told() -> None:
    weight = np.ones(150)
    weight[:32] = 0
    with pytest.warns(gb.SkippedStepWarning, match="all its weights are 0, or all its labels are ignored.*left out"):
        net, history = run(weight=weight, loader={"shuffle": False})
    assert history.skipped == 3
    assert np.isfinite(net.parameters.flat).all()
    message = re.escape("all its weights are 0")
    with pytest.warns(gb.SkippedStepWarning), pytest.raises(gb.NonFiniteError, match=message):
        run(weight=np.arange(150) == 149, loader={"shuffle": False}, max_skipped=2)


# --- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("loader", [{}, {"feed": "host"}, {"class_weight": None}, {"dtype": "float16"}], ids=repr)
def test_captured_steps_are_eager_bit_for_bit(loader: dict[str, Any], backend: Backend) -> None:
    if backend.name == "cpu":
        return
    eager, _ = run(backend=backend, execution="eager", loader=loader)
    captured, history = run(backend=backend, execution="captured", loader=loader)
    assert history.execution == "captured"
    np.testing.assert_array_equal(captured.parameters.flat.get(), eager.parameters.flat.get())
    on_cpu, _ = run(loader={name: x for name, x in loader.items() if name != "feed"})
    np.testing.assert_allclose(
        captured.parameters.flat.get(), on_cpu.parameters.flat, rtol=1e-3, atol=5e-3 if "dtype" in loader else 1e-4
    )


OF_LABELS = [
    *(getattr(losses, name).bind() for name in nn.OF_LABELS),
    gb.SoftmaxCrossEntropy(label_smoothing=0.1),
    gb.SVM(delta=0.5),
    gb.CrammerSinger(delta=0.5),
    gb.SoftmaxFocal(alpha=[1, 2, 3, 4]),
]


@pytest.mark.gpu
@pytest.mark.parametrize("loss", OF_LABELS, ids=repr)
def test_a_label_out_of_range_makes_the_loss_nan(loss: gb.Loss, backend: Backend, rng: np.random.Generator) -> None:
    """On a GPU nobody waits for the values of labels: neither a step by hand nor a captured one goes on in silence."""
    if backend.name == "cpu":
        return
    X, Y = backend.asarray(rng.normal(size=(20, 5)), "float32"), backend.asarray(rng.integers(0, CLASSES, 20))
    net = gb.mlp([5, 8, CLASSES], loss=loss, backend=backend)
    step = gb.CapturedStep(net, gb.SGD(net.parameters, 0.1), X, Y)
    assert math.isfinite(step().item())
    assert math.isfinite(net.step_loss(X, Y).item())
    for bad in (-1, CLASSES):
        Y[7] = bad
        assert math.isnan(net.step_loss(X, Y).item())
        assert math.isnan(step().item())
        with pytest.raises(gb.ArgumentError, match=f"labels from 0 to {CLASSES - 1}, got {bad}"):
            net.loss_and_grad(X, Y)


@pytest.mark.gpu
@pytest.mark.parametrize("weight", ["float32", "float64", "uint8"])
def test_a_captured_step_takes_weights(weight: str, backend: Backend, rng: np.random.Generator) -> None:
    if backend.name == "cpu":
        return
    X, Y = backend.asarray(rng.normal(size=(20, 5)), "float32"), backend.asarray(rng.integers(-1, CLASSES, 20))
    w = backend.asarray((10 * rng.uniform(0, 2, 20)).astype(weight))
    found = []
    for captured in (False, True):
        net = gb.mlp([5, 8, CLASSES], loss=gb.SVM(ignore_label=-1), backend=backend)
        opt = gb.SGD(net.parameters, 0.1)
        step = gb.CapturedStep(net, opt, X, Y, weight=w) if captured else None
        for _ in range(3):
            loss = net.step_loss(X, Y, w) if step is None else step()
            if step is None:
                opt.step()
        found.append((loss.item(), net.parameters.flat.get()))
    assert found[0][0] == found[1][0]
    np.testing.assert_array_equal(found[0][1], found[1][1])
