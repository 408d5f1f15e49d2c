"""Norms and means over a parameter: called with arrays they compute, called inside a rule they are recorded.

A total has float64 terms, and the order of additions depends on the size alone: pieces of PIECE elements one after
another; in a piece LANES lanes, each of every LANES-th element; then the lanes by halves.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from gpubatch.errors import DTypeError
from gpubatch.formula.trace import Reduction, Symbol, reduced

PIECE = 1 << 13  # as in kernels/host.cpp
LANES = 32  # as TERMS in kernels/host_formulas.h


def norm(x: Any) -> Any:
    """The Euclidean norm of a parameter's elements, √Σx²; inside a rule, of any value x of each element.

    x: an array, or a value inside a rule. The sum is in float64, the result of x's type; of no elements it is 0.

    >>> @rule
    ... def normalised(w, g, t, *, lr=0.1):
    ...     return w - lr * g / (norm(g) + 1e-8)
    """
    return _reduce(NORM, x)


def mean(x: Any) -> Any:
    """The mean over a parameter's elements; inside a rule, of any value x of each element.

    x: an array, or a value inside a rule. The sum is in float64, the result of x's type; of no elements it is 0.

    >>> @gb.rule
    ... def centred(w, g, t, *, lr=0.1):
    ...     return w - lr * (g - gb.mean(g))
    >>> w = np.zeros(2)
    >>> step = gb.Optimizer(centred, [w]).step([np.array([1.0, 3.0])])
    >>> w
    array([ 0.1, -0.1])
    """
    return _reduce(MEAN, x)


def max_abs(x: Any) -> Any:
    """The largest absolute value of a parameter's elements, NaN if one is; inside a rule, of any value x of each.

    x: an array, or a value inside a rule. The result is of x's type; of no elements it is 0.

    >>> @gb.rule
    ... def scaled(w, g, t, *, lr=0.1):
    ...     return w - lr * g / gb.max_abs(g)
    >>> w = np.zeros(2)
    >>> step = gb.Optimizer(scaled, [w]).step([np.array([1.0, -4.0])])
    >>> w
    array([-0.025,  0.1  ])
    """
    return _reduce(MAX_ABS, x)


def _reduce(reduction: Reduction, x: Any) -> Any:
    if isinstance(x, Symbol):
        return reduced(reduction, x)
    if isinstance(x, (np.ndarray, np.generic)) or hasattr(x, "__cuda_array_interface__"):
        return reduction.numpy(x)
    raise DTypeError(f"gb.{reduction.name} must be of a NumPy or CuPy array, or of a value in a rule, got {x!r}")


def _plain(reduction: Reduction, x: Any) -> Any:
    """The reduction of a whole array, in x's type: in the order above with NumPy, in CuPy's with CuPy."""
    dtype = x.dtype if x.dtype.kind == "f" else np.dtype(np.float64)
    if isinstance(x, (np.ndarray, np.generic)):
        total = total_of(reduction, x.reshape(-1), reduction_room())
        return dtype.type(reduction.finish(total, x.size))
    terms = reduction.terms(x.astype(np.float64))
    total = terms.sum() if reduction.fold is np.add or not x.size else terms.max()
    return reduction.finish(total, x.size).astype(dtype)


def reduction_room() -> np.ndarray:
    """Scratch for :func:`total_of`."""
    return np.empty(PIECE + LANES, np.float64)


def total_of(reduction: Reduction, x: np.ndarray, room: np.ndarray, total: float = 0.0) -> float:
    """``total`` with the elements of the one-dimensional x added; only the last piece may be smaller."""
    for start in range(0, x.size, PIECE):
        piece = x[start : start + PIECE]
        terms = room[: -(-piece.size // LANES) * LANES]
        terms[: piece.size], terms[piece.size :] = piece, 0
        reduction.terms(terms, out=terms)
        lanes, count = room[PIECE:], LANES // 2
        reduction.fold.reduce(terms.reshape(-1, LANES), axis=0, out=lanes)
        while count:
            reduction.fold(lanes[:count], lanes[count : 2 * count], out=lanes[:count])
            count //= 2
        total = float(reduction.fold(total, lanes[0]))
    return total


def _reduction(name: str, terms: Any, fold: Any, finish: Any) -> Reduction:
    return Reduction(
        lambda x: _plain(REDUCTIONS[name], x), f"{name}({{}})", name=name, terms=terms, fold=fold, finish=finish
    )


NORM = _reduction("norm", np.square, np.add, lambda total, size: np.sqrt(total))
MEAN = _reduction("mean", np.positive, np.add, lambda total, size: total / max(size, 1))
MAX_ABS = _reduction("max_abs", np.abs, np.maximum, lambda total, size: total)
REDUCTIONS = {reduction.name: reduction for reduction in (NORM, MEAN, MAX_ABS)}
