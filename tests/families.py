"""Parametrise tests by tables, and split the tables into a fast set and an exhaustive set.

``pytest`` runs the fast set, with one entry of each kind; ``pytest -m exhaustive`` runs the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import pytest
from hypothesis import given, settings


def every(argument: str, table: Mapping[str, Any] | Iterable[str], fast: Collection[str]) -> pytest.MarkDecorator:
    """Parametrise by the entries of a table, or by names; all but those in ``fast`` are marked exhaustive."""
    table = table if isinstance(table, Mapping) else {name: name for name in table}
    assert fast, f"fast must name at least one entry of {[*table]}"
    assert (unknown := set(fast) - table.keys()) == set(), f"fast must name entries of the table, got {sorted(unknown)}"
    return pytest.mark.parametrize(
        argument, [pytest.param(entry, id=name, marks=marks(name in fast)) for name, entry in table.items()]
    )


def marks(is_fast: bool) -> Collection[pytest.MarkDecorator]:
    return () if is_fast else (pytest.mark.exhaustive,)


def first_of_each(kinds: Mapping[str, Any]) -> list[str]:
    """The first name of each kind; ``kinds`` maps names to kinds."""
    first: dict[Any, str] = {}
    for name, kind in kinds.items():
        first.setdefault(kind, name)
    return [*first.values()]


def drawn(fast: int, exhaustive: int, **strategies: Any) -> Callable[[Callable[..., None]], Callable[[int], None]]:
    """Run a hypothesis test on ``fast`` examples in the fast set, and on ``exhaustive`` ones in the exhaustive set."""

    def decorate(test: Callable[..., None]) -> Callable[[int], None]:
        @pytest.mark.parametrize("examples", [fast, pytest.param(exhaustive, marks=pytest.mark.exhaustive)])
        def on_examples(examples: int) -> None:
            settings(max_examples=examples, deadline=None)(given(**strategies)(test))()

        return on_examples

    return decorate
