"""For PyTorch: every rule of gpubatch, and rules of your own, as a ``torch.optim.Optimizer``; and states of networks.

``gpubatch.torch.RMSProp(model.parameters(), lr=1e-3)`` takes the place of an optimizer of ``torch.optim``: parameters,
gradients and state are PyTorch's tensors, and the fused update works in their memory. Learning-rate schedulers,
parameter groups, closures, hooks, ``GradScaler`` and ``state_dict`` work as PyTorch has them. Names, defaults and
formulas are gpubatch's; docs/from-pytorch.md has both side by side. :func:`to_state_dict` and
:func:`from_state_dict` move the parameters of a network.
"""

from __future__ import annotations

import contextlib
import ctypes
import difflib
import functools
import inspect
import itertools
import operator
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np

try:
    import torch
    from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks
except ImportError as error:
    raise ImportError(f"gpubatch.torch needs PyTorch, which cannot be imported ({error}): pip install torch") from error

from gpubatch import optim
from gpubatch.backend import Array, Backend, CudaBackend, compute_dtype, find_overlap, get_backend
from gpubatch.errors import (
    ArgumentError,
    CaptureError,
    DeviceMismatchError,
    DTypeError,
    ShapeError,
    UnknownArgumentError,
    check_bool,
    check_known,
)
from gpubatch.formula import Rule
from gpubatch.nn import BatchNorm, Dense, Layer, Network, core_of
from gpubatch.ops import host_library, update_for

Tensor: TypeAlias = Any  # torch.Tensor; a type checker need not have PyTorch

# What every class takes beside the arguments of its rule.
COMMON: dict[str, Any] = {"weight_decay": 0.0, "decoupled": False, "master_weights": False, "maximize": False}
DTYPES: dict[Any, np.dtype[Any]] = {getattr(torch, name): np.dtype(name) for name in ("float32", "float64", "float16")}
# DLPack's C functions of tensors, if PyTorch has them: a view takes a sixth of the time of Tensor.numpy.
EXCHANGE = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
LINE = 64  # bytes of a line of the cache
OF_SCHEDULERS = "initial", "max", "min", "base", "swa"  # before the name of an argument: what schedulers write
HOOKS = _global_optimizer_pre_hooks, _global_optimizer_post_hooks  # of all optimizers' steps
STEP = "step"  # the name of the count beside the formula's state

# What arguments of torch.optim are called here; those with None are not needed.
ELSEWHERE = {
    "betas": "beta1= and beta2=",
    "alpha": "rho=",
    "momentum": "the class HeavyBall(params, lr, mu=...)",
    "dampening": "the class HeavyBall(params, lr, mu=..., dampening=...)",
    "nesterov": "the class HeavyBall(params, lr, mu=..., nesterov=True)",
    "initial_accumulator_value": "initial_accumulator=",
    "decoupled_weight_decay": "decoupled=",
    "lr_decay": "torch.optim.lr_scheduler.LambdaLR(opt, lambda t: 1 / (1 + t * lr_decay))",
    "foreach": None,
    "fused": None,
    "capturable": None,
    "differentiable": None,
}


