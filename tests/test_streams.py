"""The order of work on streams, and work that is captured, on a device whose streams choose badly."""

from __future__ import annotations

import gc
import threading
from typing import Any

import numpy as np
import pytest
from families import marks
from stand_in import TIMINGS, Event, QueuedStandIn, StandInBackend, Stream, queued_backend

import gpubatch as gb
from gpubatch.nn import core_of


@pytest.fixture(params=[pytest.param(timing, marks=marks(timing in ("late", "early"))) for timing in TIMINGS])
def device(request: pytest.FixtureRequest) -> StandInBackend:
    return queued_backend(request.param)


# --- the own stream -------------------------------------------------------------------------------------------------


def handed_over(device: StandInBackend, leave: type[BaseException] | None = None, caller: Any = None) -> bool:
    """Whether own and caller's stream see each other's work, before and after, twice; ``leave`` is raised inside."""
    caller, seen = caller or device.current_stream(), []
    with caller:
        for _ in range(2):
            x, y = device.zeros(4, np.float32), device.zeros(4, np.float32)
            x += 1
            try:
                with device.own_stream():
                    assert device.current_stream() is not caller
                    y += x
                    y *= 3
                    if leave is not None:
                        raise leave
            except BaseException as error:
                assert type(error) is leave  # noqa: PT017
            assert device.current_stream() is caller
            y += 1
            seen.append(device.to_numpy(y).tolist() == [4] * 4)
    return all(seen)


@pytest.mark.parametrize("leave", [None, ValueError, KeyboardInterrupt])
def test_work_on_the_own_stream_is_between_that_of_the_caller(
    leave: type[BaseException] | None, device: StandInBackend
) -> None:
    assert handed_over(device, leave)
    assert handed_over(device, leave, device.stream())


