"""Layers: what happens to the rows of a batch, forward and backward side by side.

A layer is a description and holds no array. It says what it needs; the network plans the memory and hands it back in a
:class:`Context` at every call, so that a step allocates nothing. Every array is ``(batch, features)``, C-contiguous,
and on the network's device; x is a layer's input, y its output, dx and dy the gradients of the loss by them.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from gpubatch.backend import Array, Backend
from gpubatch.errors import ArgumentError, check_bool, check_choice, check_int, check_real
from gpubatch.launch import cuda_kernel, kernel_source

__all__ = [
    "ACTIVATIONS",
    "GELU",
    "BatchNorm",
    "Context",
    "Dense",
    "Dropout",
    "Layer",
    "LeakyReLU",
    "Mode",
    "Needs",
    "Parameter",
    "ReLU",
    "Sigmoid",
    "Step",
    "Tanh",
]

Shape: TypeAlias = tuple[int, ...]
Initializer: TypeAlias = "Callable[[np.random.Generator, Shape], np.ndarray]"  # in quotes: NumPy loads random late
Space: TypeAlias = tuple[Shape, Any]  # shape, in which -1 is the batch size, and dtype; None is the network's dtype


@dataclass(frozen=True)
class Parameter:
    """An array that the network keeps for a layer: its shape, and its first values, a number or what ``init`` draws.

    ``init(generator, shape)`` gives a NumPy array. The l2 term of the loss counts the parameters with ``l2=True``.
    """

    shape: Shape
    init: float | Initializer = 0.0
    l2: bool = False


@dataclass(frozen=True)
class Needs:
    """What a layer asks of its network.

    ``outputs`` is how many features it gives. ``parameters`` are trained; ``buffers`` are kept beside them, as running
    statistics are. ``kept`` is workspace that lasts from forward to backward, ``scratch`` lasts for one call.
    ``reads`` names what backward looks at again, of "x" and "y". A layer with ``in_place=True`` may be given the same
    array as x and y, and as dy and dx.
    """

    outputs: int
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    buffers: Mapping[str, Parameter] = field(default_factory=dict)
    kept: Mapping[str, Space] = field(default_factory=dict)
    scratch: Mapping[str, Space] = field(default_factory=dict)
    reads: tuple[str, ...] = ("x", "y")
    in_place: bool = False


@dataclass
class Mode:
    """How a network runs at the moment: ``training`` or evaluating, and at which training ``step`` from 0."""

    seed: int
    training: bool = False
    step: int = 0


@dataclass(frozen=True)
class Context:
    """What a layer has at hand in one call, by the names that its :class:`Needs` gave.

    ``p`` parameters, ``g`` their gradients (to be overwritten), ``buffers``, ``work`` the workspace; ``xp`` is the
    namespace of the arrays, ``index`` the layer's place in the network from 0.
    """

    backend: Backend
    xp: Any
    index: int
    mode: Mode
    p: Mapping[str, Array]
    g: Mapping[str, Array]
    buffers: Mapping[str, Array]
    work: Mapping[str, Array]


def philox_generator(seed: int, index: int, counter: Array | int = 0) -> np.random.Generator:
    """The random numbers of one layer; of a list of large integers NumPy would make floats, so the key is an array."""
    return np.random.Generator(np.random.Philox(key=np.array([seed, index], np.uint64), counter=counter))


class Layer(ABC):
    """One layer. Subclass it for your own: four methods, and nothing else is asked."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in vars(self).items())})"

    @abstractmethod
    def takes(self) -> int | None:
        """How many features a row of x must have; None: any number."""

    @abstractmethod
    def needs(self, features: int) -> Needs:
        """What the layer needs for rows of ``features`` numbers."""

    @abstractmethod
    def forward(self, x: Array, y: Array, c: Context) -> None:
        """Write y. While ``c.mode.training`` is false, every row must count for itself."""

    @abstractmethod
    def backward(self, x: Array, y: Array, dy: Array, dx: Array | None, c: Context) -> None:
        """Write the gradients ``c.g`` and dx; dx is None where nobody needs it."""


# --- activations: one number in, one number out --------------------------------------------------------------------


