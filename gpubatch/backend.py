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
import sys
import threading
import warnings
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from gpubatch.errors import (
    ArgumentError,
    BackendFallbackWarning,
    BackendUnavailableError,
    CaptureError,
    DeviceMismatchError,
    DTypeError,
    check_choice,
)

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

INSTALL_CUPY = "pip install 'gpubatch[cuda13]' (CUDA 13) or 'gpubatch[cuda12]' (CUDA 12)."


@dataclass(frozen=True)
class Memory:
    """Memory of a device in bytes: all there is for this process, and what is free for it now."""

    total: int
    available: int


class Backend(ABC):
    """A device and the arrays that live on it.

    ``name`` is "cpu" or "cuda", ``device`` a printable name, ``spec`` what :func:`get_backend` takes to find it
    again, ``xp`` its Array-API namespace, ``reason`` why it was chosen.
    """

    name: str
    spec: str
    reason: str

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
        """``x`` as an array on this device; a NumPy array is copied to a GPU because this call asks for it."""

    @abstractmethod
    def to_numpy(self, x: Array) -> np.ndarray:
        """``x`` as a NumPy array, copied from the device where it lives there."""

    @abstractmethod
    def empty(self, shape: int | Shape, dtype: Any) -> Array:
        """A C-contiguous array whose values are not set."""

    @abstractmethod
    def zeros(self, shape: int | Shape, dtype: Any) -> Array:
        """A C-contiguous array of zeros."""

    @abstractmethod
    def owns(self, x: Any) -> bool:
        """Whether ``x`` is an array on this device."""

    @abstractmethod
    def memory(self) -> Memory:
        """Total and available memory in bytes."""

    @abstractmethod
    def synchronize(self) -> None:
        """Wait until all is done that this process started on the device through gpubatch, from any thread.

        So is what the current and the default stream were given by anybody. Streams of other libraries are not waited
        for, nor is a capture in another thread, which goes on undisturbed: what it records has not been started.
        """

    @abstractmethod
    def free_unused(self) -> None:
        """Give memory back to the device that is kept only for arrays to come."""

    @abstractmethod
    def scope(self) -> contextlib.AbstractContextManager[Any]:
        """Make this the current device inside a ``with``."""

    @abstractmethod
    def own_stream(self) -> contextlib.AbstractContextManager[Any]:
        """Inside a ``with``, work on this device goes to a stream that no other thread or library uses.

        That work begins when all that the caller's stream was given before is done, and what the caller's stream is
        given afterwards begins when that work is done; the host waits for neither. Each thread has one such stream: the
        next ``with`` finds it again, and one inside the other changes nothing.
        """

    def check(self, name: str, x: Any) -> Array:
        """``x``, if it is an array on this device; otherwise an error that names the argument and the remedy."""
        if self.owns(x):
            return x
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
        import array_api_compat.numpy as xp  # as dear as numpy itself, so on first use

        return xp

    def asarray(self, x: Any, dtype: Any = None) -> Array:
        if is_cupy(x):
            raise DeviceMismatchError(f"{describe(x)} is on a GPU; copy it with Backend.to_numpy(...) first")
        if is_foreign(x):
            x = self.check("x", from_dlpack(x))
        return np.asarray(x, dtype=dtype)

    def to_numpy(self, x: Array) -> np.ndarray:
        return to_numpy(x)

    def empty(self, shape: int | Shape, dtype: Any) -> Array:
        return np.empty(shape, dtype)

    def zeros(self, shape: int | Shape, dtype: Any) -> Array:
        return np.zeros(shape, dtype)

    def owns(self, x: Any) -> bool:
        return isinstance(x, np.ndarray)

    def memory(self) -> Memory:
        return host_memory()

    def synchronize(self) -> None:
        """Nothing to wait for: NumPy returns when the work is done."""

    def free_unused(self) -> None:
        """Nothing is kept: NumPy gives large arrays back at once."""

    def scope(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def own_stream(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()


class CudaBackend(Backend):
    """CuPy arrays on one CUDA device."""

    name = "cuda"

    def __init__(self, cupy: Any, index: int, reason: str) -> None:
        self.cupy, self.index, self.reason = cupy, index, reason
        self.spec = f"cuda:{index}"

    @property
    def device(self) -> str:
        """The spec and the name of the card; asked for when it is shown, since array_namespace makes backends often."""
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
        return self._made(lambda: self.cupy.asarray(x, dtype=dtype))

    def to_numpy(self, x: Array) -> np.ndarray:
        return to_numpy(x)

    def empty(self, shape: int | Shape, dtype: Any) -> Array:
        return self._made(lambda: self.cupy.empty(shape, dtype))

    def zeros(self, shape: int | Shape, dtype: Any) -> Array:
        return self._made(lambda: self.cupy.zeros(shape, dtype))

    def _made(self, make: Callable[[], Array]) -> Array:
        """What ``make`` makes; where the pool's limit refuses memory, once more after what is unused is given back.

        CuPy does so itself where the device is full, but not for a limit; and a stream finds what others left unused.
        """
        with self.scope():
            try:
                return make()
            except MemoryError:
                if not self._limit():
                    raise
            self.free_unused()
            return make()

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
        """The pool that CuPy takes memory from now, None where the allocator that was set is no pool's.

        CuPy's default pool knows nothing of what another allocator gives, and that nothing of what is unused there.
        """
        pool = getattr(self.cupy.cuda.get_allocator(), "__self__", None)
        return pool if hasattr(pool, "free_all_blocks") else None

    def _limit(self) -> int:
        """The most that the pool may hold of this device, the current one, in bytes; 0 for all.

        An asynchronous pool has none: what it calls its limit is how much it keeps.
        """
        pool = self.pool()
        return int(pool.get_limit()) if isinstance(pool, self.cupy.cuda.MemoryPool) else 0

    @contextlib.contextmanager
    def pooled(self) -> Iterator[Any]:
        """Inside, this thread's memory comes from a pool that tells its size: the one in use, else CuPy's default."""
        pool = self.pool()
        if isinstance(pool, self.cupy.cuda.MemoryPool):
            yield pool
            return
        pool = self.cupy.get_default_memory_pool()
        with self.cupy.cuda.using_allocator(pool.malloc):
            yield pool

    def synchronize(self) -> None:
        # Stream by stream: CUDA refuses to wait for a device while anybody captures a stream of it, in whatever mode,
        # and breaks that capture. No stream that is captured is among these, see capture.
        with self.scope():
            streams = [self.current_stream(), self.cupy.cuda.Stream.null, *_streams(self.cupy, self.index).made()]
            for stream in dict.fromkeys(streams):
                stream.synchronize()

    def free_unused(self) -> None:
        self.synchronize()
        with self.scope():
            pool, default = self.pool(), self.cupy.get_default_memory_pool()
            for each in (default,) if pool in (None, default) else (default, pool):
                each.free_all_blocks()

    def compile(self, source: str, name: str) -> Any:
        """The kernel ``name`` of a CUDA source, for this device; CuPy keeps what it compiled on disk."""
        with self.scope():
            return self.cupy.RawModule(code=source, options=("--std=c++17",)).get_function(name)

    def stream(self) -> Any:
        """A new CUDA stream, which the default stream neither waits for nor holds up."""
        with self.scope():
            return _streams(self.cupy, self.index).note(self.cupy.cuda.Stream(non_blocking=True))

    def current_stream(self) -> Any:
        """The CUDA stream on which the caller's work is done; each thread has its own."""
        with self.scope():
            return self.cupy.cuda.get_current_stream()

    def event(self) -> Any:
        """A new CUDA event; a thread that waits for it sleeps."""
        with self.scope():
            return self.cupy.cuda.Event(block=True, disable_timing=True)

    def capture(self, work: Callable[[], None]) -> Any:
        """What ``work`` gives to the current stream, as a CUDA graph: nothing is done before its ``launch()``.

        The graph works in the arrays that ``work`` used: whoever keeps it keeps them, and they stay where they are.
        ``work`` allocates no memory (:class:`CaptureError`), waits for nothing, copies nothing from or to the host, and
        its kernels were launched before, since a module cannot be loaded meanwhile; of what else CUDA refuses the error
        is CuPy's. Whatever ``work`` raises ends the capture, and nothing is left of it. Meanwhile other threads may use
        the device, and capture too.
        """
        with self.scope(), _no_collections:
            # A stream that nobody else has: what others wait for, record events on or give work to is never captured,
            # nor is it held up; and the default stream, which is part of no capture, does not wait for it.
            stream = self.cupy.cuda.Stream(non_blocking=True)
            with _streams(self.cupy, self.index).as_own(stream), stream:
                # Other threads may do meanwhile what this one may not, such as allocate memory or give it back.
                stream.begin_capture(self.cupy.cuda.runtime.streamCaptureModeThreadLocal)
                try:
                    with self.cupy.cuda.using_allocator(_refuse_memory):
                        work()
                except BaseException:
                    with contextlib.suppress(Exception):  # a capture that was broken says so again
                        stream.end_capture()
                    raise
                return stream.end_capture()

    def milliseconds(self, work: Callable[[], Any]) -> float:
        """How long the current stream takes over what ``work`` gives to it; waits for that."""
        with self.scope():
            stream = self.current_stream()
            start, end = (self.cupy.cuda.Event(block=True, disable_timing=False) for _ in range(2))
            stream.record(start)
            work()
            stream.record(end)
            end.synchronize()
            return float(self.cupy.cuda.get_elapsed_time(start, end))

    def pinned(self, size: int, dtype: np.dtype[Any]) -> np.ndarray:
        """An array of ``size`` elements in pinned memory of the host, from CuPy's pool; its values are not set."""
        with self.scope():
            return np.frombuffer(self.cupy.cuda.alloc_pinned_memory(size * dtype.itemsize), dtype, size)

    @property
    def capability(self) -> int:
        """The generation of the device, the first number of its compute capability: 9 is Hopper, 10 Blackwell."""
        return int(self.cupy.cuda.Device(self.index).compute_capability[:-1])

    def library(self, name: str) -> Any:
        """A Python module beside CuPy that works on this device; imported when it is first asked for."""
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
        """What is given to ``stream`` from now on comes after what ``other`` has to do by now."""
        event = self.event()
        other.record(event)
        stream.wait_event(event)


class _Streams:
    """The streams that were made for a device, and which of them is each thread's own."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a finaliser may make a stream while another one is noted
        self._made: weakref.WeakSet[Any] = weakref.WeakSet()
        self._thread = threading.local()

    def note(self, stream: Any) -> Any:
        """``stream``, one more of those that were made."""
        with self._lock:
            self._made.add(stream)
        return stream

    def made(self) -> list[Any]:
        """Those that somebody still has."""
        with self._lock:
            return list(self._made)

    def own(self, make: Callable[[], Any]) -> Any:
        """This thread's own, made when it is first needed.

        Kept: CuPy gives memory that was taken on a stream to work of this stream alone.
        """
        if not hasattr(self._thread, "own"):
            self._thread.own = make()
        return self._thread.own

    @contextlib.contextmanager
    def as_own(self, stream: Any) -> Iterator[None]:
        """Inside, ``stream`` is this thread's own."""
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
    """The streams of a device; there is none before it is needed."""
    return _Streams()


def _refuse_memory(size: int) -> Any:
    """An allocator for a capture: the pool would give what it took there to others while the graph works in it."""
    raise CaptureError(f"{size} bytes of memory were asked for during a capture; allocate before it")


class _NoCollections:
    """No cyclic garbage is collected inside a ``with``: finalisers of anybody's arrays may call what a capture forbids.

    The collector is the whole process's: it is as before when the last of the threads that are inside leaves.
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
    """The backend that ``spec`` names: "auto", "cpu", "cuda", "cuda:1", or a :class:`Backend`, returned as it is.

    "auto" is what ``GPUBATCH_BACKEND`` says, or else a CUDA device where one can be used, or else the CPU.
    ``fallback="cpu"``, or ``GPUBATCH_FALLBACK=cpu``, gives the CPU with a ``BackendFallbackWarning`` where "cuda"
    would raise :class:`BackendUnavailableError`.
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
    """The specs of the backends that can be used here, the CPU first."""
    try:
        count = load_cupy().cuda.runtime.getDeviceCount()
    except BackendUnavailableError:
        count = 0
    return ("cpu", *(f"cuda:{index}" for index in range(count)))


def _auto() -> Backend:
    try:
        return _cuda(0, "a CUDA device can be used")
    except BackendUnavailableError as error:
        return CpuBackend(f"CUDA cannot be used: {error.cause}")


def _named(spec: Any, fallback: str | None, argument: str, reason: str) -> Backend:
    if spec == "cpu":
        return CpuBackend(reason)
    match = re.fullmatch(r"cuda(?::(\d+))?", spec) if isinstance(spec, str) else None
    if match is None:
        raise ArgumentError(f"{argument} must be 'auto', 'cpu', 'cuda', 'cuda:N' or a Backend, got {spec!r}")
    try:
        return _cuda(int(match[1] or 0), reason)
    except BackendUnavailableError as error:
        if fallback is None:
            raise
        # One fixed place in the source, so that Python's default filter shows the warning once in a process.
        warnings.warn(f"using the CPU instead of {spec!r}. {error}", BackendFallbackWarning, stacklevel=1)
        return CpuBackend(f"fallback from {spec!r}: {error.cause}")


def _cuda(index: int, reason: str) -> Backend:
    cupy = load_cupy()
    count = cupy.cuda.runtime.getDeviceCount()
    if index >= count:
        raise BackendUnavailableError(
            f"'cuda:{index}' cannot be used: no device of that number, this machine has {count}.",
            "no device",
            f"use 'cuda:0' to 'cuda:{count - 1}', or look at CUDA_VISIBLE_DEVICES.",
        )
    return CudaBackend(cupy, index, reason)


def load_cupy() -> Any:
    """CuPy, once a tiny computation on a device has worked; otherwise one error with the cause and the remedy."""
    found = _probe_cupy()
    if isinstance(found, BackendUnavailableError):
        raise BackendUnavailableError(found.message, found.cause, found.remedy) from found.__cause__
    return found


@functools.cache
def _probe_cupy() -> Any:
    """CuPy, or the error that says why it cannot be used; tried once in a process, since a failing import is slow."""
    if importlib.util.find_spec("cupy") is None:
        return BackendUnavailableError("'cuda' cannot be used: CuPy is not installed.", "not installed", INSTALL_CUPY)
    try:
        import cupy
    except Exception as error:  # not only ImportError: RuntimeError and OSError too, for libraries it cannot load
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
            warnings.simplefilter(
                "default"
            )  # where warnings are errors, one of a library's loader is not a library less
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
        "check nvidia-smi and CUDA_VISIBLE_DEVICES (in a container: run it with its GPUs), or use backend='cpu'.",
    )


def _caused(cause: BaseException | None, *words: str) -> BackendUnavailableError:
    error = BackendUnavailableError(*words)
    error.__cause__ = cause
    return error


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


# --- looking at arrays ---------------------------------------------------------------------------------------------


def is_cupy(x: Any) -> bool:
    """Whether ``x`` is a CuPy array, told without importing CuPy."""
    kind = type(x)
    return kind.__name__ == "ndarray" and kind.__module__.partition(".")[0] == "cupy"


def array_namespace(*arrays: Array) -> Any:
    """The Array-API namespace that all ``arrays`` belong to; arrays of two devices are an error."""
    return backend_of(*arrays).xp


def backend_of(*arrays: Array) -> Backend:
    """The backend on which all ``arrays`` live; arrays of two devices are an error."""
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
        return "cpu"
    if is_cupy(x):
        return f"cuda:{x.device.id}"
    raise DTypeError(f"expected a NumPy or CuPy array, got {describe(x)}; convert it with Backend.asarray")


def to_numpy(x: Array) -> np.ndarray:
    """``x`` as a NumPy array, copied where it is on a device, after the work of the stream that is current there."""
    if not is_cupy(x):
        return np.asarray(x)
    with x.device:
        return x.get()  # type: ignore[no-any-return]


def describe(x: Any) -> str:
    """An array in words, for messages."""
    if isinstance(x, np.ndarray):
        return f"a NumPy array of shape {x.shape} and dtype {x.dtype}"
    if is_cupy(x):
        return f"a CuPy array of shape {x.shape} and dtype {x.dtype} on cuda:{x.device.id}"
    return f"a {type(x).__module__}.{type(x).__qualname__}".replace("a builtins.", "a ")


def is_foreign(x: Any) -> bool:
    """Whether ``x`` is an array of another library that speaks DLPack."""
    return not isinstance(x, np.ndarray) and not is_cupy(x) and hasattr(x, "__dlpack__")


def is_immutable(x: Any) -> bool:
    """Whether ``x`` is JAX's: its capsule does not say that nobody may write to it, and CuPy would not ask."""
    return type(x).__module__.partition(".")[0] in ("jax", "jaxlib")


def from_dlpack(x: Any) -> Array:
    """``x``, an array of another library, seen through DLPack without a copy: by CuPy on a GPU, otherwise by NumPy.

    On a GPU the stream that is current there waits for what makes the values.
    """
    on_gpu = x.__dlpack_device__()[0] in (2, 13)  # kDLCUDA, kDLCUDAManaged
    try:
        return load_cupy().from_dlpack(x) if on_gpu else np.from_dlpack(x)
    except Exception as error:  # every library raises its own: BufferError, TypeError, RuntimeError
        raise DeviceMismatchError(f"cannot take {describe(x)} without a copy: {error}") from error


def float_dtype(dtype: Any, name: str = "dtype", half: bool = False) -> np.dtype[Any]:
    """``dtype`` as NumPy knows it, if it is float32 or float64, or with ``half`` float16.

    ``name`` is what has it, for the message.
    """
    known = {name: np.dtype(name) for name in ("float32", "float64", *(["float16"] if half else []))}
    try:
        return known[np.dtype(dtype).name]
    except (TypeError, KeyError):
        raise DTypeError(f"{name} must be {' or '.join(known)}, got {dtype!r}") from None


def compute_dtype(storage: np.dtype[Any]) -> np.dtype[Any]:
    """The dtype of the arithmetic on arrays of ``storage``: float32 for float16, else the same."""
    return np.dtype(np.float32) if storage == np.float16 else storage


# --- memory of the host --------------------------------------------------------------------------------------------


def host_memory(root: str = "/") -> Memory:
    """Main memory for this process: the machine's, or less where a control group or a ulimit says so.

    ``root`` is where ``proc`` and ``sys`` are found. Outside Linux and Windows available memory is half of what is
    installed, since no portable call tells more.
    """
    total, available = _meminfo(root) or _installed_memory()
    for limit, used in (*_control_groups(root), *_address_space(root)):
        total, available = min(total, limit), min(available, limit - used)
    return Memory(total, max(available, 0))


def _read(*path: str) -> str:
    """The text of a small file, empty where there is none."""
    try:
        with open(os.path.join(*path), encoding="ascii") as file:
            return file.read()
    except OSError:
        return ""


def _meminfo(root: str) -> tuple[int, int] | None:
    found = re.findall(r"^(\w+):\s+(\d+) kB", _read(root, "proc/meminfo"), re.MULTILINE)
    size = {name: 1024 * int(kilobytes) for name, kilobytes in found}
    if "MemTotal" not in size:
        return None
    return size["MemTotal"], size.get("MemAvailable", size.get("MemFree", 0))


def _installed_memory() -> tuple[int, int]:
    if sys.platform == "win32":
        import ctypes

        status = (ctypes.c_ulonglong * 8)()  # MEMORYSTATUSEX: two 32-bit fields (length, load), then seven of 64 bits
        ctypes.cast(status, ctypes.POINTER(ctypes.c_ulong))[0] = ctypes.sizeof(status)
        ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status))
        return int(status[1]), int(status[2])
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return total, total // 2


