"""Layers, losses, and the network that runs them in a workspace planned before the first step."""

from gpubatch.nn import layers, losses
from gpubatch.nn.batches import EVALUATION_ROWS
from gpubatch.nn.core import Core, quiet
from gpubatch.nn.layers import (
    ACTIVATIONS,
    GELU,
    INITS,
    ActivationLayer,
    BatchNorm,
    Dense,
    Dropout,
    Elementwise,
    Layer,
    LeakyReLU,
    ReLU,
    Sigmoid,
    Step,
    Tanh,
)
from gpubatch.nn.losses import (
    LOSSES,
    OF_LABELS,
    SVM,
    CrammerSinger,
    KLDivergence,
    Loss,
    SigmoidCrossEntropy,
    SoftmaxCrossEntropy,
    SoftmaxFocal,
    loss_of,
)
from gpubatch.nn.needs import Context, Needs, Parameter
from gpubatch.nn.network import Network, core_of, dealt_of, mlp, no_decay
from gpubatch.nn.stack import parameter_names, stacked
from gpubatch.nn.workspace import evenly

__all__ = [
    "ACTIVATIONS",
    "EVALUATION_ROWS",
    "GELU",
    "INITS",
    "LOSSES",
    "OF_LABELS",
    "SVM",
    "ActivationLayer",
    "BatchNorm",
    "Context",
    "Core",
    "CrammerSinger",
    "Dense",
    "Dropout",
    "Elementwise",
    "KLDivergence",
    "Layer",
    "LeakyReLU",
    "Loss",
    "Needs",
    "Network",
    "Parameter",
    "ReLU",
    "Sigmoid",
    "SigmoidCrossEntropy",
    "SoftmaxCrossEntropy",
    "SoftmaxFocal",
    "Step",
    "Tanh",
    "core_of",
    "dealt_of",
    "evenly",
    "layers",
    "loss_of",
    "losses",
    "mlp",
    "no_decay",
    "parameter_names",
    "quiet",
    "stacked",
]
