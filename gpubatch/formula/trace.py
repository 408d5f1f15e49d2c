"""Trace a formula: one Python function of arrays becomes NumPy calls, C statements and host scalars.

A formula is plain NumPy: arithmetic, comparisons, ``&``, ``|`` and ``~`` of conditions, and functions such as
``np.sqrt``, ``np.sign``, ``np.maximum`` and ``np.where``. Called with arrays it computes; called with the symbols of
this module it is traced. Operations on array elements are recorded as elementwise operations, common subexpressions
once. Arithmetic on hyper-parameters and the step count alone is folded into scalars, which the host computes in double
precision once per step: ``1 - beta1**t`` costs nothing per element, and a division by it becomes a product. Trace and
formula therefore differ by a few roundings.

The recorded text is valid Python (scalars) and C (elements); ``kernels/math.cuh`` defines the functions that C lacks.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import itertools
import math
import numbers
import operator
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from gpubatch.errors import FormulaError

SUM, PRODUCT, PRIMARY = 3, 4, 6  # operator precedence in C and Python, to write the fewest parentheses
COMPARISON, UNARY = 2, 5

DEEPEST = 64  # most nested operations in one expression of the text; compilers and Python's parser have limits


@dataclass(frozen=True, eq=False)
class Op:
    """An operation: ``numpy(*operands, out)`` computes it, ``text`` is its source in C and Python."""

    numpy: Callable[..., Any]
    text: str
    strength: int = PRIMARY
    boolean: bool = False
    in_place: bool = True  # whether the result may overwrite an operand


@dataclass(frozen=True, eq=False)
class Reduction(Op):
    """One number of all elements x of an array: ``numpy(x)`` computes it, gb.``name`` records it.

    It is ``finish(total, size)``, where ``fold`` (np.add or np.maximum) combines the float64 ``terms`` of all x.
    """

    name: str = ""
    terms: Callable[..., Any] = np.positive
    fold: Any = np.add
    finish: Callable[[Any, int], Any] = lambda total, size: total


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
    np.floor: Op(np.floor, "floor({})"),
    np.floor_divide: Op(np.floor_divide, "floor_quotient({}, {})"),
    np.remainder: Op(np.remainder, "remainder_of({}, {})"),
    np.equal: Op(np.equal, "{} == {}", COMPARISON, boolean=True),
    np.not_equal: Op(np.not_equal, "{} != {}", COMPARISON, boolean=True),
    np.less: Op(np.less, "{} < {}", COMPARISON, boolean=True),
    np.less_equal: Op(np.less_equal, "{} <= {}", COMPARISON, boolean=True),
    np.greater: Op(np.greater, "{} > {}", COMPARISON, boolean=True),
    np.greater_equal: Op(np.greater_equal, "{} >= {}", COMPARISON, boolean=True),
    np.logical_and: Op(np.logical_and, "both({}, {})", boolean=True),
    np.logical_or: Op(np.logical_or, "either({}, {})", boolean=True),
    np.logical_not: Op(np.logical_not, "not_so({})", boolean=True),
    np.where: Op(_select, "select({}, {}, {})", in_place=False),
}
LOGICAL = (np.logical_and, np.logical_or, np.logical_not)
COMPARISONS = (np.equal, np.not_equal, np.less, np.less_equal, np.greater, np.greater_equal)
COPY = Op(lambda x, out: np.copyto(out, x), "{}")  # takes a third of np.positive's time
INDICATOR = Op(lambda condition, out: np.copyto(out, condition), "select({}, T(1), T(0))")

# Functions composed of the operations above.
COMPOSED: dict[Any, Callable[..., Any]] = {
    np.square: lambda x: x * x,
    np.reciprocal: lambda x: 1 / x,
    np.positive: lambda x: x,
    np.fabs: np.abs,
    np.clip: lambda x, low, high: _clip(x, low, high),
    np.ceil: lambda x: -np.floor(-x),
    np.isnan: lambda x: x != x,
    np.isfinite: lambda x: x - x == 0,
    np.bitwise_and: np.logical_and,
    np.bitwise_or: np.logical_or,
    np.bitwise_xor: lambda x, y: np.logical_xor(x, y),
    np.logical_xor: lambda x, y: _xor(x, y),
    np.invert: np.logical_not,
    np.zeros_like: lambda x: 0.0,
    np.ones_like: lambda x: 1.0,
}


def _xor(x: Any, y: Any) -> Any:
    """Whether one of two conditions holds; either may be a bool option of the rule."""
    for option, condition in ((x, y), (y, x)):
        if isinstance(option, (bool, np.bool_)):
            return np.logical_not(condition) if option else np.logical_or(condition, False)
    return np.not_equal(*_check_conditions((x, y)))


def _clip(x: Any, low: Any, high: Any) -> Any:
    """x within [low, high], where None is no bound, as NumPy has it."""
    above = x if low is None else np.maximum(x, low)
    return above if high is None else np.minimum(above, high)


# What a formula that reduces with NumPy is told.
INSTEAD = "; over a whole parameter a rule has gb.norm(x), gb.mean(x) and gb.max_abs(x)"

KEPT = (
    "a formula cannot use a value that it kept from an earlier call, as in a dictionary of your own; what lasts from "
    "step to step is a state, an argument between g and t"
)

# Names that a state array cannot have, because the C text uses them.
C_WORDS = frozenset(
    """
    NULL k T element update reduced operand EACH REGISTER
    alignas alignof and and_eq asm auto bitand bitor bool case catch char char8_t char16_t char32_t class compl concept
    const const_cast consteval constexpr constinit co_await co_return co_yield decltype default delete do double
    dynamic_cast enum explicit export extern false float friend goto inline int long mutable namespace new noexcept not
    not_eq nullptr operator or or_eq private protected public register reinterpret_cast requires short signed sizeof
    static static_assert static_cast struct switch template this thread_local throw true typedef typeid typename union
    unsigned using virtual void volatile wchar_t xor xor_eq
    sign_of larger_of smaller_of select both either not_so floor floor_quotient remainder_of
    sqrt exp log log1p tanh fabs pow
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
    "larger_of": lambda x, y: x if x > y or x != x else y,
    "smaller_of": lambda x, y: x if x < y or x != x else y,
    "select": lambda condition, x, y: x if condition else y,
    "both": lambda x, y: bool(x) and bool(y),
    "either": lambda x, y: bool(x) or bool(y),
    "not_so": operator.not_,
    "floor": lambda x: float(math.floor(x)),
    "floor_quotient": operator.floordiv,
    "remainder_of": operator.mod,
}

