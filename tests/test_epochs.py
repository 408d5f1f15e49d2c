"""Epochs: schedules by epoch follow the passes over loaders, in ``fit`` and in every loop of one's own.

Expected learning rates are written out, or are the schedule's at the number that the loop has.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import queue
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from needs import missing

import gpubatch as gb
from gpubatch.passes import GIVEN, HERE, DataPass, Deal, deal_of

SCHEDULES: dict[str, gb.schedules.Schedule] = {
    "inverse time": gb.InverseTimeDecay(0.1, 0.5),
    "exponential": gb.ExponentialDecay(0.1, rate=0.5),
    "sqrt": gb.SqrtDecay(0.1),
    "step": gb.StepDecay(0.1, every=2),
    "piecewise": gb.Piecewise([1, 3], [0.1, 0.2, 0.3]),
    "cosine": gb.CosineDecay(0.1, total=4, per="epoch"),
    "own": lambda step, epoch: 0.1 / (1 + epoch),
}
HALVES = gb.ExponentialDecay(0.1, rate=0.5)


def test_every_kind_of_schedule_is_tried() -> None:
    assert {type(s) for s in SCHEDULES.values()} >= {
        gb.InverseTimeDecay,
        gb.ExponentialDecay,
        gb.SqrtDecay,
        gb.StepDecay,
        gb.Piecewise,
        gb.CosineDecay,
    }


class Setup:
    """A small network, its optimizer and the learning rates of its steps; ``loader`` makes loaders of one set."""

    def __init__(self, backend: gb.Backend | str = "cpu", schedule: Any = HALVES, samples: int = 12) -> None:
        self.backend = backend
        draw = np.random.default_rng(0)
        self.X, self.Y = draw.normal(size=(samples, 3)).astype("f4"), draw.integers(0, 2, samples)
        self.net = gb.mlp([3, 4, 2], backend=self.backend)
        self.opt = gb.SGD(self.net.parameters, lr=schedule)
        self.seen: list[float | None] = []

    def loader(self, batch_size: int = 4, **options: Any) -> gb.Loader:
        return gb.Loader(self.X, self.Y, batch_size=batch_size, backend=self.backend, **options)

    def step(self, x: Any, y: Any) -> None:
        self.net.loss_and_grad(x, y)
        announced = self.opt.lr
        self.seen.append(self.opt.step().lr)
        assert announced == self.seen[-1]  # opt.lr is that of the next step

    def epoch(self, loader: gb.Loader) -> None:
        for x, y in loader:
            self.step(x, y)

    @property
    def halvings(self) -> list[int]:
        """How often the rate of each step was halved: with HALVES that is its epoch."""
        return [round(np.log2(0.1 / lr)) for lr in self.seen]  # type: ignore[operator]


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
def test_a_loop_of_ones_own_follows_each_schedule(backend: gb.Backend, schedule: gb.schedules.Schedule) -> None:
    a, rates = Setup(backend, schedule), []
    loader = a.loader()
    for _ in range(5):
        a.epoch(loader)
        rates.append(a.opt.lr)
    expected = [schedule(0, epoch) for epoch in range(5)]
    assert a.seen == [lr for lr in expected for _ in range(3)]
    assert rates == expected  # after an epoch: its own, until the next one begins


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
def test_fit_follows_each_schedule(backend: gb.Backend, schedule: gb.schedules.Schedule) -> None:
    a = Setup(backend, schedule)
    expected = [schedule(step, step // 3) for step in range(15)]
    with contextlib.nullcontext() if expected[-1] else pytest.warns(gb.errors.IdleWarning, match="in the last 3"):
        history = gb.fit(a.net, a.loader(), a.opt, 5, progress=False)
    assert history.step_lr == expected


def test_a_loader_for_each_chunk_of_the_data(backend: gb.Backend) -> None:
    """Epochs go on counting, by hand and in fit, also where a chunk is one batch."""
    a, rates = Setup(backend), list[float]()
    for chunk in range(6):
        loader = a.loader(batch_size=12 if chunk % 3 == 1 else 4, seed=chunk)
        if chunk % 2:
            a.epoch(loader)
        else:
            gb.fit(a.net, loader, a.opt, 1, progress=False)
        rates.append(a.opt.lr)
    assert rates == [0.1 * 0.5**chunk for chunk in range(6)]


def test_a_used_loader_and_a_new_optimizer_begin_with_the_first_epoch(backend: gb.Backend) -> None:
    a, b = Setup(backend), Setup(backend)
    loader = a.loader()
    a.epoch(loader)
    a.epoch(loader)
    b.epoch(loader)
    c = Setup(backend)
    history = gb.fit(c.net, loader, c.opt, 1, progress=False)
    assert b.halvings == [0, 0, 0]
    assert history.step_lr == [0.1] * 3


def test_a_pass_that_was_left_is_an_epoch(backend: gb.Backend) -> None:
    a = Setup(backend)
    loader = a.loader()
    for batches in (1, 2, 3, 1):
        for number, (x, y) in enumerate(loader, 1):
            a.step(x, y)
            if number == batches:
                break
    assert a.halvings == [0, 1, 1, 2, 2, 2, 3]


def test_a_pass_that_is_gone_on_with_is_the_same_epoch(backend: gb.Backend) -> None:
    """By the same loader and by another, which had its state loaded."""
    a = Setup(backend)
    loader = a.loader()
    a.epoch(loader)
    x, y = next(iter(loader))
    a.step(x, y)
    state = loader.state_dict()
    loader.load_state_dict(state)
    x, y = next(iter(loader))
    a.step(x, y)
    other = a.loader()
    other.load_state_dict(loader.state_dict())
    a.epoch(other)
    a.epoch(other)
    assert a.halvings == [0, 0, 0, 1, 1, 1, 2, 2, 2]


@pytest.mark.parametrize("steps", [0, 1, 3, 4, 6, 7])
def test_a_run_by_hand_is_resumed_with_its_epoch(backend: gb.Backend, steps: int) -> None:
    """Both states are saved after a number of steps, and loaded into new objects."""

    def made(a: Setup, loader: gb.Loader, steps: int) -> None:
        while steps:
            for x, y in loader:
                a.step(x, y)
                steps -= 1
                if not steps:
                    break

    whole = Setup(backend)
    made(whole, whole.loader(), 9)
    a, loader = Setup(backend), whole.loader()
    made(a, loader, steps)
    b, again = Setup(backend), whole.loader()
    b.opt.load_state_dict(a.opt.state_dict())
    again.load_state_dict(loader.state_dict())
    assert b.opt.epoch == a.opt.epoch
    made(b, again, 9 - steps)
    assert a.seen + b.seen == whole.seen


def test_a_state_of_one_batch_goes_on_to_the_next_chunk() -> None:
    a, b = Setup(), Setup()
    a.epoch(a.loader(batch_size=12))
    b.opt.load_state_dict(a.opt.state_dict())
    b.epoch(b.loader(batch_size=12))
    assert b.halvings == [1]


def test_steps_that_are_undone_within_a_pass(backend: gb.Backend) -> None:
    a = Setup(backend)
    loader = a.loader()
    a.epoch(loader)
    for number, (x, y) in enumerate(loader):
        if number == 1:
            before = a.opt.state_dict()
        a.step(x, y)
        if number == 1:
            a.opt.load_state_dict(before)
    assert a.halvings == [0] * 3 + [1] * 3


def test_states_of_version_0_1_are_gone_on_with() -> None:
    """They have no "pass": the number of the loader's epoch was the optimizer's."""
    a, b = Setup(), Setup()
    loader = a.loader()
    a.epoch(loader)
    a.epoch(loader)
    old = {name: value for name, value in a.opt.state_dict().items() if name != "pass"}
    b.opt.load_state_dict(old)
    b.epoch(loader)
    assert b.halvings == [2, 2, 2]


def test_two_networks_and_one_loader(backend: gb.Backend) -> None:
    a, b = Setup(backend), Setup(backend)
    loader = a.loader()
    for epoch in range(3):
        for x, y in loader:
            a.net.loss_and_grad(x, y)
            b.net.loss_and_grad(x, y)
            for setup in (b, a):
                setup.seen.append(setup.opt.step().lr)
        assert (a.opt.epoch, b.opt.epoch) == (epoch, epoch)
    assert a.halvings == b.halvings == [0] * 3 + [1] * 3 + [2] * 3


def cycle(loader: gb.Loader) -> Iterator[Any]:
    while True:
        yield from loader


class Validation:
    """Evaluates on a loader of its own: whole passes, the first batch of one, or always the next batch."""

    def __init__(self, a: Setup) -> None:
        self.net, self.loader = a.net, a.loader(batch_size=6)
        self.held = cycle(a.loader(batch_size=6))

    def whole(self) -> None:
        for x, y in self.loader:
            self.net.evaluate(x, y)

    def first(self) -> None:
        self.net.evaluate(*next(iter(self.loader)))

    def following(self) -> None:
        self.net.evaluate(*next(self.held))


@pytest.mark.parametrize("how", ["whole", "first", "following"])
@pytest.mark.parametrize("place", ["before", "between", "after"])
def test_evaluation_does_not_count(backend: gb.Backend, how: str, place: str) -> None:
    a = Setup(backend)
    loader, evaluate = a.loader(), getattr(Validation(a), how)
    for _ in range(3):
        for x, y in loader:
            if place == "before":
                evaluate()
            a.net.loss_and_grad(x, y)
            if place == "between":
                evaluate()
            a.seen.append(a.opt.step().lr)
        if place == "after":
            evaluate()
    assert a.halvings == [0] * 3 + [1] * 3 + [2] * 3


@pytest.mark.parametrize("changed", ["x", "y", "x and y"])
def test_batches_that_are_changed_before_the_step(backend: gb.Backend, changed: str) -> None:
    a = Setup(backend)
    loader = a.loader()
    for _ in range(2):
        for x, y in loader:
            a.step(x * 2 if "x" in changed else x, 1 - y if "y" in changed else y)
    assert a.halvings == [0, 0, 0, 1, 1, 1]


def test_batches_in_parts_and_gradients_added_up(backend: gb.Backend) -> None:
    a, b, c = Setup(backend), Setup(backend), Setup(backend)
    loader = a.loader()
    for _ in range(3):
        for x, y in loader:
            a.net.loss_and_grad(x, y, micro_batch_size=2)
            a.seen.append(a.opt.step().lr)
            for part in (slice(0, 2), slice(2, None)):
                b.net.loss_and_grad(x[part], y[part])
            b.seen.append(b.opt.step().lr)
            c.net.step_loss(x, y)
        c.seen.append(c.opt.step().lr)  # one step an epoch, when its loop is over
    assert a.halvings == b.halvings == [0] * 3 + [1] * 3 + [2] * 3
    assert c.halvings == [0, 1, 2]


@pytest.mark.parametrize("first", ["long", "short"])
def test_two_loaders_in_turn(first: str) -> None:
    """As in training with and without labels: the pass that was there first counts."""
    a = Setup()
    long, short = a.loader(batch_size=2), a.loader(batch_size=6)
    for _ in range(3):
        if first == "long":
            others = cycle(short)
            for x, y in long:
                a.step(x, y)
                a.step(*next(others))
        else:
            for batches in zip(short, long, strict=False):
                for x, y in batches:
                    a.step(x, y)
    steps = 12 if first == "long" else 4
    assert a.halvings == [0] * steps + [1] * steps + [2] * steps


def test_a_loader_that_was_left_but_is_held_open() -> None:
    """As a notebook does by the traceback of a KeyboardInterrupt. The first pass of the next loader replaces it."""
    a = Setup()
    held = iter(a.loader())
    a.step(*next(held))
    loader = a.loader()
    for _ in range(3):
        a.epoch(loader)
    assert a.halvings == [0] * 4 + [1] * 3 + [2] * 3
    gb.fit(a.net, a.loader(), a.opt, 1, progress=False)
    assert a.opt.epoch == 3


def test_optimizers_over_arrays_follow_the_loop_they_are_in() -> None:
    a, w = Setup(), np.zeros(3, "f4")
    opt, inner = gb.SGD([w], HALVES), gb.SGD([np.zeros(3, "f4")], HALVES)
    for _ in range(2):
        for x, _ in a.loader():
            for x2, _ in a.loader(batch_size=6):
                inner.step([x2[0]])
            a.seen.append(opt.step([x[0]]).lr)
    assert a.halvings == [0] * 3 + [1] * 3
    assert inner.epoch == 5
    params = gb.Parameters({"w": 3}, backend="cpu")
    opt = gb.SGD(params, HALVES)
    for _ in range(3):
        for x in gb.Loader(a.X, batch_size=4, backend="cpu"):  # no Y
            params.grads["w"] = x[0]
            opt.step()
    assert opt.epoch == 2


def test_an_assigned_epoch_counts(backend: gb.Backend) -> None:
    """In every epoch, at its begin or end; once, before a pass or within; and before fit."""
    a, b, c, d = (Setup(backend) for _ in range(4))
    loader = a.loader()
    for epoch in (4, 2, 7):
        a.opt.epoch = epoch
        a.epoch(loader)
        b.epoch(loader)
        b.opt.epoch += 1
    assert a.halvings == [4] * 3 + [2] * 3 + [7] * 3
    assert b.halvings == [0] * 3 + [1] * 3 + [2] * 3
    c.opt.epoch = 3
    c.epoch(loader)
    for number, (x, y) in enumerate(loader):
        if number == 1:
            c.opt.epoch = 6
        c.step(x, y)
    c.epoch(loader)
    assert c.halvings == [3] * 3 + [4, 6, 6] + [7] * 3
    d.opt.epoch = 5
    assert d.opt.lr == 0.1 * 0.5**5
    history = gb.fit(d.net, d.loader(), d.opt, 2, progress=False)
    assert history.step_lr == [0.1 * 0.5**5] * 3 + [0.1 * 0.5**6] * 3
    with pytest.raises(gb.DTypeError, match="epoch must be an integer"):
        d.opt.epoch = 1.5  # type: ignore[assignment]
    with pytest.raises(gb.ArgumentError, match="epoch must be an integer >= 0"):
        d.opt.epoch = -1


def test_a_schedule_by_epoch_that_stands_still_is_told_once() -> None:
    a = Setup()
    for _ in range(100):
        a.step(a.X, a.Y)
    with pytest.warns(gb.EpochWarning, match="lr is a schedule by epoch, and the last 100 steps are all of epoch 0"):
        a.step(a.X, a.Y)
    for _ in range(200):
        a.step(a.X, a.Y)


def test_nothing_is_told_where_epochs_are_counted_or_do_not_matter() -> None:
    long, assigned, by_step, fitted = (Setup(samples=250) for _ in range(4))
    long.epoch(long.loader(batch_size=1))  # 250 steps in one epoch
    gb.fit(fitted.net, fitted.loader(batch_size=1), fitted.opt, 1, progress=False)
    by_step.opt.lr = gb.ExponentialDecay(0.1, 0.99, per="step")
    for i in range(210):
        if i % 105 == 0:
            assigned.opt.epoch = i // 105
        assigned.step(assigned.X, assigned.Y)
        by_step.net.loss_and_grad(by_step.X, by_step.Y)
        by_step.opt.step()


def test_threads_count_their_own_passes() -> None:
    setups, ready = [Setup() for _ in range(4)], threading.Barrier(4)

    def train(a: Setup, epochs: int) -> None:
        w = gb.SGD([np.zeros(3, "f4")], HALVES)
        ready.wait()
        loader = a.loader()
        for _ in range(epochs):
            for x, y in loader:
                a.step(x, y)
                w.step([x[0]])
        assert w.epoch == epochs - 1

    threads = [threading.Thread(target=train, args=(a, i + 2)) for i, a in enumerate(setups)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [a.halvings for a in setups] == [[e for e in range(i + 2) for _ in range(3)] for i in range(4)]


def test_no_pass_stays_under_way() -> None:
    a = Setup()
    loader = a.loader()
    a.epoch(loader)
    a.step(*next(iter(loader)))
    copy.copy(loader).load_state_dict(loader.state_dict())
    gb.fit(a.net, loader, a.opt, 1, progress=False)
    gc.collect()
    assert HERE.running == []


def test_batches_that_were_kept_are_of_their_pass() -> None:
    """Lists of batches, the first batch alone, and batches that another thread takes from the loader."""
    a = Setup()
    loader = a.loader()
    for _ in range(2):
        for x, y in reversed(list(loader)):
            a.step(x, y)
        a.step(*next(iter(loader)))
    taken: queue.Queue[Any] = queue.Queue()
    thread = threading.Thread(target=lambda: [taken.put(batch) for _ in range(2) for batch in loader])
    thread.start()
    thread.join()
    for _ in range(6):
        a.step(*taken.get())
    assert a.halvings == [0] * 3 + [1] + [2] * 3 + [3] + [4] * 3 + [5] * 3


def test_batches_that_nobody_holds_are_forgotten() -> None:
    a = Setup(samples=1000)
    for _ in range(3):
        a.epoch(a.loader(batch_size=1))
    assert len(GIVEN) < 600


def test_copies_of_a_loader_have_passes_of_their_own() -> None:
    a = Setup()
    loader = a.loader()
    for twin in (loader, copy.copy(loader), copy.copy(loader)):
        a.epoch(twin)
    assert a.halvings == [0] * 3 + [1] * 3 + [2] * 3


def gpu() -> gb.Backend:
    if "cuda:0" not in gb.available_backends():
        missing("gpu", "no CUDA device can be used here")
    return gb.get_backend("cuda:0")


# --- schedules through checkpoints, and in graphs ---------------------------------------------------------------------

WAYS: dict[str, gb.schedules.Schedule] = {
    "linear": gb.LinearDecay(0.1, total=4, warmup=1, first=0.01, start=2, final=0.02),
    "polynomial": gb.PolynomialDecay(0.1, total=12, power=2, per="step"),
    "cosine": gb.CosineDecay(0.1, total=4, warmup=2, first=0.0, final=0.01, per="epoch"),
    "restarts": gb.CosineRestarts(0.1, length=2, factor=2, shrink=0.5, per="step"),
    "cyclic": gb.Cyclic(0.01, 0.1, up=2, down=3, mode="triangular2", per="step"),
    "one cycle": gb.OneCycle(0.1, total=12, per="step"),
    "chain": gb.chain([gb.LinearDecay(0.01, 4, final=0.1, per="step"), gb.StepDecay(0.1, every=2)], [4], per="step"),
    "chain in a product": gb.product(gb.chain([0.1, gb.ExponentialDecay(0.1)], [1]), gb.SqrtDecay(1.0, per="step")),
}


def bits(a: Setup) -> bytes:
    return bytes(a.net.backend.to_numpy(a.net.parameters.flat).tobytes())


@pytest.mark.parametrize("schedule", WAYS.values(), ids=WAYS.keys())
def test_a_run_with_it_is_resumed_in_the_middle(schedule: gb.schedules.Schedule, tmp_path: Path) -> None:
    """Stopped after step 7 of 12, and gone on with after step 5, in the second epoch, by new objects: the same bits."""

    class Stop:
        def on_step(self, state: gb.TrainingState) -> None:
            if state.step == 7:
                raise KeyboardInterrupt

    whole, a, b = (Setup(schedule=schedule) for _ in range(3))
    rates = gb.fit(whole.net, whole.loader(), whole.opt, 4, progress=False).step_lr
    assert rates == [schedule(step, step // 3) for step in range(12)]
    store = gb.Checkpoints(tmp_path, every=5)
    with pytest.raises(KeyboardInterrupt):
        gb.fit(a.net, a.loader(), a.opt, 4, callbacks=[Stop()], checkpoint=store, progress=False)
    history = gb.fit(b.net, b.loader(), b.opt, 4, checkpoint=tmp_path, resume=True, progress=False)
    assert history.step_lr == rates
    assert bits(b) == bits(whole)
    assert b.opt.hyper["lr"] == schedule


def test_a_longer_schedule_that_is_given_with_a_resumed_run_is_used(tmp_path: Path) -> None:
    a, b = Setup(schedule=gb.LinearDecay(0.1, total=2)), Setup(schedule=gb.LinearDecay(0.1, total=4))
    gb.fit(a.net, a.loader(), a.opt, 2, checkpoint=tmp_path, progress=False)
    with pytest.warns(gb.ResumeWarning, match=r"lr: LinearDecay\(.*total=2.*\) before, LinearDecay\(.*total=4.*\) now"):
        history = gb.fit(b.net, b.loader(), b.opt, 4, checkpoint=tmp_path, resume=True, progress=False)
    assert history.step_lr[6:] == [0.05] * 3 + [0.1 * (1 - 3 / 4)] * 3


@pytest.mark.gpu
@pytest.mark.parametrize("schedule", WAYS.values(), ids=WAYS.keys())
def test_captured_steps_with_it_are_the_eager_ones(schedule: gb.schedules.Schedule) -> None:
    runs = {}
    for execution in ("captured", "eager"):
        a = Setup(gpu(), schedule=schedule)
        rates = gb.fit(a.net, a.loader(), a.opt, 4, progress=False, execution=execution).step_lr
        runs[execution] = rates, bits(a)
    assert runs["captured"] == runs["eager"]
    assert runs["eager"][0] == [schedule(step, step // 3) for step in range(12)]


# --- captured steps ---------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("feed", ["device", "host"])
def test_captured_epochs_are_those_of_eager_ones(feed: str) -> None:
    runs = {}
    for execution in ("captured", "eager"):
        a = Setup(gpu())
        for chunk in range(2):
            loader = a.loader(feed=feed, seed=chunk)
            a.seen += gb.fit(a.net, loader, a.opt, 2, progress=False, execution=execution).step_lr
        a.epoch(a.loader())
        runs[execution] = a.halvings, a.net.parameters.flat.get().tobytes()
    assert runs["captured"] == runs["eager"]
    assert runs["eager"][0] == [epoch for epoch in range(5) for _ in range(3)]


@pytest.mark.gpu
def test_a_captured_step_in_a_loop_follows_the_loader() -> None:
    a, b, rates = Setup(gpu()), Setup(gpu()), list[float]()
    loader, X, Y = a.loader(), gpu().zeros((4, 3), "f4"), gpu().zeros(4, "i8")
    step = gb.CapturedStep(b.net, b.opt, X, Y)
    for _ in range(3):
        for x, y in loader:
            a.step(x, y)
            X[...], Y[...] = x, y
            step()
            rates.append(b.opt.lr)
    assert rates == a.seen
    assert a.net.parameters.flat.get().tobytes() == b.net.parameters.flat.get().tobytes()


@pytest.mark.parametrize(("rows", "shards"), [(128, 8), (21, 8), (3, 8), (0, 4), (7, 1), (5, 6)])
def test_a_batch_is_dealt_in_neighbouring_parts(rows: int, shards: int) -> None:
    """Any number of ranks has the same parts, and each rank's rows follow those of the rank before."""
    whole = Deal.of(rows, shards)
    assert whole.parts == tuple(len(part) for part in np.array_split(np.arange(rows), shards))
    for size in (size for size in range(1, shards + 1) if shards % size == 0):
        deals = [Deal.of(rows, shards, rank, size) for rank in range(size)]
        assert sum((deal.parts for deal in deals), ()) == whole.parts
        ends = np.cumsum([sum(deal.parts) for deal in deals])
        assert [deal.first for deal in deals] == [0, *ends[:-1]]
        assert {(deal.rows, deal.shards) for deal in deals} == {(rows, shards)}


def test_a_batch_is_known_by_its_deal_and_so_is_one_made_of_it() -> None:
    passed, deal, x = DataPass(object(), 0), Deal.of(9, 4, 1, 2), np.zeros((4, 2), np.float32)
    assert deal_of(x) is None
    passed.begin()
    passed.give_out((x, x[:, 0]), deal)
    assert deal_of(x) == deal_of(x + 1) == deal
    assert deal_of(x[:3]) is None
    passed.end()
    assert deal_of(x) == deal
    assert deal_of(x + 1) is None
