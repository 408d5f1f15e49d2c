"""Ranks: sums are a binary tree of neighbours, with the same bits on all ranks, by threads and by MPI.

The expected sum is the tree of the documentation, written as a recursion over the halves.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NoReturn

import numpy as np
import pytest
from families import drawn
from hypothesis import strategies as st
from many_ranks import mpi, neighbours, on_threads
from needs import missing

import gpubatch as gb
from gpubatch.backend import CudaBackend
from gpubatch.parallel import engines, launched, launched_rank, launchers, ranks as module
from gpubatch.parallel.nccl import Nccl

MPICH, OPEN_MPI, CRAY = "MPICH Version:      5.0.2", "Open MPI v5.0.11", "MPI VERSION    : CRAY MPICH version 8.1"
PID = str(os.getpid())


def values(rank: int, size: int, dtype: str) -> np.ndarray:
    """Numbers of very different sizes, so that another order of the sum has other bits."""
    draw = np.random.default_rng([rank, size])
    return (draw.normal(size=size) * 10.0 ** draw.integers(-6, 7, size)).astype(dtype)


def digest(x: np.ndarray) -> str:
    return hashlib.sha256(x.tobytes()).hexdigest()


@drawn(
    15,
    300,
    ranks=st.integers(1, 9),
    size=st.sampled_from([0, 1, 2, 3, 7, 64, 1000, 1001]) | st.integers(0, 3000),
    dtype=st.sampled_from(["float32", "float64"]),
    small=st.sampled_from([0, 1 << 10, 1 << 30]),
)
def test_a_sum_is_the_tree_of_neighbours(ranks: int, size: int, dtype: str, small: int) -> None:
    expected = neighbours([values(rank, size, dtype) for rank in range(ranks)])

    def sums(r: gb.Ranks) -> np.ndarray:
        flat = values(r.rank, size, dtype)
        assert r.sum_(flat) is flat
        if (used := r._pieces.get("cpu")) is not None:
            assert (
                used.nbytes
                <= r.sum_bytes(size, dtype)
                <= used.nbytes + (2 * module.ALIGNED + 1) * flat.itemsize * ranks
            )
        return flat

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "SMALL", small)
        for found in on_threads(ranks, sums):
            assert found.dtype == dtype
            assert digest(found) == digest(expected)


def test_an_order_other_than_the_tree_has_other_bits() -> None:
    """So the tests of the tree can fail."""
    terms = [values(rank, 1000, "float32") for rank in range(8)]
    assert digest(sum(terms)) != digest(neighbours(terms)) != digest(neighbours(terms[1:] + terms[:1]))


def test_what_ranks_agree_on() -> None:
    def talk(r: gb.Ranks) -> tuple[object, ...]:
        r.barrier()
        return r.size, r.most([r.rank, -r.rank, 0.5]), r.share({"epoch": 3, "of": [r.rank, "ß"]}), r.local

    assert on_threads(3, talk) == [(3, [2.0, 0.0, 0.5], {"epoch": 3, "of": [0, "ß"]}, rank) for rank in range(3)]
    assert on_threads(1, talk) == [(1, [0.0, 0.0, 0.5], {"epoch": 3, "of": [0, "ß"]}, 0)]
    assert talk(gb.Ranks()) == on_threads(1, talk)[0]
    values = [None, "ß", {"a": [1.5]}]
    assert on_threads(3, lambda r: r.gather(values[r.rank])) == [values] * 3
    assert gb.Ranks().gather({"a": 1}) == [{"a": 1}]


def test_the_sum_of_the_engine_itself() -> None:
    terms = [values(rank, 100, "float64") for rank in range(3)]
    for found in on_threads(3, lambda r: r.sum_(values(r.rank, 100, "float64")), exact=False):
        np.testing.assert_allclose(found, sum(terms), rtol=1e-12)


def test_what_cannot_be_summed_or_shared() -> None:
    ranks = gb.Ranks()
    with pytest.raises(gb.errors.DTypeError, match="flat must be float32 or float64, got float16"):
        ranks.sum_(np.zeros(3, np.float16))
    for x in (np.zeros((2, 2), np.float32), np.zeros(4, np.float32)[::2]):
        with pytest.raises(gb.errors.ShapeError, match="flat must be contiguous and one-dimensional"):
            ranks.sum_(x)
    with pytest.raises(
        gb.errors.ArgumentError, match=r"values must be a list of numbers .* rank 0 has, got \[1\.0, nan\]"
    ):
        ranks.most([1.0, float("nan")])


def test_what_one_rank_cannot_say_is_an_error_on_all() -> None:
    """Nobody waits for it in vain, and the next call is a good one."""

    def talk(r: gb.Ranks) -> list[str]:
        told = []
        for say, error in (
            (lambda: r.most([1.0, float("nan") if r.rank == 1 else 2.0]), gb.errors.ArgumentError),
            (lambda: r.share({1, 2}), gb.errors.DTypeError),
            (lambda: r.gather({1, 2} if r.rank == 2 else 1), gb.errors.DTypeError),
            (lambda: r.sum_(np.zeros(5 + (r.rank == 1))), gb.errors.ArgumentError),
        ):
            with pytest.raises(error) as caught:
                say()
            told.append(str(caught.value))
        assert r.most([r.rank]) == [2.0]
        return told

    for rank, (most, share, gather, sizes) in enumerate(on_threads(3, talk)):
        given = ", got [1.0, nan]" if rank == 1 else ""
        assert most == f"values must be a list of numbers and not NaN, which rank 1 has{given}"
        assert share.startswith("value must be what JSON can hold, got {1, 2}")
        assert share.endswith(", on rank 0")
        assert gather.endswith(", on rank 2")
        assert "arrays must be of the same size on all ranks" in sizes


def test_memory_that_one_rank_lacks_for_a_sum_is_an_error_on_all() -> None:
    def sums(r: gb.Ranks) -> str:
        small = r.sum_(np.ones(10))
        scratch = r._scratch
        if r.rank == 1:
            r._scratch = lambda backend, dtype, size: raising(MemoryError("no room"))()  # type: ignore[method-assign]
        with pytest.raises(MemoryError) as caught:
            r.sum_(np.ones(100_000))
        r._scratch = scratch  # type: ignore[method-assign]
        assert small.tolist() == r.sum_(np.ones(10)).tolist() == [2.0] * 10
        assert (r.sum_(np.ones(100_000)) == 2).all()
        return str(caught.value)

    assert on_threads(2, sums) == ["out of memory (on rank 1)", "no room"]


def test_ranks_that_were_closed_are_not_used() -> None:
    with gb.Ranks() as ranks:
        pass
    ranks.close()  # one process has nothing to free

    def use(r: gb.Ranks) -> str:
        with r:
            r.barrier()
        with pytest.raises(gb.errors.ArgumentError, match=r"ranks must not be used after close\(\)"):
            r.sum_(np.ones(3))
        return repr(r)

    assert on_threads(2, use) == [f"Ranks(rank={rank}, size=2, closed)" for rank in range(2)]


def test_what_is_no_communicator() -> None:
    with pytest.raises(gb.errors.DTypeError, match="comm must be a communicator of mpi4py or None, got int"):
        gb.Ranks(3)


def test_ranks_need_no_module_that_windows_lacks() -> None:
    program = (
        "import sys; sys.modules['fcntl'] = sys.modules['termios'] = None\n"
        "from gpubatch.parallel.engines import until_read; until_read(sys.stderr)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_rank_that_ends_ends_all(capsys: pytest.CaptureFixture[str]) -> None:
    ended = []

    def work(r: gb.Ranks) -> None:
        if r.rank == 1:
            with pytest.raises(SystemExit, match="1"):
                r.abort(ValueError("no such file"))
        else:
            with pytest.raises(RuntimeError, match="rank 1 of 3 ended all: ValueError: no such file"):
                r.sum_(np.zeros(5))
            ended.append(r.rank)

    on_threads(3, work)
    assert sorted(ended) == [0, 2]
    assert capsys.readouterr().err == "gpubatch: rank 1 of 3 ended all: ValueError: no such file\n"


# What a launcher says: of how many processes, and of which of them; None where it does not say how many there are.
# Then the worlds of MPI that are right with that, as (size, library), and those that are not.
LAUNCHED: dict[str, tuple[dict[str, str], int | None, int, list[Any], list[Any]]] = {
    "none": ({}, 1, 0, [(1, MPICH)], []),
    "one of mpiexec": ({"PMI_SIZE": "1", "PMI_RANK": "0", "MPI_LOCALNRANKS": "1"}, 1, 0, [(1, MPICH)], []),
    "one of Open MPI's": ({"OMPI_COMM_WORLD_SIZE": "1", "PMIX_RANK": "0"}, 1, 0, [(1, MPICH), (1, OPEN_MPI)], []),
    "MPICH": ({"PMI_SIZE": "4", "PMI_RANK": "2", "MPI_LOCALNRANKS": "4"}, 4, 2, [(4, MPICH)], [(1, OPEN_MPI)]),
    "Open MPI": (
        {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1", "PMIX_RANK": "1"},
        *(2, 1, [(2, OPEN_MPI)], [(1, MPICH), (1, OPEN_MPI)]),
    ),
    "MVAPICH 2": ({"MV2_COMM_WORLD_SIZE": "3", "MV2_COMM_WORLD_RANK": "2"}, 3, 2, [(3, MPICH)], [(1, MPICH)]),
    "MVAPICH 3": ({"MVP_COMM_WORLD_SIZE": "3", "MVP_COMM_WORLD_RANK": "2"}, 3, 2, [(3, MPICH)], [(1, MPICH)]),
    "jsrun": ({"JSM_NAMESPACE_SIZE": "6", "JSM_NAMESPACE_RANK": "5"}, 6, 5, [(6, OPEN_MPI)], [(1, OPEN_MPI)]),
    "Flux": ({"FLUX_JOB_SIZE": "2", "FLUX_TASK_RANK": "1"}, 2, 1, [(2, MPICH)], [(1, MPICH), (1, OPEN_MPI)]),
    "PMIx, rank 0": (
        {"PMIX_RANK": "0", "PMIX_NAMESPACE": "a@1"},
        None,
        0,
        [(1, OPEN_MPI), (2, OPEN_MPI)],
        [(1, MPICH)],
    ),
    "PMIx, rank 1": ({"PMIX_RANK": "1"}, None, 1, [(2, OPEN_MPI)], [(1, OPEN_MPI), (1, MPICH)]),
    "PALS, rank 0": ({"PALS_RANKID": "0", "PALS_LOCAL_SIZE": "1"}, None, 0, [(1, CRAY), (8, MPICH)], [(1, MPICH)]),
    "PALS, rank 0 of 2": ({"PALS_RANKID": "0", "PALS_LOCAL_SIZE": "2"}, None, 0, [(2, CRAY)], [(1, CRAY)]),
    "PALS and PMIx": ({"PALS_RANKID": "0", "PMIX_RANK": "0"}, None, 0, [(4, MPICH), (1, OPEN_MPI)], [(1, MPICH)]),
    "Cray's PMI": ({"PMI_SIZE": "8", "PMI_RANK": "3", "PALS_RANKID": "3"}, 8, 3, [(8, CRAY)], [(1, CRAY), (1, MPICH)]),
    "one of several here": ({"MPI_LOCALNRANKS": "2", "MPI_LOCALRANKID": "0"}, None, 0, [(2, MPICH)], [(1, MPICH)]),
    "srun": (
        {"SLURM_STEP_NUM_TASKS": "8", "SLURM_NTASKS": "8", "SLURM_PROCID": "5"},
        *(8, 5, [(8, MPICH), (12, MPICH)], [(1, MPICH), (1, OPEN_MPI), (2, MPICH)]),
    ),
    "srun --mpi=pmix": (
        {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0", "PMIX_RANK": "0", "PMIX_NAMESPACE": "slurm.pmix.7.0"},
        *(2, 0, [(2, OPEN_MPI)], [(1, OPEN_MPI), (1, MPICH)]),
    ),
    "srun -n 1": ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, 1, 0, [(1, MPICH)], []),
    "a batch script of Slurm": (
        {"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_JOB_ID": "7"},
        1,
        0,
        [(1, MPICH)],
        [],
    ),
    "srun without its count": ({"SLURM_NTASKS": "8", "SLURM_PROCID": "3"}, None, 3, [(8, MPICH)], [(1, MPICH)]),
    # mpiexec has srun start one process on each machine, and has its own inherit what that says.
    "mpiexec by srun": (
        {"PMI_SIZE": "4", "PMI_RANK": "3", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"},
        4,
        3,
        [(4, MPICH)],
        [(1, MPICH)],
    ),
    "one of mpiexec by srun": ({"PMI_SIZE": "1", "PMI_RANK": "0", "SLURM_STEP_NUM_TASKS": "2"}, 1, 0, [(1, MPICH)], []),
    # What an mpiexec further out said is inherited, too.
    "srun in mpiexec -n 1": (
        {"PMI_SIZE": "1", "PMI_RANK": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "2", "SLURM_TASK_PID": PID},
        *(4, 2, [(4, OPEN_MPI)], [(1, MPICH), (1, OPEN_MPI)]),
    ),
    "mpiexec in that of another": (
        {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0", "PMI_SIZE": "2", "PMI_RANK": "1"},
        *(2, 1, [(2, MPICH)], [(1, MPICH), (1, OPEN_MPI)]),
    ),
    "fewer in more of another": (
        {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3", "PMI_SIZE": "2", "PMI_RANK": "1"},
        *(4, 3, [(2, MPICH), (4, OPEN_MPI)], [(1, MPICH), (3, MPICH)]),
    ),
    "no numbers": ({"PMI_SIZE": "", "SLURM_STEP_NUM_TASKS": "8(x2)", "PMI_RANK": "-1"}, 1, 0, [(1, MPICH)], []),
}


@pytest.fixture
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*launchers.VARIABLES, "SLURM_TASK_PID"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("no_launcher")
@pytest.mark.parametrize("launcher", LAUNCHED)
def test_processes_that_a_launcher_started_never_train_apart(launcher: str, monkeypatch: pytest.MonkeyPatch) -> None:
    variables, count, rank, right, wrong = LAUNCHED[launcher]
    assert (launched(variables), launched_rank(variables)) == (count, rank)
    assert wrong or count == 1
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    for size, library in [*right, *wrong]:
        fake = SimpleNamespace(
            COMM_WORLD=SimpleNamespace(Get_size=lambda size=size: size),
            Get_library_version=lambda library=library: f"{library}\n",
        )
        monkeypatch.setitem(sys.modules, "mpi4py", SimpleNamespace(MPI=fake))
        monkeypatch.setattr(engines, "MPI", lambda comm: SimpleNamespace(rank=0, size=comm.Get_size(), local=0))
        monkeypatch.setattr(gb.Ranks, "_end_all_on_error", lambda self: None)
        monkeypatch.setattr(engines, "WORLDS", [])
        if (size, library) in right:
            assert gb.Ranks().size == size
            continue
        with pytest.raises(gb.errors.ArgumentError, match=r"a launcher started .* they would train apart") as caught:
            gb.Ranks()
        assert f"{library} connects {'none' if size == 1 else size} of them" in str(caught.value)
        assert all(
            f"{name}={value}" in str(caught.value) for name, value in variables.items() if name in launchers.VARIABLES
        )


def test_every_launcher_is_in_the_table() -> None:
    of = [variables for variables, *_ in LAUNCHED.values()]
    for name in (*launchers.COUNTS, *launchers.UNCOUNTED):
        assert any(name in variables for variables in of), name


@pytest.mark.usefixtures("no_launcher")
@pytest.mark.parametrize("variables", [{"PMI_SIZE": "4"}, {"PMIX_RANK": "0"}])
def test_several_processes_without_mpi_are_an_error(variables: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(ImportError, match=r"a launcher started .*processes.* pip install 'gpubatch\[parallel\]' mpich"):
        gb.Ranks()


# --- by MPI -----------------------------------------------------------------------------------------------------------

SUMS = """
import sys
import gpubatch as gb, numpy as np
from gpubatch.parallel import ranks as module
from test_ranks import digest, values
from many_ranks import neighbours
ranks = gb.Ranks()
assert (ranks.size, ranks.local) == (int(sys.argv[1]), ranks.rank), ranks
for module.SMALL in (0, 1 << 15):
    for size in (0, 1, 2, 3, 5, 1000, 1003, 100_003):
        for dtype in ("float32", "float64"):
            found = ranks.sum_(values(ranks.rank, size, dtype))
            terms = [values(rank, size, dtype) for rank in range(ranks.size)]
            assert digest(found) == digest(neighbours(terms)), (size, dtype)
