"""Run a recorded formula: on NumPy in cache-sized blocks, compiled for the CPU, or on CUDA as one fused kernel.

With NumPy the formula's operations run one after another on a block that stays in the cache, into a few registers of
that size: nothing is allocated that grows with the arrays. The formulas of ``rules`` were compiled when gpubatch was
built, if there was a compiler. A CUDA kernel is compiled when it is first needed, and kept.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import itertools
import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np

from gpubatch.backend import Array, Backend, CudaBackend
from gpubatch.errors import ShapeError
from gpubatch.formula import Element, Op, Scalar, Trace

__all__ = ["Update", "cuda_kernel", "kernel_source", "update_for", "update_source"]

HOST_PIECE = 1 << 14  # elements of each array that compiled code handles as one row of its table
WORTH_THREADS = 1 << 18  # elements from which a second thread gains more than the 60 µs that waking it takes
BLOCK_BYTES = 1 << 16  # of each array and register; the four to ten of a formula stay in the second-level cache
THREADS = 256
PACKS = 4  # 16-byte packs of each array that one thread moves
C_TYPES = {"float32": "float", "float64": "double"}


class Update(Protocol):
    """A formula bound to an element type and a backend: ``update(arrays, scalars)`` changes ``arrays`` in place.

    ``arrays`` is a list of (w, g, state ...) tuples, all of one shape within a tuple. Not to be shared by threads:
    each instance has its own registers.
    """

    def __call__(self, arrays: Sequence[tuple[Array, ...]], scalars: Sequence[float]) -> None:
        """Change w and the state in place."""


def update_for(trace: Trace, dtype: np.dtype[Any], backend: Backend) -> Update:
    """The update that ``trace`` describes, on arrays of ``dtype`` on ``backend``."""
    if isinstance(backend, CudaBackend):
        return CudaUpdate(trace, dtype, backend)
    library = host_library()
    if isinstance(library, str) or not hasattr(library, symbol := host_symbol(trace, dtype.name)):
        return HostUpdate(trace, dtype)
    return CompiledUpdate(trace, dtype, getattr(library, symbol))


# --- NumPy ---------------------------------------------------------------------------------------------------------


class HostUpdate:
    """The formula as a list of NumPy calls on numbered slots: the arrays' blocks, the registers, the scalars."""

    def __init__(self, trace: Trace, dtype: np.dtype[Any]) -> None:
        self.block = BLOCK_BYTES // dtype.itemsize
        self.steps, self.copies, register_types, constants = allocate(trace)
        self.registers = [np.empty(self.block, bool if boolean else dtype) for boolean in register_types]
        # As arrays without dimensions: NumPy takes these in half the time of a Python float.
        self.scalars = np.zeros(len(trace.scalars), dtype)
        self.scalar_slots = [self.scalars[i, ...] for i in range(len(trace.scalars))]
        self.scalar_slots += [np.array(x, dtype) for x in constants]

    def __call__(self, arrays: Sequence[tuple[Array, ...]], scalars: Sequence[float]) -> None:
        self.scalars[:] = scalars
        for group in arrays:
            for blocks in self.blocks(group):
                n = blocks[0].size
                registers = self.registers if n == self.block else [r[:n] for r in self.registers]
                slots = [*blocks, *registers, *self.scalar_slots]
                for function, operands, out in self.steps:
                    function(*[slots[i] for i in operands], out=slots[out])
                for target, source in self.copies:
                    slots[target][...] = slots[source]

    def blocks(self, group: tuple[Array, ...]) -> Iterator[tuple[Array, ...]]:
        """One-dimensional pieces of the arrays, at most a block long, for reading and writing."""
        if all(a.flags.c_contiguous for a in group):
            flat = [a.reshape(-1) for a in group]
            for start in range(0, flat[0].size, self.block):
                stop = start + self.block
                yield tuple(a[start:stop] for a in flat)
        elif group[0].size:
            access: list[Any] = [["readonly"] if i == 1 else ["readwrite"] for i in range(len(group))]
            with np.nditer(group, ["external_loop", "buffered"], access, buffersize=self.block) as pieces:
                yield from pieces


Allocation: TypeAlias = tuple[list[tuple[Any, tuple[int, ...], int]], list[tuple[int, int]], list[bool], list[float]]


