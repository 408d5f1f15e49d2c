"""Checkpoints: atomic saves of a state to disk.

A checkpoint is one safetensors file: the arrays as tensors, everything else as JSON in the metadata. It is written
under a temporary name, synced and then renamed, so a crash or a full disk leaves earlier checkpoints intact. The name

    checkpoint-000012-0123456789abcdef.safetensors

has the number in its folder, and in hex digits the file's CRC-32 and the last 32 bits of its size. Earlier versions put
the first digits of its SHA-256 there, and such files are read, too. Nothing is ever unpickled.

More than 64 arrays of one element type in a mapping or a list are one tensor, so that a million names fit. Their names
are the JSON of a tensor "tables.N.names", their shapes those in "tables.N.shapes": of each array the number of its
dimensions, then these. Numbers that grow with the run are in a file beside it (:mod:`gpubatch.series`).
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import platform
import re
import shutil
import sys
import threading
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from gpubatch.backend import Array, CudaBackend, backend_of, is_cupy, unmasked
from gpubatch.errors import (
    ArgumentError,
    CheckpointError,
    CheckpointWarning,
    DataFormatError,
    DTypeError,
    GpubatchError,
    check_bool,
    check_choice,
    check_int,
)
from gpubatch.params import FlatViews
from gpubatch.series import FILE, Series, SeriesFile, Tails, read_series, tails_of
from gpubatch.staging import Stages

__all__ = ["DTYPES", "HEADER_LIMIT", "Checkpoints", "open_tensors", "read", "replacing", "versions", "write_tensors"]

FORMAT = 2  # version of the JSON; a reader refuses any later one. The first had neither packed arrays nor series
NAME = re.compile(r"checkpoint-(\d{6,})-([0-9a-f]{16})\.safetensors")
UNFINISHED = "checkpoint-{}.unfinished"  # a temporary folder; {} is the process id
HEADER_LIMIT = 100_000_000  # bytes, the limit of safetensors
ENTRY = 128  # most header bytes per array, besides its name and shape
ARRAY = "__array__"  # in the JSON, {ARRAY: name} is a reference to an array
PACKED = "__packed__"  # {PACKED: name, "table": "tables.0"} to arrays that are one tensor
SERIES = "__series__"  # {SERIES: name} to numbers in the file beside
MANY = 64  # arrays of a mapping or a list that have tensors of their own
STORED = {  # the names of safetensors for element types
    "bool": "BOOL",
    **{f"{kind}{bits}": f"{name}{bits}" for kind, name in (("uint", "U"), ("int", "I")) for bits in (8, 16, 32, 64)},
    **{f"float{bits}": f"F{bits}" for bits in (16, 32, 64)},
}
DTYPES = tuple("bool uint8 int8 uint16 int16 float16 uint32 int32 float32 uint64 int64 float64".split())
AT_ONCE = 1 << 23  # bytes that are read or written at a time
SMALL = 1 << 16  # bytes of arrays that are brought together to be written
PINNED = 3  # pieces of AT_ONCE bytes through which arrays come from a GPU


class Checkpoints:
    """The checkpoints of one run, and when :func:`~gpubatch.train.fit` saves them.

    folder: where they are; ``fit`` creates it
    every: save after every so many steps, at least 1; None: after every epoch
    keep: how many of the newest to keep, at least 1
    background: write in a thread while training continues
    on_failure: if a checkpoint cannot be written, "raise" ends the run with a :class:`CheckpointError`, and "warn"
        continues with a :class:`CheckpointWarning`

    >>> checkpoints = gb.Checkpoints("runs/a", every=500, keep=3)  # doctest: +SKIP
    >>> gb.fit(net, loader, opt, epochs=5, checkpoint=checkpoints)  # doctest: +SKIP
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        every: int | None = None,
        keep: int = 3,
        background: bool = False,
        on_failure: str = "raise",
    ) -> None:
        if not isinstance(folder, (str, os.PathLike)):
            raise DTypeError(f"the folder of checkpoints must be a path, got {folder!r}")
        self.folder = Path(os.path.expanduser(folder))
        self.every = None if every is None else check_int("every", every, 1)
        self.keep = check_int("keep", keep, 1)
        self.background = check_bool("background", background)
        self.on_failure = check_choice("on_failure", on_failure, ["raise", "warn"])
        self._opened = False
        self._series: SeriesFile | None = None  # as the newest checkpoint refers to it
        self._writer: threading.Thread | None = None
        self._error: Exception | None = None

    def files(self) -> list[Path]:
        """The checkpoint files in the folder, oldest first."""
        try:
            found = [(int(match[1]), path) for path in self.folder.iterdir() if (match := NAME.fullmatch(path.name))]
        except FileNotFoundError:
            return []
        return [path for _, path in sorted(found)]

    def open(self) -> None:
        """Create the folder if necessary, check that it is writable, and remove unfinished checkpoints."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for path in self.folder.glob(UNFINISHED.format("*")):
                _remove(path)
            trial = self.folder / UNFINISHED.format(os.getpid())
            trial.mkdir()
            trial.rmdir()
        except OSError as error:
            raise CheckpointError(f"checkpoints cannot be written to {self.folder}: {_why(error)}") from error
        self._opened = True

    def save(self, state: Mapping[str, Any]) -> bool:
        """Save ``state``, mappings and lists of arrays, numbers and text; return whether that succeeded.

        The first call opens the folder if :meth:`open` did not.
        With ``background`` arrays in main memory must not change until the next ``save`` or :meth:`wait`, which reports
        a failure; those of a GPU are copied to main memory first.
        """
        self.wait()
        content = _split(state)
        tails = tails_of(content.series, self._series) if content.series else None
        if not self._opened:
            self.open()
        if self.background:
            content.fetch()
            self._writer = threading.Thread(
                target=self._try_to_write, args=(content, tails), name="gpubatch-checkpoint"
            )
            self._writer.start()
            return True
        self._try_to_write(content, tails)
        return self.wait()

    def wait(self) -> bool:
        """Wait for the background write. If it failed, raise CheckpointError, or warn and return False."""
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        if self._error is None:
            return True
        error, self._error = self._error, None
        if not isinstance(error, OSError):
            raise error
        message = f"no checkpoint could be written to {self.folder}: {_why(error)}; {self._newest_in_words()}"
        if self.on_failure == "raise":
            raise CheckpointError(message) from error
        warnings.warn(message, CheckpointWarning, stacklevel=2)
        return False

    def newest(self) -> tuple[Path, dict[str, Any]] | None:
        """The newest complete checkpoint and its state; None if the folder has no checkpoints.

        Torn or corrupt ones are skipped with a :class:`CheckpointWarning`; if all are, raises :class:`DataFormatError`.
        """
        reasons = []
        for path in reversed(self.files()):
            try:
                state, self._series = _read(path)
                return path, state
            except (DataFormatError, OSError) as error:
                reasons.append(str(error))
                warnings.warn(f"{error}; it is skipped", CheckpointWarning, stacklevel=2)
        if reasons:
            raise DataFormatError(f"{self.folder} has no complete checkpoint: {'; '.join(reasons)}")
        return None

    def __repr__(self) -> str:
        when = "epoch" if self.every is None else f"{self.every} steps"
        return f"<Checkpoints in {str(self.folder)!r}, after every {when}, the last {self.keep} kept>"

    def check(self, state: Mapping[str, Any]) -> None:
        """Raise what :meth:`save` would raise for a part of a state that cannot be saved; write nothing."""
        _split(state)

    # --- inside ---

    def _try_to_write(self, content: Content, tails: Tails | None) -> None:
        try:
            self._write(content, tails)
        except Exception as error:  # raised in the caller's thread, by wait
            self._error = error

    def _write(self, content: Content, tails: Tails | None) -> None:
        """Write, sync, rename, sync the folder; only then remove old checkpoints. The only writer."""
        files = self.files()
        number = int(NAME.fullmatch(files[-1].name)[1]) + 1 if files else 1  # type: ignore[index]
        unfinished = self.folder / UNFINISHED.format(os.getpid())
        series = None
        try:
            unfinished.mkdir(exist_ok=True)
            if tails is not None:
                series = tails.write(self.folder / f"history-{number:06}.f64")
                content.metadata["series"] = series.reference
            digest = _write_synced(unfinished / "state", content.tensors, content.metadata)
            path = self.folder / f"checkpoint-{number:06}-{digest}.safetensors"
            if tails is not None and tails.before is None:
                _sync_folder(self.folder)  # a checkpoint must not be there before the file that it refers to
            os.replace(unfinished / "state", path)
        finally:
            with contextlib.suppress(OSError):
                (unfinished / "state").unlink(missing_ok=True)
                unfinished.rmdir()
        _sync_folder(self.folder)
        self._series = series
        kept = [*files, path]
        for old in kept[: -self.keep]:
            with contextlib.suppress(OSError):  # an extra checkpoint does no harm
                old.unlink()
        self._remove_unused(kept[-self.keep :], series)

    def _remove_unused(self, checkpoints: list[Path], series: SeriesFile | None) -> None:
        """Remove files of series to which none of the checkpoints refers; there are any after an edited history."""
        own = None if series is None else series.path.name
        others = [path for path in self.folder.iterdir() if FILE.fullmatch(path.name) and path.name != own]
        if not others:
            return
        with contextlib.suppress(OSError, *UNREADABLE):  # an unreadable checkpoint may refer to any of them
            for path in checkpoints:
                with open_tensors(path, HEADER_LIMIT, "a checkpoint") as content:
                    used = json.loads(content.metadata().get("series", "{}")).get("file")
                others = [other for other in others if other.name != used]
            for other in others:
                other.unlink()

    def _newest_in_words(self) -> str:
        try:
            found = self.files() if self.folder.is_dir() else None
        except OSError:
            found = None
        if found is None:
            return "the folder can no longer be read"
        return f"the newest is {found[-1].name}" if found else "there is no earlier one"


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The state in the checkpoint ``path``, with NumPy arrays; more than 64 arrays in a mapping are :class:`FlatViews`.

    Needs memory for the file and once more for its header. Raises :class:`DataFormatError` if the file is incomplete,
    corrupt or not a checkpoint. Numbers that grow with the run, as a history's, are in the file beside it; without that
    they are NaN, and a :class:`CheckpointWarning` says so.
    """
    return _read(Path(path))[0]


