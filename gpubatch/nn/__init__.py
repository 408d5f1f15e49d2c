"""Layers, losses, and the network that runs them in a workspace planned before the first step."""

from gpubatch.nn import layers, losses
from gpubatch.nn.layers import (
    ACTIVATIONS,
    GELU,
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
from gpubatch.nn.losses import LOSSES, Loss, LossContext
from gpubatch.nn.needs import Context, Mode, Needs, Parameter
from gpubatch.nn.network import EVALUATION_ROWS, Network, mlp, parameter_names, quiet

__all__ = [
    "ACTIVATIONS",
    "EVALUATION_ROWS",
    "GELU",
    "LOSSES",
    "BatchNorm",
    "Context",
    "Dense",
    "Dropout",
    "Elementwise",
    "Layer",
    "LeakyReLU",
    "Loss",
    "LossContext",
    "Mode",
    "Needs",
    "Network",
    "Parameter",
    "ReLU",
    "Sigmoid",
    "Step",
    "Tanh",
    "layers",
    "losses",
    "mlp",
    "parameter_names",
    "quiet",
]
