"""The columns of a batch, x, y and weights: their checks, the conversion of their samples, the delivery of a batch.

Inside the package samples are rows. Where the caller has them as columns (``sample_axis=1``), they are turned twice: X
and Y when they come in, batches in :meth:`Columns.deliver`.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from typing import Any, TypeAlias

import numpy as np

from gpubatch.backend import Array, Backend, compute_dtype, float_dtype
from gpubatch.errors import ArgumentError, ShapeError, check_real
from gpubatch.inputs import ColumnNames, Prepared, check_columns, check_pairs, checked_array
from gpubatch.loader.functions import BatchFunctions, Parts, named_function
from gpubatch.loader.order import Indices, Samples
from gpubatch.loader.pinned import Form, take_into
from gpubatch.loader.standardize import Standardize
from gpubatch.loader.weights import Weighting, class_weights, labels_of
from gpubatch.ops import ops_for
from gpubatch.sources import (
    ArraySource,
    Part,
    Reader,
    as_source,
    check_finite,
    check_rows,
    contiguous,
    convert,
    holds_all,
    is_mapped,
    largest_stored,
    turned,
)

DIGEST = 1 << 24  # bytes of an array that its digest covers: at most 40 ms
Rows: TypeAlias = dict[Reader, list[np.ndarray]]  # rows as they are stored


def native(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """``dtype`` in the byte order of this machine, which is also the device's."""
    return dtype.newbyteorder("=")


def captured_dtype(dtype: np.dtype[Any], dimensions: int) -> np.dtype[Any]:
    """The element type of an array of ``dtype`` in captured steps: labels are int64, as losses expect."""
    return np.dtype(np.int64) if dimensions == 1 and dtype.kind in "iu" else dtype


@dataclasses.dataclass(frozen=True, eq=False)
class Column:
    """One of the arrays of a batch: the source of its samples, and their element type and scale in a batch."""

    source: ArraySource | Part
    dtype: np.dtype[Any]
    scale: float | None
    backend: Backend
    axis: int = 0  # of the samples, as the caller has them

    @property
    def array(self) -> ArraySource | None:
        """The source where it is an array; None where it is read."""
        return self.source if isinstance(self.source, ArraySource) else None

    @functools.cached_property
    def on_backend(self) -> bool:
        """Whether the source is an array on the backend, where it is gathered from."""
        return self.array is not None and self.backend.owns(self.array.array)

    @functools.cached_property
    def checks_rows(self) -> bool:
        """Whether numbers are checked as they are read, as those of a mapped file, which may be larger than memory."""
        array = self.array
        return array is not None and is_mapped(array.array) and not holds_all(array.dtype, self.limit)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of X or Y as the caller has it."""
        shape = (self.source.n_samples, *self.source.sample_shape)
        return (shape[1], shape[0], *shape[2:]) if self.axis else shape

    @property
    def limit(self) -> float:
        """The largest stored number that batches can hold."""
        return largest_stored(self.dtype, self.scale)

    @property
    def captured_dtype(self) -> np.dtype[Any]:
        """The element type of captured steps' batches."""
        return captured_dtype(self.dtype, 1 + len(self.source.sample_shape))

    @property
    def form(self) -> Form:
        """Shape and element type of a sample on its way to a device: as it is stored, or its number in the set."""
        return ((), np.dtype(np.int64)) if self.on_backend else (self.source.sample_shape, native(self.source.dtype))

    def staging_bytes(self, rows: int, copied: bool = False) -> int:
        """Bytes of stored samples that are held while a batch is made; ``copied`` as in :class:`ArraySource`."""
        if (source := self.array) is not None and not (self.checks_rows and not copied):
            return source.staging_bytes(rows, self.dtype, self.scale, self.backend, copied)
        as_it_is = self.dtype == self.source.dtype and self.scale is None
        return 0 if as_it_is else rows * self.source.bytes_per_sample(self.source.dtype)

    @functools.cached_property
    def gather(self) -> Callable[[Array], Array]:
        """A function from an index to the batch of these samples, both on the device of the source."""
        assert self.array is not None
        if not self.checks_rows:
            return self.array.gatherer(self.dtype, self.scale, self.backend)
        source, turn = self.array, turned if self.array.as_columns else contiguous
        return lambda index: turn(convert(turn(self.checked(index, source.take(index))), self.dtype, self.scale))

    def stored(self, index: Indices) -> np.ndarray:
        """The samples at ``index`` as they go to the backend; ``index`` itself where they are there already."""
        assert self.array is not None
        return index if self.on_backend else self.checked(index, self.array.take(index))

    def checked(self, index: Indices, rows: np.ndarray) -> np.ndarray:
        """``rows``, the samples at ``index``, after the check that batches can hold their numbers."""
        if self.checks_rows:
            assert self.array is not None
            check_rows(self.array.name, index, rows, self.limit)
        return rows

    def check(self) -> None:
        """Check all numbers of an array."""
        if (source := self.array) is not None:
            given = turned(source.array) if self.axis else source.array
            check_finite(source.name, given, self.dtype, self.scale, self.backend)

    def on(self, array: Array) -> Column:
        """The column of a copy of the source's array."""
        assert self.array is not None
        return dataclasses.replace(self, source=dataclasses.replace(self.array, array=array))

    def made_of(self, there: Array) -> Array:
        """The batch, made on the backend from the result of :meth:`stored`."""
        return self.gather(there) if self.on_backend else convert(there, self.dtype, self.scale)

    def received(self, there: Array) -> Array:
        """The batch, made from a buffer of the device; it shares no memory with the buffer."""
        if self.on_backend:
            return self.gather(there)
        if there.dtype == self.dtype and self.scale is None:
            return there.copy()
        out = self.backend.empty(there.shape, self.dtype)
        ops_for(self.backend, self.dtype).gather(there, None, out, 1.0 if self.scale is None else self.scale, 0.0)
        return out


