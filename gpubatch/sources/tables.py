"""Tables whose rows are samples: Parquet and Arrow by pyarrow, HDF5 by h5py."""

from __future__ import annotations

import io
import math
import os
import struct
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple, Protocol

import numpy as np

from gpubatch.errors import ArgumentError, DTypeError, ShapeError, check_bool, needed, unexpected
from gpubatch.inputs import check_kind
from gpubatch.sources.opener import BytesByPlace, LocalFile, Opener, Reopened, opener_of
from gpubatch.sources.reader import Form, InTurn, Source
from gpubatch.sources.rows import check_exists, copy_rows, flat, in_order_of_use, naming_the_file, runs_of

ARROW_MAGIC = b"ARROW1"
BETWEEN = 1 << 16  # bytes between two columns that are read, too, since a second request takes longer
RECORD_BATCH = 3  # a kind of Arrow message


def parquet(
    path: str | os.PathLike[str] | Opener, columns: str | Sequence[str] | None, label: str | None = None
) -> Source:
    """The rows of a Parquet file, one row group decoded at a time; needs pyarrow.

    columns: names of columns of numbers, for x (samples, columns); or of one column of lists of one length, for x
        (samples, length); a string: one column, for x (samples,) or its lists; None: all columns but the label
    label: the column of y, for pairs (x, y); None: x alone

    Raises DataFormatError for missing values.
    """
    _need("pyarrow.parquet")
    return _Table(opener_of(path), columns, label, ParquetGroups)


def arrow(
    path: str | os.PathLike[str] | Opener, columns: str | Sequence[str] | None, label: str | None = None
) -> Source:
    """The rows of an Arrow IPC file (Feather 2) or stream, one record batch read at a time; needs pyarrow.

    columns, label: as in :func:`parquet`

    Opening the file reads the headers of its record batches alone, which have the numbers of rows.
    """
    _need("pyarrow")
    return _Table(opener_of(path), columns, label, opened_arrow)


class Grouped(Protocol):
    """An open file of groups of rows.

    fields: the names and types of its columns
    sizes: the number of rows in each group
    data_bytes: about the bytes of all groups in memory
    """

    fields: list[tuple[str, Any]]
    sizes: list[int]
    data_bytes: int

    def load(self, group: int, chosen: list[str]) -> Any:
        """The ``chosen`` columns of a group, as a table."""

    def expect(self, group: int, chosen: list[str]) -> None:
        """Start reading a group's columns ahead where that pays."""

    def close(self) -> None:
        """Close the file."""


class ParquetGroups:
    """A Parquet file, whose row groups are the groups."""

    def __init__(self, file: Opener) -> None:
        with naming_the_file(file.path, "a Parquet file"):
            self._below = _for_arrow(file)
            # Columns that are read ahead take their memory twice, which pays where reading takes long.
            ahead = not isinstance(file, LocalFile)
            self._file = _need("pyarrow.parquet").ParquetFile(self._below, pre_buffer=ahead)
            metadata = self._file.metadata
            groups = [metadata.row_group(group) for group in range(metadata.num_row_groups)]
            self.sizes = [group.num_rows for group in groups]
            if sum(self.sizes) != metadata.num_rows:
                raise ValueError(f"{sum(self.sizes)} rows in all row groups, {metadata.num_rows} in the file")
            self.data_bytes = sum(group.total_byte_size for group in groups)
            self.fields = [(field.name, field.type) for field in self._file.schema_arrow]

    def load(self, group: int, chosen: list[str]) -> Any:
        """See :class:`Grouped`."""
        return self._file.read_row_group(group, columns=chosen)

    def expect(self, group: int, chosen: list[str]) -> None:
        """See :class:`Grouped`."""
        if not hasattr(self._below, "expect"):
            return
        found, spans = self._file.metadata.row_group(group), list[tuple[int, int]]()
        for column in map(found.column, range(found.num_columns)):
            if column.path_in_schema.partition(".")[0] in chosen:
                start = column.dictionary_page_offset or column.data_page_offset
                spans.append((start, start + column.total_compressed_size))
        start, stop = min(spans)
        for first, last in sorted(spans):
            if first - stop > BETWEEN:
                self._below.expect(start, stop)
                start = first
            stop = last
        self._below.expect(start, stop)

    def close(self) -> None:
        """See :class:`Grouped`."""
        self._file.close(force=True)


