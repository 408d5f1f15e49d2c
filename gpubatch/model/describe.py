"""Layers and losses as JSON: their classes and the arguments of their constructors; and back.

A class must keep each argument of its constructor in an attribute of that name, as scikit-learn's estimators do. What
has more than a class and plain arguments is an object with one key: ``{"activation": ...}`` is a formula by its text,
``{"array": name}`` an array of the file, ``{"object": ...}`` a layer, a loss or one of their parts. gpubatch's own
classes go by their names, others by "module:qualname".
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import sys
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from gpubatch import nn
from gpubatch.backend import backend_of, is_cupy
from gpubatch.errors import ArgumentError, DataFormatError, DTypeError, FormulaError, GpubatchError
from gpubatch.formula import (
    Activation,
    BoundActivation,
    BoundScoreLoss,
    ScoreLoss,
    activations,
    formula_of_text,
    scores,
    text_of_formula,
)
from gpubatch.nn import LOSSES, Elementwise, Layer, Loss, loss_of
from gpubatch.own import changed

OWN: dict[str, type[Any]] = {name: x for name, x in vars(nn).items() if isinstance(x, type)}
FORMULAS: dict[str, dict[str, Activation | ScoreLoss]] = {
    "activation": {name: getattr(activations, name) for name in activations.__all__},
    "score loss": {name: getattr(scores, name) for name in scores.__all__},
}
DEEPEST, LONGEST = 20, 500  # objects within objects; characters of a name


def path_of(x: Any) -> str:
    """The import path of a class or a function, or of an object's class."""
    x = x if isinstance(x, (type, types.FunctionType, types.BuiltinFunctionType)) else type(x)
    return f"{x.__module__}:{x.__qualname__}"


class Encoder:
    """Makes JSON of layers and losses; arrays among their arguments go to ``arrays``. ``dtype`` is the network's."""

    def __init__(self, dtype: np.dtype[Any], arrays: dict[str, np.ndarray]) -> None:
        self._dtype, self._arrays = dtype.name, arrays

    def layer(self, layer: Layer, place: int) -> dict[str, Any]:
        """A layer; the error of one that cannot be described has its place, counted from 1."""
        return self._object(layer, f"layer {place + 1} ({type(layer).__name__})", 0)

    def loss(self, loss: Loss) -> dict[str, Any]:
        """A loss: one of gpubatch's without options by its name, a formula, or a class with its arguments."""
        if (name := next((name for name, known in LOSSES.items() if known is loss), None)) is not None:
            return {"name": name}
        bound = getattr(loss, "bound", None)
        if isinstance(bound, BoundScoreLoss) and type(loss_of(bound)) is type(loss):
            return {"formula": self._value(bound, f"the loss {loss.name}", 0)}
        return self._object(loss, f"the loss {loss.name}", 0)

    def _object(self, x: Any, where: str, depth: int) -> dict[str, Any]:
        own = OWN.get(type(x).__name__) is type(x)
        if own and (method := changed(x)):
            raise ArgumentError(f"{where} cannot be saved: its method {method} was replaced; write a subclass")
        if isinstance(x, Elementwise) and own:
            return {"class": "Elementwise", "arguments": {"activation": self._value(x.bound, where, depth)}}
        arguments = {}
        for name in self._parameters(type(x), where):
            found = getattr(x, name, inspect.Parameter.empty)
            if found is inspect.Parameter.empty:
                raise ArgumentError(
                    f"{where} cannot be saved: {path_of(x)} takes the argument {name}, and has no attribute of that "
                    f"name; keep it in one, as self.{name} = {name}"
                )
            arguments[name] = self._value(found, f"{where}: {name}", depth)
        return {"class": type(x).__name__ if own else path_of(x), "arguments": arguments}

    @staticmethod
    def _parameters(kind: type[Any], where: str) -> list[str]:
        if dataclasses.is_dataclass(kind):
            return [field.name for field in dataclasses.fields(kind) if field.init]
        if kind.__init__ is object.__init__:
            return []
        _, *parameters = inspect.signature(kind.__init__).parameters.values()
        for parameter in parameters:
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY):
                raise ArgumentError(
                    f"{where} cannot be saved: the constructor of {path_of(kind)} takes {parameter}; a file holds "
                    "arguments by name"
                )
        return [parameter.name for parameter in parameters]

    def _value(self, x: Any, where: str, depth: int) -> Any:
        if depth > DEEPEST:
            raise ArgumentError(f"{where} cannot be saved: it has more than {DEEPEST} objects within each other")
        if isinstance(x, np.generic):
            x = x.item()
        if x is None or isinstance(x, (bool, int, str)) or (isinstance(x, float) and math.isfinite(x)):
            return x
        if isinstance(x, float):
            return {"number": str(x)}
        if isinstance(x, (list, tuple)):
            return {type(x).__name__: [self._value(item, f"{where}[{i}]", depth + 1) for i, item in enumerate(x)]}
        if isinstance(x, Mapping) and all(isinstance(key, str) for key in x):
            return {"mapping": {key: self._value(item, f"{where}[{key!r}]", depth + 1) for key, item in x.items()}}
        if isinstance(x, np.ndarray) or is_cupy(x):
            name = f"arguments.{len(self._arrays)}"
            self._arrays[name] = np.ascontiguousarray(backend_of(x).to_numpy(x))
            return {"array": name}
        if isinstance(x, (Activation, ScoreLoss, BoundActivation, BoundScoreLoss)):
            return {"formula": self._formula(x, where)}
        if isinstance(x, (Layer, Loss)) or type(x) in OWN.values():
            return {"object": self._object(x, where, depth + 1)}
        raise DTypeError(
            f"{where} cannot be saved: a file holds numbers, text, lists, mappings, arrays, formulas, layers and "
            f"losses, got {x!r} of type {type(x).__name__}"
        )

    def _formula(self, x: Activation | ScoreLoss | BoundActivation | BoundScoreLoss, where: str) -> dict[str, Any]:
        declared = x.declared if isinstance(x, (BoundActivation, BoundScoreLoss)) else x
        found: dict[str, Any] = {}
        if FORMULAS[declared.kind].get(declared.name) is declared:
            found["text"] = {"kind": declared.kind, "name": declared.name}
        else:
            try:
                found["text"] = text_of_formula(declared, self._dtype)
            except FormulaError as error:
                raise FormulaError(f"{where} cannot be saved: {error}") from error
        if isinstance(x, (BoundActivation, BoundScoreLoss)):
            found["parameters"] = x.parameters
        return found


