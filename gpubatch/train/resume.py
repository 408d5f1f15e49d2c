"""Going on from a checkpoint: the folder, and whether the network is the one that was saved."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from gpubatch.checkpoint import Checkpoints
from gpubatch.errors import ArgumentError
from gpubatch.nn import Network

__all__ = ["check_same_network", "describe_network", "opened"]


def opened(checkpoint: Any, resume: bool) -> Checkpoints | None:
    """Where to save, ready to be written to."""
    if checkpoint is None:
        if resume:
            raise ArgumentError("resume=True needs checkpoint=, the folder that has what to go on from")
        return None
    store = checkpoint if isinstance(checkpoint, Checkpoints) else Checkpoints(checkpoint)
    store.open()
    if not resume and store.files():
        # A new run would remove those of the old one, a few steps after another.
        raise ArgumentError(
            f"{store.folder} has checkpoints of another run: go on from them with resume=True, or take another folder"
        )
    return store


def describe_network(net: Network) -> dict[str, Any]:
    """What a network must share with another one to go on with its parameters, as JSON can hold it."""
    layers = {
        # The functions that a user's layer may hold are shown with an address, which is another one in every process.
        f"layer {i + 1}": re.sub(r" at 0x[0-9a-fA-F]+", "", repr(layer))
        for i, layer in enumerate(net.layers)
    }
    common = {"dtype": net.dtype.name, "precision": net.precision, "loss": net.loss_name, "l2": net.l2}
    return {**common, "seed": net.seed, "number of layers": len(layers), **layers}


def check_same_network(saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """An error that names the first thing in which two networks differ."""
    saved = {"precision": "full", **saved}  # in checkpoints of a time when there was no other
    for name, value in own.items():
        if saved[name] != value:
            raise ArgumentError(f"it is of a network whose {name} is {saved[name]}, this one's is {value}")
