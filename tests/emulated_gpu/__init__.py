"""A CUDA device in main memory, on which the real CuPy, nvmath-python and NVRTC run; see README.md."""

from __future__ import annotations

import os
import sys

from emulated_gpu.options import Options

__all__ = ["VARIABLE", "Options", "faults", "install", "installed", "mend"]

VARIABLE = "EMULATED_GPU"  # holds the options, for child processes


def install(options: Options) -> None:
    """Make CuPy run on the emulated device when it is imported, in this process and its children."""
    from emulated_gpu import loader

    loader.install(options)


def installed() -> Options | None:
    """The options of the emulated device on which CuPy runs or will run; None without one."""
    return Options.parse(os.environ[VARIABLE]) if VARIABLE in os.environ else None


def faults() -> list[str]:
    """The errors of the tested program since the last call, a sentence each."""
    runtime = sys.modules.get("emulated_gpu.device")
    return runtime.faults() if runtime else []


def mend() -> None:
    """Reset the devices after a fault; CUDA would need a new process."""
    runtime = sys.modules.get("emulated_gpu.device")
    if runtime:
        runtime.mend()
