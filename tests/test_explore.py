"""Gradient checks, searches, slices and sweeps, against closed forms and against one evaluation after the other."""

from __future__ import annotations

import dataclasses
import inspect
import math
import re

import numpy as np
import pytest
from families import every
from hypothesis import given, settings, strategies as st
from test_network import stacks

from gpubatch import explore
from gpubatch.backend import Array, Backend
from gpubatch.errors import ArgumentError, DTypeError, NonFiniteError, ShapeError
from gpubatch.explore import (
    batch_size_sweep,
    check_network,
    gradient_check,
    learning_rate_range_test,
    loss_slice,
    numerical_gradient,
    optimizer_sweep,
    principal_directions,
    random_local_search,
    random_search,
    step_size_sweep,
)
from gpubatch.explore.sweeps import RangeTest, _range_test
from gpubatch.nn import LOSSES, OF_LABELS, Context, Dense, Layer, Needs, Network, Parameter, ReLU, Tanh, core_of, mlp
from gpubatch.optim import SGD, Adam

# Functions of an array with their gradients by hand.
SMOOTH = {
    "squares": (lambda x: (x**2).sum(), lambda x: 2 * x),
    "log of sum of exp": (lambda x: np.log(np.exp(x).sum()), lambda x: np.exp(x) / np.exp(x).sum()),
    "sum of sines": (lambda x: np.sin(3 * x).sum(), lambda x: 3 * np.cos(3 * x)),
    "product": (lambda x: np.cos(x).prod(), lambda x: -np.tan(x) * np.cos(x).prod()),
}
SHAPES = st.lists(st.integers(1, 4), max_size=3).map(tuple)


def points(shape: tuple[int, ...], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, shape)


