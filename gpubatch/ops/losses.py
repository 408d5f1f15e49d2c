"""Losses: the mean over a batch of scores z, ``(batch, outputs)``, and its gradient by them; weights of samples.

The loss goes to ``work["loss"]``, of one element, and with ``gradient`` its gradient to ``work["dz"]``, multiplied
before it is stored by ``work["factor"]``, of one element, if that is there. ``work["ticket"]``, a uint32, is zero at
first; no other kernel may use it at the same time.

``weights``, an array of the arithmetic's dtype that :func:`weigh` makes, multiply each sample's loss; without them all
count 1. A sample of weight 0 is left out: nothing depends on its scores, its label or its targets.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from gpubatch.backend import Array, compute_dtype
from gpubatch.formula import BoundScoreLoss
from gpubatch.ops.compile import C_TYPES, scalars_source, source_of
from gpubatch.ops.grid import SUM_PARTS, SUM_THREADS, THREADS, WARP, Grid, total_grid
from gpubatch.ops.host_compiler import place_of
from gpubatch.ops.operation import COMPUTE, Operation, Space, Work, operation
from gpubatch.ops.program import MOST_PROGRAMS, program_of

WARP_CLASSES = 256  # up to which a warp has a row of scores for itself
BLOCK_CLASSES = 4096  # from which a block of the most threads has it

PARTIAL_SUMS: Space = ((SUM_PARTS,), np.float64)


# --- weights of samples ----------------------------------------------------------------------------------------------


@operation()
def weigh(weight: Array | None, labels: Array | None, ignored: int, out: Array, sum_out: Array, work: Work) -> None:
    """out = weight / mean(weight), so that the mean of weighted losses is Σ w l / Σ w; Σ w to ``sum_out``.

    weight is of any real dtype, None for 1 each; where there are labels, samples with the label ``ignored`` weigh 0.
    All results are NaN if all weights are 0, or one is negative or not finite. ``sum_out`` is a float64 of one element.
    """
    out[...] = 1 if weight is None else weight
    if labels is not None:
        np.copyto(out, 0, where=labels == ignored)
    out.sum(dtype=np.float64, keepdims=True, out=sum_out)
    if not out.min() >= 0:
        sum_out.fill(math.nan)
    whole = sum_out.item()
    # In double precision and only then rounded: the weights may be very small or very large.
    np.multiply(
        out, len(out) / whole if 0 < whole < math.inf else math.nan, out=out, dtype=np.float64, casting="same_kind"
    )


@weigh.compiled
def compiled_weigh(
    library: Any, weight: Array | None, labels: Array | None, ignored: int, out: Array, sum_out: Array, work: Work
) -> None:
    """The same bits as NumPy's; weights and labels of other types are converted first."""
    if weight is not None and weight.dtype != out.dtype:
        out[...] = weight
        weight = out
    if labels is not None and labels.dtype != np.int64:
        labels = labels.astype(np.int64)
    if not library.weigh(weight, labels, ignored, out, sum_out):
        weigh.numpy(weight, labels, ignored, out, sum_out, work)


@weigh.cuda
def cuda_weigh(
    grid: Grid, weight: Array | None, labels: Array | None, ignored: int, out: Array, sum_out: Array, work: Work
) -> None:
    """One launch of one block."""
    weight, labels = (x if x is None or x.flags.c_contiguous else x.copy() for x in (weight, labels))
    kinds = (out if weight is None else weight).dtype.name, "int64" if labels is None else labels.dtype.name
    source = weigh_source(grid.dtype.name, *kinds)
    grid.launch(source, "weigh", (1,), SUM_THREADS, weight, labels, ignored, out, sum_out, len(out))


@functools.lru_cache(maxsize=MOST_PROGRAMS)
def weigh_source(dtype: str, weight: str, label: str) -> str:
    """The CUDA source of :func:`weigh` for weights and labels of these dtypes, with arithmetic of ``dtype``'s."""
    types = f"typedef {C_TYPES[weight]} Weight;\ntypedef {C_TYPES[label]} Label;"
    return source_of(dtype, "total.cuh", "weigh.cu", before=types)


