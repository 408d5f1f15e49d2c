"""Norms and means over a parameter: called with arrays, recorded in rules, in every form, and rules made with them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from expressions import computed, rule_of, smooth_programs
from families import drawn
from needs import missing
from optimizer_table import CASES, trace_of
from stand_in import StandIn
from test_kernels import emulate, roundings
from test_launch import cupy, device, library

import gpubatch as gb
from gpubatch.backend import CudaBackend
from gpubatch.formula import Trace
from gpubatch.formula.reductions import LANES, PIECE
from gpubatch.ops import compile, update_for
from gpubatch.ops.update import CompiledUpdate, HalfUpdate, HostUpdate, cpu_update

__all__ = ["cupy", "device", "library"]

SIZES = (1, LANES - 1, LANES, 1000, PIECE, PIECE + 1, 3 * PIECE + 77)


@gb.rule
def every_kind(w, g, m, t, *, lr=0.1, beta=0.9, weight_decay=0.01):
    """All reductions, in three passes, and one as new state."""
    centred = g - gb.mean(g)
    m = beta * m + (1 - beta) * centred / (1 + gb.norm(centred))
    step = m / (1e-3 + gb.max_abs(m)) + weight_decay * w
    return w - lr * step * np.minimum(1.0, gb.norm(w) / 3), m


# --- called with arrays --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_called_with_arrays_they_compute(size: int, dtype: np.dtype, rng: np.random.Generator) -> None:
    x = rng.standard_normal(size).astype(dtype)
    numbers = [float(v) for v in x]
    close = {"rel": 4 * float(np.finfo(dtype).eps), "abs": 1e-15}
    assert gb.norm(x) == pytest.approx(math.sqrt(math.fsum(v * v for v in numbers)), **close)
    assert gb.mean(x) == pytest.approx(math.fsum(numbers) / size, **close)
    assert gb.max_abs(x) == max(map(abs, numbers))
    for found in (gb.norm(x), gb.mean(x), gb.max_abs(x)):
        assert (found.dtype, found.shape) == (dtype, ())


def test_the_order_of_additions_is_as_it_is_told(rng: np.random.Generator) -> None:
    x = rng.standard_normal(2 * PIECE + 100)
    total = 0.0
    for start in range(0, x.size, PIECE):
        lanes = [0.0] * LANES
        for i, v in enumerate(x[start : start + PIECE].tolist()):
            lanes[i % LANES] += v * v
        while len(lanes) > 1:
            half = len(lanes) // 2
            lanes = [a + b for a, b in zip(lanes[:half], lanes[half:], strict=True)]
        total += lanes[0]
    assert gb.norm(x) == math.sqrt(total)


def test_squares_beyond_the_range_of_float32() -> None:
    x = np.full(4, 1e30, np.float32)
    assert gb.norm(x) == np.float32(2e30)
    assert gb.norm(np.full(4, 1e-30, np.float32)) == np.float32(2e-30)


def test_what_is_special(dtype: np.dtype) -> None:
    empty, nan = np.zeros((0, 3), dtype), np.array([1, np.nan, -2], dtype)
    for reduction in (gb.norm, gb.mean, gb.max_abs):
        assert reduction(empty) == 0
        assert np.isnan(reduction(nan))
        assert reduction(np.array(-3, dtype)) == (-3 if reduction is gb.mean else 3)
        assert np.isfinite(reduction(np.arange(6).reshape(2, 3)[:, ::2]))
    assert gb.mean(np.array([True, False, True, True])) == 0.75


@pytest.mark.gpu
def test_on_a_gpu_they_stay_there(dtype: np.dtype, rng: np.random.Generator) -> None:
    if "cuda:0" not in gb.available_backends():
        missing("gpu", "no CUDA device can be used here")
    where = gb.get_backend("cuda:0")
    x = rng.standard_normal((40, 50)).astype(dtype)
    for reduction in (gb.norm, gb.mean, gb.max_abs):
        for array in (x, x[:0]):
            found = reduction(where.asarray(array))
            assert where.owns(found)
            assert found.dtype == dtype
            np.testing.assert_allclose(where.to_numpy(found), reduction(array), rtol=8 * np.finfo(dtype).eps)


@pytest.mark.parametrize("x", [3.0, [1.0, 2.0], None], ids=str)
def test_what_is_no_array_is_refused(x: Any) -> None:
    with pytest.raises(gb.DTypeError, match=r"gb\.norm must be of a NumPy or CuPy array, or of a value in a rule, got"):
        gb.norm(x)


# --- recorded ------------------------------------------------------------------------------------------------------


def test_a_rule_has_a_pass_more_than_reductions_depend_on_each_other() -> None:
    trace = every_kind.trace()
    passes = [([r.name for r in p.reductions], p.trace.values, p.trace.targets) for p in trace.passes]
    assert passes == [
        (["mean", "norm"], (), ("of_mean0", "of_norm1")),
        (["norm"], ("mean0", "norm1"), ("of_norm2",)),
        (["max_abs"], ("mean0", "norm1", "norm2"), ("of_max_abs3",)),
        ([], ("mean0", "norm1", "norm2", "max_abs3"), ("w", "m")),
    ]
    assert len(CASES["adam"].make([np.zeros(1)])._trace.passes) == 1
    assert len(gb.rules.lamb.trace().passes) == 2


def test_the_c_text_of_the_passes_of_lamb() -> None:
    first, last = (of_pass.trace.c for of_pass in gb.rules.lamb.trace().passes)
    assert "of_norm0 = w" in first.replace("_new", "")
    assert "of_norm1" in first
    assert "norm(" not in first + last
    assert "both(norm0 != T(0), norm1 != T(0));" in last


def numbers(w, g, t, *, lr):
    return w - gb.norm(lr) * g


def twice(w, g, t, *, lr):
    return w - lr * gb.norm(gb.mean(g)) * g


def numpys(w, g, t, *, lr):
    return w - lr * np.mean(g)


def numpys_with_axis(w, g, t, *, lr):
    return w - lr * np.sum(g, axis=0)


def a_method(w, g, t, *, lr):
    return w - lr * g.mean()


def numpys_norm(w, g, t, *, lr):
    return w - lr * g / np.linalg.norm(g)


def numpys_reduce(w, g, t, *, lr):
    return w - np.add.reduce(g)


INSTEAD = r"over a whole parameter a rule has gb.norm\(x\), gb.mean\(x\) and gb.max_abs\(x\)"


@pytest.mark.parametrize(
    ("formula", "message"),
    [
        (numbers, "gb.norm must be of a value of each element, got a hyper-parameter or t"),
        (twice, "gb.norm must be of a value of each element, got a number that is the same for all elements"),
        *[(f, INSTEAD) for f in (numpys, numpys_with_axis, a_method, numpys_norm, numpys_reduce)],
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_what_cannot_be_recorded_is_told_what_to_write(formula: Any, message: str) -> None:
    with pytest.raises(gb.FormulaError, match=message):
        gb.rule(formula).trace()


@pytest.mark.parametrize("name", ["norm0", "of_norm1", "max_abs12", "reduced", "operand"])
def test_names_of_the_generated_text_are_taken(name: str) -> None:
    namespace: dict[str, Any] = {}
    exec(f"def clashing(w, g, {name}, t, *, lr): return w, {name}", namespace)
    with pytest.raises(gb.FormulaError, match="cannot be a name in C"):
        gb.rule(namespace["clashing"])


def test_activations_and_losses_have_no_reductions() -> None:
    @gb.activation
    def normalised(x):
        return x / gb.norm(x)

    @gb.score_loss
    def centred(z, y):
        return (z - gb.mean(z) - y) ** 2

    with pytest.raises(
        gb.FormulaError, match=r"gb\.norm is for update rules; normalised works on one element at a time"
    ):
        gb.Elementwise(normalised)
    with pytest.raises(gb.FormulaError, match=r"gb\.mean is for update rules; centred works on one element at a time"):
        centred.form("float32", "loss")


# --- every form gives the same -------------------------------------------------------------------------------------


def after(rule: Any, arrays: list[np.ndarray], t: int, **hyper: float) -> list[np.ndarray]:
    """What the rule returns when it is called with arrays."""
    found = rule(*arrays, t, **{**rule.defaults, **hyper})
    return [np.broadcast_to(x, arrays[0].shape) for x in (found if isinstance(found, tuple) else (found,))]


@gb.rule
def through_others(w, g, t, *, lr=0.1):
    """The last pass reads no g, and not the mean."""
    return w * (1 - lr * gb.norm(g - gb.mean(g)))


def test_what_a_pass_does_not_read_is_not_in_its_text(rng: np.random.Generator) -> None:
    """A compiler would warn of it, and the emulated one takes warnings for errors."""
    w, g = rng.standard_normal((2, 100))
    (right,) = after(through_others, [w, g], 1)
    trace = through_others.trace()
    emulate(trace, [(w, g)], [trace.evaluate(1, lr=0.1)])
    np.testing.assert_allclose(w, right, rtol=1e-14)


@pytest.mark.parametrize("size", SIZES)
def test_recorded_and_called_it_computes_the_same(size: int, dtype: np.dtype, rng: np.random.Generator) -> None:
    start = [rng.standard_normal(size).astype(dtype) for _ in range(3)]
    trace = every_kind.trace()
    scalars = [trace.evaluate(2, **every_kind.defaults)]
    expected = after(every_kind, start, 2)
    emulated, by_numpy, compiled = ([a.copy() for a in start] for _ in range(3))
    HostUpdate(trace, dtype)([tuple(by_numpy)], scalars)
    cpu_update(trace, dtype)([tuple(compiled)], scalars)
    for x, y in zip(compiled, by_numpy, strict=True):
        np.testing.assert_array_equal(x, y)
    emulate(trace, [tuple(emulated)], scalars)
    for found in (by_numpy, emulated):
        for x, right in zip([found[0], found[2]], expected, strict=True):
            np.testing.assert_allclose(x, right, **roundings(trace, dtype))


@drawn(30, 500, for_w=smooth_programs(), for_a=smooth_programs())
def test_any_expression_with_reductions_is_recorded_as_numpy_computes_it(for_w: Any, for_a: Any) -> None:
    recorded_as_computed(for_w, for_a, lambda trace: HostUpdate(trace, np.dtype(np.float64)))


@drawn(3, 100, for_w=smooth_programs(), for_a=smooth_programs())
def test_compiled_on_first_use_too(for_w: Any, for_a: Any) -> None:
    recorded_as_computed(for_w, for_a, lambda trace: cpu_update(trace, np.dtype(np.float64)))


@pytest.mark.exhaustive
@drawn(10, 60, for_w=smooth_programs(), for_a=smooth_programs())
def test_on_the_device_too(for_w: Any, for_a: Any) -> None:
    recorded_as_computed(for_w, for_a, lambda trace: lambda arrays, scalars: emulate(trace, arrays, scalars))


def recorded_as_computed(for_w: Any, for_a: Any, update: Callable[[Trace], Any]) -> None:
    arrays, expected = computed(for_w, for_a)
    trace = rule_of(for_w, for_a).trace()
    update(trace)([tuple(arrays)], [trace.evaluate(3, lr=0.7)])
    for i, right in zip([0, 2], expected, strict=True):
        np.testing.assert_allclose(arrays[i], right, rtol=1e-9, atol=1e-9)


@pytest.fixture
def some_threads(library: Any) -> Iterator[Callable[[int], None]]:
    """Sets the number of threads of compiled loops."""
    threads = library.threads()
    yield library.set_threads
    library.set_threads(threads)


def test_sums_do_not_depend_on_threads(
    some_threads: Callable[[int], None], dtype: np.dtype, rng: np.random.Generator
) -> None:
    trace, hyper = trace_of(CASES["lamb decayed"])
    groups = [tuple(np.abs(rng.standard_normal(n)).astype(dtype) for _ in range(4)) for n in (300_001, 5, 70_000)]
    found = []
    for threads in (1, 2, 5):
        some_threads(threads)
        arrays = [tuple(a.copy() for a in group) for group in groups]
        update = cpu_update(trace, dtype)
        assert isinstance(update, CompiledUpdate)
        update(arrays, [trace.evaluate(2, **hyper)])
        found.append(b"".join(a.tobytes() for group in arrays for a in group))
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("master", [False, True], ids=["rounded", "master"])
@pytest.mark.parametrize("strided", [False, True], ids=["whole", "strided"])
def test_float16_is_computed_in_float32(master: bool, strided: bool, rng: np.random.Generator) -> None:
    trace, hyper = trace_of(CASES["lamb decayed"])
    scalars = [trace.evaluate(5, **hyper)]
    for size in (1, 7, 40_001):
        kinds = [np.float16, np.float16, *[np.float32] * (2 + master)]
        group = [np.abs(rng.standard_normal(2 * size)).astype(kind) for kind in kinds]
        group = [a[::2] if strided else a[:size] for a in group]
        if master:
            group[0][...] = group[-1]
        wide = [a.astype(np.float32) for a in group[:4]]
        if master:
            wide[0] = group[-1].copy()
        HostUpdate(trace, np.dtype(np.float32))([tuple(wide)], scalars)
        update = update_for(trace, np.dtype(np.float16), gb.get_backend("cpu"), master)
        assert isinstance(update, HalfUpdate)
        emulated = tuple(np.ascontiguousarray(a).copy() for a in group)
        update([tuple(group)], scalars)
        emulate(trace, [emulated], scalars)
        for a, b in zip(group, [wide[0].astype(np.float16), group[1], *wide[2:], wide[0]], strict=False):
            np.testing.assert_array_equal(a, b)
        np.testing.assert_allclose(emulated[0], group[0], rtol=2e-3)
        np.testing.assert_allclose(emulated[2], group[2], **roundings(trace, np.dtype(np.float32)))


def test_the_memory_of_reductions_is_planned(cupy: StandIn, device: CudaBackend) -> None:
    params = gb.Parameters({"W": (300, 70), "b": (70,), "none": (0, 3), "one": ()}, device)
    opt = gb.LAMB(params)
    planned = opt.memory_parts()["optimizer reductions"]
    opt.step()
    update = opt._update
    assert planned == update.totals.nbytes + update.values.nbytes + update.tickets.nbytes > 0
    assert "optimizer reductions" not in gb.Adam(params).memory_parts()
    kept = update.totals
    opt.step()
    assert update.totals is kept


# --- rules made with them, each against the same written for whole arrays --------------------------------------------


@gb.rule
def centralised(w, g, v, t, *, lr=0.05, mu=0.9):
    """Momentum with gradients centred in each array (Yong et al. 2020, for one output)."""
    v = mu * v + (g - gb.mean(g))
    return w - lr * v, v


@gb.rule
def clipped(w, g, t, *, lr=0.05, most=0.5):
    """Each array's gradient is at most so long."""
    return w - lr * g * np.minimum(1.0, most / np.maximum(gb.norm(g), 1e-30))


