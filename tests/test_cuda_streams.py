"""Streams, captures, the pool's limit and several devices, with CuPy on a device or the emulated one."""

from __future__ import annotations

import contextlib
import gc
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import emulated_gpu
import numpy as np
import pytest
from needs import missing

import gpubatch as gb
from gpubatch.backend import CudaBackend, available_backends, get_backend
from gpubatch.loader import Loader
from gpubatch.nn import core_of
from gpubatch.ops import SQUARE_SUM_SIZE

pytestmark = pytest.mark.gpu

# Elements: work on them takes longer than it takes to give the next one; the emulated device waits where it is told to.
LARGE = 1 << 12 if emulated_gpu.installed() else 1 << 26


def cuda(spec: str) -> CudaBackend:
    if spec not in available_backends():
        missing("gpu", f"{spec} cannot be used here")
    found = get_backend(spec)
    assert isinstance(found, CudaBackend)
    return found


@pytest.fixture
def device() -> CudaBackend:
    return cuda("cuda:0")


@pytest.fixture(params=["default", "another"])
def caller(request: pytest.FixtureRequest, device: CudaBackend) -> Iterator[Any]:
    """The current stream: the default one, or one that the default stream does not wait for."""
    if request.param == "default":
        yield device.current_stream()
        return
    with device.stream() as stream:
        yield stream


def test_own_stream_and_caller_s_wait_for_each_other(device: CudaBackend, caller: Any) -> None:
    x, y = device.zeros(LARGE, "float32"), device.zeros(LARGE, "float32")
    for _ in range(20):
        x += 1
    with device.own_stream():
        assert device.current_stream() != caller
        assert device.current_stream().is_non_blocking
        for _ in range(20):
            y += x
    y *= 2
    assert device.current_stream() == caller
    assert float(y.min()) == float(y.max()) == 800


def test_the_own_stream_is_kept_for_a_thread(device: CudaBackend) -> None:
    seen: list[int] = []

    def run() -> None:
        for _ in range(2):
            with device.own_stream(), get_backend("cuda:0").own_stream():  # type: ignore[attr-defined]
                seen.append(device.current_stream().ptr)

    run()
    assert device.current_stream().ptr not in seen
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen[0] == seen[1] != seen[2] == seen[3]


def trained(backend: gb.Backend, batch_size: int | str = 64, **options: Any) -> tuple[list[float], np.ndarray]:
    draw = np.random.default_rng(0)
    X, Y = draw.integers(0, 256, (512, 64)).astype(np.uint8), draw.integers(0, 10, 512)
    net = gb.mlp([64, 128, 10], backend=backend, seed=1)
    with backend.scope():
        net.parameters.flat *= 2
    loader = Loader(X, Y, batch_size=batch_size, scale=1 / 255, backend=backend)
    history = gb.fit(net, loader, gb.Adam(net.parameters), 3, progress=False, **options)
    with backend.scope():
        net.parameters.flat *= 3
    return history.step_loss, backend.to_numpy(net.parameters.flat)


def assert_alike(found: tuple[list[float], np.ndarray], expected: tuple[list[float], np.ndarray]) -> None:
    """Where a gradient is near zero, Adam's step may have either sign."""
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-3)
    assert np.quantile(np.abs(found[1] - expected[1]), 0.98) < 1e-3


def test_a_run_comes_after_and_before_work_on_the_caller_s_stream(device: CudaBackend, caller: Any) -> None:
    assert_alike(trained(device), trained(get_backend("cpu")))


