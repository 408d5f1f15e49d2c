"""Networks: gradients, the planned workspace, evaluation in pieces, state, and what they refuse."""

from __future__ import annotations

import gc
import itertools
import math
import tracemalloc

import numpy as np
import pytest
from families import every
from hypothesis import given, settings, strategies as st
from needs import peer

import gpubatch as gb
from gpubatch.backend import Array, Backend
from gpubatch.errors import ArgumentError, DeviceMismatchError, DTypeError, NonFiniteError, ShapeError
from gpubatch.nn import OF_LABELS, Context, Needs, Parameter, core_of, workspace
from gpubatch.nn.layers import (
    ACTIVATIONS,
    GELU,
    INITS,
    BatchNorm,
    Dense,
    Dropout,
    Layer,
    LeakyReLU,
    ReLU,
    Sigmoid,
    Step,
    Tanh,
)
from gpubatch.nn.losses import LOSSES
from gpubatch.nn.network import Network, mlp


class Scale(Layer):
    """A user's layer: x s, one factor for each feature, with no optional attributes."""

    def takes(self) -> None:
        pass

    def needs(self, features: int) -> Needs:
        first = Parameter((features,), lambda draw, shape: draw.uniform(0.5, 1.5, shape), l2=True)
        return Needs(features, {"s": first}, scratch={"t": ((-1, features), None)})

    def forward(self, x: Array, y: Array, c: Context) -> None:
        c.xp.multiply(x, c.p["s"], out=y)

    def backward(self, x: Array, y: Array, dy: Array, dx: Array | None, c: Context) -> None:
        c.xp.multiply(dy, x, out=c.work["t"]).sum(axis=0, out=c.g["s"])
        if dx is not None:
            c.xp.multiply(dy, c.p["s"], out=dx)


def stacks(n: int, k: int) -> dict[str, list[Layer]]:
    """Stacks in which each layer meets others: in place or not, first, last, with and without parameters."""
    return {
        "one": [Dense(n, k)],
        "relu": [Dense(n, 7), ReLU(), Dense(7, k)],
        "norm and dropout": [
            Dense(n, 7),
            BatchNorm(7),
            ReLU(),
            Dropout(0.3),
            Dense(7, 8),
            BatchNorm(8),
            Tanh(),
            Dense(8, k),
        ],
        "every activation": [
            *(Dense(n, 7), LeakyReLU(0.1), Dense(7, 6), Sigmoid(), Dense(6, 7), GELU(), Dense(7, 6), GELU("tanh")),
            *(Dense(6, 6), Tanh(), Sigmoid(), GELU(), Dropout(0.2), Dense(6, k)),
        ],
        "no parameters first": [Tanh(), Dropout(0.2), Dense(n, 6), Dropout(0.2), Dropout(0.3), Dense(6, k)],
        "norm first": [BatchNorm(n), Dense(n, 5, bias=False), BatchNorm(5), GELU(), Dense(5, k)],
        "activation last": [Dense(n, 6), Sigmoid(), Dense(6, k), Tanh()],
        "dropout last": [Dense(n, 6), Dense(6, k), ReLU(), Dropout(0.1)],
        "own layer": [Scale(), Dense(n, 6), Scale(), Tanh(), Scale(), Scale(), Dense(6, k), Scale()],
    }


every_stack = pytest.mark.parametrize("stack", stacks(5, 3))
every_loss = every("loss", [*LOSSES], ["softmax_cross_entropy", "sigmoid_cross_entropy", "mse", "svm"])


def test_the_stacks_hold_every_layer() -> None:
    met = {type(layer) for layers in stacks(5, 3).values() for layer in layers}
    assert met == {Dense, BatchNorm, Dropout, Scale, *ACTIVATIONS.values()} - {Step}


def targets(loss: str, draw: np.random.Generator, rows: int, outputs: int) -> np.ndarray:
    if loss in OF_LABELS:
        return draw.integers(0, outputs, rows)
    if loss in ("hinge", "squared_hinge"):
        return draw.integers(0, 2, (rows, outputs))
    return draw.normal(size=(rows, outputs)) if loss == "mse" else draw.random((rows, outputs))


def build(stack: str, loss: str, **options) -> Network:
    options = {"l2": 0.01, "backend": "cpu", "dtype": "float64", "seed": 3, **options}
    net = Network(stacks(5, 3)[stack], loss, **options)
    draw = np.random.default_rng(8)  # biases that are not zero, and running statistics that are not the first ones
    for view in (*net.parameters.values(), *net.buffers.values()):
        view += net.backend.asarray(draw.uniform(0, 0.3, view.shape), net.dtype)
    return net


# --- gradients -------------------------------------------------------------------------------------------------------


@every_loss
@every_stack
def test_gradients_are_central_differences(stack, loss, rng) -> None:
    net, h = build(stack, loss), 1e-5
    X, Y = rng.normal(size=(6, 5)), targets(loss, rng, 6, 3)
    numeric = np.empty(net.parameters.size)
    for i in range(numeric.size):
        middle = net.parameters.flat[i]
        net.parameters.flat[i] = middle + h
        above = net.loss(X, Y, training=True)
        net.parameters.flat[i] = middle - h
        below = net.loss(X, Y, training=True)
        net.parameters.flat[i] = middle
        numeric[i] = (above - below) / (2 * h)
    same = net.loss(X, Y, training=True)
    value, grads = net.loss_and_grad(X, Y)
    assert value == same
    assert grads is net.parameters.grads
    assert np.linalg.norm(grads.flat - numeric) <= 1e-6 * np.linalg.norm(numeric)
    for name, gradient in grads.items():  # and each by itself; a bias before batch norm has none but rounding
        part = numeric[net_slice(net, name)]
        noise = 4 * np.finfo(np.float64).eps * abs(value) / h * part.size**0.5
        assert np.linalg.norm(gradient.reshape(-1) - part) <= 1e-6 * np.linalg.norm(part) + noise, name


def net_slice(net: Network, name: str) -> slice:
    start = 0
    for other, view in net.parameters.items():
        if other == name:
            return slice(start, start + view.size)
        start += view.size
    raise KeyError(name)


