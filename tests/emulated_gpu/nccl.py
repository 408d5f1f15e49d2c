"""NCCL of the emulated device, loaded before CuPy looks for NVIDIA's."""

from __future__ import annotations

import ctypes
import re

from emulated_gpu.blas import STUB, STUBS, module_file, run
from emulated_gpu.build import HERE, build

NOT_SUPPORTED = 5  # "invalid usage"


def load() -> ctypes.CDLL:
    """Load it; functions that CuPy calls and that are not emulated are stubs, which report their name as a fault."""
    symbols = run("nm", "-D", "--undefined-only", str(module_file("cupy_backends/cuda/libs/nccl")))
    stubs = STUBS.replace("STATUS", str(NOT_SUPPORTED))
    for name in sorted(set(re.findall(r" U (nccl\w+)", symbols))):
        stubs += STUB.replace("NAME", name)
    path = build("libnccl.so.2", [stubs, HERE / "nccl.cpp"], ("-Wl,-soname,libnccl.so.2", "-Wl,-Bsymbolic"))
    return ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