class Optimizer(torch.optim.Optimizer):
    """An update rule of your own as an optimizer for PyTorch.

    params: ``model.parameters()``, ``model.named_parameters()``, or dictionaries, one for each group: ``"params"``, and
        the arguments that differ in that group. Tensors of float32, float64 or float16, on the CPU or on CUDA devices.
    rule: a function declared with :func:`gpubatch.rule`.
    weight_decay: λ, which adds λw to the gradient.
    decoupled: whether weight decay shrinks w by lr·λ before the update instead.
    master_weights: whether to keep a float32 copy of float16 parameters and update that.
    maximize: whether to go uphill.
    hyper: the rule's hyper-parameters and options; numbers, since ``torch.optim.lr_scheduler`` has the schedules.

    ``param_groups`` has all arguments by name, to be read and assigned. ``state[p]`` has ``step``, the number of
    updates of p, and the state by the names of the formula. A parameter without a gradient keeps both.
    """

    _known: tuple[list[int], list[Any]] | None
    _variants: list[Variant | None]
    _lanes: list[Lane]
    _engines: dict[Any, Engine]
    _repeat: Repeat | None

    def __init__(self, params: Any, rule: Rule, **hyper: Any) -> None:
        if not isinstance(rule, Rule):
            raise DTypeError(f"rule must be made with @gpubatch.rule, got {rule!r}")
        check_names(rule.name, hyper, [*rule.hyper, *rule.options, *COMMON])
        if missing := [name for name in rule.required if name not in hyper]:
            raise ArgumentError(f"{rule.name} needs {', '.join(missing)}; none was given")
        if STEP in rule.state:
            raise ArgumentError(f"{rule.name} has a state {STEP!r}, the name of PyTorch's count of steps; rename it")
        rule.renew()
        init = functools.partial(optim.Optimizer.__init__, rule=rule)
        start(self, params, init, {**rule.defaults, **rule.options, **hyper})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group: ``"params"``, and the arguments that differ in it."""
        if isinstance(param_group, Mapping):
            known = self._arguments
            check_names("a group", [name for name in param_group if is_misspelt(name, known)], known)
        torch.optim.Optimizer.add_param_group(self, param_group)
        number, group = len(self.param_groups) - 1, self.param_groups[-1]
        try:
            check_names(f"group {number}", [name for name in group if name in ELSEWHERE], self._arguments)
            Variant(self._init, {name: group[name] for name in self._arguments})
            for i, p in enumerate(group["params"]):
                check_parameter(p, name_of(group, number, i))
        except Exception:
            self.param_groups.pop()
            raise

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update in place all parameters that have a gradient.

        closure: computes the gradients and returns the loss, which is then returned.
        """
        loss = None
        if closure is not None:
            if not callable(closure):
                raise DTypeError(
                    f"closure must be a function that computes gradients and returns the loss, got {closure!r}"
                )
            with torch.enable_grad():
                loss = closure()
        self._update()
        return loss

    @staticmethod
    def profile_hook_step(func: Callable[..., Any]) -> Callable[..., Any]:
        """PyTorch's frame of ``step``, which tells profilers of it and calls hooks; nothing where there are none.

        With many small tensors it takes a tenth of a step.
        """
        framed = torch.optim.Optimizer.profile_hook_step(func)

        @functools.wraps(func)
        def step(self: Optimizer, *args: Any, **kwargs: Any) -> Any:
            seen = torch.autograd._profiler_enabled() or any(HOOKS)
            if seen or self._optimizer_step_pre_hooks or self._optimizer_step_post_hooks:
                return framed(self, *args, **kwargs)
            return func(self, *args, **kwargs)

        return step

    @torch._disable_dynamo  # what a compiled function calls: NumPy's views of tensors cannot be traced
    def _update(self) -> None:
        decayed = any(group["weight_decay"] != 0 for group in self.param_groups)
        if self._repeat is not None and self._repeat.step(self, decayed):
            return
        with torch.no_grad():
            self._look_and_update(decayed)

    def _look_and_update(self, decayed: bool) -> None:
        """A step that looks at each tensor."""
        self._repeat = None
        if not self._is_known():
            self._look()
        cohorts = [p for lane in self._lanes for p in lane.cohorts(self._variant(lane.number, decayed), self.state)]
        if any(cohort.new for cohort in cohorts):
            self._check_apart()
            self._known = self._owned()
        calls: dict[Any, list[Cohort]] = {}
        for cohort in cohorts:
            calls.setdefault(cohort.lane.key, []).append(cohort)
        for key, together in calls.items():
            if key not in self._engines:
                self._engines[key] = Engine(together[0].lane)
            self._engines[key].update(together)
        if len(calls) == 1 and self._engines[key].repeats:
            self._repeat = Repeat.of(self._engines[key], cohorts, self.param_groups, self._owned()[1])

    def state_dict(self) -> dict[str, Any]:
        """State and arguments of all groups, for ``torch.save``; ``torch.load`` reads them with weights_only=True."""
        found: dict[str, Any] = torch.optim.Optimizer.state_dict(self)
        for group in found["param_groups"]:  # schedules compute numbers of NumPy, which torch.load refuses
            group.update({name: value.item() for name, value in group.items() if isinstance(value, np.generic)})
        return found

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over copies of what ``state_dict`` gave, checked whole before anything changes."""
        if not isinstance(state_dict, Mapping):
            raise DTypeError(f"state_dict must be what state_dict() gave, got {state_dict!r}")
        taken: list[Mapping[str, Any]] = []
        handle = self.register_load_state_dict_pre_hook(lambda _, d: taken.append(self._checked(d)))
        try:
            torch.optim.Optimizer.load_state_dict(self, state_dict)
        finally:
            handle.remove()
        # PyTorch shares the tensors with the dictionary, and rounds the float32 state of float16 parameters.
        saved = [(p, *item) for p, state in self._saved_states(taken[0]) for item in state.items() if item[0] != STEP]
        for (p, name, value), x in zip(saved, state_like([p for p, _, _ in saved]), strict=True):
            self.state[p][name] = x.copy_(value)

    def __getstate__(self) -> dict[str, Any]:
        own = {"_init": self._init, "_arguments": self._arguments}
        return {**torch.optim.Optimizer.__getstate__(self), **own}

    def __setattr__(self, name: str, value: Any) -> None:
        """As for any object; but an argument is none of its attributes, unless a user's class has it."""
        if type(self).__module__ == __name__ and name in (
            *vars(self).get("_arguments", ()),
            "learning_rate",
            *ELSEWHERE,
        ):
            raise ArgumentError(f"opt.{name} = {value!r} changes nothing: a step reads the values in opt.param_groups")
        object.__setattr__(self, name, value)

    def __setstate__(self, state: dict[str, Any]) -> None:
        torch.optim.Optimizer.__setstate__(self, state)
        for group in self.param_groups:
            for name in self._arguments:
                group.setdefault(name, self.defaults[name])
            for name in [name for name in ELSEWHERE if name in group and name not in self._arguments]:
                del group[name]  # of a state_dict of torch.optim, where it is off
        self._known, self._engines, self._repeat = None, {}, None

    # --- inside ------------------------------------------------------------------------------------------------------

    def _owned(self) -> tuple[list[int], list[Any]]:
        """The state on which lanes depend: addresses and numbers of parameters, and the objects in groups and state."""
        params = [p for group in self.param_groups for p in group["params"]]
        objects = [*params]
        for p, state in self.state.items():  # a hook may put there what is no parameter's
            objects += [p, state, *(state.values() if isinstance(state, dict) else ())]
        return [*map(torch.Tensor.data_ptr, params), *sizes_of(self.param_groups)], objects

    def _is_known(self) -> bool:
        """Whether groups and state are as the lanes have them."""
        if self._known is None:
            return False
        (addresses, objects), (known_addresses, known) = self._owned(), self._known
        return addresses == known_addresses and len(objects) == len(known) and all(map(operator.is_, objects, known))

    def _look(self) -> None:
        """Sort the parameters into lanes."""
        lanes: dict[Any, Lane] = {}
        for number, group in enumerate(self.param_groups):
            for i, p in enumerate(group["params"]):
                name = name_of(group, number, i)
                check_parameter(p, name)
                key = (number, p.device, p.dtype)
                if key not in lanes:
                    lanes[key] = Lane(number, p.device, p.dtype)
                lanes[key].params.append(p)
                lanes[key].names.append(name)
        self._variants = [None] * len(self.param_groups)
        self._lanes = list(lanes.values())
        for lane in self._lanes:
            lane.count(self.state)
        self._known = self._owned()

    def _variant(self, number: int, decayed: bool) -> Variant:
        """The formula with the arguments that a group has now."""
        group, variant = self.param_groups[number], self._variants[number]
        try:
            values = [group[name] for name in self._arguments]
        except KeyError as error:
            raise ArgumentError(
                f"param_groups[{number}] must have {', '.join(self._arguments)}; it lacks {error}"
            ) from None
        if variant is None or len(group) != variant.names:
            check_written(f"param_groups[{number}]", group, self._arguments)
        if variant is None or not equal(variant.values, values) or variant.decayed != decayed:
            variant = Variant(self._init, dict(zip(self._arguments, values, strict=True)), decayed)
            self._variants[number] = variant
        variant.names = len(group)
        return variant

    def _check_apart(self) -> None:
        """Raise if parameters that are updated share memory."""
        places = [(name, r.place) for lane in self._lanes for name, r in zip(lane.names, lane.bound, strict=True) if r]
        if (pair := find_overlap([place for _, place in places])) is not None:
            first, second = (places[i][0] for i in pair)
            shared = f"elements of {first}" if first == second else f"{first} and {second}"
            raise ArgumentError(f"{shared} share memory, which would be updated twice in a step; give each its own")

    def _saved_states(self, d: Mapping[str, Any]) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        """The parameters that a state_dict has state of, and that state."""
        numbers = itertools.chain.from_iterable(group["params"] for group in d["param_groups"])
        params = itertools.chain.from_iterable(group["params"] for group in self.param_groups)
        for number, p in zip(numbers, params, strict=False):  # PyTorch compares the lengths
            if number in d["state"]:
                yield p, d["state"][number]

    def _checked(self, d: Mapping[str, Any]) -> Mapping[str, Any]:
        """A state_dict, if it can be taken."""
        if not {"state", "param_groups"} <= set(d):
            raise ArgumentError(
                f"state_dict must have state and param_groups, got {', '.join(map(str, d)) or 'nothing'}"
            )
        for number, group in enumerate(d["param_groups"]):
            if missing := [name for name in self._arguments if name not in group and name not in COMMON]:
                theirs = ", ".join(name for name in ELSEWHERE if name in group and name not in self._arguments)
                hint = f", but of torch.optim, with {theirs}: begin with new state" if theirs else ""
                raise ArgumentError(
                    f"group {number} of state_dict lacks {', '.join(missing)}: it is not of {type(self).__name__}{hint}"
                )
            check_written(f"group {number} of state_dict", group, self._arguments)
            variant = Variant(self._init, {name: group.get(name, self.defaults[name]) for name in self._arguments})
            known = [*variant.start, optim.MASTER, STEP]
            for state in (d["state"][i] for i in group["params"] if i in d["state"]):
                if other := set(state) - set(known):
                    raise ArgumentError(f"the state must be {', '.join(known)}; state_dict has {', '.join(other)}")
        for p, state in self._saved_states(d):
            for name, value in state.items():
                if name == STEP and not int(value) >= 0:
                    raise ArgumentError(f"{STEP} in state_dict must be at least 0, got {value}")
                if name != STEP and (not torch.is_tensor(value) or value.shape != p.shape):
                    found = tuple(value.shape) if torch.is_tensor(value) else value
                    raise ShapeError(f"state_dict has {found} as {name} of a parameter of shape {tuple(p.shape)}")
        return d


