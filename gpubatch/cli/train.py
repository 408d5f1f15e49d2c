"""``gpubatch train``."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from gpubatch import plot
from gpubatch.checkpoint import Checkpoints
from gpubatch.cli import options
from gpubatch.cli.data import Data
from gpubatch.cli.shared import app, arguments_of, print_json, versions
from gpubatch.errors import ArgumentError, check_choice
from gpubatch.model import check_writable, save
from gpubatch.train import (
    EXECUTIONS,
    BestWeights,
    CSVLog,
    EarlyStopping,
    History,
    ReduceOnPlateau,
    TrainingInterrupted,
    TrainingTerminated,
    WeightAverage,
    fit,
    init_to_resume,
)

__all__ = ["train"]


@app.command(
    epilog="**Examples:** `gpubatch train` learns the bundled digits. `gpubatch train data/mnist --layers 1024,512 "
    "--epochs 20 --plot curves.png` learns from the files in a folder and draws the curves. "
    "`gpubatch train --checkpoint run --resume` goes on where it was stopped or killed. "
    "`gpubatch train --save digits.safetensors` keeps the model for `gpubatch predict`."
)
def train(
    context: typer.Context,
    folder: options.Folder = None,
    layers: options.HiddenLayers = "512,512",
    activation: options.Activation = "gelu",
    loss: options.LossName = "softmax_cross_entropy",
    label_smoothing: options.LabelSmoothing = 0.0,
    optimizer: options.OptimizerName = "adam",
    lr: options.Rate = None,
    decay: Annotated[str, typer.Option(help=f"Of the learning rate: {', '.join(options.DECAYS)}.")] = "cosine",
    batch_size: options.BatchSize = "auto",
    at_most: options.AtMost = 64,
    epochs: Annotated[int, typer.Option(min=1, help="How often every sample is seen.")] = 10,
    l2: Annotated[float, typer.Option(help="Weight of l2/2 * Σ W² in the cost.")] = 0.0,
    dropout: options.WithDropout = 0.3,
    batch_norm: options.WithBatchNorm = True,
    class_weight: Annotated[
        str | None, typer.Option(help="balanced: every class counts as much as any other in the loss.")
    ] = None,
    init: options.FirstWeights = "auto",
    seed: Annotated[int, typer.Option(help="Of split, first weights, order and dropout.")] = 0,
    backend: options.BackendName = "auto",
    dtype: options.DtypeName = "float32",
    precision: Annotated[
        str, typer.Option(help="full; fast: a GPU multiplies float32 matrices as TF32; mixed: float16 is stored.")
    ] = "full",
    execution: Annotated[
        str, typer.Option(help="Of steps: captured as CUDA graphs, eager one by one, or auto: captured where possible.")
    ] = "auto",
    early_stop: Annotated[
        int | None, typer.Option(min=1, help="Stop after so many epochs with no better test loss; take the best one.")
    ] = None,
    best: Annotated[
        bool, typer.Option("--best", help="Take the weights of the epoch with the best test loss.")
    ] = False,
    average: Annotated[
        float | None, typer.Option(help="Average the weights over the steps, the past with this weight, such as 0.999.")
    ] = None,
    plateau: Annotated[
        int | None, typer.Option(min=0, help="Halve the learning rate after more epochs than this with no better loss.")
    ] = None,
    log: Annotated[Path | None, typer.Option(help="CSV file with a row for every epoch.")] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Folder to save the run in, so that it can go on.")] = None,
    metrics: Annotated[str, typer.Option(help="More to measure after every epoch, by comma: f1,top_3.")] = "",
    every: Annotated[int | None, typer.Option(help="Steps between checkpoints; by default an epoch.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint, if any.")] = False,
    save_file: Annotated[
        Path | None, typer.Option("--save", help="Save the trained model as this .safetensors file.")
    ] = None,
    plot_file: Annotated[Path | None, typer.Option("--plot", help="Draw the curves: a .png, .pdf or .svg.")] = None,
    as_json: options.AsJson = False,
    progress: Annotated[bool, typer.Option(help="Show the progress on standard error.")] = True,
) -> None:
    """Train a network by mini-batches, and test it."""
    if checkpoint is None and (resume or every is not None):
        raise ArgumentError(f"{'--resume' if resume else '--every'} needs --checkpoint DIR, the folder of the run")
    store = None if checkpoint is None else Checkpoints(checkpoint, every)
    if plot_file is not None:
        plot.check_plot_file(plot_file)
    if save_file is not None:
        check_writable(save_file)
    make, usual_lr = options.optimizer_named(optimizer)
    schedule = options.DECAYS[check_choice("--decay", decay, options.DECAYS)]
    check_choice("--execution", execution, EXECUTIONS)
    kind: dict[str, Any] = {
        "activation": activation,
        "loss": options.loss_named(loss, label_smoothing),
        "batch_norm": batch_norm,
        "dropout": dropout,
        "l2": l2,
        "precision": precision,
        "init": init_to_resume(store) if resume and store is not None and init == "auto" else init,
    }
    data = Data(folder, layers, backend, dtype, seed, **kind)
    net, where, (X_test, Y_test) = data.net, data.net.backend, data.test
    if class_weight is not None:
        check_choice("--class-weight", class_weight, ["balanced"])
    loader = data.loader(batch_size, at_most, class_weight)
    rate = usual_lr if lr is None else lr
    opt = make(net.parameters, schedule(rate, epochs), master_weights=precision == "mixed")

    out = Console(quiet=as_json, highlight=False, soft_wrap=True, markup=False, emoji=False)
    out.print(f"data       {data.name}: {len(data.X):,} to train on, {len(X_test):,} to test")
    out.print(f"network    {' - '.join(map(str, data.sizes))}, {activation}, {net.parameters.size:,} parameters")
    if net.loss_name != "softmax_cross_entropy":
        out.print(f"loss       {net.loss_name}")
    out.print(f"optimizer  {optimizer}, learning rate {rate:g}, decay {decay}")
    out.print(f"backend    {where.device}, {dtype}, precision {precision}")
    started, ended = time.perf_counter(), ""
    code = 0
    callbacks: list[Any] = [] if plateau is None else [ReduceOnPlateau(0.5, plateau)]
    callbacks += [] if average is None else [WeightAverage(average)]
    keeps: list[Any] = [EarlyStopping(early_stop)] if early_stop is not None else [BestWeights()] if best else []
    callbacks += keeps if log is None else [*keeps, CSVLog(log)]
    try:
        history = fit(
            *(net, loader, opt, epochs, (X_test, Y_test)),
            callbacks=callbacks,
            checkpoint=store,
            resume=resume,
            progress=progress,
            execution=execution,
            metrics=[name for name in metrics.split(",") if name],
        )
    except (TrainingInterrupted, TrainingTerminated) as end:
        history, ended = end.history, end.message
        if store is None and save_file is None:
            ended = f"{ended.partition(';')[0]}; nothing of it is saved without --checkpoint DIR"
        typer.echo(ended, err=True)
        # What a shell reports for a program that Ctrl-C or SIGTERM ended.
        code = 130 if isinstance(end, TrainingInterrupted) else 143
    seconds = time.perf_counter() - started
    out.print(f"batches    {loader.batch_size}: {loader.plan.reason}")
    out.print(f"steps      {history.execution}")

    if save_file is not None:
        save(save_file, net, loader)
        out.print(f"model      {save_file}")
    if plot_file is not None and history.step_loss:
        title = f"gpubatch train on {data.name}: {optimizer}, batch size {loader.batch_size}, {dtype}, {where.spec}"
        plot.plot_training(complete(history, len(loader)), plot_file, title)
        out.print(f"curves     {plot_file}")
    # The epoch whose weights the network has: the best one where they were kept, but not after an interruption.
    epoch = keeps[0].best_epoch if keeps and not ended and keeps[0].best_epoch else len(history.validation_loss)
    accuracy, test_loss = (x[epoch - 1] if x else None for x in (history.validation_accuracy, history.validation_loss))
    if accuracy is not None and test_loss is not None:
        out.print(
            f"test accuracy {100 * accuracy:.2f} % ({round(accuracy * len(X_test)):,} of {len(X_test):,}), "
            f"test loss {test_loss:.4f}, in {seconds:.1f} s"
        )
    if as_json:
        print_json(
            test_accuracy=accuracy,
            test_loss=test_loss,
            seconds=seconds,
            batch_size=loader.batch_size,
            batch_reason=loader.plan.reason,
            parameters=net.parameters.size,
            device=where.device,
            history=history.to_dict(),
            arguments=arguments_of(context, layers=data.hidden, lr=rate, backend=where.spec),
            versions=versions(),
            **({"epoch": epoch} if keeps else {}),
            **({"interrupted": ended} if ended else {}),
        )
    if ended:
        raise typer.Exit(code)


def complete(history: History, steps: int) -> History:
    """A run without the steps of an epoch that was interrupted, if an earlier one is complete."""
    end = len(history.loss) * steps or None
    return dataclasses.replace(history, step_loss=history.step_loss[:end], step_lr=history.step_lr[:end])