def opened_arrow(file: Opener) -> Grouped:
    """An Arrow file or stream."""
    with naming_the_file(file.path, "an Arrow file"):
        with file.open() as opened:
            is_file = opened.read(len(ARROW_MAGIC)) == ARROW_MAGIC
        return _ArrowFile(file) if is_file else _ArrowStream(file)


class _ArrowFile:
    """An Arrow file, whose record batches are the groups."""

    def __init__(self, file: Opener) -> None:
        pa, self._readers = _need("pyarrow"), dict[tuple[str, ...], Any]()
        self._below = None if isinstance(file, LocalFile) else file.open()
        self._file = pa.OSFile(file.path) if self._below is None else pa.PythonFile(self._below, mode="r")
        try:
            self._look_through(file)
        except BaseException:
            self.close()
            raise

    def _look_through(self, file: Opener) -> None:
        pa = _need("pyarrow")
        self.fields = [(field.name, field.type) for field in pa.ipc.open_file(self._file).schema]
        # The footer does not have the number of rows of a batch; its header does.
        self._batches = arrow_batches(file, 8)
        self.sizes, self.data_bytes = [batch.rows for batch in self._batches], data_bytes(self._batches)
        if (count := pa.ipc.open_file(self._file).num_record_batches) != len(self.sizes):
            raise unexpected(file.path, f"{count} record batches", len(self.sizes))

    def load(self, group: int, chosen: list[str]) -> Any:
        """See :class:`Grouped`."""
        pa = _need("pyarrow")
        if (reader := self._readers.get(tuple(chosen))) is None:
            reader = pa.ipc.open_file(self._file, options=_included(self.fields, chosen))
            self._readers = {tuple(chosen): reader}
        return pa.Table.from_batches([reader.get_batch(group)]).select(chosen)

    def expect(self, group: int, chosen: list[str]) -> None:
        """See :class:`Grouped`."""
        if self._below is not None and hasattr(self._below, "expect"):
            self._below.expect(self._batches[group].start, self._batches[group].stop)

    def close(self) -> None:
        """See :class:`Grouped`."""
        self._readers.clear()
        self._file.close()


class _ArrowStream:
    """An Arrow stream, whose record batches are the groups, found by their headers."""

    def __init__(self, file: Opener) -> None:
        pa = _need("pyarrow")
        self._batches = arrow_batches(file, 0)
        self.sizes, self.data_bytes = [batch.rows for batch in self._batches], data_bytes(self._batches)
        # The schema and the dictionaries, which every batch needs.
        head = self._batches[0].start if self._batches else file.size()
        self._bytes = BytesByPlace(file.open())
        try:
            self._head = self._read(0, head)
            schema = pa.ipc.open_stream(pa.py_buffer(self._head)).schema
        except BaseException:
            self._bytes.close()
            raise
        self.fields = [(field.name, field.type) for field in schema]

    def _read(self, start: int, stop: int, before: bytes | bytearray = b"") -> bytearray:
        out = bytearray(len(before) + stop - start)
        out[: len(before)] = before
        with memoryview(out)[len(before) :] as rest:
            if (count := self._bytes.read_into(rest, start)) < stop - start:
                raise EOFError(f"it ends at byte {start + count}")
        return out

    def load(self, group: int, chosen: list[str]) -> Any:
        """See :class:`Grouped`."""
        pa, batch = _need("pyarrow"), self._batches[group]
        data = pa.py_buffer(self._read(batch.start, batch.stop, self._head))
        with pa.ipc.open_stream(data, options=_included(self.fields, chosen)) as reader:
            return pa.Table.from_batches([reader.read_next_batch()]).select(chosen)

    def expect(self, group: int, chosen: list[str]) -> None:
        """See :class:`Grouped`."""
        self._bytes.expect(self._batches[group].start, self._batches[group].stop)

    def close(self) -> None:
        """See :class:`Grouped`."""
        self._bytes.close()


def _for_arrow(file: Opener) -> Any:
    return file.path if isinstance(file, LocalFile) else file.open()


def _included(fields: list[tuple[str, Any]], chosen: list[str]) -> Any:
    names = [name for name, _ in fields]
    return _need("pyarrow").ipc.IpcReadOptions(included_fields=sorted(names.index(name) for name in chosen))


class ArrowBatch(NamedTuple):
    """A record batch in an Arrow file or stream: its bytes ``start`` to ``stop``, and its number of rows."""

    start: int
    stop: int
    rows: int


