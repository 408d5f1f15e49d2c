"""How the rows of a table become samples: numbers of training rows, by which all rows are prepared."""

from __future__ import annotations

import hashlib
import itertools
import zlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeAlias

import numpy as np

from gpubatch.errors import ArgumentError, DataFormatError, check_bool, check_choice, check_int, check_real
from gpubatch.tables.columns import Piece, listed

MOST_BUCKETS, MOST_CATEGORIES = 1 << 20, 1 << 14
LONGEST = 10_000  # classes of a label
NO_CATEGORY = "all columns of its categories are 0 there"
DIGESTED = 256  # rows by which data are known again


@dataclass
class Strange:
    """Texts and gaps in rows that the training rows did not have.

    texts: of columns, and in how many rows
    gaps: rows without a value, by column and what they have in its place, in words
    """

    texts: dict[str, Counter[str]] = field(default_factory=dict)
    gaps: Counter[tuple[str, str]] = field(default_factory=Counter)

    def words(self, told: set[tuple[str, str]]) -> str:
        """A sentence for each that is not among ``told``, to which it is added."""
        found = {
            (name, "texts"): f"column {name!r} has {len(counts)} texts that training rows had not, such as "
            f"{next(iter(counts))[:40]!r}, in {counts.total()} rows: they are 0 in all columns of their categories"
            for name, counts in self.texts.items()
        } | {
            (name, filled): f"column {name!r} has no value in {rows} rows, and had one in all training rows: {filled}"
            for (name, filled), rows in self.gaps.items()
            if rows
        }
        fresh = {key: words for key, words in found.items() if key not in told}
        told.update(fresh)
        return "; ".join(fresh.values())


@dataclass(frozen=True)
class Numeric:
    """A column of numbers x: (x - mean) / deviation, the median in the place of a missing one.

    missing: whether training rows had missing values; then there is a column more, 1 for rows without a value.
    varies: whether the numbers differ; otherwise there is only that column.
    """

    kind: ClassVar[str] = "number"
    name: str
    median: float
    mean: float
    deviation: float
    missing: bool
    varies: bool = True

    @property
    def features(self) -> list[str]:
        """Names of the columns of samples that it becomes."""
        return [self.name] * self.varies + [f"{self.name} is missing"] * self.missing

    def fill(self, out: np.ndarray, piece: Piece, strange: Strange | None) -> None:
        """Write what rows become into ``out``."""
        values = piece.numbers(self.name)
        absent = np.isnan(values)
        if self.varies:
            with np.errstate(over="ignore"):
                out[:, 0] = (np.where(absent, self.median, values) - self.mean) / self.deviation
        if self.missing:
            out[:, -1] = absent
        elif strange is not None:
            strange.gaps[self.name, f"the median is taken, {self.median:g}"] += int(absent.sum())


@dataclass(frozen=True)
class Category:
    """A column of texts, one-hot: 1 in the column of a row's text, and 0 in all for a text that training had not.

    missing: whether training rows had missing values; then they have a column, the last.
    """

    kind: ClassVar[str] = "category"
    name: str
    values: tuple[str, ...]
    missing: bool

    @property
    def features(self) -> list[str]:
        """Names of the columns of samples that it becomes."""
        return [f"{self.name}={value}" for value in self.values] + [f"{self.name} is missing"] * self.missing

    def fill(self, out: np.ndarray, piece: Piece, strange: Strange | None) -> None:
        """Write what rows become into ``out``; count texts and gaps that training rows had not."""
        codes, names = piece.texts(self.name)
        places = {value: place for place, value in enumerate(self.values)}
        there = one_hot(out, codes, [*(places.get(name, -1) for name in names), len(places) if self.missing else -1])
        if strange is None:
            return
        if len(unknown := codes[(there < 0) & (codes >= 0)]):
            found = np.bincount(unknown, minlength=len(names)).tolist()
            strange.texts.setdefault(self.name, Counter()).update({names[i]: n for i, n in enumerate(found) if n})
        if not self.missing:
            strange.gaps[self.name, NO_CATEGORY] += int((codes < 0).sum())


@dataclass(frozen=True)
class Hashed:
    """A column of texts, of which each has one of ``buckets`` columns, its CRC-32 (of UTF-8) modulo ``buckets``.

    missing: whether training rows had missing values; then they have a column, the last.
    """

    kind: ClassVar[str] = "hash"
    name: str
    buckets: int
    missing: bool

    @property
    def features(self) -> list[str]:
        """Names of the columns of samples that it becomes."""
        return [f"{self.name}#{i}" for i in range(self.buckets)] + [f"{self.name} is missing"] * self.missing

    def fill(self, out: np.ndarray, piece: Piece, strange: Strange | None) -> None:
        """Write what rows become into ``out``."""
        codes, names = piece.texts(self.name)
        places = (zlib.crc32(name.encode()) % self.buckets for name in names)
        one_hot(out, codes, [*places, self.buckets if self.missing else -1])
        if strange is not None and not self.missing:
            strange.gaps[self.name, NO_CATEGORY] += int((codes < 0).sum())


