"""The order of work on streams, and work that is captured, on a device whose streams choose badly."""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from families import marks
from stand_in import TIMINGS, CUDARuntimeError, Event, QueuedStandIn, StandInBackend, Stream, queued_backend
from stand_in_lt import StandInLt

import gpubatch as gb


@pytest.fixture(params=[pytest.param(timing, marks=marks(timing in ("late", "early"))) for timing in TIMINGS])
def device(request: pytest.FixtureRequest) -> StandInBackend:
    return queued_backend(request.param)


# --- a stream of its own --------------------------------------------------------------------------------------------


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
    """Without either wait the result is wrong for some order of the streams' work."""

    def wait(self: Stream, event: Event) -> None:
        if (self is self.cupy.get_current_stream()) != (who == "the caller's"):
            original(self, event)

    assert all(handed_over(queued_backend(timing)) for timing in TIMINGS)
    original = Stream.wait_event
    monkeypatch.setattr(Stream, "wait_event", wait)
    assert not all(handed_over(queued_backend(timing)) for timing in TIMINGS)


def test_the_own_stream_is_kept_and_one_inside_the_other_changes_nothing(device: StandInBackend) -> None:
    seen = []
    for _ in range(2):
        with device.own_stream():
            seen.append(device.current_stream())
            events = len(device.cupy.events)
            with gb.get_backend(device).own_stream():
                seen.append(device.current_stream())
            assert len(device.cupy.events) == events
    assert seen == [seen[0]] * 4
    assert seen[0] is not device.cupy.null
    assert device.current_stream() is device.cupy.null


def test_each_thread_has_its_own(device: StandInBackend) -> None:
    seen: list[Any] = []

    def run() -> None:
        with device.own_stream():
            seen.append(device.current_stream())

    run()
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen[0] is not seen[1]


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
    """Whether it has the same run, and no fault in it."""
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
    "a larger batch": lambda net, x, y: net.plan(len(x)),
    "a larger evaluation": lambda net, x, y: net.scores(x),
    "all of it": lambda net, x, y: net.release(),
}


