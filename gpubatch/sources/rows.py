"""Files of rows of one size, read by place: .npy, raw, IDX, and CIFAR-10's binary version."""

from __future__ import annotations

import contextlib
import io
import itertools
import math
import os
import struct
import sys
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

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
    GpubatchError,
    InsufficientMemoryError,
    check_bool,
    check_choice,
    check_int,
    unexpected,
)
from gpubatch.inputs import check_kind
from gpubatch.sources.opener import BytesByPlace, LocalFile, Opener, Reopened, opener_of
from gpubatch.sources.reader import Form, Source

NPY_START = 1 << 16  # bytes that hold the header of an .npy file: NumPy refuses more than 10,000


def npy(path: str | os.PathLike[str] | Opener, *, flatten: bool = False) -> Source:
    """The rows of an array that ``np.save`` wrote: read when they are needed, not mapped.

    ``flatten=True`` makes samples, such as images, one-dimensional.
    """
    of = opener_of(path)
    with of.open() as file:
        shape, dtype, offset = _npy_header(of.path, file)
    return _Rows(of, flat(shape, flatten), dtype, offset)


def npz(path: str | os.PathLike[str] | Opener, array: str, *, flatten: bool = False) -> Source:
    """The rows of one of the arrays that ``np.savez`` wrote; ``flatten`` as in :func:`npy`.

    Refuses arrays of ``np.savez_compressed``, which cannot be read by place: ``np.load`` reads them whole.
    """
    of = opener_of(path)
    check_exists(of)
    with of.open() as file, naming_the_file(of.path, "an .npz file"), zipfile.ZipFile(file) as archive:
        names = [name.removesuffix(".npy") for name in archive.namelist()]
        if array not in names:
            raise ArgumentError(f"{of.path} has the arrays {', '.join(names) or '(none)'}; got {array!r}")
        found = archive.getinfo(f"{array}.npy" if f"{array}.npy" in archive.namelist() else array)
        if found.compress_type != zipfile.ZIP_STORED:
            raise unexpected(
                of.path,
                f"an array {array!r} that is read by place",
                "a compressed one; np.savez writes it as it is, np.savez_compressed does not",
            )
        # A header of 30 bytes, then the file's name and an extra field (PKWARE's APPNOTE.TXT, section 4.3.7).
        file.seek(found.header_offset)
        start = found.header_offset + 30 + sum(struct.unpack("<26xHH", file.read(30)))
        file.seek(start)
        shape, dtype, offset = _npy_header(of.path, file)
    return _Rows(of, flat(shape, flatten), dtype, start + offset)


def _npy_header(path: str, file: BinaryIO) -> tuple[tuple[int, ...], np.dtype[Any], int]:
    """Shape, element type and header length of an .npy file that begins at the position of ``file``."""
    start = io.BytesIO(file.read(NPY_START))  # NumPy would allocate whatever length the header claims
    try:
        version = np.lib.format.read_magic(start)
        header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = header(start)
    except Exception as error:  # NumPy parses the header as Python, which raises more than ValueError
        raise unexpected(path, "an .npy file", f"another or a damaged one ({error})") from error
    if fortran and len(shape) > 1:
        raise unexpected(path, "samples one after another (C order)", "Fortran order; save np.ascontiguousarray(array)")
    return shape, dtype, start.tell()


