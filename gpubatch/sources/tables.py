"""Tables whose rows are samples: Parquet and Arrow by pyarrow, HDF5 by h5py."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gpubatch.errors import ArgumentError, DataFormatError, DTypeError, ShapeError, check_bool
from gpubatch.inputs import check_kind
from gpubatch.sources.files import check_exists, flat, naming_the_file, runs_of
from gpubatch.sources.reader import Source

__all__ = ["arrow", "hdf5", "parquet"]


def parquet(path: str | os.PathLike[str], columns: str | Sequence[str] | None, label: str | None = None) -> Source:
    """The rows of a Parquet file, of which a row group is decoded at a time; needs pyarrow.

    x has the columns side by side, with ``columns=None`` all but the label: (samples, columns), each of them numbers;
    or, of one column of lists, (samples, length of the lists); or, where ``columns`` is a string, (samples,) or that
    column's lists. With ``label`` pairs (x, y) are read. Missing values are errors.
    """
    pq = _need("pyarrow.parquet")
    check_exists(path)
    with naming_the_file(path, "a Parquet file"):
        file = pq.ParquetFile(os.fspath(path))
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
        names = list(file.schema_arrow.names)
    return _Table(path, columns, label, names, sizes, lambda group, chosen: file.read_row_group(group, columns=chosen))


def arrow(path: str | os.PathLike[str], columns: str | Sequence[str] | None, label: str | None = None) -> Source:
    """The rows of an Arrow IPC file (Feather 2), of which a record batch is read at a time; as :func:`parquet`."""
    pa = _need("pyarrow")
    check_exists(path)
    with naming_the_file(path, "an Arrow file"):
        names = list(pa.ipc.open_file(pa.OSFile(os.fspath(path))).schema.names)
    chosen = _columns(path, columns, label, names)
    with naming_the_file(path, "an Arrow file"):
        options = pa.ipc.IpcReadOptions(included_fields=sorted(names.index(name) for name in chosen))
        file = pa.ipc.open_file(pa.OSFile(os.fspath(path)), options=options)
        # The footer of an Arrow file does not say how many rows a batch has: one column of each is read for that.
        short = pa.ipc.IpcReadOptions(included_fields=[names.index(chosen[-1])])
        counted = pa.ipc.open_file(pa.OSFile(os.fspath(path)), options=short)
        sizes = [counted.get_batch(group).num_rows for group in range(counted.num_record_batches)]
    load: Callable[[int, list[str]], Any] = lambda group, wanted: pa.Table.from_batches(  # noqa: E731
        [file.get_batch(group)]
    ).select(wanted)
    return _Table(path, columns, label, names, sizes, load)


class _Table:
    """Columns of a file of row groups; the group that was decoded last is kept."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        columns: str | Sequence[str] | None,
        label: str | None,
        names: list[str],
        sizes: list[int],
        load: Callable[[int, list[str]], Any],
    ) -> None:
        self.path = os.fspath(path)
        chosen = _columns(path, columns, label, names)
        self._x, self._y = chosen[: len(chosen) - (label is not None)], label
        self._chosen = list(dict.fromkeys(chosen))  # the label may be among the columns
        self._single, self._load = isinstance(columns, str), load
        self._starts = np.cumsum([0, *sizes])
        self.block = max(sizes, default=1) or 1
        self._group, self._kept = -1, list[np.ndarray]()
        self._widths: dict[str, int] = {}

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, indices: np.ndarray, /) -> Any:
        """The rows at ``indices``: x, or (x, y)."""
        groups = np.searchsorted(self._starts, indices, side="right") - 1
        out: list[np.ndarray] = []
        for group in np.unique(groups):
            if group != self._group:
                self._kept, self._group = [], -1  # one group at a time
                self._kept, self._group = self._decode(int(group)), int(group)
            here = np.flatnonzero(groups == group)
            for number, array in enumerate(self._kept):
                if number == len(out):
                    out.append(np.empty((len(indices), *array.shape[1:]), array.dtype))
                out[number][here] = array[indices[here] - self._starts[group]]
        return tuple(out) if self._y is not None else out[0]

    def _decode(self, group: int) -> list[np.ndarray]:
        start, stop = int(self._starts[group]), int(self._starts[group + 1])
        with naming_the_file(self.path, f"whole samples {start} to {stop - 1}"):
            table = self._load(group, self._chosen)
            table.validate(full=True)
        if len(table) != stop - start:
            raise DataFormatError(f"{self.path}: expected {stop - start} samples from {start} on, found {len(table)}")
        arrays = [self._numbers(name, table[name], start) for name in self._x]
        x = arrays[0]
        if len(arrays) > 1 or (x.ndim == 1 and not self._single):
            x = (
                np.stack(arrays, axis=1)
                if all(a.ndim == 1 for a in arrays)
                else np.concatenate([a.reshape(len(a), -1) for a in arrays], axis=1)
            )
        return [x] if self._y is None else [x, self._numbers(self._y, table[self._y], start)]

    def _numbers(self, name: str, column: Any, start: int) -> np.ndarray:
        """A column, or the lists of one, as an array; an error for what is missing or not a number."""
        pa = _need("pyarrow")
        array = column.combine_chunks()
        array = pa.concat_arrays(array.chunks) if isinstance(array, pa.ChunkedArray) else array
        self._complete(name, array, start)
        kind, width = array.type, 0
        if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
            lengths = array.value_lengths().to_numpy(zero_copy_only=False)
            width = self._widths.setdefault(name, int(lengths[0]))
            if (wrong := np.flatnonzero(lengths != width)).size:
                raise DataFormatError(
                    f"{self.path}: expected lists of {width} numbers in column {name!r}, found {lengths[wrong[0]]} in "
                    f"sample {start + wrong[0]}"
                )
            array, kind = array.flatten(), kind.value_type
            self._complete(name, array, start, width)
        if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)):
            raise DTypeError(
                f"{self.path}: column {name!r} must hold numbers or lists of one length of numbers, got {kind}"
            )
        values: np.ndarray = array.to_numpy(zero_copy_only=False)
        return values.reshape(-1, width) if width else values

    def _complete(self, name: str, array: Any, start: int, width: int = 1) -> None:
        if array.null_count:
            first = int(np.flatnonzero(array.is_null().to_numpy(zero_copy_only=False))[0]) // width
            raise DataFormatError(
                f"{self.path}: expected numbers, found a missing value in column {name!r}, sample {start + first}"
            )


