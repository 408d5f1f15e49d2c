"""Learning-rate decay against closed forms, the course notes, and the libraries that use the same formulas."""

from __future__ import annotations

import inspect
import json
import math
import re
import typing
import warnings
from dataclasses import FrozenInstanceError, is_dataclass

import numpy as np
import pytest
from hypothesis import given, strategies as st
from needs import peer

import gpubatch
from gpubatch import schedules
from gpubatch.errors import ArgumentError, DTypeError
from gpubatch.schedules import (
    Chain,
    CosineDecay,
    CosineRestarts,
    Cyclic,
    ExponentialDecay,
    InverseTimeDecay,
    LinearDecay,
    OneCycle,
    Piecewise,
    PolynomialDecay,
    Product,
    SqrtDecay,
    StepDecay,
    chain,
    from_dict,
    product,
    to_dict,
)

# schedule, and {n: value} worked out by hand, at both ends and where it switches
TABLE = [
    # deeplearning.ai, course 2 week 2: alpha0 = 0.2, decay_rate = 1 gives 0.1, 0.067, 0.05, 0.04 in epochs 1 to 4
    (InverseTimeDecay(0.2, 1), {0: 0.2, 1: 0.1, 2: 0.2 / 3, 3: 0.05, 4: 0.04, 10**9: 0.2 / (1 + 10**9)}),
    (InverseTimeDecay(0.2, 1, every=4), {0: 0.2, 1: 0.16, 2: 0.2 / 1.5, 4: 0.1, 6: 0.08}),
    (InverseTimeDecay(0.2, 1, every=4, staircase=True), {0: 0.2, 3: 0.2, 4: 0.1, 7: 0.1, 8: 0.2 / 3}),
    (ExponentialDecay(1.0), {0: 1.0, 1: 0.95, 2: 0.9025, 3: 0.857375, 10**6: 0.0}),
    (ExponentialDecay(0.1, 0.25, per="step", every=2), {0: 0.1, 1: 0.05, 2: 0.025, 3: 0.0125}),
    (ExponentialDecay(0.1, 0.25, every=2, staircase=True), {0: 0.1, 1: 0.1, 2: 0.025, 3: 0.025, 4: 0.00625}),
    (SqrtDecay(0.3), {0: 0.3, 3: 0.15, 8: 0.1, 99: 0.03}),
    (SqrtDecay(0.3, k=2.0, per="step"), {0: 0.6, 3: 0.3, 8: 0.2, 99: 0.06}),
    (StepDecay(0.8), {0: 0.8, 9: 0.8, 10: 0.4, 19: 0.4, 20: 0.2, 30: 0.1}),
    (StepDecay(0.8, factor=0.1, every=3, per="step"), {0: 0.8, 2: 0.8, 3: 0.08, 6: 0.008}),
    (Piecewise([2, 5], [0.1, 0.01, 0.001]), {0: 0.1, 1: 0.1, 2: 0.01, 4: 0.01, 5: 0.001, 10**9: 0.001}),
    (Piecewise([], [0.1], per="step"), {0: 0.1, 7: 0.1}),
    (CosineDecay(0.4, 6, per="step"), {0: 0.4, 2: 0.3, 3: 0.2, 4: 0.1, 6: 0.0, 7: 0.0, 10**9: 0.0}),
    (
        CosineDecay(0.4, 10, warmup=4, final=0.04, per="epoch"),
        {0: 0.1, 1: 0.2, 2: 0.3, 3: 0.4, 4: 0.4, 6: 0.31, 7: 0.22, 8: 0.13, 10: 0.04, 11: 0.04},
    ),
    (CosineDecay(0.4, 2, warmup=1, per="step"), {0: 0.4, 1: 0.4, 2: 0.0}),
    (
        CosineDecay(0.4, 8, warmup=2, first=0.1, start=4, final=0.2, per="epoch"),
        {0: 0.1, 1: 0.25, 2: 0.4, 4: 0.4, 6: 0.3, 8: 0.2, 9: 0.2},
    ),
    (LinearDecay(0.4, 4), {0: 0.4, 1: 0.3, 2: 0.2, 4: 0.0, 5: 0.0, 10**9: 0.0}),
    (LinearDecay(0.1, 4, final=0.5, per="step"), {0: 0.1, 1: 0.2, 3: 0.4, 4: 0.5, 9: 0.5}),
    (LinearDecay(0.4, 8, warmup=2, final=0.2, first=0.0, start=4), {0: 0.0, 1: 0.2, 2: 0.4, 4: 0.4, 6: 0.3, 8: 0.2}),
    (PolynomialDecay(0.4, 4, power=2.0), {0: 0.4, 1: 0.225, 2: 0.1, 3: 0.025, 4: 0.0, 5: 0.0}),
    (PolynomialDecay(0.9, 5, warmup=1, final=0.1, power=0.5), {0: 0.9, 1: 0.9, 4: 0.5, 5: 0.1, 6: 0.1}),
    (CosineRestarts(0.4, 4), {0: 0.4, 2: 0.2, 4: 0.4, 6: 0.2, 8: 0.4, 4 * 10**8: 0.4}),
    (
        CosineRestarts(0.5, 2, factor=2, final=0.1, shrink=0.5, per="step"),
        {0: 0.5, 1: 0.3, 2: 0.3, 4: 0.2, 6: 0.2, 10: 0.15, 14: 0.15},
    ),
    (Cyclic(0.1, 0.5, up=2, per="step"), {0: 0.1, 1: 0.3, 2: 0.5, 3: 0.3, 4: 0.1, 6: 0.5, 4 * 10**8 + 1: 0.3}),
    (Cyclic(0.1, 0.5, 2, down=4, mode="triangular2", per="epoch"), {0: 0.1, 2: 0.5, 3: 0.4, 6: 0.1, 8: 0.3, 14: 0.2}),
    (Cyclic(0.1, 0.5, 2, mode="exp_range", gamma=0.5, per="step"), {0: 0.1, 1: 0.2, 2: 0.2, 3: 0.125, 6: 0.10625}),
    (
        OneCycle(1.0, 11, rise=6 / 11, first=0.5, final=0.1, anneal="linear", per="step"),
        {0: 0.5, 1: 0.6, 5: 1.0, 6: 0.82, 10: 0.1, 11: 0.1, 10**9: 0.1},
    ),
    (OneCycle(0.5, 10, per="epoch"), {0: 0.02, 1: 0.26, 2: 0.5, 9: 0.000002, 10: 0.000002}),
    (
        OneCycle(1.0, 15, rise=0.4, first=0.5, final=0.1, anneal="linear", three_phase=True, per="step"),
        {0: 0.5, 1: 0.6, 5: 1.0, 6: 0.9, 10: 0.5, 11: 0.4, 14: 0.1, 15: 0.1},
    ),
    (
        chain([LinearDecay(0.0, 4, final=0.4), 0.4, StepDecay(0.4, every=2), 0], [4, 6, 10]),
        {0: 0.0, 1: 0.1, 4: 0.4, 5: 0.4, 6: 0.4, 7: 0.4, 8: 0.2, 9: 0.2, 10: 0.0, 11: 0.0},
    ),
    (
        chain(
            [chain([0.1, 0.2], [2], per="step"), product(ExponentialDecay(0.4, 0.5, per="step"), 2)], [3], per="step"
        ),
        {0: 0.1, 1: 0.1, 2: 0.2, 3: 0.8, 4: 0.4, 5: 0.2},
    ),
    (product(ExponentialDecay(0.4, 0.5), Piecewise([2], [0.1, 1.0])), {0: 0.04, 1: 0.02, 2: 0.1, 3: 0.05}),
]
table = pytest.mark.parametrize(("schedule", "known"), TABLE, ids=lambda x: None if isinstance(x, dict) else repr(x))
kinds = {name: kind for name, kind in vars(schedules).items() if inspect.isclass(kind) and is_dataclass(kind)}


