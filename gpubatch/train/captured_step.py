"""One step of network and optimizer as a launch, for loops of one's own."""

from __future__ import annotations

from typing import Any

from gpubatch.backend import Array
from gpubatch.errors import ArgumentError, check_int
from gpubatch.nn import Network, core_of, dealt_of
from gpubatch.optim import Optimizer, captured_key, follow_pass, scalars_ahead
from gpubatch.parallel import Ranks
from gpubatch.train.checks import check_bound, why_eager
from gpubatch.train.graphs import Form, GivenArrays, StepGraphs
from gpubatch.train.ledger import CHUNK


class CapturedStep:
    """``net.step_loss(X, Y)`` and ``opt.step()`` as one launch, for loops of your own.

    net: the network
    opt: its optimizer, bound to ``net.parameters``
    X: samples, an array on the device, as for :meth:`Network.step_loss`
    Y: targets, likewise
    steps: how many steps a call makes, from 1 to 64, all on the same batch
    weight: what each sample counts, likewise, or None
    ranks: those that make the steps together, or None; X, Y and ``weight`` are then this rank's parts of a batch, in
        arrays that a ``Loader(ranks=ranks)`` gave out

    The first call captures, which takes memory and time. A call queues the steps on the current stream and does not
    wait: they read X and Y when the device comes to them. Write the next batch into X and Y afterwards, ``X[...] =
    batch``. A call returns the loss of its last step, an array of one element on the device, which the next call
    overwrites; with ranks, all of which make the same calls, it is that of the whole batch. Nothing checks whether loss
    and gradient are finite. A new learning rate, ``opt.lr = ...``, takes effect at the next call.

    Raises ArgumentError if the steps cannot be captured, and says why.

    >>> gb.CapturedStep(net, opt, x, y)()  # doctest: +SKIP
    """

    def __init__(
        self,
        net: Network,
        opt: Optimizer,
        X: Array,
        Y: Array,
        steps: int = 1,
        weight: Array | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        for name, reason in {"net": why_eager(net), "opt": why_eager(net, opt)}.items():
            if reason:
                raise ArgumentError(f"{name} cannot be captured: {reason}")
        self.net, self.opt, self.steps = net, opt, check_int("steps", steps, 1, CHUNK)
        check_bound(net, opt)
        if len(X) or ranks is None:
            core_of(net).batches.check(X, Y, weight=weight)
        self._deal, self._ranks = dealt_of(net).deal(X, ranks), ranks
        self._feed = GivenArrays(X, Y) if weight is None else GivenArrays(X, Y, weight)
        rows = len(X) if self._deal is None else self._deal.rows
        self._form = Form(rows, rows, self.steps)
        self._graphs: StepGraphs | None = None
        self._left = 0  # steps whose scalars are on the device
        self._expected: tuple[Any, ...] = ()  # the optimizer and the dropout step that they are for

    def __call__(self) -> Array:
        """Queue the steps; return the loss of the last one."""
        frozen: tuple[str, ...] = ()
        if self._graphs is None or not self._graphs.fits(self.opt):
            deal, ranks = self._deal, self._ranks
            self._graphs = StepGraphs(
                self.net, self.opt, self._feed, guarded=False, deal_of=lambda rows: deal, ranks=ranks
            )
            self._expected = ()
            frozen = self.opt.frozen  # this launch captures
        graphs = self._graphs
        follow_pass(self.opt)
        if self._left < self.steps or self._expected != (*captured_key(self.opt), core_of(self.net).dropout_step):
            scalars, _ = scalars_ahead(self.opt, self.opt.t, graphs.ledger.capacity, self.steps)
            graphs.ledger.write(scalars)
            graphs.ledger.restart(0, core_of(self.net).dropout_step)
            self._left = len(scalars)
        with core_of(self.net).freezing(frozen):
            graphs.launch(self._form)
        self.opt.t += self.steps
        core_of(self.net).count_steps(self.steps)
        self._left -= self.steps
        self._expected = (*captured_key(self.opt), core_of(self.net).dropout_step)
        return graphs.loss
