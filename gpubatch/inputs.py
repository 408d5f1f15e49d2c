"""Whatever users give as an array, as an array: lists, tables, arrays of other libraries; or in words, why not."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from gpubatch.backend import Array, Backend, from_dlpack, get_backend, is_foreign, unmasked
from gpubatch.errors import DeviceMismatchError, DTypeError, ShapeError

__all__ = ["check_kind", "checked_array", "taken"]


def checked_array(name: str, x: Any, backend: Backend) -> Array:
    """``x`` as an array on ``backend``, or an array, table or nested list as one on the host; DLPack copies nothing."""
    if not isinstance(x, np.ndarray):
        refuse(name, x)
    unmasked(name, x)
    try:
        with backend.scope():
            x = from_dlpack(x) if is_foreign(x) else x
        array = backend.asarray(x) if backend.owns(x) else get_backend("cpu").asarray(x)
    except DeviceMismatchError as error:
        raise DeviceMismatchError(f"{name} must be a NumPy array or an array on {backend.spec!r}: {error}") from error
    except ValueError as error:
        raise ShapeError(f"{name} must be an array, or nested lists of equal lengths: {error}") from error
    check_kind(name, array.dtype)
    if array.ndim == 0 or array.size == 0:
        raise ShapeError(f"{name} must hold at least one sample of at least one number, got shape {array.shape}")
    return array


def taken(name: str, x: Any, backend: Backend) -> Array:
    """``x`` as an array on ``backend``: a list, a table or another library's array on the same device is converted."""
    return x if backend.owns(x) else backend.check(name, checked_array(name, x, backend))


def refuse(name: str, x: Any) -> None:
    """Raise for what is no array but often given for one, and say what to do."""
    kind = type(x).__name__
    if isinstance(x, (str, os.PathLike)):
        raise DTypeError(
            f"{name} must be an array, got the path {os.fspath(x)!r}; open the file first, as with "
            f"gb.sources.npy({os.fspath(x)!r}) or np.load"
        )
    if hasattr(x, "toarray"):
        raise DTypeError(f"{name} must be a dense array, got a sparse {kind}; give {name}.toarray()")
    if isinstance(x, Mapping):
        names = ", ".join(map(repr, list(x)[:5]))
        raise DTypeError(f"{name} must be an array, got a {kind} with the keys {names}; give one of its arrays")
    if isinstance(x, Iterator):
        raise DTypeError(
            f"{name} must be an array, got a {kind}, whose samples come only in turn; give np.stack(list({name})), or "
            "an object with __len__ and read(indices)"
        )
    if isinstance(x, (tuple, list)) and len(x) == 2 and all(hasattr(part, "shape") for part in x):
        shapes = [tuple(part.shape) for part in x]
        if shapes[0] != shapes[1]:
            raise DTypeError(
                f"{name} must be one array, got a pair of arrays of shapes {shapes}; give X and Y apart: X, Y"
            )


def check_kind(name: str, dtype: np.dtype[Any]) -> None:
    """Raise ``DTypeError`` unless batches can be made of elements of ``dtype``."""
    if dtype.kind not in "biuf" or dtype.itemsize > 8:
        hint = ""
        if dtype.kind in "USOT":
            hint = f"; numbers for words are np.unique({name}, return_inverse=True)[1]"
        raise DTypeError(f"{name} must hold integers, booleans, float16, float32 or float64, got dtype {dtype}{hint}")
