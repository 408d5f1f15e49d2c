"""Whether an object does what gpubatch wrote, or somebody gave it other methods; and its state without a copy, if so.

A subclass may override a method, and a function may be put in its place, in an object or in the class. Code that does
the work of a method without calling it must ask first: otherwise what the user wrote would silently not be run.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping
from typing import Any, TypeVar

Kind = TypeVar("Kind", bound=type)

WRITTEN = "_as_written"  # the attribute of a class that has its others


def as_written(kind: Kind) -> Kind:
    """Remember what a class defines, when it has just been defined; a decorator."""
    names = {
        name: value
        for name, value in vars(kind).items()
        # Other names with underscores are Python's; a cached property puts its value into the object.
        if (callable(value) or not name.startswith(("__", "_abc_")))
        and not isinstance(value, functools.cached_property)
    }
    setattr(kind, WRITTEN, names)
    return kind


def changed(x: Any, apart: Collection[str] = ()) -> str:
    """Where ``x`` differs from the classes that were remembered, as "Class.name" of the first; empty if nowhere.

    The names in ``apart`` do not count.
    """
    kinds, passed = type(x).__mro__, set(apart)
    for kind in kinds:
        for name, written in vars(kind).get(WRITTEN, {}).items():
            if name in passed:
                continue
            passed.add(name)
            found = next((vars(k)[name] for k in kinds if name in vars(k)), None)
            if found is not written or name in vars(x):
                return f"{type(x).__name__}.{name}"
    return ""


def live(x: Any) -> dict[str, Any]:
    """The ``state_dict()`` of an object, to be read at once: gpubatch's own give their arrays without a copy."""
    kind = next((kind for kind in type(x).__mro__ if "state_dict" in vars(kind)), None)
    # A subclass of the user's may override either method.
    own = kind is not None and "_live_state" in vars(kind) and "state_dict" not in vars(x)
    state: dict[str, Any] = x._live_state() if own else x.state_dict()
    return state


def copied(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state with copies of its arrays."""
    return {
        name: copied(value) if isinstance(value, Mapping) else value.copy() if hasattr(value, "shape") else value
        for name, value in state.items()
    }