def test_nothing_below_a_step_learns(rng) -> None:
    net = Network([Dense(4, 5), Step(), Dense(5, 3)], backend="cpu", dtype="float64")
    grads = net.loss_and_grad(rng.normal(size=(6, 4)), rng.integers(0, 3, 6))[1]
    assert not grads["W1"].any()
    assert not grads["b1"].any()
    assert grads["W2"].any()


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "sigmoid", "tanh", "gelu"])
@pytest.mark.parametrize("batch_norm", [False, True])
def test_a_whole_mlp_agrees_with_pytorch(activation, batch_norm, rng) -> None:
    torch = peer("torch")
    nn = torch.nn
    names = {"relu": nn.ReLU, "leaky_relu": nn.LeakyReLU, "sigmoid": nn.Sigmoid, "tanh": nn.Tanh, "gelu": nn.GELU}
    sizes, l2 = [12, 9, 8, 4], 0.03
    net = mlp(sizes, activation, batch_norm, l2=l2, backend="cpu", dtype="float64", seed=1)
    modules, linears, norms = [], [], []
    for i in (1, 2, 3):
        linears.append(nn.Linear(sizes[i - 1], sizes[i], bias=i == 3 or not batch_norm, dtype=torch.float64))
        with torch.no_grad():
            linears[-1].weight.copy_(torch.tensor(net.parameters[f"W{i}"].T.copy()))
            if linears[-1].bias is not None:
                linears[-1].bias.copy_(torch.tensor(net.parameters[f"b{i}"].copy()))
        modules.append(linears[-1])
        if i < 3:
            if batch_norm:
                norms.append(nn.BatchNorm1d(sizes[i], dtype=torch.float64))
                modules.append(norms[-1])
            modules.append(names[activation]())
    model = nn.Sequential(*modules)
    close = {"rtol": 1e-10, "atol": 1e-13}
    for rows in (20, 20, 7):
        X, Y = rng.normal(size=(rows, 12)), rng.integers(0, 4, rows)
        model.zero_grad()
        expected = nn.functional.cross_entropy(model(torch.tensor(X)), torch.tensor(Y))
        expected = expected + l2 / 2 * sum((linear.weight**2).sum() for linear in linears)
        expected.backward()
        value, grads = net.loss_and_grad(X, Y)
        np.testing.assert_allclose(value, expected.item(), rtol=1e-12)
        for i, linear in enumerate(linears, 1):
            np.testing.assert_allclose(grads[f"W{i}"], linear.weight.grad.numpy().T, **close)
            assert (linear.bias is None) == (f"b{i}" not in grads)
            if linear.bias is not None:
                np.testing.assert_allclose(grads[f"b{i}"], linear.bias.grad.numpy(), **close)
        for i, norm in enumerate(norms, 1):
            np.testing.assert_allclose(grads[f"gamma{i}"], norm.weight.grad.numpy(), **close)
            np.testing.assert_allclose(net.buffers[f"running_var{i}"], norm.running_var.numpy(), **close)
    model.eval()
    np.testing.assert_allclose(net.scores(X), model(torch.tensor(X)).detach().numpy(), **close)


def test_l2_counts_weights_alone(backend, dtype, tolerance, rng) -> None:
    X = backend.asarray(rng.normal(size=(8, 300)), dtype)
    Y = backend.asarray(rng.integers(0, 4, 8))
    nets = [mlp([300, 120, 4], batch_norm=True, l2=l2, backend=backend, dtype=dtype) for l2 in (0.0, 0.5)]
    for net in nets:
        net.parameters["beta1"] = 3.0
    (plain, grads), (value, penalised) = (net.loss_and_grad(X, Y) for net in nets)
    weights = {name: backend.to_numpy(nets[0].parameters[name]) for name in ("W1", "W2")}
    assert value - plain == pytest.approx(0.25 * sum((w.astype("f8") ** 2).sum() for w in weights.values()), rel=1e-4)
    assert nets[1].loss(X, Y) - nets[0].loss(X, Y) == pytest.approx(value - plain, rel=1e-4)
    for name in grads:  # W1 is larger than one block of the in-place addition
        extra = 0.5 * weights[name] if name in weights else 0.0
        np.testing.assert_allclose(backend.to_numpy(penalised[name] - grads[name]), extra, **tolerance)


# --- the workspace ---------------------------------------------------------------------------------------------------


@every_stack
@settings(deadline=None, max_examples=30)
@given(sizes=st.lists(st.integers(2, 40), min_size=2, max_size=6))
def test_any_batch_runs_as_in_a_network_of_its_own(stack, sizes) -> None:
    """A short last batch, growing and shrinking: a used workspace gives the same results as a new one."""
    draw = np.random.default_rng(sizes)
    net = build(stack, "softmax_cross_entropy", dtype="float32")
    for rows in sizes:
        X, Y = draw.normal(size=(rows, 5)).astype(np.float32), draw.integers(0, 3, rows)
        fresh = build(stack, "softmax_cross_entropy", dtype="float32")
        fresh.load_state_dict(net.state_dict())
        (value, grads), (expected, other) = net.loss_and_grad(X, Y), fresh.loss_and_grad(X, Y)
        assert value == expected
        np.testing.assert_array_equal(grads.flat, other.flat)
        np.testing.assert_array_equal(net.buffers.flat, fresh.buffers.flat)
        np.testing.assert_array_equal(net.scores(X), fresh.scores(X))
    assert core_of(net).planned == max(sizes)


def everything(n: int) -> list[Layer]:
    """A stack of all layers, of one width."""
    return [
        *(Dense(n, n), BatchNorm(n), ReLU(), Dropout(0.3), Dense(n, n), LeakyReLU(), Dense(n, n), GELU()),
        *(Dense(n, n), GELU("tanh"), Sigmoid(), Tanh(), Step(), Dense(n, n)),
    ]