assert ranks.most([ranks.rank, -ranks.rank]) == [ranks.size - 1, 0]
assert ranks.share(["a", 1, None] if ranks.rank == 0 else object()) == ["a", 1, None]
assert ranks.gather("x" * ranks.rank) == ["x" * r for r in range(ranks.size)]
fast = gb.Ranks(exact=False).sum_(values(ranks.rank, 100, "float64"))
np.testing.assert_allclose(fast, sum(values(r, 100, "float64") for r in range(ranks.size)), rtol=1e-12)
ranks.barrier()
every = ranks.gather(ranks.rank)
if ranks.rank == 0:
    print(every)
"""


@pytest.mark.exhaustive
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_sums_by_mpi(size: int) -> None:
    assert mpi(size, SUMS, size).stdout == f"{[*range(size)]}\n"


# --- on GPUs ----------------------------------------------------------------------------------------------------------


def raising(error: Exception) -> Callable[[], NoReturn]:
    def do() -> NoReturn:
        raise error

    return do


def gpus(count: int) -> list[CudaBackend]:
    """So many devices; the test is skipped where there are fewer."""
    if f"cuda:{count - 1}" not in gb.available_backends():
        missing("gpu", f"{count} CUDA devices are needed here")
    found = [gb.get_backend(f"cuda:{index}") for index in range(count)]
    return [device for device in found if isinstance(device, CudaBackend)]


@pytest.mark.gpu
@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("small", [0, 1 << 15])
def test_sums_on_gpus_are_the_tree_too_and_can_be_captured(
    size: int, dtype: str, small: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices = gpus(size)
    monkeypatch.setattr(module, "SMALL", small)

    def sums(r: gb.Ranks) -> None:
        device = devices[r.rank]
        with device.own_stream():
            for count in (64 * size, 1003, 3):
                terms = [values(rank, count, dtype) for rank in range(size)]
                flat = device.asarray(terms[r.rank])
                assert r.sum_(flat) is flat
                assert digest(device.to_numpy(flat)) == digest(neighbours(terms))
                graph = device.capture(lambda flat=flat: r.sum_(flat))
                for _ in range(2):
                    flat.set(terms[r.rank])
                    graph.launch()
                    assert digest(device.to_numpy(flat)) == digest(neighbours(terms))
            if size > 1:
                assert r.owned(device)[1].nbytes <= r.sum_bytes(64 * size, dtype) + r.sum_bytes(1003, dtype)

    on_threads(size, sums)


@pytest.mark.gpu
def test_a_sum_that_needs_more_memory_is_not_captured() -> None:
    devices = gpus(2)

    def sums(r: gb.Ranks) -> None:
        device = devices[r.rank]
        with device.own_stream():
            r.sum_(device.zeros(100, "float32"))
            large = device.zeros(100_000, "float32")
            with pytest.raises(gb.errors.CaptureError, match="bytes of memory were asked for during a capture"):
                device.capture(lambda: r.sum_(large))

    on_threads(2, sums)


@pytest.mark.gpu
def test_the_sum_of_nccl_itself() -> None:
    devices = gpus(2)
    terms = [values(rank, 1000, "float64") for rank in range(2)]
    for found in on_threads(2, lambda r: r.sum_(devices[r.rank].asarray(terms[r.rank])).get(), exact=False):
        np.testing.assert_allclose(found, sum(terms), rtol=1e-12)


@pytest.mark.gpu
def test_two_ranks_on_one_gpu_are_refused() -> None:
    device = gpus(1)[0]

    def refused(r: gb.Ranks) -> None:
        with pytest.raises(gb.errors.ArgumentError, match=r"ranks 0 and 1 have the same GPU .*: start as many ranks"):
            r.sum_(device.zeros(3, "float32"))

    on_threads(2, refused)


@pytest.mark.gpu
def test_ranks_without_nccl_say_so_on_all(monkeypatch: pytest.MonkeyPatch) -> None:
    device = gpus(1)[0]
    lacking = gb.BackendUnavailableError("GPUs cannot be connected: CuPy finds no NCCL.", "libraries missing", "pip.")
    own = type(device)(device.cupy, device.index, "")
    monkeypatch.setattr(own, "nccl", raising(lacking), raising=False)

    def refused(r: gb.Ranks) -> None:
        with pytest.raises(gb.BackendUnavailableError, match=("On rank 1: " if r.rank == 0 else "") + "GPUs cannot be"):
            Nccl(r._engine, own if r.rank == 1 else device, r.gather)  # type: ignore[arg-type]

    on_threads(2, refused)


ON_GPUS = """
import gpubatch as gb
from many_ranks import neighbours
from test_ranks import digest, values
ranks = gb.Ranks()
device = gb.get_backend("cuda")
assert device.spec == gb.get_backend("auto").spec == f"cuda:{ranks.local}", device.spec
for size in (3, 1003, 100_003):
    terms = [values(rank, size, "float32") for rank in range(ranks.size)]
    assert digest(ranks.sum_(device.asarray(terms[ranks.rank])).get()) == digest(neighbours(terms)), size
