"""The emulated device's kernels: instructions against known answers, and each rule, broken on purpose, is noticed.

Expected values come from the PTX ISA's tables and formulas and from IEEE 754: by hand, from NumPy, or exact fractions.
"""

from __future__ import annotations

import ctypes
import math
import re
import shutil
import struct
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from emulate import ARCHITECTURES, ORDERS, ptx_of
from emulated_gpu import ptx
from emulated_gpu.instructions import TRANSLATORS
from emulated_gpu.modules import Module, build
from emulated_gpu.ptx import UnknownPTX
from emulated_gpu.translate import translate
from kernel_report import sources
from needs import missing

pytestmark = pytest.mark.exhaustive  # they test only the emulated device
RANGE = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_uint64, *[ctypes.POINTER(ctypes.c_uint64)] * 2)


class Hooks(ctypes.Structure):
    """The struct of device.h."""

    _fields_ = (("range", RANGE), ("reverse", ctypes.c_int))


@pytest.fixture(autouse=True, scope="module")
def _compiler() -> None:
    if shutil.which("g++") is None:
        missing("compiler", "g++ is not installed")


def launch(
    module: Module,
    kernel: str,
    arguments: Sequence[np.ndarray | np.generic],
    blocks: int = 1,
    threads: int = 1,
    dynamic_shared: int = 0,
    order: str = "forward",
) -> str | None:
    """Run a kernel of pointers and numbers; return its fault, if any. Memory is that of the arrays."""
    arrays = [(a.ctypes.data, a.ctypes.data + a.nbytes) for a in arguments if isinstance(a, np.ndarray)]

    def find(address: int, first: Any, last: Any) -> int:
        for start, end in arrays:
            if start <= address < end:
                first[0], last[0] = start, end
                return 1
        return 0

    found = module.kernels[kernel]
    packed = bytearray(found.parameter_bytes)
    for (offset, size), argument in zip(found.parameters, arguments, strict=True):
        is_array = isinstance(argument, np.ndarray)
        value = struct.pack("Q", argument.ctypes.data) if is_array else argument.tobytes()
        assert len(value) == size
        packed[offset : offset + size] = value
    run = module.library[found.symbol]
    run.restype = ctypes.c_char_p
    grid, block = (ctypes.c_uint32 * 3)(blocks, 1, 1), (ctypes.c_uint32 * 3)(threads, 1, 1)
    hooks = Hooks(RANGE(find), ORDERS.index(order))
    wrong = run(grid, block, ctypes.c_uint64(dynamic_shared), bytes(packed), ctypes.byref(hooks))
    return None if wrong is None else wrong.decode()


def cuda(source: str, architecture: int = 90) -> Module:
    return build(ptx_of(source, architecture))


# --- instructions ----------------------------------------------------------------------------------------------------
#
# A row has the values of r0 to r3 (b32, and h0 to h3, d0 to d3 of 16 and 64 bits, p0 to p3: whether they are not 0),
# then that of r, h, d or p, whichever the instruction names first: as bits. Each row is a thread of one block.


def f16(x: float) -> int:
    return int(np.float16(x).view(np.uint16))


def f32(x: float) -> int:
    return int(np.float32(x).view(np.uint32))


def f64(x: float) -> int:
    return int(np.float64(x).view(np.uint64))


INF, NAN = float("inf"), float("nan")
NAN32, NAN16 = 0x7FFFFFFF, 0x7FFF  # canonical
TINY = 2.0**-149  # the least subnormal number
SMALL = 2.0**-126  # the least normal one
M32, M64 = 2**32 - 1, 2**64 - 1
TOP32, TOP64 = 1 << 31, 1 << 63


def floats(*rows: tuple[float, ...]) -> list[tuple[int, ...]]:
    """Rows of f32; a NaN result is canonical."""
    return [(*map(f32, row[:-1]), NAN32 if row[-1] != row[-1] else f32(row[-1])) for row in rows]


def doubles(*rows: tuple[float, ...]) -> list[tuple[int, ...]]:
    return [tuple(map(f64, row)) for row in rows]


def halves(*rows: tuple[float, ...]) -> list[tuple[int, ...]]:
    return [(*map(f16, row[:-1]), NAN16 if row[-1] != row[-1] else f16(row[-1])) for row in rows]


def lanes(row: Callable[[int], tuple]) -> list[tuple]:
    """A row for each lane of a warp."""
    return [row(lane) for lane in range(32)]


ULP = 2.0**-23  # of 1
X = 1 + 2.0**-12  # its square, 1 + 2^-11 + 2^-24, has one bit too many

ROUNDING = {
    "add.rn.f32 r, r0, r1;": floats(
        (1, ULP / 2, 1), (1, 1.5 * ULP, 1 + 2 * ULP), (TINY, TINY, 2 * TINY), (INF, -INF, NAN), (-0.0, 0, 0)
    ),
    "add.f32 r, r0, r1;": floats((1, ULP / 2, 1)),
    "add.rz.f32 r, r0, r1;": floats((1, 0.75 * ULP, 1), (-1, -0.75 * ULP, -1), (1, -(2.0**-30), 1 - ULP / 2)),
    "add.rm.f32 r, r0, r1;": floats((1, 0.75 * ULP, 1), (-1, -(2.0**-30), -1 - ULP), (1, -1, -0.0)),
    "add.rp.f32 r, r0, r1;": floats((1, 2.0**-30, 1 + ULP), (-1, -0.75 * ULP, -1)),
    "add.rn.ftz.f32 r, r0, r1;": floats(
        (TINY, 0, 0),
        (-TINY, -0.0, -0.0),
        (SMALL, SMALL / 2, SMALL),
        (1.5 * SMALL, -SMALL, 0),
        (-1.5 * SMALL, SMALL, -0.0),
    ),
    "add.sat.f32 r, r0, r1;": floats((2, 1, 1), (-1, 0, 0), (NAN, 1, 0), (0.25, 0.5, 0.75)),
    "add.f64 d, d0, d1;": doubles((1, 2.0**-53, 1), (5e-324, 5e-324, 1e-323)),
    "add.rz.f64 d, d0, d1;": doubles((1, 0.75 * 2.0**-52, 1), (-1, -0.75 * 2.0**-52, -1)),
    "add.rp.f64 d, d0, d1;": doubles((1, 2.0**-80, 1 + 2.0**-52)),
    "add.rn.f16 h, h0, h1;": halves(
        (1, 2.0**-11, 1), (1, 3 * 2.0**-11, 1 + 2.0**-9), (65504, 16, INF), (65504, 15, 65504), (INF, -INF, NAN)
    ),
    "sub.ftz.f32 r, r0, r1;": floats((1.5 * SMALL, SMALL, 0), (3, 1, 2)),
    "sub.f16 h, h0, h1;": halves((1, 2.0**-12, 1), (1, 2.0**-11, 1 - 2.0**-11)),
    "mul.rn.f32 r, r0, r1;": floats((X, X, 1 + 2.0**-11), (TINY, 0.5, 0), (TINY, 0.75, TINY), (0, INF, NAN)),
    "mul.rp.f32 r, r0, r1;": floats((X, X, 1 + 2.0**-11 + ULP), (TINY, 0.5, TINY)),
    "mul.rz.f32 r, r0, r1;": floats((-X, X, -(1 + 2.0**-11))),
    "mul.rm.f32 r, r0, r1;": floats((-X, X, -(1 + 2.0**-11 + ULP))),
    "mul.ftz.f32 r, r0, r1;": floats((SMALL, 0.5, 0), (-SMALL, 0.5, -0.0), (SMALL / 2, 4, 0), (SMALL, 2, 2 * SMALL)),
    "mul.f16 h, h0, h1;": halves((1 + 2.0**-10, 1 + 2.0**-10, 1 + 2.0**-9), (256, 256, INF), (2.0**-24, 0.5, 0)),
    "fma.rn.f32 r, r0, r1, r2;": floats(
        (X, X, -(1 + 2.0**-11), 2.0**-24), (0, INF, 1, NAN), (TINY, 0.5, TINY, 2 * TINY)
    ),
    "mul.rn.f32 r, r0, r1; add.rn.f32 r, r, r2;": floats((X, X, -(1 + 2.0**-11), 0)),
    "mad.rn.f32 r, r0, r1, r2;": floats((X, X, -(1 + 2.0**-11), 2.0**-24)),
    "fma.rm.ftz.f32 r, r0, r1, r2;": floats(
        (X, X, 0, 1 + 2.0**-11), (-X, X, 0, -(1 + 2.0**-11 + ULP)), (SMALL, 0.5, 0, 0)
    ),
    "fma.rp.f32 r, r0, r1, r2;": floats((X, X, 0, 1 + 2.0**-11 + ULP)),
    "fma.rz.f32 r, r0, r1, r2;": floats((X, X, 0, 1 + 2.0**-11), (-X, X, 0, -(1 + 2.0**-11))),
    "fma.rn.f64 d, d0, d1, d2;": doubles((1 + 2.0**-27, 1 + 2.0**-27, -(1 + 2.0**-26), 2.0**-54)),
    # In float32 the sum would be a tie of float16, and 2^-24 be lost.
    "fma.rn.f16 h, h0, h1, h2;": halves(
        (33 / 32, 65 / 64, 2.0**-24, 1 + 49 / 1024), (33 / 32, 65 / 64, 0, 1 + 48 / 1024)
    ),
    "div.rn.f32 r, r0, r1;": floats((1, 3, 1 / 3), (1, 0, INF), (-1, 0, -INF), (0, 0, NAN), (TINY, 2, 0)),
    "div.rz.f32 r, r0, r1;": [(f32(1), f32(3), 0x3EAAAAAA)],
    "div.rp.f32 r, r0, r1;": [(f32(1), f32(3), 0x3EAAAAAB)],
    "div.full.ftz.f32 r, r0, r1;": floats((6, 3, 2), (1, TINY, INF)),
    "div.approx.f32 r, r0, r1;": floats((6, 3, 2)),
    "div.rn.f64 d, d0, d1;": doubles((1, 3, 1 / 3), (1, 0, INF)),
    "rcp.rn.f32 r, r0;": floats((3, 1 / 3), (-0.0, -INF), (INF, 0), (2.0**127, 2.0**-127)),
    "rcp.rz.f32 r, r0;": [(f32(3), 0x3EAAAAAA)],
    "rcp.approx.ftz.f32 r, r0;": floats((4, 0.25), (-TINY, -INF), (2.0**127, 0), (NAN, NAN)),
    "rcp.approx.ftz.f64 d, d0;": [
        (f64(3), 0x3FD5555500000000),
        (f64(1 + 2.0**-40), f64(1)),
        (f64(-0.0), f64(-INF)),
        (f64(INF), 0),
    ],
    "rcp.rn.f64 d, d0;": doubles((3, 1 / 3)),
    "sqrt.rn.f32 r, r0;": [(f32(2), 0x3FB504F3), *floats((-1, NAN), (-0.0, -0.0), (INF, INF))],
    "sqrt.rp.f32 r, r0;": [(f32(2), 0x3FB504F4)],
    "sqrt.rn.f64 d, d0;": [(f64(2), 0x3FF6A09E667F3BCD)],
    "sqrt.approx.ftz.f32 r, r0;": floats((4, 2), (TINY, 0)),
    "rsqrt.approx.f32 r, r0;": floats((4, 0.5), (0, INF), (-0.0, -INF), (-1, NAN), (INF, 0)),
    "rsqrt.approx.f64 d, d0;": doubles((4, 0.5)),
    "rsqrt.approx.ftz.f64 d, d0;": [(f64(3), f64(3**-0.5) & ~M32), (f64(5e-324), f64(INF))],
    "ex2.approx.f32 r, r0;": floats((3, 8), (-INF, 0), (INF, INF), (TINY, 1), (-149, TINY)),
    "ex2.approx.ftz.f32 r, r0;": floats((-149, 0), (0.5, 2**0.5)),
    "lg2.approx.f32 r, r0;": floats((8, 3), (0, -INF), (-0.0, -INF), (-1, NAN), (TINY, -149)),
    "lg2.approx.ftz.f32 r, r0;": floats((TINY, -INF)),
    "sin.approx.f32 r, r0;": floats((0, 0), (-0.0, -0.0), (INF, NAN), (1, np.sin(1.0))),
    "cos.approx.ftz.f32 r, r0;": floats((0, 1), (INF, NAN), (1, np.cos(1.0))),
    "tanh.approx.f32 r, r0;": floats((INF, 1), (-INF, -1), (-0.0, -0.0), (0.5, np.tanh(0.5))),
}

