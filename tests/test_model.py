"""A model as one file: what goes in comes out, and what a file says is believed only where it is true."""

from __future__ import annotations

import inspect
import json
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from families import every
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import gpubatch as gb
from gpubatch import nn
from gpubatch.backend import Backend
from gpubatch.formula import ScoreLoss, activations, formula_of_text, host_function, scores, text_of_formula
from gpubatch.model import file


@gb.activation
def swish(x: Any, *, beta: float = 1.5) -> Any:
    return x / (1 + np.exp(-beta * x))


@gb.activation
def own_gelu(x: Any) -> Any:
    return x * gb.normal_cdf(x)


@gb.score_loss
def tilted(z: Any, y: Any, *, tilt: float) -> Any:
    d = z - y
    return np.where(d > 0, tilt * d * d, d * d)


class Scale(gb.Layer):
    """A layer of the user's own, with an array and a list among its arguments."""

    def __init__(self, start: float, powers: tuple[int, ...] = (1,), mask: Any = None) -> None:
        self.start, self.powers, self.mask = start, powers, mask

    def takes(self) -> None:
        return None

    def needs(self, features: int) -> gb.Needs:
        return gb.Needs(features, {"s": gb.Parameter((features,), self.start)})

    def forward(self, x: Any, y: Any, c: Any) -> None:
        c.xp.multiply(x, c.p["s"], out=y)

    def backward(self, x: Any, y: Any, dy: Any, dx: Any, c: Any) -> None:
        c.g["s"][...] = (dy * x).sum(axis=0)
        if dx is not None:
            c.xp.multiply(dy, c.p["s"], out=dx)


class Cubed(gb.Loss):
    """A loss of the user's own."""

    classifies = False

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def workspace(self, outputs: int) -> Any:
        return {"loss": ((1,), None), "dz": ((-1, outputs), None)}

    def check(self, Y: Any, rows: int, outputs: int) -> None: ...

    def check_values(self, Y: Any, outputs: int) -> None: ...

    def run(self, z: Any, Y: Any, c: Any) -> None:
        c.work["loss"][...] = self.factor * (abs(z - Y) ** 3).mean()
        c.work["dz"][...] = 3 * self.factor * (z - Y) * abs(z - Y) / z.size

    def predict(self, z: Any) -> Any:
        return z

    def truth(self, Y: Any, outputs: int) -> Any:
        return Y


class Halved(gb.Layer):
    """A layer whose attribute is not what its constructor was given."""

    def __init__(self, rate: float) -> None:
        self.rate = rate / 2

    takes, needs, forward, backward = Scale.takes, Scale.needs, Scale.forward, Scale.backward
    start = 1.0


class Hidden(Halved):
    def __init__(self, rate: float) -> None:
        self._r = rate


# One of each kind at least, between a Dense layer of 6 outputs and one of 6 inputs.
LAYERS: dict[str, Callable[[], gb.Layer]] = {
    "Dense": lambda: gb.Dense(6, 6, bias=False, init=0.3),
    "BatchNorm": lambda: gb.BatchNorm(6, eps=1e-3, momentum=0.2, unbiased_running=False),
    "Dropout": lambda: gb.Dropout(0.25),
    "Elementwise": lambda: gb.Elementwise(swish, beta=0.7),
    "Elementwise, normal_cdf": lambda: gb.Elementwise(own_gelu),
    "Elementwise, gpubatch's": lambda: gb.Elementwise(activations.leaky_relu, slope=0.2),
    "LeakyReLU": lambda: gb.LeakyReLU(0.2),
    "GELU": lambda: gb.GELU("tanh"),
    "ReLU": gb.ReLU,
    "Sigmoid": gb.Sigmoid,
    "Step": gb.Step,
    "Tanh": gb.Tanh,
    "own": lambda: Scale(2.0, (1, 3), np.arange(6.0)),
}
LOSSES: dict[str, Callable[[], Any]] = {
    **{name: (lambda name=name: name) for name in nn.LOSSES},
    "SoftmaxCrossEntropy": nn.losses.SoftmaxCrossEntropy,
    "SVM": lambda: nn.losses.SVM(delta=0.5),
    "CrammerSinger": lambda: nn.losses.CrammerSinger(delta=0.5, ignore_label=-1),
    "KLDivergence": nn.losses.KLDivergence,
    "SoftmaxFocal": lambda: nn.losses.SoftmaxFocal(1.5, [0.5, 2.0, 1.0]),
    "SigmoidCrossEntropy": lambda: nn.losses.SigmoidCrossEntropy(label_smoothing=0.1),
    "smoothed softmax": lambda: nn.losses.SoftmaxCrossEntropy(label_smoothing=0.1),
    "own formula": lambda: tilted.bind(tilt=3.0),
    "own": lambda: Cubed(2.0),
}


