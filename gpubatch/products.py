"""Matrix products: by the library of the arrays, or on CUDA by cuBLASLt. The only module that names nvmath-python.

CuPy refuses its matrix products while a stream is captured. cuBLASLt's are plain launches in a workspace that is given
to it, so they may be captured; and it adds a bias, or sums one's gradient, in the same launch.
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from gpubatch.backend import INSTALL_CUPY, Array, Backend, CudaBackend
from gpubatch.errors import BackendUnavailableError
from gpubatch.ops import Activation

__all__ = ["PRECISIONS", "ArrayProducts", "LtProducts", "Products", "products_for"]

Addresses: TypeAlias = tuple[int, int, int, int]  # of A, B, D and the vector of the epilogue, 0 if it has none

PRECISIONS = ("full", "fast")

# What cuBLASLt computes in, for elements as they are stored and a precision.
COMPUTE = {
    ("float64", "full"): "COMPUTE_64F",
    ("float64", "fast"): "COMPUTE_64F",
    ("float32", "full"): "COMPUTE_32F",
    ("float32", "fast"): "COMPUTE_32F_FAST_TF32",
    ("float16", "full"): "COMPUTE_32F",
}
STORED = {"float16": "CUDA_R_16F", "float32": "CUDA_R_32F", "float64": "CUDA_R_64F"}
BIASED = {"identity": "BIAS", "relu": "RELU_BIAS"}  # the activations that cuBLASLt has after a bias

WORKSPACE = {False: 4 << 20, True: 32 << 20}  # bytes, from Hopper on the larger: what NVIDIA advises for cuBLAS
# Bytes. No kernel asks for more, and more would make the choice of a kernel, and so the last bits of a product, depend
# on where in memory a batch happens to lie.
ALIGNMENT = 16
PLANS_KEPT = 512  # a run has a dozen for each of its two or three batch sizes

# cublasLtMatmulHeuristicResult_t of cublasLt.h: the algorithm stands first.
RESULT = np.dtype(
    [("algorithm", "u8", 8), ("workspace", "u8"), ("state", "i4"), ("waves", "f4"), ("reserved", "i4", 4)]
)


class Products(ABC):
    """The matrix products of one network; not to be shared by threads.

    ``capturable`` is whether they may be launched while a stream is captured, ``reason`` how or why not, in words. All
    arrays are of the network's dtype and lie apart; ``out``, ``y`` and ``dW`` are C-contiguous.
    """

    capturable: bool
    reason: str

    @abstractmethod
    def multiply(self, a: Array, b: Array, out: Array) -> None:
        """out = a b, of two dimensions; a and b may be transposed views."""

    @abstractmethod
    def affine(self, f: Activation, x: Array, W: Array, b: Array, y: Array) -> bool:
        """y = f(x W + b) in one launch; False, and y of no value, where there is no such launch."""

    @abstractmethod
    def weight_gradient(self, x: Array, dy: Array, dW: Array, db: Array) -> bool:
        """dW = xᵀ dy and db = Σ dy in one launch; False, with nothing done, where there is no such launch."""

    @abstractmethod
    def memory_parts(self) -> dict[str, int]:
        """The bytes that they hold on the device, by what they are for."""


def products_for(backend: Backend, dtype: np.dtype[Any], precision: str) -> Products:
    """The products of a network on ``backend``; without cuBLASLt those of CuPy, of which "fast" is an error."""
    if not isinstance(backend, CudaBackend):
        matmul = multiply_in_float32 if dtype == np.float16 else backend.xp.matmul
        return ArrayProducts(matmul, "the CPU has no graphs to capture")
    try:
        with backend.scope():
            library, handle = open_library(backend)
    except Exception as error:  # not only ImportError: nvmath-python has its own for libraries that it cannot load
        absent = isinstance(error, ModuleNotFoundError) and error.name == "nvmath"
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        why = "nvmath-python is not installed" if absent else f"cuBLASLt cannot be loaded ({first_line})"
        if precision == "fast":
            cause = "not installed" if absent else "libraries missing"
            raise BackendUnavailableError(
                f"precision='fast' cannot be had on {backend.spec!r}: {why}.", cause, INSTALL_CUPY
            ) from error
        return ArrayProducts(backend.xp.matmul, f"{why}: {INSTALL_CUPY.removesuffix('.')}")
    return LtProducts(backend, dtype, precision, library, handle)


class ArrayProducts(Products):
    """``matmul`` of NumPy or CuPy, both of which add up the products of float16 in float32."""

    capturable = False

    def __init__(self, matmul: Callable[..., Any], reason: str) -> None:
        self.reason = reason
        self._matmul = matmul

    def multiply(self, a: Array, b: Array, out: Array) -> None:
        """See :class:`Products`."""
        self._matmul(a, b, out=out)

    def affine(self, f: Activation, x: Array, W: Array, b: Array, y: Array) -> bool:
        """See :class:`Products`; never."""
        return False

    def weight_gradient(self, x: Array, dy: Array, dW: Array, db: Array) -> bool:
        """See :class:`Products`; never."""
        return False

    def memory_parts(self) -> dict[str, int]:
        """Nothing is held."""
        return {}


def multiply_in_float32(a: Array, b: Array, out: Array) -> None:
    """out = a b of float16 on the CPU, by float32 copies: BLAS is a hundred times faster than NumPy's own loop."""
    out[...] = np.matmul(a.astype(np.float32), b.astype(np.float32))