print(f"rank {ranks.rank} done\\n", end="")
"""


@pytest.mark.gpu
@pytest.mark.exhaustive
@pytest.mark.parametrize("size", [2, 4])
def test_each_process_sums_on_a_gpu_of_its_own(size: int) -> None:
    gpus(size)
    assert sorted(mpi(size, ON_GPUS).stdout.splitlines()) == [f"rank {rank} done" for rank in range(size)]


@pytest.mark.exhaustive
def test_messages_of_the_program_are_not_taken_for_those_of_a_sum() -> None:
    program = """
import gpubatch as gb, numpy as np
from mpi4py import MPI
ranks, other = gb.Ranks(), 1 - MPI.COMM_WORLD.Get_rank()
request = MPI.COMM_WORLD.Isend(np.full(2, 7.0), other, 5)
found, own = ranks.sum_(np.ones(2)), np.zeros(2)
MPI.COMM_WORLD.Recv(own, other, 5)
request.Wait()
assert (found.tolist(), own.tolist()) == ([2.0, 2.0], [7.0, 7.0])
"""
    mpi(2, program)


@pytest.mark.exhaustive
def test_a_program_may_finalize_mpi() -> None:
    mpi(2, "import gpubatch as gb; from mpi4py import MPI; gb.Ranks().barrier(); MPI.Finalize()")


MANY = """
import threading
import gpubatch as gb, numpy as np
from gpubatch.parallel import engines
from mpi4py import MPI
made = []
for give in (lambda: None, lambda: MPI.COMM_WORLD.Dup()):
    before = threading.active_count()
    for number in range(100):
        comm = give()
        if number % 2 or comm is not None:
            with gb.Ranks(comm) as ranks:
                assert ranks.sum_(np.ones(3)).tolist() == [2.0] * 3
        else:
            ranks = gb.Ranks()
            assert ranks.most([ranks.rank]) == [1.0]
        assert threading.active_count() <= before + 3, threading.enumerate()
        assert len(engines.WORLDS) <= 3
        if comm is not None:
            comm.Free()
        if ranks.rank == number % 2:  # the other rank lets go of them only when it makes new ones
            del ranks