# NumPy's functions by their names in texts.
FUNCTIONS: dict[str, Callable[..., Any]] = {
    op.text.partition("(")[0]: function for function, op in OPS.items() if op.text.endswith(")")
}
# Those that take the place of Python's, which raise for what NumPy calls infinite or NaN; all operands are np.float64.
IEEE = "pow sqrt exp log log1p sign_of floor floor_quotient remainder_of".split()


# --- symbols -------------------------------------------------------------------------------------------------------


class Recording(threading.local):
    """Whether this thread is inside a formula that is recorded, and what was refused there first."""

    running = False
    refused: FormulaError | None = None


def refusal(message: str) -> FormulaError:
    """The error for what a formula cannot do; a formula that catches it is refused all the same."""
    error = FormulaError(message)
    RECORDING.refused = RECORDING.refused or error
    return error


RECORDING = Recording()


def recorded(formula: Callable[..., Any], *operands: Any, **named: Any) -> Any:
    """What a formula returns for symbols.

    Inside the formula a symbol cannot be looked up in a set or dictionary, since that is a branch. And a value
    that was changed in place, as by ``+=``, cannot be used again by another name, which for an array is the new value.
    """
    traces = {id(x.trace): x.trace for x in operands if isinstance(x, Element)}
    RECORDING.running, RECORDING.refused = True, None
    try:
        results = formula(*operands, **named)
        if RECORDING.refused is not None:
            raise RECORDING.refused
        for x in results if isinstance(results, tuple) else (results,):
            _check_current(x)
            if isinstance(x, Element) and id(x.trace) not in traces:
                raise refusal(KEPT)
    finally:
        RECORDING.running = False
        for x in itertools.chain.from_iterable(trace.elements for trace in traces.values()):
            x.overwritten = False
    return results


