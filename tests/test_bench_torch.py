"""bench/torch_optimizers.py: that its contenders do the same work, and what it makes of their times."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from needs import peer

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))

import torch_optimizers as bench


@pytest.mark.parametrize("rule", bench.RULES)
def test_contenders_do_the_same_work(rule: str) -> None:
    torch = peer("torch")
    found = []
    for contender in (bench.OURS, *bench.FORMS):
        params = [torch.linspace(-1, 1, n).requires_grad_() for n in (40, 7)]
        opt = bench.optimizer(contender, rule, params)
        if opt is None:
            continue
        for step in range(5):
            for p in params:
                p.grad = torch.cos(3 * p.detach() + step)
            opt.step()
        found.append(params)
    assert len(found) > 1
    for others in found[1:]:
        for p, q in zip(found[0], others, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


def test_a_row_has_the_ratio_to_the_best_contender() -> None:
    seconds = {bench.OURS: 2e-3, "foreach": 8e-3, "fused": 5e-3, bench.BYTES: 1e-3}

    def answers(name: str) -> Any:
        return lambda **command: {"seconds": seconds[name], "result": 0.0 if name == bench.BYTES else 1.0}

    row = bench.compare("Adam", "500 x 100", {name: answers(name) for name in seconds}, rounds=3)
    assert (row["best"], row["ratio"], row["asked"]) == ("fused", 2.5, 3)
    assert "| Adam | 500 x 100 | 2,000 µs | 5,000 µs (fused) | 2.50 | 3 | 5.00 |" in bench.table({"rows": [row]})


def test_contenders_that_end_elsewhere_stop_the_run() -> None:
    ask = {
        name: lambda value=float(i), **_: {"seconds": 1.0, "result": value} for i, name in enumerate([bench.OURS, "x"])
    }
    with pytest.raises(SystemExit, match=r"Adam, 500 x 100: x must end with 0.0, got 1.0"):
        bench.compare("Adam", "500 x 100", ask, rounds=1)


def test_a_contender_is_a_process_that_answers() -> None:
    peer("torch")
    worker = bench.worker_of(bench.OURS, 1)
    assert worker.ask(rule="SGD", shapes="500 x 100")["seconds"] > 0
    assert worker.ask(steps=2)["seconds"] > 0
    worker.close()
    assert worker.process.returncode == 0


def test_the_loop_of_bytes_reads_and_writes_every_array() -> None:
    torch = peer("torch")
    params = [torch.zeros(1024, requires_grad=True) for _ in range(2)]
    for rule, count in {"SGD": 0, "RMSProp": 1, "Adam": 2}.items():
        loop = bench.optimizer(bench.BYTES, rule, params)
        if loop is None:
            pytest.skip("no C++ compiler")
        assert len(loop.states) == count
        for p in params:
            p.grad = torch.ones_like(p)
            p.data.zero_()
        loop.step()
        assert all((x == 1).all() for tensors in (params, *loop.states) for x in tensors)