def _read(path: Path) -> tuple[dict[str, Any], SeriesFile | None]:
    name = NAME.fullmatch(path.name)
    if name is None:
        raise DataFormatError(f"{path} must have its original name, checkpoint-NUMBER-CHECKSUM.safetensors")
    with path.open("rb") as file:
        size = _check_header(path, file, HEADER_LIMIT)
        file.seek(0)
        crc = 0
        while piece := file.read(AT_ONCE):
            crc = zlib.crc32(piece, crc)
        file.seek(0)
        if name[2] != _digits(crc, size) and not hashlib.file_digest(file, "sha256").hexdigest().startswith(name[2]):
            raise DataFormatError(f"{path} is torn or corrupt: its {size} bytes do not match the checksum in its name")
    with open_tensors(path, HEADER_LIMIT, "a checkpoint") as content:
        return _join(path, content.metadata() or {}, content.get_tensors())


def _digits(crc: int, size: int) -> str:
    return f"{crc:08x}{size % 2**32:08x}"


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside ``path``, for a file that then takes its place at once; if it fails, nothing is left."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.unfinished")
    if path.exists() and not path.is_file() and not path.is_dir():
        raise FileExistsError(errno.EEXIST, "this is a device or a pipe, whose place no file takes", str(path))
    try:
        unfinished.unlink(missing_ok=True)
        yield unfinished
        os.replace(unfinished, path)
    except OSError as error:
        if error.filename == os.fspath(unfinished):  # a name that its reader never gave
            error.filename = os.fspath(path)
        raise
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)
    _sync_folder(path.parent)