class Decoder:
    """Makes layers and losses of their JSON; it imports nothing, and calls nothing but their constructors.

    path: of the file, for messages
    dtype: the network's
    array: gives an array of the file by its name
    custom: the user's classes and functions, or a mapping from their names in the file to them
    """

    def __init__(
        self,
        path: Any,
        dtype: np.dtype[Any],
        array: Callable[[str], np.ndarray],
        custom: Iterable[Any] | Mapping[str, Any] = (),
    ) -> None:
        self._path, self._dtype, self._array = path, dtype.name, array
        if isinstance(custom, Mapping):
            self._custom = dict(custom)
        else:
            try:
                self._custom = {path_of(x): x for x in custom}
            except TypeError:
                raise DTypeError(f"custom must be a list of classes and functions, got {custom!r}") from None

    def layer(self, found: Any, place: int) -> Layer:
        """The layer at ``place``, counted from 0."""
        layer: Layer = self._checked(self._object(found, f"layer {place + 1}", 0), Layer, f"layer {place + 1}")
        return layer

    def loss(self, found: Any) -> Loss:
        """The loss."""
        if isinstance(found, dict) and found.keys() == {"name"}:
            if not isinstance(found["name"], str) or found["name"] not in LOSSES:
                raise DataFormatError(f"{self._path}: no loss has the name {str(found['name'])[:99]!r}")
            return LOSSES[found["name"]]
        if isinstance(found, dict) and found.keys() == {"formula"}:
            bound = self._value(found["formula"], "the loss", 0)
            return loss_of(self._checked(bound, BoundScoreLoss, "the loss"))
        loss: Loss = self._checked(self._object(found, "the loss", 0), Loss, "the loss")
        return loss

    def custom(self, name: Any, what: str, remedy: str = "") -> Any:
        """The user's object for a name in the file; ``remedy`` names another way to give it."""
        if not isinstance(name, str) or len(name) > LONGEST:
            raise DataFormatError(f"{self._path}: {what} must have a name, got {str(name)[:99]}")
        if name not in self._custom:
            short = name.rpartition(":")[2]
            given = f"[{short}]" if short.replace(".", "").isidentifier() else f"{{{name!r}: ...}}"
            raise ArgumentError(
                f"{self._path}: {what} is {name}, and gb.load imports nothing that a file names; {remedy}give it as "
                f"gb.load(path, custom={given})"
            )
        return self._custom[name]

    def _object(self, found: Any, where: str, depth: int) -> Any:
        if not isinstance(found, dict) or not isinstance(found.get("arguments"), dict):
            raise DataFormatError(f"{self._path}: {where} must have a class and arguments, got {str(found)[:99]}")
        name = found.get("class")
        kind = OWN.get(name) if isinstance(name, str) and ":" not in name else self._imported(name, where)
        if kind is None:
            raise DataFormatError(f"{self._path}: {where} is of the class {name!r}, which this gpubatch does not have")
        values = {key: self._value(item, f"{where}: {key}", depth + 1) for key, item in found["arguments"].items()}
        try:
            return kind(**values)
        except (GpubatchError, TypeError, ValueError, AttributeError, LookupError, ArithmeticError) as error:
            raise DataFormatError(f"{self._path}: {where} cannot be made: {kind.__name__}: {error}") from error

    def _imported(self, name: Any, where: str) -> type[Any]:
        """A layer's or a loss's class that was given, or is in a module that was imported before."""
        if not isinstance(name, str):
            raise DataFormatError(f"{self._path}: {where} must have the name of a class, got {str(name)[:99]}")
        module, _, qualname = name.partition(":")
        found: Any = self._custom.get(name)
        if found is None:
            found = sys.modules.get(module)
            for part in qualname.split("."):
                found = vars(found).get(part) if isinstance(found, (types.ModuleType, type)) else None
            if found is None:
                return self.custom(name, where, f"import {module} before, or ")  # type: ignore[no-any-return]
        if not (isinstance(found, type) and issubclass(found, (Layer, Loss))):
            raise DataFormatError(f"{self._path}: {where} is {name[:99]}, which is no layer and no loss")
        return found

    def _value(self, x: Any, where: str, depth: int) -> Any:
        if depth > DEEPEST:
            raise DataFormatError(f"{self._path}: {where} has more than {DEEPEST} objects within each other")
        if x is None or isinstance(x, (bool, int, float, str)):
            return x
        key, value = next(iter(x.items())) if isinstance(x, dict) and len(x) == 1 else ("", None)
        if key == "number" and value in ("inf", "-inf", "nan"):
            return float(value)
        if key in ("list", "tuple") and isinstance(value, list):
            items = [self._value(item, where, depth + 1) for item in value]
            return items if key == "list" else tuple(items)
        if key == "mapping" and isinstance(value, dict):
            return {name: self._value(item, where, depth + 1) for name, item in value.items()}
        if key == "array" and isinstance(value, str):
            return self._array(value)
        if key == "formula" and isinstance(value, dict):
            return self._formula(value, where)
        if key == "object":
            return self._object(value, where, depth + 1)
        raise DataFormatError(f"{self._path}: {where} has a value of no known kind, {str(x)[:99]}")

    def _formula(self, found: dict[str, Any], where: str) -> Any:
        text, parameters = found.get("text"), found.get("parameters")
        try:
            if isinstance(text, dict) and text.keys() == {"kind", "name"}:
                declared = FORMULAS[text["kind"]][text["name"]]
            else:
                declared = formula_of_text(text, self._dtype)
            if parameters is None:
                return declared
            bound = declared.bind(**parameters)
            for trace in traces_of(declared, self._dtype):
                bound.scalars(trace)
        except (GpubatchError, TypeError, LookupError, ArithmeticError, ValueError) as error:
            raise DataFormatError(f"{self._path}: the formula of {where} cannot be read: {error}") from error
        return bound

    def _checked(self, x: Any, kind: type[Any], where: str) -> Any:
        if not isinstance(x, kind):
            raise DataFormatError(f"{self._path}: {where} must be a {kind.__name__}, got {x!r}")
        return x


