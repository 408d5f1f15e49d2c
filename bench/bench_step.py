"""Benchmark training and optimizer steps by size: ``pytest bench --benchmark-enable``.

Without ``--benchmark-enable`` each benchmark runs once, as a test. A group is one table of the comparison; those of one
optimizer's options are marked exhaustive.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import gpubatch as gb

OPTIMIZERS = {"sgd": gb.SGD, "momentum": gb.Momentum, "rmsprop": gb.RMSProp, "adam": gb.Adam}
BACKENDS = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def backend_or_skip(spec: str) -> gb.Backend:
    if spec == "cuda" and "cuda:0" not in gb.available_backends():
        pytest.skip("no CUDA device can be used here")
    return gb.get_backend(spec)


@pytest.mark.parametrize("spec", BACKENDS)
@pytest.mark.parametrize("batch", [1, 16, 32, 64, 128, 256, 512, 1024, 4096])
def test_training_step(benchmark: Any, batch: int, spec: str) -> None:
    backend = backend_or_skip(spec)
    benchmark.group = "training step, 784-512-256-10, Adam, by batch size"
    benchmark.extra_info["work"] = "784-512-256-10, Adam"  # for report.py
    rng = np.random.default_rng(0)
    net = gb.mlp([784, 512, 256, 10], backend=backend)
    opt = gb.Adam(net.parameters, lr=1e-5)  # small enough that the loss falls over any number of steps
    x = backend.asarray(rng.random((batch, 784), np.float32))
    y = backend.asarray(rng.integers(0, 10, batch))
    first = net.loss(x, y)

    def step() -> None:
        net.step_loss(x, y)
        opt.step()
        backend.synchronize()

    benchmark(step)
    assert net.loss(x, y) < first


@pytest.mark.parametrize("spec", BACKENDS)
@pytest.mark.parametrize("size", [10_000, 100_000, 1_000_000, 10_000_000])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_step(benchmark: Any, name: str, size: int, spec: str) -> None:
    backend = backend_or_skip(spec)
    benchmark.group = f"{name} step, {size:,} parameters"
    params = gb.Parameters({"w": (size,)}, backend)
    params.grads.flat[...] = 0.5
    opt = OPTIMIZERS[name](params, lr=1e-3)

    def step() -> None:
        opt.step()
        backend.synchronize()

    benchmark(step)
    assert (backend.to_numpy(params.flat) < 0).all()


SHAPES = {
    "784-128-10": {"W1": (784, 128), "b1": (128,), "W2": (128, 10), "b2": (10,)},
    "500 arrays of 10,000": {f"w{i}": (10_000,) for i in range(500)},
    "one array of 1,000,000": {"w": (1_000_000,)},
}
GROUPS: dict[str, dict[str, dict[str, float]]] = {
    "one": {},
    "three": {"[bw]*[02468]": {"lr": 1e-4}, "?*[13579]": {"weight_decay": 0.0}},
}


@pytest.mark.exhaustive
@pytest.mark.parametrize("spec", BACKENDS)
@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("shapes", [name for name in SHAPES if not name.startswith("one")])
def test_a_step_of_groups(benchmark: Any, shapes: str, groups: str, spec: str) -> None:
    """Separate arrays; a mapping of names and arrays has one tuple for each."""
    backend = backend_or_skip(spec)
    benchmark.group = f"adam step, {shapes}, by groups"
    arrays = {name: backend.zeros(shape, "float32") for name, shape in SHAPES[shapes].items()}
    grads = {name: backend.asarray(np.full(shape, 0.5, np.float32)) for name, shape in SHAPES[shapes].items()}
    opt = gb.Adam(arrays, lr=1e-3, weight_decay=0.01, groups=GROUPS[groups])

    def step() -> None:
        opt.step(grads)
        backend.synchronize()

    benchmark(step)
    assert all((backend.to_numpy(w) < 0).all() for w in arrays.values())


@pytest.mark.exhaustive
@pytest.mark.parametrize("spec", BACKENDS)
@pytest.mark.parametrize("check", [False, None, True], ids=str)
@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_a_step_that_looks_for_what_is_not_finite(
    benchmark: Any, name: str, shapes: str, check: bool | None, spec: str
) -> None:
    backend = backend_or_skip(spec)
    benchmark.group = f"{name} step, {shapes}, by check="
    params = gb.Parameters(SHAPES[shapes], backend)
    params.grads.flat[...] = 0.5
    apart = dict(params.grads) if len(params) > 4 else None
    opt = OPTIMIZERS[name](dict(params) if apart else params, lr=1e-3, check=check)

    def step() -> None:
        opt.step(apart)
        backend.synchronize()

    benchmark(step)
    assert (backend.to_numpy(params.flat) < 0).all()
