"""Pictures: the numbers that were drawn, and that a file of the right kind comes out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import gpubatch as gb
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


def test_the_picture_is_800_pixels_wide(tmp_path: Path) -> None:
    plot_training(history(), tmp_path / "curves.png", "a test")
    header = (tmp_path / "curves.png").read_bytes()[16:24]
    assert int.from_bytes(header[:4], "big") == 800


def test_what_cannot_be_drawn_is_said(tmp_path: Path) -> None:
    with pytest.raises(gb.ArgumentError, match="at least one step"):
        plot_training(gb.History(), tmp_path / "curves.png", "a test")
    with pytest.raises(gb.ArgumentError, match=r"must end in .png, .pdf or .svg, got 'curves.jpg'"):
        check_plot_file("curves.jpg")
    with pytest.raises(gb.ArgumentError, match="the folder of the plot file must exist"):
        check_plot_file(tmp_path / "no" / "curves.png")
