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

from gpubatch import schedules
from gpubatch.errors import ArgumentError, DTypeError
from gpubatch.schedules import (
    CosineDecay,
    ExponentialDecay,
    InverseTimeDecay,
    Piecewise,
    SqrtDecay,
    StepDecay,
    from_dict,
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
]
table = pytest.mark.parametrize(("schedule", "known"), TABLE, ids=lambda x: None if isinstance(x, dict) else repr(x))
kinds = {name: kind for name, kind in vars(schedules).items() if inspect.isclass(kind) and is_dataclass(kind)}


def at(schedule, n):
    """The value at count n; the other count is set elsewhere."""
    return schedule(n, 12345) if schedule.per == "step" else schedule(12345, n)


def test_table_is_complete():
    assert {type(schedule) for schedule, _ in TABLE} == set(kinds.values())
    assert set(schedules.KINDS) == set(kinds) == set(schedules.__all__) - {"Schedule", "from_dict", "to_dict"}
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
    wide = {
        name: value if isinstance(value, (str, bool)) else [np.asarray(v)[()] for v in value]
        if isinstance(value, tuple) else np.asarray(value)[()]
        for name, value in vars(schedule).items()
    }  # fmt: skip
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
        schedule.per = "step"


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


def torch_curve(make, lr):
    torch = peer("torch")
    optimizer = torch.optim.SGD([torch.zeros(1, dtype=torch.float64)], lr=lr)
    scheduler = make(torch.optim.lr_scheduler, optimizer)
    curve = []
    for _ in range(STEPS):
        curve.append(scheduler.get_last_lr()[0])
        optimizer.step()
        with warnings.catch_warnings():  # SequentialLR calls its own parts in a deprecated way
            warnings.simplefilter("ignore", UserWarning)
            scheduler.step()
    return curve


def cosine_after_warmup(s, o):
    warm = s.LinearLR(o, start_factor=1 / 8, total_iters=7)
    return s.SequentialLR(o, [warm, s.CosineAnnealingLR(o, T_max=32, eta_min=0.01)], milestones=[8])


@pytest.mark.parametrize(
    ("schedule", "make"),
    [
        (ExponentialDecay(0.3, 0.9), lambda s, o: s.ExponentialLR(o, gamma=0.9)),
        (StepDecay(0.3, factor=0.5, every=7), lambda s, o: s.StepLR(o, step_size=7, gamma=0.5)),
        (Piecewise([3, 20], [0.3, 0.03, 0.003]), lambda s, o: s.MultiStepLR(o, milestones=[3, 20], gamma=0.1)),
        (
            CosineDecay(0.3, STEPS, final=0.01, per="step"),
            lambda s, o: s.CosineAnnealingLR(o, T_max=STEPS, eta_min=0.01),
        ),
    ],
    ids=lambda x: type(x).__name__,
)
def test_as_in_torch(schedule, make):
    np.testing.assert_allclose([at(schedule, n) for n in range(STEPS)], torch_curve(make, 0.3), rtol=1e-12)


def test_warmup_and_cosine_as_in_torch():
    ours = [CosineDecay(0.3, 40, warmup=8, final=0.01, per="step")(n, 0) for n in range(40)]
    np.testing.assert_allclose(ours, torch_curve(cosine_after_warmup, 0.3)[:40], rtol=1e-12)


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
    ],
    ids=lambda x: repr(x) if is_dataclass(x) else None,
)
def test_as_in_optax(schedule, make):
    optax, jax = peer("optax"), peer("jax")
    with jax.enable_x64(True):
        theirs = [float(make(optax)(jax.numpy.asarray(n, dtype="int64"))) for n in range(STEPS)]
    np.testing.assert_allclose([at(schedule, n) for n in range(STEPS)], theirs, rtol=1e-12)


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
