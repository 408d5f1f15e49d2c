"""The checks that PyTorch makes of each of its optimizers, on every class of gpubatch.torch and a rule of one's own.

They are those of ``TestOptimRenewed`` in PyTorch's ``test/test_optim.py``, by what they check: :data:`CHECKS` says
which test has which, and :data:`DO_NOT_APPLY` why the others have none. The table is that of all optimizers in all
variants.
"""

from __future__ import annotations

import copy
import inspect
import sys
import warnings
from collections.abc import Callable, Collection, Iterator
from typing import Any

import numpy as np
import pytest
from families import every, first_of_each, marks
from needs import peer
from optimizer_table import CASES, custom

import gpubatch as gb

torch = peer("torch")
from torch_files import through_a_file  # noqa: E402

import gpubatch.torch as gt  # noqa: E402  imports torch

Tensor = Any
Make = Callable[..., Any]

# Each case as it is, and the first of each class uphill with weight decay.
FIRST = first_of_each({name: case.kind for name, case in CASES.items()})
UPHILL = {"maximize": True, "weight_decay": 0.1}
INPUTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in CASES},
    **{f"{name} uphill": (name, UPHILL) for name in FIRST},
}
BOTH = [pytest.param((a, b), marks=marks(a and not b), id=f"{a}-{b}") for a in (False, True) for b in (False, True)]
FAST = ["adam uphill", "custom"]


def of_the_table(names: Collection[str]) -> Any:
    return pytest.fixture(params=[pytest.param(i, marks=marks(i in FAST)) for i in names])


@of_the_table(INPUTS)
def make(request: pytest.FixtureRequest) -> Make:
    """``make(params, **arguments)`` of an entry of the table."""
    return maker(request.param)


@of_the_table([name for name in INPUTS if name.removesuffix(" uphill") in FIRST])
def first(request: pytest.FixtureRequest) -> Make:
    """``make`` of one entry for each class, and uphill."""
    return maker(request.param)


def maker(of: str) -> Make:
    name, more = INPUTS[of]
    case = CASES[name]
    if case.kind:
        return lambda params, **given: getattr(gt, case.kind)(params, **{**case.variant, **more, **given})
    signed = {} if name == "custom" else {"signed": False}
    return lambda params, **given: gt.Optimizer(params, custom, **{**signed, **more, **given})


def core(name: str, more: dict[str, Any], arrays: list[np.ndarray]) -> gb.Optimizer:
    """gpubatch's own optimizer of an entry that goes downhill."""
    return CASES[name].make(arrays, **{key: value for key, value in more.items() if key != "maximize"})


S = torch.optim.lr_scheduler
SCHEDULERS: dict[str, Callable[[Any], list[Any]]] = {
    "none": lambda o: [],
    "LambdaLR": lambda o: [S.LambdaLR(o, lambda n: 0.9**n)],
    "MultiplicativeLR": lambda o: [S.MultiplicativeLR(o, lambda n: 0.95)],
    "StepLR": lambda o: [S.StepLR(o, 10, 0.9)],
    "MultiStepLR": lambda o: [S.MultiStepLR(o, [3, 8], 0.5)],
    "ConstantLR": lambda o: [S.ConstantLR(o, 0.4, 4)],
    "LinearLR": lambda o: [S.LinearLR(o, 0.4, total_iters=4)],
    "ExponentialLR": lambda o: [S.ExponentialLR(o, 0.9)],
    "PolynomialLR": lambda o: [S.PolynomialLR(o, 30, 2.0)],
    "CosineAnnealingLR": lambda o: [S.CosineAnnealingLR(o, 25)],
    "CosineAnnealingWarmRestarts": lambda o: [S.CosineAnnealingWarmRestarts(o, 5, 2)],
    "CyclicLR": lambda o: [S.CyclicLR(o, 0.001, 0.02, 4, cycle_momentum=False)],
    "OneCycleLR": lambda o: [S.OneCycleLR(o, 0.03, 40, cycle_momentum=False)],
    "ReduceLROnPlateau": lambda o: [S.ReduceLROnPlateau(o, patience=1)],
    "SequentialLR": lambda o: [S.SequentialLR(o, [S.ConstantLR(o, 0.1, 4), S.ExponentialLR(o, 0.9)], [4])],
    "ChainedScheduler": lambda o: [S.ChainedScheduler([S.LinearLR(o, 0.4, total_iters=4), S.ExponentialLR(o, 0.9)])],
    "SWALR": lambda o: [torch.optim.swa_utils.SWALR(o, 0.005, 4)],
    "three": lambda o: [S.StepLR(o, 10, 0.9), S.ExponentialLR(o, 0.95), S.ReduceLROnPlateau(o)],
}


