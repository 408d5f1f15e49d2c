"""The label of a table: which classes its rows have, or that it holds amounts."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

from gpubatch.errors import ArgumentError, DataFormatError, TableWarning
from gpubatch.tables.columns import EMPTY, NUMBER, Piece, family, lookalikes, need, plain
from gpubatch.tables.fitting import NUMERAL, Options
from gpubatch.tables.recipe import LONGEST, Target
from gpubatch.tables.rows import Rows

FEW, OFTEN = 10, 10  # whole floating numbers that may be classes, and how often each comes on average
MANY = 100  # integers of a label from which on the task has to be said


def find_target(rows: Rows, options: Options, blocks: Iterable[Piece]) -> Target:
    """What the label is by its type and values; ``blocks`` has it of all rows, as a table has them."""
    where, label, task, n = rows.where, options.label, options.task, sum(rows.sizes)
    assert label is not None
    kind = plain(rows.block(0, [label])[label]).type
    is_ = need("pyarrow").types
    if task == "regression" or (task == "auto" and (is_.is_floating(kind) or is_.is_decimal(kind))):
        if task == "auto" and (few := whole_numbers(rows.block(0, [label])[label])):
            tell(
                f"{where}: the label {label!r} holds {', '.join(few)} as floating numbers, which are taken for "
                "amounts: task='classification' takes them for classes, task='regression' says that they are amounts"
            )
        return Target(label, None)
    if family(kind) == EMPTY:
        raise DataFormatError(f"{where}: the label {label!r} has no value in any row")
    found = dict.fromkeys(rows.label_values or ())
    if rows.label_values is None:
        for piece in blocks:
            found.update(dict.fromkeys(piece.label_texts(label)[1]))
            if len(found) > LONGEST:
                raise DataFormatError(
                    f"{where}: the label {label!r} has more than {LONGEST} different values, more than classes may "
                    "be; task='regression' takes numbers"
                )
    classes: list[Any] = sorted(found)
    if is_.is_boolean(kind):
        classes = [name == "True" for name in classes]
    elif family(kind) == NUMBER:
        if not all(name.lstrip("-").isdecimal() for name in classes):
            raise DataFormatError(
                f"{where}: the label {label!r} must hold whole numbers, texts or booleans for task='classification'"
            )
        classes = sorted(map(int, classes))
        if task == "auto" and (len(classes) > MANY or 2 * len(classes) > max(n, 2 * 20)):
            raise ArgumentError(
                f"task must be said for the label {label!r}, which has {len(classes)} different integers in {n} "
                "rows: 'regression' if they are amounts, 'classification' if they are names of classes"
            )
    elif task == "auto" and 2 * len(classes) > max(n, 2 * 20):
        others = [name for name in classes if not NUMERAL.fullmatch(name)]
        numerals = "" if len(classes) < 2 * len(others) else f", most of which look like numbers, {others[:1]} do not"
        raise ArgumentError(
            f"task must be said for the label {label!r}, which has {len(classes)} different texts in {n} rows"
            f"{numerals}: 'classification' if they are names of classes"
        )
    if task == "auto" and family(kind) != NUMBER:
        words = [str(name) for name in classes if not NUMERAL.fullmatch(str(name))]
        if words and len(classes) > 2 * len(words):
            tell(
                f"{where}: the label {label!r} has the classes {', '.join(map(repr, classes[:10]))}, most of which "
                f"look like numbers, and {words[0][:40]!r} does not: missing={words[0][:40]!r} if it stands for no "
                "value; task='classification' says that it is a class"
            )
    if len(classes) < 2:
        raise DataFormatError(
            f"{where}: the label {label!r} must have at least two different values, got {classes[0]!r} in all rows"
        )
    if family(kind) != NUMBER and (alike := lookalikes(map(str, classes))):
        tell(f"{where}: the label {label!r} has the classes {alike}")
    return Target(label, tuple(classes))


def tell(text: str) -> None:
    """Warn whoever made the table."""
    warnings.warn(text, TableWarning, 5)


def whole_numbers(column: Any) -> list[str]:
    """The different numbers of a column if all are whole and each comes often, as those of classes do; else none."""
    pc = need("pyarrow.compute")
    counts = pc.value_counts(plain(column).drop_null())
    values = sorted(counts.field("values").to_pylist())
    few = 2 <= len(values) <= FEW and OFTEN * len(values) <= len(column) and all(x == x // 1 for x in values)
    return [f"{x:g}" for x in values] if few else []