def write_tensors(path: Path, arrays: Mapping[str, np.ndarray], metadata: dict[str, str]) -> None:
    """Write one safetensors file, whole or not at all."""
    with replacing(path) as unfinished:
        _write_synced(unfinished, {name: Tensor(x.dtype, x.shape, [x]) for name, x in arrays.items()}, metadata)


@contextlib.contextmanager
def open_tensors(path: Path, limit: int, what: str) -> Iterator[Any]:
    """A safetensors file as that library opens it, with a header of at most ``limit`` bytes.

    What the library and Python raise inside for a file that is damaged, or no ``what``, is a :class:`DataFormatError`.
    """
    with path.open("rb") as file:
        _check_header(path, file, limit)
    try:
        with safe_open(path, "np", backend="pread") as content:  # not mapped: another process may truncate the file
            yield content
    except UNREADABLE as error:
        if isinstance(error, GpubatchError):
            raise
        raise DataFormatError(f"{path} is not {what}: {error}") from error


# What safetensors, JSON and Python raise for what is in a file.
UNREADABLE = (SafetensorError, ValueError, TypeError, LookupError, AttributeError, RecursionError)


def versions() -> str:
    """The versions that wrote a file, as JSON."""
    of = {
        "gpubatch": sys.modules["gpubatch"].__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }
    return json.dumps(of)


