"""Optimizers: an update rule bound to parameters, in place, with schedules and a state that can be saved."""

from __future__ import annotations

import inspect
import math
import weakref
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, TypeAlias, TypedDict, Unpack

import numpy as np

from gpubatch import schedules
from gpubatch.backend import (
    Array,
    Backend,
    backend_of,
    compute_dtype,
    describe,
    find_overlap,
    float_dtype,
    from_dlpack,
    get_backend,
    is_cupy,
    is_foreign,
    is_immutable,
)
from gpubatch.errors import (
    ArgumentError,
    DeviceMismatchError,
    DTypeError,
    NonFiniteError,
    ShapeError,
    check_bool,
    check_choice,
    check_int,
    check_known,
    check_real,
)
from gpubatch.formula import Rule, rules
from gpubatch.ops import SQUARE_SUM_SIZE, CudaUpdate, ops_for, update_for
from gpubatch.own import as_written
from gpubatch.params import FlatViews, Parameters

__all__ = [
    "SGD",
    "Adagrad",
    "Adam",
    "AdamW",
    "HeavyBall",
    "Lion",
    "Momentum",
    "NAdam",
    "Optimizer",
    "RMSProp",
    "StepResult",
    "captured_key",
    "clip_by_global_norm",
    "enqueue_update",
    "rehearse_update",
    "scalars_ahead",
]

Hyper: TypeAlias = float | schedules.Schedule
MASTER = "master"  # the name of the float32 copy of float16 parameters, beside the formula's state

# The range of every hyper-parameter that gpubatch's own rules have: from low, included, to high, excluded.
RANGES: dict[str, tuple[float, float]] = {
    "lr": (0.0, math.inf),
    "beta": (0.0, 1.0),
    "beta1": (0.0, 1.0),
    "beta2": (0.0, 1.0),
    "mu": (0.0, 1.0),
    "rho": (0.0, 1.0),
    "momentum": (0.0, 1.0),
    "eps": (0.0, math.inf),
    "momentum_decay": (0.0, math.inf),
    "weight_decay": (0.0, math.inf),
}


class StepResult(NamedTuple):
    """What a step did: whether the update was ``applied``, the step count ``t`` and the learning rate ``lr`` used."""

    applied: bool
    t: int
    lr: float | None


class Gradients(NamedTuple):
    """Gradients on a GPU that passed the checks, and their names.

    Checking many small arrays takes longer than updating all of them.
    """

    names: list[str] | None
    arrays: list[weakref.ref[Array]]  # weak, so that no memory is kept

    @staticmethod
    def of(grads: Any, used: list[Array]) -> Gradients | None:
        """Remember ``grads`` if they are the arrays that were ``used``; otherwise None."""
        if type(grads) not in (dict, list, tuple):
            return None
        given = list(grads.values()) if isinstance(grads, dict) else list(grads)
        if {id(g) for g in given} != {id(g) for g in used}:
            return None
        return Gradients(list(grads) if isinstance(grads, dict) else None, [weakref.ref(g) for g in given])

    def same(self, grads: Any) -> bool:
        """Whether ``grads`` are these very arrays in the same order."""
        if type(grads) is dict:
            if self.names is None or list(grads) != self.names:
                return False
            grads = grads.values()
        elif self.names is not None or type(grads) not in (list, tuple):
            return False
        return len(grads) == len(self.arrays) and all(g is known() for g, known in zip(grads, self.arrays, strict=True))


