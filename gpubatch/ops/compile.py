"""The texts of kernels and what they become: machine code from the build, CUDA kernels compiled on first use."""

from __future__ import annotations

import functools
import hashlib
import importlib.machinery
import importlib.util
import os
import sys
import warnings
from typing import Any

import numpy as np

from gpubatch.backend import Backend, CudaBackend, compute_dtype
from gpubatch.errors import ArgumentError, CompilerWarning
from gpubatch.formula import Activation, ScoreLoss, Trace

# The C type of every element type in which samples, targets or parameters may be stored.
C_TYPES = {
    "bool": "bool",
    "int8": "signed char",
    "int16": "short",
    "int32": "int",
    "int64": "long long",
    "uint8": "unsigned char",
    "uint16": "unsigned short",
    "uint32": "unsigned int",
    "uint64": "unsigned long long",
    "float16": "Half",
    "float32": "float",
    "float64": "double",
}
COMPUTED = ("float32", "float64")  # the types of arithmetic
MOST_CPU_THREADS = 256  # of kernels/threads.h
# What the build compiles _host from, beside the formulas.
HOST_SOURCES = (
    "half.cuh",
    "host.cpp",
    "host_formulas.h",
    "host_kernels.cpp",
    "host_kernels.h",
    "host_loops.h",
    "host_math.h",
    "host_simd.h",
    "math.cuh",
    "permutation.cuh",
    "philox.cuh",
    "threads.h",
)

PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


# --- texts -----------------------------------------------------------------------------------------------------------


@functools.cache
def kernel_source(name: str) -> str:
    """The text of a file of ``kernels/``: inside the package when installed, beside it in a checkout."""
    folders = [os.path.join(folder, "kernels") for folder in (PACKAGE, os.path.dirname(PACKAGE))]
    for folder in folders:
        if os.path.isfile(path := os.path.join(folder, name)):
            with open(path, encoding="utf-8") as file:
                return file.read()
    raise FileNotFoundError(f"{name} is in none of {', '.join(folders)}; the installation is incomplete")


@functools.cache
def source_of(dtype: str, *files: str, before: str = "") -> str:
    """The CUDA source of files of ``kernels/`` for arrays of ``dtype``, with ``before`` in front of the last one."""
    types = [f"typedef {C_TYPES[compute_dtype(np.dtype(dtype)).name]} T;", f"typedef {C_TYPES[dtype]} S;"]
    shared = [kernel_source(name) for name in ("math.cuh", "last_block.cuh", "block.cuh", *files[:-1])]
    return "\n".join([kernel_source("half.cuh"), *types, *shared, before, kernel_source(files[-1])])


def scalars_source(name: str, scalars: tuple[float, ...]) -> str:
    """The scalars of a formula as an initializer: as part of the source they take no memory on the device."""
    return f"#define {name} {{{', '.join(f'T({float(x)!r})' for x in scalars or (0.0,))}}}"


def formula_digest(trace: Trace) -> str:
    """The name of an update rule's compiled form: a digest of all that the form depends on."""
    text = "\n".join(
        [
            *trace.arrays,
            *(of_pass.trace.c for of_pass in trace.passes),
            str(len(trace.scalars)),
            kernel_source("math.cuh"),
        ]
    )
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@functools.cache
def elementwise_digest(declared: Activation | ScoreLoss) -> str:
    """As :func:`formula_digest`, for an activation or a loss of single scores."""
    text = [declared.source(dtype, "F") for dtype in COMPUTED]
    return hashlib.sha256("\n".join([*text, kernel_source("math.cuh")]).encode()).hexdigest()[:16]


def host_digest() -> str:
    """A digest of the sources of ``_host``, which has that of those it was built from."""
    return hashlib.sha256("\n".join(map(kernel_source, HOST_SOURCES)).encode()).hexdigest()[:16]


# --- kernels ---------------------------------------------------------------------------------------------------------


@functools.cache
def host_library() -> Any:
    """The kernels compiled for the CPU, on at most ``GPUBATCH_THREADS`` threads, or in words why there are none."""
    if switched_off("GPUBATCH_HOST"):
        return "switched off by GPUBATCH_HOST=0"
    if importlib.util.find_spec("gpubatch._host") is not None:
        try:
            library = importlib.import_module("gpubatch._host")
        except ImportError as error:
            return f"cannot be loaded: {error}"
        if why := outdated(library):
            warnings.warn(f"NumPy does the work of the compiled kernels: {why}", CompilerWarning, stacklevel=2)
            return why
        library.set_threads(wanted_threads(library.threads()))
        return library
    if installed := installed_elsewhere():
        why = (
            f"those of the gpubatch in {installed} are not used: Python imports the source tree in "
            f"{os.path.dirname(PACKAGE)}; start it in another folder, or install that tree with pip install -e"
        )
        warnings.warn(f"NumPy does the work of the compiled kernels: {why}", CompilerWarning, stacklevel=2)
        return why
    return "not built: no C++ compiler was found when gpubatch was installed"


def outdated(library: Any) -> str | None:
    """In words that ``_host`` was built from other sources than those of the checkout; outside of one, None."""
    tree = os.path.dirname(PACKAGE)
    if (
        not os.path.isfile(os.path.join(tree, "kernels", "host.cpp"))
        or getattr(library, "sources", None) == host_digest()
    ):
        return None
    return f"{library.__file__} was built from other sources than those in {tree}; install them with pip install -e"


def installed_elsewhere() -> str | None:
    """The folder of a gpubatch with compiled kernels that another one hides, as Python does in a clone."""
    folders = [os.path.join(folder, "gpubatch") for folder in sys.path]
    found = importlib.machinery.PathFinder.find_spec("_host", folders)
    return None if found is None or found.origin is None else os.path.dirname(found.origin)


# What launchers call the number of processes of this machine: MPICH and Intel MPI, Open MPI, MVAPICH, torchrun.
LOCAL_SIZES = "MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE", "LOCAL_WORLD_SIZE"


def wanted_threads(processors: int) -> int:
    """The most threads of a loop on the CPU: ``GPUBATCH_THREADS``, or as many as there are processors.

    ``OMP_NUM_THREADS`` bounds the latter: joblib sets it in its processes, which share the processors. So do those that
    a launcher starts on a machine, unless it has given each its own.
    """
    if processors == os.cpu_count():
        together = next((n for name in LOCAL_SIZES if (n := os.environ.get(name, "")).isdecimal() and int(n)), "1")
        processors = max(1, processors // int(together))
    openmp = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    bound = int(openmp) if openmp.isdecimal() and int(openmp) else MOST_CPU_THREADS
    value = os.environ.get("GPUBATCH_THREADS") or str(min(processors, bound, MOST_CPU_THREADS))
    if not value.isdecimal() or not 1 <= int(value) <= MOST_CPU_THREADS:
        raise ArgumentError(f"GPUBATCH_THREADS must be an integer from 1 to {MOST_CPU_THREADS}, got {value!r}")
    return int(value)


def switched_off(variable: str) -> bool:
    """Whether an environment variable is "0"; unset, empty and "1" mean on."""
    value = os.environ.get(variable) or "1"
    if value not in ("0", "1"):
        raise ArgumentError(f"{variable} must be 0 or 1, got {value!r}")
    return value == "0"


@functools.cache
def cuda_kernel(backend: Backend, source: str, name: str) -> Any:
    """The kernel ``name`` of ``source``, compiled on first use: ``kernel(grid, block, arguments)`` launches it."""
    assert isinstance(backend, CudaBackend)
    return backend.compile(source, name)
