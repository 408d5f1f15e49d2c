"""Activations and score losses as text, for files: what was recorded of a formula, and a reader that runs none of it.

A line is ``name = expression`` for each operation, in the order of computation. An expression has the operators and
functions of :data:`~gpubatch.formula.trace.OPS`, applied to the formula's arguments and parameters, names of earlier
lines, and numbers: an expression of Python and of C alike. The reader takes it apart and records the same operations
again, so the formula that it returns computes the same bits. Nothing is evaluated or executed.
"""

from __future__ import annotations

import ast
import functools
import json
import keyword
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from gpubatch.errors import FormulaError
from gpubatch.formula.elementwise import Activation, ScoreLoss
from gpubatch.formula.trace import (
    FUNCTIONS,
    HOST_FUNCTIONS,
    INDICATOR,
    OPS,
    PRIMARY,
    Element,
    Scalar,
    Symbol,
    is_finite,
    number_text,
    restated,
    text_of,
)

KINDS: dict[str, type[Activation | ScoreLoss]] = {kind.kind: kind for kind in (Activation, ScoreLoss)}
MOST_LINES, LONGEST = 10_000, 100_000  # a line, and the text of a scalar
NAME = re.compile(r"[A-Za-z]\w{0,99}", re.ASCII)
# Words, numbers, operators and blanks; everything else, strings above all, is no part of an expression.
WORDS = re.compile(r"(?:[A-Za-z_]\w*|(?:\d+\.?\d*(?:e[+-]?\d+)?)(?![\w.])|[-+*/<>=!]=?|[(), ])*", re.ASCII)

OPERATORS: dict[type[ast.AST], Callable[..., Any]] = {
    ast.Add: np.add,
    ast.Sub: np.subtract,
    ast.Mult: np.multiply,
    ast.Div: np.divide,
    ast.USub: np.negative,
    ast.Eq: np.equal,
    ast.NotEq: np.not_equal,
    ast.Lt: np.less,
    ast.LtE: np.less_equal,
    ast.Gt: np.greater,
    ast.GtE: np.greater_equal,
}


def text_of_formula(declared: Activation | ScoreLoss, dtype: str) -> dict[str, Any]:
    """What :func:`formula_of_text` takes, for JSON; ``dtype`` is that of the elements, on which a formula may depend.

    Raises FormulaError for a formula that the reader would not read, since it calls a function of the host.
    """
    inputs, returned = declared.recorded(dtype)
    value, slope = declared.with_slope(returned, inputs[0], "a value")
    names = dict(zip(inputs, declared.arguments, strict=True))
    trace = restated(declared.name, names, {"value": value, "slope": slope})
    stem = "v"
    while any(re.fullmatch(rf"{stem}\d+", name) for name in trace.hyper):
        stem += "v"

    def operand(x: Any) -> tuple[str, int]:
        if isinstance(x, Element):
            return (x.name or f"{stem}{x.number}"), PRIMARY
        return number_text(x)

    lines = [f"{name} = {text}" for x in trace.used_scalars() for name, text in x.definitions.items()]
    for x in trace.elements:
        if x.op is INDICATOR:
            lines.append(f"{stem}{x.number} = select({operand(x.operands[0])[0]}, 1, 0)")
        elif x.op is not None:
            lines.append(f"{stem}{x.number} = {text_of(x.op, [operand(y) for y in x.operands])}")
    text = {
        "kind": declared.kind,
        "name": declared.name,
        "required": list(declared.required),
        "defaults": dict(declared.defaults),
        "lines": list(dict.fromkeys(lines)),
        "results": [operand(x)[0] for x in trace.results],
    }
    formula_of_text(text, dtype)
    return text


def formula_of_text(text: Any, dtype: str) -> Activation | ScoreLoss:
    """The activation or score loss that a text describes, recorded; raises FormulaError for any other text.

    It is the same object for the same text, so that a model that is loaded again finds what was compiled for it.
    """
    return _read(json.dumps(text, allow_nan=False), dtype)


