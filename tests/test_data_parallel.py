"""Data parallel: a step on the parts of a batch has the same bits on any number of ranks, and on none.

Digests are of parameters, buffers, the optimizer's state and losses after a few steps. The numbers themselves are held
against the same network on whole batches, which has no parts, and batch norm against closed forms in NumPy.
"""

from __future__ import annotations

import ast
import hashlib
import math
import tracemalloc
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np
import pytest
from allocations import refusing
from families import drawn, every
from hypothesis import strategies as st
from many_ranks import mpi, neighbours, on_threads
from needs import missing, peer

import gpubatch as gb
from gpubatch.nn import core_of, dealt_of
from gpubatch.nn.parts import Tree
from gpubatch.passes import DataPass, Deal
from gpubatch.train.checks import why_eager

SHARDS = 4


@dataclass(frozen=True)
class Case:
    """What is trained, on which batches, and how."""

    network: dict[str, Any] = field(default_factory=dict)
    rows: tuple[int, ...] = (64, 64, 64)  # of the batches
    weighted: bool = False
    micro_batch_size: int | None = None
    max_norm: float | None = None
    bad: int | None = None  # a batch whose loss is not finite, in one row
    dtype: str = "float32"

    def make(self, device: str = "cpu") -> tuple[gb.Network, gb.Optimizer]:
        options = {"backend": device, "seed": 3, "dtype": self.dtype, **self.network}
        net = gb.mlp([10, 16, 8, 3], **options)
        return net, gb.Adam(net.parameters, 0.01, master_weights=options.get("precision") == "mixed")

    def data(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray | None]]:
        draw = np.random.default_rng(5)
        dtype = "float16" if "precision" in self.network else self.dtype
        for i, rows in enumerate(self.rows):
            x, y = draw.normal(2, 3, (rows, 10)).astype(dtype), draw.integers(0, 3, rows)
            weight = draw.random(rows).astype(np.float32) if self.weighted else None
            if weight is not None:
                weight[: rows // 2] = 0  # the first parts count nothing
            if i == self.bad:
                x[rows // 3, 2] = math.nan
            yield x, y, weight


IGNORING = gb.SoftmaxCrossEntropy(ignore_label=1)
CASES = {
    "plain": Case(),
    "dropout, l2, uneven": Case({"dropout": 0.3, "l2": 0.01}, (64, 63, 5, 3)),
    "batch norm": Case({"batch_norm": True}, (64, 37)),
    "batch norm, micro-batches": Case({"batch_norm": True, "dropout": 0.2}, micro_batch_size=5),
    "micro-batches": Case({"dropout": 0.3}, (64, 50), micro_batch_size=7),
    "clipped": Case(max_norm=0.05),
    "a skipped step": Case({"batch_norm": True, "dropout": 0.3}, bad=1),
    "weights": Case({"l2": 0.01, "dropout": 0.3}, (64, 37), weighted=True),
    "weights, micro-batches": Case(rows=(64, 37), weighted=True, micro_batch_size=4),
    "ignored labels": Case({"loss": IGNORING}, (64, 2)),
    "float64": Case({"batch_norm": True}, dtype="float64"),
    "mixed": Case({"precision": "mixed", "l2": 0.01}, (64, 37)),
}
FAST = ["dropout, l2, uneven", "batch norm, micro-batches", "a skipped step", "weights"]
every_case = every("case", CASES, FAST)


def dealt(batch: Any, shards: int, ranks: gb.Ranks | None, passed: DataPass) -> list[Any]:
    """What a loader gives this rank of a batch."""
    of = (0, 1) if ranks is None else (ranks.rank, ranks.size)
    deal = Deal.of(len(batch[0]), shards, *of)
    own = slice(deal.first, deal.first + sum(deal.parts))
    parts = [None if array is None else array[own] for array in batch]
    passed.give_out(parts, deal)
    return parts


def train(
    case: Case, ranks: gb.Ranks | None, shards: int | None = SHARDS, device: str = "cpu"
) -> tuple[str, list[float], gb.Network]:
    """Train by hand, by parts if there are ``shards``; the digest of what there is at the end, and the losses."""
    net, opt = case.make(device)
    losses, passed = [], DataPass(object(), 0)
    passed.begin()
    try:
        for arrays in case.data():
            batch = [None if array is None else net.backend.asarray(array) for array in arrays]
            x, y, weight = batch if shards is None else dealt(batch, shards, ranks, passed)
            if len(losses) == case.bad:
                with pytest.raises(gb.errors.NonFiniteError, match="X holds NaN or infinity"):
                    net.loss_and_grad(x, y, case.micro_batch_size, weight, ranks)
                losses.append(math.nan)
                continue
            loss, grads = net.loss_and_grad(x, y, case.micro_batch_size, weight, ranks)
            if case.max_norm is not None:
                gb.clip_by_global_norm(grads, case.max_norm)
            opt.step()
            losses.append(loss)
    finally:
        passed.end()
    state = [net.parameters.flat, net.buffers.flat, *(opt.state[name].flat for name in sorted(opt.state))]
    found = hashlib.sha256(
        b"".join(array.tobytes() for array in state) + str((losses, core_of(net).dropout_step)).encode()
    )
    return found.hexdigest(), losses, net


@every_case
def test_the_bits_do_not_depend_on_the_number_of_ranks(case: Case) -> None:
    alone = train(case, None)[0]
    for size in (1, 2, 4):
        assert {found[0] for found in on_threads(size, lambda ranks: train(case, ranks))} == {alone}


@pytest.mark.gpu
@every_case
def test_the_bits_on_gpus_do_not_depend_on_their_number(case: Case) -> None:
    gpus = [name for name in gb.available_backends() if name.startswith("cuda:")]
    if len(gpus) < 2:
        missing("gpu", "2 CUDA devices are needed here")
    alone, losses, _ = train(case, None, device=gpus[0])
    np.testing.assert_allclose(losses, train(case, None)[1], rtol=1e-2 if "precision" in case.network else 1e-4)
    for size in (1, 2, 4)[: len(gpus).bit_length()]:
        assert {d for d, *_ in on_threads(size, lambda ranks: train(case, ranks, device=gpus[ranks.rank]))} == {alone}


WITHOUT_NORM = {name: case for name, case in CASES.items() if not case.network.get("batch_norm")}


@every("case", WITHOUT_NORM, ["weights"])
def test_the_numbers_are_those_of_whole_batches(case: Case) -> None:
    """Up to rounding; batch norm has others, by design."""
    (_, losses, net), (_, expected, whole) = train(case, None), train(case, None, shards=None)
    exact = case.dtype == "float32" and "precision" not in case.network
    np.testing.assert_allclose(losses, expected, rtol=1e-5 if exact else 1e-2)
    np.testing.assert_allclose(net.parameters.flat, whole.parameters.flat, rtol=1e-3, atol=1e-4 if exact else 0.03)


@pytest.mark.exhaustive
def test_gradients_are_those_of_pytorch() -> None:
    """Of the whole batch, with weights and an l2 term, in float64."""
    torch = peer("torch")
    case = Case({"l2": 0.03, "activation": "tanh"}, rows=(37,), weighted=True, dtype="float64")
    net, _ = case.make()
    x, y, weight = next(case.data())
    tensors = {name: torch.tensor(value, requires_grad=True) for name, value in net.parameters.items()}
    a = torch.tensor(x)
    for i in (1, 2, 3):
        a = a @ tensors[f"W{i}"] + tensors[f"b{i}"]
        a = torch.tanh(a) if i < 3 else a
    each = torch.nn.functional.cross_entropy(a, torch.tensor(y), reduction="none")
    counts = torch.tensor(weight).double()
    loss = (each * counts).sum() / counts.sum() + 0.015 * sum((tensors[f"W{i}"] ** 2).sum() for i in (1, 2, 3))
    loss.backward()

    def step(ranks: gb.Ranks) -> None:
        (net, _), passed = case.make(), DataPass(object(), 0)
        passed.begin()
        own, labels, weights = dealt((x, y, weight), SHARDS, ranks, passed)
        found, grads = net.loss_and_grad(own, labels, weight=weights, ranks=ranks)
        passed.end()
        assert found == pytest.approx(loss.item(), rel=1e-9)
        for name, tensor in tensors.items():
            np.testing.assert_allclose(grads[name], tensor.grad.numpy(), rtol=1e-7, atol=1e-12)

    on_threads(4, step)


def test_dropout_is_that_of_the_whole_batch() -> None:
    """Of a network that only drops: the gradient of W is then Σ mask over the rows, exactly where dropout put it."""
    layers = [gb.Dropout(0.5), gb.Dense(6, 1, bias=False)]
    x, y = np.ones((9, 6), np.float32), np.zeros((9, 1), np.float32)

    def gradient(ranks: gb.Ranks | None, shards: int | None) -> np.ndarray:
        net = gb.Network(layers, loss="mae", seed=7, backend="cpu")
        net.parameters["W1"].fill(1)
        passed = DataPass(object(), 0)
        passed.begin()
        parts = (x, y) if shards is None else dealt((x, y), shards, ranks, passed)
        found = net.loss_and_grad(*parts, ranks=ranks)[1]["W1"].copy()
        passed.end()
        return found

    whole = gradient(None, None)
    assert len({*np.round(whole[:, 0], 3)}) > 1
    for size in (1, 2, 8):
        for found in on_threads(size, lambda ranks: gradient(ranks, 8)):
            np.testing.assert_allclose(found, whole, rtol=1e-6)


# --- the tree over the parts ------------------------------------------------------------------------------------------


@drawn(20, 300, count=st.integers(1, 40), dtype=st.sampled_from(["float32", "float64"]))
def test_parts_are_added_as_a_tree_of_neighbours(count: int, dtype: str) -> None:
    """In as many arrays as log2 of the parts, and twice, since the second batch finds what the first one left."""
    draw = np.random.default_rng(count)
    tree = Tree(gb.get_backend("cpu"), count, np.empty(3, dtype))
    assert len(tree._free) == math.floor(math.log2(count))
    for _ in range(2):
        terms = draw.normal(size=(count, 3)).astype(dtype) * 10.0 ** draw.integers(-6, 7, (count, 1)).astype(dtype)
        tree.begin()
        for term in terms:
            leaf = tree.leaf()
            leaf[...] = term
            tree.add(leaf)
        assert tree.total().tobytes() == neighbours([*terms]).tobytes()


@drawn(20, 200, ranks=st.integers(1, 6), each=st.sampled_from([1, 2, 4, 8]))
def test_parts_of_ranks_make_the_same_tree(ranks: int, each: int) -> None:
    """Where each rank has a power of two of the parts."""
    shards = ranks * each
    terms = np.random.default_rng(shards).normal(size=(shards, 5)).astype(np.float32)

    def summed(r: gb.Ranks) -> bytes:
        tree = Tree(gb.get_backend("cpu"), each, np.empty(5, np.float32))
        for term in terms[r.rank * each : (r.rank + 1) * each]:
            leaf = tree.leaf()
            leaf[...] = term
            tree.add(leaf)
        return r.sum_(tree.total()).tobytes()

    assert {*on_threads(ranks, summed)} == {neighbours([*terms]).tobytes()}


# --- batch norm -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("unbiased", "rows"), [(True, 40), (False, 37)])
def test_running_statistics_are_of_the_whole_batch(unbiased: bool, rows: int) -> None:
    """Those of the first batch norm, whose input does not depend on parts: mean and variance of all rows."""
    draw = np.random.default_rng(0)
    # A mean of 1000 deviations: squares that are added up in single precision would leave nothing of the variance.
    x = (1000 + draw.normal(size=(rows, 4)) * [1, 2, 3, 4]).astype(np.float32)
    y = draw.integers(0, 2, rows)
    mean = x.mean(axis=0, dtype=np.float64)
    var = x.var(axis=0, dtype=np.float64) * (rows / (rows - 1) if unbiased else 1)

    def step(ranks: gb.Ranks) -> tuple[np.ndarray, np.ndarray]:
        layers = [gb.BatchNorm(4, momentum=0.25, unbiased_running=unbiased), gb.Dense(4, 2)]
        net, passed = gb.Network(layers, backend="cpu"), DataPass(object(), 0)
        passed.begin()
        parts = dealt((x, y), SHARDS, ranks, passed)
        net.loss_and_grad(*parts, ranks=ranks)
        passed.end()
        return net.buffers["running_mean1"], net.buffers["running_var1"]

    for running_mean, running_var in on_threads(2, step):
        np.testing.assert_allclose(running_mean, 0.25 * mean, rtol=1e-6)
        np.testing.assert_allclose(running_var, 0.75 + 0.25 * var, rtol=3e-5)  # means of parts are rounded


def test_a_part_is_normalised_by_its_own_statistics() -> None:
    """The gradient of gamma is Σ dy n over all rows, of which n is normalised part by part, in float64 by NumPy."""
    draw = np.random.default_rng(1)
    x, weights = draw.normal(2, 3, (12, 3)), draw.normal(size=(3, 1))
    parts = x.reshape(4, 3, 3)
    n = ((parts - parts.mean(axis=1, keepdims=True)) / np.sqrt(parts.var(axis=1, keepdims=True) + 1e-5)).reshape(12, 3)
    scores = n @ weights
    expected = ((2 * scores / 12 * weights.T) * n).sum(axis=0)  # of mse with targets 0

    def step(ranks: gb.Ranks) -> np.ndarray:
        layers = [gb.BatchNorm(3), gb.Dense(3, 1, bias=False)]
        net, passed = gb.Network(layers, loss="mse", backend="cpu", dtype="float64"), DataPass(object(), 0)
        net.parameters["W1"][...] = weights
        passed.begin()
        _, grads = net.loss_and_grad(*dealt((x, np.zeros((12, 1))), SHARDS, ranks, passed)[:2], ranks=ranks)
        passed.end()
        return grads["gamma1"]

    for gamma in on_threads(4, step):
        np.testing.assert_allclose(gamma, expected, rtol=1e-10)


@dataclass(frozen=True)
class InSync(Case):
    """With two batch norms that take the statistics of all ranks, or in one process of the whole batch."""

    def make(self, device: str = "cpu", sync: bool = True) -> tuple[gb.Network, gb.Optimizer]:
        layers = [gb.Dense(10, 16, bias=False), gb.BatchNorm(16, sync=sync), gb.ReLU(), gb.Dropout(0.2)]
        layers += [gb.Dense(16, 8, bias=False), gb.BatchNorm(8, sync=sync), gb.Tanh(), gb.Dense(8, 3)]
        net = gb.Network(layers, backend=device, dtype=self.dtype, seed=3, **self.network)
        return net, gb.Adam(net.parameters, 0.01)


@every("rows", {"even": (64, 64), "uneven": (64, 37, 3), "ranks without rows": (64, 2)}, ["uneven"])
@every("weighted", {"plain": {}, "weights": {"weighted": True}, "labels": {"network": {"loss": IGNORING}}}, ["weights"])
def test_batch_norm_in_sync_is_that_of_whole_batches(rows: tuple[int, ...], weighted: dict[str, Any]) -> None:
    """To rounding, in float64, where a difference would show: losses, weights and running statistics."""
    case = InSync(rows=rows, dtype="float64", **weighted)
    _, losses, whole = train(case, None, shards=None)
    for size in (1, 2, 4):
        for _, found, net in on_threads(size, lambda ranks: train(case, ranks)):
            np.testing.assert_allclose(found, losses, rtol=1e-9)
            np.testing.assert_allclose(net.parameters.flat, whole.parameters.flat, rtol=1e-5, atol=1e-7)
            np.testing.assert_allclose(net.buffers.flat, whole.buffers.flat, rtol=1e-9, atol=1e-12)


@pytest.mark.gpu
def test_batch_norm_in_sync_on_gpus() -> None:
    gpus = [name for name in gb.available_backends() if name.startswith("cuda:")]
    if len(gpus) < 2:
        missing("gpu", "2 CUDA devices are needed here")
    case = InSync(rows=(64, 37), dtype="float64", weighted=True)
    _, losses, whole = train(case, None, shards=None, device=gpus[0])
    for _, found, net in on_threads(2, lambda ranks: train(case, ranks, device=gpus[ranks.rank])):
        np.testing.assert_allclose(found, losses, rtol=1e-9)
        np.testing.assert_allclose(net.buffers.flat.get(), whole.buffers.flat.get(), rtol=1e-9, atol=1e-12)
    assert "BatchNorm(sync=True) sums over ranks in the middle of a step" in why_eager(whole)


def test_an_error_in_the_middle_of_batch_norms_in_sync_is_raised_on_all() -> None:
    """Its sums are made to the end, so that nobody waits in vain, and the next step is a good one."""
    case = InSync(rows=(64,), weighted=True)

    def step(ranks: gb.Ranks) -> float:
        (net, _), passed = case.make(), DataPass(object(), 0)
        passed.begin()
        x, y, weight = dealt(next(case.data()), SHARDS, ranks, passed)
        if ranks.rank == 1:
            broken = core_of(net).stack[-1].layer

            def forward(*_: Any) -> NoReturn:
                del broken.forward
                raise MemoryError("out of memory")

            broken.forward = forward
        with pytest.raises(MemoryError, match="out of memory"):
            net.loss_and_grad(x, y, weight=weight, ranks=ranks)
        with pytest.raises(gb.errors.ArgumentError, match="micro_batch_size must be at least the 32 rows of this rank"):
            net.loss_and_grad(x, y, 16, weight, ranks)
        loss = net.loss_and_grad(x, y, weight=weight, ranks=ranks)[0]
        passed.end()
        return loss

    found = on_threads(2, step)
    assert found[0] == found[1]


def test_batch_norm_in_sync_says_what_it_is_not_for() -> None:
    assert "sync=True" in repr(gb.BatchNorm(3, sync=True))
    assert "sync" not in repr(gb.BatchNorm(3))  # so that earlier checkpoints describe the same network
    with pytest.raises(gb.errors.DTypeError, match="sync must be True or False"):
        gb.BatchNorm(3, sync=1)
    with pytest.raises(gb.errors.ArgumentError, match=r"BatchNorm\(sync=True\) must not be in a network of precision"):
        gb.Network([gb.BatchNorm(3, sync=True), gb.Dense(3, 2)], precision="mixed", backend="cpu")


class Counts(gb.Layer):
    """A layer of a user's own with a buffer: the largest x of the last batch, and how many batches there were."""

    def takes(self) -> None:
        pass

    def needs(self, features: int) -> gb.Needs:
        buffers = {"largest": gb.Parameter((1,)), "batches": gb.Parameter((1,))}
        return gb.Needs(features, buffers=buffers, reads=("x",))

    def forward(self, x: Any, y: Any, c: gb.Context) -> None:
        y[...] = x

    def backward(self, x: Any, y: Any, dy: Any, dx: Any, c: gb.Context) -> None:
        c.buffers["largest"][...] = x.max()
        c.buffers["batches"] += 1
        if dx is not None:
            dx[...] = dy


def test_other_buffers_are_means_over_the_parts() -> None:
    x = np.arange(8, dtype=np.float32)[:, None]

    def step(ranks: gb.Ranks) -> list[float]:
        net, passed = (
            gb.Network([gb.Dense(1, 1, bias=False), Counts()], loss="mse", backend="cpu"),
            DataPass(object(), 0),
        )
        net.parameters["W1"].fill(1)
        passed.begin()
        for _ in range(2):
            net.loss_and_grad(*dealt((x, np.zeros((8, 1), np.float32)), SHARDS, ranks, passed)[:2], ranks=ranks)
        passed.end()
        return [*net.buffers.flat.tolist()]

    assert on_threads(2, step) == [[(1 + 3 + 5 + 7) / 4, 2]] * 2


# --- what goes wrong on one rank --------------------------------------------------------------------------------------


def nan_in_x(core: Any, x: Any, y: Any, weight: Any) -> None:
    x[0, 0] = math.nan


def label_out_of_range(core: Any, x: Any, y: Any, weight: Any) -> None:
    y[0] = 99


def negative_weight(core: Any, x: Any, y: Any, weight: Any) -> None:
    weight[0] = -1


def no_memory(core: Any, x: Any, y: Any, weight: Any) -> None:
    def forward(*_: Any, **__: Any) -> None:
        del core.forward
        raise MemoryError("out of memory")

    core.forward = forward


def users_mistake(core: Any, x: Any, y: Any, weight: Any) -> None:
    def forward(*_: Any, **__: Any) -> None:
        del core.forward
        raise KeyError("no such column")

    core.forward = forward


WRONG: dict[str, tuple[Any, type[Exception], str]] = {
    "NaN": (nan_in_x, gb.errors.NonFiniteError, "X holds NaN or infinity"),
    "label": (label_out_of_range, gb.errors.ArgumentError, "99"),
    "weight": (negative_weight, gb.errors.ArgumentError, "weight"),
    "memory": (no_memory, MemoryError, "out of memory"),
    "another": (users_mistake, RuntimeError, "no such column"),
}


@pytest.mark.parametrize("what", WRONG)
def test_an_error_on_one_rank_is_raised_on_all(what: str) -> None:
    """After the sum, with the words of the rank that met it; the step is as if it had not been tried."""
    harm, kind, words = WRONG[what]
    case = Case({"batch_norm": True, "dropout": 0.3}, weighted=True)

    def step(ranks: gb.Ranks) -> tuple[str, bool]:
        net, _ = case.make()
        core, passed = core_of(net), DataPass(object(), 0)
        before = net.state_dict()
        passed.begin()
        parts = dealt(next(case.data()), SHARDS, ranks, passed)
        good = [array.copy() for array in parts]
        if ranks.rank == 1:
            harm(core, *parts)
        own = KeyError if ranks.rank == 1 and what == "another" else kind
        with pytest.raises(own, match=words) as raised:
            net.loss_and_grad(*parts[:2], weight=parts[2], ranks=ranks)
        after = net.state_dict()
        assert after["dropout_step"] == before["dropout_step"]
        for name in net.buffers:
            np.testing.assert_array_equal(after["buffers"][name], before["buffers"][name])
        passed.give_out(good, Deal.of(64, SHARDS, ranks.rank, ranks.size))
        loss, grads = net.loss_and_grad(*good[:2], weight=good[2], ranks=ranks)
        passed.end()
        return str(raised.value), grads.flat.tobytes() + str(loss).encode()

    def good_step(ranks: gb.Ranks) -> bytes:
        (net, _), passed = case.make(), DataPass(object(), 0)
        passed.begin()
        x, y, weight = dealt(next(case.data()), SHARDS, ranks, passed)
        loss, grads = net.loss_and_grad(x, y, weight=weight, ranks=ranks)
        passed.end()
        return grads.flat.tobytes() + str(loss).encode()

    found = on_threads(2, step)
    assert "(on rank 1)" in found[0][0]
    assert [step for _, step in found] == on_threads(2, good_step)


def no_memory_for_part_sums(net: gb.Network, ranks: gb.Ranks) -> None:
    dealt_of(net).part_sums = lambda parts: raising(MemoryError())


def no_memory_for_the_message(net: gb.Network, ranks: gb.Ranks) -> None:
    dealt_of(net)._message = lambda: raising(MemoryError())


def no_memory_for_sums_over_ranks(net: gb.Network, ranks: gb.Ranks) -> None:
    ranks._scratch = lambda *_: raising(MemoryError())  # type: ignore[method-assign]


def no_memory_for_the_end(net: gb.Network, ranks: gb.Ranks) -> None:
    reserve = core_of(net).reserve
    core_of(net).reserve = lambda rows: raising(MemoryError()) if rows == 1 else reserve(rows)


NO_MEMORY = {
    "part sums": no_memory_for_part_sums,
    "message": no_memory_for_the_message,
    "sums over ranks": no_memory_for_sums_over_ranks,
    "end of the step": no_memory_for_the_end,
}


@every("where", NO_MEMORY, NO_MEMORY)
@every("kind", ["float32", "mixed"], ["mixed"])
def test_memory_that_runs_out_for_the_sums_is_told_to_all(where: Any, kind: str) -> None:
    """All raise, and the step is as if it had not been tried; where there is memory again, it is a good one."""
    case = Case({"batch_norm": True, **({"precision": "mixed"} if kind == "mixed" else {})})

    def step(ranks: gb.Ranks, fails: bool) -> bytes:
        (net, _), passed = case.make(), DataPass(object(), 0)
        core = core_of(net)
        passed.begin()
        x, y, _ = dealt(next(case.data()), SHARDS, ranks, passed)
        x = x.astype(net.dtype)
        passed.give_out((x, y), Deal.of(64, SHARDS, ranks.rank, ranks.size))
        if fails:
            before = net.buffers.flat.copy()
            if ranks.rank == 1:
                where(net, ranks)
            for _ in range(2):
                with pytest.raises(MemoryError, match=None if ranks.rank == 1 else "on rank 1"):
                    net.loss_and_grad(x, y, ranks=ranks)
            for harmed in (core, dealt_of(net), ranks):
                for name in ("part_sums", "_message", "reserve", "_scratch"):
                    vars(harmed).pop(name, None)
            assert (net.buffers.flat.tobytes(), core.dropout_step) == (before.tobytes(), 0)
        loss, grads = net.loss_and_grad(x, y, ranks=ranks)
        passed.end()
        return grads.flat.tobytes() + net.buffers.flat.tobytes() + str(loss).encode()

    assert on_threads(2, lambda ranks: step(ranks, True)) == on_threads(2, lambda ranks: step(ranks, False))


def test_an_l2_term_out_of_range_is_an_error() -> None:
    case = Case({"l2": 1e30, "batch_norm": True})

    def step(ranks: gb.Ranks) -> None:
        (net, _), passed = case.make(), DataPass(object(), 0)
        net.parameters["W1"][0] = 1e10
        passed.begin()
        x, y, _ = dealt(next(case.data()), SHARDS, ranks, passed)
        before = net.buffers.flat.copy()
        with pytest.raises(gb.errors.NonFiniteError, match="the l2 term has grown out of range"):
            net.loss_and_grad(x, y, ranks=ranks)
        passed.end()
        assert (net.buffers.flat.tobytes(), core_of(net).dropout_step) == (before.tobytes(), 0)

    on_threads(2, step)


def raising(error: Exception) -> NoReturn:
    raise error


def test_all_ranks_hear_of_a_signal() -> None:
    case = Case()

    def step(ranks: gb.Ranks, rank: int) -> bool:
        net, _ = case.make()
        x, y, _ = next(case.data())
        deal = Deal.of(64, SHARDS, ranks.rank, ranks.size)
        own = slice(deal.first, deal.first + 32)
        return dealt_of(net).step(x[own], y[own], None, deal, ranks, signalled=ranks.rank == rank).signalled

    assert on_threads(2, lambda ranks: step(ranks, 1)) == [True, True]
    assert on_threads(2, lambda ranks: step(ranks, 2)) == [False, False]


def test_weights_that_are_all_zero_have_no_mean() -> None:
    case = Case()

    def step(ranks: gb.Ranks) -> None:
        (net, _), passed = case.make(), DataPass(object(), 0)
        passed.begin()
        x, y, _ = dealt(next(case.data()), SHARDS, ranks, passed)
        with pytest.raises(gb.errors.NonFiniteError, match="all its weights are 0"):
            net.loss_and_grad(x, y, weight=np.zeros(len(x)), ranks=ranks)
        passed.end()

    on_threads(2, step)


# --- batches of other origin ------------------------------------------------------------------------------------------


def test_rows_that_no_loader_gave_out_are_one_part_each() -> None:
    """Ranks may have different numbers of them, or none."""
    net, _ = (case := Case()).make()
    x, y, _ = next(case.data())
    loss, grads = net.loss_and_grad(x, y)
    own = {0: slice(0, 30), 1: slice(30, 30), 2: slice(30, 64)}

    def step(ranks: gb.Ranks) -> tuple[float, np.ndarray]:
        found = case.make()[0].loss_and_grad(x[own[ranks.rank]], y[own[ranks.rank]], ranks=ranks)
        return found[0], found[1].flat

    for its_loss, its_grads in on_threads(3, step):
        assert its_loss == pytest.approx(loss, rel=1e-6)
        np.testing.assert_allclose(its_grads, grads.flat, rtol=1e-4, atol=1e-6)
    alone = case.make()[0].loss_and_grad(x, y, ranks=gb.Ranks())
    assert (alone[0], alone[1].flat.tobytes()) == (loss, grads.flat.tobytes())


def test_a_loop_of_ones_own_over_a_loader() -> None:
    """Its bits do not depend on the ranks, also where the samples are changed in the loop."""
    draw = np.random.default_rng(0)
    x, y = draw.normal(size=(101, 10)).astype(np.float32), draw.integers(0, 3, 101)

    def run(ranks: gb.Ranks | None) -> bytes:
        net, opt = Case({"dropout": 0.2}).make()
        loader = gb.Loader(x, y, batch_size=16, shards=SHARDS, ranks=ranks, seed=1, backend="cpu")
        for _ in range(2):
            for xs, ys in loader:
                net.loss_and_grad(xs * np.float32(0.5), ys, ranks=ranks)
                opt.step()
        return net.parameters.flat.tobytes()

    alone = run(None)
    for size in (1, 2, 4):
        assert {*on_threads(size, run)} == {alone}


def test_a_batch_that_is_the_same_on_every_rank_is_an_error() -> None:
    case = Case()
    x, y, _ = next(case.data())

    def step(ranks: gb.Ranks) -> None:
        for xs, ys in gb.Loader(x, y, batch_size=16, backend="cpu"):
            with pytest.raises(gb.errors.ArgumentError, match="Loader without ranks=, which gives each rank the same"):
                case.make()[0].loss_and_grad(xs, ys, ranks=ranks)

    on_threads(2, step)


def test_a_batch_keeps_its_rows() -> None:
    case = Case()
    x, y, _ = next(case.data())

    def step(ranks: gb.Ranks) -> None:
        for xs, ys in gb.Loader(x, y, batch_size=16, shards=SHARDS, ranks=ranks, backend="cpu"):
            with pytest.raises(gb.errors.ShapeError, match="as many rows as the loader gave this rank, 8, got 3"):
                case.make()[0].loss_and_grad(xs[:3], ys[:3], ranks=ranks)
            return

    on_threads(2, step)
    net, plain = case.make()[0], gb.Loader(x, y, batch_size=16, backend="cpu")
    for xs, ys in gb.Loader(x, y, batch_size=16, shards=SHARDS, backend="cpu"):
        for of in (net.loss_and_grad, net.step_loss):
            with pytest.raises((gb.errors.ShapeError, gb.errors.ArgumentError), match=r"gave, 16, got 3|in parts"):
                of(xs[:3], ys[:3])
        for others in plain:  # those of a loader without parts are no part of these
            net.loss_and_grad(*others)
            break
        break
    net.loss_and_grad(xs[:3], ys[:3])  # after the loop, of nothing


def test_a_part_of_a_batch_is_no_batch() -> None:
    """A step without the ranks= of the loader would train each rank alone."""
    (net, _), passed = (case := Case()).make(), DataPass(object(), 0)
    x, y, _ = next(case.data())
    part, of_part = x[:32], y[:32]
    passed.begin()
    passed.give_out((part, of_part), Deal.of(64, SHARDS, 0, 2))
    with pytest.raises(gb.errors.ArgumentError, match="for 2 ranks, but there are 1: loader and step need the same"):
        net.loss_and_grad(part, of_part)
    with pytest.raises(gb.errors.ArgumentError, match="step_loss computes whole batches only"):
        net.step_loss(part, of_part)
    passed.end()


def test_parts_too_small_for_batch_norm_are_an_error() -> None:
    case = Case({"batch_norm": True}, rows=(7,))
    with pytest.raises(gb.errors.ArgumentError, match=r"a batch of 7 rows in 4 parts has one of 1; BatchNorm needs"):
        train(case, None)
    dealt_of(case.make()[0]).check_parts(2, 1)


# --- memory -----------------------------------------------------------------------------------------------------------


@every("dtype", ["float32", "float64", "mixed"], ["float32"])
def test_the_memory_of_the_sums_is_planned(dtype: str) -> None:
    options = {"precision": "mixed"} if dtype == "mixed" else {"dtype": dtype}
    net = gb.mlp([100, 300, 10], batch_norm=True, backend="cpu", **options)
    for shards in (1, 2, 6, 8):
        net.memory_parts(8, shards=shards)
        core_of(net).sums_of_parts = dealt_of(net)._message_of_half = None
        tracemalloc.start()
        dealt_of(net).part_sums(shards)
        taken = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        planned = net.memory_parts(64, shards=shards)["sums over parts"]
        assert planned <= taken <= planned + 8000  # a few Python objects


def test_a_step_on_parts_allocates_nothing() -> None:
    case = Case({"batch_norm": True, "l2": 0.1, "dropout": 0.2}, weighted=True)
    (net, _), passed = case.make(), DataPass(object(), 0)
    passed.begin()
    batch = dealt(next(case.data()), SHARDS, None, passed)
    for _ in range(3):
        net.loss_and_grad(*batch[:2], weight=batch[2])
    with refusing(least=200) as numpy:
        net.loss_and_grad(*batch[:2], weight=batch[2])
        assert numpy.count == 0
    passed.end()


def test_the_plan_has_the_memory_for_sums_over_ranks() -> None:
    def planned(ranks: gb.Ranks) -> dict[str, int]:
        net = gb.mlp([100, 300, 10], backend="cpu")
        plan = net.memory_parts(64, shards=8, ranks=ranks)
        assert plan["workspace of a step"] == net.memory_parts(8)["workspace of a step"]
        x, y = np.zeros((32, 100), np.float32), np.zeros(32, np.int64)
        net.loss_and_grad(x, y, ranks=ranks)
        taken = sum(pieces.nbytes for pieces in ranks._pieces.values())
        assert 0 <= plan["sums over ranks"] - taken <= 2 * 16 * 8  # as the cuts are aligned
        return plan

    on_threads(2, planned)


# --- by MPI -----------------------------------------------------------------------------------------------------------

DIGESTS = """
import gpubatch as gb
from test_data_parallel import CASES, InSync, train
ranks = gb.Ranks()
every = ranks.gather([train(case, ranks)[0] for case in CASES.values()])
in_sync = ranks.gather(train(InSync(rows=(64, 37, 2), weighted=True), ranks)[0])
assert len({*in_sync}) == 1, in_sync
if ranks.rank == 0:
    print(every)
"""


@pytest.mark.exhaustive
@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_bits_by_mpi(size: int) -> None:
    expected = [train(case, None)[0] for case in CASES.values()]
    assert ast.literal_eval(mpi(size, DIGESTS).stdout) == [expected] * size
