"""Groups of parameters: values of their own, frozen ones, and parameters without a gradient in a step."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from families import every
from hypothesis import given, strategies as st
from needs import peer
from optimizer_table import CASES, FAST, LR, Case
from stand_in import stand_in_backend

import gpubatch as gb
from gpubatch.nn import core_of

every_case = every("case", CASES, FAST)
SHAPES = {"W1": (7, 5), "b1": (5,), "W2": (5, 3), "b2": (3,), "none": (0, 2)}


def numbers(rng: np.random.Generator, shapes: Mapping[str, Any], dtype: Any = np.float64) -> dict[str, np.ndarray]:
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


# --- against PyTorch, and one optimizer for each parameter ---------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.torch])
def test_groups_and_missing_gradients_agree_with_pytorch(
    name: str, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its param_groups, parameters that it is not given, and gradients that are None in some steps."""
    torch, case = peer("torch"), CASES[name]
    monkeypatch.setattr(torch, "get_default_dtype", lambda: torch.float64)
    shapes = {name: shape for name, shape in SHAPES.items() if name != "none"}
    params = numbers(rng, shapes)
    theirs = {name: torch.tensor(w.copy(), requires_grad=True) for name, w in params.items()}
    trained = [{"params": [theirs["W1"]]}, {"params": [theirs["b1"]]}, {"params": [theirs["W2"]]}]
    peer_opt = case.torch(torch.optim, trained) if case.torch else None
    peer_opt.param_groups[1]["weight_decay"] = 0.0
    peer_opt.param_groups[2] |= {"weight_decay": 0.2, "lr": peer_opt.param_groups[2]["lr"] / 4}
    groups = {
        "b1": {"weight_decay": 0.0},
        "b*": {"trainable": False},
        "W2": {"weight_decay": 0.2, "lr": LR / 4},
    }
    opt = case.make(params, groups=groups)
    frozen = params["b2"].copy()
    for step in range(60):
        grads = {name: g if rng.random() < 0.7 else None for name, g in numbers(rng, shapes).items()}
        if step == 30 and "velocity" not in opt.rule.name:  # that form is another one when the rate changes
            opt.lr = LR / 2
            for group in peer_opt.param_groups[:2]:
                group["lr"] /= 2
        opt.step(grads)
        for name, w in theirs.items():
            w.grad = None if grads[name] is None else torch.tensor(grads[name])
        peer_opt.step()
    for name in ("W1", "b1", "W2"):
        np.testing.assert_allclose(params[name], theirs[name].detach().numpy(), rtol=0, atol=1e-10)
    np.testing.assert_array_equal(params["b2"], frozen)


VALUES: tuple[dict[str, Any] | None, ...] = (
    {},
    {"lr": 0.5},
    {"weight_decay": 0.25},
    {"lr": gb.SqrtDecay(0.5, per="step"), "weight_decay": 0.0},
    None,  # frozen
)


def check_against_single_optimizers(
    make: Callable[..., gb.Optimizer],
    form: str,
    values: list[dict[str, Any] | None],
    missing: list[int],
    dtype: Any,
    backend: gb.Backend,
    rng: np.random.Generator,
) -> None:
    """Each parameter ends as with an optimizer of its own, which does not see the steps without a gradient.

    form: "flat", "named" gradients of a flat buffer, or "apart".
    missing: for each step the parameters without a gradient, as bits.
    """
    start = numbers(rng, SHAPES, dtype)
    arrays = {name: backend.asarray(w.copy()) for name, w in start.items()}
    flat = gb.Parameters(start, backend, dtype)
    chosen = dict(zip(SHAPES, values, strict=True))
    groups = {name: {"trainable": False} if own is None else own for name, own in chosen.items() if own != {}}
    opt = make(arrays if form == "apart" else flat, groups=groups)
    singles = {name: backend.asarray(w.copy()) for name, w in start.items()}
    alone = {name: make({name: singles[name]}, **own) for name, own in chosen.items() if own is not None}
    for mask in missing:
        grads: dict[str, Any] = {name: backend.asarray(g) for name, g in numbers(rng, SHAPES, dtype).items()}
        if form == "flat":
            for name, g in grads.items():
                flat.grads[name] = g
            opt.step()
        else:
            grads = {name: None if mask >> i & 1 else g for i, (name, g) in enumerate(grads.items())}
            opt.step(grads)
        for name, single in alone.items():
            if grads[name] is not None:
                single.step({name: grads[name]})
    rounding = 0 if backend.name == "cpu" else 8 * np.finfo(dtype).eps  # a GPU may contract without a decay of 0
    for name, expected in singles.items():
        found = backend.to_numpy((arrays if form == "apart" else flat)[name])
        np.testing.assert_allclose(found, backend.to_numpy(expected), rtol=rounding, atol=rounding, err_msg=name)


