"""Activations and losses of single scores, written as formulas: their derivatives, and networks that use them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from expressions import programs, value
from families import drawn
from hypothesis import given, settings, strategies as st
from needs import peer

import gpubatch as gb
from gpubatch.backend import Backend
from gpubatch.errors import ArgumentError, DTypeError, FormulaError
from gpubatch.explore import check_network
from gpubatch.formula import Activation, ScoreLoss, activations, scores
from gpubatch.formula.derivative import RULES
from gpubatch.formula.trace import COPY, INDICATOR, OPS
from gpubatch.ops.program import allocate, bound_program

F8 = np.dtype(np.float64)


@gb.activation
def silu(x):
    return x / (1 + np.exp(-x))


@gb.activation
def silu_by_its_other_name(x):
    return x * (1 - 1 / (1 + np.exp(x)))


@gb.activation
def mish(x):
    return x * np.tanh(np.log1p(np.exp(x)))


@gb.activation
def elu(x, *, alpha=1.0):
    return np.where(x > 0, x, alpha * (np.exp(np.minimum(x, 0)) - 1))


@gb.activation
def hard_swish(x):
    return x * np.clip(x + 3, 0, 6) / 6


@gb.activation
def exact_gelu(x):
    return x * gb.normal_cdf(x)


@gb.score_loss
def huber(z, y, *, delta=1.0):
    r = np.abs(z - y)
    return np.where(r < delta, 0.5 * r * r, delta * (r - 0.5 * delta))


@gb.score_loss
def quantile(z, y, *, q):
    return np.maximum(q * (y - z), (q - 1) * (y - z))


@gb.score_loss
def focal(z, y, *, gamma=2.0):
    """Lin et al. 2017 for y of 0 or 1; the log-probability of the truth is -log1p(exp(-s z))."""
    sign = 2 * y - 1
    log_p = np.minimum(sign * z, 0) - np.log1p(np.exp(-np.abs(z)))
    return -((1 - np.exp(log_p)) ** gamma) * log_p


def torch_of(name: str) -> Callable[[Any], Any]:
    f = peer("torch").nn.functional
    return {
        "silu": f.silu,
        "silu_by_its_other_name": f.silu,
        "mish": f.mish,
        "elu": f.elu,
        "hard_swish": f.hardswish,
        "exact_gelu": f.gelu,
        "relu": f.relu,
        "leaky_relu": lambda x: f.leaky_relu(x, 0.2),
        "sigmoid": peer("torch").sigmoid,
        "tanh": peer("torch").tanh,
        "gelu": f.gelu,
        "gelu_tanh": lambda x: f.gelu(x, approximate="tanh"),
    }[name]


LIBRARY = {name: getattr(activations, name) for name in activations.__all__}
OWN = {f.name: f for f in (silu, silu_by_its_other_name, mish, elu, hard_swish, exact_gelu)}
PARAMETERS = {"leaky_relu": {"slope": 0.2}}
EVERYWHERE = np.concatenate([np.linspace(-9, 9, 181) + 0.013, [-1e4, -200.0, -95.0, 95.0, 200.0, 1e4]])


def run(f: Activation, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """y and dy/dx by the NumPy form."""
    bound, form = f.bind(**PARAMETERS.get(f.name, {})), f.form(x.dtype.name)
    y, slope, dx = (np.empty_like(x) for _ in range(3))
    kept = [slope] if form.keeps else []
    with np.errstate(all="ignore"):
        bound_program(bound, form.forward).run(x, y, *kept)
        kept = kept or ([y] if form.reads_y else [])
        bound_program(bound, form.backward).run(*kept, np.ones_like(x), dx)
    return y, dx


# --- derivatives ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*sorted({*LIBRARY} - {"identity", "step"}), *OWN])
def test_it_is_what_pytorch_computes(name: str, dtype: np.dtype) -> None:
    """Even if exponentials overflow: 1/(1 + exp(200)) is 0, and so is its derivative."""
    torch = peer("torch")
    x = EVERYWHERE.astype(dtype)
    y, slope = run({**LIBRARY, **OWN}[name], x)
    wanted = torch.from_numpy(x.astype(np.float64)).requires_grad_()
    value = torch_of(name)(wanted)
    value.sum().backward()
    size = 32 * float(np.finfo(dtype).eps)
    np.testing.assert_allclose(y, value.detach().numpy(), rtol=size, atol=size)
    np.testing.assert_allclose(slope, wanted.grad.numpy(), rtol=size, atol=size)


def test_identity_and_step() -> None:
    x = np.array([-2.0, -0.0, 0.0, 3.0, np.inf])
    y, slope = run(activations.identity, x)
    np.testing.assert_array_equal((y, slope), (x, np.ones(5)))
    y, slope = run(activations.step, x)
    np.testing.assert_array_equal((y, slope), ([0, 0, 0, 1, 1], np.zeros(5)))


def test_at_its_corner_a_slope_is_that_of_pytorch() -> None:
    for name, slope in (("relu", 0.0), ("leaky_relu", 0.2)):
        assert run(LIBRARY[name], np.zeros(1))[1][0] == slope


def test_what_backward_looks_at() -> None:
    """Derived from the trace: nothing, y, or a slope that forward stores."""
    found = {name: (f.form("float32").keeps, f.form("float32").reads_y) for name, f in {**LIBRARY, **OWN}.items()}
    neither, y, kept = (False, False), (False, True), (True, False)
    assert found == {
        **dict.fromkeys(("identity", "step"), neither),
        **dict.fromkeys(("relu", "leaky_relu", "sigmoid", "tanh"), y),
        **dict.fromkeys(("gelu", "gelu_tanh", *OWN), kept),
    }


def test_what_is_only_written_serves_as_a_register() -> None:
    """So that fewer bytes have room in the cache; in place, the result's array holds an operand until the end."""
    backward = activations.tanh.form("float32").backward
    assert [len(allocate(backward, same)[2]) for same in ({}, {"dx": "dy"})] == [0, 1]


