"""Strategies of learning side by side, as CS231n compares them: two searches, and gradient descent."""

from __future__ import annotations

import time
from dataclasses import dataclass

from gpubatch import explore
from gpubatch.cli.data import Task
from gpubatch.cli.options import BatchOptions, RunOptions
from gpubatch.errors import NonFiniteError, check_int
from gpubatch.loader import epochs_of
from gpubatch.nn import core_of
from gpubatch.optim import SGD
from gpubatch.shown import Shown
from gpubatch.train import fit, short_runs


@dataclass(repr=False)
class StrategyResult(Shown):
    """What a strategy reached: loss and accuracy on the training set, accuracy on the test set, and in what time.

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
        found = search(net, X, Y, trials, scale, task.seed, show_search, weight)
        seconds = time.perf_counter() - began
        accuracy = net.evaluate(*test)[1]
        results.append(StrategyResult(name, found.loss, found.accuracy, accuracy, seconds, found.history))
        net.load_state_dict(state)
    loader, callbacks = task.loader(batches), run.callbacks()
    core_of(net).rehearse(*epochs_of(loader).peek())  # allocates and compiles before any time is taken
    net.load_state_dict(state)
    try:
        with short_runs():
            held_out = test if callbacks else None
            history = fit(
                net, loader, SGD(net.parameters, lr), epochs, held_out, callbacks, progress=False, max_skipped=0
            )
        (loss, accuracy), (_, test_accuracy) = net.evaluate(X, Y, weight=weight), net.evaluate(*test)
    except NonFiniteError:
        raise NonFiniteError(f"gradient descent diverged with lr={lr:g}: take a lower one") from None
    costs, seconds = tuple(history.loss), sum(history.seconds)
    results.append(StrategyResult("gradient descent", loss, accuracy, test_accuracy, seconds, costs))
    show(total, total)
    return results
