"""The processes of a data-parallel run, and a sum over them that has the same bits with every MPI library."""

from __future__ import annotations

import itertools
import json
import sys
import traceback
from collections.abc import Sequence
from types import TracebackType
from typing import Any, NoReturn

import numpy as np

from gpubatch.backend import Array, Backend, CudaBackend, backend_of
from gpubatch.errors import ArgumentError, DTypeError, ShapeError, check_bool
from gpubatch.parallel.engines import Threads, connected, threads
from gpubatch.parallel.nccl import Nccl

__all__ = ["Ranks"]

ALIGNED = 16  # elements at which large arrays are cut
SMALL = 1 << 15  # bytes up to which everything is sent to everybody, in one message instead of two


class Ranks:
    """The processes that train one network together, each on its part of every batch.

    comm: a communicator of mpi4py. By default all processes that ``mpiexec``, ``srun`` or the like started, and without
        a launcher this process alone, which needs no MPI.
    exact: whether sums have the same bits with every MPI library, and with every number of ranks that divides the
        shards of a batch into powers of two. False takes the library's own sum, which may be faster.

    ``rank`` counts from 0, ``size`` is how many there are, and ``local`` the place among those on the same machine, by
    which each chooses its GPU. All ranks must call the methods in the same order, all but :meth:`abort`.

    An exception that nobody catches on one rank ends all of them, with a message that says which rank and why:
    otherwise they would wait for it for ever. Several processes need the extra ``parallel`` (mpi4py), and an MPI
    library such as ``pip install mpich``. Raises ImportError if a launcher started several and these are missing.

    >>> ranks = gb.Ranks()
    >>> ranks.rank, ranks.size
    (0, 1)
    >>> ranks.sum_(np.ones(3, np.float32))
    array([1., 1., 1.], dtype=float32)
    """

    def __init__(self, comm: Any = None, exact: bool = True) -> None:
        self.exact = check_bool("exact", exact)
        self._engine = engine = comm if isinstance(comm, Threads) else connected(comm)
        self.rank, self.size, self.local = (engine.rank, engine.size, engine.local) if engine else (0, 1, 0)
        self._pieces = dict[str, Array]()  # that sums work in, by the device
        self._nccl = dict[str, Nccl]()
        if self.size > 1 and not isinstance(engine, Threads):
            self._end_all_on_error()

    @classmethod
    def of_threads(cls, size: int, exact: bool = True) -> list[Ranks]:
        """So many ranks for as many threads of this process, to try a data-parallel program out without MPI."""
        return [cls(engine, exact) for engine in threads(size)]

    def __repr__(self) -> str:
        return f"Ranks(rank={self.rank}, size={self.size}, {self.connection})"

    @property
    def connection(self) -> str:
        """What connects the ranks, in words."""
        return self._engine.name if self._engine else "one process"

    def sum_(self, flat: Array) -> Array:
        """Sum an array over the ranks, in place, and return it: the same bits on all of them.

        Element by element it is a binary tree of neighbours, ((0 + 1) + (2 + 3)) + ..., whatever the MPI library. CuPy
        arrays are summed by NCCL, which needs a GPU for each rank; the first sum connects them. It is work of the
        current stream, and can be captured after a sum of an array that is no smaller.

        flat: contiguous, one-dimensional, float32 or float64, of the same size on all ranks.
        """
        backend = backend_of(flat)
        if flat.dtype not in (np.float32, np.float64):
            raise DTypeError(f"flat must be float32 or float64, got {flat.dtype}")
        if flat.ndim != 1 or not flat.flags.c_contiguous:
            raise ShapeError(f"flat must be contiguous and one-dimensional, got shape {flat.shape}")
        if self._engine is None or self.size == 1:
            return flat
        with backend.scope():
            by = self._nccl_on(backend) if isinstance(backend, CudaBackend) else self._engine
            if not self.exact:
                by.sum_(flat)
            elif flat.nbytes * self.size <= SMALL:
                rows = self._scratch(backend, flat.dtype, flat.size)
                by.gather(flat, rows.reshape(-1), [flat.size * rank for rank in range(self.size + 1)])
                flat[...] = _tree(rows)
            else:
                cuts = [flat.size * rank // self.size // ALIGNED * ALIGNED for rank in range(self.size)] + [flat.size]
                rows = self._scratch(backend, flat.dtype, cuts[self.rank + 1] - cuts[self.rank])
                by.scatter(flat, cuts, rows)
                by.gather(_tree(rows), flat, cuts)
        return flat

    def sum_bytes(self, size: int, dtype: Any) -> int:
        """The bytes that :meth:`sum_` works in, and keeps, for arrays of so many elements."""
        if self.size == 1 or not self.exact:
            return 0
        row = int(np.dtype(dtype).itemsize) * self.size
        return row * (size if row * size <= SMALL else -(-size // self.size) + ALIGNED)

    def reserve(self, backend: Backend, size: int, dtype: Any) -> None:
        """Allocate what :meth:`sum_` works in for such arrays, unless it is there already; each rank by itself."""
        self._scratch(backend, np.dtype(np.uint8), -(-self.sum_bytes(size, dtype) // self.size))

    def most(self, values: Sequence[float]) -> list[float]:
        """The largest over the ranks of each of a few numbers, on all ranks; the least are the negatives of these."""
        found = np.array(values, np.float64)
        if found.ndim != 1 or np.isnan(found).any():
            raise ArgumentError(f"values must be a list of numbers and not NaN, got {values!r}")
        if self._engine is not None:
            self._engine.most(found)
        return list(found.tolist())

    def share(self, value: Any) -> Any:
        """What rank 0 gave, on all ranks: anything that JSON can hold. What the others gave is not looked at."""
        if self._engine is None:
            return value
        return json.loads(self._engine.share(_encoded(value) if self.rank == 0 else b""))

    def gather(self, value: Any) -> list[Any]:
        """What each rank gave, by rank, on all of them: anything that JSON can hold."""
        data = np.frombuffer(_encoded(value), np.uint8)
        if self._engine is None:
            return [json.loads(data.tobytes())]
        sizes = np.empty(self.size, np.int64)
        self._engine.gather(np.array([data.size]), sizes, [*range(self.size + 1)])
        cuts = [0, *sizes.cumsum().tolist()]
        texts = np.empty(cuts[-1], np.uint8)
        self._engine.gather(data, texts, cuts)
        return [json.loads(texts[start:stop].tobytes()) for start, stop in itertools.pairwise(cuts)]

    def barrier(self) -> None:
        """Wait until all ranks are here."""
        if self._engine is not None:
            self._engine.barrier()

    def abort(self, error: BaseException | str) -> NoReturn:
        """End all ranks at once, with exit code 1, and say on stderr which rank ended them and why."""
        what = error if isinstance(error, str) else "".join(traceback.format_exception_only(error)).strip()
        why = f"gpubatch: rank {self.rank} of {self.size} ended all: {what}"
        print(why, file=sys.stderr, flush=True)
        if self._engine is not None:
            self._engine.abort(why)
        raise SystemExit(1)

    def owned(self, backend: Backend) -> Any:
        """The objects that a graph with sums on this device works with: keep them as long as the graph."""
        return self._nccl.get(backend.spec), self._pieces.get(backend.spec)

    def _nccl_on(self, backend: CudaBackend) -> Nccl:
        """The connection of the ranks' devices, made on first use, on all of them at once."""
        assert self._engine is not None
        if backend.spec not in self._nccl:
            self._nccl[backend.spec] = Nccl(self._engine, backend, self.gather)
        return self._nccl[backend.spec]

    def _scratch(self, backend: Backend, dtype: np.dtype[Any], size: int) -> Array:
        """An array of a row of ``size`` for each rank; valid until the next call."""
        needed = self.size * size * dtype.itemsize
        pieces = self._pieces.get(backend.spec)
        if pieces is None or pieces.size < needed:
            pieces = self._pieces[backend.spec] = backend.empty(needed, np.uint8)
        return pieces[:needed].view(dtype).reshape(self.size, size)

    def _end_all_on_error(self) -> None:
        """Make an exception that ends this process end the other ranks too, which would wait for it."""
        shown = sys.excepthook
        if isinstance(getattr(shown, "__self__", None), _Hook):
            return
        sys.excepthook = _Hook(self, shown).end


class _Hook:
    """What Python calls at an exception that nobody caught: it is shown as before, then all ranks end."""

    def __init__(self, ranks: Ranks, shown: Any) -> None:
        self._ranks, self._shown = ranks, shown

    def end(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        """Show the exception, and end all ranks."""
        self._shown(kind, error, trace)
        self._ranks.abort(error)


def _encoded(value: Any) -> bytes:
    """``value`` as JSON."""
    try:
        return json.dumps(value).encode()
    except (TypeError, ValueError) as error:
        raise DTypeError(f"value must be what JSON can hold, got {value!r} ({error})") from error


def _tree(rows: Array) -> Array:
    """The sum of the rows, as a binary tree of neighbours; it lies in the first of them."""
    for level in range((len(rows) - 1).bit_length()):
        step = 1 << level
        for left in range(0, len(rows) - step, 2 * step):
            rows[left] += rows[left + step]
    return rows[0]
