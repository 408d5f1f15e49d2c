"""The validation set of a run: taken in whichever form it was given, checked whole, and evaluated."""

from __future__ import annotations

import contextlib
import itertools
import numbers
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np

from gpubatch.backend import Array
from gpubatch.errors import ArgumentError, DTypeError, GpubatchError, InsufficientMemoryError, UnscaledWarning
from gpubatch.inputs import Prepared, check_columns
from gpubatch.loader import Columns, Epochs, Loader, columns_like, converted, epochs_of, rows_of
from gpubatch.nn import EVALUATION_ROWS, Network, core_of
from gpubatch.sources import is_read
from gpubatch.train.record import warn_caller

# X, Y, and the weights of Network.evaluate by the names of its arguments.
Batch: TypeAlias = tuple[Array, Array, Mapping[str, Array]]
FORMS = (
    "a pair (X, Y) of arrays, sources or paths, arrays (X, Y, weight), a source of pairs, a Table, a Loader, or a "
    "fraction between 0 and 1"
)


class HeldOut(Protocol):
    """A validation set."""

    @property
    def samples(self) -> int:
        """How many samples there are."""

    @property
    def copied(self) -> int:
        """Bytes that were allocated for it."""

    @property
    def batch_bytes(self) -> int:
        """Bytes that are allocated while it is evaluated, besides the network's."""

    def first(self) -> Batch:
        """The first of the batches."""

    def batches(self, rank: int = 0, size: int = 1) -> contextlib.AbstractContextManager[Iterator[Batch]]:
        """X, Y and weights as the network takes them, in one batch or in several, always the same.

        Each of ``size`` ranks has neighbouring batches.
        """


