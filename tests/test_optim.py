"""Optimizers against closed forms, published numbers, the plain formula, and the promises of their interface."""

from __future__ import annotations

import json
import math
import resource
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, strategies as st
from needs import peer
from optimizer_table import CASES, FAST, LR, Case

import gpubatch as gb
from gpubatch import optim, rules
from gpubatch.backend import find_overlap
from gpubatch.optim import rehearse_update
from gpubatch.params import FlatViews

every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
NO_CHANGE_BY_HAND = {"weight_decay": 0.0}


def gradients(
    rng: np.random.Generator, steps: int, shape: tuple[int, ...], dtype: object = np.float64
) -> list[np.ndarray]:
    return [rng.standard_normal(shape).astype(dtype) for _ in range(steps)]


def test_the_table_is_complete() -> None:
    made = [case.make([np.zeros(2)]) for case in CASES.values()]
    kinds = {type(opt) for opt in made}
    classes = {x for x in vars(optim).values() if isinstance(x, type)}
    assert kinds == classes - {gb.StepResult}
    assert {opt.rule for opt in made} >= {getattr(rules, name) for name in rules.__all__}
    fast = [CASES[name].make([np.zeros(2)]) for name in FAST]
    assert ({type(opt) for opt in fast}, {opt.rule for opt in fast} >= {opt.rule for opt in made}) == (kinds, True)
    # Every value of every option of every rule is there.
    tried = {
        (opt.rule.name, name, value) for opt in made for name, value in opt.hyper.items() if name in opt.rule.options
    }
    for rule in {opt.rule for opt in made}:
        for name, default in rule.options.items():
            values = [True, False] if isinstance(default, bool) else ["outside", "inside"]
            if rule in (rules.adam, rules.amsgrad, rules.radam):
                values.append("hat")
            assert {(rule.name, name, value) for value in values} <= tried


# --- against closed forms and published numbers --------------------------------------------------------------------


@every_case
def test_first_step_is_the_closed_form(case: Case, backend: gb.Backend, rng: np.random.Generator) -> None:
    w, g = backend.zeros(17, np.float64), rng.standard_normal(17)
    case.make([w]).step([backend.asarray(g)])
    np.testing.assert_allclose(backend.to_numpy(w), case.first(g), rtol=1e-12)


# How far eps goes at the first step; figures from the libraries' own formulas, see their documentation.
@pytest.mark.parametrize(
    ("make", "g", "step"),
    [
        (lambda p: gb.Adam(p), 1e-6, 9.90e-4),
        (lambda p: gb.Adam(p, eps_at="hat"), 1e-6, 7.60e-4),
        (lambda p: gb.Adam(p, eps=1e-7), 1e-6, 9.09e-4),
        (lambda p: gb.Adam(p, eps=1e-7, eps_at="hat"), 1e-6, 2.40e-4),
        (lambda p: gb.RMSProp(p, lr=1.0, rho=0.99), 0.1, 10.0),
        (lambda p: gb.RMSProp(p, lr=1.0, rho=0.9, eps_at="inside"), 0.1, 3.16),
    ],
)
def test_where_eps_stands_shows_in_the_first_step(make, g, step) -> None:
    w = np.zeros(1)
    make([w]).step([np.array([g])])
    assert -w[0] == pytest.approx(step, rel=2e-3)


# The exercise of Stanford's CS231n (assignment 2): weights, gradients and state are ramps; the results stand there.
RAMP = {"w": np.linspace(-0.4, 0.6, 20), "g": np.linspace(-0.6, 0.4, 20)}
CS231N = {
    "sgd_momentum": (
        lambda p: gb.HeavyBall(p, lr=1e-3, mu=0.9, lr_in_velocity=True),
        0,
        {"v": np.linspace(0.6, 0.9, 20)},
        [
            0.1406,
            0.20738947,
            0.27417895,
            0.34096842,
            0.40775789,
            0.47454737,
            0.54133684,
            0.60812632,
            0.67491579,
            0.74170526,
        ],
        {"v": [0.5406, 0.55475789, 0.56891579, 0.58307368, 0.59723158]},
    ),
    "rmsprop": (
        lambda p: gb.RMSProp(p, lr=1e-2, rho=0.99),
        0,
        {"s": np.linspace(0.6, 0.9, 20)},
        [
            -0.39223849,
            -0.34037513,
            -0.28849239,
            -0.23659121,
            -0.18467247,
            -0.132737,
            -0.08078555,
            -0.02881884,
            0.02316247,
        ],
        {"s": [0.5976, 0.6126277, 0.6277108, 0.64284931, 0.65804321]},
    ),
    "adam": (
        lambda p: gb.Adam(p, lr=1e-2),
        5,
        {"m": np.linspace(0.6, 0.9, 20), "v": np.linspace(0.7, 0.5, 20)},
        [
            -0.40094747,
            -0.34836187,
            -0.29577703,
            -0.24319299,
            -0.19060977,
            -0.1380274,
            -0.08544591,
            -0.03286534,
            0.01971428,
        ],
        {
            "m": [0.48, 0.49947368, 0.51894737, 0.53842105, 0.55789474],
            "v": [0.69966, 0.68908382, 0.67851319, 0.66794809],
        },
    ),
}


@pytest.mark.parametrize("name", CS231N)
def test_the_published_numbers_of_cs231n(name: str) -> None:
    make, t, state, weights, states = CS231N[name]
    w = RAMP["w"].copy()
    opt = make([w])
    saved = opt.state_dict()
    opt.load_state_dict({**saved, "t": t, "state": {k: {"0": v} for k, v in state.items()}})
    opt.step([RAMP["g"]])
    np.testing.assert_allclose(w[: len(weights)], weights, atol=6e-9)
    for k, expected in states.items():
        np.testing.assert_allclose(opt.state[k]["0"][: len(expected)], expected, atol=6e-9)


def test_momentum_is_the_moving_average_of_the_course(rng: np.random.Generator) -> None:
    w, v, expected = np.zeros(5), np.zeros(5), np.zeros(5)
    opt = gb.Momentum([w], lr=0.1)
    for g in gradients(rng, 30, (5,)):
        opt.step([g])
        v = 0.9 * v + 0.1 * g
        expected -= 0.1 * v
    np.testing.assert_allclose(w, expected, rtol=1e-13)
    np.testing.assert_allclose(opt.state["v"]["0"], v, rtol=1e-13)


def test_the_two_forms_of_momentum_part_when_the_learning_rate_changes(rng: np.random.Generator) -> None:
    outside, inside, v = np.zeros(3), np.zeros(3), np.zeros(3)
    expected = np.zeros(3)
    a, b = gb.HeavyBall([outside], 0.1), gb.HeavyBall([inside], 0.1, lr_in_velocity=True)
    for i, g in enumerate(gradients(rng, 20, (3,))):
        a.lr = b.lr = lr = 0.1 if i < 10 else 0.001
        a.step([g])
        b.step([g])
        v = 0.9 * v - lr * g
        expected += v
    np.testing.assert_allclose(inside, expected, rtol=1e-12)
    assert np.abs(outside - inside).max() > 0.01


