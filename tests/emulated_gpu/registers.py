"""How many registers a kernel needs: NVRTC compiles its source once more, to machine code.

CuPy is asked for PTX, which has no registers yet. So each source that it compiles is kept beside the PTX's digest; a
launch that needs to know has it compiled for the emulated device's compute capability, with CuPy's own options.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import struct
from pathlib import Path
from types import ModuleType
from typing import Any

from emulated_gpu.build import cache, locked


def digest(ptx: str) -> str:
    return hashlib.sha256(ptx.encode()).hexdigest()[:24]


def record_sources(compiler: ModuleType) -> None:
    """Have ``cupy.cuda.compiler`` keep what it compiles: its own cache on disk skips compiling the next time."""
    program = compiler._NVRTCProgram
    compile_ = program.compile

    @functools.wraps(compile_)
    def compile_and_record(self: Any, options: tuple[str, ...] = (), log_stream: Any = None) -> Any:
        compiled, mapping = compile_(self, options, log_stream)
        if self.method == "ptx":
            made = {"source": self.src, "options": list(options), "names": list(self.name_expressions or ())}
            write(source_file(text_of(compiled)), json.dumps(made))
        return compiled, mapping

    program.compile = compile_and_record


def text_of(ptx: bytes) -> str:
    return ptx.rstrip(b"\0").decode()


def source_file(ptx: str) -> Path:
    return cache() / "sources" / f"{digest(ptx)}.json"


def write(path: Path, text: str) -> None:
    """All of the file or nothing, for others who look."""
    if path.exists():
        return
    path.parent.mkdir(exist_ok=True)
    made = path.with_suffix(f".{os.getpid()}")
    made.write_text(text)
    os.replace(made, path)


def registers(ptx: str, capability: int) -> dict[str, int]:
    """Of each kernel in ``ptx``, by its name."""
    source = source_file(ptx)
    known = cache() / "registers" / f"{source.stem}-{capability}.json"
    if not known.exists():
        if not source.exists():
            raise RuntimeError(
                f"emulated GPU: the source of a kernel is not in {source.parent}, since CuPy's cache is older than it; "
                "delete the emulated device's cache"
            )
        known.parent.mkdir(exist_ok=True)
        with locked(known.with_suffix(".lock")):
            if not known.exists():
                write(known, json.dumps(count(json.loads(source.read_text()), capability)))
    found: dict[str, int] = json.loads(known.read_text())
    return found


def count(made: dict[str, Any], capability: int) -> dict[str, int]:
    """Compile a recorded source to machine code and read the registers of its kernels."""
    from cupy_backends.cuda.libs import nvrtc

    kept = [option for option in made["options"] if not option.startswith(("-arch", "--gpu-architecture", "--pch"))]
    program = nvrtc.createProgram(made["source"], "", (), ())
    try:
        for name in made["names"]:
            nvrtc.addNameExpression(program, name)
        nvrtc.compileProgram(program, (*kept, f"-arch=sm_{capability}"))
        return registers_in(nvrtc.getCUBIN(program))
    finally:
        with contextlib.suppress(Exception):
            nvrtc.destroyProgram(program)


def registers_in(cubin: bytes) -> dict[str, int]:
    """A cubin has a section ".text.KERNEL" for each kernel, whose info field has the registers in its highest byte."""
    start, entry, count = *struct.unpack_from("<Q", cubin, 0x28), *struct.unpack_from("<HH", cubin, 0x3A)
    (names_index,) = struct.unpack_from("<H", cubin, 0x3E)
    (names,) = struct.unpack_from("<Q", cubin, start + names_index * entry + 24)
    found = {}
    for i in range(count):
        name, info = struct.unpack_from("<I40xI", cubin, start + i * entry)
        first = names + name
        text = cubin[first : cubin.index(b"\0", first)].decode()
        if text.startswith(".text."):
            found[text.removeprefix(".text.")] = info >> 24
    return found
