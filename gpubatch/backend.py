"""Where arrays live: NumPy on the CPU or CuPy on a CUDA device. The only module that names CuPy.

A backend is chosen once, at the edge, by :func:`get_backend`; below it, code passes the object on, or asks
:func:`array_namespace` which library the arrays in hand belong to. There is no global current backend.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import importlib.util
import os
import re
import threading
import types
import warnings
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np

from gpubatch.errors import (
    ArgumentError,
    BackendFallbackWarning,
    BackendUnavailableError,
    CaptureError,
    DeviceMismatchError,
    DTypeError,
    NonFiniteError,
    check_choice,
    nearest,
)
from gpubatch.main_memory import Memory, main_memory

__all__ = [
    "Array",
    "Backend",
    "Memory",
    "array_namespace",
    "available_backends",
    "backend_of",
    "compute_dtype",
    "float_dtype",
    "get_backend",
]

Array: TypeAlias = Any  # numpy.ndarray or cupy.ndarray: no type that both share exists
Shape: TypeAlias = tuple[int, ...]

GENERATOR_THREADS = 1 << 15  # of a CuPy generator: each makes a part of the numbers from 64 bytes of state

# What launchers call the place of a process among those that they started on the same machine: Open MPI, MPICH and
# Intel MPI, Slurm, torchrun and others.
LOCAL_RANKS = "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID", "LOCAL_RANK"

INSTALL_CUPY = "pip install 'gpubatch[cuda13]' (CUDA 13) or 'gpubatch[cuda12]' (CUDA 12)."


class Backend(ABC):
    """A device and the arrays that live on it.

    name: "cpu" or "cuda".
    device: a name to print.
    spec: the argument of :func:`get_backend` that returns this backend again, such as "cuda:0".
    xp: its Array-API namespace.
    reason: why it was chosen.
    generator_bytes: memory of a :meth:`generator` on the device.

    >>> backend = gb.get_backend("cpu")
    >>> backend.to_numpy(backend.asarray([1, 2]))
    array([1, 2])
    """

    name: str
    spec: str
    reason: str
    generator_bytes = 0

    @property
    @abstractmethod
    def device(self) -> str:
        """The device in words."""

    @property
    @abstractmethod
    def xp(self) -> Any:
        """The Array-API namespace: ``array_api_compat.numpy`` or ``array_api_compat.cupy``."""

    @abstractmethod
    def asarray(self, x: Any, dtype: Any = None) -> Array:
        """``x`` as an array on this device. This call is the way to copy a NumPy array to a GPU."""

    def to_numpy(self, x: Array) -> np.ndarray:
        """``x`` as a NumPy array; one on a GPU is copied."""
        return to_numpy(x)

    @abstractmethod
    def empty(self, shape: int | Shape, dtype: Any) -> Array:
        """A C-contiguous array with uninitialised values."""

    @abstractmethod
    def zeros(self, shape: int | Shape, dtype: Any) -> Array:
        """A C-contiguous array of zeros."""

    @abstractmethod
    def generator(self, seed: int, epoch: int, number: int, part: int | None = None) -> Any:
        """The library's random ``Generator`` for one batch, or a part of one: a function of the integers alone."""

    @abstractmethod
    def owns(self, x: Any) -> bool:
        """Whether ``x`` is an array on this device."""

    @abstractmethod
    def memory(self) -> Memory:
        """Total and available memory in bytes."""

    @abstractmethod
    def synchronize(self) -> None:
        """Wait for all work that this process started on the device through gpubatch, from any thread.

        Also waits for the current and the default stream, whoever uses them. Does not wait for the streams of other
        libraries, nor for captures in other threads, which go on undisturbed: work that is recorded has not started.
        """

    @abstractmethod
    def free_unused(self) -> None:
        """Return cached memory that no array uses to the device."""

    @abstractmethod
    def scope(self) -> contextlib.AbstractContextManager[Any]:
        """Make this the current device inside a ``with``."""

    @abstractmethod
    def own_stream(self) -> contextlib.AbstractContextManager[Any]:
        """Inside a ``with``, work on this device goes to a stream that no other thread or library uses.

        That work starts after the work that the caller's stream already has; the caller's stream goes on after it. The
        host waits for neither. Each thread has one such stream and uses it again in the next ``with``; a nested
        ``with`` changes nothing.
        """

    def check(self, name: str, x: Any) -> Array:
        """``x``, if it is an array on this device; otherwise an error that names the argument and the remedy."""
        if self.owns(x):
            return unmasked(name, x)
        raise DeviceMismatchError(
            f"{name} must be an array on {self.spec!r}, got {describe(x)}; move it there with "
            f"get_backend({self.spec!r}).asarray(...)"
        )

    def __repr__(self) -> str:
        return f"<Backend {self.spec}: {self.device}>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Backend) and self.spec == other.spec

    def __hash__(self) -> int:
        return hash(self.spec)


