"""What a captured step finds on the device: its batch, whether it may be applied, and where it goes on."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from emulate import check_compiles_everywhere, host_kernel, sanitized
from families import every
from stand_in import DeviceArray, parameters_of, stand_in_backend

from gpubatch.backend import CudaBackend
from gpubatch.cuda_ops import STORED, CudaOps, source_of
from gpubatch.ops import SQUARE_SUM_SIZE

SLOT, HALTED, BATCH, STEP = range(4)  # of kernels/step.cu
LARGEST = float(np.finfo(np.float32).max)


def launch(name: str, dtype: str, *arguments: Any, threads: int = 1) -> None:
    source = source_of(dtype, "step.cu")
    host_kernel(source, name, *parameters_of(source, name))(*arguments, 1, threads)


def test_they_compile_for_real_architectures(dtype: np.dtype) -> None:
    names = {
        report.name for reports in check_compiles_everywhere(source_of(dtype.name, "step.cu")) for report in reports
    }
    assert names == {"add_loss", "judge", "go_on"}


@pytest.mark.parametrize("stored", STORED)
def test_taking_compiles_for_all_that_can_be_stored(stored: str) -> None:
    for target in {stored, "int64"} - ({"int64"} if stored.startswith("float") else set()):
        types = f"typedef {STORED[stored]} Sample;\ntypedef {STORED[target]} Target;"
        check_compiles_everywhere(source_of("float32", "take.cu", before=types))


# --- may it be applied? ----------------------------------------------------------------------------------------------

# loss, sum of squares, how many are not finite, largest norm, loss scale; is it fine, what are gradients multiplied by
JUDGED = {
    "all is well": (0.5, 4.0, 0, 0.0, None, True, 1.0),
    "below the largest norm": (0.5, 4.0, 0, 2.0, None, True, 1.0),
    "above it": (0.5, 9.0, 0, 0.75, None, True, 0.25),
    "no gradient": (0.5, 0.0, 0, 1.0, None, True, 1.0),
    "the loss is NaN": (math.nan, 4.0, 0, 1.0, None, False, None),
    "the loss is infinite": (-math.inf, 4.0, 0, 0.0, None, False, None),
    "a gradient is NaN": (0.5, math.nan, 1, 1.0, None, False, None),
    "a gradient is infinite": (0.5, math.inf, 2, 1.0, None, False, None),
    "its square is beyond double": (0.5, math.inf, 0, 1.0, None, False, None),
    "squares would overflow": (0.5, 1e39, 0, 0.0, None, False, None),
    "squares would overflow if it were not for the norm": (0.5, 1e40, 0, 1.0, None, True, 1e-20),
    "a loss scale": (0.5, 2.0**80, 0, 0.0, 2.0**30, True, 2.0**-30),
    "a loss scale below the largest norm": (0.5, 2.0**20, 0, 1.0, 2.0**10, True, 2.0**-10),
    "a loss scale above it": (0.5, 2.0**20, 0, 0.25, 2.0**8, True, 2.0**-12),
    "a loss scale of one, and squares that would overflow": (0.5, 1e39, 0, 0.0, 1.0, False, None),
    "a loss scale that is too large": (0.5, math.inf, 3, 0.0, 2.0**24, False, None),
}


@pytest.mark.parametrize("whole", [True, False], ids=["loss", "total of parts"])
@pytest.mark.parametrize("case", JUDGED.values(), ids=JUDGED)
def test_judge(case: tuple[Any, ...], whole: bool, dtype: np.dtype) -> None:
    loss, sum_of_squares, odd, most, times, fine, scale = case
    progress, losses = np.array([2, 0, 7, 9]), np.full(4, -1.0)
    squares = np.full(SQUARE_SUM_SIZE, 3.0)
    squares[:2] = sum_of_squares, odd
    total, control = np.array([8.0 if whole else loss]), np.full(2, 7, dtype)
    given = np.array([loss], dtype) if whole else None
    factor = None if times is None else np.array([times], dtype)
    launch("judge", dtype.name, given, total, squares, factor, progress, losses, control, most, LARGEST)
    assert progress.tolist() == [2, int(not fine), 7, 9]
    assert control[1] == (not fine)
    assert (total[0], squares[0], squares[1]) == (0, 0, 0)
    assert losses.tolist() == [-1, -1, loss if fine else -1, -1]
    if fine:
        assert control[0] == dtype.type(scale)


def test_what_comes_after_a_halt_is_not_applied_and_leaves_no_loss() -> None:
    progress, losses, control = np.array([0, 1, 7, 9]), np.full(4, -1.0), np.full(2, 7, np.float32)
    squares = np.zeros(SQUARE_SUM_SIZE)
    one = np.ones(1, np.float32)
    launch("judge", "float32", one, np.zeros(1), squares, None, progress, losses, control, 0.0, LARGEST)
    assert (progress.tolist(), losses.tolist(), control.tolist()) == ([0, 1, 7, 9], [-1.0] * 4, [1, 1])


def test_without_squares_nothing_is_looked_at() -> None:
    progress, losses, control = np.zeros(4, int), np.full(4, -1.0), np.full(2, 7, np.float32)
    nan = np.full(1, np.nan, np.float32)
    launch("judge", "float32", nan, np.zeros(1), None, None, progress, losses, control, 0.0, LARGEST)
    assert (progress.tolist(), control.tolist(), math.isnan(losses[0])) == ([0] * 4, [1, 0], True)


def test_losses_of_parts_are_added_as_the_host_adds_them(rng: np.random.Generator) -> None:
    total, expected = np.zeros(1), 0.0
    for loss, share in rng.random((50, 2)).tolist():
        loss = float(np.float32(loss))
        launch("add_loss", "float32", np.array([loss], np.float32), total, np.float64(share))
        expected += share * loss
    assert total[0] == expected


@pytest.mark.parametrize("n", [0, 1, 5000])
@pytest.mark.parametrize("halted", [0, 1])
def test_on_to_the_next_step_or_back_to_the_statistics_before(halted: int, n: int, dtype: np.dtype) -> None:
    progress, running, before = np.array([3, halted, 7, 9]), np.ones(n, dtype), np.full(n, 2, dtype)
    arguments = [progress, running if n else None, before if n else None, n]
    launch("go_on", dtype.name, *arguments, threads=1024)
    assert progress.tolist() == ([3, 1, 7, 9] if halted else [4, 0, 8, 10])
    np.testing.assert_array_equal(running, 2 if halted else 1)
    source = source_of(dtype.name, "step.cu")
    sanitized(source, "go_on", parameters_of(source, "go_on"), arguments, 1, 1024)


# --- its batch -------------------------------------------------------------------------------------------------------


@every("stored", [*STORED], ["bool", "uint8", "int64", "float16", "float32"])
@pytest.mark.parametrize("shape", [(), (37,), (3, 4)], ids=str)
def test_a_batch_by_its_number(stored: str, shape: tuple[int, ...], rng: np.random.Generator) -> None:
    device, size = stand_in_backend(), 8
    source = rng.integers(0, 2 if stored == "bool" else 100, (50, *shape)).astype(stored)
    order = rng.permutation(50)
    for batch, rows in ((0, 8), (3, 8), (6, 2)):
        expected = source[order[batch * size :][:rows]]
        at = device.asarray(np.array([batch]))
        for target in (stored, "int64"):
            if target == "int64" and stored.startswith("float"):
                continue
            out = device.empty(expected.shape, target)
            ops(device).take_batch(device.asarray(source), device.asarray(order), at, out, size)
            np.testing.assert_array_equal(out, expected.astype(target))
        scaled = device.empty(expected.shape, "float32")
        ops(device).gather_batch(device.asarray(source), device.asarray(order), at, scaled, 0.5, 0.0, size)
        np.testing.assert_array_equal(scaled, np.float32(0.5) * expected.astype("float32"))
        assert type(scaled) is DeviceArray


def ops(device: CudaBackend) -> CudaOps:
    return CudaOps(device, np.dtype("float32"))
