"""Finds the :class:`Recipe` of a table from its training rows."""

from __future__ import annotations

import itertools
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpubatch.errors import ArgumentError, DataFormatError, NonFiniteError, TableWarning
from gpubatch.tables.columns import (
    CODED,
    DATE,
    EMPTY,
    NUMBER,
    OTHER,
    TEXT,
    Piece,
    family,
    is_numeral,
    lookalikes,
)
from gpubatch.tables.recipe import Category, Column, Hashed, LeftOut, Numeric, Recipe, Target
from gpubatch.tables.rows import Rows
from gpubatch.tables.statistics import DISTINCT, Median, Moments, Seen

KINDS = (Numeric.kind, Category.kind, Hashed.kind)
# Texts that people read as numbers: with a separator of thousands, a fraction, a currency or a percent sign.
NUMERAL = re.compile(
    r"(?!\([^)]*$)\(?[-+]?[$€£¥]?\s?(\d{1,3}([,.'\s]\d{3})+|\d+)([.,]\d+)?([eE][-+]?\d+)?\s?[%€$£¥]?\)?", re.ASCII
)
MONTH = "(jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]*"
DATED = re.compile(
    r"(\d{4}[./-]\d{1,2}[./-]\d{1,2}|\d{1,2}[./-]\d{1,2}[./-]\d{4}|\d{1,2}[/-]\d{1,2}[/-]\d{2}"
    rf"|\d{{1,2}}\.?[ -]{MONTH}\.?[ -]\d{{2,4}}|{MONTH}\.? \d{{1,2}},? \d{{4}})([ T]\d{{1,2}}:\d{{2}}.*)?"
    rf"|(1[6-9]|20)\d\d[/-](0?[1-9]|1[0-2])|{MONTH}\.?[ -]\d{{4}}|\d{{1,2}}:\d{{2}}(:\d{{2}})?\s?([ap]\.?m\.?)?",
    re.ASCII | re.IGNORECASE,
)

EXACT = 2**53  # from here on float64 does not hold every integer
FEW_TEXTS = 10  # that may be all different in a small table
PLAIN = "write them without signs and separators, as pandas.read_csv(path, thousands=',') reads them, or str.replace"


@dataclass(frozen=True)
class Options:
    """The arguments of ``read_table`` about columns, see there; ``names``: the columns that samples are made of."""

    names: list[str]
    label: str | None
    task: str
    kinds: Mapping[str, str]
    one_hot: int
    buckets: int
    missing: tuple[str, ...]


def types_of(rows: Rows, names: Sequence[str]) -> dict[str, Any]:
    """Arrow's types of columns, as the first block has them."""
    schema = rows.block(0, names).schema
    return dict(zip(schema.names, schema.types, strict=True))


def check_types(rows: Rows, options: Options) -> None:
    """Raise for columns that are no numbers and no texts, all of them at once."""
    where, label, kinds = rows.where, options.label, options.kinds
    types = types_of(rows, [*options.names, *([] if label is None else [label])])
    dates = [name for name, kind in types.items() if name != label and family(kind) == DATE]
    others = [name for name, kind in types.items() if name != label and family(kind) == OTHER]
    if dates:
        first = dates[0]
        raise DataFormatError(
            f"{where}: {listed(dates)} {'hold' if len(dates) > 1 else 'holds'} dates or times ({types[first]}), which "
            "are no numbers yet: make some of them first, as the days since a date or the hour of the day, or leave "
            f"them out with drop={dates + others!r}"
        )
    if others:
        raise DataFormatError(
            f"{where}: {listed(others)} must hold numbers or texts, got {types[others[0]]}; leave such columns out "
            f"with drop={others!r}"
        )
    if label is not None and family(types[label]) in (DATE, OTHER):
        raise DataFormatError(f"{where}: the label {label!r} must hold numbers or texts, got {types[label]}")
    for name, kind in kinds.items():
        if kind == Numeric.kind and family(types[name]) == CODED:
            raise ArgumentError(f"kinds must not have a number for {name!r}, which holds categories, {types[name]}")


def listed(names: Sequence[str]) -> str:
    """Columns in words, the first of many."""
    shown = ", ".join(map(repr, names[:8])) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    return f"column{'s' if len(names) > 1 else ''} {shown}"


