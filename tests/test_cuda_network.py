"""A whole network on CUDA's path, without a GPU: the real kernels on the emulated grid, NumPy for matrix products."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from stand_in import INDEX, DeviceArray, StandIn, StandInBackend

import gpubatch as gb
from gpubatch.host_ops import ops_for
from gpubatch.launch import cuda_kernel

STACKS = {
    "mlp": lambda: [gb.Dense(12, 16), gb.ReLU(), gb.Dense(16, 5)],
    # A bias before a norm has no gradient but rounding, of which Adam would take the sign.
    "norm and dropout": lambda: [
        *(gb.Dense(12, 16, bias=False), gb.BatchNorm(16), gb.GELU(), gb.Dropout(0.2), gb.Dense(16, 5))
    ],
    "no bias": lambda: [gb.Tanh(), gb.Dense(12, 16, bias=False), gb.LeakyReLU(0.1), gb.Sigmoid(), gb.Dense(16, 5)],
}


@pytest.fixture
def device() -> StandInBackend:
    for kept in (cuda_kernel, ops_for):  # by the number of the device
        kept.cache_clear()
    return StandInBackend(StandIn(), INDEX, "a test")


@pytest.mark.parametrize("loss", ["softmax_cross_entropy", "svm", "mse"])
@pytest.mark.parametrize("stack", STACKS)
def test_a_training_run_follows_the_cpu(
    stack: str, loss: str, device: StandInBackend, rng: np.random.Generator
) -> None:
    nets = [gb.Network(STACKS[stack](), loss, l2=0.01, backend=backend, seed=3) for backend in ("cpu", device)]
    optimizers = [gb.Adam(net.parameters, lr=0.01) for net in nets]
    for rows in (33, 33, 7):
        X = rng.standard_normal((rows, 12)).astype(np.float32)
        Y = rng.standard_normal((rows, 5)).astype(np.float32) if loss == "mse" else rng.integers(0, 5, rows)
        losses = []
        for net, opt in zip(nets, optimizers, strict=True):
            value, grads = net.loss_and_grad(net.backend.asarray(X), net.backend.asarray(Y))
            assert type(grads.flat) is (DeviceArray if net.backend is device else np.ndarray)
            opt.step(grads)
            losses.append((value, net.loss(net.backend.asarray(X), net.backend.asarray(Y))))
        np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    on_cpu, on_device = (net.backend.to_numpy(net.parameters.flat) for net in nets)
    # Where a gradient is near zero, Adam's step may have either sign.
    assert np.quantile(np.abs(on_device - on_cpu), 0.98) < 1e-5
    np.testing.assert_allclose(
        nets[0].buffers.flat, nets[1].backend.to_numpy(nets[1].buffers.flat), rtol=1e-4, atol=1e-6
    )


def test_the_launches_of_a_step(device: StandInBackend, rng: np.random.Generator) -> None:
    """Besides five matrix products: three biases with their activations, the loss and its mean, three gradients."""
    net = gb.mlp([12, 16, 8, 5], backend=device)
    opt = gb.Adam(net.parameters)
    X, Y = device.asarray(rng.standard_normal((20, 12)).astype(np.float32)), device.asarray(rng.integers(0, 5, 20))
    for _ in range(2):
        device.cupy.launches.clear()
        net.step_loss(X, Y)
        opt.step()
    names = Counter(name for name, _, _ in device.cupy.launches)
    assert names == {
        "activate": 3,
        "softmax_cross_entropy": 1,
        "mean": 1,
        "activation_gradient": 3,
        "update_arrays": 1,
    }
