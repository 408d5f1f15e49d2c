"""Layers, forward and backward side by side.

A layer is a description and holds no array. It says what it needs; the network plans the memory and passes it in a
:class:`Context` to every call, so that a step allocates nothing. Every array is ``(batch, features)``, C-contiguous,
and on the network's device; x is a layer's input, y its output, dx and dy the gradients of the loss by them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gpubatch.backend import Array, unmasked
from gpubatch.errors import (
    ArgumentError,
    DTypeError,
    ShapeError,
    check_bool,
    check_choice,
    check_int,
    check_real,
    suggesting,
)
from gpubatch.formula import Activation, BoundActivation, activations
from gpubatch.nn.needs import ByPlace, Context, Initializer, Needs, Parameter, Random, Together
from gpubatch.ops import COMPUTE, IDENTITY, Space, check_slope
from gpubatch.own import as_written


@as_written
class Layer(ABC):
    """A layer. Subclass it for your own and write four methods.

    Write results into the arrays given, ``y[...] = values``: a new array under the same name would be lost. Leave x as
    it is, unless y is the same array. The network checks both in the first call for each batch size. Nobody reads dy
    after backward, which may work in it::

        class Scale(gb.Layer):
            def takes(self): return None
            def needs(self, features): return gb.Needs(features, {"s": gb.Parameter((features,), 1.0)})
            def forward(self, x, y, c): c.xp.multiply(x, c.p["s"], out=y)
            def backward(self, x, y, dy, dx, c):
                c.g["s"][...] = (dy * x).sum(axis=0)
                if dx is not None: c.xp.multiply(dy, c.p["s"], out=dx)
    """

    def __init_subclass__(cls) -> None:
        as_written(cls)

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
        """Write y. Unless ``c.mode.training``, a row of y must depend on the same row of x alone."""

    @abstractmethod
    def backward(self, x: Array, y: Array, dy: Array, dx: Array | None, c: Context) -> None:
        """Write the gradients ``c.g`` and dx; dx is None if nobody needs it."""


# --- activations: one number in, one number out --------------------------------------------------------------------


class ActivationLayer(Layer):
    """A layer that applies an activation to each number."""

    @property
    @abstractmethod
    def function(self) -> BoundActivation:
        """The activation."""

    def takes(self) -> None:
        """Any number of features."""

    def needs(self, features: int) -> Needs:
        """As many outputs as inputs."""
        kept: dict[str, Space] = {"slope": ((-1, features), None)} if self.function.keeps else {}
        reads = ("y",) if self.function.reads_y else ()
        return Needs(features, kept=kept, reads=reads, in_place=True)

    def forward(self, x: Array, y: Array, c: Context) -> None:
        """y = f(x)."""
        c.ops.activate(self.function, x, None, y, c.work)

    def backward(self, x: Array, y: Array, dy: Array, dx: Array | None, c: Context) -> None:
        """dx = dy f'(x)."""
        if dx is not None:
            c.ops.activation_gradient(self.function, y, dy, dx, None, c.work)


class Elementwise(ActivationLayer):
    """Your own activation as a layer.

    activation: a function declared with :func:`gpubatch.activation`.
    parameters: values for its parameters, by name.

    >>> @gb.activation
    ... def silu(x):
    ...     return x / (1 + np.exp(-x))
    >>> net = gb.Network([gb.Dense(3, 4), gb.Elementwise(silu), gb.Dense(4, 2)])
    >>> net.scores(np.zeros((5, 3), np.float32)).shape
    (5, 2)
    """

    def __init__(self, activation: Activation | BoundActivation, **parameters: float) -> None:
        if isinstance(activation, BoundActivation) and not parameters:
            self.bound = activation
        elif isinstance(activation, Activation):
            self.bound = activation.bind(**parameters)
        else:
            raise DTypeError(
                f"activation must be a function declared with @gb.activation, or in gb.mlp a name such as 'relu', got "
                f"{activation!r}"
            )
        check_slope(self.bound)

    def __repr__(self) -> str:
        return f"Elementwise({self.bound!r})"

    @property
    def function(self) -> BoundActivation:
        """With its parameters."""
        return self.bound


