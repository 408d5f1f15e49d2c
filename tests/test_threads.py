"""Several threads and processes: none disturbs another, and none is left behind."""

from __future__ import annotations

import contextlib
import copy
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from leftovers import threads

import gpubatch as gb
from gpubatch import sources
from gpubatch.checkpoint import Checkpoints
from gpubatch.nn import core_of

SIZE = 3 * 2**16 + 5  # elements, enough for the compiled library to use threads


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    assert not threads()


def at_once(work: list[Callable[[], Any]]) -> list[Any]:
    """The results of ``work``, all started at the same moment."""
    barrier = threading.Barrier(len(work))

    def begin(one: Callable[[], Any]) -> Any:
        barrier.wait(timeout=300)
        return one()

    with ThreadPoolExecutor(len(work)) as pool:
        return list(pool.map(begin, work))


# --- two threads ---------------------------------------------------------------------------------------------------


def optimizer(make: Callable[..., gb.Optimizer], seed: int) -> bytes:
    rng = np.random.default_rng(seed)
    params = gb.Parameters({"w": (SIZE,), "v": (300, 70)}, "cpu")
    opt = make(params, 0.01)
    for _ in range(8):
        params.grads.flat[...] = rng.standard_normal(params.size, np.float32)
        gb.clip_by_global_norm(params.grads, 100.0)
        opt.step()
    return params.flat.tobytes()


def network(seed: int) -> bytes:
    rng = np.random.default_rng(seed)
    x, y = rng.standard_normal((600, 40), np.float32), rng.integers(0, 10, 600)
    net = gb.mlp([40, 256, 256, 10], batch_norm=True, dropout=0.3, seed=seed, backend="cpu")
    opt = gb.Adam(net.parameters)
    for _ in range(4):
        net.loss_and_grad(x, y)
        opt.step()
    return net.parameters.flat.tobytes() + net.buffers.flat.tobytes() + net.predict(x).tobytes()


def batches(source: Any, seed: int, **options: Any) -> bytes:
    """Two epochs of batches prepared in a thread."""
    loader = gb.Loader(source, batch_size=2048, seed=seed, scale=1 / 255, backend="cpu", **options)
    return b"".join(x.tobytes() for _ in range(2) for x in loader)


def images() -> np.ndarray:
    return np.random.default_rng(5).integers(0, 256, (5000, 784), dtype=np.uint8)


def run(folder: Path, seed: int) -> tuple[Any, ...]:
    """A run with checkpoints written in the background."""
    rng = np.random.default_rng(seed)
    net = gb.mlp([40, 256, 10], batch_norm=True, dropout=0.3, seed=seed, backend="cpu")
    loader = gb.Loader(
        rng.standard_normal((1200, 40), np.float32), rng.integers(0, 10, 1200), 300, seed=seed, backend="cpu"
    )
    store = Checkpoints(folder / str(seed), every=3, background=True)
    history = gb.fit(net, loader, gb.RMSProp(net.parameters), 2, checkpoint=store, progress=False)
    newest = store.newest()
    assert newest is not None
    return history.step_loss, net.parameters.flat.tobytes(), newest[0].name


def twice(one: Callable[[int], Any]) -> None:
    """Two seeds in two threads, compared with each alone."""
    alone = [one(1), one(2)]
    assert alone[0] != alone[1]
    for _ in range(2):
        assert at_once([lambda: one(1), lambda: one(2)]) == alone


@pytest.mark.parametrize("make", [gb.SGD, gb.Momentum, gb.RMSProp, gb.Adam])
def test_two_optimizers_do_not_disturb_each_other(make: Callable[..., gb.Optimizer]) -> None:
    twice(lambda seed: optimizer(make, seed))


def test_optimizers_of_two_rules_do_not_disturb_each_other() -> None:
    rules = [gb.Adam, gb.SGD, gb.Momentum]
    alone = [optimizer(make, 1) for make in rules]
    work: list[Callable[[], bytes]] = [lambda make=make: optimizer(make, 1) for make in rules]  # type: ignore[misc]
    assert at_once(work) == alone