def start(self: Optimizer, params: Any, init: Callable[..., None], arguments: dict[str, Any]) -> None:
    """Initialise an optimizer whose rule and hyper-parameters are those of ``init``."""
    if isinstance(params, torch.nn.Module):
        raise DTypeError(f"params must be the parameters of {type(params).__name__}: give model.parameters()")
    if isinstance(params, Mapping):
        raise DTypeError("params must be tensors, or pairs of name and tensor: give the items() of a mapping")
    if isinstance(params, Iterator):
        params = list(params)
        if not params:
            raise ArgumentError("params has no tensors; what model.parameters() gives can be gone through only once")
    arguments = {**COMMON, **arguments}
    self._init, self._arguments = init, tuple(arguments)
    self._known, self._engines, self._repeat = None, {}, None
    torch.optim.Optimizer.__init__(self, params, arguments)


def check_names(owner: str, given: Any, known: Any) -> None:
    """Raise for an argument that does not exist; those of torch.optim are said to be what they are here."""
    for name in given:
        if name in ELSEWHERE and name not in known:
            instead = ELSEWHERE[name] or "nothing: every step is one fused call, outside of CUDA graphs and autograd"
            raise UnknownArgumentError(f"{owner} has no argument {name!r} of torch.optim; here it is {instead}")
    check_known(owner, given, known)


def check_written(owner: str, group: Mapping[str, Any], known: Sequence[str]) -> None:
    """Raise for what somebody wrote into a group although no step reads it."""
    check_names(owner, [name for name in group if is_foreign(group, name, known) or is_misspelt(name, known)], known)


