"""Losses against closed forms, published numbers, differences of the loss itself, and PyTorch."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from needs import peer

import gpubatch as gb
from gpubatch.backend import Backend
from gpubatch.errors import ArgumentError, DeviceMismatchError, DTypeError, FormulaError, ShapeError
from gpubatch.nn import losses
from gpubatch.nn.losses import LOSSES, LossFunction, mse, sigmoid_cross_entropy, softmax_cross_entropy, svm


def labels(draw: np.random.Generator, rows: int, outputs: int) -> np.ndarray:
    return draw.integers(0, outputs, rows)


def one_hot(draw: np.random.Generator, rows: int, outputs: int) -> np.ndarray:
    return np.eye(outputs)[draw.integers(0, outputs, rows)]


def probabilities(draw: np.random.Generator, rows: int, outputs: int) -> np.ndarray:
    return draw.dirichlet(np.ones(outputs), rows)


def unit(draw: np.random.Generator, rows: int, outputs: int) -> np.ndarray:
    return draw.random((rows, outputs))


def numbers(draw: np.random.Generator, rows: int, outputs: int) -> np.ndarray:
    return draw.normal(size=(rows, outputs))


def counts(draw: np.random.Generator, rows: int, outputs: int) -> np.ndarray:
    return draw.poisson(2.0, (rows, outputs))


def given_parameters(loss: LossFunction, **parameters: float) -> Any:
    bound = functools.partial(loss, **parameters)
    bound.__name__, bound.parameters = loss.__name__, parameters
    return bound


# Every loss with every form of targets that it takes.
CASES = {
    "softmax_cross_entropy, labels": (softmax_cross_entropy, labels),
    "softmax_cross_entropy, one-hot": (softmax_cross_entropy, one_hot),
    "softmax_cross_entropy, probabilities": (softmax_cross_entropy, probabilities),
    "softmax_cross_entropy, rows of any sum": (softmax_cross_entropy, unit),
    "sigmoid_cross_entropy, soft": (sigmoid_cross_entropy, unit),
    "sigmoid_cross_entropy, hard": (sigmoid_cross_entropy, one_hot),
    "mse": (mse, numbers),
    "svm": (svm, labels),
    "mae": (losses.mae, numbers),
    "huber": (losses.huber, numbers),
    "huber, small delta": (given_parameters(losses.huber, delta=0.3), numbers),
    "log_cosh": (losses.log_cosh, numbers),
    "quantile": (losses.quantile, numbers),
    "quantile, q": (given_parameters(losses.quantile, q=0.9), numbers),
    "poisson": (losses.poisson, counts),
    "focal, hard": (losses.focal, one_hot),
    "focal, soft": (losses.focal, unit),
    "focal, gamma below 1": (given_parameters(losses.focal, gamma=0.5, alpha=0.6), one_hot),
    "focal, no weights": (given_parameters(losses.focal, alpha=-1.0), one_hot),
    "hinge": (losses.hinge, one_hot),
    "squared_hinge": (losses.squared_hinge, one_hot),
    "softmax_cross_entropy, smoothed labels": (given_parameters(softmax_cross_entropy, label_smoothing=0.1), labels),
    "softmax_cross_entropy, smoothed rows": (
        given_parameters(softmax_cross_entropy, label_smoothing=0.3),
        probabilities,
    ),
    "sigmoid_cross_entropy, smoothed": (given_parameters(sigmoid_cross_entropy, label_smoothing=0.1), one_hot),
    "svm, delta": (given_parameters(svm, delta=0.7), labels),
    "crammer_singer": (losses.crammer_singer, labels),
    "crammer_singer, delta": (given_parameters(losses.crammer_singer, delta=0.7), labels),
    "kl_divergence": (losses.kl_divergence, probabilities),
    "kl_divergence, one-hot": (losses.kl_divergence, one_hot),
    "kl_divergence, rows of any sum": (losses.kl_divergence, unit),
    "softmax_focal": (losses.softmax_focal, labels),
    "softmax_focal, alpha": (given_parameters(losses.softmax_focal, alpha=0.25), labels),
    "softmax_focal, gamma below 1": (given_parameters(losses.softmax_focal, gamma=0.5), labels),
    "softmax_focal, gamma 0": (given_parameters(losses.softmax_focal, gamma=0), labels),
}
every_case = pytest.mark.parametrize(("loss", "targets"), CASES.values(), ids=CASES)


def test_the_table_is_complete() -> None:
    assert {loss.__name__ for loss, _ in CASES.values()} == set(LOSSES)
    classes = {c for c in vars(losses).values() if isinstance(c, type) and issubclass(c, losses.Loss)}
    # Those of which others are made are no losses themselves.
    bases = losses.Loss, losses.OfOperation, losses.TwoClasses, losses.OneOfMany, losses.OfMargins, losses.OfSoftmax
    assert {type(loss) for loss in LOSSES.values()} == classes - {*bases}


# --- every loss ------------------------------------------------------------------------------------------------------


@every_case
@pytest.mark.parametrize("shape", [(7, 5), (1, 2), (40, 3)])
def test_gradient_is_the_central_difference(loss, targets, shape, rng) -> None:
    z, y, h = rng.normal(size=shape) * 2, targets(rng, *shape), 1e-5
    numeric = np.empty(shape)
    for place in np.ndindex(shape):
        step = np.zeros(shape)
        step[place] = h
        numeric[place] = (loss(z + step, y)[0] - loss(z - step, y)[0]) / (2 * h)
    gradient = loss(z, y)[1]
    assert np.linalg.norm(gradient - numeric) <= 1e-6 * np.linalg.norm(numeric)


@every_case
def test_the_gradient_has_the_dtype_of_the_scores_and_the_scores_stay(loss, targets, backend, dtype, rng) -> None:
    z, y = backend.asarray(rng.normal(size=(6, 4)), dtype), backend.asarray(targets(rng, 6, 4))
    before = z.copy()
    value, gradient = loss(z, y)
    assert type(value) is float
    assert (gradient.dtype, gradient.shape, type(gradient)) == (dtype, z.shape, type(z))
    assert bool((z == before).all())


@pytest.mark.parametrize(
    ("loss", "targets"), [c for name, c in CASES.items() if name != "poisson"], ids=[c for c in CASES if c != "poisson"]
)
@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_extreme_scores_stay_finite(loss, targets, scale, dtype, rng) -> None:
    z = (rng.choice([-1.0, 1.0], size=(8, 5)) * scale).astype(dtype)
    value, gradient = loss(z, targets(rng, 8, 5))
    assert math.isfinite(value)
    assert value >= 0
    assert np.isfinite(gradient).all()


@every_case
def test_the_loss_is_a_mean_over_the_batch(loss, targets, rng) -> None:
    z, y = rng.normal(size=(4, 3)), targets(rng, 4, 3)
    once, twice = loss(z, y), loss(np.tile(z, (2, 1)), np.concatenate([y, y]))
    np.testing.assert_allclose(twice[0], once[0], rtol=1e-14)
    np.testing.assert_allclose(twice[1], np.tile(once[1], (2, 1)) / 2, rtol=1e-12, atol=1e-17)


def of_pytorch(name: str) -> Any:
    """PyTorch's loss, or what its documentation, torchvision's or a paper says in PyTorch's operations."""
    torch = peer("torch")
    F = torch.nn.functional

    def focal(z: Any, y: Any, gamma: float = 2.0, alpha: float = 0.25) -> Any:  # torchvision's sigmoid_focal_loss
        p = torch.sigmoid(z)
        entropy = F.binary_cross_entropy_with_logits(z, y, reduction="none")
        loss = entropy * (1 - (p * y + (1 - p) * (1 - y))) ** gamma
        return (loss if alpha < 0 else (alpha * y + (1 - alpha) * (1 - y)) * loss).mean()

    def margins(z: Any, y: Any) -> Any:  # as Keras' hinge: labels -1 and 1
        return torch.clamp(1 - torch.where(y == 0, -1, 1) * z, min=0)

    def largest_margin(z: Any, y: Any, delta: float = 1.0) -> Any:
        rows = torch.arange(len(z))
        others = torch.where(F.one_hot(y, z.shape[1]) == 1, -math.inf, z)
        return torch.clamp(others.amax(1) - z[rows, y] + delta, min=0).mean()

    def softmax_focal(z: Any, y: Any, gamma: float = 2.0, alpha: float = 1.0) -> Any:
        right = F.softmax(z, 1).log()[torch.arange(len(z)), y]
        return (-alpha * (-torch.expm1(right)) ** gamma * right).mean()

    theirs: dict[str, Any] = {
        "softmax_cross_entropy": F.cross_entropy,
        # Keras' BinaryCrossentropy(label_smoothing=): "squeezes labels towards 0.5".
        "sigmoid_cross_entropy": lambda z, y, label_smoothing=0.0: F.binary_cross_entropy_with_logits(
            z, y * (1 - label_smoothing) + 0.5 * label_smoothing
        ),
        "mse": F.mse_loss,
        # PyTorch divides by the number of classes too.
        "svm": lambda z, y, delta=1.0: F.multi_margin_loss(z, y, margin=delta) * z.shape[1],
        "crammer_singer": largest_margin,
        "kl_divergence": lambda z, y: F.kl_div(F.log_softmax(z, 1), y, reduction="batchmean"),
        "softmax_focal": softmax_focal,
        "mae": F.l1_loss,
        "huber": F.huber_loss,
        "log_cosh": lambda z, y: torch.log(torch.cosh(z - y)).mean(),
        "quantile": lambda z, y, q=0.5: torch.maximum(q * (y - z), (q - 1) * (y - z)).mean(),
        "poisson": F.poisson_nll_loss,
        "focal": focal,
        "hinge": lambda z, y: margins(z, y).mean(),
        "squared_hinge": lambda z, y: (margins(z, y) ** 2).mean(),
    }
    return theirs[name]