def at(schedule, n):
    """The value at count n; the other count is set elsewhere."""
    return schedule(n, 12345) if getattr(schedule, "per", "") == "step" else schedule(12345, n)


def test_table_is_complete():
    assert {type(schedule) for schedule, _ in TABLE} == set(kinds.values())
    assert set(schedules.KINDS) == set(kinds)
    public = set(gpubatch.EXPORTS["schedules"].split())
    assert public == set(kinds) - {"Chain", "Product"} | {"chain", "product"}
    assert typing.get_args(schedules.Schedule) == ([int, int], float)


@table
def test_known_values(schedule, known):
    for n, value in known.items():
        assert at(schedule, n) == pytest.approx(value, rel=1e-14, abs=1e-17), n


@table
def test_result_is_a_python_float_whatever_the_counts_are(schedule, known):
    for n in known:
        assert type(at(schedule, n)) is float
        assert type(at(schedule, np.int64(n))) is float
        assert at(schedule, np.int64(n)) == at(schedule, n)


@table
def test_arguments_of_numpy_give_the_same_schedule(schedule, known):
    def wide_of(value):
        if isinstance(value, tuple):
            return [wide_of(v) for v in value]
        plain = value is None or callable(value) or isinstance(value, (str, bool))
        return value if plain else np.asarray(value)[()]

    wide = {name: wide_of(value) for name, value in vars(schedule).items()}
    again = type(schedule)(**wide)
    assert again == schedule
    assert json.dumps(to_dict(again)) == json.dumps(to_dict(schedule))