def signature_of(kind: str, formula: Any) -> tuple[tuple[str, ...], dict[str, Any], inspect.Signature]:
    """The names of the arguments before ``*``, none if there are others than those and the ones after it; the defaults
    of those, ``Signature.empty`` where there is none; and the signature.

    Raises FormulaError if what is declared as ``kind`` is no function.
    """
    try:
        if hasattr(formula, "formula"):
            raise TypeError("it is declared already")
        signature = inspect.signature(formula)
    except (TypeError, ValueError) as error:
        raise FormulaError(f"{kind} must be declared of a Python function, got {formula!r}: {error}") from None
    found = list(signature.parameters.values())
    positional = tuple(p.name for p in found if p.kind is p.POSITIONAL_OR_KEYWORD)
    named = {p.name: p.default for p in found if p.kind is p.KEYWORD_ONLY}
    return (positional if len(positional) + len(named) == len(found) else ()), named, signature


def own_copies(*operands: Any) -> list[Any]:
    """The operands, with copies in place of arrays, which a formula may change by ``+=``."""
    return [x.copy() if isinstance(x, np.ndarray) or hasattr(x, "__cuda_array_interface__") else x for x in operands]


def _check_current(x: Any) -> None:
    """Raise for an element that the formula has changed in place."""
    if isinstance(x, Element) and x.overwritten:
        raise refusal(
            f"a formula cannot use {x.name or 'a value'} again after it was changed in place, as by +=: an array has "
            "its new value under every name; write x = x + y"
        )


def _operator(function: Any) -> Callable[..., Any]:
    """The method of an operator of one operand, or of a comparison."""
    return lambda *operands: record(function, *operands)


def _operators(function: Any) -> tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]:
    """The methods for x + y, for y + x where y is no symbol, and for x += y."""

    def in_place(x: Symbol, y: Any) -> Symbol:
        new = record(function, x, y)
        if isinstance(x, Element) and not x.uniform and new is not x:
            x.overwritten = True
        return new

    return lambda x, y: record(function, x, y), lambda x, y: record(function, y, x), in_place


