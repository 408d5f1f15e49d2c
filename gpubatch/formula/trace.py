"""Trace a formula: one Python function of arrays becomes NumPy calls, C statements and host scalars.

A formula is plain NumPy: arithmetic, comparisons, and functions such as ``np.sqrt``, ``np.sign``, ``np.maximum`` and
``np.where``. Called with arrays it computes; called with the symbols of this module it is traced. Operations on array
elements are recorded as elementwise operations, common subexpressions once. Arithmetic on hyper-parameters and the step
count alone is folded into scalars, which the host computes in double precision once per step: ``1 - beta1**t`` costs
nothing per element, and a division by it becomes a product. Trace and formula therefore differ by a few roundings.

The recorded text is valid Python (scalars) and C (elements); ``kernels/math.cuh`` defines the functions that C lacks.
"""

from __future__ import annotations

import functools
import math
import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gpubatch.errors import FormulaError

__all__ = ["Element", "Op", "Scalar", "Symbol", "Trace", "host_function", "record", "restated"]

SUM, PRODUCT, PRIMARY = 3, 4, 6  # operator precedence in C and Python, to write the fewest parentheses
COMPARISON, UNARY = 2, 5


@dataclass(frozen=True, eq=False)
class Op:
    """An operation: ``numpy(*operands, out)`` computes it, ``text`` is its source in C and Python."""

    numpy: Callable[..., Any]
    text: str
    strength: int = PRIMARY
    boolean: bool = False
    in_place: bool = True  # whether the result may overwrite an operand


def _select(condition: Any, x: Any, y: Any, out: np.ndarray) -> None:
    if x.ndim == y.ndim == 0 and condition.dtype == bool and out.dtype in INTEGERS:
        _choose(condition, x, y, out)
        return
    np.copyto(out, y)
    np.copyto(out, x, where=condition if condition.dtype == bool else bool(condition))


INTEGERS = {np.dtype("float32"): np.uint32, np.dtype("float64"): np.uint64}  # integers of the same size


def _choose(condition: np.ndarray, x: np.ndarray, y: np.ndarray, out: np.ndarray) -> None:
    """Select one of two numbers by integer arithmetic on their bits: a masked copy takes four times as long."""
    bits = INTEGERS[out.dtype]
    number, first, second = out.view(bits), x.view(bits), y.view(bits)
    np.copyto(number, condition)
    np.multiply(number, first ^ second, out=number)  # the differing bits where the condition holds, else 0
    np.bitwise_xor(number, second, out=number)


# Binary operators are left-associative; operands of functions need no parentheses.
OPS: dict[Any, Op] = {
    np.add: Op(np.add, "{} + {}", SUM),
    np.subtract: Op(np.subtract, "{} - {}", SUM),
    np.multiply: Op(np.multiply, "{} * {}", PRODUCT),
    np.divide: Op(np.divide, "{} / {}", PRODUCT),
    np.negative: Op(np.negative, "-{}", UNARY),
    np.power: Op(np.power, "pow({}, {})"),
    np.sqrt: Op(np.sqrt, "sqrt({})"),
    np.exp: Op(np.exp, "exp({})"),
    np.log: Op(np.log, "log({})"),
    np.log1p: Op(np.log1p, "log1p({})"),
    np.tanh: Op(np.tanh, "tanh({})"),
    np.abs: Op(np.abs, "fabs({})"),
    np.sign: Op(np.sign, "sign_of({})"),
    np.maximum: Op(np.maximum, "larger_of({}, {})"),
    np.minimum: Op(np.minimum, "smaller_of({}, {})"),
    np.less: Op(np.less, "{} < {}", COMPARISON, boolean=True),
    np.less_equal: Op(np.less_equal, "{} <= {}", COMPARISON, boolean=True),
    np.greater: Op(np.greater, "{} > {}", COMPARISON, boolean=True),
    np.greater_equal: Op(np.greater_equal, "{} >= {}", COMPARISON, boolean=True),
    np.where: Op(_select, "select({}, {}, {})", in_place=False),
}
COPY = Op(lambda x, out: np.copyto(out, x), "{}")  # takes a third of np.positive's time
INDICATOR = Op(lambda condition, out: np.copyto(out, condition), "select({}, T(1), T(0))")