@pytest.mark.parametrize("form", ["flat", "named", "apart"])
@every_case
def test_a_group_is_an_optimizer_of_its_own(
    case: Case, form: str, backend: gb.Backend, dtype: np.dtype, rng: np.random.Generator
) -> None:
    values = [VALUES[i] for i in (1, 3, 0, 3, 2)]
    check_against_single_optimizers(case.make, form, values, [0] * 4, dtype, backend, rng)


@pytest.mark.parametrize("form", ["named", "apart"])
@every_case
def test_a_parameter_without_a_gradient_keeps_its_count(
    case: Case, form: str, backend: gb.Backend, dtype: np.dtype, rng: np.random.Generator
) -> None:
    values = [VALUES[i] for i in (1, 0, 4, 2, 0)]
    check_against_single_optimizers(case.make, form, values, [0, 3, 2, 11, 9, 0, 0b11111, 8, 0], dtype, backend, rng)


@given(
    st.sampled_from(["sgd", "adam", "adamw", "lion decoupled", "nadam scheduled"]),
    st.sampled_from(["flat", "named", "apart"]),
    st.lists(st.sampled_from(VALUES), min_size=5, max_size=5).filter(lambda values: any(v is not None for v in values)),
    st.lists(st.integers(0, 31), min_size=1, max_size=6),
)
def test_any_partition(name: str, form: str, values: list[dict[str, Any] | None], missing: list[int]) -> None:
    if form != "flat" and any(missing):  # schedules go on while a parameter has no gradient
        values = [VALUES[1] if v is VALUES[3] else v for v in values]
    rng = np.random.default_rng(0)
    missing = [0] * len(missing) if form == "flat" else missing
    check_against_single_optimizers(CASES[name].make, form, values, missing, "float32", gb.get_backend("cpu"), rng)


@every_case
def test_groups_with_equal_values_are_no_groups(case: Case, dtype: np.dtype, rng: np.random.Generator) -> None:
    start = numbers(rng, SHAPES, dtype)
    a, b = gb.Parameters(start, "cpu", dtype), gb.Parameters(start, "cpu", dtype)
    plain = case.make(a, weight_decay=0.125)
    grouped = case.make(b, weight_decay=0.125, groups={"b*": {"lr": LR}, "W2": {"weight_decay": 0.125}})
    for _ in range(5):
        a.grads.flat[...] = b.grads.flat[...] = rng.standard_normal(a.size)
        plain.step()
        grouped.step()
    np.testing.assert_array_equal(a.flat, b.flat)
    for name, views in plain.state.items():
        np.testing.assert_array_equal(views.flat, grouped.state[name].flat)


def test_the_closed_form_of_two_groups() -> None:
    """SGD with decay: w is multiplied by 1 - lr·λ, less lr·g."""
    w, b = np.full(3, 2.0), np.full(2, 2.0)
    opt = gb.SGD({"w": w, "b": b}, 0.5, weight_decay=0.25, groups={"b": {"weight_decay": 0.0, "lr": 0.125}})
    opt.step({"w": np.ones(3), "b": np.ones(2)})
    assert (w.tolist(), b.tolist()) == ([1.25] * 3, [1.875] * 2)


