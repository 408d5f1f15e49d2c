"""Elementwise functions: activations and score losses, declared by a decorator, and their derivatives.

A function that does not return its derivative gets one by automatic differentiation of its trace. The trace also tells
what backward needs: the slope, y, or neither.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from gpubatch.errors import FormulaError
from gpubatch.formula.derivative import derivative, times
from gpubatch.formula.named import by_name
from gpubatch.formula.trace import (
    HOST_FUNCTIONS,
    Element,
    Scalar,
    Symbol,
    Trace,
    check_repeatable,
    own_copies,
    recorded,
    restated,
    same_recording,
    signature_of,
)

# --- activations ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ActivationForm:
    """The traces of an activation.

    forward: x to y, and to the slope if ``keeps``
    backward: dy and "kept" to dx
    keeps: "kept" is the slope, which forward stores
    reads_y: "kept" is y; if both are False, backward needs neither
    """

    forward: Trace
    backward: Trace
    keeps: bool
    reads_y: bool


@dataclass(frozen=True, eq=False)
class Activation:
    """An elementwise function: ``formula(x, *, parameters)`` returns y, or y and its slope dy/dx.

    ``defaults`` maps parameters to their defaults; ``required`` names those without.
    """

    name: str
    formula: Callable[..., Any]
    required: tuple[str, ...]
    defaults: Mapping[str, float]

    def __reduce__(self) -> Any:
        return by_name(self, activation)

    def __repr__(self) -> str:
        return f"<activation {self.name}>"

    def __call__(self, x: Any, **parameters: float) -> Any:
        """Evaluate the formula on arrays: y."""
        y = self.formula(*own_copies(x), **parameters)
        return y[0] if isinstance(y, tuple) else y

    def bind(self, **parameters: float) -> BoundActivation:
        """The activation with values for its parameters."""
        return BoundActivation(current(self), parameter_values("activation", self, parameters))

    @functools.cached_property
    def _forms(self) -> dict[tuple[str, ...], ActivationForm]:
        return {}

    def form(self, dtype: str) -> ActivationForm:
        """The traces for elements of ``dtype``, "float32" or "float64"; made once."""
        found = self._forms.get((dtype,))
        if found is None:
            found, again = self._traced(dtype), self._traced(dtype)
            check_repeatable(self.name, found.forward, again.forward)
            check_repeatable(self.name, found.backward, again.backward)
            self._forms[dtype,] = found
        return found

    def _traced(self, dtype: str) -> ActivationForm:
        trace = Trace(self.name, ("x", "dy"), ("y", "slope"), parameter_names(self), dtype)
        x, dy = trace.inputs()
        returned = recorded(self.formula, x, **symbols(self))
        y, slope = with_derivative(self.name, returned, x, "y, or y and its slope")
        keeps, reads_y = _needs(slope, y)
        forward = restated(self.name, {x: "x"}, {"y": y, "slope": slope} if keeps else {"y": y})
        kept = {slope: "kept"} if keeps else {y: "kept"} if reads_y else {}
        backward = restated(self.name, {**kept, dy: "dy"}, {"dx": times(dy, slope)})
        return ActivationForm(forward, backward, keeps, reads_y)


@dataclass(frozen=True)
class BoundActivation:
    """An activation with the ``values`` of its parameters, in their order."""

    activation: Activation
    values: tuple[float, ...] = ()

    @functools.cached_property
    def keeps(self) -> bool:
        """Whether forward stores the slope."""
        return self.activation.form("float32").keeps

    @functools.cached_property
    def reads_y(self) -> bool:
        """Whether backward reads y."""
        return self.activation.form("float32").reads_y

    @functools.cached_property
    def _hash(self) -> int:
        return hash((self.activation, self.values))

    def __hash__(self) -> int:  # programs and kernels are looked up by it in every call
        return self._hash

    def scalars(self, trace: Trace) -> tuple[float, ...]:
        """The scalars of ``trace``, one of the activation's."""
        return trace.evaluate(0, *self.values)

    def __repr__(self) -> str:
        return call_text(self.activation, self.values)


