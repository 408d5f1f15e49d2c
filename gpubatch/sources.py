"""Where samples come from: arrays of the host or of a device, files, and whatever else can be read by place.

A source is read and never changed. Arrays go to :class:`~gpubatch.loader.Loader` as they are, ``np.memmap`` too: it is
not copied, but floating values are looked at once when the loader is made, a block at a time. Files that may be larger
than memory are opened here: :func:`npy`, :func:`raw`, :func:`idx`, :func:`cifar10`, :func:`parquet`, :func:`arrow`,
:func:`hdf5`. Anything else has to be a :class:`Source`.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import itertools
import math
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from gpubatch.backend import Array, Backend, compute_dtype, from_dlpack, get_backend, is_foreign
from gpubatch.datasets import (
    CIFAR_IMAGE,
    CIFAR_PARTS,
    CIFAR_RECORD,
    GZIP_MAGIC,
    check_labels,
    cifar10_records,
    read_idx_header,
)
from gpubatch.errors import (
    ArgumentError,
    DataFormatError,
    DeviceMismatchError,
    DTypeError,
    GpubatchError,
    InsufficientMemoryError,
    NonFiniteError,
    ShapeError,
    check_bool,
    check_choice,
    check_int,
)
from gpubatch.host_ops import HalfOps, ops_for
from gpubatch.ops import GATHER_BLOCK

__all__ = [
    "ArraySource",
    "Part",
    "Reader",
    "Source",
    "array_source",
    "arrow",
    "check_finite",
    "cifar10",
    "convert",
    "hdf5",
    "idx",
    "npy",
    "parquet",
    "raw",
]

BLOCK = 1 << 18  # elements that are looked at at a time
AT_ONCE = 1 << 20  # bytes that a system is asked to read ahead: Linux does not heed what is beyond a device's limit
NPY_START = 1 << 16  # bytes of an .npy file; NumPy refuses headers of more than 10,000


class Source(Protocol):
    """What a loader can read samples from besides arrays.

    ``read(indices)`` takes places, int64 (samples,), in any order, and returns a new NumPy array of these samples as
    rows, or a pair of such arrays, (x, y). Element types and shapes of a row are always the same. One thread calls at a
    time, not always the same one. Two attributes are looked for: ``path``, for messages; and ``block``, of sources that
    read neighbours together and single samples at a cost, as many as they read at once: a loader reads such a source
    in windows unless it is told otherwise. So are two methods, for windows: ``read_into(indices, out)`` writes what
    ``read`` would return into ``out``, an array or a pair of them; ``expect(indices)`` is told what will be read soon.
    """

    def __len__(self) -> int:
        """How many samples there are."""

    def read(self, indices: np.ndarray, /) -> Any:
        """The samples at ``indices``."""


# --- arrays -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class ArraySource:
    """The samples of ``array`` along ``axis``; ``name`` is what the caller calls it."""

    name: str
    array: Array
    axis: int

    @property
    def n_samples(self) -> int:
        """How many samples there are."""
        return int(self.array.shape[self.axis])

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """The shape of one sample."""
        shape = self.array.shape
        return tuple(shape[: self.axis] + shape[self.axis + 1 :])

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of all samples."""
        return tuple(self.array.shape)

    @property
    def on_host(self) -> bool:
        """Whether gathering is work of the host."""
        return isinstance(self.array, np.ndarray)

    @property
    def dtype(self) -> np.dtype[Any]:
        """The element type as it is stored."""
        stored: np.dtype[Any] = self.array.dtype
        return stored

    def bytes_per_sample(self, dtype: np.dtype[Any]) -> int:
        """The size of one sample whose elements are of ``dtype``."""
        return math.prod(self.sample_shape) * dtype.itemsize

    def take(self, index: Array) -> Array:
        """The samples at ``index``, as they are stored, in a new C-contiguous array where the source lives."""
        if self.array.flags.c_contiguous:
            return self.array.take(index, axis=self.axis)
        # NumPy's take would first copy the whole array to make it contiguous; indexing follows the strides.
        samples = self.array[index] if self.axis == 0 else self.array[:, index]
        return samples if samples.flags.c_contiguous else samples.copy()

    def gather(self, index: Array, dtype: np.dtype[Any], scale: float | None, backend: Backend) -> Array:
        """The samples at ``index`` in a new C-contiguous array of ``dtype``, multiplied by ``scale``.

        ``backend`` is where the source lives.
        """
        return self.gatherer(dtype, scale, backend)(index)

    def gatherer(self, dtype: np.dtype[Any], scale: float | None, backend: Backend) -> Callable[[Array], Array]:
        """:meth:`gather` as a function of the index, which looks nothing up any more."""
        array, shape, empty = self.array, self.sample_shape, backend.empty
        taken = dtype == self.dtype and scale is None
        # The kernels know that rows are whole: the compiled one copies in 0.65 of the time that take needs.
        if taken and dtype in (np.float32, np.float64):
            taken = ops_for(backend, dtype).plain
        if self.axis != 0 or not array.flags.c_contiguous:
            return lambda index: convert(self.take(index), dtype, scale)
        if taken:
            return lambda index: array.take(index, axis=0)
        fill, factor = ops_for(backend, dtype).gather, 1.0 if scale is None else scale

        def gathered(index: Array) -> Array:
            # A new array each time: into one that is kept a batch of 256 x 784 float32 takes 0.6 µs less of 60, since
            # the allocator gives the same memory back anyway.
            out = empty((len(index), *shape), dtype)
            fill(array, index, out, factor, 0.0)
            return out

        return gathered

    def beside(
        self, rows: int, dtype: np.dtype[Any], scale: float | None, backend: Backend, moved: bool = False
    ) -> int:
        """Bytes of samples as they are stored that :meth:`gather` has beside its result of ``rows`` samples.

        ``moved`` means from a copy of the array on the device, which is contiguous.
        """
        sample = self.bytes_per_sample(self.dtype)
        if not (moved or self.array.flags.c_contiguous):
            return rows * sample
        if dtype == self.dtype and scale is None:
            return 0
        if self.axis != 0:
            return rows * sample
        ops, numbers = ops_for(backend, dtype), math.prod(self.sample_shape)
        at_once = min(rows * numbers, max(numbers, GATHER_BLOCK))
        return at_once * (self.dtype.itemsize * ops.plain + 4 * isinstance(ops, HalfOps))


