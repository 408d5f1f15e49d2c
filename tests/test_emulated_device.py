"""The emulated device: every rule is broken once on purpose, and noticed.

Most tests call the library as CuPy would; a copy of it for each test has fresh devices. Those of the last part run the
real CuPy, in processes of their own.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from emulated_gpu import Options, device, overlay
from emulated_gpu.build import build, cache, nvidia
from emulated_gpu.overlay import cupy_wheel
from emulated_gpu.registers import registers_in
from needs import missing

pytestmark = pytest.mark.exhaustive  # they test only the emulated device

TESTS = Path(__file__).parent

# cudaError_t
INVALID, MEMORY, NOT_READY, HANDLE = 1, 2, 600, 400
ILLEGAL_ADDRESS, OUT_OF_RESOURCES, MISALIGNED, LAUNCH_FAILURE = 700, 701, 716, 719
UNSUPPORTED, INVALIDATED, MERGE, UNMATCHED, UNJOINED, ISOLATION, IMPLICIT, CAPTURED_EVENT, WRONG_THREAD = range(
    900, 909
)
ILLEGAL_STATE, NOT_PERMITTED = 401, 800
TO_DEVICE, FROM_DEVICE, ON_DEVICE, ANY = 1, 2, 3, 4  # cudaMemcpyKind
NON_BLOCKING = 1
GLOBAL, THREAD_LOCAL, RELAXED = range(3)

KERNELS = """
#include "device.h"
#include <cstring>
using u32 = const uint32_t*;
extern "C" const char* write_one(u32, u32, uint64_t, const char* parameters, const Hooks* hooks) {
    uint64_t address, first, last;
    memcpy(&address, parameters, 8);
    if (!hooks->range(address, &first, &last) || address + 4 > last) return "write_one: 4 bytes are in no allocation";
    if (address % 4) return "write_one: 4 bytes: misaligned";
    *reinterpret_cast<float*>(address) += 1;
    return nullptr;
}
extern "C" const char* trap(u32, u32, uint64_t, const char*, const Hooks*) { return "trap: a trap"; }
"""


class CudaError(Exception):
    def __init__(self, name: str, code: int) -> None:
        super().__init__(f"{name}: {code}")
        self.code = code


class Cuda:
    """The device's functions; a returned error is raised."""

    def __init__(self, library: ctypes.CDLL, kernels: ctypes.CDLL, options: Options) -> None:
        self.library, self.kernels, self.registers = library, kernels, 32
        device.configure(library, options)
        self.hooks = device.LOAD(self._load), device.REGISTERS(lambda module, name: self.registers)
        library.emulated_set_hooks(*self.hooks)

    def __getattr__(self, name: str) -> Callable[..., None]:
        function = getattr(self.library, name)

        def call(*arguments: Any) -> None:
            if code := function(*(ctypes.c_void_p(x) if isinstance(x, int) and x > 2**31 else x for x in arguments)):
                raise CudaError(name, code)

        return call

    def made(self, name: str, *arguments: Any) -> int:
        """The result that a function returns through its first argument."""
        handle = ctypes.c_void_p()
        getattr(self, name)(ctypes.byref(handle), *arguments)
        return handle.value or 0

    def malloc(self, size: int) -> int:
        return self.made("cudaMalloc", ctypes.c_size_t(size))

    def pinned(self, size: int) -> int:
        return self.made("cudaHostAlloc", ctypes.c_size_t(size), 0)

    def stream(self, flags: int = NON_BLOCKING) -> int:
        return self.made("cudaStreamCreateWithFlags", flags)

    def event(self, flags: int = 0) -> int:
        return self.made("cudaEventCreateWithFlags", flags)

    def copy(self, to: int, source: int, size: int, kind: int, stream: int = 0) -> None:
        self.cudaMemcpyAsync(to, source, ctypes.c_size_t(size), kind, stream)

    def fill(self, pointer: int, value: int, size: int, stream: int = 0) -> None:
        self.cudaMemsetAsync(pointer, value, ctypes.c_size_t(size), stream)

    def _load(self, module: int, image: bytes) -> int:
        places, sizes = (ctypes.c_size_t * 1)(0), (ctypes.c_size_t * 1)(8)
        for name, symbol, threads, shared in (
            ("write_one", "write_one", 1024, 0),
            ("bounded", "write_one", 128, 0),
            ("shared", "write_one", 1024, 40 << 10),
            ("trap", "trap", 1024, 0),
        ):
            launch = ctypes.cast(getattr(self.kernels, symbol), ctypes.c_void_p)
            self.library.emulated_add_kernel(
                ctypes.c_void_p(module), name.encode(), launch, 1, places, sizes, ctypes.c_size_t(8), threads,
                ctypes.c_size_t(shared),
            )  # fmt: skip
        return 0

    def function(self, name: str) -> int:
        module = self.made("cuModuleLoadData", b"")
        return self.made("cuModuleGetFunction", module, name.encode())

    def launch(
        self,
        function: int,
        pointer: int,
        stream: int = 0,
        grid: tuple[int, int, int] = (1, 1, 1),
        block: tuple[int, int, int] = (1, 1, 1),
        shared: int = 0,
    ) -> None:
        argument = ctypes.c_uint64(pointer)
        arguments = (ctypes.c_void_p * 1)(ctypes.addressof(argument))
        sizes = (ctypes.c_uint(n) for n in (*grid, *block, shared))
        self.cuLaunchKernel(function, *sizes, ctypes.c_void_p(stream), arguments, None)

    def synchronize(self) -> None:
        self.cudaDeviceSynchronize()

    def faults(self) -> list[str]:
        found, text = [], ctypes.create_string_buffer(1000)
        while self.library.emulated_take_fault(text, ctypes.c_size_t(1000)):
            found.append(text.value.decode())
        return found

    def begin(self, mode: int = RELAXED, flags: int = NON_BLOCKING) -> int:
        """Begin the capture of a stream."""
        stream = self.stream(flags)
        self.cudaStreamBeginCapture(stream, mode)
        return stream

    def end(self, stream: int) -> int:
        graph = ctypes.c_void_p()
        self.cudaStreamEndCapture(stream, ctypes.byref(graph))
        return graph.value or 0

    def executable(self, graph: int) -> int:
        return self.made("cudaGraphInstantiateWithFlags", graph, 0)

    def nodes(self, graph: int) -> list[int]:
        count = ctypes.c_size_t()
        self.cudaGraphGetNodes(graph, None, ctypes.byref(count))
        nodes = (ctypes.c_void_p * count.value)()
        self.cudaGraphGetNodes(graph, nodes, ctypes.byref(count))
        return [node or 0 for node in nodes]


