"""The memory of a run: planned, verified by one step, and micro-batches halved when it runs out."""

from __future__ import annotations

import contextlib
import gc
import math
from collections.abc import Sequence

import numpy as np

from gpubatch.backend import Array
from gpubatch.errors import InsufficientMemoryError, NonFiniteError
from gpubatch.loader import Loader, epochs_of
from gpubatch.metrics import of_batches
from gpubatch.nn import EVALUATION_ROWS, Network, core_of, evenly
from gpubatch.nn.losses import counts_of
from gpubatch.ops import SQUARE_SUM_SIZE
from gpubatch.optim import Optimizer, rehearse_update
from gpubatch.train.checks import check_last_batch, why_eager
from gpubatch.train.ledger import AHEAD
from gpubatch.train.record import Record, Steps
from gpubatch.train.validation import HeldOut

__all__ = ["evaluate", "halve", "memory_message", "memory_parts", "plan_batches", "power_below", "settle_batches"]


def memory_parts(
    net: Network,
    opt: Optimizer,
    batch_size: int,
    evaluated: int = 0,
    copied: int = 0,
    weighted: bool = False,
    background: bool = False,
) -> dict[str, int]:
    """The bytes that training needs beside those of the loader, by what they are for; allocates nothing.

    ``evaluated`` is how many samples are evaluated after an epoch, ``copied`` how many bytes were allocated for them,
    ``weighted`` whether samples have weights, ``background`` whether checkpoints are written in the background.
    """
    norm = 8 * SQUARE_SUM_SIZE + 2 * net.compute_dtype.itemsize
    of_net = net.memory_parts(batch_size, evaluated, weighted)
    parts = {**of_net, **opt.memory_parts(), "norm of the gradient": norm, "validation set": copied}
    if background and net.backend.name == "cpu":  # those of a GPU's arrays are in main memory
        state = sum(int(views.flat.nbytes) for views in (net.parameters, net.buffers, *opt.state.values()))
        parts["copies for a checkpoint in the background"] = state
    return parts


def plan_batches(
    net: Network,
    loader: Loader,
    opt: Optimizer,
    evaluated: int = 0,
    copied: int = 0,
    most: int | None = None,
    captured: bool | None = None,
    read: int = 0,
    available: int | None = None,
    background: bool = False,
) -> None:
    """Make the loader's plan with :func:`memory_parts` counted; ``most`` is the largest batch size to choose.

    ``captured`` tells whether steps are captured; by default they are wherever they can be. ``read`` is how many bytes
    the batches of a validation set take that is read. ``available`` is how many bytes there are; by default all that
    the backend has. ``background`` tells whether checkpoints are written in the background.
    """
    held = memory_parts(net, opt, 1, 0, copied)
    if net.backend.name == "cpu" and opt.t == 0:  # an operating system takes memory on first write
        held = {name: held[name] for name in ("parameters", "running statistics", "validation set")}
    allocated = sum(n for name, n in held.items() if not name.startswith("workspace"))
    if captured is None:
        captured = not why_eager(net, loader, opt)

    weighted = epochs_of(loader).columns.weights is not None

    def parts_of(batch_size: int) -> dict[str, int]:
        batches = {"batches of validation": read} if read else {}
        return {**memory_parts(net, opt, batch_size, evaluated, copied, weighted, background), **batches}

    kept, least_rows = AHEAD if captured else 0, core_of(net).least_rows
    epochs_of(loader).replan(parts_of, allocated, available, most, kept, least_rows)


def settle_batches(
    net: Network,
    loader: Loader,
    opt: Optimizer,
    held_out: HeldOut | None,
    captured: bool | None = None,
    background: bool = False,
) -> None:
    """Make the loader's plan; try a batch size that it chose, and a smaller one if memory runs out."""
    evaluated, copied, read = 0, 0, 0
    if held_out is not None:
        evaluated, copied, read = held_out.samples, held_out.copied, held_out.batch_bytes
    plan_batches(net, loader, opt, evaluated, copied, captured=captured, read=read, background=background)
    check_last_batch(net, loader)
    while epochs_of(loader).automatic and (failure := rehearse(net, loader, opt, held_out)) is not None:
        core_of(net).release()
        free_unused(net)
        if loader.batch_size <= core_of(net).least_rows:
            raise InsufficientMemoryError(f"there is no memory for a step of {loader.batch_size} samples: {failure}")
        most = power_below(loader.batch_size)
        plan_batches(net, loader, opt, evaluated, copied, most, captured, read, background=background)
        check_last_batch(net, loader)


