"""Update rules, activations and losses as formulas, each written once, and the tracer that records them."""

from gpubatch.formula import activations, rules, scores
from gpubatch.formula.elementwise import (
    Activation,
    BoundActivation,
    BoundScoreLoss,
    ScoreLoss,
    activation,
    normal_cdf,
    score_loss,
)
from gpubatch.formula.reductions import PIECE, max_abs, mean, norm, reduction_room, total_of
from gpubatch.formula.text import formula_of_text, text_of_formula
from gpubatch.formula.trace import (
    COPY,
    INDICATOR,
    OPS,
    Element,
    FormulaPass,
    Op,
    Scalar,
    Trace,
    host_function,
)
from gpubatch.formula.update_rule import Rule, rule

__all__ = [
    "COPY",
    "INDICATOR",
    "OPS",
    "PIECE",
    "Activation",
    "BoundActivation",
    "BoundScoreLoss",
    "Element",
    "FormulaPass",
    "Op",
    "Rule",
    "Scalar",
    "ScoreLoss",
    "Trace",
    "activation",
    "activations",
    "formula_of_text",
    "host_function",
    "max_abs",
    "mean",
    "norm",
    "normal_cdf",
    "reduction_room",
    "rule",
    "rules",
    "score_loss",
    "scores",
    "text_of_formula",
    "total_of",
]
