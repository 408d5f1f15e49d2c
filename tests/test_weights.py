"""Weights of samples and ignored labels: against PyTorch, scikit-learn, and batches in which samples are repeated."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from needs import peer

import gpubatch as gb
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
