"""Layers by themselves: against closed forms, differences, and PyTorch."""

from __future__ import annotations

import math

import numpy as np
import pytest
from needs import peer

import gpubatch as gb
from gpubatch.backend import Array, Backend, get_backend
from gpubatch.errors import ArgumentError, DTypeError, ShapeError
from gpubatch.nn import Context, layers
from gpubatch.nn.layers import (
    ACTIVATIONS,
    GELU,
    INITS,
    ActivationLayer,
    BatchNorm,
    Dense,
    DenseActivation,
    Dropout,
    Elementwise,
    Layer,
    LeakyReLU,
    ReLU,
    Sigmoid,
    Step,
    Tanh,
)
from gpubatch.nn.needs import Mode
from gpubatch.ops import ops_for, workspace_dtype
from gpubatch.ops.products import products_for

FEATURES = 6


@gb.activation
def silu(x):
    """An activation with a derived derivative."""
    return x / (1 + np.exp(-x))


@gb.activation
def celu(x, *, alpha):
    """An activation whose derivative depends on y."""
    y = np.maximum(x, 0) + np.minimum(alpha * (np.exp(np.minimum(x, 0) / alpha) - 1), 0)
    return y, np.where(y > 0, 1, 1 + y / alpha)


CASES: dict[str, Layer] = {
    "Step": Step(),
    "ReLU": ReLU(),
    "LeakyReLU": LeakyReLU(),
    "LeakyReLU, steep": LeakyReLU(slope=0.3),
    "Sigmoid": Sigmoid(),
    "Tanh": Tanh(),
    "GELU": GELU(),
    "GELU, tanh": GELU(approximate="tanh"),
    "Dense": Dense(FEATURES, 4),
    "Dense, no bias": Dense(FEATURES, 4, bias=False, init="xavier"),
    "Dense and ReLU": DenseActivation(Dense(FEATURES, 4), ReLU()),
    "Dense and GELU": DenseActivation(Dense(FEATURES, 4), GELU()),
    "BatchNorm": BatchNorm(FEATURES),
    "one's own": Elementwise(silu),
    "one's own, with a parameter": Elementwise(celu, alpha=0.7),
    "BatchNorm, large eps": BatchNorm(FEATURES, eps=0.5, unbiased_running=False),
    "Dropout": Dropout(0.4),
    "Dropout, none": Dropout(0.0),
}
every_layer = pytest.mark.parametrize("layer", CASES.values(), ids=CASES)


def test_the_table_is_complete() -> None:
    leaves = {c for c in vars(layers).values() if isinstance(c, type) and issubclass(c, Layer)} - {
        Layer,
        ActivationLayer,
    }
    assert {type(layer) for layer in CASES.values()} == leaves
    assert set(ACTIVATIONS.values()) == leaves - {Dense, DenseActivation, BatchNorm, Dropout, Elementwise}


class Bench:
    """One layer with its own arrays, as a network would provide them."""

    def __init__(self, layer: Layer, rows: int, dtype: str = "float64", spec: str | Backend = "cpu") -> None:
        self.layer, self.backend = layer, get_backend(spec)
        self.needs = layer.needs(FEATURES)
        draw = np.random.default_rng(5)

        def array(shape: tuple[int, ...], kind: object = None) -> Array:
            shape = tuple(rows if n == -1 else n for n in shape)
            return self.backend.asarray(draw.normal(1, 0.2, shape), workspace_dtype(kind, np.dtype(dtype)))

        self.scratch = self.needs.scratch_in(ops_for(self.backend, np.dtype(dtype)), training=True, strided=True)
        self.x, self.dy = array((-1, FEATURES)), array((-1, self.needs.outputs))
        self.y, self.dx = array((-1, self.needs.outputs)), array((-1, FEATURES))
        self.mode = Mode(seed=3, training=True, step=2)
        self.context = Context(
            *(self.backend, self.backend.xp, ops_for(self.backend, np.dtype(dtype)), 1, self.mode),
            p={name: array(p.shape) for name, p in self.needs.parameters.items()},
            g={name: array(p.shape) for name, p in self.needs.parameters.items()},
            buffers={name: array(p.shape) for name, p in self.needs.buffers.items()},
            work={name: array(*space) for name, space in {**self.needs.kept, **self.scratch}.items()},
            products=products_for(self.backend, np.dtype(dtype), "full"),
        )

    def forward(self, x: Array) -> Array:
        self.layer.forward(x, self.y, self.context)
        return self.y

    def backward(self, x: Array, dy: Array) -> Array:
        self.layer.backward(x, self.y, dy, self.dx, self.context)
        return self.dx


