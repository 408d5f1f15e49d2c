"""Losses: one number for a batch of scores, and its gradient by them; forward and backward side by side.

Scores are ``(batch, outputs)``; the loss is a mean over the batch, so its size does not depend on the batch size. With
weights w of the samples it is Σ w l / Σ w. Each loss is also a function, ``softmax_cross_entropy(scores, Y) -> (loss,
dscores)``, for use without a network.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from gpubatch.backend import Array, Backend, backend_of, compute_dtype, describe
from gpubatch.errors import (
    ArgumentError,
    DTypeError,
    NonFiniteError,
    ShapeError,
    check_choice,
    check_int,
    check_real,
)
from gpubatch.formula import BoundScoreLoss, ScoreLoss, scores
from gpubatch.nn.needs import Context, Mode
from gpubatch.nn.workspace import Layout, Workspace
from gpubatch.ops import COMPUTE, ArrayProducts, Ops, Space, ops_for
from gpubatch.own import as_written


@as_written
class Loss(ABC):
    """A loss. Subclass it where a ``gb.score_loss`` is not enough, and give an object to ``Network(loss=...)``.

    :meth:`run` writes the loss to ``c.work["loss"]``, an array of one element, and its gradient by the scores z to
    ``c.work["dz"]``; :meth:`workspace` asks for both. Unless ``c.gradient``, dz is scratch. Do not change z or Y.

    least_outputs: how many outputs a network must have at least.
    classifies: whether predictions are right or wrong.
    takes_weights: whether :meth:`run` multiplies the loss and the gradient of each sample by ``c.weights``, where these
        are not None, before it takes the mean. A weight given to a loss that does not is an error.
    name: what checkpoints and messages call it.

        class ScaledHinge(gb.Loss):
            name = "scaled hinge"
            least_outputs = 2

            def workspace(self, outputs): return {"loss": ((1,), None), "dz": ((-1, outputs), None)}
            def check(self, Y, rows, outputs): ...       # shapes and dtypes, no values
            def check_values(self, Y, outputs): ...
            def run(self, z, Y, c): c.work["loss"][...] = ...; c.work["dz"][...] = ...
            def predict(self, z): return z.argmax(axis=1)
            def truth(self, Y, outputs): return Y
    """

    least_outputs = 1
    classifies = True
    takes_weights = False

    @property
    def ignore_label(self) -> int | None:
        """Samples with this label have the weight 0; None for none."""
        return None

    @property
    def name(self) -> str:
        """Its name in checkpoints and messages, with the options that are not the usual ones."""
        known = next((name for name, loss in LOSSES.items() if type(loss) is type(self)), type(self).__name__)
        return known + (f"({listed(self.options())})" if self.options() else "")

    def __init_subclass__(cls) -> None:
        if "run" in vars(cls) and "takes_weights" not in vars(cls):
            cls.takes_weights = False  # another run than the one that says it does
        as_written(cls)

    def __repr__(self) -> str:
        return f"<loss {self.name}>"

    def options(self) -> dict[str, Any]:
        """The arguments of the loss that are not the usual ones, by name."""
        return {}

    @abstractmethod
    def workspace(self, outputs: int) -> Mapping[str, Space]:
        """The arrays that it works in, "loss" and "dz" among them, as (shape, dtype) by name."""

    @abstractmethod
    def check(self, Y: Array, rows: int, outputs: int) -> None:
        """Raise if the shape or dtype of Y does not fit; look at no value."""

    @abstractmethod
    def check_values(self, Y: Array, outputs: int) -> None:
        """Raise if a value of Y is out of range. On a GPU this waits for the device."""

    def nan_marks_bad_labels(self, Y: Array) -> bool:
        """Whether a value of Y out of range makes the loss NaN, so that nobody has to check the values before."""
        return False

    @abstractmethod
    def run(self, z: Array, Y: Array, c: Context) -> None:
        """Write the loss, and the gradient where it is wanted."""

    @abstractmethod
    def predict(self, z: Array) -> Array:
        """The predictions for scores z, as a new array."""

    @abstractmethod
    def truth(self, Y: Array, outputs: int) -> Array:
        """The targets in the form that :meth:`predict` gives, to be compared with it."""

    def each(self, z: Array, Y: Array) -> Array:
        """The losses of single samples ``(batch,)``, or of single scores, as a new array; 0 for an ignored label."""
        raise ArgumentError(f"{self.name} has no losses of single samples: its class needs each(z, Y)")

    def check_probabilities(self) -> None:
        """Raise unless the loss has :meth:`probabilities`."""
        if type(self).probabilities is Loss.probabilities:
            known = "softmax_cross_entropy, kl_divergence, softmax_focal, sigmoid_cross_entropy and focal"
            raise ArgumentError(f"the scores of {self.name} are no probabilities; those of {known} are")

    def probabilities(self, z: Array) -> Array:
        """The probabilities that scores z stand for, as a new array."""
        raise NotImplementedError


class OfOperation(Loss):
    """A loss of gpubatch's, which an operation of the core computes."""

    operation: ClassVar[str]
    usual: ClassVar[Mapping[str, Any]] = {}  # its arguments, with the values that its name does not show

    def options(self) -> dict[str, Any]:
        """See :class:`Loss`."""
        return {name: value for name, usual in self.usual.items() if (value := getattr(self, name)) != usual}

    def workspace(self, outputs: int) -> Mapping[str, Space]:
        """The results, and the operation's scratch."""
        results = {"loss": ((1,), COMPUTE), "dz": ((-1, outputs), None)}
        return {**results, **getattr(Ops, self.operation).scratch(outputs)}