def data_bytes(batches: Sequence[ArrowBatch]) -> int:
    """The bytes of record batches, which few files compress."""
    return sum(batch.stop - batch.start for batch in batches)


def arrow_batches(file: Opener, start: int) -> list[ArrowBatch]:
    """The record batches of a stream that begins at byte ``start``, by the headers of its messages alone.

    Format: https://arrow.apache.org/docs/format/Columnar.html#encapsulated-message-format.
    """
    found, size = list[ArrowBatch](), file.size()
    with file.open() as opened:
        while start + 4 <= size:
            opened.seek(start)
            prefix = opened.read(8)
            # Versions before 0.15 have no continuation marker before the size.
            skip, length = (8, prefix[4:]) if prefix[:4] == b"\xff" * 4 else (4, prefix[:4])
            (metadata,) = struct.unpack("<i", length)
            if metadata == 0:
                break
            if not 0 < metadata <= size - start - skip:
                raise unexpected(file.path, f"a message at byte {start}", f"one of {metadata} bytes")
            opened.seek(start + skip)
            kind, body, rows = _message(opened.read(metadata))
            stop = start + skip + metadata + body
            if not (body >= 0 and stop <= size and rows >= 0):
                raise unexpected(
                    file.path,
                    f"a message at byte {start} that ends before byte {size}",
                    f"one of {body} bytes and {rows} rows",
                )
            if kind == RECORD_BATCH:
                found.append(ArrowBatch(start, stop, rows))
            start = stop
    return found


def _message(metadata: bytes) -> tuple[int, int, int]:
    """The kind of a message, the bytes of its body, and its number of rows if it is a record batch.

    The metadata is a Flatbuffer table (https://flatbuffers.dev/internals/): Message of Arrow's Message.fbs.
    """

    def field(table: int, number: int, kind: str) -> int:
        vtable = table - struct.unpack_from("<i", metadata, table)[0]
        known = struct.unpack_from("<H", metadata, vtable)[0] > 4 + 2 * number
        place = struct.unpack_from("<H", metadata, vtable + 4 + 2 * number)[0] if known else 0
        if not place:
            return 0  # the default
        value: int = struct.unpack_from(kind, metadata, table + place)[0]
        return table + place + value if kind == "<I" else value

    (message,) = struct.unpack_from("<I", metadata)
    kind, body = field(message, 1, "<B"), field(message, 3, "<q")
    if kind != RECORD_BATCH:
        return kind, body, 0
    batch = field(message, 2, "<I")
    rows, columns = field(batch, 0, "<q"), field(batch, 1, "<I")
    # Each column has its number of rows, too, so damage is found before memory is taken for it.
    count, first = struct.unpack_from("<Iq", metadata, columns) if columns else (0, 0)
    if rows != (first if count else 0):
        raise ValueError(f"a record batch of {rows} rows whose first column has {first if count else 0}")
    return kind, body, rows


