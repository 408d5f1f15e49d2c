"""Standardisation of samples by the numbers of the training rows: a loader's ``prepare``."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpubatch.backend import Array, backend_of, compute_dtype, get_backend
from gpubatch.errors import ArgumentError, NonFiniteError, ShapeError
from gpubatch.inputs import Names, checked_array, columns_of
from gpubatch.sources import as_source

SINGLE = np.finfo(np.float32)
AT_ONCE = 1 << 20  # bytes of X that are read at a time
PRECISE = 1e5  # deviations between a mean and 0 from which on float32 loses digits: it has 24 bits


class Standardize:
    """(x - mean) / deviation, column by column: ``Loader(prepare=gb.Standardize.of(X_train))``.

    mean, deviation: one number for each feature, of the shape of a sample, which float32 can hold; the deviations are
        above 0.

    ``gb.save`` and an ONNX file keep the numbers with a model. Samples are rows, ``(batch, features)``. The loader
    converts them to its element type first, in which the differences are taken.

    >>> X = np.array([[1.0, 200.0], [3.0, 400.0]])
    >>> prepare = gb.Standardize.of(X)
    >>> prepare(X).tolist()
    [[-1.0, -1.0], [1.0, 1.0]]
    >>> loader = gb.Loader(X, [0, 1], batch_size=2, prepare=prepare, backend="cpu")
    """

    def __init__(self, mean: Any, deviation: Any) -> None:
        self.mean, self.deviation = np.array(mean, np.float64), np.array(deviation, np.float64)
        if self.mean.shape != self.deviation.shape:
            raise ShapeError(
                f"mean and deviation must have one shape, got {self.mean.shape} and {self.deviation.shape}"
            )
        small, large = float(SINGLE.smallest_normal), float(SINGLE.max)
        good = (np.abs(self.mean) <= large) & (self.deviation >= small) & (self.deviation <= large)
        if not good.all():
            mean, deviation = self.mean[~good][0], self.deviation[~good][0]
            raise ArgumentError(
                f"mean must be finite in float32, and deviation between {small:.2g} and {large:.2g}, got mean {mean:g} "
                f"and deviation {deviation:g}"
            )
        self.columns: Names | None = None  # of the frame that the numbers are of
        self._there: dict[tuple[str, np.dtype[Any]], tuple[Array, Array]] = {}

    def __repr__(self) -> str:
        return f"<Standardize {self.mean.size} columns>"

    @classmethod
    def of(cls, X: Any) -> Standardize:
        """Mean and deviation of the rows of X: an array, or whatever a loader reads, a mebibyte at a time.

        Deviations divide by the number of rows; a column that is the same in all rows has deviation 1, so it becomes 0.
        Blocks are combined as in Chan, Golub, LeVeque (1979). Raises NonFiniteError for NaN and infinity.
        """
        count, mean, squares = 0, np.zeros(()), np.zeros(())
        source = as_source("X", X)
        rows: Any = checked_array("X", X, get_backend("cpu")) if source is None else source
        n, row = len(rows), 1
        start = 0
        while start < n:
            stop = min(start + row, n)
            some = rows[start:stop] if source is None else rows.read(np.arange(start, stop))
            block = np.asarray(some[0] if isinstance(some, tuple) else some, np.float64)
            if not np.isfinite(block).all():
                first = int(np.flatnonzero(~np.isfinite(block.reshape(len(block), -1)).all(axis=1))[0])
                raise NonFiniteError(f"X must hold finite numbers, got others in sample {start + first}")
            apart, total = block.mean(axis=0) - mean, count + len(block)
            squares = squares + ((block - block.mean(axis=0)) ** 2).sum(axis=0)
            squares = squares + apart * apart * (count * len(block) / total)
            mean = mean + apart * (len(block) / total)
            count, start, row = total, stop, max(1, AT_ONCE // block[0].nbytes)
        deviation = np.sqrt(squares / count)
        # The mean of equal numbers is rounded, so their deviation need not be 0.
        same = deviation <= 1e-12 * np.abs(mean)
        found = cls(mean, np.where(same, 1.0, deviation))
        found.columns = columns_of(X)
        return found

    @property
    def lost(self) -> np.ndarray:
        """The places of columns whose mean is so far from 0 that float32 keeps few digits of their differences."""
        return np.flatnonzero(np.abs(self.mean) > PRECISE * self.deviation)

    def __call__(self, x: Array) -> Array:
        """Standardise a batch."""
        backend, kind = backend_of(x), compute_dtype(x.dtype if x.dtype.kind == "f" else np.dtype(np.float64))
        if x.shape[1:] != self.mean.shape:
            raise ShapeError(f"samples must have the shape {self.mean.shape} of the means, got {x.shape[1:]}")
        key = backend.spec, kind
        if key not in self._there:
            self._there[key] = backend.asarray(self.mean, kind), backend.asarray(self.deviation, kind)
        mean, deviation = self._there[key]
        with np.errstate(over="ignore"):
            found = x - mean
            found /= deviation
        return found