# --- one update ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["flat", "named"])
def test_groups_are_one_launch(form: str, rng: np.random.Generator) -> None:
    device = stand_in_backend()
    start = numbers(rng, SHAPES, np.float32)
    on_device, on_host = gb.Parameters(start, device), gb.Parameters(start, "cpu")
    groups = {"b1": {"lr": gb.SqrtDecay(0.1, per="step")}, "W2": {"weight_decay": 0.5}, "none": {"trainable": False}}
    a, b = gb.Adam(on_device, groups=groups), gb.Adam(on_host, groups=groups)
    for step in range(1, 6):
        grads = numbers(rng, SHAPES, np.float32)
        for name, g in grads.items():
            on_device.grads[name] = device.asarray(g)
        if step == 3 and form == "named":
            grads["b2"] = None  # type: ignore[assignment]
        a.step(None if form == "flat" else {name: g if g is None else device.asarray(g) for name, g in grads.items()})
        b.step(grads)
        assert len(device.cupy.launches) == step
        np.testing.assert_array_equal(on_device.flat.get(), on_host.flat)
    assert len(device.cupy.compiled) == 1


def test_neighbours_with_the_same_values_are_updated_as_one() -> None:
    params = gb.Parameters(dict.fromkeys("abcdefgh", (4,)), "cpu")
    opt = gb.Adam(params, groups={"[bc]": {"lr": 0.5}, "d": {"lr": 0.5}, "f": {"trainable": False}, "g": {}})
    arrays, row_of = opt._arrays(None)
    assert [w.size for w, *_ in arrays] == [4, 12, 4, 8]
    assert row_of == [0, 1, 0, 0]
    assert opt.state["m"].flat.size == 28
    one, row_of = gb.Adam(params)._arrays(None)
    assert (len(one), row_of) == (1, None)
    assert one[0][0] is params.flat


# --- values ----------------------------------------------------------------------------------------------------------


def test_what_an_optimizer_says_of_its_groups() -> None:
    params = gb.Parameters({"W1": (2, 2), "b1": (2,), "b2": (2,)}, "cpu")
    opt = gb.SGD(params, 0.5, groups={"b1": {"trainable": False}, "b*": {"lr": 0.25}})
    assert opt.groups == {
        "b1": {"trainable": False, "parameters": ("b1",)},
        "b*": {"trainable": True, "parameters": ("b2",), "lr": 0.25},
    }
    assert (opt.lr, opt.frozen, opt.hyper["lr"]) == (0.5, ("b1",), 0.5)
    assert repr(opt) == (
        "<SGD sgd(lr=0.5, weight_decay=0.0, decoupled=False), groups['b1']=frozen, groups['b*']={'lr': 0.25}, "
        "3 parameters, t=0>"
    )
    assert opt.step(params.grads) == gb.StepResult(True, 1, 0.5)


def test_values_are_changed_by_hand() -> None:
    w, b, c = np.zeros(1), np.zeros(1), np.zeros(1)
    opt = gb.SGD({"w": w, "b": b, "c": c}, 1.0, groups={"b": {"lr": 2.0}, "c": {"weight_decay": 0.0}})
    ones = {name: np.ones(1) for name in "wbc"}
    opt.step(ones)
    opt.lr = 10.0
    opt.step(ones)
    opt.set_group("b", lr=gb.Piecewise([3], [20.0, 30.0], per="step"))
    opt.set_group("c", lr=5.0)
    opt.step(ones)
    opt.step(ones)
    assert (w.item(), b.item(), c.item()) == (-31.0, -2 - 2 - 20 - 30, -1 - 10 - 5 - 5)
    opt.set_group("c", weight_decay=0.5)  # the formula had none
    opt.step(ones)
    assert (w.item(), c.item()) == (-41.0, -21 - 5 * (1 - 0.5 * 21))


def test_a_schedule_is_asked_once_in_a_step() -> None:
    asked: list[tuple[str, int]] = []

    def schedule(name: str) -> Callable[[int, int], float]:
        return lambda step, epoch: asked.append((name, step)) or 0.1  # type: ignore[func-returns-value]

    arrays = {name: np.zeros(1) for name in "abcd"}
    opt = gb.Adam(arrays, schedule("common"), groups={"a": {"lr": schedule("a")}, "b": {"beta1": 0.5}, "c": {}})
    for _ in range(2):
        opt.step(arrays)
    assert asked == [("common", 0), ("a", 0), ("common", 1), ("a", 1)]


# --- state -----------------------------------------------------------------------------------------------------------