@every_case
@pytest.mark.parametrize("shape", [(16, 10), (3, 2)])
def test_agrees_with_pytorch(loss, targets, shape, rng) -> None:
    theirs = of_pytorch(loss.__name__)
    torch = peer("torch")
    z, y = rng.normal(size=shape) * 3, targets(rng, *shape)
    zt = torch.tensor(z, requires_grad=True)
    expected = theirs(zt, torch.tensor(y), **getattr(loss, "parameters", {}))
    expected.backward()
    value, gradient = loss(z, y)
    np.testing.assert_allclose(value, expected.item(), rtol=1e-12)
    np.testing.assert_allclose(gradient, zt.grad.numpy(), rtol=1e-12, atol=1e-16)


@pytest.mark.exhaustive
def test_agrees_with_optax(rng) -> None:
    jax, optax = peer("jax"), peer("optax")
    z, y, hard = rng.normal(size=(9, 4)) * 3, rng.normal(size=(9, 4)), (rng.random((9, 4)) > 0.5) * 1.0
    theirs = {
        losses.huber: (optax.huber_loss, y),
        losses.log_cosh: (optax.log_cosh, y),
        losses.hinge: (lambda z, y: optax.hinge_loss(z, 2 * y - 1), hard),
        given_parameters(losses.focal, alpha=-1.0): (optax.sigmoid_focal_loss, hard),
        losses.focal: (functools.partial(optax.sigmoid_focal_loss, alpha=0.25), hard),
    }
    with jax.enable_x64(True):
        for loss, (function, targets) in theirs.items():
            of = jax.value_and_grad(lambda z, targets=targets, function=function: function(z, targets).mean())
            expected, slope = of(jax.numpy.asarray(z))
            value, gradient = loss(z, targets)
            np.testing.assert_allclose(value, float(expected), rtol=1e-12)
            np.testing.assert_allclose(gradient, np.asarray(slope), rtol=1e-12, atol=1e-16)


