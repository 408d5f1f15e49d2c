"""Run a recorded formula with NumPy: its operations one after another on a block that stays in the cache.

Intermediate values go into a few registers of a block's size, so no allocation grows with the arrays.
"""

from __future__ import annotations

import functools
import operator
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from gpubatch.backend import Array
from gpubatch.errors import FormulaError
from gpubatch.formula import BoundActivation, BoundScoreLoss, Element, Op, Scalar, Trace

BLOCK_BYTES = 1 << 16  # of each array and register; the four to ten of a formula stay in the second-level cache
ROOM = 3 << 19  # bytes for all of them in a layer's formula: fewer calls are worth more than the second-level cache
MOST_PROGRAMS = 256  # that a thread keeps: every activation with every value of its parameters is another one


class Program:
    """A formula as a list of NumPy calls on numbered slots: the arrays' blocks, the registers, the scalars.

    ``names`` are the arrays of the slots: those that the formula reads, then the others that it writes. A target in
    ``same`` shares the memory of the array that it is mapped to. A block has ``block`` elements, by default
    :data:`BLOCK_BYTES`. Threads must not share a program: the registers are its own.
    """

    def __init__(
        self,
        trace: Trace,
        dtype: np.dtype[Any],
        same: Mapping[str, str] | None = None,
        block: int | None = None,
    ) -> None:
        self.names, self.written = slots_of(trace, same or {})
        self.block = block or BLOCK_BYTES // dtype.itemsize
        self.dtype = dtype
        steps, self.copies, self.kinds, constants = allocate(trace, same or {})
        self.steps = [(function, picker(operands), out) for function, operands, out in steps]
        self.registers = [np.empty(1 if x.uniform else self.block, bool if x.boolean else dtype) for x in self.kinds]
        # As arrays without dimensions: NumPy takes these in half the time of a Python float.
        self.scalars = np.zeros(len(trace.scalars), dtype)
        self.scalar_slots = [self.scalars[i, ...] for i in range(len(trace.scalars))]
        self.scalar_slots += [np.array(x, dtype) for x in constants]
        self.rest: list[Array] = []  # the slots after the arrays, for blocks of the shape of the last ones
        self.shape: tuple[int, ...] | None = None

    def run(self, *arrays: Array) -> None:
        """The formula on whole arrays, one for each of ``names``, of one shape; those that are read, of any dtype."""
        if arrays[0].size <= self.block:
            self.on(*arrays)
            return
        for blocks in blocks_of(arrays, self.block, self.written):
            self.on(*blocks)

    def on(self, *blocks: Array) -> None:
        """The formula on one block of each array, of one shape, with the scalars as they are."""
        shape = blocks[0].shape
        if shape != self.shape:
            registers = [
                r if kind.uniform else r[: blocks[0].size].reshape(shape)
                for r, kind in zip(self.registers, self.kinds, strict=True)
            ]
            self.rest, self.shape = [*registers, *self.scalar_slots], shape
        slots = [*blocks, *self.rest]
        for function, pick, out in self.steps:
            function(*pick(slots), out=slots[out])
        for target, source in self.copies:
            slots[target][...] = slots[source]


def picker(places: tuple[int, ...]) -> Callable[[list[Any]], Sequence[Any]]:
    """What gives the elements of a list at ``places``, in a third of the time that a loop takes."""
    first = places[0]
    return operator.itemgetter(*places) if len(places) > 1 else operator.itemgetter(slice(first, first + 1))


def program_of(
    bound: BoundActivation | BoundScoreLoss, form: str, dtype: np.dtype[Any], same: tuple[str, str] | None = None
) -> Program:
    """One form of a formula for arrays of ``dtype``, kept for this thread; the two arrays named in ``same`` are one."""
    programs, key = KEPT.programs, (bound, form, dtype, same)
    if key not in programs:
        if len(programs) >= MOST_PROGRAMS:
            programs.clear()
        if isinstance(bound, BoundScoreLoss):
            trace = bound.declared.form(dtype.name, form)
        else:
            trace = getattr(bound.declared.form(dtype.name), form)
        programs[key] = bound_program(bound, trace, dict([same]) if same else None)
    return programs[key]


class Kept(threading.local):
    """A cache for each thread, since a program's registers are for one."""

    def __init__(self) -> None:
        self.programs: dict[Any, Program] = {}


KEPT = Kept()


