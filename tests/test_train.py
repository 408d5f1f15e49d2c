"""The loop: what a run leaves behind, what callbacks see, what Ctrl-C and bad numbers do."""

from __future__ import annotations

import json
import os
import signal
import threading
from typing import Any

import numpy as np
import pytest
from needs import peer

import gpubatch as gb
from gpubatch.train import plan_batches


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
    """The whole road at once: the same weights after 60 steps of Adam in another library."""
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


def test_schedules_see_steps_and_epochs() -> None:
    net, loader, opt = parts()
    opt.lr = gb.ExponentialDecay(0.1, rate=0.5)
    history = gb.fit(net, loader, opt, epochs=3, progress=False)
    assert history.step_lr == [0.1] * 12 + [0.05] * 12 + [0.025] * 12
    gb.fit(net, loader, opt, epochs=1, progress=False)
    assert (opt.epoch, opt.lr) == (3, 0.0125)


def test_columns_train_as_rows_do() -> None:
    """The course's layout, samples in columns, is another view of the same numbers."""
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
    # Room for more than 128 samples, and not for 256.
    needed, more = (net.memory(n) + opt.memory() for n in (128, 256))
    available = int((0.6 * needed + 0.4 * more) / 0.9)
    monkeypatch.setattr(type(loader.backend), "memory", lambda self: gb.Memory(10**12, available))
    before = net.parameters.flat.copy(), net.buffers.flat.copy(), net.dropout_step
    plan_batches(net, loader, opt)
    assert loader.batch_size == 128
    assert needed <= loader.plan.needed <= 1.02 * needed
    # The trial step left no trace.
    np.testing.assert_array_equal(net.parameters.flat, before[0])
    np.testing.assert_array_equal(net.buffers.flat, before[1])
    assert net.dropout_step == before[2]
    assert net.planned == 128
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

        def on_epoch(self, state: gb.TrainingState) -> None:
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


# --- interruptions and bad numbers ---------------------------------------------------------------------------------


def test_ctrl_c_lets_the_step_finish() -> None:
    net, loader, opt = parts()
    whole = parts()

    class Press:
        def on_step(self, state: gb.TrainingState) -> None:
            if state.step == 7:
                os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt, match="interrupted in epoch 0 after step 7; the model holds") as raised:
        gb.fit(net, loader, opt, callbacks=[Press()], progress=False)
    assert isinstance(raised.value, gb.TrainingInterrupted)
    assert len(raised.value.history.step_loss) == opt.t == 7
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    for _, (x, y) in zip(range(7), whole[1], strict=False):
        whole[2].step(whole[0].loss_and_grad(x, y)[1])
    np.testing.assert_array_equal(net.parameters.flat, whole[0].parameters.flat)


def test_ctrl_c_after_the_last_step_is_not_lost() -> None:
    net, loader, opt = parts()
    with pytest.raises(gb.TrainingInterrupted, match="interrupted in epoch 0 after step 12;") as raised:
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


def test_a_loss_that_is_not_finite_ends_it_before_the_step() -> None:
    net, loader, opt = parts()
    opt = gb.SGD(net.parameters, lr=1e30)
    with pytest.raises(gb.NonFiniteError, match=r"loss is .*\(epoch 0, step \d+, learning rate 1e\+30\)"):
        gb.fit(net, loader, opt, progress=False)


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
    "validation": (lambda: other(validation=X), TypeError, r"validation must be a pair \(X, Y\), got ndarray"),
    "validation type": (
        lambda: other(validation=(X.astype("float64"), Y)),
        TypeError,
        r"validation\[0\] must have the loader's source dtype float32",
    ),
    "validation features": (lambda: other(validation=(X[:, :2], Y)), ValueError, r"validation\[0\] must have samples"),
    "callback": (lambda: other(callbacks=[3]), TypeError, "a callback must be callable"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name: str) -> None:
    arguments, kind, message = ERRORS[name]
    with pytest.raises(kind, match=message) as raised:
        gb.fit(**arguments())
    assert isinstance(raised.value, gb.GpubatchError)


# --- what one sees -------------------------------------------------------------------------------------------------


def test_plain_lines_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    gb.fit(*parts(), epochs=2, validation=blobs())
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("epoch 1/2  loss ")
    assert "  validation loss " in lines[1]
    assert " %  " in lines[1]


def test_nothing_without_progress(capsys: pytest.CaptureFixture[str]) -> None:
    gb.fit(*parts(), epochs=1, progress=False)
    assert capsys.readouterr() == ("", "")


def test_the_curve_is_smoothed_as_ewma_does() -> None:
    history = gb.fit(*parts(), epochs=2, progress=False)
    np.testing.assert_allclose(history.smoothed(0.8), gb.ewma(history.step_loss, 0.8))