class Step(ActivationLayer):
    """1 where x > 0, else 0. Forward only: its derivative is zero almost everywhere, so nothing below it learns.

    >>> net = gb.Network([gb.Dense(3, 4), gb.Step(), gb.Dense(4, 2)])
    >>> net.scores(np.zeros((5, 3), np.float32)).shape
    (5, 2)
    """

    function = activations.step.bind()


class ReLU(ActivationLayer):
    """max(x, 0); the derivative at 0 is 0.

    >>> net = gb.Network([gb.Dense(3, 4), gb.ReLU(), gb.Dense(4, 2)])
    >>> net.scores(np.zeros((5, 3), np.float32)).shape
    (5, 2)
    """

    function = activations.relu.bind()


class LeakyReLU(ActivationLayer):
    """max(x, slope*x), 0 <= slope < 1; the derivative at 0 is the slope.

    >>> net = gb.Network([gb.Dense(3, 4), gb.LeakyReLU(0.1), gb.Dense(4, 2)])
    >>> net.scores(np.zeros((5, 3), np.float32)).shape
    (5, 2)
    """

    def __init__(self, slope: float = 0.01) -> None:
        self.slope = check_real("slope", slope, 0, 1, open_high=True)

    @property
    def function(self) -> BoundActivation:
        """With its slope."""
        return activations.leaky_relu.bind(slope=self.slope)


class Sigmoid(ActivationLayer):
    """1 / (1 + exp(-x)).

    >>> net = gb.Network([gb.Dense(3, 4), gb.Sigmoid(), gb.Dense(4, 2)])
    >>> net.scores(np.zeros((5, 3), np.float32)).shape
    (5, 2)
    """

    function = activations.sigmoid.bind()


class Tanh(ActivationLayer):
    """The hyperbolic tangent.

    >>> net = gb.Network([gb.Dense(3, 4), gb.Tanh(), gb.Dense(4, 2)])
    >>> net.scores(np.zeros((5, 3), np.float32)).shape
    (5, 2)
    """

    function = activations.tanh.bind()


class GELU(ActivationLayer):
    """x Φ(x), Φ the distribution function of the standard normal (Hendrycks & Gimpel, arXiv:1606.08415).

    ``approximate="none"`` is exact to a few units of rounding; "tanh" is the paper's
    x/2 (1 + tanh(√(2/π) (x + 0.044715 x³))). Names and default are PyTorch's.

    >>> net = gb.Network([gb.Dense(3, 4), gb.GELU(), gb.Dense(4, 2)])
    >>> net.scores(np.zeros((5, 3), np.float32)).shape
    (5, 2)
    """

    def __init__(self, approximate: str = "none") -> None:
        self.approximate = check_choice("approximate", approximate, ["none", "tanh"])

    @property
    def function(self) -> BoundActivation:
        """In its exact form, or by tanh."""
        return EXACT_GELU if self.approximate == "none" else TANH_GELU


EXACT_GELU, TANH_GELU = activations.gelu.bind(), activations.gelu_tanh.bind()

ACTIVATIONS: dict[str, type[Layer]] = {
    "relu": ReLU,
    "leaky_relu": LeakyReLU,
    "sigmoid": Sigmoid,
    "tanh": Tanh,
    "gelu": GELU,
    "step": Step,
}


# --- layers with parameters ------------------------------------------------------------------------------------------