def test_the_tables_have_every_layer_and_every_loss() -> None:
    kinds = {x for x in vars(nn).values() if isinstance(x, type)}
    complete = {kind for kind in kinds if not inspect.isabstract(kind)}
    assert {kind.__name__ for kind in complete if issubclass(kind, gb.Layer)} <= LAYERS.keys()
    assert {kind.__name__ for kind in complete if issubclass(kind, gb.Loss)} <= LOSSES.keys()
    assert nn.LOSSES.keys() <= LOSSES.keys()


def targets(net: gb.Network, rng: np.random.Generator) -> np.ndarray:
    if isinstance(net.loss_function, nn.KLDivergence):
        return rng.dirichlet(np.ones(net.outputs), 40).astype(net.compute_dtype)
    if net.loss_function.least_outputs > 1:
        return rng.integers(0, net.outputs, 40)
    return rng.integers(0, 2, (40, net.outputs)).astype(net.compute_dtype)


def saved_and_loaded(net: gb.Network, folder: Path, **options: Any) -> gb.Model:
    gb.save(folder / "m.safetensors", net)
    return gb.load(folder / "m.safetensors", backend=net.backend, **options)


def trained(net: gb.Network, rng: np.random.Generator, steps: int = 3) -> gb.Network:
    X = rng.standard_normal((40, net.inputs)).astype(net.dtype)
    Y = targets(net, rng)
    opt = gb.SGD(net.parameters, lr=0.01)
    for _ in range(steps):
        opt.step(net.loss_and_grad(net.backend.asarray(X), net.backend.asarray(Y))[1])
    return net


CASES = {
    f"{what} {name}, {dtype}": (what, name, dtype)
    for what, table in (("layer", LAYERS), ("loss", LOSSES))
    for name in table
    for dtype in ("float32", "float64")
}
FAST = ["layer BatchNorm, float32", "layer Dropout, float64", "layer Elementwise, float32", "layer own, float64"]


@every("case", CASES, fast=[*FAST, "loss svm, float32", "loss own, float32"])
def test_a_saved_network_is_the_same_network(
    case: tuple[str, str, str], tmp_path: Path, rng: np.random.Generator
) -> None:
    """Scores, and the steps after it, dropout and running statistics included, have the same bits."""
    what, name, dtype = case
    layer = LAYERS[name]() if what == "layer" else gb.Dropout(0.1)
    loss = LOSSES[name]() if what == "loss" else "softmax_cross_entropy"
    net = gb.Network([gb.Dense(5, 6), layer, gb.Dense(6, 3)], loss, 0.01, backend="cpu", dtype=dtype, seed=7)
    twin = saved_and_loaded(trained(net, rng), tmp_path).net
    assert (repr(twin), twin.seed) == (repr(net), 7)
    assert [vars(x).keys() for x in twin.layers] == [vars(x).keys() for x in net.layers]
    X = rng.standard_normal((9, 5)).astype(dtype)
    np.testing.assert_array_equal(twin.scores(X), net.scores(X), strict=True)
    seed = int(rng.integers(1000))
    trained(net, np.random.default_rng(seed))
    trained(twin, np.random.default_rng(seed))
    np.testing.assert_array_equal(twin.parameters.flat, net.parameters.flat, strict=True)
    np.testing.assert_array_equal(twin.buffers.flat, net.buffers.flat, strict=True)


