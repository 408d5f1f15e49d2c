"""OrderedEpochs of an estimator: batches in a given order, each a step of the network and its optimizer."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy.optimize
from scipy.special import xlogy

from gpubatch.backend import Array
from gpubatch.nn import evenly, quiet
from gpubatch.ops import SQUARE_SUM_SIZE, KernelCalls, recorded
from gpubatch.optim import Optimizer, count_steps, follow_pass, scalars_ahead, unchecked, update_ahead
from gpubatch.sklearn.machine import Machine
from gpubatch.train import CapturedStep, LossScale, why_eager

AHEAD = 1 << 8  # steps whose scalars are computed at a time
SCRATCH = 1 << 15  # numbers of the l2 gradient that NumPy computes at a time
AT_ONCE = 1 << 12  # rows of which L-BFGS computes the gradients at a time


class OrderedEpochs:
    """Makes epochs over X and Y, of which a batch takes the rows that an order names.

    X: ``(samples, features)``, of the network's element type; SciPy's sparse rows are made dense batch by batch
    Y: labels or numbers as the network's loss takes them
    weight: what each sample counts, or None
    alpha: the weight of the l2 term, over the sum of a batch's weights
    scale: of the loss, where gradients are of float16
    """

    def __init__(
        self,
        machine: Machine,
        opt: Optimizer,
        X: Any,
        Y: np.ndarray,
        weight: np.ndarray | None,
        alpha: float,
        scale: LossScale | None = None,
    ) -> None:
        self._machine, self._net, self._core, self._opt = machine, machine.net, machine.core, opt
        self._weight, self._alpha = weight, alpha
        self._scale, self._dense = scale, isinstance(X, np.ndarray)
        self._X = machine.rows(X) if self._dense else X
        self._Y = machine.backend.asarray(Y)
        self._given = None if weight is None else machine.backend.asarray(weight)
        parameters = machine.net.parameters
        self._weights = [parameters[name].reshape(-1) for name in machine.weight_names]
        self._spans = np.array([parameters.spans[name] for name in machine.weight_names])
        scratch = {"l2": SCRATCH, "squares": (1, 1)}
        self._scratch = {name: np.empty(shape, machine.net.dtype) for name, shape in scratch.items()}
        self._constant = constant_of(machine, Y, weight)
        self._room: tuple[Array, Array] | None = None
        # The order of an epoch, the place of a batch in it, and the rows of X that it names there.
        self._order, self._place, self._at = np.empty(len(Y), np.int64), np.zeros(1, np.int64), np.empty(0, np.int64)
        self._total = np.zeros(1)  # the sum of an epoch's losses
        # The scalars of the next steps, and which of them is the next.
        self._scalars: Any = None
        self._step = np.zeros(1, np.int64)
        self._again: dict[int, KernelCalls] = {}  # the calls of a step, by the rows of its batch
        self._calls = machine.core.kernel_calls
        if not self._dense or weight is not None:
            self._calls = None  # NumPy has a part in every batch
        self._captured: dict[int, CapturedStep] = {}
        # A graph holds the weight of the l2 term, which differs from batch to batch where samples have weights.
        self._may_capture = not why_eager(self._net, opt) and (weight is None or not alpha) and scale is None
        if scale is not None:
            self._squares = machine.backend.zeros(SQUARE_SUM_SIZE, np.float64)
            self._control = machine.backend.zeros(2, machine.net.compute_dtype)
            self._write_scale(scale)

    def make(self, order: np.ndarray, batches: Sequence[slice]) -> float:
        """Make an epoch; returns the sum of the batches' losses, as scikit-learn counts them, times their samples.

        order: the rows of X, in the order of the epoch
        batches: the parts of ``order``; one whose weights are all 0 is left out
        """
        if self._weight is None:
            masses = [float(part.stop - part.start) for part in batches]
        else:
            masses = [float(self._weight[order[part]].sum(dtype=np.float64)) for part in batches]
        parts = [(part, mass) for part, mass in zip(batches, masses, strict=True) if mass > 0]
        constant = 0.0
        if self._constant is not None:
            constant = sum((part.stop - part.start) / mass * self._constant[order[part]].sum() for part, mass in parts)
        if self._room is None:
            rows = max(part.stop - part.start for part in batches)
            shape = rows, self._net.inputs
            self._at = np.empty(rows, np.int64)
            self._room = (
                self._machine.backend.empty(shape, self._net.dtype),
                self._machine.backend.empty((rows, *self._Y.shape[1:]), self._Y.dtype),
            )
        make = self._on_device if self._machine.own_steps else self._on_host
        # The parameters are looked at after every epoch, by its loss.
        with self._machine.backend.own_stream(), self._core.training, unchecked(self._opt), quiet():
            return constant + make(order, parts, *self._room)

    def _on_host(self, order: np.ndarray, parts: Sequence[tuple[slice, float]], x: Array, y: Array) -> float:
        self._order[: len(order)] = order
        self._total.fill(0)
        for start in range(0, len(parts), AHEAD):
            some = parts[start : start + AHEAD]
            if self._calls is not None:
                self._look_ahead(len(some))
            for rows, of_size in itertools.groupby(some, lambda part: part[0].stop - part[0].start):
                same = list(of_size)
                if self._calls is not None:
                    del same[: self._make_at_once(same, x[:rows], y[:rows], self._calls)]
                for part, mass in same:
                    at = self._at[:rows]
                    at[:] = self._order[part]
                    loss = self._gradients(at, x[:rows], y[:rows], mass)
                    self._total += self._machine.reported * rows * loss.item()
                    self._opt.step()
        self._core.count_steps(len(parts))
        return self._total.item()

    def _look_ahead(self, steps: int) -> None:
        """Compute the optimizer's scalars for the next steps."""
        follow_pass(self._opt)
        scalars, _ = scalars_ahead(self._opt, self._opt.t, steps, steps)
        if self._scalars is None:
            self._scalars = np.zeros((AHEAD, *scalars.shape[1:]), scalars.dtype)
        self._scalars[:steps] = scalars
        self._step.fill(0)

    def _make_at_once(self, parts: Sequence[tuple[slice, float]], x: Array, y: Array, calls: int) -> int:
        """Make steps on parts of the size of x that follow one another in the order; returns how many.

        The first of that size is recorded, and all others are one call. Where something in it could not be recorded, as
        where NumPy runs the activation, there is no other. ``calls``: how many kernels forward and backward call.
        """
        opt, library, rows, made = self._opt, self._core.ops.library, len(x), 0
        first, mass = parts[0]
        self._place.fill(first.start)
        if rows not in self._again:
            with recorded(library) as recording:
                library.next_rows(self._order, self._place, self._at[:rows])
                loss = self._gradients(self._at[:rows], x, y, mass)
                library.add_to(loss, self._machine.reported * rows, self._total)
                updated = update_ahead(opt, self._scalars, self._step)
            if updated:
                count_steps(opt, 1)
            else:
                opt.step()
            # Beside those of the network: the rows, X and Y of the batch, the sum of losses, the update; two for l2.
            if not (updated and recording.complete(calls + 5 + 2 * (self._alpha > 0))):
                self._calls = None
                return 1
            self._again[rows], made = recording, 1
        for steps in self._again[rows].runs(len(parts) - made):
            count_steps(opt, steps)
        return len(parts)

    def _gradients(self, at: np.ndarray, x: Array, y: Array, mass: float) -> np.ndarray:
        """Compute on a CPU the gradients of the rows ``at``, gathered in x and y, and of the l2 term factor/2 Σ W².

        Returns the array that has the loss without that term.
        """
        core, parameters = self._core, self._net.parameters
        if self._dense:
            core.ops.gather(self._X, at, x, 1.0, 0.0)
        else:
            self._X[at].toarray(out=x)
        core.ops.gather(self._Y, at, y, 1.0, 0.0)
        run = core.forward(x, y, None if self._given is None else core.weights(y, self._given[at]))
        core.backward(run, x)
        if self._alpha:
            factor = self._alpha / mass
            core.ops.l2_gradient(parameters.flat, self._spans, factor, parameters.grads.flat, self._scratch)
            core.ops.l2_loss(parameters.flat, self._spans, len(x) * factor / 2, self._total, self._scratch)
        found: np.ndarray = run.loss.work["loss"]
        return found

    def _on_device(self, order: np.ndarray, parts: Sequence[tuple[slice, float]], x: Array, y: Array) -> float:
        core, backend, alpha = self._core, self._machine.backend, self._alpha
        reported, factor = self._machine.reported, self._machine.factor
        with backend.scope():
            total = backend.zeros(1, np.float64)
            on_device = backend.asarray(order)
            for part, mass in parts:
                rows, at = part.stop - part.start, on_device[part]
                x_batch, y_batch = x[:rows], y[:rows]
                x_batch[...] = self._X[at] if self._dense else self._machine.rows(self._X[order[part]])
                y_batch[...] = self._Y[at]
                weight = None if self._given is None else self._given[at]
                core.l2 = alpha / mass / factor
                if reported != factor:
                    total += (1 - reported / factor) * rows * self._penalty(mass)
                loss = self._captured_step(x_batch, y_batch, rows) if self._may_capture and weight is None else None
                if loss is None:
                    if self._scale is not None:
                        core.remember()
                    loss = self._net.step_loss(x_batch, y_batch, weight)
                    if self._scale is None:
                        self._opt.step()
                    else:
                        self._step_scaled(self._scale)
                total += reported * rows * loss
            return float(total.item())

    def _step_scaled(self, scale: LossScale) -> None:
        """Take a step on a gradient that is scaled; one that overflowed is left out and halves the scale."""
        grads = self._net.parameters.grads.flat
        self._squares[:2] = 0
        self._core.ops.square_sum(grads, self._squares)
        before, wrong = scale.value, int(self._squares[1].item())
        if wrong and scale.overflow():
            self._core.recall()
        else:  # at a scale of 1 it is not to blame: the fit ends with what the step makes of the parameters
            self._control[0] = 1 / before
            self._opt.step(control=self._control)
            scale.good()
        if scale.value != before:
            self._write_scale(scale)

    def _write_scale(self, scale: LossScale) -> None:
        with self._machine.backend.scope():
            self._core.loss_scale.fill(scale.value * self._machine.factor)

    def _captured_step(self, x: Array, y: Array, rows: int) -> Array:
        if rows not in self._captured:
            self._captured[rows] = CapturedStep(self._net, self._opt, x, y)
        return self._captured[rows]()

    def _penalty(self, mass: float) -> Array:
        """The l2 term of a batch, of the network's own steps."""
        weights = (W.astype(self._net.compute_dtype, copy=False) for W in self._weights)
        return 0.5 * self._alpha / mass * sum(W @ W for W in weights)