@drawn(100, 2000, program=programs())
def test_the_derivative_of_any_expression_is_the_slope(program: Any) -> None:
    """Tested away from jumps and corners: where differences on both sides and at two widths agree."""

    @gb.activation
    def any_activation(x, *, lr=0.7):
        return value(program, [2, -1.25, 3.0, lr, 0.25 - x, x * x, 0.3 * x + 1, x])

    x = np.random.default_rng(7).uniform(-2, 2, 60)

    def f(x: np.ndarray) -> np.ndarray:
        return np.broadcast_to(any_activation(x), x.shape).astype(float)

    def between(low: np.ndarray, high: np.ndarray) -> np.ndarray:
        return (f(high) - f(low)) / (high - low)

    h = 1e-5
    slopes = np.stack([between(x - h, x + h), between(x, x + h), between(x - h, x), between(x - h / 4, x + h / 4)])
    smooth = np.ptp(slopes, axis=0) < 1e-3 * (1 + np.abs(slopes[0]))
    found = run(any_activation, x)[1]
    np.testing.assert_allclose(found[smooth], slopes[0][smooth], rtol=1e-4, atol=1e-4)


def test_every_operation_has_a_derivative() -> None:
    assert set(RULES) == {*OPS.values(), INDICATOR, COPY}


SMOOTH: list[Callable[[Any], Any]] = [
    lambda x: x + 2,
    lambda x: 3 - x,
    lambda x: x * x,
    lambda x: 1 / (2 + x * x),
    lambda x: x / (3 + x),
    lambda x: -x,
    lambda x: (x * x + 1) ** 1.5,
    lambda x: 2**x,
    lambda x: (x * x + 1) ** x,
    lambda x: np.sqrt(x * x + 1),
    lambda x: np.exp(x / 3),
    lambda x: np.log(x * x + 1),
    lambda x: np.log1p(x * x),
    np.tanh,
    lambda x: abs(x),
    lambda x: np.sign(x) * x,
    lambda x: np.maximum(x, 0.5 * x),
    lambda x: np.minimum(x, x * x),
    lambda x: np.where(x > 0.25, x * x, 0.5 * x),
    lambda x: np.where(x < 0.25, 1, 0) * x,
]


@settings(max_examples=200, deadline=None)
@given(
    places=st.lists(st.integers(0, len(SMOOTH) - 1), min_size=1, max_size=3),
    x=st.floats(-1.5, 1.5).filter(lambda x: abs(x) > 1e-3),
)
def test_a_composition_has_the_derivative_of_differences(places: list[int], x: float) -> None:
    def formula(x: Any) -> Any:
        for place in places:
            x = SMOOTH[place](x)
        return x

    h = 1e-6
    around = np.array([x - 2 * h, x - h, x, x + h, x + 2 * h])
    values = np.array([float(formula(np.float64(v))) for v in around])
    left, right = (values[2] - values[1]) / h, (values[3] - values[2]) / h
    if abs(left - right) > 1e-3 * (1 + abs(left)) or abs(values).max() > 1e4:
        return  # a corner, or differences that say nothing
    _, slope = run(gb.activation(formula), np.array([x]))
    np.testing.assert_allclose(slope[0], (values[3] - values[1]) / (2 * h), rtol=1e-4, atol=1e-5)