def convert(x: Array, dtype: np.dtype[Any], scale: float | None) -> Array:
    """``x`` as a C-contiguous array of ``dtype``, multiplied by ``scale``; ``x`` itself where nothing is to be done.

    For float16 the product is one of float32.
    """
    if dtype == x.dtype and scale is None:
        return x
    out = x.astype(compute_dtype(dtype), order="C")
    if scale is not None:
        out *= scale
    return out.astype(dtype, copy=False)


def array_source(name: str, x: Any, sample_axis: int, backend: Backend) -> ArraySource:
    """The source of ``x``: an array on ``backend``, or an array or nested list on the host; DLPack copies nothing.

    A one-dimensional ``x`` has its samples on axis 0.
    """
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
    return ArraySource(name, array, sample_axis if array.ndim > 1 else 0)


def check_finite(source: ArraySource, dtype: np.dtype[Any], scale: float | None, backend: Backend) -> None:
    """Raise ``NonFiniteError`` for the first value that is NaN or infinite, or becomes so in the batches."""
    if holds_all(source.dtype, largest_stored(dtype, scale)):
        return
    array = source.array
    step = max(1, BLOCK // math.prod(array.shape[1:]))
    with backend.scope(), np.errstate(over="ignore"):
        for start in range(0, len(array), step):
            finite = abs(convert(array[start : start + step], dtype, scale)) < math.inf
            if bool(finite.all()):
                continue
            first = tuple(int(i) for i in np.argwhere(~backend.to_numpy(finite))[0])
            first = (start + first[0], *first[1:])
            value = float(array[first])
            where = f"{source.name}[{', '.join(map(str, first))}]"
            beyond = f", beyond the range of {dtype}" if math.isfinite(value) else ""
            raise NonFiniteError(f"{source.name} must be finite, but {where} is {value!r}{beyond}")


def largest_stored(dtype: np.dtype[Any], scale: float | None) -> float:
    """The largest stored number that is one of ``dtype``, too, when it is multiplied by ``scale``."""
    if dtype.kind != "f":
        return math.inf
    largest, factor = float(np.finfo(dtype).max), abs(scale or 1.0)
    return largest / (factor if dtype == np.float16 else max(1.0, factor))  # float16 is made of a float32 product


def holds_all(stored: np.dtype[Any], limit: float) -> bool:
    """Whether no element of the type ``stored`` is NaN or beyond ``limit``."""
    return stored.kind != "f" and (stored.kind == "b" or np.iinfo(stored).max <= limit)


def check_kind(name: str, dtype: np.dtype[Any]) -> None:
    """Raise ``DTypeError`` unless batches can be made of elements of ``dtype``."""
    if dtype.kind not in "biuf" or dtype.itemsize > 8:
        raise DTypeError(f"{name} must hold integers, booleans, float16, float32 or float64, got dtype {dtype}")


# --- what is read -------------------------------------------------------------------------------------------------


class Reader:
    """A source as a loader uses it: asked once what it gives, and held to that at every reading.

    ``name`` is what the caller calls it, ``where`` names it in messages. ``bytes_read`` counts.
    """

    def __init__(self, name: str, source: Source) -> None:
        path = getattr(source, "path", None)
        self.name, self.where = name, f"{name} ({type(source).__name__})" if path is None else os.fspath(path)
        self.source, self.n_samples = source, len(source)
        self._read_into, self._expect = getattr(source, "read_into", None), getattr(source, "expect", None)
        block = getattr(source, "block", None)
        self.block = None if block is None else check_int(f"the block of {self.where}", block, 1)
        if self.n_samples == 0:
            raise ShapeError(f"{name} must hold at least one sample, {self.where} has none")
        self.bytes_read = 0
        self.parts: list[Part] = []
        first = self._arrays(np.zeros(1, np.int64))
        for number, array in enumerate(first):
            check_kind(f"{name} ({self.where})", array.dtype)
            if array.ndim == 0 or array.size == 0:
                raise ShapeError(f"{name} must have samples of at least one number, {self.where} gives {array.shape}")
            self.parts.append(Part(self, number, array.dtype, array.shape[1:]))
        self._compare(np.zeros(1, np.int64), first)
        self.row_bytes = sum(part.bytes_per_sample(part.dtype) for part in self.parts)

    @property
    def reads_into(self) -> bool:
        """Whether what is read needs no memory of its own before it is where it should be."""
        return self._read_into is not None

    def read(self, index: Array, limits: Sequence[float]) -> list[np.ndarray]:
        """The samples at ``index``, one array for each part, as they are stored.

        Raises ``NonFiniteError`` for a number beyond its part's limit, and ``DataFormatError`` for rows of other shapes
        than the first one; both name the sample.
        """
        arrays = self._arrays(index)
        self._compare(index, arrays)
        self._check(index, arrays, limits)
        return [np.ascontiguousarray(array) for array in arrays]

    def read_into(self, index: Array, out: list[np.ndarray], limits: Sequence[float]) -> None:
        """Write what :meth:`read` would return into the C-contiguous arrays ``out``."""
        if self._read_into is None:
            for place, array in zip(out, self.read(index, limits), strict=True):
                place[...] = array
            return
        with self._noting(index):
            self._read_into(index, tuple(out) if len(out) > 1 else out[0])
        self._check(index, out, limits)

    def expect(self, index: Array) -> None:
        """Tell the source that the samples at ``index`` will be read soon."""
        if self._expect is not None:
            with self._noting(index):
                self._expect(index)

    @contextlib.contextmanager
    def _noting(self, index: Array) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            error.add_note(f"while reading samples {index.min()} to {index.max()} of {self.where}")
            raise

    def _arrays(self, index: Array) -> list[np.ndarray]:
        with self._noting(index):
            found = self.source.read(index)
        arrays = list(found) if isinstance(found, tuple) else [found]
        for array in arrays:
            if not isinstance(array, np.ndarray):
                raise DTypeError(f"{self.where}: read must return NumPy arrays, got {type(array).__name__}")
        return arrays

    def _compare(self, index: Array, arrays: list[np.ndarray]) -> None:
        expected = [(part.dtype, (len(index), *part.sample_shape)) for part in self.parts]
        found = [(array.dtype, array.shape) for array in arrays]
        if found == expected:
            return
        if len(index) > 1:  # the first sample for which it happens, if a single one is the cause
            for i in index:
                one = i[None]
                self._compare(one, self._arrays(one))
        place = f"sample {index[0]}" if len(index) == 1 else f"samples {index.min()} to {index.max()}"
        words = [", ".join(f"{dtype} {shape}" for dtype, shape in these) for these in (expected, found)]
        raise DataFormatError(f"{self.where}: expected {words[0]} for {place}, found {words[1]}")

    def _check(self, index: Array, arrays: Sequence[np.ndarray], limits: Sequence[float]) -> None:
        for array, limit in zip(arrays, limits, strict=True):
            self.bytes_read += array.nbytes
            if not holds_all(array.dtype, limit):
                self._check_finite(index, array, limit)

    def _check_finite(self, index: Array, array: np.ndarray, limit: float) -> None:
        # The extremes tell it in one pass each, without a temporary array; both are NaN where any number is.
        with np.errstate(invalid="ignore", over="ignore"):  # float16 cannot hold the limit
            if -limit <= float(array.min()) and float(array.max()) <= limit:
                return
            first = tuple(int(i) for i in np.argwhere(~((-limit <= array) & (array <= limit)))[0])
        value = float(array[first])
        inside = f" at {list(first[1:])}" if len(first) > 1 else ""
        beyond = ", beyond the range of the batches" if math.isfinite(value) else ""
        raise NonFiniteError(
            f"{self.where}: samples must be finite, but sample {index[first[0]]} has {value!r}{inside}{beyond}"
        )


@dataclass(frozen=True, eq=False)
class Part:
    """One of the arrays that a reader gives."""

    reader: Reader
    number: int
    dtype: np.dtype[Any]
    sample_shape: tuple[int, ...]
    axis: int = 0
    on_host: bool = True

    @property
    def n_samples(self) -> int:
        """How many samples there are."""
        return self.reader.n_samples

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of all samples."""
        return (self.n_samples, *self.sample_shape)

    def bytes_per_sample(self, dtype: np.dtype[Any]) -> int:
        """The size of one sample whose elements are of ``dtype``."""
        return math.prod(self.sample_shape) * dtype.itemsize


# --- files of rows ------------------------------------------------------------------------------------------------


def npy(path: str | os.PathLike[str]) -> Source:
    """The rows of an array that ``np.save`` wrote; read as they are asked for, not mapped."""
    with open(path, "rb") as file:
        start = io.BytesIO(file.read(NPY_START))  # else NumPy would ask for as much memory as the header claims to need
    try:
        version = np.lib.format.read_magic(start)
        header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = header(start)
    except Exception as error:  # NumPy parses the header as Python, so ValueError is not all that it raises
        raise DataFormatError(
            f"{os.fspath(path)}: expected an .npy file, found another or a damaged one ({error})"
        ) from error
    offset = start.tell()
    if fortran and len(shape) > 1:
        raise DataFormatError(
            f"{os.fspath(path)}: expected samples one after another (C order), found Fortran order; save "
            "np.ascontiguousarray(array)"
        )
    return _Rows(path, shape, dtype, offset)


def raw(path: str | os.PathLike[str], sample_shape: tuple[int, ...], dtype: Any, offset: int = 0) -> Source:
    """The samples of ``sample_shape`` that fill a file from byte ``offset`` on, such as ``array.tofile`` writes."""
    dtype = np.dtype(dtype)
    size, extra = os.path.getsize(path) - check_int("offset", offset, 0), math.prod(sample_shape) * dtype.itemsize
    if extra == 0 or size < 0 or size % extra:
        raise DataFormatError(
            f"{os.fspath(path)}: expected samples of {extra} bytes, {dtype} {tuple(sample_shape)}, found {size} bytes"
        )
    return _Rows(path, (size // extra, *sample_shape), dtype, offset)


def idx(path: str | os.PathLike[str]) -> Source:
    """The samples of an IDX file (MNIST and its kin), which must be unpacked, since they are read by place."""
    with open(path, "rb") as file:
        if file.read(2) == GZIP_MAGIC:
            raise DataFormatError(
                f"{os.fspath(path)}: expected an IDX file, found a gzip file, which cannot be read by place; "
                "unpack it, or read it whole with gpubatch.datasets.read_idx"
            )
        file.seek(0)
        dtype, shape = read_idx_header(path, file.read)
        offset = file.tell()
    return _Rows(path, shape, dtype, offset)


def cifar10(folder: str | os.PathLike[str], part: str = "train", *, flatten: bool = True) -> Source:
    """Pairs of images and labels of CIFAR-10, ``part`` "train" or "test", from its binary version in ``folder``.

    Images are uint8 (samples, 3072), or (samples, 3, 32, 32) with ``flatten=False``, and labels int64 (samples,), as
    :func:`gpubatch.datasets.cifar10` has them.
    """
    files = cifar10_records(folder, check_choice("part", part, CIFAR_PARTS))
    return _Cifar10(folder, files, (math.prod(CIFAR_IMAGE),) if check_bool("flatten", flatten) else CIFAR_IMAGE)


class _Rows:
    """Rows of one size in a file, read at their places.

    Read, not mapped: a map counts against a limit on address space as if it were memory, and where a mapped file has
    become shorter the process is killed instead of told.
    """

    def __init__(self, path: str | os.PathLike[str], shape: tuple[int, ...], dtype: np.dtype[Any], offset: int) -> None:
        self.path = os.fspath(path)
        check_kind(self.path, dtype)
        if not shape:
            raise DataFormatError(f"{self.path}: expected samples, found a single number")
        if any(not 0 <= n <= sys.maxsize for n in shape):
            raise DataFormatError(f"{self.path}: expected a shape that fits into memory, found {shape}")
        self._shape, self._dtype, self._offset = shape, dtype, offset
        self._row = math.prod(shape[1:]) * dtype.itemsize
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115  open as long as the source is used
        self._lock = threading.Lock()
        needed, found = offset + shape[0] * self._row, os.fstat(self._file.fileno()).st_size
        if found < needed:
            self._file.close()
            raise DataFormatError(f"{self.path}: expected {needed} bytes for {dtype} {shape}, found {found}")

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()

    def __len__(self) -> int:
        return self._shape[0]

    def read(self, indices: np.ndarray, /) -> np.ndarray:
        """The samples at ``indices``; neighbours in one piece."""
        out = np.empty((len(indices), *self._shape[1:]), self._dtype)
        self.read_into(indices, out)
        return out

    def read_into(self, indices: np.ndarray, out: np.ndarray, /) -> None:
        """Write the samples at ``indices`` into ``out``, C-contiguous."""
        view, row = out.reshape(-1).view(np.uint8).data, self._row
        for place, start, stop in _runs(indices):
            self._fill(view[start * row : stop * row], place)

    def expect(self, indices: np.ndarray, /) -> None:
        """Have the system read the samples at ``indices`` into its cache, while others are used."""
        if not hasattr(os, "posix_fadvise"):
            return
        for place, start, stop in _runs(indices):
            offset, end = (self._offset + row * self._row for row in (place, place + stop - start))
            for piece in range(offset, end, AT_ONCE):
                size = min(AT_ONCE, end - piece)
                os.posix_fadvise(self._file.fileno(), piece, size, os.POSIX_FADV_WILLNEED)

    def _fill(self, view: memoryview, place: int) -> None:
        offset = self._offset + place * self._row
        while len(view):
            count = self._read_at(view, offset)
            if not count:
                sample = (offset - self._offset) // self._row
                raise DataFormatError(
                    f"{self.path}: expected {len(self)} samples, as when it was opened, but it ends before sample "
                    f"{sample} is complete: it has become shorter"
                )
            view, offset = view[count:], offset + count

    def _read_at(self, view: memoryview, offset: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self._file.fileno(), [view], offset)
        with self._lock:  # Windows: seeking and reading are two calls
            self._file.seek(offset)
            return self._file.readinto(view) or 0


class _Cifar10:
    """Records of a label and an image, in several files."""

    def __init__(
        self, folder: str | os.PathLike[str], files: list[tuple[Path, int]], image_shape: tuple[int, ...]
    ) -> None:
        self.path, self._shape = os.fspath(folder), image_shape
        self._files = [_Rows(path, (count, CIFAR_RECORD), np.dtype(np.uint8), 0) for path, count in files]
        self._starts = np.cumsum([0, *(count for _, count in files)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, indices: np.ndarray, /) -> tuple[np.ndarray, np.ndarray]:
        """The images and the labels at ``indices``."""
        records = np.empty((len(indices), CIFAR_RECORD), np.uint8)
        for file, here, places in self._by_file(indices):
            records[here] = found = file.read(places)
            check_labels(file.path, found[:, 0], places)
        return records[:, 1:].reshape(-1, *self._shape), records[:, 0].astype(np.int64)

    def expect(self, indices: np.ndarray, /) -> None:
        """As that of :class:`_Rows`."""
        for file, _, places in self._by_file(indices):
            file.expect(places)

    def _by_file(self, indices: np.ndarray) -> Iterator[tuple[_Rows, np.ndarray, np.ndarray]]:
        """Each file with those of ``indices`` that are in it: where they stand there, and their places in the file."""
        numbers = np.searchsorted(self._starts, indices, side="right") - 1
        for number in np.unique(numbers):
            here = np.flatnonzero(numbers == number)
            yield self._files[number], here, indices[here] - self._starts[number]


def _runs(indices: np.ndarray) -> Iterator[tuple[int, int, int]]:
    """Neighbours that follow one another in ``indices``: the first of them, from where and to where they stand."""
    cuts = (np.flatnonzero(np.diff(indices) != 1) + 1).tolist()
    places = indices[[0, *cuts]].tolist()
    for place, (start, stop) in zip(places, itertools.pairwise([0, *cuts, len(indices)]), strict=True):
        yield place, start, stop


# --- tables -------------------------------------------------------------------------------------------------------


def parquet(path: str | os.PathLike[str], columns: str | Sequence[str], label: str | None = None) -> Source:
    """The rows of a Parquet file, of which a row group is decoded at a time; needs pyarrow.

    x has the columns side by side: (samples, columns), each of them numbers; or, of one column of lists, (samples,
    length of the lists); or, where ``columns`` is a string, (samples,) or that column's lists. With ``label`` pairs
    (x, y) are read. Missing values are errors.
    """
    pq = _need("pyarrow.parquet")
    _exists(path)
    with _telling(path, "a Parquet file"):
        file = pq.ParquetFile(os.fspath(path))
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
        names = list(file.schema_arrow.names)
    return _Table(path, columns, label, names, sizes, lambda group, chosen: file.read_row_group(group, columns=chosen))


def arrow(path: str | os.PathLike[str], columns: str | Sequence[str], label: str | None = None) -> Source:
    """The rows of an Arrow IPC file (Feather 2), of which a record batch is read at a time; as :func:`parquet`."""
    pa = _need("pyarrow")
    _exists(path)
    with _telling(path, "an Arrow file"):
        names = list(pa.ipc.open_file(pa.OSFile(os.fspath(path))).schema.names)
    chosen = _columns(path, columns, label, names)
    with _telling(path, "an Arrow file"):
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
        columns: str | Sequence[str],
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
        with _telling(self.path, f"whole samples {start} to {stop - 1}"):
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
    path: str | os.PathLike[str], columns: str | Sequence[str], label: str | None, names: list[str]
) -> list[str]:
    """The columns of x and then the label's, if the file has them."""
    chosen = [columns] if isinstance(columns, str) else list(columns)
    if not chosen:
        raise ArgumentError(f"columns must name at least one column of {os.fspath(path)}, got {columns!r}")
    chosen += [] if label is None else [label]
    for name in chosen:
        if name not in names:
            raise ArgumentError(f"{os.fspath(path)} has the columns {', '.join(names)}; got {name!r}")
    return chosen


# --- HDF5 ---------------------------------------------------------------------------------------------------------


def hdf5(path: str | os.PathLike[str], dataset: str, label: str | None = None) -> Source:
    """The rows of a dataset in an HDF5 file, or with the dataset ``label`` pairs (x, y); needs h5py."""
    h5py = _need("h5py")
    _exists(path)
    with _telling(path, "an HDF5 file"):
        file = h5py.File(path, "r")
    chosen = []
    for name in (dataset, *([] if label is None else [label])):
        with _telling(path, f"the dataset {name!r}"):
            found = file.get(name)
            if not isinstance(found, h5py.Dataset) or not found.shape:
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
    return _Datasets(path, file, chosen)


def _datasets(group: Any) -> list[str]:
    found: list[str] = []
    group.visititems(lambda name, item: found.append(name) if hasattr(item, "dtype") else None)
    return found


class _Datasets:
    """Datasets of an HDF5 file."""

    def __init__(self, path: str | os.PathLike[str], file: Any, datasets: list[Any]) -> None:
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
            for first, start, stop in _runs(places):
                last = first + stop - start - 1
                with _telling(self.path, f"samples {first} to {last} of {dataset.name!r}"):
                    dataset.read_direct(array, np.s_[first : last + 1], np.s_[start:stop])
            out.append(array if len(places) == len(indices) and np.array_equal(places, indices) else array[back])
        return tuple(out) if len(out) > 1 else out[0]


def _exists(path: str | os.PathLike[str]) -> None:
    """Raise ``FileNotFoundError`` or another ``OSError`` where there is nothing to read."""
    with open(path, "rb"):
        pass


@contextlib.contextmanager
def _telling(path: str | os.PathLike[str], expected: str) -> Iterator[None]:
    """Turn what pyarrow and h5py raise for a damaged file into an error that names the file and the place."""
    try:
        yield
    except GpubatchError:
        raise
    except MemoryError as error:
        raise InsufficientMemoryError(
            f"{os.fspath(path)}: {expected} would need more memory than there is, or is damaged ({error})"
        ) from error
    except (OSError, ValueError, TypeError, LookupError, RuntimeError, EOFError) as error:
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataFormatError(f"{os.fspath(path)}: expected {expected}, found damage ({first_line})") from error


def _need(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        library = module.partition(".")[0]
        raise ArgumentError(
            f"this kind of file needs {library}, which is not installed: pip install 'gpubatch[data]'"
        ) from error
