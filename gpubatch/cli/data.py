"""The data of a command, and a network for it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from gpubatch import datasets
from gpubatch.backend import Array, get_backend
from gpubatch.cli.options import DTYPES, integer, loss_named
from gpubatch.errors import ArgumentError, check_choice
from gpubatch.loader import Loader
from gpubatch.nn import Network, mlp
from gpubatch.train import drop_last_for

__all__ = ["Data", "Task"]


class Data:
    """Images from a folder, or the bundled digits, and a network for them.

    folder: where they are; None for the bundled digits
    hidden: the widths of the hidden layers, by comma
    samples: how many of the training set to take; None for all
    network: further arguments of :func:`~gpubatch.nn.mlp`
    """

    def __init__(
        self,
        folder: Path | None,
        hidden: str,
        backend: str,
        dtype: str,
        seed: int = 0,
        samples: int | None = None,
        **network: Any,
    ) -> None:
        self.hidden = [integer("--layers", width) for width in hidden.split(",") if hidden]
        where, dtype = get_backend(backend), check_choice("--dtype", dtype, DTYPES)
        self.name, (X, Y), self.test = load(folder, seed)
        self.sizes = [X.shape[1], *self.hidden, int(max(Y.max(), self.test[1].max())) + 1]
        self.X, self.Y, self.seed = X[:samples], Y[:samples], seed
        self.net = mlp(self.sizes, backend=where, dtype=dtype, seed=seed, **network)

    def words(self, *more: str) -> str:
        """Network and data in a line, for titles."""
        net = self.net
        parts = ["-".join(map(str, self.sizes)), *more, self.name, net.compute_dtype.name, net.backend.spec]
        return ", ".join(parts)

    def loader(self, batch_size: str, at_most: int, class_weight: str | None = None) -> Loader:
        """Batches of the training set, pixels from 0 to 1, perhaps with weights."""
        size = batch_size if batch_size == "auto" else integer("--batch-size", batch_size)
        single = isinstance(size, int) and size > 0 and len(self.X) % size == 1
        return Loader(
            *(self.X, self.Y),
            batch_size=size,
            drop_last=drop_last_for(self.net) if single else False,
            at_most=at_most,
            seed=self.seed,
            backend=self.net.backend,
            dtype=self.net.dtype,
            scale=1 / 255,
            class_weight=class_weight,
        )


@dataclasses.dataclass
class Task:
    """What the explorers need: a network, and arrays on its backend."""

    net: Network
    X: Array
    Y: Array
    test: tuple[Array, Array]
    seed: int
    words: str

    @classmethod
    def of(
        cls,
        folder: Path | None,
        hidden: str,
        loss: str,
        seed: int,
        backend: str,
        dtype: str,
        samples: int | None = None,
        label_smoothing: float = 0.0,
    ) -> Task:
        """The task that options name; ``samples`` of the training set, None for all."""
        data = Data(folder, hidden, backend, dtype, seed, samples, loss=loss_named(loss, label_smoothing))
        net = data.net

        def ready(X: np.ndarray, Y: np.ndarray) -> tuple[Array, Array]:
            return net.backend.asarray(np.multiply(X, 1 / 255, dtype=net.dtype)), net.backend.asarray(Y)

        return cls(net, *ready(data.X, data.Y), ready(*data.test), seed, data.words(data.net.loss_name))


def load(folder: Path | None, seed: int) -> tuple[str, datasets.Samples, datasets.Samples]:
    """The data in words, its training set and its test set: those in a folder, or the bundled digits."""
    if folder is None:
        return ("10,000 bundled MNIST digits", *datasets.mnist_10k(seed))
    if not folder.is_dir() and folder.parent.is_dir() and folder.name in datasets.mnist_sets(folder.parent):
        return (f"{folder.name} in {folder.parent}", *datasets.mnist(folder))
    if not folder.is_dir():
        raise ArgumentError(f"FOLDER must be a folder with MNIST or CIFAR-10 files, got {str(folder)!r}")
    names = {path.name for path in folder.iterdir()}
    if any("idx" in name for name in names):
        return (f"{next(iter(datasets.mnist_sets(folder)), '') or 'MNIST'} in {folder}", *datasets.mnist(folder))
    if any(name.startswith(("data_batch", "cifar-10")) for name in names):
        return (f"CIFAR-10 in {folder}", *datasets.cifar10(folder))
    raise ArgumentError(
        f"FOLDER has neither MNIST (train-images-idx3-ubyte ...) nor CIFAR-10 (data_batch_1.bin ...): {folder}"
    )
