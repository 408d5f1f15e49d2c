"""Run a test on several ranks: threads of this process, or processes that mpiexec starts."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from needs import missing

import gpubatch as gb

T = TypeVar("T")
LIMIT = 120  # seconds that a program on several processes may take: some start on a busy machine


def on_threads(size: int, run: Callable[[gb.Ranks], T], exact: bool = True) -> list[T]:
    """What ``run`` returns on each of so many ranks; an error on one ends the others, and is raised."""
    found: list[Any] = [None] * size
    errors: list[BaseException] = []

    def one(ranks: gb.Ranks) -> None:
        try:
            found[ranks.rank] = run(ranks)
        except BaseException as error:
            errors.append(error)  # the first is the cause of the others
            ranks._engine.abort(f"rank {ranks.rank}: {error!r}")

    every = [threading.Thread(target=one, args=[ranks]) for ranks in gb.Ranks.of_threads(size, exact)]
    for thread in every:
        thread.start()
    for thread in every:
        thread.join()
    if errors:
        raise errors[0]
    return found


def neighbours(terms: Sequence[np.ndarray]) -> np.ndarray:
    """((0 + 1) + (2 + 3)) + ...: the sum of the first 2^k terms, as many as can be, and that of the others."""
    if len(terms) == 1:
        return terms[0]
    half = 1 << ((len(terms) - 1).bit_length() - 1)
    return neighbours(terms[:half]) + neighbours(terms[half:])


def mpi(size: int, program: str, *arguments: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a program, Python's text, on so many processes, ended after ``LIMIT`` seconds; skip the test without MPI.

    With ``check`` it must end well.
    """
    here = Path(sys.executable).parent / "mpiexec"
    mpiexec = str(here) if here.exists() else shutil.which("mpiexec")
    if importlib.util.find_spec("mpi4py") is None or mpiexec is None:
        missing("parallel", "mpi4py or an MPI is not installed (pip install 'gpubatch[parallel]' mpich)")
    options = ["--oversubscribe"] if "Open MPI" in version(mpiexec) else []
    variables = {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")])),
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "GPUBATCH_THREADS": "1",
    }
    done = subprocess.run(
        [mpiexec, *options, "-n", str(size), sys.executable, "-c", program, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=LIMIT,
        env={**os.environ, **variables},
        check=False,
    )
    assert not check or done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done


def version(mpiexec: str) -> str:
    return subprocess.run([mpiexec, "--version"], capture_output=True, text=True, check=True, timeout=LIMIT).stdout