@pytest.mark.exhaustive
def test_agrees_with_scikit_learn(rng) -> None:
    metrics = peer("sklearn.metrics")
    z, y = rng.normal(size=30), rng.normal(size=30)
    assert losses.quantile(z[:, None], y, q=0.2)[0] == pytest.approx(metrics.mean_pinball_loss(y, z, alpha=0.2), 1e-12)
    assert losses.mae(z[:, None], y)[0] == pytest.approx(metrics.mean_absolute_error(y, z), 1e-12)
    assert losses.hinge(z[:, None], y > 0)[0] == pytest.approx(metrics.hinge_loss(y > 0, z), 1e-12)
    scores, classes = rng.normal(size=(30, 4)), np.arange(30) % 4
    largest = losses.crammer_singer(scores, classes)[0]
    assert largest == pytest.approx(metrics.hinge_loss(classes, scores), 1e-12)
    deviance = 2 * (losses.poisson(z[:, None], np.exp(y))[0] - losses.poisson(y[:, None], np.exp(y))[0])
    assert deviance == pytest.approx(metrics.mean_poisson_deviance(np.exp(y), np.exp(z)), 1e-12)


# --- known numbers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 3, 10, 1000])
def test_softmax_of_equal_scores_is_log_of_the_number_of_classes(classes, dtype, tolerance) -> None:
    z, y = np.full((5, classes), 3.0, dtype), np.arange(5) % classes
    value, gradient = softmax_cross_entropy(z, y)
    assert value == pytest.approx(math.log(classes), rel=tolerance["rtol"])
    np.testing.assert_allclose(gradient, (1 / classes - np.eye(classes)[y]) / 5, **tolerance)


