"""Optimizers: an update rule bound to parameters, in place, with schedules and a state that can be saved."""

from gpubatch.optim.ahead import (
    captured_key as captured_key,
    count_steps as count_steps,
    enqueue_update as enqueue_update,
    epoch_in as epoch_in,
    follow_pass as follow_pass,
    rehearse_update as rehearse_update,
    scalars_ahead as scalars_ahead,
    trace_of as trace_of,
    unbound as unbound,
    unchecked as unchecked,
    update_ahead as update_ahead,
)
from gpubatch.optim.arrays import clip_by_global_norm as clip_by_global_norm
from gpubatch.optim.groups import Hyper as Hyper
from gpubatch.optim.optimizer import MASTER as MASTER, Optimizer as Optimizer, StepResult as StepResult
from gpubatch.optim.optimizers import (
    LAMB as LAMB,
    LARS as LARS,
    SGD as SGD,
    AdaBelief as AdaBelief,
    Adadelta as Adadelta,
    Adagrad as Adagrad,
    Adam as Adam,
    Adamax as Adamax,
    AdamW as AdamW,
    HeavyBall as HeavyBall,
    Lion as Lion,
    Momentum as Momentum,
    NAdam as NAdam,
    RAdam as RAdam,
    RMSProp as RMSProp,
    Yogi as Yogi,
)
from gpubatch.optim.resumed import given_hyper as given_hyper, load_resumed as load_resumed