# How W starts, by name: the variance, by inputs and outputs, and whether the numbers are uniform.
INITS: dict[str, tuple[Callable[[int, int], float], bool]] = {
    "he": (lambda inputs, outputs: 2 / inputs, False),
    "he_uniform": (lambda inputs, outputs: 2 / inputs, True),
    "xavier": (lambda inputs, outputs: 2 / (inputs + outputs), False),
    "xavier_uniform": (lambda inputs, outputs: 2 / (inputs + outputs), True),
    "lecun": (lambda inputs, outputs: 1 / inputs, False),
    "lecun_uniform": (lambda inputs, outputs: 1 / inputs, True),
    "pytorch": (lambda inputs, outputs: 1 / (3 * inputs), True),
    "small": (lambda inputs, outputs: 8 / (9 * (inputs + outputs)), True),
    "large": (lambda inputs, outputs: 9 / (2 * (inputs + outputs)), True),
    "zeros": (lambda inputs, outputs: 0, False),
}
DRAWS_BIAS = ("pytorch", "small", "large")  # these draw b, too, as torch.nn.Linear does
AUTO = "auto"


class Dense(Layer):
    """X W + b, with W of shape (inputs, outputs).

    inputs: features of a row of X.
    outputs: features of a row of the result.
    bias: whether b is added.
    init: how W starts, see below; a number is the standard deviation of normal numbers.
    bias_init: how b starts: a number, or one for each output. By default 0, but with "pytorch", "small" and "large"
        uniform numbers of variance 1/(3 inputs).

    The names of ``init``, with the variance of W:

    - "he", "he_uniform": 2/inputs (He et al. 2015, arXiv:1502.01852), which ReLU halves.
    - "xavier", "xavier_uniform": 2/(inputs + outputs) (Glorot & Bengio 2010), Keras' default is the uniform one.
    - "lecun", "lecun_uniform": 1/inputs (LeCun et al. 1998, "Efficient BackProp").
    - "pytorch": 1/(3 inputs), uniform, as torch.nn.Linear, which calls it kaiming_uniform with a=√5.
    - "small", "large": 8/(9 (inputs + outputs)) and 9/(2 (inputs + outputs)), uniform: two thirds and three halves of
      what "xavier_uniform" draws.
    - "zeros": 0.
    - "auto": "small"; in the last Dense layer of a network "large" if its loss has classes, and otherwise, as for mse,
      "pytorch". It trained best on twelve data sets, beside scikit-learn and PyTorch (``bench/first_weights.py``).

    >>> net = gb.Network([gb.Dense(3, 4), gb.ReLU(), gb.Dense(4, 2)])
    >>> net.scores(np.zeros((5, 3), np.float32)).shape
    (5, 2)
    """

    @suggesting
    def __init__(
        self,
        inputs: int,
        outputs: int,
        bias: bool = True,
        init: str | float = AUTO,
        bias_init: float | Sequence[float] | None = None,
    ) -> None:
        self.inputs = check_int("inputs", inputs, 1)
        self.outputs = check_int("outputs", outputs, 1)
        self.bias = check_bool("bias", bias)
        self.init: str | float
        if isinstance(init, str):
            self.init = check_choice("init", init, [*INITS, AUTO])
        else:
            self.init = check_real("init", init, 0)
        self.bias_init = check_bias("bias_init", bias_init, self.outputs)
        if bias_init is not None and not bias:
            raise ArgumentError("bias_init is the start of a bias; leave it out, or give bias=True")

    def takes(self) -> int:
        """As many features as W has rows."""
        return self.inputs

    def needs(self, features: int) -> Needs:
        """W and, with bias, b."""
        auto = self.init == AUTO
        W = ByPlace(lambda *place: self._first_weights(auto_init(*place))) if auto else self._first_weights(self.init)
        parameters = {"W": Parameter((self.inputs, self.outputs), W, l2=True)}
        if self.bias:
            b = ByPlace(lambda *place: self._first_bias(auto_init(*place))) if auto else self._first_bias(self.init)
            parameters["b"] = Parameter((self.outputs,), b)
        uses = ("activation_gradient",) if self.bias else ()
        return Needs(self.outputs, parameters, uses_in_training=uses, reads=("x",))

    def _first_weights(self, init: str | float) -> Random:
        if not isinstance(init, str):
            return Random(init)
        variance, uniform = INITS[init]
        return Random(math.sqrt(variance(self.inputs, self.outputs)), uniform)

    def _first_bias(self, init: str | float) -> float | Initializer:
        given = self.bias_init
        if given is None:
            return Random(math.sqrt(1 / (3 * self.inputs)), uniform=True) if init in DRAWS_BIAS else 0.0
        return given if isinstance(given, float) else lambda draw, shape: np.array(given)

    def forward(self, x: Array, y: Array, c: Context) -> None:
        """y = x W + b."""
        if self.bias:
            multiply_and_activate(IDENTITY, x, y, c)
        else:
            c.products.multiply(x, c.p["W"], y)

    def backward(self, x: Array, y: Array, dy: Array, dx: Array | None, c: Context) -> None:
        """dW = xᵀ dy, db = Σ dy, dx = dy Wᵀ."""
        if not (c.frozen or (self.bias and c.products.weight_gradient(x, dy, c.g["W"], c.g["b"]))):
            if self.bias:
                c.ops.activation_gradient(IDENTITY, y, dy, None, c.g["b"], c.work)
            c.products.multiply(x.T, dy, c.g["W"])
        if dx is not None:
            c.products.multiply(dy, c.p["W"].T, dx)