@pytest.mark.parametrize(("rows", "width"), [(60_000, 4), (20, 300)], ids=["long", "wide"])
@pytest.mark.parametrize(
    ("loss", "form"),
    [
        ("softmax_cross_entropy", "labels"),
        ("mse", "rows"),
        pytest.param("softmax_cross_entropy", "rows", marks=pytest.mark.exhaustive),
        pytest.param("sigmoid_cross_entropy", "rows", marks=pytest.mark.exhaustive),
        pytest.param("svm", "labels", marks=pytest.mark.exhaustive),
    ],
)
def test_a_second_step_allocates_no_array(loss, form, rows, width, dtype, rng) -> None:
    net = Network(everything(width), loss, l2=0.1, backend="cpu", dtype=dtype)
    for size in (rows, rows - 1):  # the full batch and a short one
        X = rng.normal(size=(size, width)).astype(dtype)
        Y = rng.random((size, width)) if form == "rows" else rng.integers(0, width, size, dtype=np.int32)
        net.loss_and_grad(X, Y)
        gc.collect()
        gc.disable()
        try:
            tracemalloc.start()
            net.loss_and_grad(X, Y)
            start = tracemalloc.get_traced_memory()[0]
            tracemalloc.reset_peak()
            net.step_loss(X, Y)
            net.loss_and_grad(X, Y)
            highest = tracemalloc.get_traced_memory()[1]
            arrays = tracemalloc.DomainFilter(True, np.lib.tracemalloc_domain)
            left = tracemalloc.take_snapshot().filter_traces([arrays]).traces
        finally:
            tracemalloc.stop()
            gc.enable()
        assert len(left) == 0
        # NumPy's ufuncs convert types in buffers of 8192 elements, 136 kB at most, whatever the size of the arrays. One
        # number for each of the 60,000 rows, or one matrix of weights, would be at least 240 kB.
        assert highest - start < 200_000
    assert core_of(net).planned == rows


@every_loss
@every_stack
def test_no_call_writes_over_what_it_reads(stack, loss) -> None:
    """NumPy copies overlapping inputs and outputs, which would hide an error; CuPy does not."""
    net = build(stack, loss)
    net.reserve(40)
    core = core_of(net)
    for rows, training in [(40, True), (13, True), (1024, False), (13, False)]:
        run = (core._training if training else core._workspace(rows, core._evaluation_pass)).bind(rows)
        of_loss = {name: view for name, view in run.loss.work.items() if name != "l2"}  # used when all else is done
        x = np.empty((rows, 5))
        for i, (_, y, _, context) in enumerate(run.calls):
            same = core.stack[i].needs.in_place and x is y
            assert_apart({"y": y, **({} if same else {"x": x}), **context.work, **of_loss})
            x = y
        dy = of_loss.pop("dz")
        for i in range(len(run.calls) - 1, core.first - 1, -1) if training else ():
            (_, y, dx, context), needs = run.calls[i], core.stack[i].needs
            x = run.calls[i - 1][1] if i else np.empty((rows, 5))
            read = {name: array for name, array in (("x", x), ("y", y)) if name in needs.reads}
            same = dx is None or (needs.in_place and dx is dy)
            assert_apart({"dy": dy, **({} if same else {"dx": dx}), **read, **context.work, **of_loss})
            dy = dx


def assert_apart(arrays: dict[str, np.ndarray]) -> None:
    overlaps = [(a, b) for a, b in itertools.combinations(arrays, 2) if np.may_share_memory(arrays[a], arrays[b])]
    assert not overlaps


def test_memory_is_known_before_it_is_allocated(dtype, rng) -> None:
    used = Network(everything(64), backend="cpu", dtype=dtype)  # NumPy's generators and the registers of formulas
    used.loss_and_grad(np.zeros((200, 64), dtype), np.zeros(200, int))  # are the process's, made on first use
    used.loss(np.zeros((1500, 64), dtype), np.zeros(1500, int))
    del used
    tracemalloc.start()
    try:
        net = Network(everything(64), l2=0.1, backend="cpu", dtype=dtype)
        foretold = net.memory(200)
        assert core_of(net).planned == 0
        net.reserve(200)
        net.loss_and_grad(np.zeros((200, 64), dtype), np.zeros(200, int))
        net.loss(np.zeros((1500, 64), dtype), np.zeros(1500, int))
        arrays = tracemalloc.DomainFilter(True, np.lib.tracemalloc_domain)
        taken = sum(t.size for t in tracemalloc.take_snapshot().filter_traces([arrays]).traces)
    finally:
        tracemalloc.stop()
    assert taken == foretold


def test_memory_is_told_by_part() -> None:
    net = Network(everything(64), l2=0.1, backend="cpu")
    parts = net.memory_parts(200)
    assert net.memory(200) == sum(parts.values())
    assert parts["parameters"] == parts["gradients"] == 4 * net.parameters.size
    assert parts["running statistics"] == 2 * 4 * net.buffers.size
    fewer = net.memory_parts(200, evaluated=300)
    assert {name for name in parts if parts[name] != fewer[name]} == {"workspace of evaluation"}
    net.loss(np.zeros((300, 64), np.float32), np.zeros(300, int))
    held = core_of(net)._evaluation.workspace.nbytes
    assert fewer["workspace of evaluation"] == held < parts["workspace of evaluation"]
    assert net.memory_parts(200, 0)["workspace of evaluation"] == 0
    assert net.memory_parts(200, 10**9) == parts


def test_a_narrow_layer_takes_no_wide_place() -> None:
    net = mlp([8, 1000, 8, 1000, 8], backend="cpu")
    wide, narrow = 4 * 1000 * 500, 4 * 8 * 500
    more = wide // 4 + 6 * narrow + 64 * 1000 * 4  # NumPy's mask of positive numbers, and partial sums
    kept = 2 * (wide + narrow)  # the outputs; the gradient of each in its turn
    assert kept + wide + narrow <= core_of(net).workspace_bytes(500, True) <= kept + wide + more
    assert wide + narrow <= core_of(net).workspace_bytes(500, False) <= wide + more


def test_a_network_is_made_in_little_more_than_its_parameters() -> None:
    Network([Dense(3, 7)], backend="cpu")  # so that no module is imported below
    tracemalloc.start()
    try:
        net = Network([Dense(3000, 700, init="he")], backend="cpu", seed=9)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2.2 * net.parameters.flat.nbytes  # with the gradients
    draw = np.random.Generator(np.random.Philox(key=np.array([9, 0], np.uint64)))
    expected = draw.normal(0, math.sqrt(2 / 3000), (3000, 700))
    np.testing.assert_array_equal(net.parameters["W1"], expected.astype(np.float32))