def task(net: Network, n: int = 40, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """X and Y for a network and its loss; Y depends on X."""
    draw = np.random.default_rng(seed)
    X = draw.standard_normal((n, net.inputs))
    scores = X @ np.random.default_rng(1).standard_normal((net.inputs, net.outputs))
    Y = scores.argmax(axis=1) if net.loss_name in OF_LABELS else (scores > 0).astype(net.dtype)
    return net.backend.asarray(X, net.dtype), net.backend.asarray(Y)


def everything(net: Network) -> list[np.ndarray]:
    arrays = [net.backend.to_numpy(views.flat).copy() for views in (net.parameters, net.buffers)]
    return [*arrays, np.array(core_of(net).dropout_step)]


# --- numerical gradients -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SMOOTH)
@settings(max_examples=25, deadline=None)
@given(shape=SHAPES, seed=st.integers(0, 99))
def test_differences_are_the_derivative(name: str, shape: tuple[int, ...], seed: int) -> None:
    f, derivative = SMOOTH[name]
    x = points(shape, seed)
    np.testing.assert_allclose(numerical_gradient(f, x), derivative(x), rtol=0, atol=1e-8)
    np.testing.assert_allclose(numerical_gradient(f, x, method="forward"), derivative(x), rtol=0, atol=3e-4)


def test_central_is_exact_for_a_parabola_and_forward_is_off_by_h() -> None:
    x = np.array([1.0, -2.0])
    assert numerical_gradient(lambda x: (x**2).sum(), x, h=0.5).tolist() == [2.0, -4.0]
    assert numerical_gradient(lambda x: (x**2).sum(), x, h=0.5, method="forward").tolist() == [2.5, -3.5]


@pytest.mark.parametrize("method", ["central", "forward"])
def test_many_points_at_a_time_give_the_same(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = points((3, 5), 0)
    one = numerical_gradient(lambda x: np.sin(x).prod() + (x**3).sum(), x, method=method)
    calls = []

    def f(stack: np.ndarray) -> np.ndarray:
        calls.append(len(stack))
        return np.sin(stack).prod(axis=(1, 2)) + (stack**3).sum(axis=(1, 2))

    x.flags.writeable = False
    monkeypatch.setattr(explore.gradients, "STACK_BYTES", 4 * x.nbytes)
    np.testing.assert_allclose(numerical_gradient(f, x, method=method, vectorized=True), one, rtol=1e-9, atol=1e-9)
    assert max(calls) == 4


def test_dtype_shape_and_device_are_those_of_x(backend: Backend, dtype: np.dtype) -> None:
    x = backend.asarray(points((2, 3), 0), dtype)
    gradient = numerical_gradient(lambda x: (x**2).sum(), x)
    assert backend.owns(gradient)
    assert (gradient.shape, gradient.dtype) == (x.shape, dtype)
    np.testing.assert_allclose(backend.to_numpy(gradient), 2 * backend.to_numpy(x), atol=1e-4)
    assert gradient_check(lambda x: (x**2).sum(), x, 2 * x).ok


@pytest.mark.parametrize("wrap", [float, np.float32, np.asarray, lambda v: np.reshape(v, (1, 1))])
def test_every_kind_of_scalar_will_do(wrap: object) -> None:
    x = np.array([1.0, 2.0])
    np.testing.assert_allclose(numerical_gradient(lambda x: wrap(3 * x.sum()), x, h=0.25), [3, 3])  # type: ignore[operator]


def test_a_view_is_moved_in_place_and_comes_back() -> None:
    """As with a network's parameters: f reads the array of the view."""
    whole = points((4, 6), 1)
    before = whole.copy()
    part = whole[1:3, ::2]
    np.testing.assert_allclose(numerical_gradient(lambda _: (whole**2).sum(), part), 2 * part, atol=1e-8)
    assert (whole == before).all()


@pytest.mark.parametrize("call", [numerical_gradient, lambda f, x: gradient_check(f, x, x)])
@pytest.mark.parametrize("failing", [1, 2, 3, 6])
def test_x_comes_back_when_f_raises(call: object, failing: int) -> None:
    x = np.array([0.1, 0.2, 0.3])
    calls = 0

    def f(x: np.ndarray) -> float:
        nonlocal calls
        calls += 1
        if calls == failing:
            raise RuntimeError("stop")
        return float((x**2).sum() / 2)

    with pytest.raises(RuntimeError):
        call(f, x)  # type: ignore[operator]
    assert x.tolist() == [0.1, 0.2, 0.3]


X2 = np.ones(2)
GRADIENT_ERRORS = {
    "f no callable": (lambda: numerical_gradient(3, X2), DTypeError, "f must be callable, got 3"),
    "f gives an array": (lambda: numerical_gradient(lambda x: x, X2), DTypeError, r"one real number, got a NumPy.*2,"),
    "f gives None": (lambda: numerical_gradient(lambda x: None, X2), DTypeError, "f must return one real .* None"),
    "f gives bool": (lambda: numerical_gradient(lambda x: True, X2), DTypeError, "f must return one real number"),
    "f complex": (lambda: numerical_gradient(lambda x: 1j, X2), DTypeError, "f must return one real number, got 1j"),
    "f gives NaN": (lambda: numerical_gradient(lambda x: math.nan, X2), NonFiniteError, r"f is nan at x with x\[0\]"),
    "x integer": (lambda: numerical_gradient(np.sum, np.arange(3)), DTypeError, "x must be float32 or float64, got .*"),
    "x a list": (lambda: numerical_gradient(np.sum, [1.0]), DTypeError, "expected a NumPy or CuPy array, got a list"),
    "x read-only": (lambda: numerical_gradient(np.sum, np.broadcast_to(1.0, 3)), ArgumentError, "x is read-only"),
    "h zero": (lambda: numerical_gradient(np.sum, X2, h=0), ArgumentError, r"h must be finite and in \(0, inf\)"),
    "h negative": (lambda: numerical_gradient(np.sum, X2, h=-1e-5), ArgumentError, "h must be finite and in"),
    "h lost": (
        lambda: numerical_gradient(np.sum, np.array([1.0, 1e6], np.float32), h=1e-5),
        ArgumentError,
        r"h=1e-05 is lost in x\[1\] = 1e\+06 of float32: take a larger h",
    ),
    "method": (lambda: numerical_gradient(np.sum, X2, method="centre"), ArgumentError, "did you mean 'central'"),
    "stack": (lambda: numerical_gradient(np.sum, X2, vectorized=True), ShapeError, r"f must return shape \(2,\)"),
    "grad shape": (lambda: gradient_check(np.sum, X2, np.ones(3)), ShapeError, r"shape of x, \(2,\), got \(3,\)"),
    "grad integer": (lambda: gradient_check(np.sum, X2, np.arange(2)), DTypeError, "grad must hold floating-point"),
    "grad NaN": (lambda: gradient_check(np.sum, X2, np.array([0, np.nan])), NonFiniteError, r"grad\[1\] is nan"),
    "tolerance": (lambda: gradient_check(np.sum, X2, X2, tolerance=0), ArgumentError, "tolerance must be finite"),
    "directions": (lambda: gradient_check(np.sum, X2, X2, directions=-1), ArgumentError, "directions must be an integ"),
    "elements": (lambda: gradient_check(np.sum, X2, X2, elements=0), ArgumentError, "elements must be an integer >= 1"),
}


@pytest.mark.parametrize("name", GRADIENT_ERRORS)
def test_gradient_errors(name: str) -> None:
    call, error, message = GRADIENT_ERRORS[name]
    with pytest.raises(error, match=message):
        call()


# --- gradient check ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SMOOTH)
@pytest.mark.parametrize("how", [{}, {"directions": 4}, {"elements": 5}])
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 99))
def test_right_gradients_pass_and_wrong_ones_do_not(name: str, how: dict[str, int], seed: int) -> None:
    f, derivative = SMOOTH[name]
    x = points((3, 4), seed)
    right = gradient_check(f, x, derivative(x), seed=seed, **how)
    assert right.ok
    assert right.kinks == ()
    assert right.compared == next(iter(how.values()), 12)
    wrong = gradient_check(f, x, derivative(x) * (1 + 1e-5), seed=seed, floor=0, **how)
    assert not wrong.ok
    assert wrong.kinks == ()


