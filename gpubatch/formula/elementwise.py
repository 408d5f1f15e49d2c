"""Functions of one element, written once: activations and losses of single scores, and their derivatives.

Both are declared by a decorator from the function alone. The derivative is derived from the record where the function
does not return one, and what backward has to look at is found in the record as well.
"""

from __future__ import annotations

import functools
import inspect
import math
import numbers
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpubatch.errors import FormulaError
from gpubatch.formula.derivative import derivative, times
from gpubatch.formula.trace import HOST_FUNCTIONS, Element, Scalar, Trace, restated

__all__ = [
    "Activation",
    "ActivationForm",
    "BoundActivation",
    "BoundScoreLoss",
    "ScoreLoss",
    "activation",
    "activation_source",
    "normal_cdf",
    "score_loss",
    "score_source",
]


# --- activations ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ActivationForm:
    """An activation as it runs: ``forward`` makes y from x, and with ``keeps`` the slope; ``backward`` makes dx.

    ``backward`` reads dy and "kept": y where ``reads_y``, or the slope that forward made, or neither.
    """

    forward: Trace
    backward: Trace
    keeps: bool
    reads_y: bool


@dataclass(frozen=True, eq=False)
class Activation:
    """An elementwise function ``formula(x, *, parameters)``, which returns y, or y and its slope dy/dx.

    ``defaults`` has the values of the parameters that have one, ``required`` names the others.
    """

    name: str
    formula: Callable[..., Any]
    required: tuple[str, ...]
    defaults: Mapping[str, float]

    def __repr__(self) -> str:
        return f"<activation {self.name}>"

    def __call__(self, x: Any, **parameters: float) -> Any:
        """The formula as it stands, on arrays: y."""
        y = self.formula(x, **parameters)
        return y[0] if isinstance(y, tuple) else y

    def bind(self, **parameters: float) -> BoundActivation:
        """The activation with values for its parameters."""
        return BoundActivation(self, bound("activation", self, parameters))

    @functools.cache  # noqa: B019  an activation lives as long as its module; it is recorded once for each dtype
    def form(self, dtype: str) -> ActivationForm:
        """The recorded formula for elements of ``dtype``, "float32" or "float64", and its derivative."""
        trace = Trace(self.name, ("x", "dy"), ("y", "slope"), names_of(self), dtype)
        x, dy = trace.inputs()
        returned = self.formula(x, **_symbols(self))
        y, slope = _with_derivative(self.name, returned, x, "y, or y and its slope")
        keeps, reads_y = _needs(slope, y)
        forward = restated(self.name, {x: "x"}, {"y": y, "slope": slope} if keeps else {"y": y})
        kept = {slope: "kept"} if keeps else {y: "kept"} if reads_y else {}
        backward = restated(self.name, {**kept, dy: "dy"}, {"dx": times(dy, slope)})
        return ActivationForm(forward, backward, keeps, reads_y)


@dataclass(frozen=True)
class BoundActivation:
    """An activation and the ``values`` of its parameters, in their order."""

    activation: Activation
    values: tuple[float, ...] = ()

    @functools.cached_property
    def keeps(self) -> bool:
        """Whether forward keeps the slope."""
        return self.activation.form("float32").keeps

    @functools.cached_property
    def reads_y(self) -> bool:
        """Whether backward looks at y."""
        return self.activation.form("float32").reads_y

    def scalars(self, trace: Trace) -> tuple[float, ...]:
        """The scalars of one of the activation's forms."""
        return trace.evaluate(0, *self.values)

    def __repr__(self) -> str:
        return call_text(self.activation, self.values)


def activation(formula: Callable[..., Any]) -> Activation:
    """Declare an activation from a function of one element.

    The function takes ``x``, and after ``*`` its parameters. It returns y, or ``(y, slope)`` where you know a cheaper
    or more accurate derivative than the derived one. It may use what update rules may: arithmetic, ``np.where``, and
    the functions of NumPy that an error lists. A network takes it as ``gb.mlp(..., activation=silu)``, a list of layers
    as ``gb.Elementwise(silu)``.

    >>> @activation
    ... def silu(x):
    ...     return x / (1 + np.exp(-x))
    """
    return Activation(_name(formula), formula, *_parameters(formula, ["x"]))


