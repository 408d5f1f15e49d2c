"""Functions of the user's that are applied to whole batches: preparation, and augmentation for training alone."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpubatch.backend import Array, Backend
from gpubatch.errors import ArgumentError, DTypeError, ShapeError
from gpubatch.inputs import check_kind


@dataclass(frozen=True, eq=False)
class BatchFunction:
    """A function of the first arrays of a batch, x or x and y, whose results take their place.

    ``name`` is the loader's argument; ``takes`` is how many arrays the function takes before anything else.
    """

    name: str
    function: Callable[..., Any]
    takes: int

    def __call__(
        self, arrays: Sequence[Array], axes: Sequence[int], dtype: np.dtype[Any], backend: Backend, *more: Any
    ) -> list[Array]:
        """``arrays`` with the results in place; x is converted to ``dtype``. Samples lie along ``axes``."""
        found = self.function(*arrays[: self.takes], *more)
        if found is None:
            raise DTypeError(
                f"{self.name} must return what takes the place of {self.words}, got None; a function that changes x in "
                "place must return it, too"
            )
        if self.takes == 1:
            found = (found,)
        elif not isinstance(found, tuple) or len(found) != self.takes:
            raise DTypeError(f"{self.name} must return a pair, as it takes x and y, got {type(found).__name__}")
        for axis, before, after in zip(axes, arrays, found, strict=False):
            backend.check(f"what {self.name} returns", after)
            if after.ndim <= axis or after.shape[axis] != before.shape[axis]:
                raise ShapeError(
                    f"{self.name} must keep the {before.shape[axis]} samples along axis {axis}, it made shape "
                    f"{after.shape} of {before.shape}"
                )
            check_kind(f"what {self.name} returns", after.dtype)
        x = found[0] if found[0].dtype == dtype else found[0].astype(dtype)
        return [x, *found[1:], *arrays[self.takes :]]

    @property
    def words(self) -> str:
        """What the function takes, in words."""
        return "x" if self.takes == 1 else "x and y"


def named_function(name: str, function: Any, labelled: bool, more: str = "") -> BatchFunction | None:
    """The function that a loader's argument ``name`` gives; None where it is None.

    ``labelled`` says whether batches have a y, ``more`` what the function takes besides, in words.
    """
    if function is None:
        return None
    expected = f"x{', or x and y' * labelled}{more}"
    if not callable(function):
        raise DTypeError(f"{name} must be a function of x, or of x and y{more}, got {type(function).__name__}")
    extra = 1 if more else 0
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # some builtins do not tell
        return BatchFunction(name, function, 1)
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    needed = sum(p.kind in kinds and p.default is inspect.Parameter.empty for p in parameters)
    anything = any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters)
    if needed > 1 + labelled + extra or (needed < 1 + extra and extra and not anything):
        raise ArgumentError(f"{name} must take {expected}; it takes {needed} arguments")
    return BatchFunction(name, function, 2 if needed == 2 + extra else 1)
