"""Measure the time that training waits for batches, on the CPU and on a GPU: ``python bench/feeding.py [--out FILE]``.

CPU: the source takes 1.5 ms per batch, and the consumer computes for 2 ms per batch, in NumPy or in Python. Target: the
consumer waits for less than 5 % of the time after the first batch.

GPU, as medians over several epochs:
- bandwidth of batches through pinned memory, against a plain pinned copy of as many bytes (target: 85 %);
- overlap of copy and compute (target: 90 %);
- bandwidth, read plus written, of batches gathered on the device, against a copy there (target: 80 %).
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from first_run import machine, record

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the checkout that this file belongs to, installed or not

import gpubatch as gb  # noqa: E402

EPOCHS = 5
SOURCE_SECONDS, CONSUMER_SECONDS = 1.5e-3, 2e-3  # per batch


# --- on the CPU ---------------------------------------------------------------------------------------------------


class Slow:
    """A source as slow as a slow disk."""

    def __init__(self, samples: int) -> None:
        self.samples = np.random.default_rng(0).random((samples, 784), np.float32)

    def __len__(self) -> int:
        return len(self.samples)

    def read(self, indices: np.ndarray) -> np.ndarray:
        """The samples, after SOURCE_SECONDS."""
        until = time.perf_counter() + SOURCE_SECONDS
        found = self.samples[indices]
        time.sleep(max(0.0, until - time.perf_counter()))
        return found


def in_numpy(x: np.ndarray) -> None:
    """Matrix products."""
    x @ x.T


def in_python(x: np.ndarray) -> None:
    """Arithmetic that holds the interpreter's lock, so no other Python thread runs."""
    sum(range(1000))


CONSUMERS = {"NumPy": in_numpy, "Python": in_python}


def waiting(consume: Callable[[np.ndarray], None], batches: int, prefetch: int) -> dict[str, float]:
    """Run an epoch from the slow source: the share of time that the consumer waited, and ms per batch."""
    loader = gb.Loader(Slow(64 * batches), batch_size=64, backend="cpu", prefetch=prefetch)
    for x in loader:
        until = time.perf_counter() + CONSUMER_SECONDS
        while time.perf_counter() < until:
            consume(x)
    stats = loader.stats
    return {"waited": stats.waited / stats.seconds, "ms_per_batch": 1e3 * stats.seconds / (stats.batches - 1)}


def on_cpu(batches: int) -> list[dict[str, Any]]:
    """All consumers, with and without a prefetching thread."""
    return [
        {"consumer computes in": name, "prefetch": prefetch, **waiting(consume, batches, prefetch)}
        for name, consume in CONSUMERS.items()
        for prefetch in (2, 0)
    ]


# --- on a GPU -----------------------------------------------------------------------------------------------------


def seconds(work: Callable[[], Any], backend: gb.Backend) -> list[float]:
    """The seconds of each run of ``work``, device work included, after one warm-up."""
    times = []
    for _ in range(EPOCHS + 1):
        backend.synchronize()
        start = time.perf_counter()
        work()
        backend.synchronize()
        times.append(time.perf_counter() - start)
    return times[1:]