class Problem:
    """‖W x + b‖² for a fixed x: its weight and bias, and a closure for an optimizer of them."""

    def __init__(self, contiguous: bool = True, dtype: Any = torch.float32) -> None:
        draw = torch.Generator().manual_seed(0)
        weight, bias, self.x = (torch.randn(shape, generator=draw).to(dtype) for shape in ((10, 5, 2), (10, 2), (5,)))
        parts = [x[..., 0].clone() if contiguous else x[..., 0] for x in (weight, bias)]
        self.weight, self.bias = self.params = [torch.nn.Parameter(x) for x in parts]
        assert self.weight.is_contiguous() == contiguous

    def loss(self) -> Tensor:
        return (self.weight.mv(self.x) + self.bias).square().sum()

    def closure(self, opt: Any) -> Callable[[], Tensor]:
        def close() -> Tensor:
            opt.zero_grad()
            loss = self.loss()
            loss.backward()
            return loss

        return close

    def train(self, opt: Any, steps: int, schedulers: Any = ()) -> None:
        """Train, and look whether the loss went where it should."""
        before = float(self.loss().detach())
        for _ in range(steps):
            loss = opt.step(self.closure(opt))
            for scheduler in schedulers:
                scheduler.step(*([loss.detach()] if isinstance(scheduler, S.ReduceLROnPlateau) else []))
        after = float(self.loss().detach())
        assert after > before if opt.param_groups[0]["maximize"] else after < before

    def copies(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.params]


def assert_same(found: Any, wanted: Any) -> None:
    """The same bits, in tensors of dictionaries and lists; and else what is equal."""
    if isinstance(wanted, torch.Tensor):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    elif isinstance(wanted, dict):
        assert found.keys() == wanted.keys()
        assert_same([found[key] for key in wanted], [*wanted.values()])
    elif isinstance(wanted, (list, tuple)):
        assert len(found) == len(wanted)
        for a, b in zip(found, wanted, strict=True):
            assert_same(a, b)
    else:
        assert found == wanted


def named(params: list[Tensor], names: bool) -> list[Any]:
    return [(f"p{i}", p) for i, p in enumerate(params)] if names else params


def from_zero(opt: Any) -> None:
    """Let no first moment start from something else, as Yogi's does."""
    for group in opt.param_groups:
        group.update({name: 0.0 for name in group if name == "initial_accumulator"})


def without_names(d: dict[str, Any]) -> dict[str, Any]:
    groups = [{k: v for k, v in group.items() if k != "param_names"} for group in d["param_groups"]]
    return {**d, "param_groups": groups}


# --- the table --------------------------------------------------------------------------------------------------------