class Symbol:
    """An operand of a formula under trace."""

    __slots__ = ()

    __add__, __radd__, __iadd__ = _operators(np.add)
    __sub__, __rsub__, __isub__ = _operators(np.subtract)
    __mul__, __rmul__, __imul__ = _operators(np.multiply)
    __truediv__, __rtruediv__, __itruediv__ = _operators(np.divide)
    __floordiv__, __rfloordiv__, __ifloordiv__ = _operators(np.floor_divide)
    __mod__, __rmod__, __imod__ = _operators(np.remainder)
    __pow__, __rpow__, __ipow__ = _operators(np.power)
    __and__, __rand__, __iand__ = _operators(np.logical_and)
    __or__, __ror__, __ior__ = _operators(np.logical_or)
    __xor__, __rxor__, __ixor__ = _operators(np.logical_xor)
    __lt__, __le__ = _operator(np.less), _operator(np.less_equal)
    __gt__, __ge__ = _operator(np.greater), _operator(np.greater_equal)
    __eq__, __ne__ = _operator(np.equal), _operator(np.not_equal)
    __neg__, __abs__, __invert__ = _operator(np.negative), _operator(np.abs), _operator(np.logical_not)

    def __pos__(self) -> Symbol:
        return self

    def __divmod__(self, b: Any) -> tuple[Symbol, Symbol]:
        return self // b, self % b

    def __rdivmod__(self, a: Any) -> tuple[Symbol, Symbol]:
        return a // self, a % self

    def __hash__(self) -> int:
        if RECORDING.running:
            raise refusal(
                "a formula cannot look a computed value up (in a set or dictionary, or by functools.cache); "
                "write np.where(condition, x, y)"
            )
        return object.__hash__(self)

    def __array_ufunc__(self, ufunc: Any, method: str, *operands: Any, **options: Any) -> Symbol:
        if method != "__call__" or options:
            instead = INSTEAD if method in ("reduce", "accumulate") else ""
            raise refusal(f"a formula can call np.{ufunc.__name__} only as a plain function of its operands{instead}")
        return record(ufunc, *operands)

    def __array_function__(self, function: Any, types: Any, operands: Any, options: Any) -> Symbol:
        if function is np.clip:
            low, high = (options.pop(name, options.pop(f"a_{name}", None)) for name in ("min", "max"))
            operands = (*operands, low, high)[:3] if len(operands) == 1 else (*operands, high)[:3]
        if options:
            instead = "" if function in OPS or function in COMPOSED else INSTEAD
            raise refusal(f"a formula can call {_numpy_name(function)} only with plain operands{instead}")
        return record(function, *operands)

    def __bool__(self) -> bool:
        raise refusal(
            "a formula cannot branch on a computed value (if, and, or, not, in, a < b < c, min, max, sorted); "
            "write np.where(condition, x, y), np.maximum and np.minimum, and combine conditions with &, | and ~"
        )

    def __float__(self) -> float:
        raise refusal("a formula cannot convert a value to float; use NumPy's functions, not the math module's")

    __int__ = __complex__ = __round__ = __floor__ = __ceil__ = __trunc__ = __float__

    def __index__(self) -> int:
        raise refusal("a formula cannot use a value as a count or an index, as in range(k)")

    def __getitem__(self, *_: Any) -> Any:
        raise refusal("a formula works on one element at a time: it cannot index, measure or iterate over a value")

    __len__ = __iter__ = __getitem__

    def __setitem__(self, *_: Any) -> None:
        raise refusal("a formula cannot change a value in place; return the new value")

    def __matmul__(self, _: Any) -> Any:
        raise refusal("a formula works on one element at a time: it cannot multiply matrices")

    __rmatmul__ = __matmul__

    def __lshift__(self, _: Any) -> Any:
        raise refusal("a formula cannot shift bits; write x * 2**n")

    __rlshift__ = __rshift__ = __rrshift__ = __lshift__

    def __format__(self, spec: str) -> str:
        if spec:
            raise refusal(f"a formula has no numbers yet when it is recorded, and cannot write one as {spec!r}")
        return repr(self)

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        if dtype is not None and np.dtype(dtype) != np.object_:
            float(self)
        found = np.empty((), object)
        found[()] = self
        return found

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # Python and NumPy look up optional special attributes
            raise AttributeError(name)
        raise refusal(
            f"a formula works on one element at a time: a value has no .{name}; "
            f"use operators and functions of NumPy{INSTEAD}"
        )


class Scalar(Symbol):
    """A number that the host computes once per step: a hyper-parameter, ``t``, or arithmetic on them.

    ``text`` is an expression of hyper-parameters, ``t`` and ``definitions``: named subexpressions, which keep the
    nesting within DEEPEST.
    """

    __slots__ = ("boolean", "definitions", "depth", "strength", "text")

    def __init__(self, text: str, strength: int = PRIMARY, of: Sequence[Any] = (), boolean: bool = False) -> None:
        parts = [x for x in of if isinstance(x, Scalar)]
        self.text, self.strength, self.boolean = text, strength, boolean
        self.definitions: dict[str, str] = {}
        for x in parts:
            self.definitions |= x.definitions
        self.depth: int = 1 + max((x.depth for x in parts), default=-1)
        if self.depth == DEEPEST:
            name = f"s_{hashlib.sha256(text.encode()).hexdigest()[:16]}"
            self.definitions[name] = text
            self.text, self.strength, self.depth = name, PRIMARY, 0

    def __repr__(self) -> str:
        return f"<{self.text}>"


class Element(Symbol):
    """One element of an array, or a value computed from elements; ``number`` is its index in the trace.

    ``uniform`` tells whether it is the same number for all elements of the array: a reduction, or computed from some;
    ``overwritten``, whether the formula has changed it in place.
    """

    __slots__ = ("name", "number", "op", "operands", "overwritten", "trace", "uniform")

    def __init__(self, trace: Trace, op: Op | None, operands: tuple[Any, ...], name: str = "") -> None:
        self.trace, self.op, self.operands, self.name = trace, op, operands, name
        self.number, self.overwritten = len(trace.elements), False
        if op is None:
            self.uniform = name in trace.values
        else:
            of = (x.uniform for x in operands if isinstance(x, Element))
            self.uniform = isinstance(op, Reduction) or all(of)
        trace.elements.append(self)

    def __repr__(self) -> str:
        return f"<element of {self.name}>" if self.op is None else f"<value {self.number} of each element>"