def _control_groups(root: str) -> Iterator[tuple[int, int]]:
    """(limit, used) of every memory control group around this process; page cache that can be dropped is not used."""
    for line in _read(root, "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            mount, names = "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            mount = "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        # Inside a container the path may be the host's, of which only the mount point itself is seen here.
        inner = [name for name in path.split("/") if name]
        if not os.path.isdir(os.path.join(root, mount, *inner)):
            inner = []
        for depth in range(len(inner), -1, -1):
            yield from _group_limit(os.path.join(root, mount, *inner[:depth]), *names)


def _group_limit(folder: str, limit_name: str, usage_name: str, cache_name: str) -> Iterator[tuple[int, int]]:
    limit, used = _read(folder, limit_name).strip(), _read(folder, usage_name).strip()
    # "max" is no limit in version 2, in version 1 it is a number near 2**63.
    if limit.isdigit() and used.isdigit() and int(limit) < 1 << 60:
        cache = re.search(rf"^{cache_name} (\d+)$", _read(folder, "memory.stat"), re.MULTILINE)
        yield int(limit), max(int(used) - (int(cache[1]) if cache else 0), 0)


def _address_space(root: str) -> Iterator[tuple[int, int]]:
    """(limit, used) of ``ulimit -v``, where one is set."""
    try:
        import resource
    except ImportError:  # Windows has none
        return
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    pages = _read(root, "proc/self/statm").partition(" ")[0]
    if limit != resource.RLIM_INFINITY and pages:
        yield limit, int(pages) * os.sysconf("SC_PAGE_SIZE")
