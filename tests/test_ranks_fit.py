"""``fit`` on several ranks: the bits of one process, one saved run, and an end for all when one of them fails.

What a run does on ranks is tests/ranks_run.py's. A time limit fails a test in which a rank waits for ever.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from many_ranks import mpi, on_threads
from ranks_run import EPOCHS, Options, digest_of, parts_of

import gpubatch as gb
from gpubatch.nn.dealt import DealtSteps
from gpubatch.train import short_runs
from gpubatch.train.together import Agreement

KINDS = ("plain", "dropout", "norm", "clipped", "skipped", "weights", "windowed", "averaged")
STEPS = 21  # of a whole run
PROGRAM = """
import json, sys
from pathlib import Path
import ranks_run
ranks_run.main(Path(sys.argv[1]), ranks_run.Options(**json.loads(sys.argv[2])))
"""
COMMAND = "import sys; from gpubatch.__main__ import main; sys.argv[0] = 'gpubatch'; main()"


def run(size: int, folder: Path, check: bool = True, **options: Any) -> tuple[list[dict[str, Any]], Any]:
    """A run on so many processes: what each rank wrote, and the launcher's end."""
    folder.mkdir(exist_ok=True)
    for old in folder.glob("rank*.json"):
        old.unlink()
    done = mpi(size, PROGRAM, folder, json.dumps(dataclasses.asdict(Options(**options))), check=check)
    return [json.loads(path.read_text()) for path in sorted(folder.glob("rank*.json"))], done


def same(found: list[dict[str, Any]], size: int) -> dict[str, Any]:
    """What all ranks have written alike."""
    assert [one["rank"] for one in found] == list(range(size))
    first = {key: value for key, value in found[0].items() if key not in ("rank", "warnings")}
    for one in found:
        assert {key: value for key, value in one.items() if key not in ("rank", "warnings")} == first
        assert not (one["rank"] and one["warnings"])
    return first


@functools.cache
def alone(kind: str) -> tuple[str, dict[str, Any]]:
    """Digest and history of the run in this process."""
    o, ranks = Options(kind), gb.Ranks()
    net, loader, opt, more = parts_of(o, ranks)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        history = gb.fit(net, loader, opt, EPOCHS, **more, progress=False, ranks=ranks)
    return digest_of(net, opt), without_seconds(history.to_dict())


def without_seconds(history: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in history.items() if name != "seconds"}


# --- threads of this process ---


@pytest.mark.parametrize("kind", ["plain", "averaged"])
def test_threads_have_the_bits_of_one_process(kind: str) -> None:
    def one(ranks: gb.Ranks) -> tuple[str, dict[str, Any]]:
        net, loader, opt, more = parts_of(Options(kind), ranks)
        history = gb.fit(net, loader, opt, EPOCHS, **more, progress=False, ranks=ranks)
        return digest_of(net, opt), history.to_dict()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = on_threads(2, one)
    assert found[0] == found[1]
    assert (found[0][0], without_seconds(found[0][1])) == alone(kind)


def test_steps_are_tried_with_the_rows_of_a_part_of_the_last_batch(rng: np.random.Generator) -> None:
    """Its 16 rows are 2 in each of 8 parts, as many as batch norm needs, on 2 ranks as on one."""

    def one(ranks: gb.Ranks) -> int:
        net = gb.Network([gb.Dense(3, 4), gb.BatchNorm(4), gb.Dense(4, 2)], seed=0, backend="cpu")
        loader = gb.Loader(X, Y, "auto", at_most=1024, ranks=ranks, backend="cpu")
        gb.fit(net, loader, gb.SGD(net.parameters, 0.1), epochs=0, progress=False, ranks=ranks)
        return loader.batch_size

    X, Y = rng.normal(size=(2064, 3)), np.arange(2064) % 2
    assert on_threads(2, one) == [1024, 1024]


