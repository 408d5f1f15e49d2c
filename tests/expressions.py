"""Random expressions of everything that a formula may use: as programs, computed with arrays or recorded."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

import gpubatch as gb
from gpubatch.formula import Rule

UNARY_FUNCTIONS: dict[str, Any] = {
    "neg": lambda x: -x,
    "abs": abs,
    "sqrt": lambda x: np.sqrt(abs(x)),
    "exp": lambda x: np.exp(-abs(x)),
    "log": lambda x: np.log(abs(x) + 0.5),
    "log1p": lambda x: np.log1p(abs(x)),
    "tanh": np.tanh,
    "sign": np.sign,
    "floor": np.floor,
    "ceil": np.ceil,
    "square": lambda x: np.square(np.tanh(x)),
    "cube": lambda x: np.tanh(x) ** 3,
    "clip": lambda x: np.clip(x, None, 1.5),
}
BINARY_FUNCTIONS: dict[str, Any] = {
    "+": lambda x, y: x + y,
    "-": lambda x, y: x - y,
    "*": lambda x, y: np.tanh(x) * y,
    "/": lambda x, y: x / (abs(y) + 1),
    "//": lambda x, y: x // (abs(y) + 1),
    "%": lambda x, y: x % (abs(y) + 1),
    "power": lambda x, y: (abs(x) + 0.5) ** np.tanh(y),
    "max": np.maximum,
    "min": np.minimum,
}
COMPARED: dict[str, Any] = {
    "<": lambda x, y: x < y,
    "<=": lambda x, y: x <= y,
    ">": lambda x, y: x > y,
    ">=": lambda x, y: x >= y,
    "==": lambda x, y: x == y,
    "!=": lambda x, y: x != y,
}
# Over all elements of an array; the operand differs from element to element.
REDUCTIONS: dict[str, Any] = {"norm": gb.norm, "mean": gb.mean, "max_abs": gb.max_abs}
CONDITIONS: dict[str, Any] = {
    "not": np.logical_not,
    "&": np.logical_and,
    "|": np.logical_or,
    "^": np.logical_xor,
}


def programs() -> st.SearchStrategy[Any]:
    """Up to 12 steps: an operation, and how far back its operands were made. Every value stays finite."""
    return steps([*UNARY_FUNCTIONS, *BINARY_FUNCTIONS, *COMPARED, *CONDITIONS, "where", "times condition"])


def smooth_programs() -> st.SearchStrategy[Any]:
    """The same with reductions and without jumps: at one, a rounding of a reduction decides for all elements."""
    jumps = ("sign", "floor", "ceil", "//", "%")
    return steps([name for name in (*UNARY_FUNCTIONS, *BINARY_FUNCTIONS) if name not in jumps] + 3 * [*REDUCTIONS])


def steps(names: list[str]) -> st.SearchStrategy[Any]:
    back = st.integers(0, 9)
    return st.lists(st.tuples(st.sampled_from(names), back, back), min_size=1, max_size=12)


def value(program: Any, leaves: list[Any]) -> Any:
    """What the last step makes, from arrays or from symbols."""
    values, conditions = list(leaves), list[Any]()
    for name, first, second in program:
        x, y = values[-1 - first % len(values)], values[-1 - second % len(values)]
        if name in UNARY_FUNCTIONS:
            values.append(UNARY_FUNCTIONS[name](x))
        elif name in BINARY_FUNCTIONS:
            values.append(BINARY_FUNCTIONS[name](x, y))
        elif name in REDUCTIONS:
            values.append(REDUCTIONS[name](np.tanh(x) + leaves[-1]))
        elif name in COMPARED or not conditions:
            conditions.append(COMPARED.get(name, np.less)(x, y))
        else:
            c, d = conditions[-1 - first % len(conditions)], conditions[-1 - second % len(conditions)]
            if name in CONDITIONS:
                conditions.append(CONDITIONS[name](*([c] if name == "not" else [c, d])))
            else:
                values.append(np.where(c, x, y) if name == "where" else c * y)
    return values[-1]


def rule_of(for_w: Any, for_a: Any) -> Rule:
    """A rule with the state a and b, whose new w and a two programs compute."""

    @gb.rule
    def any_rule(w, g, a, b, t, *, lr):
        leaves = [2, -1.25, t, lr, b, a, g, w]
        return value(for_w, leaves), value(for_a, leaves), b

    return any_rule


def computed(for_w: Any, for_a: Any) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Arrays w, g, a and b for :func:`rule_of`, and what NumPy makes of w and a where t = 3 and lr = 0.7."""
    arrays = list(np.random.default_rng(5).standard_normal((4, 40)))
    leaves = [2, -1.25, np.float64(3), np.float64(0.7), *(x.copy() for x in reversed(arrays))]
    return arrays, [np.broadcast_to(value(program, leaves), 40).astype(float) for program in (for_w, for_a)]
