"""Write the C++ source of every update rule for the CPU: ``python kernels/generate_host.py OUTPUT``, at build time.

One function for each formula as it was recorded, in float and double, found at run time by the formula's own text: a
library that was built from another version of a formula does not have it, and NumPy runs it instead.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gpubatch import rules
from gpubatch.formula import Rule, Trace
from gpubatch.launch import host_symbol, kernel_source

HEAD = """
#include <cmath>
using std::sqrt; using std::exp; using std::log; using std::tanh; using std::fabs; using std::pow;
#define __device__

// One version for each width of SIMD, chosen when the library is loaded.
#if defined(__x86_64__) && defined(__gnu_linux__)
#define EVERY_WIDTH __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define EVERY_WIDTH
#endif
"""


def traces(rule: Rule) -> Iterator[Trace]:
    """The formula in all its variants; where two are the same, both."""
    choices = [(True, False) if isinstance(v, bool) else ("outside", "inside", "hat") for v in rule.options.values()]
    for decay in ("", "coupled", *(["decoupled"] if "lr" in rule.hyper else [])):
        for values in itertools.product(*choices):
            yield rule.trace(decay, **dict(zip(rule.options, values, strict=True)))


def function(trace: Trace, dtype: str) -> str:
    """The loop over one formula, for rows ``first`` to ``last`` of a table of pieces."""
    kinds = {a: "const T" if a == "g" else "T" for a in trace.arrays}
    width = len(trace.arrays) + 1  # of a row: addresses, then a size; see piece_table in gpubatch/launch.py
    pointers = [
        f"{kind}* __restrict__ {a}_at = reinterpret_cast<{kind}*>(row[{i}]);"
        for i, (a, kind) in enumerate(kinds.items())
    ]
    body = [
        *(f"{kind} {a} = {a}_at[i];" for a, kind in kinds.items()),
        *trace.c.splitlines(),
        *(f"{a}_at[i] = {a};" for a in trace.targets),
    ]
    lines = [
        f'extern "C" EVERY_WIDTH void {host_symbol(trace, dtype)}(',
        "    const long long* table, const T* scalars, long long first, long long last) {",
        f"    T k[{max(1, len(trace.scalars))}];",
        f"    for (int s = 0; s < {len(trace.scalars)}; ++s) k[s] = scalars[s];",
        f"    for (const long long* row = table + {width} * first; row < table + {width} * last; row += {width}) {{",
        *(f"        {line}" for line in pointers),
        f"        for (long long i = 0; i < row[{width - 1}]; ++i) {{",
        *(f"            {line}" for line in body),
        "        }",
        "    }",
        "}",
    ]
    return "\n".join(lines)


def source() -> str:
    """The whole file."""
    every = [trace for name in rules.__all__ for trace in traces(getattr(rules, name))]
    parts = [HEAD]
    for dtype, name in (("float32", "float"), ("float64", "double")):
        functions = {host_symbol(trace, dtype): function(trace, dtype) for trace in every}
        parts += [f"namespace {dtype} {{\ntypedef {name} T;\n{kernel_source('math.cuh')}", *functions.values(), "}"]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(source())
