"""gpubatch.sklearn: scikit-learn's networks are the oracle, weight for weight, and its checks of estimators pass."""

from __future__ import annotations

import copy
import functools
import importlib
import math
import pickle
import re
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from families import every
from needs import missing, peer

import gpubatch as gb
from gpubatch.backend import available_backends
from gpubatch.nn import Core
from gpubatch.ops import host_library

base, selection, checks = (peer(f"sklearn.{name}") for name in ("base", "model_selection", "utils.estimator_checks"))
datasets, neural_network = peer("sklearn.datasets"), peer("sklearn.neural_network")
errors, pipeline, preprocessing = (peer(f"sklearn.{name}") for name in ("exceptions", "pipeline", "preprocessing"))
joblib = peer("joblib")
ours = peer("gpubatch.sklearn")
OrderedEpochs = importlib.import_module("gpubatch.sklearn.training").OrderedEpochs

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")


@functools.cache
def data(name: str) -> tuple[Any, np.ndarray]:
    """Samples and targets of every kind, all of them small."""
    random = np.random.default_rng(0)
    X, y = datasets.load_iris(return_X_y=True)
    X, R = preprocessing.scale(X), preprocessing.scale(X @ random.standard_normal((4, 3)))
    match name:
        case "multiclass":
            return X, np.array(["setosa", "versicolor", "virginica"])[y]
        case "binary":
            return X, np.where(y == 1, "yes", "no")
        case "multilabel":
            return X, np.stack([y > 0, y == 1, X[:, 0] > 0], axis=1).astype(int)
        case "one output":
            return X, R[:, 0]
        case "outputs":
            return X, R
        case "counts":
            return X, random.poisson(np.exp(0.5 * R[:, 0]))
    raise AssertionError(name)


def fitted(module: Any, name: str, weight: np.ndarray | None = None, **parameters: Any) -> Any:
    X, y = data(name)
    kind = module.MLPRegressor if name in ("one output", "outputs", "counts") else module.MLPClassifier
    parameters = {"hidden_layer_sizes": (9,), "max_iter": 12, "batch_size": 32, "random_state": 3, **parameters}
    return kind(**parameters).fit(X, y, weight)


# --- the same numbers as scikit-learn ---------------------------------------------------------------------------------

SAME: dict[str, tuple[str, dict[str, Any]]] = {
    "multiclass, Adam": ("multiclass", {}),
    "the default batches": ("multiclass", {"batch_size": "auto", "hidden_layer_sizes": (100,)}),
    "several layers": ("multiclass", {"hidden_layer_sizes": (12, 5, 7)}),
    "binary": ("binary", {"alpha": 0.1, "activation": "tanh"}),
    "multilabel": ("multilabel", {"alpha": 1.0, "activation": "logistic"}),
    "not shuffled": ("multiclass", {"shuffle": False}),
    "momentum": ("multiclass", {"solver": "sgd", "nesterovs_momentum": False, "momentum": 0.8}),
    "Nesterov": ("binary", {"solver": "sgd", "learning_rate_init": 0.01}),
    "no momentum": ("one output", {"solver": "sgd", "momentum": 0.0}),
    "invscaling": ("multiclass", {"solver": "sgd", "learning_rate": "invscaling", "learning_rate_init": 0.1}),
    "adaptive": ("one output", {"solver": "sgd", "learning_rate": "adaptive", "tol": 0.1, "n_iter_no_change": 2}),
    "stops by tol": ("multiclass", {"tol": 0.05, "n_iter_no_change": 3, "max_iter": 100}),
    "early stopping": ("multiclass", {"early_stopping": True, "n_iter_no_change": 3, "max_iter": 100}),
    "early stopping, binary": ("binary", {"early_stopping": True, "validation_fraction": 0.3}),
    "early stopping, multilabel": ("multilabel", {"early_stopping": True}),
    "early stopping, regression": ("outputs", {"early_stopping": True}),
    "Adam's arguments": ("multiclass", {"beta_1": 0.8, "beta_2": 0.9, "epsilon": 1e-3, "learning_rate_init": 0.01}),
    "regression": ("one output", {"alpha": 0.5}),
    "several outputs": ("outputs", {"alpha": 0.5, "activation": "identity"}),
    "Poisson": ("counts", {"loss": "poisson", "alpha": 0.5}),
    "no regularisation": ("outputs", {"alpha": 0.0}),
}


