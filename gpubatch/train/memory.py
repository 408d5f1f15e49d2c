"""The memory of a run: planned, verified by one step, and micro-batches halved when it runs out."""

from __future__ import annotations

import contextlib
import gc
import math
import operator
from collections.abc import Sequence

import numpy as np

from gpubatch.backend import Array
from gpubatch.errors import InsufficientMemoryError, NonFiniteError
from gpubatch.loader import Loader, epochs_of
from gpubatch.metrics import of_batches
from gpubatch.nn import EVALUATION_ROWS, Network, core_of, dealt_of, evenly
from gpubatch.nn.losses import counts_of
from gpubatch.ops import SQUARE_SUM_SIZE
from gpubatch.optim import Optimizer, rehearse_update
from gpubatch.train.checks import check_last_batch, why_eager
from gpubatch.train.ledger import AHEAD
from gpubatch.train.record import Record, Steps
from gpubatch.train.together import ALONE, Agreement
from gpubatch.train.validation import HeldOut


def memory_parts(
    net: Network,
    opt: Optimizer,
    batch_size: int,
    evaluated: int = 0,
    copied: int = 0,
    weighted: bool = False,
    background: bool = False,
    loader: Loader | None = None,
) -> dict[str, int]:
    """The bytes that training needs beside those of the loader, by what they are for; allocates nothing.

    ``evaluated`` is how many samples are evaluated after an epoch, ``copied`` how many bytes were allocated for them,
    ``weighted`` whether samples have weights, ``background`` whether checkpoints are written in the background. Where a
    ``loader`` cuts batches into shards, ``batch_size`` is that of a shard.
    """
    norm = 8 * SQUARE_SUM_SIZE + 2 * net.compute_dtype.itemsize
    if loader is None or loader.shards is None:
        of_net = net.memory_parts(batch_size, evaluated, weighted)
    else:
        of_net = net.memory_parts(batch_size * loader.shards, evaluated, weighted, loader.shards, loader.ranks)
    parts = {**of_net, **opt.memory_parts(), "norm of the gradient": norm, "validation set": copied}
    if background and net.backend.name == "cpu":  # those of a GPU's arrays are in main memory
        state = sum(int(views.flat.nbytes) for views in (net.parameters, net.buffers, *opt.state.values()))
        parts["copies for a checkpoint in the background"] = state
    return parts


def plan_batches(
    net: Network,
    loader: Loader,
    opt: Optimizer,
    held_out: HeldOut | None = None,
    most: int | None = None,
    captured: bool | None = None,
    available: int | None = None,
    background: bool = False,
) -> None:
    """Make the loader's plan with :func:`memory_parts` counted; ``most`` is the largest batch size to choose.

    ``held_out`` is what is evaluated after an epoch. ``captured`` tells whether steps are captured; by default they are
    wherever they can be. ``available`` is how many bytes there are; by default all that the backend has. ``background``
    tells whether checkpoints are written in the background.
    """
    evaluated, copied, read = 0, 0, 0
    if held_out is not None:
        evaluated, copied, read = held_out.samples, held_out.copied, held_out.batch_bytes
    held = memory_parts(net, opt, 1, 0, copied)
    if net.backend.name == "cpu" and opt.t == 0:  # an operating system takes memory on first write
        held = {name: held[name] for name in ("parameters", "running statistics", "validation set")}
    allocated = sum(n for name, n in held.items() if not name.startswith("workspace"))
    if captured is None:
        captured = not why_eager(net, loader, opt)
    weighted = epochs_of(loader).columns.weights is not None

    def parts_of(rows: int) -> dict[str, int]:
        batches = {"batches of validation": read} if read else {}
        return {**memory_parts(net, opt, rows, evaluated, copied, weighted, background, loader), **batches}

    kept, least_rows = AHEAD if captured else 0, core_of(net).least_rows
    epochs_of(loader).replan(parts_of, allocated, available, most, kept, least_rows)


