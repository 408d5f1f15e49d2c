"""The checkpoints of a run: when it is saved, what is saved, and how it is resumed."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import hashlib
import itertools
import operator
import re
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gpubatch.checkpoint import Checkpoints, read
from gpubatch.errors import (
    ArgumentError,
    CheckpointError,
    CheckpointWarning,
    DataFormatError,
    GpubatchError,
    ResumeWarning,
)
from gpubatch.loader import Loader, epochs_of
from gpubatch.nn import Network
from gpubatch.optim import given_hyper, load_resumed
from gpubatch.own import live
from gpubatch.train.compared import changed_arguments, changed_callbacks, describe_callbacks, has_state, in_order
from gpubatch.train.history import History
from gpubatch.train.in_use import in_use
from gpubatch.train.record import EpochProgress, Record
from gpubatch.train.written import changed_code, describe_code

# What the words for a Dense layer say of its first weights.
FIRST_VALUES = r", init=(?:'[^']*'|[^,()]*)(?:, bias_init=(?:[^,()]*|\([^()]*\)))?"
DENSE = re.compile(rf"(\w+\(inputs=\d+, outputs=\d+, bias=(?:True|False)){FIRST_VALUES}")


class RunCheckpoints:
    """Saves a run in ``store`` and resumes it from there; without a store, nothing is ever saved.

    ``callbacks`` with ``state_dict`` and ``load_state_dict`` are saved too. ``arguments()`` are those of ``fit`` by
    name; a resumed run says which of them differ, and which function as schedule gives another number at ``places``.
    Of ranks, rank 0 writes, and all read what it wrote.
    """

    def __init__(
        self,
        store: Checkpoints | None,
        record: Record,
        callbacks: Sequence[Any],
        arguments: Callable[[], dict[str, Any]],
        places: Iterable[tuple[int, int]] = (),
    ) -> None:
        self.store, self._record = store, record
        self.callbacks, self._describe = list(callbacks), arguments
        self._arguments = {} if store is None else arguments()
        self._callbacks = [callback for callback in callbacks if has_state(callback)]
        self._saved_at = record.state.opt.t
        self._given = given_hyper(record.state.opt, places)
        self.resumed = ""  # where the run goes on from, in words

    @functools.cached_property
    def batches(self) -> dict[str, Any]:
        """The settings that determine the batches."""
        return describe_batches(self._record.state.loader)

    @functools.cached_property
    def code(self) -> dict[str, str]:
        """Digests of what the user wrote."""
        return describe_code(self._record.state.net, self._record.state.opt)

    @property
    def steps_left(self) -> int | None:
        """Steps until the next save, 0 or less if it is due; None if saves do not depend on steps."""
        if self.store is None or self.store.every is None:
            return None
        return self.store.every - (self._record.state.step - self._saved_at)

    def after_steps(self) -> None:
        """Save the run if enough steps were made."""
        if self.steps_left is not None and self.steps_left <= 0:
            self.save()

    def after_epoch(self) -> None:
        """Save the run, unless steps are counted."""
        if self.steps_left is None:
            self.save()

    def save(self) -> None:
        """Save the run as it is now, unless nothing happened since it was saved last."""
        record = self._record
        if self.store is None or not record.unsaved:
            return
        record.check_alike()
        with record.together.phase():
            saved = self._write(self.store) if record.together.first else True
        self._saved_at = record.state.opt.t
        record.unsaved = not record.together.share(saved)

    def _write(self, store: Checkpoints) -> bool:
        """Write a checkpoint; return whether that succeeded."""
        record, state = self._record, self._record.state
        # A thread that writes while training goes on needs copies; those of a GPU's arrays the store makes itself.
        state_of: Callable[[Any], dict[str, Any]] = live
        if store.background and state.net.backend.name == "cpu":
            store.wait()  # so that there are never copies for two
            state_of = operator.methodcaller("state_dict")
        history = {
            # Arrays hold numbers exactly, and in less space than text.
            name: np.array(value, np.float64) if isinstance(value, list) else value
            for name, value in vars(state.history).items()
        }
        saved = {
            "network": state_of(state.net),
            "optimizer": state_of(state.opt),
            "given": self._given,
            "loader": state.loader.state_dict(),
            "batches": self.batches,
            "description": describe_network(state.net),
            "code": self.code,
            "plan": dataclasses.asdict(state.loader.plan),
            "history": history,
            "part": dataclasses.asdict(record.epoch),
            "skipped_in_a_row": record.skipped_in_a_row,
            "loss_scale": None if record.scale is None else record.scale.state_dict(),
            "callbacks": list(map(state_of, self._callbacks)),
            "about callbacks": describe_callbacks(self.callbacks),
            "arguments": self._arguments,
        }
        return store.save(saved)

    def save_at_last(self) -> str:
        """Save a run that ends early, and wait until that is done; what became of it, for the end of a message."""
        if self.store is None:
            return ""
        try:
            self.save()
            if self._wait() and not self._record.unsaved:
                return f", and so does the newest checkpoint in {self.store.folder}"
        except CheckpointError as error:
            return f"; {error}"
        return ""

    def try_callbacks(self) -> None:
        """Raise at once what the first save would raise for a callback's state."""
        if self.store is not None and self._record.together.first:
            self.store.check({"callbacks": list(map(live, self._callbacks))})

    def resume(self) -> None:
        """Go to where the newest checkpoint was saved, if there is one."""
        if self.store is None:
            return
        together = self._record.together
        with together.phase():
            found = self.store.newest() if together.first else None
        newest = together.share(None if found is None else found[0].name)
        with together.phase():
            if found is None and newest is not None:
                path = self.store.folder / newest
                found = path, read(path)
            if found is not None:
                self._restore(*found)

    def _restore(self, path: Path, saved: Mapping[str, Any]) -> None:
        """Go to where the checkpoint ``path`` was saved; if it is refused, the network is as before."""
        record, state = self._record, self._record.state
        before = state.net.state_dict()
        try:
            check_same_network(saved["description"], describe_network(state.net))
            check_same_batches(saved.get("batches", {}), self.batches)
            others = list[str]()
            saved_loader = self._with_batch_size(saved, others)
            copy.copy(state.loader).load_state_dict(saved_loader)  # whether it would
            history = {
                name: value.tolist() if isinstance(value, np.ndarray) else value
                for name, value in saved["history"].items()
            }
            state.history, record.epoch = History(**history), EpochProgress(**saved["part"])
            record.skipped_in_a_row = saved["skipped_in_a_row"]
            if len(saved["callbacks"]) != len(self._callbacks):
                raise ArgumentError(
                    f"it has the state of {len(saved['callbacks'])} callbacks, of those given now "
                    f"{len(self._callbacks)} have state_dict and load_state_dict"
                )
            states = zip(self._callbacks, saved["callbacks"], strict=True)
            if "about callbacks" in saved:  # checkpoints of old do not tell
                others += changed_callbacks(saved["about callbacks"], self.callbacks)
                states = zip(in_order(saved["about callbacks"], self.callbacks), saved["callbacks"], strict=True)
            state.net.load_state_dict(saved["network"])
            changed = load_resumed(state.opt, saved["optimizer"], saved.get("given"))
            state.loader.load_state_dict(saved_loader)
            if record.scale is not None:
                record.scale.load_state_dict(saved["loss_scale"])
            for callback, state_of in states:
                callback.load_state_dict(state_of)
            self._arguments = self._describe()  # the loader's state decides which fraction is held out
            others += changed_arguments(saved.get("arguments", {}), self._arguments)
            others += changed_code(saved.get("code", {}), self.code)
        except Exception as error:
            state.net.load_state_dict(before)
            if isinstance(error, GpubatchError):
                raise type(error)(f"{path} cannot be resumed here: {error}") from error
            raise DataFormatError(f"{path} was not saved by fit: {error!r}") from error
        state.step = self._saved_at = state.opt.t
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(path.stat().st_mtime))
        done = len(state.history.loss)
        place = f"in epoch {done + 1}" if record.epoch.batches else f"at the end of epoch {done}"
        self.resumed = f"resumed after step {state.step}, {place}, saved at {when}"
        for what, lines in (("hyper-parameters", changed), ("arguments", others)):
            if lines:
                record.warn(f"the run goes on with other {what}:\n" + "\n".join(lines), ResumeWarning)

    def _with_batch_size(self, saved: Mapping[str, Any], lines: list[str]) -> Mapping[str, Any]:
        """The loader's saved state, with the batch size that is given now; a line for ``lines`` if it differs."""
        state, loader = saved["loader"], self._record.state.loader
        before, now = state["batch_size"], loader.batch_size
        if before == now or epochs_of(loader).automatic:
            return dict(state)
        if saved["part"]["batches"]:
            raise ArgumentError(
                f"it was saved in the middle of an epoch with batches of {before}, and batch_size is {now}: another "
                "size can only begin with an epoch"
            )
        lines.append(f"batch_size: {before} before, {now} now")
        return {**state, "batch_size": now}

    @contextlib.contextmanager
    def completed(self) -> Iterator[None]:
        """On exit, wait for a checkpoint that is still being written; an earlier error takes precedence."""
        try:
            yield
        except BaseException:
            if self.store is not None and self._record.together.first:
                with contextlib.suppress(CheckpointError):
                    self.store.wait()
            raise
        self._wait()

    def _wait(self) -> bool:
        """Wait until the last checkpoint is written; return whether that succeeded."""
        together = self._record.together
        if self.store is None:
            return True
        with together.phase():
            written = self.store.wait() if together.first else True
        return bool(together.share(written))


