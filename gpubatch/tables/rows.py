"""Rows of a table in blocks that fit in memory, wherever the table is."""

from __future__ import annotations

import itertools
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from gpubatch.errors import ArgumentError, DataFormatError, DTypeError
from gpubatch.sources import naming_the_file
from gpubatch.tables.columns import need

__all__ = ["Held", "Rows", "opened"]

BLOCK = 1 << 14  # rows that are looked at together of a table in memory
ARROW_FILE, ARROW_STREAM, PARQUET = b"ARROW1", b"\xff\xff\xff\xff", b"PAR1"
DELIMITERS = ",;\t|"
START = 1 << 16  # bytes in which the header of a CSV file is looked for


class Rows(Protocol):
    """A table as blocks of rows.

    where: what it is called in messages
    names: of the columns, all different
    sizes: rows in each block
    in_memory: whether its values are in memory already
    """

    where: str
    names: list[str]
    sizes: list[int]
    in_memory: bool

    def block(self, number: int, names: Sequence[str]) -> Any:
        """Columns of a block, as a table of pyarrow's."""


class Held:
    """A table in memory."""

    in_memory = True

    def __init__(self, table: Any, where: str) -> None:
        self._table, self.where, self.names = table, where, different(where, table.column_names)
        self.sizes = [min(BLOCK, len(table) - start) for start in range(0, len(table), BLOCK)]

    def block(self, number: int, names: Sequence[str]) -> Any:
        """See :class:`Rows`."""
        return self._table.select(list(names)).slice(number * BLOCK, self.sizes[number])


def different(where: str, names: Sequence[str]) -> list[str]:
    """Names of columns, which must be different."""
    names = list(names)
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise DataFormatError(f"{where}: columns must have different names, got {twice!r} {names.count(twice)} times")
    if not names:
        raise DataFormatError(f"{where}: expected columns, found none")
    return names


def opened(
    source: Any, texts: Collection[str] = (), missing: Collection[str] = (), delimiter: str | None = None
) -> Rows:
    """The rows of a file or of a frame.

    texts: columns of a CSV file that are not to be taken for numbers
    missing: texts that stand for no value in a CSV file, besides "" and those that pandas knows
    delimiter: between the values of a CSV file; None: found in its first line
    """
    pa = need("pyarrow")
    if isinstance(source, (str, os.PathLike)):
        return of_file(os.fspath(source), texts, missing, delimiter)
    kind = type(source).__name__
    where = f"the {kind}"
    if type(source).__module__.partition(".")[0] == "polars" and hasattr(source, "collect"):
        raise DTypeError(f"{where} has not been computed yet: give its collect()")
    try:
        if isinstance(source, pa.Table):
            found = source
        elif isinstance(source, pa.RecordBatch):
            found = pa.Table.from_batches([source])
        elif type(source).__module__.partition(".")[0] == "pandas" and hasattr(source, "columns"):
            names = [str(name) for name in source.columns]
            found = pa.Table.from_arrays(
                [of_values(where, name, source.iloc[:, place]) for place, name in enumerate(names)], names
            )
        elif hasattr(source, "__arrow_c_stream__"):
            found = pa.table(source)
        elif isinstance(source, Mapping):
            found = pa.table({str(name): of_values(where, str(name), values) for name, values in source.items()})
        elif isinstance(source, (list, tuple)) and source and all(isinstance(row, Mapping) for row in source):
            names = list(dict.fromkeys(str(name) for row in source for name in row))
            found = pa.table({name: of_values(where, name, [row.get(name) for row in source]) for name in names})
        else:
            raise DTypeError(
                "a table must be the path of a CSV, Parquet or Arrow file, a table of pyarrow, pandas or Polars, a "
                f"mapping from names to values, or a list of such mappings for rows; got {described(source)}"
            )
        found.validate(full=True)
    except pa.ArrowException as error:
        raise DataFormatError(f"{where} is no table of columns of one type each: {first_line(error)}") from error
    return Held(found, where)


def described(source: Any) -> str:
    """What was given in place of a table."""
    if isinstance(source, np.ndarray):
        return (
            f"an array of shape {source.shape}, whose columns have no names; give a mapping, {{'name': X[:, 0], ...}}"
        )
    return f"a {type(source).__name__}"


