"""All score losses: the loss of one score z and its target y, and the derivative with respect to z."""

from __future__ import annotations

import numpy as np

from gpubatch.formula.elementwise import score_loss

__all__ = ["mse", "sigmoid_cross_entropy"]


@score_loss
def mse(z, y):
    """(z - y)²."""
    d = z - y
    return d * d, 2 * d


@score_loss
def sigmoid_cross_entropy(z, y):
    """-y log σ(z) - (1 - y) log(1 - σ(z)), with derivative σ(z) - y.

    Written as max(z, 0) - z y + log(1 + exp(-|z|)), which neither takes the logarithm of 0 nor overflows.
    """
    small = np.exp(-np.abs(z))
    sigmoid = np.exp(np.minimum(z, 0)) / (1 + small)
    return np.maximum(z, 0) - z * y + np.log1p(small), sigmoid - y
