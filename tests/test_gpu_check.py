"""The script that measures a GPU, as far as it goes without one: there it must not fail for a typing error."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import gpubatch as gb

SCRIPT = Path(__file__).resolve().parent.parent / "bench" / "gpu_check.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(("name", "rows"), [("optimizers", 4), ("steps", 4), ("steps in TF32", 1), ("epochs", 1)])
def test_a_section_is_rehearsed(name: str, rows: int) -> None:
    done = run("--rehearse", "--section", name)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == rows
    for row in found:
        assert all(0 < of["low"] <= of["median"] <= of["high"] for of in row["seconds"].values())
        assert ("share" in row) == ("share" in row["asked"])


def test_without_a_gpu_it_says_so() -> None:
    if len(gb.available_backends()) > 1:
        pytest.skip("there is a GPU")
    done = run()
    assert (done.returncode, "'cuda' cannot be used" in done.stdout) == (1, True)
    assert run("--allow-missing").returncode == 0


def test_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import gpu_check

    def seconds(median: float) -> dict[str, float]:
        return {"median": median, "low": median, "high": median}

    rows = [
        {"work": "a", "seconds": {"gpubatch": seconds(1e-3), "peer": seconds(3e-3)}, "asked": {"peer": 2.0}},
        {"work": "b", "seconds": {"gpubatch": seconds(2e-3)}, "share": 0.5, "asked": {"share": 0.9}},
    ]
    assert gpu_check.table(rows).splitlines()[2:] == [
        "| a | 1 ms | peer: 3 ms | 3.00x | 2.0x |",
        "| b | 2 ms | a copy's bandwidth | 50.0 % | 90 % |",
    ]
