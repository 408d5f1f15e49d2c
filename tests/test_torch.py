"""Optimizers for PyTorch: the bits of gpubatch's, the numbers of torch.optim, and what an optimizer of PyTorch does."""

from __future__ import annotations

import copy
import ctypes
import functools
import gc
import inspect
import subprocess
import sys
import types
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import emulated_gpu
import numpy as np
import pytest
from needs import peer
from optimizer_table import CASES, FAST, LR, custom
from stand_in import queued_backend

import gpubatch as gb
from gpubatch.backend import get_backend
from gpubatch.ops import CudaUpdate, host_library

torch = peer("torch")
from torch_files import through_a_file  # noqa: E402

import gpubatch.torch as gt  # noqa: E402  imports torch

Tensor = Any

VARIANTS = [pytest.param(name, marks=[] if name in FAST else pytest.mark.exhaustive) for name in CASES]
KINDS = [name for name in gt.__all__ if isinstance(getattr(gt, name), type) and name != "Optimizer"]
REQUIRED = {name for name in KINDS if inspect.signature(getattr(gt, name)).parameters["lr"].default is inspect._empty}


@pytest.fixture(params=[*KINDS, "Optimizer"])
def make(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """``make(params, **arguments)`` for each class, with its defaults; one learning rate where it has none."""
    name = request.param
    if name == "Optimizer":
        return lambda params, **more: gt.Optimizer(params, custom, **more)
    rate = {"lr": LR} if name in REQUIRED else {}
    return lambda params, **more: getattr(gt, name)(params, **{**rate, **more})


def variant(name: str, params: Any, **more: Any) -> Any:
    """The optimizer of a case of the table."""
    case = CASES[name]
    if case.kind:
        return getattr(gt, case.kind)(params, **{**case.variant, **more})
    signed = {} if name == "custom" else {"signed": False}
    return gt.Optimizer(params, custom, **{**signed, **more})


def tensors(*shapes: tuple[int, ...], seed: int = 0, dtype: Any = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def set_gradients(params: list[Tensor], seed: int) -> None:
    generator = torch.Generator().manual_seed(100 + seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def train(opt: Any, params: list[Tensor], first: int, last: int) -> None:
    for step in range(first, last):
        set_gradients(params, step)
        opt.step()


def values(params: list[Tensor]) -> list[np.ndarray]:
    return [p.detach().numpy().copy() for p in params]


def assert_same(found: list[Tensor], wanted: list[Tensor]) -> None:
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=0, atol=0)


def module() -> Tensor:
    torch.manual_seed(1)
    return torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 2))


def backward(model: Any, seed: int = 0) -> Tensor:
    x = torch.randn(9, 5, generator=torch.Generator().manual_seed(seed), dtype=next(model.parameters()).dtype)
    loss = model(x).square().mean()
    loss.backward()
    return loss


SHAPES = ((3, 5), (7,), (), (2, 3, 4))


# --- the table --------------------------------------------------------------------------------------------------------


def test_every_optimizer_of_gpubatch_is_there() -> None:
    kinds = [
        kind for name in gb.__all__ if isinstance(kind := getattr(gb, name), type) and issubclass(kind, gb.Optimizer)
    ]
    assert sorted([*KINDS, "Optimizer"]) == sorted(kind.__name__ for kind in kinds)
    assert {case.kind for case in CASES.values() if case.kind} == set(KINDS)
    for name in KINDS:
        kind = getattr(gt, name)
        assert issubclass(kind, torch.optim.Optimizer)
        assert kind.__name__ == name
        assert kind.__doc__.startswith(getattr(gb, name).__doc__)


def test_arguments_and_defaults_are_those_of_gpubatch() -> None:
    core = {"backend", "common", "groups", "check"}
    for name in KINDS:
        here, there = inspect.signature(getattr(gt, name)).parameters, inspect.signature(getattr(gb, name)).parameters
        assert list(here)[: len(set(there) - core)] == [argument for argument in there if argument not in core]
        assert all(here[a].default == p.default for a, p in there.items() if a not in core), name
        assert {"weight_decay", "decoupled", "master_weights", "maximize"} <= set(here)


def test_without_pytorch_it_says_what_to_install() -> None:
    code = "import sys; sys.modules['torch'] = None; import gpubatch.torch"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "gpubatch.torch needs PyTorch, which cannot be imported" in done.stderr
    assert done.stderr.strip().endswith("pip install torch")


# --- the numbers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_the_bits_are_those_of_the_same_optimizer_of_gpubatch(name: str, dtype: str) -> None:
    params = tensors(*SHAPES, dtype=getattr(torch, dtype))
    arrays = values(params)
    ours, core = variant(name, params), CASES[name].make(arrays)
    for step in range(5):
        set_gradients(params, step)
        ours.step()
        core.step([p.grad.numpy() for p in params])
        for p, w in zip(params, arrays, strict=True):
            np.testing.assert_array_equal(p.detach().numpy(), w)
    for i, p in enumerate(params):
        assert int(ours.state[p]["step"]) == 5
        for state, views in core.state.items():
            np.testing.assert_array_equal(ours.state[p][state].numpy(), views[str(i)])


@pytest.mark.parametrize("name", [p for p in VARIANTS if CASES[p.values[0]].torch is not None])
def test_the_numbers_are_those_of_pytorch(name: str) -> None:
    mine, theirs = module().double(), module().double()
    ours, other = variant(name, mine.parameters()), CASES[name].torch(torch.optim, theirs.parameters())
    for step in range(30):
        for model, opt in ((mine, ours), (theirs, other)):
            opt.zero_grad()
            backward(model, step)
            opt.step()
    tolerance = 1e-6 if name == "nadam scheduled" else 1e-11  # PyTorch multiplies its factors of beta1 in float32
    for p, q in zip(mine.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=tolerance, atol=0.1 * tolerance)


def test_master_weights_are_those_of_gpubatch() -> None:
    params = tensors(*SHAPES, dtype=torch.float16)
    arrays = values(params)
    ours, core = gt.Adam(params, lr=1e-4, master_weights=True), gb.Adam(arrays, lr=1e-4, master_weights=True)
    for step in range(5):
        set_gradients(params, step)
        ours.step()
        core.step([p.grad.numpy() for p in params])
    for i, (p, w) in enumerate(zip(params, arrays, strict=True)):
        np.testing.assert_array_equal(p.detach().numpy(), w)
        np.testing.assert_array_equal(ours.state[p]["master"].numpy(), core.state["master"][str(i)])


def test_uphill_is_downhill_with_the_opposite_gradient(make: Any) -> None:
    up, down = tensors(*SHAPES), tensors(*SHAPES)
    one, other = make(up, maximize=True), make(down)
    for step in range(4):
        set_gradients(up, step)
        set_gradients(down, step)
        for p in down:
            p.grad.neg_()
        one.step()
        other.step()
    assert_same(up, down)


