"""The core's operations: what a step does besides matrix products."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import numpy as np

from gpubatch.backend import Backend, CudaBackend, compute_dtype
from gpubatch.errors import check_choice
from gpubatch.formula import Activation, ScoreLoss
from gpubatch.ops import dropout as dropping, elementwise, gather as gathering, losses, normalisation, sums
from gpubatch.ops.compile import host_library
from gpubatch.ops.grid import Grid
from gpubatch.ops.host_compiler import place_of
from gpubatch.ops.operation import Operation, Space


class Ops:
    """The operations in one form: on CUDA with a ``grid``, compiled for the CPU with a ``library``, else by NumPy.

    ``half``: for float16 on the CPU. To add an operation: its forms in a file of this package, and a line here.
    """

    activate = elementwise.activate
    activation_gradient = elementwise.activation_gradient
    weigh = losses.weigh
    softmax_cross_entropy = losses.softmax_cross_entropy
    softmax_focal = losses.softmax_focal
    svm = losses.svm
    crammer_singer = losses.crammer_singer
    score_loss = losses.score_loss
    normalise = normalisation.normalise
    batch_norm = normalisation.batch_norm
    batch_norm_gradient = normalisation.batch_norm_gradient
    update_running = normalisation.update_running
    dropout = dropping.dropout
    dropout_gradient = dropping.dropout_gradient
    l2_loss = sums.l2_loss
    l2_gradient = sums.l2_gradient
    square_sum = sums.square_sum
    gather = gathering.gather

    def __init__(self, library: Any = None, grid: Grid | None = None, half: bool = False) -> None:
        self.library, self.grid, self.half = library, grid, half

    @property
    def by_numpy(self) -> bool:
        """Whether NumPy does the work."""
        return self.library is None and self.grid is None

    def form(self, formula: Activation | ScoreLoss, dtype: np.dtype[Any]) -> str:
        """What runs an activation or a score loss on arrays of ``dtype``, in words; it is compiled if it is not yet."""
        if self.grid is not None:
            return "CUDA kernel"
        if self.library is None:
            return f"NumPy: {host_library()}"
        return place_of(self.library, formula, compute_dtype(dtype).name).form

    def scratch(self, names: Iterable[str], features: int, strided: bool = False) -> dict[str, Space]:
        """The scratch of the operations ``names`` on rows of ``features`` numbers, in the forms that will run.

        ``strided``: the arrays may be a user's, which a compiled form may leave to NumPy. Two that want the same name
        share the larger array.
        """
        found: dict[str, Space] = {}
        for name in names:
            operation = OPERATIONS[check_choice("uses", name, OPERATIONS)]
            for space, wanted in operation.scratch(features, operation.numpy_may_do_it(self, strided)).items():
                found[space] = max(found.get(space, wanted), wanted, key=lambda s: s[0])
        return found


OPERATIONS: dict[str, Operation[...]] = {name: x for name, x in vars(Ops).items() if isinstance(x, Operation)}


@functools.cache
def ops_for(backend: Backend, dtype: np.dtype[Any]) -> Ops:
    """The operations for arrays of ``dtype`` on ``backend``."""
    if isinstance(backend, CudaBackend):
        return Ops(grid=Grid(backend, dtype))
    library = host_library()
    return Ops(None if isinstance(library, str) else library, half=dtype == np.float16)