def test_adam_hat_is_adam_with_a_shrinking_eps(rng: np.random.Generator) -> None:
    hat, plain = np.zeros(4), np.zeros(4)
    a, b = (
        gb.Adam([hat], eps=1e-3, eps_at="hat"),
        gb.Adam([plain], eps=lambda step, epoch: 1e-3 / (1 - 0.999 ** (step + 1)) ** 0.5),
    )
    for g in gradients(rng, 50, (4,)):
        a.step([g])
        b.step([g])
    np.testing.assert_allclose(hat, plain, rtol=1e-12)


def test_nadam_of_keras() -> None:
    """A step of Keras' own test of Nadam, whose schedule is 0.96**t and eps 1e-7."""
    w = np.array([1.0, 2, 3, 4])
    gb.NAdam([w], 0.5, eps=1e-7, momentum_decay=1).step([np.array([1.0, 6, 7, 2])])
    np.testing.assert_allclose(w, [0.4686, 1.4686, 2.4686, 3.4686], atol=5e-5)


# Keras' own tests of correctness: five steps from ones, the first gradient 0.01, then 0.1, 0.2, ... 1.0.
KERAS = {
    "adadelta": (
        lambda p: gb.Adadelta(p, lr=1.0, rho=0.8, eps=1e-6),
        [[x] * 10 for x in (0.9978, 0.9947, 0.9915, 0.9882, 0.9849)],
    ),
    "adamax": (
        lambda p: gb.Adamax(p, lr=0.2, beta1=0.85, beta2=0.95, eps=1e-6, eps_at="outside"),
        [
            [0.8] * 10,
            [0.6827, 0.6873, 0.6888, 0.6896, 0.6901, 0.6904, 0.6906, 0.6908, 0.6909, 0.691],
            [0.5333, 0.5407, 0.5431, 0.5444, 0.5451, 0.5456, 0.546, 0.5462, 0.5464, 0.5466],
            [0.368, 0.3773, 0.3804, 0.382, 0.3829, 0.3835, 0.384, 0.3843, 0.3846, 0.3848],
            [0.1933, 0.204, 0.2076, 0.2094, 0.2105, 0.2112, 0.2117, 0.2121, 0.2124, 0.2126],
        ],
    ),
}


@pytest.mark.parametrize("name", KERAS)
def test_the_golden_numbers_of_keras(name: str) -> None:
    make, golden = KERAS[name]
    w = np.ones(10)
    opt = make([w])
    for i, expected in enumerate(golden):
        opt.step([np.full(10, 0.01) if i == 0 else np.arange(1, 11) / 10])
        np.testing.assert_allclose(w, expected, atol=6e-5)


# The tests of TensorFlow Addons: a hundred steps of the same gradients in float32.
TENSORFLOW_ADDONS = {
    "radam": (
        lambda p: gb.RAdam(p, lr=1e-3, eps=1e-7, eps_at="outside"),
        [0.985769, 1.985269, 2.986119, 3.986068],
    ),
    "radam decoupled": (
        lambda p: gb.RAdam(p, lr=1e-3, eps=1e-7, eps_at="outside", weight_decay=0.01, decoupled=True),
        [0.984775, 1.983276, 2.983125, 3.982076],
    ),
    "adabelief": (
        lambda p: gb.AdaBelief(p, lr=1e-3, eps=1e-14),
        [0.66723955, 1.6672393, 2.6672382, 3.6672382],
    ),
}


@pytest.mark.parametrize("name", TENSORFLOW_ADDONS)
def test_the_golden_numbers_of_tensorflow_addons(name: str) -> None:
    make, expected = TENSORFLOW_ADDONS[name]
    w = np.array([1.0, 2.0, 3.0, 4.0])
    opt = make([w])
    for _ in range(100):
        opt.step([np.array([0.1, 0.2, 0.03, 0.04])])
    np.testing.assert_allclose(w, expected, atol=2e-6)


def test_a_step_of_a_scheduled_momentum_costs_the_same_at_any_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The product of factors is kept from step to step, and ends when it is 0."""
    factors = []
    of_step = rules.warmed_beta
    monkeypatch.setattr(rules, "warmed_beta", lambda *of: factors.append(of) or of_step(*of))
    beta1, decay = 0.75, 0.0123  # values of no other test
    expected = math.prod(of_step(step, beta1, decay) for step in range(1, 101))
    found = [rules.warmed_product(t, beta1, decay) for t in range(1, 101)]
    assert found[-1] == expected
    assert len(factors) == 100
    assert rules.warmed_product(7, beta1, decay) == found[6]
    assert [rules.warmed_product(t, beta1, decay) for t in (10_000, 10_001, 10**9)] == [0.0] * 3
    assert len(factors) < 3000


def expanded() -> np.ndarray:
    """Rows that share memory, as PyTorch's ``expand`` makes them."""
    return np.lib.stride_tricks.as_strided(np.ones(3, np.float32), (4, 3), (0, 4))


def test_views_that_only_lie_beside_each_other_are_taken(backend: gb.Backend) -> None:
    w = backend.asarray(np.ones((6, 4), np.float32))
    apart = [w[:, 0], w[:, 1], w[::-2, 2:], w[:0], backend.asarray(np.ones(3, np.float32))]
    opt = gb.SGD(apart, 0.5)
    if backend.name == "cpu":  # a CUDA kernel refuses strided arrays
        opt.step([np.ones(x.shape, np.float32) for x in apart])
        assert w.tolist() == [[0.5, 0.5, 1, 1], [0.5] * 4] * 3
    with pytest.raises(gb.ArgumentError, match=r"params\['0'\] and params\['1'\] share memory"):
        gb.SGD([w[:, 3], w[2:, ::3]], 0.5)


@given(st.lists(st.tuples(*[st.integers(-9, 9)] * 3), min_size=2, max_size=5))
def test_an_overlap_is_found_where_elements_are_shared(slices: list[tuple[int, int, int]]) -> None:
    w = np.arange(10.0)
    arrays = [w[start : stop : step or 1] for start, stop, step in slices]
    shared = any(
        set(a.tolist()) & set(b.tolist()) for i, a in enumerate(arrays) for j, b in enumerate(arrays) if i != j
    )
    assert (find_overlap(arrays) is not None) == shared