# --- losses of single scores ---------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class ScoreLoss:
    """A loss ``formula(z, y, *, parameters)`` of one score and its target, which returns it, or it and dloss/dz.

    The loss of a batch is the mean over all scores.
    """

    name: str
    formula: Callable[..., Any]
    required: tuple[str, ...]
    defaults: Mapping[str, float]

    def __repr__(self) -> str:
        return f"<score loss {self.name}>"

    def __call__(self, z: Any, y: Any, **parameters: float) -> Any:
        """The formula as it stands, on arrays: the loss of every score."""
        loss = self.formula(z, y, **parameters)
        return loss[0] if isinstance(loss, tuple) else loss

    def bind(self, **parameters: float) -> BoundScoreLoss:
        """The loss with values for its parameters."""
        return BoundScoreLoss(self, bound("loss", self, parameters))

    @functools.cache  # noqa: B019  as Activation.form
    def form(self, dtype: str, *targets: str) -> Trace:
        """The recorded formula for elements of ``dtype``: z and y to ``targets``, "loss" and the gradient "dz"."""
        trace = Trace(self.name, ("z", "y"), ("loss", "dz"), names_of(self), dtype)
        z, y = trace.inputs()
        returned = self.formula(z, y, **_symbols(self))
        loss, dz = _with_derivative(self.name, returned, z, "the loss, or the loss and its slope")
        results = {"loss": loss, "dz": dz}
        return restated(self.name, {z: "z", y: "y"}, {target: results[target] for target in targets})


@dataclass(frozen=True)
class BoundScoreLoss:
    """A score loss and the ``values`` of its parameters, in their order."""

    loss: ScoreLoss
    values: tuple[float, ...] = ()

    def scalars(self, trace: Trace) -> tuple[float, ...]:
        """The scalars of one of the loss's forms."""
        return trace.evaluate(0, *self.values)

    def __repr__(self) -> str:
        return call_text(self.loss, self.values)


def score_loss(formula: Callable[..., Any]) -> ScoreLoss:
    """Declare a loss from a function of one score ``z`` and its target ``y``.

    After ``*`` stand its parameters. The function returns the loss, or ``(loss, slope)`` with the derivative by z.

    >>> @score_loss
    ... def huber(z, y, *, delta=1.0):
    ...     r = np.abs(z - y)
    ...     return np.where(r < delta, 0.5 * r * r, delta * (r - 0.5 * delta))
    """
    return ScoreLoss(_name(formula), formula, *_parameters(formula, ["z", "y"]))


# --- what both share -----------------------------------------------------------------------------------------------


def names_of(declared: Activation | ScoreLoss) -> tuple[str, ...]:
    """The names of all parameters."""
    return (*declared.required, *declared.defaults)


def bound(what: str, declared: Activation | ScoreLoss, parameters: Mapping[str, Any]) -> tuple[float, ...]:
    """The values of all parameters; an error where one is missing, unknown or no finite number."""
    names = names_of(declared)
    missing = [name for name in declared.required if name not in parameters]
    unknown = [name for name in parameters if name not in names]
    if missing or unknown:
        listed = ", ".join(names) or "none"
        raise FormulaError(f"{what} {declared.name} has the parameters {listed}; missing {missing}, unknown {unknown}")
    values: dict[str, Any] = {**declared.defaults, **parameters}
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
            raise FormulaError(f"{name} of {what} {declared.name} must be a finite number, got {value!r}")
    return tuple(float(values[name]) for name in names)


def call_text(declared: Activation | ScoreLoss, values: tuple[float, ...]) -> str:
    """The name, and where there are parameters their values."""
    named = ", ".join(f"{name}={value!r}" for name, value in zip(names_of(declared), values, strict=True))
    return f"{declared.name}({named})" if named else declared.name


def _name(formula: Callable[..., Any]) -> str:
    return getattr(formula, "__name__", "formula")


def _symbols(declared: Activation | ScoreLoss) -> dict[str, Scalar]:
    return {name: Scalar(name) for name in names_of(declared)}


