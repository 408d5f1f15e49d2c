"""A column of Arrow's as numbers or as texts, whatever its type is."""

from __future__ import annotations

import decimal
import itertools
import unicodedata
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpubatch.errors import DataFormatError, NonFiniteError, needed

NUMBER, TEXT, CODED, DATE, EMPTY, OTHER = "numbers", "texts", "categories", "dates", "nothing", "other"


def need(module: str) -> Any:
    """A module of pyarrow's; an error that says how to install it."""
    return needed(module, "a table", "data")


def family(kind: Any) -> str:
    """The family of an Arrow type: NUMBER, TEXT, CODED (a type with a dictionary), DATE, EMPTY or OTHER."""
    is_ = need("pyarrow").types
    if is_.is_dictionary(kind):
        return CODED if family(kind.value_type) in (NUMBER, TEXT) else family(kind.value_type)
    if isinstance(kind, need("pyarrow").BaseExtensionType):
        return DATE if kind.extension_name == "pandas.period" else family(kind.storage_type)
    if is_.is_run_end_encoded(kind):
        return family(kind.value_type)
    if is_.is_boolean(kind) or is_.is_integer(kind) or is_.is_floating(kind) or is_.is_decimal(kind):
        return NUMBER
    if is_.is_string(kind) or is_.is_large_string(kind) or is_.is_string_view(kind):
        return TEXT
    if is_.is_temporal(kind):
        return DATE
    return EMPTY if is_.is_null(kind) else OTHER


def plain(column: Any) -> Any:
    """A column as one array without a dictionary, an extension or runs; of one type of text and of decimals."""
    pa, pc = need("pyarrow"), need("pyarrow.compute")
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    array = pa.concat_arrays(array.chunks) if isinstance(array, pa.ChunkedArray) else array
    if isinstance(array.type, pa.BaseExtensionType):
        return plain(array.storage)
    if pa.types.is_run_end_encoded(array.type):
        return plain(pc.run_end_decode(array))
    if pa.types.is_dictionary(array.type):
        return plain(array.dictionary).take(array.indices)  # plain, since views of texts, as Polars has, have no take
    return array.cast(pa.large_string()) if family(array.type) == TEXT else array


@dataclass(frozen=True)
class Piece:
    """Some rows of a file, or of a table in memory, in order.

    table: pyarrow's, with some of the columns
    where: what the file is called, for messages
    start: the number of the first of them there
    missing: texts that stand for no value
    """

    table: Any
    where: str
    start: int
    missing: Collection[str]

    def numbers(self, name: str) -> np.ndarray:
        """A column as float64, NaN where it has no value."""
        pa, pc = need("pyarrow"), need("pyarrow.compute")
        array = plain(self.table[name])
        kind = family(array.type)
        if kind == TEXT:
            array = pc.utf8_trim_whitespace(array)
            if self.missing:
                array = pc.if_else(pc.is_in(array, pa.array([*self.missing, ""], array.type)), None, array)
        elif kind not in (NUMBER, EMPTY):
            raise DataFormatError(f"{self.where}: column {name!r} must hold numbers, as in training, got {array.type}")
        try:
            array = pc.cast(array, pa.float64(), safe=kind == TEXT)
        except pa.ArrowInvalid:
            row, found = next((row, x) for row, x in enumerate(array.to_pylist()) if x is not None and not is_number(x))
            raise DataFormatError(
                f"{self.where}: column {name!r} must hold numbers, as in training, got {found[:99]!r} in row "
                f"{self.start + row}"
            ) from None
        values: np.ndarray = array.to_numpy(zero_copy_only=False)
        if np.isinf(values).any():
            row = int(np.flatnonzero(np.isinf(values))[0])
            raise NonFiniteError(
                f"{self.where}: column {name!r} must hold finite numbers, got {values[row]} in row {self.start + row}; "
                "leave such rows out, or have no value there"
            )
        return values

    def texts(self, name: str) -> tuple[np.ndarray, list[str]]:
        """A column as codes, -1 where it has no value, and the different texts that they stand for.

        Numbers are texts as they are written without needless zeros: 3 and 3.0 are "3". Spaces around a text do not
        count.
        """
        array = plain(self.table[name])
        if family(array.type) not in (NUMBER, TEXT, EMPTY):
            raise DataFormatError(
                f"{self.where}: column {name!r} must hold texts or numbers, as in training, got {array.type}"
            )
        coded = array.dictionary_encode()
        codes = coded.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
        numbered: dict[str, int] = {}
        of_code: list[int] = [
            -1 if (text := as_text(value)) is None or text in self.missing else numbered.setdefault(text, len(numbered))
            for value in coded.dictionary.to_pylist()
        ]
        return np.array([*of_code, -1], np.int64)[codes], list(numbered)

    def label_numbers(self, name: str) -> np.ndarray:
        """:meth:`numbers` of a label, none of which may be missing."""
        values = self.numbers(name)
        self._check_label(name, np.isnan(values))
        return values

    def label_texts(self, name: str) -> tuple[np.ndarray, list[str]]:
        """:meth:`texts` of a label, none of which may be missing."""
        codes, names = self.texts(name)
        self._check_label(name, codes < 0)
        return codes, names

    def _check_label(self, name: str, absent: np.ndarray) -> None:
        if absent.any():
            raise DataFormatError(
                f"{self.where}: the label {name!r} is missing in row {self.start + int(absent.argmax())}; leave such "
                "rows out"
            )


def is_number(text: str) -> bool:
    """Whether Arrow takes a text for a number."""
    pa, pc = need("pyarrow"), need("pyarrow.compute")
    try:
        pc.cast(pa.array([text]), pa.float64())
    except pa.ArrowInvalid:
        return False
    return True


def is_numeral(text: str) -> bool:
    """Whether a name is a number, as in a file without names."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def listed(names: Collection[Any], most: int = 12) -> str:
    """Names in words, the first of many."""
    more = f", ... ({len(names)} in all)" if len(names) > most else ""
    return ", ".join(map(repr, itertools.islice(names, most))) + more


def lookalikes(names: Iterable[str]) -> str:
    """In words, two texts that people take for the same one; "" for none."""
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(" ".join(unicodedata.normalize("NFKC", name).casefold().split()), name)
        if other != name:
            plain_forms = all(unicodedata.is_normalized("NFKC", text) for text in (name, other))
            how = "case or spaces" if plain_forms else "the form of their characters"
            return f"{other!r} and {name!r}, which differ in {how} alone"
    return ""


def as_text(value: Any) -> str | None:
    """A value as the text of a category; None for NaN."""
    if value is None or isinstance(value, str):
        return value if value is None else value.strip()
    if isinstance(value, (float, decimal.Decimal)):
        if value != value:
            return None
        return str(int(value)) if -(2**63) < value < 2**63 and value == int(value) else str(value)
    return str(value)
