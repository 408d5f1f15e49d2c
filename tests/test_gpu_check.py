"""The script that measures a GPU, as far as it goes without one: there it must not fail for a typing error."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from families import every
from needs import missing
from stand_in import queued_backend
from stand_in_lt import StandInLt

import gpubatch as gb

BENCH = Path(__file__).resolve().parent.parent / "bench"
SCRIPT = BENCH / "gpu_check.py"

sys.path.insert(0, str(BENCH))
import gpu_check  # noqa: E402
import to_accuracy  # noqa: E402

sys.path.remove(str(BENCH))


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, timeout=3000)


def stand_in() -> Any:
    device = queued_backend("late")
    device.cupy.nvmath = StandInLt(device.cupy)
    return device


ROWS = {
    "optimizers": 5,
    "steps": 2,
    "large batch": len(gpu_check.PRECISIONS),
    "epochs": 1,
    "accuracy": 1,
    "feeding": 0,
    "ranks": 0,
}


def test_all_sections_are_rehearsed_and_there_is_time_for_them() -> None:
    assert ROWS.keys() == gpu_check.SECTIONS.keys()
    limits = [limit for _, limit in gpu_check.SECTIONS.values()]
    before = gpu_check.PEERS + gpu_check.SOURCES + gpu_check.PARITY_TESTS + gpu_check.KERNEL_TIMES
    assert before + sum(limits) < gpu_check.WHOLE < 8 * 60


@every("name", [name for name, rows in ROWS.items() if rows], ["steps"])
def test_a_section_is_rehearsed(name: str) -> None:
    rows = ROWS[name]
    done = run("--rehearse", "--section", name)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == rows
    for row in found:
        assert "failed" not in row
        assert "gpubatch" in row["seconds"]
        assert all(0 < of["low"] <= of["median"] <= of["high"] for of in row["seconds"].values())
        assert ("share" in row) == ("share" in row["asked"])
        if name not in ("optimizers", "accuracy"):
            assert row["execution"]["gpubatch"].startswith(("eager", "captured"))
            assert 0 < row["loss"]["gpubatch"] < 3


ABOUT = {"device": "none", "date": "2026-11-29", "commit": "0123456789abcdef"}


def test_every_part_is_written_as_it_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = gpu_check.Results(ABOUT, tmp_path / "new")
    file = tmp_path / "new" / "gpu-2026-11-29-01234567.json"
    with results.part("first") as part:
        part["number"] = 5
        assert not file.exists()
    with pytest.raises(KeyboardInterrupt), results.part("second"):
        raise KeyboardInterrupt
    found = json.loads(file.read_text())
    assert (found["device"], found["complete"], [*found["parts"]]) == ("none", False, ["first"])
    assert found["parts"]["first"]["number"] == 5
    # What is there stays whole while it is written anew.
    results.found["rows"] = [{"work": "a", "seconds": {"gpubatch": seconds(1e-3)}, "asked": {}}]
    monkeypatch.setattr(Path, "replace", lambda *_: pytest.fail("killed"))
    with pytest.raises(pytest.fail.Exception, match="killed"):
        results.write()
    assert json.loads(file.read_text()) == found


def test_no_part_has_more_time_than_there_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    results = gpu_check.Results(ABOUT, tmp_path)
    assert (results.left(60), results.left()) == (60, gpu_check.WHOLE)
    now += gpu_check.WHOLE - 10
    assert (results.left(60), results.left()) == (10, 10)
    now += 100
    assert results.left(60) == 1  # which is enough to say that there was none


def test_a_peer_that_fails_is_no_failure_of_ours(tmp_path: Path) -> None:
    results = gpu_check.Results(ABOUT, tmp_path)
    results.found["rows"] = [{"work": "a", "failed": {"torch eager": "no"}}]
    assert results.good
    for wrong in ({"rows": [{"work": "a", "failed": {"gpubatch eager": "no"}}]}, {"wrong": {"steps": "late"}}):
        other = gpu_check.Results(ABOUT, tmp_path)
        other.found |= wrong
        assert not other.good
    results.found["parts"]["tests"] = {"passed": False}
    assert not results.good


def test_a_peer_that_is_broken_or_sees_no_device_has_no_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "why_not", gpu_check.why_not.__wrapped__)
    blind = types.SimpleNamespace(cuda=types.SimpleNamespace(is_available=lambda: False))
    monkeypatch.setitem(sys.modules, "torch", blind)
    assert gpu_check.why_not("torch", on_gpu=True) == "it sees no GPU"
    assert gpu_check.why_not("torch", on_gpu=False) == ""
    monkeypatch.setitem(sys.modules, "jax", None)
    assert gpu_check.why_not("jax", on_gpu=True).startswith("ModuleNotFoundError")


def test_every_source_is_compiled_before() -> None:
    files = [*(BENCH.parent / "kernels").glob("*.cu"), *(BENCH.parent / "kernels").glob("*.cuh")]
    there, found = (
        {*gpu_check.KERNEL.findall("\n".join(texts))} for texts in (map(Path.read_text, files), gpu_check.sources())
    )
    assert there == found


@pytest.mark.gpu
def test_all_of_it_on_a_device_and_what_a_kill_leaves(tmp_path: Path) -> None:
    if len(gb.available_backends()) < 2:
        missing("gpu", "no CUDA device can be used here")
    done = run("--rehearse", "--out", str(tmp_path / "whole"))
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = (tmp_path / "whole").glob("gpu-*[!s].json")
    found = json.loads(file.read_text())
    assert found["complete"]
    assert [*found["parts"]] == ["peers", "sources", "parity", *gpu_check.SECTIONS, "single kernels", "tests"]
    assert {"device", "driver serves CUDA", "versions", "date", "commit"} <= found.keys()
    assert (found["wrong"], found["parts"]["sources"]["failed"]) == ({}, [])
    for name in ("parity", "tests"):
        assert found["parts"][name]["passed"], found["parts"][name]
    assert all(of["passed"] for of in found["parts"]["parity"]["parity against float64"].values())
    assert len(found["rows"]) >= sum(ROWS.values())
    for row in found["rows"]:
        if "execution" in row:
            assert row["execution"]["gpubatch"].startswith("captured")
    command = [sys.executable, SCRIPT, "--rehearse", "--out", tmp_path / "cut"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True) as process:
        until = time.monotonic() + 1000
        while not (files := [*(tmp_path / "cut").glob("gpu-*.json")]) and time.monotonic() < until:
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
    cut = json.loads(files[0].read_text())
    assert not cut["complete"]
    assert [*found["parts"]][: len(cut["parts"])] == [*cut["parts"]]


@pytest.mark.parametrize("test", gpu_check.PARITY.values())
def test_the_tests_of_parity_are_there(test: str) -> None:
    file, _, name = test.partition("::")
    assert "@pytest.mark.gpu\n" in (text := (BENCH.parent / file).read_text())
    assert f"def {name}(" in text


def test_without_a_gpu_it_says_so() -> None:
    if len(gb.available_backends()) > 1:
        pytest.skip("there is a GPU")
    done = run()
    assert (done.returncode, "'cuda' cannot be used" in done.stdout) == (1, True)
    assert run("--allow-missing").returncode == 0


def seconds(median: float) -> dict[str, float]:
    return {"median": median, "low": median * 0.9, "high": median * 1.2}


def test_the_table() -> None:
    rows: list[dict[str, Any]] = [
        {"work": "a", "seconds": {"gpubatch": seconds(1e-3), "peer": seconds(3e-3)}, "asked": {"peer": 2.0}},
        {"work": "b", "seconds": {"gpubatch": seconds(2e-3)}, "share": 0.5, "asked": {"share": 0.9}},
        {
            "work": "c",
            "seconds": {"gpubatch": seconds(2e-3), "x": seconds(2e-3), "y": seconds(4e-3)},
            "asked": {"x": 1.2},
            "execution": {"gpubatch": "eager, since it rains"},
            "failed": {"z": "ValueError: a|b"},
        },
        {"work": "d", "seconds": {"x": seconds(2e-3)}, "asked": {"x": 1.2}, "failed": {"gpubatch": "no"}},
        {"work": "e", "seconds": {"gpubatch": seconds(2e-3)}, "asked": {}},
    ]
    assert gpu_check.table(rows).splitlines()[2:] == [
        "| a | 1 ms (0.9 to 1.2) | peer: 3 ms (2.7 to 3.6) | 3.00x | 2.0x |",
        "| b | 2 ms (1.8 to 2.4) | a copy's bandwidth | 50.0 % | 90 %, **not met** |",
        "| c (eager, since it rains) | 2 ms (1.8 to 2.4) | x: 2 ms (1.8 to 2.4) | 1.00x | 1.2x, **not met** |",
        "|  |  | y: 4 ms (3.6 to 4.8) | 2.00x |  |",
        "|  |  | z: failed, ValueError: a/b |  |  |",
        "| d | failed | x: 2 ms (1.8 to 2.4) | nanx | 1.2x, **not met** |",
        "|  |  | gpubatch: failed, no |  |  |",
        "| e | 2 ms (1.8 to 2.4) |  |  |  |",
    ]


class Driver:
    """The part of CUDA's driver that reports on a capture."""

    def __init__(self, device: Any) -> None:
        self.device, self.asked = device, 0

    def cuStreamGetCaptureInfo_v2(self, stream: Any, *found: Any) -> int:  # noqa: N802
        assert stream.value == self.device.current_stream().ptr
        assert self.device.current_stream().captured is not None
        self.asked += 1
        found[2]._obj.value = 4711
        return 0

    def cuGraphGetNodes(self, graph: Any, nodes: None, number: Any) -> int:  # noqa: N802
        assert graph.value == 4711
        number._obj.value = 17
        return 0


