"""``gpubatch train --save``, ``predict`` and ``summary``, as a person types them."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from families import every
from needs import file_library
from test_cli import SMALL, idx, mnist, run

import gpubatch as gb
from gpubatch.cli import COMMANDS, command_named
from gpubatch.cli.data import DataOptions, Which, labelled_samples, raw_samples
from gpubatch.cli.models import check_out, columns_of
from gpubatch.cli.options import BatchOptions

__all__ = ["mnist"]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model of raw pixels with named classes, not trained."""
    loader = gb.Loader(np.zeros((4, 784), np.uint8), np.zeros(4, int), 2, scale=1 / 255, backend="cpu")
    net = gb.mlp([784, 8, 3], backend="cpu")
    gb.save(tmp_path / "m.safetensors", net, loader, ["cat", "dog", "eel, or such"])
    return tmp_path / "m.safetensors"


def test_train_saves_what_predicts_as_it_was_tested(mnist: Path, tmp_path: Path) -> None:
    path = str(tmp_path / "digits.safetensors")
    done = run("train", str(mnist), *SMALL, "--json", "--save", path)
    result = json.loads(done.stdout)
    rows = [*csv.reader(run("predict", path, str(mnist)).stdout.splitlines())]
    assert rows[0] == ["prediction"]
    right = [int(row[0]) == i % 10 for i, row in enumerate(rows[1:])]
    assert len(right) == 100
    assert np.mean(right) == pytest.approx(result["test_accuracy"])
    assert "save_file" not in result["arguments"]


@pytest.mark.exhaustive
def test_predictions_of_files(model: Path, tmp_path: Path) -> None:
    X = np.random.default_rng(0).integers(0, 256, (20, 784), dtype=np.uint8)
    np.save(tmp_path / "x.npy", X)
    (tmp_path / "x-idx3-ubyte").write_bytes(idx(X.reshape(20, 28, 28)))
    loaded = gb.load(model, backend="cpu")
    printed = run("predict", str(model), str(tmp_path / "x.npy"), "--probabilities").stdout
    rows = [*csv.DictReader(printed.splitlines())]
    assert [row["prediction"] for row in rows] == loaded.predict(X).tolist()
    found = [[float(row[f"p({name})"]) for name in loaded.classes] for row in rows]
    np.testing.assert_array_equal(np.array(found, "float32"), loaded.probabilities(X))
    out = tmp_path / "predictions.csv"
    done = run("predict", str(model), str(tmp_path / "x-idx3-ubyte"), "--out", str(out), "--probabilities")
    assert (done.stdout, out.read_text()) == ("", printed)
    assert done.stderr.startswith("20 predictions in ")


@pytest.mark.exhaustive
def test_summary_says_what_a_model_is(model: Path) -> None:
    text = run("summary", str(model)).stdout
    for part in (
        "Dense(inputs=784",
        "samples: uint8 of shape (784,), times 0.00392157",
        "'cat', 'dog', 'eel, or such'",
        "written by gpubatch",
    ):
        assert part in text
    found = json.loads(run("summary", str(model), "--json").stdout)
    assert found["classes"] == ["cat", "dog", "eel, or such"]
    assert found["preparation"]["scale"] == pytest.approx(1 / 255)
    assert found["network"]["parameters"] == 784 * 8 + 8 + 8 * 3 + 3


# --- tables: the student's two commands ------------------------------------------------------------------------------

NAMES = ["ash", "beech", "elm", "oak"]


