"""Matrix products on the CPU: by NumPy's OpenBLAS in pieces, whose bits no number of threads changes."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from families import every
from needs import missing

import gpubatch as gb
from gpubatch.errors import ArgumentError
from gpubatch.ops import cpu_products, host_library
from gpubatch.ops.blas import OPENMP, OpenBlas, _library, multiply, numpy_blas
from gpubatch.ops.compile import LOCAL_SIZES, wanted_threads

# m, k, n: vectors, an outer product, one piece, pieces of rows, of columns, and of both, and what does not end at one.
SHAPES = {
    "row": (1, 3000, 700),
    "column": (3000, 500, 1),
    "one number": (1, 50, 1),
    "outer": (300, 1, 200),
    "small": (17, 33, 5),
    "rows": (1000, 300, 70),
    "columns": (32, 784, 512),
    "both": (1100, 16, 1100),
    "small pieces": (103, 250, 97),
    "many small pieces": (999, 30, 250),
}
LAYOUTS = [  # of the factors
    ("plain", "plain"),
    ("transposed", "plain"),
    ("plain", "transposed"),
    ("transposed", "transposed"),
    ("strided", "offset"),
    ("offset", "strided"),
]


@pytest.fixture
def blas() -> OpenBlas:
    found = numpy_blas()
    if isinstance(found, str) or _library() is None:
        missing("OpenBLAS", cpu_products())
    assert isinstance(found, OpenBlas)
    return found


@pytest.fixture
def library(blas: OpenBlas) -> Iterator[Any]:
    """The compiled kernels; their number of threads and their BLAS are restored."""
    found = host_library()
    threads = found.threads()
    yield found
    found.set_threads(threads)
    found.use_blas(blas.addresses, blas.wide, blas.in_place)


@pytest.fixture
def blas_threads(blas: OpenBlas) -> Iterator[tuple[Callable[[], int], Callable[[int], None]]]:
    """The functions that say and set how many threads OpenBLAS takes, which is restored."""
    get = ctypes.CFUNCTYPE(ctypes.c_int)(blas.addresses[4])
    put = ctypes.CFUNCTYPE(None, ctypes.c_int)(blas.addresses[5])
    before = get()
    yield get, put
    put(before)


def laid_out(x: np.ndarray, layout: str) -> np.ndarray:
    """An array equal to ``x`` that lies otherwise in memory."""
    if layout == "transposed":
        return np.ascontiguousarray(x.T).T
    if layout == "strided":
        return np.repeat(x, 2, axis=1)[:, ::2]
    if layout == "offset":
        return np.pad(x, 1)[1:-1, 1:-1]
    return x


@every("shape", SHAPES, fast=["column", "columns", "both", "small pieces"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("in_place", [False, True])
def test_a_product_is_right_and_the_same_on_any_number_of_threads(
    shape: tuple[int, int, int], dtype: Any, in_place: bool, library: Any, blas: OpenBlas
) -> None:
    m, k, n = shape
    library.use_blas(blas.addresses, blas.wide, in_place)
    rng = np.random.default_rng(m)
    a, b = rng.standard_normal((m, k)).astype(dtype), rng.standard_normal((k, n)).astype(dtype)
    bound = 2 * k * np.finfo(dtype).eps * (np.abs(a).astype(float) @ np.abs(b).astype(float))
    expected = a.astype(float) @ b.astype(float)
    for left, right in LAYOUTS:
        found = []
        for threads in (1, 2, 7):
            library.set_threads(threads)
            out = np.full((m, n), np.nan, dtype)
            multiply(laid_out(a, left), laid_out(b, right), out)
            found.append(out.tobytes())
        assert len(set(found)) == 1, (left, right)
        assert (np.abs(out - expected) <= bound).all(), (left, right)


def test_what_blas_has_no_function_for_is_multiplied_by_numpy(library: Any) -> None:
    a, b = np.arange(6).reshape(2, 3), np.arange(12).reshape(3, 4)
    out = np.empty((2, 4), np.int64)
    multiply(a, b, out)
    np.testing.assert_array_equal(out, a @ b)
    empty = np.ones((2, 4))
    multiply(np.ones((2, 0)), np.ones((0, 4)), empty)
    assert not empty.any()


@pytest.mark.parametrize("wrong", ["left", "right", "out", "shape", "readonly"])
def test_unsuitable_arrays_are_declined(wrong: str, library: Any) -> None:
    a, b, out = np.ones((4, 3)), np.ones((3, 2)), np.ones((4, 2))
    a = a.astype(np.float32) if wrong == "left" else a
    b = b.astype(">f8") if wrong == "right" else b
    out = np.ones((2, 4)).T if wrong == "out" else np.ones((5, 2)) if wrong == "shape" else out
    out.flags.writeable = wrong != "readonly"
    before = out.copy()
    assert not library.multiply(a, b, out)
    np.testing.assert_array_equal(out, before)


def test_the_number_of_blas_threads_is_as_before(library: Any, blas_threads: Any) -> None:
    """However many products run at a time; a network's first product finds it, and its last one restores it."""
    get, put = blas_threads
    put(2)
    a = np.ones((200, 200), np.float32)

    def some(_: int) -> None:
        out = np.empty((200, 200), np.float32)
        for _ in range(200):
            multiply(a, a, out)
        assert (out == 200).all()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(some, range(4)))
    assert get() == 2