def element(trace: Trace, op: Op, operands: tuple[Any, ...]) -> Element:
    """The element for ``op`` of ``operands``: the existing one if it was recorded before, otherwise a new one."""
    key: tuple[Any, ...] = (op, *map(_key, operands))
    # 1 and 1.0 are equal keys and the same number, but 0.0 and -0.0 are equal keys and differ in sign.
    if any(not isinstance(x, Symbol) and x == 0 for x in operands):
        key += tuple(math.copysign(1, x) for x in operands if not isinstance(x, Symbol))
    if key not in trace.computed or trace.computed[key].overwritten:
        trace.computed[key] = Element(trace, op, operands)
    return trace.computed[key]


def _key(x: Any) -> Any:
    """The key of an operand; symbols cannot be keys, because ``==`` on them is recorded."""
    return x.text if isinstance(x, Scalar) else ("element", x.number) if isinstance(x, Element) else x


def record(function: Any, *operands: Any) -> Symbol:
    """The symbol for ``function(*operands)``: an element if any operand is an element, otherwise a scalar."""
    operands = tuple(x[()] if isinstance(x, np.ndarray) and x.ndim == 0 else x for x in operands)
    for x in operands:
        _check_current(x)
    if function in COMPOSED:
        return COMPOSED[function](*operands)  # type: ignore[no-any-return]
    op = OPS.get(function)
    if op is None:
        known = ", ".join(_numpy_name(f) for f in (*OPS, *COMPOSED))
        raise refusal(
            f"a formula works on one element at a time and cannot use {_numpy_name(function)}; "
            f"it can use {known}{INSTEAD}"
        )
    if function is np.where:
        if len(operands) != 3:
            raise refusal("a formula needs all three operands of np.where(condition, x, y)")
        if isinstance(operands[0], (bool, np.bool_)):  # a bool option of the rule
            return operands[1] if operands[0] else operands[2]  # type: ignore[no-any-return]
    if function in LOGICAL and any(isinstance(x, (bool, np.bool_)) for x in operands):
        return _with_options(function, operands)  # type: ignore[no-any-return]
    operands = _with_conditions(function, tuple(x if isinstance(x, Symbol) else _number(x) for x in operands))
    if function is np.where and isinstance(operands[0], Element) and _are(operands[1:], (1, 0)):
        return element(operands[0].trace, INDICATOR, operands[:1])
    owner = next((x for x in operands if isinstance(x, Element)), None)
    if any(isinstance(x, Element) and x.trace is not owner.trace for x in operands):  # type: ignore[union-attr]
        raise refusal(KEPT)
    if owner is None:
        return Scalar(text_of(op, [number_text(x) for x in operands]), op.strength, operands, op.boolean)
    if function is np.power and owner is operands[0]:
        # As ndarray does for ** 2 and ** 0.5: identical bits, far cheaper than pow.
        if _are(operands[1:], (2,)):
            return record(np.multiply, owner, owner)
        if _are(operands[1:], (0.5,)):
            return record(np.sqrt, owner)
    if function is np.divide and not isinstance(operands[1], Element) and not _is_tiny(operands[1]):
        # A division costs ten times as much as a product; the host computes the reciprocal, in double precision.
        return record(np.multiply, operands[0], record(np.divide, 1, operands[1]))
    return element(owner.trace, op, operands)


def reduced(op: Reduction, x: Symbol) -> Element:
    """The element for a reduction of ``x`` over an array."""
    _check_current(x)
    if not isinstance(x, Element) or x.uniform:
        kind = "a number that is the same for all elements" if isinstance(x, Element) else "a hyper-parameter or t"
        raise refusal(f"gb.{op.name} must be of a value of each element, got {kind}")
    if not x.trace.reducible:
        raise refusal(f"gb.{op.name} is for update rules; {x.trace.name} works on one element at a time")
    return element(x.trace, op, (_as_number(x),))


