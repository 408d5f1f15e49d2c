"""A stand-in for nvmath-python's cuBLASLt: descriptors and launches by the rules of cublasLt.h, products by NumPy.

Matrices are column-major, at raw addresses. The stand-in of CuPy starts the launches, so they run at once, are queued
or are recorded like its kernels. Misuse fails, whether the library would refuse it or not notice it.
"""

from __future__ import annotations

import ctypes
import enum
import itertools
import zlib
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from stand_in import StandIn


class ComputeType(enum.IntEnum):
    COMPUTE_32F = 68
    COMPUTE_64F = 70
    COMPUTE_32F_FAST_TF32 = 77


class CudaDataType(enum.IntEnum):
    CUDA_R_32F = 0
    CUDA_R_64F = 1
    CUDA_R_16F = 2


class Epilogue(enum.IntEnum):
    DEFAULT = 1
    RELU = 2
    BIAS = 4
    RELU_BIAS = 6
    BGRADA = 256
    BGRADB = 512


class MatmulDescAttribute(enum.IntEnum):
    TRANSA = 3
    TRANSB = 4
    EPILOGUE = 7
    BIAS_POINTER = 8


class MatmulPreferenceAttribute(enum.IntEnum):
    MAX_WORKSPACE_BYTES = 1
    MIN_ALIGNMENT_A_BYTES = 5
    MIN_ALIGNMENT_B_BYTES = 6
    MIN_ALIGNMENT_C_BYTES = 7
    MIN_ALIGNMENT_D_BYTES = 8


Desc, Preference = MatmulDescAttribute, MatmulPreferenceAttribute
DTYPES = {CudaDataType.CUDA_R_32F: np.float32, CudaDataType.CUDA_R_64F: np.float64, CudaDataType.CUDA_R_16F: np.float16}
DESC_DTYPES = {Desc.TRANSA: np.int32, Desc.TRANSB: np.int32, Desc.EPILOGUE: np.uint32, Desc.BIAS_POINTER: np.int64}
PREFERENCE_DTYPES = {p: np.uint64 if p == Preference.MAX_WORKSPACE_BYTES else np.uint32 for p in Preference}

# The allowed (element type, type of alpha and beta) of each compute type.
ALLOWED = {
    ComputeType.COMPUTE_64F: {(np.float64, np.float64)},
    ComputeType.COMPUTE_32F: {(np.float32, np.float32), (np.float16, np.float32)},
    ComputeType.COMPUTE_32F_FAST_TF32: {(np.float32, np.float32)},
}


class cuBLASLtError(Exception):  # noqa: N801  the library's name
    pass


@dataclass
class Operation:
    compute: ComputeType
    scale: type
    attributes: dict[Desc, int] = field(
        default_factory=lambda: {Desc.TRANSA: 0, Desc.TRANSB: 0, Desc.EPILOGUE: Epilogue.DEFAULT, Desc.BIAS_POINTER: 0}
    )


@dataclass(frozen=True)
class Layout:
    dtype: type
    rows: int
    columns: int
    stride: int


