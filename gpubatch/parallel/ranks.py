"""The processes of a data-parallel run, and a sum over them that has the same bits with every MPI library."""

from __future__ import annotations

import json
import sys
import traceback
import weakref
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, NoReturn, Self

import numpy as np

from gpubatch.backend import Array, Backend, CudaBackend, backend_of
from gpubatch.errors import ArgumentError, DTypeError, ShapeError, check_bool
from gpubatch.parallel.engines import MPI, Threads, connected, threads
from gpubatch.parallel.nccl import Nccl

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
    library such as ``pip install mpich``. Raises ImportError if a launcher started several and these are missing, and
    ArgumentError if MPI connects fewer than it started, which would train apart.

    :meth:`close`, or the end of a ``with``, frees the communicators. Those of ranks that nobody holds any more are
    freed when all processes make others.

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
        self._pieces = dict[str, Array]()  # scratch memory of sums, by device
        self._agreed = dict[str, int]()  # the bytes of it that all ranks have allocated
        self._nccl = dict[str, Nccl]()
        if isinstance(engine, MPI):
            weakref.finalize(self, engine.leave)
        if self.size > 1 and not isinstance(engine, Threads):
            self._end_all_on_error()

    @classmethod
    def of_threads(cls, size: int, exact: bool = True) -> list[Ranks]:
        """So many ranks for as many threads of this process, to try a data-parallel program out without MPI."""
        return [cls(engine, exact) for engine in threads(size)]

    def __repr__(self) -> str:
        return f"Ranks(rank={self.rank}, size={self.size}, {self.connection})"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        # A rank that an error ends does not wait for the others here: it ends them.
        if error is None:
            self.close()

    def close(self) -> None:
        """Free the communicators. Collective; the ranks cannot be used afterwards."""
        if isinstance(self._engine, MPI):
            self._engine.close()
        if self._engine is not None:
            closed: Any = Closed()
            self._engine = closed
        self._pieces.clear()
        self._nccl.clear()

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

        Raises MemoryError on all ranks where one of them lacks the memory to work in.
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
            if (needed := self.sum_bytes(flat.size, flat.dtype)) > self._agreed.get(backend.spec, 0):
                self.allocate(lambda: self.reserve(backend, flat.size, flat.dtype))
                self._agreed[backend.spec] = needed
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
        """The bytes of scratch memory that :meth:`sum_` keeps for arrays of ``size`` elements."""
        if self.size == 1 or not self.exact:
            return 0
        row = int(np.dtype(dtype).itemsize) * self.size
        return row * (size if row * size <= SMALL else -(-size // self.size) + ALIGNED)

    def reserve(self, backend: Backend, size: int, dtype: Any) -> None:
        """Allocate the scratch memory of :meth:`sum_` for such arrays, unless it is there already. Not collective."""
        self._scratch(backend, np.dtype(np.uint8), -(-self.sum_bytes(size, dtype) // self.size))

    def allocate(self, make: Callable[[], object]) -> None:
        """Call ``make`` on each rank; raise MemoryError on all where one of them lacks the memory for it."""
        lacking: MemoryError | None = None
        try:
            make()
        except MemoryError as error:
            lacking = error.with_traceback(None)  # which would keep arrays alive
        every = np.zeros(self.size)
        if self._engine is not None:
            # Messages as a sum's: arrays of different sizes, of which some ranks come here, are then found out.
            self._engine.gather(np.array([lacking is not None], np.float64), every, [*range(self.size + 1)])
        if lacking is not None:
            raise lacking
        if every.any():
            raise MemoryError(f"out of memory (on rank {every.argmax()})")

    def most(self, values: Sequence[float]) -> list[float]:
        """The largest over the ranks of each of a few numbers, on all ranks; the least are the negatives of these.

        Raises ArgumentError on all ranks where a value of one of them is NaN.
        """
        found = np.array([*values, 0], np.float64)  # the last is the rank that has NaN, plus 1
        if np.isnan(found).any():
            found[...] = 0
            found[-1] = self.rank + 1
        if self._engine is not None:
            self._engine.most(found)
        if of := int(found[-1]):
            given = f", got {values!r}" if of - 1 == self.rank else ""
            raise ArgumentError(f"values must be a list of numbers and not NaN, which rank {of - 1} has{given}")
        return list(found[:-1].tolist())

    def share(self, value: Any) -> Any:
        """Broadcast the value of rank 0, anything that JSON can hold; the other ranks' values are ignored."""
        if self._engine is None:
            return value
        return _decoded(self._engine.share(_encoded(value) if self.rank == 0 else b""), 0)

    def gather(self, value: Any) -> list[Any]:
        """Gather the values of all ranks, ordered by rank, on every rank: anything that JSON can hold."""
        data = np.frombuffer(_encoded(value), np.uint8)
        if self._engine is None:
            return [_decoded(data.tobytes(), 0)]
        sizes = np.empty(self.size, np.int64)
        self._engine.gather(np.array([data.size]), sizes, [*range(self.size + 1)])
        cuts = [0, *sizes.cumsum().tolist()]
        texts = np.empty(cuts[-1], np.uint8)
        self._engine.gather(data, texts, cuts)
        return [_decoded(texts[cuts[rank] : cuts[rank + 1]].tobytes(), rank) for rank in range(self.size)]

    def barrier(self) -> None:
        """Wait until every rank has called this."""
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
        """An array with a row of ``size`` elements for each rank; valid until the next call."""
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


def first_of(ranks: Ranks | None, value: Any) -> tuple[int, Any] | None:
    """The first rank that has a ``value``, and that value; None where all have None. All ranks call it at one place."""
    every = [value] if ranks is None else ranks.gather(value)
    return next(((rank, theirs) for rank, theirs in enumerate(every) if theirs is not None), None)


def check_ranks(ranks: Any) -> Ranks | None:
    """The argument ``ranks`` of loaders and runs."""
    if ranks is not None and not isinstance(ranks, Ranks):
        raise DTypeError(f"ranks must be a gpubatch.Ranks or None, got {type(ranks).__name__}")
    return ranks


class _Hook:
    """A ``sys.excepthook`` that shows an uncaught exception as before, then ends all ranks."""

    def __init__(self, ranks: Ranks, shown: Any) -> None:
        self._ranks, self._shown = ranks, shown

    def end(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        """Show the exception, and end all ranks."""
        self._shown(kind, error, trace)
        self._ranks.abort(error)


class Closed:
    """The engine of closed ranks: every use of it raises."""

    name = "closed"

    def __getattr__(self, name: str) -> NoReturn:
        raise ArgumentError("ranks must not be used after close(), or after the end of their with")


def _encoded(value: Any) -> bytes:
    """``value`` as JSON, or "!" and the reason why not, since the other ranks wait for a message."""
    try:
        return json.dumps(value).encode()
    except (TypeError, ValueError, RecursionError) as error:
        return f"!value must be what JSON can hold, got {value!r} ({error})".encode(errors="replace")


def _decoded(data: bytes, rank: int) -> Any:
    """The value that :func:`_encoded` wrote on a rank; DTypeError if JSON could not hold it."""
    if data.startswith(b"!"):
        raise DTypeError(f"{data[1:].decode()}, on rank {rank}")
    return json.loads(data)


def _tree(rows: Array) -> Array:
    """Sum the rows into the first one, as a binary tree of neighbours."""
    for level in range((len(rows) - 1).bit_length()):
        step = 1 << level
        for left in range(0, len(rows) - step, 2 * step):
            rows[left] += rows[left + step]
    return rows[0]