def test_state_round_trip(backend: gb.Backend, rng: np.random.Generator) -> None:
    groups = {"b2": {"trainable": False}, "b*": {"weight_decay": 0.0, "lr": gb.SqrtDecay(0.1)}, "W2": {"beta1": 0.5}}
    start = numbers(rng, SHAPES, np.float32)

    def made() -> tuple[gb.Parameters, gb.Optimizer]:
        params = gb.Parameters(start, backend)
        return params, gb.Adam(params, gb.ExponentialDecay(0.1, 0.9), weight_decay=0.1, groups=groups)

    grads = [{n: backend.asarray(g) for n, g in numbers(rng, SHAPES, np.float32).items()} for _ in range(6)]
    grads[1]["b1"] = grads[2]["b1"] = grads[2]["W1"] = grads[4]["W2"] = None  # type: ignore[assignment]
    whole, opt = made()
    for g in grads:
        opt.step(g)
    first, before = made()
    for g in grads[:3]:
        before.step(g)
    before.set_group("W2", lr=0.5)
    saved = before.state_dict()
    assert saved["missed"] == {"b1": 2, "W1": 1}
    assert list(saved["groups"]) == list(groups)
    again, after = made()
    again.flat[...] = first.flat
    after.load_state_dict({**json.loads(json.dumps({k: v for k, v in saved.items() if k != "state"})), **saved})
    assert after.groups["W2"] == {"trainable": True, "parameters": ("W2",), "beta1": 0.5, "lr": 0.5}
    after.load_state_dict({**saved, "groups": opt.state_dict()["groups"]})
    for g in grads[3:]:
        after.step(g)
    np.testing.assert_array_equal(backend.to_numpy(again.flat), backend.to_numpy(whole.flat))


def test_without_groups_the_state_has_no_new_entries() -> None:
    """So that states from before there were groups are loaded, and those of today by the version of then."""
    w = np.zeros(2)
    opt = gb.Adam([w])
    opt.step([w])
    assert set(opt.state_dict()) == {"rule", "t", "epoch", "pass", "hyper", "state"}
    opt.load_state_dict(opt.state_dict())


def test_master_weights_in_groups(backend: gb.Backend, rng: np.random.Generator) -> None:
    start = numbers(rng, SHAPES, np.float16)
    halves, floats = (gb.Parameters(start, backend, d) for d in ("float16", "float32"))
    groups = {"b1": {"lr": 0.1}, "W2": {"trainable": False}}
    a = gb.Adam(halves, lr=0.01, master_weights=True, groups=groups)
    b = gb.Adam(floats, lr=0.01, groups=groups)
    for _ in range(4):
        g = rng.standard_normal(halves.size).astype(np.float16)
        halves.grads.flat[...], floats.grads.flat[...] = backend.asarray(g), backend.asarray(g.astype(np.float32))
        a.step()
        b.step()
    assert "W2" not in a.state["master"]
    for name in SHAPES:
        expected = backend.to_numpy(floats[name])
        np.testing.assert_array_equal(backend.to_numpy(halves[name]), expected.astype(np.float16))
        if name != "W2":
            np.testing.assert_array_equal(backend.to_numpy(a.state["master"][name]), expected)


# --- without a gradient ----------------------------------------------------------------------------------------------


def test_a_step_without_any_gradient_is_none(backend: gb.Backend) -> None:
    w = backend.asarray(np.ones(3))
    opt = gb.Adam([w], weight_decay=0.5)
    assert opt.step([None]) == gb.StepResult(False, 0, 1e-3)
    assert backend.to_numpy(w).tolist() == [1, 1, 1]
    assert "missed" not in opt.state_dict()


def test_gradients_of_frozen_parameters_may_be_missing() -> None:
    arrays = {name: np.zeros(1) for name in "ab"}
    opt = gb.SGD(arrays, 1.0, groups={"a": {"trainable": False}})
    ones = np.ones(1)
    for grads in ({"b": ones}, {"a": None, "b": ones}, {"b": ones, "a": np.full(1, np.nan)}):
        opt.step(grads)
    assert {name: w.item() for name, w in arrays.items()} == {"a": 0, "b": -3}


