"""Replace the CUDA runtime that CuPy's wheels link statically by our functions.

The wheels keep their symbol tables, so each function of the runtime is found by name. Its first instructions are
overwritten by a jump to our function, or to a stub that reports that the function is not emulated.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import mmap
import os
import platform
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

VERSION = "14.2"
WHEELS = {"cupy-cuda12x": 12, "cupy-cuda13x": 13}
# Functions that only return text; they need no device.
KEPT = ("cudaGetErrorName", "cudaGetErrorString")
JUMP = 12  # bytes


def cupy_wheel() -> tuple[str, str, int]:
    """(distribution, version, CUDA version) of the installed CuPy; raises RuntimeError for an unknown one."""
    for name, cuda in WHEELS.items():
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if not version.startswith(VERSION + "."):
            raise RuntimeError(f"emulated GPU: knows CuPy {VERSION}, but {name} {version} is installed")
        return name, version, cuda
    raise RuntimeError(f"emulated GPU: needs cupy-cuda12x or cupy-cuda13x, version {VERSION}; neither is installed")


def lay_over(module: Path, library: ctypes.CDLL) -> None:
    """Replace CUDA's runtime in ``module``, a loaded extension module, by the functions of ``library``."""
    if platform.machine() != "x86_64":
        raise RuntimeError(f"emulated GPU: knows x86_64, this machine is {platform.machine()}")
    there = {name: place for name, place in functions(module) if re.match(r"cuda[A-Z]\w*$", name)}
    ours = {name for name, _ in functions(Path(library._name)) if re.match(r"cuda[A-Z]\w*$", name)}
    if lacking := ours - there.keys():
        raise RuntimeError(f"emulated GPU: {module.name} lacks {', '.join(sorted(lacking))}; CuPy {VERSION} is known")
    base = base_of(module)
    unknown = Stubs(library)
    for name, (offset, size) in there.items():
        if name in KEPT:
            continue
        if size < JUMP:
            raise RuntimeError(
                f"emulated GPU: {name} in {module.name} has {size} bytes, less than the {JUMP} of a jump"
            )
        write_jump(base + offset, address_of(library, name) if name in ours else unknown.add(name))


def functions(path: Path) -> Iterator[tuple[str, tuple[int, int]]]:
    """(name, (offset, size)) of the functions that a shared library defines, from its ELF symbol tables."""
    data = path.read_bytes()
    if data[:6] != b"\x7fELF\x02\x01":
        raise RuntimeError(f"emulated GPU: {path} is no 64-bit ELF file")
    start, entry, count = *struct.unpack_from("<Q", data, 0x28), *struct.unpack_from("<HH", data, 0x3A)
    # For each section: kind (2 and 11: symbols), offset, size, and the index of the section with the names.
    sections = [struct.unpack_from("<4xI16xQQI", data, start + i * entry) for i in range(count)]
    for kind, offset, size, names in sections:
        if kind not in (2, 11):
            continue
        for at in range(offset, offset + size, 24):
            name, info, section, value, length = struct.unpack_from("<IBxHQQ", data, at)
            if info & 15 == 2 and section:
                first = sections[names][1] + name
                yield data[first : data.index(b"\0", first)].decode(), (value, length)


def base_of(module: Path) -> int:
    """The base address of a loaded library."""
    real = os.path.realpath(module)
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(real):
            return int(line.partition("-")[0], 16)
    raise RuntimeError(f"emulated GPU: {module} is not loaded")


def address_of(library: ctypes.CDLL, name: str) -> int:
    return ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0


def write_jump(at: int, target: int) -> None:
    """Replace the instructions at an address by a jump to another."""
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    first = at // mmap.PAGESIZE * mmap.PAGESIZE
    span = ctypes.c_void_p(first), ctypes.c_size_t(at + JUMP - first)
    if protect(*span, mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC):
        raise OSError(ctypes.get_errno(), "emulated GPU: the system does not let CuPy's runtime be replaced")
    jump = b"\x48\xb8" + target.to_bytes(8, "little") + b"\xff\xe0"  # mov rax, target; jmp rax
    ctypes.memmove(at, jump, JUMP)
    protect(*span, mmap.PROT_READ | mmap.PROT_EXEC)


class Stubs:
    """Functions that call ``emulated_unknown`` with their name; never freed, since CuPy may call them at any time."""

    SIZE = 32
    ROOM = 1 << 16
    KEPT: ClassVar[list[object]] = []

    def __init__(self, library: ctypes.CDLL) -> None:
        self._code = mmap.mmap(-1, self.ROOM, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
        self._start = ctypes.addressof(ctypes.c_char.from_buffer(self._code))
        self._used = 0
        self._target = address_of(library, "emulated_unknown")
        self.KEPT.append(self)

    def add(self, name: str) -> int:
        """Create the stub of ``name``; return its address."""
        text = ctypes.create_string_buffer(name.encode())
        self.KEPT.append(text)
        where = self._start + self._used
        code = b"\x48\xbf" + ctypes.addressof(text).to_bytes(8, "little")  # mov rdi, name
        code += b"\x48\xb8" + self._target.to_bytes(8, "little") + b"\xff\xe0"
        ctypes.memmove(where, code, len(code))
        self._used += self.SIZE
        return where
