"""``gpubatch train``."""

from __future__ import annotations

import dataclasses
import signal
import sys
import time
from pathlib import Path
from typing import Annotated, Any, ClassVar

import typer
from rich.console import Console

from gpubatch import plot
from gpubatch.checkpoint import Checkpoints
from gpubatch.cli import options
from gpubatch.cli.data import DataOptions, Samples, network_for, sizes_of, used
from gpubatch.cli.options import BatchOptions, NetworkOptions, OptimizerOptions, TrainingOptions, spread
from gpubatch.cli.shared import app, arguments_of, console, examples, in_percent, print_json, versions
from gpubatch.errors import ArgumentError, RankError, check_int
from gpubatch.loader import Loader
from gpubatch.model import check_writable
from gpubatch.nn import Network
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


@dataclasses.dataclass
class FolderOptions:
    """The checkpoints of a run."""

    panel: ClassVar[str] = "Checkpoints"
    checkpoint: Annotated[Path | None, typer.Option(help="Folder for the checkpoints of the run.")] = None
    every: Annotated[int | None, typer.Option(help="Steps between checkpoints; by default an epoch.")] = None
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint, if there is one.")] = False

    def __post_init__(self) -> None:
        if self.checkpoint is None and (self.resume or self.every is not None):
            given = "--resume" if self.resume else "--every"
            raise ArgumentError(f"{given} needs --checkpoint DIR, the folder of the run")

    def store(self) -> Checkpoints | None:
        """The folder, if there is one."""
        return None if self.checkpoint is None else Checkpoints(self.checkpoint, self.every)


@dataclasses.dataclass
class ResultOptions:
    """The files and the output of a run."""

    panel: ClassVar[str] = "Results"
    metrics: options.Metrics = ""
    save_file: Annotated[
        Path | None, typer.Option("--save", help="Save the trained model as this .safetensors file.")
    ] = None
    log: Annotated[Path | None, typer.Option(help="CSV file with a row for every epoch.")] = None
    plot_file: options.PlotFile = None
    as_json: options.AsJson = False

    def check(self) -> None:
        """Raise unless the files can be written."""
        if self.plot_file is not None:
            plot.check_plot_file(self.plot_file)
        if self.save_file is not None:
            check_writable(self.save_file)

    def measures(self, task: str) -> list[str]:
        """The metrics of a task."""
        names = options.names_of(self.metrics)
        return names if task != "regression" or "r2" in names else [*names, "r2"]


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
    folder: FolderOptions,
    results: ResultOptions,
    shards: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Parts of a batch, dealt to the processes of mpiexec: the result depends on them, and not on the "
            "processes. By default those of the resumed run, or 8 under mpiexec.",
        ),
    ] = None,
    progress: options.Progress = True,
) -> None:
    """Train a network by mini-batches, and test it.

    Under mpiexec or srun all processes train one network together, each on its parts of every batch.
    """
    together = Agreement(ranks := ranks_of_launcher())
    with together.ending(), together.phase():
        store = folder.store()
        if together.first:
            results.check()
        epochs = check_int("--epochs", training.epochs, 1)
        if folder.resume and store is not None:
            init, of_run = to_resume(store)
            network = dataclasses.replace(network, init=init) if network.init == "auto" else network
            shards = of_run if shards is None else shards
        found = data.read()
        net = network_for(found, network, data.seed)
    with together.ending(), together.phase():
        loader = found.loader(net, batches, data.seed, ranks, shards)
        opt = optimizer.make(net, epochs)
    out = console(quiet=results.as_json)
    announce(out, found, loader, net, network, optimizer, together.size)
    started, ended, code = time.perf_counter(), "", 0
    callbacks = training.callbacks()
    keeps = [callback for callback in callbacks[-1:] if isinstance(callback, (EarlyStopping, BestWeights))]
    callbacks += [] if results.log is None else [CSVLog(results.log)]
    try:
        history = fit(
            *(net, loader, opt, epochs, found.validation),
            callbacks=callbacks,
            checkpoint=store,
            resume=folder.resume,
            progress=progress,
            execution=training.execution,
            metrics=results.measures(found.task),
            ranks=ranks,
        )
    except (TrainingInterrupted, TrainingTerminated) as end:
        history = end.history
        ended, code = how_it_ended(end, kept=store is not None or results.save_file is not None)
        try:
            typer.echo(ended, err=True)
        except OSError:  # a closed terminal: nobody reads what follows
            results, out = dataclasses.replace(results, as_json=False, plot_file=None), console(quiet=True)
    if not together.first:
        raise typer.Exit(code)
    seconds = time.perf_counter() - started
    out.print(f"batches    {loader.batch_size}: {found.reason(loader, batches)}\nsteps      {history.execution}")
    if results.save_file is not None:
        found.model(net, loader).save(results.save_file)
        out.print(f"model      {results.save_file}")
    if results.plot_file is not None and history.step_loss:
        of = f"{optimizer.optimizer}, batch size {loader.batch_size}, {network.dtype}, {net.backend.spec}"
        plot.plot_training(complete(history, len(loader)), results.plot_file, f"gpubatch train on {found.name}: {of}")
        out.print(f"curves     {results.plot_file}")
    # The epoch whose weights the network has: the best one where they were kept, but not after an interruption.
    epoch = keeps[0].best_epoch if keeps and not ended and keeps[0].best_epoch else len(history.validation_loss)
    tested = print_test(out, history, epoch, len(found.test[0]), seconds)
    if results.as_json:
        arguments = arguments_of(context, **used(net, network, found.task), lr=optimizer.rate)
        more: dict[str, Any] = {"epoch": epoch} if keeps else {}
        more |= {"interrupted": ended} if ended else {}
        print_json(
            **tested,
            seconds=seconds,
            **values_of(net, loader, history, found.reason(loader, batches)),
            arguments=arguments,
            **more,
        )
    if ended:
        raise typer.Exit(code)


