"""A stack of layers over one flat buffer of parameters, run in a workspace that is planned before the first step."""

from __future__ import annotations

import functools
import glob
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from gpubatch.backend import Array, Backend, float_dtype, get_backend
from gpubatch.errors import (
    ArgumentError,
    DTypeError,
    NonFiniteError,
    ShapeError,
    check_bool,
    check_choice,
    check_int,
    check_real,
    suggesting,
)
from gpubatch.formula import Activation, BoundActivation, BoundScoreLoss, ScoreLoss
from gpubatch.nn.batches import EVALUATION_ROWS
from gpubatch.nn.core import Core, quiet
from gpubatch.nn.dealt import DealtSteps
from gpubatch.nn.layers import (
    ACTIVATIONS,
    AUTO,
    INITS,
    ActivationLayer,
    BatchNorm,
    Dense,
    Dropout,
    Elementwise,
    Layer,
    check_bias,
)
from gpubatch.nn.losses import NO_MEAN, Loss, OverScores, Weighing, counts_of, loss_of
from gpubatch.nn.summary import LayerSummary, Summary
from gpubatch.nn.workspace import evenly
from gpubatch.ops import PRECISIONS, check_choices
from gpubatch.own import as_written, copied
from gpubatch.parallel import Ranks
from gpubatch.params import FlatViews
from gpubatch.passes import deal_of, pass_of

COMPARED = 1 << 15  # scores that are compared with labels at a time, since predictions are new arrays
V0_1 = "v0.1"  # the init of mlp() that makes the networks of that version
MIXED = "mixed"  # the precision beside those of products


# What is made with a network, and what people assign besides; what does what they mean.
MADE = frozenset("backend buffers compute_dtype dtype layers loss_scale parameters precision seed tune".split())
IN_VAIN = {
    "stop_training": "a callback that raises gb.StopTraining() ends the run",
    "training": "fit and loss_and_grad train, all else evaluates",
    "trainable": "an optimizer's groups={'W1': {'trainable': False}} leave parameters as they are",
    **dict.fromkeys(("lr", "learning_rate"), "assign opt.lr"),
}


