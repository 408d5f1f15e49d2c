"""A network as an ONNX graph: a node or two for each layer, and for a formula one for each of its operations."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np

from gpubatch.checkpoint import replacing
from gpubatch.errors import ArgumentError, DTypeError, check_bool
from gpubatch.formula import COPY, INDICATOR, OPS, BoundActivation, Element, Scalar, Trace, activations
from gpubatch.loader import Standardize
from gpubatch.model.file import check_path
from gpubatch.model.model import Model
from gpubatch.model.preparation import Preparation
from gpubatch.nn import ActivationLayer, BatchNorm, Dense, Dropout, Layer, Network, core_of, losses
from gpubatch.own import changed
from gpubatch.tables import Category, Hashed, Numeric, Recipe

OPSET, IR = 18, 8  # read by ONNX Runtime since 1.14
OF_TEXTS, TEXTS_OPSET = "ai.onnx.ml", 3  # what has an operator that takes texts
LARGEST = 2**31 - 2**20  # bytes of a file, a limit of ONNX

# ONNX's operators for NumPy's functions, and what is composed of some.
OPERATORS = {
    np.add: "Add",
    np.subtract: "Sub",
    np.multiply: "Mul",
    np.divide: "Div",
    np.negative: "Neg",
    np.power: "Pow",
    np.sqrt: "Sqrt",
    np.exp: "Exp",
    np.log: "Log",
    np.tanh: "Tanh",
    np.abs: "Abs",
    np.sign: "Sign",
    np.maximum: "Max",
    np.minimum: "Min",
    np.floor: "Floor",
    np.equal: "Equal",
    np.less: "Less",
    np.less_equal: "LessOrEqual",
    np.greater: "Greater",
    np.greater_equal: "GreaterOrEqual",
    np.logical_and: "And",
    np.logical_or: "Or",
    np.logical_not: "Not",
    np.where: "Where",
}
COMPOSED: dict[Any, Callable[..., str]] = {
    np.not_equal: lambda g, x, y: g.add("Not", g.add("Equal", x, y)),
    np.log1p: lambda g, x: g.add("Log", g.add("Add", g.constant(1.0), x)),
    np.floor_divide: lambda g, x, y: g.add("Floor", g.add("Div", x, y)),
    np.remainder: lambda g, x, y: g.add("Sub", x, g.add("Mul", y, g.add("Floor", g.add("Div", x, y)))),
    np.square: lambda g, x: g.add("Mul", x, x),
}
FUNCTIONS = {op: function for function, op in OPS.items()}


def export_onnx(model: Model | Network, path: str | os.PathLike[str], probabilities: bool = False) -> None:
    """Write a network, or a model with the preparation of its raw samples, as an ONNX file; needs the extra ``onnx``.

    model: of gpubatch's layers and activations declared with :func:`gpubatch.activation`.
    path: ends in .onnx; a file of that name is replaced.
    probabilities: whether the output has probabilities instead of scores, where the loss has any: softmax or sigmoid.

    The graph's input is "X", ``(batch, features)``, of the element type that the loader's X had, or of the network's;
    its output "scores" or "probabilities" is float32 or float64, as the network computes. Class names are the property
    "classes", as JSON. A model of tables has an input for each column, by its name, ``(batch, 1)``: float64 for
    numbers, NaN where there is none; text for categories, "" where there is none, without spaces around it. Raises
    ArgumentError for a layer, a ``prepare``, a hashed column or a loss that a graph cannot have.

    >>> gb.export_onnx(gb.mlp([3, 4, 2]), "model.onnx")  # doctest: +SKIP
    """
    onnx = imported()
    if not isinstance(model, (Model, Network)):
        raise DTypeError(f"model must be a gb.Model or a gb.Network, got {type(model).__name__}")
    target = Path(os.path.realpath(check_path(path, ".onnx")))
    model = model if isinstance(model, Model) else Model(model)
    recipe = None if model.preparation is None else model.preparation.table
    graph = Graph(onnx, model.net, [] if recipe is None else recipe.names)
    of = model.preparation or Preparation(None, 0, (model.net.inputs,), graph.dtype)
    if of.sample_shape != (model.net.inputs,):
        raise ArgumentError(f"samples of shape {of.sample_shape} cannot be exported; ({model.net.inputs},) can")
    x = prepared(graph, of) if recipe is None else prepared_table(graph, recipe)
    for place, layer in enumerate(model.net.layers):
        x = graph.layer(layer, place, x)
    if check_bool("probabilities", probabilities):
        x = graph.probabilities(x)
    name = "probabilities" if probabilities else "scores"
    if recipe is not None and name in recipe.names:
        raise ArgumentError(f"a table with a column {name!r} cannot be exported: the graph's output has that name")
    graph.nodes.append(onnx.helper.make_node("Identity", [x], [name]))
    whole = onnx.helper.make_graph(
        graph.nodes,
        "gpubatch",
        graph.inputs,
        [onnx.helper.make_tensor_value_info(name, graph.kind(graph.dtype), ["batch", model.net.outputs])],
        graph.constants,
    )
    opsets = [onnx.helper.make_opsetid("", OPSET), onnx.helper.make_opsetid(OF_TEXTS, TEXTS_OPSET)]
    made = onnx.helper.make_model(whole, producer_name="gpubatch", opset_imports=opsets, ir_version=IR)
    if model.classes is not None:
        onnx.helper.set_model_props(made, {"classes": json.dumps(model.classes)})
    if (size := sum(array.nbytes for array in model.net.parameters.values())) > LARGEST:
        raise ArgumentError(f"parameters of {size} bytes cannot be exported; an ONNX file has at most {LARGEST}")
    onnx.checker.check_model(made)
    with replacing(target) as unfinished:
        unfinished.write_bytes(made.SerializeToString())


def imported() -> Any:
    """The package onnx."""
    try:
        import onnx
    except ImportError as error:
        raise ImportError(f"gb.export_onnx needs the extra onnx ({error}): pip install 'gpubatch[onnx]'") from error
    return onnx


def prepared(graph: Graph, of: Preparation) -> str:
    """The nodes that make of raw samples what the network takes."""
    shape = ["batch", *of.sample_shape]
    x = graph.input("X", graph.kind(of.dtype), shape[::-1] if of.sample_axis else shape)
    x = graph.add("Transpose", x, perm=[1, 0]) if of.sample_axis else x
    if of.dtype != graph.dtype:
        x = graph.add("Cast", x, to=graph.kind(graph.dtype))
    if of.scale is not None:
        x = graph.add("Mul", x, graph.constant(of.scale))
    if of.prepare is None:
        return x
    if isinstance(of.prepare, Standardize):
        return graph.add(
            "Div",
            graph.add("Sub", x, graph.constant(of.prepare.mean)),
            graph.constant(of.prepare.deviation),
        )
    if of.prepare not in OPERATORS and of.prepare not in COMPOSED:
        raise ArgumentError(
            f"prepare={of.prepare!r} cannot be exported; export model.net, whose input is prepared samples"
        )
    return graph.apply(of.prepare, x)


def prepared_table(graph: Graph, recipe: Recipe) -> str:
    """The nodes that make of a table's columns, each an input of its own, what the network takes."""
    parts: list[str] = []
    double, single = graph.kind(np.dtype(np.float64)), graph.kind(np.dtype(np.float32))
    for column in recipe.columns:
        if isinstance(column, Hashed):
            raise ArgumentError(
                f"column {column.name!r} cannot be exported, since its texts are hashed, which ONNX cannot; export "
                "model.net, whose input is what gb.read_table(path, like=train).as_samples() makes"
            )
        if isinstance(column, Numeric):
            x = graph.input(column.name, double, ["batch", 1])
            absent = graph.add("IsNaN", x)
            median, mean, deviation = (graph.wide(value) for value in (column.median, column.mean, column.deviation))
            known = graph.add("Where", absent, median, x)
            made = [graph.add("Div", graph.add("Sub", known, mean), deviation)] if column.varies else []
            made += [absent] if column.missing else []
            parts += [graph.add("Cast", each, to=single) for each in made]
        elif isinstance(column, Category):
            x = graph.input(column.name, graph.texts, ["batch", 1])
            gaps = {} if not column.missing else dict.fromkeys(["", *recipe.missing], len(column.values))
            places = {**{value: place for place, value in enumerate(column.values)}, **gaps}
            codes = graph.add(
                "LabelEncoder",
                x,
                domain=OF_TEXTS,
                keys_strings=list(places),
                values_int64s=list(places.values()),
                default_int64=-1,
            )
            own = graph.wide(np.arange(len(column.features)))
            parts.append(graph.add("Cast", graph.add("Equal", codes, own), to=single))
    x = graph.add("Concat", *parts, axis=1)
    return x if graph.dtype == np.float32 else graph.add("Cast", x, to=graph.kind(graph.dtype))


