"""Files of tables: CSV, Parquet and Arrow, held in memory or read again a block at a time."""

from __future__ import annotations

import contextlib
import functools
import gzip
import itertools
import re
import types
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from csv import reader as fields_of
from typing import Any, NamedTuple

import numpy as np

from gpubatch.backend import get_backend
from gpubatch.errors import ArgumentError, DataFormatError, InsufficientMemoryError, TableWarning, check_choice
from gpubatch.sources import (
    BytesByPlace,
    Grouped,
    InTurn,
    Opener,
    ParquetGroups,
    Reopened,
    naming_the_file,
    opened_arrow,
)
from gpubatch.tables.columns import DATE, Piece, family, is_numeral, need
from gpubatch.tables.recipe import LONGEST
from gpubatch.tables.rows import Held, Rows, different, first_line

ARROW_FILE, ARROW_STREAM, PARQUET = b"ARROW1", b"\xff\xff\xff\xff", b"PAR1"
PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bz2", b"\x28\xb5\x2f\xfd": "zstd", b"\x04\x22\x4d\x18": "lz4"}
DELIMITERS = ",;\t|"
BOM = b"\xef\xbb\xbf"
OTHERS = {  # what is often given in place of CSV files, and what to do
    b"PK\x03\x04": "an archive, as those of Excel are; save the sheet as CSV, or give pandas.read_excel(path), or of a "
    "packed CSV file pandas.read_csv(path)",
    b"\xd0\xcf\x11\xe0": "one of Office, as .xls is; save the sheet as CSV, or give pandas.read_excel(path)",
    b"\xfd7zXZ": "one packed by xz; unpack it, or give pandas.read_csv(path)",
    b"SQLite format 3": "a database of SQLite; give pandas.read_sql(query, connection)",
    b"\x89HDF": "HDF5; give pandas.read_hdf(path), or gb.sources.hdf5(path, x, y) to a Loader",
    b"\x93NUMPY": "an array of NumPy's; it goes to a Loader, or as {'name': X[:, 0], ...}",
    b"ORC": "ORC; give pandas.read_orc(path)",
    b"FEA1": "Feather of version 1; give pandas.read_feather(path)",
    b"\xff\xfe": "UTF-16; save the file as UTF-8, or give pandas.read_csv(path, encoding='utf-16')",
    b"\xfe\xff": "UTF-16; save the file as UTF-8, or give pandas.read_csv(path, encoding='utf-16')",
}
WRITTEN = {  # likewise texts
    re.compile(
        rb'\s*[\[{]\s*(["{\[\]}]|$)'
    ): "JSON; give pandas.read_json(path), with lines=True for a row in each line",
    re.compile(rb"\s*<(!doctype|html|\?xml)", re.IGNORECASE): "HTML or XML, perhaps of a server in place of the file",
    re.compile(rb"\s*@relation", re.IGNORECASE): "ARFF; give pandas.DataFrame(scipy.io.arff.loadarff(path)[0])",
    re.compile(rb'"?sep=.', re.IGNORECASE): "Excel's line for the delimiter, sep=, before the names; leave it out, or "
    "give pandas.read_csv(path, skiprows=1, sep=...)",
    re.compile(rb"\x80[\x02-\x05]"): "a pickle, which gpubatch does not read; give the frame that it has",
}
IN_UTF8 = "save the file as UTF-8, or give pandas.read_csv(path, encoding=...)"
MISFIT = re.compile(r"Expected (\d+) columns, got (\d+)")
NAMELESS = "\0"
NULLS = ("None", "<NA>")  # which pandas takes for no value, and pyarrow does not
DECIMAL = {  # values that are numbers with a fraction, in a file whose delimiter is no comma
    point: re.compile(rb'(?:^|[;\t|\n"])[-+]?\d+%b\d+(?=[;\t|\r\n"]|$)' % re.escape(point.encode())) for point in ".,"
}
START = 1 << 16  # bytes in which the first line of a CSV file is looked for
PIECE = 1 << 20  # bytes of a CSV file that are read at once
BLOCK = 1 << 23  # bytes of one that is held that a thread parses at once
LONGEST_LINE = 1 << 26
ROW = 16  # bytes that a row takes at least while its group is prepared
SHARE = 4  # a file of more than this part of the available memory is not held


class Reading(NamedTuple):
    """How files are to be read, as the caller of ``read_table`` said; see there.

    texts: columns of a CSV file that are not to be taken for numbers
    """

    texts: Collection[str] = ()
    missing: Collection[str] = ()
    delimiter: str | None = None
    decimal: str | None = None
    label: str | None = None
    stream: bool | None = None


