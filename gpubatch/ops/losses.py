"""Losses: the mean over a batch of scores z, ``(batch, outputs)``, and its gradient by them.

The loss goes to ``work["loss"]``, of one element, and with ``gradient`` its gradient to ``work["dz"]``, multiplied
before it is stored by ``work["factor"]``, of one element, if that is there. ``work["ticket"]``, a uint32, is zero at
first; no other kernel may use it at the same time.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np

from gpubatch.backend import Array, compute_dtype
from gpubatch.formula import BoundScoreLoss, score_source
from gpubatch.ops.compile import C_TYPES, scalars_source, source_of
from gpubatch.ops.grid import SUM_PARTS, SUM_THREADS, THREADS, WARP, Grid, total_grid
from gpubatch.ops.host_compiler import place_of
from gpubatch.ops.operation import COMPUTE, Space, Work, operation
from gpubatch.ops.program import MOST_PROGRAMS, program_of

__all__ = ["score_loss", "softmax_cross_entropy", "svm"]

WARP_CLASSES = 256  # up to which a warp has a row of scores for itself
BLOCK_CLASSES = 4096  # from which a block of the most threads has it

PARTIAL_SUMS: Space = ((SUM_PARTS,), np.float64)


# --- one class of many -----------------------------------------------------------------------------------------------


@operation(
    "work.dz",
    scratch=lambda outputs: {
        "t": ((-1, outputs), COMPUTE),
        "row": ((-1,), COMPUTE),
        "index": ((-1,), np.int64),
        "parts": PARTIAL_SUMS,
    },
    numpy_scratch=lambda outputs: dict.fromkeys(("sum", "log", "weight"), ((-1,), COMPUTE)),
)
def softmax_cross_entropy(z: Array, Y: Array, gradient: bool, work: Work) -> None:
    """-Σ_j y_j log softmax(z)_j.

    Y are labels ``(batch,)`` of any integer type, or numbers of the shape of z. A label that is out of range makes the
    loss NaN. NumPy needs ``work["offsets"]``, where each row of scores starts.
    """
    dz, row, sums, log, index = (work[name] for name in ("dz", "row", "sum", "log", "index"))
    if Y.ndim == 1 and not labels_fit(Y, z, work):
        return
    z.max(axis=1, out=row)
    np.subtract(z, row[:, None], out=dz)
    if Y.ndim == 1:
        places_of(Y, work)
        take(dz, index, row)
    else:
        np.multiply(dz, Y, out=work["t"]).sum(axis=1, out=row)
    np.exp(dz, out=dz)
    dz.sum(axis=1, out=sums)
    np.log(sums, out=log)  # the largest exponential is 1, so the logarithm is finite
    if Y.ndim == 2:
        log *= Y.sum(axis=1, dtype=z.dtype, out=work["weight"])
    total(np.subtract(log, row, out=log), work["loss"], 1 / len(z))
    if not gradient:
        return
    np.divide(1 / len(z), sums, out=row)
    if Y.ndim == 1:
        dz *= row[:, None]
        take(dz, index, row)
        row -= 1 / len(z)
        dz.reshape(-1)[index] = row
    else:
        row *= work["weight"]
        dz *= row[:, None]
        t = work["t"]
        t[...] = Y  # into the scores' dtype before anything is rounded
        t *= 1 / len(z)
        dz -= t
    scale_gradient(work)


@softmax_cross_entropy.compiled
def compiled_softmax_cross_entropy(library: Any, z: Array, Y: Array, gradient: bool, work: Work) -> None:
    """A row after another."""
    labels, rows = labels_or_rows(Y, work)
    if not library.softmax_cross_entropy(z, labels, rows, work["dz"], work["row"], work["loss"], gradient):
        softmax_cross_entropy.numpy(z, Y, gradient, work)
    elif gradient:
        scale_gradient(work)


@softmax_cross_entropy.cuda
def cuda_softmax_cross_entropy(grid: Grid, z: Array, Y: Array, gradient: bool, work: Work) -> None:
    """One launch; a label out of range makes NaN of the loss and of its row of the gradient."""
    launch_over_rows(grid, "softmax_cross_entropy", z, labels_or_rows(Y, work), gradient, work)


@operation(
    "work.dz",
    scratch=lambda outputs: {"row": ((-1,), COMPUTE), "index": ((-1,), np.int64), "parts": PARTIAL_SUMS},
)
def svm(z: Array, Y: Array, gradient: bool, work: Work) -> None:
    """Σ_{j≠y} max(0, z_j - z_y + 1) for integer labels Y: dz_j = 1/n for a violated margin, dz_y = -(how many)/n."""
    dz, row, index = work["dz"], work["row"], work["index"]
    if not labels_fit(Y, z, work):
        return
    places_of(Y, work)
    take(z, index, row)
    np.subtract(z, row[:, None], out=dz)
    dz += 1
    np.maximum(dz, 0, out=dz)
    dz.reshape(-1)[index] = 0
    total(dz, work["loss"], 1 / len(z))
    if gradient:
        np.sign(dz, out=dz)  # margins are not negative, so this is 1 where one is violated
        dz.sum(axis=1, out=row)
        dz.reshape(-1)[index] = np.negative(row, out=row)
        dz *= 1 / len(z)
        scale_gradient(work)


@svm.compiled
def compiled_svm(library: Any, z: Array, Y: Array, gradient: bool, work: Work) -> None:
    """A row after another."""
    labels, _ = labels_or_rows(Y, work)
    if not library.svm(z, labels, work["dz"], work["row"], work["loss"], gradient):
        svm.numpy(z, Y, gradient, work)
    elif gradient:
        scale_gradient(work)


@svm.cuda
def cuda_svm(grid: Grid, z: Array, Y: Array, gradient: bool, work: Work) -> None:
    """One launch; a label out of range makes NaN of the loss and of its row of the gradient."""
    launch_over_rows(grid, "svm", z, labels_or_rows(Y, work)[:1], gradient, work)


def launch_over_rows(
    grid: Grid, name: str, z: Array, truth: tuple[Array | None, ...], gradient: bool, work: Work
) -> None:
    """A kernel of loss.cu, with a warp for a row of few scores and otherwise a block."""
    rows, classes = z.shape
    threads = THREADS if classes < BLOCK_CLASSES else SUM_THREADS
    team = WARP if classes <= WARP_CLASSES else threads
    blocks = min(-(-rows * team // threads), SUM_PARTS)
    arguments = (z, *truth, work["dz"] if gradient else None, work.get("factor"), rows, classes, team, 1 / rows)
    results = work["parts"], work["ticket"], work["loss"]
    grid.launch(grid.source("total.cuh", "loss.cu"), name, (blocks,), threads, *arguments, *results)


# --- every score for itself ------------------------------------------------------------------------------------------


@operation("work.dz", scratch=lambda outputs: {"t": ((-1, outputs), COMPUTE), "parts": PARTIAL_SUMS})
def score_loss(f: BoundScoreLoss, z: Array, Y: Array, gradient: bool, work: Work) -> None:
    """f(z, y), a mean over all elements.

    Y are numbers of any real dtype, as many as there are in z; they may be strided.
    """
    dz, Y = work["dz"], Y.reshape(z.shape)
    program_of(f, "loss", z.dtype).run(z, Y, dz)  # dz holds the losses before it holds their gradient
    total(dz, work["loss"], 1 / z.size)
    if gradient:
        program_of(f, "dz", z.dtype).run(z, Y, dz)
        dz *= 1 / z.size
        scale_gradient(work)


@score_loss.compiled
def compiled_score_loss(library: Any, f: BoundScoreLoss, z: Array, Y: Array, gradient: bool, work: Work) -> None:
    """One pass; targets of another dtype are copied first."""
    place, scalars = score_loss_place(library, library.level(), f, z.dtype)
    results = work["dz"], work["parts"], work["loss"]
    if place < 0 or not library.score_loss(place, scalars, z, rows_of(Y, z, work), *results, gradient):
        score_loss.numpy(f, z, Y, gradient, work)
    elif gradient:
        scale_gradient(work)


@score_loss.cuda
def cuda_score_loss(grid: Grid, f: BoundScoreLoss, z: Array, Y: Array, gradient: bool, work: Work) -> None:
    """One launch; targets are read as they are, of any dtype."""
    if not Y.flags.c_contiguous:
        Y = rows_of(Y, z, work)
    source = score_loss_source(grid.dtype.name, Y.dtype.name, f)
    arguments = (z, Y, work["dz"] if gradient else None, work.get("factor"), z.size, 1 / z.size)
    results = work["parts"], work["ticket"], work["loss"]
    grid.launch(source, "score_loss", total_grid(z.size), SUM_THREADS, *arguments, *results)


@functools.lru_cache(maxsize=MOST_PROGRAMS)
def score_loss_place(
    library: Any, level: str, f: BoundScoreLoss, dtype: np.dtype[Any]
) -> tuple[int, tuple[float, ...]]:
    """Where the library has a loss of single scores at this SIMD ``level``, -1 for nowhere; and its scalars."""
    form = f.loss.form("float64", "loss", "dz")
    return place_of(library, f.loss, dtype.name).number, f.scalars(form)


@functools.lru_cache(maxsize=MOST_PROGRAMS)
def score_loss_source(dtype: str, target: str, f: BoundScoreLoss) -> str:
    """The CUDA source of a loss of single scores, with targets of dtype ``target``."""
    compute = compute_dtype(np.dtype(dtype)).name
    before = [
        f"typedef {C_TYPES[target]} Target;",
        scalars_source("SCALARS", f.scalars(f.loss.form(compute, "loss", "dz"))),
        score_source(f.loss, compute, "Score"),
    ]
    return source_of(dtype, "total.cuh", "score_loss.cu", before="\n".join(before))


# --- pieces ----------------------------------------------------------------------------------------------------------


def labels_or_rows(Y: Array, work: Work) -> tuple[Array, Array]:
    """Y as kernels take it, (labels, None) or (None, rows): itself, or copied to where work has room for it."""
    if Y.ndim == 1 and Y.dtype == np.int64 and Y.flags.c_contiguous:
        return Y, None
    if Y.ndim > 1:
        return None, rows_of(Y, Y, work)
    index = work["index"]
    index[...] = Y
    return index, None


def rows_of(Y: Array, z: Array, work: Work) -> Array:
    """Y, contiguous, in the shape of z and the dtype of ``work["t"]``: itself, or copied there."""
    t = work["t"]
    if Y.dtype == t.dtype and Y.flags.c_contiguous:
        return Y
    t[...] = Y.reshape(z.shape)
    return t


def scale_gradient(work: Work) -> None:
    """Multiply the gradient by ``work["factor"]``, if there is one."""
    if "factor" in work:
        dz = work["dz"]
        dz *= work["factor"]


def total(x: Array, out: Array, scale: float) -> None:
    """Write scale * Σ x to ``out``, of one element."""
    x.reshape(-1).sum(keepdims=True, out=out)
    out *= scale


def labels_fit(labels: Array, z: Array, work: Work) -> bool:
    """Whether all labels are columns of z; the loss is NaN if not."""
    if labels.min() >= 0 and labels.max() < z.shape[1]:
        return True
    work["loss"].fill(math.nan)
    work["dz"].fill(math.nan)
    return False


def places_of(labels: Array, work: Work) -> None:
    """Write to ``work["index"]`` where the score of each row's label stands among all scores."""
    index = work["index"]
    index[...] = labels  # any integer type becomes int64 here
    index += work["offsets"]


def take(x: Array, index: Array, out: Array) -> None:
    """``out = x.reshape(-1)[index]``."""
    x.reshape(-1).take(index, out=out, mode="clip")  # the other mode makes NumPy fill a copy of out first
