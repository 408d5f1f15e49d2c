"""Exponentially weighted averages against the definition by weights, closed forms, and optax."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, strategies as st
from hypothesis.extra import numpy as hnp
from needs import peer

from gpubatch.averages import EWMA, ewma
from gpubatch.errors import ArgumentError, DTypeError, ShapeError

BETAS = [0.0, 0.5, 0.9, 0.98, 0.999, 1 - 1e-9]
corrections = pytest.mark.parametrize("bias_correction", [True, False])
betas = pytest.mark.parametrize("beta", BETAS)
floats = st.floats(-1e6, 1e6)


def by_weights(series, beta, bias_correction):
    """The definition as a sum: x of i steps ago has weight beta**i; pandas calls the corrected form adjust=True."""
    result = np.empty(np.shape(series))
    for t in range(1, len(series) + 1):
        weights = np.array([beta**i for i in reversed(range(t))])
        weights = weights / weights.sum() if bias_correction else weights * (1 - beta)
        result[t - 1] = np.tensordot(weights, np.asarray(series[:t], dtype=np.float64), 1)
    return result


class Elsewhere(np.lib.mixins.NDArrayOperatorsMixin):
    """Mimics an array on a device: computes through NumPy's protocols, and refuses conversion to a NumPy array."""

    __module__ = "elsewhere"

    def __init__(self, inner):
        self.inner = inner
        self.shape, self.ndim, self.dtype = inner.shape, inner.ndim, inner.dtype

    def __array__(self, *_, **__):
        raise TypeError("implicit conversion to a NumPy array")

    def __array_ufunc__(self, ufunc, method, *inputs, out=(), **kwargs):
        assert method == "__call__"
        for x in (*inputs, *out):
            assert isinstance(x, Elsewhere) or type(x) in (int, float), f"{type(x)} meets a device array"
        if out:
            kwargs["out"] = tuple(x.inner for x in out)
        return Elsewhere(np.asarray(ufunc(*(getattr(x, "inner", x) for x in inputs), **kwargs)))

    def __array_function__(self, function, types, args, kwargs):
        assert function in (np.where, np.cumsum, np.ones_like)
        return Elsewhere(function(*(getattr(x, "inner", x) for x in args), **kwargs))

    def __getitem__(self, key):
        return Elsewhere(self.inner[key])

    def __setitem__(self, key, value):
        self.inner[key] = value.inner

    def __len__(self):
        return len(self.inner)

    def astype(self, dtype):
        return Elsewhere(self.inner.astype(dtype))


# --- known values ---------------------------------------------------------------------------------------------------


def test_first_values_by_hand():
    # deeplearning.ai, course 2 week 2: beta = 0.98 and 40 degrees on day 1 give 0.8, corrected 40; then 49 gives
    # 0.0196 * 40 + 0.02 * 49 = 1.764, divided by 0.0396
    assert ewma([40, 49], 0.98, bias_correction=False) == pytest.approx([0.8, 1.764], rel=1e-14)
    assert ewma([40, 49], 0.98) == pytest.approx([40, 1.764 / 0.0396], rel=1e-13)
    assert ewma([1, 2, 3], 0.5, False).tolist() == [0.5, 1.25, 2.125]
    assert ewma([7, 14, 0], 0.5) == pytest.approx([7, 35 / 3, 5], rel=1e-14)


@betas
def test_a_constant_series_averages_to_itself(beta):
    np.testing.assert_allclose(ewma(np.full(5000, 3.0), beta), 3.0, rtol=1e-14)
    exact = [1 - Fraction(beta) ** n for n in (1, 2, 50)]
    ours = ewma(np.ones(5000), beta, bias_correction=False)
    assert ours[[0, 1, 49]] == pytest.approx([float(x) for x in exact], rel=1e-13)
    assert (np.diff(ours) >= -1e-15).all()
    assert len(ours) == 5000
    average = EWMA(beta)
    assert [average.update(3.0) for _ in range(100)] == pytest.approx([3.0] * 100, rel=1e-14)


def test_an_impulse_decays_geometrically():
    curve = ewma([1.0] + [0.0] * 199, 0.9, bias_correction=False)
    np.testing.assert_allclose(curve, 0.1 * 0.9 ** np.arange(200), rtol=1e-13)