def test_a_slope_that_overflows_is_refused() -> None:
    @gb.activation
    def gumbel(x):
        return np.exp(-np.exp(x))

    message = r"the derivative of gumbel is nan at x = .*, where the activation is 0: .*return \(y, slope\)"
    with pytest.raises(FormulaError, match=message):
        gb.Elementwise(gumbel)

    @gb.activation
    def mended(x):
        small = np.minimum(x, 5)
        y = np.exp(-np.exp(small))
        return y, -y * np.exp(small)

    gb.Elementwise(mended)


# --- losses --------------------------------------------------------------------------------------------------------


def torch_loss(name: str) -> Callable[[Any, Any], Any]:
    torch = peer("torch")
    f = torch.nn.functional

    def of_focal(z: Any, y: Any) -> Any:
        p = torch.sigmoid(z) * y + torch.sigmoid(-z) * (1 - y)
        return (-((1 - p) ** 2) * torch.log(p)).mean()

    return {
        "huber": lambda z, y: f.huber_loss(z, y, delta=0.5),
        "quantile": lambda z, y: torch.maximum(0.3 * (y - z), -0.7 * (y - z)).mean(),
        "focal": of_focal,
        "mse": f.mse_loss,
        "sigmoid_cross_entropy": f.binary_cross_entropy_with_logits,
    }[name]


