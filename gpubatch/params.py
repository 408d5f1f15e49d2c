"""All parameters of a model in one flat buffer, with named views into it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from gpubatch.backend import Array, Backend, backend_of, float_dtype, get_backend
from gpubatch.errors import ArgumentError, DTypeError, ShapeError, check_int
from gpubatch.passes import DataPass
from gpubatch.shown import numbers

__all__ = ["FlatViews", "Parameters"]

MOST_SHOWN = 20  # arrays in a repr
# What stands behind the gradients in the message that data-parallel ranks sum: the sum of losses, each times its
# weight, the sum of weights, and how many ranks ran out of memory, saw a signal, or failed otherwise.
LOSS, WEIGHT, OUT_OF_MEMORY, SIGNALLED, FAILED = range(5)
TAIL = 5


class FlatViews(Mapping[str, Array]):
    """Named views into ``flat``, a contiguous one-dimensional array.

    ``views[name]`` is the view itself: change it in place, or assign ``views[name] = values``, which copies.
    ``spans[name]`` is its start and stop in ``flat``.
    """

    def __init__(self, flat: Array, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.flat = flat
        self._views: dict[str, Array] = {}
        self.spans: dict[str, tuple[int, int]] = {}
        start = 0
        for name, shape in shapes.items():
            stop = start + math.prod(shape)
            self._views[name] = flat[start:stop].reshape(shape)
            self.spans[name] = start, stop
            start = stop
        if start != flat.size:
            raise ShapeError(f"flat must have {start} elements, the sum over shapes, got {flat.size}")

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each view by name, in the order of ``flat``."""
        return {name: view.shape for name, view in self._views.items()}

    @property
    def size(self) -> int:
        """The number of elements in all views together."""
        return int(self.flat.size)

    @property
    def dtype(self) -> np.dtype[Any]:
        """The element type of all views."""
        found: np.dtype[Any] = self.flat.dtype
        return found

    def __getitem__(self, name: str) -> Array:
        try:
            return self._views[name]
        except KeyError:
            raise KeyError(f"no parameter {name!r}; there are {', '.join(self._views)}") from None

    def __setitem__(self, name: str, values: Any) -> None:
        view = self[name]
        if getattr(values, "shape", view.shape) not in (view.shape, ()):
            raise ShapeError(f"values of {name} must have shape {view.shape} or (), got {values.shape}")
        with backend_of(view).scope():
            view[...] = values

    def __iter__(self) -> Iterator[str]:
        return iter(self._views)

    def __len__(self) -> int:
        return len(self._views)

    def __deepcopy__(self, memo: Any) -> FlatViews:
        with backend_of(self.flat).scope():
            return FlatViews(self.flat.copy(), self.shapes)  # copied one by one, views would not share memory

    def __reduce__(self) -> Any:
        raise DTypeError(f"{type(self).__name__} cannot be pickled: its views would no longer share memory; save .flat")

    def __repr__(self) -> str:
        """A line for each array, with its first and last numbers, which come from the device."""
        head = f"<{type(self).__name__}: {self.size:,} numbers of {self.dtype} in {len(self)} arrays"
        backend, lines = backend_of(self.flat), []
        for name in list(self)[:MOST_SHOWN]:
            flat = self[name].reshape(-1)
            first, last = (backend.to_numpy(part).tolist() for part in (flat[:3], flat[-1:]))
            lines.append(f"  {name} {self[name].shape}: {numbers(first, last[0] if last else 0.0, flat.size)}")
        more = len(self) - MOST_SHOWN
        return "\n".join([head, *lines, *([f"  and {more:,} more"] if more > 0 else [])]) + ">"


class Parameters(FlatViews):
    """All parameters of a model in one buffer, initially zero; ``grads`` has the same views of their gradients.

    ``fed`` is the pass over a loader whose batch the network computed the gradients of last; None: of none. ``message``
    is the buffer of the gradients with a few numbers behind them, which data-parallel ranks sum together with these.

    shapes: maps each name to a shape, or to an array to copy
    backend: "auto", "numpy", "cupy" or a backend
    dtype: "float16", "float32" or "float64"

    >>> p = Parameters({"W1": (784, 512), "b1": (512,)})
    >>> p["W1"].shape, p.flat.shape, p.grads["b1"].shape
    ((784, 512), (401920,), (512,))
    """

    def __init__(self, shapes: Mapping[str, Any], backend: str | Backend = "auto", dtype: Any = "float32") -> None:
        if not isinstance(shapes, Mapping):
            raise DTypeError(f"shapes must map names to shapes, got {type(shapes).__name__}")
        if not shapes:
            raise ArgumentError("shapes must name at least one parameter, got none")
        self.backend = get_backend(backend)
        dtype = float_dtype(dtype, half=True)
        dimensions = {name: _shape(name, value) for name, value in shapes.items()}
        size = sum(map(math.prod, dimensions.values()))
        FlatViews.__init__(self, self.backend.zeros(size, dtype), dimensions)
        self.message = self.backend.zeros(size + TAIL, dtype)
        self.grads = FlatViews(self.message[:size], dimensions)
        self.fed: DataPass | None = None
        for name, value in shapes.items():
            if hasattr(value, "shape"):
                self[name] = self.backend.asarray(value, dtype)

    def __deepcopy__(self, memo: Any) -> Parameters:
        twin = Parameters(dict(self), self.backend, self.dtype)
        with self.backend.scope():
            twin.grads.flat[...] = self.grads.flat
        return twin


def by_alignment(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """``shapes``, sorted so that each array in the flat buffer is aligned as far as its own size allows.

    A matrix with rows of whole multiples of 16 bytes starts at a multiple of 16 bytes; matrix products on a GPU then
    have faster kernels. Padding would align the arrays too, but operations on the whole buffer, such as its norm, would
    include it.
    """

    def alignment(name: str) -> int:
        return math.gcd(math.prod(shapes[name]), 8)  # in elements; eight float16 are 16 bytes

    return {name: shapes[name] for name in sorted(shapes, key=alignment, reverse=True)}


def _shape(name: str, value: Any) -> tuple[int, ...]:
    if hasattr(value, "shape"):
        return tuple(value.shape)
    if isinstance(value, (int, np.integer)):
        value = (value,)
    if not isinstance(value, (tuple, list)):
        raise DTypeError(f"shape of {name} must be a tuple of integers or an array, got {value!r}")
    return tuple(check_int(f"shape of {name}", n, 0) for n in value)
