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
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, NamedTuple, Self, TypeVar

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

# --- what both are ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Declared(ABC):
    """A function of one element: ``formula(*arguments, *, parameters)`` returns a value, or the value and its slope.

    ``defaults`` maps parameters to their defaults; ``required`` names those without.

    kind: what files and messages call it.
    arguments: the names of its arguments; the slope is the derivative by the first.
    functions: the templates of kernels/host_formulas.h that are made of its :meth:`source`.
    """

    name: str
    formula: Callable[..., Any]
    required: tuple[str, ...]
    defaults: Mapping[str, float]

    kind: ClassVar[str]
    arguments: ClassVar[tuple[str, ...]]
    functions: ClassVar[tuple[str, ...]]

    @classmethod
    def of(cls, formula: Callable[..., Any]) -> Self:
        """Declare a function; raises FormulaError if its signature is another one."""
        name = getattr(formula, "__name__", "formula")
        positional, named, signature = signature_of("an activation or a loss", formula)
        if positional != cls.arguments:
            wanted = ", ".join(cls.arguments)
            raise FormulaError(f"{name} must have the signature ({wanted}, *, parameters), got {signature}")
        defaults = {parameter: default for parameter, default in named.items() if default is not signature.empty}
        for parameter in named:
            if parameter in HOST_FUNCTIONS:
                raise FormulaError(f"{name}: the name {parameter!r} is taken; rename the parameter")
        for parameter, default in defaults.items():
            if isinstance(default, (bool, np.bool_)) or not isinstance(default, numbers.Real):
                raise FormulaError(f"{name}: the default of {parameter} must be a number, got {default!r}")
        required = tuple(parameter for parameter in named if parameter not in defaults)
        return cls(name, formula, required, {parameter: float(default) for parameter, default in defaults.items()})

    def __reduce__(self) -> Any:
        return by_name(self, type(self).of)

    def __repr__(self) -> str:
        return f"<{self.kind} {self.name}>"

    @property
    def parameters(self) -> tuple[str, ...]:
        """The names of all parameters."""
        return (*self.required, *self.defaults)

    def recorded(self, dtype: str, *others: str) -> tuple[list[Element], Any]:
        """The inputs of a new trace, the arguments and ``others``, and what the function returns for the arguments."""
        inputs = Trace(self.name, (*self.arguments, *others), (), self.parameters, dtype).inputs()
        symbols = {name: Scalar(name) for name in self.parameters}
        return inputs, recorded(self.formula, *inputs[: len(self.arguments)], **symbols)

    def with_slope(self, returned: Any, by: Element, expected: str) -> tuple[Any, Any]:
        """(value, slope): both as the function returned them, or with the slope derived."""
        if not isinstance(returned, tuple):
            return returned, derivative(returned, by)
        if len(returned) != 2:
            raise FormulaError(f"{self.name} must return {expected}; it returned {len(returned)} values")
        return returned

    @functools.cached_property
    def _forms(self) -> dict[tuple[str, ...], tuple[Trace, ...]]:
        return {}

    @abstractmethod
    def _traced(self, *key: str) -> tuple[Trace, ...]:
        """The traces of a form, recorded now; the ``key`` begins with the dtype of the elements."""

    def _form(self, *key: str) -> tuple[Trace, ...]:
        found = self._forms.get(key)
        if found is None:
            found = self._traced(*key)
            for one, again in zip(found, self._traced(*key), strict=True):
                check_repeatable(self.name, one, again)
            self._forms[key] = found
        return found

    def current(self) -> Self:
        """The function as it is now: another object if numbers from outside of it have changed since it was traced."""
        latest: Self = self.__dict__.get("_latest", self)
        library = str(getattr(self.formula, "__module__", "")).startswith("gpubatch.")
        if library or all(all(map(same_recording, form, latest._traced(*key))) for key, form in latest._forms.items()):
            return latest
        self.__dict__["_latest"] = latest = dataclasses.replace(self)
        return latest

    def values(self, given: Mapping[str, Any]) -> tuple[float, ...]:
        """The values of all parameters; raises FormulaError if one is missing, unknown or not a finite number."""
        what = f"{self.kind.split()[-1]} {self.name}"
        missing = [name for name in self.required if name not in given]
        unknown = [name for name in given if name not in self.parameters]
        if missing or unknown:
            listed = ", ".join(self.parameters) or "none"
            raise FormulaError(f"{what} has the parameters {listed}; missing {missing}, unknown {unknown}")
        values: dict[str, Any] = {**self.defaults, **given}
        for name, value in values.items():
            if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
                raise FormulaError(f"{name} of {what} must be a finite number, got {value!r}")
        return tuple(float(values[name]) for name in self.parameters)

    @abstractmethod
    def source(self, dtype: str, name: str) -> str:
        """The function as a C++ struct for the type T."""


Kind = TypeVar("Kind", bound=Declared)


@dataclass(frozen=True)
class Bound(Generic[Kind]):
    """What is ``declared``, with the ``values`` of its parameters, in their order."""

    declared: Kind
    values: tuple[float, ...] = ()

    @functools.cached_property
    def _hash(self) -> int:
        return hash((self.declared, self.values))

    def __hash__(self) -> int:  # programs and kernels are looked up by it in every call
        return self._hash

    def __reduce__(self) -> Any:  # without the hash, which differs from process to process
        return type(self), (self.declared, self.values)

    @property
    def parameters(self) -> dict[str, float]:
        """The values by name."""
        return dict(zip(self.declared.parameters, self.values, strict=True))

    def scalars(self, trace: Trace) -> tuple[float, ...]:
        """The scalars of ``trace``, one of the function's."""
        return trace.evaluate(0, *self.values)

    def __repr__(self) -> str:
        named = ", ".join(f"{name}={value!r}" for name, value in self.parameters.items())
        return f"{self.declared.name}({named})" if named else self.declared.name