def allocate(trace: Trace) -> Allocation:
    """(steps, copies, whether each register is boolean, constants): the slot that each value of ``trace`` lives in.

    Slots are numbered: arrays first, then registers, scalars and constants. A value is computed straight into the
    array that it is the result for, once nothing reads the old content any more; other values take a free register.
    Results that are not in place by then are copied at the end.
    """
    computed = [(x, x.op) for x in trace.elements if x.op is not None]
    last_use = [x.number for x in trace.elements]
    for x, _ in computed:
        for y in x.operands:
            if isinstance(y, Element):
                last_use[y.number] = x.number
    array_slots = [0, *range(2, len(trace.arrays))]  # the arrays that are written, g is not
    wanted = list(zip(array_slots, trace.results, strict=True))
    for _, result in wanted:
        if isinstance(result, Element):
            last_use[result.number] = len(trace.elements)

    def is_free(until: int, x: Element, op: Op) -> bool:
        return until < x.number or (until == x.number and op.in_place)

    # Element number i is the old content of array i, for the first ones.
    slot_of = {i: i for i in range(len(trace.arrays))}
    homes: dict[int, int] = {}
    for slot, result in wanted:
        if not isinstance(result, Element) or result.op is None or result.number in homes:
            continue
        if is_free(last_use[slot], result, result.op):
            homes[result.number] = slot

    booleans: list[bool] = []
    busy_until: list[int] = []
    for x, op in computed:
        if x.number in homes:
            slot_of[x.number] = homes[x.number]
            continue
        fitting = (r for r, b in enumerate(booleans) if b == op.boolean and is_free(busy_until[r], x, op))
        r = next(fitting, len(booleans))
        if r == len(booleans):
            booleans.append(op.boolean)
            busy_until.append(0)
        busy_until[r] = last_use[x.number]
        slot_of[x.number] = len(trace.arrays) + r

    first_scalar = len(trace.arrays) + len(booleans)
    constants: list[float] = []

    def place(x: Any) -> int:
        if isinstance(x, Element):
            return slot_of[x.number]
        if isinstance(x, Scalar):
            return first_scalar + trace.scalars[x.text]
        constants.append(float(x))
        return first_scalar + len(trace.scalars) + len(constants) - 1

    steps = [(op.numpy, tuple(map(place, x.operands)), slot_of[x.number]) for x, op in computed]
    copies = [(slot, source) for slot, source in ((slot, place(x)) for slot, x in wanted) if slot != source]
    return steps, copies, booleans, constants


# --- compiled for the CPU ------------------------------------------------------------------------------------------


class CompiledUpdate:
    """The formula as machine code from the build; the bits are those of :class:`HostUpdate`.

    Arrays that are not contiguous go to NumPy.
    """

    def __init__(self, trace: Trace, dtype: np.dtype[Any], function: Any) -> None:
        self.trace, self.itemsize = trace, dtype.itemsize
        self.scalars = np.zeros(max(1, len(trace.scalars)), dtype)
        self.function = function
        function.argtypes, function.restype = [ctypes.c_void_p] * 2 + [ctypes.c_longlong] * 2, None
        self.seen: list[weakref.ref[np.ndarray]] = []
        self.rows = self.elements = 0
        self.run: Callable[[int, int], Any]
        self.strided: list[tuple[Array, ...]] = []
        self.numpy: HostUpdate | None = None

    def __call__(self, arrays: Sequence[tuple[Array, ...]], scalars: Sequence[float]) -> None:
        self.scalars[: len(scalars)] = scalars
        flat = [a for group in arrays for a in group]
        if len(flat) != len(self.seen) or any(ref() is not a for ref, a in zip(self.seen, flat, strict=True)):
            self._lay_out(arrays, flat)
        in_parallel(self.run, self.rows, self.elements)
        if self.numpy is not None:
            self.numpy(self.strided, scalars)

    def _lay_out(self, arrays: Sequence[tuple[Array, ...]], flat: list[Array]) -> None:
        contiguous = [group for group in arrays if all(a.flags.c_contiguous for a in group)]
        addresses = [[*(a.ctypes.data for a in group), group[0].size] for group in contiguous]
        # An array of no elements, or none that is contiguous, gives a table without rows.
        shape = (len(contiguous), len(self.trace.arrays) + 1)
        table = piece_table(np.array(addresses, np.int64).reshape(shape), self.itemsize, HOST_PIECE)
        self.table = table  # kept alive for its address
        self.run = functools.partial(self.function, table.ctypes.data, self.scalars.ctypes.data)
        self.rows, self.elements = len(table), int(table[:, -1].sum())
        self.strided = [group for group in arrays if not all(a.flags.c_contiguous for a in group)]
        self.numpy = HostUpdate(self.trace, self.scalars.dtype) if self.strided else None
        self.seen = [weakref.ref(a) for a in flat]


