"""bench/peers.py: that its contenders do the same work, and what it makes of their times. The times are not tested."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from needs import missing

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))

import peers

N = 1000
SMALL = {
    "adam": peers.adam(N),
    "adam, apart": {
        "gpubatch": lambda: peers.gpubatch_optimizer("adam", [N, N]),
        "PyTorch fused": lambda: peers.torch_optimizer("adam", [N, N], fused=True),
    },
    "rmsprop": peers.other_optimizer("rmsprop", N, "foreach"),
    "momentum": peers.other_optimizer("momentum", N, "foreach", "fused"),
    "training": peers.training(8),
    "epoch": peers.WORK["shuffled epoch, 60,000 x 784 bytes, batch 256"],
}


def made(maker: Callable[[], peers.Step]) -> peers.Step:
    try:
        return maker()
    except ModuleNotFoundError as error:
        missing("peers", f"{error.name} is not installed (pip install 'gpubatch[peers]')")
    except peers.SkippedError as error:
        missing("compiler", str(error))


@pytest.mark.parametrize(("work", "contender"), [(w, c) for w, makers in SMALL.items() for c in makers])
def test_contenders_do_the_same_work(work: str, contender: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "SAMPLES", 1000)
    result = peers.result_of(made(SMALL[work][contender]))
    if contender in ("matrix products", "conversion loop", "plain copy"):
        assert result is None
    else:
        assert result == pytest.approx(peers.result_of(SMALL[work]["gpubatch"]()), rel=peers.TOLERANCE)


def test_the_copy_loop_runs() -> None:
    assert made(lambda: peers.copy_loop(N))() is None


def run(monkeypatch: pytest.MonkeyPatch, times: dict[str, list[dict[str, Any]]], *arguments: Any) -> None:
    monkeypatch.setattr(peers, "time_apart", lambda work, contender, budget: times[contender].pop(0))
    monkeypatch.setattr(peers, "limit_threads", lambda threads: None)
    monkeypatch.setattr(
        sys, "argv", ["peers.py", "--only", "Adam, 10 thousand", "--threads", "1", *map(str, arguments)]
    )
    peers.main()


def timed(*seconds: float, result: float | None = 1.0) -> list[dict[str, Any]]:
    return [{"seconds": s, "result": result} for s in seconds]


def test_ratios_are_medians_over_the_rounds(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    times = {
        "gpubatch": timed(1e-6, 2e-6, 1e-6),
        "PyTorch fused": timed(3e-6, 2e-6, 4e-6, result=1.00001),
        "JAX + optax": [{"skipped": "jax is not installed"}],
        "NumPy": timed(1e-6, 1e-6, 1e-6, result=None),
    }
    run(monkeypatch, times, "--rounds", 3, "--out", tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["rounds"] == 3
    torch, numpy = found["rows"]
    assert (torch["peer"], numpy["peer"]) == ("PyTorch fused", "NumPy")
    assert torch["gpubatch_us"] == pytest.approx(1.0)
    assert torch["peer_us"] == pytest.approx(3.0)
    assert (torch["ratio"], *torch["ratio_range"]) == pytest.approx((3.0, 1.0, 4.0))
    assert "JAX + optax      skipped: jax is not installed" in capsys.readouterr().out


def test_only_the_chosen_peers_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run(monkeypatch, {"gpubatch": timed(1.0), "NumPy": timed(2.0)}, "--rounds", 1, "--peers", "scikit,NumPy")
    assert "2.00 (2.00 to 2.00)" in capsys.readouterr().out


def test_a_peer_with_another_result_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {"gpubatch": timed(1.0), "NumPy": timed(1.0, result=1.001)}
    with pytest.raises(SystemExit, match=r"Adam, 10 thousand: NumPy must return gpubatch's result .*, got 1\.001"):
        run(monkeypatch, times, "--rounds", 1, "--peers", "NumPy")


def test_more_threads_than_cores_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run(monkeypatch, {}, "--threads", 10_000)
    assert "got 10000" in capsys.readouterr().err
