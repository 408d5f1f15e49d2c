"""Training: the loop over epochs, its steps eager or captured as CUDA graphs, its checkpoints and its memory."""

from gpubatch.train.captured_step import CapturedStep
from gpubatch.train.checks import drop_last_for, loader_for, why_eager
from gpubatch.train.display import bar
from gpubatch.train.history import History, StopTraining, TrainingInterrupted, TrainingState, TrainingTerminated
from gpubatch.train.logs import CSVLog, Logging, TensorBoard
from gpubatch.train.loop import EXECUTIONS, fit, short_runs
from gpubatch.train.loss_scale import LossScale
from gpubatch.train.memory import plan_batches
from gpubatch.train.monitors import BestWeights, EarlyStopping, ReduceOnPlateau
from gpubatch.train.parts import ClipByValue, GradientNoise, WeightAverage
from gpubatch.train.resume import to_resume
from gpubatch.train.together import Agreement
from gpubatch.train.validation import validated

__all__ = [
    "EXECUTIONS",
    "Agreement",
    "BestWeights",
    "CSVLog",
    "CapturedStep",
    "ClipByValue",
    "EarlyStopping",
    "GradientNoise",
    "History",
    "Logging",
    "LossScale",
    "ReduceOnPlateau",
    "StopTraining",
    "TensorBoard",
    "TrainingInterrupted",
    "TrainingState",
    "TrainingTerminated",
    "WeightAverage",
    "bar",
    "drop_last_for",
    "fit",
    "loader_for",
    "plan_batches",
    "short_runs",
    "to_resume",
    "validated",
    "why_eager",
]
