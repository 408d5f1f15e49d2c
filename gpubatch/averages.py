"""Exponentially weighted averages, with bias correction.

v starts at 0; each value x makes it beta*v + (1-beta)*x, about the mean of the last 1/(1-beta) values. Bias correction
divides by 1 - beta**t, the sum of the weights so far (Kingma & Ba 2015, section 3; pandas ``adjust=True``; optax
``ema``). NaN and infinity are not checked; after one, no later average is finite.
"""

from __future__ import annotations

import math
import numbers
from typing import Any

import numpy as np

from gpubatch.errors import DTypeError, ShapeError, check_bool, check_real

__all__ = ["EWMA", "ewma"]


class EWMA:
    """A running average of numbers, or of arrays of one shape and dtype; it stores one value.

    beta: weight of the past, in [0, 1)
    bias_correction: whether to divide by 1 - beta**t, where ``t`` counts the updates

    >>> average = EWMA(beta=0.9)
    >>> average.update(4.0), round(average.update(9.0), 3)
    (4.0, 6.632)
    """

    def __init__(self, beta: float = 0.9, bias_correction: bool = True) -> None:
        self.beta = check_real("beta", beta, 0, 1, open_high=True)
        self.bias_correction = check_bool("bias_correction", bias_correction)
        self.t = 0
        self._v: Any = 0.0

    def update(self, x: Any) -> Any:
        """Add ``x`` and return the new average: a float for a number, an array of the same library for an array.

        float32 stays float32, integers become float64; a zero-dimensional NumPy array counts as a number.
        """
        if isinstance(x, numbers.Real) or (isinstance(x, np.ndarray) and x.shape == ()):
            x = float(x)
        elif not hasattr(x, "dtype"):
            raise DTypeError(f"x must be a number or an array, got {x!r} of type {type(x).__name__}")
        v = (1 - self.beta) * x
        if self.t > 0:
            for name, default, error in (("shape", (), ShapeError), ("dtype", np.dtype(np.float64), DTypeError)):
                before, now = getattr(self._v, name, default), getattr(v, name, default)
                if before != now:
                    raise error(f"x must keep the {name} of the average, {before}, got a value that gives {now}")
            v += self.beta * self._v
        self._v = v
        self.t += 1
        return self.value

    @property
    def value(self) -> Any:
        """The average so far, 0.0 before the first update; arrays are returned as a new copy each time."""
        if self.t == 0 or not self.bias_correction:
            return self._v / 1.0
        return self._v / float(_sum_of_weights(self.beta, self.t))

    def __repr__(self) -> str:
        return f"EWMA(beta={self.beta}, bias_correction={self.bias_correction}, t={self.t})"


def ewma(series: Any, beta: float = 0.9, bias_correction: bool = True) -> Any:
    """The average after each value of ``series`` along axis 0, in float64; a CuPy array gives a CuPy array.

    series: a sequence of real numbers, or an array of at least one dimension
    beta: weight of the past, in [0, 1)
    bias_correction: whether to divide by 1 - beta**t

    >>> gb.ewma([4.0, 9.0, 5.0], beta=0.9).round(3)
    array([4.   , 6.632, 6.03 ])
    >>> gb.ewma([4.0, 9.0, 5.0], beta=0.9, bias_correction=False).round(3)
    array([0.4  , 1.26 , 1.634])
    """
    beta = check_real("beta", beta, 0, 1, open_high=True)
    check_bool("bias_correction", bias_correction)
    # NumPy's functions dispatch arrays with this attribute to their own library (NEP 18).
    x = series if hasattr(series, "__array_function__") else np.asarray(series)
    if x.dtype.kind not in "biuf":
        raise DTypeError(f"series must hold real numbers, got dtype {x.dtype}")
    if x.ndim == 0:
        raise ShapeError("series must have at least one dimension, got a single number")
    x = x.astype(np.float64)
    v = (1 - beta) * x
    # Doubling (Hillis & Steele 1986): each pass extends v[i] from the weighted sum of the last d values up to i to that
    # of the last 2*d. No weight exceeds 1, so nothing overflows, unlike a cumulative sum scaled by beta**-i.
    d = 1
    while d < len(v) and (weight := beta**d) > 0:
        v[d:] += weight * v[:-d]
        d *= 2
    # The loop stops where weights underflow to 0, but NaN and infinity must reach all later averages.
    v += np.cumsum(np.where(np.isfinite(x), 0.0, x), axis=0)
    if bias_correction:
        v /= _sum_of_weights(beta, np.cumsum(np.ones_like(x), axis=0))
    return v


def _sum_of_weights(beta: float, t: Any) -> Any:
    """1 - beta**t, without cancellation for beta near 1."""
    return -np.expm1(t * math.log(beta)) if beta > 0 else 1.0
