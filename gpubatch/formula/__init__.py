"""Update rules, activations and losses as formulas, each written once, and the tracer that records them."""

from gpubatch.formula import activations as activations, rules as rules, scores as scores
from gpubatch.formula.elementwise import (
    Activation as Activation,
    BoundActivation as BoundActivation,
    BoundScoreLoss as BoundScoreLoss,
    ScoreLoss as ScoreLoss,
    activation as activation,
    normal_cdf as normal_cdf,
    score_loss as score_loss,
)
from gpubatch.formula.reductions import (
    PIECE as PIECE,
    max_abs as max_abs,
    mean as mean,
    norm as norm,
    reduction_room as reduction_room,
    total_of as total_of,
)
from gpubatch.formula.text import formula_of_text as formula_of_text, text_of_formula as text_of_formula
from gpubatch.formula.trace import (
    COPY as COPY,
    INDICATOR as INDICATOR,
    OPS as OPS,
    Element as Element,
    FormulaPass as FormulaPass,
    Op as Op,
    Scalar as Scalar,
    Trace as Trace,
    host_function as host_function,
)
from gpubatch.formula.update_rule import Rule as Rule, rule as rule
