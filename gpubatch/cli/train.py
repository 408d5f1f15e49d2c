"""``gpubatch train``."""

from __future__ import annotations

import dataclasses
import signal
import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from gpubatch import plot
from gpubatch.checkpoint import Checkpoints
from gpubatch.cli import options
from gpubatch.cli.data import DataOptions, network_for, sizes_of, used
from gpubatch.cli.options import BatchOptions, NetworkOptions, OptimizerOptions, TrainingOptions, spread
from gpubatch.cli.shared import app, arguments_of, examples, in_percent, print_json, versions
from gpubatch.errors import ArgumentError, RankError, check_int
from gpubatch.model import check_writable
from gpubatch.parallel import Ranks
from gpubatch.train import (
    Agreement,
    BestWeights,
    CSVLog,
    EarlyStopping,
    History,
    TrainingInterrupted,
    TrainingTerminated,
    fit,
    to_resume,
)

__all__ = ["train"]


@app.command(
    epilog=examples(
        the_bundled_digits="gpubatch train",
        a_table="gpubatch train trees.csv --label species --save trees.safetensors",
        images="gpubatch train data/mnist --layers 1024,512 --epochs 20 --plot curves.png",
        numbers="gpubatch train X.npy Y.npy --task regression --early-stop 5",
        after_a_crash="gpubatch train --checkpoint run --resume",
        four_processes="mpiexec -n 4 gpubatch train --batch-size 256 --checkpoint run",
    ),
)
@spread()
def train(
    context: typer.Context,
    data: DataOptions,
    network: NetworkOptions,
    optimizer: OptimizerOptions,
    batches: BatchOptions,
    training: TrainingOptions,
    metrics: options.Metrics = "",
    checkpoint: Annotated[Path | None, typer.Option(help="Folder to save the run in, so that it can go on.")] = None,
    every: Annotated[int | None, typer.Option(help="Steps between checkpoints; by default an epoch.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint, if any.")] = False,
    shards: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Parts of a batch, dealt to the processes of mpiexec: the result depends on them, and not on the "
            "processes. By default those of the resumed run, or 8 under mpiexec.",
        ),
    ] = None,
    save_file: Annotated[
        Path | None, typer.Option("--save", help="Save the trained model as this .safetensors file.")
    ] = None,
    log: Annotated[Path | None, typer.Option(help="CSV file with a row for every epoch.")] = None,
    plot_file: options.PlotFile = None,
    as_json: options.AsJson = False,
    progress: options.Progress = True,
) -> None:
    """Train a network by mini-batches, and test it.

    Under mpiexec or srun all processes train one network together, each on its parts of every batch.
    """
    together = Agreement(ranks := ranks_of_launcher())
    with together.ending(), together.phase():
        if checkpoint is None and (resume or every is not None):
            raise ArgumentError(f"{'--resume' if resume else '--every'} needs --checkpoint DIR, the folder of the run")
        store = None if checkpoint is None else Checkpoints(checkpoint, every)
        if plot_file is not None and together.first:
            plot.check_plot_file(plot_file)
        if save_file is not None and together.first:
            check_writable(save_file)
        optimizer.check()
        training.check()
        epochs = check_int("--epochs", training.epochs, 1)
        if resume and store is not None:
            init, of_run = to_resume(store)
            network = dataclasses.replace(network, init=init) if network.init == "auto" else network
            shards = of_run if shards is None else shards
        found = data.read()
        net = network_for(found, network, data.seed)
    where, n_test = net.backend, len(found.test[0])
    with together.ending(), together.phase():
        loader = found.loader(net, batches, data.seed, ranks, shards)
        opt = optimizer.make(net, epochs)

    out = Console(quiet=as_json, highlight=False, soft_wrap=True, markup=False, emoji=False)
    out.print(f"data       {found.name}: {len(found.X):,} to train on, {n_test:,} to test")
    if unscaled := found.unscaled:
        typer.echo(f"note: {unscaled}", err=True)
    sizes = " - ".join(map(str, sizes_of(net)))
    out.print(f"network    {sizes}, {network.activation}, {net.parameters.size:,} parameters")
    if net.loss_name != "softmax_cross_entropy":
        out.print(f"loss       {net.loss_name}")
    out.print(f"optimizer  {optimizer.optimizer}, learning rate {optimizer.rate:g}, decay {optimizer.decay}")
    out.print(f"backend    {where.device}, {network.dtype}, precision {network.precision}")
    if together.several:
        out.print(f"ranks      {together.size} processes, batches in {loader.shards} parts")
    started, ended = time.perf_counter(), ""
    code = 0
    callbacks = training.callbacks()
    keeps = [callback for callback in callbacks[-1:] if isinstance(callback, (EarlyStopping, BestWeights))]
    callbacks += [] if log is None else [CSVLog(log)]
    measured = options.names_of(metrics)
    if found.task == "regression" and "r2" not in measured:
        measured.append("r2")
    try:
        history = fit(
            *(net, loader, opt, epochs, found.validation),
            callbacks=callbacks,
            checkpoint=store,
            resume=resume,
            progress=progress,
            execution=training.execution,
            metrics=measured,
            ranks=ranks,
        )
    except (TrainingInterrupted, TrainingTerminated) as end:
        history, ended = end.history, end.message
        if store is None and save_file is None:
            ended = f"{ended.partition(';')[0]}; nothing of it is saved without --checkpoint DIR"
        try:
            typer.echo(ended, err=True)
        except OSError:  # a closed terminal: nobody reads what follows
            as_json, out, plot_file = False, Console(quiet=True), None
        # What a shell reports for a program that a signal ended.
        code = 128 + (signal.SIGINT if isinstance(end, TrainingInterrupted) else end.number)
    if not together.first:
        raise typer.Exit(code)
    seconds = time.perf_counter() - started
    out.print(f"batches    {loader.batch_size}: {loader.plan.reason}")
    out.print(f"steps      {history.execution}")

    if save_file is not None:
        found.model(net, loader).save(save_file)
        out.print(f"model      {save_file}")
    if plot_file is not None and history.step_loss:
        title = f"gpubatch train on {found.name}: {optimizer.optimizer}, batch size {loader.batch_size}, "
        title += f"{network.dtype}, {where.spec}"
        plot.plot_training(complete(history, len(loader)), plot_file, title)
        out.print(f"curves     {plot_file}")
    # The epoch whose weights the network has: the best one where they were kept, but not after an interruption.
    epoch = keeps[0].best_epoch if keeps and not ended and keeps[0].best_epoch else len(history.validation_loss)
    accuracy, test_loss = (x[epoch - 1] if x else None for x in (history.validation_accuracy, history.validation_loss))
    quality = {name: values[epoch - 1] for name, values in history.metrics.items() if values}
    if test_loss is not None:
        right = "" if accuracy is None else f" accuracy {in_percent(accuracy, n_test)}, test"
        measures = "".join(f", R² {value:.4f}" for name, value in quality.items() if name == "r2")
        out.print(f"test{right} loss {test_loss:.4f}{measures}, in {seconds:.1f} s")
    if as_json:
        print_json(
            test_accuracy=accuracy,
            test_loss=test_loss,
            **{f"test_{name}": value for name, value in quality.items()},
            seconds=seconds,
            batch_size=loader.batch_size,
            batch_reason=loader.plan.reason,
            parameters=net.parameters.size,
            device=where.device,
            history=history.to_dict(),
            arguments=arguments_of(context, **used(net, network, found.task), lr=optimizer.rate),
            versions=versions(),
            **({"epoch": epoch} if keeps else {}),
            **({"interrupted": ended} if ended else {}),
        )
    if ended:
        raise typer.Exit(code)


def ranks_of_launcher() -> Ranks | None:
    """The processes that a launcher started; None if this one is alone."""
    try:
        ranks = Ranks()
    except ImportError as error:
        raise RankError(str(error)) from error
    if ranks.rank and sys.__stderr__ is not None:
        sys.stderr = sys.__stderr__  # so that the reason why one rank ends all is shown
    return ranks if ranks.size > 1 else None


def complete(history: History, steps: int) -> History:
    """A run without the steps of an epoch that was interrupted, if an earlier one is complete."""
    end = len(history.loss) * steps or None
    return dataclasses.replace(history, step_loss=history.step_loss[:end], step_lr=history.step_lr[:end])
