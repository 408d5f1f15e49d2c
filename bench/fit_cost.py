"""Measure what ``fit`` itself costs a step: ``python bench/fit_cost.py [--tree DIR] [--out FILE]``.

A tiny network, 8-8-3 in batches of 4, makes whole epochs by ``fit`` and by the same loop written by hand: an iteration
of the loader, ``loss_and_grad`` and ``opt.step``. The cost is the difference in CPU time for a step, in microseconds,
with one thread. Both take turns in one process; the result is the median over the rounds of all processes. The settings
are arguments of ``fit`` and callbacks, so that the price of each is seen beside that of none.

With ``--tree DIR``, another checkout of gpubatch with its compiled kernels, processes of both trees take turns: what a
step costs without a feature must not grow when the feature is added. In bench/results/2026-11-29-cpu-fit-cost.json
"there" is the tree before there were callbacks to import.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from first_run import processor, record

import gpubatch as gb

ROOT = Path(__file__).parent.parent
EPOCHS, BATCH, SAMPLES = 2, 4, 8192

# The arguments of fit, made anew for each run.
SETTINGS: dict[str, Callable[[], dict[str, Any]]] = {
    "nothing": dict,
    "progress in lines": lambda: {"progress": True},
    "max_norm": lambda: {"max_norm": 1e3},
    "a callback after epochs": lambda: {"callbacks": [lambda state: None]},
}
# The same of callbacks, which a tree to compare with may not have.
CALLBACKS: dict[str, Callable[[], Any]] = {
    "EarlyStopping": lambda: gb.EarlyStopping(monitor="loss"),
    "ReduceOnPlateau": lambda: gb.ReduceOnPlateau(monitor="loss"),
    "ClipByValue": lambda: gb.ClipByValue(1.0),
    "GradientNoise": lambda: gb.GradientNoise(1e-6),
    "WeightAverage": lambda: gb.WeightAverage(0.99),
}


def settings() -> dict[str, Callable[[], dict[str, Any]]]:
    """All settings that this gpubatch has."""
    there = {name: make for name, make in CALLBACKS.items() if hasattr(gb, name)}
    return SETTINGS | {name: (lambda make=make: {"callbacks": [make()]}) for name, make in there.items()}


def parts(rng: np.random.Generator) -> tuple[gb.Network, gb.Loader, gb.Optimizer]:
    """A network whose step is next to no work."""
    X, Y = rng.standard_normal((SAMPLES, 8)).astype(np.float32), rng.integers(0, 3, SAMPLES)
    net = gb.mlp([8, 8, 3], backend="cpu")
    return net, gb.Loader(X, Y, batch_size=BATCH, backend="cpu"), gb.SGD(net.parameters, lr=0.01)


def by_fit(setting: str) -> float:
    """Microseconds of CPU time for a step of ``fit``."""
    net, loader, opt = parts(np.random.default_rng(0))
    arguments = {"progress": False, **settings()[setting]()}
    with contextlib.redirect_stderr(io.StringIO()):
        began = time.process_time()
        gb.fit(net, loader, opt, EPOCHS, **arguments)
    return 1e6 * (time.process_time() - began) / opt.t


def by_hand() -> float:
    """The same of the loop written by hand."""
    net, loader, opt = parts(np.random.default_rng(0))
    began = time.process_time()
    for _ in range(EPOCHS):
        for x, y in loader:
            net.loss_and_grad(x, y)
            opt.step()
    return 1e6 * (time.process_time() - began) / opt.t


def measure(rounds: int) -> dict[str, list[float]]:
    """Microseconds of a step, by setting, one for each round; by hand under ""."""
    found: dict[str, list[float]] = {name: [] for name in ("", *settings())}
    for number in range(rounds + 1):
        for name, of in found.items():
            microseconds = by_fit(name) if name else by_hand()
            if number:  # the first round warms up
                of.append(microseconds)
    return found


def costs(found: dict[str, list[float]]) -> dict[str, float]:
    """The median of what each setting costs above the loop by hand."""
    return {
        name: statistics.median(a - b for a, b in zip(of, found[""], strict=True)) for name, of in found.items() if name
    }


def child(tree: Path, rounds: int) -> dict[str, list[float]]:
    """:func:`measure` in a process of its own, with the gpubatch in ``tree``."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--one", "--rounds", str(rounds)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    found: dict[str, list[float]] = json.loads(done.stdout)
    return found


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="rounds of each process")
    parser.add_argument("--processes", type=int, default=3, help="processes for each tree")
    parser.add_argument("--tree", type=Path, help="another checkout to compare with")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(measure(given.rounds)))
        return
    trees = {"here": ROOT} | ({} if given.tree is None else {"there": given.tree.resolve()})
    found: dict[str, dict[str, list[float]]] = {tree: {} for tree in trees}
    for _ in range(given.processes):
        for tree, place in trees.items():
            for name, of in child(place, given.rounds).items():
                found[tree].setdefault(name, []).extend(of)
    results = {
        "date": date.today().isoformat(),
        "machine": f"{processor()}, one thread, Python {platform.python_version()}, NumPy {np.__version__}",
        "step by hand, µs": {tree: statistics.median(of[""]) for tree, of in found.items()},
        "cost of fit, µs a step": {tree: costs(of) for tree, of in found.items()},
    }
    record(results, given.out)


if __name__ == "__main__":
    main()
