"""All update rules, in the notation of their sources, in order of increasing complexity.

``w`` are the weights, ``g`` the gradient, then the state (initially zero), ``t`` the step from 1. NumPy evaluates a
formula directly; the fused kernels are generated from it. :mod:`gpubatch.formula` adds weight decay to all rules alike.
Each docstring says which libraries use the same formula.
"""

from __future__ import annotations

import functools

import numpy as np

from gpubatch.formula.reductions import norm
from gpubatch.formula.trace import host_function
from gpubatch.formula.update_rule import Rule, rule


def root(s, eps, eps_at):
    """The square root of a second moment, with eps inside or outside to keep it above zero."""
    return np.sqrt(s + eps) if eps_at == "inside" else np.sqrt(s) + eps


@rule
def sgd(w, g, t, *, lr):
    """Gradient descent."""
    return (w - lr * g,)


@rule
def momentum(w, g, v, t, *, lr, beta=0.9, bias_correction=False):
    """An exponentially weighted average of gradients (deeplearning.ai, course 2, week 2)."""
    v = beta * v + (1 - beta) * g
    v_hat = v / (1 - beta**t) if bias_correction else v
    return w - lr * v_hat, v


@rule
def heavy_ball(w, g, v, t, *, lr, mu=0.9, nesterov=False):
    """PyTorch's SGD with momentum (Sutskever et al. 2013, with the learning rate outside the velocity)."""
    v = mu * v + g
    return w - lr * (g + mu * v if nesterov else v), v


@rule
def heavy_ball_dampened(w, g, v, t, *, lr, mu=0.9, dampening=0.0):
    """PyTorch's SGD with momentum and dampening, which leaves the first gradient as it is."""
    v = mu * v + (1 - dampening * (t > 1)) * g
    return w - lr * v, v


@rule
def heavy_ball_lr_in_velocity(w, g, v, t, *, lr, mu=0.9, nesterov=False):
    """Momentum of Sutskever et al. 2013, CS231n, Keras and scikit-learn: a change of lr affects new gradients only."""
    v = mu * v - lr * g
    return (w + mu * v - lr * g if nesterov else w + v), v


@rule
def adagrad(w, g, s, t, *, lr=1e-2, eps=1e-10, eps_at="outside"):
    """Duchi, Hazan & Singer 2011; eps outside the root as in PyTorch, inside as in Keras."""
    s = s + g * g
    return w - lr * g / root(s, eps, eps_at), s


@rule
def adadelta(w, g, s, d, t, *, lr=1.0, rho=0.9, eps=1e-6):
    """Zeiler 2012, algorithm 1, which has no learning rate: ``d`` averages the squares of its steps."""
    s = rho * s + (1 - rho) * (g * g)
    step = np.sqrt(d + eps) / np.sqrt(s + eps) * g
    return w - lr * step, s, rho * d + (1 - rho) * (step * step)


@rule
def rmsprop(w, g, s, t, *, lr=1e-3, rho=0.9, eps=1e-8, eps_at="outside"):
    """Tieleman & Hinton 2012, lecture 6e; the average starts at zero, without bias correction."""
    s = rho * s + (1 - rho) * (g * g)
    return w - lr * g / root(s, eps, eps_at), s


@rule
def rmsprop_centered(w, g, s, g_avg, t, *, lr=1e-3, rho=0.9, eps=1e-8, eps_at="outside"):
    """RMSProp with the variance (Graves 2013, eq. 38 to 41), clamped at zero against rounding."""
    s = rho * s + (1 - rho) * (g * g)
    g_avg = rho * g_avg + (1 - rho) * g
    return w - lr * g / root(np.maximum(s - g_avg * g_avg, 0.0), eps, eps_at), s, g_avg


@rule
def rmsprop_momentum(w, g, s, b, t, *, lr=1e-3, rho=0.9, eps=1e-8, momentum=0.9, eps_at="outside"):
    """RMSProp with momentum on the scaled gradient, the learning rate outside, as in PyTorch."""
    s = rho * s + (1 - rho) * (g * g)
    b = momentum * b + g / root(s, eps, eps_at)
    return w - lr * b, s, b


@rule
def rmsprop_centered_momentum(w, g, s, g_avg, b, t, *, lr=1e-3, rho=0.9, eps=1e-8, momentum=0.9, eps_at="outside"):
    """RMSProp with the variance and with momentum, as above."""
    s = rho * s + (1 - rho) * (g * g)
    g_avg = rho * g_avg + (1 - rho) * g
    b = momentum * b + g / root(np.maximum(s - g_avg * g_avg, 0.0), eps, eps_at)
    return w - lr * b, s, g_avg, b


