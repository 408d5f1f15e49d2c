"""Samples that are not the loader's, for validation and prediction: converted and prepared as its batches are."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpubatch.backend import Array
from gpubatch.errors import ArgumentError, ShapeError
from gpubatch.inputs import Prepared, checked_array
from gpubatch.loader.columns import Columns
from gpubatch.sources import check_finite, convert


def columns_like(columns: Columns, X: Any, Y: Any) -> Columns:
    """Columns of other samples, which are converted and prepared as those of ``columns`` are, and not augmented."""
    options: dict[str, Any] = {"backend": columns.backend, "sample_axis": columns.sample_axis, "dtype": columns.dtype}
    other, prepare = Columns(X, Y, **options), columns.functions.prepare
    if _is_ready(columns, other.source_dtype) or (columns.scale is None and prepare is None):
        return other
    if prepare is not None:
        options |= {"prepare": prepare.function, "prepare_name": prepare.name}
    return Columns(X, Y, scale=columns.scale, **options)


def converted(
    columns: Columns, X: Any, Y: Any = None, names: tuple[str, str] = ("X", "Y"), most: int | None = None
) -> Any:
    """``X`` in its own layout, or (X, Y), converted and prepared; X itself where nothing is to be done.

    names: those of the arguments, for messages
    most: the samples that ``prepare`` gets at a time; None: all
    """
    x, prepare, turn = columns[0], columns.functions.prepare, columns.functions.turn
    backend, dtype = columns.backend, columns.dtype
    if isinstance(X, Prepared):
        X, Y = columns.apart(X, Y, names[0])
    columns.names.check(names, X, Y)
    array = checked_array(names[0], X, backend)
    ready = _is_ready(columns, array.dtype)
    if array.ndim < 1 + x.axis or (
        turn(array).shape[1:] != x.source.sample_shape and not (ready and prepare is not None)
    ):
        raise ShapeError(
            f"{names[0]} must have samples of shape {x.source.sample_shape} along axis {x.axis}, as the loader's X "
            f"has, got shape {array.shape}"
        )
    scale = None if ready else x.scale
    check_finite(names[0], array, dtype, scale, backend)
    given = [array]
    if Y is not None:
        given.append(checked_array(names[1], Y, backend))
        check_finite(names[1], given[1], given[1].dtype, None, backend)
        axis = x.axis if given[1].ndim > 1 else 0
        if given[1].shape[axis] != array.shape[x.axis]:
            raise ShapeError(
                f"{names[0]} and {names[1]} must have equal numbers of samples, got shapes {array.shape} and "
                f"{given[1].shape}"
            )
    if prepare is not None and prepare.takes > len(given) and not ready:
        raise ArgumentError(f"{prepare.name} takes x and y, so to_batch needs both: to_batch(X, Y)")
    with backend.scope():
        if prepare is None or ready:
            found = [backend.asarray(one) for one in given]
            found[0] = convert(found[0], dtype, scale)
        else:
            found = [turn(one) for one in _prepared(columns, [turn(one) for one in given], most or len(turn(array)))]
    return found[0] if len(found) == 1 else tuple(found)


def _is_ready(columns: Columns, dtype: np.dtype[Any]) -> bool:
    """Whether samples of ``dtype`` are prepared already: floats where the loader has integers, such as pixels."""
    return dtype.kind == "f" and columns.source_dtype.kind != "f"


def _prepared(columns: Columns, rows: list[Array], most: int) -> list[Array]:
    """Rows, converted and prepared, ``most`` at a time."""
    backend, functions, made = columns.backend, columns.functions, list[Array]()
    for start in range(0, len(rows[0]), most):
        part = [backend.asarray(array[start : start + most]).copy() for array in rows]  # ``prepare`` may change them
        part[0] = convert(part[0], columns.dtype, columns[0].scale)
        found = [functions.turn(array) for array in functions.prepared(part)]
        if len(rows[0]) <= most:
            return found
        if not made:
            made = [backend.empty((len(rows[0]), *array.shape[1:]), array.dtype) for array in found]
        for whole, array in zip(made, found, strict=True):
            whole[start : start + most] = array
    return made