def _are(operands: Sequence[Any], values: Sequence[float]) -> bool:
    """Whether the operands equal these numbers."""
    return all(not isinstance(x, Symbol) and x == value for x, value in zip(operands, values, strict=True))


def _is_tiny(x: Any) -> bool:
    """Whether x is a number whose reciprocal is infinite in float32."""
    return not isinstance(x, Symbol) and 0 < abs(x) < 1e-38


def is_condition(x: Any) -> bool:
    """Whether ``x`` is a condition, of each element or of a scalar."""
    return (isinstance(x, Element) and x.op is not None and x.op.boolean) or (isinstance(x, Scalar) and x.boolean)


def _with_options(function: Any, operands: Sequence[Any]) -> Any:
    """Evaluate ``&``, ``|`` or ``~`` on operands of which some are the rule's bool options, known when tracing."""
    known = [bool(x) for x in operands if isinstance(x, (bool, np.bool_))]
    rest = _check_conditions([x for x in operands if not isinstance(x, (bool, np.bool_))])
    if function is np.logical_not:
        return not known[0]
    decided = any(known) if function is np.logical_or else not all(known)
    return rest[0] if rest and not decided else (function is np.logical_or) == decided


def _check_conditions(operands: Sequence[Any]) -> tuple[Any, ...]:
    """``operands``, if all are conditions."""
    if not all(map(is_condition, operands)):
        raise refusal("a formula can combine only conditions with &, | and ~, such as (g > 0) & (t == 1)")
    return tuple(operands)


def _with_conditions(function: Any, operands: tuple[Any, ...]) -> tuple[Any, ...]:
    """``operands`` with conditions converted to 1 or 0 in arithmetic, and numbers to conditions in ``np.where``."""
    if function in LOGICAL:
        return _check_conditions(operands)
    if function is np.where:
        condition, *rest = operands
        if isinstance(condition, Element) and not is_condition(condition):
            condition = record(np.not_equal, condition, 0)
        return (condition, *map(_as_number, rest))
    if function not in COMPARISONS and all(map(is_condition, operands)):
        name = _numpy_name(function)
        raise refusal(f"a formula cannot use {name} on conditions alone; combine them with &, | and ~")
    return tuple(map(_as_number, operands))


def _as_number(x: Any) -> Any:
    """A condition as 1 or 0; other operands unchanged."""
    if isinstance(x, Element) and is_condition(x):
        return element(x.trace, INDICATOR, (x,))
    return record(np.where, x, 1.0, 0.0) if isinstance(x, Scalar) and x.boolean else x


def _numpy_name(function: Any) -> str:
    module = (getattr(function, "__module__", None) or "numpy").replace("numpy", "np", 1)
    return f"{module if '._' not in module else 'np'}.{getattr(function, '__name__', function)}"


def _number(x: Any) -> int | float:
    if isinstance(x, np.ndarray) and x.ndim == 0:  # np.where of an option and two numbers
        x = x[()]
    if isinstance(x, (bool, np.bool_)):
        return int(x)
    if not isinstance(x, numbers.Real) or not is_finite(x):
        shown = f"an integer of {x.bit_length()} bits" if isinstance(x, int) else f"{x!r} of type {type(x).__name__}"
        raise refusal(f"operands in a formula must be its arguments or finite numbers, got {shown}")
    # C has no larger integers than 2^63, and what has more digits than a double is rounded in both cases.
    return int(x) if isinstance(x, numbers.Integral) and abs(int(x)) < 1 << 53 else float(x)


def is_finite(number: Any) -> bool:
    """Whether a number is finite as a float; an int may be too large for one."""
    try:
        return math.isfinite(number)
    except OverflowError:
        return False


def number_text(x: Any) -> tuple[str, int]:
    """The text of a scalar or a number, and its precedence."""
    if isinstance(x, Scalar):
        return x.text, x.strength
    return repr(x), PRIMARY if x >= 0 else UNARY