class Step(Layer):
    """1 where x > 0, else 0. Forward only: its derivative is zero almost everywhere, so nothing below it learns."""

    def takes(self) -> None:
        """Any number of features."""

    def needs(self, features: int) -> Needs:
        """As many outputs as inputs."""
        return Needs(features, scratch={"positive": ((-1, features), bool)}, reads=(), in_place=True)

    def forward(self, x: Array, y: Array, c: Context) -> None:
        """y = 1 where x > 0, else 0."""
        y[...] = c.xp.greater(x, 0, out=c.work["positive"])

    def backward(self, x: Array, y: Array, dy: Array, dx: Array | None, c: Context) -> None:
        """dx = 0."""
        if dx is not None:
            dx.fill(0)


class ReLU(Layer):
    """max(x, 0); the derivative at 0 is 0."""

    def takes(self) -> None:
        """Any number of features."""

    def needs(self, features: int) -> Needs:
        """As many outputs as inputs."""
        return Needs(features, scratch={"positive": ((-1, features), bool)}, reads=("y",), in_place=True)

    def forward(self, x: Array, y: Array, c: Context) -> None:
        """y = max(x, 0)."""
        c.xp.maximum(x, 0, out=y)

    def backward(self, x: Array, y: Array, dy: Array, dx: Array | None, c: Context) -> None:
        """dx = dy where y > 0, else 0."""
        if dx is not None:
            # Twice as fast in NumPy as a masked copy, or as a mask of floats.
            c.xp.multiply(dy, c.xp.greater(y, 0, out=c.work["positive"]), out=dx)


class LeakyReLU(Layer):
    """max(x, slope*x), 0 <= slope < 1; the derivative at 0 is the slope."""

    def __init__(self, slope: float = 0.01) -> None:
        self.slope = check_real("slope", slope, 0, 1, open_high=True)

    def takes(self) -> None:
        """Any number of features."""

    def needs(self, features: int) -> Needs:
        """As many outputs as inputs."""
        return Needs(features, scratch={"t": ((-1, features), None)}, reads=("y",), in_place=True)

    def forward(self, x: Array, y: Array, c: Context) -> None:
        """y = max(x, slope*x)."""
        c.xp.maximum(x, c.xp.multiply(x, self.slope, out=c.work["t"]), out=y)

    def backward(self, x: Array, y: Array, dy: Array, dx: Array | None, c: Context) -> None:
        """dx = dy where y > 0, else slope*dy."""
        if dx is not None:
            t = c.xp.greater(y, 0, out=c.work["t"])
            t *= 1 - self.slope
            t += self.slope
            c.xp.multiply(dy, t, out=dx)


class Sigmoid(Layer):
    """1 / (1 + exp(-x))."""

    def takes(self) -> None:
        """Any number of features."""

    def needs(self, features: int) -> Needs:
        """As many outputs as inputs."""
        return Needs(features, scratch={"t": ((-1, features), None)}, reads=("y",), in_place=True)

    def forward(self, x: Array, y: Array, c: Context) -> None:
        """y = 1 / (1 + exp(-x)); far below zero exp overflows to infinity and y is the 0 that it should be."""
        c.xp.exp(c.xp.negative(x, out=y), out=y)
        y += 1
        c.xp.reciprocal(y, out=y)

    def backward(self, x: Array, y: Array, dy: Array, dx: Array | None, c: Context) -> None:
        """dx = dy y (1 - y)."""
        if dx is not None:
            t = c.xp.subtract(1, y, out=c.work["t"])
            t *= y
            c.xp.multiply(dy, t, out=dx)


class Tanh(Layer):
    """The hyperbolic tangent."""

    def takes(self) -> None:
        """Any number of features."""

    def needs(self, features: int) -> Needs:
        """As many outputs as inputs."""
        return Needs(features, scratch={"t": ((-1, features), None)}, reads=("y",), in_place=True)

    def forward(self, x: Array, y: Array, c: Context) -> None:
        """y = tanh(x)."""
        c.xp.tanh(x, out=y)

    def backward(self, x: Array, y: Array, dy: Array, dx: Array | None, c: Context) -> None:
        """dx = dy (1 - y²)."""
        if dx is not None:
            t = c.xp.multiply(y, y, out=c.work["t"])
            c.xp.multiply(dy, c.xp.subtract(1, t, out=t), out=dx)


