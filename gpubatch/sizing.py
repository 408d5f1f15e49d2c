"""Batch sizes from bytes needed and bytes available."""

from __future__ import annotations

import contextlib
import functools
import gc
import logging
import re
import sys
import tracemalloc
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Protocol, TypeAlias

from gpubatch.backend import Backend, CudaBackend, get_backend
from gpubatch.errors import ArgumentError, InsufficientMemoryError, check_int
from gpubatch.main_memory import Memory, main_memory

__all__ = [
    "BatchPlan",
    "ByPart",
    "choose_batch_size",
    "find_batch_size",
    "fits",
    "format_bytes",
    "parse_bytes",
    "plan_batch_size",
]

ByPart: TypeAlias = Mapping[str, int]  # bytes by purpose

log = logging.getLogger(__name__)

WHOLE_SET = 2000  # sets of at most this size are one batch (deeplearning.ai, course 2, week 2)
PROBES = (16, 4)  # larger first: one-time allocations of the first step then raise the estimate, never lower it
LEAP = 32  # extrapolate to at most this multiple of the largest size that ran
UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB")


@dataclass(frozen=True)
class BatchPlan:
    """A batch size, the reason for it, and the bytes needed and available.

    ``parts`` splits the needed bytes by purpose, where known. ``print(plan)`` shows them as a table.

    >>> gb.choose_batch_size(1_500, bytes_per_sample=1_000, memory=10**9).batch_size
    1500
    """

    batch_size: int
    reason: str
    needed: int
    available: int
    parts: ByPart = field(default_factory=dict, compare=False, repr=False)

    def __str__(self) -> str:
        rows = {**{f"  {name}": n for name, n in self.parts.items() if n}, "needed": self.needed}
        cells = {name: format_bytes(n) for name, n in {**rows, "available": self.available}.items()}
        left, right = max(map(len, cells)), max(map(len, cells.values()))
        table = (f"{name:{left}}  {text:>{right}}" for name, text in cells.items())
        return "\n".join([f"batch size {self.batch_size}: {self.reason}", *table])


