"""Folders, lists and patterns of files as one source, with a bounded number of open files."""

from __future__ import annotations

import glob
import hashlib
import inspect
import itertools
import math
import os
import re
import stat
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np

from gpubatch.errors import ArgumentError, DataFormatError, DTypeError, check_choice, unexpected
from gpubatch.sources.opener import Opener, opener_of, unquoted
from gpubatch.sources.reader import Form, InTurn, Source, noting
from gpubatch.sources.remote import RemoteFile, is_url, shown
from gpubatch.sources.rows import idx, npy, raw
from gpubatch.sources.tables import arrow, hdf5, parquet

OPEN = 32  # files that are open at a time: systems allow a process 1,024 or fewer
FORMATS: dict[str, Callable[..., Any]] = {
    "parquet": parquet,
    "arrow": arrow,
    "npy": npy,
    "idx": idx,
    "hdf5": hdf5,
    "raw": raw,
}
SUFFIXES = {
    **dict.fromkeys([".parquet", ".pq"], "parquet"),
    **dict.fromkeys([".arrow", ".arrows", ".feather", ".ipc"], "arrow"),
    ".npy": "npy",
    ".idx": "idx",
    **dict.fromkeys([".h5", ".hdf5"], "hdf5"),
}
IDX_NAME = re.compile(r"[-.]idx\d-ubyte$")  # train-images-idx3-ubyte
Path: TypeAlias = str | os.PathLike[str]


def files(where: Path | Opener | Sequence[Path | Opener], format: str | None = None, **options: Any) -> Source:
    """The samples of one file or of several as one source, those of the first file first.

    where: a folder, a pattern such as "data/part-*.parquet" ("**" stands for any folders), a file, or a list of these;
        URLs of these, too, as :func:`remote` takes them
    format: "parquet", "arrow", "npy", "idx", "hdf5" or "raw"; None: what the names end in
    options: the format's own, as in :func:`parquet` (``columns`` and ``label``, here None by default), :func:`npy`,
        :func:`idx`, :func:`hdf5` and :func:`raw`

    The files of a folder or a pattern come in the natural order of their paths: part-2 before part-10. A list keeps its
    order. Folders are searched with all folders in them; Hive's names of folders, such as "year=2024", become no
    columns. Names that begin with "." or "_" are left out, and so is a file without rows; a file of 0 bytes is damaged.
    All files must have one format, and samples of one element type and shape; tables must have the same columns, in any
    order; a folder must have files of one suffix. At most 32 files are open at a time.

    Each file is opened once for its rows and types, which its header or footer has. Nothing is decoded before the first
    batch, except for the first row of columns of lists whose type does not say their length. A loader shuffles by row
    groups, record batches or chunks, and so decodes each once an epoch. A loader's state has a digest of the files'
    names, sizes, rows and times of change, and a loader of other files refuses it.

    Raises ``FileNotFoundError`` where no file is found, and ``DataFormatError`` where files differ, which names both.
    """
    openers = list(openers_of(where))
    formats = Counter(_format_of(opener.path) if format is None else format for opener in openers)
    if len(formats) > 1:
        found = ", ".join(f"{count} of {name}" for name, count in formats.items())
        raise unexpected(words_of(where), "files of one format", found)
    name = check_choice("format", next(iter(formats)), list(FORMATS))
    opened, columns = _opened(openers, name, options)
    parts = [part for part in opened if len(part)]
    return Parts(words_of(where), parts or opened[:1], f"{name} {sorted((columns | options).items())}")


def names_files(x: Any) -> bool:
    """Whether ``x`` is a path, or a list of paths: a text in a list is a path if its suffix is known."""
    if isinstance(x, list):
        return len(x) > 0 and all(
            isinstance(path, os.PathLike) or (isinstance(path, str) and _suffix_of(path) in SUFFIXES) for path in x
        )
    return isinstance(x, (str, os.PathLike))


# --- which files --------------------------------------------------------------------------------------------------


def words_of(where: Any) -> str:
    """The argument ``where`` in words, for messages."""
    if isinstance(where, (str, os.PathLike)):
        return shown(os.fspath(where)) if is_url(where) else os.fspath(where)
    if not isinstance(where, (list, tuple)):
        return str(where.path)
    return words_of(where[0]) + (f" and {len(where) - 1} more" if len(where) > 1 else "")