def auto_init(classifies: bool, last: bool) -> str:
    """What ``init="auto"`` is, by the loss and the layer's place."""
    if not last:
        return "small"
    return "large" if classifies else "pytorch"


def check_bias(name: str, given: Any, outputs: int) -> float | tuple[float, ...] | None:
    """``given`` must be None, a number, or one for each output."""
    if given is None:
        return None
    values = np.asarray(unmasked(name, given))
    if values.dtype.kind not in "iuf":
        raise DTypeError(f"{name} must be a number or one for each output, got {given!r}")
    if values.shape not in ((), (1,), (outputs,)):
        raise ShapeError(f"{name} must have shape () or ({outputs},), got {values.shape}")
    if not np.isfinite(values).all():
        raise ArgumentError(f"{name} must be finite, got {given!r}")
    return float(values.item()) if values.size == 1 else tuple(values.astype(float).tolist())


class DenseActivation(Layer):
    """A Dense layer with bias and the activation after it as one: f(X W + b) in one pass after the product.

    A network puts it in place of the two. Backward overwrites dy.
    """

    def __init__(self, dense: Dense, activation: ActivationLayer) -> None:
        self.dense, self.function = dense, activation.function
        self.own = activation.needs(dense.outputs)

    def takes(self) -> int:
        """What the Dense layer takes."""
        return self.dense.inputs

    def needs(self, features: int) -> Needs:
        """What both need."""
        dense = self.dense.needs(features)
        return Needs(
            dense.outputs,
            dense.parameters,
            kept=self.own.kept,
            uses_in_training=dense.uses_in_training,
            reads=(*dense.reads, *self.own.reads),
        )

    def forward(self, x: Array, y: Array, c: Context) -> None:
        """y = f(x W + b)."""
        multiply_and_activate(self.function, x, y, c)

    def backward(self, x: Array, y: Array, dy: Array, dx: Array | None, c: Context) -> None:
        """dW, db and dx from dy f'(x W + b)."""
        # The pass over dy sums it as well, so the product does not have to.
        c.ops.activation_gradient(self.function, y, dy, dy, None if c.frozen else c.g["b"], c.work)
        if not c.frozen:
            c.products.multiply(x.T, dy, c.g["W"])
        if dx is not None:
            c.products.multiply(dy, c.p["W"].T, dx)


def multiply_and_activate(f: BoundActivation, x: Array, y: Array, c: Context) -> None:
    """Compute y = f(x W + b), in one launch if the library has one."""
    if not c.products.affine(f, x, c.p["W"], c.p["b"], y):
        c.products.multiply(x, c.p["W"], y)
        c.ops.activate(f, y, c.p["b"], y, c.work)