@every("precision", [*gpu_check.PRECISIONS], ["full", "mixed"])
@every("steps", {"1": 1, "3": 3}, ["3"])
def test_our_steps_are_captured_on_a_device(steps: int, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    device = stand_in()
    driver = Driver(device)
    monkeypatch.setattr(gpu_check, "SIZES", [12, 16, 5])
    load = ctypes.CDLL
    monkeypatch.setattr(ctypes, "CDLL", lambda name, *how: driver if name == "libcuda.so.1" else load(name, *how))
    place = gpu_check.Place(device, "cuda", 1 << 14, 512)
    x, y = np.ones((8, 12), np.float32), np.arange(8) % 5
    with device.own_stream():
        captured = gpu_check.our_step(place, x, y, steps, precision)
        eager = gpu_check.our_step(place, x, y, steps, precision, captured=False)
        assert captured.execution == "captured, nodes in the graph: [17]"
        assert driver.asked == 1
        assert (eager.execution, eager.steps, captured.steps) == ("eager", steps, steps)
        eager.work()  # a captured one has been called once
        for _ in range(2):
            losses = captured.work(), eager.work()
            assert device.to_numpy(losses[0]).tobytes() == device.to_numpy(losses[1]).tobytes()
    assert "capture" not in vars(device)


def test_a_capture_that_fails_is_told_and_made_up_for(monkeypatch: pytest.MonkeyPatch) -> None:
    device = stand_in()
    monkeypatch.setattr(gpu_check, "SIZES", [12, 16, 5])

    def capture(work: Any) -> Any:
        raise RuntimeError("cannot\nbe")

    monkeypatch.setattr(type(device), "capture", lambda self, work: capture(work))
    place = gpu_check.Place(device, "cuda", 1 << 14, 512)
    with device.own_stream():
        ours = gpu_check.our_step(place, np.ones((8, 12), np.float32), np.arange(8) % 5)
        assert np.isfinite(device.to_numpy(ours.work())).all()
    assert ours.execution == "eager, since the capture failed: RuntimeError: cannot"


def test_epochs_are_captured_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    device = stand_in()
    monkeypatch.setattr(gpu_check, "SIZES", [12, 16, 5])
    place = gpu_check.Place(device, "cuda", 1 << 14, 512)
    X, Y = np.ones((130, 12), np.uint8), np.arange(130) % 5
    for execution, found in [("auto", "captured"), ("eager", "eager")]:
        assert gpu_check.our_epochs(place, X, Y, execution).work().execution == found


@pytest.mark.parametrize("cold", [True, False])
def test_time_is_taken_on_the_stream_that_works(cold: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    device, seen = stand_in(), list[Any]()

    class Event:
        def record(self) -> None:
            seen.append(device.current_stream())

        def synchronize(self) -> None:
            seen.append("over")

    runtime = types.SimpleNamespace(getDeviceProperties=lambda index: {"l2CacheSize": 50 << 20})
    cuda = types.SimpleNamespace(Event=Event, get_elapsed_time=lambda start, stop: 250.0, runtime=runtime)
    monkeypatch.setattr(gb.backend, "load_cupy", lambda: types.SimpleNamespace(cuda=cuda))
    written = []

    def zeros(size: int, dtype: str) -> Any:
        written.append(size)
        return np.zeros(1, dtype)

    monkeypatch.setattr(device, "zeros", zeros)
    place = gpu_check.Place(device, "cuda", 1 << 14, 512)
    with device.own_stream():
        own = device.current_stream()
        contender = gpu_check.Contender(lambda: seen.append("work"), steps=2)
        found = gpu_check.measure(place, {"gpubatch": contender}, samples=1, cold=cold)
    timed = (4 if cold else 1) * gpu_check.ROUNDS
    assert (found["gpubatch"]["median"], len(contender.seconds)) == (0.125, timed)
    assert seen[:-1] == [own, "work", own, "over"] * (timed + gpu_check.ROUNDS)
    assert seen[-1] == "work"  # for the time of the host
    assert written == [200 << 20] * cold


def test_whoever_cannot_start_or_has_no_finite_loss_is_noted_and_costs_the_others_nothing() -> None:
    def absent() -> gpu_check.Contender:
        raise OSError("no such thing\nat all")

    row = gpu_check.race(
        gpu_check.here(rehearse=True),
        "work",
        {
            "absent": absent,
            "gpubatch": lambda: gpu_check.Contender(lambda: np.float32(0.5), execution="captured"),
            "diverged": lambda: gpu_check.Contender(lambda: np.float32(np.nan)),
        },
        {"absent": 2.0},
    )
    assert row["failed"] == {"absent": "OSError: no such thing", "diverged": "the loss is nan"}
    assert list(row["seconds"]) == ["gpubatch"]
    assert (row["asked"], row["loss"], row["execution"]) == ({}, {"gpubatch": 0.5}, {"gpubatch": "captured"})


def test_the_outcome_of_the_tests_is_told_as_far_as_they_came() -> None:
    first, second = gpu_check.PARITY.values()
    lines = [
        "collecting ... collected 4 items",
        f"{first}[adam-float32] PASSED [ 25%]",
        f"{first}[adam - float64] FAILED [ 50%]",
        f"{second}[softmax] PASSED [ 75%]",
        "tests/test_x.py::test_y SKIPPED (no device) [100%]",
        f"FAILED {first}[adam - float64] - assert 1 == 2",
    ]
    found = gpu_check.judged("\n".join(lines), "exit code 1: ")
    assert not found["passed"]
    assert found["outcomes"] == {"failed": 1, "passed": 2, "skipped": 1}
    assert found["parity against float64"] == {
        "update rules": {"failed": 1, "passed": 1},
        "kernels of the core": {"passed": 1},
    }
    assert found["failed"] == [f"{first}[adam - float64]"]
    assert found["wrong"] == "exit code 1: "
    assert gpu_check.judged("\n".join(lines[1:2]), "")["passed"]
    assert not gpu_check.judged("\n".join(lines[4:5]), "")["passed"]  # nothing but skipped tests


@pytest.mark.exhaustive  # it waits five seconds
def test_what_takes_too_long_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    inner = f"import fcntl, time; f = open({str(lock)!r}, 'w'); fcntl.flock(f, 2); print('held', flush=True); "
    command = [sys.executable, "-c", f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}])"]
    command[2] = command[2].replace("flush=True); ", "flush=True); time.sleep(300)")
    output, wrong = gpu_check.run_within(command, 5)
    assert output == "held\n"
    assert wrong.startswith("not done after 5 s")
    with lock.open("w") as file:
        for _ in range(1000):  # the one who would hold it for five minutes is on its way out
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            time.sleep(0.01)
    pytest.fail("the lock is still held")


def test_the_digits_are_all_different_and_the_parts_apart(tmp_path: Path) -> None:
    to_accuracy.write_digits(tmp_path, 300, 100)
    X, Y, X_test, Y_test = (np.load(tmp_path / f"{name}.npy") for name in ("train_x", "train_y", "test_x", "test_y"))
    assert [(a.shape, a.dtype) for a in (X, X_test)] == [((300, 784), np.uint8), ((100, 784), np.uint8)]
    assert len(np.unique(np.concatenate([X, X_test]), axis=0)) == 400
    (digits, labels), (more, of_more) = gb.datasets.mnist_10k()
    images = np.concatenate([digits, more]).reshape(-1, 28, 28)
    known = np.concatenate([labels, of_more])
    for x, y in [(X[0], Y[0]), (X[299], Y[299]), (X_test[99], Y_test[99])]:
        wide = np.pad(x.reshape(28, 28), 2)
        whole = [
            image
            for down in range(5)
            for across in range(5)
            for image in np.flatnonzero(
                (images[:, 2:-2, 2:-2] == wide[down : down + 28, across : across + 28][2:-2, 2:-2]).all((1, 2))
            )
        ]
        assert y in known[whole]