# --- groups and schedules ---------------------------------------------------------------------------------------------


def test_a_group_is_as_an_optimizer_of_its_own(make: Any) -> None:
    together, apart = tensors(*SHAPES), tensors(*SHAPES)
    groups = [{"params": together[:2]}, {"params": together[2:], "lr": 0.5 * LR, "weight_decay": 0.1}]
    opt = make(groups, lr=LR)
    train(opt, together, 0, 5)
    one, other = make(apart[:2], lr=LR), make(apart[2:], lr=0.5 * LR, weight_decay=0.1)
    for step in range(5):
        set_gradients(apart, step)
        one.step()
        other.step()
    assert_same(together, apart)
    assert [group["lr"] for group in opt.param_groups] == [LR, 0.5 * LR]


def test_a_group_may_have_another_variant() -> None:
    together, apart = tensors(*SHAPES), tensors(*SHAPES)
    opt = gt.RMSProp([{"params": together[:2]}, {"params": together[2:], "centered": True, "momentum": 0.5}])
    train(opt, together, 0, 3)
    opt.param_groups[0]["momentum"] = 0.9  # its state starts from zero
    train(opt, together, 3, 6)
    one, other = gt.RMSProp(apart[:2]), gt.RMSProp(apart[2:], centered=True, momentum=0.5)
    for step in range(6):
        if step == 3:
            one.param_groups[0]["momentum"] = 0.9
        set_gradients(apart, step)
        one.step()
        other.step()
    assert_same(together, apart)
    assert set(opt.state[together[0]]) == {"step", "s", "b"}
    assert set(opt.state[together[2]]) == {"step", "s", "g_avg", "b"}


def test_groups_that_are_added_leave_defaults_as_they_are(make: Any) -> None:
    first, second = tensors((3,), (4,))
    opt = make([first], lr=LR)
    defaults = dict(opt.defaults)
    train(opt, [first], 0, 2)
    opt.add_param_group({"params": [second], "lr": 0.1})
    assert opt.defaults == defaults
    train(opt, [first, second], 2, 4)
    assert [int(opt.state[p]["step"]) for p in (first, second)] == [4, 2]


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "step": lambda o: torch.optim.lr_scheduler.StepLR(o, 2, 0.5),
    "exponential": lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.9),
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 5),
    "lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda t: np.float64(1 / (1 + t))),
    "one cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=8, cycle_momentum=False),
    "two in a row": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o,
        [torch.optim.lr_scheduler.LinearLR(o, 0.1, total_iters=3), torch.optim.lr_scheduler.ExponentialLR(o, 0.9)],
        [3],
    ),
}


@pytest.mark.parametrize("schedule", SCHEDULERS)
def test_schedulers_of_pytorch_set_the_learning_rate(schedule: str) -> None:
    mine, theirs = tensors(*SHAPES, dtype=torch.float64), tensors(*SHAPES, dtype=torch.float64)
    ours, other = gt.RMSProp(mine, lr=LR), torch.optim.RMSprop(theirs, lr=LR, alpha=0.9)
    schedules = [SCHEDULERS[schedule](ours), SCHEDULERS[schedule](other)]
    for step in range(7):
        for params, opt, rate in ((mine, ours, schedules[0]), (theirs, other, schedules[1])):
            set_gradients(params, step)
            opt.step()
            rate.step()
    for p, q in zip(mine, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


def test_a_plateau_lowers_the_learning_rate() -> None:
    params = tensors((3,))
    opt = gt.Adam(params, lr=0.1)
    rate = torch.optim.lr_scheduler.ReduceLROnPlateau(opt, patience=0)
    for loss in (1.0, 1.0, 1.0):
        train(opt, params, 0, 1)
        rate.step(loss)
    assert opt.param_groups[0]["lr"] == pytest.approx(1e-3)


# --- saving -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("dtype", ["float32", pytest.param("float16", marks=pytest.mark.exhaustive)])
def test_training_goes_on_from_a_file_with_the_same_bits(name: str, dtype: str) -> None:
    params = tensors(*SHAPES, dtype=getattr(torch, dtype))
    opt = variant(name, [{"params": params[:2]}, {"params": params[2:], "weight_decay": 0.1}])
    train(opt, params, 0, 3)
    copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
    saved = through_a_file(opt.state_dict())
    again = variant(name, [{"params": copies[:2], "lr": 1.0}, {"params": copies[2:]}])
    again.load_state_dict(saved)
    train(opt, params, 3, 6)
    train(again, copies, 3, 6)
    assert_same(copies, params)
    assert {number: int(state["step"]) for number, state in saved["state"].items()} == dict.fromkeys(range(4), 3)


def test_a_state_dict_is_in_the_order_of_the_parameters(make: Any) -> None:
    first, second = tensors(*SHAPES), tensors(*SHAPES)
    one, other = make(first), make(second)
    for step in range(3):  # in other orders
        set_gradients(first, step)
        set_gradients(second, step)
        one.step()
        other.step()
    a, b = one.state_dict(), other.state_dict()
    assert a["param_groups"] == b["param_groups"]
    assert a["state"].keys() == b["state"].keys() == set(range(4))
    for number, state in a["state"].items():
        assert_same(list(state.values()), list(b["state"][number].values()))


def test_master_weights_are_saved_in_float32() -> None:
    params = tensors(*SHAPES, dtype=torch.float16)
    opt = gt.Adam(params, lr=1e-4, master_weights=True)
    train(opt, params, 0, 3)
    copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
    again = gt.Adam(copies, lr=1e-4, master_weights=True)
    again.load_state_dict(through_a_file(opt.state_dict()))
    assert again.state[copies[0]]["master"].dtype == torch.float32
    train(opt, params, 3, 6)
    train(again, copies, 3, 6)
    assert_same(copies, params)


def test_what_is_loaded_is_a_copy() -> None:
    params, others = tensors(*SHAPES), tensors(*SHAPES)
    opt, again = gt.Adam(params), gt.Adam(others)
    train(opt, params, 0, 2)
    again.load_state_dict(opt.state_dict())
    before = copy.deepcopy(opt.state_dict()["state"])
    train(again, others, 2, 4)
    for number, state in before.items():
        assert_same(list(opt.state_dict()["state"][number].values()), list(state.values()))


def test_state_of_another_element_type_is_converted() -> None:
    params, wide = tensors(*SHAPES), tensors(*SHAPES, dtype=torch.float64)
    opt, other = gt.Adam(params), gt.Adam(wide)
    train(other, wide, 0, 2)
    opt.load_state_dict(other.state_dict())
    train(opt, params, 2, 3)
    assert {opt.state[p]["m"].dtype for p in params} == {torch.float32}
    torch.testing.assert_close(
        opt.state[params[0]]["m"], 0.9 * other.state[wide[0]]["m"].float() + 0.1 * params[0].grad
    )


def test_a_state_dict_from_before_an_argument_existed_takes_its_default(make: Any) -> None:
    params = tensors(*SHAPES)
    opt = make(params)
    train(opt, params, 0, 2)
    older = copy.deepcopy(opt.state_dict())
    for name in ("maximize", "master_weights"):
        del older["param_groups"][0][name]
    opt.load_state_dict(older)
    assert opt.param_groups[0]["maximize"] is False
    train(opt, params, 2, 3)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d["param_groups"][0].pop("rho"), "group 0 of state_dict lacks rho: it is not of RMSProp"),
        (lambda d: d["state"][0].update(m=torch.zeros(3)), "the state must be s, master, step; state_dict has m"),
        (
            lambda d: d["state"][0].update(s=torch.zeros(4)),
            r"state_dict has \(4,\) as s of a parameter of shape \(3,\)",
        ),
        (lambda d: d["param_groups"][0].update(lr=-1.0), "lr must be finite and in"),
        (lambda d: d["param_groups"].append(d["param_groups"][0]), "different number of parameter groups"),
        (lambda d: d["state"][1].update(step=torch.tensor(-1)), "step in state_dict must be at least 0, got -1"),
        (
            lambda d: d.pop("state"),
            "state_dict must have state and param_groups, got param_groups",
        ),
        (
            lambda d: d["param_groups"][0].update(alpha=d["param_groups"][0].pop("rho")),
            "it is not of RMSProp, but of torch.optim, with alpha: begin with new state",
        ),
    ],
    ids=["rule", "state", "shape", "value", "groups", "count", "no state", "of PyTorch"],
)
def test_a_state_dict_that_does_not_fit_changes_nothing(change: Any, words: str) -> None:
    params = tensors((3,), (4,))
    opt = gt.RMSProp(params)
    train(opt, params, 0, 2)
    wrong = copy.deepcopy(opt.state_dict())
    change(wrong)
    before = copy.deepcopy(opt.state_dict())
    with pytest.raises(ValueError, match=words):
        opt.load_state_dict(wrong)
    assert opt.state_dict()["param_groups"] == before["param_groups"]
    assert_same([opt.state[p]["s"] for p in params], [before["state"][i]["s"] for i in range(2)])
    train(opt, params, 2, 3)