@pytest.fixture
def trees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with trees.csv, test.csv and new.csv: numbers of different sizes, 3 % missing, classes as words."""
    file_library("pyarrow")
    rng = np.random.default_rng(0)
    kinds = rng.integers(0, 4, 1300)
    X = (rng.normal(size=(4, 6))[kinds] * 2 + rng.normal(size=(1300, 6))) * [1, 10, 100, 0.1, 5, 1] + [
        0,
        5,
        900,
        1,
        2,
        3,
    ]
    rows = [[f"{x:.4g}" if rng.random() > 0.03 else "" for x in row] for row in X]
    head = ",".join("abcdef")
    for name, some, labelled in (
        ("trees", slice(1000), 1),
        ("test", slice(1000, None), 1),
        ("new", slice(1000, None), 0),
    ):
        lines = [",".join(row + [NAMES[k]] * labelled) for row, k in zip(rows[some], kinds[some], strict=True)]
        (tmp_path / f"{name}.csv").write_text("\n".join([head + ",species" * labelled, *lines]) + "\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_folder_of_tables(trees: Path) -> None:
    """It is one table in every command, as a pattern is; two files are those to train and to test on."""
    head, *rows = (trees / "trees.csv").read_text().splitlines()
    (trees / "parts").mkdir()
    for number, start in enumerate(range(0, 1000, 300)):
        (trees / "parts" / f"{number}.csv").write_text("\n".join([head, *rows[start : start + 300]]) + "\n")
    options = ["--layers", "8", "--epochs", "2", "--save", "m.safetensors", "--json", "--no-progress"]
    whole, folder, pattern = (
        json.loads(run("train", data, "--label", "species", *options).stdout)["test_loss"]
        for data in ("trees.csv", "parts", "parts/*.csv")
    )
    assert whole == folder == pattern
    assert len(run("predict", "m.safetensors", "parts").stdout.splitlines()) == 1001
    tested = json.loads(run("test", "m.safetensors", "parts/*.csv", "--json", "--all-samples").stdout)
    assert (tested["samples"], tested["trained_on"]) == (1000, 800)
    done = run("train", *(f"parts/{number}.csv" for number in range(3)), "--label", "species", code=2)
    assert "several files are one table as a folder, or as a pattern in quotes, such as 'parts/*'" in done.stderr


def test_a_table_in_two_commands(trees: Path) -> None:
    """gpubatch train, gpubatch test: with confusion matrix, probabilities and what Python's model gives."""
    options = ["--layers", "32", "--epochs", "10", "--save", "trees.safetensors", "--json", "--no-progress"]
    trained = json.loads(run("train", "trees.csv", "--label", "species", *options).stdout)
    assert trained["batch_reason"].startswith("auto takes 16 where samples are few, for 50 steps an epoch; it needs")
    held = json.loads(run("test", "trees.safetensors", "trees.csv", "--json").stdout)
    assert (held["samples"], held["accuracy"]) == (200, trained["test_accuracy"])
    assert held["loss"] == pytest.approx(trained["test_loss"], rel=1e-5)
    done = run("test", "trees.safetensors", "test.csv", "--out", "p.csv", "--probabilities", "--metrics", "f1,top_2")
    model = gb.load("trees.safetensors", backend="cpu")
    truth = gb.read_table("test.csv", like=model.preparation.table).labels  # type: ignore[union-attr]
    accuracy = np.mean(model.predict("new.csv") == truth)
    assert accuracy > 0.85
    assert f"accuracy   {100 * accuracy:.2f} % ({round(300 * accuracy)} of 300)" in done.stdout
    matrix = model.confusion_matrix("test.csv")
    for name, row in zip(NAMES, matrix, strict=True):
        cells = " +".join(f"{count}" if count else "·" for count in row)
        assert re.search(rf"^ {name} +{cells} *$", done.stdout, re.MULTILINE)
        assert re.search(rf"^ {name} +{row.sum()} +[\d.]+ +[\d.]+ +[\d.]+ *$", done.stdout, re.MULTILINE)
    assert max(map(len, done.stdout.splitlines())) <= 80
    written = [*csv.DictReader(Path("p.csv").read_text().splitlines())]
    assert [row["prediction"] for row in written] == model.predict("new.csv").tolist()
    found = np.array([[row[f"p({name})"] for name in NAMES] for row in written], "float32")
    np.testing.assert_array_equal(found, model.probabilities("new.csv"))
    assert run("predict", "trees.safetensors", "new.csv", "--probabilities").stdout == Path("p.csv").read_text()


