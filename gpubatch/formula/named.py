"""How declared formulas are pickled: by the name under which they can be imported."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any


def by_name(declared: Any, declare: Callable[..., Any]) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """What ``__reduce__`` returns for a rule, an activation or a loss, which ``declare`` makes of its formula.

    One that cannot be imported, as what is defined in a function or in the main module, is declared again of its
    formula: where that can be pickled, as joblib's processes do.
    """
    module, name = declared.formula.__module__, declared.formula.__qualname__
    if module != "__main__":
        try:
            if getattr(imported(module, name), "formula", None) is declared.formula:
                return imported, (module, name)
        except (ImportError, AttributeError):
            pass
    return declare, (declared.formula,)


def imported(module: str, name: str) -> Any:
    """What a module calls ``name``."""
    return functools.reduce(getattr, name.split("."), importlib.import_module(module))
