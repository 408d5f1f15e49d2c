"""The options that several commands have, in groups, and the optimizers and decays that they name.

A command takes a group as one parameter, and :func:`spread` puts the group's options on its command line. So an option
has one name, one help text and one meaning in all commands.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, ClassVar

import typer

from gpubatch import optim, schedules
from gpubatch.errors import ArgumentError, check_choice
from gpubatch.nn import ACTIVATIONS, INITS, LOSSES, OF_LABELS, Network
from gpubatch.train import EXECUTIONS, BestWeights, EarlyStopping, ReduceOnPlateau, WeightAverage

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

# Losses by the kind of target: labels of classes, and numbers. The first one is taken by default.
LOSSES_OF = {
    "classification": tuple(OF_LABELS),
    "regression": ("mse", *(x for x in LOSSES if x not in (*OF_LABELS, "mse"))),
}

# --- options by themselves -------------------------------------------------------------------------------------------

OptimizerName = Annotated[str | None, typer.Option(help=f"One of {', '.join(OPTIMIZERS)}.")]
LR = ("--lr", "--learning-rate")
Rate = Annotated[float | None, typer.Option(*LR, help="Learning rate; by default one that suits the optimizer.")]
BackendName = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
DTYPES = ("float32", "float64")
DtypeName = Annotated[str, typer.Option(help="float32 or float64.")]
PlotFile = Annotated[Path | None, typer.Option("--plot", help="Picture of the result: a .png, .pdf or .svg file.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
TestSize = Annotated[
    float, typer.Option(help="Share of the samples to test on, where the data has no test set of its own.")
]
Seed = Annotated[int, typer.Option(min=0, help="Seed of split, first weights, order, dropout and directions.")]
Metrics = Annotated[str, typer.Option(help="More metrics, comma-separated: f1,top_3.")]
Progress = Annotated[bool, typer.Option(help="Show the progress on standard error.")]


# --- groups ----------------------------------------------------------------------------------------------------------


def spread(**defaults: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorate a command: a parameter that is a group, a dataclass, becomes the options that are the group's fields.

    defaults: of options of this command, where they differ from the group's
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        parameters: list[inspect.Parameter] = []
        groups: dict[str, tuple[Any, list[str]]] = {}
        hints = typing.get_type_hints(command, include_extras=True)
        for name, parameter in inspect.signature(command).parameters.items():
            if dataclasses.is_dataclass(hints[name]):
                options = options_of(hints[name])
                groups[name] = hints[name], [option.name for option in options]
                parameters += options
            else:
                parameters.append(parameter.replace(annotation=hints[name], kind=parameter.KEYWORD_ONLY))
        parameters = [p.replace(default=defaults[p.name]) if p.name in defaults else p for p in parameters]
        assert defaults.keys() <= {p.name for p in parameters}, defaults

        @functools.wraps(command)
        def run(**given: Any) -> None:
            made = {name: kind(*(given.pop(option) for option in names)) for name, (kind, names) in groups.items()}
            command(**made, **given)

        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        return run

    return decorate


def options_of(group: Any) -> list[inspect.Parameter]:
    """The fields of a group as parameters; their help stands in the group's panel."""
    hints, found = typing.get_type_hints(group, include_extras=True), []
    for field in dataclasses.fields(group):
        kind, info = typing.get_args(hints[field.name])
        info = copy.copy(info)
        info.rich_help_panel = None if isinstance(info, typer.models.ArgumentInfo) else group.panel
        annotation: Any = Annotated[kind, info]
        found.append(
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default,
                annotation=annotation,
            )
        )
    return found


@dataclasses.dataclass
class NetworkOptions:
    """The network, but for its inputs and outputs, which are those of the data."""

    panel: ClassVar[str] = "Network"
    layers: Annotated[str, typer.Option(help="Widths of the hidden layers, comma-separated; '' for none.")] = "512,512"
    activation: Annotated[str, typer.Option(help=f"One of {', '.join(ACTIVATIONS)}.")] = "gelu"
    batch_norm: Annotated[bool, typer.Option(help="Normalise the hidden layers over each batch.")] = True
    dropout: Annotated[float, typer.Option(help="Fraction of the hidden activations that a step leaves out.")] = 0.3
    loss: Annotated[
        str | None,
        typer.Option(
            help=f"Of classes: {', '.join(LOSSES_OF['classification'])}. Of numbers: "
            f"{', '.join(LOSSES_OF['regression'])}. By default the first of them."
        ),
    ] = None
    label_smoothing: Annotated[
        float, typer.Option(help="Part of every target that softmax_cross_entropy spreads over all classes.")
    ] = 0.0
    l2: Annotated[float, typer.Option(help="Weight of l2/2 * Σ W² in the cost.")] = 0.0
    init: Annotated[str, typer.Option(help=f"First weights: auto, v0.1 (of that version), {', '.join(INITS)}.")] = (
        "auto"
    )
    precision: Annotated[
        str, typer.Option(help="full; fast: a GPU multiplies float32 matrices as TF32; mixed: float16 storage.")
    ] = "full"
    dtype: DtypeName = "float32"
    backend: BackendName = "auto"

    @property
    def widths(self) -> list[int]:
        """Widths of the hidden layers."""
        return integers("--layers", self.layers)

    def loss_for(self, task: str) -> str:
        """The loss that --loss names, by default the usual one of the task."""
        return self.loss or LOSSES_OF[task][0]