@table
def test_round_trip_through_json(schedule, known):
    d = to_dict(schedule)
    again = from_dict(json.loads(json.dumps(d)))
    assert again == schedule
    assert d == json.loads(json.dumps(d))
    assert d["schedule"] == type(schedule).__name__
    assert [at(again, n) for n in known] == [at(schedule, n) for n in known]


@table
def test_frozen_and_hashable(schedule, known):
    assert len({schedule, from_dict(to_dict(schedule))}) == 1
    with pytest.raises(FrozenInstanceError):
        schedule.lr = 1.0


@table
def test_repr_is_the_call_that_makes_it(schedule, known):
    assert eval(repr(schedule), vars(schedules)) == schedule


def test_fields_left_out_take_their_defaults():
    assert from_dict({"schedule": "ExponentialDecay", "lr": 0.1}) == ExponentialDecay(0.1)


@given(st.floats(1e-6, 10), st.floats(0, 10), st.integers(1, 300), st.integers(0, 299), st.integers(0, 1000), st.data())
def test_cosine_stays_between_its_ends(lr, final, total, warmup, n, data):
    schedule = CosineDecay(lr, total, warmup % total, final, per="step")
    low, high = sorted([lr, final])
    if n >= schedule.warmup:
        assert low * (1 - 1e-15) <= schedule(n, 0) <= high * (1 + 1e-15)
    assert schedule(schedule.warmup, 0) == lr
    assert schedule(total + n, 0) == final


# --- against other libraries ----------------------------------------------------------------------------------------

STEPS = 60
LONG = 300
LR = 0.3

# Every class of torch.optim.lr_scheduler: what takes its place, how it is made there, and "lr" or "momentum".
TORCH = {
    "LambdaLR": [(lambda step, epoch: LR * 0.9**epoch, lambda s, o: s.LambdaLR(o, lambda epoch: 0.9**epoch), "lr")],
    "MultiplicativeLR": [(ExponentialDecay(LR, 0.95), lambda s, o: s.MultiplicativeLR(o, lambda epoch: 0.95), "lr")],
    "StepLR": [(StepDecay(LR, factor=0.5, every=7), lambda s, o: s.StepLR(o, step_size=7, gamma=0.5), "lr")],
    "MultiStepLR": [
        (
            Piecewise([3, 20], [LR, LR / 10, LR / 100]),
            lambda s, o: s.MultiStepLR(o, milestones=[3, 20], gamma=0.1),
            "lr",
        )
    ],
    "ConstantLR": [(Piecewise([40], [LR / 4, LR]), lambda s, o: s.ConstantLR(o, factor=0.25, total_iters=40), "lr")],
    "LinearLR": [
        (
            LinearDecay(LR / 4, 90, final=0.75 * LR),
            lambda s, o: s.LinearLR(o, start_factor=0.25, end_factor=0.75, total_iters=90),
            "lr",
        ),
        (LinearDecay(LR, LONG), lambda s, o: s.LinearLR(o, start_factor=1, end_factor=0, total_iters=LONG), "lr"),
    ],
    "ExponentialLR": [(ExponentialDecay(LR, 0.99), lambda s, o: s.ExponentialLR(o, gamma=0.99), "lr")],
    "PolynomialLR": [
        (PolynomialDecay(LR, 200), lambda s, o: s.PolynomialLR(o, total_iters=200), "lr"),
        (PolynomialDecay(LR, 200, power=2.5), lambda s, o: s.PolynomialLR(o, total_iters=200, power=2.5), "lr"),
    ],
    "CosineAnnealingLR": [
        (
            CosineDecay(LR, LONG, final=0.01, per="epoch"),
            lambda s, o: s.CosineAnnealingLR(o, T_max=LONG, eta_min=0.01),
            "lr",
        )
    ],
    "SequentialLR": [
        (
            chain([LinearDecay(LR / 8, 20, final=LR), ExponentialDecay(LR, 0.98), StepDecay(LR, every=30)], [20, 150]),
            lambda s, o: s.SequentialLR(
                o,
                [
                    s.LinearLR(o, start_factor=1 / 8, total_iters=20),
                    s.ExponentialLR(o, gamma=0.98),
                    s.StepLR(o, step_size=30, gamma=0.5),
                ],
                milestones=[20, 150],
            ),
            "lr",
        ),
        (
            CosineDecay(LR, 300, warmup=8, final=0.01, per="epoch"),
            lambda s, o: s.SequentialLR(
                o,
                [s.LinearLR(o, 1 / 8, total_iters=7), s.CosineAnnealingLR(o, T_max=292, eta_min=0.01)],
                milestones=[8],
            ),
            "lr",
        ),
    ],
    "ChainedScheduler": [
        (
            product(Piecewise([20], [LR / 10, LR]), ExponentialDecay(1.0, 0.99), LinearDecay(0.5, 50, final=1.0)),
            lambda s, o: s.ChainedScheduler(
                [
                    s.ConstantLR(o, factor=0.1, total_iters=20),
                    s.ExponentialLR(o, gamma=0.99),
                    s.LinearLR(o, start_factor=0.5, total_iters=50),
                ]
            ),
            "lr",
        )
    ],
    "CyclicLR": [
        (
            Cyclic(0.1, 0.5, up=7, down=13, mode=mode, gamma=0.99, per="epoch"),
            lambda s, o, mode=mode: s.CyclicLR(o, 0.1, 0.5, 7, 13, mode=mode, gamma=0.99, cycle_momentum=False),
            "lr",
        )
        for mode in ("triangular", "triangular2", "exp_range")
    ]
    + [
        (
            Cyclic(0.9, 0.8, up=16, per="epoch"),
            lambda s, o: s.CyclicLR(o, 0.1, 0.5, 16, base_momentum=0.8, max_momentum=0.9),
            "momentum",
        )
    ],
    "CosineAnnealingWarmRestarts": [
        (
            CosineRestarts(LR, 10, factor, final=0.01),
            lambda s, o, factor=factor: s.CosineAnnealingWarmRestarts(o, T_0=10, T_mult=factor, eta_min=0.01),
            "lr",
        )
        for factor in (1, 2, 3)
    ],
    "OneCycleLR": [
        (
            OneCycle(LR, LONG, rise, anneal=anneal, three_phase=three, per="epoch"),
            lambda s, o, a=anneal[:3], three=three, rise=rise: s.OneCycleLR(
                o, LR, LONG, pct_start=rise, anneal_strategy=a.replace("lin", "linear"), three_phase=three
            ),
            "lr",
        )
        for anneal in ("cosine", "linear")
        for three, rise in ((False, 0.3), (True, 0.37))
    ]
    + [
        (
            OneCycle(0.8, LONG, first=0.9, final=0.9, three_phase=three, per="epoch"),
            lambda s, o, three=three: s.OneCycleLR(o, LR, LONG, base_momentum=0.8, max_momentum=0.9, three_phase=three),
            "momentum",
        )
        for three in (False, True)
    ],
}
ROWS = [(name, *row) for name, of_name in TORCH.items() for row in of_name]
IDS = [f"{row[0]} {i}" for i, row in enumerate(ROWS)]
rows = pytest.mark.parametrize(("name", "schedule", "make", "what"), ROWS, ids=IDS)


