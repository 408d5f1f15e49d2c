"""An update rule bound to parameters: one step after another, in place, with a state that can be saved."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import numpy as np

from gpubatch import schedules
from gpubatch.backend import Array, Backend, backend_of, compute_dtype, describe, float_dtype, get_backend, unmasked
from gpubatch.errors import (
    ArgumentError,
    DeviceMismatchError,
    DTypeError,
    EpochWarning,
    NonFiniteError,
    ShapeError,
    check_bool,
    check_int,
    check_known,
)
from gpubatch.formula import Rule
from gpubatch.ops import CudaUpdate, update_for
from gpubatch.optim.arrays import Gradients, check_apart, named_arrays, not_finite
from gpubatch.optim.epochs import EpochCount
from gpubatch.optim.groups import Arrangement, Hyper, arranged
from gpubatch.optim.hyper import HyperParameters
from gpubatch.own import as_written, copied
from gpubatch.params import FlatViews, Parameters
from gpubatch.passes import pass_under_way

LOOKS = 100  # steps between two checks of parameters and epoch; a check takes up to half a step
MASTER = "master"  # the name of the float32 copy of float16 parameters, beside the formula's state


class StepResult(NamedTuple):
    """What a step did: whether the update was ``applied``, the step count ``t`` and the learning rate ``lr`` used.

    The learning rate is that of the parameters in no group.

    >>> opt = gb.SGD([np.zeros(2)], lr=0.1)
    >>> opt.step([np.ones(2)])
    StepResult(applied=True, t=1, lr=0.1)
    """

    applied: bool
    t: int
    lr: float | None


@as_written
class Optimizer:
    """An update rule bound to parameters, which it changes in place.

    rule: a function declared with :func:`gpubatch.rule`.
    params: a :class:`Parameters`, or a mapping or sequence of arrays: NumPy, CuPy, or of any library that speaks DLPack
        and lets them be written; all float32, all float64 or all float16, on one device.
    weight_decay: λ, which adds λw to the gradient; by default 0. A rule that has it as a hyper-parameter applies it
        itself, and may have another default.
    decoupled: whether weight decay shrinks w by lr·λ before the update instead (Loshchilov & Hutter 2019).
    backend: the device where the parameters must be.
    master_weights: whether to keep a float32 copy of float16 parameters and update that, so that rounding does not lose
        small steps (Micikevicius et al., arXiv:1710.03740). A parameter that something else changes, as by loading
        weights, is the one that counts: the next step finds that it is not the rounded copy.
    groups: hyper-parameters for some parameters alone, by patterns over their names as in ``fnmatch``, such as
        ``{"beta*": {"trainable": False}, "b*": {"weight_decay": 0.0}, "W1": {"lr": schedule}}``. The first pattern that
        matches a name counts. ``trainable=False`` freezes: such parameters have no state, and are never updated.
        :func:`fit` does not compute their gradients where it need not, and has them be 0. :func:`no_decay` gives the
        usual groups of a network.
    check: what is done about gradients that are NaN or infinite. None: a CPU looks at the parameters after the first
        step and after every hundredth, since what is NaN stays NaN, and raises :class:`NonFiniteError`; that takes no
        time worth mentioning. True: every step looks at the gradients first, and raises with nothing changed; on a CPU
        that takes from a quarter of a step of Adam to a whole one of SGD, of hundreds of separate arrays two more
        steps, and a GPU waits for it. False: nobody looks, as on a GPU by default. :func:`fit` looks at all gradients
        itself, whatever this is.
    hyper: the rule's hyper-parameters: numbers, or schedules, callables (step, epoch) -> float, both counted from 0.

    For float16 the arithmetic and the state are float32.

    A group follows the hyper-parameters that it does not have itself, so ``opt.lr = ...`` is for all parameters but
    those whose group has its own.

    >>> w = np.zeros(3)
    >>> opt = gb.Optimizer(gb.rules.adam, [w], lr=0.1)
    >>> opt.step([np.ones(3)])
    StepResult(applied=True, t=1, lr=0.1)
    >>> w.round(4)
    array([-0.1, -0.1, -0.1])
    """

    def __init__(
        self,
        rule: Rule,
        params: Any,
        *,
        weight_decay: Hyper | None = None,
        decoupled: bool = False,
        backend: str | Backend | None = None,
        master_weights: bool = False,
        groups: Mapping[str, Mapping[str, Any]] | None = None,
        check: bool | None = None,
        **hyper: Any,
    ) -> None:
        if not isinstance(rule, Rule):
            raise DTypeError(f"rule must be made with @gpubatch.rule, got {rule!r}")
        self.rule = rule
        self.t = 0
        self._epochs = EpochCount()
        self._hyper = HyperParameters(
            rule, decoupled, hyper if weight_decay is None else {**hyper, "weight_decay": weight_decay}
        )

        self._flat = params if isinstance(params, Parameters) else None
        self._params = dict(params) if isinstance(params, Parameters) else named_arrays(params, "params", writable=True)
        self.backend = backend_of(*self._params.values()) if self._flat is None else self._flat.backend
        if backend is not None and get_backend(backend) != self.backend:
            raise DeviceMismatchError(f"backend is {get_backend(backend).spec!r}, params are on {self.backend.spec!r}")
        if self._flat is None:
            check_apart(self._params)
        self._dtype = self._common_dtype()
        self._hyper.take_groups({} if groups is None else groups, list(self._params))
        self._missed: dict[str, int] = {}  # how many steps a parameter was without a gradient
        self._late: set[str] = set()  # those for which the arrangement is out of date
        frozen = set(self.frozen)
        self._trained = {name: p for name, p in self._params.items() if name not in frozen}
        shapes = {name: tuple(p.shape) for name, p in self._trained.items()}
        size = sum(p.size for p in self._trained.values())
        self._master = check_bool("master_weights", master_weights)
        if self._master and self._dtype != np.float16:
            raise ArgumentError(f"master_weights=True is for float16 parameters, these are {self._dtype}")
        if self._master and MASTER in rule.state:
            raise ArgumentError(f"{rule.name} has a state {MASTER!r}, the name of master weights; rename it")
        kept, dtype = (*rule.state, *([MASTER] if self._master else [])), compute_dtype(self._dtype)
        self._state = {name: FlatViews(self.backend.zeros(size, dtype), shapes) for name in kept}
        if self._master:
            for name, p in self._trained.items():
                self._state[MASTER][name] = p
        self._last: Gradients | None = None  # of many arrays on a GPU, in the step before
        self._check = None if check is None else check_bool("check", check)
        self._bind()

    def step(self, grads: Any = None, control: Array | None = None) -> StepResult:
        """Update the parameters in place.

        grads: the gradients, given as ``params`` were, with their names, shapes, element type and device; by default
            ``params.grads``. A parameter whose gradient is None keeps its value, its state and its count of steps, as
            in PyTorch; its hyper-parameters move on. Gradients of frozen parameters may be None or missing, and are
            not looked at.
        control: two numbers in an array on their device, of the state's element type: ``control[0]`` scales the
            gradients; if ``control[1]`` is not 0 the update is skipped. A CPU does not count such a step, and
            ``applied`` is False. A GPU reads them when it gets there: nobody waits, and the step is counted.
        """
        if control is not None:
            self._check_control(control)
        fed = None if self._flat is None else self._flat.fed
        if fed is None or fed is not self._epochs.last or not fed.running:
            self._epochs.meet(pass_under_way(fed))
        update, last = self._update, self._last
        if last is not None and isinstance(update, CudaUpdate) and not self._check and last.same(grads):
            scalars, lr = self._scalars(self.t)
            update.again(scalars, control)
        else:
            lr = self._first(grads, control)
        if control is not None and self.backend.name == "cpu" and control[1]:
            return StepResult(False, self.t, lr)
        if self._absent:
            if len(self._absent) == len(self._trained):
                return StepResult(False, self.t, lr)
            for name in self._absent:
                self._missed[name] = self._missed.get(name, 0) + 1
            self._late.update(self._absent)
        self.t += 1
        if self.t % LOOKS == 1:
            self._look()
        return StepResult(True, self.t, lr)

    def _first(self, grads: Any, control: Array | None) -> float | None:
        """The update by gradients that have not been looked at."""
        self._last = None
        arrays, row_of = self._arrays(grads)
        scalars, lr = self._scalars(self.t)
        if self._check and not (control is not None and control[1]):
            self._look_at_gradients(grads, [self._gradient(g, w) for w, g, *_ in arrays])
        if arrays and not self._at_once(arrays, scalars, control, row_of):
            checked = [(w, self._gradient(g, w), *state) for w, g, *state in arrays]
            self._update(checked, scalars, control, row_of)
            if len(arrays) > 1 and isinstance(self._update, CudaUpdate):
                self._last = Gradients.of(grads, [g for _, g, *_ in checked])
        return lr

    def _look_at_gradients(self, grads: Any, arrays: list[Array]) -> None:
        """Raise if one of ``arrays``, which are those in ``grads``, is not finite."""
        if not arrays or not not_finite({str(i): g for i, g in enumerate(arrays)}):
            return
        named: Mapping[str, Array]
        if self._flat is not None and (flat := self._flat_grads(grads, self._flat)) is not None:
            named = FlatViews(flat, self._flat.shapes)
        else:
            named = named_arrays(grads, "grads", optional=True)
        what = not_finite({f"grads[{name!r}]": named[name] for name in self._trained if named[name] is not None})
        raise NonFiniteError(f"{what} at step {self.t + 1}; nothing was changed")

    def _look(self) -> None:
        # Not by vars(self): from then on Python would take longer to read every attribute.
        names = (*self._hyper.common, "learning_rate")
        stray = [name for name in names if not hasattr(type(self), name) and hasattr(self, name)]
        if stray and type(self).__module__.startswith("gpubatch."):  # a user's class may have any attributes
            name = min(stray)
            raise ArgumentError(
                f"opt.{name} = {getattr(self, name)!r} changes nothing: assign opt.lr, or give {name} as a schedule, "
                "a function of (step, epoch), when the optimizer is made"
            )
        if self._check is None and self.backend.name == "cpu":
            self._look_at_parameters()
        if not self._epochs.stands_still():
            return
        if found := next((name for name, value in self._hyper.every() if schedules.counts_epochs(value)), None):
            self._epochs.told = True
            warnings.warn(
                f"{found} is a schedule by epoch, and the last {LOOKS} steps are all of epoch {self._epochs.epoch}: "
                "passes over a gpubatch.Loader count epochs; with batches from elsewhere assign opt.epoch in every "
                "epoch, or make the schedule with per='step'",
                EpochWarning,
                stacklevel=3,
            )

    def _look_at_parameters(self) -> None:
        """Raise if a parameter that is trained is not finite."""
        if self._flat is not None and not not_finite({"": self._flat.flat}):
            return
        if what := not_finite({f"params[{name!r}]": p for name, p in self._trained.items()}):
            raise NonFiniteError(
                f"{what} after step {self.t}: in one of the last {LOOKS} steps a gradient was not finite, or the step "
                "too large; with check=True every step looks at the gradients first"
            )

    @property
    def epoch(self) -> int:
        """The epoch that schedules are called with, counted from 0: one more for every pass over a loader.

        A pass begins with the first step on a batch that ``for batch in loader`` gave out in it. The epoch goes on
        from loader to loader. Iterations without a step do not count; neither do those over another loader while one is
        under way, nor the rest of a pass that is resumed. The pass is that of the batch that ``net.loss_and_grad`` got
        last, or without a network, the innermost that the thread is in.

        Assign a number at any time: the next step is of that epoch, and passes after that step's go on from it. A loop
        without a loader must assign it for schedules with ``per="epoch"``; one that assigns it in every epoch counts
        for itself.
        """
        fed = None if self._flat is None else self._flat.fed
        return self._epochs.ahead(pass_under_way(fed), fed)

    @epoch.setter
    def epoch(self, value: int) -> None:
        self._epochs.assign(check_int("epoch", value, 0))

    @property
    def lr(self) -> float:
        """The learning rate of the next step, for all parameters but those whose group has its own.

        Assign a number or a schedule at any time.
        """
        return self._hyper.at("lr", self._hyper.common[self._with_lr()], self.t, self.epoch)

    @lr.setter
    def lr(self, value: Hyper) -> None:
        self._hyper.set(self._with_lr(), value)
        self._hyper.sort(self._trace)

    def _with_lr(self) -> str:
        """The name of the learning rate; AttributeError if the rule has none."""
        if "lr" not in self._hyper.common:
            raise AttributeError(f"{self.rule.name} has no hyper-parameter 'lr'")
        return "lr"

    @property
    def hyper(self) -> dict[str, Any]:
        """The hyper-parameters as they were given: numbers, schedules, and the variant's options.

        They are those of all parameters, but for what :attr:`groups` have themselves.
        """
        return self._hyper.all

    @property
    def groups(self) -> dict[str, dict[str, Any]]:
        """The groups by their patterns: ``trainable``, the names in ``parameters``, and the hyper-parameters it has."""
        return {
            group.pattern: {"trainable": group.trainable, "parameters": tuple(group.names), **group.own}
            for group in self._hyper.groups[1:]
        }

    def set_group(self, pattern: str, **hyper: Hyper) -> None:
        """Give a group other hyper-parameters, numbers or schedules, from the next step on.

        pattern: the group's pattern as it was given in ``groups``.
        """
        self._hyper.set_group(pattern, hyper)
        self._bind()

    @property
    def frozen(self) -> tuple[str, ...]:
        """The names of the parameters that are not trained."""
        return tuple(name for group in self._hyper.groups if not group.trainable for name in group.names)

    @property
    def params(self) -> dict[str, Array]:
        """The arrays that are changed, by name."""
        return dict(self._params)

    @property
    def state(self) -> dict[str, FlatViews]:
        """The state arrays, by the names of the formula; views by the names of the parameters that are trained."""
        return dict(self._state)

    @property
    def form(self) -> str:
        """What runs the rule: "compiled", "compiled on first use by ...", "NumPy: ..." and why, or "CUDA kernel"."""
        return self._update.form

    def memory(self) -> int:
        """Bytes of the optimizer's own arrays."""
        return sum(self.memory_parts().values())

    def memory_parts(self) -> dict[str, int]:
        """:meth:`memory` by the names of the state; with reductions on a GPU also what they need."""
        parts = {f"optimizer state {name}": int(views.flat.nbytes) for name, views in self._state.items()}
        if isinstance(self._update, CudaUpdate) and self._update.reduce:
            parts["optimizer reductions"] = self._update.reduction_bytes([p.size for p in self._trained.values()])
        return parts

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs: {"rule", "t", "epoch", "hyper", "state"}; arrays are copies.

        With groups there is "groups", and "missed" where a parameter was without a gradient in some steps.
        """
        with self.backend.scope():
            return copied(self._live_state())

    def _live_state(self) -> dict[str, Any]:
        """The same, but for the arrays, which are not copied."""
        return {
            "rule": self.rule.name,
            "t": self.t,
            "epoch": self._epochs.epoch,
            "pass": self._epochs.saved(),
            "hyper": self._hyper.saved(),
            **({"groups": self._hyper.saved_groups()} if len(self._hyper.groups) > 1 else {}),
            **({"missed": dict(self._missed)} if self._missed else {}),
            "state": dict(self._state),
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
        hyper, of_groups = self._hyper.loaded(d["hyper"]), self._hyper.loaded_groups(d.get("groups", {}))
        check_known("missed", missed := dict(d.get("missed", {})), self._trained)
        missed = {name: check_int(f"missed[{name!r}]", n, 0, t) for name, n in missed.items()}
        arrays = self._loaded_state(d["state"])
        # Up to version 0.1 the loader's number of an epoch was the optimizer's.
        self._epochs.load(epoch, d.get("pass", [epoch, 0] if t else None))
        self.t, self._missed = t, missed
        self._hyper.take(hyper, of_groups)
        for state, parameter, array in arrays:
            self._state[state][parameter] = array
        self._bind()

    def __reduce__(self) -> Any:
        raise DTypeError("an optimizer is bound to its arrays and cannot be copied or pickled; use state_dict()")

    def __repr__(self) -> str:
        hyper = ", ".join(f"{name}={value!r}" for name, value in self.hyper.items())
        groups = "".join(
            f", groups[{group.pattern!r}]={group.own if group.trainable else 'frozen'}"
            for group in self._hyper.groups[1:]
        )
        return f"<{type(self).__name__} {self.rule.name}({hyper}){groups}, {len(self._params)} parameters, t={self.t}>"

    # --- inside ------------------------------------------------------------------------------------------------------

    def _scalars(self, t: int) -> tuple[list[tuple[float, ...]], float | None]:
        """The rows of scalars for step ``t`` from 0, and the learning rate of the parameters in no group."""
        hyper, evaluate, epoch = self._hyper, self._trace.evaluate, self._epochs.epoch
        common = hyper.fixed
        if hyper.moving:
            common = common | {name: hyper.at(name, schedule, t, epoch) for name, schedule in hyper.moving.items()}
        rows: list[tuple[float, ...]] = []
        for group, missed in self._arrangement.rows:
            values = common
            if group.own:
                own = {name: hyper.at(name, value, t, epoch, group.pattern) for name, value in group.own.items()}
                values = {name: own.get(name, value) for name, value in common.items()}
            rows.append(evaluate(t + 1 - missed, **values))
        return rows, common.get("lr")

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
        if not self._hyper.of_library:
            self.rule.renew()
        self._trace = self.rule.trace(self._hyper.decay, **self._hyper.options)
        self._update = update_for(self._trace, self._dtype, self.backend, self._master)
        self._at_once = getattr(self._update, "at_once", lambda arrays, scalars, control, row_of: False)
        self._numbered = list(self._trained) == [str(i) for i in range(len(self._params))]
        self._apart = [(p, [views[name] for views in self._state.values()]) for name, p in self._trained.items()]
        self._hyper.sort(self._trace)
        self._arrange()

    def _arrange(self) -> None:
        """Lay out the parameters by their rows of scalars."""
        self._late.clear()
        self._last = None
        self._absent: Collection[str] = ()  # parameters without a gradient in the last step
        self._arrangement = arranged(self._update, self._hyper.groups, list(self._trained), self._missed)
        if self._flat is not None:
            apart = len(self._trace.passes) > 1  # reductions are over each parameter
            self._spans = self._arrangement.spans(self._flat.spans, list(self._trained), apart)
            self._grads = self._flat.grads.flat
            self._pieces = self._flat_arrays(self._flat, self._grads)
            whole = self._arrangement.row_of is None
            self._rows_of_pieces = None if whole else [span.row for span in self._spans]

    def _whole(self) -> Arrangement:
        """The arrangement for a step in which all parameters have a gradient."""
        if self._late:
            self._arrange()
        return self._arrangement

    def _flat_arrays(self, params: Parameters, grads: Array) -> list[tuple[Array, ...]]:
        """The tuples of a flat buffer: one where all parameters have one row of scalars and no reductions."""
        states = [views.flat for views in self._state.values()]
        if len(self._spans) == 1 and len(self._trained) == len(self._params):
            return [(params.flat, grads, *states)]
        return [
            (params.flat[span.parameters], grads[span.parameters], *(state[span.state] for state in states))
            for span in self._spans
        ]

    def _arrays(self, grads: Any) -> tuple[list[tuple[Array, ...]], list[int] | None]:
        """(w, g, state ...) tuples, and their rows of scalars; g is yet unchecked.

        There are few for a flat buffer, otherwise one for each parameter with a gradient.
        """
        if self._flat is not None:
            flat = self._flat_grads(grads, self._flat)
            if flat is not None:
                if self._late:
                    self._arrange()
                self._absent = ()
                pieces = self._pieces if flat is self._grads else self._flat_arrays(self._flat, flat)
                return pieces, self._rows_of_pieces
        if grads is None:
            raise ArgumentError("grads must be given: only gpubatch.Parameters has .grads, separate arrays have none")
        # The common case without a dictionary: many small arrays are a matter of microseconds.
        plain = isinstance(grads, (list, tuple)) and len(grads) == len(self._apart) and self._numbered
        absent: set[str] = set()
        if not plain or not all(type(g) is np.ndarray for g in grads):
            found = named_arrays(grads, "grads", optional=True)
            if not self._trained.keys() <= found.keys() <= self._params.keys():
                raise ArgumentError(
                    f"grads must be for {', '.join(self._trained)}; got {', '.join(found)}. Give None for a parameter "
                    "without a gradient"
                )
            grads = [found[name] for name in self._trained]
            absent = {name for name, g in zip(self._trained, grads, strict=True) if g is None}
        if not self._late <= absent:
            self._arrange()
        self._absent = absent
        arrays = [(p, g, *state) for (p, state), g in zip(self._apart, grads, strict=True)]
        row_of = self._arrangement.row_of
        if absent:
            present = [i for i, g in enumerate(grads) if g is not None]
            arrays = [arrays[i] for i in present]
            row_of = None if row_of is None else [row_of[i] for i in present]
        return arrays, row_of

    @staticmethod
    def _flat_grads(grads: Any, params: Parameters) -> Array | None:
        """The gradients as one buffer laid out as the parameters, if that is what they are."""
        if grads is None:
            return params.grads.flat
        if isinstance(grads, FlatViews):
            same = grads is params.grads or (grads.spans == params.spans and grads.shapes == params.shapes)
            return grads.flat if same else None
        return unmasked("grads", grads) if getattr(grads, "shape", None) == params.flat.shape else None

    def _gradient(self, g: Any, p: Array) -> Array:
        """The gradient of ``p``, checked; a copy where it is the parameter itself, as the gradient of w²/2 may be."""
        if self.backend.owns(g) and g.shape == p.shape and g.dtype == p.dtype:
            shared = g is p or (isinstance(g, np.ndarray) and np.may_share_memory(g, p))
            return g.copy() if shared else g
        label = next((f"grads[{name!r}]" for name, own in self._params.items() if own is p), "grads")
        self.backend.check(label, g)
        if g.shape != p.shape:
            raise ShapeError(f"{label} has shape {g.shape}, the parameter has {p.shape}")
        raise DTypeError(f"{label} is {g.dtype}, the parameter is {p.dtype}; convert it with astype")

    def _check_control(self, control: Any) -> None:
        self.backend.check("control", control)
        dtype = compute_dtype(self._dtype)
        if control.shape != (2,) or control.dtype != dtype:
            raise ShapeError(f"control must be two numbers of {dtype}, got {describe(control)}")

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