@functools.lru_cache(maxsize=64)
def _read(content: str, dtype: str) -> Activation | ScoreLoss:
    text = json.loads(content)
    if not isinstance(text, Mapping) or text.get("kind") not in KINDS:
        raise FormulaError(
            f"a formula must be a mapping with a kind, one of {', '.join(KINDS)}, got {str(text)[:99]!r}"
        )
    cls, name = KINDS[text["kind"]], text.get("name")
    required, defaults = text.get("required"), text.get("defaults")
    lines, results = text.get("lines"), text.get("results")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise FormulaError(f"a formula must have an identifier as its name, got {str(name)[:99]!r}")
    if not isinstance(required, list) or not isinstance(defaults, Mapping):
        raise FormulaError(f"{name}: required must be a list of names, and defaults a mapping to numbers")
    parameters = [*required, *defaults]
    for parameter in parameters:
        wrong = not isinstance(parameter, str) or not NAME.fullmatch(parameter) or keyword.iskeyword(parameter)
        if wrong or parameter in (*HOST_FUNCTIONS, *cls.arguments, "t", "evaluate") or parameters.count(parameter) > 1:
            raise FormulaError(f"{name}: {str(parameter)[:99]!r} cannot be a parameter")
    for number in defaults.values():
        if isinstance(number, bool) or not isinstance(number, (int, float)) or not is_finite(number):
            raise FormulaError(f"{name}: defaults must be finite numbers, got {str(number)[:99]}")
    if not isinstance(lines, list) or len(lines) > MOST_LINES or not isinstance(results, list) or len(results) != 2:
        raise FormulaError(f"{name}: lines must be a list of at most {MOST_LINES}, and results a list of two")
    program = _program(name, lines, results, [*cls.arguments, *parameters])

    def formula(*given: Any, **of: Any) -> tuple[Any, Any]:
        values: dict[str, Any] = {**defaults, **of, **dict(zip(cls.arguments, given, strict=True))}
        for target, expression in program[:-2]:
            values[target] = _value(name, expression, values)
        value, slope = (_value(name, expression, values) for _, expression in program[-2:])
        return value, slope

    declared = cls(name, formula, tuple(required), {key: float(number) for key, number in defaults.items()})
    if isinstance(declared, Activation):
        declared.form(dtype)
    else:
        declared.form(dtype, "loss", "dz")
    return declared


def _program(name: str, lines: list[Any], results: list[Any], known: list[str]) -> list[tuple[str, ast.expr]]:
    """(target, expression) for each line, then for each result; checked, names above all."""
    names, program = set(known), list[tuple[str, ast.expr]]()
    for line in [*lines, *(f"result = {text}" for text in results)]:
        target, equals, expression = line.partition(" = ") if isinstance(line, str) else ("", "", "")
        if not equals or len(line) > LONGEST or not NAME.fullmatch(target) or not WORDS.fullmatch(expression):
            raise FormulaError(f"{name}: a line must be NAME = EXPRESSION, got {str(line)[:99]!r}")
        try:
            node = ast.parse(expression, mode="eval").body
            _check(name, node, names)
        except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
            raise FormulaError(f"{name}: {line[:99]!r} cannot be read: {error}") from None
        if len(program) < len(lines) and (target in names or target in FUNCTIONS):
            raise FormulaError(f"{name}: {target!r} has a value before {line[:99]!r}")
        names.add(target)
        program.append((target, node))
    return program


def _check(name: str, node: ast.AST, names: set[str]) -> None:
    """Raise FormulaError unless an expression has nothing but known names, numbers, operators and functions."""
    if isinstance(node, ast.Name) and node.id in names:
        return
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)) and is_finite(node.value):
        return
    if (found := _operation(node)) is None:
        raise FormulaError(f"{name}: {ast.unparse(node)[:99]!r} is no known name, function or operator, and no number")
    function, operands = found
    if isinstance(node, ast.Call) and (node.keywords or len(operands) != OPS[function].text.count("{}")):
        raise FormulaError(f"{name}: {ast.unparse(node.func)} has other operands")
    for operand in operands:
        _check(name, operand, names)


def _operation(node: ast.AST) -> tuple[Callable[..., Any], list[ast.expr]] | None:
    """The function of NumPy that a node of an expression stands for, and its operands; None for any other node."""
    if isinstance(node, ast.Call):
        function = FUNCTIONS.get(node.func.id) if isinstance(node.func, ast.Name) else None
        operands = node.args
    elif isinstance(node, ast.BinOp):
        function, operands = OPERATORS.get(type(node.op)), [node.left, node.right]
    elif isinstance(node, ast.UnaryOp):
        function, operands = OPERATORS.get(type(node.op)), [node.operand]
    elif isinstance(node, ast.Compare) and len(node.ops) == 1:
        function, operands = OPERATORS.get(type(node.ops[0])), [node.left, *node.comparators]
    else:
        return None
    return None if function is None else (function, operands)


def _value(name: str, node: ast.expr, values: Mapping[str, Any]) -> Any:
    """The value of a checked expression: a symbol where one is among its operands, else an array or a number."""
    if isinstance(node, ast.Name):
        return values[node.id]
    if isinstance(node, ast.Constant):
        return node.value
    operation = _operation(node)
    assert operation is not None, "the expression is checked"
    function, operands = operation
    given = [_value(name, operand, values) for operand in operands]
    if not any(isinstance(x, Symbol) or getattr(x, "shape", ()) for x in given):
        if isinstance(node, ast.UnaryOp) and isinstance(node.operand, ast.Constant):
            return -node.operand.value  # type: ignore[operator]
        with np.errstate(all="ignore"):
            found = function(*given)
        return found.item() if isinstance(found, (np.generic, np.ndarray)) else found
    found = function(*given)
    if isinstance(found, Scalar) and len(found.text) > LONGEST:
        raise FormulaError(f"{name}: the text of a scalar is longer than {LONGEST} characters")
    return found
