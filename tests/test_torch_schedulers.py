"""The sequences of PyTorch's tests of its schedulers (test/optim/test_lrscheduler.py), by gpubatch's schedules.

Each row has the settings of one of those tests, or of several, and is compared with the schedulers themselves. What no
row reproduces is listed with its reason.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
from needs import peer

import gpubatch as gb
from gpubatch.schedules import (
    CosineDecay,
    CosineRestarts,
    Cyclic,
    ExponentialDecay,
    LinearDecay,
    OneCycle,
    Piecewise,
    PolynomialDecay,
    StepDecay,
    chain,
    from_dict,
    product,
    to_dict,
)

# PyTorch's own: SequentialLR calls its parts in a deprecated way, and before a step.
pytestmark = [
    pytest.mark.exhaustive,  # tests/test_schedules.py has a row for every class
    pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step"),
    pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step"),
]

LRS = (0.05, 0.5)  # of two groups of parameters
LEAST = 1e-10  # of the cosines


def constant(factor: float, until: int) -> Callable[[float], Piecewise]:
    return lambda lr: Piecewise([until], [factor * lr, lr])


def linear(first: float, last: float, total: int) -> Callable[[float], LinearDecay]:
    return lambda lr: LinearDecay(first * lr, total, final=last * lr)


def milestones(lr: float) -> Piecewise:
    return Piecewise([2, 5, 9], [lr, lr / 10, lr / 100, lr / 1000])


def stairs(lr: float) -> StepDecay:
    return StepDecay(lr, factor=0.1, every=3)


def cosine(lr: float) -> CosineDecay:
    return CosineDecay(lr, 10, final=LEAST, per="epoch")


def both(*factors: Callable[[float], Any]) -> Callable[[float], Any]:
    return lambda lr: product(factors[0](lr), *(factor(1.0) for factor in factors[1:]))


class Row(NamedTuple):
    """Schedules of a group with this learning rate; what is made in PyTorch; how many values; which tests want them."""

    ours: Callable[[float], Any]
    theirs: Callable[[Any, Any], Any]
    steps: int
    tests: str
    what: str = "lr"


ROWS = [
    Row(
        stairs,
        lambda s, o: s.StepLR(o, 3, 0.1),
        20,
        "step_lr get_last_lr_step_lr closed_form_step_lr step_lr_is_constant_for_constant_epoch step_lr_state_dict "
        "chained_lr1",
    ),
    Row(
        milestones,
        lambda s, o: s.MultiStepLR(o, [2, 5, 9], 0.1),
        20,
        "multi_step_lr get_last_lr_multi_step_lr multi_step_lr_with_epoch closed_form_multi_step_lr "
        "multi_step_lr_state_dict",
    ),
    Row(
        constant(0.5, 5),
        lambda s, o: s.ConstantLR(o, 0.5, 5),
        10,
        "constantlr get_last_lr_constantlr constantlr_with_epoch constantlr_is_constant_for_constant_epoch",
    ),
    Row(constant(1 / 3, 4), lambda s, o: s.ConstantLR(o, 1 / 3, 4), 20, "closed_form_constantlr"),
    Row(
        linear(0.5, 1, 4),
        lambda s, o: s.LinearLR(o, 0.5, total_iters=4),
        10,
        "linearlr linearlr_with_epoch linear_linearlr_is_constant_for_constant_epoch",
    ),
    Row(linear(0.25, 0.6, 4), lambda s, o: s.LinearLR(o, 0.25, 0.6, 4), 10, "get_last_lr_linearlr"),
    Row(linear(1 / 3, 0.7, 4), lambda s, o: s.LinearLR(o, 1 / 3, 0.7, 4), 20, "closed_form_linearlr"),
    Row(
        lambda lr: ExponentialDecay(lr, 0.9),
        lambda s, o: s.ExponentialLR(o, 0.9),
        20,
        "exp_lr closed_form_exp_lr exponential_lr_is_constant_for_constant_epoch exp_step_lr_state_dict",
    ),
    Row(
        lambda lr: PolynomialDecay(lr, 5, power=0.9),
        lambda s, o: s.PolynomialLR(o, 5, 0.9),
        20,
        "poly_lr closed_form_poly_lr polynomial_lr_is_constant_for_constant_epoch",
    ),
    Row(cosine, lambda s, o: s.CosineAnnealingLR(o, 10, LEAST), 11, "cos_anneal_lr cosine_lr_state_dict"),
    Row(
        lambda lr: lambda step, epoch: lr * 0.9**epoch,
        lambda s, o: s.LambdaLR(o, lambda epoch: 0.9**epoch),
        10,
        "lambda_lr lambda_lr_state_dict_fn lambda_lr_state_dict_obj",
    ),
    Row(
        lambda lr: ExponentialDecay(lr, 0.95),
        lambda s, o: s.MultiplicativeLR(o, lambda epoch: 0.95),
        10,
        "multiplicative_lr",
    ),
    # one after another
    Row(
        lambda lr: chain([ExponentialDecay(lr, 0.8), StepDecay(lr, factor=0.1, every=4)], [3]),
        lambda s, o: s.SequentialLR(o, [s.ExponentialLR(o, 0.8), s.StepLR(o, 4, 0.1)], [3]),
        19,
        "sequentiallr1 sequentiallr_no_warnings",
    ),
    Row(
        lambda lr: chain([constant(0.1, 3)(lr), ExponentialDecay(lr, 0.9)], [3]),
        lambda s, o: s.SequentialLR(o, [s.ConstantLR(o, 0.1, 3), s.ExponentialLR(o, 0.9)], [3]),
        13,
        "sequentiallr2",
    ),
    Row(
        lambda lr: chain([constant(0.1, 3)(lr), ExponentialDecay(lr, 0.8), StepDecay(lr, factor=0.1, every=2)], [3, 6]),
        lambda s, o: s.SequentialLR(o, [s.ConstantLR(o, 0.1, 3), s.ExponentialLR(o, 0.8), s.StepLR(o, 2, 0.1)], [3, 6]),
        12,
        "sequentiallr3 get_last_lr_sequentiallr",
    ),
    Row(
        lambda lr: chain([constant(1, 5)(lr), constant(0.1, 5)(lr)], [10]),
        lambda s, o: s.SequentialLR(o, [s.ConstantLR(o, 1), s.ConstantLR(o, 0.1)], [10]),
        20,
        "sequentiallr4",
    ),
    Row(
        lambda lr: chain([both(linear(0.1, 1, 5), constant(0.1, 5))(lr), constant(0.5, 5)(lr)], [5]),
        lambda s, o: s.SequentialLR(
            o,
            [
                s.ChainedScheduler([s.LinearLR(o, 0.1, total_iters=5), s.ConstantLR(o, 0.1, 5)]),
                s.ConstantLR(o, 0.5, 5),
            ],
            [5],
        ),
        10,
        "sequentiallr5",
    ),
    Row(
        lambda lr: chain([linear(0.1, 0.8, 4)(lr), linear(0.8, 0.1, 4)(lr)], [4]),
        lambda s, o: s.SequentialLR(
            o, [s.LinearLR(o, 0.1, 0.8, total_iters=4), s.LinearLR(o, 0.8, 0.1, total_iters=4)], [4]
        ),
        8,
        "sequentiallr_does_not_alias_lr_and_initial_lr",
    ),
    # several at once
    Row(linear(0.4, 1, 3), lambda s, o: s.ChainedScheduler([s.LinearLR(o, 0.4, total_iters=3)]), 10, "chained_lr2"),
    Row(
        both(linear(0.4, 1, 3), lambda lr: Piecewise([4, 8, 10], [lr, lr / 10, lr / 100, lr / 1000])),
        lambda s, o: s.ChainedScheduler([s.LinearLR(o, 0.4, total_iters=3), s.MultiStepLR(o, [4, 8, 10], 0.1)]),
        12,
        "chained_lr3 chained_lr2_get_last_lr_before_step",
    ),
    Row(
        both(lambda lr: ExponentialDecay(lr, 0.9), constant(0.2, 4), stairs),
        lambda s, o: s.ChainedScheduler([s.ExponentialLR(o, 0.9), s.ConstantLR(o, 0.2, 4), s.StepLR(o, 3, 0.1)]),
        9,
        "chained_lr4",
    ),
    Row(
        both(lambda lr: PolynomialDecay(lr, 5, power=0.9), constant(0.1, 5)),
        lambda s, o: s.ChainedScheduler([s.PolynomialLR(o, 5, 0.9), s.ConstantLR(o, 0.1, 5)]),
        10,
        "chained_lr5",
    ),
    Row(
        both(stairs, milestones),
        lambda s, o: [s.StepLR(o, 3, 0.1), s.MultiStepLR(o, [2, 5, 9], 0.1)],
        10,
        "compound_step_and_multistep_lr",
    ),
    Row(
        both(stairs, lambda lr: ExponentialDecay(lr, 0.9)),
        lambda s, o: [s.StepLR(o, 3, 0.1), s.ExponentialLR(o, 0.9)],
        10,
        "compound_step_and_exp_lr",
    ),
    Row(
        both(milestones, lambda lr: ExponentialDecay(lr, 0.9)),
        lambda s, o: [s.MultiStepLR(o, [2, 5, 9], 0.1), s.ExponentialLR(o, 0.9)],
        10,
        "compound_exp_and_multistep_lr",
    ),
    Row(
        both(linear(0.4, 0.9, 4), lambda lr: ExponentialDecay(lr, 0.9)),
        lambda s, o: [s.LinearLR(o, 0.4, 0.9, 4), s.ExponentialLR(o, 0.9)],
        10,
        "compound_exp_and_linearlr",
    ),
    Row(
        both(stairs, constant(0.4, 4)),
        lambda s, o: [s.StepLR(o, 3, 0.1), s.ConstantLR(o, 0.4, 4)],
        10,
        "compound_step_and_constantlr",
    ),
    Row(
        both(milestones, linear(0.4, 1, 4)),
        lambda s, o: [s.MultiStepLR(o, [2, 5, 9], 0.1), s.LinearLR(o, 0.4, total_iters=4)],
        10,
        "compound_linearlr_and_multistep_lr",
    ),
    Row(
        both(cosine, stairs),
        lambda s, o: [s.CosineAnnealingLR(o, 10, LEAST), s.StepLR(o, 3, 0.1)],
        10,
        "compound_cosanneal_and_step_lr",
    ),
    Row(
        both(cosine, milestones),
        lambda s, o: [s.CosineAnnealingLR(o, 10, LEAST), s.MultiStepLR(o, [2, 5, 9], 0.1)],
        10,
        "compound_cosanneal_and_multistep_lr",
    ),
    Row(
        both(cosine, linear(0.4, 1, 4)),
        lambda s, o: [s.LinearLR(o, 0.4, total_iters=4), s.CosineAnnealingLR(o, 10, LEAST)],
        10,
        "compound_cosanneal_and_linearlr",
    ),
    Row(
        both(cosine, lambda lr: ExponentialDecay(lr, 0.1)),
        lambda s, o: [s.CosineAnnealingLR(o, 10, LEAST), s.ExponentialLR(o, 0.1)],
        10,
        "compound_cosanneal_and_exp_lr",
    ),
    # cycles
    Row(
        lambda lr: Cyclic(1, 5, up=4, per="epoch"),
        lambda s, o: s.CyclicLR(o, 1, 5, 4, base_momentum=1, max_momentum=5),
        11,
        "cycle_lr_triangular_mode_one_lr cycle_lr_triangular_mode_one_lr_no_momentum cycle_lr_triangular_mode "
        "cycle_lr_with_momentumless_optimizer cycle_lr_state_dict_picklable",
    ),
    *(
        Row(
            lambda lr, mode=mode, up=up, down=down, ends=ends: Cyclic(
                *ends, up=up, down=down, mode=mode, gamma=0.9, per="epoch"
            ),
            lambda s, o, mode=mode, up=up, down=down: s.CyclicLR(
                o, 1, 5, up, down, mode=mode, gamma=0.9, base_momentum=1, max_momentum=5
            ),
            24,
            tests,
            what,
        )
        for mode, up, down, names in (
            ("triangular2", 4, 4, ("triangular2_mode_one_lr", "triangular2_mode")),
            ("exp_range", 4, 4, ("exp_range_mode_one_lr", "exp_range_mode")),
            ("triangular", 4, 6, ("triangular_mode_step_size_up_down",)),
            ("triangular2", 2, 6, ("triangular2_mode_step_size_up_down",)),
            ("exp_range", 2, 6, ("exp_range_mode_step_size_up_down",)),
        )
        for what, ends, tests in (
            ("lr", (1, 5), " ".join(f"cycle_lr_{name}" for name in names)),
            ("momentum", (5, 1), ""),
        )
    ),
    *(
        Row(
            lambda lr, anneal=anneal, ends=ends: OneCycle(*ends[:1], 10, anneal=anneal, **ends[1], per="epoch"),
            lambda s, o, anneal=anneal: s.OneCycleLR(
                o,
                25,
                10,
                final_div_factor=2,
                base_momentum=1,
                max_momentum=22,
                anneal_strategy=anneal[:3].replace("lin", "linear"),
            ),
            10,
            tests if what == "lr" else "",
            what,
        )
        for anneal, tests in (
            ("linear", "onecycle_lr_linear_annealing cycle_lr_with_adam"),
            ("cosine", "onecycle_lr_cosine_annealing onecycle_lr_legacy_state_dict"),
        )
        for what, ends in (("lr", (25, {"first": 1, "final": 0.5})), ("momentum", (1, {"first": 22, "final": 22})))
    ),
    *(
        Row(
            lambda lr, ends=ends: OneCycle(
                *ends[:1], 10, 0.4, anneal="linear", three_phase=True, **ends[1], per="epoch"
            ),
            lambda s, o: s.OneCycleLR(
                o,
                25,
                10,
                pct_start=0.4,
                final_div_factor=4,
                three_phase=True,
                base_momentum=1,
                max_momentum=22,
                anneal_strategy="linear",
            ),
            10,
            "onecycle_lr_linear_annealing_three_phases" if what == "lr" else "",
            what,
        )
        for what, ends in (("lr", (25, {"first": 1, "final": 0.25})), ("momentum", (1, {"first": 22, "final": 22})))
    ),
    # restarts
    *(
        Row(
            lambda lr, factor=factor: CosineRestarts(lr, 10, factor, final=LEAST),
            lambda s, o, factor=factor: s.CosineAnnealingWarmRestarts(o, 10, factor, LEAST),
            100,
            "CosineAnnealingWarmRestarts_lr1 CosineAnnealingWarmRestarts_lr_state_dict" if factor == 1 else "",
        )
        for factor in (1, 2, 4)
    ),
]
OTHER_SEQUENCES = {
    "test_restarts_at_fractions_of_an_epoch": "CosineAnnealingWarmRestarts_lr2 CosineAnnealingWarmRestarts_lr3",
    "test_averaging_begins_with_a_rate_of_its_own": "swalr_no_anneal swalr_cosine_anneal_after_multiplicative "
    "swalr_linear_anneal_after_multiplicative swa_lr_state_dict",
    "test_cosine_then_cyclic": "cosine_then_cyclic",
    "test_reductions": " ".join(f"reduce_lr_on_plateau{i}" for i in range(1, 9)) + " reduce_lr_on_plateau_state_dict",
    "test_reductions_of_schedules": " ".join(f"compound_reduce_lr_on_plateau{i}" for i in range(1, 6)),
    "test_bad_arguments": "cycle_lr_invalid_mode onecycle_lr_invalid_anneal_strategy onecycle_lr_invalid_pct_start "
    "onecycle_lr_cannot_calculate_total_steps",
    "test_every_class_is_saved": "lr_scheduler_state_dict_load lr_scheduler_checkpoint",
}
DO_NOT_APPLY = {
    "nobody calls step() in a wrong order: an optimizer asks its schedule, a function of counts": "old_pattern_warning "
    "old_pattern_warning_with_arg old_pattern_warning_resuming old_pattern_warning_resuming_with_arg "
    "old_pattern_warning_with_overridden_optim_step new_pattern_no_warning new_pattern_no_warning_with_arg "
    "new_pattern_no_warning_with_overridden_optim_step error_when_getlr_has_epoch",
    "a schedule has no optimizer, no state and no initial learning rate that lives elsewhere": "no_cyclic_references "
    "no_cyclic_references_in_step cycle_lr_removed_after_out_of_scope reduce_lr_on_plateau_get_last_lr_before_step "
    "reduce_lr_on_plateau_preserves_lr_type constant_initial_lr constant_initial_params_cyclelr "
    "constant_initial_params_onecyclelr constant_initial_params_swalr cos_anneal_lr_continue "
    "CosineAnnealingWarmRestarts_T_cur_reset lr_scheduler_checkpoint_on_plateau "
    "raise_error_when_last_epoch_is_greater_than_0_and_initial_lr_is_not_specified",
    "gpubatch has no such argument: scale_fn, cycle_momentum, a list or a function for every group, groups that are "
    "added": "cycle_lr_scale_fn_restored_from_state_dict cycle_lr_cycle_momentum_fail_with_momentumless_optimizer "
    "cycle_lr_cycle_momentum_with_beta1_optimizer multiplicative_lr_with_lr_lambda swalr_hypers "
    "add_param_group_does_not_break_reduce_lr_on_plateau add_param_group_errors_reduce_lr_on_plateau",
    "a line may begin at 0 and rise or fall": "linearlr_start_factor_limits1 linearlr_start_factor_limits2",
    "beyond its length a cosine stays at its end; PyTorch's rises again": "closed_form_cos_anneal_lr",
}


def test_every_test_of_pytorch_is_accounted_for() -> None:
    """135 test functions at commit 01f9ef32; those with parameters count once."""
    found = [name for row in ROWS for name in row.tests.split()]
    for table in (OTHER_SEQUENCES, DO_NOT_APPLY):
        found += [name for tests in table.values() for name in tests.split()]
    assert len(found) == len(set(found)) == 135
    assert sum(len(tests.split()) for tests in DO_NOT_APPLY.values()) == 32
    assert set(OTHER_SEQUENCES) <= globals().keys()


def groups(lrs: tuple[float, ...] = LRS) -> Any:
    torch = peer("torch")
    given = [{"params": [torch.zeros(1, dtype=torch.float64)], "lr": lr} for lr in lrs]
    return torch.optim.SGD(given, lr=lrs[0], momentum=0.9)


def advance(optimizer: Any, schedulers: list[Any], *number: float) -> None:
    optimizer.step()
    for scheduler in schedulers:
        scheduler.step(*(number if type(scheduler).__name__ == "ReduceLROnPlateau" else ()))


@pytest.mark.parametrize("row", ROWS, ids=[row.tests.split()[0] if row.tests else None for row in ROWS])
def test_sequences(row: Row) -> None:
    optimizer = groups()
    made = row.theirs(peer("torch").optim.lr_scheduler, optimizer)
    schedulers = made if isinstance(made, list) else [made]
    ours = [row.ours(lr) for lr in LRS]
    for n in range(row.steps):
        for schedule, group in zip(ours, optimizer.param_groups, strict=True):
            assert schedule(12345, n) == pytest.approx(group[row.what], rel=1e-9, abs=1e-9), n
        if n + 1 < row.steps:
            advance(optimizer, schedulers)


def test_every_class_is_saved() -> None:
    for row in ROWS:
        schedule = row.ours(0.3)
        if not hasattr(schedule, "__name__"):  # a function is saved by its name
            assert from_dict(to_dict(schedule)) == schedule


def test_restarts_at_fractions_of_an_epoch() -> None:
    """In a unit of a tenth: epochs 0, 0.1, ..., and any others in any order."""
    for factor in (1, 2, 3, 4):
        optimizer = groups()
        scheduler = peer("torch").optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 10, factor, LEAST)
        tenths = [*range(300), 10, 50, 250, 320, 810, 30, 175, 295, 500, 1, 3, 13]
        for tenth in tenths:
            scheduler.step(tenth / 10)
            for lr, group in zip(LRS, optimizer.param_groups, strict=True):
                ours = CosineRestarts(lr, 100, factor, final=LEAST, per="step")(tenth, 0)
                assert ours == pytest.approx(group["lr"], rel=1e-9, abs=1e-9), tenth


@pytest.mark.parametrize("anneal", ["cos", "linear"])
@pytest.mark.parametrize("length", [1, 4, 5])
@pytest.mark.parametrize("decay", [1.0, 0.9])
def test_averaging_begins_with_a_rate_of_its_own(anneal: str, length: int, decay: float) -> None:
    """SWALR: from the learning rate at its start to its own within some epochs."""
    torch, start, rate = peer("torch"), 5, 0.01
    optimizer = groups()
    before = torch.optim.lr_scheduler.ExponentialLR(optimizer, decay)
    after = torch.optim.swa_utils.SWALR(optimizer, rate, length, anneal)
    kind: Any = CosineDecay if anneal == "cos" else LinearDecay
    for n in range(15):
        for lr, group in zip(LRS, optimizer.param_groups, strict=True):
            last = lr * decay**start
            kinds = [ExponentialDecay(lr, decay) if decay < 1 else Piecewise([], [lr])]
            ours = chain([*kinds, kind(last, length, final=rate, per="epoch")], [start])
            assert ours(0, n) == pytest.approx(group["lr"], rel=1e-12), n
        advance(optimizer, [after if n >= start else before])


def test_cosine_then_cyclic() -> None:
    schedule = chain([CosineDecay(0.5, 20, final=0.1, per="epoch"), Cyclic(0.1, 0.3, up=1, down=3, per="epoch")], [21])
    assert max(schedule(0, n) for n in range(21, 40)) == pytest.approx(0.3)


# mode, threshold_mode and other settings, and the numbers of the epochs.
PLATEAUS: dict[str, tuple[dict[str, Any], list[float]]] = {
    "1": (
        {"threshold_mode": "abs", "threshold": 0.01, "patience": 5, "cooldown": 5},
        [10 - i * 0.0167 for i in range(20)],
    ),
    "2": ({"threshold_mode": "abs", "threshold": 0.1, "patience": 5}, [10 - i * 0.0165 for i in range(22)]),
    "3": ({"mode": "max", "threshold_mode": "abs", "patience": 5, "cooldown": 5}, [-0.8] * 2 + [-0.234] * 20),
    "4": ({"mode": "max", "threshold": 0.1, "patience": 3}, [1.5 * 1.025**i for i in range(20)]),
    "5": ({"mode": "max", "threshold": 0.1, "patience": 5, "cooldown": 5}, [1.5 * 1.005**i for i in range(20)]),
    "6": ({"threshold": 0.1}, [1.5 * 0.85**i for i in range(20)]),
    "7": ({"threshold": 0.1, "patience": 5, "cooldown": 5}, [1] * 7 + [0.6] + [0.5] * 12),
    "8": (
        {"mode": "max", "threshold": 0.1, "patience": 5, "cooldown": 5, "min_lr": 0.4},
        [1.5 * 1.005**i for i in range(20)],
    ),
    "state": ({"patience": 2}, [1.0, 2.0, 3.0, 4.0, 3.0, 4.0, 5.0, 3.0, 2.0, 1.0]),
}


def ours_by_hand(lr: Any) -> gb.Optimizer:
    return gb.SGD(gb.Parameters({"w": (1,)}, backend="cpu"), lr)


@pytest.mark.parametrize("name", PLATEAUS)
def test_reductions(name: str) -> None:
    settings, numbers = PLATEAUS[name]
    settings = {"mode": "min", **settings}
    optimizer, opt = groups((0.5,)), ours_by_hand(0.5)
    theirs = peer("torch").optim.lr_scheduler.ReduceLROnPlateau(optimizer, **settings)
    ours = gb.ReduceOnPlateau(**settings)
    for number in numbers:
        theirs.step(number)
        ours.update(number, opt)
        assert opt.hyper["lr"] == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)


COMPOUND: dict[str, tuple[Callable[[float], Any], Callable[[Any, Any], Any]]] = {
    "1": (stairs, lambda s, o: s.StepLR(o, 3, 0.1)),
    "2": (
        lambda lr: Piecewise([3, 8, 12], [lr, lr / 10, lr / 100, lr / 1000]),
        lambda s, o: s.MultiStepLR(o, [3, 8, 12], 0.1),
    ),
    "3": (lambda lr: ExponentialDecay(lr, 0.1), lambda s, o: s.ExponentialLR(o, 0.1)),
    "4": (cosine, lambda s, o: s.CosineAnnealingLR(o, 10, LEAST)),
    "5": (linear(0.4, 1, 4), lambda s, o: s.LinearLR(o, 0.4, total_iters=4)),
}


@pytest.mark.parametrize("name", COMPOUND)
def test_reductions_of_schedules(name: str) -> None:
    settings, numbers = PLATEAUS["2" if name == "5" else name]
    settings, (make, scheduler) = {"mode": "min", **settings}, COMPOUND[name]
    module, optimizer = peer("torch").optim.lr_scheduler, groups((0.5,))
    opt = ours_by_hand(make(0.5))
    # A reduction by less than eps is not made; the learning rates of these tests fall below it.
    theirs = [module.ReduceLROnPlateau(optimizer, eps=0, **settings), scheduler(module, optimizer)]
    ours = gb.ReduceOnPlateau(eps=0, **settings)
    for n, number in enumerate(numbers[:10] if name == "4" else numbers):
        advance(optimizer, theirs, number)
        ours.update(number, opt)
        rate = opt.hyper["lr"](0, n + 1)
        assert rate == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9, abs=1e-9), n
    assert math.isfinite(rate)


def test_bad_arguments() -> None:
    for make, message in (
        (lambda: Cyclic(0.1, 0.2, up=4, mode="CATS", per="epoch"), "mode must be one of"),
        (lambda: OneCycle(1e-3, 10, anneal="CATS", per="epoch"), "anneal must be one of"),
        (lambda: OneCycle(1e-3, 10, 1.1, per="epoch"), "rise must be"),
        (lambda: OneCycle(1e-3), "total"),
    ):
        with pytest.raises((gb.ArgumentError, TypeError), match=message):
            make()
