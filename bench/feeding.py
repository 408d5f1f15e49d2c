"""Whether anybody waits for batches. ``python bench/feeding.py [--out FILE]``; on a machine with a GPU, it, too.

On the CPU: a source that takes 1.5 ms a batch, and a consumer that computes for 2 ms a batch, in NumPy and in Python;
asked is that the consumer waits for less than 5 % of the time after the first batch. On a GPU: the bandwidth of batches
that go through pinned memory against a plain pinned copy of as many bytes (asked: 85 %), how much of copy and compute
is at the same time (90 %), and the bandwidth, read and written, of batches gathered on the device against a copy there
(80 %). Medians of several epochs. The result goes to ``--out`` as JSON.
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
SOURCE_SECONDS, CONSUMER_SECONDS = 1.5e-3, 2e-3  # a batch


# --- on the CPU ---------------------------------------------------------------------------------------------------


class Slow:
    """Samples that take their time, as those of a slow disk do."""

    def __init__(self, samples: int) -> None:
        self.samples = np.random.default_rng(0).random((samples, 784), np.float32)

    def __len__(self) -> int:
        return len(self.samples)

    def read(self, indices: np.ndarray) -> np.ndarray:
        """The samples, after a while."""
        until = time.perf_counter() + SOURCE_SECONDS
        found = self.samples[indices]
        time.sleep(max(0.0, until - time.perf_counter()))
        return found


def in_numpy(x: np.ndarray) -> None:
    """Matrix products."""
    x @ x.T


def in_python(x: np.ndarray) -> None:
    """Arithmetic that keeps the interpreter, and with it every other thread, busy."""
    sum(range(1000))


CONSUMERS = {"NumPy": in_numpy, "Python": in_python}


def waiting(consume: Callable[[np.ndarray], None], batches: int, prefetch: int) -> dict[str, float]:
    """An epoch of a slow source: the share of the time that the consumer waited, and what it would be in turn."""
    loader = gb.Loader(Slow(64 * batches), batch_size=64, backend="cpu", prefetch=prefetch)
    for x in loader:
        until = time.perf_counter() + CONSUMER_SECONDS
        while time.perf_counter() < until:
            consume(x)
    stats = loader.stats
    return {"waited": stats.waited / stats.seconds, "ms_per_batch": 1e3 * stats.seconds / (stats.batches - 1)}


def on_cpu(batches: int) -> list[dict[str, Any]]:
    """Every consumer, with and without a thread that reads ahead."""
    return [
        {"consumer computes in": name, "prefetch": prefetch, **waiting(consume, batches, prefetch)}
        for name, consume in CONSUMERS.items()
        for prefetch in (2, 0)
    ]


# --- on a GPU -----------------------------------------------------------------------------------------------------


def seconds(work: Callable[[], Any], backend: gb.Backend) -> list[float]:
    """How long ``work`` took, every time, until the device had done it; after one that warms up."""
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
    """Batches of bytes that become float32 on the device, and work on the device that takes as long as they do.

    That is passes over ``burden`` numbers.
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
    """Batches of float32 from samples of ``dtype`` that are on the device, from the second batch of an epoch on.

    The first has to wait for the order, which is made on the host.
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
    """A line of gpu_check's table: seconds a batch, and a share of something."""
    low, median, high = (time / batches for time in statistics.quantiles(times, n=4))
    ours = {"median": median, "low": low, "high": high}
    return {"work": work, "seconds": {"gpubatch": ours}, "share": share, "of": of, "asked": {"share": asked}}


def on_gpu(small: bool = False) -> list[dict[str, Any]]:
    """What a GPU does with batches; ``small`` shows that it works, nothing else."""
    backend = gb.get_backend("cuda")
    pinned = {"samples": 128, "features": 64, "burden": 1 << 10} if small else {}
    resident = {"samples": 256, "features": 64} if small else {}
    gathered = (gathered_on_the_device(backend, dtype, **resident) for dtype in ("uint8", "float32"))
    return [*through_pinned_memory(backend, **pinned), *gathered]


def main() -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=1000, help="of the slow source")
    parser.add_argument("--out", type=Path, help="file for the results")
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