@dataclasses.dataclass
class OptimizerOptions:
    """The optimizer, and its learning rate from epoch to epoch."""

    panel: ClassVar[str] = "Optimizer"
    optimizer: OptimizerName = "adam"
    lr: Rate = None
    decay: Annotated[str, typer.Option(help=f"Decay of the learning rate: {', '.join(DECAYS)}.")] = "cosine"

    @property
    def rate(self) -> float:
        """The learning rate that --lr gives, by default the optimizer's usual one."""
        usual = optimizer_named(self.optimizer)[1]
        return usual if self.lr is None else self.lr

    def __post_init__(self) -> None:
        optimizer_named(self.optimizer)
        check_choice("--decay", self.decay, DECAYS)

    def make(self, net: Network, epochs: int) -> optim.Optimizer:
        """The optimizer of a network that is trained for so many epochs."""
        make, rate = optimizer_named(self.optimizer)[0], DECAYS[self.decay](self.rate, epochs)
        return make(net.parameters, rate, master_weights=net.precision == "mixed")


@dataclasses.dataclass
class BatchOptions:
    """The size of batches."""

    panel: ClassVar[str] = "Batches"
    batch_size: Annotated[
        str, typer.Option(help="Samples in a batch; auto: as many as fit, up to --at-most, and fewer of a small set.")
    ] = "auto"
    at_most: Annotated[int, typer.Option(min=1, help="The largest batch size that auto takes.")] = 64

    @property
    def size(self) -> int | str:
        """``batch_size`` of a loader: a number or "auto"."""
        return self.batch_size if self.batch_size == "auto" else integer("--batch-size", self.batch_size)

    def number(self, most: int = sys.maxsize) -> int:
        """Samples in a batch, at most ``most``; with --batch-size auto the number of --at-most."""
        size = self.at_most if self.batch_size == "auto" else integer("--batch-size", self.batch_size)
        return min(size, most)


@dataclasses.dataclass
class RunOptions:
    """The length of a run."""

    panel: ClassVar[str] = "Training"
    epochs: Annotated[int | None, typer.Option(min=0, help="Passes over the training set.")] = 10
    early_stop: Annotated[
        int | None, typer.Option(min=1, help="Stop after so many epochs without a better test loss; take the best one.")
    ] = None

    def callbacks(self) -> list[Any]:
        """New callbacks of a run."""
        return [] if self.early_stop is None else [EarlyStopping(self.early_stop)]


@dataclasses.dataclass
class TrainingOptions(RunOptions):
    """The length of a run, the weights that it keeps, and how steps are executed."""

    best: Annotated[bool, typer.Option("--best", help="Take the weights of the epoch with the best test loss.")] = False
    average: Annotated[
        float | None, typer.Option(help="Decay of a moving average of the weights, which is taken, such as 0.999.")
    ] = None
    plateau: Annotated[
        int | None,
        typer.Option(min=0, help="Halve the learning rate after more epochs than this without a better loss."),
    ] = None
    execution: Annotated[
        str, typer.Option(help="Steps: captured, as CUDA graphs; eager, one by one; auto: captured where possible.")
    ] = "auto"

    def __post_init__(self) -> None:
        check_choice("--execution", self.execution, EXECUTIONS)

    def callbacks(self) -> list[Any]:
        """New callbacks of a run; one that keeps the best weights comes last."""
        found: list[Any] = [] if self.plateau is None else [ReduceOnPlateau(0.5, self.plateau)]
        found += [] if self.average is None else [WeightAverage(self.average)]
        return found + (RunOptions.callbacks(self) or ([BestWeights()] if self.best else []))


def optimizer_named(name: str | None) -> tuple[Callable[..., optim.Optimizer], float]:
    """The optimizer that --optimizer names, and its usual learning rate."""
    return OPTIMIZERS[check_choice("--optimizer", name, OPTIMIZERS)]


def names_of(text: str) -> list[str]:
    """The names in a list that is separated by commas."""
    return [name.strip() for name in text.split(",") if name.strip()]


def integer(option: str, text: str) -> int:
    """The integer in the text of an option."""
    try:
        return int(text)
    except ValueError:
        raise ArgumentError(f"{option} must be made of integers, got {text!r}") from None


def integers(option: str, text: str) -> list[int]:
    """The integers in the text of an option, separated by commas."""
    return [integer(option, number) for number in text.split(",")] if text else []
