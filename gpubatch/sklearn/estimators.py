"""``MLPClassifier`` and ``MLPRegressor`` with scikit-learn's interface, algorithm and random numbers."""

from __future__ import annotations

import dataclasses
import itertools
import math
import numbers
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

try:
    from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.metrics import r2_score
    from sklearn.model_selection import train_test_split
    from sklearn.preprocessing import LabelBinarizer
    from sklearn.utils import check_random_state, column_or_1d, gen_batches
    from sklearn.utils.class_weight import compute_sample_weight
    from sklearn.utils.metaestimators import available_if
    from sklearn.utils.multiclass import type_of_target, unique_labels
    from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data
except ImportError as error:
    raise ImportError(
        f"gpubatch.sklearn needs scikit-learn 1.6, which cannot be imported ({error}): pip install 'gpubatch[sklearn]'"
    ) from error

from gpubatch.backend import get_backend, unmasked
from gpubatch.errors import (
    ArgumentError,
    DTypeError,
    check_bool,
    check_choice,
    check_int,
    check_real,
)
from gpubatch.sklearn.machine import Description, KeptOptimizer, Machine, check_activation, maker_of
from gpubatch.sklearn.training import OrderedEpochs, minimise
from gpubatch.train import LossScale

LEARNING_RATES = ("constant", "invscaling", "adaptive")
SMALLEST_RATE = 1e-6  # at which an adaptive learning rate is not divided any more
DTYPES = (np.float64, np.float32)
NON_FINITE = (
    "Solver produced non-finite parameter weights. The input data may contain large values and need to be preprocessed."
)


class Fitted:
    """The attributes that ``fit`` sets."""

    coefs_: list[np.ndarray]
    intercepts_: list[np.ndarray]
    batch_norm_: list[dict[str, np.ndarray]]
    loss_curve_: list[float]
    validation_scores_: Any  # a list, with early stopping; else None, as scikit-learn has it
    best_validation_score_: Any
    best_loss_: Any
    _best: dict[str, list[Any]] | None


# A dataclass keeps each argument of its constructor in the attribute of its name and does nothing else, which is what
# scikit-learn asks of an estimator.
estimator = dataclasses.dataclass(eq=False, repr=False)