# --- against other libraries ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.torch])
def test_100_steps_agree_with_pytorch(name: str, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = peer("torch")
    # NAdam keeps a product of factors in the default type, which is float32.
    monkeypatch.setattr(torch, "get_default_dtype", lambda: torch.float64)
    w = rng.standard_normal((7, 3))
    theirs = torch.tensor(w.copy(), requires_grad=True)
    opt, peer_opt = CASES[name].make([w]), CASES[name].torch(torch.optim, [theirs])
    for g in gradients(rng, 100, w.shape):
        opt.step([g])
        theirs.grad = torch.tensor(g)
        peer_opt.step()
    np.testing.assert_allclose(w, theirs.detach().numpy(), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.optax])
def test_100_steps_agree_with_optax(name: str, rng: np.random.Generator) -> None:
    optax, jax = peer("optax"), peer("jax")
    w = rng.standard_normal((7, 3))
    with jax.experimental.enable_x64() if hasattr(jax.experimental, "enable_x64") else jax.enable_x64(True):
        theirs = jax.numpy.asarray(w.copy())
        opt, peer_opt = CASES[name].make([w]), CASES[name].optax(optax)
        state = peer_opt.init(theirs)
        for g in gradients(rng, 100, w.shape):
            opt.step([g])
            updates, state = peer_opt.update(jax.numpy.asarray(g), state, theirs)
            theirs = optax.apply_updates(theirs, updates)
    np.testing.assert_allclose(w, np.asarray(theirs), rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("make", "theirs"),
    [
        (lambda p: gb.Adam(p, 0.01, eps_at="hat"), lambda s, p: s.AdamOptimizer(p, 0.01)),
        (lambda p: gb.HeavyBall(p, 0.01, lr_in_velocity=True), lambda s, p: s.SGDOptimizer(p, 0.01, nesterov=False)),
        (
            lambda p: gb.HeavyBall(p, 0.01, lr_in_velocity=True, nesterov=True),
            lambda s, p: s.SGDOptimizer(p, 0.01, nesterov=True),
        ),
    ],
    ids=["adam", "momentum", "nesterov"],
)
def test_100_steps_agree_with_scikit_learn(make, theirs, rng: np.random.Generator) -> None:
    peer("sklearn")
    stochastic = peer("sklearn.neural_network._stochastic_optimizers")
    w = rng.standard_normal((7, 3))
    v = [w.copy()]
    opt, peer_opt = make([w]), theirs(stochastic, v)
    for g in gradients(rng, 100, w.shape):
        opt.step([g])
        peer_opt.update_params(v, [g])
    np.testing.assert_allclose(w, v[0], rtol=0, atol=1e-10)


def test_the_learning_rate_of_rmsprop_is_outside_in_pytorch_and_in_the_velocity_in_optax(
    rng: np.random.Generator,
) -> None:
    """A constant rate would show no difference."""
    torch, optax, jax = peer("torch"), peer("optax"), peer("jax")
    rates = [0.03 if i < 10 else 0.001 for i in range(20)]
    start, grads = rng.standard_normal(5), gradients(rng, 20, (5,))
    outside, inside = start.copy(), start.copy()
    for w, variant in ((outside, {}), (inside, {"eps_at": "inside", "lr_in_velocity": True})):
        opt = gb.RMSProp([w], lr=lambda step, epoch: rates[step], momentum=0.8, **variant)
        for g in grads:
            opt.step([g])
    theirs = torch.tensor(start.copy(), requires_grad=True)
    peer_opt = torch.optim.RMSprop([theirs], 0.03, alpha=0.9, momentum=0.8)
    for g, rate in zip(grads, rates, strict=True):
        peer_opt.param_groups[0]["lr"] = rate
        theirs.grad = torch.tensor(g)
        peer_opt.step()
    np.testing.assert_allclose(outside, theirs.detach().numpy(), rtol=0, atol=1e-12)
    with jax.experimental.enable_x64() if hasattr(jax.experimental, "enable_x64") else jax.enable_x64(True):
        w, by_count = jax.numpy.asarray(start), jax.numpy.asarray(rates)
        rule = optax.rmsprop(lambda count: by_count[count], 0.9, momentum=0.8)
        state = rule.init(w)
        for g in grads:
            updates, state = rule.update(jax.numpy.asarray(g), state, w)
            w = optax.apply_updates(w, updates)
    np.testing.assert_allclose(inside, np.asarray(w), rtol=0, atol=1e-12)
    assert np.abs(inside - outside).max() > 0.01


@pytest.mark.parametrize("beta2", [0.0, 0.5, 0.6, 2 / 3, 0.7, 0.8, 0.99])
def test_radam_agrees_with_pytorch_where_the_average_is_short(beta2: float, rng: np.random.Generator) -> None:
    """Up to beta2 = 2/3 it is never long enough; there the terms of the factor are zero or negative."""
    torch = peer("torch")
    w = rng.standard_normal(5)
    theirs = torch.tensor(w.copy(), requires_grad=True)
    opt, peer_opt = gb.RAdam([w], 0.03, beta2=beta2), torch.optim.RAdam([theirs], 0.03, betas=(0.9, beta2))
    for g in gradients(rng, 30, w.shape):
        opt.step([g])
        theirs.grad = torch.tensor(g)
        peer_opt.step()
    np.testing.assert_allclose(w, theirs.detach().numpy(), rtol=0, atol=1e-12)


def test_clipping_agrees_with_pytorch_and_optax(rng: np.random.Generator) -> None:
    optax, torch = peer("optax"), peer("torch")
    grads = {"a": rng.standard_normal((5, 4)), "b": rng.standard_normal(9)}
    expected, _ = optax.clip_by_global_norm(0.5).update({k: v.astype(np.float32) for k, v in grads.items()}, None)
    norm = torch.linalg.vector_norm(torch.cat([torch.tensor(g).ravel() for g in grads.values()]))
    assert gb.clip_by_global_norm(grads, 0.5) == pytest.approx(float(norm), rel=1e-14)
    for k, g in grads.items():
        np.testing.assert_allclose(g, expected[k], rtol=1e-6)


# --- one formula, every way to run it ------------------------------------------------------------------------------


@every_case
def test_a_step_follows_the_plain_formula(case: Case, dtype: np.dtype, rng: np.random.Generator) -> None:
    """NumPy evaluates the formula on whole arrays: equal bits, except where a division became a product."""
    w = rng.standard_normal(100_003).astype(dtype)
    opt = case.make([w], **NO_CHANGE_BY_HAND)
    values = {k: v for k, v in opt.hyper.items() if k in opt.rule.hyper or k in opt.rule.options}
    exact = not any(text.startswith("1 / ") for text in opt._trace.scalars)
    tolerance = {"rtol": 0, "atol": 0} if exact else dict.fromkeys(("rtol", "atol"), 16 * np.finfo(dtype).eps)
    plain_w, plain_state = w.copy(), [views.flat.copy() for views in opt.state.values()]
    for t, g in enumerate(gradients(rng, 4, w.shape, dtype), start=1):
        opt.step([g])
        plain_w, *plain_state = opt.rule(plain_w, g, *plain_state, t, **values)
        assert plain_w.dtype == dtype
        np.testing.assert_allclose(w, plain_w, **tolerance)
        for views, expected in zip(opt.state.values(), plain_state, strict=True):
            np.testing.assert_allclose(views.flat, expected, **tolerance)


