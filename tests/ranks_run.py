"""A run on ranks for the tests: ``python ranks_run.py FOLDER OPTIONS``, OPTIONS an object of JSON.

Each rank writes FOLDER/rank0.json and so on: a digest of what the run has changed, its history, and what ended it.

options: see :class:`Options`.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import gpubatch as gb
from gpubatch.train import memory

ROWS, FEATURES, EPOCHS, BATCH = 330, 6, 3, 48  # uneven: the last batch has 42 rows
VALIDATED = 2500  # three batches: of four ranks one has none


@dataclasses.dataclass
class Options:
    """What is trained, where it is saved, and what goes wrong.

    kind: of network or data, see :func:`parts_of`
    checkpoint, resume: of ``fit``; saved after every ``every`` steps
    stop: the step after which the run is stopped, by rank ``on``
    told: the file that gets the time of the fault, in seconds
    fault: see :func:`fault`; on rank ``on`` after ``at`` steps, in the callback's method ``place``, or where a run
        reads its validation set ("read"), writes its second checkpoint ("write") or tries a batch size ("auto")
    """

    kind: str = "plain"
    checkpoint: str | None = None
    resume: bool = False
    every: int | None = 1
    stop: int | None = None
    fault: str = ""
    on: int = 1
    at: int = 9
    place: str = "on_step"
    shards: int = 4
    told: str = ""


NOTED = list[Path]()  # where the time of the fault is written to


def note() -> None:
    """Write the time of the fault, the first time."""
    for path in NOTED:
        path.write_text(str(time.time()))
    NOTED.clear()


class Files:
    """A source of blocks of 32 rows; one that is ``damaged`` cannot be read after a while."""

    block = 32

    def __init__(
        self, X: np.ndarray, Y: np.ndarray, damaged: bool = False, at_read: Callable[[], None] | None = None
    ) -> None:
        self.X, self.Y, self.damaged, self.read_before, self.at_read = X, Y, damaged, 0, at_read

    def __len__(self) -> int:
        return len(self.X)

    def read(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        self.read_before += len(index)
        if self.at_read is not None and self.read_before > 1.5 * len(self.X):  # after the checks before a run
            act, self.at_read = self.at_read, None
            act()
        if self.damaged and self.read_before > 200:
            note()
            raise gb.errors.DataFormatError("part-3.bin is damaged: a block of 7 bytes where 32 rows belong")
        return self.X[index], self.Y[index]


def parts_of(o: Options, ranks: gb.Ranks) -> tuple[gb.Network, gb.Loader, gb.Optimizer, dict[str, Any]]:
    """Network, loader, optimizer, and other arguments of ``fit``."""
    draw = np.random.default_rng(5)
    X = draw.normal(size=(ROWS, FEATURES)).astype(np.float32)
    Y = (X[:, 0] + X[:, 1] * X[:, 2] > 0).astype(np.int64)
    here = ranks.rank == o.on
    V = draw.normal(size=(VALIDATED, FEATURES)).astype(np.float32)
    held_out = V, (V[:, 0] > 0).astype(np.int64)
    more: dict[str, Any] = {"validation": held_out}
    of_net: dict[str, Any] = {"sizes": [FEATURES, 12, 2], "seed": 3}
    of_loader: dict[str, Any] = {"batch_size": BATCH, "seed": 1}
    data: tuple[Any, ...] = X, Y
    if o.kind == "dropout":
        of_net |= {"dropout": 0.3, "l2": 1e-3}
        more |= {"validation": 0.2}
    elif o.kind == "norm":
        of_net |= {"batch_norm": True}
    elif o.kind == "clipped":
        more |= {"max_norm": 0.3}
    elif o.kind == "skipped":
        X[7] = 3e38  # its loss is not finite: the step is left out, on all ranks
    elif o.kind == "weights":
        of_loader |= {"weight": draw.random(ROWS), "class_weight": "balanced"}
    elif o.kind == "windowed":
        data = (Files(X, Y, damaged=here and o.fault == "damaged file"),)
        of_loader |= {"window": 128}
        act = functools.partial(fault, o) if here and o.place == "read" and o.fault else None
        more |= {"validation": Files(*held_out, at_read=act), "metrics": ["f1"]}
    elif o.kind == "averaged":
        more |= {"callbacks": [gb.WeightAverage(0.9), gb.ReduceOnPlateau(0.5, 0), gb.EarlyStopping(2)]}
    if here and o.fault == "seed":
        of_net |= {"seed": 4}
    if here and o.fault == "network":
        of_net |= {"sizes": [FEATURES, 13, 2]}
    if o.fault == "prepare":
        of_loader |= {"prepare": Prepare(here)}
    net = gb.mlp(**of_net, backend="cpu")
    if o.place == "auto":
        of_loader |= {"batch_size": "auto", "at_most": 64}
    loader = gb.Loader(*data, **of_loader, ranks=ranks, shards=o.shards, backend="cpu")
    return net, loader, gb.Adam(net.parameters, 0.01), more


class Prepare:
    """Fails after some batches, on one rank."""

    def __init__(self, here: bool) -> None:
        self.here, self.calls = here, 0

    def __call__(self, x: np.ndarray) -> np.ndarray:
        self.calls += 1
        if self.here and self.calls > 12:
            note()
            raise KeyError("no such feature")
        return x


def fault(o: Options, net: gb.Network | None = None) -> None:
    """Do what is to go wrong on this rank."""
    note()
    if o.fault == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif o.fault in ("SIGTERM", "SIGINT"):
        os.kill(os.getpid(), getattr(signal, o.fault))
    elif o.fault == "raises":
        raise ZeroDivisionError("a callback divides by 0")
    elif o.fault == "exits":
        sys.exit(3)
    elif o.fault == "interrupt":
        raise KeyboardInterrupt
    elif o.fault == "no memory":
        raise MemoryError("there is no room")
    elif o.fault == "stops":
        raise gb.StopTraining("enough")
    elif o.fault == "memory":
        assert net is not None
        core = gb.nn.core_of(net)
        reserve = core.reserve

        def fails(rows: int) -> None:
            if rows > 8:
                raise MemoryError("there is no room for these rows")
            reserve(rows)

        core.reserve = fails  # type: ignore[method-assign]
    elif o.fault == "disk":
        gb.checkpoint._write_synced = full_disk  # type: ignore[assignment]


def full_disk(*arguments: Any) -> str:
    raise OSError(28, "No space left on device")


def in_place(o: Options, ranks: gb.Ranks) -> None:
    """Have the run do what is to go wrong while it writes its second checkpoint, or tries a batch size."""
    written, write = itertools.count(1), gb.checkpoint._write_synced

    def writes(path: Path, *given: Any) -> str:
        if next(written) == 2:
            path.write_bytes(b"half a checkpoint")
            fault(o)
            path.unlink(missing_ok=True)
        return write(path, *given)

    def rehearses(*given: Any) -> str | None:
        fault(o)
        return rehearse(*given)

    rehearse = memory.rehearse
    if ranks.rank == o.on and o.place == "write":
        gb.checkpoint._write_synced = writes
    if ranks.rank == o.on and o.place == "auto":
        memory.rehearse = rehearses


class Script:
    """The callback that does what the options say."""

    def __init__(self, o: Options, rank: int) -> None:
        self.o, self.rank = o, rank

    def on_step(self, state: gb.TrainingState) -> None:
        if self.rank == self.o.on and state.step == self.o.stop:
            raise gb.StopTraining(f"rank {self.rank} has seen enough")
        if self.o.fault and self.o.place == "on_step" and self.rank == self.o.on and state.step == self.o.at:
            fault(self.o, state.net)


class Elsewhere:
    """The callback that does it in another method, the first time that is called after enough steps."""

    def __init__(self, o: Options, rank: int) -> None:
        def act(state: gb.TrainingState, *_: Any) -> None:
            if rank == o.on and (state.step >= o.at or o.place in ("on_start", "on_exit")) and next(calls) == 0:
                fault(o, state.net)

        calls = itertools.count()
        setattr(self, o.place, act)


def digest_of(net: gb.Network, opt: gb.Optimizer) -> str:
    arrays = [net.parameters.flat, net.buffers.flat, *(views.flat for views in opt.state.values())]
    return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()[:16]


def main(folder: Path, o: Options) -> None:
    warnings.simplefilter("ignore", gb.errors.FewStepsWarning)
    ranks = gb.Ranks()
    found: dict[str, Any] = {"rank": ranks.rank, "size": ranks.size}
    NOTED.extend([Path(o.told)] if o.told and ranks.rank == o.on else [])
    if o.fault == "ends early" and ranks.rank == o.on:
        note()
        return
    net, loader, opt, more = parts_of(o, ranks)
    store = None if o.checkpoint is None else gb.Checkpoints(o.checkpoint, o.every)
    if o.fault == "damaged checkpoint" and ranks.rank == o.on:
        gb.train.resume.read = lambda path: gb.checkpoint.read(path.with_name("checkpoint-1.safetensors"))
    more["callbacks"] = [*more.get("callbacks", []), Script(o, ranks.rank)]
    if o.fault and o.place.startswith("on_") and o.place != "on_step":
        more["callbacks"].append(Elsewhere(o, ranks.rank))
    in_place(o, ranks)
    told = []
    if o.fault in ("seed", "network", "damaged checkpoint"):
        note()
    try:
        with warnings.catch_warnings(record=True) as seen:
            history = gb.fit(
                *(net, loader, opt, EPOCHS), **more, checkpoint=store, resume=o.resume, progress=True, ranks=ranks
            )
            told = [str(warning.message) for warning in seen]
    except (gb.errors.GpubatchError, KeyboardInterrupt, SystemExit) as error:
        found |= {"error": type(error).__name__, "message": str(error)}
        history = getattr(error, "history", None)
        if type(error) is SystemExit:
            raise
    found |= {"digest": digest_of(net, opt), "steps": opt.t, "warnings": told}
    if history is not None:
        found["history"] = history.to_dict()
    (folder / f"rank{ranks.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Options(**json.loads(sys.argv[2])))