class InMemory(NamedTuple):
    """Arrays that the network takes as they are, ``rows`` at a time."""

    X: Array
    Y: Array
    weights: Mapping[str, Array]
    copied: int
    rows: int = sys.maxsize

    @property
    def samples(self) -> int:
        """See :class:`HeldOut`."""
        return len(self.X)

    @property
    def batch_bytes(self) -> int:
        """See :class:`HeldOut`."""
        return 0

    def first(self) -> Batch:
        """See :class:`HeldOut`."""
        return self._some(slice(EVALUATION_ROWS))

    def _some(self, some: slice) -> Batch:
        return self.X[some], self.Y[some], {name: weight[some] for name, weight in self.weights.items()}

    @contextlib.contextmanager
    def batches(self, rank: int = 0, size: int = 1) -> Iterator[Iterator[Batch]]:
        """See :class:`HeldOut`."""
        own = share_of(-(-len(self.X) // self.rows), rank, size)
        yield (self._some(slice(i * self.rows, (i + 1) * self.rows)) for i in own)


class HeldOutBatches:
    """Samples that are read, converted and moved batch by batch, in order, however many there are.

    The batches are those of ``epochs``, or of a loader with an iteration of its own; class weights are those of
    ``weighted_by``.
    """

    copied = 0

    def __init__(self, epochs: Epochs, weighted_by: Columns, loader: Loader | None = None) -> None:
        self._epochs, self._weighted_by, self._loader = epochs, weighted_by, loader

    @property
    def samples(self) -> int:
        """See :class:`HeldOut`."""
        return self._epochs.order.share

    @property
    def batch_bytes(self) -> int:
        """See :class:`HeldOut`."""
        return self._epochs.plan.needed

    def first(self) -> Batch:
        """See :class:`HeldOut`."""
        return self._batch(self._epochs.peek())

    def _batch(self, arrays: Sequence[Array]) -> Batch:
        X, Y, *weights = arrays
        return X, Y, self._weighted_by.weighting.of_batch(Y, *weights)

    @contextlib.contextmanager
    def batches(self, rank: int = 0, size: int = 1) -> Iterator[Iterator[Batch]]:
        """See :class:`HeldOut`. The number of batches of an iterator is unknown, so rank 0 evaluates all of them."""
        if self._loader is None:
            own, most = share_of(len(self._epochs), rank, size), sys.maxsize
            if size > 1:
                most, first = len(own), own.start if own else 0
                self._epochs.load_state_dict({**self._epochs.state_dict(), "epoch": 0, "batch": first})
            found = self._epochs.batches(self._epochs.columns.as_rows)
        else:
            self._loader.load_state_dict({**self._loader.state_dict(), "epoch": 0, "batch": 0})
            found, most = rows_of(self._loader), 0 if rank else sys.maxsize
        with contextlib.closing(found) as batches:  # ends the loader's thread
            yield map(self._batch, itertools.islice(batches, most))


def share_of(count: int, rank: int, size: int) -> range:
    """The range of ``count`` items that one rank gets: neighbours."""
    return range(count * rank // size, count * (rank + 1) // size)


@contextlib.contextmanager
def validated(net: Network, loader: Loader, validation: Any, rank: int = 0, size: int = 1) -> Iterator[HeldOut | None]:
    """The validation set that ``fit`` was given; of a fraction, the loader leaves it out meanwhile.

    Each of ``size`` ranks checks its share.
    """
    epochs = epochs_of(loader)
    held_out: HeldOut | None = None
    with contextlib.ExitStack() as stack:
        if is_fraction(validation):
            held = stack.enter_context(epochs.holding_out(float(validation), EVALUATION_ROWS))
            held_out = HeldOutBatches(held, epochs.columns)
        elif validation is not None:
            with about_validation(), net.backend.scope():
                held_out = held_out_of(net, loader, validation)
        if held_out is not None:
            check_held_out(net, held_out, rank, size)
        yield held_out


def check_held_out(net: Network, held_out: HeldOut, rank: int, size: int) -> None:
    """Raise unless the network takes every batch of one rank's share."""
    with about_validation(), net.backend.scope(), held_out.batches(rank, size) as batches:
        for X, Y, weights in batches:
            core_of(net).batches.check(X, Y)
            for weight in weights.values():
                core_of(net).batches.check(X, Y, weight=weight)
            core_of(net).loss.check_values(Y, net.outputs)


def held_out_of(net: Network, loader: Loader, validation: Any) -> HeldOut:
    """The validation set that is not a part of the training set."""
    columns, weight = epochs_of(loader).columns, None
    if isinstance(validation, Loader):
        warn_if_prepared_otherwise(columns, epochs_of(validation).columns)
        return held_out_of_loader(net, validation)
    if isinstance(validation, Prepared):
        validation = columns.apart(validation, name="validation")
        validation = validation[0] if validation[1] is None else validation
    if is_large(validation) and not isinstance(validation, (tuple, list)):
        X, Y = validation, None
    elif isinstance(validation, (tuple, list)) and len(validation) == 2:
        X, Y = validation
    elif isinstance(validation, (tuple, list)) and len(validation) == 3:
        X, Y, weight = validation
    else:
        words = f"{len(validation)} items" if isinstance(validation, (tuple, list)) else type(validation).__name__
        raise DTypeError(f"validation must be {FORMS}, got {words}")
    if Y is None and not is_large(X):
        raise DTypeError("validation must be a pair (X, Y), got None for Y")
    if is_large(X) or is_large(Y):
        if weight is not None:
            raise ArgumentError("validation must be arrays where it has weights, or a Loader with weight=")
        other = columns_like(columns, X, Y)
        if not other.labelled:
            raise ArgumentError("validation must have labels, as (source, Y); this source gives X alone")
        return HeldOutBatches(Epochs.of_columns(other, EVALUATION_ROWS), columns)
    names = ("validation[0]", "validation[1]")
    x, y = converted(columns, X, Y, names, EVALUATION_ROWS)
    copied = sum(new.nbytes for new, given in ((x, X), (y, Y)) if new is not given)
    weights = columns.weighting.of_set(Y, weight, columns[1].axis)
    copied += sum(array.nbytes for array in weights.values())
    X, Y = columns.functions.turn(x), columns.functions.turn(y)  # rows, as a network takes them
    # Where a batch has shards, the numbers are the same on any number of ranks: those of parts of a fixed size.
    return InMemory(X, Y, weights, copied, sys.maxsize if loader.shards is None else EVALUATION_ROWS)


def warn_if_prepared_otherwise(training: Columns, other: Columns) -> None:
    """Warn of a validation Loader that lacks what the loader does to its samples, or does what that one does not."""
    check_columns("validation", other.names.X, training.names.X)
    check_columns("the labels of validation", other.names.Y, training.names.Y)
    for name in ("prepare", "scale", "recipe"):
        own, its = getattr(training, name), getattr(other, name)
        if name == "prepare":  # whether two functions do the same, nobody can tell
            own, its = own is not None, its is not None
        if own == its or (name == "scale" and training.source_dtype != other.source_dtype):
            continue
        what = {"prepare": f"has {'a' if its else 'no'} prepare", "scale": f"has scale={its}"}
        warn_caller(
            f"validation is a Loader that {what.get(name, 'is not of the table of training')}, unlike the loader: the "
            "network is validated on samples that are prepared otherwise than those it is trained on",
            UnscaledWarning,
        )


def held_out_of_loader(net: Network, loader: Loader) -> HeldOut:
    """All samples of a loader in order, not augmented; or its own iteration where a subclass has one."""
    epochs = epochs_of(loader)
    if loader.backend != net.backend or loader.dtype != net.dtype:
        raise ArgumentError(
            f"validation must be a Loader of {net.dtype} on {net.backend.spec!r}, as net is; this one makes "
            f"{loader.dtype} on {loader.backend.spec!r}"
        )
    if not epochs.columns.labelled:
        raise ArgumentError("validation must have labels: Loader(X, Y), this one has X alone")
    own = loader if type(loader).__iter__ is not Loader.__iter__ else None
    return HeldOutBatches(epochs.in_order(EVALUATION_ROWS), epochs.columns, own)


def is_fraction(x: Any) -> bool:
    """Whether ``x`` is a real number."""
    return not isinstance(x, bool) and isinstance(x, numbers.Real)


def is_large(x: Any) -> bool:
    """Whether samples are read from ``x``, which may be larger than memory."""
    return isinstance(x, np.memmap) or is_read(x)


@contextlib.contextmanager
def about_validation() -> Iterator[None]:
    """Begin the messages of gpubatch's errors with the argument that they are about."""
    try:
        yield
    except InsufficientMemoryError:
        raise
    except GpubatchError as error:
        if str(error).startswith("validation"):
            raise
        raise type(error)(f"validation: {error}") from error
