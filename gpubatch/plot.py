"""Pictures of a run. The only module that imports Matplotlib, and only when it draws.

Every function returns Matplotlib's figure, which a notebook shows, and takes these arguments:

path: a file to save it in, that ends in .png, .pdf or .svg; by default none.
title: above the picture.
axes: axes of your own to draw in, as many as the picture has panels, from above; by default a new figure's.
"""

from __future__ import annotations

import functools
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from gpubatch import explore
from gpubatch.errors import ArgumentError, DTypeError, needed
from gpubatch.sizing import BatchPlan, ByPart, format_bytes
from gpubatch.train import History

__all__ = [
    "check_plot_file",
    "plot_batch_sizes",
    "plot_confusion",
    "plot_memory",
    "plot_optimizers",
    "plot_slice",
    "plot_step_sizes",
    "plot_strategies",
    "plot_training",
]

RAW, SMOOTH, HELD_OUT, ACCURACY = "#c3cbd6", "#1f4e9e", "#d1603d", "#2b7a4b"


def check_plot_file(path: str | Path) -> None:
    """Raise unless a picture can be drawn to ``path``, before any work is done: its ending, its folder, Matplotlib."""
    if Path(path).suffix not in (".png", ".pdf", ".svg"):
        raise ArgumentError(f"the plot file must end in .png, .pdf or .svg, got {str(path)!r}")
    if not Path(os.path.expanduser(path)).absolute().parent.is_dir():
        raise ArgumentError(f"the folder of the plot file must exist, got {str(path)!r}")
    needed("matplotlib", "a picture", "plot")


def plot_training(history: History, path: str | Path | None = None, title: str = "", axes: Any = None) -> Any:
    """Draw the cost of every step, raw and smoothed, with the validation cost; accuracy by epoch; the learning rate.

    history: a run, of at least one step

    path, title, axes: as for every picture, see :mod:`gpubatch.plot`.
    """
    if not hasattr(history, "step_loss"):
        raise DTypeError(f"history must be a gpubatch.History, as fit returns, got a {type(history).__name__}")
    if not history.step_loss:
        raise ArgumentError("history must have at least one step to be drawn, got none")
    with_accuracy = bool(history.validation_accuracy)
    heights = [3.3] + ([2.2] if with_accuracy else []) + ([1.5] if history.step_lr else [])
    figure, (cost, *others) = _panels(path, title, heights, axes)

    # The x axis counts steps everywhere; an epoch ends at these.
    steps = np.arange(1, len(history.step_loss) + 1)
    epochs = len(history.loss)
    ends = np.linspace(0, len(steps), epochs + 1)[1:]
    _draw_cost(cost, history, steps, ends)
    if with_accuracy:
        accuracy = others[0]
        percent = 100 * np.array(history.validation_accuracy)
        accuracy.plot(ends, percent, "o-", color=ACCURACY, markersize=4, clip_on=False)  # the last is on the edge
        accuracy.annotate(
            f"{percent[-1]:.2f} %",
            (ends[-1], percent[-1]),
            (0, -14),
            textcoords="offset points",
            ha="right",
            fontsize=9,
        )
        accuracy.set_ylabel("validation\naccuracy (%)")
    if history.step_lr:
        rate = others[-1]
        rate.plot(steps, history.step_lr, color=SMOOTH)
        rate.set(ylabel="learning rate", ylim=(0, None))
    last = (cost, *others)[-1]
    last.set_xlabel(f"step (mini-batches of {history.batch_size}; {epochs} epochs of {len(steps) // max(epochs, 1)})")
    for axes in (cost, *others):
        axes.set_xlim(0, len(steps))
    return _saved(figure, path)


def _draw_cost(axes: Any, history: History, steps: np.ndarray, ends: np.ndarray) -> None:
    beta = 0.9 if len(steps) < 1000 else 0.98
    axes.plot(steps, history.step_loss, color=RAW, linewidth=0.8, label="mini-batch cost")
    axes.plot(steps, history.smoothed(beta), color=SMOOTH, label=f"smoothed (moving average, β = {beta})")
    if history.validation_loss:
        axes.plot(
            ends, history.validation_loss, "o-", color=HELD_OUT, markersize=4, label="validation cost", clip_on=False
        )
    lowest = min([*history.step_loss, *history.validation_loss])
    if lowest > 0:
        axes.set_yscale("log")
    axes.set_ylabel("cost")
    axes.legend(frameon=False, fontsize=9)


