"""Checkpoints: a state on disk that is there whole, or not at all.

A checkpoint is one file in the safetensors format: the arrays as they are, everything else as JSON in the metadata. It
is written under another name, synced to the disk and then renamed, so whatever ends the program or fills the disk
leaves the checkpoints before it as they were. Its name has the checksum of its bytes:

    checkpoint-000012-0123456789abcdef.safetensors

is the twelfth of its folder, and the SHA-256 of the file begins with these 16 digits. Nothing is ever unpickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import platform
import re
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gpubatch.backend import backend_of, is_cupy
from gpubatch.errors import (
    ArgumentError,
    CheckpointError,
    CheckpointWarning,
    DataFormatError,
    DTypeError,
    check_bool,
    check_choice,
    check_int,
)

__all__ = ["Checkpoints", "read"]

FORMAT = 1  # of the JSON; a reader refuses what is newer than itself
NAME = re.compile(r"checkpoint-(\d{6,})-([0-9a-f]{16})\.safetensors")
UNFINISHED = "checkpoint-{}.unfinished"  # with the number of the process
HEADER_LIMIT = 1 << 24  # bytes: about 100,000 arrays. A longer header is refused before memory is asked for.
ARRAY = "__array__"  # the key that stands in the JSON for an array, with its name

# Element types by the names that safetensors has for them; stored little-endian.
DTYPES = {
    "BOOL": "?",
    "U8": "<u1",
    "I8": "<i1",
    "U16": "<u2",
    "I16": "<i2",
    "F16": "<f2",
    "U32": "<u4",
    "I32": "<i4",
    "F32": "<f4",
    "U64": "<u8",
    "I64": "<i8",
    "F64": "<f8",
}
NAMES = {np.dtype(kind): name for name, kind in DTYPES.items()}


class Checkpoints:
    """The checkpoints of one run in ``folder``, and when :func:`~gpubatch.train.fit` adds to them.

    That is after every ``every`` steps, or where this is None after every epoch. The last ``keep`` are kept. With
    ``background`` a thread writes while the training goes on. If one cannot be written, ``on_failure="raise"`` ends the
    run with a :class:`CheckpointError`, and ``"warn"`` lets it go on with a :class:`CheckpointWarning`.
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
        self._writer: threading.Thread | None = None
        self._error: Exception | None = None

    def files(self) -> list[Path]:
        """The checkpoints that are there, the oldest first."""
        try:
            found = [(int(match[1]), path) for path in self.folder.iterdir() if (match := NAME.fullmatch(path.name))]
        except FileNotFoundError:
            return []
        return [path for _, path in sorted(found)]

    def open(self) -> None:
        """Make the folder where there is none, see that it can be written to, and clear away what was cut off."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for path in self.folder.glob(UNFINISHED.format("*")):
                path.unlink(missing_ok=True)
            trial = self.folder / UNFINISHED.format(os.getpid())
            trial.touch()
            trial.unlink()
        except OSError as error:
            raise CheckpointError(f"checkpoints cannot be written to {self.folder}: {_why(error)}") from error

    def save(self, state: Mapping[str, Any]) -> bool:
        """Write ``state``: mappings and lists of arrays, numbers and text, which :meth:`newest` gives back.

        Whether nothing went wrong is returned. With ``background`` the arrays must stay as they are until the next
        ``save`` or :meth:`wait`, and these raise what went wrong.
        """
        self.wait()
        pieces = _pack(state)
        if self.background:
            self._writer = threading.Thread(target=self._try_to_write, args=(pieces,), name="gpubatch-checkpoint")
            self._writer.start()
            return True
        self._try_to_write(pieces)
        return self.wait()

    def wait(self) -> bool:
        """Wait for what is being written; if it could not be, raise that or warn and return False."""
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        if self._error is None:
            return True
        error, self._error = self._error, None
        if not isinstance(error, OSError):
            raise error
        message = f"no checkpoint could be written to {self.folder}: {_why(error)}; {self._what_is_there()}"
        if self.on_failure == "raise":
            raise CheckpointError(message) from error
        warnings.warn(message, CheckpointWarning, stacklevel=2)
        return False

    def newest(self) -> tuple[Path, dict[str, Any]] | None:
        """The newest complete checkpoint and its state; None where the folder has none at all.

        A torn or corrupt one is passed over with a :class:`CheckpointWarning`. Raises :class:`DataFormatError` where
        there are checkpoints and not one of them is complete.
        """
        reasons = []
        for path in reversed(self.files()):
            try:
                return path, read(path)
            except (DataFormatError, OSError) as error:
                reasons.append(str(error))
                warnings.warn(f"{error}; it is passed over", CheckpointWarning, stacklevel=2)
        if reasons:
            raise DataFormatError(f"{self.folder} has no complete checkpoint: {'; '.join(reasons)}")
        return None

    def __repr__(self) -> str:
        when = "epoch" if self.every is None else f"{self.every} steps"
        return f"<Checkpoints in {str(self.folder)!r}, after every {when}, the last {self.keep} kept>"

    # --- inside ---

    def _try_to_write(self, pieces: list[Any]) -> None:
        try:
            self._write(pieces)
        except Exception as error:  # whatever it is, it belongs to the caller
            self._error = error

    def _write(self, pieces: list[Any]) -> None:
        """Write, sync, rename, sync the folder; only then are older ones removed."""
        files = self.files()
        number = int(NAME.fullmatch(files[-1].name)[1]) + 1 if files else 1  # type: ignore[index]
        unfinished = self.folder / UNFINISHED.format(os.getpid())
        try:
            digest = _write_synced(unfinished, pieces)
            path = self.folder / f"checkpoint-{number:06}-{digest}.safetensors"
            os.replace(unfinished, path)
        finally:
            with contextlib.suppress(OSError):
                unfinished.unlink(missing_ok=True)
        _sync_folder(self.folder)
        for old in [*files, path][: -self.keep]:
            with contextlib.suppress(OSError):  # one too many does no harm
                old.unlink()

    def _what_is_there(self) -> str:
        try:
            found = self.files() if self.folder.is_dir() else None
        except OSError:
            found = None
        if found is None:
            return "the folder cannot be read any more"
        return f"the newest one is {found[-1].name}" if found else "there is none before it"


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The state in the checkpoint ``path``, its arrays as NumPy's.

    Takes no more memory than the file is large, and as much again as its header. Raises :class:`DataFormatError` where
    the file is not complete or not a checkpoint.
    """
    path = Path(path)
    name = NAME.fullmatch(path.name)
    if name is None:
        raise DataFormatError(f"{path} must be named checkpoint-NUMBER-CHECKSUM.safetensors, as it was written")
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if length > min(HEADER_LIMIT, size - len(start)):
            raise DataFormatError(
                f"{path} is torn or corrupt: a header of {length} bytes in a file of {size}; at most {HEADER_LIMIT}"
            )
        header = file.read(length)
        data = np.empty(size - len(start) - len(header), np.uint8)
        got = file.readinto(data)  # type: ignore[arg-type]
    digest = hashlib.sha256(start)
    digest.update(header)
    digest.update(data.data)
    if got != data.size or not digest.hexdigest().startswith(name[2]):
        raise DataFormatError(f"{path} is torn or corrupt: its {size} bytes do not have the checksum in its name")
    try:
        return _unpack(header, data)
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise DataFormatError(f"{path} is not a checkpoint: {error}") from error


