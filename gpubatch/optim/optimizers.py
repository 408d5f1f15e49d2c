"""The optimizers of the library, in the order of their rules in formula/rules.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict, Unpack

from gpubatch.backend import Backend
from gpubatch.errors import ArgumentError, check_bool, check_choice, check_real
from gpubatch.formula import rules
from gpubatch.optim.groups import Hyper
from gpubatch.optim.optimizer import Optimizer


class NotDecay(TypedDict, total=False):
    """What every optimizer takes besides weight decay, by name: see :class:`Optimizer`."""

    backend: str | Backend | None
    master_weights: bool
    groups: Mapping[str, Mapping[str, Any]] | None
    check: bool | None


class Common(NotDecay, total=False):
    """What every optimizer takes, by name."""

    weight_decay: Hyper
    decoupled: bool


class SGD(Optimizer):
    """Gradient descent: w -= lr*g.

    >>> w = np.array([1.0, 2.0])
    >>> step = gb.SGD([w], lr=0.1).step([np.array([1.0, -1.0])])
    >>> w.round(4)
    array([0.9, 2.1])
    """

    def __init__(self, params: Any, lr: Hyper, **common: Unpack[Common]) -> None:
        Optimizer.__init__(self, rules.sgd, params, lr=lr, **common)


class Momentum(Optimizer):
    """Moving-average momentum: v = beta*v + (1-beta)*g; w -= lr*v.

    It equals PyTorch's momentum at the learning rate lr*(1-beta). ``bias_correction`` divides v by 1 - beta**t.

    >>> w = np.array([1.0, 2.0])
    >>> step = gb.Momentum([w], lr=0.1).step([np.array([1.0, -1.0])])
    >>> w.round(4)
    array([0.99, 2.01])
    """

    def __init__(
        self, params: Any, lr: Hyper, beta: Hyper = 0.9, bias_correction: bool = False, **common: Unpack[Common]
    ) -> None:
        Optimizer.__init__(self, rules.momentum, params, lr=lr, beta=beta, bias_correction=bias_correction, **common)


class HeavyBall(Optimizer):
    """Classical momentum: v = mu*v + g; w -= lr*v, as in PyTorch.

    With ``lr_in_velocity``, v = mu*v - lr*g; w += v, as in Keras, CS231n and scikit-learn: the same while lr stays,
    another path when it changes. ``nesterov`` looks ahead: w -= lr*(g + mu*v), or w += mu*v - lr*g. ``dampening`` is
    PyTorch's: v = g in the first step, then v = mu*v + (1-dampening)*g; PyTorch has it without ``nesterov`` only.

    >>> w = np.array([1.0, 2.0])
    >>> step = gb.HeavyBall([w], lr=0.1).step([np.array([1.0, -1.0])])
    >>> w.round(4)
    array([0.9, 2.1])
    """

    def __init__(
        self,
        params: Any,
        lr: Hyper,
        mu: Hyper = 0.9,
        nesterov: bool = False,
        lr_in_velocity: bool = False,
        dampening: Hyper = 0.0,
        **common: Unpack[Common],
    ) -> None:
        inside = check_bool("lr_in_velocity", lr_in_velocity)
        if callable(dampening) or dampening != 0.0:
            if inside or check_bool("nesterov", nesterov):
                other = "lr_in_velocity" if inside else "nesterov"
                raise ArgumentError(f"dampening must be 0 with {other}=True, got {dampening!r}")
            Optimizer.__init__(self, rules.heavy_ball_dampened, params, lr=lr, mu=mu, dampening=dampening, **common)
        else:
            rule = rules.heavy_ball_lr_in_velocity if inside else rules.heavy_ball
            Optimizer.__init__(self, rule, params, lr=lr, mu=mu, nesterov=nesterov, **common)


class Adagrad(Optimizer):
    """Adagrad: s += g*g; w -= lr*g/(sqrt(s) + eps) (PyTorch), or lr*g/sqrt(s + eps) with ``eps_at="inside"`` (Keras).

    ``initial_accumulator`` is what s starts from.

    >>> w = np.array([1.0, 2.0])
    >>> step = gb.Adagrad([w], lr=0.1).step([np.array([1.0, -1.0])])
    >>> w.round(4)
    array([0.9, 2.1])
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