FLOATS = {
    "neg.f32 r, r0;": floats((1, -1), (0, -0.0), (-TINY, TINY)),
    "neg.ftz.f32 r, r0;": floats((TINY, -0.0)),
    "neg.f64 d, d0;": doubles((0, -0.0), (-INF, INF)),
    "neg.f16 h, h0;": halves((1, -1)),
    "abs.f32 r, r0;": floats((-1, 1), (-0.0, 0), (-INF, INF)),
    "abs.ftz.f32 r, r0;": floats((-TINY, 0)),
    "abs.f64 d, d0;": doubles((-2, 2)),
    "min.f32 r, r0, r1;": floats(
        (NAN, 1, 1), (1, NAN, 1), (NAN, NAN, NAN), (-0.0, 0, -0.0), (0, -0.0, -0.0), (-1, 2, -1)
    ),
    "max.f32 r, r0, r1;": floats((NAN, 1, 1), (1, NAN, 1), (NAN, NAN, NAN), (-0.0, 0, 0), (0, -0.0, 0), (-1, 2, 2)),
    "min.NaN.f32 r, r0, r1;": floats((NAN, 1, NAN), (1, NAN, NAN), (2, 1, 1)),
    "max.NaN.f32 r, r0, r1;": floats((NAN, 1, NAN), (1, NAN, NAN), (2, 1, 2)),
    "max.ftz.f32 r, r0, r1;": floats((TINY, -1, 0), (-TINY, -1, -0.0)),
    "min.f64 d, d0, d1;": doubles((NAN, 1, 1), (0, -0.0, -0.0)),
    "max.f16 h, h0, h1;": halves((NAN, 1, 1), (-0.0, 0, 0)),
    "copysign.f32 r, r0, r1;": floats((-1, 2, -2), (1, -2, 2), (-0.0, INF, -INF)),
    "copysign.f64 d, d0, d1;": doubles((-1, 2, -2)),
    "testp.finite.f32 p, r0;": [(f32(1), 1), (f32(TINY), 1), (f32(INF), 0), (f32(NAN), 0)],
    "testp.infinite.f32 p, r0;": [(f32(1), 0), (f32(-INF), 1), (f32(NAN), 0)],
    "testp.number.f32 p, r0;": [(f32(1), 1), (f32(INF), 1), (f32(NAN), 0)],
    "testp.notanumber.f32 p, r0;": [(f32(INF), 0), (f32(NAN), 1)],
    "testp.normal.f32 p, r0;": [(f32(SMALL), 1), (f32(TINY), 0), (0, 0), (f32(INF), 0)],
    "testp.subnormal.f64 p, d0;": [(f64(5e-324), 1), (f64(2.0**-1022), 0), (0, 0), (f64(NAN), 0)],
}

ORDERED = {"eq": (0, 1, 0), "ne": (1, 0, 1), "lt": (1, 0, 0), "le": (1, 1, 0), "gt": (0, 0, 1), "ge": (0, 1, 1)}
COMPARISONS: dict[str, list[tuple]] = {}
for _name, (_less, _equal, _more) in ORDERED.items():
    _numbers = [(f32(1), f32(2), _less), (f32(0), f32(-0.0), _equal), (f32(INF), f32(2), _more)]
    _nans = [(f32(NAN), f32(1)), (f32(1), f32(NAN)), (f32(NAN), f32(NAN))]
    COMPARISONS[f"setp.{_name}.f32 p, r0, r1;"] = [*_numbers, *((a, b, 0) for a, b in _nans)]
    COMPARISONS[f"setp.{_name}u.f32 p, r0, r1;"] = [*_numbers, *((a, b, 1) for a, b in _nans)]
    COMPARISONS[f"setp.{_name}.s32 p, r0, r1;"] = [(M32, 1, _less), (7, 7, _equal), (1, M32, _more)]
    COMPARISONS[f"setp.{_name}.u64 p, d0, d1;"] = [(1, M64, _less), (7, 7, _equal), (M64, 1, _more)]
for _name, _rows in {"lo": (1, 0, 0), "ls": (1, 1, 0), "hi": (0, 0, 1), "hs": (0, 1, 1)}.items():
    COMPARISONS[f"setp.{_name}.u32 p, r0, r1;"] = [(1, M32, _rows[0]), (7, 7, _rows[1]), (M32, 1, _rows[2])]
COMPARISONS |= {
    "setp.num.f32 p, r0, r1;": [(f32(1), f32(2), 1), (f32(NAN), f32(2), 0)],
    "setp.nan.f64 p, d0, d1;": [(f64(1), f64(2), 0), (f64(1), f64(NAN), 1)],
    "setp.eq.ftz.f32 p, r0, r1;": [(f32(TINY), 0, 1), (f32(SMALL), 0, 0)],
    "setp.eq.f32 p, r0, r1;": [(f32(TINY), 0, 0)],
    "setp.lt.f16 p, h0, h1;": [(f16(-1), f16(1), 1), (f16(NAN), f16(1), 0)],
    "setp.lt.and.s32 p, r0, r1, p2;": [(1, 2, 1, 1), (1, 2, 0, 0), (2, 1, 1, 0)],
    "setp.lt.or.s32 p, r0, r1, !p2;": [(1, 2, 1, 1), (2, 1, 1, 0), (2, 1, 0, 1)],
    "setp.lt.xor.s32 p, r0, r1, p2;": [(1, 2, 1, 0), (2, 1, 1, 1)],
    "setp.lt.s32 p1|p, r0, r1;": [(1, 2, 0), (2, 1, 1)],
    "set.lt.u32.f32 r, r0, r1;": [(f32(1), f32(2), M32), (f32(2), f32(1), 0), (f32(NAN), f32(1), 0)],
    "set.gt.f32.s32 r, r0, r1;": [(1, M32, f32(1)), (M32, 1, 0)],
    "selp.b32 r, r0, r1, p2;": [(5, 6, 1, 5), (5, 6, 0, 6)],
    "selp.f64 d, d0, d1, p2;": [(f64(NAN), 6, 1, f64(NAN))],
    "slct.u32.s32 r, r0, r1, r2;": [(5, 6, 0, 5), (5, 6, M32, 6)],
    "slct.f32.f32 r, r0, r1, r2;": [(5, 6, f32(-0.0), 5), (5, 6, f32(NAN), 6), (5, 6, f32(-1), 6)],
    "slct.ftz.b64.f32 d, d0, d1, r2;": [(5, 6, f32(-TINY), 5)],
}

