"""``gpubatch sweep``."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from rich.console import Console
from rich.table import Table

from gpubatch import explore, plot
from gpubatch.cli import options
from gpubatch.cli.data import Task
from gpubatch.cli.shared import app, number_or_dash, print_json, table_of, versions
from gpubatch.cli.strategies import compare_strategies
from gpubatch.errors import ArgumentError
from gpubatch.sizing import format_bytes
from gpubatch.train import bar

__all__ = ["sweep"]


@app.command(
    epilog="**Examples:** `gpubatch sweep --step-size --plot steps.png`; `gpubatch sweep --batch-size --target 0.3`; "
    "`gpubatch sweep --optimizer`; `gpubatch sweep --strategy --layers '' --loss svm` is the comparison of CS231n.",
)
def sweep(
    folder: options.Folder = None,
    step_size: Annotated[bool, typer.Option("--step-size", help="Loss after one step; a range test.")] = False,
    batch_size: Annotated[bool, typer.Option("--batch-size", help="Times and memory by batch size.")] = False,
    optimizer: Annotated[bool, typer.Option("--optimizer", help="Each at its own best learning rate.")] = False,
    strategy: Annotated[bool, typer.Option("--strategy", help="Random, local search, gradient descent.")] = False,
    layers: options.HiddenLayers = "128",
    loss: options.LossName = "softmax_cross_entropy",
    label_smoothing: options.LabelSmoothing = 0.0,
    samples: Annotated[int | None, typer.Option(min=2, help="Of the training set; by default all.")] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Of every run; by default it depends.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Samples in a batch, where that is not what varies.")] = 128,
    sizes: Annotated[str, typer.Option(help="Batch sizes to try, by comma; by default 16 to 1024.")] = "",
    target: Annotated[float, typer.Option(help="Loss that the runs of --batch-size are to reach.")] = 0.3,
    lr: Annotated[
        float | None, typer.Option(*options.LR, help="Learning rate of --batch-size (of size 128) or --strategy.")
    ] = None,
    trials: Annotated[int, typer.Option(min=1, help="Of each search of --strategy.")] = 1000,
    scale: Annotated[float, typer.Option(help="Standard deviation of what the searches draw.")] = 0.01,
    seed: options.Seed = 0,
    backend: options.BackendName = "auto",
    dtype: options.DtypeName = "float32",
    plot_file: options.PlotFile = None,
    as_json: options.AsJson = False,
    progress: options.Progress = True,
) -> None:
    """Train again and again, with one thing different each time.

    With --batch-size Adam's learning rate grows with the square root of the batch size (Malladi et al. 2022).
    """
    chosen = {"--step-size": step_size, "--batch-size": batch_size, "--optimizer": optimizer, "--strategy": strategy}
    if sum(chosen.values()) != 1:
        raise ArgumentError(f"sweep needs one of {', '.join(chosen)}, got {sum(chosen.values())} of them")
    option = next(name for name, wanted in chosen.items() if wanted)
    value = "" if folder is None or folder.exists() else str(folder)
    if optimizer and value in options.OPTIMIZERS:
        raise ArgumentError(f"--optimizer of sweep takes no value, got {value!r}: it compares several optimizers")
    if batch_size and value.isdecimal():
        raise ArgumentError(
            f"--batch-size of sweep takes no value, got {value}: give --sizes {value}, or several by comma"
        )
    if plot_file is not None:
        plot.check_plot_file(plot_file)
    task = Task.of(folder, layers, loss, seed, backend, dtype, samples, label_smoothing)
    title = f"gpubatch sweep {option}, {len(task.X):,} samples\n{task.words}"
    with bar("sweep", progress) as show:
        if step_size:
            report = _sweep_steps(task, batch, show)
        elif batch_size:
            tried = [options.integer("--sizes", text) for text in sizes.split(",") if text] or None
            report = _sweep_batches(task, tried, target, 1e-3 if lr is None else lr, epochs or 10, show)
        elif optimizer:
            report = _sweep_optimizers(task, epochs or 2, batch, show)
        else:
            report = _sweep_strategies(task, trials, scale, lr, epochs or 10, batch, show)
    if plot_file is not None:
        report.draw(plot_file, title)
    if as_json:
        print_json(**report.values, network=task.words, device=task.net.backend.device, versions=versions())
        return
    out = Console(highlight=False, soft_wrap=True)
    out.print(title)
    out.print(report.table)
    for line in report.lines:
        out.print(line)
    if plot_file is not None:
        out.print(f"drawn in {plot_file}")


class SweepReport(NamedTuple):
    """What a sweep found: for machines, for people, and for the eye."""

    values: Mapping[str, Any]
    table: Table
    lines: list[str]
    draw: Callable[[Path, str], None]


def _sweep_steps(task: Task, batch: int, show: explore.Progress) -> SweepReport:
    one = explore.step_size_sweep(task.net, task.X, task.Y, [float(f"1e{k}") for k in range(-10, 3)])
    test = explore.learning_rate_range_test(
        task.net, task.X, task.Y, batch_size=min(batch, len(task.X)), seed=task.seed, progress=show
    )
    table = table_of("step size", "loss after one step", "change")
    for size, loss in zip(one.step_sizes, one.losses, strict=True):
        table.add_row(f"{size:g}", f"{loss:.6g}", f"{loss - one.start:+.2e}")
    advice = "no suggestion" if test.suggestion is None else f"suggested learning rate for SGD: {test.suggestion:g}"
    lines = [f"one step on the whole set: {one.reason}", f"{advice}: {test.reason}"]
    return SweepReport(
        {"step_sizes": one, "range_test": test}, table, lines, lambda p, t: plot.plot_step_sizes(one, test, p, t)
    )


def _sweep_batches(
    task: Task, sizes: list[int] | None, target: float, lr: float, epochs: int, show: explore.Progress
) -> SweepReport:
    trials = explore.batch_size_sweep(
        *(task.net, task.X, task.Y, sizes, target),
        lr=lambda n: lr * math.sqrt(n / 128),
        epochs=epochs,
        seed=task.seed,
        progress=show,
    )
    table = table_of(
        "batch size", "µs/sample", "s/epoch", f"epochs to {target:g}", f"s to {target:g}", "memory", "loss"
    )
    for t in trials:
        table.add_row(
            *(
                f"{t.batch_size}",
                number_or_dash(t.seconds_per_sample, 1e6, "{:.1f}"),
                number_or_dash(t.seconds_per_epoch),
            ),
            *(number_or_dash(t.epochs_to_target, 1, "{:.0f}"), number_or_dash(t.seconds_to_target)),
            *(format_bytes(t.memory), number_or_dash(t.loss, 1, "{:.4f}")),
        )
    reached = [t for t in trials if t.seconds_to_target is not None]
    fastest = min(reached, key=lambda t: t.seconds_to_target or math.inf, default=None)
    line = f"no batch size reached the loss {target:g} in {epochs} epochs"
    if fastest is not None:
        line = f"batch size {fastest.batch_size} was the first at the loss {target:g}"
        line += f", after {fastest.seconds_to_target:.2f} s"
    return SweepReport(
        {"batch_sizes": trials, "target": target},
        table,
        [line],
        lambda p, t: plot.plot_batch_sizes(trials, target, p, t),
    )


def _sweep_optimizers(task: Task, epochs: int, batch: int, show: explore.Progress) -> SweepReport:
    trials = explore.optimizer_sweep(
        task.net, task.X, task.Y, epochs=epochs, batch_size=min(batch, len(task.X)), seed=task.seed, progress=show
    )
    table = table_of("learning rate", *(t.name for t in trials))
    for k, rate in enumerate(trials[0].rates):
        cells = (f"{t.losses[k]:.4g}" + (" *" if rate == t.best_lr else "") for t in trials)
        table.add_row(f"{rate:g}", *cells)
    lines = [f"loss of the training set after {epochs} epochs, * the lowest of each optimizer:"]
    for t in sorted(trials, key=lambda t: t.loss):
        edge = ", at the edge of the grid: a better one may lie outside" if t.at_edge else ""
        accuracy = number_or_dash(t.accuracy, 100, "{:.2f}")
        lines.append(f"  {t.name} {t.loss:.4f}, accuracy {accuracy} %, with learning rate {t.best_lr:g}{edge}")
    return SweepReport({"optimizers": trials}, table, lines, lambda p, t: plot.plot_optimizers(trials, p, t))


def _sweep_strategies(
    task: Task, trials: int, scale: float, lr: float | None, epochs: int, batch: int, show: explore.Progress
) -> SweepReport:
    rate = (0.01 if task.net.loss_name == "svm" else 0.1) if lr is None else lr
    results = compare_strategies(task, trials, scale, rate, epochs, min(batch, len(task.X)), show)
    table = table_of("strategy", "tried", "loss", "accuracy (%)", "on test (%)", "seconds")
    for r, tried in zip(results, (f"{trials} trials", f"{trials} trials", f"{epochs} epochs"), strict=True):
        accuracy, held_out = (number_or_dash(value, 100, "{:.2f}") for value in (r.accuracy, r.test_accuracy))
        table.add_row(r.name, tried, f"{r.loss:.4f}", accuracy, held_out, f"{r.seconds:.2f}")
    return SweepReport({"strategies": results}, table, [], lambda p, t: plot.plot_strategies(results, p, t))
