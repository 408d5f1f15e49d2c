"""A resumed run's optimizer: its state as it was saved, its hyper-parameters as they are given now."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from gpubatch import schedules
from gpubatch.errors import ArgumentError
from gpubatch.optim.optimizer import Optimizer


def given_hyper(opt: Optimizer, places: Iterable[tuple[int, int]] = ()) -> dict[str, Any]:
    """The hyper-parameters of an optimizer and of its groups, as a checkpoint can hold them.

    Of a function of the user's that is its name, and what it gives at ``places``, each a step and an epoch.
    """
    at = [list(place) for place in places]
    values = {name: [_value_at(schedule, *place) for place in at] for name, schedule in _functions(opt)}
    return {"hyper": opt._hyper.saved(), "groups": opt._hyper.saved_groups(), "places": at, "values": values}


def _functions(opt: Optimizer) -> Iterator[tuple[str, Callable[..., Any]]]:
    """The schedules that are the user's own, by the names that messages have for them."""
    for name, value in opt._hyper.common.items():
        if callable(value) and not schedules.is_known(value):
            yield name, value
    for group in opt._hyper.groups[1:]:
        for name, value in group.own.items():
            if callable(value) and not schedules.is_known(value):
                yield f"{name} of groups[{group.pattern!r}]", value


def _value_at(schedule: Callable[..., Any], step: int, epoch: int) -> float | None:
    """What a function gives there; None where it gives no number, as a table does beyond its end."""
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            value = float(schedule(step, epoch))
    except Exception:
        return None
    return value if math.isfinite(value) else None


def load_resumed(opt: Optimizer, saved: Mapping[str, Any], given: Mapping[str, Any] | None) -> list[str]:
    """Load a state_dict, but keep the hyper-parameters that are now given otherwise; what differs, a line each.

    saved: of :meth:`Optimizer.state_dict`.
    given: of :func:`given_hyper` when that run began; None: of a checkpoint without it. What a callback has changed
        since then is in ``saved``, and is no difference.
    """
    now, groups = given_hyper(opt), saved.get("groups", {})
    before = {"hyper": saved["hyper"], "groups": groups} if given is None else given
    hyper, lines = dict(saved["hyper"]), list[str]()
    for name, value in now["hyper"].items():
        # Options are part of the formula, so another one is refused when the dictionary is loaded.
        if name in opt._hyper.common and schedules.up_to_date(before["hyper"].get(name)) != value:
            hyper[name] = value
            lines.append(f"{name}: {_in_words(before['hyper'].get(name))} before, {_in_words(value)} now")
    for kept in saved["state"].values():
        if differ := sorted(set(kept) ^ set(opt._trained)):
            verb = "frozen now, and was trained" if differ[0] in kept else "trained now, and was frozen"
            raise ArgumentError(f"{differ[0]} is {verb} in the saved run: groups must leave the same ones trainable")
    if schedules.up_to_date(before["groups"]) != now["groups"]:
        groups = now["groups"]
        lines.append(f"groups: {_groups_in_words(before['groups'])} before, {_groups_in_words(groups)} now")
    lines += _functions_that_differ(opt, before)
    opt.load_state_dict({**saved, "hyper": hyper, "groups": groups})
    return lines


def _functions_that_differ(opt: Optimizer, before: Mapping[str, Any]) -> Iterator[str]:
    """A line for each function that gives other numbers than the one of that name before."""
    for name, schedule in _functions(opt):
        for place, value in zip(before.get("places", ()), before.get("values", {}).get(name, ()), strict=False):
            now = None if value is None else _value_at(schedule, *place)
            # Math libraries differ in the last bits.
            if now is not None and not math.isclose(now, value, rel_tol=1e-12):
                step, epoch = place
                yield f"{name}: the function gave {value:g} at step {step} of epoch {epoch + 1} before, {now:g} now"
                break


def _in_words(saved: Any) -> str:
    if isinstance(saved, Mapping):
        return repr(schedules.from_dict(saved)) if "schedule" in saved else str(saved.get("callable"))
    return repr(saved)


def _groups_in_words(groups: Mapping[str, Mapping[str, Any]]) -> str:
    each = (
        f"{pattern!r} ({', '.join(f'{name}={_in_words(value)}' for name, value in values.items())})"
        for pattern, values in groups.items()
    )
    return ", ".join(each) or "none"