# Functions composed of the operations above.
COMPOSED: dict[Any, Callable[..., Any]] = {
    np.square: lambda x: x * x,
    np.reciprocal: lambda x: 1 / x,
    np.clip: lambda x, low, high: np.minimum(np.maximum(x, low), high),
}

# Names that a state array cannot have, because the C text uses them.
C_WORDS = frozenset(
    """
    k T element update auto bool case catch char class const default delete do double enum extern float goto inline
    int long namespace new operator private protected public register short signed sizeof static struct switch
    template this throw typedef typename union unsigned using virtual void volatile
    sign_of larger_of smaller_of select sqrt exp log log1p tanh fabs pow
    """.split()
)

# Functions that the text of scalars can call; in C the same names are functions of math.cuh or of the language.
HOST_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "pow": math.pow,
    "sqrt": math.sqrt,
    "exp": math.exp,
    "log": math.log,
    "log1p": math.log1p,
    "tanh": math.tanh,
    "fabs": math.fabs,
    "sign_of": lambda x: float((x > 0) - (x < 0)),
    "larger_of": max,
    "smaller_of": min,
    "select": lambda condition, x, y: x if condition else y,
}


# --- symbols -------------------------------------------------------------------------------------------------------


class Symbol:
    """An operand of a formula under trace."""

    __slots__ = ()

    def __add__(self, b: Any) -> Symbol:
        return record(np.add, self, b)

    def __radd__(self, a: Any) -> Symbol:
        return record(np.add, a, self)

    def __sub__(self, b: Any) -> Symbol:
        return record(np.subtract, self, b)

    def __rsub__(self, a: Any) -> Symbol:
        return record(np.subtract, a, self)

    def __mul__(self, b: Any) -> Symbol:
        return record(np.multiply, self, b)

    def __rmul__(self, a: Any) -> Symbol:
        return record(np.multiply, a, self)

    def __truediv__(self, b: Any) -> Symbol:
        return record(np.divide, self, b)

    def __rtruediv__(self, a: Any) -> Symbol:
        return record(np.divide, a, self)

    def __pow__(self, b: Any) -> Symbol:
        return record(np.power, self, b)

    def __rpow__(self, a: Any) -> Symbol:
        return record(np.power, a, self)

    def __neg__(self) -> Symbol:
        return record(np.negative, self)

    def __abs__(self) -> Symbol:
        return record(np.abs, self)

    def __lt__(self, b: Any) -> Symbol:
        return record(np.less, self, b)

    def __le__(self, b: Any) -> Symbol:
        return record(np.less_equal, self, b)

    def __gt__(self, b: Any) -> Symbol:
        return record(np.greater, self, b)

    def __ge__(self, b: Any) -> Symbol:
        return record(np.greater_equal, self, b)

    def __array_ufunc__(self, ufunc: Any, method: str, *operands: Any, **options: Any) -> Symbol:
        if method != "__call__" or options:
            raise FormulaError(f"a formula can call np.{ufunc.__name__} only as a plain function of its operands")
        return record(ufunc, *operands)

    def __array_function__(self, function: Any, types: Any, operands: Any, options: Any) -> Symbol:
        if options:
            raise FormulaError(f"a formula can call np.{function.__name__} only with plain operands")
        return record(function, *operands)

    def __bool__(self) -> bool:
        raise FormulaError("a formula cannot branch on a computed value; write np.where(condition, x, y)")

    def __float__(self) -> float:
        raise FormulaError("a formula cannot convert a value to float; use NumPy's functions, not the math module's")


class Scalar(Symbol):
    """A number that the host computes once per step: a hyper-parameter, ``t``, or arithmetic on them."""

    __slots__ = ("strength", "text")

    def __init__(self, text: str, strength: int = PRIMARY) -> None:
        self.text, self.strength = text, strength


class Element(Symbol):
    """One element of an array, or a value computed from elements; ``number`` is its index in the trace."""

    __slots__ = ("name", "number", "op", "operands", "trace")

    def __init__(self, trace: Trace, op: Op | None, operands: tuple[Any, ...], name: str = "") -> None:
        self.trace, self.op, self.operands, self.name = trace, op, operands, name
        self.number = len(trace.elements)
        trace.elements.append(self)