# More than an MPI has of them at once.
for _ in range(1100):
    ranks = gb.Ranks()
ranks.barrier()
assert len(engines.WORLDS) <= 3  # the first, by which an exception ends all, and two that were made last
"""


@pytest.mark.exhaustive
def test_ranks_that_nobody_holds_are_freed() -> None:
    """Threads and communicators do not grow with the number of ranks that were made."""
    mpi(2, MANY)


@pytest.mark.exhaustive
@pytest.mark.parametrize("sizes", [(5, 6), (5, 10_000), (10_000, 10_064), (5, 60_000)])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_arrays_of_different_sizes_are_never_summed(sizes: tuple[int, int], turned: bool, dtype: str) -> None:
    """All ends with an error, also where one needs more memory than before."""
    program = """
import sys
import gpubatch as gb, numpy as np
ranks = gb.Ranks()
ranks.sum_(np.ones(50_000))
ranks.sum_(np.ones(int(sys.argv[1 + ranks.rank]), sys.argv[3 if ranks.rank else 4]))
print("summed")
"""
    done = mpi(2, program, *(sizes[::-1] if turned else sizes), dtype, "float64", check=False)
    assert done.returncode != 0
    assert "ArgumentError: arrays must be of the same size and dtype on all ranks" in done.stderr
    assert "summed" not in done.stdout


# --- faults -----------------------------------------------------------------------------------------------------------

FAILS = """
import sys
import gpubatch as gb, numpy as np
ranks = gb.Ranks()
if ranks.rank == 1:
    {how}