def is_foreign(group: Mapping[str, Any], name: str, known: Sequence[str]) -> bool:
    """Whether a name is one of torch.optim's that has a value; zero, False and None say nothing."""
    return name in ELSEWHERE and name not in known and group[name] not in (0, None)


def is_misspelt(name: str, known: Sequence[str]) -> bool:
    """Whether a name that may be the user's own, as PyTorch's groups may have, is nearly one that is known."""
    kind, _, of = str(name).partition("_")
    if name in (*known, "params", "param_names") or (kind in OF_SCHEDULERS and of in (*known, "momentum")):
        return False
    return name in ("learning_rate", "epsilon") or bool(difflib.get_close_matches(str(name), known, 1, 0.8))


def equal(one: list[Any], other: list[Any]) -> bool:
    """Whether the arguments of a group are what they were."""
    try:
        return one == other
    except (RuntimeError, ValueError):  # an array of several numbers, which will be refused in words
        return False


def sizes_of(groups: list[dict[str, Any]]) -> list[int]:
    """The number of parameters of each group."""
    return [len(group["params"]) for group in groups]


def name_of(group: Mapping[str, Any], number: int, i: int) -> str:
    """A parameter in words: its name, if it came from ``named_parameters``."""
    return repr(group["param_names"][i]) if "param_names" in group else f"param_groups[{number}]['params'][{i}]"


def check_parameter(p: Tensor, name: str) -> None:
    """Raise for a tensor that cannot be updated."""
    if type(p).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        raise DTypeError(f"{name} is a {type(p).__name__}: its values are not in memory of its own; give plain tensors")
    if p.is_nested:
        raise DTypeError(f"{name} is a nested tensor; give plain ones")
    if p.layout is not torch.strided:
        raise DTypeError(f"{name} is sparse ({p.layout}); give dense parameters")
    if p.dtype not in DTYPES:
        hint = "; keep bfloat16 for autocast, and the parameters in float32" if p.dtype == torch.bfloat16 else ""
        raise DTypeError(f"{name} must be float32, float64 or float16, got {p.dtype}{hint}")
    if p.device.type not in ("cpu", "cuda"):
        raise DeviceMismatchError(f"{name} must be on the CPU or on a CUDA device, it is on {p.device}")
    backend_for(p.device)


def backend_for(device: Any) -> Backend:
    """gpubatch's backend for a device of PyTorch; on CUDA it says what is missing, if CuPy cannot be used."""
    return get_backend("cpu" if device.type == "cpu" else f"cuda:{device.index}")


class Variant:
    """The formula of a group, with the arguments that the group has.

    values: those arguments.
    names: how many names the group had when they were checked.
    decayed: whether the formula has weight decay. It has in all groups if one of them has, so that one call does all.
    start: what the state starts from, by its names.
    """

    def __init__(self, init: Callable[..., None], arguments: dict[str, Any], decayed: bool = False) -> None:
        arguments = {name: plain(name, value) for name, value in arguments.items()}
        self.values, self.names, self.decayed = list(arguments.values()), 0, decayed
        self.uphill = check_bool("maximize", arguments["maximize"])
        self.master = check_bool("master_weights", arguments["master_weights"])
        rest = {name: value for name, value in arguments.items() if name not in ("maximize", "master_weights")}
        opt = optim.unbound(init, **rest)
        self.trace = optim.trace_of(opt, decayed)
        self.hyper = {name: opt.hyper[name] for name in self.trace.hyper}
        self.start = {name: float(views.flat[0]) for name, views in opt.state.items()}


def plain(name: str, value: Any) -> Any:
    """An argument as it was given, but the number for a tensor of one; it is read again in every step."""
    if callable(value) or (torch.is_tensor(value) and value.numel() != 1):
        raise DTypeError(f"{name} must be a number, got {value!r}; schedules are those of torch.optim.lr_scheduler")
    return value.item() if torch.is_tensor(value) else value


# --- parameters as the update sees them ------------------------------------------------------------------------------


class BoundTensor(NamedTuple):
    """A parameter that has state.

    place: the array of its memory.
    w: the array that the update works on: ``place``, or its elements in the order of memory.
    copy: for a parameter with gaps between its elements, the tensor whose memory ``w`` is.
    state: the state's arrays, laid out as ``w``.
    gradient: gives the array of a gradient, laid out as ``w``.
    """

    place: Array
    w: Array
    copy: Tensor
    state: tuple[Array, ...]
    gradient: Callable[[Tensor], Array]


def layout(p: Tensor) -> tuple[int, ...]:
    """The strides that an update works with: those of ``p``, which may be in any order, or if it has gaps, C's."""
    if p.is_contiguous() or torch.empty_like(p, device="meta").stride() == p.stride():
        return tuple(p.stride())
    return tuple(torch.empty(p.shape, device="meta").stride())


def state_like(params: list[Tensor]) -> list[Tensor]:
    """A tensor for each parameter, of its layout and device, uninitialised; float32 for float16.

    In main memory they are one block, for which NumPy asks the system for large pages: with ten million parameters a
    step of Adam then takes 8 % less time.
    """
    dtypes = [torch.float32 if p.dtype == torch.float16 else p.dtype for p in params]
    sizes = [
        p.numel() * dtype.itemsize if p.device.type == "cpu" else 0 for p, dtype in zip(params, dtypes, strict=True)
    ]
    block = torch.from_numpy(np.empty(sum(size + LINE for size in sizes), np.uint8))
    made, end = [], 0
    for p, dtype, size in zip(params, dtypes, sizes, strict=True):
        if p.device.type == "cpu":
            start = end + (-(block.data_ptr() + end)) % LINE
            end = start + size
            made.append(block[start:end].view(dtype).as_strided(p.shape, layout(p)))
        else:
            made.append(torch.empty_strided(p.shape, layout(p), dtype=dtype, device=p.device))
    return made


