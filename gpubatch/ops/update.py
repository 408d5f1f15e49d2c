"""Update rules, bound to a backend and an element type: in blocks with NumPy, compiled for the CPU, or on CUDA.

NumPy runs a formula as :mod:`gpubatch.ops.program` has it. The build compiled the formulas of ``rules``, if it found a
C++ compiler; others are compiled on first use (:mod:`gpubatch.ops.host_compiler`), and so is a CUDA kernel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np

from gpubatch.backend import Array, Backend, CudaBackend, compute_dtype
from gpubatch.errors import ShapeError
from gpubatch.formula import Trace
from gpubatch.ops.compile import C_TYPES, cuda_kernel, host_library, kernel_source
from gpubatch.ops.host_compiler import Place, place_of
from gpubatch.ops.program import BLOCK_BYTES, Program, blocks_of
from gpubatch.staging import Stages

__all__ = ["CudaUpdate", "Update", "update_for", "update_source"]

THREADS = 256
UPLOADS = 64  # copies of scalars that may be under way, hence steps that the host may be ahead of the device
PACKS = 4  # 16-byte packs of each array that one thread moves

Tuples: TypeAlias = list[tuple[Array, ...]]  # (w, g, state ...)
Rows: TypeAlias = list[tuple[float, ...]]  # a row of a formula's scalars for each group of parameters


class Update(Protocol):
    """A formula bound to an element type and a backend: ``update(arrays, scalars)`` changes ``arrays`` in place.

    The arrays of a tuple have one shape. ``row_of`` has the number of each tuple's row of ``scalars``; by default all
    take the first. Threads must not share an update: the registers are its own.

    ``control`` is an array of two numbers on the backend: ``control[0]`` scales the gradients; if ``control[1]`` is
    non-zero the step is skipped. A GPU reads it when the kernel runs, so the host need not wait for its value.

    ``form`` says in words what runs the formula.
    """

    form: str

    def __call__(
        self, arrays: Tuples, scalars: Rows, control: Array | None = None, row_of: Sequence[int] | None = None
    ) -> None:
        """Change w and the state in place."""


def update_for(trace: Trace, storage: np.dtype[Any], backend: Backend, master: bool = False) -> Update:
    """The update that ``trace`` describes, on ``backend``, for w and g of the dtype ``storage``.

    State has the same dtype, or float32 where ``storage`` is float16. With ``master``, the last array of a group is w
    in float32: the formula works on that, and w is its rounded copy.
    """
    dtype = compute_dtype(storage)
    if isinstance(backend, CudaBackend):
        return CudaUpdate(trace, dtype, backend, storage, master)
    if storage != dtype:
        return HalfUpdate(cpu_update(trace, dtype), master)
    return cpu_update(trace, dtype)


def cpu_update(trace: Trace, dtype: np.dtype[Any]) -> HostUpdate | CompiledUpdate:
    """The update on the CPU, compiled where that is possible."""
    library = host_library()
    if isinstance(library, str):
        return HostUpdate(trace, dtype, f"NumPy: {library}")
    place = place_of(library, trace, dtype.name)
    return HostUpdate(trace, dtype, place.form) if place.number < 0 else CompiledUpdate(trace, dtype, library, place)


# --- NumPy ---------------------------------------------------------------------------------------------------------


class HostUpdate:
    """The formula with NumPy, a block after another."""

    def __init__(self, trace: Trace, dtype: np.dtype[Any], form: str = "NumPy") -> None:
        self.form = form
        self.program = Program(trace, dtype)
        self.scaled: Array = None

    def __call__(
        self, arrays: Tuples, scalars: Rows, control: Array | None = None, row_of: Sequence[int] | None = None
    ) -> None:
        if control is not None and control[1]:
            return
        program, scale = self.program, None if control is None or control[0] == 1 else control[0]
        for i, group in enumerate(arrays):
            program.scalars[:] = scalars[row_of[i] if row_of else 0]
            for blocks in blocks_of(group, program.block, program.written):
                if scale is not None:
                    w, g, *state = blocks
                    blocks = (w, self._scaled(g, scale), *state)
                program.on(*blocks)

    def _scaled(self, g: Array, scale: Any) -> Array:
        if self.scaled is None:
            self.scaled = np.empty(self.program.block, self.program.dtype)
        return np.multiply(g, scale, out=self.scaled[: g.size])


class HalfUpdate:
    """An update of float16 w and g by one for float32, a block at a time."""

    def __init__(self, update: HostUpdate | CompiledUpdate, master: bool) -> None:
        self.update, self.master, self.form = update, master, update.form
        self.w, self.g = (np.empty(BLOCK_BYTES // 4, np.float32) for _ in range(2))

    def __call__(
        self, arrays: Tuples, scalars: Rows, control: Array | None = None, row_of: Sequence[int] | None = None
    ) -> None:
        if control is not None and control[1]:
            return
        for i, group in enumerate(arrays):
            row = [scalars[row_of[i]]] if row_of else scalars
            for w, g, *state in blocks_of(group, self.w.size, [i for i in range(len(group)) if i != 1]):
                wide, gradient = self.w[: w.size], self.g[: w.size]
                gradient[...] = g
                if self.master:
                    *state, wide = state
                else:
                    wide[...] = w
                self.update([(wide, gradient, *state)], row, control)
                with np.errstate(over="ignore"):  # beyond 65504 a weight is infinite, as arithmetic in float16 has it
                    w[...] = wide


# --- compiled for the CPU ------------------------------------------------------------------------------------------


class CompiledUpdate:
    """The formula as machine code; the bits are those of :class:`HostUpdate`.

    NumPy does arrays that are strided, of another byte order, or that overlap with the gradient.
    """

    def __init__(self, trace: Trace, dtype: np.dtype[Any], library: Any, place: Place) -> None:
        self.trace, self.dtype, self.form = trace, dtype, place.form
        self.run = library.Update(place.number, dtype.name, len(trace.arrays)).run
        self.numpy: HostUpdate | None = None

    def at_once(
        self, arrays: Tuples, scalars: Rows, control: Array | None = None, row_of: Sequence[int] | None = None
    ) -> bool:
        """Update all groups at once; False, with nothing changed, where the library declines shapes or types."""
        if control is None:
            return bool(self.run(arrays, scalars, row_of, 1.0))
        return bool(control[1] or self.run(arrays, scalars, row_of, float(control[0])))

    def __call__(
        self, arrays: Tuples, scalars: Rows, control: Array | None = None, row_of: Sequence[int] | None = None
    ) -> None:
        for i, group in enumerate(arrays):
            row = [scalars[row_of[i]]] if row_of else scalars
            if not self.at_once([group], row, control):
                self.numpy = self.numpy or HostUpdate(self.trace, self.dtype)
                self.numpy([group], row, control)


# --- CUDA ----------------------------------------------------------------------------------------------------------


class CudaUpdate:
    """The formula as one kernel, launched once for all arrays; see ``kernels/update.cuh``."""

    form = "CUDA kernel"

    def __init__(
        self, trace: Trace, dtype: np.dtype[Any], backend: CudaBackend, storage: np.dtype[Any], master: bool
    ) -> None:
        self.backend = backend
        # Bytes of an element: w and g as they are stored, then the state.
        self.itemsizes = np.array([storage.itemsize] * 2 + [dtype.itemsize] * (len(trace.arrays) - 2 + master))
        self.kernel = cuda_kernel(backend, update_source(trace, dtype.name, storage.name, master), "update_arrays")
        self.dtype, self.columns = dtype, max(1, len(trace.scalars))
        self.scalars = backend.zeros((1, self.columns), dtype)
        self.stages: Stages | None = None  # of the scalars
        self.key: tuple[Any, ...] = ()
        self.table: Array = None
        self.rows = 0

    def __call__(
        self, arrays: Tuples, scalars: Rows, control: Array | None = None, row_of: Sequence[int] | None = None
    ) -> None:
        """Copy the scalars to the device and launch."""
        with self.backend.scope():
            self._upload(scalars)
            self.launch(arrays, self.scalars, control, row_of=row_of)

    def again(self, scalars: Rows, control: Array | None) -> None:
        """Update the arrays of the last launch again."""
        with self.backend.scope():
            self._upload(scalars)
            self._launch(self.scalars, control)

    def _upload(self, scalars: Rows) -> None:
        if len(scalars) != len(self.scalars):
            self.scalars, self.stages = self.backend.zeros((len(scalars), self.columns), self.dtype), None
        if scalars[0]:
            if self.stages is None:
                self.stages = Stages(self.backend, self.scalars.nbytes, UPLOADS)
            self.stages.copy(np.array(scalars, self.dtype), self.scalars)

    def launch(
        self,
        arrays: Tuples,
        scalars: Array,
        control: Array | None,
        progress: Array | None = None,
        running: tuple[Array, Array] | None = None,
        row_of: Sequence[int] | None = None,
    ) -> Array:
        """Launch the update with ``scalars`` on the device, of shape (groups, scalars of the formula).

        With ``progress`` it ends a captured step. Then ``scalars`` is a stack of such rows, one for each step, as
        kernels/step.cuh says, and ``running`` holds the running statistics and a copy from before the step. Returns the
        table of addresses that the kernel reads; an update of other arrays makes a new one.
        """
        rows = row_of or [0] * len(arrays)
        key = tuple((*(a.data.ptr for a in group), group[0].size, r) for group, r in zip(arrays, rows, strict=True))
        if key != self.key:
            self._lay_out(arrays, key)
        self._launch(scalars, control, progress, running)
        return self.table

    def _launch(
        self,
        scalars: Array,
        control: Array | None,
        progress: Array | None = None,
        running: tuple[Array, Array] | None = None,
    ) -> None:
        if self.rows:
            count = np.int64(0 if running is None else running[0].size)
            step = np.int64(math.prod(scalars.shape[-2:]))
            arguments = (self.table, scalars, step, control, progress, *(running or (None, None)), count)
            self.kernel((self.rows,), (THREADS,), tuple(np.uint64(0) if a is None else a for a in arguments))

    def _lay_out(self, arrays: Tuples, key: tuple[Any, ...]) -> None:
        for group in arrays:
            if not all(a.flags.c_contiguous for a in group):
                raise ShapeError("a CUDA update needs C-contiguous arrays, got a strided view; copy it first")
        piece = THREADS * PACKS * (16 // int(self.itemsizes[0]))
        table = piece_table(np.array(key, np.int64).reshape(len(arrays), -1), self.itemsizes, piece)
        self.key, self.rows, self.table = key, len(table), self.backend.asarray(table)


def piece_table(addresses: np.ndarray, itemsizes: np.ndarray, piece: int) -> np.ndarray:
    """Each row of ``addresses`` cut into rows of at most ``piece`` elements.

    A row has an address for each array, then the size, and the number of the row of scalars.
    """
    sizes = addresses[:, -2]
    pieces = -(-sizes // piece)
    row = np.repeat(np.arange(len(addresses)), pieces)
    number = np.arange(len(row)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    table = addresses[row]
    table[:, :-2] += (number * piece)[:, None] * itemsizes
    table[:, -2] = np.minimum(sizes[row] - number * piece, piece)
    return table


def update_source(trace: Trace, dtype: str = "float32", storage: str | None = None, master: bool = False) -> str:
    """The whole CUDA source of a formula: the generated part, then the loop around it.

    ``storage`` is the type in which w and g are stored: that of ``dtype``, or float16.
    """
    names = ", ".join(f"{'const T ' if a == 'g' else 'T& '}{a} = element[{i}]" for i, a in enumerate(trace.arrays))
    half = storage == "float16"
    return "\n".join(
        [
            f"// {trace.name} on {storage or dtype}, generated by gpubatch from one formula.",
            *([kernel_source("half.cuh")] if half else []),
            f"typedef {C_TYPES[dtype]} T;",
            f"typedef {'Half' if half else 'T'} S;",
            f"constexpr bool MASTER = {str(master).lower()};",
            f"constexpr int ARRAYS = {len(trace.arrays)};   // {', '.join(trace.arrays)}",
            f"constexpr int SCALARS = {max(1, len(trace.scalars))};  // computed on the host in double, once a step:",
            *(f"//     k[{i}] = {text}" for text, i in trace.scalars.items()),
            "",
            *map(kernel_source, ("math.cuh", "last_block.cuh", "step.cuh")),
            "__device__ inline void update(T* element, const T* k) {",
            *(f"    {declaration};" for declaration in names.split(", ")),
            *(f"    {line}" for line in trace.c.splitlines()),
            "}",
            "",
            kernel_source("update.cuh"),
        ]
    )