# --- every score for itself -------------------------------------------------------------------------------------------


class OverScores(OfOperation):
    """The mean of a loss of single scores over all elements, declared with :func:`gpubatch.score_loss`.

    Y has the shape of the scores, or ``(batch,)`` where there is one output.
    """

    operation = "score_loss"
    classifies = False
    takes_weights = True

    def __init__(self, loss: BoundScoreLoss) -> None:
        self.bound = loss

    @property
    def name(self) -> str:
        """With the values of its parameters."""
        return repr(self.bound)

    def check(self, Y: Array, rows: int, outputs: int) -> None:
        """Y must be real numbers, one for each score."""
        check_targets(Y, rows, outputs)

    def check_values(self, Y: Array, outputs: int) -> None:
        """Accept any number; NaN shows in the loss."""

    def run(self, z: Array, Y: Array, c: Context) -> None:
        """The mean of f(z, y) over the scores, and its gradient."""
        c.ops.score_loss(self.bound, z, Y, c.gradient, c.work, c.weights)

    def predict(self, z: Array) -> Array:
        """The scores themselves; ``(batch,)`` where there is one output, so that ``predict(X) - Y`` is no table."""
        return z[:, 0].copy() if z.shape[1] == 1 else z.copy()

    def each(self, z: Array, Y: Array) -> Array:
        """See :class:`Loss`; one for each score."""
        Y = Y.reshape(z.shape).astype(z.dtype)
        # CuPy's where takes no condition of Python numbers alone.
        parameters = {name: z.dtype.type(value) for name, value in self.bound.parameters.items()}
        return self.bound.declared(z, Y, **parameters)

    def truth(self, Y: Array, outputs: int) -> Array:
        """Refuse: a loss without classes has no right or wrong."""
        raise ArgumentError(
            f"accuracy needs a classification loss, and {self.name} is none; use net.loss(X, Y) instead"
        )


class TwoClasses(OverScores):
    """A loss of scores that are above 0 for yes and below for no, such as sigmoid cross-entropy; Y is in [0, 1]."""

    classifies = True

    def check_values(self, Y: Array, outputs: int) -> None:
        """Targets are probabilities."""
        low, high = Y.min().item(), Y.max().item()
        if not (low >= 0 and high <= 1):
            raise ArgumentError(f"Y must be in [0, 1] for {self.name}, got {high if low >= 0 else low}")

    def predict(self, z: Array) -> Array:
        """1 where the score is above 0, else 0; ``(batch,)`` where there is one output."""
        positive = (z > 0).astype(np.int64)
        return positive[:, 0] if z.shape[1] == 1 else positive

    def truth(self, Y: Array, outputs: int) -> Array:
        """1 where the target is above a half, else 0."""
        positive = (Y > 0.5).astype(np.int64)
        return positive.reshape(-1) if outputs == 1 else positive


class LogOdds(TwoClasses):
    """A loss of scores that are logarithms of odds: σ(z) is the probability of yes."""

    def probabilities(self, z: Array) -> Array:
        """σ(z); ``(batch,)`` where there is one output."""
        small = np.exp(-np.abs(z))
        found = np.where(z < 0, small, 1) / (1 + small)
        return found[:, 0] if z.shape[1] == 1 else found


