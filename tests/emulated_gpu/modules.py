"""Modules: PTX to a library with its kernels, compiled on first use."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from . import build as builder, ptx as reader, translate as translator
from .translate import Kernel

HERE = Path(__file__).parent
FLAGS = ("-fwrapv", "-fno-exceptions", "-fno-math-errno", "-fno-trapping-math", "-w")


@dataclass(frozen=True)
class Module:
    """A compiled PTX text."""

    library: ctypes.CDLL
    kernels: dict[str, Kernel]
    variables: dict[str, tuple[str, int]]  # name: (symbol, size)


def build(ptx: str) -> Module:
    """The module of a PTX text; ``UnknownPTX`` names an instruction that the emulated GPU does not have."""
    executor()
    description = builder.cache() / f"module-{_digest(ptx)}.json"
    if not description.exists():
        translation = translator.translate(reader.read(ptx))
        library = builder.build("module", [translation.source], FLAGS)
        told = {
            "library": library.name,
            "kernels": {name: asdict(kernel) for name, kernel in translation.kernels.items()},
            "variables": translation.variables,
        }
        text = description.with_suffix(f".{os.getpid()}")
        text.write_text(json.dumps(told))
        os.replace(text, description)
    told = json.loads(description.read_text())
    kernels = {}
    for name, kernel in told["kernels"].items():
        kernels[name] = Kernel(**{**kernel, "parameters": tuple(tuple(p) for p in kernel["parameters"])})
    variables = {name: (symbol, size) for name, (symbol, size) in told["variables"].items()}
    return Module(ctypes.CDLL(str(builder.cache() / told["library"])), kernels, variables)


@functools.cache
def executor() -> ctypes.CDLL:
    """The library that runs blocks, where the modules' libraries find it."""
    return ctypes.CDLL(str(builder.build("block", [HERE / "block.cpp"])), mode=ctypes.RTLD_GLOBAL)


@functools.cache
def _sources() -> bytes:
    """What a description depends on besides the PTX."""
    files = [*sorted(HERE.glob("*.h")), *(HERE / f"{name}.py" for name in ("ptx", "translate", "modules", "build"))]
    return b"\0".join(file.read_bytes() for file in files) + builder.compiler().encode()


def _digest(ptx: str) -> str:
    return hashlib.sha256(_sources() + ptx.encode()).hexdigest()[:24]