@contextlib.contextmanager
def open_checkpoints(checkpoint: Any, resume: bool, first: bool = True) -> Iterator[Checkpoints | None]:
    """Inside a ``with``, this run holds the folder of :func:`fit`'s ``checkpoint``; the first rank may write to it."""
    if checkpoint is None:
        if resume:
            raise ArgumentError("resume=True needs checkpoint=, the folder that has what to go on from")
        yield None
        return
    store = checkpoint if isinstance(checkpoint, Checkpoints) else Checkpoints(checkpoint)
    if not first:
        yield store
        return
    with contextlib.suppress(OSError):  # of which open() tells
        store.folder.mkdir(parents=True, exist_ok=True)
    with in_use(store.folder):
        store.open()
        if not resume and store.files():
            # A new run would remove them, one after another.
            raise ArgumentError(
                f"{store.folder} has checkpoints of a run: go on from them with resume=True (--resume), or take "
                "another folder"
            )
        yield store


def describe_network(net: Network) -> dict[str, Any]:
    """What two networks must have in common for one to go on with the other's parameters, as JSON can hold it.

    How a Dense layer drew its first weights has no effect any more and is left out.
    """
    layers = {
        # Functions in a user's layer are shown with their address, which differs from process to process.
        f"layer {i + 1}": without_init(re.sub(r" at 0x[0-9a-fA-F]+", "", repr(layer)))
        for i, layer in enumerate(net.layers)
    }
    common = {"dtype": net.dtype.name, "precision": net.precision, "loss": net.loss_name, "l2": net.l2}
    return {**common, "seed": net.seed, "number of layers": len(layers), **layers}


