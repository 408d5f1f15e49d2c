"""The network of an estimator in memory, and its optimizer: what training and prediction run on.

An estimator keeps NumPy arrays and is pickled; a :class:`Machine` is made of them when it is needed.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from gpubatch import optim
from gpubatch.backend import Array, get_backend
from gpubatch.errors import ArgumentError, DTypeError, NonFiniteError, ShapeError, check_choice
from gpubatch.formula import Activation, BoundActivation, Rule
from gpubatch.nn import ACTIVATIONS, BatchNorm, Dense, Dropout, Elementwise, Layer, Network, core_of, evenly
from gpubatch.optim import Optimizer
from gpubatch.params import Parameters
from gpubatch.train import LossScale

LARGEST = float(np.finfo(np.float16).max)
PREDICTED = 1 << 14  # rows that are moved to a device, or made dense, at a time

# scikit-learn's names of activations.
SKLEARN_ACTIVATIONS = {"identity": None, "logistic": "sigmoid", "tanh": "tanh", "relu": "relu"}
LOSS_OF = {
    "softmax": "softmax_cross_entropy",
    "logistic": "sigmoid_cross_entropy",
    "identity": "mse",
    "exp": "poisson",
}
# The update rules by name, without regard to case.
RULES: dict[str, type[Optimizer]] = {
    name.lower(): kind
    for name, kind in vars(optim).items()
    if isinstance(kind, type) and issubclass(kind, Optimizer) and kind is not Optimizer
}


class Description(NamedTuple):
    """What decides a network but for its parameters."""

    sizes: tuple[int, ...]
    activation: str | Activation | BoundActivation
    output: str
    batch_norm: bool
    dropout: float
    regularised: bool
    backend: str
    dtype: str
    precision: str


class Machine:
    """A network on a device; ``coefs``, ``intercepts`` and ``norms`` are its parameters as an estimator has them.

    On a CPU they are views of the network's memory, so what is changed in them is changed in the network; of a GPU, and
    of float16, they are copies that cannot be written.
    """

    def __init__(self, about: Description, seed: int = 0) -> None:
        self.about, self.mixed = about, about.precision == "mixed"
        layers: list[Layer] = []
        for i, (inputs, outputs) in enumerate(itertools.pairwise(about.sizes)):
            hidden = i < len(about.sizes) - 2
            layers.append(Dense(inputs, outputs, bias=not (hidden and about.batch_norm), init="zeros"))
            if hidden:
                layers += [BatchNorm(outputs)] if about.batch_norm else []
                layers += activation_layers(about.activation)
                layers += [Dropout(about.dropout)] if about.dropout else []
        # The network's own steps have the l2 term, with a weight that is set for every batch.
        where, loss = get_backend(about.backend), LOSS_OF[about.output]
        self.own_steps = where.name != "cpu" or self.mixed
        l2 = float(about.regularised and self.own_steps)
        self.net = Network(layers, loss, l2, where, about.dtype, seed, about.precision)
        self.backend, self.core = self.net.backend, core_of(self.net)
        self.weight_names = [f"W{i + 1}" for i in range(len(about.sizes) - 1)]
        outputs = about.sizes[-1]
        # scikit-learn's loss is a sum over outputs, gpubatch's a mean; its squared error is a half of the square, and a
        # mean in what it reports.
        self.factor = {"softmax": 1.0, "logistic": outputs, "identity": outputs / 2, "exp": outputs}[about.output]
        self.reported = 0.5 if about.output == "identity" else self.factor
        if self.factor != 1:
            self.core.scale_gradients(self.factor)
        self._shown: dict[str, list[Any]] | None = None

    # --- parameters ---

    def parameters(self) -> dict[str, list[Any]]:
        """The parameters by the estimator's names; arrays of the same machine, until its parameters change."""
        hidden = len(self.about.sizes) - 2
        own = functools.partial(self._show, self.net.parameters)
        self._shown = {
            "coefs_": [own(name) for name in self.weight_names],
            "intercepts_": [own(self._intercept(i)) for i in range(hidden + 1)],
            "batch_norm_": [
                {
                    "scale": own(f"gamma{i + 1}"),
                    "mean": self._show(self.net.buffers, f"running_mean{i + 1}"),
                    "var": self._show(self.net.buffers, f"running_var{i + 1}"),
                }
                for i in range(hidden if self.about.batch_norm else 0)
            ],
        }
        return {name: list(arrays) for name, arrays in self._shown.items()}

    def has(self, coefs: Sequence[Any], intercepts: Sequence[Any], norms: Sequence[Mapping[str, Any]]) -> bool:
        """Whether these are the arrays that :meth:`parameters` gave."""
        shown = self._shown
        return shown is not None and all(
            len(given) == len(own) and all(a is b for a, b in zip(given, own, strict=True))
            for given, own in zip((coefs, intercepts, norms), shown.values(), strict=True)
        )

    def remember(self) -> tuple[Array, Array]:
        """A copy on the device of all that training changes."""
        with self.backend.scope():
            return self.net.parameters.flat.copy(), self.net.buffers.flat.copy()

    def recall(self, remembered: tuple[Array, Array]) -> None:
        """Go back to what :meth:`remember` gave."""
        with self.backend.scope():
            self.net.parameters.flat[...], self.net.buffers.flat[...] = remembered

    def copies(self) -> dict[str, list[Any]]:
        """The parameters as :meth:`parameters` names them, copied."""
        return copy.deepcopy(self.parameters())

    def _intercept(self, i: int) -> str:
        """The parameter that is the intercept of layer i: after a normalisation, that of the normalisation."""
        hidden = i < len(self.about.sizes) - 2
        return f"beta{i + 1}" if self.about.batch_norm and hidden else f"b{i + 1}"

    def _show(self, views: Mapping[str, Array], name: str) -> Any:
        if not self.own_steps:
            return views[name]
        found = self.backend.to_numpy(views[name]).astype(self.about.dtype)
        found.flags.writeable = False
        return found

    def load(self, given: Mapping[str, Sequence[Any]]) -> None:
        """Take over parameters as :meth:`parameters` names them."""
        for i, (W, b) in enumerate(zip(given["coefs_"], given["intercepts_"], strict=True)):
            self._set(self.net.parameters, self.weight_names[i], W, f"coefs_[{i}]")
            self._set(self.net.parameters, self._intercept(i), b, f"intercepts_[{i}]")
        for i, norm in enumerate(given["batch_norm_"]):
            self._set(self.net.parameters, f"gamma{i + 1}", norm["scale"], f"batch_norm_[{i}]['scale']")
            for name in ("mean", "var"):
                self._set(self.net.buffers, f"running_{name}{i + 1}", norm[name], f"batch_norm_[{i}][{name!r}]")

    def _set(self, views: Any, name: str, values: Any, label: str) -> None:
        values = np.asarray(values)
        if values.shape != views[name].shape:
            raise ShapeError(f"{label} must have shape {views[name].shape}, got {values.shape}")
        views[name] = self.backend.asarray(values, views[name].dtype)

    # --- prediction ---

    def scores(self, X: Any) -> np.ndarray:
        """The outputs of the last layer, ``(samples, outputs)``, in main memory; X may be sparse."""
        if isinstance(X, np.ndarray) and self.backend.name == "cpu" and not self.mixed:
            found: np.ndarray = self.net.scores(np.ascontiguousarray(X, self.net.dtype))
            return found
        parts = []
        for part in evenly(X.shape[0], PREDICTED):
            parts.append(self.backend.to_numpy(self.net.scores(self.rows(X[part]))))
        return np.concatenate(parts)

    def rows(self, X: Any) -> Array:
        """Rows, perhaps sparse, as the network takes them."""
        dense = X if isinstance(X, np.ndarray) else X.toarray()
        if self.mixed and (largest := float(np.abs(dense).max(initial=0.0))) > LARGEST:
            raise NonFiniteError(
                f"X must have numbers up to {LARGEST:g} with precision='mixed', which stores them as float16, got "
                f"{largest:g}: scale them first, as by StandardScaler"
            )
        with np.errstate(over="ignore"):
            return self.backend.asarray(np.ascontiguousarray(dense, self.net.dtype))

    def probabilities(self, scores: np.ndarray) -> np.ndarray:
        """What scores say of each class, ``(samples, outputs)``."""
        found: np.ndarray = self.net.loss_function.probabilities(scores).reshape(scores.shape)
        return found


