"""Matrix products: by NumPy or CuPy, or on CUDA by cuBLASLt. The only module that names nvmath-python.

CuPy refuses matrix products during a stream capture. A product of cuBLASLt is a plain launch in a workspace of the
caller's, so it may be captured; and one launch also adds a bias, or sums the gradient of one.

cuBLASLt has several algorithms for a product; its heuristic predicts the fastest. With ``tune`` they are timed instead,
when a product is first seen. The network's state keeps the choices, since another algorithm gives other last bits.
"""

from __future__ import annotations

import functools
import re
import statistics
import warnings
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from gpubatch.backend import INSTALL_CUPY, Array, Backend, CudaBackend
from gpubatch.errors import ArgumentError, BackendUnavailableError, DTypeError, TuningWarning
from gpubatch.formula import BoundActivation, activations
from gpubatch.ops.blas import multiply, multiply_in_float32
from gpubatch.ops.compile import cuda_kernel, source_of
from gpubatch.ops.elementwise import IDENTITY

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
BIASED = {IDENTITY: "BIAS", activations.relu.bind(): "RELU_BIAS"}  # the activations that cuBLASLt has after a bias

WORKSPACE = {False: 4 << 20, True: 32 << 20}  # bytes, from Hopper on the larger: what NVIDIA advises for cuBLAS
# Bytes. No kernel asks for more; with more, the choice of a kernel, and so the last bits of a product, would depend on
# the address of a batch.
ALIGNMENT = 16
PLANS_KEPT = 512  # a run has a dozen for each of its two or three batch sizes

HOPPER = 9  # its TF32 instruction reads both factors along the summed dimension, and in no other order

CANDIDATES = 8  # algorithms that tuning asks for
LAUNCHES = 8  # of a product in the timed graph: a single launch ends before its event is recorded
ROUNDS = 7  # every graph is timed once in each
MARGIN = 1.03  # how much faster than the predicted algorithm another must be, so that noise changes no choice
THREADS, TILE = 256, 32  # of kernels/transpose.cu

# A choice: the 64 bytes of an algorithm, valid for one version of cuBLASLt, and whether it reads a copy.
COPY = "copy "
CHOICE = re.compile(f"(?:{COPY})?[0-9a-f]{{128}}")

# cublasLtMatmulHeuristicResult_t of cublasLt.h: the algorithm stands first.
RESULT = np.dtype(
    [("algorithm", "u8", 8), ("workspace", "u8"), ("state", "i4"), ("waves", "f4"), ("reserved", "i4", 4)]
)


class Products(ABC):
    """The matrix products of one network; threads must not share them.

    ``capturable`` says whether they may be launched during a stream capture, ``reason`` how or why not, in words. All
    arrays have the network's dtype and do not overlap; ``out``, ``y`` and ``dW`` are C-contiguous.
    """

    capturable: bool
    reason: str

    @abstractmethod
    def multiply(self, a: Array, b: Array, out: Array) -> None:
        """out = a b, of two dimensions; a and b may be transposed views."""

    @abstractmethod
    def affine(self, f: BoundActivation, x: Array, W: Array, b: Array, y: Array) -> bool:
        """y = f(x W + b) in one launch; False where there is no such launch: then y holds nothing of use."""

    @abstractmethod
    def weight_gradient(self, x: Array, dy: Array, dW: Array, db: Array) -> bool:
        """dW = xᵀ dy and db = Σ dy in one launch; False, with nothing done, where there is no such launch."""

    @abstractmethod
    def memory_parts(self) -> dict[str, int]:
        """Bytes held on the device, by purpose."""

    @abstractmethod
    def choices(self) -> dict[str, Any]:
        """The algorithms chosen by timing, as values for JSON; empty without any."""

    @abstractmethod
    def take_choices(self, saved: Mapping[str, Any]) -> None:
        """Use algorithms that :meth:`choices` gave, if for this library and kind of device; otherwise warn.

        The warning is a :class:`TuningWarning`. :func:`check_choices` must have accepted ``saved``.
        """