def assert_same(own: Any, theirs: Any, rtol: float = 1e-9) -> None:
    for name in ("coefs_", "intercepts_", "loss_curve_", "validation_scores_"):
        if getattr(theirs, name) is None:
            assert getattr(own, name) is None
            continue
        for mine, reference in zip(getattr(own, name), getattr(theirs, name), strict=True):
            np.testing.assert_allclose(mine, reference, rtol=rtol, atol=1e-12)
    for name in ("n_iter_", "t_", "n_layers_", "n_outputs_", "out_activation_", "n_features_in_"):
        assert getattr(own, name) == getattr(theirs, name), name
    for name in ("loss_", "best_loss_", "best_validation_score_"):
        value = getattr(theirs, name)
        assert getattr(own, name) == (value if value is None else pytest.approx(value, rel=rtol)), name


@every("case", SAME, ["multiclass, Adam", "binary", "multilabel", "early stopping", "several outputs", "Poisson"])
@pytest.mark.parametrize("weighted", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
def test_training_is_scikit_learns(case: tuple[str, dict[str, Any]], weighted: bool) -> None:
    """First weights, order, steps, records and stopping: the same but for rounding, from the same random state."""
    name, parameters = case
    X, _ = data(name)
    weight = np.random.default_rng(1).random(len(X)) + 0.1 if weighted else None
    own, theirs = (fitted(module, name, weight, **parameters) for module in (ours, neural_network))
    assert_same(own, theirs)
    if base.is_classifier(own):
        np.testing.assert_array_equal(own.predict(X), theirs.predict(X))
        np.testing.assert_allclose(own.predict_proba(X), theirs.predict_proba(X), rtol=1e-9)
        np.testing.assert_allclose(own.predict_log_proba(X), theirs.predict_log_proba(X), rtol=1e-9, atol=1e-12)
    else:
        np.testing.assert_allclose(own.predict(X), theirs.predict(X), rtol=1e-9, atol=1e-12)
    assert own.score(*data(name)) == pytest.approx(theirs.score(*data(name)))


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["multiclass", "binary", "multilabel", "outputs"])
def test_partial_fit_and_warm_starts_are_scikit_learns(name: str) -> None:
    X, y = data(name)
    for parameters in ({"solver": "sgd", "learning_rate": "invscaling"}, {"solver": "adam"}):
        pair = [fitted(module, name, warm_start=True, **parameters) for module in (ours, neural_network)]
        for estimator in pair:
            estimator.set_params(max_iter=5).fit(X, y)
            estimator.partial_fit(X, y)
        assert_same(*pair)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["multiclass", "binary", "multilabel", "one output", "counts"])
@pytest.mark.parametrize("weighted", [False, True])
def test_lbfgs_finds_scikit_learns_minimum(name: str, weighted: bool) -> None:
    """With an identity in the middle and much regularisation there is one minimum but for symmetries."""
    X, _ = data(name)
    weight = np.random.default_rng(1).random(len(X)) if weighted else None
    parameters = {"solver": "lbfgs", "activation": "identity", "alpha": 1.0, "tol": 1e-6, "max_iter": 500}
    if name == "counts":
        parameters["loss"] = "poisson"
    own, theirs = (fitted(module, name, weight, **parameters) for module in (ours, neural_network))
    assert own.loss_ == pytest.approx(theirs.loss_, rel=1e-6)
    method = "predict_proba" if base.is_classifier(own) else "predict"
    np.testing.assert_allclose(getattr(own, method)(X), getattr(theirs, method)(X), rtol=1e-2, atol=1e-3)


