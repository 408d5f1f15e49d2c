"""Arrays of whatever users give as one: lists, tables, arrays of other libraries; or an error that says why not."""

from __future__ import annotations

import dataclasses
import itertools
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from gpubatch.backend import Array, Backend, from_dlpack, get_backend, is_foreign, unmasked
from gpubatch.errors import ArgumentError, ConversionWarning, DeviceMismatchError, DTypeError, ShapeError, check_bool

__all__ = [
    "ColumnNames",
    "DenseRows",
    "Names",
    "Prepared",
    "SparseMatrix",
    "check_columns",
    "check_kind",
    "check_pairs",
    "checked_array",
    "columns_of",
    "is_sparse",
    "taken",
]

AT_ONCE = 1 << 16  # bytes of a sparse matrix's rows that become dense at a time


class Prepared(ABC):
    """Samples with the recipe by which they were prepared, such as a table: a loader takes them in place of X and Y.

    recipe: prepares other samples in the same way
    """

    recipe: Any

    @abstractmethod
    def as_samples(self) -> tuple[Any, Any]:
        """X and Y, arrays; or a source of pairs or of X alone, and None."""


def checked_array(name: str, x: Any, backend: Backend) -> Array:
    """``x`` as an array on ``backend``, or an array, table or nested list as one on the host; DLPack copies nothing."""
    if not isinstance(x, np.ndarray) and (words := no_array(name, x)):
        raise DTypeError(f"{name} must be {words}")
    unmasked(name, x)
    try:
        with backend.scope():
            x = from_dlpack(x) if is_foreign(x) else x
        array = backend.asarray(x) if backend.owns(x) else get_backend("cpu").asarray(x)
    except DeviceMismatchError as error:
        raise DeviceMismatchError(f"{name} must be a NumPy array or an array on {backend.spec!r}: {error}") from error
    except ValueError as error:
        raise ShapeError(f"{name} must be an array, or nested lists of equal lengths: {error}") from error
    if array.dtype == object and array.ndim and (parts := parts_of(x)):
        array = of_one_type(name, parts, array.ndim)
    if array.dtype == object and array.ndim == 0:
        raise DTypeError(f"{name} must be an array, got {'None' if x is None else f'a {type(x).__name__}'}")
    check_kind(name, array.dtype)
    if array.ndim == 0 or array.size == 0:
        raise ShapeError(f"{name} must hold at least one sample of at least one number, got shape {array.shape}")
    return array


def parts_of(x: Any) -> dict[str, Any]:
    """The columns of a frame by name, or a series under ""; nothing for anything else."""
    if len(getattr(x, "shape", ())) != 2:
        return {"": x} if hasattr(x, "dtype") and not isinstance(x, np.ndarray) else {}
    return {str(name): x.iloc[:, i] if hasattr(x, "iloc") else x[name] for i, name in enumerate(column_names(x))}


def column_names(x: Any) -> Sequence[Any]:
    """The names of the columns of a frame, or of a table of pyarrow's; none for anything else."""
    names = getattr(x, "column_names", getattr(x, "columns", None))
    return () if names is None or callable(names) else names


def of_one_type(name: str, columns: Mapping[str, Any], ndim: int) -> np.ndarray:
    """An array of columns of different types of numbers, such as pandas' own and booleans; NaN for missing values."""
    arrays = {column: array_of(values) for column, values in columns.items()}
    if wrong := [column for column, array in arrays.items() if array.dtype.kind not in "biuf"]:
        if ndim == 1:
            return arrays[wrong[0]]
        shown = ", ".join(map(repr, wrong[:8])) + (f" and {len(wrong) - 8} more" if len(wrong) > 8 else "")
        raise DTypeError(
            f"{name} must hold numbers, and its column{'s' * (len(wrong) > 1)} {shown} hold others; gb.read_table "
            "makes numbers of texts and categories"
        )
    return arrays[""] if ndim == 1 else np.stack(list(arrays.values()), axis=1)


def array_of(values: Any) -> np.ndarray:
    """A column as an array; numbers of pandas' own types become floats."""
    if hasattr(values, "array") and getattr(values.dtype, "kind", "O") in "biuf":
        found: np.ndarray = values.to_numpy(dtype=np.float64, na_value=np.nan)
        return found
    return np.asarray(values)


def taken(name: str, x: Any, backend: Backend) -> Array:
    """``x`` as an array on ``backend``: a list, a table or another library's array on the same device is converted."""
    return x if backend.owns(x) else backend.check(name, checked_array(name, x, backend))


