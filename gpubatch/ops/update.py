"""Update rules, bound to a backend and an element type: in blocks with NumPy, compiled for the CPU, or on CUDA.

NumPy runs a formula as :mod:`gpubatch.ops.program` has it. The build compiled the formulas of ``rules``, if it found a
C++ compiler; others are compiled on first use (:mod:`gpubatch.ops.host_compiler`), and so is a CUDA kernel.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np

from gpubatch.backend import Array, Backend, CudaBackend, compute_dtype
from gpubatch.errors import ShapeError
from gpubatch.formula import Element, Trace
from gpubatch.ops.compile import C_TYPES, cuda_kernel, host_library, kernel_source
from gpubatch.ops.host_compiler import Place, place_of
from gpubatch.ops.program import BLOCK_BYTES, Program, blocks_of
from gpubatch.ops.reduce import Reducer, blocks_in_order
from gpubatch.staging import Stages

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
    in float32: the formula works on that, and w is its rounded copy. A w that something else has changed counts.
    """
    dtype = compute_dtype(storage)
    if isinstance(backend, CudaBackend):
        return CudaUpdate(trace, dtype, backend, storage, master)
    if storage != dtype:
        return HalfUpdate(trace, master)
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
    """The formula with NumPy, a block after another; one pass more for reductions."""

    def __init__(self, trace: Trace, dtype: np.dtype[Any], form: str = "NumPy") -> None:
        *before, last = trace.passes
        self.form = form
        self.program = Program(last.trace, dtype)
        self.reducers = [Reducer(of_pass, dtype) for of_pass in before]
        self.scaled: Array = None

    def __call__(
        self, arrays: Tuples, scalars: Rows, control: Array | None = None, row_of: Sequence[int] | None = None
    ) -> None:
        """See :class:`Update`."""
        if control is not None and control[1]:
            return
        size, written = self.program.block, self.program.written
        for i, group in enumerate(arrays):
            if not group[0].size:
                continue
            row = scalars[row_of[i] if row_of else 0]
            values = self.values(functools.partial(blocks_in_order, group, size), row, control)
            self.on_blocks(blocks_of(group, size, written), row, control, values)

    def values(
        self, read: Callable[[], Iterator[tuple[Array, ...]]], scalars: tuple[float, ...], control: Array | None
    ) -> list[Array]:
        """The reductions over an array that ``read()`` gives, a whole block after another, for each pass again."""
        values: list[Array] = []
        for reducer in self.reducers:
            reducer.program.scalars[:] = scalars
            for blocks in read():
                reducer.add(self._scaled(blocks, control), values)
            values += reducer.finish()
        return values

    def on_blocks(
        self,
        pieces: Iterator[tuple[Array, ...]],
        scalars: tuple[float, ...],
        control: Array | None,
        values: list[Array],
    ) -> None:
        """Update the blocks of an array."""
        self.program.scalars[:] = scalars
        for blocks in pieces:
            self.program.on(*self._scaled(blocks, control), *values)

    def _scaled(self, blocks: tuple[Array, ...], control: Array | None) -> tuple[Array, ...]:
        """``blocks`` with g scaled."""
        if control is None or control[0] == 1:
            return blocks
        if self.scaled is None:
            self.scaled = np.empty(self.program.block, self.program.dtype)
        w, g, *state = blocks
        return w, np.multiply(g, control[0], out=self.scaled[: g.size]), *state


