"""What captured steps need of an optimizer: its scalars for steps ahead, and its launch without a step."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from gpubatch.backend import Array, compute_dtype
from gpubatch.formula import Trace
from gpubatch.ops import CompiledUpdate, CudaUpdate
from gpubatch.optim.epochs import EpochCount
from gpubatch.optim.optimizer import LOOKS, Optimizer
from gpubatch.own import changed
from gpubatch.passes import DataPass, pass_under_way

INIT = {"__init__"}  # which optimizers differ in


class Unbound(Optimizer):
    """See :func:`unbound`."""

    def __init__(self, init: Callable[..., None], arguments: dict[str, Any]) -> None:
        init(self, params=[np.zeros(1)], **arguments)

    def _bind(self) -> None:
        """Compile nothing."""


def unbound(init: Callable[..., None], **arguments: Any) -> Optimizer:
    """An optimizer of one weight that is never stepped: its rule, its checked arguments, and the initial state.

    init: the ``__init__`` of a class of optimizers.
    arguments: those of ``init``, apart from the parameters.
    """
    return Unbound(init, arguments)


def trace_of(opt: Optimizer, decayed: bool) -> Trace:
    """The formula that an optimizer applies, recorded with its options, and if ``decayed`` with its weight decay."""
    return opt.rule.trace(("decoupled" if opt._hyper.decoupled else "coupled") if decayed else "", **opt._hyper.options)


@contextlib.contextmanager
def unchecked(opt: Optimizer) -> Iterator[None]:
    """Inside a ``with``, the optimizer does not check for NaN and infinity, because the caller does."""
    before, opt._check = opt._check, False
    try:
        yield
    finally:
        opt._check = before


def rehearse_update(opt: Optimizer, grads: Any = None) -> None:
    """Do all that a step needs, without a step: compile its code, and take the memory of the state.

    grads: as for :meth:`Optimizer.step`; their values do not matter.
    """
    control, t, epochs = opt.backend.zeros(2, compute_dtype(opt._dtype)), opt.t, opt._epochs
    with opt.backend.scope():
        control.fill(1)  # the second one leaves the step out
        for views in opt._state.values():
            views.flat *= 1  # zeros are given by the system only when they are first written to
    opt._epochs = EpochCount()
    try:
        opt.step(grads, control)
    finally:
        opt.t, opt._epochs = t, epochs


def scalars_ahead(opt: Optimizer, start: int, count: int, least: int = 1) -> tuple[np.ndarray, list[float | None]]:
    """The formula's scalars for ``count`` steps from ``start`` on, of shape (steps, groups, scalars); learning rates.

    They are what :meth:`Optimizer.step` would compute while hyper-parameters and ``epoch`` stay. If a schedule raises,
    stop there, because the run may end first; raise only if fewer than ``least`` rows were made.
    """
    arrangement = opt._whole()
    steps, rates = list[list[tuple[float, ...]]](), list[float | None]()
    for t in range(start, start + count):
        try:
            rows, lr = opt._scalars(t)
        except Exception:
            if len(steps) < least:
                raise
            break
        steps.append(rows)
        rates.append(lr)
    shape = len(steps), len(arrangement.rows), max(1, len(opt._trace.scalars))
    scalars = np.zeros(shape, compute_dtype(opt._dtype))
    if steps and opt._trace.scalars:
        scalars[...] = steps
    return scalars, rates


def enqueue_update(
    opt: Optimizer, scalars: Array, control: Array | None, progress: Array, running: tuple[Array, Array] | None
) -> Any:
    """Launch what :meth:`Optimizer.step` launches on a GPU for ``params.grads``, so that it can be captured.

    ``t`` stays. Returns the objects to keep as long as the graph.

    scalars: rows of :func:`scalars_ahead`, on the device.
    control, progress, running: as :meth:`CudaUpdate.launch` has them.
    """
    assert isinstance(opt._update, CudaUpdate)
    with opt.backend.scope():
        arrays, row_of = opt._arrays(None)
        return opt._update.launch(arrays, scalars, control, progress, running, row_of)


def update_ahead(opt: Optimizer, scalars: np.ndarray, step: np.ndarray) -> bool:
    """Make on a CPU the update of :meth:`Optimizer.step` by ``params.grads``, so that it can be recorded.

    ``t`` stays. False, with nothing changed, where a formula is not compiled or a method of the optimizer is not ours.

    scalars: rows of :func:`scalars_ahead`, of which those of ``step[0]`` are taken; ``step`` is then one more.
    """
    if changed(opt, INIT) or not isinstance(opt._update, CompiledUpdate):
        return False
    arrays, row_of = opt._arrays(None)
    return opt._update.ahead(arrays, scalars, row_of, step)


def count_steps(opt: Optimizer, steps: int) -> None:
    """Count steps that were made by :func:`update_ahead`, and look at what :meth:`Optimizer.step` looks at in them."""
    before, opt.t = opt.t, opt.t + steps
    if (opt.t - 1) // LOOKS > (before - 1) // LOOKS:
        opt._look()


def captured_key(opt: Optimizer) -> tuple[Any, ...]:
    """What :func:`scalars_ahead` and :func:`enqueue_update` depend on: while it is the same, so are they.

    What graphs launch, comes first.
    """
    return opt._whole(), opt.t, opt._epochs.epoch, *(value for _, value in opt._hyper.every())


def epoch_in(opt: Optimizer, known: DataPass) -> int:
    """The epoch of steps in the pass ``known``, if that is the next one."""
    return opt._epochs.in_pass(known)


def follow_pass(opt: Optimizer, known: DataPass | None = None) -> None:
    """Count the epoch of the steps to come, which :meth:`Optimizer.step` would count.

    known: their pass; by default the one that a step made now is of.
    """
    if known is not None:
        opt._epochs.begin(known)
        if opt._flat is not None:
            opt._flat.fed = known
    else:
        opt._epochs.meet(pass_under_way(None if opt._flat is None else opt._flat.fed))
