"""The C++ text of formulas for the CPU, the same at build time (``kernels/generate_host.py``) and on first use."""

from __future__ import annotations

from collections.abc import Sequence

from gpubatch.formula import Activation, ScoreLoss, Trace, activation_source, score_source
from gpubatch.ops.compile import C_TYPES, kernel_source

__all__ = ["library_source", "rule_source"]


def rule_source(trace: Trace, name: str) -> str:
    """An update rule for the type T: a function of one element, and ``name``, the loop over the arrays.

    The loop works on rows ``first`` to ``last`` of a table of pieces; a row has the addresses of a piece in each array,
    then its size. ``scalars`` are the formula's, then the scale of the gradient.
    """
    # The names of the formula are parameters of a function of its own, so that they may be those of the loop, too.
    parameters = [f"const T {a}" if a == "g" else f"T& {a}" for a in trace.arrays]
    kinds = ["const T" if a == "g" else "T" for a in trace.arrays]
    elements = [f"element{i}" for i in range(len(kinds))]
    width = len(kinds) + 1
    lines = [
        f"static inline void {name}_element({', '.join(parameters)}, const T* k) {{",
        *(f"    {line}" for line in trace.c.splitlines()),
        "}",
        f"static void {name}(const Int* table, const T* scalars, Int first, Int last) {{",
        f"    T k[{max(1, len(trace.scalars))}];",
        f"    for (int s = 0; s < {len(trace.scalars)}; ++s) k[s] = scalars[s];",
        f"    const T scale = scalars[{len(trace.scalars)}];",
        f"    for (const Int* row = table + {width} * first; row < table + {width} * last; row += {width}) {{",
        *(
            f"        {kind}* __restrict__ array{i} = reinterpret_cast<{kind}*>(row[{i}]);"
            for i, kind in enumerate(kinds)
        ),
        f"        EACH_ROLLED for (Int i = 0; i < row[{len(kinds)}]; ++i) {{",
        # With scale 1 the product changes no bits.
        *(
            f"            {kind} {element} = array{i}[i]{' * scale' if a == 'g' else ''};"
            for i, (a, kind, element) in enumerate(zip(trace.arrays, kinds, elements, strict=True))
        ),
        f"            {name}_element({', '.join(elements)}, k);",
        *(f"            array{i}[i] = {elements[i]};" for i in map(trace.arrays.index, trace.targets)),
        "        }",
        "    }",
        "}",
    ]
    return "\n".join(lines)


def library_source(formulas: Sequence[Trace | Activation | ScoreLoss], dtype: str) -> str:
    """The whole text of a library of ``formulas`` for elements of ``dtype``.

    It exports ``functions``: the addresses of each formula's functions, in the order of its row in a table of
    ``kernels/host_kernels.h``, and a zero. It includes nothing, so its machine code depends on this text, the compiler
    and the compiler's options alone.
    """
    texts, functions = list[str](), list[str]()
    for i, formula in enumerate(formulas):
        name = f"formula_{i}"
        if isinstance(formula, Trace):
            texts.append(rule_source(formula, name))
            functions.append(name)
        elif isinstance(formula, Activation):
            texts.append(activation_source(formula, dtype, name))
            functions += [f"activate<{name}>", f"activation_gradient<{name}>"]
        else:
            texts.append(score_source(formula, dtype, name))
            functions.append(f"score_loss<{name}>")
    lines = [
        kernel_source("host_simd.h"),
        "namespace own {",
        f"typedef {C_TYPES[dtype]} T;",
        *map(kernel_source, ("host_math.h", "math.cuh", "host_formulas.h")),
        *texts,
        'extern "C" { extern void* const functions[]; }',
        f"void* const functions[] = {{{', '.join(f'(void*){function}' for function in functions)}, nullptr}};",
        "}\n",
    ]
    return "\n".join(lines)