# --- the file ------------------------------------------------------------------------------------------------------


def _pack(state: Mapping[str, Any]) -> list[Any]:
    """The bytes of the file, as a header and the arrays themselves, which are not copied."""
    arrays: dict[str, np.ndarray] = {}
    tree = _without_arrays(state, "", arrays)
    versions = {
        "gpubatch": sys.modules["gpubatch"].__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }
    metadata = {"format": str(FORMAT), "state": json.dumps(tree), "versions": json.dumps(versions)}
    header: dict[str, Any] = {"__metadata__": metadata}
    end, pieces = 0, []
    # The widest first: every array is then aligned to its element type.
    for name, array in sorted(arrays.items(), key=lambda item: -item[1].itemsize):
        stored = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
        begin, end = end, end + stored.nbytes
        header[name] = {"dtype": NAMES[stored.dtype], "shape": list(array.shape), "data_offsets": [begin, end]}
        pieces.append(stored.reshape(-1).view(np.uint8))
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > HEADER_LIMIT:
        raise ArgumentError(f"state needs a header of {len(text)} bytes, more than {HEADER_LIMIT}")
    return [len(text).to_bytes(8, "little") + text, *pieces]


def _unpack(header: bytes, data: np.ndarray) -> dict[str, Any]:
    """The state; whatever is wrong with the header is a LookupError, a ValueError or one of their like."""
    entries = json.loads(header)
    metadata = entries.pop("__metadata__")
    if metadata["format"] != str(FORMAT):
        written = metadata.get("versions")
        raise ValueError(f"its format is {metadata['format']}, not {FORMAT}; it was written with {written}")
    arrays, covered = {}, 0
    for name, entry in entries.items():
        dtype, shape, (begin, end) = np.dtype(DTYPES[entry["dtype"]]), entry["shape"], entry["data_offsets"]
        if any(type(n) is not int or not 0 <= n <= data.size for n in (*shape, begin, end)):
            raise ValueError(f"{name} has shape {shape} at {begin} to {end} in {data.size} bytes")
        if begin != covered or end - begin != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{name} of {dtype} and shape {shape} cannot be at {begin} to {end}, after {covered}")
        arrays[name] = data[begin:end].view(dtype).reshape(shape)
        covered = end
    if covered != data.size:
        raise ValueError(f"its arrays end at {covered} of {data.size} bytes")
    state = _with_arrays(json.loads(metadata["state"]), arrays)
    if not isinstance(state, dict):
        raise ValueError(f"its state is a {type(state).__name__}, not a mapping")
    return state


