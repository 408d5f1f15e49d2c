"""What a user's layer or loss gets wrong is told in gpubatch's words, with the name of the method."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import gpubatch as gb
from gpubatch.nn import core_of

X, Y = np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32), np.arange(6) % 3


class Scale(gb.Layer):
    """A sound layer: y = x v."""

    def takes(self) -> int | None:
        return None

    def needs(self, features: int) -> gb.Needs:
        return gb.Needs(features, {"v": gb.Parameter((features,), 1.0)})

    def forward(self, x: Any, y: Any, c: gb.Context) -> None:
        np.multiply(x, c.p["v"], out=y)

    def backward(self, x: Any, y: Any, dy: Any, dx: Any, c: gb.Context) -> None:
        c.g["v"][...] = (dy * x).sum(axis=0)
        if dx is not None:
            np.multiply(dy, c.p["v"], out=dx)


def layer(**methods: Any) -> gb.Layer:
    return type("Mine", (Scale,), methods)()  # type: ignore[no-any-return]


def network(middle: gb.Layer) -> gb.Network:
    return gb.Network([gb.Dense(5, 5), middle, gb.Dense(5, 3)], backend="cpu")


def needing(*arguments: Any, **named: Any) -> gb.Layer:
    return layer(needs=lambda self, n: gb.Needs(*(arguments or (n,)), **named))


P = gb.Parameter
FORWARD, BACKWARD = r"layer 2 \(Mine\)\.forward\(x, y, c\)", r"layer 2 \(Mine\)\.backward\(x, y, dy, dx, c\)"
NEEDS = r"layer 2 \(Mine\)\.needs\(5\)"


def rebinds(self: Any, x: Any, y: Any, c: Any) -> None:
    y = x * 2  # noqa: F841


def half(self: Any, x: Any, y: Any, c: Any) -> None:
    y[:3] = x[:3]


def rebinds_g(self: Any, x: Any, y: Any, dy: Any, dx: Any, c: Any) -> None:
    c.g["v"] = (dy * x).sum(axis=0)
    dx[...] = dy


def forgets_dx(self: Any, x: Any, y: Any, dy: Any, dx: Any, c: Any) -> None:
    c.g["v"][...] = 0
    dx = dy * 2  # noqa: F841


def changes_x(self: Any, x: Any, y: Any, dy: Any, dx: Any, c: Any) -> None:
    c.g["v"][...] = 0
    x *= 2
    dx[...] = dy


WRONG_LAYERS: dict[str, tuple[Callable[[], gb.Layer], type[Exception], str]] = {
    "takes a string": (
        lambda: layer(takes=lambda self: "5"),
        gb.DTypeError,
        r"layer 2 \(Mine\).takes\(\): its result must be an integer >= 1, got '5'",
    ),
    "needs a number": (
        lambda: layer(needs=lambda self, n: n),
        gb.DTypeError,
        f"{NEEDS}: it must return a gb.Needs, got 5",
    ),
    "needs fails": (
        lambda: layer(needs=lambda self, n: n.nothing),
        gb.ArgumentError,
        f"{NEEDS} raised AttributeError: 'int' object",
    ),
    "no outputs": (lambda: needing(0), gb.ArgumentError, f"{NEEDS}: outputs must be an integer >= 1, got 0"),
    "half an output": (lambda: needing(2.5), gb.DTypeError, f"{NEEDS}: outputs must be an integer >= 1, got 2.5"),
    "a list of parameters": (
        lambda: needing(parameters=["v"]),
        gb.DTypeError,
        f"{NEEDS}: parameters must be a mapping by names",
    ),
    "a shape for a parameter": (
        lambda: needing(parameters={"v": (5,)}),
        gb.DTypeError,
        rf"{NEEDS}: parameters\['v'\] must be a gb.Parameter, got \(5,\)",
    ),
    "a shape for a buffer": (
        lambda: needing(buffers={"v": (5,)}),
        gb.DTypeError,
        rf"{NEEDS}: buffers\['v'\] must be a gb.Parameter",
    ),
    "a number for a shape": (
        lambda: layer(needs=lambda self, n: gb.Needs(n, {"v": P(n)})),
        gb.DTypeError,
        f"{NEEDS}: shape must be a tuple of integers, got 5",
    ),
    "init in words": (
        lambda: layer(needs=lambda self, n: gb.Needs(n, {"v": P((n,), "ones")})),
        gb.DTypeError,
        f"{NEEDS}: init must be a number or a function .* got 'ones'",
    ),
    "init of another shape": (
        lambda: needing(parameters={"v": P((5,), lambda draw, shape: np.ones(6))}),
        gb.ShapeError,
        r"layer 2 \(Mine\): init of 'v': it must return an array of shape \(5,\), got \(6,\)",
    ),
    "init of one argument": (
        lambda: needing(parameters={"v": P((5,), lambda shape: np.ones(5))}),
        gb.ArgumentError,
        r"layer 2 \(Mine\): init of 'v' raised TypeError: .* takes 1 positional argument",
    ),
    "a shape for a space": (
        lambda: needing(kept={"t": (-1, 5)}),
        gb.DTypeError,
        rf"{NEEDS}: kept\['t'\] must be a pair \(shape, dtype\), .* got \(-1, 5\)",
    ),
    "a space of no dtype": (
        lambda: needing(scratch={"t": ((-1, 5), "floot")}),
        gb.DTypeError,
        rf"{NEEDS}: the dtype of scratch\['t'\] must be None, 'compute' or NumPy's, got 'floot'",
    ),
    "a space of -2 rows": (
        lambda: needing(scratch={"t": ((-2, 5), None)}),
        gb.ArgumentError,
        rf"{NEEDS}: the shape of scratch\['t'\]\[0\] must be an integer >= -1, got -2",
    ),
    "uses what there is not": (
        lambda: needing(uses=("batch_morn",)),
        gb.ArgumentError,
        f"{NEEDS}: uses must be one of .* got 'batch_morn'",
    ),
    "reads z": (lambda: needing(reads=("z",)), gb.ArgumentError, rf"{NEEDS}: reads must be .* got \('z',\)"),
    "another width in place": (
        lambda: needing(6, in_place=True),
        gb.ShapeError,
        f"{NEEDS}: with in_place=True it must give as many features as it takes, got 6",
    ),
    "more rows than there are": (
        lambda: layer(needs=lambda self, n: gb.Needs(n, least_rows=7)),
        gb.ArgumentError,
        r"layer 2 \(Mine\) needs least_rows=7 in a training batch, got 6",
    ),
    "forward rebinds y": (
        lambda: layer(forward=rebinds),
        gb.ArgumentError,
        rf"{FORWARD} must write y in place, as y\[...\] = values; 30 of 30 numbers were not written",
    ),
    "forward writes half of y": (lambda: layer(forward=half), gb.ArgumentError, f"{FORWARD} must .*; 15 of 30"),
    "forward of another shape": (
        lambda: layer(forward=lambda self, x, y, c: y.__setitem__(..., x[:, :2])),
        gb.ArgumentError,
        f"{FORWARD} raised ValueError: could not broadcast",
    ),
    "forward reads what is not there": (
        lambda: layer(forward=lambda self, x, y, c: c.work["t"]),
        gb.ArgumentError,
        f"{FORWARD} raised KeyError: 't'",
    ),
    "forward without c": (
        lambda: layer(forward=lambda self, x, y: None),
        gb.ArgumentError,
        f"{FORWARD} raised TypeError: .* takes 3 positional arguments but 4 were given",
    ),
    "backward rebinds a gradient": (
        lambda: layer(backward=rebinds_g),
        gb.ArgumentError,
        rf"{BACKWARD} must write c.g\['v'\] in place, .* 5 of 5 numbers were not written",
    ),
    "backward rebinds dx": (
        lambda: layer(backward=forgets_dx),
        gb.ArgumentError,
        f"{BACKWARD} must write dx in place, .* 30 of 30",
    ),
    "forward changes x": (
        lambda: layer(forward=lambda self, x, y, c: (c.xp.maximum(x, 0, out=x), y.__setitem__(..., x))),
        gb.ArgumentError,
        f"{FORWARD} must not change x, which others read; work on a copy$",
    ),
    "forward swaps two numbers of x": (
        lambda: layer(forward=lambda self, x, y, c: (x.__setitem__(0, x[0, ::-1].copy()), y.__setitem__(..., x))),
        gb.ArgumentError,
        f"{FORWARD} must not change x",
    ),
    "backward changes x": (
        lambda: layer(backward=changes_x),
        gb.ArgumentError,
        f"{BACKWARD} must not change x",
    ),
    "backward of another shape": (
        lambda: layer(backward=lambda self, x, y, dy, dx, c: dx.__setitem__(..., dy[:, :2])),
        gb.ArgumentError,
        f"{BACKWARD} raised ValueError: could not broadcast",
    ),
}


@pytest.mark.parametrize(("make", "error", "message"), WRONG_LAYERS.values(), ids=WRONG_LAYERS)
def test_what_is_wrong_with_a_layer_is_told(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}"):
        network(make()).loss_and_grad(X, Y)


def test_a_sound_layer_is_looked_at_once_for_each_batch_size(monkeypatch: pytest.MonkeyPatch) -> None:
    net, looked = network(Scale()), []
    from gpubatch.nn import checks

    monkeypatch.setattr(checks.Marks, "check", lambda marks, method: looked.append(method.partition("(x")[0][-8:]))
    for rows in (6, 6, 4, 6, 4):
        net.loss_and_grad(X[:rows], Y[:rows])
    assert looked == 2 * [".forward", "backward"]
    net.scores(X)
    assert looked[4:] == [".forward"]


def test_the_layer_in_the_docstring_is_sound() -> None:
    text = (gb.Layer.__doc__ or "").partition("        class ")
    found: dict[str, Any] = {"gb": gb}
    exec(textwrap.dedent(text[1] + text[2]), found)
    net = gb.Network([gb.Dense(5, 5), found["Scale"](), gb.Dense(5, 3)], backend="cpu", dtype="float64")
    checks = gb.explore.check_network(net, X.astype(np.float64), Y)
    assert set(checks) == {"W1", "b1", "s1", "W2", "b2"}
    assert all(check.ok for check in checks.values())


def spoils(self: Any, x: Any, y: Any, dy: Any, dx: Any, c: Any) -> None:
    Scale.backward(self, x, y, dy, dx, c)
    if dx is not dy:
        dy[...] = 1e6


@pytest.mark.parametrize("micro_batch_size", [None, 2])
def test_backward_may_work_in_dy(micro_batch_size: int | None) -> None:
    """Also where the layers around it keep dx and dy in the same memory, and as the first and the last one."""
    trained = []
    for kind in (Scale, type(layer(backward=spoils))):
        a, b, c, d = (kind() for _ in range(4))
        layers = [a, gb.Dense(5, 8), gb.BatchNorm(8), b, c, gb.Tanh(), gb.Dropout(0.3), gb.Dense(8, 4), d]
        net = gb.Network(layers, backend="cpu", seed=0, l2=0.1)
        opt = gb.Momentum(net.parameters, lr=0.1, groups={"W1": {"trainable": False}})
        gb.fit(net, gb.Loader(X, Y, batch_size=4, backend="cpu"), opt, epochs=3, progress=False)
        net.loss_and_grad(X, Y, micro_batch_size=micro_batch_size)
        trained.append(np.concatenate([net.parameters.flat, net.parameters.grads.flat]))
    np.testing.assert_array_equal(*trained)


def test_evaluation_looks_too() -> None:
    with pytest.raises(gb.ArgumentError, match=f"^{FORWARD} must write y in place"):
        network(layer(forward=rebinds)).scores(X)


def test_numbers_that_a_layer_wrote_are_kept() -> None:
    """A layer that works as Python reads it, and its twin of gpubatch's own operations."""
    net = network(Scale())
    expected = gb.Network([gb.Dense(5, 5), gb.Dense(5, 3)], backend="cpu")
    for name in ("W1", "b1", "W2", "b2"):
        expected.parameters[name] = net.parameters[name]
    (loss, grads), (other, others) = net.loss_and_grad(X, Y), expected.loss_and_grad(X, Y)
    assert loss == other
    for name in ("W1", "b1", "W2", "b2"):
        np.testing.assert_array_equal(grads[name], others[name])