def test_the_worst_element_is_named() -> None:
    x = points((3, 4), 0) + 2
    grad = 2 * x
    grad[2, 1] *= 1.01
    found = gradient_check(lambda x: (x**2).sum(), x, grad)
    assert found.worst_index == (2, 1)
    assert not found.ok
    assert found.max_relative_error == pytest.approx(0.01 / 1.01, rel=1e-5)
    assert found.analytic == grad[2, 1]
    assert found.numerical == pytest.approx(2 * x[2, 1])
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.ok = True  # type: ignore[misc]


def test_directions_cost_two_evaluations_each_whatever_the_size() -> None:
    calls = 0

    def f(x: np.ndarray) -> float:
        nonlocal calls
        calls += 1
        return float(x @ x)

    x = points((1000,), 0)
    assert gradient_check(f, x, 2 * x, directions=3).ok
    assert calls == 1 + 2 * 3


def test_a_function_that_bends_within_h_is_not_wrong() -> None:
    """With raw pixels a softmax bends within 1e-5 of a weight, so the difference itself is off by 1e-5."""
    x = np.array([0.3, 1.1])
    f, grad = (lambda x: np.sin(400 * x).sum()), 400 * np.cos(400 * x)
    assert abs(numerical_gradient(f, x) / grad - 1).max() > 1e-6
    assert gradient_check(f, x, grad).ok
    assert not gradient_check(f, x, grad * (1 + 1e-6)).ok


@pytest.mark.parametrize("bend", [0.0, -40.0, 40.0])
@pytest.mark.parametrize("distance", [0.0, 0.05, 0.0909, 0.2, 0.5, 0.9])
@pytest.mark.parametrize("side", [-1, 1])
def test_kinks_are_told_from_errors(bend: float, distance: float, side: int) -> None:
    """A jump of the slope by 2, at a part of h from x, on a function that bends or does not."""
    at = side * distance * 1e-5
    x = np.array([0.0, 0.7])

    def f(x: np.ndarray) -> float:
        return float(np.abs(x[0] - at) + bend * x[0] ** 2 + 3 * x[0] + x[1] ** 2)

    slopes = [3.0 - side] if distance else [2.0, 3.0, 4.0]
    for slope in slopes:
        found = gradient_check(f, x, np.array([slope, 1.4]))
        assert found.ok
        if slope == 3.0:  # the central difference itself
            assert found.compared == 2
            continue
        assert [kink.index for kink in found.kinks] == [(0,)]
        assert found.kinks[0].left == pytest.approx(2.0, abs=2 if side < 0 else 1e-2)
        assert found.compared == 1
    for slope in (1.9, 4.1):
        wrong = gradient_check(f, x, np.array([slope, 1.4]))
        assert not wrong.ok
        assert wrong.worst_index == (0,)


@every("loss", [*LOSSES], ["softmax_cross_entropy", "sigmoid_cross_entropy", "mse", "svm"])
@pytest.mark.parametrize("name", stacks(1, 1))
def test_every_layer_and_loss_passes(name: str, loss: str, backend: Backend) -> None:
    net = Network(stacks(6, 3)[name], loss, l2=0.1, backend=backend, dtype="float64")
    X, Y = task(net, 12)
    before = everything(net)
    found = check_network(net, X, Y)
    assert list(found) == list(net.parameters)
    assert all(check.ok for check in found.values())
    assert sum(check.compared for check in found.values()) >= 0.9 * net.parameters.size
    assert all(check.ok for check in check_network(net, X, Y, directions=3).values())
    assert all((a == b).all() for a, b in zip(everything(net), before, strict=True))


def test_a_wrong_layer_is_found() -> None:
    class Careless(ReLU):
        def backward(self, x: Array, y: Array, dy: Array, dx: Array, c: Context) -> None:
            dx[...] = dy

    net = Network([Dense(6, 7), Careless(), Dense(7, 3)], dtype="float64", backend="cpu")
    found = check_network(net, *task(net), directions=2)
    assert [name for name, check in found.items() if not check.ok] == ["W1", "b1"]


def test_networks_in_float32_are_checked_by_directions() -> None:
    net = mlp([6, 8, 3], "tanh", backend="cpu")
    assert all(check.ok for check in check_network(net, *task(net), directions=3).values())


