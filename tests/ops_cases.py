"""The table of cases for all kernels of the core; each case draws the same numbers for every form."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from families import first_of_each

import gpubatch as gb
from gpubatch.backend import Array, Backend, compute_dtype
from gpubatch.formula import BoundActivation, activations, scores
from gpubatch.ops import SQUARE_SUM_SIZE, Ops, source_of
from gpubatch.ops.compile import C_TYPES
from gpubatch.ops.elementwise import elementwise_source
from gpubatch.ops.gather import gather_source
from gpubatch.ops.grid import PARTS, SUM_PARTS
from gpubatch.ops.losses import score_loss_source, weigh_source

F = np.dtype(np.float32)
OF_ROWS = ["softmax_cross_entropy", "softmax_focal", "svm", "crammer_singer"]  # losses of labels
HALF = 2.0**-11  # largest relative error of rounding to float16, except for subnormal numbers
SIZES = [(1, 1), (1, 3), (5, 10), (1030, 1), (301, 3), (67, 257), (7, 1000), (2100, 33)]
CLASSES = [(1, 2), (40, 2), (301, 3), (33, 10), (9, 257), (3, 5000)]


@dataclass(frozen=True)
class Place:
    """Where a case runs: the form (``ops``), the backend and dtype of arrays, and the source of its numbers.

    Numbers are rounded to ``precision`` before conversion to ``dtype``, so that all forms get the same ones. Statistics
    and scratch have the dtype of the arithmetic.
    """

    ops: Ops
    backend: Backend
    dtype: np.dtype
    precision: np.dtype
    rng: np.random.Generator
    misaligned: bool = False

    @property
    def compute(self) -> np.dtype:
        return compute_dtype(self.dtype)

    def real(self, *shape: int, times: float = 1, plus: float = 0, dtype: Any = None) -> Array:
        return self.array((times * self.rng.standard_normal(shape) + plus).astype(self.precision), dtype)

    def grid(self, *shape: int) -> Array:
        """Multiples of 1/8: sums and differences are exact, and some numbers are equal."""
        return self.array(np.round(8 * self.rng.standard_normal(shape)) / 8)

    def positive(self, *shape: int, dtype: Any = None) -> Array:
        return self.array(self.rng.uniform(0.1, 2, shape).astype(self.precision), dtype)

    def labels(self, rows: int, classes: int, dtype: str = "int64") -> Array:
        return self.backend.asarray(self.rng.integers(0, classes, rows).astype(dtype))

    def array(self, values: np.ndarray, dtype: Any = None) -> Array:
        out = self.empty(*values.shape, dtype=dtype)
        out[...] = self.backend.asarray(values.astype(out.dtype))
        return out

    def empty(self, *shape: int, dtype: Any = None) -> Array:
        dtype = np.dtype(dtype or self.dtype)
        if not self.misaligned or dtype != self.dtype:
            return self.backend.empty(shape, dtype)
        # One element after a 16-byte boundary; device memory starts at one, but NumPy's may not.
        wide = self.backend.empty(int(np.prod(shape)) + 32 // dtype.itemsize, dtype)
        start = (-wide.ctypes.data % 16) // dtype.itemsize + 1 if isinstance(wide, np.ndarray) else 1
        return wide[start : start + int(np.prod(shape))].reshape(shape)

    def work(self, rows: int, features: int, **more: Array) -> dict[str, Array]:
        """The work arrays of all methods, for NumPy and CUDA."""
        full = {name: self.empty(rows, features) for name in ("slope", "dz", "normalised", "mask")}
        scratch = {name: self.empty(rows, features, dtype=self.compute) for name in "tu"}
        columns = {name: self.empty(features, dtype=self.compute) for name in ("mean", "var", "inverse")}
        lines = {name: self.empty(rows, dtype=self.compute) for name in ("sum", "log", "mass", "power", "ratio")}
        return {
            **full,
            **scratch,
            **columns,
            **lines,
            "row": self.empty(features if more.pop("by_columns", None) else rows, dtype=self.compute),
            "loss": self.empty(1, dtype=self.compute),
            "partial": self.empty(2 * PARTS, features, dtype=self.compute),
            "parts": self.empty(SUM_PARTS, dtype=np.float64),
            "ticket": self.backend.zeros(1, np.uint32),
            "squares": self.empty(1, 1, dtype=self.compute),
            "l2": self.empty(100, dtype=self.compute),
            "index": self.empty(rows, dtype=np.int64),
            "highest": self.empty(rows, dtype=np.int64),
            "offsets": self.backend.asarray(np.arange(rows, dtype=np.int64) * features),
            "uniform": self.empty(rows, features, dtype=np.float32),
            "positive": self.empty(rows, features, dtype=bool),
            **more,
        }


Results = dict[str, Array]


@dataclass(frozen=True)
class Case:
    """One use of a method.

    run: calls the method; returns the arrays that it wrote
    exact: NumPy gives the same bits in the same element type
    grows: of (rows, features): errors grow as the root of this number of terms in a sum
    rounded_inside: number of float16-rounded values that a result depends on
    """

    method: str
    source: Callable[[str], str]
    run: Callable[[Place, int, int], Results]
    sizes: list[tuple[int, int]]
    exact: bool = False
    grows: Callable[[int, int], int] = lambda rows, features: 1
    rounded_inside: int = 0


# --- the cases -------------------------------------------------------------------------------------------------------


def curve(kind: str) -> BoundActivation:
    """An activation by name, with a slope where it wants one."""
    return getattr(activations, kind).bind(**({"slope": 0.1} if kind == "leaky_relu" else {}))


def activate(kind: str, bias: bool, in_place: bool, p: Place, rows: int, features: int) -> Results:
    x, b, work = p.real(rows, features), p.real(features), p.work(rows, features)
    y = x if in_place else p.empty(rows, features)
    f = curve(kind)
    p.ops.activate(f, x, b if bias else None, y, work)
    return {"y": y, **({"slope": work["slope"]} if f.keeps else {})}


def activation_gradient(kind: str, dx: str, bias: bool, p: Place, rows: int, features: int) -> Results:
    y, dy, work = p.real(rows, features), p.real(rows, features), p.work(rows, features)
    work["slope"][...] = p.real(rows, features)
    out = {"new": p.empty(rows, features), "in place": dy, "none": None}[dx]
    db = p.empty(features) if bias else None
    p.ops.activation_gradient(curve(kind), y, dy, out, db, work)
    return {name: a for name, a in (("dx", out), ("db", db)) if a is not None}


def of_factor(p: Place, factor: float) -> dict[str, Array]:
    return {} if factor == 1 else {"factor": p.array(np.full(1, factor), p.compute)}


def sample_weights(p: Place, rows: int) -> Array:
    """Weights of rows, of which every third is 0; the first is not."""
    return p.array(np.where(np.arange(rows) % 3 == 1, 0, p.rng.uniform(0.1, 2, rows)).astype(p.precision), p.compute)


def weigh(weight: str, labels: str, p: Place, rows: int, features: int) -> Results:
    w = p.backend.asarray((10 * p.rng.uniform(0, 2, rows)).astype(weight)) if weight else None
    Y = p.labels(rows, 3, labels) if labels else None
    out, whole = p.empty(rows, dtype=p.compute), p.empty(1, dtype=np.float64)
    p.ops.weigh(w, Y, 2, out, whole, {})
    return {"out": out, "sum": whole}


def softmax(
    truth: str,
    gradient: bool,
    factor: float,
    p: Place,
    rows: int,
    classes: int,
    weighted: bool = False,
    smoothing: float = 0.0,
    relative: bool = False,
) -> Results:
    z, work = p.real(rows, classes, times=5), p.work(rows, classes, **of_factor(p, factor))
    if truth == "rows":
        Y = p.positive(rows, classes)
    elif truth == "one-hot":
        Y = p.backend.asarray(np.eye(classes, dtype=np.uint8)[p.rng.integers(0, classes, rows)])
    else:
        Y = p.labels(rows, min(classes, 100), truth)
    weights = sample_weights(p, rows) if weighted else None
    if truth == "int64" and weighted:
        Y[1::3] = -100  # nobody looks at the label of a row that is left out
    p.ops.softmax_cross_entropy(z, Y, gradient, work, weights, smoothing, relative)
    return {"loss": work["loss"], **({"dz": work["dz"]} if gradient else {})}


def focal(
    labels: str,
    gradient: bool,
    factor: float,
    p: Place,
    rows: int,
    classes: int,
    weighted: bool = False,
    gamma: float = 2.0,
    alpha: bool = False,
) -> Results:
    z, Y, work = p.real(rows, classes, times=2), p.labels(rows, min(classes, 100), labels), p.work(rows, classes)
    work.update(of_factor(p, factor))
    weights = sample_weights(p, rows) if weighted else None
    if weighted:
        Y[1::3] = 2**40
    of_classes = p.positive(classes, dtype=p.compute) if alpha else None
    p.ops.softmax_focal(z, Y, gradient, work, weights, gamma, of_classes)
    return {"loss": work["loss"], **({"dz": work["dz"]} if gradient else {})}


def margins(
    method: str,
    labels: str,
    gradient: bool,
    factor: float,
    p: Place,
    rows: int,
    classes: int,
    weighted: bool = False,
    delta: float = 1.0,
) -> Results:
    z, Y, work = p.grid(rows, classes), p.labels(rows, min(classes, 100), labels), p.work(rows, classes)
    work.update(of_factor(p, factor))
    weights = sample_weights(p, rows) if weighted else None
    if weighted:
        Y[1::3] = 2**40
    getattr(p.ops, method)(z, Y, gradient, work, weights, delta)
    return {"loss": work["loss"], **({"dz": work["dz"]} if gradient else {})}


def over_scores(
    method: str,
    stored: str,
    gradient: bool,
    factor: float,
    p: Place,
    rows: int,
    features: int,
    weighted: bool = False,
) -> Results:
    """Targets are numbers from 0 to 1, in rows, or alone where there is one score; "strided" are between others."""
    strided = stored == "strided"
    z, work = p.real(rows, features, times=5), p.work(rows, features, **of_factor(p, factor))
    dtype = p.precision if strided else np.dtype(stored)
    values = p.rng.uniform(0, 1, (rows, 2 * features if strided else features))
    Y = p.backend.asarray((values if dtype.kind == "f" else np.round(values)).astype(dtype))
    Y = Y[:, ::2] if strided else Y.reshape(-1) if features == 1 else Y
    weights = sample_weights(p, rows) if weighted else None
    if weighted:
        z[1::3] = np.inf  # nor at its scores
    with np.errstate(invalid="ignore"):
        p.ops.score_loss(getattr(scores, method).bind(), z, Y, gradient, work, weights)
    return {"loss": work["loss"], **({"dz": work["dz"]} if gradient else {})}


def l2(p: Place, rows: int, features: int) -> tuple[Array, Array]:
    """A flat buffer, and three parts of it, one of which is empty."""
    w, n = p.real(rows, features).reshape(-1), rows * features
    return w, p.backend.asarray(np.array([[n // 2, n], [n // 3, n // 3], [0, n // 4]]))


def l2_loss(p: Place, rows: int, features: int) -> Results:
    (w, spans), loss = l2(p, rows, features), p.array(np.array([3.0]), p.compute)
    p.ops.l2_loss(w, spans, 0.25 / w.size, loss, p.work(rows, features))
    return {"loss": loss}


def l2_gradient(factor: float, p: Place, rows: int, features: int) -> Results:
    (w, spans), g = l2(p, rows, features), p.real(rows * features)
    p.ops.l2_gradient(w, spans, 0.25, g, p.work(rows, features, **of_factor(p, factor)))
    return {"g": g}


def normalise(p: Place, rows: int, features: int) -> Results:
    x, work = p.real(rows, features), p.work(rows, features)
    mean, var = p.real(features, dtype=p.compute), p.positive(features, dtype=p.compute)
    gamma, beta = p.real(features), p.real(features)
    p.ops.normalise(x, mean, var, 1e-5, gamma, beta, x, work)
    return {"y": x}


def batch_norm(in_place: bool, p: Place, rows: int, features: int) -> Results:
    x = p.real(rows, features, plus=3)  # where E[x²] - mean² would lose digits
    gamma, beta, work = p.real(features), p.real(features), p.work(rows, features)
    y = x if in_place else p.empty(rows, features)
    p.ops.batch_norm(x, 1e-3, gamma, beta, y, work)
    return {"y": y, **{name: work[name] for name in ("mean", "var", "normalised", "inverse")}}


def batch_norm_gradient(dx: str, p: Place, rows: int, features: int) -> Results:
    dy, gamma, dgamma, dbeta = p.real(rows, features), p.real(features), p.empty(features), p.empty(features)
    work = p.work(rows, features, by_columns=True)
    work["normalised"][...], work["inverse"][...] = p.real(rows, features), p.positive(features, dtype=p.compute)
    out = {"new": p.empty(rows, features), "in place": dy, "none": None}[dx]
    p.ops.batch_norm_gradient(dy, gamma, dgamma, dbeta, out, work)
    return {"dgamma": dgamma, "dbeta": dbeta, **({} if out is None else {"dx": out})}


def update_running(p: Place, rows: int, features: int) -> Results:
    running, new = p.real(features, dtype=p.compute), p.real(features, dtype=p.compute)
    p.ops.update_running(running, new, 0.1, 1.25, p.work(rows, features, by_columns=True))
    return {"running": running}


def dropout(rate: float, first: int, at: bool, p: Place, rows: int, features: int) -> Results:
    x, y, work, step = p.real(rows, features), p.empty(rows, features), p.work(rows, features), 2**40 + 1
    in_memory = at and p.backend.name == "cuda"
    where = p.backend.asarray(np.array([step], np.uint64)) if in_memory else step
    p.ops.dropout(x, y, rate, (2**63 + 11, 3), where, first, work)
    return {"y": y, "mask": work["mask"]}


def dropout_gradient(in_place: bool, p: Place, rows: int, features: int) -> Results:
    dy, work = p.real(rows, features), p.work(rows, features, mask=p.real(rows, features))
    dx = dy if in_place else p.empty(rows, features)
    p.ops.dropout_gradient(dy, dx, work)
    return {"dx": dx}


def square_sum(p: Place, rows: int, features: int) -> Results:
    out = p.backend.zeros(SQUARE_SUM_SIZE, np.float64)
    for _ in range(2):  # square_sum adds to the earlier sum
        p.ops.square_sum(p.real(rows, features), out)
    return {"sum": out[:2]}


def gather(
    stored: str, scale: float, shift: float, p: Place, rows: int, features: int, indexed: bool = True
) -> Results:
    samples, dtype = 2 * rows + 1, np.dtype(stored)
    if dtype.kind == "f":
        values = p.rng.standard_normal((samples, features)).astype(stored)
    elif dtype.kind == "b":
        values = p.rng.integers(0, 2, (samples, features)).astype(bool)
    else:
        values = p.rng.integers(np.iinfo(stored).min, np.iinfo(stored).max, (samples, features), stored, endpoint=True)
    index = p.backend.asarray(p.rng.integers(0, samples, rows))
    out = p.empty(rows, features)
    p.ops.gather(p.backend.asarray(values if indexed else values[:rows]), index if indexed else None, out, scale, shift)
    return {"out": out}


def file(name: str, *before: str) -> Callable[[str], str]:
    return lambda dtype: source_of(dtype, *before, name)


CASES: dict[str, Case] = {}
for kind in activations.__all__:
    source = functools.partial(lambda kind, dtype: elementwise_source(dtype, curve(kind)), kind)
    sizes = SIZES if kind in ("identity", "gelu") else [(301, 3)]  # one of the others suffices for sizes
    for bias, in_place in ((True, False), (False, True)):
        CASES[f"activate {kind} {'with' if bias else 'without'} bias"] = Case(
            "activate", source, functools.partial(activate, kind, bias, in_place), sizes
        )
    for dx, bias in (("new", True), ("in place", False)):
        CASES[f"activation_gradient {kind} {dx}"] = Case(
            "activation_gradient",
            source,
            functools.partial(activation_gradient, kind, dx, bias),
            [*sizes, (0, 5)],
            grows=lambda rows, features: rows,
        )
CASES["activation_gradient of biases alone"] = replace(
    CASES["activation_gradient identity new"], run=functools.partial(activation_gradient, "identity", "none", True)
)
for truth in ("int64", "uint8", "int32", "rows", "one-hot"):
    CASES[f"softmax {truth}"] = Case(
        "softmax_cross_entropy", file("loss.cu", "total.cuh"), functools.partial(softmax, truth, True, 1), CLASSES
    )
    if truth in ("int64", "uint8"):
        for method in ("svm", "crammer_singer"):
            CASES[f"{method} {truth}"] = Case(
                method, file("loss.cu", "total.cuh"), functools.partial(margins, method, truth, True, 1), CLASSES
            )
        CASES[f"softmax_focal {truth}"] = Case(
            "softmax_focal", file("loss.cu", "total.cuh"), functools.partial(focal, truth, True, 1), CLASSES
        )
for truth in ("int64", "rows"):
    CASES[f"softmax {truth}, loss alone"] = replace(
        CASES[f"softmax {truth}"], run=functools.partial(softmax, truth, False, 1)
    )
for truth in ("int64", "rows"):
    CASES[f"softmax {truth}, scaled"] = replace(
        CASES[f"softmax {truth}"], run=functools.partial(softmax, truth, True, 8)
    )
for method in ("svm", "crammer_singer"):
    run, case = functools.partial(margins, method, "int64"), CASES[f"{method} int64"]
    CASES[f"{method}, loss alone"] = replace(case, run=functools.partial(run, False, 1))
    CASES[f"{method}, scaled"] = replace(case, run=functools.partial(run, True, 8))
    CASES[f"{method}, delta"] = replace(case, run=functools.partial(run, True, 1, delta=0.375))
run, case = functools.partial(focal, "int64"), CASES["softmax_focal int64"]
CASES["softmax_focal, loss alone"] = replace(case, run=functools.partial(run, False, 1))
CASES["softmax_focal, scaled"] = replace(case, run=functools.partial(run, True, 8))
CASES["softmax_focal, alpha"] = replace(case, run=functools.partial(run, True, 1, gamma=0.5, alpha=True))
for truth in ("int64", "rows"):
    run = functools.partial(softmax, truth, True, 8, smoothing=0.1)
    CASES[f"softmax {truth}, smoothed"] = replace(CASES[f"softmax {truth}"], run=run)
CASES["softmax rows, relative"] = replace(
    CASES["softmax rows"], run=functools.partial(softmax, "rows", True, 1, relative=True)
)
CASES["softmax one-hot, relative"] = replace(
    CASES["softmax one-hot"], run=functools.partial(softmax, "one-hot", False, 1, relative=True)
)
for method, targets in (
    ("mse", ("float32", "float64", "float16", "strided")),
    ("sigmoid_cross_entropy", ("uint8", "float32", "bool", "int64", "strided")),
    *((name, ("float32",)) for name in ("mae", "huber", "log_cosh", "quantile", "poisson", "focal")),
    ("smoothed_sigmoid_cross_entropy", ("float32",)),
    ("hinge", ("uint8",)),
    ("squared_hinge", ("uint8",)),
):
    for stored in targets:
        source = functools.partial(
            lambda method, stored, dtype: score_loss_source(
                dtype,
                compute_dtype(np.dtype(dtype)).name if stored == "strided" else stored,
                getattr(scores, method).bind(),
            ),
            method,
            stored,
        )
        sizes = SIZES if stored == targets[0] and len(targets) > 1 else [(67, 257), (67, 1)]
        run = functools.partial(over_scores, method, stored, True, 1)
        CASES[f"{method} {stored}"] = Case("score_loss", source, run, sizes)
    case = CASES[f"{method} {targets[0]}"]
    CASES[f"{method}, loss alone"] = replace(case, run=functools.partial(over_scores, method, targets[0], False, 1))
    CASES[f"{method}, scaled"] = replace(case, run=functools.partial(over_scores, method, targets[0], True, 8))
for name, run in {
    "softmax int64": functools.partial(softmax, "int64", True, 8),
    "softmax rows": functools.partial(softmax, "rows", True, 1),
    "svm int64": functools.partial(margins, "svm", "int64", True, 8),
    "crammer_singer int64": functools.partial(margins, "crammer_singer", "int64", True, 8),
    "softmax_focal int64": functools.partial(focal, "int64", True, 8, alpha=True),
    "mse float32": functools.partial(over_scores, "mse", "float32", True, 8),
    "sigmoid_cross_entropy uint8": functools.partial(over_scores, "sigmoid_cross_entropy", "uint8", True, 1),
}.items():
    CASES[f"{name}, weighted"] = replace(CASES[name], run=functools.partial(run, weighted=True))
for weight, labels in (("float32", ""), ("float64", "int64"), ("uint8", "int8"), ("", "uint64")):
    CASES[f"weigh {weight or 'nothing'}, labels {labels or 'none'}"] = Case(
        "weigh",
        functools.partial(
            lambda weight, labels, dtype: weigh_source(
                dtype, weight or compute_dtype(np.dtype(dtype)).name, labels or "int64"
            ),
            weight,
            labels,
        ),
        functools.partial(weigh, weight, labels),
        [(rows, features) for rows, features in SIZES if rows > 4],
    )
CASES["l2_loss"] = Case("l2_loss", file("l2.cu", "total.cuh"), l2_loss, SIZES)
CASES["l2_gradient"] = Case("l2_gradient", file("l2.cu", "total.cuh"), functools.partial(l2_gradient, 1), SIZES)
CASES["l2_gradient, scaled"] = replace(CASES["l2_gradient"], run=functools.partial(l2_gradient, 8))
CASES["normalise"] = Case("normalise", file("batch_norm.cu"), normalise, SIZES)
for in_place in (True, False):
    CASES[f"batch_norm {'in place' if in_place else 'new'}"] = Case(
        "batch_norm",
        file("batch_norm.cu"),
        functools.partial(batch_norm, in_place),
        SIZES,
        grows=lambda rows, features: rows,
    )
for dx in ("new", "in place", "none"):
    CASES[f"batch_norm_gradient {dx}"] = Case(
        "batch_norm_gradient",
        file("batch_norm.cu"),
        functools.partial(batch_norm_gradient, dx),
        SIZES,
        grows=lambda rows, features: rows,
        rounded_inside=2,
    )
CASES["update_running"] = Case("update_running", file("batch_norm.cu"), update_running, SIZES)
for rate, first in ((0.0, 0), (0.3, 0), (0.3, 13), (0.3, 2**40)):
    CASES[f"dropout {rate} from {first}"] = Case(
        "dropout", file("dropout.cu", "philox.cuh"), functools.partial(dropout, rate, first, False), SIZES, exact=True
    )
CASES["dropout, its step in memory"] = replace(
    CASES["dropout 0.3 from 0"], run=functools.partial(dropout, 0.3, 0, True), sizes=[(301, 3)]
)
for in_place in (True, False):
    CASES[f"dropout_gradient {'in place' if in_place else 'new'}"] = Case(
        "dropout_gradient",
        file("dropout.cu", "philox.cuh"),
        functools.partial(dropout_gradient, in_place),
        SIZES,
        exact=True,
    )
CASES["square_sum"] = Case(
    "square_sum",
    file("square_sum.cu", "square_sum.cuh"),
    square_sum,
    [*SIZES, (0, 1), (150, 1000)],
    grows=lambda r, f: 0,
)
for stored in C_TYPES:
    source = functools.partial(lambda stored, dtype: gather_source(dtype, stored), stored)
    sizes = [*(SIZES if stored == "uint8" else [(67, 257)]), (9, 48)]  # 48: any element type in sixteen bytes
    CASES[f"gather {stored}"] = Case(
        "gather", source, functools.partial(gather, stored, 1.0, 0.0), [*sizes, (0, 5)], exact=True
    )
CASES["gather all"] = replace(
    CASES["gather uint8"], run=functools.partial(gather, "uint8", 1 / 255, 0.0, indexed=False)
)
CASES["gather scaled"] = replace(CASES["gather uint8"], run=functools.partial(gather, "uint8", 1 / 255, -0.5))


# One case of each method, and those that run other lines of it.
FAST = {
    *first_of_each({name: case.method for name, case in CASES.items()}),
    "activate gelu without bias",
    "activation_gradient gelu in place",
    "activation_gradient of biases alone",
    "softmax rows",
    "softmax int64, scaled",
    "softmax int64, weighted",
    "softmax rows, weighted",
    "svm int64, weighted",
    "mse float32, weighted",
    "batch_norm new",
    "batch_norm_gradient none",
    "dropout 0.3 from 13",
    "dropout, its step in memory",
    "gather uint8",
    "gather all",
    "gather scaled",
}


# --- comparison ------------------------------------------------------------------------------------------------------


def by_numpy(case: Case, size: tuple[int, int], dtype: np.dtype) -> Results:
    """The reference results: in float64, or in ``dtype`` for cases whose bits are compared."""
    computed = dtype if case.exact else np.dtype(np.float64)
    ops = Ops(half=True) if computed == np.float16 else Ops()
    place = Place(ops, gb.get_backend("cpu"), computed, dtype, np.random.default_rng(size))
    return case.run(place, *size)


def by_host(
    case: Case, size: tuple[int, int], dtype: np.dtype, ops: Ops, misaligned: bool = False
) -> dict[str, np.ndarray]:
    """The results of ``ops`` in main memory, on the same numbers."""
    return case.run(Place(ops, gb.get_backend("cpu"), dtype, dtype, np.random.default_rng(size), misaligned), *size)


def compare(case: Case, size: tuple[int, int], ours: Results, right: Results, dtype: np.dtype) -> None:
    """Compare to within some roundings of the largest finite number, times the root of the number of terms in a sum.

    float16 results are rounded once more, when stored, some to infinity. Infinity and NaN must else be equal.
    """
    assert ours.keys() == right.keys()
    eps = np.finfo(np.float64 if case.method == "square_sum" else compute_dtype(dtype)).eps
    bound = 16 * eps * (1 + case.grows(*size)) ** 0.5
    for name in ours:
        largest = np.abs(right[name]).max(initial=1, where=np.isfinite(right[name]))
        rtol, atol = bound, bound * largest
        if ours[name].dtype == np.float16:
            rtol, atol = rtol + HALF, atol + 2.0**-25 + case.rounded_inside * HALF * largest
        pair = (as_stored(results[name], ours[name].dtype) for results in (ours, right))
        np.testing.assert_allclose(*pair, rtol=rtol, atol=atol, err_msg=f"{name} {size}")


def as_stored(x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Results that are stored in ``dtype``, with the largest float16 in place of what is beyond it."""
    most = float(np.finfo(np.float16).max)
    return np.clip(x.astype(np.float64), -most, most) if dtype == np.float16 else x


def same(ours: Results, others: Results) -> None:
    assert ours.keys() == others.keys()
    for name in ours:
        np.testing.assert_array_equal(ours[name], others[name], err_msg=name)
