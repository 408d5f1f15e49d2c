"""The optimizers of the library, in the order of their rules in formula/rules.py."""

from __future__ import annotations

from typing import Any, TypedDict, Unpack

from gpubatch.backend import Backend
from gpubatch.errors import check_bool, check_choice, check_real
from gpubatch.formula import rules
from gpubatch.optim.optimizer import Hyper, Optimizer

__all__ = ["SGD", "Adagrad", "Adam", "AdamW", "HeavyBall", "Lion", "Momentum", "NAdam", "RMSProp"]


class Common(TypedDict, total=False):
    """What every optimizer takes, by name: see :class:`Optimizer`."""

    weight_decay: Hyper
    decoupled: bool
    backend: str | Backend | None
    master_weights: bool


class SGD(Optimizer):
    """Gradient descent: w -= lr*g."""

    def __init__(self, params: Any, lr: Hyper, **common: Unpack[Common]) -> None:
        Optimizer.__init__(self, rules.sgd, params, lr=lr, **common)


class Momentum(Optimizer):
    """Moving-average momentum: v = beta*v + (1-beta)*g; w -= lr*v.

    It equals PyTorch's momentum at the learning rate lr*(1-beta). ``bias_correction`` divides v by 1 - beta**t.
    """

    def __init__(
        self, params: Any, lr: Hyper, beta: Hyper = 0.9, bias_correction: bool = False, **common: Unpack[Common]
    ) -> None:
        Optimizer.__init__(self, rules.momentum, params, lr=lr, beta=beta, bias_correction=bias_correction, **common)


class HeavyBall(Optimizer):
    """Classical momentum: v = mu*v + g; w -= lr*v, as in PyTorch.

    With ``lr_in_velocity``, v = mu*v - lr*g; w += v, as in Keras, CS231n and scikit-learn: the same while lr stays,
    another path when it changes. ``nesterov`` looks ahead: w -= lr*(g + mu*v), or w += mu*v - lr*g.
    """

    def __init__(
        self,
        params: Any,
        lr: Hyper,
        mu: Hyper = 0.9,
        nesterov: bool = False,
        lr_in_velocity: bool = False,
        **common: Unpack[Common],
    ) -> None:
        inside = check_bool("lr_in_velocity", lr_in_velocity)
        rule = rules.heavy_ball_lr_in_velocity if inside else rules.heavy_ball
        Optimizer.__init__(self, rule, params, lr=lr, mu=mu, nesterov=nesterov, **common)


class Adagrad(Optimizer):
    """Adagrad: s += g*g; w -= lr*g/(sqrt(s) + eps) (PyTorch), or lr*g/sqrt(s + eps) with ``eps_at="inside"`` (Keras).

    ``initial_accumulator`` is what s starts from.
    """

    def __init__(
        self,
        params: Any,
        lr: Hyper = 1e-2,
        eps: Hyper = 1e-10,
        eps_at: str = "outside",
        initial_accumulator: float = 0.0,
        **common: Unpack[Common],
    ) -> None:
        check_choice("eps_at", eps_at, ["outside", "inside"])
        start = check_real("initial_accumulator", initial_accumulator, 0.0)
        Optimizer.__init__(self, rules.adagrad, params, lr=lr, eps=eps, eps_at=eps_at, **common)
        self._state["s"].flat.fill(start)


class RMSProp(Optimizer):
    """RMSProp: s = rho*s + (1-rho)*g*g; w -= lr*g/(sqrt(s) + eps).

    ``eps_at`` is "outside" (PyTorch, CS231n, Chainer) or "inside", sqrt(s + eps) (Keras, optax, the course notes).
    ``centered`` divides by the standard deviation instead; ``momentum`` is heavy-ball momentum on the scaled gradient
    (PyTorch). PyTorch's defaults are lr 1e-2 and rho 0.99.
    """

    def __init__(
        self,
        params: Any,
        lr: Hyper = 1e-3,
        rho: Hyper = 0.9,
        eps: Hyper = 1e-8,
        eps_at: str = "outside",
        centered: bool = False,
        momentum: Hyper = 0.0,
        **common: Unpack[Common],
    ) -> None:
        check_choice("eps_at", eps_at, ["outside", "inside"])
        if callable(momentum) or momentum != 0.0:
            rule = rules.rmsprop_centered_momentum if check_bool("centered", centered) else rules.rmsprop_momentum
            Optimizer.__init__(self, rule, params, lr=lr, rho=rho, eps=eps, eps_at=eps_at, momentum=momentum, **common)
        else:
            rule = rules.rmsprop_centered if check_bool("centered", centered) else rules.rmsprop
            Optimizer.__init__(self, rule, params, lr=lr, rho=rho, eps=eps, eps_at=eps_at, **common)