@pytest.mark.exhaustive
def test_two_tables_and_their_options(trees: Path) -> None:
    options = ["--layers", "8", "--epochs", "1", "--no-progress", "--json", "--save", "m.safetensors"]
    trained = json.loads(
        run("train", "trees.csv", "test.csv", "--label", "species", "--samples", "500", *options).stdout
    )
    tested = json.loads(run("test", "m.safetensors", "test.csv", "--json").stdout)
    assert (tested["samples"], tested["accuracy"]) == (300, trained["test_accuracy"])
    more = ["--label", "c", "--drop", "species,a", "--missing", "?"]
    trained = json.loads(run("train", "trees.csv", *more, *options, code=1).stdout or "null") or trained
    whole = Path("trees.csv").read_text().splitlines()
    Path("whole.csv").write_text("\n".join(line for line in whole if all(line.split(","))))
    trained = json.loads(run("train", "whole.csv", *more, *options).stdout)
    tested = json.loads(run("test", "m.safetensors", "whole.csv", "--held-out", "--json").stdout)
    assert tested["r2"] == pytest.approx(trained["test_r2"], abs=1e-6)
    target = gb.load("m.safetensors").preparation.table.target  # type: ignore[union-attr]
    assert target is not None
    assert tested["rmse"] == pytest.approx(target.deviation * math.sqrt(tested["loss"]), rel=1e-5)
    summary = run("summary", "m.safetensors").stdout
    assert "table: 4 columns, b, d, e, f\nlabel: c\n" in summary
    assert run("predict", "m.safetensors", "new.csv").stdout.startswith("prediction\n")


TABLES = {
    "no label": (["train", "trees.csv"], 2, "DATA is a table: --label must name the column to learn, one of 'a', 'b'"),
    "other label": (["train", "trees.csv", "--label", "specie"], 2, "trees.csv, .*'specie'; did you mean 'species'"),
    "three": (
        ["train", "a.csv", "b.csv", "c.csv"],
        2,
        "DATA must be one table, or two: to train and to test on, got 3",
    ),
    "not there": (["train", "forest.csv", "--label", "a"], 2, "files or a folder that are there, got 'forest.csv'"),
    "unlabelled": (["train", "trees.csv", "new.csv", "--label", "species"], 1, "new.csv: expected a column 'species'"),
    "no table": (["train", "--label", "species"], 2, "--label is for a table, and DATA is none"),
}


@every("case", TABLES, fast=["no label"])
def test_wrong_tables_are_told_in_one_line(case: tuple[list[str], int, str], trees: Path) -> None:
    arguments, code, message = case
    done = run(*arguments, code=code)
    assert re.search(message, done.stderr), done.stderr
    assert done.stderr.count("\n") == 1


# --- streams, files, other people's code -----------------------------------------------------------------------------


@pytest.mark.exhaustive
def test_a_test_says_by_what_its_samples_were_left_out(model: Path, tmp_path: Path) -> None:
    """Of a model that does not say it; with another seed than that of training, some of them were trained on."""
    np.save(tmp_path / "x.npy", np.zeros((20, 784), np.uint8))
    np.save(tmp_path / "y.npy", np.array(["cat", "dog"] * 10))
    files = [str(tmp_path / "x.npy"), str(tmp_path / "y.npy")]
    said = run("test", str(model), *files, "--held-out", "--seed", "7", "--test-size", "0.3").stdout
    assert "y.npy: 6 samples, which training left out by --test-size 0.3 and --seed 7 if it had these" in said


OF_TRAINING: dict[str, dict[str, Any]] = {
    "a table": {"data": ["trees.csv"], "label": "species"},
    "a table that is streamed": {"data": ["trees.csv"], "label": "species"},
    "numbers of a table": {"data": ["whole.csv"], "label": "a", "drop": "species"},
    "arrays": {"data": ["x.npy", "y.npy"]},
    "labels in a column": {"data": ["x.npy", "column.npy"]},
    "the digits": {},
}


