"""CUDA without a GPU: NVRTC compiles the sources to machine code, and g++ compiles them to run on the host.

The emulated grid runs one thread after another. It has shared memory, barriers, warp exchanges and atomics, all that
our kernels use. It cannot show the weaker memory ordering of a device, contraction of a*b + c, and speed. A kernel that
spins until another thread writes would spin for ever. tests/test_emulate.py has the faults known to be caught.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import re
import shutil
import struct
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import numpy as np
from emulated_gpu.build import cache, compiler, locked
from needs import missing

HEADERS = Path(__file__).parent / "emulated"
ARCHITECTURES = (70, 80, 90, 100, 120)  # Volta, Ampere, Hopper, Blackwell for data centres and for desktops
REGISTERS = 65536  # per multiprocessor, on each of these architectures
ORDERS = ("forward", "reverse")  # the order in which blocks, and threads of a block, take turns

# The source is in a namespace, so that its inline functions may have shared arrays.
PROGRAM = """#include "{header}"
namespace {{
#line 1 "kernel.cu"
{source}
}}
#line 1 "arguments"
static void call_kernel() {{
    {declarations}
    {kernel}({names});
}}
"""


@functools.cache
def host_kernel(source: str, kernel: str, *parameters: str) -> Callable[..., None]:
    """A kernel of a CUDA source, compiled for the CPU: ``run(*arguments, blocks, threads, order="forward")``.

    ``parameters`` are C declarations. An argument is an array, a number or a ctypes object; ``blocks`` is a number or
    (x, y). ``order="reverse"`` starts with the last thread and block: if a missing barrier makes the result depend on
    the order, one of the two is wrong. A deadlock of threads raises AssertionError.
    """
    launch = ctypes.CDLL(_built(source, kernel, parameters, "-shared", "-fPIC")).emulate
    launch.restype = ctypes.c_char_p

    def run(*arguments: Any, order: str = "forward") -> None:
        *values, blocks, threads = arguments
        assert len(values) == len(parameters), f"{len(values)} arguments for {kernel}({', '.join(parameters)})"
        x, y = blocks if isinstance(blocks, tuple) else (blocks, 1)
        packed = b"".join(_value(v) for v in values)
        error = launch(packed, x, y, threads, ORDERS.index(order))
        assert error is None, f"{kernel}: {error.decode()}"

    return run


@dataclass(frozen=True)
class Table:
    """An argument of ``sanitized``: an int64 array of addresses within ``arrays``."""

    words: np.ndarray
    arrays: Sequence[np.ndarray]


def sanitized(
    source: str,
    kernel: str,
    parameters: Sequence[str],
    arguments: Sequence[Any],
    blocks: int | tuple[int, int],
    threads: int,
    order: str = "forward",
) -> list[np.ndarray]:
    """Run a kernel as ``host_kernel`` does, under the address and undefined-behaviour sanitizers; return the results.

    The kernel works on copies of the arrays, which are returned in the order of ``arguments``; a ``Table`` contributes
    its arrays. An access outside an array, a misaligned access and a signed overflow raise AssertionError with the
    sanitizer's report.
    """
    assert len(arguments) == len(parameters), f"{len(arguments)} arguments for {kernel}({', '.join(parameters)})"
    arrays: list[np.ndarray] = []
    tables = []
    packed = b""
    for argument in arguments:
        members = [argument] if isinstance(argument, np.ndarray) else []
        if isinstance(argument, Table):
            tables.append(len(arrays))
            members = [argument.words, *argument.arrays]
        packed += _value(0 if members else argument) + struct.pack("q", len(arrays) if members else -1)
        arrays += members
    assert all(a.flags.c_contiguous for a in arrays)
    x, y = blocks if isinstance(blocks, tuple) else (blocks, 1)
    parts = [struct.pack("6Q", x, y, threads, ORDERS.index(order), len(arrays), len(arguments))]
    for i, a in enumerate(arrays):
        parts += [struct.pack("3Q", a.ctypes.data, a.nbytes, i in tables), a.tobytes()]
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
    flags = ["-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fsanitize-sections=shared"]
    program = _built(source, kernel, tuple(parameters), *flags, header="sanitized.h")
    done = subprocess.run(
        [program], input=b"".join([*parts, packed]), capture_output=True, env=environment, timeout=300
    )
    assert done.returncode == 0, f"{kernel}: {done.stderr.decode()}"
    at = iter(np.cumsum([0, *(a.nbytes for a in arrays)]))
    copies = [np.frombuffer(done.stdout, a.dtype, a.size, next(at)).reshape(a.shape) for a in arrays]
    return [a for i, a in enumerate(copies) if i not in tables]


@functools.cache
def _built(source: str, kernel: str, parameters: Sequence[str], *flags: str, header: str = "grid.h") -> str:
    """The library or program of a kernel, in the cache of the emulated device: the other processes of a run, and the
    next run, find it there.
    """
    gcc = shutil.which("g++") or missing("compiler", "g++ is not installed")
    text = PROGRAM.format(
        header=header,
        source=source,
        kernel=kernel,
        declarations="\n    ".join(f"{p} = emulated::values[{i}];" for i, p in enumerate(parameters)),
        names=", ".join(p.split()[-1].lstrip("*") for p in parameters),
    )
    # No contraction of a*b + c, as in NumPy; no strict aliasing, since kernels access one buffer through two types.
    command = [gcc, "-std=c++17", "-O1", "-ffp-contract=off", "-fno-strict-aliasing", "-Wall", "-Werror", *flags]
    command.append("-U_FORTIFY_SOURCE")  # it would report a jump to another stack as a fault
    command += ["-Wno-unused-function", "-Wno-unknown-pragmas"]  # other kernels of the source, and #pragma unroll
    if re.search(r"\b__sync|_sync\(", source):
        command.append("-DSYNCHRONISES")
    command += ["-x", "c++", "-", "-I", str(HEADERS), "-o"]
    headers = (file.read_text() for file in sorted(HEADERS.iterdir()))
    digest = hashlib.sha256("\0".join([compiler(), *command, text, *headers]).encode()).hexdigest()
    built = cache() / f"{kernel}-{digest[:24]}"
    with locked(built.with_suffix(".lock")):
        if not built.exists():
            made = str(built.with_suffix(".made"))
            done = subprocess.run([*command, made], input=text, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            os.replace(made, built)
    return str(built)


def _value(argument: Any) -> bytes:
    """An argument as ``emulated::Value``."""
    if isinstance(argument, np.ndarray):
        assert argument.flags.c_contiguous
        argument = argument.ctypes.data
    x = getattr(argument, "value", argument)
    x = 0 if x is None else x  # a null pointer
    return struct.pack("Qd", int(x) % 2**64 if np.isfinite(x) else 0, x)


def launch_bounds(source: str) -> dict[str, int]:
    """The largest block of each kernel of a CUDA source: its launch bounds, otherwise 256 threads.

    256 threads fit the registers of every device, since a thread has at most 255.
    """
    names = dict(re.findall(r"\b([A-Z_]+) = (\d+)", source))
    found = re.findall(r"__global__ void\s+(?:__launch_bounds__\((\w+)(?:, 1)?\)\s+)?(\w+)\(", source)
    return {kernel: int(names.get(bound, bound or 256)) for bound, kernel in found}


@functools.cache
def _nvrtc(*packages: str) -> ctypes.CDLL:
    for package in packages:
        with contextlib.suppress(PackageNotFoundError):
            found = [f for f in distribution(package).files or [] if f.name.startswith("libnvrtc.so")]
            return ctypes.CDLL(str(found[0].locate()))
    return missing("nvrtc", f"NVRTC is not installed (pip install {packages[0]})")


def _compile(nvrtc: ctypes.CDLL, source: str, flags: Sequence[str]) -> tuple[int, str, str]:
    """(status, log, PTX) of a source."""
    program, size = ctypes.c_void_p(), ctypes.c_size_t()

    def text(size_of: Callable[..., int], get: Callable[..., int]) -> str:
        size_of(program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        get(program, buffer)
        return buffer.value.decode()

    assert nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None) == 0
    status = nvrtc.nvrtcCompileProgram(program, len(flags), (ctypes.c_char_p * len(flags))(*map(str.encode, flags)))
    log = text(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog)
    ptx = "" if status else text(nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return status, log, ptx


def ptx_of(source: str, architecture: int, *flags: str) -> str:
    """Compile ``source`` to PTX as CuPy would; the oldest target of CUDA 13's NVRTC is compute_75."""
    nvrtc = _nvrtc("nvidia-cuda-nvrtc-cu12", "nvidia-cuda-nvrtc")
    version = [ctypes.c_int(), ctypes.c_int()]
    nvrtc.nvrtcVersion(*map(ctypes.byref, version))
    oldest = 50 if version[0].value < 13 else 75
    virtual = f"--gpu-architecture=compute_{max(architecture, oldest)}"
    status, log, ptx = _compile(nvrtc, source, [virtual, "--std=c++17", *(flags or ["--ftz=true"])])
    assert status == 0, log
    return ptx