CHECKS = {
    "test_mistakes": "errors fused_error_on_params_on_meta",
    "test_the_loss_goes_the_right_way": "forloop_goes_right_direction",
    "test_groups_with_schedulers": "param_group_with_lrscheduler_goes_right_direction",
    "test_a_tensor_is_a_learning_rate": "tensor_lr",
    "test_what_has_no_form_here_is_refused": "complex complex_2d rosenbrock_sparse",
    "test_layers_that_are_frozen_for_some_steps": "foreach_matches_forloop fused_matches_forloop",
    "test_the_default_type_changes_nothing": "set_default_dtype_works_with_foreach",
    "test_groups_have_their_own_weight_decay": "param_groups_weight_decay",
    "test_groups_have_their_own_learning_rate": "param_groups_lr",
    "test_without_gradients_nothing_happens": "step_is_noop_when_params_have_no_grad",
    "test_gradients_of_zero_change_no_parameter": "step_is_noop_for_zero_grads",
    "test_it_can_be_printed": "optimizer_can_be_printed",
    "test_a_state_dict_is_all_there_is": "state_dict_deterministic",
    "test_an_older_state_dict": "can_load_older_state_dict",
    "test_names_are_kept": "can_load_from_to_named_state_dict",
    "test_a_file_has_what_was_saved": "save_load_equality_with_weights_only",
    "test_a_count_may_be_a_number": "load_nontensor_step",
    "test_hooks_of_state_dict": "state_dict_pre_hook state_dict_post_hook state_dict_pre_post_hook",
    "test_hooks_of_load_state_dict": "load_state_dict_pre_hook_and_prepend load_state_dict_post_hook "
    "load_state_dict_pre_post_hook",
    "test_hooks_of_steps": "step_pre_hook step_post_hook step_all_hooks",
    "test_a_deep_copy_has_all_attributes": "deepcopy_copies_all_public_attrs",
    "test_every_parameter_has_state": "non_empty_state",
}
DO_NOT_APPLY = {
    "there are no arguments foreach, fused, capturable and differentiable": "cpu_load_state_dict "
    "optim_infos_do_not_specify_global_cliquey_kwargs defaults_changed_to_foreach fused_does_not_step_if_foundinf",
    "they need CUDA with PyTorch, several devices or 64 GB; tests/test_torch.py has those for one device": ""
    "forloop_goes_right_direction_multigpu mixed_device_dtype state_dict_with_cuda_params fused_cpu_matches_cuda "
    "foreach_large_tensor fused_large_tensor peak_memory_foreach",
    "no class calls its closure itself, as LBFGS does": "second_order_optims_return_consistent_types",
}


def test_the_table_is_complete() -> None:
    """PyTorch 2.6 has 44 of these checks; those with parameters count once."""
    classes = [name for name in gt.__all__ if isinstance(getattr(gt, name), type)]
    assert {CASES[name].kind or "Optimizer" for name, _ in INPUTS.values()} == set(classes)
    for name in classes:
        options = {
            a for a, p in inspect.signature(getattr(gt, name)).parameters.items() if type(p.default) in (bool, str)
        }
        of = "Adam" if name == "AdamW" else name
        varied = {a for case in CASES.values() if (case.kind or "Optimizer") == of for a in case.variant}
        assert options - {"decoupled", "master_weights", "maximize"} <= varied, name
    found = [check for table in (CHECKS, DO_NOT_APPLY) for checks in table.values() for check in checks.split()]
    assert len(found) == len(set(found)) == 44
    assert CHECKS.keys() <= globals().keys()
    public = {name for name in S.__all__ if inspect.isclass(getattr(S, name))} - {"LRScheduler"}
    assert public <= SCHEDULERS.keys()


# --- steps ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("contiguous", [True, False])
@every("schedule", SCHEDULERS, ["none", "three"])
def test_the_loss_goes_the_right_way(first: Make, schedule: Callable[[Any], list[Any]], contiguous: bool) -> None:
    """And the learning rates are those that the schedulers give an optimizer of PyTorch."""
    problem, other = Problem(contiguous), Problem()
    opt = first(problem.params, lr=1e-3)
    theirs = torch.optim.SGD(other.params, lr=1e-3)
    schedulers, wanted = schedule(opt), schedule(theirs)
    assert opt.param_groups[0]["lr"] == theirs.param_groups[0]["lr"]
    problem.train(opt, 10, schedulers)
    if not any(isinstance(scheduler, S.ReduceLROnPlateau) for scheduler in schedulers):
        for _ in range(10):
            theirs.step()
            for scheduler in wanted:
                scheduler.step()
        assert opt.param_groups[0]["lr"] == theirs.param_groups[0]["lr"]