def constant_of(machine: Machine, Y: np.ndarray, weight: np.ndarray | None) -> np.ndarray | None:
    """What scikit-learn's loss of each sample has beside gpubatch's, times its weight; None for nothing."""
    if machine.about.output != "exp":
        return None
    deviance: np.ndarray = (xlogy(Y, Y) - Y).sum(axis=1, dtype=np.float64)
    return deviance if weight is None else deviance * weight


def minimise(
    machine: Machine,
    X: Any,
    Y: np.ndarray,
    weight: np.ndarray | None,
    alpha: float,
    options: dict[str, Any],
) -> tuple[Any, float]:
    """Minimise the loss over all samples by SciPy's L-BFGS-B; returns its result, and the loss for ``loss_``.

    ``options`` are SciPy's; the other arguments are those of :class:`OrderedEpochs`.
    """
    net, core, backend = machine.net, machine.core, machine.backend
    flat, grads = net.parameters.flat, net.parameters.grads.flat
    mass = float(len(Y) if weight is None else weight.sum(dtype=np.float64))
    core.l2 = 0.0
    given = None if weight is None else backend.asarray((weight / (mass / len(Y))).astype(net.compute_dtype))
    y, spans = backend.asarray(Y), [slice(*net.parameters.spans[name]) for name in machine.weight_names]
    parts = [(part, machine.rows(X[part])) for part in evenly(len(Y), AT_ONCE)]

    def mean_and_gradient(theta: np.ndarray) -> tuple[float, np.ndarray]:
        flat[...] = backend.asarray(theta, flat.dtype)
        gradient, mean = np.zeros(theta.size), 0.0
        for part, x in parts:
            run = core.forward(x, y[part], None if given is None else given[part])
            share = len(x) / len(Y)
            mean += share * run.loss.work["loss"].item()
            core.backward(run, x)
            gradient += share * backend.to_numpy(grads)
        return mean, gradient

    def penalty(theta: np.ndarray) -> float:
        return float(0.5 * alpha / mass * sum(theta[span] @ theta[span] for span in spans))

    def objective(theta: np.ndarray) -> tuple[float, np.ndarray]:
        mean, gradient = mean_and_gradient(theta)
        for span in spans:
            gradient[span] += alpha / mass * theta[span]
        return machine.factor * mean + penalty(theta), gradient

    with backend.own_stream(), backend.scope(), core.training, quiet():
        found = scipy.optimize.minimize(
            objective, backend.to_numpy(flat).astype(np.float64), method="L-BFGS-B", jac=True, options=options
        )
        flat[...] = backend.asarray(found.x, flat.dtype)
    of_weights = penalty(found.x)
    constant = constant_of(machine, Y, weight)
    mean = (found.fun - of_weights) * machine.reported / machine.factor + of_weights
    return found, mean + (0.0 if constant is None else constant.sum() / mass)