def traces_of(declared: Activation | ScoreLoss, dtype: str) -> list[Any]:
    """All traces of a formula for a dtype."""
    if isinstance(declared, ScoreLoss):
        return [declared.form(dtype, "loss", "dz"), declared.form(dtype, "loss")]
    form = declared.form(dtype)
    return [form.forward, form.backward]


def differences(found: Any, own: Any, where: str = "") -> list[str]:
    """In words, where two descriptions differ; ``found`` is the file's. How parameters began makes no difference."""
    if isinstance(found, dict) and isinstance(own, dict):
        if "class" in found and found["class"] != own.get("class"):
            return [f"{where} is {found['class']} in the file, and {own.get('class')} here"]
        if found.keys() == own.keys():
            named = {key: where if key in PASSED else f"{where} {key}".strip() for key in found if key not in FIRST}
            return [text for key, name in named.items() for text in differences(found[key], own[key], name)]
    if found == own:
        return []
    return [f"{where} is {_short(found)} in the file, and {_short(own)} here"]


FIRST = ("init", "bias_init")  # how parameters began
PASSED = ("arguments", "formula", "text", "parameters")  # keys that say nothing to a reader


def _short(x: Any) -> str:
    text = repr(x)
    return text if len(text) <= 100 else f"{text[:97]}..."