class Lane:
    """The parameters of one group that share device and element type."""

    def __init__(self, number: int, device: Any, dtype: Any) -> None:
        self.number, self.device = number, device
        self.dtype: np.dtype[Any] = DTYPES[dtype]
        self.backend = backend_for(device)
        self.params: list[Tensor] = []
        self.names: list[str] = []
        self.bound: list[Any] = []  # a BoundTensor for each, or None before its first gradient
        self.variant: Variant | None = None
        self.state_names: tuple[str, ...] = ()
        self.key: Any = None  # lanes of the same key are updated by one call

    def count(self, state: Any) -> None:
        """Let all counts be numbers in one array, which costs one operation per step."""
        self.bound = [None] * len(self.params)
        steps = torch.zeros(len(self.params), dtype=torch.int64, device="cpu")
        self.counts, self.steps = steps.numpy(), steps.unbind()
        for i, p in enumerate(self.params):
            if p in state:
                self.counts[i] = int(state[p].get(STEP, 0))
                state[p][STEP] = self.steps[i]

    def cohorts(self, variant: Variant, state: Any) -> list[Cohort]:
        """The parameters that have a gradient, by their step count."""
        if self.variant is not variant:
            self._bind(variant)
        grads = [p.grad for p in self.params]
        active = [i for i, g in enumerate(grads) if g is not None]
        if not active:
            return []
        if new := [i for i in active if self.bound[i] is None]:
            with self.scope():
                self._make_state(new, variant, state)
                for i in new:
                    self.bound[i] = self._bound_tensor(i, state)
        if len(active) == len(grads) and (self.counts == self.counts[0]).all():
            return [Cohort(self, slice(None), self.params, self.bound, grads, int(self.counts[0]) + 1, bool(new))]
        by_count: dict[int, list[int]] = {}
        for i in active:
            by_count.setdefault(int(self.counts[i]), []).append(i)
        cohorts = []
        for count, some in by_count.items():
            params, bound, present = ([x[i] for i in some] for x in (self.params, self.bound, grads))
            cohorts.append(Cohort(self, some, params, bound, present, count + 1, bool(new)))
        return cohorts

    def scope(self) -> contextlib.AbstractContextManager[Any]:
        """The device, and PyTorch's current stream there."""
        if not isinstance(self.backend, CudaBackend):
            return contextlib.nullcontext()
        if torch.cuda.is_current_stream_capturing():
            raise CaptureError("step() cannot be captured in a CUDA graph: its scalars come from the host in each step")
        return self.backend.on_stream(torch.cuda.current_stream(self.device).cuda_stream)

    def _bind(self, variant: Variant) -> None:
        """Take over a variant."""
        self.variant, self.master = variant, variant.master and self.dtype == np.float16
        names = (*variant.start, *([optim.MASTER] if self.master else []))
        if names != self.state_names:
            self.bound = [None] * len(self.params)
        self.state_names = names
        self.key = (self.device, self.dtype, id(variant.trace), self.master, variant.uphill)

    def _make_state(self, new: list[int], variant: Variant, state: Any) -> None:
        """Make the state that parameters lack."""
        for i in new:
            state[self.params[i]].setdefault(STEP, self.steps[i])
        for name in self.state_names:
            lacking = [self.params[i] for i in new if name not in state[self.params[i]]]
            for p, x in zip(lacking, state_like(lacking), strict=True):
                state[p][name] = x.copy_(p) if name == optim.MASTER else x.fill_(variant.start[name])

    def _bound_tensor(self, i: int, state: Any) -> BoundTensor:
        """Parameter i as an update sees it, with its state laid out as it is itself."""
        p, kept = self.params[i].detach(), state[self.params[i]]
        gaps = layout(p) != p.stride()
        body = torch.empty_strided(p.shape, layout(p), dtype=p.dtype, device=p.device) if gaps else p
        dtype = torch.float32 if p.dtype == torch.float16 else p.dtype
        for name in self.state_names:
            x = kept[name]
            if x.shape != p.shape:
                raise ShapeError(
                    f"state {name} of {self.names[i]} has shape {tuple(x.shape)}, the parameter {tuple(p.shape)}; "
                    "delete opt.state[p] of a parameter that gets another shape"
                )
            if (x.dtype, x.device) != (dtype, p.device):
                raise DeviceMismatchError(
                    f"state {name} of {self.names[i]} is {x.dtype} on {x.device}, the parameter needs {dtype} on "
                    f"{p.device}; state_dict and load_state_dict move it"
                )
            if x.stride() != body.stride() and not (x.is_contiguous() and body.is_contiguous()):
                (kept[name],) = state_like([self.params[i]])
                kept[name].copy_(x)
        return BoundTensor(
            place=self._view(p),
            w=self._view(in_memory_order(body)),
            copy=body if gaps else None,
            state=tuple(self._view(in_memory_order(kept[name])) for name in self.state_names),
            gradient=functools.partial(self._gradient, i),
        )

    def _view(self, x: Tensor) -> Array:
        """The array of a tensor's memory: NumPy's, or CuPy's on the current stream."""
        return x.numpy() if self.device.type == "cpu" else self.backend.asarray(x)

    def _gradient(self, i: int, g: Tensor) -> Array:
        """The array of the gradient of parameter i, laid out as the update has the parameter."""
        p, record, name = self.params[i].detach(), self.bound[i], f"the gradient of {self.names[i]}"
        if g.layout is not torch.strided:
            raise DTypeError(f"{name} is sparse ({g.layout}); a layer with sparse=False gives a dense one")
        if g.shape != p.shape:
            raise ShapeError(f"{name} has shape {tuple(g.shape)}, the parameter {tuple(p.shape)}")
        if (g.dtype, g.device) != (p.dtype, p.device):
            raise DTypeError(f"{name} is {g.dtype} on {g.device}, the parameter is {p.dtype} on {p.device}")
        body = p if record.copy is None else record.copy
        g = g.detach().resolve_neg()
        shared = g.untyped_storage().data_ptr() == p.untyped_storage().data_ptr()
        like = g.is_contiguous() if body.is_contiguous() else g.stride() == body.stride()
        if shared or not like:
            g = torch.empty_like(body).copy_(g)
        return self._view(in_memory_order(g))


