"""Open the rows of a table, from one file, several files or a frame."""

from __future__ import annotations

import itertools
import os
import warnings
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from gpubatch.errors import ArgumentError, DataFormatError, TableWarning
from gpubatch.sources import InTurn, Opener, naming_the_file, openers_of, words_of
from gpubatch.tables.columns import CODED, TEXT, family, need
from gpubatch.tables.files import Looked, Reading, looked_at, streams
from gpubatch.tables.rows import Rows, first_line, of_frame

APART = ("train", "training", "test", "testing", "val", "valid", "validation", "dev")  # folders of parts of a set
OPEN = 32  # files that are open at a time: a system allows a process 1,024 or less


def opened(source: Any, how: Reading) -> Rows:
    """The rows of files or of a frame."""
    files = files_of(source)
    if files is None:
        if how.stream:
            raise ArgumentError(f"stream=True reads files, got a {type(source).__name__}")
        return of_frame(source)

    if len(files) == 1:
        found = looked_at(files[0], how)
        return found.rows(streams(how.stream, found.size))
    return joined(words_of(source), files, how)


def files_of(source: Any) -> list[Opener] | None:
    """The files of a path, a URL, a folder, a pattern or a list of these; None for what is none of them."""
    several = isinstance(source, (list, tuple)) and len(source) > 0 and all(map(is_file, source))
    return list(openers_of(source)) if several or is_file(source) else None


def is_file(x: Any) -> bool:
    """Whether it is a path, a URL, or an object that opens a file."""
    return isinstance(x, (str, os.PathLike)) or all(hasattr(x, name) for name in ("open", "size", "identity"))


def joined(where: str, files: Sequence[Opener], how: Reading) -> Rows:
    """The rows of several files. CSV files are read once more where a column is text in some of them only."""
    texts = set[str]()
    while True:
        found, parts = list[Looked](), list[Rows]()
        for file in files:
            found.append(looked_at(file, how._replace(texts=[*how.texts, *texts])))
            found[-1].close()
        streamed = streams(how.stream, sum(each.size for each in found))
        for each in found:
            parts.append(each.rows(streamed))
            each.close()
            parts[-1].close()
        if not (clash := clashing(parts) - texts):
            tell_of_folders(where, files, parts[0].names)
            return Joined(where, parts, how.label)
        texts |= clash


def tell_of_folders(where: str, files: Sequence[Opener], names: Sequence[str]) -> None:
    """Warn of columns in the names of folders only, as in ``year=2020/part-0.parquet``, and of folders to test on."""
    above = sorted({PurePath(file.path).parent.name.lower() for file in files} & {*APART})
    if len(above) > 1:
        warnings.warn(
            f"{where}: the files of {' and '.join(map(repr, above))} are one table; if they are to be apart, give one "
            "of these folders, and the others to read_table(..., like=)",
            *(TableWarning, 4),
        )
    folders = {part for file in files for part in PurePath(file.path).parent.parts if "=" in part}
    if hidden := sorted({part.partition("=")[0] for part in folders} - {*names}):
        warnings.warn(
            f"{where}: {', '.join(map(repr, hidden))} in the names of folders, such as {min(folders)!r}, is not read; "
            "write it as a column into the files if it is to be learnt from, or give pandas.read_parquet(folder)",
            *(TableWarning, 4),
        )


def clashing(parts: Sequence[Rows]) -> set[str]:
    """The columns of CSV files that hold texts in some of them only, so that they have to be texts in all."""
    types, found = dict(parts[0].types), set[str]()
    for part in parts[1:]:
        for name in types.keys() & part.types:
            wide = common(types[name], part.types[name])
            if wide is not None:
                types[name] = wide
            elif all(each.is_csv for each in parts):
                found.add(name)
    return found


