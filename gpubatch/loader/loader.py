"""The loader: mini-batches of a set, the same on every device."""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Mapping
from operator import attrgetter
from typing import Any

from gpubatch.backend import Array, Backend, get_backend
from gpubatch.errors import ArgumentError, DTypeError, ShapeError, check_bool, check_choice, check_int, suggesting
from gpubatch.loader.columns import Columns
from gpubatch.loader.deals import check_dealing
from gpubatch.loader.elsewhere import converted
from gpubatch.loader.epochs import Epochs
from gpubatch.loader.feeds import LoaderStats
from gpubatch.loader.order import WORD, Order, WeightedOrder
from gpubatch.loader.windows import window_and_block
from gpubatch.own import as_written
from gpubatch.parallel import Ranks
from gpubatch.sizing import BatchPlan


@as_written
class Loader:
    """Mini-batches on a backend: ``for x, y in loader`` is one epoch; ``for x in loader`` where there is no Y.

    With weights it is ``for x, y, weight in loader``.

    The arguments, of which all but X, Y, weight and class_weight are attributes, too:

    - ``X``: samples, an array, a sparse matrix of SciPy's, or a :class:`~gpubatch.sources.Source`, which may be larger
      than memory; or a :class:`~gpubatch.Table`, whose label is Y.
    - ``Y``: labels, one a sample, likewise; not where ``X`` is a source of pairs.
    - ``batch_size``: samples in a batch, or "auto", which follows :func:`~gpubatch.sizing.choose_batch_size`.
    - ``shuffle``: False keeps the order of the set.
    - ``replacement``: draw samples with replacement.
    - ``seed``: the order depends on it and on the number of the epoch.
    - ``drop_last``: leave out a last batch that is not full; "single": only one of a single sample, or with a part of
      one, which batch norm cannot take.
    - ``sample_axis``: 0, X is (samples, ...) and x (batch, ...); or 1, (features, samples) and (features, batch).
    - ``backend``: the device of the batches, as in :func:`~gpubatch.backend.get_backend`.
    - ``dtype``: of x, "float32", "float64" or "float16"; by default X's own if it is float64, else float32, until
      :func:`~gpubatch.fit` gives it the network's.
    - ``scale``: multiplies x after the conversion.
    - ``prefetch``: batches that a thread prepares ahead; 0 prepares all in the caller.
    - ``rank``, ``world_size``: take the positions rank, rank + world_size, ... of each epoch.
    - ``at_most``: the largest batch size that "auto" chooses.
    - ``window``: samples, or bytes such as "1 GiB", that are in memory of a set that is read.
    - ``prepare``: a function of x, or of x and y, whose results take their places in a batch. It must give the same
      result for the same samples, as a shift does. ``fit`` applies it to the validation set, and ``to_batch``, too.
    - ``augment``: a random function, for training alone: ``augment(x, generator)``, or of x, y and a generator.
    - ``transform``: another name of ``prepare``.
    - ``order``: a :class:`WeightedOrder`, to draw samples by their weights.
    - ``feed``: how batches get to a CUDA device: "device", "host" or "auto".
    - ``weight``: the weight of each sample in the loss, an array (samples,) of finite numbers, none negative.
    - ``class_weight``: the weight of each label, times ``weight`` where both are given: "balanced", scikit-learn's
      n / (k * bincount(Y)) for k classes; a mapping {label: weight}, 1 for labels that it does not name; or an array
      of weights by label. It needs integer labels. The loader reads those of a source once when it is made, 16 MB at a
      time, and X with them where one source gives both. One number a sample stays in memory.
    - ``ranks``: the processes of a data-parallel run, a :class:`~gpubatch.Ranks`: each batch is dealt to them.
    - ``shards``: the parts of a batch, 8 by default where there are ``ranks``.

    Every batch is a new C-contiguous array, which may be kept or changed. A one-dimensional Y has its samples on axis 0
    whatever ``sample_axis`` is. X and floating Y must be finite; arrays are checked here, sources and memory maps as
    they are read. Y keeps its element type. float16 is for a network with ``precision="mixed"``: x is converted and
    multiplied in float32 and then rounded.

    **Functions.** ``prepare`` and then ``augment`` get whole arrays on the backend, converted and scaled; on a CPU the
    thread that prepares calls them. They return one entry for each sample; x is then converted to ``dtype``.
    ``prepare`` must keep no state, which the loader cannot check. The generator is NumPy's on a CPU and CuPy's on a
    GPU. It depends on ``seed``, the epoch and the number of the batch alone, so a resumed run draws the same numbers,
    however many batches are prepared ahead.

    **Weights.** With ``weight`` or ``class_weight`` batches are (x, y, weight), the last of float32, or of float64
    where x is. The loss of a batch is Σ w l / Σ w, so only the ratios within a batch count; ``fit`` uses them. Class
    weights belong to Y as it is given, before ``prepare`` and ``augment``; a negative label is no class, and weighs 1.

    **Order.** It is :func:`epoch_order` of ``seed`` and ``epoch``, the same on every device and after a resume. With
    2²⁰ samples and more it takes no memory: each place is computed as it is used, on a device inside the kernels, also
    where :func:`~gpubatch.fit` holds out a fraction. A device has a list of the order, 8 bytes a sample, for arrays in
    windows, and for arrays in order where a fraction is held out. The ranks together see each sample once, and their
    shares differ by one sample at most. ``epoch`` is the running epoch, or the next one. An iteration that is left
    early ends its epoch, and the next iteration starts the next epoch; ``state_dict`` still has the place where it was
    left, and ``load_state_dict`` returns there. One iteration runs at a time; a second one ends the first.

    **Ranks.** With ``ranks`` the ``batch_size`` is that of all of them together. A batch is ``shards`` parts, one after
    another, which differ by one row at most. Each rank makes the rows of its own parts of every batch: neighbouring
    parts, a power of two of them, as many as any other rank. So a batch depends on ``seed`` and ``shards`` and not on
    the number of ranks, and another number of ranks can load a state. ``shards`` alone, in one process, makes the same
    batches. In windows each part shuffles blocks of its own, so a rank reads and decodes its share of a file. Each part
    has an equal share of ``window``, which should hold two blocks of a source for every part, as it does by default.
    "auto" is the size of the rank with the least memory, and at least a row for each part, or as many as the network
    needs. ``prepare`` and ``augment`` get the rows of one part at a time; where a rank has no rows of a batch they get
    one sample, for the shape. The generator depends on the number of the part, too.

    **Window.** ``window`` is for sets larger than memory: half of it is in use while the other half is read. The set is
    cut into blocks of neighbours, the list of blocks is shuffled, and half a window holds the next blocks of the list,
    whose samples are shuffled together. So, unlike in a full shuffle, samples of one block always share a window, and a
    batch comes from at most 32 places of the set (a block is a 32nd of the half, or what the source decodes at once
    where that is more). Where the set is sorted, by class or by time, make the window large enough for a fair mixture,
    or shuffle the file once. The default is 256 MiB for sources that read neighbours together, and none for others.

    **Feed.** With "device" the first iteration copies the arrays to the device, and batches are gathered there; the
    loader does not see later changes of the arrays. With "host" batches go there as they are stored, through pinned
    memory, while the device works on earlier ones. "auto" copies the arrays if they, their order and the rest of
    ``plan`` need at most 90 % of the available memory, or of half of it while the plan counts no model, as it does in
    :func:`~gpubatch.fit`. Sources always go through pinned memory. ``feeding`` says what was chosen and why. A batch
    belongs to the stream that is current when the loop asks for it. A thread prepares ahead where batches are read or
    large (2²⁰ elements on the host). ``plan`` is the batch size with its reason and its memory, and ``stats`` says what
    the running epoch, or the last one, did and how long its consumer waited.

    >>> loader = Loader(np.eye(5, dtype="float32"), np.arange(5), batch_size=2, backend="cpu")
    >>> [(x.shape, y.shape) for x, y in loader]
    [((2, 5), (2,)), ((2, 5), (2,)), ((1, 5), (1,))]
    """

    @suggesting
    def __init__(
        self,
        X: Any,
        Y: Any = None,
        batch_size: int | str = "auto",
        shuffle: bool = True,
        replacement: bool = False,
        seed: int = 0,
        drop_last: bool | str = False,
        sample_axis: int = 0,
        backend: str | Backend = "auto",
        dtype: Any = None,
        scale: float | None = None,
        prefetch: int = 2,
        rank: int = 0,
        world_size: int = 1,
        at_most: int = 512,
        window: int | str | None = None,
        transform: Callable[..., Any] | None = None,
        feed: str = "auto",
        prepare: Callable[..., Any] | None = None,
        augment: Callable[..., Any] | None = None,
        order: WeightedOrder | None = None,
        weight: Any = None,
        class_weight: Any = None,
        ranks: Ranks | None = None,
        shards: int | None = None,
    ) -> None:
        shuffle, replacement = check_bool("shuffle", shuffle), check_bool("replacement", replacement)
        if order is not None and not isinstance(order, WeightedOrder):
            raise DTypeError(f"order must be a gpubatch.WeightedOrder or None, got {type(order).__name__}")
        if (replacement or order is not None) and not shuffle:
            argument = "replacement=True" if order is None else "order=WeightedOrder(...)"
            raise ArgumentError(f"{argument} draws at random, so it needs shuffle=True, got shuffle=False")
        replacement = replacement or order is not None
        seed = check_int("seed", seed, 0, WORD)
        if drop_last != "single" and not isinstance(drop_last, bool):
            raise DTypeError(f"drop_last must be False, True or 'single', got {drop_last!r}")
        sample_axis, prefetch = check_int("sample_axis", sample_axis, 0, 1), check_int("prefetch", prefetch, 0)
        world_size = check_int("world_size", world_size, 1)
        rank, at_most = check_int("rank", rank, 0, world_size - 1), check_int("at_most", at_most, 1)
        dealing = check_dealing(ranks, shards, rank, world_size)
        if isinstance(batch_size, str):
            check_choice("batch_size, if not an integer,", batch_size, ["auto"])
            size = None
        else:
            size = check_int("batch_size", batch_size, 1)

        if prepare is not None and transform is not None:
            raise ArgumentError("transform is another name of prepare: give one of them, got both")
        columns = Columns(
            *(X, Y),
            backend=get_backend(backend),
            sample_axis=sample_axis,
            dtype=dtype,
            scale=scale,
            prepare=prepare if transform is None else transform,
            prepare_name="prepare" if transform is None else "transform",
            augment=augment,
            seed=seed,
            weight=weight,
            class_weight=class_weight,
        )
        parts = 1 if dealing is None else dealing.shards
        n, (together, block, bounds) = columns.n_samples, window_and_block(window, replacement, columns, parts)
        check_choice("feed", feed, ["auto", "device", "host"])
        for reader in columns.readers:
            if feed == "device":
                raise ArgumentError(f"feed='device' needs arrays, that can be moved there; {reader.where} is read")
        if n < world_size:
            raise ArgumentError(f"world_size must be at most the {n} samples, got {world_size}")
        if order is not None and len(order) != n:
            raise ShapeError(f"order must have a weight for each of the {n} samples, got {len(order)}")
        drawn = Order(n, seed, shuffle, replacement, rank, world_size, together, block, order, bounds, dealing)
        self._epochs = Epochs(columns, drawn, size, at_most, drop_last, prefetch, feed, ranks)

    shuffle = property(attrgetter("_epochs.order.shuffle"), doc="Whether the samples are shuffled.")
    replacement = property(attrgetter("_epochs.order.replacement"), doc="Whether samples are drawn with replacement.")
    order = property(attrgetter("_epochs.order.weighted"), doc="The weights by which samples are drawn; None: none.")
    seed = property(attrgetter("_epochs.order.seed"), doc="The order depends on it and on the epoch.")
    ranks = property(attrgetter("_epochs.ranks"), doc="The ranks to which each batch is dealt; None: none.")
    window = property(attrgetter("_epochs.order.window"), doc="Samples that are shuffled together; 0: all of them.")
    block = property(attrgetter("_epochs.order.block"), doc="Neighbours that stay together in a window.")
    n_samples = property(attrgetter("_epochs.order.n"), doc="Samples of the set, those of all ranks.")
    backend = property(attrgetter("_epochs.columns.backend"), doc="Where batches are.")
    sample_axis = property(attrgetter("_epochs.columns.sample_axis"), doc="0: samples are rows; 1: columns.")
    dtype = property(attrgetter("_epochs.columns.dtype"), doc="The element type of x.")
    scale = property(attrgetter("_epochs.columns.scale"), doc="The factor of x; None: 1.")
    prepare = property(attrgetter("_epochs.columns.prepare"), doc="The function of each batch.")
    augment = property(attrgetter("_epochs.columns.augment"), doc="The random function of each batch in training.")
    transform = property(attrgetter("_epochs.columns.prepare"), doc="Another name of ``prepare``.")
    drop_last = property(attrgetter("_epochs.sizes.drop_last"), doc="Which last batch is left out.")
    prefetch = property(attrgetter("_epochs.prefetch"), doc="Batches that a thread prepares ahead.")
    at_most = property(attrgetter("_epochs.sizes.at_most"), doc='The largest batch size that "auto" chooses.')
    feed = property(attrgetter("_epochs.feed"), doc="How batches were to get to a CUDA device.")

    def __copy__(self) -> Loader:
        """A loader of the same data, with a position of its own."""
        twin = object.__new__(type(self))
        vars(twin).update(vars(self))
        twin._epochs = copy.copy(self._epochs)
        return twin

    def __deepcopy__(self, memo: Any) -> Loader:
        """A copy: the data never change, so they are shared."""
        return copy.copy(self)

    def __reduce__(self) -> Any:
        raise DTypeError(
            "a Loader cannot be pickled; make it again in the other process, from the same arrays or files, and give "
            "it the place by load_state_dict(loader.state_dict())"
        )

    @property
    def shards(self) -> int | None:
        """The number of parts of each batch; None: batches are not dealt to parts."""
        order = self._epochs.order
        return order.dealing.shards if order.dealt else None

    @property
    def rank(self) -> int:
        """The number of this rank."""
        order = self._epochs.order
        return order.dealing.rank if order.dealt else order.rank

    @property
    def world_size(self) -> int:
        """The number of ranks."""
        order = self._epochs.order
        return order.dealing.size if order.dealt else order.world_size

    @property
    def batch_size(self) -> int:
        """Samples in a batch, on all ranks if there are ``ranks``; the last one of an epoch may have fewer."""
        return self._epochs.batch_size

    @property
    def plan(self) -> BatchPlan:
        """The batch size, its reason in words, and the memory that it needs, by part."""
        return self._epochs.plan

    @property
    def feeding(self) -> str:
        """How batches get to the backend, in words."""
        return self._epochs.feeding

    @property
    def stats(self) -> LoaderStats:
        """Statistics of the running epoch so far, or of the last one."""
        return self._epochs.stats

    @property
    def epoch(self) -> int:
        """The number of the running epoch, or else of the next one, counted from 0."""
        return self._epochs.epoch

    def __len__(self) -> int:
        """The number of batches in an epoch of this rank; with ``ranks``, of all."""
        return len(self._epochs)

    def __iter__(self) -> Generator[Any]:
        return self._epochs.batches(self._epochs.columns.deliver)

    def to_batch(self, X: Any, Y: Any = None) -> Any:
        """``X``, samples of the same shape, as batches have them, for evaluation and prediction; with ``Y`` both.

        They are converted, scaled and prepared, and not augmented. The result is ``X`` itself where that changes
        nothing. Floats where the source has integers, such as pixels divided by 255, count as prepared: they are only
        converted.
        """
        return converted(self._epochs.columns, X, Y)

    def state_dict(self) -> dict[str, Any]:
        """The position and all that batches depend on, for JSON; ``batch`` counts those that were yielded."""
        return self._epochs.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to the position of ``state``: the next iteration goes on with the batch that would have come next.

        A loader that would give other batches refuses it. With ``batch_size="auto"`` the state's batch size is taken.
        """
        self._epochs.load_state_dict(state)

    def __repr__(self) -> str:
        columns = self._epochs.columns
        x = columns[0].source
        drawn = "drawn by weights" if self.order else "drawn with replacement" if self.replacement else ""
        order = drawn or ("shuffled" if self.shuffle else "in order")
        order += f" by blocks of {self.block}, {self.window} together" if self.window and self.shuffle else ""
        conversion = f"{x.dtype} as {self.dtype}" + ("" if self.scale is None else f" times {self.scale:.6g}")
        shard = "" if self.shards is None else f", in {self.shards} parts"
        shard += "" if self.world_size == 1 else f", rank {self.rank} of {self.world_size}"
        labels = f" with labels {columns[1].source.dtype}" if columns.labelled else ""
        labels += " and weights" if columns.weights is not None else ""
        return (
            f"<Loader of {self.n_samples} samples {x.sample_shape} {conversion}{labels}: {len(self)} batches of "
            f"{self.batch_size} an epoch, {order}, on {self.backend.spec}{shard}>"
        )


def epochs_of(loader: Loader) -> Epochs:
    """The epochs of a loader, which training needs and users do not."""
    return loader._epochs


def rows_of(loader: Loader) -> Generator[list[Array]]:
    """An epoch of a loader, or its rest, in rows, as a network takes them; by ``__iter__`` where a subclass has one."""
    epochs = loader._epochs
    if type(loader).__iter__ is Loader.__iter__:
        return epochs.batches(epochs.columns.as_rows)
    return ([epochs.columns.functions.turn(array) for array in batch] for batch in loader)