@as_written
class Optimizer:
    """An update rule bound to parameters, which it changes in place.

    rule: a function declared with :func:`gpubatch.rule`.
    params: a :class:`Parameters`, or a mapping or sequence of arrays: NumPy, CuPy, or of any library that speaks DLPack
        and lets them be written; all float32, all float64 or all float16, on one device.
    weight_decay: λ, which adds λw to the gradient.
    decoupled: whether weight decay shrinks w by lr·λ before the update instead (Loshchilov & Hutter 2019).
    backend: the device where the parameters must be.
    master_weights: whether to keep a float32 copy of float16 parameters and update that, so that rounding does not lose
        small steps (Micikevicius et al., arXiv:1710.03740).
    hyper: the rule's hyper-parameters: numbers, or schedules, callables (step, epoch) -> float, both counted from 0.

    For float16 the arithmetic and the state are float32.
    """

    def __init__(
        self,
        rule: Rule,
        params: Any,
        *,
        weight_decay: Hyper = 0.0,
        decoupled: bool = False,
        backend: str | Backend | None = None,
        master_weights: bool = False,
        **hyper: Any,
    ) -> None:
        if not isinstance(rule, Rule):
            raise DTypeError(f"rule must be made with @gpubatch.rule, got {rule!r}")
        self.rule = rule
        self.t = 0
        self.epoch = 0
        self._checked = rule.name in rules.__all__ and getattr(rules, rule.name) is rule
        self._decoupled = check_bool("decoupled", decoupled)
        self._options = {**rule.options}
        self._hyper: dict[str, Hyper] = {}
        self._take(dict(hyper))
        self._hyper["weight_decay"] = self._value("weight_decay", weight_decay)
        if decoupled and "lr" not in rule.hyper:
            raise ArgumentError(f"decoupled must be False: {rule.name} has no hyper-parameter 'lr' to scale the decay")

        self._flat = params if isinstance(params, Parameters) else None
        self._params = dict(params) if isinstance(params, Parameters) else named_arrays(params, "params", writable=True)
        self.backend = backend_of(*self._params.values()) if self._flat is None else self._flat.backend
        if backend is not None and get_backend(backend) != self.backend:
            raise DeviceMismatchError(f"backend is {get_backend(backend).spec!r}, params are on {self.backend.spec!r}")
        if self._flat is None:
            _check_apart(self._params)
        self._dtype = self._common_dtype()
        shapes = {name: tuple(p.shape) for name, p in self._params.items()}
        size = sum(p.size for p in self._params.values())
        self._master = check_bool("master_weights", master_weights)
        if self._master and self._dtype != np.float16:
            raise ArgumentError(f"master_weights=True is for float16 parameters, these are {self._dtype}")
        kept, dtype = (*rule.state, *([MASTER] if self._master else [])), compute_dtype(self._dtype)
        self._state = {name: FlatViews(self.backend.zeros(size, dtype), shapes) for name in kept}
        if self._master:
            for name, p in self._params.items():
                self._state[MASTER][name] = p
        self._last: Gradients | None = None  # of many arrays on a GPU, in the step before
        self._bind()

    def step(self, grads: Any = None, control: Array | None = None) -> StepResult:
        """Update the parameters in place.

        grads: the gradients, given as ``params`` were, with their names, shapes, element type and device; by default
            ``params.grads``.
        control: two numbers in an array on their device, of the state's element type: ``control[0]`` scales the
            gradients; if ``control[1]`` is not 0 the update is skipped. A CPU does not count such a step, and
            ``applied`` is False. A GPU reads them when it gets there: nobody waits, and the step is counted.
        """
        hyper = {name: self._now(name) for name in self._trace.hyper}
        scalars = self._trace.evaluate(self.t + 1, **hyper)
        if control is not None:
            self._check_control(control)
        if isinstance(self._update, CudaUpdate) and self._last is not None and self._last.same(grads):
            self._update.again(scalars, control)
        else:
            self._first(grads, scalars, control)
        if control is not None and self.backend.name == "cpu" and control[1]:
            return StepResult(False, self.t, hyper.get("lr"))
        self.t += 1
        return StepResult(True, self.t, hyper.get("lr"))

    def _first(self, grads: Any, scalars: tuple[float, ...], control: Array | None) -> None:
        """The update by gradients that have not been looked at."""
        self._last = None
        arrays = self._arrays(grads)
        if not self._at_once(arrays, scalars, control):
            checked = [(w, self._gradient(i, g, w), *state) for i, (w, g, *state) in enumerate(arrays)]
            self._update(checked, scalars, control)
            if len(arrays) > 1 and isinstance(self._update, CudaUpdate):
                self._last = Gradients.of(grads, [g for _, g, *_ in checked])

    @property
    def lr(self) -> float:
        """The learning rate of the next step; assign a number or a schedule at any time."""
        if "lr" not in self._hyper:
            raise AttributeError(f"{self.rule.name} has no hyper-parameter 'lr'")
        return self._now("lr")

    @lr.setter
    def lr(self, value: Hyper) -> None:
        if "lr" not in self._hyper:
            raise AttributeError(f"{self.rule.name} has no hyper-parameter 'lr'")
        self._hyper["lr"] = self._value("lr", value)

    @property
    def hyper(self) -> dict[str, Any]:
        """The hyper-parameters as they were given: numbers, schedules, and the variant's options."""
        return {**self._hyper, "decoupled": self._decoupled, **self._options}

    @property
    def params(self) -> dict[str, Array]:
        """The arrays that are changed, by name."""
        return dict(self._params)

    @property
    def state(self) -> dict[str, FlatViews]:
        """The state arrays, by the names of the formula; views by the names of the parameters."""
        return dict(self._state)

    def memory(self) -> int:
        """Bytes of the optimizer's own arrays."""
        return sum(self.memory_parts().values())

    def memory_parts(self) -> dict[str, int]:
        """:meth:`memory` by the names of the state."""
        return {f"optimizer state {name}": int(views.flat.nbytes) for name, views in self._state.items()}

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs: {"rule", "t", "epoch", "hyper", "state"}; arrays are copies."""
        with self.backend.scope():
            state = {
                name: {parameter: view.copy() for parameter, view in views.items()}
                for name, views in self._state.items()
            }
        return {
            "rule": self.rule.name,
            "t": self.t,
            "epoch": self.epoch,
            "hyper": {name: _saved(value) for name, value in self.hyper.items()},
            "state": state,
        }

    def load_state_dict(self, d: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave, checked whole before anything changes.

        NumPy arrays are accepted on any backend. A callable that is not one of gpubatch's schedules is not in the
        dictionary: the optimizer keeps its own.
        """
        if missing := {"rule", "t", "epoch", "hyper", "state"} - set(d):
            raise ArgumentError(f"state_dict lacks {sorted(missing)}")
        if d["rule"] != self.rule.name:
            raise ArgumentError(f"state_dict is of the rule {d['rule']!r}, this optimizer's is {self.rule.name!r}")
        t, epoch = check_int("t", d["t"], 0), check_int("epoch", d["epoch"], 0)
        hyper = {name: self._loaded(name, value) for name, value in d["hyper"].items()}
        if set(hyper) != set(self.hyper):
            raise ArgumentError(f"hyper must have {sorted(self.hyper)}, got {sorted(hyper)}")
        for name, option in {**self._options, "decoupled": self._decoupled}.items():
            if hyper[name] != option:
                raise ArgumentError(f"state_dict has {name}={hyper[name]!r}, this optimizer has {name}={option!r}")
        arrays = self._loaded_state(d["state"])
        self.t, self.epoch = t, epoch
        self._hyper = {name: hyper[name] for name in self._hyper}
        for state, parameter, array in arrays:
            self._state[state][parameter] = array
        self._bind()

    def __reduce__(self) -> Any:
        raise DTypeError("an optimizer is bound to its arrays and cannot be copied or pickled; use state_dict()")

    def __repr__(self) -> str:
        hyper = ", ".join(f"{name}={value!r}" for name, value in self.hyper.items())
        return f"<{type(self).__name__} {self.rule.name}({hyper}), {len(self._params)} parameters, t={self.t}>"

    # --- inside ------------------------------------------------------------------------------------------------------

    def _take(self, given: dict[str, Any]) -> None:
        """Sort what was given into options and hyper-parameters; the rule's defaults fill the rest."""
        common = ["weight_decay", "decoupled", "backend", "master_weights"]
        check_known(self.rule.name, given, [*self.rule.hyper, *self.rule.options, *common])
        for name, value in given.items():
            if name not in self.rule.options:
                continue
            if type(value) is not type(self.rule.options[name]):
                raise DTypeError(f"{name} must be like {self.rule.options[name]!r}, got {value!r}")
            self._options[name] = value
        values = {**self.rule.defaults, **{k: v for k, v in given.items() if k not in self.rule.options}}
        for name in self.rule.hyper:
            if name not in values:
                raise ArgumentError(f"{self.rule.name} needs {name}, a number or a schedule; none was given")
            self._hyper[name] = self._value(name, values[name])

    def _value(self, name: str, value: Any) -> Hyper:
        if callable(value):
            check_schedule(name, value)
            schedule: schedules.Schedule = value
            return schedule
        # Of a user's rule only these two are known to mean what they mean here.
        known = self._checked or name in ("lr", "weight_decay")
        low, high = RANGES[name] if known and name in RANGES else (-math.inf, math.inf)
        return check_real(name, value, low, high, open_high=True)

    def _now(self, name: str) -> float:
        """The value of a hyper-parameter for the next step."""
        return self._at(name, self.t)

    def _at(self, name: str, t: int) -> float:
        """Its value for step ``t`` from 0, always a Python float: float32 stays float32."""
        value = self._hyper[name]
        if not callable(value):
            return value
        number = self._value(name, value(t, self.epoch))
        assert isinstance(number, float)
        return number

    def _common_dtype(self) -> np.dtype[Any]:
        first, *others = self._params
        for name in others:
            if self._params[name].dtype != self._params[first].dtype:
                raise DTypeError(
                    f"params must have one element type: {first!r} is {self._params[first].dtype}, "
                    f"{name!r} is {self._params[name].dtype}"
                )
        return float_dtype(self._params[first].dtype, f"params[{first!r}]", half=True)

    def _bind(self) -> None:
        """Record the formula with its options, and with weight decay where there is any."""
        decay = "" if self._hyper["weight_decay"] == 0.0 else "decoupled" if self._decoupled else "coupled"
        self._trace = self.rule.trace(decay, **self._options)
        self._update = update_for(self._trace, self._dtype, self.backend, self._master)
        self._at_once = getattr(self._update, "at_once", lambda arrays, scalars, control: False)
        self._flat_state = [views.flat for views in self._state.values()]
        self._last = None
        self._numbered = list(self._params) == [str(i) for i in range(len(self._params))]
        self._apart = [(p, [views[name] for views in self._state.values()]) for name, p in self._params.items()]

    def _arrays(self, grads: Any) -> list[tuple[Array, ...]]:
        """(w, g, state ...) tuples: one for a flat buffer, otherwise one for each parameter; g is yet unchecked."""
        if self._flat is not None:
            flat = self._flat_grads(grads, self._flat)
            if flat is not None:
                return [(self._flat.flat, flat, *self._flat_state)]
        if grads is None:
            raise ArgumentError("grads must be given: only gpubatch.Parameters has .grads, separate arrays have none")
        # The common case without a dictionary: many small arrays are a matter of microseconds.
        plain = isinstance(grads, (list, tuple)) and len(grads) == len(self._apart) and self._numbered
        if not plain or not all(type(g) is np.ndarray for g in grads):
            found = named_arrays(grads, "grads")
            if found.keys() != self._params.keys():
                raise ArgumentError(f"grads must be for {', '.join(self._params)}; got {', '.join(found)}")
            grads = [found[name] for name in self._params]
        return [(p, g, *state) for (p, state), g in zip(self._apart, grads, strict=True)]

    @staticmethod
    def _flat_grads(grads: Any, params: Parameters) -> Array | None:
        """The gradients as one buffer laid out as the parameters, if that is what they are."""
        if grads is None:
            return params.grads.flat
        if isinstance(grads, FlatViews):
            same = grads is params.grads or (grads.spans == params.spans and grads.shapes == params.shapes)
            return grads.flat if same else None
        return grads if getattr(grads, "shape", None) == params.flat.shape else None

    def _gradient(self, i: int, g: Any, p: Array) -> Array:
        """Gradient i, checked; a copy where it is the parameter itself, as the gradient of w²/2 may be."""
        if self.backend.owns(g) and g.shape == p.shape and g.dtype == p.dtype:
            shared = g is p or (isinstance(g, np.ndarray) and np.may_share_memory(g, p))
            return g.copy() if shared else g
        label = "grads" if self._flat is not None and p is self._flat.flat else f"grads[{list(self._params)[i]!r}]"
        self.backend.check(label, g)
        if g.shape != p.shape:
            raise ShapeError(f"{label} has shape {g.shape}, the parameter has {p.shape}")
        raise DTypeError(f"{label} is {g.dtype}, the parameter is {p.dtype}; convert it with astype")

    def _check_control(self, control: Any) -> None:
        self.backend.check("control", control)
        dtype = compute_dtype(self._dtype)
        if control.shape != (2,) or control.dtype != dtype:
            raise ShapeError(f"control must be two numbers of {dtype}, got {describe(control)}")

    def _loaded(self, name: str, value: Any) -> Any:
        if isinstance(value, Mapping) and "schedule" in value:
            return schedules.from_dict(value)
        if isinstance(value, Mapping):
            if not callable(self._hyper.get(name)):
                raise ArgumentError(f"{name} was the callable {value.get('callable')!r}; give this optimizer one too")
            return self._hyper[name]
        return value if name in (*self._options, "decoupled") else self._value(name, value)

    def _loaded_state(self, state: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str, Array]]:
        if set(state) != set(self._state):
            raise ArgumentError(f"state must have {sorted(self._state)}, got {sorted(state)}")
        arrays = []
        for name, views in self._state.items():
            if set(state[name]) != set(views):
                raise ArgumentError(f"state[{name!r}] must be for {sorted(views)}, got {sorted(state[name])}")
            for parameter, view in views.items():
                array = self.backend.asarray(state[name][parameter])
                if array.shape != view.shape:
                    raise ShapeError(f"state[{name!r}][{parameter!r}] has shape {array.shape}, expected {view.shape}")
                if array.dtype != view.dtype:
                    raise DTypeError(f"state[{name!r}][{parameter!r}] is {array.dtype}, expected {view.dtype}")
                arrays.append((name, parameter, array))
        return arrays


