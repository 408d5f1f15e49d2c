"""Callbacks that are part of a step, so that a graph can hold them: of the gradient, or averages of the weights."""

from __future__ import annotations

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from gpubatch.backend import Array, CudaBackend, compute_dtype
from gpubatch.errors import ArgumentError, check_bool, check_int, check_real
from gpubatch.nn import Network
from gpubatch.ops import blocks_for, cuda_kernel, philox_generator, source_of
from gpubatch.optim import MASTER, Optimizer
from gpubatch.own import as_written, copied
from gpubatch.params import FlatViews
from gpubatch.train.history import TrainingState

BLOCK = 1 << 14  # elements that NumPy takes at a time, small enough for the cache
THREADS = 256
NOISE = 2**64 - 1  # the place of noise among the random numbers of a seed; those of layers count from 0
TWO_PI = np.float32(6.2831853)


def parts_source(dtype: str) -> str:
    """The CUDA source of the kernels for a network that stores ``dtype``."""
    return source_of(dtype, "philox.cuh", "step.cuh", "parts.cu")


class OfARun(ABC):
    """A callback of gpubatch's whose arguments change the result of a run, so that a resumed run compares them."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """The arguments by their names, as JSON can hold them."""


class StepPart(OfARun):
    """Something that a step does to the flat buffer of a network, by ``count`` numbers that the host has for each step.

    ``late``: after the update, not between gradient and update.
    """

    count: int
    late = False

    @abstractmethod
    def numbers(self, t: int) -> tuple[float, ...]:
        """The numbers of the step that is made after ``t`` others."""

    @abstractmethod
    def by_numpy(self, net: Network, numbers: Sequence[float]) -> None:
        """Do it on a CPU."""

    @abstractmethod
    def by_kernels(self, net: Network, numbers: Array, stride: int, progress: Array | None) -> None:
        """Launch it on a GPU, with numbers that lie there; in a captured step with its progress."""

    def make(self, net: Network, t: int) -> None:
        """Do it now, in a step that is made eagerly after ``t`` others."""
        numbers = self.numbers(t)
        if not isinstance(net.backend, CudaBackend):
            self.by_numpy(net, numbers)
            return
        with net.backend.scope():
            self.by_kernels(net, net.backend.asarray(np.array(numbers, np.float64)), self.count, None)


def launch(net: Network, name: str, n: int, *arguments: Any, dtype: str = "") -> None:
    """Launch a kernel of parts.cu on ``n`` elements of ``dtype``, by default the network's."""
    assert isinstance(net.backend, CudaBackend)
    kernel = cuda_kernel(net.backend, parts_source(dtype or net.dtype.name), name)
    kernel((blocks_for(n),), (THREADS,), tuple(np.uint64(0) if x is None else x for x in arguments))


def factor_of(net: Network) -> float:
    """What the gradients of a network are multiplied by."""
    return 1.0 if net.loss_scale is None else float(net.loss_scale[0])


def flats_of(net: Network) -> dict[str, Array]:
    """Weights and running statistics, each in one array."""
    return {"parameters": net.parameters.flat, "buffers": net.buffers.flat}


def take(net: Network, arrays: Mapping[str, Array]) -> None:
    """Copy weights, and perhaps running statistics, to ``arrays`` by the names of :func:`flats_of`."""
    with net.backend.scope():
        for name, array in arrays.items():
            array[...] = flats_of(net)[name]


def put(net: Network, arrays: Mapping[str, Array], opt: Optimizer | None = None) -> None:
    """Give a network what :func:`take` copied, and the float32 copies of ``opt`` the same weights."""
    with net.backend.scope():
        for name, array in arrays.items():
            flats_of(net)[name][...] = array
        master: Mapping[str, Array] = {} if opt is None else opt.state.get(MASTER, {})
        for name, view in master.items():
            view[...] = net.parameters[name]


# --- between gradient and update -------------------------------------------------------------------------------------


