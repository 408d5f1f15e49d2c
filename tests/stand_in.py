"""A stand-in for CuPy: its arrays are NumPy's, and the real kernel sources run on the emulated grid.

``StandIn`` runs work at once, which is one of the orders that a device may choose. ``QueuedStandIn`` has streams that
choose the worst orders: as late or as early as events and waits permit.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import re
import threading
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from emulate import host_kernel, launch_bounds, sanitized
from needs import missing

import gpubatch.backend
from gpubatch.backend import Backend, CudaBackend
from gpubatch.ops import cuda_kernel, ops_for
from gpubatch.ops.compile import C_TYPES

INDEX = 99  # of the device; no cache has a kernel of a real device for it

# C type of a parameter: NumPy type of its argument.
NUMBERS = {
    "long long": np.int64,
    "u64": np.uint64,
    "unsigned": np.uint32,
    "float": np.float32,
    "double": np.float64,
}


class AnyDevice(contextlib.nullcontext[None]):
    """A device whose ``with`` has no effect."""

    def __init__(self, index: int, compute_capability: str = "90") -> None:
        contextlib.nullcontext.__init__(self)
        self.id, self.compute_capability = index, compute_capability


class DeviceArray(np.ndarray):
    """The part of a CuPy array that gpubatch uses."""

    @property
    def device(self) -> Any:
        """The array's device, always the current one."""
        return AnyDevice(INDEX)

    @property
    def data(self) -> Any:
        return types.SimpleNamespace(ptr=self.ctypes.data)

    def get(self) -> np.ndarray:
        return np.array(self)

    def set(self, values: np.ndarray, stream: Any = None) -> None:
        assert (type(values), values.dtype, values.shape) == (np.ndarray, self.dtype, self.shape)
        self[...] = values


DeviceArray.__name__, DeviceArray.__module__ = "ndarray", "cupy"


class StandIn:
    """The part of CuPy that gpubatch's kernels need; ``compiled`` and ``launches`` record its use.

    ``order`` is the order of threads and blocks; with ``sanitize`` kernels run under the sanitizers.
    """

    nvmath: Any = None  # a stand-in for cuBLASLt
    clock = 0.0  # milliseconds; only cuBLASLt's work takes time

    def __init__(self, order: str = "forward", sanitize: bool = False) -> None:
        self.order, self.sanitize = order, sanitize
        self.compiled: list[str] = []
        self.launches: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = []
        self.cuda = types.SimpleNamespace(
            runtime=types.SimpleNamespace(getDeviceProperties=lambda index: {"name": b"stand-in"}),
            get_current_stream=lambda: types.SimpleNamespace(ptr=0, record=lambda event: None),
            Event=lambda block, disable_timing: types.SimpleNamespace(synchronize=lambda: None),
            alloc_pinned_memory=bytearray,
            Device=AnyDevice,
        )

    def empty(self, shape: Any, dtype: Any) -> np.ndarray:
        return np.full(shape, 7, dtype).view(DeviceArray)  # device memory is not zeroed

    def zeros(self, shape: Any, dtype: Any) -> np.ndarray:
        return np.zeros(shape, dtype).view(DeviceArray)

    def asarray(self, x: Any, dtype: Any = None) -> np.ndarray:
        return x if isinstance(x, DeviceArray) and dtype in (None, x.dtype) else np.array(x, dtype).view(DeviceArray)

    @property
    def random(self) -> Any:
        """Generators that draw the numbers of a CPU's, which CuPy's do not."""

        def bits(sequence: np.random.SeedSequence, size: int) -> np.random.Philox:
            seed, epoch, number, *within = sequence.entropy  # type: ignore[misc]
            key, counter = np.array([seed, epoch], np.uint64), np.array([0, sum(within), number + 1, 0], np.uint64)
            return np.random.Philox(key=key, counter=counter)

        def generator(bits: np.random.Philox) -> Any:
            draw = np.random.Generator(bits)
            return types.SimpleNamespace(random=lambda shape: self.asarray(draw.random(shape)))

        return types.SimpleNamespace(Philox4x3210=bits, Generator=generator)

    def start(self, work: Callable[[], None]) -> None:
        work()

    def memory_at(self, address: int) -> np.ndarray | None:
        """The block of memory around an address; None if no record is kept."""
        return None

    def RawModule(self, code: str, options: tuple[str, ...]) -> Any:  # noqa: N802  CuPy's name
        self.compiled.append(code)
        assert options == ("--std=c++17",)

        def get_function(name: str) -> Any:
            parameters, most = parameters_of(code, name), launch_bounds(code)[name]

            def kernel(grid: tuple[int, ...], block: tuple[int, ...], arguments: tuple[Any, ...]) -> None:
                self.launches.append((name, grid, block))
                for parameter, argument in zip(parameters, arguments, strict=True):
                    check_argument(code, parameter, argument)
                blocks, threads = grid if len(grid) > 1 else grid[0], block[0]
                assert threads <= most, f"{name} is compiled for {most} threads at most, got {threads}"
                if not self.sanitize:
                    run, plain = host_kernel(code, name, *parameters), [in_memory(a) for a in arguments]
                    self.start(lambda: run(*plain, blocks, threads, order=self.order))
                    return
                copies = sanitized(code, name, parameters, arguments, blocks, threads, self.order)
                for array, copy in zip((a for a in arguments if isinstance(a, DeviceArray)), copies, strict=True):
                    array[...] = copy

            return kernel

        return types.SimpleNamespace(get_function=get_function)


