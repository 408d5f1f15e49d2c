"""Tables whose columns have names, as samples for a network."""

from __future__ import annotations

import dataclasses
import functools
import re
import textwrap
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from gpubatch.errors import (
    ArgumentError,
    DataFormatError,
    DTypeError,
    GpubatchError,
    TableWarning,
    check_choice,
    check_int,
    nearest,
)
from gpubatch.inputs import Prepared
from gpubatch.loader import split
from gpubatch.sources import Source
from gpubatch.tables.columns import Piece, listed
from gpubatch.tables.files import Reading
from gpubatch.tables.fitting import KINDS, Options, check_types, fit
from gpubatch.tables.labels import find_target
from gpubatch.tables.recipe import (
    DIGESTED,
    MOST_BUCKETS,
    MOST_CATEGORIES,
    Category,
    LeftOut,
    Recipe,
    Strange,
    Target,
    TrainingRows,
)
from gpubatch.tables.rows import Chosen, Drawn, Listed, Rows
from gpubatch.tables.several import opened

TASKS = ("auto", "classification", "regression")
UNDIVIDED = "; its first line has none of , ; tab and |: say which delimiter, or give pandas.read_fwf(path)"
UNNAMED = re.compile(r"(Unnamed: \d+(_level_\d+)?)?")  # a column without a name, as files and pandas call it
AT_ONCE = 1 << 14  # rows that become samples together