class GELU(Layer):
    """x Φ(x), Φ the distribution function of the standard normal (Hendrycks & Gimpel, arXiv:1606.08415).

    ``approximate="none"`` is exact to a few units of rounding; "tanh" is the paper's
    x/2 (1 + tanh(√(2/π) (x + 0.044715 x³))). Names and default are PyTorch's.
    """

    def __init__(self, approximate: str = "none") -> None:
        self.approximate = check_choice("approximate", approximate, ["none", "tanh"])

    def takes(self) -> None:
        """Any number of features."""

    def needs(self, features: int) -> Needs:
        """As many outputs as inputs."""
        full: Space = ((-1, features), None)
        return Needs(features, kept={"d": full}, scratch={"t": full, "u": full}, reads=(), in_place=True)

    def forward(self, x: Array, y: Array, c: Context) -> None:
        """y = x Φ(x); the derivative is made here too, where Φ and the density are at hand."""
        gelu = gelu_exact if self.approximate == "none" else gelu_tanh
        gelu(c.xp, x, y, c.work["d"], c.work["t"], c.work["u"])

    def backward(self, x: Array, y: Array, dy: Array, dx: Array | None, c: Context) -> None:
        """dx = dy (Φ(x) + x φ(x))."""
        if dx is not None:
            c.xp.multiply(dy, c.work["d"], out=dx)


def gelu_exact(xp: Any, x: Array, y: Array, d: Array, t: Array, u: Array) -> None:
    """y = x Φ(x), d its derivative; t and u are scratch."""
    a, b, c, coefficients = normal_tail(np.dtype(x.dtype).name)
    xp.multiply(x, x, out=d)
    d *= -0.5
    xp.exp(d, out=d)
    xp.abs(x, out=t)
    t *= c
    t += 1
    xp.divide(a, t, out=t)
    t += b
    xp.multiply(t, coefficients[0], out=u)
    for coefficient in coefficients[1:-1]:
        u += coefficient
        u *= t
    u += coefficients[-1]
    u *= d  # Φ(-|x|)
    xp.subtract(0.5, u, out=u)
    xp.copysign(u, x, out=u)
    u += 0.5  # Φ(x)
    d *= 1 / math.sqrt(2 * math.pi)
    d *= x
    d += u
    xp.multiply(x, u, out=y)


def gelu_tanh(xp: Any, x: Array, y: Array, d: Array, t: Array, u: Array) -> None:
    """y = x/2 (1 + tanh(√(2/π) (x + 0.044715 x³))), d its derivative; t and u are scratch."""
    k, cubic = math.sqrt(2 / math.pi), 0.044715
    xp.multiply(x, x, out=t)
    xp.multiply(t, 3 * k * cubic, out=d)
    d += k
    t *= k * cubic
    t += k
    t *= x
    xp.tanh(t, out=t)
    xp.multiply(t, t, out=u)
    xp.subtract(1, u, out=u)
    u *= x
    d *= u
    t += 1
    d += t
    d *= 0.5
    t *= 0.5
    xp.multiply(x, t, out=y)


@functools.cache
def normal_tail(dtype: str) -> tuple[float, float, float, tuple[float, ...]]:
    """(a, b, c, coefficients) such that Φ(-x) = exp(-x²/2) P(a/(1 + c x) + b) for x >= 0; P from its highest power.

    NumPy has no error function. The ratio of the tail to exp(-x²/2) is smooth in 1/(1 + c x), so a Chebyshev
    interpolation through ``math.erfc`` is accurate to 4e-15 in float64 and 3e-8 in float32, and needs no branch.
    """
    degree, limit = {"float32": (8, 14.0), "float64": (19, 37.0)}[dtype]  # beyond the limit exp(-x²/2) is zero
    c = 0.25
    least = 1 / (1 + c * limit)
    a, b = 2 / (1 - least), -(1 + least) / (1 - least)  # takes least..1 to -1..1

    chebyshev = np.polynomial.chebyshev
    nodes = chebyshev.chebpts1(degree + 1)
    x = (a / (nodes - b) - 1) / c
    ratio = [0.5 * math.erfc(v / math.sqrt(2)) * math.exp(v * v / 2) for v in x]
    series = chebyshev.chebfit(nodes, ratio, degree)  # as many nodes as coefficients: through every one
    return a, b, c, tuple(chebyshev.cheb2poly(series)[::-1].tolist())


ACTIVATIONS: dict[str, type[Layer]] = {
    "relu": ReLU,
    "leaky_relu": LeakyReLU,
    "sigmoid": Sigmoid,
    "tanh": Tanh,
    "gelu": GELU,
    "step": Step,
}


# --- layers with parameters ------------------------------------------------------------------------------------------