class StandInLt:
    """The modules ``nvmath``, ``nvmath.bindings.cublas`` and ``nvmath.bindings.cublasLt`` as one.

    lacks: epilogues for which the heuristic finds no algorithm
    relu_of_nan: False: ReLU of NaN is 0
    whole_bias: False: the last column gets no bias
    whole_sums: False: the bias gradient omits the last row
    costs: milliseconds of each algorithm; the n-th, from 0, rounds its sums to n bits less than float32 has

    ``calls`` counts calls by name, ``launches`` has the epilogue of each launch.
    """

    ComputeType, CudaDataType, Epilogue = ComputeType, CudaDataType, Epilogue
    MatmulDescAttribute, MatmulPreferenceAttribute = MatmulDescAttribute, MatmulPreferenceAttribute
    cuBLASLtError = cuBLASLtError  # noqa: N815

    def __init__(
        self,
        cupy: StandIn,
        lacks: tuple[str, ...] = (),
        relu_of_nan: bool = True,
        whole_bias: bool = True,
        whole_sums: bool = True,
        costs: tuple[float, ...] = (1.0,),
    ) -> None:
        self.costs = costs
        self.cupy, self.lacks, self.relu_of_nan = cupy, lacks, relu_of_nan
        self.whole_bias, self.whole_sums = whole_bias, whole_sums
        self.numbers = itertools.count(1000)
        self.handles: set[int] = set()
        self.operations: dict[int, Operation] = {}
        self.layouts: dict[int, Layout] = {}
        self.preferences: dict[int, dict[Preference, int]] = {}
        self.answers: dict[int, Any] = {}
        self.calls: Counter[str] = Counter()
        self.launches: list[str] = []
        self.most_workspace = 0

    @property
    def alive(self) -> int:
        """The number of descriptors and handles that exist."""
        return len(self.handles) + len(self.operations) + len(self.layouts) + len(self.preferences)

    def get_version(self) -> int:
        return 120903

    def create(self) -> int:
        self.handles.add(handle := next(self.numbers))
        return handle

    def destroy(self, handle: int) -> None:
        self.handles.remove(handle)

    def matmul_desc_create(self, compute: int, scale: int) -> int:
        self.calls["create"] += 1
        self.operations[number := next(self.numbers)] = Operation(ComputeType(compute), DTYPES[CudaDataType(scale)])
        return number

    def matmul_desc_destroy(self, number: int) -> None:
        del self.operations[number]

    def get_matmul_desc_attribute_dtype(self, attribute: int) -> type:
        return DESC_DTYPES[Desc(attribute)]

    def matmul_desc_set_attribute(self, number: int, attribute: int, address: int, size: int) -> None:
        self.calls["set"] += 1
        dtype = np.dtype(DESC_DTYPES[Desc(attribute)])
        self.operations[number].attributes[Desc(attribute)] = int(read(address, size, dtype))

    def matrix_layout_create(self, kind: int, rows: int, columns: int, stride: int) -> int:
        self.calls["create"] += 1
        if rows < 1 or columns < 1 or stride < rows:
            raise cuBLASLtError("CUBLAS_STATUS_INVALID_VALUE")
        self.layouts[number := next(self.numbers)] = Layout(DTYPES[CudaDataType(kind)], rows, columns, stride)
        return number

    def matrix_layout_destroy(self, number: int) -> None:
        del self.layouts[number]

    def matmul_preference_create(self) -> int:
        self.calls["create"] += 1
        default = {p: 0 if p == Preference.MAX_WORKSPACE_BYTES else 256 for p in Preference}
        self.preferences[number := next(self.numbers)] = default
        return number

    def matmul_preference_destroy(self, number: int) -> None:
        del self.preferences[number]

    def get_matmul_preference_attribute_dtype(self, attribute: int) -> type:
        return PREFERENCE_DTYPES[Preference(attribute)]

    def matmul_preference_set_attribute(self, number: int, attribute: int, address: int, size: int) -> None:
        dtype = np.dtype(PREFERENCE_DTYPES[Preference(attribute)])
        self.preferences[number][Preference(attribute)] = int(read(address, size, dtype))

    def matmul_algo_get_heuristic(
        self,
        handle: int,
        operation: int,
        a: int,
        b: int,
        c: int,
        d: int,
        preference: int,
        most: int,
        found: int,
        n: int,
    ) -> None:
        """Return algorithms that need the whole workspace; each remembers its product."""
        self.calls["heuristic"] += 1
        assert handle in self.handles
        assert most >= 1
        op, matrices = self.operations[operation], [self.layouts[x] for x in (a, b, c, d)]
        if Epilogue(op.attributes[Desc.EPILOGUE]).name in self.lacks:
            raise cuBLASLtError("CUBLAS_STATUS_NOT_SUPPORTED")
        if any((m.dtype, op.scale) not in ALLOWED[op.compute] for m in matrices):
            raise cuBLASLtError("CUBLAS_STATUS_NOT_SUPPORTED")
        self.shapes(op, *matrices)
        wanted = dict(self.preferences[preference])
        problem = (op.attributes[Desc.EPILOGUE], op.compute, matrices)
        count = min(most, len(self.costs))
        # cublasLtMatmulHeuristicResult_t: 64 bytes of algorithm, workspace, state, waves, 16 bytes
        answer = np.zeros((count, 12), np.uint64)
        for which in range(count):
            number = zlib.crc32(repr((problem, sorted(wanted.items()), which)).encode())  # equal in all processes
            self.answers[number] = (*problem, wanted, which)
            answer[which, 0], answer[which, 8] = number, wanted[Preference.MAX_WORKSPACE_BYTES]
        ctypes.memmove(found, answer.ctypes.data, answer.nbytes)
        ctypes.memmove(n, np.array([count], np.int32).ctypes.data, 4)

    def matmul_algo_check(
        self, handle: int, operation: int, a: int, b: int, c: int, d: int, algorithm: int, result: int
    ) -> None:
        """Raise an error unless the heuristic returned the algorithm for this product."""
        op, matrices = self.operations[operation], [self.layouts[x] for x in (a, b, c, d)]
        chosen = self.answers.get(int(read(algorithm, 8, np.dtype(np.uint64))))
        if chosen is None or chosen[:3] != (op.attributes[Desc.EPILOGUE], op.compute, matrices):
            raise cuBLASLtError("CUBLAS_STATUS_INVALID_VALUE")
        checked = np.zeros(12, np.uint64)
        checked[8] = chosen[3][Preference.MAX_WORKSPACE_BYTES]
        ctypes.memmove(result, checked.ctypes.data, 96)

    def shapes(self, op: Operation, a: Layout, b: Layout, c: Layout, d: Layout) -> tuple[int, int, int]:
        """(m, n, k); raises an error if the shapes do not match."""
        turned = op.attributes[Desc.TRANSA], op.attributes[Desc.TRANSB]
        (m, k), (k_of_b, n) = ((x.columns, x.rows) if t else (x.rows, x.columns) for x, t in zip((a, b), turned))  # noqa: B905
        if k != k_of_b or {(x.rows, x.columns) for x in (c, d)} != {(m, n)}:
            raise cuBLASLtError("CUBLAS_STATUS_INVALID_VALUE")
        return m, n, k

    def matmul(
        self, handle: int, operation: int, alpha: int, a: int, a_layout: int, b: int, b_layout: int, beta: int,
        c: int, c_layout: int, d: int, d_layout: int, algorithm: int, workspace: int, size: int, stream: int,
    ) -> None:  # fmt: skip
        """D = alpha op(A) op(B) + beta C and the epilogue; reads descriptors now, matrices when the launch runs."""
        assert handle in self.handles
        assert stream == self.cupy.cuda.get_current_stream().ptr, "not the current stream"
        op, matrices = self.operations[operation], [self.layouts[x] for x in (a_layout, b_layout, c_layout, d_layout)]
        epilogue, vector = Epilogue(op.attributes[Desc.EPILOGUE]), op.attributes[Desc.BIAS_POINTER]
        chosen = self.answers[int(read(algorithm, 8, np.dtype(np.uint64)))]
        assert chosen[:3] == (epilogue, op.compute, matrices), "an algorithm for another product"
        wanted, which = chosen[3:]
        assert size >= wanted[Preference.MAX_WORKSPACE_BYTES]
        self.most_workspace = max(self.most_workspace, size)
        for name, address in {"A": a, "B": b, "C": c, "D": d}.items():
            aligned = wanted[Preference[f"MIN_ALIGNMENT_{name}_BYTES"]]
            assert address % aligned == 0, f"{name} at {address} is not aligned to {aligned} bytes"
        if epilogue & (Epilogue.BIAS | Epilogue.BGRADA):
            assert vector, "no vector"
            assert vector % wanted[Preference.MIN_ALIGNMENT_D_BYTES] == 0
        m, n, k = self.shapes(op, *matrices)
        scales = [read(x, np.dtype(op.scale).itemsize, np.dtype(op.scale)) for x in (alpha, beta)]
        turned = op.attributes[Desc.TRANSA], op.attributes[Desc.TRANSB]
        A, B, C, D = (self.matrix(at, layout) for at, layout in zip((a, b, c, d), matrices, strict=True))
        vectors = self.array(vector, (m,), (A.itemsize,), A.dtype) if vector else None
        work = self.array(workspace, (size,), (1,), np.dtype(np.uint8))
        self.launches.append(epilogue.name)

        def run() -> None:
            work.fill(0xA5)  # overwrites the workspace
            first, second = (self.rounded(x.T if t else x, op) for x, t in zip((A, B), turned, strict=True))
            assert (first.shape, second.shape) == ((m, k), (k, n))
            total = scales[0] * (first @ second)
            if which:
                mantissa, exponent = np.frexp(total)
                total = np.ldexp(np.round(mantissa * 2.0 ** (24 - which)) / 2.0 ** (24 - which), exponent)
            self.cupy.clock += self.costs[which]
            if scales[1]:
                total = total + scales[1] * C
            if epilogue & Epilogue.BIAS:
                whole = slice(None if self.whole_bias else n - 1)
                total[:, whole] += vectors.astype(total.dtype)[:, None]
            if epilogue & Epilogue.RELU:
                total = (np.maximum if self.relu_of_nan else np.fmax)(total, 0)
            if epilogue & Epilogue.BGRADA:
                exact = A.T if turned[0] else A
                vectors[...] = exact[:, : None if self.whole_sums else -1].sum(axis=1, dtype=op.scale)
            D[...] = total

        self.cupy.start(run)

    def rounded(self, x: np.ndarray, op: Operation) -> np.ndarray:
        """A factor rounded to the compute type: TF32 has ten bits of mantissa."""
        x = x.astype(op.scale)
        if op.compute != ComputeType.COMPUTE_32F_FAST_TF32:
            return x
        bits = x.view(np.uint32).astype(np.uint64)
        kept = ((bits + 0xFFF + ((bits >> 13) & 1)) & 0xFFFFE000).astype(np.uint32).view(np.float32)  # to nearest even
        return np.where(np.isfinite(x), kept, x)

    def matrix(self, address: int, layout: Layout) -> np.ndarray:
        size = np.dtype(layout.dtype).itemsize
        shape, strides = (layout.rows, layout.columns), (size, size * layout.stride)
        return self.array(address, shape, strides, np.dtype(layout.dtype))

    def array(self, address: int, shape: Any, strides: Any, dtype: np.dtype) -> np.ndarray:
        """The array at an address; if the stand-in records its memory, the array must lie within one block."""
        extent = sum((n - 1) * step for n, step in zip(shape, strides, strict=True)) + dtype.itemsize
        if (block := self.cupy.memory_at(address)) is None:
            memory = (ctypes.c_ubyte * extent).from_address(address)
            return np.ndarray(shape, dtype, memory, 0, strides)
        offset = address - block.ctypes.data
        assert offset + extent <= block.nbytes, "beyond the block"
        return np.ndarray(shape, dtype, block, offset, strides)


def read(address: int, size: int, dtype: np.dtype) -> Any:
    """The number at an address."""
    assert size == dtype.itemsize, f"{size} bytes for a {dtype}"
    return np.frombuffer(ctypes.string_at(address, size), dtype)[0]
