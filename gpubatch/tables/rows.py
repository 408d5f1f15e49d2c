"""Rows of a table in blocks that fit in memory, wherever the table is."""

from __future__ import annotations

import types
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from gpubatch.errors import DataFormatError, DTypeError, check_real
from gpubatch.tables.columns import need

BLOCK = 1 << 14  # rows that are looked at together of a table in memory


class Rows(Protocol):
    """A table as blocks of rows.

    where: what it is called in messages
    names: of the columns, all different
    types: Arrow's, of the columns by name
    sizes: rows in each block
    origins: of several files, the file and the place there of each block's first row; None of one table
    is_csv: whether it is from a CSV file, whose types are guessed
    in_memory: whether its values are in memory already
    label_values: the different texts of the label, where they are known already
    codes: columns of whole numbers of which a CSV file has some with a 0 before them, and one of these
    """

    where: str
    names: list[str]
    types: dict[str, Any]
    sizes: list[int]
    origins: list[tuple[str, int]] | None
    is_csv: bool
    in_memory: bool
    label_values: list[str] | None
    codes: Mapping[str, str]

    def block(self, number: int, names: Sequence[str]) -> Any:
        """Columns of a block, as a table of pyarrow's."""

    def close(self) -> None:
        """Close the file until a block is next read."""


class Held:
    """A table in memory."""

    in_memory = True
    origins: list[tuple[str, int]] | None = None
    label_values: list[str] | None = None

    def __init__(
        self, table: Any, where: str, is_csv: bool = False, codes: Mapping[str, str] = types.MappingProxyType({})
    ) -> None:
        self._table, self.where, self.is_csv, self.codes = table, where, is_csv, codes
        self.names = different(where, table.column_names)
        self.types = dict(zip(self.names, table.schema.types, strict=True))
        self.sizes = [min(BLOCK, len(table) - start) for start in range(0, len(table), BLOCK)]

    def block(self, number: int, names: Sequence[str]) -> Any:
        """See :class:`Rows`."""
        return self._table.select(list(names)).slice(number * BLOCK, self.sizes[number])

    def close(self) -> None:
        """See :class:`Rows`."""


def different(where: str, names: Sequence[str]) -> list[str]:
    """Names of columns, which must be different."""
    names = list(names)
    if len(counts := Counter(names)) < len(names):
        twice, times = counts.most_common(1)[0]
        raise DataFormatError(f"{where}: columns must have different names, got {twice!r} {times} times")
    if not names:
        raise DataFormatError(f"{where}: expected columns, found none")
    return names


def of_frame(source: Any) -> Held:
    """The rows of a table in memory, whoever's it is."""
    pa = need("pyarrow")
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
            names = ["" if name is None or name != name else str(name) for name in source.columns]
            found = pa.Table.from_arrays(
                [of_values(where, name, source.iloc[:, place]) for place, name in enumerate(names)], names
            )
        elif type(source).__name__ == "Series":
            raise DTypeError(f"a table must have columns with names, got a {kind}: give a frame, as of to_frame()")
        elif type(source).__module__.partition(".")[0] == "datasets":
            found = of_huggingface(source)
        elif hasattr(source, "__arrow_c_stream__"):
            found = pa.table(source)
        elif isinstance(source, np.ndarray) and source.dtype.names:
            found = pa.table({name: of_values(where, name, source[name]) for name in source.dtype.names})
        elif isinstance(source, Mapping):
            found = pa.table({str(name): of_values(where, str(name), values) for name, values in source.items()})
        elif isinstance(source, (list, tuple)) and source and all(isinstance(row, Mapping) for row in source):
            names = list(dict.fromkeys(str(name) for row in source for name in row))
            found = pa.table({name: of_values(where, name, [row.get(name) for row in source]) for name in names})
        else:
            raise DTypeError(
                "a table must be the path of a CSV, Parquet or Arrow file, a folder or a list of such files, a table "
                "of pyarrow, pandas or Polars, a mapping from names to values, or a list of such mappings for rows; "
                f"got {described(source)}"
            )
        found.validate(full=True)
    except pa.ArrowException as error:
        raise DataFormatError(f"{where} is no table of columns of one type each: {first_line(error)}") from error
    return Held(found, where)


def of_huggingface(source: Any) -> Any:
    """A Dataset of Hugging Face's as a table of pyarrow's; labels that have names, by these."""
    pa = need("pyarrow")
    if isinstance(source, Mapping) or not hasattr(source, "with_format") or not hasattr(source, "__len__"):
        parts = f" of {', '.join(map(repr, source))}: give one of these" if isinstance(source, Mapping) else ""
        raise DTypeError(f"a table must be one datasets.Dataset in memory, got a {type(source).__name__}{parts}")
    found = source.with_format("arrow")[:]
    for place, (name, feature) in enumerate(source.features.items()):
        if hasattr(feature, "int2str"):
            numbers = found[name].combine_chunks().cast(pa.int32())
            named = pa.DictionaryArray.from_arrays(numbers, pa.array(feature.names))
            found = found.set_column(place, name, named)
    return found


def described(source: Any) -> str:
    """A description of what was given in place of a table."""
    if hasattr(source, "read"):
        return f"a {type(source).__name__}; give the path of its file, or pandas.read_csv of it"
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
        # Those of pandas that keep only the values that are not the same.
        values = values.sparse.to_dense() if hasattr(values, "sparse") else values
        return pa.array(values, from_pandas=True)
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
        of = f", not {values.dtype}" if hasattr(values, "dtype") else ""
        raise DataFormatError(
            f"{where}: column {name!r} must have values of one type{of}: {first_line(error)}"
        ) from error


# --- some of the rows -----------------------------------------------------------------------------------------------


class Chosen(Protocol):
    """Some rows of a table."""

    def within(self, start: int, stop: int) -> np.ndarray:
        """Those from row ``start`` to row ``stop - 1``, counted from ``start``, in order."""


@dataclass(frozen=True, eq=False)
class Listed:
    """The rows in a list, in order."""

    rows: np.ndarray

    def within(self, start: int, stop: int) -> np.ndarray:
        """See :class:`Chosen`."""
        first, last = np.searchsorted(self.rows, (start, stop))
        found: np.ndarray = self.rows[first:last] - start
        return found


@dataclass(frozen=True)
class Drawn:
    """Rows that are drawn one by one, so that no list of them is needed.

    draws: seed, share, and whether the rows that are drawn with this share are taken or the others; of each draw only
        rows count that the draws before it took
    """

    draws: tuple[tuple[int, float, bool], ...] = ()

    def split(self, share: float, seed: int) -> tuple[Drawn, Drawn]:
        """The rows that are not drawn, and ``share`` of them that are, to sampling error."""
        share = check_real("test_size", share, 0.0, 1.0, open_low=True, open_high=True)
        return Drawn((*self.draws, (seed, share, False))), Drawn((*self.draws, (seed, share, True)))

    def within(self, start: int, stop: int) -> np.ndarray:
        """See :class:`Chosen`."""
        taken = np.ones(stop - start, bool)
        for place, (seed, share, drawn) in enumerate(self.draws):
            # A counter gives four words. The second word of the counter keeps these apart from other random numbers.
            key, counter = np.array([seed, 0], np.uint64), np.array([start // 4, 2 + place, 0, 0], np.uint64)
            words = np.random.Philox(key=key, counter=counter).random_raw(stop - start + start % 4)[start % 4 :]
            taken &= (words < np.uint64(int(share * 2**64))) == drawn
        return np.flatnonzero(taken)
