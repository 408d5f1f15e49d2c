"""Every exception and warning of gpubatch survives the way between two processes."""

from __future__ import annotations

import concurrent.futures
import copy
import multiprocessing
import pickle
from collections.abc import Callable

import numpy as np
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
    *(x for x in vars(errors).values() if isinstance(x, type) and issubclass(x, (errors.GpubatchError, Warning))),
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


X, Y = np.ones((4, 2), np.float32), np.array([0, 1, 0, 1])


def network() -> gb.Network:
    return gb.mlp([2, 2], backend="cpu")


# What people try first who know another library, and the remedy that the message has.
TRIED: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "an activation too much": (lambda: gb.mlp([2, 2], activations="relu"), TypeError, "did you mean 'activation'"),  # type: ignore[call-arg]
    "Keras' validation": (
        lambda: gb.fit(network(), None, None, validation_data=(X, Y)),  # type: ignore[arg-type, call-arg]
        errors.UnknownArgumentError,
        r"^fit takes net, loader, .*; got 'validation_data'; did you mean 'validation'\?$",
    ),
    "a loader's argument": (lambda: gb.Loader(X, Y, batchsize=2), TypeError, "did you mean 'batch_size'"),  # type: ignore[call-arg]
    "Keras' units": (lambda: gb.Dense(2, units=3), TypeError, "^Dense takes inputs, .* did you mean 'outputs'"),  # type: ignore[call-arg]
    "best weights": (lambda: gb.EarlyStopping(restore_best_weights=True), TypeError, "mean 'restore_best'"),  # type: ignore[call-arg]
    "momentum": (lambda: gb.SGD(network().parameters, 0.1, momentum=0.9), TypeError, r"gb.HeavyBall\(params, lr, mu="),
    "groups as dictionaries": (
        lambda: gb.Adam([{"params": [X]}]),
        errors.DTypeError,
        "groups= has the settings of some by name",
    ),
    "PyTorch's layer": (lambda: gb.Linear(2, 2), AttributeError, "did you mean 'Dense'"),  # type: ignore[attr-defined]
    "PyTorch's clipping": (
        lambda: gb.clip_by_global_norm(network().parameters, 1.0),
        errors.ArgumentError,
        "grads must be gradients, got the Parameters themselves: give params.grads",
    ),
    "PyTorch's order of saving": (
        lambda: gb.save(network(), "m.safetensors"),  # type: ignore[arg-type]
        errors.DTypeError,
        r"got a Network: write gb.save\(path, net\)",
    ),
    "shared layers": (
        lambda: gb.Network([layer := gb.Dense(2, 2), gb.ReLU(), layer]),
        errors.ArgumentError,
        "the same Dense twice, and no two places share parameters",
    ),
    "a class for a layer": (
        lambda: gb.Network([gb.Dense(2, 2), gb.ReLU]),  # type: ignore[list-item]
        errors.DTypeError,
        r"layer 2 is .*: write ReLU\(...\)",
    ),
    "images": (
        lambda: network().predict(np.ones((4, 1, 2), np.float32)),
        errors.ShapeError,
        r"images in rows are X.reshape\(len\(X\), -1\)",
    ),
    "a loader for an array": (
        lambda: network().predict(gb.Loader(X, Y)),
        errors.DTypeError,
        r"got a Loader, .*: gb.metrics.measure\(net, loader\)",
    ),
    "complex numbers": (
        lambda: gb.Loader(X * 1j, Y),
        errors.DTypeError,
        r"np.concatenate\(\[X.real, X.imag\], axis=-1\)",
    ),
    "times": (
        lambda: gb.Loader(np.zeros((4, 2), "datetime64[s]"), Y),
        errors.DTypeError,
        r"days are \(X - X.min\(\)\) / np.timedelta64",
    ),
    "long doubles": (lambda: gb.Loader(X.astype(np.longdouble), Y), errors.DTypeError, r"give X.astype\('float64'\)"),
    "objects": (lambda: gb.Loader(X.astype(object), Y), errors.DTypeError, r"objects that are numbers X.astype"),
    "no scale": (lambda: gb.Loader(X, Y, scale=0), errors.ArgumentError, "scale must not be 0"),
}


@pytest.mark.parametrize("name", TRIED)
def test_what_people_try_first_is_told_with_its_remedy(name: str) -> None:
    call, kind, message = TRIED[name]
    with pytest.raises(kind, match=message):
        call()


def test_a_dataset_of_pytorch_is_told_with_its_remedy() -> None:
    torch = pytest.importorskip("torch")
    data = torch.utils.data.TensorDataset(torch.from_numpy(X), torch.from_numpy(Y))
    with pytest.raises(errors.DTypeError, match=r"got PyTorch's TensorDataset; give its tensors"):
        gb.Loader(data)


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
