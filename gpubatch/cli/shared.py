"""The application, and what commands share: options, data, tables, and JSON."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

import gpubatch
from gpubatch import datasets, explore, optim, schedules
from gpubatch.backend import Array, get_backend
from gpubatch.errors import ArgumentError, check_choice
from gpubatch.loader import Loader
from gpubatch.nn import ACTIVATIONS, Network, mlp

__all__ = [
    "DECAYS",
    "OPTIMIZERS",
    "ActivationOption",
    "AtMostOption",
    "BackendOption",
    "BatchNormOption",
    "BatchSizeOption",
    "Data",
    "DropoutOption",
    "DtypeOption",
    "FolderArgument",
    "JsonOption",
    "LayersOption",
    "LossOption",
    "OptimizerOption",
    "PlotOption",
    "PrecisionOption",
    "ProgressOption",
    "SeedOption",
    "app",
    "bar",
    "integer",
    "load",
    "loader_of_pixels",
    "number_or_dash",
    "print_json",
    "table_of",
    "versions",
    "widths",
]

app = typer.Typer(
    help="Train networks by mini-batches on NumPy or CuPy arrays.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
BackendOption = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
FolderArgument = Annotated[
    Path | None,
    typer.Argument(help="MNIST (IDX files) or CIFAR-10 (binary version). By default the bundled 10,000 digits."),
]
LayersOption = Annotated[str, typer.Option(help="Widths of the hidden layers, by comma; '' for none.")]
ActivationOption = Annotated[str, typer.Option(help=f"One of {', '.join(ACTIVATIONS)}.")]
BatchSizeOption = Annotated[str, typer.Option(help="Samples in a batch; auto: the most that fit.")]
AtMostOption = Annotated[int, typer.Option(help="What auto does not exceed, if there are more than 2000 samples.")]
DropoutOption = Annotated[float, typer.Option(help="Fraction of the hidden activations that a step leaves out.")]
BatchNormOption = Annotated[bool, typer.Option(help="Normalise the hidden layers over each batch.")]
DtypeOption = Annotated[str, typer.Option(help="float32 or float64.")]
PrecisionOption = Annotated[
    str, typer.Option(help="full; fast: a GPU multiplies float32 matrices as TF32; mixed: float16 is stored.")
]
# By name on the command line: the optimizer at a learning rate, and the rate that it usually wants here.
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
}
OptimizerOption = Annotated[str, typer.Option(help=f"One of {', '.join(OPTIMIZERS)}.")]
# The decays of the learning rate by name, each from epoch to epoch, for a run of so many.
DECAYS: dict[str, Callable[[float, int], optim.Hyper]] = {
    "none": lambda lr, epochs: lr,
    "inverse": lambda lr, epochs: schedules.InverseTimeDecay(lr, decay_rate=1.0),
    "exponential": lambda lr, epochs: schedules.ExponentialDecay(lr, rate=0.95),
    "sqrt": lambda lr, epochs: schedules.SqrtDecay(lr),
    "staircase": lambda lr, epochs: schedules.StepDecay(lr, every=max(1, epochs // 3)),
    "cosine": lambda lr, epochs: schedules.CosineDecay(lr, total=epochs, per="epoch"),
}


def load(folder: Path | None, seed: int) -> tuple[str, datasets.Samples, datasets.Samples]:
    """The data in words, its training set and its test set: those in a folder, or the bundled digits."""
    if folder is None:
        return ("10,000 bundled MNIST digits", *datasets.mnist_10k(seed))
    if not folder.is_dir():
        raise ArgumentError(f"FOLDER must be a folder with MNIST or CIFAR-10 files, got {str(folder)!r}")
    names = {path.name for path in folder.iterdir()}
    if any("idx" in name for name in names):
        return (f"MNIST in {folder}", *datasets.mnist(folder))
    if any(name.startswith(("data_batch", "cifar-10")) for name in names):
        return (f"CIFAR-10 in {folder}", *datasets.cifar10(folder))
    raise ArgumentError(
        f"FOLDER has neither MNIST (train-images-idx3-ubyte ...) nor CIFAR-10 (data_batch_1.bin ...): {folder}"
    )


def widths(layers: str) -> list[int]:
    """The widths that the option --layers names."""
    return [integer("--layers", width) for width in layers.split(",") if layers]


def loader_of_pixels(X: np.ndarray, Y: np.ndarray, batch_size: str, at_most: int, seed: int, net: Network) -> Loader:
    """Batches of images for ``net``, their pixels from 0 to 1."""
    return Loader(
        X,
        Y,
        batch_size=batch_size if batch_size == "auto" else integer("--batch-size", batch_size),
        at_most=at_most,
        seed=seed,
        backend=net.backend,
        dtype=net.dtype,
        scale=1 / 255,
    )


def versions() -> dict[str, str]:
    """What a result depends on."""
    return {"gpubatch": gpubatch.__version__, "numpy": np.__version__, "python": platform.python_version()}


def print_json(**values: Any) -> None:
    """One object on standard output; dataclasses become objects, and what is not finite becomes null."""
    typer.echo(json.dumps(_jsonable(values), allow_nan=False))


def _jsonable(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {name: _jsonable(item) for name, item in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [_jsonable(item) for item in (value.tolist() if isinstance(value, np.ndarray) else value)]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def integer(option: str, text: str) -> int:
    """The integer that an option's text is."""
    try:
        return int(text)
    except ValueError:
        raise ArgumentError(f"{option} must be made of integers, got {text!r}") from None