def through_pinned_memory(
    backend: Any, samples: int = 1 << 14, features: int = 224 * 224 * 3, burden: int = 1 << 26
) -> list[dict[str, Any]]:
    """Batches of uint8, converted to float32 on the device, alone and with compute that takes as long as they do.

    The compute is passes over ``burden`` numbers.
    """
    X = np.random.default_rng(0).integers(0, 256, (samples, features), np.uint8)
    loader = gb.Loader(X, batch_size=samples // 64, scale=1 / 255, backend=backend, feed="host")
    batch = X[: loader.batch_size].reshape(-1)
    pinned, target = backend.pinned(batch.size, batch.dtype), backend.empty(batch.size, batch.dtype)
    pinned[:] = batch
    stream = backend.current_stream()
    numbers = backend.zeros(burden, "float32")

    def copy() -> None:
        for _ in range(len(loader)):
            target.set(pinned, stream=stream)

    def compute(steps: int) -> None:
        nonlocal numbers
        for _ in range(steps):
            numbers *= 0.5

    def epoch(steps: int) -> None:
        for _ in loader:
            compute(steps)

    epochs = seconds(lambda: epoch(0), backend)
    plain, alone = statistics.median(seconds(copy, backend)), statistics.median(epochs)
    step = statistics.median(seconds(lambda: compute(100), backend)) / 100
    steps = max(1, round(alone / len(loader) / step))
    work = statistics.median(seconds(lambda: compute(steps * len(loader)), backend))
    with_work = seconds(lambda: epoch(steps), backend)
    overlap = (work + alone - statistics.median(with_work)) / min(work, alone)
    name, count = f"batches of {loader.batch_size} x {features} uint8 through pinned memory", len(loader)
    return [
        row(name, epochs, count, plain / alone, "a pinned copy's bandwidth", 0.85),
        row(f"{name} and as much compute", with_work, count, overlap, "copy and compute at once", 0.9),
    ]


def gathered_on_the_device(backend: Any, dtype: str, samples: int = 1 << 20, features: int = 784) -> dict[str, Any]:
    """Batches of float32 gathered from samples of ``dtype`` on the device, from the second batch of an epoch on.

    The first batch waits for the order, which the host makes.
    """
    X = np.resize(np.random.default_rng(0).integers(0, 256, (1 << 10, features)).astype(dtype), (samples, features))
    loader = gb.Loader(X, batch_size=samples // 8, backend=backend, feed="device")
    times = []
    for _ in range(EPOCHS + 1):
        iteration = iter(loader)
        next(iteration)
        backend.synchronize()
        start = time.perf_counter()
        for _ in iteration:
            pass
        backend.synchronize()
        times.append(time.perf_counter() - start)
    count = len(loader) - 1
    one = statistics.median(times[1:]) / count
    source, target = (backend.zeros(loader.batch_size * features, "float32") for _ in range(2))

    def copy() -> None:
        for _ in range(20):
            target[...] = source

    bandwidth = 20 * 2 * source.nbytes / statistics.median(seconds(copy, backend))
    read_and_written = loader.batch_size * features * (X.itemsize + 4)
    name = f"batches of {loader.batch_size} x {features} {dtype} gathered on the device"
    return row(name, times[1:], count, read_and_written / one / bandwidth, "a copy's bandwidth", 0.8)


def row(work: str, times: list[float], batches: int, share: float, of: str, asked: float) -> dict[str, Any]:
    """A row of gpu_check's table: seconds per batch, and ``share`` of the bound ``of``."""
    low, median, high = (time / batches for time in statistics.quantiles(times, n=4))
    ours = {"median": median, "low": low, "high": high}
    return {"work": work, "seconds": {"gpubatch": ours}, "share": share, "of": of, "asked": {"share": asked}}


def on_gpu(small: bool = False) -> list[dict[str, Any]]:
    """The measurements on a GPU; ``small`` only tests that they run."""
    backend = gb.get_backend("cuda")
    pinned = {"samples": 128, "features": 64, "burden": 1 << 10} if small else {}
    resident = {"samples": 256, "features": 64} if small else {}
    gathered = (gathered_on_the_device(backend, dtype, **resident) for dtype in ("uint8", "float32"))
    return [*through_pinned_memory(backend, **pinned), *gathered]


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=1000, help="number of batches of the slow source")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    arguments = parser.parse_args()
    results = {
        "date": date.today().isoformat(),
        "machine": machine(),
        "source_ms_per_batch": 1e3 * SOURCE_SECONDS,
        "consumer_ms_per_batch": 1e3 * CONSUMER_SECONDS,
        "batches": arguments.batches,
        "cpu": on_cpu(arguments.batches),
    }
    if "cuda:0" in gb.available_backends():
        results |= {"device": gb.get_backend("cuda").device, "gpu": on_gpu()}
    record(results, arguments.out)


if __name__ == "__main__":
    main()
