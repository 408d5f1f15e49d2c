"""States of callbacks for checkpoints: their own arrays, if these are written at once, or copies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def live_callback(callback: Any) -> dict[str, Any]:
    """The ``state_dict()`` of a callback; gpubatch's own give their arrays without a copy."""
    kind = next((kind for kind in type(callback).__mro__ if "state_dict" in vars(kind)), None)
    # A subclass of the user's may override either method.
    own = kind is not None and "_live_state" in vars(kind) and "state_dict" not in vars(callback)
    state: dict[str, Any] = callback._live_state() if own else callback.state_dict()
    return state


def copied(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state with copies of its arrays."""
    return {
        name: copied(value) if isinstance(value, dict) else value.copy() if hasattr(value, "shape") else value
        for name, value in state.items()
    }