# --- looking into training -----------------------------------------------------------------------------------------


def plot_slice(
    found: explore.LossSlice,
    path: str | Path | None = None,
    title: str = "",
    trail: np.ndarray | None = None,
    axes: Any = None,
) -> Any:
    """Draw a curve, or contours on a logarithmic scale; ``trail`` is the path of training in the slice."""
    figure, (axes,) = _panels(path, title, [5], axes)
    if found.b is None:
        axes.plot(found.a, _finite(found.losses), color=SMOOTH)
        axes.axvline(0, color=HELD_OUT, linewidth=1, linestyle="--", label="the network")
        axes.set(xlabel="a, in lengths of the direction W1", ylabel="loss L(W + a W1)")
        axes.legend(frameon=False)
        return _saved(figure, path)
    values = _finite(found.losses).T
    low, high = np.nanmin(values), np.nanmax(values)
    logarithmic = low > 0 and high > 3 * low
    levels = np.geomspace(low, high, 25) if logarithmic else np.linspace(low, high, 25)
    # A little wider than the values, so that rounding leaves none out.
    levels[[0, -1]] += np.array([-1e-6, 1e-6]) * max(abs(low), abs(high))
    # Contours are placed by the logarithm and labelled by the loss, since a colour scale of its own is hard to read.
    scale = np.log10 if logarithmic else np.asarray
    filled = axes.contourf(found.a, found.b, scale(values), levels=scale(levels), cmap="viridis")
    axes.contour(found.a, found.b, scale(values), levels=scale(levels), colors="white", linewidths=0.3, alpha=0.6)
    colours = figure.colorbar(filled, ax=axes)
    ticks = levels[:: max(1, len(levels) // 8)]
    colours.set_ticks(scale(ticks), labels=[f"{tick:.3g}" for tick in ticks])
    colours.set_label("loss L(W + a W1 + b W2)")
    if trail is not None:
        axes.plot(trail[:, 0], trail[:, 1], ".-", color="white", linewidth=1, markersize=4, label="path of training")
        axes.plot(*trail[0], "s", color="white", markersize=7, markeredgecolor="black", label="start")
    axes.plot(0, 0, "*", color=HELD_OUT, markersize=14, markeredgecolor="white", label="the network")
    axes.legend(loc="upper right", fontsize=9, facecolor="#404040", labelcolor="white", framealpha=0.7)
    axes.set(xlabel="a, in lengths of the direction W1", xlim=(found.a.min(), found.a.max()))
    axes.set(ylabel="b, in lengths of the direction W2", ylim=(found.b.min(), found.b.max()))
    axes.grid(visible=False)
    return _saved(figure, path)


def plot_step_sizes(
    one: explore.StepSizeSweep,
    test: explore.RangeTest,
    path: str | Path | None = None,
    title: str = "",
    axes: Any = None,
) -> Any:
    """Draw the loss after one step by its size, and the cost while the learning rate rises, with the suggestion."""
    figure, (step, run) = _panels(path, title, [3, 3], axes)
    # Beyond these limits it explodes, and nothing else could be seen.
    low = min(one.start, *one.losses)
    limit = one.start + 2 * (one.start - low) if one.best is not None else 2 * one.start
    step.axhline(one.start, color=RAW, linestyle="--", label=f"before the step: {one.start:.4g}")
    step.plot(one.step_sizes, _finite(one.losses), "o-", color=SMOOTH, label="after one step")
    if off := [size for size, loss in zip(one.step_sizes, one.losses, strict=True) if not loss <= limit]:
        step.plot(
            off, [limit] * len(off), "^", color=HELD_OUT, clip_on=False, label=f"above {limit:.3g}, off the scale"
        )
    step.set_ylim(low - 0.1 * (limit - low), limit)
    if one.best is not None:
        step.plot(one.best, min(one.losses), "*", color=HELD_OUT, markersize=13, label=f"lowest, at {one.best:g}")
    step.set(xlabel="step size (one step of gradient descent on the whole set)", ylabel="loss")
    run.plot(test.rates, test.losses, color=RAW, linewidth=0.8, label="mini-batch cost")
    run.plot(test.rates, test.smoothed, color=SMOOTH, label="smoothed")
    if test.suggestion is not None:
        run.axvline(test.suggestion, color=HELD_OUT, linestyle="--", label=f"suggested: {test.suggestion:g}")
    run.set(xlabel="learning rate (one mini-batch step of SGD at each, rising)", ylabel="cost")
    run.set_ylim(0, 2 * test.losses[0])
    for axes in (step, run):
        axes.set_xscale("log")
        axes.legend(frameon=False, fontsize=9)
    return _saved(figure, path)


def plot_batch_sizes(
    trials: list[explore.BatchSizeTrial],
    target: float,
    path: str | Path | None = None,
    title: str = "",
    axes: Any = None,
) -> Any:
    """Draw the time of a sample, and time and epochs to the target, by batch size; powers of two are filled."""
    figure, (each, whole, count) = _panels(path, title, [3, 3, 2], axes)
    panels: list[tuple[Any, str, str]] = [
        (each, "seconds_per_sample", "time per sample (µs)"),
        (whole, "seconds_to_target", f"time to loss {target:g} (s)"),
        (count, "epochs_to_target", f"epochs to {target:g}"),
    ]
    sizes = [t.batch_size for t in trials]
    ticks = [n for n in sizes if n & (n - 1) == 0]
    for axes, name, words in panels:
        factor = 1e6 if name == "seconds_per_sample" else 1
        at = [(t.batch_size, factor * getattr(t, name)) for t in trials if getattr(t, name) is not None]
        if at:
            axes.plot(*zip(*at, strict=True), color=SMOOTH, linewidth=1)
        else:
            axes.text(0.5, 0.5, "not reached", transform=axes.transAxes, ha="center")
        for power, face, label in ((True, SMOOTH, "powers of two"), (False, "white", "sizes between")):
            some = [(n, value) for n, value in at if (n & (n - 1) == 0) is power]
            if some:
                axes.plot(*zip(*some, strict=True), "o", color=SMOOTH, markerfacecolor=face, label=label)
        axes.set_ylabel(words)
        if axes is count:
            axes.set_ylim(bottom=0)
        elif at:
            _logarithmic(axes, "y")
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, map(str, ticks))
        axes.set_xlim(min(sizes) / 1.2, max(sizes) * 1.2)
    each.legend(frameon=False, fontsize=9)
    count.set_xlabel("batch size (samples)")
    return _saved(figure, path)


def plot_optimizers(
    trials: list[explore.OptimizerTrial], path: str | Path | None = None, title: str = "", axes: Any = None
) -> Any:
    """Draw the smoothed cost of each optimizer at its best rate, and the loss at the end by rate."""
    figure, (cost, rate) = _panels(path, title, [3, 3], axes)
    for trial, color in zip(trials, _colors(len(trials)), strict=True):
        smoothed = trial.history.smoothed(0.95)
        label = f"{trial.name}, learning rate {trial.best_lr:g}"
        cost.plot(np.arange(1, len(smoothed) + 1), smoothed, color=color, label=label)
        rate.plot(trial.rates, _finite(trial.losses), "o-", color=color, markersize=4, label=trial.name)
        rate.plot(trial.best_lr, trial.loss, "*", color=color, markersize=13, markeredgecolor="white")
    cost.set(xlabel="step (mini-batches)", ylabel="cost, smoothed (β = 0.95)")
    rate.set(xlabel="learning rate (the best of each has a star)", xscale="log", ylabel="loss at the end")
    for axes in (cost, rate):
        _logarithmic(axes, "y")
        axes.legend(frameon=False, fontsize=9)
    return _saved(figure, path)


class Strategy(Protocol):
    """A strategy of learning as it is drawn; ``history`` has its falling loss."""

    name: str
    test_accuracy: float | None
    seconds: float
    history: tuple[float, ...]


def plot_strategies(
    results: Sequence[Strategy], path: str | Path | None = None, title: str = "", axes: Any = None
) -> Any:
    """Draw the accuracy that each strategy reached, and how its loss fell."""
    figure, (reached, falls) = _panels(path, title, [2, 3], axes)
    colors = _colors(len(results))
    for k, (result, color) in enumerate(zip(results, colors, strict=True)):
        percent = 100 * (result.test_accuracy or 0.0)
        reached.barh(k, percent, color=color)
        inside = percent > 75  # beside a longer bar there is no room
        reached.annotate(
            f"{percent:.1f} %, {result.seconds:.1f} s",
            (percent, k),
            (-4 if inside else 4, 0),
            textcoords="offset points",
            va="center",
            ha="right" if inside else "left",
            color="white" if inside else "black",
        )
        done = np.arange(1, len(result.history) + 1) / len(result.history)
        falls.plot(100 * done, _finite(result.history), color=color, label=result.name)
    reached.set_yticks(range(len(results)), [result.name for result in results])
    reached.invert_yaxis()
    reached.set(xlabel="test accuracy (%), and the time that it took", xlim=(0, 100))
    falls.set(xlabel="part of the trials, or of the epochs, that are done (%)", ylabel="best loss so far, or cost")
    _logarithmic(falls, "y")
    falls.legend(frameon=False, fontsize=9)
    return _saved(figure, path)


# --- classes -------------------------------------------------------------------------------------------------------

MOST_LETTERS = 70  # of names of classes side by side
MOST_NUMBERED = 20  # classes up to which each field of a confusion matrix has its number


def plot_confusion(
    matrix: np.ndarray,
    classes: Sequence[Any] | None = None,
    path: str | Path | None = None,
    title: str = "",
    axes: Any = None,
) -> Any:
    """Draw a confusion matrix: each field has its count, its colour is the part of the samples of its class.

    matrix: what :func:`gpubatch.metrics.confusion_matrix` returns
    classes: the names of the classes; by default their numbers

    path, title, axes: as for every picture, see :mod:`gpubatch.plot`.
    """
    matrix = np.asarray(matrix)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ArgumentError(f"matrix must have shape (classes, classes), got {matrix.shape}")
    if isinstance(classes, str):
        raise DTypeError(f"classes must be a list of names, got the text {classes!r}; a file is path={classes!r}")
    names = [f"{name}" for name in (range(len(matrix)) if classes is None else classes)]
    if len(names) != len(matrix):
        raise ArgumentError(f"classes must have a name for each of {len(matrix)} classes, got {len(names)}")
    figure, (panel,) = _panels(path, title, [6.5], axes)
    parts = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1e-300)
    panel.grid(False)
    image = panel.imshow(parts, cmap="Blues", vmin=0, vmax=1)
    if len(names) <= MOST_NUMBERED:
        panel.set_xticks(range(len(names)), names, **({"rotation": 45, "ha": "right"} if long(names) else {}))
        panel.set_yticks(range(len(names)), names)
        for i, j in np.ndindex(*matrix.shape):
            color = "white" if parts[i, j] > 0.5 else "black"
            panel.text(j, i, f"{matrix[i, j]:g}", ha="center", va="center", color=color, fontsize=8)
    panel.set(xlabel="predicted class", ylabel="class")
    figure.colorbar(image, ax=panel, label="part of the samples of the class")
    return _saved(figure, path)


