"""One step of network and optimizer as a launch, for loops of one's own."""

from __future__ import annotations

from typing import Any

from gpubatch.backend import Array
from gpubatch.errors import ArgumentError, check_int
from gpubatch.nn import Network, core_of
from gpubatch.optim import Optimizer, captured_key, scalars_ahead
from gpubatch.train.checks import check_bound, why_eager
from gpubatch.train.graphs import CapturedSteps, Form, GivenArrays
from gpubatch.train.ledger import CHUNK

__all__ = ["CapturedStep"]


class CapturedStep:
    """``net.step_loss(X, Y)`` and ``opt.step()`` as one launch, for loops of your own.

    X and Y are arrays on the device, as for :meth:`Network.step_loss`. The first call captures, which takes memory and
    time. A call queues ``steps`` steps, from 1 to 64, all on what X and Y hold when it comes to that, and waits for
    nothing; the next batch is written into them afterwards: ``X[...] = batch``. It returns the loss of the last step,
    an array of one element on the device, which the next call overwrites. Whether loss and gradients are finite is not
    looked at. A new learning rate, ``opt.lr = ...``, takes effect at the next call. All of it happens on the stream
    that is current.

    Raises ArgumentError where the steps cannot be captured, and says why.
    """

    def __init__(self, net: Network, opt: Optimizer, X: Array, Y: Array, steps: int = 1) -> None:
        for name, reason in {"net": why_eager(net), "opt": why_eager(net, opt)}.items():
            if reason:
                raise ArgumentError(f"{name} cannot be captured: {reason}")
        self.net, self.opt, self.steps = net, opt, check_int("steps", steps, 1, CHUNK)
        check_bound(net, opt)
        core_of(net).check_batch(X, Y)
        self._feed = GivenArrays(X, Y)
        self._form = Form(len(X), len(X), self.steps)
        self._captured: CapturedSteps | None = None
        self._left = 0  # steps whose scalars are on the device
        self._expected: tuple[Any, ...] = ()  # the state of optimizer and network that they are for

    def __call__(self) -> Array:
        """Queue the steps; the loss of the last one."""
        if self._captured is None or not self._captured.fits(self.opt):
            self._captured, self._expected = CapturedSteps(self.net, self.opt, self._feed, guarded=False), ()
        captured = self._captured
        if self._left < self.steps or self._expected != (*captured_key(self.opt), core_of(self.net).dropout_step):
            scalars, _ = scalars_ahead(self.opt, self.opt.t, captured.ledger.capacity, self.steps)
            captured.ledger.write(scalars)
            captured.ledger.restart(0, core_of(self.net).dropout_step)
            self._left = len(scalars)
        captured.launch(self._form)
        self.opt.t += self.steps
        core_of(self.net).count_steps(self.steps)
        self._left -= self.steps
        self._expected = (*captured_key(self.opt), core_of(self.net).dropout_step)
        return captured.loss