def test_numbers_of_cs231n(rng) -> None:
    # The course's notebooks: small random W on images with the bias trick; "loss should be something close to
    # -log(0.1) = 2.302" for the softmax, and 9, one for each wrong class, for the SVM.
    W, X, y = rng.normal(size=(3073, 10)) * 1e-4, rng.uniform(-128, 128, (500, 3073)), rng.integers(0, 10, 500)
    assert softmax_cross_entropy(X @ (W / 10), y)[0] == pytest.approx(2.302, abs=0.02)
    assert svm(X @ (W / 10), y)[0] == pytest.approx(9, abs=0.05)


def test_svm_example_of_cs231n() -> None:
    # Lecture 3: cat, car and frog images with scores of (cat, car, frog); losses 2.9, 0 and 12.9, mean 5.27.
    z, y = np.array([[3.2, 5.1, -1.7], [1.3, 4.9, 2.0], [2.2, 2.5, -3.1]]), np.array([0, 1, 2])
    assert [svm(z[i : i + 1], y[i : i + 1])[0] for i in range(3)] == pytest.approx([2.9, 0, 12.9])
    value, gradient = svm(z, y)
    assert value == pytest.approx(15.8 / 3)
    np.testing.assert_allclose(gradient, np.array([[-1, 1, 0], [0, 0, 0], [1, 1, -2]]) / 3)


def test_softmax_example_of_cs231n() -> None:
    # Lecture 3: scores (3.2, 5.1, -1.7) of a cat give probability 0.13 and loss 2.04 (printed there as 0.89, base 10).
    value, gradient = softmax_cross_entropy(np.array([[3.2, 5.1, -1.7]]), np.array([0]))
    assert value == pytest.approx(2.04, abs=0.005)
    assert gradient[0, 0] == pytest.approx(0.13 - 1, abs=0.005)


def test_sigmoid_at_zero_and_far_out() -> None:
    value, gradient = sigmoid_cross_entropy(np.zeros((3, 1)), np.array([0, 1, 1]))
    assert value == pytest.approx(math.log(2))
    np.testing.assert_allclose(gradient[:, 0], np.array([0.5, -0.5, -0.5]) / 3)
    value, gradient = sigmoid_cross_entropy(np.array([[1e4], [-1e4]]), np.array([[0], [1]]))
    assert value == 1e4
    np.testing.assert_array_equal(gradient, [[0.5], [-0.5]])
    # σ(-40) is e^-40 to full precision, which 1 - 1/(1 + e^-40) would lose.
    gradient = sigmoid_cross_entropy(np.array([[-40.0]]), np.array([[0]]))[1]
    assert gradient[0, 0] == pytest.approx(math.exp(-40), rel=1e-12)


def test_mse_is_the_mean_over_elements() -> None:
    value, gradient = mse(np.array([[1.0, 2.0], [3.0, 4.0]]), np.array([[1, 0], [0, 0]]))
    assert value == (0 + 4 + 9 + 16) / 4
    np.testing.assert_array_equal(gradient, [[0, 1], [1.5, 2]])


@settings(deadline=None)
@given(
    rows=st.integers(1, 40),
    outputs=st.integers(2, 12),
    kind=st.sampled_from(["int8", "uint8", "int32", "uint32", "int64", "uint64", ">i4"]),
    seed=st.integers(0, 99),
)
def test_labels_of_any_integer_type_are_their_one_hot_rows(rows, outputs, kind, seed) -> None:
    draw = np.random.default_rng(seed)
    z, y = draw.normal(size=(rows, outputs)), draw.integers(0, outputs, rows)
    value, gradient = softmax_cross_entropy(z, y.astype(kind))
    expected = softmax_cross_entropy(z, np.eye(outputs, dtype=draw.choice(["float32", "int64", "bool"]))[y])
    assert value == pytest.approx(expected[0], rel=1e-12)
    np.testing.assert_allclose(gradient, expected[1], rtol=1e-12, atol=1e-16)


