"""A CUDA device in main memory, on which the real CuPy, nvmath-python and NVRTC run; see README.md."""

from __future__ import annotations

import os
import sys

from emulated_gpu.options import Options

__all__ = ["VARIABLE", "Options", "faults", "install", "installed", "mend"]

VARIABLE = "EMULATED_GPU"  # has the options, for the processes that this one starts


def install(options: Options) -> None:
    """Put CuPy on the emulated device as soon as it is imported, here and in the processes that this one starts."""
    from emulated_gpu import loader

    loader.install(options)


def installed() -> Options | None:
    """The options of the emulated device that CuPy runs on, or will run on."""
    return Options.parse(os.environ[VARIABLE]) if VARIABLE in os.environ else None


def faults() -> list[str]:
    """What the tested program did wrong since the last call, a sentence each."""
    runtime = sys.modules.get("emulated_gpu.device")
    return runtime.faults() if runtime else []


def mend() -> None:
    """Let the devices work again after a fault, for which CUDA needs a new process."""
    runtime = sys.modules.get("emulated_gpu.device")
    if runtime:
        runtime.mend()