@pytest.mark.parametrize("kind", [MemoryError, RuntimeError, type("MyError", (ValueError,), {}), gb.StopTraining])
def test_errors_of_the_user_s_own_stay_and_get_a_note(kind: type[Exception]) -> None:
    def fails(self: Any, x: Any, y: Any, c: Any) -> None:
        raise kind("mine")

    with pytest.raises(kind, match="mine") as caught:
        network(layer(forward=fails)).loss_and_grad(X, Y)
    assert (type(caught.value), str(caught.value)) == (kind, "mine")
    assert caught.value.__notes__ == ["in layer 2 (Mine).forward(x, y, c)"]


def test_a_network_needs_a_list_of_layers() -> None:
    with pytest.raises(gb.DTypeError, match=r"^layers must be a list of Layer objects, got Dense"):
        gb.Network(gb.Dense(3, 2), backend="cpu")  # type: ignore[arg-type]


# --- losses ----------------------------------------------------------------------------------------------------------


class Sum(gb.Loss):
    """A sound loss: Σ z / n."""

    def workspace(self, outputs: int) -> Any:
        return {"loss": ((1,), None), "dz": ((-1, outputs), None)}

    def check(self, Y: Any, rows: int, outputs: int) -> None:
        if len(Y) != rows:
            raise gb.ShapeError(f"X has {rows} rows, Y has {len(Y)}")

    def check_values(self, Y: Any, outputs: int) -> None:
        pass

    def run(self, z: Any, Y: Any, c: gb.Context) -> None:
        c.work["loss"][...] = z.sum() / len(z)
        if c.gradient:
            c.work["dz"][...] = 1 / len(z)

    def predict(self, z: Any) -> Any:
        return z.argmax(axis=1)

    def truth(self, Y: Any, outputs: int) -> Any:
        return Y