@gb.rule
def rms_clipped(w, g, v, t, *, lr=0.05, beta=0.99, d=1.0):
    """Adafactor's clipping of the update (Shazeer & Stern 2018, algorithm 5), without its factors."""
    v = beta * v + (1 - beta) * (g * g + 1e-30)
    u = g / np.sqrt(v)
    return w - lr * u / np.maximum(1.0, np.sqrt(gb.mean(u * u)) / d), v


@gb.rule
def scaled_by_largest(w, g, t, *, lr=0.05):
    """The largest change of an array's elements is lr."""
    return w - lr * g / np.maximum(gb.max_abs(g), 1e-30)


def by_hand_centralised(w, g, v):
    v = 0.9 * v + (g - g.mean())
    return w - 0.05 * v, v


def by_hand_clipped(w, g, v):
    return w - 0.05 * g * min(1.0, 0.5 / np.linalg.norm(g)), v


def by_hand_rms_clipped(w, g, v):
    v = 0.99 * v + 0.01 * (g**2 + 1e-30)
    u = g / np.sqrt(v)
    return w - 0.05 * u / max(1.0, np.linalg.norm(u) / math.sqrt(u.size)), v


def by_hand_scaled(w, g, v):
    return w - 0.05 * g / np.abs(g).max(), v


