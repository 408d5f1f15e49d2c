"""All activations: y, or (y, dy/dx) where a derivative by hand is cheaper than the derived one.

A slope that depends on y alone saves storing it: backward computes it from y. At a corner the slope is PyTorch's.
"""

from __future__ import annotations

import math

import numpy as np

from gpubatch.formula.elementwise import Activation, activation, normal_cdf


@activation
def identity(x):
    """y = x; a bias can still be added."""
    return x


@activation
def step(x):
    """1 where x > 0, else 0; the slope is 0 everywhere."""
    return np.where(x > 0, 1, 0)


@activation
def relu(x):
    """max(x, 0) (Nair & Hinton 2010)."""
    y = np.maximum(x, 0)
    return y, np.where(y > 0, 1, 0)


@activation
def leaky_relu(x, *, slope):
    """max(x, slope x) (Maas, Hannun & Ng 2013); ``slope`` is in [0, 1]."""
    y = np.maximum(x, slope * x)
    return y, np.where(y > 0, 1, slope)


@activation
def sigmoid(x):
    """1/(1 + exp(-x)). Far below 0 the exponential overflows to infinity, and y is 0, as it should be."""
    y = 1 / (1 + np.exp(-x))
    return y, y * (1 - y)


@activation
def tanh(x):
    """The hyperbolic tangent."""
    y = np.tanh(x)
    return y, 1 - y * y


@activation
def gelu(x):
    """x Φ(x) (Hendrycks & Gimpel 2016)."""
    below = normal_cdf(x)
    return x * below, below + x * np.exp(-0.5 * x * x) * (1 / math.sqrt(2 * math.pi))


@activation
def gelu_tanh(x):
    """GELU approximated by tanh (same paper, section 2)."""
    k, cubic = math.sqrt(2 / math.pi), 0.044715
    square = x * x
    t = np.tanh(x * (k + k * cubic * square))
    return x * (0.5 * (1 + t)), 0.5 * (1 + t + x * (1 - t * t) * (k + 3 * k * cubic * square))


__all__ = sorted(name for name, declared in globals().items() if isinstance(declared, Activation))