@pytest.mark.parametrize(("loss", "about"), [("svm", 9.0), ("softmax_cross_entropy", 2.302)])
def test_the_example_of_cs231n(loss: str, about: float) -> None:
    """W of 10 x 3073, small random weights, centred pixels from 0 to 255 and the bias trick."""
    draw = np.random.default_rng(0)
    pixels = draw.normal(128, 10, (40, 3072)).clip(0, 255)
    X = np.hstack([pixels - pixels.mean(axis=0), np.ones((40, 1))])
    Y = draw.integers(0, 10, 40)
    net = Network([Dense(3073, 10, bias=False, init=1e-4)], loss, dtype="float64", backend="cpu")
    assert net.loss(X, Y) == pytest.approx(about, rel=0.01)
    found = check_network(net, X, Y, elements=300)["W1"]
    assert found.max_relative_error <= 1e-7
    assert found.compared > 200
    assert len(found.kinks) < 30


# --- searches ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("search", [random_search, random_local_search])
def test_searches_keep_the_best_and_follow_the_seed(search: object, backend: Backend) -> None:
    def run(seed: int) -> tuple[Network, explore.SearchResult]:
        net = mlp([5, 3], backend=backend, dtype="float64")
        return net, search(net, *task(net), trials=60, scale=0.5, seed=seed)  # type: ignore[operator]

    net, found = run(4)
    X, Y = task(net)
    assert found.loss == net.loss(X, Y) == found.history[-1] == min(found.history)
    assert found.accuracy == net.accuracy(X, Y)
    assert len(found.history) == 60
    assert list(found.history) == sorted(found.history, reverse=True)
    assert len(set(found.history)) > 3
    again, same = run(4)
    assert same == found
    assert (backend.to_numpy(again.parameters.flat) == backend.to_numpy(net.parameters.flat)).all()
    assert run(5)[1].loss != found.loss


def test_random_search_draws_from_a_normal_distribution() -> None:
    net = mlp([5, 3], backend="cpu", dtype="float64")
    random_search(net, *task(net), trials=1, scale=0.5, seed=3)
    drawn = np.random.default_rng(3).standard_normal(18) * 0.5
    assert (net.parameters.flat == drawn).all()


def test_local_search_never_leaves_a_minimum() -> None:
    net = Network([Dense(2, 1)], "mse", backend="cpu", dtype="float64")
    X = np.random.default_rng(0).standard_normal((20, 2))
    Y = X @ net.parameters["W1"] + net.parameters["b1"]
    before = everything(net)
    found = random_local_search(net, X, Y, trials=20)
    assert found == explore.SearchResult(0.0, None, (0.0,) * 20)
    assert (everything(net)[0] == before[0]).all()


def test_a_search_that_is_interrupted_leaves_the_best_so_far() -> None:
    net = mlp([5, 3], backend="cpu")
    X, Y = task(net)
    losses = []

    def stop(done: int, total: int) -> None:
        losses.append(net.loss(X, Y))
        if done == 30:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        random_search(net, X, Y, scale=1.0, progress=stop)
    assert net.loss(X, Y) == min(losses[1:])


# --- slices --------------------------------------------------------------------------------------------------------


def one_by_one(net: Network, X: np.ndarray, Y: np.ndarray, found: explore.LossSlice) -> np.ndarray:
    """The same losses, of a network moved to one point after the other."""
    w = net.parameters.flat.copy()
    losses = np.empty(found.losses.shape)
    for index in np.ndindex(losses.shape):
        steps = (found.a[index[0]], *(() if found.b is None else (found.b[index[1]],)))
        offset = sum(step * d for step, d in zip(steps, found.directions, strict=True))
        net.parameters.flat[...] = w + net.backend.asarray(offset, net.dtype)
        losses[index] = net.loss(X, Y)
    net.parameters.flat[...] = w
    return losses


