"""The options that several commands have, and the optimizers and decays that they name."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from gpubatch import optim, schedules
from gpubatch.errors import ArgumentError, check_choice, check_real
from gpubatch.nn import ACTIVATIONS, INITS, LOSSES, Loss, SoftmaxCrossEntropy

__all__ = [
    "DECAYS",
    "DTYPES",
    "LR",
    "OPTIMIZERS",
    "Activation",
    "AsJson",
    "AtMost",
    "BackendName",
    "BatchSize",
    "DtypeName",
    "FirstWeights",
    "Folder",
    "HiddenLayers",
    "LabelSmoothing",
    "LossName",
    "OptimizerName",
    "PlotFile",
    "Progress",
    "Rate",
    "Seed",
    "WithBatchNorm",
    "WithDropout",
    "integer",
    "loss_named",
    "optimizer_named",
]

# By name on the command line: the optimizer at a learning rate, and the rate that it usually needs here.
OPTIMIZERS: dict[str, tuple[Callable[..., optim.Optimizer], float]] = {
    "sgd": (optim.SGD, 0.2),
    "momentum": (optim.Momentum, 0.2),
    "heavy-ball": (optim.HeavyBall, 0.02),
    "nesterov": (functools.partial(optim.HeavyBall, nesterov=True), 0.02),
    "adagrad": (optim.Adagrad, 0.01),
    "rmsprop": (optim.RMSProp, 0.002),
    "adam": (optim.Adam, 0.003),
    "adamw": (optim.AdamW, 0.003),
    "nadam": (optim.NAdam, 0.003),
    "lion": (optim.Lion, 0.0005),
    "adamax": (optim.Adamax, 0.005),
    "radam": (optim.RAdam, 0.003),
    "adadelta": (optim.Adadelta, 1.0),
    "adabelief": (optim.AdaBelief, 0.003),
    "yogi": (optim.Yogi, 0.01),
    "lars": (optim.LARS, 5.0),
    "lamb": (optim.LAMB, 0.01),
}


def one_cycle(lr: float, epochs: int) -> optim.Hyper:
    """From lr / 25 up to the rate in the first half of the epochs, and down to lr / 25 in what would be one more."""
    if epochs < 3:
        raise ArgumentError(f"--decay one-cycle needs --epochs of at least 3, got {epochs}")
    return schedules.OneCycle(lr, epochs + 1, rise=((epochs - 1) // 2 + 1) / (epochs + 1), final=lr / 25, per="epoch")


# Decays of the learning rate by name, each from epoch to epoch: functions of the rate and of the number of epochs.
DECAYS: dict[str, Callable[[float, int], optim.Hyper]] = {
    "none": lambda lr, epochs: lr,
    "inverse": lambda lr, epochs: schedules.InverseTimeDecay(lr, decay_rate=1.0),
    "exponential": lambda lr, epochs: schedules.ExponentialDecay(lr, rate=0.95),
    "sqrt": lambda lr, epochs: schedules.SqrtDecay(lr),
    "staircase": lambda lr, epochs: schedules.StepDecay(lr, every=max(1, epochs // 3)),
    "linear": lambda lr, epochs: schedules.LinearDecay(lr, total=epochs),
    "polynomial": lambda lr, epochs: schedules.PolynomialDecay(lr, total=epochs, power=2),
    "cosine": lambda lr, epochs: schedules.CosineDecay(lr, total=epochs, per="epoch"),
    "restarts": lambda lr, epochs: schedules.CosineRestarts(lr, length=max(1, -(-epochs // 3))),
    "one-cycle": one_cycle,
}

Folder = Annotated[
    Path | None,
    typer.Argument(
        help="MNIST or a set like it (IDX files), or CIFAR-10 (binary version). By default the bundled digits."
    ),
]
HiddenLayers = Annotated[str, typer.Option(help="Widths of the hidden layers, by comma; '' for none.")]
Activation = Annotated[str, typer.Option(help=f"One of {', '.join(ACTIVATIONS)}.")]
WithDropout = Annotated[float, typer.Option(help="Fraction of the hidden activations that a step leaves out.")]
WithBatchNorm = Annotated[bool, typer.Option(help="Normalise the hidden layers over each batch.")]
FirstWeights = Annotated[
    str, typer.Option("--init", help=f"How the weights start: auto, v0.1 (as in that version), {', '.join(INITS)}.")
]
LossName = Annotated[str, typer.Option(help="softmax_cross_entropy or svm.")]
LabelSmoothing = Annotated[
    float, typer.Option(help="Part of every target that softmax_cross_entropy spreads over all classes.")
]
OptimizerName = Annotated[str, typer.Option(help=f"One of {', '.join(OPTIMIZERS)}.")]
LR = ("--lr", "--learning-rate")
Rate = Annotated[float | None, typer.Option(*LR, help="Learning rate; by default one that suits the optimizer.")]
BatchSize = Annotated[str, typer.Option(help="Samples in a batch; auto: the most that fit.")]
AtMost = Annotated[int, typer.Option(help="What auto does not exceed, if there are more than 2000 samples.")]
Seed = Annotated[int, typer.Option(help="Of split, first weights, order and random directions.")]
BackendName = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
DTYPES = ("float32", "float64")
DtypeName = Annotated[str, typer.Option(help="float32 or float64.")]
PlotFile = Annotated[Path | None, typer.Option("--plot", help="Draw it: a .png, .pdf or .svg.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
Progress = Annotated[bool, typer.Option(help="Show a bar on standard error, if that is a terminal.")]


def optimizer_named(name: str) -> tuple[Callable[..., optim.Optimizer], float]:
    """The optimizer that --optimizer names, and its usual learning rate."""
    return OPTIMIZERS[check_choice("--optimizer", name, OPTIMIZERS)]


def loss_named(name: str, label_smoothing: float) -> Loss:
    """The loss that --loss and --label-smoothing name; both take labels."""
    if check_choice("--loss", name, ["softmax_cross_entropy", "svm"]) == "svm":
        if label_smoothing:
            raise ArgumentError(f"--label-smoothing is for softmax_cross_entropy, got {label_smoothing:g} with svm")
        return LOSSES["svm"]
    check_real("--label-smoothing", label_smoothing, 0, 1, open_high=True)
    return SoftmaxCrossEntropy(label_smoothing=label_smoothing) if label_smoothing else LOSSES[name]


def integer(option: str, text: str) -> int:
    """The integer that an option's text is."""
    try:
        return int(text)
    except ValueError:
        raise ArgumentError(f"{option} must be made of integers, got {text!r}") from None