def test_one_output_takes_flat_targets(rng) -> None:
    z, y = rng.normal(size=(5, 1)), rng.integers(0, 2, 5)
    for loss in (sigmoid_cross_entropy, mse):
        flat, column = loss(z, y), loss(z, y[:, None])
        assert flat[0] == column[0]
        np.testing.assert_array_equal(flat[1], column[1])


def test_a_small_log_cosh_has_all_its_digits(dtype) -> None:
    d = np.geomspace(1e-8, 0.02, 50).astype(dtype)
    series = d**2 / 2 - d**4 / 12 + d**6 / 45 - 17 * d**8 / 2520
    for x, expected in zip(d, series, strict=True):
        value, gradient = losses.log_cosh(np.array([[x]]), np.zeros((1, 1)))
        assert value == pytest.approx(expected, rel=8 * float(np.finfo(dtype).eps))
        assert gradient[0, 0] == pytest.approx(math.tanh(x), rel=8 * float(np.finfo(dtype).eps))


def test_slopes_at_the_kinks(dtype) -> None:
    """As PyTorch and Keras: 0 where a difference is 0 or a margin is just kept; huber's two branches meet."""
    z, y = np.array([[0.0, 1.0]], dtype), np.array([[0.0, 1.0]])
    for loss in (losses.mae, losses.quantile):
        np.testing.assert_array_equal(loss(z, y)[1], 0)
    for loss in (losses.hinge, losses.squared_hinge):
        np.testing.assert_array_equal(loss(2 * z - 1, y)[1], 0)
    assert losses.huber(z + 2, y, delta=2.0) == (2.0, pytest.approx(np.array([[1.0, 1.0]])))


def test_poisson_of_extreme_scores(dtype) -> None:
    value, gradient = losses.poisson(np.array([[-1e4, 2.0]], dtype), np.array([[0, 0]]))
    assert value == pytest.approx(math.exp(2) / 2)
    np.testing.assert_allclose(gradient, [[0, math.exp(2) / 2]], rtol=1e-6)
    assert losses.poisson(np.array([[1e4]], dtype), np.array([[1]]))[0] == math.inf  # as it is


def test_the_first_of_equal_scores_has_the_gradient_of_crammer_singer(backend: Backend, dtype) -> None:
    z, y = backend.asarray(np.array([[1, 3, 3, 0], [0, 1, 2, 3]]), dtype), backend.asarray(np.array([0, 3]))
    value, gradient = losses.crammer_singer(z, y)
    assert value == (3 - 1 + 1) / 2
    np.testing.assert_array_equal(backend.to_numpy(gradient), [[-0.5, 0.5, 0, 0], [0, 0, 0, 0]])


def test_the_kullback_leibler_divergence_of_equal_distributions_is_0(backend: Backend, rng) -> None:
    y = np.array([[0.5, 0.25, 0.25], [1, 0, 0]])
    z = np.log(np.where(y > 0, y, 1e-300))
    value, gradient = losses.kl_divergence(backend.asarray(z), backend.asarray(y))
    assert abs(value) < 1e-15
    np.testing.assert_allclose(backend.to_numpy(gradient), 0, atol=1e-15)
    value, _ = losses.kl_divergence(backend.asarray(np.zeros((2, 3))), backend.asarray(y))  # log 3 - H(y)
    assert value == pytest.approx(math.log(3) - 1.5 * math.log(2) / 2, rel=1e-14)


def test_focal_of_two_classes_is_that_of_one_score(backend: Backend, rng) -> None:
    """Softmax of (0, z) is the sigmoid of z."""
    z, y = 3 * rng.normal(size=(20, 1)), rng.integers(0, 2, 20)
    one, slope = losses.focal(backend.asarray(z), backend.asarray(y), gamma=1.5, alpha=0.3)
    both = backend.asarray(np.concatenate([np.zeros((20, 1)), z], axis=1))
    two, slopes = losses.softmax_focal(both, backend.asarray(y), gamma=1.5, alpha=[0.7, 0.3])
    assert two == pytest.approx(one, rel=1e-14)
    np.testing.assert_allclose(backend.to_numpy(slopes)[:, 1:], backend.to_numpy(slope), rtol=1e-12)
    with pytest.raises(ShapeError, match="alpha must have a number for each of 3 classes, got 2"):
        losses.softmax_focal(np.zeros((2, 3)), np.zeros(2, int), alpha=[0.5, 1])