@as_written
class ClipByValue(StepPart):
    """Keeps every number of the gradient between -value and value, before its norm is clipped.

    value: the largest absolute value, above 0; of the gradient without a loss scale

    PyTorch's ``clip_grad_value_``. A gradient that is NaN or infinite is left as it is, so that its step is left out.

    >>> gb.fit(net, loader, opt, callbacks=[gb.ClipByValue(0.5)])  # doctest: +SKIP

    By hand, after ``net.loss_and_grad``: ``clip.apply(net)``.
    """

    count = 1

    def __init__(self, value: float) -> None:
        self.value = check_real("value", value, 0, open_low=True)

    def __repr__(self) -> str:
        return f"ClipByValue({self.value})"

    def settings(self) -> dict[str, Any]:
        """The arguments, which a resumed run compares."""
        return {"value": self.value}

    def apply(self, net: Network) -> None:
        """By hand: clip ``net.parameters.grads``."""
        self.make(net, 0)

    def on_gradient(self, state: TrainingState, grads: FlatViews) -> None:
        """Clip it."""
        self.make(state.net, state.opt.t)

    def numbers(self, t: int) -> tuple[float, ...]:
        """The largest value."""
        return (self.value,)

    def by_numpy(self, net: Network, numbers: Sequence[float]) -> None:
        """In place, but for what is infinite."""
        grads, limit = net.parameters.grads.flat, numbers[0] * factor_of(net)
        np.clip(grads, -limit, limit, out=grads, where=np.isfinite(grads))

    def by_kernels(self, net: Network, numbers: Array, stride: int, progress: Array | None) -> None:
        """One launch."""
        grads = net.parameters.grads.flat
        of_step = net.loss_scale, numbers, np.int64(stride), progress
        launch(net, "clip_values", grads.size, grads, np.int64(grads.size), *of_step)