def check_schedule(name: str, schedule: Any) -> None:
    """A schedule must take a step and an epoch."""
    try:
        signature = inspect.signature(schedule)
    except (TypeError, ValueError):
        return  # some built-in functions have none
    try:
        signature.bind(0, 0)
    except TypeError as error:
        raise DTypeError(f"{name} must be a number or a schedule, called as schedule(step, epoch): {error}") from None


def _saved(value: Any) -> Any:
    """A hyper-parameter for a state_dict: a schedule as a dictionary, another callable by its name alone."""
    if not callable(value):
        return value
    if type(value) in schedules.KINDS.values():
        return schedules.to_dict(value)
    return {"callable": getattr(value, "__qualname__", type(value).__qualname__)}


# --- the optimizers, in the order of rules.py ----------------------------------------------------------------------


class Common(TypedDict, total=False):
    """What every optimizer takes, by name: see :class:`Optimizer`."""

    weight_decay: Hyper
    decoupled: bool
    backend: str | Backend | None
    master_weights: bool


class SGD(Optimizer):
    """Gradient descent: w -= lr*g."""

    def __init__(self, params: Any, lr: Hyper, **common: Unpack[Common]) -> None:
        Optimizer.__init__(self, rules.sgd, params, lr=lr, **common)


class Momentum(Optimizer):
    """Moving-average momentum: v = beta*v + (1-beta)*g; w -= lr*v.

    It equals PyTorch's momentum at the learning rate lr*(1-beta). ``bias_correction`` divides v by 1 - beta**t.
    """

    def __init__(
        self, params: Any, lr: Hyper, beta: Hyper = 0.9, bias_correction: bool = False, **common: Unpack[Common]
    ) -> None:
        Optimizer.__init__(self, rules.momentum, params, lr=lr, beta=beta, bias_correction=bias_correction, **common)