@pytest.mark.parametrize("who", ["the own stream", "the caller's"])
def test_each_of_the_two_must_wait(who: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without either wait, some order of the streams' work gives a wrong result."""

    def wait(self: Stream, event: Event) -> None:
        if (self is self.cupy.get_current_stream()) != (who == "the caller's"):
            original(self, event)

    assert all(handed_over(queued_backend(timing)) for timing in TIMINGS)
    original = Stream.wait_event
    monkeypatch.setattr(Stream, "wait_event", wait)
    assert not all(handed_over(queued_backend(timing)) for timing in TIMINGS)


def test_the_cpu_has_no_streams() -> None:
    with gb.get_backend("cpu").own_stream():
        pass


# --- a training run -------------------------------------------------------------------------------------------------

RNG = np.random.default_rng(3)
X, Y = RNG.integers(0, 256, (40, 7)).astype(np.uint8), RNG.integers(0, 5, 40)


def trained(backend: Any, batch_size: int | str = 8, **options: Any) -> tuple[list[float], np.ndarray]:
    """The costs of a run between two changes of the parameters on the caller's stream, and the parameters."""
    net = gb.mlp([7, 9, 5], backend=backend, seed=1)
    net.parameters.flat *= 2
    loader = gb.Loader(X, Y, batch_size=batch_size, scale=1 / 255, backend=backend)
    history = gb.fit(net, loader, gb.Adam(net.parameters, 0.01), 2, progress=False, **options)
    net.parameters.flat *= 3
    return history.step_loss + history.validation_loss, net.backend.to_numpy(net.parameters.flat)


def follows_the_cpu(device: StandInBackend, **options: Any) -> bool:
    """Whether the run equals the CPU's, without faults."""
    expected, found = trained("cpu", **options), trained(device, **options)
    return not device.cupy.faults and all(map(close, found, expected))


def close(a: Any, b: Any) -> bool:
    return np.shape(a) == np.shape(b) and np.allclose(a, b, rtol=1e-4, atol=1e-6)


def test_fit_works_on_its_own_stream_and_on_nothing_else(device: StandInBackend) -> None:
    seen = []

    class Look:
        def on_step(self, state: Any) -> None:
            seen.append(device.current_stream())

        def on_epoch(self, state: Any) -> None:
            seen.append(device.current_stream())
            if len(seen) == 6:
                trained(device)  # one inside the other
                seen.append(device.current_stream())

    trained(device, callbacks=[Look()])
    assert len(seen) == 13
    assert seen[0] is not device.cupy.null
    assert set(seen) == {seen[0]}
    assert device.current_stream() is device.cupy.null


def test_fit_waits_for_the_caller_and_the_caller_for_fit(device: StandInBackend) -> None:
    assert follows_the_cpu(device)
    assert follows_the_cpu(device, validation=(X[:9], Y[:9]))


@pytest.mark.filterwarnings("ignore::gpubatch.SkippedStepWarning")
@pytest.mark.parametrize("who", ["the own stream", "the caller's"])
def test_without_either_wait_a_run_is_wrong(who: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def wait(self: Stream, event: Event) -> None:
        assert event.ticket is not None
        waiting = self if who == "the caller's" else event.ticket.stream
        if waiting is not self.cupy.null:
            original(self, event)

    original = Stream.wait_event
    monkeypatch.setattr(Stream, "wait_event", wait)
    assert not all(follows_the_cpu(queued_backend(timing)) for timing in TIMINGS)


def test_an_interrupted_run_can_be_looked_at(device: StandInBackend) -> None:
    net = gb.mlp([7, 9, 5], backend=device, seed=1)
    loader = gb.Loader(X, Y, batch_size=8, scale=1 / 255, backend=device)

    class Interrupt:
        def on_step(self, state: Any) -> None:
            if state.step == 3:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gb.fit(net, loader, gb.Adam(net.parameters, 0.01), 2, callbacks=[Interrupt()], progress=False)
    assert device.current_stream() is device.cupy.null
    on_cpu = gb.mlp([7, 9, 5], backend="cpu", seed=1)
    opt, batches = gb.Adam(on_cpu.parameters, 0.01), iter(gb.Loader(X, Y, batch_size=8, scale=1 / 255, backend="cpu"))
    for _ in range(3):
        opt.step(on_cpu.loss_and_grad(*next(batches))[1])
    assert close(device.to_numpy(net.parameters.flat), on_cpu.parameters.flat)


GIVEN_BACK = {
    "a larger batch": lambda net, x, y: net.reserve(len(x)),
    "a larger evaluation": lambda net, x, y: net.scores(x),
    "all of it": lambda net, x, y: core_of(net).release(),
}


@pytest.mark.parametrize("how", GIVEN_BACK)
def test_a_workspace_that_is_given_back_is_not_in_use(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise another thread could allocate it on the default stream while the own stream still uses it."""
    watched, seen = list[Stream](), []

    def given_back(self: QueuedStandIn, memory: np.ndarray, stream: Stream) -> None:
        if stream is self.null:
            seen.extend(len(other.queue) for other in watched)
        original(self, memory, stream)

    original = QueuedStandIn.given_back
    monkeypatch.setattr(QueuedStandIn, "given_back", given_back)
    device = queued_backend("late")
    net = gb.mlp([7, 9, 5], backend=device, seed=1)
    x, y = device.asarray(X / np.float32(255), np.float32), device.asarray(Y)
    net.loss_and_grad(x[:4], y[:4])
    net.scores(x[:4])
    with device.own_stream():
        net.scores(x[4:8])
        net.step_loss(x[4:8], y[4:8])
        watched.append(device.current_stream())
        assert watched[0].queue
        GIVEN_BACK[how](net, x, y)
        gc.collect()
    assert len(seen) == (6 if how == "all of it" else 3)  # labels as int64, the workspace, its counter
    assert not any(seen)


# --- pools of memory ------------------------------------------------------------------------------------------------

KIB = 1024


class AsyncPool:
    """The part of CuPy's MemoryAsyncPool that memory() uses; its limit is no limit."""

    freed = 0

    def malloc(self, size: int) -> None:
        pass

    def free_bytes(self) -> int:
        return 5 * KIB

    def get_limit(self) -> int:
        return 1

    def free_all_blocks(self) -> None:
        self.freed += 1


def test_memory_with_another_allocator_is_that_of_its_pool_or_of_the_device() -> None:
    device, pool = queued_backend("late"), AsyncPool()
    cupy, total = device.cupy, 1 << 30
    kept = device.zeros(60 * KIB, np.uint8)
    del kept
    assert device.memory() == gb.Memory(total, total)
    cupy.allocator = pool.malloc
    assert device.memory() == gb.Memory(total, total - 60 * KIB + 5 * KIB)  # the default pool keeps its own
    cupy.allocator = lambda size: None
    assert device.memory() == gb.Memory(total, total - 60 * KIB)
    device.free_unused()
    assert device.memory() == gb.Memory(total, total)
    cupy.allocator = pool.malloc
    device.free_unused()
    assert pool.freed == 1


# --- captured work --------------------------------------------------------------------------------------------------


def test_all_is_done_after_it_was_waited_for() -> None:
    """On the default stream, the current one, and gpubatch's in any thread; the last one is not waited for."""
    device = queued_backend("late")
    threads = device.stream(), device.stream()
    users = device.cupy.new_stream(non_blocking=True)
    ended, left = threading.Event(), threading.Event()
    queues = [device.cupy.null, *threads, users]

    def elsewhere() -> None:
        with device.own_stream():
            queues.append(device.current_stream())
            device.zeros(4, np.float32)
            ended.set()
            assert left.wait(60)

    for stream in queues:
        with stream:
            device.zeros(4, np.float32)
    thread = threading.Thread(target=elsewhere)
    thread.start()
    assert ended.wait(60)
    assert all(stream.done < stream.given for stream in queues)
    device.synchronize()
    assert [stream.done == stream.given for stream in queues] == [True, True, True, False, True]
    with users:
        device.synchronize()
    assert users.done == users.given
    left.set()
    thread.join()


def test_garbage_waits_for_the_end_of_a_capture(device: StandInBackend) -> None:
    seen = []
    with device.own_stream():
        device.capture(lambda: seen.append(gc.isenabled()))
        with pytest.raises(KeyError):
            device.capture(lambda: {}[0])
    assert seen == [False]
    assert gc.isenabled()


@pytest.mark.parametrize("enabled", [True, False])
def test_garbage_waits_for_the_last_of_two_captures(enabled: bool) -> None:
    """The garbage collector is shared by the process: the end of one capture must not enable it for the other."""
    device = queued_backend("late")
    inside, left, seen = threading.Event(), threading.Event(), list[bool]()

    def second() -> None:
        seen.append(gc.isenabled())
        inside.set()
        assert left.wait(60)
        seen.append(gc.isenabled())

    def first() -> None:
        thread.start()
        assert inside.wait(60)

    thread = threading.Thread(target=lambda: device.capture(second))
    (gc.enable if enabled else gc.disable)()
    try:
        device.capture(first)
        left.set()
        thread.join()
        assert seen == [False, False]
        assert gc.isenabled() == enabled
    finally:
        gc.enable()