def activation_layers(activation: str | Activation | BoundActivation) -> list[Layer]:
    """The layer of an activation; none for the identity."""
    if not isinstance(activation, str):
        return [Elementwise(activation)]
    name = SKLEARN_ACTIVATIONS.get(activation, activation)
    return [] if name is None else [ACTIVATIONS[name]()]


def check_activation(activation: Any) -> None:
    """Raise unless ``activation`` is a name, scikit-learn's or gpubatch's, or a function made with gb.activation."""
    if isinstance(activation, (Activation, BoundActivation)):
        Elementwise(activation)
        return
    check_choice("activation", activation, dict.fromkeys([*SKLEARN_ACTIVATIONS, *ACTIVATIONS]))


# --- the optimizer ---------------------------------------------------------------------------------------------------

Make = Callable[[Parameters], Optimizer]


def maker_of(
    optimizer: Any, solver: str, lr: float, momentum: float, nesterov: bool, adam: Mapping[str, Any], mixed: bool
) -> Make:
    """What makes the optimizer of a network's parameters: that of ``solver``, or of what the user gave.

    optimizer: None, the name of a rule, a rule, or what makes an optimizer of parameters, such as its class or
        ``functools.partial(gb.AdamW, weight_decay=0.1)``; without a learning rate of its own it gets ``lr``
    adam: the hyper-parameters of solver "adam"
    mixed: whether it keeps float32 copies of parameters that are float16
    """
    make: Any = _maker_of(optimizer, solver, lr, momentum, nesterov, adam)
    kind = make.func if isinstance(make, functools.partial) else make
    known = mixed and isinstance(kind, type) and issubclass(kind, Optimizer)
    return functools.partial(make, master_weights=True) if known else make


