"""Look into training: check gradients, search without them, see the loss, find the step size and the batch size.

A call leaves a network as it was: parameters, running statistics and dropout step. Only the two random searches load
what they found into it.
"""

from gpubatch.explore.gradients import GradientCheck, Kink, check_network, gradient_check, numerical_gradient
from gpubatch.explore.search import SearchResult, random_local_search, random_search
from gpubatch.explore.shared import Progress
from gpubatch.explore.slices import LossSlice, loss_slice, principal_directions
from gpubatch.explore.sweeps import (
    BatchSizeTrial,
    MakeOptimizer,
    OptimizerTrial,
    RangeTest,
    StepSizeSweep,
    TrialStart,
    batch_size_sweep,
    learning_rate_range_test,
    optimizer_sweep,
    step_size_sweep,
)

__all__ = [
    "BatchSizeTrial",
    "GradientCheck",
    "Kink",
    "LossSlice",
    "MakeOptimizer",
    "OptimizerTrial",
    "Progress",
    "RangeTest",
    "SearchResult",
    "StepSizeSweep",
    "TrialStart",
    "batch_size_sweep",
    "check_network",
    "gradient_check",
    "learning_rate_range_test",
    "loss_slice",
    "numerical_gradient",
    "optimizer_sweep",
    "principal_directions",
    "random_local_search",
    "random_search",
    "step_size_sweep",
]
