"""What the command line learns from, and that its options mean the same in every command."""

from __future__ import annotations

import inspect
import json
import math
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import numpy as np
import pytest
import typer
from test_cli import mnist, run

import gpubatch as gb
from gpubatch.cli import COMMANDS, command_named
from gpubatch.cli.arrays import RowsOf
from gpubatch.cli.data import DataOptions, Task, usual_size
from gpubatch.cli.options import BatchOptions, NetworkOptions, OptimizerOptions, RunOptions, spread

__all__ = ["mnist"]


def blobs(n: int = 300, features: int = 4, classes: int = 3, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Classes that are easy to tell apart."""
    rng = np.random.default_rng(seed)
    Y = np.arange(n) % classes
    return rng.normal(size=(n, features)) + 3 * np.eye(classes, features)[Y], Y


# --- the same options in every command -------------------------------------------------------------------------------


OPTIONS = {name: dict(get_type_hints(command_named(name).callback, include_extras=True)) for name in COMMANDS}


def test_the_help_of_all_has_the_first_line_of_each_help() -> None:
    for name, (_, words) in COMMANDS.items():
        assert inspect.cleandoc(command_named(name).help).partition("\n")[0] == words


def test_an_option_has_one_help_text_and_one_type_in_all_commands() -> None:
    seen: dict[str, tuple[str, Any]] = {}
    for command, hints in OPTIONS.items():
        if command == "check-gradient":
            continue  # it has no data but what it draws: --batch-size and --directions are numbers there
        for name, hint in hints.items():
            if hasattr(hint, "__metadata__") and isinstance(info := hint.__metadata__[0], typer.models.OptionInfo):
                kind = hint.__origin__
                first, known = seen.setdefault(name, (command, (kind, info.help, info.param_decls)))
                assert known == (kind, info.help, info.param_decls), f"{name} of {command} and of {first}"
    groups = DataOptions, NetworkOptions, OptimizerOptions, BatchOptions, RunOptions
    shared = {field for group in groups for field in inspect.signature(group).parameters}
    for command in ("train", "batch-size", "landscape", "sweep"):
        assert shared - {"decay"} <= OPTIONS[command].keys(), command


def test_spread_gives_a_command_its_groups_and_defaults() -> None:
    found = {}

    @spread(epochs=3)
    def command(run: RunOptions, more: Annotated[str, "an option"] = "x") -> None:
        found.update(run=run, more=more)

    assert {name: p.default for name, p in inspect.signature(command).parameters.items()} == {
        "epochs": 3,
        "early_stop": None,
        "more": "x",
    }
    command(epochs=7, early_stop=None, more="y")
    assert found == {"run": RunOptions(7), "more": "y"}


@pytest.mark.exhaustive
def test_batch_size_plans_what_train_does(mnist: Path) -> None:
    options = [str(mnist), "--layers", "16", "--class-weight", "balanced", "--samples", "150", "--l2", "0.1"]
    plan = json.loads(run("batch-size", *options, "--json").stdout)
    trained = json.loads(run("train", *options, "--epochs", "1", "--json", "--no-progress").stdout)
    assert plan["plan"]["batch_size"] == trained["batch_size"] == 8
    assert plan["parameters"] == trained["parameters"]
    needed = plan["plan"]["reason"].partition(" of ")[0]
    assert trained["batch_reason"].startswith(needed)  # but for what is there
    assert needed.startswith("auto takes 8 where samples are few, for 19 steps an epoch; it needs")
    given = json.loads(run("batch-size", *options, "--batch-size", "8", "--json").stdout)["plan"]["reason"]
    assert given.startswith("batch_size=8 was given; it needs")
    same = plan["arguments"].keys() & trained["arguments"].keys() - {"epochs"}
    assert {name: plan["arguments"][name] for name in same} == {name: trained["arguments"][name] for name in same}
    assert len(same) > 20


@pytest.mark.parametrize(
    ("samples", "at_most", "size"),
    [(1, 64, 1), (7, 64, 4), (8, 64, 8), (300, 64, 8), (512, 64, 16), (2000, 64, 32), (2000, 16, 16), (1500, 5, 4)],
)
def test_batches_of_small_sets(samples: int, at_most: int, size: int) -> None:
    assert usual_size(samples, at_most) == size


# --- weights and early stopping in the explorers ---------------------------------------------------------------------


def test_whole_weights_are_repetitions() -> None:
    """Every loss of an explorer with weights is that of a set in which a sample comes as often as it weighs."""
    X, Y = (np.ascontiguousarray(array) for array in blobs(40))
    X = X.astype("float32")
    weight = (1 + np.arange(40) % 3).astype("float32")
    again = np.repeat(np.arange(40), weight.astype(int))
    net = gb.mlp([4, 6, 3], seed=1, backend="cpu")

    def explored(*data: Any, **more: Any) -> list[Any]:
        found: list[Any] = [gb.explore.step_size_sweep(net, *data, [0.1, 1.0], **more).losses]
        found.append(gb.loss_slice(net, *data, [-1, 0, 1], seed=3, **more).losses)
        twin = gb.mlp([4, 6, 3], seed=1, backend="cpu")
        found.append(gb.random_local_search(twin, *data, trials=10, scale=0.1, **more).history)
        (trial,) = gb.explore.optimizer_sweep(
            *(net, *data, {"sgd": gb.SGD}, [0.1]), epochs=2, batch_size=len(data[0]), **more
        )
        found.append([*trial.losses, trial.accuracy])
        (batch,) = gb.batch_size_sweep(net, *data, [len(data[0])], epochs=2, **more)
        return [*found, [batch.loss]]

    for weighted, repeated in zip(explored(X, Y, weight=weight), explored(X[again], Y[again]), strict=True):
        np.testing.assert_allclose(weighted, repeated, rtol=2e-5)
    test = gb.explore.learning_rate_range_test(net, X, Y, steps=20, batch_size=40, weight=weight)
    other = gb.explore.learning_rate_range_test(net, X[again], Y[again], steps=20, batch_size=len(again))
    np.testing.assert_allclose(test.losses, other.losses, rtol=2e-4)


def test_runs_side_by_side_stop_early() -> None:
    """At a learning rate of 0 nothing gets better, so a run has one epoch more than the patience."""
    X, Y = blobs(40)
    net = gb.mlp([4, 6, 3], seed=1, backend="cpu")
    (trial,) = gb.explore.optimizer_sweep(
        *(net, X.astype("float32"), Y, {"still": lambda p, lr: gb.SGD(p, 0.0)}, [0.1]),
        epochs=9,
        batch_size=40,
        validation=(X.astype("float32"), Y),
        callbacks=lambda: [gb.EarlyStopping(2)],
    )
    assert len(trial.history.loss) == 3


@pytest.mark.exhaustive
@pytest.mark.parametrize("what", ["step-size", "batch-size", "optimizer", "strategy"])
def test_class_weights_count_in_every_sweep(what: str, tmp_path: Path) -> None:
    X, Y = blobs()
    np.savez(tmp_path / "few.npz", X=X[Y < 2][:120], Y=(np.arange(120) % 4 == 0).astype(int))
    options = {"step-size": [], "batch-size": ["--sizes", "32"], "optimizer": [], "strategy": ["--trials", "5"]}[what]
    options += [] if what == "step-size" else ["--epochs", "1"]
    results = []
    for more in ([], ["--class-weight", "balanced"]):
        found = json.loads(run("sweep", what, str(tmp_path / "few.npz"), *options, *more, "--json").stdout)
        assert found["arguments"]["class_weight"] == (more[-1] if more else None)
        results.append({key: found[key] for key in found.keys() - {"arguments", "versions"}})
    text = [json.dumps(result).replace("seconds", "") for result in results]
    assert text[0] != text[1]


# --- data ------------------------------------------------------------------------------------------------------------


def test_two_arrays_of_numpy(tmp_path: Path) -> None:
    X, Y = blobs()
    np.save(tmp_path / "x.npy", X.reshape(300, 2, 2))
    np.save(tmp_path / "y.npy", np.array(["oak", "elm", "fir"])[Y][:, None])
    found = DataOptions([str(tmp_path / "x.npy"), str(tmp_path / "y.npy")], test_size=0.1).read()
    assert (found.task, found.classes, found.outputs, found.features) == ("classification", ["elm", "fir", "oak"], 3, 4)
    assert (len(found.X), len(found.test[0]), found.scale) == (270, 30, None)
    np.testing.assert_array_equal(np.bincount(found.test[1]), [10, 10, 10])
    rows = {row.tobytes(): name for row, name in zip(X, np.array([2, 0, 1])[Y], strict=True)}
    for x, y in ((found.X, found.Y), found.test):
        assert [rows[row.tobytes()] for row in x] == y.tolist()


def test_an_npz_file_with_a_test_set_of_its_own(tmp_path: Path) -> None:
    """The names of keras.datasets.mnist's file."""
    X, Y = (np.arange(60, dtype=np.uint8).reshape(20, 3), np.arange(20) % 2)
    np.savez(tmp_path / "a.npz", x_train=X[:15], y_train=Y[:15], x_test=X[15:], y_test=Y[15:])
    found = DataOptions([str(tmp_path / "a.npz")], samples=10).read()
    assert (len(found.X), found.scale, found.classes) == (10, 1 / 255, None)
    np.testing.assert_array_equal(found.test[0], X[15:])


def test_of_arrays_with_two_known_names_the_first_is_taken(tmp_path: Path) -> None:
    X, Y = blobs()
    np.savez(tmp_path / "a.npz", X=X, Y=Y, x_train=X + 1, y_train=Y)
    found = DataOptions([str(tmp_path / "a.npz")], samples=10).read()
    assert np.isin(found.X, X).all()


@pytest.mark.parametrize("kind", ["npy", "npz"])
def test_large_arrays_are_read_by_place(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The samples, their split, and what is standardised are those of arrays in memory."""
    X, Y = blobs(400)
    X[:, 1] = 50 * X[:, 1] + 900
    np.save(tmp_path / "x.npy", X)
    np.save(tmp_path / "y.npy", Y)
    np.savez(tmp_path / "a.npz", X=X, Y=Y)
    data = [str(tmp_path / name) for name in (["x.npy", "y.npy"] if kind == "npy" else ["a.npz"])]
    held = DataOptions(data, standardize=True).read()
    monkeypatch.setattr("gpubatch.cli.arrays.is_large", lambda size: size > 2000)
    found = DataOptions(data, standardize=True).read()
    assert isinstance(found.X, RowsOf)
    assert (len(found.X), found.features, found.classes) == (320, 4, held.classes)
    order = np.random.default_rng(0).permutation(320)
    np.testing.assert_array_equal(found.X.read(order), held.X[order])
    np.testing.assert_array_equal(found.X.read(np.arange(320)), held.X)
    for ours, theirs in ((found.test[0].read(np.arange(80)), held.test[0]), (found.Y, held.Y)):
        np.testing.assert_array_equal(ours, theirs)
    assert found.prepare is not None
    np.testing.assert_allclose(found.prepare.mean, held.X.mean(axis=0))
    np.testing.assert_allclose(found.prepare.deviation, held.X.std(axis=0))
    net = gb.mlp([4, 3], backend="cpu")
    loader = found.loader(net, BatchOptions("64"), 0)
    assert loader.window > 0
    x = np.concatenate([x for x, _ in loader])
    np.testing.assert_allclose([x.mean(axis=0), x.std(axis=0)], [[0] * 4, [1] * 4], atol=1e-5)
    assert isinstance(DataOptions(data, samples=20).read().X, np.ndarray)


def test_columns_that_are_far_from_unit_scale_are_told(tmp_path: Path) -> None:
    X, Y = blobs()
    X[:, 2] = X[:, 2] * 300 + 7
    np.savez(tmp_path / "a.npz", X=X, Y=Y)
    words = (
        r"1 of 4 columns are far from mean 0 and deviation 1 \(column 2 has mean .* and deviation .*\): --standardize"
    )
    assert re.fullmatch(words, DataOptions([str(tmp_path / "a.npz")]).read().unscaled)
    assert DataOptions([str(tmp_path / "a.npz")], standardize=True).read().unscaled == ""
    np.savez(tmp_path / "a.npz", X=X[:, :2], Y=Y)
    assert DataOptions([str(tmp_path / "a.npz")]).read().unscaled == ""
    with pytest.raises(gb.ArgumentError, match="--standardize is for arrays, and DATA is none"):
        DataOptions(standardize=True).read()
    np.savez(tmp_path / "a.npz", X=X + 1.6e9, Y=Y)
    found = DataOptions([str(tmp_path / "a.npz")], standardize=True).read()
    with pytest.raises(gb.ArgumentError, match=r"column 0 has mean 1\.6e\+09 .* or give --dtype float64"):
        found.loader(gb.mlp([4, 3], backend="cpu"), BatchOptions("8"), 0)
    found.loader(gb.mlp([4, 3], backend="cpu", dtype="float64"), BatchOptions("8"), 0)


@pytest.mark.exhaustive
def test_standardised_arrays_from_the_shell(tmp_path: Path) -> None:
    """train tells of columns, and keeps means with the model; predict and test use them; a packed file is refused."""
    X, Y = blobs(600)
    X = X * [1, 1e4, 1e-3, 50] + [0, 5e4, 0, 900]
    np.save(tmp_path / "x.npy", X)
    np.save(tmp_path / "y.npy", Y)
    paths = [str(tmp_path / "x.npy"), str(tmp_path / "y.npy")]
    options = ["--layers", "16", "--epochs", "5", "--save", str(tmp_path / "m.safetensors"), "--json", "--no-progress"]
    plain = run("train", *paths, *options)
    assert "note: 3 of 4 columns are far from mean 0 and deviation 1 (column 1 has mean" in plain.stderr
    done = run("train", *paths, *options, "--standardize")
    assert done.stderr == ""
    trained = json.loads(done.stdout)
    assert trained["test_accuracy"] > 0.9
    held = json.loads(run("test", str(tmp_path / "m.safetensors"), *paths, "--held-out", "--json").stdout)
    assert held["accuracy"] == trained["test_accuracy"]
    predicted = run("predict", str(tmp_path / "m.safetensors"), paths[0]).stdout.split()[1:]
    assert np.mean(np.array(predicted, int) == Y) > 0.9


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", ["npy", "npz"])
def test_an_array_larger_than_the_address_space_trains(kind: str, tmp_path: Path) -> None:
    """A file of 1.4 GB, most of it holes, in an address space of 1.2 GB."""
    if not sys.platform.startswith("linux"):
        pytest.skip("RLIMIT_AS is Linux's")
    n, width = 700_000, 500
    X = np.lib.format.open_memmap(tmp_path / "x.npy", "w+", np.float32, (n, width))
    X[:: n // 1000] = 1
    del X
    np.save(tmp_path / "y.npy", np.arange(n, dtype=np.int32) % (n // 1000) == 0)
    data = [str(tmp_path / "x.npy"), str(tmp_path / "y.npy")]
    if kind == "npz":
        with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
            archive.write(data[0], "X.npy")
            archive.write(data[1], "Y.npy")
        data = [str(tmp_path / "a.npz")]
    options = ["--layers", "", "--epochs", "1", "--batch-size", "8192", "--json", "--no-progress", "--standardize"]
    code = (
        "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_AS, (1200 * 2**20,) * 2)\n"
        "sys.argv[0] = 'gpubatch'; runpy.run_module('gpubatch', run_name='__main__')"
    )
    alone = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2", "GPUBATCH_BACKEND": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", code, "train", *data, *options],
        capture_output=True,
        text=True,
        env={**os.environ, **alone},
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["test_loss"] < 0.1


def test_targets_by_task(tmp_path: Path) -> None:
    X, _ = blobs(20)
    floats, ints, several = np.linspace(0, 1, 20), 5 + np.arange(20) % 2 * 4, np.ones((20, 2))
    for Y, task, expected in (
        (floats, "auto", ("regression", None, 1)),
        (ints, "auto", ("classification", [5, 9], 2)),
        (ints.astype(float), "auto", ("regression", None, 1)),
        (ints.astype(float), "classification", ("classification", [5, 9], 2)),
        (ints, "regression", ("regression", None, 1)),
        (several, "auto", ("regression", None, 2)),
        (np.arange(20) % 2 == 0, "auto", ("classification", None, 2)),
    ):
        np.savez(tmp_path / "a.npz", X=X, Y=Y)
        found = DataOptions([str(tmp_path / "a.npz")], task=task).read()
        assert (found.task, found.classes, found.outputs) == expected


@pytest.mark.exhaustive
def test_regression_reports_r2(tmp_path: Path) -> None:
    X, _ = blobs(400)
    np.savez(tmp_path / "a.npz", X=X, Y=X @ [1.0, -1.0, 0.5, 2.0] / 3)
    options = ["train", str(tmp_path / "a.npz"), "--layers", "16", "--dropout", "0", "--epochs", "20", "--no-progress"]
    found = json.loads(run(*options, "--json").stdout)
    assert found["arguments"]["loss"] == "mse"
    assert found["test_r2"] == found["history"]["metrics"]["r2"][-1] > 0.9
    assert found["test_accuracy"] is None
    assert f"test loss {found['test_loss']:.4f}, R² {found['test_r2']:.4f}, in " in run(*options).stdout


WRONG = {
    "lengths": (
        {"X": np.ones((5, 2)), "Y": np.arange(4) % 2},
        [],
        1,
        "expected a target for each sample, found 5 and 4",
    ),
    "names": ({"A": np.ones((5, 2))}, [], 1, "expected arrays X and Y, or x_train, y_train, .*; found A"),
    "one class": ({"X": np.ones((5, 2)), "Y": np.zeros(5, int)}, [], 2, "must have at least two classes, got 1"),
    "one label": ({"X": np.ones((5, 2)), "Y": np.ones(1, int)}, [], 1, "a target for each sample, found 5 and 1"),
    "one-hot": (
        {"X": np.ones((4, 2)), "Y": np.eye(2)[[0, 1, 1, 0]]},
        [],
        2,
        r"of shape \(4, 2\), have one 1 in each row, as classes have: give their labels, Y.argmax\(axis=1\), or",
    ),
    "objects": (
        {"X": np.ones((2, 2)), "Y": np.array(["a", "b"], object)},
        [],
        1,
        r"found objects, which NumPy pickles; save X.astype\(str\)",
    ),
    "fractions": (
        {"X": np.ones((5, 2)), "Y": np.ones(5) / 3},
        ["--task", "classification"],
        2,
        "numbers with fractions",
    ),
    "text": (
        {"X": np.ones((2, 2)), "Y": np.array(["a", "b"])},
        ["--task", "regression"],
        2,
        "that are numbers, got text",
    ),
    "weights": ({"X": np.ones((5, 2)), "Y": np.ones(5)}, ["--class-weight", "balanced"], 2, "is for classes"),
    "loss": ({"X": np.ones((5, 2)), "Y": np.ones(5)}, ["--loss", "svm"], 2, "--loss must be one of mse, .*got 'svm'"),
    "few": ({"X": np.ones((3, 2)), "Y": np.ones(3)}, ["--test-size", "0.1"], 2, "of 3 samples leaves 0 to"),
    "none": ({"X": np.ones((5, 2)), "Y": np.full(5, math.nan)}, ["--no-progress"], 1, "must be finite"),
}


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", [*WRONG])
def test_wrong_data_is_told_in_one_line(name: str, tmp_path: Path) -> None:
    arrays, options, code, message = WRONG[name]
    np.savez(tmp_path / "a.npz", **arrays)
    done = run("train", str(tmp_path / "a.npz"), *options, code=code)
    assert done.stderr.count("\n") == 1
    assert re.search(message, done.stderr), done.stderr


def test_arrays_that_are_swapped_are_told(tmp_path: Path) -> None:
    X, Y = tmp_path / "x.npy", tmp_path / "y.npy"
    np.save(X, np.ones((20, 3)))
    np.save(Y, np.arange(20) % 2)
    with pytest.raises(
        gb.ArgumentError, match=r"samples first: .*y.npy has shape \(20,\).*; give \S*x.npy \S*y.npy, or"
    ):
        DataOptions([str(Y), str(X)]).read()
    np.save(Y, np.linspace(0, 1, 20)[:, None])  # one number a sample, and three outputs
    assert DataOptions([str(Y), str(X)]).read().outputs == 3


@pytest.mark.exhaustive
def test_damaged_arrays_are_exit_code_1(tmp_path: Path) -> None:
    (tmp_path / "x.npy").write_bytes(b"no array")
    np.save(tmp_path / "y.npy", np.array([{}], object), allow_pickle=True)
    (tmp_path / "a.npz").write_bytes(b"PK no archive")
    for files in (["x.npy", "x.npy"], ["y.npy", "y.npy"], ["a.npz"]):
        done = run("train", *(str(tmp_path / name) for name in files), code=1)
        assert "expected NumPy's arrays of numbers or text, found" in done.stderr


def test_the_explorers_take_weights_of_classes(mnist: Path) -> None:
    task = Task.of(DataOptions([str(mnist)], class_weight="balanced"), NetworkOptions("", backend="cpu"))
    expected = len(task.Y) / (10 * np.bincount(task.Y))  # scikit-learn's
    np.testing.assert_allclose(task.weight, expected[task.Y], rtol=1e-6)
    assert Task.of(DataOptions([str(mnist)]), NetworkOptions("", backend="cpu")).weight is None