@functools.cache
def libraries() -> tuple[Path, Path]:
    """The library of the device, and one of kernels."""
    cuda = 12 if importlib.util.find_spec("nvidia.cuda_runtime") else 13
    if not shutil.which("g++"):
        missing("compiler", "g++ is not there")
    try:
        nvidia(cuda, "cuda_runtime", "include/cuda_runtime_api.h")
    except RuntimeError as error:
        missing("gpu", str(error))
    return device.build_library(cuda), build("test-kernels", [KERNELS])


@pytest.fixture
def fresh(tmp_path: Path) -> Callable[..., Cuda]:
    """A function that creates devices with the given options."""

    def make(**options: Any) -> Cuda:
        library, kernels = libraries()
        copy = shutil.copy(library, tmp_path / f"{len(list(tmp_path.iterdir()))}.so")
        return Cuda(ctypes.CDLL(str(copy)), ctypes.CDLL(str(kernels)), Options(**options))

    return make


@pytest.fixture
def cuda(fresh: Callable[..., Cuda]) -> Cuda:
    return fresh()


@pytest.fixture
def late(fresh: Callable[..., Cuda]) -> Cuda:
    return fresh(timing="late")


def refused(code: int, call: Callable[..., Any], *arguments: Any) -> None:
    with pytest.raises(CudaError) as error:
        call(*arguments)
    assert error.value.code == code


def bytes_at(pointer: int, size: int) -> bytes:
    return ctypes.string_at(pointer, size)


