"""Arrays as sources, on the host or on a device, and the checks of every source's numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpubatch.backend import Array, Backend, compute_dtype
from gpubatch.errors import NonFiniteError
from gpubatch.ops import gather_bytes, ops_for

BLOCK = 1 << 18  # elements that are checked at a time


@dataclass(frozen=True, eq=False)
class ArraySource:
    """The rows of an array as samples.

    name: the argument, for messages
    as_columns: gather rows in such a layout that they are C-contiguous after :func:`turned`
    """

    name: str
    array: Array
    as_columns: bool = False

    @property
    def n_samples(self) -> int:
        """The number of samples."""
        return len(self.array)

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """The shape of one sample."""
        return tuple(self.array.shape[1:])

    @property
    def on_host(self) -> bool:
        """Whether the host gathers samples."""
        return isinstance(self.array, np.ndarray)

    @property
    def dtype(self) -> np.dtype[Any]:
        """The element type as it is stored."""
        stored: np.dtype[Any] = self.array.dtype
        return stored

    def bytes_per_sample(self, dtype: np.dtype[Any]) -> int:
        """Bytes of a sample whose elements are of ``dtype``."""
        return math.prod(self.sample_shape) * dtype.itemsize

    def take(self, index: Array) -> Array:
        """The samples at ``index`` in a new array, as they are stored, on the device of the source."""
        if not self.as_columns:
            # NumPy's take would first copy a whole strided array; indexing follows the strides.
            return self.array.take(index, axis=0) if self.array.flags.c_contiguous else contiguous(self.array[index])
        given = turned(self.array)
        return turned(given.take(index, axis=1) if given.flags.c_contiguous else contiguous(given[:, index]))

    def gather(self, index: Array, dtype: np.dtype[Any], scale: float | None, backend: Backend) -> Array:
        """The samples at ``index`` in a new array of ``dtype``, times ``scale``, on ``backend``, as the source is."""
        return self.gatherer(dtype, scale, backend)(index)

    def gatherer(self, dtype: np.dtype[Any], scale: float | None, backend: Backend) -> Callable[[Array], Array]:
        """:meth:`gather` as a function of the index, with all look-ups done."""
        array, shape, empty = self.array, self.sample_shape, backend.empty
        taken = dtype == self.dtype and scale is None
        # Kernels know that rows are whole: the compiled one takes 0.65 of the time of NumPy's take.
        if taken and dtype in (np.float32, np.float64):
            taken = ops_for(backend, dtype).by_numpy
        if self.as_columns:
            return lambda index: turned(convert(turned(self.take(index)), dtype, scale))
        if not array.flags.c_contiguous:
            return lambda index: convert(self.take(index), dtype, scale)
        if taken:
            return lambda index: array.take(index, axis=0)
        fill, factor = ops_for(backend, dtype).gather, 1.0 if scale is None else scale

        def gathered(index: Array) -> Array:
            # A new array each time. A kept one would save 0.6 µs of 60 for a batch of 256 x 784 float32, since the
            # allocator gives the same memory again anyway.
            out = empty((len(index), *shape), dtype)
            fill(array, index, out, factor, 0.0)
            return out

        return gathered

    def staging_bytes(
        self, rows: int, dtype: np.dtype[Any], scale: float | None, backend: Backend, copied: bool = False
    ) -> int:
        """Bytes of stored samples that :meth:`gather` holds beside its result of ``rows`` samples.

        copied: for a copy of the array on the device, which is contiguous
        """
        sample = self.bytes_per_sample(self.dtype)
        given = turned(self.array) if self.as_columns else self.array
        if not (copied or given.flags.c_contiguous):
            return rows * sample
        if dtype == self.dtype and scale is None:
            return 0
        if self.as_columns:
            return rows * sample
        return gather_bytes(ops_for(backend, dtype), self.dtype, rows, math.prod(self.sample_shape))


def turned(x: Array) -> Array:
    """Rows as columns, or columns as rows: a view with the first two axes exchanged; ``x`` if it has one axis."""
    return x.swapaxes(0, 1) if x.ndim > 1 else x


def contiguous(x: Array) -> Array:
    """``x`` if it is C-contiguous, else a C-contiguous copy."""
    return x if x.flags.c_contiguous else x.copy()


def convert(x: Array, dtype: np.dtype[Any], scale: float | None) -> Array:
    """``x`` as a C-contiguous array of ``dtype``, times ``scale``; ``x`` itself where that changes nothing.

    float16 is multiplied in float32.
    """
    if dtype == x.dtype and scale is None:
        return x
    out = x.astype(compute_dtype(dtype), order="C")
    if scale is not None:
        out *= scale
    return out.astype(dtype, copy=False)


def check_finite(name: str, array: Array, dtype: np.dtype[Any], scale: float | None, backend: Backend) -> None:
    """Raise ``NonFiniteError`` for the first value that is NaN or infinite, or becomes infinite in batches."""
    if holds_all(array.dtype, largest_stored(dtype, scale)):
        return
    step = max(1, BLOCK // math.prod(array.shape[1:]))
    with backend.scope(), np.errstate(over="ignore"):
        for start in range(0, len(array), step):
            finite = abs(convert(array[start : start + step], dtype, scale)) < math.inf
            if bool(finite.all()):
                continue
            first = tuple(int(i) for i in np.argwhere(~backend.to_numpy(finite))[0])
            first = (start + first[0], *first[1:])
            value = float(array[first])
            where = f"{name}[{', '.join(map(str, first))}]"
            beyond = f", beyond the range of {dtype}" if math.isfinite(value) else ""
            raise NonFiniteError(f"{name} must be finite, but {where} is {value!r}{beyond}")


def check_rows(
    where: str, index: Array, rows: np.ndarray, limit: float, more: Callable[[int], str] = lambda sample: ""
) -> None:
    """Raise ``NonFiniteError`` for the first number of ``rows``, the samples at ``index``, beyond ``limit``, or NaN.

    where: the source of the samples, for the message
    more: what the message says of one of them besides
    """
    # Each extreme takes one pass and no temporary array; both are NaN where any number is.
    with np.errstate(invalid="ignore", over="ignore"):  # float16 cannot hold the limit
        if -limit <= float(rows.min()) and float(rows.max()) <= limit:
            return
        first = tuple(int(i) for i in np.argwhere(~((-limit <= rows) & (rows <= limit)))[0])
    value, sample = float(rows[first]), int(index[first[0]])
    inside = f" at {list(first[1:])}" if len(first) > 1 else ""
    beyond = ", beyond the range of the batches" if math.isfinite(value) else ""
    raise NonFiniteError(
        f"{where}: samples must be finite, but sample {sample} has {value!r}{inside}{beyond}{more(sample)}"
    )


def is_mapped(array: Array) -> bool:
    """Whether an array is a memory-mapped file, or a view of one."""
    while array is not None and not isinstance(array, np.memmap):
        array = getattr(array, "base", None)
    return array is not None


def largest_stored(dtype: np.dtype[Any], scale: float | None) -> float:
    """The largest stored number whose product with ``scale`` fits into ``dtype``."""
    if dtype.kind != "f":
        return math.inf
    largest, factor = float(np.finfo(dtype).max), abs(scale or 1.0)
    return largest / (factor if dtype == np.float16 else max(1.0, factor))  # float16 is made of a float32 product


def holds_all(stored: np.dtype[Any], limit: float) -> bool:
    """Whether no element of type ``stored`` can be NaN or beyond ``limit``."""
    return stored.kind != "f" and (stored.kind == "b" or np.iinfo(stored).max <= limit)
