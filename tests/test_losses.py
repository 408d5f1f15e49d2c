"""Losses against closed forms, published numbers, differences of the loss itself, and PyTorch."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from needs import peer

from gpubatch.backend import Backend
from gpubatch.errors import ArgumentError, DeviceMismatchError, DTypeError, ShapeError
from gpubatch.nn import losses
from gpubatch.nn.losses import LOSSES, mse, sigmoid_cross_entropy, softmax_cross_entropy, svm


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
}
every_case = pytest.mark.parametrize(("loss", "targets"), CASES.values(), ids=CASES)


def test_the_table_is_complete() -> None:
    assert {loss.__name__ for loss, _ in CASES.values()} == set(LOSSES)
    classes = {c for c in vars(losses).values() if isinstance(c, type) and issubclass(c, losses.Loss)} - {losses.Loss}
    assert {type(loss) for loss in LOSSES.values()} == classes


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


@every_case
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


@every_case
@pytest.mark.parametrize("shape", [(16, 10), (3, 2)])
def test_agrees_with_pytorch(loss, targets, shape, rng) -> None:
    torch = peer("torch")
    F = torch.nn.functional
    theirs = {
        softmax_cross_entropy: F.cross_entropy,
        sigmoid_cross_entropy: F.binary_cross_entropy_with_logits,
        mse: F.mse_loss,
        # PyTorch divides by the number of classes too.
        svm: lambda z, y: F.multi_margin_loss(z, y) * z.shape[1],
    }[loss]
    z, y = rng.normal(size=shape) * 3, targets(rng, *shape)
    zt = torch.tensor(z, requires_grad=True)
    expected = theirs(zt, torch.tensor(y))
    expected.backward()
    value, gradient = loss(z, y)
    np.testing.assert_allclose(value, expected.item(), rtol=1e-12)
    np.testing.assert_allclose(gradient, zt.grad.numpy(), rtol=1e-10, atol=1e-14)


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
        (sigmoid_cross_entropy, (2, 1), np.array([0, 2]), ArgumentError, r"Y must be in \[0, 1\] .*, got 2"),
        (sigmoid_cross_entropy, (2, 1), np.array([0, math.nan]), ArgumentError, "got nan"),
        (sigmoid_cross_entropy, (2, 2), np.array([0, 1]), ShapeError, r"shape of the scores, \(2, 2\), got \(2,\)"),
        (mse, (2, 2), np.zeros((3, 2)), ShapeError, "X has 2 rows, Y has 3"),
        (mse, (2, 2), np.zeros((2, 2), complex), DTypeError, "real numbers, got dtype complex128"),
        (mse, (2, 2), np.zeros((2, 2, 1)), ShapeError, r"\(2, 2\), got \(2, 2, 1\)"),
    ],
)
def test_bad_targets_are_named(loss, z, y, error, message) -> None:
    with pytest.raises(error, match=message):
        loss(np.zeros(z), y)


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
