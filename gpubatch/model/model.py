"""A trained network with the preparation of its samples and the names of its classes, saved as one file."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from gpubatch.backend import Array, Backend
from gpubatch.errors import ArgumentError, DataFormatError, DTypeError, ShapeError
from gpubatch.inputs import check_pairs, checked_array
from gpubatch.loader import Loader, epochs_of, rows_of
from gpubatch.metrics import confusion_matrix
from gpubatch.model.file import check_path, read_file, write_file
from gpubatch.model.preparation import Preparation
from gpubatch.nn import EVALUATION_ROWS, Network, core_of
from gpubatch.sources import is_read
from gpubatch.tables import Recipe, Table, listed, read_table

COMPARED = 1 << 12  # rows of raw samples that are looked at together


class Model:
    """A network that takes raw samples: they are prepared as the training loader prepared them.

    net: the network.
    loader: the loader that it was trained on, for its ``scale``, ``sample_axis`` and ``prepare``, or the table; None
        where samples go to the network as they are, but for their element type.
    classes: the names of the classes, text, integers or booleans, in the order of the labels 0, 1, ...; None for the
        labels, or for those of the table.

    Raw samples, ``raw``, are what the loader's X was: an array on the host or the network's device, a list, a table, a
    memory map, a sparse matrix, or a source (:mod:`gpubatch.sources`). They are scaled whatever their element type is;
    fractions are an error where the loader's X held integers, since they were scaled before. They are computed 1024 at
    a time, so that only the results, arrays of NumPy, grow with their number. Several threads may use a model at once.

    Where the network was trained on a table, ``raw`` is a table again: whatever :func:`~gpubatch.read_table` reads. Its
    columns are found by name; other columns are ignored, the label may be missing. Regression's predictions are in the
    unit of the label, and its loss is of labels that were standardised as in training.

    >>> model = gb.Model(gb.mlp([3, 4, 2], seed=0), classes=["no", "yes"])
    >>> model.predict(np.zeros((1, 3))).shape
    (1,)
    """

    def __init__(
        self, net: Network, loader: Loader | Table | None = None, classes: Sequence[Any] | None = None
    ) -> None:
        if not isinstance(net, Network):
            raise DTypeError(f"net must be a gpubatch.Network, got {type(net).__name__}")
        preparation = None if loader is None else Preparation.of(loader)
        if isinstance(loader, Loader) and loader.dtype != net.dtype:
            raise DTypeError(f"loader makes {loader.dtype} batches, net takes {net.dtype}")
        if preparation is not None and preparation.table is not None:
            classes = classes_of(preparation.table, classes)
        self._set(net, preparation, checked_classes(classes, net), {})
        if isinstance(loader, Loader):
            self._columns = epochs_of(loader).columns.names

    def _set(
        self, net: Network, preparation: Preparation | None, classes: list[Any] | None, versions: dict[str, str]
    ) -> None:
        self.net, self.preparation, self.classes, self.versions = net, preparation, classes, versions
        self._columns = core_of(net).batches.columns

    def __repr__(self) -> str:
        prepared = "" if self.preparation is None else f", {self.preparation}"
        named = "" if self.classes is None else f", {len(self.classes)} classes"
        return f"<Model of {self.net!r}{prepared}{named}>"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Save it as :func:`save` does."""
        write_file(check_path(path), self.net, self.preparation, self.classes, self._columns)

    # --- what it computes ---

    def scores(self, raw: Any) -> np.ndarray:
        """The outputs of the last layer, ``(samples, outputs)``."""
        return self._whole(raw, self.net.scores)

    def predict(self, raw: Any) -> np.ndarray:
        """The predictions of :meth:`Network.predict`; class names where there are any and a prediction is one class."""
        return self._named(self._whole(raw, self.net.predict))

    def probabilities(self, raw: Any) -> np.ndarray:
        """The probabilities of :meth:`Network.probabilities`, a column for each class, as ``classes`` orders them.

        With one output, the probability of the second class, ``(samples,)``.
        """
        return self._whole(raw, self.net.probabilities)

    def of_batch(self, x: Array, probabilities: bool = False) -> tuple[np.ndarray, ...]:
        """The predictions for a batch of :meth:`batches`, and the probabilities if they are asked for."""
        found = (self._named(self.net.backend.to_numpy(self.net.predict(x))),)
        return (*found, self.net.backend.to_numpy(self.net.probabilities(x))) if probabilities else found

    def batches(self, raw: Any, y: Any = None, labelled: bool = False) -> Loader:
        """A loader of raw samples in their order, prepared: for results that are more than memory holds.

        y: their labels, as the network takes them or names of classes; None: batches have none, but with ``labelled``
            those of a table.
        """
        return self._loader(raw, y, labelled)

    def evaluate(self, raw: Any, y: Any = None) -> tuple[float, float | None]:
        """The loss and the accuracy, as :meth:`Network.evaluate`; ``y`` has class names where the model has any.

        A table has its labels itself.
        """
        if y is None and (self.preparation is None or self.preparation.table is None):
            raise ArgumentError("y must be given where raw is no table, which has its labels")
        loader = self._loader(raw, y, labelled=y is None)
        loss, right, n = 0.0, 0.0, 0
        accuracy: float | None = None
        for x, labels in rows_of(loader):
            of_batch, accuracy = self.net.evaluate(x, labels)
            loss, n = loss + of_batch * len(x), n + len(x)
            right += 0.0 if accuracy is None else accuracy * len(x)
        return loss / n, None if accuracy is None else right / n

    def confusion_matrix(self, raw: Any, y: Any = None) -> np.ndarray:
        """How many samples of each class, by row, were taken for each class, by column, in the order of ``classes``."""
        if self.classes is None:
            raise ArgumentError("a confusion matrix needs a model with classes")
        check_pairs(("raw", "y"), (raw, y))
        predicted, truth = self.predict(raw), self._table(raw).labels if y is None else y
        return confusion_matrix(self._labels(truth), self._labels(predicted), classes=len(self.classes))

    # --- inside ---

    def _table(self, raw: Any, labelled: bool = True) -> Table:
        """A table that is prepared as in training."""
        recipe = None if self.preparation is None else self.preparation.table
        if recipe is None:
            raise ArgumentError("y must be given where raw is no table, which has its labels")
        table = raw if isinstance(raw, Table) else read_table(raw, like=recipe)
        return table.prepared_by(recipe, labelled)

    def _loader(self, raw: Any, y: Any = None, labelled: bool = False) -> Loader:
        """A loader of raw samples in their order, prepared; of a table with its labels if they are wanted."""
        of = self.preparation or Preparation(None, 0, (self.net.inputs,), self.net.dtype)
        if of.table is None:
            self._columns.check(("raw", "y"), raw, y)
        y = None if y is None else self._labels(y)
        if of.table is not None:
            table = self._table(raw, labelled)
            if labelled and not table.labelled:
                label = "" if of.table.target is None else f" {of.table.target.name!r}"
                raise DataFormatError(f"{table.where}: expected the label{label} to test with, found no such column")
            raw = table.as_source()
        mapped = is_read(raw) or isinstance(raw, np.memmap)
        if not is_read(raw):
            raw = checked_array("raw", raw, self.net.backend)
            if raw.shape[:1] == (0,):
                raise ShapeError(f"raw must hold at least one sample, got shape {raw.shape}")
            check_whole_numbers(raw, of)
        loader = Loader(
            *(raw, y),
            batch_size=EVALUATION_ROWS,
            shuffle=False,
            sample_axis=of.sample_axis,
            backend=self.net.backend,
            dtype=self.net.dtype,
            scale=of.scale,
            prefetch=2 if mapped else 0,
            window=None if of.table is None else 2 * EVALUATION_ROWS,  # read in order: more would be held in vain
            prepare=of.prepare,
        )
        if (shape := epochs_of(loader).columns[0].source.sample_shape) != of.sample_shape:
            raise ShapeError(f"raw must have samples of shape {of.sample_shape}, got {shape}")
        return loader

    def _whole(self, raw: Any, compute: Callable[[Array], Array]) -> np.ndarray:
        """The results of ``compute`` for all batches, as one NumPy array."""
        loader = self._loader(raw)
        whole, start = np.empty(0), 0
        for x, *_ in rows_of(loader):
            found = self.net.backend.to_numpy(compute(x))
            if start == 0:
                whole = np.empty((loader.n_samples, *found.shape[1:]), found.dtype)
            whole[start : start + len(found)] = found
            start += len(found)
        return whole

    def _named(self, found: np.ndarray) -> np.ndarray:
        """Predictions of the network by the names of their classes, or in the unit of a table's label."""
        target = None if self.preparation is None or self.preparation.table is None else self.preparation.table.target
        if target is not None and target.classes is None:
            return found.astype(np.float64) * target.deviation + target.mean
        return found if self.classes is None or found.ndim != 1 else np.array(self.classes)[found]

    def _labels(self, y: Any) -> Any:
        """Class names as labels from 0; ``y`` itself where there are no names, or more than one class a sample."""
        y = y if hasattr(y, "shape") or is_read(y) else np.asarray(y)
        if self.classes is None or is_read(y) or y.ndim != 1:
            return y
        names, where = np.unique(self.net.backend.to_numpy(y), return_inverse=True)
        numbers = {name: label for label, name in enumerate(self.classes)}
        if unknown := [name for name in names.tolist() if name not in numbers]:
            raise ArgumentError(f"y must hold the names of classes, {listed(self.classes)}; got {unknown[0]!r}")
        return np.array([numbers[name] for name in names.tolist()])[where]