class _Table:
    """Columns of a file of row groups; the latest decoded group is kept."""

    def __init__(
        self,
        file: Opener,
        columns: str | Sequence[str] | None,
        label: str | None,
        open_file: Callable[[Opener], Grouped],
    ) -> None:
        self.path, self.file = file.path, file
        check_exists(file)
        self._opened = Reopened(file, lambda: open_file(file))
        self.version = self._opened.identity
        found = self._opened.use()
        self.names = [name for name, _ in found.fields]
        chosen = _columns(self.path, columns, label, self.names)
        self.columns, self._y = chosen[: len(chosen) - (label is not None)], label
        self._chosen = list(dict.fromkeys(chosen))  # the label may be among the columns
        self.fields = {name: kind for name, kind in found.fields if name in chosen}
        self._single = isinstance(columns, str)
        if min(found.sizes, default=0) < 0 or sum(found.sizes) > sys.maxsize:
            raise unexpected(self.path, "numbers of rows", f"{min(found.sizes)} to {max(found.sizes)}")
        self.starts = np.cumsum([0, *found.sizes])
        self.block = max(found.sizes, default=1) or 1
        self._group, self._kept = -1, list[np.ndarray]()
        self._lengths: dict[str, tuple[int, str]] = {}
        self._turn = InTurn()  # one thread at a time uses the decoded group

    def forget(self) -> None:
        """Forget the decoded group."""
        self._kept, self._group = [], -1

    def close(self) -> None:
        """Close the file until it is next read, and forget the decoded group."""
        self.forget()
        self._opened.close()

    def share_lengths(self, other: _Table) -> None:
        """Expect lists of the lengths that another file has; the first lists that are read decide them."""
        self._lengths = other._lengths

    @property
    def forms(self) -> list[Form] | None:
        """Element type and shape of a sample of x, and of y; None where a type of lists has no length."""
        pa, found = _need("pyarrow"), dict[str, Form]()
        for name, kind in self.fields.items():
            if pa.types.is_list(kind) or pa.types.is_large_list(kind):
                return None
            width, kind = (kind.list_size, kind.value_type) if pa.types.is_fixed_size_list(kind) else (0, kind)
            self._check_numbers(name, kind)
            found[name] = np.dtype(kind.to_pandas_dtype()), (width,) if width else ()
        x = [found[name] for name in self.columns]
        shape = x[0][1] if len(x) == 1 else (sum(math.prod(shape) for _, shape in x),)
        shape = shape if self._single else shape or (1,)
        forms = [(np.result_type(*(dtype for dtype, _ in x)), shape)]
        return forms if self._y is None else [*forms, found[self._y]]

    def __len__(self) -> int:
        return int(self.starts[-1])

    def read(self, indices: np.ndarray, /) -> Any:
        """The rows at ``indices``: x, or (x, y)."""
        out: list[np.ndarray] = []
        with self._turn:
            for here, places, kept in self._by_group(indices):
                for number, array in enumerate(kept):
                    if number == len(out):
                        out.append(np.empty((len(indices), *array.shape[1:]), array.dtype))
                    out[number][here] = array[places]
        return tuple(out) if self._y is not None else out[0]

    def fill(self, indices: np.ndarray, out: Sequence[np.ndarray]) -> None:
        """Write the result of :meth:`read` into ``out``, arrays of its element types and shapes."""
        with self._turn:
            for here, places, kept in self._by_group(indices):
                for whole, array in zip(out, kept, strict=True):
                    expected, found = (f"samples of {of.dtype} {of.shape[1:]}" for of in (whole, array))
                    if expected != found:
                        raise unexpected(self.path, expected, found)
                    copy_rows(whole, here, array, places)

    def _by_group(self, indices: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, list[np.ndarray]]]:
        """Each group of ``indices``, decoded, with its samples: their positions, and their places in the group."""
        groups = np.searchsorted(self.starts, indices, side="right") - 1
        for group in in_order_of_use(groups):
            if group != self._group:
                self.forget()  # one group at a time
                self._kept, self._group = self._decode(group), group
            here = np.flatnonzero(groups == group)
            yield here, indices[here] - self.starts[group], self._kept

    def expect(self, indices: np.ndarray, /) -> None:
        """Start reading the groups of the rows at ``indices`` ahead, while others are used."""
        opened = self._opened.use()
        for group in in_order_of_use(np.searchsorted(self.starts, indices, side="right") - 1):
            if group != self._group:
                opened.expect(int(group), self._chosen)

    def _decode(self, group: int) -> list[np.ndarray]:
        start, stop = int(self.starts[group]), int(self.starts[group + 1])
        with naming_the_file(self.path, f"whole samples {start} to {stop - 1}"):
            table = self._opened.use().load(group, self._chosen)
            table.validate(full=True)
        if len(table) != stop - start:
            raise unexpected(self.path, f"{stop - start} samples from {start} on", len(table))
        arrays = [self._numbers(name, table[name], start) for name in self.columns]
        x = arrays[0]
        if len(arrays) > 1 or (x.ndim == 1 and not self._single):
            x = (
                np.stack(arrays, axis=1)
                if all(a.ndim == 1 for a in arrays)
                else np.concatenate([a.reshape(len(a), -1) for a in arrays], axis=1)
            )
        return [x] if self._y is None else [x, self._numbers(self._y, table[self._y], start)]

    def _numbers(self, name: str, column: Any, start: int) -> np.ndarray:
        """A column of numbers or of lists as an array. Raises for missing values and for other types."""
        pa = _need("pyarrow")
        array = column.combine_chunks()
        array = pa.concat_arrays(array.chunks) if isinstance(array, pa.ChunkedArray) else array
        self._complete(name, array, start)
        kind, width = array.type, 0
        if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
            lengths = array.value_lengths().to_numpy(zero_copy_only=False)
            width, like = self._lengths.setdefault(name, (int(lengths[0]), self.path))
            if (wrong := np.flatnonzero(lengths != width)).size:
                like = "" if like == self.path else f", as in {like}"
                raise unexpected(
                    self.path,
                    f"lists of {width} numbers in column {name!r}{like}",
                    f"{lengths[wrong[0]]} in sample {start + wrong[0]}",
                )
            array, kind = array.flatten(), kind.value_type
            self._complete(name, array, start, width)
        self._check_numbers(name, kind)
        values: np.ndarray = array.to_numpy(zero_copy_only=False)
        return values.reshape(-1, width) if width else values

    def _check_numbers(self, name: str, kind: Any) -> None:
        types = _need("pyarrow").types
        if not (types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind)):
            raise DTypeError(
                f"{self.path}: column {name!r} must hold numbers or lists of one length of numbers, got {kind}"
            )

    def _complete(self, name: str, array: Any, start: int, width: int = 1) -> None:
        if array.null_count:
            first = int(np.flatnonzero(array.is_null().to_numpy(zero_copy_only=False))[0]) // width
            raise unexpected(self.path, "numbers", f"a missing value in column {name!r}, sample {start + first}")