def activation(formula: Callable[..., Any]) -> Activation:
    """Declare an activation from a function of one element.

    The function takes ``x``, and after ``*`` its parameters. It returns y, or ``(y, slope)`` if you know a cheaper or
    more accurate derivative than the derived one. Like update rules it may use arithmetic, ``np.where``, and the NumPy
    functions that the error for any other lists. Use it as ``gb.mlp(..., activation=silu)``, or in a list of layers as
    ``gb.Elementwise(silu)``. Raises :class:`FormulaError` for any other signature.

    >>> @activation
    ... def silu(x):
    ...     return x / (1 + np.exp(-x))
    """
    return Activation(_name(formula), formula, *_parameters(formula, ["x"]))


# --- score losses ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class ScoreLoss:
    """A loss of one score and its target: ``formula(z, y, *, parameters)`` returns the loss, or (loss, dloss/dz).

    The loss of a batch is the mean over all scores.
    """

    name: str
    formula: Callable[..., Any]
    required: tuple[str, ...]
    defaults: Mapping[str, float]

    def __reduce__(self) -> Any:
        return by_name(self, score_loss)

    def __repr__(self) -> str:
        return f"<score loss {self.name}>"

    def __call__(self, z: Any, y: Any, **parameters: float) -> Any:
        """Evaluate the formula on arrays: the loss of each score."""
        loss = self.formula(*own_copies(z, y), **parameters)
        return loss[0] if isinstance(loss, tuple) else loss

    def bind(self, **parameters: float) -> BoundScoreLoss:
        """The loss with values for its parameters."""
        return BoundScoreLoss(current(self), parameter_values("loss", self, parameters))

    @functools.cached_property
    def _forms(self) -> dict[tuple[str, ...], Trace]:
        return {}

    def form(self, dtype: str, *targets: str) -> Trace:
        """The trace for elements of ``dtype``, from z and y to ``targets``: "loss", the gradient "dz", or both."""
        found = self._forms.get((dtype, *targets))
        if found is None:
            found = self._traced(dtype, *targets)
            check_repeatable(self.name, found, self._traced(dtype, *targets))
            self._forms[dtype, *targets] = found
        return found

    def _traced(self, dtype: str, *targets: str) -> Trace:
        trace = Trace(self.name, ("z", "y"), ("loss", "dz"), parameter_names(self), dtype)
        z, y = trace.inputs()
        returned = recorded(self.formula, z, y, **symbols(self))
        loss, dz = with_derivative(self.name, returned, z, "the loss, or the loss and its slope")
        if not isinstance(returned, tuple) and not isinstance(dz, Symbol) and dz == 0:
            raise FormulaError(
                f"{self.name} has the derivative 0 by z for all scores, so nothing could be trained; "
                "compute it from z, or return (loss, slope)"
            )
        results = {"loss": loss, "dz": dz}
        return restated(self.name, {z: "z", y: "y"}, {target: results[target] for target in targets})


@dataclass(frozen=True)
class BoundScoreLoss:
    """A score loss with the ``values`` of its parameters, in their order."""

    loss: ScoreLoss
    values: tuple[float, ...] = ()

    def scalars(self, trace: Trace) -> tuple[float, ...]:
        """The scalars of ``trace``, one of the loss's."""
        return trace.evaluate(0, *self.values)

    def __repr__(self) -> str:
        return call_text(self.loss, self.values)


def score_loss(formula: Callable[..., Any]) -> ScoreLoss:
    """Declare a loss from a function of one score and its target.

    The function takes the score ``z``, the target ``y``, and after ``*`` its parameters. It returns the loss, or
    ``(loss, slope)`` with slope = dloss/dz. Raises :class:`FormulaError` for any other signature.

    >>> @score_loss
    ... def huber(z, y, *, delta=1.0):
    ...     r = np.abs(z - y)
    ...     return np.where(r < delta, 0.5 * r * r, delta * (r - 0.5 * delta))
    """
    return ScoreLoss(_name(formula), formula, *_parameters(formula, ["z", "y"]))


