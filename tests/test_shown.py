"""What results and parameters look like at the prompt."""

from __future__ import annotations

import dataclasses
import re

import numpy as np

import gpubatch as gb
from gpubatch import explore
from gpubatch.cli.strategies import StrategyResult
from gpubatch.shown import Shown

LARGE = {"int": 3, "float": 0.125, "bool": True, "str": "because", "None": None}
RESULTS = (
    gb.History,
    explore.SearchResult,
    explore.LossSlice,
    explore.StepSizeSweep,
    explore.RangeTest,
    explore.BatchSizeTrial,
    explore.OptimizerTrial,
    StrategyResult,
)


def filled(kind: type) -> Shown:
    """A result whose every list has 12,500 numbers."""
    values = {}
    for field in dataclasses.fields(kind):
        word = str(field.type)
        if "list" in word or "tuple[float" in word or word == "Series":
            values[field.name] = type(word)() if word == "str" else [0.001 * i for i in range(12_500)]
        elif "ndarray" in word:
            array = np.linspace(0, 1, 12_500)
            values[field.name] = (array, array) if word.startswith("tuple") else array
        else:
            values[field.name] = next((x for name, x in LARGE.items() if name in word), gb.History())
    return kind(**values)


def test_a_result_fits_a_screen() -> None:
    for kind in RESULTS:
        text = repr(filled(kind))
        assert len(text) < 1500, kind
        assert max(map(len, text.splitlines())) <= 110
        assert text.startswith(f"{kind.__name__}(")
        assert "(12,500)" in text or kind is explore.BatchSizeTrial
    assert (
        repr(gb.History()) == "History(batch_size=0, micro_batch_size=None, skipped=0, overflows=0, execution='eager')"
    )


def test_every_result_of_the_explorers_is_one_of_them() -> None:
    found = {x for x in vars(explore).values() if isinstance(x, type) and dataclasses.is_dataclass(x)}
    others = {explore.GradientCheck, explore.Kink, explore.TrialStart}
    assert found - others == {x for x in RESULTS if hasattr(explore, x.__name__)}


def test_parameters_show_numbers(backend: gb.Backend) -> None:
    parameters = gb.Parameters({"W1": (3, 4), "b1": (2,), "none": (0,)}, backend=backend)
    parameters["W1"] = backend.asarray(np.arange(12, dtype="float32").reshape(3, 4) / 3)
    assert repr(parameters).splitlines() == [
        "<Parameters: 14 numbers of float32 in 3 arrays",
        "  W1 (3, 4): [0, 0.3333, 0.6667, …, 3.667] (12)",
        "  b1 (2,): [0, 0]",
        "  none (0,): []>",
    ]
    many = gb.Parameters({f"p{i}": (1,) for i in range(5000)}, backend=backend)
    assert re.search(r"p19 \(1,\): \[0\]\n  and 4,980 more>$", repr(many))


def test_a_plan_shows_its_reason() -> None:
    plan = gb.Loader(np.zeros((60, 3)), backend="cpu").plan
    assert "parts" not in repr(plan)
    assert plan.reason in repr(plan)