def no_array(name: str, x: Any) -> str:
    """What the argument ``name`` must be, where ``x`` is no array but is often given for one; "" for anything else."""
    kind = type(x).__name__
    if isinstance(x, (str, os.PathLike)):
        path = repr(os.fspath(x))
        return f"an array, got the path {path}; open the file first, as with gb.sources.npy({path}) or np.load"
    if hasattr(x, "toarray"):
        return f"a dense array, got a sparse {kind}; give {name}.toarray()"
    if type(x).__module__.partition(".")[0] == "datasets":
        return f"an array, got a Hugging Face {kind}; give gb.sources.huggingface({name}, columns, label)"
    if type(x).__module__.startswith("gpubatch.") and kind in ("Loader", "Table"):
        of_all = "gb.metrics.measure(net, loader)" if kind == "Loader" else "gb.Model(net, loader=table).predict(table)"
        return f"an array, got a {kind}, whose samples are prepared by batches: {of_all}"
    rows = "an object with __len__ and read(indices)"
    if type(x).__module__.startswith("torch.utils.data"):
        return f"an array, got PyTorch's {kind}; give its tensors, as of TensorDataset.tensors, or {rows}"
    if isinstance(x, Mapping):
        return f"an array, got a {kind} with the keys {', '.join(map(repr, list(x)[:5]))}; give one of its arrays"
    if isinstance(x, Iterator):
        return f"an array, got a {kind}, whose samples come only in turn; give np.stack(list({name})), or {rows}"
    if isinstance(x, (tuple, list)) and len(x) == 2 and all(hasattr(part, "shape") for part in x):
        shapes = [tuple(part.shape) for part in x]
        if shapes[0] != shapes[1]:
            return f"one array, got a pair of arrays of shapes {shapes}; give X and Y apart: X, Y"
    return ""


def check_kind(name: str, dtype: np.dtype[Any]) -> None:
    """Raise ``DTypeError`` unless batches can be made of elements of ``dtype``."""
    if dtype.kind not in "biuf" or dtype.itemsize > 8:
        it = name if name.isidentifier() else "x"
        hint = {
            **dict.fromkeys("UST", f"; numbers for words are np.unique({it}, return_inverse=True)[1]"),
            "O": f"; numbers for words are np.unique({it}, return_inverse=True)[1], objects that are numbers "
            f"{it}.astype('float64'), and gb.read_table(frame) takes columns of both",
            "c": f"; real and imaginary parts are np.concatenate([{it}.real, {it}.imag], axis=-1)",
            **dict.fromkeys("mM", f"; days are ({it} - {it}.min()) / np.timedelta64(1, 'D')"),
            "V": "; fields as columns are numpy.lib.recfunctions.structured_to_unstructured",
            "f": f"; give {it}.astype('float64')",
        }.get(dtype.kind, "")
        raise DTypeError(f"{name} must hold integers, booleans, float16, float32 or float64, got dtype {dtype}{hint}")


# --- what frames have and arrays do not: names and an index ---------------------------------------------------------


def check_pairs(names: Sequence[str], given: Sequence[Any]) -> None:
    """Raise ArgumentError where frames or series of pandas have the same index in different orders."""
    indices = [(name, x.index) for name, x in zip(names, given, strict=True) if hasattr(x, "iloc")]
    for (name, first), (other, index) in itertools.pairwise(indices):
        if len(first) != len(index) or first.equals(index) or not (first.is_unique and index.is_unique):
            continue
        if first.isin(index).all():
            raise ArgumentError(
                f"{name} and {other} have the same index in different orders, and samples are paired by their places: "
                f"give {other}.loc[{name}.index], or {other}.to_numpy() where the places are right"
            )


Names: TypeAlias = tuple[str | int | tuple[str | int, ...], ...]


def columns_of(x: Any) -> Names | None:
    """The names of the columns of a frame; None for an array, and for columns numbered 0, 1, ... in this order."""
    if len(getattr(x, "shape", None) or ()) != 2:
        return None
    names = tuple(column_names(x))
    flat = [part for name in names for part in (name if isinstance(name, tuple) else (name,))]
    return names if names != tuple(range(len(names))) and all(isinstance(part, (str, int)) for part in flat) else None


def check_columns(name: str, own: Names | None, known: Names | None) -> None:
    """Raise ArgumentError where a frame has not the columns of training, ``known``, in this order."""
    if own is None or own == known:
        return
    if known is None:
        known = tuple(range(len(own)))  # as an array's
        if {*own} != {*known}:
            return
    if {*own} == {*known} and len(own) == len(known):
        raise ArgumentError(f"{name} has the columns of training in another order: give {name}[{list(known)}]")
    missing = [column for column in known if column not in own]
    raise ArgumentError(
        f"{name} must have the columns of training, {list(known)}; it has {list(own)}"
        + (f", and lacks {missing}" if missing else "")
    )


