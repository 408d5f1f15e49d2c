"""Update rules, activations and losses as formulas, each written once, and the tracer that records them."""

from gpubatch.formula import activations, rules, scores
from gpubatch.formula.elementwise import (
    Activation,
    ActivationForm,
    BoundActivation,
    BoundScoreLoss,
    ScoreLoss,
    activation,
    activation_source,
    normal_cdf,
    score_loss,
    score_source,
)
from gpubatch.formula.trace import Element, Op, Scalar, Trace, host_function
from gpubatch.formula.update_rule import Rule, rule

__all__ = [
    "Activation",
    "ActivationForm",
    "BoundActivation",
    "BoundScoreLoss",
    "Element",
    "Op",
    "Rule",
    "Scalar",
    "ScoreLoss",
    "Trace",
    "activation",
    "activation_source",
    "activations",
    "host_function",
    "normal_cdf",
    "rule",
    "rules",
    "score_loss",
    "score_source",
    "scores",
]