def _columns(
    path: str | os.PathLike[str], columns: str | Sequence[str] | None, label: str | None, names: list[str]
) -> list[str]:
    """The columns of x and then the label's, if the file has them."""
    if columns is None:
        columns = [name for name in names if name != label]
    chosen = [columns] if isinstance(columns, str) else list(columns)
    if not chosen:
        raise ArgumentError(f"columns must name at least one column of {os.fspath(path)}, got {columns!r}")
    chosen += [] if label is None else [label]
    for name in chosen:
        if name not in names:
            raise ArgumentError(f"{os.fspath(path)} has the columns {', '.join(names)}; got {name!r}")
        if names.count(name) > 1:
            raise DataFormatError(f"{os.fspath(path)}: expected one column {name!r}, found {names.count(name)}")
    return chosen


# --- HDF5 ---------------------------------------------------------------------------------------------------------


def hdf5(path: str | os.PathLike[str], dataset: str, label: str | None = None, *, flatten: bool = False) -> Source:
    """The rows of a dataset in an HDF5 file, or with the dataset ``label`` pairs (x, y); needs h5py.

    ``flatten=True`` makes the samples of ``dataset``, such as images, one-dimensional.
    """
    h5py = _need("h5py")
    check_exists(path)
    with naming_the_file(path, "an HDF5 file"):
        file = h5py.File(path, "r")
    chosen = []
    for name in (dataset, *([] if label is None else [label])):
        with naming_the_file(path, f"the dataset {name!r}"):
            found = file.get(name)
            if isinstance(found, h5py.Dataset) and not found.shape:
                raise DataFormatError(f"{os.fspath(path)}: expected samples, found a single number in {name!r}")
            if not isinstance(found, h5py.Dataset):
                raise ArgumentError(
                    f"{os.fspath(path)} has the datasets {', '.join(_datasets(file)) or '(none)'}; got {name!r}"
                )
            if found.file != file or found.external or found.is_virtual:
                raise DataFormatError(
                    f"{os.fspath(path)}: expected samples in the file itself, found {name!r} to be kept in another file"
                )
            check_kind(f"{os.fspath(path)}: {name!r}", found.dtype)
            chosen.append(found)
    if len({len(found) for found in chosen}) > 1:
        lengths = " and ".join(f"{found.name!r} of shape {found.shape}" for found in chosen)
        raise ShapeError(f"{os.fspath(path)}: datasets must have equal numbers of samples, got {lengths}")
    return _Datasets(path, file, chosen, check_bool("flatten", flatten))


def _datasets(group: Any) -> list[str]:
    found: list[str] = []
    group.visititems(lambda name, item: found.append(name) if getattr(item, "shape", ()) else None)
    return found


class _Datasets:
    """Datasets of an HDF5 file."""

    def __init__(self, path: str | os.PathLike[str], file: Any, datasets: list[Any], flatten: bool) -> None:
        self._flatten = flatten
        self.path, self._file, self._datasets, self._n = os.fspath(path), file, datasets, len(datasets[0])
        self.block = max(1 if dataset.chunks is None else int(dataset.chunks[0]) for dataset in datasets)

    def __len__(self) -> int:
        return self._n

    def read(self, indices: np.ndarray, /) -> Any:
        """The rows at ``indices``; neighbours in one piece, in the order of the file."""
        places, back = np.unique(indices, return_inverse=True)
        out = []
        for dataset in self._datasets:
            array = np.empty((len(places), *dataset.shape[1:]), dataset.dtype)
            for first, start, stop in runs_of(places):
                last = first + stop - start - 1
                with naming_the_file(self.path, f"samples {first} to {last} of {dataset.name!r}"):
                    dataset.read_direct(array, np.s_[first : last + 1], np.s_[start:stop])
            out.append(array if len(places) == len(indices) and np.array_equal(places, indices) else array[back])
        out[0] = out[0].reshape(flat(out[0].shape, self._flatten))
        return tuple(out) if len(out) > 1 else out[0]


def _need(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        library = module.partition(".")[0]
        raise ArgumentError(
            f"this kind of file needs {library}, which is not installed: pip install 'gpubatch[data]'"
        ) from error