def in_thread(work: Callable[[], None]) -> None:
    """Run ``work`` in another thread, and raise its exception here."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    for error in raised:
        raise error


# --- memory --------------------------------------------------------------------------------------------------------


def test_fresh_memory_is_not_a_number(cuda: Cuda) -> None:
    size = (4 << 20) + 8  # more than a page of poison, and not whole
    for pointer in (cuda.malloc(size), cuda.pinned(size), cuda.made("cudaMallocManaged", ctypes.c_size_t(size), 1)):
        assert np.isnan(np.frombuffer(bytes_at(pointer, size), np.float32)).all()


def test_memory_is_not_to_be_used_once_it_is_free(cuda: Cuda) -> None:
    pointer, host = cuda.malloc(64), cuda.pinned(64)
    cuda.cudaFree(pointer)
    refused(INVALID, cuda.copy, host, pointer, 64, FROM_DEVICE)
    refused(INVALID, cuda.copy, host, pointer, 64, ANY)
    refused(INVALID, cuda.fill, pointer, 0, 64)
    refused(INVALID, cuda.cudaFree, pointer)
    assert cuda.malloc(64) != pointer  # an address is not given out twice
    code = f"import ctypes\nctypes.string_at({pointer}, 1)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode != 0  # not that it lies there by chance


def test_memory_that_is_freed_before_a_copy_of_it_runs(late: Cuda) -> None:
    pointer, host, stream, other = late.malloc(64), late.pinned(64), late.stream(), late.stream()
    late.copy(host, pointer, 64, FROM_DEVICE, stream)
    late.cudaFreeAsync(pointer, other)
    late.cudaStreamSynchronize(other)
    refused(ILLEGAL_ADDRESS, late.cudaStreamSynchronize, stream)
    assert "a copy reads of 64 bytes" in late.faults()[0]


def test_copies_keep_to_their_allocations(cuda: Cuda) -> None:
    pointer, host = cuda.malloc(64), cuda.pinned(128)
    cuda.copy(pointer, host, 65, TO_DEVICE)
    assert "65 bytes" in cuda.faults()[0]
    refused(ILLEGAL_ADDRESS, cuda.synchronize)  # and whatever else is called


def test_the_kind_of_a_copy_must_be_true(cuda: Cuda) -> None:
    pointer, host = cuda.malloc(64), ctypes.addressof(ctypes.create_string_buffer(64))
    refused(INVALID, cuda.copy, host, pointer, 64, TO_DEVICE)
    refused(INVALID, cuda.copy, pointer, host, 64, FROM_DEVICE)
    refused(INVALID, cuda.copy, pointer, host, 64, ON_DEVICE)
    cuda.copy(pointer, host, 64, ANY)


def test_the_memory_of_a_device_ends(fresh: Callable[..., Cuda]) -> None:
    cuda = fresh(devices=3, memory=(2 << 20, 3 << 20))
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    for number, size in enumerate((2 << 20, 3 << 20, 3 << 20)):
        cuda.cudaSetDevice(number)
        refused(MEMORY, cuda.malloc, size + 1)
        pointer = cuda.malloc(size)
        refused(MEMORY, cuda.malloc, 1)
        cuda.pinned(size)  # of the host
        cuda.cudaMemGetInfo(ctypes.byref(free), ctypes.byref(total))
        assert (free.value, total.value) == (0, size)
        cuda.cudaFree(pointer)
        cuda.cudaMemGetInfo(ctypes.byref(free), ctypes.byref(total))
        assert free.value == size


def test_what_a_pointer_is(cuda: Cuda) -> None:
    class Attributes(ctypes.Structure):
        _fields_ = [
            ("type", ctypes.c_int),
            ("device", ctypes.c_int),
            ("there", ctypes.c_void_p),
            ("here", ctypes.c_void_p),
        ]
        _fields_ += [("reserved", ctypes.c_long * 8)]

    def of(pointer: int) -> tuple[int, int, int | None, int | None]:
        found = Attributes()
        cuda.cudaPointerGetAttributes(ctypes.byref(found), pointer)
        return found.type, found.device, found.there, found.here

    buffer = ctypes.create_string_buffer(64)
    host = ctypes.addressof(buffer)
    assert of(host) == (0, -2, None, None)
    cuda.cudaHostRegister(host, ctypes.c_size_t(64), 0)
    assert of(host + 8) == (1, 0, host + 8, host + 8)
    refused(712, cuda.cudaHostRegister, host + 32, ctypes.c_size_t(64), 0)
    cuda.cudaHostUnregister(host)
    assert of(host)[0] == 0
    refused(713, cuda.cudaHostUnregister, host)
    pointer = cuda.malloc(64)
    assert of(pointer + 4) == (2, 0, pointer + 4, None)
    managed = cuda.made("cudaMallocManaged", ctypes.c_size_t(64), 1)
    assert of(managed) == (3, 0, managed, managed)


def test_pools_count_what_they_gave(late: Cuda) -> None:
    used = ctypes.c_uint64()
    pool = late.made("cudaDeviceGetDefaultMemPool", 0)
    stream = late.stream()
    pointer = late.made("cudaMallocAsync", ctypes.c_size_t(1000), stream)
    late.cudaFreeAsync(pointer, stream)
    late.cudaMemPoolGetAttribute(pool, 7, ctypes.byref(used))
    assert used.value == 1000  # the stream has not come to it
    late.cudaStreamSynchronize(stream)
    late.cudaMemPoolGetAttribute(pool, 7, ctypes.byref(used))
    assert used.value == 0
    late.cudaMemPoolGetAttribute(pool, 8, ctypes.byref(used))
    assert used.value == 1000  # the most
    refused(INVALID, late.cudaFreeAsync, pointer, stream)
    refused(INVALID, late.cudaMemPoolSetAttribute, pool, 7, ctypes.byref(used))


# --- streams and events --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("timing", "early"),
    [("early", (1, 1)), ("late", (0, 0)), ("copies", (1, 0)), ("work", (0, 1))],
)
def test_the_timing_says_what_is_done_at_once(fresh: Callable[..., Cuda], timing: str, early: tuple[int, int]) -> None:
    """A copy to the device in one stream, a kernel in another."""
    cuda = fresh(timing=timing)
    copied, filled, host = cuda.malloc(4), cuda.malloc(4), cuda.pinned(4)
    ctypes.memset(host, 7, 4)
    streams = cuda.stream(), cuda.stream()
    cuda.copy(copied, host, 4, TO_DEVICE, streams[0])
    cuda.fill(filled, 7, 4, streams[1])
    done = tuple(int(bytes_at(pointer, 4) == b"\7\7\7\7") for pointer in (copied, filled))
    assert done == early
    cuda.cudaStreamSynchronize(streams[0])
    assert bytes_at(copied, 4) == b"\7\7\7\7"
    assert (bytes_at(filled, 4) == b"\7\7\7\7") == bool(early[1])  # without a wait
    cuda.synchronize()
    assert bytes_at(filled, 4) == b"\7\7\7\7"


@pytest.mark.parametrize("pageable", ["early", "late"])
def test_when_a_copy_reads_ordinary_memory(fresh: Callable[..., Cuda], pageable: str) -> None:
    cuda = fresh(timing="late", pageable=pageable)
    buffer = ctypes.create_string_buffer(b"before", 6)
    pointer, stream = cuda.malloc(6), cuda.stream()
    cuda.copy(pointer, ctypes.addressof(buffer), 6, TO_DEVICE, stream)
    buffer[:6] = b"after."
    cuda.cudaStreamSynchronize(stream)
    assert bytes_at(pointer, 6) == (b"before" if pageable == "early" else b"after.")


def test_pinned_memory_is_read_when_the_copy_runs(late: Cuda) -> None:
    host, pointer, stream = late.pinned(6), late.malloc(6), late.stream()
    ctypes.memmove(host, b"before", 6)
    late.copy(pointer, host, 6, TO_DEVICE, stream)
    ctypes.memmove(host, b"after.", 6)
    late.cudaStreamSynchronize(stream)
    assert bytes_at(pointer, 6) == b"after."


def test_a_copy_to_ordinary_memory_is_waited_for(late: Cuda) -> None:
    buffer = ctypes.create_string_buffer(4)
    pointer, stream = late.malloc(4), late.stream()
    late.fill(pointer, 7, 4, stream)
    late.copy(ctypes.addressof(buffer), pointer, 4, FROM_DEVICE, stream)
    assert buffer.raw == b"\7\7\7\7"


def test_cudamemcpy_to_the_device_need_not_be_done_when_it_returns(late: Cuda) -> None:
    """The driver has read the pageable memory by then, but a stream that does not wait reads old values."""
    pointer, buffer = late.malloc(4), ctypes.create_string_buffer(b"new.", 4)
    late.cudaMemcpy(pointer, ctypes.addressof(buffer), ctypes.c_size_t(4), TO_DEVICE)
    assert bytes_at(pointer, 4) == b"\xff" * 4
    late.cudaStreamSynchronize(0)
    assert bytes_at(pointer, 4) == b"new."


def test_streams_keep_their_order_and_no_other(late: Cuda) -> None:
    pointer, one, other = late.malloc(1), late.stream(), late.stream()
    late.fill(pointer, 1, 1, one)
    late.fill(pointer, 2, 1, other)
    late.fill(pointer, 3, 1, one)
    late.cudaStreamSynchronize(other)
    assert bytes_at(pointer, 1) == b"\2"
    late.cudaStreamSynchronize(one)
    assert bytes_at(pointer, 1) == b"\3"


@pytest.mark.parametrize("flags", [0, NON_BLOCKING])
def test_the_default_stream_and_blocking_ones_wait_for_each_other(late: Cuda, flags: int) -> None:
    first, second, stream = late.malloc(1), late.malloc(1), late.stream(flags)
    late.fill(first, 1, 1, 0)
    late.fill(second, 1, 1, stream)
    late.cudaStreamSynchronize(stream)
    assert bytes_at(first, 1) == (b"\xff" if flags else b"\1")
    late.fill(first, 2, 1, stream)
    late.fill(second, 2, 1, 0)
    late.cudaStreamSynchronize(0)
    assert bytes_at(first, 1) == (b"\1" if flags else b"\2")


def test_a_stream_waits_for_an_event(late: Cuda) -> None:
    pointer, one, other = late.malloc(1), late.stream(), late.stream()
    late.fill(pointer, 1, 1, one)
    late.cudaEventRecord(event := late.event(), one)
    late.fill(pointer, 9, 1, one)  # after the event: not waited for
    late.cudaStreamWaitEvent(other, event, 0)
    late.cudaStreamSynchronize(other)
    assert bytes_at(pointer, 1) == b"\1"


@pytest.mark.parametrize("query", ["cudaEventQuery", "cudaStreamQuery"])
def test_polling_ends(late: Cuda, query: str) -> None:
    """Queries return "not ready" for a while, but not forever."""
    pointer, stream, event = late.malloc(1), late.stream(), late.event()
    late.fill(pointer, 1, 1, stream)
    late.cudaEventRecord(event, stream)
    of = ctypes.c_void_p(event if query == "cudaEventQuery" else stream)
    answers = [getattr(late.library, query)(of) for _ in range(100)]
    assert answers == sorted(answers, reverse=True)
    assert set(answers) == {NOT_READY, 0}


def test_events_have_times(cuda: Cuda) -> None:
    start, stop, none = cuda.event(), cuda.event(), cuda.event(2)
    elapsed = ctypes.c_float(-1)
    for event in (start, stop, none):
        cuda.cudaEventRecord(event, 0)
    cuda.cudaEventElapsedTime(ctypes.byref(elapsed), start, stop)
    assert 0 <= elapsed.value < 60_000
    refused(HANDLE, cuda.cudaEventElapsedTime, ctypes.byref(elapsed), start, none)


def test_handles_that_are_gone_are_noticed(cuda: Cuda) -> None:
    stream, event = cuda.stream(), cuda.event()
    cuda.cudaStreamDestroy(stream)
    refused(HANDLE, cuda.cudaStreamSynchronize, stream)
    refused(HANDLE, cuda.fill, cuda.malloc(1), 0, 1, stream)
    cuda.cudaEventDestroy(event)
    refused(HANDLE, cuda.cudaEventRecord, event, 0)
    refused(HANDLE, cuda.cudaEventRecord, cuda.stream(), 0)  # a stream is no event


def test_what_a_destroyed_stream_was_given_is_done(late: Cuda) -> None:
    pointer, stream = late.malloc(1), late.stream()
    late.fill(pointer, 1, 1, stream)
    late.cudaStreamDestroy(stream)
    late.synchronize()
    assert bytes_at(pointer, 1) == b"\1"


def test_a_host_function_must_not_call_cuda(late: Cuda) -> None:
    called = list[int]()

    @ctypes.CFUNCTYPE(None, ctypes.c_void_p)
    def function(data: int) -> None:
        called.append(data)
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        called.append(late.library.cudaMemGetInfo(ctypes.byref(free), ctypes.byref(total)))

    late.cudaLaunchHostFunc(stream := late.stream(), function, ctypes.c_void_p(5))
    assert called == []
    late.cudaStreamSynchronize(stream)
    assert called == [5, NOT_PERMITTED]
    assert "host function" in late.faults()[0]


def test_an_event_belongs_to_its_device(fresh: Callable[..., Cuda]) -> None:
    cuda = fresh(devices=2)
    event = cuda.event()
    cuda.cudaSetDevice(1)
    refused(HANDLE, cuda.cudaEventRecord, event, cuda.stream())


def test_each_thread_has_its_device(fresh: Callable[..., Cuda]) -> None:
    cuda = fresh(devices=2)
    cuda.cudaSetDevice(1)
    number = ctypes.c_int(-1)
    in_thread(lambda: cuda.cudaGetDevice(ctypes.byref(number)))
    assert number.value == 0
    refused(101, cuda.cudaSetDevice, 2)


# --- captures ------------------------------------------------------------------------------------------------------


def test_captured_work_runs_when_the_graph_is_launched(cuda: Cuda) -> None:
    pointer, function = cuda.malloc(4), cuda.function("write_one")
    stream = cuda.begin()
    cuda.fill(pointer, 0, 4, stream)
    cuda.launch(function, pointer, stream)
    cuda.launch(function, pointer, stream)
    graph = cuda.end(stream)
    assert np.isnan(ctypes.c_float.from_address(pointer).value)
    for _ in range(2):
        cuda.cudaGraphLaunch(executable := cuda.executable(graph), stream)
        assert ctypes.c_float.from_address(pointer).value == 2
    kinds, kind = [], ctypes.c_int()
    for node in cuda.nodes(graph):
        cuda.cudaGraphNodeGetType(node, ctypes.byref(kind))
        kinds.append(kind.value)
    assert kinds == [2, 0, 0]  # memset, kernel, kernel
    cuda.library.emulated_node_name.restype = ctypes.c_char_p
    assert cuda.library.emulated_node_name(ctypes.c_void_p(cuda.nodes(graph)[1])) == b"write_one"
    cuda.cudaGraphDestroy(graph)
    cuda.cudaGraphLaunch(executable, stream)
    cuda.cudaGraphExecDestroy(executable)
    refused(HANDLE, cuda.cudaGraphLaunch, executable, stream)


def test_a_graph_that_runs_may_be_destroyed(late: Cuda) -> None:
    pointer, stream = late.malloc(1), late.begin()
    late.fill(pointer, 1, 1, stream)
    executable = late.executable(late.end(stream))
    late.cudaGraphLaunch(executable, stream)
    late.cudaGraphExecDestroy(executable)
    late.cudaStreamSynchronize(stream)
    assert bytes_at(pointer, 1) == b"\1"


def test_a_graph_that_uses_memory_that_was_freed(cuda: Cuda) -> None:
    for use in (
        lambda pointer, stream: cuda.fill(pointer, 1, 4, stream),
        lambda pointer, stream: cuda.launch(cuda.function("write_one"), pointer, stream),
    ):
        pointer, stream = cuda.malloc(4), cuda.begin()
        use(pointer, stream)
        executable = cuda.executable(cuda.end(stream))
        cuda.cudaGraphLaunch(executable, stream)
        cuda.synchronize()
        cuda.cudaFree(pointer)
        cuda.cudaGraphLaunch(executable, stream)
        refused(ILLEGAL_ADDRESS, cuda.synchronize)
        assert len(cuda.faults()) == 1
        cuda.library.emulated_mend()


def test_one_graph_does_not_run_beside_itself(late: Cuda) -> None:
    pointer, stream, other = late.malloc(1), late.begin(), late.stream()
    late.fill(pointer, 1, 1, stream)
    executable = late.executable(late.end(stream))
    late.fill(pointer, 5, 1, stream)
    late.cudaGraphLaunch(executable, stream)
    late.cudaGraphLaunch(executable, other)
    late.fill(before := late.malloc(1), 1, 1, other)
    late.cudaStreamSynchronize(other)
    assert bytes_at(pointer, 1) == b"\1"
    late.fill(pointer, 7, 1, other)
    late.cudaStreamSynchronize(other)
    late.cudaStreamSynchronize(stream)
    assert bytes_at(pointer, 1) == b"\7"  # the launch in the other stream came after that in the first
    assert bytes_at(before, 1) == b"\1"


def test_another_stream_joins_a_capture_and_must_be_joined(cuda: Cuda) -> None:
    pointer = cuda.malloc(2)
    for joined in (True, False):
        stream, other = cuda.begin(), cuda.stream()
        fork, join = cuda.event(2), cuda.event(2)
        cuda.cudaEventRecord(fork, stream)
        cuda.cudaStreamWaitEvent(other, fork, 0)
        cuda.fill(pointer, 1, 1, stream)
        cuda.fill(pointer + 1, 2, 1, other)
        if joined:
            cuda.cudaEventRecord(join, other)
            cuda.cudaStreamWaitEvent(stream, join, 0)
            graph = cuda.end(stream)
            assert len(cuda.nodes(graph)) == 2
            assert bytes_at(pointer, 2) == b"\xff\xff"
            cuda.cudaGraphLaunch(cuda.executable(graph), stream)
            assert bytes_at(pointer, 2) == b"\1\2"
            refused(CAPTURED_EVENT, cuda.cudaStreamWaitEvent, cuda.stream(), join, 0)
        else:
            refused(UNJOINED, cuda.end, stream)
        cuda.fill(pointer, 9, 2, other)  # it is captured no more
        assert bytes_at(pointer, 2) == b"\t\t"


@pytest.mark.parametrize("timing", ["early", "late"])
def test_a_join_that_is_missing_inside_a_graph_shows(fresh: Callable[..., Cuda], timing: str) -> None:
    """Two nodes do not depend on each other: a late device runs them in another order."""
    cuda = fresh(timing=timing)
    pointer, stream, other = cuda.malloc(1), cuda.begin(), cuda.stream()
    fork, join = cuda.event(2), cuda.event(2)
    cuda.cudaEventRecord(fork, stream)
    cuda.cudaStreamWaitEvent(other, fork, 0)
    cuda.fill(pointer, 1, 1, stream)
    cuda.fill(pointer, 2, 1, other)
    cuda.cudaEventRecord(join, other)
    cuda.cudaStreamWaitEvent(stream, join, 0)
    cuda.cudaGraphLaunch(cuda.executable(cuda.end(stream)), stream)
    cuda.cudaStreamSynchronize(stream)
    assert bytes_at(pointer, 1) == {"early": b"\2", "late": b"\1"}[timing]


Rule = Callable[[Cuda, int], None]  # breaks a rule while the stream is captured


def launch_into_default_stream(cuda: Cuda, stream: int) -> None:
    cuda.fill(cuda.kept, 0, 1, 0)


def copy_from_ordinary_memory(cuda: Cuda, stream: int) -> None:
    cuda.copy(cuda.kept, ctypes.addressof(ctypes.create_string_buffer(1)), 1, TO_DEVICE, stream)


def copy_to_ordinary_memory(cuda: Cuda, stream: int) -> None:
    cuda.copy(ctypes.addressof(ctypes.create_string_buffer(1)), cuda.kept, 1, FROM_DEVICE, stream)


def wait_for_an_event_from_outside(cuda: Cuda, stream: int) -> None:
    cuda.cudaEventRecord(event := cuda.event(), cuda.stream())
    cuda.cudaStreamWaitEvent(stream, event, 0)


def wait_for_an_event_of_another_capture(cuda: Cuda, stream: int) -> None:
    cuda.cudaEventRecord(event := cuda.event(), cuda.begin())
    cuda.cudaStreamWaitEvent(stream, event, 0)


def wait_for_a_captured_event(cuda: Cuda, stream: int) -> None:
    cuda.cudaEventRecord(event := cuda.event(), stream)
    cuda.cudaEventSynchronize(event)


def ask_for_a_captured_event(cuda: Cuda, stream: int) -> None:
    cuda.cudaEventRecord(event := cuda.event(), stream)
    cuda.cudaEventQuery(event)


def default_stream_waits_for_a_captured_event(cuda: Cuda, stream: int) -> None:
    cuda.cudaEventRecord(event := cuda.event(), stream)
    cuda.cudaStreamWaitEvent(0, event, 0)


def end_in_a_stream_that_joined(cuda: Cuda, stream: int) -> None:
    cuda.cudaEventRecord(event := cuda.event(), stream)
    cuda.cudaStreamWaitEvent(other := cuda.stream(), event, 0)
    cuda.end(other)


# In any mode: operations on the captured stream itself, on captured work, and on the whole device.
ALWAYS: dict[str, tuple[Rule, int]] = {
    "a copy from ordinary memory": (copy_from_ordinary_memory, UNSUPPORTED),
    "a copy to ordinary memory": (copy_to_ordinary_memory, UNSUPPORTED),
    "waiting for the stream": (lambda cuda, stream: cuda.cudaStreamSynchronize(stream), UNSUPPORTED),
    "asking for the stream": (lambda cuda, stream: cuda.cudaStreamQuery(stream), UNSUPPORTED),
    "waiting for a captured event": (wait_for_a_captured_event, CAPTURED_EVENT),
    "asking for a captured event": (ask_for_a_captured_event, CAPTURED_EVENT),
    "an event from outside": (wait_for_an_event_from_outside, ISOLATION),
    "an event of another capture": (wait_for_an_event_of_another_capture, MERGE),
    "the default stream waits": (default_stream_waits_for_a_captured_event, IMPLICIT),
    "ended in another stream": (end_in_a_stream_that_joined, UNMATCHED),
    "waiting for the device": (lambda cuda, stream: cuda.synchronize(), UNSUPPORTED),
}
# What the mode may forbid.
UNSAFE: dict[str, Rule] = {
    "cudaMalloc": lambda cuda, stream: cuda.malloc(1) and None,
    "cudaFree": lambda cuda, stream: cuda.cudaFree(cuda.kept),
    "cudaHostAlloc": lambda cuda, stream: cuda.pinned(1) and None,
    "cudaMallocManaged": lambda cuda, stream: cuda.made("cudaMallocManaged", ctypes.c_size_t(1), 1) and None,
    "cudaMemcpy": lambda cuda, stream: cuda.cudaMemcpy(cuda.kept, cuda.kept, ctypes.c_size_t(1), ON_DEVICE),
    "cudaMemset": lambda cuda, stream: cuda.cudaMemset(cuda.kept, 0, ctypes.c_size_t(1)),
    "another stream": lambda cuda, stream: cuda.cudaStreamSynchronize(cuda.other),
    "another stream's state": lambda cuda, stream: cuda.cudaStreamQuery(cuda.other),
    "an event": lambda cuda, stream: cuda.cudaEventSynchronize(cuda.outside),
    "an event's state": lambda cuda, stream: cuda.cudaEventQuery(cuda.outside),
    "a module": lambda cuda, stream: cuda.function("trap") and None,
}


@pytest.fixture
def capturing(cuda: Cuda) -> Iterator[Cuda]:
    """A capture, with memory, a stream and an event created before."""
    cuda.kept, cuda.other, cuda.outside = cuda.malloc(4), cuda.stream(), cuda.event()  # type: ignore[attr-defined]
    yield cuda
    assert cuda.faults() == []


@pytest.mark.parametrize("mode", [GLOBAL, THREAD_LOCAL, RELAXED])
@pytest.mark.parametrize("rule", ALWAYS)
def test_rules_of_every_capture(capturing: Cuda, rule: str, mode: int) -> None:
    stream = capturing.begin(mode)
    breaks, code = ALWAYS[rule]
    refused(code, breaks, capturing, stream)
    refused(INVALIDATED, capturing.fill, capturing.kept, 0, 1, stream)  # the capture is over, but for its end
    refused(INVALIDATED, capturing.end, stream)
    capturing.fill(capturing.kept, 3, 1, stream)
    assert bytes_at(capturing.kept, 1) == b"\3"  # the stream goes on


@pytest.mark.parametrize("mode", [GLOBAL, THREAD_LOCAL, RELAXED])
@pytest.mark.parametrize("rule", UNSAFE)
@pytest.mark.parametrize("where", ["here", "in another thread"])
def test_what_the_mode_of_a_capture_forbids(capturing: Cuda, rule: str, mode: int, where: str) -> None:
    stream = capturing.begin(mode)
    capturing.fill(capturing.kept, 0, 1, stream)

    def call() -> None:
        UNSAFE[rule](capturing, stream)

    run = call if where == "here" else functools.partial(in_thread, call)
    if mode == RELAXED or (mode == THREAD_LOCAL and where != "here"):
        run()
        assert capturing.end(stream)
    else:
        refused(UNSUPPORTED, run)
        refused(INVALIDATED, capturing.end, stream)


def test_a_thread_may_let_itself_off(capturing: Cuda) -> None:
    stream = capturing.begin(GLOBAL)
    mode = ctypes.c_int(RELAXED)
    capturing.cudaThreadExchangeStreamCaptureMode(ctypes.byref(mode))
    assert mode.value == GLOBAL
    capturing.malloc(1)
    assert capturing.end(stream)


@pytest.mark.parametrize("mode", [GLOBAL, THREAD_LOCAL, RELAXED])
def test_waiting_for_the_device_ends_the_captures_of_all_threads(capturing: Cuda, mode: int) -> None:
    stream = capturing.begin(mode)
    refused(UNSUPPORTED, in_thread, capturing.synchronize)
    refused(INVALIDATED, capturing.end, stream)


def test_waiting_for_a_device_leaves_captures_on_another_alone(fresh: Callable[..., Cuda]) -> None:
    cuda = fresh(devices=2)
    stream = cuda.begin(THREAD_LOCAL)

    def wait() -> None:
        cuda.cudaSetDevice(1)
        cuda.synchronize()

    in_thread(wait)
    assert cuda.end(stream)


def test_the_default_stream_cannot_be_captured(cuda: Cuda) -> None:
    refused(UNSUPPORTED, cuda.cudaStreamBeginCapture, 0, RELAXED)
    stream = cuda.begin()
    refused(ILLEGAL_STATE, cuda.cudaStreamBeginCapture, stream, RELAXED)
    cuda.end(stream)
    refused(ILLEGAL_STATE, cuda.end, stream)


@pytest.mark.parametrize("flags", [0, NON_BLOCKING])
def test_the_default_stream_while_a_blocking_one_is_captured(capturing: Cuda, flags: int) -> None:
    status = ctypes.c_int()
    for use in (
        lambda: capturing.fill(capturing.kept, 0, 1, 0),
        lambda: capturing.cudaEventRecord(capturing.outside, 0),
        lambda: capturing.cudaStreamSynchronize(0),
        lambda: capturing.cudaMemcpy(capturing.kept, capturing.kept, ctypes.c_size_t(1), ON_DEVICE),
    ):
        stream = capturing.begin(RELAXED, flags)
        if flags:
            use()
            assert capturing.end(stream)
        else:
            refused(IMPLICIT, capturing.cudaStreamIsCapturing, 0, ctypes.byref(status))
            refused(IMPLICIT, use)
            refused(INVALIDATED, capturing.end, stream)


def test_a_capture_ends_in_the_thread_that_began_it(cuda: Cuda) -> None:
    for mode in (GLOBAL, THREAD_LOCAL):
        stream = cuda.begin(mode)
        refused(WRONG_THREAD, in_thread, lambda stream=stream: cuda.end(stream) and None)
        assert cuda.end(stream)
    stream = cuda.begin(RELAXED)
    in_thread(lambda: cuda.end(stream) and None)


def test_whether_a_stream_is_captured(cuda: Cuda) -> None:
    status, stream = ctypes.c_int(), cuda.begin()

    def of(handle: int) -> int:
        cuda.cudaStreamIsCapturing(handle, ctypes.byref(status))
        return status.value

    assert (of(stream), of(cuda.stream()), of(0)) == (1, 0, 0)
    refused(UNSUPPORTED, cuda.cudaStreamSynchronize, stream)
    assert of(stream) == 2
    refused(INVALIDATED, cuda.end, stream)
    assert of(stream) == 0


def test_a_capture_under_way_shows_its_nodes(cuda: Cuda) -> None:
    pointer, stream = cuda.malloc(1), cuda.begin()
    cuda.fill(pointer, 0, 1, stream)
    status, graph = ctypes.c_int(), ctypes.c_void_p()
    cuda.cuStreamGetCaptureInfo_v2(stream, ctypes.byref(status), None, ctypes.byref(graph), None, None)
    assert (status.value, len(cuda.nodes(graph.value or 0))) == (1, 1)


def test_memory_of_a_pool_in_a_capture_is_not_emulated(cuda: Cuda) -> None:
    stream = cuda.begin()
    refused(801, cuda.made, "cudaMallocAsync", ctypes.c_size_t(1), stream)
    assert "not emulated" in cuda.faults()[0]


# --- launches ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "code"),
    [
        ({"grid": (0, 1, 1)}, INVALID),
        ({"grid": (1, 65536, 1)}, INVALID),
        ({"grid": (1, 1, 65536)}, INVALID),
        ({"grid": (2**31 - 1, 65535, 65535)}, 0),
        ({"block": (0, 1, 1)}, INVALID),
        ({"block": (1025, 1, 1)}, INVALID),
        ({"block": (32, 33, 1)}, INVALID),
        ({"block": (1, 1, 65)}, INVALID),
        ({"block": (1, 16, 64)}, 0),
        ({"shared": 48 << 10}, 0),
        ({"shared": (48 << 10) + 1}, INVALID),
    ],
)
def test_the_sizes_of_a_launch(late: Cuda, sizes: dict[str, Any], code: int) -> None:
    function, pointer = late.function("write_one"), late.malloc(4)
    if code:
        refused(code, functools.partial(late.launch, function, pointer, **sizes))
    else:
        late.launch(function, pointer, **sizes)


def test_launch_bounds(cuda: Cuda) -> None:
    function, pointer = cuda.function("bounded"), cuda.malloc(4)
    cuda.launch(function, pointer, block=(128, 1, 1))
    refused(OUT_OF_RESOURCES, functools.partial(cuda.launch, function, pointer, block=(129, 1, 1)))


@pytest.mark.parametrize(
    ("registers", "threads", "fits"),
    [
        (64, 1024, True),
        (65, 1024, False),
        (128, 512, True),
        (129, 512, False),
        (255, 256, True),
        (73, 768, True),
        (73, 769, False),
    ],
)
def test_registers_of_all_threads_are_at_most_65536(cuda: Cuda, registers: int, threads: int, fits: bool) -> None:
    """Allocated in units of 8, so 73 count as 80, and for 4 warps at a time: 769 threads count as 896."""
    function, pointer = cuda.function("write_one"), cuda.malloc(4)
    cuda.registers = registers
    launch = functools.partial(cuda.launch, function, pointer, block=(threads, 1, 1))
    if fits:
        launch()
    else:
        refused(OUT_OF_RESOURCES, launch)


@pytest.mark.parametrize(("capability", "most"), [(75, 64), (80, 163), (90, 227), (120, 99)])
def test_shared_memory_beyond_48_kib_must_be_asked_for(fresh: Callable[..., Cuda], capability: int, most: int) -> None:
    cuda = fresh(capability=capability)
    function, pointer = cuda.function("shared"), cuda.malloc(4)  # has 40 KiB of static shared memory
    launch = functools.partial(cuda.launch, function, pointer)
    launch(shared=8 << 10)
    refused(INVALID, functools.partial(launch, shared=(8 << 10) + 1))
    refused(INVALID, cuda.cuFuncSetAttribute, function, 8, ((most - 40) << 10) + 1)
    cuda.cuFuncSetAttribute(function, 8, (most - 40) << 10)
    launch(shared=(most - 40) << 10)
    refused(INVALID, functools.partial(launch, shared=((most - 40) << 10) + 1))


@pytest.mark.parametrize(
    ("kernel", "offset", "code", "words"),
    [
        ("write_one", 4, ILLEGAL_ADDRESS, "in no allocation"),
        ("write_one", 2**40, ILLEGAL_ADDRESS, "in no allocation"),
        ("write_one", 1, MISALIGNED, "misaligned"),
        ("trap", 0, LAUNCH_FAILURE, "a trap"),
    ],
)
def test_what_a_kernel_does_wrong_ends_the_context(cuda: Cuda, kernel: str, offset: int, code: int, words: str) -> None:
    pointer = cuda.malloc(5) if offset == 1 else cuda.malloc(4)
    cuda.launch(cuda.function(kernel), pointer + offset)  # the error comes later
    for call in (cuda.synchronize, lambda: cuda.malloc(1), lambda: cuda.stream(), lambda: cuda.function(kernel)):
        refused(code, call)
    (fault,) = cuda.faults()
    assert kernel in fault
    assert words in fault
    cuda.library.emulated_mend()
    cuda.synchronize()


def test_memory_of_another_device_is_none_of_a_kernel(fresh: Callable[..., Cuda]) -> None:
    cuda = fresh(devices=2)
    pointer, host = cuda.malloc(4), cuda.pinned(4)
    managed = cuda.made("cudaMallocManaged", ctypes.c_size_t(4), 1)
    cuda.cudaSetDevice(1)
    function = cuda.function("write_one")
    cuda.launch(function, host)
    cuda.launch(function, managed)
    cuda.copy(cuda.malloc(4), pointer, 4, ON_DEVICE)  # the driver goes through the host
    cuda.synchronize()
    refused(217, cuda.cudaDeviceEnablePeerAccess, 0, 0)
    cuda.launch(function, pointer)
    refused(ILLEGAL_ADDRESS, cuda.synchronize)
    assert "in no allocation" in cuda.faults()[0]


def test_a_kernel_belongs_to_its_device(fresh: Callable[..., Cuda]) -> None:
    cuda = fresh(devices=2)
    function = cuda.function("write_one")
    cuda.cudaSetDevice(1)
    refused(HANDLE, cuda.launch, function, cuda.malloc(4), cuda.stream())


def test_what_is_not_emulated_says_so(cuda: Cuda) -> None:
    assert cuda.library.emulated_unknown(b"cudaMallocArray") == 801
    value = ctypes.c_int()
    refused(INVALID, cuda.cudaDeviceGetAttribute, ctypes.byref(value), 9999, 0)
    refused(INVALID, cuda.cuFuncGetAttribute, ctypes.byref(value), 99, cuda.function("trap"))
    assert [fault.split(" ")[0] for fault in cuda.faults()] == ["cudaMallocArray", "attribute", "attribute"]


def test_a_forked_child_cannot_use_the_device(cuda: Cuda) -> None:
    child = os.fork()
    if not child:
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        os._exit(cuda.library.cudaMemGetInfo(ctypes.byref(free), ctypes.byref(total)))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3  # cudaErrorInitializationError


# --- options, and the installed CuPy ---------------------------------------------------------------------------------


def test_options_from_words() -> None:
    assert Options.parse("") == Options()
    options = Options.parse("devices=3,timing=late,pageable=late,capability=75,memory=1GiB/256MiB")
    assert options == Options(3, "late", "late", 75, (1 << 30, 256 << 20))
    assert options.memory_of_each() == [1 << 30, 256 << 20, 256 << 20]
    assert Options.parse(str(options)) == options


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("timing=soon", "timing must be one of .*early.*, got 'soon'"),
        ("devices=0", "devices must be one of"),
        ("capability=61", "capability must be one of .*, got 61"),
        ("memory=64", "KiB, MiB or GiB, got '64'"),
        ("memory=64KiB", "at least 1 MiB"),
        ("colour=red", "has the options devices, timing, .*, got 'colour=red'"),
    ],
)
def test_options_that_are_wrong(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Options.parse(text)


def test_another_cupy_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"cupy-cuda12x": "13.6.0"}

    def version(name: str) -> str:
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(RuntimeError, match=r"knows CuPy 14.2, but cupy-cuda12x 13.6.0 is installed"):
        cupy_wheel()
    versions.clear()
    with pytest.raises(RuntimeError, match="needs cupy-cuda12x or cupy-cuda13x"):
        cupy_wheel()


def test_a_runtime_that_lacks_a_function_is_refused(tmp_path: Path) -> None:
    library, _ = libraries()
    less = build(
        "test-runtime", ['extern "C" int cudaMalloc() { return 5; }\nextern "C" int cudaOther() { return 6; }']
    )
    with pytest.raises(RuntimeError, match=r"lacks cudaDeviceCanAccessPeer, .*cudaFree,"):
        overlay.lay_over(less, ctypes.CDLL(str(library)))


def test_functions_are_laid_over_those_of_a_loaded_library(tmp_path: Path) -> None:
    """Ours replace those of the same name; the others become stubs that report their name."""
    ours = Path(shutil.copy(build("test-ours", [
        """extern "C" int cudaKnown(int x) { return x + 1; }
        extern "C" int emulated_unknown(const char* name) { return name[4] * 1000; }"""
    ]), tmp_path / "ours.so"))  # fmt: skip
    body = "int y = x; for (int i = 0; i < x; i++) y = y * 3 + i; return y;"
    names = ("cudaKnown", "cudaElse", "cudaGetErrorName", "other")
    theirs = Path(shutil.copy(build("test-theirs", [
        "".join(f'extern "C" int {name}(int x) {{ {body} }}\n' for name in names)
    ]), tmp_path / "theirs.so"))  # fmt: skip
    loaded, plain = ctypes.CDLL(str(theirs)), ctypes.CDLL(str(theirs)).other(4)
    overlay.lay_over(theirs, ctypes.CDLL(str(ours)))
    assert loaded.cudaKnown(4) == 5
    assert loaded.cudaElse(4) == ord("E") * 1000
    assert loaded.cudaGetErrorName(4) == loaded.other(4) == plain


def test_a_function_too_short_for_a_jump_is_refused(tmp_path: Path) -> None:
    ours = build(
        "test-short-ours", ['extern "C" int cudaKnown() { return 1; }\nextern "C" int emulated_unknown() { return 2; }']
    )
    theirs = build("test-short-theirs", ['extern "C" void cudaKnown() {}'])
    loaded = ctypes.CDLL(str(theirs))
    with pytest.raises(RuntimeError, match=r"cudaKnown in .* has \d+ bytes, less than the 12"):
        overlay.lay_over(theirs, ctypes.CDLL(str(ours)))
    loaded.cudaKnown()  # as it was


# --- the real CuPy ---------------------------------------------------------------------------------------------------


def on_cupy(code: str, options: str = "") -> str:
    """The output of ``code`` with the real CuPy on the emulated device, in a new process."""
    try:
        cupy_wheel()
    except RuntimeError as error:
        missing("gpu", str(error))
    before = (
        f"import sys; sys.path.insert(0, {str(TESTS)!r})\n"
        f"import emulated_gpu; emulated_gpu.install(emulated_gpu.Options.parse({options!r}))\n"
        "import cupy, numpy as np\n"
    )
    run = subprocess.run([sys.executable, "-c", before + code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_cupy_computes() -> None:
    code = """