@as_written
class GradientNoise(StepPart):
    """Adds normal noise to the gradient, less and less: a variance of eta / (1 + t)**gamma in the step after t others.

    eta: the variance in the first step, above 0; Neelakantan et al. (arXiv:1511.06807, equation 1) try 0.01, 0.3 and 1
    gamma: how fast it falls, at least 0; 0.55 there
    seed: decides the noise, together with t: a resumed run has the same

    The noise comes before ``max_norm`` clips the gradient, whose norm counts that of frozen parameters too. The numbers
    are Box and Muller's of float32 uniform ones, up to 5.8 standard deviations; CPU and GPU have the same to rounding.

    >>> gb.fit(net, loader, opt, callbacks=[gb.GradientNoise(0.01)])  # doctest: +SKIP

    By hand, after ``net.loss_and_grad``: ``noise.apply(net, opt.t)``.
    """

    count = 2

    def __init__(self, eta: float = 0.01, gamma: float = 0.55, seed: int = 0) -> None:
        self.eta, self.gamma = check_real("eta", eta, 0, open_low=True), check_real("gamma", gamma, 0)
        self.seed = check_int("seed", seed, 0, 2**64 - 1)
        self._draw = philox_generator(self.seed, NOISE)  # a new one in each step takes as long as all numbers of 100
        self._start = self._draw.bit_generator.state

    def __repr__(self) -> str:
        return f"GradientNoise({self.eta}, {self.gamma}, seed={self.seed})"

    def settings(self) -> dict[str, Any]:
        """The arguments, which a resumed run compares."""
        return {"eta": self.eta, "gamma": self.gamma, "seed": self.seed}

    def apply(self, net: Network, t: int) -> None:
        """By hand: add the noise of the step after ``t`` others to ``net.parameters.grads``."""
        self.make(net, check_int("t", t, 0))

    def on_gradient(self, state: TrainingState, grads: FlatViews) -> None:
        """Add it."""
        self.make(state.net, state.opt.t)

    def numbers(self, t: int) -> tuple[float, ...]:
        """The standard deviation, and the counter of the random numbers."""
        return math.sqrt(self.eta / (1 + t) ** self.gamma), float(t)

    def by_numpy(self, net: Network, numbers: Sequence[float]) -> None:
        """A block after another."""
        grads, deviation = net.parameters.grads.flat, numbers[0] * factor_of(net)
        source = self._draw.bit_generator
        with source.lock:  # two threads may have one noise
            self._start["state"]["counter"][:] = 0, int(numbers[1]), 0, 0
            source.state = self._start
            for start in range(0, grads.size, BLOCK):
                part = grads[start : start + BLOCK]
                uniform = self._draw.random((-(-part.size // 8) * 4, 2), np.float32)
                radius, angle = np.sqrt(-2 * np.log(1 - uniform[:, 0])), TWO_PI * uniform[:, 1]
                for column, wave in enumerate((np.cos(angle), np.sin(angle))):
                    np.multiply(radius, wave, out=uniform[:, column])
                normal = uniform.reshape(-1)[: part.size].astype(net.compute_dtype, copy=False)
                part += (deviation * normal).astype(part.dtype, copy=False)

    def by_kernels(self, net: Network, numbers: Array, stride: int, progress: Array | None) -> None:
        """One launch."""
        grads, key = net.parameters.grads.flat, (np.uint64(self.seed), np.uint64(NOISE))
        of_step = net.loss_scale, numbers, np.int64(stride), progress
        launch(net, "add_noise", -(-grads.size // 8), grads, np.int64(grads.size), *key, *of_step)


# --- after the update ------------------------------------------------------------------------------------------------


@as_written
class WeightAverage(StepPart):
    """Averages the weights over the steps: the validation of :func:`fit` is of the average, and so is its result.

    decay: the weight of the past in an exponential average, in [0, 1); None: all steps alike, as in SWA
    every: how many steps there are from one update of the average to the next
    bias_correction: divide by the sum of the weights so far, as :class:`EWMA` does (Kingma & Ba 2015, section 3);
        otherwise the first weights that come count for all before them, as in ``torch.optim.swa_utils``
    warmup: the decay is at most (1 + n) / (10 + n) in update n, as in TensorFlow's ``num_updates``
    buffers: whether running statistics of batch norm are averaged too, as in timm and PyTorch's ``use_buffers``; False
        leaves those of the last step, which belong to the last weights, so the average may be worse than either
    apply: whether the network has the average after the run; False leaves the last weights, and :meth:`apply` is yours
    net: the network, for a loop by hand

    The average is kept in ``compute_dtype``, and takes memory for the weights twice. It is part of checkpoints, whose
    network has the weights in training; those also come back where Ctrl-C, SIGTERM or an error ends a run.
    On a GPU it is one launch in a captured step, two with running statistics.

    >>> gb.fit(net, loader, opt, validation=(X, Y), callbacks=[gb.WeightAverage(0.999)])  # doctest: +SKIP

    By hand, with ``average = gb.WeightAverage(0.999, net=net)``: ``average.update()`` after ``opt.step()``, and at the
    end ``average.apply(net)``.
    """

    count, late = 1, True

    def __init__(
        self,
        decay: float | None = 0.999,
        every: int = 1,
        bias_correction: bool = False,
        warmup: bool = False,
        buffers: bool = True,
        apply: bool = True,
        net: Network | None = None,
    ) -> None:
        self.decay = None if decay is None else check_real("decay", decay, 0, 1, open_high=True)
        self.every = check_int("every", every, 1)
        self.bias_correction, self.warmup = check_bool("bias_correction", bias_correction), check_bool("warmup", warmup)
        if self.warmup and self.bias_correction:
            raise ArgumentError("warmup and bias_correction are two ways to begin: give one of them")
        self.buffers, self.applied_at_end = check_bool("buffers", buffers), check_bool("apply", apply)
        self._net: Network | None = None
        self._opt: Optimizer | None = None
        self._steps = self._begun = 0  # steps by hand; the optimizer's steps when those of a run began
        self._mean: dict[str, Array] = {}
        self._before: dict[str, Array] = {}  # the weights in training, while the network has the average
        if net is not None:
            self._bind(net)

    def __repr__(self) -> str:
        return f"WeightAverage({self.decay}, every={self.every}), steps={self.steps}"

    def settings(self) -> dict[str, Any]:
        """The arguments, which a resumed run compares."""
        names = "decay", "every", "bias_correction", "warmup", "buffers"
        return {**{name: getattr(self, name) for name in names}, "apply": self.applied_at_end}

    @property
    def steps(self) -> int:
        """How many steps were made since the average began."""
        return self._steps if self._opt is None else self._opt.t - self._begun

    @property
    def updates(self) -> int:
        """How many weights the average is of."""
        return self.steps // self.every

    def update(self) -> None:
        """By hand, after a step."""
        if self._net is None:
            raise ArgumentError("net is needed for a loop by hand: WeightAverage(net=net)")
        self._begun, self._opt = 0, None
        self.make(self._net, self._steps)
        self._steps += 1

    def apply(self, net: Network, opt: Optimizer | None = None) -> None:
        """Give a network the average, and master weights of ``opt`` too; without an update, nothing changes."""
        if not self.updates:
            return
        put(net, {name: self._mean[name] for name in self._flats(net)}, opt)

    @contextlib.contextmanager
    def averaged(self, state: TrainingState) -> Iterator[None]:
        """Inside a ``with``, the network of a run has the average."""
        take(state.net, self._before)
        self.apply(state.net)
        try:
            yield
        finally:
            put(state.net, self._before)

    def on_start(self, state: TrainingState) -> None:
        """Allocate the memory, and count the steps from here on; the average of another network is forgotten."""
        if self._net is not None and self._net is not state.net:
            self._net, self._opt, self._steps, self._mean, self._before = None, None, 0, {}, {}
        steps = self.steps
        self._bind(state.net)
        self._opt, self._begun = state.opt, state.opt.t - steps
        if len(state.monitors) > 1:
            state.note("validation is of the averaged weights")

    def on_end(self, state: TrainingState) -> None:
        """Give the network the average."""
        if self.applied_at_end and self.updates:
            self.apply(state.net, state.opt)
            state.note(f"the network has the average of the weights in {self.updates:,} steps")
        self._steps, self._opt = self.steps, None

    def numbers(self, t: int) -> tuple[float, ...]:
        """How far the average goes towards the weights in the step after ``t`` others: from 0 to 1."""
        n, rest = divmod(t - self._begun + 1, self.every)
        if rest or n < 1:
            return (0.0,)
        if self.decay is None:
            return (1 / n,)
        if self.bias_correction:
            return ((1 - self.decay) / (1 - self.decay**n),)
        decay = min(self.decay, (1 + n) / (10 + n)) if self.warmup else self.decay
        return (1.0 if n == 1 else 1 - decay,)

    def by_numpy(self, net: Network, numbers: Sequence[float]) -> None:
        """A block after another."""
        (take,) = numbers
        if not take:
            return
        for name, flat in self._flats(net).items():
            mean = self._mean[name]
            for start in range(0, flat.size, BLOCK):
                part = mean[start : start + BLOCK]
                way = np.subtract(flat[start : start + BLOCK], part, dtype=part.dtype)
                way *= take
                part += way

    def by_kernels(self, net: Network, numbers: Array, stride: int, progress: Array | None) -> None:
        """One launch, and another for running statistics."""
        of_step = numbers, np.int64(stride), progress
        for name, flat in self._flats(net).items():
            arrays = flat, self._mean[name], np.int64(flat.size)
            launch(net, "average", flat.size, *arrays, *of_step, dtype=flat.dtype.name)

    def state_dict(self) -> dict[str, Any]:
        """For checkpoints: a copy of the average."""
        return copied(self._live_state())

    def _live_state(self) -> dict[str, Any]:
        return {"steps": self.steps, "mean": self._mean}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave."""
        self._steps, self._opt = check_int("state['steps']", state["steps"], 0), None
        self._mean, net, self._net = dict(state["mean"]), self._net, None
        if net is not None:
            self._bind(net)

    def _bind(self, net: Network) -> None:
        """Have the average on the device of a network, and memory for its weights in training."""
        if self._net is net:
            return
        for name, flat in self._flats(net).items():
            dtype = compute_dtype(flat.dtype)
            mean = self._mean.get(name)
            if mean is not None and mean.shape != flat.shape:
                raise ArgumentError(f"the average is of {mean.size:,} {name}, the network has {flat.size:,}")
            self._mean[name] = net.backend.zeros(flat.size, dtype) if mean is None else net.backend.asarray(mean, dtype)
            self._before[name] = net.backend.zeros(flat.size, flat.dtype)
        self._net = net

    def _flats(self, net: Network) -> dict[str, Array]:
        """What is averaged."""
        found = flats_of(net)
        return found if self.buffers and net.buffers.size else {"parameters": found["parameters"]}