INTEGERS = {
    "add.s32 r, r0, r1;": [(TOP32 - 1, 1, TOP32), (M32, 1, 0)],
    "add.u16 h, h0, h1;": [(0xFFFF, 2, 1)],
    "add.sat.s32 r, r0, r1;": [(TOP32 - 1, 1, TOP32 - 1), (TOP32, M32, TOP32), (5, M32, 4)],
    "sub.s64 d, d0, d1;": [(0, 1, M64)],
    "sub.sat.s32 r, r0, r1;": [(TOP32, 1, TOP32), (5, 7, M32 - 1)],
    "add.cc.u32 r, r0, r1; addc.u32 r, r2, r3;": [(M32, 1, 5, 6, 12), (M32, 0, 5, 6, 11)],
    "add.cc.u32 r, r0, r1; addc.cc.u32 r, r2, r3; addc.u32 r, 0, 0;": [(M32, 1, M32, 0, 1), (M32, 1, 5, 0, 0)],
    "sub.cc.u32 r, r0, r1; subc.u32 r, r2, r3;": [(0, 1, 5, 1, 3), (1, 1, 5, 1, 4)],
    "sub.cc.u32 r, r0, r1; subc.cc.u32 r, r2, r3; subc.u32 r, 5, 0;": [(0, 1, 0, M32, 4), (0, 0, 1, 1, 5)],
    "add.cc.u64 d, d0, d1; addc.u64 d, d2, d3;": [(M64, 1, 5, 6, 12)],
    "mad.lo.cc.u32 r, r0, r1, r2; madc.hi.u32 r, r0, r1, r3;": [(M32, M32, M32, 7, 6)],
    "mul.lo.s32 r, r0, r1;": [(M32, 5, M32 - 4), (1 << 16, 1 << 16, 0)],
    "mul.lo.u16 h, h0, h1;": [(0xFFFF, 0xFFFF, 1)],
    "mul.hi.u32 r, r0, r1;": [(M32, M32, M32 - 1)],
    "mul.hi.s32 r, r0, r1;": [(M32, M32, 0), (TOP32, 2, M32)],
    "mul.hi.u64 d, d0, d1;": [(M64, M64, M64 - 1)],
    "mul.hi.s64 d, d0, d1;": [(M64, 2, M64)],
    "mul.wide.u32 d, r0, r1;": [(M32, M32, M32 * M32)],
    "mul.wide.s32 d, r0, r1;": [(M32, 5, M64 - 4)],
    "mul.wide.s16 r, h0, h1;": [(0xFFFF, 5, M32 - 4)],
    "mad.lo.s32 r, r0, r1, r2;": [(3, 4, M32, 11)],
    "mad.hi.u32 r, r0, r1, r2;": [(M32, M32, 3, 1)],
    "mad.wide.u32 d, r0, r1, d2;": [(M32, 2, 1, 2 * M32 + 1)],
    "div.s32 r, r0, r1;": [(M32 - 6, 2, M32 - 2), (7, M32 - 1, M32 - 2), (TOP32, M32, TOP32), (5, 0, M32)],
    "div.u64 d, d0, d1;": [(M64, 10, M64 // 10)],
    "div.u16 h, h0, h1;": [(0xFFFF, 16, 0xFFF)],
    "rem.s32 r, r0, r1;": [(M32 - 6, 2, M32), (7, M32 - 1, 1), (TOP32, M32, 0), (5, 0, M32)],
    "rem.u32 r, r0, r1;": [(M32, 10, M32 % 10)],
    "neg.s32 r, r0;": [(5, M32 - 4), (TOP32, TOP32)],
    "abs.s32 r, r0;": [(M32, 1), (5, 5)],
    "min.s32 r, r0, r1;": [(M32, 1, M32)],
    "min.u32 r, r0, r1;": [(M32, 1, 1)],
    "max.s64 d, d0, d1;": [(M64, 1, 1)],
    "max.u64 d, d0, d1;": [(M64, 1, M64)],
    "max.s16 h, h0, h1;": [(0xFFFF, 1, 1)],
    "and.b32 r, r0, r1;": [(0b1100, 0b1010, 0b1000)],
    "or.b64 d, d0, d1;": [(0b1100, TOP64, TOP64 | 0b1100)],
    "xor.b16 h, h0, h1;": [(0b1100, 0b1010, 0b0110)],
    "and.pred p, p0, p1;": [(1, 1, 1), (1, 0, 0)],
    "or.pred p, p0, !p1;": [(0, 1, 0), (0, 0, 1)],
    "xor.pred p, p0, p1;": [(1, 1, 0), (1, 0, 1)],
    "not.b32 r, r0;": [(5, M32 - 5)],
    "not.b16 h, h0;": [(5, 0xFFFA)],
    "not.pred p, p0;": [(1, 0), (0, 1)],
    "cnot.b32 r, r0;": [(0, 1), (5, 0)],
    "shl.b32 r, r0, r1;": [(1, 31, TOP32), (1, 32, 0), (1, 256, 0), (3, 31, TOP32)],
    "shl.b16 h, h0, r1;": [(3, 15, 0x8000), (1, 16, 0)],
    "shr.u32 r, r0, r1;": [(TOP32, 31, 1), (M32, 32, 0), (M32, M32, 0)],
    "shr.s32 r, r0, r1;": [(TOP32, 31, M32), (TOP32, 40, M32), (5, 40, 0)],
    "shr.u64 d, d0, r1;": [(TOP64, 63, 1), (TOP64, 64, 0)],
    "shf.l.clamp.b32 r, r0, r1, r2;": [(TOP32, 1, 1, 3), (5, 6, 32, 5), (5, 6, 40, 5), (5, 6, 0, 6)],
    "shf.l.wrap.b32 r, r0, r1, r2;": [(TOP32, 1, 33, 3), (5, 6, 32, 6)],
    "shf.r.clamp.b32 r, r0, r1, r2;": [(2, 1, 1, TOP32 + 1), (5, 6, 32, 6), (5, 6, 99, 6)],
    "shf.r.wrap.b32 r, r0, r1, r2;": [(2, 1, 33, TOP32 + 1), (5, 6, 32, 5)],
    "popc.b32 r, r0;": [(0, 0), (M32, 32), (0b1011, 3)],
    "popc.b64 r, d0;": [(M64, 64)],
    "clz.b32 r, r0;": [(0, 32), (1, 31), (TOP32, 0)],
    "clz.b64 r, d0;": [(0, 64), (1, 63)],
    "bfind.u32 r, r0;": [(0, M32), (1, 0), (TOP32, 31)],
    "bfind.s32 r, r0;": [(M32, M32), (M32 - 1, 0), (TOP32, 30), (4, 2)],
    "bfind.u64 r, d0;": [(1 << 40, 40)],
    "brev.b32 r, r0;": [(1, TOP32), (0b1011, 0b1101 << 28)],
    "brev.b64 d, d0;": [(1, TOP64)],
    "bfe.u32 r, r0, r1, r2;": [
        (0xABCD1234, 8, 8, 0x12), (M32, 4, 0, 0), (TOP32, 31, 8, 1), (M32, 40, 4, 0),
        (M32, 0, 99, M32),
    ],
    "bfe.s32 r, r0, r1, r2;": [
        (0x800, 8, 4, M32 - 7), (0x700, 8, 4, 7), (TOP32, 31, 8, M32),
        (TOP32, 40, 4, M32), (M32, 4, 0, 0),
    ],
    "bfe.u64 d, d0, r1, r2;": [(0xAB << 40, 40, 8, 0xAB)],
    "bfi.b32 r, r0, r1, r2, r3;": [
        (0xF, 0, 4, 4, 0xF0), (0, M32, 4, 4, M32 - 0xF0), (5, 6, 4, 0, 6),
        (5, 6, 32, 4, 6), (5, 6, 0, 99, 5),
    ],
    "bfi.b64 d, d0, d1, r2, r3;": [(1, 0, 63, 1, TOP64), (M64, 0, 60, 9, 0xF << 60)],
    "prmt.b32 r, r0, r1, r2;": [(0x33221100, 0x77665544, 0x7531, 0x77553311), (0x80000000, 0, 0x000B, 0x000000FF)],
    "lop3.b32 r, r0, r1, r2, 0x80;": [(0b1100, 0b1010, 0b1000, 0b1000)],
    "lop3.b32 r, r0, r1, r2, 0x96;": [(0b1100, 0b1010, 0b0001, 0b0111)],
    "lop3.b32 r, r0, r1, r2, 0xCA;": [(0b1100, 0b1010, 0b0001, 0b1001)],  # a ? b : c
}  # fmt: skip

CONVERSIONS = {
    "cvt.rni.s32.f32 r, r0;": [
        (f32(0.5), 0), (f32(1.5), 2), (f32(2.5), 2), (f32(-1.5), M32 - 1),
        (f32(NAN), 0), (f32(INF), TOP32 - 1), (f32(-INF), TOP32), (f32(3e9), TOP32 - 1),
    ],
    "cvt.rzi.s32.f32 r, r0;": [(f32(-1.9), M32)],
    "cvt.rmi.s32.f32 r, r0;": [(f32(-1.5), M32 - 1)],
    "cvt.rpi.s32.f32 r, r0;": [(f32(-1.5), M32), (f32(1.1), 2)],
    "cvt.rpi.ftz.s32.f32 r, r0;": [(f32(TINY), 0)],
    "cvt.rpi.s32.f64 r, d0;": [(f64(5e-324), 1)],
    "cvt.rzi.u32.f32 r, r0;": [(f32(-1), 0), (f32(2.0**32), M32), (f32(2.0**31), TOP32), (f32(NAN), 0), (f32(-INF), 0)],
    "cvt.rzi.s64.f32 d, r0;": [(f32(NAN), TOP64), (f32(INF), TOP64 - 1), (f32(-3), M64 - 2)],
    "cvt.rzi.u64.f64 d, d0;": [(f64(NAN), TOP64), (f64(2.0**64), M64), (f64(2.0**63), TOP64), (f64(-5), 0)],
    "cvt.rni.s32.f64 r, d0;": [(f64(NAN), TOP32), (f64(2.5), 2), (f64(2.0**31), TOP32 - 1)],
    "cvt.rzi.s8.f32 r, r0;": [(f32(200), 127), (f32(-200), M32 - 127), (f32(-1), M32)],
    "cvt.rzi.u16.f32 h, r0;": [(f32(70000), 0xFFFF), (f32(7.9), 7)],
    "cvt.rzi.s32.f16 r, h0;": [(f16(-7.5), M32 - 6), (f16(INF), TOP32 - 1), (f16(-INF), TOP32)],
    "cvt.rni.f32.f32 r, r0;": floats((-0.25, -0.0), (2.5, 2), (3.5, 4), (INF, INF), (NAN, NAN)),
    "cvt.rmi.f64.f64 d, d0;": doubles((-0.25, -1)),
    "cvt.sat.f32.f32 r, r0;": floats((1.5, 1), (-2, 0), (NAN, 0), (0.25, 0.25)),
    "cvt.ftz.sat.f32.f32 r, r0;": floats((TINY, 0)),
    "cvt.rn.f16.f32 h, r0;": [
        (f32(2049), f16(2048)), (f32(2051), f16(2052)), (f32(65519.996), f16(65504)), (f32(65520), f16(INF)),
        (f32(2.0**-25), 0), (f32(1.5 * 2.0**-25), 1), (f32(-(2.0**-26)), 0x8000), (f32(NAN), NAN16),
    ],
    "cvt.rn.f16.f64 h, d0;": [(f64(1 + 2.0**-11 + 2.0**-40), f16(1 + 2.0**-10)), (f64(1 + 2.0**-11), f16(1))],
    "cvt.rn.f16.s32 h, r0;": [(2049, f16(2048)), (1 << 20, f16(INF))],
    "cvt.f32.f16 r, h0;": [(1, f32(2.0**-24)), (f16(INF), f32(INF)), (f16(NAN), NAN32), (f16(-2), f32(-2))],
    "cvt.ftz.f32.f16 r, h0;": [(1, f32(2.0**-24))],
    "cvt.f64.f16 d, h0;": [(1, f64(2.0**-24))],
    "cvt.f64.f32 d, r0;": [(f32(TINY), f64(TINY)), (f32(1.5), f64(1.5))],
    "cvt.ftz.f64.f32 d, r0;": [(f32(-TINY), f64(-0.0))],
    "cvt.rn.f32.f64 r, d0;": [
        (f64(1 + 2.0**-24), f32(1)), (f64(1 + 2.0**-24 + 2.0**-50), f32(1 + ULP)),
        (f64(2.0**128), f32(INF)),
    ],
    "cvt.rz.f32.f64 r, d0;": [(f64(1 + 2.0**-24 + 2.0**-50), f32(1)), (f64(-1 - 1e-9), f32(-1))],
    "cvt.rm.f32.f64 r, d0;": [(f64(-1 - 1e-9), f32(-1 - ULP))],
    "cvt.rn.ftz.f32.f64 r, d0;": [(f64(2.0**-140), 0), (f64(-(2.0**-140)), TOP32), (f64(2.0**-126), f32(SMALL))],
    "cvt.rn.f32.s32 r, r0;": [((1 << 24) + 1, f32(1 << 24)), (M32, f32(-1))],
    "cvt.rp.f32.s32 r, r0;": [((1 << 24) + 1, f32((1 << 24) + 2))],
    "cvt.rz.f32.u32 r, r0;": [(M32, f32(2.0**32 - 256))],
    "cvt.rn.f32.u64 r, d0;": [(M64, f32(2.0**64))],
    "cvt.rn.f64.s64 d, d0;": [(M64, f64(-1)), ((1 << 53) + 1, f64(2.0**53))],
    "cvt.rn.f32.u8 r, r0;": [(0x1FF, f32(255))],
    "cvt.u32.u16 r, h0;": [(0xFFFF, 0xFFFF)],
    "cvt.s32.s16 r, h0;": [(0xFFFF, M32)],
    "cvt.s32.s8 r, r0;": [(0x180, M32 - 127)],
    "cvt.u8.u32 r, r0;": [(0x1FF, 0xFF)],
    "cvt.s64.s32 d, r0;": [(M32, M64)],
    "cvt.u64.u32 d, r0;": [(M32, M32)],
    "cvt.sat.u8.s32 r, r0;": [(M32 - 4, 0), (300, 255), (7, 7)],
    "cvt.sat.s8.s32 r, r0;": [(M32 - 199, M32 - 127), (300, 127), (M32, M32)],
    "cvt.sat.s32.u32 r, r0;": [(M32, TOP32 - 1)],
    "cvt.sat.u32.s64 r, d0;": [(1 << 40, M32), (M64, 0)],
    "mov.b32 r, {h0, h1};": [(0x1234, 0x5678, 0x56781234)],
    "mov.b64 d, {r0, r1};": [(0x12345678, 0x9ABCDEF0, 0x9ABCDEF012345678)],
    "mov.b64 {_, r}, d0;": [(0x9ABCDEF012345678, 0x9ABCDEF0)],
    "mov.b32 {h, _}, r0;": [(0x12345678, 0x5678)],
    "{ .reg .b128 wide; mov.b128 wide, {d0, d1}; mov.b128 {_, d}, wide; }": [(5, 6, 6)],
    "mov.f32 r, 0f3F800000;": [(f32(1),)],
    "mov.f64 d, 0dBFF0000000000000;": [(f64(-1),)],
    "mov.b32 r, -2;": [(M32 - 1,)],
    "mov.u64 d, 0xFFFFFFFF;": [(M32,)],
    "mov.pred p, p0;": [(1, 1), (0, 0)],
    "mov.u32 r, %tid.x;": [(0,), (1,), (2,)],
    "mov.u32 r, %ntid.x;": [(2,), (2,)],
    "@p1 mov.u32 r, 5; @!p1 mov.u32 r, 6;": [(0, 1, 5), (0, 0, 6)],
}  # fmt: skip


def atomic(operation: str, *rows: tuple[int, ...], other: str = "") -> dict[str, list[tuple]]:
    """Rows (memory, operand, memory after it); the result, the old value, is checked too."""
    size = operation[-2:]
    letter = {"16": "h", "32": "r", "64": "d"}[size]
    lines = [
        "{ .shared .align 8 .b64 cell; st.shared.b64 [cell], d0;",
        f"atom.shared.{operation} {letter}3, [cell], {letter}1{other and f', {letter}2'};",
        f"ld.shared.b{size} {letter}, [cell]; setp.eq.b{size} p, {letter}3, {letter}0; }}",
    ]
    return {" ".join(lines): [(*row[:-1], (row[-1], 1)) for row in rows]}


MEMORY = {
    **atomic("add.u32", (5, 7, 12), (M32, 1, 0)),
    **atomic("add.relaxed.gpu.u64", (M32, 1, 1 << 32)),
    **atomic("add.f32", (f32(1), f32(2), f32(3)), (f32(TINY), f32(TINY), f32(2 * TINY))),
    **atomic("add.f64", (f64(1), f64(2), f64(3))),
    **atomic("add.noftz.f16", (f16(1), f16(2), f16(3))),
    **atomic("min.s32", (5, M32, M32)),
    **atomic("max.u32", (5, M32, M32)),
    **atomic("and.b32", (0b1100, 0b1010, 0b1000)),
    **atomic("or.b32", (0b1100, 0b1010, 0b1110)),
    **atomic("xor.b64", (0b1100, 0b1010, 0b0110)),
    **atomic("exch.b32", (5, 7, 7)),
    **atomic("cas.b32", (5, 5, 9, 9), (5, 6, 9, 5), other="2"),
    **atomic("cas.b64", (5, 5, M64, M64), other="2"),
    **atomic("inc.u32", (5, 7, 6), (7, 7, 0), (9, 7, 0)),
    **atomic("dec.u32", (5, 7, 4), (0, 7, 7), (9, 7, 7)),
    # In global memory sums of float32 flush subnormal numbers.
    "red.global.add.f32 [out], r0; ld.global.b32 r, [out];": [(f32(TINY), 0), (f32(2), f32(2))],
    "red.add.f32 [out], r0; ld.global.b32 r, [out];": [(f32(TINY), 0), (f32(2), f32(2))],
    "ld.global.nc.b32 r, [in];": [(7, 7)],
    "ldu.global.b32 r, [in];": [(7, 7)],
    "ld.global.s8 r, [in];": [(0x80, M32 - 127)],
    "ld.global.u8 d, [in+1];": [(0xABCD, 0xAB)],
    "ld.global.L1::evict_last.v2.b64 {d1, d}, [in];": [(1, 2, 2)],
    "ld.volatile.global.v4.b32 {_, _, r, _}, [in];": [(1, 2, 2)],
    "add.u64 d1, in, 16; ld.global.b64 d, [d1+-8];": [(1, 2, 2)],
    "prefetch.global.L2 [in]; prefetchu.L1 [in]; mov.b32 r, r0;": [(7, 7)],
    "membar.gl; fence.acq_rel.gpu; mov.b32 r, r0;": [(7, 7)],
    "nanosleep.u32 20; mov.b32 r, r0;": [(7, 7)],
    "{ .shared .align 8 .b64 cell; st.shared.v2.b32 [cell], {r0, r1}; ld.shared.b64 d, [cell]; }": [
        (1, 2, 2 << 32 | 1)
    ],
    "{ .shared .b32 a; .shared .b32 b; st.shared.b32 [b], r0; mov.u32 r1, b; ld.shared.b32 r, [r1]; }": [(7, 7)],
    "{ .shared .b64 cell; cvta.shared.u64 d1, cell; st.b64 [d1], d0; ld.shared.b64 d, [cell]; }": [(7, 7)],
    "{ .shared .b64 cell; cvta.shared.u64 d1, cell; cvta.to.shared.u64 d1, d1; "
    "st.shared.b64 [d1], d0; ld.shared.b64 d, [cell]; }": [(7, 7)],
    "{ .local .align 8 .b8 mine[16]; mov.u64 d1, mine; st.local.b64 [d1+8], d0; ld.local.b64 d, [mine+8]; }": [(7, 7)],
    "{ .local .b64 mine; cvta.local.u64 d1, mine; st.b64 [d1], d0; ld.local.b64 d, [mine]; }": [(7, 7)],
    "isspacep.global p, in;": [(0, 1)],
    "isspacep.shared p, in;": [(0, 0)],
    "{ .shared .b64 cell; cvta.shared.u64 d1, cell; isspacep.shared p, d1; }": [(0, 1)],
    "{ .local .b64 mine; cvta.local.u64 d1, mine; isspacep.local p, d1; }": [(0, 1)],
    "{ .local .b64 mine; cvta.local.u64 d1, mine; isspacep.global p, d1; }": [(0, 0)],
}


def segment(i: int, source: int, inside: bool) -> tuple[int, int, tuple[int, int]]:
    """For a shuffle of 100, 101 ...: the value that lane ``i`` gets, and whether its source is in range."""
    return 100 + i, 0, (100 + (source if inside else i), int(inside))


EIGHTS, EIGHTS_UP = 0x181F, 0x1800  # segments of 8 lanes, as __shfl_sync(..., 8) has them
HALF_MASKS = "setp.lt.u32 p3, %laneid, 16; selp.b32 r3, 0x0000FFFF, 0xFFFF0000, p3;"
WARPS = {
    "shfl.sync.up.b32 r|p, r0, 1, 0, -1;": lanes(lambda i: segment(i, i - 1, i >= 1)),
    "shfl.sync.down.b32 r|p, r0, 1, 31, -1;": lanes(lambda i: segment(i, i + 1, i < 31)),
    "shfl.sync.bfly.b32 r|p, r0, 16, 31, -1;": lanes(lambda i: segment(i, i ^ 16, True)),
    "shfl.sync.idx.b32 r|p, r0, 5, 31, -1;": lanes(lambda i: segment(i, 5, True)),
    f"shfl.sync.up.b32 r|p, r0, 3, {EIGHTS_UP}, -1;": lanes(lambda i: segment(i, i - 3, i % 8 >= 3)),
    f"shfl.sync.down.b32 r|p, r0, 3, {EIGHTS}, -1;": lanes(lambda i: segment(i, i + 3, i % 8 < 5)),
    f"shfl.sync.bfly.b32 r|p, r0, 5, {EIGHTS}, -1;": lanes(lambda i: segment(i, i ^ 5, True)),
    f"shfl.sync.bfly.b32 r|p, r0, 8, {EIGHTS}, -1;": lanes(lambda i: segment(i, i ^ 8, i & 8 != 0)),
    f"shfl.sync.idx.b32 r|p, r0, 10, {EIGHTS}, -1;": lanes(lambda i: segment(i, i // 8 * 8 + 2, True)),
    "shfl.sync.idx.b32 r|p, r0, 20, 15, -1;": lanes(lambda i: segment(i, 20, False)),
    f"{HALF_MASKS} shfl.sync.bfly.b32 r|p, r0, 8, 31, r3;": lanes(lambda i: segment(i, i ^ 8, True)),
    "vote.sync.any.pred p, p0, -1;": lanes(lambda i: (i == 3, 1)),
    "vote.sync.all.pred p, p0, -1;": lanes(lambda i: (i != 3, 0)),
    "vote.sync.uni.pred p, p0, -1;": lanes(lambda i: (0, 1)),
    "vote.sync.uni.pred p, !p0, -1;": lanes(lambda i: (i == 3, 0)),
    "vote.sync.ballot.b32 r, p0, -1;": lanes(lambda i: (i % 3 == 0, sum(1 << j for j in range(0, 32, 3)))),
    f"{HALF_MASKS} vote.sync.ballot.b32 r, p0, r3;": lanes(lambda i: (1, 0xFFFF if i < 16 else 0xFFFF0000)),
    f"{HALF_MASKS} vote.sync.all.pred p, p0, r3;": lanes(lambda i: (i < 16, int(i < 16))),
    "match.any.sync.b32 r, r0, -1;": lanes(lambda i: (i % 2, 0x55555555 << i % 2)),
    "match.any.sync.b64 r, d0, -1;": lanes(lambda i: ((i % 2) << 40, 0x55555555 << i % 2)),
    "match.all.sync.b32 r|p, r0, -1;": lanes(lambda i: (7, (M32, 1))),
    f"{HALF_MASKS} match.all.sync.b32 r|p, r0, r3;": lanes(lambda i: (max(i, 15), (0xFFFF, 1) if i < 16 else (0, 0))),
    "redux.sync.add.s32 r, r0, -1;": lanes(lambda i: (i, 496)),
    "redux.sync.min.s32 r, r0, -1;": lanes(lambda i: (M32 - i, M32 - 31)),
    "redux.sync.max.u32 r, r0, -1;": lanes(lambda i: (M32 - i, M32)),
    "redux.sync.or.b32 r, r0, -1;": lanes(lambda i: (1 << i, M32)),
    "redux.sync.and.b32 r, r0, -1;": lanes(lambda i: (M32 - (1 << i), 0)),
    "redux.sync.xor.b32 r, r0, -1;": lanes(lambda i: (i, 0)),
    "activemask.b32 r; mov.u32 r1, %lanemask_eq; and.b32 r, r, r1;": lanes(lambda i: (0, 1 << i)),
    "bar.warp.sync -1; mov.u32 r, %laneid;": lanes(lambda i: (i,)),
    "mov.u32 r, %lanemask_lt;": lanes(lambda i: ((1 << i) - 1,)),
    "mov.u32 r, %lanemask_le;": lanes(lambda i: ((2 << i) - 1,)),
    "mov.u32 r, %lanemask_gt;": lanes(lambda i: (M32 - (2 << i) + 1 & M32,)),
    "mov.u32 r, %lanemask_ge;": lanes(lambda i: (M32 - (1 << i) + 1,)),
    "mov.u32 r, %warpid; bar.sync 0;": [(i // 32,) for i in range(64)],
    "bar.red.popc.u32 r, 0, p0;": [(i % 3 == 0, 22) for i in range(64)],
    "bar.red.and.pred p, 0, p0;": [(1, 1) for i in range(64)],
    "bar.red.and.pred p, 0, !p0;": [(i == 9, 0) for i in range(64)],
    "@p1 exit; bar.red.and.pred p, 0, p0;": [(i < 9, i >= 9, int(i < 9)) for i in range(64)],
    "bar.red.or.pred p, 0, p0;": [(i == 9, 1) for i in range(64)],
    "barrier.cta.red.popc.aligned.u32 r, 1, 64, p0;": [(1, 64) for i in range(64)],
}

CONTROL = {
    "bra.uni ahead; mov.u32 r, 5; ahead: mov.u32 r1, 6;": [(0, 0)],
    "{ bra ahead; ahead: } { bra ahead; mov.u32 r, 5; ahead: }": [(0, 0)],
    "again: add.u32 r, r, r0; setp.lt.u32 p3, r, 20; @p3 bra again;": [(7, 21)],
    "{ list: .branchtargets a, b, c; brx.idx r0, list; a: mov.u32 r, 1; bra c; b: mov.u32 r, 2; c: }": [
        (0, 1),
        (1, 2),
        (2, 0),
    ],
    "@p0 exit; mov.u32 r, 5; st.global.b32 [out], r;": [(0, 5)],
    "@p0 trap; mov.u32 r, 5;": [(0, 5)],
    "{ .param .b32 a; .param .b32 b; st.param.b32 [a], r0; call.uni (b), twice, (a); ld.param.b32 r, [b]; }": [(7, 14)],
    "{ .reg .b32 low; mov.b32 low, r0; { .reg .b32 low; mov.b32 low, 5; } mov.b32 r, low; }": [(7, 7)],
}

CASES = ROUNDING | FLOATS | COMPARISONS | INTEGERS | CONVERSIONS | MEMORY | WARPS | CONTROL
PROGRAM_HEAD = """.version 8.4
.target sm_90
.address_size 64
.func (.param .b32 result) twice(.param .b32 a) {
    .reg .b32 r; ld.param.b32 r, [a]; add.u32 r, r, r; st.param.b32 [result], r; ret;
}
"""


def kernel(name: str, text: str) -> str:
    """PTX that reads four 64-bit values for each thread, and writes the result's bits and p."""
    result = re.search(r"\b[hrdp]\b(?!\.)", text)
    stores = {"h": "st.global.b16 [out], h", "r": "st.global.b32 [out], r", "d": "st.global.b64 [out], d"}
    loads = "".join(
        f"ld.global.b16 h{i}, [in+{8 * i}]; ld.global.b32 r{i}, [in+{8 * i}]; ld.global.b64 d{i}, [in+{8 * i}];"
        f" setp.ne.b64 p{i}, d{i}, 0;\n"
        for i in range(4)
    )
    assert result
    return f""".visible .entry {name}(.param .u64 ins, .param .u64 outs) {{
    .reg .pred p, p<4>; .reg .b16 h, h<4>; .reg .b32 r, r<4>; .reg .b64 d, d<4>, in, out, at; .reg .b32 flag;
    ld.param.u64 in, [ins]; ld.param.u64 out, [outs];
    mov.u32 flag, %tid.x; mul.wide.u32 at, flag, 32; add.u64 in, in, at;
    mul.wide.u32 at, flag, 16; add.u64 out, out, at;
    {loads} mov.b16 h, 0; mov.b32 r, 0; mov.b64 d, 0; mov.pred p, 0;
    {text}
    selp.b32 flag, 1, 0, p; st.global.b32 [out+8], flag;
    {stores.get(result[0], "st.global.b32 [out], flag")};
    ret;
}}
"""


PROGRAM = PROGRAM_HEAD + "".join(kernel(f"case_{i}", text) for i, text in enumerate(CASES))


@pytest.fixture(scope="module")
def program(_compiler: None) -> Module:
    """All instructions of the tables in one module, a kernel for each."""
    return build(PROGRAM)


@pytest.mark.parametrize("text", CASES)
def test_an_instruction_gives_the_known_answer(text: str, program: Module) -> None:
    rows = CASES[text]
    values = np.zeros((len(rows), 4), np.uint64)
    for i, row in enumerate(rows):
        values[i, : len(row) - 1] = row[:-1]
    for order in ORDERS:
        found = np.zeros((len(rows), 2), np.uint64)
        assert launch(program, f"case_{list(CASES).index(text)}", (values, found), 1, len(rows), order=order) is None
        for row, (result, p) in zip(rows, found.tolist(), strict=True):
            right = row[-1] if isinstance(row[-1], tuple) else (row[-1], p)
            assert (result, p) == right, f"{row}: {result:#x}, {p}"


def test_every_instruction_of_the_translator_has_a_case() -> None:
    texts = [function.body or [] for function in ptx.read(PROGRAM).functions]
    assert {i.opcode for body in texts for i in body if isinstance(i, ptx.Instruction)} == set(TRANSLATORS)


# --- instructions against exact arithmetic ---------------------------------------------------------------------------


def random_floats(rng: np.random.Generator, dtype: np.dtype, count: int) -> np.ndarray:
    """Numbers of every exponent, numbers close to each other, and special values."""
    bits = rng.integers(0, 1 << 8 * dtype.itemsize, (3, count), dtype=np.uint64)
    values = bits.astype(f"u{dtype.itemsize}").view(dtype)
    some = rng.random(values.shape)
    near = (1 + rng.integers(-9, 9, values.shape) * np.finfo(dtype).eps).astype(dtype)
    values = np.where(some < 0.3, near, values)
    special = np.array([0, -0.0, np.inf, -np.inf, np.nan, 1, np.finfo(dtype).tiny, np.finfo(dtype).max], dtype)
    return np.where(some > 0.9, special[rng.integers(0, len(special), values.shape)], values)


def run_on(module: Module, operands: np.ndarray) -> np.ndarray:
    """``op`` of the module on columns of ``operands``."""
    out = np.zeros_like(operands[0])
    rows = np.ascontiguousarray(operands.T)
    assert launch(module, "op", (rows, out), len(out) // 64, 64) is None
    return out


def elementwise(instruction: str, dtype: np.dtype) -> Module:
    size = dtype.itemsize
    lines = [f"ld.global.b{8 * size} x{i}, [in+{i * size}];" for i in range(3)]
    return build(
        PROGRAM_HEAD
        + f""".visible .entry op(.param .u64 ins, .param .u64 outs) {{
    .reg .b{8 * size} x, x<3>; .reg .b64 in, out, at; .reg .b32 i, blocks;
    mov.u32 i, %tid.x; mov.u32 blocks, %ctaid.x; mad.lo.u32 i, blocks, 64, i;
    ld.param.u64 in, [ins]; ld.param.u64 out, [outs];
    mul.wide.u32 at, i, {3 * size}; add.u64 in, in, at; mul.wide.u32 at, i, {size}; add.u64 out, out, at;
    {" ".join(lines)}
    {instruction}
    st.global.b{8 * size} [out], x; ret;
}}
"""
    )


EXACT: dict[str, Callable[..., Fraction]] = {
    "add": lambda a, b, c: a + b,
    "mul": lambda a, b, c: a * b,
    "fma": lambda a, b, c: a * b + c,
    "div": lambda a, b, c: a / b,
}


ROUNDED = [(o, t, r) for o in EXACT for t in ("f32", "f64") for r in ("rn", "rz", "rm", "rp")]


@pytest.mark.parametrize(("opcode", "type_", "rounding"), ROUNDED + [(o, "f16", "rn") for o in ("add", "mul", "fma")])
def test_results_are_the_exact_ones_rounded_once(
    opcode: str, type_: str, rounding: str, rng: np.random.Generator
) -> None:
    """The neighbours of a result are further from the exact value, or on the wrong side of it."""
    dtype = np.dtype({"f16": "float16", "f32": "float32", "f64": "float64"}[type_])
    operands = random_floats(rng, dtype, 2048)
    names = ", ".join(["x", "x0", "x1", "x2"][: 4 if opcode == "fma" else 3])
    results = run_on(elementwise(f"{opcode}.{rounding}.{type_} {names};", dtype), operands)
    with np.errstate(all="ignore"):
        below, above = np.nextafter(results, dtype.type(-np.inf)), np.nextafter(results, dtype.type(np.inf))
    looked_at = 0
    for (a, b, c), result, low, high in zip(operands.T, results, below, above, strict=True):
        if not np.isfinite([a, b, c, result, low, high]).all() or (opcode == "div" and b == 0):
            continue  # in the table
        looked_at += 1
        exact = EXACT[opcode](*(Fraction(float(x)) for x in (a, b, c)))
        at, low, high = (Fraction(float(x)) for x in (result, low, high))
        toward_zero = rounding == "rm" if exact > 0 else rounding == "rp"
        if rounding == "rn":
            assert abs(at - exact) <= min(abs(low - exact), abs(high - exact))
            if exact in ((at + low) / 2, (at + high) / 2):
                assert int(np.asarray(result).view(f"u{dtype.itemsize}")) % 2 == 0
        elif rounding == "rz" or toward_zero:
            assert abs(at) <= abs(exact) < abs(high if exact > 0 else low) or at == exact
        else:
            assert abs(low if exact > 0 else high) < abs(exact) <= abs(at) or at == exact
    assert looked_at > 200


@pytest.mark.parametrize(
    ("opcode", "dtype"),
    [(o, d) for o in ("add", "sub", "mul", "div", "sqrt") for d in ("float32", "float64")]
    + [(o, "float16") for o in ("add", "sub", "mul")],
)
def test_arithmetic_is_that_of_numpy(opcode: str, dtype: str, rng: np.random.Generator) -> None:
    type_ = np.dtype(dtype)
    operands = random_floats(rng, type_, 4096)
    function = {"sub": np.subtract, "mul": np.multiply, "div": np.divide}.get(opcode) or getattr(np, opcode)
    with np.errstate(all="ignore"):
        right = function(*operands[: 1 if opcode == "sqrt" else 2])
    names = "x, x0" if opcode == "sqrt" else "x, x0, x1"
    found = run_on(elementwise(f"{opcode}.rn.f{8 * type_.itemsize} {names};", type_), operands)
    np.testing.assert_array_equal(found, right)
    np.testing.assert_array_equal(np.signbit(found)[right == 0], np.signbit(right)[right == 0])


# --- rules, broken one by one ----------------------------------------------------------------------------------------

FAULTS = {
    "behind the array": ("out[threadIdx.x + 61] = 1;", "4 bytes at 0x.* in no allocation"),
    "across its end": ("*(double*)((char*)out + 252) = 1;", "8 bytes at 0x.* not within the 256 bytes"),
    "before it": ("int i = threadIdx.x - 1; out[0] = in[i];", "4 bytes at 0x.* in no allocation"),
    "null": ("*(float*)(size_t)in[0] = 1;", "4 bytes at 0 are in no allocation"),
    "misaligned": ("*(int*)((char*)out + 2) = 1;", "4 bytes at 0x.*: misaligned"),
    "misaligned vector": ("*(float4*)(out + threadIdx.x) = make_float4(1, 2, 3, 4);", "16 bytes at 0x.*: misaligned"),
    "misaligned atomic": ("atomicAdd((int*)((char*)out + 2), 1);", "4 bytes at 0x.*: misaligned"),
    "behind shared memory": (
        "__shared__ float s[64]; s[threadIdx.x * 17] = 1; __syncthreads(); out[0] = s[0];",
        "4 bytes at 272 are not in the block's 256 bytes of shared memory",
    ),
    "behind dynamic shared memory": (
        "extern __shared__ float s[]; s[threadIdx.x] = 1; __syncthreads(); out[0] = s[0];",
        "4 bytes at 64 are not in the block's 64 bytes of shared memory",
    ),
    "misaligned shared memory": (
        "__shared__ int s[64]; *(volatile int*)((char*)s + threadIdx.x) = 1;",
        "4 bytes of shared memory at 1: misaligned",
    ),
    "behind local memory": (
        "volatile int a[4]; volatile int* p = a; for (int i = 0; i < 4; i++) a[i] = i; out[0] = p[threadIdx.x];",
        "4 bytes at 0x.* (not in the thread's local memory|in no allocation)",
    ),
    "a barrier that one warp skips": (
        'if (threadIdx.x < 32) __syncthreads(); else asm volatile("bar.sync 2;" ::: "memory");',
        "wait for each other in vain: thread \\(0, 0, 0\\) .* at bar.*sync.*0; thread \\(32, 0, 0\\) .* at bar.sync 2;",
    ),
    "a barrier that half a warp skips": (
        'if (threadIdx.x % 32 < 16) asm volatile("bar.sync 1, 32;" ::: "memory"); __syncthreads();',
        "thread .16, 0, 0. .* at bar.sync 1, 32: the thread is not here, others of its warp are",
    ),
    "a barrier of too few": (
        'if (threadIdx.x < 32) asm volatile("bar.sync 1, 64;" ::: "memory");',
        "wait for each other in vain.*bar.sync 1, 64",
    ),
    "a barrier of two numbers": (
        'asm volatile("bar.sync 1, %0;" :: "r"(threadIdx.x < 32 ? 64 : 96) : "memory");',
        "others wait here for 64 threads, not 96",
    ),
    "a barrier of parts of warps": ('asm volatile("bar.sync 1, 40;" ::: "memory");', "40 threads are not whole warps"),
    "a shuffle that half a warp skips": (
        "if (threadIdx.x % 2) out[0] = __shfl_sync(0xFFFFFFFF, in[0], 0); else while (true) __syncthreads();",
        "wait for each other in vain.*bar.*sync.*shfl.sync",
    ),
    "a lane outside of its mask": ("out[0] = __shfl_sync(0xFFFE, in[0], 0);", "lane 0 is not in its mask 0xfffe"),
    "two masks": (
        "out[0] = __shfl_sync(threadIdx.x ? 0xFFFFFFFF : 3, in[0], 0);",
        "wait for each other in vain.*shfl.sync",
    ),
    "a vote at two places": (
        "if (threadIdx.x % 2) out[0] = __any_sync(0xFFFFFFFF, in[0]); else out[1] = __ballot_sync(0xFFFFFFFF, in[1]);",
        "wait for each other in vain.*vote.sync.*vote.sync",
    ),
    "a trap": ("if (threadIdx.x == 5) __trap();", "thread \\(5, 0, 0\\) of block \\(0, 0, 0\\) at trap"),
}


def faulty(statements: str) -> Module:
    return cuda(f'extern "C" __global__ void faulty(const float* in, float* out) {{ {statements} }}')


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_told(name: str) -> None:
    statements, sentence = FAULTS[name]
    memory = np.zeros((6, 64), np.float32)  # memory around the two arrays is not allocated
    dynamic = 64 if "extern" in statements else 0
    wrong = launch(faulty(statements), "faulty", (memory[1], memory[4]), 1, 64, dynamic)
    assert wrong is not None
    assert re.search(f"^faulty: .*{sentence}", wrong), wrong


SOUND = {
    "shared memory to its end": (
        "__shared__ float s[64]; s[threadIdx.x] = 1; __syncthreads(); "
        "out[threadIdx.x] = s[63 - threadIdx.x];"
    ),
    "dynamic shared memory": (
        "extern __shared__ float s[]; if (threadIdx.x < 16) s[threadIdx.x] = 1; __syncthreads(); "
        "out[0] = s[15];"
    ),
    "a vector": "if (threadIdx.x % 4 == 0) *(float4*)(out + threadIdx.x) = make_float4(1, 1, 1, 1);",
    "half a warp": "if (threadIdx.x % 32 < 16) out[0] = __shfl_xor_sync(0xFFFF, in[0], 8) + 1;",
    "a barrier of some warps": 'if (threadIdx.x < 32) asm volatile("bar.sync 1, 32;" ::: "memory"); out[0] = 1;',
    "warps that end early": "if (threadIdx.x < 32) return; __syncthreads(); out[0] = 1;",
    "half a warp that ends early": "if (threadIdx.x % 32 < 16) return; __syncthreads(); out[0] = 1;",
    "arriving and waiting": 'if (threadIdx.x < 32) asm volatile("bar.arrive 1, 64;" ::: "memory");'
    ' else asm volatile("bar.sync 1, 64;" ::: "memory"); out[0] = 1;',
}  # fmt: skip


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", SOUND)
def test_what_keeps_the_rules_runs(name: str, order: str) -> None:
    memory = np.zeros((6, 64), np.float32)
    assert launch(faulty(SOUND[name]), "faulty", (memory[1], memory[4]), 1, 64, 64, order) is None
    assert memory[4, 0] == 1
    assert not memory[[0, 1, 2, 3, 5]].any()


def test_memory_that_nobody_wrote_is_spoiled() -> None:
    """Shared memory for each block, local memory for each thread."""
    module = cuda(
        """extern "C" __global__ void read(float* shared, float* local, int start) {
            __shared__ float s[64];
            volatile float mine[8];
            shared[blockIdx.x] = s[start];
            local[blockIdx.x] = mine[start];
            s[start] = 1;
            for (int i = 0; i < 8; i++) mine[i] = 1;
        }"""
    )
    shared, local = np.zeros(3, np.float32), np.zeros(3, np.float32)
    assert launch(module, "read", (shared, local, np.int32(5)), 3) is None
    assert np.isnan(shared).all()
    assert np.isnan(local).all()


def test_a_missing_barrier_is_seen_in_one_of_the_orders() -> None:
    source = """extern "C" __global__ void turn(const float* in, float* out) {
        __shared__ float s[256];
        s[threadIdx.x] = in[threadIdx.x];
        BARRIER
        out[threadIdx.x] = s[255 - threadIdx.x];
    }"""
    x = np.arange(256, dtype=np.float32)
    for barrier in ("__syncthreads();", ""):
        module = cuda(source.replace("BARRIER", barrier))
        right = []
        for order in ORDERS:
            out = np.zeros_like(x)
            assert launch(module, "turn", (x, out), 1, 256, order=order) is None
            right.append(np.array_equal(out, x[::-1]))
        assert right == [True, True] if barrier else [False, False]


# --- kernels ---------------------------------------------------------------------------------------------------------

SUM = """
__device__ __noinline__ float block_sum(float x) {
    __shared__ float parts[32];
    for (int distance = 16; distance > 0; distance /= 2) x += __shfl_down_sync(0xFFFFFFFF, x, distance);
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
    __syncthreads();
    x = threadIdx.x < blockDim.x / 32 ? parts[threadIdx.x] : 0;
    if (threadIdx.x < 32)
        for (int distance = 16; distance > 0; distance /= 2) x += __shfl_down_sync(0xFFFFFFFF, x, distance);
    __syncthreads();
    return x;
}

__device__ int launches;
__constant__ float factors[3] = {1, 2, 4};

extern "C" __global__ void __launch_bounds__(512) sum(const float* x, float* sums, int n) {
    __shared__ int marks[4];
    marks[threadIdx.x % 4] = threadIdx.x % 4;
    float part = 0;
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) part += x[i];
    part = block_sum(part) * factors[blockIdx.x];
    if (threadIdx.x == 0) {
        sums[blockIdx.x] = part + marks[1] + marks[2];
        atomicAdd(&launches, 1);
    }
}
"""


def test_a_sum_by_warps_and_blocks() -> None:
    """Uses a function, shared memory of both, constants, and a variable of the module."""
    module = cuda(SUM)
    kernel = module.kernels["sum"]
    assert (kernel.max_threads, kernel.shared_bytes, kernel.parameter_bytes) == (512, 128 + 16, 20)
    x = np.arange(3000, dtype=np.float32)
    symbol, size = next(place for name, place in module.variables.items() if "launches" in name)
    count = ctypes.c_int.in_dll(module.library, symbol)
    count.value = 0
    assert size == 4
    for order in ORDERS:
        sums = np.zeros(3, np.float32)
        assert launch(module, "sum", (x, sums, np.int32(x.size)), 3, 512, order=order) is None
        by_block = [sum(x[i : i + 512].sum() for i in range(512 * b, x.size, 3 * 512)) for b in range(3)]
        np.testing.assert_array_equal(sums, np.array(by_block) * [1, 2, 4] + 3)
    assert count.value == 6


def test_a_module_that_is_loaded_twice_has_variables_of_its_own() -> None:
    source = 'extern "C" { __device__ int count = 5; __global__ void add(int* out) { out[0] = count += 1; } }'
    one, two = cuda(source), cuda(source)
    found = np.zeros(1, np.int32)
    for module, right in ((one, 6), (one, 7), (two, 6)):
        assert launch(module, "add", (found,)) is None
        assert found == right


def test_the_rounding_of_the_host_thread_does_not_matter(program: Module) -> None:
    libm = ctypes.CDLL("libm.so.6")
    rows, found = np.array([[f32(1), f32(2.0**-30), 0, 0]], np.uint64), np.zeros((1, 2), np.uint64)
    usual = libm.fegetround()
    assert libm.fesetround(0x800) == 0  # FE_UPWARD on x86
    try:
        assert launch(program, f"case_{list(CASES).index('add.rn.f32 r, r0, r1;')}", (rows, found)) is None
        assert libm.fegetround() == 0x800
    finally:
        libm.fesetround(usual)
    assert found[0, 0] == f32(1)


def test_host_threads_launch_at_the_same_time() -> None:
    module = cuda(SUM)

    def many(start: int) -> np.ndarray:
        x = np.arange(start, start + 1024, dtype=np.float32)
        sums = np.zeros(1, np.float32)
        for _ in range(50):
            assert launch(module, "sum", (x, sums, np.int32(x.size)), 1, 256) is None
        return sums

    with ThreadPoolExecutor(4) as pool:
        for start, sums in zip(range(8), pool.map(many, range(8)), strict=True):
            assert sums[0] == 1024 * start + 1024 * 1023 / 2 + 3


def test_flushing_and_contraction_are_as_nvrtc_was_told() -> None:
    source = 'extern "C" __global__ void f(const float* x, float* y) { y[0] = x[0] * x[1] + x[2]; y[1] = x[3] * 0.5f; }'
    x, y = np.array([X, X, -(1 + 2.0**-11), SMALL], np.float32), np.zeros(2, np.float32)
    for flags, right in (
        (("--ftz=true",), (2.0**-24, 0)),
        (("--ftz=false", "--fmad=false"), (0, SMALL / 2)),
    ):
        assert launch(build(ptx_of(source, 90, *flags)), "f", (x, y)) is None
        np.testing.assert_array_equal(y, np.array(right, np.float32))


def test_the_mathematics_of_cuda() -> None:
    """NVRTC compiles each to many instructions; errors stay within the bounds that CUDA documents, in ulp."""
    functions = {"expf": 2, "logf": 1, "tanhf": 2, "log1pf": 2, "erff": 2, "sinf": 2, "powf": 4}
    calls = " ".join(
        f"y[{i} * 4096 + k] = {f}({'x[k], 1.5f' if f == 'powf' else 'x[k]'});" for i, f in enumerate(functions)
    )
    source = (
        f'extern "C" __global__ void f(const float* x, float* y) {{ int k = blockIdx.x * 64 + threadIdx.x; {calls} }}'
    )
    x = np.geomspace(1e-6, 80, 4096).astype(np.float32)
    y = np.zeros((len(functions), x.size), np.float32)
    assert launch(cuda(source), "f", (x, y), 64, 64) is None
    wide = x.astype(np.float64)
    erf = np.vectorize(math.erf)
    right = [np.exp(wide), np.log(wide), np.tanh(wide), np.log1p(wide), erf(wide), np.sin(wide), wide**1.5]
    for found, exact, (name, ulps) in zip(y, right, functions.items(), strict=True):
        error = np.abs(found - exact) / np.spacing(np.abs(exact).astype(np.float32))
        assert error.max() <= ulps, name


# --- unknown PTX -----------------------------------------------------------------------------------------------------

UNKNOWN = {
    "wgmma.fence.sync.aligned; mov.b32 r, r0;": "the opcode wgmma",
    "add.rn.bf16 h, h0, h1;": "no type that is known here",
    "add.rn.f16x2 r, r0, r1;": "no type that is known here",
    "max.f32 r, r0, r1, r2;": "the operand r2",
    "cvt.rn.satfinite.f16.f32 h, r0;": "the modifier .satfinite",
    "cvt.rz.f16.f32 h, r0;": "the rounding .rz to f16",
    "fma.rn.relu.f16 h, h0, h1, h2;": "the modifier .relu",
    "min.xorsign.abs.f32 r, r0, r1;": "the modifier .xorsign",
    "mov.u32 r, %smid;": "the name %smid",
    "mov.u32 r, nowhere;": "the name nowhere",
    "ld.shared::cluster.b32 r, [r0];": "the state spaces",
    "ld.global.v2.b32 {r, r1, r2}, [in];": "3 registers for 2 elements",
    "shfl.up.b32 r, r0, 1, 0;": "none of sync",
    "call nobody; mov.b32 r, r0;": "a call of nobody",
    "st.param.b32 [ins], r0; setp.lt.and.s32 p|p1, r0, r1, p2;": "two results",
}  # fmt: skip


@pytest.mark.parametrize("text", UNKNOWN)
def test_what_is_not_known_is_an_error_that_names_it(text: str) -> None:
    with pytest.raises(UnknownPTX, match=re.escape(UNKNOWN[text])) as caught:
        translate(ptx.read(PROGRAM_HEAD + kernel("k", text)))
    assert "of k" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (".texref t;", "the declaration '.texref t'"),
        (".visible .entry k() .explicitcluster { ret; }", "the directive .explicitcluster of k"),
        (".func f() { .reg .v2 .f32 x; ret; }", "the declaration '.reg .v2 .f32 x'"),
        (".visible .entry k() { .shared .align 64 .b8 x[64]; ret; }", "aligned to more than 16 bytes"),
    ],
)
def test_so_is_a_declaration(text: str, sentence: str) -> None:
    with pytest.raises(UnknownPTX, match=re.escape(sentence)):
        translate(ptx.read(PROGRAM_HEAD + text))


@pytest.mark.parametrize("architecture", [ARCHITECTURES[0], 90, ARCHITECTURES[-1]])
def test_every_kernel_of_gpubatch_is_known(architecture: int) -> None:
    """NVRTC emits different loads, arithmetic and jumps for old and new devices; all of them have translators."""
    with ThreadPoolExecutor() as pool:  # NVRTC compiles without Python's lock
        texts = list(pool.map(lambda source: ptx_of(source, architecture), sorted(sources().values())))
    for text in texts:
        assert translate(ptx.read(text)).kernels
