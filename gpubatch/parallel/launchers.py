"""What launchers, such as mpiexec and srun, tell the processes that they start."""

from __future__ import annotations

import os
from collections.abc import Mapping

from gpubatch.errors import ArgumentError

SLURM = "SLURM_STEP_NUM_TASKS"
# The variable that has the number of processes, and the one that has the rank of each.
COUNTS = {
    "OMPI_COMM_WORLD_SIZE": "OMPI_COMM_WORLD_RANK",  # Open MPI
    "PMI_SIZE": "PMI_RANK",  # MPICH, Intel MPI, Cray MPICH, and srun --mpi=pmi2
    "MV2_COMM_WORLD_SIZE": "MV2_COMM_WORLD_RANK",  # MVAPICH2
    "MVP_COMM_WORLD_SIZE": "MVP_COMM_WORLD_RANK",  # MVAPICH from version 3 on
    "JSM_NAMESPACE_SIZE": "JSM_NAMESPACE_RANK",  # IBM's jsrun
    "FLUX_JOB_SIZE": "FLUX_TASK_RANK",
    SLURM: "SLURM_PROCID",
}
# Ranks by launchers that do not say how many there are: any that speaks PMIx, such as prterun, and HPE's PALS; with the
# words in the version of an MPI library that gets the number from such a launcher itself.
UNCOUNTED = {"PMIX_RANK": "Open MPI", "PALS_RANKID": "CRAY MPICH"}
# How many of the processes are on this machine.
LOCAL = "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS", "PMI_LOCAL_SIZE", "PALS_LOCAL_SIZE"
VARIABLES = (*COUNTS, *COUNTS.values(), *UNCOUNTED, *LOCAL)


def launched(variables: Mapping[str, str]) -> int | None:
    """How many processes a launcher started, by the variables that it sets; None if it does not say, 1 without one."""
    if found := counts_in(variables):
        return max(found.values())
    return None if least_in(variables) > 1 or any(name in variables for name in UNCOUNTED) else 1


def launched_rank(variables: Mapping[str, str]) -> int:
    """Which of the processes this is by the launcher's variables, counted from 0; 0 without a launcher."""
    if launched(variables) == 1:
        return 0
    found = counts_in(variables)
    names = [COUNTS[max(found, key=lambda name: found[name])]] if found else [*UNCOUNTED, *COUNTS.values()]
    return next((int(variables[name]) for name in names if variables.get(name, "").isdecimal()), 0)


def check_world(size: int, library: str, variables: Mapping[str, str]) -> None:
    """Raise ArgumentError unless the ``size`` processes that MPI connects can be all that the launcher started.

    library: the version of the MPI library.
    """
    found, count, least = counts_in(variables), launched(variables), least_in(variables)
    if count is not None:
        right = count == 1 or (size > 1 and (size > count or size in found.values()))
    elif size > 1:
        right = size >= least
    else:  # one process by a launcher that does not count, if the library can know
        by = [words for name, words in UNCOUNTED.items() if name in variables]
        right = least <= 1 and (not by or any(words in library for words in by))
    if right:
        return
    told = (
        f"{count} processes" if count else f"at least {least} processes" if least > 1 else "perhaps several processes"
    )
    shown = ", ".join(f"{name}={variables[name]}" for name in VARIABLES if name in variables)
    raise ArgumentError(
        f"a launcher started {told} ({shown}), but {library} connects {size if size > 1 else 'none'} of them, so that "
        "they would train apart: start them with the mpiexec of that library, or with srun --mpi= and what it speaks "
        "(srun --mpi=list), or install mpi4py for the launcher's MPI; a process that is to train alone takes no ranks, "
        "or gb.Ranks(mpi4py.MPI.COMM_SELF)"
    )


def counts_in(variables: Mapping[str, str]) -> dict[str, int]:
    """The number of processes, by the variable that says it."""
    found = {name: int(variables[name]) for name in COUNTS if variables.get(name, "").isdecimal()}
    if SLURM in found and len(found) > 1:
        # Either srun started this process itself, or mpiexec, of which the processes of srun are a part: one a machine.
        own = variables.get("SLURM_TASK_PID") == str(os.getpid())
        return {name: count for name, count in found.items() if (name == SLURM) == own}
    return found


def least_in(variables: Mapping[str, str]) -> int:
    """How many processes there must be at least, by ranks and the processes of this machine."""
    ranks = [int(variables[name]) for name in (*UNCOUNTED, *COUNTS.values()) if variables.get(name, "").isdecimal()]
    local = [int(variables[name]) for name in LOCAL if variables.get(name, "").isdecimal()]
    return max((*local, *(rank + 1 for rank in ranks)), default=1)
