"""The callbacks that come with gpubatch, and where a run calls its callbacks: by closed forms, and beside PyTorch's."""

from __future__ import annotations

import inspect
import math
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from families import every
from needs import peer
from test_train import Kill, Killed, blobs, everything, numbers, parts

import gpubatch as gb
from gpubatch.backend import CudaBackend, get_backend
from gpubatch.checkpoint import Checkpoints
from gpubatch.own import live
from gpubatch.train import TrainingState, loop
from gpubatch.train.parts import OfARun

NAN = math.nan
FEW_STEPS = loop.FEW_STEPS


class Plan:
    """Makes the validation loss of each epoch a number of the test's: as the callback before the others."""

    def __init__(self, *values: float) -> None:
        self.values = values

    def on_validation(self, state: TrainingState) -> None:
        state.history.validation_loss[-1] = self.values[len(state.history.loss) - 1]


def run(callbacks: Any, epochs: int = 10, **options: Any) -> tuple[Any, gb.History]:
    made = parts(**options.pop("network", {}))
    options = {"validation": blobs(60, seed=1), "progress": False, **options}
    return made, gb.fit(*made, epochs, callbacks=callbacks, **options)


# --- where callbacks are called --------------------------------------------------------------------------------------


def test_the_places_of_a_run_in_their_order() -> None:
    seen: list[str] = []

    class Watch:
        def __getattr__(self, name: str) -> Any:
            if name not in ("on_start", "on_gradient", "on_step", "on_validation", "on_epoch", "on_end", "on_exit"):
                raise AttributeError(name)
            return lambda *given: seen.append(name)

    run([Watch()], 2, network={"batch_size": 300})
    epoch = ["on_gradient", "on_step", "on_gradient", "on_step", "on_validation", "on_epoch"]
    assert seen == ["on_start", *epoch, *epoch, "on_end", "on_exit"]


def test_all_see_the_epoch_in_which_one_of_them_stops() -> None:
    seen: list[int] = []

    def stop(state: TrainingState) -> None:
        raise gb.StopTraining("enough")

    _, history = run([stop, lambda state: seen.append(state.epoch)])
    assert seen == [0]
    assert len(history.loss) == 1


def test_the_words_of_a_stop_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    def stop(state: TrainingState) -> None:
        state.note("a note")
        raise gb.StopTraining("enough")

    run([stop], progress=True)
    assert capsys.readouterr().err.splitlines()[-2:] == ["a note", "enough"]


class Stops:
    def on_gradient(self, state: TrainingState, grads: Any) -> None:
        raise gb.StopTraining


def test_a_stop_between_gradient_and_update_comes_after_the_step() -> None:
    (_, loader, opt), history = run([Stops()])
    assert (opt.t, len(history.step_loss), loader.state_dict()["batch"]) == (1, 1, 1)


@pytest.mark.parametrize("rows", [None, 20])
def test_a_hook_sees_the_whole_gradient_before_it_is_clipped(rows: int | None, backend: gb.Backend) -> None:
    class Look:
        norms: list[float] = []  # noqa: RUF012

        def on_gradient(self, state: TrainingState, grads: Any) -> None:
            state.history.micro_batch_size = rows
            self.norms.append(float((grads.flat**2).sum()) ** 0.5)
            grads.flat *= 2

    net, loader, opt = parts(backend, dtype="float64")
    twin = parts(backend, dtype="float64")[0]
    x, y = next(iter(loader))
    norm = float((twin.loss_and_grad(x, y)[1].flat ** 2).sum()) ** 0.5
    net, loader, _ = parts(backend, dtype="float64")
    opt = gb.SGD(net.parameters, 1.0)
    before, look = net.parameters.flat.copy(), Look()
    with pytest.raises(Killed):
        gb.fit(net, loader, opt, 1, callbacks=[look, Kill(1)], max_norm=norm, progress=False)
    assert look.norms[0] == pytest.approx(norm, rel=1e-12)
    assert float(((net.parameters.flat - before) ** 2).sum()) ** 0.5 == pytest.approx(norm, rel=1e-12)  # not 2 norm


def test_a_frozen_layer_by_a_hook() -> None:
    class Freeze:
        def on_gradient(self, state: TrainingState, grads: Any) -> None:
            grads["W1"].fill(0)

    net, loader, _ = parts()
    before = {name: p.copy() for name, p in net.parameters.items()}
    gb.fit(net, loader, gb.SGD(net.parameters, 0.1), 1, callbacks=[Freeze()], progress=False)
    assert (net.parameters["W1"] == before["W1"]).all()
    assert (net.parameters["W2"] != before["W2"]).any()


class Misspelt:
    def on_epoch_end(self) -> None: ...

    def __call__(self, state: TrainingState) -> None: ...


class Keras:
    def on_train_begin(self, logs: Any = None) -> None: ...


def with_hook(name: str, method: Any) -> Any:
    return type("Mine", (), {name: method})()


class Plateau:
    def on_epoch(self, state: TrainingState) -> None: ...


