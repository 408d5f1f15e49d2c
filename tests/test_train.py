"""The loop: what a run leaves behind, what callbacks see, what Ctrl-C and bad numbers do."""

from __future__ import annotations

import errno
import functools
import io
import json
import math
import os
import pickle
import re
import resource
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from families import every
from needs import peer
from optimizer_table import CASES

import gpubatch as gb
from gpubatch.backend import Array
from gpubatch.checkpoint import Checkpoints
from gpubatch.errors import CheckpointError, CheckpointWarning, SkippedStepWarning
from gpubatch.nn import Context, Needs, core_of, initial
from gpubatch.train import TrainingState, TrainingTerminated
from gpubatch.train.memory import settle_batches


def blobs(n: int = 600, seed: int = 0, dtype: str = "float32") -> tuple[np.ndarray, np.ndarray]:
    """Three classes around three points: any working optimizer separates them."""
    rng = np.random.default_rng(seed)
    Y = rng.integers(0, 3, n)
    return (rng.standard_normal((n, 4)) + 6 * np.eye(3, 4)[Y]).astype(dtype), Y


def parts(
    backend: Any = "cpu", *, batch_size: Any = 50, dtype: str = "float32", **network: Any
) -> tuple[Any, Any, Any]:
    net = gb.mlp([4, 16, 3], backend=backend, dtype=dtype, **network)
    loader = gb.Loader(*blobs(), batch_size=batch_size, backend=backend, dtype=dtype)
    return net, loader, gb.Adam(net.parameters, lr=0.01)


def test_it_learns(backend: gb.Backend) -> None:
    net, loader, opt = parts(backend)
    history = gb.fit(net, loader, opt, epochs=8, validation=blobs(seed=1), progress=False)
    assert history.validation_accuracy[-1] > 0.98
    assert history.loss[-1] < 0.2 * history.loss[0]
    assert [len(x) for x in (history.step_loss, history.step_lr)] == [8 * 12] * 2
    assert [len(x) for x in (history.loss, history.validation_loss, history.seconds)] == [8] * 3
    assert (history.batch_size, opt.t, loader.epoch) == (50, 96, 8)
    assert json.loads(json.dumps(history.to_dict()))["loss"] == history.loss


def test_the_numbers_are_those_of_the_loop_written_by_hand() -> None:
    net, loader, opt = parts(dropout=0.2, batch_norm=True)
    history = gb.fit(net, loader, opt, epochs=3, validation=blobs(seed=1), progress=False)

    net2, loader2, opt2 = parts(dropout=0.2, batch_norm=True)
    X, Y = blobs(seed=1)
    step_loss, loss, validation_loss = [], [], []
    for epoch in range(3):
        opt2.epoch, total = epoch, 0.0
        for x, y in loader2:
            step_loss.append(net2.loss_and_grad(x, y)[0])
            opt2.step()
            total += step_loss[-1] * len(x)
        loss.append(total / 600)
        validation_loss.append(net2.loss(X, Y))
    assert history.step_loss == step_loss
    assert history.loss == loss
    assert history.validation_loss == pytest.approx(validation_loss, rel=1e-6)
    np.testing.assert_array_equal(net.parameters.flat, net2.parameters.flat)


def test_it_trains_as_pytorch_does() -> None:
    """End to end: the same weights as PyTorch after 60 steps of Adam."""
    torch = peer("torch")
    net, loader, opt = parts(dtype="float64", l2=0.01)
    W1, b1, W2, b2 = (torch.tensor(net.parameters[k].copy(), requires_grad=True) for k in ("W1", "b1", "W2", "b2"))
    gb.fit(net, loader, opt, epochs=5, progress=False)
    theirs = torch.optim.Adam([W1, b1, W2, b2], lr=0.01)
    other = parts(dtype="float64")[1]
    for _ in range(5):
        for x, y in other:
            theirs.zero_grad()
            scores = torch.relu(torch.tensor(x) @ W1 + b1) @ W2 + b2
            loss = torch.nn.functional.cross_entropy(scores, torch.tensor(y))
            (loss + 0.005 * (W1.square().sum() + W2.square().sum())).backward()
            theirs.step()
    for name, tensor in (("W1", W1), ("b1", b1), ("W2", W2), ("b2", b2)):
        np.testing.assert_allclose(net.parameters[name], tensor.detach().numpy(), rtol=0, atol=1e-10)


# --- what is known before the first step -----------------------------------------------------------------------------

WRONG_VALIDATION: dict[str, tuple[Callable[[Any, Any], Any], str]] = {
    "fewer labels": (
        lambda X, Y: (X, Y[:-1]),
        r"validation\[0\] and validation\[1\] must have equal numbers of samples",
    ),
    "a label out of range": (lambda X, Y: (X, Y + 1), r"validation: .*labels.*3"),
    "labels of floats": (lambda X, Y: (X, Y / 2), "validation: .*float64"),
    "too many features": (lambda X, Y: (np.c_[X, X], Y), r"validation\[0\] must have samples of shape \(4,\)"),
    "masked": (lambda X, Y: (np.ma.masked_array(X, mask=X > 0), Y), r"validation\[0\] must have a value everywhere"),
    "masked labels": (lambda X, Y: (X, np.ma.masked_array(Y, mask=Y > 0)), r"validation\[1\] must have a value every"),
    "no pair": (lambda X, Y: X, r"validation must be a pair \(X, Y\)"),
}


@pytest.mark.parametrize("name", WRONG_VALIDATION)
def test_a_wrong_validation_set_is_refused_before_the_first_step(name: str, backend: gb.Backend) -> None:
    make, message = WRONG_VALIDATION[name]
    net, loader, opt = parts(backend)
    with pytest.raises(gb.GpubatchError, match=f"^{message}"):
        gb.fit(net, loader, opt, 2, validation=make(*blobs(20)), progress=False)
    assert (opt.t, loader.epoch) == (0, 0)


def test_a_validation_loss_that_overflows_is_said_to_be_one() -> None:
    net, loader, opt = parts(init=2.0)
    X, Y = blobs(20)
    with pytest.raises(gb.NonFiniteError, match=r"^validation: loss is .* for a batch of shape \(20, 4\)") as raised:
        gb.fit(net, loader, opt, 2, validation=(X * np.float32(3e38 / abs(X).max()), Y), progress=False)
    assert len(raised.value.history.step_loss) == 12  # type: ignore[attr-defined]


def test_any_error_has_the_history(tmp_path: Path) -> None:
    def fail(state: TrainingState) -> None:
        if len(state.history.loss) == 2:
            raise RuntimeError("the user's")

    net, loader, opt = parts()
    with pytest.raises(RuntimeError, match="the user's") as raised:
        gb.fit(net, loader, opt, 5, callbacks=[fail], progress=False)
    assert len(raised.value.history.loss) == 2  # type: ignore[attr-defined]


def test_a_second_ctrl_c_has_the_history_too() -> None:
    def press(state: TrainingState) -> None:
        raise KeyboardInterrupt  # as Python does when the first one was noted

    with pytest.raises(KeyboardInterrupt) as raised:
        gb.fit(*parts(), 5, callbacks=[press], progress=False)
    assert len(raised.value.history.loss) == 1  # type: ignore[attr-defined]