# --- single samples --------------------------------------------------------------------------------------------------


@every_case
def test_losses_of_single_samples(loss, targets, backend, rng) -> None:
    """Each is what the sample alone gives; their sum and its gradient are the mean's, times how many there are."""
    z, y = backend.asarray(rng.normal(size=(6, 4))), backend.asarray(targets(rng, 6, 4))
    weight = backend.asarray(rng.uniform(0.1, 2, 6))
    each, gradient = loss(z, y, reduction="none")
    alone = [loss(z[i : i + 1], y[i : i + 1]) for i in range(6)]
    found = backend.to_numpy(each).reshape(6, -1).mean(axis=1)
    np.testing.assert_allclose(found, [value for value, _ in alone], rtol=1e-12)
    count = each.size // 6
    expected = np.concatenate([backend.to_numpy(slope) for _, slope in alone]) * count
    np.testing.assert_allclose(backend.to_numpy(gradient), expected, rtol=1e-11, atol=1e-15)
    total, of_total = loss(z, y, weight, reduction="sum")
    of_each = backend.to_numpy(each).reshape(6, -1).sum(axis=1)
    assert total == pytest.approx(float((of_each * backend.to_numpy(weight)).sum()), rel=1e-12)
    mean, of_mean = loss(z, y, weight)
    factor = count * float(weight.sum())
    assert mean * factor == pytest.approx(total, rel=1e-12)
    np.testing.assert_allclose(backend.to_numpy(of_total), backend.to_numpy(of_mean) * factor, rtol=1e-12, atol=1e-15)


def test_ignored_labels_of_single_samples(rng) -> None:
    z, y = rng.normal(size=(3, 4)), np.array([2, -1, 0])
    smoothed = given_parameters(softmax_cross_entropy, label_smoothing=0.2)
    for loss in (softmax_cross_entropy, smoothed, svm, losses.crammer_singer, losses.softmax_focal):
        each, gradient = loss(z, y, ignore_label=-1, reduction="none")
        np.testing.assert_allclose(each[[0, 2]], loss(z[[0, 2]], y[[0, 2]], reduction="none")[0], rtol=1e-14)
        np.testing.assert_allclose(gradient[[0, 2]], loss(z[[0, 2]], y[[0, 2]], reduction="sum")[1], rtol=1e-13)
        assert each[1] == 0
        assert not gradient[1].any()


def test_sample_losses_of_a_network(rng) -> None:
    for name, kind in (("softmax_cross_entropy", labels), ("svm", labels), ("huber", numbers)):
        X, Y = rng.normal(size=(2000, 3)), kind(rng, 2000, 4)
        net = gb.mlp([3, 5, 4], loss=name, backend="cpu", dtype="float64")
        found = net.sample_losses(X, Y)
        assert found.shape == (2000,)
        assert found.mean() == pytest.approx(net.loss(X, Y), rel=1e-13)


def test_probabilities(rng) -> None:
    special = peer("scipy.special")
    X = rng.normal(size=(1500, 3)) * 40
    for loss in (
        *("softmax_cross_entropy", "kl_divergence", "softmax_focal"),
        gb.SoftmaxCrossEntropy(label_smoothing=0.1),
    ):
        net = gb.mlp([3, 5, 4], loss=loss, backend="cpu", dtype="float64")
        np.testing.assert_allclose(net.probabilities(X), special.softmax(net.scores(X), axis=1), rtol=1e-12)
    for loss in ("sigmoid_cross_entropy", "focal"):
        for outputs in (1, 2):
            net = gb.mlp([3, 5, outputs], loss=loss, backend="cpu", dtype="float64")
            expected = special.expit(net.scores(X))
            np.testing.assert_allclose(net.probabilities(X), expected[:, 0] if outputs == 1 else expected, rtol=1e-12)
    with pytest.raises(ArgumentError, match="the scores of svm are no probabilities; those of softmax_cross_entropy, "):
        gb.mlp([3, 4], loss="svm", backend="cpu").probabilities(X.astype(np.float32))


