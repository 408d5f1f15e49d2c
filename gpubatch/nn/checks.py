"""What a layer or a loss of the user's gets wrong, told in gpubatch's words, with the name of the method."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from gpubatch.backend import Array
from gpubatch.errors import ArgumentError, ShapeError, check_int
from gpubatch.nn.layers import Layer
from gpubatch.nn.losses import Loss
from gpubatch.nn.needs import Context, Needs, check_spaces
from gpubatch.nn.stack import Stacked, describe_layer, told
from gpubatch.ops import Space


def of_the_user(x: Any) -> bool:
    """Whether the class of a layer or a loss is not gpubatch's."""
    return type(x).__module__.partition(".")[0] != "gpubatch"


class Marks:
    """Arrays that a method must overwrite, filled with a number that it is unlikely to write, and those it must leave.

    Of the latter it keeps sums alone: a copy of a batch is no part of the memory plan.
    """

    def __init__(self, results: Mapping[str, Array], inputs: Mapping[str, Array]) -> None:
        self.results, self.inputs = results, inputs
        self.sums = {name: sums_of_bits(array) for name, array in inputs.items()}
        for array in results.values():
            array.fill(mark_of(array))

    def check(self, method: str) -> None:
        """Raise if the method left an element unwritten, or changed an input."""
        for name, array in self.results.items():
            if left := int((array == mark_of(array)).sum()):
                raise ArgumentError(
                    f"{method} must write {name} in place, as {name}[...] = values; {left} of {array.size} numbers "
                    "were not written"
                )
        for name, array in self.inputs.items():
            pairs = zip(sums_of_bits(array), self.sums[name], strict=True)
            if not all(bool((now == before).all()) for now, before in pairs):
                raise ArgumentError(f"{method} must not change {name}, which others read; work on a copy")


def sums_of_bits(array: Array) -> list[Array]:
    """Sums of the elements' bits along each axis, which a change hardly ever leaves as they were."""
    bits = array.view(f"u{array.itemsize}")
    return [bits.sum(axis=axis, dtype="uint64") for axis in range(bits.ndim)]


def of_rows(found: Any, rows: int) -> Array:
    """``found``, which a method returned, if it is an array of ``rows`` rows."""
    if getattr(found, "ndim", 0) < 1 or len(found) != rows:
        raise ShapeError(f"it must return an array of {rows} rows, got {getattr(found, 'shape', found)!r}")
    return found


def mark_of(array: Array) -> float:
    """A number near the end of the range of the array's type."""
    return float(array.dtype.type(0.83 * float(np.finfo(array.dtype).min)))  # exactly a number of this type


class WatchedLayer(Layer):
    """A user's layer. Its first call for each batch size must write all of its results, and change no input."""

    def __init__(self, run: Stacked) -> None:
        self.layer: Layer = run.layer
        self.name, self.least_rows = describe_layer(run.layer, run.place), run.needs.least_rows
        self._forward, self._backward = f"{self.name}.forward(x, y, c)", f"{self.name}.backward(x, y, dy, dx, c)"
        self._reads_x = "x" in run.needs.reads
        self._proved = set[tuple[int, bool]]()

    def takes(self) -> int | None:
        """See :class:`Layer`."""
        return self.layer.takes()

    def needs(self, features: int) -> Needs:
        """See :class:`Layer`."""
        return self.layer.needs(features)

    def forward(self, x: Array, y: Array, c: Context) -> None:
        """See :class:`Layer`."""
        call = len(x), c.mode.training
        if c.mode.training and len(x) < self.least_rows:
            raise ArgumentError(f"{self.name} needs least_rows={self.least_rows} in a training batch, got {len(x)}")
        marks = None if call in self._proved or y is x else Marks({"y": y}, {"x": x})
        with told(self._forward):
            self.layer.forward(x, y, c)
        if marks is not None:
            marks.check(self._forward)
            self._proved.add(call)

    def backward(self, x: Array, y: Array, dy: Array, dx: Array | None, c: Context) -> None:
        """See :class:`Layer`."""
        call = -len(x), True
        marks = None
        if call not in self._proved:
            own = {} if dx is None or dx is dy else {"dx": dx}
            # x is the output of the layer before. What this one does not read again may be memory of something else.
            inputs = {"x": x} if self._reads_x and y is not x else {}
            marks = Marks({**own, **{f"c.g[{n!r}]": g for n, g in c.g.items()}}, inputs)
        with told(self._backward):
            self.layer.backward(x, y, dy, dx, c)
        if marks is not None:
            marks.check(self._backward)
            self._proved.add(call)


class WatchedLoss(Loss):
    """A user's loss. Its first call for each batch size must write all of its results, and change no input."""

    def __init__(self, loss: Loss) -> None:
        self.loss, self.classifies = loss, loss.classifies
        self.takes_weights = loss.takes_weights
        with told(f"{type(loss).__name__}.least_outputs"):
            self.least_outputs = check_int("its value", loss.least_outputs, 1)
        self._proved = set[tuple[int, bool]]()

    @property
    def name(self) -> str:
        """See :class:`Loss`."""
        return self.loss.name

    @property
    def ignore_label(self) -> int | None:
        """See :class:`Loss`."""
        return self.loss.ignore_label

    def workspace(self, outputs: int) -> Mapping[str, Space]:
        """See :class:`Loss`."""
        with told(self._method("workspace(outputs)")):
            spaces = self.loss.workspace(outputs)
            check_spaces("its result", spaces)
            for name, shape in (("loss", (1,)), ("dz", (-1, outputs))):
                if name not in spaces or tuple(spaces[name][0]) != shape:
                    raise ShapeError(f"its result must hold {name!r} with the shape {shape}, got {dict(spaces)}")
        return spaces

    def check(self, Y: Array, rows: int, outputs: int) -> None:
        """See :class:`Loss`."""
        with told(self._method("check(Y, rows, outputs)"), looks_at_input=True):
            self.loss.check(Y, rows, outputs)

    def check_values(self, Y: Array, outputs: int) -> None:
        """See :class:`Loss`."""
        with told(self._method("check_values(Y, outputs)"), looks_at_input=True):
            self.loss.check_values(Y, outputs)

    def nan_marks_bad_labels(self, Y: Array) -> bool:
        """See :class:`Loss`."""
        with told(self._method("nan_marks_bad_labels(Y)")):
            return self.loss.nan_marks_bad_labels(Y)

    def run(self, z: Array, Y: Array, c: Context) -> None:
        """See :class:`Loss`."""
        method, call = self._method("run(z, Y, c)"), (len(z), c.gradient)
        wanted = ("loss", "dz") if c.gradient else ("loss",)
        marks = (
            None
            if call in self._proved
            else Marks({f"c.work[{name!r}]": c.work[name] for name in wanted}, {"z": z, "Y": Y})
        )
        with told(method):
            self.loss.run(z, Y, c)
        if marks is not None:
            marks.check(method)
            self._proved.add(call)

    def predict(self, z: Array) -> Array:
        """See :class:`Loss`."""
        with told(self._method("predict(z)")):
            return of_rows(self.loss.predict(z), len(z))

    def truth(self, Y: Array, outputs: int) -> Array:
        """See :class:`Loss`."""
        with told(self._method("truth(Y, outputs)")):
            return of_rows(self.loss.truth(Y, outputs), len(Y))

    def _method(self, call: str) -> str:
        return f"{type(self.loss).__name__}.{call}"