def in_parallel(run: Callable[[int, int], Any], rows: int, elements: int) -> None:
    """``run(first, last)`` over all rows, shared out to threads where that is worth it; they sleep when idle."""
    workers = min(rows, cores()) if elements >= WORTH_THREADS else 1
    if workers <= 1:
        run(0, rows)
        return
    bounds = [rows * i // workers for i in range(workers + 1)]
    others = [pool(os.getpid()).submit(run, a, b) for a, b in itertools.pairwise(bounds[1:])]
    run(bounds[0], bounds[1])
    for other in others:
        other.result()


@functools.cache
def cores() -> int:
    """The processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.cache
def pool(process: int) -> Any:
    """The threads of this process: a forked child has none of its parent's, and makes its own."""
    from concurrent.futures import ThreadPoolExecutor

    return ThreadPoolExecutor(max(1, cores() - 1), thread_name_prefix="gpubatch")


@functools.cache
def host_library() -> Any:
    """The library of compiled formulas, or why there is none, in words."""
    if os.environ.get("GPUBATCH_HOST") == "0":
        return "switched off by GPUBATCH_HOST=0"
    found = importlib.util.find_spec("gpubatch._host")
    if found is None or found.origin is None:
        return "not built: no C++ compiler was found when gpubatch was installed"
    try:
        return ctypes.CDLL(found.origin)
    except OSError as error:
        return f"cannot be loaded: {error}"


# --- CUDA ----------------------------------------------------------------------------------------------------------


class CudaUpdate:
    """The formula as one kernel, launched once for all arrays; see ``kernels/update.cuh``."""

    def __init__(self, trace: Trace, dtype: np.dtype[Any], backend: CudaBackend) -> None:
        self.backend = backend
        self.itemsize = dtype.itemsize
        self.kernel = cuda_kernel(backend, update_source(trace, dtype.name), "update_arrays")
        self.host_scalars = np.zeros(max(1, len(trace.scalars)), dtype)
        self.scalars = backend.zeros(self.host_scalars.shape, dtype)
        self.key: tuple[Any, ...] = ()
        self.table: Array = None
        self.rows = 0

    def __call__(self, arrays: Sequence[tuple[Array, ...]], scalars: Sequence[float]) -> None:
        with self.backend.scope():
            key = tuple((*(a.data.ptr for a in group), group[0].size) for group in arrays)
            if key != self.key:
                self._lay_out(arrays, key)
            if self.rows:
                self.host_scalars[: len(scalars)] = scalars
                self.scalars.set(self.host_scalars)
                self.kernel((self.rows,), (THREADS,), (self.table, self.scalars))

    def _lay_out(self, arrays: Sequence[tuple[Array, ...]], key: tuple[Any, ...]) -> None:
        for group in arrays:
            if not all(a.flags.c_contiguous for a in group):
                raise ShapeError("a CUDA update needs C-contiguous arrays, got a strided view; copy it first")
        piece = THREADS * PACKS * (16 // self.itemsize)
        table = piece_table(np.array(key, np.int64).reshape(len(arrays), -1), self.itemsize, piece)
        self.key, self.rows, self.table = key, len(table), self.backend.asarray(table)


def piece_table(addresses: np.ndarray, itemsize: int, piece: int) -> np.ndarray:
    """Each row of ``addresses`` (one for each array, then a size) cut into rows of at most ``piece`` elements."""
    sizes = addresses[:, -1]
    pieces = -(-sizes // piece)
    row = np.repeat(np.arange(len(addresses)), pieces)
    number = np.arange(len(row)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    table = addresses[row]
    table[:, :-1] += (number * piece * itemsize)[:, None]
    table[:, -1] = np.minimum(sizes[row] - number * piece, piece)
    return table


def update_source(trace: Trace, dtype: str = "float32") -> str:
    """The CUDA source of a formula, whole: the generated part, then the loop around it."""
    names = ", ".join(f"{'const T ' if a == 'g' else 'T& '}{a} = element[{i}]" for i, a in enumerate(trace.arrays))
    return "\n".join(
        [
            f"// {trace.name} on {dtype}, generated by gpubatch from one formula.",
            f"typedef {C_TYPES[dtype]} T;",
            f"constexpr int ARRAYS = {len(trace.arrays)};   // {', '.join(trace.arrays)}",
            f"constexpr int SCALARS = {max(1, len(trace.scalars))};  // computed on the host in double, once a step:",
            *(f"//     k[{i}] = {text}" for text, i in trace.scalars.items()),
            "",
            kernel_source("math.cuh"),
            "__device__ inline void update(T* element, const T* k) {",
            *(f"    {declaration};" for declaration in names.split(", ")),
            *(f"    {line}" for line in trace.c.splitlines()),
            "}",
            "",
            kernel_source("update.cuh"),
        ]
    )


def host_symbol(trace: Trace, dtype: str) -> str:
    """The name of a formula's compiled form: a digest of all that the form depends on."""
    text = "\n".join([*trace.arrays, trace.c, str(len(trace.scalars)), kernel_source("math.cuh")])
    return f"update_{hashlib.sha256(text.encode()).hexdigest()[:16]}_{dtype}"


@functools.cache
def kernel_source(name: str) -> str:
    """The text of a file of ``kernels/``: beside the modules when installed, beside the package in a checkout."""
    here = os.path.dirname(os.path.abspath(__file__))
    folders = [os.path.join(here, "kernels"), os.path.join(os.path.dirname(here), "kernels")]
    for folder in folders:
        if os.path.isfile(path := os.path.join(folder, name)):
            with open(path, encoding="utf-8") as file:
                return file.read()
    raise FileNotFoundError(f"{name} is in none of {', '.join(folders)}; the installation is incomplete")


@functools.cache
def cuda_kernel(backend: Backend, source: str, name: str) -> Any:
    """The kernel ``name`` of ``source``, compiled on first use: ``kernel(grid, block, arguments)`` launches it."""
    assert isinstance(backend, CudaBackend)
    return backend.compile(source, name)