def rows_at_once(net: Network, loader: Loader, batch_size: int) -> int:
    """The rows of such a batch that a step computes together: all, or those of the largest part.

    With BatchNorm(sync=True) they are those of all parts that a rank has.
    """
    largest = -(-batch_size // (loader.shards or 1))
    return largest * (loader.shards // loader.world_size) if loader.shards and core_of(net).in_sync else largest


def settle_batches(
    net: Network,
    loader: Loader,
    opt: Optimizer,
    held_out: HeldOut | None,
    captured: bool | None = None,
    background: bool = False,
    together: Agreement = ALONE,
) -> None:
    """Make the loader's plan; try a batch size that it chose, and a smaller one if memory runs out.

    All ranks take a smaller one if memory runs out on any of them.
    """
    epochs = epochs_of(loader)

    def plan(most: int | None = None) -> None:
        with together.phase():
            plan_batches(net, loader, opt, held_out, most, captured, background=background)
            check_last_batch(net, loader)

    plan()
    while epochs.automatic and (failed := together.words(rehearse(net, loader, opt, held_out))) is not None:
        core_of(net).release()
        free_unused(net)
        if loader.batch_size <= core_of(net).least_rows * (loader.shards or 1):
            text = f"there is no memory for a step of {loader.batch_size} samples: {failed[1]}"
            raise together.alike(InsufficientMemoryError(text))
        plan(power_below(loader.batch_size))


def rehearse(net: Network, loader: Loader, opt: Optimizer, held_out: HeldOut | None) -> str | None:
    """Make a step of each batch size and validate, then undo both; returns a message if memory ran out, else None."""
    try:
        epochs = epochs_of(loader)
        held = [epochs.peek()]
        held += [[array.copy() for array in held[0]] for _ in range(1, epochs.batches_held)]
        last = epochs.rows_of(len(epochs) - 1)
        sizes = {min(rows_at_once(net, loader, n), len(held[0][0])) for n in (loader.batch_size, last)}
        # With batch norm in sync a rank may have fewer rows than it takes without the others.
        for rows in sorted((n for n in sizes if n >= core_of(net).least_rows), reverse=True):
            core_of(net).rehearse(*(array[:rows] for array in held[0]))
        if loader.shards is not None:
            dealt_of(net).part_sums(loader.shards // loader.world_size)
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
    net, loader = record.state.net, record.state.loader
    size = record.history.micro_batch_size or rows_at_once(net, loader, loader.batch_size)
    text = ""
    if size <= core_of(net).least_rows:
        rows = "one sample" if size == 1 else f"{size} samples"
        text = f"not even {rows} at a time can be computed in the memory there is: {failure}"
    elif loader.shards is not None and core_of(net).in_sync:
        text = (
            f"BatchNorm(sync=True) needs all {size} samples of a rank at a time, and there is no memory for {failure}"
        )
    if text:
        raise record.together.alike(InsufficientMemoryError(text))
    record.halved(power_below(size), failure)
    for steps in drivers:
        steps.release()
    free_unused(net)


def evaluate(record: Record, held_out: HeldOut) -> tuple[float, float | None] | str:
    """Loss and accuracy, as many samples at a time as a step may have; or a message if memory ran out.

    Those of several batches are means over all samples that count: as if they were one, but for rounding. Of ranks each
    evaluates its share of the batches, and all know the numbers of all.
    """
    net, together = record.state.net, record.together
    rows = min(record.history.micro_batch_size or EVALUATION_ROWS, EVALUATION_ROWS)
    own = list[tuple[float, ...]]()  # of each batch loss and accuracy, and what its samples count in them
    failure: str | None = None

    def size(X: Array, Y: Array, weight: Array | None) -> float:
        counts = counts_of(core_of(net).loss, Y, weight)
        return float(len(X) if counts is None else counts.sum(dtype=np.float64).item())

    with together.phase():
        try:
            with held_out.batches(together.rank, together.size) as batches:
                for X, Y, weights in batches:
                    weight = weights.get("weight")
                    in_loss = size(X, Y, weights.get("loss_weight", weight))
                    if in_loss:
                        loss, accuracy = net.evaluate(X, Y, rows, **weights)
                        own.append((loss, accuracy or 0.0, in_loss, size(X, Y, weight)))
        except InsufficientMemoryError:
            raise
        except MemoryError as error:
            failure = memory_message(error)
    if (failed := together.words(failure)) is not None:
        return failed[1]
    found = [tuple(row) for rows in together.all(own) for row in rows]
    if not found:
        with together.phase():
            X, Y, weights = held_out.first()
            return net.evaluate(X, Y, rows, **weights)  # which says that there is nothing to take the mean of
    losses, accuracies, in_losses, compared = zip(*found, strict=True)
    classifies = core_of(net).loss.classifies
    if len(found) == 1:
        return losses[0], accuracies[0] if classifies else None
    loss = math.fsum(map(operator.mul, in_losses, losses)) / sum(in_losses)
    right = math.fsum(map(operator.mul, compared, accuracies))
    return loss, right / sum(compared) if classifies else None


def measured(record: Record, held_out: HeldOut, metrics: Sequence[str]) -> dict[str, float] | str:
    """Metrics on the validation set, computed by rank 0; or a message if memory ran out."""
    together = record.together
    found: dict[str, float] | str = ""
    with together.phase():
        if together.first:
            found = measured_here(record.state.net, held_out, record.history.micro_batch_size, metrics)
    shared: dict[str, float] | str = together.share(found)
    return shared


def measured_here(net: Network, held_out: HeldOut, rows: int | None, metrics: Sequence[str]) -> dict[str, float] | str:
    """Metrics on the validation set, at most ``rows`` samples at a time; or a message if memory ran out."""
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
    """The message of the error, which itself would keep the arrays of its traceback alive."""
    return str(error) or "out of memory"


def free_unused(net: Network) -> None:
    """Free all memory that nothing refers to any more."""
    gc.collect()
    net.backend.free_unused()


def power_below(n: int) -> int:
    """The largest power of two below ``n``."""
    return 1 << ((n - 1).bit_length() - 1)