@pytest.mark.parametrize("first", [kind.__name__ for kind in (*ACTIVATIONS.values(), BatchNorm, Dropout)])
def test_the_first_layer_takes_x_by_columns(first, dtype, rng) -> None:
    """Compiled kernels decline non-contiguous arrays: NumPy then needs scratch."""
    layers = {"BatchNorm": [BatchNorm(7)], "Dropout": [Dropout(0.3)]}
    layer = layers.get(first) or [kind() for kind in ACTIVATIONS.values() if kind.__name__ == first]
    X, Y = rng.normal(size=(40, 7)).astype(dtype), rng.integers(0, 3, 40)
    found = []
    for x in (X, np.asfortranarray(X)):
        net = Network([*layer, Dense(7, 3)], backend="cpu", dtype=dtype)
        loss, grads = net.loss_and_grad(x, Y)
        found.append(np.array([loss, net.loss(x, Y), *grads.flat]))
    np.testing.assert_allclose(found[0], found[1], rtol=64 * np.finfo(dtype).eps, atol=64 * np.finfo(dtype).eps)


def test_many_outputs_are_compared_in_pieces(rng) -> None:
    net = mlp([6, 1000], loss="sigmoid_cross_entropy", backend="cpu")
    X, Y = rng.normal(size=(1500, 6)).astype(np.float32), rng.integers(0, 2, (1500, 1000)).astype(np.float32)
    net.loss(X, Y)
    tracemalloc.start()
    try:
        accuracy = net.evaluate(X, Y)[1]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert accuracy == ((net.scores(X) > 0) == (Y > 0.5)).mean()
    assert peak < 1e6  # one number of a byte for each output of 1024 rows


def test_memory_grows_with_the_batch_by_what_a_row_takes() -> None:
    net = mlp([784, 512, 256, 10], backend="cpu")
    a_row = (net.memory(4096) - net.memory(2048)) / 2048
    # Outputs of three layers and gradients of two at least; scratch and the loss's own arrays beyond that.
    assert 4 * (512 + 256 + 10 + 512 + 256) <= a_row <= 4 * (512 + 256 + 10 + 512 + 512) + 512 + 256


def test_planning_grows_and_never_shrinks() -> None:
    net = mlp([4, 3, 2], backend="cpu")
    assert [net.reserve(n) or core_of(net).planned for n in (8, 3, 20)] == [8, 8, 20]
    net.scores(np.zeros((5000, 4), np.float32))
    assert core_of(net).planned == 20


def test_many_batch_sizes_do_not_fill_the_memory_with_views(rng) -> None:
    net = mlp([4, 3, 2], backend="cpu")
    X, Y = rng.normal(size=(60, 4)).astype(np.float32), rng.integers(0, 2, 60)
    for n in range(60, 0, -1):
        net.step_loss(X[:n], Y[:n])
    assert len(core_of(net)._training._bound) == workspace.SIZES_KEPT


@every_loss
def test_step_loss_is_the_loss_as_an_array(loss, backend, dtype, rng) -> None:
    X, Y = backend.asarray(rng.normal(size=(6, 5)), dtype), backend.asarray(targets(loss, rng, 6, 3))
    nets = [build("norm and dropout", loss, backend=backend, dtype=dtype) for _ in range(2)]
    for _ in range(3):
        value = nets[0].step_loss(X, Y)
        assert backend.owns(value)
        assert (value.shape, value.dtype) == ((1,), dtype)
        assert value.item() == nets[1].loss_and_grad(X, Y)[0]
        assert bool((nets[0].parameters.grads.flat == nets[1].parameters.grads.flat).all())
    assert core_of(nets[0]).dropout_step == core_of(nets[1]).dropout_step == 3


# --- evaluation ------------------------------------------------------------------------------------------------------


@every_loss
@every_stack
def test_evaluation_in_pieces_is_evaluation_at_once(stack, loss, rng) -> None:
    X, Y = rng.normal(size=(50, 5)), targets(loss, rng, 50, 3)
    whole, pieces = build(stack, loss), build(stack, loss)
    expected = whole.loss(X, Y), whole.scores(X)
    assert pieces.evaluate(X, Y, 7)[0] == pytest.approx(expected[0], rel=1e-12)
    scores = [run.scores.copy() for _, run in core_of(pieces).evaluate(X, 7)]
    assert [len(part) for part in scores] == 7 * [7] + [1]
    np.testing.assert_allclose(np.concatenate(scores), expected[1], rtol=1e-12)


def test_evaluation_neither_drops_nor_moves_anything(rng) -> None:
    net = build("norm and dropout", "softmax_cross_entropy")
    X, Y = rng.normal(size=(9, 5)), rng.integers(0, 3, 9)
    net.loss_and_grad(X, Y)
    before, grads = net.state_dict(), net.parameters.grads.flat.copy()
    evaluated, training = net.loss(X, Y), net.loss(X, Y, training=True)
    assert evaluated == net.loss(X, Y) != training
    net.predict(X), net.accuracy(X, Y), net.scores(X[:4])
    after = net.state_dict()
    for kind in ("parameters", "buffers"):
        for name, value in before[kind].items():
            np.testing.assert_array_equal(after[kind][name], value)
    assert after["dropout_step"] == before["dropout_step"] == 1
    np.testing.assert_array_equal(net.parameters.grads.flat, grads)
    assert net.loss_and_grad(X, Y)[0] == training, "the loss of the step to come"


@pytest.mark.parametrize("loss", OF_LABELS)
def test_predictions_of_classes(loss, backend, dtype) -> None:
    net = Network([Dense(3, 3, init="zeros")], loss, backend=backend, dtype=dtype)
    net.parameters["W1"] = backend.asarray(np.eye(3), dtype)
    X = backend.asarray(np.array([[1, 2, 3], [3, 2, 1], [0, 5, 0], [0, 0, 1]]), dtype)
    found = net.predict(X)
    assert (found.dtype, backend.to_numpy(found).tolist()) == (np.int64, [2, 0, 1, 2])
    assert net.accuracy(X, backend.asarray(np.array([2, 0, 1, 0]))) == 0.75
    if loss == "softmax_cross_entropy":
        assert net.accuracy(X, backend.asarray(np.eye(3)[[2, 1, 1, 0]])) == 0.5


