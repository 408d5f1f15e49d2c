"""Schedules as plain values, as checkpoints hold them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

from gpubatch.errors import ArgumentError, DTypeError, check_choice
from gpubatch.schedules import combined, cycles, decays
from gpubatch.schedules.combined import Chain, Product
from gpubatch.schedules.counted import Schedule

KINDS: dict[str, type[Any]] = {
    name: kind
    for module in (decays, cycles, combined)
    for name, kind in vars(module).items()  # in the order in which they are defined
    if isinstance(kind, type) and kind.__module__ == module.__name__ and not inspect.isabstract(kind)
}


def to_dict(schedule: Schedule) -> dict[str, Any]:
    """``schedule`` of this module as plain values, ``{"schedule": "CosineDecay", "lr": 0.1, ...}``."""
    kind: type[Any] = type(schedule)
    if kind not in KINDS.values():
        raise DTypeError(f"schedule must be one of {', '.join(KINDS)} to be written as a dict, got {schedule!r}")

    def plain(value: Any) -> Any:
        if isinstance(value, tuple):
            return [plain(v) for v in value]
        return to_dict(value) if callable(value) else value

    return {"schedule": kind.__name__} | {field.name: plain(getattr(schedule, field.name)) for field in fields(kind)}


def from_dict(d: Mapping[str, Any]) -> Schedule:
    """The schedule in a dict of :func:`to_dict`."""
    kind = KINDS[check_choice("schedule", d.get("schedule"), KINDS)]
    given = {name: value for name, value in d.items() if name != "schedule"}
    known = [field.name for field in fields(kind)]
    if unknown := [name for name in given if name not in known]:
        raise ArgumentError(f"{kind.__name__} has {', '.join(known)}, got {', '.join(map(repr, unknown))}")
    if missing := [field.name for field in fields(kind) if field.default is MISSING and field.name not in given]:
        raise ArgumentError(f"{kind.__name__} needs {', '.join(missing)}, got {', '.join(given) or 'nothing'}")
    if "schedules" in given:
        given["schedules"] = [from_dict(part) if isinstance(part, Mapping) else part for part in given["schedules"]]
    schedule: Schedule = kind(**given)
    return schedule


def is_known(value: Any) -> bool:
    """Whether a schedule is of gpubatch alone, so that it can be saved and asked about any step."""
    parts = value.schedules if isinstance(value, (Chain, Product)) else ()
    return type(value) in KINDS.values() and all(is_known(part) for part in parts if callable(part))


def counts_epochs(value: Any) -> bool:
    """Whether a hyper-parameter is one of gpubatch's schedules that depends on the epoch."""
    parts = value.schedules if isinstance(value, (Chain, Product)) else ()
    return type(value) in KINDS.values() and (getattr(value, "per", "") == "epoch" or any(map(counts_epochs, parts)))


def saved(value: Any) -> Any:
    """A hyper-parameter for a state_dict: a schedule as a dictionary, another callable by its name alone."""
    if not callable(value):
        return value
    if is_known(value):
        return to_dict(value)
    return {"callable": getattr(value, "__qualname__", type(value).__qualname__)}


def up_to_date(saved: Any) -> Any:
    """What :func:`saved` gave, of any version, with the fields that schedules have now."""
    if not isinstance(saved, Mapping):
        return saved
    return to_dict(from_dict(saved)) if "schedule" in saved else {k: up_to_date(v) for k, v in saved.items()}
