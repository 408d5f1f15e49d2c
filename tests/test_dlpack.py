"""Arrays of PyTorch and JAX come in and go out by DLPack: the same memory, not a copy of it."""

from __future__ import annotations

import types
from typing import Any

import numpy as np
import pytest
from needs import missing, peer
from stand_in import INDEX, queued_backend

import gpubatch as gb
import gpubatch.backend
from gpubatch.backend import available_backends, get_backend
from gpubatch.loader import Loader, epochs_of

X, Y = np.arange(24, dtype=np.float32).reshape(8, 3), np.arange(8) % 2


def torch_array(x: np.ndarray, where: str) -> Any:
    torch = peer("torch")
    if where != "cpu" and not torch.cuda.is_available():
        missing("peers", "PyTorch has no CUDA here")
    return torch.tensor(x, device=where)


def jax_array(x: np.ndarray, where: str) -> Any:
    jax = peer("jax")
    try:
        return jax.device_put(x, jax.devices("cpu" if where == "cpu" else "cuda")[0])
    except RuntimeError as error:
        missing("peers", f"JAX has no {where} here: {error}")


LIBRARIES = {"torch": torch_array, "jax": jax_array}


@pytest.fixture(params=LIBRARIES)
def library(request: pytest.FixtureRequest, backend: gb.Backend) -> Any:
    """A function that creates an array of a library on the device of ``backend``."""
    return lambda x: LIBRARIES[request.param](x, backend.spec)


def address(x: Any) -> int:
    for name in ("data_ptr", "unsafe_buffer_pointer"):
        if hasattr(x, name):
            return int(getattr(x, name)())
    return int(x.ctypes.data if isinstance(x, np.ndarray) else x.data.ptr)


def test_asarray_copies_nothing(library: Any, backend: gb.Backend) -> None:
    x = library(X)
    seen = backend.asarray(x)
    assert backend.owns(seen)
    assert address(seen) == address(x)
    np.testing.assert_array_equal(backend.to_numpy(seen), X)
    assert address(backend.asarray(x, "float32")) == address(x)
    np.testing.assert_array_equal(backend.to_numpy(backend.asarray(x, "float64")), X)


def test_a_loader_takes_batches_from_the_same_memory(library: Any, backend: gb.Backend) -> None:
    x, y = library(X), library(Y.astype(np.int32))
    loader = Loader(x, y, batch_size=3, shuffle=False, backend=backend)
    assert address(epochs_of(loader).columns[0].source.array) == address(x)
    found = [[backend.to_numpy(a) for a in batch] for batch in loader]
    np.testing.assert_array_equal(np.concatenate([a for a, _ in found]), X)
    np.testing.assert_array_equal(np.concatenate([b for _, b in found]), Y)
    assert address(loader.to_batch(x)) == address(x)


def test_parameters_take_copies(library: Any, backend: gb.Backend) -> None:
    x = library(X)
    p = gb.Parameters({"W": x}, backend)
    assert address(p["W"]) != address(x)
    p["W"] = 0
    p["W"] = backend.asarray(x)
    np.testing.assert_array_equal(backend.to_numpy(p["W"]), X)


def test_an_optimizer_changes_what_may_be_changed(library: Any, backend: gb.Backend) -> None:
    x, g = library(X), library(np.full_like(X, 2))
    if "jax" in type(x).__module__:
        with pytest.raises(gb.ArgumentError, match=r"params\['W'\] is read-only: an optimizer changes it in place"):
            gb.SGD({"W": x}, 0.5)
        x = backend.asarray(X.copy())  # its gradients are only read
    before = address(x)
    gb.SGD({"W": x}, 0.5).step({"W": g})
    assert address(x) == before
    np.testing.assert_array_equal(backend.to_numpy(backend.asarray(x)), X - 1)


def test_fit_takes_them(library: Any, backend: gb.Backend) -> None:
    histories = []
    for make in (library, lambda x: x):
        net = gb.mlp([3, 4, 2], backend=backend, seed=1)
        loader = Loader(make(X), make(Y.astype(np.int32)), batch_size=4, backend=backend)
        pair = make(X), make(Y.astype(np.int32))
        histories.append(gb.fit(net, loader, gb.SGD(net.parameters, 0.01), 2, validation=pair, progress=False))
    assert histories[0].step_loss == histories[1].step_loss
    assert histories[0].validation_loss == histories[1].validation_loss


def test_out_to_torch_without_a_copy(backend: gb.Backend) -> None:
    torch_array(X, backend.spec)
    p = gb.Parameters({"b": (5,), "W": (8, 3)}, backend)
    for mine in (p["W"], p.flat, p.grads["b"]):
        theirs = peer("torch").from_dlpack(mine)
        assert address(theirs) == address(mine)
        theirs += 3
        assert (backend.to_numpy(mine) == 3).all()
        p.flat[...] = 0