def parameters_of(source: str, kernel: str) -> tuple[str, ...]:
    """The C declarations of a kernel's parameters."""
    found = re.search(
        rf'extern "C" __global__ void (?:__launch_bounds__\(\w+(?:, 1)?\)\s+)?{kernel}\(([^)]*)\)', source
    )
    assert found is not None, f"no kernel {kernel}"
    return tuple(" ".join(p.split()) for p in found[1].split(","))


def check_argument(source: str, parameter: str, argument: Any) -> None:
    """Check what CuPy does not: the argument has its parameter's type, and an address is an array or null."""
    of = types_of(source)
    c_type, name = parameter.removeprefix("const ").rsplit(" ", 1)
    if not c_type.endswith("*"):
        assert type(argument) is of[c_type], f"{parameter} got a {type(argument)}"
    elif isinstance(argument, DeviceArray):
        assert argument.dtype.type is of[c_type[:-1]], f"{parameter} got an array of {argument.dtype}"
        assert argument.flags.c_contiguous, f"{parameter} got a strided array"
    else:
        assert type(argument) is np.uint64, f"{parameter} got a {type(argument)}"
        assert argument == 0 or name == "x", name  # x may be the address of a matrix, as cuBLASLt takes it


@functools.cache
def types_of(source: str) -> dict[str, Any]:
    """The NumPy type of each C type in a source's parameters; None if the source does not define it."""
    of: dict[str, Any] = dict(NUMBERS)
    for name in ("T", "S", "Sample", "Target", "Weight", "Label"):
        defined = (np.dtype(dtype).type for dtype, c in C_TYPES.items() if f"typedef {c} {name};" in source)
        of[name] = next(defined, None)
    return of


def stand_in_backend(order: str = "forward", sanitize: bool = False) -> CudaBackend:
    """A new backend; clears the cache of compiled kernels, so that the backend records all compilations."""
    cuda_kernel.cache_clear()
    return CudaBackend(StandIn(order, sanitize), INDEX, "a test")


class StandInBackend(CudaBackend):
    """A backend that uses NumPy for copies, and without ``cupy.nvmath`` for matrix products."""

    xp = np

    def library(self, name: str) -> Any:
        if self.cupy.nvmath is None:
            raise ModuleNotFoundError(f"No module named {name!r}", name="nvmath")
        return self.cupy.nvmath


# --- streams ------------------------------------------------------------------------------------------------------

POISON = 0xFF  # fills free memory: NaN as a floating-point number

