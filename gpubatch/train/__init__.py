"""Training: the loop over epochs, its steps eager or captured as CUDA graphs, its checkpoints and its memory."""

from gpubatch.train.captured_step import CapturedStep as CapturedStep
from gpubatch.train.checks import drop_last_for as drop_last_for, loader_for as loader_for, why_eager as why_eager
from gpubatch.train.display import bar as bar
from gpubatch.train.history import (
    History as History,
    StopTraining as StopTraining,
    TrainingInterrupted as TrainingInterrupted,
    TrainingState as TrainingState,
    TrainingTerminated as TrainingTerminated,
)
from gpubatch.train.logs import CSVLog as CSVLog, Logging as Logging, TensorBoard as TensorBoard
from gpubatch.train.loop import EXECUTIONS as EXECUTIONS, fit as fit, short_runs as short_runs
from gpubatch.train.loss_scale import LossScale as LossScale
from gpubatch.train.memory import plan_batches as plan_batches
from gpubatch.train.monitors import (
    BestWeights as BestWeights,
    EarlyStopping as EarlyStopping,
    ReduceOnPlateau as ReduceOnPlateau,
)
from gpubatch.train.parts import (
    ClipByValue as ClipByValue,
    GradientNoise as GradientNoise,
    WeightAverage as WeightAverage,
)
from gpubatch.train.resume import to_resume as to_resume
from gpubatch.train.together import Agreement as Agreement
from gpubatch.train.validation import validated as validated