def test_threads_train_at_once(device: CudaBackend) -> None:
    expected = trained(device)
    found: list[tuple[list[float], np.ndarray]] = []
    threads = [threading.Thread(target=lambda: found.append(trained(device))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3
    for each in found:
        assert_alike(each, expected)


def test_a_kernel_is_captured_and_replayed(device: CudaBackend) -> None:
    from gpubatch.ops import ops_for

    ops = ops_for(device, np.dtype(np.float32))
    x, sums = device.asarray(np.ones(1000, np.float32)), device.zeros(SQUARE_SUM_SIZE, "float64")

    def work() -> None:
        nonlocal x
        x += 1
        ops.square_sum(x, sums)

    with device.own_stream():
        work()  # loads the kernels
        graph = device.capture(work)
        assert not device.current_stream().is_capturing()
        assert float(x[0]) == 2
        pool = device.pool()
        before = pool.used_bytes(), pool.total_bytes()
        for _ in range(3):
            graph.launch()
        assert (pool.used_bytes(), pool.total_bytes()) == before
    assert float(x[0]) == 5
    assert float(device.to_numpy(sums)[0]) == 1000 * sum(n * n for n in (2, 3, 4, 5))
    with device.stream() as other:
        graph.launch(other)
        other.synchronize()
    assert float(x[0]) == 6


# What another thread may do, from its beginning to its end, while one captures.
MEANWHILE: dict[str, Callable[[CudaBackend], object]] = {
    "memory": lambda device: device.to_numpy(device.zeros(4, "float32")),
    "the end of all": lambda device: device.synchronize(),
    "the end of all on the own stream": lambda device: in_own_stream(device, device.synchronize),
    "memory given back": lambda device: [device.zeros(1 << 20, "uint8"), device.free_unused()],
    "a capture": lambda device: in_own_stream(device, lambda: device.capture(lambda: None).launch()),
    "a run": lambda device: assert_alike(trained(device), trained(get_backend("cpu"))),
    "a run whose batch size is found": lambda device: trained(device, "auto"),
    "a workspace given back": lambda device: core_of(of_a_network(device)).release(),
    "a step that leaves no trace": lambda device: of_a_network(device),
    "a batch size for any function": lambda device: gb.find_batch_size(
        lambda n: device.zeros(n, "u1"), 9, None, device
    ),
}


def in_own_stream(device: CudaBackend, work: Callable[[], object]) -> None:
    with device.own_stream():
        work()


def of_a_network(device: CudaBackend) -> gb.Network:
    net = gb.mlp([4, 3], backend=device)
    core_of(net).rehearse(device.zeros((8, 4), "float32"), device.zeros(8, "int64"))
    return net


@pytest.mark.parametrize("what", MEANWHILE)
def test_a_capture_and_what_another_thread_does_do_not_disturb_each_other(what: str, device: CudaBackend) -> None:
    x, started, ended, failures = device.zeros(4, "float32"), threading.Event(), threading.Event(), list[object]()

    def meanwhile() -> None:
        started.wait(60)
        try:
            MEANWHILE[what](device)
        except BaseException as error:
            failures.append(error)
        ended.set()

    def work() -> None:
        nonlocal x
        x += 1
        started.set()
        assert ended.wait(120), "the other thread waits for the capture"
        x += 1

    x += 1  # loads the captured kernel
    thread = threading.Thread(target=meanwhile, daemon=True)
    thread.start()
    with device.own_stream():
        graph = device.capture(work)
        thread.join()
        assert failures == []
        graph.launch()
        assert device.to_numpy(x).tolist() == [3] * 4


def test_any_stream_may_be_current_in_a_capture(device: CudaBackend, caller: Any) -> None:
    """The current stream is not captured, and may launch the graph, even if it is CUDA's default stream."""
    x = device.zeros(8, "float32")

    def work() -> None:
        nonlocal x
        captured = device.current_stream()
        with device.own_stream():  # changes nothing
            assert device.current_stream() == captured != caller
            x += 1

    x += 1
    graph = device.capture(work)
    assert device.current_stream() == caller
    graph.launch()
    graph.launch()
    assert device.to_numpy(x).tolist() == [3] * 8


REFUSED: dict[str, tuple[Callable[[CudaBackend, Any], object], type[BaseException], str]] = {
    "memory": (lambda device, x: device.zeros(3, "float32"), gb.CaptureError, "bytes of memory were asked for"),
    "a temporary": (lambda device, x: x + 1, gb.CaptureError, "bytes of memory were asked for"),
    "a value": (lambda device, x: x[0].item(), RuntimeError, "[Cc]aptur"),
    "a copy to the host": (lambda device, x: device.to_numpy(x), RuntimeError, "[Cc]aptur"),
    "the end of all": (lambda device, x: device.synchronize(), RuntimeError, "[Cc]aptur"),
    "the end of the device": (lambda d, x: d.cupy.cuda.runtime.deviceSynchronize(), RuntimeError, "[Cc]aptur"),
    "the end of the stream": (lambda d, x: d.current_stream().synchronize(), RuntimeError, "[Cc]aptur"),
    "a refusal that the work hides": (lambda device, x: hidden(device), RuntimeError, "[Cc]aptur"),
    "an error": (lambda device, x: {}["no such key"], KeyError, "no such key"),
    "an interrupt": (lambda device, x: (_ for _ in ()).throw(KeyboardInterrupt("now")), KeyboardInterrupt, "now"),
}


def hidden(device: CudaBackend) -> None:
    """Work that continues after a refusal gives no graph."""
    with contextlib.suppress(RuntimeError):
        device.synchronize()


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_captured_leaves_a_stream_that_works(case: str, device: CudaBackend) -> None:
    work, kind, message = REFUSED[case]
    x = device.zeros(8, "float32")
    with device.own_stream():
        x += 0

        def step() -> None:
            nonlocal x
            x += 1
            work(device, x)

        with pytest.raises(kind, match=message):
            device.capture(step)
        assert not device.current_stream().is_capturing()
        x += 2
        y = device.zeros(8, "float32")
        device.cupy.add(x, x, out=y)
        graph = device.capture(lambda: device.cupy.add(x, x, out=y))
        x += 1
        graph.launch()
    assert device.to_numpy(x).tolist() == [3] * 8
    assert device.to_numpy(y).tolist() == [6] * 8


@contextlib.contextmanager
def limit_of_pool(device: CudaBackend, free: int) -> Iterator[None]:
    """Limit CuPy's pool to so many bytes."""
    gc.collect()  # as CuPy's pool does at the limit; otherwise it would free memory of earlier tests
    device.free_unused()
    with device.scope():
        pool = device.cupy.get_default_memory_pool()
        limit = pool.get_limit()
        pool.set_limit(size=pool.used_bytes() + free)
    try:
        yield
    finally:
        with device.scope():
            pool.set_limit(size=limit)
    device.free_unused()


def test_the_limit_of_the_pool_is_kept_and_reached(device: CudaBackend) -> None:
    """Unused memory of another stream counts as available, and can be allocated."""
    with limit_of_pool(device, 64 << 20):
        assert device.memory().available == 64 << 20
        kept = device.zeros(48 << 20, "uint8")
        assert device.memory().available == 16 << 20
        del kept
        for make in (device.empty, device.zeros):
            with device.own_stream():
                x = make(52 << 20, "uint8")  # pieces of others' blocks may be in the way of a little more
                assert device.memory().available == 12 << 20
                with pytest.raises(MemoryError):
                    device.empty(24 << 20, "uint8")
                del x
            assert device.memory().available == 64 << 20


def test_a_batch_size_is_chosen_within_the_limit_of_the_pool(device: CudaBackend) -> None:
    draw = np.random.default_rng(0)
    data, plans = (draw.integers(0, 256, (2100, 3000)).astype(np.uint8), draw.integers(0, 10, 2100)), []
    for limited in (False, True):
        with limit_of_pool(device, plans[0].needed - 1 if limited else 256 << 20):
            net = gb.mlp([3000, 10], backend=device, seed=1)
            loader = Loader(*data, scale=1 / 255, backend=device)
            gb.fit(net, loader, gb.SGD(net.parameters, 0.1), 1, progress=False)
            plans.append(loader.plan)
            assert loader.plan.needed <= loader.plan.available
            del net, loader
    assert plans[1].batch_size < plans[0].batch_size
    assert plans[1].available < plans[0].needed


def test_memory_of_an_asynchronous_pool(device: CudaBackend) -> None:
    """Its unused memory is available, and its limit is no limit."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # that it is experimental, some versions of CuPy say
        pool = device.cupy.cuda.MemoryAsyncPool()
    with device.cupy.cuda.using_allocator(pool.malloc), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        before = device.memory()
        x = device.zeros(64 << 20, "uint8")
        after = device.memory()
        del x
        device.free_unused()
    assert after.total == before.total
    assert before.available > 1 << 20
    assert before.available - after.available > 32 << 20


@pytest.mark.parametrize("current", [0, 1])
def test_another_device_than_the_current_one(current: int, device: CudaBackend) -> None:
    if "cuda:1" not in available_backends():
        pytest.skip("there is one device")
    other = cuda(f"cuda:{1 - current}")
    with cuda(f"cuda:{current}").scope():
        found = trained(other)
        net = gb.mlp([4, 3], backend=other)
        assert all(a.device.id == other.index for a in net.state_dict()["parameters"].values())
        opt = gb.Adam(net.parameters)
        opt.load_state_dict(opt.state_dict())
        opt.step()
        assert device.cupy.cuda.Device().id == current
    assert_alike(found, trained(get_backend("cpu")))
