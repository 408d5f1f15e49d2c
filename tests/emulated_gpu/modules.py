"""Modules: PTX to a library with its kernels, compiled on first use."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import json
import os
import shutil
import tempfile
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

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
    told = json.loads(description.read_text()) if description.exists() else {}
    if not told or not (builder.cache() / told["library"]).exists():
        told = _made(ptx)
        text = description.with_suffix(f".{os.getpid()}.{threading.get_ident()}")
        text.write_text(json.dumps(told))
        os.replace(text, description)
    kernels = {}
    for name, kernel in told["kernels"].items():
        kernels[name] = Kernel(**{**kernel, "parameters": tuple(tuple(p) for p in kernel["parameters"])})
    variables = {name: (symbol, size) for name, (symbol, size) in told["variables"].items()}
    return Module(_loaded(builder.cache() / told["library"], anew=bool(variables)), kernels, variables)


def _made(ptx: str) -> dict[str, Any]:
    """Translates and compiles; what is to be known of the module."""
    translation = translator.translate(reader.read(ptx))
    return {
        "library": builder.build("module", [translation.source], FLAGS).name,
        "kernels": {name: asdict(kernel) for name, kernel in translation.kernels.items()},
        "variables": translation.variables,
    }


def _loaded(library: Path, anew: bool) -> ctypes.CDLL:
    """``anew``: with variables of its own, though the library was loaded before; the loader asks for another file."""
    if not anew:
        return ctypes.CDLL(str(library))
    with tempfile.TemporaryDirectory() as folder:
        return ctypes.CDLL(str(shutil.copy(library, folder)))


@functools.cache
def executor() -> ctypes.CDLL:
    """The library that runs blocks, where the modules' libraries find it."""
    return ctypes.CDLL(str(builder.build("block", [HERE / "block.cpp"])), mode=ctypes.RTLD_GLOBAL)


@functools.cache
def _sources() -> bytes:
    """What a description depends on besides the PTX."""
    files = [
        *sorted(HERE.glob("*.h")),
        *(HERE / f"{name}.py" for name in ("ptx", "operation", "instructions", "translate", "modules", "build")),
    ]
    return b"\0".join(file.read_bytes() for file in files) + builder.compiler().encode()


def _digest(ptx: str) -> str:
    return hashlib.sha256(_sources() + ptx.encode()).hexdigest()[:24]
