"""``gpubatch`` under mpiexec: one run, one display, one file, and an end for all."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from many_ranks import mpi

from gpubatch.__main__ import main
from gpubatch.checkpoint import read

COMMAND = "import sys; from gpubatch.__main__ import main; sys.argv[0] = 'gpubatch'; main()"
TRAIN = ("train", "--samples", "600", "--batch-size", "64", "--layers", "32", "--no-progress")


def gpubatch(size: int, *arguments: object, check: bool = True) -> Any:
    return mpi(size, COMMAND, *arguments, check=check)


def parameters(folder: Path) -> dict[str, np.ndarray]:
    """Those of the newest checkpoint."""
    found: dict[str, np.ndarray] = read(sorted(folder.glob("checkpoint-*"))[-1])["network"]["parameters"]
    return found


@pytest.mark.exhaustive
def test_a_run_of_4_goes_on_as_2_and_1_and_has_the_bits_of_one(tmp_path: Path) -> None:
    where, files = tmp_path / "run", [tmp_path / name for name in ("model.safetensors", "log.csv", "curve.png")]
    outputs = "--save", files[0], "--log", files[1], "--plot", files[2]
    for size, epochs, more in ((4, 2, ()), (2, 3, ("--resume",)), (1, 4, ("--resume",))):
        done = gpubatch(size, *TRAIN, "--epochs", epochs, "--decay", "none", "--checkpoint", where, *outputs, *more)
        assert done.stdout.count("test accuracy") == 1
        assert done.stdout.count("batches in 8 parts") == (size > 1)
    assert all(path.stat().st_size for path in files)
    assert len(files[1].read_text().splitlines()) == 5
    alone = tmp_path / "alone"
    gpubatch(1, *TRAIN, "--epochs", 4, "--decay", "none", "--checkpoint", alone, "--shards", 8)
    own, other = parameters(where), parameters(alone)
    assert all(own[name].tobytes() == other[name].tobytes() for name in own)


@pytest.mark.exhaustive
def test_one_process_prints_the_json(tmp_path: Path) -> None:
    found = json.loads(gpubatch(2, *TRAIN, "--epochs", 1, "--json").stdout)
    assert found["history"]["batch_size"] == 64
    info = json.loads(gpubatch(2, "info", "--json").stdout)
    assert (info["ranks"]["size"], len(info["ranks"]["devices"])) == (2, 2)
    assert "2 processes, connected by" in gpubatch(2, "info").stdout


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("landscape",), 2, "error: gpubatch landscape is for one process, and a launcher started 2"),
        (("train", "--lr", "-1"), 2, "error: lr must be"),
        (("train", "nowhere.csv", "--label", "y"), 2, "nowhere.csv"),
        (("train", "--shards", "3"), 2, "error: shards must be a power of two times the 2 ranks"),
        (("train", "--nonsense"), 2, "No such option: --nonsense"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_an_error_is_told_once(arguments: tuple[str, ...], code: int, words: str) -> None:
    done = gpubatch(2, *arguments, check=False)
    assert done.returncode == code
    assert done.stderr.count(words) == 1
    assert done.stdout.count("Usage") == 0


def test_a_launcher_without_mpi4py_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each process would train by itself."""
    monkeypatch.setenv("PMI_SIZE", "2")
    monkeypatch.setenv("PMI_RANK", "0")
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    monkeypatch.setattr(sys, "argv", ["gpubatch", "train"])
    with pytest.raises(SystemExit, match="1"):
        main()
    told = capsys.readouterr().err
    assert told.startswith("error: a launcher started 2 processes")
    assert "pip install 'gpubatch[parallel]'" in told