def how_it_ended(end: TrainingInterrupted | TrainingTerminated, kept: bool) -> tuple[str, int]:
    """A message, and the exit code of a program that a signal ended."""
    words = end.message if kept else f"{end.message.partition(';')[0]}; nothing of it is saved without --checkpoint DIR"
    return words, 128 + (signal.SIGINT if isinstance(end, TrainingInterrupted) else end.number)


def values_of(net: Network, loader: Loader, history: History, reason: str) -> dict[str, Any]:
    """The run in the JSON, besides its test."""
    return {
        "batch_size": loader.batch_size,
        "batch_reason": reason,
        "parameters": net.parameters.size,
        "device": net.backend.device,
        "history": history.to_dict(),
        "versions": versions(),
    }


def announce(
    out: Console,
    data: Samples,
    loader: Loader,
    net: Network,
    network: NetworkOptions,
    optimizer: OptimizerOptions,
    processes: int,
) -> None:
    """Print data, network, optimizer and backend before the run begins."""
    out.print(f"data       {data.name}: {len(data.X):,} to train on, {len(data.test[0]):,} to test")
    if unscaled := data.unscaled:
        typer.echo(f"note: {unscaled}", err=True)
    sizes = " - ".join(map(str, sizes_of(net)))
    out.print(f"network    {sizes}, {network.activation}, {net.parameters.size:,} parameters")
    if net.loss_name != "softmax_cross_entropy":
        out.print(f"loss       {net.loss_name}")
    out.print(f"optimizer  {optimizer.optimizer}, learning rate {optimizer.rate:g}, decay {optimizer.decay}")
    out.print(f"backend    {net.backend.device}, {network.dtype}, precision {network.precision}")
    if processes > 1:
        out.print(f"ranks      {processes} processes, batches in {loader.shards} parts")


def print_test(out: Console, history: History, epoch: int, samples: int, seconds: float) -> dict[str, Any]:
    """Print the validation after an epoch, on so many samples; returns its values by name."""
    accuracy, loss = (x[epoch - 1] if x else None for x in (history.validation_accuracy, history.validation_loss))
    quality = {name: values[epoch - 1] for name, values in history.metrics.items() if values}
    if loss is not None:
        right = "" if accuracy is None else f" accuracy {in_percent(accuracy, samples)}, test"
        r2 = f", R² {quality['r2']:.4f}" if "r2" in quality else ""
        out.print(f"test{right} loss {loss:.4f}{r2}, in {seconds:.1f} s")
    return {"test_accuracy": accuracy, "test_loss": loss, **{f"test_{name}": x for name, x in quality.items()}}


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