# --- parameters and slopes -------------------------------------------------------------------------------------------


Declared = TypeVar("Declared", Activation, ScoreLoss)


def current(declared: Declared) -> Declared:
    """The formula as it is now: another object if numbers from outside of it have changed since it was traced."""
    latest: Declared = declared.__dict__.get("_latest", declared)
    library = str(getattr(declared.formula, "__module__", "")).startswith("gpubatch.")
    if library or all(_same_form(form, latest._traced(*key)) for key, form in latest._forms.items()):
        return latest
    declared.__dict__["_latest"] = latest = dataclasses.replace(declared)
    return latest


def _same_form(one: Any, other: Any) -> bool:
    if isinstance(one, ActivationForm):
        return same_recording(one.forward, other.forward) and same_recording(one.backward, other.backward)
    return same_recording(one, other)


def parameter_names(declared: Activation | ScoreLoss) -> tuple[str, ...]:
    """The names of all parameters."""
    return (*declared.required, *declared.defaults)


def parameter_values(kind: str, declared: Activation | ScoreLoss, parameters: Mapping[str, Any]) -> tuple[float, ...]:
    """The values of all parameters; raises FormulaError if one is missing, unknown or not a finite number."""
    names = parameter_names(declared)
    missing = [name for name in declared.required if name not in parameters]
    unknown = [name for name in parameters if name not in names]
    if missing or unknown:
        listed = ", ".join(names) or "none"
        raise FormulaError(f"{kind} {declared.name} has the parameters {listed}; missing {missing}, unknown {unknown}")
    values: dict[str, Any] = {**declared.defaults, **parameters}
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
            raise FormulaError(f"{name} of {kind} {declared.name} must be a finite number, got {value!r}")
    return tuple(float(values[name]) for name in names)


def call_text(declared: Activation | ScoreLoss, values: tuple[float, ...]) -> str:
    """The name, with the values of parameters as in a call."""
    named = ", ".join(f"{name}={value!r}" for name, value in zip(parameter_names(declared), values, strict=True))
    return f"{declared.name}({named})" if named else declared.name


def _name(formula: Callable[..., Any]) -> str:
    return getattr(formula, "__name__", "formula")


def symbols(declared: Activation | ScoreLoss) -> dict[str, Scalar]:
    """The parameters as a trace has them."""
    return {name: Scalar(name) for name in parameter_names(declared)}


def _parameters(formula: Callable[..., Any], wanted: list[str]) -> tuple[tuple[str, ...], dict[str, float]]:
    """(names without a default, defaults of the others) of the parameters after ``*``; checks the signature."""
    name, signature = _name(formula), signature_of("an activation or a loss", formula)
    found = list(signature.parameters.values())
    first = [p.name for p in found if p.kind is p.POSITIONAL_OR_KEYWORD]
    named = [p for p in found if p.kind is p.KEYWORD_ONLY]
    if first != wanted or len(first) + len(named) != len(found):
        raise FormulaError(f"{name} must have the signature ({', '.join(wanted)}, *, parameters), got {signature}")
    for p in named:
        if p.name in HOST_FUNCTIONS:
            raise FormulaError(f"{name}: the name {p.name!r} is taken; rename the parameter")
        if p.default is not p.empty and (
            isinstance(p.default, (bool, np.bool_)) or not isinstance(p.default, numbers.Real)
        ):
            raise FormulaError(f"{name}: the default of {p.name} must be a number, got {p.default!r}")
    defaults = {p.name: float(p.default) for p in named if p.default is not p.empty}
    return tuple(p.name for p in named if p.default is p.empty), defaults


def with_derivative(name: str, returned: Any, by: Element, expected: str) -> tuple[Any, Any]:
    """(value, derivative): both as the formula returned them, or with the derivative derived."""
    if not isinstance(returned, tuple):
        return returned, derivative(returned, by)
    if len(returned) != 2:
        raise FormulaError(f"{name} must return {expected}; it returned {len(returned)} values")
    return returned