def read_table(
    source: Any,
    label: str | int | tuple[Any, ...] | None = None,
    *,
    task: str = "auto",
    columns: Sequence[str] | None = None,
    drop: str | Sequence[str] = (),
    kinds: Mapping[str, str] | None = None,
    one_hot: int = 32,
    buckets: int = 128,
    missing: Sequence[str] = (),
    delimiter: str | None = None,
    decimal: str | None = None,
    like: Table | Recipe | None = None,
    stream: bool | None = None,
) -> Table:
    """A table whose rows are samples, and one column of which may be their label; needs pyarrow (extra ``data``).

    source: the path or URL of a CSV, Parquet or Arrow file; a folder, a pattern ("data/part-*.csv") or a list of such
        files; a table of pandas, Polars, pyarrow, or of a library that speaks Arrow's PyCapsule protocol; a mapping
        from names to values; or a list of mappings, one a row.
    label: the column that is to be predicted.
    task: "classification" if the label is text, boolean or integer, "regression" if it is floating; or said here.
    columns: those that are used; None: all. The label need not be among them.
    drop: columns that are not.
    kinds: "number", "category" or "hash" by column, where the type does not say it: integers that are codes are a
        "category".
    one_hot: the most texts of a column that each get a column of their own.
    buckets: columns to which the texts of others are hashed.
    missing: texts that stand for no value, such as "?", besides those that pandas knows ("", "NA", "nan", "null", ...).
    delimiter: of a CSV file; None: that of , ; tab and | which its first line has most of.
    decimal: "." or ",", before the fractions of a CSV file's numbers; None: "," where the delimiter is another and
        the first 64 KiB have numbers with commas and none with points.
    like: a table of training rows, or its ``recipe``: this one is prepared by their numbers. Its columns are found by
        name; others are ignored, and so is the label where there is none.
    stream: read files again and again, a block at a time, instead of holding them; None: those that are larger than a
        quarter of the available memory. Packed CSV files cannot be.

    **What becomes of a column.** Numbers and booleans: (x - mean) / deviation, and the median in the place of a missing
    value. Texts: up to ``one_hot`` of them one column each, 1 for its text; more are hashed, by CRC-32 modulo
    ``buckets``, with a TableWarning. Where training rows had missing values there is a column more, 1 for those without
    one. Columns that are all missing or all the same are left out, with a warning. Dates, lists and texts of which most
    rows have one of their own are errors that say what to do. A text that training rows had not is 0 in all columns,
    and a value that is missing where none was in training is the median, or 0 in all columns: told once by a warning.
    Whole numbers of a CSV file of which some have a 0 before them, as codes, are told, and as a label are texts. NaN is
    a missing value, infinity an error. Numbers of regression's label are standardised, too; :class:`~gpubatch.Model`
    gives predictions in their own unit.

    All of this is found from the rows that a network is trained on: ``train, test = table.split(0.2)``.

    **Several files** are one table: those of a folder or a pattern in the natural order of their paths, as
    :func:`gpubatch.sources.files` finds them, with the same columns in any order. A column that holds whole numbers in
    one file and fractions in another holds numbers, and a column that is text in some CSV files is text in all.

    **Larger than memory.** A file that is streamed is read once to find its blocks, types and classes, of Parquet and
    Arrow the label alone, once for the numbers of the training rows, and once an epoch. What is held are a block, the
    loader's window and 4096 numbers for each of log2(rows / 4096) levels of a median, whose rank is then wrong by at
    most rows log2(rows / 4096) / 4096; none of it grows with the rows. ``split`` draws each row by itself, so that
    shares are right to sampling error. A block is a row group, a record batch, or a mebibyte of a CSV file.

    Raises DataFormatError for a file or column that is none of this; ArgumentError, DTypeError, NonFiniteError and
    OSError.

    >>> table = read_table({"size": [1.0, 2.0, None, 9.0], "kind": ["a", "b", "a", "b"]}, label="kind")
    >>> table.classes, table.features, table.outputs
    (['a', 'b'], 2, 2)
    """
    missing = texts_of("missing", missing)
    if isinstance(label, bool) or not isinstance(label, str | int | tuple | None):
        shown = f"a {type(label).__name__}" if hasattr(label, "shape") else repr(label)
        raise DTypeError(f"label must be the name of one column, got {shown}")
    # As the columns of frames are called here, whose names may be numbers or have levels.
    label_name = None if label is None else str(label)
    if like is not None:
        given = {"label": label, "columns": columns, "kinds": kinds, "drop": drop or None, "missing": missing or None}
        if named := next((name for name, value in given.items() if value is not None), None):
            raise ArgumentError(f"{named} must be left out where like is given, which has it")
        recipe = like.recipe if isinstance(like, Table) else like
        if not isinstance(recipe, Recipe):
            raise DTypeError(f"like must be a table of gb.read_table, or its recipe, got {type(like).__name__}")
        return Table(opened(source, Reading(recipe.texts, recipe.missing, delimiter, decimal, None, stream)), recipe)
    kinds = dict(kinds or {})
    for name, kind in kinds.items():
        check_choice(f"kinds[{name!r}]", kind, KINDS)
    one_hot = check_int("one_hot", one_hot, 1, MOST_CATEGORIES)
    buckets = check_int("buckets", buckets, 1, MOST_BUCKETS)
    check_choice("task", task, TASKS)
    texts = [name for name, kind in kinds.items() if kind != "number"]
    rows = opened(source, Reading(texts, missing, delimiter, decimal, label_name, stream))
    names = chosen_names(rows, label_name, columns, drop, kinds)
    return Table(rows, Options(names, label_name, task, kinds, one_hot, buckets, missing))


def texts_of(name: str, given: Any) -> tuple[str, ...]:
    """Texts of an argument: one, or several."""
    found = (given,) if isinstance(given, str) or not isinstance(given, Iterable) else tuple(given)
    if wrong := [x for x in found if not isinstance(x, str)]:
        raise DTypeError(f"{name} must hold texts, got {wrong[0]!r}")
    return found


