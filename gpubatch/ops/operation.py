"""An operation of the core and its forms: by NumPy, compiled for the CPU, on CUDA, and for float16 on the CPU.

A family of operations is a file. Each begins with the NumPy form, which says what is computed; the other forms stand
below it. All arrays are C-contiguous, x, y, dx, dy are ``(batch, features)``, and nothing is allocated. ``work`` is
workspace by the names that layers and losses give. For float16 the arithmetic is float32, and so are means, variances,
the loss and scratch: what layers ask for as :data:`COMPUTE`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from types import MethodType, TracebackType
from typing import Any, Concatenate, Generic, ParamSpec, Protocol, TypeAlias, overload

import numpy as np

from gpubatch.backend import Array, compute_dtype
from gpubatch.ops.grid import Grid

Work: TypeAlias = Mapping[str, Array]
# Shape, in which -1 is the batch size, and dtype: None is that of the network, in which batches are stored, and COMPUTE
# that of the arithmetic; they differ where that is float32 and batches are float16.
Space: TypeAlias = tuple[tuple[int, ...], Any]
Spaces: TypeAlias = Callable[[int], Mapping[str, Space]]  # of the number of features

COMPUTE = "compute"  # as the dtype of an array of workspace: that of the arithmetic, float32 for float16

HALF, WIDE = np.dtype(np.float16), np.dtype(np.float32)

P = ParamSpec("P")


class Forms(Protocol):
    """What chooses the form of an operation: CUDA's where there is a ``grid``, else one compiled in the ``library``."""

    library: Any
    grid: Grid | None
    half: bool  # float16 on the CPU

    @property
    def by_numpy(self) -> bool:
        """Whether there is neither, so that NumPy does the work."""


class Operation(Generic[P]):
    """An operation. As an attribute of a class of :class:`Forms` it is, in an instance, the form for that.

    ``results`` names what the rule for float16 on the CPU rounds back, "y" or "work.dz"; without any, the NumPy form is
    right for float16 as it stands. ``scratch`` is what the operation needs of ``work`` for one call, ``numpy_scratch``
    what its NumPy form needs besides.
    """

    def __init__(
        self, numpy: Callable[P, None], results: tuple[str, ...], scratch: Spaces, numpy_scratch: Spaces
    ) -> None:
        self.numpy, self.results, self.__doc__ = numpy, results, numpy.__doc__
        self._scratch, self._numpy_scratch = scratch, numpy_scratch
        self._compiled: Callable[Concatenate[Any, P], None] | None = None
        self._cuda: Callable[Concatenate[Grid, P], None] | None = None
        self._half: Callable[Concatenate[Callable[P, None], P], None] | None = self._by_float32 if results else None

    def compiled(self, form: Callable[Concatenate[Any, P], None]) -> Callable[Concatenate[Any, P], None]:
        """Declare the form that calls ``gpubatch._host``, and the NumPy form for what that declines: strided arrays."""
        self._compiled = form
        return form

    def cuda(self, form: Callable[Concatenate[Grid, P], None]) -> Callable[Concatenate[Grid, P], None]:
        """Declare the form that launches kernels."""
        self._cuda = form
        return form

    def half(
        self, form: Callable[Concatenate[Callable[P, None], P], None]
    ) -> Callable[Concatenate[Callable[P, None], P], None]:
        """Declare a form for float16 on the CPU, in place of the one rule; it is given the form for float32."""
        self._half = form
        return form

    def __set_name__(self, owner: Any, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, ops: None, owner: Any) -> Operation[P]: ...
    @overload
    def __get__(self, ops: Forms, owner: Any) -> Callable[P, None]: ...
    def __get__(self, ops: Forms | None, owner: Any) -> Operation[P] | Callable[P, None]:
        """The form for ``ops``, bound on first use: it takes this descriptor's place there."""
        if ops is None:
            return self
        form = self._form(ops.library, ops.grid)
        if ops.half:
            form = MethodType(self._half, form) if self._half else self.numpy
        ops.__dict__[self.name] = form
        return form

    def _form(self, library: Any, grid: Grid | None) -> Callable[P, None]:
        if grid is not None:
            assert self._cuda is not None, f"{self.name} has no CUDA form"
            return MethodType(self._cuda, grid)
        if library is None or self._compiled is None:
            return self.numpy
        return MethodType(self._compiled, library)

    def scratch(self, features: int, numpy: bool = True) -> dict[str, Space]:
        """The arrays of ``work`` that last for one call on rows of ``features``; ``numpy``: where NumPy may do it."""
        return {**self._scratch(features), **(self._numpy_scratch(features) if numpy else {})}

    def numpy_may_do_it(self, ops: Forms, strided: bool) -> bool:
        """Whether ``ops`` may run the NumPy form; compiled forms leave it ``strided`` arrays."""
        return ops.grid is None and (ops.library is None or self._compiled is None or strided)

    @functools.cached_property
    def _places(self) -> tuple[int, int, list[int], list[str]]:
        """Where work, targets (-1: there are none) and results stand among the arguments, and the results in work."""
        names = list(inspect.signature(self.numpy).parameters)
        places = [names.index(name) for name in self.results if name in names]
        in_work = [name.removeprefix("work.") for name in self.results if name not in names]
        return names.index("work"), names.index("Y") if "Y" in names else -1, places, in_work

    def _by_float32(self, form: Callable[P, None], /, *args: P.args, **kwargs: P.kwargs) -> None:
        """Widen what is float16, call the form for float32, round the results back; targets stay as they are."""
        if kwargs:
            args = inspect.signature(self.numpy).bind(*args, **kwargs).args  # type: ignore[assignment]
        work_at, targets_at, places, in_work = self._places
        given: list[Any] = list(args)
        work = given[work_at]
        with Widened(work, *[given[place] for place in places], *map(work.get, in_work)) as wide:
            widened = list(map(wide, given))
            widened[work_at] = wide
            if targets_at >= 0:
                widened[targets_at] = given[targets_at]
            form(*widened)  # type: ignore[call-arg]


