"""Numbers that grow by appending, such as the loss of every step: 8 bytes each, in memory and in a file of their own.

The file stands beside the checkpoints of a run, and each save appends what is new. It is made of blocks, all of them
little-endian: the place of a series among those of the checkpoint and how many numbers follow, two uint64, and then the
numbers, float64. A checkpoint says in its ``reference`` how many bytes of the file belong to it, with their SHA-256.
What comes after them is of a save that was cut off, or of a later checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
import warnings
from array import array
from collections.abc import Iterable, Iterator, Mapping, MutableSequence, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, overload

import numpy as np

from gpubatch.errors import CheckpointWarning

__all__ = ["FILE", "Series", "SeriesFile", "Tails", "read_series", "tails_of"]

FILE = re.compile(r"history-(\d{6,})\.f64")  # the number is that of the first checkpoint with it
BLOCK = struct.Struct("<QQ")
AT_ONCE = 1 << 23  # bytes that are read at a time


class Series(MutableSequence[float]):
    """A list of floats that takes 8 bytes for each; ``np.asarray`` and :meth:`tolist` copy it.

    It is no subclass of ``list``: libraries in C, such as pyarrow and orjson, would look past its methods and find an
    empty list.
    """

    __slots__ = ("_numbers", "changes")

    def __init__(self, values: Iterable[float] = ()) -> None:
        self._numbers: array[float] = array("d", values._numbers if isinstance(values, Series) else values)
        self.changes = 0  # how often it was changed other than by appending

    @staticmethod
    def of(values: Iterable[float]) -> Series:
        """``values`` themselves if they are a series, else a series of them."""
        return values if isinstance(values, Series) else Series(values)

    def append(self, value: float) -> None:
        """Add a number at the end."""
        self._numbers.append(value)

    def extend(self, values: Iterable[float]) -> None:
        """Add numbers at the end, all or none."""
        self._numbers.extend(values._numbers if isinstance(values, Series) else array("d", values))

    def insert(self, index: int, value: float) -> None:
        """Insert a number before ``index``."""
        self.changes += 1
        self._numbers.insert(index, value)

    def clear(self) -> None:
        """Remove all numbers."""
        del self[:]

    def tolist(self) -> list[float]:
        """The numbers as a plain list, which JSON can hold."""
        return self._numbers.tolist()

    def bytes_from(self, start: int) -> memoryview:
        """A copy of the numbers from ``start`` on, as the machine holds them."""
        return memoryview(self._numbers[start:]).cast("B")

    def extend_from_bytes(self, data: bytes) -> None:
        """Add numbers that :meth:`bytes_from` gave."""
        self._numbers.frombytes(data)

    @overload
    def __getitem__(self, index: int) -> float: ...

    @overload
    def __getitem__(self, index: slice) -> Series: ...

    def __getitem__(self, index: int | slice) -> float | Series:
        found = self._numbers[index]
        return Series(found) if isinstance(found, array) else found

    def __setitem__(self, index: Any, value: Any) -> None:
        if isinstance(index, slice):
            value, replaced = array("d", value), range(*index.indices(len(self)))
            if replaced.step != 1 and len(value) != len(replaced):
                raise ValueError(f"a slice of {len(replaced)} numbers cannot be replaced by {len(value)}")
        self.changes += 1
        self._numbers[index] = value

    def __delitem__(self, index: int | slice) -> None:
        self.changes += 1
        del self._numbers[index]

    def __len__(self) -> int:
        return len(self._numbers)

    def __iter__(self) -> Iterator[float]:
        return iter(self._numbers)

    def __add__(self, other: Sequence[float]) -> Series:
        found = Series(self)
        found.extend(other)
        return found

    def __radd__(self, other: Sequence[float]) -> Series:
        return Series(other) + self

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Series):
            return self._numbers == other._numbers
        return self.tolist() == other if isinstance(other, list) else NotImplemented

    __hash__ = None  # type: ignore[assignment]  # as of a list

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("numbers that grow cannot be shared with an array, only copied")
        return np.array(
            self._numbers[:], dtype
        )  # a copy of its own: what shares memory with an array keeps it as it is

    def __copy__(self) -> Series:
        return Series(self)

    def __reduce__(self) -> Any:
        return Series, (self._numbers,)

    def __repr__(self) -> str:
        return repr(self.tolist())


class Portion(NamedTuple):
    """A series of a file: what it is called, its ``changes`` when it was written, and how many of its numbers were."""

    name: str
    series: Series
    changes: int
    length: int


class SeriesFile(NamedTuple):
    """A checkpoint's reference to the file: its first ``size`` bytes hold the ``kept`` series; ``digest`` is theirs."""

    path: Path
    size: int
    digest: Any
    kept: tuple[Portion, ...]

    @property
    def reference(self) -> str:
        """The reference in the checkpoint, for JSON."""
        series = [[kept.name, kept.length] for kept in self.kept]
        found = {"file": self.path.name, "bytes": self.size, "sha256": self.digest.hexdigest(), "series": series}
        return json.dumps(found)

    def begins(self, series: Mapping[str, Series]) -> bool:
        """Whether the file is there, and ``series`` are those that it has, of which only more was appended."""
        try:
            there = self.path.stat().st_size >= self.size
        except OSError:
            return False
        return (
            not self.path.is_symlink()
            and there
            and all(series.get(of.name) is of.series and of.series.changes == of.changes for of in self.kept)
        )


