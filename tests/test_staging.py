"""What the host copies to a device may be changed or given back at once, however late the device reads it."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from families import every
from needs import missing
from stand_in import TIMINGS, queued_backend

import gpubatch as gb
from gpubatch import staging
from gpubatch.backend import CudaBackend
from gpubatch.loader.device import DeviceFeed, DeviceOrder, copy_to_device
from gpubatch.ops import update
from gpubatch.params import Parameters
from gpubatch.staging import Stages, stages_for


@pytest.fixture(params=[*TIMINGS, pytest.param("cuda:0", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> CudaBackend:
    if request.param in TIMINGS:
        return queued_backend(request.param)
    if "cuda:0" not in gb.available_backends():
        missing("gpu", "no CUDA device can be used here")
    found = gb.get_backend("cuda:0")
    assert isinstance(found, CudaBackend)
    return found


def assert_no_faults(device: CudaBackend) -> None:
    assert not getattr(device.cupy, "faults", None)


def order_of_a_feed(device: CudaBackend, values: np.ndarray) -> Any:
    feed = DeviceFeed(device, [(device.zeros((len(values), 2), "float32"), np.dtype("float32"), None)], len(values), 4)
    feed.begin(values)
    return feed._order


def order_of_an_epoch(device: CudaBackend, values: np.ndarray) -> Any:
    return DeviceOrder(device, values).part(0, len(values))


def data(device: CudaBackend, values: np.ndarray) -> Any:
    return copy_to_device(values, device)


def staged(device: CudaBackend, values: np.ndarray) -> Any:
    out = device.zeros(values.shape, values.dtype)
    stages_for(device, out).copy(values, out)
    return out


COPIES: dict[str, Callable[[CudaBackend, np.ndarray], Any]] = {
    "the order of a feed": order_of_a_feed,
    "the order of an epoch": order_of_an_epoch,
    "data that are moved": data,
    "an array": staged,
    "an array, by the backend": lambda device, values: device.asarray(values),
}


@pytest.mark.parametrize("size", [64, 1000, 8000, 8001])
def test_pieces_of_an_array_come_one_after_another(size: int, device: CudaBackend) -> None:
    """Each is whole until the next, however late the device copies; arrays that change afterwards change none."""
    values = np.random.default_rng(0).random(1000)
    with device.own_stream():
        array, stages, found = device.asarray(values), Stages(device, size, 3), bytearray()
        for _ in range(2):
            for piece in stages.pieces(array):
                found += piece.tobytes()
        array.fill(0)
    assert bytes(found) == 2 * values.tobytes()
    assert_no_faults(device)


@every("pieces", {"1": 1, "3": 3}, ["3"])
@pytest.mark.parametrize("what", COPIES)
def test_what_was_copied_may_be_changed(
    what: str, pieces: int, device: CudaBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging, "PIECE", -(-8 * 1000 // pieces))
    values = np.arange(1000)
    with device.own_stream():
        busy = device.zeros(1 << 16, np.float32)
        for _ in range(100):  # so that a device has something to do first
            busy += 1
        found = COPIES[what](device, values)
        values[:] = -1
        gc.collect()
        taken = [device.pinned(1 << 10, np.dtype(np.uint8)) for _ in range(40)]  # memory that was freed, if any
        for memory in taken:
            memory[:] = 0xFF
        np.testing.assert_array_equal(device.to_numpy(found), np.arange(1000))
    assert_no_faults(device)


@pytest.mark.parametrize("how", ["strided", "of another byte order", "one large row"])
def test_an_array_of_any_form_is_copied(how: str, device: CudaBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "PIECE", 1 << 8)
    values = np.arange(4000.0).reshape(40, 100)
    given = {
        "strided": values.T,
        "of another byte order": values.astype(">f8"),
        "one large row": values.reshape(1, -1),
    }[how]
    copy = copy_to_device(given, device)
    np.testing.assert_array_equal(device.to_numpy(copy), given)
    assert_no_faults(device)


def test_steps_have_their_own_scalars_however_far_the_host_is_ahead(device: CudaBackend) -> None:
    """More steps than there are pieces, each with another learning rate."""
    found = []
    for backend in (device, gb.get_backend("cpu")):
        params = Parameters({"w": (8,)}, backend, np.dtype(np.float32))
        opt = gb.SGD(params, lr=0.0)
        with backend.own_stream(), backend.scope():
            params.flat.fill(1)
            params.grads.flat.fill(1)
            for step in range(2 * update.UPLOADS + 9):
                opt.lr = 1.0 / (1 + step)
                opt.step()
            found.append(backend.to_numpy(params.flat))
    np.testing.assert_allclose(*found, rtol=1e-5)
    assert_no_faults(device)


def test_a_piece_is_written_when_the_copy_from_it_is_over() -> None:
    device = queued_backend("late")
    stages = Stages(device, 8, 2)
    out = [device.zeros(1, np.int64) for _ in range(5)]
    for number, array in enumerate(out):
        stages.copy(np.array([number]), array)
    assert [int(device.to_numpy(array)[0]) for array in out] == list(range(5))


def test_pieces_are_given_back_after_the_copies_from_them() -> None:
    device = queued_backend("late")
    out = device.zeros(1, np.int64)
    Stages(device, 8, 2).copy(np.array([7]), out)
    gc.collect()
    assert device.to_numpy(out).tolist() == [7]
    assert_no_faults(device)


def test_a_copy_from_memory_that_may_change_is_a_fault() -> None:
    """The stand-in records it, and all tests check its faults."""
    device = queued_backend("late")
    device.zeros(3, np.float32).set(np.ones(3, np.float32))
    assert device.cupy.faults == ["memory was copied that is not pinned, so it may change before it is read"]
