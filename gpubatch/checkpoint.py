"""Checkpoints: atomic saves of a state to disk.

A checkpoint is one safetensors file: the arrays as tensors, everything else as JSON in the metadata. It is written
under a temporary name, synced and then renamed, so a crash or a full disk leaves earlier checkpoints intact. The name

    checkpoint-000012-0123456789abcdef.safetensors

has the number in its folder, and the first 16 hex digits of the file's SHA-256. Nothing is ever unpickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import re
import shutil
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from safetensors import SafetensorError, safe_open

from gpubatch.backend import backend_of, is_cupy
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

__all__ = ["DTYPES", "Checkpoints", "open_tensors", "read", "replacing", "versions", "write_tensors"]

FORMAT = 1  # version of the JSON; a reader refuses any other
NAME = re.compile(r"checkpoint-(\d{6,})-([0-9a-f]{16})\.safetensors")
UNFINISHED = "checkpoint-{}.unfinished"  # a temporary folder; {} is the process id
HEADER_LIMIT = 100_000_000  # bytes, the limit of safetensors: about 500,000 arrays
ENTRY = 128  # most header bytes per array, besides its name and shape
ARRAY = "__array__"  # in the JSON, {ARRAY: name} is a reference to an array
STORED = {  # the names of safetensors for element types
    "bool": "BOOL",
    **{f"{kind}{bits}": f"{name}{bits}" for kind, name in (("uint", "U"), ("int", "I")) for bits in (8, 16, 32, 64)},
    **{f"float{bits}": f"F{bits}" for bits in (16, 32, 64)},
}
DTYPES = tuple("bool uint8 int8 uint16 int16 float16 uint32 int32 float32 uint64 int64 float64".split())
AT_ONCE = 1 << 23  # bytes that are written at a time


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
        self.folder = Path(folder)
        self.every = None if every is None else check_int("every", every, 1)
        self.keep = check_int("keep", keep, 1)
        self.background = check_bool("background", background)
        self.on_failure = check_choice("on_failure", on_failure, ["raise", "warn"])
        self._opened = False
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
        With ``background`` the arrays must not change until the next ``save`` or :meth:`wait`, which reports a failure.
        """
        self.wait()
        content = _split(state)
        if not self._opened:
            self.open()
        if self.background:
            self._writer = threading.Thread(target=self._try_to_write, args=content, name="gpubatch-checkpoint")
            self._writer.start()
            return True
        self._try_to_write(*content)
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
                return path, read(path)
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

    def _try_to_write(self, arrays: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
        try:
            self._write(arrays, metadata)
        except Exception as error:  # raised in the caller's thread, by wait
            self._error = error

    def _write(self, arrays: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
        """Write, sync, rename, sync the folder; only then remove old checkpoints."""
        files = self.files()
        number = int(NAME.fullmatch(files[-1].name)[1]) + 1 if files else 1  # type: ignore[index]
        unfinished = self.folder / UNFINISHED.format(os.getpid())
        try:
            unfinished.mkdir(exist_ok=True)
            digest = _write_synced(unfinished / "state", arrays, metadata)
            path = self.folder / f"checkpoint-{number:06}-{digest}.safetensors"
            os.replace(unfinished / "state", path)
        finally:
            with contextlib.suppress(OSError):
                (unfinished / "state").unlink(missing_ok=True)
                unfinished.rmdir()
        _sync_folder(self.folder)
        for old in [*files, path][: -self.keep]:
            with contextlib.suppress(OSError):  # an extra checkpoint does no harm
                old.unlink()

    def _newest_in_words(self) -> str:
        try:
            found = self.files() if self.folder.is_dir() else None
        except OSError:
            found = None
        if found is None:
            return "the folder can no longer be read"
        return f"the newest is {found[-1].name}" if found else "there is no earlier one"


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The state in the checkpoint ``path``, with NumPy arrays.

    Needs memory for the file and once more for its header. Raises :class:`DataFormatError` if the file is incomplete,
    corrupt or not a checkpoint.
    """
    path = Path(path)
    name = NAME.fullmatch(path.name)
    if name is None:
        raise DataFormatError(f"{path} must have its original name, checkpoint-NUMBER-CHECKSUM.safetensors")
    with path.open("rb") as file:
        size = _check_header(path, file, HEADER_LIMIT)
        file.seek(0)
        if not hashlib.file_digest(file, "sha256").hexdigest().startswith(name[2]):
            raise DataFormatError(f"{path} is torn or corrupt: its {size} bytes do not match the checksum in its name")
    with open_tensors(path, HEADER_LIMIT, "a checkpoint") as content:
        return _join(content.metadata() or {}, content.get_tensors())


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside ``path``, for a file that then takes its place at once; if it fails, nothing is left."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.unfinished")
    try:
        unfinished.unlink(missing_ok=True)
        yield unfinished
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    _sync_folder(path.parent)


def write_tensors(path: Path, arrays: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    """Write one safetensors file, whole or not at all."""
    with replacing(path) as unfinished:
        _write_synced(unfinished, arrays, metadata)


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


def _split(state: Mapping[str, Any]) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The arrays of ``state``, copied only if not contiguous, and the rest as metadata."""
    arrays: dict[str, np.ndarray] = {}
    tree = _without_arrays(state, "", arrays)
    metadata = {"format": str(FORMAT), "state": json.dumps(tree), "versions": versions()}
    length = len(json.dumps(metadata)) + sum(len(json.dumps([*x.shape, name])) + ENTRY for name, x in arrays.items())
    if length > HEADER_LIMIT:
        raise ArgumentError(f"state needs a header of {length} bytes, more than {HEADER_LIMIT}")
    return arrays, metadata


def _join(metadata: Mapping[str, str], arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The state. Metadata of another program raises LookupError, ValueError or TypeError."""
    if metadata["format"] != str(FORMAT):
        written = metadata.get("versions")
        raise ValueError(f"its format is {metadata['format']}, not {FORMAT}; it was written by {written}")
    state = _with_arrays(json.loads(metadata["state"]), arrays)
    if not isinstance(state, dict):
        raise ValueError(f"its state is a {type(state).__name__}, not a mapping")
    return state


def _without_arrays(value: Any, name: str, arrays: dict[str, np.ndarray]) -> Any:
    """``value`` for JSON; its arrays move to ``arrays``, named by their dotted paths."""
    if isinstance(value, np.ndarray) or is_cupy(value):
        if value.dtype.name not in DTYPES:
            raise DTypeError(f"{name} must hold real numbers to be saved, got dtype {value.dtype}")
        if name in arrays:
            raise ArgumentError(f"two arrays of state would have the same name, {name!r}")
        plain = backend_of(value).to_numpy(value)
        arrays[name] = np.asarray(plain, plain.dtype.newbyteorder("="), order="C")
        return {ARRAY: name}
    if isinstance(value, Mapping):
        if wrong := [key for key in value if not isinstance(key, str)]:
            raise DTypeError(f"the keys of {name or 'state'} must be text to be saved, got {wrong[0]!r}; use str(key)")
        return {key: _without_arrays(item, f"{name}.{key}".lstrip("."), arrays) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_arrays(item, f"{name}.{i}", arrays) for i, item in enumerate(value)]
    if isinstance(value, np.generic) and value.dtype.name in DTYPES:
        value = value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise DTypeError(f"{name} must be made of arrays, numbers, text, lists and mappings, got {type(value).__name__}")


def _with_arrays(value: Any, arrays: Mapping[str, np.ndarray]) -> Any:
    if isinstance(value, dict):
        if value.keys() == {ARRAY}:
            return arrays[value[ARRAY]]
        return {key: _with_arrays(item, arrays) for key, item in value.items()}
    return [_with_arrays(item, arrays) for item in value] if isinstance(value, list) else value


# --- the disk ------------------------------------------------------------------------------------------------------


def _write_synced(path: Path, arrays: dict[str, np.ndarray], metadata: dict[str, str]) -> str:
    """Write the file and sync it to the disk; return the checksum for its name.

    The arrays go from where they are to the file, a piece at a time, and each is hashed while it is written.
    """
    digest = hashlib.sha256()
    with path.open("xb") as file, ThreadPoolExecutor(1, "gpubatch-checksum") as hashing:
        for piece in _pieces(arrays, metadata):
            hashed = hashing.submit(digest.update, piece)
            file.write(piece)
            hashed.result()
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()[:16]


def _pieces(arrays: dict[str, np.ndarray], metadata: dict[str, str]) -> Iterator[Any]:
    """The bytes of a safetensors file: the length of its header, the header as JSON, and the arrays."""
    header: dict[str, Any] = {"__metadata__": metadata}
    # As the library does it: larger elements first, so that all are aligned.
    names, stop = sorted(arrays, key=lambda name: (-arrays[name].itemsize, name)), 0
    for name in names:
        array, start, stop = arrays[name], stop, stop + arrays[name].nbytes
        header[name] = {"dtype": STORED[array.dtype.name], "shape": array.shape, "data_offsets": (start, stop)}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in names:
        whole = arrays[name].reshape(-1).view(np.uint8)
        for first in range(0, whole.size, AT_ONCE):
            yield whole[first : first + AT_ONCE].data


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