class Tails(NamedTuple):
    """The numbers of the series that are not in ``before`` yet; all of them if that is None."""

    before: SeriesFile | None
    blocks: tuple[bytes | memoryview, ...]
    kept: tuple[Portion, ...]

    def write(self, new: Path) -> SeriesFile:
        """Append to the file, or write the file ``new``, and sync it; whatever is there beyond is cut off."""
        path, size, digest = (new, 0, hashlib.sha256()) if self.before is None else self.before[:3]
        digest = digest.copy()
        if path.is_symlink():  # what it leads to is not this run's
            path.unlink()
        with path.open("wb" if self.before is None else "r+b") as file:
            file.seek(size)
            file.truncate()
            for block in self.blocks:
                digest.update(block)
                file.write(block)
            size = file.tell()
            file.flush()
            os.fsync(file.fileno())
        return SeriesFile(path, size, digest, self.kept)


def tails_of(series: Mapping[str, Series], before: SeriesFile | None) -> Tails:
    """Copy what is not yet in the file ``before``, if that has the beginning of these series; otherwise all."""
    if before is not None and not before.begins(series):
        before = None
    counts = {} if before is None else {of.name: of.length for of in before.kept}
    blocks, kept = list[bytes | memoryview](), list[Portion]()
    for place, name in enumerate([*counts, *(name for name in series if name not in counts)]):
        one, start = series[name], counts.get(name, 0)
        if len(one) > start:
            blocks += [BLOCK.pack(place, len(one) - start), one.bytes_from(start)]
        kept.append(Portion(name, one, one.changes, len(one)))
    return Tails(before, tuple(blocks), tuple(kept))


def read_series(checkpoint: Path, reference: str) -> tuple[dict[str, Series], SeriesFile | None]:
    """The series that belong to a checkpoint, by name, and their file.

    Where the file is not there or not as it was, they are NaN, the file is None, and a :class:`CheckpointWarning` says
    so. A reference that no checkpoint has raises LookupError, ValueError or TypeError.
    """
    found = json.loads(reference)
    file, size, digest = found["file"], found["bytes"], found["sha256"]
    counts = dict(found["series"])
    if not (isinstance(file, str) and FILE.fullmatch(file)) or any(
        type(n) is not int for n in (size, *counts.values())
    ):
        raise ValueError(f"it refers to {reference[:200]}")
    if min(counts.values(), default=0) < 0 or 8 * sum(counts.values()) > size:
        raise ValueError(f"its series have {counts} numbers in {size} bytes")
    path = checkpoint.with_name(file)
    try:
        if path.exists() and not path.is_file():  # a pipe would never be opened
            raise ValueError("it is no file")
        with path.open("rb") as opened:
            series, of = _blocks(opened, size, len(counts))
            if of.hexdigest() != digest or [len(one) for one in series] != list(counts.values()):
                raise ValueError("it was changed or damaged")
    except (OSError, ValueError) as error:
        why = "is not beside it" if isinstance(error, FileNotFoundError) else f"cannot be used ({error})"
        warnings.warn(
            f"{checkpoint} needs the file {file} for {', '.join(counts)}, but that {why}: these numbers are NaN up to "
            "here; nothing else depends on them",
            CheckpointWarning,
            stacklevel=2,
        )
        try:
            return {name: Series(array("d", [np.nan]) * count) for name, count in counts.items()}, None
        except MemoryError:
            raise ValueError(f"its series have {counts} numbers") from None
    named = dict(zip(counts, series, strict=True))
    return named, SeriesFile(path, size, of, tuple(Portion(name, one, 0, len(one)) for name, one in named.items()))


def _blocks(file: BinaryIO, size: int, count: int) -> tuple[list[Series], Any]:
    """The series in the first ``size`` bytes of a file, and the digest of these bytes; ValueError for anything odd."""
    if os.fstat(file.fileno()).st_size < size:
        raise ValueError(f"it has fewer than {size} bytes")
    series, digest, place = [Series() for _ in range(count)], hashlib.sha256(), 0
    while place < size:
        block = file.read(BLOCK.size)
        if place + BLOCK.size > size:
            raise ValueError("it was changed or damaged")
        digest.update(block)
        of, numbers = BLOCK.unpack(block)
        place += BLOCK.size + 8 * numbers
        if of >= count or place > size:
            raise ValueError("it was changed or damaged")
        for start in range(0, 8 * numbers, AT_ONCE):
            piece = file.read(min(AT_ONCE, 8 * numbers - start))
            digest.update(piece)
            series[of].extend_from_bytes(piece)
    return series, digest