def torch_made(make):
    torch = peer("torch")
    optimizer = torch.optim.SGD([torch.zeros(1, dtype=torch.float64)], lr=LR, momentum=0.9)
    return optimizer, make(torch.optim.lr_scheduler, optimizer)


def test_every_scheduler_of_torch_has_a_row():
    others = {"LRScheduler", "ReduceLROnPlateau"}  # the base class; gpubatch.ReduceOnPlateau is a callback of fit
    assert set(TORCH) == set(peer("torch").optim.lr_scheduler.__all__) - others


@rows
def test_as_in_torch(name, schedule, make, what):
    """Step by step, each from the one before, over hundreds of steps."""
    optimizer, scheduler = torch_made(make)
    assert type(scheduler).__name__ == name
    theirs = []
    for _ in range(LONG):
        theirs.append(optimizer.param_groups[0][what])
        optimizer.step()
        with warnings.catch_warnings():  # SequentialLR calls its own parts in a deprecated way
            warnings.simplefilter("ignore", UserWarning)
            if len(theirs) < LONG:
                scheduler.step()
    ours = [schedule(12345, n) for n in range(LONG)]
    np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-14)


@rows
def test_as_in_the_closed_form_of_torch(name, schedule, make, what):
    _, scheduler = torch_made(make)
    if not hasattr(scheduler, "_get_closed_form_lr"):
        return  # LambdaLR, CyclicLR and OneCycleLR are closed forms; the others have none
    for n in range(LONG):
        scheduler.last_epoch = n
        assert schedule(12345, n) == pytest.approx(scheduler._get_closed_form_lr()[0], rel=1e-12, abs=1e-14)


