"""Look into training: check gradients, search without them, see the loss, find the step size and the batch size.

A call leaves a network as it was: parameters, running statistics and dropout step. Only the two random searches load
what they found into it.
"""

from gpubatch.explore.gradients import (
    GradientCheck as GradientCheck,
    Kink as Kink,
    check_network as check_network,
    gradient_check as gradient_check,
    numerical_gradient as numerical_gradient,
)
from gpubatch.explore.search import (
    SearchResult as SearchResult,
    random_local_search as random_local_search,
    random_search as random_search,
)
from gpubatch.explore.shared import Progress as Progress
from gpubatch.explore.slices import (
    LossSlice as LossSlice,
    loss_slice as loss_slice,
    principal_directions as principal_directions,
)
from gpubatch.explore.sweeps import (
    BatchSizeTrial as BatchSizeTrial,
    MakeOptimizer as MakeOptimizer,
    OptimizerTrial as OptimizerTrial,
    RangeTest as RangeTest,
    StepSizeSweep as StepSizeSweep,
    TrialStart as TrialStart,
    batch_size_sweep as batch_size_sweep,
    learning_rate_range_test as learning_rate_range_test,
    optimizer_sweep as optimizer_sweep,
    step_size_sweep as step_size_sweep,
)