# --- as the loss of a network ----------------------------------------------------------------------------------------


def test_a_network_takes_a_name_a_function_and_a_function_with_parameters() -> None:
    for loss, name in (
        ("huber", "huber(delta=1.0)"),
        (losses.huber, "huber(delta=1.0)"),
        (losses.huber.bind(delta=2), "huber(delta=2.0)"),
        (losses.mse, "mse"),
        (losses.svm, "svm"),
        (losses.softmax_cross_entropy, "softmax_cross_entropy"),
    ):
        net = gb.mlp([3, 2], loss=loss, backend="cpu")
        assert (net.loss_name, repr(net.loss_function)) == (name, f"<loss {name}>")


def test_predictions_of_each_loss() -> None:
    """Losses of two classes predict 0 or 1, poisson the rate, those of differences the score."""
    X, Y = np.array([[1.5], [-0.5], [0.0]]), np.array([1, 1, 0])
    for name in sorted({"focal", "hinge", "squared_hinge", "sigmoid_cross_entropy"}):
        net = gb.Network([gb.Dense(1, 1, bias=False, init=1.0)], name, backend="cpu", dtype="float64")
        net.parameters["W1"][...] = 1
        np.testing.assert_array_equal(net.predict(X), [1, 0, 0])
        assert net.accuracy(X, Y) == net.evaluate(X, Y)[1] == pytest.approx(2 / 3)
    for name, expected in {
        "poisson": np.exp(X[:, 0]),
        **dict.fromkeys(("mse", "mae", "huber", "log_cosh", "quantile"), X[:, 0]),
    }.items():
        net = gb.Network([gb.Dense(1, 1, bias=False, init=1.0)], name, backend="cpu", dtype="float64")
        net.parameters["W1"][...] = 1
        np.testing.assert_allclose(net.predict(X), expected, rtol=1e-15)
        assert net.evaluate(X, Y)[1] is None


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "z", "y", "error", "message"),
    [
        (softmax_cross_entropy, (4, 3), np.array([0, 1, 3, 2]), ArgumentError, "labels from 0 to 2, got 3"),
        (svm, (2, 3), np.array([0, -1]), ArgumentError, "labels from 0 to 2, got -1"),
        (softmax_cross_entropy, (4, 3), np.zeros(5, int), ShapeError, "X has 4 rows, Y has 5"),
        (softmax_cross_entropy, (4, 3), np.zeros(4), DTypeError, r"dtype float64; convert it with Y.astype\('int64'\)"),
        (softmax_cross_entropy, (4, 3), np.zeros((4, 1), int), ShapeError, r"labels must be of shape \(batch,\)"),
        (softmax_cross_entropy, (4, 3), np.zeros((4, 2)), ShapeError, r"shape of the scores, \(4, 3\), got \(4, 2\)"),
        (softmax_cross_entropy, (2, 2), np.array([[1, -0.5], [0, 1]]), ArgumentError, "probabilities, got -0.5"),
        (softmax_cross_entropy, (1, 2), np.array([[1, math.nan]]), ArgumentError, "probabilities, got nan"),
        (softmax_cross_entropy, (4, 1), np.zeros(4, int), ShapeError, r"\(batch, at least 2\), got \(4, 1\)"),
        (softmax_cross_entropy, (0, 3), np.zeros(0, int), ShapeError, r"got \(0, 3\)"),
        (
            svm,
            (4, 3),
            np.zeros((4, 3)),
            ShapeError,
            r"svm takes integer labels: Y must have shape \(4,\), got \(4, 3\)",
        ),
        (losses.crammer_singer, (2, 3), np.array([0, 3]), ArgumentError, "labels from 0 to 2, got 3"),
        (losses.softmax_focal, (2, 3), np.array([0, -1]), ArgumentError, "labels from 0 to 2, got -1"),
        (
            losses.kl_divergence,
            (2, 3),
            np.array([0, 1]),
            ShapeError,
            r"got \(2,\); for labels use softmax_cross_entropy",
        ),
        (losses.kl_divergence, (1, 2), np.array([[1, -0.5]]), ArgumentError, "probabilities, got -0.5"),
        (sigmoid_cross_entropy, (2, 1), np.array([0, 2]), ArgumentError, r"Y must be in \[0, 1\] .*, got 2"),
        (sigmoid_cross_entropy, (2, 1), np.array([0, math.nan]), ArgumentError, "got nan"),
        (sigmoid_cross_entropy, (2, 2), np.array([0, 1]), ShapeError, r"shape of the scores, \(2, 2\), got \(2,\)"),
        (
            losses.focal,
            (2, 1),
            np.array([0, 2]),
            ArgumentError,
            r"Y must be in \[0, 1\] for focal\(gamma=2.0, .*, got 2",
        ),
        (losses.hinge, (2, 1), np.array([-1, 1]), ArgumentError, "0 or 1 for hinge, got -1; for labels -1 and 1 give"),
        (losses.squared_hinge, (2, 1), np.array([0.5, 1]), ArgumentError, "0 or 1 for squared_hinge, got 0.5"),
        (losses.hinge, (2, 1), np.array([math.nan, 1]), ArgumentError, "0 or 1 for hinge, got nan"),
        (losses.poisson, (2, 1), np.array([3, -1]), ArgumentError, "Y must be at least 0 for poisson, got -1"),
        (mse, (2, 2), np.zeros((3, 2)), ShapeError, "X has 2 rows, Y has 3"),
        (mse, (2, 2), np.zeros((2, 2), complex), DTypeError, "real numbers, got dtype complex128"),
        (mse, (2, 2), np.zeros((2, 2, 1)), ShapeError, r"\(2, 2\), got \(2, 2, 1\)"),
    ],
)
def test_bad_targets_are_named(loss, z, y, error, message) -> None:
    with pytest.raises(error, match=message):
        loss(np.zeros(z), y)


