"""Measure formulas of a user's own beside gpubatch's on the CPU: ``python bench/own_rules.py [--out FILE]``.

Each pair does the same arithmetic, with one constant written otherwise: so the build does not have the user's, and it
is compiled on first use. The two take turns, on one thread by its CPU time and on all by the clock; ``ratio`` is the
median over the rounds of the built-in one's time divided by the other's: above 1 the user's is faster. Then the time of
the first step of a process, from making the optimizer, with an empty cache and with one that has the formula.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from first_run import processor, record

import gpubatch as gb
from gpubatch.formula import activations, scores
from gpubatch.ops import host_library, ops_for, own_form
from gpubatch.ops.host_compiler import place_of
from gpubatch.ops.update import HostUpdate

SIZES = (10_000, 1_000_000, 50_000_000)  # parameters
BATCH, FEATURES = 256, 1024  # of activations and losses
F = np.dtype(np.float32)


@gb.rule
def own_adam(w, g, m, v, t, *, lr=1e-3, beta1=0.9, beta2=0.999):
    """gpubatch's Adam, with eps as a constant."""
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * (g * g)
    return w - lr * (m / (1 - beta1**t)) / (np.sqrt(v / (1 - beta2**t)) + 1e-8), m, v


@gb.activation
def own_sigmoid(x):
    """gpubatch's sigmoid, with 1.0 for 1."""
    y = 1.0 / (1.0 + np.exp(-x))
    return y, y * (1.0 - y)


@gb.score_loss
def own_mse(z, y):
    """gpubatch's mean squared error, with 2.0 for 2."""
    d = z - y
    return d * d, 2.0 * d


def in_turn(contenders: dict[str, Callable[[], Any]], rounds: int, threads: int) -> dict[str, Any]:
    """Times in microseconds, medians; one round before the first warms up."""
    library, clock = host_library(), time.thread_time if threads == 1 else time.perf_counter
    library.set_threads(threads)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        for name, work in contenders.items():
            began = clock()
            work()
            if number:
                seconds[name].append(clock() - began)
    medians = {f"{name}_us": 1e6 * statistics.median(times) for name, times in seconds.items()}
    ratios = [built_in / own for built_in, own in zip(seconds["built_in"], seconds["own"], strict=True)]
    return {**medians, "ratio": statistics.median(ratios), "rounds": rounds}


def on_one_and_all_threads(contenders: dict[str, Callable[[], Any]], rounds: int) -> dict[str, Any]:
    """:func:`in_turn` on one thread, in CPU time, and on all, by the clock."""
    every = host_library().threads()
    found = {f"{threads} threads": in_turn(contenders, rounds, threads) for threads in sorted({1, every})}
    host_library().set_threads(every)
    return found


def repeated(work: Callable[[], Any], times: int) -> Callable[[], Any]:
    """``work`` so often that a clock can tell."""

    def call() -> None:
        for _ in range(times):
            work()

    return call


