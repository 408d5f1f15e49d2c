"""The C++ text of formulas for the CPU, the same at build time (``kernels/generate_host.py``) and on first use."""

from __future__ import annotations

from collections.abc import Sequence

from gpubatch.formula import Activation, FormulaPass, ScoreLoss, Trace
from gpubatch.ops.compile import C_TYPES, kernel_source

# The terms of each reduction in kernels/host_formulas.h.
TERMS = {"norm": "Squares", "mean": "Numbers", "max_abs": "Sizes"}


def rule_source(trace: Trace, name: str) -> str:
    """An update rule for the type T: functions of one element, and ``name``, the loops over the arrays.

    A loop works on rows ``first`` to ``last`` of a table of pieces; a row has the addresses of a piece in each array,
    then its size. ``scalars`` are the formula's, then the scale of the gradient. Of a formula with reductions it is the
    loop of one ``pass``: it reads the ``values`` of earlier passes, and writes the totals of each row to ``totals``.
    """
    text, calls = [], []
    for i, of_pass in enumerate(trace.passes):
        loop = name if len(trace.passes) == 1 else f"{name}_pass{i}"
        text.append((_reducing if of_pass.reductions else _updating)(of_pass, loop))
        calls.append(f"    if (pass == {i}) {loop}(table, scalars, values, totals, pass, first, last);")
    if len(calls) > 1:
        text.append("\n".join([_head(name), *calls, "}"]))
    return "\n".join(text)


def _head(name: str) -> str:
    table = "const Int* table, const T* scalars, const T* values, double* totals"
    return f"static void {name}({table}, Int pass, Int first, Int last) {{"


def _updating(of_pass: FormulaPass, name: str) -> str:
    """The pass that writes the new arrays."""
    trace = of_pass.trace
    # The names of the formula are parameters of a function of its own, so that they may be those of the loop, too.
    kinds = ["const T" if a == "g" else "T" for a in trace.arrays]
    parameters = [f"{kind} {a}" if a == "g" else f"T& {a}" for a, kind in zip(trace.arrays, kinds, strict=True)]
    elements = [f"element{i}" for i in range(len(kinds))]
    element = [
        *(f"    {line}" for line in _loads(trace, kinds)),
        f"    {name}_element({', '.join([*elements, 'k', *_values(trace)])});",
        *(f"    array{i}[i] = {elements[i]};" for i in map(trace.arrays.index, trace.targets)),
        "}",
    ]
    body = [
        f"const Int n = row[{len(kinds)}];",
        "Int line = 0;",
        "for (; line + LINE <= n; line += LINE) {",
        *(f"    __builtin_prefetch(array{i} + line + AHEAD);" for i in range(len(kinds))),
        "    EACH_ROLLED for (Int j = 0; j < LINE; ++j) {",
        "        const Int i = line + j;",
        *(f"    {text}" for text in element),
        "}",
        "EACH_ROLLED for (Int i = line; i < n; ++i) {",
        *element,
    ]
    return _loop(trace, name, parameters, kinds, body)


def _reducing(of_pass: FormulaPass, name: str) -> str:
    """A pass that reduces; a few elements at a time, whose operands stay in the first-level cache."""
    trace, reductions = of_pass
    kinds = ["const T"] * len(trace.arrays)
    parameters = [*(f"const T {a}" for a in trace.arrays), *(f"T& {a}" for a in trace.targets)]
    elements = [f"element{i}" for i in range(len(kinds))]
    operands = [f"operand{j}" for j in range(len(reductions))]
    body = [
        *(f"Total<{TERMS[r.name]}> total{j};" for j, r in enumerate(reductions)),
        f"for (Int start = 0; start < row[{len(kinds)}]; start += AT_ONCE) {{",
        f"    const Int n = row[{len(kinds)}] - start < AT_ONCE ? row[{len(kinds)}] - start : AT_ONCE;",
        f"    T {', '.join(f'{operand}[AT_ONCE]' for operand in operands)};",
        "    EACH_ROLLED for (Int j = 0; j < n; ++j) {",
        "        const Int i = start + j;",
        *(f"        {line}" for line in _loads(trace, kinds)),
        f"        {name}_element({', '.join([*elements, *(f'{x}[j]' for x in operands), 'k', *_values(trace)])});",
        "    }",
        *(f"    total{j}.add({operand}, n);" for j, operand in enumerate(operands)),
        "}",
        f"double* to = totals + (row - table) / {len(kinds) + 1} * {len(reductions)};",
        *(f"to[{j}] = total{j}.sum();" for j in range(len(reductions))),
    ]
    return _loop(trace, name, parameters, kinds, body)


def _loads(trace: Trace, kinds: list[str]) -> list[str]:
    """Element i of each array; with scale 1 the product changes no bits."""
    return [
        f"{kind} element{i} = array{i}[i]{' * scale' if a == 'g' else ''};"
        for i, (a, kind) in enumerate(zip(trace.arrays, kinds, strict=True))
    ]


def _values(trace: Trace) -> list[str]:
    return [f"value{i}" for i in range(len(trace.values))]


def _loop(trace: Trace, name: str, parameters: list[str], kinds: list[str], body: list[str]) -> str:
    """The function of one element, and the loop over rows with this body."""
    numbers = [*parameters, "const T* k", *(f"const T {x}" for x in trace.values)]
    width = len(kinds) + 1
    lines = [
        f"static inline void {name}_element({', '.join(numbers)}) {{",
        *(f"    {line}" for line in trace.c.splitlines()),
        "}",
        _head(name),
        f"    T k[{max(1, len(trace.scalars))}];",
        f"    for (int s = 0; s < {len(trace.scalars)}; ++s) k[s] = scalars[s];",
        f"    const T scale = scalars[{len(trace.scalars)}];",
        *(f"    const T {value} = values[{i}];" for i, value in enumerate(_values(trace))),
        f"    for (const Int* row = table + {width} * first; row < table + {width} * last; row += {width}) {{",
        *(
            f"        {kind}* __restrict__ array{i} = reinterpret_cast<{kind}*>(row[{i}]);"
            for i, kind in enumerate(kinds)
        ),
        *(f"        {line}" for line in body),
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
        else:
            texts.append(formula.source(dtype, name))
            functions += [f"{function}<{name}>" for function in formula.functions]
    lines = [
        kernel_source("host_simd.h"),
        "namespace own {",
        f"typedef {C_TYPES[dtype]} T;",
        *map(kernel_source, ("host_math.h", "math.cuh", "host_formulas.h")),
        *texts,
        'extern "C" { extern void* const functions[]; }',
        f"void* const functions[] = {{{', '.join([*(f'(void*){function}' for function in functions), 'nullptr'])}}};",
        "}\n",
    ]
    return "\n".join(lines)