def classes_of(recipe: Recipe, given: Any) -> Any:
    """The classes of a table's label, or those that were given, which must not be others."""
    found = None if recipe.target is None or recipe.target.classes is None else list(recipe.target.classes)
    if given is not None and list(given) != found:
        raise ArgumentError(f"classes must be None where a table has them, {found}; got {given!r}")
    return found


def checked_classes(classes: Any, net: Network) -> list[Any] | None:
    """Class names as a list: one for each label that the network predicts."""
    if classes is None:
        return None
    if isinstance(classes, str) or not hasattr(classes, "__len__") or not hasattr(classes, "__getitem__"):
        raise DTypeError(f"classes must be a list of the names of the classes, got {classes!r}")
    names = [x.item() if isinstance(x, np.generic) else x for x in classes]
    if wrong := [
        x
        for x in names
        if not isinstance(x, (str, int))
        or any(isinstance(x, kind) != isinstance(names[0], kind) for kind in (bool, str))
    ]:
        raise DTypeError(
            f"classes must all hold text, all integers or all booleans, got {wrong[0]!r} among {names[:3]}"
        )
    if not net.loss_function.classifies:
        raise ArgumentError(f"classes must be None: {net.loss_name} has none, got {listed(names)}")
    wanted = 2 if net.outputs == 1 else net.outputs
    if len(names) != wanted or len({*names}) != wanted:
        raise ArgumentError(
            f"classes must be {wanted} different names, as the network has classes, got {listed(names)}"
        )
    return names


