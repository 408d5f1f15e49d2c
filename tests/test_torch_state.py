"""Parameters of a network to and from PyTorch's modules, which compute the same scores."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from needs import peer

import gpubatch as gb
from gpubatch.backend import Backend

torch = peer("torch")
import gpubatch.torch as gt  # noqa: E402  imports torch

TOLERANCE = {"float32": 1e-6, "float64": 1e-12}


def network(dtype: Any, seed: int = 0, **options: Any) -> gb.Network:
    layers = [
        *(gb.Dense(5, 7), gb.BatchNorm(7, eps=1e-3), gb.GELU()),
        *(gb.Dropout(0.5), gb.Dense(7, 6, bias=False), gb.LeakyReLU(0.1)),
        *(gb.BatchNorm(6), gb.Tanh(), gb.Dense(6, 3)),
    ]
    return gb.Network(layers, dtype=dtype, seed=seed, **options)


def module(dtype: Any) -> Any:
    nn = torch.nn
    return nn.Sequential(
        *(nn.Linear(5, 7), nn.BatchNorm1d(7, eps=1e-3), nn.GELU()),
        *(nn.Dropout(0.5), nn.Linear(7, 6, bias=False), nn.LeakyReLU(0.1)),
        *(nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)),
    ).to(getattr(torch, np.dtype(dtype).name))


class Named(torch.nn.Module):
    """Modules with names of their own, within another."""

    def __init__(self) -> None:
        torch.nn.Module.__init__(self)
        self.body = torch.nn.ModuleDict({"first": torch.nn.Linear(4, 3), "norm": torch.nn.BatchNorm1d(3)})
        self.head = torch.nn.Linear(3, 2)

    def forward(self, x: Any) -> Any:
        return self.head(self.body["norm"](self.body["first"](x)))


def trained(net: gb.Network, rng: np.random.Generator) -> gb.Network:
    """A few steps, so that running statistics are not what they began with."""
    opt, put = gb.SGD(net.parameters, lr=0.1), net.backend.asarray
    for _ in range(3):
        X = put(rng.standard_normal((20, net.inputs)).astype(net.dtype))
        opt.step(net.loss_and_grad(X, put(rng.integers(0, net.outputs, 20)))[1])
    return net


def scores_of(model: Any, X: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model.eval()(torch.from_numpy(X)).numpy()


def test_a_module_takes_the_state_and_computes_the_same(
    backend: Backend, dtype: np.dtype, rng: np.random.Generator
) -> None:
    if backend.name == "cuda" and not torch.cuda.is_available():
        pytest.skip("PyTorch has no CUDA here")
    net, model = trained(network(dtype, backend=backend), rng), module(dtype)
    state = gt.to_state_dict(net)
    assert list(state) == list(model.state_dict())
    model.load_state_dict(state)
    assert int(state["1.num_batches_tracked"]) == 3
    X = rng.standard_normal((40, 5)).astype(dtype)
    expected = backend.to_numpy(net.scores(backend.asarray(X)))
    np.testing.assert_allclose(scores_of(model, X), expected, rtol=0, atol=TOLERANCE[dtype.name])
    before = expected.copy()
    state["0.weight"][...] = 0  # a copy
    np.testing.assert_array_equal(backend.to_numpy(net.scores(backend.asarray(X))), before)


def test_a_network_takes_the_state_of_a_module(backend: Backend, dtype: np.dtype, rng: np.random.Generator) -> None:
    model, net = module(dtype), network(dtype, seed=1, backend=backend)
    for _ in range(3):
        model.train()(torch.from_numpy(rng.standard_normal((20, 5)).astype(dtype)))
    gt.from_state_dict(net, model.state_dict())
    X = rng.standard_normal((40, 5)).astype(dtype)
    found = backend.to_numpy(net.scores(backend.asarray(X)))
    np.testing.assert_allclose(found, scores_of(model, X), rtol=0, atol=TOLERANCE[dtype.name])


def test_modules_may_have_any_names(rng: np.random.Generator) -> None:
    net = trained(gb.Network([gb.Dense(4, 3), gb.BatchNorm(3), gb.Dense(3, 2)], backend="cpu"), rng)
    model = Named()
    model.load_state_dict(gt.to_state_dict(net, ["body.first", "body.norm", "head"]))
    other = gb.Network([gb.Dense(4, 3), gb.BatchNorm(3), gb.Dense(3, 2)], backend="cpu", dtype="float64", seed=5)
    gt.from_state_dict(other, model.state_dict())
    X = rng.standard_normal((9, 4)).astype("float32")
    np.testing.assert_allclose(scores_of(model, X), net.scores(X), rtol=0, atol=1e-6)
    np.testing.assert_array_equal(other.parameters["W1"], net.parameters["W1"])
    gt.from_state_dict(other, {key: value.numpy() for key, value in model.half().state_dict().items()})
    np.testing.assert_array_equal(other.parameters["W1"], net.parameters["W1"].astype("float16"))
    gt.from_state_dict(other, model.bfloat16().state_dict())


class Own(gb.ReLU):
    """A layer with a parameter that PyTorch has no module for."""

    def needs(self, features: int) -> gb.Needs:
        return gb.Needs(features, {"s": gb.Parameter((features,), 1.0)})


def test_what_does_not_fit_is_refused_and_changes_nothing() -> None:
    net = network("float32", backend="cpu")
    before = net.parameters.flat.copy()
    state = module("float32").state_dict()
    wrong = {
        "3 modules": ({k: v for k, v in state.items() if not k.startswith("8")}, "state must have 5 modules"),
        "a bias": (state | {"4.bias": torch.zeros(6)}, r"4 of state has weight, bias, layer 5 \(Dense\) needs weight"),
        "a shape": (state | {"8.weight": torch.zeros(3, 7)}, r"8.weight has shape \(3, 7\), layer 9 .* needs \(3, 6\)"),
        "no mapping": ([1], "state must be a state_dict"),
    }
    for given, message in wrong.values():
        with pytest.raises((gb.ArgumentError, gb.DTypeError), match=message):
            gt.from_state_dict(net, given)
    np.testing.assert_array_equal(net.parameters.flat, before)
    with pytest.raises(gb.ArgumentError, match=r"layer 2 \(Own\) has parameters and no module of PyTorch"):
        gt.to_state_dict(gb.Network([gb.Dense(3, 3), Own()], backend="cpu"))
    with pytest.raises(gb.ArgumentError, match="names must be 5 different ones"):
        gt.to_state_dict(net, ["a", "b"])
    with pytest.raises(gb.DTypeError, match=r"net must be a gpubatch\.Network"):
        gt.to_state_dict(3)


def test_tensors_are_on_the_device_of_the_network_whatever_the_default_is() -> None:
    with torch.device("meta"):
        state = gt.to_state_dict(network("float32"))
    assert {x.device.type for x in state.values()} == {"cpu"}
