"""The weight of each sample in the loss: its own, times that of its class."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from gpubatch.backend import Array, Backend, unmasked
from gpubatch.errors import ArgumentError, DTypeError, ShapeError, check_choice, check_int, check_real
from gpubatch.inputs import checked_array
from gpubatch.sources import ArraySource, Part


@dataclasses.dataclass(frozen=True, eq=False)
class ClassWeights:
    """The weights of classes.

    table: of labels 0, 1, ...; NaN: none
    other: of larger labels

    Negative labels are no classes: they weigh 1, and losses ignore or refuse them.
    """

    table: np.ndarray
    other: float

    def of(self, Y: Array, name: str, backend: Backend) -> Array:
        """The weights of the labels Y, in double precision, on the device of Y."""
        check_labels(name, Y)
        last = len(self.table)
        of_label = np.append(self.table, self.other)
        with backend.scope():
            place = np.clip(Y.astype(np.int64), 0, last)
            found = (of_label if isinstance(Y, np.ndarray) else backend.asarray(of_label))[place]
            found[Y < 0] = 1
            if bool((missing := found != found).any()):
                label = int(Y[int(missing.argmax())])
                raise ArgumentError(f"{name} has the label {label}, for which class_weight has no weight")
        return found


def class_weights(given: Any, labels: Array, backend: Backend) -> ClassWeights:
    """The loader's argument ``class_weight``, for its labels."""
    with backend.scope():
        high = int(labels.max())
        if high >= 2 * len(labels) + 1000:
            raise ArgumentError(f"class_weight is for labels that count classes from 0, got the label {high}")
        counts = np.asarray(backend.to_numpy(np.bincount(labels[labels >= 0].astype(np.int64), minlength=1)))
    if isinstance(given, str):
        check_choice("class_weight, if not a mapping or an array,", given, ["balanced"])
        with np.errstate(divide="ignore"):
            balanced = counts.sum() / (np.count_nonzero(counts) * counts)
        return ClassWeights(np.where(counts > 0, balanced, math.nan), math.nan)
    if isinstance(given, Mapping):
        table = np.ones(len(counts))
        for label, weight in given.items():
            label = check_int("the labels of class_weight", label, 0)
            if label >= len(counts) or not counts[label]:
                raise ArgumentError(f"class_weight has the label {label}, which Y does not have")
            table[label] = check_real(f"class_weight[{label}]", weight, 0)
        return ClassWeights(table, 1.0)
    try:
        unmasked("class_weight", given)
        table = np.asarray(backend.to_numpy(given) if backend.owns(given) else given, np.float64)
    except (TypeError, ValueError):
        raise DTypeError(
            f"class_weight must be 'balanced', a mapping from labels to weights, or an array of weights, got {given!r}"
        ) from None
    if table.ndim != 1 or len(table) <= high:
        raise ShapeError(
            f"class_weight must have one weight for each of the labels 0 to {high}, got an array of shape {table.shape}"
        )
    check_weights("class_weight", table)
    return ClassWeights(table, math.nan)


@dataclasses.dataclass(frozen=True, eq=False)
class Weighting:
    """How samples count in the loss: by weights of their own (``by_samples``), by those of their classes, or by both.

    Weights are arrays of ``dtype``, in which the loss is computed.
    """

    backend: Backend
    dtype: np.dtype[Any]
    by_samples: bool
    of_classes: ClassWeights | None = None

    def of_samples(
        self, weight: Any, labels: Array | None, n: int, names: tuple[str, str] = ("weight", "Y")
    ) -> Array | None:
        """The weights of ``n`` samples as a new array, or None; on the device if one of their factors is.

        weight: of the samples, as a user gives it, or None
        labels: those to which class weights belong
        names: of the arguments, for messages
        """
        backend, of_classes = self.backend, self.of_classes
        if weight is not None:
            weight = checked_array(names[0], weight, backend)
            if weight.shape != (n,):
                raise ShapeError(f"{names[0]} must have shape ({n},), one number for each sample, got {weight.shape}")
            check_weights(names[0], weight)
        if of_classes is None:
            found = weight
        else:
            assert labels is not None
            found = of_classes.of(labels, names[1], backend)
            if weight is not None:
                here = isinstance(found, np.ndarray) and isinstance(weight, np.ndarray)
                found = found * weight if here else backend.asarray(found) * backend.asarray(weight)
        if found is None:
            return None
        with backend.scope(), np.errstate(over="ignore"):
            found = found.astype(self.dtype)
            what = names[0] if of_classes is None else "class_weight"
            what = f"{names[0]} times class_weight" if of_classes is not None and weight is not None else what
            if not bool(found.any()):
                raise ArgumentError(f"{what} must be above 0 for some of the samples, got 0 for all of them")
            check_weights(what, found)
        return found

    def of_set(self, Y: Any, weight: Any, axis: int) -> dict[str, Array]:
        """The weights of a validation set with labels Y along ``axis``, as arguments of :meth:`Network.evaluate`.

        Those of samples count in loss and accuracy, those of classes in the loss.
        """
        if weight is None and self.of_classes is None:
            return {}
        names = "validation[2]", "validation[1]"
        labels = checked_array(names[1], Y, self.backend)
        kinds = {"weight": dataclasses.replace(self, of_classes=None), "loss_weight": self}
        if self.of_classes is None:
            del kinds["loss_weight"]
        found = {name: kind.of_samples(weight, labels, labels.shape[axis], names) for name, kind in kinds.items()}
        return {name: self.backend.asarray(array) for name, array in found.items() if array is not None}

    def of_batch(self, y: Array, weight: Array | None = None) -> dict[str, Array]:
        """The same of a batch with labels y, whose ``weight`` is that of the samples times that of the classes."""
        if self.of_classes is None:
            return {} if weight is None else {"weight": weight}
        if weight is not None and not self.by_samples:
            return {"loss_weight": weight}
        with self.backend.scope():
            of_class = self.of_classes.of(y, "Y", self.backend).astype(self.dtype)
            if weight is None:
                return {"loss_weight": of_class}
            of_sample = weight / (of_class + (of_class == 0))  # a class of weight 0 counts in neither
        return {"loss_weight": weight, "weight": of_sample}


READ_BYTES = 1 << 24  # bytes that are read at a time to find the labels


def labels_of(Y: ArraySource | Part) -> Array:
    """All labels, for class weights; a source is read once, in order."""
    if isinstance(Y, ArraySource):
        check_labels("Y", Y.array)
        return Y.array
    reader, n = Y.reader, Y.n_samples
    check_labels(reader.where, np.broadcast_to(np.zeros((), Y.dtype), (n, *Y.sample_shape)))
    labels = np.empty(n, Y.dtype)
    at_once = max(reader.block or 1, READ_BYTES // reader.row_bytes)
    for start in range(0, n, at_once):
        index = np.arange(start, min(start + at_once, n))
        labels[index] = reader.read(index, [math.inf] * len(reader.parts))[Y.number]
    return labels


def check_labels(name: str, Y: Array) -> None:
    """Raise unless Y are labels of classes."""
    if Y.ndim != 1 or Y.dtype.kind not in "iub":
        raise DTypeError(
            f"class_weight needs integer labels of shape (samples,), {name} has shape {Y.shape} and dtype {Y.dtype}"
        )


def check_weights(name: str, weights: Array) -> None:
    """Raise unless all weights are finite and not negative."""
    wrong = ~((weights >= 0) & (weights < math.inf))
    if bool(wrong.any()):
        first = int(wrong.argmax())
        raise ArgumentError(
            f"{name} must hold finite numbers that are not negative, got {name}[{first}] = {float(weights[first])}"
        )