class Dense(Layer):
    """X W + b, W of shape (inputs, outputs).

    ``init`` of W: "he", normal of variance 2/inputs (He et al. 2015); "xavier", 2/(inputs + outputs) (Glorot & Bengio
    2010); "zeros"; or a number, the standard deviation. b starts at zero.
    """

    def __init__(self, inputs: int, outputs: int, bias: bool = True, init: str | float = "he") -> None:
        self.inputs = check_int("inputs", inputs, 1)
        self.outputs = check_int("outputs", outputs, 1)
        self.bias = check_bool("bias", bias)
        self.init: str | float
        if isinstance(init, str):
            self.init = check_choice("init", init, ["he", "xavier", "zeros"])
        else:
            self.init = check_real("init", init, 0)

    def takes(self) -> int:
        """As many features as W has rows."""
        return self.inputs

    def needs(self, features: int) -> Needs:
        """W and, with bias, b."""
        named = {
            "he": math.sqrt(2 / self.inputs),
            "xavier": math.sqrt(2 / (self.inputs + self.outputs)),
            "zeros": 0.0,
        }
        std = named[self.init] if isinstance(self.init, str) else self.init
        parameters = {
            "W": Parameter((self.inputs, self.outputs), lambda draw, shape: draw.normal(0, std, shape), l2=True)
        }
        if self.bias:
            parameters["b"] = Parameter((self.outputs,))
        return Needs(self.outputs, parameters, reads=("x",))

    def forward(self, x: Array, y: Array, c: Context) -> None:
        """y = x W + b."""
        c.xp.matmul(x, c.p["W"], out=y)
        if self.bias:
            y += c.p["b"]

    def backward(self, x: Array, y: Array, dy: Array, dx: Array | None, c: Context) -> None:
        """dW = xᵀ dy, db = Σ dy, dx = dy Wᵀ."""
        c.xp.matmul(x.T, dy, out=c.g["W"])
        if self.bias:
            dy.sum(axis=0, out=c.g["b"])
        if dx is not None:
            c.xp.matmul(dy, c.p["W"].T, out=dx)


class BatchNorm(Layer):
    """gamma (x - mean)/sqrt(var + eps) + beta, per feature (Ioffe & Szegedy, arXiv:1502.03167).

    In training, mean and biased variance are the batch's, which must have more than one sample; a training step moves
    the running ones by ``momentum``, the weight of the new value. In evaluation the running ones are used. The running
    variance takes the unbiased variance (PyTorch), or with ``unbiased_running=False`` the biased one (CS231n).
    """

    def __init__(self, features: int, eps: float = 1e-5, momentum: float = 0.1, unbiased_running: bool = True) -> None:
        self.features = check_int("features", features, 1)
        self.eps = check_real("eps", eps, 0, open_low=True)
        self.momentum = check_real("momentum", momentum, 0, 1)
        self.unbiased_running = check_bool("unbiased_running", unbiased_running)

    def takes(self) -> int:
        """As many features as it was made for."""
        return self.features

    def needs(self, features: int) -> Needs:
        """gamma, beta, and the running statistics."""
        full, one = ((-1, features), None), ((features,), None)
        return Needs(
            features,
            parameters={"gamma": Parameter((features,), 1.0), "beta": Parameter((features,))},
            buffers={"running_mean": Parameter((features,)), "running_var": Parameter((features,), 1.0)},
            kept={"normal": full, "mean": one, "var": one, "inverse": one},
            scratch={"t": full, "row": one},
            reads=(),
            in_place=True,
        )

    def forward(self, x: Array, y: Array, c: Context) -> None:
        """y = gamma (x - mean)/sqrt(var + eps) + beta."""
        normal, mean, var, inverse = (c.work[name] for name in ("normal", "mean", "var", "inverse"))
        if not c.mode.training:
            mean[...], var[...] = c.buffers["running_mean"], c.buffers["running_var"]
            c.xp.subtract(x, mean, out=normal)
        else:
            if len(x) < 2:
                raise ArgumentError(f"BatchNorm needs more than one sample in a training batch, got {len(x)}")
            x.sum(axis=0, out=mean)
            mean *= 1 / len(x)
            c.xp.subtract(x, mean, out=normal)
            c.xp.multiply(normal, normal, out=y).sum(axis=0, out=var)
            var *= 1 / len(x)
        c.xp.add(var, self.eps, out=inverse)
        c.xp.reciprocal(c.xp.sqrt(inverse, out=inverse), out=inverse)
        normal *= inverse
        c.xp.multiply(normal, c.p["gamma"], out=y)
        y += c.p["beta"]

    def backward(self, x: Array, y: Array, dy: Array, dx: Array | None, c: Context) -> None:
        """dbeta = Σ dy, dgamma = Σ dy n, dx = gamma/sqrt(var + eps) (dy - dbeta/m - n dgamma/m); n is x normalised."""
        normal, mean, var, inverse, row = (c.work[name] for name in ("normal", "mean", "var", "inverse", "row"))
        m, dgamma, dbeta = len(dy), c.g["gamma"], c.g["beta"]
        c.xp.multiply(dy, normal, out=c.work["t"]).sum(axis=0, out=dgamma)
        dy.sum(axis=0, out=dbeta)
        if dx is not None:
            normal *= c.xp.multiply(dgamma, 1 / m, out=row)
            c.xp.subtract(dy, c.xp.multiply(dbeta, 1 / m, out=row), out=dx)
            dx -= normal
            dx *= c.xp.multiply(c.p["gamma"], inverse, out=row)
        # Here and not in forward: only a training step comes here, and only after its loss was found to be finite.
        unbiased = m / (m - 1) if self.unbiased_running else 1.0
        for name, new, weight in (("running_mean", mean, 1.0), ("running_var", var, unbiased)):
            running = c.buffers[name]
            running *= 1 - self.momentum
            running += c.xp.multiply(new, self.momentum * weight, out=row)