def test_predictions_of_yes_and_no() -> None:
    X = np.array([[1.0, -1], [-2, 3], [1, 1], [-1, -1]], np.float32)
    both = Network([Dense(2, 2, init="zeros")], "sigmoid_cross_entropy", backend="cpu")
    both.parameters["W1"] = np.eye(2)
    assert both.predict(X).tolist() == [[1, 0], [0, 1], [1, 1], [0, 0]]
    assert both.accuracy(X, np.array([[1, 0], [0, 1], [1, 0], [1, 0]])) == 0.75
    one = Network([Dense(2, 1, init="zeros")], "sigmoid_cross_entropy", backend="cpu")
    one.parameters["W1"] = np.array([[1.0], [0.0]])
    assert one.predict(X).tolist() == [1, 0, 1, 0]
    assert one.accuracy(X, np.array([1, 0, 0, 0])) == one.accuracy(X, np.array([[1.0], [0], [0], [0]])) == 0.75


def test_predictions_of_numbers() -> None:
    net = Network([Dense(2, 1, init="zeros")], "mse", backend="cpu")
    net.parameters["b1"] = 7.0
    np.testing.assert_array_equal(net.predict(np.zeros((3, 2), np.float32)), np.full(3, 7))
    two = Network([Dense(2, 2, init="zeros")], "mse", backend="cpu")
    assert two.predict(np.zeros((3, 2), np.float32)).shape == (3, 2)
    with pytest.raises(ArgumentError, match="accuracy needs a classification loss, and mse is none"):
        net.accuracy(np.zeros((3, 2), np.float32), np.zeros(3))


# --- construction and state ------------------------------------------------------------------------------------------


def test_parameters_are_numbered_for_each_kind() -> None:
    net = mlp([6, 5, 4, 3], batch_norm=True, dropout=0.2, backend="cpu")
    assert [type(layer) for layer in net.layers] == [Dense, BatchNorm, ReLU, Dropout] * 2 + [Dense]
    assert net.parameters.shapes == {
        "W1": (6, 5),
        "gamma1": (5,),
        "beta1": (5,),
        "W2": (5, 4),
        "gamma2": (4,),
        "beta2": (4,),
        "W3": (4, 3),
        "b3": (3,),
    }
    assert list(net.buffers) == ["running_mean1", "running_var1", "running_mean2", "running_var2"]
    assert net.parameters["gamma2"].tolist() == [1] * 4
    assert net.buffers["running_var1"].tolist() == [1] * 5
    assert not net.buffers["running_mean1"].any()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_networks_of_version_0_1(activation) -> None:
    net = mlp([600, 500, 400], activation, True, backend="cpu", init="v0.1")
    assert type(net.layers[2]) is ACTIVATIONS[activation]
    hidden = 2 / 600 if activation in ("relu", "leaky_relu", "gelu") else 2 / 1100
    assert net.parameters["W1"].var() == pytest.approx(hidden, rel=0.02)
    assert net.parameters["W2"].var() == pytest.approx(2 / 900, rel=0.02)
    assert net.parameters.shapes["b1"] == (500,)
    assert not net.parameters["b1"].any()


CLASSES = [*OF_LABELS, "kl_divergence", "sigmoid_cross_entropy", "focal", "hinge", "squared_hinge"]
OF_NUMBERS = ["mse", "mae", "huber", "log_cosh", "quantile", "poisson"]
# Of 600-500-400-300 by loss: the bounds of W3; those of the other weights and of all biases do not depend on it.
AUTO = {**dict.fromkeys(CLASSES, 1.5 * math.sqrt(6 / 700)), **dict.fromkeys(OF_NUMBERS, 400**-0.5)}


@pytest.mark.parametrize("loss", AUTO)
def test_first_weights_depend_on_the_loss(loss) -> None:
    assert AUTO.keys() == LOSSES.keys()
    bounds = {f"b{i}": inputs**-0.5 for i, inputs in enumerate([600, 500, 400], 1)}
    bounds |= {"W1": math.sqrt(8 / 3 / 1100), "W2": math.sqrt(8 / 3 / 900), "W3": AUTO[loss]}
    net = mlp([600, 500, 400, 300], loss=loss, backend="cpu")
    for name, values in net.parameters.items():
        assert bounds[name] * 0.95 <= abs(values).max() <= bounds[name]
        assert values.var() == pytest.approx(bounds[name] ** 2 / 3, rel=0.15)


def test_the_last_dense_layer_is_the_last() -> None:
    """Whatever comes after it; one whose init is given takes no place from it."""
    layers = [Dense(300, 300), ReLU(), Dense(300, 300, init=1.0), ReLU(), Dense(300, 200), Dropout(0.1)]
    p = Network(layers, "mse", backend="cpu").parameters
    found = [p[name].var() for name in ("W1", "W2", "W3")]
    np.testing.assert_allclose(found, [8 / 9 / 600, 1, 1 / 900], rtol=0.02)


def test_every_layer_has_the_init_that_mlp_is_given() -> None:
    for init in (*INITS, 0.5):
        layers = [layer for layer in mlp([5, 4, 3], backend="cpu", init=init).layers if isinstance(layer, Dense)]
        assert [layer.init for layer in layers] == [init, init]
    with pytest.raises(ArgumentError, match=r"init must be one of .*'v0\.1', got 'glorot'"):
        mlp([5, 4, 3], backend="cpu", init="glorot")