WRONG: dict[str, tuple[Any, type[Exception], str]] = {
    "not a list": (Plateau(), gb.DTypeError, r"must be a list of callbacks, got one Plateau: write callbacks=\[...\]"),
    "misspelt, and a function": ([Misspelt()], gb.UnknownArgumentError, "Misspelt, takes .*; did you mean 'on_epoch'?"),
    "a class": ([gb.EarlyStopping], gb.DTypeError, r"an object, got the class EarlyStopping: write EarlyStopping\(\)"),
    "text": ("early_stopping", gb.DTypeError, "must be a list of callbacks, got one str"),
    "none": (None, gb.DTypeError, r"must be a list of callbacks, got None: write callbacks=\[...\]"),
    "Keras' method": ([Keras()], gb.UnknownArgumentError, "got 'on_train_begin'; did you mean 'on_start'?"),
    "Keras' arguments": (
        [with_hook("on_epoch", lambda self, epoch, logs: None)],
        gb.DTypeError,
        r"a callback, Mine.on_epoch, must take \(state\), got \(epoch, logs\)",
    ),
    "a hook without gradients": (
        [with_hook("on_gradient", lambda self, state: None)],
        gb.DTypeError,
        r"a callback, Mine.on_gradient, must take \(state, grads\), got \(state\)",
    ),
    "a function of nothing": ([lambda: None], gb.DTypeError, r"a callback, <lambda>, must take \(state\), got \(\)"),
    "neither": ([3], gb.DTypeError, "a callback must be callable or have on_start, .*, got 3"),
    "no such monitor": (
        [gb.EarlyStopping(monitor="val_loss")],
        gb.ArgumentError,
        "monitor must be one of 'loss', 'validation_loss', 'validation_accuracy', got 'val_loss'; did you mean 'valid",
    ),
    "no learning rate": ([gb.ReduceOnPlateau()], gb.ArgumentError, "opt must have a learning rate to reduce, .* none"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_told_before_the_first_step(name: str) -> None:
    callbacks, kind, message = WRONG[name]
    net, loader, opt = parts()

    @gb.rule
    def plain(w: Any, g: Any, t: Any, *, step: Any = 0.1) -> Any:
        return w - step * g

    if name == "no learning rate":
        opt = gb.Optimizer(plain, net.parameters)
    with pytest.raises(kind, match=message):
        gb.fit(net, loader, opt, 2, validation=blobs(60), callbacks=callbacks, progress=False)
    assert opt.t == 0


def says_stop(state: gb.TrainingState) -> bool:
    return True


# What does nothing where people expect that it does something.
IN_VAIN: dict[str, tuple[Any, type[Exception], str]] = {
    "stop": (lambda s: setattr(s, "stop_training", True), gb.ArgumentError, r"changes nothing: raise gb.StopTraining"),
    "rate": (lambda s: setattr(s, "lr", 0.1), gb.ArgumentError, "state.lr = 0.1 changes nothing: assign state.opt.lr"),
    "stop by the network": (lambda s: setattr(s.net, "stop_training", True), gb.ArgumentError, "gb.StopTraining"),
    "a result": (says_stop, gb.DTypeError, r"must return nothing, got True: raise gb.StopTraining\(\) to end"),
    "new gradients": (
        with_hook("on_gradient", lambda self, state, grads: {k: 2 * g for k, g in grads.items()}),
        gb.DTypeError,
        r"must return nothing, got a dict: grads is changed in place, as grads\['W1'\]\[...\] = values",
    ),
    "loss": (lambda s: s.loss, AttributeError, "has no 'loss': take state.history.loss"),
    "other": (lambda s: s.histroy, AttributeError, "has net, loader, opt, .* got 'histroy'; did you mean 'history'?"),
    "Keras' history": (lambda s: s.history.val_loss, AttributeError, "got 'val_loss'; did you mean 'validation_loss'?"),
}


@pytest.mark.parametrize("name", IN_VAIN)
def test_what_a_callback_does_in_vain_is_told(name: str) -> None:
    callback, kind, message = IN_VAIN[name]
    with pytest.raises(kind, match=message):
        run([callback])


def test_what_an_expression_gives_is_no_answer() -> None:
    """As ``lambda state: bar.update()``, or ``grads["W1"].clip(-1, 1, out=...)``."""
    clip = with_hook("on_gradient", lambda self, state, grads: np.clip(grads["W1"], -1, 1, out=grads["W1"]))
    run([lambda s: s.step > 0, clip])


@pytest.mark.parametrize("kind", [gb.EarlyStopping, gb.BestWeights, gb.ReduceOnPlateau])
def test_a_monitor_of_validation_needs_one(kind: Any) -> None:
    with pytest.raises(gb.ArgumentError, match="monitor must be one of 'loss', got 'validation_loss'"):
        run([kind()], validation=None)


# --- early stopping and the best weights -----------------------------------------------------------------------------

# validation losses, arguments, epochs made, and the epoch whose weights the network has
STOPS: dict[str, tuple[list[float], dict[str, Any], int, int]] = {
    "no better": ([3, 2, 2, 2.5, 1], {"patience": 2}, 4, 2),
    "always better": ([5, 4, 3, 2, 1], {"patience": 1}, 5, 5),
    "better again in time": ([3, 4, 2, 3, 3], {"patience": 2}, 5, 3),
    "by too little": ([3, 2.9, 2.8, 2.7, 2.6], {"patience": 3, "min_delta": 0.25}, 5, 4),
    "by far too little": ([3, 2.9, 2.8, 2.7, 2.6], {"patience": 2, "min_delta": 0.5}, 3, 1),
    "NaN": ([3, NAN, 2, NAN, NAN], {"patience": 2}, 5, 3),
    "NaN first": ([NAN, 3, NAN, NAN, 1], {"patience": 2}, 4, 2),
    "NaN alone": ([NAN, NAN, NAN, NAN, NAN], {"patience": 3}, 3, 3),
    "higher": ([1, 3, 2, 2, 2], {"patience": 2, "mode": "max"}, 4, 2),
    "nothing restored": ([3, 2, 2, 2.5, 1], {"patience": 2, "restore_best": False}, 4, 4),
}


@pytest.mark.parametrize("name", STOPS)
def test_early_stopping(name: str) -> None:
    values, arguments, made, best = STOPS[name]
    weights: list[np.ndarray] = []
    stop = gb.EarlyStopping(**arguments)
    keep = lambda state: weights.append(state.net.parameters.flat.copy())  # noqa: E731
    (net, *_), history = run([Plan(*values), stop, keep], 5)
    assert len(history.loss) == made
    assert [i for i, w in enumerate(weights, 1) if (w == net.parameters.flat).all()] == [best]
    assert stop.stopped_epoch == (0 if made == 5 and stop.wait < stop.patience else made)
    by_hand = gb.EarlyStopping(**arguments)
    assert [by_hand.update(value) for value in values[:made]] == [False] * (made - 1) + [stop.stopped_epoch > 0]


def test_an_accuracy_is_better_if_it_is_higher() -> None:
    assert gb.EarlyStopping(monitor="validation_accuracy").monitor.mode == "max"
    assert gb.BestWeights("loss").monitor.mode == "min"


@pytest.mark.parametrize("monitor", ["loss", "validation_accuracy"])
def test_the_weights_of_the_best_epoch(monitor: str, backend: gb.Backend) -> None:
    numbers: list[float] = []
    kept: list[Any] = []

    def keep(state: TrainingState) -> None:
        numbers.append(getattr(state.history, monitor)[-1])
        kept.append(backend.to_numpy(state.net.parameters.flat).copy())
        kept[-1] = kept[-1], backend.to_numpy(state.net.buffers.flat).copy()
        if state.epoch == 2:
            state.opt.lr = 3.0  # from here on it gets worse

    best = gb.BestWeights(monitor)
    made = parts(backend, batch_norm=True)
    gb.fit(*made, 5, validation=blobs(60, seed=1), callbacks=[best, keep], progress=False)
    pick = (np.argmax if "accuracy" in monitor else np.argmin)(numbers)
    assert best.best_epoch == pick + 1 < 5
    assert best.best == numbers[pick]
    np.testing.assert_array_equal(backend.to_numpy(made[0].parameters.flat), kept[pick][0])
    np.testing.assert_array_equal(backend.to_numpy(made[0].buffers.flat), kept[pick][1])


def test_best_weights_by_hand() -> None:
    net, best = parts()[0], gb.BestWeights()
    assert not best.restore_best(net)
    for value in (3.0, 1.0, 2.0):
        net.parameters.flat.fill(value)
        best.update(value, net)
    assert best.restore_best(net)
    assert (net.parameters.flat == 1).all()


def test_a_network_that_was_interrupted_has_its_last_weights() -> None:
    net, loader, opt = parts()

    def fail(state: TrainingState) -> None:
        if state.epoch == 2:
            net.parameters.flat.fill(7)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        gb.fit(
            *(net, loader, opt, 5, blobs(60)),
            callbacks=[Plan(1, 2, 3), gb.EarlyStopping(), fail],
            progress=False,
        )
    assert (net.parameters.flat == 7).all()


def test_master_weights_follow_the_best_ones() -> None:
    net = gb.mlp([4, 16, 3], backend="cpu", precision="mixed")
    loader = gb.Loader(*blobs(), batch_size=50, backend="cpu", dtype="float16")
    opt = gb.SGD(net.parameters, 0.1, master_weights=True)
    gb.fit(net, loader, opt, 3, blobs(60), callbacks=[Plan(1, 2, 3), gb.BestWeights()], progress=False)
    np.testing.assert_array_equal(opt.state["master"].flat, net.parameters.flat.astype("float32"))


# --- the learning rate -----------------------------------------------------------------------------------------------

PLATEAUS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "impatient": {"patience": 0, "factor": 0.5},
    "cooldown": {"patience": 1, "factor": 0.5, "cooldown": 3},
    "absolute": {"patience": 1, "threshold": 0.05, "threshold_mode": "abs"},
    "relative": {"patience": 1, "threshold": 0.1, "threshold_mode": "rel"},
    "max": {"patience": 2, "mode": "max", "threshold": 0.01},
    "max absolute": {"patience": 2, "mode": "max", "threshold": 0.01, "threshold_mode": "abs"},
    "least": {"patience": 0, "factor": 0.5, "min_lr": 0.01},
    "eps": {"patience": 0, "factor": 0.5, "eps": 0.02},
}


@every("name", list(PLATEAUS), ["defaults", "cooldown", "relative", "max", "least"])
def test_it_reduces_as_pytorch_does(name: str) -> None:
    torch = peer("torch")
    rng = np.random.default_rng(3)
    values = (2 * np.exp(-np.arange(120) / 10) + 0.2 * rng.random(120)).tolist()
    values[40] = values[77] = NAN
    arguments = PLATEAUS[name]
    w, own = [np.zeros(2), np.ones(3)], {"1": {"lr": 0.02}}
    opt = gb.SGD(w, 0.1, groups=own)
    plateau = gb.ReduceOnPlateau(monitor="loss", **arguments)
    tensors = [torch.zeros(2), torch.ones(3)]
    theirs = torch.optim.SGD([{"params": tensors[:1], "lr": 0.1}, {"params": tensors[1:], "lr": 0.02}])
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(theirs, **{"mode": "min", **arguments})
    for value in values:
        plateau.update(value, opt)
        scheduler.step(value)
        assert (opt.lr, opt.groups["1"]["lr"]) == tuple(group["lr"] for group in theirs.param_groups)
        assert (plateau.wait, plateau.cooling) == (scheduler.num_bad_epochs, scheduler.cooldown_counter)
    assert opt.lr < 0.1


def test_a_schedule_goes_on_and_is_multiplied() -> None:
    schedule = gb.ExponentialDecay(0.1, rate=0.9)
    net, loader, _ = parts()
    opt = gb.SGD(net.parameters, schedule)
    plateau = gb.ReduceOnPlateau(0.5, patience=0, min_lr=0.02)
    history = gb.fit(
        *(net, loader, opt, 7, blobs(60)),
        callbacks=[Plan(3, 2, 2, 1, 1, 1, 1), plateau],
        progress=False,
    )
    times = [1, 1, 1, 0.5, 0.5, 0.25, 0.125]
    expected = [min(0.1 * 0.9**n, max(0.1 * 0.9**n * f, 0.02)) for n, f in enumerate(times)]
    assert history.step_lr[::12] == pytest.approx(expected, rel=1e-12)
    assert history.step_lr[-1] == 0.02


def test_a_reduction_is_noted(capsys: pytest.CaptureFixture[str]) -> None:
    run([Plan(2, 2), gb.ReduceOnPlateau(0.5, patience=0)], 2, progress=True)
    assert "validation_loss got no better: learning rate 0.01, from now on 0.005" in capsys.readouterr().err


# --- killed and resumed ----------------------------------------------------------------------------------------------

Make = Callable[[Path], Any]
# Callbacks whose runs must end alike, whether they were killed or not.
RESUMED: dict[str, tuple[Make, dict[str, Any]]] = {
    "EarlyStopping": (lambda folder: gb.EarlyStopping(patience=1), {}),
    "BestWeights": (lambda folder: gb.BestWeights(), {}),
    "ReduceOnPlateau": (lambda folder: gb.ReduceOnPlateau(0.3, patience=0), {}),
    "ReduceOnPlateau of a schedule": (
        lambda folder: gb.ReduceOnPlateau(0.3, patience=0),
        {"lr": gb.ExponentialDecay(0.1, rate=0.9)},
    ),
    "WeightAverage": (lambda folder: gb.WeightAverage(0.9, every=2), {}),
    "GradientNoise": (lambda folder: gb.GradientNoise(0.1), {}),
}
LOSSES = (4.0, 3.0, 3.5, 3.6, 2.0)


@pytest.mark.parametrize("name", RESUMED)
@pytest.mark.parametrize("every_steps", [5, pytest.param(None, marks=pytest.mark.exhaustive)])
def test_a_run_that_was_killed_ends_alike(name: str, every_steps: int | None, tmp_path: Path) -> None:
    make, options = RESUMED[name]

    def train(folder: Path | None, stop: int | None, epochs: int = 5) -> tuple[Any, gb.History, Any]:
        net, loader, _ = parts(batch_norm=True, dropout=0.2)
        opt = gb.Adam(net.parameters, lr=options.get("lr", 0.01))
        callback = make(tmp_path)
        callbacks = [Plan(*LOSSES), callback, *([] if stop is None else [Kill(stop)])]
        store = None if folder is None else Checkpoints(folder, every=every_steps)
        made = net, loader, opt
        history = gb.fit(
            *(*made, epochs, blobs(60)),
            callbacks=callbacks,
            checkpoint=store,
            resume=folder is not None,
            progress=False,
        )
        return made, history, callback

    whole, expected, callback = train(None, None)
    for stop in (17, 29, 36, 43):
        if stop < whole[2].t:
            with pytest.raises(Killed):
                train(tmp_path / "run", stop)
    for _ in range(2):  # a second time, when there is nothing left to do
        again, history, resumed = train(tmp_path / "run", None)
        assert numbers(history) == numbers(expected)
        np.testing.assert_equal(everything(*again), everything(*whole))
        if hasattr(callback, "state_dict"):
            np.testing.assert_equal(resumed.state_dict(), callback.state_dict())


@pytest.mark.filterwarnings("ignore:the run goes on with other arguments")
def test_a_stopped_run_goes_on_with_more_patience(tmp_path: Path) -> None:
    made = [
        run([Plan(1, 2, 3, 4, 5, 6), gb.EarlyStopping(patience=n)], 6, checkpoint=tmp_path, resume=True)[1]
        for n in (2, 2, 4)
    ]
    assert [len(history.loss) for history in made] == [3, 3, 5]


# Callbacks whose arguments decide what becomes of a run.
OF_A_RUN: dict[str, Callable[..., Any]] = {
    "EarlyStopping": lambda: gb.EarlyStopping(patience=2),
    "BestWeights": lambda: gb.BestWeights(),
    "ReduceOnPlateau": lambda: gb.ReduceOnPlateau(0.5, patience=0),
    "WeightAverage": lambda: gb.WeightAverage(None),
    "ClipByValue": lambda: gb.ClipByValue(0.1),
    "GradientNoise": lambda: gb.GradientNoise(0.1),
}


def kinds_of(base: type) -> set[str]:
    return {
        name
        for kind in base.__subclasses__()
        for name in ({kind.__name__} if kind.__name__ in gb.__all__ else kinds_of(kind))
        if kind.__module__.startswith("gpubatch")
    }


def test_the_arguments_of_all_callbacks_are_compared() -> None:
    assert kinds_of(OfARun) == set(OF_A_RUN)
    for name, make in OF_A_RUN.items():
        assert {*make().settings()} == {*inspect.signature(getattr(gb, name)).parameters} - {"net"}


@every("name", [*OF_A_RUN], ["EarlyStopping", "ReduceOnPlateau", "WeightAverage"])
def test_a_callback_forgets_the_run_of_another_network(name: str) -> None:
    """As in a loop over folds that makes its callbacks before it: the numbers of the first run were better."""
    used, fresh = OF_A_RUN[name](), OF_A_RUN[name]()
    run([Plan(*[0.1, 0.2, 0.3] * 2), used], 6)
    found = []
    for callback in (used, fresh):
        (net, _, opt), history = run([Plan(4, 3, 2, 1), callback], 4, network={"seed": 1})
        found.append((net.parameters.flat.copy(), opt.lr, numbers(history)))
    np.testing.assert_equal(found[0], found[1])


def resumed_with(before: dict[str, Any], now: dict[str, Any], folder: Path) -> list[str]:
    """The lines that say what is given otherwise."""
    valid = {"validation": blobs(60, seed=1)}
    run(**{"callbacks": [], **valid, **before}, epochs=1, checkpoint=folder)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", gb.errors.ResumeWarning)
        run(**{"callbacks": [], **valid, **now}, epochs=2, checkpoint=folder, resume=True)
    found = [str(warning.message) for warning in caught if warning.category is gb.errors.ResumeWarning]
    return [line for text in found for line in text.splitlines()[1:]]


def both(*callbacks: Any) -> dict[str, Any]:
    return {"callbacks": callbacks}


SAID: dict[str, tuple[dict[str, Any], dict[str, Any], list[str]]] = {
    "nothing else": ({"max_norm": 1.0}, {"max_norm": 1.0}, []),
    "max_norm": ({"max_norm": 1.0}, {}, ["max_norm: 1.0 before, None now"]),
    "max_skipped": ({}, {"max_skipped": 3}, ["max_skipped: 10 before, 3 now"]),
    "metrics": ({"metrics": ["f1"]}, {"metrics": ["f1", "recall"]}, ["metrics: ['f1'] before, ['f1', 'recall'] now"]),
    "no validation any more": ({}, {"validation": None}, ["validation: 60 samples before, none now"]),
    "fewer samples": ({}, {"validation": blobs(50)}, ["validation: 60 samples before, 50 samples now"]),
    "other samples": ({}, {"validation": blobs(60, seed=2)}, ["validation: 60 samples before, 60 others now"]),
    "patience": (both(gb.EarlyStopping(5)), both(gb.EarlyStopping(7)), ["EarlyStopping's patience: 5 before, 7 now"]),
    "factor": (
        both(gb.ReduceOnPlateau(0.5)),
        both(gb.ReduceOnPlateau(0.2)),
        ["ReduceOnPlateau's factor: 0.5 before, 0.2 now"],
    ),
    "decay": (both(gb.WeightAverage(0.9)), both(gb.WeightAverage(0.5)), ["WeightAverage's decay: 0.9 before, 0.5 now"]),
    "a value": (both(gb.ClipByValue(0.1)), both(gb.ClipByValue(0.5)), ["ClipByValue's value: 0.1 before, 0.5 now"]),
    "no noise any more": (
        both(gb.GradientNoise(0.1)),
        {},
        ["GradientNoise: GradientNoise(eta=0.1, gamma=0.55, seed=0) before, none now"],
    ),
    "noise": (
        {},
        both(gb.GradientNoise(0.1)),
        ["GradientNoise: none before, GradientNoise(eta=0.1, gamma=0.55, seed=0) now"],
    ),
    "another order": (
        both(gb.EarlyStopping(), gb.ReduceOnPlateau(), gb.BestWeights("loss"), gb.BestWeights()),
        both(gb.BestWeights(), gb.BestWeights("loss"), gb.ReduceOnPlateau(), gb.EarlyStopping()),
        [],
    ),
}


@every("case", SAID, ["nothing else", "no validation any more", "patience", "no noise any more", "another order"])
def test_what_a_resumed_run_is_given_otherwise_is_said(case: Any, tmp_path: Path) -> None:
    before, now, lines = case
    assert resumed_with(before, now, tmp_path) == lines


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "monitor": (
        both(gb.BestWeights()),
        both(gb.BestWeights("loss")),
        "BestWeights with monitor='validation_loss', the",
    ),
    "mode": (
        both(gb.EarlyStopping()),
        both(gb.EarlyStopping(mode="max")),
        "EarlyStopping with mode='min', the one given",
    ),
    "another one": (
        both(gb.BestWeights()),
        both(gb.EarlyStopping()),
        r"state of BestWeights\(monitor='valid.* none is given",
    ),
    "none": (both(gb.BestWeights()), {}, "state of 1 callbacks, of those given now 0 have"),
}


