"""What the user wrote of a run, as digests of its code, by which a resumed run tells that it is another one now."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import platform
from collections.abc import Iterator, Mapping
from types import CodeType, FunctionType
from typing import Any

from gpubatch.nn import ActivationLayer, Network, core_of
from gpubatch.optim import Optimizer

PYTHON = "python"  # whose version decides what bytecode there is


def describe_code(net: Network, opt: Optimizer) -> dict[str, str]:
    """Digests of the rule, the layers and the loss that the user wrote, by their names, for JSON."""
    loss = core_of(net).loss
    bound = getattr(loss, "bound", None) if type(loss).__module__.startswith("gpubatch.") else None
    own: dict[str, Any] = {
        f"rule {opt.rule.name}": opt.rule.formula,
        f"loss {net.loss_name}": type(loss) if bound is None else bound.declared.formula,
    }
    for i, layer in enumerate(net.layers, 1):
        ours = isinstance(layer, ActivationLayer) and type(layer).__module__.startswith("gpubatch.")
        own[f"layer {i}"] = layer.function.declared.formula if ours else type(layer)  # type: ignore[attr-defined]
    parts = {name: list(_parts(x)) for name, x in own.items()}
    digests = {name: hashlib.sha256(repr(found).encode()).hexdigest()[:16] for name, found in parts.items() if found}
    return {PYTHON: platform.python_version(), **digests}


def changed_code(saved: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """What is written otherwise than before, a line each; another Python has other bytecode, of which none can tell."""
    if saved.get(PYTHON) != now[PYTHON]:
        return []
    return [f"{name}: the code is another one now" for name, found in now.items() if saved.get(name, found) != found]


def _parts(x: Any) -> Iterator[Any]:
    """The code of a function, or of the methods of a class; nothing of gpubatch's own."""
    if isinstance(x, type):
        for kind in x.__mro__:
            if not str(kind.__module__).startswith(("gpubatch.", "builtins", "abc", "typing")):
                for name, member in sorted(vars(kind).items()):
                    yield from ((name, part) for part in _parts(getattr(member, "fget", member)))
    elif isinstance(x, (staticmethod, classmethod)):
        yield from _parts(x.__func__)
    elif isinstance(x, FunctionType) and not str(x.__module__).startswith("gpubatch."):
        yield _plain(x.__code__, x.__doc__), x.__defaults__, x.__kwdefaults__
        with contextlib.suppress(ValueError):  # an empty cell
            outside = inspect.getclosurevars(x)
            for values in (outside.nonlocals, outside.globals):
                yield sorted((name, value) for name, value in values.items() if isinstance(value, (int, float)))


def _plain(code: CodeType, doc: str | None = None) -> Any:
    """Bytecode and constants, without names of files, lines and the docstring."""
    constants = [
        _plain(c) if isinstance(c, CodeType) else sorted(map(repr, c)) if isinstance(c, frozenset) else repr(c)
        for c in code.co_consts
        if c != doc
    ]
    return code.co_code, constants, code.co_names
