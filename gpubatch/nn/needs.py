"""What a layer asks of its network, and what the network passes to its calls."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import numpy as np

from gpubatch.backend import Array, Backend
from gpubatch.errors import ArgumentError, DTypeError, check_bool, check_int
from gpubatch.ops import Ops, Products, Space, workspace_dtype

Shape: TypeAlias = tuple[int, ...]
Initializer: TypeAlias = "Callable[[np.random.Generator, Shape], np.ndarray]"  # in quotes: NumPy loads random late


@dataclass(frozen=True)
class Random:
    """Random numbers around zero, normal or uniform, of one variance. Several calls draw the same rows as one for all.

    std: the standard deviation.
    uniform: whether they are uniform, between ±√3 std.
    """

    std: float
    uniform: bool = False

    def __call__(self, draw: np.random.Generator, shape: Shape) -> np.ndarray:
        """The first values of an array."""
        bound = math.sqrt(3) * self.std
        return draw.uniform(-bound, bound, shape) if self.uniform else draw.normal(0, self.std, shape)


@dataclass(frozen=True)
class ByPlace:
    """First values that the network chooses by its loss and the layer's place.

    choose: a function of whether the loss has classes and whether the layer is the last Dense one.
    """

    choose: Callable[[bool, bool], float | Initializer]

    def __call__(self, draw: np.random.Generator, shape: Shape) -> np.ndarray:
        """What a hidden layer under a loss with classes has, for a caller that knows no network."""
        init = self.choose(True, False)
        return init(draw, shape) if callable(init) else np.full(shape, init)


@dataclass(frozen=True)
class Parameter:
    """An array that the network keeps for a layer.

    shape: a tuple of integers.
    init: the first values: a number, or a function ``init(generator, shape)`` that returns a NumPy array.
    l2: whether the l2 term of the loss counts it.

    >>> gb.Parameter((3, 4), init=0.1).shape
    (3, 4)
    """

    shape: Shape
    init: float | Initializer = 0.0
    l2: bool = False

    def __post_init__(self) -> None:
        check_shape("shape", self.shape)
        if not callable(self.init) and not isinstance(self.init, (int, float, np.number)):
            raise DTypeError(f"init must be a number or a function (generator, shape) -> array, got {self.init!r}")
        check_bool("l2", self.l2)


@dataclass(frozen=True)
class Needs:
    """What a layer asks of its network.

    outputs: how many features it gives.
    parameters: arrays that are trained, by name.
    buffers: arrays that are kept but not trained, such as running statistics.
    kept: workspace that lasts from forward to backward, as (shape, dtype) by name; -1 in a shape is the batch size.
    scratch: workspace that lasts for one call.
    uses: names of the operations of ``c.ops`` that it calls on rows of its outputs; the network adds their scratch.
    uses_in_training: the same, of operations that it calls in training steps only.
    reads: which of "x" and "y" backward reads again.
    in_place: whether y may be the same array as x, and dx the same as dy.
    least_rows: the smallest training batch.

    >>> gb.Needs(outputs=4, parameters={"s": gb.Parameter((4,), init=1.0)}, reads=("x",)).outputs
    4
    """

    outputs: int
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    buffers: Mapping[str, Parameter] = field(default_factory=dict)
    kept: Mapping[str, Space] = field(default_factory=dict)
    scratch: Mapping[str, Space] = field(default_factory=dict)
    uses: tuple[str, ...] = ()
    uses_in_training: tuple[str, ...] = ()
    reads: tuple[str, ...] = ("x", "y")
    in_place: bool = False
    least_rows: int = 1

    def __post_init__(self) -> None:
        check_int("outputs", self.outputs, 1)
        for kind in ("parameters", "buffers"):
            for name, p in check_mapping(kind, getattr(self, kind)).items():
                if not isinstance(p, Parameter):
                    raise DTypeError(f"{kind}[{name!r}] must be a gb.Parameter, got {p!r}")
        for kind in ("kept", "scratch"):
            check_spaces(kind, getattr(self, kind))
        if not set(self.reads) <= {"x", "y"}:
            raise ArgumentError(f"reads must be a tuple of 'x', 'y', both or neither, got {self.reads!r}")
        check_bool("in_place", self.in_place)
        check_int("least_rows", self.least_rows, 1)

    def scratch_in(self, ops: Ops, training: bool, strided: bool = False) -> dict[str, Space]:
        """All that lasts for one call: the layer's own, and what the operations it uses need and it does not keep.

        ``strided``: x may be a user's array, which a compiled operation may leave to NumPy.
        """
        used = ops.scratch((*self.uses, *(self.uses_in_training if training else ())), self.outputs, strided)
        return {**{name: space for name, space in used.items() if name not in self.kept}, **self.scratch}


def check_mapping(name: str, given: Any) -> Mapping[str, Any]:
    """``given`` must map names to something."""
    if not isinstance(given, Mapping) or not all(isinstance(key, str) for key in given):
        raise DTypeError(f"{name} must be a mapping by names, got {given!r}")
    return given


def check_spaces(name: str, spaces: Any) -> None:
    """``spaces`` must map names to shapes with dtypes."""
    for key, space in check_mapping(name, spaces).items():
        if not isinstance(space, (tuple, list)) or len(space) != 2 or not isinstance(space[0], (tuple, list)):
            raise DTypeError(f"{name}[{key!r}] must be a pair (shape, dtype), as ((-1, 5), None), got {space!r}")
        check_shape(f"the shape of {name}[{key!r}]", space[0], -1)
        try:
            workspace_dtype(space[1], np.dtype(np.float32))
        except TypeError:
            raise DTypeError(
                f"the dtype of {name}[{key!r}] must be None, 'compute' or NumPy's, got {space[1]!r}"
            ) from None


def check_shape(name: str, shape: Any, low: int = 0) -> None:
    """``shape`` must be a tuple of integers from ``low`` on; -1 is the batch size."""
    if not isinstance(shape, (tuple, list)):
        raise DTypeError(f"{name} must be a tuple of integers, got {shape!r}")
    for i, n in enumerate(shape):
        check_int(f"{name}[{i}]", n, low)


class Together(Protocol):
    """Sums of a layer over ranks, in a step that all of them make; ``rows`` is the total over ranks."""

    rows: int

    def sum(self, x: Array) -> Array:
        """The sum over the ranks of a short float64 array."""


@dataclass
class Mode:
    """How a network runs now: ``training`` or evaluating, and at which training ``step``, counted from 0.

    ``row`` is where the rows of a call begin in the batch: above 0 in a later micro-batch. ``frozen`` has the places of
    the layers whose parameters are not trained. While a batch is computed in parts, a batch norm gives ``statistics``
    its place, how many rows it had, their mean and their variance; if that says True, it leaves its buffers alone.
    With ``together`` a batch norm of ``sync=True`` sums over ranks.
    """

    seed: int
    training: bool = False
    step: int = 0
    row: int = 0
    frozen: frozenset[int] = frozenset()
    statistics: Callable[[int, int, Array, Array], bool] | None = None
    together: Together | None = None


@dataclass(frozen=True)
class Context:
    """What the network passes to a call of a layer or a loss.

    xp: the namespace of the arrays: NumPy's or CuPy's functions.
    ops, products: the fused kernels and the matrix products for them.
    index: the layer's place in the network, from 0.
    mode: ``training``, ``step`` and ``row``.
    p, g: the layer's parameters and their gradients, by the names in its :class:`Needs`; backward overwrites g.
    buffers: its buffers.
    weights: for a loss, what each sample counts, ``(batch,)`` of the dtype "compute"; None where all count 1. The loss
        of the batch is the mean of weights times losses. A weight of 0 leaves a sample out, whatever its scores are.
    work: its workspace, or the one that the loss's ``workspace`` asked for. A loss also finds "offsets" there, where
        each row of scores starts, in int64, and "ticket", for the kernels of a GPU.

    With ``precision="mixed"`` all arrays are float16, except buffers and workspace of the dtype "compute": float32.
    """

    backend: Backend
    xp: Any
    ops: Ops
    index: int
    mode: Mode
    p: Mapping[str, Array]
    g: Mapping[str, Array]
    buffers: Mapping[str, Array]
    work: Mapping[str, Array]
    products: Products
    weights: Array | None = None

    @property
    def gradient(self) -> bool:
        """Whether a loss must write its gradient: while the network trains."""
        return self.mode.training

    @property
    def frozen(self) -> bool:
        """Whether backward may leave out the gradients ``g``, since none of the layer's parameters is trained."""
        return self.index in self.mode.frozen
