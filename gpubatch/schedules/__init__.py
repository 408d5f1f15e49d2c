"""Schedules: callables ``(step, epoch) -> value``, both counted from 0, such as the decay of a learning rate.

The same arguments in every schedule:

lr: the value at n = 0, or between a rise and a fall; at least 0
per: what n counts, "epoch" or "step"
every: the unit of n, at least 1: the formula gets n / every
staircase: use the floor of n / every

The value is a Python float, computed in double precision. Any float hyper-parameter can be a schedule, or another
callable of this form.
"""

from gpubatch.schedules.combined import Chain as Chain, Product as Product, chain as chain, product as product
from gpubatch.schedules.counted import Schedule as Schedule, check_schedule as check_schedule
from gpubatch.schedules.cycles import CosineRestarts as CosineRestarts, Cyclic as Cyclic, OneCycle as OneCycle
from gpubatch.schedules.decays import (
    CosineDecay as CosineDecay,
    ExponentialDecay as ExponentialDecay,
    InverseTimeDecay as InverseTimeDecay,
    LinearDecay as LinearDecay,
    Piecewise as Piecewise,
    PolynomialDecay as PolynomialDecay,
    SqrtDecay as SqrtDecay,
    StepDecay as StepDecay,
)
from gpubatch.schedules.saved import (
    KINDS as KINDS,
    counts_epochs as counts_epochs,
    from_dict as from_dict,
    is_known as is_known,
    saved as saved,
    to_dict as to_dict,
    up_to_date as up_to_date,
)