class Looked(NamedTuple):
    """A file that was looked at, and is open.

    size: about how many bytes it takes in memory
    rows: gives its rows, streamed or held
    close: closes it until its rows are asked for
    """

    size: int
    rows: Callable[[bool], Rows]
    close: Callable[[], None] = lambda: None


def looked_at(file: Opener, how: Reading) -> Looked:
    """Open a file of the format that its first bytes tell."""
    with file.open() as start_of:
        start = read_whole(start_of, START)
    if start.startswith((PARQUET, ARROW_FILE, ARROW_STREAM)):
        is_parquet = start.startswith(PARQUET)
        need("pyarrow.parquet" if is_parquet else "pyarrow")
        groups = GroupedRows(
            file, *((ParquetGroups, "a Parquet file") if is_parquet else (opened_arrow, "an Arrow file"))
        )
        return Looked(groups.bytes_in_memory, lambda streamed: groups if streamed else groups.held(), groups.close)
    packing = next((name for magic, name in PACKED.items() if start.startswith(magic)), None)
    if packing is not None:
        if how.stream:
            raise ArgumentError(f"stream=True reads a file by place, and {file.path} is packed: unpack it")
        with naming_the_file(file.path, f"a CSV file that {packing} packed"), unpacked(file, packing) as whole:
            start = whole.read(START)
    form = CsvForm(file.path, start, how)

    def rows(streamed: bool) -> Rows:
        if streamed and packing is None:
            return CsvRows(file, form, how)
        with naming_the_file(file.path, "a CSV file"), unpacked(file, packing) as whole:
            # pyarrow takes a line of names for one only if it ends.
            data = whole.read() if form.has_rows else start + b"\n"
        table, label = form.read(data), how.label
        if may_have_codes(data, form.delimiter):
            texts = form.look_for_codes(table, functools.partial(form.read, data, False))
            if label is not None and label in form.codes:
                table = table.set_column(table.column_names.index(label), label, texts[label])
        return Held(table, form.path, is_csv=True, codes=form.codes)

    return Looked(file.size(), rows)


def streams(wanted: bool | None, size: int) -> bool:
    """Whether so many bytes are to be read again and again instead of held."""
    return is_large(size) if wanted is None else wanted


