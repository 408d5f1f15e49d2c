"""Tables of named columns: what becomes of each, what is refused, and the way to a model and back."""

from __future__ import annotations

import datetime
import decimal
import gzip
import io
import json
import os
import pickle
import re
import subprocess
import sys
import warnings
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from needs import file_library, peer

import gpubatch as gb
from gpubatch.tables import Recipe
from gpubatch.tables.statistics import KEPT, Median, Moments

pa = file_library("pyarrow")
for module in ("compute", "csv", "parquet"):
    file_library(f"pyarrow.{module}")

pytestmark = pytest.mark.filterwarnings("ignore::gpubatch.FewStepsWarning")


N = 60
KIND = ["a", "b"] * (N // 2)
SIZE = [float(i % 7) for i in range(N)]


def samples(values: dict[str, Any], /, **options: Any) -> np.ndarray:
    """What becomes of columns."""
    return gb.read_table({**values, "y": KIND}, label="y", **options).as_samples()[0]


# --- what becomes of a column -----------------------------------------------------------------------------------


def test_numbers_are_standardised_and_gaps_have_the_median_and_an_indicator() -> None:
    values = np.array([1.0, 2.0, np.nan, 9.0, 2.5, np.nan])
    found = gb.read_table({"x": values}).as_samples()[0]
    there = values[~np.isnan(values)]
    filled = np.where(np.isnan(values), np.median(there), values)
    np.testing.assert_allclose(found[:, 0], (filled - there.mean()) / there.std(), rtol=1e-6)
    assert found[:, 1].tolist() == [0, 0, 1, 0, 0, 1]


NUMBERS: dict[str, Callable[[], Any]] = {
    "integers": lambda: [1, 2, None],
    "large integers": lambda: pa.array([2**63, 2**64 - 1, None], pa.uint64()),
    "booleans": lambda: [True, False, None],
    "float16": lambda: pa.array([1.0, 2.0, None]).cast(pa.float16()),
    "decimals": lambda: [decimal.Decimal("1.50"), decimal.Decimal("2.25"), None],
    "NaN": lambda: np.array([1.0, 2.0, np.nan]),
    "runs": lambda: pa.compute.run_end_encode(pa.array([1.0, 2.0, None])),
}


@pytest.mark.parametrize("kind", NUMBERS)
def test_numbers_of_every_type(kind: str) -> None:
    """Two numbers are -1 and 1 when they are standardised, in their order, and the median of two is 0."""
    column = NUMBERS[kind]()
    found = gb.read_table(pa.table({"x": column})).as_samples()[0]
    signs = [1, -1] if kind == "booleans" else [-1, 1]
    np.testing.assert_allclose(found, [[signs[0], 0], [signs[1], 0], [0, 1]], atol=1e-6)


CATEGORIES: dict[str, Callable[[], Any]] = {
    "texts": lambda: ["p", "q", None],
    "spaces": lambda: [" p", "q ", None],
    "views": lambda: pa.array(["p", "q", None]).cast(pa.string_view()),
    "dictionary": lambda: pa.array(["p", "q", None]).dictionary_encode(),
    "integers in a dictionary": lambda: pa.array([1, 2, None]).dictionary_encode(),
    "in runs": lambda: pa.compute.run_end_encode(pa.array(["p", "q", None])),
}


@pytest.mark.parametrize("kind", CATEGORIES)
def test_categories_of_every_type(kind: str) -> None:
    found = gb.read_table(pa.table({"x": CATEGORIES[kind]()})).as_samples()[0]
    assert found.tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]


def test_integers_are_categories_where_it_is_said_and_are_found_again_as_text_or_float() -> None:
    train = gb.read_table({"zip": [7, 8, 9, 7]}, kinds={"zip": "category"})
    for again in ([9, 7], ["9", "7"], [9.0, 7.0], [np.float32(9), np.float32(7)]):
        assert gb.read_table({"zip": again}, like=train).as_samples()[0].tolist() == [[0, 0, 1], [1, 0, 0]]


def test_texts_beyond_the_bound_are_hashed_with_a_warning() -> None:
    cities = [f"city {i % 20}" for i in range(N)]
    with pytest.warns(gb.TableWarning, match=r"column 'c' has 20 different texts, more than one_hot=8.*128 columns"):
        found = samples({"c": cities}, one_hot=8)
    assert [int(row.argmax()) for row in found] == [zlib.crc32(city.encode()) % 128 for city in cities]
    assert (found.sum(1) == 1).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert samples({"c": cities}, kinds={"c": "hash"}, buckets=5).shape == (N, 5)
        assert samples({"c": cities}, kinds={"c": "category"}, one_hot=8).shape == (N, 20)


