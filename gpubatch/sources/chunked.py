"""Arrays of other libraries that are read by slices, such as those of zarr, h5py and netCDF4."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpubatch.backend import is_cupy, is_foreign, unmasked
from gpubatch.sources.rows import runs_of

__all__ = ["Chunked", "is_chunked"]


def is_chunked(x: Any) -> bool:
    """Whether ``x`` is no array of NumPy, CuPy or DLPack, no table and not sparse, but is read as an array is."""
    if isinstance(x, np.ndarray) or is_cupy(x) or is_foreign(x) or hasattr(x, "to_numpy") or hasattr(x, "toarray"):
        return False
    return all(hasattr(x, name) for name in ("shape", "dtype", "__getitem__")) and len(x.shape) > 0


class Chunked:
    """The rows of such an array, of which only those are read that are asked for, neighbours in one slice."""

    def __init__(self, array: Any) -> None:
        self._array = array
        chunks = getattr(array, "chunks", None)
        first = chunks[0] if isinstance(chunks, tuple) and chunks else 1  # dask has a tuple of sizes for each axis
        self.block = max(1, int(first[0] if isinstance(first, tuple) else first))

    def __len__(self) -> int:
        return int(self._array.shape[0])

    def read(self, indices: np.ndarray, /) -> np.ndarray:
        """The rows at ``indices``."""
        places, back = np.unique(indices, return_inverse=True)
        parts = [self._slice(first, first + stop - start) for first, start, stop in runs_of(places)]
        found = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return found if np.array_equal(places, indices) else found[back]

    def _slice(self, start: int, stop: int) -> np.ndarray:
        return np.asarray(unmasked(f"samples {start} to {stop - 1}", self._array[start:stop]))