def rehearse(net: Network, loader: Loader, opt: Optimizer, held_out: HeldOut | None) -> str | None:
    """Make steps of both sizes and validate, without a trace; for what there was no memory, in words."""
    try:
        epochs = epochs_of(loader)
        held = [epochs.peek()]
        held += [[array.copy() for array in held[0]] for _ in range(1, epochs.batches_held)]
        core_of(net).rehearse(*held[0])
        if epochs.last_size < len(held[0][0]):
            core_of(net).rehearse(*(array[: epochs.last_size] for array in held[0]))
        rehearse_update(opt, net.parameters.grads)
        if held_out is not None:
            with contextlib.suppress(NonFiniteError):  # only memory is in question
                X, Y, weights = held_out.first()
                net.evaluate(X, Y, **weights)
    except MemoryError as error:
        return memory_message(error)
    return None


def halve(record: Record, drivers: Sequence[Steps], failure: str) -> None:
    """Compute half as many samples at a time from here on, as there was no memory for ``failure``."""
    net = record.state.net
    size = record.history.micro_batch_size or record.state.loader.batch_size
    if size <= core_of(net).least_rows:
        rows = "one sample" if size == 1 else f"{size} samples"
        raise InsufficientMemoryError(f"not even {rows} at a time can be computed in the memory there is: {failure}")
    record.halved(power_below(size), failure)
    for steps in drivers:
        steps.release()
    free_unused(net)


def evaluate(net: Network, held_out: HeldOut, rows: int | None) -> tuple[float, float | None] | str:
    """Loss and accuracy, at most ``rows`` samples at a time; or for what there was no memory, in words.

    Those of several batches are means over all samples that count: as if they were one, but for rounding.
    """
    rows = min(rows or EVALUATION_ROWS, EVALUATION_ROWS)
    found, sizes = list[tuple[float, float | None]](), list[tuple[float, float]]()

    def size(X: Array, Y: Array, weight: Array | None) -> float:
        counts = counts_of(core_of(net).loss, Y, weight)
        return float(len(X) if counts is None else counts.sum(dtype=np.float64).item())

    try:
        with held_out.batches() as batches:
            for X, Y, weights in batches:
                weight = weights.get("weight")
                in_loss = size(X, Y, weights.get("loss_weight", weight))
                if in_loss:
                    found.append(net.evaluate(X, Y, rows, **weights))
                    sizes.append((in_loss, size(X, Y, weight)))
            if not found:
                return net.evaluate(X, Y, rows, **weights)  # which says that there is nothing to take the mean of
    except InsufficientMemoryError:
        raise
    except MemoryError as error:
        return memory_message(error)
    if len(found) == 1:
        return found[0]
    in_losses, compared = zip(*sizes, strict=True)
    loss = math.fsum(size * loss for size, (loss, _) in zip(in_losses, found, strict=True)) / sum(in_losses)
    right = [size * accuracy for size, (_, accuracy) in zip(compared, found, strict=True) if accuracy is not None]
    return loss, math.fsum(right) / sum(compared) if right else None


def measured(net: Network, held_out: HeldOut, rows: int | None, metrics: Sequence[str]) -> dict[str, float] | str:
    """Metrics on the validation set, at most ``rows`` samples at a time; or for what there was no memory, in words."""
    most = min(rows or EVALUATION_ROWS, EVALUATION_ROWS)
    try:
        with held_out.batches() as batches:
            parts = (
                (X[part], Y[part], None if (weight := weights.get("weight")) is None else weight[part])
                for X, Y, weights in batches
                for part in evenly(len(X), most)
            )
            return of_batches(net, parts, metrics)
    except InsufficientMemoryError:
        raise
    except MemoryError as error:
        return memory_message(error)


def memory_message(error: MemoryError) -> str:
    """For what there was no memory, in words: the error itself would keep the arrays of its traceback alive."""
    return str(error) or "out of memory"


def free_unused(net: Network) -> None:
    """Free all memory that nothing refers to any more."""
    gc.collect()
    net.backend.free_unused()


def power_below(n: int) -> int:
    """The largest power of two below ``n``."""
    return 1 << ((n - 1).bit_length() - 1)
