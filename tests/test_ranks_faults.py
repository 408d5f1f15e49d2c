"""What ranks have not in common, and what one does alone: no run hangs, nor goes on with other bits.

What differs is found by threads of this process; who dies or is signalled is a process.
"""

from __future__ import annotations

import json
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from families import every
from many_ranks import mpi, on_threads
from ranks_run import digest_of
from test_ranks_fit import goes_on, run

import gpubatch as gb
from gpubatch.checkpoint import read
from gpubatch.train import resume

ROWS, EPOCHS = 330, 3


class Parts:
    """What a rank trains with, which a test changes on one of them."""

    def __init__(self, ranks: gb.Ranks) -> None:
        draw = np.random.default_rng(5)
        self.ranks = ranks
        self.X = draw.normal(size=(ROWS, 6)).astype(np.float32)
        self.Y = (self.X[:, 0] > 0).astype(np.int64)
        self.V = draw.normal(size=(2500, 6)).astype(np.float32)
        self.hidden, self.of_net = 12, dict[str, Any](seed=3)
        self.of_loader = dict[str, Any](batch_size=48, seed=1, shards=4)
        self.of_opt = dict[str, Any](lr=0.01)
        self.callbacks: list[Any] = [gb.ReduceOnPlateau(0.5)]
        self.of_fit = dict[str, Any]()
        self.epochs = EPOCHS

    def fit(self) -> tuple[str, dict[str, Any]]:
        """Digest and history of a run."""
        net = gb.mlp([6, self.hidden, 2], backend="cpu", **self.of_net)
        loader = gb.Loader(self.X, self.Y, ranks=self.ranks, backend="cpu", **self.of_loader)
        opt = gb.Adam(net.parameters, **self.of_opt)
        self.of_fit.setdefault("validation", (self.V, (self.V[:, 0] > 0).astype(np.int64)))
        history = gb.fit(
            *(net, loader, opt, self.epochs),
            callbacks=self.callbacks,
            progress=False,
            ranks=self.ranks,
            **self.of_fit,
        )
        return digest_of(net, opt), {k: v for k, v in history.to_dict().items() if k != "seconds"}


class Hooks:
    """A callback of functions."""

    def __init__(self, **hooks: Callable[..., Any]) -> None:
        vars(self).update(hooks)


def changed(**changes: Any) -> Callable[[Parts], None]:
    """Other attributes, and other items of those that are dictionaries."""

    def change(parts: Parts) -> None:
        for name, value in changes.items():
            own = getattr(parts, name)
            setattr(parts, name, {**own, **value} if isinstance(own, dict) else value)

    return change


def one_row_of_many(p: Parts) -> None:
    p.X[41] += 1


def other_labels(p: Parts) -> None:
    p.Y = 1 - p.Y


def fewer_rows(p: Parts) -> None:
    p.X, p.Y = p.X[:300], p.Y[:300]


def another_validation_set(p: Parts) -> None:
    p.V += 1


def weights_of_validation(p: Parts) -> None:
    p.of_fit["validation"] = p.V, (p.V[:, 0] > 0).astype(np.int64), np.random.default_rng(0).random(len(p.V))


# What one rank has otherwise than the others, and what all are told before the first step.
DIFFERENT: dict[str, tuple[Callable[[Parts], None], str]] = {
    "one row of many": (one_row_of_many, "samples: rank 1 .* has others"),
    "labels": (other_labels, "samples"),
    "fewer rows": (fewer_rows, "samples, loader"),
    "validation set": (another_validation_set, "validation"),
    "weights of the validation set": (weights_of_validation, "validation"),
    "no validation set": (changed(of_fit={"validation": None}), "validation"),
    "fraction": (changed(of_fit={"validation": 0.25}), "samples, .*validation"),
    "layers": (changed(hidden=13), "network: .* 'Dense.inputs=6, outputs=12, bias=True.' on rank 0"),
    "seed of the network": (changed(of_net={"seed": 4}), "network's seed is 3 on rank 0, 4 on rank 1"),
    "dtype": (changed(of_net={"dtype": "float64"}, of_loader={"dtype": "float64"}), "network, samples"),
    "l2": (changed(of_net={"l2": 0.1}), "network's l2"),
    "seed of the loader": (changed(of_loader={"seed": 2}), "loader's seed"),
    "batch size": (changed(of_loader={"batch_size": 32}), "loader, batch_size"),
    "shards": (changed(of_loader={"shards": 8}), "loader's shards"),
    "class weights": (changed(of_loader={"class_weight": "balanced"}), "samples's weights"),
    "weights": (changed(of_loader={"weight": np.arange(ROWS) % 7 + 1.0}), "samples's weights"),
    "learning rate": (changed(of_opt={"lr": 0.02}), "hyper-parameters"),
    "beta1": (changed(of_opt={"beta1": 0.8}), "hyper-parameters"),
    "schedule": (changed(of_opt={"lr": gb.CosineDecay(0.01, 5, per="step")}), "hyper-parameters"),
    "epochs": (changed(epochs=4), "epochs is 3 on rank 0, 4 on rank 1"),
    "max_norm": (changed(of_fit={"max_norm": 1.0}), "max_norm"),
    "metrics": (changed(of_fit={"metrics": ["f1"]}), "metrics"),
    "execution": (changed(of_fit={"execution": "eager"}), "execution"),
    "an argument of a callback": (changed(callbacks=[gb.ReduceOnPlateau(0.2)]), "callbacks"),
    "a callback": (changed(callbacks=[gb.ReduceOnPlateau(0.5), Hooks(on_epoch=print)]), "callbacks"),
}


