"""The table of all optimizers in all variants, for the tests of optimizers, kernels and peers.

``first`` is the closed form of the first step from zero weights and state; ``torch`` and ``optax`` make the optimizer
of another library that uses the same formula.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

import gpubatch as gb
from gpubatch.formula import Trace

LR = 0.03  # of all cases, so that a wrong learning rate shows


@dataclass(frozen=True)
class Case:
    make: Callable[..., gb.Optimizer]  # (parameters, **more arguments)
    first: Callable[[np.ndarray], np.ndarray]
    torch: Callable[[Any, Any], Any] | None = None  # (torch.optim, parameters)
    optax: Callable[[Any], Any] | None = None  # (optax)
    kind: str = ""  # the name of the class; a rule of the user's own has none
    variant: dict[str, Any] = field(default_factory=dict)  # its arguments


def trace_of(case: Case) -> tuple[Trace, dict[str, float]]:
    """The traced formula of a case, with the values of its hyper-parameters."""
    opt = case.make([np.zeros(1)])
    return opt._trace, {name: opt.hyper[name] for name in opt._trace.hyper}


def case(kind: Any, first: Any, torch: Any = None, optax: Any = None, **variant: Any) -> Case:
    arguments = {"lr": LR, **variant}
    return Case(
        lambda params, **more: kind(params, **{**arguments, **more}), first, torch, optax, kind.__name__, arguments
    )


def sign_step(factor: float = 1.0, eps: float = 1e-8) -> Callable[[np.ndarray], np.ndarray]:
    return lambda g: -LR * factor * g / (np.abs(g) + eps)


def root_step(scale: float, eps: float = 1e-8, inside: bool = False) -> Callable[[np.ndarray], np.ndarray]:
    if inside:
        return lambda g: -LR * g / np.sqrt(scale * g**2 + eps)
    return lambda g: -LR * g / (np.sqrt(scale) * np.abs(g) + eps)


@gb.rule
def custom(w, g, m, seen, t, *, lr=LR, beta=0.8, limit=0.5, signed=True):
    """A user's rule with all features of formulas: conditions, functions, powers, state passed on, t."""
    m = beta * m + (1 - beta) * np.minimum(np.maximum(g, -limit), limit)
    step = np.sign(m) * abs(m) ** 0.5 if signed else m
    step = np.where(abs(step) <= 1e-3, step**2, step)
    return w - lr * np.where(t < 3, 0.5 * step, step), m, g


