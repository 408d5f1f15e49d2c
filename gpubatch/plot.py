"""Pictures of a run. The only module that imports Matplotlib, when a picture is asked for."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np

from gpubatch.errors import ArgumentError
from gpubatch.train import History

__all__ = ["check_plot_file", "plot_training"]

RAW, SMOOTH, HELD_OUT, ACCURACY = "#c3cbd6", "#1f4e9e", "#d1603d", "#2b7a4b"


def check_plot_file(path: str | Path) -> None:
    """Find out before the work whether ``path`` can be drawn to: its ending, its folder, Matplotlib."""
    if Path(path).suffix not in (".png", ".pdf", ".svg"):
        raise ArgumentError(f"the plot file must end in .png, .pdf or .svg, got {str(path)!r}")
    if not Path(path).absolute().parent.is_dir():
        raise ArgumentError(f"the folder of the plot file must exist, got {str(path)!r}")
    if importlib.util.find_spec("matplotlib") is None:
        raise ArgumentError("plots need Matplotlib, which is not installed: pip install 'gpubatch[plot]'")


def plot_training(history: History, path: str | Path, title: str) -> None:
    """Cost of every step, raw and smoothed, with the validation cost; accuracy by epoch; the learning rate.

    ``path`` ends in .png, .pdf or .svg. Raises :class:`ArgumentError` for a history without a step.
    """
    check_plot_file(path)
    if not history.step_loss:
        raise ArgumentError("history must have at least one step to be drawn, got none")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure  # not pyplot: no global state, no window system

    with_accuracy = bool(history.validation_accuracy)
    figure = Figure(figsize=(8, 8 if with_accuracy else 6), layout="constrained")
    FigureCanvasAgg(figure)
    heights = [3.0] + ([2.0] if with_accuracy else []) + ([1.4] if history.step_lr else [])
    cost, *others = np.atleast_1d(figure.subplots(len(heights), 1, height_ratios=heights))
    figure.suptitle(title, fontsize=12)

    # The x axis counts steps everywhere; an epoch ends at these.
    steps = np.arange(1, len(history.step_loss) + 1)
    epochs = len(history.loss)
    ends = np.linspace(0, len(steps), epochs + 1)[1:]
    _draw_cost(cost, history, steps, ends)
    if with_accuracy:
        accuracy = others[0]
        percent = 100 * np.array(history.validation_accuracy)
        accuracy.plot(ends, percent, "o-", color=ACCURACY, markersize=4)
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
        rate.set_ylabel("learning rate")
        rate.set_ylim(bottom=0)
    last = (cost, *others)[-1]
    last.set_xlabel(f"step (mini-batches of {history.batch_size}; {epochs} epochs of {len(steps) // max(epochs, 1)})")
    for axes in (cost, *others):
        axes.set_xlim(0, len(steps))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=100)


def _draw_cost(axes: Any, history: History, steps: np.ndarray, ends: np.ndarray) -> None:
    beta = 0.9 if len(steps) < 1000 else 0.98
    axes.plot(steps, history.step_loss, color=RAW, linewidth=0.8, label="mini-batch cost")
    axes.plot(steps, history.smoothed(beta), color=SMOOTH, label=f"smoothed (moving average, β = {beta})")
    if history.validation_loss:
        axes.plot(ends, history.validation_loss, "o-", color=HELD_OUT, markersize=4, label="validation cost")
    lowest = min([*history.step_loss, *history.validation_loss])
    if lowest > 0:
        axes.set_yscale("log")
    axes.set_ylabel("cost")
    axes.legend(frameon=False, fontsize=9)
