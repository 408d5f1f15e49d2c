"""Bytes needed and bytes available → batch size."""

from __future__ import annotations

from dataclasses import dataclass

from gpubatch.backend import Memory, host_memory
from gpubatch.errors import InsufficientMemoryError, check_int

__all__ = ["BatchPlan", "choose_batch_size", "format_bytes"]

WHOLE_SET = 2000  # up to this many samples, one batch holds them all (deeplearning.ai, course 2, week 2)
UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB")


@dataclass(frozen=True)
class BatchPlan:
    """A batch size, why it is this one, and the bytes that it needs out of those that were available."""

    batch_size: int
    reason: str
    needed: int
    available: int


def format_bytes(n: int) -> str:
    """``n`` bytes in binary units.

    >>> format_bytes(640), format_bytes(1258291)
    ('640 bytes', '1.2 MiB')
    """
    power = min(max(abs(n).bit_length() - 1, 0) // 10, len(UNITS) - 1)
    return f"{n / 1024**power:.1f} {UNITS[power]}" if power else f"{n} bytes"


def choose_batch_size(
    n_samples: int,
    bytes_per_sample: int,
    fixed_bytes: int = 0,
    memory: Memory | int | None = None,
    at_most: int = 512,
) -> BatchPlan:
    """The batch size for a set of ``n_samples``, by the course's rule and by what fits in memory.

    Up to 2000 samples: the whole set, if it fits. Otherwise the largest power of two, not above ``at_most`` nor
    ``n_samples``, that fits. A batch fits if ``fixed_bytes + batch * bytes_per_sample`` is at most 90 % of what is
    available: ``memory`` of a device, a number of bytes, or by default main memory as it is now.
    Raises ``InsufficientMemoryError`` where not even one sample fits.
    """
    n_samples = check_int("n_samples", n_samples, 1)
    bytes_per_sample = check_int("bytes_per_sample", bytes_per_sample, 0)
    fixed_bytes = check_int("fixed_bytes", fixed_bytes, 0)
    at_most = check_int("at_most", at_most, 1)
    memory = host_memory() if memory is None else memory
    available = memory.available if isinstance(memory, Memory) else check_int("memory", memory, 0)

    def needed(batch: int) -> int:
        return fixed_bytes + batch * bytes_per_sample

    def fits(batch: int) -> bool:
        return 10 * needed(batch) <= 9 * available

    if n_samples <= WHOLE_SET and fits(n_samples):
        samples = "the only sample is" if n_samples == 1 else f"all {n_samples} samples are"
        reason = (
            f"{samples} one batch, since the set has at most {WHOLE_SET} (at_most does not apply); "
            f"it needs {_exact(needed(n_samples))} of {_exact(available)} available"
        )
        return BatchPlan(n_samples, reason, needed(n_samples), available)

    largest = 1 << (min(at_most, n_samples).bit_length() - 1)
    batch = largest
    while batch > 1 and not fits(batch):
        batch //= 2
    if not fits(batch):
        raise InsufficientMemoryError(
            f"not even one sample fits in memory: it needs {_exact(needed(1))}, {_exact(fixed_bytes)} of that for any "
            f"batch size, and 90 % of the {_exact(available)} available may be used"
        )

    if batch == largest and n_samples > WHOLE_SET:
        bound = f"at_most={at_most}" if at_most <= n_samples else f"n_samples={n_samples}"
        reason = (
            f"{batch} is the largest power of two within {bound}; "
            f"it needs {_exact(needed(batch))} of {_exact(available)} available"
        )
    else:
        larger = 2 * batch if batch < largest else n_samples
        reason = (
            f"memory limits the batch to {batch}: {larger} samples would need {_exact(needed(larger))}, "
            f"more than 90 % of the {_exact(available)} available"
        )
    return BatchPlan(batch, reason, needed(batch), available)


def _exact(n: int) -> str:
    return format_bytes(n) if n < 1024 else f"{format_bytes(n)} ({n} bytes)"