def _parameters(formula: Callable[..., Any], wanted: list[str]) -> tuple[tuple[str, ...], dict[str, float]]:
    """The parameters after ``*`` without and with a default; an error where the signature is another."""
    name, found = _name(formula), list(inspect.signature(formula).parameters.values())
    first = [p.name for p in found if p.kind is p.POSITIONAL_OR_KEYWORD]
    named = [p for p in found if p.kind is p.KEYWORD_ONLY]
    if first != wanted or len(first) + len(named) != len(found):
        raise FormulaError(f"{name} must have the signature ({', '.join(wanted)}, *, parameters), got {first}")
    for p in named:
        if p.name in HOST_FUNCTIONS:
            raise FormulaError(f"{name}: the name {p.name!r} is taken, give the parameter another")
        if p.default is not p.empty and (isinstance(p.default, bool) or not isinstance(p.default, (int, float))):
            raise FormulaError(f"{name}: the default of {p.name} must be a number, got {p.default!r}")
    defaults = {p.name: float(p.default) for p in named if p.default is not p.empty}
    return tuple(p.name for p in named if p.default is p.empty), defaults


def _with_derivative(name: str, returned: Any, by: Element, what: str) -> tuple[Any, Any]:
    """The value that a formula returned and its derivative: the one that it gave, or the derived one."""
    if not isinstance(returned, tuple):
        return returned, derivative(returned, by)
    if len(returned) != 2:
        raise FormulaError(f"{name} must return {what}; it returned {len(returned)} values")
    return returned


def _needs(slope: Any, y: Any) -> tuple[bool, bool]:
    """(whether the slope must be kept, whether it is told by y): which inputs its record leads to, short of y."""
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


# --- in C ----------------------------------------------------------------------------------------------------------


def activation_source(activation: Activation, dtype: str, name: str) -> str:
    """The activation as a C++ struct for the type T: y, and what backward is told by; ``k`` are the scalars of each."""
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
    """The loss of one score as a C++ struct for the type T: the loss, and its derivative to dz."""
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
    """Φ(x), the distribution function of a standard normal number, in an activation or a loss, or of an array.

    As accurate for x below 0, where it is small, as above: Φ(-x) = exp(-x²/2) P(a/(1 + c x) + b) for x >= 0.
    """
    dtype = x.trace.dtype if isinstance(x, Element) else np.asarray(x).dtype.name
    if isinstance(x, Scalar) or dtype not in TAILS:
        raise FormulaError(f"normal_cdf takes an element of an activation or a score loss, or an array, got {x!r}")
    a, b, c, coefficients = normal_tail(dtype)
    v = a / (1 + c * np.abs(x)) + b
    p: Any = coefficients[0]
    for coefficient in coefficients[1:]:
        p = p * v + coefficient
    tail = p * np.exp(-0.5 * x * x)
    return np.abs(np.where(x < 0, 0, 1) - tail)


# The degree of the polynomial, and from where on exp(-x²/2) is zero.
TAILS = {"float32": (8, 14.0), "float64": (19, 37.0)}


@functools.cache
def normal_tail(dtype: str) -> tuple[float, float, float, tuple[float, ...]]:
    """(a, b, c, coefficients of P from its highest power) of :func:`normal_cdf`.

    NumPy has no error function. The ratio of the tail to exp(-x²/2) is smooth in 1/(1 + c x), so a Chebyshev
    interpolation through ``math.erfc`` is accurate to 4e-15 in float64 and 3e-8 in float32, and needs no branch.
    """
    degree, limit = TAILS[dtype]
    c = 0.25
    least = 1 / (1 + c * limit)
    a, b = 2 / (1 - least), -(1 + least) / (1 - least)  # takes least..1 to -1..1

    chebyshev = np.polynomial.chebyshev
    nodes = chebyshev.chebpts1(degree + 1)
    x = (a / (nodes - b) - 1) / c
    ratio = [0.5 * math.erfc(v / math.sqrt(2)) * math.exp(v * v / 2) for v in x]
    series = chebyshev.chebfit(nodes, ratio, degree)  # as many nodes as coefficients: through every one
    return a, b, c, tuple(chebyshev.cheb2poly(series)[::-1].tolist())
