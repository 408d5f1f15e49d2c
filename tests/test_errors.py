"""Every exception and warning of gpubatch survives the way between two processes."""

from __future__ import annotations

import concurrent.futures
import copy
import multiprocessing
import pickle
from collections.abc import Callable

import pytest

import gpubatch as gb
from gpubatch import errors
from gpubatch.train import History, TrainingInterrupted, TrainingTerminated

CAUSE = "no device", "plug one in."
MADE: dict[type[BaseException], tuple[object, ...]] = {
    errors.BackendUnavailableError: ("none.", *CAUSE),
    TrainingInterrupted: ("stopped", History(loss=[0.5])),
    TrainingTerminated: ("stopped", History(loss=[0.5])),
}


EVERY: list[type[BaseException]] = [
    *(getattr(errors, name) for name in errors.__all__),
    *(TrainingInterrupted, TrainingTerminated, gb.StopTraining),
]


@pytest.mark.parametrize("kind", EVERY, ids=lambda kind: kind.__name__)
def test_an_error_is_pickled_and_copied(kind: type[BaseException]) -> None:
    error = kind(*MADE.get(kind, ("what is wrong",)))
    for twin in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(twin) is kind
        assert (str(twin), twin.args, vars(twin)) == (str(error), error.args, vars(error))


@pytest.mark.parametrize(
    ("make", "meant"),
    [
        (lambda: gb.mlp([2, 2], loss="binary_crossentropy"), "sigmoid_cross_entropy"),
        (lambda: gb.mlp([2, 2], loss="squared_error"), "mse"),
        (lambda: gb.mlp([2, 2], loss="MSE"), "mse"),
        (lambda: gb.mlp([2, 2, 2], activation="ReLU"), "relu"),
        (lambda: gb.mlp([2, 2], init="glorot_uniform"), "xavier_uniform"),
        (lambda: gb.get_backend("gpu"), "cuda"),
        (lambda: gb.get_backend("CPU"), "cpu"),
        (lambda: gb.metrics.measure(gb.mlp([2, 2]), [[1.0, 2.0]], [0], metrics=["F1"]), "f1"),
    ],
    ids=range(8),
)
def test_what_has_another_name_elsewhere_is_found(make: Callable[[], object], meant: str) -> None:
    with pytest.raises(errors.ArgumentError, match=f"; did you mean '{meant}'\\?$"):
        make()


@pytest.mark.parametrize(
    ("given", "meant"), [("learning_rate", "lr"), ("epsilon", "eps"), ("alpha", "rho"), ("beta_1", "beta1")]
)
def test_the_name_that_another_library_has_is_translated(given: str, meant: str) -> None:
    with pytest.raises(errors.UnknownArgumentError, match=f"got '{given}'; did you mean '{meant}'\\?$"):
        errors.check_known("the rule", [given], ["lr", "eps", "rho", "beta1", "beta2"])


def unavailable() -> None:
    raise gb.BackendUnavailableError("none.", *CAUSE)


def test_a_pool_of_processes_raises_the_error_itself() -> None:
    context = multiprocessing.get_context("spawn")
    with (
        concurrent.futures.ProcessPoolExecutor(1, context) as pool,
        pytest.raises(gb.BackendUnavailableError, match=r"^none\. Remedy: plug one in\.$") as raised,
    ):
        pool.submit(unavailable).result(timeout=60)
    assert raised.value.cause == "no device"