def test_a_copied_model_with_its_optimizer_goes_the_same_way(make: Any) -> None:
    model = module()
    opt = make(model.parameters())
    backward(model)
    opt.step()
    model_too, opt_too = copy.deepcopy((model, opt))
    for m, o in ((model, opt), (model_too, opt_too)):
        for step in range(3):
            o.zero_grad()
            backward(m, step)
            o.step()
    assert_same(list(model.parameters()), list(model_too.parameters()))


# --- steps ------------------------------------------------------------------------------------------------------------


def test_a_closure_computes_gradients_and_its_loss_is_returned(make: Any) -> None:
    model = module()
    opt = make(model.parameters(), lr=0.01)

    def closure() -> Tensor:
        opt.zero_grad()
        return backward(model)

    with torch.no_grad():
        losses = [float(opt.step(closure).detach()) for _ in range(5)]
    assert losses[-1] < losses[0]
    assert opt.step() is None


@pytest.mark.exhaustive
def test_a_step_is_seen_by_a_profiler() -> None:
    params = tensors((3,))
    opt = gt.SGD(params, lr=0.1)
    train(opt, params, 0, 4)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        train(opt, params, 4, 5)
    assert "Optimizer.step#SGD.step" in [event.key for event in seen.key_averages()]


def test_hooks_of_all_optimizers_run_after_a_step() -> None:
    params = tensors((3,))
    opt = gt.SGD(params, lr=0.1)
    train(opt, params, 0, 4)
    called = list[Any]()
    register = sys.modules["torch.optim.optimizer"].register_optimizer_step_post_hook
    handle = register(lambda opt, *_: called.append(opt))
    try:
        train(opt, params, 4, 5)
    finally:
        handle.remove()
    train(opt, params, 5, 6)
    assert called == [opt]


def test_hooks_run_around_a_step() -> None:
    params = tensors((3,))
    opt = gt.SGD(params, lr=1.0)
    seen: list[str] = []
    opt.register_step_pre_hook(lambda *_: seen.append("before"))
    opt.register_step_post_hook(lambda *_: seen.append("after"))
    opt.register_state_dict_post_hook(lambda _, d: seen.append("saved"))
    opt.register_load_state_dict_post_hook(lambda _: seen.append("loaded"))
    train(opt, params, 0, 1)
    opt.load_state_dict(opt.state_dict())
    assert seen == ["before", "after", "saved", "loaded"]


def test_a_parameter_without_a_gradient_keeps_its_state_and_its_count(make: Any) -> None:
    mine, alone = tensors(*SHAPES), tensors(*SHAPES)
    opt = make(mine, weight_decay=0.1)
    singles = [make([p], weight_decay=0.1) for p in alone]
    for step in range(6):
        set_gradients(mine, step)
        set_gradients(alone, step)
        for i, (p, q) in enumerate(zip(mine, alone, strict=True)):
            if (step + i) % 3 == 0 or (i == 1 and step < 4):  # the second one appears late
                p.grad = q.grad = None
        opt.step()
        for single in singles:
            single.step()
    assert_same(mine, alone)
    assert [int(opt.state[p]["step"]) for p in mine] == [4, 1, 4, 4]


def test_without_any_gradient_nothing_happens(make: Any) -> None:
    params = tensors(*SHAPES)
    before = values(params)
    opt = make(params)
    opt.step()
    assert not opt.state
    for p, w in zip(params, before, strict=True):
        np.testing.assert_array_equal(p.detach().numpy(), w)


def test_all_groups_are_updated_by_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    params = tensors(*SHAPES)
    opt = gt.RMSProp([{"params": params[:2], "weight_decay": 0.1}, {"params": params[2:], "lr": 0.1}])
    train(opt, params, 0, 1)
    (engine,) = opt._engines.values()
    if engine.at_once is None:
        pytest.skip("no compiled update here")
    calls: list[tuple[int, int]] = []
    at_once = engine.at_once

    def counted(arrays: Any, rows: Any, *rest: Any) -> bool:
        calls.append((len(arrays), len(rows)))
        return bool(at_once(arrays, rows, *rest))

    monkeypatch.setattr(engine, "at_once", counted)
    monkeypatch.setattr(gt.Repeat, "step", lambda *arguments: False)
    train(opt, params, 1, 3)
    assert calls == [(4, 2)] * 2