def _check_header(path: Path, file: BinaryIO, limit: int) -> int:
    """Raise DataFormatError if the header is longer than ``limit`` or the file; return the file's size."""
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if length > min(limit, size - 8):
        raise DataFormatError(
            f"{path} is torn or corrupt: a header of {length} bytes in a file of {size}; at most {limit}"
        )
    return size


# --- the state and the file ----------------------------------------------------------------------------------------


class Tensor(NamedTuple):
    """A tensor of the file: contiguous arrays of one element type, NumPy's or CuPy's, one after another."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    arrays: list[Array]


class Content:
    """The content of a checkpoint: tensors by name, the series in the file beside it, and the rest as metadata."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.series: dict[str, Series] = {}
        self.metadata: dict[str, str] = {}
        self._tables: list[tuple[list[str] | None, list[tuple[int, ...]]]] = []

    def add(self, name: str, dtype: np.dtype[Any], shape: tuple[int, ...], arrays: list[Array]) -> None:
        """Add a tensor, made contiguous and of the machine's byte order where it is not."""
        if dtype.name not in DTYPES:
            raise DTypeError(f"{name} must hold real numbers to be saved, got dtype {dtype}")
        if name in self.tensors:
            raise ArgumentError(f"two arrays of state would have the same name, {name!r}")
        self.tensors[name] = Tensor(dtype.newbyteorder("="), shape, [_plain(unmasked(name, array)) for array in arrays])

    def table(self, names: list[str] | None, shapes: list[tuple[int, ...]]) -> str:
        """The name of the table of such arrays, of which parameters and optimizer state have one together."""
        for number, known in enumerate(self._tables):
            if known == (names, shapes):
                return f"tables.{number}"
        self._tables.append((names, shapes))
        table = f"tables.{len(self._tables) - 1}"
        if names is not None:
            text = np.frombuffer(json.dumps(names).encode(), np.uint8)
            self.add(f"{table}.names", text.dtype, text.shape, [text])
        numbers = np.array([n for shape in shapes for n in (len(shape), *shape)], np.int64)
        self.add(f"{table}.shapes", numbers.dtype, numbers.shape, [numbers])
        return table

    def fetch(self) -> None:
        """Copy the arrays of GPUs to main memory."""
        for name, tensor in self.tensors.items():
            if any(is_cupy(array) for array in tensor.arrays):
                whole = np.empty(tensor.shape, tensor.dtype)
                flat, place = whole.reshape(-1).view(np.uint8), 0
                for piece in _bytes_of(tensor.arrays):
                    flat[place : place + piece.size] = piece
                    place += piece.size
                self.tensors[name] = tensor._replace(arrays=[whole])


def _plain(array: Array) -> Array:
    """An array that is contiguous and of the machine's byte order; a copy if it is not."""
    if array.flags.c_contiguous and array.dtype.isnative:
        return array
    if is_cupy(array):
        return backend_of(array).to_numpy(array)
    return np.asarray(array, array.dtype.newbyteorder("="), order="C")


