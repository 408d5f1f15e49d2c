"""How the parameters and buffers of a network start."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from gpubatch.backend import Array, Backend, compute_dtype
from gpubatch.errors import ArgumentError, ShapeError
from gpubatch.nn.layers import Dense
from gpubatch.nn.needs import ByPlace, Parameter, Random
from gpubatch.nn.stack import Stacked, describe_layer, told
from gpubatch.nn.workspace import evenly
from gpubatch.ops import philox_generator
from gpubatch.params import FlatViews, Parameters, by_alignment

DRAWN = 1 << 16  # elements of first values that are drawn at a time: in double precision all would be the largest array


def declared(layers: Sequence[Stacked], kind: str) -> Iterator[tuple[Stacked, str, Parameter]]:
    """The "parameters" or "buffers" that each layer declares, by the names that it has for them."""
    for run in layers:
        for name, parameter in getattr(run.needs, kind).items():
            yield run, name, parameter


def first_values(
    layers: Sequence[Stacked],
    names: Sequence[Mapping[str, str]],
    classifies: bool,
    seed: int,
    backend: Backend,
    dtype: np.dtype[Any],
) -> tuple[Parameters, FlatViews]:
    """Parameters and buffers, drawn on the host in double precision: all devices and dtypes start alike.

    names: for each layer those of the network, by the layer's own.
    classifies: whether the loss has classes.
    """
    shapes = {names[run.place][name]: p.shape for run, name, p in declared(layers, "parameters")}
    if not shapes:
        raise ArgumentError("layers must hold at least one layer with parameters, such as Dense")
    parameters = Parameters(by_alignment(shapes), backend, dtype)
    kept = {names[run.place][name]: p.shape for run, name, p in declared(layers, "buffers")}
    buffers = FlatViews(backend.zeros(sum(map(math.prod, kept.values())), compute_dtype(dtype)), kept)
    last = max((run.place for run in layers if isinstance(run.layer, Dense)), default=-1)
    for run in layers:
        draw = philox_generator(seed, run.place)
        for own, kind in ((parameters, "parameters"), (buffers, "buffers")):
            for _, name, p in declared([run], kind):
                with backend.scope(), told(f"{describe_layer(run.layer, run.place)}: init of {name!r}"):
                    init = p.init.choose(classifies, run.place == last) if isinstance(p.init, ByPlace) else p.init
                    fill(own[names[run.place][name]], init, draw, backend)
    return parameters, buffers


def fill(view: Array, init: Any, draw: np.random.Generator, backend: Backend) -> None:
    """Write what ``init``, a number or a function, says to an array of parameters."""
    if not callable(init):
        view.fill(init)
        return
    rows = max(1, DRAWN // math.prod(view.shape[1:])) if isinstance(init, Random) else view.shape[0]
    for part in evenly(view.shape[0], rows):
        shape = part.stop - part.start, *view.shape[1:]
        values = init(draw, shape)
        if getattr(values, "shape", None) != shape:
            raise ShapeError(f"it must return an array of shape {shape}, got {getattr(values, 'shape', values)!r}")
        view[part] = backend.asarray(values, view.dtype)
