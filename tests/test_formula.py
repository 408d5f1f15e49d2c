"""The tracer: what is recorded, how it is written, and what it refuses."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, strategies as st

import gpubatch as gb
from gpubatch.formula import Rule, rules
from gpubatch.formula.trace import OPS
from gpubatch.ops.launch import HostUpdate
from gpubatch.ops.program import allocate


def run(rule: Rule, *arrays: np.ndarray, t: int = 1, **hyper: float) -> None:
    trace = rule.trace()
    HostUpdate(trace, arrays[0].dtype)([arrays], trace.evaluate(t, **{**rule.defaults, **hyper}))


def test_scalars_are_folded_and_shared() -> None:
    scalars = rules.adam.trace().scalars
    assert list(scalars) == [
        "beta1",
        "1 - beta1",
        "beta2",
        "1 - beta2",
        "1 / (1 - pow(beta1, t))",
        "1 / (1 - pow(beta2, t))",
        "lr",
        "eps",
    ]
    values = rules.adam.trace().evaluate(3, lr=0.1, beta1=0.9, beta2=0.999, eps=1e-8)
    assert values == (0.9, 1 - 0.9, 0.999, 1 - 0.999, 1 / (1 - 0.9**3), 1 / (1 - 0.999**3), 0.1, 1e-8)


def test_the_c_text_reads_as_the_formula() -> None:
    assert rules.adam.trace().c == (
        "const T m_new = k[0] * m + k[1] * g;\n"
        "const T v_new = k[2] * v + k[3] * (g * g);\n"
        "const T w_new = w - k[6] * (m_new * k[4]) / (sqrt(v_new * k[5]) + k[7]);\n"
        "w = w_new;\n"
        "m = m_new;\n"
        "v = v_new;"
    )


def test_a_trace_is_made_once_for_each_variant() -> None:
    assert rules.adam.trace() is rules.adam.trace()
    assert rules.adam.trace(eps_at="hat") is rules.adam.trace(eps_at="hat")
    assert rules.adam.trace(eps_at="hat") is not rules.adam.trace()


def test_parentheses_keep_the_order_of_operations() -> None:
    @gb.rule
    def nested(w, g, t, *, a=2.0, b=3.0, c=5.0):
        return (w - (g - (a - (b - c)))) / (g / (w / (b / c))) - -(-g)  # noqa: B002  in C it would be a decrement

    assert nested.trace().c == "const T w_new = (w - (g - k[0])) / (g / (w * k[1])) - -(-g);\nw = w_new;"
    assert list(nested.trace().scalars) == ["a - (b - c)", "1 / (b / c)"]
    w, g = np.array([7.0, 1.0]), np.array([2.0, -3.0])
    expected = nested(w, g, 1, a=2.0, b=3.0, c=5.0)
    run(nested, w, g)
    np.testing.assert_allclose(w, expected, rtol=1e-15)


def test_every_function_computes_what_numpy_computes() -> None:
    @gb.rule
    def everything(w, g, s, t, *, a=0.5, b=-0.25):
        x = np.exp(g) + np.log(abs(g) + 1) + np.log1p(abs(g)) + np.tanh(g) + np.sqrt(abs(g)) + np.sign(g) + g**3 + 2**g
        y = np.where(g < 0.2, np.maximum(g, a), np.minimum(g, b)) + np.where(g >= 0, g**2, -g)
        z = np.where(g <= -0.2, abs(g) ** 0.5, 1.0) + np.where(g > 0.1, a, np.absolute(b))
        y = y + np.square(g) * np.reciprocal(g + 5) - np.clip(g, b, a)
        folded = (
            np.exp(a)
            + np.log(a)
            + np.log1p(a)
            + np.tanh(a)
            + np.sqrt(a)
            + abs(b)
            + np.sign(b)
            + a**t
            + np.maximum(a, b)
        )
        return w + x * y - z / folded, s + np.minimum(a, b) * np.where(a < b, 1.0, 2.0)

    assert {op.numpy for op in OPS.values()} - {e.op.numpy for e in everything.trace().elements if e.op} == set()
    rng = np.random.default_rng(1)
    w, g, s = rng.standard_normal((3, 1000))
    expected = everything(w.copy(), g, s.copy(), 2, a=0.5, b=-0.25)
    run(everything, w, g, s, t=2)
    np.testing.assert_allclose(w, expected[0], rtol=1e-13)
    np.testing.assert_allclose(s, expected[1], rtol=1e-13)


# State that is passed on, exchanged, left, or set to a constant: what a register allocation could get wrong.
@gb.rule
def shifted(w, g, older, old, t, *, lr=1.0):
    return w - lr * (g + old + older), old, g


@gb.rule
def exchanged(w, g, a, b, t, *, lr=1.0):
    return w - lr * g * (a - b), b, a


@gb.rule
def constant(w, g, a, b, t, *, lr=1.0):
    return w + a, lr, 2.0


@gb.rule
def untouched(w, g, a, t, *, lr=1.0):
    return w, a


@gb.rule
def shared(w, g, a, b, t, *, lr=1.0):
    new = w - lr * g
    return new, new, new * a + b


@pytest.mark.parametrize("rule", [shifted, exchanged, constant, untouched, shared], ids=lambda r: r.name)
def test_state_may_be_passed_on(rule: Rule) -> None:
    rng = np.random.default_rng(2)
    arrays = list(rng.standard_normal((2 + len(rule.state), 50)))
    expected = [np.broadcast_to(x, 50).copy() for x in rule(arrays[0], arrays[1], *arrays[2:], 1, lr=0.5)]
    run(rule, *arrays, lr=0.5)
    for i, x in zip([0, *range(2, len(arrays))], expected, strict=True):
        np.testing.assert_array_equal(arrays[i], x)


LEAVES = ["w", "g", "a", "b"]


def expressions() -> st.SearchStrategy[Any]:
    binary = st.sampled_from(["+", "-", "*", "max", "min", "where"])
    return st.recursive(
        st.sampled_from([*LEAVES, "lr", 0.5]), lambda inner: st.tuples(binary, inner, inner), max_leaves=12
    )


def compute(tree: Any, values: dict[str, Any]) -> Any:
    if not isinstance(tree, tuple):
        return values[tree] if isinstance(tree, str) else tree
    kind, x, y = tree[0], compute(tree[1], values), compute(tree[2], values)
    if kind == "where":
        return np.where(values["g"] < 0.1, x, y)
    functions = {"max": np.maximum, "min": np.minimum}
    return functions[kind](x, y) if kind in functions else {"+": x + y, "-": x - y, "*": x * y}[kind]


@given(expressions(), expressions(), expressions())
def test_any_formula_runs_as_it_stands(for_w: Any, for_a: Any, for_b: Any) -> None:
    @gb.rule
    def drawn(w, g, a, b, t, *, lr):
        values = {"w": w, "g": g, "a": a, "b": b, "lr": lr}
        return tuple(compute(tree, values) for tree in (for_w, for_a, for_b))

    arrays = list(np.random.default_rng(3).standard_normal((4, 20)))
    expected = [np.broadcast_to(x, 20) for x in drawn(*arrays, 1, lr=0.7)]
    expected = [x.copy() for x in expected]
    run(drawn, *arrays, lr=0.7)
    for i, x in zip([0, 2, 3], expected, strict=True):
        np.testing.assert_array_equal(arrays[i], x)


def test_registers_are_few() -> None:
    most = {name: len(allocate(getattr(rules, name).trace())[2]) for name in rules.__all__}
    assert max(most.values()) <= 3, most


# --- what is refused -----------------------------------------------------------------------------------------------


def branching(w, g, t, *, lr):
    return w if g > 0 else -w


def foreign(w, g, t, *, lr):
    return np.sin(w)


def with_math(w, g, t, *, lr):
    return w * math.sqrt(lr)


def reducing(w, g, t, *, lr):
    return w - np.add.reduce(g)


def with_array(w, g, t, *, lr):
    return w - np.ones(3) * g


def arithmetic_on_condition(w, g, t, *, lr):
    return w - (g > 0) * lr


def too_few(w, g, m, t, *, lr):
    return w - lr * g


def infinite(w, g, t, *, lr):
    return w * float("inf")


@pytest.mark.parametrize(
    ("formula", "message"),
    [
        (branching, r"cannot branch .* np.where\(condition, x, y\)"),
        (foreign, "cannot use np.sin; it can use np.add, "),
        (with_math, "cannot convert a value to float; use NumPy's functions, not the math module's"),
        (reducing, "np.add only as a plain function"),
        (with_array, "must be its arguments or finite numbers"),
        (arithmetic_on_condition, r"a condition only in np.where"),
        (too_few, r"too_few must return \(w, m\), 2 values; it returned 1"),
        (infinite, "finite numbers, got inf"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_what_a_formula_cannot_do_is_said(formula: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        gb.rule(formula).trace()


@pytest.mark.parametrize(
    ("formula", "message"),
    [
        (lambda w, t: w, "must have the signature"),
        (lambda w, g, m: w, "must have the signature"),
        (lambda w, g, *state, t: w, "must have the signature"),
        (lambda w, g, t, *, weight_decay=0.1: w, "'weight_decay' is taken"),
        (lambda w, g, t, *, sqrt=0.1: w, "'sqrt' is taken"),
        (lambda w, g, t, *, lr=None: w, "default of lr must be a number"),
        (lambda w, g, double, t: (w, double), "'double' cannot be a name in C"),
        (lambda w, g, β, t: (w, β), "'β' cannot be a name in C"),
    ],
    ids=["no gradient", "no step", "star", "decay", "function", "no number", "word of C", "not ascii"],
)
def test_a_signature_that_is_none_of_a_rule_is_refused(formula: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        gb.rule(formula)