def check_whole_numbers(raw: Array, of: Preparation) -> None:
    """Raise where floats that are no whole numbers take the place of integers: they have been scaled already."""
    if of.dtype.kind not in "iub" or of.scale is None or raw.dtype.kind != "f":
        return
    for start in range(0, len(raw), COMPARED):
        part = raw[start : start + COMPARED]
        if not bool((part == part.round()).all()):
            raise ArgumentError(
                f"raw must hold what the loader's X held, whole numbers of {of.dtype}, which are multiplied by "
                f"{of.scale:.6g} here; samples that were scaled before go to model.net, got fractions of {raw.dtype}"
            )


def save(
    path: str | os.PathLike[str],
    net: Network | Model,
    loader: Loader | Table | None = None,
    classes: Sequence[Any] | None = None,
) -> None:
    """Save a trained network as one safetensors file, whole or not at all; :func:`load` makes a :class:`Model` of it.

    path: ends in .safetensors; a file of that name is replaced.
    net: the network, or a model, which has the rest.
    loader, classes: as :class:`Model` takes them.

    The format is described in ``gpubatch/model/file.py``. A formula of your own is saved by its text. Your own class of
    layers or losses is saved by its import path and the arguments of its constructor, which it must keep in attributes
    of the same names; a ``prepare`` by its import path, and the state of an object that has ``state_dict()`` and
    ``load_state_dict(state)``. Raises ArgumentError or DTypeError for what a file cannot hold, and OSError.

    >>> net = gb.mlp([3, 4, 2], seed=0)
    >>> gb.save("model.safetensors", net, classes=["no", "yes"])
    >>> gb.load("model.safetensors").classes
    ['no', 'yes']
    """
    if isinstance(path, (Network, Model)):
        raise DTypeError(f"path must be that of a file, got a {type(path).__name__}: write gb.save(path, net)")
    if isinstance(net, Model) and (loader is not None or classes is not None):
        raise ArgumentError("loader and classes must be None where a Model is saved: it has both")
    (net if isinstance(net, Model) else Model(net, loader, classes)).save(path)


def load(
    path: str | os.PathLike[str],
    backend: str | Backend = "auto",
    custom: Iterable[Any] | Mapping[str, Any] = (),
    into: Network | None = None,
) -> Model:
    """Load a model that :func:`save` wrote, on any backend. Nothing that is in the file is executed or imported.

    path: of the file.
    backend: where the network is to be.
    custom: your own classes and functions that the file names, in a list, or by those names in a mapping. A layer's or
        loss's class may be left out if its module was imported before.
    into: an existing network, which gets the parameters if it has the same layers and loss; ``backend`` is then its.

    Raises DataFormatError for a file that is damaged, no model, or of a later version; ArgumentError for one that names
    what is not there, or that differs from ``into``; OSError.

    >>> gb.save("model.safetensors", gb.mlp([3, 4, 2], seed=0))
    >>> model = gb.load("model.safetensors", backend="cpu")
    >>> model.probabilities(np.zeros((1, 3))).shape
    (1, 2)
    """
    if into is not None and not isinstance(into, Network):
        raise DTypeError(f"into must be a gpubatch.Network, got {type(into).__name__}")
    net, preparation, classes, versions = read_file(check_path(path), backend, custom, into)
    model = object.__new__(Model)
    model._set(net, preparation, checked_classes(classes, net), versions)
    return model
