"""Differences in callbacks, arguments and samples, between a resumed run and the saved one, or between ranks."""

from __future__ import annotations

import functools
import hashlib
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gpubatch.backend import Array, Backend
from gpubatch.errors import ArgumentError
from gpubatch.loader import Loader, epochs_of
from gpubatch.train.parts import OfARun
from gpubatch.train.validation import HeldOut

# The arguments that the state of a callback belongs to.
OF_ITS_STATE = ("monitor", "mode", "buffers")
ROWS = 1 << 12  # of samples that a digest reads


def has_state(callback: Any) -> bool:
    """Whether a callback is part of checkpoints."""
    return hasattr(callback, "state_dict") and hasattr(callback, "load_state_dict")


def describe_callbacks(callbacks: Sequence[Any]) -> list[dict[str, Any]]:
    """The description of each callback in a checkpoint, for JSON; of a user's own, only its name."""
    return [
        {
            "name": getattr(callback, "__qualname__", type(callback).__qualname__),
            "state": has_state(callback),
            "settings": callback.settings() if isinstance(callback, OfARun) else {},
        }
        for callback in callbacks
    ]


def in_order(saved: Sequence[Mapping[str, Any]], callbacks: Sequence[Any]) -> list[Any]:
    """Of ``callbacks``, those with a state, in the order in which a checkpoint has them.

    saved: what it says of its callbacks.
    """
    left = [callback for callback in callbacks if has_state(callback)]
    found = list[Any]()
    for before in saved:
        if not before["state"]:
            continue
        # Two of a kind are told apart by their arguments. A class of the user's may have another name now.
        alike = [c for c in left if describe_callbacks([c])[0]["name"] == before["name"]]
        if not before["settings"]:
            alike = alike or [c for c in left if not isinstance(c, OfARun)]
        if not alike:
            raise ArgumentError(f"it has the state of {in_words(before)}, and none is given now")
        differing = [differences(before, describe_callbacks([c])[0]) for c in alike]
        best = min(range(len(alike)), key=lambda i: (bool(set(differing[i]) & {*OF_ITS_STATE}), len(differing[i])))
        for name in OF_ITS_STATE:
            if name in differing[best]:
                old, new = differing[best][name]
                raise ArgumentError(
                    f"it has the state of {before['name']} with {name}={old!r}, the one given now has {name}={new!r}"
                )
        found.append(alike[best])
        left = [c for c in left if c is not alike[best]]
    if left:
        raise ArgumentError(f"it has no state of {in_words(describe_callbacks(left)[0])}, which is given now")
    return found


def changed_callbacks(saved: Sequence[Mapping[str, Any]], callbacks: Sequence[Any]) -> list[str]:
    """How gpubatch's callbacks were given otherwise before, a line each. Those with a state are as ``in_order`` has it.

    saved: what the checkpoint says of its callbacks.
    """
    of_state = in_order(saved, callbacks)
    now = describe_callbacks([*of_state, *(c for c in callbacks if not has_state(c))])
    pairs = [*zip((before for before in saved if before["state"]), now[: len(of_state)], strict=True)]
    others = [before for before in saved if not before["state"] and before["settings"]]
    lines = list[str]()
    for new in now[len(of_state) :]:
        old = next((before for before in others if before["name"] == new["name"]), None)
        if old is not None:
            others.remove(old)
            pairs.append((old, new))
        elif new["settings"]:
            lines.append(f"{new['name']}: none before, {in_words(new)} now")
    lines += [f"{old['name']}: {in_words(old)} before, none now" for old in others]
    for old, new in pairs:
        for name, (before, value) in differences(old, new).items():
            lines.append(f"{new['name']}'s {name}: {before!r} before, {value!r} now")
    return lines


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The arguments of a callback that differ, old and new."""
    old = before["settings"]
    return {name: (old[name], value) for name, value in now["settings"].items() if name in old and old[name] != value}


def in_words(described: Mapping[str, Any]) -> str:
    """A callback as source text."""
    return f"{described['name']}({', '.join(f'{name}={value!r}' for name, value in described['settings'].items())})"


def describe_held_out(held_out: HeldOut | None, backend: Backend) -> dict[str, Any] | None:
    """How many samples a validation set has, and a digest of its first labels, which are the same on every device."""
    if held_out is None:
        return None
    Y = backend.to_numpy(held_out.first()[1][:ROWS])
    return {"samples": held_out.samples, "labels": hashlib.sha256(Y.tobytes()).hexdigest()[:16]}


def digest_of_validation(held_out: HeldOut | None, backend: Backend) -> list[int] | None:
    """How many samples a validation set has, and a digest of the first ones, for ranks."""
    if held_out is None:
        return None
    X, Y, weights = held_out.first()
    return [held_out.samples, digest(backend, [X[:], Y, *weights.values()])]


def digest_of_samples(loader: Loader) -> int | None:
    """A digest of samples from all over, for ranks; None of those that are read, of which each is a read."""
    columns, n = epochs_of(loader).columns, loader.n_samples
    if columns.readers:
        return None
    return digest(loader.backend, columns.at(np.unique(np.linspace(0, n - 1, ROWS).astype(np.int64))))


def digest(backend: Backend, arrays: Sequence[Array]) -> int:
    """A CRC-32 of arrays of a device."""
    return functools.reduce(lambda crc, x: zlib.crc32(np.ascontiguousarray(backend.to_numpy(x)).data, crc), arrays, 0)


def changed_arguments(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The arguments of ``fit`` that differ from the saved ones, a line each."""
    lines = list[str]()
    for name, value in now.items():
        before = saved.get(name, value)
        if before == value:
            continue
        if name == "validation":
            other = " others" if before and value and before["samples"] == value["samples"] else ""
            before, value = (f"{given['samples']:,} samples" if given else "none" for given in (before, value))
            lines.append(f"validation: {before} before, {value.replace(' samples', other) if other else value} now")
        else:
            lines.append(f"{name}: {before!r} before, {value!r} now")
    return lines