def element(trace: Trace, op: Op, operands: tuple[Any, ...]) -> Element:
    """The element for ``op`` of ``operands``: the existing one if it was recorded before, otherwise a new one."""
    key: tuple[Any, ...] = (op, *(x.text if isinstance(x, Scalar) else x for x in operands))
    # 1 and 1.0 are equal keys and the same number, but 0.0 and -0.0 are equal keys and differ in sign.
    if any(not isinstance(x, Symbol) and x == 0 for x in operands):
        key += tuple(math.copysign(1, x) for x in operands if not isinstance(x, Symbol))
    if key not in trace.computed:
        trace.computed[key] = Element(trace, op, operands)
    return trace.computed[key]


def record(function: Any, *operands: Any) -> Symbol:
    """The symbol for ``function(*operands)``: an element if any operand is an element, otherwise a scalar."""
    if function in COMPOSED:
        composed: Symbol = COMPOSED[function](*operands)
        return composed
    op = OPS.get(function)
    if op is None:
        known = ", ".join(f"np.{f.__name__}" for f in (*OPS, *COMPOSED))
        raise FormulaError(f"a formula cannot use np.{getattr(function, '__name__', function)}; it can use {known}")
    operands = tuple(x if isinstance(x, Symbol) else _number(x) for x in operands)
    for position, x in enumerate(operands):
        if isinstance(x, Element) and x.op and x.op.boolean and not (function is np.where and position == 0):
            raise FormulaError("a formula can use a condition only in np.where(condition, x, y)")
    if function is np.where and isinstance(operands[0], Element) and operands[1:] == (1, 0):
        return element(operands[0].trace, INDICATOR, operands[:1])
    owner = next((x for x in operands if isinstance(x, Element)), None)
    if owner is None:
        return Scalar(_write(op, [_scalar_text(x) for x in operands]), op.strength)
    if function is np.power and owner is operands[0] and operands[1] in (2, 0.5):
        # As ndarray does for ** 2 and ** 0.5: identical bits, far cheaper than pow.
        return record(np.multiply, owner, owner) if operands[1] == 2 else record(np.sqrt, owner)
    if function is np.divide and not isinstance(operands[1], Element):
        # A division costs ten times as much as a product; the host computes the reciprocal, in double precision.
        return record(np.multiply, operands[0], record(np.divide, 1, operands[1]))
    return element(owner.trace, op, operands)


def _number(x: Any) -> int | float:
    if isinstance(x, bool) or not isinstance(x, numbers.Real) or not math.isfinite(x):
        raise FormulaError(
            f"operands in a formula must be its arguments or finite numbers, got {x!r} of type {type(x).__name__}"
        )
    return int(x) if isinstance(x, numbers.Integral) else float(x)


def _scalar_text(x: Any) -> tuple[str, int]:
    if isinstance(x, Scalar):
        return x.text, x.strength
    return repr(x), PRIMARY if x >= 0 else UNARY


def _write(op: Op, operands: list[tuple[str, int]]) -> str:
    """The text of ``op``, with parentheses around operands of too low precedence."""
    if op.strength == PRIMARY:
        return op.text.format(*(text for text, _ in operands))
    alone = op.strength in (COMPARISON, UNARY)  # a < b < c and --a would mean something else
    needed = [op.strength + (alone or position > 0) for position in range(len(operands))]  # a - (b - c)
    return op.text.format(
        *(text if strength >= need else f"({text})" for (text, strength), need in zip(operands, needed, strict=True))
    )


def host_function(function: Callable[..., float]) -> Callable[..., Any]:
    """Let formulas call ``function`` on hyper-parameters and ``t``: the host evaluates it once per step."""
    HOST_FUNCTIONS[function.__name__] = function

    @functools.wraps(function)
    def call(*operands: Any) -> Any:
        if any(isinstance(x, Element) for x in operands):
            raise FormulaError(f"operands of {function.__name__} must be hyper-parameters or t, got an array element")
        if any(isinstance(x, Scalar) for x in operands):
            return Scalar(f"{function.__name__}({', '.join(_scalar_text(x)[0] for x in operands)})")
        return function(*operands)

    return call


# --- traces ----------------------------------------------------------------------------------------------------------