def one_hot(out: np.ndarray, codes: np.ndarray, places: list[int]) -> np.ndarray:
    """Write 1 where ``places`` has the row's code, the last one for a missing text, and 0 elsewhere; -1: nowhere.

    Returns the places of the rows.
    """
    found: np.ndarray = np.array(places)[codes]
    rows = np.flatnonzero(found >= 0)
    out[...] = 0
    out[rows, found[rows]] = 1
    return found


@dataclass(frozen=True)
class LeftOut:
    """A column that says nothing: all its training rows are missing, or the same."""

    kind: ClassVar[str] = "left out"
    name: str
    why: str

    features: ClassVar[list[str]] = []

    def fill(self, out: np.ndarray, piece: Piece, strange: Strange | None) -> None:
        """Nothing."""


Column: TypeAlias = Numeric | Category | Hashed | LeftOut


@dataclass(frozen=True)
class Target:
    """The label: ``classes`` in the order of their numbers; or numbers, of which ``mean`` and ``deviation`` are taken.

    classes: None in regression
    """

    name: str
    classes: tuple[Any, ...] | None
    mean: float = 0.0
    deviation: float = 1.0

    def codes(self, piece: Piece) -> np.ndarray:
        """The numbers of the classes of rows; an error for a row that has none of them."""
        assert self.classes is not None
        codes, names = piece.label_texts(self.name)
        numbered = {str(name): code for code, name in enumerate(self.classes)}
        of_code = np.array([*(numbered.get(name, -1) for name in names), -1])
        found: np.ndarray = of_code[codes]
        if (unknown := np.flatnonzero(found < 0)).size:
            raise DataFormatError(
                f"{piece.where}: the label {self.name!r} must be one of {listed(self.classes)}, got "
                f"{names[codes[unknown[0]]][:99]!r} in row {piece.start + unknown[0]}"
            )
        return found

    def targets(self, piece: Piece) -> np.ndarray:
        """The targets of a network: int64 classes, or float32 numbers, of mean 0 and deviation 1 in training."""
        if self.classes is not None:
            return self.codes(piece)
        return ((piece.label_numbers(self.name) - self.mean) / self.deviation).astype(np.float32)


@dataclass(frozen=True)
class TrainingRows:
    """Which rows of which data a model was trained on, so that both are known again.

    rows: of the data
    trained: of these, to train on
    test_size, seed: of the split that left out the others; test_size is None where all were to train on
    drawn: whether each row was drawn by itself, as where a file is streamed
    digest: of the first rows of the data
    digested: how many these are
    """

    rows: int
    trained: int
    test_size: float | None
    seed: int
    drawn: bool
    digest: str
    digested: int

    @classmethod
    def of(cls, rows: int, trained: int, first: np.ndarray, split: tuple[float, int, bool] | None) -> TrainingRows:
        """Of data whose ``first`` rows are given; split: test size, seed and drawn."""
        test_size, seed, drawn = split or (None, 0, False)
        return cls(rows, trained, test_size, seed, drawn, digest_of(first), len(first))

    def are_of(self, rows: int, first: np.ndarray) -> bool:
        """Whether these are the data; ``first`` are their first ``digested`` rows."""
        return rows == self.rows and digest_of(first) == self.digest

    @classmethod
    def from_json(cls, found: Any) -> TrainingRows:
        """Of a file; raises what wrong types and values raise, as :meth:`Recipe.from_json`."""
        rows = check_int("rows", found["rows"], 1)
        share = found["test_size"]
        return cls(
            rows,
            check_int("trained", found["trained"], 1, rows),
            None if share is None else check_real("test_size", share, 0, 1, open_low=True, open_high=True),
            check_int("seed", found["seed"], 0, 2**64 - 1),
            check_bool("drawn", found["drawn"]),
            _text(found["digest"]),
            check_int("digested", found["digested"], 0, DIGESTED),
        )


def digest_of(rows: np.ndarray) -> str:
    """A digest of the rows, their shape and their element type."""
    found = hashlib.blake2b(f"{rows.dtype.str} {rows.shape}".encode(), digest_size=16)
    found.update(np.ascontiguousarray(rows).tobytes())
    return found.hexdigest()