def test_the_seed_alone_decides_the_first_weights(backend) -> None:
    def weights(**options) -> np.ndarray:
        return backend.to_numpy(mlp([5, 4, 3], backend=backend, **options).parameters.flat)

    def draw(place: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(key=[4, place]))

    for init in ("auto", "v0.1"):
        np.testing.assert_array_equal(weights(seed=4, init=init), weights(seed=4, init=init))
        double = weights(seed=4, init=init, dtype="float64")
        np.testing.assert_array_equal(weights(seed=4, init=init), double.astype(np.float32))
        assert not (double[:20] == weights(seed=5, init=init)[:20]).any()
    first, third = draw(0).normal(0, math.sqrt(2 / 5), 20), draw(2).normal(0, math.sqrt(2 / 7), 12)
    expected = np.concatenate([first, np.zeros(4), third, np.zeros(3)])
    np.testing.assert_array_equal(weights(seed=4, dtype="float64", init="v0.1"), expected)
    first, third = draw(0), draw(2)
    expected = [
        *(math.sqrt(8 / 3 / 9) * first.uniform(-1, 1, 20), math.sqrt(1 / 5) * first.uniform(-1, 1, 4)),
        *(1.5 * math.sqrt(6 / 7) * third.uniform(-1, 1, 12), math.sqrt(1 / 4) * third.uniform(-1, 1, 3)),
    ]
    np.testing.assert_allclose(weights(seed=4, dtype="float64"), np.concatenate(expected), rtol=1e-12)


def test_large_matrices_are_drawn_in_parts_as_in_one() -> None:
    net = Network([Dense(1100, 90, init="pytorch")], "mse", backend="cpu", dtype="float64")
    draw = np.random.Generator(np.random.Philox(key=[0, 0]))
    expected = [draw.uniform(-1, 1, shape) / math.sqrt(1100) for shape in [(1100, 90), 90]]
    for name, value in zip(["W1", "b1"], expected, strict=True):
        np.testing.assert_allclose(net.parameters[name], value, rtol=1e-14, atol=1e-17)


def test_a_network_with_output_bias_predicts_it(backend, rng) -> None:
    """With weights of 0 in the last layer, the loss is the variance of the targets."""
    Y = rng.normal([20, -3], [5, 1], size=(40, 2))
    net = mlp([6, 5, 2], loss="mse", backend=backend, dtype="float64", output_bias=Y.mean(axis=0))
    net.parameters["W2"] = 0.0
    X = backend.asarray(rng.normal(size=(40, 6)))
    np.testing.assert_allclose(backend.to_numpy(net.predict(X)), np.tile(Y.mean(axis=0), (40, 1)))
    assert net.loss(X, backend.asarray(Y)) == pytest.approx(Y.var(axis=0).mean())
    one = mlp([6, 5, 1], loss="mse", backend="cpu", output_bias=Y[:, :1].mean(axis=0))
    assert one.parameters["b2"].tolist() == pytest.approx([Y[:, 0].mean()])


def test_state_goes_round_and_training_goes_on_exactly(backend, rng) -> None:
    X, Y = backend.asarray(rng.normal(size=(9, 5))), backend.asarray(rng.integers(0, 3, 9))
    first = build("norm and dropout", "softmax_cross_entropy", backend=backend)
    first.loss_and_grad(X, Y)
    state = first.state_dict()
    on_host = {kind: {n: backend.to_numpy(a) for n, a in state[kind].items()} for kind in ("parameters", "buffers")}
    second = Network(first.layers, backend=backend, dtype="float64", l2=0.01, seed=3)
    second.load_state_dict({**on_host, "dropout_step": state["dropout_step"]})
    expected = first.loss_and_grad(X, Y)[0]
    assert second.loss_and_grad(X, Y)[0] == expected
    assert bool((first.parameters.grads.flat == second.parameters.grads.flat).all())
    assert bool((first.buffers.flat == second.buffers.flat).all())
    assert not bool((state["buffers"]["running_mean1"] == first.buffers["running_mean1"]).all()), "state holds copies"


@pytest.mark.parametrize(
    ("name", "value", "remedy"),
    [
        ("parameters", {}, r"net.parameters\[name\] = values"),
        ("dtype", "float64", "make another network"),
        ("loss", "mse", "loss is a method; give the argument when the network is made"),
        ("training", False, "fit and loss_and_grad train, all else evaluates"),
    ],
)
def test_what_is_assigned_to_a_network_in_vain_is_told(name, value, remedy) -> None:
    net = build("relu", "softmax_cross_entropy")
    with pytest.raises(ArgumentError, match=f"^net.{name} = .* changes nothing: {remedy}"):
        setattr(net, name, value)
    net.notes = "of mine"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("buffers"), r"state must hold .*missing \['buffers'\]"),
        (lambda s: s["parameters"].pop("W1"), r"parameters must hold W1, .*missing \['W1'\], unknown \[\]"),
        (lambda s: s["parameters"].update(w=1), r"unknown \['w'\]"),
        (lambda s: s["parameters"].update(b1=np.zeros(9)), r"b1 has shape \(7,\), the state's has \(9,\)"),
        (lambda s: s.update(dropout_step=-1), "dropout_step must be an integer .* got -1"),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(change, message) -> None:
    net = build("relu", "softmax_cross_entropy")
    state, before = net.state_dict(), net.parameters.flat.copy()
    for value in state["parameters"].values():
        value += 1
    change(state)
    with pytest.raises(ArgumentError, match=message):
        net.load_state_dict(state)
    np.testing.assert_array_equal(net.parameters.flat, before)


def test_float32_stays_float32(backend, rng) -> None:
    net = Network(everything(64), l2=0.1, backend=backend)
    X, Y = backend.asarray(rng.normal(size=(9, 64)), "float32"), backend.asarray(rng.integers(0, 64, 9))
    grads = net.loss_and_grad(X, Y)[1]
    arrays = [net.parameters.flat, grads.flat, net.buffers.flat, net.scores(X), net.step_loss(X, Y)]
    assert {a.dtype for a in arrays} == {np.dtype("float32")}
    for _, y, dx, context in core_of(net)._training.bind(9).calls:
        places = [y, *([] if dx is None else [dx]), *context.p.values(), *context.work.values()]
        assert {a.dtype for a in places} <= {np.dtype("float32"), np.dtype(bool)}


# --- bad input -------------------------------------------------------------------------------------------------------

GOOD_X, GOOD_Y = np.zeros((4, 5), np.float32), np.array([0, 1, 2, 0])


