"""A whole network on CUDA's path, without a GPU: the real kernels on the emulated grid, NumPy for matrix products."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from stand_in import INDEX, DeviceArray, StandIn, StandInBackend

import gpubatch as gb
from gpubatch.nn import OF_LABELS
from gpubatch.ops import cuda_kernel, ops_for

STACKS = {
    "mlp": lambda: [gb.Dense(12, 16), gb.ReLU(), gb.Dense(16, 5)],
    # The gradient of a bias before a norm is only rounding, and Adam would use its sign.
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


@pytest.mark.parametrize("loss", [*OF_LABELS, "mse", "sigmoid_cross_entropy"])
@pytest.mark.parametrize("stack", STACKS)
def test_a_training_run_follows_the_cpu(
    stack: str, loss: str, device: StandInBackend, rng: np.random.Generator
) -> None:
    nets = [gb.Network(STACKS[stack](), loss, l2=0.01, backend=backend, seed=3) for backend in ("cpu", device)]
    optimizers = [gb.Adam(net.parameters, lr=0.01) for net in nets]
    for rows in (33, 33, 7):
        X = rng.standard_normal((rows, 12)).astype(np.float32)
        Y = rng.integers(0, 5, rows)
        if loss in ("mse", "sigmoid_cross_entropy"):
            Y = rng.uniform(0, 1, (rows, 5)).astype(np.float32)
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


TARGETS = {
    **dict.fromkeys(OF_LABELS, lambda rng: rng.integers(0, 5, 20)),
    "sigmoid_cross_entropy": lambda rng: rng.integers(0, 2, (20, 5)).astype(np.uint8),
    "mse": lambda rng: rng.standard_normal((20, 5)).astype(np.float32),
}
KERNELS = {"sigmoid_cross_entropy": "score_loss", "mse": "score_loss"}  # others are named as their losses


def batch(net: gb.Network, rng: np.random.Generator) -> tuple[DeviceArray, DeviceArray]:
    X, Y = rng.standard_normal((20, 12)).astype(net.dtype), TARGETS[net.loss_name](rng)
    return net.backend.asarray(X), net.backend.asarray(Y)


@pytest.mark.parametrize("precision", ["full", "mixed"])
@pytest.mark.parametrize("loss", TARGETS)
def test_the_launches_of_a_step(loss: str, precision: str, device: StandInBackend, rng: np.random.Generator) -> None:
    """Besides five matrix products: three biases with activations, the loss, three gradients, and two for l2."""
    net = gb.mlp([12, 16, 8, 5], loss=loss, l2=0.1, backend=device, precision=precision)
    opt = gb.Adam(net.parameters, master_weights=precision == "mixed")
    for _ in range(2):
        X, Y = batch(net, rng)
        device.cupy.launches.clear()
        net.step_loss(X, Y)
        opt.step()
    names = Counter(name for name, _, _ in device.cupy.launches)
    assert names == {
        "activate": 3,
        KERNELS.get(loss, loss): 1,
        "l2_loss": 1,
        "activation_gradient": 3,
        "l2_gradient": 1,
        "update_arrays": 1,
    }


@pytest.mark.parametrize("precision", ["full", "mixed"])
@pytest.mark.parametrize("loss", TARGETS)
def test_a_step_is_kernels_and_matrix_products(
    loss: str, precision: str, device: StandInBackend, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph can hold nothing else: no reduction of CuPy, no allocation, copy or read."""
    first = [gb.Dropout(0.0), gb.Dense(12, 16), gb.ReLU(), gb.Dropout(0.2), gb.Dense(16, 8, bias=False)]
    then = [gb.BatchNorm(8), gb.GELU(), gb.Dropout(0.2), gb.Dropout(0.0), gb.Dense(8, 5)]
    net = gb.Network(first + then, loss, l2=0.1, backend=device, precision=precision)
    batches = [batch(net, rng) for _ in range(2)]
    net.step_loss(*batches[0])  # plans the workspace

    def only_products(self: DeviceArray, ufunc: np.ufunc, method: str, *inputs: Any, out: Any, **kwargs: Any) -> Any:
        assert (ufunc, method, kwargs) == (np.matmul, "__call__", {}), f"{ufunc} of an array of the device"
        np.matmul(*(np.asarray(x) for x in inputs), out=np.asarray(out[0]))
        return out[0]

    monkeypatch.setattr(DeviceArray, "__array_ufunc__", only_products)
    refused = ("__setitem__", "__array_function__", "fill", "sum", "min", "max", "argmax", "dot", "take", "copy")
    for name in (*refused, "astype", "get", "set", "item", "tolist", "__float__", "__int__", "__bool__"):
        monkeypatch.setattr(DeviceArray, name, None)
    for name in ("empty", "zeros", "asarray"):
        monkeypatch.setattr(StandIn, name, None)
    device.cupy.launches.clear()
    loss_of_step = np.asarray(net.step_loss(*batches[1]))
    monkeypatch.undo()
    assert np.isfinite(loss_of_step).all()
    assert {name for name, _, _ in device.cupy.launches} >= {
        *(KERNELS.get(loss, loss), "l2_loss", "l2_gradient", "dropout_gradient")
    }


@pytest.mark.parametrize("first", [gb.ReLU(), gb.BatchNorm(12), gb.Dropout(0.2), gb.Dropout(0.0)], ids=repr)
def test_a_first_layer_that_takes_no_strides_says_so(first: Any, device: StandInBackend) -> None:
    net, Y = gb.Network([first, gb.Dense(12, 5)], backend=device), device.zeros(4, np.int64)
    wide = device.zeros((4, 24), np.float32)
    net.step_loss(wide[:, :12].copy(), Y)
    for X in (wide[:, ::2], wide[:, :12]):
        with pytest.raises(gb.ShapeError, match=r"x must be C-contiguous on a GPU, got .* of shape \(4, 12\); copy it"):
            net.step_loss(X, Y)
    if isinstance(first, gb.BatchNorm):
        with pytest.raises(gb.ShapeError, match="x must be C-contiguous"):
            net.scores(wide[:, ::2])