def format_bytes(n: int) -> str:
    """``n`` bytes as text, in binary units.

    >>> format_bytes(640), format_bytes(1258291)
    ('640 bytes', '1.2 MiB')
    """
    power = min(max(abs(n).bit_length() - 1, 0) // 10, len(UNITS) - 1)
    return f"{n / 1024**power:.1f} {UNITS[power]}" if power else f"{n} bytes"


def parse_bytes(name: str, text: str) -> int:
    """The number of bytes in ``text``, with a binary or decimal unit; ``name`` is the argument, for the error message.

    >>> parse_bytes("window", "1.5 MiB"), parse_bytes("window", "2 GB")
    (1572864, 2000000000)
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]?)(i?)B", text.strip())
    if found is None or (found[3] and not found[2]):
        raise ArgumentError(f"{name}, if not a number, must be bytes such as '256 MiB' or '1.5 GB', got {text!r}")
    power = " KMGT".index(found[2] or " ")
    return int(Fraction(found[1]) * (1024 if found[3] else 1000) ** power)


def choose_batch_size(
    n_samples: int,
    bytes_per_sample: int,
    fixed_bytes: int = 0,
    memory: Memory | int | None = None,
    at_most: int = 512,
) -> BatchPlan:
    """Choose the batch size for ``n_samples`` by the course's rule and the memory available.

    Up to 2000 samples: the whole set, if it fits. Otherwise the largest power of two that fits, at most ``at_most``
    and ``n_samples``. A batch fits if ``fixed_bytes + batch * bytes_per_sample`` is at most 90 % of the memory.

    n_samples: size of the set, at least 1
    bytes_per_sample: bytes that grow with the batch, at least 0
    fixed_bytes: bytes for any batch size, at least 0
    memory: of a device, or a number of bytes; None: the main memory available now
    at_most: upper limit for sets above 2000 samples, at least 1

    Raises ``InsufficientMemoryError`` if not even one sample fits.

    >>> plan = gb.choose_batch_size(60_000, bytes_per_sample=100_000, memory=20_000_000)
    >>> plan.batch_size
    128
    """
    bytes_per_sample = check_int("bytes_per_sample", bytes_per_sample, 0)
    fixed_bytes = check_int("fixed_bytes", fixed_bytes, 0)
    memory = main_memory() if memory is None else memory
    available = memory.available if isinstance(memory, Memory) else check_int("memory", memory, 0)
    return plan_batch_size(
        n_samples,
        lambda batch: {"for any batch size": fixed_bytes, "samples of the batch": batch * bytes_per_sample},
        available,
        at_most,
    )


def plan_batch_size(n_samples: int, parts_of: Callable[[int], ByPart], available: int, at_most: int = 512) -> BatchPlan:
    """:func:`choose_batch_size` for batches that need the sum of ``parts_of(batch_size)`` bytes."""
    n_samples = check_int("n_samples", n_samples, 1)
    at_most = check_int("at_most", at_most, 1)
    found = functools.cache(parts_of)

    def needed(batch: int) -> int:
        return sum(found(batch).values())

    def plan(batch: int, reason: str) -> BatchPlan:
        return BatchPlan(batch, reason, needed(batch), available, dict(found(batch)))

    if n_samples <= WHOLE_SET and fits(needed(n_samples), available):
        samples = "the only sample is" if n_samples == 1 else f"all {n_samples} samples are"
        return plan(
            n_samples,
            f"{samples} one batch, since the set has at most {WHOLE_SET} (at_most does not apply); "
            f"it needs {_exact(needed(n_samples))} of {_exact(available)} available",
        )

    largest = 1 << (min(at_most, n_samples).bit_length() - 1)
    batch = largest
    while batch > 1 and not fits(needed(batch), available):
        batch //= 2
    if not fits(needed(batch), available):
        parts = ", ".join(f"{name} {format_bytes(n)}" for name, n in found(1).items() if n)
        raise InsufficientMemoryError(
            f"not even one sample fits in memory: it needs {_exact(needed(1))}, and 90 % of the {_exact(available)} "
            f"available may be used; {parts}"
        )

    if batch == largest and n_samples > WHOLE_SET:
        bound = f"at_most={at_most}" if at_most <= n_samples else f"n_samples={n_samples}"
        return plan(
            batch,
            f"{batch} is the largest power of two within {bound}; "
            f"it needs {_exact(needed(batch))} of {_exact(available)} available",
        )
    larger = 2 * batch if batch < largest else n_samples
    return plan(
        batch,
        f"memory limits the batch to {batch}: {larger} samples would need {_exact(needed(larger))}, "
        f"more than 90 % of the {_exact(available)} available",
    )


def fits(needed: int, available: int) -> bool:
    """Whether ``needed`` is at most 90 % of ``available``, exactly."""
    return 10 * needed <= 9 * available


def _exact(n: int) -> str:
    return format_bytes(n) if n < 1024 else f"{format_bytes(n)} ({n} bytes)"


# --- any function -------------------------------------------------------------------------------------------------


def find_batch_size(
    step: Callable[[int], Any], n_samples: int, at_most: int | None = None, backend: str | Backend = "auto"
) -> BatchPlan:
    """Find the batch size for any function by running it.

    Two small sizes are run, and their peak memory is measured: of this process, and on a CUDA ``backend`` of CuPy's
    pool. A line through the peaks predicts the largest power of two (or the whole set, up to 2000 samples) that needs
    at most 90 % of the memory. That size is run too: its peak refines the line, a ``MemoryError``, or what PyTorch and
    JAX raise instead, halves the size, and so on until the chosen size has run. The plan's reason and the log list the
    trials.

    step: called as ``step(batch_size)``; does one whole step of any kind
    n_samples: size of the set, at least 1
    at_most: largest size to try, at least 1; None: ``n_samples``
    backend: the device whose memory is measured

    Raises ``InsufficientMemoryError`` if not even one sample fits.

    >>> found = gb.find_batch_size(lambda size: np.zeros((size, 1000)), n_samples=5_000, at_most=256)
    >>> found.batch_size
    256
    """
    n_samples = check_int("n_samples", n_samples, 1)
    limit = n_samples if at_most is None else min(n_samples, check_int("at_most", at_most, 1))
    sizes = [1 << power for power in range(limit.bit_length())]
    if limit == n_samples <= WHOLE_SET and limit not in sizes:
        sizes.append(limit)
    largest = sizes[-1]
    with _meters(get_backend(backend)) as meters:
        trials = _Trials(step, meters)

        def run(size: int) -> None:
            if not trials.run(size):
                sizes[:] = [smaller for smaller in sizes if smaller < size]

        for probe in dict.fromkeys(min(probe, largest) for probe in PROBES):
            if sizes and probe <= sizes[-1]:
                run(probe)
        while fitting := [size for size in sizes if trials.fit(size)]:
            if (size := fitting[-1]) in trials.peaks:
                return _found(size, largest, n_samples, at_most, trials)
            run(size)
        needed, available = trials.tightest(1) if trials.peaks else (None, meters[0].available)
    words = "out of memory at each of them" if needed is None else f"one sample needs {_exact(needed)}"
    raise InsufficientMemoryError(
        f"not even one sample fits in 90 % of the {_exact(available)} available: tried {trials.listed}, {words}"
    )


def _found(size: int, largest: int, n_samples: int, at_most: int | None, trials: _Trials) -> BatchPlan:
    needed, available = trials.tightest(size)
    if size == n_samples:
        why = "the only sample is one batch" if size == 1 else f"all {n_samples} samples are one batch"
    elif size < largest:
        why = f"memory limits the batch to {size}"
    else:
        bound = f"n_samples={n_samples}" if at_most is None or at_most > n_samples else f"at_most={at_most}"
        why = f"{size} is the largest power of two within {bound}"
    number = f"{len(trials.sizes)} trial{'s' * (len(trials.sizes) > 1)} ({trials.listed})"
    reason = f"{why}; it needed {_exact(needed)} of {_exact(available)} available when it was run; {number}"
    log.info("batch size %d found in %s", size, number)
    return BatchPlan(size, reason, needed, available)


class _Trials:
    """Steps that were run: their sizes in order, and the peaks of those for which memory was enough, on each meter."""

    def __init__(self, step: Callable[[int], Any], meters: list[Meter]) -> None:
        self._step, self._meters = step, meters
        self.sizes: list[int] = []
        self.peaks: dict[int, list[int]] = {}

    def run(self, size: int) -> bool:
        """Run a step of ``size`` samples; return whether memory was enough."""
        self.sizes.append(size)
        peaks = _peaks(self._step, size, self._meters)
        if peaks is not None:
            self.peaks[size] = peaks
        log.info("batch size %d: %s", size, "out of memory" if peaks is None else f"{format_bytes(max(peaks))} needed")
        return peaks is not None

    def fit(self, size: int) -> bool:
        """Whether a step of ``size`` samples fits, as far as is known; not where it is far larger than all that ran."""
        if self.peaks and size > LEAP * max(self.peaks):
            return False
        return all(fits(*of) for of in self._predicted(size))

    def tightest(self, size: int) -> tuple[int, int]:
        """(needed, available) of the fullest meter; exact for a size that ran."""
        found = self._predicted(size)
        if size in self.peaks:
            found = [(peak, available) for peak, (_, available) in zip(self.peaks[size], found, strict=True)]
        return max(found, key=lambda of: of[0] / max(1, of[1]))

    def _predicted(self, size: int) -> list[tuple[int, int]]:
        """(needed, available) of each meter."""
        peaks = [{run: of_run[i] for run, of_run in self.peaks.items()} for i in range(len(self._meters))]
        return [(_line(size, of), meter.available) for of, meter in zip(peaks, self._meters, strict=True)]

    @property
    def listed(self) -> str:
        return ", ".join(map(str, self.sizes))


def _peaks(step: Callable[[int], Any], size: int, meters: list[Meter]) -> list[int] | None:
    """The peak of ``step(size)`` on each meter; None if memory ran out."""
    gc.collect()
    for meter in meters:
        meter.reset()
    failed = False
    try:
        step(size)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        failed = True  # nothing else here: the traceback keeps the step's arrays alive until the block ends
    peaks = [meter.peak() for meter in meters]
    gc.collect()
    for meter in meters:
        meter.reset()
    return None if failed else peaks


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory ran out: NumPy's and CuPy's are MemoryErrors, PyTorch's and JAX's are not.

    JAX has one type for all errors of XLA, whose text begins with a status code.
    """
    torch, jax = sys.modules.get("torch"), sys.modules.get("jax")
    if jax is not None and isinstance(error, jax.errors.JaxRuntimeError):
        return str(error).startswith("RESOURCE_EXHAUSTED")
    return isinstance(error, MemoryError if torch is None else (MemoryError, torch.OutOfMemoryError))


def _line(size: int, peaks: dict[int, int]) -> int:
    """The bytes for ``size`` on the line through the smallest and the largest size that ran."""
    if not peaks:
        return 0
    low, high = min(peaks), max(peaks)
    slope = Fraction(max(0, peaks[high] - peaks[low]), max(1, high - low))
    return max(0, round(max(peaks[high], peaks[low]) + slope * (size - high)))


class Meter(Protocol):
    """A meter of one kind of memory: the bytes available when it was made, and peaks above the use at that time."""

    available: int

    def reset(self) -> None:
        """Start a new peak."""

    def peak(self) -> int:
        """The peak since the last reset, in bytes above the use when the meter was made."""


class _Host:
    """Memory of this process: the larger of traced allocations (Python, NumPy) and resident growth.

    Traced allocations are exact even for small probes; resident growth includes other libraries.
    """

    def __init__(self) -> None:
        self.reset()
        self.available = main_memory().available
        self._traced, self._resident = tracemalloc.get_traced_memory()[0], _resident("VmRSS")

    def reset(self) -> None:
        tracemalloc.reset_peak()
        with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")  # VmHWM falls to VmRSS

    def peak(self) -> int:
        return max(tracemalloc.get_traced_memory()[1] - self._traced, _resident("VmHWM") - self._resident, 0)


def _resident(field: str) -> int:
    """Resident bytes of this process: ``VmRSS`` is the current, ``VmHWM`` the peak; outside Linux always the peak."""
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as file:
            found = re.search(rf"^{field}:\s+(\d+) kB", file.read(), re.MULTILINE)
            return 1024 * int(found[1]) if found else 0
    except OSError:
        pass
    try:
        import resource
    except ImportError:  # not on Windows: traced allocations must do
        return 0
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * (1 if sys.platform == "darwin" else 1024)


class _Pool:
    """Memory of a device, by the size of CuPy's pool: the pool frees nothing by itself, so its size is its peak."""

    def __init__(self, backend: CudaBackend, pool: Any) -> None:
        self._backend, self._pool = backend, pool
        self.reset()
        self.available, self._before = backend.memory().available, int(self._pool.total_bytes())

    def reset(self) -> None:
        self._backend.free_unused()

    def peak(self) -> int:
        self._backend.synchronize()
        with self._backend.scope():
            return max(int(self._pool.total_bytes()) - self._before, 0)


@contextlib.contextmanager
def _meters(backend: Backend) -> Iterator[list[Meter]]:
    ours = not tracemalloc.is_tracing()
    if ours:
        tracemalloc.start()
    try:
        if isinstance(backend, CudaBackend):
            with backend.pooled() as pool:
                yield [_Host(), _Pool(backend, pool)]
        else:
            yield [_Host()]
    finally:
        if ours:
            tracemalloc.stop()
