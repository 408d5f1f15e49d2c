"""Print registers, shared memory and spills of all CUDA kernels: ``python tests/kernel_report.py [ARCHITECTURE ...]``.

NVRTC compiles them as CuPy would; no device is needed. A kernel that spills registers raises an error.
"""

from __future__ import annotations

import sys

import numpy as np
from emulate import ARCHITECTURES, check_compiles
from ops_cases import CASES
from optimizer_table import CASES as RULES, trace_of

from gpubatch.backend import compute_dtype
from gpubatch.ops import reduce_sources, source_of, update_source
from gpubatch.ops.compile import C_TYPES
from gpubatch.ops.gather import gather_source, take_source
from gpubatch.ops.permutation import permutation_source
from gpubatch.train.graphs import step_source
from gpubatch.train.parts import parts_source

COMPUTED = ("Computed", "Drawn", "Among<Computed>", "Among<Drawn>")  # orders


def sources() -> dict[str, str]:
    """All CUDA sources by name: each kernel in each element type; a source shared by several cases appears once."""
    found: dict[str, str] = {}
    for dtype in ("float32", "float64", "float16"):
        for name, case in CASES.items():
            found.setdefault(case.source(dtype), f"{name}, {dtype}")
        found.setdefault(step_source(dtype), f"step, {dtype}")
        found.setdefault(parts_source(dtype), f"parts of callbacks, {dtype}")
        for file in ("columns.cu", "transpose.cu"):
            found.setdefault(source_of(dtype, file), f"{file}, {dtype}")
        for name, rule in RULES.items():
            for master in (False, True) if dtype == "float16" else (False,):
                stored = compute_dtype(np.dtype(dtype)).name, dtype, master
                trace, told = trace_of(rule)[0], f"{name}, {dtype}{', master' if master else ''}"
                found[update_source(trace, *stored)] = f"update {told}"
                found |= dict.fromkeys(reduce_sources(trace, *stored), f"reduce {told}")
    for stored in C_TYPES:
        for target in {stored, "uint8", "int64"}:
            for kind in ("Listed", *COMPUTED):
                found.setdefault(take_source(stored, target, kind), f"take {stored} as {target}, {kind}")
        for dtype in ("float32", "float64", "float16"):
            for kind in COMPUTED:
                found.setdefault(gather_source(dtype, stored, kind), f"gather {stored} as {dtype}, {kind}")
    found |= {permutation_source(kind): f"order, {kind}" for kind in COMPUTED}
    return {name: source for source, name in found.items()}


def main(architectures: list[int]) -> None:
    """Print a line for each kernel and architecture."""
    for name, source in sources().items():
        for architecture in architectures:
            for report in check_compiles(source, architecture):
                print(f"{report}  ({name})", flush=True)


if __name__ == "__main__":
    main([int(a) for a in sys.argv[1:]] or list(ARCHITECTURES))
