"""The batch-size rule, against the course's numbers and against its definition as a search over all sizes."""

from __future__ import annotations

import contextlib
import logging
import re
import subprocess
import sys
import tracemalloc
import types
import weakref
from fractions import Fraction

import numpy as np
import pytest
from families import marks
from hypothesis import given, strategies as st
from needs import peer

import gpubatch.sizing
from gpubatch.backend import CudaBackend
from gpubatch.errors import ArgumentError, DTypeError, InsufficientMemoryError
from gpubatch.main_memory import Memory, main_memory
from gpubatch.sizing import (
    BatchPlan,
    choose_batch_size,
    find_batch_size,
    format_bytes,
    parse_bytes,
    plan_batch_size,
)

GIB = 2**30


@pytest.fixture(autouse=True)
def collect(monkeypatch, request):
    """Between trials there is no garbage here, but all that other tests left behind to look through."""
    if "garbage" not in request.node.name:
        monkeypatch.setattr(gpubatch.sizing, "gc", types.SimpleNamespace(collect=lambda: 0))


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


def test_a_plan_is_printed_by_part():
    plan = choose_batch_size(60_000, 1000, 90_000, 200_000)
    assert plan.parts == {"for any batch size": 90_000, "samples of the batch": 64_000}
    assert str(plan) == "\n".join(
        [
            f"batch size 64: {plan.reason}",
            "  for any batch size     87.9 KiB",
            "  samples of the batch   62.5 KiB",
            "needed                  150.4 KiB",
            "available               195.3 KiB",
        ]
    )
    assert plan == BatchPlan(64, plan.reason, plan.needed, plan.available)  # parts are an explanation
    assert str(BatchPlan(3, "so", 0, 1024)).splitlines() == [
        "batch size 3: so",
        "needed     0 bytes",
        "available  1.0 KiB",
    ]