@dataclasses.dataclass(frozen=True)
class ColumnNames:
    """The names of the columns of a training's X and Y, with which frames are compared.

    table: whether X was a table of gpubatch's, which made other columns
    """

    X: Names | None = None
    Y: Names | None = None
    table: bool = False

    @classmethod
    def of(cls, X: Any, Y: Any) -> ColumnNames:
        """The names of what a loader is given."""
        return cls(columns_of(X), columns_of(Y), isinstance(X, Prepared))

    def check(self, names: Sequence[str], X: Any, Y: Any = None) -> None:
        """Raise ArgumentError for frames with other columns, or columns or samples in another order."""
        own = columns_of(X)
        if self.table and own is not None:
            raise ArgumentError(
                f"{names[0]} must be a table here, or an array prepared as one, since the network was trained on a "
                f"table; a {type(X).__name__} goes to gb.Model(net, table), or to gb.read_table({names[0]}, like=table)"
            )
        check_columns(names[0], own, self.X)
        if Y is not None:
            check_columns(names[1], columns_of(Y), self.Y)
            check_pairs(names, (X, Y))

    @classmethod
    def from_json(cls, found: Any) -> ColumnNames:
        """The names in a file. Raises TypeError or LookupError for anything else."""
        return cls(names_in(found["X"]), names_in(found["Y"]), check_bool("table", found["table"]))


def names_in(found: Any) -> Names | None:
    """Names of columns in a file, where names of several levels are lists."""
    if found is None:
        return None
    names = tuple(tuple(name) if isinstance(name, list) else name for name in found)
    if wrong := [x for x in names if not isinstance(x, (str, int, tuple))]:
        raise TypeError(f"{str(wrong[0])[:99]} is no name of a column")
    return names


# --- sparse matrices ----------------------------------------------------------------------------------------------


def is_sparse(x: Any) -> bool:
    """Whether ``x`` is a sparse matrix or a sparse array of SciPy's."""
    return hasattr(x, "tocsr") and any(kind.__module__.startswith("scipy.sparse") for kind in type(x).__mro__)


class SparseMatrix:
    """The rows of a sparse matrix of SciPy's as a source, which makes only the rows dense that are read.

    name: the argument, for messages
    matrix: of any of SciPy's formats. A matrix of rows (CSR) is not copied; another is converted to one, with a
        ConversionWarning. Entries of one place are added, as ``toarray`` does.
    """

    def __init__(self, name: str, matrix: Any) -> None:
        if len(matrix.shape) != 2:
            raise ShapeError(f"{name} must be (samples, features) where it is sparse, got shape {matrix.shape}")
        check_kind(name, matrix.dtype)
        if matrix.format != "csr":
            warnings.warn(
                f"{name} is a sparse {type(matrix).__name__}, whose rows do not lie together: it is copied; give "
                f"{name}.tocsr()",
                ConversionWarning,
                stacklevel=2,
            )
        rows = matrix.tocsr()
        # A matrix of its own on the same memory, since the check below may write attributes.
        self._rows = type(rows)((rows.data, rows.indices, rows.indptr), shape=rows.shape)
        try:
            self._rows.check_format(full_check=True)  # SciPy's compiled code trusts the indices
        except ValueError as error:
            raise ShapeError(f"{name} is no whole {type(rows).__name__}: {error}") from error
        self.shape, self.dtype = tuple(rows.shape), rows.dtype
        longest = int(np.diff(rows.indptr).max(initial=0))
        self._at_once = max(1, AT_ONCE // (longest * (rows.dtype.itemsize + rows.indices.itemsize) + 16))

    def __len__(self) -> int:
        """How many rows there are."""
        return int(self.shape[0])

    def read(self, indices: np.ndarray, /) -> np.ndarray:
        """The rows at ``indices``, dense."""
        out = np.empty((len(indices), self.shape[1]), self.dtype)
        self.read_into(indices, out)
        return out

    def read_into(self, indices: np.ndarray, out: np.ndarray, /) -> None:
        """Write the rows at ``indices`` into ``out``, C-contiguous."""
        for start in range(0, len(indices), self._at_once):
            part = slice(start, start + self._at_once)
            self._rows[indices[part]].toarray(out=out[part])


class DenseRows:
    """A sparse matrix for evaluation: slices of its rows are dense arrays of ``dtype`` on ``backend``."""

    ndim = 2

    def __init__(self, matrix: SparseMatrix, backend: Backend, dtype: np.dtype[Any]) -> None:
        self._matrix, self._backend, self.dtype, self.shape = matrix, backend, dtype, matrix.shape
        self.size = matrix.shape[0] * matrix.shape[1]

    def __len__(self) -> int:
        """How many rows there are."""
        return len(self._matrix)

    def __getitem__(self, rows: slice) -> Array:
        """A slice of rows."""
        found = self._matrix.read(np.arange(*rows.indices(len(self))))
        with self._backend.scope(), np.errstate(over="ignore"):
            return self._backend.asarray(found, self.dtype)
