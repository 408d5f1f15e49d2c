"""What a batch of a network must be, and how X that is given for evaluation becomes one."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from gpubatch.backend import Array, Backend
from gpubatch.errors import DTypeError, ShapeError, UnscaledWarning
from gpubatch.inputs import ColumnNames, DenseRows, SparseMatrix, check_kind, is_sparse, taken
from gpubatch.nn.losses import Loss, check_weight, check_weight_values
from gpubatch.nn.stack import Stacked, describe_layer

EVALUATION_ROWS = 1024  # rows that are evaluated at a time: large enough for full speed, and a bound on memory


class BatchChecks:
    """Checks the batches of a network, given by its ``layers`` and ``loss``; the first layer decides the width of X."""

    def __init__(self, layers: Sequence[Stacked], loss: Loss, backend: Backend, dtype: np.dtype[Any]) -> None:
        self._layers, self._loss, self._backend, self._dtype = layers, loss, backend, dtype
        self._inputs, self._outputs = layers[0].inputs, layers[-1].needs.outputs
        self.columns = ColumnNames()  # of the frames that it was trained on
        self.largest_trained: float | None = None  # what scaled integers became at most, until the next evaluation

    def check(self, X: Any, Y: Any, values: bool = False, weight: Any = None) -> None:
        """Raise unless X and Y can be a batch, by shape, element type and device, and with ``values`` by those of Y.

        The values of ``weight`` are not checked: a weight that is not valid makes the loss NaN.
        """
        self.check_inputs(X)
        self._backend.check("Y", Y)
        self._loss.check(Y, len(X), self._outputs)
        if weight is not None:
            self._backend.check("weight", weight)
            check_weight(weight, len(X), self._loss)
        if values and not self._loss.nan_marks_bad_labels(Y):
            with self._backend.scope():
                self._loss.check_values(Y, self._outputs)

    def given(self, X: Any) -> Array:
        """``X`` for evaluation, on this device and of this dtype; numbers of other types are converted there.

        A sparse matrix stays one, whose rows are dense where they are asked for.
        """
        if (self._backend.owns(X) or isinstance(X, DenseRows)) and X.dtype == self._dtype:
            if self.largest_trained is not None:
                self.warn_if_unscaled(X)
            return X
        self.columns.check(("X",), X)
        X = SparseMatrix("X", X) if is_sparse(X) else taken("X", X, self._backend)
        if X.dtype == self._dtype and not isinstance(X, SparseMatrix):
            return self.given(X)
        check_kind("X", X.dtype)
        if X.dtype.itemsize == 1 and X.dtype.kind != "b":
            raise DTypeError(
                f"X has dtype {X.dtype}, as pixels have that a Loader scales; give loader.to_batch(X), which makes of "
                f"X what the network was trained on, or X.astype('{self._dtype}') if it was trained on such numbers"
            )
        if isinstance(X, SparseMatrix):
            return self.given(DenseRows(X, self._backend, self._dtype))
        with self._backend.scope(), np.errstate(over="ignore"):
            return self.given(X.astype(self._dtype))

    def given_pair(self, X: Any, Y: Any) -> tuple[Array, Array]:
        """``X`` and its labels for evaluation."""
        self.columns.check(("X", "Y"), X, Y)
        return self.given(X), taken("Y", Y, self._backend)

    def warn_if_unscaled(self, X: Array) -> None:
        """Warn, once after a training, if X is far larger than the training's batches can have been."""
        largest, self.largest_trained = self.largest_trained, None
        with self._backend.scope():
            found = abs(X[:EVALUATION_ROWS]).max().item() if X.size else 0.0
        if largest is not None and found > 2 * largest:
            warnings.warn(
                f"X reaches {found:.6g}, and the network was trained on numbers up to {largest:.6g}, which a Loader "
                "had scaled; give loader.to_batch(X)",
                UnscaledWarning,
                stacklevel=3,
            )

    def check_inputs(self, X: Any) -> None:
        """Raise unless X can be a batch, by shape, element type and device."""
        if not isinstance(X, DenseRows):
            self._backend.check("X", X)
        if X.ndim != 2:
            hint = "; a single sample is X[None]" if X.ndim == 1 else ""
            hint = "; samples of one feature are X[:, None]" if hint and self._inputs == 1 else hint
            hint = hint or "; images in rows are X.reshape(len(X), -1)"
            raise ShapeError(f"X must have shape (batch, {self._inputs}), got {X.shape}{hint}")
        if X.shape[1] != self._inputs:
            taker = next(run for run in self._layers if run.layer.takes() is not None)
            raise ShapeError(
                f"X has {X.shape[1]} features, {describe_layer(taker.layer, taker.place)} takes {self._inputs}: "
                f"X has shape {X.shape}"
            )
        if len(X) == 0:
            raise ShapeError(f"X must have at least one row, got shape {X.shape}")
        if X.dtype != self._dtype:
            raise DTypeError(
                f"X has dtype {X.dtype}, the network {'stores' if self._dtype == np.float16 else 'computes in'} "
                f"{self._dtype}; convert it with "
                f"X.astype('{self._dtype}'), or let Loader do it (dtype=, and scale=1/255 for images of uint8)"
            )

    def check_values(self, Y: Array, weight: Array | None = None) -> None:
        """Raise if a value of Y or of ``weight`` is out of range."""
        self._loss.check_values(Y, self._outputs)
        if weight is not None:
            check_weight_values(weight)
