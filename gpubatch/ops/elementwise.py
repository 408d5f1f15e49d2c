"""Activations and biases: one number in, one number out, and sums of gradients over the batch."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from gpubatch.backend import Array, compute_dtype
from gpubatch.formula import BoundActivation, activations
from gpubatch.ops.compile import scalars_source, source_of
from gpubatch.ops.grid import PARTS, Grid, check_contiguous, parts_of
from gpubatch.ops.host_compiler import place_of
from gpubatch.ops.operation import COMPUTE, Work, operation
from gpubatch.ops.program import MOST_PROGRAMS, program_of

IDENTITY = activations.identity.bind()


@operation("y", "work.slope")
def activate(f: BoundActivation, x: Array, b: Array | None, y: Array, work: Work) -> None:
    """y = f(x + b), and ``work["slope"]`` = f'(x + b) where ``f.keeps``; b is ``(features,)``. x may be y."""
    if b is not None:
        x = np.add(x, b, out=y)
    if x is y and f == IDENTITY:
        return
    kept = [work["slope"]] if f.keeps else []
    if x is y or np.may_share_memory(x, y):
        program_of(f, "forward", y.dtype, ("y", "x")).run(y, *kept)
    else:
        program_of(f, "forward", y.dtype).run(x, y, *kept)


@activate.compiled
def compiled_activate(library: Any, f: BoundActivation, x: Array, b: Array | None, y: Array, work: Work) -> None:
    """One pass."""
    place, forward, _ = activation_place(library, library.level(), f, y.dtype)
    if place < 0 or not library.activate(place, forward, x, b, y, work["slope"] if f.keeps else None):
        activate.numpy(f, x, b, y, work)


@activate.cuda
def cuda_activate(grid: Grid, f: BoundActivation, x: Array, b: Array | None, y: Array, work: Work) -> None:
    """One launch."""
    check_contiguous("x", x)
    slope = work["slope"] if f.keeps else None
    grid.on_tiles(elementwise_source(grid.dtype.name, f), "activate", x.shape, (x, b, y, slope))


@operation("dx", "db", scratch=lambda features: {"partial": ((PARTS, features), COMPUTE)})
def activation_gradient(
    f: BoundActivation, y: Array, dy: Array, dx: Array | None, db: Array | None, work: Work
) -> None:
    """dx = dy f'(x + b), by y or ``work["slope"]``, and db = Σ dx over the rows, or None.

    dx may be dy; with the identity it may be None. Without db there is no scratch.
    """
    if dx is not None:
        kept = [work["slope"]] if f.keeps else [y] if f.reads_y else []
        if dx is dy or np.may_share_memory(dx, dy):
            program_of(f, "backward", dx.dtype, ("dx", "dy")).run(*kept, dx)
        else:
            program_of(f, "backward", dx.dtype).run(*kept, dy, dx)
        dy = dx
    if db is not None:
        dy.sum(axis=0, out=db)


@activation_gradient.compiled
def compiled_activation_gradient(
    library: Any, f: BoundActivation, y: Array, dy: Array, dx: Array | None, db: Array | None, work: Work
) -> None:
    """One pass, whose sums are added up afterwards."""
    place, _, backward = activation_place(library, library.level(), f, dy.dtype)
    kept, partial = work["slope"] if f.keeps else y, work.get("partial")
    if place < 0 or not library.activation_gradient(place, backward, kept, dy, dx, db, partial):
        activation_gradient.numpy(f, y, dy, dx, db, work)


@activation_gradient.cuda
def cuda_activation_gradient(
    grid: Grid, f: BoundActivation, y: Array, dy: Array, dx: Array | None, db: Array | None, work: Work
) -> None:
    """One launch, and one more where there are many rows to sum."""
    if dx is None:
        f = IDENTITY
    source = elementwise_source(grid.dtype.name, f)
    kept = work["slope"] if f.keeps else y
    if db is None:
        grid.on_tiles(source, "activation_gradient", dy.shape, (kept, dy, dx, None, None))
        return
    parts, partial = parts_of(dy.shape), work["partial"]
    sums = (None, db) if parts == 1 else (partial, None)
    grid.sum_columns(source, "activation_gradient", dy.shape, (kept, dy, dx, *sums))
    if parts > 1:
        grid.add_partial(partial, parts, 1.0, db)


@functools.lru_cache(maxsize=MOST_PROGRAMS)
def activation_place(
    library: Any, level: str, f: BoundActivation, dtype: np.dtype[Any]
) -> tuple[int, tuple[float, ...], tuple[float, ...]]:
    """Where the library has an activation at this SIMD ``level``, -1 for nowhere; and the scalars of its two forms."""
    form, place = f.declared.form("float64"), place_of(library, f.declared, dtype.name)
    return place.number, f.scalars(form.forward), f.scalars(form.backward)


@functools.lru_cache(maxsize=MOST_PROGRAMS)
def elementwise_source(dtype: str, f: BoundActivation) -> str:
    """The CUDA source of an activation and its gradient."""
    compute = compute_dtype(np.dtype(dtype)).name
    form = f.declared.form(compute)
    before = [
        scalars_source("FORWARD_SCALARS", f.scalars(form.forward)),
        scalars_source("BACKWARD_SCALARS", f.scalars(form.backward)),
        f.declared.source(compute, "Activation"),
    ]
    return source_of(dtype, "activation.cu", before="\n".join(before))