@pytest.mark.parametrize(
    ("X", "Y", "error", "message"),
    [
        (GOOD_X[:, :4], GOOD_Y, ShapeError, r"X has 4 features, layer 1 \(Dense\) takes 5"),
        (GOOD_X[0], GOOD_Y, ShapeError, r"X must have shape \(batch, 5\), got \(5,\); a single sample is X\[None\]"),
        (GOOD_X[None], GOOD_Y, ShapeError, r"X must have shape \(batch, 5\), got \(1, 4, 5\)"),
        (GOOD_X[:0], GOOD_Y[:0], ShapeError, "X must have at least one row"),
        (GOOD_X, GOOD_Y[:3], ShapeError, "X has 4 rows, Y has 3"),
        (np.ma.masked_array(GOOD_X, GOOD_X == 0), GOOD_Y, NonFiniteError, "X must have a value everywhere"),
        (GOOD_X, GOOD_Y + 1, ArgumentError, "Y must hold labels from 0 to 2, got 3"),
        (GOOD_X, GOOD_Y - 1, ArgumentError, "Y must hold labels from 0 to 2, got -1"),
        (GOOD_X, GOOD_Y + 0.5, DTypeError, "integer labels"),
    ],
)
def test_bad_batches_are_named(X, Y, error, message) -> None:
    net = mlp([5, 4, 3], backend="cpu")
    for call in (net.loss_and_grad, net.step_loss, net.loss, net.accuracy):
        with pytest.raises(error, match=message):
            call(X, Y)
    assert core_of(net).planned == 0 or "labels from" in message  # labels are compared where they are used
    assert core_of(net).dropout_step == 0


@pytest.mark.parametrize(
    ("X", "Y", "error", "message"),
    [
        (
            GOOD_X.astype("f8"),
            GOOD_Y,
            DTypeError,
            r"X has dtype float64, .* float32; convert it with X.astype\('float32'",
        ),
        (GOOD_X.astype("u1"), GOOD_Y, DTypeError, "scale=1/255"),
        (GOOD_X.tolist(), GOOD_Y, DeviceMismatchError, "X must be an array on 'cpu', got a list"),
        (GOOD_X, GOOD_Y.tolist(), DeviceMismatchError, "Y must be an array on 'cpu', got a list"),
    ],
)
def test_a_training_step_converts_nothing(X, Y, error, message) -> None:
    net = mlp([5, 4, 3], backend="cpu")
    for call in (net.loss_and_grad, net.step_loss):
        with pytest.raises(error, match=message):
            call(X, Y)


class Table:
    """What a data frame is to NumPy."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __array__(self, dtype: object = None, copy: bool | None = None) -> np.ndarray:
        return self.array


class Foreign:
    """An array of another library, which speaks DLPack."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __dlpack__(self, **options: object) -> object:
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.array.__dlpack_device__()


GIVEN = {
    "float64": lambda x: x.astype(np.float64),
    "float16": lambda x: x.astype(np.float16),
    "int64": lambda x: x.astype(np.int64),
    "bool": lambda x: x > 0,
    "lists": lambda x: x.tolist(),
    "a table": lambda x: Table(x.astype(np.float64)),
    "DLPack": lambda x: Foreign(x.astype(np.float64)),
}


@pytest.mark.parametrize("name", GIVEN)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_what_is_evaluated_is_converted(name: str, dtype: str) -> None:
    """As if X had been converted to the network's dtype before."""
    net = mlp([5, 4, 3], backend="cpu", dtype=dtype)
    X = np.round(GOOD_X * 4)
    X = (X > 0) if name == "bool" else X
    ready, given = X.astype(dtype), GIVEN[name](X)
    Y = GOOD_Y.tolist() if name == "lists" else GOOD_Y
    np.testing.assert_array_equal(net.scores(given), net.scores(ready))
    np.testing.assert_array_equal(net.predict(given), net.predict(ready))
    assert net.evaluate(given, Y) == net.evaluate(ready, GOOD_Y)
    assert net.accuracy(given, Y) == net.accuracy(ready, GOOD_Y)
    assert net.loss(given, Y) == net.loss(ready, GOOD_Y)
    assert net.loss(given, Y, training=True) == net.loss(ready, GOOD_Y, training=True)


def test_numbers_of_another_type_are_converted_on_their_device(backend: Backend) -> None:
    net = mlp([5, 4, 3], backend=backend)
    X = backend.asarray(GOOD_X.astype(np.float64))
    assert np.array_equal(backend.to_numpy(net.scores(X)), backend.to_numpy(net.scores(backend.asarray(GOOD_X))))
    if backend.name != "cpu":
        for other in (GOOD_X, GOOD_X.astype(np.float64), GOOD_X.tolist()):
            with pytest.raises(DeviceMismatchError, match="X must be an array on 'cuda:0', got a NumPy array"):
                net.predict(other)


class Sparse:
    """As SciPy's matrices are: with slices, too."""

    shape, dtype = GOOD_X.shape, GOOD_X.dtype

    def __getitem__(self, rows: slice) -> Sparse:
        return self

    def toarray(self) -> None: ...