def _split(state: Mapping[str, Any]) -> Content:
    """The content of a checkpoint of ``state``; only arrays that are not contiguous are copied."""
    content = Content()
    tree = _without_arrays(state, "", content)
    content.metadata |= {"format": str(FORMAT), "state": json.dumps(tree), "versions": versions()}
    names = sum(len(json.dumps([*tensor.shape, name])) + ENTRY for name, tensor in content.tensors.items())
    length = len(json.dumps(content.metadata)) + names
    if length > HEADER_LIMIT:
        raise ArgumentError(f"state needs a header of {length} bytes, more than {HEADER_LIMIT}")
    return content


def _join(
    path: Path, metadata: Mapping[str, str], arrays: Mapping[str, np.ndarray]
) -> tuple[dict[str, Any], SeriesFile | None]:
    """The state and the file of its series. Metadata of another program raises LookupError, ValueError or TypeError."""
    if metadata["format"] not in ("1", str(FORMAT)):
        written = metadata.get("versions")
        raise ValueError(f"its format is {metadata['format']}, not {FORMAT}; it was written by {written}")
    tree, file = json.loads(metadata["state"]), None
    series: dict[str, Series] = {}
    if not isinstance(tree, dict):
        raise ValueError(f"its state is a {type(tree).__name__}, not a mapping")
    if "series" in metadata:
        series, file = read_series(path, metadata["series"])
    return _with_arrays(tree, arrays, series, {}), file


def _without_arrays(value: Any, name: str, content: Content) -> Any:
    """``value`` for JSON; its arrays and series move to ``content``, named by their dotted paths."""
    if isinstance(value, np.ndarray) or is_cupy(value):
        content.add(name, value.dtype, value.shape, [value])
        return {ARRAY: name}
    if isinstance(value, Series):
        content.series[name] = value
        return {SERIES: name}
    if isinstance(value, (Mapping, list, tuple)) and len(value) > MANY and (table := _pack(value, name, content)):
        return {PACKED: name, "table": table}
    if isinstance(value, Mapping):
        _check_keys(value, name)
        return {key: _without_arrays(item, f"{name}.{key}".lstrip("."), content) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_arrays(item, f"{name}.{i}", content) for i, item in enumerate(value)]
    if isinstance(value, np.generic) and value.dtype.name in DTYPES:
        value = value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise DTypeError(f"{name} must be made of arrays, numbers, text, lists and mappings, got {type(value).__name__}")


def _check_keys(value: Mapping[Any, Any], name: str) -> None:
    if wrong := [key for key in value if not isinstance(key, str)]:
        raise DTypeError(f"the keys of {name or 'state'} must be text to be saved, got {wrong[0]!r}; use str(key)")


def _pack(value: Mapping[str, Any] | Sequence[Any], name: str, content: Content) -> str:
    """Make one tensor of arrays of one element type, and return its table; "" if ``value`` has anything else."""
    arrays = list(value.values() if isinstance(value, Mapping) else value)
    if not all(isinstance(array, np.ndarray) or is_cupy(array) for array in arrays):
        return ""
    dtype = arrays[0].dtype
    if any(array.dtype != dtype for array in arrays):
        return ""
    if isinstance(value, Mapping):
        _check_keys(value, name)
    shapes, size = [array.shape for array in arrays], sum(int(array.size) for array in arrays)
    content.add(name, dtype, (size,), [value.flat] if isinstance(value, FlatViews) else arrays)
    return content.table(list(value) if isinstance(value, Mapping) else None, shapes)


def _with_arrays(
    value: Any, arrays: Mapping[str, np.ndarray], series: Mapping[str, Series], tables: dict[str, Any]
) -> Any:
    """The value that :func:`_without_arrays` gave a tree for; ``tables`` has those that are read."""
    if isinstance(value, dict):
        if value.keys() == {ARRAY}:
            return arrays[value[ARRAY]]
        if value.keys() == {SERIES}:
            return series[value[SERIES]]
        if value.keys() == {PACKED, "table"}:
            table = value["table"]
            if table not in tables:
                tables[table] = _read_table(table, arrays)
            return _unpacked(value[PACKED], arrays[value[PACKED]], *tables[table])
        return {key: _with_arrays(item, arrays, series, tables) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_arrays(item, arrays, series, tables) for item in value]
    return value