@betas
@corrections
def test_as_the_sum_of_weights(beta, bias_correction, rng):
    for shape in [(1,), (2,), (3,), (64,), (65,), (200,), (33, 4), (9, 2, 3)]:
        series = rng.standard_normal(shape)
        expected = by_weights(series, beta, bias_correction)
        np.testing.assert_allclose(ewma(series, beta, bias_correction), expected, rtol=1e-12, atol=1e-13)
        average = EWMA(beta, bias_correction)
        np.testing.assert_allclose([average.update(x) for x in series], expected, rtol=1e-12, atol=1e-13)


@given(hnp.arrays(np.float64, st.integers(0, 300), elements=floats), st.sampled_from(BETAS), st.booleans())
def test_the_curve_is_the_recursion(series, beta, bias_correction):
    average = EWMA(beta, bias_correction)
    one_at_a_time = [average.update(x) for x in series.tolist()]
    scale = np.abs(series).max(initial=0.0)
    np.testing.assert_allclose(ewma(series, beta, bias_correction), one_at_a_time, rtol=0, atol=1e-12 * scale)


@betas
def test_a_long_curve_is_the_recursion(beta, rng):
    series = rng.standard_normal(10**6)
    curve = ewma(series, beta)
    v, tail = 0.0, []
    for t, x in enumerate(series.tolist(), 1):
        v = beta * v + (1 - beta) * x
        if t > 10**6 - 1000:
            tail.append(v / -math.expm1(t * math.log(beta)) if beta else v)
    np.testing.assert_allclose(curve[-1000:], tail, rtol=0, atol=1e-12)


@corrections
def test_as_in_optax(bias_correction, rng):
    optax, jax = peer("optax"), peer("jax")
    series = rng.standard_normal((100, 3))
    with jax.enable_x64(True):
        theirs = optax.ema(0.9, debias=bias_correction)
        state, curve = theirs.init(jax.numpy.zeros(3)), []
        for x in series:
            update, state = theirs.update(jax.numpy.asarray(x), state)
            curve.append(np.asarray(update))
    np.testing.assert_allclose(ewma(series, 0.9, bias_correction), curve, rtol=1e-12)


# --- kinds of values ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "x", [2, 2.0, True, np.float32(2), np.float64(2), np.int8(2), np.array(2.0), Fraction(2)], ids=lambda x: repr(x)
)
def test_a_number_gives_a_python_float(x):
    average = EWMA()
    for _ in range(3):
        assert type(average.update(x)) is float
        assert average.value == pytest.approx(float(x))


@corrections
@pytest.mark.parametrize(
    ("given", "kept"), [("float32", "float32"), ("float64", "float64"), ("uint8", "float64"), ("int64", "float64")]
)
def test_dtype_of_arrays(given, kept, bias_correction):
    average = EWMA(0.999, bias_correction)
    for _ in range(3):
        assert average.update(np.ones((2, 3), given)).dtype == kept
    assert ewma(np.ones((2, 3), given), 0.999, bias_correction).dtype == np.float64


@corrections
@pytest.mark.parametrize("beta", [0.0, 0.9])
def test_nothing_is_shared_and_nothing_given_is_changed(beta, bias_correction):
    average, twin = EWMA(beta, bias_correction), EWMA(beta, bias_correction)
    x = np.array([1.0, 2.0])
    for _ in range(3):
        expected = twin.update(x.copy())
        for result in (average.update(x), average.value):
            assert (result == expected).all()
            result[...] = np.nan
        assert x.tolist() == [1.0, 2.0]
        kept = x.copy()
        x[...] = 7.0  # the caller's buffer, used again
        assert (average.value == expected).all()
        x[...] = kept
    series = np.array([1.0, 2.0])
    ewma(series, beta, bias_correction)[...] = 7.0
    assert series.tolist() == [1.0, 2.0]


def test_before_the_first_value_and_after():
    average = EWMA(0.5)
    assert (average.value, average.t) == (0.0, 0)
    average.update(4.0)
    assert (average.value, average.t) == (4.0, 1)
    assert repr(average) == "EWMA(beta=0.5, bias_correction=True, t=1)"


@pytest.mark.parametrize("empty", [[], (), np.empty(0), np.empty((0, 3), np.float32)], ids=repr)
def test_an_empty_series_gives_an_empty_curve(empty):
    assert ewma(empty).shape == np.shape(empty)
    assert ewma(empty).dtype == np.float64


