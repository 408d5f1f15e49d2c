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
from gpubatch.formula.reductions import PIECE, max_abs, mean, norm, reduction_room, total_of
from gpubatch.formula.trace import Element, FormulaPass, Op, Reduction, Scalar, Trace, host_function
from gpubatch.formula.update_rule import Rule, rule

__all__ = [
    "PIECE",
    "Activation",
    "ActivationForm",
    "BoundActivation",
    "BoundScoreLoss",
    "Element",
    "FormulaPass",
    "Op",
    "Reduction",
    "Rule",
    "Scalar",
    "ScoreLoss",
    "Trace",
    "activation",
    "activation_source",
    "activations",
    "host_function",
    "max_abs",
    "mean",
    "norm",
    "normal_cdf",
    "reduction_room",
    "rule",
    "rules",
    "score_loss",
    "score_source",
    "scores",
    "total_of",
]