@every("schedule", SCHEDULERS, ["three"])
def test_groups_with_schedulers(first: Make, schedule: Callable[[Any], list[Any]]) -> None:
    problem = Problem()
    opt = first([{"params": [problem.weight]}, {"params": [problem.bias], "lr": 2e-3}], lr=1e-3)
    problem.train(opt, 10, schedule(opt))


def test_a_tensor_is_a_learning_rate(make: Make) -> None:
    """Also one that is assigned later, or filled, as schedulers fill it; a change is seen in the next step."""
    problems = Problem(), Problem(), Problem()
    rate = 2.0**-10  # a number of float32
    number, tensor, later = [
        make(p.params, lr=lr) for p, lr in zip(problems, (rate, torch.tensor(rate), rate), strict=True)
    ]
    later.param_groups[0]["lr"] = torch.tensor([rate])
    for step in range(6):
        if step == 3:
            number.param_groups[0]["lr"] = rate / 2
            for opt in (tensor, later):
                opt.param_groups[0]["lr"].fill_(rate / 2)
        for opt, p in zip((number, tensor, later), problems, strict=True):
            opt.step(p.closure(opt))
        assert_same(problems[1].params, problems[0].params)
        assert_same(problems[2].params, problems[0].params)
    tensor.load_state_dict(through_a_file(tensor.state_dict()))
    assert tensor.param_groups[0]["lr"] == rate / 2
    tensor.param_groups[0]["lr"] = torch.ones(2)
    with pytest.raises(gb.DTypeError, match="lr must be a number, got tensor"):
        tensor.step()


@every("name", [name for name, (_, more) in INPUTS.items() if "maximize" not in more], ["adam", "custom"])
def test_layers_that_are_frozen_for_some_steps(name: str) -> None:
    """The oracle is gpubatch's own optimizer, which is given None for the gradients that are missing."""
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Sigmoid(), torch.nn.Linear(3, 1)).double()
    scalar = torch.nn.Parameter(torch.tensor(0.5, dtype=torch.float64))
    params, x = [*model.parameters(), scalar], torch.arange(6.0, dtype=torch.float64).view(3, 2)
    arrays = [p.detach().numpy().copy() for p in params]
    case, more = INPUTS[name]
    signed = {} if case == "custom" else {"signed": False}
    kind = CASES[case].kind
    opt = getattr(gt, kind)(params, **CASES[case].variant) if kind else gt.Optimizer(params, custom, **signed)
    other = core(case, more, arrays)
    for step in range(9):
        opt.zero_grad()
        model[2].requires_grad_(step not in (3, 4))
        if step != 2:
            (model(x).sum() * scalar.square()).backward()
        opt.step()
        other.step([None if p.grad is None else p.grad.numpy() for p in params])
        for p, w in zip(params, arrays, strict=True):
            np.testing.assert_array_equal(p.detach().numpy(), w)
    assert [int(opt.state[p]["step"]) for p in params] == [8, 8, 6, 6, 8]


@pytest.fixture
def default_dtype() -> Iterator[None]:
    before = torch.get_default_dtype()
    yield
    torch.set_default_dtype(before)


@pytest.mark.parametrize("dtype", ["float64", "float16"])
def test_the_default_type_changes_nothing(make: Make, dtype: str, default_dtype: None) -> None:
    plain, other = Problem(), Problem()
    opt = make(plain.params)
    plain.train(opt, 4)
    torch.set_default_dtype(getattr(torch, dtype))
    opt = make(other.params)
    other.train(opt, 4)
    assert_same(other.params, plain.params)
    assert {x.dtype for state in opt.state.values() for name, x in state.items() if name != "step"} <= {torch.float32}


