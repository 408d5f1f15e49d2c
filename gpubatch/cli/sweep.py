"""``gpubatch sweep``."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Annotated, Any

import typer

from gpubatch import explore, plot
from gpubatch.cli import options
from gpubatch.cli.data import DataOptions, Task, used
from gpubatch.cli.options import BatchOptions, NetworkOptions, RunOptions, integers, spread
from gpubatch.cli.shared import CommandReport, app, arguments_of, examples, given, number_or_dash, table_of
from gpubatch.cli.strategies import compare_strategies
from gpubatch.errors import ArgumentError, check_choice
from gpubatch.sizing import format_bytes
from gpubatch.train import bar

# What may vary, and which options each takes besides those of data and network.
KINDS: dict[str, tuple[str, ...]] = {
    "step-size": ("optimizer", "batch_size", "at_most"),
    "batch-size": ("optimizer", "lr", "epochs", "early_stop", "sizes", "target"),
    "optimizer": ("epochs", "early_stop", "batch_size", "at_most"),
    "strategy": ("lr", "epochs", "early_stop", "batch_size", "at_most", "trials", "scale"),
}
OF_SOME = sorted({name for names in KINDS.values() for name in names})


@app.command(
    epilog=examples(
        the_learning_rate="gpubatch sweep step-size --plot steps.png",
        the_batch_size="gpubatch sweep batch-size --target 0.3",
        the_optimizer="gpubatch sweep optimizer trees.csv --label species",
        the_comparison_of_CS231n="gpubatch sweep strategy --layers '' --loss svm",
    ),
)
@spread(layers="128", activation="relu", batch_norm=False, dropout=0.0, batch_size="128", epochs=None)
def sweep(
    context: typer.Context,
    what: Annotated[
        str,
        typer.Argument(
            metavar="WHAT",
            help="step-size: the loss after one step, and a range test. batch-size: times and memory. optimizer: each "
            "at its own best learning rate. strategy: random and local search, and gradient descent.",
        ),
    ],
    data: DataOptions,
    network: NetworkOptions,
    batches: BatchOptions,
    run: RunOptions,
    optimizer: options.OptimizerName = None,
    lr: options.Rate = None,
    sizes: Annotated[str, typer.Option(help="Of batch-size: sizes, comma-separated; by default 16 to 1024.")] = "",
    target: Annotated[float, typer.Option(help="Of batch-size: the loss to reach.")] = 0.3,
    trials: Annotated[int, typer.Option(min=1, help="Of strategy: trials of each search.")] = 1000,
    scale: Annotated[float, typer.Option(help="Of strategy: standard deviation of the draws.")] = 0.01,
    plot_file: options.PlotFile = None,
    as_json: options.AsJson = False,
    progress: options.Progress = True,
) -> None:
    """Train several times, with one thing different each time.

    step-size takes --optimizer, by default sgd. batch-size takes it, too, by default adam; --lr is for batches of 128,
    and grows with the square root of the batch size (Malladi et al. 2022). Runs of optimizer have 2 epochs by default,
    the others 10.
    """
    takes = KINDS[check_choice("WHAT", what, KINDS)]
    for name in OF_SOME:
        if name not in takes and given(context, name) is not None:
            several = [kind for kind, names in KINDS.items() if name in names]
            raise ArgumentError(f"--{name.replace('_', '-')} is for sweep {' and '.join(several)}, not for {what}")
    if plot_file is not None:
        plot.check_plot_file(plot_file)
    task = Task.of(data, network)
    if run.epochs is None:
        run = dataclasses.replace(run, epochs=2 if what == "optimizer" else 10)
    title = f"gpubatch sweep {what}, {len(task.X):,} samples\n{task.words}"
    with bar("sweep", progress) as show:
        if what == "step-size":
            report = _sweep_steps(task, optimizer or "sgd", batches.number(len(task.X)), show)
        elif what == "batch-size":
            tried = integers("--sizes", sizes) or None
            make, usual = options.optimizer_named(optimizer or "adam")
            rate = lr if lr is not None else usual if optimizer else 1e-3
            report = _sweep_batches(task, tried, target, make, rate, run, show)
        elif what == "optimizer":
            report = _sweep_optimizers(task, run, batches.number(len(task.X)), show)
        else:
            report = _sweep_strategies(task, trials, scale, lr, run, batches, show)
    arguments = arguments_of(context, **used(task.net, network, task.data.task), epochs=run.epochs)
    more = {"network": task.words, "device": task.net.backend.device, "arguments": arguments}
    report._replace(values={**report.values, **more}, shown=[title, *report.shown]).print(as_json, title, plot_file)


def _sweep_steps(task: Task, optimizer: str, batch: int, show: explore.Progress) -> CommandReport:
    sizes = [float(f"1e{k}") for k in range(-10, 3)]
    one = explore.step_size_sweep(task.net, task.X, task.Y, sizes, task.weight)
    make = options.optimizer_named(optimizer)[0]
    test = explore.learning_rate_range_test(
        *(task.net, task.X, task.Y, make),
        batch_size=batch,
        seed=task.seed,
        progress=show,
        weight=task.weight,
    )
    table = table_of("step size", "loss after one step", "change")
    for size, loss in zip(one.step_sizes, one.losses, strict=True):
        table.add_row(f"{size:g}", f"{loss:.6g}", f"{loss - one.start:+.2e}")
    name = "SGD" if optimizer == "sgd" else optimizer
    advice = "no suggestion" if test.suggestion is None else f"suggested learning rate for {name}: {test.suggestion:g}"
    lines = [f"one step on the whole set: {one.reason}", f"{advice}: {test.reason}"]
    return CommandReport(
        {"step_sizes": one, "range_test": test},
        [table, *lines],
        functools.partial(plot.plot_step_sizes, one, test),
    )


def runs(task: Task, run: RunOptions, show: explore.Progress) -> dict[str, Any]:
    """The arguments that all sweeps of training runs share."""
    callbacks = {"validation": task.test, "callbacks": run.callbacks} if run.callbacks() else {}
    return {"seed": task.seed, "progress": show, "weight": task.weight, **callbacks}


def _sweep_batches(
    task: Task,
    sizes: list[int] | None,
    target: float,
    make: explore.MakeOptimizer,
    lr: float,
    run: RunOptions,
    show: explore.Progress,
) -> CommandReport:
    trials = explore.batch_size_sweep(
        *(task.net, task.X, task.Y, sizes, target, make),
        lr=lambda n: lr * math.sqrt(n / 128),
        epochs=run.epochs or 0,
        **runs(task, run, show),
    )
    reaching = f"epochs to {target:g}", f"s to {target:g}"
    table = table_of("batch size", "µs/sample", "s/epoch", *reaching, "memory", "loss")
    for t in trials:
        times = number_or_dash(t.seconds_per_sample, 1e6, "{:.1f}"), number_or_dash(t.seconds_per_epoch)
        reached = number_or_dash(t.epochs_to_target, 1, "{:.0f}"), number_or_dash(t.seconds_to_target)
        loss = number_or_dash(t.loss, 1, "{:.4f}")
        table.add_row(f"{t.batch_size}", *times, *reached, format_bytes(t.memory), loss)
    line = f"no batch size reached the loss {target:g} in {run.epochs} epochs"
    if times_to_target := [(t.seconds_to_target, t.batch_size) for t in trials if t.seconds_to_target is not None]:
        seconds, size = min(times_to_target)
        line = f"batch size {size} was the first at the loss {target:g}, after {seconds:.2f} s"
    return CommandReport(
        {"batch_sizes": trials, "target": target},
        [table, line],
        functools.partial(plot.plot_batch_sizes, trials, target),
    )


def _sweep_optimizers(task: Task, run: RunOptions, batch: int, show: explore.Progress) -> CommandReport:
    trials = explore.optimizer_sweep(
        *(task.net, task.X, task.Y), epochs=run.epochs or 0, batch_size=batch, **runs(task, run, show)
    )
    table = table_of("learning rate", *(t.name for t in trials))
    for k, rate in enumerate(trials[0].rates):
        cells = (f"{t.losses[k]:.4g}" + (" *" if rate == t.best_lr else "") for t in trials)
        table.add_row(f"{rate:g}", *cells)
    lines = [f"loss of the training set after {run.epochs} epochs, * the lowest of each optimizer:"]
    for t in sorted(trials, key=lambda t: t.loss):
        edge = ", at the edge of the grid: a better one may lie outside" if t.at_edge else ""
        accuracy = number_or_dash(t.accuracy, 100, "{:.2f}")
        lines.append(f"  {t.name} {t.loss:.4f}, accuracy {accuracy} %, with learning rate {t.best_lr:g}{edge}")
    return CommandReport({"optimizers": trials}, [table, *lines], functools.partial(plot.plot_optimizers, trials))


def _sweep_strategies(
    task: Task,
    trials: int,
    scale: float,
    lr: float | None,
    run: RunOptions,
    batches: BatchOptions,
    show: explore.Progress,
) -> CommandReport:
    rate = (0.01 if task.net.loss_name == "svm" else 0.1) if lr is None else lr
    results = compare_strategies(task, trials, scale, rate, run, batches, show)
    table = table_of("strategy", "tried", "loss", "accuracy (%)", "on test (%)", "seconds")
    for r, tried in zip(results, (f"{trials} trials", f"{trials} trials", f"{run.epochs} epochs"), strict=True):
        accuracy, held_out = (number_or_dash(value, 100, "{:.2f}") for value in (r.accuracy, r.test_accuracy))
        table.add_row(r.name, tried, f"{r.loss:.4f}", accuracy, held_out, f"{r.seconds:.2f}")
    return CommandReport({"strategies": results}, [table], functools.partial(plot.plot_strategies, results))