def in_memory_order(x: Tensor) -> Tensor:
    """A tensor without gaps as it is if it is contiguous, else its elements in the order of memory."""
    return x if x.is_contiguous() else x.as_strided((x.numel(),), (1,))


class Cohort(NamedTuple):
    """Parameters of a lane at the same step: they have one row of scalars.

    where: the indices of the parameters in the lane.
    t: the step, from 1.
    new: whether some are updated for the first time.
    """

    lane: Lane
    where: slice | list[int]
    params: list[Tensor]
    bound: list[BoundTensor]
    grads: list[Tensor]
    t: int
    new: bool


def tensor_views(tensors: list[Tensor]) -> list[Array] | None:
    """NumPy's views of tensors; None if there is none of one of them, or another tensor than float32 or float64."""
    library = host_library()
    if EXCHANGE is not None and not isinstance(library, str):
        found: list[Array] | None = library.tensor_views(EXCHANGE, tensors)
        return found
    try:
        return [x.numpy() for x in tensors]
    except (RuntimeError, TypeError):
        return None


@functools.cache
def inner_functions() -> list[int]:
    """Where C++'s tensor is in a tensor's object, and the addresses of two functions of libtorch that take it.

    They are what ``Tensor.is_neg`` and DLPack's functions call. Those take longer than all else that a repeated step
    asks of a tensor, since they give up Python's lock or take it. Empty where they are not found or do not do the same.
    """
    place = object.__basicsize__  # PyTorch's object is Python's header, then at::Tensor, which is one pointer
    try:
        library = ctypes.CDLL(os.path.join(os.path.dirname(torch.__file__), "lib", "libtorch_cpu.so"))
        is_neg = library["_ZN2at6native6is_negERKNS_6TensorE"]  # bool at::native::is_neg(at::Tensor const&)
        # void at::toDLPackNonOwning(at::Tensor const&, DLTensor*)
        describe = library["_ZN2at17toDLPackNonOwningERKNS_6TensorEP8DLTensor"]
    except (OSError, AttributeError):
        return []
    is_neg.argtypes, is_neg.restype = [ctypes.c_void_p], ctypes.c_bool
    plain = torch.ones(2, device="cpu")
    for x in (plain, plain._neg_view(), torch.nn.Parameter(plain), torch.nn.Parameter(plain._neg_view())):
        if ctypes.c_size_t.from_address(id(x) + place).value != x._cdata or is_neg(id(x) + place) != x.is_neg():
            return []
    return [place, *(ctypes.cast(f, ctypes.c_void_p).value or 0 for f in (is_neg, describe))]


class Engine:
    """The update of a formula, for an element type and a device."""

    def __init__(self, lane: Lane) -> None:
        variant = lane.variant
        assert variant is not None
        self.trace, self.scope = variant.trace, lane.scope
        self.call = update_for(variant.trace, lane.dtype, lane.backend, lane.master)
        self.at_once = getattr(self.call, "at_once", None)
        self.compiled = getattr(self.call, "compiled", None)
        sign = np.array([-1, 0], compute_dtype(lane.dtype))
        self.control = lane.backend.asarray(sign) if variant.uphill else None
        self.bound: list[BoundTensor] = []  # what was updated last, and its arrays
        self.columns: list[list[Array]] = []
        self.repeats = False  # whether the last update was as the one before, and nothing but one call to the library

    def update(self, cohorts: list[Cohort]) -> None:
        """Update the parameters in one call, and count the step."""
        rows = [self.trace.evaluate(c.t, **c.lane.variant.hyper) for c in cohorts]  # type: ignore[union-attr]
        if len(cohorts) == 1:
            params, bound, grads, row_of = cohorts[0].params, cohorts[0].bound, cohorts[0].grads, None
        else:
            params = [p for c in cohorts for p in c.params]
            bound = [x for c in cohorts for x in c.bound]
            grads = [g for c in cohorts for g in c.grads]
            row_of = [i for i, c in enumerate(cohorts) for _ in c.params]
        copies = [(p, x.copy) for p, x in zip(params, bound, strict=True) if x.copy is not None]
        for p, copy in copies:
            copy.copy_(p)
        with self.scope():
            before = self.bound
            done = self._at_once(bound, grads, rows, row_of)
            if not done:
                arrays = [(x.w, x.gradient(g), *x.state) for x, g in zip(bound, grads, strict=True)]
                self.call(arrays, rows, self.control, row_of)
        for p, copy in copies:
            p.copy_(copy)
        # NumPy's writes are not seen by autograd, which must refuse a backward pass through values that are gone.
        torch.autograd.graph.increment_version(params)
        for c in cohorts:
            c.lane.counts[c.where] += 1
        self.repeats = done and not copies and self.bound is before

    def _at_once(self, bound: list[BoundTensor], grads: list[Tensor], rows: Any, row_of: list[int] | None) -> bool:
        """Update without a look at each gradient; False, with nothing changed, if one is unsuitable."""
        # PyTorch may keep the sign of a gradient in a bit of the tensor, which DLPack does not show.
        if self.at_once is None or any(map(torch.Tensor.is_neg, grads)):
            return False
        if (views := tensor_views(grads)) is None:
            return False
        if len(bound) != len(self.bound) or not all(map(operator.is_, bound, self.bound)):
            self.bound = list(bound)
            self.columns = [list(column) for column in zip(*((x.w, *x.state) for x in bound), strict=True)]
        w, *state = self.columns
        return bool(self.at_once(list(zip(w, views, *state, strict=True)), rows, self.control, row_of))