def test_the_default_device_changes_nothing(make: Make) -> None:
    """As torch.set_default_device has it; here it is one without memory."""
    plain, other = Problem(), Problem()
    opt = make(plain.params)
    plain.train(opt, 4)
    opt = make(other.params)
    for step in range(4):
        other.closure(opt)()
        with torch.device("meta"):
            opt.step()
            if step == 1:
                opt.load_state_dict(opt.state_dict())
    assert_same(other.params, plain.params)
    assert {x.device.type for state in opt.state.values() for x in state.values()} == {"cpu"}


def test_without_gradients_nothing_happens(make: Make) -> None:
    params = [torch.randn(2, 3) for _ in range(2)]
    before = [p.clone() for p in params]
    opt = make(params)
    assert opt.step(lambda: 7) == 7
    assert_same(params, before)


def test_gradients_of_zero_change_no_parameter(make: Make) -> None:
    problem = Problem()
    opt, before = make(problem.params, weight_decay=0.0), problem.copies()
    from_zero(opt)
    for _ in range(4):
        for p in problem.params:
            p.grad = torch.zeros_like(p)
        opt.step()
    assert_same([p.detach() for p in problem.params], before)


# --- groups -----------------------------------------------------------------------------------------------------------


def test_groups_have_their_own_weight_decay(make: Make) -> None:
    """Without a gradient of the loss, weight decay alone moves the parameters of the group that has it."""
    problem = Problem()
    opt = make([{"params": [problem.weight], "weight_decay": 0.1}, {"params": [problem.bias], "weight_decay": 0.0}])
    problem.train(opt, 10)
    opt, before = make(opt.param_groups), problem.copies()
    from_zero(opt)
    for p in problem.params:
        p.grad = torch.zeros_like(p)
    opt.step()
    assert (problem.weight.detach() != before[0]).all()
    assert_same(problem.bias.detach(), before[1])


def test_groups_have_their_own_learning_rate(make: Make) -> None:
    problem, still = Problem(), torch.nn.Parameter(torch.randn(2))
    before = still.detach().clone()
    opt = make([{"params": problem.params, "lr": 1e-3}, {"params": [still]}], lr=1e-28)
    for _ in range(3):
        still.grad = torch.rand(2)
        problem.train(opt, 3)
    assert_same(still.detach(), before)


# --- state ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", BOTH)
def test_a_state_dict_is_all_there_is(make: Make, names: tuple[bool, bool]) -> None:
    problem, other = Problem(), Problem()
    opt = make(named(problem.params, names[0]))
    problem.train(opt, 4)
    with torch.no_grad():
        for p, q in zip(other.params, problem.params, strict=True):
            p.copy_(q)
    again, saved = make(named(other.params, names[1])), copy.deepcopy(opt.state_dict())
    again.load_state_dict(saved)
    assert_same(without_names(saved), without_names(opt.state_dict()))
    for _ in range(4):
        opt.step(problem.closure(opt))
        again.step(other.closure(again))
        assert_same(other.params, problem.params)
    assert_same(without_names(again.state_dict()), without_names(opt.state_dict()))
    again.param_groups.extend(again.param_groups)
    twice = without_names(again.state_dict())["param_groups"]
    assert twice == 2 * without_names(opt.state_dict())["param_groups"]


def test_an_older_state_dict(make: Make) -> None:
    """Of a time when maximize and master_weights did not exist yet."""
    problem = Problem()
    opt = make(problem.params)
    problem.train(opt, 3)
    uphill, older = opt.param_groups[0]["maximize"], copy.deepcopy(opt.state_dict())
    for name in ("maximize", "master_weights"):
        del older["param_groups"][0][name]
    opt.load_state_dict(older)
    assert opt.param_groups[0]["maximize"] is uphill
    problem.train(opt, 1)