# --- one class of many -----------------------------------------------------------------------------------------------


@operation(
    "work.dz",
    scratch=lambda outputs: {
        "t": ((-1, outputs), COMPUTE),
        "row": ((-1,), COMPUTE),
        "index": ((-1,), np.int64),
        "parts": PARTIAL_SUMS,
    },
    numpy_scratch=lambda outputs: dict.fromkeys(("sum", "log", "mass"), ((-1,), COMPUTE)),
)
def softmax_cross_entropy(
    z: Array,
    Y: Array,
    gradient: bool,
    work: Work,
    weights: Array | None = None,
    smoothing: float = 0.0,
    relative: bool = False,
) -> None:
    """-Σ_j y_j log softmax(z)_j.

    Y are labels ``(batch,)`` of any integer type, or numbers of the shape of z. A label that is out of range makes the
    loss NaN. NumPy needs ``work["offsets"]``, where each row of scores starts.

    smoothing: each y counts as (1 - smoothing) y + smoothing / classes.
    relative: add Σ_j y_j log y_j, so that it is the Kullback-Leibler divergence of softmax(z) from Y.
    """
    dz, row, sums, log, index = (work[name] for name in ("dz", "row", "sum", "log", "index"))
    kept, spread = 1 - smoothing, smoothing / z.shape[1]
    if Y.ndim == 1 and not places_of(Y, z, work, weights):
        return
    z.max(axis=1, out=row)
    np.subtract(z, row[:, None], out=dz)
    if smoothing:
        dz.sum(axis=1, out=sums)
    if Y.ndim == 1:
        take(dz, index, row)
    else:
        np.multiply(dz, Y, out=work["t"]).sum(axis=1, out=row)
    if smoothing:
        row *= kept
        sums *= spread
        row += sums
    if relative:
        row -= entropies(Y, work["t"], sums)
    np.exp(dz, out=dz)
    dz.sum(axis=1, out=sums)
    np.log(sums, out=log)  # the largest exponential is 1, so the logarithm is finite
    if Y.ndim == 2:
        mass = Y.sum(axis=1, dtype=z.dtype, out=work["mass"])
        if smoothing:
            mass *= kept
            mass += smoothing
        log *= mass
    total(weighted(np.subtract(log, row, out=log), weights), work["loss"], 1 / len(z))
    if not gradient:
        return
    np.divide(1 / len(z), sums, out=row)
    if Y.ndim == 1:
        dz *= row[:, None]
        if smoothing:
            dz -= spread / len(z)
        take(dz, index, row)
        row -= kept / len(z)
        dz.reshape(-1)[index] = row
    else:
        row *= work["mass"]
        dz *= row[:, None]
        t = work["t"]
        t[...] = Y  # into the scores' dtype before anything is rounded
        if smoothing:
            t *= kept
            t += spread
        t *= 1 / len(z)
        dz -= t
    weighted(dz, weights)
    scale_gradient(work)


def entropies(Y: Array, t: Array, out: Array) -> Array:
    """Σ_j y_j log y_j of each row of numbers that are not negative, written to ``out`` by way of ``t``."""
    t[...] = Y
    np.copyto(t, 1, where=t == 0)  # 1 log 1 = 0
    np.log(t, out=t)
    t *= Y
    return t.sum(axis=1, out=out)


