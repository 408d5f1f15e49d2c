"""Metrics of predictions, computed on their device, at once or added up over batches; as scikit-learn's.

The functions take targets and predictions, in scikit-learn's order: ``f1(Y, net.predict(X))``. :func:`measure` runs a
network over arrays or a loader, batch by batch, so that samples need not fit in memory. Where a quotient is 0/0, as the
precision of a class that is never predicted, ``zero_division`` is its value.
"""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from gpubatch.backend import Array, backend_of
from gpubatch.errors import ArgumentError, ShapeError, check_choice, check_int, nearest
from gpubatch.loader import Loader, rows_of
from gpubatch.nn import EVALUATION_ROWS, Network

__all__ = [
    "AVERAGES",
    "Classes",
    "Measure",
    "Residuals",
    "TopK",
    "accuracy",
    "confusion_matrix",
    "f1",
    "mae",
    "measure",
    "measures_of",
    "mse",
    "of_batches",
    "precision",
    "r2",
    "recall",
    "rmse",
    "top_k_accuracy",
]

AVERAGES = ("macro", "micro", "weighted", "binary")


class Measure(ABC):
    """Counts or sums from which metrics are computed; :meth:`add` takes batches, on their device."""

    @abstractmethod
    def add(self, truth: Array, predicted: Array, weight: Array | None = None) -> None:
        """Count samples, ``weight`` each, by default 1."""


# --- classes ---------------------------------------------------------------------------------------------------------


class Classes(Measure):
    """Counts of the pairs (class, prediction), or of 0 and 1 for each column where there are several.

    classes: how many there are; labels and predictions are 0 to classes - 1. For columns, how many columns.
    """

    def __init__(self, classes: int) -> None:
        self.classes = check_int("classes", classes, 1)
        self._pairs: Array = None  # (classes, classes), or (columns, 2, 2)

    def add(self, truth: Array, predicted: Array, weight: Array | None = None) -> None:
        """See :class:`Measure`; both are integers ``(samples,)``, or ``(samples, columns)`` of 0 and 1."""
        truth, predicted = _same(truth, predicted)
        with backend_of(truth, predicted).scope():
            columns = truth.shape[1] if truth.ndim == 2 else 1
            shape = (columns, 2, 2) if truth.ndim == 2 else (self.classes, self.classes)
            if truth.ndim == 2 and columns != self.classes:
                raise ShapeError(f"truth must have {self.classes} columns, got shape {truth.shape}")
            most = shape[-1]
            for name, labels in (("truth", truth), ("predicted", predicted)):
                if labels.size and not 0 <= labels.min().item() <= labels.max().item() < most:
                    raise ArgumentError(f"{name} must hold labels from 0 to {most - 1}")
            counts = None if weight is None else np.repeat(weight.astype(np.float64), columns)
            pairs = truth.astype(np.int64) * most + predicted.astype(np.int64)
            if truth.ndim == 2:
                xp = backend_of(truth).xp
                pairs = (pairs + 4 * xp.arange(columns)[None, :]).reshape(-1)
            found = np.bincount(pairs, counts, minlength=int(np.prod(shape))).reshape(shape)
            self._pairs = found if self._pairs is None else self._pairs + found

    @property
    def matrix(self) -> np.ndarray:
        """The confusion matrix: row i, column j has what the samples of class i count that are predicted as j.

        For columns one of 2 x 2 each, ``(columns, 2, 2)``.
        """
        if self._pairs is None:
            raise ArgumentError("there are no samples to measure")
        return backend_of(self._pairs).to_numpy(self._pairs)

    def accuracy(self) -> float:
        """The part of all predictions that is right."""
        matrix = self.matrix
        return float(np.trace(matrix, axis1=-2, axis2=-1).sum() / matrix.sum())

    def score(self, kind: str, average: str | None = "macro", zero_division: float = 0.0) -> Any:
        """Precision, recall or F1: for each class, or one number by ``average``.

        "macro": the mean over the classes that occur in truth or predictions; "weighted": over the samples' classes;
        "micro": of all predictions together; "binary": of class 1; None: an array with a number for each class.
        """
        right, of, samples = counts_of(self.matrix.astype(np.float64))
        below = {"precision": of, "recall": samples, "f1": (of + samples) / 2}[kind]
        if average is None:
            return _over(right, below, zero_division)
        check_choice("average", average, AVERAGES)
        if average == "micro":
            return float(_over(right.sum(), below.sum(), zero_division))
        if average == "binary":
            if len(right) > 2:
                raise ArgumentError(f"average='binary' needs two classes, got {len(right)}")
            return float(_over(right[-1:], below[-1:], zero_division)[0])
        each = _over(right, below, zero_division)
        if average == "macro":
            met = (of + samples > 0) | (self.matrix.ndim == 3)
            return float(each[met].mean())
        return float(np.average(each, weights=samples)) if samples.sum() else float(zero_division)