ranks.sum_(np.zeros(1000))
"""


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("raise ValueError('no such file')", "gpubatch: rank 1 of 3 ended all: ValueError: no such file"),
        ("ranks.abort('the disk is full')", "gpubatch: rank 1 of 3 ended all: the disk is full"),
        # A library whose own end hangs.
        (
            "ranks._engine._given = type('', (), {'Abort': lambda *_: sum(range(10**12))})(); "
            "ranks.abort('it is late')",
            "gpubatch: rank 1 of 3 ended all: it is late",
        ),
        ("raise KeyboardInterrupt", "gpubatch: rank 1 of 3 ended all: KeyboardInterrupt"),
        ("import os; os.kill(os.getpid(), 9)", ""),
    ],
    ids=["an exception", "abort", "an abort that hangs", "Ctrl-C", "killed"],
)
def test_a_process_that_fails_ends_all(how: str, why: str) -> None:
    done = mpi(3, FAILS.format(how=how), check=False)
    assert done.returncode != 0
    assert why in done.stderr


@pytest.mark.exhaustive
def test_a_launcher_of_another_mpi_is_an_error() -> None:
    """The processes find no others, where they would each train alone."""
    program = "import os; os.environ['OMPI_COMM_WORLD_SIZE'] = '4'; import gpubatch as gb; gb.Ranks()"
    done = mpi(1, program, check=False)
    assert "ArgumentError: a launcher started 4 processes (OMPI_COMM_WORLD_SIZE=4" in done.stderr


@pytest.mark.exhaustive
def test_without_a_launcher_mpi_is_not_imported() -> None:
    program = "import sys, gpubatch as gb; gb.Ranks(); print('mpi4py' in sys.modules)"
    clean = {name: value for name, value in os.environ.items() if name not in launchers.VARIABLES}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=clean)
    assert done.stdout == "False\n"