@operation(
    "work.dz",
    scratch=lambda outputs: {"row": ((-1,), COMPUTE), "index": ((-1,), np.int64), "parts": PARTIAL_SUMS},
    numpy_scratch=lambda outputs: dict.fromkeys(("sum", "log", "mass", "power", "ratio"), ((-1,), COMPUTE)),
)
def softmax_focal(
    z: Array,
    Y: Array,
    gradient: bool,
    work: Work,
    weights: Array | None = None,
    gamma: float = 2.0,
    alpha: Array | None = None,
) -> None:
    """-alpha_y (1 - p)^gamma log p for integer labels Y, where p = softmax(z)_y; without ``alpha`` it is 1.

    dz_j = alpha_y (1 - p)^gamma (1 - gamma p log p / (1 - p)) (softmax(z)_j - (1 if j = y else 0)).
    """
    dz, row, index, sums, lost, miss = (work[name] for name in ("dz", "row", "index", "sum", "log", "mass"))
    power, ratio = work["power"], work["ratio"]
    if not places_of(Y, z, work, weights):
        return
    z.max(axis=1, out=row)
    np.subtract(z, row[:, None], out=dz)
    take(dz, index, row)
    np.exp(dz, out=dz)
    dz.sum(axis=1, out=sums)
    np.subtract(np.log(sums, out=lost), row, out=lost)  # -log p
    dz.reshape(-1)[index] = 0
    np.divide(dz.sum(axis=1, out=miss), sums, out=miss)  # 1 - p, without cancellation
    np.power(miss, gamma, out=power)
    if alpha is not None:
        index -= work["offsets"]
        take(alpha, index, ratio)
        power *= ratio
        index += work["offsets"]
    total(weighted(np.multiply(power, lost, out=row), weights), work["loss"], 1 / len(z))
    if gradient:
        ratio.fill(1)
        np.divide(lost, miss, out=ratio, where=miss != 0)  # (-log p) / (1 - p), which is 1 at p = 1
        ratio *= np.subtract(1, miss, out=lost)
        ratio *= gamma
        ratio += 1
        power *= ratio
        power *= 1 / len(z)
        dz *= np.divide(power, sums, out=sums)[:, None]
        miss *= power
        dz.reshape(-1)[index] = np.negative(miss, out=miss)
        weighted(dz, weights)
        scale_gradient(work)


def margin_scratch(outputs: int) -> dict[str, Space]:
    """What a loss of margins needs of ``work``."""
    return {"row": ((-1,), COMPUTE), "index": ((-1,), np.int64), "parts": PARTIAL_SUMS}


@operation("work.dz", scratch=margin_scratch)
def svm(z: Array, Y: Array, gradient: bool, work: Work, weights: Array | None = None, delta: float = 1.0) -> None:
    """Σ_{j≠y} max(0, z_j - z_y + delta), integer labels Y: dz_j = 1/n if a margin is violated, dz_y = -(how many)/n."""
    dz, row, index = work["dz"], work["row"], work["index"]
    if not places_of(Y, z, work, weights):
        return
    margins(z, index, delta, row, dz)
    np.maximum(dz, 0, out=dz)
    dz.reshape(-1)[index] = 0
    total(dz if weights is None else weighted(dz.sum(axis=1, out=row), weights), work["loss"], 1 / len(z))
    if gradient:
        np.sign(dz, out=dz)  # margins are not negative, so this is 1 where one is violated
        dz.sum(axis=1, out=row)
        dz.reshape(-1)[index] = np.negative(row, out=row)
        dz *= 1 / len(z)
        weighted(dz, weights)
        scale_gradient(work)


@operation("work.dz", scratch=margin_scratch, numpy_scratch=lambda outputs: {"highest": ((-1,), np.int64)})
def crammer_singer(
    z: Array, Y: Array, gradient: bool, work: Work, weights: Array | None = None, delta: float = 1.0
) -> None:
    """max(0, max_{j≠y} z_j - z_y + delta), integer labels Y: dz_j = 1/n for the first j of the maximum, dz_y = -1/n."""
    dz, row, index, highest = (work[name] for name in ("dz", "row", "index", "highest"))
    if not places_of(Y, z, work, weights):
        return
    margins(z, index, delta, row, dz)
    dz.reshape(-1)[index] = -math.inf
    dz.argmax(axis=1, out=highest)
    highest += work["offsets"]
    take(dz, highest, row)
    total(weighted(np.maximum(row, 0, out=row), weights), work["loss"], 1 / len(z))
    if gradient:
        np.sign(row, out=row)
        row *= 1 / len(z)
        dz.fill(0)
        dz.reshape(-1)[highest] = row
        dz.reshape(-1)[index] = np.negative(row, out=row)
        weighted(dz, weights)
        scale_gradient(work)