@pytest.mark.parametrize("kind", [gt.Adam, functools.partial(gt.Optimizer, rule=custom)], ids=["Adam", "own"])
def test_without_dlpacks_c_functions_the_bits_are_the_same(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    params, wanted = tensors(*SHAPES), tensors(*SHAPES)
    train(kind(wanted), wanted, 0, 3)
    monkeypatch.setattr(gt, "EXCHANGE", None)
    opt = kind(params)
    train(opt, params, 0, 3)
    assert_same(params, wanted)
    (params[0].grad,) = torch.autograd.grad(params[0].square().sum(), params[0], create_graph=True)
    opt.step()  # Tensor.numpy refuses this gradient
    assert int(opt.state[params[0]]["step"]) == 4


def nothing(opt: Any, p: Tensor, g: Tensor) -> Tensor | None:
    return g


def moved(opt: Any, p: Tensor, g: Tensor) -> Tensor | None:
    p.data = p.data.clone()
    return g


def of_another_shape(opt: Any, p: Tensor, g: Tensor) -> Tensor | None:
    p.data, p.grad = p.data.ravel().clone(), None
    opt.state[p] = {name: x.ravel() if x.ndim else x for name, x in opt.state[p].items()}
    return g.ravel()


def of_another_type(opt: Any, p: Tensor, g: Tensor) -> Tensor | None:
    p.data, p.grad = p.data.double(), None
    opt.load_state_dict(opt.state_dict())
    return g.double()


def replaced(opt: Any, p: Tensor, g: Tensor) -> Tensor | None:
    other = torch.nn.Parameter(p.detach().clone())
    opt.param_groups[0]["params"][0] = other
    other.grad = g
    return None


def added(opt: Any, p: Tensor, g: Tensor) -> Tensor | None:
    opt.add_param_group({"params": [other := torch.nn.Parameter(p.detach().clone())], "weight_decay": 0.1})
    other.grad = g
    return g


def counted(opt: Any, p: Tensor, g: Tensor) -> Tensor | None:
    opt.state[p]["step"].fill_(10)
    return g


def other_state(opt: Any, p: Tensor, g: Tensor) -> Tensor | None:
    opt.state[p]["v"] = torch.ones_like(p)
    return g


def other_arguments(opt: Any, p: Tensor, g: Tensor) -> Tensor | None:
    opt.param_groups[0].update(lr=0.1, beta1=0.5)
    return g


def uphill(opt: Any, p: Tensor, g: Tensor) -> Tensor | None:
    opt.param_groups[0]["maximize"] = True
    return g


def the_parameter_itself(opt: Any, p: Tensor, g: Tensor) -> Tensor | None:
    return p.detach()


def negated(opt: Any, p: Tensor, g: Tensor) -> Tensor | None:
    return torch._neg_view(g)  # contiguous: no stride tells


GRADIENTS: dict[str, Callable[[Tensor], Tensor | None]] = {
    "no gradient": lambda g: None,
    "transposed gradient": lambda g: g.t().contiguous().t(),
    "gradient with gaps": lambda g: torch.stack([g, g], -1)[..., 0],
    "expanded gradient": lambda g: g[0, 0].expand(g.shape),
}
CHANGES: dict[str, Callable[[Any, Tensor, Tensor], Tensor | None]] = {
    **{name: lambda opt, p, g, change=change: change(g) for name, change in GRADIENTS.items()},
    **{
        f.__name__: f
        for f in (
            nothing,
            moved,
            of_another_shape,
            of_another_type,
            replaced,
            added,
            counted,
            other_state,
            other_arguments,
            uphill,
            the_parameter_itself,
            negated,
        )
    },
}


def changed(name: str, frozen: bool, step: Callable[..., bool]) -> tuple[list[Tensor], Any, list[bool]]:
    """Eight steps, of which the fifth finds a change; what ``step``, in the place of Repeat.step, returned in them."""
    found = list[bool]()

    def noted(*arguments: Any) -> bool:
        found.append(step(*arguments))
        return found[-1]

    params = tensors((3, 4), (5,), (70, 130), ())
    opt = gt.Adam([{"params": params[:2]}, {"params": params[2:], "lr": 0.1}])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gt.Repeat, "step", noted)
        for i in range(8):
            set_gradients(params, i)
            if frozen:
                params[2].grad = None
            if i == 4:
                params[0].grad = CHANGES[name](opt, params[0], params[0].grad)
            opt.step()
    return [*params, *(p for group in opt.param_groups for p in group["params"])], opt, found


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", CHANGES)
def test_steps_that_are_repeated_notice_what_changes(name: str, frozen: bool) -> None:
    """The oracle is an optimizer that looks at each tensor in every step."""
    mine, opt, found = changed(name, frozen, gt.Repeat.step)
    wanted, other, _ = changed(name, frozen, lambda *arguments: False)
    assert_same(mine, wanted)
    for p, q in zip(mine, wanted, strict=True):
        assert (p in opt.state) == (q in other.state)
        if p in opt.state:
            assert_same(list(opt.state[p].values()), list(other.state[q].values()))
    if not isinstance(host_library(), str):
        assert found[:2] == [True, True]  # after two that looked
        assert (found[2:3] == [True]) == (name in ("nothing", "other_arguments"))
        if name not in ("of_another_type", "uphill"):  # those take two calls from then on
            assert found[-1]


@pytest.mark.parametrize("name", ["nothing", "negated", "moved", "gradient with gaps"])
def test_repeated_steps_do_without_the_functions_of_libtorch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(gt.inner_functions()) in (0, 3)
    wanted, *_, taken = changed(name, False, gt.Repeat.step)
    monkeypatch.setattr(gt, "inner_functions", list)
    found, *_, without = changed(name, False, gt.Repeat.step)
    assert_same(found, wanted)
    assert without == taken


def test_a_subclass_may_say_what_its_gradient_is() -> None:
    class Doubled(torch.nn.Parameter):
        @property
        def grad(self) -> Tensor | None:
            g = torch.Tensor.grad.__get__(self)
            return None if g is None else 2 * g

        @grad.setter
        def grad(self, g: Tensor | None) -> None:
            torch.Tensor.grad.__set__(self, g)

    (plain,) = tensors((3, 4))
    doubled = Doubled(plain.detach().clone())
    opt, other = gt.SGD([doubled], lr=0.5), gt.SGD([plain], lr=1.0)
    train(opt, [doubled], 0, 5)
    train(other, [plain], 0, 5)
    assert_same([doubled], [plain])


def test_what_is_refused_is_refused_in_repeated_steps_too(make: Any) -> None:
    params = tensors((4, 3))
    opt = make(params)
    train(opt, params, 0, 3)
    before = values(params)
    params[0].grad = torch.eye(4, 3).to_sparse()
    with pytest.raises(gb.DTypeError, match="is sparse"):
        opt.step()
    np.testing.assert_array_equal(params[0].detach().numpy(), before[0])
    opt.add_param_group({"params": [torch.nn.Parameter(params[0].detach())]})
    for p in (params[0], opt.param_groups[1]["params"][0]):
        p.grad = torch.ones(4, 3)
    with pytest.raises(gb.ArgumentError, match="share memory"):
        opt.step()


