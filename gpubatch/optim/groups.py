"""Groups of parameters: hyper-parameters for some alone, parameters that are not trained, and how the others lie."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, NamedTuple, TypeAlias

from gpubatch import schedules
from gpubatch.errors import ArgumentError, DTypeError, check_bool
from gpubatch.ops import Update

Hyper: TypeAlias = float | schedules.Schedule


@dataclass(eq=False)
class Group:
    """The parameters ``names`` that a pattern took, and the hyper-parameters that they have to themselves.

    The group without a pattern has the rest.
    """

    pattern: str
    names: list[str] = field(default_factory=list)
    own: dict[str, Hyper] = field(default_factory=dict)
    trainable: bool = True

    def key(self) -> tuple[Any, ...]:
        """Equal for groups whose scalars are equal in every step."""
        return tuple(sorted((name, id(value) if callable(value) else value) for name, value in self.own.items()))


def partition(groups: Any, names: Sequence[str]) -> tuple[list[Group], list[dict[str, Any]]]:
    """The groups with their parameters, the rest first, and for each what was given besides ``trainable``.

    groups: settings by pattern; the first pattern that matches a name takes it.
    """
    if not isinstance(groups, Mapping):
        raise DTypeError(f"groups must map patterns over the names of parameters to settings, got {groups!r}")
    found, given, left = [Group("")], [dict[str, Any]()], list(names)
    for pattern, settings in groups.items():
        if not isinstance(pattern, str) or not isinstance(settings, Mapping):
            raise DTypeError(
                f"groups must map patterns to settings, as {{'b*': {{'weight_decay': 0.0}}}}, "
                f"got {pattern!r}: {settings!r}"
            )
        matching = [name for name in names if fnmatchcase(name, pattern)]
        taken = [name for name in left if fnmatchcase(name, pattern)]
        if not matching:
            raise ArgumentError(f"groups[{pattern!r}] matches none of the parameters {', '.join(names)}")
        if not taken:
            raise ArgumentError(
                f"groups[{pattern!r}] matches {', '.join(matching)}, which earlier patterns have taken: the first that "
                f"matches counts; the parameters are {', '.join(names)}"
            )
        rest = dict(settings)
        trainable = check_bool(f"trainable of groups[{pattern!r}]", rest.pop("trainable", True))
        if rest and not trainable:
            raise ArgumentError(f"groups[{pattern!r}] is not trainable, so it cannot have {', '.join(rest)}")
        left = [name for name in left if not fnmatchcase(name, pattern)]
        found.append(Group(pattern, taken, trainable=trainable))
        given.append(rest)
    found[0].names = left
    if not any(group.trainable and group.names for group in found):
        raise ArgumentError("groups must leave at least one parameter trainable, these leave none")
    return found, given


class Span(NamedTuple):
    """Neighbours in the flat buffer of the parameters with the same scalars: where they lie in it, and in the state."""

    parameters: slice
    state: slice
    row: int


@dataclass(eq=False)
class Arrangement:
    """What an update is called with: its rows of scalars, and the row of each trained parameter, in their order.

    A row is that of a group and of the parameters in it that missed as many steps.
    """

    update: Update
    rows: list[tuple[Group, int]]
    row_of: list[int] | None  # None: there is one row

    def spans(
        self, parameters: Mapping[str, tuple[int, int]], trained: Sequence[str], apart: bool = False
    ) -> list[Span]:
        """The parts of a flat buffer that have one row each, as few as can be.

        parameters: where each parameter lies in its buffer; the state has those of ``trained`` without gaps.
        apart: whether each parameter is a part of its own.
        """
        found, end = list[Span](), 0
        for name, row in zip(trained, self.row_of or [0] * len(trained), strict=True):
            start, stop = parameters[name]
            begin, end = end, end + stop - start
            if found and not apart and (found[-1].parameters.stop, found[-1].row) == (start, row):
                start, begin = found[-1].parameters.start, found.pop().state.start
            found.append(Span(slice(start, stop), slice(begin, end), row))
        return found


def arranged(update: Update, groups: Sequence[Group], trained: Sequence[str], missed: Mapping[str, int]) -> Arrangement:
    """The arrangement of the parameters ``trained``, of which some ``missed`` a number of steps."""
    group_of = {name: group for group in groups for name in group.names}
    keys = {id(group): group.key() for group in groups}
    numbers = dict[tuple[Any, ...], int]()
    rows, row_of = list[tuple[Group, int]](), list[int]()
    for name in trained:
        group, behind = group_of[name], missed.get(name, 0)
        number = numbers.setdefault((keys[id(group)], behind), len(rows))
        if number == len(rows):
            rows.append((group, behind))
        row_of.append(number)
    return Arrangement(update, rows, row_of if len(rows) > 1 else None)
