"""Strategies of learning side by side, as CS231n compares them: two searches, and gradient descent."""

from __future__ import annotations

import time
from dataclasses import dataclass

from gpubatch import explore
from gpubatch.cli.data import Task
from gpubatch.cli.options import BatchOptions, RunOptions
from gpubatch.errors import NonFiniteError, check_int
from gpubatch.optim import SGD
from gpubatch.shown import Shown


@dataclass(repr=False)
class StrategyResult(Shown):
    """The result of a strategy: loss and accuracy on the training set, accuracy on the test set, and the time.

    ``history`` has the best loss after each trial of a search, or the mean cost of each epoch.
    """

    name: str
    loss: float
    accuracy: float | None
    test_accuracy: float | None
    seconds: float
    history: tuple[float, ...]


def compare_strategies(
    task: Task,
    trials: int,
    scale: float,
    lr: float,
    run: RunOptions,
    batches: BatchOptions,
    show: explore.Progress,
) -> list[StrategyResult]:
    """Random search, random local search and gradient descent on the same data.

    trials: the parameters that each search tries; local search begins at those of the network, as gradient descent does
    scale: the standard deviation of what the searches draw
    lr: the learning rate of gradient descent
    run: the epochs of gradient descent, and what ends it early
    batches: its batches
    show: is called with what is done and how much there is in all
    """
    net, X, Y, test, weight = task.net, task.X, task.Y, task.test, task.weight
    epochs = check_int("--epochs", run.epochs, 1)
    searches = {"random search": explore.random_search, "local search": explore.random_local_search}
    total, state = 2 * trials + epochs, net.state_dict()
    results = []
    for k, (name, search) in enumerate(searches.items()):

        def show_search(done: int, _: int, before: int = k * trials) -> None:
            show(before + done, total)

        began = time.perf_counter()
        best = search(net, X, Y, trials, scale, task.seed, show_search, weight)
        seconds = time.perf_counter() - began
        accuracy = net.evaluate(*test)[1]
        results.append(StrategyResult(name, best.loss, best.accuracy, accuracy, seconds, best.history))
        net.load_state_dict(state)
    held_out = test if run.callbacks() else None
    start = explore.TrialStart(net, state, X, Y, weight, epochs, task.seed, held_out, run.callbacks)
    found = start.train(SGD, lr, batches.number())
    if found.loss is None:
        raise NonFiniteError(f"gradient descent diverged with lr={lr:g}: take a lower one")
    costs, seconds = tuple(found.history.loss), sum(found.seconds)
    accuracy = net.evaluate(*test)[1]
    results.append(StrategyResult("gradient descent", found.loss, found.accuracy, accuracy, seconds, costs))
    show(total, total)
    return results
