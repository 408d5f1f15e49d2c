"""The data of a command: what files hold, split into samples to train on and to test on, and a network for them."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple

import numpy as np
import typer

from gpubatch import datasets, sources
from gpubatch.backend import Array, get_backend
from gpubatch.cli.arrays import RowsOf, arrays_of, check_there, npy, npz, of_table, rows, taken
from gpubatch.cli.options import DTYPES, LOSSES_OF, BatchOptions, NetworkOptions, Seed, TestSize, names_of
from gpubatch.errors import ArgumentError, DataFormatError, NonFiniteError, check_choice, check_real
from gpubatch.loader import SHARDS, Loader, Standardize, epochs_of, split
from gpubatch.model import Model
from gpubatch.nn import LOSSES, Dense, Loss, Network, SoftmaxCrossEntropy, core_of, mlp
from gpubatch.parallel import Ranks
from gpubatch.sizing import WHOLE_SET
from gpubatch.tables import DIGESTED, Table, TrainingRows, is_large, listed, read_table
from gpubatch.train import drop_last_for, loader_for

LOOKED_AT = 1 << 14  # rows by which the scale of columns is judged
STEPS = 32  # in an epoch of a small set, at least, where batches have no fewer than 8 samples
TASKS = ("auto", *LOSSES_OF)
CIFAR = ("data_batch", "cifar-10")  # prefixes of the names of its files and folders
TABLES = (".csv", ".parquet", ".arrow", ".tsv", ".txt", ".pq", ".arrows", ".feather", ".ipc")


@dataclasses.dataclass
class Samples:
    """The training set and the test set of a command.

    name: where they are from, in words
    X, Y: those to train on: rows, and labels from 0 or numbers; or a table, and None
    test: the same of those to test on
    scale: what X is multiplied by
    prepare: what is done to batches of X then
    classes: the names of the classes; None where labels have none, a table has them, or there are numbers
    outputs: of a network for them
    task: one of LOSSES_OF
    rows: which ones of the data are to train on, where they are arrays
    """

    name: str
    X: Any
    Y: np.ndarray | None
    test: tuple[Any, np.ndarray | None]
    scale: float | None
    classes: list[Any] | None
    outputs: int
    task: str
    class_weight: str | None = None
    prepare: Standardize | None = None
    rows: TrainingRows | None = None

    @property
    def features(self) -> int:
        """Numbers in a sample."""
        return self.X.features if isinstance(self.X, (Table, RowsOf)) else int(self.X.shape[1])

    @property
    def validation(self) -> Any:
        """The test set, as :func:`gpubatch.fit` takes it."""
        return self.test[0] if self.test[1] is None else self.test

    @property
    def unscaled(self) -> str:
        """In words, which columns of arrays are far from mean 0 and deviation 1, by up to 16,384 rows; "" for none."""
        if isinstance(self.X, Table) or self.scale is not None or self.prepare is not None:
            return ""
        try:
            of = Standardize.of(taken(self.X, np.arange(0, len(self.X), max(1, len(self.X) // LOOKED_AT))))
        except NonFiniteError:  # the loader's own error names the sample
            return ""
        far = np.flatnonzero((abs(of.mean) > 10) | (of.deviation > 10) | (of.deviation < 0.1))
        if not len(far):
            return ""
        worst = f"column {far[0]} has mean {of.mean[far[0]]:g} and deviation {of.deviation[far[0]]:g}"
        return f"{len(far)} of {of.mean.size} columns are far from mean 0 and deviation 1 ({worst}): --standardize"

    def first(self, n: int) -> Samples:
        """The same data with only the first ``n`` training samples."""
        if isinstance(self.X, Table):
            train = self.X.first(min(n, len(self.X)))
            return dataclasses.replace(self, X=train, test=(self.test[0].prepared_by(train.recipe), None))
        rows = None if self.rows is None else dataclasses.replace(self.rows, trained=min(n, self.rows.trained))
        return dataclasses.replace(self, X=taken(self.X, slice(n)), Y=None if self.Y is None else self.Y[:n], rows=rows)

    def model(self, net: Network, loader: Loader) -> Model:
        """A trained network as a model, which keeps the preparation of its data and which rows it was trained on."""
        found = Model(net, loader, self.classes)
        if self.rows is not None and found.preparation is not None:
            found.preparation = dataclasses.replace(found.preparation, rows=self.rows)
        return found

    def loader(
        self, net: Network, batches: BatchOptions, seed: int, ranks: Ranks | None = None, shards: int | None = None
    ) -> Loader:
        """The loader to train a network with; its batches have ``shards`` parts, which are dealt to ranks."""
        if self.prepare is not None and net.compute_dtype == np.float32 and len(lost := self.prepare.lost):
            of = self.prepare.mean[lost[0]], self.prepare.deviation[lost[0]]
            raise ArgumentError(
                f"--standardize: column {lost[0]} has mean {of[0]:g} and deviation {of[1]:g}, of which float32 keeps "
                "too few digits; subtract a number near the mean before, or give --dtype float64"
            )
        n, dealt = len(self.X), ranks is not None or shards is not None
        least = core_of(net).least_rows * (SHARDS if dealt and shards is None else shards or 1)
        size = batches.size
        if size == "auto" and n <= WHOLE_SET:
            size = max(usual_size(n, batches.at_most), min(least, n))
        rest = n % size if isinstance(size, int) and size > 0 else 0
        # Batch norm needs two samples in every part.
        left_out = dealt and 0 < rest < least and core_of(net).least_rows > 1
        return Loader(
            *(self.X, self.Y),
            batch_size=size,
            drop_last=left_out or (drop_last_for(net) if rest == 1 else False),
            at_most=batches.at_most,
            seed=seed,
            backend=net.backend,
            dtype=net.dtype,
            scale=self.scale,
            class_weight=self.class_weight,
            prepare=self.prepare,
            ranks=ranks,
            shards=shards,
        )

    @staticmethod
    def reason(loader: Loader, batches: BatchOptions) -> str:
        """Why its batches have their size, in words; of a small set its loader was given what auto takes."""
        given = f"batch_size={loader.batch_size} was given"
        few = f"auto takes {loader.batch_size} where samples are few, for {len(loader)} steps an epoch"
        return loader.plan.reason.replace(given, few) if batches.size == "auto" else loader.plan.reason


def usual_size(samples: int, at_most: int) -> int:
    """The batch size of a small set, which a loader would take at once: a power of two with 32 steps an epoch, or 8."""
    size = min(max(8, samples // STEPS), at_most, samples)
    return 1 << (size.bit_length() - 1)


@dataclasses.dataclass
class DataOptions:
    """The data of a run."""

    panel: ClassVar[str] = "Data"
    data: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="DATA...",
            help="A table (CSV, Parquet, Arrow; a file, a folder of them, a pattern in quotes, a URL, or - for "
            "standard input), or two: to train and to test on; arrays X.npy Y.npy, or an .npz file with X and Y; a "
            "folder with MNIST or a set like it, or CIFAR-10 (binary). By default the bundled digits.",
        ),
    ] = None
    label: Annotated[str | None, typer.Option(help="Of a table: the column to predict.")] = None
    drop: Annotated[str, typer.Option(help="Of a table: columns to leave out, comma-separated.")] = ""
    category: Annotated[str, typer.Option(help="Of a table: columns whose numbers are codes, comma-separated.")] = ""
    missing: Annotated[str, typer.Option(help="Of a table: texts for a missing value, comma-separated.")] = ""
    task: Annotated[
        str, typer.Option(help="classification, regression, or auto: regression where the targets are not integers.")
    ] = "auto"
    test_size: TestSize = 0.2
    standardize: Annotated[
        bool,
        typer.Option(
            "--standardize", help="Of arrays: scale every column to mean 0 and deviation 1, as a table's always are."
        ),
    ] = False
    samples: Annotated[int | None, typer.Option(min=2, help="Training samples to use; by default all.")] = None
    class_weight: Annotated[str | None, typer.Option(help="balanced: all classes count alike in the loss.")] = None
    seed: Seed = 0

    def read(self) -> Samples:
        """Read the data, and split it."""
        check_choice("--task", self.task, TASKS)
        check_real("--test-size", self.test_size, 0, 1, open_low=True, open_high=True)
        if self.class_weight is not None:
            check_choice("--class-weight", self.class_weight, ["balanced"])
        found = self._read(self.data or [])
        if self.class_weight is not None and found.task == "regression":
            raise ArgumentError("--class-weight is for classes, and the targets are numbers")
        if self.samples is not None:
            found = found.first(self.samples)
        if self.standardize:
            try:
                found.scale, found.prepare = None, Standardize.of(found.X)
            except NonFiniteError as error:
                raise NonFiniteError(f"{found.name}: {error} of those to train on") from error
        return dataclasses.replace(found, class_weight=self.class_weight)

    def _read(self, data: Sequence[str]) -> Samples:
        paths = [Path(os.path.expanduser(name)) for name in data]
        is_of_arrays = bool(paths) and paths[0].suffix in (".npy", ".npz")
        if self.standardize and not is_of_arrays:
            raise ArgumentError(
                "--standardize is for arrays, and DATA is none; the numbers of a table always are standardised"
            )
        if paths and not is_images(paths[0]) and not is_of_arrays:
            return self._tables(data)
        given = {"--label": self.label, "--drop": self.drop, "--category": self.category, "--missing": self.missing}
        if named := [option for option, value in given.items() if value]:
            raise ArgumentError(f"{named[0]} is for a table, and DATA is none")
        if not paths or is_images(paths[0]):
            name, (X, Y), test = images(paths, self.seed)
            if self.task == "regression":
                raise ArgumentError("--task regression needs targets that are numbers, the images have labels")
            outputs = int(max(Y.max(), test[1].max())) + 1
            of = None if paths else rows_of_digits(X, test[0], self.seed)
            return Samples(name, X, Y, test, 1 / 255, None, outputs, "classification", rows=of)
        name, arrays = arrays_of(paths)
        if len(arrays.X) != len(arrays.Y):
            raise DataFormatError(
                f"{name}: expected a target for each sample, found {len(arrays.X)} and {len(arrays.Y)}"
            )
        Y, Y_test, classes, outputs, task = targets(arrays.Y, arrays.Y_test, self.task)
        X, X_test = rows(arrays.X), None if arrays.X_test is None else rows(arrays.X_test)
        whole, divided = X, None
        if X_test is None or Y_test is None:
            labels = Y if task == "classification" else None
            kept, held = split(len(X), self.test_size, self.seed, labels, "--test-size")
            X, Y, X_test, Y_test = taken(X, kept), Y[kept], taken(X, held), Y[held]
            divided = self.test_size, self.seed, False
        scale = 1 / 255 if X.dtype == np.uint8 else None
        of = TrainingRows.of(len(whole), len(X), first_of(whole), divided)
        return Samples(name, X, Y, (X_test, Y_test), scale, classes, outputs, task, rows=of)

    def _tables(self, data: Sequence[str]) -> Samples:
        if len(data) > 2:
            pattern = os.path.join(os.path.dirname(data[0]), "*")
            raise ArgumentError(
                f"DATA must be one table, or two: to train and to test on, got {len(data)}; several files are one "
                f"table as a folder, or as a pattern in quotes, such as {pattern!r}"
            )
        for name in data:
            check_there(name)
        whole = read_table(
            *(of_table(data[0]), self.label),
            task=self.task,
            drop=names_of(self.drop),
            kinds=dict.fromkeys(names_of(self.category), "category"),
            missing=names_of(self.missing),
        )
        if self.label is None:
            raise ArgumentError(
                f"DATA is a table: --label must name the column to learn, one of {listed(whole.columns)}"
            )
        train, test = whole.split(self.test_size, self.seed) if len(data) == 1 else (whole, None)
        if test is None:
            test = read_table(of_table(data[1]), like=train)
            if not test.labelled:
                raise DataFormatError(f"{data[1]}: expected a column {self.label!r} to test with")
        assert train.task is not None
        return Samples(" and ".join(data), train, None, (test, None), None, None, train.outputs, train.task)


def first_of(X: Any) -> np.ndarray:
    """The first rows, by which the whole is known again."""
    found: np.ndarray = X.read(np.arange(min(DIGESTED, len(X)))) if isinstance(X, RowsOf) else X[:DIGESTED]
    return found


def rows_of_digits(X: np.ndarray, X_test: np.ndarray, seed: int) -> TrainingRows:
    """The training rows among the bundled digits."""
    n = len(X) + len(X_test)
    return TrainingRows.of(n, len(X), first_of(X), (len(X_test) / n, seed, False))


def is_images(path: Path) -> bool:
    """Whether it is a folder without tables, or names one of several sets in a folder."""
    if path.is_dir():
        names = [each.name for each in path.iterdir()]
        return any(map(is_of_images, names)) or not any(each.suffix.lower() in TABLES for each in path.rglob("*"))
    return not path.exists() and path.parent.is_dir() and path.name in datasets.mnist_sets(path.parent)


def images(paths: Sequence[Path], seed: int) -> tuple[str, datasets.Samples, datasets.Samples]:
    """The data in words, its training set and its test set: those in a folder, or the bundled digits."""
    if not paths:
        return ("10,000 bundled MNIST digits", *datasets.mnist_10k(seed))
    folder, *more = paths
    if more:
        raise ArgumentError(f"DATA must be one folder, got {' '.join(map(str, paths))}")
    if not folder.is_dir():
        return (f"{folder.name} in {folder.parent}", *datasets.mnist(folder))
    names = {path.name for path in folder.iterdir()}
    if any("idx" in name for name in names):
        return (f"{next(iter(datasets.mnist_sets(folder)), '') or 'MNIST'} in {folder}", *datasets.mnist(folder))
    if any(name.startswith(CIFAR) for name in names):
        return (f"CIFAR-10 in {folder}", *datasets.cifar10(folder))
    raise ArgumentError(
        "DATA has neither MNIST (train-images-idx3-ubyte ...) nor CIFAR-10 (data_batch_1.bin ...) nor tables "
        f"({', '.join(TABLES[:3])} ...): {folder}"
    )


def is_of_images(name: str) -> bool:
    """Whether a file is one of MNIST's or CIFAR-10's by its name."""
    return "idx" in name or name.startswith(CIFAR)


def targets(
    Y: np.ndarray, Y_test: np.ndarray | None, task: str
) -> tuple[np.ndarray, np.ndarray | None, list[Any] | None, int, str]:
    """Labels from 0, or numbers; of the test set, too; names of the classes, outputs, and the task."""
    parts = [Y] if Y_test is None else [Y, Y_test]
    parts = [part[:, 0] if part.ndim == 2 and part.shape[1] == 1 else part for part in parts]
    whole = np.concatenate(parts) if len({part.ndim for part in parts}) == 1 else Y
    if whole.dtype.kind not in "iufbUS":
        raise DataFormatError(f"the targets must be numbers or text, got {whole.dtype}")
    words = whole.dtype.kind in "US"
    one_hot = whole.ndim == 2 and whole.dtype.kind in "biuf" and is_one_hot(whole)
    if one_hot and task != "regression":
        raise ArgumentError(
            f"the targets, of shape {whole.shape}, have one 1 in each row, as classes have: give their labels, "
            "Y.argmax(axis=1), or say --task regression"
        )
    if task == "auto":
        task = "regression" if whole.ndim > 1 or whole.dtype.kind == "f" else "classification"
    if task == "regression":
        if words:
            raise ArgumentError("--task regression needs targets that are numbers, got text")
        numbers = [part.astype(np.float64) for part in parts]
        return (
            numbers[0],
            numbers[1] if Y_test is not None else None,
            None,
            1 if whole.ndim == 1 else whole.shape[1],
            task,
        )
    if whole.ndim != 1:
        raise ArgumentError(f"--task classification needs a label for each sample, got targets of shape {Y.shape}")
    if whole.dtype.kind == "f" and not bool((whole == np.floor(whole)).all()):
        raise ArgumentError("--task classification needs labels, got numbers with fractions")
    names = np.unique(whole)
    classes: list[Any] | None = None
    if words or not np.array_equal(names, np.arange(len(names))):
        classes = [str(name) if words else int(name) for name in names]
    if len(names) < 2:
        raise ArgumentError(f"the targets must have at least two classes, got {len(names)}")
    labels = [np.searchsorted(names, part) for part in parts]
    return labels[0], labels[1] if Y_test is not None else None, classes, len(names), task


def is_one_hot(Y: np.ndarray) -> bool:
    """Whether each row has one 1, and all else is 0."""
    return Y.shape[1] > 1 and bool(((Y == 0) | (Y == 1)).all() and (Y.sum(axis=1) == 1).all())


def loss_of(network: NetworkOptions, task: str) -> Loss:
    """The loss that --loss and --label-smoothing name, or the usual one of a task."""
    name = network.loss_for(task)
    if name in LOSSES and name not in LOSSES_OF[task]:
        what = "labels of classes" if task == "classification" else "numbers"
        raise ArgumentError(
            f"--loss must be one of {', '.join(LOSSES_OF[task])} here, got {name!r}: the targets are {what}"
        )
    check_choice("--loss", name, LOSSES_OF[task])
    check_real("--label-smoothing", network.label_smoothing, 0, 1, open_high=True)
    if network.label_smoothing and name != "softmax_cross_entropy":
        raise ArgumentError(
            f"--label-smoothing is for softmax_cross_entropy, got {network.label_smoothing:g} with {name}"
        )
    smoothing = network.label_smoothing
    return SoftmaxCrossEntropy(label_smoothing=smoothing) if smoothing else LOSSES[name]


def network_for(data: Samples, options: NetworkOptions, seed: int) -> Network:
    """A network whose inputs and outputs are those of the data."""
    return mlp(
        [data.features, *options.widths, data.outputs],
        activation=options.activation,
        batch_norm=options.batch_norm,
        dropout=options.dropout,
        loss=loss_of(options, data.task),
        l2=options.l2,
        backend=get_backend(options.backend),
        dtype=check_choice("--dtype", options.dtype, DTYPES),
        seed=seed,
        precision=options.precision,
        init=options.init,
    )


def used(net: Network, network: NetworkOptions, task: str) -> dict[str, Any]:
    """The network's options as they were resolved, for the arguments in a command's JSON."""
    return {"layers": network.widths, "loss": network.loss_for(task), "backend": net.backend.spec}


@dataclasses.dataclass
class Task:
    """A network, and the data as arrays on its backend; ``weight``: the weights of samples by their class."""

    data: Samples
    net: Network
    X: Array
    Y: Array
    weight: Array | None
    test: tuple[Array, Array]
    seed: int

    @classmethod
    def of(cls, options: DataOptions, network: NetworkOptions) -> Task:
        """The task that options name."""
        data = options.read()
        net = network_for(data, network, options.seed)
        if isinstance(data.X, RowsOf):
            raise ArgumentError(
                f"DATA must fit in memory here, {data.name} has {data.X.nbytes} bytes to train on; --samples N takes "
                "fewer"
            )
        loader = data.loader(net, BatchOptions("1"), options.seed)
        X, Y = loader.to_batch(data.X, data.Y)
        weight = epochs_of(loader).columns.weighting.of_batch(Y).get("loss_weight")
        return cls(data, net, X, Y, weight, loader.to_batch(*data.test), options.seed)

    @property
    def words(self) -> str:
        """Network and data in a line, for titles."""
        return words_of(self.net, self.data, self.net.loss_name)

    def loader(self, batches: BatchOptions) -> Loader:
        """A loader of the training set, which is on the backend."""
        return loader_for(self.net, self.X, self.Y, batches.number(), self.seed, self.weight)


def sizes_of(net: Network) -> list[int]:
    """Inputs, widths of the hidden layers, and outputs."""
    return [net.inputs, *(layer.outputs for layer in net.layers if isinstance(layer, Dense))]


def words_of(net: Network, data: Samples, *more: str) -> str:
    """Network and data in a line, for titles."""
    return ", ".join(["-".join(map(str, sizes_of(net))), *more, data.name, net.compute_dtype.name, net.backend.spec])


# --- for a model -----------------------------------------------------------------------------------------------------


def raw_samples(model: Model, data: str | None, seed: int | None) -> Any:
    """Samples for a model to predict: a table, an array, a source, or the test set of a folder or of the digits."""
    recipe = None if model.preparation is None else model.preparation.table
    if recipe is not None:
        return read_table(of_table(a_table([] if data is None else [data])), like=recipe)
    if data is None:
        of_training = seed_of_digits(None if model.preparation is None else model.preparation.rows)
        return images([], (of_training or 0) if seed is None else seed)[2][0]
    path = Path(os.path.expanduser(data))
    if is_images(path):
        return images([path], 0)[2][0]
    check_there(data)
    if path.suffix == ".npy":
        return sources.npy(path, flatten=True) if is_large(path.stat().st_size) else rows(npy(path))
    if path.suffix == ".npz":
        found = npz(path, labelled=False)
        return rows(found.X if found.X_test is None else found.X_test)
    if "idx" in path.name:
        return rows(datasets.read_idx(path))
    raise ArgumentError(
        f"DATA must be a .npy, .npz or IDX file or a folder, as the model was trained on arrays, got {data!r}"
    )


class Tested(NamedTuple):
    """Samples and labels to test a model on.

    name: where they are from, in words
    batches: of them
    said: in words, what the model's training had to do with them
    trained: how many of them it was trained on; None where nobody knows
    """

    name: str
    batches: Loader
    said: str
    trained: int | None


@dataclasses.dataclass(frozen=True)
class Which:
    """Which samples of the data a model is tested on.

    held_out: those that training left out alone; None: so if these are the data of training, else all
    test_size, seed: of the split in training, where the model's file does not say them
    """

    held_out: bool | None
    test_size: float | None
    seed: int | None

    def part(self, name: str, rows: TrainingRows | None, known: bool) -> tuple[float, int, bool | None] | None:
        """Test size, seed and kind of the split whose rows to test on are taken; None: all samples.

        rows: which ones of the data of training it was on, if the model says so
        known: whether these are those data
        """
        if self.held_out is False or (self.held_out is None and not known):
            if self.test_size is not None:
                raise ArgumentError("--test-size is for --held-out, all samples are tested on")
            return None
        if rows is None:
            return 0.2 if self.test_size is None else self.test_size, self.seed or 0, None
        if not known:
            raise ArgumentError(
                f"--held-out needs the data of training, {rows.rows:,} samples as they were then; {name} has others"
            )
        if rows.test_size is None:
            if self.held_out:
                raise ArgumentError(
                    f"--held-out: the model was trained on {rows.trained:,} samples, none were left out"
                )
            return None
        self.check("--test-size", self.test_size, rows.test_size)
        self.check("--seed", self.seed, rows.seed)
        return rows.test_size, rows.seed, rows.drawn

    @staticmethod
    def check(option: str, given: float | None, own: float) -> None:
        """Raise where an option is not as it was in training."""
        if given is not None and given != own:
            raise ArgumentError(f"{option} must be {own:g} as in training, or left out, got {given:g}")


def tested(
    name: str, batches: Loader, part: tuple[float, int, bool | None] | None, rows: TrainingRows | None, known: bool
) -> Tested:
    """Samples, and what can be said of them; see :class:`Which`."""
    if part is not None:
        said = f"which training left out by --test-size {part[0]:g} and --seed {part[1]}"
        return Tested(name, batches, said if known else f"{said} if it had these", 0 if known else None)
    if rows is None:
        return Tested(name, batches, "whether the model was trained on them, its file does not say", None)
    if not known:
        return Tested(name, batches, "not the data of training as they were then", None)
    which = "all" if rows.trained == rows.rows else f"{rows.trained:,}"
    return Tested(name, batches, f"{which} of which the model was trained on", rows.trained)


def labelled_samples(model: Model, data: Sequence[str], which: Which) -> Tested:
    """Samples and labels to test a model on."""
    of = model.preparation
    recipe, of_training = (None, None) if of is None else (of.table, of.rows)
    if recipe is not None:
        table = read_table(of_table(name := a_table(data)), like=recipe)
        known = table.has(of_training)
        if (part := which.part(name, of_training, known)) is not None:
            table = table.split_as(*part)[1]
        return tested(name, model.batches(table, labelled=True), part, of_training, known)
    paths = [Path(os.path.expanduser(path)) for path in data]
    if not paths:
        return tested_digits(model, which, of_training)
    if is_images(paths[0]):
        name, _, test = images(paths, 0)
        return Tested(name, model.batches(*test), "its test set", None)
    name, arrays = arrays_of(paths)
    own_test = arrays.X_test is not None and arrays.Y_test is not None
    X, Y = (arrays.X_test, np.asarray(arrays.Y_test)) if own_test else (arrays.X, arrays.Y)
    X, Y = rows(X), Y[:, 0] if Y.ndim == 2 and Y.shape[1] == 1 else Y
    if len(X) != len(Y):
        raise DataFormatError(f"{name}: expected a target for each sample, found {len(X)} and {len(Y)}")
    known = of_training is not None and of_training.are_of(len(X), first_of(X))
    of_labels, part = model.net.loss_name.partition("(")[0] in LOSSES_OF["classification"], None
    if not own_test and (part := which.part(name, of_training, known)) is not None:
        labels = np.unique(Y, return_inverse=True)[1] if of_labels else None
        held = split(len(X), *part[:2], labels, "--test-size")[1]
        X, Y = taken(X, held), Y[held]
    batches = model.batches(X, Y if model.net.loss_function.classifies else Y.astype(model.net.dtype))
    return Tested(name, batches, "its test set", None) if own_test else tested(name, batches, part, of_training, known)


def tested_digits(model: Model, which: Which, of_training: TrainingRows | None) -> Tested:
    """The bundled digits, split as in training; or by --seed where the model does not say how."""
    seed = seed_of_digits(of_training)
    if seed is not None:
        which.check("--seed", which.seed, seed)
    name, train, test = images([], (which.seed or 0) if seed is None else seed)
    if which.held_out is False:
        test = np.concatenate([train[0], test[0]]), np.concatenate([train[1], test[1]])
    part = None if which.held_out is False else (0.2, (which.seed or 0) if seed is None else seed, None)
    return tested(name, model.batches(*test), part, of_training, seed is not None)


def seed_of_digits(of_training: TrainingRows | None) -> int | None:
    """The seed by which the bundled digits were split in a training on them; None if it was on others."""
    if of_training is None or of_training.test_size is None:
        return None
    _, (X, _), (X_test, _) = images([], of_training.seed)
    whole = dataclasses.replace(rows_of_digits(X, X_test, of_training.seed), trained=of_training.trained)
    return of_training.seed if of_training == whole else None


def a_table(data: Sequence[str]) -> str:
    """The only file of DATA, for a model that was trained on a table."""
    if len(data) != 1:
        raise ArgumentError(
            f"DATA must be one table, as the model was trained on a table, got {' '.join(data) or 'none'}"
        )
    check_there(data[0])
    return data[0]