x = cupy.arange(1000, dtype=cupy.float32)
print(float((x * 2 + 1).sum()), int(cupy.argmax(x)), cupy.cuda.Device(0).compute_capability)
print(float((x.reshape(10, 100) @ x[:100]).sum()))
with cupy.cuda.Stream(non_blocking=True) as stream:
    y = cupy.zeros(4)
    y += 1
    stream.begin_capture()
    y += 1
    graph = stream.end_capture()
    graph.launch(), graph.launch()
    print(y.get().tolist())
print(emulated_gpu.faults())
"""
    product = float((np.arange(1000.0).reshape(10, 100) @ np.arange(100.0)).sum())
    expected = f"1000000.0 999 75\n{product}\n[3.0, 3.0, 3.0, 3.0]\n[]\n"
    assert on_cupy(code, "capability=75,timing=late") == expected


def test_memory_of_cupys_pool_is_not_a_number_when_it_changes_hands() -> None:
    """A capture, in which the pool calls nothing of CUDA, does not notice."""
    code = """
x = cupy.ones(4)
pointer = x.data.ptr
old = cupy.ndarray(4, memptr=cupy.cuda.MemoryPointer(cupy.cuda.UnownedMemory(pointer, 32, None), 0))
print(old)
del x
print(old)
y = cupy.empty(4)
print(y, y.data.ptr == pointer)
for stream in (cupy.cuda.Stream(), cupy.cuda.Stream(non_blocking=True)):
    del y
    with stream:
        y = cupy.empty(4)
        y[:] = 1
        stream.begin_capture()
        cupy.empty(4)
    cupy.empty(4)
    stream.end_capture()
    stream.synchronize()
    print(y)