def test_columns_that_say_nothing_are_left_out_with_a_warning() -> None:
    with pytest.warns(
        gb.TableWarning, match=r"'a' is left out: all its values are missing.*'b' is left out: all.*are 3"
    ):
        found = samples({"a": [None] * N, "b": [3] * N, "x": SIZE})
    assert found.shape == (N, 1)
    # A constant that is missing in some rows says that.
    assert samples({"b": [3, None] * (N // 2)})[:2].tolist() == [[0], [1]]


REFUSED: dict[str, tuple[Any, dict[str, Any], type[Exception], str]] = {
    "dates": (
        {"t": [datetime.date(2020, 1, 1)] * N, "x": SIZE},
        {},
        gb.DataFormatError,
        r"column 't' holds dates or times \(date32\[day\]\).*the days since a date.*drop=\['t'\]",
    ),
    "lists": ({"t": [[1]] * N}, {}, gb.DataFormatError, r"column 't' must hold numbers or texts.*drop=\['t'\]"),
    "bytes": ({"t": [b"x"] * N}, {}, gb.DataFormatError, r"column 't' must hold numbers or texts, got binary"),
    "free text": (
        {"name": [f"n{i}" for i in range(N)], "x": SIZE},
        {},
        gb.DataFormatError,
        r"'name' has a text of its own in most rows \(60 different ones in 60\).*drop=\['name'\].*kinds=",
    ),
    "infinity": (
        {"x": [*SIZE[:-1], np.inf]},
        {},
        gb.NonFiniteError,
        r"column 'x' must hold finite numbers, got inf in row 59",
    ),
    "too large": ({"x": [1e300 * x for x in SIZE]}, {}, gb.NonFiniteError, r"column 'x' has numbers from 0 to 6e\+300"),
    "mixed": ({"x": [1, "a"] * (N // 2)}, {}, gb.DataFormatError, "column 'x' must have values of one type"),
    "huge": ({"x": [2**70] * N}, {}, gb.DataFormatError, "column 'x' must have values of one type"),
    "dates as texts": (
        {"t": [f"{i % 28 + 1}.01.2020" for i in range(N)], "x": SIZE},
        {},
        gb.DataFormatError,
        r"column 't' holds dates, such as '1\.01\.2020', which are no numbers yet.*drop=\['t'\]",
    ),
    "dates with short years": (
        {"t": [f"{i % 28 + 1}/1/20" for i in range(N)], "x": SIZE},
        {},
        gb.DataFormatError,
        "column 't' holds dates, such as '1/1/20'",
    ),
    "dates and a word": (
        {"t": [*[f"2020-01-{i % 28 + 1:02}" for i in range(N - 1)], "unknown"], "x": SIZE},
        {},
        gb.DataFormatError,
        "column 't' has texts, and 59 of 60 are dates or times, such as '2020-01-01', which are no numbers yet",
    ),
    "months": (
        {"t": [f"2020-{i % 12 + 1:02}" for i in range(N)], "x": SIZE},
        {},
        gb.DataFormatError,
        "column 't' holds dates, such as '2020-01'",
    ),
    "times": (
        {"t": [f"{i % 12}:30 pm" for i in range(N)], "x": SIZE},
        {},
        gb.DataFormatError,
        "column 't' holds dates, such as '0:30 pm'",
    ),
    "dates with months": (
        {"t": [f"{i % 28 + 1} Jan 2020" for i in range(N)], "x": SIZE},
        {},
        gb.DataFormatError,
        "column 't' holds dates, such as '1 Jan 2020'",
    ),
    "numbers with separators": (
        {"t": [f"{i + 1},200" for i in range(N)], "x": SIZE},
        {},
        gb.DataFormatError,
        r"dict: column 't' holds texts, and 60 of 60 look like .* '1,200': write them without .* thousands=','\)",
    ),
    "numbers as texts": (
        {"t": [f"{i}" for i in range(N)], "x": SIZE},
        {},
        gb.DataFormatError,
        r"60 of 60 look like .* '0': give numbers, as pandas.to_numeric\(column\) makes them",
    ),
    "numbers in brackets": (
        {"t": [f"({i})" for i in range(N)]},
        {},
        gb.DataFormatError,
        r"60 of 60 look like .* '\(0\)'",
    ),
    "no text": ({"x": ["a", "b"] * 30}, {"kinds": {"x": "number"}}, gb.DataFormatError, "got 'a' in row 0"),
    "nothing": ({"x": [1] * N}, {}, gb.DataFormatError, "no column tells samples apart"),
    "drop": ({"x": SIZE}, {"drop": "z"}, gb.ArgumentError, r"drop must name columns of the dict, 'x', 'y'; got 'z'"),
    "drop all": ({"x": SIZE}, {"drop": "x"}, gb.ArgumentError, "no columns besides the label"),
    "columns": ({"x": SIZE}, {"columns": ["z"]}, gb.ArgumentError, r"columns must name columns of .*; got 'z'"),
    "kinds": ({"x": SIZE}, {"kinds": {"x": "date"}}, gb.ArgumentError, r"kinds\['x'\] must be one of 'number'"),
    "task": ({"x": SIZE}, {"task": "rank"}, gb.ArgumentError, "task must be one of 'auto'"),
    "like": ({"x": SIZE}, {"like": 3}, gb.ArgumentError, "label must be left out where like is given"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case: str) -> None:
    columns, options, error, match = REFUSED[case]
    with pytest.raises(error, match=match):
        samples(columns, **options)


@pytest.mark.parametrize(
    ("source", "error", "match"),
    [
        (np.zeros((3, 2)), gb.DTypeError, r"got an array of shape \(3, 2\), whose columns have no names"),
        (3, gb.DTypeError, "got a int"),
        (io.StringIO("a,b"), gb.DTypeError, "got a StringIO; give the path of its file, or pandas.read_csv of it"),
        (
            "a,b\n1,2\n",
            gb.DTypeError,
            r"expected a path, got a text of 8 characters .* give pandas.read_csv\(io.String",
        ),
        ([1, 2], gb.DTypeError, "got a list"),
        ({}, gb.DataFormatError, "expected columns, found none"),
        ({"x": []}, gb.DataFormatError, "expected at least one row, found none"),
    ],
)
def test_what_is_no_table(source: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        gb.read_table(source)


# --- the label --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "task", "classes"),
    [
        (["b", "a", "b"] * 20, "auto", ["a", "b"]),
        ([3, -1, 3] * 20, "auto", [-1, 3]),
        ([10, 9, 10] * 20, "auto", [9, 10]),
        ([True, False, True] * 20, "auto", [False, True]),
        ([1.0, 2.0, 1.0] * 20, "classification", [1, 2]),
        (pa.array(["b", "a", "b"] * 20).dictionary_encode(), "auto", ["a", "b"]),
        ([1.5, 2.0, 1.5] * 20, "auto", None),
        ([1, 2, 1] * 20, "regression", None),
    ],
)
def test_labels(labels: Any, task: str, classes: list[Any] | None) -> None:
    table = gb.read_table(pa.table({"x": SIZE, "y": labels}), label="y", task=task)
    Y = table.as_samples()[1]
    assert table.classes == classes
    if classes is None:
        numbers = np.array(labels, float)
        np.testing.assert_allclose(Y, (numbers - numbers.mean()) / numbers.std(), rtol=1e-6)
        assert (table.outputs, table.loss, table.task) == (1, "mse", "regression")
    else:
        assert [type(name) for name in table.classes or ()] == [type(name) for name in classes]
        assert [classes[i] for i in Y] == (labels.to_pylist() if isinstance(labels, pa.Array) else labels)
        assert (table.outputs, table.loss, table.task) == (2, "softmax_cross_entropy", "classification")
    assert table.labels.tolist() == (labels.to_pylist() if isinstance(labels, pa.Array) else labels)


@pytest.mark.parametrize(
    ("labels", "task", "match"),
    [
        ([0.0, 1.0] * 30, "auto", "the label 'y' holds 0, 1 as floating numbers, which are taken for amounts: task="),
        ([0.0, 1.0] * 30, "regression", None),
        ([0.0, 1.5] * 30, "auto", None),
        ([float(i) for i in range(60)], "auto", None),
        (["Yes", "yes", "no"] * 20, "auto", "the label 'y' has the classes 'Yes' and 'yes', which differ in case or"),
        (["yes", "no"] * 30, "auto", None),
        (["0", "1", "?"] * 20, "auto", r"the label 'y' has the classes '0', '1', '\?', most of .*missing='\?' if it"),
        (["0", "1", "?"] * 20, "classification", None),
        (["1", "few", "many"] * 20, "auto", None),
    ],
)
def test_labels_that_may_be_meant_otherwise_are_told(labels: Any, task: str, match: str | None) -> None:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        gb.read_table({"x": SIZE, "y": labels}, label="y", task=task)
    assert [re.match(f"the dict: {match}", str(warning.message)) is not None for warning in told] == [True] * bool(
        match
    )
    assert all(warning.filename == __file__ for warning in told)


@pytest.mark.parametrize(
    ("labels", "task", "match"),
    [
        (["a"] * N, "auto", "at least two different values, got 'a' in all rows"),
        (["a", None] * (N // 2), "auto", "the label 'y' is missing in row 1; leave such rows out"),
        ([1.0, None] * (N // 2), "auto", "the label 'y' is missing in row 1"),
        (list(range(N)), "auto", "task must be said for the label 'y', which has 60 different integers in 60 rows"),
        (
            [*map(str, range(59)), "?"],
            "auto",
            r"60 different texts in 60 rows, most of which look like numbers, .*'\?'",
        ),
        (["a", "b"] * (N // 2), "regression", "column 'y' must hold numbers"),
        ([1.5, 2.5] * (N // 2), "classification", "must hold whole numbers, texts or booleans"),
        ([datetime.date(2020, 1, 1)] * N, "auto", "the label 'y' must hold numbers or texts, got date32"),
        ([None] * N, "auto", "no value in any row"),
    ],
)
def test_labels_that_are_refused(labels: Any, task: str, match: str) -> None:
    with pytest.raises(gb.ArgumentError, match=match):
        gb.read_table({"x": SIZE, "y": labels}, label="y", task=task).as_samples()


# --- where tables come from --------------------------------------------------------------------------------------


def written(kind: str, table: Any, path: Any) -> Any:
    """A table as a file, or as a frame."""
    if kind in ("pandas", "polars"):
        return peer(kind).DataFrame(table.to_pydict())
    if kind == "csv":
        pa.csv.write_csv(table, path)
    elif kind == "parquet":
        pa.parquet.write_table(table, path, row_group_size=20)
    elif kind in ("arrow file", "arrow stream"):
        new = pa.ipc.new_file if kind == "arrow file" else pa.ipc.new_stream
        with new(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=7)
    else:
        return {"pyarrow": lambda: table, "batch": lambda: table.to_batches()[0], "rows": table.to_pylist}[kind]()
    return path


FORMS = ("csv", "parquet", "arrow file", "arrow stream", "pyarrow", "batch", "rows", "pandas", "polars")


@pytest.mark.parametrize("kind", FORMS)
def test_every_form_gives_the_same_samples(kind: str, tmp_path: Any) -> None:
    table = pa.table(
        {
            "x": [1.5, None, *SIZE[2:]],
            "n": [None, 3, *range(N - 2)],
            "c": ["p", None, "r", "q"] * (N // 4),
            "b": [True, False] * (N // 2),
            "y": KIND,
        }
    )
    source = written(kind, table, tmp_path / "table")
    given = gb.read_table(source, label="y")
    expected = gb.read_table(table, label="y")
    assert (given.classes, given.features) == (["a", "b"], 9)
    for found, wanted in zip(given.as_samples(), expected.as_samples(), strict=True):
        assert np.array_equal(found, wanted)


def test_frames_of_more_kinds() -> None:
    """Each is the table of its columns by name."""
    pd, y = peer("pandas"), ["a", "b"] * (N // 2)
    expected = gb.read_table({"x": SIZE, "y": y}, label="y").as_samples()
    frame = pd.DataFrame({"x": SIZE, "y": y})
    structured = np.array([*zip(SIZE, y, strict=True)], [("x", "f8"), ("y", "U1")])
    for source, label in (
        (structured, "y"),
        (structured.view(np.recarray), "y"),
        (pd.DataFrame({"x": pd.arrays.SparseArray(SIZE), "y": y}), "y"),
        (frame.set_axis([0, 1], axis=1), 1),
        (pd.concat({"level": frame}, axis=1), ("level", "y")),
    ):
        for found, wanted in zip(gb.read_table(source, label=label).as_samples(), expected, strict=True):
            assert np.array_equal(found, wanted)
    with pytest.warns(gb.TableWarning, match="a column has no name"):
        assert gb.read_table(frame.assign(z=1.5).set_axis(["x", "y", None], axis=1), label="y").columns == ["x"]
    for series in (frame["x"], peer("polars").Series(SIZE)):
        with pytest.raises(gb.DTypeError, match=r"got a Series: give a frame, as of to_frame\(\)"):
            gb.read_table(series)
    for label in (True, 1.5, ["x"], frame["x"]):
        with pytest.raises(gb.DTypeError, match="label must be the name of one column, got"):
            gb.read_table(frame, label=label)  # type: ignore[arg-type]
    for label, match in (("Y", "did you mean 'y'"), ("X ", "did you mean 'x'")):
        with pytest.raises(gb.ArgumentError, match=match):
            gb.read_table(frame, label=label)


@pytest.mark.exhaustive
def test_datasets_of_hugging_face() -> None:
    """Their columns, those rows that were selected; labels that have names are these."""
    hf = peer("datasets")
    made = hf.Dataset.from_dict({"x": SIZE, "y": [0, 1] * (N // 2)})
    named = made.cast_column("y", hf.ClassLabel(names=["no", "yes"]))
    assert gb.read_table(made, label="y").classes == [0, 1]
    table = gb.read_table(named.select(range(N - 1, -1, -1)), label="y")
    assert (table.classes, table.labels[:3].tolist()) == (["no", "yes"], ["yes", "no", "yes"])
    wanted = gb.read_table({"x": SIZE[::-1]}).as_samples()[0]
    assert np.array_equal(table.as_samples()[0], wanted)
    with pytest.raises(gb.DTypeError, match="got a DatasetDict of 'train': give one of these"):
        gb.read_table(hf.DatasetDict({"train": made}))
    with pytest.raises(gb.DTypeError, match=r"a table must be one datasets.Dataset in memory, got a IterableDataset"):
        gb.read_table(made.to_iterable_dataset())


def test_paths_as_people_write_them(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """~ is the home folder wherever a path is given, and a file: URL may have %20 for a space."""
    monkeypatch.setenv("HOME", str(tmp_path))
    path = tmp_path / "two words.csv"
    path.write_text("x,y\n" + "".join(f"{i},{'ab'[i % 2]}\n" for i in range(20)))
    for source in ("~/two words.csv", "~/two*.csv", path.as_uri(), f"file://{path}", [path.as_uri()]):
        assert len(gb.read_table(source, label="y")) == 20
    (tmp_path / "a%20b.csv").write_text(path.read_text())
    assert len(gb.read_table(f"file://{tmp_path}/a%20b.csv", label="y")) == 20
    np.save(tmp_path / "x.npy", np.zeros((3, 2)))
    assert len(gb.sources.npy("~/x.npy")) == 3
    gb.save("~/m.safetensors", net := gb.mlp([1, 2], backend="cpu"))
    assert gb.load("~/m.safetensors").net.inputs == net.inputs == 1
    assert gb.checkpoint.Checkpoints("~/run").folder == tmp_path / "run"
    assert gb.CSVLog("~/log.csv").path == tmp_path / "log.csv"
    assert sorted(each.name for each in tmp_path.iterdir() if "safe" in each.name) == ["m.safetensors"]


@pytest.mark.parametrize("line", ["x y", "x    y"])
def test_a_line_that_is_not_divided_is_told(line: str, tmp_path: Any) -> None:
    path = text_file(tmp_path, f"{line}\n1 2\n")
    with pytest.raises(
        gb.ArgumentError, match=r"its first line has none of , ; tab and \|: say which delimiter, or give"
    ):
        gb.read_table(path, label="y")


def text_file(tmp_path: Any, text: str | bytes) -> Any:
    path = tmp_path / "t.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_delimiters_are_found(tmp_path: Any, delimiter: str) -> None:
    lines = ["x,a name,y", '1,"p;q,r",no', "2,s,yes", "3,s,no"]
    path = text_file(tmp_path, "\n".join(line.replace(",", delimiter) for line in lines))
    table = gb.read_table(path, label="y")
    assert (table.columns, table.classes, table.features) == (["x", "a name"], ["no", "yes"], 3)
    assert gb.read_table(path, label="y", delimiter=delimiter).recipe == table.recipe


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "expected a CSV file with a line of names, found an empty one"),
        ("\n\n", "found an empty one"),
        ("x,y", "expected at least one row, found none"),
        ("x,y\n", "expected at least one row"),
        ("x,y\n1,2,3\n", "expected a CSV file in UTF-8, found damage .*Expected 2 columns, got 3"),
        ("title\nx,y\n1,2\n", r"Expected 1 columns, got 2: x,y; every line .* give pandas.read_csv\(path, skiprows="),
        ('{"x": 1, "y": 2}\n', r"found JSON; give pandas.read_json\(path\), with lines=True"),
        ('[\n{"x": 1}]', "found JSON"),
        ("<!DOCTYPE html><html>", "found HTML or XML, perhaps of a server in place of the file"),
        ("@RELATION x\n", r"found ARFF; give .*scipy.io.arff.loadarff\(path\)"),
        (b"\x80\x04K\x01.", "found a pickle, which gpubatch does not read"),
        ("sep=;\nx;y\n1;2\n", r"found Excel's line for the delimiter, sep=, before .*, skiprows=1, sep=\.\.\.\)"),
        ('x,c,y\n1,"k,a\n2,k,b\n', "got 2: 1,.k,a; every line must .* A quotation mark may be missing"),
        (b"\xe4,y\n1,2\n", "expected names in UTF-8, found others; save the file as UTF-8, or give pandas.read_csv"),
        (b"\xfd7zXZ\0", "found one packed by xz; unpack it"),
        (b"\xd0\xcf\x11\xe0", r"as .xls is; save the sheet as CSV, or give pandas.read_excel\(path\)"),
        (b"SQLite format 3\0", "found a database of SQLite"),
        (b"\x89HDF\r\n", "found HDF5"),
        ("x,x\n1,2\n", "columns must have different names, got 'x' 2 times"),
        ("1.5,2\n1,2\n", r"expected a first line of names, found the numbers 1.5, 2; give pandas.read_csv"),
        (b"x,y\n\xff,2\n", "expected texts in UTF-8, found others in column 'x'"),
        ("x,y\n1,2".encode("utf-16"), "found UTF-16; save the file as UTF-8, or give pandas.read_csv"),
        (b"PK\3\4\0\0", r"found an archive, as those of Excel are; .*give pandas.read_excel\(path\)"),
        (b"x\0y", "expected a CSV, Parquet or Arrow file, found another, binary one"),
        (b"PAR1", "expected a Parquet file"),
        (b"ARROW1\0\0", "expected an Arrow file"),
    ],
)
def test_files_that_are_refused(tmp_path: Any, text: str | bytes, match: str) -> None:
    with pytest.raises(gb.DataFormatError, match=match) as error:
        gb.read_table(text_file(tmp_path, text))
    assert "t.csv" in str(error.value)


def test_a_csv_file_with_a_mark_quotes_and_gaps(tmp_path: Any) -> None:
    path = text_file(
        tmp_path, b'\xef\xbb\xbfx,c,y\r\n1,"two\nlines",no\r\n?,s, yes\r\nNA,s,no\r\n4,"two\nlines",yes\r\n'
    )
    table = gb.read_table(path, label="y", missing="?")
    assert (table.columns, table.classes) == (["x", "c"], ["no", "yes"])
    X, Y = table.as_samples()
    np.testing.assert_allclose(X, [[-1, 0, 0, 1], [0, 1, 1, 0], [0, 1, 1, 0], [1, 0, 0, 1]])
    assert Y.tolist() == [0, 1, 0, 1]


def test_a_column_of_text_stays_text_in_new_rows(tmp_path: Any) -> None:
    """A new CSV file may have nothing but digits in a column that held texts, and codes may begin with 0."""
    train = gb.read_table(text_file(tmp_path, "zip,y\n007,a\nK1,b\n007,a\nK1,b\n"), label="y")
    new = gb.read_table(text_file(tmp_path, "zip\n007\n"), like=train)
    assert new.as_samples()[0].tolist() == [[1, 0]]


ROWS = 12
FOUND: dict[str, tuple[str, str, list[str], str | None]] = {  # a row of the file, names, features, what is said
    "commas before fractions": ("{i},5;{c}", "x;c", ["x", "c=a", "c=b"], None),
    "points before fractions": ("{i}.5;{c}", "x;c", ["x", "c=a", "c=b"], None),
    "spaces around names": ('{i} ;"{c}" ', " x ; c", ["x", "c=a", "c=b"], None),
    "none, as pandas has it": ("{i};{n}", "x;c", ["x", "c=a", "c is missing"], None),
    "separated thousands": (
        '"1,{j}00",{c}',
        "x,c",
        ["x=1,000", "x=1,100", "x=1,200", "c=a", "c=b"],
        "12 of 12 .* such as '1,000': write them without .*; kinds",
    ),
    "percent signs": (
        "{j}%,{c}",
        "x,c",
        ["x=0%", "x=1%", "x=2%", "c=a", "c=b"],
        "'x' holds texts, and 12 of 12 look like numbers",
    ),
    "one word": (
        "{w},{c}",
        "x,c",
        ["x=0", "x=1", "x=2", "x=?", "c=a", "c=b"],
        r"11 of 12 .*'\?' does not: missing='\?' if",
    ),
    "numbers of rows": (
        "{i},{j},{c}",
        ",x,c",
        ["x", "c=a", "c=b"],
        "a column has no name, as that of pandas' row numbers",
    ),
    "commas at the end": ("{i},{c},,,", "x,c,,,", ["x", "c=a", "c=b"], "a column has no name"),
    "texts that look alike": (
        "{a},{i}",
        "c,x",
        ["c=Pine", "c=fir", "c=pine", "x"],
        "'c' has the texts 'Pine' and 'pine', which differ in case or spaces alone",
    ),
    "forms of characters": (
        "{f},{i}",
        "c,x",
        ["c=cafe\u0301", "c=caf\u00e9", "x"],
        "differ in the form of their characters alone",
    ),
    "codes": (
        "{z},{c}",
        "x,c",
        ["x", "c=a", "c=b"],
        "'x' has whole numbers with a 0 before them.*'00'.*'category' takes",
    ),
    "codes in quotes": (
        '"{z}";{i}',
        "x;c",
        ["x", "c"],
        "'x' has whole numbers with a 0 before them",
    ),
    "no codes": ("0.0{j},10{i}", "x,c", ["x", "c"], None),
    "pandas' name for none": ("{i},{j}", "Unnamed: 0,x", ["x"], "a column has no name, 'Unnamed: 0' by pandas"),
    "a row for names": ("{i},{j},{i}", "5.1,3.5,1.4", ["5.1", "3.5", "1.4"], "3 of 4 are numbers, as '5.1' is"),
    "names": ("k{i},{j}", "c,x", [f"c=k{i}" for i in (0, 1, 10, 11, *range(2, 10))] + ["x"], "'c' has 12 texts in 12"),
    "numbers that float64 holds not": (
        "46116860184273879{i:02},{j}",
        "c,x",
        ["x"],
        r"all its values are near 4\.61169e\+18, and float64 tells none apart there",
    ),
    "the label twice": ("{i},{y}", "x,c", ["x", "c=no", "c=yes"], "column 'c' is the label 'y' once more"),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("case", FOUND)
def test_what_people_write_is_read_or_said(case: str, stream: bool, tmp_path: Any) -> None:
    row, names, features, said = FOUND[case]
    separator = ";" if ";" in row else ","
    values = [
        {"i": i, "j": i % 3, "c": "ab"[i % 2], "n": ["a", "None", "<NA>"][i % 3], "w": "?" if i == 3 else i % 3}
        | {"z": f"0{i % 3}", "a": ["fir", "pine", "Pine"][i % 3], "f": ["caf\u00e9", "cafe\u0301"][i % 2]}
        for i in range(ROWS)
    ]
    labels = [["no", "yes"][i % 2] for i in range(ROWS)]
    rows = [row.format(y=y, **of_row) + separator + y for of_row, y in zip(values, labels, strict=True)]
    path = text_file(tmp_path, "\n".join([f"{names}{separator}y", *rows, ""]))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", gb.TableWarning)
        recipe = gb.read_table(path, label="y", stream=stream).recipe
    assert [name for column in recipe.columns for name in column.features] == features
    assert (said is None) == (not told)
    assert said is None or re.search(said, str(told[0].message))


def test_the_only_word_among_numbers_is_named_though_it_is_in_a_row_to_test_on() -> None:
    values = [str(i) if i != 58 else "?" for i in range(N)]
    train, _ = gb.read_table({"x": values, "y": KIND}, label="y").split(0.2, seed=1)
    with pytest.raises(gb.DataFormatError, match=r"'x' holds texts, and 48 of 48 look like.* '\?' does not"):
        train.recipe  # noqa: B018


# --- rows to train on, rows to test on ------------------------------------------------------------------------------


def test_the_split_is_stratified_and_its_numbers_are_of_the_training_rows() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=200), ["a"] * 150 + ["b"] * 50
    table = gb.read_table({"x": x, "y": y}, label="y")
    train, test = table.split(test_size=0.2, seed=3)
    assert [(part.labels == "a").sum() for part in (train, test)] == [120, 30]
    assert (len(train), len(test)) == (160, 40)
    recipe = train.recipe
    assert test.recipe is recipe
    chosen = train.as_samples()[0][:, 0].astype(float)
    assert abs(chosen.mean()) < 1e-6
    assert abs(chosen.std() - 1) < 1e-6
    column = recipe.columns[0]
    raw = [*(chosen * column.deviation + column.mean), *(test.as_samples()[0][:, 0] * column.deviation + column.mean)]
    np.testing.assert_allclose(np.sort(raw), np.sort(x), rtol=1e-4, atol=1e-5)  # each row once
    again, _ = table.split(test_size=0.2, seed=3)
    assert again.recipe == recipe
    assert table.split(test_size=0.2, seed=4)[0].recipe != recipe


def test_a_split_can_be_split() -> None:
    table = gb.read_table({"x": np.arange(100.0), "y": ["a", "b"] * 50}, label="y")
    rest, test = table.split(0.2)
    train, validation = rest.split(0.25)
    assert [len(part) for part in (train, validation, test)] == [60, 20, 20]
    assert validation.recipe is train.recipe
    whole = [part.prepared_by(table.recipe).as_samples()[0][:, 0] for part in (train, validation, test)]
    assert np.array_equal(np.sort(np.concatenate(whole)), table.as_samples()[0][:, 0])


def test_new_rows_are_matched_by_name() -> None:
    train = gb.read_table({"x": [1.0, 3.0] * 4, "c": ["p", "q"] * 4, "y": ["a", "b"] * 4}, label="y")
    new = gb.read_table({"more": ["?"], "c": ["q"], "x": [3]}, like=train)
    assert new.as_samples()[0].tolist() == [[1, 0, 1]]
    assert new.as_samples()[1] is None
    assert not new.labelled
    with pytest.raises(gb.DataFormatError, match=r"expected the columns of training, found no 'c'; it has 'x'"):
        gb.read_table({"x": [1.0]}, like=train)
    with pytest.raises(gb.DataFormatError, match="the label 'y' must be one of 'a', 'b', got 'z' in row 1"):
        gb.read_table({"x": [1.0, 1.0], "c": ["p", "p"], "y": ["a", "z"]}, like=train).as_samples()
    with pytest.warns(
        gb.TableWarning, match=r"'c' has 2 texts that training rows had not, such as 's', in 3 rows"
    ) as told:
        found = gb.read_table({"x": [1.0] * 4, "c": ["s", "t", "s", "p"]}, like=train).as_samples()[0]
    assert len(told) == 1
    with pytest.warns(
        gb.TableWarning, match=r"'x' has no value in 2 rows, and had one in all .*, 2; column 'c' has"
    ) as told:
        new = gb.read_table({"x": [None, 3.0, None], "c": ["p", None, "q"]}, like=train).X
    assert (len(told), new.tolist()) == (1, [[0, 1, 0], [1, 0, 0], [0, 0, 1]])
    assert found[:, 1:].tolist() == [[0, 0], [0, 0], [0, 0], [1, 0]]


def test_shown() -> None:
    table = gb.read_table({"x": [1.0, None] * 30, "c": ["p", "q"] * 30, "k": [1] * 60, "y": KIND}, label="y")
    with pytest.warns(gb.TableWarning):
        shown = repr(table)
    assert shown.splitlines() == [
        "<Table the dict: 60 rows",
        "  3 columns, 3 features",
        "  number: x",
        "  category: c (2)",
        "  left out: k",
        "  missing in: x",
        "  label: y, classification, 2 classes: 'a', 'b'>",
    ]
    wide = gb.read_table({f"a long name of a column {i}": SIZE for i in range(1000)})
    assert len(repr(wide).splitlines()) < 12
    assert max(map(len, repr(wide).splitlines())) <= 100
    assert "no column tells samples apart" in repr(gb.read_table({"x": [1.0]}))


# --- statistics -------------------------------------------------------------------------------------------------


def test_moments_of_blocks_are_those_of_all() -> None:
    values = np.random.default_rng(0).normal(1e6, 1.0, 10_000)
    moments = Moments()
    for part in np.array_split(values, 37):
        moments.add(part)
    np.testing.assert_allclose([moments.mean, moments.deviation], [values.mean(), values.std()], rtol=1e-12)


@pytest.mark.parametrize("order", ["sorted", "reversed", "random", "organ pipe"])
def test_the_rank_of_a_median_is_within_its_bound(order: str) -> None:
    n = 300_000
    values = np.arange(n, dtype=float)
    if order == "reversed":
        values = values[::-1]
    elif order == "random":
        values = np.random.default_rng(0).permutation(values)
    elif order == "organ pipe":
        values = np.concatenate([values[::2], values[1::2][::-1]])
    median = Median(exact=False)
    for part in np.array_split(values, 91):
        median.add(part)
    assert abs(median.result() - n / 2) <= n * np.log2(n / KEPT) / KEPT + 1
    kept = sum(len(part) for level in median._levels for part in level)
    assert kept <= KEPT * len(median._levels)
    few = Median(exact=False)
    few.add(values[: KEPT - 1])
    assert few.result() == np.median(values[: KEPT - 1])


# --- larger than memory ----------------------------------------------------------------------------------------------


def all_samples(table: Any) -> list[np.ndarray]:
    """X and Y of a table, whether it is streamed or not."""
    X, Y = table.as_samples()
    return [X, Y] if Y is not None else list(X.read(np.arange(len(table))))


MANY = 500


def large_table(seed: int = 0) -> Any:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=MANY)
    return pa.table(
        {
            "x": pa.array(np.where(rng.random(MANY) < 0.1, np.nan, x), from_pandas=True),
            "n": [*range(MANY // 2), *[i + 0.5 for i in range(MANY // 2)]],
            "c": rng.choice(["p", 'q "quoted"', "r, or\nelse"], MANY).tolist(),
            "y": np.where(x > 0.5, "yes", "no").tolist(),
        }
    )


@pytest.mark.parametrize("kind", ["csv", "parquet", "arrow file", "arrow stream"])
def test_a_streamed_file_gives_the_samples_of_one_in_memory(
    kind: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpubatch.tables.files.PIECE", 1000)
    path = written(kind, large_table(), tmp_path / "table")
    streamed, held = (gb.read_table(path, label="y", stream=stream) for stream in (True, False))
    assert "a file that is streamed" in repr(streamed)
    assert len(streamed) == len(held) == MANY
    assert len(streamed.block_sizes) > 10
    for column, other in zip(streamed.recipe.columns, held.recipe.columns, strict=True):
        assert type(column) is type(other)
        for name, value in vars(column).items():
            assert (
                value == pytest.approx(getattr(other, name))
                if isinstance(value, float)
                else value == getattr(other, name)
            )
    for found, expected in zip(all_samples(streamed), all_samples(held), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert np.array_equal(streamed.labels, held.labels)
    source = streamed.as_source()
    chosen = np.random.default_rng(1).integers(0, MANY, 200)
    for found, expected in zip(source.read(chosen), all_samples(held), strict=True):
        np.testing.assert_allclose(found, expected[chosen], rtol=1e-5, atol=1e-6)
    again = gb.read_table(path, like=held, stream=True)
    for found, expected in zip(all_samples(again), all_samples(held), strict=True):
        assert np.array_equal(found, expected)


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_the_split_of_a_streamed_file(kind: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpubatch.tables.files.PIECE", 1000)
    path = written(kind, pa.table({"i": [*range(4000)], "y": ["a", "b"] * 2000}), tmp_path / "table")
    table = gb.read_table(path, label="y", stream=True)
    rest, test = table.split(0.25, seed=5)
    train, validation = rest.split(0.5, seed=5)
    parts = [train, validation, test]
    column = table.recipe.columns[0]
    rows = [
        np.rint(all_samples(part.prepared_by(table.recipe))[0][:, 0] * column.deviation + column.mean) for part in parts
    ]
    assert np.array_equal(np.sort(np.concatenate(rows)), np.arange(4000))
    assert [len(part) for part in parts] == [len(part) for part in rows]
    np.testing.assert_allclose([len(part) / 4000 for part in parts], [0.375, 0.375, 0.25], atol=0.03)
    np.testing.assert_allclose([(part.labels == "a").mean() for part in parts], 0.5, atol=0.06)
    assert validation.recipe is train.recipe
    assert train.recipe.columns[0].mean == pytest.approx(rows[0].mean())
    assert train.recipe.columns[0].deviation == pytest.approx(rows[0].std())
    assert gb.read_table(path, label="y", stream=True).split(0.25, seed=5)[0].recipe == rest.recipe
    with pytest.raises(
        gb.ArgumentError, match=r"test_size=1e-09 of 4000 samples leaves 0 to test on and 4000 to train"
    ):
        table.split(1e-9)


CSV_FILES = {
    "text after numbers": "x,y\n" + "".join(f"{i:03},a\n{i},b\n" for i in range(30)) + "k,a\n",
    "a label of codes, then text": "x,y\n" + "".join(f"{i},{i % 2:02}\n" for i in range(40)) + "1,z\n2,z\n",
    "no last line end": "x,y\n" + "\n".join(f"{i},{'ab'[i % 2]}" for i in range(50)),
    "empty lines": "\n\nx,y\n\n" + "\n\n".join(f"{i},{'ab'[i % 2]}" for i in range(50)) + "\n\n\n",
    "carriage returns": "x,y\r\n" + "\r\n".join(f"{i},{'ab'[i % 2]}" for i in range(50)),
    "a mark": "\ufeffx,y\n" + "\n".join(f"{i},{'ab'[i % 2]}" for i in range(50)),
    "long lines": "x,y\n" + "\n".join(f'{i},"{"ab"[i % 2] * 150}"' for i in range(20)),
    "quotes": "x,y\n" + "\n".join(f'"{i}\n""",{"ab"[i % 2]}' for i in range(20)),
    "an empty column": "x,e,y\n" + "".join(f"{i},,{'ab'[i % 2]}\n" for i in range(50)),
    "gaps": "x,y\n" + "".join(f"{i if i % 9 else ''},{'ab'[i % 2]}\n" for i in range(50)),
}


@pytest.mark.parametrize("case", CSV_FILES)
def test_a_csv_file_in_pieces_is_the_one_in_memory(case: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpubatch.tables.files.PIECE", 100)
    path = text_file(tmp_path, CSV_FILES[case])
    options: dict[str, Any] = {"label": "y", "one_hot": 64, "task": "auto" if "amounts" in case else "classification"}
    streamed, held = (gb.read_table(path, stream=stream, **options) for stream in (True, False))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", gb.TableWarning)
        assert [len(streamed), streamed.classes] == [len(held), held.classes]
        assert [vars(c).keys() for c in streamed.recipe.columns] == [vars(c).keys() for c in held.recipe.columns]
        for found, expected in zip(all_samples(streamed), all_samples(held), strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_streams_that_are_refused(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpubatch.tables.files.PIECE", 100)
    monkeypatch.setattr("gpubatch.tables.files.LONGEST_LINE", 200)
    with pytest.raises(gb.ArgumentError, match="stream=True reads files, got a dict"):
        gb.read_table({"x": [1, 2]}, stream=True)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(gb.ArgumentError, match="pipe is a pipe, which can be read only once"):
        gb.read_table(tmp_path / "pipe")
    packed = tmp_path / "t.csv.gz"
    packed.write_bytes(gzip.compress(b"x,y\n1,a\n2,b\n"))
    assert gb.read_table(packed, label="y").classes == ["a", "b"]
    with pytest.raises(
        gb.ArgumentError, match=r"stream=True reads a file by place, and .*t.csv.gz is packed: unpack it"
    ):
        gb.read_table(packed, stream=True)
    with pytest.raises(gb.DataFormatError, match=r"lines of at most 200 bytes.*a quotation mark may be missing"):
        gb.read_table(text_file(tmp_path, 'x,y\n1,"a\n' + "2,b\n" * 500), stream=True)
    with pytest.raises(gb.DataFormatError, match=r"the label 'y' is missing in row 31"):
        gb.read_table(text_file(tmp_path, "x,y\n" + "1,a\n2,b\n" * 15 + "3,b\n4,\n"), label="y", stream=True)
    with pytest.raises(gb.DataFormatError, match="Expected 2 columns, got 3"):
        gb.read_table(text_file(tmp_path, "x,y\n" + "1,a\n2,b\n" * 30 + "1,2,3\n"), label="y", stream=True)
    table = gb.read_table(text_file(tmp_path, "x,y\n" + "1,a\n2,b\n" * 30), label="y", stream=True)
    text_file(tmp_path, "x,y\n" + "1,a\n2,b\n" * 15)
    with pytest.raises(gb.DataFormatError, match="it has become shorter"):
        repr(table.recipe)


def test_a_streamed_file_is_trained_on(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpubatch.tables.files.PIECE", 1000)
    path = written("csv", pa.table(trees(1000)), tmp_path / "trees.csv")
    train, test = gb.read_table(path, label="species", stream=True).split(0.2)
    net, loader = trained(train, test=test)
    assert loader.window > 0
    model = gb.Model(net, loader)
    assert model.evaluate(path)[1] > 0.9
    assert (model.predict(test) == test.labels).mean() > 0.9


# --- several files --------------------------------------------------------------------------------------------------


def folder_of(table: Any, kind: str, folder: Any, rows: int = 130) -> Any:
    """A table in four files, whose columns stand in another order in each second one."""
    folder.mkdir()
    for number, start in enumerate(range(0, MANY, rows)):
        part = table.slice(start, rows)
        names = part.column_names[:: -1 if number % 2 else 1]
        written(kind, part.select(names), folder / f"part-{number + 8}.{kind.partition(' ')[0]}")  # 8, 9, 10, 11
    return folder


@pytest.mark.parametrize(
    "kind",
    ["csv", "parquet", *(pytest.param(f"arrow {x}", marks=pytest.mark.exhaustive) for x in ("file", "stream"))],
)
@pytest.mark.parametrize("stream", [True, False])
def test_several_files_are_one_table(kind: str, stream: bool, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """``n`` is of whole numbers in the first file, and of fractions in the others."""
    monkeypatch.setattr("gpubatch.tables.files.PIECE", 1000)
    monkeypatch.setattr("gpubatch.tables.several.OPEN", 2)
    folder = folder_of(large_table(), kind, tmp_path / "folder")
    expected = gb.read_table(large_table(), label="y")
    pattern, paths = folder / "part-*", sorted(folder.iterdir(), key=lambda path: int(path.stem.partition("-")[2]))
    for given in (folder, str(pattern), paths):
        table = gb.read_table(given, label="y", stream=stream)
        assert (len(table), table.classes) == (MANY, expected.classes)
        for found, wanted in zip(all_samples(table), all_samples(expected), strict=True):
            np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
    rows = np.random.default_rng(0).permutation(MANY)[:99]
    assert np.array_equal(table.as_source().read(rows)[1], expected.as_samples()[1][rows])
    if (kind, stream) == ("csv", True):
        train, test = table.split(0.2)
        net, loader = trained(train, test=test)
        assert gb.Model(net, loader).evaluate(str(pattern))[1] > 0.5


def test_a_shuffled_epoch_of_several_files_decodes_each_group_once(tmp_path: Any) -> None:
    table = gb.read_table(folder_of(large_table(), "parquet", tmp_path / "folder"), label="y", stream=True)
    loader = gb.Loader(table, batch_size=16, window=100, backend="cpu")
    seen, rows = [], table._rows
    original = rows.block

    def block(number: int, names: Any) -> Any:
        seen.append(number)
        return original(number, names)

    rows.block = block  # type: ignore[method-assign]
    for _ in range(2):
        seen.clear()
        assert sum(len(x) for x, _ in loader) == MANY
        assert len(seen) == len({*seen}) >= len(rows.sizes) - 1  # that which was decoded last is there


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_table_that_is_streamed_refuses_to_be_pickled_in_words(kind: str, tmp_path: Any) -> None:
    path = written(kind, large_table(), tmp_path / "table")
    for given in (path, [path, written(kind, large_table(), tmp_path / "more")]):
        with pytest.raises(gb.DTypeError, match="a source cannot be pickled"):
            pickle.dumps(gb.read_table(given, label="y", stream=True))


def files_in(folder: Any, *texts: str) -> Any:
    folder.mkdir()
    for number, text in enumerate(texts):
        (folder / f"{number}.csv").write_text(text)
    return folder


@pytest.mark.parametrize("stream", [True, False])
def test_a_column_that_is_text_in_some_csv_files_is_text_in_all(stream: bool, tmp_path: Any) -> None:
    """Codes with zeros before them stay as they are written; an empty file is left out."""
    folder = files_in(tmp_path / "a", "c,y\n", "c,y\n01,0\n02,1\n01,1\n", "y,c\n1,x\n0,01\n")
    table = gb.read_table(folder, label="y", stream=stream)
    with pytest.warns(gb.TableWarning, match=r"'c' holds texts, and 4 of 5 look like numbers.* 'x' does not: missing"):
        assert table.recipe.columns[0].values == ("01", "02", "x")
    X, Y = all_samples(table)
    assert X.tolist() == [[1, 0, 0], [0, 1, 0], [1, 0, 0], [0, 0, 1], [1, 0, 0]]
    assert Y.tolist() == [0, 1, 1, 1, 0]


SEVERAL = {
    "a column less": ("x,y\n1,0\n2,1\n", "y\n1\n", r"1\.csv: expected the column 'x', as in .*0\.csv, found none"),
    "a column more": ("x,y\n1,0\n", "x,y,z\n1,0,2\n", r"1\.csv: expected the columns of .*0\.csv, found 'z', too"),
    "infinity": ("x,y\n1,0\n2,1\n", "x,y\n1,0\ninf,0\n", r"1\.csv: column 'x' must .* got inf in row 1"),
    "no label": ("x,y\n1,0\n2,1\n", "x,y\n1,0\n3,\n", r"1\.csv: the label 'y' is missing in row 1"),
}


@pytest.mark.parametrize("case", SEVERAL)
@pytest.mark.parametrize("stream", [True, False])
def test_files_that_differ_are_refused_by_name(case: str, stream: bool, tmp_path: Any) -> None:
    first, second, match = SEVERAL[case]
    with pytest.raises((gb.DataFormatError, gb.NonFiniteError), match=match):
        all_samples(gb.read_table(files_in(tmp_path / "a", first, second), label="y", stream=stream))


def test_what_files_of_two_types_or_of_named_folders_lose_is_said(tmp_path: Any) -> None:
    """An integer that the float of another file cannot hold may be a label or a category."""
    for k, x in enumerate(([2**53 + 1, 3], [1.5, 2.5])):
        (tmp_path / f"year={k}").mkdir()
        pa.parquet.write_table(pa.table({"x": x, "y": [0, 1]}), tmp_path / f"year={k}" / "a.parquet")
    with (
        pytest.warns(gb.TableWarning, match="'year' in the names of folders, such as 'year=0', is not read"),
        pytest.raises(
            gb.DataFormatError, match=r"a\.parquet: column 'x' must be of one type in all files.*90071992547"
        ),
    ):
        gb.read_table(tmp_path, label="y", kinds={"x": "category"})
    for name in ("Train", "test"):
        (tmp_path / "apart" / name).mkdir(parents=True)
        (tmp_path / "apart" / name / "a.csv").write_text("x,y\n1,a\n2,b\n")
    with pytest.warns(gb.TableWarning, match="the files of 'test' and 'train' are one table; if they are to be apart"):
        gb.read_table(tmp_path / "apart", label="y")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("packing", [None, "gzip"])
def test_codes_of_a_label_are_classes_as_they_are_written(packing: str | None, stream: bool, tmp_path: Any) -> None:
    """Also where they are in a later file alone; as codes of new rows they are found again."""
    text = "x,y\n" + "".join(f"{i},{i % 3 + 8:02}\n" for i in range(30))
    data = text.encode() if packing is None else gzip.compress(text.encode())
    path = text_file(tmp_path, data)
    table = gb.read_table(path, label="y", stream=stream and packing is None)
    assert table.classes == ["08", "09", "10"]
    assert gb.read_table(path, like=table).labels.tolist() == ["08", "09", "10"] * 10
    (tmp_path / "s.csv").write_text("x,y\n" + "".join(f"{i},{10 + i % 2}\n" for i in range(30)))
    assert gb.read_table(tmp_path, label="y").classes == ["08", "09", "10", "11"]


def test_types_that_no_column_holds_are_refused(tmp_path: Any) -> None:
    pa.parquet.write_table(pa.table({"x": [1, 2], "y": [0, 1]}), tmp_path / "a.parquet")
    pa.parquet.write_table(pa.table({"x": ["1", "2"], "y": [0, 1]}), tmp_path / "b.parquet")
    with pytest.raises(gb.DataFormatError, match=r"b\.parquet: expected column 'x' of type int64.* found string"):
        gb.read_table(tmp_path, label="y")
    coded = pa.array(["p", "q"]).dictionary_encode()
    pa.parquet.write_table(pa.table({"x": coded, "y": [0, 1]}), tmp_path / "a.parquet")
    assert gb.read_table(tmp_path, label="y").recipe.columns[0].values == ("1", "2", "p", "q")


THREADS = """
import os, sys, pyarrow.csv
import gpubatch as gb
before = len(os.listdir("/proc/self/task"))
for stream in (False, True):
    gb.read_table(sys.argv[1], label="y", stream=stream).recipe
print(len(os.listdir("/proc/self/task")) - before)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="threads are counted from Linux")
def test_a_small_csv_file_leaves_no_threads_that_parse(tmp_path: Any) -> None:
    """A process that ends soon after pyarrow's were used may abort; the thread that is left reads."""
    path = text_file(tmp_path, "x,z,y\n" + "".join(f"{i},{i % 7},{'ab'[i % 2]}\n" for i in range(200)))
    done = subprocess.run([sys.executable, "-c", THREADS, str(path)], capture_output=True, text=True, check=True)
    assert int(done.stdout) <= 1


MEMORY = """
import re, sys
import gpubatch as gb
train, test = gb.read_table(sys.argv[1], label="y", stream=True).split(0.2)
net = gb.mlp([train.features, 4, 2], backend="cpu")
loader = gb.Loader(train, batch_size=512, window="4 MiB", backend="cpu")
gb.fit(net, loader, gb.Adam(net.parameters), 1, validation=test, progress=False)
gb.Model(net, loader).evaluate(test)
print(int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024)
"""


@pytest.mark.exhaustive
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="the peak is read from Linux")
@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_memory_does_not_grow_with_a_streamed_file(kind: str, tmp_path: Any) -> None:
    """A row more, of 59 bytes in Parquet and 123 in CSV, takes less than 12: what allocators keep, no list of rows.

    Measured: 4 to 7 in CSV and 5 to 8 in Parquet.
    """
    peaks = []
    for rows in (100_000, 800_000):
        rng = np.random.default_rng(0)
        columns = {f"x{i}": rng.normal(size=rows) for i in range(6)}
        table = pa.table({**columns, "y": np.where(columns["x0"] > 0, "yes", "no")})
        path = tmp_path / f"{rows}"
        if kind == "csv":
            pa.csv.write_csv(table, path)
        else:
            pa.parquet.write_table(table, path, row_group_size=20_000)
        alone = {"ARROW_DEFAULT_MEMORY_POOL": "system", "MALLOC_ARENA_MAX": "1"}
        done = subprocess.run(
            [sys.executable, "-c", MEMORY, str(path)], capture_output=True, text=True, env={**os.environ, **alone}
        )
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout.split()[-1]))
    assert peaks[1] - peaks[0] < 12 * 700_000, peaks


# --- with a loader, a network and a model -----------------------------------------------------------------------------


def trees(n: int = 300, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    kinds = rng.integers(0, 3, n)
    height = 10.0 * kinds + rng.normal(size=n)
    height[rng.random(n) < 0.05] = np.nan
    return {
        "height": height,
        "bark": np.array(["rough", "smooth", "thin"])[rng.integers(0, 3, n)].tolist(),
        "species": np.array(["oak", "ash", "elm"])[kinds].tolist(),
    }


def trained(table: Any, epochs: int = 5, test: Any = None) -> tuple[Any, Any]:
    net = gb.mlp([table.features, 16, table.outputs], loss=table.loss, backend="cpu")
    loader = gb.Loader(table, batch_size=16, backend="cpu")
    gb.fit(net, loader, gb.Adam(net.parameters, lr=1e-2), epochs, validation=test, progress=False)
    return net, loader


def test_a_table_as_arrays() -> None:
    """By the closed form: standardised by the mean and deviation of its rows, a column for each category."""
    size, bark = np.array([2.0, 4.0, 9.0, 5.0]), ["thin", "thick", "thin", "thin"]
    table = gb.read_table({"size": size, "bark": bark, "y": ["oak", "elm", "oak", "ash"]}, label="y")
    scaled = (size - size.mean()) / size.std()
    expected = np.stack([scaled, [0, 1, 0, 0], [1, 0, 1, 1]], axis=1)
    np.testing.assert_allclose(table.X, expected, rtol=1e-6)
    assert table.X.dtype == np.float32
    assert table.Y is not None
    assert (table.Y.dtype, table.Y.tolist()) == (np.int64, [2, 1, 2, 0])
    np.testing.assert_allclose(table.prepare({"bark": ["thick"], "size": [6.0]}), [[1 / size.std(), 1, 0]], rtol=1e-6)
    assert gb.read_table({"size": size}).Y is None
    amounts = gb.read_table({"bark": bark, "size": size}, label="size").Y
    assert amounts is not None
    np.testing.assert_allclose(amounts, scaled, rtol=1e-6)


def test_from_a_table_to_a_model_and_back(tmp_path: Any) -> None:
    train, test = gb.read_table(trees(), label="species").split(0.2)
    net, loader = trained(train, test=test)
    path = tmp_path / "trees.safetensors"
    gb.save(path, net, loader=loader)
    model = gb.load(path, backend="cpu")
    assert model.classes == ["ash", "elm", "oak"]
    assert model.preparation.table == train.recipe
    predicted = model.predict(test)
    assert predicted.dtype.kind == "U"
    accuracy = (predicted == test.labels).mean()
    assert accuracy > 0.9
    X, Y = test.as_samples()
    np.testing.assert_allclose(model.evaluate(test), net.evaluate(X, Y), rtol=1e-6)
    assert model.evaluate(test)[1] == pytest.approx(accuracy)
    matrix = model.confusion_matrix(test)
    assert matrix.sum() == len(test)
    assert np.trace(matrix) / len(test) == pytest.approx(accuracy)
    new = trees(seed=1)
    assert (model.predict({k: v for k, v in new.items() if k != "species"}) == np.array(new["species"])).mean() > 0.9
    assert model.evaluate(new)[1] == pytest.approx((model.predict(new) == np.array(new["species"])).mean())
    np.testing.assert_allclose(model.probabilities(new).sum(1), 1, rtol=1e-5)
    assert model.predict({"height": 20.0, "bark": "thin"}).tolist() == ["elm"]
    own = gb.Model(net, train)  # without a loader
    assert np.array_equal(own.scores(new), model.scores(new))
    own.save(path)
    assert np.array_equal(gb.load(path, backend="cpu").scores(new), model.scores(new))
    with pytest.raises(gb.DataFormatError, match="found no 'height'"):
        model.predict({"bark": ["thin"]})
    with pytest.raises(gb.ArgumentError, match="has no label 'species'"):
        model.confusion_matrix({"height": [1.0], "bark": ["thin"]})
    with pytest.raises(gb.DataFormatError, match="expected the label 'species' to test with"):
        model.evaluate({"height": [1.0], "bark": ["thin"]})


def test_regression_predicts_in_the_unit_of_the_label(tmp_path: Any) -> None:
    x = np.linspace(-1, 1, 200)
    train, test = gb.read_table({"x": x, "price": 200_000 + 50_000 * x}, label="price").split(0.2)
    net, loader = trained(train, epochs=20)
    path = tmp_path / "m.safetensors"
    gb.save(path, net, loader=loader)
    model = gb.load(path, backend="cpu")
    assert model.classes is None
    found = model.predict(test)
    assert gb.metrics.r2(test.labels, found) > 0.98
    assert model.evaluate(test)[1] is None


def test_booleans_are_classes_of_a_model(tmp_path: Any) -> None:
    table = gb.read_table({"x": SIZE, "y": [x > 3 for x in SIZE]}, label="y")
    net, _ = trained(table)
    gb.save(tmp_path / "m.safetensors", net, loader=table)
    found = gb.load(tmp_path / "m.safetensors", backend="cpu").predict({"x": [0.0, 6.0]})
    assert found.dtype == bool
    assert found.tolist() == [False, True]


def test_what_a_loader_and_fit_refuse() -> None:
    table = gb.read_table(trees(), label="species")
    train, test = table.split(0.2)
    net, loader = trained(train, epochs=1)
    with pytest.raises(gb.ArgumentError, match="X must be given alone where it is a table"):
        gb.Loader(train, np.zeros(len(train)), backend="cpu")
    with pytest.raises(gb.ArgumentError, match="X is a table of rows"):
        gb.Loader(train, sample_axis=1, backend="cpu")
    with pytest.raises(gb.ArgumentError, match="validation must be prepared as the loader's table is"):
        gb.fit(net, loader, gb.Adam(net.parameters), 1, validation=gb.read_table(trees(), label="species"))
    with pytest.raises(gb.ArgumentError, match="classes must be None where a table has them"):
        gb.Model(net, train, ["x", "y", "z"])
    x, y = loader.to_batch(test)
    assert x.shape == (len(test), train.features)
    assert y.tolist() == test.as_samples()[1].tolist()


def test_a_recipe_comes_back_from_json() -> None:
    columns = {"x": [1.0, None] * 30, "c": ["p", None, "q"] * 20, "h": [str(i % 9) for i in range(60)], "k": [1] * 60}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        table = gb.read_table({**columns, "y": KIND}, label="y", kinds={"h": "hash"}, missing="?")
        recipe = table.recipe
    arrays: dict[str, np.ndarray] = {}
    text = json.dumps(recipe.to_json(arrays))
    assert Recipe.from_json(json.loads(text), arrays, ["a", "b"]) == recipe


@pytest.mark.parametrize("kind", ["Categorical", "Enum"])
def test_categories_of_polars(kind: str) -> None:
    pl = peer("polars")
    of = pl.Enum(["p", "q"]) if kind == "Enum" else pl.Categorical
    found = gb.read_table(pl.DataFrame({"c": pl.Series(["p", None, "q"], dtype=of)})).as_samples()[0]
    assert found.tolist() == [[1, 0, 0], [0, 0, 1], [0, 1, 0]]


def test_pandas_types_of_its_own() -> None:
    pd = peer("pandas")
    frame = pd.DataFrame(
        {
            "i": pd.array([1, None, 3] * 20, dtype="Int64"),
            "b": pd.array([True, None, False] * 20, dtype="boolean"),
            "s": pd.array(["p", None, "q"] * 20, dtype="string"),
            "c": pd.Categorical(["p", "q", None] * 20),
            "o": np.array(["p", None, np.nan] * 20, object),
        },
        index=range(100, 160),
    )
    with pytest.raises(gb.ArgumentError, match=r"label must name columns of the DataFrame, .* got .3."):
        gb.read_table(frame, label=3)
    with pytest.raises(gb.DataFormatError, match="column 'p' holds dates or times"):
        gb.read_table({"p": pd.period_range("2020", periods=60, freq="M"), "x": SIZE}).recipe  # noqa: B018
    table = gb.read_table(frame)
    assert table.columns == ["i", "b", "s", "c", "o"]
    assert [column.kind for column in table.recipe.columns] == ["number", "number", "category", "category", "category"]
    assert table.features == 2 + 2 + 3 + 3 + 2
