"""All that works on a device makes it the current one: here another one is, and that is an error of the stand-in's."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stand_in import StandInBackend, found_by_its_arrays, queued_backend

import gpubatch as gb
import gpubatch.backend
from gpubatch.loader import Loader, epochs_of
from gpubatch.nn import core_of
from gpubatch.ops.products import ArrayProducts
from gpubatch.optim import rehearse_update

RNG = np.random.default_rng(7)
X, Y = RNG.standard_normal((24, 6)).astype(np.float32), RNG.integers(0, 4, 24)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> StandInBackend:
    found = queued_backend("late", current_device=0)
    found_by_its_arrays(monkeypatch, lambda: found)
    return found


def network(device: StandInBackend) -> tuple[gb.Network, Any, Any]:
    layers = [gb.Dense(6, 8), gb.BatchNorm(8), gb.ReLU(), gb.Dropout(0.2), gb.Dense(8, 4)]
    net = gb.Network(layers, l2=0.01, backend=device, seed=1)
    return net, device.asarray(X), device.asarray(Y)


def fit(device: StandInBackend, **options: Any) -> gb.History:
    net = network(device)[0]
    feed = options.pop("feed", "auto")
    loader = Loader(X, Y, batch_size=8, backend=device, feed=feed)
    opt = gb.Adam(net.parameters)
    return gb.fit(net, loader, opt, 2, validation=(X, Y), progress=False, max_norm=0.01, **options)


def fit_with_checkpoint(device: StandInBackend, folder: Path) -> None:
    fit(device, checkpoint=folder)
    fit(device, checkpoint=folder, resume=True)


def iterate(device: StandInBackend, **options: Any) -> None:
    loader = Loader(X, Y, batch_size=8, backend=device, **options)
    epochs_of(loader).peek()
    for x, y in itertools.chain(loader, loader):
        device.to_numpy(x), device.to_numpy(y)
    device.to_numpy(loader.to_batch(X))


def step(device: StandInBackend, make: Callable[[Any], gb.Optimizer]) -> None:
    arrays = [device.asarray(X), device.asarray(Y.astype(np.float32))]
    opt = make(arrays)
    opt.step([device.asarray(X), device.asarray(Y.astype(np.float32))])
    opt.step({"0": device.asarray(X), "1": device.asarray(Y.astype(np.float32))}, device.zeros(2, np.float32))
    rehearse_update(opt, [device.asarray(X), device.asarray(Y.astype(np.float32))])
    state = opt.state_dict()
    make(arrays).load_state_dict(state)


def captured(device: StandInBackend) -> None:
    """NumPy's matrix products may be captured here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ArrayProducts, "capturable", True)
        assert fit(device).execution == "captured"
        net, x, y = network(device)
        step = gb.CapturedStep(net, gb.Adam(net.parameters), x[:8], y[:8])
        with device.own_stream():
            step()
        device.to_numpy(step())


def of_network(use: Callable[[gb.Network, Any, Any], Any]) -> Callable[[StandInBackend, Path], Any]:
    return lambda device, folder: use(*network(device))


USES: dict[str, Callable[[StandInBackend, Path], Any]] = {
    "arrays": lambda d, _: [d.zeros(3, "float32"), d.empty(3, "float32"), d.to_numpy(d.asarray([1.0], "float64"))],
    "another type": lambda d, _: d.asarray(d.asarray(X), "float64"),
    "memory": lambda d, _: [d.memory(), d.free_unused(), d.synchronize()],
    "a stream": lambda d, _: [d.stream(), d.current_stream(), d.event(), d.own_stream().__enter__()],
    "pinned memory": lambda d, _: d.pinned(4, np.dtype(np.float32)),
    "parameters": lambda d, _: gb.Parameters({"W": (3, 2)}, d),
    "parameters of arrays": lambda d, _: gb.Parameters({"W": X, "b": d.asarray(X)}, d),
    "a copy of parameters": lambda d, _: copy.deepcopy(gb.Parameters({"W": (3, 2)}, d)),
    "a copy of gradients": lambda d, _: copy.deepcopy(gb.Parameters({"W": (3, 2)}, d).grads),
    "setting one": lambda d, _: gb.Parameters({"W": X.shape}, d).__setitem__("W", d.asarray(X)),
    "a step": of_network(lambda net, x, y: net.loss_and_grad(x, y)),
    "a step in parts": of_network(lambda net, x, y: net.loss_and_grad(x, y, 5)),
    "a step without waiting": of_network(lambda net, x, y: net.step_loss(x, y)),
    "a rehearsal": of_network(lambda net, x, y: [core_of(net).rehearse(x, y), core_of(net).release()]),
    "a training loss": of_network(lambda net, x, y: net.loss(x, y, training=True)),
    "evaluation": of_network(lambda net, x, y: net.evaluate(x, y, 7)),
    "scores": of_network(lambda net, x, y: net.scores(x)),
    "predictions": of_network(lambda net, x, y: net.predict(x)),
    "the state of a network": of_network(lambda net, x, y: net.load_state_dict(net.state_dict())),
    "a copy of a network": of_network(lambda net, x, y: copy.deepcopy(net)),
    "Adam": lambda d, _: step(d, gb.Adam),
    "momentum": lambda d, _: step(d, lambda arrays: gb.Momentum(arrays, 0.1)),
    "SGD": lambda d, _: step(d, lambda arrays: gb.SGD(arrays, 0.1)),
    "clipping": lambda d, _: gb.clip_by_global_norm([d.asarray(X)], 0.1),
    "batches of the host": lambda d, _: iterate(d, feed="host"),
    "batches of the device": lambda d, _: iterate(d, feed="device"),
    "batches with a scale": lambda d, _: iterate(d, scale=0.5),
    "batches with a transform": lambda d, _: iterate(d, transform=lambda x: x * 2),
    "data that is there": lambda d, _: list(Loader(d.asarray(X), d.asarray(Y), batch_size=8, backend=d)),
    "fit": lambda d, _: fit(d),
    "fit from the host": lambda d, _: fit(d, feed="host"),
    "fit that calls back": lambda d, _: fit(d, callbacks=[lambda s: s.net.parameters.flat.copy()]),
    "captured steps": lambda d, _: captured(d),
    "fit with a checkpoint": fit_with_checkpoint,
    "a sweep of steps": of_network(lambda net, x, y: gb.step_size_sweep(net, x, y, [0.1, 1.0])),
}


@pytest.mark.parametrize("use", USES)
def test_the_device_is_made_current(use: str, device: StandInBackend, tmp_path: Path) -> None:
    USES[use](device, tmp_path)
    assert device.cupy.devices == [0] or use == "a stream"


def test_work_on_another_device_than_the_current_one_is_an_error_here(device: StandInBackend) -> None:
    x = device.zeros(3, "float32")
    with pytest.raises(AssertionError, match="while device 0 is current"):
        x += 1