@every_case
def test_flat_apart_and_strided_arrays_are_one(
    case: Case, backend: gb.Backend, dtype: np.dtype, rng: np.random.Generator
) -> None:
    shapes = {"W": (130, 70), "b": (70,), "none": (0, 3), "one": ()}
    start = {k: rng.standard_normal(s).astype(dtype) for k, s in shapes.items()}
    flat = gb.Parameters(start, backend, dtype)
    apart = {k: backend.asarray(v.copy()) for k, v in start.items()}
    optimizers = [case.make(flat), case.make(apart), case.make(flat_views := gb.Parameters(start, backend, dtype))]
    wide = np.zeros((130, 140), dtype)
    if backend.name == "cpu":  # a kernel takes contiguous arrays only
        strided = {**{k: v.copy() for k, v in start.items()}, "W": wide[:, ::2]}
        strided["W"][...] = start["W"]
        optimizers.append(case.make(strided))
    for _ in range(3):
        grads = {k: backend.asarray(rng.standard_normal(s).astype(dtype)) for k, s in shapes.items()}
        for k, g in grads.items():
            flat.grads[k] = g
        optimizers[0].step()
        for opt in optimizers[1:]:
            opt.step(grads)
    for k in shapes:
        expected = backend.to_numpy(flat[k])
        np.testing.assert_array_equal(backend.to_numpy(apart[k]), expected)
        np.testing.assert_array_equal(backend.to_numpy(flat_views[k]), expected)
        if backend.name == "cpu":
            np.testing.assert_array_equal(strided[k], expected)
    assert not wide[:, 1::2].any()


@every_case
def test_float32_follows_float64(case: Case, backend: gb.Backend, rng: np.random.Generator) -> None:
    w = rng.standard_normal(1000)
    single, double = backend.asarray(w.astype(np.float32)), backend.asarray(w)
    a, b = case.make([single]), case.make([double])
    for g in gradients(rng, 5, w.shape):
        a.step([backend.asarray(g.astype(np.float32))])
        b.step([backend.asarray(g)])
    assert single.dtype == np.float32
    assert {views.flat.dtype for views in a.state.values()} <= {np.dtype(np.float32)}
    # A condition or a sign may fall the other way where its operand is near zero; few elements may differ.
    error = np.abs(backend.to_numpy(single) - backend.to_numpy(double))
    assert np.quantile(error, 0.98) < 2e-5


@given(st.lists(st.lists(st.integers(0, 5), max_size=3).map(tuple), min_size=1, max_size=4), st.integers(1, 3))
def test_any_shapes(shapes: list[tuple[int, ...]], steps: int) -> None:
    rng = np.random.default_rng(0)
    w = [rng.standard_normal(s) for s in shapes]
    expected = [x.copy() for x in w]
    opt = gb.SGD(w, 0.5)
    for _ in range(steps):
        grads = [rng.standard_normal(s) for s in shapes]
        opt.step(grads)
        expected = [x - 0.5 * g for x, g in zip(expected, grads, strict=True)]
    for x, y in zip(w, expected, strict=True):
        np.testing.assert_array_equal(x, y)


# --- promises of the interface -------------------------------------------------------------------------------------


@every_case
def test_state_round_trip(case: Case, backend: gb.Backend, rng: np.random.Generator) -> None:
    start = rng.standard_normal((6, 4))
    grads = [backend.asarray(g) for g in gradients(rng, 6, start.shape)]
    whole, parts = backend.asarray(start.copy()), backend.asarray(start.copy())
    opt, first = case.make([whole]), case.make([parts])
    for g in grads:
        opt.step([g])
    for g in grads[:3]:
        first.step([g])
    saved = first.state_dict()
    json.dumps({k: v for k, v in saved.items() if k != "state"})
    saved["state"] = {k: {n: backend.to_numpy(a) for n, a in v.items()} for k, v in saved["state"].items()}
    second = case.make([parts])
    second.load_state_dict(saved)
    for g in grads[3:]:
        second.step([g])
    assert second.t == 6
    np.testing.assert_array_equal(backend.to_numpy(parts), backend.to_numpy(whole))


@every_case
def test_the_second_step_allocates_no_array(case: Case, rng: np.random.Generator) -> None:
    params = gb.Parameters({"W": (300, 400), "b": (400,)}, "cpu")
    opt = case.make(params)
    opt.step()
    tracemalloc.start()
    opt.step()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 16_000, "480 kB of parameters"


@pytest.mark.parametrize("decoupled", [False, True])
@every_case
def test_weight_decay_is_the_same_idea_for_all(case: Case, decoupled: bool, rng: np.random.Generator) -> None:
    w = rng.standard_normal(20)
    by_hand = w.copy()
    if "weight_decay" in case.make([w]).rule.hyper:
        with pytest.raises(gb.ArgumentError, match=r"decoupled must be False: .* applies weight decay itself"):
            case.make([w], decoupled=True)
        return
    a, b = case.make([w], weight_decay=0.3, decoupled=decoupled), case.make([by_hand], **NO_CHANGE_BY_HAND)
    for g in gradients(rng, 5, w.shape):
        a.step([g])
        if decoupled:
            by_hand *= 1 - LR * 0.3
            b.step([g])
        else:
            b.step([g + 0.3 * by_hand])
    np.testing.assert_allclose(w, by_hand, rtol=1e-9, atol=1e-12)