@pytest.mark.parametrize(
    ("schedule", "make"),
    [
        (
            ExponentialDecay(0.3, 0.5, per="step", every=7),
            lambda o: o.exponential_decay(0.3, transition_steps=7, decay_rate=0.5),
        ),
        (
            ExponentialDecay(0.3, 0.5, per="step", every=7, staircase=True),
            lambda o: o.exponential_decay(0.3, transition_steps=7, decay_rate=0.5, staircase=True),
        ),
        (
            Piecewise([3, 20], [0.3, 0.03, 0.003], per="step"),
            lambda o: o.piecewise_constant_schedule(0.3, {3: 0.1, 20: 0.1}),
        ),
        (
            CosineDecay(0.3, 40, warmup=8, final=0.03, per="step"),
            lambda o: o.join_schedules(
                [o.linear_schedule(0.3 / 8, 0.3, 7), o.cosine_decay_schedule(0.3, 32, alpha=0.1)], [8]
            ),
        ),
        (
            CosineDecay(0.3, 40, warmup=8, first=0.01, final=0.03, per="step"),
            lambda o: o.warmup_cosine_decay_schedule(0.01, 0.3, warmup_steps=8, decay_steps=40, end_value=0.03),
        ),
        (LinearDecay(0.3, 40, final=0.03, start=10, per="step"), lambda o: o.linear_schedule(0.3, 0.03, 30, 10)),
        (
            PolynomialDecay(0.3, 40, final=0.03, start=10, power=2.5, per="step"),
            lambda o: o.polynomial_schedule(0.3, 0.03, 2.5, 30, 10),
        ),
        (
            chain([LinearDecay(0.01, 8, final=0.3, per="step"), ExponentialDecay(0.3, 0.9, per="step")], [8], "step"),
            lambda o: o.warmup_exponential_decay_schedule(0.01, 0.3, 8, transition_steps=1, decay_rate=0.9),
        ),
        (
            chain(
                [CosineDecay(0.3 / 25, 18, final=0.3, per="step"), CosineDecay(0.3, 42, final=0.3 / 25e4, per="step")],
                [18],
                per="step",
            ),
            lambda o: o.cosine_onecycle_schedule(60, 0.3, pct_start=0.3),
        ),
        (
            CosineRestarts(0.3, 8, factor=2, final=0.03, per="step"),
            lambda o: o.sgdr_schedule(
                [
                    {"init_value": 0.3, "peak_value": 0.3, "warmup_steps": 0, "decay_steps": n, "end_value": 0.03}
                    for n in (8, 16, 32, 64)
                ]
            ),
        ),
    ],
    ids=lambda x: repr(x) if is_dataclass(x) else None,
)
def test_as_in_optax(schedule, make):
    optax, jax = peer("optax"), peer("jax")
    with jax.enable_x64(True):
        theirs = [float(make(optax)(jax.numpy.asarray(n, dtype="int64"))) for n in range(STEPS)]
    np.testing.assert_allclose([at(schedule, n) for n in range(STEPS)], theirs, rtol=1e-12)


def test_restarts_as_in_keras():
    """Its formula finds the restart by a logarithm (keras/src/optimizers/schedules/learning_rate_schedule.py)."""

    def keras(n, lr, first, t_mul, m_mul, alpha):
        fraction = n / first
        if t_mul == 1:
            restart = math.floor(fraction)
            fraction -= restart
        else:
            restart = math.floor(math.log(1 - fraction * (1 - t_mul)) / math.log(t_mul) + 1e-12)
            fraction = (fraction - (1 - t_mul**restart) / (1 - t_mul)) / t_mul**restart
        decayed = (1 - alpha) * 0.5 * m_mul**restart * (1 + math.cos(math.pi * fraction)) + alpha
        return lr * decayed

    for factor, shrink in ((1, 1.0), (2, 0.9), (3, 0.5)):
        ours = CosineRestarts(0.3, 7, factor, final=0.03, shrink=shrink)
        theirs = [keras(n, 0.3, 7, factor, shrink, 0.1) for n in range(LONG)]
        np.testing.assert_allclose([ours(0, n) for n in range(LONG)], theirs, rtol=1e-12)


def test_a_chain_counts_its_own_unit_from_each_boundary():
    """A schedule by epoch after a warm-up by step counts the epochs of the run; so does a function."""
    schedule = chain([LinearDecay(0.0, 100, final=0.4, per="step"), StepDecay(0.4, every=2)], [100], per="step")
    assert [schedule(50, 0), schedule(100, 1), schedule(150, 2)] == [0.2, 0.4, 0.2]
    seen = chain([0.1, lambda step, epoch: step + epoch / 10], [3])
    assert (seen(7, 2), seen(7, 5)) == (0.1, 7.2)


# --- in optimizers ----------------------------------------------------------------------------------------------------


@table
def test_an_optimizer_has_it_in_its_state(schedule, known):
    w = np.zeros(2, "f4")
    opt, again = gpubatch.SGD([w], lr=schedule), gpubatch.SGD([w], lr=1.0)
    again.load_state_dict(json.loads(json.dumps(opt.state_dict())))
    assert again.hyper["lr"] == schedule
    for n in list(known)[:4]:
        again.t = again.epoch = n
        assert again.lr == schedule(n, n)