def margins(z: Array, index: Array, delta: float, row: Array, out: Array) -> None:
    """out = z_j - z_y + delta, where z_y are the scores at ``index``; ``row`` is scratch."""
    take(z, index, row)
    np.subtract(z, row[:, None], out=out)
    out += delta


def over_rows(
    loss: Operation[...],
    parameters: Callable[..., tuple[Any, ...]],
    rows: bool = False,
    library_name: str = "",
    library_options: tuple[bool, ...] = (),
) -> None:
    """Declare the compiled and the CUDA form of a loss of labels, or of ``rows`` of numbers, too.

    ``parameters(z, *own)`` makes what both forms take of the loss's own arguments. The library may have the loss under
    another name, with further options.
    """

    def truth(Y: Array, work: Work) -> tuple[Array, ...]:
        labels, numbers = labels_or_rows(Y, work)
        return (labels, numbers) if rows else (labels,)

    @loss.compiled
    def by_library(
        library: Any, z: Array, Y: Array, gradient: bool, work: Work, weights: Array | None = None, *own: Any
    ) -> None:
        """A row after another."""
        results = work["dz"], work["row"], work["loss"]
        arguments = z, *truth(Y, work), *results, gradient, weights, *parameters(z, *own), *library_options
        if not getattr(library, library_name or loss.name)(*arguments):
            loss.numpy(z, Y, gradient, work, weights, *own)
        elif gradient:
            scale_gradient(work)

    @loss.cuda
    def by_kernel(
        grid: Grid, z: Array, Y: Array, gradient: bool, work: Work, weights: Array | None = None, *own: Any
    ) -> None:
        """One launch; a label out of range makes NaN of the loss and of its row of the gradient."""
        launch_over_rows(grid, loss.name, z, (*truth(Y, work), weights, *parameters(z, *own)), gradient, work)


over_rows(
    softmax_cross_entropy,
    lambda z, smoothing=0.0, relative=False: (1 - smoothing, smoothing / z.shape[1], relative),
    rows=True,
)
over_rows(softmax_focal, lambda z, gamma=2.0, alpha=None: (gamma, alpha))
for margin_loss, largest in ((svm, False), (crammer_singer, True)):
    over_rows(margin_loss, lambda z, delta=1.0: (delta,), library_name="svm", library_options=(largest,))


