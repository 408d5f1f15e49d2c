"""Arrays that the user gave: parameters and gradients by name, and the norm over gradients."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from gpubatch.backend import (
    Array,
    backend_of,
    describe,
    find_overlap,
    from_dlpack,
    is_cupy,
    is_foreign,
    is_immutable,
    unmasked,
)
from gpubatch.errors import ArgumentError, DTypeError, NonFiniteError, check_real
from gpubatch.ops import SQUARE_SUM_SIZE, ops_for
from gpubatch.params import FlatViews, Parameters


def named_arrays(arrays: Any, argument: str, *, writable: bool = False, optional: bool = False) -> dict[str, Array]:
    """``arrays`` by name: a mapping as it is, a sequence by "0", "1", ..., one array as "0".

    With ``optional`` some may be None.
    """
    if isinstance(arrays, Mapping):
        given = dict(arrays)
    elif hasattr(arrays, "shape"):
        given = {"0": arrays}
    elif isinstance(arrays, Iterable) and not isinstance(arrays, (str, bytes)):
        given = {str(i): array for i, array in enumerate(arrays)}
    else:
        hint = "; give its .parameters" if argument == "params" and hasattr(arrays, "parameters") else ""
        raise DTypeError(
            f"{argument} must be Parameters, or a mapping or sequence of arrays, got {describe(arrays)}{hint}"
        )
    if not given:
        raise ArgumentError(f"{argument} must hold at least one array, got none")
    found: dict[str, Array] = {}
    for name, array in given.items():
        label = f"{argument}[{name!r}]"
        if not isinstance(name, str):
            raise DTypeError(f"the names in {argument} must be strings, got {name!r}")
        if array is None and optional:
            found[name] = None
            continue
        frozen = is_immutable(array)
        if is_foreign(array):
            # PyTorch exports no tensor that requires a gradient; its memory is what an optimizer updates.
            array = from_dlpack(array.detach() if getattr(array, "requires_grad", False) else array)
        elif isinstance(array, (np.matrix, np.ma.MaskedArray)):
            array = np.asarray(unmasked(label, array))  # a matrix has other products
        elif not isinstance(array, np.ndarray) and not is_cupy(array):
            groups = isinstance(array, Mapping) and "params" in array
            hint = "; all arrays are params, and groups= has the settings of some by name" if groups else ""
            raise DTypeError(f"{label} must be a NumPy or CuPy array, or speak DLPack, got {describe(array)}{hint}")
        if writable and (frozen or not getattr(array.flags, "writeable", True)):
            raise ArgumentError(f"{label} is read-only: an optimizer changes it in place, give it a writable array")
        found[name] = array
    ids = [id(array) for array in given.values() if array is not None]
    if writable and len(set(ids)) < len(ids):
        raise ArgumentError(f"{argument} has the same array twice: it would be updated twice in a step")
    return found


def check_apart(params: Mapping[str, Array]) -> None:
    """Raise if parameters share memory."""
    if (pair := find_overlap(list(params.values()))) is not None:
        first, second = (f"params[{list(params)[i]!r}]" for i in pair)
        shared = f"elements of {first}" if first == second else f"{first} and {second}"
        raise ArgumentError(f"{shared} share memory, which would be updated twice in a step; give each its own")


class Gradients(NamedTuple):
    """Gradients on a GPU that passed the checks, and their names.

    Checking many small arrays takes longer than updating all of them.
    """

    names: list[str] | None
    arrays: list[weakref.ref[Array]]  # weak, so that no memory is kept

    @staticmethod
    def of(grads: Any, used: list[Array]) -> Gradients | None:
        """Remember ``grads`` if they are the arrays that were ``used``; otherwise None."""
        if type(grads) not in (dict, list, tuple):
            return None
        given = list(grads.values()) if isinstance(grads, dict) else list(grads)
        if {id(g) for g in given} != {id(g) for g in used}:
            return None
        return Gradients(list(grads) if isinstance(grads, dict) else None, [weakref.ref(g) for g in given])

    def same(self, grads: Any) -> bool:
        """Whether ``grads`` are these very arrays in the same order."""
        if type(grads) is dict:
            if self.names is None or list(grads) != self.names:
                return False
            grads = grads.values()
        elif self.names is not None or type(grads) not in (list, tuple):
            return False
        return len(grads) == len(self.arrays) and all(g is known() for g, known in zip(grads, self.arrays, strict=True))


def not_finite(arrays: Mapping[str, Array]) -> str:
    """The arrays with numbers that are NaN or infinite, in words; empty if there are none."""
    backend, found = backend_of(*arrays.values()), list[str]()
    with backend.scope(), np.errstate(over="ignore", invalid="ignore"):
        for name, array in arrays.items():
            if isinstance(array, np.ndarray) and array.flags.c_contiguous:
                # BLAS is the quickest to tell that all is well: what is not finite has no finite sum of squares.
                flat = array.reshape(-1)
                if math.isfinite(float(np.dot(flat, flat))):
                    continue
            if count := int(array.size) - int(backend.xp.isfinite(array).sum()):
                found.append(f"{count} of {array.size} numbers of {name} are NaN or infinite")
    return ", ".join(found)


def clip_by_global_norm(grads: Any, max_norm: float) -> float:
    """Scale ``grads`` in place so that the norm over all of them is at most ``max_norm``; returns the norm before.

    Pascanu, Mikolov & Bengio 2013, algorithm 1. ``grads`` is ``params.grads``, a mapping, a sequence or an array; None
    for a parameter counts as nothing. A norm that is not finite raises :class:`NonFiniteError` and leaves them as they
    were.

    >>> grads = [np.array([3.0, 4.0])]
    >>> norm = gb.clip_by_global_norm(grads, max_norm=1.0)
    >>> grads[0].round(3)
    array([0.6, 0.8])
    """
    limit = check_real("max_norm", max_norm, 0.0, open_low=True)
    if isinstance(grads, Parameters):
        raise ArgumentError("grads must be gradients, got the Parameters themselves: give params.grads")
    if isinstance(grads, FlatViews):
        arrays = [grads.flat]
    else:
        named = named_arrays(grads, "grads", writable=True, optional=True)
        arrays = [array for array in named.values() if array is not None]
        if not arrays:
            return 0.0
    backend = backend_of(*arrays)
    with backend.scope():
        sums = backend.zeros(SQUARE_SUM_SIZE, np.float64)
        for a in arrays:
            ops_for(backend, a.dtype).square_sum(a if a.flags.c_contiguous else a.astype(a.dtype, order="C"), sums)
        norm = math.sqrt(float(sums[0]))
        if not math.isfinite(norm):
            raise NonFiniteError(f"the global norm of grads is {norm}: a gradient is NaN or infinite")
        if norm > limit:
            for a in arrays:
                a *= limit / norm
    return norm