class SigmoidCrossEntropy(LogOdds):
    """-y log σ(z) - (1 - y) log(1 - σ(z)), mean over all elements; Y holds numbers in [0, 1].

    label_smoothing: from 0 up to 1; the targets are then (1 - label_smoothing) y + label_smoothing/2, as in Keras.

    >>> net = gb.mlp([3, 4, 1], loss=gb.SigmoidCrossEntropy(label_smoothing=0.1), seed=0)
    >>> loss, grads = net.loss_and_grad(np.eye(3, dtype=np.float32), np.array([[0], [1], [1]], np.float32))
    >>> loss > 0
    True
    """

    usual: ClassVar[Mapping[str, Any]] = {"label_smoothing": 0.0}

    def __init__(self, label_smoothing: float = 0.0) -> None:
        self.label_smoothing = checked_smoothing(label_smoothing)
        smoothed = scores.smoothed_sigmoid_cross_entropy.bind(smoothing=self.label_smoothing)
        OverScores.__init__(self, smoothed if self.label_smoothing else scores.sigmoid_cross_entropy.bind())

    @property
    def name(self) -> str:
        """With the options that are not the usual ones."""
        return scores.sigmoid_cross_entropy.name + (f"({listed(self.options())})" if self.options() else "")


class Margin(TwoClasses):
    """A loss of the margin between two classes: Y is 0 or 1 and nothing between."""

    def check_values(self, Y: Array, outputs: int) -> None:
        """Targets are classes."""
        wrong = Y[(Y != 0) & (Y != 1)]
        if wrong.size:
            hint = "; for labels -1 and 1 give Y > 0" if wrong[0] == -1 else ""
            raise ArgumentError(f"Y must be 0 or 1 for {self.name}, got {wrong[0].item()}{hint}")


class Counts(OverScores):
    """A loss of the logarithms of rates, such as poisson; Y is not negative."""

    def check_values(self, Y: Array, outputs: int) -> None:
        """Counts are not negative."""
        if not (low := Y.min().item()) >= 0:
            raise ArgumentError(f"Y must be at least 0 for {self.name}, got {low}")

    def predict(self, z: Array) -> Array:
        """The rates exp(z); ``(batch,)`` where there is one output."""
        rates = np.exp(z)
        return rates[:, 0] if z.shape[1] == 1 else rates


Range = functools.partial(functools.partial, check_real)
# Losses of single scores whose targets, predictions or parameters are not any numbers: the class, and the ranges.
FORMULAS: dict[ScoreLoss, tuple[type[OverScores], dict[str, Callable[[str, float], float]]]] = {
    scores.focal: (LogOdds, {"gamma": Range(low=0), "alpha": Range(high=1)}),
    scores.hinge: (Margin, {}),
    scores.huber: (OverScores, {"delta": Range(low=0, open_low=True)}),
    scores.poisson: (Counts, {}),
    scores.quantile: (OverScores, {"q": Range(low=0, high=1, open_low=True, open_high=True)}),
    scores.sigmoid_cross_entropy: (LogOdds, {}),
    scores.smoothed_sigmoid_cross_entropy: (LogOdds, {"smoothing": Range(low=0, high=1, open_high=True)}),
    scores.squared_hinge: (Margin, {}),
}


def checked_smoothing(value: float) -> float:
    """The argument ``label_smoothing``."""
    return check_real("label_smoothing", value, 0, 1, open_high=True)


def over_scores(bound: BoundScoreLoss) -> OverScores:
    """The loss object of a formula with its parameters, which must be in their ranges."""
    kind, ranges = FORMULAS.get(bound.declared, (OverScores, {}))
    for name, check in ranges.items():
        check(f"{name} of {bound.declared.name}", bound.parameters[name])
    return kind(bound)


# --- one class of many -----------------------------------------------------------------------------------------------


class OneOfMany(OfOperation):
    """A loss of scores of which one is that of the right class; Y holds integer labels ``(batch,)``."""

    least_outputs = 2
    takes_weights = True

    def __init__(self, ignore_label: int | None) -> None:
        self._ignored = None if ignore_label is None else check_int("ignore_label", ignore_label, -(2**63), 2**63 - 1)

    @property
    def ignore_label(self) -> int | None:
        """See :class:`Loss`."""
        return self._ignored

    @abstractmethod
    def parameters(self, z: Array, c: Context) -> tuple[Any, ...]:
        """What the operation takes besides scores, labels and weights."""

    def run(self, z: Array, Y: Array, c: Context) -> None:
        """The mean over the batch, and its gradient."""
        getattr(c.ops, self.operation)(z, Y, c.gradient, c.work, c.weights, *self.parameters(z, c))

    def check(self, Y: Array, rows: int, outputs: int) -> None:
        """Y must be integers, one for each row."""
        check_labels(Y, rows, f"{self.name} takes integer labels")

    def check_values(self, Y: Array, outputs: int) -> None:
        """Labels count from 0; probabilities are not negative."""
        if Y.ndim == 1:
            check_label_values(Y, outputs, self.ignore_label)
        elif not (low := Y.min().item()) >= 0:
            raise ArgumentError(f"Y must hold probabilities, got {low}")

    def nan_marks_bad_labels(self, Y: Array) -> bool:
        """The kernels compare labels with the number of classes."""
        return bool(Y.ndim == 1)

    def predict(self, z: Array) -> Array:
        """The class of the highest score."""
        return z.argmax(axis=1)

    def truth(self, Y: Array, outputs: int) -> Array:
        """The labels, or the most probable class of each row."""
        return Y if Y.ndim == 1 else Y.argmax(axis=1)