class HeavyBall(Optimizer):
    """Classical momentum: v = mu*v + g; w -= lr*v, as in PyTorch.

    With ``lr_in_velocity``, v = mu*v - lr*g; w += v, as in Keras, CS231n and scikit-learn: the same while lr stays,
    another path when it changes. ``nesterov`` looks ahead: w -= lr*(g + mu*v), or w += mu*v - lr*g.
    """

    def __init__(
        self,
        params: Any,
        lr: Hyper,
        mu: Hyper = 0.9,
        nesterov: bool = False,
        lr_in_velocity: bool = False,
        **common: Unpack[Common],
    ) -> None:
        inside = check_bool("lr_in_velocity", lr_in_velocity)
        rule = rules.heavy_ball_lr_in_velocity if inside else rules.heavy_ball
        Optimizer.__init__(self, rule, params, lr=lr, mu=mu, nesterov=nesterov, **common)


class Adagrad(Optimizer):
    """Adagrad: s += g*g; w -= lr*g/(sqrt(s) + eps) (PyTorch), or lr*g/sqrt(s + eps) with ``eps_at="inside"`` (Keras).

    ``initial_accumulator`` is what s starts from.
    """

    def __init__(
        self,
        params: Any,
        lr: Hyper = 1e-2,
        eps: Hyper = 1e-10,
        eps_at: str = "outside",
        initial_accumulator: float = 0.0,
        **common: Unpack[Common],
    ) -> None:
        check_choice("eps_at", eps_at, ["outside", "inside"])
        start = check_real("initial_accumulator", initial_accumulator, 0.0)
        Optimizer.__init__(self, rules.adagrad, params, lr=lr, eps=eps, eps_at=eps_at, **common)
        self._state["s"].flat.fill(start)


