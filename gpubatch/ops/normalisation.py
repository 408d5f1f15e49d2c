"""Batch norm: n = (x - mean)/sqrt(var + eps), y = gamma n + beta, each feature for itself."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpubatch.backend import Array
from gpubatch.ops.grid import PARTS, THREADS, Grid, check_contiguous, parts_of
from gpubatch.ops.operation import COMPUTE, Space, Work, operation


@operation("y", scratch=lambda features: {"inverse": ((features,), COMPUTE)})
def normalise(x: Array, mean: Array, var: Array, eps: float, gamma: Array, beta: Array, y: Array, work: Work) -> None:
    """y by a mean and a variance that are given, each row for itself. x may be y."""
    np.subtract(x, mean, out=y)
    y *= inverse_root(var, eps, work["inverse"])
    y *= gamma
    y += beta


@normalise.compiled
def compiled_normalise(
    library: Any, x: Array, mean: Array, var: Array, eps: float, gamma: Array, beta: Array, y: Array, work: Work
) -> None:
    """One pass."""
    if not library.normalise(x, mean, var, eps, gamma, beta, y, work["inverse"]):
        normalise.numpy(x, mean, var, eps, gamma, beta, y, work)


@normalise.cuda
def cuda_normalise(
    grid: Grid, x: Array, mean: Array, var: Array, eps: float, gamma: Array, beta: Array, y: Array, work: Work
) -> None:
    """One launch."""
    check_contiguous("x", x)
    arrays = (x, mean, var, gamma, beta, y, None, None)
    grid.on_tiles(grid.source("batch_norm.cu"), "normalise", x.shape, arrays, (eps,))


def partial_sums(features: int) -> dict[str, Space]:
    """Scratch for two sums over the batch."""
    return {"partial": ((2 * PARTS, features), COMPUTE)}


@operation("y", "work.normalised", scratch=partial_sums)
def batch_norm(x: Array, eps: float, gamma: Array, beta: Array, y: Array, work: Work) -> None:
    """y by the batch's mean and biased variance, which go to ``work["mean"]`` and ``["var"]``.

    n goes to ``work["normalised"]``, 1/sqrt(var + eps) to ``work["inverse"]``. x may be y.
    """
    normalised, mean, var = work["normalised"], work["mean"], work["var"]
    x.sum(axis=0, out=mean)
    mean *= 1 / len(x)
    np.subtract(x, mean, out=normalised)
    np.multiply(normalised, normalised, out=y).sum(axis=0, out=var)
    var *= 1 / len(x)
    normalised *= inverse_root(var, eps, work["inverse"])
    np.multiply(normalised, gamma, out=y)
    y += beta


@batch_norm.compiled
def compiled_batch_norm(library: Any, x: Array, eps: float, gamma: Array, beta: Array, y: Array, work: Work) -> None:
    """Three passes: the mean, the deviations, y."""
    arrays = (work[name] for name in ("normalised", "mean", "var", "inverse", "partial"))
    if not library.batch_norm(x, eps, gamma, beta, y, *arrays):
        batch_norm.numpy(x, eps, gamma, beta, y, work)


@batch_norm.cuda
def cuda_batch_norm(grid: Grid, x: Array, eps: float, gamma: Array, beta: Array, y: Array, work: Work) -> None:
    """Three launches, for the mean, the deviations and y, and two more where rows are many."""
    check_contiguous("x", x)
    source = grid.source("batch_norm.cu")
    mean, var, parts = work["mean"], work["var"], parts_of(x.shape)
    for middle, out in ((None, mean), (mean, var)):
        if parts == 1:
            grid.sum_columns(source, "moment", x.shape, (x, middle, out), (1 / len(x),))
        else:
            grid.sum_columns(source, "moment", x.shape, (x, middle, work["partial"]), (1.0,))
            grid.add_partial(work["partial"], parts, 1 / len(x), out)
    arrays = (x, mean, var, gamma, beta, y, work["normalised"], work["inverse"])
    grid.on_tiles(source, "normalise", x.shape, arrays, (eps,))


@operation(
    *("dgamma", "dbeta", "dx"),
    scratch=lambda features: {"row": ((features,), COMPUTE), **partial_sums(features)},
    numpy_scratch=lambda features: {"t": ((-1, features), COMPUTE)},
)
def batch_norm_gradient(dy: Array, gamma: Array, dgamma: Array, dbeta: Array, dx: Array | None, work: Work) -> None:
    """dbeta = Σ dy, dgamma = Σ dy n, dx = gamma/sqrt(var + eps) (dy - dbeta/m - n dgamma/m). dx may be dy.

    n and 1/sqrt(var + eps) are in ``work`` from :func:`batch_norm`; n may be overwritten.
    """
    normalised, row, m = work["normalised"], work["row"], len(dy)
    np.multiply(dy, normalised, out=work["t"]).sum(axis=0, out=dgamma)
    dy.sum(axis=0, out=dbeta)
    if dx is not None:
        normalised *= np.multiply(dgamma, 1 / m, out=row)
        np.subtract(dy, np.multiply(dbeta, 1 / m, out=row), out=dx)
        dx -= normalised
        dx *= np.multiply(gamma, work["inverse"], out=row)


@batch_norm_gradient.compiled
def compiled_batch_norm_gradient(
    library: Any, dy: Array, gamma: Array, dgamma: Array, dbeta: Array, dx: Array | None, work: Work
) -> None:
    """One pass for both sums, and one for dx."""
    arrays = (work[name] for name in ("normalised", "inverse", "partial"))
    if not library.batch_norm_gradient(dy, gamma, dgamma, dbeta, dx, *arrays):
        batch_norm_gradient.numpy(dy, gamma, dgamma, dbeta, dx, work)


@batch_norm_gradient.cuda
def cuda_batch_norm_gradient(
    grid: Grid, dy: Array, gamma: Array, dgamma: Array, dbeta: Array, dx: Array | None, work: Work
) -> None:
    """One launch for both sums, or two where there are many rows, and one for dx."""
    source = grid.source("batch_norm.cu")
    normalised, parts, partial = work["normalised"], parts_of(dy.shape), work["partial"]
    sums = (None, dgamma, dbeta) if parts == 1 else (partial, None, None)
    grid.sum_columns(source, "gradient_sums", dy.shape, (normalised, dy, *sums))
    if parts > 1:
        grid.add_partial(partial, parts, 1.0, dgamma, dbeta)
    if dx is not None:
        arrays = (normalised, dy, gamma, work["inverse"], dgamma, dbeta, dx)
        grid.on_tiles(source, "gradient", dy.shape, arrays, (1 / len(dy),))


@operation(scratch=lambda features: {"row": ((features,), COMPUTE)})  # statistics are float32 anyway
def update_running(running: Array, new: Array, weight: float, factor: float, work: Work) -> None:
    """running = (1 - weight) running + weight factor new, of ``(features,)``."""
    running *= 1 - weight
    running += np.multiply(new, weight * factor, out=work["row"])


@update_running.cuda
def cuda_update_running(grid: Grid, running: Array, new: Array, weight: float, factor: float, work: Work) -> None:
    """One launch."""
    blocks, numbers = max(1, -(-running.size // THREADS)), (running.size, 1 - weight, weight * factor)
    grid.launch(grid.source("batch_norm.cu"), "update_running", (blocks,), THREADS, running, new, *numbers)


def inverse_root(var: Array, eps: float, out: Array) -> Array:
    """``out = 1/sqrt(var + eps)``."""
    np.add(var, eps, out=out)
    return np.reciprocal(np.sqrt(out, out=out), out=out)
