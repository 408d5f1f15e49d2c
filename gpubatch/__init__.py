"""Train models by mini-batches on NumPy or CuPy arrays: update rules written once, batches that fit, lean steps."""

from gpubatch import rules
from gpubatch.averages import EWMA, ewma
from gpubatch.backend import Backend, Memory, array_namespace, available_backends, get_backend
from gpubatch.errors import (
    ArgumentError,
    BackendFallbackWarning,
    BackendUnavailableError,
    DataFormatError,
    DeviceMismatchError,
    DTypeError,
    GpubatchError,
    InsufficientMemoryError,
    NonFiniteError,
    ShapeError,
    UnknownArgumentError,
)
from gpubatch.formula import rule
from gpubatch.optim import (
    SGD,
    Adagrad,
    Adam,
    AdamW,
    HeavyBall,
    Lion,
    Momentum,
    NAdam,
    Optimizer,
    RMSProp,
    StepResult,
    clip_by_global_norm,
)
from gpubatch.params import Parameters
from gpubatch.schedules import CosineDecay, ExponentialDecay, InverseTimeDecay, Piecewise, SqrtDecay, StepDecay

__version__ = "0.1.0"