def test_two_networks_do_not_disturb_each_other() -> None:
    twice(network)


def test_two_loaders_of_one_array_do_not_disturb_each_other() -> None:
    x = images()
    twice(lambda seed: batches(x, seed))


def test_two_loaders_of_one_file_do_not_disturb_each_other(tmp_path: Path) -> None:
    x = images()
    np.save(tmp_path / "x.npy", x)
    twice(lambda seed: batches(sources.npy(tmp_path / "x.npy"), seed, window=2000))
    assert batches(sources.npy(tmp_path / "x.npy"), 1) == batches(x, 1)


def test_two_runs_do_not_disturb_each_other(tmp_path: Path) -> None:
    trials = iter(range(100))
    twice(lambda seed: run(tmp_path / str(next(trials)), seed)[:2])


def test_one_optimizer_may_move_from_thread_to_thread() -> None:
    def steps(hop: bool) -> bytes:
        params = gb.Parameters({"w": (SIZE,)}, "cpu")
        opt, rng = gb.Adam(params), np.random.default_rng(0)
        for _ in range(4):
            params.grads.flat[...] = rng.standard_normal(SIZE, np.float32)
            if hop:
                at_once([opt.step])
            else:
                opt.step()
        return params.flat.tobytes()

    assert steps(hop=True) == steps(hop=False)


# --- processes -----------------------------------------------------------------------------------------------------

FORK = """
import os, signal, numpy as np, gpubatch as gb

def use():
    w = np.zeros(10**6)
    opt = gb.Adam([w], 1.0)
    opt.step([np.ones(10**6)])
    X, y = np.arange(4000 * 784).reshape(4000, 784) % 251, np.arange(4000) % 10
    loader = gb.Loader(X.astype("u1"), y, batch_size=2000, backend="cpu")
    net = gb.mlp([784, 128, 10], backend="cpu")
    net_opt, losses = gb.Adam(net.parameters), []
    for x, labels in loader:
        losses.append(float(net.loss_and_grad(x, labels)[0]))
        net_opt.step()
    assert len(losses) == 2
    return w.tobytes(), losses, net.parameters.flat.tobytes()

def fork(expected):
    child = os.fork()
    if child == 0:
        try:
            signal.alarm(40)
            found = use()
            os._exit(0 if expected is None or found == expected else 3)
        finally:
            os._exit(4)
    return child

def end(child):
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""


def in_a_process(code: str) -> None:
    # Python warns of every fork while other threads run, even threads of NumPy's BLAS.
    subprocess.run([sys.executable, "-W", "ignore", "-c", FORK + code], check=True, timeout=120)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
@pytest.mark.parametrize(
    "code",
    [
        "end(fork(None))",
        "expected = use(); end(fork(expected)); assert use() == expected",
        "expected = use(); two = [fork(expected), fork(expected)]; assert use() == expected; [*map(end, two)]",
    ],
    ids=["after import", "after use", "in use"],
)
def test_a_forked_child_works_as_its_parent_does(code: str) -> None:
    in_a_process(code)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_a_forked_child_begins_an_iteration_of_its_own() -> None:
    """It cannot continue its parent's, because the thread that prepares the batches does not exist there."""
    in_a_process(
        "loader = gb.Loader(np.zeros((6000, 600), np.uint8), batch_size=2000, backend='cpu')\n"
        "iteration = iter(loader)\n"
        "next(iteration)\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    signal.alarm(40)\n"
        "    try:\n"
        "        next(iteration)\n"
        "    except gb.ArgumentError as error:\n"
        "        assert 'belongs to the process that began it' in str(error)\n"
        "        assert len(list(loader)) == 3\n"
        "        os._exit(0)\n"
        "    os._exit(3)\n"
        "end(child)\n"
        "assert len(list(iteration)) == 2"
    )


# --- iterations ----------------------------------------------------------------------------------------------------


def large(**options: Any) -> gb.Loader:
    """Three batches per epoch, prepared in a thread."""
    return gb.Loader(np.zeros((6000, 600), np.uint8), batch_size=2000, backend="cpu", **options)


