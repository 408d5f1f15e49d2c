"""Test and time gpubatch on a GPU: ``python bench/gpu_check.py [--out DIR]``, in under eight minutes.

First it compiles all sources in parallel, so that no later time limit includes compilation. Then it tests each kernel
against NumPy in float64; times gpubatch against PyTorch and JAX, if they are installed and see the device, and against
plain copies; times single kernels; and runs all tests that need a device, as far as the time allows. Each part runs in
its own process with a time limit, so a failure does not affect the others, and saves its result when it ends, so an
interrupted run keeps its measurements.

Contenders take turns, after a warm-up, and are timed by events on their stream (JAX, and everything on a CPU, by the
clock). Figures are medians with quartiles. gpubatch runs on its own stream, its training steps as CUDA graphs unless
the row says "eager". float32 products have full precision unless the row says otherwise. The results are JSON and a
Markdown table. No setting of the card is changed.

``--rehearse`` runs everything with small sizes, on the device or else on the CPU, where steps cannot be captured. It
only tests that the check works.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
import importlib.metadata
import importlib.util
import itertools
import json
import math
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the checkout that this file belongs to, installed or not

import feeding  # noqa: E402  in this folder
import to_accuracy  # noqa: E402

import gpubatch as gb  # noqa: E402
from gpubatch.backend import CudaBackend  # noqa: E402
from gpubatch.nn import core_of  # noqa: E402
from gpubatch.ops.products import COPY, products_for  # noqa: E402
from gpubatch.parallel import Ranks  # noqa: E402
from gpubatch.parallel.nccl import Nccl  # noqa: E402
from gpubatch.train import why_eager  # noqa: E402

ROUNDS = 5  # each contender runs once per round
WARM = 4  # calls before the first round; torch.compile records its graphs in the second and third
PRECISIONS = {"full": "", "fast": " in TF32", "mixed": " in mixed precision"}
EPOCHS = 5  # per run
AT_ONCE = 50  # steps per launch, in the rows with several
WHOLE = 460  # time limit of the whole check, in seconds
PEERS, SOURCES, PARITY_TESTS, KERNEL_TIMES = 20, 45, 55, 30  # time limits in seconds; all tests get the rest
PARITY = {  # each kernel against NumPy in float64
    "update rules": "tests/test_kernels.py::test_on_a_gpu_the_kernel_follows_numpy",
    "kernels of the core": "tests/test_cuda_ops.py::test_on_a_gpu_it_agrees_with_numpy",
}
SIZES = [784, 512, 256, 10]
BYTES_PER_PARAMETER = {"adam": 28, "rmsprop": 20, "momentum": 20}  # read and written by a float32 step
ASKED = {"adam": 1.0, "rmsprop": 2.0, "momentum": 1.0}  # targets, times as fast as PyTorch
OURS = "gpubatch"
THEIRS = "gpubatch.torch"  # our update of PyTorch's tensors
KERNEL = re.compile(r"__global__ void\s+(?:__launch_bounds__\([^)]*\)\s+)?(\w+)\(")

Work = Callable[[], Any]


@dataclass
class Place:
    """The device, its name in PyTorch, and the sizes of the work."""

    backend: gb.Backend
    torch: str
    parameters: int
    samples: int
    sizes: list[int] = field(default_factory=lambda: SIZES)  # of the network
    small: bool = False  # a rehearsal

    @property
    def on_gpu(self) -> bool:
        return self.backend.name == "cuda"


@dataclass
class Contender:
    """A contender: one call of ``work`` does ``steps`` steps.

    library: selects the clock
    execution: how gpubatch runs the steps, such as "captured"
    """

    work: Work
    library: str = OURS
    steps: int = 1
    execution: str = ""
    seconds: list[float] = field(default_factory=list)


def here(rehearse: bool) -> Place:
    """The GPU, with sizes for its memory; for a rehearsal any device, with small sizes."""
    backend = gb.get_backend("auto" if rehearse else "cuda")
    if rehearse:
        return Place(backend, "cuda" if backend.name == "cuda" else "cpu", 1 << 12, 256, [40, 16, 10], small=True)
    largest = backend.memory().available // (2 * 5 * 4)  # two contenders, each with at most five arrays
    return Place(backend, "cuda", min(256 * 2**20, 1 << (largest.bit_length() - 1)), 60_000)


# --- time ---------------------------------------------------------------------------------------------------------


def clock(place: Place, library: str) -> tuple[Callable[[], Any], Callable[[Any, Any], float]]:
    """(mark, between): ``mark()`` records a time on the device, ``between(start, stop)`` is in seconds."""
    if place.on_gpu and library == "torch":
        import torch

        def mark() -> Any:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            return event

        def between(start: Any, stop: Any) -> float:
            stop.synchronize()
            return float(start.elapsed_time(stop)) / 1e3

        return mark, between
    if place.on_gpu and library == OURS:
        cupy = gb.backend.load_cupy()

        def note() -> Any:
            event = cupy.cuda.Event()
            event.record()
            return event

        def since(start: Any, stop: Any) -> float:
            stop.synchronize()
            return float(cupy.cuda.get_elapsed_time(start, stop)) / 1e3

        return note, since
    return time.perf_counter, lambda start, stop: stop - start


def measure(
    place: Place, contenders: dict[str, Contender], budget: float = 0.15, samples: int = 5, cold: bool = False
) -> dict[str, dict[str, float]]:
    """Seconds per step of each contender: median and quartiles over rounds of about ``budget`` seconds.

    With ``cold`` the L2 cache is overwritten before each call. As this is waited for, the time then includes the host's
    work from the call on. "host" is the time until a call returns.
    """
    flush = flusher(place) if cold else None
    for _ in range(1 if place.small else ROUNDS):
        for contender in contenders.values():
            mark, between = clock(place, contender.library)
            place.backend.synchronize()
            start = mark()
            contender.work()
            one = max(between(start, mark()), 1e-7)
            calls = max(1, min(int(budget / one / samples), 1000)) if not (place.small or cold) else 1
            for _ in range(4 * samples if cold else samples):
                if flush:
                    flush()
                start = mark()
                for _ in range(calls):
                    contender.work()
                contender.seconds.append(between(start, mark()) / calls / contender.steps)
    found = {name: spread(contender.seconds) for name, contender in contenders.items()}
    for name, contender in contenders.items():
        found[name]["host"] = on_host(place, contender, found[name]["median"])
    return found


def spread(seconds: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else 3 * seconds
    return {"median": middle, "low": low, "high": high}


def flusher(place: Place) -> Work:
    """A function that overwrites the L2 cache, by a write of four times its size, and waits for it."""
    size = 1 << 20
    if place.on_gpu:
        runtime = gb.backend.load_cupy().cuda.runtime
        size = 4 * max(runtime.getDeviceProperties(0).get("l2CacheSize", 0), 16 << 20)
    block = place.backend.zeros(size, "uint8")

    def flush() -> None:
        block[...] = 1
        place.backend.synchronize()

    return flush


def on_host(place: Place, contender: Contender, seconds: float) -> float:
    """Seconds per step until a call returns, over few enough calls to fit the device's queue."""
    calls = 1 if place.small else max(1, min(20, int(0.2 / seconds / contender.steps)))
    place.backend.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        contender.work()
    seconds = (time.perf_counter() - start) / calls / contender.steps
    place.backend.synchronize()
    return seconds