def in_sync(rng: np.random.Generator, ranks: gb.Ranks | None = None, **options: Any) -> list[float]:
    """The losses of a network whose batch norm is in sync; a part of the last batch, and a rank there, has one row."""
    layers = [gb.Dense(4, 6, bias=False), gb.BatchNorm(6, sync=True), gb.ReLU(), gb.Dense(6, 2)]
    net, X = gb.Network(layers, dtype="float64", backend="cpu"), rng.standard_normal((66, 4))
    loader = gb.Loader(X, np.arange(66) % 2, batch_size=64, backend="cpu", dtype="float64", ranks=ranks, **options)
    with short_runs():
        return gb.fit(net, loader, gb.Adam(net.parameters), 2, progress=False, ranks=ranks).loss


def test_batch_norm_in_sync_takes_parts_of_one_row() -> None:
    one, other = on_threads(2, lambda ranks: in_sync(np.random.default_rng(0), ranks))
    assert one == other
    np.testing.assert_allclose(one, in_sync(np.random.default_rng(0)), rtol=1e-9)


def test_batch_norm_in_sync_says_that_it_takes_no_fewer_rows(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(DealtSteps, "sum_parts", no_room)
    with pytest.raises(
        gb.errors.InsufficientMemoryError, match=r"BatchNorm\(sync=True\) needs all 64 samples of a rank"
    ):
        in_sync(rng, shards=4)


@pytest.mark.parametrize("size", [1, 2])
def test_the_loader_and_fit_have_the_same_ranks(size: int) -> None:
    """Also on ranks of which one makes the mistake: all raise."""

    def tried(own: gb.Ranks, right: bool, **given: Any) -> str:
        net, loader, opt, _ = parts_of(Options(), own)
        other = loader if right else gb.Loader(np.ones((9, 6), np.float32), np.zeros(9, int), 4, backend="cpu")
        with pytest.raises(gb.errors.ArgumentError) as caught:
            gb.fit(net, other, opt, 1, progress=False, **given)
        return str(caught.value)

    def both(ranks: gb.Ranks) -> tuple[str, str]:
        return tried(ranks, False, ranks=ranks), tried(ranks, True) if size == 1 else ""

    for of_loader, of_fit in on_threads(size, both):
        assert "make it with Loader(..., ranks=ranks)" in of_loader
        assert size > 1 or "fit(..., ranks=ranks)" in of_fit


def test_ranks_must_be_ranks() -> None:
    net, loader, opt, _ = parts_of(Options(), gb.Ranks())
    with pytest.raises(gb.errors.DTypeError, match=r"ranks must be a gpubatch\.Ranks or None, got int"):
        gb.fit(net, loader, opt, 1, ranks=2)  # type: ignore[arg-type]


def test_an_error_of_one_is_an_error_of_all() -> None:
    def one(ranks: gb.Ranks) -> list[str]:
        together, told = Agreement(ranks), []

        def work(error: Exception | None) -> None:
            with together.ending(), together.phase():
                if ranks.rank == 1 and error is not None:
                    raise error

        for error in (OSError("no"), gb.errors.CheckpointError("no"), missing_device):
            with pytest.raises((OSError, RuntimeError)) as caught:
                work(error)
            told.append(f"{type(caught.value).__name__}: {caught.value}")
        work(None)
        return told

    missing_device = gb.errors.BackendUnavailableError("no", "no device", "buy one")

    first, second = on_threads(2, one)
    assert first == [
        "RankError: rank 1: OSError: no",
        "CheckpointError: rank 1: no",
        "RankError: rank 1: BackendUnavailableError: no Remedy: buy one",
    ]
    assert second == ["OSError: no", "CheckpointError: no", "BackendUnavailableError: no Remedy: buy one"]


def test_all_must_have_the_same() -> None:
    def one(ranks: gb.Ranks) -> str:
        together = Agreement(ranks)
        together.same({"epochs": 3, "samples": (1, 2)})
        with pytest.raises(gb.errors.ArgumentError) as caught:
            together.same({"epochs": 3, "rate": 0.1 * (1 + ranks.rank % 2)})
        return str(caught.value)

    own = "all ranks must have the same rate: ranks 1, 3 of 4 have others than rank 0; rate is 0.1 on rank 0, 0.2 on"
    assert on_threads(4, one) == [f"rank 1: {own} rank 1", f"{own} rank 1", f"rank 1: {own} rank 1", f"{own} rank 3"]


def test_a_callback_of_one_stops_all_and_logs_are_of_one(tmp_path: Path) -> None:
    class Stops:
        def __init__(self, rank: int) -> None:
            self.rank, self.seen = rank, 0

        def on_step(self, state: gb.TrainingState) -> None:
            self.seen += 1
            if self.rank == 1 and self.seen == 4:
                raise gb.StopTraining("enough")

    def one(ranks: gb.Ranks) -> tuple[int, int]:
        net, loader, opt, _ = parts_of(Options(), ranks)
        stops, notes = Stops(ranks.rank), []

        def once(state: gb.TrainingState) -> None:
            notes.append(state.rank)

        once.once = True  # type: ignore[attr-defined]
        callbacks = [stops, gb.CSVLog(tmp_path / "log.csv"), once]
        gb.fit(net, loader, opt, 2, callbacks=callbacks, progress=False, ranks=ranks)
        return stops.seen, len(notes)

    assert on_threads(2, one) == [(4, 0), (4, 0)]
    assert (tmp_path / "log.csv").read_text().startswith("epoch,")


def test_a_folder_is_one_runs_at_a_time(tmp_path: Path) -> None:
    def begun(**more: Any) -> None:
        o, ranks = Options(), gb.Ranks()
        net, loader, opt, _ = parts_of(o, ranks)
        gb.fit(net, loader, opt, 1, checkpoint=tmp_path, progress=False, ranks=ranks, **more)

    def begins_another(state: gb.TrainingState) -> None:
        with pytest.raises(
            gb.errors.ArgumentError, match=r"is in use by another run, process \d+ on .+: wait for its end"
        ):
            begun(resume=True)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        begun(callbacks=[begins_another])
        (tmp_path / ".in-use").write_text("process 1, which is no more")
        begun(resume=True)
    assert not (tmp_path / ".in-use").exists()


# --- processes ---


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", KINDS)
def test_processes_have_the_bits_of_one(kind: str, tmp_path: Path) -> None:
    for size in (1, 2, 4):
        found = same(run(size, tmp_path, kind=kind)[0], size)
        assert (found["digest"], without_seconds(found["history"])) == alone(kind)
    if kind == "skipped":
        assert found["history"]["skipped"] == EPOCHS


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", ["plain", "norm", "windowed", "averaged"])
def test_a_run_goes_on_with_another_number_of_processes(kind: str, tmp_path: Path) -> None:
    """4 processes to a random step, then 2 to another, then 1."""
    stops = np.random.default_rng(KINDS.index(kind)).integers([1, STEPS // 2], [STEPS // 2 - 2, STEPS - 2]).tolist()
    folder, found = tmp_path / "run", {}
    for size, stop in zip((4, 2, 1), [*stops, None], strict=True):
        how = {} if stop is None else {"fault": "SIGTERM", "at": stop, "on": size - 1}
        found = same(run(size, tmp_path, kind=kind, checkpoint=str(folder), resume=size < 4, every=5, **how)[0], size)
        # What one has seen after a step, the next sum tells all, or the end of the epoch.
        assert stop is None or found["steps"] == stop + (stop % (STEPS // EPOCHS) > 0)
    assert (found["digest"], without_seconds(found["history"])) == alone(kind)


# What goes wrong on one rank, with what all say and how they end: by an error that all raise, or all at once.
RAISED = {
    "SIGTERM": ("TrainingTerminated", "terminated in epoch 2 after step 10; the model holds this last complete step"),
    "SIGINT": ("TrainingInterrupted", "interrupted in epoch 2 after step 10; the model holds this last complete step"),
    "seed": ("ArgumentError", "has others than rank 0; network's seed is 3 on rank 0, 4 on rank 1"),
    "network": ("ArgumentError", "network's layer 1 is 'Dense(inputs=6, outputs=12, bias=True)' on rank 0, 'Dense(in"),
    "damaged checkpoint": ("DataFormatError", "checkpoint-1.safetensors must have its original name"),
}
ENDED = {
    "killed": "",
    "raises": "rank 1 of {size} ended all: ZeroDivisionError: a callback divides by 0",
    "exits": "rank 1 of {size} ended all: SystemExit: 3",
    "prepare": "rank 1 of {size} ended all: KeyError: 'no such feature'",
    "damaged file": "rank 1 of {size} ended all: gpubatch.errors.DataFormatError: part-3.bin is damaged",
    "ends early": "rank 1 of {size} has ended",
}


@pytest.mark.exhaustive
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("fault", RAISED)
def test_what_one_rank_meets_ends_all_alike(fault: str, size: int, tmp_path: Path) -> None:
    where = str(tmp_path / "run")
    resume = fault == "damaged checkpoint"
    if resume:
        same(run(2, tmp_path, checkpoint=where, fault="SIGTERM")[0], 2)
    found, _ = run(size, tmp_path, checkpoint=where, every=4, resume=resume, fault=fault)
    assert len(found) == size
    kind, words = RAISED[fault]
    for one in found:
        assert one["error"] == kind
        assert words in one["message"]
        assert one["rank"] == 1 or fault.startswith("SIG") or "rank 1: " in one["message"]
    if fault.startswith("SIG"):
        assert same(found, size)["steps"] == 10
        assert [path.name[:17] for path in sorted((tmp_path / "run").glob("checkpoint-*"))] == [
            f"checkpoint-00000{n}"
            for n in (1, 2, 3)  # after steps 4 and 8, and at the end: each once
        ]
    goes_on(tmp_path, where)


@pytest.mark.exhaustive
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("fault", ENDED)
def test_a_rank_that_fails_ends_all(fault: str, size: int, tmp_path: Path) -> None:
    where, kind = str(tmp_path / "run"), "windowed" if fault == "damaged file" else "plain"
    found, done = run(size, tmp_path, check=False, kind=kind, checkpoint=where, every=4, fault=fault)
    assert done.returncode != 0
    assert ENDED[fault].format(size=size) in done.stderr
    # What a callback raises, the other ranks are told and raise, too; all else ends them at once.
    told = [one["message"] for one in found]
    assert told == (["rank 1: ZeroDivisionError: a callback divides by 0"] * len(told) if fault == "raises" else [])
    goes_on(tmp_path, where, kind, fault="prepare" if fault == "prepare" else "")


def goes_on(tmp_path: Path, where: str, kind: str = "plain", fault: str = "") -> None:
    """Resumed on two processes the run ends with the bits of one that nothing happened to."""
    found = same(run(2, tmp_path, kind=kind, checkpoint=where, resume=True, fault=fault, on=9)[0], 2)
    assert (found["digest"], without_seconds(found["history"])) == alone(kind)


@pytest.mark.exhaustive
@pytest.mark.parametrize("size", [2, 4])
def test_a_disk_that_is_full_ends_all(size: int, tmp_path: Path) -> None:
    where = str(tmp_path / "run")
    found, _ = run(size, tmp_path, checkpoint=where, every=4, fault="disk", on=0)
    for one in found:
        assert one["error"] == "CheckpointError"
        assert "No space left on device" in one["message"]
    goes_on(tmp_path, where)


@pytest.mark.exhaustive
def test_a_folder_that_cannot_be_is_refused_by_all(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    found, _ = run(2, tmp_path, checkpoint=str(tmp_path / "file" / "run"))
    assert [one["error"] for one in found] == ["CheckpointError"] * 2
    assert "rank 0: checkpoints cannot be written to" in found[1]["message"]


@pytest.mark.exhaustive
@pytest.mark.parametrize("size", [2, 4])
def test_memory_that_runs_out_on_one_splits_the_batches_of_all(size: int, tmp_path: Path) -> None:
    found = same(run(size, tmp_path, fault="memory")[0], size)
    assert found["history"]["micro_batch_size"] == 8
    assert found["steps"] == STEPS
    np.testing.assert_allclose(found["history"]["loss"], alone("plain")[1]["loss"], rtol=1e-4)


@pytest.mark.exhaustive
def test_a_callback_of_one_process_stops_all(tmp_path: Path) -> None:
    found = same(run(2, tmp_path, stop=5)[0], 2)
    assert found["steps"] == 5


@pytest.mark.exhaustive
def test_rank_0_shows_the_progress(tmp_path: Path) -> None:
    found, done = run(4, tmp_path)
    assert done.stderr.count("epoch 3/3") == 1
    assert [len(one["warnings"]) for one in found] == [0] * 4
