"""Captured steps on several GPUs: the bits of eager ones, and of any number of ranks, whatever happens to one of them.

Ranks are threads, each with a device of its own; the last part has processes.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from many_ranks import mpi, on_threads
from needs import missing

import gpubatch as gb
from gpubatch.backend import CudaBackend
from gpubatch.nn import core_of
from gpubatch.nn.dealt import DealtSteps
from gpubatch.passes import DataPass, Deal
from gpubatch.train import captured, graphs

pytestmark = pytest.mark.gpu

ROWS, FEATURES, CLASSES, SHARDS = 154, 12, 5, 4  # batches of 16; the last one has 10 rows, in parts of 3, 3, 2 and 2
WIDTHS = 1, 2, 4  # numbers of ranks

draw = np.random.default_rng(0)
X = draw.standard_normal((ROWS, FEATURES), np.float32)
Y = draw.integers(0, CLASSES, ROWS)
WEIGHT = draw.random(ROWS, np.float32)

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "dropout, l2, clipped": {"dropout": 0.3, "l2": 0.01, "max_norm": 0.5},
    "batch norm": {"norm": True},
    "weights": {"weight": WEIGHT},
    "mixed": {"precision": "mixed"},
    "a skipped step": {"damaged": 1e30},
    "all of it": {"dropout": 0.3, "l2": 0.01, "norm": True, "weight": WEIGHT, "precision": "mixed", "damaged": 6e4},
}


@pytest.fixture(autouse=True)
def few_steps_in_a_graph(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(graphs, "UNROLLED", 3)
    with warnings.catch_warnings():  # of few steps, and of skipped ones
        warnings.simplefilter("ignore", UserWarning)
        yield


def gpu(r: gb.Ranks) -> CudaBackend:
    """The device of a rank."""
    device = gb.get_backend(f"cuda:{r.rank}")
    assert isinstance(device, CudaBackend)
    return device


def gpus(count: int) -> int:
    """``count``, if there are so many devices; else the test is skipped."""
    if f"cuda:{count - 1}" not in gb.available_backends():
        missing("gpu", f"{count} CUDA devices are needed here")
    return count


def network(device: CudaBackend, case: dict[str, Any]) -> tuple[gb.Network, gb.Optimizer]:
    norm = [gb.BatchNorm(16)] if "norm" in case else []
    dropout = [gb.Dropout(case["dropout"])] if "dropout" in case else []
    layers = [gb.Dense(FEATURES, 16), *norm, gb.GELU(), *dropout, gb.Dense(16, CLASSES)]
    precision = case.get("precision", "full")
    net = gb.Network(layers, l2=case.get("l2", 0.0), backend=device, seed=1, precision=precision)
    rate = gb.ExponentialDecay(0.01, 0.9, per="step")
    return net, gb.Adam(net.parameters, rate, master_weights=precision == "mixed")


def digest(net: gb.Network) -> str:
    arrays = net.parameters.flat, net.buffers.flat
    return hashlib.sha256(b"".join(net.backend.to_numpy(array).tobytes() for array in arrays)).hexdigest()


def test_a_step_by_hand_is_the_eager_one_on_any_number_of_ranks() -> None:
    gpus(max(WIDTHS))
    case = CASES["all of it"]

    def steps(r: gb.Ranks, captured: bool) -> tuple[str, float]:
        device = gpu(r)
        with device.own_stream():
            net, opt = network(device, case)
            made = dict[int, tuple[gb.CapturedStep, list[Any]]]()
            given = DataPass(object(), 0)
            given.begin()
            for number, rows in enumerate([16, 16, 10, 16, 10]):
                deal = Deal.of(rows, SHARDS, r.rank, r.size)
                own = slice(number + deal.first, number + deal.first + sum(deal.parts))
                x, y, weight = batch = [
                    device.asarray(X[own], net.dtype), device.asarray(Y[own]), device.asarray(WEIGHT[own])
                ]  # fmt: skip
                given.give_out(batch, deal)
                if not captured:
                    loss, _ = net.loss_and_grad(x, y, weight=weight, ranks=r)
                    opt.step()
                    continue
                if rows not in made:
                    made[rows] = gb.CapturedStep(net, opt, x, y, weight=weight, ranks=r), batch
                step, places = made[rows]
                for place, array in zip(places, batch, strict=True):
                    place[...] = array
                loss = step().item()
            given.end()
            return digest(net), loss

    found = {of for size in WIDTHS for way in (False, True) for of in on_threads(size, lambda r: steps(r, way))}  # noqa: B023
    assert len(found) == 1


Outcome = tuple[str, tuple[float, ...], int, int, int | None]


def fitted(r: gb.Ranks, case: dict[str, Any], execution: str, feed: str = "auto", **more: Any) -> tuple[Outcome, str]:
    """What two epochs give on a rank, and how its steps were made."""
    device = gpu(r)
    net, opt = network(device, case)
    x = X.copy()
    if "damaged" in case:
        x[7] = case["damaged"]
    weight = {"weight": case["weight"]} if "weight" in case else {}
    loader = gb.Loader(x, Y, 16, seed=2, backend=device, feed=feed, ranks=r, shards=SHARDS, **weight)
    more = {"max_norm": case.get("max_norm"), "validation": (X[:20], Y[:20])} | more
    h = gb.fit(net, loader, opt, 2, progress=False, execution=execution, ranks=r, **more)
    return (digest(net), tuple(h.step_loss), h.skipped, h.overflows, h.micro_batch_size), h.execution


@pytest.mark.parametrize("name", CASES)
def test_a_run_has_the_same_bits_captured_and_on_any_number_of_ranks(name: str) -> None:
    gpus(max(WIDTHS))
    found = set()
    for size in WIDTHS:
        for execution, feed in (("eager", "auto"), ("captured", "auto"), ("captured", "host")):
            for outcome, made in on_threads(size, lambda r: fitted(r, CASES[name], execution, feed)):  # noqa: B023
                assert made == execution
                found.add(outcome)
    (outcome,) = found
    assert (outcome[2] + outcome[3] > 0) == ("damaged" in CASES[name] or name == "mixed")


# --- what happens to one rank -----------------------------------------------------------------------------------------


def test_all_ranks_are_eager_where_one_cannot_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(2)
    why = captured.why_eager
    monkeypatch.setattr(
        captured, "why_eager", lambda net, *others: why(net, *others) or "no cuBLASLt" * net.backend.index
    )
    (expected, made), *_ = on_threads(1, lambda r: fitted(r, CASES["plain"], "auto"))
    assert made == "captured"
    for outcome, made in on_threads(2, lambda r: fitted(r, CASES["plain"], "auto")):
        assert (outcome, made) == (expected, "eager, since on rank 1, no cuBLASLt")

    def refused(r: gb.Ranks) -> None:
        with pytest.raises(gb.errors.ArgumentError, match="got 'captured': on rank 1, no cuBLASLt"):
            fitted(r, CASES["plain"], "captured")

    on_threads(2, refused)


@pytest.mark.parametrize("failing", ["capture", "empty"])
def test_a_capture_that_fails_on_one_rank_fails_on_all(failing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the capture itself, or in the rehearsal before it, whose sum the other rank would wait for in vain."""
    gpus(2)
    (expected, _), *_ = on_threads(1, lambda r: fitted(r, CASES["plain"], "eager"))
    if failing == "capture":
        capture = CudaBackend.capture

        def broken(self: CudaBackend, work: Any) -> Any:
            if self.index == 1:
                raise RuntimeError("a driver of another age")
            return capture(self, work)

        monkeypatch.setattr(CudaBackend, "capture", broken)
    else:
        enqueue = DealtSteps.enqueue

        def stuck(self: Any, *arguments: Any) -> Any:
            if self.backend.index == 1:
                raise RuntimeError("a driver of another age")
            return enqueue(self, *arguments)

        monkeypatch.setattr(DealtSteps, "enqueue", stuck)
    found = on_threads(2, lambda r: fitted(r, CASES["plain"], "auto"))
    for (outcome, made), words in zip(found, (" (on rank 1)", ""), strict=True):
        assert (outcome, made) == (expected, f"eager, since the capture failed: a driver of another age{words}")