def launch_over_rows(
    grid: Grid, name: str, z: Array, truth: tuple[Array | float | None, ...], gradient: bool, work: Work
) -> None:
    """A kernel of loss.cu, with a warp for a row of few scores and otherwise a block.

    ``truth``: labels or targets, weights, and the parameters of the loss.
    """
    rows, classes = z.shape
    threads = THREADS if classes < BLOCK_CLASSES else SUM_THREADS
    team = WARP if classes <= WARP_CLASSES else threads
    blocks = min(-(-rows * team // threads), SUM_PARTS)
    arguments = (z, *truth, work["dz"] if gradient else None, work.get("factor"), rows, classes, team, 1 / rows)
    results = work["parts"], work["ticket"], work["loss"]
    grid.launch(grid.source("total.cuh", "loss.cu"), name, (blocks,), threads, *arguments, *results)


# --- every score for itself ------------------------------------------------------------------------------------------


@operation("work.dz", scratch=lambda outputs: {"t": ((-1, outputs), COMPUTE), "parts": PARTIAL_SUMS})
def score_loss(f: BoundScoreLoss, z: Array, Y: Array, gradient: bool, work: Work, weights: Array | None = None) -> None:
    """f(z, y), a mean over all elements.

    Y are numbers of any real dtype, as many as there are in z; they may be strided.
    """
    dz, Y = work["dz"], Y.reshape(z.shape)
    program_of(f, "loss", z.dtype).run(z, Y, dz)  # dz holds the losses before it holds their gradient
    total(weighted(dz, weights), work["loss"], 1 / z.size)
    if gradient:
        program_of(f, "dz", z.dtype).run(z, Y, dz)
        dz *= 1 / z.size
        weighted(dz, weights)
        scale_gradient(work)


@score_loss.compiled
def compiled_score_loss(
    library: Any, f: BoundScoreLoss, z: Array, Y: Array, gradient: bool, work: Work, weights: Array | None = None
) -> None:
    """One pass; targets of another dtype are copied first."""
    place, scalars = score_loss_place(library, library.level(), f, z.dtype)
    results, factor = (work["dz"], work["parts"], work["loss"]), work.get("factor")
    if place < 0 or not library.score_loss(place, scalars, z, rows_of(Y, z, work), *results, gradient, weights, factor):
        score_loss.numpy(f, z, Y, gradient, work, weights)


@score_loss.cuda
def cuda_score_loss(
    grid: Grid, f: BoundScoreLoss, z: Array, Y: Array, gradient: bool, work: Work, weights: Array | None = None
) -> None:
    """One launch; targets are read as they are, of any dtype."""
    if not Y.flags.c_contiguous:
        Y = rows_of(Y, z, work)
    source = score_loss_source(grid.dtype.name, Y.dtype.name, f)
    of_gradient = work["dz"] if gradient else None, work.get("factor")
    arguments = (z, Y, weights, *of_gradient, z.size, z.shape[1], 1 / z.size)
    results = work["parts"], work["ticket"], work["loss"]
    grid.launch(source, "score_loss", total_grid(z.size), SUM_THREADS, *arguments, *results)


@functools.lru_cache(maxsize=MOST_PROGRAMS)
def score_loss_place(
    library: Any, level: str, f: BoundScoreLoss, dtype: np.dtype[Any]
) -> tuple[int, tuple[float, ...]]:
    """Where the library has a loss of single scores at this SIMD ``level``, -1 for nowhere; and its scalars."""
    form = f.declared.form("float64", "loss", "dz")
    return place_of(library, f.declared, dtype.name).number, f.scalars(form)


@functools.lru_cache(maxsize=MOST_PROGRAMS)
def score_loss_source(dtype: str, target: str, f: BoundScoreLoss) -> str:
    """The CUDA source of a loss of single scores, with targets of dtype ``target``."""
    compute = compute_dtype(np.dtype(dtype)).name
    before = [
        f"typedef {C_TYPES[target]} Target;",
        scalars_source("SCALARS", f.scalars(f.declared.form(compute, "loss", "dz"))),
        f.declared.source(compute, "Score"),
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


def weighted(x: Array, weights: Array | None) -> Array:
    """Multiply each row of x, a number or several, by its weight; 0 times anything is 0."""
    if weights is not None:
        of_rows = weights if x.ndim == 1 else weights[:, None]
        np.copyto(x, 0, where=of_rows == 0)
        x *= of_rows
    return x


def places_of(labels: Array, z: Array, work: Work, weights: Array | None) -> bool:
    """Write to ``work["index"]`` where the score of each row's label stands among all scores.

    Whether all labels are columns of z; the loss is NaN if not. What has the weight 0 stands in the first column.
    """
    index = work["index"]
    index[...] = labels  # any integer type becomes int64 here
    if weights is not None:
        np.copyto(index, 0, where=weights == 0)
    if index.min() >= 0 and index.max() < z.shape[1]:
        index += work["offsets"]
        return True
    work["loss"].fill(math.nan)
    work["dz"].fill(math.nan)
    return False


def take(x: Array, index: Array, out: Array) -> None:
    """``out = x.reshape(-1)[index]``."""
    x.reshape(-1).take(index, out=out, mode="clip")  # the other mode makes NumPy fill a copy of out first
