"""The protocol of a source, and its reader, which checks every row."""

from __future__ import annotations

import contextlib
import math
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol, TypeAlias

import numpy as np

from gpubatch.backend import Array, unmasked
from gpubatch.errors import DTypeError, ShapeError, check_int, unexpected
from gpubatch.inputs import check_kind
from gpubatch.sources.arrays import check_rows, holds_all

Form: TypeAlias = tuple[np.dtype[Any], tuple[int, ...]]  # the element type and the shape of a sample


class Source(Protocol):
    """Anything but an array from which a loader reads samples.

    ``read(indices)`` takes places, int64 (samples,), in any order. It returns a new NumPy array of these samples as
    rows, or a pair of such arrays, (x, y). Element types and shapes of a row never change. One thread calls at a time,
    not always the same one.

    A source may also have:

    - ``path``: its name in messages.
    - ``block``: the number of neighbours that it reads at once, where single samples have a cost. A loader reads such a
      source in windows by default.
    - ``boundaries``: where blocks have unequal sizes, as in several files, the place where each begins, int64 ascending
      from 0, then the number of samples.
    - ``read_into(indices, out)``: writes the result of ``read`` into ``out``, an array or a pair of arrays.
    - ``expect(indices)``: announces samples that will be read soon.
    - ``forms``: the element type and shape of a sample of each array.
    - ``held_bytes``: bytes that it holds besides its results.
    - ``identity``: text that changes with the samples; saved states compare it.
    - ``place_of(index)``: the place of a sample in words.
    """

    def __len__(self) -> int:
        """The number of samples."""

    def read(self, indices: np.ndarray, /) -> Any:
        """The samples at ``indices``."""


def refuse_pickling() -> NoReturn:
    """Raise DTypeError: a source has files that are open in this process alone."""
    raise DTypeError(
        "a source cannot be pickled, since its files are open in this process: give the other process the path, and "
        "open it there"
    )


@contextlib.contextmanager
def noting(what: str, index: np.ndarray, where: str) -> Iterator[None]:
    """Add to an exception what was being read: samples or rows, which ones, and where they are."""
    try:
        yield
    except Exception as error:
        error.add_note(f"while reading {what} {index.min()} to {index.max()} of {where}")
        raise


class InTurn:
    """A lock for the threads of a process. A forked child has its own, which no thread of the parent holds."""

    def __init__(self) -> None:
        self._locks = {os.getpid(): threading.RLock()}

    def _lock(self) -> Any:
        process = os.getpid()
        return self._locks.get(process) or self._locks.setdefault(process, threading.RLock())

    def __enter__(self) -> None:
        self._lock().acquire()

    def __exit__(self, *_: object) -> None:
        self._lock().release()

    def __reduce__(self) -> NoReturn:
        refuse_pickling()


class Reader:
    """A source as a loader reads it: its element types and shapes are found once and checked at every reading.

    name: the argument

    ``where`` is its name in messages, ``bytes_read`` counts bytes.
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
        self.boundaries: np.ndarray | None = getattr(source, "boundaries", None)
        self._turn = InTurn()  # the saving of a run reads samples while a thread reads others
        self.parts: list[Part] = []
        forms, first = getattr(source, "forms", None), list[np.ndarray]()
        if forms is None:
            first = self._arrays(np.zeros(1, np.int64))
            forms = [(array.dtype, array.shape[1:]) for array in first]
        for number, (dtype, shape) in enumerate(forms):
            check_kind(self.where if self.where.startswith(name) else f"{name} ({self.where})", dtype)
            if math.prod(shape) == 0 or any(array.ndim == 0 for array in first):
                raise ShapeError(f"{name} must have samples of at least one number, {self.where} gives {(1, *shape)}")
            self.parts.append(Part(self, number, dtype, shape))
        if first:
            self._compare(np.zeros(1, np.int64), first)
        self.row_bytes = sum(part.bytes_per_sample(part.dtype) for part in self.parts)

    @property
    def held_bytes(self) -> int:
        """The most bytes that the source holds besides its results, where it says so."""
        held: int = getattr(self.source, "held_bytes", 0)
        return held

    @property
    def reads_into(self) -> bool:
        """Whether the source writes samples to their places, without an array of its own."""
        return self._read_into is not None

    def read(self, index: Array, limits: Sequence[float]) -> list[np.ndarray]:
        """The samples at ``index``, one array for each part, as they are stored.

        Raises ``NonFiniteError`` for a number beyond its part's limit, and ``DataFormatError`` for rows that have not
        the shape of the first one; both name the sample.
        """
        arrays = self._arrays(index)
        self._compare(index, arrays)
        self._check(index, arrays, limits)
        return [np.ascontiguousarray(array) for array in arrays]

    def read_into(self, index: Array, out: list[np.ndarray], limits: Sequence[float]) -> None:
        """Write the result of :meth:`read` into the C-contiguous arrays ``out``."""
        if self._read_into is None:
            for place, array in zip(out, self.read(index, limits), strict=True):
                place[...] = array
            return
        with noting("samples", index, self.where), self._turn:
            self._read_into(index, tuple(out) if len(out) > 1 else out[0])
        self._check(index, out, limits)

    def expect(self, index: Array) -> None:
        """Announce to the source that the samples at ``index`` will be read soon."""
        if self._expect is not None:
            with noting("samples", index, self.where), self._turn:
                self._expect(index)

    def _arrays(self, index: Array) -> list[np.ndarray]:
        with noting("samples", index, self.where), self._turn:
            found = self.source.read(index)
        arrays = list(found) if isinstance(found, tuple) else [found]
        for array in arrays:
            if not isinstance(array, np.ndarray):
                raise DTypeError(f"{self.where}: read must return NumPy arrays, got {type(array).__name__}")
            unmasked(f"what is read of {self.where}", array)
        return arrays

    def _compare(self, index: Array, arrays: list[np.ndarray]) -> None:
        expected = [(part.dtype, (len(index), *part.sample_shape)) for part in self.parts]
        found = [(array.dtype, array.shape) for array in arrays]
        if found == expected:
            return
        if len(index) > 1:  # find the first sample that is wrong by itself
            for i in index:
                one = i[None]
                self._compare(one, self._arrays(one))
        place = (
            f"sample {index[0]}{self._where_it_is(index[0])}"
            if len(index) == 1
            else f"samples {index.min()} to {index.max()}"
        )
        words = [", ".join(f"{dtype} {shape}" for dtype, shape in these) for these in (expected, found)]
        raise unexpected(self.where, f"{words[0]} for {place}", words[1])

    def _check(self, index: Array, arrays: Sequence[np.ndarray], limits: Sequence[float]) -> None:
        for array, limit in zip(arrays, limits, strict=True):
            self.bytes_read += array.nbytes
            if not holds_all(array.dtype, limit):
                check_rows(self.where, index, array, limit, self._where_it_is)

    def _where_it_is(self, index: int) -> str:
        place_of = getattr(self.source, "place_of", None)
        return "" if place_of is None else f" ({place_of(index)})"


@dataclass(frozen=True, eq=False)
class Part:
    """One of the arrays that a reader gives."""

    reader: Reader
    number: int
    dtype: np.dtype[Any]
    sample_shape: tuple[int, ...]
    on_host: bool = True

    @property
    def n_samples(self) -> int:
        """The number of samples."""
        return self.reader.n_samples

    def bytes_per_sample(self, dtype: np.dtype[Any]) -> int:
        """Bytes of a sample whose elements are of ``dtype``."""
        return math.prod(self.sample_shape) * dtype.itemsize
