"""The batch-size rule, against the course's numbers and against its definition as a search over all sizes."""

from __future__ import annotations

import re
from fractions import Fraction

import pytest
from hypothesis import given, strategies as st

from gpubatch.backend import Memory, host_memory
from gpubatch.errors import ArgumentError, DTypeError, InsufficientMemoryError
from gpubatch.sizing import BatchPlan, choose_batch_size, format_bytes

GIB = 2**30


@pytest.mark.parametrize(
    ("n", "text"),
    [
        (0, "0 bytes"),
        (1023, "1023 bytes"),
        (1024, "1.0 KiB"),
        (1258291, "1.2 MiB"),
        (3 * GIB // 2, "1.5 GiB"),
        (2**40, "1.0 TiB"),
        (2**50, "1.0 PiB"),
        (5 * 2**60, "5120.0 PiB"),
    ],
)
def test_bytes_in_words(n, text):
    assert format_bytes(n) == text


# (n_samples, bytes_per_sample, fixed_bytes, available, at_most) -> batch size, words of the reason
RULE = [
    ((148, 10, 0, GIB, 512), 148, "all 148 samples are one batch"),
    ((2000, 10, 0, GIB, 64), 2000, "at_most does not apply"),
    ((2001, 10, 0, GIB, 512), 512, "largest power of two within at_most=512"),
    ((60_000, 3136, 0, GIB, 512), 512, "largest power of two within at_most=512"),
    ((60_000, 3136, 0, GIB, 100), 64, "largest power of two within at_most=100"),
    ((3000, 1, 0, GIB, 5000), 2048, "largest power of two within n_samples=3000"),
    ((60_000, 1000, 0, 64_000, 512), 32, "memory limits the batch to 32: 64 samples"),
    ((60_000, 1000, 0, 200_000, 512), 128, "memory limits the batch to 128: 256 samples"),
    ((1500, 1000, 0, 1_000_000, 512), 512, "memory limits the batch to 512: 1500 samples"),
    ((1500, 1000, 0, 100_000, 512), 64, "memory limits the batch to 64: 128 samples"),
    ((60_000, 1000, 90_000, 200_000, 512), 64, "memory limits the batch to 64: 128 samples"),
    ((1, 10, 0, 100, 512), 1, "the only sample is one batch"),
    ((10_000, 0, 900, 1000, 512), 512, "largest power of two"),
]


@pytest.mark.parametrize(("arguments", "batch", "words"), RULE)
def test_the_rule(arguments, batch, words):
    n, per_sample, fixed, available, at_most = arguments
    plan = choose_batch_size(n, per_sample, fixed, available, at_most)
    assert plan.batch_size == batch
    assert words in plan.reason
    assert plan.needed == fixed + batch * per_sample
    assert plan.available == available
    assert ("memory" in plan.reason) == ("memory" in words)


def test_ninety_percent_is_exact():
    assert choose_batch_size(64, 1, 836, 1000).batch_size == 64  # 836 + 64 = 900
    assert choose_batch_size(64, 1, 837, 1000).batch_size == 32
    assert choose_batch_size(1, 9 * 10**30, 0, 10**31).needed == 9 * 10**30
    with pytest.raises(InsufficientMemoryError):
        choose_batch_size(1, 9 * 10**30 + 1, 0, 10**31)


@given(
    n=st.integers(1, 5000),
    per_sample=st.integers(0, 2000),
    fixed=st.integers(0, 100_000),
    available=st.integers(0, 2_000_000),
    at_most=st.integers(1, 2000),
)
def test_no_better_size_exists(n, per_sample, fixed, available, at_most):
    def fits(batch):
        return Fraction(fixed + batch * per_sample) <= Fraction(9, 10) * available

    candidates = [2**k for k in range(12) if 2**k <= min(at_most, n) and fits(2**k)]
    if n <= 2000 and fits(n):
        candidates.append(n)
    if not fits(1):
        with pytest.raises(InsufficientMemoryError, match=f"{fixed + per_sample} bytes"):
            choose_batch_size(n, per_sample, fixed, available, at_most)
        return
    plan = choose_batch_size(n, per_sample, fixed, available, at_most)
    assert plan.batch_size == max(candidates)
    if "memory limits" in plan.reason:  # the sentence can be checked: the size it names does not fit
        larger, needed = re.search(r": (\d+) samples would need .*?(\d+) bytes", plan.reason).groups()
        assert int(needed) == fixed + int(larger) * per_sample
        assert not fits(int(larger))
        assert int(larger) in (2 * plan.batch_size, n)
    else:
        assert plan.batch_size == n or plan.batch_size * 2 > min(at_most, n)


def test_one_sample_that_does_not_fit_says_how_many_bytes():
    with pytest.raises(InsufficientMemoryError) as caught:
        choose_batch_size(100, 1258291, 0, 1258291)
    assert "1.2 MiB (1258291 bytes)" in str(caught.value)
    assert "90 %" in str(caught.value)
    assert isinstance(caught.value, MemoryError)


def test_memory_may_be_a_backend_s_or_main_memory_as_it_is():
    assert choose_batch_size(5000, 10, memory=Memory(total=10**9, available=2000)).batch_size == 128
    plan = choose_batch_size(5000, 10)
    assert 0 < plan.available <= host_memory().total
    assert plan == BatchPlan(512, plan.reason, 5120, plan.available)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"n_samples": 0}, ArgumentError, "n_samples must be an integer >= 1, got 0"),
        ({"n_samples": 2.0}, DTypeError, "n_samples must be an integer"),
        ({"bytes_per_sample": -1}, ArgumentError, "bytes_per_sample must be an integer >= 0, got -1"),
        ({"fixed_bytes": -1}, ArgumentError, "fixed_bytes must be an integer >= 0, got -1"),
        ({"at_most": 0}, ArgumentError, "at_most must be an integer >= 1, got 0"),
        ({"memory": -1}, ArgumentError, "memory must be an integer >= 0, got -1"),
        ({"memory": "2 GB"}, DTypeError, "memory must be an integer"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=re.escape(message)):
        choose_batch_size(**{"n_samples": 10, "bytes_per_sample": 1, **arguments})
