"""Schedules: callables ``(step, epoch) -> value``, both counted from 0, such as the decay of a learning rate.

The same arguments in every schedule:

lr: the value at n = 0, or between a rise and a fall; at least 0
per: what n counts, "epoch" or "step"
every: the unit of n, at least 1: the formula gets n / every
staircase: use the floor of n / every

The value is a Python float, computed in double precision. Any float hyper-parameter can be a schedule, or another
callable of this form.
"""

from gpubatch.schedules.combined import Chain, Product, chain, product
from gpubatch.schedules.counted import Schedule, check_schedule
from gpubatch.schedules.cycles import CosineRestarts, Cyclic, OneCycle
from gpubatch.schedules.decays import (
    CosineDecay,
    ExponentialDecay,
    InverseTimeDecay,
    LinearDecay,
    Piecewise,
    PolynomialDecay,
    SqrtDecay,
    StepDecay,
)
from gpubatch.schedules.saved import KINDS, counts_epochs, from_dict, is_known, saved, to_dict, up_to_date

__all__ = [
    "KINDS",
    "Chain",
    "CosineDecay",
    "CosineRestarts",
    "Cyclic",
    "ExponentialDecay",
    "InverseTimeDecay",
    "LinearDecay",
    "OneCycle",
    "Piecewise",
    "PolynomialDecay",
    "Product",
    "Schedule",
    "SqrtDecay",
    "StepDecay",
    "chain",
    "check_schedule",
    "counts_epochs",
    "from_dict",
    "is_known",
    "product",
    "saved",
    "to_dict",
    "up_to_date",
]