def test_out_to_jax(backend: gb.Backend) -> None:
    """Equal values; on the CPU, JAX copies arrays that are not aligned to 64 bytes."""
    jax_array(X, backend.spec)
    p = gb.Parameters({"b": (5,), "W": X}, backend)
    theirs = peer("jax").dlpack.from_dlpack(p["W"])
    np.testing.assert_array_equal(np.asarray(theirs), X)


def test_what_cannot_be_seen_says_why() -> None:
    torch, cpu = peer("torch"), get_backend("cpu")
    with pytest.raises(
        gb.DeviceMismatchError, match=r"cannot take a torch.Tensor without a copy: .* use tensor.detach"
    ):
        cpu.asarray(torch.zeros(3, requires_grad=True))
    with pytest.raises(gb.DeviceMismatchError, match="Unsupported dtype"):
        cpu.asarray(torch.zeros(3, dtype=torch.bfloat16))


# --- on a device, without one -----------------------------------------------------------------------------------------


class OnDevice:
    """A tensor of another library on a device; ``x`` is its array in CuPy."""

    def __init__(self, x: Any, kind: int = 2) -> None:
        self.x, self.kind = x, kind

    def __dlpack__(self, **options: Any) -> Any:
        raise AssertionError("by CuPy, or not at all")

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.kind, INDEX


@pytest.mark.parametrize("kind", [2, 13], ids=["device memory", "managed memory"])
def test_what_is_on_the_device_stays_there(kind: int, monkeypatch: pytest.MonkeyPatch) -> None:
    device = queued_backend("late", current_device=0)
    x = OnDevice(device.asarray(X), kind)
    monkeypatch.setattr(gpubatch.backend, "load_cupy", lambda: types.SimpleNamespace(from_dlpack=lambda f: f.x))
    assert device.asarray(x) is x.x
    loader = Loader(x, Y, batch_size=3, shuffle=False, backend=device)
    assert epochs_of(loader).columns[0].source.array is x.x
    found = [device.to_numpy(batch) for batch, _ in loader]
    np.testing.assert_array_equal(np.concatenate(found), X)


def test_a_tensor_of_another_device_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    device = queued_backend("late")

    class Elsewhere(type(device.asarray(X))):  # type: ignore[misc]
        device = types.SimpleNamespace(id=1)

    Elsewhere.__name__, Elsewhere.__module__ = "ndarray", "cupy"
    x = OnDevice(np.zeros(3).view(Elsewhere))
    monkeypatch.setattr(gpubatch.backend, "load_cupy", lambda: types.SimpleNamespace(from_dlpack=lambda f: f.x))
    with pytest.raises(gb.DeviceMismatchError, match="x must be an array on 'cuda:99', got"):
        device.asarray(x)


def test_what_jax_has_on_a_device_is_not_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device, NumPy's rule that unversioned arrays are read-only does not apply."""
    x = OnDevice(queued_backend("late").asarray(X))
    monkeypatch.setattr(gpubatch.backend, "load_cupy", lambda: types.SimpleNamespace(from_dlpack=lambda f: f.x))
    gb.SGD({"W": x}, 0.5)
    monkeypatch.setattr(OnDevice, "__module__", "jaxlib._jax")
    with pytest.raises(gb.ArgumentError, match=r"params\['W'\] is read-only"):
        gb.SGD({"W": x}, 0.5)


# --- on a real device -------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_a_tensor_that_another_stream_still_makes_is_waited_for() -> None:
    if "cuda:0" not in available_backends():
        missing("gpu", "no CUDA device can be used here")
    backend = get_backend("cuda:0")
    ones = torch_array(np.ones(1 << 24, np.float32), "cuda:0")
    torch = peer("torch")
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(50):
            ones += 1
        with backend.own_stream():
            total = float(backend.asarray(ones).sum() / ones.numel())
    assert total == 51


def test_an_optimizer_updates_the_parameters_of_a_module() -> None:
    torch = peer("torch")
    torch.manual_seed(0)
    module = torch.nn.Linear(3, 2)
    before = [p.detach().clone() for p in module.parameters()]
    opt = gb.SGD(module.parameters(), lr=0.5)
    module(torch.ones(4, 3)).sum().backward()
    opt.step([p.grad for p in module.parameters()])
    for p, old in zip(module.parameters(), before, strict=True):
        torch.testing.assert_close(p.detach(), old - 0.5 * p.grad)
        assert p.requires_grad
