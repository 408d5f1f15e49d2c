"""Fits of gpubatch's MLPClassifier and of scikit-learn's: ``python bench/scikit_learn.py [--out FILE]``.

The same arguments: one hidden layer of 100, Adam, a fixed number of epochs. All contenders fit in turn, in one
process; the table has the medians over the rounds. A first fit of each is not counted. With ``--threads 1`` the seconds
are those of the processor, which other processes disturb less.

"products" makes the matrix products of these steps and nothing else, by the same BLAS: so many times as fast as
scikit-learn a fit would be that takes no time beside them. No fit that makes them can be faster.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from peers import available_cores, conditions

from gpubatch.ops.blas import multiply

BATCHES = (32, 64, 128, 200, 256)
HIDDEN, CLASSES = 100, 10  # the default of both estimators, and the classes of both sets
SCIKIT_LEARN, OURS, FLOAT32 = "scikit-learn", "gpubatch", "gpubatch, float32"
BOUND, BOUND32 = "products", "products, float32"
EPOCHS = {"digits": 40, "20,000 x 100": 4}


def data(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Samples of float64 and their labels."""
    from sklearn.datasets import load_digits

    if name == "digits":
        X, y = load_digits(return_X_y=True)
        return X, y
    random = np.random.default_rng(0)
    X = random.standard_normal((20_000, 100))
    return X, (X @ random.standard_normal((100, 10))).argmax(axis=1)


def contenders(name: str, batch: int) -> dict[str, Callable[[], Any]]:
    """What fits, by name."""
    from sklearn.neural_network import MLPClassifier as Theirs

    from gpubatch.sklearn import MLPClassifier as Ours

    X, y = data(name)
    common: dict[str, Any] = {"batch_size": batch, "max_iter": EPOCHS[name], "tol": 0.0, "random_state": 0}
    common["n_iter_no_change"] = EPOCHS[name]
    return {
        SCIKIT_LEARN: lambda: Theirs(**common).fit(X, y),
        OURS: lambda: Ours(**common).fit(X, y),
        FLOAT32: lambda: Ours(**common, dtype="float32").fit(X, y),
        BOUND: products(len(X), X.shape[1], batch, EPOCHS[name], "float64"),
        BOUND32: products(len(X), X.shape[1], batch, EPOCHS[name], "float32"),
    }


def products(samples: int, features: int, batch: int, epochs: int, dtype: str) -> Callable[[], None]:
    """What makes the matrix products of a fit, in its order: two forward and three backward in each step."""
    random = np.random.default_rng(0)

    def array(rows: int, columns: int) -> np.ndarray:
        return random.standard_normal((rows, columns)).astype(dtype)

    x, h, dh, z = (array(batch, columns) for columns in (features, HIDDEN, HIDDEN, CLASSES))
    W1, dW1, W2, dW2 = (array(*of) for of in [(features, HIDDEN)] * 2 + [(HIDDEN, CLASSES)] * 2)

    def all_products() -> None:
        for start in list(range(0, samples, batch)) * epochs:
            rows = slice(min(batch, samples - start))
            multiply(x[rows], W1, h[rows])
            multiply(h[rows], W2, z[rows])
            multiply(h[rows].T, z[rows], dW2)
            multiply(z[rows], W2.T, dh[rows])
            multiply(x[rows].T, dh[rows], dW1)

    return all_products


def compare(name: str, batch: int, rounds: int, clock: Callable[[], float]) -> dict[str, Any]:
    """Milliseconds of an epoch, how many times as fast as scikit-learn, and the accuracies on the training set."""
    fits, (X, y) = contenders(name, batch), data(name)
    fitted = {kind: fit() for kind, fit in fits.items()}
    del fitted[BOUND], fitted[BOUND32]
    for own, reference in zip(fitted[OURS].coefs_, fitted[SCIKIT_LEARN].coefs_, strict=True):
        np.testing.assert_allclose(own, reference, rtol=1e-6, atol=1e-9)
    accuracy = {kind: float(estimator.score(X, y)) for kind, estimator in fitted.items()}
    seconds: dict[str, list[float]] = {kind: [] for kind in fits}
    for _ in range(rounds):
        for kind, fit in fits.items():
            start = clock()
            fit()
            seconds[kind].append(clock() - start)
    ratios = {
        kind: statistics.median(a / b for a, b in zip(seconds[SCIKIT_LEARN], of_kind, strict=True))
        for kind, of_kind in seconds.items()
    }
    epoch = {kind: 1000 * statistics.median(of_kind) / EPOCHS[name] for kind, of_kind in seconds.items()}
    return {
        "set": name,
        "batch": batch,
        "milliseconds": {kind: round(value, 3) for kind, value in epoch.items()},
        "times_as_fast": {kind: round(value, 2) for kind, value in ratios.items() if kind != SCIKIT_LEARN},
        "accuracy": {kind: round(value, 4) for kind, value in accuracy.items()},
    }


def table(found: dict[str, Any]) -> str:
    """The results in Markdown."""
    names = [SCIKIT_LEARN, OURS, BOUND, FLOAT32, BOUND32]
    heads = [f"{name}, ms an epoch" for name in names] + [f"{name}, times as fast" for name in names[1:]]
    lines = [f"| set | batch | {' | '.join(heads)} |", "|---|---|" + "---|" * len(heads)]
    for row in found["rows"]:
        cells = [row["set"], str(row["batch"]), *(f"{row['milliseconds'][name]:.2f}" for name in names)]
        cells += [f"{row['times_as_fast'][name]:.2f}" for name in names[1:]]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Time all sets and batch sizes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="number of rounds")
    parser.add_argument("--threads", type=int, help="threads of all contenders, by default as many as they take")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    arguments = parser.parse_args()
    if arguments.threads:  # before the libraries are loaded for the fits
        from threadpoolctl import threadpool_limits

        os.environ["GPUBATCH_THREADS"] = str(arguments.threads)
        threadpool_limits(arguments.threads)
    warnings.simplefilter("ignore")
    clock = time.process_time if arguments.threads == 1 else time.perf_counter
    measure = functools.partial(compare, rounds=arguments.rounds, clock=clock)
    found = {
        **conditions(arguments.threads or available_cores(), arguments.rounds),
        "seconds": "of the processor" if arguments.threads == 1 else "of the clock",
        "rows": [measure(name, batch) for name in EPOCHS for batch in BATCHES],
    }
    print(table(found))
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