@every_case
def test_a_schedule_may_stand_for_the_learning_rate(case: Case, rng: np.random.Generator) -> None:
    seen: list[tuple[int, int]] = []

    def schedule(step: int, epoch: int) -> float:
        seen.append((step, epoch))
        return 0.1 / (1 + step + 10 * epoch)

    w, by_hand = np.ones(3), np.ones(3)
    opt, assigned = case.make([w], lr=schedule), case.make([by_hand])
    for i, g in enumerate(gradients(rng, 4, (3,))):
        opt.epoch = i // 2
        assigned.lr = 0.1 / (1 + i + 10 * (i // 2))
        assert opt.lr == assigned.lr
        assert opt.step([g]).lr == assigned.lr
        assigned.step([g])
    np.testing.assert_array_equal(w, by_hand)
    assert seen[::2] == [(0, 0), (1, 0), (2, 1), (3, 1)]


def test_any_hyper_parameter_may_be_a_schedule(rng: np.random.Generator) -> None:
    w, by_hand = np.ones(3), np.ones(3)
    opt = gb.Adam([w], beta1=gb.Piecewise([2], [0.5, 0.9], per="step"))
    first = gb.Adam([by_hand], beta1=0.5)
    grads = gradients(rng, 4, (3,))
    for g in grads:
        opt.step([g])
    for g in grads[:2]:
        first.step([g])
    second = gb.Adam([by_hand], beta1=0.9)
    saved = first.state_dict()
    saved["hyper"]["beta1"] = 0.9
    second.load_state_dict(saved)
    for g in grads[2:]:
        second.step([g])
    np.testing.assert_array_equal(w, by_hand)


def test_a_saved_schedule_comes_back() -> None:
    opt = gb.Adam([np.zeros(2)], lr=gb.CosineDecay(0.1, total=100, warmup=10, per="step"))
    other = gb.Adam([np.zeros(2)])
    other.load_state_dict(
        json.loads(json.dumps({**opt.state_dict(), "state": {"m": {"0": [0, 0]}, "v": {"0": [0, 0]}}}))
        | {"state": opt.state_dict()["state"]}
    )
    assert other.hyper["lr"] == gb.CosineDecay(0.1, total=100, warmup=10, per="step")


def test_a_step_reports_what_it_did() -> None:
    opt = gb.SGD([np.zeros(2)], lr=0.5)
    assert opt.step([np.ones(2)]) == gb.StepResult(applied=True, t=1, lr=0.5)
    assert opt.step(np.ones(2)) == gb.StepResult(applied=True, t=2, lr=0.5)
    assert (opt.t, opt.epoch) == (2, 0)


def test_arrays_of_other_libraries_are_changed_in_place() -> None:
    torch = peer("torch")
    w = torch.zeros(3, dtype=torch.float64)
    gb.SGD({"w": w}, lr=0.5).step({"w": torch.ones(3, dtype=torch.float64)})
    assert w.tolist() == [-0.5] * 3


@every_case
def test_a_parameter_may_be_its_own_gradient(case: Case, backend: gb.Backend, rng: np.random.Generator) -> None:
    start = rng.standard_normal(50)
    w, expected = backend.asarray(start.copy()), backend.asarray(start.copy())
    p = gb.Parameters({"w": start}, backend, "float64")
    a, b, c = case.make([w]), case.make([expected]), case.make(p)
    for _ in range(3):
        a.step([w])
        b.step([expected.copy()])
        c.step(p)
    np.testing.assert_array_equal(backend.to_numpy(w), backend.to_numpy(expected))
    np.testing.assert_array_equal(backend.to_numpy(p.flat), backend.to_numpy(expected))


def test_two_optimizers_share_nothing(rng: np.random.Generator) -> None:
    a, b, alone = np.zeros(3), np.zeros(3), np.zeros(3)
    one, two, single = gb.Adam([a]), gb.Adam([b]), gb.Adam([alone])
    for g in gradients(rng, 3, (3,)):
        one.step([g])
        two.step([-g])
        single.step([g])
    np.testing.assert_array_equal(a, alone)
    np.testing.assert_array_equal(b, -alone)


# --- clipping ------------------------------------------------------------------------------------------------------


def test_clipping_scales_to_the_norm_or_leaves_alone(backend: gb.Backend, dtype: np.dtype) -> None:
    params = gb.Parameters({"a": (2,), "b": (2,)}, backend, dtype)
    params.grads.flat[...] = 2.0
    assert gb.clip_by_global_norm(params.grads, 2.0) == 4.0
    np.testing.assert_allclose(backend.to_numpy(params.grads.flat), 1.0)
    assert gb.clip_by_global_norm(params.grads, 2.0) == 2.0
    np.testing.assert_array_equal(backend.to_numpy(params.grads.flat), 1.0)


def test_the_norm_does_not_overflow_in_float32() -> None:
    g = np.full(10, 1e30, np.float32)
    assert gb.clip_by_global_norm([g], 1.0) == pytest.approx(1e30 * 10**0.5, rel=1e-6)
    assert np.linalg.norm(g) == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_norm_that_is_not_finite_leaves_the_gradients(bad: float) -> None:
    g = np.array([1.0, bad])
    with pytest.raises(gb.NonFiniteError, match="global norm"):
        gb.clip_by_global_norm([g], 1.0)
    np.testing.assert_array_equal(g, [1.0, bad])


# --- numbers that are not finite -----------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, -np.inf])
@pytest.mark.parametrize("form", ["flat", "groups", "named", "apart", "half"])
def test_a_checked_step_refuses_gradients_before_anything_changes(form: str, bad: float, backend: gb.Backend) -> None:
    dtype = "float16" if form == "half" else "float32"
    params = gb.Parameters({"a": (3,), "b": (2, 2), "c": (5,)}, backend, dtype)
    groups = {"a": {"lr": 0.5}, "c": {"trainable": False}} if form == "groups" else None
    opt = gb.Adam(dict(params) if form == "apart" else params, check=True, groups=groups)
    grads = dict(params.grads) if form in ("named", "apart") else None
    params.grads.flat[...] = 300.0  # float16 has no number for the square
    params.grads["c"][...] = bad if form == "groups" else 1.0
    assert opt.step(grads).applied
    arrays = [params.flat, *(views.flat for views in opt.state.values())]
    before = [backend.to_numpy(array).copy() for array in arrays]
    params.grads["b"][0, 1] = bad
    with pytest.raises(
        gb.NonFiniteError, match=r"^1 of 4 numbers of grads\['b'\] are NaN or infinite at step 2; nothing"
    ):
        opt.step(grads)
    for array, values in zip(arrays, before, strict=True):
        np.testing.assert_array_equal(backend.to_numpy(array), values)
    assert opt.t == 1
    opt.step(grads, backend.asarray(np.array([1, 1], np.float32)))  # a step that is left out looks at nothing
    for array, values in zip(arrays, before, strict=True):
        np.testing.assert_array_equal(backend.to_numpy(array), values)


@pytest.mark.parametrize("apart", [False, True])
def test_a_cpu_notices_parameters_that_are_not_finite(apart: bool) -> None:
    """After the first step, and after each hundredth: what is NaN stays NaN."""
    for at, noticed in ((1, 1), (2, 101), (101, 101)):
        params = gb.Parameters({"a": (3,), "b": (2,)}, "cpu")
        opt = gb.SGD(dict(params) if apart else params, 0.5)
        for step in range(1, 150):
            params.grads.flat[...] = 1.0
            if step == at:
                params.grads["b"][0] = np.inf
            if step == noticed:
                text = (
                    rf"^1 of 2 numbers of params\['b'\] are NaN or infinite after step {step}: in one of the last 100 "
                )
                with pytest.raises(gb.NonFiniteError, match=text):
                    opt.step(dict(params.grads) if apart else None)
                break
            opt.step(dict(params.grads) if apart else None)
        assert params["a"].tolist() == [-0.5 * noticed] * 3


@pytest.mark.parametrize("check", [None, False])
def test_what_nobody_looks_at_is_not_finite(check: bool | None, backend: gb.Backend) -> None:
    """On request, and on a GPU, where nobody waits for it."""
    if check is None and backend.name == "cpu":
        pytest.skip("a CPU looks")
    w = backend.asarray(np.zeros(3))
    opt = gb.SGD([w], 0.5, check=check)
    assert opt.step([backend.asarray(np.full(3, np.nan))]).applied
    assert np.isnan(backend.to_numpy(w)).all()


def test_frozen_parameters_may_be_anything() -> None:
    params = gb.Parameters({"a": (3,), "b": (2,)}, "cpu")
    params["a"][...] = np.nan
    opt = gb.SGD(params, 0.5, groups={"a": {"trainable": False}})
    params.grads.flat[...] = 1.0
    assert opt.step().applied
    params.grads["a"][...] = np.nan
    assert gb.SGD(params, 0.5, groups={"a": {"trainable": False}}, check=True).step().applied
    assert params["b"].tolist() == [-1.0, -1.0]


# --- errors --------------------------------------------------------------------------------------------------------


def read_only() -> np.ndarray:
    w = np.zeros(2)
    w.flags.writeable = False
    return w


W = np.zeros((2, 3))
MASKED = np.ma.array(np.zeros((2, 3)), mask=[[0, 1, 0], [0, 0, 0]])
ERRORS = {
    "negative lr": (lambda: gb.Adam([W], lr=-0.1), ValueError, r"lr must be finite and in \[0, inf\), got -0.1"),
    "nan lr": (lambda: gb.SGD([W], lr=float("nan")), ValueError, "lr .* got nan"),
    "lr of a wrong type": (lambda: gb.SGD([W], lr="0.1"), TypeError, "lr must be a real number .* '0.1'"),
    "beta of one": (lambda: gb.Adam([W], beta1=1.0), ValueError, r"beta1 must be finite and in \[0, 1\), got 1.0"),
    "negative decay": (lambda: gb.SGD([W], 0.1, weight_decay=-1), ValueError, "weight_decay .* got -1.0"),
    "unknown name": (lambda: gb.Adam([W], beta=0.9), TypeError, "adam takes lr, beta1, .*'beta'; did you mean 'beta"),
    "unknown eps_at": (lambda: gb.Adam([W], eps_at="insde"), ValueError, "eps_at must be one of .*mean 'inside'"),
    "no hat in rmsprop": (
        lambda: gb.RMSProp([W], eps_at="hat"),
        ValueError,
        "eps_at must be one of 'outside', 'inside'",
    ),
    "no hat in adamax": (lambda: gb.Adamax([W], eps_at="hat"), ValueError, "eps_at must be one of .* got 'hat'"),
    "no hat in a corrected maximum": (
        lambda: gb.Adam([W], amsgrad="corrected", eps_at="hat"),
        ValueError,
        "eps_at must be one of 'outside', 'inside'",
    ),
    "unknown maximum": (
        lambda: gb.AdamW([W], amsgrad="correct"),
        ValueError,
        "amsgrad must be one of 'corrected', got 'correct'; did you mean 'corrected'",
    ),
    "dampening and Nesterov": (
        lambda: gb.HeavyBall([W], 0.1, nesterov=True, dampening=0.1),
        ValueError,
        "dampening must be 0 with nesterov=True, got 0.1",
    ),
    "dampening and lr in velocity": (
        lambda: gb.HeavyBall([W], 0.1, lr_in_velocity=True, dampening=0.1),
        ValueError,
        "dampening must be 0 with lr_in_velocity=True, got 0.1",
    ),
    "dampening of one": (lambda: gb.HeavyBall([W], 0.1, dampening=1), ValueError, r"dampening .* \[0, 1\), got 1.0"),
    "velocity without momentum": (
        lambda: gb.RMSProp([W], lr_in_velocity=True),
        ValueError,
        "lr_in_velocity=True needs momentum, got momentum=0",
    ),
    "nothing": (lambda: gb.SGD([], 0.1), ValueError, "params must hold at least one array"),
    "no arrays": (lambda: gb.SGD(3.0, 0.1), TypeError, "params must be Parameters, or a mapping"),
    "integers": (lambda: gb.SGD([np.zeros(2, int)], 0.1), TypeError, r"params\['0'\] must be float32 or float64"),
    "two types": (lambda: gb.SGD({"a": W, "b": W.astype("f")}, 0.1), TypeError, "'a' is float64, 'b' is float32"),
    "read-only": (lambda: gb.SGD({"a": read_only()}, 0.1), ValueError, r"params\['a'\] is read-only"),
    "masked": (lambda: gb.SGD([MASKED], 0.1), gb.NonFiniteError, r"params\['0'\] must have a value .* 1 of its 6 "),
    "masked gradient": (lambda: gb.SGD([W], 0.1).step([MASKED]), gb.NonFiniteError, r"grads\['0'\] must have a value"),
    "twice": (lambda: gb.SGD([W, W], 0.1), ValueError, "the same array twice"),
    "overlap": (lambda: gb.SGD({"a": W, "b": W[1:]}, 0.1), ValueError, r"params\['a'\] and params\['b'\] share memory"),
    "broadcast": (lambda: gb.SGD([expanded()], 0.1), ValueError, r"elements of params\['0'\] share memory, .* twice"),
    "no gradients": (lambda: gb.SGD([W], 0.1).step(), ValueError, "grads must be given"),
    "shape": (lambda: gb.SGD([W], 0.1).step([W.T]), ValueError, r"grads\['0'\] has shape \(3, 2\).*\(2, 3\)"),
    "type": (lambda: gb.SGD([W], 0.1).step([W.astype("f")]), TypeError, r"grads\['0'\] is float32.*float64"),
    "names": (
        lambda: gb.SGD({"a": W}, 0.1).step({"b": W}),
        ValueError,
        "grads must be for a; got b. Give None for a p",
    ),
    "a list": (lambda: gb.SGD({"a": W}, 0.1).step({"a": [1.0]}), TypeError, r"grads\['a'\] must be a NumPy or CuPy"),
    "not a rule": (lambda: gb.Optimizer(abs, [W]), TypeError, "rule must be made with @gpubatch.rule"),
    "bad schedule": (lambda: gb.SGD([W], lambda s, e: -1.0).step([W]), ValueError, "lr must be finite .* got -1.0"),
    "max_norm": (lambda: gb.clip_by_global_norm([W], 0), ValueError, r"max_norm .* \(0, inf\), got 0.0"),
    "other rule": (
        lambda: gb.SGD([W], 0.1).load_state_dict(gb.Adam([W]).state_dict()),
        ValueError,
        "of the rule 'adam', this optimizer's is 'sgd'",
    ),
    "other variant": (
        lambda: gb.Adam([W], eps_at="hat").load_state_dict(gb.Adam([W]).state_dict()),
        ValueError,
        "eps_at='outside', this optimizer has eps_at='hat'",
    ),
    "other shape": (
        lambda: gb.Adam([W]).load_state_dict(gb.Adam([np.zeros(2)]).state_dict()),
        ValueError,
        r"state\['m'\]\['0'\] has shape \(2,\), expected \(2, 3\)",
    ),
    "other type": (
        lambda: gb.Adam([W]).load_state_dict(gb.Adam([W.astype("f")]).state_dict()),
        TypeError,
        r"state\['m'\]\['0'\] is float32, expected float64",
    ),
    "check of a wrong type": (
        lambda: gb.SGD([W], 0.1, check="yes"),
        TypeError,
        "check must be True or False, got 'yes'",
    ),
    "groups of a wrong type": (
        lambda: gb.SGD([W], 0.1, groups=[{"lr": 0.2}]),
        TypeError,
        r"groups must map patterns over the names of parameters to settings, got \[",
    ),
    "settings of a wrong type": (
        lambda: gb.SGD([W], 0.1, groups={"0": 0.2}),
        TypeError,
        r"groups must map patterns to settings, as \{'b\*': .*, got '0': 0.2",
    ),
    "a pattern that matches nothing": (
        lambda: gb.SGD({"W1": W, "b1": W.copy()}, 0.1, groups={"b*": {}, "c*": {}}),
        ValueError,
        r"groups\['c\*'\] matches none of the parameters W1, b1",
    ),
    "a pattern too late": (
        lambda: gb.SGD({"W1": W, "b1": W.copy()}, 0.1, groups={"b*": {}, "b1": {}}),
        ValueError,
        r"groups\['b1'\] matches b1, which earlier patterns have taken: .*; the parameters are W1, b1",
    ),
    "unknown in a group": (
        lambda: gb.Adam([W], groups={"0": {"beta": 0.5}}),
        TypeError,
        r"groups\['0'\] takes lr, beta1, beta2, eps, weight_decay, trainable; got 'beta'; did you mean 'beta",
    ),
    "an option in a group": (
        lambda: gb.Adam([W], groups={"0": {"eps_at": "inside"}}),
        TypeError,
        r"groups\['0'\] takes lr, .*; got 'eps_at'",
    ),
    "out of range in a group": (
        lambda: gb.Adam([W], groups={"0": {"beta2": 1.0}}),
        ValueError,
        r"beta2 of groups\['0'\] must be finite and in \[0, 1\), got 1.0",
    ),
    "bad schedule in a group": (
        lambda: gb.SGD([W], 0.1, groups={"0": {"lr": lambda s, e: -1.0}}).step([W.copy()]),
        ValueError,
        r"lr of groups\['0'\] must be finite .* got -1.0",
    ),
    "no schedule in a group": (
        lambda: gb.SGD([W], 0.1, groups={"0": {"lr": lambda s: 0.1}}),
        TypeError,
        r"lr of groups\['0'\] must be a number or a schedule",
    ),
    "trainable of a wrong type": (
        lambda: gb.SGD([W], 0.1, groups={"0": {"trainable": 0}}),
        TypeError,
        r"trainable of groups\['0'\] must be",
    ),
    "frozen with a rate": (
        lambda: gb.SGD([W, W.copy()], 0.1, groups={"0": {"trainable": False, "lr": 0.2}}),
        ValueError,
        r"groups\['0'\] is not trainable, so it cannot have lr",
    ),
    "all frozen": (
        lambda: gb.SGD([W], 0.1, groups={"*": {"trainable": False}}),
        ValueError,
        "groups must leave at least one parameter trainable",
    ),
    "a group that is not there": (
        lambda: gb.SGD([W], 0.1, groups={"0": {}}).set_group("1", lr=0.1),
        ValueError,
        r"pattern must be one of the groups' \('0'\), got '1'",
    ),
    "a rate for frozen": (
        lambda: gb.SGD([W, W.copy()], 0.1, groups={"0": {"trainable": False}}).set_group("0", lr=0.1),
        ValueError,
        r"groups\['0'\] is not trainable, so it cannot have lr",
    ),
    "to freeze later": (
        lambda: gb.SGD([W], 0.1, groups={"0": {}}).set_group("0", trainable=False),
        ValueError,
        r"groups\['0'\] was made trainable: to freeze it, make another optimizer",
    ),
    "gradients of the trained alone": (
        lambda: gb.SGD([W, W.copy()], 0.1, groups={"0": {"trainable": False}}).step([W.copy()]),
        ValueError,
        "grads must be for 1; got 0. Give None",
    ),
    "another value of a wrong type": (
        lambda: gb.SGD([W], 0.1, groups={"0": {}}).set_group("0", lr="x"),
        TypeError,
        r"lr of groups\['0'\] must be a real number",
    ),
    "a state of other groups": (
        lambda: gb.SGD([W], 0.1, groups={"0": {}}).load_state_dict(gb.SGD([W], 0.1).state_dict()),
        ValueError,
        "state_dict has the groups none, this optimizer '0'",
    ),
    "a state of frozen groups": (
        lambda: gb.SGD([W, W.copy()], 0.1).load_state_dict(
            gb.SGD([W, W.copy()], 0.1, groups={"1": {"trainable": False}}).state_dict()
        ),
        ValueError,
        r"state_dict has the groups '1' \(not trainable\), this optimizer none",
    ),
    "a state with more missed than made": (
        lambda: gb.SGD([W], 0.1).load_state_dict({**gb.SGD([W], 0.1).state_dict(), "missed": {"0": 1}}),
        ValueError,
        r"missed\['0'\] must be .* got 1",
    ),
    "part of a state": (lambda: gb.Adam([W]).load_state_dict({"t": 1}), ValueError, "state_dict lacks"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_argument_range_and_value(name: str) -> None:
    call, kind, message = ERRORS[name]
    with pytest.raises(kind, match=message) as raised:
        call()
    assert isinstance(raised.value, gb.GpubatchError)


def test_a_refused_state_changes_nothing() -> None:
    w = np.ones(2)
    opt = gb.Adam([w])
    opt.step([w])
    before = opt.state_dict()
    bad = gb.Adam([w]).state_dict() | {"t": 7}
    bad["state"]["v"]["0"] = np.zeros(3)
    with pytest.raises(gb.ShapeError):
        opt.load_state_dict(bad)
    after = opt.state_dict()
    assert after["t"] == 1
    np.testing.assert_array_equal(after["state"]["m"]["0"], before["state"]["m"]["0"])


# --- float16, scale and skip -----------------------------------------------------------------------------------------


def test_master_weights_follow_float32(backend: gb.Backend, rng: np.random.Generator) -> None:
    start = rng.standard_normal(1000).astype(np.float16)
    halves, floats = (gb.Parameters({"w": start.astype(d)}, backend, d) for d in ("float16", "float32"))
    a, b = gb.Adam(halves, lr=0.01, master_weights=True), gb.Adam(floats, lr=0.01)
    for _ in range(5):
        g = rng.standard_normal(1000).astype(np.float16)
        halves.grads.flat[...] = backend.asarray(g)
        floats.grads.flat[...] = backend.asarray(g.astype(np.float32))
        a.step()
        b.step()
    on_host = backend.to_numpy(floats.flat)
    np.testing.assert_array_equal(backend.to_numpy(a.state["master"]["w"]), on_host)
    np.testing.assert_array_equal(backend.to_numpy(halves.flat), on_host.astype(np.float16))
    assert {views.dtype for views in a.state.values()} == {np.dtype(np.float32)}
    again = gb.Adam(halves, lr=0.01, master_weights=True)
    again.load_state_dict(a.state_dict())
    np.testing.assert_array_equal(backend.to_numpy(again.state["master"].flat), on_host)


def test_small_steps_are_lost_without_master_weights() -> None:
    """1 - 1e-4 is nearer to 1 than to the next float16; a hundred such steps are 0.99."""
    for master, expected in ((False, 1.0), (True, 0.99)):
        w = np.ones(3, np.float16)
        opt = gb.SGD([w], 1e-4, master_weights=master)
        for _ in range(100):
            opt.step([np.ones(3, np.float16)])
        np.testing.assert_allclose(w, expected, rtol=1e-3)


def test_master_weights_are_for_float16() -> None:
    with pytest.raises(gb.ArgumentError, match=r"master_weights=True is for float16 parameters, these are float32"):
        gb.SGD([np.zeros(3, np.float32)], 0.1, master_weights=True)


@pytest.mark.parametrize("apart", [False, True])
def test_a_step_is_scaled_or_left_out(apart: bool, backend: gb.Backend) -> None:
    params = gb.Parameters({"a": (3,), "b": (2,)}, backend)
    params.grads.flat[...] = 8.0
    opt = gb.SGD(dict(params) if apart else params, 0.5)
    grads = dict(params.grads) if apart else None
    control = backend.asarray(np.array([0.25, 0], np.float32))
    assert opt.step(grads, control).applied
    np.testing.assert_array_equal(backend.to_numpy(params.flat), -1.0)
    control[1] = 1
    result = opt.step(grads, control)
    np.testing.assert_array_equal(backend.to_numpy(params.flat), -1.0)
    if backend.name == "cpu":
        assert (result.applied, result.t, opt.t) == (False, 1, 1)
    for wrong in (np.zeros(3, np.float32), np.zeros(2)):
        with pytest.raises(gb.ShapeError, match="control must be two numbers of float32"):
            opt.step(grads, backend.asarray(wrong))


def test_clipping_measures_any_array(rng: np.random.Generator) -> None:
    g = rng.standard_normal((40, 30))
    for grad in (g, g.astype(np.float32), g.T.copy().T, g[:, ::2], g.astype(np.float16)):
        expected = np.linalg.norm(grad.astype(np.float64))
        np.testing.assert_allclose(gb.clip_by_global_norm([grad], 1e9), expected, rtol=1e-6)


# --- without a step -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adam", "momentum"])
def test_a_rehearsal_leaves_no_trace(name: str, backend: gb.Backend, dtype: np.dtype) -> None:
    params = gb.Parameters({"a": (7, 3), "b": (5,)}, backend, dtype)
    opt = {"adam": gb.Adam, "momentum": gb.HeavyBall}[name](params, lr=0.1)
    params.grads.flat[...] = -0.5
    opt.step()
    opt.state["v"].flat[0] = -0.0
    arrays = [params.flat, *(views.flat for views in opt.state.values())]
    before = [backend.to_numpy(array).tobytes() for array in arrays]
    params.grads.flat[...] = np.inf
    rehearse_update(opt)
    assert [backend.to_numpy(array).tobytes() for array in arrays] == before
    assert opt.t == 1


def test_a_rehearsal_writes_to_the_memory_of_the_state() -> None:
    """Zeros take no memory before the first write, so the first step could run out of memory."""
    if not sys.platform.startswith("linux"):
        pytest.skip("/proc is Linux's")

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    params = gb.Parameters({"w": (1 << 24,)}, "cpu")
    opt = gb.Adam(params)
    before = resident()
    rehearse_update(opt)
    assert resident() - before > 0.9 * 2 * (1 << 26)


def test_gradients_in_another_order_go_to_their_parameters() -> None:
    """Views of a flat buffer with the parameters' names and shapes, in another order."""
    params = gb.Parameters({"W": (2, 2), "b": (4,), "V": (2, 2)}, backend="cpu", dtype="float64")
    opt = gb.SGD(params, 1.0)
    grads = FlatViews(np.arange(12.0), {"V": (2, 2), "b": (4,), "W": (2, 2)})
    opt.step(grads)
    for name in params:
        np.testing.assert_array_equal(params[name], -grads[name])
    twin = FlatViews(np.arange(12.0), params.shapes)
    before = params.flat.copy()
    opt.step(twin)
    np.testing.assert_array_equal(params.flat, before - np.arange(12.0))


def test_a_schedule_that_takes_no_epoch_is_refused_when_it_is_given() -> None:
    with pytest.raises(
        gb.DTypeError, match=r"^lr must be a number or a schedule, a function of \(step, epoch\), .*\(step\) cannot be"
    ):
        gb.SGD([np.zeros(2)], lambda step: 0.1)
    opt = gb.SGD([np.zeros(2)], 0.1)
    with pytest.raises(gb.DTypeError, match=r"^lr must be a number or a schedule"):
        opt.lr = lambda step, epoch, more: 0.1  # type: ignore[assignment,misc]
    assert opt.lr == 0.1
    opt.lr = max  # type: ignore[assignment]  # a built-in function without a signature
    assert opt.lr == 0


def test_a_network_given_for_its_parameters_is_told_so() -> None:
    with pytest.raises(gb.DTypeError, match=r"^params must be .* got a gpubatch.*Network; give its .parameters$"):
        gb.Adam(gb.mlp([3, 2], backend="cpu"))


def test_matrices_of_numpy_are_arrays() -> None:
    """Their products are others, which the look at what is finite stumbled over."""
    w = np.ones((2, 2)).view(np.matrix)
    gb.SGD([w], lr=0.5).step([np.ones((2, 2)).view(np.matrix)])
    np.testing.assert_array_equal(w, np.full((2, 2), 0.5))