def first_line(error: BaseException) -> str:
    """The first line of an error of pyarrow's."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def of_values(where: str, name: str, values: Any) -> Any:
    """A column of a mapping's or of pandas': a list, an array, a series; or one value, for a single row."""
    pa = need("pyarrow")
    if isinstance(values, str) or not hasattr(values, "__len__"):
        values = [values]
    try:
        return pa.array(values, from_pandas=True)
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
        raise DataFormatError(f"{where}: column {name!r} must have values of one type: {first_line(error)}") from error


# --- files --------------------------------------------------------------------------------------------------------


def of_file(path: str, texts: Collection[str], missing: Collection[str], delimiter: str | None) -> Rows:
    """The rows of a file; what it is is told by its first bytes."""
    with open(path, "rb") as opened_file:
        start = opened_file.read(START)
    if start.startswith(PARQUET):
        with naming_the_file(path, "a Parquet file"):
            table = need("pyarrow.parquet").ParquetFile(path).read()
            table.validate(full=True)
        return Held(table, path)
    if start.startswith((ARROW_FILE, ARROW_STREAM)):
        pa = need("pyarrow")
        with naming_the_file(path, "an Arrow file"):
            file = pa.OSFile(path)
            reader = pa.ipc.open_file(file) if start.startswith(ARROW_FILE) else pa.ipc.open_stream(file)
            table = reader.read_all()
            table.validate(full=True)
        return Held(table, path)
    return csv_held(path, start, texts, missing, delimiter)


def csv_held(path: str, start: bytes, texts: Collection[str], missing: Collection[str], delimiter: str | None) -> Held:
    """A CSV file in memory."""
    form = CsvForm(path, start, texts, missing, delimiter)
    with naming_the_file(path, "a CSV file"):
        table = need("pyarrow.csv").read_csv(path, **form.options({}))
    return Held(form.checked(table), path)


class CsvForm:
    """How a CSV file is to be read."""

    def __init__(
        self, path: str, start: bytes, texts: Collection[str], missing: Collection[str], delimiter: str | None
    ) -> None:
        self.path, self._texts = path, texts
        csv = need("pyarrow.csv")
        if delimiter is not None and (len(delimiter) != 1 or not delimiter.isascii()):
            raise ArgumentError(f"delimiter must be one character of ASCII, got {delimiter!r}")
        if b"\0" in start and not path.endswith((".gz", ".bz2", ".zst", ".lz4")):
            raise DataFormatError(f"{path}: expected a CSV, Parquet or Arrow file, found another, binary one")
        line = start.lstrip(b"\xef\xbb\xbf").splitlines()[0].decode("utf-8", "replace") if start.strip() else ""
        if not line:
            raise DataFormatError(f"{path}: expected a CSV file with a line of names, found an empty one")
        self.delimiter = delimiter or max(DELIMITERS, key=outside_quotes(line).count)
        usual = csv.ConvertOptions().null_values
        self._missing = [*usual, *(f"{before}{text}" for text in missing for before in ("", " "))]

    def options(self, kinds: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of pyarrow's reader."""
        csv, pa = need("pyarrow.csv"), need("pyarrow")
        return {
            "parse_options": csv.ParseOptions(delimiter=self.delimiter, newlines_in_values=True),
            "convert_options": csv.ConvertOptions(
                null_values=self._missing,
                strings_can_be_null=True,
                column_types={**dict.fromkeys(self._texts, pa.string()), **kinds},
            ),
        }

    def checked(self, table: Any) -> Any:
        """A table that was read, if it has names and texts."""
        pa = need("pyarrow")
        table = table.rename_columns([name.strip() for name in table.column_names])
        for name, kind in zip(table.column_names, table.schema.types, strict=True):
            if pa.types.is_binary(kind):
                raise DataFormatError(
                    f"{self.path}: expected texts in UTF-8, found others in column {name!r}; save the file as UTF-8, "
                    "or give pandas.read_csv(path, encoding=...)"
                )
        if all(is_numeral(name) for name in table.column_names):
            raise DataFormatError(
                f"{self.path}: expected a first line of names, found the numbers {', '.join(table.column_names[:5])}; "
                "give pandas.read_csv(path, names=[...])"
            )
        return table


def outside_quotes(line: str) -> str:
    """A line without what is in quotes."""
    return "".join(line.split('"')[::2])


def is_numeral(text: str) -> bool:
    """Whether a name is a number, as in a file without names."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def chosen_blocks(sizes: Sequence[int], rows: np.ndarray | None) -> Iterator[tuple[int, int, np.ndarray | None]]:
    """The blocks that have any of ``rows``, in order: number, first row, and the rows counted from it (None: all)."""
    for number, (start, stop) in enumerate(itertools.pairwise(itertools.accumulate(sizes, initial=0))):
        if rows is None:
            yield number, start, None
            continue
        here = rows[np.searchsorted(rows, start) : np.searchsorted(rows, stop)]
        if len(here):
            yield number, start, here - start
