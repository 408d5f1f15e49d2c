"""Update rules: how to declare one, and how its variants are traced."""

from __future__ import annotations

import functools
import keyword
import numbers
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from gpubatch.errors import FormulaError
from gpubatch.formula.named import by_name
from gpubatch.formula.trace import (
    C_WORDS,
    HOST_FUNCTIONS,
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

# Arguments of every optimizer, of its groups, and of how it is made.
TAKEN = (
    *("t", "decoupled", "backend", "master_weights", "groups", "check", "trainable", "maximize"),
    *("self", "rule", "params", "init"),
)


@dataclass(frozen=True, eq=False)
class Rule:
    """An update rule: ``formula(w, g, *state, t, *, hyper-parameters)`` returns the new w and the new state.

    ``defaults`` maps hyper-parameters to their defaults; ``required`` names those without. ``options`` are keyword
    arguments with a string or bool: they select a variant of the formula when it is traced.
    """

    name: str
    formula: Callable[..., Any]
    state: tuple[str, ...]
    required: tuple[str, ...]
    defaults: Mapping[str, float]
    options: Mapping[str, str | bool]

    def __reduce__(self) -> Any:
        return by_name(self, rule)

    def __call__(self, w: Any, g: Any, *state_and_t: Any, **hyper: Any) -> Any:
        """Evaluate the formula on arrays: the new w and the new state; nothing changes in place."""
        return self.formula(*own_copies(w, g, *state_and_t), **hyper)

    @property
    def hyper(self) -> tuple[str, ...]:
        """The names of all hyper-parameters."""
        return (*self.required, *self.defaults)

    @property
    def decays(self) -> tuple[str, ...]:
        """The forms of weight decay: "" for none, or the rule's own where ``weight_decay`` is its hyper-parameter."""
        if "weight_decay" in self.hyper:
            return ("",)
        return ("", "coupled", "decoupled") if "lr" in self.hyper else ("", "coupled")

    @functools.cached_property
    def _traces(self) -> dict[Any, Trace]:
        return {}

    def trace(self, decay: str = "", **options: str | bool) -> Trace:
        """The traced formula; ``decay`` is the optimizer's weight decay: "", "coupled" or "decoupled"."""
        if decay and "weight_decay" in self.hyper:
            return self.trace("", **options)
        key: Any = (decay, *sorted({**self.options, **options}.items()))
        found = self._traces.get(key)
        if found is None:
            found = self._traced(*key)
            check_repeatable(self.name, found, self._traced(*key))
            self._traces[key] = found
        return found

    def renew(self) -> None:
        """Trace again what has been traced, since numbers from outside of the formula may be others now."""
        for key, trace in list(self._traces.items()):
            if not same_recording(trace, self._traced(*key)):
                del self._traces[key]

    def _traced(self, decay: str, *options: tuple[str, str | bool]) -> Trace:
        hyper = (*self.hyper, *(["weight_decay"] if decay else []))
        trace = Trace(self.name, ("w", "g", *self.state), ("w", *self.state), hyper, reducible=True)
        inputs = trace.inputs()
        w, g, *state = inputs
        symbols = {name: Scalar(name) for name in self.hyper}
        new_w, new_g = _decayed(decay, w, g, symbols.get("lr"))
        returned = recorded(self.formula, new_w, new_g, *state, Scalar("t"), **symbols, **dict(options))
        results = returned if isinstance(returned, tuple) else (returned,)
        if len(results) != len(trace.targets):
            raise FormulaError(
                f"{self.name} must return ({', '.join(trace.targets)}), {len(trace.targets)} values; "
                f"it returned {len(results) if isinstance(returned, (tuple, Symbol)) else repr(returned)}"
            )
        # Drop elements that no result needs: an option may have selected one of two values.
        names, targets = dict(zip(inputs, trace.arrays, strict=True)), dict(zip(trace.targets, results, strict=True))
        return restated(self.name, names, targets)


def _decayed(decay: str, w: Any, g: Any, lr: Any) -> tuple[Any, Any]:
    """Weight decay for any rule: coupled is L2 (g += λw), decoupled scales w by 1 - lr·λ before the update."""
    weight_decay = Scalar("weight_decay")
    if decay == "decoupled":
        return w * (1 - lr * weight_decay), g
    if decay == "coupled":
        return w, g + weight_decay * w
    return w, g


def rule(formula: Callable[..., Any]) -> Rule:
    """Declare an update rule.

    The function takes the weights ``w``, the gradient ``g``, state arrays (initially zero), the step ``t`` (from 1),
    and after ``*`` its hyper-parameters. It returns the new weights and the new state, in the order of its arguments.
    It works on one element at a time, but for :func:`norm`, :func:`mean` and :func:`max_abs` over a whole parameter. A
    rule with ``weight_decay`` among its hyper-parameters applies it itself; otherwise the optimizer does, as for all.
    What it reads from outside, such as a constant of the module, is read when an optimizer is made: a number that
    changes in training is a hyper-parameter, which may be a schedule.
    Raises :class:`FormulaError` for any other signature.

    >>> @rule
    ... def momentum(w, g, v, t, *, lr=0.1, beta=0.9):
    ...     v = beta * v + (1 - beta) * g
    ...     return w - lr * v, v
    """
    name = getattr(formula, "__name__", "rule")
    positional, named, signature = signature_of("a rule", formula)
    if positional[:2] != ("w", "g") or positional[-1:] != ("t",):
        raise FormulaError(
            f"{name} must have the signature (w, g, *state names, t, *, hyper-parameters), got {signature}"
        )
    defaults = {hyper: default for hyper, default in named.items() if default is not signature.empty}
    for hyper in named:
        if hyper in (*TAKEN, *HOST_FUNCTIONS) or keyword.iskeyword(hyper):
            raise FormulaError(f"{name}: the name {hyper!r} is taken; rename the hyper-parameter")
    for hyper, default in defaults.items():
        if not isinstance(default, (numbers.Real, str)):
            raise FormulaError(f"{name}: the default of {hyper} must be a number, a string or a bool, got {default!r}")
    for array in positional[2:-1]:
        taken = array.endswith("_new") or re.fullmatch(r"x\d+|(of_)?(norm|mean|max_abs)\d+", array)
        if not array.isascii() or array in C_WORDS or taken or array.startswith("__"):
            raise FormulaError(f"{name}: the state {array!r} cannot be a name in C; rename it")
    return Rule(
        name=name,
        formula=formula,
        state=tuple(positional[2:-1]),
        required=tuple(hyper for hyper in named if hyper not in defaults),
        defaults={k: float(v) for k, v in defaults.items() if not isinstance(v, (bool, str))},
        options={k: v for k, v in defaults.items() if isinstance(v, (bool, str))},
    )