def products_for(
    backend: Backend, dtype: np.dtype[Any], precision: str, tune: bool = False, largest: int = 0
) -> Products:
    """The products of a network on ``backend``: cuBLASLt's, or without it CuPy's.

    precision: "full", or "fast", which needs cuBLASLt.
    tune: choose algorithms by timing, which needs cuBLASLt.
    largest: the number of elements of the largest weight matrix.
    """
    if not isinstance(backend, CudaBackend):
        matmul = multiply_in_float32 if dtype == np.float16 else multiply
        return ArrayProducts(matmul, "the CPU has no graphs to capture")
    try:
        with backend.scope():
            library, handle = open_library(backend)
    except Exception as error:  # not only ImportError: nvmath-python has its own for libraries that it cannot load
        absent = isinstance(error, ModuleNotFoundError) and error.name == "nvmath"
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        why = "nvmath-python is not installed" if absent else f"cuBLASLt cannot be loaded ({first_line})"
        if precision == "fast" or tune:
            asked = "precision='fast'" if precision == "fast" else "tune=True"
            cause = "not installed" if absent else "libraries missing"
            raise BackendUnavailableError(
                f"{asked} cannot be had on {backend.spec!r}: {why}.", cause, INSTALL_CUPY
            ) from error
        return ArrayProducts(backend.xp.matmul, f"{why}: {INSTALL_CUPY.removesuffix('.')}")
    return LtProducts(backend, dtype, precision, library, handle, tune, largest)


def check_choices(saved: Any) -> None:
    """Raise unless ``saved`` has the form that :meth:`Products.choices` gives."""
    if not isinstance(saved, Mapping):
        raise DTypeError(f"products must be a mapping, got {type(saved).__name__}")
    wanted = {"library": str, "device": str, "algorithms": Mapping}
    if saved.keys() != wanted.keys() or any(not isinstance(saved[name], kind) for name, kind in wanted.items()):
        raise ArgumentError(f"products must hold {', '.join(wanted)}, got {saved!r}")
    for name, choice in saved["algorithms"].items():
        if not isinstance(choice, str) or CHOICE.fullmatch(choice) is None:
            raise ArgumentError(
                f"products must hold algorithms of 64 bytes as hexadecimal digits, {name} is {choice!r}"
            )


class ArrayProducts(Products):
    """``matmul(a, b, out=)``: CuPy's, or on the CPU :func:`multiply`; both sum products of float16 in float32."""

    capturable = False

    def __init__(self, matmul: Callable[..., Any], reason: str) -> None:
        self.reason = reason
        self._matmul = matmul

    def multiply(self, a: Array, b: Array, out: Array) -> None:
        """See :class:`Products`."""
        self._matmul(a, b, out=out)

    def affine(self, f: BoundActivation, x: Array, W: Array, b: Array, y: Array) -> bool:
        """See :class:`Products`; never."""
        return False

    def weight_gradient(self, x: Array, dy: Array, dW: Array, db: Array) -> bool:
        """See :class:`Products`; never."""
        return False

    def memory_parts(self) -> dict[str, int]:
        """Nothing is held."""
        return {}

    def choices(self) -> dict[str, Any]:
        """There is nothing to choose."""
        return {}

    def take_choices(self, saved: Mapping[str, Any]) -> None:
        """See :class:`Products`; never."""
        warn_of_others(saved, "this network's products are not cuBLASLt's")


# --- cuBLASLt --------------------------------------------------------------------------------------------------------