# (whether the default stream is eager, whether the others are). An eager stream runs work as soon as the events that it
# waits for have passed; a lazy one runs only work that the host or another stream waits for.
TIMINGS = {
    "late": (False, False),
    "early": (True, True),
    "copies early": (False, True),
    "work early": (True, False),
}


@dataclass(frozen=True)
class Ticket:
    """A position in the work of a stream."""

    stream: Stream
    place: int

    @property
    def reached(self) -> bool:
        return self.stream.done >= self.place


@dataclass(frozen=True)
class Work:
    """A unit of work of a stream, and the pinned memory that it reads."""

    run: Callable[[], None]
    reads: np.ndarray | None = None


class Graph:
    """Captured work; each launch runs all of it."""

    def __init__(self, cupy: QueuedStandIn, work: list[Work]) -> None:
        self.cupy, self.work = cupy, work

    def launch(self, stream: Stream | None = None) -> None:
        self.cupy.graph_launches += 1
        (stream or self.cupy.get_current_stream()).enqueue(Work(lambda: [work.run() for work in self.work]))


class Stream:
    """A queue of pending work. During a capture, work is recorded instead of queued.

    It does not check for operations that CUDA refuses during a capture; the emulated device does.
    """

    def __init__(self, cupy: QueuedStandIn, eager: bool) -> None:
        self.cupy, self.eager = cupy, eager
        self.queue: deque[Work | Ticket] = deque()
        self.done = self.given = 0
        self.busy = False
        self.captured: list[Work] | None = None
        self.ptr = id(self)

    def begin_capture(self, mode: int) -> None:
        assert mode == self.cupy.cuda.runtime.streamCaptureModeThreadLocal
        self.captured = []

    def end_capture(self) -> Graph:
        assert self.captured is not None
        work, self.captured = self.captured, None
        return Graph(self.cupy, work)

    def is_capturing(self) -> bool:
        return self.captured is not None

    def __enter__(self) -> Stream:
        self.cupy.needs_device("a stream becomes current")
        self.cupy.current.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        self.cupy.current.pop()

    def enqueue(self, work: Work | Ticket) -> None:
        with self.cupy.lock:
            if self.captured is not None:
                assert isinstance(work, Work), "a captured stream waits for an event"
                self.captured.append(work)
                return
            self.queue.append(work)
            self.given += 1
            self.cupy.settle()

    def record(self, event: Event) -> None:
        with self.cupy.lock:
            if event.timed:
                self.enqueue(Work(lambda: setattr(event, "time", self.cupy.clock)))
            event.ticket = Ticket(self, self.given)

    def wait_event(self, event: Event) -> None:
        if event.ticket is not None:
            self.enqueue(event.ticket)

    def synchronize(self) -> None:
        self.cupy.waits()
        with self.cupy.lock:
            self.do(self.given)
            self.cupy.settle()

    def advance(self) -> bool:
        """Run the work that waits for nothing; return whether there was any."""
        before = self.done
        while self.queue and not self.busy and not (isinstance(self.queue[0], Ticket) and not self.queue[0].reached):
            self.step()
        return self.done > before

    def do(self, place: int) -> None:
        """Run the work up to ``place``, and the work of other streams that it waits for."""
        while self.done < place:
            if isinstance(first := self.queue[0], Ticket):
                first.stream.do(first.place)
            self.step()

    def step(self) -> None:
        work = self.queue.popleft()
        self.busy = True  # a finaliser may enqueue while it runs
        try:
            if isinstance(work, Work):
                with np.errstate(all="ignore"):
                    work.run()
        finally:
            self.busy = False
            self.done += 1


class Event:
    """A position in the work of the stream that last recorded the event."""

    def __init__(self, cupy: QueuedStandIn, timed: bool) -> None:
        self.cupy, self.timed = cupy, timed
        self.ticket: Ticket | None = None
        self.time: float | None = None

    def synchronize(self) -> None:
        self.cupy.waits()
        with self.cupy.lock:
            if self.ticket is not None:
                self.ticket.stream.do(self.ticket.place)
                self.cupy.settle()