def openers_of(where: Any) -> Iterator[Opener]:
    """An opener for each of the files."""
    if isinstance(where, (list, tuple)):
        if not where:
            raise ArgumentError("where must name at least one file, got an empty list")
        found = [opener for given in where for opener in openers_of(given)]
        paths = Counter(opener.path for opener in found)
        if twice := [path for path, count in paths.items() if count > 1]:
            raise ArgumentError(f"where must name each file once, got {twice[0]} {paths[twice[0]]} times")
        yield from found
    elif not isinstance(where, (str, os.PathLike)):
        yield opener_of(where)
    elif is_url(where):
        where = unquoted(os.fspath(where))
        there = {file.path: file for file in RemoteFile(os.fspath(where)).matching()}
        there = {path: there[path] for path in _not_hidden(words_of(where).rstrip("/"), there)}
        if not there:
            raise FileNotFoundError(f"no file is at {words_of(where)!r}")
        yield from map(there.__getitem__, _of_one_suffix(words_of(where), list(there)))
    elif isinstance(where, str) and "\n" in where:
        raise DTypeError(
            f"expected a path, got a text of {len(where)} characters with several lines; of the contents of a CSV file "
            "give pandas.read_csv(io.StringIO(text))"
        )
    elif os.path.isdir(where := os.path.expanduser(where)):
        yield from map(opener_of, _of_one_suffix(where, _files_in(os.fspath(where))))
    elif not os.path.exists(where) and glob.has_magic(os.fspath(where)):
        yield from map(opener_of, _of_one_suffix(where, _matching(os.fspath(where))))
    else:
        if stat.S_ISFIFO(os.stat(where).st_mode):  # or FileNotFoundError, whatever the name ends in
            raise ArgumentError(f"{os.fspath(where)} is a pipe, which can be read only once: write it to a file first")
        yield opener_of(where)


def _files_in(folder: str) -> list[str]:
    """The files in a folder and in all folders in it, without hidden ones."""
    found, folders, seen = list[str](), [folder], set[tuple[int, int]]()
    while folders:
        here = folders.pop()
        status = os.stat(here)
        if (place := (status.st_dev, status.st_ino)) in seen:  # a link to an outer folder
            continue
        seen.add(place)
        with os.scandir(here) as entries:
            for entry in entries:
                if not _is_hidden(entry.name):
                    (folders if entry.is_dir() else found).append(entry.path)
    return found


def _matching(pattern: str) -> list[str]:
    """The files that match a pattern, without hidden ones that the pattern does not name."""
    return _not_hidden(pattern, filter(os.path.isfile, glob.glob(pattern, recursive=True)))


def _not_hidden(where: str, paths: Iterable[str]) -> list[str]:
    """The files of a folder or a pattern that are not hidden; all of them if ``where`` itself has hidden names."""
    hidden = any(_is_hidden(name) for name in _names(where))
    kept = len(list(itertools.takewhile(lambda name: not glob.has_magic(name), _names(where))))
    return [path for path in paths if hidden or not any(map(_is_hidden, _names(path)[kept:]))]


def _names(path: str) -> list[str]:
    return path.replace(os.sep, "/").split("/")


def _is_hidden(name: str) -> bool:
    return name.startswith((".", "_")) and name not in (".", "..")


def _of_one_suffix(where: Path, paths: list[str]) -> list[str]:
    """The files in natural order. Raises for no files, and for several suffixes."""
    name = os.fspath(where)
    if not paths:
        what = "files in the folder" if os.path.isdir(where) else "file matches the pattern"
        raise FileNotFoundError(f"no {what} {name!r} (names that begin with '.' or '_' are left out)")
    suffixes: dict[str, list[str]] = {}
    for path in paths:
        suffixes.setdefault(_suffix_of(path), []).append(path)
    if len(suffixes) > 1:
        found = ", ".join(
            f"{len(these)} {suffix or 'without one'} ({os.path.basename(min(these))}{', ...' * (len(these) > 1)})"
            for suffix, these in sorted(suffixes.items(), key=lambda item: -len(item[1]))
        )
        most = max(suffixes, key=lambda suffix: len(suffixes[suffix]))
        pattern = os.path.join(name, f"**/*{most}") if os.path.isdir(where) else f"*{most}"
        raise unexpected(
            name, "files of one suffix", f"{found}; name those that are meant by a pattern, as {pattern!r}"
        )
    return sorted(paths, key=lambda path: [*map(_natural, _names(path))])


