"""Generate the headers of the host kernels at build time: ``python kernels/generate_host.py FOLDER``.

``formulas.h`` has a function for each traced update rule, named by the digest of its text. A library built from another
version of a formula therefore does not have it, and NumPy runs it instead. ``elementwise_float32.h`` and
``elementwise_float64.h`` have the activations and the score losses, likewise. ``sources.h`` has the digest of the other
sources, which is compared when the library is loaded.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gpubatch.formula import Rule, Trace, activations, rules, scores
from gpubatch.ops.compile import COMPUTED, elementwise_digest, formula_digest, host_digest
from gpubatch.ops.host_source import rule_source


def traces(rule: Rule) -> Iterator[Trace]:
    """The traces of all variants of a rule; some may be equal."""
    choices = [(True, False) if isinstance(v, bool) else ("outside", "inside", "hat") for v in rule.options.values()]
    for decay in rule.decays:
        for values in itertools.product(*choices):
            yield rule.trace(decay, **dict(zip(rule.options, values, strict=True)))


def formulas() -> str:
    """The C++ functions of all variants of all rules, for a type T, and a table of them."""
    every = {formula_digest(trace): trace for name in rules.__all__ for trace in traces(getattr(rules, name))}
    rows = ",\n".join(f'    {{"{digest}", update_{digest}}}' for digest in every)
    table = f"static constexpr Formula<T> formulas[] = {{\n{rows},\n}};"
    functions = [rule_source(trace, f"update_{digest}") for digest, trace in every.items()]
    return "\n".join([*functions, table]) + "\n"


def elementwise(dtype: str) -> str:
    """The C++ structs of all activations and score losses, and macros that list their digests."""
    text = []
    for kind, module in (("activation", activations), ("score", scores)):
        every = {elementwise_digest(function): function for function in (getattr(module, n) for n in module.__all__)}
        text += [function.source(dtype, f"{kind}_{digest}") for digest, function in every.items()]
        text.append(f"#define EVERY_{kind.upper()}(ENTRY) {' '.join(f'ENTRY({digest})' for digest in every)}\n")
    return "\n".join(text)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    (folder / "formulas.h").write_text(formulas())
    (folder / "sources.h").write_text(f'#define SOURCES "{host_digest()}"\n')
    for dtype in COMPUTED:
        (folder / f"elementwise_{dtype}.h").write_text(elementwise(dtype))