class CpuBackend(Backend):
    """NumPy arrays in main memory."""

    name = device = spec = "cpu"

    def __init__(self, reason: str) -> None:
        self.reason = reason

    @property
    def xp(self) -> Any:
        import array_api_compat.numpy as xp  # imported on first use: it costs as much as NumPy

        return xp

    def asarray(self, x: Any, dtype: Any = None) -> Array:
        if is_cupy(x):
            raise DeviceMismatchError(f"{describe(x)} is on a GPU; copy it with Backend.to_numpy(...) first")
        if is_foreign(x):
            x = self.check("x", from_dlpack(x))
        return np.asarray(unmasked("x", x), dtype=dtype)

    def empty(self, shape: int | Shape, dtype: Any) -> Array:
        return np.empty(shape, dtype)

    def zeros(self, shape: int | Shape, dtype: Any) -> Array:
        return np.zeros(shape, dtype)

    def generator(self, seed: int, epoch: int, number: int, part: int | None = None) -> np.random.Generator:
        # The orders of samples have the same key, and zero in the third word of the counter, which batches count in.
        within = 0 if part is None else part + 1
        key, counter = np.array([seed, epoch], np.uint64), np.array([0, within, number + 1, 0], np.uint64)
        return np.random.Generator(np.random.Philox(key=key, counter=counter))

    def owns(self, x: Any) -> bool:
        return isinstance(x, np.ndarray)

    def memory(self) -> Memory:
        return main_memory()

    def synchronize(self) -> None:
        """Does nothing: NumPy returns when the work is done."""

    def free_unused(self) -> None:
        """Does nothing: NumPy frees large arrays at once."""

    def scope(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def own_stream(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()


class CudaBackend(Backend):
    """CuPy arrays on one CUDA device."""

    name = "cuda"
    generator_bytes = 64 * GENERATOR_THREADS

    def __init__(self, cupy: Any, index: int, reason: str) -> None:
        self.cupy, self.index, self.reason = cupy, index, reason
        self.spec = f"cuda:{index}"

    @property
    def device(self) -> str:
        """The spec and the card's name; the name is read on request because array_namespace makes many backends."""
        name = self.cupy.cuda.runtime.getDeviceProperties(self.index)["name"].decode()
        return f"{self.spec} ({name})"

    @property
    def xp(self) -> Any:
        import array_api_compat.cupy as xp

        return xp

    def asarray(self, x: Any, dtype: Any = None) -> Array:
        if is_foreign(x):
            with self.scope():
                x = from_dlpack(x)
        if is_cupy(x):
            self.check("x", x)
        unmasked("x", x)
        return self._made(lambda: self.cupy.asarray(x, dtype=dtype))

    def empty(self, shape: int | Shape, dtype: Any) -> Array:
        return self._made(lambda: self.cupy.empty(shape, dtype))

    def zeros(self, shape: int | Shape, dtype: Any) -> Array:
        return self._made(lambda: self.cupy.zeros(shape, dtype))

    def _made(self, make: Callable[[], Array]) -> Array:
        """Call ``make``; if the pool's limit refuses memory, free cached blocks and try once more.

        CuPy does the same when the device is full, but not at a limit. Blocks that other streams cached are freed too.
        """
        with self.scope():
            try:
                return make()
            except MemoryError:
                if not self._limit():
                    raise
            self.free_unused()
            return make()

    def generator(self, seed: int, epoch: int, number: int, part: int | None = None) -> Any:
        # A zero behind the others would change nothing.
        random, within = self.cupy.random, [] if part is None else [part + 1]
        sequence = np.random.SeedSequence([seed, epoch, number, *within])
        with self.scope():
            return random.Generator(random.Philox4x3210(sequence, size=GENERATOR_THREADS))

    def owns(self, x: Any) -> bool:
        return is_cupy(x) and x.device.id == self.index

    def memory(self) -> Memory:
        with self.scope():
            free, total = self.cupy.cuda.runtime.memGetInfo()
            pool = self.pool()
            available = free if pool is None else free + pool.free_bytes()
            if limit := self._limit():
                available = min(available, limit - pool.used_bytes())
            return Memory(total, max(available, 0))

    def pool(self) -> Any:
        """The memory pool behind CuPy's current allocator, or None if that allocator has no pool.

        It need not be CuPy's default pool, and each of the two knows only its own blocks.
        """
        pool = getattr(self.cupy.cuda.get_allocator(), "__self__", None)
        return pool if hasattr(pool, "free_all_blocks") else None

    def _limit(self) -> int:
        """The pool's limit on the current device in bytes; 0 if there is none.

        An asynchronous pool has none: its "limit" is the size of its cache.
        """
        pool = self.pool()
        return int(pool.get_limit()) if isinstance(pool, self.cupy.cuda.MemoryPool) else 0

    @contextlib.contextmanager
    def pooled(self) -> Iterator[Any]:
        """Inside a ``with``, this thread allocates from a pool that reports its size."""
        pool = self.pool()
        if isinstance(pool, self.cupy.cuda.MemoryPool):
            yield pool
            return
        pool = self.cupy.get_default_memory_pool()
        with self.cupy.cuda.using_allocator(pool.malloc):
            yield pool

    def synchronize(self) -> None:
        # Stream by stream: while any stream of a device is being captured, in whatever mode, CUDA refuses to
        # synchronise the device and invalidates the capture. None of these streams is ever captured, see capture.
        with self.scope():
            streams = [self.current_stream(), self.cupy.cuda.Stream.null, *_streams(self.cupy, self.index).alive()]
            for stream in dict.fromkeys(streams):
                stream.synchronize()

    def free_unused(self) -> None:
        self.synchronize()
        with self.scope():
            pool, default = self.pool(), self.cupy.get_default_memory_pool()
            for each in (default,) if pool in (None, default) else (default, pool):
                each.free_all_blocks()

    def compile(self, source: str, name: str) -> Any:
        """The kernel ``name`` of a CUDA source, compiled for this device; CuPy caches it on disk."""
        with self.scope():
            return self.cupy.RawModule(code=source, options=("--std=c++17",)).get_function(name)

    def stream(self) -> Any:
        """A new CUDA stream that does not synchronise with the default stream."""
        with self.scope():
            return _streams(self.cupy, self.index).add(self.cupy.cuda.Stream(non_blocking=True))

    def current_stream(self) -> Any:
        """The calling thread's current CUDA stream."""
        with self.scope():
            return self.cupy.cuda.get_current_stream()

    @contextlib.contextmanager
    def on_stream(self, handle: int) -> Iterator[None]:
        """Inside a ``with``, work goes to the stream of another library that has this CUDA handle; 0 is the default."""
        with self.scope():
            kind = self.cupy.cuda.Stream
            if not handle:
                stream = kind.null
            elif hasattr(kind, "from_external"):  # since CuPy 14
                stream = kind.from_external(types.SimpleNamespace(__cuda_stream__=lambda: (0, handle)))
            else:
                stream = self.cupy.cuda.ExternalStream(handle, self.index)
            with stream:
                yield

    def event(self) -> Any:
        """A new CUDA event without timing; a thread that waits for it sleeps."""
        with self.scope():
            return self.cupy.cuda.Event(block=True, disable_timing=True)

    def capture(self, work: Callable[[], None]) -> Any:
        """Record the work that ``work`` enqueues on the current stream as a CUDA graph. Only ``launch()`` runs it.

        The graph reads and writes the arrays that ``work`` used, at their addresses: keep them as long as the graph.
        ``work`` must not allocate memory (:class:`CaptureError`), wait, or copy from or to the host. It must have
        launched its kernels before, because CUDA cannot load a module during a capture. For anything else that CUDA
        refuses, CuPy raises. An exception in ``work`` ends the capture and leaves nothing of it. Other threads may use
        the device meanwhile, and capture too.
        """
        with self.scope(), _no_collections:
            # A private stream: nobody else can wait for it, record an event on it or enqueue work on it, which a
            # capture forbids. It does not synchronise with the default stream, which cannot be captured.
            stream = self.cupy.cuda.Stream(non_blocking=True)
            with _streams(self.cupy, self.index).as_own(stream), stream:
                # Thread-local mode: other threads may do what this one must not, such as allocate or free memory.
                stream.begin_capture(self.cupy.cuda.runtime.streamCaptureModeThreadLocal)
                try:
                    with self.cupy.cuda.using_allocator(_refuse_memory):
                        work()
                except BaseException:
                    with contextlib.suppress(Exception):  # an invalidated capture raises again
                        stream.end_capture()
                    raise
                return stream.end_capture()

    def milliseconds(self, work: Callable[[], Any]) -> float:
        """Milliseconds that the current stream takes for the work that ``work`` enqueues; waits for it."""
        with self.scope():
            stream = self.current_stream()
            start, end = (self.cupy.cuda.Event(block=True, disable_timing=False) for _ in range(2))
            stream.record(start)
            work()
            stream.record(end)
            end.synchronize()
            return float(self.cupy.cuda.get_elapsed_time(start, end))

    def pinned(self, size: int, dtype: np.dtype[Any]) -> np.ndarray:
        """An uninitialised array of ``size`` elements in pinned host memory, from CuPy's pool."""
        with self.scope():
            return np.frombuffer(self.cupy.cuda.alloc_pinned_memory(size * dtype.itemsize), dtype, size)

    @property
    def capability(self) -> int:
        """The major number of the device's compute capability: 9 is Hopper, 10 Blackwell."""
        return int(self.cupy.cuda.Device(self.index).compute_capability[:-1])

    def nccl(self) -> Any:
        """CuPy's NCCL, which sums over devices; raises BackendUnavailableError with the remedy if there is none."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # CuPy warns of a missing library, and the error below says more
            found = self.library("cupy.cuda.nccl")
        if not found.available:
            raise BackendUnavailableError(
                "GPUs cannot be connected: CuPy finds no NCCL.",
                "libraries missing",
                f"pip install nvidia-nccl-cu{self.cupy.cuda.runtime.runtimeGetVersion() // 1000}.",
            )
        return found

    def library(self, name: str) -> Any:
        """A Python module that works on CuPy's device; imported on first use, so that tests can replace it."""
        return importlib.import_module(name)

    def scope(self) -> contextlib.AbstractContextManager[Any]:
        device: contextlib.AbstractContextManager[Any] = self.cupy.cuda.Device(self.index)
        return device

    @contextlib.contextmanager
    def own_stream(self) -> Iterator[None]:
        with self.scope():
            own, caller = _streams(self.cupy, self.index).own(self.stream), self.current_stream()
            if own == caller:
                yield
                return
            self._let_wait(own, caller)
            try:
                with own:
                    yield
            finally:
                self._let_wait(caller, own)

    def _let_wait(self, stream: Any, other: Any) -> None:
        """Make later work of ``stream`` wait for the work that ``other`` has now."""
        event = self.event()
        other.record(event)
        stream.wait_event(event)


class _Streams:
    """The streams of a device, and each thread's own stream."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # reentrant: a finaliser may make a stream while one is being added
        self._alive: weakref.WeakSet[Any] = weakref.WeakSet()
        self._thread = threading.local()

    def add(self, stream: Any) -> Any:
        """Remember ``stream``, and return it."""
        with self._lock:
            self._alive.add(stream)
        return stream

    def alive(self) -> list[Any]:
        """The streams that are still referenced."""
        with self._lock:
            return list(self._alive)

    def own(self, make: Callable[[], Any]) -> Any:
        """This thread's own stream, made on first use.

        One stream per thread, because CuPy's pool reuses a block only on the stream that allocated it.
        """
        if not hasattr(self._thread, "own"):
            self._thread.own = make()
        return self._thread.own

    @contextlib.contextmanager
    def as_own(self, stream: Any) -> Iterator[None]:
        """Inside a ``with``, ``stream`` is this thread's own."""
        before = vars(self._thread).get("own")
        self._thread.own = stream
        try:
            yield
        finally:
            if before is None:
                del self._thread.own
            else:
                self._thread.own = before


@functools.cache
def _streams(cupy: Any, index: int) -> _Streams:
    """The streams of a device."""
    return _Streams()


def _refuse_memory(size: int) -> Any:
    """The allocator during a capture: the pool would reuse such memory while the graph still needs it."""
    raise CaptureError(f"{size} bytes of memory were asked for during a capture; allocate before it")


class _NoCollections:
    """Disables the garbage collector inside a ``with``: a finaliser might call what a capture forbids.

    The collector belongs to the process, so the last thread to leave restores it.
    """

    def __init__(self) -> None:
        self._lock, self._inside, self._enabled = threading.RLock(), 0, False

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._enabled = gc.isenabled()
                gc.disable()
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside and self._enabled:
                gc.enable()


_no_collections = _NoCollections()


# --- choosing -----------------------------------------------------------------------------------------------------


def get_backend(spec: str | Backend = "auto", fallback: str | None = None) -> Backend:
    """The backend that ``spec`` names.

    spec: "cpu", "cuda", "cuda:1", or "auto": the value of ``GPUBATCH_BACKEND`` if that is set, else a CUDA device if
        one can be used, else the CPU. A :class:`Backend` is returned as it is. "cuda" and "auto" take device 0; of
        the processes that ``mpiexec``, ``srun`` or ``torchrun`` starts on a machine, each takes the next one.
    fallback: "cpu" returns the CPU with one ``BackendFallbackWarning`` if CUDA cannot be used; None, the default,
        takes the value of ``GPUBATCH_FALLBACK``, and without that raises.

    Raises :class:`BackendUnavailableError` with the cause and the remedy.

    >>> gb.get_backend("cpu").zeros((2, 3), "float32").shape
    (2, 3)
    """
    if isinstance(spec, Backend):
        return spec
    by_argument = fallback is not None
    fallback = os.environ.get("GPUBATCH_FALLBACK") or None if fallback is None else fallback
    if fallback is not None:
        check_choice("fallback" if by_argument else "GPUBATCH_FALLBACK", fallback, ["cpu"])
    if spec == "auto":
        chosen = os.environ.get("GPUBATCH_BACKEND") or "auto"
        if chosen == "auto":
            return _auto()
        return _named(chosen, fallback, "GPUBATCH_BACKEND", f"GPUBATCH_BACKEND={chosen}")
    return _named(spec, fallback, "backend", f"{spec!r} was asked for")


def available_backends() -> tuple[str, ...]:
    """The specs of the backends that can be used here, the CPU first.

    >>> "cpu" in gb.available_backends()
    True
    """
    try:
        count = load_cupy().cuda.runtime.getDeviceCount()
    except BackendUnavailableError:
        count = 0
    return ("cpu", *(f"cuda:{index}" for index in range(count)))


def _auto() -> Backend:
    try:
        return _cuda(None, "a CUDA device can be used")
    except BackendUnavailableError as error:
        return CpuBackend(f"CUDA cannot be used: {error.cause}")


def _named(spec: Any, fallback: str | None, argument: str, reason: str) -> Backend:
    if spec == "cpu":
        return CpuBackend(reason)
    match = re.fullmatch(r"cuda(?::(\d+))?", spec) if isinstance(spec, str) else None
    if match is None:
        raise ArgumentError(
            f"{argument} must be 'auto', 'cpu', 'cuda', 'cuda:N' or a Backend, got {spec!r}"
            f"{nearest(spec, ['cpu', 'cuda'])}"
        )
    try:
        return _cuda(int(match[1]) if match[1] else None, reason)
    except BackendUnavailableError as error:
        if fallback is None:
            raise
        # One fixed place in the source: Python's default filter then shows the warning once per process.
        warnings.warn(f"using the CPU instead of {spec!r}. {error}", BackendFallbackWarning, stacklevel=1)
        return CpuBackend(f"fallback from {spec!r}: {error.cause}")


def _cuda(index: int | None, reason: str) -> Backend:
    cupy = load_cupy()
    count = cupy.cuda.runtime.getDeviceCount()
    if index is None:
        index = local_rank() % count
    if index >= count:
        raise BackendUnavailableError(
            f"'cuda:{index}' cannot be used: no device of that number, this machine has {count}.",
            "no device",
            f"use 'cuda:0' to 'cuda:{count - 1}', or look at CUDA_VISIBLE_DEVICES.",
        )
    return CudaBackend(cupy, index, reason)


def local_rank() -> int:
    """The place of this process among those that a launcher started on the same machine; 0 without a launcher."""
    found = (os.environ.get(name, "") for name in LOCAL_RANKS)
    return next((int(place) for place in found if place.isdecimal()), 0)


def load_cupy() -> Any:
    """CuPy, after a tiny computation on a device has worked; otherwise an error with the cause and the remedy."""
    found = _probe_cupy()
    if isinstance(found, BackendUnavailableError):
        raise BackendUnavailableError(found.message, found.cause, found.remedy) from found.__cause__
    return found


@functools.cache
def _probe_cupy() -> Any:
    """CuPy, or the error that says why it cannot be used; tried once per process, because a failing import is slow."""
    if importlib.util.find_spec("cupy") is None:
        return BackendUnavailableError("'cuda' cannot be used: CuPy is not installed.", "not installed", INSTALL_CUPY)
    try:
        import cupy
    except Exception as error:  # RuntimeError and OSError too, if CuPy cannot load a library
        return _libraries_missing(error)
    runtime = cupy.cuda.runtime
    try:
        driver, needed = runtime.driverGetVersion(), runtime.runtimeGetVersion()
    except Exception as error:
        return _libraries_missing(error)
    try:
        if runtime.getDeviceCount() == 0:
            return _no_device(driver, needed, None)
        with warnings.catch_warnings():
            warnings.simplefilter("default")  # a warning while a library loads does not make CuPy unusable
            probe = cupy.arange(4, dtype=cupy.float32)
            if float((probe @ probe) + 1) != 15.0:
                raise RuntimeError("the product of two small arrays came out wrong")
    except runtime.CUDARuntimeError as error:
        return _no_device(driver, needed, error)
    except Exception as error:
        return _libraries_missing(error)
    return cupy


def _libraries_missing(error: BaseException) -> BackendUnavailableError:
    first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return _caused(
        error,
        f"'cuda' cannot be used: CuPy is installed but CUDA libraries are missing or do not load ({first_line}).",
        "libraries missing",
        "install the CUDA toolkit that CuPy was built for, or its wheels: pip install 'cupy-cuda13x[ctk]' (or 12x).",
    )


def _no_device(driver: int, needed: int, error: BaseException | None) -> BackendUnavailableError:
    detail = f" ({error})" if error is not None else ""
    if 0 < driver < needed and "InsufficientDriver" in str(error):
        return _caused(
            error,
            f"'cuda' cannot be used: the NVIDIA driver is too old, it serves CUDA {_version(driver)} "
            f"and CuPy was built for {_version(needed)}.",
            "driver too old",
            f"update the driver, or install the CuPy of CUDA {driver // 1000}: cupy-cuda{driver // 1000}x.",
        )
    found = (
        "no NVIDIA driver was found" if driver == 0 else f"the driver (CUDA {_version(driver)}) shows no usable device"
    )
    return _caused(
        error,
        f"'cuda' cannot be used: no device, {found}{detail}.",
        "no device",
        "check nvidia-smi and CUDA_VISIBLE_DEVICES (in a container: run it with its GPUs), or use backend='cpu' "
        "(--backend cpu).",
    )


def _caused(cause: BaseException | None, *words: str) -> BackendUnavailableError:
    error = BackendUnavailableError(*words)
    error.__cause__ = cause
    return error


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


# --- looking at arrays ---------------------------------------------------------------------------------------------


def unmasked(name: str, x: Any) -> Any:
    """``x``, which must not be a masked array with a masked element: the value below a mask means nothing."""
    if type(x) is np.ndarray or not isinstance(x, np.ndarray) or not isinstance(x, np.ma.MaskedArray):
        return x
    if count := int(np.ma.getmaskarray(x).sum()):
        raise NonFiniteError(
            f"{name} must have a value everywhere, but {count} of its {x.size} elements are masked; fill them with "
            f"{name}.filled(...), or leave out their samples"
        )
    return x


def is_cupy(x: Any) -> bool:
    """Whether ``x`` is a CuPy array, without importing CuPy."""
    kind = type(x)
    return kind.__name__ == "ndarray" and kind.__module__.partition(".")[0] == "cupy"


def array_namespace(*arrays: Array) -> Any:
    """The Array-API namespace of ``arrays``; arrays on two devices are an error.

    >>> gb.array_namespace(np.zeros(3)).sqrt(np.array([4.0]))
    array([2.])
    """
    return backend_of(*arrays).xp


def backend_of(*arrays: Array) -> Backend:
    """The backend of ``arrays``; arrays on two devices are an error."""
    if not arrays:
        raise ArgumentError("arrays must hold at least one array, got none")
    homes = [_home(x) for x in arrays]
    if len(set(homes)) > 1:
        other = next(i for i, home in enumerate(homes) if home != homes[0])
        raise DeviceMismatchError(
            f"arrays of two devices: argument 0 is {describe(arrays[0])}, argument {other} is "
            f"{describe(arrays[other])}; copy one of them with Backend.asarray or Backend.to_numpy"
        )
    return _named(homes[0], None, "backend", "the arrays live there")


def _home(x: Any) -> str:
    if isinstance(x, np.ndarray):
        unmasked("the array", x)
        return "cpu"
    if is_cupy(x):
        return f"cuda:{x.device.id}"
    raise DTypeError(f"expected a NumPy or CuPy array, got {describe(x)}; convert it with Backend.asarray")


def to_numpy(x: Array) -> np.ndarray:
    """``x`` as a NumPy array; one on a GPU is copied after the work of the current stream there."""
    if not is_cupy(x):
        return np.asarray(x)
    with x.device:
        return x.get()  # type: ignore[no-any-return]


def describe(x: Any) -> str:
    """An array in words, for error messages."""
    if isinstance(x, np.ndarray):
        return f"a NumPy array of shape {x.shape} and dtype {x.dtype}"
    if is_cupy(x):
        return f"a CuPy array of shape {x.shape} and dtype {x.dtype} on cuda:{x.device.id}"
    return f"a {type(x).__module__}.{type(x).__qualname__}".replace("a builtins.", "a ")


def find_overlap(arrays: Sequence[Array]) -> tuple[int, int] | None:
    """The indices of two arrays that share memory, (i, i) if array i overlaps itself; None if there is no overlap.

    No address is both the host's and a device's, so arrays may be of several devices.
    """
    spans = []
    for i, x in enumerate(arrays):
        steps = [(n - 1) * stride for n, stride in zip(x.shape, x.strides, strict=True) if n > 1]
        if x.size and _overlaps_itself(x):
            return i, i
        if x.size:
            spans.append((_address(x) + sum(s for s in steps if s < 0), i, sum(map(abs, steps)) + x.itemsize))
    active: list[tuple[int, int]] = []  # (end, index) of those that reach as far as the next one's start
    for start, i, size in sorted(spans):
        active = [(end, j) for end, j in active if end > start]
        for _, j in active:
            if np.shares_memory(_in_place_of(arrays[i]), _in_place_of(arrays[j])):
                return j, i
        active.append((start + size, i))
    return None


def _overlaps_itself(x: Array) -> bool:
    """Whether two elements have one address, as in a broadcast array."""
    extent = x.itemsize
    for stride, n in sorted((abs(stride), n) for n, stride in zip(x.shape, x.strides, strict=True) if n > 1):
        if stride < extent:
            return True
        extent += (n - 1) * stride
    return False


def _address(x: Array) -> int:
    return int(x.data.ptr if is_cupy(x) else x.__array_interface__["data"][0])


def _in_place_of(x: Array) -> np.ndarray:
    """A NumPy array with the addresses of ``x``, to compare and never to read."""
    if isinstance(x, np.ndarray):
        return x
    described = {"shape": x.shape, "strides": x.strides, "typestr": x.dtype.str, "data": (_address(x), True)}
    return np.asarray(types.SimpleNamespace(__array_interface__={**described, "version": 3}))


def is_foreign(x: Any) -> bool:
    """Whether ``x`` is an array of another library that speaks DLPack."""
    return not isinstance(x, np.ndarray) and not is_cupy(x) and hasattr(x, "__dlpack__")


def is_immutable(x: Any) -> bool:
    """Whether ``x`` is a JAX array: JAX's DLPack capsule lacks the read-only flag, and CuPy ignores it."""
    return type(x).__module__.partition(".")[0] in ("jax", "jaxlib")


def from_dlpack(x: Any) -> Array:
    """A view of ``x``, an array of another library, through DLPack: CuPy's on a GPU, otherwise NumPy's.

    On a GPU the current stream waits for the work that makes the values.
    """
    on_gpu = x.__dlpack_device__()[0] in (2, 13)  # kDLCUDA, kDLCUDAManaged
    try:
        return load_cupy().from_dlpack(x) if on_gpu else np.from_dlpack(x)
    except Exception as error:  # every library raises its own: BufferError, TypeError, RuntimeError
        raise DeviceMismatchError(f"cannot take {describe(x)} without a copy: {error}") from error


def float_dtype(dtype: Any, name: str = "dtype", half: bool = False) -> np.dtype[Any]:
    """``dtype`` as a NumPy dtype: float32 or float64, or with ``half`` float16.

    ``name`` is the argument's name, for the error message.
    """
    known = {name: np.dtype(name) for name in ("float32", "float64", *(["float16"] if half else []))}
    try:
        return known[np.dtype(dtype).name]
    except (TypeError, KeyError):
        raise DTypeError(f"{name} must be {' or '.join(known)}, got {dtype!r}") from None


def compute_dtype(storage: np.dtype[Any]) -> np.dtype[Any]:
    """The dtype of the arithmetic on arrays of ``storage``: float32 for float16, else the same."""
    return np.dtype(np.float32) if storage == np.float16 else storage