class Columns(Sequence[Column]):
    """x, y where there are labels, and their weights if there are any, of ``n_samples``."""

    def __init__(
        self,
        X: Any,
        Y: Any = None,
        *,
        backend: Backend,
        sample_axis: int = 0,
        dtype: Any = None,
        scale: float | None = None,
        prepare: Callable[..., Any] | None = None,
        augment: Callable[..., Any] | None = None,
        seed: int = 0,
        prepare_name: str = "prepare",
        weight: Any = None,
        class_weight: Any = None,
    ) -> None:
        self.backend, self.sample_axis = backend, sample_axis
        self.recipe: Any = None
        self.names = ColumnNames() if sample_axis else ColumnNames.of(X, Y)
        if isinstance(X, Prepared):
            self.recipe = X.recipe
            X, Y = self.apart(X, Y)
        check_pairs(("X", "Y", "weight"), (X, Y, weight))
        inputs = self._inputs(X, Y)
        self.source_dtype, self.n_samples = inputs[0][0].dtype, inputs[0][0].n_samples
        self.dtype_is_given = dtype is not None
        if dtype is not None:
            self.dtype = float_dtype(dtype, half=True)
        else:
            wide = self.source_dtype.kind == "f" and self.source_dtype.itemsize == 8
            self.dtype = np.dtype(np.float64 if wide else np.float32)
        limit = float(np.finfo(compute_dtype(self.dtype)).max)
        self.scale = None if scale is None else check_real("scale", scale, -limit, limit)
        if self.scale == 0:
            raise ArgumentError("scale must not be 0, which makes all samples alike")
        self._columns = [Column(inputs[0][0], self.dtype, self._factor, backend, inputs[0][1])]
        self._columns += [Column(source, native(source.dtype), None, backend, axis) for source, axis in inputs[1:]]
        self._check()
        self.weights: Array = None  # of all samples
        self.weighting = Weighting(backend, compute_dtype(self.dtype), weight is not None)
        if weight is not None or class_weight is not None:
            self._add_weights(weight, class_weight)
        if isinstance(prepare, Standardize):
            if sample_axis:
                raise ArgumentError(f"{prepare_name}=gb.Standardize takes samples that are rows, got sample_axis=1")
            check_columns("X", self.names.X, prepare.columns)
        self.functions = BatchFunctions(
            named_function(prepare_name, prepare, self.labelled),
            named_function("augment", augment, self.labelled, " and a generator"),
            [column.axis for column in self._columns[:2]],
            self.dtype,
            backend,
            seed,
        )

    @property
    def _factor(self) -> float | None:
        """The scale, rounded; a Python float promotes nothing."""
        return None if self.scale is None else float(compute_dtype(self.dtype).type(self.scale))

    @functools.cached_property
    def readers(self) -> dict[Reader, list[float]]:
        """What reads columns, with the largest number that batches can hold of each array that it gives."""
        readers: dict[Reader, list[float]] = {}
        for column in self:
            if isinstance(column.source, Part):
                readers.setdefault(column.source.reader, []).append(column.limit)
        return readers

    def take(self, dtype: np.dtype[Any]) -> None:
        """Make batches of ``dtype`` from now on."""
        self.dtype = dtype
        self.functions = dataclasses.replace(self.functions, dtype=dtype)
        self._columns[0] = dataclasses.replace(self._columns[0], dtype=dtype, scale=self._factor)
        if self.weights is not None:
            self.weighting = dataclasses.replace(self.weighting, dtype=compute_dtype(dtype))
            with self.backend.scope(), np.errstate(over="ignore"):
                self._set_weights(self.weights.astype(compute_dtype(dtype)))
        self._check()
        for name in ("readers", "batch_bytes", "captured_bytes"):
            vars(self).pop(name, None)

    def unaugmented(self) -> Columns:
        """The same columns without ``augment``, for validation."""
        twin = copy.copy(self)
        twin.functions = dataclasses.replace(self.functions, augment=None)
        return twin

    def labels(self) -> np.ndarray | None:
        """Y on the host where it is an array of one integer a sample."""
        y = self._columns[1].array if self.labelled else None
        if y is None or y.sample_shape or y.dtype.kind not in "biu":
            return None
        return self.backend.to_numpy(y.array)

    def __len__(self) -> int:
        return len(self._columns)

    def __getitem__(self, number: Any) -> Any:
        return self._columns[number]

    def __iter__(self) -> Iterator[Column]:
        return iter(self._columns)

    def apart(self, table: Prepared, Y: Any = None, name: str = "X") -> tuple[Any, Any]:
        """X and Y of a table, which must be prepared as the loader's table is."""
        if Y is not None:
            raise ArgumentError(f"{name} must be given alone where it is a table, whose label is Y")
        if self.sample_axis:
            raise ArgumentError(f"sample_axis=1 needs arrays, {name} is a table of rows")
        if table.recipe != self.recipe:
            raise ArgumentError(
                f"{name} must be prepared as the loader's table is: take train, test = table.split(), or "
                "gb.read_table(path, like=train)"
            )
        return table.as_samples()

    # --- checks ---

    def _inputs(self, X: Any, Y: Any) -> list[tuple[ArraySource | Part, int]]:
        """The sources of x and of the labels, and the axis of the samples in each."""
        inputs: list[tuple[ArraySource | Part, int]] = []
        for name, given in (("X", X), ("Y", Y)):
            if given is None and name == "Y":
                continue
            source = as_source(name, given)
            if source is None:
                array = checked_array(name, given, self.backend)
                axis = self.sample_axis if array.ndim > 1 else 0
                if name == "X" and axis != self.sample_axis:
                    raise ShapeError(f"X must be (features, samples) with sample_axis=1, got shape {array.shape}")
                # In main memory columns are gathered. On a device rows are, for kernels and captured steps.
                as_columns = axis == 1 and self.backend.name == "cpu"
                inputs.append((ArraySource(name, turned(array) if axis else array, as_columns), axis))
                continue
            parts = Reader(name, source).parts
            if self.sample_axis:
                raise ArgumentError(f"sample_axis=1 needs arrays, {name} is a source of rows")
            if len(parts) > (1 if name == "Y" or Y is not None else 2):
                raise ArgumentError(
                    f"X and Y must be two arrays in all, {parts[0].reader.where} alone gives {len(parts)} for {name}"
                )
            inputs += [(part, 0) for part in parts]
        return inputs

    def _check(self) -> None:
        x = self._columns[0]
        for y in self._columns[1:]:
            if y.source.n_samples != self.n_samples:
                raise ShapeError(
                    f"X and Y must have equal numbers of samples, got X of shape {x.shape} with {self.n_samples} along "
                    f"axis {x.axis} and Y of shape {y.shape} with {y.source.n_samples} along axis {y.axis}"
                )
        for column in self:
            if not column.checks_rows:
                column.check()

    def _add_weights(self, weight: Any, class_weight: Any) -> None:
        """Add the column of weights, in the element type of the loss."""
        if not self.labelled:
            raise ArgumentError(f"{'weight' if class_weight is None else 'class_weight'} needs Y")
        labels = None
        if class_weight is not None:
            labels = labels_of(self._columns[1].source)
            of_classes = class_weights(class_weight, labels, self.backend)
            self.weighting = dataclasses.replace(self.weighting, of_classes=of_classes)
        self._set_weights(self.weighting.of_samples(weight, labels, self.n_samples))

    def _set_weights(self, weights: Array) -> None:
        self.weights = weights
        self._columns[2:] = [Column(ArraySource("weight", weights), weights.dtype, None, self.backend)]

    # --- sizes ---

    @property
    def labelled(self) -> bool:
        """Whether batches have a y."""
        return len(self) > 1

    @functools.cached_property
    def stored_bytes(self) -> int:
        """Bytes of a stored sample."""
        return sum(column.source.bytes_per_sample(column.source.dtype) for column in self)

    @functools.cached_property
    def batch_bytes(self) -> int:
        """Bytes of a sample in a batch."""
        return sum(column.source.bytes_per_sample(column.dtype) for column in self)

    @functools.cached_property
    def captured_bytes(self) -> int:
        """Bytes of a sample in a batch of captured steps."""
        return sum(column.source.bytes_per_sample(column.captured_dtype) for column in self)

    @functools.cached_property
    def data_bytes(self) -> int:
        """Bytes of all samples of the arrays that are not on the backend."""
        away = (column.source for column in self if not column.on_backend)
        return sum(source.n_samples * source.bytes_per_sample(source.dtype) for source in away)

    @functools.cached_property
    def host_elements(self) -> int:
        """Elements of a sample that the host gathers or reads."""
        return sum(math.prod(column.source.sample_shape) for column in self if column.source.on_host)

    @property
    def files(self) -> str:
        """The identities of sources of several files; "" where there are none."""
        return "; ".join(found for reader in self.readers if (found := getattr(reader.source, "identity", "")))

    @functools.cached_property
    def _array_bytes(self) -> int:
        arrays = (source for column in self if (source := column.array) is not None)
        return sum(source.bytes_per_sample(source.dtype) for source in arrays)

    def bytes_read(self, samples: int = 0) -> int:
        """Bytes that the readers have read so far, plus those of ``samples`` samples of the arrays."""
        read = sum(reader.bytes_read for reader in self.readers) if self.readers else 0
        return read + samples * self._array_bytes

    # --- rows of a batch ---

    def at(self, index: Indices) -> list[Array]:
        """The samples at ``index`` as rows of a batch."""
        return self.moved(self.stored(index))

    def moved(self, stored: Sequence[np.ndarray]) -> list[Array]:
        """Rows of a batch, made on the backend from the result of :meth:`stored`."""
        with self.backend.scope():
            return [column.made_of(self.backend.asarray(rows)) for column, rows in zip(self, stored, strict=True)]

    def gathered(self, index: Array) -> list[Array]:
        """The samples at ``index``, where ``index`` and all columns are arrays on the backend."""
        return [column.gather(index) for column in self._columns]

    def stored(self, index: Indices) -> list[np.ndarray]:
        """The samples at ``index`` as they go to the backend."""
        read = {reader: reader.read(index, limits) for reader, limits in self.readers.items()}
        return [
            read[column.source.reader][column.source.number]
            if isinstance(column.source, Part)
            else column.stored(index)
            for column in self
        ]

    def store(self, index: Indices, places: Sequence[np.ndarray], helpers: Executor) -> None:
        """Write the result of :meth:`stored` into ``places``; ``helpers`` share large batches."""
        read: Rows = {reader: [] for reader in self.readers}
        for column, place in zip(self, places, strict=True):
            if isinstance(column.source, Part):
                read[column.source.reader].append(place)
            elif column.on_backend:
                place[...] = index
            else:
                take_into(column.source.array, index, place, helpers)
                column.checked(index, place)
        for reader, of_reader in read.items():
            if all(part.dtype == place.dtype for part, place in zip(reader.parts, of_reader, strict=True)):
                reader.read_into(index, of_reader, self.readers[reader])
            else:  # of another byte order
                copy_into(of_reader, reader.read(index, self.readers[reader]))

    def of_window(self, rows: Rows, samples: Samples, use: Indices) -> list[Array]:
        """Rows of a batch in main memory: those at ``use`` of a window's ``samples`` and ``rows``."""
        return [
            _held(column.source, rows).gather(use, column.dtype, column.scale, self.backend)
            if isinstance(column.source, Part)
            else column.gather(samples[use])
            for column in self
        ]

    def stored_of_window(self, rows: Rows, samples: Samples, use: Indices) -> list[np.ndarray]:
        """The same samples as they are stored."""
        return [
            _held(column.source, rows).take(use) if isinstance(column.source, Part) else column.stored(samples[use])
            for column in self
        ]

    def no_rows(self) -> list[Array]:
        """A batch without rows, as a rank has it that has no samples of a batch."""
        return [self.backend.empty((0, *column.source.sample_shape), column.dtype) for column in self]

    def joined(self, parts: Iterable[list[Array]]) -> list[Array]:
        """Rows in main memory, joined from parts."""
        found = list(parts)
        if len(found) == 1:
            return found[0]
        return [np.concatenate(arrays) for arrays in zip(*found, strict=True)] if found else self.no_rows()

    # --- delivery ---

    @property
    def prepare(self) -> Callable[..., Any] | None:
        """The loader's ``prepare``."""
        return None if self.functions.prepare is None else self.functions.prepare.function

    @property
    def augment(self) -> Callable[..., Any] | None:
        """The loader's ``augment``."""
        return None if self.functions.augment is None else self.functions.augment.function

    @property
    def largest(self) -> float | None:
        """The largest number in batches of scaled bytes or 16-bit integers; None for other samples."""
        scaled = self.scale is not None and not self.functions
        if scaled and self.source_dtype.kind in "iu" and self.source_dtype.itemsize <= 2:
            return abs(self.scale or 0.0) * int(np.iinfo(self.source_dtype).max)
        return None

    @property
    def takes_bytes(self) -> bool:
        """Whether samples are bytes, scaled or not, without functions."""
        return self.source_dtype == np.uint8 and not self.functions

    def deliver(self, rows: list[Array], epoch: int, number: int, parts: Parts = None) -> Any:
        """A batch as the caller wants it, x, (x, y) or (x, y, weight).

        It is prepared and augmented, by its ``number`` in ``epoch``, and turned where the samples are columns. Where
        batches are dealt, the rows are ``parts`` of one.
        """
        arrays = self._delivered(rows, epoch, number, parts) if self.sample_axis or self.functions else rows
        return tuple(arrays) if len(arrays) > 1 else arrays[0]

    def as_rows(self, rows: list[Array], epoch: int, number: int, parts: Parts = None) -> list[Array]:
        """A batch as a network wants it: prepared and augmented rows."""
        if not self.functions:
            return rows
        return [self.functions.turn(array) for array in self._delivered(rows, epoch, number, parts)]

    def delivery_bytes(self, batch_size: int, as_rows: bool = False, parts: int = 1) -> int:
        """Bytes of the arrays from which a delivered batch is made, in ``parts`` that are prepared alone."""
        if self.functions:
            return self.functions.nbytes(batch_size * self.batch_bytes, parts)
        copied = [] if as_rows or self.backend.name == "cpu" else [column for column in self if column.axis]
        return batch_size * sum(column.source.bytes_per_sample(column.dtype) for column in copied)

    def _delivered(self, rows: list[Array], epoch: int, number: int, parts: Parts) -> list[Array]:
        with self.backend.scope():
            if parts is None or not self.functions:
                return [*self.functions.made(rows[:2], epoch, number), *rows[2:]]
            one = lambda: self.at(np.zeros(1, np.int64))[:2]  # noqa: E731
            return [*self.functions.made_of_parts(rows[:2], epoch, number, parts, one), *rows[2:]]

    def summary_of(self, rows: Sequence[Array], augmented: bool = False) -> list[float]:
        """Mean, deviation and largest size of these rows' numbers after ``prepare``; empty without it.

        augmented: after ``augment``, too, as in the first batch of the first epoch
        """
        if (self.augment if augmented else self.prepare) is None:
            return []
        with self.backend.scope():
            copies = [array.copy() for array in rows]
            made = self.functions.made(copies, 0, 0) if augmented else self.functions.prepared(copies)
            x = self.backend.to_numpy(made[0]).astype(np.float64)
        return [float(x.mean()), float(x.std()), float(abs(x).max())]

    def digest(self) -> str:
        """A digest of X and Y where they are arrays in memory: of about :data:`DIGEST` bytes of samples at most."""
        found = hashlib.blake2b(digest_size=8)
        for column in self._columns[:2]:
            if column.array is not None and not is_mapped(array := column.array.array):
                with self.backend.scope(), np.errstate(over="ignore"):
                    some = array[:: -(-array.nbytes // DIGEST)]
                    found.update(self.backend.to_numpy(some.astype(column.dtype)).tobytes())
        return found.hexdigest()


def _held(part: Part, rows: Rows) -> ArraySource:
    """The rows of a part as a source."""
    return ArraySource(part.reader.name, rows[part.reader][part.number])


def copy_into(places: Sequence[np.ndarray], arrays: Sequence[np.ndarray]) -> None:
    """Copy each of ``arrays`` to its place."""
    for place, array in zip(places, arrays, strict=True):
        place[...] = array