def raw(path: str | os.PathLike[str] | Opener, sample_shape: tuple[int, ...], dtype: Any, offset: int = 0) -> Source:
    """Samples of ``sample_shape`` that fill a file from byte ``offset`` on, as ``array.tofile`` writes them."""
    of, dtype = opener_of(path), np.dtype(dtype)
    size, extra = of.size() - check_int("offset", offset, 0), math.prod(sample_shape) * dtype.itemsize
    if extra == 0 or size < 0 or size % extra:
        raise unexpected(of.path, f"samples of {extra} bytes, {dtype} {tuple(sample_shape)}", f"{size} bytes")
    return _Rows(of, (size // extra, *sample_shape), dtype, offset)


def idx(path: str | os.PathLike[str] | Opener, *, flatten: bool = False) -> Source:
    """The samples of an IDX file (MNIST and similar sets), which must be unpacked, since it is read by place.

    ``flatten=True`` makes images one-dimensional.
    """
    of = opener_of(path)
    with of.open() as file:
        if file.read(2) == GZIP_MAGIC:
            raise unexpected(
                of.path,
                "an IDX file",
                "a gzip file, which cannot be read by place; unpack it, or read it whole with "
                "gpubatch.datasets.read_idx",
            )
        file.seek(0)
        dtype, shape = read_idx_header(of.path, file.read)
        offset = file.tell()
    return _Rows(of, flat(shape, flatten), dtype, offset)


def cifar10(folder: str | os.PathLike[str], part: str = "train", *, flatten: bool = True) -> Source:
    """Pairs of images and labels of CIFAR-10, ``part`` "train" or "test", from its binary version in ``folder``.

    Images are uint8 (samples, 3072), or (samples, 3, 32, 32) with ``flatten=False``, and labels int64 (samples,), as
    :func:`gpubatch.datasets.cifar10` has them.
    """
    files = cifar10_records(folder, check_choice("part", part, CIFAR_PARTS))
    return _Cifar10(folder, files, (math.prod(CIFAR_IMAGE),) if check_bool("flatten", flatten) else CIFAR_IMAGE)


def flat(shape: tuple[int, ...], flatten: bool) -> tuple[int, ...]:
    """``shape``, or with ``flatten`` that of one-dimensional samples."""
    return (shape[0], math.prod(shape[1:])) if check_bool("flatten", flatten) and len(shape) > 1 else shape


class _Rows:
    """Rows of one size in a file, read at their places.

    A map would count against a limit on address space as memory does, and a mapped file that becomes shorter kills the
    process without an error.
    """

    def __init__(self, file: Opener, shape: tuple[int, ...], dtype: np.dtype[Any], offset: int) -> None:
        self.path, self.file = file.path, file
        check_kind(self.path, dtype)
        if not shape:
            raise unexpected(self.path, "samples", "a single number")
        if any(not 0 <= n <= sys.maxsize for n in shape):
            raise unexpected(self.path, "a shape that fits into memory", shape)
        self._shape, self._dtype, self._offset = shape, dtype, offset
        self.forms: list[Form] = [(dtype, shape[1:])]
        self._row = math.prod(shape[1:]) * dtype.itemsize
        needed, found = offset + shape[0] * self._row, file.size()
        if found < needed:
            raise unexpected(self.path, f"{needed} bytes for {dtype} {shape}", found)
        if getattr(file, "by_parts", False):
            self.block = 1  # any neighbours can be read together, and single samples have a cost
        self._bytes = Reopened(file, lambda: BytesByPlace(file.open()))
        self.version = self._bytes.identity

    def close(self) -> None:
        """Close the file until it is next read."""
        self._bytes.close()

    def __len__(self) -> int:
        return self._shape[0]

    def read(self, indices: np.ndarray, /) -> np.ndarray:
        """The samples at ``indices``; neighbours are read in one piece."""
        out = np.empty((len(indices), *self._shape[1:]), self._dtype)
        self.read_into(indices, out)
        return out

    def read_into(self, indices: np.ndarray, out: np.ndarray, /) -> None:
        """Write the samples at ``indices`` into ``out``, C-contiguous."""
        view, row = out.reshape(-1).view(np.uint8).data, self._row
        for place, start, stop in runs_of(indices):
            offset, count = self._offset + place * row, (stop - start) * row
            found = self._bytes.use().read_into(view[start * row : stop * row], offset)
            if found < count:
                raise DataFormatError(
                    f"{self.path}: expected {len(self)} samples, as when it was opened, but it ends before sample "
                    f"{place + found // row} is complete: it has become shorter"
                )

    def fill(self, indices: np.ndarray, out: Sequence[np.ndarray]) -> None:
        """Likewise, into a sequence of one array."""
        self.read_into(indices, out[0])

    def expect(self, indices: np.ndarray, /) -> None:
        """Start reading the samples at ``indices`` ahead, while others are used."""
        for place, start, stop in runs_of(indices):
            self._bytes.use().expect(*(self._offset + row * self._row for row in (place, place + stop - start)))


class _Cifar10:
    """Records of a label and an image, in several files."""

    def __init__(
        self, folder: str | os.PathLike[str], files: list[tuple[Path, int]], image_shape: tuple[int, ...]
    ) -> None:
        self.path, self._shape = os.fspath(folder), image_shape
        self._files = [_Rows(LocalFile(path), (count, CIFAR_RECORD), np.dtype(np.uint8), 0) for path, count in files]
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
        """See :meth:`_Rows.expect`."""
        for file, _, places in self._by_file(indices):
            file.expect(places)

    def _by_file(self, indices: np.ndarray) -> Iterator[tuple[_Rows, np.ndarray, np.ndarray]]:
        """Each file with its samples: their positions among ``indices``, and their places in the file."""
        numbers = np.searchsorted(self._starts, indices, side="right") - 1
        for number in np.unique(numbers):
            here = np.flatnonzero(numbers == number)
            yield self._files[number], here, indices[here] - self._starts[number]


def runs_of(indices: np.ndarray) -> Iterator[tuple[int, int, int]]:
    """The runs of neighbours in ``indices``, as triples (first neighbour, start position, stop position)."""
    cuts = (np.flatnonzero(np.diff(indices) != 1) + 1).tolist()
    places = indices[[0, *cuts]].tolist()
    for place, (start, stop) in zip(places, itertools.pairwise([0, *cuts, len(indices)]), strict=True):
        yield place, start, stop


def copy_rows(out: np.ndarray, here: np.ndarray, array: np.ndarray, places: np.ndarray) -> None:
    """``out[here] = array[places]`` for ascending ``here``, without a temporary copy where both are runs."""
    n = len(here)
    if here[-1] - here[0] == n - 1 and places[-1] - places[0] == n - 1 and (np.diff(places) == 1).all():
        out[here[0] : here[0] + n] = array[places[0] : places[0] + n]
    else:
        out[here] = array[places]


def in_order_of_use(numbers: np.ndarray) -> list[int]:
    """The unique ``numbers`` in the order of their first use."""
    found, first = np.unique(numbers, return_index=True)
    order: list[int] = found[np.argsort(first)].tolist()
    return order


def check_exists(file: Opener) -> None:
    """Raise ``FileNotFoundError`` or another ``OSError`` if the file cannot be opened."""
    if isinstance(file, LocalFile) and os.path.isdir(file.path):
        raise unexpected(file.path, "a file", "a folder; gpubatch.sources.files opens all of its files as one source")
    file.open().close()


@contextlib.contextmanager
def naming_the_file(path: str | os.PathLike[str], expected: str) -> Iterator[None]:
    """Raise DataFormatError in place of what pyarrow and h5py raise for a damaged file; it names file and place."""
    try:
        yield
    except GpubatchError:
        raise
    except MemoryError as error:
        raise InsufficientMemoryError(
            f"{os.fspath(path)}: {expected} would need more memory than there is, or is damaged ({error})"
        ) from error
    except (
        *(OSError, ValueError, TypeError, LookupError, RuntimeError, EOFError),
        *(struct.error, zlib.error, zipfile.BadZipFile),
    ) as error:
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise unexpected(os.fspath(path), expected, f"damage ({first_line})") from error