# --- Hugging Face's datasets ----------------------------------------------------------------------------------------

ROWS = 1000  # rows that are read at a time, the size of a record batch of that library


def huggingface(dataset: Any, columns: str | Sequence[str] | None = None, label: str | None = None) -> Source:
    """The rows of a ``Dataset`` of Hugging Face's ``datasets``, read 1,000 at a time, without a copy of all.

    columns, label: as in :func:`parquet`: columns of numbers, or one of lists of one length

    Selected, shuffled or filtered rows come in their new order. Raises DTypeError for a streaming ``IterableDataset``,
    which has no rows by number, and for a ``DatasetDict``, of which one part can be given.
    """
    if not all(hasattr(dataset, name) for name in ("with_format", "features", "__len__", "column_names")):
        hint = "; give one of its parts, as dataset['train']" if hasattr(dataset, "keys") else ""
        hint = "; it is streamed, and a loader needs rows by number" if hasattr(dataset, "take") else hint
        raise DTypeError(f"dataset must be a datasets.Dataset, got {type(dataset).__name__}{hint}")
    rows = _HuggingFaceRows(dataset)
    return _Table(rows, columns, label, lambda _: rows)


class _HuggingFaceRows:
    """A dataset of Hugging Face as an :class:`Opener` and as :class:`Grouped`."""

    def __init__(self, dataset: Any) -> None:
        self.path, self._dataset = f"dataset ({type(dataset).__name__})", dataset
        rows = len(dataset)
        self.sizes = [min(ROWS, rows - start) for start in range(0, rows, ROWS)]
        self.fields = [(field.name, field.type) for field in dataset.features.arrow_schema]
        self.data_bytes = int(dataset.data.nbytes)

    def open(self) -> BinaryIO:
        """See :class:`Opener`."""
        return io.BytesIO()

    def size(self) -> int:
        """See :class:`Opener`."""
        return self.data_bytes

    def identity(self) -> str:
        """See :class:`Opener`."""
        return f"fingerprint {self._dataset._fingerprint}"

    def load(self, group: int, chosen: list[str]) -> Any:
        """See :class:`Grouped`."""
        rows = range(group * ROWS, group * ROWS + self.sizes[group])
        return self._dataset.with_format("arrow", columns=list(chosen))[rows].select(chosen)

    def expect(self, group: int, chosen: list[str]) -> None:
        """See :class:`Grouped`."""

    def close(self) -> None:
        """See :class:`Grouped`."""


def _columns(path: str, columns: str | Sequence[str] | None, label: str | None, names: list[str]) -> list[str]:
    """The columns of x and then the label's, if the file has them."""
    if columns is None:
        columns = [name for name in names if name != label]
    chosen = [columns] if isinstance(columns, str) else list(columns)
    if not chosen:
        raise ArgumentError(f"columns must name at least one column of {path}, got {columns!r}")
    chosen += [] if label is None else [label]
    for name in chosen:
        if name not in names:
            raise ArgumentError(f"{path} has the columns {', '.join(names)}; got {name!r}")
        if names.count(name) > 1:
            raise unexpected(path, f"one column {name!r}", names.count(name))
    return chosen


# --- HDF5 ---------------------------------------------------------------------------------------------------------


def hdf5(
    path: str | os.PathLike[str] | Opener, dataset: str, label: str | None = None, *, flatten: bool = False
) -> Source:
    """The rows of a dataset in an HDF5 file, or with the dataset ``label`` pairs (x, y); needs h5py.

    ``flatten=True`` makes the samples of ``dataset``, such as images, one-dimensional.
    """
    _need("h5py")
    names = [dataset] if label is None else [dataset, label]
    return _Datasets(opener_of(path), names, check_bool("flatten", flatten))