@pytest.mark.filterwarnings("ignore:.* has no value in .* rows:gpubatch.TableWarning")
@pytest.mark.parametrize("name", OF_TRAINING)
def test_a_model_knows_what_its_training_left_out(name: str, trees: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows are those that training was tested on, and they are told; of other data nothing is said to be known."""
    Path("whole.csv").write_text("\n".join(x for x in Path("trees.csv").read_text().splitlines() if all(x.split(","))))
    labels = np.arange(90) % 3
    np.save("x.npy", np.random.default_rng(0).normal(size=(90, 4)))
    np.save("y.npy", np.array(["p", "q", "r"])[labels])
    np.save("column.npy", labels[:, None])
    of = {"test_size": 0.25, **OF_TRAINING[name]} if OF_TRAINING[name] else {}
    with monkeypatch.context() as patched:
        if "streamed" in name:
            patched.setattr(gb.tables.several, "streams", lambda stream, size: True)
        found = DataOptions(**of, samples=60, seed=3).read()
        net = gb.mlp(
            [found.features, found.outputs], loss="mse" if found.task == "regression" else "svm", backend="cpu"
        )
        loader = found.loader(net, BatchOptions("16"), 0)
        found.model(net, loader).save("m.safetensors")
        held = found.validation.as_source().read(np.arange(len(found.validation))) if "table" in name else found.test
    model = gb.load("m.safetensors", backend="cpu")
    data = of.get("data", [])
    tested = labelled_samples(model, data, Which(None, None, None))
    x, y = (np.concatenate(parts) for parts in zip(*tested.batches, strict=True))
    np.testing.assert_array_equal(x, held[0] if "table" in name else loader.to_batch(held[0]))
    np.testing.assert_array_equal(y, held[1])
    size = 0.25 if data else 0.2
    assert (tested.said, tested.trained) == (f"which training left out by --test-size {size} and --seed 3", 0)
    whole = labelled_samples(model, data, Which(False, None, None))
    assert (whole.said, whole.trained) == ("60 of which the model was trained on", 60)
    assert whole.batches.n_samples == model.preparation.rows.rows  # type: ignore[union-attr]
    with pytest.raises(gb.ArgumentError, match="--seed must be 3 as in training, or left out, got 4"):
        labelled_samples(model, data, Which(None, None, 4))
    if data and "column" not in name:
        other = [f"other{Path(file).suffix}" if k == 0 else file for k, file in enumerate(data)]
        if name == "arrays":
            np.save(other[0], np.load("x.npy")[::-1])
        else:
            head, *lines = Path(data[0]).read_text().splitlines()
            Path(other[0]).write_text("\n".join([head, *lines[::-1]]))
        tested = labelled_samples(model, other, Which(None, None, None))
        assert (tested.said, tested.trained) == ("not the data of training as they were then", None)
        with pytest.raises(gb.ArgumentError, match=r"--held-out needs the data of training, .* samples as they were"):
            labelled_samples(model, other, Which(True, None, None))


def test_a_file_without_the_rows_of_training_is_read(trees: Path) -> None:
    """As those of before they were kept."""
    train, test = gb.read_table("trees.csv", label="species").split(0.25, 3)
    model = gb.Model(gb.mlp([train.features, train.outputs], backend="cpu"), train)
    model.preparation = dataclasses.replace(model.preparation, rows=None)  # type: ignore[type-var]
    unknown = "whether the model was trained on them, its file does not say"
    for which, said, n in (
        (Which(None, None, None), unknown, 1000),
        (Which(True, 0.25, 3), "which training left out by --test-size 0.25 and --seed 3 if it had these", len(test)),
    ):
        tested = labelled_samples(model, ["trees.csv"], which)
        assert (tested.said, tested.batches.n_samples) == (said, n)
    with pytest.raises(gb.ArgumentError, match="--test-size is for --held-out, all samples are tested on"):
        labelled_samples(model, ["trees.csv"], Which(None, 0.25, None))


@pytest.mark.parametrize("order", ["C", "F"])
def test_an_array_of_either_order_is_predicted(model: Path, order: Any, tmp_path: Path) -> None:
    """A frame of pandas' as an array, say, is in Fortran's order, and is trained on so."""
    X = np.random.default_rng(0).integers(0, 256, (9, 784), dtype=np.uint8)
    np.save(tmp_path / "x.npy", np.asarray(X, order=order))
    loaded = gb.load(model, backend="cpu")
    raw = raw_samples(loaded, str(tmp_path / "x.npy"), 0)
    assert np.array_equal(loaded.predict(raw), loaded.predict(X))


def test_columns_of_probabilities_are_named_by_the_classes_that_they_are_of() -> None:
    """The probability of one output is that of the second class; scores of mse are none."""
    for outputs, loss, classes, names in (
        (3, "softmax_cross_entropy", None, ["p(0)", "p(1)", "p(2)"]),
        (2, "softmax_cross_entropy", ["no", "yes"], ["p(no)", "p(yes)"]),
        (1, "sigmoid_cross_entropy", None, ["p(1)"]),
        (1, "sigmoid_cross_entropy", ["no", "yes"], ["p(yes)"]),
        (3, "sigmoid_cross_entropy", ["a", "b", "c"], ["p(a)", "p(b)", "p(c)"]),
    ):
        model = gb.Model(gb.mlp([2, outputs], loss=loss, backend="cpu"), classes=classes)
        found = columns_of(model, True)
        assert found[-len(names) :] == names
        assert np.atleast_2d(model.probabilities(np.ones((1, 2)))).shape[1] == len(names)
    with pytest.raises(gb.ArgumentError, match="the scores of mse are no probabilities"):
        columns_of(gb.Model(gb.mlp([2, 1], loss="mse", backend="cpu")), True)


@pytest.mark.exhaustive
def test_predictions_take_memory_for_one_batch(tmp_path: Path) -> None:
    """The peak of 300,000 samples, whose text is 40 MB, is that of 3,000 to 20 MB."""
    net = gb.mlp([2, 10], backend="cpu")
    gb.save(tmp_path / "m.safetensors", net)
    code = (
        "import resource, sys\nfrom gpubatch.cli import app\n"
        "try:\n    app()\nexcept SystemExit:\n    pass\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)"
    )
    peaks = []
    for n in (3_000, 300_000):
        np.save(tmp_path / "x.npy", np.ones((n, 2), "float32"))
        arguments = ["predict", str(tmp_path / "m.safetensors"), str(tmp_path / "x.npy"), "--probabilities"]
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, check=True)
        peaks.append(int(done.stderr.split()[-1]))
        assert done.stdout.count(b"\n") == n + 1
    assert peaks[1] - peaks[0] < 20_000


@pytest.mark.exhaustive
def test_a_reader_that_stops_reading_is_no_error(model: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros((20_000, 784), np.uint8))
    command = f"{sys.executable} -m gpubatch predict {model} {tmp_path / 'x.npy'} | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("prediction\n", "")


@pytest.mark.exhaustive
def test_tables_come_by_pipes_and_predictions_go_to_csv(trees: Path) -> None:
    """- is standard input, and any pipe is read whole; --out writes CSV alone."""
    train = gb.read_table("trees.csv", label="species")
    gb.save("m.safetensors", gb.mlp([train.features, train.outputs], backend="cpu"), train)
    wanted = run("predict", "m.safetensors", "new.csv").stdout
    os.mkfifo("pipe")
    writing = threading.Thread(target=lambda: Path("pipe").write_bytes(Path("new.csv").read_bytes()))
    writing.start()
    assert run("predict", "m.safetensors", "pipe", "--out", "/dev/stdout").stdout == wanted
    writing.join()
    text = Path("new.csv").read_text()
    command = [sys.executable, "-m", "gpubatch", "predict", "m.safetensors", "-"]
    assert subprocess.run(command, input=text, capture_output=True, text=True).stdout == wanted
    for name in ("p.json", "p.parquet"):
        with pytest.raises(gb.ArgumentError, match=r"--out writes a CSV file, so it must end in .csv, got .*; --json"):
            check_out(name, [])


def test_predictions_as_json(model: Path, tmp_path: Path) -> None:
    X = np.random.default_rng(0).integers(0, 256, (2000, 784), dtype=np.uint8)
    np.save(tmp_path / "x.npy", X)
    arguments = ["predict", str(model), str(tmp_path / "x.npy"), "--probabilities", "--json"]
    found, loaded = json.loads(run(*arguments).stdout), gb.load(model, backend="cpu")
    assert found["columns"] == ["prediction", "p(cat)", "p(dog)", "p(eel, or such)"]
    assert [row[0] for row in found["rows"]] == loaded.predict(X).tolist()
    np.testing.assert_array_equal(np.array([row[1:] for row in found["rows"]], "float32"), loaded.probabilities(X))
    done = run(*arguments, "--out", str(tmp_path / "p.csv"))
    assert json.loads(done.stdout)["samples"] == 2000
    assert len((tmp_path / "p.csv").read_text().splitlines()) == 2001


OWN = """
import gpubatch as gb

class Half(gb.Layer):
    def takes(self):
        return None
    def needs(self, features):
        return gb.Needs(features)
    def forward(self, x, y, c):
        y[...] = x / 2
    def backward(self, x, y, dy, dx, c):
        if dx is not None:
            dx[...] = dy / 2

if __name__ == "__main__":
    gb.save("own.safetensors", gb.Network([gb.Dense(3, 4), Half(), gb.Dense(4, 2)], "mse", backend="cpu"))
"""


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["own_layers.py", "own_layers"])
def test_layers_of_ones_own_are_imported_only_where_one_says_so(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("own_layers.py").write_text(OWN + "print('was run')\n")
    np.save("x.npy", np.ones((2, 3), "float32"))
    subprocess.run([sys.executable, "own_layers.py"], check=True, capture_output=True)
    refused = run("predict", "own.safetensors", "x.npy", code=2)
    assert "was run" not in refused.stdout
    assert refused.stderr.endswith(
        "layer 2 is __main__:Half, and nothing that a file names is imported by itself; give the module that has it: "
        "--import MODULE\n"
    )
    done = run("predict", "own.safetensors", "x.npy", "--import", name)
    assert re.fullmatch(r"was run\nprediction0,prediction1\n(-?[\d.e-]+,-?[\d.e-]+\n){2}", done.stdout)


@pytest.mark.exhaustive
def test_a_confusion_matrix_is_drawn_and_numbers_have_none(mnist: Path, model: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path, picture = str(tmp_path / "d.safetensors"), tmp_path / "confusion.png"
    run("train", str(mnist), *SMALL, "--save", path)
    done = run("test", path, str(mnist), "--plot", str(picture), COLUMNS="80")
    assert done.stdout.endswith(f"drawn in {picture}\n")
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert max(map(len, done.stdout.splitlines()[1:-1])) <= 80  # but for the paths
    gb.save(tmp_path / "n.safetensors", gb.mlp([784, 1], loss="mse", backend="cpu"))
    wrong = run("test", str(tmp_path / "n.safetensors"), str(mnist), "--plot", str(picture), code=2)
    assert "this model predicts numbers" in wrong.stderr


@pytest.mark.exhaustive
def test_arrays_are_tested_on_what_train_left_out(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    X = rng.normal(size=(200, 3))
    np.save(tmp_path / "x.npy", X)
    np.save(tmp_path / "y.npy", np.where(X[:, 0] > 0, "up", "down"))
    files, path = [str(tmp_path / "x.npy"), str(tmp_path / "y.npy")], str(tmp_path / "m.safetensors")
    options = ["--test-size", "0.25", "--seed", "3"]
    trained = json.loads(run("train", *files, *SMALL, *options, "--save", path, "--json").stdout)
    tested = json.loads(run("test", path, *files, "--held-out", *options, "--json").stdout)
    assert (tested["samples"], tested["accuracy"]) == (50, trained["test_accuracy"])
    assert tested["classes"] == ["down", "up"]
    assert run("summary", path).stdout.count("trained on 150 samples, 50 left out") == 1


# --- examples --------------------------------------------------------------------------------------------------------

EXAMPLES = [line for name in COMMANDS for line in re.findall(r"`(gpubatch [^`]*)`", command_named(name).epilog or "")]


def test_every_command_has_examples_that_are_right() -> None:
    """Their options exist and have values; what they do is tested with the exhaustive tests."""
    assert {line.split()[1] for line in EXAMPLES} == COMMANDS.keys()
    for line in EXAMPLES:
        _, command, *arguments = shlex.split(line)
        command_named(command).make_context(command, arguments)


@pytest.mark.exhaustive
def test_every_example_runs(trees: Path, mnist: Path) -> None:
    """In a folder with the files that they name, on small networks."""
    pytest.importorskip("matplotlib")
    rng = np.random.default_rng(0)
    np.save("X.npy", rng.normal(size=(100, 3)))
    np.save("Y.npy", rng.normal(size=100))
    (trees / "data").mkdir()
    shutil.copytree(mnist, "data/mnist", ignore=lambda folder, names: [n for n in names if "idx" not in n])
    Path("my_layers.py").write_text(OWN)
    subprocess.run([sys.executable, "my_layers.py"], check=True)
    np.save("own.npy", np.ones((2, 3), "float32"))
    run("train", "--epochs", "1", "--layers", "16", "--save", "digits.safetensors")
    for line in sorted(EXAMPLES, key=lambda line: "gpubatch train" not in line):
        _, *arguments = shlex.split(line)
        if "own.safetensors" in line:
            arguments.insert(2, "own.npy")
        if arguments[0] in ("train", "landscape", "sweep"):
            arguments += [] if "--layers" in line else ["--layers", "8"]
        if arguments[0] == "train" or arguments[:2] in (["sweep", "batch-size"], ["sweep", "optimizer"]):
            arguments += [] if "--epochs" in line else ["--epochs", "1"]
        done = run(*arguments)
        assert done.stdout + done.stderr, line
        for word in arguments:
            assert not word.endswith((".png", "predictions.csv")) or Path(word).stat().st_size > 100, line


WRONG: dict[str, tuple[list[str], int, str]] = {
    "no file": (["predict", "none.safetensors", "x.npy"], 1, "No such file"),
    "no data": (["predict", "MODEL", "x.csv"], 2, "DATA must be files or a folder that are there, got 'x.csv'"),
    "usage": (["predict"], 2, "Missing argument"),
    "itself": (["predict", "MODEL", "--out", "MODEL"], 2, "--out must be another file than those that are read"),
    "a folder": (["predict", "MODEL", "--out", "."], 2, "--out must be a file, got the folder '.'"),
    "no folder": (["predict", "MODEL", "--out", "no/p.csv"], 1, "/no/p.csv'"),
    "no module": (["summary", "MODEL", "--import", "not_there"], 2, "--import not_there failed: ModuleNotFoundError"),
    "probabilities": (["test", "MODEL", "--probabilities"], 2, "--probabilities needs --out FILE"),
    "metric": (["test", "MODEL", "--metrics", "f2"], 2, "a metric must be one of"),
    "no model": (["summary", "x.npz"], 2, "MODEL must be a .safetensors file, got 'x.npz'"),
    "name to save": (["train", "--save", "model.npz"], 2, "path must end in .safetensors"),
    "place to save": (["train", "--save", "no/such/folder/model.safetensors"], 1, "a model cannot be saved as"),
}


@every("case", WRONG, fast=["place to save"])
def test_errors_end_with_1_and_wrong_usage_with_2(case: tuple[list[str], int, str], model: Path) -> None:
    arguments, code, message = case
    done = run(*(str(model) if word == "MODEL" else word for word in arguments), code=code)
    assert message in done.stderr
    assert done.stdout == ""
