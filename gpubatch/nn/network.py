"""A stack of layers over one flat buffer of parameters, run in a workspace that is planned before the first step.

The workspace is one block of memory. :meth:`Network.lay_out` says where every array of a batch lies in it, so its size
is known before anything is allocated, and a smaller batch runs in views of the same block.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from gpubatch.backend import Array, Backend, compute_dtype, float_dtype, get_backend
from gpubatch.errors import (
    ArgumentError,
    DTypeError,
    NonFiniteError,
    ShapeError,
    check_bool,
    check_choice,
    check_int,
    check_real,
)
from gpubatch.formula import Activation, BoundActivation, BoundScoreLoss, ScoreLoss
from gpubatch.nn import losses
from gpubatch.nn.layers import ACTIVATIONS, BatchNorm, Dense, Dropout, Elementwise, Layer
from gpubatch.nn.needs import Context, Mode, Needs, Normal, Parameter, Shape
from gpubatch.nn.workspace import (
    SIZES_KEPT,
    Layout,
    Pass,
    Place,
    Plan,
    Stage,
    Workspace,
    evenly,
    in_turns,
    run_layers,
    stacked,
)
from gpubatch.ops import COMPUTE, PRECISIONS, SUM_PARTS, check_choices, ops_for, philox_generator, products_for
from gpubatch.own import as_written
from gpubatch.params import FlatViews, Parameters, by_alignment

__all__ = ["Network", "mlp"]

EVALUATION_ROWS = 1024  # rows that are evaluated at a time: large enough for full speed, and a bound on memory
COMPARED = 1 << 15  # scores that are compared with labels at a time, since predictions are new arrays
DRAWN = 1 << 16  # elements of first values that are drawn at a time: in double precision all would be the largest array
MIXED = "mixed"  # the precision beside those of products
L2_BLOCK = 1 << 15  # elements that the l2 gradient takes at a time on the CPU, small enough for the cache


# --- the network -----------------------------------------------------------------------------------------------------


@as_written
class Network:
    """Layers, one after another, and a loss.

    ``l2`` adds l2/2 * Σ W² over the weights of Dense layers (not biases, gamma and beta) to the loss. ``seed``, an
    integer of 64 bits, decides the first weights and the dropout masks, the same on CPU and GPU.

    ``precision="fast"`` lets a GPU multiply float32 matrices as TF32: their elements are rounded to 10 bits of mantissa
    and not 23, a relative error of up to 5e-4 in each, and the products are added up in float32. It takes
    nvmath-python. On the CPU, and with float64, it computes as "full" does.

    ``precision="mixed"`` stores parameters, batches, activations and all gradients as float16, half the memory and
    half the traffic, and computes in float32: matrix products are added up in it, and the loss, means, variances and
    running statistics are of ``compute_dtype`` (Micikevicius et al., arXiv:1710.03740). X is float16 then, which
    ``Loader(dtype="float16")`` makes; scores are float32. Gradients below 6e-8 are zero in float16, so they are those
    of the loss times ``loss_scale``, an array of one number on the device: 1 at first, and while ``fit`` trains what a
    :class:`~gpubatch.train.LossScale` says. The optimizer needs ``master_weights=True``. On the CPU it is for
    trying things out: every operation makes float32 copies of its arrays, which no plan counts.

    ``tune=True`` has a GPU time the algorithms that cuBLASLt has for each matrix product, when it is first seen, and
    use the fastest; it takes nvmath-python, and a second or so. Otherwise the algorithm is the one that cuBLASLt
    foretells to be the fastest. What was chosen is part of :meth:`state_dict`, and so of a checkpoint, since another
    algorithm rounds otherwise: a run that is resumed with the same cuBLASLt on such a GPU has the same bits, and a
    :class:`TuningWarning` says where it has not. On the CPU there is nothing to choose.

    ``parameters`` holds those of the k-th layer of a kind under the number k: W1, b1, gamma1, beta1, W2, ..., in this
    order but for arrays of odd sizes, which come last: the others are aligned in memory then. ``buffers`` likewise
    holds running_mean1, running_var1, ... A network is not to be used by two threads at a time, since they would share
    its workspace.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        loss: str | ScoreLoss | BoundScoreLoss | losses.Loss = "softmax_cross_entropy",
        l2: float = 0.0,
        backend: str | Backend = "auto",
        dtype: Any = "float32",
        seed: int = 0,
        precision: str = "full",
        tune: bool = False,
    ) -> None:
        self.layers = tuple(layers)
        self.loss_function = losses.loss_of(loss)
        self.l2 = check_real("l2", l2, 0)
        self.precision = check_choice("precision", precision, [*PRECISIONS, MIXED])
        self.tune = check_bool("tune", tune)
        self.dtype = float_dtype(dtype)
        if precision == MIXED and self.dtype != np.float32:
            raise ArgumentError(f"dtype must be float32 with precision='mixed', which computes in it, got {dtype!r}")
        if precision == MIXED:
            self.dtype = np.dtype(np.float16)
        self.compute_dtype = compute_dtype(self.dtype)
        self.seed = check_int("seed", seed, 0, 2**64 - 1)
        self.widths = chain_widths(self.layers)
        self.needs = [layer.needs(n) for layer, n in zip(self.layers, self.widths[:-1], strict=True)]
        if self.outputs < self.loss_function.least_outputs:
            raise ArgumentError(
                f"{self.loss_name} needs at least {self.loss_function.least_outputs} outputs, "
                f"the last layer gives {self.outputs}; for yes or no use loss='sigmoid_cross_entropy'"
            )
        self.backend = get_backend(backend)
        self._xp = self.backend.xp
        self.ops = ops_for(self.backend, self.dtype)
        of_products = "full" if precision == MIXED else precision
        largest = max((math.prod(p.shape) for needs in self.needs for p in needs.parameters.values()), default=0)
        self.products = products_for(self.backend, self.dtype, of_products, tune, largest)
        self._mode = Mode(self.seed)
        self._names = parameter_names(self.layers, self.needs)
        self._make_parameters()
        self._stack = stacked(self.layers, self.widths)
        self._first = next(i for i, run in enumerate(self._stack) if run.needs.parameters)  # backward ends here
        self._weights = [self._names[i][name] for i, name, p in self._declared("parameters") if p.l2] if self.l2 else []
        spans = [self.parameters.spans[name] for name in self._weights]
        self._spans = self.backend.asarray(np.array(spans, np.int64).reshape(-1, 2))  # where l2 acts
        self._remembered = self.backend.empty(self.buffers.size, self.compute_dtype), 0
        self.loss_scale: Array = None
        if precision == MIXED:
            self.loss_scale = self.backend.asarray(np.ones(1, self.compute_dtype))
        self._sums: Array = None  # of the gradients of micro-batches
        self._training = self._evaluation = Workspace(0, None, None, None)

    @property
    def loss_name(self) -> str:
        """What the loss is called."""
        return self.loss_function.name

    @property
    def inputs(self) -> int:
        """Features of a row of X."""
        return self.widths[0]

    @property
    def outputs(self) -> int:
        """Numbers in a row of scores."""
        return self.widths[-1]

    @property
    def dropout_step(self) -> int:
        """How many training steps were made; dropout masks depend on it."""
        return self._mode.step

    @property
    def planned(self) -> int:
        """The largest batch for which a training workspace is there."""
        return self._training.rows

    def __deepcopy__(self, memo: Any) -> Network:
        common = self.backend, self.compute_dtype, self.seed, self.precision, self.tune
        twin = Network(self.layers, self.loss_function, self.l2, *common)
        twin.load_state_dict(self.state_dict())
        return twin

    def __reduce__(self) -> Any:
        raise DTypeError("a Network cannot be pickled; save its state_dict() and make it again")

    def __repr__(self) -> str:
        layers = ", ".join(map(repr, self.layers))
        options = "" if self.precision == "full" else f", precision={self.precision!r}"
        options += ", tune=True" if self.tune else ""
        dtype = self.compute_dtype.name
        return f"Network([{layers}], loss={self.loss_name!r}, l2={self.l2}, dtype={dtype!r}{options})"

    # --- training ---

    def loss_and_grad(self, X: Array, Y: Array, micro_batch_size: int | None = None) -> tuple[float, FlatViews]:
        """The loss of a training step, as a float, and its gradients, which overwrite ``parameters.grads``.

        ``micro_batch_size`` is how many rows are computed at a time, by default all: a workspace of that size will do,
        and the gradients of the micro-batches are added up. To rounding the result is the same, with the same dropout;
        but BatchNorm takes the statistics of each micro-batch, of no fewer than two rows.

        Raises NonFiniteError where the loss is NaN or infinite; running statistics and dropout are then as before.
        """
        self._check_batch(X, Y, values=True)
        loss = 0.0

        def add(x: Array, y: Array, share: float) -> None:
            nonlocal loss
            loss += share * self._micro_batch(x, y)

        with self.backend.scope(), quiet():
            if micro_batch_size is None or len(X) <= check_int("micro_batch_size", micro_batch_size, 1):
                loss = self._micro_batch(X, Y)
            else:
                self.remember()
                try:
                    self._micro_batches(X, Y, micro_batch_size, add)
                except BaseException:
                    self.recall()
                    raise
        self._mode.step += 1
        return loss, self.parameters.grads

    def _micro_batch(self, X: Array, Y: Array) -> float:
        """The loss of these rows; their gradients are in ``parameters.grads``."""
        run = self._forward(X, Y)
        loss = self._finite(run.loss.work["loss"].item(), X, Y)
        self._backward(run, X)
        return loss

    def _micro_batches(self, X: Array, Y: Array, rows: int, one: Callable[[Array, Array, float], None]) -> None:
        """The gradients of a batch from parts of at most ``rows`` rows, about equal; ``one`` makes those of each."""
        if self._sums is None:
            self._sums = self.backend.empty(self.parameters.flat.shape, self.compute_dtype)
        grads = self.parameters.grads.flat
        self._sums.fill(0)
        for part in evenly(len(X), rows, self.least_rows):
            share = (part.stop - part.start) / len(X)
            self._mode.row = part.start
            try:
                one(X[part], Y[part], share)
            finally:
                self._mode.row = 0
            if self._sums.dtype == grads.dtype:
                grads *= share
                self._sums += grads
            else:  # neither is the product rounded to float16, nor is there an array for it
                self._sums /= share
                self._sums += grads
                self._sums *= share
        grads[...] = self._sums

    def step_loss(self, X: Array, Y: Array) -> Array:
        """:meth:`loss_and_grad` without waiting for the device: the loss as an array of one element.

        The next step overwrites it. Whether the loss is finite is not checked; nor, on a GPU, are the values of Y.
        """
        self._check_batch(X, Y, values=self.backend.name == "cpu")
        with self.backend.scope(), quiet():
            run = self._forward(X, Y)
            if self.backend.name == "cpu" and math.isnan(run.loss.work["loss"].item()):
                self.loss_function.check_values(Y, self.outputs)
            self._backward(run, X)
        self._mode.step += 1
        return run.loss.work["loss"]

    def enqueue(
        self, X: Array, Y: Array, step: Array, micro_batch_size: int, add: Callable[[Array, float], None]
    ) -> Any:
        """What :meth:`loss_and_grad` starts on a GPU, and nothing else, so that it can be captured in a CUDA graph.

        Nothing is checked. ``step``, an int64 on the device, is that of dropout. ``add(loss, share)`` is called with
        the loss of each micro-batch, an array of one element, and its share of the batch. Returns what has the memory
        that is worked in: to be kept as long as the graph.
        """

        def one(x: Array, y: Array, share: float) -> None:
            run = self._forward(x, y)
            add(run.loss.work["loss"], share)
            self._backward(run, x)

        own, self._mode.step = self._mode.step, step.view(np.uint64)
        try:
            if len(X) <= micro_batch_size:
                one(X, Y, 1.0)
            else:
                self._micro_batches(X, Y, micro_batch_size, one)
        finally:
            self._mode.step = own
        return self._training, self._sums, self.products

    def passed(self, steps: int) -> None:
        """Count training steps that were made by :meth:`enqueue`."""
        self._mode.step += steps

    def rehearse(self, X: Array, Y: Array) -> None:
        """A training step that leaves nothing but its workspace and ``parameters.grads``: proof that the batch fits."""
        self.remember()
        try:
            self.step_loss(X, Y)
            self.backend.synchronize()
        finally:
            self.recall()

    def remember(self) -> None:
        """Note what a training step changes beside the gradients: running statistics, and the step of dropout."""
        with self.backend.scope():
            self._remembered[0][...] = self.buffers.flat
        self._remembered = self._remembered[0], self._mode.step

    def recall(self) -> None:
        """Go back to what was noted last, since the step was not completed or is not wanted."""
        with self.backend.scope():
            self.buffers.flat[...], self._mode.step = self._remembered

    # --- evaluation ---

    def loss(self, X: Array, Y: Array, training: bool = False) -> float:
        """Mean loss and l2 term, with running statistics and without dropout; changes nothing.

        ``training=True`` takes batch statistics and the dropout of the step to come. Raises NonFiniteError where the
        loss is NaN or infinite.
        """
        if not training:
            return self.evaluate(X, Y)[0]
        self._check_batch(X, Y, values=True)
        with self.backend.scope(), quiet():
            return self._finite(self._forward(X, Y).loss.work["loss"].item(), X, Y)

    def evaluate(self, X: Array, Y: Array, rows: int = EVALUATION_ROWS) -> tuple[float, float | None]:
        """:meth:`loss` and :meth:`accuracy` in one pass; no accuracy (None) where nothing is right or wrong, as in mse.

        At most ``rows`` rows are computed at a time. Raises NonFiniteError where the loss is NaN or infinite.
        """
        check_int("rows", rows, 1)
        self._check_batch(X, Y, values=True)
        with self.backend.scope(), quiet():
            total = 0.0
            right = compared = 0
            for part, run in self._evaluate(X, rows):
                self.loss_function.run(run.scores, Y[part], run.loss)
                total += run.loss.work["loss"].item() * len(run.scores)
                at_once = max(1, COMPARED // self.outputs) if self.loss_function.classifies else 0
                for some in evenly(len(run.scores), at_once) if at_once else ():
                    truth = self.loss_function.truth(Y[part][some], self.outputs)
                    right += (self.loss_function.predict(run.scores[some]) == truth).sum().item()
                    compared += truth.size
            loss = total / len(X)
            if self._weights:
                penalty = run.loss.work["loss"]
                penalty.fill(0)
                self._add_l2(penalty, run.loss.work)
                loss += penalty.item()
            self._finite(loss, X, Y)
        return loss, right / compared if self.loss_function.classifies else None

    def scores(self, X: Array) -> Array:
        """What the last layer gives, ``(batch, outputs)``, as a new array of ``compute_dtype``."""
        self._check_inputs(X)
        result = self.backend.empty((len(X), self.outputs), self.compute_dtype)
        with self.backend.scope(), quiet():
            for part, run in self._evaluate(X):
                result[part] = run.scores
        return result

    def predict(self, X: Array) -> Array:
        """Labels as int64: the highest score's class, or 1 where a score is above 0; with mse the scores themselves.

        Shape ``(batch,)``; with sigmoid_cross_entropy and mse that of the scores, but ``(batch,)`` for one yes or no.
        """
        scores = self.scores(X)
        with self.backend.scope():
            return self.loss_function.predict(scores)

    def accuracy(self, X: Array, Y: Array) -> float:
        """The fraction of predictions that are right."""
        self._check_batch(X, Y, values=True)
        with self.backend.scope():
            self.loss_function.check_values(Y, self.outputs)
            return float((self.loss_function.truth(Y, self.outputs) == self.predict(X)).mean())

    # --- memory ---

    def memory(self, batch_size: int) -> int:
        """Bytes that training with this batch size and evaluation take, X and Y apart; nothing is allocated."""
        return sum(self.memory_parts(batch_size).values())

    def memory_parts(self, batch_size: int, evaluated: int = EVALUATION_ROWS) -> dict[str, int]:
        """:meth:`memory` by what it is for; ``evaluated`` is how many rows are evaluated, of which 1024 at a time."""
        rows = check_int("batch_size", batch_size, 1)
        at_once = min(check_int("evaluated", evaluated, 0), EVALUATION_ROWS)
        return {
            "parameters": int(self.parameters.flat.nbytes),
            "gradients": int(self.parameters.grads.flat.nbytes),
            "running statistics": 2 * int(self.buffers.flat.nbytes),  # and what they were before a step
            **self.products.memory_parts(),
            "workspace of a step": self._workspace_bytes(rows, True) + int(self._spans.nbytes),
            "workspace of evaluation": self._workspace_bytes(at_once, False) if at_once else 0,
        }

    def plan(self, batch_size: int) -> None:
        """Allocate the workspace for steps of up to ``batch_size`` rows, where there is no such workspace yet."""
        rows = check_int("batch_size", batch_size, 1)
        if rows > self._training.rows:
            self._training = self._without(self._training)
            self._training = self._allocate(rows, True)

    def release(self) -> None:
        """Give the workspaces back; the next step or evaluation allocates its own."""
        self._training, self._evaluation = self._without(self._training), self._without(self._evaluation)

    @property
    def least_rows(self) -> int:
        """The smallest training batch: two rows where there is batch normalisation, else one."""
        return max(needs.least_rows for needs in self.needs)

    def lay_out(self, rows: int, training: bool) -> Plan:
        """Where every array of a pass over ``rows`` rows lies."""
        return self._lay_out_training(rows) if training else self._lay_out_evaluation(rows)

    def _lay_out_training(self, rows: int) -> Plan:
        """Outputs and what a layer keeps last until backward; gradients take turns in two places."""
        layout = Layout(rows, self.dtype)
        loss = layout.places(self._loss_spaces())
        ys: list[Place] = []
        kept = []
        for i, run in enumerate(self._stack):
            read = "x" in run.needs.reads or i == 0 or "y" in self._stack[i - 1].needs.reads
            ys.append(ys[-1] if run.needs.in_place and not read else layout.place((-1, run.needs.outputs)))
            kept.append(layout.places(run.needs.kept))

        dxs: list[Place | None] = [None] * len(self._stack)
        below = range(len(self._stack) - 1, self._first, -1)  # the layers whose dx is wanted
        apart = [i for i in below if not self._stack[i].needs.in_place]
        turns = dict(zip(apart, in_turns(layout, [self._stack[i].inputs for i in apart]), strict=True))
        dx = loss["dz"]
        for i in below:
            dxs[i] = dx = turns.get(i, dx)

        stages, ends = [], [layout.end]
        for i in range(len(self._stack)):
            call = layout.branch()  # scratch lasts for one call, so every layer's begins in the same place
            stages.append(Stage(ys[i], dxs[i], {**kept[i], **call.places(self._scratch(i))}))
            ends.append(call.end)
        if self._weights and self.backend.name == "cpu":
            call = layout.branch()
            largest = max(int(self.parameters[name].size) for name in self._weights)
            loss["l2"] = call.place((min(largest, L2_BLOCK),), COMPUTE)
            ends.append(call.end)
        return Plan(stages, loss, max(ends))

    def _lay_out_evaluation(self, rows: int) -> Plan:
        """Nothing outlasts the next layer: outputs take turns in two places, all the rest shares one."""
        layout = Layout(rows, self.dtype)
        loss = layout.places(self._loss_spaces())
        apart = [i for i, run in enumerate(self._stack) if not run.needs.in_place or i == 0]
        turns = dict(zip(apart, in_turns(layout, [self._stack[i].needs.outputs for i in apart]), strict=True))
        y, stages, ends = turns[0], [], [layout.end]
        for i, run in enumerate(self._stack):
            call = layout.branch()
            y = turns.get(i, y)
            stages.append(Stage(y, None, call.places({**run.needs.kept, **self._scratch(i)})))
            ends.append(call.end)
        return Plan(stages, loss, max(ends))

    def _loss_spaces(self) -> Mapping[str, losses.Space]:
        """What the loss and the l2 term work in: NumPy's square, and the partial sums of a GPU."""
        l2: dict[str, losses.Space] = {"squares": ((1, 1), COMPUTE), "parts": ((SUM_PARTS,), np.float64)}
        return {**self.loss_function.workspace(self.outputs), **(l2 if self._weights else {})}

    def _scratch(self, i: int) -> Mapping[str, tuple[Shape, Any]]:
        """The scratch of stage i, with NumPy's where that works: without kernels, or on X, which may be strided."""
        needs = self._stack[i].needs
        numpy = self.ops.plain or (self.backend.name == "cpu" and i == 0 and needs.in_place)
        return {**needs.scratch, **needs.plain} if numpy else needs.scratch

    # --- state ---

    def state_dict(self) -> dict[str, Any]:
        """Copies of all parameters and buffers by name, and the step of dropout.

        Where algorithms of matrix products were chosen, also these: ``products``.
        """
        with self.backend.scope():
            chosen = self.products.choices()
            return {
                "parameters": {name: value.copy() for name, value in self.parameters.items()},
                "buffers": {name: value.copy() for name, value in self.buffers.items()},
                "dropout_step": self._mode.step,
                **({"products": chosen} if chosen else {}),
            }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave; NumPy arrays will do on any backend. All is checked before."""
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
                self.products.take_choices(state["products"])
        self._mode.step = step

    # --- inside ---

    def _declared(self, kind: str) -> Iterator[tuple[int, str, Parameter]]:
        for i, needs in enumerate(self.needs):
            for name, parameter in getattr(needs, kind).items():
                yield i, name, parameter

    def _make_parameters(self) -> None:
        """Draw on the host in double precision, so that CPU and GPU, float32 and float64 start from the same values."""
        shapes = {self._names[i][name]: p.shape for i, name, p in self._declared("parameters")}
        if not shapes:
            raise ArgumentError("layers must hold at least one layer with parameters, such as Dense")
        self.parameters = Parameters(by_alignment(shapes), self.backend, self.dtype)
        kept = {self._names[i][name]: p.shape for i, name, p in self._declared("buffers")}
        self.buffers = FlatViews(self.backend.zeros(sum(map(math.prod, kept.values())), self.compute_dtype), kept)
        for i, needs in enumerate(self.needs):
            draw = philox_generator(self.seed, i)
            for own, wanted in ((self.parameters, needs.parameters), (self.buffers, needs.buffers)):
                for name, p in wanted.items():
                    view = own[self._names[i][name]]
                    with self.backend.scope():
                        if not callable(p.init):
                            view.fill(p.init)
                            continue
                        rows = max(1, DRAWN // math.prod(p.shape[1:])) if isinstance(p.init, Normal) else p.shape[0]
                        for part in evenly(p.shape[0], rows):
                            values = p.init(draw, (part.stop - part.start, *p.shape[1:]))
                            view[part] = self.backend.asarray(values, own.dtype)

    def _workspace_bytes(self, rows: int, training: bool) -> int:
        return self.lay_out(rows, training).size + 8 * rows + 4  # and the offsets, and the ticket

    def _allocate(self, rows: int, training: bool) -> Workspace:
        block = self.backend.empty(self.lay_out(rows, training).size, np.uint8)
        offsets = self.backend.asarray(np.arange(rows) * self.outputs)
        return Workspace(rows, block, offsets, self.backend.zeros(1, np.uint32))

    def _without(self, old: Workspace) -> Workspace:
        """What stands for ``old`` until a new one is asked for, so that its memory can be given back before."""
        if old.rows:
            # It goes to the next work of the stream on which it was taken, which need not be the one that works in it.
            self.backend.synchronize()
        return Workspace(0, None, None, None)

    def _bound(self, workspace: Workspace, rows: int, training: bool) -> Pass:
        """The views for a batch of ``rows``, made when the size is first seen."""
        if (found := workspace.passes.get(rows)) is not None:
            return found
        plan = self.lay_out(rows, training)
        views: dict[Place, Array] = {}

        def view(place: Place) -> Array:
            if place not in views:  # so that x is y, as objects, where a layer works in place
                size = math.prod(place.shape) * place.dtype.itemsize
                piece = workspace.block[place.start : place.start + size]
                views[place] = piece.view(place.dtype).reshape(place.shape)
            return views[place]

        steps = []
        for (layer, place, _, needs), stage in zip(self._stack, plan.stages, strict=True):
            names = self._names[place]
            context = Context(
                *(self.backend, self._xp, self.ops, place, self._mode),
                p={name: self.parameters[names[name]] for name in needs.parameters},
                g={name: self.parameters.grads[names[name]] for name in needs.parameters},
                buffers={name: self.buffers[names[name]] for name in needs.buffers},
                work={name: view(place) for name, place in stage.work.items()},
                products=self.products,
            )
            steps.append((layer, view(stage.y), stage.dx and view(stage.dx), context))
        work = {name: view(place) for name, place in plan.loss.items()}
        work["offsets"], work["ticket"] = workspace.offsets[:rows], workspace.ticket
        if self.loss_scale is not None:
            work["factor"] = self.loss_scale
        loss = losses.LossContext(self.backend, self._xp, self.ops, work, training)
        if len(workspace.passes) == SIZES_KEPT:
            del workspace.passes[next(iter(workspace.passes))]
        workspace.passes[rows] = Pass(steps, loss, steps[-1][1])
        return workspace.passes[rows]

    def _forward(self, X: Array, Y: Array) -> Pass:
        """Scores, loss with its gradient by them, and l2 term of a training batch."""
        self.plan(len(X))
        self._mode.training = True
        run = self._bound(self._training, len(X), True)
        run_layers(run, X)
        self.loss_function.run(run.scores, Y, run.loss)
        if self._weights:
            self._add_l2(run.loss.work["loss"], run.loss.work)
        return run

    def _backward(self, run: Pass, X: Array) -> None:
        """All gradients, from the last layer to the first that has parameters."""
        dy = run.loss.work["dz"]
        for i in range(len(run.steps) - 1, self._first - 1, -1):
            layer, y, dx, context = run.steps[i]
            layer.backward(run.steps[i - 1][1] if i else X, y, dy, dx, context)
            dy = dx
        if self._weights:
            weights, grads = self.parameters.flat, self.parameters.grads.flat
            self.ops.l2_gradient(weights, self._spans, self.l2, grads, run.loss.work)

    def _evaluate(self, X: Array, rows: int = EVALUATION_ROWS) -> Iterator[tuple[slice, Pass]]:
        """Scores of X, at most ``rows`` rows at a time, in a workspace of their own."""
        most = min(len(X), rows)
        if most > self._evaluation.rows:
            self._evaluation = self._without(self._evaluation)
            self._evaluation = self._allocate(most, False)
        for start in range(0, len(X), most):
            part = slice(start, min(start + most, len(X)))
            self._mode.training = False
            run = self._bound(self._evaluation, part.stop - start, False)
            run_layers(run, X[part])
            yield part, run

    def _add_l2(self, loss: Array, work: Mapping[str, Array]) -> None:
        self.ops.l2_loss(self.parameters.flat, self._spans, self.l2 / 2, loss, work)

    # --- checks ---

    def check_batch(self, X: Any, Y: Any) -> None:
        """Raise unless X and Y can be a batch, by shape, element type and device; their values are not looked at."""
        self._check_batch(X, Y, values=False)

    def _check_inputs(self, X: Any) -> None:
        self.backend.check("X", X)
        if X.ndim != 2:
            hint = "; a single sample is X[None]" if X.ndim == 1 else ""
            raise ShapeError(f"X must have shape (batch, {self.inputs}), got {X.shape}{hint}")
        if X.shape[1] != self.inputs:
            taker = next(i for i, layer in enumerate(self.layers) if layer.takes() is not None)
            raise ShapeError(
                f"X has {X.shape[1]} features, {describe_layer(self.layers, taker)} takes {self.inputs}: "
                f"X has shape {X.shape}"
            )
        if len(X) == 0:
            raise ShapeError(f"X must have at least one row, got shape {X.shape}")
        if X.dtype != self.dtype:
            raise DTypeError(
                f"X has dtype {X.dtype}, the network {'stores' if self.loss_scale is not None else 'computes in'} "
                f"{self.dtype}; convert it with "
                f"X.astype('{self.dtype}'), or let Loader do it (dtype=, and scale=1/255 for images of uint8)"
            )

    def _check_batch(self, X: Any, Y: Any, values: bool) -> None:
        self._check_inputs(X)
        self.backend.check("Y", Y)
        self.loss_function.check(Y, len(X), self.outputs)
        if values and not self.loss_function.shows(Y):
            with self.backend.scope():
                self.loss_function.check_values(Y, self.outputs)

    def _finite(self, loss: float, X: Array, Y: Array) -> float:
        if math.isfinite(loss):
            return loss
        self.loss_function.check_values(Y, self.outputs)
        if not self._xp.isfinite(X).all().item():
            cause = "X holds NaN or infinity"
        elif not self._xp.isfinite(self.parameters.flat).all().item():
            cause = "the parameters hold NaN or infinity, so an earlier step was too large: lower the learning rate"
        else:
            cause = "the scores have grown out of range: lower the learning rate, or look at the scale of X and Y"
        raise NonFiniteError(f"loss is {loss} for a batch of shape {X.shape} after {self._mode.step} steps; {cause}")


# --- pieces ----------------------------------------------------------------------------------------------------------


def quiet() -> np.errstate:
    """Overflow and NaN show in the loss, not as warnings of single operations."""
    return np.errstate(over="ignore", invalid="ignore", divide="ignore")


def chain_widths(layers: Sequence[Layer]) -> list[int]:
    """How many features go into the first layer, and come out of each, if the layers fit together."""
    for i, layer in enumerate(layers):
        if not isinstance(layer, Layer):
            raise DTypeError(f"layers must be Layer objects, layer {i + 1} is {layer!r} of type {type(layer).__name__}")
    taken = [layer.takes() for layer in layers]
    first = next((n for n in taken if n is not None), None)
    if first is None:
        raise ArgumentError("layers must hold at least one layer with parameters, such as Dense")
    widths = [first]
    for i, layer in enumerate(layers):
        if taken[i] not in (None, widths[-1]):
            raise ShapeError(
                f"{describe_layer(layers, i)} takes {taken[i]} features, "
                f"{describe_layer(layers, i - 1)} gives {widths[-1]}"
            )
        needs = layer.needs(widths[-1])
        if not isinstance(needs, Needs):
            raise DTypeError(f"{describe_layer(layers, i)}.needs() must return a gb.Needs, got {needs!r}")
        widths.append(needs.outputs)
    return widths


def describe_layer(layers: Sequence[Layer], i: int) -> str:
    """A layer in words, counted from 1."""
    return f"layer {i + 1} ({type(layers[i]).__name__})"


def parameter_names(layers: Sequence[Layer], needs: Sequence[Needs]) -> list[dict[str, str]]:
    """For each layer, the names in the network of its parameters and buffers: the k-th of a kind is numbered k."""
    seen: Counter[type] = Counter()
    names: list[dict[str, str]] = []
    for i, (layer, wanted) in enumerate(zip(layers, needs, strict=True)):
        seen[type(layer)] += 1
        own = {name: f"{name}{seen[type(layer)]}" for name in (*wanted.parameters, *wanted.buffers)}
        for j, other in enumerate(names):
            if shared := set(own.values()) & set(other.values()):
                raise ArgumentError(
                    f"{describe_layer(layers, j)} and {describe_layer(layers, i)} both name a parameter "
                    f"{min(shared)!r}; call it something else in one of the two classes"
                )
        names.append(own)
    return names


def check_names(what: str, found: Any, known: Any, optional: Sequence[str] = ()) -> None:
    """``found`` must be a mapping with the names of ``known``, perhaps some of ``optional``, and no other."""
    if not isinstance(found, Mapping):
        raise DTypeError(f"{what} must be a mapping, got {type(found).__name__}")
    missing, extra = [n for n in known if n not in found], [n for n in found if n not in (*known, *optional)]
    if missing or extra:
        raise ArgumentError(f"{what} must hold {', '.join(known) or 'nothing'}; missing {missing}, unknown {extra}")


# --- the usual stack -------------------------------------------------------------------------------------------------


def mlp(
    sizes: Sequence[int],
    activation: str | Activation | BoundActivation = "relu",
    batch_norm: bool = False,
    dropout: float = 0.0,
    loss: str | ScoreLoss | BoundScoreLoss | losses.Loss = "softmax_cross_entropy",
    l2: float = 0.0,
    backend: str | Backend = "auto",
    dtype: Any = "float32",
    seed: int = 0,
    precision: str = "full",
    tune: bool = False,
) -> Network:
    """A network of Dense layers of the given sizes, the inputs first and the outputs last.

    After every hidden Dense come BatchNorm (with ``batch_norm``), the activation, and Dropout (if its rate is above 0).
    """
    if not hasattr(sizes, "__len__") or len(sizes) < 2:
        raise ArgumentError(f"sizes must be at least two integers, inputs first and outputs last, got {sizes!r}")
    *hidden, last, outputs = [check_int(f"sizes[{i}]", n, 1) for i, n in enumerate(sizes)]
    if isinstance(activation, str):
        kind: Callable[[], Layer] = ACTIVATIONS[check_choice("activation", activation, ACTIVATIONS)]
    else:
        kind = functools.partial(Elementwise, activation)
    check_bool("batch_norm", batch_norm)
    check_real("dropout", dropout, 0, 1, open_high=True)
    # He's variance makes up for the half that these zero; the others, and the scores, keep theirs with Xavier's.
    init = "he" if activation in ("relu", "leaky_relu", "gelu") else "xavier"
    layers: list[Layer] = []
    for inputs, features in itertools.pairwise([*hidden, last]):
        layers.append(Dense(inputs, features, init=init))
        layers += [BatchNorm(features)] if batch_norm else []
        layers.append(kind())
        layers += [Dropout(dropout)] if dropout else []
    layers.append(Dense(last, outputs, init="xavier"))
    return Network(layers, loss, l2, backend, dtype, seed, precision, tune)
