"""cuBLAS and cuBLASLt of the emulated device, and stubs of the other libraries that CuPy links.

The dynamic loader uses a loaded library of the same SONAME, and nvmath-python looks up functions among loaded
libraries first. So ours are loaded before CuPy. Functions that CuPy or nvmath-python name and that are not emulated are
stubs: a call reports the name as a fault.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import re
import subprocess
from collections import defaultdict
from pathlib import Path

import numpy as np

from emulated_gpu.build import HERE, build

# CuPy's modules that link a library of CUDA; NVRTC is the real one.
CUPY = (
    "cupy_backends/cuda/libs/cublas",
    "cupy_backends/cuda/libs/curand",
    "cupy_backends/cuda/libs/cusolver",
    "cupy_backends/cuda/libs/cusparse",
    "cupy/cuda/cufft",
)
# nvmath-python's modules that look up functions by name.
NVMATH = {"cublas": "nvmath/bindings/_internal/cublas", "cublasLt": "nvmath/bindings/_internal/cublasLt"}
EMULATED = {"cublas": "blas.cpp", "cublasLt": "blas_lt.cpp"}

# Each library's status for unsupported functions; cuRAND has none, so its status is "launch failure".
NOT_SUPPORTED = {
    "cublas": 15,
    "cublasLt": 15,
    "curand": 201,
    "cusolver": 9,
    "cusparse": 10,
    "cufft": 16,
    "nvJitLink": 1,
}

# emulated_lt of blas_lt.cpp.
SWITCHES = np.dtype(
    [
        ("lacks", "u4", 8),
        ("relu_of_nan", "i4"),
        ("whole_bias", "i4"),
        ("whole_sums", "i4"),
        ("microseconds", "i4", 9),
        ("version", "i4"),
    ]
)

STUBS = """
#include "device.h"
#include <string>
static int missing(const char* name) {
    emulated_fault((std::string(name) + " is not emulated").c_str());
    return STATUS;
}
"""
STUB = 'extern "C" __attribute__((weak)) int NAME() { return missing("NAME"); }\n'
STUB_OF_TEXT = 'extern "C" __attribute__((weak)) const char* NAME() { return missing("NAME"), "not emulated"; }\n'


def load(cuda_major: int) -> dict[str, ctypes.CDLL]:
    """Load all libraries for CUDA ``cuda_major``, after the device's; the keys are names without "lib"."""
    loaded = {}
    for soname, names in functions(cuda_major).items():
        library = soname.removeprefix("lib").partition(".")[0]
        stubs = STUBS.replace("STATUS", str(NOT_SUPPORTED[library]))
        for name in sorted(names):
            stubs += (STUB_OF_TEXT if name.endswith(("String", "Name")) else STUB).replace("NAME", name)
        sources: list[Path | str] = [stubs]
        if library in EMULATED:
            sources.append(HERE / EMULATED[library])
        # The symbols have the SONAME as their version, as CuPy's modules require.
        named = (f"-Wl,-soname,{soname}", "-Wl,--default-symver", "-Wl,-Bsymbolic")
        path = build(soname, sources, (*fast(), f"-DCUDA_MAJOR={cuda_major}", *named))
        loaded[library] = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    return loaded


def switches(library: ctypes.CDLL | None = None) -> np.ndarray:
    """The switches for errors and slow algorithms in cuBLASLt (see blas_lt.cpp), by default of the loaded library."""
    library = ctypes.CDLL(None) if library is None else library
    memory = (ctypes.c_ubyte * SWITCHES.itemsize).in_dll(library, "emulated_lt")
    return np.frombuffer(memory, SWITCHES)[0]


def functions(cuda_major: int) -> dict[str, set[str]]:
    """The names of the functions that CuPy and nvmath-python need, by SONAME."""
    asked: dict[str, set[str]] = defaultdict(set)
    for module in CUPY:
        symbols = run("nm", "-D", "--undefined-only", str(module_file(module)))
        for name, soname in re.findall(r" U (cu\w+)@(lib\w+\.so\.\d+)$", symbols, re.MULTILINE):
            asked[soname].add(name)
    if f"libcublas.so.{cuda_major}" not in asked:
        raise RuntimeError(
            f"emulated GPU: the installed CuPy asks for {', '.join(sorted(asked))}, not for CUDA {cuda_major}"
        )
    for library, module in NVMATH.items():
        if importlib.util.find_spec("nvmath"):
            names = re.findall(rb"\0(%s[A-Z]\w+)(?=\0)" % library.encode(), module_file(module).read_bytes())
            asked[f"lib{library}.so.{cuda_major}"] |= {name.decode() for name in names}
    # CuPy's loader of cuSOLVER requires this library, but calls nothing in it.
    return {**asked, f"libnvJitLink.so.{cuda_major}": set()}


def module_file(module: str) -> Path:
    """The file of an extension module, found without importing its package."""
    package, _, rest = module.partition("/")
    spec = importlib.util.find_spec(package)
    for root in spec.submodule_search_locations or () if spec else ():
        for path in Path(root).parent.glob(f"{module}.cpython-*.so"):
            return path
    raise RuntimeError(f"emulated GPU: {package} has no {rest}; CuPy 14.2 and nvmath-python 1.0 are known")


@functools.cache
def fast() -> tuple[str, ...]:
    """Compiler flags for fast loops; products use fused multiply-add as on a GPU, if the processor has it."""
    avx = "avx2" in Path("/proc/cpuinfo").read_text()
    return ("-O3", "-ffp-contract=fast", *(("-march=x86-64-v3",) if avx else ()))


def run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