class _Hdf5:
    """An HDF5 file with datasets that have the same number of samples."""

    def __init__(self, file: Opener, names: list[str]) -> None:
        h5py, path = _need("h5py"), file.path
        if getattr(file, "by_parts", False):
            # A thread that fetches, and collects garbage of h5py's, waits for h5py's lock, and h5py for the thread.
            raise ArgumentError(
                f"{path}: HDF5 is read from a copy where the file is elsewhere, since h5py has a lock while it reads, "
                "for which a thread that fetches may wait for ever; give gpubatch.sources.remote(url, cache=...)"
            )
        check_exists(file)
        with naming_the_file(path, "an HDF5 file"):
            self._below = None if isinstance(file, LocalFile) else file.open()
            self._file = h5py.File(path if self._below is None else self._below, "r")
        self.datasets = []
        for name in names:
            with naming_the_file(path, f"the dataset {name!r}"):
                found = self._file.get(name)
                if isinstance(found, h5py.Dataset) and not found.shape:
                    raise unexpected(path, "samples", f"a single number in {name!r}")
                if not isinstance(found, h5py.Dataset):
                    raise ArgumentError(
                        f"{path} has the datasets {', '.join(_datasets(self._file)) or '(none)'}; got {name!r}"
                    )
                if found.file != self._file or found.external or found.is_virtual:
                    raise unexpected(path, "samples in the file itself", f"{name!r} to be kept in another file")
                check_kind(f"{path}: {name!r}", found.dtype)
                self.datasets.append(found)
        if len({len(found) for found in self.datasets}) > 1:
            lengths = " and ".join(f"{found.name!r} of shape {found.shape}" for found in self.datasets)
            raise ShapeError(f"{path}: datasets must have equal numbers of samples, got {lengths}")

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        if self._below is not None:  # h5py leaves it open
            self._below.close()


def _datasets(group: Any) -> list[str]:
    found: list[str] = []
    group.visititems(lambda name, item: found.append(name) if getattr(item, "shape", ()) else None)
    return found


class _Datasets:
    """Datasets of an HDF5 file."""

    def __init__(self, file: Opener, names: list[str], flatten: bool) -> None:
        self.path, self.file = file.path, file
        self._opened = Reopened(file, lambda: _Hdf5(file, names))
        self.version = self._opened.identity
        datasets = self._opened.use().datasets
        self._n = len(datasets[0])
        self.forms: list[Form] = [(dataset.dtype, dataset.shape[1:]) for dataset in datasets]
        self.forms[0] = (self.forms[0][0], flat(datasets[0].shape, flatten)[1:])
        self.block = max(1 if dataset.chunks is None else int(dataset.chunks[0]) for dataset in datasets)

    @property
    def starts(self) -> np.ndarray:
        """The places where blocks of neighbours begin, and the end."""
        return np.append(np.arange(0, self._n, self.block), self._n)

    def close(self) -> None:
        """Close the file until it is next read."""
        self._opened.close()

    def __len__(self) -> int:
        return self._n

    def read(self, indices: np.ndarray, /) -> Any:
        """The rows at ``indices``; neighbours are read in one piece, in the order of the file."""
        out = [np.empty((len(indices), *shape), dtype) for dtype, shape in self.forms]
        self.fill(indices, out)
        return tuple(out) if len(out) > 1 else out[0]

    def fill(self, indices: np.ndarray, out: Sequence[np.ndarray]) -> None:
        """Write the result of :meth:`read` into ``out``, arrays of its element types and shapes."""
        places, back = np.unique(indices, return_inverse=True)
        in_order = np.array_equal(places, indices)
        for dataset, whole in zip(self._opened.use().datasets, out, strict=True):
            shape = (len(places), *dataset.shape[1:])
            array = whole.reshape(shape) if in_order else np.empty(shape, dataset.dtype)
            for first, start, stop in runs_of(places):
                last = first + stop - start - 1
                with naming_the_file(self.path, f"samples {first} to {last} of {dataset.name!r}"):
                    dataset.read_direct(array, np.s_[first : last + 1], np.s_[start:stop])
            if not in_order:
                whole[...] = array[back].reshape(whole.shape)


def _need(module: str) -> Any:
    return needed(module, "this kind of file", "data")
