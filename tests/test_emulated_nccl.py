"""The emulated device's NCCL: right against NumPy, ordered by the stream, and each rule, broken on purpose, is noticed.

Each test runs the real CuPy in a process of its own, in which the ranks are threads.
"""

from __future__ import annotations

import pytest
from test_emulated_device import on_cupy

pytestmark = pytest.mark.exhaustive  # they test only the emulated device

# Calls rank(number, communicator, stream) in a thread for each of SIZE ranks.
RANKS = """
import sys, threading, numpy
from cupy.cuda import nccl
FLOAT, DOUBLE, SUM = nccl.NCCL_FLOAT32, nccl.NCCL_FLOAT64, nccl.NCCL_SUM
def on_all(rank, device=lambda number: number):
    name, raised = nccl.get_unique_id(), [None] * SIZE
    def run(number):
        try:
            with cupy.cuda.Device(device(number)), cupy.cuda.Stream(non_blocking=True) as stream:
                rank(number, nccl.NcclCommunicator(SIZE, name, number), stream)
                stream.synchronize()
        except Exception as error:
            raised[number] = str(error)
    threads = [threading.Thread(target=run, args=(number,)) for number in range(SIZE)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    return raised
"""

CALLS = """
n = 70_001  # more than a socket holds
given = numpy.random.default_rng(1).standard_normal((SIZE, SIZE, n))
found = [None] * SIZE
def rank(number, comm, stream):
    x, to = cupy.asarray(given[number], DTYPE), cupy.empty((4, SIZE, n), DTYPE)
    kind = FLOAT if DTYPE == "float32" else DOUBLE
    def calls():
        comm.allReduce(x.data.ptr, to[0].data.ptr, SIZE * n, kind, SUM, stream.ptr)
        comm.allGather(x[0].data.ptr, to[1].data.ptr, n, kind, stream.ptr)
        comm.reduceScatter(x.data.ptr, to[2].data.ptr, n, kind, SUM, stream.ptr)
        nccl.groupStart()
        for other in range(SIZE):
            comm.send(x[other].data.ptr, n, kind, other, stream.ptr)
            comm.recv(to[3, other].data.ptr, n, kind, other, stream.ptr)
        nccl.groupEnd()
        nccl.groupStart()
        for root in range(SIZE):
            comm.broadcast(x[root].data.ptr, x[root].data.ptr, n, kind, root, stream.ptr)
        nccl.groupEnd()
    stream.begin_capture()
    calls()
    graph = stream.end_capture()
    x *= 2  # after the capture, before the graph
    graph.launch()
    found[number] = to.get(), x.get()
    assert (comm.rank_id(), comm.size(), comm.device_id()) == (number, SIZE, number)
    assert comm.check_async_error() is None
    comm.destroy()
assert on_all(rank) == [None] * SIZE
x = 2 * given.astype(DTYPE)
for number, (to, after) in enumerate(found):
    assert numpy.allclose(to[0], x.sum(0), rtol=1e-5, atol=1e-5) and (to[0] == found[0][0][0]).all()
    assert (to[1] == x[:, 0]).all() and (to[3] == x[:, number]).all()
    assert numpy.allclose(to[2, 0], x[:, number].sum(0), rtol=1e-5, atol=1e-5)
    assert (after == [x[root, root] for root in range(SIZE)]).all()
assert SIZE < 3 or (found[0][0][0] != x.cumsum(0, DTYPE)[-1]).any()  # a ring adds in an order of its own
print("right", emulated_gpu.faults())
"""


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("timing", ["early", "late"])
def test_the_calls(size: int, timing: str) -> None:
    dtype = "float32" if timing == "early" else "float64"
    assert on_cupy(f"SIZE, DTYPE = {size}, {dtype!r}\n{RANKS}{CALLS}", f"devices=4,timing={timing}") == "right []\n"


# What two ranks do that NCCL forbids, and what is said of it.
BROKEN = {
    "different calls": ("comm.allReduce(x, x, 3 + number, FLOAT, SUM, s)", "calls ncclAllReduce of"),
    "other numbers": ("comm.allGather(x, y, 4, (FLOAT, DOUBLE)[number], s)", "of 4 numbers of type 8"),
    "a message that does not fit": (
        "(comm.recv(x, 4, FLOAT, 1, s) if number == 0 else comm.send(x, 8, FLOAT, 0, s))",
        "rank 0 calls ncclRecv of 4 numbers of type 7, rank 1 ncclSend of 8",
    ),
    "main memory": ("comm.allReduce(host, x, 4, FLOAT, SUM, s)", "the buffer to send is not 16 bytes of device memory"),
    "another device's memory": (
        "comm.allGather(x, others[1 - number], 4, FLOAT, s)",
        "the buffer to receive to is not",
    ),
    "a rank that is not there": ("comm.send(x, 4, FLOAT, 2, s)", "ncclSend: there is no rank 2"),
    "a maximum": ("comm.allReduce(x, x, 4, FLOAT, nccl.NCCL_MAX, s)", "only sums of float32 and float64 are emulated"),
    "a group without a start": ("nccl.groupEnd()", "ncclGroupEnd without ncclGroupStart"),
    "another current device": (
        "cupy.cuda.Device(1 - number).use(), comm.allReduce(x, x, 4, FLOAT, SUM, s)",
        "the communicator is of device 1",
    ),
    "what is not emulated": ("comm.reduce(x, x, 4, FLOAT, SUM, 0, s)", "ncclReduce is not emulated"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_rule(case: str) -> None:
    call, said = BROKEN[case]
    code = f"""
SIZE = 2
{RANKS}
others, both, memory = [0, 0], threading.Barrier(2), numpy.ones(64, "float32")
def rank(number, comm, stream):
    kept = cupy.zeros(64, "float32"), cupy.zeros(64, "float32")
    (x, y), s, host = [array.data.ptr for array in kept], stream.ptr, memory.ctypes.data
    others[number] = y
    both.wait()
    {call}
    stream.synchronize()
    both.wait()  # no rank is gone before the other one was told
on_all(rank)
print(*emulated_gpu.faults())
"""
    assert said in on_cupy(code, "devices=2")


def test_two_ranks_on_one_device() -> None:
    code = f"SIZE = 2\n{RANKS}\nprint(on_all(lambda *_: None, lambda number: 1))"
    assert "NCCL_ERROR_INVALID_USAGE" in on_cupy(code, "devices=2")


def test_a_rank_that_is_gone() -> None:
    # NCCL waits on; a communicator tells of the error, and ends the wait when it is aborted.
    code = f"""
SIZE = 2
{RANKS}
def rank(number, comm, stream):
    if number == 1:
        return comm.abort()
    x = cupy.zeros(4, "float32")
    comm.allReduce(x.data.ptr, x.data.ptr, 4, FLOAT, SUM, stream.ptr)
    stream.synchronize()
    comm.check_async_error()
print(on_all(rank)[0])
"""
    assert "remote process exited" in on_cupy(code, "devices=2")