class Adadelta(Optimizer):
    """Adadelta (Zeiler 2012): the step is g * sqrt(d + eps) / sqrt(s + eps), s and d averages of g*g and of its square.

    Defaults are PyTorch's. The paper has rho 0.95 and, like optax, no learning rate, which is lr=1; Keras has lr 1e-3,
    rho 0.95 and eps 1e-7.

    >>> w = np.array([1.0, 2.0])
    >>> step = gb.Adadelta([w], lr=1.0).step([np.array([1.0, -1.0])])
    >>> w.round(4)
    array([0.9968, 2.0032])
    """

    def __init__(
        self, params: Any, lr: Hyper = 1.0, rho: Hyper = 0.9, eps: Hyper = 1e-6, **common: Unpack[Common]
    ) -> None:
        Optimizer.__init__(self, rules.adadelta, params, lr=lr, rho=rho, eps=eps, **common)


class RMSProp(Optimizer):
    """RMSProp: s = rho*s + (1-rho)*g*g; w -= lr*g/(sqrt(s) + eps).

    ``eps_at`` is "outside" (PyTorch, CS231n, Chainer) or "inside", sqrt(s + eps) (Keras, optax, the course notes).
    ``centered`` divides by the standard deviation instead; ``momentum`` is heavy-ball momentum on the scaled gradient:
    b = momentum*b + step; w -= lr*b (PyTorch), or with ``lr_in_velocity`` b = momentum*b - lr*step; w += b (Keras,
    optax). PyTorch's defaults are lr 1e-2 and rho 0.99. Graves 2013 (arXiv:1308.0850, eq. 38 to 45; Chainer's
    RMSpropGraves) is lr=1e-4, rho=0.95, momentum=0.9, eps=1e-4, eps_at="inside", centered=True, lr_in_velocity=True.

    >>> w = np.array([1.0, 2.0])
    >>> step = gb.RMSProp([w], lr=0.01).step([np.array([1.0, -1.0])])
    >>> w.round(4)
    array([0.9684, 2.0316])
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
        lr_in_velocity: bool = False,
        **common: Unpack[Common],
    ) -> None:
        check_choice("eps_at", eps_at, ["outside", "inside"])
        inside = check_bool("lr_in_velocity", lr_in_velocity)
        if callable(momentum) or momentum != 0.0:
            if check_bool("centered", centered):
                rule = rules.rmsprop_centered_momentum_lr_in_velocity if inside else rules.rmsprop_centered_momentum
            else:
                rule = rules.rmsprop_momentum_lr_in_velocity if inside else rules.rmsprop_momentum
            Optimizer.__init__(self, rule, params, lr=lr, rho=rho, eps=eps, eps_at=eps_at, momentum=momentum, **common)
        else:
            if inside:
                raise ArgumentError("lr_in_velocity=True needs momentum, got momentum=0")
            rule = rules.rmsprop_centered if check_bool("centered", centered) else rules.rmsprop
            Optimizer.__init__(self, rule, params, lr=lr, rho=rho, eps=eps, eps_at=eps_at, **common)


class Adam(Optimizer):
    """Adam (Kingma & Ba 2015): bias-corrected averages of g and g*g; w -= lr * m_hat / (sqrt(v_hat) + eps).

    ``eps_at`` is "outside" (the paper's algorithm 1, PyTorch, optax), "inside", sqrt(v_hat + eps) (the course notes),
    or "hat", eps before the bias correction (Keras with eps 1e-7, scikit-learn, Chainer). ``amsgrad=True`` never lets
    the second moment fall (Reddi et al. 2018): its maximum is over the raw moment (PyTorch, Keras, Chainer), with
    ``amsgrad="corrected"`` over the bias-corrected one (optax).

    >>> w = np.array([1.0, 2.0])
    >>> step = gb.Adam([w], lr=0.1).step([np.array([1.0, -1.0])])
    >>> w.round(4)
    array([0.9, 2.1])
    """

    def __init__(
        self,
        params: Any,
        lr: Hyper = 1e-3,
        beta1: Hyper = 0.9,
        beta2: Hyper = 0.999,
        eps: Hyper = 1e-8,
        eps_at: str = "outside",
        amsgrad: bool | str = False,
        **common: Unpack[Common],
    ) -> None:
        check_choice("eps_at", eps_at, ["outside", "inside", "hat"])
        if isinstance(amsgrad, str):
            check_choice("amsgrad", amsgrad, ["corrected"])
            check_choice("eps_at", eps_at, ["outside", "inside"])  # after the correction "hat" has no meaning
            rule = rules.amsgrad_corrected
        else:
            rule = rules.amsgrad if check_bool("amsgrad", amsgrad) else rules.adam
        Optimizer.__init__(self, rule, params, lr=lr, beta1=beta1, beta2=beta2, eps=eps, eps_at=eps_at, **common)


class AdamW(Optimizer):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019): w *= 1 - lr*weight_decay before Adam's update.

    >>> w = np.array([1.0, 2.0])
    >>> step = gb.AdamW([w], lr=0.1).step([np.array([1.0, -1.0])])
    >>> w.round(4)
    array([0.899, 2.098])
    """

    def __init__(
        self,
        params: Any,
        lr: Hyper = 1e-3,
        beta1: Hyper = 0.9,
        beta2: Hyper = 0.999,
        eps: Hyper = 1e-8,
        eps_at: str = "outside",
        amsgrad: bool | str = False,
        weight_decay: Hyper = 1e-2,
        decoupled: bool = True,
        **common: Unpack[NotDecay],
    ) -> None:
        decay = {"weight_decay": weight_decay, "decoupled": decoupled}
        Adam.__init__(self, params, lr, beta1, beta2, eps, eps_at, amsgrad, **decay, **common)  # type: ignore[arg-type]


class Adamax(Optimizer):
    """Adamax (Kingma & Ba 2015, section 7.1): w -= lr*m_hat/u; u = max(beta2*u, |g| + eps) is the largest recent |g|.

    ``eps_at`` is "inside" the maximum (PyTorch, optax), or "outside": u = max(beta2*u, |g|); w -= lr*m_hat/(u + eps)
    (Keras, with lr 1e-3 and eps 1e-7). The paper has no eps.

    >>> w = np.array([1.0, 2.0])
    >>> step = gb.Adamax([w], lr=0.1).step([np.array([1.0, -1.0])])
    >>> w.round(4)
    array([0.9, 2.1])
    """

    def __init__(
        self,
        params: Any,
        lr: Hyper = 2e-3,
        beta1: Hyper = 0.9,
        beta2: Hyper = 0.999,
        eps: Hyper = 1e-8,
        eps_at: str = "inside",
        **common: Unpack[Common],
    ) -> None:
        check_choice("eps_at", eps_at, ["outside", "inside"])
        hyper = {"lr": lr, "beta1": beta1, "beta2": beta2, "eps": eps}
        Optimizer.__init__(self, rules.adamax, params, **hyper, eps_at=eps_at, **common)


class AdaBelief(Optimizer):
    """AdaBelief (Zhuang et al. 2020): Adam with s = beta2*s + (1-beta2)*(g-m)**2 + eps in place of the second moment.

    eps is also outside the root, as in the paper and optax. The authors' package decouples weight decay and rectifies
    the step (:class:`RAdam`) by default; this has neither, unless ``decoupled`` asks for the first.

    >>> w = np.array([1.0, 2.0])
    >>> step = gb.AdaBelief([w], lr=0.1).step([np.array([1.0, -1.0])])
    >>> w.round(4)
    array([0.8889, 2.1111])
    """

    def __init__(
        self,
        params: Any,
        lr: Hyper = 1e-3,
        beta1: Hyper = 0.9,
        beta2: Hyper = 0.999,
        eps: Hyper = 1e-16,
        **common: Unpack[Common],
    ) -> None:
        Optimizer.__init__(self, rules.adabelief, params, lr=lr, beta1=beta1, beta2=beta2, eps=eps, **common)


class Yogi(Optimizer):
    """Yogi (Zaheer et al. 2018): Adam with v -= (1-beta2)*sign(v - g*g)*g*g, so that v falls slowly.

    As in optax there is bias correction, and m and v start from ``initial_accumulator``; lr and eps are the paper's.

    >>> w = np.array([1.0, 2.0])
    >>> step = gb.Yogi([w], lr=0.1).step([np.array([1.0, -1.0])])
    >>> w.round(4)
    array([0.9001, 2.0998])
    """

    def __init__(
        self,
        params: Any,
        lr: Hyper = 1e-2,
        beta1: Hyper = 0.9,
        beta2: Hyper = 0.999,
        eps: Hyper = 1e-3,
        initial_accumulator: float = 1e-6,
        **common: Unpack[Common],
    ) -> None:
        start = check_real("initial_accumulator", initial_accumulator, 0.0)
        Optimizer.__init__(self, rules.yogi, params, lr=lr, beta1=beta1, beta2=beta2, eps=eps, **common)
        for name in ("m", "v"):
            self._state[name].flat.fill(start)


class RAdam(Optimizer):
    """RAdam (Liu et al. 2020): w -= lr*m_hat in the first steps, then Adam with lr times a factor that rises to 1.

    ``eps_at`` is "hat", before the bias correction (PyTorch, the authors' code), "outside" (optax), or "inside".

    >>> w = np.array([1.0, 2.0])
    >>> step = gb.RAdam([w], lr=0.1).step([np.array([1.0, -1.0])])
    >>> w.round(4)
    array([0.9, 2.1])
    """

    def __init__(
        self,
        params: Any,
        lr: Hyper = 1e-3,
        beta1: Hyper = 0.9,
        beta2: Hyper = 0.999,
        eps: Hyper = 1e-8,
        eps_at: str = "hat",
        **common: Unpack[Common],
    ) -> None:
        check_choice("eps_at", eps_at, ["outside", "inside", "hat"])
        hyper = {"lr": lr, "beta1": beta1, "beta2": beta2, "eps": eps}
        Optimizer.__init__(self, rules.radam, params, **hyper, eps_at=eps_at, **common)


class NAdam(Optimizer):
    """Adam with Nesterov momentum (Dozat 2016): the step already uses the momentum of the next one.

    beta1 is constant (optax), or with ``momentum_decay`` follows Dozat's schedule: 4e-3 is PyTorch's value, 1 Keras'
    (which also has eps = 1e-7).

    >>> w = np.array([1.0, 2.0])
    >>> step = gb.NAdam([w], lr=0.1).step([np.array([1.0, -1.0])])
    >>> w.round(4)
    array([0.8526, 2.1474])
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
    """Lion (Chen et al. 2023): the sign of an interpolated momentum; the paper's weight decay is ``decoupled=True``.

    >>> w = np.array([1.0, 2.0])
    >>> step = gb.Lion([w], lr=0.1).step([np.array([1.0, -1.0])])
    >>> w.round(4)
    array([0.9, 2.1])
    """

    def __init__(
        self, params: Any, lr: Hyper = 1e-4, beta1: Hyper = 0.9, beta2: Hyper = 0.99, **common: Unpack[Common]
    ) -> None:
        Optimizer.__init__(self, rules.lion, params, lr=lr, beta1=beta1, beta2=beta2, **common)


class LARS(Optimizer):
    """LARS (You et al. 2017): momentum whose step in each array is trust_coefficient·‖w‖/(‖g‖ + λ‖w‖) of g + λw.

    λ is ``weight_decay``. ``decay_in_norm`` divides by ‖g + λw‖ instead (optax). The learning rate is in the velocity;
    ``nesterov`` looks ahead. An array that is zero, or whose gradient is, takes momentum's step.

    >>> w = np.array([1.0, 2.0])
    >>> step = gb.LARS([w], lr=0.1).step([np.array([1.0, -1.0])])
    >>> w.round(4)
    array([0.9998, 2.0002])
    """

    def __init__(
        self,
        params: Any,
        lr: Hyper,
        mu: Hyper = 0.9,
        trust_coefficient: Hyper = 1e-3,
        nesterov: bool = False,
        decay_in_norm: bool = False,
        **common: Unpack[Common],
    ) -> None:
        hyper = {"lr": lr, "mu": mu, "trust_coefficient": trust_coefficient}
        Optimizer.__init__(self, rules.lars, params, **hyper, nesterov=nesterov, decay_in_norm=decay_in_norm, **common)


class LAMB(Optimizer):
    """LAMB (You et al. 2020): Adam's step plus λw, scaled in each array to the length of w; λ is ``weight_decay``.

    An array that is zero, or whose step is, takes the step as it is (optax).

    >>> w = np.array([1.0, 2.0])
    >>> step = gb.LAMB([w], lr=0.1).step([np.array([1.0, -1.0])])
    >>> w.round(4)
    array([0.8419, 2.1581])
    """

    def __init__(
        self,
        params: Any,
        lr: Hyper = 1e-3,
        beta1: Hyper = 0.9,
        beta2: Hyper = 0.999,
        eps: Hyper = 1e-6,
        **common: Unpack[Common],
    ) -> None:
        Optimizer.__init__(self, rules.lamb, params, lr=lr, beta1=beta1, beta2=beta2, eps=eps, **common)