def test_every_candidate_is_weighed_exactly():
    """Bytes in steps, as with rounding: no line through two sizes predicts a third one."""
    asked = []

    def parts_of(batch):
        asked.append(batch)
        return {"rounded": -(-batch // 100) * 1000, "steady": 0}

    assert plan_batch_size(5000, parts_of, 6000, 512).batch_size == 256  # 3,000 bytes; 512 need 6,000
    assert sorted(asked) == [256, 512]
    with pytest.raises(InsufficientMemoryError, match=r"rounded 1000 bytes$") as caught:
        plan_batch_size(5000, parts_of, 1111, 512)
    assert "needs 1000 bytes, and 90 % of the 1.1 KiB (1111 bytes) available may be used" in str(caught.value)
    assert plan_batch_size(5000, parts_of, 1112, 512).batch_size == 64


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
    assert 0 < plan.available <= main_memory().total
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


@pytest.mark.parametrize(
    ("text", "n"),
    [("7 B", 7), ("7B", 7), ("1 KB", 1000), ("1.5 MiB", 3 * 2**19), ("2 GB", 2 * 10**9), ("0.5 TiB", 2**39)],
)
def test_bytes_from_words(text, n):
    assert parse_bytes("window", text) == n


@pytest.mark.parametrize("text", ["", "7", "7 iB", "-1 MB", "1 MB/s", "many"])
def test_words_that_are_no_bytes(text):
    with pytest.raises(ArgumentError, match=re.escape(f"'256 MiB' or '1.5 GB', got {text!r}")):
        parse_bytes("window", text)


# --- any function -----------------------------------------------------------------------------------------------------

MIB = 2**20


def with_memory(monkeypatch, available):
    """Fix the available memory, and count only traced allocations: resident memory depends on earlier tests."""
    monkeypatch.setattr(gpubatch.sizing, "main_memory", lambda: Memory(available, available))
    monkeypatch.setattr(gpubatch.sizing, "_resident", lambda field: 0)


class Step:
    """A step that needs a megabyte per sample, and raises MemoryError above ``limit`` samples."""

    def __init__(self, limit=10**9, bytes_per_sample=MIB):
        self.limit, self.bytes_per_sample, self.run = limit, bytes_per_sample, []

    def __call__(self, size):
        assert isinstance(size, int)
        self.run.append(size)
        if size > self.limit:
            raise MemoryError("not this word")
        return np.ones(size * self.bytes_per_sample, np.uint8)


def test_the_largest_size_that_fits_is_found_and_was_run(monkeypatch, caplog):
    with_memory(monkeypatch, 100 * MIB)
    step = Step()
    with caplog.at_level(logging.INFO, "gpubatch"):
        plan = find_batch_size(step, 60_000, backend="cpu")
    assert plan.batch_size == 64
    assert step.run == [16, 4, 64]
    assert 64 * MIB <= plan.needed < 1.1 * 64 * MIB
    assert plan.available == 100 * MIB
    assert plan.reason.startswith("memory limits the batch to 64; it needed ")
    assert plan.reason.endswith("3 trials (16, 4, 64)")
    assert [record.message for record in caplog.records][-1] == "batch size 64 found in 3 trials (16, 4, 64)"
    assert len(caplog.records) == 4


# (n_samples, at_most, size from which the step raises) -> batch size, words of the reason
FOUND = [
    (60_000, 256, None, 256, "256 is the largest power of two within at_most=256"),
    (60_000, 100, None, 64, "64 is the largest power of two within at_most=100"),
    (3000, None, None, 2048, "2048 is the largest power of two within n_samples=3000"),
    (3000, 5000, None, 2048, "2048 is the largest power of two within n_samples=3000"),
    (1500, None, None, 1500, "all 1500 samples are one batch"),
    (1500, 1000, None, 512, "within at_most=1000"),
    (1, None, None, 1, "the only sample is one batch"),
    (13, None, None, 13, "all 13 samples are one batch"),
    (1500, None, 600, 512, "memory limits the batch to 512"),
    (60_000, None, 100, 64, "memory limits the batch to 64"),
    (60_000, None, 10, 8, "memory limits the batch to 8"),
    (60_000, None, 3, 2, "memory limits the batch to 2"),
    (60_000, None, 1, 1, "memory limits the batch to 1"),
]


@pytest.mark.parametrize(
    ("n", "at_most", "limit", "size", "words"),
    [pytest.param(*case, marks=marks(number % 4 == 0)) for number, case in enumerate(FOUND)],
)
def test_found_within_the_bounds(n, at_most, limit, size, words):
    step = Step(limit or 10**9, bytes_per_sample=10)
    plan = find_batch_size(step, n, at_most, backend="cpu")
    assert plan.batch_size == size
    assert words in plan.reason
    assert size in step.run
    assert f"{len(step.run)} trial" in plan.reason
    assert max(step.run) <= min(n, at_most or n)
    assert len(step.run) == len(set(step.run))


@pytest.mark.parametrize("library", ["torch", "jax"])
def test_other_libraries_errors_say_that_memory_ran_out(library):
    """On a CPU neither runs out of a device's memory, so their errors are made here."""
    module = peer(library)
    if library == "torch":
        out, other = module.OutOfMemoryError("no"), RuntimeError("out of memory")
    else:
        kind = module.errors.JaxRuntimeError
        out, other = kind("RESOURCE_EXHAUSTED: Out of memory allocating 1 byte"), kind("INTERNAL: out of memory")

    def step(size, error):
        if size > 10:
            raise error

    assert find_batch_size(lambda size: step(size, out), 1000, backend="cpu").batch_size == 8
    with pytest.raises(type(other), match="out of memory"):
        find_batch_size(lambda size: step(size, other), 1000, backend="cpu")


def test_nothing_fits(monkeypatch):
    step = Step(limit=0)
    with pytest.raises(InsufficientMemoryError, match="tried 16, 4, 2, 1, out of memory at each of them") as caught:
        find_batch_size(step, 100, backend="cpu")
    assert caught.value.__context__ is None
    with_memory(monkeypatch, MIB)
    with pytest.raises(InsufficientMemoryError, match=r"not even one sample fits in 90 % of the 1\.0 MiB"):
        find_batch_size(Step(), 100, backend="cpu")


@given(
    n=st.integers(1, 5000),
    at_most=st.none() | st.integers(1, 3000),
    fixed=st.integers(0, 100_000),
    per_sample=st.integers(0, 2000),
    available=st.integers(0, 2_000_000),
    first=st.integers(0, 50_000),
    raises=st.none() | st.integers(0, 3000),
)
def test_no_better_size_exists_for_a_function(n, at_most, fixed, per_sample, available, first, raises):
    run = []

    class Counted:
        def __init__(self):
            self.available = available

        def reset(self):
            pass

        def peak(self):
            return fixed + per_sample * run[-1] + (first if len(run) == 1 else 0)

    @contextlib.contextmanager
    def meters(backend):
        yield [Counted()]

    def step(size):
        run.append(size)
        if raises is not None and size > raises:
            raise MemoryError

    def fits(size):
        enough = Fraction(fixed + per_sample * size) <= Fraction(9, 10) * available
        return enough and (raises is None or size <= raises)

    cap = min(n, at_most or n)
    candidates = [size for size in (2**k for k in range(13)) if size <= cap]
    candidates += [n] if n <= 2000 and cap == n else []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpubatch.sizing, "_meters", meters)
        try:
            plan = find_batch_size(step, n, at_most, backend="cpu")
        except InsufficientMemoryError:
            plan = None
    assert len(run) == len(set(run)) <= 15
    if plan is None:
        assert not fits(1) or first > 0
        return
    assert plan.batch_size in run
    assert fits(plan.batch_size)
    if not first:  # one-time memory of the first run can lower the size, never raise it
        assert plan.batch_size == max(size for size in candidates if fits(size))


def test_nothing_is_remembered(monkeypatch):
    with_memory(monkeypatch, 20 * MIB)
    assert find_batch_size(Step(), 60_000, backend="cpu").batch_size == 16
    with_memory(monkeypatch, 50 * MIB)
    assert find_batch_size(Step(), 60_000, backend="cpu").batch_size == 32
    assert not tracemalloc.is_tracing()
    tracemalloc.start()
    try:
        assert find_batch_size(Step(), 60_000, at_most=8, backend="cpu").batch_size == 8
        assert tracemalloc.is_tracing()
    finally:
        tracemalloc.stop()


def test_garbage_is_collected_before_the_next_trial():
    held = []

    class Large:
        pass

    def step(size):
        assert all(reference() is None for reference in held)
        large = Large()
        large.itself = large  # a cycle, as a frame and its traceback are
        held.append(weakref.ref(large))
        if size > 4:
            raise MemoryError

    assert find_batch_size(step, 100, backend="cpu").batch_size == 4


def test_other_errors_are_the_caller_s():
    def step(size):
        raise RuntimeError("CUDA out of memory")  # told by type, not by words

    with pytest.raises(RuntimeError):
        find_batch_size(step, 100, backend="cpu")
    assert not tracemalloc.is_tracing()
    with pytest.raises(ArgumentError, match="n_samples must be an integer >= 1, got 0"):
        find_batch_size(step, 0)
    with pytest.raises(ArgumentError, match="at_most must be an integer >= 1, got 0"):
        find_batch_size(step, 10, 0)


class Pool:
    """Mimics CuPy's pool: it keeps freed memory until told to free it."""

    def malloc(self, size):
        raise AssertionError

    def __init__(self):
        self.total = 5000  # used by others

    def total_bytes(self):
        return self.total

    def free_all_blocks(self):
        self.total = 5000


@pytest.mark.parametrize("default", [True, False])
def test_a_device_s_pool_is_measured(default, monkeypatch):
    """Even if CuPy has another allocator, whose use is unknown."""
    pool, used = Pool(), []

    @contextlib.contextmanager
    def using_allocator(allocator):
        used.append(allocator)
        yield

    allocator = types.MethodType(lambda *_: None, pool) if default else print
    cuda = types.SimpleNamespace(get_allocator=lambda: allocator, MemoryPool=Pool, using_allocator=using_allocator)
    backend = CudaBackend(types.SimpleNamespace(get_default_memory_pool=lambda: pool, cuda=cuda), 0, "a test")
    monkeypatch.setattr(CudaBackend, "memory", lambda self: Memory(10**6, 10**6))
    monkeypatch.setattr(CudaBackend, "synchronize", lambda self: None)
    monkeypatch.setattr(CudaBackend, "scope", lambda self: contextlib.nullcontext())

    def step(size):
        pool.total = max(pool.total, 5000 + 1000 + 3000 * size)

    plan = find_batch_size(step, 60_000, backend=backend)
    assert (plan.batch_size, plan.needed, plan.available) == (256, 1000 + 3000 * 256, 10**6)
    assert used == ([] if default else [pool.malloc])


def test_a_limit_on_address_space_is_kept():
    if not sys.platform.startswith("linux"):
        pytest.skip("ulimit -v is Linux's")
    code = """if True:
        import resource, numpy as np
        from gpubatch.sizing import find_batch_size
        find_batch_size(lambda size: np.ones(size), 100, backend="cpu")
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 100 * 2**20,) * 2)
        plan = find_batch_size(lambda size: np.ones(size << 20, np.uint8), 60_000, backend="cpu")
        print(plan.batch_size, plan.available < 101 * 2**20)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["64", "True"], done.stderr