def test_an_optimizer_that_its_parameters_refer_to_is_collected() -> None:
    params = tensors((3, 4))
    opt = gt.Adam(params)
    train(opt, params, 0, 4)
    params[0].owner = opt
    alive = weakref.ref(opt)
    del params, opt
    gc.collect()
    assert alive() is None


def test_views_of_tensors_keep_them_alive_and_have_their_strides() -> None:
    x = torch.arange(24.0).view(2, 3, 4)
    seen = [x, x.transpose(0, 2), x[:, ::2], x[1, 1, 1], x.double(), torch.zeros(0, 3)]
    wanted = [t.numpy().copy() for t in seen]
    views = gt.tensor_views(seen)
    assert [v.strides for v in views] == [t.numpy().strides for t in seen]
    seen.clear()
    x = None
    for view, array in zip(views, wanted, strict=True):
        np.testing.assert_array_equal(view, array)
        assert view.dtype == array.dtype
    for other in (torch.zeros(3).to_sparse(), torch.zeros(3, dtype=torch.bfloat16), torch.zeros(3, device="meta")):
        assert gt.tensor_views([torch.zeros(3), other]) is None


def test_autograd_sees_that_parameters_were_changed(make: Any) -> None:
    (w,) = tensors((3, 3))
    opt = make([w])
    w.grad = torch.ones_like(w)
    loss = (w @ w).sum()  # backward needs w
    version = w._version
    opt.step()
    assert w._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_state_that_the_user_replaces_is_taken(make: Any) -> None:
    params, fresh = tensors(*SHAPES), tensors(*SHAPES)
    opt = make(params)
    train(opt, params, 0, 3)
    opt.state.clear()
    with torch.no_grad():
        for p, q in zip(params, fresh, strict=True):
            p.copy_(q)
    train(opt, params, 0, 3)
    train(make(fresh), fresh, 0, 3)
    assert_same(params, fresh)
    assert int(opt.state[params[0]]["step"]) == 3


def test_a_count_that_the_user_writes_is_taken() -> None:
    mine, wanted = tensors(*SHAPES), tensors(*SHAPES)
    opt, other = gt.Adam(mine), gt.Adam(wanted)
    train(opt, mine, 0, 1)
    train(other, wanted, 0, 1)
    for p, q in zip(mine, wanted, strict=True):
        opt.state[p]["step"].fill_(10)
        other.state[q]["step"] = torch.tensor(10.0)
    train(opt, mine, 1, 3)
    train(other, wanted, 1, 3)
    assert_same(mine, wanted)
    assert int(opt.state[mine[0]]["step"]) == 12


def test_values_that_move_are_followed() -> None:
    params, still = tensors((3, 4), (5,)), tensors((3, 4), (5,))
    opt, other = gt.Adam(params), gt.Adam(still)
    for step in range(4):
        for p in params:
            p.data = p.data.clone()
        train(opt, params, step, step + 1)
        train(other, still, step, step + 1)
    assert_same(params, still)


# --- layouts, types and devices ---------------------------------------------------------------------------------------


def channels_last(p: Tensor) -> Tensor:
    return p.detach().contiguous(memory_format=torch.channels_last)


