"""``gpubatch landscape``."""

from __future__ import annotations

import functools
import math
from typing import Annotated

import numpy as np
import typer

from gpubatch import explore, plot
from gpubatch.cli import options
from gpubatch.cli.data import DataOptions, Task, used
from gpubatch.cli.options import BatchOptions, NetworkOptions, OptimizerOptions, TrainingOptions, spread
from gpubatch.cli.shared import CommandReport, app, arguments_of, examples
from gpubatch.errors import ArgumentError, check_choice, check_int
from gpubatch.train import TrainingState, bar, fit, short_runs


@app.command(
    epilog=examples(
        a_plane="gpubatch landscape --plot landscape.png",
        a_curve="gpubatch landscape --directions filter --dimensions 1 --plot slice.png",
    ),
)
@spread(layers="256", activation="relu", batch_norm=False, dropout=0.0, decay="none", batch_size="128", epochs=3)
def landscape(
    context: typer.Context,
    data: DataOptions,
    network: NetworkOptions,
    optimizer: OptimizerOptions,
    batches: BatchOptions,
    training: TrainingOptions,
    evaluated: Annotated[int, typer.Option(min=1, help="Training samples on which the loss is evaluated.")] = 2000,
    dimensions: Annotated[int, typer.Option(min=1, max=2, help="1: a curve. 2: a plane.")] = 2,
    directions: Annotated[str, typer.Option(help="path (the training's main directions), random or filter.")] = "path",
    points: Annotated[int, typer.Option(min=2, help="Points along each direction.")] = 51,
    span: Annotated[float, typer.Option(help="From -span to span; for path, in lengths of the path.")] = 1.0,
    plot_file: options.PlotFile = None,
    as_json: options.AsJson = False,
    progress: options.Progress = True,
) -> None:
    """Train a network, and evaluate the loss on a line or a plane through its parameters.

    path: the two directions in which the training moved most. random: normal numbers. filter: these, scaled to the
    norm of the weights into each unit. Epochs of 0 leave the network untrained.
    """
    if plot_file is not None:
        plot.check_plot_file(plot_file)
    check_choice("--directions", directions, ["path", "random", "filter"])
    if not (math.isfinite(span) and span > 0):
        raise ArgumentError(f"--span must be a number above 0, got {span:g}")
    task = Task.of(data, network)
    net, some = task.net, slice(evaluated)
    X, Y, weight = task.X[some], task.Y[some], None if task.weight is None else task.weight[some]
    path = _train_and_watch(task, optimizer, training, batches, dimensions, directions == "path", progress)
    axes = [np.linspace(-span, span, points)] * dimensions
    given = None
    if directions == "path":
        given = explore.principal_directions(path, dimensions)
        axes = _around(path, given, span, points)
    with bar("loss", progress) as show:
        found = explore.loss_slice(
            *(net, X, Y, axes[0], axes[1] if dimensions == 2 else None),
            directions=given,
            normalize="filter" if directions == "filter" else "none",
            seed=data.seed,
            progress=show,
            weight=weight,
        )
    at = found.project(path, path[-1])
    center = net.loss(X, Y, weight=weight)
    title = f"gpubatch landscape, {directions} directions, after {training.epochs} epochs of {optimizer.optimizer}, "
    title += f"{len(X):,} samples\n{task.words}"
    lowest = np.unravel_index(found.losses.argmin(), found.losses.shape)
    place = ", ".join(f"{name} = {axis[i]:.3g}" for name, axis, i in zip("ab", axes, lowest, strict=False))
    report = CommandReport(
        {
            "a": found.a,
            "b": found.b,
            "losses": found.losses,
            "center": center,
            "path": at,
            "arguments": arguments_of(context, **used(net, network, task.data.task), lr=optimizer.rate),
            "device": net.backend.device,
        },
        [
            f"loss at the network {center:.4f}, lowest of {found.losses.size:,} points {found.losses.min():.4f}",
            f"  at {place}, highest {found.losses.max():.4g}",
        ],
        functools.partial(plot.plot_slice, found, trail=at if directions == "path" else None),
    )
    report.print(as_json, title, plot_file)


def _train_and_watch(
    task: Task,
    optimizer: OptimizerOptions,
    training: TrainingOptions,
    batches: BatchOptions,
    dimensions: int,
    wanted: bool,
    progress: bool,
) -> np.ndarray:
    """Train, and return the parameters along the way as rows, about 50 of them; the last is the network's."""
    epochs = check_int("--epochs", training.epochs, 0)
    if wanted and epochs == 0:
        raise ArgumentError("--directions path needs --epochs of at least 1, got 0: there is no path")
    net, loader = task.net, task.loader(batches)
    steps = epochs * len(loader)
    if wanted and steps <= dimensions:
        raise ArgumentError(f"--directions path needs more than {dimensions} steps of training, got {steps}")
    opt = optimizer.make(net, max(1, epochs))
    path = [net.backend.to_numpy(net.parameters.flat).copy()]
    every = max(1, steps // 50)

    class Watch:
        def on_step(self, state: TrainingState) -> None:
            show(state.step, steps)
            if state.step % every == 0 or state.step == steps:
                path.append(net.backend.to_numpy(net.parameters.flat).copy())

    with bar("training", progress) as show:
        if epochs:
            with short_runs():
                fit(
                    *(net, loader, opt, epochs, task.test if training.callbacks() else None),
                    callbacks=[*training.callbacks(), Watch()],
                    progress=False,
                    max_skipped=0,
                    execution=training.execution,
                )
    return np.stack(path)


def _around(path: np.ndarray, directions: list[np.ndarray], span: float, points: int) -> list[np.ndarray]:
    """Grids that hold the path, with a margin of ``span`` times half its extent on each side."""
    basis = np.stack(directions, axis=1)
    at = np.linalg.lstsq(basis, (path - path[-1]).astype(np.float64).T, rcond=None)[0]
    return [np.linspace(c.min() - span * np.ptp(c) / 2, c.max() + span * np.ptp(c) / 2, points) for c in at]