class Graph:
    """The nodes and constants of a graph as it is made, for the layers of ``net``.

    reserved: names of inputs, which nothing else may have
    """

    def __init__(self, onnx: Any, net: Network, reserved: Collection[str] = ()) -> None:
        self._onnx, self._net, self._reserved = onnx, net, {*reserved}
        self.dtype: np.dtype[Any] = net.compute_dtype
        self.texts = int(onnx.TensorProto.STRING)
        self.inputs: list[Any] = []
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def kind(self, dtype: np.dtype[Any]) -> int:
        """ONNX's number for an element type."""
        return int(self._onnx.helper.np_dtype_to_tensor_dtype(dtype))

    def _free(self, name: str) -> str:
        while name in self._reserved:
            name = f"_{name}"
        return name

    def input(self, name: str, kind: int, shape: list[Any]) -> str:
        """Add an input; return its name."""
        self.inputs.append(self._onnx.helper.make_tensor_value_info(name, kind, shape))
        return name

    def wide(self, value: Any) -> str:
        """Add a number or an array as it is, float64 or int64; return its name."""
        name = self._free(f"c{len(self.constants)}")
        self.constants.append(self._onnx.numpy_helper.from_array(np.asarray(value), name))
        return name

    def add(self, operator: str, *inputs: str, **attributes: Any) -> str:
        """Add a node; return the name of its output."""
        name = self._free(f"v{len(self.nodes)}")
        self.nodes.append(self._onnx.helper.make_node(operator, list(inputs), [name], **attributes))
        return name

    def constant(self, value: Any, name: str = "") -> str:
        """Add a number or an array, of the graph's element type unless it is a condition; return its name."""
        array = np.asarray(value)
        array = array if array.dtype == bool else array.astype(self.dtype)
        name = self._free(name or f"c{len(self.constants)}")
        self.constants.append(
            self._onnx.numpy_helper.from_array(np.ascontiguousarray(array).reshape(array.shape), name)
        )
        return name

    def apply(self, function: Any, *inputs: str) -> str:
        """Add the nodes of one of NumPy's functions."""
        return COMPOSED[function](self, *inputs) if function in COMPOSED else self.add(OPERATORS[function], *inputs)

    def layer(self, layer: Layer, place: int, x: str) -> str:
        """Add a layer that takes x."""
        where, kind = f"layer {place + 1} ({type(layer).__name__})", type(layer)
        if kind.__module__ != Dense.__module__ or changed(layer):
            raise ArgumentError(
                f"{where} cannot be exported: only gpubatch's layers can, and gb.Elementwise of a formula"
            )
        names = core_of(self._net).names[place]
        both = {**self._net.parameters, **self._net.buffers}
        own = {name: self.constant(self._net.backend.to_numpy(both[full]), full) for name, full in names.items()}
        if isinstance(layer, Dense):
            return self.add("Gemm", x, own["W"], *([own["b"]] if layer.bias else []))
        if isinstance(layer, BatchNorm):
            arrays = own["gamma"], own["beta"], own["running_mean"], own["running_var"]
            return self.add("BatchNormalization", x, *arrays, epsilon=layer.eps)
        if isinstance(layer, ActivationLayer):
            return self._activation(layer.function, x)
        if isinstance(layer, Dropout):  # nothing, in evaluation
            return x
        raise ArgumentError(f"{where} cannot be exported")

    def _activation(self, f: BoundActivation, x: str) -> str:
        """An activation: by one of ONNX's own where there is one, else by the operations of its formula."""
        if f.declared is activations.relu:
            return self.add("Relu", x)
        if f.declared is activations.sigmoid:
            return self.add("Sigmoid", x)
        trace = f.declared.form(self.dtype.name).forward
        return self._formula(trace, f.scalars(trace), x)

    def _formula(self, trace: Trace, scalars: tuple[float, ...], x: str) -> str:
        """The first result of a formula of x."""
        needed = {trace.results[0].number} if isinstance(trace.results[0], Element) else set[int]()
        for element in reversed(trace.elements):
            if element.number in needed:
                needed |= {y.number for y in element.operands if isinstance(y, Element)}
        names: dict[int, str] = {}
        number = functools.cache(self.constant)

        def operand(y: Any) -> str:
            if isinstance(y, Element):
                return names[y.number]
            return number(scalars[trace.scalars[y.text]] if isinstance(y, Scalar) else float(y))

        for element in trace.elements:
            if element.number not in needed:
                continue
            if element.op is None or element.op is COPY:
                names[element.number] = x if element.op is None else operand(element.operands[0])
            elif element.op is INDICATOR:
                names[element.number] = self.add("Cast", operand(element.operands[0]), to=self.kind(self.dtype))
            else:
                names[element.number] = self.apply(FUNCTIONS[element.op], *map(operand, element.operands))
        if isinstance(trace.results[0], Element):
            return operand(trace.results[0])
        return self.add("Add", self.add("Mul", x, number(0.0)), operand(trace.results[0]))  # the same for all x

    def probabilities(self, scores: str) -> str:
        """Add what makes probabilities of scores."""
        loss = self._net.loss_function
        loss.check_probabilities()
        if isinstance(loss, losses.OfSoftmax):
            return self.add("Softmax", scores, axis=1)
        if isinstance(loss, losses.LogOdds):
            return self.add("Sigmoid", scores)
        raise ArgumentError(f"probabilities of {loss.name} cannot be exported")