def common(known: Any, found: Any) -> Any:
    """A type of Arrow's that holds the values of two; None where there is none."""
    pa = need("pyarrow")
    if known.equals(found):
        return known
    if TEXT in (families := {family(known), family(found)}) and families <= {TEXT, CODED}:
        return pa.large_string()
    try:
        schemas = [pa.schema([("column", kind)]) for kind in (known, found)]
        return pa.unify_schemas(schemas, promote_options="permissive").field(0).type
    except pa.ArrowException:
        return None


class Joined:
    """The rows of several files, those of the first file first; columns are found by name.

    Of the files that are streamed, at most ``OPEN`` are open at a time.
    """

    def __init__(self, where: str, parts: Sequence[Rows], label: str | None) -> None:
        self.where, first = where, parts[0]
        self.names, self.types, self.is_csv = first.names, dict(first.types), first.is_csv
        for part in parts[1:]:
            self._compare(first, part)
        parts = [part for part in parts if sum(part.sizes)] or [first]
        self.in_memory = all(part.in_memory for part in parts)
        self.codes: Mapping[str, str] = {name: code for part in parts for name, code in part.codes.items()}
        self._blocks = [(part, number) for part in parts for number in range(len(part.sizes))]
        self.sizes = [size for part in parts for size in part.sizes]
        self.origins: list[tuple[str, int]] | None = [
            (part.where, start) for part in parts for start in itertools.accumulate(part.sizes[:-1], initial=0)
        ]
        self.label_values: list[str] | None = None
        values = [part.label_values for part in parts if part.types.get(label or "") == self.types.get(label or "")]
        if len(values) == len(parts) and None not in values:
            self.label_values = list(dict.fromkeys(value for some in values if some is not None for value in some))
        self._open: OrderedDict[int, Rows] = OrderedDict()
        self._lock = InTurn()

    def _compare(self, first: Rows, part: Rows) -> None:
        """Widen the types to hold those of a file; an error for columns that it has more or fewer than the first."""
        if absent := [name for name in first.names if name not in part.types]:
            raise DataFormatError(f"{part.where}: expected the column {absent[0]!r}, as in {first.where}, found none")
        if more := [name for name in part.names if name not in self.types]:
            raise DataFormatError(f"{part.where}: expected the columns of {first.where}, found {more[0]!r}, too")
        for name, kind in self.types.items():
            if (wide := common(kind, part.types[name])) is None:
                raise DataFormatError(
                    f"{part.where}: expected column {name!r} of type {kind}, as in the files before, found "
                    f"{part.types[name]}"
                )
            self.types[name] = wide

    def block(self, number: int, names: Sequence[str]) -> Any:
        """See :class:`Rows`."""
        part, own = self._blocks[number]
        with self._lock:
            self._open[id(part)] = part
            self._open.move_to_end(id(part))
            while len(self._open) > OPEN:
                self._open.popitem(last=False)[1].close()
            table = part.block(own, names)
        schema = need("pyarrow").schema([(name, self.types[name]) for name in table.column_names])
        if table.schema.types == schema.types:
            return table
        with naming_the_file(part.where, "values of the types that all files have"):
            for name, found in zip(table.column_names, table.schema.types, strict=True):
                self._check_exact(part.where, name, table[name], found)
            return table.cast(schema, safe=False)

    def _check_exact(self, where: str, name: str, column: Any, kind: Any) -> None:
        """Raise for integers that would be rounded since other files hold floats: they may be labels or categories."""
        pa, wide = need("pyarrow"), self.types[name]
        if pa.types.is_integer(kind) and pa.types.is_floating(wide):
            try:
                column.cast(wide)
            except pa.ArrowInvalid as error:
                raise DataFormatError(
                    f"{where}: column {name!r} must be of one type in all files, as it is {wide} in others, which does "
                    f"not hold all of its integers exactly: {first_line(error)}"
                ) from error

    def close(self) -> None:
        """See :class:`Rows`."""
        with self._lock:
            while self._open:
                self._open.popitem()[1].close()