@estimator
class BaseMLP(BaseEstimator, Fitted):
    """Both estimators: scikit-learn's interface to a :class:`~gpubatch.sklearn.machine.Machine`."""

    hidden_layer_sizes: Any = (100,)
    activation: Any = "relu"
    _: dataclasses.KW_ONLY
    solver: str = "adam"
    alpha: float = 0.0001
    batch_size: int | str = "auto"
    learning_rate: Any = "constant"
    learning_rate_init: float = 0.001
    power_t: float = 0.5
    max_iter: int = 200
    shuffle: bool = True
    random_state: Any = None
    tol: float = 1e-4
    verbose: bool | int = False
    warm_start: bool = False
    momentum: float = 0.9
    nesterovs_momentum: bool = True
    early_stopping: bool = False
    validation_fraction: float = 0.1
    beta_1: float = 0.9
    beta_2: float = 0.999
    epsilon: float = 1e-8
    n_iter_no_change: float = 10
    max_fun: int = 15000
    optimizer: Any = None
    batch_norm: bool = False
    dropout: float = 0.0
    backend: str = "cpu"
    dtype: Any = None
    precision: str = "full"

    # --- what the two differ in ---

    def _targets(self, y: Any, incremental: bool) -> np.ndarray:
        """y as the network takes it."""
        raise NotImplementedError

    def _score_of(self, scores: np.ndarray, Y: np.ndarray, weight: np.ndarray | None) -> float:
        """The score for early stopping, of the network's scores."""
        raise NotImplementedError

    # --- training ---

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Any:
        """Train on X ``(samples, features)``, dense or sparse, and y; returns the estimator.

        sample_weight: what each sample counts, ``(samples,)``, not negative
        """
        return self._fit(X, y, sample_weight, incremental=False)

    def _fit(self, X: Any, y: Any, sample_weight: Any, incremental: bool) -> Any:
        self._check_parameters()
        hidden = self._hidden()
        if incremental and self.early_stopping:
            raise ValueError("partial_fit does not support early_stopping=True")
        first = not hasattr(self, "coefs_") or not (self.warm_start or incremental)
        X, y = self._validated(X, y, first)
        usual = "float32" if self.precision == "mixed" else X.dtype
        dtype = np.dtype(self.dtype or usual) if first else self.coefs_[0].dtype
        Y = self._targets(y, incremental)
        Y = Y if Y.ndim == 1 else np.ascontiguousarray(Y, dtype)
        weight = self._weights(X, y, sample_weight, incremental)
        self.n_outputs_ = len(self.classes_) if Y.ndim == 1 else Y.shape[1]
        random = check_random_state(self.random_state)
        sizes = (X.shape[1], *hidden, self.n_outputs_)
        if first:
            self._initialise(sizes, random, dtype)
        elif [W.shape for W in self.coefs_] != list(itertools.pairwise(sizes)):
            raise ValueError(
                f"the network has layers of {self._sizes()} numbers, these data and "
                f"hidden_layer_sizes={self.hidden_layer_sizes!r} need {sizes}; fit with warm_start=False"
            )
        X = X.tocsr() if hasattr(X, "tocsr") else X
        with np.errstate(over="ignore"):
            X = X.astype(dtype, copy=False)
        machine = self._machine()
        try:
            if self._by_batches():
                self._train(machine, X, Y, weight, random, incremental)
            else:
                self._minimise(machine, X, Y, weight)
        finally:
            self._show(machine)
        if not all(np.isfinite(array).all() for array in (*self.coefs_, *self.intercepts_)):
            raise ValueError(NON_FINITE)
        return self

    def _initialise(self, sizes: Sequence[int], random: Any, dtype: Any) -> None:
        """First weights and biases, uniform as scikit-learn draws them (Glorot & Bengio 2010), and empty records."""
        self.n_iter_, self.t_, self.n_layers_ = 0, 0, len(sizes)
        self.out_activation_ = self._output_activation()
        self.coefs_, self.intercepts_, self.batch_norm_ = [], [], []
        for i, (inputs, outputs) in enumerate(itertools.pairwise(sizes)):
            bound = math.sqrt((2 if self.activation in ("logistic", "sigmoid") else 6) / (inputs + outputs))
            W = random.uniform(-bound, bound, (inputs, outputs))
            b = random.uniform(-bound, bound, outputs)
            if self.batch_norm and i < len(sizes) - 2:
                b = np.zeros(outputs)
                self.batch_norm_.append({"scale": np.ones(outputs), "mean": np.zeros(outputs), "var": np.ones(outputs)})
            self.coefs_.append(W.astype(dtype))
            self.intercepts_.append(b.astype(dtype))
        self._seed = int(random.randint(2**31)) if self.dropout else 0
        self._best = None
        if not self._by_batches():
            return
        self.loss_curve_ = []
        self._no_improvement_count = 0
        self.validation_scores_ = [] if self.early_stopping else None
        self.best_validation_score_ = -np.inf if self.early_stopping else None
        self.best_loss_ = None if self.early_stopping else np.inf

    def _train(
        self, machine: Machine, X: Any, Y: np.ndarray, weight: np.ndarray | None, random: Any, incremental: bool
    ) -> None:
        if not incremental or not hasattr(self, "_optimizer"):
            self._optimizer = KeptOptimizer(self._make_optimizer(), LossScale() if machine.mixed else None)
        opt = self._optimizer.bind(machine.net.parameters)
        rows, held_out = self._split(len(Y), Y, random)
        batches = self._batches(len(rows), machine.core.least_rows)
        epochs = OrderedEpochs(machine, opt, X, Y, weight, self.alpha, self._optimizer.scale)
        validation = None
        if held_out is not None:
            validation = X[held_out], Y[held_out], None if weight is None else weight[held_out]
        best = None
        order = np.arange(len(rows))
        scheduled = callable(self.learning_rate)
        self.n_iter_ = 0
        try:
            for _ in range(1 if incremental else self.max_iter):
                if self.shuffle:  # as sklearn.utils.shuffle does, without its checks of arguments
                    drawn = np.arange(len(rows))
                    random.shuffle(drawn)
                    order = order[drawn]
                if scheduled:
                    opt.epoch = len(self.loss_curve_)
                self.loss_ = epochs.make(rows[order], batches) / len(rows)
                self.n_iter_ += 1
                self.t_ += len(rows)
                self.loss_curve_.append(self.loss_)
                if self.verbose:
                    print(f"Iteration {self.n_iter_}, loss = {self.loss_:.8f}")
                if self._judge(machine, validation):
                    best = machine.remember()
                if self.learning_rate == "invscaling" and self._decays():
                    opt.lr = self.learning_rate_init / (self.t_ + 1) ** self.power_t
                if not math.isfinite(self.loss_) and not incremental:
                    break  # no later step brings the weights back
                if self._no_improvement_count > self.n_iter_no_change:
                    if self._stops(opt):
                        break
                    self._no_improvement_count = 0
                if not incremental and self.n_iter_ == self.max_iter:
                    warnings.warn(
                        f"Stochastic Optimizer: Maximum iterations ({self.max_iter}) reached and the optimization "
                        "hasn't converged yet.",
                        ConvergenceWarning,
                        stacklevel=4,
                    )
        except KeyboardInterrupt:
            warnings.warn("Training interrupted by user.", stacklevel=4)
        if self.early_stopping and not incremental:
            if best is not None:
                machine.recall(best)
                self._best = machine.copies() if self.warm_start else None
            elif kept := getattr(self, "_best", None):
                machine.load(kept)

    def _minimise(self, machine: Machine, X: Any, Y: np.ndarray, weight: np.ndarray | None) -> None:
        options = {"maxfun": self.max_fun, "maxiter": self.max_iter, "gtol": self.tol}
        found, self.loss_ = minimise(machine, X, Y, weight, self.alpha, options)
        self.n_iter_ = min(found.nit, self.max_iter)
        if self.verbose:
            print(f"Iteration {self.n_iter_}, loss = {self.loss_:.8f}")
        if found.status != 0:
            warnings.warn(
                f"lbfgs failed to converge after {found.nit} iteration(s) (status={found.status}): {found.message}; "
                f"raise max_iter={self.max_iter} or max_fun={self.max_fun}, or scale the data",
                ConvergenceWarning,
                stacklevel=4,
            )

    def _by_batches(self) -> bool:
        """Whether an update rule trains by mini-batches, and not L-BFGS on all samples."""
        return self.solver != "lbfgs" or self.optimizer is not None

    def _judge(self, machine: Machine, validation: tuple[Any, np.ndarray, np.ndarray | None] | None) -> bool:
        """Note whether the epoch improved on the best so far; True where its parameters are the best validated."""
        if validation is None:
            improved = not self.loss_ > self.best_loss_ - self.tol
            self._no_improvement_count = 0 if improved else self._no_improvement_count + 1
            self.best_loss_ = min(self.best_loss_, self.loss_)
            return False
        X, Y, weight = validation
        scores = machine.scores(X)
        score = self._score_of(scores, Y, weight) if np.isfinite(scores).all() else math.nan
        self.validation_scores_.append(score)
        if self.verbose:
            print(f"Validation score: {score:f}")
        improved = not score < self.best_validation_score_ + self.tol
        self._no_improvement_count = 0 if improved else self._no_improvement_count + 1
        if not score > self.best_validation_score_:
            return False
        self.best_validation_score_ = score
        return True

    def _stops(self, opt: Any) -> bool:
        """Whether training that does not improve any more ends; else the learning rate has been divided by 5."""
        what = "Validation score" if self.early_stopping else "Training loss"
        text = f"{what} did not improve more than tol={self.tol:f} for {self.n_iter_no_change} consecutive epochs."
        adaptive = self.learning_rate == "adaptive" and self._decays()
        stops = not adaptive or opt.lr <= SMALLEST_RATE
        if not stops:
            opt.lr = opt.lr / 5
        if self.verbose:
            then = f"Setting learning rate to {opt.lr:f}" if not stops else "Stopping."
            print(text, f"Learning rate too small. {then}" if adaptive and stops else then)
        return stops

    def _decays(self) -> bool:
        """Whether ``learning_rate`` counts: scikit-learn's Adam ignores it."""
        return self.solver == "sgd" or self.optimizer is not None

    def _split(self, n: int, Y: np.ndarray, random: Any) -> tuple[np.ndarray, np.ndarray | None]:
        """The rows that are trained on, and those that early stopping holds out, as scikit-learn draws them."""
        if not self.early_stopping:
            return np.arange(n), None
        binary = self.out_activation_ == "logistic" and self.n_outputs_ == 1
        rows, held_out = train_test_split(
            np.arange(n),
            random_state=random,
            test_size=self.validation_fraction,
            stratify=Y.astype(bool) if binary else None,
        )
        if len(held_out) < 2:
            raise ValueError(
                "The validation set is too small. Increase 'validation_fraction' or the size of your dataset."
            )
        return rows, held_out

    def _batches(self, n: int, least: int) -> list[slice]:
        size = 200 if self.batch_size == "auto" else int(self.batch_size)
        if size > n and self.batch_size != "auto":
            warnings.warn(
                "Got `batch_size` less than 1 or larger than sample size. It is going to be clipped", stacklevel=5
            )
        if n < least:
            raise ValueError(f"batch_norm=True needs at least {least} samples, got n_samples = {n}")
        return list(gen_batches(n, max(min(size, n), least), min_batch_size=least if least > 1 else 0))

    def _weights(self, X: Any, y: Any, sample_weight: Any, incremental: bool) -> np.ndarray | None:
        """The weights of the samples in the loss; None if all count alike."""
        if sample_weight is None:
            return None
        weight: np.ndarray = _check_sample_weight(sample_weight, X, dtype=np.float64, ensure_non_negative=True)
        if not weight.any():
            raise ValueError("sample_weight must have a weight above 0, all are 0")
        return weight

    # --- the network ---

    def _sizes(self) -> tuple[int, ...]:
        return (self.coefs_[0].shape[0], *(W.shape[1] for W in self.coefs_))

    def _machine(self) -> Machine:
        """The network with the estimator's parameters; it is made again where they, or what decides it, changed."""
        live: Machine | None = vars(self).get("_live")
        about = Description(
            self._sizes(),
            self.activation,
            self.out_activation_,
            self.batch_norm,
            float(self.dropout),
            self.alpha > 0,
            get_backend(self.backend).spec,
            self.coefs_[0].dtype.name,
            self.precision,
        )
        own = self.coefs_, self.intercepts_, getattr(self, "batch_norm_", [])
        if live is None or live.about != about or not live.has(*own):
            if live is None or live.about != about:
                live = Machine(about, getattr(self, "_seed", 0))
            live.load(dict(zip(("coefs_", "intercepts_", "batch_norm_"), own, strict=True)))
            self._live = live
            self._show(live)
        return live

    def _show(self, machine: Machine) -> None:
        """Take the parameters of the network for the estimator's."""
        for name, arrays in machine.parameters().items():
            setattr(self, name, arrays)

    def _make_optimizer(self) -> Callable[..., Any]:
        adam = {"beta1": self.beta_1, "beta2": self.beta_2, "eps": self.epsilon}
        lr = self.learning_rate if callable(self.learning_rate) else self.learning_rate_init
        mixed = self.precision == "mixed"
        return maker_of(self.optimizer, self.solver, lr, self.momentum, self.nesterovs_momentum, adam, mixed)

    def _scores(self, X: Any) -> np.ndarray:
        """The outputs of the last layer."""
        check_is_fitted(self)
        X = validate_data(self, unmasked("X", X), accept_sparse=["csr", "csc"], dtype=DTYPES, reset=False)
        return self._machine().scores(X.tocsr() if hasattr(X, "tocsr") else X)

    # --- arguments ---

    def _validated(self, X: Any, y: Any, first: bool) -> tuple[Any, Any]:
        X, y = validate_data(
            self,
            unmasked("X", X),
            unmasked("y", y),
            accept_sparse=["csr", "csc"],
            multi_output=True,
            y_numeric=isinstance(self, RegressorMixin),
            dtype=DTYPES,
            reset=first,
        )
        if y.ndim == 2 and y.shape[1] == 1:
            y = column_or_1d(y, warn=True)
        return X, y

    def _hidden(self) -> tuple[int, ...]:
        """The sizes of the hidden layers."""
        given = self.hidden_layer_sizes
        given = given if hasattr(given, "__iter__") else [given]
        sizes = []
        for size in given:
            if isinstance(size, bool) or not isinstance(size, numbers.Integral) or size < 1:
                raise ArgumentError(f"hidden_layer_sizes must be integers > 0, got {self.hidden_layer_sizes!r}")
            sizes.append(int(size))
        return tuple(sizes)

    def _check_parameters(self) -> None:
        check_activation(self.activation)
        check_choice("solver", self.solver, ["lbfgs", "sgd", "adam"])
        if not callable(self.learning_rate):
            check_choice("learning_rate", self.learning_rate, LEARNING_RATES)
        if self.batch_size != "auto":
            check_int("batch_size", self.batch_size, 1)
        for name in ("shuffle", "warm_start", "nesterovs_momentum", "early_stopping", "batch_norm"):
            if not isinstance(getattr(self, name), (bool, np.bool_)):
                check_bool(name, getattr(self, name))
        for name in ("alpha", "power_t", "tol"):
            check_real(name, getattr(self, name), 0)
        for name in ("learning_rate_init", "epsilon"):
            check_real(name, getattr(self, name), 0, open_low=True)
        for name in ("momentum", "beta_1", "beta_2", "dropout"):
            check_real(name, getattr(self, name), 0, 1, open_high=True)
        check_real("validation_fraction", self.validation_fraction, 0, 1, open_high=True)
        check_int("max_iter", self.max_iter, 1)
        check_int("max_fun", self.max_fun, 1)
        if self.n_iter_no_change != math.inf:
            check_int("n_iter_no_change", self.n_iter_no_change, 1)
        if self.dtype is not None and np.dtype(self.dtype) not in DTYPES:
            raise DTypeError(f"dtype must be 'float32', 'float64' or None, got {self.dtype!r}")
        check_choice("precision", self.precision, ["full", "fast", "mixed"])
        if self.precision == "mixed" and self.dtype is not None and np.dtype(self.dtype) != np.float32:
            raise ArgumentError(f"dtype must be 'float32' or None with precision='mixed', got {self.dtype!r}")
        if self.precision == "mixed" and not self._by_batches():
            raise ArgumentError("solver='lbfgs' takes precision 'full' or 'fast', got 'mixed': choose 'adam' or 'sgd'")
        if not self._by_batches() and (self.batch_norm or self.dropout):
            raise ArgumentError("solver='lbfgs' takes neither batch_norm nor dropout: choose 'adam' or 'sgd'")
        self._make_optimizer()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in BaseEstimator.__getstate__(self).items() if name != "_live"}

    def __sklearn_tags__(self) -> Any:
        tags = BaseEstimator.__sklearn_tags__(self)
        tags.input_tags.sparse = True
        return tags

    def _output_activation(self) -> str:
        raise NotImplementedError