@dataclass(frozen=True)
class Recipe:
    """The columns of a table in their order, what becomes of them, and the label.

    missing: texts that stand for no value
    rows: those that it was found from; None in a file of before these were kept
    """

    columns: tuple[Column, ...]
    target: Target | None
    missing: tuple[str, ...] = ()
    rows: TrainingRows | None = field(default=None, compare=False)
    _places: list[tuple[int, int]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        ends = itertools.accumulate((len(column.features) for column in self.columns), initial=0)
        object.__setattr__(self, "_places", list(itertools.pairwise(ends)))

    def __repr__(self) -> str:
        kinds = Counter(column.kind for column in self.columns)
        words = ", ".join(f"{n} {kind}" for kind, n in kinds.items())
        return f"<Recipe of {len(self.columns)} columns ({words}): {self.features} features>"

    @property
    def features(self) -> int:
        """The number of features of a sample."""
        return self._places[-1][1]

    @property
    def names(self) -> list[str]:
        """The columns that rows must have."""
        return [column.name for column in self.columns if not isinstance(column, LeftOut)]

    @property
    def texts(self) -> list[str]:
        """The columns that hold texts, even where they look like numbers."""
        found = [column.name for column in self.columns if isinstance(column, (Category, Hashed))]
        target = self.target
        labels = target is not None and target.classes is not None and isinstance(target.classes[0], str)
        return [*found, target.name] if labels and target is not None else found

    def samples(self, piece: Piece, strange: Strange | None) -> np.ndarray:
        """Rows as samples, float32 (rows, features); what training rows had not is counted in ``strange``."""
        out = np.empty((len(piece.table), self.features), np.float32)
        for column, (first, last) in zip(self.columns, self._places, strict=True):
            if last > first:
                column.fill(out[:, first:last], piece, strange)
        return out

    # --- in a file ---

    def to_json(self, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
        """For a file, the numbers among its arrays; without the classes, which a model has."""
        numeric = [column for column in self.columns if isinstance(column, Numeric)]
        for name in ("median", "mean", "deviation"):
            arrays[f"table.{name}"] = np.array([getattr(column, name) for column in numeric], np.float64)
        target = self.target
        return {
            "columns": [_described(column) for column in self.columns],
            "missing": list(self.missing),
            "label": None
            if target is None
            else {
                "name": target.name,
                "task": "regression" if target.classes is None else "classification",
                "mean": target.mean,
                "deviation": target.deviation,
            },
        }

    @classmethod
    def from_json(cls, found: Any, arrays: Mapping[str, np.ndarray], classes: Any) -> Recipe:
        """Of a file; raises what wrong types and values raise: ValueError, TypeError, LookupError, GpubatchError."""
        described = found["columns"]
        if not isinstance(described, list) or not isinstance(found["missing"], list):
            raise TypeError("its columns are no list")
        n = sum(column["kind"] == "number" for column in described)
        rows = {}
        for name in ("median", "mean", "deviation"):
            array = arrays[f"table.{name}"]
            if array.dtype != np.float64 or array.shape != (n,) or not np.isfinite(array).all():
                raise ValueError(f"table.{name} must be {n} finite numbers")
            rows[name] = array.tolist()
        if n and min(rows["deviation"]) <= 0:
            raise ValueError("table.deviation must be above 0")
        numbered = iter(zip(*rows.values(), strict=True))
        columns = tuple(_column(column, numbered) for column in described)
        label = found["label"]
        target = None
        if label is not None:
            task = check_choice("task", label["task"], ["classification", "regression"])
            if (task == "classification") != (classes is not None):
                raise ValueError(f"it has {'no ' if classes is None else ''}classes, and its task is {task}")
            mean, deviation = float(label["mean"]), float(label["deviation"])
            if not (np.isfinite(mean) and 0 < deviation < np.inf):
                raise ValueError("the mean of its label must be finite, and the deviation above 0")
            target = Target(_text(label["name"]), None if classes is None else tuple(classes), mean, deviation)
        names = [column.name for column in columns] + ([] if target is None else [target.name])
        if len({*names}) != len(names):
            raise ValueError("its columns have the same name")
        recipe = cls(columns, target, tuple(map(_text, found["missing"])))
        if not columns or not recipe.features:
            raise ValueError("it has no features")
        return recipe


def _described(column: Column) -> dict[str, Any]:
    found: dict[str, Any] = {"kind": column.kind, "name": column.name}
    for name in ("missing", "varies", "values", "buckets", "why"):
        if hasattr(column, name):
            found[name] = getattr(column, name)
    return found


def _column(found: Any, numbered: Any) -> Column:
    kind = check_choice("kind", found["kind"], [k.kind for k in (Numeric, Category, Hashed, LeftOut)])
    name = _text(found["name"])
    if kind == LeftOut.kind:
        return LeftOut(name, _text(found["why"]))
    missing = check_bool("missing", found["missing"])
    if kind == Numeric.kind:
        median, mean, deviation = next(numbered)
        return Numeric(name, median, mean, deviation, missing, check_bool("varies", found["varies"]))
    if kind == Hashed.kind:
        return Hashed(name, check_int("buckets", found["buckets"], 1, MOST_BUCKETS), missing)
    values = tuple(map(_text, found["values"]))
    if len({*values}) != len(values):
        raise ArgumentError(f"the categories of {name[:99]!r} are not all different")
    return Category(name, values, missing)


def _text(x: Any) -> str:
    if not isinstance(x, str):
        raise TypeError(f"{str(x)[:99]} is no text")
    return x