@every("case", REFUSED, ["monitor"])
def test_the_state_of_another_callback_is_refused(case: Any, tmp_path: Path) -> None:
    before, now, words = case
    with pytest.raises(gb.ArgumentError, match=words):
        resumed_with(before, now, tmp_path)


def test_callbacks_of_the_order_are_paired(tmp_path: Path) -> None:
    """Each has its own state, not that of the other one of its kind."""
    run([gb.BestWeights("loss"), gb.BestWeights()], 2, checkpoint=tmp_path)
    other, first = gb.BestWeights(), gb.BestWeights("loss")
    history = run([other, first], 2, checkpoint=tmp_path, resume=True)[1]
    assert (first.best, other.best) == (min(history.loss), min(history.validation_loss))


# --- the memory of a run ---------------------------------------------------------------------------------------------


def test_the_copy_is_there_before_batches_are_planned() -> None:
    best, net = gb.BestWeights("loss"), parts()[0]
    state = TrainingState(net, parts()[1], parts()[2], gb.History(), 0, 0)
    best.on_start(state)
    assert not best.kept.filled
    assert sum(array.nbytes for array in best.kept._arrays.values()) == net.parameters.flat.nbytes


# --- how many steps --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("samples", "size", "epochs", "words"),
    [
        (
            600,
            "auto",
            10,
            r"1 step an epoch, 10 in all, with batches of 600 samples; .*batch_size, such as 32, or more",
        ),
        (600, 50, 2, "12 steps an epoch, 24 in all, .* smaller batch_size, such as 8, or more epochs"),
        (40, 2, 1, "20 steps an epoch, 20 in all, .*: take more epochs"),
    ],
)
def test_a_run_of_few_steps_is_warned_about(
    samples: int, size: Any, epochs: int, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "FEW_STEPS", FEW_STEPS)  # conftest.py lets all other tests have few steps
    net = gb.mlp([4, 16, 3], backend="cpu")
    loader = gb.Loader(*blobs(samples), batch_size=size, backend="cpu")
    with pytest.warns(gb.FewStepsWarning, match=words):
        gb.fit(net, loader, gb.Adam(net.parameters), epochs, progress=False)