@pytest.mark.parametrize("names", BOTH)
def test_names_are_kept(make: Make, names: tuple[bool, bool]) -> None:
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Conv2d(4, 2, 1, stride=2), torch.nn.BatchNorm2d(2))
    x = torch.rand(1, 4, 16, 16)
    one, other = (make(model.named_parameters() if given else model.parameters()) for given in names)
    for _ in range(3):
        one.zero_grad()
        model(x).square().sum().backward()
        one.step()
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    other.step()
    found = other.state_dict()["param_groups"][0]
    assert found.get("param_names") == ([name for name, _ in model.named_parameters()] if any(names) else None)


@pytest.mark.parametrize("names", [False, True])
def test_a_file_has_what_was_saved(make: Make, names: bool) -> None:
    problem = Problem()
    opt = make(named(problem.params, names))
    problem.train(opt, 3)
    assert_same(through_a_file(opt.state_dict()), opt.state_dict())


def test_a_count_may_be_a_number(make: Make) -> None:
    problem = Problem()
    opt = make(problem.params)
    problem.train(opt, 3)
    saved = copy.deepcopy(opt.state_dict())
    for state in saved["state"].values():
        state["step"] = state["step"].item()
    opt.load_state_dict(saved)
    opt.step(problem.closure(opt))
    assert [int(opt.state[p]["step"]) for p in problem.params] == [4, 4]


def test_every_parameter_has_state(make: Make) -> None:
    problem = Problem()
    opt = make(problem.params)
    opt.step(problem.closure(opt))
    assert [len(opt.state[p]) > 0 for p in problem.params] == [True, True]


def test_a_deep_copy_has_all_attributes(make: Make) -> None:
    problem = Problem()
    opt = make(problem.params)
    problem.train(opt, 3)
    assert vars(copy.deepcopy(opt)).keys() - vars(opt).keys() == set()
    public = [{name for name in vars(o) if not name.startswith("_")} for o in (opt, copy.deepcopy(opt))]
    assert public[0] == public[1]


def test_it_can_be_printed(make: Make) -> None:
    opt = make(Problem().params, lr=0.125)
    assert type(opt).__name__ in repr(opt)
    assert "lr: 0.125" in repr(opt)


# --- hooks ------------------------------------------------------------------------------------------------------------


def test_hooks_of_state_dict(make: Make) -> None:
    """What a hook puts into the state, though it is no parameter's, is saved, and no step stumbles over it."""
    problem = Problem()
    opt = make(problem.params, lr=1e-3)
    problem.train(opt, 3)
    opt.register_state_dict_pre_hook(lambda o: o.state.update(seen=1))
    assert opt.state_dict()["state"]["seen"] == 1
    opt.register_state_dict_post_hook(lambda o, d: {**d, "found": d["state"].pop("seen")})
    saved = opt.state_dict()
    assert saved["found"] == 1
    assert "seen" not in saved["state"]
    assert opt.state["seen"] == 1
    problem.train(opt, 3)
    copy.deepcopy(opt).step()
    opt.load_state_dict(opt.state_dict())
    problem.train(opt, 3)


def test_hooks_of_load_state_dict(make: Make) -> None:
    opt = make(Problem().params)
    saved, seen = opt.state_dict(), []

    def in_place(o: Any, d: dict[str, Any]) -> None:
        d["param_groups"][0]["lr"] = 0.002

    def copied(o: Any, d: dict[str, Any]) -> dict[str, Any]:
        d = copy.deepcopy(d)
        d["param_groups"][0]["lr"] = 0.003
        return d

    def after(o: Any) -> None:
        seen.append(o.param_groups[0]["lr"])
        o.state["loaded"] = True

    opt.register_load_state_dict_post_hook(after)
    opt.register_load_state_dict_pre_hook(in_place)
    opt.load_state_dict(saved)
    handle = opt.register_load_state_dict_pre_hook(copied, prepend=True)
    opt.load_state_dict(saved)
    handle.remove()
    opt.register_load_state_dict_pre_hook(copied)
    opt.load_state_dict(saved)
    assert seen == [0.002, 0.002, 0.003]
    assert opt.state["loaded"] is True
    wrong = opt.register_load_state_dict_pre_hook(lambda o, d: d["param_groups"][0].update(lr=-1.0))
    with pytest.raises(gb.ArgumentError, match="lr must be finite and in"):
        opt.load_state_dict(saved)
    wrong.remove()
    assert opt.param_groups[0]["lr"] == 0.003


