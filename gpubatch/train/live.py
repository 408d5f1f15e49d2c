"""The states of callbacks for checkpoints: their arrays themselves, which are written at once, or copies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["copied", "live_callback"]


def live_callback(callback: Any) -> dict[str, Any]:
    """The ``state_dict()`` of a callback, of gpubatch's own with its arrays themselves in place of copies."""
    kind = next((kind for kind in type(callback).__mro__ if "state_dict" in vars(kind)), None)
    # A method of the user's takes the place of both.
    own = kind is not None and "_live_state" in vars(kind) and "state_dict" not in vars(callback)
    state: dict[str, Any] = callback._live_state() if own else callback.state_dict()
    return state


def copied(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state with copies of its arrays."""
    return {
        name: copied(value) if isinstance(value, dict) else value.copy() if hasattr(value, "shape") else value
        for name, value in state.items()
    }
