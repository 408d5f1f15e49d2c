"""Tables that drive tests: which of their entries are in the fast set, and which are exhaustive.

The fast set is what ``pytest`` runs, with one of each kind; ``pytest -m exhaustive`` runs the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import pytest
from hypothesis import given, settings


def every(argument: str, table: Mapping[str, Any] | Iterable[str], fast: Collection[str]) -> pytest.MarkDecorator:
    """A parameter for each entry of a table, or each name; those that are not among ``fast`` are exhaustive."""
    table = table if isinstance(table, Mapping) else {name: name for name in table}
    assert fast, f"a table without an entry in the fast set: {[*table]}"
    assert (unknown := set(fast) - table.keys()) == set(), f"not in the table: {sorted(unknown)}"
    return pytest.mark.parametrize(
        argument, [pytest.param(entry, id=name, marks=marks(name in fast)) for name, entry in table.items()]
    )


def marks(is_fast: bool) -> Collection[pytest.MarkDecorator]:
    return () if is_fast else (pytest.mark.exhaustive,)


def first_of_each(kinds: Mapping[str, Any]) -> list[str]:
    """The first name of each kind, of a table of what kind each is."""
    first: dict[Any, str] = {}
    for name, kind in kinds.items():
        first.setdefault(kind, name)
    return [*first.values()]


def drawn(fast: int, exhaustive: int, **strategies: Any) -> Callable[[Callable[..., None]], Callable[[int], None]]:
    """A test on so many examples of what is drawn: few in the fast set, many in the exhaustive one."""

    def decorate(test: Callable[..., None]) -> Callable[[int], None]:
        @pytest.mark.parametrize("examples", [fast, pytest.param(exhaustive, marks=pytest.mark.exhaustive)])
        def on_examples(examples: int) -> None:
            settings(max_examples=examples, deadline=None)(given(**strategies)(test))()

        return on_examples

    return decorate