class OfMargins(OneOfMany):
    """A loss of the margins z_j - z_y + delta between the other classes and the right one."""

    usual: ClassVar[Mapping[str, Any]] = {"ignore_label": None, "delta": 1}

    def __init__(self, ignore_label: int | None = None, delta: float = 1.0) -> None:
        OneOfMany.__init__(self, ignore_label)
        self.delta = check_real("delta", delta, 0, open_low=True)

    def parameters(self, z: Array, c: Context) -> tuple[Any, ...]:
        """The margin."""
        return (self.delta,)

    def margins(self, z: Array, Y: Array) -> tuple[Array | int, Array]:
        """1 for each label that counts; and max(0, z_j - z_y + delta), 0 where j = y."""
        kept, labels = kept_labels(Y, self.ignore_label)
        rows = np.arange(len(z))
        found = np.maximum(z - z[rows, labels][:, None] + self.delta, 0)
        found[rows, labels] = 0
        return kept, found


class SVM(OfMargins):
    """Multiclass hinge loss Σ_{j≠y} max(0, z_j - z_y + delta), mean over the batch (Weston & Watkins 1999, CS231n).

    Y holds integer labels ``(batch,)``. :class:`CrammerSinger` takes the largest margin instead of the sum.

    delta: the margin, above 0.
    ignore_label: samples with this label count for nothing, neither in the mean nor in accuracy; any integer, None for
        no label.

    >>> net = gb.mlp([3, 4, 3], loss=gb.SVM(delta=0.5), seed=0)
    >>> loss, grads = net.loss_and_grad(np.eye(3, dtype=np.float32), np.arange(3))
    >>> loss > 0
    True
    """

    operation = "svm"

    def each(self, z: Array, Y: Array) -> Array:
        """See :class:`Loss`."""
        kept, found = self.margins(z, Y)
        return kept * found.sum(axis=1)


class CrammerSinger(OfMargins):
    """Multiclass hinge loss max(0, max_{j≠y} z_j - z_y + delta), mean over the batch (Crammer & Singer 2001).

    Y holds integer labels ``(batch,)``. As Keras' ``CategoricalHinge`` and scikit-learn's ``hinge_loss``. Where several
    scores are the largest, the gradient is that of the first.

    delta: the margin, above 0.
    ignore_label: as in :class:`SVM`.

    >>> net = gb.mlp([3, 4, 3], loss=gb.CrammerSinger(), seed=0)
    >>> loss, grads = net.loss_and_grad(np.eye(3, dtype=np.float32), np.arange(3))
    >>> loss > 0
    True
    """

    operation = "crammer_singer"

    def each(self, z: Array, Y: Array) -> Array:
        """See :class:`Loss`."""
        kept, found = self.margins(z, Y)
        return kept * found.max(axis=1)


class OfSoftmax(OneOfMany):
    """A loss of scores whose softmax are the probabilities of the classes."""

    def probabilities(self, z: Array) -> Array:
        """softmax(z)."""
        found = np.exp(z - z.max(axis=1, keepdims=True))
        found /= found.sum(axis=1, keepdims=True)
        return found


class SoftmaxCrossEntropy(OfSoftmax):
    """-Σ_j y_j log softmax(z)_j, mean over the batch.

    Y holds integer labels ``(batch,)``, or a row of probabilities (one-hot, say) for each row of scores.

    label_smoothing: from 0 up to 1; the targets, labels as one-hot rows, are then (1 - label_smoothing) y +
        label_smoothing/classes, as in PyTorch's ``cross_entropy`` (Szegedy et al. 2016, section 7).
    ignore_label: samples with this label count for nothing, neither in the mean nor in accuracy; any integer, None for
        no label. Rows of probabilities have no label.

    >>> net = gb.mlp([3, 4, 3], loss=gb.SoftmaxCrossEntropy(label_smoothing=0.1), seed=0)
    >>> loss, grads = net.loss_and_grad(np.eye(3, dtype=np.float32), np.arange(3))
    >>> loss > 0
    True
    """

    operation = "softmax_cross_entropy"
    usual: ClassVar[Mapping[str, Any]] = {"ignore_label": None, "label_smoothing": 0.0}

    def __init__(self, ignore_label: int | None = None, label_smoothing: float = 0.0) -> None:
        OneOfMany.__init__(self, ignore_label)
        self.label_smoothing = checked_smoothing(label_smoothing)

    def check(self, Y: Array, rows: int, outputs: int) -> None:
        """Y must be integers, one for each row, or real numbers, one for each score."""
        if Y.ndim == 1:
            check_labels(Y, rows, f"softmax_cross_entropy takes integer labels, or rows of {outputs} probabilities")
        else:
            check_targets(Y, rows, outputs, "; labels must be of shape (batch,)" if Y.shape == (rows, 1) else "")

    def parameters(self, z: Array, c: Context) -> tuple[Any, ...]:
        """The smoothing of the targets."""
        return (self.label_smoothing,)

    def each(self, z: Array, Y: Array) -> Array:
        """See :class:`Loss`."""
        logs, smoothing = log_softmax(z), self.label_smoothing
        if Y.ndim > 1:
            targets = (1 - smoothing) * Y.astype(z.dtype) + smoothing / z.shape[1]
            return -(targets * logs).sum(axis=1)
        kept, labels = kept_labels(Y, self.ignore_label)
        right = logs[np.arange(len(z)), labels]
        return kept * -((1 - smoothing) * right + smoothing * logs.mean(axis=1))


