"""Benchmark an epoch of training, loader and loop included: ``pytest bench --benchmark-enable``.

Without ``--benchmark-enable`` each benchmark runs once, on fewer samples, as a test.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import gpubatch as gb

SAMPLES = 4096


@pytest.mark.filterwarnings("ignore::gpubatch.FewStepsWarning")  # an epoch of large batches has few
@pytest.mark.parametrize("spec", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(
    "batch", [pytest.param(1, marks=pytest.mark.exhaustive), 16, 32, 64, 96, 128, 192, 256, 512, 1024, 4096]
)
def test_training_epoch(benchmark: Any, batch: int, spec: str) -> None:
    if spec == "cuda" and "cuda:0" not in gb.available_backends():
        pytest.skip("no CUDA device can be used here")
    benchmark.group = f"epoch of {SAMPLES:,} samples, 784-512-256-10, Adam, by batch size"
    benchmark.extra_info.update(samples=SAMPLES, work=f"{SAMPLES:,} samples, 784-512-256-10, Adam")  # for report.py
    rng = np.random.default_rng(0)
    samples = 128 if benchmark.disabled else SAMPLES
    X, Y = rng.random((samples, 784), np.float32), rng.integers(0, 10, samples)
    net = gb.mlp([784, 512, 256, 10], backend=spec)
    loader = gb.Loader(X, Y, batch_size=batch, backend=spec)
    opt = gb.Adam(net.parameters, lr=1e-6)  # small enough that the loss falls over any number of steps

    def epoch() -> gb.History:
        return gb.fit(net, loader, opt, epochs=1, progress=False)

    first = net.loss(*(net.backend.asarray(values) for values in (X, Y)))
    benchmark.pedantic(epoch, rounds=3, warmup_rounds=0 if benchmark.disabled else 1)
    assert net.loss(*(net.backend.asarray(values) for values in (X, Y))) < first