def bound_program(
    bound: BoundActivation | BoundScoreLoss, trace: Trace, same: Mapping[str, str] | None = None
) -> Program:
    """The program of an activation or a loss, whose scalars are always the same.

    Its blocks are as large as the cache has room for, since layers are small: a call of NumPy takes half a microsecond.
    """
    dtype, same = np.dtype(trace.dtype), same or {}
    steps, copies, registers, _ = allocate(trace, same)
    width = dtype.itemsize * len(slots_of(trace, same)[0]) + sum(1 if x.boolean else dtype.itemsize for x in registers)
    block = 1 << (ROOM // width).bit_length() - 1
    if not registers and len(steps) + len(copies) == 1:  # which leaves nothing in the cache for another
        block = sys.maxsize
    program = Program(trace, dtype, same, max(BLOCK_BYTES // dtype.itemsize, block))
    program.scalars[:] = bound.scalars(trace)
    return program


def slots_of(trace: Trace, same: Mapping[str, str]) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """The names of the arrays that a formula reads or writes, and which of them it writes."""
    names = tuple(dict.fromkeys([*trace.arrays, *trace.values, *(same.get(name, name) for name in trace.targets)]))
    return names, tuple(names.index(same.get(name, name)) for name in trace.targets)


def blocks_of(arrays: Sequence[Array], size: int, written: Sequence[int]) -> Iterator[tuple[Array, ...]]:
    """One-dimensional pieces of the arrays of at most ``size`` elements; those that are ``written`` for writing too."""
    if all(a.flags.c_contiguous for a in arrays):
        flat = tuple([a.reshape(-1) for a in arrays])
        if flat[0].size <= size:
            yield flat
            return
        for start in range(0, flat[0].size, size):
            yield tuple(a[start : start + size] for a in flat)
    elif arrays[0].size:
        access: list[Any] = [["readwrite"] if i in written else ["readonly"] for i in range(len(arrays))]
        with np.nditer(list(arrays), ["external_loop", "buffered"], access, buffersize=size) as pieces:
            yield from pieces


class Register(NamedTuple):
    """What a register is for: conditions or numbers, one of each element or one for a whole array."""

    boolean: bool
    uniform: bool


Allocation: TypeAlias = tuple[
    list[tuple[Any, tuple[int, ...], int]], list[tuple[int, int]], list[Register], list[float]
]


def allocate(trace: Trace, same: Mapping[str, str] | None = None) -> Allocation:
    """(steps, copies, registers, constants): the slot that each value of ``trace`` lives in.

    A step is a function, the slots of its operands, and that of its result. Slots are numbered: arrays first, then
    registers, scalars and constants. A value is computed straight into the array that it is the result for, once
    nothing reads the old content any more; other values take a free register.
    Results that are not in place by then are copied at the end.
    """
    computed = [(x, x.op) for x in trace.elements if x.op is not None]
    last_use = [x.number for x in trace.elements]
    for x, _ in computed:
        for y in x.operands:
            if isinstance(y, Element):
                last_use[y.number] = x.number
    names, written = slots_of(trace, same or {})
    wanted = list(zip(written, trace.results, strict=True))
    for _, result in wanted:
        if isinstance(result, Element):
            last_use[result.number] = len(trace.elements)

    def is_free(until: int, x: Element, op: Op) -> bool:
        return until < x.number or (until == x.number and op.in_place)

    # Element number i is the old content of array i, for those that are read, then the values.
    read = len(trace.arrays) + len(trace.values)
    slot_of = {i: i for i in range(read)}
    homes: dict[int, int] = {}
    for slot, result in wanted:
        if not isinstance(result, Element) or result.op is None or result.uniform or result.number in homes:
            continue
        if slot >= read or is_free(last_use[slot], result, result.op):
            homes[result.number] = slot

    # Until its result is there, an array that is only written serves as a register.
    spare = {slot: number for number, slot in homes.items() if slot >= read}
    spare_until = dict.fromkeys(spare, 0)

    def is_spare(slot: int, x: Element, op: Op) -> bool:
        result, until = trace.elements[spare[slot]], last_use[x.number]
        before = x.number < result.number and result.op is not None and is_free(until, result, result.op)
        return before and not (op.boolean or x.uniform) and is_free(spare_until[slot], x, op)

    registers: list[Register] = []
    busy_until: list[int] = []
    for x, op in computed:
        if x.number in homes:
            slot_of[x.number] = homes[x.number]
            continue
        wants, until = Register(op.boolean, x.uniform), last_use[x.number]
        spares = [slot for slot in spare if is_spare(slot, x, op)]
        if spares:
            slot_of[x.number] = spares[0]
            spare_until[spares[0]] = until
            continue
        fitting = (r for r, kind in enumerate(registers) if kind == wants and is_free(busy_until[r], x, op))
        r = next(fitting, len(registers))
        if r == len(registers):
            registers.append(wants)
            busy_until.append(0)
        busy_until[r] = until
        slot_of[x.number] = len(names) + r

    first_scalar = len(names) + len(registers)
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
    return steps, copies, registers, constants


@functools.lru_cache(maxsize=256)
def check_slope(bound: BoundActivation) -> None:
    """Raise if the slope of an activation is not a number somewhere although the activation is: it overflows there."""
    dtype = np.dtype(np.float32)
    x = np.concatenate([-TRIED, TRIED])
    form, y, dx = bound.declared.form(dtype.name), np.empty_like(x), np.empty_like(x)
    with np.errstate(all="ignore"):
        slope = [np.empty_like(x)] if form.keeps else []
        bound_program(bound, form.forward).run(x, y, *slope)
        kept = slope or ([y] if form.reads_y else [])
        bound_program(bound, form.backward).run(*kept, np.ones_like(x), dx)
    wrong = np.isfinite(y) & ~np.isfinite(dx)
    if wrong.any():
        raise FormulaError(
            f"the derivative of {bound.declared.name} is {dx[wrong][0]} at x = {x[wrong][0]:g}, "
            f"where the activation is {y[wrong][0]:g}: something overflows on the way; "
            f"return (y, slope) with a slope that does not"
        )


TRIED = np.geomspace(1e-3, 1e4, 64, dtype=np.float32)