class KLDivergence(OfSoftmax):
    """Σ_j y_j (log y_j - log softmax(z)_j), mean over the batch: the Kullback-Leibler divergence of softmax(z) from Y.

    Y holds a distribution for each row of scores, ``(batch, classes)``, not its logarithm; a y of 0 adds nothing. As
    ``torch.nn.KLDivLoss(reduction="batchmean")`` of ``log_softmax(scores)``, and Keras' ``KLDivergence`` of
    ``softmax(scores)``. Its gradient is softmax cross-entropy's, of which it is less by the entropy of Y.

    >>> net = gb.mlp([3, 4, 3], loss=gb.KLDivergence(), seed=0)
    >>> loss, grads = net.loss_and_grad(np.eye(3, dtype=np.float32), np.full((3, 3), 1 / 3, np.float32))
    >>> loss > 0
    True
    """

    operation = "softmax_cross_entropy"

    def __init__(self) -> None:
        OneOfMany.__init__(self, None)

    def check(self, Y: Array, rows: int, outputs: int) -> None:
        """Y must be real numbers, one for each score."""
        hint = "; for labels use softmax_cross_entropy" if Y.ndim == 1 else ""
        check_targets(Y, rows, outputs, hint)

    def parameters(self, z: Array, c: Context) -> tuple[Any, ...]:
        """No smoothing, and with Σ_j y_j log y_j."""
        return 0.0, True

    def each(self, z: Array, Y: Array) -> Array:
        """See :class:`Loss`."""
        Y = Y.astype(z.dtype)
        return (Y * (np.log(np.where(Y > 0, Y, z.dtype.type(1))) - log_softmax(z))).sum(axis=1)


class SoftmaxFocal(OfSoftmax):
    """-alpha_y (1 - p)^gamma log p, p = softmax(z)_y, mean over the batch: focal loss of several classes.

    Cross-entropy in which easy samples hardly count (Lin et al. 2017, equation 5, with softmax in place of the
    sigmoid), as Keras' ``CategoricalFocalCrossentropy``. Y holds integer labels ``(batch,)``; for targets of two
    classes, one score each, there is :data:`focal`.

    gamma: at least 0; with 0 it is softmax cross-entropy.
    alpha: a number for every class, or one for all; not negative. None for 1. The mean is that of the samples, not over
        the sum of alpha; class weights that the mean is divided by are ``Loader(class_weight=)``.
    ignore_label: as in :class:`SoftmaxCrossEntropy`.

    >>> net = gb.mlp([3, 4, 3], loss=gb.SoftmaxFocal(), seed=0)
    >>> loss, grads = net.loss_and_grad(np.eye(3, dtype=np.float32), np.arange(3))
    >>> loss > 0
    True
    """

    operation = "softmax_focal"
    usual: ClassVar[Mapping[str, Any]] = {"ignore_label": None, "gamma": 2, "alpha": None}

    def __init__(
        self, gamma: float = 2.0, alpha: float | Sequence[float] | Array | None = None, ignore_label: int | None = None
    ) -> None:
        OneOfMany.__init__(self, ignore_label)
        self.gamma, self.alpha = check_real("gamma", gamma, 0), checked_alpha(alpha)
        self._of_classes: dict[tuple[Backend, Any, int], Array] = {}

    def workspace(self, outputs: int) -> Mapping[str, Space]:
        """The results, and the operation's scratch."""
        if isinstance(self.alpha, list) and len(self.alpha) != outputs:
            raise ShapeError(f"alpha must have a number for each of {outputs} classes, got {len(self.alpha)}")
        return OneOfMany.workspace(self, outputs)

    def parameters(self, z: Array, c: Context) -> tuple[Any, ...]:
        """gamma, and alpha of each class."""
        return self.gamma, self._classes(c.backend, compute_dtype(z.dtype), z.shape[1])

    def _classes(self, backend: Backend, dtype: np.dtype[Any], classes: int) -> Array | None:
        """alpha of each class on the device; kept for captured steps, which read it at every replay."""
        if self.alpha is None:
            return None
        key = backend, dtype, classes
        if key not in self._of_classes:
            self._of_classes[key] = backend.asarray(np.broadcast_to(self.alpha, classes), dtype)
        return self._of_classes[key]

    def each(self, z: Array, Y: Array) -> Array:
        """See :class:`Loss`."""
        kept, labels = kept_labels(Y, self.ignore_label)
        logs, rows = log_softmax(z), np.arange(len(z))
        right = logs[rows, labels]
        alpha = self._classes(backend_of(z), z.dtype, z.shape[1])
        powers = (-np.expm1(right)) ** self.gamma if alpha is None else alpha[labels] * (-np.expm1(right)) ** self.gamma
        return kept * powers * -right


