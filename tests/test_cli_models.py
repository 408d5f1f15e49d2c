"""``gpubatch train --save``, ``predict`` and ``summary``, as a person types them."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from families import every
from test_cli import SMALL, idx, mnist, run

import gpubatch as gb

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
        "cat, dog",
        "written by gpubatch",
    ):
        assert part in text
    found = json.loads(run("summary", str(model), "--json").stdout)
    assert found["classes"] == ["cat", "dog", "eel, or such"]
    assert found["preparation"]["scale"] == pytest.approx(1 / 255)
    assert found["network"]["parameters"] == 784 * 8 + 8 + 8 * 3 + 3


WRONG: dict[str, tuple[list[str], int, str]] = {
    "no file": (["predict", "none.safetensors", "x.npy"], 1, "No such file"),
    "no data": (["predict", "MODEL", "x.csv"], 2, "DATA must be a .npy file, an IDX file or a folder"),
    "usage": (["predict", "MODEL"], 2, "Missing argument"),
    "no model": (["summary", "x.npz"], 2, "path must end in .safetensors"),
    "name to save": (["train", "--save", "model.npz"], 2, "path must end in .safetensors"),
    "place to save": (["train", "--save", "no/such/folder/model.safetensors"], 1, "a model cannot be saved as"),
}


@every("case", WRONG, fast=["place to save"])
def test_errors_end_with_1_and_wrong_usage_with_2(case: tuple[list[str], int, str], model: Path) -> None:
    arguments, code, message = case
    done = run(*(str(model) if word == "MODEL" else word for word in arguments), code=code)
    assert message in done.stderr
    assert done.stdout == ""