class Statistics:
    """Statistics of columns, block by block; of rows in memory all numbers are kept for the medians."""

    def __init__(self, rows: Rows, options: Options) -> None:
        self._where, self._options, self._table = rows.where, options, rows
        self._moments: dict[str, tuple[Moments, Median]] = {}
        self._seen: dict[str, Seen] = {}
        self._rows = 0
        self._guessed = set[str]()  # columns of which nobody said that they are categories
        self._words: dict[str, str] = {}  # a text of each that does not look like a number
        for name, kind in types_of(rows, options.names).items():
            wanted = options.kinds.get(name, Numeric.kind if family(kind) == NUMBER else Category.kind)
            if wanted == Numeric.kind:
                self._moments[name] = Moments(), Median(rows.in_memory)
            elif family(kind) != EMPTY:
                self._seen[name] = Seen()
                if family(kind) == TEXT and name not in options.kinds:
                    self._guessed.add(name)

    def add(self, piece: Piece) -> None:
        """Take some rows."""
        self._rows += len(piece.table)
        for name, (moments, median) in self._moments.items():
            values = piece.numbers(name)
            values = values[~np.isnan(values)]
            with np.errstate(over="ignore", invalid="ignore"):
                moments.add(values)
            median.add(values)
        for name, seen in self._seen.items():
            codes, found = piece.texts(name)
            seen.add(codes, found)
            if name in self._guessed and name not in self._words:
                self._look_for_words(name, found)

    def _look_for_words(self, name: str, found: Iterable[str]) -> None:
        words = (text for text in found if not NUMERAL.fullmatch(text))
        self._words.update((name, word) for word in itertools.islice(words, 1))

    def columns(self) -> tuple[tuple[Column, ...], list[str]]:
        """What becomes of the columns; and what may be meant otherwise, in words."""
        found: list[Column] = []
        remarks: list[str] = []
        free: list[str] = []
        for name in self._options.names:
            column = self._numeric(name) if name in self._moments else self._category(name, free)
            if column is None:
                continue
            found.append(column)
            remarks += self._remarks(column)
        misread = [remark for remark in map(self._misread, free) if remark is not None]
        if misread:
            raise DataFormatError(f"{self._where}: {'; '.join(misread)}")
        if free:
            raise DataFormatError(
                f"{self._where}: {listed(free)} {'have' if len(free) > 1 else 'has'} a text of its own in most rows ("
                f"{self._count(free[0])} different ones in {self._seen[free[0]].values}), as names and free text "
                f"have; leave them out with drop={free!r}, or hash them with kinds={{{free[0]!r}: 'hash'}}"
            )
        if not any(column.features for column in found):
            raise DataFormatError(f"{self._where}: no column tells samples apart; {'; '.join(remarks)}")
        return tuple(found), remarks

    def _remarks(self, column: Column) -> list[str]:
        """What became of a column that may be meant otherwise."""
        name, told = column.name, column.name in self._options.kinds
        misread, found = self._misread(name), list[str]()
        if misread is not None:
            found.append(misread)
        if isinstance(column, LeftOut):
            found.append(f"column {name!r} is left out: {column.why}")
        if told:
            return found
        means = f"kinds={{{name!r}: {column.kind!r}}} says that this is meant"
        if isinstance(column, Numeric) and (code := self._table.codes.get(name)):
            found.append(
                f"column {name!r} has whole numbers with a 0 before them, as codes have, such as {code[:40]!r}, and is "
                f"taken for numbers; {means}, 'category' takes them as they are written"
            )
        if isinstance(column, Category) and (alike := lookalikes(column.values)):
            found.append(f"column {name!r} has the texts {alike}")
        if (
            isinstance(column, Category)
            and misread is None
            and len(column.values) > FEW_TEXTS
            and self._seen[name].mostly_different
        ):
            found.append(
                f"column {name!r} has {len(column.values)} texts in {self._seen[name].values} rows, as names have, "
                f"from which little is learnt: drop={[name]!r}; {means}"
            )
        if isinstance(column, Hashed):
            found.append(
                f"column {name!r} has {self._count(name)} different texts, more than one_hot={self._options.one_hot}: "
                f"they are hashed to {column.buckets} columns; {means}"
            )
        return found

    def _numeric(self, name: str) -> Column:
        moments, median = self._moments[name]
        absent = moments.count < self._rows
        if not moments.count:
            return LeftOut(name, "all its values are missing")
        if moments.low == moments.high:
            if not absent:
                near = "near " * (abs(moments.low) >= EXACT)
                why = f"all its values are {near}{moments.low:g}"
                return LeftOut(name, f"{why}, and float64 tells none apart there" if near else why)
            return Numeric(name, moments.low, moments.low, 1.0, True, False)
        if not 0 < moments.deviation < np.inf:
            raise NonFiniteError(
                f"{self._where}: column {name!r} has numbers from {moments.low:g} to {moments.high:g}, whose variance "
                "float64 cannot hold; multiply them by a power of ten first"
            )
        return Numeric(name, median.result(), moments.mean, moments.deviation, absent)

    def _category(self, name: str, free: list[str]) -> Column | None:
        seen, options = self._seen.get(name), self._options
        if seen is None or not seen.values:
            return LeftOut(name, "all its values are missing")
        wanted, absent = options.kinds.get(name), seen.missing > 0
        if wanted == Hashed.kind:
            return Hashed(name, options.buckets, absent)
        if wanted == Category.kind and seen.overflow:
            raise ArgumentError(
                f"kinds must not have a category for {name!r}, which has more than {DISTINCT} different texts; "
                f"{{{name!r}: 'hash'}} is possible"
            )
        if len(seen.counts) == 1 and not absent:
            return LeftOut(name, f"all its values are {next(iter(seen.counts))!r}")
        if wanted == Category.kind or len(seen.counts) <= options.one_hot:
            return Category(name, tuple(sorted(seen.counts)), absent)
        if seen.mostly_different:
            free.append(name)
            return None
        return Hashed(name, options.buckets, absent)

    def _misread(self, name: str) -> str | None:
        """A warning for a column of texts that are most likely numbers; an error if they are dates."""
        if name not in self._guessed or not (counts := self._seen[name].counts):
            return None
        numerals = {text: n for text, n in counts.items() if NUMERAL.fullmatch(text)}
        if 2 * sum(numerals.values()) > (seen := sum(counts.values())):
            for number in range(len(self._table.sizes)):  # the only word may be in a row to test on
                if name not in self._words:
                    block = Piece(self._table.block(number, [name]), self._where, 0, self._options.missing)
                    self._look_for_words(name, block.texts(name)[1])
            word = self._words.get(name, "")[:40]
            plain = all(map(is_numeral, numerals))
            words = f": {'give numbers, as pandas.to_numeric(column) makes them' if plain else PLAIN}"
            words = f"; {word!r} does not: missing={word!r} if it stands for no value" if word else words
            return (
                f"column {name!r} holds texts, and {sum(numerals.values())} of {seen} look like numbers, such as "
                f"{next(iter(numerals))[:40]!r}{words}; kinds={{{name!r}: 'category'}} says that texts are meant"
            )
        dates = {text: n for text, n in counts.items() if DATED.fullmatch(text)}
        if 2 * sum(dates.values()) > seen:
            whole = f"{sum(dates.values())} of {seen} are dates or times" if len(dates) < len(counts) else "holds dates"
            raise DataFormatError(
                f"{self._where}: column {name!r} {'has texts, and ' * (whole != 'holds dates')}{whole}, such as "
                f"{next(iter(dates))[:40]!r}, which are no numbers yet: make some of them first, as the days since "
                f"a date, or leave them out with drop={[name]!r}; kinds={{{name!r}: 'category'}} says that texts are "
                "meant"
            )
        return None

    def _count(self, name: str) -> str:
        seen = self._seen[name]
        return f"more than {DISTINCT}" if seen.overflow else str(len(seen.counts))


def fit(rows: Rows, options: Options, target: Target | None, blocks: Callable[[list[str]], Iterable[Piece]]) -> Recipe:
    """The recipe of training rows; ``blocks(names)`` gives their columns."""
    amounts = target is not None and target.classes is None
    statistics, moments = Statistics(rows, options), Moments()
    copies = [] if target is None else options.names
    for piece in blocks([*options.names, *([] if target is None else [target.name])]):
        statistics.add(piece)
        if target is not None:
            copies = [name for name in copies if piece.table[name].equals(piece.table[target.name])]
        if target is not None and amounts:
            moments.add(piece.label_numbers(target.name))
    columns, remarks = statistics.columns()
    remarks += [
        f"column {name!r} is the label {options.label!r} once more; drop it unless new rows have it" for name in copies
    ]
    if target is not None and amounts:
        if moments.low == moments.high:
            remarks.append(f"the label {target.name!r} is {moments.low:g} in all rows: there is nothing to learn")
        target = Target(target.name, None, moments.mean, moments.deviation or 1.0)
    if remarks:
        warnings.warn(f"{rows.where}: {'; '.join(remarks)}", TableWarning, 4)
    return Recipe(columns, target, options.missing)