def test_clipping_counts_no_gradient_that_is_not_there() -> None:
    g = np.array([3.0, 4.0])
    assert gb.clip_by_global_norm({"a": None, "b": g, "c": None}, 1.0) == 5.0
    np.testing.assert_allclose(g, [0.6, 0.8])
    assert gb.clip_by_global_norm([None], 1.0) == 0.0


# --- training --------------------------------------------------------------------------------------------------------


class Shift(gb.Layer):
    """A layer of the user's, with a parameter and a running mean."""

    def takes(self) -> None:
        """Any width."""

    def needs(self, features: int) -> gb.Needs:
        """A shift, and the mean of its inputs."""
        return gb.Needs(
            features, {"s": gb.Parameter((features,))}, buffers={"seen": gb.Parameter((features,))}, reads=("x",)
        )

    def forward(self, x: Any, y: Any, c: gb.Context) -> None:
        """y = x + s."""
        y[...] = x + c.p["s"]

    def backward(self, x: Any, y: Any, dy: Any, dx: Any, c: gb.Context) -> None:
        """ds = Σ dy; the mean is counted here."""
        c.g["s"][...] = dy.sum(axis=0)
        c.buffers["seen"][...] += x.mean(axis=0)
        if dx is not None:
            dx[...] = dy


def stack(*middle: gb.Layer) -> list[gb.Layer]:
    return [
        *(gb.Dense(6, 8), gb.BatchNorm(8), gb.ReLU()),
        *middle,
        *(gb.Dense(8, 8), gb.Tanh(), gb.Dense(8, 8, bias=False), gb.BatchNorm(8), gb.Dense(8, 3)),
    ]


FREEZING = {
    "nothing": (),
    "the lowest layers": ("[Wb]1", "gamma1", "beta1", "W2", "b2"),
    "one in the middle": ("[Wb]2",),
    "parts of layers": ("W1", "b2", "gamma1", "W4"),
    "norms": ("gamma*", "beta*"),
    "all but the last": ("[Wb][123]", "gamma?", "beta?"),
    "all but a norm": ("[Wb]?", "gamma1", "beta*"),
}


def case_of(freezing: str, l2: float = 0.0, own: bool = False) -> tuple[gb.Network, gb.Loader, gb.Optimizer]:
    rng = np.random.default_rng(2)
    X, Y = rng.standard_normal((60, 6)), rng.integers(0, 3, 60)
    net = gb.Network(stack(*([Shift()] if own else [])), l2=l2, dtype="float64", backend="cpu", seed=4)
    groups: dict[str, dict[str, Any]] = {pattern: {"trainable": False} for pattern in FREEZING[freezing]}
    if own:
        groups["s1"] = {"trainable": False}
    opt = gb.Adam(
        net.parameters,
        0.01,
        weight_decay=0.1,
        groups={**groups, "W5": {"lr": 0.05}} if "W5" in net.parameters else groups,
    )
    return net, gb.Loader(X, Y, batch_size=16, backend="cpu", dtype="float64", seed=1), opt


@pytest.mark.parametrize("own", [False, True], ids=["", "own"])
@pytest.mark.parametrize("l2", [0.0, 0.01])
@pytest.mark.parametrize("freezing", FREEZING)
def test_frozen_layers_change_nothing_else(freezing: str, l2: float, own: bool) -> None:
    """The oracle computes all gradients; the parameters that are trained end with the same bits."""
    net, loader, opt = case_of(freezing, l2, own)
    start = {name: w.copy() for name, w in net.parameters.items()}
    net.parameters.grads.flat[...] = 7.0  # what is left from before must not count
    history = gb.fit(net, loader, opt, 2, progress=False)
    whole, batches, other = case_of(freezing, l2, own)
    losses = []
    for epoch in range(2):
        other.epoch, total = epoch, 0.0
        for x, y in batches:
            loss, _ = whole.loss_and_grad(x, y)
            total += loss * len(x)
            other.step()
        losses.append(total / 60)
    np.testing.assert_allclose(history.loss, losses, rtol=1e-12)
    for name, w in net.parameters.items():
        np.testing.assert_array_equal(w, whole.parameters[name])
        if name in opt.frozen:
            np.testing.assert_array_equal(w, start[name])
            assert not net.parameters.grads[name].any()
        else:
            assert (w != start[name]).any()
    for name, mean in net.buffers.items():
        np.testing.assert_array_equal(mean, whole.buffers[name])
    # Afterwards all gradients are computed again.
    _, grads = net.loss_and_grad(*next(iter(loader)))
    assert all(g.any() for name, g in grads.items() if name != "b1")


