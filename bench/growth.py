"""Measure how loaders and networks grow: ``python bench/growth.py [--tree DIR] [--out FILE]``.

Each case runs in a process of its own, with one thread and at most 6 GB of address space: CPU seconds, and the peak of
resident memory over what was there when the libraries were loaded and a small loader had run. Sources are synthetic,
rows that are made from their numbers. What takes longer than a minute, or finds no memory, is told as it is. The epoch
of 60,000 samples is the median of its rounds.

With ``--tree DIR``, another checkout of gpubatch with its compiled kernels, each case runs there, too, in turn.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
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
from gpubatch.loader import epochs_of

ROOT = Path(__file__).parent.parent
BATCH, LIMIT, SECONDS, ROUNDS = 256, 6 << 30, 60, 7
EPOCH = "epoch of an array"


class Rows:
    """A source of n rows of ``width`` int32, each its number; ``block`` as a file of neighbours has it."""

    def __init__(self, n: int, width: int = 4, block: int | None = None) -> None:
        self._n, self._width = n, width
        if block is not None:
            self.block = block

    def __len__(self) -> int:
        return self._n

    def read(self, indices: np.ndarray) -> np.ndarray:
        """The rows at ``indices``."""
        return np.repeat(indices.astype(np.int32)[:, None], self._width, axis=1)

    def read_into(self, indices: np.ndarray, out: np.ndarray) -> None:
        """Write them."""
        out[...] = indices[:, None]


def loader(n: int, width: int = 4, block: int | None = None, **options: Any) -> gb.Loader:
    """A loader that prepares in the caller."""
    return gb.Loader(Rows(n, width, block), batch_size=BATCH, backend="cpu", prefetch=0, **options)


def first(n: int, **options: Any) -> Callable[[], None]:
    """The first batch of a new loader."""
    return lambda: next(iter(loader(n, **options)))


def resumed(n: int, **options: Any) -> Callable[[], None]:
    """The first batch of a loader that goes on in the middle of its fourth epoch."""

    def run() -> None:
        made = loader(n, **options)
        made.load_state_dict({**made.state_dict(), "epoch": 3, "batch": len(made) // 2})
        next(iter(made))

    return run


def held_out(n: int, resume: bool = False, **options: Any) -> Callable[[], None]:
    """The first batches of a loader that holds out a tenth, as ``fit(validation=0.1)`` does, and of that tenth."""

    def run() -> None:
        made = loader(n, **options)
        with epochs_of(made).holding_out(0.1, BATCH) as apart:
            if resume:
                made.load_state_dict({**made.state_dict(), "epoch": 3, "batch": len(made) // 2})
            next(iter(made))
            next(apart.batches(apart.columns.as_rows))

    return run


def mapped(n: int) -> Callable[[], None]:
    """A loader of a memory map of n x 4 float32, in the system's cache, and its first batch."""
    file = Path(tempfile.gettempdir()) / f"gpubatch-growth-{os.getpid()}.npy"
    np.save(file, np.ones((n, 4), np.float32))
    X = np.load(file, mmap_mode="r")
    file.unlink()
    return lambda: next(iter(gb.Loader(X, batch_size=BATCH, backend="cpu", prefetch=0)))


def epochs(n: int) -> Callable[[], None]:
    """One epoch of an array of n x 16 bytes."""
    made = gb.Loader(np.zeros((n, 16), np.uint8), batch_size=BATCH, backend="cpu", prefetch=0)

    def run() -> None:
        for _ in made:
            pass

    return run


def layers(count: int) -> Callable[[], None]:
    """A network of so many layers."""
    return lambda: gb.Network([gb.Dense(2, 2) for _ in range(count)], loss="mse", backend="cpu", seed=0) and None


def saved(arrays: dict[str, np.ndarray]) -> Callable[[], None]:
    """A checkpoint of arrays, written and read."""

    def run() -> None:
        with tempfile.TemporaryDirectory() as folder:
            store = gb.Checkpoints(folder)
            store.save({"parameters": arrays})
            assert store.newest() is not None

    return run


def written(n: int) -> Callable[[], None]:
    """A checkpoint of n parameters, written."""
    arrays = {name: np.ones(n, np.float32) for name in ("w", "m", "v")}

    def run() -> None:
        with tempfile.TemporaryDirectory() as folder:
            gb.Checkpoints(folder).save({"parameters": arrays})

    return run


def restored(n: int) -> Callable[[], None]:
    """A checkpoint of n arrays of 10 parameters and their Adam, read and loaded into others, with the same bits."""
    own, others = (gb.Parameters({f"layer_{i}": (10,) for i in range(n)}, "cpu") for _ in range(2))
    own.flat[...] = np.random.default_rng(0).random(own.size)
    own.grads.flat[...] = 0.5
    opt, other = gb.Adam(own), gb.Adam(others)
    opt.step()
    folder = tempfile.TemporaryDirectory()
    gb.Checkpoints(folder.name).save({"parameters": dict(own), "optimizer": opt.state_dict()})

    def run() -> None:
        with folder:
            found = gb.Checkpoints(folder.name).newest()
        assert found is not None
        for name, array in found[1]["parameters"].items():
            others[name][...] = array
        other.load_state_dict(found[1]["optimizer"])
        for one, twin in zip((own, *opt.state.values()), (others, *other.state.values()), strict=True):
            assert one.flat.tobytes() == twin.flat.tobytes()

    return run


