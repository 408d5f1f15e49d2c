"""Arrays in NumPy's files: in memory, or read by place where they are large."""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import io
import os
import sys
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gpubatch import sources
from gpubatch.errors import ArgumentError, DataFormatError
from gpubatch.tables import is_large

PARTS = {"X": ("x", "x_train"), "Y": ("y", "y_train"), "X_test": ("x_test",), "Y_test": ("y_test",)}  # of an .npz file
BLOCK = 1 << 20  # bytes that are read at once
GAP = 8  # unwanted rows that one read may span: two reads take longer


class Piped:
    """Standard input or a pipe, read into memory once; an :class:`gpubatch.sources.Opener`.

    name: "-", or the path of a pipe
    """

    def __init__(self, name: str) -> None:
        self.path = "standard input" if name == "-" else name
        if name == "-":
            self._data = sys.stdin.buffer.read()
        else:
            with open(name, "rb") as pipe:
                self._data = pipe.read()

    def open(self) -> io.BytesIO:
        """A new file over the bytes."""
        return io.BytesIO(self._data)

    def size(self) -> int:
        """Size in bytes."""
        return len(self._data)

    def identity(self) -> str:
        """Always the same, since a pipe is read once."""
        return f"{len(self._data)} bytes"


def of_table(name: str) -> Any:
    """The source of a table: a path or URL as it is, or the bytes of a pipe."""
    return Piped(name) if name == "-" or Path(name).is_fifo() else name


def check_there(name: str) -> None:
    """Raise unless the file or folder exists."""
    there = name == "-" or "://" in name or Path(name).exists()
    if not there and not glob.glob(os.path.expanduser(name), recursive=True):
        raise ArgumentError(f"DATA must be files or a folder that are there, got {name!r}")


@dataclasses.dataclass
class Arrays:
    """The arrays in files; those to test on may be missing. Samples may be :class:`RowsOf` a file."""

    X: Any
    Y: np.ndarray
    X_test: Any = None
    Y_test: np.ndarray | None = None


class RowsOf:
    """Some rows of a file, in order: a source that is read in blocks of neighbours, and so in windows.

    source: all rows
    chosen: the numbers of those that are taken, ascending; None: all
    """

    def __init__(self, source: Any, chosen: np.ndarray | None = None) -> None:
        self._source, self.path = source, source.path
        self._chosen = np.arange(len(source)) if chosen is None else chosen
        self.forms = source.forms
        self.dtype, shape = source.forms[0]
        self.features = int(np.prod(shape))
        self.block = max(1, BLOCK // (self.features * self.dtype.itemsize))

    def __len__(self) -> int:
        return len(self._chosen)

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return int(len(self) * self.features * self.dtype.itemsize)

    def rows(self, which: slice | np.ndarray) -> Any:
        """Some of the rows, in memory where they are few."""
        found = RowsOf(self._source, self._chosen[which])
        return found if is_large(found.nbytes) else found.read(np.arange(len(found)))

    def read(self, indices: np.ndarray, /) -> np.ndarray:
        """See :class:`gpubatch.sources.Source`."""
        out = np.empty((len(indices), self.features), self.dtype)
        self.read_into(indices, out)
        return out

    def read_into(self, indices: np.ndarray, out: np.ndarray, /) -> None:
        """See :class:`gpubatch.sources.Source`; rows between neighbours are read as well, and left out."""
        places = self._chosen[indices]
        steps = np.diff(places)
        cuts = np.flatnonzero((steps < 1) | (steps > GAP)) + 1
        for start, stop in zip([0, *cuts], [*cuts, len(places)], strict=True):
            some = places[start:stop]
            if some[-1] - some[0] == len(some) - 1:
                self._source.read_into(some, out[start:stop])
            else:
                out[start:stop] = self._source.read(np.arange(some[0], some[-1] + 1))[some - some[0]]


def arrays_of(paths: Sequence[Path]) -> tuple[str, Arrays]:
    """The arrays in NumPy's files, and their names in words."""
    for path in paths:
        check_there(str(path))
    endings = [path.suffix for path in paths]
    if endings == [".npy", ".npy"]:
        X = RowsOf(sources.npy(paths[0], flatten=True)) if is_large(paths[0].stat().st_size) else npy(paths[0])
        Y = npy(paths[1])
        if isinstance(X, np.ndarray) and X.ndim == 1 and Y.ndim > 1 and Y[0].size > 1:
            raise ArgumentError(
                f"DATA must be X.npy Y.npy, samples first: {paths[0]} has shape {X.shape}, as labels have, {paths[1]} "
                f"{Y.shape}; give {paths[1]} {paths[0]}, or save samples of one number as X.reshape(-1, 1)"
            )
        return " and ".join(map(str, paths)), Arrays(X, Y)
    if endings == [".npz"]:
        return str(paths[0]), npz(paths[0])
    words = "one file; give X.npy Y.npy" if endings == [".npy"] else " ".join(map(str, paths))
    raise ArgumentError(f"DATA must be two files X.npy Y.npy, or one .npz file, got {words}")


@contextlib.contextmanager
def damage_of(path: Path) -> Iterator[None]:
    """Turn NumPy's errors for a damaged file into one that names the file."""
    try:
        yield
    except DataFormatError:
        raise
    except ValueError as error:
        found = (
            error if "allow_pickle" not in str(error) else "objects, which NumPy pickles; save X.astype(str) or numbers"
        )
        raise DataFormatError(f"{path}: expected NumPy's arrays of numbers or text, found {found}") from error
    except (EOFError, zipfile.BadZipFile, SyntaxError) as error:
        raise DataFormatError(f"{path}: expected NumPy's arrays of numbers or text, found {error}") from error


def npy(path: Path) -> np.ndarray:
    """The array in an .npy file."""
    with damage_of(path):
        found: Any = np.load(path, allow_pickle=False)
        if not isinstance(found, np.ndarray) or found.ndim == 0 or len(found) == 0:
            raise DataFormatError(f"{path}: expected an array of samples, found none")
        return found


def npz(path: Path, labelled: bool = True) -> Arrays:
    """The arrays in an .npz file: X and Y, or x_train and y_train, and perhaps x_test and y_test; or X alone."""
    with damage_of(path), np.load(path, allow_pickle=False) as file, zipfile.ZipFile(path) as archive:
        sizes = {info.filename.removesuffix(".npy"): info.file_size for info in archive.infolist()}
        names = {part: name for part, known in PARTS.items() for name in file.files[::-1] if name.lower() in known}
        needed = {"X", "Y"} if labelled else {"X"}
        if not needed <= names.keys() or (labelled and ("X_test" in names) != ("Y_test" in names)):
            held = ", ".join(file.files) or "none"
            raise DataFormatError(f"{path}: expected arrays X and Y, or x_train, y_train, x_test, y_test; found {held}")
        found: dict[str, Any] = {
            part: RowsOf(sources.npz(path, name, flatten=True))
            if part.startswith("X") and is_large(sizes[name])
            else file[name]
            for part, name in names.items()
        }
        return Arrays(**{"Y": found["X"], **found})


def rows(X: Any) -> Any:
    """The samples, each flat."""
    return X if isinstance(X, RowsOf) else X.reshape(len(X), -1)


def taken(X: Any, rows: Any) -> Any:
    """Some rows, by a slice or an array of ascending numbers."""
    return X.rows(rows) if isinstance(X, RowsOf) else X[rows]
