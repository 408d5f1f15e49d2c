"""The commands that look into training: check-gradient, landscape, sweep. ``app`` has them beside those of cli."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from gpubatch import explore, layers, losses, plot
from gpubatch.backend import Array, Backend, get_backend
from gpubatch.cli import (
    DECAYS,
    OPTIMIZERS,
    BackendOption,
    DtypeOption,
    FolderArgument,
    JsonOption,
    LayersOption,
    OptimizerOption,
    app,
    integer,
    load,
    print_json,
    versions,
    widths,
)
from gpubatch.errors import ArgumentError, check_choice
from gpubatch.loader import Loader
from gpubatch.network import Network, mlp
from gpubatch.sizing import format_bytes
from gpubatch.train import TrainingState, fit

__all__ = ["app"]

LossOption = Annotated[str, typer.Option(help="softmax_cross_entropy or svm.")]
SeedOption = Annotated[int, typer.Option(help="Of split, first weights, order and random directions.")]
PlotOption = Annotated[Path | None, typer.Option("--plot", help="Draw it: a .png, .pdf or .svg.")]
ProgressOption = Annotated[bool, typer.Option(help="Show a bar on standard error, if that is a terminal.")]


# --- check-gradient ------------------------------------------------------------------------------------------------

# Every layer between two Dense layers; alone it would see no gradient from above, or have none to give.
CHECKED: dict[str, Callable[[int], layers.Layer]] = {
    "Dense": lambda n: layers.Dense(n, n),
    "BatchNorm": layers.BatchNorm,
    "ReLU": lambda n: layers.ReLU(),
    "LeakyReLU": lambda n: layers.LeakyReLU(0.1),
    "Sigmoid": lambda n: layers.Sigmoid(),
    "Tanh": lambda n: layers.Tanh(),
    "GELU": lambda n: layers.GELU(),
    "GELU tanh": lambda n: layers.GELU("tanh"),
    "Dropout": lambda n: layers.Dropout(0.5),
    "Step": lambda n: layers.Step(),
}


@app.command(
    "check-gradient",
    epilog="**Examples:** `gpubatch check-gradient` compares every layer and loss with central differences. "
    "`gpubatch check-gradient --directions 5 --backend cuda` is faster on a GPU: two evaluations for a direction.",
)
def check_gradient(
    batch_size: Annotated[int, typer.Option(min=2, help="Samples, drawn at random.")] = 20,
    features: Annotated[int, typer.Option(min=1, help="Of each sample, and of the hidden layers.")] = 8,
    h: Annotated[float, typer.Option(help="Step of the differences.")] = 1e-5,
    tolerance: Annotated[float, typer.Option(help="The largest relative error that is no error.")] = 1e-7,
    directions: Annotated[int, typer.Option(help="Compare along so many directions, not each element.")] = 0,
    seed: Annotated[int, typer.Option(help="Of data, first weights and directions.")] = 0,
    backend: BackendOption = "auto",
    as_json: JsonOption = False,
    progress: ProgressOption = True,
) -> None:
    """Compare the gradients of every layer and loss with differences, in float64; exit code 1 where one is wrong.

    The largest relative error over all parameters is shown for each pair, and how many elements lie on a kink.
    """
    where = get_backend(backend)
    found: dict[str, dict[str, dict[str, explore.GradientCheck]]] = {}
    with bar("gradients", progress) as show:
        for k, (name, make) in enumerate(CHECKED.items()):
            show(k, len(CHECKED))
            found[name] = {}
            for loss in losses.LOSSES:
                stack = [layers.Dense(features, features), make(features), layers.Dense(features, 4)]
                net = Network(stack, loss, l2=0.01, backend=where, dtype="float64", seed=seed)
                X, Y = _sample(net, batch_size, seed)
                found[name][loss] = explore.check_network(net, X, Y, h, tolerance, directions, seed=seed)
    checks = [check for row in found.values() for one in row.values() for check in one.values()]
    failed = sum(not check.ok for check in checks)
    if as_json:
        worst = max(check.max_relative_error for check in checks)
        print_json(ok=not failed, max_relative_error=worst, checks=found, device=where.device, versions=versions())
    else:
        _print_checks(found, checks, failed, where)
    if failed:
        raise typer.Exit(1)


def _sample(net: Network, rows: int, seed: int) -> tuple[Array, Array]:
    draw = np.random.default_rng(seed)
    X = net.backend.asarray(draw.standard_normal((rows, net.inputs)), net.dtype)
    if net.loss_name in ("softmax_cross_entropy", "svm"):
        return X, net.backend.asarray(draw.integers(0, net.outputs, rows))
    return X, net.backend.asarray(draw.random((rows, net.outputs)), net.dtype)


def _print_checks(found: Any, checks: list[explore.GradientCheck], failed: int, where: Backend) -> None:
    out = Console(highlight=False, soft_wrap=True)
    table = Table("layer", *losses.LOSSES, box=box.SIMPLE_HEAD, pad_edge=False)
    for name, row in found.items():
        table.add_row(name, *(_cell(list(one.values())) for one in row.values()))
    out.print(table)
    for name, row in found.items():
        for loss, one in row.items():
            for parameter, check in one.items():
                if not check.ok:
                    out.print(
                        f"WRONG: {name}, {loss}: {parameter}{list(check.worst_index or ())} is {check.analytic:.9g}, "
                        f"by differences {check.numerical:.9g}",
                        markup=False,
                    )
    kinks, compared = sum(len(check.kinks) for check in checks), sum(check.compared for check in checks)
    verdict = f"{failed} of {len(checks)} gradients are wrong" if failed else f"all {len(checks)} gradients are right"
    limit = max(check.tolerance for check in checks)
    out.print(f"{verdict} to {limit:g} relative; {compared:,} compared, {kinks} on a kink; {where.device}")


def _cell(checks: list[explore.GradientCheck]) -> str:
    kinks = sum(len(check.kinks) for check in checks)
    text = f"{max(check.max_relative_error for check in checks):.1e}"
    return text + (f", {kinks} kinks" if kinks else "") + ("" if all(check.ok for check in checks) else " WRONG")


# --- landscape -----------------------------------------------------------------------------------------------------


@app.command(
    epilog="**Examples:** `gpubatch landscape --plot landscape.png` draws the loss around a network that was trained "
    "on the bundled digits, with the path of the training. `gpubatch landscape --directions filter --dimensions 1 "
    "--plot slice.png` draws a curve along a random direction.",
)
def landscape(
    folder: FolderArgument = None,
    layers: LayersOption = "256",
    loss: LossOption = "softmax_cross_entropy",
    optimizer: OptimizerOption = "adam",
    lr: Annotated[float | None, typer.Option(help="Learning rate; by default one that suits the optimizer.")] = None,
    epochs: Annotated[int, typer.Option(min=0, help="Of training, before the loss is looked at.")] = 3,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples in a batch.")] = 128,
    samples: Annotated[int, typer.Option(min=1, help="Of the training set, on which the loss is evaluated.")] = 2000,
    dimensions: Annotated[int, typer.Option(min=1, max=2, help="1: a curve. 2: a plane.")] = 2,
    directions: Annotated[str, typer.Option(help="path (the training's main directions), random or filter.")] = "path",
    points: Annotated[int, typer.Option(min=2, help="Along each direction.")] = 51,
    span: Annotated[float, typer.Option(help="From -span to span; for path, in lengths of the path.")] = 1.0,
    seed: SeedOption = 0,
    backend: BackendOption = "auto",
    dtype: DtypeOption = "float32",
    plot_file: PlotOption = None,
    as_json: JsonOption = False,
    progress: ProgressOption = True,
) -> None:
    """Train a network, and evaluate the loss on a line or a plane through its parameters.

    path: the two directions in which the training moved most. random: normal numbers. filter: these, scaled to the
    norm of the weights into each unit.
    """
    if plot_file is not None:
        plot.check_plot_file(plot_file)
    check_choice("--directions", directions, ["path", "random", "filter"])
    if not (math.isfinite(span) and span > 0):
        raise ArgumentError(f"--span must be a number above 0, got {span:g}")
    data = Data(folder, layers, loss, seed, backend, dtype)
    net, X, Y = data.net, data.X, data.Y
    path = _train_and_watch(data, optimizer, lr, epochs, batch_size, dimensions, directions == "path", progress)
    axes = [np.linspace(-span, span, points)] * dimensions
    given = None
    if directions == "path":
        given = explore.principal_directions(path, dimensions)
        axes = _around(path, given, span, points)
    with bar("loss", progress) as show:
        found = explore.loss_slice(
            *(net, X[:samples], Y[:samples], axes[0], axes[1] if dimensions == 2 else None),
            directions=given,
            normalize="filter" if directions == "filter" else "none",
            seed=seed,
            progress=show,
        )
    at = found.project(path, path[-1])
    center = net.loss(X[:samples], Y[:samples])
    title = f"gpubatch landscape, {directions} directions, after {epochs} epochs of {optimizer}, "
    title += f"{min(samples, len(X)):,} samples\n{data.words}"
    if plot_file is not None:
        plot.plot_slice(found, plot_file, title, at if directions == "path" else None)
    if as_json:
        print_json(
            a=found.a,
            b=found.b,
            losses=found.losses,
            center=center,
            path=at,
            arguments={"directions": directions, "epochs": epochs, "optimizer": optimizer, "seed": seed},
            device=net.backend.device,
            versions=versions(),
        )
        return
    out = Console(highlight=False, soft_wrap=True)
    lowest = np.unravel_index(found.losses.argmin(), found.losses.shape)
    place = ", ".join(f"{name} = {axis[i]:.3g}" for name, axis, i in zip("ab", axes, lowest, strict=False))
    out.print(f"loss at the network {center:.4f}, lowest of {found.losses.size:,} points {found.losses.min():.4f}")
    out.print(f"  at {place}, highest {found.losses.max():.4g}")
    if plot_file is not None:
        out.print(f"drawn in {plot_file}")


def _train_and_watch(
    data: Data,
    optimizer: str,
    lr: float | None,
    epochs: int,
    batch_size: int,
    dimensions: int,
    wanted: bool,
    progress: bool,
) -> np.ndarray:
    """Train, and return the parameters along the way as rows, about 50 of them; the last is the network's."""
    make, usual = OPTIMIZERS[check_choice("--optimizer", optimizer, OPTIMIZERS)]
    if wanted and epochs == 0:
        raise ArgumentError("--directions path needs --epochs of at least 1, got 0: there is no path")
    net = data.net
    loader = Loader(data.X, data.Y, batch_size, seed=data.seed, backend=net.backend, dtype=net.dtype)
    steps = epochs * len(loader)
    if wanted and steps <= dimensions:
        raise ArgumentError(f"--directions path needs more than {dimensions} steps of training, got {steps}")
    opt = make(net.parameters, DECAYS["none"](usual if lr is None else lr, epochs))
    path = [net.backend.to_numpy(net.parameters.flat).copy()]
    every = max(1, steps // 50)

    class Watch:
        def on_step(self, state: TrainingState) -> None:
            show(state.step, steps)
            if state.step % every == 0 or state.step == steps:
                path.append(net.backend.to_numpy(net.parameters.flat).copy())

    with bar("training", progress) as show:
        if epochs:
            fit(net, loader, opt, epochs, callbacks=[Watch()], progress=False, max_skipped=0)
    return np.stack(path)


def _around(path: np.ndarray, directions: list[np.ndarray], span: float, points: int) -> list[np.ndarray]:
    """Grids that hold the path, with a margin of ``span`` times half its extent on each side."""
    basis = np.stack(directions, axis=1)
    at = np.linalg.lstsq(basis, (path - path[-1]).astype(np.float64).T, rcond=None)[0]
    return [np.linspace(c.min() - span * np.ptp(c) / 2, c.max() + span * np.ptp(c) / 2, points) for c in at]


# --- sweep ---------------------------------------------------------------------------------------------------------


@app.command(
    epilog="**Examples:** `gpubatch sweep --step-size --plot steps.png`; `gpubatch sweep --batch-size --target 0.3`; "
    "`gpubatch sweep --optimizer`; `gpubatch sweep --strategy --layers '' --loss svm` is the comparison of CS231n.",
)
def sweep(
    folder: FolderArgument = None,
    step_size: Annotated[bool, typer.Option("--step-size", help="Loss after one step; a range test.")] = False,
    batch_size: Annotated[bool, typer.Option("--batch-size", help="Times and memory by batch size.")] = False,
    optimizer: Annotated[bool, typer.Option("--optimizer", help="Each at its own best learning rate.")] = False,
    strategy: Annotated[bool, typer.Option("--strategy", help="Random, local search, gradient descent.")] = False,
    layers: LayersOption = "128",
    loss: LossOption = "softmax_cross_entropy",
    samples: Annotated[int | None, typer.Option(min=2, help="Of the training set; by default all.")] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Of every run; by default it depends.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Samples in a batch, where that is not what varies.")] = 128,
    sizes: Annotated[str, typer.Option(help="Batch sizes to try, by comma; by default 16 to 1024.")] = "",
    target: Annotated[float, typer.Option(help="Loss that the runs of --batch-size are to reach.")] = 0.3,
    lr: Annotated[float | None, typer.Option(help="Learning rate of --batch-size (of size 128) or --strategy.")] = None,
    trials: Annotated[int, typer.Option(min=1, help="Of each search of --strategy.")] = 1000,
    scale: Annotated[float, typer.Option(help="Standard deviation of what the searches draw.")] = 0.01,
    seed: SeedOption = 0,
    backend: BackendOption = "auto",
    dtype: DtypeOption = "float32",
    plot_file: PlotOption = None,
    as_json: JsonOption = False,
    progress: ProgressOption = True,
) -> None:
    """Train again and again, with one thing different each time.

    With --batch-size Adam's learning rate grows with the square root of the batch size (Malladi et al. 2022).
    """
    chosen = {"--step-size": step_size, "--batch-size": batch_size, "--optimizer": optimizer, "--strategy": strategy}
    if sum(chosen.values()) != 1:
        raise ArgumentError(f"sweep needs one of {', '.join(chosen)}, got {sum(chosen.values())} of them")
    if plot_file is not None:
        plot.check_plot_file(plot_file)
    data = Data(folder, layers, loss, seed, backend, dtype, samples)
    option = next(name for name, wanted in chosen.items() if wanted)
    title = f"gpubatch sweep {option}, {len(data.X):,} samples\n{data.words}"
    with bar("sweep", progress) as show:
        if step_size:
            report = _sweep_steps(data, batch, show)
        elif batch_size:
            tried = [integer("--sizes", text) for text in sizes.split(",") if text] or None
            report = _sweep_batches(data, tried, target, 1e-3 if lr is None else lr, epochs or 10, show)
        elif optimizer:
            report = _sweep_optimizers(data, epochs or 2, batch, show)
        else:
            report = _sweep_strategies(data, trials, scale, lr, epochs or 10, batch, show)
    if plot_file is not None:
        report.draw(plot_file, title)
    if as_json:
        print_json(**report.values, network=data.words, device=data.net.backend.device, versions=versions())
        return
    out = Console(highlight=False, soft_wrap=True)
    out.print(title)
    out.print(report.table)
    for line in report.lines:
        out.print(line)
    if plot_file is not None:
        out.print(f"drawn in {plot_file}")


class Report(NamedTuple):
    """What a sweep found: for machines, for people, and for the eye."""

    values: Mapping[str, Any]
    table: Table
    lines: list[str]
    draw: Callable[[Path, str], None]


def _sweep_steps(data: Data, batch: int, show: explore.Progress) -> Report:
    one = explore.step_size_sweep(data.net, data.X, data.Y, [float(f"1e{k}") for k in range(-10, 3)])
    test = explore.learning_rate_range_test(
        data.net, data.X, data.Y, batch_size=min(batch, len(data.X)), seed=data.seed, progress=show
    )
    table = _table("step size", "loss after one step", "change")
    for size, loss in zip(one.step_sizes, one.losses, strict=True):
        table.add_row(f"{size:g}", f"{loss:.6g}", f"{loss - one.start:+.2e}")
    advice = "no suggestion" if test.suggestion is None else f"suggested learning rate for SGD: {test.suggestion:g}"
    lines = [f"one step on the whole set: {one.reason}", f"{advice}: {test.reason}"]
    return Report(
        {"step_sizes": one, "range_test": test}, table, lines, lambda p, t: plot.plot_step_sizes(one, test, p, t)
    )


def _sweep_batches(
    data: Data, sizes: list[int] | None, target: float, lr: float, epochs: int, show: explore.Progress
) -> Report:
    trials = explore.batch_size_sweep(
        *(data.net, data.X, data.Y, sizes, target),
        lr=lambda n: lr * math.sqrt(n / 128),
        epochs=epochs,
        seed=data.seed,
        progress=show,
    )
    table = _table("batch size", "µs/sample", "s/epoch", f"epochs to {target:g}", f"s to {target:g}", "memory", "loss")
    for t in trials:
        table.add_row(
            *(f"{t.batch_size}", _number(t.seconds_per_sample, 1e6, "{:.1f}"), _number(t.seconds_per_epoch)),
            *(_number(t.epochs_to_target, 1, "{:.0f}"), _number(t.seconds_to_target)),
            *(format_bytes(t.memory), _number(t.loss, 1, "{:.4f}")),
        )
    reached = [t for t in trials if t.seconds_to_target is not None]
    fastest = min(reached, key=lambda t: t.seconds_to_target or math.inf, default=None)
    line = f"no batch size reached the loss {target:g} in {epochs} epochs"
    if fastest is not None:
        line = f"batch size {fastest.batch_size} was the first at the loss {target:g}"
        line += f", after {fastest.seconds_to_target:.2f} s"
    return Report(
        {"batch_sizes": trials, "target": target},
        table,
        [line],
        lambda p, t: plot.plot_batch_sizes(trials, target, p, t),
    )


def _sweep_optimizers(data: Data, epochs: int, batch: int, show: explore.Progress) -> Report:
    trials = explore.optimizer_sweep(
        data.net, data.X, data.Y, epochs=epochs, batch_size=min(batch, len(data.X)), seed=data.seed, progress=show
    )
    table = _table("learning rate", *(t.name for t in trials))
    for k, rate in enumerate(trials[0].rates):
        cells = (f"{t.losses[k]:.4g}" + (" *" if rate == t.best_lr else "") for t in trials)
        table.add_row(f"{rate:g}", *cells)
    lines = [f"loss of the training set after {epochs} epochs, * the lowest of each optimizer:"]
    for t in sorted(trials, key=lambda t: t.loss):
        edge = ", at the edge of the grid: a better one may lie outside" if t.at_edge else ""
        accuracy = _number(t.accuracy, 100, "{:.2f}")
        lines.append(f"  {t.name} {t.loss:.4f}, accuracy {accuracy} %, with learning rate {t.best_lr:g}{edge}")
    return Report({"optimizers": trials}, table, lines, lambda p, t: plot.plot_optimizers(trials, p, t))


def _sweep_strategies(
    data: Data, trials: int, scale: float, lr: float | None, epochs: int, batch: int, show: explore.Progress
) -> Report:
    rate = (0.01 if data.net.loss_name == "svm" else 0.1) if lr is None else lr
    results = explore.compare_strategies(
        *(data.net, data.X, data.Y, data.test, trials, scale),
        lr=rate,
        epochs=epochs,
        batch_size=min(batch, len(data.X)),
        seed=data.seed,
        progress=show,
    )
    table = _table("strategy", "tried", "loss", "accuracy (%)", "on test (%)", "seconds")
    for r, tried in zip(results, (f"{trials} trials", f"{trials} trials", f"{epochs} epochs"), strict=True):
        accuracy, held_out = (_number(value, 100, "{:.2f}") for value in (r.accuracy, r.test_accuracy))
        table.add_row(r.name, tried, f"{r.loss:.4f}", accuracy, held_out, f"{r.seconds:.2f}")
    return Report({"strategies": results}, table, [], lambda p, t: plot.plot_strategies(results, p, t))


# --- pieces --------------------------------------------------------------------------------------------------------


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


def _table(*columns: str) -> Table:
    return Table(*columns, box=box.SIMPLE_HEAD, pad_edge=False)


def _number(value: float | None, factor: float = 1, form: str = "{:.3f}") -> str:
    return "–" if value is None else form.format(factor * value)