class Repeat:
    """Steps on the CPU that are like the last one: one call checks the tensors, whose objects are known, and updates.

    With many small tensors a look at each of them in Python takes longer than their update.

    objects: those of :meth:`Optimizer._owned`.
    tensors: where they are.
    sizes: the number of parameters of each group.
    """

    def __init__(
        self, engine: Engine, cohorts: list[Cohort], objects: list[Any], tensors: Any, sizes: list[int]
    ) -> None:
        self.engine, self.objects, self.tensors = engine, objects, tensors
        self.lanes = list({id(c.lane): c.lane for c in cohorts}.values())
        # Of each row of scalars the lane, and the place of a parameter in it.
        self.rows = [(c.lane, 0 if isinstance(c.where, slice) else c.where[0]) for c in cohorts]
        self.scale = 1.0 if engine.control is None else float(engine.control[0])
        self.params = [p for c in cohorts for p in c.params]
        self.sizes = sizes

    @classmethod
    def of(
        cls, engine: Engine, cohorts: list[Cohort], groups: list[dict[str, Any]], objects: list[Any]
    ) -> Repeat | None:
        """Steps like the one that updated ``cohorts`` in one call; None where they need a look."""
        library = host_library()
        if EXCHANGE is None or engine.compiled is None or isinstance(library, str):
            return None
        found: dict[int, tuple[tuple[Array, ...], int, int]] = {}
        for row, c in enumerate(cohorts):
            (first, _), size = c.lane.counts.__array_interface__["data"], c.lane.counts.itemsize
            places = range(len(c.params)) if isinstance(c.where, slice) else c.where
            for i, p, x in zip(places, c.params, c.bound, strict=True):
                found[id(p)] = (x.w, *x.state), first + i * size, row
        params = [p for group in groups for p in group["params"]]
        arrays, counts, row_of = zip(*(found.get(id(p), (None, 0, 0)) for p in params), strict=True)
        given = params, list(arrays), list(counts), list(row_of)
        asked = torch.Tensor.grad, torch.Tensor.is_neg, inner_functions()
        tensors = library.Tensors(engine.compiled, EXCHANGE, *asked, *given)
        return cls(engine, cohorts, objects, tensors, sizes_of(groups)) if tensors.usable else None

    def step(self, opt: Optimizer, decayed: bool) -> bool:
        """Update, and count the step; False, with nothing changed, if anything is not as it was."""
        if sizes_of(opt.param_groups) != self.sizes:
            return False
        for lane in self.lanes:
            if (variant := opt._variant(lane.number, decayed)) is not lane.variant:
                key = lane.key
                lane._bind(variant)
                if lane.key != key:
                    return False
        counts = [lane.counts.item(i) for lane, i in self.rows]
        hypers = [lane.variant.hyper for lane, _ in self.rows]  # type: ignore[union-attr]
        rows = [self.engine.trace.evaluate(n + 1, **hyper) for n, hyper in zip(counts, hypers, strict=True)]
        lists = [group["params"] for group in opt.param_groups]
        if not self.tensors.step(self.objects, lists, opt.state, counts, rows, self.scale):
            return False
        torch.autograd.graph.increment_version(self.params)
        return True


# --- the library's rules ---------------------------------------------------------------------------------------------


def class_of(kind: type[optim.Optimizer]) -> type[Optimizer]:
    """The class for PyTorch of one of gpubatch's optimizers, with its arguments and defaults."""
    core = {name for name, p in inspect.signature(optim.Optimizer).parameters.items() if p.kind is p.KEYWORD_ONLY}
    here = [
        p
        for name, p in inspect.signature(kind).parameters.items()
        if p.kind is not p.VAR_KEYWORD and (name in COMMON or name not in core)
    ]
    known = [p.name for p in here]
    common = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=value)
        for name, value in COMMON.items()
        if name not in known
    ]
    signature = inspect.Signature([*here, *common])

    def begin(self: Optimizer, *given: Any, **arguments: Any) -> None:
        check_names(kind.__name__, arguments, signature.parameters)
        try:
            bound = signature.bind(*given, **arguments)
        except TypeError as error:
            raise DTypeError(f"{kind.__name__}{signature}: {error}") from None
        bound.apply_defaults()
        params = bound.arguments.pop("params")
        start(self, params, kind.__init__, bound.arguments)

    body = {
        "__init__": begin,
        "__doc__": f"{kind.__doc__}\n\nAs an optimizer for PyTorch: see :class:`Optimizer`.",
        "__module__": __name__,
        "__signature__": signature,
    }
    return type(kind.__name__, (Optimizer,), body)


