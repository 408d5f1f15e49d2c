"""Count the registers of a kernel by compiling its source again, to machine code.

CuPy compiles to PTX here, which does not fix the number of registers. So each source is saved under the digest of its
PTX. A launch that needs the number compiles the source for the device's compute capability, with CuPy's options.
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
    """Make ``cupy.cuda.compiler`` save each source that it compiles, since CuPy's disk cache may skip the next time."""
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
    """Write a file atomically, unless it exists."""
    if path.exists():
        return
    path.parent.mkdir(exist_ok=True)
    made = path.with_suffix(f".{os.getpid()}")
    made.write_text(text)
    os.replace(made, path)


def registers(ptx: str, capability: int) -> dict[str, int]:
    """The registers of each kernel in ``ptx``, by name."""
    source = source_file(ptx)
    known = cache() / "registers" / f"{source.stem}-{capability}.json"
    if not known.exists():
        if not source.exists():
            raise RuntimeError(
                f"emulated GPU: {source.parent} lacks the source of a kernel, because CuPy's cache is older; "
                "delete the emulated device's cache"
            )
        known.parent.mkdir(exist_ok=True)
        with locked(known.with_suffix(".lock")):
            if not known.exists():
                write(known, json.dumps(count(json.loads(source.read_text()), capability)))
    found: dict[str, int] = json.loads(known.read_text())
    return found


def count(made: dict[str, Any], capability: int) -> dict[str, int]:
    """Compile a saved source to machine code, and read the registers of its kernels."""
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
    """The registers of each kernel in a cubin: the highest byte of the info field of section ".text.KERNEL"."""
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