def _without_arrays(value: Any, name: str, arrays: dict[str, np.ndarray]) -> Any:
    """``value`` as JSON can hold it; its arrays go to ``arrays`` under the dotted names of their places."""
    if isinstance(value, np.ndarray) or is_cupy(value):
        if value.dtype.newbyteorder("<") not in NAMES:
            raise DTypeError(f"{name} must hold real numbers to be saved, got dtype {value.dtype}")
        if name in arrays:
            raise ArgumentError(f"two arrays of state would have one name, {name!r}")
        arrays[name] = backend_of(value).to_numpy(value)
        return {ARRAY: name}
    if isinstance(value, Mapping):
        return {key: _without_arrays(item, f"{name}.{key}".lstrip("."), arrays) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_arrays(item, f"{name}.{i}", arrays) for i, item in enumerate(value)]
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


def _write_synced(path: Path, pieces: list[Any]) -> str:
    """Write the pieces one after another and sync them to the disk; the checksum as it goes into the name."""
    with _hashing(pieces) as digest, path.open("wb") as file:
        for piece in pieces:
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def _hashing(pieces: list[Any]) -> Iterator[hashlib._Hash]:
    """The SHA-256 of the pieces, complete when the block is left: a thread hashes while the block waits for a disk."""
    digest = hashlib.sha256()

    def work() -> None:
        for piece in pieces:
            digest.update(piece)

    thread = threading.Thread(target=work, name="gpubatch-checksum")
    thread.start()
    try:
        yield digest
    finally:
        thread.join()


def _sync_folder(folder: Path) -> None:
    """Make a rename last: it is a change of the folder, not of the file."""
    if os.name == "nt":  # Windows does not open folders
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _why(error: OSError) -> str:
    return error.strerror or str(error)
