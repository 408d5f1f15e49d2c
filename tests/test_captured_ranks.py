"""Captured steps on several GPUs: the bits of eager ones, and of any number of ranks, whatever happens to one of them.

Ranks are threads, each with a device of its own.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest
from many_ranks import on_threads
from needs import missing

import gpubatch as gb
from gpubatch.backend import CudaBackend
from gpubatch.passes import DataPass, Deal

pytestmark = pytest.mark.gpu

ROWS, FEATURES, CLASSES, SHARDS = 154, 12, 5, 4  # batches of 16; the last one has 10 rows, in parts of 3, 3, 2 and 2
WIDTHS = 1, 2, 4  # numbers of ranks

draw = np.random.default_rng(0)
X = draw.standard_normal((ROWS, FEATURES), np.float32)
Y = draw.integers(0, CLASSES, ROWS)
WEIGHT = draw.random(ROWS, np.float32)

CASE: dict[str, Any] = {"dropout": 0.3, "l2": 0.01, "norm": True, "weight": WEIGHT, "precision": "mixed"}


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

    def steps(r: gb.Ranks, captured: bool) -> tuple[str, float]:
        device = gpu(r)
        with device.own_stream():
            net, opt = network(device, CASE)
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