# --- activations -----------------------------------------------------------------------------------------------------


class ActivationForm(NamedTuple):
    """The traces of an activation.

    forward: x to y, and to the slope if backward needs it
    backward: dy, and "kept" where it needs the slope or y, to dx
    """

    forward: Trace
    backward: Trace

    @property
    def keeps(self) -> bool:
        """Whether forward stores the slope."""
        return "slope" in self.forward.targets

    @property
    def reads_y(self) -> bool:
        """Whether backward reads y."""
        return not self.keeps and "kept" in self.backward.arrays


class Activation(Declared):
    """An elementwise function: ``formula(x, *, parameters)`` returns y, or y and its slope dy/dx."""

    kind, arguments, functions = "activation", ("x",), ("activate", "activation_gradient")

    def __call__(self, x: Any, **parameters: float) -> Any:
        """Evaluate the formula on arrays: y."""
        y = self.formula(*own_copies(x), **parameters)
        return y[0] if isinstance(y, tuple) else y

    def bind(self, **parameters: float) -> BoundActivation:
        """The activation with values for its parameters."""
        return BoundActivation(self.current(), self.values(parameters))

    def form(self, dtype: str) -> ActivationForm:
        """The traces for elements of ``dtype``, "float32" or "float64"; made once."""
        return ActivationForm(*self._form(dtype))

    def _traced(self, *key: str) -> tuple[Trace, ...]:
        (x, dy), returned = self.recorded(*key, "dy")
        y, slope = self.with_slope(returned, x, "y, or y and its slope")
        keeps, reads_y = _needs(slope, y)
        forward = restated(self.name, {x: "x"}, {"y": y, "slope": slope} if keeps else {"y": y})
        kept = {slope: "kept"} if keeps else {y: "kept"} if reads_y else {}
        return forward, restated(self.name, {**kept, dy: "dy"}, {"dx": times(dy, slope)})

    def source(self, dtype: str, name: str) -> str:
        """A C++ struct for the type T; ``k`` are the scalars of forward or of backward."""
        form = self.form(dtype)
        return f"""struct {name} {{  // {self.name}
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


class BoundActivation(Bound[Activation]):
    """An activation with values for its parameters."""

    @functools.cached_property
    def keeps(self) -> bool:
        """Whether forward stores the slope."""
        return self.declared.form("float32").keeps

    @functools.cached_property
    def reads_y(self) -> bool:
        """Whether backward reads y."""
        return self.declared.form("float32").reads_y


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
    return Activation.of(formula)


# --- score losses ----------------------------------------------------------------------------------------------------


class ScoreLoss(Declared):
    """A loss of one score and its target: ``formula(z, y, *, parameters)`` returns the loss, or (loss, dloss/dz).

    The loss of a batch is the mean over all scores.
    """

    kind, arguments, functions = "score loss", ("z", "y"), ("score_loss",)

    def __call__(self, z: Any, y: Any, **parameters: float) -> Any:
        """Evaluate the formula on arrays: the loss of each score."""
        loss = self.formula(*own_copies(z, y), **parameters)
        return loss[0] if isinstance(loss, tuple) else loss

    def bind(self, **parameters: float) -> BoundScoreLoss:
        """The loss with values for its parameters."""
        return BoundScoreLoss(self.current(), self.values(parameters))

    def form(self, dtype: str, *targets: str) -> Trace:
        """The trace for elements of ``dtype``, from z and y to ``targets``: "loss", the gradient "dz", or both."""
        return self._form(dtype, *targets)[0]

    def _traced(self, *key: str) -> tuple[Trace, ...]:
        dtype, *targets = key
        (z, y), returned = self.recorded(dtype)
        loss, dz = self.with_slope(returned, z, "the loss, or the loss and its slope")
        if not isinstance(returned, tuple) and not isinstance(dz, Symbol) and dz == 0:
            raise FormulaError(
                f"{self.name} has the derivative 0 by z for all scores, so nothing could be trained; "
                "compute it from z, or return (loss, slope)"
            )
        results = {"loss": loss, "dz": dz}
        return (restated(self.name, {z: "z", y: "y"}, {target: results[target] for target in targets}),)

    def source(self, dtype: str, name: str) -> str:
        """A C++ struct for the type T; ``f`` returns the loss and sets dz to its derivative."""
        return f"""struct {name} {{  // {self.name}
    __device__ static T f(T z, T y, const T* k, T& dz) {{
        T loss;
{_indented(self.form(dtype, "loss", "dz").c)}
        return loss;
    }}
}};
"""


class BoundScoreLoss(Bound[ScoreLoss]):
    """A score loss with values for its parameters."""


def score_loss(formula: Callable[..., Any]) -> ScoreLoss:
    """Declare a loss from a function of one score and its target.

    The function takes the score ``z``, the target ``y``, and after ``*`` its parameters. It returns the loss, or
    ``(loss, slope)`` with slope = dloss/dz. Raises :class:`FormulaError` for any other signature.

    >>> @score_loss
    ... def huber(z, y, *, delta=1.0):
    ...     r = np.abs(z - y)
    ...     return np.where(r < delta, 0.5 * r * r, delta * (r - 0.5 * delta))
    """
    return ScoreLoss.of(formula)


# --- pieces ----------------------------------------------------------------------------------------------------------


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