class Adam(Optimizer):
    """Adam (Kingma & Ba 2015): bias-corrected averages of g and g*g; w -= lr * m_hat / (sqrt(v_hat) + eps).

    ``eps_at`` is "outside" (the paper's algorithm 1, PyTorch, optax), "inside", sqrt(v_hat + eps) (the course notes),
    or "hat", eps before the bias correction (Keras with eps 1e-7, scikit-learn, Chainer). ``amsgrad`` never lets the
    second moment fall (Reddi et al. 2018; the maximum over the raw moment).
    """

    def __init__(
        self,
        params: Any,
        lr: Hyper = 1e-3,
        beta1: Hyper = 0.9,
        beta2: Hyper = 0.999,
        eps: Hyper = 1e-8,
        eps_at: str = "outside",
        amsgrad: bool = False,
        **common: Unpack[Common],
    ) -> None:
        check_choice("eps_at", eps_at, ["outside", "inside", "hat"])
        rule = rules.amsgrad if check_bool("amsgrad", amsgrad) else rules.adam
        Optimizer.__init__(self, rule, params, lr=lr, beta1=beta1, beta2=beta2, eps=eps, eps_at=eps_at, **common)


class AdamW(Optimizer):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019): w *= 1 - lr*weight_decay before Adam's update."""

    def __init__(
        self,
        params: Any,
        lr: Hyper = 1e-3,
        beta1: Hyper = 0.9,
        beta2: Hyper = 0.999,
        eps: Hyper = 1e-8,
        eps_at: str = "outside",
        amsgrad: bool = False,
        weight_decay: Hyper = 1e-2,
        decoupled: bool = True,
        backend: str | Backend | None = None,
        master_weights: bool = False,
    ) -> None:
        common = Common(weight_decay=weight_decay, decoupled=decoupled, backend=backend, master_weights=master_weights)
        Adam.__init__(self, params, lr, beta1, beta2, eps, eps_at, amsgrad, **common)  # type: ignore[arg-type]


class NAdam(Optimizer):
    """Adam with Nesterov momentum (Dozat 2016): the step already uses the momentum of the next one.

    beta1 is constant (optax), or with ``momentum_decay`` follows Dozat's schedule: 4e-3 is PyTorch's value, 1 Keras'
    (which also has eps = 1e-7).
    """

    def __init__(
        self,
        params: Any,
        lr: Hyper = 1e-3,
        beta1: Hyper = 0.9,
        beta2: Hyper = 0.999,
        eps: Hyper = 1e-8,
        momentum_decay: float | None = None,
        **common: Unpack[Common],
    ) -> None:
        if momentum_decay is None:
            Optimizer.__init__(self, rules.nadam, params, lr=lr, beta1=beta1, beta2=beta2, eps=eps, **common)
        else:
            hyper = {"lr": lr, "beta1": beta1, "beta2": beta2, "eps": eps, "momentum_decay": momentum_decay}
            Optimizer.__init__(self, rules.nadam_scheduled, params, **hyper, **common)


class Lion(Optimizer):
    """Lion (Chen et al. 2023): the sign of an interpolated momentum; the paper's weight decay is ``decoupled=True``."""

    def __init__(
        self, params: Any, lr: Hyper = 1e-4, beta1: Hyper = 0.9, beta2: Hyper = 0.99, **common: Unpack[Common]
    ) -> None:
        Optimizer.__init__(self, rules.lion, params, lr=lr, beta1=beta1, beta2=beta2, **common)