def checked_alpha(alpha: float | Sequence[float] | Array | None) -> float | list[float] | None:
    """The argument ``alpha`` of :class:`SoftmaxFocal`."""
    if alpha is None:
        return None
    if isinstance(alpha, (int, float, np.generic, str)):
        return check_real("alpha", alpha, 0)
    found = [float(number) for number in alpha]
    check_weight_values(np.array(found), "alpha")
    return found


def log_softmax(z: Array) -> Array:
    """log softmax(z), as a new array."""
    z = z - z.max(axis=1, keepdims=True)
    z -= np.log(np.exp(z).sum(axis=1, keepdims=True))
    return z


# --- pieces ----------------------------------------------------------------------------------------------------------


def loss_of(loss: str | ScoreLoss | BoundScoreLoss | LossFunction | Loss) -> Loss:
    """The loss object for a name, a formula, a function of ``gb.losses``, or an object."""
    if isinstance(loss, Loss):
        return loss
    if isinstance(loss, (ScoreLoss, LossFunction)):
        loss = loss.bind()
    if isinstance(loss, Loss):
        return loss
    if isinstance(loss, BoundScoreLoss):
        return over_scores(loss)
    if not isinstance(loss, str):
        raise DTypeError(
            f"loss must be one of {', '.join(map(repr, LOSSES))}, a function declared with @gb.score_loss, or an "
            f"object of a subclass of gb.Loss; got {loss!r}"
        )
    return LOSSES[check_choice("loss", loss, LOSSES)]


def check_labels(Y: Array, rows: int, takes: str) -> None:
    """Y must be integers, one for each row."""
    if Y.ndim != 1:
        raise ShapeError(f"{takes}: Y must have shape ({rows},), got {Y.shape}")
    if len(Y) != rows:
        raise ShapeError(f"X has {rows} rows, Y has {len(Y)}")
    if Y.dtype.kind not in "iu":
        raise DTypeError(f"{takes}: Y of shape {Y.shape} has dtype {Y.dtype}; convert it with Y.astype('int64')")


def kept_labels(Y: Array, ignored: int | None) -> tuple[Array | int, Array]:
    """1 for each label that counts and 0 for each that is ignored; and the labels, 0 in place of those."""
    if ignored is None:
        return 1, Y
    kept = ignored != Y
    return kept, Y * kept


def check_label_values(Y: Array, outputs: int, ignored: int | None = None) -> None:
    """Labels must be 0 to outputs - 1, or the one that is ignored."""
    if ignored is not None:
        Y = Y[ignored != Y]
        if not Y.size:
            return
    low, high = Y.min().item(), Y.max().item()
    if low < 0 or high >= outputs:
        others = "" if ignored is None else f", or {ignored}, which is ignored"
        raise ArgumentError(f"Y must hold labels from 0 to {outputs - 1}{others}, got {high if low >= 0 else low}")


def check_weight(weight: Array, rows: int, loss: Loss) -> None:
    """A weight must be a real number for each row, and the loss must take weights."""
    if not loss.takes_weights:
        raise ArgumentError(
            f"{loss.name} takes no weights: its run(z, Y, c) must multiply the losses and gradients of the samples by "
            "c.weights, and its class say so with takes_weights = True"
        )
    if weight.shape != (rows,):
        raise ShapeError(f"weight must have shape ({rows},), one number for each sample, got {weight.shape}")
    if weight.dtype.kind not in "fiub":
        raise DTypeError(f"weight must hold real numbers, got dtype {weight.dtype}")