def test_memory_that_runs_out_on_one_rank_halves_on_all(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(2)
    kind = type(core_of(network(gpu(gb.Ranks()), {})[0]))
    reserve = kind.reserve

    def full(self: Any, rows: int) -> None:
        # In the steps: evaluation, which has rows enough, is no part of them.
        if self.backend.index == self.full_on and rows > 2:
            raise MemoryError("there is no room for these rows")
        reserve(self, rows)

    def run(r: gb.Ranks, full_on: int, execution: str) -> tuple[Outcome, str]:
        kind.full_on = full_on
        return fitted(r, CASES["plain"], execution)

    monkeypatch.setattr(kind, "reserve", full)
    monkeypatch.setattr(kind, "full_on", 0, raising=False)
    found = {
        on for size, on_rank in ((1, 0), (2, 0), (2, 1)) for way in ("eager", "captured")
        for on in on_threads(size, lambda r: (*run(r, on_rank, way)[0],))  # noqa: B023
    }  # fmt: skip
    (outcome,) = found
    assert outcome[4] == 2


def test_ranks_that_share_a_gpu_are_told_on_all() -> None:
    device = f"cuda:{gpus(1) - 1}"

    def refused(r: gb.Ranks) -> None:
        net, opt = network(gb.get_backend(device), {})  # type: ignore[arg-type]
        loader = gb.Loader(X, Y, 16, backend=device, ranks=r, shards=SHARDS)
        with pytest.raises(gb.errors.ArgumentError, match="ranks 0 and 1 have the same GPU"):
            gb.fit(net, loader, opt, 1, progress=False, ranks=r)

    on_threads(2, refused)


def test_ranks_on_different_kinds_of_devices_are_told_on_all() -> None:
    gpus(1)

    def refused(r: gb.Ranks) -> None:
        device = gb.get_backend("cpu" if r.rank else "cuda:0")
        net, opt = network(device, {})  # type: ignore[arg-type]
        loader = gb.Loader(X, Y, 16, backend=device, ranks=r, shards=SHARDS)
        with pytest.raises(gb.errors.ArgumentError, match="all ranks must have the same backend"):
            gb.fit(net, loader, opt, 1, progress=False, ranks=r)

    on_threads(2, refused)


# --- processes --------------------------------------------------------------------------------------------------------

RUN = """
import os, signal, sys
import gpubatch as gb
from gpubatch.train.captured import CapturedSteps
from test_captured_ranks import CASES, digest, network, X, Y
from pathlib import Path
ranks, (folder, fault) = gb.Ranks(), sys.argv[1:]
device = gb.get_backend("cuda")
assert device.spec == f"cuda:{ranks.local}"
note = CapturedSteps._note
def noting(self, queue):
    noted = note(self, queue)
    if fault and ranks.rank == 1 and noted:
        os.kill(os.getpid(), getattr(signal, fault))
    return noted
CapturedSteps._note = noting
net, opt = network(device, CASES["dropout, l2, clipped"])
loader = gb.Loader(X, Y, 16, seed=2, backend=device, ranks=ranks, shards=4)
store = gb.Checkpoints(folder, every=1000)
try:
    h = gb.fit(net, loader, opt, 2, progress=False, execution="captured", ranks=ranks, checkpoint=store, resume=True)
except gb.TrainingTerminated as error:
    said = f"stopped {opt.t} {error}"
else:
    said = f"done {opt.t} {digest(net)}"
print(said.split(";")[0] + "\\n", end="")
"""


@pytest.mark.exhaustive
def test_a_signal_to_one_process_stops_all_after_the_same_step_and_the_run_goes_on(tmp_path: Any) -> None:
    gpus(4)
    expected = set(mpi(1, RUN, tmp_path / "whole", "").stdout.splitlines())
    stopped = set(mpi(2, RUN, tmp_path / "cut", "SIGTERM").stdout.splitlines())
    (line,) = stopped
    assert line.startswith("stopped")
    assert set(mpi(4, RUN, tmp_path / "cut", "").stdout.splitlines()) == expected


@pytest.mark.exhaustive
def test_a_process_that_is_killed_between_steps_ends_all(tmp_path: Any) -> None:
    gpus(2)
    done = mpi(2, RUN, tmp_path, "SIGKILL", check=False)
    assert done.returncode != 0
    assert "done" not in done.stdout