@pytest.mark.exhaustive
@pytest.mark.filterwarnings("default")
@checks.parametrize_with_checks([ours.MLPClassifier(), ours.MLPRegressor()])
def test_estimators_pass_scikit_learns_checks(estimator: Any, check: Any) -> None:
    check(estimator)


AT_ONCE: dict[str, tuple[str, dict[str, Any]]] = {
    "float64": ("multiclass", {"alpha": 1e-2}),
    "float32": ("multiclass", {"dtype": "float32"}),
    "no regularisation": ("multiclass", {"alpha": 0.0}),
    "binary": ("binary", {"solver": "sgd", "learning_rate": "invscaling"}),
    "multilabel": ("multilabel", {}),
    "outputs": ("outputs", {"dtype": "float32"}),
    "Poisson": ("counts", {"loss": "poisson"}),
    "a schedule": ("multiclass", {"learning_rate": gb.CosineDecay(0.1, 40, per="step"), "optimizer": "AdamW"}),
    "reductions": ("multiclass", {"optimizer": "LAMB"}),
    "groups": (
        "multiclass",
        {"optimizer": functools.partial(gb.Adam, groups={"b*": {"lr": 0.1}, "W2": {"trainable": False}})},
    ),
}


@pytest.mark.parametrize("name", AT_ONCE)
def test_steps_as_one_call_have_the_bits_of_kernels_one_by_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if isinstance(host_library(), str):
        missing("compiler", "steps are one call of compiled kernels")
    made, gradients = [0], OrderedEpochs._gradients

    def counted(*arguments: Any) -> Any:
        made[-1] += 1
        return gradients(*arguments)

    monkeypatch.setattr(OrderedEpochs, "_gradients", counted)
    of, options = AT_ONCE[name]
    options = {"hidden_layer_sizes": (9, 7), "activation": "tanh", **options}
    once = fitted(ours, of, **options)
    made.append(0)
    monkeypatch.setattr(Core, "kernel_calls", None)
    apart = fitted(ours, of, **options)
    assert made == [2, 12 * 5]  # a first step of either size, and of the others none
    assert once.loss_curve_ == apart.loss_curve_
    for of_once, of_apart in zip(once.coefs_ + once.intercepts_, apart.coefs_ + apart.intercepts_, strict=True):
        assert of_once.tobytes() == of_apart.tobytes()


class OwnStep(gb.Adam):
    """An optimizer with a step of its own."""

    def step(self, grads: Any = None, control: Any = None) -> Any:
        self.lr = 0.5 * self.lr
        return super().step(grads, control)


def test_the_step_of_an_optimizer_of_ones_own_is_made() -> None:
    """Ten steps, which halve the learning rate."""
    own = fitted(ours, "multiclass", optimizer=OwnStep, max_iter=2, learning_rate_init=1.0)
    assert own._optimizer.learning_rate == 0.5**10


@pytest.mark.parametrize("options", [{"dropout": 0.5}, {"batch_norm": True}, {"sample_weight": True}], ids=str)
def test_other_steps_are_not_made_as_one_call(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*arguments: Any) -> None:
        raise AssertionError("these steps have work for NumPy, or what differs from batch to batch")

    monkeypatch.setattr("gpubatch.ops.recording.KernelCalls.__init__", run)
    weight = np.ones(150) if options.pop("sample_weight", False) else None
    fitted(ours, "multiclass", weight, **options)


def test_defaults_are_scikit_learns() -> None:
    for name in ("MLPClassifier", "MLPRegressor"):
        own, theirs = (getattr(module, name)().get_params() for module in (ours, neural_network))
        assert {key: own[key] for key in theirs} == theirs