def _natural(name: str) -> tuple[list[tuple[int, str]], str]:
    """A sorting key by which part-2 comes before part-10."""
    pieces = re.split(r"(\d+)", name)
    return [(int(piece), "") if k % 2 else (-1, piece) for k, piece in enumerate(pieces)], name


def _suffix_of(path: str) -> str:
    if match := IDX_NAME.search(path):
        return match[0]
    return os.path.splitext(path)[1].lower()


def _format_of(path: str) -> str:
    suffix = _suffix_of(path)
    if IDX_NAME.search(path):
        return "idx"
    if suffix not in SUFFIXES:
        known = ", ".join([*SUFFIXES, "-idx3-ubyte"])
        raise unexpected(
            path,
            f"a name that ends in one of {known}",
            f"{suffix or 'no suffix'!r}; name the format by format=, one of {', '.join(FORMATS)}",
        )
    return SUFFIXES[suffix]


# --- what is in them ----------------------------------------------------------------------------------------------


def _opened(openers: list[Opener], name: str, options: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """The files' sources, compared by their headers and closed again; and the columns of tables."""
    opening = FORMATS[name]
    known = dict(list(inspect.signature(opening).parameters.items())[1:])  # all but the path
    if wrong := sorted(options.keys() - known.keys()):
        raise ArgumentError(f"files of {name} have the options {', '.join(known)}, got {wrong[0]!r}")
    columns: dict[str, Any] = {"columns": None} if "columns" in known and "columns" not in options else {}
    needed = [key for key, given in known.items() if given.default is given.empty and key not in options | columns]
    if needed:
        raise ArgumentError(
            f"files of {name} need the option {needed[0]!r}, which was not given, as in "
            f"gb.sources.files(path, {needed[0]}=...)"
        )
    parts: list[Any] = []
    for opener in openers:
        try:
            part = opening(opener, **columns, **options)
        except ArgumentError as error:
            if not parts or isinstance(error, DataFormatError):
                raise
            raise DataFormatError(f"expected the same in {opener.path} as in {parts[0].path}: {error}") from error
        part.close()
        if not parts and columns:
            columns = {"columns": part.columns}  # in this order, whatever it is in the other files
        if parts:
            _compare(parts[0], part, all_columns=bool(columns))
        parts.append(part)
    return parts, columns


def _compare(first: Any, part: Any, all_columns: bool) -> None:
    """Raise DataFormatError for the first difference between the contents of two files."""
    like = f"as in {first.path}"
    if hasattr(first, "fields"):
        for column, kind in first.fields.items():
            if part.fields[column] != kind:
                raise unexpected(part.path, f"column {column!r} of type {kind}, {like}", part.fields[column])
        if all_columns and (more := sorted(set(part.names) - set(first.names))):
            raise unexpected(part.path, f"the columns {', '.join(first.names)}, {like}", f"{more[0]!r}, too")
        part.share_lengths(first)
    elif part.forms != first.forms:
        expected, found = (", ".join(f"{dtype} {shape}" for dtype, shape in of.forms) for of in (first, part))
        raise unexpected(part.path, f"samples of {expected}, {like}", found)


# --- the source ---------------------------------------------------------------------------------------------------


class Parts:
    """The samples of several files, one file after another: a :class:`Source`.

    path: their name in messages
    parts: the files' sources
    what: the format and its options, for the identity

    ``block`` is the largest block of a file, and ``boundaries`` has the blocks of all files, where these read
    neighbours together. ``forms`` is None before the first reading where types alone do not say it.
    """

    def __init__(self, path: str, parts: list[Any], what: str) -> None:
        self.path, self._parts = path, parts
        self._starts = np.cumsum([0, *map(len, parts)])
        first = parts[0]
        self.forms: list[Form] | None = first.forms
        self._open: OrderedDict[int, None] = OrderedDict()
        self._turn, self._last = InTurn(), 0
        if hasattr(first, "block"):
            self.block = max(part.block for part in parts)
            if self.block > 1:
                starts = [part.starts[:-1] + start for part, start in zip(parts, self._starts, strict=False)]
                self.boundaries = np.unique(np.concatenate([*starts, self._starts[-1:]]))
        self.identity = _identity(parts, what)

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def held_bytes(self) -> int:
        """The most bytes besides the result: the latest decoded block, and as much while it is decoded."""
        if self.forms is None or not hasattr(self, "block"):
            return 0
        row = sum(dtype.itemsize * math.prod(shape) for dtype, shape in self.forms)
        return int(2 * self.block * row)

    def read(self, indices: np.ndarray, /) -> Any:
        """The samples at ``indices``: x, or (x, y)."""
        if self.forms is None:
            with self._turn:
                first = self._used(0).read(np.zeros(1, np.int64))
            self.forms = [(array.dtype, array.shape[1:]) for array in (first if isinstance(first, tuple) else (first,))]
        out = tuple(np.empty((len(indices), *shape), dtype) for dtype, shape in self.forms)
        self.read_into(indices, out)
        return out if len(out) > 1 else out[0]

    def read_into(self, indices: np.ndarray, out: Any, /) -> None:
        """Write the result of :meth:`read` into ``out``, an array or a pair of arrays."""
        arrays = out if isinstance(out, tuple) else (out,)
        with self._turn:
            for number, here, places in self._by_part(indices):
                with noting("rows", places, self._where(number)):
                    if here[-1] - here[0] == len(here) - 1:
                        self._used(number).fill(places, [array[here[0] : here[-1] + 1] for array in arrays])
                    else:
                        found = self._used(number).read(places)
                        for array, rows in zip(arrays, found if isinstance(found, tuple) else (found,), strict=True):
                            array[here] = rows

    def expect(self, indices: np.ndarray, /) -> None:
        """Start reading the samples at ``indices`` ahead, where their files can, while others are used."""
        if not hasattr(self._parts[0], "expect"):
            return
        with self._turn:
            for number, _, places in self._by_part(indices):
                with noting("rows", places, self._where(number)):
                    self._opened(number).expect(places)

    def place_of(self, index: int) -> str:
        """The place of a sample in words."""
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        return f"row {index - self._starts[number]} of {self._where(number)}"

    def _where(self, number: int) -> str:
        return f"{self._parts[number].path}, file {number + 1} of {len(self._parts)}"

    def _by_part(self, indices: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Each file with its samples: their positions among ``indices``, and their places in the file.

        Runs of neighbours, as in a window, come in the given order, so that the latest decoded block serves the next
        reading, too; samples from everywhere come file by file.
        """
        numbers = np.searchsorted(self._starts, indices, side="right") - 1
        order = np.arange(len(indices))
        if np.count_nonzero(np.diff(numbers)) >= 2 * len(np.unique(numbers)):
            order = np.argsort(numbers, kind="stable")
        for here in np.split(order, np.flatnonzero(np.diff(numbers[order])) + 1):
            number = int(numbers[here[0]])
            yield number, here, indices[here] - self._starts[number]

    def _used(self, number: int) -> Any:
        """A file's source, to read from; the file that was read before forgets its decoded block."""
        if number != self._last and hasattr(self._parts[self._last], "forget"):
            self._parts[self._last].forget()  # one file at a time holds a decoded block
        self._last = number
        return self._opened(number)

    def _opened(self, number: int) -> Any:
        """A file's source, which opens when it is used; the least recently used files are closed."""
        self._open[number] = None
        self._open.move_to_end(number)
        while len(self._open) > OPEN:
            self._parts[self._open.popitem(last=False)[0]].close()
        return self._parts[number]


def _identity(parts: list[Any], what: str) -> str:
    """The number of files and a digest of what is read of them, their names, sizes, rows and times of change."""
    names = [_names(part.path) for part in parts]
    folders = zip(*(name[:-1] for name in names), strict=False)
    common = len(list(itertools.takewhile(lambda of: len(set(of)) == 1, folders)))  # files may be moved together
    lines = [f"{name[common:]} {len(part)} {part.version}" for name, part in zip(names, parts, strict=True)]
    digest = hashlib.sha256("\n".join([what, *lines]).encode()).hexdigest()
    return f"{len(parts)} files, {digest[:16]}"