@rule
def rmsprop_momentum_lr_in_velocity(w, g, s, b, t, *, lr=1e-3, rho=0.9, eps=1e-8, momentum=0.9, eps_at="outside"):
    """RMSProp with momentum, the learning rate inside, as in Keras and optax."""
    s = rho * s + (1 - rho) * (g * g)
    b = momentum * b - lr * g / root(s, eps, eps_at)
    return w + b, s, b


@rule
def rmsprop_centered_momentum_lr_in_velocity(
    w, g, s, g_avg, b, t, *, lr=1e-3, rho=0.9, eps=1e-8, momentum=0.9, eps_at="outside"
):
    """The whole RMSProp of Graves 2013 (eq. 38 to 45, eps inside), as in Chainer; the variance clamped at zero."""
    s = rho * s + (1 - rho) * (g * g)
    g_avg = rho * g_avg + (1 - rho) * g
    b = momentum * b - lr * g / root(np.maximum(s - g_avg * g_avg, 0.0), eps, eps_at)
    return w + b, s, g_avg, b


def corrected_step(w, m, v, t, lr, beta1, beta2, eps, eps_at):
    """Adam's step from its two moments.

    "hat" is epsilon-hat, the form before section 2.1 of Kingma & Ba: bias correction does not scale eps.
    """
    if eps_at == "hat":
        return w - lr * (1 - beta2**t) ** 0.5 / (1 - beta1**t) * m / (np.sqrt(v) + eps)
    m_hat = m / (1 - beta1**t)
    v_hat = v / (1 - beta2**t)
    return w - lr * m_hat / root(v_hat, eps, eps_at)


@rule
def adam(w, g, m, v, t, *, lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, eps_at="outside"):
    """Kingma & Ba 2015, algorithm 1: eps outside the root, after bias correction; ``eps_at`` selects another form."""
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * (g * g)
    return corrected_step(w, m, v, t, lr, beta1, beta2, eps, eps_at), m, v


@rule
def amsgrad(w, g, m, v, v_max, t, *, lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, eps_at="outside"):
    """Reddi, Kale & Kumar 2018, with the maximum over the raw second moment (PyTorch, Keras)."""
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * (g * g)
    v_max = np.maximum(v_max, v)
    return corrected_step(w, m, v_max, t, lr, beta1, beta2, eps, eps_at), m, v, v_max


@rule
def amsgrad_corrected(w, g, m, v, v_max, t, *, lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, eps_at="outside"):
    """AMSGrad with the maximum over the bias-corrected second moment (optax)."""
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * (g * g)
    v_max = np.maximum(v_max, v / (1 - beta2**t))
    return w - lr * (m / (1 - beta1**t)) / root(v_max, eps, eps_at), m, v, v_max


@rule
def adamax(w, g, m, u, t, *, lr=2e-3, beta1=0.9, beta2=0.999, eps=1e-8, eps_at="inside"):
    """Kingma & Ba 2015, algorithm 2, which has no eps: inside the maximum (PyTorch, optax), or outside (Keras)."""
    m = beta1 * m + (1 - beta1) * g
    u = np.maximum(beta2 * u, np.abs(g) + eps if eps_at == "inside" else np.abs(g))
    return w - lr * (m / (1 - beta1**t)) / (u if eps_at == "inside" else u + eps), m, u


@rule
def adabelief(w, g, m, s, t, *, lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-16):
    """Zhuang et al. 2020, algorithm 2 (optax): the variance of g around m; eps in the average and outside the root."""
    m = beta1 * m + (1 - beta1) * g
    s = beta2 * s + (1 - beta2) * ((g - m) * (g - m)) + eps
    return corrected_step(w, m, s, t, lr, beta1, beta2, eps, "outside"), m, s


@rule
def yogi(w, g, m, v, t, *, lr=1e-2, beta1=0.9, beta2=0.999, eps=1e-3):
    """Zaheer et al. 2018, algorithm 2, with bias correction (optax): v moves towards g*g by (1 - beta2) * g*g."""
    m = beta1 * m + (1 - beta1) * g
    v = v - (1 - beta2) * np.sign(v - g * g) * (g * g)
    return corrected_step(w, m, v, t, lr, beta1, beta2, eps, "outside"), m, v


@host_function
def rectification(t, beta2):
    """r_t of Liu et al. 2020, algorithm 2; 0 while the average of g*g is at most 5 steps long.

    The paper's limit is 4; its authors' code, PyTorch and optax have 5.
    """
    longest = 2 / (1 - beta2) - 1
    length = longest - 2 * t * beta2**t / (1 - beta2**t)
    if length <= 5:
        return 0.0
    return ((length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)) ** 0.5


