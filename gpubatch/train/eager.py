"""Eager steps: each looked at before the next one, and left out where something is not finite."""

from __future__ import annotations

import contextlib
import math
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from gpubatch.backend import Array
from gpubatch.errors import (
    ArgumentError,
    DTypeError,
    InsufficientMemoryError,
    MicroBatchWarning,
    NonFiniteError,
    SkippedStepWarning,
    check_int,
    check_real,
)
from gpubatch.nn import EVALUATION_ROWS, Network, core_of, quiet
from gpubatch.ops import SQUARE_SUM_SIZE
from gpubatch.optim import Optimizer, StepResult
from gpubatch.params import FlatViews
from gpubatch.train.graphs import CapturedSteps
from gpubatch.train.history import TrainingState
from gpubatch.train.loss_scale import LossScale
from gpubatch.train.memory import lack, power_below, release

__all__ = ["Guard", "warn_caller"]


class Guard:
    """Makes the steps, and leaves out those whose loss or gradient is not finite.

    One pass over the gradients tells their norm, for ``max_norm``, and whether all of them are finite. Those of a mixed
    network are multiplied by ``scale``, which is lowered before anything else is said to be wrong with them.
    """

    def __init__(
        self,
        net: Network,
        opt: Optimizer,
        max_norm: float | None,
        max_skipped: int,
        loss_scale: LossScale | None = None,
    ) -> None:
        self.net, self.opt = net, opt
        self.max_norm = None if max_norm is None else check_real("max_norm", max_norm, 0.0, open_low=True)
        self.max_skipped = check_int("max_skipped", max_skipped, 0)
        self.in_a_row = 0
        self._squares = net.backend.zeros(SQUARE_SUM_SIZE, np.float64)
        self._control = net.backend.zeros(2, net.compute_dtype)
        self.scale: LossScale | None = None
        if loss_scale is not None and not isinstance(loss_scale, LossScale):
            raise DTypeError(f"loss_scale must be a gpubatch.LossScale, got {type(loss_scale).__name__}")
        if net.loss_scale is not None:
            self.scale = loss_scale or LossScale()
        elif loss_scale is not None:
            raise ArgumentError(f"loss_scale is for a network with precision='mixed', this one has {net.precision!r}")
        self._halved = ""  # why, until it is known that it was enough
        self.captured: CapturedSteps | None = None
        self.careful = False  # whether the last step was looked at afterwards

    def step(self, x: Array, y: Array, state: TrainingState) -> tuple[float, StepResult | None]:
        """The loss of a batch, and the step that was made; None for one that was left out."""
        core_of(self.net).remember()
        try:
            found = self._step(x, y, state)
        except MemoryError:
            core_of(self.net).recall()  # it will be made again
            raise
        self._warn_of_halves(state)
        return found

    def _step(self, x: Array, y: Array, state: TrainingState) -> tuple[float, StepResult | None]:
        try:
            loss, grads = self.net.loss_and_grad(x, y, state.history.micro_batch_size)
        except NonFiniteError as error:
            self._leave_out(str(error), state)
            return math.nan, None
        squares, not_finite = self._look_at(grads)
        if not_finite or not math.isfinite(squares):
            core_of(self.net).recall()  # that the gradient is not finite was found after they had changed
            if self.scale is not None and self.scale.overflow():
                self._write_scale(self.scale.value)
                state.history.overflows += 1
            else:
                self._leave_out(self._what_is_wrong(grads, not_finite), state)
            return loss, None
        control = self._clipping(math.sqrt(squares))
        self.careful = control is None and squares > float(np.finfo(self.net.compute_dtype).max)
        result = self._step_if_finite(grads, state) if self.careful else self.opt.step(grads, control)
        if result is not None:
            self.applied()
        return loss, result

    def applied(self, steps: int = 1) -> None:
        """Count steps that were made."""
        self.in_a_row = 0
        if self.scale is not None:
            before = self.scale.value
            self.scale.good(steps)
            if self.scale.value != before:
                self._write_scale(self.scale.value)

    @contextlib.contextmanager
    def scaling(self) -> Iterator[None]:
        """While it lasts, the network's gradients are scaled; those that a caller computes afterwards are not."""
        if self.scale is not None:
            self._write_scale(self.scale.value)
        try:
            yield
        finally:
            if self.scale is not None:
                self._write_scale(1.0)

    def _write_scale(self, value: float) -> None:
        with self.net.backend.scope():
            self.net.loss_scale.fill(value)

    def _step_if_finite(self, grads: FlatViews, state: TrainingState) -> StepResult | None:
        """A step on gradients whose squares may overflow, as Adam's would; taken back if something is infinite then."""
        xp, t = self.net.backend.xp, self.opt.t
        arrays = [self.net.parameters.flat, *(views.flat for views in self.opt.state.values())]
        with self.net.backend.scope(), quiet():
            before = [array.copy() for array in arrays]
            result = self.opt.step(grads)
            if all(xp.isfinite(array).all().item() for array in arrays):
                return result
            for array, values in zip(arrays, before, strict=True):
                array[...] = values
        core_of(self.net).recall()
        self.opt.t = t
        self._leave_out(f"the gradient is so large that {self.opt.rule.name} overflows {self.net.compute_dtype}", state)
        return None

    def validate(self, X: Array, Y: Array, state: TrainingState) -> None:
        """Loss and accuracy on the validation set, into the history."""
        while isinstance(found := self._evaluate(X, Y, state.history.micro_batch_size or EVALUATION_ROWS), str):
            self.halve(found, state)
        self._warn_of_halves(state)
        loss, accuracy = found
        state.history.validation_loss.append(loss)
        if accuracy is not None:
            state.history.validation_accuracy.append(accuracy)

    def _evaluate(self, X: Array, Y: Array, rows: int) -> tuple[float, float | None] | str:
        """Loss and accuracy, or for what there was no memory, in words."""
        try:
            return self.net.evaluate(X, Y, min(rows, EVALUATION_ROWS))
        except MemoryError as error:
            return lack(error)

    def halve(self, failure: str, state: TrainingState) -> None:
        """Compute fewer samples at a time, after there was no memory for ``failure``."""
        size = state.history.micro_batch_size or state.loader.batch_size
        if size <= core_of(self.net).least_rows:
            rows = "one sample" if size == 1 else f"{size} samples"
            raise InsufficientMemoryError(
                f"not even {rows} at a time can be computed in the memory there is: {failure}"
            )
        state.history.micro_batch_size = power_below(size)
        self._halved = self._halved or f"out of memory in epoch {state.epoch}, step {self.opt.t}: {failure}"
        self.captured = None  # graphs keep the memory that they work in
        release(self.net)

    def _warn_of_halves(self, state: TrainingState) -> None:
        if self._halved:
            size, rows = state.loader.batch_size, state.history.micro_batch_size
            text = f"{self._halved}; batches of {size} are computed {rows} samples at a time, gradients added up"
            self._halved = ""
            warn_caller(text, MicroBatchWarning)

    def _look_at(self, grads: FlatViews) -> tuple[float, int]:
        """Σ g², and how many g are not finite."""
        if self.max_norm is None and self.net.backend.name == "cpu" and self.scale is None:
            # BLAS is the quickest to tell that all is well: nothing that is not finite has a finite sum of squares.
            with quiet():
                squares = float(np.dot(grads.flat, grads.flat))
            if math.isfinite(squares):
                return squares, 0
        with self.net.backend.scope():
            self._squares[:2] = 0
            core_of(self.net).ops.square_sum(grads.flat, self._squares)
            squares, not_finite = self.net.backend.to_numpy(self._squares[:2]).tolist()
        return squares, int(not_finite)

    def _clipping(self, norm: float) -> Array | None:
        """What the optimizer multiplies the gradients by, where they are scaled, or their norm is too large."""
        scale = 1.0 if self.scale is None else self.scale.value
        factor = 1 / scale
        if self.max_norm is not None and norm / scale > self.max_norm:
            factor = self.max_norm / norm
        if factor == 1:
            return None
        with self.net.backend.scope():
            self._control[0] = factor
        return self._control

    def _what_is_wrong(self, grads: FlatViews, not_finite: int) -> str:
        if not not_finite:
            return "the gradient is too large for its norm to be computed"
        names = [name for name, g in grads.items() if not np.isfinite(self.net.backend.to_numpy(g)).all()]
        return f"{not_finite} of {grads.size} numbers of the gradient are NaN or infinite, in {', '.join(names)}"

    def _leave_out(self, what: str, state: TrainingState) -> None:
        place = f"epoch {state.epoch}, step {self.opt.t}, learning rate {getattr(self.opt, 'lr', None)}"
        if self.in_a_row == self.max_skipped:
            before = f"; {self.in_a_row} steps in a row before it were left out" if self.in_a_row else ""
            raise NonFiniteError(f"{what} ({place}){before}")
        self.in_a_row += 1
        state.history.skipped += 1
        if state.history.skipped == 1:
            text = f"{what} ({place}); this step is left out, and so will others be, up to {self.max_skipped} in a row"
            warn_caller(text, SkippedStepWarning)


def warn_caller(text: str, category: type[Warning]) -> None:
    """Warn of the line that called :func:`fit`."""
    level, frame = 1, sys._getframe()
    while Path(frame.f_code.co_filename).parent == Path(__file__).parent and frame.f_back is not None:
        level, frame = level + 1, frame.f_back
    warnings.warn(text, category, stacklevel=level)
