"""Arrays of other libraries that are read by slices, such as those of zarr, tensorstore, h5py and netCDF4."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from gpubatch.backend import is_cupy, is_foreign, unmasked
from gpubatch.errors import DataFormatError
from gpubatch.sources.reader import InTurn
from gpubatch.sources.rows import runs_of


def is_chunked(x: Any) -> bool:
    """Whether ``x`` is an array that is read by slices: not of NumPy, CuPy or DLPack, not a table, not sparse."""
    if isinstance(x, np.ndarray) or is_cupy(x) or is_foreign(x) or hasattr(x, "to_numpy") or hasattr(x, "toarray"):
        return False
    return all(hasattr(x, name) for name in ("shape", "dtype", "__getitem__")) and len(x.shape) > 0


class Chunked:
    """The rows of an array that is read by slices.

    Chunks of several rows are read whole, and the latest chunk that was used in part is kept: so reading in order reads
    each chunk once. An array of tensorstore may begin at any index.
    """

    def __init__(self, array: Any) -> None:
        self._array, self._first = array, 0
        chunks = getattr(array, "chunks", None)
        if hasattr(array, "chunk_layout") and hasattr(array, "domain"):  # tensorstore
            chunks, self._first = tuple(array.chunk_layout.read_chunk.shape), int(array.domain.inclusive_min[0])
        first = chunks[0] if isinstance(chunks, tuple) and chunks else 1  # dask has a tuple of sizes for each axis
        self.block = max(1, int(first[0] if isinstance(first, tuple) else first))
        self._kept, self._rows = -1, np.empty(0)
        self._turn = InTurn()  # one thread at a time uses the kept chunk

    def __len__(self) -> int:
        return int(self._array.shape[0])

    def read(self, indices: np.ndarray, /) -> np.ndarray:
        """The rows at ``indices``."""
        places, back = np.unique(indices, return_inverse=True)
        last = int(indices[-1]) // self.block

        def turn(run: tuple[int, int, int]) -> int:
            """First the run in the kept chunk, last the run whose chunk the next reading needs."""
            first, end = run[0] // self.block, (run[0] + run[2] - run[1] - 1) // self.block
            return 0 if first <= self._kept <= end else 2 if first <= last <= end else 1

        with self._turn:
            parts = {
                start: list(self._parts(place, place + stop - start))
                for place, start, stop in sorted(runs_of(places), key=turn)
            }
        rows = [part for start in sorted(parts) for part in parts[start]]
        found = rows[0] if len(rows) == 1 else np.concatenate(rows)
        return found if np.array_equal(places, indices) else found[back]

    def _parts(self, start: int, stop: int) -> Iterator[np.ndarray]:
        """The rows from ``start`` to ``stop``: whole chunks in one slice, others in parts."""
        block, n = self.block, len(self)
        while start < stop:
            number, end = start // block, n if stop == n else stop // block * block
            if start == number * block < end:
                yield self._slice(start, end)
                start = end
                continue
            first, last = number * block, min((number + 1) * block, n)
            if self._kept != number:
                self._kept, self._rows = -1, np.empty(0)
                self._kept, self._rows = number, self._slice(first, last)
            yield self._rows[start - first : stop - first]
            start = min(last, stop)

    def _slice(self, start: int, stop: int) -> np.ndarray:
        where = f"samples {start} to {stop - 1}"
        try:
            found = self._array[self._first + start : self._first + stop]
        except (
            RuntimeError,
            ValueError,
            LookupError,
            EOFError,
        ) as error:  # of libraries, for a damaged chunk
            library = type(self._array).__module__.partition(".")[0]
            raise DataFormatError(f"{where}: an array of {library} could not read them: {error}") from error
        return np.asarray(unmasked(where, found))
