"""All score losses: the loss of one score z and its target y, and the derivative with respect to z.

None takes the logarithm of 0, and no intermediate value overflows where the loss does not.
"""

from __future__ import annotations

import math

import numpy as np

from gpubatch.formula.elementwise import ScoreLoss, score_loss

# --- differences of score and target ----------------------------------------------------------------------------------


@score_loss
def mse(z, y):
    """(z - y)²."""
    d = z - y
    return d * d, 2 * d


@score_loss
def mae(z, y):
    """|z - y|, with the derivative 0 where they are equal."""
    d = z - y
    return np.abs(d), np.sign(d)


@score_loss
def huber(z, y, *, delta=1.0):
    """(z - y)²/2 up to |z - y| = ``delta``, and from there delta (|z - y| - delta/2) (Huber 1964).

    PyTorch's ``huber_loss``; its ``smooth_l1_loss(beta=delta)`` is this, divided by delta.
    """
    d = z - y
    size = np.abs(d)
    loss = np.where(size <= delta, 0.5 * d * d, delta * (size - 0.5 * delta))
    return loss, np.minimum(np.maximum(d, -delta), delta)


@score_loss
def log_cosh(z, y):
    """log cosh(z - y), with derivative tanh(z - y).

    Near 0 it is -log(1 - tanh²)/2, which keeps all digits of a small loss; elsewhere |d| + log(1 + exp(-2|d|)) - log 2,
    which does not overflow.
    """
    d = z - y
    size = np.abs(d)
    near = np.tanh(np.minimum(size, 1))
    loss = np.where(size < 1, -0.5 * np.log1p(-near * near), size + np.log1p(np.exp(-2 * size)) - math.log(2))
    return loss, np.tanh(d)


@score_loss
def quantile(z, y, *, q=0.5):
    """q (y - z) where y > z, and (1 - q)(z - y) elsewhere: the scores become the ``q``-quantile of Y.

    Koenker & Bassett 1978; 0 < q < 1, and 0.5 is the median. scikit-learn's ``mean_pinball_loss(alpha=q)``.
    """
    d = z - y
    return np.maximum(-q * d, (1 - q) * d), np.where(d > 0, 1 - q, np.where(d < 0, -q, 0))


# --- counts -----------------------------------------------------------------------------------------------------------


@score_loss
def poisson(z, y):
    """exp(z) - y z for counts Y of rates exp(z): minus the logarithm of Poisson's probability of y, but for log y!.

    PyTorch's ``poisson_nll_loss(log_input=True)``. Keras' ``poisson`` is given the rate, of which z is the logarithm.
    """
    rate = np.exp(z)
    return rate - y * z, rate - y


# --- two classes ------------------------------------------------------------------------------------------------------


@score_loss
def sigmoid_cross_entropy(z, y):
    """-y log σ(z) - (1 - y) log(1 - σ(z)), with derivative σ(z) - y.

    Written as max(z, 0) - z y + log(1 + exp(-|z|)), which neither takes the logarithm of 0 nor overflows.
    """
    small = np.exp(-np.abs(z))
    sigmoid = np.exp(np.minimum(z, 0)) / (1 + small)
    return np.maximum(z, 0) - z * y + np.log1p(small), sigmoid - y


@score_loss
def smoothed_sigmoid_cross_entropy(z, y, *, smoothing=0.1):
    """:data:`sigmoid_cross_entropy` of (1 - smoothing) y + smoothing/2."""
    y = (1 - smoothing) * y + 0.5 * smoothing
    small = np.exp(-np.abs(z))
    sigmoid = np.exp(np.minimum(z, 0)) / (1 + small)
    return np.maximum(z, 0) - z * y + np.log1p(small), sigmoid - y


@score_loss
def focal(z, y, *, gamma=2.0, alpha=0.25):
    """-α_t (1 - p_t)^γ log p_t of p = σ(z): cross-entropy that easy samples hardly count in (Lin et al. 2017, eq. 5).

    p_t is the probability of the right class. Y is in [0, 1]; gamma >= 0. α_t is alpha where y is 1 and 1 - alpha where
    it is 0; a negative alpha stands for α_t = 1. As torchvision's ``sigmoid_focal_loss``.
    """
    small = np.exp(-np.abs(z))
    one, zero = np.exp(np.minimum(z, 0)) / (1 + small), np.exp(np.minimum(-z, 0)) / (1 + small)
    entropy = np.maximum(z, 0) - z * y + np.log1p(small)
    miss = y * zero + (1 - y) * one  # 1 - p_t, without cancellation
    weight = np.where(alpha < 0, 1, alpha * y + (1 - alpha) * (1 - y)) * miss**gamma
    slope = one * zero * (1 - 2.0 * y) / np.where(miss > 0, miss, 1)  # of log(1 - p_t)
    return weight * entropy, weight * (one - y + gamma * entropy * slope)


@score_loss
def hinge(z, y):
    """max(0, 1 - s z), where s is 1 for y = 1 and -1 for y = 0."""
    s = 2.0 * y - 1
    margin = 1 - s * z
    return np.maximum(margin, 0), np.where(margin > 0, -s, 0)


@score_loss
def squared_hinge(z, y):
    """max(0, 1 - s z)², where s is 1 for y = 1 and -1 for y = 0."""
    s = 2.0 * y - 1
    margin = np.maximum(1 - s * z, 0)
    return margin * margin, -2 * s * margin


__all__ = sorted(name for name, declared in globals().items() if isinstance(declared, ScoreLoss))
