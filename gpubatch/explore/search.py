"""Search for better parameters without a gradient."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from gpubatch.backend import Array
from gpubatch.errors import NonFiniteError, check_int, check_real
from gpubatch.explore.shared import Progress, check_net, counted, loss_or_inf
from gpubatch.nn import Network
from gpubatch.shown import Shown


@dataclass(frozen=True, repr=False)
class SearchResult(Shown):
    """The loss and accuracy of the best parameters, which the network now holds, and the best loss after each trial.

    ``accuracy`` is None if the loss has no classes.
    """

    loss: float
    accuracy: float | None
    history: tuple[float, ...]


def random_search(
    net: Network,
    X: Array,
    Y: Array,
    trials: int = 1000,
    scale: float = 0.01,
    seed: int = 0,
    progress: Progress | None = None,
    weight: Array | None = None,
) -> SearchResult:
    """Draw parameters from N(0, scale²) again and again, and load the best into ``net`` (CS231n, "Strategy #1").

    net: the network
    X: samples
    Y: targets
    trials: how many parameters to draw
    scale: the standard deviation
    seed: of the draws; the same seed draws the same parameters on every backend
    progress: is called with the number of trials done and the number of all
    weight: what each sample counts in loss and accuracy

    The loss is that of :meth:`Network.loss`, in evaluation.

    >>> net = gb.mlp([3, 2], seed=0)
    >>> X, Y = np.eye(3, dtype=np.float32), np.array([0, 1, 1])
    >>> before = net.loss(X, Y)
    >>> found = gb.random_search(net, X, Y, 20)
    >>> net.loss(X, Y) < before
    True
    """
    return _search(net, X, Y, trials, scale, seed, False, progress, weight)


def random_local_search(
    net: Network,
    X: Array,
    Y: Array,
    trials: int = 1000,
    scale: float = 0.01,
    seed: int = 0,
    progress: Progress | None = None,
    weight: Array | None = None,
) -> SearchResult:
    """Start from the parameters of ``net``, and take a step drawn from N(0, scale²) if it lowers the loss.

    The arguments are those of :func:`random_search`; ``trials`` is how many steps are tried. The best parameters are in
    ``net`` at the end (CS231n, "Strategy #2").

    >>> net = gb.mlp([3, 2], seed=0)
    >>> X, Y = np.eye(3, dtype=np.float32), np.array([0, 1, 1])
    >>> before = net.loss(X, Y)
    >>> found = gb.random_local_search(net, X, Y, 20)
    >>> net.loss(X, Y) < before
    True
    """
    return _search(net, X, Y, trials, scale, seed, True, progress, weight)


def _search(
    net: Network,
    X: Array,
    Y: Array,
    trials: int,
    scale: float,
    seed: int,
    local: bool,
    progress: Progress | None,
    weight: Array | None,
) -> SearchResult:
    check_net(net)
    trials, scale = check_int("trials", trials, 1), check_real("scale", scale, 0, open_low=True)
    draw = np.random.default_rng(check_int("seed", seed, 0))
    flat, backend = net.parameters.flat, net.backend
    start = net.loss(X, Y, weight=weight)  # checks X and Y before anything is changed
    best, history = start if local else math.inf, []
    with backend.scope(), np.errstate(over="ignore"):
        best_flat = flat.copy()
        try:
            for _ in counted(range(trials), progress):
                candidate = backend.asarray(draw.standard_normal(flat.size) * scale, net.dtype)
                flat[...] = best_flat + candidate if local else candidate
                loss = loss_or_inf(net, X, Y, weight=weight)
                if loss < best:
                    best = loss
                    best_flat[...] = flat
                history.append(best)
        finally:
            flat[...] = best_flat
    if not math.isfinite(best):
        raise NonFiniteError(f"no trial of {trials} had a finite loss with scale={scale:g}: take a smaller one")
    loss, accuracy = net.evaluate(X, Y, weight=weight)
    return SearchResult(loss, accuracy, tuple(history))
