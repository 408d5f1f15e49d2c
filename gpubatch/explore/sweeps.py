"""Sweeps of the step size, the batch size and the optimizer: training runs from one start."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from gpubatch.averages import ewma
from gpubatch.backend import Array
from gpubatch.errors import ArgumentError, NonFiniteError, check_int, check_real
from gpubatch.explore.shared import Progress, check_net, counted, kept_as_it_is, loss_or_inf, positive_grid, report
from gpubatch.loader import Loader, epochs_of
from gpubatch.nn import Network, core_of
from gpubatch.optim import SGD, Adam, Momentum, Optimizer, RMSProp, unchecked
from gpubatch.params import Parameters
from gpubatch.shown import Shown
from gpubatch.train import History, StopTraining, TrainingState, fit, loader_for, short_runs

SIGNIFICANT = 4.0  # standard deviations by which a cost must fall; the lowest of 200 averages of noise is below 3
MakeOptimizer: TypeAlias = Callable[[Parameters, float], Optimizer]


@dataclass(frozen=True, repr=False)
class StepSizeSweep(Shown):
    """The loss before a step, ``start``, and after one step of each size, infinity if it overflows.

    ``best`` is the step size with the lowest loss, None if every step raises it; ``reason`` says so in words.
    """

    step_sizes: tuple[float, ...]
    losses: tuple[float, ...]
    start: float
    best: float | None
    reason: str


def step_size_sweep(
    net: Network, X: Array, Y: Array, step_sizes: Any = None, weight: Array | None = None
) -> StepSizeSweep:
    """The loss after one step of gradient descent, W - s dW, for each step size s, by default 1e-10, 1e-9, ..., 1e-1.

    Loss and gradient are those of a training step on the batch X, Y, all with the same dropout mask. ``weight`` is what
    each sample counts in them.

    >>> net = gb.mlp([3, 4, 2], seed=0)
    >>> X, Y = np.eye(3, dtype=np.float32), np.array([0, 1, 1])
    >>> gb.step_size_sweep(net, X, Y, [1e-3, 1e-1]).best
    0.1
    """
    check_net(net)
    sizes = positive_grid("step_sizes", [float(f"1e{k}") for k in range(-10, 0)] if step_sizes is None else step_sizes)
    found = []
    with kept_as_it_is(net) as state, net.backend.scope():
        w = net.parameters.flat.copy()
        start, grads = net.loss_and_grad(X, Y, weight=weight)
        descent = grads.flat.copy()
        net.load_state_dict(state)  # the same dropout mask for the losses as for the gradient
        for size in sizes:
            net.parameters.flat[...] = w - size * descent
            found.append(loss_or_inf(net, X, Y, training=True, weight=weight))
    lowest = min(found)
    if not lowest < start:
        return StepSizeSweep(sizes, tuple(found), start, None, f"every step raises the loss, which is {start:.4g}")
    best = sizes[found.index(lowest)]
    reason = f"one step of {best:g} lowers the loss most, from {start:.4g} to {lowest:.4g}"
    if (above := [(s, loss) for s, loss in zip(sizes, found, strict=True) if s > best]) and above[0][1] > start:
        reason += f"; one of {above[0][0]:g} raises it to {above[0][1]:.4g}"
    return StepSizeSweep(sizes, tuple(found), start, best, reason)


@dataclass(frozen=True, repr=False)
class RangeTest(Shown):
    """A run with a rising learning rate: the cost at each rate, raw and smoothed.

    ``suggestion`` is a learning rate to train with, None if the cost fell by no more than noise; ``reason`` says why.
    """

    rates: tuple[float, ...]
    losses: tuple[float, ...]
    smoothed: tuple[float, ...]
    suggestion: float | None
    reason: str


def learning_rate_range_test(
    net: Network,
    X: Array,
    Y: Array,
    optimizer: MakeOptimizer = SGD,
    low: float = 1e-5,
    high: float = 10.0,
    steps: int = 200,
    batch_size: int = 128,
    beta: float = 0.9,
    seed: int = 0,
    progress: Progress | None = None,
    weight: Array | None = None,
) -> RangeTest:
    """Train while the learning rate rises exponentially (Smith 2017, arXiv:1506.01186).

    net: the network
    X: samples
    Y: targets
    optimizer: a function of parameters and learning rate that makes the optimizer
    low: the first learning rate
    high: the last one
    steps: how many steps to make
    batch_size: samples in a batch
    beta: of the moving average that smooths the cost
    seed: of the order of the samples
    progress: is called with the number of steps done and the number of all
    weight: what each sample counts in the loss

    The run ends early if the smoothed cost exceeds four times its minimum. The suggestion is a tenth of the rate at
    which the smoothed cost is lowest. There is none if the cost falls by less than four times the standard deviation
    that the batches give its average, as with a network that is trained already.
    """
    check_net(net)
    low = check_real("low", low, 0, open_low=True)
    high = check_real("high", high, low, open_low=True)
    steps, beta = check_int("steps", steps, 2), check_real("beta", beta, 0, 1, open_high=True)
    net.loss(X, Y, weight=weight)
    loader = loader_for(net, X, Y, batch_size, seed, weight)
    planned = np.geomspace(low, high, steps).tolist()
    found: list[float] = []
    with kept_as_it_is(net):
        opt = optimizer(net.parameters, low)
        with contextlib.closing(_endless(loader)) as batches, unchecked(opt):  # to diverge is part of it
            for rate, (x, y, *weights) in zip(planned, batches, strict=False):
                report(progress, len(found), steps)
                try:
                    loss, grads = net.loss_and_grad(x, y, weight=weights[0] if weights else None)
                except NonFiniteError:
                    break
                found.append(loss)
                smoothed = ewma(found, beta)
                if smoothed[-1] > 4 * smoothed.min() and smoothed.min() > 0:
                    break
                opt.lr = rate
                opt.step(grads)
    report(progress, steps, steps)
    return _range_test(planned[: len(found)], found, beta, steps)


def _endless(loader: Loader) -> Generator[Any]:
    while True:
        yield from loader


def _range_test(rates: list[float], found: list[float], beta: float, steps: int) -> RangeTest:
    """The result of a run with the costs ``found`` at ``rates``; ``steps`` were planned."""
    smoothed = ewma(found, beta).tolist()
    window = min(round(1 / (1 - beta)), max(1, len(found) // 4))  # steps that the average spans; it needs as many
    start = math.fsum(found[:window]) / window
    lowest = smoothed.index(min(smoothed[window - 1 :]), window - 1)
    # Between neighbours the cost differs by the noise of two batches, and hardly by the training.
    changes = np.diff(found[: max(lowest + 1, 2 * window)])
    noise = math.sqrt(float((changes**2).mean()) / 2) if changes.size else math.inf
    # The variance of an average of t values with bias correction, and of the mean at the start, in those of one batch.
    past = beta ** (lowest + 1)
    noise *= math.sqrt((1 - beta) / (1 + beta) * (1 + past) / (1 - past) + 1 / window)
    fall = start - smoothed[lowest]
    suggestion = None
    end = "was given up" if len(rates) < steps else "ended"
    if fall > SIGNIFICANT * noise:
        suggestion = float(f"{rates[lowest] / 10:.2g}")
        words = (
            f"the smoothed cost is lowest, {smoothed[lowest]:.4g}, at {rates[lowest]:.2g}, and the run {end} at "
            f"{rates[-1]:.2g}; a tenth of the first leaves room, and the cost falls there"
        )
    elif len(found) < min(steps, 2 * window + 1):
        words = (
            f"the cost never falls below its start, {start:.4g}, and the run {end} at {rates[-1]:.2g}: take a lower "
            "range"
        )
    else:
        words = (
            f"the smoothed cost falls from {start:.4g} to {smoothed[lowest]:.4g} at the lowest, which may be the noise "
            f"between batches, ±{noise:.2g}: the network may be trained already; larger batches have less noise"
        )
    return RangeTest(tuple(rates), tuple(found), tuple(smoothed), suggestion, words)


# --- training runs side by side --------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class BatchSizeTrial(Shown):
    """A training run with one batch size; the times are the median epoch's, without the evaluation between epochs.

    batch_size: samples in a batch
    seconds_per_sample: None if not even one epoch was complete
    seconds_per_epoch: likewise
    memory: bytes of network and optimizer
    epochs_to_target: None if the loss was not reached
    seconds_to_target: likewise
    loss: the loss of the whole set at the end, None if the run diverged
    """

    batch_size: int
    seconds_per_sample: float | None
    seconds_per_epoch: float | None
    memory: int
    epochs_to_target: int | None
    seconds_to_target: float | None
    loss: float | None


def batch_size_sweep(
    net: Network,
    X: Array,
    Y: Array,
    sizes: Sequence[int] | None = None,
    target: float | None = None,
    optimizer: MakeOptimizer = Adam,
    lr: float | Callable[[int], float] = 1e-3,
    epochs: int = 5,
    seed: int = 0,
    progress: Progress | None = None,
    weight: Array | None = None,
    validation: Any = None,
    callbacks: Callable[[], Sequence[Any]] = list,
) -> list[BatchSizeTrial]:
    """Train from the same parameters with each batch size.

    net: the network
    X: samples
    Y: targets
    sizes: the batch sizes; by default the powers of two from 16 to 1024 and one size between each two, as far as there
        are samples
    target: the loss of the whole set at which a run ends; it is evaluated after every epoch
    optimizer: a function of parameters and learning rate that makes the optimizer
    lr: the learning rate, or a function of the batch size
    epochs: at most so many per run, and all of them without a target
    seed: of the order of the samples
    progress: is called with the number of runs done and the number of all
    weight: what each sample counts in the loss
    validation: what :func:`gpubatch.fit` validates every run on, for callbacks that look at it
    callbacks: a function that makes the callbacks of a run, such as ``lambda: [gb.EarlyStopping(3)]``

    >>> gb.batch_size_sweep(lambda: gb.mlp([784, 64, 10]), X, Y, [32, 256])  # doctest: +SKIP
    """
    check_net(net)
    default = [n for power in range(4, 11) for n in (1 << power, 3 << (power - 1)) if n <= min(1024, len(X))]
    sizes = [check_int("sizes", n, 1, len(X)) for n in (default if sizes is None else sizes)]
    if not sizes:
        raise ArgumentError(f"sizes must hold at least one batch size, got {sizes}")
    if target is not None:
        target = check_real("target", target, 0, open_low=True)
    epochs = check_int("epochs", epochs, 1)
    net.loss(X, Y, weight=weight)
    trials = []
    with kept_as_it_is(net) as state:
        start = TrialStart(net, state, X, Y, weight, epochs, seed, validation, callbacks)
        for size in counted(sizes, progress):
            run = start.train(optimizer, lr(size) if callable(lr) else lr, size, target)
            per_epoch = float(np.median(run.seconds)) if run.seconds else None
            trials.append(
                BatchSizeTrial(
                    batch_size=size,
                    seconds_per_sample=None if per_epoch is None else per_epoch / len(X),
                    seconds_per_epoch=per_epoch,
                    memory=run.memory,
                    epochs_to_target=len(run.seconds) if run.reached else None,
                    seconds_to_target=sum(run.seconds) if run.reached else None,
                    loss=run.loss,
                )
            )
    return trials


@dataclass(frozen=True, repr=False)
class OptimizerTrial(Shown):
    """An optimizer at its own best learning rate: the loss of the whole set at the end, and how it fell.

    ``losses`` are those at each rate of the grid, infinity if the run diverged; ``at_edge`` tells that the best rate is
    the first or last of the grid, so that a better one may lie outside.
    """

    name: str
    best_lr: float
    loss: float
    accuracy: float | None
    at_edge: bool
    rates: tuple[float, ...]
    losses: tuple[float, ...]
    history: History


OPTIMIZERS: dict[str, MakeOptimizer] = {"sgd": SGD, "momentum": Momentum, "rmsprop": RMSProp, "adam": Adam}


def optimizer_sweep(
    net: Network,
    X: Array,
    Y: Array,
    optimizers: Mapping[str, MakeOptimizer] | None = None,
    rates: Any = None,
    epochs: int = 2,
    batch_size: int = 128,
    seed: int = 0,
    progress: Progress | None = None,
    weight: Array | None = None,
    validation: Any = None,
    callbacks: Callable[[], Sequence[Any]] = list,
) -> list[OptimizerTrial]:
    """Compare optimizers on equal terms: same start, same batches, and each at its own best rate of the same grid.

    net: the network
    X: samples
    Y: targets
    optimizers: names, and functions of parameters and learning rate that make the optimizers; by default SGD, momentum,
        RMSProp and Adam
    rates: the learning rates to try, by default 1e-4 to 10, two per decade
    epochs: the epochs of every run; the best rate has the lowest loss of the whole set after them
    batch_size: samples in a batch
    seed: of the order of the samples
    progress: is called with the number of runs done and the number of all
    weight: what each sample counts in the loss
    validation: what :func:`gpubatch.fit` validates every run on, for callbacks that look at it
    callbacks: a function that makes the callbacks of a run, such as ``lambda: [gb.EarlyStopping(3)]``
    """
    check_net(net)
    makers = dict(OPTIMIZERS if optimizers is None else optimizers)
    if not makers:
        raise ArgumentError("optimizers must hold at least one, got none")
    grid = positive_grid(
        "rates", [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0] if rates is None else rates
    )
    net.loss(X, Y, weight=weight)
    trials: list[OptimizerTrial] = []
    with kept_as_it_is(net) as state:
        start = TrialStart(net, state, X, Y, weight, epochs, seed, validation, callbacks)
        for name, make in makers.items():
            runs: list[TrialRun] = []
            for rate in grid:
                report(progress, len(trials) * len(grid) + len(runs), len(makers) * len(grid))
                runs.append(start.train(make, rate, batch_size))
            found = [math.inf if run.loss is None else run.loss for run in runs]
            best = found.index(min(found))
            if not math.isfinite(found[best]):
                raise NonFiniteError(f"{name} diverged at every rate from {min(grid):g} to {max(grid):g}")
            edge = grid[best] in (min(grid), max(grid))
            run = runs[best]
            trials.append(
                OptimizerTrial(name, grid[best], found[best], run.accuracy, edge, grid, tuple(found), run.history)
            )
    report(progress, len(makers) * len(grid), len(makers) * len(grid))
    return trials


class TrialRun(NamedTuple):
    """A training run: its loss and accuracy on the whole set at the end, None if it diverged."""

    history: History
    reached: bool
    loss: float | None
    accuracy: float | None
    memory: int

    @property
    def seconds(self) -> list[float]:
        """Of each epoch."""
        return self.history.seconds


@dataclass(frozen=True)
class TrialStart:
    """The common start of training runs: the state of the network, the samples, their order.

    validation: what a run is validated on, see :func:`batch_size_sweep`
    callbacks: a function that makes the callbacks of a run
    """

    net: Network
    state: Mapping[str, Any]
    X: Array
    Y: Array
    weight: Array | None
    epochs: int
    seed: int
    validation: Any
    callbacks: Callable[[], Sequence[Any]]

    def train(self, make: MakeOptimizer, lr: float, batch_size: int, target: float | None = None) -> TrialRun:
        """Train until the loss of the whole set is down to ``target``."""
        net, X, Y, weight = self.net, self.X, self.Y, self.weight
        net.load_state_dict(self.state)
        loader = loader_for(net, X, Y, batch_size, self.seed, weight)
        opt = make(net.parameters, lr)
        core_of(net).rehearse(*epochs_of(loader).peek())  # allocates and compiles before any time is taken
        history = History()
        reached = False

        def watch(training: TrainingState) -> None:
            nonlocal history, reached
            history = training.history
            if target is not None and net.loss(X, Y, weight=weight) <= target:
                reached = True
                raise StopTraining

        memory = net.memory(batch_size) + opt.memory()
        callbacks = [*self.callbacks(), watch]
        try:
            with short_runs():
                fit(net, loader, opt, self.epochs, self.validation, callbacks, progress=False, max_skipped=0)
            loss, accuracy = net.evaluate(X, Y, weight=weight)
        except NonFiniteError:
            return TrialRun(history, False, None, None, memory)
        return TrialRun(history, reached, loss, accuracy, memory)