SETS = {
    "digits": (ours.MLPClassifier, datasets.load_digits),
    "breast cancer": (ours.MLPClassifier, datasets.load_breast_cancer),
    "wine": (ours.MLPClassifier, datasets.load_wine),
    "diabetes": (ours.MLPRegressor, datasets.load_diabetes),
}


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", SETS)
def test_scores_are_scikit_learns_within_noise(name: str) -> None:
    """Ten splits and seeds, in both element types: the means differ by less than the deviation of a mean."""
    kind, load = SETS[name]
    X, y = load(return_X_y=True)
    reference = getattr(neural_network, kind.__name__)
    scores: dict[str, list[float]] = {"float64": [], "float32": [], "theirs": []}
    for seed in range(10):
        most = 20 if name == "digits" else 60
        parts = selection.train_test_split(
            preprocessing.scale(X), y / y.std() if name == "diabetes" else y, random_state=seed
        )
        for column, estimator in (
            ("float64", kind(random_state=seed, max_iter=most)),
            ("float32", kind(random_state=seed, max_iter=most, dtype="float32")),
            ("theirs", reference(random_state=seed, max_iter=most)),
        ):
            scores[column].append(estimator.fit(parts[0], parts[2]).score(parts[1], parts[3]))
    np.testing.assert_allclose(scores["float64"], scores["theirs"], rtol=1e-6)
    noise = np.std(scores["theirs"]) / math.sqrt(10)
    assert abs(np.mean(scores["float32"]) - np.mean(scores["theirs"])) <= noise


# --- what scikit-learn's have not -------------------------------------------------------------------------------------


@gb.activation
def soft(x):  # type: ignore[no-untyped-def]
    return np.log1p(np.exp(-np.abs(x))) + np.maximum(x, 0)


OPTIONS: dict[str, dict[str, Any]] = {
    "a rule by name": {"optimizer": "AdamW"},
    "a rule in lower case": {"optimizer": "rmsprop"},
    "a class": {"optimizer": gb.Lion, "learning_rate_init": 3e-3},
    "a partial": {"optimizer": functools.partial(gb.AdamW, lr=0.01, weight_decay=0.1)},
    "a rule's object": {"optimizer": gb.rules.adagrad, "learning_rate_init": 0.05},
    "a schedule": {"optimizer": "adam", "learning_rate": gb.CosineDecay(0.01, total=30, per="epoch")},
    "batch norm": {"batch_norm": True, "hidden_layer_sizes": (16, 8)},
    "dropout": {"dropout": 0.2, "hidden_layer_sizes": (32,)},
    "both, early stopping": {"batch_norm": True, "dropout": 0.1, "early_stopping": True, "max_iter": 60},
    "float32": {"dtype": "float32"},
    "mixed": {"precision": "mixed"},
    "mixed, with all": {"precision": "mixed", "batch_norm": True, "alpha": 0.1, "solver": "sgd"},
    "an activation of gpubatch's": {"activation": "gelu"},
    "one's own activation": {"activation": soft},
    "no hidden layer": {"hidden_layer_sizes": ()},
    "L-BFGS": {"solver": "lbfgs"},
}


@every("options", OPTIONS, ["a partial", "both, early stopping"])
def test_options_train_and_survive_pickling(options: dict[str, Any]) -> None:
    X, y = data("multiclass")
    estimator = fitted(ours, "multiclass", **{"learning_rate_init": 0.01, "max_iter": 30, **options})
    assert estimator.score(X, y) > 0.85
    twins = [copy.deepcopy(estimator), pickle.loads(pickle.dumps(estimator)), estimator]
    probabilities = [twin.predict_proba(X) for twin in twins]
    for found in probabilities[1:]:
        np.testing.assert_array_equal(found, probabilities[0])
    if hasattr(estimator, "partial_fit") and not estimator.early_stopping and not estimator.dropout:
        for twin in twins:
            twin.partial_fit(X, y)
        for twin in twins[1:]:
            for own, reference in zip(twin.coefs_, twins[0].coefs_, strict=True):
                np.testing.assert_array_equal(own, reference)
    again = base.clone(estimator).fit(X, y)
    np.testing.assert_array_equal(again.predict_proba(X), probabilities[0])