RECIPES = {
    "centralised": (centralised, by_hand_centralised),
    "clipped": (clipped, by_hand_clipped),
    "rms clipped": (rms_clipped, by_hand_rms_clipped),
    "largest": (scaled_by_largest, by_hand_scaled),
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_what_it_is_for_each_array(name: str, backend: gb.Backend, rng: np.random.Generator) -> None:
    rule, by_hand = RECIPES[name]
    shapes = {"W": (30, 40), "b": (40,), "none": (0, 3), "one": ()}
    start = {k: rng.standard_normal(s) for k, s in shapes.items()}
    params = gb.Parameters(start, backend, "float64")
    opt = gb.Optimizer(rule, params)
    expected = {k: (w.copy(), np.zeros(w.shape)) for k, w in start.items() if w.size}
    for _ in range(5):
        grads = {k: rng.standard_normal(s) for k, s in shapes.items()}
        for k, g in grads.items():
            params.grads[k] = backend.asarray(g)
        opt.step()
        expected = {k: by_hand(w, grads[k], v) for k, (w, v) in expected.items()}
    for k, (w, _) in expected.items():
        np.testing.assert_allclose(backend.to_numpy(params[k]), w, rtol=1e-11, atol=1e-13)


def test_a_gradient_that_is_not_a_number_shows_in_its_array_alone(backend: gb.Backend) -> None:
    params = gb.Parameters({"a": np.ones(3), "b": np.ones(3)}, backend)
    opt = gb.LAMB(params, check=False)
    params.grads["a"] = backend.asarray(np.array([1, np.nan, 1], np.float32))
    params.grads["b"] = backend.asarray(np.ones(3, np.float32))
    opt.step()
    assert np.isnan(backend.to_numpy(params["a"])).all()
    assert np.isfinite(backend.to_numpy(params["b"])).all()


def test_a_flat_gradient_is_cut_into_parameters(backend: gb.Backend, rng: np.random.Generator) -> None:
    shapes = {"W": (6, 5), "b": (5,)}
    start = {k: rng.standard_normal(s).astype(np.float32) for k, s in shapes.items()}
    flat = rng.standard_normal(35).astype(np.float32)
    found = []
    for grads in (flat, {"W": flat[:30].reshape(6, 5), "b": flat[30:]}):
        params = gb.Parameters(start, backend)
        opt = gb.LAMB(params)
        given = backend.asarray(flat) if grads is flat else {k: backend.asarray(g.copy()) for k, g in grads.items()}
        opt.step(given)
        found.append(backend.to_numpy(params.flat))
    np.testing.assert_array_equal(found[0], found[1])


def test_the_weight_decay_of_a_rule_is_its_own() -> None:
    """Its default stays, its schedule moves, and it is saved as ever."""
    w = np.ones(3)
    opt = gb.Optimizer(every_kind, [w])
    assert opt.hyper["weight_decay"] == 0.01
    opt = gb.Optimizer(every_kind, [w], weight_decay=lambda step, epoch: 0.5 + step)
    opt.step([np.ones(3)])
    assert opt._hyper.at("weight_decay", opt.hyper["weight_decay"], opt.t, opt.epoch) == 1.5
    other = gb.Optimizer(every_kind, [w], weight_decay=0.25)
    again = gb.Optimizer(every_kind, [w])
    again.load_state_dict(other.state_dict())
    assert again.hyper["weight_decay"] == 0.25


def test_lars_divides_by_what_the_paper_says(rng: np.random.Generator) -> None:
    """Algorithm 1 of arXiv:1708.03888, two layers, three steps."""
    start, grads = rng.standard_normal((2, 7)), rng.standard_normal((3, 2, 7))
    params = [start[0].copy(), start[1].copy()]
    opt = gb.LARS(params, 0.5, mu=0.8, trust_coefficient=0.02, weight_decay=0.3)
    w, v = start.copy(), np.zeros_like(start)
    for g in grads:
        opt.step(list(g))
        for layer in range(2):
            norms = np.linalg.norm(w[layer]), np.linalg.norm(g[layer])
            local = 0.02 * norms[0] / (norms[1] + 0.3 * norms[0])
            v[layer] = 0.8 * v[layer] + 0.5 * local * (g[layer] + 0.3 * w[layer])
            w[layer] -= v[layer]
    np.testing.assert_allclose(params, w, rtol=1e-12)


def test_the_digest_of_a_rule_knows_its_reductions() -> None:
    """Rules that differ in a reduction alone have texts and digests of their own."""

    def made(reduction: Any) -> Trace:
        @gb.rule
        def scaled(w, g, t, *, lr=0.1):
            return w - lr * g * reduction(g)

        return scaled.trace()

    assert len({compile.formula_digest(made(r)) for r in (gb.norm, gb.mean, gb.max_abs)}) == 3


def test_groups_have_reductions_over_each_of_their_parameters(backend: gb.Backend, rng: np.random.Generator) -> None:
    """With rows of scalars of their own, and a frozen parameter, they are as optimizers of their own."""
    shapes = {"W1": (20, 30), "b1": (30,), "W2": (30, 5), "b2": (5,)}
    start = {k: rng.standard_normal(s).astype(np.float32) for k, s in shapes.items()}
    params = gb.Parameters(start, backend)
    groups = {"b*": {"weight_decay": 0.0, "lr": 0.01}, "W2": {"trainable": False}}
    opt = gb.LAMB(params, 0.1, weight_decay=0.2, groups=groups)
    apart = {k: backend.asarray(w.copy()) for k, w in start.items()}
    matrix = gb.LAMB([apart["W1"]], 0.1, weight_decay=0.2)
    biases = gb.LAMB([apart["b1"], apart["b2"]], 0.01)
    for _ in range(3):
        grads = {k: backend.asarray(rng.standard_normal(s).astype(np.float32)) for k, s in shapes.items()}
        for k, g in grads.items():
            params.grads[k] = g
        opt.step()
        matrix.step([grads["W1"]])
        biases.step([grads["b1"], grads["b2"]])
    for k, w in apart.items():
        np.testing.assert_array_equal(backend.to_numpy(params[k]), backend.to_numpy(w))