class RMSProp(Optimizer):
    """RMSProp: s = rho*s + (1-rho)*g*g; w -= lr*g/(sqrt(s) + eps).

    ``eps_at`` is "outside" (PyTorch, CS231n, Chainer) or "inside", sqrt(s + eps) (Keras, optax, the course notes).
    ``centered`` divides by the standard deviation instead; ``momentum`` is heavy-ball momentum on the scaled gradient
    (PyTorch). PyTorch's defaults are lr 1e-2 and rho 0.99.
    """

    def __init__(
        self,
        params: Any,
        lr: Hyper = 1e-3,
        rho: Hyper = 0.9,
        eps: Hyper = 1e-8,
        eps_at: str = "outside",
        centered: bool = False,
        momentum: Hyper = 0.0,
        **common: Unpack[Common],
    ) -> None:
        check_choice("eps_at", eps_at, ["outside", "inside"])
        if callable(momentum) or momentum != 0.0:
            rule = rules.rmsprop_centered_momentum if check_bool("centered", centered) else rules.rmsprop_momentum
            Optimizer.__init__(self, rule, params, lr=lr, rho=rho, eps=eps, eps_at=eps_at, momentum=momentum, **common)
        else:
            rule = rules.rmsprop_centered if check_bool("centered", centered) else rules.rmsprop
            Optimizer.__init__(self, rule, params, lr=lr, rho=rho, eps=eps, eps_at=eps_at, **common)