# --- cuBLASLt --------------------------------------------------------------------------------------------------------


class Library(NamedTuple):
    """What is used of nvmath-python: functions, and the enumerations of what to compute in and of what is stored."""

    lt: Any
    compute_types: Any
    data_types: Any


def open_library(backend: CudaBackend) -> tuple[Library, int]:
    """cuBLASLt and a handle of it for the device of ``backend``, whose scope the caller has entered."""
    lt = backend.library("nvmath.bindings.cublasLt")
    types = backend.library("nvmath.bindings.cublas").ComputeType, backend.library("nvmath").CudaDataType
    return Library(lt, *types), lt.create()


class LtProducts(Products):
    """cuBLASLt on the current stream of ``backend``, whose scope the caller has entered.

    What it takes to launch a product is made for its shapes and strides when they are first seen, which is not to be in
    a capture; after that a product takes no memory and waits for nothing. ``library`` and ``handle`` are what
    :func:`open_library` gives.
    """

    capturable = True

    def __init__(
        self, backend: CudaBackend, dtype: np.dtype[Any], precision: str, library: Library, handle: int
    ) -> None:
        self.backend, self.dtype, self.precision = backend, dtype, precision
        self.library, self.handle = library, owned(self, handle, library.lt.destroy)
        number = int(library.lt.get_version())
        self.reason = f"cuBLASLt {number // 10000}.{number // 100 % 100}.{number % 100}"
        self.workspace = backend.empty(WORKSPACE[backend.capability >= 9], np.uint8)
        self._plans: dict[tuple[Any, ...], Plan | None] = {}
        self._stream: Callable[[], Any] = backend.cupy.cuda.get_current_stream
        self._plain = ArrayProducts(backend.xp.matmul, "")

    def multiply(self, a: Array, b: Array, out: Array) -> None:
        """See :class:`Products`; what cuBLASLt cannot read, such as every other column of an array, is for CuPy."""
        if not self._launch("DEFAULT", a, b, out, None):
            self._plain.multiply(a, b, out)

    def affine(self, f: Activation, x: Array, W: Array, b: Array, y: Array) -> bool:
        """See :class:`Products`; there is one for the identity and for ReLU."""
        return f.kind in BIASED and self._launch(BIASED[f.kind], x, W, y, b)

    def weight_gradient(self, x: Array, dy: Array, dW: Array, db: Array) -> bool:
        """See :class:`Products`."""
        return self._launch("BGRADA", x.T, dy, dW, db)  # dWᵀ = dyᵀ x: its A is dyᵀ, whose rows are summed

    def memory_parts(self) -> dict[str, int]:
        """The workspace that cuBLASLt is given."""
        return {"matrix products": int(self.workspace.nbytes)}

    def _launch(self, epilogue: str, a: Array, b: Array, out: Array, vector: Array | None) -> bool:
        """out = a b, and what comes after it and reads or writes ``vector``; False where there is no kernel for it."""
        at = b.data.ptr, a.data.ptr, out.data.ptr, 0 if vector is None else vector.data.ptr
        key = (
            *(epilogue, a.shape, a.strides, a.dtype, b.shape, b.strides, b.dtype, out.shape, out.strides, out.dtype),
            None if vector is None else (vector.shape, vector.strides, vector.dtype),
            *(at[0] % ALIGNMENT, at[1] % ALIGNMENT, at[2] % ALIGNMENT, at[3] % ALIGNMENT),
        )
        try:
            plan = self._plans[key]
        except KeyError:
            if len(self._plans) == PLANS_KEPT:
                del self._plans[next(iter(self._plans))]
            plan = self._plans[key] = self._plan(epilogue, a, b, out, vector, at)
        if plan is None:
            return False
        plan.launch(*at, self._stream().ptr)
        return True

    def _plan(self, epilogue: str, a: Array, b: Array, out: Array, vector: Array | None, at: Addresses) -> Plan | None:
        """What it takes to launch this product; None where cuBLASLt does not have it."""
        fit = (a.ndim, b.ndim, b.shape[:1]) == (2, 2, a.shape[1:]) and out.shape == (a.shape[0], b.shape[1])
        if vector is not None:
            fit = fit and (vector.shape, vector.dtype) == (b.shape[1:], self.dtype) and vector.flags.c_contiguous
        # A C-contiguous array, read by columns as cuBLASLt reads, is its transpose: so outᵀ = bᵀ aᵀ is asked for.
        A, B, D = (by_columns(x, self.dtype) if fit else None for x in (b, a, out))
        if A is None or B is None or D is None or D.transposed or D.stride != D.rows:
            return None
        plan = Plan(self, epilogue, (A, B, D), at)
        if plan.algorithm == 0 or (epilogue in BIASED.values() and not self._shows_nan(plan, out, at)):
            return None
        if epilogue == "BGRADA" and not self._adds_all(plan, b, vector, at):
            return None
        return plan

    def _shows_nan(self, plan: Plan, out: Array, at: Addresses) -> bool:
        """Whether a bias of NaN makes NaN of all; writes over ``out``, and waits for it.

        That ReLU is NaN for NaN, as it is here, is not documented: for some instructions the larger of NaN and 0 is 0,
        which would hide a network that has gone wrong. And there were versions that left out the bias of some elements.
        """
        nan = self.backend.asarray(np.full(out.shape[1], np.nan, self.dtype))
        plan.launch(at[0], at[1], at[2], nan.data.ptr, self._stream().ptr)
        return bool(np.isnan(self.backend.to_numpy(out)).all())

    def _adds_all(self, plan: Plan, dy: Array, db: Array, at: Addresses) -> bool:
        """Whether ones add up to how many there are; writes over the results, and waits for them."""
        if not (dy.flags.c_contiguous or dy.flags.f_contiguous):
            return False
        ones = self.backend.empty(dy.shape, self.dtype)
        ones.fill(1)
        plan.launch(ones.data.ptr, at[1], at[2], at[3], self._stream().ptr)
        with np.errstate(over="ignore"):  # float16 goes to 65504
            return bool((self.backend.to_numpy(db) == np.array(len(dy)).astype(self.dtype)).all())