@rule
def radam(w, g, m, v, t, *, lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, eps_at="hat"):
    """Liu et al. 2020, algorithm 2: without v in the first steps, then Adam with a rectified learning rate.

    eps at "hat" as in PyTorch and the authors' code, "outside" as in optax.
    """
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * (g * g)
    r = rectification(t, beta2)
    adapted = corrected_step(w, m, v, t, lr * r, beta1, beta2, eps, eps_at)
    return np.where(r > 0, adapted, w - lr * (m / (1 - beta1**t))), m, v


@rule
def nadam(w, g, m, v, t, *, lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8):
    """Dozat 2016 with a constant beta1 (optax): applies the next step's momentum already."""
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * (g * g)
    m_hat = beta1 * m / (1 - beta1 ** (t + 1)) + (1 - beta1) * g / (1 - beta1**t)
    v_hat = v / (1 - beta2**t)
    return w - lr * m_hat / (np.sqrt(v_hat) + eps), m, v


def warmed_beta(t, beta1, momentum_decay):
    """The decay factor of the first moment at step t (Dozat 2016, section 3): from beta1/2 up to beta1."""
    return beta1 * (1 - 0.5 * 0.96 ** (t * momentum_decay))


@host_function
def warmed_product(t, beta1, momentum_decay):
    """The product of all factors up to step t, in place of beta1**t; 0 when too small to change 1 - product."""
    reached = _product_reached(beta1, momentum_decay)
    step, product = reached[0] if reached[0][0] <= t else (0, 1.0)
    while step < t and product > 1e-300:
        step += 1
        product *= warmed_beta(step, beta1, momentum_decay)
    reached[0] = (step, product)
    return product if step == t else 0.0


@functools.lru_cache(maxsize=64)
def _product_reached(beta1, momentum_decay):
    """[(step, product)] of the last call; the next step needs only one more factor."""
    return [(0, 1.0)]


@rule
def nadam_scheduled(w, g, m, v, t, *, lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, momentum_decay=4e-3):
    """Dozat 2016 with its beta1 schedule; ``momentum_decay`` is 4e-3 in PyTorch and the paper, 1 in Keras."""
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * (g * g)
    now, following = warmed_beta(t, beta1, momentum_decay), warmed_beta(t + 1, beta1, momentum_decay)
    product = warmed_product(t, beta1, momentum_decay)
    m_hat = following / (1 - product * following) * m + (1 - now) / (1 - product) * g
    v_hat = v / (1 - beta2**t)
    return w - lr * m_hat / (np.sqrt(v_hat) + eps), m, v


@rule
def lion(w, g, m, t, *, lr=1e-4, beta1=0.9, beta2=0.99):
    """Chen et al. 2023, algorithm 2: the sign of an interpolated momentum."""
    step = np.sign(beta1 * m + (1 - beta1) * g)
    return w - lr * step, beta2 * m + (1 - beta2) * g


def trust_ratio(of_weights, of_step):
    """The ratio of two norms, or 1 where one of them is 0 (You et al. 2020, section 3.1; optax)."""
    proper = (of_weights != 0) & (of_step != 0)
    return np.where(proper, of_weights, 1.0) / np.where(proper, of_step, 1.0)


@rule
def lars(w, g, v, t, *, lr, mu=0.9, weight_decay=0.0, trust_coefficient=1e-3, nesterov=False, decay_in_norm=False):
    """You, Gitman & Ginsburg 2017, algorithm 1, with λ‖w‖ in the denominator, or ``decay_in_norm`` ‖g + λw‖ (optax)."""
    decayed = g + weight_decay * w
    length = norm(decayed) if decay_in_norm else norm(g) + weight_decay * norm(w)
    step = lr * trust_ratio(trust_coefficient * norm(w), length) * decayed
    v = mu * v - step
    return (w + mu * v - step if nesterov else w + v), v


@rule
def lamb(w, g, m, v, t, *, lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-6, weight_decay=0.0):
    """You et al. 2020, algorithm 2: Adam's step with weight decay, scaled in each array to the length of w."""
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * (g * g)
    step = m / (1 - beta1**t) / (np.sqrt(v / (1 - beta2**t)) + eps) + weight_decay * w
    return w - lr * trust_ratio(norm(w), norm(step)) * step, m, v


__all__ = sorted(name for name, declared in globals().items() if isinstance(declared, Rule))