LAYOUTS: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor]]] = {
    "channels last": ((2, 3, 4, 5), channels_last),
    "transposed": ((4, 6), lambda p: p.detach().t().contiguous().t()),
    "with gaps": ((4, 6), lambda p: torch.stack([p.detach(), torch.zeros(4, 6)], -1)[..., 0]),
    "gaps, transposed": ((4, 6), lambda p: torch.stack([p.detach(), torch.zeros(4, 6)])[0].t().contiguous().t()[::2]),
    "one row": ((1, 6), lambda p: p.detach().t().contiguous().t()),
    "part of a buffer": ((4, 6), lambda p: torch.cat([torch.zeros(5), p.detach().ravel()])[5:].view(4, 6)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("of_gradient", ["same", "contiguous", "transposed", "expanded"])
@pytest.mark.parametrize("kind", ["Adam", "own"])
def test_parameters_and_gradients_may_have_any_strides(layout: str, of_gradient: str, kind: str) -> None:
    make = functools.partial(gt.Optimizer, rule=custom) if kind == "own" else gt.Adam
    shape, lay_out = LAYOUTS[layout]
    (p,) = tensors(shape)
    q = torch.nn.Parameter(lay_out(p))
    p = torch.nn.Parameter(q.detach().clone(memory_format=torch.contiguous_format))
    one, other = make([p]), make([q])
    for step in range(4):
        set_gradients([p], step)
        if of_gradient == "expanded":
            p.grad = p.grad.ravel()[0].expand(p.shape)
        q.grad = p.grad
        if of_gradient == "same":
            q.grad = torch.empty_like(q).copy_(p.grad)
        elif of_gradient == "transposed":
            q.grad = p.grad.transpose(0, -1).contiguous().transpose(0, -1)
        one.step()
        other.step()
        if step == 1:
            other.load_state_dict(through_a_file(one.state_dict()))
    assert_same([q], [p])


def test_empty_tensors_are_counted() -> None:
    params = tensors((0,), (3,), (0, 4))
    opt = gt.Adam(params)
    train(opt, params, 0, 2)
    assert [int(opt.state[p]["step"]) for p in params] == [2, 2, 2]


def test_element_types_may_be_mixed(make: Any) -> None:
    kinds = [torch.float32, torch.float64, torch.float16]
    mixed = [tensors((3, 4), dtype=dtype)[0] for dtype in kinds]
    alone = [tensors((3, 4), dtype=dtype)[0] for dtype in kinds]
    opt, singles = make(mixed), [make([p]) for p in alone]
    for step in range(3):
        for p, q in zip(mixed, alone, strict=True):
            set_gradients([p], step)
            set_gradients([q], step)
        opt.step()
        for single in singles:
            single.step()
    assert_same(mixed, alone)


def test_a_gradient_that_is_the_parameter_is_read_before_it_changes(make: Any) -> None:
    mine, wanted = tensors((3, 4)), tensors((3, 4))
    opt, other = make(mine), make(wanted)
    for _ in range(3):
        mine[0].grad = mine[0].detach()
        wanted[0].grad = wanted[0].detach().clone()
        opt.step()
        other.step()
    assert_same(mine, wanted)


def test_a_gradient_with_the_negative_bit_is_resolved() -> None:
    mine, wanted = tensors((3,)), tensors((3,))
    g = torch.tensor([1 + 2j, 3 - 1j, 0 + 1j]).conj().imag
    assert g.is_neg()
    mine[0].grad, wanted[0].grad = g, g.resolve_neg()
    gt.SGD(mine, lr=1.0).step()
    gt.SGD(wanted, lr=1.0).step()
    assert_same(mine, wanted)


def test_a_gradient_that_has_a_derivative_is_taken() -> None:
    (w,) = tensors((3,))
    before = w.detach().clone()
    (w.grad,) = torch.autograd.grad(w.square().sum(), w, create_graph=True)
    gt.SGD([w], lr=0.25).step()
    torch.testing.assert_close(w.detach(), 0.5 * before)


def embedding() -> Tensor:
    layer = torch.nn.Embedding(4, 3, sparse=True)
    layer(torch.tensor([1, 2])).sum().backward()
    return layer.weight


def test_what_cannot_be_updated_is_refused_in_words() -> None:
    (p,) = tensors((3,))
    named = [("head.bias", torch.nn.Parameter(torch.zeros(3, dtype=torch.bfloat16)))]
    with pytest.raises(
        gb.DTypeError, match=r"'head.bias' must be float32, float64 or float16, got torch.bfloat16; keep b"
    ):
        gt.Adam(named)
    with pytest.raises(gb.DTypeError, match=r"param_groups\[0\]\['params'\]\[1\] must be .*, got torch.complex64"):
        gt.Adam([p, torch.nn.Parameter(torch.zeros(3, dtype=torch.complex64))])
    with pytest.raises(gb.DTypeError, match="is sparse"):
        gt.Adam([torch.zeros(3, 3).to_sparse().requires_grad_()])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nested tensors are a prototype
        nested = torch.nested.nested_tensor([torch.zeros(3), torch.zeros(2)], requires_grad=True)
    with pytest.raises(gb.DTypeError, match="is a nested tensor; give plain ones"):
        gt.Adam([nested])
    with pytest.raises(gb.DeviceMismatchError, match="must be on the CPU or on a CUDA device, it is on meta"):
        gt.Adam([torch.nn.Parameter(torch.zeros(3, device="meta"))])
    with pytest.raises(gb.DTypeError, match=r"gradient of param_groups\[0\]\['params'\]\[0\] is sparse .*sparse=False"):
        gt.Adam([embedding()]).step()
    overlap = torch.zeros(6)
    pair = [overlap[:4].requires_grad_(), overlap[3:].detach().requires_grad_()]
    opt = gt.Adam(pair)
    set_gradients(pair, 0)
    with pytest.raises(gb.ArgumentError, match=r"\[0\] and param_groups\[0\]\['params'\]\[1\] share memory"):
        opt.step()
    expanded = torch.zeros(1).expand(5).requires_grad_()
    opt = gt.Adam([expanded])
    expanded.grad = torch.ones(5)
    with pytest.raises(gb.ArgumentError, match=r"elements of .* share memory"):
        opt.step()


def reshaped(opt: Any, p: Tensor) -> None:
    p.grad, p.data = None, torch.zeros(5)
    p.grad = torch.ones(5)
    opt.step()


def with_another_gradient(opt: Any, p: Tensor) -> None:
    p.grad.data = torch.zeros(5)
    opt.step()


def without_an_argument(opt: Any, p: Tensor) -> None:
    del opt.param_groups[0]["rho"]
    opt.step()


def writing(name: str, value: Any) -> Callable[[Any, Tensor], None]:
    """A value that is written into the group, before a step of the kind that is repeated."""

    def write(opt: Any, p: Tensor) -> None:
        opt.param_groups[0][name] = value
        opt.step()

    return write


def loading_plain_sgd(opt: Any, p: Tensor) -> None:
    own = gt.SGD([p], lr=0.1)
    own.load_state_dict(torch.optim.SGD([p], lr=0.5).state_dict())
    assert own.param_groups[0]["lr"] == 0.5
    own.step()
    own.load_state_dict(torch.optim.SGD([p], momentum=0.5).state_dict())


MISTAKES: dict[str, tuple[Callable[[Any, Tensor], Any], str]] = {
    "betas later": (
        writing("betas", (0.8, 0.9)),
        r"param_groups\[0\] has no argument 'betas' .* it is beta1= and beta2=",
    ),
    "alpha later": (writing("alpha", 0.9), "no argument 'alpha' of torch.optim; here it is rho="),
    "learning_rate later": (writing("learning_rate", 0.1), "got 'learning_rate'; did you mean 'lr'"),
    "misspelt later": (writing("weight_deacy", 0.1), "got 'weight_deacy'; did you mean 'weight_decay'"),
    "tensor of two later": (writing("lr", torch.ones(2)), "lr must be a number, got tensor"),
    "array later": (writing("lr", np.ones(2)), "lr must be a real number .* got array"),
    "as an attribute": (lambda opt, p: setattr(opt, "lr", 0.5), "opt.lr = 0.5 changes nothing: .* in opt.param_groups"),
    "state of SGD with momentum": (
        loading_plain_sgd,
        "group 0 of state_dict has no argument 'momentum' of torch.optim",
    ),
    "another shape": (reshaped, r"state s of .* has shape \(3,\), the parameter \(5,\); delete opt.state.p."),
    "gradient of another shape": (with_another_gradient, r"the gradient of .* has shape \(5,\), the parameter \(3,\)"),
    "argument deleted": (without_an_argument, r"param_groups\[0\] must have .*lr.*; it lacks 'rho'"),
    "no closure": (
        lambda opt, p: opt.step([p.grad]),
        "closure must be a function that computes gradients .*, got .tensor",
    ),
    "misspelt in a group": (
        lambda opt, p: opt.add_param_group({"params": [torch.zeros(2)], "weight_deacy": 0.1}),
        "a group takes .* did you mean 'weight_decay'",
    ),
    "module": (
        lambda opt, p: gt.Adam(module()),
        r"params must be the parameters of Sequential: give model.parameters\(\)",
    ),
    "mapping": (lambda opt, p: gt.Adam({"p": p}), r"give the items\(\) of a mapping"),
    "used up": (lambda opt, p: gt.Adam(iter(())), r"model.parameters\(\) gives can be gone through only once"),
    "state of an own rule": (
        lambda opt, p: gt.Optimizer([p], stepping),
        "stepping has a state 'step', the name of PyTorch's",
    ),
}


@gb.rule
def stepping(w, g, step, t, *, lr=0.1):
    return w - lr * g, step


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_of_every_day_are_told(mistake: str) -> None:
    (p,) = tensors((3,))
    opt = gt.RMSProp([p])
    train(opt, [p], 0, 3)
    make_it, words = MISTAKES[mistake]
    with pytest.raises((TypeError, ValueError), match=words):
        make_it(opt, p)


def test_names_of_one_s_own_are_kept_in_groups() -> None:
    own = {"name": "head", "initial_lr": 0.1, "max_lr": 1.0, "min_lr": 0.0, "lr_scale": 2.0, "layer_decay": 0.5}
    opt = gt.RMSProp([{"params": tensors((3,)), **own}])
    assert opt.param_groups[0].items() >= own.items()
    opt.param_groups[0].update(note="later", max_momentum=0.9, base_momentum=0.8)  # as OneCycleLR writes them
    opt.step()


class WithRate(gt.SGD):
    def __init__(self, params: Any, lr: float) -> None:
        self.lr = lr
        gt.SGD.__init__(self, params, lr)


def test_a_user_s_class_may_have_any_attributes() -> None:
    opt = WithRate(tensors((3,)), 0.25)
    opt.lr = 0.5
    assert opt.param_groups[0]["lr"] == 0.25


def move(groups: list[dict[str, Any]]) -> None:
    groups[1]["params"].insert(0, groups[0]["params"].pop())


def remove(groups: list[dict[str, Any]]) -> None:
    del groups[1]


def exchange(groups: list[dict[str, Any]]) -> None:
    groups[0] = {**groups[0], "lr": 0.3}
    groups.reverse()


@pytest.mark.parametrize("change", [move, remove, exchange], ids=lambda f: f.__name__)
def test_groups_that_are_rearranged_are_followed(change: Any) -> None:
    """The order of all parameters may stay."""
    pairs = []
    for kind in (gt.SGD, torch.optim.SGD):
        params = tensors((3,), (4,), (5,))
        opt = kind([{"params": params[:2], "lr": 0.5}, {"params": params[2:], "lr": 0.1}], lr=0.1)
        train(opt, params, 0, 3)
        change(opt.param_groups)
        train(opt, params, 3, 6)
        pairs.append(params)
    torch.testing.assert_close(*pairs, rtol=1e-6, atol=1e-7)


def test_numbers_of_numpy_are_saved_as_python_s() -> None:
    opt = gt.Adam(tensors((3,)), lr=np.float32(0.5))
    scheduler = torch.optim.lr_scheduler.LambdaLR(opt, lambda epoch: np.float64(0.25))
    assert type(through_a_file(opt.state_dict())["param_groups"][0]["lr"]) is float
    assert scheduler.get_last_lr() == opt.param_groups[0]["lr"] == 0.125


def test_a_tensor_whose_values_are_elsewhere_is_refused() -> None:
    class Wrapped(torch.Tensor):
        @classmethod
        def __torch_dispatch__(cls, function: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
            return function(*args, **(kwargs or {}))

    wrapped = torch.zeros(3).as_subclass(Wrapped).requires_grad_()
    with pytest.raises(gb.DTypeError, match="is a Wrapped: its values are not in memory of its own"):
        gt.Adam([wrapped])


def test_a_cuda_device_needs_cupy_and_it_is_said_when_the_optimizer_is_made() -> None:
    if "cuda:0" in gb.available_backends():
        pytest.skip("there is a device")
    with pytest.raises(gb.BackendUnavailableError, match="'cuda' cannot be used"):
        gt.backend_for(torch.device("cuda", 0))


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("Adam", {"betas": (0.9, 0.99)}, "Adam has no argument 'betas' of torch.optim; here it is beta1= and beta2="),
        ("RMSProp", {"alpha": 0.99}, "here it is rho="),
        ("SGD", {"lr": 0.1, "momentum": 0.9}, r"here it is the class HeavyBall\(params, lr, mu="),
        ("Adam", {"fused": True}, "every step is one fused call"),
        ("Adam", {"lrr": 1.0}, "did you mean 'lr'"),
        ("SGD", {}, r"^SGD\(params.*missing a required argument: 'lr'"),
        ("Adam", {"lr": -1.0}, r"lr must be finite and in \[0, inf\), got -1.0"),
        ("Adam", {"lr": torch.ones(2)}, "lr must be a number, got tensor"),
        ("Adam", {"lr": gb.CosineDecay(0.1, total=5, per="step")}, "schedules are those of torch.optim.lr_scheduler"),
        ("Adam", {"maximize": 1}, "maximize must be True or False"),
        ("Adam", {"eps_at": "side"}, "eps_at must be one of"),
    ],
)
def test_arguments_are_checked(name: str, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=words):
        getattr(gt, name)(tensors((3,)), **arguments)
    opt = getattr(gt, name)(tensors((3,)), lr=0.1)
    if arguments and "lrr" not in arguments:
        group = {key: value for key, value in arguments.items() if name != "SGD" or key != "lr"}
        with pytest.raises((TypeError, ValueError)):
            opt.add_param_group({"params": tensors((3,)), **group})
        assert len(opt.param_groups) == 1


def test_a_value_that_is_assigned_is_checked_in_the_next_step() -> None:
    params = tensors((3,))
    opt = gt.Adam(params)
    train(opt, params, 0, 1)
    opt.param_groups[0]["beta1"] = 2.0
    with pytest.raises(gb.ArgumentError, match="beta1 must be finite and in"):
        train(opt, params, 1, 2)


def test_a_rule_is_needed_with_all_that_it_requires() -> None:
    @gb.rule
    def plain(w, g, t, *, rate):
        return (w - rate * g,)

    with pytest.raises(gb.ArgumentError, match="plain needs rate; none was given"):
        gt.Optimizer(tensors((3,)), plain)
    with pytest.raises(gb.DTypeError, match=r"rule must be made with @gpubatch.rule"):
        gt.Optimizer(tensors((3,)), lambda w: w)
    params = tensors((3,))
    before = values(params)
    opt = gt.Optimizer(params, plain, rate=0.5)
    train(opt, params, 0, 1)
    np.testing.assert_array_equal(params[0].detach().numpy(), before[0] - np.float32(0.5) * params[0].grad.numpy())


# --- with the rest of PyTorch -----------------------------------------------------------------------------------------


def test_loss_scaling_skips_a_step_with_an_infinite_gradient() -> None:
    params, plain = tensors((3,), dtype=torch.float32), tensors((3,), dtype=torch.float32)
    opt, other = gt.Adam(params), gt.Adam(plain)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for step, overflow in enumerate([False, True, False]):
        set_gradients(plain, step)
        scale = scaler.get_scale()
        scaler.scale(torch.zeros(()))
        params[0].grad = plain[0].grad * (float("inf") if overflow else scale)
        scaler.step(opt)
        scaler.update()
        if not overflow:
            other.step()
    assert_same(params, plain)
    assert int(opt.state[params[0]]["step"]) == 2


def test_a_compiled_model_and_a_wrapped_one_are_trained_as_the_model_itself() -> None:
    wanted = module()
    opt = gt.RMSProp(wanted.parameters())
    models = [torch.compile(module(), backend="eager"), torch.nn.DataParallel(module())]
    optimizers = [gt.RMSProp(model.parameters()) for model in models]
    for m, o in ((wanted, opt), *zip(models, optimizers, strict=True)):
        for step in range(3):
            o.zero_grad()
            backward(m, step)
            o.step()
    for model in models:
        assert_same(list(model.parameters()), list(wanted.parameters()))


def test_a_parameter_that_two_modules_share_is_updated_once() -> None:
    first = torch.nn.Linear(3, 3)
    second = torch.nn.Linear(3, 3)
    second.weight = first.weight
    both = torch.nn.Sequential(first, second)
    opt = gt.SGD(both.parameters(), lr=0.5)
    before = first.weight.detach().clone()
    both(torch.ones(2, 3)).sum().backward()
    opt.step()
    torch.testing.assert_close(first.weight.detach(), before - 0.5 * first.weight.grad)
    assert int(opt.state[first.weight]["step"]) == 1


def test_a_step_works_inside_a_compiled_function() -> None:
    model = module()
    opt = gt.Adam(model.parameters())
    before = values(list(model.parameters()))

    @torch.compile(backend="eager")
    def train_step() -> None:
        opt.step()

    backward(model)
    train_step()
    assert all((p.detach().numpy() != w).any() for p, w in zip(model.parameters(), before, strict=True))


# --- CUDA, as far as a machine without PyTorch's CUDA can show it -----------------------------------------------------


class DeviceTensors:
    """Tensors whose memory is that of the emulated device, which its kernels and PyTorch on the host both reach."""

    def __init__(self, backend: gb.Backend) -> None:
        self.backend, self.memory = backend, []
        self.streams: set[int] = set()  # that views were made on

    def like(self, x: Tensor, dtype: Any = None) -> Tensor:
        array = self.backend.zeros(x.shape, str(dtype or x.dtype).removeprefix("torch."))
        self.memory.append(array)
        if not array.size:
            return torch.zeros(x.shape, dtype=dtype or x.dtype)
        buffer = (ctypes.c_byte * array.nbytes).from_address(array.data.ptr)
        return torch.frombuffer(buffer, dtype=dtype or x.dtype).view(x.shape)

    def state_like(self, params: list[Tensor]) -> list[Tensor]:
        return [self.like(p, torch.float32 if p.dtype == torch.float16 else p.dtype) for p in params]

    def view(self, x: Tensor) -> Any:
        """As CuPy's from_dlpack has it."""
        cuda = self.backend.cupy.cuda
        self.streams.add(cuda.get_current_stream().ptr)
        pointer = cuda.MemoryPointer(cuda.UnownedMemory(x.data_ptr(), x.nbytes, x, 0), 0)
        return self.backend.cupy.ndarray(x.shape, str(x.dtype).removeprefix("torch."), pointer)


@pytest.mark.gpu
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_on_a_gpu_the_kernel_works_in_the_memory_of_tensors(
    name: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not emulated_gpu.installed():
        pytest.skip("PyTorch's tensors are in the memory of the emulated device only")
    backend = get_backend("cuda:0")
    device, stream = DeviceTensors(backend), backend.stream()
    wanted = tensors(*SHAPES, (300, 70), (0,), dtype=getattr(torch, dtype))
    params = [torch.nn.Parameter(device.like(p).copy_(p.detach())) for p in wanted]
    other = variant(name, [{"params": wanted[:2]}, {"params": wanted[2:], "lr": 0.5 * LR, "weight_decay": 0.1}])
    train(other, wanted, 0, 4)

    monkeypatch.setattr(gt, "get_backend", lambda spec: backend)
    monkeypatch.setattr(gt.Lane, "_view", lambda lane, x: device.view(x))
    monkeypatch.setattr(gt, "state_like", device.state_like)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: types.SimpleNamespace(cuda_stream=stream.ptr))
    opt = variant(name, [{"params": params[:2]}, {"params": params[2:], "lr": 0.5 * LR, "weight_decay": 0.1}])
    for step in range(4):
        set_gradients(params, step)
        for p in params:
            p.grad = device.like(p).copy_(p.grad)
        opt.step()
        stream.synchronize()
    tolerance = 2e-3 if dtype == "float16" else 1e-5
    for p, q in zip(params, wanted, strict=True):
        torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)
    assert device.streams == {stream.ptr}
    (engine,) = opt._engines.values()
    assert isinstance(engine.call, CudaUpdate)