def apply(layer: Layer, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The activation of the rows of ``x``, and its derivative there."""
    bench = Bench(layer, len(x), x.dtype.name)
    with np.errstate(over="ignore"):
        return bench.forward(x).copy(), bench.backward(x, np.ones_like(x))


# --- every layer -----------------------------------------------------------------------------------------------------


@every_layer
def test_gradients_are_central_differences(layer, rng) -> None:
    if isinstance(layer, Step):
        pytest.skip("backward of Step is zero by definition; see test_step")
    bench, h = Bench(layer, 5), 1e-5
    x, dy = rng.normal(size=bench.x.shape), bench.dy
    bench.forward(x)
    found = {"x": bench.backward(x, dy.copy()).copy(), **{name: g.copy() for name, g in bench.context.g.items()}}
    for name, array in {"x": x, **bench.context.p}.items():
        numeric = np.empty(array.shape)
        for place in np.ndindex(array.shape):
            middle = array[place]
            array[place] = middle + h
            above = (bench.forward(x) * dy).sum()
            array[place] = middle - h
            below = (bench.forward(x) * dy).sum()
            array[place] = middle
            numeric[place] = (above - below) / (2 * h)
        assert np.linalg.norm(found[name] - numeric) <= 1e-6 * np.linalg.norm(numeric), name


@every_layer
def test_in_place_gives_the_same(layer, rng) -> None:
    apart, together = Bench(layer, 9), Bench(layer, 9)
    if not apart.needs.in_place:
        pytest.skip("does not work in place")
    x, dy = apart.x, apart.dy
    apart.forward(x)
    apart.backward(x, dy)
    a, d = x.copy(), dy.copy()
    layer.forward(a, a, together.context)
    np.testing.assert_array_equal(a, apart.y)
    layer.backward(a, a, d, d, together.context)
    np.testing.assert_array_equal(d, apart.dx)


@every_layer
def test_backward_reads_only_what_it_says(layer) -> None:
    whole, poor = Bench(layer, 4), Bench(layer, 4)
    for bench in (whole, poor):
        bench.forward(bench.x)
    if "x" not in poor.needs.reads:
        poor.x[...] = np.nan
    if "y" not in poor.needs.reads:
        poor.y[...] = np.nan
    for name in poor.scratch:  # scratch lasts for one call
        poor.context.work[name][...] = 1
        whole.context.work[name][...] = 0
    np.testing.assert_array_equal(poor.backward(poor.x, poor.dy), whole.backward(whole.x, whole.dy))
    for name, g in poor.context.g.items():
        np.testing.assert_array_equal(g, whole.context.g[name])


@every_layer
def test_rows_count_for_themselves_in_evaluation(layer) -> None:
    all_rows, one_row = Bench(layer, 7), Bench(layer, 1)
    all_rows.mode.training = one_row.mode.training = False
    one_row.context.p.update(all_rows.context.p)
    one_row.context.buffers.update(all_rows.context.buffers)
    expected = one_row.forward(all_rows.x[2:3])
    np.testing.assert_allclose(all_rows.forward(all_rows.x)[2:3], expected, rtol=1e-14)


@every_layer
def test_the_same_on_every_backend_in_every_dtype(layer, backend, dtype, tolerance) -> None:
    found, expected = Bench(layer, 9, dtype.name, backend), Bench(layer, 9)
    for bench in (found, expected):
        bench.forward(bench.x)
        bench.backward(bench.x, bench.dy)
    assert found.y.dtype == found.dx.dtype == dtype
    np.testing.assert_allclose(backend.to_numpy(found.y), expected.y, **tolerance)
    np.testing.assert_allclose(backend.to_numpy(found.dx), expected.dx, **tolerance)


# --- activations -----------------------------------------------------------------------------------------------------

X = np.concatenate([np.linspace(-9, 9, 601), [1e-300, -1e-300, 30, -30, 1e4, -1e4]])[:, None] * np.ones(FEATURES)


@pytest.mark.parametrize(
    ("layer", "name", "options"),
    [
        (ReLU(), "relu", {}),
        (LeakyReLU(), "leaky_relu", {}),
        (LeakyReLU(slope=0.2), "leaky_relu", {"negative_slope": 0.2}),
        (Sigmoid(), "sigmoid", {}),
        (Tanh(), "tanh", {}),
        (GELU(), "gelu", {}),
        (GELU(approximate="tanh"), "gelu", {"approximate": "tanh"}),
    ],
    ids=str,
)
def test_activations_agree_with_pytorch(layer, name, options) -> None:
    torch = peer("torch")
    x = torch.tensor(X, requires_grad=True)
    expected = getattr(torch.nn.functional, name)(x, **options)
    expected.sum().backward()
    y, derivative = apply(layer, X)
    np.testing.assert_allclose(y, expected.detach().numpy(), rtol=1e-10, atol=1e-14)
    np.testing.assert_allclose(derivative, x.grad.numpy(), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize(("dtype", "error"), [("float32", 1.5e-7), ("float64", 1e-15)])
def test_gelu_is_exact_to_rounding(dtype, error) -> None:
    x = X.astype(dtype)
    y, derivative = apply(GELU(), x)
    exact = x.astype(np.float64)
    cdf = 0.5 * np.vectorize(math.erfc)(-exact / math.sqrt(2))
    density = np.exp(-exact * exact / 2) / math.sqrt(2 * math.pi)
    assert np.max(np.abs(y - exact * cdf) / (1 + np.abs(exact))) < error
    assert np.max(np.abs(derivative - cdf - exact * density)) < 4 * error


def test_known_values_of_activations() -> None:
    x = np.array([[-1.0, 0.0, 2.0]]).repeat(2, axis=1)
    closed = {
        ReLU(): ([0, 0, 2], [0, 0, 1]),
        LeakyReLU(): ([-0.01, 0, 2], [0.01, 0.01, 1]),
        Sigmoid(): ([0.2689414213699951, 0.5, 0.8807970779778823], [0.19661193324148185, 0.25, 0.10499358540350662]),
        Tanh(): ([-0.7615941559557649, 0, 0.9640275800758169], [0.41997434161402614, 1, 0.07065082485316443]),
        GELU(): ([-0.15865525393145707, 0, 1.9544997361036416], [-0.08331547058768628, 0.5, 1.085231801078197]),
        # 0.5 (1 + tanh(√(2/π) 1.044715)) = 0.8411919906082768 is the value in the reference of the tanh form
        GELU("tanh"): ([0.8411919906082768 - 1, 0, 1.954597694087775], None),
    }
    for layer, (values, slopes) in closed.items():
        y, derivative = apply(layer, x)
        np.testing.assert_allclose(y[0, ::2], values, rtol=1e-13, err_msg=str(layer))
        if slopes is not None:
            np.testing.assert_allclose(derivative[0, ::2], slopes, rtol=1e-13, err_msg=str(layer))


def test_step() -> None:
    y, derivative = apply(Step(), X)
    np.testing.assert_array_equal(y, X > 0)
    np.testing.assert_array_equal(derivative, np.zeros_like(X))


# --- dense -----------------------------------------------------------------------------------------------------------


# Of 300 inputs and 200 outputs: the standard deviation of W, the bound if it is uniform, and the bound of b.
FIRST = {
    "he": (math.sqrt(2 / 300), None, 0),
    "he_uniform": (math.sqrt(2 / 300), math.sqrt(6 / 300), 0),
    "xavier": (math.sqrt(2 / 500), None, 0),
    "xavier_uniform": (math.sqrt(2 / 500), math.sqrt(6 / 500), 0),
    "lecun": (math.sqrt(1 / 300), None, 0),
    "lecun_uniform": (math.sqrt(1 / 300), math.sqrt(3 / 300), 0),
    "pytorch": (math.sqrt(1 / 900), math.sqrt(1 / 300), math.sqrt(1 / 300)),
    "small": (math.sqrt(8 / 4500), 2 / 3 * math.sqrt(6 / 500), math.sqrt(1 / 300)),
    "large": (math.sqrt(9 / 1000), 3 / 2 * math.sqrt(6 / 500), math.sqrt(1 / 300)),
    "zeros": (0, None, 0),
    0.01: (0.01, None, 0),
    0: (0, None, 0),
    "auto": (math.sqrt(8 / 4500), 2 / 3 * math.sqrt(6 / 500), math.sqrt(1 / 300)),
}


@pytest.mark.parametrize("init", FIRST)
def test_first_weights_of_dense(init, rng) -> None:
    std, bound, bias = FIRST[init]
    parameters = Dense(300, 200, init=init).needs(300).parameters
    W = parameters["W"].init(rng, parameters["W"].shape)
    assert W.shape == (300, 200)
    assert W.std() == pytest.approx(std, rel=0.02)
    assert abs(W.mean()) <= 5 * std / math.sqrt(W.size)
    if bound is None:
        assert abs(W).max() >= 3 * std
    else:
        assert 0.99 * bound <= abs(W).max() <= bound
    b = parameters["b"].init
    b = b(rng, (200,)) if callable(b) else np.full(200, b)
    assert 0.95 * bias <= abs(b).max() <= bias
    assert [name for name, p in parameters.items() if p.l2] == ["W"]


def test_every_init_is_tested() -> None:
    assert {init for init in FIRST if isinstance(init, str)} == {*INITS, "auto"}


@pytest.mark.parametrize("init", ["he_uniform", "xavier", "xavier_uniform", "pytorch"])
def test_first_weights_are_distributed_as_pytorchs(init, rng) -> None:
    torch = peer("torch")
    torch.manual_seed(0)
    theirs = torch.nn.Linear(300, 200)
    if init != "pytorch":
        fill = {"he_uniform": "kaiming_uniform_", "xavier": "xavier_normal_", "xavier_uniform": "xavier_uniform_"}[init]
        options = {"nonlinearity": "relu"} if init == "he_uniform" else {}
        getattr(torch.nn.init, fill)(theirs.weight, **options)
        torch.nn.init.zeros_(theirs.bias)
    parameters = Dense(300, 200, init=init).needs(300).parameters
    W = parameters["W"].init(rng, (300, 200)).ravel()
    levels = [0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99]
    there = theirs.weight.detach().numpy().ravel()
    np.testing.assert_allclose(np.quantile(W, levels), np.quantile(there, levels), atol=0.03 * W.std())
    b = parameters["b"].init
    b = b(rng, (200,)) if callable(b) else np.zeros(200)
    there = theirs.bias.detach().numpy()
    np.testing.assert_allclose(np.quantile(b, levels), np.quantile(there, levels), atol=0.35 * b.std())


@pytest.mark.parametrize(("given", "expected"), [(2, [2, 2, 2]), ([1, 2, 3], [1, 2, 3]), (np.ones(3), [1, 1, 1])])
def test_a_bias_starts_where_it_is_told(given, expected, rng) -> None:
    layer = Dense(4, 3, init="pytorch", bias_init=given)
    init = layer.needs(4).parameters["b"].init
    assert (init(rng, (3,)).tolist() if callable(init) else [init] * 3) == expected
    assert eval(repr(layer), {"Dense": Dense}).bias_init == layer.bias_init  # it is kept as Python's numbers


# --- batch normalisation ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.1, 0.5])
def test_batch_norm_agrees_with_pytorch_over_steps(momentum, rng) -> None:
    torch = peer("torch")
    theirs = torch.nn.BatchNorm1d(FEATURES, eps=1e-3, momentum=momentum, dtype=torch.float64)
    ours = Bench(BatchNorm(FEATURES, eps=1e-3, momentum=momentum), 12)
    p, g, buffers = ours.context.p, ours.context.g, ours.context.buffers
    buffers["running_mean"][...], buffers["running_var"][...] = 0, 1
    with torch.no_grad():
        theirs.weight.copy_(torch.tensor(p["gamma"]))
        theirs.bias.copy_(torch.tensor(p["beta"]))
    for step in range(5):
        x, dy = rng.normal(step, 1 + step, (12, FEATURES)), rng.normal(size=(12, FEATURES))
        xt = torch.tensor(x, requires_grad=True)
        theirs.zero_grad()
        expected = theirs(xt)
        expected.backward(torch.tensor(dy))
        close = {"rtol": 1e-10, "atol": 1e-12}
        np.testing.assert_allclose(ours.forward(x), expected.detach().numpy(), **close)
        np.testing.assert_allclose(ours.backward(x, dy), xt.grad.numpy(), **close)
        np.testing.assert_allclose(g["gamma"], theirs.weight.grad.numpy(), **close)
        np.testing.assert_allclose(g["beta"], theirs.bias.grad.numpy(), **close)
        np.testing.assert_allclose(buffers["running_mean"], theirs.running_mean.numpy(), **close)
        np.testing.assert_allclose(buffers["running_var"], theirs.running_var.numpy(), **close)
    theirs.eval()
    ours.mode.training = False
    np.testing.assert_allclose(ours.forward(x), theirs(xt).detach().numpy(), **close)


@pytest.mark.parametrize(("unbiased", "variance"), [(True, 5 / 3), (False, 5 / 4)])
def test_running_statistics_of_one_to_four(unbiased, variance) -> None:
    bench = Bench(BatchNorm(FEATURES, momentum=0.25, unbiased_running=unbiased), 4)
    buffers = bench.context.buffers
    buffers["running_mean"][...], buffers["running_var"][...] = 0, 1
    x = np.arange(1.0, 5.0)[:, None] * np.ones(FEATURES)
    bench.forward(x)
    assert buffers["running_mean"][0] == 0, "only a training step moves the running statistics"
    bench.backward(x, bench.dy)
    np.testing.assert_allclose(buffers["running_mean"], 0.25 * 2.5)
    np.testing.assert_allclose(buffers["running_var"], 0.75 + 0.25 * variance)


def test_batch_norm_of_one_sample_is_refused() -> None:
    bench = Bench(BatchNorm(FEATURES), 1)
    with pytest.raises(ArgumentError, match="more than one sample in a training batch, got 1"):
        bench.forward(bench.x)
    bench.mode.training = False
    bench.forward(bench.x)


# --- dropout ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_dropout_keeps_a_share_and_the_expectation(rate) -> None:
    bench = Bench(Dropout(rate), 20_000, "float32")
    y = bench.forward(np.ones((20_000, FEATURES), np.float32))
    kept, deviation = (y > 0).mean(), math.sqrt(rate * (1 - rate) / y.size)
    assert abs(kept - (1 - rate)) < 4 * deviation
    np.testing.assert_array_equal(np.unique(y), np.float32([0, 1 / (1 - rate)]))
    assert abs(y.mean() - 1) < 4 * deviation / (1 - rate)


def mask_of(seed: int, index: int, step: int, rows: int = 50) -> np.ndarray:
    bench = Bench(Dropout(0.5), rows)
    bench.mode.seed, bench.mode.step = seed, step
    object.__setattr__(bench.context, "index", index)
    return bench.forward(np.ones((rows, FEATURES))) > 0


def test_a_mask_is_a_function_of_seed_layer_step_and_place() -> None:
    first = mask_of(7, 2, 5)
    np.testing.assert_array_equal(first, mask_of(7, 2, 5))
    np.testing.assert_array_equal(first[:30], mask_of(7, 2, 5, rows=30))
    for other in [(8, 2, 5), (7, 3, 5), (7, 2, 6), (2**64 - 1, 2, 5)]:
        assert 0.3 < (first == mask_of(*other)).mean() < 0.7


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Dense(0, 3), ArgumentError, "inputs must be an integer >= 1, got 0"),
        (lambda: Dense(3, 2.0), DTypeError, "outputs must be an integer >= 1, got 2.0"),
        (lambda: Dense(3, 2, bias=1), DTypeError, "bias must be True or False, got 1"),
        (lambda: Dense(3, 2, init="hee"), ArgumentError, "init must be one of 'he', .*, got 'hee'; did you mean 'he'"),
        (lambda: Dense(3, 2, bias_init=[1, 2, 3]), ShapeError, r"bias_init must have shape \(\) or \(2,\), got \(3,\)"),
        (
            lambda: Dense(3, 2, bias_init="mean"),
            DTypeError,
            "bias_init must be a number or one for each output, got 'mean'",
        ),
        (lambda: Dense(3, 2, bias_init=math.nan), ArgumentError, "bias_init must be finite, got nan"),
        (lambda: Dense(3, 2, bias=False, bias_init=1), ArgumentError, "bias_init is the start of a bias"),
        (lambda: Dense(3, 2, init=-1.0), ArgumentError, r"init must be finite and in \[0, inf\), got -1.0"),
        (lambda: LeakyReLU(1.0), ArgumentError, r"slope must be finite and in \[0, 1\), got 1.0"),
        (lambda: GELU("erf"), ArgumentError, "approximate must be one of 'none', 'tanh', got 'erf'"),
        (lambda: BatchNorm(3, eps=0), ArgumentError, r"eps must be finite and in \(0, inf\), got 0.0"),
        (lambda: BatchNorm(3, momentum=1.5), ArgumentError, r"momentum must be finite and in \[0, 1\], got 1.5"),
        (lambda: BatchNorm(3, unbiased_running=None), DTypeError, "unbiased_running must be True or False"),
        (lambda: Dropout(1.0), ArgumentError, r"rate must be finite and in \[0, 1\), got 1.0"),
        (lambda: Dropout(-0.1), ArgumentError, r"rate must be finite and in \[0, 1\), got -0.1"),
        (lambda: Dropout(math.nan), ArgumentError, r"rate must be finite and in \[0, 1\), got nan"),
    ],
)
def test_bad_arguments_are_named(make, error, message) -> None:
    with pytest.raises(error, match=message):
        make()
