"""CUDA without a GPU: sources compiled by NVRTC for real architectures, and run on the host, thread after thread.

The emulated grid has blocks and threads and nothing else: kernels that synchronise within a block cannot run on it.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import shutil
import subprocess
import tempfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from needs import missing

PRELUDE = """
#include <cmath>
#include <cstddef>
using std::sqrt; using std::exp; using std::log; using std::tanh; using std::fabs; using std::pow;
#define __global__
#define __device__
struct Index { unsigned x, y, z; };
static Index gridDim, blockDim, blockIdx, threadIdx;
static inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return (unsigned long long)(((unsigned __int128)a * b) >> 64);
}
"""

DRIVER = """
extern "C" void emulate({parameters}, unsigned blocks, unsigned threads) {{
    gridDim = {{blocks, 1, 1}};
    blockDim = {{threads, 1, 1}};
    for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x)
        for (threadIdx.x = 0; threadIdx.x < threads; ++threadIdx.x) {kernel}({arguments});
}}
"""


@functools.cache
def host_kernel(source: str, kernel: str, *parameters: str) -> ctypes._CFuncPtr:
    """``kernel`` of a CUDA source as a host function of ``parameters`` (C declarations), blocks and threads."""
    compiler = shutil.which("g++") or shutil.which("clang++") or missing("compiler", "no C++ compiler is installed")
    arguments = ", ".join(p.split()[-1].lstrip("*") for p in parameters)
    text = PRELUDE + source + DRIVER.format(parameters=", ".join(parameters), kernel=kernel, arguments=arguments)
    folder = Path(tempfile.mkdtemp(prefix="gpubatch-emulate-"))
    name = hashlib.sha1(text.encode()).hexdigest()
    (folder / f"{name}.cpp").write_text(text)
    # No contraction of a*b + c, as in NumPy; the kernels look at one buffer through two types, as CUDA allows.
    flags = ["-std=c++17", "-O1", "-Wall", "-Werror", "-ffp-contract=off", "-fno-strict-aliasing", "-shared", "-fPIC"]
    command = [compiler, *flags, f"{folder}/{name}.cpp", "-o", f"{folder}/{name}.so"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    library = ctypes.CDLL(f"{folder}/{name}.so")
    shutil.rmtree(folder)
    function = library.emulate
    function.restype = None
    return function


@functools.cache
def _nvrtc() -> ctypes.CDLL:
    try:
        files = distribution("nvidia-cuda-nvrtc-cu12").files or []
    except PackageNotFoundError:
        missing("nvrtc", "NVRTC is not installed (pip install nvidia-cuda-nvrtc-cu12)")
    found = [f for f in files if f.name.startswith("libnvrtc.so")]
    return ctypes.CDLL(str(found[0].locate()))


def check_compiles(source: str, architecture: int) -> None:
    """Compile ``source`` for sm_``architecture`` as CuPy would; errors and warnings fail."""
    nvrtc = _nvrtc()
    program = ctypes.c_void_p()
    assert nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None) == 0
    options = [f"--gpu-architecture=sm_{architecture}".encode(), b"--std=c++17", b"--ftz=true"]
    result = nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
    size = ctypes.c_size_t()
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    # That NVRTC will drop an old architecture some day says nothing about the source.
    text = "\n".join(line for line in log.value.decode().splitlines() if line and "are deprecated" not in line)
    assert (result, text) == (0, ""), f"sm_{architecture}: {text}"