def test_momentum_may_be_a_schedule():
    momentum = Cyclic(0.9, 0.8, up=2, per="step")
    opt, w, v = gpubatch.HeavyBall([np.ones(1)], lr=0.1, mu=momentum), 1.0, 0.0
    for n in range(6):
        opt.step([np.ones(1)])
        v = momentum(n, 0) * v + 1
        w -= 0.1 * v
    assert opt.params["0"][0] == pytest.approx(w, rel=1e-15)


def test_a_chain_with_a_function_is_saved_by_its_name_as_the_function_is():
    own = chain([0.1, lambda step, epoch: 0.2], [3])
    assert not schedules.is_known(own)
    w = np.zeros(2, "f4")
    state = gpubatch.SGD([w], lr=own).state_dict()
    assert state["hyper"]["lr"] == {"callable": "Chain"}
    kept = gpubatch.SGD([w], lr=own)
    kept.load_state_dict(state)
    assert kept.hyper["lr"] is own
    with pytest.raises(DTypeError, match="to be written as a dict, got <function"):
        to_dict(own)


def test_schedules_that_older_versions_saved():
    """They lack the fields that came later, which is no difference."""
    old = {"schedule": "CosineDecay", "lr": 0.1, "total": 6, "warmup": 0, "final": 0.0, "per": "epoch"}
    now = CosineDecay(0.1, 6, per="epoch")
    assert schedules.up_to_date({"lr": old, "weight_decay": 0.0}) == {"lr": to_dict(now), "weight_decay": 0.0}


@pytest.mark.parametrize(
    ("schedule", "said"),
    [
        (lambda step: 0.1, r"<lambda>\(step\) cannot be called with two arguments"),
        (lambda step, epoch, lr: 0.1, r"<lambda>\(step, epoch, lr\) cannot"),
        (lambda *, step, epoch: 0.1, r"<lambda>\(\*, step, epoch\) cannot"),
    ],
)
def test_a_schedule_of_another_signature_is_refused_when_it_is_given(schedule, said):
    message = r"must be a number or a schedule, a function of \(step, epoch\), both counted from 0: .*" + said
    w = np.zeros(2, "f4")
    opt = gpubatch.SGD([w], lr=0.1, groups={"0": {"lr": 0.2}})
    with pytest.raises(DTypeError, match="^lr " + message):
        gpubatch.SGD([w], lr=schedule)
    with pytest.raises(DTypeError, match="^lr " + message):
        opt.lr = schedule
    with pytest.raises(DTypeError, match=r"^lr of groups\['0'\] " + message):
        opt.set_group("0", lr=schedule)
    with pytest.raises(DTypeError, match=r"^schedules\[1\] of chain " + message):
        chain([0.1, schedule], [1])
    with pytest.raises(DTypeError, match=r"^schedules\[0\] of product " + message):
        product(schedule, 0.1)
    opt.lr = lambda *counts: 0.1
    assert opt.lr == 0.1


def test_square_root_as_in_scikit_learn():
    optimizers = peer("sklearn.neural_network._stochastic_optimizers")
    theirs = optimizers.SGDOptimizer([np.zeros(1)], learning_rate_init=0.3, lr_schedule="invscaling", power_t=0.5)
    for n in range(STEPS):
        theirs.iteration_ends(n)
        assert SqrtDecay(0.3, per="step")(n, 0) == pytest.approx(theirs.learning_rate, rel=1e-14)


# --- bad arguments --------------------------------------------------------------------------------------------------