def update_rule(size: int, rounds: int) -> dict[str, Any]:
    """A step of Adam, built in, own, and by NumPy."""
    rng = np.random.default_rng(0)
    g = rng.standard_normal(size, F)
    weights = [np.ones(size, F) for _ in range(2)]
    built_in = gb.Adam([weights[0]], lr=1e-3)
    own = gb.Optimizer(own_adam, [weights[1]], lr=1e-3)
    assert (built_in.form, own.form.partition(" by ")[0]) == ("compiled", "compiled on first use"), own.form
    times = max(1, 200_000 // size)
    contenders = {
        "built_in": repeated(lambda: built_in.step([g]), times),
        "own": repeated(lambda: own.step([g]), times),
    }
    found = on_one_and_all_threads(contenders, rounds)
    np.testing.assert_array_equal(*weights)  # the same number of steps, and the same bits
    plain, arrays = HostUpdate(own_adam.trace(), F), (weights[0], g, np.zeros(size, F), np.zeros(size, F))
    began = time.thread_time()
    repeated(lambda: plain([arrays], [own_adam.trace().evaluate(1, lr=0.0, beta1=0.9, beta2=0.999)]), times)()
    return {"steps_per_round": times, **found, "numpy_us": 1e6 * (time.thread_time() - began)}


def elementwise(rounds: int) -> dict[str, Any]:
    """An activation and its gradient, and a loss with its gradient, on a batch of activations."""
    ops, rng = ops_for(gb.get_backend("cpu"), F), np.random.default_rng(0)
    x, dy = (rng.standard_normal((BATCH, FEATURES), F) for _ in range(2))
    bias, y, dx = rng.standard_normal(FEATURES, F), np.empty_like(x), np.empty_like(x)
    work = {"slope": np.empty_like(x), "dz": np.empty_like(x), "t": np.empty_like(x), "loss": np.empty(1, F)}
    work |= {"parts": np.empty(64), "partial": np.empty((64, FEATURES), F)}
    found = {}
    for kind, functions in (
        ("activation", {"built_in": activations.sigmoid, "own": own_sigmoid}),
        ("score loss", {"built_in": scores.mse, "own": own_mse}),
    ):
        contenders, results = {}, []
        for name, function in functions.items():
            assert place_of(ops.library, function, "float32").form.startswith(
                "compiled on first use" if name == "own" else "compiled"
            )
            bound: Any = function.bind()

            def forward_and_backward(bound: Any = bound) -> None:
                ops.activate(bound, x, bias, y, work)
                ops.activation_gradient(bound, y, dy, dx, bias.copy(), work)

            def loss(bound: Any = bound) -> None:
                ops.score_loss(bound, x, dy, True, work)

            contenders[name] = forward_and_backward if kind == "activation" else loss
            contenders[name]()
            results.append(np.concatenate([dx, work["dz"]]).copy())
        np.testing.assert_array_equal(*results)
        found[kind] = on_one_and_all_threads(contenders, rounds)
    return {"shape": [BATCH, FEATURES], **found}


def training(rounds: int) -> dict[str, Any]:
    """An epoch of ``fit`` with rule, activation and loss of gpubatch, and with those of the user.

    Matrix products should be on one thread: those that wait for one another on busy cores hide all else.
    """
    rng = np.random.default_rng(0)
    X, Y = rng.standard_normal((4096, 64), F), rng.standard_normal((4096, 8), F)

    def run(own: bool) -> Callable[[], Any]:
        net = gb.mlp(
            [64, 256, 256, 8],
            activation=own_sigmoid if own else activations.sigmoid,
            loss=own_mse if own else scores.mse,
            seed=1,
            backend="cpu",
        )
        opt = gb.Optimizer(own_adam, net.parameters) if own else gb.Adam(net.parameters)
        loader = gb.Loader(X, Y, batch_size=128, backend="cpu")
        return lambda: gb.fit(net, loader, opt, epochs=1, progress=False)

    contenders = {"built_in": run(False), "own": run(True)}
    return {"layers": [64, 256, 256, 8], "samples": 4096, "batch": 128, **on_one_and_all_threads(contenders, rounds)}


FIRST = """
import os, sys, time
import numpy as np
sys.path[:0] = [{here!r}]
import gpubatch as gb
from own_rules import own_adam
gb.Optimizer
w, g = np.ones(1000, np.float32), np.ones(1000, np.float32)
began, used = time.perf_counter(), sum(os.times()[:4])
opt = gb.Optimizer(own_adam, [w]) if {own} else gb.Adam([w])
opt.step([g])
print(time.perf_counter() - began, sum(os.times()[:4]) - used)
"""


def first_steps(repeats: int) -> dict[str, Any]:
    """Milliseconds of the first step of a process: built in, compiled in it, and compiled by another before.

    "cpu_ms" is the CPU time of the process and the compiler, in steps of 10 ms.
    """
    found: dict[str, list[list[float]]] = {"built in": [], "own, empty cache": [], "own, second process": []}
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as cache:
            for name, times in found.items():
                code = FIRST.format(here=str(Path(__file__).parent), own=name != "built in")
                environment = {**os.environ, "GPUBATCH_CACHE_DIR": cache}
                done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, env=environment)
                times.append([1e3 * float(number) for number in done.stdout.split()])
    measured = {}
    for name, times in found.items():
        clock, cpu = zip(*times, strict=True)
        measured[name] = {"ms": statistics.median(clock), "range_ms": [min(clock), max(clock)]}
        measured[name]["cpu_ms"] = statistics.median(cpu)
    return {"repeats": repeats, **measured}


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=41, help="rounds of each pair; a fifth for the largest")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="numbers of parameters")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    parser.add_argument("--fit-alone", action="store_true", help="measure no more than fit")
    arguments = parser.parse_args()
    if arguments.fit_alone:
        print(json.dumps(training(max(3, arguments.rounds // 4))))
        return
    if not own_form().startswith("compiled"):
        raise SystemExit(f"formulas of one's own are not compiled here: {own_form()}")
    rules = {}
    for size in arguments.sizes:
        rules[str(size)] = update_rule(size, max(3, arguments.rounds // (5 if size > 10**7 else 1)))
    fit = [sys.executable, __file__, "--fit-alone", "--rounds", str(arguments.rounds)]
    one_thread = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    results = {
        "date": date.today().isoformat(),
        "processor": f"{processor()}, {os.cpu_count()} cores",
        "level": host_library().level(),
        "compiler": own_form().partition("(")[2].partition("), ")[0],
        "versions": {"gpubatch": gb.__version__, "numpy": np.__version__, "python": sys.version.split()[0]},
        "first step": first_steps(5),
        "adam": rules,
        "elementwise": elementwise(arguments.rounds),
        "fit": json.loads(subprocess.run(fit, capture_output=True, check=True, env=one_thread).stdout),
    }
    record(results, arguments.out)


if __name__ == "__main__":
    main()