@dataclass(frozen=True)
class KernelReport:
    """The resources that a kernel needs, as ptxas reports them."""

    name: str
    architecture: int
    registers: int  # per thread
    shared_bytes: int  # per block
    stack_bytes: int  # per thread, in local memory: spilled registers and dynamically indexed arrays
    spill_bytes: int  # stores plus loads

    def registers_of(self, threads: int) -> int:
        """The registers of a block; a thread's are allocated in units of eight."""
        return -(-self.registers // 8) * 8 * threads

    def __str__(self) -> str:
        return (
            f"sm_{self.architecture:<3} {self.registers:3} registers {self.shared_bytes:6} shared"
            f" {self.stack_bytes:4} stack {self.spill_bytes:4} spilled  {self.name}"
        )


def check_compiles(source: str, architecture: int, stack: int = 0) -> tuple[KernelReport, ...]:
    """Compile ``source`` to machine code for sm_``architecture`` as CuPy would; return a report for each kernel.

    Raises AssertionError for errors, warnings, spilled registers, a stack frame above ``stack`` bytes, and a kernel
    whose largest block needs more registers than a multiprocessor has.
    """
    flags = [f"--gpu-architecture=sm_{architecture}", "--std=c++17", "--ftz=true", "--ptxas-options=-v"]
    result, log, _ = _compile(_nvrtc("nvidia-cuda-nvrtc-cu12"), source, flags)
    lines = log.splitlines()
    # Deprecation of an old architecture is no warning about the source.
    told = [
        line for line in lines if line and "are deprecated" not in line and not re.match(r"ptxas (info|   ) ", line)
    ]
    assert (result, told) == (0, []), f"sm_{architecture}: " + "\n".join(told)
    _, *kernels = "\n".join(lines).split("Compiling entry function ")
    reports = tuple(_report(text, architecture) for text in kernels)
    assert reports, f"sm_{architecture}: ptxas names no kernel: {lines}"
    bounds = launch_bounds(source)
    for report in reports:
        assert (report.spill_bytes, max(report.stack_bytes, stack)) == (0, stack), f"local memory: {report}"
        assert report.registers_of(bounds[report.name]) <= REGISTERS, f"too many registers: {report}"
    return reports


def _report(text: str, architecture: int) -> KernelReport:
    """Parse the report on a kernel, and on functions that it calls, in the output of ptxas."""

    def total(pattern: str) -> int:
        return sum(int(n) for n in re.findall(rf"(\d+) {pattern}", text))

    assert "Used" in text, text
    assert "bytes spill loads" in text, text
    return KernelReport(
        name=text.split("'")[1],
        architecture=architecture,
        registers=total("registers"),
        shared_bytes=total("bytes smem"),
        stack_bytes=total("bytes stack frame"),
        spill_bytes=total("bytes spill stores") + total("bytes spill loads"),
    )


def check_compiles_everywhere(source: str) -> list[tuple[KernelReport, ...]]:
    """``check_compiles`` for all ARCHITECTURES in parallel; NVRTC compiles without Python's lock."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(functools.partial(check_compiles, source), ARCHITECTURES))