def handle_of(memory: np.ndarray, end: Callable[..., None], *arguments: Any) -> Any:
    """A buffer of ``memory`` that calls ``end`` when it is garbage-collected; queued work refers to the memory only."""
    handle = (ctypes.c_ubyte * memory.nbytes).from_buffer(memory)
    weakref.finalize(handle, end, memory, *arguments)
    return handle


class QueuedArray(DeviceArray):
    """An array whose values are computed in streams."""

    cupy: Any = None
    memory: Any = None  # the array's memory, without the handle

    @property
    def device(self) -> Device:
        return Device(self.cupy, INDEX)

    def __array_finalize__(self, x: Any) -> None:
        self.cupy, self.memory = getattr(x, "cupy", None), getattr(x, "memory", None)

    def get(self, out: np.ndarray | None = None, blocking: bool = True) -> np.ndarray:
        stream = self.cupy.get_current_stream()
        if blocking:
            assert out is None
            stream.synchronize()
            return np.array(in_memory(self))
        assert out is not None
        assert (type(out), out.dtype, out.shape) == (np.ndarray, self.dtype, self.shape)
        assert self.flags.c_contiguous
        assert out.flags.c_contiguous
        pinned = self.cupy.pinned_memory_of(out)
        assert pinned is not None, "a copy that is not waited for needs pinned memory"
        source, target = in_memory(self), at_the_same_place(out, pinned)
        stream.enqueue(Work(lambda: np.copyto(target, source), pinned))
        return out

    def set(self, values: np.ndarray, stream: Stream | None = None) -> None:
        assert (type(values), values.dtype, values.shape) == (np.ndarray, self.dtype, self.shape)
        assert self.flags.c_contiguous
        assert values.flags.c_contiguous
        pinned = self.cupy.pinned_memory_of(values)
        if pinned is None:  # a driver may copy pageable memory before it returns, or let the device read it later
            self.cupy.faults.append("memory was copied that is not pinned, so it may change before it is read")
        self.send(values if pinned is None else at_the_same_place(values, pinned), pinned, stream)

    def send(self, source: np.ndarray, pinned: np.ndarray | None, stream: Stream | None = None) -> None:
        """Enqueue a copy of ``source``, which is read when the copy runs."""
        self.cupy.copies.append(source.nbytes)
        target, stream = in_memory(self), stream or self.cupy.get_current_stream()
        stream.enqueue(Work(lambda: np.copyto(target, source), pinned))

    def later(self, make: Callable[..., Any], *arguments: Any) -> QueuedArray:
        """Enqueue ``make(*arguments)``; return its result, an array."""
        plain = [in_memory(a) for a in arguments]
        with np.errstate(all="ignore"):
            form = make(*plain)
        out = self.cupy.empty(form.shape, form.dtype)
        target = in_memory(out)
        self.cupy.start(lambda: np.copyto(target, make(*plain)))
        return out

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, out: Any = None, **kwargs: Any) -> Any:
        call = getattr(ufunc, method)
        assert all(isinstance(x, (QueuedArray, int, float, bool)) for x in inputs), "an array of the host"
        if out is None:
            return self.later(lambda *plain: np.asarray(call(*plain, **kwargs)), *inputs)
        plain, target = [in_memory(x) for x in inputs], in_memory(out[0])
        self.cupy.start(lambda: call(*plain, out=target, **kwargs))
        return out[0]

    def __array_function__(self, function: Any, _: Any, arguments: Any, kwargs: Any) -> Any:
        if function is np.may_share_memory:  # asks for no values
            return function(*map(in_memory, arguments), **kwargs)
        raise TypeError(f"{function.__name__} of an array of the device")

    def astype(self, dtype: Any, order: str = "K", copy: bool = True) -> QueuedArray:
        if not copy and dtype == self.dtype:
            return self
        return self.later(lambda x: x.astype(dtype, order=order), self)

    def copy(self) -> QueuedArray:
        return self.later(lambda x: x.copy(), self)

    def fill(self, value: Any) -> None:
        target = in_memory(self)
        self.cupy.start(lambda: target.fill(value))

    def argmax(self, axis: int | None = None) -> QueuedArray:
        return self.later(lambda x: np.asarray(x.argmax(axis)), self)

    def take(self, index: QueuedArray, axis: int) -> QueuedArray:
        assert isinstance(index, QueuedArray)
        return self.later(lambda x, i: x.take(i, axis=axis, mode="wrap"), self, index)

    def __getitem__(self, key: Any) -> Any:
        parts = key if isinstance(key, tuple) else (key,)
        if not any(isinstance(part, np.ndarray) for part in parts):
            # With an ellipsis, a single element is a device array too.
            return np.ndarray.__getitem__(self, key if Ellipsis in parts else (*parts, ...))
        assert all(isinstance(part, (QueuedArray, slice)) for part in parts)
        # Like CuPy, wraps indices that are out of range.
        wrapped = lambda x, *p: x[tuple(i % n if isinstance(i, np.ndarray) else i for i, n in zip(p, x.shape))]  # noqa: E731, B905
        return self.later(wrapped, self, *parts)

    def __setitem__(self, key: Any, value: Any) -> None:
        assert not isinstance(value, np.ndarray) or isinstance(value, QueuedArray), "an array of the host"
        parts = key if isinstance(key, tuple) else (key,)
        place = key if Ellipsis in parts else (*parts, ...)  # a single element is an array too
        target, plain = np.ndarray.__getitem__(in_memory(self), place), in_memory(value)
        self.cupy.start(lambda: np.copyto(target, plain, casting="unsafe"))

    def item(self) -> Any:
        return self.get().item()

    def __bool__(self) -> bool:
        return bool(self.item())

    def __float__(self) -> float:
        return float(self.item())

    def __int__(self) -> int:
        return int(self.item())