def _needs(slope: Any, y: Any) -> tuple[bool, bool]:
    """(keeps, reads_y): walk the slope's operands, stopping at y; if an input is reached, the slope must be kept."""
    if not isinstance(slope, Element):
        return False, False
    reads_y, reads_x = False, False
    seen, left = set[int](), [slope]
    while left:
        x = left.pop()
        if x is y:
            reads_y = True
        elif x.op is None:
            reads_x = True
        elif x.number not in seen:
            seen.add(x.number)
            left += [operand for operand in x.operands if isinstance(operand, Element)]
    return reads_x, reads_y and not reads_x


# --- C++ source ------------------------------------------------------------------------------------------------------


def activation_source(activation: Activation, dtype: str, name: str) -> str:
    """The activation as a C++ struct for the type T; ``k`` are the scalars of forward or of backward."""
    form = activation.form(dtype)
    return f"""struct {name} {{  // {activation.name}
    static constexpr bool KEEPS = {str(form.keeps).lower()};
    __device__ static T f(T x, const T* k, T& slope) {{
        T y;
{_indented(form.forward.c)}
        return y;
    }}
    __device__ static T gradient(T dy, T kept, const T* k) {{
        T dx;
{_indented(form.backward.c)}
        return dx;
    }}
}};
"""


def score_source(loss: ScoreLoss, dtype: str, name: str) -> str:
    """The score loss as a C++ struct for the type T; ``f`` returns the loss and sets dz to its derivative."""
    return f"""struct {name} {{  // {loss.name}
    __device__ static T f(T z, T y, const T* k, T& dz) {{
        T loss;
{_indented(loss.form(dtype, "loss", "dz").c)}
        return loss;
    }}
}};
"""


def _indented(lines: str) -> str:
    return textwrap.indent(lines, " " * 8)


# --- the normal distribution ---------------------------------------------------------------------------------------


def normal_cdf(x: Any) -> Any:
    """Φ(x), the standard normal distribution function, of an array or inside an activation or score loss.

    Φ(-x) = exp(-x²/2) P(a/(1 + c x) + b) for x >= 0, so the relative accuracy holds where Φ is small, too.
    """
    dtype = x.trace.dtype if isinstance(x, Element) else np.asarray(x).dtype.name
    if isinstance(x, Scalar) or dtype not in TAILS:
        raise FormulaError(
            f"x of normal_cdf must be an element of an activation or score loss, or an array of float32 or float64, "
            f"got {x!r}"
        )
    a, b, c, coefficients = normal_tail(dtype)
    v = a / (1 + c * np.abs(x)) + b
    p: Any = coefficients[0]
    for coefficient in coefficients[1:]:
        p = p * v + coefficient
    tail = p * np.exp(-0.5 * x * x)
    return np.abs(np.where(x < 0, 0, 1) - tail)


# The degree of the polynomial, and the x above which exp(-x²/2) is zero.
TAILS = {"float32": (8, 14.0), "float64": (19, 37.0)}


@functools.cache
def normal_tail(dtype: str) -> tuple[float, float, float, tuple[float, ...]]:
    """(a, b, c, coefficients of P, highest power first) of :func:`normal_cdf`.

    NumPy has no error function. The ratio of the tail to exp(-x²/2) is smooth in 1/(1 + c x), so a Chebyshev
    interpolation of ``math.erfc`` is accurate to 4e-15 in float64 and 3e-8 in float32, without a branch.
    """
    degree, limit = TAILS[dtype]
    c = 0.25
    least = 1 / (1 + c * limit)
    a, b = 2 / (1 - least), -(1 + least) / (1 - least)  # maps [least, 1] to [-1, 1]

    chebyshev = np.polynomial.chebyshev
    nodes = chebyshev.chebpts1(degree + 1)
    x = (a / (nodes - b) - 1) / c
    ratio = [0.5 * math.erfc(v / math.sqrt(2)) * math.exp(v * v / 2) for v in x]
    series = chebyshev.chebfit(nodes, ratio, degree)  # as many nodes as coefficients: an interpolation
    return a, b, c, tuple(chebyshev.cheb2poly(series)[::-1].tolist())