def race(
    place: Place,
    work: str,
    entries: dict[str, Callable[[], Contender]],
    asked: dict[str, float],
    warm: int = WARM,
    **how: Any,
) -> dict[str, Any]:
    """Time the contenders of one row of the table.

    A contender that cannot start is listed as failed, without affecting the others; so is one with a loss that is not
    finite.
    """
    contenders, failed = dict[str, Contender](), dict[str, str]()
    for name, make in entries.items():
        try:
            contender = make()
            for _ in range(1 if place.small else warm):
                contender.work()
            place.backend.synchronize()
            contenders[name] = contender
        except Exception as error:
            failed[name] = in_a_line(error)
    seconds = measure(place, contenders, **how)
    losses, execution = {}, {}
    for name, contender in contenders.items():
        value = contender.work()
        if isinstance(value, gb.History):
            losses[name], execution[name] = value.loss[-1], value.execution
        elif hasattr(value, "item"):
            losses[name] = float(value.item())
        if contender.execution:
            execution[name] = contender.execution
        if not math.isfinite(losses.get(name, 0.0)):
            failed[name] = f"the loss is {losses.pop(name)}"
            del seconds[name]
    row = {"work": work, "seconds": seconds, "asked": {peer: ratio for peer, ratio in asked.items() if peer in seconds}}
    more = {"failed": failed, "loss": losses, "execution": execution}
    return row | {name: found for name, found in more.items() if found}


def in_a_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}"


@functools.cache
def why_not(library: str, on_gpu: bool) -> str:
    """Why a peer cannot take part: it is not installed, or does not see the device. Empty if it can."""
    try:
        if library == "torch":
            import torch

            return "" if not on_gpu or torch.cuda.is_available() else "it sees no GPU"
        import jax
        import optax  # noqa: F401  the contender needs it

        return "" if not on_gpu or jax.default_backend() == "gpu" else "it sees no GPU"
    except Exception as error:  # a broken installation may raise anything
        return in_a_line(error)


def has(place: Place, library: str) -> bool:
    return not why_not(library, place.on_gpu)


# --- update rules -------------------------------------------------------------------------------------------------


