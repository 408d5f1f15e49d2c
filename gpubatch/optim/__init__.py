"""Optimizers: an update rule bound to parameters, in place, with schedules and a state that can be saved."""

from gpubatch.optim.ahead import (
    captured_key,
    enqueue_update,
    rehearse_update,
    scalars_ahead,
    trace_of,
    unbound,
    unchecked,
)
from gpubatch.optim.arrays import clip_by_global_norm
from gpubatch.optim.groups import Hyper
from gpubatch.optim.optimizer import MASTER, Optimizer, StepResult
from gpubatch.optim.optimizers import (
    LAMB,
    LARS,
    SGD,
    AdaBelief,
    Adadelta,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    HeavyBall,
    Lion,
    Momentum,
    NAdam,
    RAdam,
    RMSProp,
    Yogi,
)
from gpubatch.optim.resumed import given_hyper, load_resumed

__all__ = [
    "LAMB",
    "LARS",
    "MASTER",
    "SGD",
    "AdaBelief",
    "Adadelta",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "HeavyBall",
    "Hyper",
    "Lion",
    "Momentum",
    "NAdam",
    "Optimizer",
    "RAdam",
    "RMSProp",
    "StepResult",
    "Yogi",
    "captured_key",
    "clip_by_global_norm",
    "enqueue_update",
    "given_hyper",
    "load_resumed",
    "rehearse_update",
    "scalars_ahead",
    "trace_of",
    "unbound",
    "unchecked",
]