def chosen_names(rows: Rows, label: str | None, columns: Any, drop: Any, kinds: Mapping[str, str]) -> list[str]:
    """The columns of the samples, in the order of the table."""
    given = {"label": () if label is None else label, "columns": () if columns is None else columns}
    for argument, names in (*given.items(), ("drop", drop), ("kinds", list(kinds))):
        for name in texts_of(argument, names):
            if name not in rows.names:
                raise ArgumentError(
                    f"{argument} must name columns of {rows.where}, {listed(rows.names)}; got {name!r}"
                    + (nearest(name, rows.names) or UNDIVIDED * (rows.is_csv and len(rows.names) == 1))
                )
    wanted = rows.names if columns is None else texts_of("columns", columns)
    left = {*texts_of("drop", drop), label}
    if label is not None and label in texts_of("drop", drop):
        raise ArgumentError(f"drop must not have the label, {label!r}")
    names = [name for name in rows.names if name in wanted and name not in left]
    if not names:
        raise ArgumentError(f"{rows.where} has no columns besides the label and those of drop: {listed(rows.names)}")
    nameless = [name for name in names if UNNAMED.fullmatch(name)]
    if columns is None and nameless and len(names) > len(nameless):
        names = [name for name in names if name not in nameless]
        called = f", {nameless[0]!r} by pandas" * bool(nameless[0])
        warnings.warn(
            f"{rows.where}: a column has no name{called}, as that of pandas' row numbers, and is left out; give it one "
            "if it is to be learnt from",
            *(TableWarning, 4),
        )
    if other := [name for name in kinds if name not in names]:
        raise ArgumentError(f"kinds must be of columns that are used, {listed(names)}; got {other[0]!r}")
    return names


def some_of(names: Sequence[str], most: int = 20) -> str:
    """Names for a line or two, the first of many."""
    return ", ".join(names[:most]) + (f", ... {len(names) - most} more" if len(names) > most else "")


