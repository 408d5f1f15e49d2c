"""Measure the cost of checkpoints in training, and the write speed: ``python bench/checkpoint_cost.py [--out FILE]``.

The same training runs without checkpoints, with one per epoch, and with one per epoch in the background. Runs take
turns, each in its own process, ``--rounds`` times. The cost is the median over the rounds of t / t0 - 1: t is the time
of a run until its last checkpoint is complete, t0 that of the round's run without checkpoints. Then a checkpoint of
``--gigabytes`` and a plain synced write of the same bytes take turns; the result is the ratio of their speeds.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from first_run import processor, record

import gpubatch as gb
from gpubatch.checkpoint import Checkpoints

# name: layers, samples, batch size, epochs
RUNS = {
    "0.5 M parameters, epochs of 235 steps": ([784, 512, 256, 10], 60_000, 256, 4),
    "5 M parameters, epochs of 59 steps": ([784, 2048, 1536, 10], 15_000, 256, 3),
}
WAYS = ("none", "foreground", "background")


def train(name: str, way: str, folder: Path) -> float:
    """The seconds of a run, after one epoch of warm-up."""
    sizes, samples, batch, epochs = RUNS[name]
    rng = np.random.default_rng(0)
    X, Y = rng.integers(0, 256, (samples, sizes[0]), np.uint8), rng.integers(0, 10, samples)
    net = gb.mlp(sizes, backend="cpu")
    loader = gb.Loader(X, Y, batch_size=batch, backend="cpu", scale=1 / 255)
    opt = gb.Adam(net.parameters, lr=1e-4)
    gb.fit(net, loader, opt, epochs=1, progress=False)
    store = None if way == "none" else Checkpoints(folder, background=way == "background")
    began = time.perf_counter()
    gb.fit(net, loader, opt, epochs=epochs, progress=False, checkpoint=store)
    return time.perf_counter() - began


def cost(name: str, rounds: int, base: Path) -> dict[str, Any]:
    """The seconds by way and round, and the cost of checkpoints."""
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for number in range(rounds):
        for way in WAYS:
            with tempfile.TemporaryDirectory(dir=base) as folder:
                child = [sys.executable, __file__, "--one", name, way, folder]
                done = subprocess.run(child, capture_output=True, text=True, check=True)
            seconds[way].append(float(done.stdout))
        print(f"{name}, round {number + 1} of {rounds}", file=sys.stderr)
    costs = {
        way: [there / without - 1 for there, without in zip(seconds[way], seconds["none"], strict=True)]
        for way in WAYS[1:]
    }
    return {
        "seconds": seconds,
        "epochs": RUNS[name][3],
        "cost": {way: {"median": statistics.median(of), "rounds": of} for way, of in costs.items()},
    }


def speed(gigabytes: float, rounds: int, base: Path) -> dict[str, Any]:
    """Bytes per second of a large checkpoint and of a plain write of the same bytes, both synced."""
    array = np.random.default_rng(0).integers(0, 2**63, int(gigabytes * 1e9) // 8)
    found: dict[str, list[float]] = {"checkpoint": [], "plain": []}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory(dir=base) as folder:
            store = Checkpoints(folder)
            store.open()
            began = time.perf_counter()
            store.save({"array": array})
            found["checkpoint"].append(array.nbytes / (time.perf_counter() - began))
        with tempfile.TemporaryDirectory(dir=base) as folder:
            began = time.perf_counter()
            with open(Path(folder, "plain"), "wb") as file:
                file.write(array.data)
                file.flush()
                os.fsync(file.fileno())
            found["plain"].append(array.nbytes / (time.perf_counter() - began))
    ratios = [a / b for a, b in zip(found["checkpoint"], found["plain"], strict=True)]
    return {"bytes": array.nbytes, "bytes_per_second": found, "ratio": statistics.median(ratios), "ratios": ratios}


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="number of rounds")
    parser.add_argument("--gigabytes", type=float, default=1.0, help="size of the large checkpoint")
    parser.add_argument("--folder", type=Path, help="folder for checkpoints; default: the system's temporary folder")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(train(given.one[0], given.one[1], Path(given.one[2])))
        return
    results = {
        "date": date.today().isoformat(),
        "machine": f"{processor()}, {os.cpu_count()} cores, Python {platform.python_version()}, NumPy {np.__version__}",
        "runs": {name: cost(name, given.rounds, given.folder) for name in RUNS},
        "large": speed(given.gigabytes, given.rounds, given.folder),
    }
    record(results, given.out)


if __name__ == "__main__":
    main()