@pytest.mark.gpu
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_tensors_on_a_gpu_get_the_values_of_those_on_the_cpu(name: str, dtype: str) -> None:
    if emulated_gpu.installed() or not torch.cuda.is_available():
        pytest.skip("PyTorch has no CUDA here")
    wanted = [*tensors(*SHAPES, (300, 70), (0,)), *tensors((6, 4))]
    wanted[-1] = torch.nn.Parameter(wanted[-1].detach().t())
    wanted = [torch.nn.Parameter(p.detach().to(getattr(torch, dtype))) for p in wanted]
    params = [torch.nn.Parameter(p.detach().cuda()) for p in wanted]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        opts = [variant(name, [{"params": x[:2]}, {"params": x[2:], "lr": 0.5 * LR}]) for x in (wanted, params)]
        for step in range(4):
            set_gradients(wanted, step)
            for p, q in zip(params, wanted, strict=True):
                p.grad = q.grad.to("cuda", non_blocking=True)
            for opt in opts:
                opt.step()
            if step == 1:
                opts[1].load_state_dict(through_a_file(opts[1].state_dict()))
    stream.synchronize()
    tolerance = 2e-3 if dtype == "float16" else 1e-5
    for p, q in zip(params, wanted, strict=True):
        torch.testing.assert_close(p.cpu(), q, rtol=tolerance, atol=tolerance)
        assert {x.device.type for key, x in opts[1].state[p].items() if key != "step"} <= {"cuda"}


@pytest.mark.gpu
def test_loss_scaling_works_on_a_gpu() -> None:
    if emulated_gpu.installed() or not torch.cuda.is_available():
        pytest.skip("PyTorch has no CUDA here")
    model = module().cuda()
    opt, scaler = gt.Adam(model.parameters(), lr=0.01), torch.amp.GradScaler("cuda")
    x, losses = torch.randn(64, 5, device="cuda"), []
    for _ in range(30):
        opt.zero_grad()
        with torch.autocast("cuda", torch.float16):
            loss = model(x).square().mean()
        scaler.scale(loss).backward()
        scaler.step(opt)
        scaler.update()
        losses.append(float(loss))
    assert losses[-1] < 0.5 * losses[0]


def test_a_step_in_a_graph_that_is_captured_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    lane = gt.Lane(0, torch.device("cpu"), torch.float32)
    lane.backend = queued_backend("late")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(gb.CaptureError, match="cannot be captured in a CUDA graph"):
        lane.scope()
