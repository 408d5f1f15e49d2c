"""The preparation of raw samples for a network, as the training loader did it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gpubatch.checkpoint import DTYPES
from gpubatch.errors import ArgumentError, DataFormatError, DTypeError, ShapeError, check_choice, check_int, check_real
from gpubatch.loader import Loader, Standardize, epochs_of
from gpubatch.model.describe import path_of
from gpubatch.tables import Recipe, Table, TrainingRows


@dataclasses.dataclass(frozen=True)
class Preparation:
    """Raw samples are multiplied by ``scale`` and converted, then ``prepare`` is applied to each batch.

    sample_axis: 0 where samples are rows, 1 where they are columns
    sample_shape: of one sample
    dtype: of the samples that the network was trained on
    prepare: a function of a batch, or None
    table: how rows of a table become samples first, or None where samples are arrays
    rows: which rows of the data the network was trained on; None where nobody knows
    """

    scale: float | None
    sample_axis: int
    sample_shape: tuple[int, ...]
    dtype: np.dtype[Any]
    prepare: Callable[[Any], Any] | None = None
    table: Recipe | None = None
    rows: TrainingRows | None = None

    @classmethod
    def of(cls, loader: Loader | Table) -> Preparation:
        """The preparation that a loader applies to its samples, or a table to its rows."""
        if isinstance(loader, Table):
            return cls(None, 0, (loader.features,), np.dtype(np.float32), None, loader.recipe, loader.recipe.rows)
        if not isinstance(loader, Loader):
            raise DTypeError(
                f"loader must be the gb.Loader, or the table, that the network was trained on, got {loader!r}"
            )
        columns = epochs_of(loader).columns
        x = columns[0].source
        return cls(
            loader.scale,
            loader.sample_axis,
            tuple(x.sample_shape),
            columns.source_dtype,
            loader.prepare,
            columns.recipe,
            None if columns.recipe is None else columns.recipe.rows,
        )

    def to_json(self, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
        """For a file. An object with ``state_dict()`` also has its state there: numbers, text and arrays."""
        found: dict[str, Any] = {
            "scale": self.scale,
            "sample_axis": self.sample_axis,
            "sample_shape": list(self.sample_shape),
            "dtype": self.dtype.name,
            "prepare": None,
            "table": None if self.table is None else self.table.to_json(arrays),
            "rows": None if self.rows is None else dataclasses.asdict(self.rows),
        }
        if isinstance(self.prepare, np.ufunc):
            found["prepare"] = {"numpy": self.prepare.__name__}
        elif isinstance(self.prepare, Standardize):
            found["prepare"] = {"standardize": ["mean", "deviation"]}
            for name in found["prepare"]["standardize"]:
                arrays[f"prepare.{name}"] = getattr(self.prepare, name)
        elif self.prepare is not None:
            found["prepare"] = {"name": path_of(self.prepare)}
            if hasattr(self.prepare, "state_dict") and hasattr(self.prepare, "load_state_dict"):
                found["prepare"]["state"] = _state(self.prepare.state_dict(), arrays)
        return found

    @classmethod
    def from_json(
        cls,
        found: Any,
        path: Path,
        arrays: Mapping[str, np.ndarray],
        custom: Callable[[Any, str], Any],
        classes: list[Any] | None,
    ) -> Preparation:
        """Of a file; ``custom(name, what)`` gives the user's function or object for its name."""
        try:
            scale = None if found["scale"] is None else check_real("scale", found["scale"])
            axis = check_int("sample_axis", found["sample_axis"], 0, 1)
            shape = tuple(check_int("sample_shape", n, 0) for n in found["sample_shape"])
            if axis > len(shape):
                raise ValueError(f"samples of shape {shape} are not along axis {axis}")
            dtype = np.dtype(check_choice("dtype", found["dtype"], DTYPES))
            table = found.get("table")
            recipe = None if table is None else Recipe.from_json(table, arrays, classes)
            if recipe is not None and (axis, shape, dtype) != (0, (recipe.features,), np.dtype(np.float32)):
                raise ValueError(f"a table of {recipe.features} features does not make samples of shape {shape}")
            rows = None if found.get("rows") is None else TrainingRows.from_json(found["rows"])
            of = found["prepare"]
            given: Any = None
            name, state = "", None
            if of is not None and "numpy" in of:
                given = vars(np).get(of["numpy"])
                if not isinstance(given, np.ufunc) or (given.nin, given.nout) != (1, 1):
                    raise DataFormatError(f"prepare is np.{str(of['numpy'])[:99]}, which is no function of elements")
            elif of is not None and "standardize" in of:
                given = Standardize(arrays["prepare.mean"], arrays["prepare.deviation"])
                if given.mean.shape != shape:
                    raise ShapeError(f"means of shape {given.mean.shape} are not of samples of shape {shape}")
            elif of is not None:
                name, state = of["name"], of.get("state")
        except (ArgumentError, DTypeError, TypeError, LookupError, ValueError, OverflowError) as error:
            raise DataFormatError(f"{path} is damaged: its preparation: {error}") from error
        if of is not None and given is None:
            given = custom(name, "the loader's prepare")
            if isinstance(given, type) and state is None:
                raise ArgumentError(f"{path}: the loader's prepare was an object: custom must have one, got {given!r}")
            given = given() if isinstance(given, type) else given
            if state is not None:
                given.load_state_dict(_with_arrays(state, arrays))
        return cls(scale, axis, shape, dtype, given, recipe, rows)


def _state(state: Mapping[str, Any], arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """A state for JSON, its arrays among those of the file."""
    found: dict[str, Any] = {}
    for name, value in state.items():
        if hasattr(value, "dtype") and value.shape:
            arrays[f"prepare.{name}"] = np.ascontiguousarray(value)
            found[name] = {"array": f"prepare.{name}"}
        else:
            found[name] = value.item() if isinstance(value, np.generic) else value
    return found


def _with_arrays(state: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    return {name: arrays[x["array"]] if isinstance(x, dict) else x for name, x in state.items()}