def is_large(size: int) -> bool:
    """Whether so many bytes are too many to be held."""
    return bool(size > get_backend("cpu").memory().available // SHARE)


def read_whole(file: Any, size: int) -> bytes:
    """The next ``size`` bytes, fewer at the end of the file."""
    data = b""
    while len(data) < size and (more := file.read(size - len(data))):
        data += more
    return data


class GroupedRows:
    """The row groups of a Parquet file or the record batches of an Arrow file, which are read again when needed."""

    in_memory, is_csv = False, False
    origins: list[tuple[str, int]] | None = None
    label_values: list[str] | None = None
    codes: Mapping[str, str] = types.MappingProxyType({})

    def __init__(self, file: Opener, open_file: Callable[[Opener], Grouped], what: str) -> None:
        self.where, self._what, self._lock = file.path, what, InTurn()
        with naming_the_file(self.where, what):
            self._opened = Reopened(file, lambda: open_file(file))
            found = self._opened.use()
        self.names, self.sizes = different(self.where, [name for name, _ in found.fields]), found.sizes
        self.types = dict(found.fields)
        self.bytes_in_memory = found.data_bytes
        most, available = max(self.sizes, default=0), get_backend("cpu").memory().available
        if most * ROW > available:
            raise InsufficientMemoryError(
                f"{self.where}: a group of {most} rows would need more than the {available} bytes of memory that are "
                "available, or the file is damaged; write it in smaller row groups or record batches"
            )

    def block(self, number: int, names: Sequence[str]) -> Any:
        """See :class:`Rows`."""
        with naming_the_file(self.where, self._what), self._lock:
            table = self._opened.use().load(number, list(dict.fromkeys(names)))
            table.validate(full=True)
        if len(table) != self.sizes[number]:
            raise DataFormatError(
                f"{self.where}: expected {self.sizes[number]} rows in group {number}, found {len(table)}"
            )
        return table

    def close(self) -> None:
        """See :class:`Rows`."""
        with self._lock:
            self._opened.close()

    def held(self) -> Held:
        """All of it in memory."""
        pa = need("pyarrow")
        blocks = [self.block(number, self.names) for number in range(len(self.sizes))]
        if not blocks:
            raise DataFormatError(f"{self.where}: expected at least one row, found none")
        with naming_the_file(self.where, self._what):
            return Held(pa.concat_tables(blocks), self.where)


# --- CSV ----------------------------------------------------------------------------------------------------------


class CsvForm:
    """How a CSV file is to be read: what ``how`` leaves open is found in ``start``, its first bytes.

    codes: columns of whole numbers of which some are written with a 0 before them, and one of these
    """

    def __init__(self, path: str, start: bytes, how: Reading) -> None:
        self.path = path
        csv, delimiter, decimal = need("pyarrow.csv"), how.delimiter, how.decimal
        if delimiter is not None and (len(delimiter) != 1 or not delimiter.isascii() or delimiter in '"\n\r'):
            raise ArgumentError(f"delimiter must be one character of ASCII, got {delimiter!r}")
        if found := next((words for magic, words in OTHERS.items() if start.startswith(magic)), None):
            raise DataFormatError(f"{path}: expected a CSV, Parquet or Arrow file, found {found}")
        if found := next((words for form, words in WRITTEN.items() if form.match(start.removeprefix(BOM))), None):
            raise DataFormatError(f"{path}: expected a CSV, Parquet or Arrow file, found {found}")
        if b"\0" in start:
            raise DataFormatError(f"{path}: expected a CSV, Parquet or Arrow file, found another, binary one")
        if not start.strip(BOM + b" \t\r\n"):
            raise DataFormatError(f"{path}: expected a CSV file with a line of names, found an empty one")
        first, *more = start.strip(BOM + b"\r\n").splitlines()
        self.has_rows = bool(more) or len(start) >= START
        line = first.decode("utf-8", "replace")
        self.delimiter = delimiter or max(DELIMITERS, key="".join(line.split('"')[::2]).count)  # outside quotes
        if decimal is None:
            has_comma = self.delimiter != "," and DECIMAL[","].search(start) and not DECIMAL["."].search(start)
            decimal = "," if has_comma else "."
        if check_choice("decimal", decimal, tuple(DECIMAL)) == self.delimiter:
            raise ArgumentError(f"decimal must be another character than the delimiter, got {decimal!r} for both")
        self._decimal = decimal
        # Names as they are written, with the spaces around them.
        written = next(fields_of([line], delimiter=self.delimiter, strict=False), [])
        self._texts = [*how.texts, *(name for name in written if name.strip() in how.texts)]
        self._missing = [
            *csv.ConvertOptions().null_values,
            *(before + text for text in (*NULLS, *how.missing) for before in ("", " ")),
        ]
        self._names: list[str] = []
        self._written: dict[str, str] = {}  # columns of the whole file by their names
        self.codes: dict[str, str] = {}

    def read(self, data: bytes, piece: bool = False, kinds: Mapping[str, Any] | None = None) -> Any:
        """The table of a file, or of a piece of it, whose columns have the names that were read before."""
        csv, pa = need("pyarrow.csv"), need("pyarrow")
        with naming_the_file(self.path, "a CSV file in UTF-8"), of_pyarrow():
            table = csv.read_csv(
                pa.BufferReader(data),
                # A process that ends soon after pyarrow's threads were used may abort (apache/arrow#34314), and they
                # gain nothing where there is one block.
                read_options=csv.ReadOptions(
                    column_names=self._names if piece else None, block_size=BLOCK, use_threads=len(data) > BLOCK
                ),
                parse_options=csv.ParseOptions(delimiter=self.delimiter, newlines_in_values=True),
                convert_options=csv.ConvertOptions(
                    null_values=self._missing,
                    strings_can_be_null=True,
                    decimal_point=self._decimal,
                    column_types=dict.fromkeys(self._texts, pa.string())
                    | {name if piece else self._written[name]: kind for name, kind in (kinds or {}).items()},
                ),
            )
            table.validate()
            try:
                names = table.column_names
            except UnicodeDecodeError as error:
                raise DataFormatError(f"{self.path}: expected names in UTF-8, found others; {IN_UTF8}") from error
        if not piece:
            self._names = names = self._checked([name.strip() for name in names])
            self._written = dict(zip(names, table.column_names, strict=True))
            table = table.rename_columns(names)
        table = table.select([name for name in names if not name.startswith(NAMELESS)])
        for name, kind in zip(table.column_names, table.schema.types, strict=True):
            if pa.types.is_binary(kind):
                raise DataFormatError(
                    f"{self.path}: expected texts in UTF-8, found others in column {name!r}; {IN_UTF8}"
                )
        return table

    def look_for_codes(self, table: Any, read: Callable[[dict[str, Any]], Any]) -> Any:
        """Find ``codes`` in a table, which ``read`` reads once more with types by column; returns what it read."""
        pa, pc = need("pyarrow"), need("pyarrow.compute")
        whole = [
            name
            for name, kind in zip(table.column_names, table.schema.types, strict=True)
            if pa.types.is_integer(kind) and name not in self.codes
        ]
        texts = read(dict.fromkeys(whole, pa.string()))
        for name in whole:
            found = texts[name].filter(pc.match_substring_regex(texts[name], r"^\s*0\d"))
            if len(found):
                self.codes[name] = found[0].as_py().strip()
        return texts

    def _checked(self, names: Sequence[str]) -> list[str]:
        """Names that differ: of columns without a name the first keeps none, and the others cannot be asked for."""
        nameless = (f"{NAMELESS}{place}" for place in itertools.count())
        names = [name or ("" if place == names.index("") else next(nameless)) for place, name in enumerate(names)]
        different(self.path, names)
        numerals = [name for name in names if is_numeral(name)]
        if 2 * len(numerals) > len(names) > len(numerals) and any("." in name for name in numerals):
            warnings.warn(
                f"{self.path}: the first line is taken for names, and {len(numerals)} of {len(names)} are numbers, as "
                f"{numerals[0]!r} is; if it is a row, give pandas.read_csv(path, names=[...])",
                *(TableWarning, 5),
            )
        if len(numerals) == len(names):
            raise DataFormatError(
                f"{self.path}: expected a first line of names, found the numbers {', '.join(names[:5])}; give "
                "pandas.read_csv(path, names=[...])"
            )
        return names


def may_have_codes(data: bytes, delimiter: str) -> bool:
    """Whether a value in CSV text may be digits of which the first is a 0, as codes have it."""
    whole, before = np.frombuffer(data, np.uint8), [ord(delimiter), *b'\n" ']
    for start in range(0, len(whole), PIECE):
        found = whole[start : start + PIECE + 2]
        zeros = np.flatnonzero((found[1:-1] == ord("0")) & (found[2:] - ord("0") < 10))
        if np.isin(found[zeros], before).any():
            return True
    return False


@contextlib.contextmanager
def of_pyarrow() -> Iterator[None]:
    """Make errors of pyarrow's that are no usual ones of Python's, as of threads that cannot be started, such."""
    try:
        yield
    except need("pyarrow").ArrowException as error:
        if MISFIT.search(str(error)):
            quoted = " A quotation mark may be missing." * ('"' in str(error))
            raise ValueError(
                f"{first_line(error)}; every line must have a value for each name in the first one.{quoted} Where "
                "others come before the line of names, give pandas.read_csv(path, skiprows=...)"
            ) from error
        raise error if isinstance(error, (ValueError, MemoryError, OSError)) else RuntimeError(str(error)) from error


@contextlib.contextmanager
def unpacked(file: Opener, packing: str | None) -> Iterator[Any]:
    """A file of pyarrow's from which the contents are read."""
    pa = need("pyarrow")
    with file.open() as packed:
        # pyarrow itself keeps 65 KB for each damaged gzip file for ever.
        inside: Any = packed
        if packing == "gzip":
            inside, packing = gzip.GzipFile(fileobj=packed), None
        with pa.input_stream(pa.PythonFile(inside, mode="r"), compression=packing) as whole:
            yield whole


class CsvRows:
    """A CSV file that is read a piece at a time; where the pieces are, and what the columns hold, a first pass finds.

    A piece ends with a line. A line ends outside quotes, after an even number of quotation marks.
    """

    in_memory, is_csv = False, True
    origins: list[tuple[str, int]] | None = None

    def __init__(self, file: Opener, form: CsvForm, how: Reading) -> None:
        self.where, self._form, self._missing = file.path, form, how.missing
        self.codes: Mapping[str, str] = form.codes
        self._bytes = Reopened(file, lambda: BytesByPlace(file.open()))
        pieces = self._pieces(0, file.size())
        header = next(pieces, (0, 0))
        first = self._piece(*header)
        table = form.read(first + b"\n")
        self.names = list(table.column_names)
        # The line of names is the first that is not empty.
        end = line_ends(first, len(first) - len(first.lstrip(b"\xef\xbb\xbf\r\n")), True) or len(first)
        if len(table) and end == len(first):
            raise DataFormatError(f"{self.where}: expected lines that end with a line feed, as stream=True needs them")
        self._label = how.label if how.label in self.names else None
        self.types: dict[str, Any] = dict.fromkeys(self.names, need("pyarrow").null())
        while not self._found(end, file.size()):
            pass

    def _found(self, start: int, stop: int) -> bool:
        """Find pieces, rows, types and the values of the label; False where what was numbers turns out to be text."""
        pa = need("pyarrow")
        self._places, self.sizes = list[tuple[int, int]](), list[int]()
        values: dict[str, None] | None = None if self._label is None else {}
        for place in self._pieces(start, stop):
            data = self._piece(*place)
            table = self._form.read(data, True, self._types_to_read)
            if not len(table):
                continue
            if may_have_codes(data, self._form.delimiter):
                self._form.look_for_codes(table, functools.partial(self._form.read, data, True))
            if (
                self._label is not None
                and self._label in self.codes
                and not pa.types.is_string(self.types[self._label])
            ):
                self.types[self._label] = pa.string()
                return False
            for name, kind in zip(table.column_names, table.schema.types, strict=True):
                known = self.types[name]
                self.types[name] = wider(known, kind)
                if (
                    name == self._label
                    and pa.types.is_string(self.types[name])
                    and not (pa.types.is_string(known) or pa.types.is_null(known))
                ):
                    return False  # its numbers have to be read as they are written
            if values is not None and self._label is not None:
                kind = self.types[self._label]
                if pa.types.is_floating(kind) or family(kind) == DATE:
                    values = None
                else:
                    piece = Piece(table, self.where, sum(self.sizes), self._missing)
                    _, found = piece.label_texts(self._label)
                    values.update(dict.fromkeys(found))
                    values = values if len(values) <= LONGEST else None
            self._places.append(place)
            self.sizes.append(len(table))
        self.label_values = None if values is None else list(values)
        return True

    def _pieces(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """From where to where the pieces of the file are."""
        while start < stop:
            size = PIECE
            while True:
                data = self._piece(start, min(start + size, stop))
                end = len(data) if start + size >= stop else line_ends(data, 0, False)
                if end:
                    break
                if size >= LONGEST_LINE:
                    raise DataFormatError(
                        f"{self.where}: expected lines of at most {LONGEST_LINE} bytes, found none that ends after "
                        f"byte {start}; a quotation mark may be missing"
                    )
                size *= 4
            yield start, start + end
            start += end

    def _piece(self, start: int, stop: int) -> bytes:
        out = bytearray(stop - start)
        with memoryview(out) as view:
            if (count := self._bytes.use().read_into(view, start)) < len(out):
                raise DataFormatError(f"{self.where}: it ends at byte {start + count}, it has become shorter")
        return bytes(out)

    def _parsed(self, place: tuple[int, int]) -> Any:
        return self._form.read(self._piece(*place), True, self._types_to_read)

    @property
    def _types_to_read(self) -> dict[str, Any]:
        """Types that are given to the reader: the others fit what a piece may hold."""
        pa = need("pyarrow")
        return {name: kind for name, kind in self.types.items() if pa.types.is_string(kind)}

    def block(self, number: int, names: Sequence[str]) -> Any:
        """See :class:`Rows`."""
        table = self._parsed(self._places[number])
        if len(table) != self.sizes[number]:
            raise DataFormatError(
                f"{self.where}: expected {self.sizes[number]} rows, found {len(table)}: it was changed"
            )
        fields = [need("pyarrow").field(name, self.types[name]) for name in names]
        with naming_the_file(self.where, "values of the types that it had before"):
            return table.select(list(names)).cast(need("pyarrow").schema(fields), safe=False)

    def close(self) -> None:
        """See :class:`Rows`."""
        self._bytes.close()


def wider(known: Any, found: Any) -> Any:
    """The type of a column of which pieces hold ``known`` and ``found``."""
    pa = need("pyarrow")
    is_ = pa.types
    if known == found or is_.is_null(found):
        return known
    if is_.is_null(known) or {family(known), family(found)} == {DATE}:
        return found
    numbers = [is_.is_integer(kind) or is_.is_floating(kind) for kind in (known, found)]
    return pa.float64() if all(numbers) else pa.string()


def line_ends(data: bytes, start: int, first: bool) -> int:
    """After which byte the first or the last line in ``data[start:]`` ends that ends outside quotes; 0: none does."""
    found = np.frombuffer(data, np.uint8)[start:]
    ends = np.flatnonzero(found == ord("\n"))
    quotes = np.flatnonzero(found == ord('"'))
    ends = ends[np.searchsorted(quotes, ends) % 2 == 0]
    return 0 if not len(ends) else start + int(ends[0 if first else -1]) + 1
