"""What a captured step finds on the device: its batch, whether it may be applied, and where it goes on."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from emulate import ORDERS, Table, check_compiles_everywhere, host_kernel, sanitized
from families import every
from optimizer_table import CASES, trace_of
from stand_in import DeviceArray, parameters_of, stand_in_backend

from gpubatch.backend import compute_dtype
from gpubatch.ops import SQUARE_SUM_SIZE, Grid, gather_batch, square_grid, take_batch, update_source
from gpubatch.ops.compile import C_TYPES
from gpubatch.ops.gather import take_source
from gpubatch.ops.update import HostUpdate, piece_table
from gpubatch.train.graphs import step_source
from gpubatch.train.parts import parts_source

SLOT, HALTED, BATCH, STEP, TICKET = range(5)  # of kernels/step.cuh
LARGEST = float(np.finfo(np.float32).max)


def launch(name: str, dtype: str, *arguments: Any, blocks: int = 1, threads: int = 1, order: str = "forward") -> None:
    source = step_source(dtype)
    host_kernel(source, name, *parameters_of(source, name))(*arguments, blocks, threads, order=order)


def test_they_compile_for_real_architectures(dtype: np.dtype) -> None:
    names = {report.name for reports in check_compiles_everywhere(step_source(dtype.name)) for report in reports}
    assert names == {"add_loss", "judge"}
    names = {report.name for reports in check_compiles_everywhere(parts_source(dtype.name)) for report in reports}
    assert names == {"clip_values", "add_noise", "average"}


@pytest.mark.parametrize("stored", C_TYPES)
def test_taking_compiles_for_all_that_can_be_stored(stored: str) -> None:
    for target in {stored, "int64"} - ({"int64"} if stored.startswith("float") else set()):
        check_compiles_everywhere(take_source(stored, target))


# --- may it be applied? ----------------------------------------------------------------------------------------------

# loss, sum of squares, number not finite, largest norm, loss scale; whether applied, factor of the gradients
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
    progress, losses = np.array([2, 0, 7, 9, 0]), np.full(4, -1.0)
    squares = np.zeros(SQUARE_SUM_SIZE)
    squares[:2] = sum_of_squares, odd  # an empty gradient adds nothing
    total, control = np.array([8.0 if whole else loss]), np.full(2, 7, dtype)
    given = np.array([loss], dtype) if whole else None
    factor = None if times is None else np.array([times], dtype)
    state = given, total, factor, progress, losses, control
    launch("judge", dtype.name, np.zeros(0, dtype), 0, squares, *state, most, LARGEST, threads=32)
    assert progress.tolist() == [2, int(not fine), 7, 9, 0]
    assert control[1] == (not fine)
    assert (total[0], squares[0], squares[1]) == (0, 0, 0)
    assert losses.tolist() == [-1, -1, loss if fine else -1, -1]
    if fine:
        assert control[0] == dtype.type(scale)


def test_what_comes_after_a_halt_is_not_applied_and_leaves_no_loss() -> None:
    progress, losses, control = np.array([0, 1, 7, 9, 0]), np.full(4, -1.0), np.full(2, 7, np.float32)
    squares = np.zeros(SQUARE_SUM_SIZE)
    one = np.ones(1, np.float32)
    state = np.zeros(1), None, progress, losses, control
    launch("judge", "float32", one, 1, squares, one, *state, 0.0, LARGEST, threads=32)
    assert (progress.tolist(), losses.tolist(), control.tolist()) == ([0, 1, 7, 9, 0], [-1.0] * 4, [1, 1])


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("n", [1, 20_000, 100_003])
def test_the_gradient_that_is_judged(n: int, order: str, dtype: np.dtype, rng: np.random.Generator) -> None:
    """The whole gradient, by many blocks, with the bits of square_sum; repeatedly, as in a graph."""
    gradient = rng.standard_normal(n).astype(dtype)
    progress, losses, control = np.zeros(5, int), np.full(4, -1.0), np.full(2, 7, compute_dtype(dtype))
    squares, one = np.zeros(SQUARE_SUM_SIZE), np.ones(1, control.dtype)
    for bad in (False, False, True):
        if bad:
            gradient[-1] = np.inf
        state = one, np.zeros(1), None, progress, losses, control
        (blocks,) = square_grid(gradient)
        launch(
            "judge", dtype.name, gradient, n, squares, *state, 0.25, LARGEST, blocks=blocks, threads=1024, order=order
        )
        assert (squares[:3].tolist(), progress.tolist()) == ([0, 0, 0], [0, int(bad), 0, 0, 0])
        if not bad:
            norm = np.linalg.norm(gradient.astype(np.float64))
            np.testing.assert_allclose(control[0], min(1, 0.25 / norm), rtol=2 * np.finfo(control.dtype).eps)


def test_losses_of_parts_are_added_as_the_host_adds_them(rng: np.random.Generator) -> None:
    total, expected = np.zeros(1), 0.0
    for loss, share in rng.random((50, 2)).tolist():
        loss = float(np.float32(loss))
        launch("add_loss", "float32", np.array([loss], np.float32), total, np.float64(share))
        expected += share * loss
    assert total[0] == expected


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("n", [0, 1, 5000])
@pytest.mark.parametrize("halted", [0, 1])
def test_the_end_of_a_step(halted: int, n: int, order: str, dtype: np.dtype, rng: np.random.Generator) -> None:
    """The update with the slot's scalars, and on to the next step; or no update, and the earlier statistics."""
    trace, hyper = trace_of(CASES["momentum"])
    wide, rows = compute_dtype(dtype), [trace.evaluate(t, **hyper) for t in range(1, 5)]
    arrays = [np.abs(rng.standard_normal(10_001)).astype(d) for d in (dtype, dtype, wide)]
    expected = [a.copy() if halted else a.astype(wide) for a in arrays]
    if not halted:
        HostUpdate(trace, wide)([tuple(expected)], [rows[2]])
    addresses = np.array([[*(a.ctypes.data for a in arrays), arrays[0].size, 0]])
    table = Table(piece_table(addresses, np.array([a.itemsize for a in arrays]), 4096), arrays)
    progress, running, before = np.array([2, halted, 7, 9, 0]), np.ones(n, wide), np.full(n, 2, wide)
    kept = (running, before, n) if n else (None, None, 0)
    arguments = [np.array(rows, wide), len(rows[0]), None, progress, *kept, None]
    source = update_source(trace, wide.name, dtype.name)
    found = sanitized(
        source,
        "update_arrays",
        parameters_of(source, "update_arrays"),
        [table, *arguments],
        len(table.words),
        256,
        order,
    )
    for a, b in zip(found, expected, strict=False):
        np.testing.assert_array_equal(a, b.astype(a.dtype))
    assert found[len(arrays) + 1].tolist() == ([2, 1, 7, 9, 0] if halted else [3, 0, 8, 10, 0])
    if n:
        np.testing.assert_array_equal(found[len(arrays) + 2], 2 if halted else 1)


# --- its batch -------------------------------------------------------------------------------------------------------


@every("stored", [*C_TYPES], ["bool", "uint8", "int64", "float16", "float32"])
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
            take_batch(Grid(device, np.dtype("float32")), device.asarray(source), device.asarray(order), at, out, size)
            np.testing.assert_array_equal(out, expected.astype(target))
        scaled = device.empty(expected.shape, "float32")
        gather_batch(
            Grid(device, np.dtype("float32")), device.asarray(source), device.asarray(order), at, scaled, 0.5, 0.0, size
        )
        np.testing.assert_array_equal(scaled, np.float32(0.5) * expected.astype("float32"))
        assert type(scaled) is DeviceArray