def test_a_closed_iteration_gives_nothing_more() -> None:
    loader = large()
    iteration = iter(loader)
    next(iteration)
    assert len(threads()) == 1
    iteration.close()
    assert not threads()
    assert list(iteration) == []
    assert (loader.epoch, loader.state_dict()["batch"]) == (1, 1)
    assert len(list(loader)) == 3  # a new epoch, from its beginning
    assert list(iteration) == []
    assert loader.epoch == 2


def test_an_iteration_that_a_newer_one_ended_is_refused() -> None:
    loader = large()
    old, new = iter(loader), iter(loader)
    next(old)
    next(new)
    with pytest.raises(gb.ArgumentError, match="ended by a newer one"):
        next(old)
    assert list(old) == []
    assert len(list(new)) == 2
    assert not threads()


def test_an_iteration_is_not_entered_twice() -> None:
    entered: list[type[BaseException]] = []

    def transform(x: Any) -> Any:
        try:
            next(iteration)
        except Exception as error:
            entered.append(type(error))
        return x

    loader = gb.Loader(np.zeros((4, 2)), batch_size=2, backend="cpu", transform=transform)
    iteration = iter(loader)
    assert len(list(iteration)) == 2
    assert entered == [ValueError] * 2  # Python's "generator already executing"


# --- nothing is left behind ----------------------------------------------------------------------------------------


class Broken:
    """A source of which some samples cannot be read."""

    def __len__(self) -> int:
        return 100

    def read(self, indices: np.ndarray, /) -> np.ndarray:
        if (indices > 50).any():
            raise OSError("unreadable sector")
        return np.ones((len(indices), 3), np.float32)


def broken_transform(x: Any) -> Any:
    raise ZeroDivisionError


def in_the_loop() -> None:
    for _ in large():
        assert len(threads()) == 1
        raise ZeroDivisionError


def in_a_transform() -> None:
    list(large(transform=broken_transform))


def in_a_source() -> None:
    list(gb.Loader(Broken(), batch_size=10, backend="cpu", shuffle=False))


def in_a_callback() -> None:
    net = gb.mlp([600, 3], backend="cpu")

    def callback(state: Any) -> None:
        raise ZeroDivisionError

    loader = gb.Loader(np.zeros((6000, 600), np.uint8), np.zeros(6000, int), batch_size=2000, backend="cpu")
    gb.fit(net, loader, gb.SGD(net.parameters, 0.1), 1, callbacks=[callback], progress=False)


@pytest.mark.parametrize("where", [in_the_loop, in_a_transform, in_a_source, in_a_callback])
def test_no_thread_is_left_after_an_exception(where: Callable[[], None]) -> None:
    with pytest.raises((ZeroDivisionError, OSError)):
        where()
    assert not threads()


def test_no_thread_is_left_after_an_exception_that_is_kept() -> None:
    """A traceback keeps its frames alive."""
    kept: list[BaseException] = []
    for where in (in_the_loop, in_a_transform, in_a_source):
        try:
            where()
        except (ZeroDivisionError, OSError) as error:
            kept.append(error)
    assert len(kept) == 3
    assert not threads()


def test_no_writer_is_left_after_an_exception(tmp_path: Path) -> None:
    net = gb.mlp([40, 10], backend="cpu")
    loader = gb.Loader(np.zeros((100, 40), np.float32), np.zeros(100, int), batch_size=10, backend="cpu")
    store = Checkpoints(tmp_path / "run", every=1, background=True)

    def callback(state: Any) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        gb.fit(net, loader, gb.SGD(net.parameters, 0.1), 3, callbacks=[callback], checkpoint=store, progress=False)
    assert not threads()
    assert store.newest() is not None