"""
    nan = "[nan nan nan nan]"
    assert on_cupy(code, "timing=late").splitlines() == ["[1. 1. 1. 1.]", nan, f"{nan} True", *["[1. 1. 1. 1.]"] * 2]


def test_registers_are_those_that_the_compiler_reports() -> None:
    """For a kernel that needs many, the numbers in the cubin equal those that NVRTC reports."""
    code = r"""
import re, emulated_gpu.registers as registers
from cupy_backends.cuda.libs import nvrtc
source = '''extern "C" __global__ void f(double* x) { double y[40]; for (int i = 0; i < 40; i++) y[i] = x[i];
__syncthreads(); for (int i = 0; i < 40; i++) x[39 - i] = y[i] * y[(i * 7) % 40]; }
extern "C" __global__ void g(float* x) { x[threadIdx.x] = 1; }'''
cupy.RawModule(code=source, options=("--std=c++17",)).get_function("f")
(ptx,) = [text for text in emulated_gpu.device._loaded[0].texts.values() if "f(" in text]
program = nvrtc.createProgram(source, "", (), ())
nvrtc.compileProgram(program, ("-arch=sm_75", "-ftz=true", "--ptxas-options=-v", "--std=c++17"))
log = nvrtc.getProgramLog(program)
said = dict(zip(re.findall("entry function '(.)'", log), map(int, re.findall(r"Used (\d+) registers", log))))
found = registers.registers(ptx, 75)
print(said == found, found["f"] > 64 > found["g"])
x = cupy.zeros(40)
function = cupy.RawModule(code=source, options=("--std=c++17",)).get_function("f")
function((1,), (512,), (x,))
try:
    function((1,), (1024,), (x,))