def optimizers(place: Place) -> Iterator[dict[str, Any]]:
    """Steps on one large buffer, against PyTorch and a copy's bandwidth; steps on many small arrays."""
    n = place.parameters
    kinds: dict[str, Callable[[Any], gb.Optimizer]] = {
        "adam": gb.Adam,
        "rmsprop": gb.RMSProp,
        "momentum": lambda params: gb.HeavyBall(params, lr=1e-3),
    }
    for name, kind in kinds.items():
        form = "foreach" if name == "rmsprop" else "fused"
        peer = f"torch {form}"
        entries = {OURS: partial(our_update, place, kind, n), "copy": partial(copy, place, n)}
        if has(place, "torch"):
            entries[peer] = partial(torch_update, place, name, [n], **{form: True})
            entries[THEIRS] = partial(our_torch_update, place, name, [n])
        row = race(place, f"{name}, {n:,} float32 parameters", entries, {peer: ASKED[name]}, budget=0.4)
        seconds = row["seconds"]
        if OURS in seconds and "copy" in seconds:
            row["share"] = BYTES_PER_PARAMETER[name] / 8 * seconds["copy"]["median"] / seconds[OURS]["median"]
            row["asked"]["share"] = 0.92
        yield row
        free_pools(place)
    count = 5 if place.small else 500
    for cold in (True, False):
        entries = {OURS: partial(our_many, place, count)}
        if has(place, "torch"):
            entries["torch fused"] = partial(torch_update, place, "adam", [10_000] * count, fused=True)
            entries[THEIRS] = partial(our_torch_update, place, "adam", [10_000] * count)
        work = f"adam, {count} arrays of 10,000, {'cold L2' if cold else 'one after another'}"
        yield race(place, work, entries, {"torch fused": 3.0}, cold=cold)


def our_update(place: Place, kind: Callable[[Any], gb.Optimizer], n: int) -> Contender:
    params = gb.Parameters({"w": (n,)}, place.backend)
    params.grads.flat[...] = 0.01
    return Contender(kind(params).step)


def our_many(place: Place, count: int) -> Contender:
    arrays = {str(i): place.backend.zeros(10_000, "float32") for i in range(count)}
    grads = {name: a + np.float32(0.01) for name, a in arrays.items()}
    opt = gb.Adam(arrays)
    return Contender(lambda: opt.step(grads))


def copy(place: Place, n: int) -> Contender:
    """A copy: reads four bytes and writes four bytes per element."""
    source, target = (place.backend.zeros(n, "float32") for _ in range(2))

    def work() -> None:
        target[...] = source

    return Contender(work)


def torch_update(place: Place, name: str, sizes: list[int], **form: bool) -> Contender:
    import torch

    params = torch_parameters(place, sizes)
    makers: dict[str, Callable[[Any], Any]] = {
        "adam": lambda p: torch.optim.Adam(p, **form),
        "rmsprop": lambda p: torch.optim.RMSprop(p, **form),
        "momentum": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9, **form),
    }
    return Contender(makers[name](params).step, "torch")


def our_torch_update(place: Place, name: str, sizes: list[int]) -> Contender:
    """Our update of PyTorch's tensors, on PyTorch's stream."""
    import gpubatch.torch

    makers: dict[str, Callable[[Any], Any]] = {
        "adam": gpubatch.torch.Adam,
        "rmsprop": gpubatch.torch.RMSProp,
        "momentum": lambda p: gpubatch.torch.HeavyBall(p, lr=1e-3),
    }
    return Contender(makers[name](torch_parameters(place, sizes)).step, "torch")


def torch_parameters(place: Place, sizes: list[int]) -> list[Any]:
    import torch

    params = [torch.zeros(n, device=place.torch, requires_grad=True) for n in sizes]
    for p in params:
        p.grad = torch.full_like(p, 0.01)
    return params


def free_pools(place: Place) -> None:
    """Free the cached memory of gpubatch and PyTorch."""
    place.backend.free_unused()
    if place.on_gpu and "torch" in sys.modules:
        sys.modules["torch"].cuda.empty_cache()


# --- a training step ----------------------------------------------------------------------------------------------


def steps(place: Place) -> Iterator[dict[str, Any]]:
    """Training steps of a small network by batch size, with one and with many steps per launch."""
    batches = (32,) if place.small else (128, 32, 512, 4096)  # the one with targets first, should time run out
    at_once = 2 if place.small else AT_ONCE
    for batch in batches:
        x, y = samples(place, batch)
        entries = {
            OURS: partial(our_step, place, x, y),
            "gpubatch eager": partial(our_step, place, x, y, captured=False),
        }
        if place.on_gpu:
            entries["gpubatch tuned"] = partial(our_step, place, x, y, tune=True)
        several = {
            OURS: partial(our_step, place, x, y, at_once),
            "gpubatch, 8 in a launch": partial(our_step, place, x, y, min(8, at_once)),
        }
        if has(place, "torch"):
            entries["torch eager"] = partial(torch_step, place, x, y)
            if place.on_gpu:
                entries["torch graph"] = partial(torch_step, place, x, y, "graph")
                if importlib.util.find_spec("triton"):
                    entries["torch compiled"] = partial(torch_step, place, x, y, "compiled")
        if has(place, "jax"):
            several["jax scan"] = partial(jax_steps, place, x, y, at_once)
        asked = batch == batches[0]
        one = race(place, step_of(place, batch), entries, {"torch eager": 5.0, "torch compiled": 1.3} if asked else {})
        yield one
        work = f"{step_of(place, batch)}, {at_once} in a launch"
        row = race(place, work, several, {"jax scan": 1.2} if asked else {})
        if OURS in one["seconds"] and OURS in row["seconds"]:
            row["between launches"] = one["seconds"][OURS]["median"] - row["seconds"][OURS]["median"]
        yield row