class Adam(Optimizer):
    """Adam (Kingma & Ba 2015): bias-corrected averages of g and g*g; w -= lr * m_hat / (sqrt(v_hat) + eps).

    ``eps_at`` is "outside" (the paper's algorithm 1, PyTorch, optax), "inside", sqrt(v_hat + eps) (the course notes),
    or "hat", eps before the bias correction (Keras with eps 1e-7, scikit-learn, Chainer). ``amsgrad`` never lets the
    second moment fall (Reddi et al. 2018; the maximum over the raw moment).
    """

    def __init__(
        self,
        params: Any,
        lr: Hyper = 1e-3,
        beta1: Hyper = 0.9,
        beta2: Hyper = 0.999,
        eps: Hyper = 1e-8,
        eps_at: str = "outside",
        amsgrad: bool = False,
        **common: Unpack[Common],
    ) -> None:
        check_choice("eps_at", eps_at, ["outside", "inside", "hat"])
        rule = rules.amsgrad if check_bool("amsgrad", amsgrad) else rules.adam
        Optimizer.__init__(self, rule, params, lr=lr, beta1=beta1, beta2=beta2, eps=eps, eps_at=eps_at, **common)


class AdamW(Optimizer):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019): w *= 1 - lr*weight_decay before Adam's update."""

    def __init__(
        self,
        params: Any,
        lr: Hyper = 1e-3,
        beta1: Hyper = 0.9,
        beta2: Hyper = 0.999,
        eps: Hyper = 1e-8,
        eps_at: str = "outside",
        amsgrad: bool = False,
        weight_decay: Hyper = 1e-2,
        decoupled: bool = True,
        backend: str | Backend | None = None,
        master_weights: bool = False,
    ) -> None:
        common = Common(weight_decay=weight_decay, decoupled=decoupled, backend=backend, master_weights=master_weights)
        Adam.__init__(self, params, lr, beta1, beta2, eps, eps_at, amsgrad, **common)  # type: ignore[arg-type]