LOSSES: dict[str, tuple[ScoreLoss, dict[str, float]]] = {
    "huber": (huber, {"delta": 0.5}),
    "quantile": (quantile, {"q": 0.3}),
    "focal": (focal, {}),
    **{name: (getattr(scores, name), {}) for name in ("mse", "sigmoid_cross_entropy")},
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_network_learns_by_a_loss_of_ones_own(name: str, backend: Backend, rng: np.random.Generator) -> None:
    """Loss and gradients equal PyTorch's, and so does a training run."""
    torch = peer("torch")
    loss, parameters = LOSSES[name]
    X, Y = rng.normal(size=(40, 5)), (rng.random((40, 2)) > 0.5).astype(np.float64)
    layers = [gb.Dense(5, 4), gb.Elementwise(silu), gb.Dense(4, 2)]
    net = gb.Network(layers, loss=loss.bind(**parameters), backend=backend, dtype="float64")
    x, y = backend.asarray(X), backend.asarray(Y)
    found, grads = net.loss_and_grad(x, y)
    weights = {k: torch.from_numpy(backend.to_numpy(v).copy()).requires_grad_() for k, v in net.parameters.items()}
    hidden = torch.nn.functional.silu(torch.from_numpy(X) @ weights["W1"] + weights["b1"])
    wanted = torch_loss(name)(hidden @ weights["W2"] + weights["b2"], torch.from_numpy(Y))
    wanted.backward()
    assert found == pytest.approx(wanted.item(), rel=1e-10)
    for key, weight in weights.items():
        np.testing.assert_allclose(backend.to_numpy(grads[key]), weight.grad.numpy(), rtol=1e-8, atol=1e-12)
    assert net.loss(x, y) == pytest.approx(wanted.item(), rel=1e-10)

    loader = gb.Loader(X, Y, batch_size=20, backend=backend, dtype="float64")
    history = gb.fit(net, loader, gb.Adam(net.parameters, lr=0.02), epochs=15, progress=False)
    assert history.loss[-1] < history.loss[0]
    assert history.execution == ("eager" if backend.name == "cpu" else "captured")


class Hinge(gb.Loss):
    """max(0, 1 - y z), y of -1 or 1, as a class after the docstring of Loss."""

    name = "hinge"

    def workspace(self, outputs: int) -> dict[str, Any]:
        return {"loss": ((1,), None), "dz": ((-1, outputs), None)}

    def check(self, Y: Any, rows: int, outputs: int) -> None:
        assert Y.shape == (rows, outputs)

    def check_values(self, Y: Any, outputs: int) -> None:
        pass

    def run(self, z: Any, Y: Any, c: Any) -> None:
        margin = 1 - Y * z
        c.work["loss"][...] = c.xp.maximum(margin, 0).mean()
        c.work["dz"][...] = -Y * (margin > 0) / z.size

    def predict(self, z: Any) -> Any:
        return z.copy()

    def truth(self, Y: Any, outputs: int) -> Any:
        return Y


def test_a_loss_as_a_class(backend: Backend, rng: np.random.Generator) -> None:
    net = gb.Network([gb.Dense(3, 1)], loss=Hinge(), backend=backend, dtype="float64")
    X, Y = backend.asarray(rng.normal(size=(30, 3))), backend.asarray(np.sign(rng.normal(size=(30, 1))))
    assert net.loss_name == "hinge"
    assert "loss='hinge'" in repr(net)
    for found in check_network(net, X, Y, directions=4).values():
        assert found.ok


def test_every_function_passes_the_gradient_check(backend: Backend, rng: np.random.Generator) -> None:
    X, Y = backend.asarray(rng.normal(size=(12, 4))), backend.asarray(rng.normal(size=(12, 2)))
    for f in OWN.values():
        net = gb.mlp([4, 6, 2], activation=f, loss=huber, backend=backend, dtype="float64")
        assert all(found.ok for found in check_network(net, X, Y, directions=4).values()), f.name


def test_the_loss_of_scores_without_overflow() -> None:
    """log1p of the compiled kernels, over all magnitudes that occur here."""
    z = np.concatenate([np.linspace(-40, 40, 4001), np.geomspace(1e-9, 700, 400), [800.0, 1e5]])[:, None]
    for dtype in (np.float32, np.float64):
        scores_ = z.astype(dtype)
        exact = np.logaddexp(0, scores_.astype(np.longdouble))
        for i in (0, 2000, 3000, 4401, 4402):
            loss, _ = gb.losses.sigmoid_cross_entropy(scores_[i : i + 1], np.zeros((1, 1), dtype))
            assert loss == pytest.approx(float(exact[i, 0]), rel=4 * float(np.finfo(dtype).eps), abs=1e-300)
        loss, _ = gb.losses.sigmoid_cross_entropy(scores_[:4400], np.zeros((4400, 1), dtype))
        assert loss == pytest.approx(float(exact[:4400].mean()), rel=1e-6 if dtype == np.float32 else 1e-14)


# --- refused functions ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: gb.activation(lambda x, y: x), FormulaError, r"must have the signature \(x, \*, parameters\), got"),
        (lambda: gb.score_loss(lambda z: z), FormulaError, r"must have the signature \(z, y, \*, parameters\), got"),
        (lambda: gb.activation(eval("lambda x, *, a='b': x")), FormulaError, "default of a must be a number, got 'b'"),
        (lambda: gb.activation(eval("lambda x, *, exp: x")), FormulaError, "the name 'exp' is taken"),
        (lambda: gb.Elementwise(quantile), DTypeError, r"declared with @gb.activation, .*, got <score loss quantile>"),
        (lambda: gb.Elementwise(np.tanh), DTypeError, r"declared with @gb.activation, .*, got <ufunc 'tanh'>"),
        (
            lambda: gb.Elementwise(elu, beta=1),
            FormulaError,
            r"has the parameters alpha; missing \[\], unknown \['beta'\]",
        ),
        (lambda: gb.Elementwise(elu, alpha="1"), FormulaError, "alpha of activation elu must be a finite number"),
        (lambda: gb.mlp([2, 2], loss=quantile), FormulaError, r"loss quantile has the parameters q; missing \['q'\]"),
        (lambda: gb.mlp([2, 2], loss="hubber"), ArgumentError, "loss must be one of"),
        (
            lambda: gb.Elementwise(gb.activation(lambda x: x if x > 0 else 0)),
            FormulaError,
            r"cannot branch on a computed value .*; write np.where",
        ),
        (lambda: gb.Elementwise(gb.activation(lambda x: (x, 1, 2))), FormulaError, "y, or y and its slope.*3 values"),
        (lambda: gb.Elementwise(gb.activation(lambda x: np.sin(x))), FormulaError, "cannot use np.sin; it can use"),
    ],
)
def test_what_is_refused(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as raised:
        make()
    assert isinstance(raised.value, gb.GpubatchError)


def test_what_one_sees() -> None:
    assert repr(elu) == "<activation elu>"
    assert repr(gb.Elementwise(elu, alpha=0.5)) == "Elementwise(elu(alpha=0.5))"
    net = gb.mlp([3, 4, 1], activation=silu, loss=huber)
    assert repr(net).startswith(
        "Network([Dense(inputs=3, outputs=4, bias=True, init='auto', bias_init=None), Elementwise(silu), "
    )
    assert net.loss_name == "huber(delta=1.0)"
    np.testing.assert_allclose(elu(np.array([-1.0, 2.0])), [np.expm1(-1), 2])
    np.testing.assert_allclose(huber(np.array([3.0]), np.array([0.0])), [2.5])