def _maker_of(optimizer: Any, solver: str, lr: float, momentum: float, nesterov: bool, adam: Mapping[str, Any]) -> Make:
    """See :func:`maker_of`."""
    if optimizer is None and solver == "sgd":
        return functools.partial(optim.HeavyBall, lr=lr, mu=momentum, nesterov=nesterov, lr_in_velocity=True)
    if optimizer is None:
        return functools.partial(optim.Adam, lr=lr, eps_at="hat", **adam)
    if isinstance(optimizer, str):
        return functools.partial(RULES[check_choice("optimizer", optimizer.lower(), RULES)], lr=lr)
    if isinstance(optimizer, Rule):
        of_rule = functools.partial(Optimizer, optimizer)
        return functools.partial(of_rule, lr=lr) if "lr" in optimizer.hyper else of_rule
    if isinstance(optimizer, Optimizer) or not callable(optimizer):
        raise DTypeError(
            f"optimizer must be the name of a rule, a rule, or what makes an optimizer of parameters, such as gb.AdamW "
            f"or functools.partial(gb.AdamW, weight_decay=0.1); got {optimizer!r}"
        )
    if isinstance(optimizer, functools.partial) and ("lr" in optimizer.keywords or len(optimizer.args)):
        return optimizer
    kind = optimizer.func if isinstance(optimizer, functools.partial) else optimizer
    known = isinstance(kind, type) and issubclass(kind, Optimizer)
    return functools.partial(optimizer, lr=lr) if known else optimizer


class KeptOptimizer:
    """The optimizer of an estimator: bound to a machine's parameters, and pickled by its state.

    scale: of the loss, where gradients are of float16
    """

    def __init__(self, make: Make, scale: LossScale | None) -> None:
        self._make, self.scale = make, scale
        self._opt: Optimizer | None = None
        self._saved: dict[str, Any] | None = None

    def bind(self, parameters: Parameters) -> Optimizer:
        """The optimizer of ``parameters``, with the state that it had with others before."""
        if self._opt is None or self._opt.params != dict(parameters):
            state = self._state()
            opt = self._make(parameters)
            if not isinstance(opt, Optimizer):
                raise DTypeError(f"optimizer must make a gpubatch.Optimizer, it made a {type(opt).__name__}")
            if state is not None:
                opt.load_state_dict(state)
            self._opt, self._saved = opt, None
        return self._opt

    @property
    def learning_rate(self) -> float:
        """That of the next step."""
        if self._opt is not None:
            return self._opt.lr
        if self._saved is None:
            raise ArgumentError("the optimizer has no learning rate before the first step")
        return float(self._saved["hyper"]["lr"])

    def _state(self) -> dict[str, Any] | None:
        """The state in main memory; None before the first step."""
        if self._opt is None:
            return self._saved
        opt, state = self._opt, self._opt.state_dict()
        arrays = {
            name: {parameter: opt.backend.to_numpy(array) for parameter, array in views.items()}
            for name, views in state["state"].items()
        }
        return {**state, "state": arrays}

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_opt": None, "_saved": self._state()}