def test_enough_steps_are_not_warned_about(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "FEW_STEPS", FEW_STEPS)
    net, loader, opt = parts(batch_size=6)
    gb.fit(net, loader, opt, 1, progress=False)
    gb.fit(net, loader, opt, 0, progress=False)


def test_a_run_says_how_many_steps_it_has(capsys: pytest.CaptureFixture[str]) -> None:
    run([], 2, progress=True)
    assert capsys.readouterr().err.splitlines()[0] == "12 steps an epoch, 24 in all, batches of 50"


def test_bad_arguments() -> None:
    for make, message in {
        lambda: gb.EarlyStopping(0): "patience must be an integer >= 1, got 0",
        lambda: gb.EarlyStopping(mode="least"): "mode must be one of 'auto', 'min', 'max', got 'least'",
        lambda: gb.EarlyStopping(min_delta=-1): r"min_delta must be finite and in \[0, inf\), got -1.0",
        lambda: gb.ReduceOnPlateau(1.0): r"factor must be finite and in \(0, 1\), got 1.0",
        lambda: gb.ClipByValue(0): r"value must be finite and in \(0, inf\), got 0.0",
        lambda: gb.GradientNoise(-1): r"eta must be finite and in \(0, inf\), got -1.0",
        lambda: gb.WeightAverage(1.0): r"decay must be finite and in \[0, 1\), got 1.0",
        lambda: gb.WeightAverage(warmup=True, bias_correction=True): "warmup and bias_correction are two ways",
        lambda: gb.WeightAverage().update(): r"net is needed for a loop by hand: WeightAverage\(net=net\)",
        lambda: gb.ReduceOnPlateau(threshold=1): r"threshold must be finite and in \[0, 1\), got 1.0",
        lambda: gb.ReduceOnPlateau(threshold_mode="x"): "threshold_mode must be one of 'rel', 'abs', got 'x'",
        lambda: run([stop := gb.EarlyStopping(), stop]): "callbacks has the same EarlyStopping twice",
        lambda: run([gb.WeightAverage(), gb.WeightAverage(0.5)]): "validation is of one average, and callbacks has 2",
    }.items():
        with pytest.raises(gb.ArgumentError, match=message):
            make()


