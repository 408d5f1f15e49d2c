"""The protocol of a source, and what reads one: by rows, checked as they come."""

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
    """What a loader can read samples from besides arrays.

    ``read(indices)`` takes places, int64 (samples,), in any order, and returns a new NumPy array of these samples as
    rows, or a pair of such arrays, (x, y). Element types and shapes of a row are always the same. One thread calls at a
    time, not always the same one. Two attributes are looked for: ``path``, for messages; and ``block``, of sources that
    read neighbours together and single samples at a cost, as many as they read at once: a loader reads such a source
    in windows unless it is told otherwise. So are two methods, for windows: ``read_into(indices, out)`` writes what
    ``read`` would return into ``out``, an array or a pair of them; ``expect(indices)`` is told what will be read soon.

    Where what is read at once has unequal sizes, as in several files, ``boundaries`` has the places where each begins,
    int64 in order from 0 on, and then the number of samples. ``forms`` has the element type and shape of a sample of
    each array, and ``held_bytes`` what a source holds beside what it returns; ``identity`` is text that is another one
    when the samples are, by which saved states are compared; ``place_of(index)`` says in words where a sample is.
    """

    def __len__(self) -> int:
        """How many samples there are."""

    def read(self, indices: np.ndarray, /) -> Any:
        """The samples at ``indices``."""


def refuse_pickling() -> NoReturn:
    """Raise for a file that is open in this process alone."""
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
    """A lock for the threads of a process; a forked child has one of its own, which no thread of its parent holds."""

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
        self.boundaries: np.ndarray | None = getattr(source, "boundaries", None)
        self._turn = InTurn()  # a run that is saved looks at samples while a thread reads others
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
        """Bytes that the source holds at most beside what it returns, where it says so."""
        held: int = getattr(self.source, "held_bytes", 0)
        return held

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
        with noting("samples", index, self.where), self._turn:
            self._read_into(index, tuple(out) if len(out) > 1 else out[0])
        self._check(index, out, limits)

    def expect(self, index: Array) -> None:
        """Tell the source that the samples at ``index`` will be read soon."""
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
        if len(index) > 1:  # the first sample for which it happens, if a single one is the cause
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
        """How many samples there are."""
        return self.reader.n_samples

    def bytes_per_sample(self, dtype: np.dtype[Any]) -> int:
        """The size of one sample whose elements are of ``dtype``."""
        return math.prod(self.sample_shape) * dtype.itemsize