@every("loss", [*LOSSES], ["softmax_cross_entropy", "sigmoid_cross_entropy", "mse", "svm"])
@pytest.mark.parametrize("name", stacks(1, 1))
def test_slices_are_the_losses_of_a_moved_network(
    name: str, loss: str, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With blocks of rows and points that do not divide evenly."""
    monkeypatch.setattr(explore.slices, "SLICE_ROWS", {"cpu": 7, "cuda": 7})
    monkeypatch.setattr(explore.slices, "SLICE_ELEMENTS", {"cpu": 7 * 8 * 4, "cuda": 7 * 8 * 4})
    net = Network(stacks(6, 3)[name], loss, l2=0.3, backend=backend, dtype="float64")
    X, Y = task(net, 17)
    net.loss_and_grad(X, Y)  # moves running statistics off 0 and 1
    for b in (None, [-0.5, 0.0, 2.0]):
        before = everything(net)
        found = loss_slice(net, X, Y, np.linspace(-1, 1, 5), b, seed=4)
        assert all((p == q).all() for p, q in zip(everything(net), before, strict=True))
        assert found.losses.shape == ((5,) if b is None else (5, 3))
        np.testing.assert_allclose(found.losses, one_by_one(net, X, Y, found), rtol=1e-10)
    assert found.losses[2, 1] == pytest.approx(net.loss(X, Y), rel=1e-12)


class Squared(Layer):
    """A layer of a user that is not linear in its parameter: x s²."""

    def takes(self) -> None:
        pass

    def needs(self, features: int) -> Needs:
        return Needs(features, {"s": Parameter((features,), lambda draw, shape: draw.uniform(1, 2, shape), l2=True)})

    def forward(self, x: Array, y: Array, c: Context) -> None:
        c.xp.multiply(x, c.p["s"] ** 2, out=y)

    def backward(self, x: Array, y: Array, dy: Array, dx: Array | None, c: Context) -> None:
        raise NotImplementedError


@pytest.mark.parametrize("layers", [[Squared(), Dense(6, 3)], [Dense(6, 5), Tanh(), Squared(), Dense(5, 3)]])
def test_slices_with_own_layers_and_one_hot_targets(layers: list[Layer]) -> None:
    net = Network(layers, l2=0.1, dtype="float64", backend="cpu")
    X, Y = task(net)
    hot = np.eye(3)[Y]
    found = loss_slice(net, X, hot, [0.0, 0.5], [0.0, 1.5])
    np.testing.assert_allclose(found.losses, one_by_one(net, X, hot, found), rtol=1e-12)


def test_an_svm_without_a_hidden_layer_is_piecewise_linear() -> None:
    """As the notes draw it: between its kinks a slice of the SVM loss has no curvature."""
    net = Network([Dense(4, 3)], "svm", dtype="float64", backend="cpu")
    X, Y = task(net, 5)
    found = loss_slice(net, X, Y, np.linspace(-1, 1, 2001))
    bends = np.abs(np.diff(found.losses, 2)) > 1e-9
    assert 1 <= bends.sum() <= 2 * 5 * 2  # at most two points for each of the margins


def test_directions_may_be_given(backend: Backend) -> None:
    net = mlp([6, 4, 3], backend=backend, dtype="float64")
    X, Y = task(net)
    _, grads = net.loss_and_grad(X, Y)
    flat = backend.to_numpy(grads.flat).copy()
    by_flat = loss_slice(net, X, Y, [-1e-4, 0.0, 1e-4], directions=grads.flat.copy())
    by_name = loss_slice(net, X, Y, [-1e-4, 0.0, 1e-4], directions=dict(grads.items()))
    assert (by_flat.losses == by_name.losses).all()
    assert (by_name.directions[0] == flat).all()
    assert by_flat.losses[0] < by_flat.losses[1] < by_flat.losses[2]
    slope = (by_flat.losses[2] - by_flat.losses[0]) / 2e-4
    assert slope == pytest.approx(flat @ flat, rel=1e-2)


def test_filters_are_normalised_unit_by_unit() -> None:
    net = mlp([6, 4, 3], backend="cpu", dtype="float64")
    found = loss_slice(net, *task(net), [0.0], normalize="filter")
    direction = found.directions[0]
    w1 = direction[:24].reshape(6, 4)
    np.testing.assert_allclose(np.linalg.norm(w1, axis=0), np.linalg.norm(net.parameters["W1"], axis=0))
    assert not np.allclose(w1, net.parameters["W1"])
    assert (direction[24:28] == 0).all()  # the biases


def test_a_path_lies_in_its_principal_directions() -> None:
    draw = np.random.default_rng(0)
    basis = draw.standard_normal((2, 30))
    path = draw.standard_normal((9, 2)) @ basis + draw.standard_normal(30)
    directions = principal_directions(path)
    found = explore.LossSlice(np.zeros(1), np.zeros(1), np.zeros((1, 1)), tuple(directions))
    at = found.project(path, path[-1])
    np.testing.assert_allclose(at @ np.stack(directions) + path[-1], path)
    assert np.abs(at).max(axis=0) == pytest.approx([1, 1])
    assert directions[0] @ directions[1] == pytest.approx(0, abs=1e-9)
    with pytest.raises(ShapeError, match=r"path must be \(more than 2 points, parameters\), got shape \(2, 30\)"):
        principal_directions(path[:2])


def test_overflow_is_infinite_and_says_nothing() -> None:
    net = mlp([6, 4, 3], backend="cpu")
    found = loss_slice(net, *task(net), [0.0, 1e38])
    assert np.isfinite(found.losses[0])
    assert found.losses[1] == np.inf


def test_parameters_stay_when_a_slice_or_a_sweep_is_interrupted() -> None:
    net = mlp([6, 4, 3], batch_norm=True, dropout=0.1, backend="cpu")
    X, Y = task(net)
    before = everything(net)

    def stop(done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    calls = [
        lambda: loss_slice(net, X, Y, progress=stop),
        lambda: batch_size_sweep(net, X, Y, [10, 20], epochs=1, progress=stop),
        lambda: optimizer_sweep(net, X, Y, rates=[0.1], epochs=1, batch_size=20, progress=stop),
        lambda: learning_rate_range_test(net, X, Y, batch_size=20, progress=stop),
    ]
    for call in calls:
        with pytest.raises(KeyboardInterrupt):
            call()
        assert all((a == b).all() for a, b in zip(everything(net), before, strict=True))


# --- sweeps --------------------------------------------------------------------------------------------------------


def test_one_step_of_every_size(backend: Backend) -> None:
    """On a parabola a step of size s multiplies the loss by (1 - s)²."""
    net = Network([Dense(1, 1, bias=False, init=1.0)], "mse", backend=backend, dtype="float64")
    X, Y = (backend.asarray(v) for v in (np.full((4, 1), math.sqrt(0.5)), np.zeros(4)))
    before = everything(net)
    found = step_size_sweep(net, X, Y, [1e-3, 0.5, 1.0, 4.0])
    ratios = [loss / found.start for loss in found.losses]
    np.testing.assert_allclose(ratios, [(1 - 1e-3) ** 2, 0.25, 0, 9], atol=1e-12)
    assert found.best == 1.0
    assert found.reason.endswith(f"; one of 4 raises it to {found.losses[3]:.4g}")
    assert all((a == b).all() for a, b in zip(everything(net), before, strict=True))


def test_the_usual_steps_fall_and_then_explode() -> None:
    net = mlp([6, 8, 3], dropout=0.5, batch_norm=True, backend="cpu", dtype="float64")
    X, Y = task(net)
    before = everything(net)
    found = step_size_sweep(net, 100 * X, Y)
    assert found.step_sizes == tuple(float(f"1e{k}") for k in range(-10, 0))
    assert found.start == net.loss(100 * X, Y, training=True)
    assert all(loss < found.start for loss in found.losses[:5])
    assert all((a == b).all() for a, b in zip(everything(net), before, strict=True))
    linear = Network([Dense(6, 3, init=0.1)], "svm", backend="cpu")
    steep = step_size_sweep(linear, 1000 * X.astype("float32"), Y, [1e-9, 1e-7, 1.0])
    assert steep.losses[1] < steep.losses[0] < steep.start < steep.losses[2]
    assert step_size_sweep(linear, 1000 * X.astype("float32"), Y, [1e30]).best is None


def test_the_range_test_suggests_a_rate_that_trains() -> None:
    net = mlp([6, 16, 3], backend="cpu", dtype="float64")
    X, Y = task(net, 600)
    before = everything(net)
    found = learning_rate_range_test(net, X, Y, high=1e3, batch_size=50)
    assert all((a == b).all() for a, b in zip(everything(net), before, strict=True))
    assert len(found.rates) == len(found.losses) == len(found.smoothed) < 200
    assert found.suggestion is not None
    assert f"at {found.rates[int(np.argmin(found.smoothed))]:.2g}" in found.reason
    trained = optimizer_sweep(net, X, Y, {"sgd": SGD}, [found.suggestion, 1e3], epochs=5, batch_size=50)[0]
    assert trained.best_lr == found.suggestion
    assert trained.accuracy is not None
    assert trained.accuracy > 0.9
    never = learning_rate_range_test(net, X, Y, low=1e20, high=1e21, batch_size=50)
    assert never.suggestion is None
    assert "take a lower range" in never.reason


def test_a_check_is_printed_in_words() -> None:
    x = np.array([1.0, 2.0])
    wrong = gradient_check(lambda x: (x**2).sum(), x, np.array([2.0, 4.1]))
    assert re.fullmatch(
        r"wrong at \(1,\): 4.1, numerically 4; relative error 0.024, tolerance 1e-07, 2 compared", str(wrong)
    )
    assert str(gradient_check(lambda x: (x**2).sum(), x, 2 * x)).startswith("right, worst at (")
    kink = gradient_check(lambda x: abs(x).sum(), np.zeros(1), np.ones(1))
    assert str(kink) == "nothing was compared, 1 at kinks"


def range_test_of(found: np.ndarray, beta: float = 0.9) -> RangeTest:
    return _range_test(np.geomspace(1e-5, 10, len(found)).tolist(), found.tolist(), beta, len(found))


def test_noise_alone_suggests_no_rate() -> None:
    """A smoothed cost has a lowest value even where it does not fall: of 400 runs of pure noise hardly one passes."""
    noise = np.random.default_rng(0).normal(1, 0.1, size=(400, 200))
    results = [range_test_of(found) for found in noise]
    assert sum(result.suggestion is not None for result in results) <= 4
    assert "the network may be trained already" in results[0].reason
    assert all(
        range_test_of(found[:n], beta).suggestion is None for found in noise[:9] for n in (2, 9) for beta in (0, 0.9)
    )


@pytest.mark.parametrize("seed", range(5))
def test_a_fall_that_exceeds_the_noise_suggests_a_rate(seed: int) -> None:
    """The cost falls by 1 between steps 100 and 150, and then explodes: the average is lowest about step 150."""
    steps = np.arange(200)
    cost = 2 - np.clip((steps - 100) / 50, 0, 1) + 0.05 * np.maximum(steps - 150, 0)
    found = cost + np.random.default_rng(seed).normal(0, 0.1, 200)
    result = range_test_of(found)
    assert result.suggestion is not None
    assert 148 <= int(np.argmin(result.smoothed)) <= 156
    lowest = result.rates[int(np.argmin(result.smoothed))]
    assert result.suggestion == pytest.approx(lowest / 10, rel=0.05)
    # Where noise is as large as the fall, there is none; without noise, the smallest fall counts.
    assert range_test_of(cost + np.random.default_rng(seed).normal(0, 1, 200)).suggestion is None
    assert (
        range_test_of(2 - 1e-3 * np.clip((steps - 100) / 50, 0, 1) + np.maximum(steps - 150, 0)).suggestion is not None
    )


def test_a_network_that_is_trained_gets_no_rate() -> None:
    net = mlp([6, 16, 3], backend="cpu", dtype="float64")
    X, Y = task(net, 600)
    Y = np.where(np.random.default_rng(0).uniform(size=600) < 0.2, 0, Y)  # what cannot be learned
    optimizer_sweep(net, X, Y, {"adam": Adam}, [0.01], epochs=1)
    fresh = [learning_rate_range_test(net, X, Y, batch_size=50, seed=seed) for seed in range(4)]
    assert all(result.suggestion is not None for result in fresh)
    opt = Adam(net.parameters, 0.02)
    for _ in range(200):
        net.loss_and_grad(X, Y)
        opt.step()
    trained = [learning_rate_range_test(net, X, Y, batch_size=50, seed=seed) for seed in range(4)]
    assert [result.suggestion for result in trained] == [None] * 4


def test_batch_sizes_are_timed_until_the_target() -> None:
    net = mlp([6, 16, 3], backend="cpu")
    X, Y = task(net, 600)
    before = everything(net)
    found = batch_size_sweep(net, X, Y, [20, 50, 600], target=0.5, lr=lambda n: 1e-3 * math.sqrt(n), epochs=30)
    assert [trial.batch_size for trial in found] == [20, 50, 600]
    assert all((a == b).all() for a, b in zip(everything(net), before, strict=True))
    for trial in found[:2]:
        assert trial.loss is not None
        assert trial.loss <= 0.5
        assert trial.epochs_to_target is not None
        assert trial.seconds_to_target is not None
        assert trial.seconds_to_target > 0
        assert trial.seconds_per_sample == pytest.approx(trial.seconds_per_epoch / 600)
    assert found[2].epochs_to_target is None or found[2].epochs_to_target > found[0].epochs_to_target
    assert [trial.memory for trial in found] == [
        net.memory(n) + Adam(net.parameters, 0.1).memory() for n in (20, 50, 600)
    ]
    assert [trial.batch_size for trial in batch_size_sweep(net, X, Y, epochs=1)] == [
        *(16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
    ]
    assert batch_size_sweep(net, X, Y, [50], optimizer=SGD, lr=1e30, epochs=1)[0].loss is None


def test_optimizers_get_their_own_rate_of_one_grid() -> None:
    net = mlp([6, 16, 3], backend="cpu")
    X, Y = task(net, 600)
    before = everything(net)
    found = optimizer_sweep(net, X, Y, batch_size=50)
    assert [trial.name for trial in found] == ["sgd", "momentum", "rmsprop", "adam"]
    assert all((a == b).all() for a, b in zip(everything(net), before, strict=True))
    for trial in found:
        assert trial.losses[trial.rates.index(trial.best_lr)] == trial.loss == min(trial.losses)
        assert trial.at_edge is (trial.best_lr in (1e-4, 10.0))
        assert trial.history.step_lr == [trial.best_lr] * 24
    assert found[3].best_lr < found[0].best_lr  # Adam's steps have the size of lr itself


def sweep_error_cases() -> dict[str, tuple[object, type[Exception], str]]:
    net = mlp([6, 4, 3], backend="cpu", dtype="float64")
    X, Y = task(net)
    size = net.parameters.size
    shapes = {name: np.zeros(shape) for name, shape in net.parameters.shapes.items()}
    return {
        "no net": (lambda: random_search("net", X, Y), DTypeError, "net must be a gpubatch.Network, got str"),
        "trials": (lambda: random_search(net, X, Y, 0), ArgumentError, "trials must be an integer >= 1, got 0"),
        "scale": (lambda: random_search(net, X, Y, scale=0), ArgumentError, r"scale must be finite and in \(0, inf\)"),
        "all overflow": (lambda: random_search(net, X, Y, 3, 1e308), NonFiniteError, "no trial of 3 had a finite loss"),
        "X": (lambda: random_search(net, X[:, :5], Y), ShapeError, "X has 5 features"),
        "steps empty": (lambda: step_size_sweep(net, X, Y, []), ShapeError, "step_sizes must be .* at least one"),
        "steps negative": (lambda: step_size_sweep(net, X, Y, [1, -1]), ArgumentError, "step_sizes .* above 0, got -1"),
        "steps NaN": (lambda: step_size_sweep(net, X, Y, [math.nan]), ArgumentError, "step_sizes must hold finite"),
        "steps words": (lambda: step_size_sweep(net, X, Y, ["a"]), DTypeError, "step_sizes must hold real numbers"),
        "a empty": (lambda: loss_slice(net, X, Y, []), ShapeError, r"a must be a sequence .*got shape \(0,\)"),
        "b square": (
            lambda: loss_slice(net, X, Y, [0], [[0]]),
            ShapeError,
            r"b must be a sequence .*got shape \(1, 1\)",
        ),
        "normalize": (lambda: loss_slice(net, X, Y, normalize="f"), ArgumentError, "normalize must be one of 'none'"),
        "directions": (
            lambda: loss_slice(net, X, Y, [0], [0], directions=[shapes]),
            ArgumentError,
            "directions must fit the slice: a and b need two directions, got 1",
        ),
        "direction length": (
            lambda: loss_slice(net, X, Y, directions=np.zeros(size - 1)),
            ShapeError,
            rf"directions\[0\] must have shape \({size},\), all parameters, got \({size - 1},\)",
        ),
        "direction shape": (
            lambda: loss_slice(net, X, Y, directions={**shapes, "W1": np.zeros((4, 6))}),
            ShapeError,
            r"directions\[0\]\['W1'\] has shape \(4, 6\), the parameter has \(6, 4\)",
        ),
        "direction names": (
            lambda: loss_slice(net, X, Y, directions={"W1": shapes["W1"]}),
            ArgumentError,
            r"directions\[0\] must have W1, b1, W2, b2; got W1",
        ),
        "direction words": (lambda: loss_slice(net, X, Y, directions=np.full(size, "a")), DTypeError, "real numbers"),
        "direction NaN": (lambda: loss_slice(net, X, Y, directions=np.full(size, math.nan)), ArgumentError, "finite"),
        "batch 0": (
            lambda: batch_size_sweep(net, X, Y, [0]),
            ArgumentError,
            "sizes must be an integer between 1 and 40",
        ),
        "batch none": (lambda: batch_size_sweep(net, X, Y, []), ArgumentError, "sizes must hold at least one"),
        "batch large": (lambda: batch_size_sweep(net, X, Y, [41]), ArgumentError, "between 1 and 40, got 41"),
        "target": (lambda: batch_size_sweep(net, X, Y, [4], target=-1), ArgumentError, "target must be finite"),
        "rates": (lambda: optimizer_sweep(net, X, Y, rates=[0.0]), ArgumentError, "rates must hold numbers above 0"),
        "optimizers": (lambda: optimizer_sweep(net, X, Y, {}), ArgumentError, "optimizers must hold at least one"),
        "all diverge": (
            lambda: optimizer_sweep(net, X, Y, {"sgd": SGD}, rates=[1e300], batch_size=4),
            NonFiniteError,
            r"sgd diverged at every rate from 1e\+300",
        ),
        "range": (lambda: learning_rate_range_test(net, X, Y, low=1, high=1), ArgumentError, r"high .* in \(1, inf\)"),
        "list": (lambda: loss_slice(net, [1], Y), ShapeError, r"X must have shape \(batch, 6\), got \(1,\)"),
    }


@pytest.mark.parametrize("name", sweep_error_cases())
def test_sweep_errors(name: str) -> None:
    call, error, message = sweep_error_cases()[name]
    with pytest.raises(error, match=message):
        call()  # type: ignore[operator]


def test_every_public_name_is_tested_here() -> None:
    with open(__file__, encoding="utf-8") as file:
        source = file.read()
    functions = [name for name, one in vars(explore).items() if inspect.isfunction(one)]
    assert "loss_slice" in functions
    assert [name for name in functions if f"{name}(" not in source] == []


def test_progress_goes_from_nothing_to_all() -> None:
    net = mlp([6, 4, 3], backend="cpu", dtype="float64")
    X, Y = task(net)
    calls = [
        lambda see: check_network(net, X, Y, directions=1, progress=see),
        lambda see: random_search(net, X, Y, 5, progress=see),
        lambda see: loss_slice(net, X, Y, progress=see),
        lambda see: batch_size_sweep(net, X, Y, [20, 40], epochs=1, progress=see),
        lambda see: optimizer_sweep(net, X, Y, epochs=1, progress=see),
        lambda see: learning_rate_range_test(net, X, Y, steps=5, progress=see),
    ]
    for call in calls:
        seen: list[tuple[int, int]] = []
        call(lambda done, total, seen=seen: seen.append((done, total)))
        assert seen[0][0] == 0
        assert seen[-1][0] == seen[-1][1] > 0
        assert [done for done, _ in seen] == sorted(done for done, _ in seen)
        assert len({total for _, total in seen}) == 1