@pytest.mark.parametrize("how", GIVEN_BACK)
def test_a_workspace_that_is_given_back_is_not_in_use(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread could take it on the default stream, at once, while the own stream works in it."""
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


def test_two_threads_train_at_once(device: StandInBackend) -> None:
    good: list[bool] = []
    threads = [threading.Thread(target=lambda: good.append(follows_the_cpu(device))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert good == [True, True]


# --- pools of memory ------------------------------------------------------------------------------------------------

KIB = 1024


def test_memory_that_is_kept_for_another_stream_counts_and_can_be_had(device: StandInBackend) -> None:
    """Under a limit CuPy's pool gives nothing back by itself."""
    device.cupy.pool.limit = 100 * KIB
    held = device.zeros(30 * KIB, np.uint8)
    kept = device.zeros(60 * KIB, np.uint8)
    del kept
    assert device.memory() == gb.Memory(1 << 30, 70 * KIB)
    for make in (device.empty, device.zeros):
        with device.own_stream():
            x = make(70 * KIB, np.uint8)
            assert device.memory().available == 0
            del x
        assert device.memory().available == 70 * KIB
    with device.own_stream():
        x = device.asarray(np.ones(70 * KIB, np.uint8))
        with pytest.raises(MemoryError, match="Out of memory allocating 1024 bytes"):
            device.zeros(KIB, np.uint8)
    assert device.to_numpy(x).sum() == 70 * KIB
    assert device.to_numpy(held).sum() == 0


def test_a_batch_size_is_chosen_within_the_limit_of_the_pool() -> None:
    many, plans = (np.tile(X, (100, 1)), np.tile(Y, 100)), []
    for share in (None, 0.7):
        device = queued_backend("late")
        device.cupy.pool.limit = int(share * plans[0].needed) if share else 0
        net = gb.mlp([7, 9, 5], backend=device, seed=1)
        loader = gb.Loader(*many, scale=1 / 255, backend=device)
        gb.fit(net, loader, gb.SGD(net.parameters, 0.1), 1, progress=False)
        plans.append(loader.plan)
    assert plans[0].batch_size == 512
    assert plans[1].batch_size < 512
    assert plans[1].needed <= plans[1].available <= device.cupy.pool.limit


class AsyncPool:
    """What memory() may ask of CuPy's MemoryAsyncPool, of which the limit is none."""

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


def test_captured_work_is_done_at_each_launch_as_one(device: StandInBackend) -> None:
    x, y = device.zeros(4, np.float32), device.zeros(4, np.float32)

    def work() -> None:
        nonlocal x
        x += 1
        np.multiply(x, x, out=y)

    with device.own_stream():
        graph = device.capture(work)
        assert not device.current_stream().is_capturing()
        assert device.to_numpy(x).tolist() == [0] * 4  # not done
        before = device.cupy.allocations, device.cupy.synchronisations, len(device.cupy.copies)
        for _ in range(3):
            graph.launch()
        assert (device.cupy.allocations, device.cupy.synchronisations, len(device.cupy.copies)) == before
    assert device.cupy.graph_launches == 3
    assert device.to_numpy(x).tolist() == [3] * 4
    assert device.to_numpy(y).tolist() == [9] * 4
    with device.stream() as other:
        other.synchronize()
        graph.launch(other)
        other.synchronize()
    assert device.to_numpy(y).tolist() == [16] * 4


@pytest.mark.parametrize("current", ["default", "own", "another"])
def test_any_stream_may_be_current(current: str, device: StandInBackend) -> None:
    """It is not the one that is captured, and the graph may be launched on another one."""
    of = {"default": contextlib.nullcontext, "own": device.own_stream, "another": device.stream}
    with of[current]():
        x = device.zeros(4, np.float32)
        before = device.current_stream()
        inside: list[Stream] = []

        def work() -> None:
            nonlocal x
            inside.append(device.current_stream())
            with device.own_stream():  # changes nothing
                inside.append(device.current_stream())
                x += 1

        graph = device.capture(work)
        assert device.current_stream() is before
        assert inside[0] is inside[1] is not before
        with device.own_stream():
            assert device.current_stream() not in inside
            graph.launch()
        assert device.to_numpy(x).tolist() == [1] * 4


REFUSED = {
    "memory": (lambda device, x: device.zeros(3, np.float32), gb.CaptureError, "12 bytes of memory were asked for"),
    "a temporary": (lambda device, x: x + 1, gb.CaptureError, "16 bytes of memory were asked for"),
    "a value": (lambda device, x: x[0].item(), CUDARuntimeError, "the host waits"),
    "a copy to the host": (lambda device, x: device.to_numpy(x), CUDARuntimeError, "the host waits"),
    "a copy from the host": (lambda device, x: x.set(np.ones(4, np.float32)), CUDARuntimeError, "a copy from the host"),
    "the end of all": (lambda device, x: device.synchronize(), CUDARuntimeError, "the host waits"),
    "the end of a stream": (lambda d, x: d.current_stream().synchronize(), CUDARuntimeError, "the host waits"),
    "the own stream's end": (lambda d, x: d.cupy.null.synchronize(), CUDARuntimeError, "the host waits"),
    "an event": (lambda device, x: device.current_stream().record(device.event()), CUDARuntimeError, "an event"),
    "an error": (lambda device, x: {}["no such key"], KeyError, "no such key"),
    "an interrupt": (lambda device, x: (_ for _ in ()).throw(KeyboardInterrupt("now")), KeyboardInterrupt, "now"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_captured_is_told_and_nothing_is_left_of_it(case: str, device: StandInBackend) -> None:
    work, kind, message = REFUSED[case]
    x = device.zeros(4, np.float32)

    def step() -> None:
        nonlocal x
        x += 1
        work(device, x)

    with device.own_stream():
        with pytest.raises(kind, match=message):
            device.capture(step)
        assert not device.current_stream().is_capturing()
        assert device.to_numpy(x).tolist() == [0] * 4
        x += 2
        y = device.zeros(4, np.float32)
        graph = device.capture(lambda: np.add(x, x, out=y))
        graph.launch()
    assert device.to_numpy(y).tolist() == [4] * 4


def test_what_broke_a_capture_is_not_lost(device: StandInBackend) -> None:
    """Work that goes on after a refusal gives no graph."""

    def step() -> None:
        with pytest.raises(CUDARuntimeError):
            device.synchronize()

    with device.own_stream(), pytest.raises(CUDARuntimeError, match="Invalidated"):
        device.capture(step)


def test_memory_that_a_graph_uses_is_not_its_own(device: StandInBackend) -> None:
    """Of arrays that are gone the stand-in gives NaN, so that a test can tell."""
    x, y = device.zeros(4, np.float32), device.zeros(4, np.float32)
    with device.own_stream():
        graph = device.capture(lambda z=x: np.add(z, 1, out=y))
        graph.launch()
        assert device.to_numpy(y).tolist() == [1] * 4
        del x
        device.synchronize()  # the next work of its stream
        graph.launch()
        assert np.isnan(device.to_numpy(y)).all()


# What another thread may do while one captures; no module of the first one is needed before.
MEANWHILE: dict[str, Callable[[StandInBackend], object]] = {
    "memory": lambda device: device.to_numpy(device.zeros(4, np.float32)),
    "the end of all": lambda device: device.synchronize(),
    "the end of all on the own stream": lambda device: in_own_stream(device, device.synchronize),
    "memory given back": lambda device: device.free_unused(),
    "a capture": lambda device: in_own_stream(device, lambda: device.capture(lambda: None).launch()),
    "a run": follows_the_cpu,
    "a run whose batch size is found": lambda device: trained(device, "auto"),
    "a workspace given back": lambda device: of_a_network(device, lambda net: net.release()),
    "a step that leaves no trace": lambda device: of_a_network(device, lambda net: None),
    "a batch size for any function": lambda device: gb.find_batch_size(
        lambda n: device.zeros(n, "u1"), 9, None, device
    ),
}


def in_own_stream(device: StandInBackend, work: Callable[[], object]) -> None:
    with device.own_stream():
        work()


def of_a_network(device: StandInBackend, work: Callable[[gb.Network], object]) -> None:
    net = gb.mlp([7, 9, 5], backend=device)
    net.rehearse(device.asarray(X / np.float32(255), np.float32), device.asarray(Y))
    work(net)


def while_captured(device: StandInBackend, do: Callable[[], object]) -> list[float]:
    """Do something in another thread, from its beginning to its end within a capture; what the graph then makes."""
    x, started, ended = device.zeros(4, np.float32), threading.Event(), threading.Event()
    failures: list[BaseException] = []

    def meanwhile() -> None:
        assert started.wait(60)
        try:
            do()
        except BaseException as error:
            failures.append(error)
        ended.set()

    def work() -> None:
        nonlocal x
        x += 1
        started.set()
        assert ended.wait(60), "the other thread waits for the capture"
        x += 1

    thread = threading.Thread(target=meanwhile, daemon=True)
    thread.start()
    graph = device.capture(work)
    thread.join()
    if failures:
        raise failures[0]
    assert device.to_numpy(x).tolist() == [0] * 4
    graph.launch()
    return device.to_numpy(x).tolist()


@pytest.mark.parametrize("what", MEANWHILE)
def test_a_capture_and_what_another_thread_does_do_not_disturb_each_other(what: str, device: StandInBackend) -> None:
    device.cupy.nvmath = StandInLt(device.cupy)  # so that runs are captured too
    with device.own_stream():
        assert while_captured(device, lambda: MEANWHILE[what](device)) == [2] * 4
    assert not device.cupy.faults


def test_nobody_may_wait_for_the_whole_device_while_anything_is_captured() -> None:
    """Why gpubatch waits for streams: both threads would fail."""
    device = queued_backend("late")
    seen: list[BaseException] = []

    def wait() -> None:
        try:
            with device.scope():
                device.cupy.cuda.runtime.deviceSynchronize()
        except CUDARuntimeError as error:
            seen.append(error)

    with pytest.raises(CUDARuntimeError, match="Invalidated"):
        while_captured(device, wait)
    assert "Unsupported" in str(seen[0])


def test_all_is_done_after_it_was_waited_for() -> None:
    """On the default stream, the current one, and those of gpubatch in whatever thread; the last is not waited for."""
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
    """The collector is the process's: who leaves first must not end what protects the other."""
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