@as_written
class Network:
    """Layers, one after another, and a loss.

    layers: :class:`Layer` objects, gpubatch's or your own; the first with parameters says how many features X has.
    loss: a name, a function declared with :func:`gpubatch.score_loss`, or an object of your own :class:`Loss`.
    l2: adds l2/2 * Σ W² over the weights of Dense layers to the loss, not over biases, gamma and beta.
    backend: the device: "auto", "cpu", "cuda", "cuda:1", or a Backend.
    dtype: "float32" or "float64".
    seed: an integer of 64 bits; decides the first weights and the dropout masks, the same on CPU and GPU.
    precision: "full", "fast" or "mixed", see below.
    tune: whether a GPU times the algorithms of its matrix products, see below.

    ``precision="fast"`` lets a GPU multiply float32 matrices as TF32: it rounds their elements to 10 bits of mantissa
    instead of 23, a relative error of up to 5e-4 in each, and adds up the products in float32. It needs
    nvmath-python. The CPU, and float64, compute as "full" does.

    ``precision="mixed"`` stores parameters, batches, activations and all gradients as float16, which takes half the
    memory and half the traffic, and computes in float32: matrix products are added up in it, and the loss, means,
    variances and running statistics are of ``compute_dtype`` (Micikevicius et al., arXiv:1710.03740). X must be
    float16, as ``Loader(dtype="float16")`` makes it; scores are float32. Gradients below 6e-8 would be zero in float16,
    so all of them are multiplied by ``loss_scale``, an array of one number on the device: 1 at first, and what a
    :class:`~gpubatch.train.LossScale` says while ``fit`` trains. The optimizer needs ``master_weights=True``. On the
    CPU this precision is for trying things out: every operation makes float32 copies, which no memory plan counts.

    ``tune=True`` makes a GPU time cuBLASLt's algorithms for each matrix product when it first meets that product, and
    use the fastest. It needs nvmath-python, and takes about a second. Without it cuBLASLt predicts the fastest. The
    choices are part of :meth:`state_dict`, and so of checkpoints, since another algorithm rounds differently: a run
    resumed with the same cuBLASLt on the same kind of GPU gives the same bits, and a :class:`TuningWarning` says when
    that is impossible. A CPU has nothing to choose.

    ``parameters`` numbers the layers of a kind: W1, b1, gamma1, beta1, W2, ... They lie in this order in one buffer,
    except that arrays of odd sizes come last, so that the others are aligned. ``buffers`` holds running_mean1,
    running_var1, ... likewise.

    ``loss``, ``evaluate``, ``scores``, ``predict`` and ``accuracy`` convert X and Y on their device: numbers of other
    types, lists, tables, arrays of other libraries. Bytes, as pixels are, have to be scaled as in training first, by
    ``Loader.to_batch``.

    **Threads.** Any number of threads may evaluate a network at the same time: ``scores``, ``predict``, ``evaluate``,
    ``loss`` and ``accuracy``. Each works in a workspace of its own, which ends with the thread; memory plans count one.
    One thread at a time may train it: another that makes a step, or evaluates during ``fit`` or a step, gets an
    :class:`InUseError`, because the parameters change meanwhile. ``copy.deepcopy(net)``, made in a callback or between
    two steps, is a network that can be evaluated while this one is trained.

    >>> net = gb.Network([gb.Dense(3, 4), gb.ReLU(), gb.Dense(4, 2)], loss="softmax_cross_entropy", seed=0)
    >>> loss, grads = net.loss_and_grad(np.zeros((5, 3), np.float32), np.zeros(5, int))
    >>> sorted(grads)
    ['W1', 'W2', 'b1', 'b2']
    """

    @suggesting
    def __init__(
        self,
        layers: Sequence[Layer],
        loss: str | ScoreLoss | BoundScoreLoss | Loss = "softmax_cross_entropy",
        l2: float = 0.0,
        backend: str | Backend = "auto",
        dtype: Any = "float32",
        seed: int = 0,
        precision: str = "full",
        tune: bool = False,
    ) -> None:
        if not isinstance(layers, Iterable):
            raise DTypeError(f"layers must be a list of Layer objects, got {layers!r}")
        self.layers = tuple(layers)
        self.precision = check_choice("precision", precision, [*PRECISIONS, MIXED])
        self.tune = check_bool("tune", tune)
        self.dtype = float_dtype(dtype)
        if precision == MIXED and self.dtype != np.float32:
            raise ArgumentError(f"dtype must be float32 with precision='mixed', which computes in it, got {dtype!r}")
        if precision == MIXED:
            self.dtype = np.dtype(np.float16)
        self.seed = check_int("seed", seed, 0, 2**64 - 1)
        self.backend = get_backend(backend)
        common = self.backend, self.dtype, self.seed, "full" if precision == MIXED else precision, self.tune
        self._core = Core(self.layers, loss_of(loss), check_real("l2", l2, 0), *common)
        self._dealt = DealtSteps(self._core)
        self.compute_dtype = self._core.compute_dtype
        self.parameters, self.buffers = self._core.parameters, self._core.buffers
        self.loss_scale = self._core.loss_scale

    def __setattr__(self, name: str, value: Any) -> None:
        known = getattr(type(self), name, None)
        if name in MADE and "loss_scale" in vars(self):  # the last to be made
            remedy = (
                "net.parameters[name] = values changes them"
                if name == "parameters"
                else "make another network, and give it the state_dict()"
            )
        elif name in IN_VAIN or (callable(known) and not callable(value)):
            remedy = IN_VAIN.get(name, f"{name} is a method; give the argument when the network is made")
        else:
            object.__setattr__(self, name, value)
            return
        raise ArgumentError(f"net.{name} = {value!r} changes nothing: {remedy}")

    @property
    def loss_function(self) -> Loss:
        """The loss, as an object."""
        return self._core.given_loss

    @property
    def l2(self) -> float:
        """The weight of the l2 term."""
        return self._core.l2

    @property
    def loss_name(self) -> str:
        """What the loss is called."""
        return self.loss_function.name

    @property
    def forms(self) -> dict[str, str]:
        """What runs each activation, and the loss if it is a formula, by name, in the words of ``Optimizer.form``."""
        formulas: list[Activation | ScoreLoss] = [
            layer.function.declared for layer in self.layers if isinstance(layer, ActivationLayer)
        ]
        if isinstance(self.loss_function, OverScores):
            formulas.append(self.loss_function.bound.declared)
        return {formula.name: self._core.ops.form(formula, self.dtype) for formula in formulas}

    @property
    def inputs(self) -> int:
        """Features of a row of X."""
        return self._core.inputs

    @property
    def outputs(self) -> int:
        """Numbers in a row of scores."""
        return self._core.outputs

    def __deepcopy__(self, memo: Any) -> Network:
        common = self.backend, self.compute_dtype, self.seed, self.precision, self.tune
        twin = Network(self.layers, self.loss_function, self.l2, *common)
        twin.load_state_dict(self.state_dict())
        return twin

    def __reduce__(self) -> Any:
        raise DTypeError(
            "a Network cannot be pickled; gb.save(path, net) writes it to a file, and gb.load(path) makes it again"
        )

    def __repr__(self) -> str:
        layers = ", ".join(map(repr, self.layers))
        options = "" if self.precision == "full" else f", precision={self.precision!r}"
        options += ", tune=True" if self.tune else ""
        dtype = self.compute_dtype.name
        return f"Network([{layers}], loss={self.loss_name!r}, l2={self.l2}, dtype={dtype!r}{options})"

    def summary(self) -> Summary:
        """Layers with the shapes of their outputs, parameters and bytes: a table to print, or to show in a notebook."""
        rows = []
        for run, names in zip(self._core.layers, self._core.names, strict=True):
            own = [self.parameters[names[name]] for name in run.needs.parameters]
            kept = [self.buffers[names[name]] for name in run.needs.buffers]
            counts = sum(int(view.size) for view in own), sum(int(view.nbytes) for view in (*own, *kept))
            rows.append(LayerSummary(repr(run.layer), run.needs.outputs, *counts))
        words = f"{self.inputs:,} inputs, loss {self.loss_name}, {self.dtype.name}, {self.backend.spec}"
        return Summary(tuple(rows), words, sum(row.parameters for row in rows), sum(row.bytes for row in rows))

    # --- training ---

    def loss_and_grad(
        self,
        X: Array,
        Y: Array,
        micro_batch_size: int | None = None,
        weight: Array | None = None,
        ranks: Ranks | None = None,
    ) -> tuple[float, FlatViews]:
        """Compute the loss of a training step, a float, and its gradients, which overwrite ``parameters.grads``.

        Raises NonFiniteError if the loss is NaN or infinite; running statistics and dropout are then as before.

        X: ``(batch, features)``, of the network's dtype and device.
        Y: what the loss compares the scores with, on the same device.
        micro_batch_size: rows to compute at a time, by default all. A workspace of that size is enough, and the
            gradients of the micro-batches are added up. Up to rounding the result is the same, with the same dropout;
            but BatchNorm takes the statistics of each micro-batch, of at least two rows.
        weight: what each sample counts, real numbers ``(batch,)`` on the same device, finite and not negative: the loss
            is Σ w l / Σ w over the batch, micro-batches or not, and the l2 term. By default all count alike. If all are
            0 there is no mean, and the loss is NaN.
        ranks: all of them make this step together, and have the same loss and gradients of the whole batch.

        **Several processes.** X, Y and ``weight`` are this rank's parts of a batch, as ``Loader(ranks=ranks)`` gives
        them out; X may be changed meanwhile, if it keeps its rows. The gradient of each part, times its rows or the sum
        of its weights, enters a binary tree over all parts of the batch. So the bits do not depend on the number of
        ranks, nor on there being any: one process with ``Loader(shards=)`` computes the same. Dropout is that of the
        whole batch. BatchNorm takes the statistics of each part, and its running statistics are of the whole batch:
        variances of parts, and the variance of their means (Chan, Golub & LeVeque 1979). Of other buffers, a layer of
        your own has them, it is the mean over the parts. X that is not a loader's is one part: the batch is the rows
        of all ranks, and the bits depend on how many there are. An error on one rank is raised on all, after the sum.
        """
        core, self.parameters.fed = self._core, pass_of(X)
        if ranks is not None or (self.parameters.fed is not None and self.parameters.fed.deal is not None):
            deal = self._dealt.deal(X, ranks)
            if deal is not None:
                return self._dealt.step(X, Y, weight, deal, ranks, micro_batch_size).loss, self.parameters.grads
        core.batches.check(X, Y, values=True, weight=weight)
        loss = 0.0

        def add(x: Array, y: Array, weights: Array | None, share: float) -> None:
            nonlocal loss
            loss += share * core.batch(x, y, weights)

        with core.training, self.backend.scope(), quiet():
            if micro_batch_size is None or len(X) <= check_int("micro_batch_size", micro_batch_size, 1):
                loss = core.batch(X, Y, core.weights(Y, weight), weight)
            else:
                core.remember()
                try:
                    weights = core.weights(Y, weight)
                    if weights is not None:
                        core.check_mean(X, Y, weight)
                    core.micro_batches(X, Y, weights, micro_batch_size, add)
                except BaseException:
                    core.recall()
                    raise
            core.count_steps(1)
        return loss, self.parameters.grads

    def step_loss(self, X: Array, Y: Array, weight: Array | None = None) -> Array:
        """Compute what :meth:`loss_and_grad` does without waiting for the device; the loss is an array of one element.

        The next step overwrites that array. Nobody checks whether the loss is finite, nor, on a GPU, the values of Y
        and of ``weight``; one that is negative or not finite makes the loss NaN.
        """
        self.parameters.fed = fed = pass_of(X)
        if fed is not None and fed.deal is not None and (deal := deal_of(X) or fed.deal).parts != (deal.rows,):
            raise ArgumentError(
                "X is a batch in parts, of a Loader with shards= or ranks=, and step_loss computes whole batches only: "
                "use loss_and_grad"
            )
        return self._core.step(X, Y, weight).loss.work["loss"]

    # --- evaluation ---

    def loss(self, X: Array, Y: Array, training: bool = False, weight: Array | None = None) -> float:
        """Mean loss and l2 term, with running statistics and without dropout; changes nothing.

        Raises NonFiniteError if the loss is NaN or infinite.

        training: whether to use batch statistics and the dropout of the next step instead.
        weight: what each sample counts, as in :meth:`loss_and_grad`.
        """
        if not training:
            return self.evaluate(X, Y, weight=weight)[0]
        core = self._core
        X, Y = core.batches.given_pair(X, Y)
        X = X[:]
        core.batches.check(X, Y, values=True, weight=weight)
        with core.training, self.backend.scope(), quiet():
            run = core.forward(X, Y, core.weights(Y, weight))
            return core.finite(run.loss.work["loss"].item(), X, Y, weight)

    def evaluate(
        self,
        X: Array,
        Y: Array,
        rows: int = EVALUATION_ROWS,
        weight: Array | None = None,
        loss_weight: Array | None = None,
    ) -> tuple[float, float | None]:
        """:meth:`loss` and :meth:`accuracy` in one pass; the accuracy is None for a loss without classes, such as mse.

        Raises NonFiniteError if the loss is NaN or infinite.

        rows: the most rows to compute at a time.
        weight: what each sample counts in both, as in :meth:`loss_and_grad`.
        loss_weight: what it counts in the loss, where that is not ``weight``: the weights of classes, say.
        """
        check_int("rows", rows, 1)
        core, function = self._core, self._core.loss
        X, Y = core.batches.given_pair(X, Y)
        in_loss = weight if loss_weight is None else loss_weight
        core.batches.check(X, Y, values=True, weight=weight)
        if loss_weight is not None:
            core.batches.check(X, Y, weight=loss_weight)
        with self.backend.scope(), quiet():
            weighing = Weighing(self.backend, self.compute_dtype) if core.weighs(in_loss is not None) else None
            total = counted = 0.0
            right = compared = 0.0
            for part, run in core.evaluate(X, rows):
                y = Y[part]
                weights = weighing and weighing.of(function, y, None if in_loss is None else in_loss[part])
                whole = len(y) if weighing is None or weights is None else weighing.sum.item()
                if whole != 0:
                    function.run(run.scores, y, run.weighing(weights))
                    total += run.loss.work["loss"].item() * whole
                counted += whole
                at_once = max(1, COMPARED // self.outputs) if function.classifies else 0
                for some in evenly(len(y), at_once) if at_once else ():
                    found = self._right(function.predict(run.scores[some]), y[some])
                    of_some = self._counted(found, y[some], None if weight is None else weight[part][some])
                    right, compared = right + of_some[0], compared + of_some[1]
            loss = total / counted if counted else math.nan
            if core.l2_names:
                penalty = run.loss.work["loss"]
                penalty.fill(0)
                core.add_l2(run.loss)
                loss += penalty.item()
            core.finite(loss, X, Y, in_loss)
        return loss, right / compared if function.classifies else None

    def scores(self, X: Array) -> Array:
        """The outputs of the last layer, ``(batch, outputs)``, as a new array of ``compute_dtype``."""
        X = self._core.batches.given(X)
        self._core.batches.check_inputs(X)
        result = self.backend.empty((len(X), self.outputs), self.compute_dtype)
        with self.backend.scope(), quiet():
            for part, run in self._core.evaluate(X):
                result[part] = run.scores
        return result

    def predict(self, X: Array) -> Array:
        """Predicted labels as int64: the class of the highest score, or 1 where a score is above 0.

        A loss without classes, such as mse, predicts the scores themselves. Shape ``(batch,)``; with losses of single
        scores, such as sigmoid_cross_entropy and mse, that of the scores where there is more than one output.
        """
        scores = self.scores(X)
        with self.backend.scope():
            return self._core.loss.predict(scores)

    def probabilities(self, X: Array) -> Array:
        """What the scores say of each class: ``(batch, classes)``, rows that add up to 1, with softmax_cross_entropy.

        With sigmoid_cross_entropy and focal the probability of class 1, ``(batch, outputs)``; ``(batch,)`` where there
        is one output. Raises ArgumentError for a loss whose scores are no probabilities.
        """
        self._core.given_loss.check_probabilities()
        scores = self.scores(X)
        with self.backend.scope(), quiet():
            return self._core.given_loss.probabilities(scores)

    def sample_losses(self, X: Array, Y: Array) -> Array:
        """The loss of each sample, ``(batch,)``, without the l2 term; :meth:`loss` is the mean of these.

        It is 0 where the label is ignored. A loss of single scores has a mean over the outputs for each sample.
        """
        self._core.batches.check(X, Y, values=True)
        scores = self.scores(X)
        with self.backend.scope(), quiet():
            self._core.batches.check_values(Y, None)
            return self._core.given_loss.each(scores, Y).reshape(len(X), -1).mean(axis=1)

    def accuracy(self, X: Array, Y: Array, weight: Array | None = None) -> float:
        """The fraction of predictions that are right, of those whose label is not ignored.

        weight: what each sample counts, as in :meth:`loss_and_grad`; the fraction is Σ w right / Σ w, as scikit-learn's
            ``score(sample_weight=)``.
        """
        X, Y = self._core.batches.given_pair(X, Y)
        self._core.batches.check(X, Y, values=True, weight=weight)
        with self.backend.scope():
            self._core.batches.check_values(Y, weight)
            right, compared = self._counted(self._right(self.predict(X), Y), Y, weight)
            if not compared:
                raise NonFiniteError(f"accuracy has no value for a batch of shape {X.shape}: {NO_MEAN}")
            return right / compared

    def _counted(self, right: Array, Y: Array, weight: Array | None) -> tuple[float, float]:
        """What the predictions that are right count, and what all count."""
        counts = counts_of(self._core.loss, Y, weight)
        if counts is None:
            return right.sum().item(), right.size
        of_rows = right.reshape(len(right), -1)
        total = of_rows.shape[1] * counts.sum(dtype=np.float64)
        return (of_rows.sum(axis=1) * counts).sum(dtype=np.float64).item(), total.item()

    def _right(self, predicted: Array, Y: Array) -> Array:
        """Which predictions are right."""
        truth = self._core.loss.truth(Y, self.outputs)
        if truth.shape != predicted.shape:
            raise ShapeError(f"{self.loss_name}: predict gives shape {predicted.shape}, truth {truth.shape}")
        return predicted == truth

    # --- memory ---

    def memory(self, batch_size: int) -> int:
        """Bytes that training with this batch size and evaluation take, without X and Y; allocates nothing."""
        return sum(self.memory_parts(batch_size).values())

    def memory_parts(
        self,
        batch_size: int,
        evaluated: int = EVALUATION_ROWS,
        weighted: bool = False,
        shards: int | None = None,
        ranks: Ranks | None = None,
    ) -> dict[str, int]:
        """:meth:`memory` by purpose.

        evaluated: how many rows are evaluated, of which 1024 at a time.
        weighted: whether steps and evaluation are given weights; with ``ignore_label`` they always have some.
        shards: the parts of a batch, over all ranks, if it has any; a step then works in memory for one part.
        ranks: those that share the parts.

        Without compiled kernels NumPy also works in up to 1 MiB for each formula, once per process.
        """
        core, rows = self._core, check_int("batch_size", batch_size, 1)
        tail = int(self.parameters.message.nbytes - self.parameters.grads.flat.nbytes)
        of_parts = {}
        if shards is not None:
            size = 1 if ranks is None else ranks.size
            shards = size if core.in_sync else check_int("shards", shards, 1)
            rows = -(-rows // shards)
            of_parts["sums over parts"] = self._dealt.parts_bytes(max(1, shards // size))
            if ranks is not None and size > 1:
                of_parts["sums over ranks"] = self._dealt.ranks_bytes(ranks)
        at_once = min(check_int("evaluated", evaluated, 0), EVALUATION_ROWS)
        return {
            "parameters": int(self.parameters.flat.nbytes),
            "gradients": int(self.parameters.grads.flat.nbytes),
            "running statistics": 2 * int(self.buffers.flat.nbytes),  # and what they were before a step
            **core.products.memory_parts(),
            "workspace of a step": core.workspace_bytes(rows, True) + int(core.spans.nbytes) + tail,
            "workspace of evaluation": core.workspace_bytes(at_once, False) if at_once else 0,
            **({"workspace of weights": core.weights_bytes(rows, at_once)} if core.weighs(weighted) else {}),
            **of_parts,
        }

    def reserve(self, batch_size: int) -> None:
        """Allocate the workspace for steps of up to ``batch_size`` rows, unless there is one already."""
        self._core.reserve(check_int("batch_size", batch_size, 1))

    # --- state ---

    def state_dict(self) -> dict[str, Any]:
        """Copies of all parameters and buffers by name, the dropout step, and tuned algorithms of matrix products."""
        with self.backend.scope():
            return copied(self._live_state())

    def _live_state(self) -> dict[str, Any]:
        """What :meth:`state_dict` copies."""
        with self.backend.scope():
            chosen = self._core.products.choices()
        return {
            "parameters": self.parameters,
            "buffers": self.buffers,
            "dropout_step": self._core.mode.step,
            **({"products": chosen} if chosen else {}),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what :meth:`state_dict` gave, all of it checked first; any backend accepts NumPy arrays.

        It has numbers alone, of layers of the same shapes: which activations lie between them, :func:`gpubatch.save`
        keeps.
        """
        check_names("state", state, ["parameters", "buffers", "dropout_step"], ["products"])
        if "products" in state:
            check_choices(state["products"])
        step = check_int("dropout_step", state["dropout_step"], 0, 2**64 - 1)
        found = {}
        for kind, own in (("parameters", self.parameters), ("buffers", self.buffers)):
            check_names(kind, state[kind], own)
            for name, view in own.items():
                value = self.backend.asarray(state[kind][name], own.dtype)
                if value.shape != view.shape:
                    raise ShapeError(f"{name} has shape {view.shape}, the state's has {value.shape}")
                found[kind, name] = value
        with self.backend.scope():
            for (kind, name), value in found.items():
                (self.parameters if kind == "parameters" else self.buffers)[name] = value
            if "products" in state:
                self._core.products.take_choices(state["products"])
        self._core.mode.step = step


def core_of(net: Network) -> Core:
    """The core that runs a network, for the packages that train, capture and explore it."""
    return net._core


def dealt_of(net: Network) -> DealtSteps:
    """What makes a network's training steps on batches in parts."""
    return net._dealt


def no_decay(net: Network) -> dict[str, dict[str, Any]]:
    """Groups for an optimizer with weight decay, by the names of parameters that usually are not decayed.

    They are those that their layers do not declare with ``l2=True``: biases, gamma and beta. As the first group that
    matches counts, your own go before them: ``groups={"W1": {"lr": 1e-4}, **gb.no_decay(net)}``.

    >>> net = gb.mlp([784, 256, 10], batch_norm=True)
    >>> opt = gb.AdamW(net.parameters, groups=gb.no_decay(net))
    """
    if not isinstance(net, Network):
        raise DTypeError(f"net must be a gpubatch.Network, got {type(net).__name__}")
    return {glob.escape(name): {"weight_decay": 0.0} for name in core_of(net).names_with(l2=False)}


def check_names(what: str, found: Any, known: Any, optional: Sequence[str] = ()) -> None:
    """``found`` must be a mapping with the names of ``known``, perhaps some of ``optional``, and no other."""
    if not isinstance(found, Mapping):
        raise DTypeError(f"{what} must be a mapping, got {type(found).__name__}")
    allowed = {*known, *optional}
    missing, extra = [n for n in known if n not in found], [n for n in found if n not in allowed]
    if missing or extra:
        raise ArgumentError(f"{what} must hold {', '.join(known) or 'nothing'}; missing {missing}, unknown {extra}")


# --- the usual stack -------------------------------------------------------------------------------------------------


@suggesting
def mlp(
    sizes: Sequence[int],
    activation: str | Activation | BoundActivation = "relu",
    batch_norm: bool = False,
    dropout: float = 0.0,
    loss: str | ScoreLoss | BoundScoreLoss | Loss = "softmax_cross_entropy",
    l2: float = 0.0,
    backend: str | Backend = "auto",
    dtype: Any = "float32",
    seed: int = 0,
    precision: str = "full",
    tune: bool = False,
    init: str | float = AUTO,
    output_bias: float | Sequence[float] | None = None,
) -> Network:
    """A network of Dense layers of the given sizes, with an activation between them.

    sizes: the widths, inputs first and outputs last.
    activation: a name, or a function declared with :func:`gpubatch.activation`.
    batch_norm: whether BatchNorm comes after every hidden Dense, before the activation.
    dropout: the rate of Dropout after every activation; 0 for none.
    init: how the weights of all layers start, as in :class:`Dense`. "v0.1" makes the network of gpubatch 0.1: "he", or
        "xavier" with activations other than relu, leaky_relu and gelu; "xavier" in the last layer; biases of 0, also
        before batch norm, where they do nothing. A run that 0.1 saved with batch norm is resumed with it.
    output_bias: how the last bias starts, a number or one for each output. The mean of the targets, ``Y.mean(axis=0)``,
        is what a regression would otherwise learn first.

    The other arguments are those of :class:`Network`.

    >>> net = gb.mlp([784, 256, 10], activation="relu", batch_norm=True)
    >>> net.parameters.size
    203786
    """
    if not hasattr(sizes, "__len__") or len(sizes) < 2:
        raise ArgumentError(f"sizes must be at least two integers, inputs first and outputs last, got {sizes!r}")
    *hidden, last, outputs = [check_int(f"sizes[{i}]", n, 1) for i, n in enumerate(sizes)]
    if isinstance(activation, str):
        kind: Callable[[], Layer] = ACTIVATIONS[check_choice("activation", activation, ACTIVATIONS)]
    else:
        kind = functools.partial(Elementwise, activation)
    batch_norm, dropout = check_bool("batch_norm", batch_norm), check_real("dropout", dropout, 0, 1, open_high=True)
    old, init_of_last = init == V0_1, init
    if old:
        # ReLU and its like halve the variance, which He's makes up for.
        init, init_of_last = "he" if activation in ("relu", "leaky_relu", "gelu") else "xavier", "xavier"
    elif isinstance(init, str):
        check_choice("init", init, [*INITS, AUTO, V0_1])
    layers: list[Layer] = []
    for inputs, features in itertools.pairwise([*hidden, last]):
        # Batch norm subtracts the mean, and with it a bias.
        layers.append(Dense(inputs, features, bias=old or not batch_norm, init=init))
        layers += [BatchNorm(features)] if batch_norm else []
        layers.append(kind())
        layers += [Dropout(dropout)] if dropout else []
    layers.append(Dense(last, outputs, init=init_of_last, bias_init=check_bias("output_bias", output_bias, outputs)))
    return Network(layers, loss, l2, backend, dtype, seed, precision, tune)