# What grows, by its name and n.
CASES: dict[str, tuple[Callable[[int], Callable[[], None]], list[int]]] = {
    "first batch": (first, [10**5, 10**6, 10**7, 10**8, 10**9, 10**12]),
    "resumed in the middle of epoch 3": (resumed, [10**7, 10**12]),
    "rank 3 of 4": (lambda n: first(n, rank=3, world_size=4), [10**7, 10**12]),
    "rank 3 of 4, dealt": (lambda n: first(n, ranks=gb.Ranks.of_threads(4)[3]), [10**7, 10**12]),
    "drawn with replacement": (lambda n: first(n, replacement=True), [10**7, 10**12]),
    "in order": (lambda n: first(n, shuffle=False), [10**7, 10**12]),
    "window of 64 MiB, 4 bytes a row": (lambda n: first(n, width=1, block=4096, window="64 MiB"), [10**8, 10**12]),
    "window of 256 MiB, 16 bytes a row": (lambda n: first(n, block=4096, window="256 MiB"), [10**8, 10**12]),
    "of 8 parts": (lambda n: first(n, shards=8), [10**7, 10**12]),
    "of 8 parts, window of 256 MiB": (lambda n: first(n, block=4096, window="256 MiB", shards=8), [10**8, 10**12]),
    "window of 256 MiB, rank 3 of 4, dealt": (
        lambda n: first(n, block=4096, window="256 MiB", ranks=gb.Ranks.of_threads(4)[3]),
        [10**8, 10**12],
    ),
    "a tenth held out": (held_out, [10**6, 10**7, 10**8, 10**12]),
    "a tenth held out, resumed in epoch 3": (lambda n: held_out(n, True), [10**7, 10**12]),
    "a tenth held out, rank 3 of 4, dealt": (
        lambda n: held_out(n, ranks=gb.Ranks.of_threads(4)[3]),
        [10**7, 10**12],
    ),
    "a tenth held out, window of 256 MiB": (
        lambda n: held_out(n, block=4096, window="256 MiB"),
        [10**7, 10**8, 10**12],
    ),
    "drawn by weights": (lambda n: first(n, order=gb.WeightedOrder(np.ones(n))), [10**6, 10**7]),
    "memory map": (mapped, [10**6, 3 * 10**7]),
    EPOCH: (epochs, [60_000]),
    "layers of a network": (layers, [100, 1000, 3000]),
    "parameters in a checkpoint": (written, [10**6, 10**7, 10**8]),
    "names in a checkpoint": (
        lambda n: saved({f"layer_{i}": np.ones(10, np.float32) for i in range(n)}),
        [10**3, 10**4, 10**5, 10**6],
    ),
    "names in a checkpoint, loaded": (restored, [10**3, 10**4, 10**5, 10**6]),
}


def resident() -> float:
    """The peak so far in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def one(name: str, n: int) -> dict[str, Any]:
    """CPU milliseconds and megabytes of a case, in this process."""
    make, _ = CASES[name]
    first(1000)()
    run = make(n)
    if name == EPOCH:
        times = []
        for _ in range(ROUNDS * 3):
            start = time.process_time()
            run()
            times.append(1000 * (time.process_time() - start))
        return {"ms": statistics.median(times)}
    if name != "memory map":
        make(1000 if name != "layers of a network" else 2)()
    before, start = resident(), time.process_time()
    try:
        resource.setrlimit(resource.RLIMIT_AS, (LIMIT, LIMIT))
        run()
    except MemoryError as error:
        return {"error": f"{type(error).__name__}: {str(error)[:90]}"}
    return {"ms": 1000 * (time.process_time() - start), "MB": resident() - before}


def measured(tree: Path, name: str, n: int) -> dict[str, Any]:
    """A case in a process of its own, with the gpubatch of a tree."""
    environment = {**os.environ, "PYTHONPATH": f"{tree}{os.pathsep}{Path(__file__).parent}"}
    environment |= {"GPUBATCH_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--one", name, str(n)]
    try:
        found = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return {"error": f"not done in {SECONDS} s"}
    if found.returncode:
        return {"error": found.stderr.strip().splitlines()[-1][:120]}
    return dict(json.loads(found.stdout))


def in_words(found: dict[str, float]) -> str:
    """A result on a line."""
    return ", ".join(f"{value:.2f} {unit}" for unit, value in found.items())


def main() -> None:
    """Measure every case and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tree", type=Path, help="another checkout to measure, too")
    parser.add_argument("--out", type=Path, help="write the results here")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one(options.one[0], int(options.one[1]))))
        return
    trees = {"here": ROOT, **({"there": options.tree.resolve()} if options.tree else {})}
    results: list[dict[str, Any]] = []
    for name, (_, sizes) in CASES.items():
        for n in sizes:
            row: dict[str, Any] = {"case": name, "n": n}
            rounds = ROUNDS if name == EPOCH else 1
            found = [{where: measured(tree, name, n) for where, tree in trees.items()} for _ in range(rounds)]
            for where in trees:
                row[where] = sorted((of[where] for of in found), key=lambda of: of.get("ms", 0))[rounds // 2]
            results.append(row)
            words = [f"{where}: {row[where].get('error') or in_words(row[where])}" for where in trees]
            print(f"{name:38} {n:>14,}  {'   '.join(words)}", flush=True)
    machine = f"{processor()}, one thread, Python {platform.python_version()}, NumPy {np.__version__}"
    record({"date": date.today().isoformat(), "machine": machine, "results": results}, options.out)


if __name__ == "__main__":
    main()