@every("case", DIFFERENT, ["one row of many", "validation set"])
def test_what_differs_is_refused_by_all(case: tuple[Callable[[Parts], None], str]) -> None:
    change, words = case

    def run(ranks: gb.Ranks) -> str:
        parts = Parts(ranks)
        if ranks.rank == 1:
            change(parts)
        with pytest.raises(gb.errors.ArgumentError) as caught:
            parts.fit()
        return str(caught.value)

    told = on_threads(2, run)
    assert told[0] == f"rank 1: {told[1]}"
    with pytest.raises(AssertionError, match=f"all ranks must have the same .*{words}"):
        raise AssertionError(told[1])


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["gpubatch", "numpy"])
def test_ranks_have_the_same_versions(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from gpubatch.train import loop

    own = loop.versions()

    def found() -> str:
        return json.dumps({**json.loads(own), **({name: "0.0"} if threading.current_thread() in second else {})})

    second = list[threading.Thread]()
    monkeypatch.setattr(loop, "versions", found)

    def run(ranks: gb.Ranks) -> str:
        if ranks.rank == 1:
            second.append(threading.current_thread())
        ranks.barrier()
        with pytest.raises(
            gb.errors.ArgumentError, match=f"versions's {name} is .* on rank 0, '0.0' on rank 1"
        ) as caught:
            Parts(ranks).fit()
        return str(caught.value)

    on_threads(2, run)


# What a callback does on one rank alone, and after how many steps all are told: by epochs, and by a checkpoint each.
DIVERGING: dict[str, tuple[Callable[[], Hooks], int, int]] = {
    "gradient": (lambda: Hooks(on_gradient=lambda state, grads: grads.flat.__imul__(1.5)), 7, 1),
    "weights in a step": (lambda: Hooks(on_step=lambda state: state.net.parameters["W1"].__iadd__(1e-3)), 7, 1),
    "weights after an epoch": (lambda: Hooks(on_epoch=lambda state: state.net.parameters["W1"].__iadd__(1e-3)), 14, 8),
    "weights after the last epoch": (
        lambda: Hooks(on_epoch=lambda s: s.net.parameters["W1"].__iadd__(len(s.history.loss) == EPOCHS)),
        *(21, 21),
    ),
    "running statistics": (lambda: Hooks(on_epoch=lambda state: state.net.buffers.flat.__iadd__(1e-3)), 14, 8),
    "learning rate": (lambda: Hooks(on_epoch=lambda state: setattr(state.opt, "lr", 0.5)), 14, 8),
}


@every("case", DIVERGING, ["gradient", "weights after the last epoch"])
@pytest.mark.parametrize("saved", [False, True])
def test_ranks_that_train_apart_are_told_so(
    case: tuple[Callable[[], Hooks], int, int], saved: bool, tmp_path: Path
) -> None:
    """After the epoch, and before a checkpoint is written."""
    hooks, by_epochs, by_steps = case

    def run(ranks: gb.Ranks) -> str:
        parts = Parts(ranks)
        parts.of_net |= {"batch_norm": True}
        if saved:
            parts.of_fit |= {"checkpoint": gb.Checkpoints(tmp_path, every=1)}
        nothing = Hooks(**{name: lambda *_: None for name in vars(hooks())})
        parts.callbacks = [hooks() if ranks.rank == 1 else nothing]
        with pytest.raises(gb.errors.RankError) as caught:
            parts.fit()
        return str(caught.value)

    first, second = on_threads(2, run)
    assert first == second
    words = "rank 1 has other parameters or running statistics than rank 0"
    assert first.startswith(f"{words} after {by_steps if saved else by_epochs} steps")


@pytest.mark.exhaustive
@pytest.mark.parametrize("batch_size", [1, 3, 48, ROWS])
@pytest.mark.parametrize("weighing", [{}, {"class_weight": "balanced"}, {"weight": np.arange(ROWS) % 3 * 1.0}])
@pytest.mark.parametrize("size", [2, 4])
def test_batches_smaller_than_shards_have_the_bits_of_one(batch_size: int, weighing: dict[str, Any], size: int) -> None:
    """Some parts are empty, in the last batch those of whole ranks."""

    def run(ranks: gb.Ranks) -> tuple[str, dict[str, Any]]:
        parts = Parts(ranks)
        parts.of_loader |= {"batch_size": batch_size, "shards": 8, **weighing}
        parts.of_net |= {"dropout": 0.2, "l2": 1e-3}
        parts.callbacks = [gb.EarlyStopping(1, monitor="loss"), gb.ReduceOnPlateau(0.5, 0), gb.WeightAverage(0.9)]
        parts.epochs = 2
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return parts.fit()

    alone = run(gb.Ranks())
    assert on_threads(size, run) == [alone] * size


@pytest.mark.exhaustive
@pytest.mark.parametrize("what", ["absent", "another"])
def test_a_checkpoint_that_one_rank_sees_otherwise_is_refused(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def begun(ranks: gb.Ranks, epochs: int) -> tuple[str, dict[str, Any]]:
        parts = Parts(ranks)
        parts.of_fit |= {"checkpoint": tmp_path / "run", "resume": True}
        parts.epochs = epochs
        return parts.fit()

    on_threads(2, lambda ranks: begun(ranks, 2))
    first = sorted((tmp_path / "run").glob("checkpoint-*"))[0]
    monkeypatch.setattr(resume, "read", lambda path: read(first if what == "another" else path.with_suffix(".gone")))

    def resumed(ranks: gb.Ranks) -> str:
        with pytest.raises((gb.errors.GpubatchError, OSError)) as caught:
            begun(ranks, 3)
        return str(caught.value)

    told = on_threads(2, resumed)
    words = "must have the same" if what == "another" else "must have its original name"
    assert all(words in one for one in told), told
    monkeypatch.undo()
    whole = on_threads(2, lambda ranks: begun(ranks, 3))
    assert whole == [Parts(gb.Ranks()).fit()] * 2


# --- processes --------------------------------------------------------------------------------------------------------

# What the others are told where a rank does it, by their own error or on stderr; "" where the launcher ends them.
ACTS = {
    "raises": "ZeroDivisionError: a callback divides by 0",
    "interrupt": "rank {on} of {size} ended all: KeyboardInterrupt",
    "no memory": "there is no room",
    "exits": "rank {on} of {size} ended all: SystemExit: 3",
    "killed": "",
    "SIGTERM": "",
    "stops": "",
}
PLACES = "on_start", "on_gradient", "on_step", "on_validation", "on_epoch", "on_end", "on_exit", "read", "write", "auto"


@pytest.mark.exhaustive
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("act", ACTS)
def test_a_rank_that_fails_anywhere_leaves_none_hanging(act: str, place: str, tmp_path: Path) -> None:
    """All end, alike or at once, and a run that ended too early goes on to the bits of one that nothing happened to."""
    where, on, kind = str(tmp_path / "run"), 0 if place == "write" else 1, "windowed" if place == "read" else "plain"
    found, done = run(2, tmp_path, False, kind=kind, checkpoint=where, every=4, fault=act, place=place, on=on)
    told = "\n".join([done.stderr, *(str(one.get("message", one["warnings"])) for one in found)])
    assert ACTS[act].format(on=on, size=2) in told
    same_end = {json.dumps({k: v for k, v in one.items() if k not in ("rank", "warnings", "message")}) for one in found}
    if act == "stops" and place in ("on_start", "on_gradient", "on_step", "on_validation", "on_epoch"):
        assert done.returncode == 0
        assert (len(found), len(same_end)) == (2, 1)
    elif act == "SIGTERM" and place not in ("auto", "on_start", "on_exit"):
        assert {one["error"] for one in found} == {"TrainingTerminated"}
        assert (len(found), len(same_end)) == (2, 1)
    elif (act, place) == ("no memory", "read"):
        assert done.returncode == 0
        assert (len(found), len(same_end)) == (2, 1)
        return  # it has gone on with smaller batches
    else:
        assert done.returncode != 0
    if place not in ("auto", "on_exit"):
        goes_on(tmp_path, where, kind)


ALONE = {
    "barrier": "ranks.barrier()",
    "most": "ranks.most([1.0, 2.0])",
    "share": "ranks.share([1])",
    "gather": "ranks.gather('x' * 50)",
    "a small sum": "ranks.sum_(np.ones(7))",
    "a large sum": "ranks.sum_(np.ones(100_000))",
}


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ALONE)
@pytest.mark.parametrize("size", [2, 4])
def test_a_method_that_one_rank_alone_calls_ends_all(name: str, size: int) -> None:
    """In a callback: the others are elsewhere, and their messages are not taken for an answer."""
    program = f"""
import numpy as np
import gpubatch as gb
from test_ranks_faults import Hooks, Parts
ranks = gb.Ranks()
def alone(state):
    if ranks.rank == 1 and state.step == 9:
        {ALONE[name]}
parts = Parts(ranks)
parts.callbacks = [Hooks(on_step=alone)]
parts.fit()
"""
    done = mpi(size, program, check=False)
    assert done.returncode != 0
    assert "all ranks must call the same methods" in done.stderr or "which must call the same methods" in done.stderr