# --- parts of a step: the gradient -----------------------------------------------------------------------------------


def gradient_of(backend: gb.Backend, part: Any, dtype: str = "float32", t: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """The gradient of a batch before and after a part of gpubatch's."""
    net, loader, _ = parts(backend, dtype=dtype)
    grads = net.loss_and_grad(*next(iter(loader)))[1].flat
    before = backend.to_numpy(grads).copy()
    part.make(net, t)
    return before, backend.to_numpy(grads)


def test_values_are_clipped(backend: gb.Backend) -> None:
    before, after = gradient_of(backend, gb.ClipByValue(0.05))
    assert abs(before).max() > 0.1
    np.testing.assert_array_equal(after, np.clip(before, np.float32(-0.05), np.float32(0.05)))


def test_what_is_not_finite_is_not_clipped(backend: gb.Backend) -> None:
    net = parts(backend)[0]
    net.parameters.grads.flat[:3] = net.backend.asarray(np.array([np.inf, -np.inf, np.nan], np.float32))
    gb.ClipByValue(1.0).apply(net)
    np.testing.assert_array_equal(backend.to_numpy(net.parameters.grads.flat[:3]), [np.inf, -np.inf, np.nan])


def test_values_are_clipped_as_pytorch_does() -> None:
    torch = peer("torch")
    before, after = gradient_of(gb.get_backend("cpu"), gb.ClipByValue(0.05), "float64")
    tensor = torch.zeros(before.size, dtype=torch.float64)
    tensor.grad = torch.tensor(before)
    torch.nn.utils.clip_grad_value_([tensor], 0.05)
    np.testing.assert_array_equal(after, tensor.grad.numpy())


def test_noise_has_its_variance_and_is_the_same_for_a_seed_and_a_step(backend: gb.Backend) -> None:
    net = gb.mlp([300, 100, 10], backend=backend)
    flat = net.parameters.grads.flat

    def drawn(t: int, **options: Any) -> np.ndarray:
        flat.fill(0)
        gb.GradientNoise(0.3, **options).apply(net, t)
        return backend.to_numpy(flat).copy()

    first = drawn(0)
    for t, gamma in ((0, 0.55), (9, 0.55), (9, 0.0)):
        z = drawn(t, gamma=gamma) / math.sqrt(0.3 / (1 + t) ** gamma)
        n = len(z)
        moments = [(z**k).mean() for k in (1, 2, 3, 4)]
        errors = [math.sqrt(of / n) for of in (1, 2, 15, 96)]  # of the moments of a normal number
        for found, expected, error in zip(moments, (0, 1, 0, 3), errors, strict=True):
            assert abs(found - expected) < 5 * error
        assert abs(np.corrcoef(z[:-1], z[1:])[0, 1]) < 5 / math.sqrt(n)
    assert (drawn(0) == first).all()
    assert (drawn(1) != first).any()
    assert (drawn(0, seed=1) != first).any()


def test_noise_is_that_of_box_and_muller(backend: gb.Backend) -> None:
    """From NumPy's generator, on every device, and whatever the size: 8 numbers to a counter."""
    net = parts(backend, dtype="float64")[0]
    net.parameters.grads.flat.fill(0)
    gb.GradientNoise(1.0, 0.0, seed=7).apply(net, 5)
    key, counter = np.array([7, 2**64 - 1], np.uint64), np.array([0, 5, 0, 0], np.uint64)
    u = np.random.Generator(np.random.Philox(key=key, counter=counter)).random(400, np.float32).astype(float)
    r, angle = np.sqrt(-2 * np.log(1 - u[::2])), 2 * np.pi * u[1::2]
    expected = np.stack([r * np.cos(angle), r * np.sin(angle)], 1).reshape(-1)
    flat = backend.to_numpy(net.parameters.grads.flat)
    np.testing.assert_allclose(flat, expected[: flat.size], rtol=0, atol=2e-6)


@every("place", ["max_norm", "none"], ["max_norm"])
def test_parts_come_before_the_norm_is_clipped(place: str, backend: gb.Backend) -> None:
    options = {"max_norm": 0.1} if place == "max_norm" else {}
    net, loader, _ = parts(backend, dtype="float64")
    twin, again, _ = parts(backend, dtype="float64")
    opt, other = gb.SGD(net.parameters, 1.0), gb.SGD(twin.parameters, 1.0)
    clip, noise = gb.ClipByValue(0.03), gb.GradientNoise(0.01)
    gb.fit(net, loader, opt, 1, callbacks=[clip, noise], progress=False, **options)
    for x, y in again:
        twin.loss_and_grad(x, y)
        clip.apply(twin)
        noise.apply(twin, other.t)
        if options:
            gb.clip_by_global_norm(twin.parameters.grads, 0.1)
        other.step()
    np.testing.assert_allclose(
        *(backend.to_numpy(of.parameters.flat) for of in (net, twin)), rtol=0, atol=1e-12 if options else 0
    )


# --- parts of a step: averages of weights ----------------------------------------------------------------------------


def averaged(average: Any, steps: int = 12, dtype: str = "float64") -> tuple[Any, list[np.ndarray]]:
    """The average of a network's weights by hand, and the weights after each step."""
    net, loader, opt = parts(dtype=dtype, batch_norm=True)
    average = average(net)
    weights = []
    for x, y in loader:
        net.loss_and_grad(x, y)
        opt.step()
        average.update()
        weights.append(net.parameters.flat.copy())
    average.apply(net)
    return net, weights[:steps]


KEEPING: dict[str, Callable[[], Any]] = {
    "BestWeights": lambda: gb.BestWeights("loss"),
    "EarlyStopping": lambda: gb.EarlyStopping(9, monitor="loss"),
    "WeightAverage": lambda: gb.WeightAverage(0.9),
}


@pytest.mark.parametrize("name", KEEPING)
def test_a_checkpoint_has_the_weights_that_a_callback_keeps_without_a_copy(name: str, backend: gb.Backend) -> None:
    """Its state_dict() has copies, and one of the user's own is what is saved."""
    own = KEEPING[name]()
    gb.fit(*parts(backend, batch_norm=True), 1, callbacks=[own], progress=False)
    once, twice, copies = live(own), live(own), own.state_dict()

    def arrays(state: Any) -> dict[str, Any]:
        inner = state["mean" if name == "WeightAverage" else "weights"]
        return {key: inner[key] for key in ("parameters", "buffers")}

    for key, array in arrays(once).items():
        assert array is arrays(twice)[key]
        assert array is not arrays(copies)[key]
        np.testing.assert_array_equal(backend.to_numpy(array), backend.to_numpy(arrays(copies)[key]))
    assert {k: v for k, v in once.items() if k not in ("mean", "weights")} == {
        k: v for k, v in copies.items() if k not in ("mean", "weights")
    }
    theirs = type("Theirs", (type(own),), {"state_dict": lambda self: {"mine": 1}})
    assert live(object.__new__(theirs)) == {"mine": 1}
    own.state_dict = lambda: {"mine": 2}
    assert live(own) == {"mine": 2}


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="there is no /dev/full")
def test_nothing_takes_the_place_of_a_device(tmp_path: Path) -> None:
    device = tmp_path / "device.safetensors"  # by a link: a mistake would replace that
    device.symlink_to("/dev/full")
    with pytest.raises(OSError, match=f"No space left on device: '{device}'"):
        run([gb.CSVLog(device)], 1)
    with pytest.raises(FileExistsError, match="this is a device or a pipe, whose place no file takes"):
        gb.save(device, parts()[0])
    assert device.is_symlink()
    device.unlink()
    device.symlink_to("/dev/null")
    run([gb.CSVLog(device)], 1)
    assert device.is_symlink()


