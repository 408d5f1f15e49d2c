"""ONNX files compute what the network does: checked by ONNX Runtime, for every layer and every activation."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from families import every
from needs import file_library, peer

import gpubatch as gb
from gpubatch import nn
from gpubatch.formula import activations
from gpubatch.model import export

onnxruntime = peer("onnxruntime")
onnx = peer("onnx")


@gb.activation
def everything(x: Any, *, a: float = 0.7, b: float) -> Any:
    """Every operation that a formula can have, each with a weight, so that an error in one shows."""
    positive = np.abs(x) + 0.5
    found = a * x + x / positive - 0.1 * -x + 0.1 * positive**1.3 + 0.1 * np.sqrt(positive) + 0.1 * np.exp(-positive)
    found = (
        found
        + 0.1 * np.log(positive)
        + 0.1 * np.log1p(positive)
        + np.tanh(x)
        + 0.1 * np.sign(x)
        + 0.2 * np.floor(3 * x)
    )
    found = found + 0.1 * np.maximum(x, 0.3) + 0.3 * np.minimum(x, -0.2) + 0.1 * (x // 0.7) + 0.1 * (x % 0.7)
    inside = ((x < 1) & (x >= -1)) | ~((x > 2) | (x <= -2)) & (x != 0.5) | (x == 0.25)
    return np.where(inside, found, b) + np.where(x > 1.5, 1, 0)


@gb.activation
def constant(x: Any) -> Any:
    return 0.25


LAYERS: dict[str, Callable[[], gb.Layer]] = {
    "Dense": lambda: gb.Dense(6, 6, bias=False),
    "BatchNorm": lambda: gb.BatchNorm(6, eps=1e-3),
    "Dropout": lambda: gb.Dropout(0.25),
    "LeakyReLU": lambda: gb.LeakyReLU(0.2),
    "GELU": gb.GELU,
    "GELU, tanh": lambda: gb.GELU("tanh"),
    "ReLU": gb.ReLU,
    "Sigmoid": gb.Sigmoid,
    "Step": gb.Step,
    "Tanh": gb.Tanh,
    "Elementwise": lambda: gb.Elementwise(everything, b=-0.4),
    "Elementwise, constant": lambda: gb.Elementwise(constant),
    **{
        f"Elementwise, {name}": (lambda f=f: gb.Elementwise(f, **dict.fromkeys(f.required, 0.1)))
        for name in activations.__all__
        for f in [getattr(activations, name)]
    },
}
CASES = {f"{name}, {dtype}": (name, dtype) for name in LAYERS for dtype in ("float32", "float64")}


def test_the_table_has_every_layer() -> None:
    kinds = {x for x in vars(nn).values() if isinstance(x, type) and issubclass(x, gb.Layer)}
    assert {kind.__name__ for kind in kinds if not inspect.isabstract(kind)} <= LAYERS.keys()
    recorded = everything.form("float64").forward.elements
    own = {export.FUNCTIONS[x.op] for x in recorded if x.op in export.FUNCTIONS}
    assert own == set(export.FUNCTIONS.values()), "the formula has every operation"


def run(path: Path, X: np.ndarray) -> np.ndarray:
    onnxruntime.set_default_logger_severity(3)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, {"X": X})[0]


def trained(net: gb.Network, rng: np.random.Generator) -> gb.Network:
    for _ in range(3):
        X = rng.standard_normal((20, net.inputs)).astype(net.dtype)
        net.loss_and_grad(X, rng.integers(0, net.outputs, 20))
        net.parameters.flat[...] -= net.parameters.grads.flat
    return net


@every("case", CASES, fast=["Dense, float64", "BatchNorm, float32", "Elementwise, float64", "ReLU, float32"])
def test_onnx_runtime_computes_the_same_scores(case: tuple[str, str], tmp_path: Path, rng: np.random.Generator) -> None:
    name, dtype = case
    layers = [gb.Dense(5, 6), LAYERS[name](), gb.Dense(6, 3)]
    net = trained(gb.Network(layers, backend="cpu", dtype=dtype), rng)
    gb.export_onnx(net, tmp_path / "m.onnx")
    onnx.checker.check_model(onnx.load(tmp_path / "m.onnx"), full_check=True)
    for rows in (1, 50):
        X = rng.standard_normal((rows, 5)).astype(dtype)
        found = run(tmp_path / "m.onnx", X)
        assert found.dtype == dtype
        np.testing.assert_allclose(found, net.scores(X), rtol=1e-6, atol=2e-6 if dtype == "float32" else 1e-9)


@pytest.mark.parametrize("sample_axis", [0, 1])
@pytest.mark.parametrize(
    ("precision", "prepare"),
    [
        ("full", None),
        ("full", np.sqrt),
        ("mixed", None),
        ("full", gb.Standardize(np.linspace(0, 1, 6), np.full(6, 0.3))),
    ],
)
def test_raw_samples_and_probabilities(
    sample_axis: int, precision: str, prepare: Any, tmp_path: Path, rng: np.random.Generator
) -> None:
    if sample_axis and isinstance(prepare, gb.Standardize):
        pytest.skip("its means are for rows")
    X, Y = rng.integers(0, 255, (40, 6), dtype=np.uint8), rng.integers(0, 3, 40)
    given = X.T if sample_axis else X
    net = gb.mlp([6, 8, 3], batch_norm=True, precision=precision, backend="cpu")
    options = {"scale": 1 / 255, "sample_axis": sample_axis, "dtype": net.dtype, "prepare": prepare}
    model = gb.Model(net, gb.Loader(given, Y, 10, backend="cpu", **options), ["a", "b", "c"])
    gb.export_onnx(model, tmp_path / "m.onnx", probabilities=True)
    tolerance = 1e-6 if precision == "full" else 2e-3
    np.testing.assert_allclose(run(tmp_path / "m.onnx", given), model.probabilities(given), rtol=0, atol=tolerance)
    properties = {p.key: p.value for p in onnx.load(tmp_path / "m.onnx").metadata_props}
    assert json.loads(properties["classes"]) == ["a", "b", "c"]


def test_probabilities_of_a_yes_or_no(tmp_path: Path, rng: np.random.Generator) -> None:
    net = gb.mlp([4, 1], loss="sigmoid_cross_entropy", backend="cpu")
    gb.export_onnx(net, tmp_path / "m.onnx", probabilities=True)
    X = rng.standard_normal((9, 4)).astype("float32")
    np.testing.assert_allclose(run(tmp_path / "m.onnx", X), 1 / (1 + np.exp(-net.scores(X))), rtol=0, atol=1e-6)


TREES: dict[str, Any] = {
    "height": [5.0, None, 12.5, 30.0, 8.0, 21.0, 7.5, 19.0],
    "v0": [3, 4, 5, 3, 4, None, 5, 9],  # the name of a node, too
    "soil": ["clay", "sand", None, "clay", "sand", "loam", "?", "clay"],
    "W1": ["a", "b", "a", "b", "b", "a", "a", "b"],
    "kind": ["oak", "elm", "oak", "oak", "elm", "elm", "oak", "elm"],
}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_model_of_tables_takes_their_columns(dtype: str, tmp_path: Path) -> None:
    """Gaps, texts that training had not and texts that stand for none, as :func:`gpubatch.read_table` takes them."""
    file_library("pyarrow")
    table = gb.read_table(TREES, label="kind", missing="?")
    net = gb.mlp([table.features, 6, 2], backend="cpu", dtype=dtype)
    model = gb.Model(net, table)
    gb.export_onnx(model, tmp_path / "m.onnx", probabilities=True)
    onnx.checker.check_model(onnx.load(tmp_path / "m.onnx"), full_check=True)
    new = {"height": [None, 1.0, 2.5], "v0": [3.0, None, 4.0], "soil": ["sand", "?", None], "W1": ["b", "moss", "a"]}
    given = {
        name: np.array([np.nan if x is None else x for x in values], np.float64)[:, None]
        if name in ("height", "v0")
        else np.array([x or "" for x in values], object)[:, None]
        for name, values in new.items()
    }
    onnxruntime.set_default_logger_severity(3)
    found = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"]).run(None, given)[0]
    with pytest.warns(gb.TableWarning, match="moss"):
        expected = model.probabilities(new)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


def test_columns_that_a_graph_cannot_have_are_refused(tmp_path: Path) -> None:
    file_library("pyarrow")
    for columns, options, match in (
        (TREES, {"kinds": {"soil": "hash"}}, "column 'soil' cannot be exported, since its texts are hashed"),
        ({**TREES, "scores": [*range(8)]}, {}, "a table with a column 'scores' cannot be exported"),
    ):
        table = gb.read_table(columns, label="kind", **options)
        with pytest.raises(gb.ArgumentError, match=match):
            gb.export_onnx(gb.Model(gb.mlp([table.features, 2], backend="cpu"), table), tmp_path / "m.onnx")


class Own(gb.ReLU):
    """A layer of the user's."""


def test_what_a_graph_cannot_have_is_refused(tmp_path: Path) -> None:
    net, path = gb.mlp([4, 3], backend="cpu"), tmp_path / "m.onnx"
    loader = gb.Loader(np.eye(4, dtype="float32"), backend="cpu", prepare=lambda x: x - 1)
    for given, options, message in (
        (gb.Network([gb.Dense(4, 3), Own()], backend="cpu"), {}, r"layer 2 \(Own\) cannot be exported"),
        (gb.Model(net, loader), {}, "prepare=.* cannot be exported; export model.net"),
        (gb.mlp([4, 3], loss="svm", backend="cpu"), {"probabilities": True}, "probabilities"),
    ):
        with pytest.raises(gb.ArgumentError, match=message):
            gb.export_onnx(given, path, **options)
    with pytest.raises(gb.ArgumentError, match=r"path must end in \.onnx"):
        gb.export_onnx(net, tmp_path / "m.pb")
    with pytest.raises(gb.DTypeError, match=r"model must be a gb\.Model or a gb\.Network"):
        gb.export_onnx(3, path)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []
