"""bench/scale_model.py against closed forms, and what it and bench/ranks.py make of measured times."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))

import ranks as bench
import scale_model as model
from scale_model import Cluster, Link, Processor, Work

A, B, G = 3e-6, 1 / 10e9, 1 / 5e9  # α, β, γ
SIZE = 64e6
LINK = Link("link", A, 1 / B, "")
FREE = Link("free", 0.0, math.inf, "")
LINEAR = Processor("linear", ((0, 0.0), (1, 1e-6)), 0.0, G, "")
MEMORY = model.Store("memory", 0.0, math.inf, 1, 1, math.inf, math.inf, "")
WORK = Work("", samples=1e9, row=1000, gradients=SIZE, batch=4096)


def one_node(link: Link = LINK, processor: Processor = LINEAR) -> Cluster:
    return Cluster("", processor, 1024, link, FREE)


@pytest.mark.parametrize("how", [model.tree_sum, model.engine_sum])
def test_one_rank_sums_nothing_and_is_what_one_processor_takes(how: model.Sum) -> None:
    found = model.predict(WORK, one_node(), MEMORY, 1, how)
    assert (found.sum, found.efficiency, found.bound) == (0, 1, "computing")
    assert found.step == pytest.approx(4096e-6)
    assert found.epoch == pytest.approx(1e9 * 1e-6)


@pytest.mark.parametrize("p", [2, 4, 8, 64, 1024])
def test_the_costs_are_those_of_the_paper(p: int) -> None:
    # Thakur, Rabenseifner & Gropp: pairwise exchange and ring allgather of n bytes, and the additions.
    closed = 2 * ((p - 1) * A + (p - 1) / p * SIZE * B) + (p - 1) / p * SIZE * G
    assert model.tree_sum(SIZE, p, one_node()) == pytest.approx(closed)
    assert model.engine_sum(SIZE, p, one_node()) <= closed * (1 + 1e-12)


def test_between_nodes_every_rank_sends_to_every_other_and_shares_its_nodes_link() -> None:
    slow = Link("slow", 10 * A, 0.1 / B, "")
    cluster = Cluster("", replace(LINEAR, adding=0.0), 4, FREE, slow)
    # Of 8 ranks in two nodes each has 4 elsewhere: 4 · 4 pieces of an eighth go through a node's link, one after
    # another; in the ring one latency is the network's, and 7/8 of the buffer passes.
    expected = 4 * 10 * A + 16 * SIZE / 8 * 10 * B + 10 * A + 7 / 8 * SIZE * 10 * B
    assert model.tree_sum(SIZE, 8, cluster) == pytest.approx(expected)
    # In two rings the network's latency counts twice, and the buffer passes it twice.
    assert model.engine_sum(SIZE, 8, cluster) == pytest.approx(2 * (10 * A + 7 / 8 * SIZE * 10 * B))


@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("how", [model.tree_sum, model.engine_sum])
def test_without_messages_every_rank_counts(each: bool, how: model.Sum) -> None:
    work = replace(WORK, each=each)
    free = one_node(FREE, replace(LINEAR, adding=0.0))
    found = [model.predict(work, free, MEMORY, ranks, how) for ranks in model.RANKS]
    assert [p.efficiency for p in found] == pytest.approx([1] * len(found))
    assert model.pays_to(found) == 1024


def test_what_does_not_divide_limits_a_batch_of_one_size() -> None:
    # Amdahl: of a step of 4,096 rows the update is a tenth.
    total = 4096e-6
    processor = Processor("", ((0, 0.1 * total), (4096, total)), 0.1 * total, 0.0, "")
    found = [model.predict(WORK, one_node(FREE, processor), MEMORY, ranks) for ranks in model.RANKS]
    for p in found:
        assert total / p.step == pytest.approx(1 / (0.1 + 0.9 / p.ranks))
    # Twice the ranks are 1.5 times as fast up to 4: (0.1 + 0.9 / 4) / (0.1 + 0.9 / 8) = 1.53, and then 1.36.
    assert model.pays_to(found) == 8


def test_parts_beyond_the_ranks_are_computed_one_after_another_and_updated_once() -> None:
    processor = Processor("", ((0, 5e-4), (1000, 15e-4)), 4e-4, 0.0, "")
    work = replace(WORK, batch=1000, shards=8)
    # 1e-4 and 1e-6 a row without the update: 4 parts of 125 rows on each of two ranks.
    assert model.predict(work, one_node(FREE, processor), MEMORY, 2).compute == pytest.approx(4 * 2.25e-4 + 4e-4)
    assert model.predict(work, one_node(FREE, processor), MEMORY, 8).compute == pytest.approx(2.25e-4 + 4e-4)


def test_reading_beside_computing_counts_only_where_it_takes_longer() -> None:
    store = model.Store("", latency=0.1, stream=1e8, piece=1e6, at_once=11, node=6e8, decoding=math.inf, source="")
    assert store.rate(1) == pytest.approx(1e8)  # 11 requests of 1 MB in 0.11 s
    assert store.rate(8) == pytest.approx(0.75e8)  # an eighth of the node's
    found = model.predict(WORK, one_node(), store, 1)
    assert (found.read, found.step, found.bound) == (pytest.approx(4096 * 1000 / 1e8), found.read, "reading")
    fast = replace(store, stream=1e12, latency=0.0, node=math.inf)
    assert model.predict(WORK, one_node(), fast, 1).bound == "computing"


def test_steps_are_interpolated_between_what_was_measured() -> None:
    processor = Processor("", ((8, 2.0), (16, 3.0), (32, 7.0)), 1.0, 0.0, "")
    assert [processor.gradient(rows) for rows in (0, 4, 8, 12, 32, 64)] == [0, 0.5, 1, 1.5, 6, 14]


def result(microseconds: dict[str, float]) -> dict[str, object]:
    return {
        "cores": 2,
        "gradients": 8e6,
        "contenders": {"two": {"ranks": 2, "shards": 2}, "four": {"ranks": 4, "shards": 4}, "theirs": {}},
        "pieces": {
            "step_us": {"16": 100.0, "32": 150.0},
            "update_us": 40.0,
            "latency_us": 5.0,
            "GB_a_second": 8.0,
            "added_GB_a_second": 4.0,
        },
        "rows": [{"batch": 64, "microseconds": microseconds}],
    }


def test_what_was_measured_is_held_against_its_pieces(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Two ranks: 150 µs for 32 rows, two messages of 5 µs and 4 MB at 8 GB/s, 4 MB added at 4 GB/s. Four ranks share
    # two cores: everything takes twice as long, 100 µs for 16 rows, six messages of 2 MB, 6 MB added.
    two, four = 150 + 2 * (5 + 500) + 1000, 2 * (100 + 6 * (5 + 250) + 1500)
    found = model.held_against(result({"two": two, "four": four / 2, "theirs": 1.0}))
    assert [(row["contender"], row["predicted_us"]) for row in found] == [
        ("two", pytest.approx(two)),
        ("four", pytest.approx(four)),
    ]
    assert [row["error_percent"] for row in found] == pytest.approx([0, 100])

    (tmp_path / "measured.json").write_text(json.dumps(result({"two": two})))
    model.main(["--held-against", str(tmp_path / "measured.json"), "--out", str(tmp_path / "errors.json")])
    assert "| 64 | two | 2.16 ms | 2.16 ms | +0 % |" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "errors.json").read_text())["rows"]) == 1


def test_the_ratio_to_ddp_is_of_the_same_round() -> None:
    row = bench.row_of(64, {bench.OURS: [1.0, 2.0, 4.0], bench.DDP: [2.0, 6.0, 4.0]})
    assert row["microseconds"] == {bench.OURS: 2e6, bench.DDP: 4e6}
    assert row["times_of_2_ranks"] == {bench.DDP: 2.0}
    assert row["range"] == {bench.DDP: [1.0, 3.0]}


@pytest.mark.exhaustive
def test_the_picture_and_the_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    model.main(["--plot", str(tmp_path / "scale.png"), "--out", str(tmp_path / "scale.json")])
    assert (tmp_path / "scale.png").stat().st_size > 10_000
    written = json.loads((tmp_path / "scale.json").read_text())
    assert len(written["predictions"]) == 2 * len(model.lines(model.LAYERS))
    assert all([p["ranks"] for p in line["ranks"]] == model.RANKS for line in written["predictions"])
    assert capsys.readouterr().out.count("| 1,024 |") == len(written["predictions"])