def test_pickles_hold_the_estimators_state_alone() -> None:
    """No workspace and no network: parameters, the optimizer's state and the records."""
    estimator = fitted(ours, "multiclass", hidden_layer_sizes=(50,), batch_size=100)
    parameters = sum(a.nbytes for a in (*estimator.coefs_, *estimator.intercepts_))
    assert len(pickle.dumps(estimator)) < 3 * parameters + 8000  # with two moments


def test_parameters_may_be_assigned_and_changed_in_place() -> None:
    X, _ = data("multiclass")
    a, b = fitted(ours, "multiclass"), fitted(ours, "multiclass", random_state=4)
    wanted = b.predict_proba(X)
    a.coefs_, a.intercepts_ = [W.copy() for W in b.coefs_], [v.copy() for v in b.intercepts_]
    np.testing.assert_array_equal(a.predict_proba(X), wanted)
    for W in a.coefs_:
        W[...] = 0
    np.testing.assert_allclose(np.ptp(a.predict_proba(X), axis=0), 0, atol=1e-15)
    a.coefs_ = [np.zeros((2, 2)), np.zeros((2, 3))]
    with pytest.raises(ValueError, match=r"shape|features"):
        a.predict(X)


def test_class_weights_are_weights_of_samples() -> None:
    X, y = data("multiclass")
    weights = {"setosa": 1.0, "versicolor": 3.0, "virginica": 0.5}
    by_class = fitted(ours, "multiclass", class_weight=weights)
    by_sample = fitted(ours, "multiclass", np.array([weights[label] for label in y]))
    for own, reference in zip(by_class.coefs_, by_sample.coefs_, strict=True):
        np.testing.assert_array_equal(own, reference)
    with pytest.raises(ValueError, match="needs all labels"):
        ours.MLPClassifier(class_weight="balanced").partial_fit(X, y, classes=np.unique(y))
    with pytest.raises(ValueError, match="class_weight must have weights >= 0, got"):
        ours.MLPClassifier(class_weight={**weights, "setosa": -1.0}).fit(X, y)


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", ["csr_matrix", "csc_array", "csr_array"])
def test_sparse_rows_are_dense_ones(kind: str) -> None:
    sparse = pytest.importorskip("scipy.sparse")
    X, y = data("multiclass")
    X = np.where(abs(X) > 0.5, X, 0)
    for solver in ("adam", "lbfgs"):
        estimator = ours.MLPClassifier((5,), solver=solver, max_iter=5, batch_size=32, random_state=0)
        dense, other = base.clone(estimator).fit(X, y), base.clone(estimator).fit(getattr(sparse, kind)(X), y)
        for own, reference in zip(other.coefs_, dense.coefs_, strict=True):
            np.testing.assert_array_equal(own, reference)
        np.testing.assert_array_equal(other.predict_proba(getattr(sparse, kind)(X)), dense.predict_proba(X))


def threads_here() -> int:
    library = host_library()
    return joblib.cpu_count() // 2 if isinstance(library, str) else library.threads()