class HalfUpdate:
    """An update of float16 w and g by one for float32, a block at a time; reductions are NumPy's."""

    def __init__(self, trace: Trace, master: bool) -> None:
        dtype = np.dtype(np.float32)
        self.update = cpu_update(trace, dtype) if len(trace.passes) == 1 else HostUpdate(trace, dtype)
        self.master, self.form = master, self.update.form
        self.w, self.g = (np.empty(BLOCK_BYTES // 4, np.float32) for _ in range(2))
        self.rounded = np.empty(self.w.size, np.float16)

    def __call__(
        self, arrays: Tuples, scalars: Rows, control: Array | None = None, row_of: Sequence[int] | None = None
    ) -> None:
        """See :class:`Update`."""
        if control is not None and control[1]:
            return
        for i, group in enumerate(arrays):
            if not group[0].size:
                continue
            row = scalars[row_of[i] if row_of else 0]
            if isinstance(self.update, HostUpdate):
                values = self.update.values(functools.partial(self._widened_in_order, group), row, control)
                self.update.on_blocks(self._widened(group), row, control, values)
            else:
                for blocks in self._widened(group):
                    self.update([blocks], [row], control)

    def _widened_in_order(self, group: tuple[Array, ...]) -> Iterator[tuple[Array, ...]]:
        """The blocks in float32, to read."""
        return map(self._wide, blocks_in_order(group, self.w.size))

    def _widened(self, group: tuple[Array, ...]) -> Iterator[tuple[Array, ...]]:
        """The blocks in float32; w is rounded when the next ones are taken."""
        for w, *others in blocks_of(group, self.w.size, [i for i in range(len(group)) if i != 1]):
            wide = self._wide((w, *others))
            yield wide
            with np.errstate(over="ignore"):  # beyond 65504 a weight is infinite, as arithmetic in float16 has it
                w[...] = wide[0]

    def _wide(self, blocks: tuple[Array, ...]) -> tuple[Array, ...]:
        w, g, *state = blocks
        gradient = self.g[: g.size]
        gradient[...] = g
        if self.master:
            *state, wide = state
            rounded = self.rounded[: w.size]
            with np.errstate(over="ignore"):
                rounded[...] = wide
            # What something else has changed meanwhile is not the rounded copy any more, and counts.
            if not np.array_equal(rounded.view(np.uint16), bits := w.view(np.uint16)):
                np.copyto(wide, w, where=rounded.view(np.uint16) != bits)
        else:
            wide = self.w[: w.size]
            wide[...] = w
        return wide, gradient, *state


# --- compiled for the CPU ------------------------------------------------------------------------------------------


class CompiledUpdate:
    """The formula as machine code; the bits are those of :class:`HostUpdate`.

    NumPy does arrays that are strided, of another byte order, or that overlap with the gradient.
    """

    def __init__(self, trace: Trace, dtype: np.dtype[Any], library: Any, place: Place) -> None:
        self.trace, self.dtype, self.form = trace, dtype, place.form
        reductions = [[r.name for r in of_pass.reductions] for of_pass in trace.passes[:-1]]
        self.compiled = library.Update(place.number, dtype.name, len(trace.arrays), reductions)
        self.run = self.compiled.run
        self.numpy: HostUpdate | None = None

    def at_once(
        self, arrays: Tuples, scalars: Rows, control: Array | None = None, row_of: Sequence[int] | None = None
    ) -> bool:
        """Update all groups at once; False, with nothing changed, where the library declines shapes or types."""
        if control is None:
            return bool(self.run(arrays, scalars, row_of, 1.0))
        return bool(control[1] or self.run(arrays, scalars, row_of, float(control[0])))

    def ahead(self, arrays: Tuples, scalars: np.ndarray, row_of: Sequence[int] | None, step: np.ndarray) -> bool:
        """Update all groups with those ``scalars`` of (steps, groups, numbers) that are of step ``step[0]``.

        ``step``, an int64, is then one more. It can be recorded, and made again. False, with nothing changed, where the
        library declines shapes or types.
        """
        return bool(self.compiled.run_ahead(arrays, scalars, row_of, step))

    def __call__(
        self, arrays: Tuples, scalars: Rows, control: Array | None = None, row_of: Sequence[int] | None = None
    ) -> None:
        """See :class:`Update`."""
        for i, group in enumerate(arrays):
            row = [scalars[row_of[i]]] if row_of else scalars
            if not self.at_once([group], row, control):
                self.numpy = self.numpy or HostUpdate(self.trace, self.dtype)
                self.numpy([group], row, control)


# --- CUDA ----------------------------------------------------------------------------------------------------------


class CudaUpdate:
    """The formula as one kernel, launched once for all arrays; see ``kernels/update.cuh``.

    A pass for reductions is a launch before it; see ``kernels/reduce.cuh``.
    """

    form = "CUDA kernel"

    def __init__(
        self, trace: Trace, dtype: np.dtype[Any], backend: CudaBackend, storage: np.dtype[Any], master: bool
    ) -> None:
        self.backend = backend
        # Bytes of an element: w and g as they are stored, then the state.
        self.itemsizes = np.array([storage.itemsize] * 2 + [dtype.itemsize] * (len(trace.arrays) - 2 + master))
        stored = dtype.name, storage.name, master
        self.kernel = cuda_kernel(backend, update_source(trace, *stored), "update_arrays")
        self.reduce = [cuda_kernel(backend, source, "reduce_arrays") for source in reduce_sources(trace, *stored)]
        self.most = max((len(of_pass.reductions) for of_pass in trace.passes), default=0)
        self.count = len(trace.passes[-1].trace.values)
        # For the reductions of a parameter's rows, its values, and its ticket.
        self.totals = self.values = self.tickets = None
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
    ) -> tuple[Array, ...]:
        """Launch the update with ``scalars`` on the device, of shape (groups, scalars of the formula).

        With ``progress`` it ends a captured step. Then ``scalars`` is a stack of such rows, one for each step, as
        kernels/step.cuh says, and ``running`` holds the running statistics and a copy from before the step. Returns the
        table of addresses and the scratch that the kernels use; an update of other arrays makes new ones.
        """
        rows = row_of or [0] * len(arrays)
        key = tuple((*(a.data.ptr for a in group), group[0].size, r) for group, r in zip(arrays, rows, strict=True))
        if key != self.key:
            self._lay_out(arrays, key)
        self._launch(scalars, control, progress, running)
        return self.table, self.totals, self.values, self.tickets

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
            of_step = self.table, scalars, step, control, progress
            for kernel in self.reduce:
                self._run(kernel, *of_step, self.totals, self.values, self.tickets)
            self._run(self.kernel, *of_step, *(running or (None, None)), count, self.values)

    def _run(self, kernel: Any, *arguments: Any) -> None:
        kernel((self.rows,), (THREADS,), tuple(np.uint64(0) if a is None else a for a in arguments))

    def _lay_out(self, arrays: Tuples, key: tuple[Any, ...]) -> None:
        for group in arrays:
            if not all(a.flags.c_contiguous for a in group):
                raise ShapeError("a CUDA update needs C-contiguous arrays, got a strided view; copy it first")
        table = piece_table(
            np.array(key, np.int64).reshape(len(arrays), -1), self.itemsizes, self.piece, self.count > 0
        )
        self.key, self.rows, self.table = key, len(table), self.backend.asarray(table)
        if self.count:
            self.totals = self.backend.zeros(len(table) * self.most, np.float64)
            self.values = self.backend.zeros(len(arrays) * self.count, np.float64)
            self.tickets = self.backend.zeros(len(arrays), np.uint32)

    @property
    def piece(self) -> int:
        """The most elements of a row of the table."""
        return THREADS * PACKS * (16 // int(self.itemsizes[0]))

    def reduction_bytes(self, sizes: Sequence[int]) -> int:
        """The memory for reductions over parameters of these sizes; the table of addresses is not counted."""
        rows = sum(-(-n // self.piece) for n in sizes)
        return 8 * rows * self.most + (8 * self.count + 4) * len(sizes)


def piece_table(addresses: np.ndarray, itemsizes: np.ndarray, piece: int, reductions: bool = False) -> np.ndarray:
    """Each row of ``addresses`` cut into rows of at most ``piece`` elements.

    A row has an address for each array, then the size, and the number of the row of scalars. For ``reductions`` there
    follow the number of the row of ``addresses``, its size, its first row in the table and how many it has there.
    """
    sizes = addresses[:, -2]
    pieces = -(-sizes // piece)
    row = np.repeat(np.arange(len(addresses)), pieces)
    first = (np.cumsum(pieces) - pieces)[row]
    number = np.arange(len(row)) - first
    table = addresses[row]
    table[:, :-2] += (number * piece)[:, None] * itemsizes
    table[:, -2] = np.minimum(sizes[row] - number * piece, piece)
    return np.column_stack([table, row, sizes[row], first, pieces[row]]) if reductions else table


def update_source(trace: Trace, dtype: str = "float32", storage: str | None = None, master: bool = False) -> str:
    """The whole CUDA source of a formula's last pass: the generated part, then the loop around it.

    ``storage`` is the type in which w and g are stored: that of ``dtype``, or float16.
    """
    last, names = trace.passes[-1].trace, [("const T" if a == "g" else "T&", a) for a in trace.arrays]
    read = read_by(last)
    body = [
        "__device__ inline void update(T* element, const T* k, const T* reduced) {",
        *(f"    {kind} {a} = element[{i}];" for i, (kind, a) in enumerate(names) if a in last.targets or a in read),
        *(f"    const T {name} = reduced[{i}];" for i, name in enumerate(last.values) if name in read),
        *(f"    {line}" for line in last.c.splitlines()),
        "}",
    ]
    return _source(trace, len(last.values), ["step.cuh", "arrays.cuh"], body, "update.cuh", dtype, storage, master)


def reduce_sources(trace: Trace, dtype: str = "float32", storage: str | None = None, master: bool = False) -> list[str]:
    """The whole CUDA source of each pass before the last: what :func:`update_source` is for that."""
    sources = []
    for of_pass, reductions in trace.passes[:-1]:
        read = read_by(of_pass)
        listed = " ".join(f"DO({j}, {STRUCTS[r.name]})" for j, r in enumerate(reductions))
        body = [
            f"constexpr int REDUCTIONS = {len(reductions)};",
            f"#define EACH_REDUCTION(DO) {listed}",
            "__device__ inline void operands(const T* element, const T* k, const T* reduced, T* operand) {",
            *(f"    const T {a} = element[{i}];" for i, a in enumerate(of_pass.arrays) if a in read),
            *(f"    const T {name} = reduced[{i}];" for i, name in enumerate(of_pass.values) if name in read),
            *(f"    T& {target} = operand[{j}];" for j, target in enumerate(of_pass.targets)),
            *(f"    {line}" for line in of_pass.c.splitlines()),
            "}",
        ]
        shared = ["step.cuh", "block.cuh", "arrays.cuh"]
        sources.append(_source(trace, len(of_pass.values), shared, body, "reduce.cuh", dtype, storage, master))
    return sources


def read_by(trace: Trace) -> set[str]:
    """The names of the inputs that a formula uses: a compiler would warn of others."""
    return {x.name for y in trace.elements for x in y.operands if isinstance(x, Element)}


# The struct of each reduction in kernels/reduce.cuh.
STRUCTS = {"norm": "Norm", "mean": "Mean", "max_abs": "MaxAbs"}


def _source(
    trace: Trace,
    known: int,
    shared: list[str],
    body: list[str],
    kernel: str,
    dtype: str,
    storage: str | None,
    master: bool,
) -> str:
    """The source of a pass that reads ``known`` reductions: ``body`` between the files ``shared`` and ``kernel``."""
    half = storage == "float16"
    return "\n".join(
        [
            f"// {trace.name} on {storage or dtype}, generated by gpubatch from one formula.",
            *([kernel_source("half.cuh")] if half else []),
            f"typedef {C_TYPES[dtype]} T;",
            f"typedef {'Half' if half else 'T'} S;",
            f"constexpr bool MASTER = {str(master).lower()};",
            f"constexpr int ARRAYS = {len(trace.arrays)};   // {', '.join(trace.arrays)}",
            f"constexpr int VALUES = {len(trace.passes[-1].trace.values)}, KNOWN = {known};",
            f"constexpr int SCALARS = {max(1, len(trace.scalars))};  // computed on the host in double, once a step:",
            *(f"//     k[{i}] = {text}" for text, i in trace.scalars.items()),
            "",
            *map(kernel_source, ("math.cuh", "last_block.cuh", *shared)),
            *body,
            "",
            kernel_source(kernel),
        ]
    )