@dataclass
class Trace:
    """A traced formula.

    arrays: names of the arrays it reads
    targets: names of the arrays it writes
    hyper: names of the hyper-parameters in its scalars
    dtype: element type, if the formula depends on it
    elements: all values, in order of computation
    computed: the elements by operation and operands
    results: the new values of ``targets``
    """

    name: str
    arrays: tuple[str, ...]
    targets: tuple[str, ...]
    hyper: tuple[str, ...] = ()
    dtype: str = ""
    elements: list[Element] = field(default_factory=list)
    computed: dict[Any, Element] = field(default_factory=dict)
    results: tuple[Any, ...] = ()

    def inputs(self) -> list[Element]:
        """The symbols of ``arrays``, the formula's arguments."""
        return [Element(self, None, (), name) for name in self.arrays]

    def finish(self, results: Sequence[Any]) -> Trace:
        """Set the values that the formula returned as results."""
        values = [x if isinstance(x, Symbol) else _number(x) for x in results]
        # An array returned as the new content of another is copied: it may be overwritten before it is read.
        self.results = tuple(
            Element(self, COPY, (x,)) if isinstance(x, Element) and x.op is None and x.name != target else x
            for target, x in zip(self.targets, values, strict=True)
        )
        return self

    @functools.cached_property
    def scalars(self) -> dict[str, int]:
        """The text of each scalar used by an element, and its index in the list that the host computes."""
        used = [x for element in self.elements for x in element.operands]
        texts = [x.text for x in (*used, *self.results) if isinstance(x, Scalar)]
        return {text: i for i, text in enumerate(dict.fromkeys(texts))}

    @functools.cached_property
    def evaluate(self) -> Callable[..., tuple[float, ...]]:
        """A Python function of ``t`` and the hyper-parameters that computes all scalars in double precision."""
        values = "".join(f"{text}, " for text in self.scalars)
        source = f"lambda {', '.join(('t', *self.hyper))}: ({values})"
        found: Callable[..., tuple[float, ...]] = eval(source, {"__builtins__": {}, **HOST_FUNCTIONS})
        return found

    @functools.cached_property
    def c(self) -> str:
        """The formula as C statements on ``arrays`` and ``targets``, with the scalars in ``k``."""
        uses = [0] * len(self.elements)
        for element in self.elements:
            for x in element.operands:
                if isinstance(x, Element):
                    uses[x.number] += 1
        names = {
            x.number: f"{a}_new" for a, x in zip(self.targets, self.results, strict=True) if isinstance(x, Element)
        }
        lines = []

        def text(x: Any) -> tuple[str, int]:
            if isinstance(x, Scalar):
                return f"k[{self.scalars[x.text]}]", PRIMARY
            if not isinstance(x, Element):
                return f"T({x!r})", PRIMARY
            if x.op is None:
                return x.name, PRIMARY
            if x.number in names:
                return names[x.number], PRIMARY
            return _write(x.op, [text(y) for y in x.operands]), x.op.strength

        for element in self.elements:
            if element.op is not None and (element.number in names or uses[element.number] > 1):
                kind = "bool" if element.op.boolean else "T"
                name = names.pop(element.number, f"x{element.number}")
                lines.append(f"const {kind} {name} = {text(element)[0]};")
                names[element.number] = name
        lines += [f"{a} = {text(x)[0]};" for a, x in zip(self.targets, self.results, strict=True)]
        return "\n".join(lines)


def restated(name: str, inputs: dict[Element, str], results: dict[str, Any]) -> Trace:
    """A new trace of ``results`` (target: value) that reads ``inputs`` (value: name); it has only what they need."""
    source = next(iter(inputs)).trace
    trace = Trace(name, tuple(inputs.values()), tuple(results), source.hyper, source.dtype)
    new = dict(zip((x.number for x in inputs), trace.inputs(), strict=True))
    needed = {x.number for x in results.values() if isinstance(x, Element)}
    for x in reversed(source.elements):
        if x.number in needed and x.number not in new:
            needed |= {y.number for y in x.operands if isinstance(y, Element)}
    for x in source.elements:
        if x.number in needed and x.number not in new:
            assert x.op is not None, f"{x.name} is not among the inputs"
            operands = tuple(new[y.number] if isinstance(y, Element) else y for y in x.operands)
            new[x.number] = element(trace, x.op, operands)
    return trace.finish([new[x.number] if isinstance(x, Element) else x for x in results.values()])
