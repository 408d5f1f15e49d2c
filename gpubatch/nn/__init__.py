"""Layers, losses, and the network that runs them in a workspace planned before the first step."""

from gpubatch.nn import layers as layers, losses as losses
from gpubatch.nn.batches import EVALUATION_ROWS as EVALUATION_ROWS
from gpubatch.nn.core import Core as Core, quiet as quiet
from gpubatch.nn.layers import (
    ACTIVATIONS as ACTIVATIONS,
    GELU as GELU,
    INITS as INITS,
    ActivationLayer as ActivationLayer,
    BatchNorm as BatchNorm,
    Dense as Dense,
    Dropout as Dropout,
    Elementwise as Elementwise,
    Layer as Layer,
    LeakyReLU as LeakyReLU,
    ReLU as ReLU,
    Sigmoid as Sigmoid,
    Step as Step,
    Tanh as Tanh,
)
from gpubatch.nn.losses import (
    LOSSES as LOSSES,
    OF_LABELS as OF_LABELS,
    SVM as SVM,
    CrammerSinger as CrammerSinger,
    KLDivergence as KLDivergence,
    Loss as Loss,
    SigmoidCrossEntropy as SigmoidCrossEntropy,
    SoftmaxCrossEntropy as SoftmaxCrossEntropy,
    SoftmaxFocal as SoftmaxFocal,
    loss_of as loss_of,
)
from gpubatch.nn.needs import Context as Context, Needs as Needs, Parameter as Parameter
from gpubatch.nn.network import (
    Network as Network,
    core_of as core_of,
    dealt_of as dealt_of,
    mlp as mlp,
    no_decay as no_decay,
)
from gpubatch.nn.stack import parameter_names as parameter_names, stacked as stacked
from gpubatch.nn.workspace import evenly as evenly