except cupy.cuda.driver.CUDADriverError as error:
    print(error)
"""
    assert on_cupy(code, "capability=75").splitlines() == [
        "True True",
        "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES: too many resources requested for launch",
    ]


def test_a_test_during_which_the_device_noted_a_fault_fails(tmp_path: Path) -> None:
    """The next test finds the device reset; child processes have the device too."""
    (tmp_path / "conftest.py").write_text(
        f"import sys\nsys.path.insert(0, {str(TESTS)!r})\nfrom emulated_gpu.plugin import *\n"
    )
    (tmp_path / "test_it.py").write_text(
        """
import subprocess, sys, pytest
def launch(count):
    import cupy
    f = cupy.RawKernel('extern "C" __global__ void f(float* x) { x[threadIdx.x] = 1; }', "f")
    x = cupy.cuda.alloc(400 << 20)
    f((1,), (1,), (x.ptr + count,))
    cupy.cuda.runtime.deviceSynchronize()
@pytest.mark.gpu
def test_right():
    launch(0)
@pytest.mark.gpu
def test_wrong():
    with pytest.raises(Exception, match="Illegal|illegal"):
        launch(400 << 20)
def test_right_again():
    launch(0)
def test_a_process():
    code = "import cupy; print(cupy.cuda.runtime.getDeviceCount(), cupy.arange(3).sum())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "2 3\\n"
"""
    )
    try:
        cupy_wheel()
    except RuntimeError as error:
        missing("gpu", str(error))
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:zarr",
        "--emulate-gpu=devices=2",
        "test_it.py",
    ]
    env = os.environ | {"EMULATED_GPU_CACHE": str(cache())}
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, env=env)
    assert "emulated GPU: CuPy 14.2" in run.stdout
    assert "2 gpu tests ran on the emulated device with CuPy 14.2" in run.stdout, run.stdout + run.stderr
    assert "4 passed, 1 error" in run.stdout, run.stdout
    assert "ERROR test_it.py::test_wrong - " in run.stdout
    assert "the emulated GPU noted: f: thread" in run.stdout


def test_registers_of_what_is_no_cubin() -> None:
    header = bytearray(64)
    header[:6] = b"\x7fELF\x02\x01"
    assert registers_in(bytes(header) + b"\0" * 64) == {}