def counts_of(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each class or column of ``Classes.matrix``: right predictions of it, predictions of it, samples of it."""
    if matrix.ndim == 3:
        return matrix[:, 1, 1], matrix[:, :, 1].sum(axis=1), matrix[:, 1].sum(axis=1)
    return np.diagonal(matrix), matrix.sum(axis=0), matrix.sum(axis=1)


class TopK(Measure):
    """Counts the samples whose label is among the ``k`` highest scores; of equal scores the later class is higher."""

    def __init__(self, k: int) -> None:
        self.k = check_int("k", k, 1)
        self._right = self._all = 0.0

    def add(self, truth: Array, predicted: Array, weight: Array | None = None) -> None:
        """See :class:`Measure`; labels ``(samples,)`` and scores ``(samples, classes)``."""
        if truth.ndim != 1 or predicted.ndim != 2 or len(truth) != len(predicted):
            raise ShapeError(f"top-k takes labels (n,) and scores (n, classes), got {truth.shape}, {predicted.shape}")
        backend = backend_of(truth, predicted)
        with backend.scope():
            own = predicted[backend.xp.arange(len(truth)), truth][:, None]
            later = backend.xp.arange(predicted.shape[1])[None, :] > truth[:, None]
            above = ((predicted > own) | ((predicted == own) & later)).sum(axis=1)
            counts = backend.xp.ones(len(truth)) if weight is None else weight.astype(np.float64)
            self._right += float(((above < self.k) * counts).sum().item())
            self._all += float(counts.sum().item())

    def accuracy(self) -> float:
        """The part of the samples whose label is among the ``k`` highest scores."""
        return self._right / self._all


# --- numbers ---------------------------------------------------------------------------------------------------------


class Residuals(Measure):
    """Sums of differences between predictions and targets, column by column, in double precision."""

    def __init__(self) -> None:
        self._n = 0.0
        self._mean = self._spread = self._squares = self._sizes = np.zeros(0)

    def add(self, truth: Array, predicted: Array, weight: Array | None = None) -> None:
        """See :class:`Measure`; both ``(samples,)`` or ``(samples, outputs)``."""
        truth, predicted = _same(truth, predicted)
        backend = backend_of(truth, predicted)
        with backend.scope():
            y = truth.reshape(len(truth), -1).astype(np.float64)
            d = y - predicted.reshape(y.shape)
            w = backend.xp.ones((len(y), 1)) if weight is None else weight.astype(np.float64)[:, None]
            n = float(w.sum().item())
            if not n:
                return
            mean = (w * y).sum(axis=0) / n
            parts = mean, (w * (y - mean) ** 2).sum(axis=0), (w * d * d).sum(axis=0), (w * np.abs(d)).sum(axis=0)
            mean, spread, squares, sizes = (backend.to_numpy(part) for part in parts)
        if not self._n:
            self._n, self._mean, self._spread, self._squares, self._sizes = n, mean, spread, squares, sizes
            return
        # Chan, Golub & LeVeque 1983: the squared deviations of two sets, from those of each.
        total, apart = self._n + n, mean - self._mean
        self._spread = self._spread + spread + apart * apart * self._n * n / total
        self._mean = self._mean + apart * n / total
        self._n, self._squares, self._sizes = total, self._squares + squares, self._sizes + sizes

    def mse(self) -> float:
        """The mean squared difference."""
        return float((self._squares / self._count()).mean())

    def rmse(self) -> float:
        """The root of the mean squared difference, a mean over the outputs."""
        return float(np.sqrt(self._squares / self._count()).mean())

    def mae(self) -> float:
        """The mean absolute difference."""
        return float((self._sizes / self._count()).mean())

    def r2(self) -> float:
        """1 - Σ (y - p)² / Σ (y - mean)², a mean over the outputs; of constant targets 1 if all are met, else 0."""
        self._count()
        with np.errstate(divide="ignore", invalid="ignore"):
            each = np.where(self._spread > 0, 1 - self._squares / self._spread, np.where(self._squares > 0, 0.0, 1.0))
        return float(each.mean())

    def _count(self) -> float:
        if not self._n:
            raise ArgumentError("there are no samples to measure")
        return self._n


# --- of predictions --------------------------------------------------------------------------------------------------


def confusion_matrix(
    truth: Array, predicted: Array, classes: int | None = None, weight: Array | None = None
) -> np.ndarray:
    """Row i, column j: what the samples of class i count that are predicted as class j, ``(classes, classes)``."""
    return _classes(truth, predicted, weight, classes).matrix


def accuracy(truth: Array, predicted: Array, weight: Array | None = None) -> float:
    """The part of the predictions that is right."""
    return _classes(truth, predicted, weight).accuracy()


def precision(
    truth: Array,
    predicted: Array,
    average: str | None = "macro",
    weight: Array | None = None,
    zero_division: float = 0.0,
) -> Any:
    """Of the predictions of a class the part that is right.

    average: "macro", the mean over the classes that occur in truth or predictions; "weighted", over the samples'
        classes; "micro", of all predictions together; "binary", of class 1; None, a number for each class.
    """
    return _classes(truth, predicted, weight).score("precision", average, zero_division)


def recall(
    truth: Array,
    predicted: Array,
    average: str | None = "macro",
    weight: Array | None = None,
    zero_division: float = 0.0,
) -> Any:
    """Of the samples of a class the part that is found; ``average`` as in :func:`precision`."""
    return _classes(truth, predicted, weight).score("recall", average, zero_division)


def f1(
    truth: Array,
    predicted: Array,
    average: str | None = "macro",
    weight: Array | None = None,
    zero_division: float = 0.0,
) -> Any:
    """The harmonic mean of precision and recall; ``average`` as in :func:`precision`."""
    return _classes(truth, predicted, weight).score("f1", average, zero_division)


def top_k_accuracy(truth: Array, scores: Array, k: int = 5, weight: Array | None = None) -> float:
    """The part of the samples whose label is among the ``k`` highest scores."""
    found = TopK(k)
    found.add(truth, scores, weight)
    return found.accuracy()


def r2(truth: Array, predicted: Array, weight: Array | None = None) -> float:
    """The coefficient of determination, a mean over the outputs."""
    return _differences(truth, predicted, weight).r2()


def mse(truth: Array, predicted: Array, weight: Array | None = None) -> float:
    """The mean squared difference."""
    return _differences(truth, predicted, weight).mse()


def rmse(truth: Array, predicted: Array, weight: Array | None = None) -> float:
    """The root of the mean squared difference, a mean over the outputs."""
    return _differences(truth, predicted, weight).rmse()


def mae(truth: Array, predicted: Array, weight: Array | None = None) -> float:
    """The mean absolute difference."""
    return _differences(truth, predicted, weight).mae()


# --- of a network ----------------------------------------------------------------------------------------------------

KINDS = ("accuracy", "top_K", "confusion_matrix", "precision", "recall", "f1", "r2", "mse", "rmse", "mae")


def measures_of(net: Network, metrics: Iterable[str]) -> list[tuple[str, Measure, Callable[[Any], Any], bool]]:
    """(name, what counts samples, the metric of it, whether it takes scores) for each name; equal counts are shared."""
    if isinstance(metrics, str):
        raise ArgumentError(f"metrics must be a list of names, got {metrics!r}: write [{metrics!r}]")
    # The predictions of one output are (n,), of 0 and 1.
    classes, differences = Classes(max(2, net.outputs)), Residuals()
    found: list[tuple[str, Measure, Callable[[Any], Any], bool]] = []
    for name in metrics:
        kind, _, rest = str(name).partition("_")
        if name in ("r2", "mse", "rmse", "mae"):
            found.append((name, differences, operator.methodcaller(name), False))
            continue
        if not net.loss_function.classifies:
            raise ArgumentError(
                f"{name!r} needs a loss with classes, and {net.loss_name} has none; r2, mse, rmse, mae do"
            )
        if name == "accuracy":
            found.append((name, classes, operator.methodcaller("accuracy"), False))
        elif name == "confusion_matrix":
            found.append((name, classes, operator.attrgetter("matrix"), False))
        elif kind == "top" and rest.isdigit() and _labelled(net):
            found.append((name, TopK(int(rest)), operator.methodcaller("accuracy"), True))
        elif kind in ("precision", "recall", "f1") and (not rest or rest in AVERAGES):
            found.append((name, classes, operator.methodcaller("score", kind, rest or "macro"), False))
        else:
            known = ", ".join(KINDS)
            raise ArgumentError(
                f"a metric must be one of {known}, with K a number and, after precision, recall and f1, _micro, "
                f"_macro, _weighted or _binary, as f1_micro; got {name!r}{nearest(name, list(KINDS))}"
            )
    return found


def measure(
    net: Network, X: Any, Y: Any = None, metrics: Sequence[str] = ("accuracy",), weight: Any = None
) -> dict[str, Any]:
    """Metrics of a network's predictions, by name, computed batch by batch on its device.

    X: rows as :meth:`~gpubatch.Network.predict` takes them, with Y; or a :class:`Loader` of samples and targets,
        which makes an epoch: give it one of its own.
    metrics: "accuracy", "top_5", "confusion_matrix", "precision", "recall", "f1" (the mean over the classes, or
        "f1_micro", "f1_weighted", "f1_binary"), "r2", "mse", "rmse", "mae".
    weight: what each sample counts, where X and Y are arrays.
    """
    if isinstance(X, Loader):
        batches: Iterable[Sequence[Array]] = rows_of(X)
    else:
        batches = _batches(X, Y, weight)
    return of_batches(net, batches, metrics)


def of_batches(net: Network, batches: Iterable[Sequence[Any]], metrics: Sequence[str]) -> dict[str, Any]:
    """Metrics of a network's predictions for batches ``(x, y)`` or ``(x, y, weight)``; a weight may be None."""
    found, loss = measures_of(net, metrics), net.loss_function
    by_scores = {id(m): (m, scored) for _, m, _, scored in found}.values()
    for x, y, *weights in batches:
        weight, scores = weights[0] if weights else None, net.scores(x)
        with net.backend.scope():
            if loss.ignore_label is not None and y.ndim == 1:
                kept = loss.ignore_label != y
                y, scores, weight = y[kept], scores[kept], None if weight is None else weight[kept]
            predicted = loss.predict(scores)
            truth = loss.truth(y, net.outputs) if loss.classifies else y.reshape(predicted.shape)
            for one, scored in by_scores:
                one.add(truth, scores if scored else predicted, weight)
    return {name: value(m) for name, m, value, _ in found}


# --- pieces ----------------------------------------------------------------------------------------------------------


def _labelled(net: Network) -> bool:
    """Whether predictions are one class of many, not 0 or 1 for each output."""
    return net.loss_function.least_outputs > 1


def _batches(X: Any, Y: Any, weight: Any) -> Iterable[Sequence[Array]]:
    if Y is None:
        raise ArgumentError("Y must be given with rows X")
    X = X.tocsr() if hasattr(X, "tocsr") else X
    for start in range(0, X.shape[0] if hasattr(X, "tocsr") else len(X), EVALUATION_ROWS):
        part = slice(start, start + EVALUATION_ROWS)
        yield (X[part], Y[part]) if weight is None else (X[part], Y[part], weight[part])


def _same(truth: Array, predicted: Array) -> tuple[Array, Array]:
    if truth.shape != predicted.shape or truth.ndim not in (1, 2):
        raise ShapeError(
            f"truth and predicted must have one shape, (n,) or (n, k), got {truth.shape}, {predicted.shape}"
        )
    return truth, predicted


def _classes(truth: Array, predicted: Array, weight: Array | None, classes: int | None = None) -> Classes:
    _same(truth, predicted)
    if not len(truth):
        raise ArgumentError("there are no samples to measure")
    found = truth.shape[1] if truth.ndim == 2 else int(max(truth.max().item(), predicted.max().item())) + 1
    counted = Classes(found if classes is None else classes)
    counted.add(truth, predicted, weight)
    return counted


def _differences(truth: Array, predicted: Array, weight: Array | None) -> Residuals:
    counted = Residuals()
    counted.add(truth, predicted, weight)
    return counted


def _over(above: Any, below: Any, zero_division: float) -> Any:
    """Quotients, ``zero_division`` for those of 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(below > 0, np.divide(above, below), zero_division)