def large_batch(place: Place) -> Iterator[dict[str, Any]]:
    """Training steps with a batch so large that matrix products dominate, in each precision.

    In mixed precision PyTorch's GradScaler checks the gradients; gpubatch does so only in ``fit``.
    """
    batch = 64 if place.small else 16384
    x, y = samples(place, batch)
    for precision, words in PRECISIONS.items():
        entries = {OURS: partial(our_step, place, x, y, precision=precision)}
        if place.on_gpu:
            entries["gpubatch tuned"] = partial(our_step, place, x, y, precision=precision, tune=True)
        if has(place, "torch") and (place.on_gpu or precision != "mixed"):  # GradScaler needs a GPU
            entries["torch eager"] = partial(torch_step, place, x, y, precision=precision)
        asked = {"torch eager": 1.2} if precision == "fast" else {}
        yield race(place, step_of(place, batch) + words, entries, asked)


def step_of(place: Place, batch: int) -> str:
    return f"training step, {'-'.join(map(str, place.sizes))}, Adam, batch {batch:,}"


def samples(place: Place, batch: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.random((batch, place.sizes[0]), np.float32), rng.integers(0, place.sizes[-1], batch)


def our_step(
    place: Place,
    x: np.ndarray,
    y: np.ndarray,
    steps: int = 1,
    precision: str = "full",
    captured: bool = True,
    tune: bool = False,
) -> Contender:
    """A training step as one launch; eager if it cannot be captured, or with ``captured=False``."""

    def parts() -> tuple[gb.Network, gb.Optimizer, Any, Any]:
        net = gb.mlp(place.sizes, backend=place.backend, precision=precision, tune=tune)
        own = {"master_weights": True} if precision == "mixed" else {}
        opt = gb.Adam(net.parameters, **own)
        return net, opt, place.backend.asarray(x, net.dtype), place.backend.asarray(y)

    net, opt, X, Y = parts()
    execution = "eager"
    if captured and (why := why_eager(net)):
        execution = f"eager, since {why}"
    elif captured:
        try:
            with counted(place.backend) as nodes:
                step = gb.CapturedStep(net, opt, X, Y, steps)
                step()
                how = f"captured, nodes in the graph: {nodes[-1:] or 'not known'}"  # tuning makes others before
                return Contender(step, steps=steps, execution=how + tuned(net))
        except RuntimeError as error:  # CuPy's, if CUDA refuses the capture
            execution = f"eager, since the capture failed: {in_a_line(error)}"
            net, opt, X, Y = parts()

    def step_by_step() -> Any:
        for _ in range(steps):
            loss = net.step_loss(X, Y)
            opt.step()
        return loss

    return Contender(step_by_step, steps=steps, execution=execution + tuned(net))


def tuned(net: gb.Network) -> str:
    """The algorithms chosen for the network's matrix products, as text."""
    chosen = core_of(net).products.choices().get("algorithms", {}).values()
    copies = sum(choice.startswith(COPY) for choice in chosen)
    return f"; {len(chosen)} matrix products tuned, {copies} with a copy of the weights" if chosen else ""


@contextlib.contextmanager
def counted(backend: Any) -> Iterator[list[int]]:
    """Count the nodes of each graph captured inside; the list stays empty if the driver cannot tell.

    The count is taken before the capture ends: some CuPy versions drop the graph after instantiating it.
    """
    found: list[int] = []
    original = backend.capture

    def capture(work: Callable[[], None]) -> Any:
        def work_and_count() -> None:
            work()
            with contextlib.suppress(OSError, AttributeError):  # the library or the function is missing
                driver = ctypes.CDLL("libcuda.so.1")
                status, number, graph, nodes = ctypes.c_int(), ctypes.c_uint64(), ctypes.c_void_p(), ctypes.c_size_t()
                state = ctypes.byref(status), ctypes.byref(number), ctypes.byref(graph), None, None
                stream = ctypes.c_void_p(backend.current_stream().ptr)
                known = driver.cuStreamGetCaptureInfo_v2(stream, *state) == 0 and graph
                if known and driver.cuGraphGetNodes(graph, None, ctypes.byref(nodes)) == 0:
                    found.append(nodes.value)

        return original(work_and_count)

    backend.capture = capture
    try:
        yield found
    finally:
        del backend.capture  # uncovers the class's method


def torch_network(place: Place) -> Any:
    import torch

    layers: list[Any] = []
    for inputs, outputs in itertools.pairwise(place.sizes):
        layers += [torch.nn.Linear(inputs, outputs), torch.nn.ReLU()]
    return torch.nn.Sequential(*layers[:-1]).to(place.torch)


def torch_step(place: Place, x: np.ndarray, y: np.ndarray, form: str = "eager", precision: str = "full") -> Contender:
    """A step of PyTorch: "eager", "compiled" (``reduce-overhead``), or as one CUDA "graph"."""
    import torch

    torch.set_float32_matmul_precision("high" if precision == "fast" else "highest")
    net = torch_network(place)
    opt = torch.optim.Adam(net.parameters(), fused=True, capturable=form == "graph")
    X, Y = torch.tensor(x, device=place.torch), torch.tensor(y, device=place.torch)
    mixed = precision == "mixed"
    scaler = torch.amp.GradScaler(place.torch, enabled=mixed)

    def cost() -> Any:
        with torch.autocast(place.torch, torch.float16, enabled=mixed):
            return torch.nn.functional.cross_entropy(net(X), Y)

    forward = torch.compile(cost, mode="reduce-overhead", dynamic=False) if form == "compiled" else cost

    def step() -> Any:
        opt.zero_grad(set_to_none=True)
        loss = forward()
        if mixed:
            scaler.scale(loss).backward()
            scaler.step(opt)
            scaler.update()
        else:
            loss.backward()
            opt.step()
        return loss.detach()

    if form != "graph":
        return Contender(step, "torch")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()

    def replay() -> Any:
        graph.replay()
        return loss

    return Contender(replay, "torch")


def jax_steps(place: Place, x: np.ndarray, y: np.ndarray, count: int) -> Contender:
    """``count`` steps in one compiled loop, with donated parameters."""
    import jax
    import optax

    if place.on_gpu and jax.default_backend() != "gpu":
        raise RuntimeError("JAX sees no GPU")
    jax.config.update("jax_default_matmul_precision", "highest")  # its default may be TF32

    rng = np.random.default_rng(0)
    weights = [
        (rng.normal(0, (2 / a) ** 0.5, (a, b)).astype(np.float32), np.zeros(b, np.float32))
        for a, b in itertools.pairwise(place.sizes)
    ]
    opt = optax.adam(1e-3)
    X, Y = jax.numpy.asarray(x), jax.numpy.asarray(y)

    def loss(weights: Any) -> Any:
        h = X
        for i, (w, b) in enumerate(weights):
            h = h @ w + b
            h = jax.nn.relu(h) if i < len(weights) - 1 else h
        return optax.softmax_cross_entropy_with_integer_labels(h, Y).mean()

    def one(carry: Any, _: Any) -> Any:
        weights, state = carry
        value, grads = jax.value_and_grad(loss)(weights)
        updates, state = opt.update(grads, state)
        return (optax.apply_updates(weights, updates), state), value

    run = jax.jit(lambda carry: jax.lax.scan(one, carry, None, length=count), donate_argnums=0)
    carry = jax.tree.map(jax.numpy.asarray, (weights, opt.init(weights)))

    def work() -> Any:
        nonlocal carry
        carry, values = run(carry)
        return values.block_until_ready()[-1]

    return Contender(work, "jax", count)


# --- an epoch -----------------------------------------------------------------------------------------------------


def epochs(place: Place) -> Iterator[dict[str, Any]]:
    """Epochs of training on uint8 data on the device, batch 128; a run has several epochs."""
    rng = np.random.default_rng(0)
    X = rng.integers(0, 256, (place.samples, place.sizes[0]), np.uint8)
    Y = rng.integers(0, place.sizes[-1], place.samples)
    peer = "torch, data on the device"
    entries = {
        OURS: partial(our_epochs, place, X, Y, "auto"),
        "gpubatch eager": partial(our_epochs, place, X, Y, "eager"),
    }
    if has(place, "torch"):
        entries[peer] = partial(torch_epochs, place, X, Y)
    work = f"epoch of {place.samples:,} x {place.sizes[0]} uint8, batch 128, on the device"
    yield race(place, work, entries, {peer: 5.0}, warm=1, samples=1)


def our_epochs(place: Place, X: np.ndarray, Y: np.ndarray, execution: str) -> Contender:
    net = gb.mlp(place.sizes, backend=place.backend)
    loader = gb.Loader(X, Y, batch_size=128, scale=1 / 255, backend=place.backend)
    opt = gb.Adam(net.parameters)
    return Contender(lambda: gb.fit(net, loader, opt, EPOCHS, progress=False, execution=execution), steps=EPOCHS)


def torch_epochs(place: Place, X: np.ndarray, Y: np.ndarray) -> Contender:
    import torch

    net = torch_network(place)
    opt = torch.optim.Adam(net.parameters(), fused=True)
    data, labels = torch.tensor(X, device=place.torch), torch.tensor(Y, device=place.torch)

    def run() -> Any:
        for _ in range(EPOCHS):
            order = torch.randperm(len(data), device=place.torch)
            for start in range(0, len(data), 128):
                index = order[start : start + 128]
                x = data.index_select(0, index).float().mul_(1 / 255)
                opt.zero_grad(set_to_none=True)
                loss = torch.nn.functional.cross_entropy(net(x), labels.index_select(0, index))
                loss.backward()
                opt.step()
        return loss.detach()

    return Contender(run, "torch", EPOCHS)


def accuracy(place: Place) -> Iterator[dict[str, Any]]:
    """Time from process start to an accuracy; libraries take turns, each run in its own process."""
    libraries = [OURS, *(["torch"] if has(place, "torch") else [])]
    runs, target = (1, 0.1) if place.small else (3, 0.98)
    with tempfile.TemporaryDirectory() as folder:
        to_accuracy.write_digits(Path(folder), place.samples, place.samples // 6)
        if not place.small:  # the first runs read files that are not yet cached
            first = {name: to_accuracy.seconds_to(target, name, Path(folder), place.torch) for name in libraries}
        else:
            first = {}
        found = {name: list[to_accuracy.Run]() for name in libraries}
        for _ in range(runs):
            for name in libraries:
                found[name].append(to_accuracy.seconds_to(target, name, Path(folder), place.torch))
    yield {
        "work": f"from process start to {100 * target:g} %, {place.samples:,} digits of 784, batch 128",
        "seconds": {name: spread([run.seconds for run in some]) for name, some in found.items()},
        "asked": dict.fromkeys(libraries[1:], 2.0),
        "epochs": {name: [run.epochs for run in some] for name, some in found.items()},
        "seconds of the first": {name: run.seconds for name, run in first.items()},
        "execution": {OURS: found[OURS][-1].execution},
    }


def feeds(place: Place) -> Iterator[dict[str, Any]]:
    """Batches copied to the device while it computes, and batches gathered on the device."""
    if place.on_gpu:
        yield from feeding.on_gpu(place.small)


def ranks(place: Place) -> Iterator[dict[str, Any]]:
    """The sum of a data-parallel step over one rank, by NCCL: that its calls work, and can be captured."""
    if place.on_gpu:
        entries = {OURS: partial(nccl_sum, place, True), "NCCL's own sum, eager": partial(nccl_sum, place, False)}
        work = f"sum of {place.parameters // 8:,} float32 over one rank, by NCCL"
        yield race(place, work, entries | {"copy": partial(copy, place, place.parameters // 8)}, {})


def nccl_sum(place: Place, in_tree: bool) -> Contender:
    """The sum as messages and a tree, in a graph; or as NCCL makes it. Of one rank it must change nothing."""
    backend, one = place.backend, Ranks.of_threads(1)[0]
    assert isinstance(backend, CudaBackend)
    assert one._engine is not None
    by = Nccl(one._engine, backend, one.gather)
    flat = backend.asarray(np.random.default_rng(1).standard_normal(place.parameters // 8, np.float32))
    rows, before = backend.empty((1, flat.size), np.float32), flat.copy()

    def sums() -> None:
        if in_tree:
            by.scatter(flat, [0, flat.size], rows)
            by.gather(rows[0], flat, [0, flat.size])
        else:
            by.sum_(flat)

    with backend.scope():
        sums()
        work = backend.capture(sums).launch if in_tree else sums
        work()
        if not (flat == before).all().item():
            raise RuntimeError("a sum over one rank has changed the numbers")
    return Contender(work, execution="captured" if in_tree else "eager")


# --- the whole check ----------------------------------------------------------------------------------------------

SECTIONS: dict[str, tuple[Callable[[Place], Iterator[dict[str, Any]]], int]] = {  # with a time limit in seconds
    "optimizers": (optimizers, 45),
    "steps": (steps, 90),
    "large batch": (large_batch, 30),
    "epochs": (epochs, 35),
    "accuracy": (accuracy, 55),
    "feeding": (feeds, 35),
    "ranks": (ranks, 15),
}


def environment(place: Place) -> dict[str, Any]:
    """Device, driver, versions, date and commit."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    versions = {"python": platform.python_version()}
    ours = ("gpubatch", "numpy", "cupy-cuda12x", "cupy-cuda13x", "cupy", "nvmath-python", "nvidia-cublas")
    for name in (
        *ours,
        "nvidia-cublas-cu12",
        "nvidia-nccl-cu12",
        "nvidia-nccl-cu13",
        "torch",
        "triton",
        "jax",
        "jaxlib",
        "optax",
    ):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    found = {"device": place.backend.device, "date": date.today().isoformat(), "commit": commit, "versions": versions}
    if place.on_gpu:
        runtime = gb.backend.load_cupy().cuda.runtime
        found |= {"driver serves CUDA": runtime.driverGetVersion(), "CUDA runtime": runtime.runtimeGetVersion()}
        details = runtime.getDeviceProperties(0)
        names = ("major", "minor", "multiProcessorCount", "l2CacheSize", "totalGlobalMem")
        found["properties"] = {name: details[name] for name in names if name in details}
        found["matrix products"] = products_for(place.backend, np.dtype("float32"), "full").reason
        found["card before"] = card()
    return found


def card() -> dict[str, str]:
    """Driver, clocks, power and temperature as nvidia-smi reports them now."""
    names = ["driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.draw", "power.limit"]
    where = f"--id={gb.backend.load_cupy().cuda.runtime.deviceGetPCIBusId(0)}"
    query = ["nvidia-smi", where, f"--query-gpu={','.join([*names, 'temperature.gpu'])}", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    values = [value.strip() for value in done.stdout.strip().split(",")]
    return dict(zip([*names, "temperature.gpu"], values, strict=True)) if done.returncode == 0 else {}


def sources() -> list[str]:
    """All CUDA sources in the tests' tables: gpubatch's own, and all that the benchmarks need."""
    sys.path.insert(0, str(ROOT / "tests"))
    import kernel_report

    return list(kernel_report.sources().values())


def compiled(place: Place) -> Iterator[dict[str, Any]]:
    """Compile the sources into CuPy's cache, in as many threads as CPUs: NVRTC runs without Python's lock."""
    texts = sources()[:: 40 if place.small else 1]
    start = time.perf_counter()

    def one(text: str) -> str:
        try:
            place.backend.compile(text, KERNEL.search(text)[1])
        except Exception as error:  # CuPy's message; the tests will say more
            return in_a_line(error)
        return ""

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        failed = [error for error in pool.map(one, texts) if error]
    yield {"sources": len(texts), "failed": failed, "compiled in": time.perf_counter() - start}


def peers(place: Place) -> Iterator[dict[str, str]]:
    """The peers that cannot take part, and why; runs in its own process, because JAX allocates the device's memory."""
    yield {name: why for name in ("torch", "jax") if (why := why_not(name, place.on_gpu))}


BEFORE = {"peers": peers, "sources": compiled}


def tests(seconds: float, *which: str) -> dict[str, Any]:
    """Run ``pytest -m gpu`` on ``which``: the outcomes of the tests that ran within the time limit."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-v", "--no-header", "-p", "no:cacheprovider"]
    output, wrong = run_within([*command, *which], seconds, ROOT)
    print("\n".join(output.splitlines()[-40:]), flush=True)
    return judged(output, wrong)


def judged(output: str, wrong: str) -> dict[str, Any]:
    """Parse the output of ``pytest -v``; ``wrong`` is empty if pytest succeeded."""
    form = r"^(\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED)( |$)"  # a test's parameters may have spaces
    outcomes = {test: outcome.lower() for test, outcome, _ in re.findall(form, output, re.MULTILINE)}
    of_parity = {
        what: count([outcome for name, outcome in outcomes.items() if name.startswith(test)])
        for what, test in PARITY.items()
    }
    result = {
        "passed": not wrong and "passed" in outcomes.values(),
        "outcomes": count(list(outcomes.values())),
        "parity against float64": of_parity,
        "failed": [name for name, outcome in outcomes.items() if outcome in ("failed", "error")],
    }
    return {**result, "wrong": wrong, "end": output[-4000:]} if wrong else result


def count(outcomes: list[str]) -> dict[str, int]:
    return {outcome: outcomes.count(outcome) for outcome in sorted(set(outcomes))}


def run_within(command: list[str], seconds: float, folder: Path | None = None) -> tuple[str, str]:
    """Run a command with a time limit: its output, and the error, if any; all its processes are killed at the end."""
    # In a worker of pytest-xdist, these variables would disable the benchmarks of a rehearsal.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    environment |= {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "PYTHONUNBUFFERED": "1"}
    environment["GPUBATCH_EXPECT"] = "gpu"  # tests that would skip without a GPU then fail
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        where = {"stdout": out, "stderr": errors, "cwd": folder, "env": environment, "start_new_session": True}
        process = subprocess.Popen(command, **where)
        try:
            code = process.wait(seconds)
            wrong = f"exit code {code}" if code else ""
        except subprocess.TimeoutExpired:
            wrong = f"not done after {seconds:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):  # torch.compile may leave workers
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        out.seek(0)
        errors.seek(0)
        return out.read(), f"{wrong}: {errors.read()[-2000:].strip()}" if wrong else ""


def section(name: str, rehearse: bool, seconds: float) -> tuple[list[dict[str, Any]], str]:
    """Run a section: its rows within the time limit, and the error, if any."""
    command = [sys.executable, __file__, "--section", name, *(["--rehearse"] if rehearse else [])]
    output, wrong = run_within(command, seconds)
    lines = output.splitlines()
    return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")], wrong


def kernel_times(out: Path, rehearse: bool, seconds: float) -> str:
    """Time all kernels of the core with pytest-benchmark into ``out``, for report.py; return the error, if any."""
    command = [sys.executable, "-m", "pytest", "bench/bench_kernels.py", "-m", "gpu", "-q", "--benchmark-enable"]
    limited = [*command, "--benchmark-max-time=0.2", f"--benchmark-json={out}"]
    _, wrong = run_within([*limited, "-k", "update_running"] if rehearse else limited, seconds, ROOT)
    return wrong


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: each row with its peers, medians (and quartiles), targets, and whether they are met."""
    lines = ["| work | gpubatch | beside | ratio | asked |", "|:--|--:|:--|--:|--:|"]
    for row in rows:
        seconds, work = row["seconds"], row["work"]
        ours = seconds[OURS]["median"] if OURS in seconds else None
        mine = in_ms(seconds[OURS]) if ours else "failed"
        how = row.get("execution", {}).get(OURS, "")
        if how.startswith("eager"):
            work = f"{work} ({how})"
        found = []
        for peer in seconds:
            if peer not in (OURS, "copy"):
                ratio = seconds[peer]["median"] / ours if ours else math.nan
                beside = f"{peer}: {in_ms(seconds[peer])}"
                found.append((beside, f"{ratio:.2f}x", verdict(ratio, row["asked"].get(peer), "{}x")))
        if "share" in row:
            share, asked = 100 * row["share"], 100 * row["asked"]["share"]
            found.append((row.get("of", "a copy's bandwidth"), f"{share:.1f} %", verdict(share, asked, "{:.0f} %")))
        found += [(f"{name}: failed, {why}", "", "") for name, why in row.get("failed", {}).items()]
        for place, texts in enumerate(found or [("", "", "")]):
            first = ("", "") if place else (work, mine)
            lines.append(f"| {' | '.join(text.replace('|', '/') for text in (*first, *texts))} |")
    return "\n".join(lines)


def in_ms(seconds: dict[str, float]) -> str:
    """Median and quartiles."""
    median, low, high = (1e3 * seconds[name] for name in ("median", "low", "high"))
    return f"{median:.4g} ms ({low:.3g} to {high:.3g})"


def verdict(found: float, asked: float | None, form: str) -> str:
    if asked is None:
        return ""
    return form.format(asked) + ("" if found >= asked else ", **not met**")


class Results:
    """The results so far, in files that are complete at any time."""

    def __init__(self, about: dict[str, Any], folder: Path, patience: int = 1) -> None:
        self.found: dict[str, Any] = {**about, "complete": False, "parts": {}, "rows": [], "wrong": {}}
        self.started, self.folder, self.patience = time.monotonic(), folder, patience
        self.name = f"gpu-{about['date']}-{about['commit'][:8] or 'unknown'}"
        folder.mkdir(parents=True, exist_ok=True)

    def left(self, limit: float = math.inf) -> float:
        """The seconds left for a part with the time limit ``limit``; ``patience`` multiplies all limits."""
        return max(1.0, min(self.patience * limit, self.patience * WHOLE - (time.monotonic() - self.started)))

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[dict[str, Any]]:
        """Run a part; the content of the dictionary is saved when it ends."""
        start, result = time.monotonic(), dict[str, Any]()
        yield result
        if result.get("wrong"):
            self.found["wrong"][name] = result["wrong"]
        self.found["parts"][name] = {**result, "seconds": round(time.monotonic() - start, 1)}
        self.write()

    def write(self) -> None:
        text = f"{self.found['device']}, {self.found['date']}\n\n{table(self.found['rows'])}\n"
        for end, content in (("json", json.dumps(self.found, indent=1) + "\n"), ("md", text)):
            aside = self.folder / f".{self.name}.{end}.{os.getpid()}"
            aside.write_text(content)
            aside.replace(self.folder / f"{self.name}.{end}")

    @property
    def good(self) -> bool:
        """Whether nothing of gpubatch failed; the table lists failures of peers."""
        ours = any(OURS in contender for row in self.found["rows"] for contender in row.get("failed", {}))
        tests = all(part.get("passed", True) for part in self.found["parts"].values())
        return not self.found["wrong"] and not ours and tests


def run(place: Place, results: Results, rehearse: bool) -> None:
    """Run all parts: compilation, parity, timings, then the other tests in the time left."""
    few = ["-k", "float32-l2_loss or float32-sgd"] if rehearse else []
    if place.on_gpu:
        with results.part("peers") as part:
            rows, part["wrong"] = section("peers", rehearse, results.left(PEERS))
            part["have no part"] = rows[0] if rows else {}
        with results.part("sources") as part:
            rows, wrong = section("sources", rehearse, results.left(SOURCES))
            part |= {**(rows[0] if rows else {}), "wrong": wrong or (rows[0]["failed"] if rows else "")}
        with results.part("parity") as part:
            part |= tests(results.left(PARITY_TESTS), *PARITY.values(), *few)
    for name in SECTIONS:
        with results.part(name) as part:
            rows, wrong = section(name, rehearse, results.left(SECTIONS[name][1]))
            results.found["rows"] += rows
            part |= {"rows": len(rows), "wrong": wrong}
            print(table(rows), wrong, sep="\n", flush=True)
    if place.on_gpu:
        results.found["card after"] = card()
        with results.part("single kernels") as part:
            file = results.folder / f"{results.name}-kernels.json"
            part["wrong"] = kernel_times(file, rehearse, results.left(KERNEL_TIMES))
        with results.part("tests") as part:
            part |= tests(results.left(), *(["tests/test_cuda_streams.py", "-k", "own"] if rehearse else ["tests"]))
    results.found["complete"] = True
    results.write()


def main() -> int:
    """Run the check; exit code 1 if a test or a section failed or there is no device."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results", help="folder for the results")
    parser.add_argument("--allow-missing", action="store_true", help="exit with 0 if there is no GPU")
    parser.add_argument("--rehearse", action="store_true", help="small sizes, on the device or the CPU; needs --out")
    parser.add_argument("--section", choices=[*SECTIONS, *BEFORE], help=argparse.SUPPRESS)
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # kills child processes on the way
    try:
        place = here(given.rehearse)
    except gb.BackendUnavailableError as error:
        print(error)
        return 0 if given.allow_missing else 1
    if given.section:
        work = BEFORE.get(given.section) or SECTIONS[given.section][0]
        with place.backend.own_stream():
            for row in work(place):
                print(json.dumps(row), flush=True)
        return 0
    if given.rehearse and given.out == parser.get_default("out"):
        parser.error("--rehearse needs --out: its results must not go to the default folder")
    results = Results(environment(place), given.out, patience=20 if given.rehearse else 1)
    print(json.dumps(results.found, indent=1), flush=True)
    run(place, results, given.rehearse)
    return int(not results.good)


if __name__ == "__main__":
    sys.exit(main())
