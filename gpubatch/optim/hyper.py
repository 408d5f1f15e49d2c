"""The hyper-parameters of an optimizer: numbers, or schedules, of all parameters and of groups of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gpubatch import schedules
from gpubatch.errors import ArgumentError, DTypeError, UnknownArgumentError, check_bool, check_known, check_real
from gpubatch.formula import Rule, Trace, rules
from gpubatch.optim.groups import Group, Hyper, partition

# The range of every hyper-parameter that gpubatch's own rules have: from low, included, to high, excluded.
RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("beta", "beta1", "beta2", "mu", "dampening", "rho", "momentum"), (0.0, 1.0)),
    **dict.fromkeys(("lr", "eps", "momentum_decay", "weight_decay", "trust_coefficient"), (0.0, math.inf)),
}
COMMON = ("weight_decay", "decoupled", "backend", "master_weights", "groups", "check")  # what every optimizer takes


class HyperParameters:
    """What an optimizer gives its rule besides arrays: checked when given, evaluated step by step, saved and loaded.

    common: the value of every hyper-parameter, a number or a schedule; the parameters in no group have these.
    groups: the parameters in no group first, then the groups, with the hyper-parameters that they have themselves.
    options: the variant of the formula.
    fixed, moving: of ``common`` what the formula in use has, numbers and schedules apart; see :meth:`sort`.
    """

    def __init__(self, rule: Rule, decoupled: Any, given: Mapping[str, Any]) -> None:
        self.rule, self.decoupled = rule, check_bool("decoupled", decoupled)
        self.of_library = getattr(rules, rule.name, None) is rule
        if "momentum" in given and "momentum" not in rule.hyper:
            raise UnknownArgumentError(
                f"{rule.name} has no momentum; gb.HeavyBall(params, lr, mu=...) has PyTorch's, and "
                "gb.Momentum(params, lr, beta=...) that of averages"
            )
        check_known(rule.name, given, [*rule.hyper, *rule.options, *COMMON])
        self.options = {name: self._option(name, given.get(name, usual)) for name, usual in rule.options.items()}
        values = {"weight_decay": 0.0, **rule.defaults, **given}
        self.common: dict[str, Hyper] = {}
        for name in dict.fromkeys([*rule.hyper, "weight_decay"]):
            if name not in values:
                raise ArgumentError(f"{rule.name} needs {name}, a number or a schedule; none was given")
            self.common[name] = self._checked(name, values[name])
        if self.decoupled and "weight_decay" in rule.hyper:
            raise ArgumentError(f"decoupled must be False: {rule.name} applies weight decay itself")
        if self.decoupled and "lr" not in rule.hyper:
            raise ArgumentError(f"decoupled must be False: {rule.name} has no hyper-parameter 'lr' to scale the decay")
        self.groups = [Group("")]
        self.fixed: dict[str, float] = {}
        self.moving: dict[str, schedules.Schedule] = {}

    def take_groups(self, groups: Any, names: Sequence[str]) -> None:
        """Divide the parameters among the groups that the user gave."""
        self.groups, given = partition(groups, names)
        for group, values in zip(self.groups, given, strict=True):
            group.own = self._own(group.pattern, values)

    @property
    def all(self) -> dict[str, Any]:
        """The hyper-parameters of the parameters in no group, and the options, as they were given."""
        return {**self.common, "decoupled": self.decoupled, **self.options}

    def set(self, name: str, value: Any) -> None:
        """Give the parameters in no group another value."""
        self.common[name] = self._checked(name, value)

    def set_group(self, pattern: str, given: Mapping[str, Any]) -> None:
        """Give a group other values."""
        group = next((group for group in self.groups[1:] if group.pattern == pattern), None)
        if group is None:
            known = ", ".join(repr(group.pattern) for group in self.groups[1:]) or "none"
            raise ArgumentError(f"pattern must be one of the groups' ({known}), got {pattern!r}")
        if "trainable" in given:
            kind, other = ("trainable", "freeze") if group.trainable else ("not trainable", "train")
            raise ArgumentError(f"groups[{pattern!r}] was made {kind}: to {other} it, make another optimizer")
        if not group.trainable:
            raise ArgumentError(f"groups[{pattern!r}] is not trainable, so it cannot have {', '.join(given)}")
        group.own = {**group.own, **self._own(pattern, given)}

    def _option(self, name: str, value: Any) -> str | bool:
        usual = self.rule.options[name]
        if type(value) is not type(usual):
            raise DTypeError(f"{name} must be like {usual!r}, got {value!r}")
        found: str | bool = value
        return found

    def _own(self, pattern: str, given: Mapping[str, Any]) -> dict[str, Hyper]:
        check_known(f"groups[{pattern!r}]", given, [*self.rule.hyper, "weight_decay", "trainable"])
        return {name: self._checked(name, value, pattern) for name, value in given.items()}

    def _checked(self, name: str, value: Any, pattern: str = "") -> Hyper:
        label = f"{name} of groups[{pattern!r}]" if pattern else name
        if callable(value):
            return schedules.check_schedule(label, value)
        # Of a user's rule only these two are known to mean what they mean here.
        known = self.of_library or name in ("lr", "weight_decay")
        low, high = RANGES[name] if known and name in RANGES else (-math.inf, math.inf)
        return check_real(label, value, low, high, open_high=True)

    # --- for the formula ---

    @property
    def decay(self) -> str:
        """The form of weight decay that the formula needs, as :meth:`Rule.trace` takes it."""
        usual = self.common["weight_decay"]
        trained = [group for group in self.groups if group.trainable and group.names]
        if all(group.own.get("weight_decay", usual) == 0.0 for group in trained):
            return ""
        return "decoupled" if self.decoupled else "coupled"

    def sort(self, trace: Trace) -> None:
        """Sort the values that ``trace`` reads into numbers, which a step takes as they are, and schedules."""
        given = {name: self.common[name] for name in trace.hyper}
        self.fixed = {name: value for name, value in given.items() if not callable(value)}
        self.moving = {name: value for name, value in given.items() if callable(value)}

    def at(self, name: str, value: Hyper, t: int, epoch: int, pattern: str = "") -> float:
        """The value of a hyper-parameter for step ``t`` from 0, always a Python float: float32 stays float32."""
        if not callable(value):
            return value
        number = self._checked(name, value(t, epoch), pattern)
        assert isinstance(number, float)
        return number

    def every(self) -> Iterator[tuple[str, Hyper]]:
        """All values by name, those of groups too."""
        for values in (self.common, *(group.own for group in self.groups)):
            yield from values.items()

    # --- in checkpoints ---

    def saved(self) -> dict[str, Any]:
        """Those of the parameters in no group, as JSON can hold them."""
        return {name: schedules.saved(value) for name, value in self.all.items()}

    def saved_groups(self) -> dict[str, dict[str, Any]]:
        """Those of the groups."""
        return {
            group.pattern: {
                "trainable": group.trainable,
                **{name: schedules.saved(value) for name, value in group.own.items()},
            }
            for group in self.groups[1:]
        }

    def loaded(self, saved: Mapping[str, Any]) -> dict[str, Hyper]:
        """The values that :meth:`saved` gave, checked; nothing changes."""
        found = {name: self._loaded(name, value, self.common) for name, value in saved.items()}
        if set(found) != set(self.all):
            raise ArgumentError(f"hyper must have {sorted(self.all)}, got {sorted(found)}")
        for name, option in {**self.options, "decoupled": self.decoupled}.items():
            if found[name] != option:
                raise ArgumentError(f"state_dict has {name}={found[name]!r}, this optimizer has {name}={option!r}")
        return {name: found[name] for name in self.common}

    def loaded_groups(self, saved: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Hyper]]:
        """The values of each group from a state with the same groups, checked; nothing changes."""
        kinds = [
            ", ".join(
                f"{pattern!r}{'' if values['trainable'] else ' (not trainable)'}" for pattern, values in of.items()
            )
            for of in (saved, self.saved_groups())
        ]
        if kinds[0] != kinds[1]:
            raise ArgumentError(f"state_dict has the groups {kinds[0] or 'none'}, this optimizer {kinds[1] or 'none'}")
        found = []
        for group in self.groups[1:]:
            values = {name: value for name, value in saved[group.pattern].items() if name != "trainable"}
            check_known(f"groups[{group.pattern!r}]", values, [*self.rule.hyper, "weight_decay"])
            found.append({name: self._loaded(name, value, group.own, group.pattern) for name, value in values.items()})
        return found

    def take(self, common: dict[str, Hyper], of_groups: Sequence[dict[str, Hyper]]) -> None:
        """Take over what :meth:`loaded` and :meth:`loaded_groups` found."""
        self.common = common
        for group, own in zip(self.groups[1:], of_groups, strict=True):
            group.own = own

    def _loaded(self, name: str, value: Any, own: Mapping[str, Hyper], pattern: str = "") -> Any:
        """A hyper-parameter as it was saved; a callable is the one that ``own`` has."""
        if isinstance(value, Mapping) and "schedule" in value:
            return schedules.from_dict(value)
        if isinstance(value, Mapping):
            if not callable(own.get(name)):
                label = f"{name} of groups[{pattern!r}]" if pattern else name
                raise ArgumentError(f"{label} was the callable {value.get('callable')!r}; give this optimizer one too")
            return own[name]
        return value if name in (*self.options, "decoupled") else self._checked(name, value, pattern)
