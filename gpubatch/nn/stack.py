"""How layers fit together: their widths, the names of their parameters, and which two of them run as one."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from gpubatch.errors import ArgumentError, DTypeError, ShapeError, check_int
from gpubatch.nn.layers import ACTIVATIONS, ActivationLayer, Dense, DenseActivation, Elementwise, Layer
from gpubatch.nn.needs import Needs
from gpubatch.own import changed

# What Python and NumPy raise where a method is given, or does, what cannot be.
PLAIN = (ArithmeticError, AttributeError, LookupError, NameError, TypeError, ValueError)


class Stacked(NamedTuple):
    """A layer in its place: ``inputs`` is the width of its rows, ``place`` counts what the user gave, from 0.

    Of two layers that run as one, ``place`` is that of the first.
    """

    layer: Layer
    place: int
    inputs: int
    needs: Needs


def stacked(layers: Sequence[Any]) -> list[Stacked]:
    """The layers with what they need, if they fit together."""
    for i, layer in enumerate(layers):
        if not isinstance(layer, Layer):
            made = f": write {layer.__name__}(...)" if isinstance(layer, type) else ""
            raise DTypeError(
                f"layers must be Layer objects, layer {i + 1} is {layer!r} of type {type(layer).__name__}{made}"
            )
    taken = [takes(layer, i) for i, layer in enumerate(layers)]
    width = next((n for n in taken if n is not None), None)
    if width is None:
        raise ArgumentError("layers must hold at least one layer with parameters, such as Dense")
    found: list[Stacked] = []
    for i, layer in enumerate(layers):
        if taken[i] not in (None, width):
            raise ShapeError(
                f"{describe_layer(layer, i)} takes {taken[i]} features, {describe_layer(layers[i - 1], i - 1)} "
                f"gives {width}"
            )
        with told(f"{describe_layer(layer, i)}.needs({width})"):
            needs = layer.needs(width)
            if not isinstance(needs, Needs):
                raise DTypeError(f"it must return a gb.Needs, got {needs!r}")
            if needs.in_place and needs.outputs != width:
                raise ShapeError(f"with in_place=True it must give as many features as it takes, got {needs.outputs}")
        if needs.parameters and any(run.layer is layer for run in found):
            raise ArgumentError(
                f"layers has the same {type(layer).__name__} twice, and no two places share parameters: make one for "
                "each"
            )
        found.append(Stacked(layer, i, width, needs))
        width = needs.outputs
    return found


def fused(stack: Sequence[Stacked]) -> list[Stacked]:
    """The layers as they are run: a Dense layer with bias and the activation after it are one."""
    found: list[Stacked] = []
    for run in stack:
        layer, before = run.layer, found[-1].layer if found else None
        # By their very types: a subclass may do something else, and so may a method that was put in place of another.
        plain = type(layer) in (Elementwise, *ACTIVATIONS.values()) and type(before) is Dense and before.bias
        if (
            plain
            and not (changed(layer) or changed(before))
            and isinstance(layer, ActivationLayer)
            and isinstance(before, Dense)
        ):
            whole, (_, place, inputs, _) = DenseActivation(before, layer), found.pop()
            run = Stacked(whole, place, inputs, whole.needs(inputs))
        found.append(run)
    return found


def takes(layer: Layer, place: int) -> int | None:
    """How many features a layer takes; None: any number."""
    with told(f"{describe_layer(layer, place)}.takes()"):
        features = layer.takes()
        return None if features is None else check_int("its result", features, 1)


@contextlib.contextmanager
def told(method: str, looks_at_input: bool = False) -> Iterator[None]:
    """Tell in gpubatch's words, with the name of the method, what goes wrong in one that a user may have written.

    What Python, NumPy and gpubatch raise for bad arguments gets the name into its message. Other errors, which may be
    the user's own, stay as they are and get it as a note.

    looks_at_input: whether the method raises gpubatch's errors to say what is wrong with X or Y.
    """
    try:
        yield
    except (ArgumentError, DTypeError) as error:
        if looks_at_input:
            raise
        raise type(error)(f"{method}: {error}") from error
    except Exception as error:
        if isinstance(error, PLAIN) and type(error).__module__.partition(".")[0] in ("builtins", "numpy"):
            raise ArgumentError(f"{method} raised {type(error).__name__}: {error}") from error
        error.add_note(f"in {method}")
        raise


def describe_layer(layer: Layer, place: int) -> str:
    """A layer in words, counted from 1."""
    return f"layer {place + 1} ({type(layer).__name__})"


def parameter_names(stack: Sequence[Stacked]) -> list[dict[str, str]]:
    """For each layer, the names in the network of its parameters and buffers: the k-th of a kind is numbered k."""
    seen: Counter[type] = Counter()
    owners: dict[str, Stacked] = {}
    names: list[dict[str, str]] = []
    for run in stack:
        seen[type(run.layer)] += 1
        own = {name: f"{name}{seen[type(run.layer)]}" for name in (*run.needs.parameters, *run.needs.buffers)}
        if shared := own.values() & owners.keys():
            other = owners[min(shared)]
            raise ArgumentError(
                f"{describe_layer(other.layer, other.place)} and {describe_layer(run.layer, run.place)} both name "
                f"a parameter {min(shared)!r}; call it something else in one of the two classes"
            )
        owners |= dict.fromkeys(own.values(), run)
        names.append(own)
    return names
