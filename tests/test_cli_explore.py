"""check-gradient, landscape and sweep as a person types them."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from families import every
from test_cli import mnist, run  # noqa: F401  # mnist is a fixture

from gpubatch.cli.data import DataOptions, Task
from gpubatch.cli.gradients import CHECKED, WITH_EVERY_LAYER
from gpubatch.cli.options import BatchOptions, NetworkOptions, RunOptions
from gpubatch.cli.strategies import compare_strategies
from gpubatch.nn import layers, losses

SMALL = ["--layers", "8", "--seed", "1"]


def result(*arguments: str) -> Any:
    return json.loads(run(*arguments, "--json").stdout)


def test_every_layer_and_loss_is_checked() -> None:
    found = result("check-gradient")
    assert found["ok"] is True
    assert found["max_relative_error"] <= 1e-7
    assert list(found["checks"]) == list(CHECKED)
    kinds = {x for x in vars(layers).values() if isinstance(x, type) and issubclass(x, layers.Layer)}
    others = {layers.Layer, layers.ActivationLayer, layers.DenseActivation, layers.Elementwise}
    assert {type(make(3)) for make in CHECKED.values()} == kinds - others
    for name, row in found["checks"].items():
        assert list(row) == (list(losses.LOSSES) if name == "Tanh" else list(WITH_EVERY_LAYER))
        for checks in row.values():
            assert all(check["ok"] and check["compared"] for check in checks.values())


def test_the_table_of_gradients() -> None:
    done = run("check-gradient", "--directions", "2")
    assert re.search(r"BatchNorm( +\d\.\de[-+]\d\d){4}", done.stdout)
    assert re.search(r"squared_hinge +\d\.\de[-+]\d\d *\n", done.stdout)
    assert "all 220 gradients are right to 1e-07 relative; 440 compared, 0 on a kink; cpu" in done.stdout
    assert done.stderr == ""  # no bar where there is no terminal


def test_a_wrong_gradient_is_named_and_is_exit_code_1(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "from gpubatch.nn.layers import DenseActivation\n"
        "right = DenseActivation.backward\n"
        "def backward(self, x, y, dy, dx, c):\n"
        "    if self.function.declared.name == 'tanh': dy *= 1 + y\n"
        "    right(self, x, y, dy, dx, c)\n"
        "DenseActivation.backward = backward\n"
    )
    path = os.pathsep.join([str(tmp_path), *sys.path])
    done = run("check-gradient", code=1, PYTHONPATH=path)
    assert re.search(r"Tanh( +\d\.\de[-+]\d\d WRONG){4}", done.stdout)
    assert re.search(r"WRONG: Tanh, svm: W1\[\d, \d\] is [-\d.]+, by differences [-\d.]+\n", done.stdout)
    assert "30 of 220 gradients are wrong" in done.stdout


def test_a_landscape_with_its_path(mnist: Path, tmp_path: Path) -> None:  # noqa: F811
    pytest.importorskip("matplotlib")
    file = tmp_path / "plane.png"
    options = ["landscape", str(mnist), *SMALL, "--points", "7", "--batch-size", "50", "--evaluated", "200"]
    found = result(*options, "--plot", str(file))
    grid, path = np.array(found["losses"]), np.array(found["path"])
    assert grid.shape == (7, 7)
    assert path[-1] == pytest.approx([0, 0])
    assert np.abs(path).max(axis=0) == pytest.approx([1, 1])
    assert found["a"][0] < path[:, 0].min() <= path[:, 0].max() < found["a"][-1]
    assert grid.min() < found["center"] * 1.2
    assert file.read_bytes().startswith(b"\x89PNG")
    done = run(*options)
    assert f"loss at the network {found['center']:.4f}, lowest of 49 points {grid.min():.4f}" in done.stdout


@pytest.mark.parametrize("directions", ["random", "filter"])
def test_a_slice_of_an_untrained_network(directions: str, mnist: Path, tmp_path: Path) -> None:  # noqa: F811
    pytest.importorskip("matplotlib")
    file = tmp_path / "line.svg"
    shape = ["--dimensions", "1", "--points", "5", "--span", "0.5", "--directions", directions, "--epochs", "0"]
    found = result("landscape", str(mnist), *SMALL, *shape, "--plot", str(file))
    assert found["a"] == [-0.5, -0.25, 0, 0.25, 0.5]
    assert found["b"] is None
    assert found["losses"][2] == pytest.approx(found["center"], rel=1e-5)
    assert "loss L(W + a W1)" not in found
    assert "<svg" in file.read_text()


SWEEPS = {
    "step-size": [],
    "batch-size": ["--sizes", "50,64", "--epochs", "2", "--target", "2.0"],
    "optimizer": ["--epochs", "1", "--batch-size", "50"],
    "strategy": ["--trials", "5", "--epochs", "2", "--loss", "svm", "--batch-size", "50"],
}


@every("what", [*SWEEPS], ["batch-size"])
def test_sweeps_print_a_table_and_draw(what: str, mnist: Path, tmp_path: Path) -> None:  # noqa: F811
    pytest.importorskip("matplotlib")
    file = tmp_path / "sweep.png"
    done = run("sweep", what, str(mnist), *SMALL, *SWEEPS[what], "--plot", str(file))
    assert done.stdout.startswith(f"gpubatch sweep {what}, 300 samples\n784-8-10, s")
    assert done.stdout.endswith(f"drawn in {file}\n")
    assert done.stderr == ""
    assert file.read_bytes().startswith(b"\x89PNG")
    assert int.from_bytes(file.read_bytes()[16:20], "big") == 800  # pixels wide


def test_a_step_size_is_suggested(mnist: Path) -> None:  # noqa: F811
    found = result("sweep", "step-size", str(mnist), *SMALL)
    steps, test = found["step_sizes"], found["range_test"]
    assert steps["step_sizes"][:10] == [float(f"1e{k}") for k in range(-10, 0)]
    assert min(steps["losses"]) < steps["start"] < max(steps["losses"])
    assert test["suggestion"] in [float(f"{rate / 10:.2g}") for rate in test["rates"]]
    text = run("sweep", "step-size", str(mnist), *SMALL).stdout
    assert f"suggested learning rate for SGD: {test['suggestion']:g}: the smoothed cost is lowest" in text
    assert f"one step on the whole set: {steps['reason']}" in text


def test_batch_sizes_are_compared(mnist: Path) -> None:  # noqa: F811
    arguments = ["sweep", "batch-size", str(mnist), *SMALL, "--sizes", "20,300", "--epochs", "3", "--target", "2.0"]
    found = result(*arguments)["batch_sizes"]
    assert [trial["batch_size"] for trial in found] == [20, 300]
    assert found[0]["seconds_to_target"] > 0
    assert found[1]["seconds_to_target"] is None
    assert re.search(r"\n 20 .* [KM]iB .*\n 300 .* – .* – .*[KM]iB", run(*arguments).stdout)
    assert "no batch size reached the loss 1e-06 in 1 epochs" in run(*arguments[:-3], "1", "--target", "1e-6").stdout


def test_the_strategies_rank_as_in_the_notes() -> None:
    """Random search < random local search < gradient descent, on the digits; takes some seconds."""
    task = Task.of(DataOptions(samples=2000), NetworkOptions("", loss="svm", backend="cpu"))
    seen = list[tuple[int, int]]()
    found = compare_strategies(
        *(task, 200, 0.01, 0.01), RunOptions(5), BatchOptions("128"), lambda done, total: seen.append((done, total))
    )
    accuracies = [result.test_accuracy or 0.0 for result in found]
    assert [result.name for result in found] == ["random search", "local search", "gradient descent"]
    assert accuracies == sorted(accuracies)
    assert 0.1 < accuracies[0] < accuracies[1] - 0.1 < accuracies[2] - 0.2
    assert (seen[0], seen[-1]) == ((0, 405), (405, 405))
    assert seen == sorted(seen)


def test_optimizers_and_strategies_are_compared(mnist: Path) -> None:  # noqa: F811
    found = result("sweep", "optimizer", str(mnist), *SMALL, *SWEEPS["optimizer"])["optimizers"]
    assert [trial["name"] for trial in found] == ["sgd", "momentum", "rmsprop", "adam"]
    assert all(trial["loss"] == min(x for x in trial["losses"] if x is not None) for trial in found)
    found = result("sweep", "strategy", str(mnist), *SMALL, "--trials", "50", "--batch-size", "20")["strategies"]
    accuracy = {strategy["name"]: strategy["test_accuracy"] for strategy in found}
    assert accuracy["gradient descent"] > max(accuracy["random search"], accuracy["local search"])


ERRORS = {
    "what": (["sweep", "stepsize"], "error: WHAT must be one of 'step-size', .*; did you mean 'step-size'?"),
    "of others": (
        ["sweep", "step-size", "--early-stop", "3"],
        "error: --early-stop is for sweep batch-size and optimizer and strategy, not for step-size",
    ),
    "weights of numbers": (
        ["sweep", "step-size", "--task", "regression", "--class-weight", "balanced"],
        "error: --task regression needs targets that are numbers, the images have labels",
    ),
    "sizes": (["sweep", "batch-size", "--sizes", "8,x"], "error: --sizes must be made of integers, got 'x'"),
    "size": (["sweep", "batch-size", "--sizes", "0"], "error: sizes must be an integer between 1 and 8000, got 0"),
    "target": (["sweep", "batch-size", "--target", "-1"], "error: target must be finite and in"),
    "scale": (["sweep", "strategy", "--scale", "0"], "error: scale must be finite and in"),
    "loss": (
        ["sweep", "optimizer", "--loss", "mse"],
        "error: --loss must be one of softmax_cross_entropy, svm, crammer_singer, softmax_focal here, got 'mse'",
    ),
    "optimizer": (["sweep", "optimizer", "--optimizer", "adam"], "error: --optimizer is for sweep step-size and batch"),
    "plot": (["sweep", "optimizer", "--plot", "a.gif"], "error: the plot file must end in .png"),
    "directions": (["landscape", "--directions", "pth"], "error: --directions must be one of .*did you mean 'path'"),
    "no path": (["landscape", "--epochs", "0"], "error: --directions path needs --epochs of at least 1, got 0"),
    "short path": (["landscape", "--epochs", "1", "--batch-size", "8000"], "error: .* more than 2 steps of .*, got 1"),
    "span": (["landscape", "--span", "0"], "error: --span must be a number above 0, got 0"),
    "h": (["check-gradient", "--h", "-1"], "error: h must be finite and in"),
    "backend": (["check-gradient", "--backend", "gpu"], "error: backend must be 'auto', 'cpu', 'cuda', 'cuda:N'"),
    "folder": (["landscape", "nowhere"], "error: DATA must be files or a folder that are there, got 'nowhere'"),
}


@every("name", [*ERRORS], ["span", "folder"])
def test_errors_are_one_line(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments, message = ERRORS[name]
    monkeypatch.chdir(tmp_path)
    done = run(*arguments, code=2)
    assert re.match(message, done.stderr), done.stderr
    assert done.stderr.count("\n") == 1


@every("command", ["check-gradient", "landscape", "sweep"], ["sweep"])
def test_help_has_an_example_and_the_options_of_all(command: str) -> None:
    text = " ".join(run(command, "--help").stdout.split())
    assert f": gpubatch {command}" in text.partition("Examples")[2]
    assert all(option in text for option in ("--backend", "--json", "--seed"))
    assert command in run("--help").stdout


def test_there_is_a_bar_in_a_terminal() -> None:
    reader, writer = pty.openpty()
    done = subprocess.Popen(
        [sys.executable, "-m", "gpubatch", "check-gradient", "--features", "12"],
        stdout=subprocess.DEVNULL,
        stderr=writer,
        env={**os.environ, "GPUBATCH_BACKEND": "cpu", "TERM": "xterm"},
    )
    os.close(writer)
    shown = b""
    with os.fdopen(reader, "rb", 0) as terminal:
        try:
            while piece := terminal.read(4096):
                shown += piece
        except OSError:  # Linux: the other end was closed
            pass
    assert done.wait(timeout=120) == 0
    assert b"gradients" in shown
    assert b"%" in shown