class BatchNorm(Layer):
    """gamma (x - mean)/sqrt(var + eps) + beta, per feature (Ioffe & Szegedy, arXiv:1502.03167).

    Training uses the mean and biased variance of the batch, which must have more than one sample, and updates the
    running statistics; evaluation uses these.

    features: features of a row.
    eps: added to the variance.
    momentum: the weight of the batch in the running statistics.
    unbiased_running: whether the running variance takes the unbiased variance (PyTorch) or the biased one (CS231n).
    sync: whether several ranks take the statistics of the whole batch, by three small sums over ranks in each step, as
        PyTorch's SyncBatchNorm. A rank then computes its rows at once, not part by part, so that the bits depend on the
        number of ranks; not for micro-batches, precision="mixed" and captured steps, which run eagerly instead.

    >>> net = gb.Network([gb.Dense(3, 4, bias=False), gb.BatchNorm(4), gb.ReLU(), gb.Dense(4, 2)])
    >>> sorted(net.buffers)
    ['running_mean1', 'running_var1']
    """

    @suggesting
    def __init__(
        self,
        features: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        unbiased_running: bool = True,
        sync: bool = False,
    ) -> None:
        self.features = check_int("features", features, 1)
        self.eps = check_real("eps", eps, 0, open_low=True)
        self.momentum = check_real("momentum", momentum, 0, 1)
        self.unbiased_running = check_bool("unbiased_running", unbiased_running)
        self.sync = check_bool("sync", sync)

    def __repr__(self) -> str:
        words = f"eps={self.eps}, momentum={self.momentum}, unbiased_running={self.unbiased_running}"
        return f"{type(self).__name__}(features={self.features}, {words}{', sync=True' if self.sync else ''})"

    def takes(self) -> int:
        """As many features as it was made for."""
        return self.features

    def needs(self, features: int) -> Needs:
        """gamma, beta, and the running statistics."""
        full, one = ((-1, features), None), ((features,), COMPUTE)
        return Needs(
            features,
            parameters={"gamma": Parameter((features,), 1.0), "beta": Parameter((features,))},
            buffers={"running_mean": Parameter((features,)), "running_var": Parameter((features,), 1.0)},
            kept={"normalised": full, "mean": one, "var": one, "inverse": one},
            uses=("normalise",),
            uses_in_training=("batch_norm", "batch_norm_gradient", "update_running"),
            reads=(),
            in_place=True,
            least_rows=2,
        )

    def forward(self, x: Array, y: Array, c: Context) -> None:
        """y = gamma (x - mean)/sqrt(var + eps) + beta."""
        gamma, beta = c.p["gamma"], c.p["beta"]
        if not c.mode.training:
            mean, var = c.buffers["running_mean"], c.buffers["running_var"]
            c.ops.normalise(x, mean, var, self.eps, gamma, beta, y, c.work)
        elif self.sync and c.mode.together is not None:
            self._forward_together(x, y, c, c.mode.together)
        elif len(x) < 2:
            raise ArgumentError(f"BatchNorm needs more than one sample in a training batch, got {len(x)}")
        else:
            c.ops.batch_norm(x, self.eps, gamma, beta, y, c.work)

    def backward(self, x: Array, y: Array, dy: Array, dx: Array | None, c: Context) -> None:
        """dbeta = Σ dy, dgamma = Σ dy n, dx = gamma/sqrt(var + eps) (dy - dbeta/m - n dgamma/m); n is x normalised."""
        if self.sync and c.mode.together is not None:
            self._backward_together(dy, dx, c, c.mode.together)
        elif dx is not None or not c.frozen:
            c.ops.batch_norm_gradient(dy, c.p["gamma"], c.g["gamma"], c.g["beta"], dx, c.work)
        # Not in forward: only a training step calls backward, and only after its loss proved finite.
        m, noted = len(y), c.mode.statistics
        if noted is not None and noted(c.index, m, c.work["mean"], c.work["var"]):
            return
        unbiased = m / (m - 1) if self.unbiased_running else 1.0
        c.ops.update_running(c.buffers["running_mean"], c.work["mean"], self.momentum, 1.0, c.work)
        c.ops.update_running(c.buffers["running_var"], c.work["var"], self.momentum, unbiased, c.work)

    def _forward_together(self, x: Array, y: Array, c: Context, together: Together) -> None:
        """With the mean and the variance of the rows of all ranks."""
        xp, n, mean, var, inverse = c.xp, *(c.work[name] for name in ("normalised", "mean", "var", "inverse"))
        mean[...] = together.sum(x.sum(axis=0, dtype=np.float64)) / together.rows
        xp.subtract(x, mean, out=n)
        xp.multiply(n, n, out=y)
        var[...] = together.sum(y.sum(axis=0, dtype=np.float64)) / together.rows
        inverse[...] = 1 / xp.sqrt(var + self.eps)
        n *= inverse
        xp.multiply(n, c.p["gamma"], out=y)
        y += c.p["beta"]

    def _backward_together(self, dy: Array, dx: Array | None, c: Context, together: Together) -> None:
        """As :meth:`backward`, with Σ dy and Σ dy n over the rows of all ranks.

        Here dy belongs to the mean over this rank's m rows, whose gradients are weighted by m in the end.
        """
        xp, n, gamma, m = c.xp, c.work["normalised"], c.p["gamma"], len(dy)
        c.ops.batch_norm_gradient(dy, gamma, c.g["gamma"], c.g["beta"], None, c.work)
        over_all = together.sum(xp.stack([c.g["beta"], c.g["gamma"]]).astype(np.float64).reshape(-1) * m)
        beta, slope = (over_all.reshape(2, -1) / (m * together.rows)).astype(gamma.dtype)
        if dx is not None:
            n *= slope
            xp.subtract(dy, beta, out=dx)
            dx -= n
            dx *= gamma * c.work["inverse"]