def long(names: Sequence[str]) -> bool:
    """Whether names side by side would touch."""
    return len(names) * max(map(len, names)) > MOST_LETTERS


# --- memory --------------------------------------------------------------------------------------------------------

# What the parts of a plan belong to, by the first word of their names; all others are the model's.
GROUPS = {
    "workspace": "workspaces",
    **dict.fromkeys(("order", "making", "batches", "buffers", "conversion", "window", "data"), "loader"),
}
MODEL = "model, optimizer, validation set"


def plot_memory(
    plan: BatchPlan, parts: Mapping[int, ByPart], path: str | Path | None = None, title: str = "", axes: Any = None
) -> Any:
    """Draw the bytes by batch size, in all and by group of parts, with what is available and the chosen size."""
    in_own_figure = axes is None
    figure, (axes,) = _panels(path, title, [5], axes)
    sizes, whole = list(parts), [sum(of_size.values()) for of_size in parts.values()]
    lines = {name: np.zeros(len(sizes)) for name in (MODEL, "workspaces", "loader")}
    for k, of_size in enumerate(parts.values()):
        for name, n in of_size.items():
            lines[GROUPS.get(name.partition(" ")[0], MODEL)][k] += n
    top = 1.5 * max(*whole, plan.available)
    axes.axhspan(0.9 * plan.available, top, color=HELD_OUT, alpha=0.08, linewidth=0)
    axes.axhline(plan.available, color=HELD_OUT, label=f"available: {format_bytes(plan.available)}")
    axes.axhline(0.9 * plan.available, color=HELD_OUT, linewidth=1, linestyle="--", label="90 %, what may be used")
    for (name, line), color in zip(lines.items(), (ACCURACY, "#8a5fbf", "#b8860b"), strict=True):
        axes.plot(sizes, line, color=color, linewidth=1.2, label=name)
    axes.plot(sizes, whole, "o-", color=SMOOTH, linewidth=2.2, markersize=4, label="needed in all")
    axes.plot(plan.batch_size, plan.needed, "*", color=HELD_OUT, markersize=17, markeredgecolor="white", zorder=5)
    axes.annotate(
        f"{plan.batch_size}: {format_bytes(plan.needed)}",
        (plan.batch_size, plan.needed),
        (-7, 9),
        textcoords="offset points",
        ha="right",
        fontweight="bold",
        bbox={"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none"},
        zorder=4,
    )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set(xlabel="batch size (samples)", xlim=(sizes[0] / 1.2, sizes[-1] * 1.2))
    axes.set(ylabel="memory", ylim=(min(whole) / 32, top))
    ticks = [n for n in sizes if n & (n - 1) == 0]
    ticks += [sizes[-1]] if sizes[-1] > 1.4 * ticks[-1] else []
    axes.set_xticks(ticks, [str(n) for n in ticks], rotation=45 if len(ticks) > 14 else 0)
    low, high = (int(np.log2(max(1.0, limit))) for limit in axes.get_ylim())
    marks = [2**power for power in range(low + 1, high + 1, max(1, (high - low) // 8))]
    axes.set_yticks(marks, [format_bytes(n).replace(".0 ", " ") for n in marks])
    axes.minorticks_off()
    if in_own_figure:
        figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    else:
        axes.legend(frameon=False, fontsize=9)
    return _saved(figure, path)


# --- pieces --------------------------------------------------------------------------------------------------------


def _panels(path: str | Path | None, title: str, heights: list[float], axes: Any = None) -> tuple[Any, list[Any]]:
    """A figure 800 pixels wide with panels of these heights in inches, one above the other, or the user's axes."""
    if path is not None:
        check_plot_file(path)
    needed("matplotlib", "a picture", "plot")
    if axes is None:
        figure = _picture()(figsize=(8, sum(heights) + 1), layout="constrained")
        figure.suptitle(title, fontsize=10)
        panels = list(figure.subplots(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0])
    else:
        panels = list(np.ravel(np.asarray(axes, object)))
        if len(panels) != len(heights) or not all(hasattr(panel, "plot") for panel in panels):
            raise ArgumentError(f"axes must be {len(heights)} of Matplotlib's Axes for this picture, got {axes!r}")
        figure = panels[0].figure
        panels[0].set_title(title, fontsize=10)
    for panel in panels:
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    return figure, panels


@functools.cache
def _picture() -> Any:
    """A figure without pyplot, which has global state and wants a window system; a notebook shows it by its PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    class Picture(Figure):
        def __init__(self, **options: Any) -> None:
            Figure.__init__(self, **options)
            FigureCanvasAgg(self)

        def _repr_png_(self) -> bytes:
            file = io.BytesIO()
            self.savefig(file, format="png", dpi=100)
            return file.getvalue()

    return Picture


def _logarithmic(axes: Any, which: str) -> None:
    """A logarithmic axis with plain numbers, at 1, 2 and 5 of each decade."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axes.set(**{f"{which}scale": "log"})
    axis = getattr(axes, f"{which}axis")
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def _saved(figure: Any, path: str | Path | None) -> Any:
    if path is not None:
        figure.savefig(os.path.expanduser(path), dpi=100)
    return figure


def _finite(values: Any) -> np.ndarray:
    """Values as an array with gaps where they are not finite."""
    array = np.asarray(values, np.float64)
    return np.where(np.isfinite(array), array, np.nan)


def _colors(count: int) -> list[str]:
    return [(SMOOTH, HELD_OUT, ACCURACY, "#8a5fbf", "#b8860b", "#4c9ab0")[k % 6] for k in range(count)]