def operation(
    *results: str, scratch: Spaces = lambda features: {}, numpy_scratch: Spaces = lambda features: {}
) -> Callable[[Callable[P, None]], Operation[P]]:
    """Make an :class:`Operation` of the function below, its NumPy form."""
    return lambda numpy: Operation(numpy, results, scratch, numpy_scratch)


class Widened(Mapping[str, Array]):
    """float32 copies of float16 arrays for as long as a ``with`` lasts; at its end ``results`` are rounded back.

    As a mapping it is the workspace; called with an array, it gives the copy of it, always the same one. No plan
    counts these copies, of the arrays of one call: so a network of mixed precision runs without a GPU, but is not meant
    to be fast there.
    """

    def __init__(self, work: Work, *results: Array | None) -> None:
        self.work, self.results = work, results
        self.copies: dict[int, tuple[Array, Array]] = {}
        self.quiet = np.errstate(over="ignore", invalid="ignore")  # what is too large for float16 is infinite

    def __call__(self, x: Any) -> Any:
        """The copy of an array of float16; whatever else, as it is."""
        if not isinstance(x, np.ndarray) or x.dtype != HALF:
            return x
        if id(x) not in self.copies:
            self.copies[id(x)] = x, x.astype(WIDE, order="C")
        return self.copies[id(x)][1]

    def __getitem__(self, name: str) -> Array:
        return self(self.work[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.work)

    def __len__(self) -> int:
        return len(self.work)

    def __enter__(self) -> Widened:
        self.quiet.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if error is None:
            for result in self.results:
                if result is not None:
                    result[...] = self(result)
        self.quiet.__exit__(kind, error, at)


def workspace_dtype(wanted: Any, storage: np.dtype[Any]) -> np.dtype[Any]:
    """The dtype of an array of workspace, where None asks for ``storage`` and :data:`COMPUTE` for its arithmetic's."""
    if wanted is None:
        return storage
    return compute_dtype(storage) if isinstance(wanted, str) and wanted == COMPUTE else np.dtype(wanted)