KINDS = {
    name: kind
    for name, kind in vars(optim).items()
    if isinstance(kind, type) and issubclass(kind, optim.Optimizer) and kind is not optim.Optimizer
}
globals().update({name: class_of(kind) for name, kind in KINDS.items()})


# --- networks --------------------------------------------------------------------------------------------------------

# For each layer, what PyTorch calls its parameters and buffers, in PyTorch's order, and whether it is transposed.
STATES: dict[type[Layer], dict[str, tuple[str, bool]]] = {
    Dense: {"weight": ("W", True), "bias": ("b", False)},
    BatchNorm: {
        "weight": ("gamma", False),
        "bias": ("beta", False),
        "running_mean": ("running_mean", False),
        "running_var": ("running_var", False),
    },
}
COUNT = "num_batches_tracked"  # of PyTorch's BatchNorm, which reads it where momentum=None alone


def to_state_dict(net: Network, names: Sequence[str] | None = None) -> dict[str, Tensor]:
    """The parameters and running statistics of a network as a ``state_dict`` of PyTorch, of new tensors on its device.

    net: of Dense and BatchNorm layers, and layers without parameters.
    names: what PyTorch's modules for the layers with parameters are called, such as ``["fc1", "norm", "fc2"]``; by
        default their places among all layers, as ``torch.nn.Sequential`` of the same layers names them.

    ``Linear.weight`` is Dense's W transposed. What is no array is not in it: give eps and momentum of ``BatchNorm1d``
    and p of ``Dropout`` yourself. gpubatch's initial weights, activations and means of losses are PyTorch's where they
    have the same name.
    """
    wanted = arrays_of(net)
    keys = [str(place) for place, _ in wanted] if names is None else list(names)
    if len(keys) != len(wanted) or len(set(keys)) != len(keys):
        raise ArgumentError(f"names must be {len(wanted)} different ones, of the layers with parameters, got {names!r}")
    found: dict[str, Tensor] = {}
    for key, (place, arrays) in zip(keys, wanted, strict=True):
        for name, (array, transposed) in arrays.items():
            with net.backend.scope():
                copy = (array.T if transposed else array).copy(order="C")
            found[f"{key}.{name}"] = torch.from_dlpack(copy)
        if type(net.layers[place]) is BatchNorm:
            found[f"{key}.{COUNT}"] = torch.tensor(core_of(net).dropout_step, device=found[f"{key}.weight"].device)
    return found


def from_state_dict(net: Network, state: Mapping[str, Any]) -> None:
    """Load a ``state_dict`` of PyTorch, of a module with the same layers in the same order, whatever they are called.

    net: of Dense and BatchNorm layers, and layers without parameters.
    state: tensors or arrays, on any device; they are converted to the network's element type.

    Linear and BatchNorm modules are taken in the order of ``state``, in which PyTorch registered them. Raises
    ArgumentError or ShapeError, and changes nothing, where they are not the network's layers.
    """
    wanted = arrays_of(net)
    modules: dict[str, dict[str, Any]] = {}
    if not isinstance(state, Mapping):
        raise DTypeError(f"state must be a state_dict of PyTorch, got {type(state).__name__}")
    for key, value in state.items():
        module, _, name = key.rpartition(".")
        if name != COUNT:
            modules.setdefault(module, {})[name] = value
    if len(modules) != len(wanted):
        raise ArgumentError(
            f"state must have {len(wanted)} modules with parameters, as the network has layers with them, got "
            f"{', '.join(modules)}"
        )
    pairs = list[tuple[Array, Array]]()
    for (key, values), (place, arrays) in zip(modules.items(), wanted, strict=True):
        layer = f"layer {place + 1} ({type(net.layers[place]).__name__})"
        if values.keys() != arrays.keys():
            raise ArgumentError(f"{key} of state has {', '.join(values)}, {layer} needs {', '.join(arrays)}")
        for name, (array, transposed) in arrays.items():
            value = values[name]
            if isinstance(value, torch.Tensor):
                value = value.detach().cpu()
                value = (value if value.dtype in DTYPES else value.float()).numpy()
            shape = array.shape[::-1] if transposed else array.shape
            if np.shape(value) != shape:
                raise ShapeError(f"{key}.{name} has shape {np.shape(value)}, {layer} needs {shape}")
            plain = np.asarray(value).astype(array.dtype)
            pairs.append((array, net.backend.asarray(np.ascontiguousarray(plain.T if transposed else plain))))
    with net.backend.scope():
        for array, value in pairs:
            array[...] = value


def arrays_of(net: Network) -> list[tuple[int, dict[str, tuple[Array, bool]]]]:
    """For each layer with parameters its place, and its arrays by PyTorch's names, and whether they are transposed."""
    if not isinstance(net, Network):
        raise DTypeError(f"net must be a gpubatch.Network, got {type(net).__name__}")
    found = []
    both = {**net.parameters, **net.buffers}
    for place, (layer, names) in enumerate(zip(net.layers, core_of(net).names, strict=True)):
        if names and type(layer) not in STATES:
            raise ArgumentError(f"layer {place + 1} ({type(layer).__name__}) has parameters and no module of PyTorch")
        if names:
            own = STATES[type(layer)]
            found.append((place, {name: (both[names[k]], t) for name, (k, t) in own.items() if k in names}))
    return found


__all__ = ["Optimizer", "from_state_dict", "to_state_dict", *KINDS]

if TYPE_CHECKING:  # the classes are made above

    def __getattr__(name: str) -> Any: ...