def test_an_equal_average_is_the_mean() -> None:
    net, weights = averaged(lambda net: gb.WeightAverage(None, net=net))
    np.testing.assert_allclose(net.parameters.flat, np.mean(weights, axis=0), rtol=1e-13)
    net, weights = averaged(lambda net: gb.WeightAverage(None, every=5, net=net))
    np.testing.assert_allclose(net.parameters.flat, (weights[4] + weights[9]) / 2, rtol=1e-13)


def test_a_corrected_average_is_that_of_ewma() -> None:
    net, weights = averaged(lambda net: gb.WeightAverage(0.9, bias_correction=True, net=net))
    np.testing.assert_allclose(net.parameters.flat, gb.ewma(weights, 0.9)[-1], rtol=1e-12)


def test_a_warm_average_follows_its_closed_form() -> None:
    net, weights = averaged(lambda net: gb.WeightAverage(0.5, warmup=True, net=net))
    mean = weights[0]
    for n, w in enumerate(weights[1:], 2):
        decay = min(0.5, (1 + n) / (10 + n))
        mean = decay * mean + (1 - decay) * w
    np.testing.assert_allclose(net.parameters.flat, mean, rtol=1e-12)


@pytest.mark.parametrize("options", [{"decay": 0.9}, {"decay": None}, {"decay": 0.9, "bias_correction": True}])
def test_the_average_of_weights_that_never_change_has_their_bits(options: dict[str, Any], device: CudaBackend) -> None:
    for backend in (get_backend("cpu"), device):
        net = gb.mlp([6, 5, 3], batch_norm=True, seed=1, backend=backend)
        average, before = gb.WeightAverage(**options, net=net), backend.to_numpy(net.parameters.flat)
        for _ in range(30):
            average.update()
        average.apply(net)
        assert np.array_equal(backend.to_numpy(net.parameters.flat), before)


