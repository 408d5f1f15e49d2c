"""What runs a network: its layers and its loss in their workspaces, forward and backward, batch by batch.

Users see it as a :class:`~gpubatch.nn.network.Network`. The packages that train, capture and explore networks get the
:class:`Core` from :func:`~gpubatch.nn.network.core_of`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np

from gpubatch.backend import Array, Backend, compute_dtype
from gpubatch.errors import ArgumentError, NonFiniteError
from gpubatch.nn.batches import EVALUATION_ROWS, BatchChecks
from gpubatch.nn.checks import WatchedLayer, WatchedLoss, of_the_user
from gpubatch.nn.initial import declared, first_values
from gpubatch.nn.layers import BatchNorm, Dense, DenseActivation, Layer
from gpubatch.nn.losses import (
    NO_MEAN,
    Loss,
    OverScores,
    SoftmaxCrossEntropy,
    Weighing,
    counts_of,
    no_mean,
)
from gpubatch.nn.needs import Context, Mode
from gpubatch.nn.parts import PartSums
from gpubatch.nn.stack import Stacked, fused, parameter_names, stacked
from gpubatch.nn.workspace import (
    Arrange,
    Layout,
    OfThread,
    OwnedByThread,
    Pass,
    Workspace,
    evaluation_arrays,
    evenly,
    scratch_of,
    training_arrays,
    workspace_bytes,
)
from gpubatch.ops import COMPUTE, Space, ops_for, products_for
from gpubatch.own import changed

L2_BLOCK = 1 << 15  # elements that the l2 gradient takes at a time on the CPU, small enough for the cache


Held = TypeVar("Held")


class Reach(NamedTuple):
    """What a backward pass computes.

    first: the place in the stack of the layer where it ends.
    l2_spans: the weights to whose gradients the l2 term is added, as (start, stop) in the flat buffer.
    statistics: the places below of batch normalisation, whose running statistics are updated all the same.
    unwanted: gradients that a layer computes with the others although nobody trains the parameters; they become 0.
    """

    first: int
    l2_spans: Array
    statistics: tuple[int, ...] = ()
    unwanted: tuple[Array, ...] = ()


class Core:
    """Layers and a loss over one flat buffer of parameters, and the workspaces they run in.

    ``layers`` holds what the user gave; ``stack`` what runs, where Dense and its activation are one; backward ends at
    ``first``. ``mode`` counts the steps that dropout depends on. ``training`` is held by the thread that trains; others
    may evaluate while nobody does, each in a workspace of its own.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        loss: Loss,
        l2: float,
        backend: Backend,
        dtype: np.dtype[Any],
        seed: int,
        precision: str,
        tune: bool,
    ) -> None:
        self.layers = stacked(layers)
        self.given_loss, self.loss = loss, WatchedLoss(loss) if of_the_user(loss) else loss
        self.l2, self.backend, self.dtype = l2, backend, dtype
        self.compute_dtype = compute_dtype(dtype)
        if self.outputs < self.loss.least_outputs:
            raise ArgumentError(
                f"{loss.name} needs at least {self.loss.least_outputs} outputs, the last layer gives {self.outputs}; "
                "for yes or no use loss='sigmoid_cross_entropy'"
            )
        if self.loss.ignore_label is not None and not self.loss.takes_weights:
            raise ArgumentError(f"{loss.name} has ignore_label, but takes no weights: its class needs takes_weights")
        self.batches = BatchChecks(self.layers, self.loss, backend, dtype)
        self.xp, self.ops, self.mode = backend.xp, ops_for(backend, dtype), Mode(seed, training=True)
        self.training = OwnedByThread()
        largest = max((math.prod(p.shape) for run in self.layers for p in run.needs.parameters.values()), default=0)
        self.products = products_for(backend, dtype, precision, tune, largest)
        self.names = parameter_names(self.layers)
        self.parameters, self.buffers = first_values(self.layers, self.names, loss.classifies, seed, backend, dtype)
        self.loss_scale: Array = None
        if dtype == np.float16:
            self.loss_scale = backend.asarray(np.ones(1, self.compute_dtype))
        # The features of the batch norms that take the statistics of all ranks.
        self.in_sync = [run.inputs for run in self.layers if isinstance(run.layer, BatchNorm) and run.layer.sync]
        if self.in_sync and dtype == np.float16:
            raise ArgumentError("BatchNorm(sync=True) must not be in a network of precision='mixed'")
        self.stack = fused(self.layers)
        self._watched = {run.place: WatchedLayer(run) for run in self.layers if of_the_user(run.layer)}
        self.first = next(i for i, run in enumerate(self.stack) if run.needs.parameters)
        self.l2_names = self.names_with(l2=True) if l2 else []
        self.spans = self._spans_of(self.l2_names)
        self._reach = Reach(self.first, self.spans)
        self._remembered = backend.empty(self.buffers.size, self.compute_dtype), 0
        self._sums: Array = None  # of the gradients of micro-batches
        self.sums_of_parts: PartSums | None = None  # those of DealtSteps
        self.weighing = Weighing(backend, self.compute_dtype)
        self._training: Workspace[Pass] | None = None
        self._evaluation = OfThread()

    @property
    def inputs(self) -> int:
        """Features of a row of X."""
        return self.layers[0].inputs

    @property
    def outputs(self) -> int:
        """Numbers in a row of scores."""
        return self.layers[-1].needs.outputs

    @property
    def least_rows(self) -> int:
        """The smallest training batch: two rows where there is batch normalisation, else one."""
        return max(run.needs.least_rows for run in self.layers)

    @property
    def dropout_step(self) -> int:
        """How many training steps were made; dropout masks depend on it."""
        return self.mode.step

    def scale_gradients(self, factor: float) -> None:
        """Multiply the gradients of the loss, not those of the l2 term, by ``factor``; before the first step."""
        self.loss_scale = self.backend.asarray(np.full(1, factor, self.compute_dtype))

    # --- a training step ---

    def step(self, X: Array, Y: Array, weight: Array | None = None) -> Pass:
        """Make a training step, checked and counted; on a GPU without a wait, so without the values of Y and weight."""
        self.batches.check(X, Y, values=self.backend.name == "cpu", weight=weight)
        with self.training, self.backend.scope(), quiet():
            run = self.forward(X, Y, self.weights(Y, weight))
            if self.backend.name == "cpu" and math.isnan(run.loss.work["loss"].item()):
                self.batches.check_values(Y, weight)
            self.backward(run, X)
            self.mode.step += 1
        return run

    def weights(self, Y: Array, weight: Array | None, part: bool = False) -> Array | None:
        """The weights of the samples of a training batch, divided by their mean; None where all are equal.

        The array is valid until the next call. Without a mean all are NaN, or 0 in a ``part`` of a batch.
        """
        return self.weighing.of(self.loss, Y, weight, part)

    @property
    def sum_of_weights(self) -> float:
        """The sum of the weights that :meth:`weights` was given last; on a GPU this waits for the device."""
        return float(self.weighing.sum.item())

    def check_mean(self, X: Array, Y: Array, weight: Array | None) -> None:
        """Raise if the weights that :meth:`weights` was given last have no mean."""
        if not 0 < self.sum_of_weights < math.inf:
            self.finite(math.nan, X, Y, weight)

    def forward(self, X: Array, Y: Array, weights: Array | None = None, l2: bool = True) -> Pass:
        """Scores, loss with its gradient by them, and l2 term of a training batch; ``weights`` as :meth:`weights`."""
        self.reserve(len(X))
        assert self._training is not None
        run = self._training.bind(len(X))
        run.forward(X)
        self.loss.run(run.scores, Y, run.weighing(weights))
        if self.l2_names and l2:
            self.add_l2(run.loss)
        return run

    def backward(self, run: Pass, X: Array, l2: bool = True) -> None:
        """All gradients, from the last layer to the first that has parameters."""
        reach = self._reach
        run.backward(X, reach.first, reach.statistics)
        if l2:
            self.add_l2_gradient(run.loss)
        for gradient in reach.unwanted:
            gradient.fill(0)

    @functools.cached_property
    def kernel_calls(self) -> int | None:
        """How many compiled kernels forward and backward call, without weights.

        Labels must be of int64, and other targets rows of the network's dtype. None where they do anything besides that
        depends on the batch.
        """
        kinds = (OverScores,) if self.loss_scale is not None else (OverScores, SoftmaxCrossEntropy)
        if self.ops.library is None or self.l2_names or changed(self.loss):
            return None
        if not isinstance(self.loss, kinds) or of_the_user(self.loss):
            return None
        calls = 1
        for place, run in enumerate(self.stack):
            dense = run.layer.dense if isinstance(run.layer, DenseActivation) else run.layer
            if type(dense) is not Dense or changed(dense) or changed(run.layer):
                return None
            calls += 2 + 2 * bool(dense.bias) + (place > 0)
        return calls

    def add_l2_gradient(self, c: Context) -> None:
        """Add the gradient of the l2 term to those of the weights that it is of, and that are trained."""
        if len(self._reach.l2_spans):
            weights, grads = self.parameters.flat, self.parameters.grads.flat
            self.ops.l2_gradient(weights, self._reach.l2_spans, self.l2, grads, c.work)

    @contextlib.contextmanager
    def freezing(self, names: Collection[str]) -> Iterator[None]:
        """Inside a ``with``, the parameters in ``names`` have gradients of 0, which fully frozen layers do not compute.

        Layers below the lowest that is trained are left out, but for the running statistics of batch normalisation.
        """
        if not names:
            yield
            return
        before, places, first, unwanted = self._reach, set[int](), len(self.stack), list[Array]()
        for i, run in enumerate(self.stack):
            own = {self.names[run.place][name] for name in run.needs.parameters}
            if own and own <= set(names):
                places.add(run.place)
            # What a user's layer does with its buffers, it does in backward.
            if not own <= set(names) or (run.needs.buffers and type(run.layer) is not BatchNorm):
                first = min(i, first)
            asks = run.place in places and type(run.layer) in (Dense, DenseActivation) and not changed(run.layer)
            if i >= first and not asks:
                unwanted += [self.parameters.grads[name] for name in own & set(names)]
        statistics = tuple(i for i, run in enumerate(self.stack[:first]) if run.needs.buffers)
        l2_spans = self._spans_of([name for name in self.l2_names if name not in names])
        with self.backend.scope():
            for name in names:
                self.parameters.grads[name].fill(0)
        try:
            self.mode.frozen = frozenset(places)
            self._reach = Reach(first, l2_spans, statistics, tuple(unwanted))
            yield
        finally:
            self.mode.frozen, self._reach = frozenset(), before

    def add_l2(self, c: Context) -> None:
        """Add the l2 term to the loss in a workspace."""
        self.ops.l2_loss(self.parameters.flat, self.spans, self.l2 / 2, c.work["loss"], c.work)

    def batch(self, X: Array, Y: Array, weights: Array | None = None, weight: Array | None = None) -> float:
        """Compute the loss of these rows, which must be finite, and their gradients.

        ``weights`` are made of ``weight``, as :meth:`weights` does, which is for messages.
        """
        run = self.forward(X, Y, weights)
        loss = self.finite(run.loss.work["loss"].item(), X, Y, weight)
        self.backward(run, X)
        return loss

    def micro_batches(
        self,
        X: Array,
        Y: Array,
        weights: Array | None,
        rows: int | None,
        one: Callable[[Array, Array, Array | None, float], None],
    ) -> None:
        """Add up the gradients of a batch from about equal parts of at most ``rows`` rows; ``one`` computes each.

        Without ``rows``, or if they hold the whole batch, there is one part. ``weights`` are those of the whole batch,
        whose mean is 1: the means of the parts, each with its share, add up to the mean of the batch.
        """
        if rows is None or len(X) <= rows:
            one(X, Y, weights, 1.0)
            return
        if self._sums is None:
            self._sums = self.backend.empty(self.parameters.flat.shape, self.compute_dtype)
        grads, first = self.parameters.grads.flat, self.mode.row
        self._sums.fill(0)
        for part in evenly(len(X), rows, self.least_rows):
            share = (part.stop - part.start) / len(X)
            self.mode.row = first + part.start
            try:
                one(X[part], Y[part], None if weights is None else weights[part], share)
            finally:
                self.mode.row = first
            if self._sums.dtype == grads.dtype:
                grads *= share
                self._sums += grads
            else:  # the product would be rounded to float16, or need an array of its own
                self._sums /= share
                self._sums += grads
                self._sums *= share
        grads[...] = self._sums

    def enqueue(
        self,
        X: Array,
        Y: Array,
        weight: Array | None,
        step: Array,
        micro_batch_size: int,
        add: Callable[[Array, float], None],
    ) -> Any:
        """Launch what a training step launches on a GPU, and nothing else, so that it can be captured in a CUDA graph.

        Nothing is checked. ``step``, an int64 on the device, is that of dropout. ``add(loss, share)`` is called with
        the loss of each micro-batch, an array of one element, and its share of the batch. Returns the objects that own
        the memory the graph works in: keep them as long as the graph.
        """

        def one(x: Array, y: Array, weights: Array | None, share: float) -> None:
            run = self.forward(x, y, weights)
            add(run.loss.work["loss"], share)
            self.backward(run, x)

        with self.enqueueing(step):
            self.micro_batches(X, Y, self.weights(Y, weight), micro_batch_size, one)
        return self.owned

    @contextlib.contextmanager
    def enqueueing(self, step: Array) -> Iterator[None]:
        """Inside a ``with``, train with dropout step ``step``, an int64 on the device."""
        with self.training:
            own, self.mode.step = self.mode.step, step.view(np.uint64)
            try:
                yield
            finally:
                self.mode.step = own

    @property
    def owned(self) -> tuple[Any, ...]:
        """The objects that own the memory a training step works in."""
        return self._training, self._sums, self.weighing.owned, self._reach, self.products

    def context_of_loss(self) -> Context:
        """The arrays of the loss in the workspace for training."""
        self.reserve(1)
        assert self._training is not None
        return self._training.bind(self.planned).loss

    @property
    def statistics_before(self) -> Array:
        """The running statistics that :meth:`remember` saved last."""
        return self._remembered[0]

    def count_steps(self, steps: int) -> None:
        """Count training steps that were made by :meth:`enqueue`."""
        self.mode.step += steps

    def rehearse(self, X: Array, Y: Array, weight: Array | None = None) -> None:
        """Make a training step that leaves nothing but its workspace and the gradients: proof that the batch fits."""
        self.remember()
        try:
            self.step(X, Y, weight)
            self.backend.synchronize()
        finally:
            self.recall()

    def remember(self) -> None:
        """Save what a training step changes besides the gradients: running statistics, and the dropout step."""
        if self.buffers.size:
            with self.backend.scope():
                self._remembered[0][...] = self.buffers.flat
        self._remembered = self._remembered[0], self.mode.step

    def recall(self) -> None:
        """Restore what :meth:`remember` saved last, to undo a step."""
        with self.backend.scope():
            self.buffers.flat[...], self.mode.step = self._remembered

    # --- evaluation ---

    def evaluate(self, X: Array, rows: int = EVALUATION_ROWS) -> Iterator[tuple[slice, Pass]]:
        """Compute the scores of X, at most ``rows`` rows at a time, in the thread's workspace for evaluation."""
        self.training.check()
        most, own = min(len(X), rows), self._evaluation
        if own.workspace is None or most > own.workspace.rows:
            own.workspace = self.released(own.workspace)
            own.workspace = self._workspace(most, self._evaluation_pass)
        workspace = own.workspace
        for start in range(0, len(X), most):
            part = slice(start, min(start + most, len(X)))
            run = workspace.bind(part.stop - start)
            run.forward(X[part])
            yield part, run

    def apart(self, rows: int) -> Workspace[Pass]:
        """A separate workspace for evaluation, in which each of the user's layers runs by itself."""
        return self._workspace(rows, functools.partial(self._evaluation_pass, stack=self.layers))

    # --- memory ---

    @property
    def planned(self) -> int:
        """The largest batch that the training workspace can hold."""
        return 0 if self._training is None else self._training.rows

    def workspace_bytes(self, rows: int, training: bool) -> int:
        """Bytes of the workspace for batches of ``rows`` rows; allocates nothing."""
        return workspace_bytes(self.dtype, rows, self._training_pass if training else self._evaluation_pass)

    def weighs(self, weighted: bool) -> bool:
        """Whether samples have weights: given ones, or labels are ignored."""
        return weighted or self.loss.ignore_label is not None

    def weights_bytes(self, rows: int, evaluated: int) -> int:
        """Bytes for the weights of a batch and of the rows evaluated at a time, and NumPy's for which of them are 0."""
        return (self.compute_dtype.itemsize + 1) * (rows + evaluated) + 16

    def reserve(self, rows: int) -> None:
        """Allocate the workspace for steps of up to ``rows`` rows, unless there is one already."""
        if rows > self.planned:
            self._training = self.released(self._training)
            self._training = self._workspace(rows, self._training_pass)

    def release(self) -> None:
        """Free the workspaces; the next step or evaluation allocates new ones."""
        self._training = self.released(self._training)
        self.sums_of_parts = self.released(self.sums_of_parts)
        self.released(self._evaluation.workspace)
        self._evaluation = OfThread()  # the workspaces of all threads

    def _workspace(self, rows: int, arrange: Arrange[Pass]) -> Workspace[Pass]:
        return Workspace(self.backend, self.dtype, rows, self.outputs, arrange)

    def released(self, old: Held | None) -> Held | None:
        """Return None in place of ``old``, so that its memory is free before the next workspace is allocated."""
        if old is not None:
            # The stream that allocated it may reuse its memory at once, and may not be the stream that works in it.
            self.backend.synchronize()
        return None

    def _training_pass(self, layout: Layout, constants: Mapping[str, Array]) -> Pass:
        loss = layout.arrays(self._loss_spaces())
        afterwards: dict[str, Space] = {}
        if self.l2_names and self.backend.name == "cpu":
            largest = max(int(self.parameters[name].size) for name in self.l2_names)
            afterwards["l2"] = (min(largest, L2_BLOCK),), COMPUTE
        scratch = scratch_of(self.stack, self.ops, training=True)
        arrays, last = training_arrays(layout, self.stack, scratch, self.first, loss["dz"], afterwards)
        return self._pass(self.stack, arrays, {**loss, **last, **constants}, self.mode)

    def _evaluation_pass(
        self, layout: Layout, constants: Mapping[str, Array], stack: Sequence[Stacked] | None = None
    ) -> Pass:
        stack = self.stack if stack is None else stack
        loss = layout.arrays(self._loss_spaces())
        arrays = evaluation_arrays(layout, stack, scratch_of(stack, self.ops, training=False))
        return self._pass(stack, arrays, {**loss, **constants}, Mode(self.mode.seed))

    def _loss_spaces(self) -> Mapping[str, Space]:
        """What the loss and the l2 term work in."""
        l2 = self.ops.scratch(["l2_loss"], self.outputs) if self.l2_names else {}
        return {**self.loss.workspace(self.outputs), **l2}

    def _pass(
        self,
        stack: Sequence[Stacked],
        arrays: Sequence[tuple[Array, Array, Mapping[str, Array]]],
        of_loss: Mapping[str, Array],
        mode: Mode,
    ) -> Pass:
        """The calls of a stack, each with the arrays that it works on."""
        if self.loss_scale is not None:
            of_loss = {**of_loss, "factor": self.loss_scale}
        loss = Context(
            *(self.backend, self.xp, self.ops, len(self.layers), mode),
            *({}, {}, {}, of_loss, self.products),
        )
        calls = []
        for (layer, place, _, needs), (y, dx, work) in zip(stack, arrays, strict=True):
            names = self.names[place]
            context = dataclasses.replace(
                loss,
                index=place,
                p={name: self.parameters[names[name]] for name in needs.parameters},
                g={name: self.parameters.grads[names[name]] for name in needs.parameters},
                buffers={name: self.buffers[names[name]] for name in needs.buffers},
                work=work,
            )
            calls.append((self._watched.get(place, layer), y, dx, context))
        return Pass(calls, loss)

    def names_with(self, l2: bool) -> list[str]:
        """The names of the parameters whose layers declare that the l2 term counts them, or of the others."""
        return [self.names[run.place][name] for run, name, p in declared(self.layers, "parameters") if p.l2 == l2]

    def _spans_of(self, names: Sequence[str]) -> Array:
        """Where these parameters lie in the flat buffer, as rows (start, stop) on the device."""
        spans = [self.parameters.spans[name] for name in names]
        return self.backend.asarray(np.array(spans, np.int64).reshape(-1, 2))

    # --- checks ---

    def finite(self, loss: float, X: Array, Y: Array, weight: Array | None = None) -> float:
        """The loss, if it is finite; otherwise an error that says why it may not be."""
        if math.isfinite(loss):
            return loss
        self.batches.check_values(Y, weight)
        if no_mean(counts_of(self.loss, Y, weight)):
            raise NonFiniteError(f"loss is {loss} for a batch of shape {X.shape}: {NO_MEAN}")
        if not all(self.xp.isfinite(X[part]).all().item() for part in evenly(len(X), EVALUATION_ROWS)):
            cause = "X holds NaN or infinity"
        elif not self.xp.isfinite(self.parameters.flat).all().item():
            cause = "the parameters hold NaN or infinity, so an earlier step was too large: lower the learning rate"
        else:
            cause = "the scores have grown out of range: lower the learning rate, or look at the scale of X and Y"
        raise NonFiniteError(f"loss is {loss} for a batch of shape {X.shape} after {self.mode.step} steps; {cause}")


def quiet() -> np.errstate:
    """Overflow and NaN show in the loss, not as warnings of single operations."""
    return np.errstate(over="ignore", invalid="ignore", divide="ignore")