def check_weight_values(weight: Array, name: str = "weight") -> None:
    """Weights must be finite and not negative."""
    if bool(((weight >= 0) & (weight < math.inf)).all()):
        return
    first = int((~((weight >= 0) & (weight < math.inf))).argmax())
    raise ArgumentError(f"{name} must hold finite numbers that are not negative, got {name}[{first}] = {weight[first]}")


def listed(options: Mapping[str, Any]) -> str:
    """Arguments as a call has them."""
    return ", ".join(f"{name}={value!r}" for name, value in options.items())


def check_targets(Y: Array, rows: int, outputs: int, hint: str = "") -> None:
    """Y must be real numbers, one for each score."""
    if Y.shape != (rows, outputs) and not (outputs == 1 and Y.shape == (rows,)):
        if Y.ndim in (1, 2) and len(Y) != rows:
            raise ShapeError(f"X has {rows} rows, Y has {len(Y)}")
        raise ShapeError(f"Y must have the shape of the scores, {(rows, outputs)}, got {Y.shape}{hint}")
    if Y.dtype.kind not in "fiub":
        raise DTypeError(f"Y must hold real numbers, got dtype {Y.dtype}")


# --- weights of samples ----------------------------------------------------------------------------------------------


class Weighing:
    """Makes what each sample of a batch counts, in memory that it keeps; ``sum`` has the sum of a batch's weights.

    ``dtype`` is that of the arithmetic.
    """

    def __init__(self, backend: Backend, dtype: np.dtype[Any]) -> None:
        self._backend, self._dtype, self._ops = backend, dtype, ops_for(backend, dtype)
        self._room: Array = None
        self.sum: Array = None
        self._no_mean: Array = None

    def of(self, loss: Loss, Y: Array, weight: Array | None, part: bool = False) -> Array | None:
        """The weights of a batch over their mean; None where all its samples count alike.

        Where all are 0 they have no mean, and are NaN; those of a ``part`` of a batch are then 0.
        """
        ignored = loss.ignore_label
        labels = Y if ignored is not None and Y.ndim == 1 else None
        if weight is None and labels is None:
            return None
        if self._room is None or len(self._room) < len(Y):
            if self._room is not None:
                self._backend.synchronize()  # the stream that works in the memory may not be the one that gets it next
            self._room, self.sum = self._backend.empty(len(Y), self._dtype), self._backend.empty(1, np.float64)
        out = self._room[: len(Y)]
        self._ops.weigh(weight, labels, ignored or 0, out, self.sum, {})
        if part:
            if self._no_mean is None:  # no temporary array: the caller's work may be captured in a graph
                self._no_mean = self._backend.empty(1, np.bool_)
            xp = self._backend.xp
            xp.copyto(out, 0, where=xp.equal(self.sum, 0, out=self._no_mean))
        return out

    @property
    def owned(self) -> Any:
        """What a captured step must keep."""
        return self._room, self.sum, self._no_mean


def counts_of(loss: Loss, Y: Array, weight: Array | None) -> Array | None:
    """The weights of samples as they were given, 0 where the label is ignored; None where all count 1."""
    if (ignored := loss.ignore_label) is None or Y.ndim > 1:
        return weight
    kept = ignored != Y
    return kept if weight is None else weight * kept


def no_mean(counts: Array | None) -> bool:
    """Whether all samples have the weight 0."""
    return counts is not None and not bool(counts.any())


NO_MEAN = "all its weights are 0, or all its labels are ignored, so there is nothing to take the mean of"


# --- without a network -----------------------------------------------------------------------------------------------


REDUCTIONS = ("mean", "sum", "none")