def has_partial_fit(estimator: BaseMLP) -> bool:
    """Whether training goes by batches; otherwise an AttributeError says why not."""
    if not estimator._by_batches():
        raise AttributeError("partial_fit is only available for stochastic optimizers. lbfgs is not stochastic.")
    return True


@estimator
class MLPClassifier(ClassifierMixin, BaseMLP):
    """scikit-learn's ``MLPClassifier``, trained by gpubatch: softmax or, with two classes or several labels, sigmoid.

    hidden_layer_sizes: the sizes of the hidden layers, an integer or several; () for none.
    activation: of hidden layers: "identity", "logistic", "tanh" or "relu", another name of :func:`gpubatch.mlp`'s, or a
        function made with :func:`gpubatch.activation`.
    solver: "adam", "sgd", or "lbfgs": SciPy's L-BFGS-B on all samples at once, for small sets.
    alpha: the weight of the l2 term alpha/2 Σ W², over the batch's samples.
    batch_size: "auto": at most 200.
    learning_rate: "constant", "invscaling" or "adaptive", which count with solver "sgd" or ``optimizer``; or a schedule
        of gpubatch's, such as ``gb.CosineDecay(1e-3, total=50, per="epoch")``.
    learning_rate_init, power_t, momentum, nesterovs_momentum, beta_1, beta_2, epsilon: as scikit-learn has them.
    max_iter, tol, n_iter_no_change: train for ``max_iter`` epochs, or until ``n_iter_no_change`` of them in a row did
        not improve the loss, or with early stopping the score, by ``tol``.
    shuffle, random_state, verbose, warm_start, max_fun: as scikit-learn has them.
    early_stopping: keep ``validation_fraction`` of the samples apart, and the parameters that score best on them.
    class_weight: what samples of each class count: "balanced", or a dictionary {label: weight}.
    optimizer: another update rule than the solver's: a name such as "AdamW", a rule made with :func:`gpubatch.rule`, or
        what makes an optimizer of parameters: ``functools.partial(gb.AdamW, weight_decay=0.1)``. Without a learning
        rate of its own it has ``learning_rate_init``.
    batch_norm: whether a normalisation stands before each activation. ``intercepts_`` of hidden layers are added after
        it, and ``batch_norm_`` has its other parameters. A last batch of one sample joins the one before.
    dropout: the rate of dropout after each activation.
    backend: the device: "cpu", "cuda", "cuda:1", or "auto". On a GPU the samples are copied there once, and steps are
        captured as CUDA graphs where they can be.
    dtype: "float32" or "float64"; None: that of X, as scikit-learn. Products of float32 take half the time.
    precision: "fast" lets a GPU multiply float32 as TF32; "mixed" stores X, parameters and gradients as float16, keeps
        float32 parameters beside them and scales the loss, see :class:`gpubatch.Network`. Then ``coefs_`` are copies in
        float32, and an ``optimizer`` that is a function of your own passes ``master_weights=True`` itself.

    **Attributes** are scikit-learn's: ``coefs_``, ``intercepts_``, ``loss_``, ``loss_curve_``, ``best_loss_``,
    ``validation_scores_``, ``best_validation_score_``, ``n_iter_``, ``t_``, ``n_layers_``, ``n_outputs_``,
    ``out_activation_``, ``n_features_in_``, ``feature_names_in_``, ``classes_``. On a CPU ``coefs_`` and
    ``intercepts_`` are the network's own memory: a change in place counts. An estimator is pickled with its parameters
    and the optimizer's state, without the memory that training works in.

    Where all weights of a batch are 0 it is left out; scikit-learn raises there. A loss that is not finite ends
    training: with early stopping the best parameters are put back, else ValueError is raised.

    >>> X, y = [[0.0, 0.0], [1.0, 1.0], [0.0, 1.0], [1.0, 0.0]], ["same", "same", "other", "other"]
    >>> MLPClassifier((8,), solver="lbfgs", random_state=0).fit(X, y).predict(X).tolist()
    ['same', 'same', 'other', 'other']
    """

    class_weight: Any = dataclasses.field(default=None, kw_only=True)

    @available_if(has_partial_fit)
    def partial_fit(self, X: Any, y: Any, sample_weight: Any = None, classes: Any = None) -> Any:
        """Train for one epoch, and go on from the parameters there are; returns the estimator.

        classes: all labels that any call will have; the first call needs them
        """
        if classes is None and not hasattr(self, "classes_"):
            raise ValueError("classes must be passed on the first call to partial_fit.")
        if classes is not None and hasattr(self, "classes_"):
            if not np.array_equal(self.classes_, unique_labels(classes)):
                raise ValueError(
                    f"`classes={classes!r}` is not the same as on last call to partial_fit, was: {self.classes_!r}"
                )
        elif classes is not None:
            multilabel = type_of_target(y).startswith("multilabel")
            self._learn_classes(y if multilabel else classes)
        return self._fit(X, y, sample_weight, incremental=True)

    def predict(self, X: Any) -> np.ndarray:
        """The labels of samples, ``(samples,)``; a matrix of 0 and 1 where there are several for each."""
        return self._labels(self._scores(X))

    def predict_proba(self, X: Any) -> np.ndarray:
        """The probability of each of ``classes_``, ``(samples, classes)``."""
        scores = self._scores(X)
        found = self._machine().probabilities(scores)
        return np.hstack([1 - found, found]) if self.n_outputs_ == 1 else found

    def predict_log_proba(self, X: Any) -> np.ndarray:
        """The logarithms of :meth:`predict_proba`."""
        with np.errstate(divide="ignore"):
            found: np.ndarray = np.log(self.predict_proba(X))
        return found

    def _labels(self, scores: np.ndarray) -> np.ndarray:
        if self.out_activation_ == "softmax":
            best: np.ndarray = self.classes_[scores.argmax(axis=1)]
            return best
        positive = (scores > 0).astype(np.float64)
        labels: np.ndarray = self._label_binarizer.inverse_transform(
            positive.ravel() if self.n_outputs_ == 1 else positive
        )
        return labels

    def _learn_classes(self, y: Any) -> None:
        self._label_binarizer = LabelBinarizer().fit(y)
        self.classes_ = self._label_binarizer.classes_

    def _targets(self, y: Any, incremental: bool) -> np.ndarray:
        if not hasattr(self, "classes_") or not (self.warm_start or incremental):
            self._learn_classes(y)
        else:
            classes = unique_labels(y)
            if self.warm_start and set(classes) != set(self.classes_):
                raise ValueError(
                    "warm_start can only be used where `y` has the same classes as in the previous call to fit. "
                    f"Previously got {self.classes_}, `y` has {classes}"
                )
            if len(np.setdiff1d(classes, self.classes_, assume_unique=True)):
                raise ValueError(
                    f"`y` has classes not in `self.classes_`. `self.classes_` has {self.classes_}. 'y' has {classes}."
                )
        if self._label_binarizer.y_type_ == "multiclass":
            places: np.ndarray = np.searchsorted(self.classes_, y).astype(np.int64)
            return places
        found: np.ndarray = self._label_binarizer.transform(y)
        return found

    def _weights(self, X: Any, y: Any, sample_weight: Any, incremental: bool) -> np.ndarray | None:
        weight = BaseMLP._weights(self, X, y, sample_weight, incremental)
        if self.class_weight is None:
            return weight
        if incremental and self.class_weight == "balanced":
            raise ValueError(
                "class_weight 'balanced' needs all labels, and partial_fit has some: give the weights as a dictionary"
            )
        of_classes = compute_sample_weight(self.class_weight, y)
        if not (of_classes >= 0).all():
            raise ValueError(f"class_weight must have weights >= 0, got {self.class_weight}")
        found: np.ndarray = of_classes if weight is None else weight * of_classes
        return found

    def _output_activation(self) -> str:
        return "softmax" if self._label_binarizer.y_type_ == "multiclass" else "logistic"

    def _score_of(self, scores: np.ndarray, Y: np.ndarray, weight: np.ndarray | None) -> float:
        right = scores.argmax(axis=1) == Y if Y.ndim == 1 else ((scores > 0) == (Y > 0)).all(axis=1)
        return float(np.average(right, weights=weight))

    def __sklearn_tags__(self) -> Any:
        tags = ClassifierMixin.__sklearn_tags__(self)
        tags.classifier_tags.multi_label = True
        return tags