QueuedArray.__name__, QueuedArray.__module__ = "ndarray", "cupy"


class Device:
    """A device; ``with`` makes it current."""

    compute_capability = "90"

    def __init__(self, cupy: QueuedStandIn, index: int) -> None:
        self.cupy, self.id = cupy, index

    def __enter__(self) -> Device:
        self.cupy.devices.append(self.id)
        return self

    def __exit__(self, *_: object) -> None:
        self.cupy.devices.pop()


class Pool:
    """The size of CuPy's pool: freed memory stays in it, for the stream on which it was allocated.

    Only bytes are counted, not blocks.
    """

    def __init__(self, cupy: QueuedStandIn) -> None:
        self.cupy = cupy
        self.kept: dict[Stream, int] = {}

    def malloc(self, size: int) -> None:
        with self.cupy.lock:
            stream = self.cupy.get_current_stream()
            self.kept[stream] = self.kept.get(stream, 0) - min(size, self.kept.get(stream, 0))

    def used_bytes(self) -> int:
        return self.cupy.used

    def free_bytes(self) -> int:
        return sum(self.kept.values())

    def total_bytes(self) -> int:
        return self.used_bytes() + self.free_bytes()

    def get_limit(self) -> int:
        return 0

    def free_all_blocks(self) -> None:
        self.kept.clear()