def without_init(layer: str) -> str:
    """The words for a layer, without ``init`` and ``bias_init`` if it is a Dense one."""
    return DENSE.sub(r"\1", layer)


def has_old_biases(saved: Mapping[str, Any]) -> bool:
    """Whether a saved network has biases before batch norm, as ``mlp`` of version 0.1 made them."""
    layers = [str(saved.get(f"layer {i + 1}")) for i in range(len(saved))]
    return any(
        layer.startswith("Dense(") and "bias=True" in layer and following.startswith("BatchNorm(")
        for layer, following in itertools.pairwise(layers)
    )


def to_resume(store: Checkpoints) -> tuple[str, int | None]:
    """The arguments that make the network and the loader of the run in ``store`` again.

    The ``init`` of :func:`~gpubatch.nn.mlp`, and the loader's ``shards``.
    """
    saved: dict[str, Any] = {}
    with warnings.catch_warnings(), contextlib.suppress(DataFormatError):  # fit tells of damaged files
        warnings.simplefilter("ignore", CheckpointWarning)
        if (found := store.newest()) is not None:
            saved = found[1]
    init = "v0.1" if has_old_biases(saved.get("description", {})) else "auto"
    return init, saved.get("loader", {}).get("shards")


def describe_batches(loader: Loader) -> dict[str, Any]:
    """What makes a loader's batches what they are, besides their order, which its own state has, as JSON can hold it.

    Of the samples there is a digest of the first one, the one in the middle, and the last one, which are read where
    they are not arrays; of arrays one of all, or of many; of weights one of all.
    """
    columns, n = epochs_of(loader).columns, loader.n_samples
    some = columns.at(np.unique([0, n // 2, n - 1]))[:2]
    weights = None if columns.weights is None else loader.backend.to_numpy(columns.weights).tobytes()
    digest = hashlib.sha256(b"".join(loader.backend.to_numpy(array).tobytes() for array in some))
    return {
        "held out": columns.n_samples - n,
        "dtype": loader.dtype.name,
        "scale": loader.scale,
        # Whether a function is the same one, nobody can tell; what it makes of three samples says much of it.
        "prepare": None if loader.prepare is None else "a function",
        "augment": None if loader.augment is None else "a function",
        "prepared": columns.summary_of(some),
        "shapes": [list(array.shape[1:]) for array in some],
        "samples": digest.hexdigest()[:16],
        "content": columns.digest(),
        "augmented": {loader.backend.name: columns.summary_of(some, augmented=True)},
        "weights": None if weights is None else hashlib.sha256(weights).hexdigest()[:16],
    }


def check_same_batches(saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Raise an error that names the first difference between two loaders' batches; older checkpoints say nothing."""
    if saved:
        saved = {"weights": None, **saved}  # checkpoints from before there were any
    for name, value in own.items():
        before = saved.get(name, value)
        if name == "augmented":  # other devices draw other numbers
            before, value = (numbers.get(next(iter(value)), []) for numbers in (before, value))
        if name in ("prepared", "augmented") and before and value and np.allclose(before, value, rtol=1e-3, atol=1e-6):
            continue  # other devices round otherwise
        if before != value:
            weighted = "other weights of samples or classes" if before else "no weights"
            here = "" if before and value else f", this one has {'some' if value else 'none'}"
            words = {
                "held out": (f"{before} samples held out for validation", f", this one holds out {value}"),
                "samples": ("other samples", ""),
                "content": ("other samples", ""),
                "shapes": (f"samples of the shapes {saved[name]}", f", this one has {value}"),
                "prepared": ("another prepare, which makes other numbers of the same samples", ""),
                "augmented": ("another augment, which makes other numbers of the same samples", ""),
                "weights": (weighted, here),
            }
            what, own_words = words.get(name, (f"{name}={saved[name]!r}", f", this one has {value!r}"))
            raise ArgumentError(f"it is of a loader with {what}{own_words}")


def check_same_network(saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Raise an error that names the first difference between two networks."""
    saved = {"precision": "full", **saved}  # checkpoints from before there was another
    saved = {name: without_init(value) if isinstance(value, str) else value for name, value in saved.items()}
    for name, value in own.items():
        if saved[name] != value:
            remedy = ""
            if has_old_biases(saved) and str(saved[name]).replace("bias=True", "bias=False") == value:
                remedy = (
                    ": gpubatch 0.1 made biases before batch norm; make the network with gb.mlp(..., init='v0.1'), or "
                    "Dense(bias=True), to go on with them"
                )
            raise ArgumentError(f"it is of a network whose {name} is {saved[name]}, this one's is {value}{remedy}")
