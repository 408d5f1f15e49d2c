"""The command line. Results go to standard output, progress and errors to standard error.

:mod:`gpubatch.cli_explore` adds the commands that look into training, :mod:`gpubatch.cli_sizing` the plan of memory.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import math
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich import box
from rich.console import Console
from rich.table import Table

import gpubatch
from gpubatch import datasets, optim, plot, schedules
from gpubatch.backend import Backend, available_backends, float_dtype, get_backend, load_cupy
from gpubatch.checkpoint import Checkpoints
from gpubatch.errors import ArgumentError, BackendUnavailableError, check_choice
from gpubatch.formula import Rule, rules
from gpubatch.launch import host_library, update_source
from gpubatch.layers import ACTIVATIONS
from gpubatch.loader import Loader
from gpubatch.network import Network, mlp
from gpubatch.products import products_for
from gpubatch.sizing import format_bytes
from gpubatch.train import EXECUTIONS, TrainingInterrupted, TrainingTerminated, fit

__all__ = ["app"]

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


@app.command(
    epilog="**Examples:** `gpubatch train` learns the bundled digits. `gpubatch train data/mnist --layers 1024,512 "
    "--epochs 20 --plot curves.png` learns from the files in a folder and draws the curves. "
    "`gpubatch train --checkpoint run --resume` goes on where it was stopped or killed."
)
def train(
    folder: FolderArgument = None,
    layers: LayersOption = "512,512",
    activation: ActivationOption = "gelu",
    optimizer: OptimizerOption = "adam",
    lr: Annotated[float | None, typer.Option(help="Learning rate; by default one that suits the optimizer.")] = None,
    decay: Annotated[str, typer.Option(help=f"Of the learning rate: {', '.join(DECAYS)}.")] = "cosine",
    batch_size: BatchSizeOption = "auto",
    at_most: AtMostOption = 64,
    epochs: Annotated[int, typer.Option(min=1, help="How often every sample is seen.")] = 10,
    l2: Annotated[float, typer.Option(help="Weight of l2/2 * Σ W² in the cost.")] = 0.0,
    dropout: DropoutOption = 0.3,
    batch_norm: BatchNormOption = True,
    seed: Annotated[int, typer.Option(help="Of split, first weights, order and dropout.")] = 0,
    backend: BackendOption = "auto",
    dtype: DtypeOption = "float32",
    precision: PrecisionOption = "full",
    execution: Annotated[
        str, typer.Option(help="Of steps: captured as CUDA graphs, eager one by one, or auto: captured where possible.")
    ] = "auto",
    checkpoint: Annotated[Path | None, typer.Option(help="Folder to save the run in, so that it can go on.")] = None,
    every: Annotated[int | None, typer.Option(help="Steps between checkpoints; by default an epoch.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint, if any.")] = False,
    plot_file: Annotated[Path | None, typer.Option("--plot", help="Draw the curves: a .png, .pdf or .svg.")] = None,
    as_json: JsonOption = False,
    progress: Annotated[bool, typer.Option(help="Show the progress on standard error.")] = True,
) -> None:
    """Train a network by mini-batches, and test it."""
    if checkpoint is None and (resume or every is not None):
        raise ArgumentError(f"{'--resume' if resume else '--every'} needs --checkpoint DIR, the folder of the run")
    store = None if checkpoint is None else Checkpoints(checkpoint, every)
    if plot_file is not None:
        plot.check_plot_file(plot_file)
    make, usual_lr = OPTIMIZERS[check_choice("--optimizer", optimizer, OPTIMIZERS)]
    schedule = DECAYS[check_choice("--decay", decay, DECAYS)]
    check_choice("--execution", execution, EXECUTIONS)
    hidden = widths(layers)
    where = get_backend(backend)
    name, (X, Y), (X_test, Y_test) = load(folder, seed)
    sizes = [X.shape[1], *hidden, int(Y.max()) + 1]
    net = mlp(sizes, activation, batch_norm, dropout, l2=l2, backend=where, dtype=dtype, seed=seed, precision=precision)
    loader = loader_of_pixels(X, Y, batch_size, at_most, seed, net)
    rate = usual_lr if lr is None else lr
    opt = make(net.parameters, schedule(rate, epochs), master_weights=precision == "mixed")

    out = Console(quiet=as_json, highlight=False, soft_wrap=True, markup=False, emoji=False)
    out.print(f"data       {name}: {len(X):,} to train on, {len(X_test):,} to test")
    out.print(f"network    {' - '.join(map(str, sizes))}, {activation}, {net.parameters.size:,} parameters")
    out.print(f"optimizer  {optimizer}, learning rate {rate:g}, decay {decay}")
    out.print(f"backend    {where.device}, {dtype}, precision {precision}")
    started = time.perf_counter()
    try:
        history = fit(
            *(net, loader, opt, epochs, (X_test, Y_test)),
            checkpoint=store,
            resume=resume,
            progress=progress,
            execution=execution,
        )
    except (TrainingInterrupted, TrainingTerminated) as end:
        typer.echo(end, err=True)
        # What a shell reports for a program that Ctrl-C or SIGTERM ended.
        raise typer.Exit(130 if isinstance(end, TrainingInterrupted) else 143) from None
    seconds = time.perf_counter() - started
    out.print(f"batches    {loader.batch_size}: {loader.plan.reason}")
    out.print(f"steps      {history.execution}")

    if plot_file is not None:
        title = f"gpubatch train on {name}: {optimizer}, batch size {loader.batch_size}, {dtype}, {where.spec}"
        plot.plot_training(history, plot_file, title)
        out.print(f"curves     {plot_file}")
    accuracy, loss = history.validation_accuracy[-1], history.validation_loss[-1]
    out.print(
        f"test accuracy {100 * accuracy:.2f} % ({round(accuracy * len(X_test)):,} of {len(X_test):,}), "
        f"test loss {loss:.4f}, in {seconds:.1f} s"
    )
    if as_json:
        print_json(
            test_accuracy=accuracy,
            test_loss=loss,
            seconds=seconds,
            batch_size=loader.batch_size,
            batch_reason=loader.plan.reason,
            parameters=net.parameters.size,
            device=where.device,
            history=history.to_dict(),
            arguments={
                "folder": None if folder is None else str(folder),
                "layers": hidden,
                "activation": activation,
                "optimizer": optimizer,
                "lr": rate,
                "decay": decay,
                "epochs": epochs,
                "l2": l2,
                "dropout": dropout,
                "batch_norm": batch_norm,
                "seed": seed,
                "backend": where.spec,
                "dtype": dtype,
                "precision": precision,
                "execution": execution,
            },
            versions=versions(),
        )


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


@app.command(epilog="**Examples:** `gpubatch info` and `gpubatch info --kernel adam`.")
def info(
    kernel: Annotated[str | None, typer.Option(help="Print the CUDA source of this update rule instead.")] = None,
    dtype: Annotated[str, typer.Option(help="Of that kernel: float32 or float64.")] = "float32",
    as_json: JsonOption = False,
) -> None:
    """Show the backends, their devices and memory, and why CUDA is or is not there."""
    if kernel is not None:
        known: dict[str, Rule] = {name: getattr(rules, name) for name in rules.__all__}
        rule = known[check_choice("--kernel", kernel, known)]
        typer.echo(update_source(rule.trace(), float_dtype(dtype, "--dtype").name))
        return
    found = [get_backend(spec) for spec in available_backends()]
    why_not = _why_no_cuda()
    if as_json:
        backends = {be.spec: {"device": be.device, "memory": dataclasses.asdict(be.memory())} for be in found}
        cuda = {"cuda": why_not or "available", "matrix_products": _how_cuda_multiplies(found)}
        print_json(backends=backends, **cuda, auto=get_backend().spec, versions=versions())
        return
    out = Console(highlight=False)
    out.print(", ".join(f"{name} {version}" for name, version in versions().items()))
    table = Table("backend", "device", "memory", "available now", box=box.SIMPLE_HEAD, pad_edge=False)
    for be in found:
        memory = be.memory()
        table.add_row(be.spec, be.device, format_bytes(memory.total), format_bytes(memory.available))
    out.print(table)
    auto = get_backend()
    out.print(f'"auto" is {auto.spec}: {auto.reason}.', soft_wrap=True)
    if why_not:
        out.print(why_not, soft_wrap=True, markup=False)  # a remedy has square brackets
    for spec, how in _how_cuda_multiplies(found).items():
        out.print(f"matrix products of a captured step on {spec}: {how}.", soft_wrap=True, markup=False)
    compiled = host_library()
    words = compiled if isinstance(compiled, str) else f"for {compiled.level()}, on {compiled.threads()} threads"
    out.print(f"kernels compiled for the CPU: {words}.", soft_wrap=True)
    extras = {"cli": "typer", "plot": "matplotlib", "cuda": "cupy"}
    lacking = [name for name, module in extras.items() if importlib.util.find_spec(module) is None]
    out.print(f"extras that are not installed: {', '.join(lacking) or 'none'}.")


def _why_no_cuda() -> str | None:
    try:
        load_cupy()
    except BackendUnavailableError as error:
        return str(error)
    return None


def _how_cuda_multiplies(backends: Sequence[Backend]) -> dict[str, str]:
    """By spec, what multiplies the matrices of a captured step, or why steps cannot be captured."""
    made = {be.spec: products_for(be, np.dtype(np.float32), "full") for be in backends if be.name == "cuda"}
    return {spec: p.reason if p.capturable else f"none, {p.reason}" for spec, p in made.items()}


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