def test_one_thread_of_blas_is_one_thread_of_products(library: Any, blas_threads: Any) -> None:
    """OPENBLAS_NUM_THREADS=1 or threadpoolctl; any other number changes no bit."""
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((64, 784)), rng.standard_normal((784, 512))
    found = set()
    for threads in (1, 2, 3):
        blas_threads[1](threads)
        out = np.empty((64, 512))
        multiply(a, b, out)
        assert blas_threads[0]() == threads
        found.add(out.tobytes())
    assert len(found) == 1


def test_training_has_the_same_bits_on_any_number_of_threads(library: Any) -> None:
    def trained(threads: int, dtype: str) -> bytes:
        library.set_threads(threads)
        rng = np.random.default_rng(0)
        X, Y = rng.random((64, 300)).astype(dtype), rng.integers(0, 10, 64)
        net = gb.mlp([300, 500, 10], backend="cpu", dtype=dtype, seed=1)
        opt = gb.Adam(net.parameters, lr=1e-2)
        for _ in range(3):
            net.loss_and_grad(X, Y)
            opt.step()
        return net.parameters.flat.tobytes()

    for dtype in ("float32", "float64"):
        assert len({trained(threads, dtype) for threads in (1, 2, 5)}) == 1


@pytest.mark.exhaustive
@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_forked_children_multiply_as_their_parent(library: Any, tmp_path: Path) -> None:
    """While another thread multiplies. The first product comes before: two first imports at once may wait for ever."""
    script = tmp_path / "forked.py"
    script.write_text(
        "import os, threading, numpy as np\n"
        "from gpubatch.ops.blas import multiply\n"
        "a, out = np.ones((200, 200)), np.empty((200, 200))\n"
        "multiply(a, a, out)\n"
        "forked = threading.Event()\n"
        "def many():\n"
        "    own = np.empty((200, 200))\n"
        "    while not forked.is_set(): multiply(a, a, own)\n"
        "thread = threading.Thread(target=many)\n"
        "thread.start()\n"
        "for _ in range(40):\n"
        "    child = os.fork()\n"
        "    multiply(a, a, out)\n"
        "    assert (out == 200).all() and (a @ a == 200).all()\n"
        "    if child == 0: os._exit(0)\n"
        "    assert os.waitpid(child, 0)[1] == 0\n"
        "forked.set()\n"
        "thread.join()\n"
    )
    command = [sys.executable, "-W", "ignore", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


# --- which BLAS ------------------------------------------------------------------------------------------------------


class Stub:
    """A library with some functions of OpenBLAS under names such as scipy_cblas_sgemm64_."""

    def __init__(self, before: str, after: str, config: bytes, parallel: int) -> None:
        bare = ["cblas_sgemm", "cblas_dgemm", "cblas_sgemv", "cblas_dgemv"]
        bare += ["openblas_get_num_threads", "openblas_set_num_threads"]
        for name in bare:
            setattr(self, f"{before}{name}{after}", ctypes.CFUNCTYPE(None)(lambda: None))
        setattr(self, f"{before}openblas_get_config{after}", Answer(config))
        setattr(self, f"{before}openblas_get_parallel{after}", Answer(parallel))


class Answer:
    """A function of a library, of ctypes' kind, that always gives the same."""

    restype: Any = None

    def __init__(self, value: Any) -> None:
        self.value = value

    def __call__(self) -> Any:
        return self.value


def found_in(monkeypatch: pytest.MonkeyPatch, library: Any) -> OpenBlas | str:
    monkeypatch.setattr("gpubatch.ops.blas.ctypes.CDLL", library if callable(library) else lambda path: library)
    return numpy_blas.__wrapped__()


@pytest.mark.parametrize("names", [("scipy_", "64_"), ("scipy_", ""), ("", "64_"), ("", "")], ids="".join)
@pytest.mark.parametrize("wide", [False, True])
def test_openblas_is_found_under_the_names_of_its_builds(
    names: tuple[str, str], wide: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = b"OpenBLAS 0.3.31 USE64BITINT Haswell" if wide else b"OpenBLAS 0.3.31 Haswell"
    found = found_in(monkeypatch, Stub(*names, config, 1))
    assert isinstance(found, OpenBlas)
    assert (found.version, found.wide) == ("OpenBLAS 0.3.31", wide)
    assert len(found.addresses) == len(set(found.addresses)) == 6
    assert not found.in_place


@pytest.mark.parametrize("core", ["SkylakeX", "Cooperlake", "SapphireRapids"])
def test_small_products_are_computed_in_place_where_openblas_has_the_code(
    core: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = found_in(monkeypatch, Stub("", "", f"OpenBLAS 0.3.31 DYNAMIC_ARCH {core} MAX_THREADS=64".encode(), 1))
    assert isinstance(found, OpenBlas)
    assert found.in_place


def test_another_blas_is_left_to_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    openmp = Stub("", "", b"OpenBLAS 0.3.31 USE_OPENMP", OPENMP)
    assert found_in(monkeypatch, openmp) == "its OpenBLAS works by OpenMP"
    assert found_in(monkeypatch, SimpleNamespace(cblas_sgemm=None)) == "its BLAS is not OpenBLAS"

    def broken(path: str) -> Any:
        raise OSError("no such file")

    assert found_in(monkeypatch, broken) == "its library cannot be opened (no such file)"


def test_without_openblas_or_kernels_numpy_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpubatch.ops.blas.numpy_blas", lambda: "its BLAS is not OpenBLAS")
    monkeypatch.setattr("gpubatch.ops.blas._library", _library.__wrapped__)
    out = np.empty((2, 2))
    multiply(np.eye(2), np.eye(2), out)
    np.testing.assert_array_equal(out, np.eye(2))
    if not isinstance(host_library(), str):
        assert cpu_products() == "by NumPy, on as many threads as its BLAS takes, since its BLAS is not OpenBLAS"
    monkeypatch.setattr("gpubatch.ops.blas.host_library", lambda: "switched off by GPUBATCH_HOST=0")
    assert cpu_products() == "by NumPy, on as many threads as its BLAS takes"


# --- how many threads ------------------------------------------------------------------------------------------------


def test_the_environment_sets_the_most_threads(monkeypatch: pytest.MonkeyPatch, library: Any) -> None:
    monkeypatch.delenv("GPUBATCH_THREADS", raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert wanted_threads(6) == 6
    assert wanted_threads(1000) == 256
    for bound, threads in {"2": 2, "4,2": 4, "9": 6, "": 6, "0": 6, "false": 6}.items():
        monkeypatch.setenv("OMP_NUM_THREADS", bound)
        assert wanted_threads(6) == threads
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("GPUBATCH_THREADS", "3")
    assert wanted_threads(6) == 3
    assert host_library.__wrapped__().threads() == 3
    for wrong in ("0", "257", "-1", "two", "1.5"):
        monkeypatch.setenv("GPUBATCH_THREADS", wrong)
        with pytest.raises(ArgumentError, match=rf"GPUBATCH_THREADS must be an integer from 1 to 256, got '{wrong}'"):
            wanted_threads(6)


def test_processes_of_a_launcher_share_the_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GPUBATCH_THREADS", "OMP_NUM_THREADS", *LOCAL_SIZES):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 12)
    for name in LOCAL_SIZES:
        for size, threads in {"": 12, "0": 12, "1": 12, "4": 3, "5": 2, "12": 1, "50": 1}.items():
            monkeypatch.setenv(name, size)
            assert wanted_threads(12) == threads
            assert wanted_threads(3) == 3  # the launcher has given each its own
        monkeypatch.setenv("GPUBATCH_THREADS", "8")
        assert wanted_threads(12) == 8
        monkeypatch.delenv("GPUBATCH_THREADS")
        monkeypatch.delenv(name)


class Machine:
    """Loops on a machine of so many free processors, with a clock of its own, by the pool's rule.

    Each loop takes ``work`` seconds on one thread. One that has more threads than processors waits for the scheduler
    besides, for ``WAIT`` seconds.
    """

    WAIT = 3e-3

    def __init__(self, library: Any, most: int, work: float = 3e-4) -> None:
        self.crew, self.most, self.work, self.clock = library.Crew(), most, work, 0.0

    def run(self, free: int, seconds: float) -> tuple[float, int]:
        """The mean time of a loop in that time, and the number of threads of the last one."""
        began, loops, threads = self.clock, 0, 0
        while self.clock < began + seconds:
            threads = self.crew.size(self.clock, self.most)
            took = self.work / threads + (self.WAIT if threads > free else 0)
            self.clock += took
            if threads > 1:
                self.crew.report(self.clock, threads, took, self.work / max(1, threads // 2))
            self.clock += 1e-5
            loops += 1
        return (self.clock - began) / loops, threads


@pytest.mark.parametrize(("most", "free"), [(2, 1), (8, 3), (64, 60), (64, 1)])
def test_threads_follow_what_the_machine_has_free(most: int, free: int, library: Any) -> None:
    machine = Machine(library, most)
    _, threads = machine.run(most, 0.1)
    assert threads == most  # nobody else is there
    machine.run(free, 1.0)
    busy, threads = machine.run(free, 4.0)
    assert free / 2 < threads <= max(1, free)
    best = machine.work / 2 ** int(np.log2(free)) + 1e-5
    assert busy < 1.1 * best  # trials cost little
    machine.run(most, 1.0)
    quiet, threads = machine.run(most, 1.0)
    assert threads == most
    assert quiet < 1.01 * (machine.work / most + 1e-5)


def test_a_single_wait_leaves_the_threads_as_they_are(library: Any) -> None:
    crew = library.Crew()
    for i in range(20):
        assert crew.size(i * 1e-3, 2) == 2
        crew.report(i * 1e-3, 2, 2e-4, 4e-4)
    crew.report(0.02, 2, 2e-3, 4e-4)
    assert crew.size(0.02, 2) == 2


def test_loops_that_gain_nothing_from_threads_get_one(library: Any) -> None:
    """Such as those that are too short to be divided."""
    crew, together = library.Crew(), 0
    for i in range(100_000):
        if crew.size(i * 1e-5, 2) == 2:
            crew.report(i * 1e-5, 2, 5e-5, 4e-5)
            together += 1
    assert 0 < together < 1000
    assert crew.size(1, 1) == 1