@estimator
class WithLoss:
    """The first argument of a regressor, as scikit-learn has it: fields of the last base come first."""

    loss: str = "squared_error"


@estimator
class MLPRegressor(RegressorMixin, BaseMLP, WithLoss):
    """scikit-learn's ``MLPRegressor``, trained by gpubatch, for one target or several.

    loss: "squared_error", or "poisson" for counts and rates, whose logarithms the network then computes.
    hidden_layer_sizes: the sizes of the hidden layers, an integer or several; () for none.
    activation: of hidden layers: "identity", "logistic", "tanh" or "relu", another name of :func:`gpubatch.mlp`'s, or a
        function made with :func:`gpubatch.activation`.
    solver: "adam", "sgd", or "lbfgs": SciPy's L-BFGS-B on all samples at once, for small sets.
    alpha: the weight of the l2 term alpha/2 Σ W², over the batch's samples.
    batch_size: "auto": at most 200.
    learning_rate: "constant", "invscaling" or "adaptive", which count with solver "sgd" or ``optimizer``; or a schedule
        of gpubatch's, such as ``gb.CosineDecay(1e-3, total=50, per="epoch")``.
    learning_rate_init, power_t, momentum, nesterovs_momentum, beta_1, beta_2, epsilon: as scikit-learn has them.
    max_iter, tol, n_iter_no_change: train for ``max_iter`` epochs, or until ``n_iter_no_change`` of them in a row did
        not improve the loss, or with early stopping the score, by ``tol``.
    shuffle, random_state, verbose, warm_start, max_fun: as scikit-learn has them.
    early_stopping: keep ``validation_fraction`` of the samples apart, and the parameters that score best on them.
    optimizer: another update rule than the solver's: a name such as "AdamW", a rule made with :func:`gpubatch.rule`, or
        what makes an optimizer of parameters: ``functools.partial(gb.AdamW, weight_decay=0.1)``. Without a learning
        rate of its own it has ``learning_rate_init``.
    batch_norm: whether a normalisation stands before each activation. ``intercepts_`` of hidden layers are added after
        it, and ``batch_norm_`` has its other parameters. A last batch of one sample joins the one before.
    dropout: the rate of dropout after each activation.
    backend: the device: "cpu", "cuda", "cuda:1", or "auto". On a GPU the samples are copied there once, and steps are
        captured as CUDA graphs where they can be.
    dtype: "float32" or "float64"; None: that of X, as scikit-learn. Products of float32 take half the time.
    precision: "fast" lets a GPU multiply float32 as TF32; "mixed" stores X, parameters and gradients as float16, keeps
        float32 parameters beside them and scales the loss, see :class:`gpubatch.Network`. Then ``coefs_`` are copies in
        float32, and an ``optimizer`` that is a function of your own passes ``master_weights=True`` itself.

    **Attributes** are scikit-learn's: ``coefs_``, ``intercepts_``, ``loss_``, ``loss_curve_``, ``best_loss_``,
    ``validation_scores_``, ``best_validation_score_``, ``n_iter_``, ``t_``, ``n_layers_``, ``n_outputs_``,
    ``out_activation_``, ``n_features_in_``, ``feature_names_in_``. On a CPU ``coefs_`` and
    ``intercepts_`` are the network's own memory: a change in place counts. An estimator is pickled with its parameters
    and the optimizer's state, without the memory that training works in.

    Where all weights of a batch are 0 it is left out; scikit-learn raises there. A loss that is not finite ends
    training: with early stopping the best parameters are put back, else ValueError is raised.
    """

    @available_if(has_partial_fit)
    def partial_fit(self, X: Any, y: Any, sample_weight: Any = None) -> Any:
        """Train for one epoch, and go on from the parameters there are; returns the estimator."""
        return self._fit(X, y, sample_weight, incremental=True)

    def predict(self, X: Any) -> np.ndarray:
        """The numbers predicted, ``(samples,)``, or ``(samples, outputs)`` where there are several."""
        return self._predicted(self._scores(X))

    def _predicted(self, scores: np.ndarray) -> np.ndarray:
        found = np.exp(scores) if self.out_activation_ == "exp" else scores
        return found.ravel() if found.shape[1] == 1 else found

    def _targets(self, y: Any, incremental: bool) -> np.ndarray:
        if self.loss == "poisson" and (y < 0).any():
            raise ValueError(f"loss='poisson' needs y >= 0, got {y.min()}")
        found: np.ndarray = y.reshape(len(y), -1)
        return found

    def _output_activation(self) -> str:
        return "exp" if self.loss == "poisson" else "identity"

    def _check_parameters(self) -> None:
        check_choice("loss", self.loss, ["squared_error", "poisson"])
        BaseMLP._check_parameters(self)

    def _score_of(self, scores: np.ndarray, Y: np.ndarray, weight: np.ndarray | None) -> float:
        predicted = self._predicted(scores)
        if not np.isfinite(predicted).all():
            return math.nan
        return float(r2_score(Y, predicted, sample_weight=weight))

    def __sklearn_tags__(self) -> Any:
        tags = RegressorMixin.__sklearn_tags__(self)
        tags.target_tags.multi_output = True
        return tags
