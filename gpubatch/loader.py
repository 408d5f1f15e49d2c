"""Mini-batches of a set: shuffled, sharded, converted, prepared ahead; the same ones on every device."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import queue
import threading
from collections.abc import Callable, Generator, Mapping
from typing import Any

import numpy as np

from gpubatch.backend import Array, Backend, float_dtype, get_backend
from gpubatch.errors import ArgumentError, DTypeError, ShapeError, check_bool, check_choice, check_int, check_real
from gpubatch.sizing import BatchPlan, choose_batch_size, format_bytes
from gpubatch.sources import ArraySource, array_source, check_finite, convert

__all__ = ["Loader", "epoch_order"]

# From so many elements a batch on, preparing it is worth a thread. Handing a batch over costs 10 to 25 µs; gathering
# takes 0.2 to 0.3 ns an element. Measured on two cores: a thread made bare iteration over batches of 256 x 784 up to
# twice as slow and a consumer no faster; from 2048 x 784 on it hides the gathering (-16 %, and -20 % at 4096 x 784)
# where a core is free, and is neutral (±6 %) where OpenBLAS keeps both cores.
WORTH_A_THREAD = 1 << 20

WORD = 2**64 - 1  # the largest seed and the largest epoch: together they are the key of the generator


def epoch_order(
    n: int, seed: int, epoch: int, shuffle: bool = True, replacement: bool = False
) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """The indices of an epoch's ``n`` samples in the order in which they are used: a function of the arguments alone.

    A permutation; or ``n`` draws with replacement; or 0 … n-1 without ``shuffle``.
    """
    n = check_int("n", n, 1)
    key = np.array([check_int("seed", seed, 0, WORD), check_int("epoch", epoch, 0, WORD)], np.uint64)
    if not check_bool("shuffle", shuffle):
        if check_bool("replacement", replacement):
            raise ArgumentError("replacement=True draws at random, so it needs shuffle=True, got shuffle=False")
        return np.arange(n, dtype=np.int64)
    # The raw words of the counter-based Philox4x64-10 (Salmon et al., 2011) are fixed for good; what NumPy makes of
    # them in shuffle() or permutation() may change from one version to the next.
    words = np.random.Philox(key=key).random_raw(n)
    if check_bool("replacement", replacement):
        return (words % np.uint64(n)).astype(np.int64)
    # Sorting random keys shuffles. Each key ends in the index of its sample: so no two keys are equal, every sorting
    # algorithm gives the same result, stable or not, and the permutation comes with the keys, without an argsort.
    mask = np.uint64((1 << (n - 1).bit_length()) - 1)
    words &= ~mask
    words |= np.arange(n, dtype=np.uint64)
    words.sort()
    words &= mask
    return words.astype(np.int64)


class Loader:
    """Mini-batches on a backend: ``for x, y in loader`` is one epoch; ``for x in loader`` where there is no Y.

    X is (samples, ...) and x (batch, ...); with ``sample_axis=1`` X is (features, samples) and x (features, batch). A
    one-dimensional Y has its samples on axis 0 in either case. Every batch is a new C-contiguous array that may be kept
    or changed. The last batch is short where the batch size does not divide the number of samples; ``drop_last`` leaves
    it out. ``batch_size="auto"`` follows :func:`~gpubatch.sizing.choose_batch_size` with ``at_most``; ``plan`` has the
    reason in words.

    x has ``dtype`` float32 or float64: by default X's own if it is one of these, else float32; ``scale`` multiplies
    after the conversion. Y keeps its element type. X and floating Y must be finite.

    The order is :func:`epoch_order` of ``seed`` and ``epoch``, the same on every device. ``rank`` takes its positions
    rank, rank + world_size, ...: together the ranks see each sample once, and their numbers of samples differ by at
    most one. ``prefetch`` is how many batches a background thread prepares ahead where batches are large (2²⁰ elements
    on the host); smaller ones are not worth a thread: they are prepared in the caller, as all are with ``prefetch=0``.

    ``epoch`` is the epoch that is running, or the next one. An iteration that was left early ends its epoch: the next
    one starts the next epoch from its beginning. ``state_dict`` still has the place where it was left, and
    ``load_state_dict`` returns there. One iteration runs at a time; a second one ends the first.

    >>> loader = Loader(np.eye(5, dtype="float32"), np.arange(5), batch_size=2, backend="cpu")
    >>> [(x.shape, y.shape) for x, y in loader]
    [((2, 5), (2,)), ((2, 5), (2,)), ((1, 5), (1,))]
    """

    def __init__(
        self,
        X: Any,
        Y: Any = None,
        batch_size: int | str = "auto",
        shuffle: bool = True,
        replacement: bool = False,
        seed: int = 0,
        drop_last: bool = False,
        sample_axis: int = 0,
        backend: str | Backend = "auto",
        dtype: Any = None,
        scale: float | None = None,
        prefetch: int = 2,
        rank: int = 0,
        world_size: int = 1,
        at_most: int = 512,
    ) -> None:
        self.shuffle = check_bool("shuffle", shuffle)
        self.replacement = check_bool("replacement", replacement)
        if replacement and not shuffle:
            raise ArgumentError("replacement=True draws at random, so it needs shuffle=True, got shuffle=False")
        self.seed = check_int("seed", seed, 0, WORD)
        self.drop_last = check_bool("drop_last", drop_last)
        self.sample_axis = check_int("sample_axis", sample_axis, 0, 1)
        self.prefetch = check_int("prefetch", prefetch, 0)
        self.world_size = check_int("world_size", world_size, 1)
        self.rank = check_int("rank", rank, 0, self.world_size - 1)
        self.at_most = check_int("at_most", at_most, 1)
        self.automatic = isinstance(batch_size, str)
        if isinstance(batch_size, str):
            check_choice("batch_size, if not an integer,", batch_size, ["auto"])
        else:
            batch_size = check_int("batch_size", batch_size, 1)

        self.backend = get_backend(backend)
        source = array_source("X", X, self.sample_axis, self.backend)
        if source.array.ndim <= self.sample_axis:
            raise ShapeError(f"X must be (features, samples) with sample_axis=1, got shape {source.array.shape}")
        self.source_dtype, self.n_samples = source.dtype, source.n_samples
        if dtype is not None:
            self.dtype = float_dtype(dtype)
        else:
            self.dtype = np.dtype(np.float64 if source.dtype.kind == "f" and source.dtype.itemsize == 8 else np.float32)
        limit = float(np.finfo(self.dtype).max)
        self.scale = None if scale is None else check_real("scale", scale, -limit, limit)
        factor = None if self.scale is None else float(self.dtype.type(self.scale))  # a Python float promotes nothing

        self._columns = [_Column(source, self.dtype, factor, self.backend)]
        if Y is not None:
            labels = array_source("Y", Y, self.sample_axis, self.backend)
            if labels.n_samples != self.n_samples:
                raise ShapeError(
                    f"X and Y must have equal numbers of samples, got X of shape {source.array.shape} with "
                    f"{self.n_samples} along axis {source.axis} and Y of shape {labels.array.shape} with "
                    f"{labels.n_samples} along axis {labels.axis}"
                )
            self._columns.append(_Column(labels, labels.dtype.newbyteorder("="), None, self.backend))
        for column in self._columns:
            check_finite(column.source, column.dtype, column.scale, self.backend)

        if self.n_samples < self.world_size:
            raise ArgumentError(f"world_size must be at most the {self.n_samples} samples, got {self.world_size}")
        self._share = len(range(self.rank, self.n_samples, self.world_size))  # this rank's samples in an epoch
        self._epoch = self._batch = 0  # the position: batches of this epoch that were yielded
        self._run: object | None = None  # the iteration that is running
        self._left = False  # whether the iteration before was left in the middle
        if isinstance(batch_size, str):
            self.plan = self._choose(0, 0)
        elif self.drop_last and batch_size > self._share:
            raise ArgumentError(
                f"drop_last=True leaves no batch: batch_size={batch_size} is more than the {self._share} samples"
            )
        else:
            self.plan = self._given(min(batch_size, self._share), f"batch_size={batch_size} was given")

    # --- sizes --------------------------------------------------------------------------------------------------

    @property
    def labelled(self) -> bool:
        """Whether batches are pairs (x, y)."""
        return len(self._columns) > 1

    @property
    def batch_size(self) -> int:
        """Samples in a batch; the last one of an epoch may have fewer."""
        return self.plan.batch_size

    def __len__(self) -> int:
        """Batches in an epoch of this rank."""
        return self._share // self.batch_size if self.drop_last else -(-self._share // self.batch_size)

    def replan(self, bytes_per_sample: int, fixed_bytes: int) -> BatchPlan:
        """Choose the batch size again, with a model's ``bytes_per_sample`` and ``fixed_bytes`` beside the loader's own.

        Only for ``batch_size="auto"``, and not in the middle of an epoch.
        """
        if not self.automatic:
            raise ArgumentError(f"replan needs batch_size='auto', this loader's is decided: {self.batch_size}")
        if self._run is not None:
            raise ArgumentError(f"replan must come between epochs, epoch {self._epoch} is at batch {self._batch}")
        plan = self._choose(check_int("bytes_per_sample", bytes_per_sample, 0), fixed_bytes)
        self._epoch, self._batch, self._left = self.epoch, 0, False
        self.plan = plan
        return plan

    def _choose(self, bytes_per_sample: int, fixed_bytes: int) -> BatchPlan:
        # By the largest rank's share, so that every rank of equal devices decides alike.
        share = -(-self.n_samples // self.world_size)
        per_sample = bytes_per_sample + self._bytes_per_sample()
        plan = choose_batch_size(share, per_sample, fixed_bytes, self.backend.memory(), self.at_most)
        return dataclasses.replace(plan, batch_size=min(plan.batch_size, self._share))

    def _given(self, batch_size: int, reason: str) -> BatchPlan:
        needed = batch_size * self._bytes_per_sample()
        reason += "" if batch_size < self._share else f", and all {self._share} samples are one batch"
        return BatchPlan(
            batch_size, f"{reason}; its batches need {format_bytes(needed)}", needed, self.backend.memory().available
        )

    def _bytes_per_sample(self) -> int:
        """The loader's buffers on the device: the batch in use, the one that replaces it, and those prepared ahead."""
        ahead = self.prefetch if self.backend.name == "cpu" else 0  # what waits for a GPU waits in main memory
        converted = sum(column.source.bytes_per_sample(column.dtype) for column in self._columns)
        stored = sum(column.source.bytes_per_sample(column.source.dtype) for column in self._columns)
        return (2 + ahead) * converted + stored

    # --- one epoch ----------------------------------------------------------------------------------------------

    @property
    def epoch(self) -> int:
        """The number of the epoch that is running, or else of the next one, counted from 0."""
        return self._epoch + self._left

    def __iter__(self) -> Generator[Any]:
        if self._left or (self._run is not None and self._batch):
            self._epoch, self._batch = self._epoch + 1, 0
        run = self._run = object()
        self._left = False
        try:
            order = epoch_order(self.n_samples, self.seed, self._epoch, self.shuffle, self.replacement)
            size = self.batch_size
            starts = range(self._batch * size, len(self) * size, size)
            with contextlib.closing(self._prepared(order[self.rank :: self.world_size], starts)) as prepared:
                for parts in prepared:
                    batch = self._deliver(parts)
                    self._batch += 1
                    yield batch
                    del parts, batch  # so that they can be freed before the next ones are made
                    if self._run is not run:
                        raise ArgumentError("this iteration was ended by a newer one, or by load_state_dict")
            self._epoch, self._batch = self._epoch + 1, 0
        finally:
            if self._run is run:
                self._run, self._left = None, self._batch > 0

    def _prepared(self, order: Array, starts: range) -> Generator[list[Array]]:
        columns, size = self._columns, self.batch_size

        def prepare(start: int) -> list[Array]:
            index = order[start : start + size]
            return [column.prepare(index) for column in columns]

        on_host = sum(math.prod(column.source.sample_shape) for column in columns if column.source.on_host)
        if self.prefetch and size * on_host >= WORTH_A_THREAD:
            return _prepare_ahead(prepare, starts, self.prefetch)
        return (prepare(start) for start in starts)

    def _deliver(self, prepared: list[Array]) -> Any:
        arrays = [column.deliver(part) for column, part in zip(self._columns, prepared, strict=True)]
        return tuple(arrays) if len(arrays) > 1 else arrays[0]

    def peek(self) -> Any:
        """The first batch of epoch ``epoch``, as an iteration would yield it; the position stays as it is."""
        order = epoch_order(self.n_samples, self.seed, self.epoch, self.shuffle, self.replacement)
        index = order[self.rank :: self.world_size][: self.batch_size]
        return self._deliver([column.prepare(index) for column in self._columns])

    def to_batch(self, X: Any, name: str = "X") -> Array:
        """``X``, samples of the same shape, as the loader would yield them; what fit does to the validation set.

        An array of the source's dtype is converted and scaled. One that has the dtype of the batches already, where the
        source's is another, is taken as it is. Where nothing is to be done the result is ``X`` itself. Anything else is
        a ``DTypeError``.
        """
        x = self._columns[0]
        source = array_source(name, X, self.sample_axis, self.backend)
        if source.axis != x.source.axis or source.sample_shape != x.source.sample_shape:
            raise ShapeError(
                f"{name} must have samples of shape {x.source.sample_shape} along axis {x.source.axis}, as the "
                f"loader's X has, got shape {source.array.shape}"
            )
        if source.dtype not in (self.source_dtype, self.dtype):
            raise DTypeError(
                f"{name} must have the loader's source dtype {self.source_dtype}, to be converted, or its batch dtype "
                f"{self.dtype}, to be taken as it is, got {source.dtype}"
            )
        scale = x.scale if source.dtype == self.source_dtype else None
        check_finite(source, self.dtype, scale, self.backend)
        with self.backend.scope():
            return convert(self.backend.asarray(source.array), self.dtype, scale)

    # --- state --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The position and what decides the batches, as JSON can hold it; ``batch`` counts those that were yielded."""
        complete = self._batch == len(self)
        return {
            "seed": self.seed,
            "epoch": self._epoch + complete,
            "batch": 0 if complete else self._batch,
            "batch_size": self.batch_size,
            "n_samples": self.n_samples,
            "shuffle": self.shuffle,
            "replacement": self.replacement,
            "drop_last": self.drop_last,
            "rank": self.rank,
            "world_size": self.world_size,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to the position of ``state``: the next iteration goes on with the batch that would have come next.

        A loader that would give other batches refuses it. With ``batch_size="auto"`` the state's batch size is taken.
        """
        if not isinstance(state, Mapping):
            raise DTypeError(f"state must be a mapping from state_dict(), got {type(state).__name__}")
        own = self.state_dict()
        if wrong := sorted(set(own) ^ set(state)):
            raise ArgumentError(f"state must have the keys {', '.join(own)}; missing or unknown: {', '.join(wrong)}")
        position = ("epoch", "batch", "batch_size") if self.automatic else ("epoch", "batch")
        for name in own:
            if name not in position and state[name] != own[name]:
                raise ArgumentError(f"state has {name}={state[name]!r}, this loader {name}={own[name]!r}")
        epoch = check_int("state['epoch']", state["epoch"], 0, WORD)
        batch_size = check_int("state['batch_size']", state["batch_size"], 1, self._share)
        batches = self._share // batch_size if self.drop_last else -(-self._share // batch_size)
        batch = check_int("state['batch']", state["batch"], 0, batches - 1)
        if batch_size != self.batch_size:
            self.plan = self._given(batch_size, f"batch_size={batch_size} was taken from a saved state")
        self.automatic = False  # it is decided: another size would make other batches of the epoch
        self._epoch, self._batch, self._run, self._left = epoch, batch, None, False

    def __repr__(self) -> str:
        x = self._columns[0].source
        order = "drawn with replacement" if self.replacement else "shuffled" if self.shuffle else "in order"
        conversion = f"{x.dtype} as {self.dtype}" + ("" if self.scale is None else f" times {self.scale:.6g}")
        shard = "" if self.world_size == 1 else f", rank {self.rank} of {self.world_size}"
        labels = "" if len(self._columns) == 1 else f" with labels {self._columns[1].source.dtype}"
        return (
            f"<Loader of {self.n_samples} samples {x.sample_shape} {conversion}{labels}: {len(self)} batches of "
            f"{self.batch_size} an epoch, {order}, on {self.backend.spec}{shard}>"
        )


@dataclasses.dataclass(frozen=True, eq=False)
class _Column:
    """One of the arrays of a batch: its source, and what is made of it.

    ``prepare`` is the host's work and may run in another thread. ``deliver`` is the device's and runs in the caller's,
    hence in the order of the caller's CUDA stream.
    """

    source: ArraySource
    dtype: np.dtype[Any]
    scale: float | None
    backend: Backend

    def prepare(self, index: Array) -> Array:
        if self.backend.owns(self.source.array):
            return self._gather(index) if self.backend.name == "cpu" else index
        return self.source.take(index)  # stored values are smaller to copy to the device than converted ones

    def deliver(self, prepared: Array) -> Array:
        if self.backend.name == "cpu":
            return prepared
        with self.backend.scope():
            on_device = self.backend.asarray(prepared)
            if self.backend.owns(self.source.array):
                return self._gather(on_device)
            return convert(on_device, self.dtype, self.scale)

    def _gather(self, index: Array) -> Array:
        return self.source.gather(index, self.dtype, self.scale, self.backend)


def _prepare_ahead(prepare: Callable[[int], list[Array]], starts: range, depth: int) -> Generator[list[Array]]:
    """``prepare`` of every start in turn, up to ``depth`` of them ahead of the caller, in a thread of its own.

    What ``prepare`` raises is raised here. The thread ends with the generator, also when that is closed or collected.
    """
    ready: queue.SimpleQueue[tuple[list[Array], BaseException | None]] = queue.SimpleQueue()
    room = threading.Semaphore(depth)
    stop = threading.Event()

    def work() -> None:
        try:
            for start in starts:
                room.acquire()
                if stop.is_set():
                    return
                ready.put((prepare(start), None))
        except BaseException as error:  # whatever it is, it belongs to the caller
            ready.put(([], error))

    thread = threading.Thread(target=work, name="gpubatch-loader", daemon=True)
    thread.start()
    try:
        for _ in starts:
            parts, error = ready.get()
            room.release()
            if error is not None:
                raise error
            yield parts
            del parts  # before waiting for the next ones
    finally:
        stop.set()
        room.release()
        if thread is not threading.current_thread():  # garbage collection may run this in any thread
            thread.join()
