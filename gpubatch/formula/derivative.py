"""The derivative of a traced formula, appended to its trace by forward-mode differentiation.

At a corner it is the derivative of the branch that the formula takes: that of ``np.maximum(x, 0)`` at 0 is 0, as in
PyTorch. The derivative of ``np.sign``, ``np.floor`` and a condition is 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from gpubatch.formula.trace import COMPARISONS, COPY, INDICATOR, LOGICAL, OPS, Element, Op, Symbol


def derivative(value: Any, by: Element) -> Any:
    """dvalue/dby: a symbol, or a number if it is constant. ``by`` is an input of the trace."""
    if not isinstance(value, Element):
        return 0
    found: dict[int, Any] = {by.number: 1}
    for x in value.trace.elements[: value.number + 1]:  # a copy: the loop records more
        slopes = [found.get(y.number, 0) if isinstance(y, Element) else 0 for y in x.operands]
        if x.op is not None and not all(_is(d, 0) for d in slopes):
            found[x.number] = RULES[x.op](x, x.operands, slopes)
    return found.get(value.number, 0)


def _is(x: Any, number: int) -> bool:
    return not isinstance(x, Symbol) and x == number


def _plus(a: Any, b: Any) -> Any:
    return b if _is(a, 0) else a if _is(b, 0) else a + b


def _minus(a: Any, b: Any) -> Any:
    return a if _is(b, 0) else -b if _is(a, 0) else a - b


def times(a: Any, b: Any) -> Any:
    """a b; no product is recorded if a or b is 0, 1 or -1."""
    if _is(a, 0) or _is(b, 0):
        return 0
    if _is(a, -1) or _is(b, -1):
        return -b if _is(a, -1) else -a
    return b if _is(a, 1) else a if _is(b, 1) else a * b


def _over(numerator: Any, denominator: Any) -> Any:
    """A quotient that is 0, not NaN, if its denominator overflows, as in 1/(1 + exp(-x))."""
    if _is(numerator, 0):
        return 0
    if not isinstance(denominator, Element):
        return numerator / denominator
    reciprocal: Any = 1 / denominator
    overflowed: Any = abs(reciprocal) <= 0
    return np.where(overflowed, 0, times(numerator, reciprocal))


def _divide(q: Any, operands: Any, slopes: Any) -> Any:
    (_, b), (da, db) = operands, slopes
    return times(da, 1 / b) if _is(db, 0) else _over(_minus(da, times(q, db)), b)


def _power(y: Any, operands: Any, slopes: Any) -> Any:
    (a, b), (da, db) = operands, slopes
    of_base = 0 if _is(da, 0) else times(b * a ** (b - 1), da)
    return _plus(of_base, 0 if _is(db, 0) else times(y * np.log(a), db))


def _either(larger: bool) -> Callable[..., Any]:
    def slope(y: Any, operands: Any, slopes: Any) -> Any:
        (a, b), (da, db) = operands, slopes
        return np.where(a > b if larger else a < b, da, db)

    return slope


# The derivative of each operation: (value, operands, derivatives of the operands) -> derivative.
RULES: dict[Op, Callable[[Any, Any, Any], Any]] = {
    OPS[np.add]: lambda y, x, d: _plus(*d),
    OPS[np.subtract]: lambda y, x, d: _minus(*d),
    OPS[np.multiply]: lambda y, x, d: _plus(times(d[0], x[1]), times(x[0], d[1])),
    OPS[np.divide]: _divide,
    OPS[np.negative]: lambda y, x, d: -d[0],
    OPS[np.power]: _power,
    OPS[np.sqrt]: lambda y, x, d: _over(times(0.5, d[0]), y),
    OPS[np.exp]: lambda y, x, d: times(y, d[0]),
    OPS[np.log]: lambda y, x, d: _over(d[0], x[0]),
    OPS[np.log1p]: lambda y, x, d: _over(d[0], 1 + x[0]),
    OPS[np.tanh]: lambda y, x, d: times(1 - y * y, d[0]),
    OPS[np.abs]: lambda y, x, d: times(np.sign(x[0]), d[0]),
    OPS[np.sign]: lambda y, x, d: 0,
    OPS[np.maximum]: _either(larger=True),
    OPS[np.minimum]: _either(larger=False),
    OPS[np.floor]: lambda y, x, d: 0,
    OPS[np.floor_divide]: lambda y, x, d: 0,
    OPS[np.remainder]: lambda y, x, d: _minus(d[0], times(x[0] // x[1], d[1])),
    **dict.fromkeys((OPS[f] for f in (*COMPARISONS, *LOGICAL)), lambda y, x, d: 0),
    OPS[np.where]: lambda y, x, d: np.where(x[0], d[1], d[2]),
    INDICATOR: lambda y, x, d: 0,
    COPY: lambda y, x, d: d[0],
}