def with_loss(**methods: Any) -> gb.Network:
    return gb.mlp([5, 4, 3], loss=type("Mine", (Sum,), methods)(), backend="cpu")


def test_a_sound_loss_is_run_as_it_is() -> None:
    net = with_loss()
    loss, grads = net.loss_and_grad(X, Y)
    assert loss == pytest.approx(net.scores(X).sum() / 6, rel=1e-6)
    np.testing.assert_allclose(grads["b2"], 1, rtol=1e-6)
    assert net.evaluate(X, Y)[1] == net.accuracy(X, Y) == (net.predict(X) == Y).mean()
    assert type(net.loss_function).__name__ == net.loss_name == "Mine"
    assert core_of(net).loss is not net.loss_function
    with pytest.raises(gb.ShapeError, match=r"^X has 6 rows, Y has 4$"):
        net.loss(X, Y[:4])


SPACE = ((-1, 3), None)


def rebinds_loss(self: Any, z: Any, Y: Any, c: Any) -> None:
    c.work["loss"] = 3.0


WRONG_LOSSES: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "least_outputs in words": ({"least_outputs": "2"}, gb.DTypeError, "Mine.least_outputs: its value must be an int"),
    "no workspace": (
        {"workspace": lambda self, k: None},
        gb.DTypeError,
        r"Mine.workspace\(outputs\): its result must be a mapping by names, got None",
    ),
    "no dz": (
        {"workspace": lambda self, k: {"loss": ((1,), None)}},
        gb.ShapeError,
        r"Mine.workspace\(outputs\): its result must hold 'dz' with the shape \(-1, 3\)",
    ),
    "no loss": (
        {"workspace": lambda self, k: {"dz": SPACE}},
        gb.ShapeError,
        r"Mine.workspace\(outputs\): its result must hold 'loss' with the shape \(1,\)",
    ),
    "shapes alone": (
        {"workspace": lambda self, k: {"loss": (1,), "dz": (-1, k)}},
        gb.DTypeError,
        r"Mine.workspace\(outputs\): its result\['loss'\] must be a pair \(shape, dtype\)",
    ),
    "run rebinds the loss": (
        {"run": rebinds_loss},
        gb.ArgumentError,
        r"Mine.run\(z, Y, c\) must write c.work\['loss'\] in place, .*; 1 of 1",
    ),
    "run forgets dz": (
        {"run": lambda self, z, Y, c: c.work["loss"].fill(1)},
        gb.ArgumentError,
        r"Mine.run\(z, Y, c\) must write c.work\['dz'\] in place, .*; 18 of 18",
    ),
    "run changes the scores": (
        {"run": lambda self, z, Y, c: (z.__imul__(2), c.work["loss"].fill(1), c.work["dz"].fill(1))},
        gb.ArgumentError,
        r"Mine.run\(z, Y, c\) must not change z",
    ),
    "run changes the targets": (
        {"run": lambda self, z, Y, c: (Y.__iadd__(1), c.work["loss"].fill(1), c.work["dz"].fill(1))},
        gb.ArgumentError,
        r"Mine.run\(z, Y, c\) must not change Y",
    ),
    "run of another shape": (
        {"run": lambda self, z, Y, c: c.work["dz"].__setitem__(..., z[:, :2])},
        gb.ArgumentError,
        r"Mine.run\(z, Y, c\) raised ValueError: could not broadcast",
    ),
    "check without rows": (
        {"check": lambda self, Y: None},
        gb.ArgumentError,
        r"Mine.check\(Y, rows, outputs\) raised TypeError: .* takes 2 positional",
    ),
    "check_values fails": (
        {"check_values": lambda self, Y, k: Y.nothing},
        gb.ArgumentError,
        r"Mine.check_values\(Y, outputs\) raised AttributeError",
    ),
    "predict gives nothing": (
        {"predict": lambda self, z: None},
        gb.ShapeError,
        r"Mine.predict\(z\): it must return an array of 6 rows, got None",
    ),
    "truth of fewer": (
        {"truth": lambda self, Y, k: Y[:2]},
        gb.ShapeError,
        r"Mine.truth\(Y, outputs\): it must return an array of 6 rows, got \(2,\)",
    ),
    "truth in columns": (
        {"truth": lambda self, Y, k: Y[:, None]},
        gb.ShapeError,
        r"Mine: predict gives shape \(6,\), truth \(6, 1\)",
    ),
}


@pytest.mark.parametrize(("methods", "error", "message"), WRONG_LOSSES.values(), ids=WRONG_LOSSES)
def test_what_is_wrong_with_a_loss_is_told(methods: dict[str, Any], error: type[Exception], message: str) -> None:
    def use() -> None:
        net = with_loss(**methods)
        net.loss_and_grad(X.copy(), Y.copy())
        net.evaluate(X.copy(), Y.copy())

    with pytest.raises(error, match=f"^{message}"):
        use()
    if "truth" in methods:
        with pytest.raises(error, match=f"^{message}"):
            with_loss(**methods).accuracy(X, Y)


@pytest.mark.parametrize("loss", [lambda z, y: z, np.square, Sum, None])
def test_what_is_no_loss_is_refused_with_what_would_do(loss: Any) -> None:
    with pytest.raises(gb.DTypeError, match=r"^loss must be one of 'softmax.*, or an object of a subclass of gb.Loss"):
        gb.mlp([5, 4, 3], loss=loss, backend="cpu")