class NAdam(Optimizer):
    """Adam with Nesterov momentum (Dozat 2016): the step already uses the momentum of the next one.

    beta1 is constant (optax), or with ``momentum_decay`` follows Dozat's schedule: 4e-3 is PyTorch's value, 1 Keras'
    (which also has eps = 1e-7).
    """

    def __init__(
        self,
        params: Any,
        lr: Hyper = 1e-3,
        beta1: Hyper = 0.9,
        beta2: Hyper = 0.999,
        eps: Hyper = 1e-8,
        momentum_decay: float | None = None,
        **common: Unpack[Common],
    ) -> None:
        if momentum_decay is None:
            Optimizer.__init__(self, rules.nadam, params, lr=lr, beta1=beta1, beta2=beta2, eps=eps, **common)
        else:
            hyper = {"lr": lr, "beta1": beta1, "beta2": beta2, "eps": eps, "momentum_decay": momentum_decay}
            Optimizer.__init__(self, rules.nadam_scheduled, params, **hyper, **common)


class Lion(Optimizer):
    """Lion (Chen et al. 2023): the sign of an interpolated momentum; the paper's weight decay is ``decoupled=True``."""

    def __init__(
        self, params: Any, lr: Hyper = 1e-4, beta1: Hyper = 0.9, beta2: Hyper = 0.99, **common: Unpack[Common]
    ) -> None:
        Optimizer.__init__(self, rules.lion, params, lr=lr, beta1=beta1, beta2=beta2, **common)


# --- for the rooms that rehearse, capture and replay steps -----------------------------------------------------------


def rehearse_update(opt: Optimizer, grads: Any = None) -> None:
    """Do all that a step needs, without a step: compile its code, and take the memory of the state.

    grads: as for :meth:`Optimizer.step`; their values do not matter.
    """
    control, t = opt.backend.zeros(2, compute_dtype(opt._dtype)), opt.t
    with opt.backend.scope():
        control.fill(1)  # the second one leaves the step out
        for views in opt._state.values():
            views.flat *= 1  # zeros are given by the system only when they are first written to
    opt.step(grads, control)
    opt.t = t


def scalars_ahead(opt: Optimizer, start: int, count: int, least: int = 1) -> tuple[np.ndarray, list[float | None]]:
    """The formula's scalars for each of ``count`` steps from ``start`` on, in rows, and the learning rates.

    They are what :meth:`Optimizer.step` would compute while hyper-parameters and ``epoch`` stay. If a schedule raises,
    stop there, because the run may end first; raise only if fewer than ``least`` rows were made.
    """
    fixed = {name: opt._at(name, start) for name in opt._trace.hyper if not callable(opt._hyper[name])}
    moving = [name for name in opt._trace.hyper if name not in fixed]
    rows, rates = list[tuple[float, ...]](), list[float | None]()
    for t in range(start, start + count):
        try:
            hyper = fixed | {name: opt._at(name, t) for name in moving} if moving else fixed
            rows.append(opt._trace.evaluate(t + 1, **hyper))
        except Exception:
            if len(rows) < least:
                raise
            break
        rates.append(hyper.get("lr"))
    scalars = np.zeros((len(rows), max(1, len(opt._trace.scalars))), compute_dtype(opt._dtype))
    if rows and opt._trace.scalars:
        scalars[...] = rows
    return scalars, rates