# --- dropout ---------------------------------------------------------------------------------------------------------


class Dropout(Layer):
    """In training, zero with probability ``rate`` and otherwise x/(1 - rate); in evaluation x (Srivastava et al. 2014).

    The mask is a function of the network's seed, the layer's place, the training step and the element's place, the
    same on CPU and GPU: uniform float32 numbers of Philox4x64-10 with key (seed, layer) and counter (0, step, 0, 0).
    """

    def __init__(self, rate: float) -> None:
        self.rate = check_real("rate", rate, 0, 1, open_high=True)

    def takes(self) -> None:
        """Any number of features."""

    def needs(self, features: int) -> Needs:
        """As many outputs as inputs, and the mask."""
        full = (-1, features)
        return Needs(
            features, kept={"mask": (full, None)}, scratch={"uniform": (full, np.float32)}, reads=(), in_place=True
        )

    def forward(self, x: Array, y: Array, c: Context) -> None:
        """y = x mask; mask is 1/(1 - rate) where a uniform number is not below the rate, else 0."""
        if c.mode.training and self.rate > 0:
            (drop_on_gpu if c.backend.name == "cuda" else drop_on_cpu)(self.rate, x, y, c)
        elif y is not x:
            y[...] = x

    def backward(self, x: Array, y: Array, dy: Array, dx: Array | None, c: Context) -> None:
        """dx = dy mask."""
        if dx is not None and self.rate > 0:
            c.xp.multiply(dy, c.work["mask"], out=dx)
        elif dx is not None and dx is not dy:
            dx[...] = dy


def drop_on_cpu(rate: float, x: Array, y: Array, c: Context) -> None:
    """Write the mask and y = x mask."""
    uniform, mask = c.work["uniform"], c.work["mask"]
    counter = np.array([0, c.mode.step, 0, 0], np.uint64)
    philox_generator(c.mode.seed, c.index, counter).random(out=uniform, dtype=np.float32)
    np.greater_equal(uniform, rate, out=mask)
    mask *= 1 / (1 - rate)
    np.multiply(x, mask, out=y)


def drop_on_gpu(rate: float, x: Array, y: Array, c: Context) -> None:
    """Write the mask and y = x mask, from the very same uniform numbers."""
    dtype = np.dtype(x.dtype)
    threads = 256
    blocks = min(-(-x.size // (8 * threads)), 1 << 16)  # a thread makes eight numbers at a time
    arguments = (
        *(x, y, c.work["mask"], np.int64(x.size)),
        *(np.uint64(c.mode.seed), np.uint64(c.index), np.uint64(c.mode.step)),
        *(np.float32(rate), dtype.type(1 / (1 - rate))),
    )
    dropout_kernel(c.backend, dtype.name)((blocks,), (threads,), arguments)


@functools.cache
def dropout_kernel(backend: Backend, dtype: str) -> Any:
    """The kernel of ``kernels/dropout.cu`` for one element type."""
    element = {"float32": "float", "float64": "double"}[dtype]
    return cuda_kernel(backend, f"typedef {element} T;\n{kernel_source('dropout.cu')}", "dropout")