UNFIT = {
    "bytes": (GOOD_X.astype("u1"), r"X has dtype uint8, as pixels have .*loader.to_batch\(X\)"),
    "a path": ("X.npy", r"got the path 'X.npy'; .*gb.sources.npy\('X.npy'\)"),
    "a pair": ((GOOD_X, GOOD_Y), "must be one array, got a pair of arrays"),
    "a dict": ({"X": 1}, "got a dict with the keys 'X'"),
    "a generator": ((x for x in GOOD_X), r"got a generator.* np.stack\(list\(X\)\)"),
    "sparse": (Sparse(), r"got a sparse Sparse; give X.toarray\(\)"),
    "words": ([["a"] * 5], r"dtype <U1; numbers for words are np.unique"),
    "complex": (GOOD_X.astype(complex), "got dtype complex"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_what_cannot_be_evaluated_is_told(name: str) -> None:
    X, message = UNFIT[name]
    with pytest.raises(DTypeError, match=message):
        mlp([5, 4, 3], backend="cpu").predict(X)


@pytest.mark.parametrize("name", ["a pair", "a dict", "a generator", "sparse", "words"])
def test_what_cannot_be_loaded_is_told_likewise(name: str) -> None:
    X, message = UNFIT[name]
    with pytest.raises(DTypeError, match=message):
        gb.Loader(X, GOOD_Y, backend="cpu")


def test_samples_of_one_feature_are_a_column() -> None:
    with pytest.raises(ShapeError, match=r"samples of one feature are X\[:, None\]"):
        mlp([1, 4, 3], backend="cpu").predict(np.zeros(7, np.float32))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: Network([Dense(784, 256), ReLU(), Dense(128, 10)]),
            ShapeError,
            r"layer 3 \(Dense\) takes 128 features, layer 2 \(ReLU\) gives 256",
        ),
        (lambda: Network([Dense(5, 3), "relu"]), DTypeError, "layer 2 is 'relu' of type str"),
        (lambda: Network([]), ArgumentError, "at least one layer with parameters"),
        (lambda: Network([ReLU()]), ArgumentError, "one layer with parameters, such as Dense"),
        (lambda: Network([Dense(5, 3)], "cross_entropy"), ArgumentError, "did you mean 'softmax_cross_entropy'"),
        (
            lambda: Network([Dense(5, 1)]),
            ArgumentError,
            "needs at least 2 outputs, .* gives 1; .*sigmoid_cross_entropy",
        ),
        (lambda: Network([Dense(5, 3)], l2=-1), ArgumentError, r"l2 must be finite and in \[0, inf\), got -1.0"),
        (
            lambda: Network([Dense(5, 3)], dtype="float16"),
            DTypeError,
            "dtype must be float32 or float64, got 'float16'",
        ),
        (lambda: Network([Dense(5, 3)], seed=-1), ArgumentError, "seed must be an integer between 0 and .* got -1"),
        (lambda: Network([Dense(5, 3)], backend="gpu"), ArgumentError, "backend must be .* got 'gpu'"),
        (lambda: mlp([5]), ArgumentError, r"sizes must be at least two integers, .* got \[5\]"),
        (lambda: mlp(5), ArgumentError, "sizes must be at least two integers, .* got 5"),
        (lambda: mlp([5, 0, 2]), ArgumentError, r"sizes\[1\] must be an integer >= 1, got 0"),
        (lambda: mlp([5, 4.5, 2]), DTypeError, r"sizes\[1\] must be an integer >= 1, got 4.5"),
        (lambda: mlp([5, 4, 2], "rely"), ArgumentError, "activation must be one of 'relu', .*did you mean 'relu'"),
        (lambda: mlp([5, 4, 2], dropout=1), ArgumentError, r"dropout must be finite and in \[0, 1\), got 1.0"),
        (lambda: mlp([5, 4, 2], batch_norm="yes"), DTypeError, "batch_norm must be True or False, got 'yes'"),
        (lambda: mlp([5, 2]).reserve(0), ArgumentError, "batch_size must be an integer >= 1, got 0"),
        (lambda: mlp([5, 2]).memory(1.5), DTypeError, "batch_size must be an integer >= 1, got 1.5"),
    ],
)
def test_bad_networks_are_named(make, error, message) -> None:
    with pytest.raises(error, match=message):
        make()


def test_two_classes_of_layers_with_one_name_for_a_parameter() -> None:
    class Other(Scale):
        pass

    with pytest.raises(ArgumentError, match=r"layer 1 \(Scale\) and layer 3 \(Other\) both name a parameter 's1'"):
        Network([Scale(), Dense(4, 3), Other()])


@pytest.mark.parametrize(
    ("spoil", "cause"),
    [
        (lambda net, X: X.__setitem__((2, 1), math.nan), "X holds NaN or infinity"),
        (lambda net, X: net.parameters.flat.__setitem__(3, math.inf), "the parameters hold NaN or infinity"),
        (lambda net, X: net.parameters.__setitem__("W1", 1e38), "lower the learning rate"),
    ],
)
def test_a_loss_that_is_not_finite_is_an_error_and_leaves_no_trace(spoil, cause, rng) -> None:
    net = mlp([5, 4, 3], batch_norm=True, dropout=0.1, backend="cpu")
    X, Y = rng.normal(size=(8, 5)).astype(np.float32), rng.integers(0, 3, 8)
    net.loss_and_grad(X, Y)
    buffers = net.buffers.flat.copy()
    spoil(net, X)
    with pytest.raises(
        NonFiniteError, match=rf"loss is (nan|inf) for a batch of shape \(8, 5\) after 1 steps; .*{cause}"
    ):
        net.loss_and_grad(X, Y)
    np.testing.assert_array_equal(net.buffers.flat, buffers)
    assert core_of(net).dropout_step == 1
    if "X" in cause:
        with pytest.raises(NonFiniteError, match=cause):
            net.loss(X, Y)


@pytest.mark.gpu
def test_a_batch_on_another_device(backend: Backend) -> None:
    if backend.name == "cpu":
        return
    net = mlp([5, 4, 3], backend=backend)
    with pytest.raises(DeviceMismatchError, match="X must be an array on 'cuda:0', got a NumPy array"):
        net.loss_and_grad(GOOD_X, GOOD_Y)


# --- summary ---------------------------------------------------------------------------------------------------------


def test_a_summary_is_a_table_of_eighty_columns() -> None:
    net = build("norm and dropout", "softmax_cross_entropy", dtype="float32")
    summary = net.summary()
    assert summary.parameters == net.parameters.size
    assert summary.bytes == net.parameters.flat.nbytes + net.buffers.flat.nbytes
    assert [row.outputs for row in summary.layers] == [7, 7, 7, 7, 8, 8, 8, 3][: len(summary.layers)]
    lines = str(summary).splitlines()
    assert max(map(len, lines)) <= 80
    assert len(lines) == len(net.layers) + 5
    assert lines[-2].split() == ["in", "all", f"{net.parameters.size:,}", f"{summary.bytes:,}"]
    assert lines[-1] == "5 inputs, loss softmax_cross_entropy, float32, cpu"
    assert repr(summary) == str(summary)
    assert summary._repr_html_().count("<tr>") == len(net.layers) + 2
    huge = str(gb.mlp([10, 20_000, 30, 10], batch_norm=True, dropout=0.5, activation="leaky_relu").summary())
    assert max(map(len, huge.splitlines())) <= 80