# --- dropout ---------------------------------------------------------------------------------------------------------


class Dropout(Layer):
    """In training 0 with probability ``rate`` and otherwise x/(1 - rate); in evaluation x (Srivastava et al. 2014).

    The mask depends on the network's seed, the layer's place, the training step and the element's place in the batch
    alone, the same on CPU and GPU: uniform float32 numbers of Philox4x64-10 with key (seed, layer) and counter (0,
    step, 0, 0).

    >>> net = gb.Network([gb.Dense(3, 4), gb.Dropout(0.5), gb.Dense(4, 2)])
    >>> net.scores(np.zeros((5, 3), np.float32)).shape
    (5, 2)
    """

    @suggesting
    def __init__(self, rate: float) -> None:
        self.rate = check_real("rate", rate, 0, 1, open_high=True)

    def takes(self) -> None:
        """Any number of features."""

    def needs(self, features: int) -> Needs:
        """As many outputs as inputs, and the mask."""
        full = (-1, features)
        return Needs(features, kept={"mask": (full, None)}, uses_in_training=("dropout",), reads=(), in_place=True)

    def forward(self, x: Array, y: Array, c: Context) -> None:
        """y = x mask; mask is 1/(1 - rate) where a uniform number is not below the rate, else 0."""
        if c.mode.training and self.rate > 0:
            first = c.mode.row * x.shape[1]
            c.ops.dropout(x, y, self.rate, (c.mode.seed, c.index), c.mode.step, first, c.work)
        elif y is not x:
            c.ops.activate(IDENTITY, x, None, y, c.work)

    def backward(self, x: Array, y: Array, dy: Array, dx: Array | None, c: Context) -> None:
        """dx = dy mask."""
        if dx is not None and self.rate > 0:
            c.ops.dropout_gradient(dy, dx, c.work)
        elif dx is not None and dx is not dy:
            c.ops.activation_gradient(IDENTITY, y, dy, dx, None, c.work)