@pytest.mark.parametrize("precision", ["full", "mixed"])
def test_a_model_of_another_device_predicts_what_it_did(
    backend: Backend, precision: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    X, Y = rng.integers(0, 255, (50, 8), dtype=np.uint8), rng.integers(0, 3, 50)
    net = gb.mlp([8, 6, 3], batch_norm=True, precision=precision, backend="cpu")
    loader = gb.Loader(X, Y, 10, scale=1 / 255, dtype=net.dtype, backend="cpu")
    gb.save(tmp_path / "m.safetensors", net, loader)
    model = gb.load(tmp_path / "m.safetensors", backend=backend)
    tolerance = 1e-6 if precision == "full" else 2e-3
    expected = net.scores(loader.to_batch(X))
    np.testing.assert_allclose(model.scores(X), expected, rtol=tolerance, atol=tolerance)
    assert isinstance(model.predict(X), np.ndarray)
    assert model.evaluate(X, Y)[0] == pytest.approx(net.evaluate(loader.to_batch(X), Y)[0], rel=max(tolerance, 1e-6))


# --- preparation ------------------------------------------------------------------------------------------------------


def shifted(x: Any) -> Any:
    return x - 0.25


class Standardise:
    """A preparation that has a state."""

    def __init__(self) -> None:
        self.mean, self.std = np.zeros(1), 1.0

    def __call__(self, x: Any) -> Any:
        return ((x - self.mean) / self.std).astype(x.dtype)

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self.mean, "std": np.float64(self.std)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.mean, self.std = state["mean"], state["std"]


def fitted() -> Standardise:
    found = Standardise()
    found.mean, found.std = np.linspace(0, 0.5, 6), 0.5
    return found


PREPARED: dict[str, tuple[dict[str, Any], list[Any]]] = {
    "nothing": ({}, []),
    "scale": ({"scale": 1 / 255}, []),
    "function": ({"scale": 1 / 255, "prepare": shifted}, [shifted]),
    "NumPy's function": ({"prepare": np.sqrt}, []),
    "object with a state": ({"scale": 1 / 255, "prepare": fitted()}, [Standardise]),
    "standardised": ({"prepare": gb.Standardize(np.linspace(0, 90, 6), np.linspace(30, 70, 6))}, []),
}


@pytest.mark.parametrize("name", PREPARED)
@pytest.mark.parametrize("sample_axis", [0, 1])
def test_raw_samples_are_prepared_as_the_training_loader_prepared_them(
    name: str, sample_axis: int, tmp_path: Path, rng: np.random.Generator
) -> None:
    options, custom = PREPARED[name]
    if sample_axis == 1 and name in ("object with a state", "standardised"):
        pytest.skip("its means are for rows")
    X, Y = rng.integers(0, 255, (3000, 6), dtype=np.uint8), rng.integers(0, 3, 3000)
    given = X.T if sample_axis else X
    net = gb.mlp([6, 8, 3], backend="cpu")
    loader = gb.Loader(given, Y, 100, sample_axis=sample_axis, backend="cpu", **options)
    gb.save(tmp_path / "m.safetensors", net, loader=loader, classes=["a", "b", "c"])
    model = gb.load(tmp_path / "m.safetensors", backend="cpu", custom=custom)
    x = loader.to_batch(given)
    x = np.ascontiguousarray(x.T) if sample_axis else x
    expected = net.scores(x)
    for raw in (given, given.tolist(), given.astype(np.float64), np.asfortranarray(given)):
        np.testing.assert_array_equal(model.scores(raw), expected)
    np.testing.assert_array_equal(model.predict(given), np.array(["a", "b", "c"])[net.predict(x)], strict=True)
    e = np.exp(expected.astype(np.float64))
    np.testing.assert_allclose(model.probabilities(given), e / e.sum(axis=1, keepdims=True), rtol=1e-5, atol=1e-7)
    loss, accuracy = model.evaluate(given, np.array(["a", "b", "c"])[Y])
    assert (loss, accuracy) == (pytest.approx(net.loss(x, Y), rel=1e-6), pytest.approx(net.accuracy(x, Y)))
    if not sample_axis:
        np.save(tmp_path / "x.npy", X)
        np.testing.assert_array_equal(model.scores(gb.sources.npy(tmp_path / "x.npy")), expected)
        np.testing.assert_array_equal(model.scores(np.load(tmp_path / "x.npy", mmap_mode="r")), expected)
        np.testing.assert_array_equal(model.scores(X[:1]), net.scores(x[:1]))


def test_means_of_another_shape_are_damage(tmp_path: Path) -> None:
    loader = gb.Loader(np.eye(3, dtype="float32"), backend="cpu", prepare=gb.Standardize(np.zeros(2), np.ones(2)))
    gb.save(tmp_path / "m.safetensors", gb.mlp([3, 2], backend="cpu"), loader=loader)
    with pytest.raises(gb.DataFormatError, match=r"its preparation: means of shape \(2,\) are not of samples of shape"):
        gb.load(tmp_path / "m.safetensors")


def test_samples_that_were_scaled_before_are_told_from_raw_ones(rng: np.random.Generator) -> None:
    """Issue: predict(X.astype("float32")) after training with scale=1/255 was right in one case of ten, silently."""
    X, Y = rng.integers(0, 255, (30, 6), dtype=np.uint8), rng.integers(0, 3, 30)
    model = gb.Model(gb.mlp([6, 3], backend="cpu"), gb.Loader(X, Y, 10, scale=1 / 255, backend="cpu"))
    with pytest.raises(gb.ArgumentError, match=r"raw must hold what the loader's X held, whole numbers of uint8"):
        model.predict((X / 255).tolist())
    with pytest.raises(gb.ShapeError, match=r"raw must have samples of shape \(6,\), got \(5,\)"):
        model.predict(X[:, :5])
    with pytest.raises(gb.ShapeError, match="at least one sample"):
        model.predict(X[:0])


def test_classes_are_names_for_labels() -> None:
    net = gb.mlp([4, 3], backend="cpu")
    X = np.eye(4, dtype="float32")
    assert (
        gb.Model(net, classes=np.array([3, 5, 8])).predict(X).tolist() == np.array([3, 5, 8])[net.predict(X)].tolist()
    )
    yes = gb.mlp([4, 1], loss="sigmoid_cross_entropy", backend="cpu")
    model = gb.Model(yes, classes=["no", "yes"])
    assert set(model.predict(X)) <= {"no", "yes"}
    assert model.evaluate(X, ["no", "yes", "no", "yes"]) == pytest.approx(yes.evaluate(X, np.array([0.0, 1, 0, 1])))
    expected = 1 / (1 + np.exp(-yes.scores(X).astype(float)))
    np.testing.assert_allclose(model.probabilities(X), expected[:, 0], rtol=1e-6)
    for classes, error, message in (
        (["a", "b"], gb.ArgumentError, "classes must be 3 different names"),
        (["a", "b", "a"], gb.ArgumentError, "classes must be 3 different names"),
        ("abc", gb.DTypeError, "classes must be a list"),
        ([1.5, 2, 3], gb.DTypeError, "classes must all hold text, all integers or all booleans, got 1.5"),
        ([1, "b", "c"], gb.DTypeError, "classes must all hold text, all integers or all booleans, got 'b'"),
        ([True, 0, 1], gb.DTypeError, "classes must all hold text, all integers or all booleans, got 0"),
    ):
        with pytest.raises(error, match=message):
            gb.Model(net, classes=classes)
    with pytest.raises(gb.ArgumentError, match="mse has none"):
        gb.Model(gb.mlp([4, 3], loss="mse", backend="cpu"), classes=["a", "b", "c"])
    with pytest.raises(gb.ArgumentError, match=r"y must hold the names of classes, 'no', 'yes'; got 'maybe'"):
        model.evaluate(X, ["no", "yes", "maybe", "no"])


# --- what cannot be saved ------------------------------------------------------------------------------------------


def replaced() -> gb.Layer:
    layer = gb.ReLU()
    layer.forward = lambda x, y, c: None  # type: ignore[method-assign]
    return layer


UNSAVED: dict[str, tuple[Callable[[], gb.Layer], type[Exception], str]] = {
    "no attribute": (lambda: Hidden(1.0), gb.ArgumentError, r"layer 2 \(Hidden\).*keep it in one, as self.rate = rate"),
    "attribute changed": (lambda: Halved(1.0), gb.ArgumentError, r"layer 2 rate is 0.5 now, and 0.25 here"),
    "method replaced": (replaced, gb.ArgumentError, r"layer 2 \(ReLU\) cannot be saved: its method ReLU.forward"),
    "odd argument": (lambda: Scale(1.0, mask={1}), gb.DTypeError, r"layer 2 \(Scale\): mask cannot be saved"),
}


@pytest.mark.parametrize("name", UNSAVED)
def test_what_a_file_cannot_hold_is_refused_when_it_is_saved(name: str, tmp_path: Path) -> None:
    make, error, message = UNSAVED[name]
    with pytest.raises(error, match=message):
        gb.save(tmp_path / "m.safetensors", gb.Network([gb.Dense(3, 3), make(), gb.Dense(3, 3)], backend="cpu"))
    assert list(tmp_path.iterdir()) == []


def test_a_save_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = gb.mlp([3, 2], backend="cpu")
    gb.save(tmp_path / "m.safetensors", net)
    before = (tmp_path / "m.safetensors").read_bytes()

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        gb.save(tmp_path / "m.safetensors", gb.mlp([5, 2], backend="cpu"))
    assert [path.name for path in tmp_path.iterdir()] == ["m.safetensors"]
    assert (tmp_path / "m.safetensors").read_bytes() == before


def test_arguments_are_checked(tmp_path: Path) -> None:
    net = gb.mlp([3, 2], backend="cpu")
    with pytest.raises(gb.ArgumentError, match=r"path must end in \.safetensors, got 'm\.npz'"):
        gb.save("m.npz", net)
    with pytest.raises(gb.DTypeError, match=r"net must be a gpubatch\.Network"):
        gb.save(tmp_path / "m.safetensors", 3)  # type: ignore[arg-type]
    with pytest.raises(gb.DTypeError, match=r"loader must be the gb\.Loader"):
        gb.save(tmp_path / "m.safetensors", net, loader=3)  # type: ignore[arg-type]
    with pytest.raises(gb.ArgumentError, match="must be None where a Model is saved"):
        gb.save(tmp_path / "m.safetensors", gb.Model(net), classes=["a", "b"])
    with pytest.raises(FileNotFoundError):
        gb.load(tmp_path / "m.safetensors")
    with pytest.raises(FileNotFoundError, match="a model cannot be saved as"):
        file.check_writable(tmp_path / "none" / "m.safetensors")
    (tmp_path / "f.safetensors").mkdir()
    with pytest.raises(IsADirectoryError, match="it is a folder"):
        file.check_writable(tmp_path / "f.safetensors")


# --- what a file says is not believed ----------------------------------------------------------------------------


def rewritten(path: Path, change: Callable[[dict[str, Any], dict[str, np.ndarray], dict[str, str]], None]) -> None:
    """Change the JSON, the arrays and the metadata of a model file; its digest is right."""
    arrays = load_file(path)
    with safe_open(path, "np") as content:
        metadata = content.metadata()
    model = json.loads(metadata["model"])
    change(model, arrays, metadata)
    metadata["model"] = json.dumps(model)
    metadata["digest"] = file.digest_of(metadata["model"], arrays)
    save_file(arrays, path, metadata)


def layer_of(name: str, **arguments: Any) -> Callable[..., None]:
    def change(model: Any, arrays: Any, metadata: Any) -> None:
        model["network"]["layers"][1] = {"class": name, "arguments": arguments}

    return change


def text_line(line: str) -> Callable[..., None]:
    def change(model: Any, arrays: Any, metadata: Any) -> None:
        text = model["network"]["layers"][1]["arguments"]["activation"]["formula"]["text"]
        text["lines"].append(line)

    return change


WRONG: dict[str, tuple[Callable[..., None], str]] = {
    "later version": (
        lambda m, a, d: d.update(version="2"),
        "has version 2 of the format, this gpubatch reads version 1: install a later one",
    ),
    "another program's": (lambda m, a, d: d.pop("format"), "is no file that gb.save wrote"),
    "shape": (
        lambda m, a, d: m["network"]["layers"][0]["arguments"].update(inputs=10**9),
        r"parameters.W1 has shape \(3, 4\), layer 1 needs \(1000000000, 4\)",
    ),
    "widths": (
        lambda m, a, d: m["network"]["layers"][2]["arguments"].update(inputs=5),
        "its layers do not fit together: layer 3 .* takes 5 features",
    ),
    "array missing": (lambda m, a, d: a.pop("parameters.b1"), "parameters.b1, of layer 1, is missing"),
    "array too many": (
        lambda m, a, d: a.update({"parameters.q": np.ones(3)}),
        "parameters.q belongs to none of its layers",
    ),
    "no such layer": (layer_of("Conv"), "layer 2 is of the class 'Conv', which this gpubatch does not have"),
    "no layer": (layer_of("Network", layers=[]), "layer 2"),
    "argument": (layer_of("Dropout", rate=3), r"layer 2 cannot be made: Dropout: rate must be finite"),
    "unknown argument": (layer_of("ReLU", rate=3), "layer 2 cannot be made: ReLU"),
    "a function": (layer_of("os:system", command="true"), "layer 2 is os:system, which is no layer and no loss"),
    "a class": (layer_of("subprocess:Popen", args=["true"]), "which is no layer and no loss"),
    "a module of Python's": (layer_of("this:Zen"), "is this:Zen, and gb.load imports nothing that a file names"),
    "text, a call": (text_line("w = open(x)"), "no known name, function or operator"),
    "text, an attribute": (text_line("w = x.real"), "a line must be NAME = EXPRESSION"),
    "text, import": (text_line("w = __import__(x)"), "no known name, function or operator"),
    "text, a string": (text_line("w = 'x'"), "a line must be NAME = EXPRESSION"),
    "text, a power": (text_line("w = 9 ** 9 ** 9"), "no known name"),
    "text, a name": (text_line("w = q + 1"), "'q' is no known name"),
    "text, a name twice": (text_line("x = 1 + 1"), "'x' has a value before"),
    "text, deep": (text_line("w = " + "(" * 3000 + "x" + ")" * 3000), "cannot be read"),
    "axis": (
        lambda m, a, d: m["preparation"].update(sample_axis=1, sample_shape=[]),
        r"its preparation: samples of shape \(\) are not along axis 1",
    ),
    "rows of training": (
        lambda m, a, d: m["preparation"].update(rows={"rows": 3, "trained": 4}),
        "its preparation: 'test_size'|trained must be",
    ),
    "names of columns": (
        lambda m, a, d: m["columns"].update(X=[None]),
        "the names of its columns: None is no name of a column",
    ),
    "text, long": (text_line("w = x" + " + x" * 40_000), "a line must be NAME"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_file_that_is_not_what_it_says_is_refused(name: str, tmp_path: Path) -> None:
    change, message = WRONG[name]
    path = tmp_path / "m.safetensors"
    net = gb.Network([gb.Dense(3, 4), gb.Elementwise(swish), gb.Dense(4, 2)], backend="cpu")
    gb.save(path, net, gb.Loader(np.eye(3, dtype="float32"), backend="cpu"))
    rewritten(path, change)
    with pytest.raises(gb.ArgumentError, match=message):
        gb.load(path, backend="cpu")
    assert "this" not in sys.modules


def test_text_that_doubles_with_each_line_is_refused() -> None:
    text = text_of_formula(swish, "float32")
    text["lines"] += ["s0 = beta + beta", *(f"s{i + 1} = s{i} + s{i}" for i in range(60))]
    with pytest.raises(gb.FormulaError, match="the text of a scalar is longer than"):
        formula_of_text(text, "float32")


def test_damage_shows_in_the_digest(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    gb.save(path, gb.mlp([3, 2], backend="cpu"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(gb.DataFormatError, match="is damaged or was changed: its contents do not match their digest"):
        gb.load(path)
    store = gb.Checkpoints(tmp_path / "run")
    store.save({"w": np.ones(3)})
    with pytest.raises(gb.DataFormatError, match=r"It is a checkpoint: load it with Checkpoints"):
        gb.load(store.files()[0])


DIFFERENT: dict[str, tuple[Callable[[], gb.Network], str]] = {
    "activation": (lambda: gb.mlp([3, 4, 2], "tanh", backend="cpu"), "layer 2 is ReLU in the file, and Tanh here"),
    "width": (lambda: gb.mlp([3, 5, 2], backend="cpu"), "layer 1 outputs is 4 in the file, and 5 here"),
    "depth": (lambda: gb.mlp([3, 4, 4, 2], backend="cpu"), "is of another network, of 3 layers, not 5"),
    "loss": (lambda: gb.mlp([3, 4, 2], loss="svm", backend="cpu"), "loss name is 'softmax_cross_entropy' in the file"),
    "l2": (lambda: gb.mlp([3, 4, 2], l2=0.5, backend="cpu"), "l2 is 0.0 in the file, and 0.5 here"),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_an_existing_network_takes_its_own_kind_alone(name: str, tmp_path: Path) -> None:
    make, message = DIFFERENT[name]
    gb.save(tmp_path / "m.safetensors", gb.mlp([3, 4, 2], backend="cpu", seed=1))
    other = make()
    before = other.parameters.flat.copy()
    with pytest.raises(gb.ArgumentError, match=message):
        gb.load(tmp_path / "m.safetensors", into=other)
    np.testing.assert_array_equal(other.parameters.flat, before)


def test_an_existing_network_gets_the_parameters(tmp_path: Path) -> None:
    net, other = gb.mlp([3, 4, 2], backend="cpu", seed=1), gb.mlp([3, 4, 2], backend="cpu", dtype="float64")
    gb.save(tmp_path / "m.safetensors", net)
    assert gb.load(tmp_path / "m.safetensors", into=other).net is other
    np.testing.assert_array_equal(other.parameters["W1"], net.parameters["W1"])


def test_a_class_that_was_not_imported_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, net = (
        tmp_path / "m.safetensors",
        gb.Network([gb.Dense(3, 3), Scale(1.0), gb.Dense(3, 1)], Cubed(1.0), backend="cpu"),
    )
    monkeypatch.setattr(Scale, "__module__", "elsewhere")
    gb.save(path, net, gb.Loader(np.eye(3, dtype="float32"), backend="cpu", prepare=shifted))
    with pytest.raises(
        gb.ArgumentError, match=r"layer 2 is elsewhere:Scale.*import elsewhere before, or.*custom=\[Scale\]"
    ):
        gb.load(path)
    with pytest.raises(gb.ArgumentError, match=r"prepare is \w+:shifted, .*custom=\[shifted\]"):
        gb.load(path, custom=[Scale])
    named = {"elsewhere:Scale": Scale, f"{__name__}:shifted": shifted}
    for custom in ([Scale, shifted], named):
        model = gb.load(path, backend="cpu", custom=custom)
        np.testing.assert_array_equal(
            model.predict(np.eye(3, dtype="float32")), net.scores(np.eye(3, dtype="float32") - np.float32(0.25))
        )


# --- formulas as text ----------------------------------------------------------------------------------------------


OWN = [getattr(activations, name) for name in activations.__all__] + [getattr(scores, name) for name in scores.__all__]


@pytest.mark.parametrize("declared", [*OWN, swish, own_gelu, tilted], ids=lambda f: f.name)
def test_a_formula_read_from_its_text_is_the_same_code(declared: Any, dtype: np.dtype) -> None:
    text = json.loads(json.dumps(text_of_formula(declared, dtype.name)))
    read = formula_of_text(text, dtype.name)

    def code(f: Any) -> list[str]:
        if isinstance(f, ScoreLoss):
            return [f.form(dtype.name, *targets).c for targets in (("loss", "dz"), ("loss",))]
        return [f.form(dtype.name).forward.c, f.form(dtype.name).backward.c]

    assert code(read) == code(declared)
    assert (read.name, read.required, read.defaults) == (declared.name, declared.required, declared.defaults)
    x, values = np.linspace(-3, 3, 7).astype(dtype), dict.fromkeys(read.required, 0.5)
    arrays = (x, x[::-1]) if isinstance(read, ScoreLoss) else (x,)
    np.testing.assert_array_equal(read(*arrays, **values), declared(*arrays, **values))


def test_a_formula_that_calls_a_function_of_the_host_cannot_be_text() -> None:
    @host_function
    def twice(x: float) -> float:
        return 2 * x

    @gb.activation
    def doubled(x: Any, *, a: float) -> Any:
        return x * twice(a)

    with pytest.raises(gb.FormulaError, match="twice"):
        text_of_formula(doubled, "float32")


def test_several_threads_predict_with_one_model(rng: np.random.Generator) -> None:
    X = rng.standard_normal((4000, 20)).astype("float32")
    model = gb.Model(gb.mlp([20, 64, 3], backend="cpu"))
    parts = [X[k::4] for k in range(4)]
    expected, found = [model.scores(part) for part in parts], [np.empty(0)] * 4

    def predict(k: int) -> None:
        for _ in range(5):
            found[k] = model.scores(parts[k])

    threads = [threading.Thread(target=predict, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)