class Table(Prepared):
    """Rows as samples: what :func:`read_table` returns, and ``split`` of it.

    A table goes where X and Y go: ``gb.Loader(train)``, ``gb.fit(validation=test)``, ``model.evaluate(test)``. Its
    numbers (``recipe``) are found when they are first needed, from the rows that it has then.

    >>> table = read_table({"x": [1, 2, 3, 4] * 5, "y": ["a", "a", "b", "b"] * 5}, label="y")
    >>> train, test = table.split(test_size=0.2, seed=0)
    >>> len(train), len(test), train.features, test.classes
    (16, 4, 1, ['a', 'b'])
    """

    def __init__(
        self,
        rows: Rows,
        of: Options | Recipe | Table,
        chosen: Chosen | None = None,
        target: Target | None = None,
        labelled: bool = True,
        split: tuple[float, int, bool] | None = None,
    ) -> None:
        self._rows, self._of, self._chosen, self._with_labels = rows, of, chosen, labelled
        self._split = split  # the first one that it is a part of: test size, seed, and whether rows were drawn
        self._strange = Strange()
        self._told: set[tuple[str, str]] = set()
        self._starts = np.cumsum([0, *rows.sizes])
        n = int(self._starts[-1])
        if n == 0:
            raise DataFormatError(f"{rows.where}: expected at least one row, found none")
        if isinstance(of, Recipe):
            if absent := [name for name in of.names if name not in rows.names]:
                raise DataFormatError(
                    f"{rows.where}: expected the columns of training, found no {listed(absent)}; it has "
                    f"{listed(rows.names)}"
                )
        elif target is None and isinstance(of, Options):
            check_types(rows, of)
            target = None if of.label is None else find_target(rows, of, self._blocks([of.label]))
        self._target = target

    def __len__(self) -> int:
        return sum(self.block_sizes)

    # --- what it is ---

    @functools.cached_property
    def recipe(self) -> Recipe:
        """The numbers by which rows are prepared."""
        if isinstance(self._of, Recipe):
            return self._of
        if isinstance(self._of, Table):
            return self._of.recipe
        found = fit(self._rows, self._of, self._target, self._blocks)
        return dataclasses.replace(found, rows=self._training_rows(found))

    @property
    def where(self) -> str:
        """The path of its file, or the kind of a table in memory, for messages."""
        return self._rows.where

    @property
    def several_files(self) -> bool:
        """Whether its rows are from several files."""
        return self._rows.origins is not None

    @property
    def features(self) -> int:
        """The number of features of a sample."""
        return self.recipe.features

    @property
    def columns(self) -> list[str]:
        """The columns that samples are made of."""
        return [column.name for column in self.recipe.columns]

    @property
    def label(self) -> str | None:
        """The column that is to be predicted."""
        return None if self._goal is None else self._goal.name

    @property
    def task(self) -> str | None:
        """ "classification" or "regression"; None without a label."""
        return None if self._goal is None else "regression" if self._goal.classes is None else "classification"

    @property
    def classes(self) -> list[Any] | None:
        """The names of the classes in the order of their numbers; None in regression and without a label."""
        return None if self._goal is None or self._goal.classes is None else list(self._goal.classes)

    @property
    def outputs(self) -> int:
        """Outputs of a network that predicts the label: one for each class, or 1."""
        if self._goal is None:
            raise ArgumentError(f"{self.where} has no label: give read_table(..., label=...)")
        return 1 if self._goal.classes is None else len(self._goal.classes)

    @property
    def loss(self) -> str:
        """A loss for its task: "softmax_cross_entropy" or "mse"."""
        return "mse" if self.outputs == 1 else "softmax_cross_entropy"

    @property
    def labelled(self) -> bool:
        """Whether its rows have the label."""
        return self._with_labels and self._goal is not None and self._goal.name in self._rows.names

    @functools.cached_property
    def labels(self) -> np.ndarray:
        """The labels of its rows: the names of classes, or numbers in their own unit, float64."""
        goal = self._goal
        if goal is None or not self.labelled:
            raise ArgumentError(f"{self.where} has no label{'' if goal is None else f' {goal.name!r}'}")
        whole = np.concatenate(list(self._label_blocks()))
        return whole if goal.classes is None else np.array(goal.classes)[whole]

    @property
    def X(self) -> np.ndarray:  # noqa: N802
        """Its samples in memory, float32 (rows, features): numbers standardised, categories as columns of 0 and 1."""
        return self._arrays[0]

    @property
    def Y(self) -> np.ndarray | None:  # noqa: N802
        """The targets: classes by number, int64, or standardised amounts, float32; None without a label."""
        return self._arrays[1]

    def prepare(self, path_or_frame: Any) -> np.ndarray:
        """Samples of other rows, float32 (rows, features), prepared by the numbers of this table, without a label.

        path_or_frame: whatever :func:`read_table` takes, with the columns of this table

        >>> table = read_table({"x": [1.0, 2.0, 3.0], "y": ["a", "b", "a"]}, label="y")
        >>> table.prepare({"x": [2.0]})
        array([[0.]], dtype=float32)
        """
        return read_table(path_or_frame, like=self).X

    def __repr__(self) -> str:
        lines = [f"<Table {self.where}: {len(self)} rows"]
        try:
            lines += (
                self._shown_columns()
                if self._rows.in_memory or "recipe" in vars(self)
                else [
                    f"columns: {some_of(self.root.names)}",
                    "a file that is streamed; its numbers are found when it is used",
                ]
            )
        except GpubatchError as error:
            lines.append(f"which cannot be prepared: {error}")
        if self.label is not None:
            classes = "" if self.classes is None else f", {len(self.classes)} classes: {listed(self.classes)}"
            lines.append(f"label: {self.label}, {self.task}{classes}")
        shown = [textwrap.wrap(line, 99, initial_indent="  ", subsequent_indent="    ") for line in lines[1:]]
        return "\n".join([lines[0], *(line for wrapped in shown for line in wrapped)]) + ">"

    def _shown_columns(self) -> list[str]:
        columns = self.recipe.columns
        found = [f"{len(columns)} columns, {self.features} features"]
        for kind in (*KINDS, LeftOut.kind):
            some = [
                f"{column.name} ({len(column.values)})" if isinstance(column, Category) else column.name
                for column in columns
                if column.kind == kind
            ]
            found += [f"{kind}: {some_of(some)}"] if some else []
        gaps = [column.name for column in columns if not isinstance(column, LeftOut) and column.missing]
        return found + ([f"missing in: {some_of(gaps)}"] if gaps else [])

    # --- what is made of it ---

    def split(self, test_size: float = 0.2, seed: int = 0) -> tuple[Table, Table]:
        """Rows to train on, and a share ``test_size`` of them to test on, drawn at random, every class in proportion.

        The numbers of both, medians, means and categories, are those of the rows to train on.
        """
        return self.split_as(test_size, seed, None)

    def split_as(self, test_size: float, seed: int, drawn: bool | None) -> tuple[Table, Table]:
        """:meth:`split`; drawn: whether each row is drawn by itself; None: where the file is streamed."""
        drawn = not self._rows.in_memory if drawn is None else drawn
        seed = check_int("seed", seed, 0, 2**64 - 1)
        kept: Chosen
        held: Chosen
        if drawn:
            kept, held = (self._chosen if isinstance(self._chosen, Drawn) else Drawn()).split(test_size, seed)
        else:
            classified = self.classes is not None and self.labelled
            codes = np.concatenate(list(self._label_blocks())) if classified else None
            rows = np.concatenate(
                [self._within(number) + self._starts[number] for number in range(len(self._rows.sizes))]
            )
            kept, held = (Listed(rows[part]) for part in split(len(self), test_size, seed, codes, "test_size"))
        of = self.root
        train = Table(self._rows, of, kept, self._target, split=self._split or (test_size, seed, drawn))
        test = Table(self._rows, of if isinstance(of, Recipe) else train, held, self._target)
        if not (len(train) and len(test)):
            words = f"leaves {len(test)} to test on and {len(train)} to train"
            raise ArgumentError(f"test_size={test_size:g} of {len(self)} samples {words}")
        return train, test

    def has(self, rows: TrainingRows | None) -> bool:
        """Whether it has the rows of training, prepared by their numbers."""
        if rows is None or len(self) != rows.rows:
            return False
        pieces = self.first(rows.digested)._blocks(self.recipe.names) if rows.digested else ()
        found = [self.recipe.samples(piece, None) for piece in pieces]
        return rows.are_of(len(self), np.concatenate([np.empty((0, self.features), np.float32), *found]))

    def first(self, rows: int) -> Table:
        """Its first rows, a table that is prepared by their numbers unless others prepare this one."""
        found, wanted = list[np.ndarray](), check_int("rows", rows, 1)
        for number, start in enumerate(self._starts[:-1]):
            found.append(self._within(number)[:wanted] + start)
            wanted -= len(found[-1])
            if not wanted:
                break
        return Table(self._rows, self._of, Listed(np.concatenate(found)), self._target, self._with_labels, self._split)

    @property
    def root(self) -> Options | Recipe:
        """The options of ``read_table`` or the recipe of ``like``, which decide before any rows are training rows."""
        return self._of.root if isinstance(self._of, Table) else self._of

    def prepared_by(self, recipe: Recipe, labelled: bool = True) -> Table:
        """The same rows, prepared by the numbers of others; perhaps without their labels."""
        return Table(self._rows, recipe, self._chosen, labelled=labelled)

    def as_source(self) -> Source:
        """Its samples as a source, of which a block is prepared at a time."""
        return Blocks(self)

    def as_samples(self) -> tuple[Any, Any]:
        """X, float32 (rows, features), and Y, None without a label: classes as int64, or standardised float32.

        Where the file is streamed, a source of both and None.
        """
        return self._arrays if self._rows.in_memory else (self.as_source(), None)

    @functools.cached_property
    def _arrays(self) -> tuple[np.ndarray, np.ndarray | None]:
        recipe = self.recipe
        X, done = np.empty((len(self), recipe.features), np.float32), 0
        Y: np.ndarray | None = None
        for x, y in self._made(self._blocks(self._wanted)):
            X[done : done + len(x)] = x
            if y is not None:
                Y = np.empty(len(self), y.dtype) if Y is None else Y
                Y[done : done + len(x)] = y
            done += len(x)
        self._tell()
        return X, Y

    # --- inside ---

    @property
    def _goal(self) -> Target | None:
        """The label as far as it is known without looking at all rows."""
        return self.recipe.target if isinstance(self.root, Recipe) else self._target

    def _within(self, number: int) -> np.ndarray:
        """The rows of a block that are the table's, counted from its first."""
        start, stop = int(self._starts[number]), int(self._starts[number + 1])
        return np.arange(stop - start) if self._chosen is None else self._chosen.within(start, stop)

    @functools.cached_property
    def block_sizes(self) -> list[int]:
        """The number of its rows in each block."""
        if self._chosen is None:
            return self._rows.sizes
        return [len(self._within(number)) for number in range(len(self._rows.sizes))]

    def _blocks(self, names: Sequence[str]) -> Iterator[Piece]:
        """Its rows, at most AT_ONCE together."""
        for number, size in enumerate(self.block_sizes):
            if size:
                yield from self._parts(self._rows.block(number, names), number, self._within(number))

    def _parts(self, block: Any, number: int, rows: np.ndarray) -> Iterator[Piece]:
        """Some rows of a block, likewise."""
        origins = self._rows.origins
        where, first = (self.where, int(self._starts[number])) if origins is None else origins[number]
        for start in range(0, len(rows), AT_ONCE):
            some = rows[start : start + AT_ONCE]
            whole = int(some[-1]) - int(some[0]) + 1 == len(some) and bool((np.diff(some) == 1).all())
            table = block.slice(int(some[0]), len(some)) if whole else block.take(some)
            yield Piece(table, where, first + int(some[0]), self.root.missing)

    def _label_blocks(self) -> Iterator[np.ndarray]:
        """The classes of rows by number, or their amounts."""
        goal = self._goal
        assert goal is not None
        for piece in self._blocks([goal.name]):
            yield piece.label_numbers(goal.name) if goal.classes is None else goal.codes(piece)

    @property
    def _wanted(self) -> list[str]:
        """The columns that samples are made of."""
        target = self.recipe.target if self.labelled else None
        return [*self.recipe.names, *([] if target is None else [target.name])]

    def _made(self, pieces: Iterable[Piece]) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
        """x and y of rows."""
        recipe = self.recipe
        target = recipe.target if self.labelled else None
        for piece in pieces:
            x = recipe.samples(piece, self._strange)
            yield x, None if target is None else target.targets(piece)

    def block(self, number: int) -> Any:
        """The columns of a block that samples are made of, of all its rows."""
        return self._rows.block(number, self._wanted)

    def of_block(self, number: int, block: Any, places: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """x and y of some of its rows in a block, by their places among its rows there."""
        parts = list(self._made(self._parts(block, number, self._within(number)[places])))
        self._tell()
        x = np.concatenate([x for x, _ in parts])
        return x, None if parts[0][1] is None else np.concatenate([y for _, y in parts if y is not None])

    def _tell(self) -> None:
        """Warn of texts and gaps that the training rows did not have."""
        if words := self._strange.words(self._told):
            warnings.warn(f"{self.where}: {words}", TableWarning, 3)

    def _training_rows(self, recipe: Recipe) -> TrainingRows:
        """Which rows these are, by the first ones of the whole table."""
        first = self._rows.block(0, recipe.names).slice(0, DIGESTED)
        try:
            x = recipe.samples(Piece(first, self.where, 0, recipe.missing), None)
        except GpubatchError:  # in a row to test on, which those who test on it are told
            x = np.empty((0, recipe.features), np.float32)
        return TrainingRows.of(int(self._starts[-1]), len(self), x, self._split)


class Blocks:
    """The samples of a table as a source: the block that was prepared last is kept."""

    def __init__(self, table: Table) -> None:
        self._table, self.path = table, table.where
        self._starts = np.cumsum([0, *table.block_sizes])
        self.block = max(table.block_sizes)
        if table.several_files:  # whose blocks are of any sizes
            self.boundaries = np.unique(self._starts)
        self._number, self._kept = -1, None

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, indices: np.ndarray, /) -> Any:
        """The samples at ``indices``: x, or (x, y)."""
        blocks = np.searchsorted(self._starts, indices, side="right") - 1
        out: list[np.ndarray] = []
        # In the order of their use: whoever goes on with the last one finds it kept.
        for number in sorted(dict.fromkeys(blocks.tolist()), key=lambda number: number != self._number):
            if number != self._number:
                self._kept, self._number = None, -1  # one block at a time
                self._kept, self._number = self._table.block(number), number
            here = np.flatnonzero(blocks == number)
            made = self._table.of_block(number, self._kept, indices[here] - self._starts[number])
            for place, array in enumerate(array for array in made if array is not None):
                if place == len(out):
                    out.append(np.empty((len(indices), *array.shape[1:]), array.dtype))
                out[place][here] = array
        return tuple(out) if len(out) > 1 else out[0]