class Library(NamedTuple):
    """The parts of nvmath-python in use: functions, and the enumerations of compute types and of stored types."""

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

    A plan is made when a product's shapes and strides are first seen, which must not be in a capture; after that a
    product allocates nothing and waits for nothing. ``library`` and ``handle`` come from :func:`open_library`.

    With ``tune`` and TF32 on Hopper one candidate for x W multiplies by a transposed copy of W, made at every launch,
    since the fast instruction cannot read W in its own order.
    """

    capturable = True

    def __init__(
        self,
        backend: CudaBackend,
        dtype: np.dtype[Any],
        precision: str,
        library: Library,
        handle: int,
        tune: bool = False,
        largest: int = 0,
    ) -> None:
        self.backend, self.dtype, self.precision = backend, dtype, precision
        self.library, self.handle = library, owned(self, handle, library.lt.destroy)
        number = int(library.lt.get_version())
        self.reason = f"cuBLASLt {number // 10000}.{number // 100 % 100}.{number % 100}"
        self.workspace = backend.empty(WORKSPACE[backend.capability >= HOPPER], np.uint8)
        one_order = backend.capability == HOPPER and COMPUTE[dtype.name, precision] == "COMPUTE_32F_FAST_TF32"
        self._tune, self._largest = tune, largest if one_order else 0
        self._copies = backend.empty(self._largest if tune else 0, dtype)
        self._choices: dict[str, str] = {}  # by the product's name
        self._plans: dict[tuple[Any, ...], Plan | None] = {}
        self._stream: Callable[[], Any] = backend.cupy.cuda.get_current_stream
        self._plain = ArrayProducts(backend.xp.matmul, "")

    def multiply(self, a: Array, b: Array, out: Array) -> None:
        """See :class:`Products`; CuPy takes what cuBLASLt cannot read, such as every other column of an array."""
        if not self._launch("DEFAULT", a, b, out, None):
            self._plain.multiply(a, b, out)

    def affine(self, f: BoundActivation, x: Array, W: Array, b: Array, y: Array) -> bool:
        """See :class:`Products`; for the identity and for ReLU."""
        return f in BIASED and self._launch(BIASED[f], x, W, y, b)

    def weight_gradient(self, x: Array, dy: Array, dW: Array, db: Array) -> bool:
        """See :class:`Products`."""
        return self._launch("BGRADA", x.T, dy, dW, db)  # dWᵀ = dyᵀ x: its A is dyᵀ, whose rows are summed

    def memory_parts(self) -> dict[str, int]:
        """The workspace of cuBLASLt, and the copy of weights."""
        return {"matrix products": int(self.workspace.nbytes + self._copies.nbytes)}

    def choices(self) -> dict[str, Any]:
        """See :class:`Products`."""
        return {**self._where(), "algorithms": dict(self._choices)} if self._choices else {}

    def take_choices(self, saved: Mapping[str, Any]) -> None:
        """See :class:`Products`."""
        here = self._where()
        if any(saved[name] != value for name, value in here.items()):
            warn_of_others(saved, f"this is {here['library']} on {here['device']}")
            return
        self._choices.update(saved["algorithms"])
        if any(choice.startswith(COPY) for choice in self._choices.values()) and not self._copies.size:
            self._copies = self.backend.empty(self._largest, self.dtype)
        for key, plan in list(self._plans.items()):
            if plan is not None and plan.choice != self._choices.get(plan.name, plan.choice):
                del self._plans[key]

    def _where(self) -> dict[str, str]:
        """What an algorithm is valid for: a version of the library and a kind of device."""
        properties = self.backend.cupy.cuda.runtime.getDeviceProperties(self.backend.index)
        return {"library": self.reason, "device": properties["name"].decode()}

    def _launch(self, epilogue: str, a: Array, b: Array, out: Array, vector: Array | None) -> bool:
        """out = a b with an epilogue that reads or writes ``vector``; False where there is no kernel for it."""
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
        """The plan of this product; None where cuBLASLt does not have it."""
        fit = (a.ndim, b.ndim, b.shape[:1]) == (2, 2, a.shape[1:]) and out.shape == (a.shape[0], b.shape[1])
        if vector is not None:
            fit = fit and (vector.shape, vector.dtype) == (b.shape[1:], self.dtype) and vector.flags.c_contiguous
        # cuBLASLt reads by columns, so it sees the transpose of a C-contiguous array: ask for outᵀ = bᵀ aᵀ.
        A, B, D = (by_columns(x, self.dtype) if fit else None for x in (b, a, out))
        if A is None or B is None or D is None or D.transposed or D.stride != D.rows:
            return None

        def sound(plan: Plan) -> bool:
            """Whether the plan can be launched and its epilogue is right."""
            try:
                if epilogue in BIASED.values():
                    return self._shows_nan(plan, out, at)
                if epilogue == "BGRADA":
                    return self._adds_all(plan, b, vector, at)
                if self._tune:  # what is captured must have been launched before
                    plan.launch(*at, self._stream().ptr)
            except self.library.lt.cuBLASLtError:
                if not self._tune:
                    raise
                return False
            return True

        forms = self._forms(epilogue, (A, B, D), at)
        if forms[0].name in self._choices:
            if (plan := self._saved_plan(forms, sound)) is not None:
                return plan
            forms = self._forms(epilogue, (A, B, D), at)  # anew: these may have what was saved
        return self._new_plan(forms, sound, at)

    def _forms(self, epilogue: str, matrices: tuple[Matrix, Matrix, Matrix], at: Addresses) -> list[Plan]:
        """The forms of the product: as it is, and by a transposed copy of the factor that is slow to read."""
        A, B, _ = matrices
        wanted = CANDIDATES if self._tune else 1
        forms = [Plan(self, epilogue, matrices, at, wanted)]
        if not A.transposed and not B.transposed and A.rows * A.columns <= self._copies.size:
            forms.append(Plan(self, epilogue, matrices, at, wanted, self._copies))
        return forms

    def _saved_plan(self, forms: Sequence[Plan], sound: Callable[[Plan], bool]) -> Plan | None:
        """The plan by the saved algorithm; None, and a warning, if that cannot be used any more."""
        name = forms[0].name
        saved = self._choices.pop(name)
        plan = next((form for form in forms if form.take(saved)), None)
        if plan is not None and sound(plan):
            self._choices[name] = saved
            return plan
        warnings.warn(
            f"the algorithm that was chosen for the matrix product {name} cannot be used any more, so the last bits of "
            "results may be others",
            TuningWarning,
            stacklevel=2,
        )
        return None

    def _new_plan(self, forms: Sequence[Plan], sound: Callable[[Plan], bool], at: Addresses) -> Plan | None:
        """The plan by the predicted algorithm, or with ``tune`` by the fastest, which it notes; None without any."""
        if not self._tune:
            return forms[0] if forms[0].algorithm and sound(forms[0]) else None
        found = []
        for form in forms:
            for number in range(len(form.found)):
                form.choose(number)
                if sound(form):
                    found.append((form, number))
        if not found:
            return None
        plan = self._fastest(found, at)
        self._choices[plan.name] = plan.choice
        return plan

    def _fastest(self, candidates: Sequence[tuple[Plan, int]], at: Addresses) -> Plan:
        """The fastest of some plans, each with the number of an algorithm, set to that algorithm.

        Each is launched several times in a graph, as in a step, without waiting for the host. Overwriting the workspace
        before each launch keeps the cache from holding all of its data; the time for that is subtracted.
        """
        if len(candidates) == 1:
            return candidates[0][0]

        def launches(plan: Plan | None) -> None:
            for _ in range(LAUNCHES):
                self.workspace.fill(0)
                if plan is not None:
                    plan.launch(*at, self._stream().ptr)

        graphs = [self.backend.capture(lambda: launches(None))]
        for plan, number in candidates:
            plan.choose(number)
            graphs.append(self.backend.capture(functools.partial(launches, plan)))
        rounds = [[self.backend.milliseconds(graph.launch) for graph in graphs] for _ in range(ROUNDS)]
        nothing, *medians = (statistics.median(times) for times in zip(*rounds, strict=True))
        times = [median - nothing for median in medians]
        best = min(range(len(times)), key=times.__getitem__)
        if times[0] <= MARGIN * times[best]:
            best = 0
        plan, number = candidates[best]
        plan.choose(number)
        return plan

    def _shows_nan(self, plan: Plan, out: Array, at: Addresses) -> bool:
        """Whether a bias of NaN makes all results NaN; overwrites ``out`` and waits for it.

        No documentation says that ReLU gives NaN for NaN, as it does here: for some instructions the larger of NaN and
        0 is 0, which would hide a network that has gone wrong. And some versions left out the bias of some elements.
        """
        nan = self.backend.asarray(np.full(out.shape[1], np.nan, self.dtype))
        plan.launch(at[0], at[1], at[2], nan.data.ptr, self._stream().ptr)
        return bool(np.isnan(self.backend.to_numpy(out)).all())

    def _adds_all(self, plan: Plan, dy: Array, db: Array, at: Addresses) -> bool:
        """Whether ones add up to their number; overwrites the results and waits for them."""
        if not (dy.flags.c_contiguous or dy.flags.f_contiguous):
            return False
        ones = self.backend.empty(dy.shape, self.dtype)
        ones.fill(1)
        plan.launch(ones.data.ptr, at[1], at[2], at[3], self._stream().ptr)
        with np.errstate(over="ignore"):  # float16 goes to 65504
            return bool((self.backend.to_numpy(db) == np.array(len(dy)).astype(self.dtype)).all())


class Matrix(NamedTuple):
    """An array as cuBLASLt sees it: in columns, ``stride`` elements apart.

    It sees the transpose of the array; with ``transposed`` it sees the array itself, and must transpose it.
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