@pytest.mark.parametrize("samples", [101, 201])
def test_a_last_batch_of_one_is_known_before_the_first_step(samples: int, backend: gb.Backend) -> None:
    net = gb.mlp([4, 8, 3], batch_norm=True, backend=backend)
    opt = gb.SGD(net.parameters, lr=0.1)

    def loader(**arguments: Any) -> gb.Loader:
        return gb.Loader(*blobs(samples), backend=backend, **arguments)

    message = (
        rf"^BatchNorm needs 2 samples in a training batch, the last one of an epoch has 1: {samples} samples in "
        r"batches of 20; take another batch_size, or leave out that batch with Loader\(drop_last='single'\)$"
    )
    with pytest.raises(gb.ArgumentError, match=message):
        gb.fit(net, loader(batch_size=20), opt, 2, progress=False)
    assert opt.t == 0
    with pytest.raises(gb.ArgumentError, match=rf"{samples} samples in batches of 1; take a batch_size of at least 2$"):
        gb.fit(net, loader(batch_size=1), opt, 2, progress=False)
    history = gb.fit(net, loader(batch_size=20, drop_last="single"), opt, 2, progress=False)
    assert len(history.step_loss) == 2 * (samples // 20)


@pytest.mark.parametrize("samples", [2049, 5 * 512 + 1, 6 * 512 + 1, 2050])
def test_auto_chooses_no_size_that_leaves_one_to_batch_norm(samples: int) -> None:
    X, Y = np.zeros((samples, 4), np.float32), np.zeros(samples, np.int64)
    for batch_norm in (False, True):
        net, loader = gb.mlp([4, 8, 3], batch_norm=batch_norm, backend="cpu"), gb.Loader(X, Y, backend="cpu")
        settle_batches(net, loader, gb.SGD(net.parameters, lr=0.1), None)
        if batch_norm and samples % 512 == 1:
            assert loader.batch_size in (320, 384, 448)
            assert samples % loader.batch_size > 1
            assert loader.plan.reason.startswith(
                "batches of 512 would leave 1 to the last one, where the model needs 2"
            )
        else:
            assert loader.batch_size == 512


def test_auto_says_so_where_no_size_near_would_do() -> None:
    samples = 105 * 512 + 1  # 384, 448 and 320 leave one, too
    net = gb.mlp([4, 8, 3], batch_norm=True, backend="cpu")
    loader = gb.Loader(np.zeros((samples, 4), np.float32), np.zeros(samples, np.int64), backend="cpu")
    with pytest.raises(gb.ArgumentError, match=r"in batches of 512; take another batch_size, or leave out that batch"):
        gb.fit(net, loader, gb.SGD(net.parameters, lr=0.1), 1, progress=False)


def test_what_explores_leaves_a_last_sample_out() -> None:
    net = gb.mlp([4, 8, 3], batch_norm=True, backend="cpu")
    X, Y = blobs(129)
    assert gb.explore.learning_rate_range_test(net, X, Y, steps=20).rates
    assert gb.explore.optimizer_sweep(net, X, Y, batch_size=64, epochs=1)


def test_a_callback_that_cannot_be_saved_is_told_before_the_first_step(tmp_path: Path) -> None:
    class Keeps:
        def on_epoch(self, state: TrainingState) -> None: ...

        def state_dict(self) -> dict[str, Any]:
            return {"best": {1: 0.5}}

        def load_state_dict(self, state: Any) -> None: ...

    net, loader, opt = parts()
    with pytest.raises(gb.DTypeError, match=r"^the keys of callbacks\.0\.best must be text to be saved, got 1"):
        gb.fit(net, loader, opt, 5, callbacks=[Keeps()], checkpoint=tmp_path, progress=False)
    assert opt.t == 0


def test_schedules_see_steps_and_epochs() -> None:
    net, loader, opt = parts()
    opt.lr = gb.ExponentialDecay(0.1, rate=0.5)
    history = gb.fit(net, loader, opt, epochs=3, progress=False)
    assert history.step_lr == [0.1] * 12 + [0.05] * 12 + [0.025] * 12
    gb.fit(net, loader, opt, epochs=1, progress=False)
    assert (opt.epoch, opt.lr) == (3, 0.0125)


def test_columns_train_as_rows_do() -> None:
    """The course's layout, samples in columns, is a transposed view of the same numbers."""
    X, Y = blobs()
    rows, _, _ = parts()
    columns, _, _ = parts()
    one_hot = np.eye(3, dtype=np.float32)[Y]
    a = gb.Loader(X, one_hot, batch_size=50, backend="cpu")
    b = gb.Loader(X.T, one_hot.T, batch_size=50, backend="cpu", sample_axis=1)
    for net, loader in ((rows, a), (columns, b)):
        validation = (X, one_hot) if loader is a else (X.T, one_hot.T)
        gb.fit(net, loader, gb.SGD(net.parameters, 0.1), epochs=2, validation=validation, progress=False)
    np.testing.assert_allclose(columns.parameters.flat, rows.parameters.flat, rtol=1e-4, atol=1e-6)


def test_images_of_bytes_are_scaled_in_training_and_validation_alike() -> None:
    X, Y = blobs()
    as_bytes = np.clip(20 * X + 100, 0, 255).astype(np.uint8)
    as_floats = as_bytes.astype(np.float32) * np.float32(1 / 255)
    results = []
    for data, scale in ((as_bytes, 1 / 255), (as_floats, None)):
        net = gb.mlp([4, 16, 3], backend="cpu")
        loader = gb.Loader(data, Y, batch_size=50, backend="cpu", scale=scale)
        history = gb.fit(net, loader, gb.Adam(net.parameters), 2, validation=(data, Y), progress=False)
        results.append((history.step_loss, history.validation_loss, history.validation_accuracy))
    assert results[0] == results[1]


def test_regression_has_no_accuracy() -> None:
    X, _ = blobs()
    net = gb.mlp([4, 8, 1], loss="mse", backend="cpu")
    loader = gb.Loader(X, X[:, :1], batch_size=50, backend="cpu")
    history = gb.fit(net, loader, gb.Adam(net.parameters), 2, validation=(X, X[:, :1]), progress=False)
    assert len(history.validation_loss) == 2
    assert history.validation_accuracy == []


def test_no_epochs_change_nothing() -> None:
    net, loader, opt = parts()
    before = net.parameters.flat.copy()
    assert gb.fit(net, loader, opt, epochs=0).step_loss == []
    np.testing.assert_array_equal(net.parameters.flat, before)


# --- the batch size ------------------------------------------------------------------------------------------------


def test_an_automatic_loader_counts_network_and_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    X, Y = rng.standard_normal((4000, 4)).astype("f"), rng.integers(0, 3, 4000)
    net = gb.mlp([4, 2000, 3], backend="cpu", batch_norm=True)
    opt = gb.Adam(net.parameters)
    loader = gb.Loader(X, Y, backend="cpu")
    assert loader.batch_size == 512
    # Room for more than 128 samples, but not for 256; memory already written counts as used.
    needed, more = (sum(net.memory_parts(n, 0).values()) + opt.memory() for n in (128, 256))
    available = int((0.6 * needed + 0.4 * more) / 0.9)
    held = net.parameters.flat.nbytes + 2 * net.buffers.flat.nbytes
    monkeypatch.setattr(type(loader.backend), "memory", lambda self: gb.Memory(10**12, available - held))
    before = net.parameters.flat.copy(), net.buffers.flat.copy(), core_of(net).dropout_step
    settle_batches(net, loader, opt, None)
    assert loader.batch_size == 128
    assert loader.plan.available == available
    assert needed <= loader.plan.needed <= 1.05 * needed
    # The trial step left no trace.
    np.testing.assert_array_equal(net.parameters.flat, before[0])
    np.testing.assert_array_equal(net.buffers.flat, before[1])
    assert core_of(net).dropout_step == before[2]
    assert core_of(net).planned == 128
    history = gb.fit(net, loader, opt, epochs=1, progress=False)
    assert history.batch_size == 128


# --- callbacks -----------------------------------------------------------------------------------------------------


def test_callbacks_see_the_state() -> None:
    seen: list[tuple[int, int, int]] = []

    class Watch:
        steps = 0

        def on_step(self, state: gb.TrainingState) -> None:
            self.steps += 1
            assert state.step == state.opt.t == len(state.history.step_loss)

        def on_epoch(self, state: TrainingState) -> None:
            seen.append((state.epoch, state.step, len(state.history.validation_loss)))

    watch, net_loader_opt = Watch(), parts()
    gb.fit(
        *net_loader_opt,
        epochs=2,
        validation=blobs(),
        callbacks=[watch, lambda state: seen.append((-1, -1, -1))],
        progress=False,
    )
    assert watch.steps == 24
    assert seen == [(0, 12, 1), (-1, -1, -1), (1, 24, 2), (-1, -1, -1)]


def test_a_callback_may_stop_the_training() -> None:
    def stop(state: gb.TrainingState) -> None:
        if state.epoch == 1:
            raise gb.StopTraining

    history = gb.fit(*parts(), epochs=10, callbacks=[stop], progress=False)
    assert len(history.loss) == 2


def test_a_callback_may_change_the_learning_rate() -> None:
    def halve(state: gb.TrainingState) -> None:
        state.opt.lr /= 2

    history = gb.fit(*parts(), epochs=3, callbacks=[halve], progress=False)
    assert history.step_lr[::12] == [0.01, 0.005, 0.0025]


# --- interruptions -------------------------------------------------------------------------------------------------


def test_ctrl_c_lets_the_step_finish() -> None:
    net, loader, opt = parts()
    whole = parts()

    class Press:
        def on_step(self, state: gb.TrainingState) -> None:
            if state.step == 7:
                os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt, match="interrupted in epoch 1 after step 7; the model holds") as raised:
        gb.fit(net, loader, opt, callbacks=[Press()], progress=False)
    assert isinstance(raised.value, gb.TrainingInterrupted)
    assert str(raised.value).endswith(
        "the history until then is .history of this error, in a REPL sys.last_value.history"
    )
    assert len(raised.value.history.step_loss) == opt.t == 7
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    for _, (x, y) in zip(range(7), whole[1], strict=False):
        whole[2].step(whole[0].loss_and_grad(x, y)[1])
    np.testing.assert_array_equal(net.parameters.flat, whole[0].parameters.flat)


def test_ctrl_c_after_the_last_step_is_not_lost() -> None:
    net, loader, opt = parts()
    with pytest.raises(gb.TrainingInterrupted, match="interrupted in epoch 1 after step 12;") as raised:
        gb.fit(net, loader, opt, 1, callbacks=[lambda s: os.kill(os.getpid(), signal.SIGINT)], progress=False)
    assert len(raised.value.history.loss) == 1


def test_a_rule_without_a_learning_rate_has_none_in_the_history() -> None:
    @gb.rule
    def plain(w, g, t, *, factor=0.01):
        return w - factor * g

    net, loader, _ = parts()
    history = gb.fit(net, loader, gb.Optimizer(plain, net.parameters), epochs=1, progress=False)
    assert (len(history.step_loss), history.step_lr) == (12, [])


def test_a_programs_own_handler_stays() -> None:
    mine: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: mine.append(number))
    try:
        gb.fit(*parts(), epochs=1, callbacks=[lambda s: os.kill(os.getpid(), signal.SIGINT)], progress=False)
    finally:
        signal.signal(signal.SIGINT, before)
    assert mine == [signal.SIGINT]


def test_it_runs_in_another_thread() -> None:
    histories: list[gb.History] = []
    thread = threading.Thread(target=lambda: histories.append(gb.fit(*parts(), epochs=1, progress=False)))
    thread.start()
    thread.join()
    assert len(histories[0].loss) == 1


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_sigterm_and_a_closed_terminal_end_the_program_as_is_usual(number: int, code: int, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="terminated in epoch 1 after step 12; the model holds") as raised:
        gb.fit(*parts(), 2, callbacks=[lambda s: os.kill(os.getpid(), number)], checkpoint=tmp_path, progress=False)
    assert isinstance(raised.value, TrainingTerminated)
    assert (raised.value.code, len(raised.value.history.loss)) == (code, 1)
    assert pickle.loads(pickle.dumps(raised.value)).code == code
    assert Checkpoints(tmp_path).newest() is not None
    assert signal.getsignal(signal.SIGTERM) is signal.getsignal(signal.SIGHUP) is signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_nohup_stays() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        history = gb.fit(*parts(), 2, callbacks=[lambda s: os.kill(os.getpid(), signal.SIGHUP)], progress=False)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert len(history.loss) == 2