def enqueue_update(
    opt: Optimizer, scalars: Array, control: Array | None, progress: Array, running: tuple[Array, Array] | None
) -> Any:
    """Launch what :meth:`Optimizer.step` launches on a GPU for ``params.grads``, so that it can be captured.

    ``t`` stays. Returns what is to be kept as long as the graph.

    scalars: rows of :func:`scalars_ahead`, on the device.
    control, progress, running: as :meth:`CudaUpdate.launch` has them.
    """
    assert isinstance(opt._update, CudaUpdate)
    with opt.backend.scope():
        return opt._update.launch(opt._arrays(None), scalars, control, progress, running)


def captured_key(opt: Optimizer) -> tuple[Any, ...]:
    """What :func:`scalars_ahead` and :func:`enqueue_update` depend on: while it is the same, so are they.

    The update, which graphs launch, comes first.
    """
    return opt._update, opt.t, opt.epoch, *opt._hyper.values()


# --- arrays that the user gave -------------------------------------------------------------------------------------


def named_arrays(arrays: Any, argument: str, *, writable: bool = False) -> dict[str, Array]:
    """``arrays`` by name: a mapping as it is, a sequence by "0", "1", ..., one array as "0"."""
    if isinstance(arrays, Mapping):
        given = dict(arrays)
    elif hasattr(arrays, "shape"):
        given = {"0": arrays}
    elif isinstance(arrays, Iterable) and not isinstance(arrays, (str, bytes)):
        given = {str(i): array for i, array in enumerate(arrays)}
    else:
        hint = "; give its .parameters" if argument == "params" and hasattr(arrays, "parameters") else ""
        raise DTypeError(
            f"{argument} must be Parameters, or a mapping or sequence of arrays, got {describe(arrays)}{hint}"
        )
    if not given:
        raise ArgumentError(f"{argument} must hold at least one array, got none")
    found: dict[str, Array] = {}
    for name, array in given.items():
        label = f"{argument}[{name!r}]"
        if not isinstance(name, str):
            raise DTypeError(f"the names in {argument} must be strings, got {name!r}")
        frozen = is_immutable(array)
        if is_foreign(array):
            # PyTorch exports no tensor that requires a gradient; its memory is what an optimizer updates.
            array = from_dlpack(array.detach() if getattr(array, "requires_grad", False) else array)
        elif not isinstance(array, np.ndarray) and not is_cupy(array):
            raise DTypeError(f"{label} must be a NumPy or CuPy array, or speak DLPack, got {describe(array)}")
        if writable and (frozen or not getattr(array.flags, "writeable", True)):
            raise ArgumentError(f"{label} is read-only: an optimizer changes it in place, give it a writable array")
        found[name] = array
    if writable and len({id(array) for array in given.values()}) < len(given):
        raise ArgumentError(f"{argument} has the same array twice: it would be updated twice in a step")
    return found


def _check_apart(params: Mapping[str, Array]) -> None:
    """Raise if parameters share memory."""
    if (pair := find_overlap(list(params.values()))) is not None:
        first, second = (f"params[{list(params)[i]!r}]" for i in pair)
        shared = f"elements of {first}" if first == second else f"{first} and {second}"
        raise ArgumentError(f"{shared} share memory, which would be updated twice in a step; give each its own")


def clip_by_global_norm(grads: Any, max_norm: float) -> float:
    """Scale ``grads`` in place so that the norm over all of them is at most ``max_norm``; returns the norm before.

    Pascanu, Mikolov & Bengio 2013, algorithm 1. ``grads`` is ``params.grads``, a mapping, a sequence or an array. A
    norm that is not finite raises :class:`NonFiniteError` and leaves them as they were.
    """
    limit = check_real("max_norm", max_norm, 0.0, open_low=True)
    arrays = (
        [grads.flat] if isinstance(grads, FlatViews) else list(named_arrays(grads, "grads", writable=True).values())
    )
    backend = backend_of(*arrays)
    with backend.scope():
        sums = backend.zeros(SQUARE_SUM_SIZE, np.float64)
        for a in arrays:
            ops_for(backend, a.dtype).square_sum(a if a.flags.c_contiguous else a.astype(a.dtype, order="C"), sums)
        norm = math.sqrt(float(sums[0]))
        if not math.isfinite(norm):
            raise NonFiniteError(f"the global norm of grads is {norm}: a gradient is NaN or infinite")
        if norm > limit:
            for a in arrays:
                a *= limit / norm
    return norm