class LossFunction:
    """A loss of scores without a network, and what makes the object that a network takes.

    ``huber(scores, Y, delta=2.0)`` returns the loss, a float, and its gradient by the scores ``(batch, outputs)``.
    ``Network(loss=huber.bind(delta=2.0))``, or ``Network(loss=huber)`` for the defaults, trains by it.

    weight: numbers ``(batch,)``, finite and not negative: the loss is then Σ w l / Σ w, of which l is the loss of a
        sample, a mean over its scores where every score has one; by default all count alike. Raises NonFiniteError if
        all are 0: there is no mean.
    reduction: "mean"; "sum", Σ w l over samples and scores; or "none", the w l themselves, ``(batch,)``, of losses of
        single scores ``(batch, outputs)``. With both of these dscores is the gradient of the sum.

    >>> loss, dscores = gb.losses.softmax_cross_entropy(np.zeros((2, 4)), np.array([0, 3]))
    >>> round(loss, 4), dscores[0].tolist()
    (1.3863, [-0.375, 0.125, 0.125, 0.125])
    """

    def __init__(self, name: str, bind: Callable[..., Loss], text: str) -> None:
        self.__name__, self.bind, self.__doc__ = name, bind, text

    def __repr__(self) -> str:
        return f"<loss {self.__name__}>"

    def __call__(
        self, scores: Array, Y: Array, weight: Array | None = None, reduction: str = "mean", **parameters: Any
    ) -> tuple[Any, Array]:
        """Loss and gradient by the scores."""
        check_choice("reduction", reduction, REDUCTIONS)
        loss = self.bind(**parameters)
        mean, gradient = _alone(loss, scores, Y, weight)
        if reduction == "mean":
            return mean, gradient
        with backend_of(scores).scope(), np.errstate(over="ignore", invalid="ignore"):
            each = loss.each(scores, Y)
            if weight is not None:
                each *= weight.astype(each.dtype).reshape(-1, *[1] * (each.ndim - 1))
            counts = counts_of(loss, Y, weight)
            gradient *= (len(scores) if counts is None else float(counts.sum())) * (each.size // len(scores))
            return each if reduction == "none" else float(each.sum(dtype=np.float64).item()), gradient


def of_class(name: str, kind: type[Loss]) -> LossFunction:
    """The function of a class of losses."""
    first = (inspect.getdoc(kind) or "").partition("\n")[0]
    return LossFunction(name, kind, f"{first}\n\nY and the parameters are those of :class:`{kind.__name__}`.")


def of_formula(loss: ScoreLoss) -> LossFunction:
    """The function of a loss of single scores."""
    text = f"{inspect.getdoc(loss.formula)}\n\nA mean over the scores ``(batch, outputs)``; Y has a number for each."
    return LossFunction(loss.name, lambda **parameters: over_scores(loss.bind(**parameters)), text)


softmax_cross_entropy = of_class("softmax_cross_entropy", SoftmaxCrossEntropy)
svm = of_class("svm", SVM)
crammer_singer = of_class("crammer_singer", CrammerSinger)
kl_divergence = of_class("kl_divergence", KLDivergence)
softmax_focal = of_class("softmax_focal", SoftmaxFocal)
sigmoid_cross_entropy = of_class("sigmoid_cross_entropy", SigmoidCrossEntropy)
focal = of_formula(scores.focal)
hinge = of_formula(scores.hinge)
squared_hinge = of_formula(scores.squared_hinge)
mse = of_formula(scores.mse)
mae = of_formula(scores.mae)
huber = of_formula(scores.huber)
log_cosh = of_formula(scores.log_cosh)
quantile = of_formula(scores.quantile)
poisson = of_formula(scores.poisson)

FUNCTIONS = (
    *(softmax_cross_entropy, sigmoid_cross_entropy, mse, svm, crammer_singer, kl_divergence, softmax_focal, mae, huber),
    *(log_cosh, quantile, poisson, focal, hinge, squared_hinge),
)
LOSSES: dict[str, Loss] = {function.__name__: function.bind() for function in FUNCTIONS}
# Those that take integer labels.
OF_LABELS = [name for name, loss in LOSSES.items() if isinstance(loss, OneOfMany) and name != "kl_divergence"]


def _alone(loss: Loss, z: Array, Y: Array, weight: Array | None) -> tuple[float, Array]:
    backend = backend_of(z, Y) if weight is None else backend_of(z, Y, weight)
    if z.ndim != 2 or min(z.shape) < 1 or z.shape[1] < loss.least_outputs:
        raise ShapeError(f"scores must have shape (batch, at least {loss.least_outputs}), got {z.shape}")
    if z.dtype not in (np.float32, np.float64):
        raise DTypeError(f"scores must be float32 or float64, got {describe(z)}")
    rows, outputs = z.shape
    loss.check(Y, rows, outputs)

    def arrange(layout: Layout, constants: Mapping[str, Array]) -> Context:
        work = {**layout.arrays(loss.workspace(outputs)), **constants}
        products = ArrayProducts(backend.xp.matmul, "there is no network")
        return Context(backend, backend.xp, ops_for(backend, z.dtype), 0, Mode(0, True), {}, {}, {}, work, products)

    with backend.scope(), np.errstate(over="ignore", invalid="ignore"):
        if weight is not None:
            check_weight(weight, rows, loss)
            check_weight_values(weight)
        loss.check_values(Y, outputs)
        c = Workspace(backend, z.dtype, rows, outputs, arrange).bind(rows)
        weights = Weighing(backend, z.dtype).of(loss, Y, weight)
        if weights is not None and no_mean(counts_of(loss, Y, weight)):
            raise NonFiniteError(f"loss is nan for a batch of shape {z.shape}; {NO_MEAN}")
        loss.run(z, Y, dataclasses.replace(c, weights=weights))
        return float(c.work["loss"].item()), c.work["dz"].copy()