BAD = [
    (InverseTimeDecay, {"lr": -0.1, "decay_rate": 1}, ArgumentError, r"lr must be finite and in \[0, inf\), got -0.1"),
    (InverseTimeDecay, {"lr": 0.1, "decay_rate": -1}, ArgumentError, r"decay_rate must be .*got -1"),
    (
        InverseTimeDecay,
        {"lr": 0.1, "decay_rate": 1, "every": 0},
        ArgumentError,
        r"every must be an integer >= 1, got 0",
    ),
    (
        InverseTimeDecay,
        {"lr": 1, "decay_rate": 1, "staircase": 1},
        DTypeError,
        r"staircase must be True or False, got 1",
    ),
    (InverseTimeDecay, {"lr": 1, "decay_rate": 1, "per": "batch"}, ArgumentError, r"'epoch', 'step', got 'batch'"),
    (ExponentialDecay, {"lr": math.nan}, ArgumentError, r"lr must be finite .*got nan"),
    (ExponentialDecay, {"lr": 0.1, "per": "Epoch"}, ArgumentError, r"per must be .*'Epoch'; did you mean 'epoch'\?"),
    (ExponentialDecay, {"lr": 0.1, "rate": 0}, ArgumentError, r"rate must be finite and in \(0, inf\), got 0"),
    (ExponentialDecay, {"lr": 0.1, "every": 1.5}, DTypeError, r"every must be an integer >= 1, got 1.5"),
    (ExponentialDecay, {"lr": 0.1, "staircase": "no"}, DTypeError, r"staircase must be True or False, got 'no'"),
    (SqrtDecay, {"lr": "0.1"}, DTypeError, r"lr must be a real number .*'0.1' of type str"),
    (SqrtDecay, {"lr": 0.1, "k": -1}, ArgumentError, r"k must be .*got -1"),
    (SqrtDecay, {"lr": 0.1, "per": None}, ArgumentError, r"per must be one of .*got None"),
    (StepDecay, {"lr": math.inf}, ArgumentError, r"lr must be finite .*got inf"),
    (StepDecay, {"lr": 0.1, "factor": -0.5}, ArgumentError, r"factor must be .*got -0.5"),
    (StepDecay, {"lr": 0.1, "every": 0}, ArgumentError, r"every must be an integer >= 1, got 0"),
    (StepDecay, {"lr": 0.1, "per": "s"}, ArgumentError, r"per must be one of .*got 's'"),
    (Piecewise, {"boundaries": [3, 3], "values": [1, 2, 3]}, ArgumentError, r"strictly increasing, got \[3, 3\]"),
    (Piecewise, {"boundaries": [3], "values": [1]}, ArgumentError, r"values must be .*got 1 values for 1 boundaries"),
    (Piecewise, {"boundaries": [-1], "values": [1, 2]}, ArgumentError, r"boundaries\[0\] must be .* >= 0, got -1"),
    (Piecewise, {"boundaries": [1, 2.5], "values": [1, 2, 3]}, DTypeError, r"boundaries\[1\] must be an integer"),
    (Piecewise, {"boundaries": [1], "values": [1, math.nan]}, ArgumentError, r"values\[1\] must be finite"),
    (Piecewise, {"boundaries": [1], "values": [1, 2], "per": "x"}, ArgumentError, r"per must be one of .*got 'x'"),
    (CosineDecay, {"lr": -1, "total": 10}, ArgumentError, r"lr must be .*got -1"),
    (CosineDecay, {"lr": 0.1, "total": 0}, ArgumentError, r"total must be an integer >= 1, got 0"),
    (CosineDecay, {"lr": 0.1, "total": 10, "warmup": 10}, ArgumentError, r"warmup must be .*between 0 and 9, got 10"),
    (CosineDecay, {"lr": 0.1, "total": 10, "final": -1e-3}, ArgumentError, r"final must be .*got -0.001"),
    (CosineDecay, {"lr": 0.1, "total": 10, "per": "t"}, ArgumentError, r"per must be one of .*got 't'"),
    (CosineDecay, {"lr": 0.1, "total": 10, "per": "step", "first": -1}, ArgumentError, r"first must be .*got -1"),
    (
        CosineDecay,
        {"lr": 0.1, "total": 10, "per": "step", "warmup": 3, "start": 2},
        ArgumentError,
        r"start must be .*between 3 and 9, got 2",
    ),
    *(
        (kind, {"lr": 0.1, "total": 10, **given}, ArgumentError, message)
        for kind in (LinearDecay, PolynomialDecay)
        for given, message in (
            ({"lr": -1}, "lr must be .*got -1"),
            ({"total": 0}, "total must be an integer >= 1, got 0"),
            ({"warmup": 10}, "warmup must be .*got 10"),
            ({"final": -1}, "final must be .*got -1"),
            ({"per": "t"}, "per must be one of .*got 't'"),
            ({"first": -1}, "first must be .*got -1"),
            ({"start": 10}, "start must be .*between 0 and 9, got 10"),
        )
    ),
    (PolynomialDecay, {"lr": 0.1, "total": 10, "power": 0}, ArgumentError, r"power must be .*got 0"),
    *(
        (CosineRestarts, {"lr": 0.1, "length": 10, **given}, ArgumentError, message)
        for given, message in (
            ({"lr": -1}, "lr must be .*got -1"),
            ({"length": 0}, "length must be an integer >= 1, got 0"),
            ({"factor": 0}, "factor must be an integer >= 1, got 0"),
            ({"final": -1}, "final must be .*got -1"),
            ({"shrink": 1.5}, r"shrink must be finite and in \[0, 1\], got 1.5"),
            ({"per": "t"}, "per must be one of .*got 't'"),
        )
    ),
    *(
        (Cyclic, {"lr": 0.1, "peak": 0.2, "up": 5, "per": "step", **given}, ArgumentError, message)
        for given, message in (
            ({"lr": -1}, "lr must be .*got -1"),
            ({"peak": -1}, "peak must be .*got -1"),
            ({"up": 0}, "up must be an integer >= 1, got 0"),
            ({"down": 0}, "down must be an integer >= 1, got 0"),
            ({"mode": "triangle"}, "mode must be one of .*'triangle'; did you mean 'triangular'"),
            ({"gamma": 0}, "gamma must be .*got 0"),
            ({"per": ""}, "per must be one of 'epoch', 'step', got ''"),
        )
    ),
    *(
        (OneCycle, {"lr": 0.1, "total": 10, "per": "step", **given}, error, message)
        for given, error, message in (
            ({"lr": -1}, ArgumentError, "lr must be .*got -1"),
            ({"total": 1}, ArgumentError, "total must be an integer >= 2, got 1"),
            ({"rise": 0.1}, ArgumentError, r"rise must be above 1 / total = 0.1 and below 1 here, got 0.1"),
            ({"rise": 1}, ArgumentError, r"rise must be finite and in \(0, 1\), got 1"),
            ({"rise": 0.5, "three_phase": True}, ArgumentError, r"rise must be above .* and below 0.5 here, got 0.5"),
            ({"first": -1}, ArgumentError, "first must be .*got -1"),
            ({"final": -1}, ArgumentError, "final must be .*got -1"),
            ({"anneal": "cos"}, ArgumentError, "anneal must be one of 'cosine', 'linear', got 'cos'"),
            ({"three_phase": 1}, DTypeError, "three_phase must be True or False, got 1"),
            ({"per": ""}, ArgumentError, "per must be one of 'epoch', 'step', got ''"),
        )
    ),
    *(
        (Chain, {"schedules": [0.1, 0.2], "boundaries": [3], **given}, ArgumentError, message)
        for given, message in (
            ({"schedules": [0.1]}, r"schedules of chain must be two or more, got \[0.1\]"),
            ({"schedules": [0.1, -1]}, r"schedules\[1\] of chain must be .*got -1"),
            ({"schedules": [0.1, 0.2, 0.3]}, "schedules must be one more than boundaries, got 3 schedules for 1"),
            ({"boundaries": [0]}, r"boundaries\[0\] must be an integer >= 1, got 0"),
            ({"schedules": [1, 2, 3], "boundaries": [3, 2]}, r"boundaries must be strictly increasing, got \[3, 2\]"),
            ({"per": "t"}, "per must be one of .*got 't'"),
        )
    ),
    (Product, {"schedules": [0.1]}, ArgumentError, r"schedules of product must be two or more"),
]