@pytest.mark.parametrize("shown", ["lines", "bar", "notebook"])
def test_progress_that_cannot_be_written_ends_no_run(shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the terminal was closed, or the disk with the log is full."""

    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(errno.EIO, "Input/output error")

        def isatty(self) -> bool:
            return shown == "bar"

    monkeypatch.setattr("sys.stderr", Closed())
    if shown == "notebook":
        monkeypatch.setitem(sys.modules, "ipykernel", sys)
        monkeypatch.setattr("gpubatch.train.display.REWRITTEN", 0.0)
    assert len(gb.fit(*parts(), 2).loss) == 2


TERMINATED = """
import os, signal, sys
sys.path.insert(0, os.path.dirname(sys.argv[1]))
from test_train import gb, parts
gb.fit(*parts(), 2, callbacks=[lambda s: [os.kill(os.getpid(), signal.SIGTERM) for _ in range(int(sys.argv[2]))]])
"""


@pytest.mark.parametrize(("times", "code"), [(1, 143), (2, -signal.SIGTERM)])
def test_a_second_sigterm_ends_it_at_once(times: int, code: int) -> None:
    done = subprocess.run([sys.executable, "-c", TERMINATED, __file__, str(times)], capture_output=True, text=True)
    assert done.returncode == code
    assert "Traceback" not in done.stderr


def test_a_signal_is_heeded_where_a_callback_ends_the_run_too() -> None:
    def both(state: gb.TrainingState) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        raise gb.StopTraining

    with pytest.raises(gb.TrainingInterrupted):
        gb.fit(*parts(), callbacks=[both], progress=False)


# --- checkpoints ---------------------------------------------------------------------------------------------------


class Killed(Exception):  # noqa: N818  not an error: it is meant
    """Raised in place of a kill of the process."""


class Kill:
    """A callback that ends the run at a step, without a warning to the run."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, state: gb.TrainingState) -> None:
        if state.step == self.step:
            raise Killed


def numbers(history: gb.History) -> dict[str, Any]:
    """All results that do not depend on the clock."""
    return {name: value for name, value in history.to_dict().items() if name != "seconds"}


def everything(net: gb.Network, loader: gb.Loader, opt: gb.Optimizer) -> dict[str, Any]:
    state = {name: views.flat.copy() for name, views in opt.state.items()}
    return {
        "parameters": net.parameters.flat.copy(),
        "buffers": net.buffers.flat.copy(),
        "dropout": core_of(net).dropout_step,
        "loader": loader.state_dict(),
        "optimizer": (opt.t, opt.epoch, opt.state_dict()["hyper"]),
        **state,
    }


def resumed_is_as_if_never_stopped(
    make: Callable[[], tuple[gb.Network, gb.Loader, gb.Optimizer]],
    store: Checkpoints,
    stops: list[int],
    epochs: int = 3,
    **options: Any,
) -> None:
    """Train without a stop, and with a kill at each step in ``stops``; all results must be equal, to the last bit."""
    whole = make()
    expected = gb.fit(*whole, epochs, progress=False, **options)
    for i, stop in enumerate(stops):
        with pytest.raises(Killed):
            gb.fit(*make(), epochs, callbacks=[Kill(stop)], checkpoint=store, resume=i > 0, progress=False, **options)
    last = make()
    history = gb.fit(*last, epochs, checkpoint=store, resume=True, progress=False, **options)
    assert numbers(history) == numbers(expected)
    assert len(history.seconds) == epochs
    np.testing.assert_equal(everything(*last), everything(*whole))


@every("dtype", ["float32", "float64"], ["float32"])
@pytest.mark.parametrize("name", CASES)
def test_every_optimizer_goes_on_where_it_was(name: str, dtype: str, tmp_path: Path) -> None:
    def make() -> tuple[gb.Network, gb.Loader, gb.Optimizer]:
        net, loader, _ = parts(dtype=dtype, batch_norm=True, dropout=0.2)
        return net, loader, CASES[name].make(net.parameters, lr=gb.CosineDecay(0.05, total=36, warmup=3, per="step"))

    resumed_is_as_if_never_stopped(make, Checkpoints(tmp_path, every=5), [8, 19])


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("every", [1, 7, 12, None])
@pytest.mark.parametrize(
    "order",
    [
        {"shuffle": True},
        {"shuffle": False},
        {"replacement": True},
        {"drop_last": True},
        {"augment": lambda x, draw: x + draw.normal(size=x.shape), "prefetch": 0},
    ],
)
def test_a_run_may_be_killed_anywhere(
    order: dict[str, bool], every: int | None, background: bool, tmp_path: Path
) -> None:
    """At each step in turn, including the first and last of epochs, and in the work at an epoch's end."""

    def make() -> tuple[gb.Network, gb.Loader, gb.Optimizer]:
        net = gb.mlp([4, 8, 3], backend="cpu", dropout=0.3, batch_norm=True, l2=1e-3)
        loader = gb.Loader(*blobs(185), batch_size=16, backend="cpu", seed=3, **order)
        return net, loader, gb.AdamW(net.parameters, gb.ExponentialDecay(0.03, 0.5))

    steps = 2 * len(make()[1])
    store = Checkpoints(tmp_path, every, background=background)
    # A kill at a step after which nothing new was saved would come again and again.
    stops = list(range(1, steps + 1)) if every == 1 else list(range(steps // 3, steps, steps // 3))
    resumed_is_as_if_never_stopped(make, store, stops, 2, validation=blobs(60, seed=1), max_norm=0.5)


def test_a_run_goes_on_on_either_device(backend: gb.Backend, tmp_path: Path) -> None:
    """A checkpoint does not depend on the device; the results are as close as those of two devices."""

    def on(device: Any) -> tuple[gb.Network, gb.Loader, gb.Optimizer]:
        # The gradient of a bias before a norm is only rounding, and Adam would use its sign.
        layers = [gb.Dense(4, 16, bias=False), gb.BatchNorm(16), gb.ReLU(), gb.Dense(16, 3)]
        net, loader = gb.Network(layers, backend=device), gb.Loader(*blobs(), batch_size=50, backend=device)
        return net, loader, gb.Adam(net.parameters, lr=0.01)

    gb.fit(*on(backend), 1, checkpoint=tmp_path, progress=False)
    there, here = on(backend), on("cpu")
    for net_loader_opt in (there, here):
        gb.fit(*net_loader_opt, 2, checkpoint=Checkpoints(tmp_path, keep=9), resume=True, progress=False)
        for path in Checkpoints(tmp_path).files()[1:]:
            path.unlink()
    weights = there[0].backend.to_numpy(there[0].parameters.flat)
    np.testing.assert_allclose(here[0].parameters.flat, weights, rtol=1e-4, atol=1e-5)


def test_the_epoch_that_was_cut_off_by_ctrl_c_goes_on(tmp_path: Path) -> None:
    whole, stopped = parts(dropout=0.3), parts(dropout=0.3)
    expected = gb.fit(*whole, 3, validation=blobs(seed=1), progress=False)

    class Press:
        def on_step(self, state: gb.TrainingState) -> None:
            if state.step in (17, 24):  # 24 is the last one of an epoch
                os.kill(os.getpid(), signal.SIGTERM if state.step == 24 else signal.SIGINT)

    for step, kind in ((17, gb.TrainingInterrupted), (24, TrainingTerminated)):
        with pytest.raises(kind, match=f"after step {step}; .* and so does the newest checkpoint in "):
            gb.fit(*stopped, 3, blobs(seed=1), [Press()], checkpoint=tmp_path, resume=step > 17, progress=False)
    history = gb.fit(*stopped, 3, validation=blobs(seed=1), checkpoint=tmp_path, resume=True, progress=False)
    assert numbers(history) == numbers(expected)
    np.testing.assert_array_equal(stopped[0].parameters.flat, whole[0].parameters.flat)


def test_a_checkpoint_is_by_names_wherever_arrays_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks once stored arrays in the order of layers: a checkpoint from then resumes without a difference."""

    def make() -> tuple[gb.Network, gb.Loader, gb.Optimizer]:
        net = gb.mlp([4, 7, 16, 3], batch_norm=True, backend="cpu")
        return net, gb.Loader(*blobs(), batch_size=50, backend="cpu"), gb.Adam(net.parameters, lr=0.01)

    with monkeypatch.context() as before:
        before.setattr(initial, "by_alignment", dict)
        ended, stopped = make(), make()
        gb.fit(*stopped, 1, checkpoint=tmp_path, progress=False)
        gb.fit(*ended, 2, progress=False)
    resumed = make()
    assert list(resumed[0].parameters) != list(ended[0].parameters)
    gb.fit(*resumed, 2, checkpoint=tmp_path, resume=True, progress=False)
    for name, value in ended[0].parameters.items():
        np.testing.assert_array_equal(resumed[0].parameters[name], value)


def test_without_a_checkpoint_it_starts_from_the_start(tmp_path: Path) -> None:
    a, b = parts(), parts()
    first = gb.fit(*a, 2, progress=False)
    second = gb.fit(*b, 2, checkpoint=tmp_path / "new" / "folder", resume=True, progress=False)
    assert numbers(first) == numbers(second)
    assert len(Checkpoints(tmp_path / "new" / "folder").files()) == 2


def test_a_complete_run_is_not_trained_again_and_may_be_made_longer(tmp_path: Path) -> None:
    expected = gb.fit(*parts(), 4, progress=False)
    first = gb.fit(*parts(), 2, checkpoint=tmp_path, progress=False)
    again = parts()
    assert numbers(gb.fit(*again, 2, checkpoint=tmp_path, resume=True, progress=False)) == numbers(first)
    assert again[2].t == 24
    assert len(Checkpoints(tmp_path).files()) == 2
    assert numbers(gb.fit(*parts(), 4, checkpoint=tmp_path, resume=True, progress=False)) == numbers(expected)


def test_the_end_is_saved_whatever_the_steps_between_checkpoints(tmp_path: Path) -> None:
    net, loader, opt = parts()
    gb.fit(net, loader, opt, 1, checkpoint=Checkpoints(tmp_path, every=5), progress=False)
    found = Checkpoints(tmp_path).newest()
    assert found is not None
    assert found[1]["optimizer"]["t"] == 12
    assert found[1]["plan"]["batch_size"] == 50
    np.testing.assert_array_equal(found[1]["network"]["parameters"]["W1"], net.parameters["W1"])


def test_a_run_that_a_callback_ended_may_go_on(tmp_path: Path) -> None:
    class Stop:
        def on_step(self, state: gb.TrainingState) -> None:
            if state.step == 15:
                raise gb.StopTraining

    expected = gb.fit(*parts(), 2, progress=False)
    assert len(gb.fit(*parts(), 2, callbacks=[Stop()], checkpoint=tmp_path, progress=False).step_loss) == 15
    history = gb.fit(*parts(), 2, checkpoint=tmp_path, resume=True, progress=False)
    assert numbers(history) == numbers(expected)


def written(which: str, factor: float) -> tuple[gb.Network, gb.Optimizer]:
    """A network and an optimizer of which one is written by the user, with a number of its own."""
    layers: list[gb.Layer] = [gb.Dense(4, 3)]
    loss: Any = "softmax_cross_entropy"
    if which == "activation":

        @gb.activation
        def act(x):
            return np.maximum(x, factor * x)

        layers.append(gb.Elementwise(act))
    elif which == "layer":

        class Times(gb.Layer):
            def takes(self):
                pass

            def needs(self, features):
                return Needs(features)

            def forward(self, x, y, c):
                y[...] = factor * x

            def backward(self, x, y, dy, dx, c):
                dx[...] = factor * dy

            def __repr__(self):
                return "Times()"

        layers.append(Times())
    elif which == "loss":

        @gb.score_loss
        def mine(z, y):
            return factor * (z - y) ** 2

        loss = mine
    net = gb.Network([*layers, gb.Dense(3, 1 if which == "loss" else 3)], loss=loss, backend="cpu")
    if which != "rule":
        return net, gb.Adam(net.parameters)

    @gb.rule
    def ours(w, g, t, *, lr=0.01):
        return w - factor * lr * g

    return net, gb.Optimizer(ours, net.parameters)


@pytest.mark.parametrize(
    ("which", "named"),
    [("rule", "rule ours"), ("activation", "layer 2"), ("layer", "layer 2"), ("loss", "loss mine")],
)
def test_other_code_of_the_user_is_told(which: str, named: str, tmp_path: Path) -> None:
    """A formula of the same name is another optimizer or network, which no number in the checkpoint shows."""
    X, Y = blobs()
    Y = Y.astype(np.float32) if which == "loss" else Y

    def run(epochs: int, factor: float) -> None:
        net, opt = written(which, factor)
        loader = gb.Loader(X, Y, batch_size=5, backend="cpu")
        gb.fit(net, loader, opt, epochs, checkpoint=tmp_path, resume=epochs > 1, progress=False)

    run(1, 0.5)
    run(2, 0.5)
    with pytest.warns(gb.ResumeWarning, match=rf"^the run goes on with other arguments:\n{named}: the code is another"):
        run(3, 0.25)


def test_a_learning_rate_that_a_callback_changed_is_kept(tmp_path: Path) -> None:
    def halve(state: gb.TrainingState) -> None:
        state.opt.lr /= 2

    expected = gb.fit(*parts(), 3, callbacks=[halve], progress=False)
    gb.fit(*parts(), 1, callbacks=[halve], checkpoint=tmp_path, progress=False)
    history = gb.fit(*parts(), 3, callbacks=[halve], checkpoint=tmp_path, resume=True, progress=False)
    assert history.step_lr == expected.step_lr


def test_more_epochs_follow_the_schedule_that_is_given_now(tmp_path: Path) -> None:
    """Train 4, look, train 4 more: the usual way to go on, which once went on at a learning rate of 0."""

    def run(epochs: int, resume: bool = True) -> gb.History:
        net, loader, opt = parts()
        opt.lr = gb.CosineDecay(0.01, total=epochs, per="epoch")
        return gb.fit(net, loader, opt, epochs, checkpoint=tmp_path, resume=resume, progress=False)

    assert run(4, resume=False).step_lr[::12] == [gb.CosineDecay(0.01, 4, per="epoch")(0, n) for n in range(4)]
    message = (
        r"^the run goes on with other hyper-parameters:\nlr: CosineDecay\(lr=0.01, total=4, .*\) before, "
        r"CosineDecay\(lr=0.01, total=8, .*\) now$"
    )
    with pytest.warns(gb.ResumeWarning, match=message) as warned:
        history = run(8)
    assert warned[0].filename == __file__
    assert history.step_lr[4 * 12 :: 12] == [gb.CosineDecay(0.01, 8, per="epoch")(0, n) for n in range(4, 8)]


GIVEN_NOW: dict[str, tuple[dict[str, Any], dict[str, Any], list[str]]] = {
    "a number": ({"lr": 0.1}, {"lr": 0.001}, ["lr: 0.1 before, 0.001 now"]),
    "two": (
        {"weight_decay": 0.1},
        {"lr": 0.01, "weight_decay": 0.0},
        ["lr: 0.001 before, 0.01 now", "weight_decay: 0.1 before, 0.0 now"],
    ),
    "a schedule for a number": (
        {"lr": 0.1},
        {"lr": gb.StepDecay(0.1)},
        ["lr: 0.1 before, StepDecay(lr=0.1, factor=0.5, every=10, per='epoch') now"],
    ),
    "another function": (
        {"lr": lambda step, epoch: 0.1 if epoch < 2 else 0.01},
        {"lr": lambda step, epoch: 0.1 if epoch < 2 else 0.02},
        ["lr: the function gave 0.01 at step 24 of epoch 3 before, 0.02 now"],
    ),
    "other numbers in a function": (
        {"beta1": functools.partial(lambda rate, step, epoch: rate, 0.9)},
        {"beta1": functools.partial(lambda rate, step, epoch: rate, 0.8)},
        ["beta1: the function gave 0.9 at step 0 of epoch 1 before, 0.8 now"],
    ),
    "a function in a group": (
        {"groups": {"b*": {"lr": lambda step, epoch: 0.1}}},
        {"groups": {"b*": {"lr": lambda step, epoch: 0.1 / (1 + step)}}},
        ["lr of groups['b*']: the function gave 0.1 at step 1 of epoch 1 before, 0.05 now"],
    ),
    "a chain with a function": (
        {"lr": gb.chain([0.1, lambda step, epoch: 0.2], [1], per="epoch")},
        {"lr": gb.chain([0.1, lambda step, epoch: 0.3], [1], per="epoch")},
        ["lr: the function gave 0.2 at step 12 of epoch 2 before, 0.3 now"],
    ),
    "a function that is the same": (
        {"lr": lambda step, epoch: 0.1 / (1 + epoch)},
        {"lr": lambda step, epoch: 0.1 / (epoch + 1)},
        [],
    ),
    "a table that is longer": (
        {"lr": lambda step, epoch: [0.2][epoch]},
        {"lr": lambda step, epoch: [0.2, 0.1, 0.05][epoch]},
        [],
    ),
    "a callable": ({"lr": 0.1}, {"lr": lambda step, epoch: 0.2}, ["lr: 0.1 before, <lambda> now"]),
    "groups": (
        {},
        {"groups": {"b*": {"lr": 0.5}}},
        ["groups: none before, 'b*' (trainable=True, lr=0.5) now"],
    ),
    "the same": ({"lr": 0.1, "beta1": 0.8}, {"lr": 0.1, "beta1": 0.8}, []),
}


@pytest.mark.parametrize("name", GIVEN_NOW)
def test_what_is_given_now_is_used_and_said(name: str, tmp_path: Path) -> None:
    before, now, lines = GIVEN_NOW[name]

    def run(epochs: int, hyper: dict[str, Any], resume: bool) -> gb.Optimizer:
        net, loader, _ = parts()
        opt = gb.Adam(net.parameters, **hyper)
        gb.fit(net, loader, opt, epochs, checkpoint=tmp_path, resume=resume, progress=False)
        return opt

    run(1, before, False)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        opt = run(2, now, True)
        again = run(3, now, True)  # is as the run is by now, so nothing is to be said
    told = [str(w.message).splitlines()[1:] for w in warned if w.category is gb.ResumeWarning]
    assert told == ([lines] if lines else [])
    for name, value in now.items():
        for one in (opt, again):
            assert one.groups if name == "groups" else one.hyper[name] == value


# What a schedule has left for 4 epochs of 12 steps, and the steps at 0 that a run says at its end.
ENDS: dict[str, tuple[Any, int | None]] = {
    "counts steps": (gb.CosineDecay(0.1, total=4, per="step"), 44),
    "half": (gb.LinearDecay(0.1, total=2, per="epoch"), 24),
    "an epoch": (gb.PolynomialDecay(0.1, total=36, power=2, per="step"), 12),
    "less than an epoch": (gb.LinearDecay(0.1, total=37, per="step"), None),
    "all": (gb.CosineDecay(0.1, total=4, per="epoch"), None),
    "another end": (gb.CosineDecay(0.1, total=2, final=0.01, per="epoch"), None),
    "a chain": (gb.chain([0.1, gb.LinearDecay(0.1, total=1)], [1]), 24),
}


@every("case", ENDS, ["counts steps", "less than an epoch", "all"])
def test_a_schedule_that_ends_before_the_run_is_told(case: Any) -> None:
    schedule, idle = case
    net, loader, opt = parts()
    opt.lr = schedule
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", gb.IdleWarning)
        history = gb.fit(net, loader, opt, 4, progress=False)
    found = [str(w.message) for w in caught if w.category is gb.IdleWarning]
    rates = list(history.step_lr)
    if idle is None:
        assert found == []
    else:
        assert rates[-idle:] == [0.0] * idle
        assert rates[-idle - 1] > 0
        assert re.match(rf"the learning rate is 0 in the last {idle} of the 48 steps of this run: ", found[0])


def test_a_resumed_run_that_is_past_its_epochs_is_told(tmp_path: Path) -> None:
    gb.fit(*parts(), 2, checkpoint=tmp_path, progress=False)
    with pytest.warns(gb.ResumeWarning, match="^the run has made 2 epochs, and epochs=1 in all are asked for: nothing"):
        gb.fit(*parts(), 1, checkpoint=tmp_path, resume=True, progress=False)


def test_another_batch_size_from_the_end_of_an_epoch_on(tmp_path: Path) -> None:
    """The steps are those of a loader of that size, whose epochs go on; in the middle of an epoch it is refused."""
    net, _, opt = parts()
    gb.fit(net, gb.Loader(*blobs(), batch_size=50, backend="cpu"), opt, 1, checkpoint=tmp_path, progress=False)
    after = gb.Loader(*blobs(), batch_size=60, backend="cpu")
    after.load_state_dict({**after.state_dict(), "epoch": 1})
    expected = gb.fit(net, after, opt, 1, progress=False)
    net, _, opt = parts()
    with pytest.warns(gb.ResumeWarning, match="batch_size: 50 before, 60 now"):
        found = gb.fit(
            *(net, gb.Loader(*blobs(), batch_size=60, backend="cpu"), opt, 2),
            checkpoint=Checkpoints(tmp_path, every=15),
            resume=True,
            callbacks=[StopAfter(18)],
            progress=False,
        )
    assert found.batch_size == 60
    assert list(found.step_loss)[12:] == list(expected.step_loss)[:6]
    with pytest.raises(gb.ArgumentError, match="in the middle of an epoch with batches of 60, and batch_size is 50"):
        gb.fit(*parts(), 2, checkpoint=tmp_path, resume=True, progress=False)


class StopAfter:
    """Stops the run after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, state: TrainingState) -> None:
        if state.step == self.step:
            raise gb.StopTraining


def test_numbers_of_numpy_are_taken() -> None:
    net, loader, opt = parts()
    history = gb.fit(net, loader, opt, np.int64(1), progress=np.False_, max_norm=np.float32(1))  # type: ignore[arg-type]
    assert len(history.loss) == 1


def test_a_schedule_that_an_earlier_run_has_used_up_is_told() -> None:
    net, loader, opt = parts()
    opt.lr = gb.CosineDecay(0.01, total=3, per="epoch")
    gb.fit(net, loader, opt, 3, progress=False)
    message = (
        r"^the learning rate is 0 in all 24 steps of this run: CosineDecay\(.*\) has ended by step 36, epoch 3; give"
    )
    with pytest.warns(gb.IdleWarning, match=message):
        assert set(gb.fit(net, loader, opt, 2, progress=False).step_lr) == {0.0}


BATCHES: dict[str, tuple[dict[str, Any], str]] = {
    "scale": ({"scale": 2.0}, r"a loader with scale=0\.5, this one has 2\.0"),
    "transform": ({"transform": np.negative}, r"a loader with prepare=None, this one has 'a function'"),
    "augment": ({"augment": lambda x, draw: x}, r"a loader with augment=None, this one has 'a function'"),
    "samples": ({"X": blobs(seed=1)[0]}, "a loader with other samples"),
    "labels": ({"Y": 2 - blobs()[1]}, "a loader with other samples"),
    "one label": ({"Y": np.where(np.arange(600) == 77, 2 - blobs()[1], blobs()[1])}, "a loader with other samples"),
    "one number": ({"X": np.where(np.arange(600)[:, None] == 77, 0.5, blobs()[0])}, "a loader with other samples"),
}


def test_samples_that_are_stored_otherwise_are_the_same(tmp_path: Path) -> None:
    X, Y = blobs()
    twice = np.zeros((600, 2 * X.shape[1]), X.dtype)
    twice[:, ::2] = X
    for n, (x, axis) in enumerate([(X, 0), (X.astype(np.float64), 0), (twice[:, ::2], 0), (np.asfortranarray(X.T), 1)]):
        net, _, opt = parts()
        loader = gb.Loader(x, Y, batch_size=50, backend="cpu", dtype="float32", sample_axis=axis)
        gb.fit(net, loader, opt, n + 1, checkpoint=tmp_path, resume=True, progress=False)


@pytest.mark.parametrize("name", ["prepare", "augment"])
def test_a_function_that_makes_other_numbers_is_refused(name: str, tmp_path: Path) -> None:
    def run(shift: float, resume: bool) -> None:
        net, _, opt = parts()
        given: dict[str, Any] = {name: lambda x, draw=None: x - shift}
        if name == "augment":
            given = {name: lambda x, draw: x + draw.normal(shift, size=x.shape)}
        loader = gb.Loader(*blobs(), batch_size=50, backend="cpu", **given)
        gb.fit(net, loader, opt, 1, checkpoint=tmp_path, resume=resume, progress=False)

    run(0.5, False)
    run(0.5, True)
    with pytest.raises(gb.ArgumentError, match=f"a loader with another {name}, which makes other numbers"):
        run(0.25, True)


@pytest.mark.parametrize("rows", [300, 1500])  # below and above what is prepared at a time
def test_validation_is_prepared_as_training_is(rows: int, backend: gb.Backend) -> None:
    """As if prepared by hand before, bit for bit; a random augmentation is left out."""
    X, Y = blobs()
    Xv, Yv = blobs(rows, seed=1)
    mean, spread = X.mean(0), X.std(0)
    results = []
    for prepared in (False, True):
        net = gb.mlp([4, 16, 3], backend=backend)
        centre = lambda x: (x - backend.asarray(mean)) / backend.asarray(spread)  # noqa: E731
        options: dict[str, Any] = {} if prepared else {"prepare": centre, "augment": lambda x, draw: x}
        x, xv = ((X - mean) / spread, (Xv - mean) / spread) if prepared else (X, Xv)
        loader = gb.Loader(x, Y, batch_size=50, backend=backend, **options)
        history = gb.fit(net, loader, gb.Adam(net.parameters), 2, validation=(xv, Yv), progress=False)
        results.append((history.step_loss, history.validation_loss, history.validation_accuracy))
    if backend.name == "cpu":
        assert results[0] == results[1]
    np.testing.assert_allclose(results[0][1], results[1][1], rtol=1e-5)


@pytest.mark.parametrize("precision", ["full", "mixed"])
@pytest.mark.parametrize("read", [False, True])
def test_a_loader_without_a_dtype_takes_the_network_s(read: bool, precision: str, backend: gb.Backend) -> None:
    """float64 is NumPy's default; the numbers are those of float32 given before."""
    X, Y = blobs()
    results = []
    for wide in (False, True):
        net = gb.mlp([4, 8, 3], backend=backend, precision=precision)
        given = X.astype(np.float64) if wide else X
        options = {} if wide else {"dtype": net.dtype}
        loader = gb.Loader(Read(given, Y) if read else given, None if read else Y, 50, backend=backend, **options)
        next(iter(loader))  # a batch of float64, before anybody knows of the network
        opt = gb.Adam(net.parameters, master_weights=precision == "mixed")
        history = gb.fit(net, loader, opt, 2, (given, Y), progress=False)
        assert loader.dtype == net.dtype
        results.append((history.step_loss, history.validation_loss))
    assert results[0] == results[1]


def test_unscaled_pixels_are_told_after_a_training_on_scaled_ones() -> None:
    X, Y = blobs()
    pixels = np.clip(20 * X + 100, 0, 255).astype(np.uint8)
    net, *_ = parts()
    loader = gb.Loader(pixels, Y, batch_size=50, scale=1 / 255, backend="cpu")
    message = r"X reaches \d+, and the network was trained on numbers up to 1, .*loader.to_batch\(X\)"
    unscaled = pixels.astype(np.float32)
    with pytest.warns(gb.UnscaledWarning, match=message):
        gb.fit(net, loader, gb.Adam(net.parameters), 1, (unscaled, Y), progress=False)
    with pytest.warns(gb.UnscaledWarning, match=message):
        net.predict(unscaled)
    gb.fit(net, loader, gb.Adam(net.parameters), 1, (pixels, Y), progress=False)
    net.predict(loader.to_batch(pixels))
    with pytest.raises(gb.DTypeError, match="X has dtype uint8, as pixels have"):
        net.predict(pixels)


@pytest.mark.parametrize(
    ("top", "options", "told"),
    [(255, {}, True), (255, {"scale": 255}, True), (255, {"scale": 1 / 255}, False), (100, {}, False)],
    ids=["pixels", "scale 255", "scaled", "small numbers"],
)
def test_pixels_that_nobody_scales_are_told_before_the_first_step(top: int, options: Any, told: bool) -> None:
    X, Y = blobs()
    pixels = np.clip(20 * X + 100, 0, 255).astype(np.uint8)
    pixels = np.minimum(pixels, top).astype(np.uint8)
    net, *_ = parts()
    loader = gb.Loader(pixels, Y, batch_size=50, backend="cpu", **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", gb.UnscaledWarning)
        gb.fit(net, loader, gb.Adam(net.parameters), 1, progress=False)
    found = [str(w.message) for w in caught if w.category is gb.UnscaledWarning]
    assert len(found) == told
    assert not told or re.match(
        r"X has dtype uint8 and reaches \d+ in batches, .*: give the loader scale=1/255", found[0]
    )


def prepare(x: Any) -> Any:
    return x * 2


# A validation Loader beside a training one, by their options, and what is said of it.
OTHERWISE: dict[str, tuple[dict[str, Any], dict[str, Any], str | None]] = {
    "the same": ({"prepare": prepare, "scale": 0.5}, {"prepare": prepare, "scale": 0.5}, None),
    "augmented": ({"augment": lambda x, draw: x}, {}, None),
    "no prepare": ({"prepare": prepare}, {}, "that has no prepare, unlike the loader"),
    "a prepare": ({}, {"prepare": prepare}, "that has a prepare, unlike the loader"),
    "another scale": ({"scale": 0.5}, {"scale": 0.25}, "that has scale=0.25, unlike the loader"),
    "no scale": ({"scale": 0.5}, {}, "that has scale=None, unlike the loader"),
}


@every("case", OTHERWISE, ["the same", "no prepare", "another scale"])
def test_a_validation_loader_that_prepares_otherwise_is_told(case: Any) -> None:
    options, other, words = case
    net, _, opt = parts()
    loader = gb.Loader(*blobs(), batch_size=50, backend="cpu", **options)
    held_out = gb.Loader(*blobs(60), batch_size=50, backend="cpu", **other)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", gb.UnscaledWarning)
        gb.fit(net, loader, opt, 1, held_out, progress=False)
    found = [str(w.message) for w in caught if w.category is gb.UnscaledWarning]
    assert len(found) == (words is not None)
    assert words is None or words in found[0]


class Read:
    """A source, which counts the most samples that are read at a time."""

    def __init__(self, *arrays: np.ndarray) -> None:
        self.arrays, self.most = arrays, 0

    def __len__(self) -> int:
        return len(self.arrays[0])

    def read(self, indices: np.ndarray) -> Any:
        self.most = max(self.most, len(indices))
        found = tuple(array[indices] for array in self.arrays)
        return found if len(found) > 1 else found[0]


def mapped(X: np.ndarray, folder: Path) -> np.ndarray:
    np.save(folder / "X.npy", X)
    return np.load(folder / "X.npy", mmap_mode="r")


class Reversed(gb.Loader):
    """A loader with an iteration of its own."""

    def __iter__(self) -> Any:
        yield from reversed(list(gb.Loader.__iter__(self)))


# Forms of the validation set (X, Y): functions of both, of a folder, and of the backend.
FORMS: dict[str, Callable[..., Any]] = {
    "arrays": lambda X, Y, folder, backend: (X, Y),
    "lists": lambda X, Y, folder, backend: [X.tolist(), Y.tolist()],
    "a source": lambda X, Y, folder, backend: Read(X, Y),
    "a source and labels": lambda X, Y, folder, backend: (Read(X), Y),
    "two sources": lambda X, Y, folder, backend: (Read(X), Read(Y)),
    "a mapped file": lambda X, Y, folder, backend: (mapped(X, folder), Y),
    "a loader": lambda X, Y, folder, backend: gb.Loader(
        X, Y, batch_size=7, scale=0.5, prepare=shifted, augment=lambda x, draw: x * 0, backend=backend
    ),
    "a loader's own iteration": lambda X, Y, folder, backend: Reversed(
        X, Y, batch_size=70, scale=0.5, prepare=shifted, backend=backend
    ),
}


def shifted(x: Any) -> Any:
    return x - 0.25


@pytest.mark.parametrize("name", FORMS)
def test_every_form_of_a_validation_set_gives_what_evaluate_does(
    name: str, backend: gb.Backend, tmp_path: Path
) -> None:
    X, Y = blobs()
    Xv, Yv = blobs(2500, seed=1)
    Xv = np.round(20 * Xv + 100).astype(np.int16)
    net = gb.mlp([4, 16, 3], backend=backend, l2=0.01, loss="softmax_cross_entropy")
    train = np.round(20 * X + 100).astype(np.int16)
    loader = gb.Loader(train, Y, batch_size=50, scale=0.5, prepare=shifted, backend=backend)
    validation = FORMS[name](Xv, Yv, tmp_path, backend)
    found = []

    def measured(state: gb.TrainingState) -> None:
        found.append(net.evaluate(backend.asarray(Xv * np.float32(0.5) - np.float32(0.25)), backend.asarray(Yv)))

    history = gb.fit(net, loader, gb.SGD(net.parameters, 1e-4), 2, validation, [measured], progress=False)
    np.testing.assert_allclose(history.validation_loss, [loss for loss, _ in found], rtol=1e-6)
    assert history.validation_accuracy == pytest.approx([accuracy for _, accuracy in found], abs=1e-12)
    sources = validation if isinstance(validation, tuple) else (validation,)
    assert all(source.most == 1024 for source in sources if isinstance(source, Read))


def test_ignored_labels_do_not_count_where_validation_is_read() -> None:
    """Unequally many in the batches, and all of one."""
    X, Y = blobs(2500)
    Y[1024:2048], Y[:300] = -1, -1
    results = []
    for validation in ((X, Y), Read(X, Y)):
        net = gb.mlp([4, 8, 3], backend="cpu", l2=0.1, loss=gb.SoftmaxCrossEntropy(ignore_label=-1))
        loader = gb.Loader(*blobs(), batch_size=50, backend="cpu")
        history = gb.fit(net, loader, gb.Adam(net.parameters), 2, validation, progress=False)
        results.append([*history.validation_loss, *history.validation_accuracy])
    assert results[1] == pytest.approx(results[0], rel=1e-12)


HELD: dict[str, dict[str, Any]] = {
    "plain": {},
    "a rank": {"rank": 1, "world_size": 2},
    "a window": {"window": 40},
    "in order": {"shuffle": False},
    "weighted": {"order": gb.WeightedOrder(np.arange(200))},
    "one batch": {"batch_size": 200},
}


@pytest.mark.parametrize("name", HELD)
def test_a_fraction_is_held_out_during_the_run_alone(name: str, backend: gb.Backend) -> None:
    X = np.arange(200, dtype=np.float32)[:, None] / 200
    Y = np.repeat([0, 1], [160, 40])
    net = gb.mlp([1, 8, 2], backend=backend)
    seen, held = set[float](), set[float]()

    def note(x: Any, draw: Any) -> Any:
        seen.update(backend.to_numpy(x)[:, 0].tolist())
        return x

    def look(x: Any) -> Any:
        held.update(backend.to_numpy(x)[:, 0].tolist())
        return x

    options = {"batch_size": 20, "seed": 3, "prepare": look, "augment": note, **HELD[name]}
    loader = gb.Loader(X, Y, backend=backend, **options)
    before = len(loader), loader.n_samples, loader.batch_size
    history = gb.fit(net, loader, gb.Adam(net.parameters), 3, validation=0.25, progress=False)
    assert len(history.validation_loss) == 3
    held -= seen
    assert len(held) >= 50
    assert len(history.step_loss) == 3 * -(-150 // options.get("world_size", 1) // options["batch_size"])
    assert (len(loader), loader.n_samples, loader.batch_size) == before
    assert loader.epoch == 3
    if name == "plain":
        assert len(seen) == 150
        assert len(held) == 50
        assert sum(x < 0.8 for x in held) == 40  # in proportion from each class


def test_a_fraction_is_captured_and_goes_on_as_it_was(tmp_path: Path, backend: gb.Backend) -> None:
    def run(epochs: int, resume: bool = False, validation: Any = 0.2, **options: Any) -> gb.History:
        net = gb.mlp([4, 8, 3], backend=backend)
        loader = gb.Loader(*blobs(), batch_size=50, backend=backend)
        return gb.fit(
            net, loader, gb.Adam(net.parameters), epochs, validation, resume=resume, progress=False, **options
        )

    whole = run(3)
    assert whole.execution == ("eager" if backend.name == "cpu" else "captured")
    run(1, checkpoint=tmp_path)
    assert numbers(run(3, True, checkpoint=tmp_path)) == numbers(whole)
    for other in (0.1, None):
        with pytest.raises(gb.ArgumentError, match="a loader with 120 samples held out for validation, this one holds"):
            run(3, True, other, checkpoint=tmp_path)


UNFIT: dict[str, tuple[Callable[[], Any], str]] = {
    "a generator": (lambda: (x for x in [1]), "must be a pair .*, got generator"),
    "a dict": (lambda: {"X": 1}, "must be a pair .*, got dict"),
    "four": (lambda: (1, 2, 3, 4), "must be a pair .*, got 4 items"),
    "no labels": (lambda: Read(blobs()[0]), "must have labels"),
    "None for Y": (lambda: (blobs()[0], None), "must be a pair"),
    "a loader without labels": (lambda: gb.Loader(blobs()[0], backend="cpu"), "must have labels"),
    "a loader of float64": (lambda: gb.Loader(*blobs(), dtype="float64", backend="cpu"), "must be a Loader of float32"),
    "labels of a source": (lambda: Read(blobs()[0], blobs()[1] + 1), ": Y must hold labels from 0 to 2, got 3"),
    "NaN in a source": (lambda: (Read(blobs()[0] * np.float32(np.nan)), blobs()[1]), ": .*samples must be finite"),
    "targets that are NaN": (lambda: (blobs()[0], blobs()[1] * np.nan), r"\[1\] must be finite"),
    "too much": (lambda: 1.0, r"validation must be finite and in \(0, 1\), got 1.0"),
    "too little": (lambda: 1e-6, "validation=1e-06 of 600 samples leaves 0"),
    "True": (lambda: True, "must be a pair .*, got bool"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_what_cannot_be_a_validation_set_is_told_before_the_first_step(name: str) -> None:
    make, message = UNFIT[name]
    net, loader, opt = parts()
    with pytest.raises(gb.GpubatchError, match=f"^validation.*{message.removeprefix('validation')}"):
        gb.fit(net, loader, opt, 2, validation=make(), progress=False)
    assert opt.t == 0


@pytest.mark.parametrize("name", BATCHES)
def test_other_batches_are_refused(name: str, tmp_path: Path) -> None:
    other, message = BATCHES[name]

    def run(resume: bool, **other: Any) -> None:
        X, Y = blobs()
        arguments = {"X": X, "Y": Y, "batch_size": 50, "scale": 0.5, "backend": "cpu", **other}
        net, _, opt = parts()
        gb.fit(net, gb.Loader(**arguments), opt, 1, checkpoint=tmp_path, resume=resume, progress=False)

    run(False)
    run(True)
    with pytest.raises(gb.ArgumentError, match=f"cannot be resumed here: it is of {message}"):
        run(True, **other)


def test_a_resumed_run_says_from_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gb.fit(*parts(), 2, checkpoint=tmp_path, progress=False)
    gb.fit(*parts(), 3, checkpoint=tmp_path, resume=True)
    gb.fit(*parts(), 3, checkpoint=tmp_path, resume=True)
    first, epoch, second = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"resumed after step 24, at the end of epoch 2, saved at \d{4}-\d\d-\d\d \d\d:\d\d:\d\d", first)
    assert epoch.startswith("epoch 3/3")
    assert second.endswith("; the run has made its 3 epochs, nothing is left to do")


def test_an_automatic_batch_size_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if another size would be chosen now, because other sizes make other batches."""

    def make() -> tuple[gb.Network, gb.Loader, gb.Optimizer]:
        net = gb.mlp([4, 8, 3], backend="cpu")
        return net, gb.Loader(*blobs(2500), backend="cpu", at_most=64), gb.Adam(net.parameters)

    with pytest.raises(Killed):
        gb.fit(*make(), 1, callbacks=[Kill(30)], checkpoint=Checkpoints(tmp_path, every=10), progress=False)
    last = make()
    room = last[0].memory(32) + last[2].memory()
    monkeypatch.setattr(type(last[0].backend), "memory", lambda self: gb.Memory(10**12, 2 * room))
    assert gb.fit(*last, 1, checkpoint=tmp_path, resume=True, progress=False).batch_size == 64
    assert last[1].batch_size == 64
    assert last[1].plan.reason.startswith("batch_size=64 was taken from a saved state")


def test_a_run_with_a_users_layer_and_schedule_goes_on(tmp_path: Path) -> None:
    def make() -> tuple[gb.Network, gb.Loader, gb.Optimizer]:
        layers = [gb.Dense(4, 8), Spoil("", lambda: 0), gb.ReLU(), gb.Dense(8, 3)]
        net = gb.Network(layers, backend="cpu")
        return (
            net,
            gb.Loader(*blobs(), batch_size=50, backend="cpu"),
            gb.Adam(net.parameters, lambda t, e: 0.1 / (t + 1)),
        )

    resumed_is_as_if_never_stopped(make, Checkpoints(tmp_path, every=2), [5])


REFUSED = {
    "width": (
        lambda: parts_of(gb.mlp([4, 17, 3], backend="cpu")),
        r"layer 1 is Dense\(inputs=4, outputs=16.*outputs=17",
    ),
    "layers": (
        lambda: parts_of(gb.mlp([4, 16, 3], backend="cpu", dropout=0.1)),
        "number of layers is 3, this one's is 4",
    ),
    "loss": (lambda: parts(loss="svm"), "loss is softmax_cross_entropy, this one's is svm"),
    "l2": (lambda: parts(l2=0.1), r"l2 is 0\.0, this one's is 0\.1"),
    "seed": (lambda: parts(seed=1), "seed is 0, this one's is 1"),
    "dtype": (lambda: parts(dtype="float64"), "dtype is float32, this one's is float64"),
    "optimizer": (lambda: with_opt(gb.SGD, lr=0.1), "state_dict is of the rule 'adam', this optimizer's is 'sgd'"),
    "variant": (lambda: with_opt(gb.Adam, eps_at="hat"), "state_dict has eps_at='outside', this optimizer .*'hat'"),
}


def parts_of(net: gb.Network) -> tuple[Any, Any, Any]:
    return net, parts()[1], gb.Adam(net.parameters, lr=0.01)


def with_opt(kind: Any, **hyper: Any) -> tuple[Any, Any, Any]:
    net, loader, _ = parts()
    return net, loader, kind(net.parameters, **hyper)


@pytest.mark.parametrize("name", REFUSED)
def test_a_checkpoint_of_something_else_is_refused(name: str, tmp_path: Path) -> None:
    gb.fit(*parts(), 1, checkpoint=tmp_path, progress=False)
    make, message = REFUSED[name]
    other = make()
    before = everything(*other)
    with pytest.raises(gb.ArgumentError, match=f"checkpoint-000001.* cannot be resumed here: .*{message}"):
        gb.fit(*other, 2, checkpoint=tmp_path, resume=True, progress=False)
    np.testing.assert_equal(everything(*other), before)


def test_a_file_that_fit_did_not_write_is_refused(tmp_path: Path) -> None:
    Checkpoints(tmp_path).save({"mine": 3})
    with pytest.raises(
        gb.DataFormatError, match=r"checkpoint-000001.* was not saved by fit: KeyError\('description'\)"
    ):
        gb.fit(*parts(), 2, checkpoint=tmp_path, resume=True, progress=False)


def test_a_new_run_does_not_replace_an_old_one(tmp_path: Path) -> None:
    gb.fit(*parts(), 1, checkpoint=tmp_path, progress=False)
    with pytest.raises(gb.ArgumentError, match="has checkpoints of a run: go on from them with resume=True"):
        gb.fit(*parts(), 1, checkpoint=tmp_path, progress=False)
    with pytest.raises(gb.ArgumentError, match="resume=True needs checkpoint=, the folder"):
        gb.fit(*parts(), 1, resume=True, progress=False)


def test_a_corrupt_newest_one_is_passed_over(tmp_path: Path) -> None:
    whole = parts()
    expected = gb.fit(*whole, 3, progress=False)
    gb.fit(*parts(), 2, checkpoint=tmp_path, progress=False)
    newest = Checkpoints(tmp_path).files()[-1]
    newest.write_bytes(newest.read_bytes()[:-5])
    last = parts()
    with pytest.warns(CheckpointWarning, match="torn or corrupt"):
        history = gb.fit(*last, 3, checkpoint=tmp_path, resume=True, progress=False)
    assert numbers(history) == numbers(expected)
    np.testing.assert_array_equal(last[0].parameters.flat, whole[0].parameters.flat)


class FillDisk:
    """A callback that limits files to a few bytes after the given number of epochs."""

    def __init__(self, epoch: int) -> None:
        self.epoch, self.before = epoch, resource.getrlimit(resource.RLIMIT_FSIZE)

    def __enter__(self) -> FillDisk:
        return self

    def __exit__(self, *error: object) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)

    def __call__(self, state: gb.TrainingState) -> None:
        if state.epoch == self.epoch:
            resource.setrlimit(resource.RLIMIT_FSIZE, (500, self.before[1]))


@pytest.mark.parametrize("background", [False, True])
def test_a_full_disk_ends_the_run_and_the_checkpoint_before_is_there(background: bool, tmp_path: Path) -> None:
    store = Checkpoints(tmp_path, background=background)
    # In the third epoch the checkpoint of the first is complete, in the background too: that of the second waited.
    with FillDisk(2) as full, pytest.raises(CheckpointError, match="File too large; the newest is checkpoint-0000"):
        gb.fit(*parts(), 9, callbacks=[full], checkpoint=store, progress=False)
    expected, last = gb.fit(*parts(), 3, progress=False), parts()
    assert numbers(gb.fit(*last, 3, checkpoint=tmp_path, resume=True, progress=False)) == numbers(expected)


def test_a_full_disk_does_not_end_a_run_that_shall_go_on(tmp_path: Path) -> None:
    whole, last = parts(), parts()
    expected = gb.fit(*whole, 3, progress=False)
    with FillDisk(1) as full, pytest.warns(CheckpointWarning, match="File too large"):
        history = gb.fit(
            *last, 3, callbacks=[full], checkpoint=Checkpoints(tmp_path, on_failure="warn"), progress=False
        )
    assert numbers(history) == numbers(expected)
    np.testing.assert_array_equal(last[0].parameters.flat, whole[0].parameters.flat)
    assert len(Checkpoints(tmp_path).files()) == 1


def test_ctrl_c_says_so_if_the_run_could_not_be_saved(tmp_path: Path) -> None:
    def press(state: gb.TrainingState) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    store = Checkpoints(tmp_path, every=100)
    with FillDisk(0) as full, pytest.raises(gb.TrainingInterrupted, match=r"step; no checkpoint could be .*too large"):
        gb.fit(*parts(), 2, callbacks=[full, press], checkpoint=store, progress=False)


# --- bad numbers ---------------------------------------------------------------------------------------------------


class Spoil(gb.Layer):
    """An identity layer that makes one number bad in pass ``way``, "forward" or "backward", if ``now()``."""

    def __init__(self, way: str, now: Callable[[], Any], value: float = math.nan) -> None:
        self.way, self.now, self.value = way, now, value

    def takes(self) -> None:
        pass

    def needs(self, features: int) -> Needs:
        return Needs(features)

    def forward(self, x: Array, y: Array, c: Context) -> None:
        y[...] = x
        if self.way == "forward" and c.mode.training and self.now():
            y[0, 0] = self.value

    def backward(self, x: Array, y: Array, dy: Array, dx: Array | None, c: Context) -> None:
        if dx is not None:
            dx[...] = dy
            if self.way == "backward" and self.now():
                dx[0, 0] = self.value


def spoiled(
    backend: Any, way: str, at: set[int], value: float = math.nan
) -> tuple[tuple[gb.Network, gb.Loader, gb.Optimizer], list[int]]:
    """A net with bad batches number ``at``, from 1, and a list whose length is the number of the batch."""
    seen: list[int] = []
    spoil = Spoil(way, lambda: len(seen) in at, value)

    class Counted(Spoil):
        def forward(self, x: Array, y: Array, c: Context) -> None:
            y[...] = x
            if c.mode.training:
                seen.append(len(x))

    layers = [Counted("", lambda: False), gb.Dense(4, 8), gb.BatchNorm(8), spoil, gb.ReLU(), gb.Dense(8, 3)]
    net = gb.Network(layers, backend=backend)
    loader = gb.Loader(*blobs(), batch_size=50, backend=backend)
    return (net, loader, gb.Adam(net.parameters, gb.ExponentialDecay(0.05, 0.9, per="step"))), seen


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("way", ["forward", "backward"])
def test_a_bad_step_is_left_out_and_leaves_no_trace(way: str, value: float, backend: gb.Backend) -> None:
    bad = {3, 4, 12, 20}
    run, _ = spoiled(backend, way, bad, value)
    what = (
        "loss is" if way == "forward" else r"\d+ of \d+ numbers of the gradient are NaN or infinite, in W1, b1, gamma1"
    )
    with pytest.warns(SkippedStepWarning, match=what) as raised:
        history = gb.fit(*run, 2, progress=False)
    assert len(raised) == 1
    assert raised[0].filename == __file__
    assert (history.skipped, len(history.step_loss), len(history.step_lr), run[2].t) == (4, 20, 20, 20)

    (net, loader, opt), _ = spoiled(backend, way, set())
    number, loss = 0, []
    for epoch in range(2):
        opt.epoch, total, samples = epoch, 0.0, 0
        for x, y in loader:
            number += 1
            if number not in bad:
                cost, grads = net.loss_and_grad(x, y)
                opt.step(grads)
                total, samples = total + cost * len(x), samples + len(x)
        loss.append(total / samples)
    assert history.loss == loss
    for name in ("parameters", "buffers"):
        np.testing.assert_array_equal(
            net.backend.to_numpy(getattr(run[0], name).flat), net.backend.to_numpy(getattr(net, name).flat)
        )
    for name, views in opt.state.items():
        np.testing.assert_array_equal(net.backend.to_numpy(run[2].state[name].flat), net.backend.to_numpy(views.flat))


def test_too_many_bad_steps_in_a_row_end_it(tmp_path: Path) -> None:
    bad = {2, *range(6, 30)}
    run, seen = spoiled("cpu", "backward", bad)
    message = r"in W1, b1, .* \(epoch 1, step 5, learning rate .*\); 3 steps in a row before it were left out"
    with pytest.warns(SkippedStepWarning, match="up to 3 in a row"), pytest.raises(gb.NonFiniteError, match=message):
        gb.fit(*run, 2, max_skipped=3, checkpoint=Checkpoints(tmp_path, every=1), progress=False)
    assert (len(seen), run[2].t) == (9, 4)
    found = Checkpoints(tmp_path).newest()
    assert found is not None
    assert found[1]["optimizer"]["t"] == 4
    np.testing.assert_array_equal(found[1]["network"]["parameters"]["W1"], run[0].parameters["W1"])


def test_the_first_bad_step_may_end_it() -> None:
    net, loader, _ = parts()
    opt = gb.SGD(net.parameters, lr=1e30)
    with pytest.raises(gb.NonFiniteError, match=r"loss is .*\(epoch 1, step \d+, learning rate 1e\+30\)$"):
        gb.fit(net, loader, opt, max_skipped=0, progress=False)


def test_bad_steps_in_a_row_are_counted_across_an_interruption(tmp_path: Path) -> None:
    bad = set(range(5, 30))
    run, seen = spoiled("cpu", "backward", bad)
    run[0].layers[3].now = lambda: (len(seen) == 6 and os.kill(os.getpid(), signal.SIGINT)) or len(seen) in bad
    with pytest.warns(SkippedStepWarning), pytest.raises(gb.TrainingInterrupted, match="after step 4"):
        gb.fit(*run, 2, max_skipped=3, checkpoint=tmp_path, progress=False)
    assert len(seen) == 6
    with pytest.raises(gb.NonFiniteError, match="3 steps in a row before it were left out"):
        gb.fit(*run, 2, max_skipped=3, checkpoint=tmp_path, resume=True, progress=False)
    assert len(seen) == 8


def test_an_epoch_without_a_good_step_has_no_mean() -> None:
    run, _ = spoiled("cpu", "forward", set(range(1, 13)))
    with pytest.warns(SkippedStepWarning):
        history = gb.fit(*run, 2, max_skipped=12, progress=False)
    assert (math.isnan(history.loss[0]), history.skipped, len(history.step_loss)) == (True, 12, 12)
    assert math.isfinite(history.loss[1])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_norm_of_the_gradients_is_bounded(dtype: str, backend: gb.Backend) -> None:
    net, loader, opt = parts(backend, dtype=dtype)
    gb.fit(net, loader, opt, 1, max_norm=2.0, progress=False)
    other, loader, opt = parts(backend, dtype=dtype)
    norms = []
    for x, y in loader:
        norms.append(gb.clip_by_global_norm(other.loss_and_grad(x, y)[1], 2.0))
        opt.step()
    assert min(norms) < 2 < max(norms)  # both ways were gone
    weights = [n.backend.to_numpy(n.parameters.flat) for n in (net, other)]
    np.testing.assert_allclose(*weights, rtol=1e-5 if dtype == "float32" else 1e-12, atol=1e-7)


@pytest.mark.parametrize("max_norm", [None, 1.0])
def test_a_norm_beyond_float32_is_no_bad_number(max_norm: float | None) -> None:
    """The norm's square overflows in float32; the gradient and the norm do not."""
    X = blobs()[0]
    net = gb.Network([gb.Dense(4, 2)], loss="mse", backend="cpu")
    loader = gb.Loader(1e16 * X, np.full((600, 2), 1e4, np.float32), batch_size=600, backend="cpu")
    for p in net.parameters.values():
        p[...] = 0
    history = gb.fit(net, loader, gb.SGD(net.parameters, 1e-30), 1, max_norm=max_norm, progress=False)
    assert history.skipped == 0
    assert np.square(net.parameters.grads.flat.astype(np.float64)).sum() > np.finfo(np.float32).max


def test_a_gradient_whose_square_the_state_cannot_hold_is_left_out(backend: gb.Backend) -> None:
    """Adam's second moment would become and stay infinite, so no weight would ever change again."""
    net, loader, opt = parts(backend, batch_size=600)
    gb.fit(net, loader, opt, 2, progress=False)
    kept = [backend.to_numpy(a).copy() for a in (net.parameters.flat, *(s.flat for s in opt.state.values()))]
    original = net.loss_and_grad

    def large(*arguments: Any) -> Any:
        loss, grads = original(*arguments)
        grads.flat[3] = 3e19
        return loss, grads

    net.loss_and_grad = large
    with pytest.warns(SkippedStepWarning, match="the gradient is so large that adam overflows float32"):
        history = gb.fit(net, loader, opt, 1, progress=False)
    if backend.name == "cuda":  # where captured steps would not call it; test_capture has their form of this
        assert history.execution == "eager, since Network.loss_and_grad is not gpubatch's own"
    assert (history.skipped, history.step_loss, opt.t) == (1, [], 2)
    for before, now in zip(kept, (net.parameters, *opt.state.values()), strict=True):
        np.testing.assert_array_equal(backend.to_numpy(now.flat), before)
    history = gb.fit(net, loader, opt, 1, max_norm=1.0, progress=False)  # scaled before it is squared
    assert (history.skipped, opt.t) == (0, 3)


def test_a_gradient_too_large_for_its_norm_is_left_out() -> None:
    net, _, opt = parts(dtype="float64", loss="mse")
    X, _ = blobs(dtype="float64")
    big = gb.Loader(X, np.full((600, 3), 1e200), batch_size=600, backend="cpu")
    with pytest.warns(SkippedStepWarning, match="loss is inf|too large for its norm"):
        assert gb.fit(net, big, opt, 1, progress=False).skipped == 1


# --- callbacks that are saved ----------------------------------------------------------------------------------------


class Patience:
    """Counts epochs, as an early-stopping callback does."""

    def __init__(self) -> None:
        self.epochs = 0

    def on_epoch(self, state: TrainingState) -> None:
        self.epochs += 1

    def state_dict(self) -> dict[str, Any]:
        return {"epochs": self.epochs}

    def load_state_dict(self, state: Any) -> None:
        self.epochs = state["epochs"]


def test_a_callback_with_a_state_goes_on_with_it(tmp_path: Path) -> None:
    first, again, plain = Patience(), Patience(), []
    gb.fit(*parts(), 2, callbacks=[first], checkpoint=tmp_path, progress=False)
    gb.fit(*parts(), 5, callbacks=[plain.append, again], checkpoint=tmp_path, resume=True, progress=False)
    assert (first.epochs, again.epochs, len(plain)) == (2, 5, 3)
    with pytest.raises(gb.ArgumentError, match="it has the state of 1 callbacks, of those given now 0 have state_dict"):
        gb.fit(*parts(), 6, callbacks=[print], checkpoint=tmp_path, resume=True, progress=False)


# --- errors --------------------------------------------------------------------------------------------------------


def other(**changed: Any) -> dict[str, Any]:
    net, loader, opt = parts()
    return {"net": net, "loader": loader, "opt": opt, "epochs": 1, "progress": False, **changed}


X, Y = blobs()
ERRORS = {
    "net": (lambda: other(net=3), TypeError, "net must be a gpubatch.Network, got int"),
    "loader": (lambda: other(loader=[(X, Y)]), TypeError, "loader must be a gpubatch.Loader, got list"),
    "opt": (lambda: other(opt=None), TypeError, "opt must be a gpubatch.Optimizer, got NoneType"),
    "epochs": (lambda: other(epochs=-1), ValueError, "epochs must be an integer >= 0, got -1"),
    "no labels": (
        lambda: other(loader=gb.Loader(X, backend="cpu")),
        ValueError,
        r"loader must have labels: Loader\(X, Y\)",
    ),
    "other parameters": (
        lambda: other(opt=gb.SGD(gb.mlp([4, 16, 3], backend="cpu").parameters, 0.1)),
        ValueError,
        "opt must be bound to net.parameters",
    ),
    "dtype": (
        lambda: other(loader=gb.Loader(X, Y, dtype="float64", backend="cpu")),
        ValueError,
        "loader makes float64 batches, net computes in float32",
    ),
    "features": (
        lambda: other(loader=gb.Loader(X[:, :3], Y, backend="cpu", batch_size=10)),
        ValueError,
        "X has 3 features, .* takes 4",
    ),
    "labels": (
        lambda: other(loader=gb.Loader(X, Y + 1, backend="cpu", batch_size=600)),
        ValueError,
        "3",
    ),
    "validation": (lambda: other(validation=X), TypeError, r"validation must be a pair \(X, Y\) .*, got ndarray"),
    "validation features": (lambda: other(validation=(X[:, :2], Y)), ValueError, r"validation\[0\] must have samples"),
    "callback": (lambda: other(callbacks=[3]), TypeError, "a callback must be callable"),
    "max_norm": (lambda: other(max_norm=0), ValueError, r"max_norm must be finite and in \(0, inf\), got 0\.0"),
    "max_skipped": (lambda: other(max_skipped=-1), ValueError, "max_skipped must be an integer >= 0, got -1"),
    "arrays for a loader": (
        lambda: other(loader=X),
        TypeError,
        r"loader must be .* got ndarray: gb.Loader\(X, Y\) make",
    ),
    "a class": (lambda: other(opt=gb.Adam), TypeError, r"opt must be .* got the class Adam: gb.Adam\(net.parameters\)"),
    "two optimizers": (lambda: other(opt=[]), TypeError, "opt must be a gpubatch.Optimizer, got list: .* groups="),
    "checkpoint": (lambda: other(checkpoint=3), TypeError, "the folder of checkpoints must be a path, got 3"),
    "resume": (lambda: other(resume=1), TypeError, "resume must be True or False, got 1"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name: str) -> None:
    arguments, kind, message = ERRORS[name]
    with pytest.raises(kind, match=message) as raised:
        gb.fit(**arguments())
    assert isinstance(raised.value, gb.GpubatchError)


# --- display -------------------------------------------------------------------------------------------------------


def test_plain_lines_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    gb.fit(*parts(), epochs=2, validation=blobs())
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert lines[0] == "12 steps an epoch, 24 in all, batches of 50"
    assert len(lines) == 3
    assert lines[1].startswith("epoch 1/2  loss ")
    assert "  validation loss " in lines[2]
    assert " %  " in lines[2]


def test_a_notebook_without_ipywidgets_has_a_bar(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rich would print 'install "ipywidgets"' and show none."""
    monkeypatch.setitem(sys.modules, "ipykernel", sys)
    monkeypatch.setattr("gpubatch.train.display.REWRITTEN", 0.0)
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    gb.fit(*parts(), epochs=2)
    told = capsys.readouterr().err
    assert "ipywidgets" not in told
    bars = [text for text in told.split("\r") if "█" in text or "░" in text]
    assert len(bars) == 24
    assert re.fullmatch(r"epoch 2/2 █{16}░{14}  54%  loss \d\.\d{4} *", bars[12])
    assert [line.split("\r")[-1].split("  ")[0] for line in told.split("\n")[-3:-1]] == ["epoch 1/2", "epoch 2/2"]


def test_nothing_without_progress(capsys: pytest.CaptureFixture[str]) -> None:
    gb.fit(*parts(), epochs=1, progress=False)
    assert capsys.readouterr() == ("", "")


def test_the_curve_is_smoothed_as_ewma_does() -> None:
    history = gb.fit(*parts(), epochs=2, progress=False)
    np.testing.assert_allclose(history.smoothed(0.8), gb.ewma(history.step_loss, 0.8))
