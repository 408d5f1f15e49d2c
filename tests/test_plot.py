"""Pictures: the numbers that were drawn, and that a file of the right kind comes out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import gpubatch as gb
from gpubatch import plot
from gpubatch.plot import check_plot_file, plot_training

pytest.importorskip("matplotlib", reason="Matplotlib is not installed (pip install 'gpubatch[plot]')")


def history(steps: int = 12, epochs: int = 3, **lists: list[float]) -> gb.History:
    rng = np.random.default_rng(0)
    full = {
        "step_loss": list(np.exp(-np.arange(steps) / 5) + 0.1 * rng.random(steps)),
        "step_lr": [0.01] * steps,
        "loss": [0.5] * epochs,
        "validation_loss": [0.6, 0.4, 0.3],
        "validation_accuracy": [0.8, 0.9, 0.95],
    }
    return gb.History(**{**full, **lists}, batch_size=32)


VARIANTS = {
    "everything": history(),
    "no validation": history(validation_loss=[], validation_accuracy=[]),
    "regression": history(validation_accuracy=[]),
    "no learning rate": history(step_lr=[]),
    "only costs": history(validation_loss=[], validation_accuracy=[], step_lr=[]),
    "negative costs": history(step_loss=[-1.0, 0.0, 1.0] * 4),
    "one step": history(1, 1, validation_loss=[0.3], validation_accuracy=[0.9]),
    "left in the first epoch": history(5, 0, validation_loss=[], validation_accuracy=[]),
}


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize(
    ("ending", "start"),
    [
        ("png", b"\x89PNG"),
        *(pytest.param(*way, marks=pytest.mark.exhaustive) for way in [("pdf", b"%PDF"), ("svg", b"<?xml")]),
    ],
)
def test_every_history_is_drawn(name: str, ending: str, start: bytes, tmp_path: Path) -> None:
    file = tmp_path / f"curves.{ending}"
    plot_training(VARIANTS[name], file, "a test")
    assert file.read_bytes().startswith(start)


def sweep(name: str) -> Any:
    """What one of the explorers finds on a small network."""
    rng = np.random.default_rng(0)
    X, Y = rng.standard_normal((60, 4)).astype(np.float32), rng.integers(0, 3, 60)
    net = gb.mlp([4, 3], backend="cpu")
    explore = gb.explore
    found: dict[str, Callable[[], tuple[Any, ...]]] = {
        "slice": lambda: (explore.loss_slice(net, X, Y, np.linspace(-1, 1, 5), np.linspace(-1, 1, 4)),),
        "step_sizes": lambda: (
            explore.step_size_sweep(net, X, Y),
            explore.learning_rate_range_test(net, X, Y, steps=20, batch_size=20),
        ),
        "batch_sizes": lambda: (explore.batch_size_sweep(net, X, Y, [16, 20, 32], target=1.0, epochs=2), 1.0),
        "optimizers": lambda: (explore.optimizer_sweep(net, X, Y, batch_size=20, epochs=1),),
        "memory": lambda: (plan := gb.Loader(X, Y, backend="cpu").plan, {16: plan.parts, 32: plan.parts}),
        "confusion": lambda: (np.array([[8, 2, 0], [1, 9, 0], [0, 3, 7]]), ["cat", "dog", "bird"]),
        "strategies": lambda: ([SimpleNamespace(name="a", test_accuracy=0.9, seconds=1.0, history=(2.0, 1.0))],),
        "training": lambda: (history(),),
    }
    return found[name]()


PANELS = {
    "slice": 1,
    "step_sizes": 2,
    "batch_sizes": 3,
    "optimizers": 2,
    "memory": 1,
    "strategies": 2,
    "training": 3,
    "confusion": 1,
}


def test_the_table_of_pictures_is_complete() -> None:
    assert {f"plot_{name}" for name in PANELS} == {name for name in plot.__all__ if name.startswith("plot_")}


@pytest.mark.parametrize("name", PANELS)
def test_every_picture_is_a_figure_for_a_notebook_or_goes_into_axes_of_ones_own(name: str, tmp_path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    draw, arguments, panels = getattr(plot, f"plot_{name}"), sweep(name), PANELS[name]
    figure = draw(*arguments, title="a test")
    assert isinstance(figure, Figure)
    assert figure._repr_png_().startswith(b"\x89PNG")  # what IPython calls
    draw(*arguments, tmp_path / "a.png", "a test")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")

    own = Figure(figsize=(8, 10))
    FigureCanvasAgg(own)
    axes = own.subplots(panels + 1, 1)
    assert draw(*arguments, title="a test", axes=axes[1:] if panels > 1 else axes[1]) is own
    assert axes[1].get_title() == "a test"
    assert axes[1].has_data()
    assert not axes[0].has_data()
    with pytest.raises(gb.ArgumentError, match=f"^axes must be {panels} of Matplotlib's Axes for this picture, got "):
        draw(*arguments, axes=axes)


def test_the_picture_is_800_pixels_wide(tmp_path: Path) -> None:
    plot_training(history(), tmp_path / "curves.png", "a test")
    header = (tmp_path / "curves.png").read_bytes()[16:24]
    assert int.from_bytes(header[:4], "big") == 800


def test_what_cannot_be_drawn_is_said(tmp_path: Path) -> None:
    with pytest.raises(gb.ArgumentError, match="at least one step"):
        plot_training(gb.History(), tmp_path / "curves.png", "a test")
    with pytest.raises(gb.DTypeError, match=r"history must be a gpubatch\.History, as fit returns, got a dict"):
        plot_training(history().to_dict())  # type: ignore[arg-type]
    with pytest.raises(
        gb.DTypeError, match=r"classes must be a list of names, got the text 'a.png'; a file is path='a.png'"
    ):
        plot.plot_confusion(np.eye(2), "a.png")
    with pytest.raises(gb.ArgumentError, match=r"must end in .png, .pdf or .svg, got 'curves.jpg'"):
        check_plot_file("curves.jpg")
    with pytest.raises(gb.ArgumentError, match="the folder of the plot file must exist"):
        check_plot_file(tmp_path / "no" / "curves.png")