class Matrix(NamedTuple):
    """An array as cuBLASLt sees it: by columns, that lie ``stride`` elements apart.

    What is seen is the transpose of the array, or with ``transposed`` the array, so that its transpose is to be taken.
    """

    rows: int
    columns: int
    stride: int
    transposed: bool


def by_columns(x: Array, dtype: np.dtype[Any]) -> Matrix | None:
    """How cuBLASLt sees ``x``; None where it cannot."""
    if x.dtype != dtype or x.size == 0:
        return None
    (height, width), (down, across), size = x.shape, x.strides, dtype.itemsize
    for rows, columns, step, stride, transposed in (
        (width, height, across, down, False),
        (height, width, down, across, True),
    ):
        apart = columns == 1 or (stride >= rows * size and stride % size == 0)
        if apart and (rows == 1 or step == size):  # along an axis of one element a stride may be anything
            return Matrix(rows, columns, rows if columns == 1 else stride // size, transposed)
    return None


class Plan:
    """D = op(A) op(B), and what comes after it, as cuBLASLt is asked for it, by the algorithm that its heuristic finds.

    The addresses ``at`` stand for all that are as well aligned. ``algorithm`` is the address of what the heuristic
    found, 0 if that is nothing.
    """

    def __init__(
        self, products: LtProducts, epilogue: str, matrices: tuple[Matrix, Matrix, Matrix], at: Addresses
    ) -> None:
        (lt, compute_types, data_types), dtype = products.library, products.dtype
        compute = COMPUTE[dtype.name, products.precision]
        scale = np.dtype(np.float64 if compute == "COMPUTE_64F" else np.float32)  # the type of alpha and beta
        compute_type = getattr(compute_types, compute)
        scale_type, stored = (getattr(data_types, STORED[kind.name]) for kind in (scale, dtype))

        self.operation = owned(self, lt.matmul_desc_create(compute_type, scale_type), lt.matmul_desc_destroy)
        self.layouts = [
            owned(self, lt.matrix_layout_create(stored, m.rows, m.columns, m.stride), lt.matrix_layout_destroy)
            for m in matrices
        ]
        preference = owned(self, lt.matmul_preference_create(), lt.matmul_preference_destroy)
        of_operation, of_preference = lt.MatmulDescAttribute, lt.MatmulPreferenceAttribute
        wanted = {
            of_operation.TRANSA: matrices[0].transposed,  # CUBLAS_OP_N is 0, CUBLAS_OP_T is 1
            of_operation.TRANSB: matrices[1].transposed,
            of_operation.EPILOGUE: getattr(lt.Epilogue, epilogue),
            of_operation.BIAS_POINTER: at[3],
        }
        set_all(lt.matmul_desc_set_attribute, self.operation, wanted, lt.get_matmul_desc_attribute_dtype)
        a, b, d, vector = (min(ALIGNMENT, address & -address) if address else ALIGNMENT for address in at)
        wanted = {
            of_preference.MAX_WORKSPACE_BYTES: products.workspace.nbytes,
            of_preference.MIN_ALIGNMENT_A_BYTES: a,
            of_preference.MIN_ALIGNMENT_B_BYTES: b,
            of_preference.MIN_ALIGNMENT_C_BYTES: d,
            of_preference.MIN_ALIGNMENT_D_BYTES: min(d, vector),  # the vector has no attribute of its own
        }
        set_all(lt.matmul_preference_set_attribute, preference, wanted, lt.get_matmul_preference_attribute_dtype)
        self.found, count = np.zeros(1, RESULT), np.zeros(1, np.int32)
        question = (products.handle, self.operation, *self.layouts, self.layouts[2], preference, 1)
        try:
            lt.matmul_algo_get_heuristic(*question, self.found.ctypes.data, count.ctypes.data)
        except lt.cuBLASLtError:  # it has no other way to say that there is none
            count[0] = 0
        self.algorithm = int(self.found.ctypes.data) if count[0] and self.found["state"][0] == 0 else 0

        self.numbers = np.array([1, 0], scale)  # alpha and beta
        self.vector, self.vector_at = np.zeros(1, np.int64), at[3]
        alpha, work = int(self.numbers.ctypes.data), (products.workspace.data.ptr, products.workspace.nbytes)
        self.matmul, self.set_attribute = lt.matmul, lt.matmul_desc_set_attribute
        self.bias_pointer, self.vector_place = of_operation.BIAS_POINTER, int(self.vector.ctypes.data)
        self.before, self.between, self.after = (products.handle, self.operation, alpha), alpha + scale.itemsize, work

    def launch(self, a_at: int, b_at: int, d_at: int, vector_at: int, stream: int) -> None:
        """Start it on a stream; what lies at the addresses is as it was when the plan was made."""
        if vector_at != self.vector_at:
            self.vector[0] = self.vector_at = vector_at
            self.set_attribute(self.operation, self.bias_pointer, self.vector_place, 8)
        a, b, d = self.layouts
        self.matmul(
            *(*self.before, a_at, a, b_at, b, self.between),
            *(d_at, d, d_at, d, self.algorithm, *self.after, stream),
        )


def owned(owner: Any, descriptor: int, destroy: Callable[[int], None]) -> int:
    """``descriptor``, which is destroyed when nobody has ``owner`` any more."""
    # Not at the end of the process, when all goes at once and in an order of which nothing is known.
    weakref.finalize(owner, destroy, descriptor).atexit = False
    return descriptor


def set_all(
    set_attribute: Callable[[int, Any, int, int], None],
    descriptor: int,
    wanted: Mapping[Any, int],
    dtype_of: Callable[[Any], Any],
) -> None:
    """Set attributes of a descriptor."""
    for attribute, value in wanted.items():
        number = np.array([value], dtype_of(attribute))
        set_attribute(descriptor, attribute, number.ctypes.data, number.nbytes)
