"""Train models by mini-batches on NumPy or CuPy arrays.

Update rules are formulas that are written once, batches are sized to fit, and a training step allocates nothing. The
same code runs with ``backend="cuda"`` on a GPU and ``backend="cpu"`` in a test.
"""

import importlib
from typing import Any

from gpubatch import losses, rules
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
from gpubatch.layers import GELU, BatchNorm, Dense, Dropout, Layer, LeakyReLU, ReLU, Sigmoid, Step, Tanh
from gpubatch.loader import Loader
from gpubatch.network import Network, mlp
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
from gpubatch.sizing import BatchPlan, choose_batch_size
from gpubatch.train import History, StopTraining, TrainingInterrupted, TrainingState, fit

__version__ = "0.1.0"

__all__ = [
    "EWMA",
    "GELU",
    "SGD",
    "Adagrad",
    "Adam",
    "AdamW",
    "ArgumentError",
    "Backend",
    "BackendFallbackWarning",
    "BackendUnavailableError",
    "BatchNorm",
    "BatchPlan",
    "CosineDecay",
    "DTypeError",
    "DataFormatError",
    "Dense",
    "DeviceMismatchError",
    "Dropout",
    "ExponentialDecay",
    "GpubatchError",
    "GradientCheck",
    "HeavyBall",
    "History",
    "InsufficientMemoryError",
    "InverseTimeDecay",
    "Layer",
    "LeakyReLU",
    "Lion",
    "Loader",
    "Memory",
    "Momentum",
    "NAdam",
    "Network",
    "NonFiniteError",
    "Optimizer",
    "Parameters",
    "Piecewise",
    "RMSProp",
    "ReLU",
    "ShapeError",
    "Sigmoid",
    "SqrtDecay",
    "Step",
    "StepDecay",
    "StepResult",
    "StopTraining",
    "Tanh",
    "TrainingInterrupted",
    "TrainingState",
    "UnknownArgumentError",
    "array_namespace",
    "available_backends",
    "batch_size_sweep",
    "choose_batch_size",
    "clip_by_global_norm",
    "datasets",
    "ewma",
    "explore",
    "fit",
    "get_backend",
    "gradient_check",
    "loss_slice",
    "losses",
    "mlp",
    "numerical_gradient",
    "random_local_search",
    "random_search",
    "rule",
    "rules",
    "step_size_sweep",
]


# Imported when they are first used: pathlib, which datasets needs, alone takes a tenth of NumPy's time to import.
LAZY = {
    "datasets": "datasets",
    "explore": "explore",
    **dict.fromkeys(
        (
            "GradientCheck",
            "batch_size_sweep",
            "gradient_check",
            "loss_slice",
            "numerical_gradient",
            "random_local_search",
            "random_search",
            "step_size_sweep",
        ),
        "explore",
    ),
}


def __getattr__(name: str) -> Any:
    if name not in LAZY:
        raise AttributeError(f"module 'gpubatch' has no attribute {name!r}")
    module = importlib.import_module(f"gpubatch.{LAZY[name]}")
    return module if name == LAZY[name] else getattr(module, name)
