"""One flat buffer with named views."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
from hypothesis import given, strategies as st

import gpubatch as gb

SHAPES = {"W1": (4, 3), "b1": (3,), "scale": ()}


def test_views_share_the_buffer(backend: gb.Backend, dtype: np.dtype) -> None:
    p = gb.Parameters(SHAPES, backend, dtype)
    p["W1"] = 1.0
    p["b1"][...] = backend.asarray([2, 3, 4], dtype)
    p["scale"] = 5.0
    assert backend.to_numpy(p.flat).tolist() == [1.0] * 12 + [2.0, 3.0, 4.0, 5.0]
    assert (p.dtype, p.flat.dtype, p.size, p.shapes, list(p)) == (dtype, dtype, 16, SHAPES, list(SHAPES))
    assert p.grads.shapes == SHAPES
    p.grads.flat[...] = 7.0
    assert backend.to_numpy(p.grads["b1"]).tolist() == [7.0] * 3
    assert backend.owns(p.flat)
    assert backend.owns(p.grads.flat)


def test_values_are_copied_from_arrays(backend: gb.Backend) -> None:
    w = np.arange(6.0).reshape(2, 3)
    p = gb.Parameters({"W": w, "b": (3,)}, backend)
    w[...] = -1
    assert p["W"].dtype == np.float32
    assert backend.to_numpy(p["W"]).tolist() == [[0, 1, 2], [3, 4, 5]]


@given(st.dictionaries(st.text(min_size=1), st.lists(st.integers(0, 4), max_size=3).map(tuple), min_size=1, max_size=5))
def test_every_element_belongs_to_one_view(shapes: dict[str, tuple[int, ...]]) -> None:
    p = gb.Parameters(shapes, "cpu", "float64")
    p.flat[...] = np.arange(p.size)
    assert np.concatenate([v.ravel() for v in p.values()]).tolist() == list(range(p.size))
    assert all(np.shares_memory(v, p.flat) for v in p.values() if v.size)


@given(st.lists(st.integers(1, 40), min_size=2, max_size=6), st.sampled_from(["float16", "float32", "float64"]))
def test_a_networks_matrices_are_aligned(sizes: list[int], dtype: str) -> None:
    """Matrices with rows of multiples of 16 bytes start at such multiples, and there is no padding."""
    mixed = {"precision": "mixed"} if dtype == "float16" else {"dtype": dtype}
    p = gb.mlp([16, *sizes, 8], batch_norm=True, backend="cpu", **mixed).parameters
    assert p.dtype == dtype
    assert sum(view.size for view in p.values()) == p.flat.size
    for name, view in p.items():
        if view.shape[-1] * p.dtype.itemsize % 16 == 0:
            assert p.spans[name][0] * p.dtype.itemsize % 16 == 0, (name, p.spans)


def test_arrays_of_even_sizes_stay_in_the_order_of_the_layers() -> None:
    assert list(gb.mlp([784, 512, 256, 10], backend="cpu").parameters) == ["W1", "b1", "W2", "b2", "W3", "b3"]
    assert list(gb.mlp([8, 10, 16, 3], backend="cpu").parameters) == ["W1", "W2", "b2", "W3", "b1", "b3"]


def test_a_deep_copy_is_whole_and_apart(backend: gb.Backend) -> None:
    p = gb.Parameters({"W": np.ones((2, 3)), "b": (3,)}, backend)
    p.grads.flat[...] = 5.0
    twin = copy.deepcopy({"p": p})["p"]
    twin["W"] = 2.0
    twin.grads["b"] = 6.0
    assert backend.to_numpy(twin.flat).tolist() == [2.0] * 6 + [0.0] * 3
    assert backend.to_numpy(twin.grads.flat).tolist() == [5.0] * 6 + [6.0] * 3
    assert backend.to_numpy(p.flat).tolist() == [1.0] * 6 + [0.0] * 3
    assert backend.to_numpy(copy.deepcopy(p.grads).flat).tolist() == [5.0] * 9


def test_pickling_is_refused() -> None:
    net = gb.mlp([4, 3], backend="cpu")
    for x in (net.parameters, net.parameters.grads, net, gb.Adam(net.parameters)):
        with pytest.raises(gb.DTypeError, match=r"cannot be .*pickled"):
            pickle.dumps(x)
    with pytest.raises(gb.DTypeError, match="cannot be copied"):
        copy.deepcopy(gb.Adam(net.parameters))


def test_a_copied_network_trains_apart_and_alike() -> None:
    rng = np.random.default_rng(0)
    X, Y = rng.standard_normal((20, 4)).astype("float32"), rng.integers(0, 3, 20)
    net = gb.mlp([4, 8, 3], batch_norm=True, dropout=0.2, backend="cpu")
    gb.SGD(net.parameters, 0.1).step(net.loss_and_grad(X, Y)[1])
    twin = copy.deepcopy(net)
    before = net.parameters.flat.copy()
    for _ in range(3):
        gb.SGD(twin.parameters, 0.1).step(twin.loss_and_grad(X, Y)[1])
    np.testing.assert_array_equal(net.parameters.flat, before)
    for _ in range(3):
        gb.SGD(net.parameters, 0.1).step(net.loss_and_grad(X, Y)[1])
    np.testing.assert_array_equal(net.parameters.flat, twin.parameters.flat)
    assert net.loss(X, Y) == twin.loss(X, Y)


ERRORS = {
    "no shapes": (lambda: gb.Parameters({}, "cpu"), ValueError, "at least one parameter"),
    "a list": (lambda: gb.Parameters([(2, 3)], "cpu"), TypeError, "shapes must map names to shapes, got list"),
    "negative": (
        lambda: gb.Parameters({"W": (2, -1)}, "cpu"),
        ValueError,
        "shape of W must be an integer >= 0, got -1",
    ),
    "text": (lambda: gb.Parameters({"W": "23"}, "cpu"), TypeError, "shape of W must be a tuple of integers"),
    "type": (
        lambda: gb.Parameters(SHAPES, "cpu", "int32"),
        TypeError,
        "dtype must be float32 or float64 or float16, got 'int32'",
    ),
    "name": (lambda: gb.Parameters(SHAPES, "cpu")["W2"], KeyError, "no parameter 'W2'; there are W1, b1, scale"),
    "values": (
        lambda: gb.Parameters(SHAPES, "cpu").__setitem__("b1", np.zeros(4)),
        ValueError,
        r"values of b1 must have shape \(3,\) or \(\), got \(4,\)",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name: str) -> None:
    call, kind, message = ERRORS[name]
    with pytest.raises(kind, match=message):
        call()
