"""Where samples come from: arrays in memory, of the host or of a device. A source is read and never changed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpubatch.backend import Array, Backend, get_backend
from gpubatch.errors import DeviceMismatchError, DTypeError, NonFiniteError, ShapeError
from gpubatch.host_ops import ops_for

__all__ = ["ArraySource", "array_source", "check_finite", "convert"]

BLOCK = 1 << 18  # elements that are looked at at a time


@dataclass(frozen=True, eq=False)
class ArraySource:
    """The samples of ``array`` along ``axis``; ``name`` is what the caller calls it."""

    name: str
    array: Array
    axis: int

    @property
    def n_samples(self) -> int:
        """How many samples there are."""
        return int(self.array.shape[self.axis])

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """The shape of one sample."""
        shape = self.array.shape
        return tuple(shape[: self.axis] + shape[self.axis + 1 :])

    @property
    def on_host(self) -> bool:
        """Whether gathering is work of the host."""
        return isinstance(self.array, np.ndarray)

    @property
    def dtype(self) -> np.dtype[Any]:
        """The element type as it is stored."""
        stored: np.dtype[Any] = self.array.dtype
        return stored

    def bytes_per_sample(self, dtype: np.dtype[Any]) -> int:
        """The size of one sample whose elements are of ``dtype``."""
        return math.prod(self.sample_shape) * dtype.itemsize

    def take(self, index: Array) -> Array:
        """The samples at ``index``, as they are stored, in a new C-contiguous array where the source lives."""
        if self.array.flags.c_contiguous:
            return self.array.take(index, axis=self.axis)
        # NumPy's take would first copy the whole array to make it contiguous; indexing follows the strides.
        samples = self.array[index] if self.axis == 0 else self.array[:, index]
        return samples if samples.flags.c_contiguous else samples.copy()

    def gather(self, index: Array, dtype: np.dtype[Any], scale: float | None, backend: Backend) -> Array:
        """The samples at ``index`` in a new C-contiguous array of ``dtype``, multiplied by ``scale``.

        ``backend`` is where the source lives.
        """
        unchanged = dtype == self.dtype and scale is None
        if unchanged or self.axis != 0 or not self.array.flags.c_contiguous:
            return convert(self.take(index), dtype, scale)
        out = backend.empty((len(index), *self.sample_shape), dtype)
        ops_for(backend, dtype).gather(self.array, index, out, 1.0 if scale is None else scale, 0.0)
        return out


def convert(x: Array, dtype: np.dtype[Any], scale: float | None) -> Array:
    """``x`` as a C-contiguous array of ``dtype``, multiplied by ``scale``; ``x`` itself where nothing is to be done."""
    if dtype == x.dtype and scale is None:
        return x
    out = x.astype(dtype, order="C")
    if scale is not None:
        out *= scale
    return out


def array_source(name: str, x: Any, sample_axis: int, backend: Backend) -> ArraySource:
    """The source of ``x``: an array on ``backend``, or a NumPy array or nested list on the host.

    A one-dimensional ``x`` has its samples on axis 0.
    """
    try:
        array = backend.asarray(x) if backend.owns(x) else get_backend("cpu").asarray(x)
    except DeviceMismatchError as error:
        raise DeviceMismatchError(f"{name} must be a NumPy array or an array on {backend.spec!r}: {error}") from error
    except ValueError as error:
        raise ShapeError(f"{name} must be an array, or nested lists of equal lengths: {error}") from error
    if array.dtype.kind not in "biuf" or array.dtype.itemsize > 8:
        raise DTypeError(f"{name} must hold integers, booleans, float16, float32 or float64, got dtype {array.dtype}")
    if array.ndim == 0 or array.size == 0:
        raise ShapeError(f"{name} must hold at least one sample of at least one number, got shape {array.shape}")
    return ArraySource(name, array, sample_axis if array.ndim > 1 else 0)


def check_finite(source: ArraySource, dtype: np.dtype[Any], scale: float | None, backend: Backend) -> None:
    """Raise ``NonFiniteError`` for the first value that is NaN or infinite, or becomes so in the batches."""
    if source.dtype.kind != "f":
        return
    array = source.array
    step = max(1, BLOCK // math.prod(array.shape[1:]))
    with backend.scope(), np.errstate(over="ignore"):
        for start in range(0, len(array), step):
            finite = abs(convert(array[start : start + step], dtype, scale)) < math.inf
            if bool(finite.all()):
                continue
            first = tuple(int(i) for i in np.argwhere(~backend.to_numpy(finite))[0])
            first = (start + first[0], *first[1:])
            value = float(array[first])
            where = f"{source.name}[{', '.join(map(str, first))}]"
            beyond = f", beyond the range of {dtype}" if math.isfinite(value) else ""
            raise NonFiniteError(f"{source.name} must be finite, but {where} is {value!r}{beyond}")
