"""The user's functions of batches: preparation, and augmentation for training alone."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from gpubatch.backend import Array, Backend
from gpubatch.errors import ArgumentError, DTypeError, ShapeError
from gpubatch.inputs import check_kind
from gpubatch.sources import contiguous, turned

Parts: TypeAlias = Mapping[int, int] | None  # the rows of each part of a batch, by its number


@dataclass(frozen=True, eq=False)
class BatchFunction:
    """A function of x, or of x and y, whose results take their places in a batch.

    name: the loader's argument
    takes: the number of arrays that the function takes first
    """

    name: str
    function: Callable[..., Any]
    takes: int

    def __call__(
        self, arrays: Sequence[Array], axes: Sequence[int], dtype: np.dtype[Any], backend: Backend, *more: Any
    ) -> list[Array]:
        """``arrays`` with the results in their places; x is converted to ``dtype``. Samples lie along ``axes``."""
        found = self.function(*arrays[: self.takes], *more)
        if found is None:
            raise DTypeError(
                f"{self.name} must return what takes the place of {self.words}, got None; a function that changes x in "
                "place must return it, too"
            )
        if self.takes == 1:
            found = (found,)
        elif not isinstance(found, tuple) or len(found) != self.takes:
            raise DTypeError(f"{self.name} must return a pair, as it takes x and y, got {type(found).__name__}")
        for axis, before, after in zip(axes, arrays, found, strict=False):
            backend.check(f"what {self.name} returns", after)
            if after.ndim <= axis or after.shape[axis] != before.shape[axis]:
                raise ShapeError(
                    f"{self.name} must keep the {before.shape[axis]} samples along axis {axis}, it made shape "
                    f"{after.shape} of {before.shape}"
                )
            check_kind(f"what {self.name} returns", after.dtype)
        x = found[0] if found[0].dtype == dtype else found[0].astype(dtype)
        return [x, *found[1:], *arrays[self.takes :]]

    @property
    def words(self) -> str:
        """The arrays that the function takes, in words."""
        return "x" if self.takes == 1 else "x and y"


@dataclass(frozen=True, eq=False)
class BatchFunctions:
    """What a loader applies to batches: ``prepare``, and ``augment`` in training alone; false where there is neither.

    axes: of the samples of x and of y, as the functions get them; rows are turned for it
    dtype: of x
    seed: the loader's, from which generators for ``augment`` come
    """

    prepare: BatchFunction | None
    augment: BatchFunction | None
    axes: Sequence[int]
    dtype: np.dtype[Any]
    backend: Backend
    seed: int

    def __bool__(self) -> bool:
        return self.prepare is not None or self.augment is not None

    def nbytes(self, batch: int, parts: int) -> int:
        """The most bytes of the arrays from which a batch of ``batch`` bytes is made, in ``parts``."""
        augmented = 0 if self.augment is None else batch + self.backend.generator_bytes
        return augmented + (0 if self.prepare is None else batch) + (batch if parts > 1 else 0)

    def turn(self, array: Array) -> Array:
        """Rows as the caller has samples, or the caller's samples as rows."""
        return turned(array) if self.axes[0] else array

    def prepared(self, rows: Sequence[Array]) -> list[Array]:
        """Rows as the caller has samples, prepared."""
        arrays = [contiguous(self.turn(array)) for array in rows]
        return arrays if self.prepare is None else self.prepare(arrays, self.axes, self.dtype, self.backend)

    def made(self, rows: Sequence[Array], epoch: int, number: int, part: int | None = None) -> list[Array]:
        """Rows as the caller has samples, prepared and augmented."""
        arrays = self.prepared(rows)
        if self.augment is None:
            return arrays
        draw = self.backend.generator(self.seed, epoch, number, part)
        return self.augment(arrays, self.axes, self.dtype, self.backend, draw)

    def made_of_parts(
        self, rows: Sequence[Array], epoch: int, number: int, parts: Mapping[int, int], one: Callable[[], list[Array]]
    ) -> list[Array]:
        """Likewise, part by part, as a function's result may depend on the samples that it gets together.

        Where no part has rows, ``one()`` is a sample, by which the shape of the result is known.
        """
        found, start = list[list[Array]](), 0
        for part, size in parts.items():
            if size:
                found.append(self.made([array[start : start + size] for array in rows], epoch, number, part))
            start += size
        if not found:
            return [self.turn(self.turn(array)[:0]) for array in self.made(one(), epoch, number)]
        return list(map(self._joined, zip(*found, strict=True), self.axes))

    def _joined(self, arrays: Sequence[Array], axis: int) -> Array:
        """The results for the parts of a batch as one array."""
        if len(arrays) == 1:
            return arrays[0]
        sizes = [array.shape[axis] for array in arrays]
        forms = {(array.dtype, array.shape[:axis], array.shape[axis + 1 :]) for array in arrays}
        if len(forms) > 1:
            words = " and ".join(f"{array.dtype} {array.shape}" for array in arrays[:2])
            raise ShapeError(f"functions of a batch must make samples of one shape and dtype, got {words} of its parts")
        shape = list(arrays[0].shape)
        shape[axis] = sum(sizes)
        out, stop = self.backend.empty(tuple(shape), arrays[0].dtype), 0
        for array, size in zip(arrays, sizes, strict=True):
            start, stop = stop, stop + size
            out[(slice(None),) * axis + (slice(start, stop),)] = array
        return out


def named_function(name: str, function: Any, labelled: bool, more: str = "") -> BatchFunction | None:
    """The function of a loader's argument ``name``; None where it is None.

    labelled: whether batches have a y
    more: what the function takes besides arrays, in words
    """
    if function is None:
        return None
    expected = f"x{', or x and y' * labelled}{more}"
    if not callable(function):
        raise DTypeError(f"{name} must be a function of x, or of x and y{more}, got {type(function).__name__}")
    extra = 1 if more else 0
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # some builtins have no signature
        return BatchFunction(name, function, 1)
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    needed = sum(p.kind in kinds and p.default is inspect.Parameter.empty for p in parameters)
    anything = any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters)
    if needed > 1 + labelled + extra or (needed < 1 + extra and extra and not anything):
        raise ArgumentError(f"{name} must take {expected}; it takes {needed} arguments")
    return BatchFunction(name, function, 2 if needed == 2 + extra else 1)