@pytest.mark.parametrize(
    ("loss", "parameters", "error", "message"),
    [
        (losses.huber, {"delta": 0}, ArgumentError, r"delta of huber must be .* \(0, inf\), got 0"),
        (softmax_cross_entropy, {"label_smoothing": 1}, ArgumentError, r"label_smoothing must be .* \[0, 1\), got 1"),
        (sigmoid_cross_entropy, {"label_smoothing": -0.1}, ArgumentError, r"label_smoothing must be .* \[0, 1\)"),
        (svm, {"delta": 0}, ArgumentError, r"delta must be .* \(0, inf\), got 0"),
        (losses.crammer_singer, {"delta": -1}, ArgumentError, r"delta must be .* \(0, inf\), got -1"),
        (losses.softmax_focal, {"gamma": -1}, ArgumentError, r"gamma must be .* \[0, inf\), got -1"),
        (losses.softmax_focal, {"alpha": -1}, ArgumentError, r"alpha must be .* \[0, inf\), got -1"),
        (losses.softmax_focal, {"alpha": [1, math.nan]}, ArgumentError, r"alpha must hold .*, got alpha\[1\] = nan"),
        (losses.quantile, {"q": 1}, ArgumentError, r"q of quantile must be .* \(0, 1\), got 1"),
        (losses.focal, {"gamma": -1}, ArgumentError, r"gamma of focal must be .* \[0, inf\), got -1"),
        (losses.focal, {"alpha": 2}, ArgumentError, r"alpha of focal must be .*1\], got 2"),
        (losses.huber, {"beta": 1}, FormulaError, r"huber has the parameters delta; missing \[\], unknown \['beta'\]"),
        (losses.huber, {"delta": "1"}, FormulaError, "delta of loss huber must be a finite number, got '1'"),
    ],
)
def test_bad_parameters_are_named(loss, parameters, error, message) -> None:
    with pytest.raises(error, match=message):
        loss.bind(**parameters)


def test_bad_scores_are_named() -> None:
    with pytest.raises(DTypeError, match=r"scores must be float32 or float64, got a NumPy array .* int64"):
        mse(np.zeros((2, 2), int), np.zeros((2, 2)))
    with pytest.raises(ShapeError, match=r"scores must have shape .*got \(2,\)"):
        mse(np.zeros(2), np.zeros(2))
    with pytest.raises(DTypeError, match="expected a NumPy or CuPy array, got a list"):
        mse([[1.0]], np.zeros((1, 1)))


@pytest.mark.gpu
def test_scores_and_targets_of_two_devices(backend: Backend) -> None:
    if backend.name == "cpu":
        return
    with pytest.raises(DeviceMismatchError):
        mse(backend.zeros((2, 2), np.float32), np.zeros((2, 2)))
