"""Eager steps: each is looked at before the next one, and left out if its loss or gradient is not finite."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from gpubatch.backend import Array
from gpubatch.errors import (
    ArgumentError,
    NonFiniteError,
    SkippedStepWarning,
    check_int,
    check_real,
)
from gpubatch.loader import rows_of
from gpubatch.nn import Network, core_of, dealt_of, quiet
from gpubatch.ops import SQUARE_SUM_SIZE
from gpubatch.optim import StepResult
from gpubatch.params import FlatViews
from gpubatch.passes import Deal, deal_of, pass_of
from gpubatch.train.callbacks import Callbacks
from gpubatch.train.record import Between, Record
from gpubatch.train.together import RanksMemoryError


class Outcome(NamedTuple):
    """The outcome of the step on a batch.

    ``result`` is None if the step was left out; ``on_trial`` tells that the squares of the gradient overflow, so that
    the step was taken on trial.
    """

    loss: float
    result: StepResult | None
    on_trial: bool = False


class EagerSteps:
    """Makes steps one by one, and leaves out those whose loss or gradient is not finite.

    One pass over the gradient computes its norm, for ``max_norm``, and counts what is not finite. The gradient of a
    mixed network is multiplied by the record's ``scale``, which is lowered before anything else is blamed.
    """

    def __init__(
        self,
        record: Record,
        callbacks: Callbacks | None = None,
        max_norm: float | None = None,
        max_skipped: int = 10,
    ) -> None:
        net = record.state.net
        self.record, self.net, self.opt, self._callbacks = record, net, record.state.opt, callbacks or Callbacks()
        self.max_norm = None if max_norm is None else check_real("max_norm", max_norm, 0.0, open_low=True)
        self.max_skipped = check_int("max_skipped", max_skipped, 0)
        self._squares = net.backend.zeros(SQUARE_SUM_SIZE, np.float64)
        self._control = net.backend.zeros(2, net.compute_dtype)

    def run(self, between: Between) -> str:
        """Make the remaining steps of the epoch."""
        loader = self.record.state.loader
        dealt = loader.shards is not None
        with contextlib.closing(rows_of(loader)) as batches:  # ends the loader's thread, however this is left
            while (batch := next(batches, None)) is not None:
                deal = deal_of(batch[0]) if dealt else None
                rows = len(batch[0]) if deal is None else deal.rows
                outcome = self.step(batch[0], batch[1], batch[2] if len(batch) > 2 else None, deal)
                del batch  # before the next one is waited for
                self.record.note(outcome.loss, outcome.result, rows)
                self.record.warn_if_halved()
                if outcome.result is not None:
                    self._callbacks.step(self.record.state)
                between()
        return ""

    def release(self) -> None:
        """Let go of the network's workspaces."""
        core_of(self.net).release()

    def step(self, x: Array, y: Array, weight: Array | None = None, deal: Deal | None = None) -> Outcome:
        """Make the step on a batch, perhaps dealt to ranks. If memory runs out, network and optimizer are as before."""
        core_of(self.net).remember()
        try:
            return self._step(x, y, weight, deal)
        except MemoryError:
            core_of(self.net).recall()  # the step will be made again
            raise

    def _step(self, x: Array, y: Array, weight: Array | None, deal: Deal | None) -> Outcome:
        try:
            loss, grads = self._loss_and_grad(x, y, weight, deal)
        except NonFiniteError as error:
            self._leave_out(str(error))
            return Outcome(math.nan, None)
        squares, not_finite = self._look_at(grads)
        if self._callbacks.on_gradient and not not_finite:
            self._callbacks.gradient(self.record.state, grads)
            squares, not_finite = self._look_at(grads)
        if not_finite or not math.isfinite(squares):
            core_of(self.net).recall()  # running statistics had changed before this was found
            scale = self.record.scale
            if scale is not None and scale.overflow():
                self._write_scale(scale.value)
                self.record.history.overflows += 1
            else:
                self._leave_out(self._what_is_wrong(grads, not_finite))
            return Outcome(loss, None)
        control = self._clipping(math.sqrt(squares))
        on_trial = control is None and squares > float(np.finfo(self.net.compute_dtype).max)
        result = self._step_if_finite(grads) if on_trial else self.opt.step(grads, control)
        if result is not None:
            self.count_applied()
            self._callbacks.updated(self.record.state)
        return Outcome(loss, result, on_trial)

    def _loss_and_grad(self, x: Array, y: Array, weight: Array | None, deal: Deal | None) -> tuple[float, FlatViews]:
        """Of the whole batch, and the same on all ranks; so is an error."""
        net, record, together = self.net, self.record, self.record.together
        most, given = record.history.micro_batch_size, {} if weight is None else {"weight": weight}
        if deal is None and not together.several:
            return net.loss_and_grad(x, y, most, **given)  # a network of the user's own may not take a weight
        if deal is None:
            raise ArgumentError("loader must deal its batches to the ranks: batches of an iteration of its own are not")
        try:
            if type(net).loss_and_grad is not Network.loss_and_grad or "loss_and_grad" in vars(net):
                loss, grads = net.loss_and_grad(x, y, most, **given, ranks=together.ranks)
                record.signalled = together.any(bool(record.signals))
                return loss, grads
            net.parameters.fed = pass_of(x)
            whole = dealt_of(net).step(x, y, weight, deal, together.ranks, most, bool(record.signals))
        except MemoryError as error:
            raise RanksMemoryError(str(error) or "out of memory") from None
        except Exception as error:
            together.alike(error)
            raise
        record.signalled = whole.signalled
        return whole.loss, net.parameters.grads

    def count_applied(self, steps: int = 1) -> None:
        """Count applied steps, eager or captured; at most as many as the loss scale has room for."""
        scale = self.record.scale
        self.record.skipped_in_a_row = 0
        if scale is not None:
            before = scale.value
            scale.good(steps)
            if scale.value != before:
                self._write_scale(scale.value)

    @contextlib.contextmanager
    def scaling(self) -> Iterator[None]:
        """Inside a ``with``, scale the network's gradients; those that a caller computes afterwards are not scaled."""
        scale = self.record.scale
        if scale is not None:
            self._write_scale(scale.value)
        try:
            yield
        finally:
            if scale is not None:
                self._write_scale(1.0)

    def _write_scale(self, value: float) -> None:
        with self.net.backend.scope():
            self.net.loss_scale.fill(value)

    def _step_if_finite(self, grads: FlatViews) -> StepResult | None:
        """Take a step whose squares may overflow, as Adam's would; undo it if anything is infinite afterwards."""
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
        self._leave_out(f"the gradient is so large that {self.opt.rule.name} overflows {self.net.compute_dtype}")
        return None

    def _look_at(self, grads: FlatViews) -> tuple[float, int]:
        """Σ g², and how many g are not finite."""
        if self.max_norm is None and self.net.backend.name == "cpu" and self.record.scale is None:
            # BLAS is the quickest to tell that all is well: what is not finite has no finite sum of squares.
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
        """What the optimizer multiplies the gradient by; None if it is neither scaled nor too long."""
        scale = 1.0 if self.record.scale is None else self.record.scale.value
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

    def _leave_out(self, what: str) -> None:
        record, most = self.record, self.max_skipped
        place = f"{record.place}, learning rate {getattr(self.opt, 'lr', None)}"
        if record.skipped_in_a_row == most:
            before = f"; {most} steps in a row before it were left out" if most else ""
            raise record.together.alike(NonFiniteError(f"{what} ({place}){before}"))
        record.skipped_in_a_row += 1
        record.history.skipped += 1
        if record.history.skipped == 1:
            text = f"{what} ({place}); this step is left out, and so will others be, up to {most} in a row"
            record.warn(text, SkippedStepWarning)
