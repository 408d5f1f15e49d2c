"""Matrix products on the CPU: NumPy's OpenBLAS, in pieces on the threads of the compiled kernels.

OpenBLAS divides a product among threads of its own, which spin while they wait for one another. Beside a process that
keeps a core busy they wait for the scheduler: a product takes ten times as long as on one thread. And its last bits
depend on the number of threads. So a product is cut into pieces, by its shape alone, and OpenBLAS computes each on one
thread (kernels/host.cpp): any number of threads gives the same bits, and the pool may change it at any time. Where
OpenBLAS has code for small products, which does not copy the factors first, the pieces of layers of up to some 200
neurons are so small: in double precision they take a quarter less time, in single precision a tenth.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any, NamedTuple

import numpy as np

from gpubatch.backend import Array
from gpubatch.ops.compile import host_library

# The processors for which OpenBLAS has code for small products (its kernel/x86_64/dgemm_small_kernel_*_skylakex.c).
IN_PLACE = frozenset({"SkylakeX", "Cooperlake", "SapphireRapids"})

OPENMP = 2  # of openblas_get_parallel: its threads are not set for the process, but by each thread for itself


def multiply(a: Array, b: Array, out: Array) -> None:
    """out = a b, of two dimensions and one dtype; ``out`` is C-contiguous."""
    library = _library()
    if library is None or not (
        library.multiply(a, b, out) or library.multiply(np.ascontiguousarray(a), np.ascontiguousarray(b), out)
    ):
        np.matmul(a, b, out=out)


def multiply_in_float32(a: Array, b: Array, out: Array) -> None:
    """out = a b of float16 on the CPU, by float32 copies: BLAS is a hundred times faster than NumPy's own loop."""
    product = np.empty(out.shape, np.float32)
    multiply(a.astype(np.float32), b.astype(np.float32), product)
    out[...] = product


def cpu_products() -> str:
    """How matrix products are computed on the CPU, in words."""
    library, found = host_library(), numpy_blas()
    if isinstance(library, str):
        return "by NumPy, on as many threads as its BLAS takes"
    if isinstance(found, str):
        return f"by NumPy, on as many threads as its BLAS takes, since {found}"
    return f"by {found.version}, on the threads of the kernels"


@functools.cache
def _library() -> Any:
    """The compiled kernels with the BLAS that they call; None where NumPy multiplies by itself."""
    library, found = host_library(), numpy_blas()
    if isinstance(library, str) or isinstance(found, str):
        return None
    library.use_blas(found.addresses, found.wide, found.in_place)
    return library


class OpenBlas(NamedTuple):
    """The functions that kernels/host.cpp calls, by address.

    wide: whether their integers have 64 bits.
    in_place: whether small products are computed from the factors as they lie, and not from copies.
    """

    version: str
    addresses: list[int]
    wide: bool
    in_place: bool


@functools.cache
def numpy_blas() -> OpenBlas | str:
    """The OpenBLAS that NumPy calls, or in words why there is none to call.

    Its functions are looked up among the libraries that NumPy's module was linked with, so that another BLAS in the
    process is not taken for it.
    """
    try:
        library = ctypes.CDLL(np._core._multiarray_umath.__file__)  # type: ignore[attr-defined]
    except (AttributeError, OSError) as error:
        return f"its library cannot be opened ({error})"
    for before in ("scipy_", ""):
        for after in ("64_", ""):
            names = ["cblas_sgemm", "cblas_dgemm", "cblas_sgemv", "cblas_dgemv"]
            names += ["openblas_get_num_threads", "openblas_set_num_threads"]
            try:
                config = getattr(library, f"{before}openblas_get_config{after}")
                parallel = getattr(library, f"{before}openblas_get_parallel{after}")
                functions = [getattr(library, f"{before}{name}{after}") for name in names]
            except AttributeError:
                continue
            if parallel() == OPENMP:
                return "its OpenBLAS works by OpenMP"
            config.restype = ctypes.c_char_p
            words = config().decode().split()
            addresses = [ctypes.cast(function, ctypes.c_void_p).value or 0 for function in functions]
            in_place = not IN_PLACE.isdisjoint(words)
            return OpenBlas(" ".join(words[:2]), addresses, "USE64BITINT" in words, in_place)
    return "its BLAS is not OpenBLAS"
