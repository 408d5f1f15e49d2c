"""bench/rules.py: that its contenders do the same work, and what it makes of their times. The times are not tested."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from families import every
from needs import missing

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))

import peers
import rules as bench

import gpubatch as gb


@every("rule", gb.rules.__all__, ["heavy_ball", "adam", "yogi"])
def test_contenders_do_the_same_work(rule: str) -> None:
    expected, compared = [], 0
    for name in ("compiled", "own rule", *bench.peers_of(rule)):
        try:
            step = bench.CONTENDERS[name](rule, 1000)
        except ModuleNotFoundError as error:
            missing("peers", f"{error.name} is not installed (pip install 'gpubatch[peers]')")
        except peers.SkippedError:
            continue
        expected.append(np.asarray([step() for _ in range(bench.WARM_UP)][-1]))
        compared += name != "compiled"
    for found in expected[1:]:
        np.testing.assert_allclose(found, expected[0], rtol=bench.TOLERANCE)
    assert compared or not bench.peers_of(rule)


def test_a_contender_is_a_process_that_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = bench.worker_of("NumPy")
    found = worker.ask(rule="sgd", size=1000)
    assert found["result"] == pytest.approx(-3 * 0.03 * peers.GRADIENT, rel=1e-6)
    assert worker.ask(steps=2)["seconds"] > 0
    worker.close()
    assert worker.process.returncode == 0


class Answers:
    """A contender that takes the given times."""

    def __init__(self, times: list[float], result: float | None = 1.0) -> None:
        self.times, self.result = times, result

    def ask(self, **command: Any) -> dict[str, Any]:
        if not self.times:
            return {"skipped": "not here"}
        if "rule" in command:
            return {"seconds": self.times[0], "result": self.result}
        return {"seconds": self.times.pop(0)}


def test_ratios_are_medians_over_the_rounds() -> None:
    workers: dict[str, Any] = {
        "NumPy": Answers([1.0, 1.0, 1.0]),
        "compiled": Answers([0.1, 0.2, 0.1]),
        "own rule": Answers([]),
        "PyTorch fused": Answers([]),
        "PyTorch foreach": Answers([0.6, 0.6, 0.7], result=1.00001),
        "PyTorch loop": Answers([0.4, 0.6, 0.3]),
        "copy loop": Answers([0.1, 0.1, 0.1], result=None),
    }
    row = bench.compare("radam", 1000, workers, 3)
    assert row["best_peer"] == "PyTorch loop"
    assert row["microseconds"] == pytest.approx(
        {"NumPy": 1e6, "compiled": 1e5, "PyTorch foreach": 6e5, "PyTorch loop": 4e5, "copy loop": 1e5}
    )
    assert (row["peer_over_compiled"], row["numpy_over_compiled"]) == pytest.approx((3.0, 10.0))
    assert (row["own_rule_over_compiled"], row["bytes_per_parameter"]) == (None, 28)
    text = bench.table({"rows": [row]})
    assert text.splitlines()[-1] == ("| radam | 1,000 | 1e+03 ms | 100 ms |  | 400 ms (PyTorch loop) | 3.0x | 1.00x |")
    assert bench.summary({"rows": [row, {**row, "size": 2000, "best_peer": None}]}).splitlines()[-1] == (
        "| radam | PyTorch loop or none | 100 ms, 3.0x | 100 ms |"
    )


def test_a_contender_with_another_result_is_refused() -> None:
    workers: dict[str, Any] = {name: Answers([1.0]) for name in bench.CONTENDERS}
    workers["PyTorch fused"] = Answers([1.0], result=1.001)
    with pytest.raises(SystemExit, match=r"adam: PyTorch fused must end with the compiled form's 1\.0, got 1\.001"):
        bench.compare("adam", 1000, workers, 1)
