"""Registers, shared memory and spills of every CUDA kernel: ``python tests/kernel_report.py [ARCHITECTURE ...]``.

NVRTC compiles them as CuPy would; no device is needed. A kernel that spills a register ends it with an error.
"""

from __future__ import annotations

import sys

from emulate import ARCHITECTURES, check_compiles
from ops_cases import CASES
from optimizer_table import CASES as RULES, trace_of

from gpubatch.cuda_ops import source_of
from gpubatch.launch import update_source


def sources() -> dict[str, str]:
    """What to compile, by a name; cases that share a source once."""
    named = {source: name for name, case in reversed(CASES.items()) for source in [case.source("float32")]}
    rules = {f"update {name}": update_source(trace_of(case)[0]) for name, case in RULES.items()}
    half = {"update adam, float16, master": update_source(trace_of(RULES["adam"])[0], "float32", "float16", True)}
    others = {"transpose": source_of("float32", "transpose.cu")}
    return {name: source for source, name in reversed(named.items())} | rules | half | others


def main(architectures: list[int]) -> None:
    """One line for each kernel and architecture."""
    for name, source in sources().items():
        for architecture in architectures:
            for report in check_compiles(source, architecture):
                print(f"{report}  ({name})", flush=True)


if __name__ == "__main__":
    main([int(a) for a in sys.argv[1:]] or list(ARCHITECTURES))