def test_hooks_of_steps(make: Make) -> None:
    """In PyTorch's order, for steps that look and for steps that are repeated; none after they are removed."""
    problem, seen = Problem(), list[str]()
    opt, other = make(problem.params), torch.optim.SGD(Problem().params)
    module = sys.modules["torch.optim.optimizer"]
    handles = [
        module.register_optimizer_step_pre_hook(lambda *_: seen.append("all before")),
        module.register_optimizer_step_post_hook(lambda *_: seen.append("all after")),
        *(o.register_step_pre_hook(lambda *_: seen.append("before")) for o in (opt, other)),
        *(o.register_step_post_hook(lambda *_: seen.append("after")) for o in (opt, other)),
    ]
    try:
        for _ in range(3):
            opt.step(problem.closure(opt))
        other.step()
    finally:
        for handle in handles:
            handle.remove()
    opt.step(problem.closure(opt))
    assert seen == 4 * ["all before", "before", "after", "all after"]


# --- mistakes ---------------------------------------------------------------------------------------------------------


MISTAKES: dict[str, tuple[Callable[[Make], Any], str]] = {
    "one tensor": (lambda make: make(torch.zeros(3)), "iterable of Tensors or dicts, but got"),
    "no parameters": (lambda make: make([]), "empty parameter list"),
    "no leaf": (lambda make: make([Problem().weight * 2]), "non-leaf"),
    "no tensor": (lambda make: make([1.0]), "can only optimize Tensors, but one of the params is float"),
    "a set": (lambda make: make([{"params": set(Problem().params)}]), "ordered collections"),
    "in two groups": (
        lambda make: make([{"params": p} for p in 2 * Problem().params]),
        "in more than one parameter group",
    ),
    "names missing": (lambda make: make([("w", Problem().weight), Problem().bias]), "names are missing"),
    "below zero": (lambda make: make(Problem().params, lr=-0.01), r"lr must be finite and in \[0, inf\), got -0.01"),
    "NaN": (lambda make: make(Problem().params, weight_decay=float("nan")), "weight_decay must be finite"),
    "on meta": (lambda make: make(torch.nn.Linear(2, 3, device="meta").parameters()), "it is on meta"),
    "unknown": (lambda make: make(Problem().params, no_such=1), "no_such"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(make: Make, mistake: str) -> None:
    make_it, words = MISTAKES[mistake]
    with pytest.raises((TypeError, ValueError), match=words):
        make_it(make)


def test_a_parameter_that_is_given_twice(make: Make) -> None:
    """PyTorch warns, and takes two steps on it; here memory that would be updated twice is refused."""
    problem = Problem()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        opt = make([problem.weight, problem.weight])
    assert "duplicate parameters" in str(told[0].message)
    with pytest.raises(gb.ArgumentError, match="share memory"):
        opt.step(problem.closure(opt))


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (lambda: torch.zeros(2, dtype=torch.complex64), "must be float32, float64 or float16, got torch.complex64"),
        (lambda: torch.zeros(2, dtype=torch.bfloat16), "got torch.bfloat16; keep bfloat16 for autocast"),
        (lambda: torch.eye(2).to_sparse(), "is sparse"),
    ],
    ids=["complex", "bfloat16", "sparse"],
)
def test_what_has_no_form_here_is_refused(make: Make, x: Callable[[], Tensor], words: str) -> None:
    with pytest.raises(gb.DTypeError, match=words):
        make([torch.nn.Parameter(torch.zeros(3)), x().requires_grad_()])