def product_name(compute: str, epilogue: str, matrices: Sequence[Matrix], at: Addresses) -> str:
    """A name of all that the choice of an algorithm depends on."""
    shapes = (f"{m.rows}x{m.columns}/{m.stride}{'T' if m.transposed else 'N'}" for m in matrices)
    return " ".join([compute, epilogue, *shapes, *map(str, alignments(at))])


def alignments(at: Addresses) -> list[int]:
    """The alignment of each address, in bytes."""
    return [min(ALIGNMENT, address & -address) if address else ALIGNMENT for address in at]


def warn_of_others(saved: Mapping[str, Any], why: str) -> None:
    """Warn that saved choices are for another library or device, if there are any choices."""
    if saved["algorithms"]:
        warnings.warn(
            f"the algorithms of matrix products were chosen with {saved['library']} on {saved['device']}, and {why}: "
            "they are not used, so the last bits of results may be others",
            TuningWarning,
            stacklevel=4,
        )


class Plan:
    """D = op(A) op(B) and its epilogue: a request to cuBLASLt, and the algorithms that its heuristic finds for it.

    The plan holds for all addresses that are aligned as ``at``. ``algorithm`` is the address of the algorithm in use,
    at first the first of up to ``wanted``; 0 if there is none. With ``copies``, an array on the device, every launch
    first writes a transposed copy of A there, and reads that.
    """

    def __init__(
        self,
        products: LtProducts,
        epilogue: str,
        matrices: tuple[Matrix, Matrix, Matrix],
        at: Addresses,
        wanted: int = 1,
        copies: Array = None,
    ) -> None:
        (lt, compute_types, data_types), dtype = products.library, products.dtype
        compute = COMPUTE[dtype.name, products.precision]
        scale = np.dtype(np.float64 if compute == "COMPUTE_64F" else np.float32)  # the type of alpha and beta
        compute_type = getattr(compute_types, compute)
        scale_type, stored = (getattr(data_types, STORED[kind.name]) for kind in (scale, dtype))
        self.name = product_name(compute, epilogue, matrices, at)
        self.transpose: Transpose | None = None
        if copies is not None:
            self.transpose = Transpose(products.backend, matrices[0], copies)
            matrices, at = (self.transpose.to, *matrices[1:]), (copies.data.ptr, *at[1:])

        self.operation = owned(self, lt.matmul_desc_create(compute_type, scale_type), lt.matmul_desc_destroy)
        self.layouts = [
            owned(self, lt.matrix_layout_create(stored, m.rows, m.columns, m.stride), lt.matrix_layout_destroy)
            for m in matrices
        ]
        preference = owned(self, lt.matmul_preference_create(), lt.matmul_preference_destroy)
        of_operation, of_preference = lt.MatmulDescAttribute, lt.MatmulPreferenceAttribute
        attributes = {
            of_operation.TRANSA: matrices[0].transposed,  # CUBLAS_OP_N is 0, CUBLAS_OP_T is 1
            of_operation.TRANSB: matrices[1].transposed,
            of_operation.EPILOGUE: getattr(lt.Epilogue, epilogue),
            of_operation.BIAS_POINTER: at[3],
        }
        set_all(lt.matmul_desc_set_attribute, self.operation, attributes, lt.get_matmul_desc_attribute_dtype)
        a, b, d, vector = alignments(at)
        attributes = {
            of_preference.MAX_WORKSPACE_BYTES: products.workspace.nbytes,
            of_preference.MIN_ALIGNMENT_A_BYTES: a,
            of_preference.MIN_ALIGNMENT_B_BYTES: b,
            of_preference.MIN_ALIGNMENT_C_BYTES: d,
            of_preference.MIN_ALIGNMENT_D_BYTES: min(d, vector),  # the vector has no attribute of its own
        }
        set_all(lt.matmul_preference_set_attribute, preference, attributes, lt.get_matmul_preference_attribute_dtype)
        self.found, count = np.zeros(wanted, RESULT), np.zeros(1, np.int32)
        self.question = (products.handle, self.operation, *self.layouts, self.layouts[2])
        places = int(self.found.ctypes.data), int(count.ctypes.data)
        try:
            lt.matmul_algo_get_heuristic(*self.question, preference, wanted, *places)
        except lt.cuBLASLtError:  # its only way to say that there is none
            count[0] = 0
        self.found = self.found[: count[0]][self.found["state"][: count[0]] == 0]
        self.number = self.algorithm = 0
        if len(self.found):
            self.choose(0)

        self.numbers = np.array([1, 0], scale)  # alpha and beta
        self.vector, self.vector_at = np.zeros(1, np.int64), at[3]
        alpha, work = int(self.numbers.ctypes.data), (products.workspace.data.ptr, products.workspace.nbytes)
        self.lt, self.matmul, self.set_attribute = lt, lt.matmul, lt.matmul_desc_set_attribute
        self.bias_pointer, self.vector_place = of_operation.BIAS_POINTER, int(self.vector.ctypes.data)
        self.before, self.between, self.after = (products.handle, self.operation, alpha), alpha + scale.itemsize, work

    @property
    def choice(self) -> str:
        """The algorithm as text: :data:`CHOICE`."""
        algorithm: bytes = self.found["algorithm"][self.number].tobytes()
        return (COPY if self.transpose else "") + algorithm.hex()

    def choose(self, number: int) -> None:
        """From now on launch algorithm ``number`` of those found."""
        self.number = number
        self.algorithm = int(self.found.ctypes.data) + number * RESULT.itemsize

    def take(self, choice: str) -> bool:
        """Launch this algorithm from now on; False if it is for another kind of plan, or cuBLASLt does not have it."""
        algorithm = choice.removeprefix(COPY)
        if (algorithm != choice) is not (self.transpose is not None):
            return False
        found, checked = np.zeros(1, RESULT), np.zeros(1, RESULT)
        found["algorithm"][0] = np.frombuffer(bytes.fromhex(algorithm), np.uint64)
        try:
            self.lt.matmul_algo_check(*self.question, found.ctypes.data, checked.ctypes.data)
        except self.lt.cuBLASLtError:
            return False
        if checked["state"][0] != 0 or checked["workspace"][0] > self.after[1]:
            return False
        self.found = found
        self.choose(0)
        return True

    def launch(self, a_at: int, b_at: int, d_at: int, vector_at: int, stream: int) -> None:
        """Launch on the current stream; shapes and alignments must be those of the plan."""
        if vector_at != self.vector_at:
            self.vector[0] = self.vector_at = vector_at
            self.set_attribute(self.operation, self.bias_pointer, self.vector_place, 8)
        if self.transpose is not None:
            a_at = self.transpose(a_at)
        a, b, d = self.layouts
        self.matmul(
            *(*self.before, a_at, a, b_at, b, self.between),
            *(d_at, d, d_at, d, self.algorithm, *self.after, stream),
        )


class Transpose:
    """Writes the transpose of a matrix that cuBLASLt reads untransposed to ``out``; ``to`` is the result."""

    def __init__(self, backend: CudaBackend, matrix: Matrix, out: Array) -> None:
        self.to = Matrix(matrix.columns, matrix.rows, matrix.columns, True)
        self.kernel = cuda_kernel(backend, source_of(out.dtype.name, "transpose.cu"), "transpose")
        tiles = -(-matrix.rows // TILE) * -(-matrix.columns // TILE)
        self.grid, self.at, self.out = (tiles,), int(out.data.ptr), out
        # As the kernel sees it, by rows.
        self.shape = np.int64(matrix.columns), np.int64(matrix.rows), np.int64(matrix.stride)

    def __call__(self, at: int) -> int:
        """Launch on the current stream; returns the address of the copy."""
        self.kernel(self.grid, (THREADS,), (np.uint64(at), self.out, *self.shape))
        return self.at


def owned(owner: Any, descriptor: int, destroy: Callable[[int], None]) -> int:
    """``descriptor``, to be destroyed when ``owner`` is garbage-collected."""
    # But not at the end of the process, where the order of destruction is unknown.
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