CASES: dict[str, Case] = {
    "sgd": case(gb.SGD, lambda g: -LR * g, lambda o, p: o.SGD(p, LR), lambda o: o.sgd(LR)),
    "sgd l2": case(gb.SGD, lambda g: -LR * g, lambda o, p: o.SGD(p, LR, weight_decay=0.1), weight_decay=0.1),
    "momentum": case(gb.Momentum, lambda g: -LR * 0.1 * g, lambda o, p: o.SGD(p, LR * 0.1, momentum=0.9)),
    "momentum corrected": case(
        gb.Momentum,
        lambda g: -LR * g,
        optax=lambda o: o.chain(o.ema(0.9, debias=True), o.scale(-LR)),
        bias_correction=True,
    ),
    "heavy ball": case(
        gb.HeavyBall, lambda g: -LR * g, lambda o, p: o.SGD(p, LR, momentum=0.9), lambda o: o.sgd(LR, 0.9)
    ),
    "heavy ball nesterov": case(
        gb.HeavyBall,
        lambda g: -LR * 1.9 * g,
        lambda o, p: o.SGD(p, LR, momentum=0.9, nesterov=True),
        lambda o: o.sgd(LR, 0.9, nesterov=True),
        nesterov=True,
    ),
    # With a constant learning rate both forms of momentum agree; another test shows that they differ when it changes.
    "heavy ball inside": case(
        gb.HeavyBall, lambda g: -LR * g, lambda o, p: o.SGD(p, LR, momentum=0.9), lr_in_velocity=True
    ),
    "heavy ball inside nesterov": case(
        gb.HeavyBall,
        lambda g: -LR * 1.9 * g,
        lambda o, p: o.SGD(p, LR, momentum=0.9, nesterov=True),
        lr_in_velocity=True,
        nesterov=True,
    ),
    "heavy ball dampened": case(
        gb.HeavyBall,
        lambda g: -LR * g,
        lambda o, p: o.SGD(p, LR, momentum=0.9, dampening=0.3),
        dampening=0.3,
    ),
    "adagrad": case(gb.Adagrad, sign_step(eps=1e-10), lambda o, p: o.Adagrad(p, LR)),
    "adagrad inside": case(
        gb.Adagrad,
        lambda g: -LR * g / np.sqrt(0.1 + g**2 + 1e-7),
        optax=lambda o: o.adagrad(LR),
        eps=1e-7,
        eps_at="inside",
        initial_accumulator=0.1,
    ),
    "adadelta": case(
        gb.Adadelta,
        lambda g: -LR * g * np.sqrt(1e-6) / np.sqrt(0.1 * g**2 + 1e-6),
        lambda o, p: o.Adadelta(p, LR),
        lambda o: o.adadelta(LR),
    ),
    "rmsprop": case(gb.RMSProp, root_step(0.1), lambda o, p: o.RMSprop(p, LR, alpha=0.9)),
    "rmsprop inside": case(
        gb.RMSProp, root_step(0.1, inside=True), optax=lambda o: o.rmsprop(LR, 0.9), eps_at="inside"
    ),
    "rmsprop centered": case(
        gb.RMSProp, root_step(0.09), lambda o, p: o.RMSprop(p, LR, alpha=0.9, centered=True), centered=True
    ),
    "rmsprop centered inside": case(
        gb.RMSProp,
        root_step(0.09, inside=True),
        optax=lambda o: o.rmsprop(LR, 0.9, centered=True),
        centered=True,
        eps_at="inside",
    ),
    "rmsprop momentum": case(
        gb.RMSProp, root_step(0.1), lambda o, p: o.RMSprop(p, LR, alpha=0.9, momentum=0.8), momentum=0.8
    ),
    "rmsprop momentum inside": case(
        gb.RMSProp,
        root_step(0.1, inside=True),
        optax=lambda o: o.rmsprop(LR, 0.9, momentum=0.8),
        momentum=0.8,
        eps_at="inside",
    ),
    "rmsprop centered momentum": case(
        gb.RMSProp,
        root_step(0.09),
        lambda o, p: o.RMSprop(p, LR, alpha=0.9, centered=True, momentum=0.8),
        centered=True,
        momentum=0.8,
    ),
    "rmsprop centered momentum inside": case(
        gb.RMSProp,
        root_step(0.09, inside=True),
        optax=lambda o: o.rmsprop(LR, 0.9, centered=True, momentum=0.8),
        centered=True,
        momentum=0.8,
        eps_at="inside",
    ),
    # Likewise, with a constant learning rate it may be inside the velocity or not.
    "rmsprop momentum lr in velocity": case(
        gb.RMSProp,
        root_step(0.1),
        lambda o, p: o.RMSprop(p, LR, alpha=0.9, momentum=0.8),
        lambda o: o.rmsprop(LR, 0.9, momentum=0.8, eps_in_sqrt=False),
        momentum=0.8,
        lr_in_velocity=True,
    ),
    "rmsprop momentum inside lr in velocity": case(
        gb.RMSProp,
        root_step(0.1, inside=True),
        optax=lambda o: o.rmsprop(LR, 0.9, momentum=0.8),
        momentum=0.8,
        eps_at="inside",
        lr_in_velocity=True,
    ),
    "rmsprop centered momentum lr in velocity": case(
        gb.RMSProp,
        root_step(0.09),
        lambda o, p: o.RMSprop(p, LR, alpha=0.9, centered=True, momentum=0.8),
        centered=True,
        momentum=0.8,
        lr_in_velocity=True,
    ),
    "rmsprop of Graves": case(
        gb.RMSProp,
        root_step(0.05 * 0.95, eps=1e-4, inside=True),
        optax=lambda o: o.rmsprop(LR, 0.95, eps=1e-4, centered=True, momentum=0.9),
        rho=0.95,
        momentum=0.9,
        eps=1e-4,
        centered=True,
        eps_at="inside",
        lr_in_velocity=True,
    ),
    "adam": case(gb.Adam, sign_step(), lambda o, p: o.Adam(p, LR), lambda o: o.adam(LR)),
    "adam l2": case(gb.Adam, sign_step(), lambda o, p: o.Adam(p, LR, weight_decay=0.1), weight_decay=0.1),
    # optax calls the eps inside of the root eps_root.
    "adam inside": case(
        gb.Adam,
        root_step(1.0, inside=True),
        optax=lambda o: o.adam(LR, eps=0.0, eps_root=1e-8),
        eps_at="inside",
    ),
    "adam hat": case(gb.Adam, sign_step(eps=1e-7 / np.sqrt(0.001)), eps=1e-7, eps_at="hat"),
    "amsgrad": case(gb.Adam, sign_step(), lambda o, p: o.Adam(p, LR, amsgrad=True), amsgrad=True),
    "amsgrad inside": case(gb.Adam, root_step(1.0, inside=True), amsgrad=True, eps_at="inside"),
    "amsgrad hat": case(gb.Adam, sign_step(eps=1e-8 / np.sqrt(0.001)), amsgrad=True, eps_at="hat"),
    "amsgrad corrected": case(gb.Adam, sign_step(), optax=lambda o: o.amsgrad(LR), amsgrad="corrected"),
    "amsgrad corrected inside": case(
        gb.Adam,
        root_step(1.0, inside=True),
        optax=lambda o: o.amsgrad(LR, eps=0.0, eps_root=1e-8),
        amsgrad="corrected",
        eps_at="inside",
    ),
    "adamax": case(gb.Adamax, sign_step(), lambda o, p: o.Adamax(p, LR), lambda o: o.adamax(LR)),
    "adamax outside": case(gb.Adamax, sign_step(), eps_at="outside"),
    "adabelief": case(
        gb.AdaBelief,
        lambda g: -LR * g / (np.sqrt((0.9 * g) ** 2 + 1e-16 / 0.001) + 1e-16),
        optax=lambda o: o.adabelief(LR),
    ),
    "yogi": case(
        gb.Yogi,
        lambda g: -LR * (9e-6 + g) / (np.sqrt(1e-3 + np.sign(g**2 - 1e-6) * g**2) + 1e-3),
        optax=lambda o: o.yogi(LR),
    ),
    "radam": case(gb.RAdam, lambda g: -LR * g, lambda o, p: o.RAdam(p, LR)),
    "radam outside": case(gb.RAdam, lambda g: -LR * g, optax=lambda o: o.radam(LR), eps_at="outside"),
    "radam inside": case(
        gb.RAdam, lambda g: -LR * g, optax=lambda o: o.radam(LR, eps=0.0, eps_root=1e-8), eps_at="inside"
    ),
    "adamw": case(gb.AdamW, sign_step(), lambda o, p: o.AdamW(p, LR, weight_decay=0.1), weight_decay=0.1),
    "nadam": case(gb.NAdam, sign_step(0.9 * 0.1 / (1 - 0.9**2) + 1), optax=lambda o: o.nadam(LR)),
    "nadam scheduled": case(
        gb.NAdam,
        sign_step(
            (w2 := 0.9 * (1 - 0.5 * 0.96**0.008)) * 0.1 / (1 - (w1 := 0.9 * (1 - 0.5 * 0.96**0.004)) * w2)
            + (1 - w1) / (1 - w1)
        ),
        lambda o, p: o.NAdam(p, LR),
        momentum_decay=4e-3,
    ),
    "lion": case(gb.Lion, lambda g: -LR * np.sign(g), optax=lambda o: o.lion(LR, weight_decay=0.0)),
    "lion decoupled": case(
        gb.Lion,
        lambda g: -LR * np.sign(g),
        optax=lambda o: o.lion(LR, weight_decay=0.1),
        weight_decay=0.1,
        decoupled=True,
    ),
    # From zero weights without weight decay, LARS' first step is that of gradient descent, LAMB's is Adam's.
    "lars": case(gb.LARS, lambda g: -LR * g, weight_decay=0.1),
    "lars nesterov": case(gb.LARS, lambda g: -LR * 1.9 * g, nesterov=True, weight_decay=0.1),
    "lars optax": case(
        gb.LARS, lambda g: -LR * g, optax=lambda o: o.lars(LR, 0.1), decay_in_norm=True, weight_decay=0.1
    ),
    "lars optax nesterov": case(
        gb.LARS,
        lambda g: -LR * 1.9 * g,
        optax=lambda o: o.lars(LR, 0.1, nesterov=True),
        decay_in_norm=True,
        nesterov=True,
        weight_decay=0.1,
    ),
    "lars without decay": case(
        gb.LARS, lambda g: -LR * g, optax=lambda o: o.lars(LR, trust_coefficient=0.02), trust_coefficient=0.02
    ),
    "lamb": case(gb.LAMB, sign_step(eps=1e-6), optax=lambda o: o.lamb(LR)),
    "lamb decayed": case(gb.LAMB, sign_step(eps=1e-6), optax=lambda o: o.lamb(LR, weight_decay=0.1), weight_decay=0.1),
    "custom": Case(
        lambda params, **more: gb.Optimizer(custom, params, **more),
        lambda g: -LR * 0.5 * np.sign(g) * np.sqrt(0.2 * np.minimum(np.abs(g), 0.5)),
    ),
    "custom unsigned": Case(
        lambda params, **more: gb.Optimizer(custom, params, **{"signed": False, **more}),
        lambda g: -LR * 0.5 * np.sign(g) * 0.2 * np.minimum(np.abs(g), 0.5),
    ),
}

# One case of each rule; the variants of a rule are lines of the same formula.
FAST = {
    "sgd",
    "momentum",
    "heavy ball nesterov",
    "heavy ball inside",
    "heavy ball dampened",
    "adagrad",
    "adadelta",
    "rmsprop",
    "rmsprop centered",
    "rmsprop momentum",
    "rmsprop centered momentum inside",
    "rmsprop momentum lr in velocity",
    "rmsprop of Graves",
    "adam",
    "amsgrad hat",
    "amsgrad corrected",
    "adamax",
    "adabelief",
    "yogi",
    "radam",
    "adamw",
    "nadam",
    "nadam scheduled",
    "lion decoupled",
    "lars optax nesterov",
    "lamb decayed",
    "custom",
}