def text_of(op: Op, operands: list[tuple[str, int]]) -> str:
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
            raise refusal(f"operands of {function.__name__} must be hyper-parameters or t, got an array element")
        if any(isinstance(x, Scalar) for x in operands):
            return Scalar(f"{function.__name__}({', '.join(number_text(x)[0] for x in operands)})", of=operands)
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
    reducible: whether it may have reductions
    values: names of the numbers that it reads, one for a whole array
    whole: the formula that this one is a part of, with all scalars
    elements: all values, in order of computation
    computed: the elements by operation and operands
    results: the new values of ``targets``
    """

    name: str
    arrays: tuple[str, ...]
    targets: tuple[str, ...]
    hyper: tuple[str, ...] = ()
    dtype: str = ""
    reducible: bool = False
    values: tuple[str, ...] = ()
    whole: Trace | None = None
    elements: list[Element] = field(default_factory=list)
    computed: dict[Any, Element] = field(default_factory=dict)
    results: tuple[Any, ...] = ()

    def inputs(self) -> list[Element]:
        """The symbols of ``arrays``, the formula's arguments, then of ``values``."""
        return [Element(self, None, (), name) for name in (*self.arrays, *self.values)]

    def finish(self, results: Sequence[Any]) -> Trace:
        """Set the values that the formula returned as results."""
        for x in results:
            if not isinstance(x, (Symbol, numbers.Real, np.bool_)) and getattr(x, "shape", None) != ():
                raise FormulaError(
                    f"{self.name} must return values computed from its arguments, got {x!r} of type {type(x).__name__}"
                )
        values = [_as_number(x) if isinstance(x, Symbol) else _number(x) for x in results]
        # An array returned as the new content of another is copied: it may be overwritten before it is read.
        self.results = tuple(
            Element(self, COPY, (x,)) if isinstance(x, Element) and x.op is None and x.name != target else x
            for target, x in zip(self.targets, values, strict=True)
        )
        return self

    @functools.cached_property
    def scalars(self) -> dict[str, int]:
        """The text of each scalar used by an element, and its index in the list that the host computes."""
        if self.whole is not None:
            return self.whole.scalars
        return {text: i for i, text in enumerate(dict.fromkeys(x.text for x in self.used_scalars()))}

    def used_scalars(self) -> list[Scalar]:
        """The scalars among the operands and the results."""
        used = [x for element in self.elements for x in element.operands]
        return [x for x in (*used, *self.results) if isinstance(x, Scalar)]

    @functools.cached_property
    def evaluate(self) -> Callable[..., tuple[float, ...]]:
        """A Python function of ``t`` and the hyper-parameters that computes all scalars in double precision."""
        definitions = dict(item for x in self.used_scalars() for item in x.definitions.items())
        arguments = ", ".join(("t", *self.hyper))
        source = "\n".join(
            [
                f"def evaluate({arguments}):",
                "    try:",
                *(f"        {name} = {text}" for name, text in definitions.items()),
                f"        return ({''.join(f'{text}, ' for text in self.scalars)})",
                "    except _errors:",
                f"        return _ieee({arguments})",
            ]
        )

        def ieee(*values: float) -> tuple[float, ...]:
            """The same as NumPy computes it, where 1/0 is infinite: what ``np.where`` does not select may be so."""
            with np.errstate(all="ignore"):
                return tuple(map(float, made(ieee_functions, None)(*map(np.float64, values))))

        def made(functions: dict[str, Any], instead: Any) -> Callable[..., tuple[float, ...]]:
            errors = (ArithmeticError, ValueError) if instead else ()
            names: dict[str, Any] = {"__builtins__": {}, "_errors": errors, "_ieee": instead, **functions}
            exec(source, names)
            found: Callable[..., tuple[float, ...]] = names["evaluate"]
            return found

        def in_double(function: Callable[..., Any]) -> Callable[..., Any]:
            return lambda *operands: np.float64(function(*operands))

        ieee_functions = {name: in_double(f) for name, f in HOST_FUNCTIONS.items()}
        ieee_functions |= {name: in_double(FUNCTIONS[name]) for name in IEEE}
        return made(HOST_FUNCTIONS, ieee)

    @functools.cached_property
    def passes(self) -> tuple[FormulaPass, ...]:
        """The passes over the elements of an array, one more than reductions depend on each other.

        The last one computes the results. What several passes need is computed in each.
        """
        level = [0] * len(self.elements)  # the first pass that can compute it
        for x in self.elements:
            level[x.number] = max((level[y.number] for y in x.operands if isinstance(y, Element)), default=0)
            level[x.number] += isinstance(x.op, Reduction)
        every = sorted((x for x in self.elements if isinstance(x.op, Reduction)), key=lambda x: level[x.number])
        if not every:
            return (FormulaPass(self),)
        names = {x: f"{x.op.name}{i}" for i, x in enumerate(every) if isinstance(x.op, Reduction)}
        inputs = dict(zip((x for x in self.elements if x.op is None), self.arrays, strict=True))
        found, known = list[FormulaPass](), dict[Element, str]()
        for _, group in itertools.groupby(every, key=lambda x: level[x.number]):
            new = {x: names[x] for x in group}
            trace = restated(self.name, inputs, {f"of_{name}": x.operands[0] for x, name in new.items()}, known, self)
            found.append(FormulaPass(trace, tuple(x.op for x in new if isinstance(x.op, Reduction))))
            known |= new
        results = dict(zip(self.targets, self.results, strict=True))
        return (*found, FormulaPass(restated(self.name, inputs, results, known, self)))

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
        lines: list[str] = []
        written: list[tuple[str, int]] = []  # text and precedence of each element
        depths: list[int] = []

        def text(x: Any) -> tuple[str, int]:
            if isinstance(x, Element):
                return written[x.number]
            return f"k[{self.scalars[x.text]}]" if isinstance(x, Scalar) else f"T({x!r})", PRIMARY

        for element in self.elements:
            depth = 1 + max((depths[x.number] for x in element.operands if isinstance(x, Element)), default=-1)
            if element.op is None:
                written.append((element.name, PRIMARY))
            else:
                written.append((text_of(element.op, [text(x) for x in element.operands]), element.op.strength))
                if element.number in names or uses[element.number] > 1 or depth == DEEPEST:
                    kind = "bool" if element.op.boolean else "T"
                    name = names.get(element.number, f"x{element.number}")
                    lines.append(f"const {kind} {name} = {written[-1][0]};")
                    written[-1], depth = (name, PRIMARY), 0
            depths.append(depth)
        lines += [f"{a} = {text(x)[0]};" for a, x in zip(self.targets, self.results, strict=True)]
        return "\n".join(lines)


