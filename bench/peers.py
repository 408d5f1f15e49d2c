"""gpubatch beside other libraries on the same work: ``python bench/peers.py [--out FILE]``.

Each contender runs in a process of its own, in turn, several rounds; compared are the medians over the rounds, and
the ratio round by round. CPU, float32, as many threads for each as ``--threads`` says.
"""

from __future__ import annotations

import argparse
import importlib.util
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
from first_run import processor

Step = Callable[[], Any]


def median_seconds(step: Step, budget: float = 0.7) -> float:
    """The median time of a call, over as many as fit in ``budget`` seconds, after a warm-up."""
    for _ in range(5):
        step()
    times: list[float] = []
    end = time.perf_counter() + budget
    while len(times) < 15 or time.perf_counter() < end:
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


# --- optimizers ----------------------------------------------------------------------------------------------------


def gpubatch_optimizer(name: str, sizes: list[int]) -> Step:
    """A step of gpubatch: on one flat buffer, or on arrays that lie apart."""
    import gpubatch as gb

    kind = {"adam": gb.Adam, "rmsprop": gb.RMSProp, "momentum": gb.Momentum}[name]
    if len(sizes) == 1:
        params = gb.Parameters({"w": (sizes[0],)}, "cpu")
        params.grads.flat[...] = 0.01
        return kind(params, lr=1e-3).step
    arrays = [np.zeros(n, np.float32) for n in sizes]
    grads = [np.full(n, 0.01, np.float32) for n in sizes]
    opt = kind(arrays, lr=1e-3)
    return lambda: opt.step(grads)


def torch_optimizer(name: str, sizes: list[int]) -> Step:
    """The same step of PyTorch, in its fastest form on a CPU."""
    import torch

    params = [torch.zeros(n, requires_grad=True) for n in sizes]
    for p in params:
        p.grad = torch.full_like(p, 0.01)
    makers: dict[str, Callable[[], Any]] = {
        "adam": lambda: torch.optim.Adam(params, lr=1e-3, fused=True),
        "rmsprop": lambda: torch.optim.RMSprop(params, lr=1e-3, foreach=True),
        "momentum": lambda: torch.optim.SGD(params, lr=1e-3, momentum=0.9, foreach=True),
    }
    step: Step = makers[name]().step
    return step


# --- training steps ------------------------------------------------------------------------------------------------

SIZES = [784, 512, 256, 10]


def batch_of(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and labels."""
    rng = np.random.default_rng(0)
    return rng.random((n, SIZES[0]), np.float32), rng.integers(0, SIZES[-1], n)


def gpubatch_training(n: int) -> Step:
    """Forward, backward and update of gpubatch."""
    import gpubatch as gb

    x, y = batch_of(n)
    net = gb.mlp(SIZES, backend="cpu")
    opt = gb.Adam(net.parameters, lr=1e-5)

    def step() -> None:
        net.step_loss(x, y)
        opt.step()

    return step


def torch_training(n: int) -> Step:
    """The same of PyTorch, eager, with its fused Adam."""
    import itertools

    import torch

    x, y = map(torch.tensor, batch_of(n))
    layers: list[Any] = []
    for inputs, outputs in itertools.pairwise(SIZES):
        layers += [torch.nn.Linear(inputs, outputs), torch.nn.ReLU()]
    net = torch.nn.Sequential(*layers[:-1])
    opt = torch.optim.Adam(net.parameters(), lr=1e-5, fused=True)

    def step() -> None:
        opt.zero_grad(set_to_none=True)
        torch.nn.functional.cross_entropy(net(x), y).backward()
        opt.step()

    return step


# --- what is compared ----------------------------------------------------------------------------------------------

MILLION = 10**6
OPTIMIZERS = {
    "adam, 10 thousand": ("adam", [10_000]),
    "adam, 100 thousand": ("adam", [100_000]),
    "adam, 1 million": ("adam", [MILLION]),
    "adam, 10 million": ("adam", [10 * MILLION]),
    "adam, 100 arrays of 10 thousand": ("adam", [10_000] * 100),
    "rmsprop, 1 million": ("rmsprop", [MILLION]),
    "rmsprop, 10 million": ("rmsprop", [10 * MILLION]),
    "momentum, 1 million": ("momentum", [MILLION]),
    "momentum, 10 million": ("momentum", [10 * MILLION]),
}
BATCHES = (32, 64, 128, 256, 512, 1024)
WORK: dict[str, dict[str, Callable[[], Step]]] = {
    **{
        f"step of {name}": {
            "gpubatch": lambda a=a: gpubatch_optimizer(*a),
            "PyTorch": lambda a=a: torch_optimizer(*a),
        }
        for name, a in OPTIMIZERS.items()
    },
    **{
        f"training step, 784-512-256-10, Adam, batch {n}": {
            "gpubatch": lambda n=n: gpubatch_training(n),
            "PyTorch": lambda n=n: torch_training(n),
        }
        for n in BATCHES
    },
}


def one(work: str, contender: str) -> float:
    """The time of one contender, in a process of its own."""
    command = [sys.executable, __file__, "--one", work, contender]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def compare(work: str, rounds: int) -> dict[str, Any]:
    """Both contenders in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in WORK[work]}
    for _ in range(rounds):
        for name in seconds:
            seconds[name].append(one(work, name))
    ratios = [peer / ours for ours, peer in zip(seconds["gpubatch"], seconds["PyTorch"], strict=True)]
    row = {
        "work": work,
        **{f"{name}_us": 1e6 * statistics.median(times) for name, times in seconds.items()},
        "ratio": statistics.median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
    }
    print(f"{work:55} {row['gpubatch_us']:10.1f} {row['PyTorch_us']:10.1f} µs  {row['ratio']:.2f}x", flush=True)
    return row


def conditions(threads: int, rounds: int) -> dict[str, Any]:
    """Machine and versions."""
    versions = {"python": platform.python_version(), "numpy": np.__version__}
    versions |= {m: importlib.import_module(m).__version__ for m in ("gpubatch", "torch")}
    return {
        "date": date.today().isoformat(),
        "processor": f"{processor()}, {os.cpu_count()} cores",
        "versions": versions,
        "threads": threads,
        "rounds": rounds,
    }


def main() -> None:
    """Compare everything, or with ``--one`` time one contender."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", default="", help="only work whose name has this in it")
    parser.add_argument("--out", type=Path, help="file for the results, JSON")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        work, contender = arguments.one
        print(median_seconds(WORK[work][contender]()))
        return
    if importlib.util.find_spec("torch") is None:
        sys.exit("bench/peers.py needs PyTorch: pip install 'gpubatch[peers]'")
    os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), str(arguments.threads))
    rows = [compare(work, arguments.rounds) for work in WORK if arguments.only in work]
    if arguments.out:
        found = {**conditions(arguments.threads, arguments.rounds), "rows": rows}
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