LossOption = Annotated[str, typer.Option(help="softmax_cross_entropy or svm.")]
SeedOption = Annotated[int, typer.Option(help="Of split, first weights, order and random directions.")]
PlotOption = Annotated[Path | None, typer.Option("--plot", help="Draw it: a .png, .pdf or .svg.")]
ProgressOption = Annotated[bool, typer.Option(help="Show a bar on standard error, if that is a terminal.")]


class Data:
    """A network and the data of a command, on its backend: all that the commands have in common."""

    def __init__(
        self,
        folder: Path | None,
        hidden: str,
        loss: str,
        seed: int,
        backend: str,
        dtype: str,
        samples: int | None = None,
    ) -> None:
        check_choice("--loss", loss, ["softmax_cross_entropy", "svm"])
        between = widths(hidden)
        where = get_backend(backend)
        name, train, test = load(folder, seed)
        sizes = [train[0].shape[1], *between, int(train[1].max()) + 1]
        self.seed = seed
        self.net = mlp(sizes, loss=loss, backend=where, dtype=dtype, seed=seed)
        self.X, self.Y = self._ready(*train, samples)
        self.test = self._ready(*test, None)
        self.words = f"{'-'.join(map(str, sizes))}, {loss}, {name}, {dtype}, {where.spec}"

    def _ready(self, X: np.ndarray, Y: np.ndarray, samples: int | None) -> tuple[Array, Array]:
        scaled = np.multiply(X[:samples], 1 / 255, dtype=self.net.dtype)
        return self.net.backend.asarray(scaled), self.net.backend.asarray(Y[:samples])


@contextlib.contextmanager
def bar(words: str, wanted: bool) -> Iterator[explore.Progress]:
    """A function for ``progress=`` that moves a bar on standard error; it does nothing where that is no terminal."""
    console = Console(stderr=True)
    if not (wanted and console.is_terminal):
        yield lambda done, total: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"))
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as live:
        task = live.add_task(words, total=None)
        yield lambda done, total: live.update(task, completed=done, total=total)


def table_of(*columns: str) -> Table:
    """A table without lines between rows."""
    return Table(*columns, box=box.SIMPLE_HEAD, pad_edge=False)


def number_or_dash(value: float | None, factor: float = 1, form: str = "{:.3f}") -> str:
    """A number as it is printed, or a dash for none."""
    return "–" if value is None else form.format(factor * value)