@pytest.mark.parametrize(("kind", "arguments", "error", "message"), BAD, ids=[f"{k.__name__} {a}" for k, a, *_ in BAD])
def test_bad_arguments(kind, arguments, error, message):
    with pytest.raises(error, match=message):
        kind(**arguments)


def test_every_field_has_a_bad_value():
    blamed = set()
    for kind, arguments, error, _ in BAD:
        with pytest.raises(error) as caught:
            kind(**arguments)
        blamed.add((kind, re.match(r"\w+", str(caught.value))[0]))
    assert blamed == {(kind, name) for kind in kinds.values() for name in inspect.signature(kind).parameters}


@pytest.mark.parametrize(
    ("d", "message"),
    [
        ({"schedule": "CosineDecy"}, r"'Piecewise'.*did you mean 'CosineDecay'\?"),
        ({"lr": 0.1}, r"schedule must be one of 'InverseTimeDecay'.*got None"),
        ({"schedule": "SqrtDecay", "lr": 0.1, "gamma": 2}, r"SqrtDecay has lr, k, per, got 'gamma'"),
        ({"schedule": "CosineDecay", "lr": 1}, r"CosineDecay needs total, got lr"),
        ({"schedule": "CosineDecay", "lr": 1, "total": -3}, r"total must be an integer >= 1, got -3"),
    ],
)
def test_bad_dicts(d, message):
    with pytest.raises(ArgumentError, match=message):
        from_dict(d)


def test_a_function_cannot_be_written_as_a_dict():
    with pytest.raises(DTypeError, match=r"one of InverseTimeDecay, .*CosineDecay.*<lambda>"):
        to_dict(lambda step, epoch: 0.1)


def test_cosine_decay_counts_epochs_as_the_others_do_and_says_that_this_is_new() -> None:
    with pytest.warns(FutureWarning, match="^CosineDecay without per= counts epochs now") as warned:
        schedule = CosineDecay(0.4, 6)
    assert warned[0].filename == __file__
    assert schedule == CosineDecay(0.4, 6, per="epoch")
    assert schedules.from_dict(schedules.to_dict(schedule)) == schedule