def _read_table(table: str, arrays: Mapping[str, np.ndarray]) -> tuple[list[str] | None, list[tuple[int, ...]]]:
    """The names and shapes of a table; ValueError if they are none."""
    numbers, shapes, place = arrays[f"{table}.shapes"].tolist(), list[tuple[int, ...]](), 0
    while place < len(numbers):
        stop = place + 1 + int(numbers[place])
        if not place < stop <= len(numbers):
            raise ValueError(f"{table} has no shapes")
        shapes.append(tuple(numbers[place + 1 : stop]))
        place = stop
    text = arrays.get(f"{table}.names")
    names = None if text is None else json.loads(text.tobytes())
    if names is not None and (len(set(names)) != len(shapes) or not all(isinstance(name, str) for name in names)):
        raise ValueError(f"{table} has {len(shapes)} shapes and other names")
    return names, shapes


def _unpacked(name: str, flat: np.ndarray, names: list[str] | None, shapes: list[tuple[int, ...]]) -> Any:
    """Views into a tensor, in a mapping if they have names, else in a list."""
    if min((n for shape in shapes for n in shape), default=0) < 0 or sum(map(math.prod, shapes)) != flat.size:
        raise ValueError(f"{name} has {flat.size} numbers, other than its table")
    views = FlatViews(flat, dict(zip(names or map(str, range(len(shapes))), shapes, strict=True)))
    return views if names is not None else list(views.values())


# --- the disk ------------------------------------------------------------------------------------------------------


def _write_synced(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> str:
    """Write the file and sync it to the disk; return the checksum for its name.

    The arrays go from where they are to the file, a piece at a time, while a thread computes the checksum.
    """
    crc = size = 0
    with path.open("xb", buffering=0) as file, ThreadPoolExecutor(1, "gpubatch-checksum") as thread:
        for piece in _pieces(tensors, metadata):
            rest = memoryview(piece)
            found, size = thread.submit(zlib.crc32, rest, crc), size + rest.nbytes
            while rest:
                rest = rest[file.write(rest) :]
            crc = found.result()
        os.fsync(file.fileno())
    return _digits(crc, size)


def _pieces(tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> Iterator[Any]:
    """The bytes of a safetensors file: the length of its header, the header as JSON, and the arrays."""
    header: dict[str, Any] = {"__metadata__": metadata}
    # As the library does it: larger elements first, so that all are aligned.
    names, stop = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name)), 0
    for name in names:
        dtype, shape, _ = tensors[name]
        start, stop = stop, stop + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": STORED[dtype.name], "shape": shape, "data_offsets": (start, stop)}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in names:
        yield from _bytes_of(tensors[name].arrays)


def _bytes_of(arrays: list[Array]) -> Iterator[np.ndarray]:
    """The bytes of contiguous arrays of one element type, about AT_ONCE at a time; each is valid until the next.

    Those of a GPU come through pinned memory, small ones of main memory together.
    """
    together, size = list[np.ndarray](), 0
    stages: dict[Any, Stages] = {}
    for array in arrays:
        if not array.size:
            continue
        if not is_cupy(array) and array.nbytes <= SMALL:
            together.append(array)
            size += array.nbytes
            if size < AT_ONCE:
                continue
        if together:
            yield np.concatenate(together, axis=None).view(np.uint8)
            together, size = [], 0
        if is_cupy(array):
            backend = backend_of(array)
            assert isinstance(backend, CudaBackend)
            if backend not in stages:
                most = max(other.nbytes for other in arrays if backend.owns(other))
                stages[backend] = Stages(backend, min(AT_ONCE, max(1, most)), PINNED)
            yield from stages[backend].pieces(array)
        elif array.nbytes > SMALL:  # smaller ones were yielded with those before
            whole = array.reshape(-1).view(np.uint8)
            for first in range(0, whole.size, AT_ONCE):
                yield whole[first : first + AT_ONCE]
    if together:
        yield np.concatenate(together, axis=None).view(np.uint8)


def _remove(path: Path) -> None:
    """Remove an unfinished checkpoint: a folder, or a file of an older gpubatch."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Make a rename durable: it changes the folder, not the file."""
    if os.name == "nt":  # Windows cannot open folders
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _why(error: OSError) -> str:
    return error.strerror or str(error)