class QueuedStandIn(StandIn):
    """A stand-in with streams, events and memory pools; ``timing`` is a key of TIMINGS.

    Freed device memory is poisoned by the next work of the stream on which it was allocated, and so is newly allocated
    memory. Freed pinned memory is poisoned at once. Using a device other than the stand-in's is a failure.

    current_device: the device that is initially current in each thread
    copies: sizes of the copies from the host
    faults: errors found, a sentence each
    allocations, synchronisations (waits of the host, also for a copy to it), graph_launches: counts
    """

    def __init__(self, timing: str, available: int = 1 << 30, current_device: int = INDEX) -> None:
        StandIn.__init__(self)
        self.current_device = current_device
        self.cuda.Device = lambda index: Device(self, index)
        self.lock = threading.RLock()
        self.streams: weakref.WeakSet[Stream] = weakref.WeakSet()
        self.events: weakref.WeakSet[Event] = weakref.WeakSet()
        self.pinned: dict[int, np.ndarray] = {}
        self.blocks: weakref.WeakValueDictionary[int, np.ndarray] = weakref.WeakValueDictionary()
        self.copies: list[int] = []
        self.faults: list[str] = []
        self.allocations = self.synchronisations = self.graph_launches = 0
        self.used, self.available = 0, available
        self.pool = Pool(self)
        self.allocator = self.pool.malloc
        self.eager = TIMINGS[timing]
        self.null = Stream(self, self.eager[0])
        self.streams.add(self.null)
        self.local = threading.local()
        self.cuda.runtime.memGetInfo = lambda: (self.available - self.used - self.pool.free_bytes(), self.available)
        self.cuda.runtime.deviceSynchronize = self.synchronize
        self.cuda.runtime.streamCaptureModeThreadLocal = 1
        self.cuda.using_allocator, self.cuda.get_allocator = self.using_allocator, self.get_allocator
        self.cuda.MemoryPool, self.cuda.OutOfMemoryError = Pool, MemoryError
        self.cuda.Stream, self.cuda.Event = functools.partial(self.new_stream), self.new_event
        self.cuda.Stream.null = self.null
        self.cuda.get_elapsed_time = self.get_elapsed_time
        self.cuda.get_current_stream, self.cuda.alloc_pinned_memory = self.get_current_stream, self.alloc_pinned_memory

    @property
    def current(self) -> list[Stream]:
        if not hasattr(self.local, "streams"):
            self.local.streams = [self.null]
        return self.local.streams

    def get_current_stream(self) -> Stream:
        self.needs_device("the current stream is asked for")
        return self.current[-1]

    @property
    def devices(self) -> list[int]:
        if not hasattr(self.local, "devices"):
            self.local.devices = [self.current_device]
        return self.local.devices

    def needs_device(self, what: str) -> None:
        """Fail if another device is current."""
        assert self.devices[-1] == INDEX, f"{what} while device {self.devices[-1]} is current"

    def waits(self) -> None:
        """Count a wait of the host for the device."""
        self.synchronisations += 1

    @contextlib.contextmanager
    def using_allocator(self, allocator: Callable[[int], Any]) -> Iterator[None]:
        """Use ``allocator`` in this thread: it may raise; its result is ignored."""
        before = getattr(self.local, "allocator", None)
        self.local.allocator = allocator
        try:
            yield
        finally:
            self.local.allocator = before

    def new_stream(self, non_blocking: bool) -> Stream:
        self.needs_device("a stream is made")
        assert non_blocking  # a blocking stream and the default stream would wait for each other
        self.streams.add(stream := Stream(self, self.eager[1]))
        return stream

    def new_event(self, block: bool, disable_timing: bool) -> Event:
        self.needs_device("an event is made")
        self.events.add(event := Event(self, timed=not disable_timing))
        return event

    def get_elapsed_time(self, start: Event, end: Event) -> float:
        assert start.time is not None
        assert end.time is not None
        return end.time - start.time

    def get_default_memory_pool(self) -> Pool:
        return self.pool

    def get_allocator(self) -> Callable[[int], Any]:
        return getattr(self.local, "allocator", None) or self.allocator

    def synchronize(self) -> None:
        self.needs_device("the host waits for all")
        self.waits()
        with self.lock:
            for stream in list(self.streams):
                stream.do(stream.given)
            self.settle()

    def settle(self) -> None:
        """Run all work of eager streams that waits for nothing."""
        while any(stream.advance() for stream in list(self.streams) if stream.eager):
            pass

    def start(self, work: Callable[[], None]) -> None:
        self.get_current_stream().enqueue(Work(work))

    def empty(self, shape: Any, dtype: Any) -> QueuedArray:
        form = np.empty(shape, dtype)
        self.get_allocator()(max(1, form.nbytes))
        self.allocations += 1
        memory, stream = np.full(max(1, form.nbytes), POISON, np.uint8), self.get_current_stream()
        self.blocks[memory.ctypes.data] = memory
        self.used += memory.nbytes
        stream.enqueue(Work(lambda: memory.fill(POISON)))  # in the stream: earlier work may still use the memory
        handle = handle_of(memory, self.given_back, stream)
        out = np.frombuffer(handle, form.dtype, form.size).reshape(form.shape).view(QueuedArray)
        out.cupy, out.memory = self, memory
        return out

    def given_back(self, memory: np.ndarray, stream: Stream) -> None:
        with self.lock:
            self.used -= memory.nbytes
            self.pool.kept[stream] = self.pool.kept.get(stream, 0) + memory.nbytes
            stream.queue.append(Work(lambda: memory.fill(POISON)))  # not enqueue: a finaliser may run at any time
            stream.given += 1

    def zeros(self, shape: Any, dtype: Any) -> QueuedArray:
        out = self.empty(shape, dtype)
        target = in_memory(out)
        self.start(lambda: target.fill(0))
        return out

    def asarray(self, x: Any, dtype: Any = None) -> QueuedArray:
        if isinstance(x, QueuedArray):
            return x if dtype in (None, x.dtype) else x.astype(dtype)
        x = np.array(x, dtype)
        out = self.empty(x.shape, x.dtype.newbyteorder("="))
        out.send(np.array(x, out.dtype, order="C"), None)  # through pinned memory that CuPy keeps until the copy ends
        return out

    def alloc_pinned_memory(self, size: int) -> Any:
        self.needs_device("pinned memory is taken")
        memory = np.full(-(-size // 512) * 512, POISON, np.uint8)
        self.pinned[memory.ctypes.data] = memory
        return handle_of(memory, self.unpinned)

    def unpinned(self, memory: np.ndarray) -> None:
        with self.lock:
            del self.pinned[memory.ctypes.data]
            queued = [work for stream in list(self.streams) for work in stream.queue if isinstance(work, Work)]
            if any(work.reads is memory for work in queued):
                self.faults.append("pinned memory was given back before a copy from it")
            memory.fill(POISON)

    def memory_at(self, address: int) -> np.ndarray | None:
        found = [m for at, m in list(self.blocks.items()) if 0 <= address - at < m.nbytes]
        assert found, "no memory of the device"
        return found[0]

    def pinned_memory_of(self, x: np.ndarray) -> np.ndarray | None:
        found = (m for at, m in self.pinned.items() if 0 <= x.ctypes.data - at < m.nbytes)
        return next(found, None)


def in_memory(x: Any) -> Any:
    """The device's view of ``x``: a reference that does not keep the array from being freed."""
    return at_the_same_place(x, x.memory) if isinstance(x, QueuedArray) else x


def at_the_same_place(x: np.ndarray, memory: np.ndarray) -> np.ndarray:
    return np.ndarray(x.shape, x.dtype, memory, x.ctypes.data - memory.ctypes.data, x.strides)


def queued_backend(timing: str, available: int = 1 << 30, current_device: int = INDEX) -> StandInBackend:
    """A new backend with queued streams; clears the caches as ``stand_in_backend`` does."""
    cuda_kernel.cache_clear()
    ops_for.cache_clear()
    return StandInBackend(QueuedStandIn(timing, available, current_device), INDEX, "a test")


def device_of(name: str) -> CudaBackend:
    """For "stand-in" a new one whose work is done late; else the real device, without which the test is skipped."""
    if name == "stand-in":
        return queued_backend("late")
    if name not in gpubatch.backend.available_backends():
        missing("gpu", "no CUDA device can be used here")
    found = gpubatch.backend.get_backend(name)
    assert isinstance(found, CudaBackend)
    return found


def found_by_its_arrays(monkeypatch: pytest.MonkeyPatch, device: Callable[[], Backend]) -> None:
    """Make arrays that come without a backend, as those of a checkpoint do, the device's: they are NumPy's arrays."""
    monkeypatch.setattr(gpubatch.backend, "_home", lambda x: f"cuda:{INDEX}" if gpubatch.backend.is_cupy(x) else "cpu")
    monkeypatch.setattr(gpubatch.backend, "_cuda", lambda index, reason: device())