@pytest.mark.exhaustive
def test_searches_in_processes_and_threads_end_and_agree() -> None:
    X, y = data("multiclass")
    steps = pipeline.make_pipeline(
        preprocessing.StandardScaler(), ours.MLPClassifier((10,), max_iter=20, random_state=0)
    )
    steps.fit(X, y)  # the process has threads before it starts others
    grid = {"mlpclassifier__alpha": [1e-4, 1.0], "mlpclassifier__dropout": [0.0, 0.1]}
    found = [
        selection.GridSearchCV(steps, grid, n_jobs=n, cv=3).fit(X, y).cv_results_["mean_test_score"] for n in (1, 2)
    ]
    np.testing.assert_array_equal(*found)
    threads = joblib.Parallel(n_jobs=2)(joblib.delayed(threads_here)() for _ in range(2))
    assert threads == [max(1, joblib.cpu_count() // 2)] * 2, "processes share the processors"
    alone = selection.cross_val_score(steps, X, y, cv=3)
    for backend in ("threading", "multiprocessing"):
        with joblib.parallel_backend(backend, n_jobs=2):
            np.testing.assert_array_equal(selection.cross_val_score(steps, X, y, cv=3), alone)


def test_what_it_refuses() -> None:
    X, y = data("multiclass")
    refused: dict[str, tuple[type[Exception], dict[str, Any]]] = {
        "optimizer must be one of": (ValueError, {"optimizer": "adamm"}),
        "optimizer must be the name": (TypeError, {"optimizer": 3}),
        "activation must be one of": (ValueError, {"activation": "softmax"}),
        "solver must be one of": (ValueError, {"solver": "newton"}),
        "takes neither batch_norm nor dropout": (ValueError, {"solver": "lbfgs", "dropout": 0.5}),
        r"hidden_layer_sizes must be integers > 0, got \(5, 0\)": (ValueError, {"hidden_layer_sizes": (5, 0)}),
        r"dropout must be finite and in \[0, 1\)": (ValueError, {"dropout": 1.0}),
        "dtype must be": (TypeError, {"dtype": "float16"}),
        "batch_norm must be True or False": (TypeError, {"batch_norm": "yes"}),
        "learning_rate must be one of": (ValueError, {"learning_rate": "falling"}),
        "precision must be one of": (ValueError, {"precision": "half"}),
        "dtype must be 'float32' or None with": (ValueError, {"precision": "mixed", "dtype": "float64"}),
        "solver='lbfgs' takes precision": (ValueError, {"precision": "mixed", "solver": "lbfgs"}),
    }
    for text, (error, parameters) in refused.items():
        with pytest.raises(error, match=text):
            ours.MLPClassifier(**parameters).fit(X, y)
    with pytest.raises(gb.NonFiniteError, match=r"X must have numbers up to 65504 .* got 100000"):
        ours.MLPClassifier(precision="mixed").fit(np.full_like(X, 1e5), y)
    with pytest.raises(errors.NotFittedError):
        ours.MLPClassifier().predict(X)
    with pytest.raises(ValueError, match="Negative"):
        ours.MLPClassifier().fit(X, y, -np.ones(len(X)))
    with pytest.raises(ValueError, match="batch_norm=True needs at least 2"):
        ours.MLPRegressor(batch_norm=True).fit(X[:1], [1.0])
    assert not hasattr(ours.MLPClassifier(solver="lbfgs"), "partial_fit")
    with pytest.warns(errors.ConvergenceWarning, match=r"Maximum iterations \(2\)"):
        ours.MLPClassifier((3,), max_iter=2).fit(X, y)


@every("name", ["multiclass", "binary", "outputs"], ["multiclass"])
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_mixed_training_follows_float32(name: str) -> None:
    """With all that a step has: weights, an l2 term, outputs whose loss is a sum, a first step that overflows."""
    X, _ = data(name)
    weight = np.random.default_rng(1).random(len(X))
    options = {"alpha": 0.5, "max_iter": 5, "dtype": "float32"}
    full, mixed = (fitted(ours, name, weight, **options, precision=kind) for kind in ("full", "mixed"))
    for own, reference in zip(mixed.coefs_ + mixed.intercepts_, full.coefs_ + full.intercepts_, strict=True):
        assert own.dtype == np.float32
        np.testing.assert_allclose(own, reference, rtol=0.02, atol=0.01)
    assert mixed.loss_ == pytest.approx(full.loss_, rel=0.02)
    scale = pickle.loads(pickle.dumps(mixed))._optimizer.scale
    assert scale.good_steps == mixed._optimizer.scale.good_steps > 0
    assert scale.value == mixed._optimizer.scale.value == (2**15 if name == "outputs" else 2**16)


@pytest.mark.exhaustive
def test_nothing_else_imports_scikit_learn() -> None:
    code = "import sys, gpubatch as gb; [getattr(gb, name) for name in dir(gb)]; print('sklearn' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]
    code = "import sys; sys.modules['sklearn'] = None; import gpubatch.sklearn"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert re.search(
        r"ImportError: gpubatch\.sklearn needs scikit-learn.*pip install 'gpubatch\[sklearn\]'", done.stderr
    )


# --- on a GPU ---------------------------------------------------------------------------------------------------------


ON_A_GPU: dict[str, dict[str, Any]] = {
    "multiclass": {},
    "binary": {"early_stopping": True, "solver": "sgd"},
    "multilabel": {"alpha": 1.0, "batch_norm": True},
    "outputs": {"alpha": 0.5, "dtype": "float32"},
    "one output": {"solver": "lbfgs"},
}
MIXED = {"precision": "mixed", "alpha": 0.5, "batch_norm": True}


@pytest.mark.gpu
def test_mixed_training_on_a_gpu() -> None:
    if "cuda:0" not in available_backends():
        missing("gpu", "no CUDA device can be used here")
    here, there = (fitted(ours, "multiclass", None, backend=name, max_iter=3, **MIXED) for name in ("cpu", "cuda:0"))
    for own, reference in zip(there.coefs_ + there.intercepts_, here.coefs_ + here.intercepts_, strict=True):
        np.testing.assert_allclose(own, reference, rtol=0.02, atol=0.01)
    assert there.loss_ == pytest.approx(here.loss_, rel=0.02)
    again = pickle.loads(pickle.dumps(there))
    for estimator in (there, again):
        estimator.partial_fit(*data("multiclass"))
    for own, twin in zip(there.coefs_, again.coefs_, strict=True):
        np.testing.assert_array_equal(own, twin)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ON_A_GPU)
@pytest.mark.parametrize("weighted", [False, True])
def test_a_gpu_gives_the_numbers_of_a_cpu(name: str, weighted: bool) -> None:
    if "cuda:0" not in available_backends():
        missing("gpu", "no CUDA device can be used here")
    X, _ = data(name)
    weight = np.random.default_rng(1).random(len(X)) if weighted else None
    options = {"max_iter": 3, **ON_A_GPU[name]}
    here = fitted(ours, name, weight, **options)
    there = fitted(ours, name, weight, backend="cuda:0", **options)
    rtol = 1e-3 if options.get("dtype") == "float32" else 1e-7
    for own, reference in zip(there.coefs_ + there.intercepts_, here.coefs_ + here.intercepts_, strict=True):
        assert isinstance(own, np.ndarray)
        np.testing.assert_allclose(own, reference, rtol=rtol, atol=rtol)
    assert there.loss_ == pytest.approx(here.loss_, rel=rtol)
    again = pickle.loads(pickle.dumps(there))
    np.testing.assert_array_equal(again.predict(X), there.predict(X))
    if options.get("solver") != "lbfgs" and not options.get("early_stopping"):
        for estimator in (there, again, here):
            estimator.partial_fit(*data(name))
        for own, twin, reference in zip(there.coefs_, again.coefs_, here.coefs_, strict=True):
            np.testing.assert_array_equal(own, twin)
            np.testing.assert_allclose(own, reference, rtol=rtol, atol=rtol)
    moved = again.set_params(backend="cpu")
    method = "predict_proba" if base.is_classifier(moved) else "predict"
    np.testing.assert_allclose(getattr(moved, method)(X), getattr(there, method)(X), rtol=rtol, atol=rtol)