def test_products_of_frozen_layers_are_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = {}
    for freezing in ("nothing", "one in the middle", "the lowest layers"):
        net, loader, opt = case_of(freezing)
        products = core_of(net).products
        made: list[int] = []
        multiply = products.multiply
        monkeypatch.setattr(products, "multiply", lambda *a, made=made, of=multiply: made.append(1) or of(*a))
        gb.fit(net, loader, opt, 1, progress=False)
        counts[freezing] = len(made) / len(loader)
    # Four products forward; backward one for each weight, and one for each input but the first layer's.
    assert counts == {"nothing": 11, "one in the middle": 10, "the lowest layers": 7}


@pytest.mark.parametrize("micro_batch_size", [None, 5])
def test_the_norm_does_not_count_frozen_gradients(micro_batch_size: int | None) -> None:
    """The update is that of the trained gradients, clipped to their own norm."""
    net, loader, _ = case_of("nothing")
    frozen = {"W1": {"trainable": False}, "gamma*": {"trainable": False}}
    opt = gb.SGD(net.parameters, 1.0, groups=frozen)
    x, y = next(iter(loader))
    _, grads = net.loss_and_grad(x, y, micro_batch_size)
    trained = {name: g.copy() for name, g in grads.items() if name not in opt.frozen}
    norm = np.sqrt(sum((g**2).sum() for g in trained.values()))
    expected = {name: net.parameters[name] - g * (norm / 2 / norm) for name, g in trained.items()}
    one = gb.Loader(x, y, batch_size=len(x), backend="cpu", dtype="float64", shuffle=False)
    if micro_batch_size is None:
        gb.fit(net, one, opt, 1, progress=False, max_norm=norm / 2)
        for name, w in expected.items():
            np.testing.assert_allclose(net.parameters[name], w, rtol=1e-9, atol=1e-12)
    else:
        with core_of(net).freezing(opt.frozen):
            _, grads = net.loss_and_grad(x, y, micro_batch_size)
        for name, g in grads.items():
            np.testing.assert_array_equal(g, trained.get(name, 0.0))


def test_a_run_with_groups_is_resumed(tmp_path: Path) -> None:
    def run(epochs: int, **options: Any) -> np.ndarray:
        net, loader, opt = case_of("parts of layers", 0.01)
        opt.lr = gb.ExponentialDecay(0.01, 0.9)
        gb.fit(net, loader, opt, epochs, progress=False, **options)
        return np.concatenate([net.parameters.flat, net.buffers.flat, opt.state["m"].flat])

    whole = run(4)
    run(2, checkpoint=tmp_path)
    np.testing.assert_array_equal(run(4, checkpoint=tmp_path, resume=True), whole)
    net, loader, _ = case_of("parts of layers", 0.01)
    opt = gb.Adam(net.parameters, groups={"W1": {"trainable": False}})
    with pytest.raises(
        gb.ArgumentError,
        match=r"cannot be resumed here: \w+ is (trained|frozen) now, and was (trained|frozen) in the saved run",
    ):
        gb.fit(net, loader, opt, 4, progress=False, checkpoint=tmp_path, resume=True)


def test_the_usual_groups() -> None:
    net = gb.Network([Shift(), *stack()], backend="cpu")
    groups = gb.no_decay(net)
    assert groups == {name: {"weight_decay": 0.0} for name in net.parameters if not name.startswith("W")}
    opt = gb.AdamW(net.parameters, 1.0, groups=groups)
    before = {name: w.copy() for name, w in net.parameters.items()}
    net.parameters.grads.flat[...] = 0.0
    opt.step()
    for name, w in net.parameters.items():
        np.testing.assert_allclose(w, before[name] * (0.99 if name.startswith("W") else 1.0), rtol=1e-6)
    assert len(opt._arrangement.rows) == 2
    with pytest.raises(gb.DTypeError, match=r"net must be a gpubatch.Network, got list"):
        gb.no_decay([])  # type: ignore[arg-type]