class FormulaPass(NamedTuple):
    """A pass over the elements of an array.

    trace: it reads the ``values`` of earlier passes, and computes the operands of ``reductions``, or the new arrays
    reductions: none in the last pass
    """

    trace: Trace
    reductions: tuple[Reduction, ...] = ()


def restated(
    name: str,
    inputs: dict[Element, str],
    results: dict[str, Any],
    values: dict[Element, str] | None = None,
    whole: Trace | None = None,
) -> Trace:
    """A new trace of ``results`` (target: value) that reads ``inputs`` (value: name); it has only what they need.

    ``values`` are further inputs, each one number for a whole array; ``whole`` is as :class:`Trace` has it.
    """
    source, values = next(iter(inputs)).trace, values or {}
    arrays, numbers = tuple(inputs.values()), tuple(values.values())
    trace = Trace(name, arrays, tuple(results), source.hyper, source.dtype, source.reducible, numbers, whole)
    new = dict(zip((x.number for x in (*inputs, *values)), trace.inputs(), strict=True))
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


def same_recording(one: Trace, other: Trace) -> bool:
    """Whether two traces have the same operations on the same operands, and the same results."""
    keys = [(list(trace.computed), list(map(_key, trace.results))) for trace in (one, other)]
    return keys[0] == keys[1]


def check_repeatable(name: str, one: Trace, other: Trace) -> None:
    """Raise if a formula that was traced twice is not the same: it would be recorded with what it had once."""
    if not same_recording(one, other):
        raise FormulaError(
            f"{name} does not compute the same when it is called again. It is recorded once, so random numbers, the "
            "time and counters of your own would stay as they were; a number that changes is a hyper-parameter or state"
        )