def test_a_process_ends_with_an_iteration_left_open() -> None:
    code = (
        "import numpy as np, gpubatch as gb\n"
        "loader = gb.Loader(np.zeros((6000, 600), np.uint8), batch_size=2000, backend='cpu')\n"
        "iteration = iter(loader)\n"
        "next(iteration)\n"
        "print('there')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    assert (done.stdout, done.stderr) == ("there\n", "")


def test_an_exception_in_one_thread_leaves_the_other_alone() -> None:
    alone = network(1)

    def fails() -> None:
        for _ in range(3):
            with contextlib.suppress(ZeroDivisionError):
                in_the_loop()

    assert at_once([lambda: network(1), fails])[0] == alone


# --- one network -----------------------------------------------------------------------------------------------------


def served(backend: str = "cpu") -> tuple[gb.Network, np.ndarray, np.ndarray]:
    net = gb.mlp([50, 256, 10], batch_norm=True, dropout=0.3, backend=backend, l2=0.01, seed=1)
    draw = np.random.default_rng(3)
    return net, draw.standard_normal((300, 50), np.float32), draw.integers(0, 10, 300)


@pytest.mark.parametrize("method", ["scores", "predict", "evaluate", "loss", "accuracy"])
def test_threads_evaluate_one_network(method: str) -> None:
    """Batches of several sizes, each with its own right result."""
    net, X, Y = served()
    parts = [slice(0, 300), slice(10, 160), slice(200, 207)]

    def result(part: slice) -> Any:
        found = getattr(net, method)(X[part], *(() if method in ("scores", "predict") else (Y[part],)))
        return found.tobytes() if isinstance(found, np.ndarray) else found

    right = [result(part) for part in parts]
    assert at_once([lambda part=part: [result(part) for _ in range(30)] for part in parts]) == [  # type: ignore[misc]
        [one] * 30 for one in right
    ]


def test_the_workspace_of_a_thread_ends_with_it_or_is_released() -> None:
    net, X, _ = served()
    found: list[Any] = []

    def evaluate() -> None:
        net.scores(X)
        found.append(weakref.ref(core_of(net)._evaluation.workspace))

    thread = threading.Thread(target=evaluate)
    thread.start()
    thread.join()
    assert found[0]() is None
    evaluate()
    evaluate()
    assert found[1]() is found[2]() is not None
    core_of(net).release()
    assert found[1]() is None


def test_only_one_thread_trains() -> None:
    """While a thread is in ``fit``, others can neither train nor evaluate; a copy made between two steps can be."""
    net, X, Y = served()
    copied, told = net, list[str]()

    def use(action: Callable[[], Any]) -> None:
        try:
            action()
        except gb.InUseError as error:
            told.append(str(error))

    def on_epoch(state: gb.TrainingState) -> None:
        nonlocal copied
        copied = copy.deepcopy(net)
        right = copied.scores(X)  # by the thread that trains, as is net.scores
        assert (net.scores(X) == right).all()
        actions: list[Callable[[], Any]] = [
            *(lambda: net.scores(X), lambda: net.evaluate(X, Y), lambda: net.predict(X)),
            *(lambda: net.loss_and_grad(X, Y), lambda: net.step_loss(X, Y), lambda: net.loss(X, Y, training=True)),
            lambda: gb.fit(net, state.loader, state.opt, 5, progress=False),
        ]
        for action in actions:
            thread = threading.Thread(target=use, args=(action,))
            thread.start()
            thread.join()
        thread = threading.Thread(target=lambda: told.append(str((copied.scores(X) == right).all())))
        thread.start()
        thread.join()

    loader, opt = gb.Loader(X, Y, batch_size=50, backend="cpu"), gb.Adam(net.parameters)
    gb.fit(net, loader, opt, 1, callbacks=[on_epoch], progress=False)
    assert [text[:35] for text in told] == ["another thread trains this network,"] * 3 + [
        "another thread trains this network:"
    ] * 4 + ["True"]
    use(lambda: net.scores(X))  # the run is over
    use(lambda: net.loss_and_grad(X, Y))
    assert len(told) == 8


def test_an_error_in_a_step_lets_another_thread_train() -> None:
    net, X, Y = served()
    X[0] = np.nan
    with pytest.raises(gb.NonFiniteError):
        net.loss_and_grad(X, Y)
    assert len(at_once([lambda: net.loss_and_grad(X[1:], Y[1:])])) == 1