def test_nan_and_infinity_reach_later_values_only():
    for beta in (0.5, 0.9, 0.99):
        curve = ewma([1.0, 2.0, math.nan] + [1.0] * 5000, beta)
        assert np.isfinite(curve[:2]).all()
        assert np.isnan(curve[2:]).all()
        curve = ewma([1.0, -math.inf] + [1.0] * 5000, beta)
        assert curve[0] == 1.0
        assert (curve[1:] == -math.inf).all()
        average = EWMA(beta)
        assert [average.update(x) for x in (1.0, math.inf, 1.0)][1:] == [math.inf] * 2
        assert math.isnan(average.update(math.nan))


# --- devices --------------------------------------------------------------------------------------------------------


@corrections
@pytest.mark.parametrize("beta", [0.0, 0.9])
@pytest.mark.parametrize("shape", [(0,), (1,), (100,), (20, 3)], ids=str)
def test_arrays_elsewhere_stay_there(beta, bias_correction, shape, rng):
    series = rng.standard_normal(shape)
    curve = ewma(Elsewhere(series), beta, bias_correction)
    assert type(curve) is Elsewhere
    assert (curve.inner == ewma(series, beta, bias_correction)).all()
    average, twin = EWMA(beta, bias_correction), EWMA(beta, bias_correction)
    for x in series:
        ours = average.update(Elsewhere(x))
        assert type(ours) is Elsewhere
        assert (ours.inner == twin.update(x)).all()


def test_arrays_of_a_backend_stay_there(backend, dtype, tolerance, rng):
    series = rng.standard_normal((50, 3)).astype(dtype)
    expected = by_weights(series, 0.9, True)
    curve, average = ewma(backend.asarray(series)), EWMA()
    assert backend.owns(curve)
    np.testing.assert_allclose(backend.to_numpy(curve), expected, rtol=1e-12, atol=1e-13)
    for x, value in zip(series, expected, strict=True):
        ours = average.update(backend.asarray(x))
        assert backend.owns(ours)
        assert ours.dtype == dtype
        np.testing.assert_allclose(backend.to_numpy(ours), value, **tolerance)


# --- bad arguments --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [EWMA, lambda *a, **k: ewma([1.0], *a, **k)], ids=["EWMA", "ewma"])
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"beta": 1}, ArgumentError, r"beta must be finite and in \[0, 1\), got 1"),
        ({"beta": -0.1}, ArgumentError, r"beta must be .*got -0.1"),
        ({"beta": math.nan}, ArgumentError, r"beta must be .*got nan"),
        ({"beta": "0.9"}, DTypeError, r"beta must be a real number .*'0.9'"),
        ({"bias_correction": 1}, DTypeError, r"bias_correction must be True or False, got 1"),
    ],
    ids=repr,
)
def test_bad_arguments(make, arguments, error, message):
    with pytest.raises(error, match=message):
        make(**arguments)


@pytest.mark.parametrize(
    ("first", "second", "error", "message"),
    [
        (np.ones(3), np.ones(4), ShapeError, r"shape of the average, \(3,\), got a value that gives \(4,\)"),
        (np.ones(3), 1.0, ShapeError, r"\(3,\), got a value that gives \(\)"),
        (1.0, np.ones(1), ShapeError, r"\(\), got a value that gives \(1,\)"),
        (np.ones(3, "float32"), np.ones(3), DTypeError, r"dtype of the average, float32, .*float64"),
        (1.0, [1.0, 2.0], DTypeError, r"x must be a number or an array, got \[1.0, 2.0\] of type list"),
        (1.0, "2", DTypeError, r"x must be a number or an array, got '2' of type str"),
    ],
    ids=["length", "number after array", "array after number", "dtype", "list", "text"],
)
def test_a_refused_value_leaves_the_average_as_it_was(first, second, error, message):
    average = EWMA()
    before = average.update(first)
    with pytest.raises(error, match=message):
        average.update(second)
    assert average.t == 1
    assert np.array_equal(average.value, before)


def test_bad_series():
    with pytest.raises(ShapeError, match="at least one dimension, got a single number"):
        ewma(3.0)
    with pytest.raises(DTypeError, match="real numbers, got dtype <U1"):
        ewma(["1"])
    with pytest.raises(DTypeError, match="real numbers, got dtype complex128"):
        ewma([1j])
