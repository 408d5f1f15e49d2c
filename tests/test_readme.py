"""The README's examples, and those of the page for PyTorch, run as they stand, one after another."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from needs import file_library, peer
from stand_in import queued_backend
from stand_in_lt import StandInLt

import gpubatch

README = (Path(__file__).parent.parent / "README.md").read_text()
DOCS = Path(__file__).parent.parent / "docs"
FROM_PYTORCH = (DOCS / "from-pytorch.md").read_text()
NOT_HERE = {"ASGD", "Adafactor", "LBFGS", "Muon", "Rprop", "SparseAdam"}  # of torch.optim


def blocks(language: str, page: str = README) -> list[str]:
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    return [text for kind, text in fenced if kind == language]


def test_the_python_blocks_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("GPUBATCH_BACKEND", "cpu")
    monkeypatch.chdir(tmp_path)
    space: dict[str, object] = {}
    for block in blocks("python"):
        exec(block, space)
    first, second = capsys.readouterr().out.splitlines()
    assert float(first) >= 0.95
    assert second.startswith("128 ")


def stand_in() -> Any:
    device = queued_backend("late")
    device.cupy.nvmath = StandInLt(device.cupy)
    return device


def test_the_block_for_a_gpu_runs_on_a_stand_in(capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = blocks("py")
    device = stand_in()
    (X, Y), _ = gpubatch.datasets.mnist_10k()
    # Few samples and units: an emulated grid is slow.
    small = (
        block.replace("256", "16").replace("128", "8").replace('"cuda"', "device").replace("=2)", "=2, progress=False)")
    )
    exec(small, {"gb": gpubatch, "X": X[:32], "Y": Y[:32], "device": device})
    assert capsys.readouterr().out == "captured\n"
    assert device.cupy.faults == []


def test_the_loop_for_a_gpu_runs_on_a_stand_in(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (block,) = blocks("py", (DOCS / "guide" / "gpu.md").read_text())
    device = stand_in()
    monkeypatch.setattr(gpubatch, "get_backend", lambda spec: {"cuda": device}[spec])
    (X, Y), _ = gpubatch.datasets.mnist_10k()
    monkeypatch.setattr(gpubatch.datasets, "mnist_10k", lambda: ((X[:100], Y[:100]), None))
    exec(block.replace("256", "16").replace("128", "32"), {})
    (loss,) = re.findall(r"[\d.]+", capsys.readouterr().out)
    assert 0 < float(loss) < 5
    assert (device.cupy.graph_launches, device.cupy.faults) == (3, [])


def test_the_block_for_pytorch_trains_its_model() -> None:
    torch = peer("torch")
    torch.manual_seed(0)
    block = next(block for block in blocks("python3") if "torch" in block)
    (X, Y), _ = gpubatch.datasets.mnist_10k()
    space: dict[str, object] = {"gb": gpubatch, "X": X, "Y": Y}
    exec(block, space)
    scores = space["model"](torch.from_numpy(X[:2000].astype("float32") / 255))  # type: ignore[operator]
    assert (scores.argmax(1).numpy() == Y[:2000]).mean() > 0.85


def test_the_block_of_tables_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pyarrow, csv = file_library("pyarrow"), file_library("pyarrow.csv")
    block = next(block for block in blocks("python3") if "read_table" in block)
    assert len([line for line in block.splitlines() if line]) <= 8
    rng = np.random.default_rng(0)
    kinds = rng.integers(0, 4, 400)
    values = 2.0 * kinds[:, None] + rng.normal(size=(400, 3))
    columns = dict(zip("abc", np.where(rng.random((400, 3)) < 0.03, np.nan, values).T, strict=True))
    monkeypatch.chdir(tmp_path)
    csv.write_csv(
        pyarrow.table({**columns, "species": np.array(["oak", "ash", "elm", "fir"])[kinds].tolist()}), "trees.csv"
    )
    csv.write_csv(pyarrow.table(columns), "new.csv")
    space: dict[str, object] = {"gb": gpubatch}
    exec(block, space)
    model, test = gpubatch.load("trees.safetensors"), space["test"]
    assert np.trace(model.confusion_matrix(test)) > 0.8 * len(test)  # type: ignore[arg-type]


def test_the_block_for_scikit_learn_trains_its_model() -> None:
    peer("sklearn")
    block = next(block for block in blocks("python3") if "MLPClassifier" in block)
    (X, Y), _ = gpubatch.datasets.mnist_10k()
    space: dict[str, Any] = {"X": X[:500], "Y": Y[:500]}
    exec(block.replace("256", "32"), space)
    assert space["model"].score(X[500:1500] / 255, Y[500:1500]) > 0.75


def test_the_blocks_of_the_page_for_pytorch_run() -> None:
    peer("torch")
    space: dict[str, object] = {}
    for block in blocks("python", FROM_PYTORCH):
        exec(block, space)


def test_the_page_for_pytorch_pairs_optimizers_that_do_the_same() -> None:
    torch = peer("torch")
    ours = importlib.import_module("gpubatch.torch")
    rows = re.findall(r"^\| `(\w+\(p[^`]*\))` \| `(\w+\(p[^`]*\))` \|$", FROM_PYTORCH, re.MULTILINE)
    theirs = {name for name, kind in vars(torch.optim).items() if isinstance(kind, type)} - {"Optimizer", *NOT_HERE}
    assert {row.partition("(")[0] for row, _ in rows} == theirs
    assert all(name in FROM_PYTORCH for name in ours.__all__)
    for row in rows:
        found = []
        for text, names in zip(row, (vars(torch.optim), vars(ours)), strict=True):
            p = torch.linspace(-1, 1, 7, dtype=torch.float64).requires_grad_()
            opt = eval(text, dict(names), {"p": [p]})
            for step in range(10):
                p.grad = torch.cos(p.detach() * 3 + step)
                opt.step()
            found.append(p.detach())
        torch.testing.assert_close(*found, rtol=1e-6, atol=1e-9, msg=lambda words, row=row: f"{row}: {words}")


def test_the_first_two_shell_blocks_are_the_ones_that_are_run_by_machines() -> None:
    first, second = blocks("sh")
    assert "gpubatch train" in first
    assert second.strip().splitlines()[-1].split()[0] == "pytest"


def test_the_kernel_that_is_shown_is_the_one_that_is_made() -> None:
    space: dict[str, Any] = {"gb": gpubatch, "net": gpubatch.mlp([2, 2], backend="cpu")}
    exec(next(block for block in blocks("python") if "@gb.rule" in block), space)
    shown = next(block for block in blocks("") if "v_new" in block)
    assert len(shown.splitlines()) == 2
    for line in shown.splitlines():
        assert line in space["clipped_momentum"].trace().c


def test_it_has_at_most_150_lines() -> None:
    assert len(README.splitlines()) <= 150


def test_every_option_that_is_shown_exists() -> None:
    pytest.importorskip("typer")
    from gpubatch.cli import command_named

    lines = [line for block in blocks("") for line in block.splitlines() if line.startswith("gpubatch ")]
    assert len(lines) == 3
    for line in lines:
        _, command, *words = shlex.split(line, comments=True)
        known = {option for p in command_named(command).params for option in p.opts}
        assert {word for word in words if word.startswith("--")} <= known, line


def test_every_name_that_is_shown_exists() -> None:
    for name in set(re.findall(r"\bgb\.(\w+)", README)):
        assert hasattr(gpubatch, name), name