@pytest.mark.parametrize("decay", [0.9, None])
@pytest.mark.parametrize("buffers", [True, False])
def test_it_averages_as_pytorch_does(decay: float | None, buffers: bool) -> None:
    """torch.optim.swa_utils.AveragedModel, with its buffers and without."""
    torch = peer("torch")
    utils = torch.optim.swa_utils

    class Twin(torch.nn.Module):
        def __init__(self) -> None:
            torch.nn.Module.__init__(self)
            self.w = torch.nn.Parameter(torch.zeros(net.parameters.size, dtype=torch.float64))
            self.register_buffer("b", torch.zeros(net.buffers.size, dtype=torch.float64))

    net, loader, opt = parts(dtype="float64", batch_norm=True)
    twin = Twin()
    # PyTorch's form for several tensors at once has the weight of an equal average in float32.
    how = utils.get_ema_avg_fn(decay) if decay else utils.get_swa_avg_fn()
    theirs = utils.AveragedModel(twin, avg_fn=how, use_buffers=buffers)
    average = gb.WeightAverage(decay, buffers=buffers, net=net)
    for x, y in loader:
        net.loss_and_grad(x, y)
        opt.step()
        average.update()
        twin.w.data.copy_(torch.tensor(net.parameters.flat))
        twin.b.copy_(torch.tensor(net.buffers.flat))
        theirs.update_parameters(twin)
    average.apply(net)
    np.testing.assert_allclose(net.parameters.flat, theirs.module.w.detach().numpy(), rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(net.buffers.flat, theirs.module.b.numpy(), rtol=1e-12)


def test_validation_is_of_the_average_and_so_is_the_result(
    backend: gb.Backend, capsys: pytest.CaptureFixture[str]
) -> None:
    held_out = blobs(60, seed=1)
    average, seen = gb.WeightAverage(0.8), list[float]()
    net, loader, opt = parts(backend, batch_norm=True, dtype="float64")

    def look(state: TrainingState) -> None:
        seen.append(net.loss(*(backend.asarray(a) for a in (held_out[0].astype("float64"), held_out[1]))))

    gb.fit(net, loader, opt, 2, (held_out[0].astype("float64"), held_out[1]), callbacks=[average, look])
    twin, again, other = parts(backend, batch_norm=True, dtype="float64")
    by_hand, of_average, plain = gb.WeightAverage(0.8, net=twin), list[float](), list[float]()
    X, Y = (backend.asarray(a) for a in (held_out[0].astype("float64"), held_out[1]))
    for _ in range(2):
        for x, y in again:
            twin.loss_and_grad(x, y)
            other.step()
            by_hand.update()
        plain.append(twin.loss(X, Y))
        state = twin.state_dict()
        by_hand.apply(twin)
        of_average.append(twin.loss(X, Y))
        last = backend.to_numpy(twin.parameters.flat).copy()
        twin.load_state_dict(state)
    history = capsys.readouterr().err
    assert "validation is of the averaged weights" in history
    assert "the network has the average of the weights in 24 steps" in history
    assert seen == plain
    np.testing.assert_array_equal(backend.to_numpy(net.parameters.flat), last)
    assert net.loss(X, Y) == of_average[-1] != plain[-1]


def test_the_best_weights_are_averaged_ones() -> None:
    """Those that were validated, not those in training, and they stay although the average is applied at the end."""
    kept: list[np.ndarray] = []

    class Keep:
        def on_validation(self, state: TrainingState) -> None:
            kept.append(state.net.parameters.flat.copy())

    (net, *_), _ = run([Plan(2, 1, 3, 4), gb.BestWeights(), gb.WeightAverage(0.9), Keep()], 4)
    np.testing.assert_array_equal(net.parameters.flat, kept[1])


def test_an_average_that_is_not_applied() -> None:
    average, net = gb.WeightAverage(0.9, apply=False), parts()[0]
    (last, *_), _ = run([average], 2)
    np.testing.assert_array_equal(last.parameters.flat, run([], 2)[0][0].parameters.flat)
    average.apply(net)
    assert (net.parameters.flat != last.parameters.flat).any()
    assert (average.steps, average.updates) == (24, 24)


def test_an_average_of_master_weights() -> None:
    net = gb.mlp([4, 16, 3], backend="cpu", precision="mixed", batch_norm=True)
    loader = gb.Loader(*blobs(), batch_size=50, backend="cpu", dtype="float16")
    opt = gb.SGD(net.parameters, 0.1, master_weights=True)
    gb.fit(net, loader, opt, 2, blobs(60), callbacks=[gb.WeightAverage(0.9)], progress=False)
    np.testing.assert_array_equal(opt.state["master"].flat, net.parameters.flat.astype("float32"))


# --- logs ------------------------------------------------------------------------------------------------------------


def logged(make: Callable[[], Any], folder: Path, stops: list[int], every: int | None = 5, epochs: int = 4) -> None:
    """A run that is killed at some steps and resumed, with a log."""
    for i, stop in enumerate([*stops, 0]):
        store, kill = Checkpoints(folder / "run", every=every), [Kill(stop)] if stop else []
        try:
            gb.fit(
                *(*parts(), epochs, blobs(60, seed=1)),
                callbacks=[make(), *kill],
                checkpoint=store,
                resume=i > 0,
                progress=False,
            )
        except Killed:
            assert stop


def rows(path: Path) -> list[list[str]]:
    return [line.split(",")[:-1] for line in path.read_text().splitlines()]


@pytest.mark.parametrize("every_steps", [5, pytest.param(None, marks=pytest.mark.exhaustive)])
def test_a_csv_file_has_each_row_once(every_steps: int | None, tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    history = run([gb.CSVLog(path)], 4)[1]
    found = path.read_text().splitlines()
    assert found[0] == "epoch,step,loss,validation_loss,validation_accuracy,lr,seconds"
    for n, row in enumerate(found[1:]):
        numbers = history.loss[n], history.validation_loss[n], history.validation_accuracy[n], 0.01, history.seconds[n]
        assert [float(x) for x in row.split(",")] == [n + 1, 12 * n + 12, *numbers]
    for stops in ([3], [14, 17, 30], [12, 24, 25]):
        folder = tmp_path / str(stops)
        logged(lambda folder=folder: gb.CSVLog(folder.with_suffix(".csv")), folder, stops, every_steps)
        assert rows(folder.with_suffix(".csv")) == rows(path)


def test_a_row_that_was_cut_off_is_written_again(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    logged(lambda: gb.CSVLog(path), tmp_path, [30], None)
    whole = rows(path)
    path.write_text(path.read_text()[:-20] + "\nof an epoch after the checkpoint")
    gb.fit(
        *(*parts(), 4, blobs(60, seed=1)),
        callbacks=[gb.CSVLog(path)],
        checkpoint=tmp_path / "run",
        resume=True,
        progress=False,
    )
    assert rows(path) == whole


def test_a_log_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    run([gb.CSVLog(path)], 1)
    before = path.read_text()
    with pytest.raises(
        gb.ArgumentError, match=r"log\.csv has a log: take another path, remove it, or go on with resume="
    ):
        run([gb.CSVLog(path)], 1)
    assert path.read_text() == before
    with pytest.raises(FileNotFoundError, match=r"nowhere.log\.csv'$"):
        run([gb.CSVLog(tmp_path / "nowhere" / "log.csv")], 1)


def test_a_second_run_of_the_same_log_goes_on(tmp_path: Path) -> None:
    made, log = parts(), gb.CSVLog(tmp_path / "log.csv")
    for _ in range(2):
        gb.fit(*made, 2, callbacks=[log], progress=False)
    assert [row[0] for row in rows(log.path)] == ["epoch", "1", "2", "3", "4"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_is_told_with_the_file_and_the_history(tmp_path: Path) -> None:
    log = gb.CSVLog(tmp_path / "log.csv")

    def fill(state: TrainingState) -> None:
        log.path = Path("/dev/full")

    with pytest.raises(OSError, match="No space left on device: '/dev/full'") as raised:
        run([log, fill], 3)
    assert len(raised.value.history.loss) == 2  # type: ignore[attr-defined]


def test_epochs_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="training"):
        _, history = run([gb.Logging("training")], 2)
    assert [record.epoch["loss"] for record in caplog.records] == history.loss
    assert caplog.messages[1].startswith(f"epoch 2, step 24, loss {history.loss[1]:.6g}, validation_loss ")
    assert caplog.records[0].name == "training"


def events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """The points that TensorBoard shows: a file of a run that went on discards what it has from there on."""
    proto = pytest.importorskip("tensorboardX.proto.event_pb2")
    found: dict[str, list[tuple[int, float]]] = {}
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        while data:
            length = int.from_bytes(data[:8], "little")
            event, data = proto.Event.FromString(data[12 : 12 + length]), data[16 + length :]
            if event.HasField("session_log") and event.session_log.status == proto.SessionLog.START:
                found = {tag: [p for p in of if p[0] < event.step] for tag, of in found.items()}
            for value in event.summary.value:
                found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return found


@pytest.mark.parametrize("stops", [[], [14, 30]], ids=["whole", "killed"])
def test_tensorboard_has_each_point_once(stops: list[int], tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    logged(lambda: gb.TensorBoard(tmp_path / "events"), tmp_path, stops)
    history = run([], 4)[1]
    found = events(tmp_path / "events")
    steps = [(i, np.float32(x)) for i, x in enumerate(history.step_loss, 1)]
    assert found["step/loss"] == steps
    assert found["step/lr"] == [(i, np.float32(0.01)) for i in range(1, 49)]
    for name in ("loss", "validation_loss", "validation_accuracy"):
        values = getattr(history, name)
        assert found[f"epoch/{name}"] == [(12 * n, np.float32(x)) for n, x in enumerate(values, 1)]


def test_tensorboard_without_its_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboardX.event_file_writer", None)
    with pytest.raises(
        gb.ArgumentError, match=r"TensorBoard needs tensorboardX: pip install 'gpubatch\[tensorboard\]'"
    ):
        run([gb.TensorBoard(tmp_path)], 1)
