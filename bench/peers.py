"""Compare gpubatch with other libraries on the same work, CPU and float32: ``python bench/peers.py [--out FILE]``.

Contenders take turns for several rounds, each in its own process, all on the same ``--threads`` cores with as many
threads. A row has a contender's time and its ratio to gpubatch's, over the rounds; above 1 gpubatch is faster. Bounds
("copy loop", "matrix products", "conversion loop", "plain copy") do only the unavoidable part of the work, so their
ratio is the share of the bound that gpubatch reaches. Libraries that are not installed are skipped with a note.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.metadata
import importlib.util
import itertools
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from first_run import processor

Step = Callable[[], Any]  # its result must equal gpubatch's, see ``result_of``; None is not compared
ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = ("numpy", "torch", "jax", "jaxlib", "optax", "scikit-learn")
TOLERANCE = 1e-4  # relative, of the results of steps


class SkippedError(Exception):
    """A contender cannot run here; the message says why."""


# --- optimizers ----------------------------------------------------------------------------------------------------

LR, RHO, MU, EPS = 1e-3, 0.9, 0.9, 1e-8
GRADIENT = 0.01


def gpubatch_optimizer(name: str, sizes: Sequence[int]) -> Step:
    """A step of gpubatch on one flat buffer, or on separate arrays."""
    import gpubatch as gb

    makers: dict[str, Callable[[Any], gb.Optimizer]] = {
        "adam": lambda params: gb.Adam(params, lr=LR),
        "rmsprop": lambda params: gb.RMSProp(params, lr=LR, rho=RHO, eps=EPS),
        "momentum": lambda params: gb.HeavyBall(params, lr=LR, mu=MU),  # PyTorch's form
    }
    if len(sizes) == 1:
        params = gb.Parameters({"w": (sizes[0],)}, "cpu")
        params.grads.flat[...] = GRADIENT
        w, grads = params.flat, None
        opt = makers[name](params)
    else:
        arrays = [np.zeros(n, np.float32) for n in sizes]
        w, grads = arrays[-1], [np.full(n, GRADIENT, np.float32) for n in sizes]
        opt = makers[name](arrays)

    def step() -> Any:
        opt.step(grads)
        return w

    return step


def torch_optimizer(name: str, sizes: Sequence[int], **form: bool) -> Step:
    """The same step of PyTorch; ``form`` is ``fused=True`` or ``foreach=True``."""
    import torch

    params = [torch.zeros(n, requires_grad=True) for n in sizes]
    for p in params:
        p.grad = torch.full_like(p, GRADIENT)
    makers: dict[str, Callable[[], Any]] = {
        "adam": lambda: torch.optim.Adam(params, lr=LR, **form),
        "rmsprop": lambda: torch.optim.RMSprop(params, lr=LR, alpha=RHO, eps=EPS, **form),
        "momentum": lambda: torch.optim.SGD(params, lr=LR, momentum=MU, **form),
    }
    opt, w = makers[name](), params[-1].detach()

    def step() -> Any:
        opt.step()
        return w

    return step


def jax_adam(n: int) -> Step:
    """optax's Adam, compiled, with donated buffers."""
    import jax
    import jax.numpy as jnp
    import optax

    adam = optax.adam(LR)

    def update(w: Any, state: Any, g: Any) -> Any:
        updates, state = adam.update(g, state, w)
        return optax.apply_updates(w, updates), state

    compiled = jax.jit(update, donate_argnums=(0, 1))
    w, g = jnp.zeros(n), jnp.full(n, GRADIENT)
    state = adam.init(w)

    def step() -> Any:
        nonlocal w, state
        w, state = jax.block_until_ready(compiled(w, state, g))
        return w

    return step


def numpy_update(w: np.ndarray, g: np.ndarray, m: np.ndarray, v: np.ndarray, t: int, lr: float) -> None:
    """Adam as usually written in NumPy, in passes over whole arrays."""
    m *= 0.9
    m += (1 - 0.9) * g
    v *= 0.999
    v += (1 - 0.999) * g * g
    w -= lr * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + EPS)


def numpy_adam(n: int) -> Step:
    """Adam in plain NumPy."""
    w, m, v = (np.zeros(n, np.float32) for _ in range(3))
    g = np.full(n, GRADIENT, np.float32)
    counter = itertools.count(1)

    def step() -> Any:
        numpy_update(w, g, m, v, next(counter), LR)
        return w

    return step


# --- training steps ------------------------------------------------------------------------------------------------

SIZES = (784, 512, 256, 10)
TRAINING_LR = 1e-5  # small enough that gradients keep their usual size over thousands of steps on one batch


def batch_of(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and labels."""
    rng = np.random.default_rng(0)
    return rng.random((n, SIZES[0]), np.float32), rng.integers(0, SIZES[-1], n)


def initial_layers() -> list[tuple[np.ndarray, np.ndarray]]:
    """The initial weights and biases of all contenders."""
    rng = np.random.default_rng(1)
    return [
        (rng.standard_normal((a, b), np.float32) * np.float32(math.sqrt(2 / a)), np.zeros(b, np.float32))
        for a, b in itertools.pairwise(SIZES)
    ]


def gpubatch_training(n: int) -> Step:
    """gpubatch's forward, backward and update."""
    import gpubatch as gb

    x, y = batch_of(n)
    net = gb.mlp(list(SIZES), backend="cpu")
    for view, values in zip(net.parameters.values(), itertools.chain(*initial_layers()), strict=True):
        view[...] = values
    opt = gb.Adam(net.parameters, lr=TRAINING_LR)

    def step() -> Any:
        loss = net.step_loss(x, y)
        opt.step()
        return loss

    return step


def torch_network() -> Any:
    """The network in PyTorch, with the first weights of all."""
    import torch

    layers: list[Any] = []
    for W, b in initial_layers():
        linear = torch.nn.Linear(*W.shape)
        with torch.no_grad():
            linear.weight.copy_(torch.tensor(W.T))
            linear.bias.copy_(torch.tensor(b))
        layers += [linear, torch.nn.ReLU()]
    return torch.nn.Sequential(*layers[:-1])


def torch_training(n: int) -> Step:
    """The same in eager PyTorch with its fused Adam."""
    import torch

    x, y = map(torch.tensor, batch_of(n))
    net = torch_network()
    opt = torch.optim.Adam(net.parameters(), lr=TRAINING_LR, fused=True)

    def step() -> Any:
        opt.zero_grad(set_to_none=True)
        loss = torch.nn.functional.cross_entropy(net(x), y)
        loss.backward()
        opt.step()
        return loss.detach()

    return step


def jax_training(n: int) -> Step:
    """The same in JAX and optax: the whole step compiled, with donated buffers."""
    import jax
    import jax.numpy as jnp
    import optax

    x, y = map(jnp.asarray, batch_of(n))
    adam = optax.adam(TRAINING_LR)

    def loss_at(layers: Any, x: Any, y: Any) -> Any:
        *hidden, last = layers
        for W, b in hidden:
            x = jax.nn.relu(x @ W + b)
        z = x @ last[0] + last[1]
        return optax.softmax_cross_entropy_with_integer_labels(z, y).mean()

    def update(layers: Any, state: Any, x: Any, y: Any) -> Any:
        loss, grads = jax.value_and_grad(loss_at)(layers, x, y)
        updates, state = adam.update(grads, state, layers)
        return optax.apply_updates(layers, updates), state, loss

    compiled = jax.jit(update, donate_argnums=(0, 1))
    layers = jax.tree.map(jnp.asarray, initial_layers())
    state = adam.init(layers)

    def step() -> Any:
        nonlocal layers, state
        layers, state, loss = jax.block_until_ready(compiled(layers, state, x, y))
        return loss

    return step


def sklearn_training(n: int) -> Step:
    """``MLPClassifier.partial_fit`` of one batch: its Adam, no shuffling, no weight decay."""
    from sklearn.neural_network import MLPClassifier

    x, y = batch_of(n)
    model = MLPClassifier(
        SIZES[1:-1], solver="adam", alpha=0, batch_size=n, learning_rate_init=TRAINING_LR, shuffle=False, random_state=0
    )
    model.partial_fit(x, y, classes=np.arange(SIZES[-1]))  # creates layers and optimizer, and runs a step
    model.coefs_, model.intercepts_ = map(list, zip(*initial_layers(), strict=True))
    del model._optimizer  # the next step creates a new one, for these layers

    def step() -> Any:
        model.partial_fit(x, y)
        return model.loss_

    return step


def numpy_training(n: int) -> Step:
    """The same as usually written in NumPy."""
    x, y = batch_of(n)
    layers, rows = initial_layers(), np.arange(n)
    states = [[(np.zeros_like(p), np.zeros_like(p)) for p in layer] for layer in layers]
    counter = itertools.count(1)

    def step() -> Any:
        t = next(counter)
        inputs = [x]
        for W, b in layers[:-1]:
            inputs.append(np.maximum(inputs[-1] @ W + b, 0))
        z = inputs[-1] @ layers[-1][0] + layers[-1][1]
        p = np.exp(z - z.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        loss = -np.log(p[rows, y]).mean()
        p[rows, y] -= 1
        dz = p / n
        for i in reversed(range(len(layers))):
            W, _ = layers[i]
            grads = inputs[i].T @ dz, dz.sum(axis=0)
            if i:
                dz = (dz @ W.T) * (inputs[i] > 0)
            for w, g, (m, v) in zip(layers[i], grads, states[i], strict=True):
                numpy_update(w, g, m, v, t, TRAINING_LR)
        return loss

    return step


def matrix_products(n: int) -> Step:
    """Only the step's eight matrix products, in NumPy: a bound for all contenders that use its BLAS."""
    rng = np.random.default_rng(0)
    x = [rng.random((n, width), np.float32) for width in SIZES]
    dx = [rng.random((n, width), np.float32) for width in SIZES]
    W = [rng.random(shape, np.float32) for shape in itertools.pairwise(SIZES)]
    dW = [np.empty_like(w) for w in W]

    def step() -> None:
        for i in range(len(W)):
            np.matmul(x[i], W[i], out=x[i + 1])
        for i in reversed(range(len(W))):
            np.matmul(x[i].T, dx[i + 1], out=dW[i])
            if i:
                np.matmul(dx[i + 1], W[i].T, out=dx[i])

    return step


# --- an epoch of batches -------------------------------------------------------------------------------------------

SAMPLES, FEATURES, BATCH = 60_000, 784, 256


def images() -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of MNIST's shape. All images are shifts of one image, so the mean of any batch is the same."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, FEATURES, np.uint8)
    shifted = np.lib.stride_tricks.sliding_window_view(np.tile(image, 2), FEATURES)
    return shifted[rng.integers(0, FEATURES, SAMPLES)], rng.integers(0, 10, SAMPLES)


def gpubatch_epoch() -> Step:
    """A shuffled epoch of gpubatch's loader."""
    import gpubatch as gb

    loader = gb.Loader(*images(), batch_size=BATCH, backend="cpu", dtype="float32", scale=1 / 255)

    def epoch() -> Any:
        for x, _ in loader:
            last = x
        return last.mean()

    return epoch


def torch_epoch(batched: bool) -> Step:
    """The same in PyTorch: as in its tutorials, or ``batched``, with one indexing operation per batch."""
    import torch
    from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

    torch.manual_seed(0)
    dataset = TensorDataset(*map(torch.tensor, images()))
    if batched:
        sampler = BatchSampler(RandomSampler(dataset), BATCH, drop_last=False)
        loader = DataLoader(dataset, sampler=sampler, batch_size=None)
    else:
        loader = DataLoader(dataset, batch_size=BATCH, shuffle=True)

    def epoch() -> Any:
        for x, _ in loader:
            last = x.float().div_(255)
        return last.mean()

    return epoch


def numpy_epoch() -> Step:
    """The same in plain NumPy."""
    X, Y = images()
    rng = np.random.default_rng(0)

    def batches() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        order = rng.permutation(SAMPLES)
        for start in range(0, SAMPLES, BATCH):
            index = order[start : start + BATCH]
            yield X[index].astype(np.float32) * np.float32(1 / 255), Y[index]

    def epoch() -> Any:
        for x, _ in batches():
            last = x
        return last.mean()

    return epoch


# --- bounds --------------------------------------------------------------------------------------------------------

BOUNDS = """
#include <omp.h>

// The reads and writes of a step of Adam: four arrays in, three out.
extern "C" void copy_loop(float* w, const float* g, float* m, float* v, long n) {
#pragma omp parallel for simd schedule(static)
    for (long i = 0; i < n; ++i) {
        w[i] += g[i];
        m[i] += 1;
        v[i] += 1;
    }
}

// The same of any rule: of COUNT arrays the second is only read. With what its neighbours in the rule have, too: lines
// are prefetched, since all arrays come to the end of a page at once.
template <int COUNT>
static void move(float* const* arrays, long n) {
#pragma omp parallel for schedule(static)
    for (long line = 0; line < n / 16; ++line) {
        for (int a = 0; a < COUNT; ++a) __builtin_prefetch(arrays[a] + 16 * line + 512);
#pragma omp simd
        for (long i = 16 * line; i < 16 * line + 16; ++i) {
            arrays[0][i] += arrays[1][i];
            for (int a = 2; a < COUNT; ++a) arrays[a][i] += 1;
        }
    }
}

extern "C" void bytes_loop(float* const* arrays, int count, long n) {
    count == 2 ? move<2>(arrays, n) : count == 3 ? move<3>(arrays, n) : move<4>(arrays, n);
}

// Convert batches in order; each thread has a buffer for one batch.
extern "C" void conversion_loop(const unsigned char* x, float* buffers, long n, long batch, float scale) {
#pragma omp parallel
    {
        float* out = buffers + omp_get_thread_num() * batch;
#pragma omp for schedule(static)
        for (long start = 0; start < n; start += batch) {
            const long size = n - start < batch ? n - start : batch;
#pragma omp simd
            for (long i = 0; i < size; ++i) out[i] = x[start + i] * scale;
        }
    }
}
"""


def compiled_bounds() -> ctypes.CDLL:
    """Compile the loops above for this processor."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        raise SkippedError("no C++ compiler")
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "bounds.cpp"), Path(folder, "bounds.so")
        source.write_text(BOUNDS)
        flags = ["-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"]
        done = subprocess.run([compiler, *flags, source, "-o", library], capture_output=True, text=True)
        if done.returncode:
            raise SkippedError(f"{compiler} failed: {done.stderr.strip().splitlines()[-1]}")
        return ctypes.CDLL(str(library))


def copy_loop(n: int) -> Step:
    """Adam's memory bound: the same 28 bytes per parameter, hardly any arithmetic."""
    loop = compiled_bounds().copy_loop
    array = np.ctypeslib.ndpointer(np.float32)
    loop.argtypes, loop.restype = [array, array, array, array, ctypes.c_long], None
    w, m, v = (np.zeros(n, np.float32) for _ in range(3))
    g = np.full(n, GRADIENT, np.float32)
    return lambda: loop(w, g, m, v, n)


def plain_copy() -> Step:
    """Copy the same batches in order from a converted array."""
    X, Y = images()
    converted = X.astype(np.float32)

    def epoch() -> None:
        for start in range(0, SAMPLES, BATCH):
            x, y = converted[start : start + BATCH].copy(), Y[start : start + BATCH].copy()
        del x, y

    return epoch


def conversion_loop() -> Step:
    """An epoch's memory bound: convert the same bytes in order, without labels."""
    loop = compiled_bounds().conversion_loop
    loop.argtypes = [np.ctypeslib.ndpointer(t) for t in (np.uint8, np.float32)] + [ctypes.c_long] * 2 + [ctypes.c_float]
    loop.restype = None
    X, _ = images()
    buffers = np.empty((available_cores(), BATCH * FEATURES), np.float32)
    return lambda: loop(X, buffers, X.size, BATCH * FEATURES, 1 / 255)


# --- the work ------------------------------------------------------------------------------------------------------

THOUSAND, MILLION = 10**3, 10**6
SIZE_NAMES = {10 * THOUSAND: "10 thousand", 100 * THOUSAND: "100 thousand"}
SIZE_NAMES |= {n * MILLION: f"{n} million" for n in (1, 10, 50)}
BATCHES = (32, 64, 128, 256, 512, 1024, 4096)


def adam(n: int) -> dict[str, Callable[[], Step]]:
    """Contenders for Adam on one flat array."""
    found: dict[str, Callable[[], Step]] = {
        "gpubatch": partial(gpubatch_optimizer, "adam", [n]),
        "PyTorch fused": partial(torch_optimizer, "adam", [n], fused=True),
        "JAX + optax": partial(jax_adam, n),
        "NumPy": partial(numpy_adam, n),
    }
    return found | ({"copy loop": partial(copy_loop, n)} if n >= MILLION else {})


def other_optimizer(name: str, n: int, *forms: str) -> dict[str, Callable[[], Step]]:
    """Contenders for another optimizer on one flat array; ``forms`` are PyTorch's."""
    return {"gpubatch": partial(gpubatch_optimizer, name, [n])} | {
        f"PyTorch {form}": partial(torch_optimizer, name, [n], **{form: True}) for form in forms
    }


def training(n: int) -> dict[str, Callable[[], Step]]:
    """Contenders for a training step of batch size n."""
    return {
        "gpubatch": partial(gpubatch_training, n),
        "PyTorch fused": partial(torch_training, n),
        "JAX + optax": partial(jax_training, n),
        "scikit-learn": partial(sklearn_training, n),
        "NumPy": partial(numpy_training, n),
        "matrix products": partial(matrix_products, n),
    }


WORK: dict[str, dict[str, Callable[[], Step]]] = {
    **{f"Adam, {name}": adam(n) for n, name in SIZE_NAMES.items()},
    "Adam, 100 arrays of 10 thousand": {
        "gpubatch": partial(gpubatch_optimizer, "adam", [10 * THOUSAND] * 100),
        "PyTorch fused": partial(torch_optimizer, "adam", [10 * THOUSAND] * 100, fused=True),
    },
    # PyTorch has no fused RMSProp.
    **{f"RMSProp, {SIZE_NAMES[n]}": other_optimizer("rmsprop", n, "foreach") for n in (MILLION, 10 * MILLION)},
    **{
        f"momentum, {SIZE_NAMES[n]}": other_optimizer("momentum", n, "foreach", "fused")
        for n in (MILLION, 10 * MILLION)
    },
    **{f"training step, {'-'.join(map(str, SIZES))}, Adam, batch {n}": training(n) for n in BATCHES},
    f"shuffled epoch, {SAMPLES:,} x {FEATURES} bytes, batch {BATCH}": {
        "gpubatch": gpubatch_epoch,
        "PyTorch": partial(torch_epoch, batched=False),
        "PyTorch batched": partial(torch_epoch, batched=True),
        "NumPy": numpy_epoch,
        "conversion loop": conversion_loop,
        "plain copy": plain_copy,
    },
}


# --- measuring -----------------------------------------------------------------------------------------------------


def available_cores() -> int:
    """The cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def result_of(step: Step) -> float | None:
    """The last number in the third call's result, equal for contenders that do the same work."""
    for _ in range(3):
        value = step()
    return None if value is None else float(np.asarray(value).reshape(-1)[-1])


def median_seconds(step: Step, budget: float) -> float:
    """The median time of a call, over ``budget`` seconds but at least three calls."""
    times: list[float] = []
    end = time.perf_counter() + budget
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def time_here(work: str, contender: str, budget: float) -> dict[str, Any]:
    """Warm up and time a contender in this process: ``seconds`` and ``result``, or the reason in ``skipped``."""
    try:
        step = WORK[work][contender]()
    except ModuleNotFoundError as error:
        return {"skipped": f"{error.name} is not installed"}
    except SkippedError as error:
        return {"skipped": str(error)}
    result = result_of(step)  # the warm-up
    return {"seconds": median_seconds(step, budget), "result": result}


def time_apart(work: str, contender: str, budget: float) -> dict[str, Any]:
    """Run :func:`time_here` in a child process."""
    command = [sys.executable, __file__, "--one", work, contender, "--budget", str(budget)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{contender} failed at {work}:\n{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


class Worker:
    """A contender of another script in a process of its own, which waits without work between commands.

    script: is run with ``--work contender`` and ``options``; it reads a command a line and answers in a line, in JSON.
    environment: of the process; by default this one's.
    """

    def __init__(self, script: str, contender: str, *options: str, environment: dict[str, str] | None = None) -> None:
        self.process = subprocess.Popen(
            [sys.executable, script, "--work", contender, *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def ask(self, **command: Any) -> dict[str, Any]:
        """The answer to a command."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            sys.exit(f"a contender failed at {command}; its error is above")
        found: dict[str, Any] = json.loads(answer)
        return found

    def close(self) -> None:
        """End the process."""
        self.process.communicate()


def compare(work: str, peers: list[str], rounds: int, budget: float) -> list[dict[str, Any]]:
    """Run gpubatch and ``peers`` in turn; return a row for each peer."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in ("gpubatch", *peers)}
    for _ in range(rounds):
        for name in list(runs):
            found = time_apart(work, name, budget)
            if "skipped" in found:
                print(f"{work:52} {name:16} skipped: {found['skipped']}", flush=True)
                del runs[name]
            else:
                runs[name].append(found)
    ours = runs.pop("gpubatch")
    return [row_of(work, peer, ours, theirs) for peer, theirs in runs.items()]


def row_of(work: str, peer: str, ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> dict[str, Any]:
    """Check the result of a peer, then print and return its row."""
    expected, result = ours[0]["result"], theirs[0]["result"]
    if result is not None and not math.isclose(result, expected, rel_tol=TOLERANCE):
        sys.exit(f"{work}: {peer} must return gpubatch's result {expected}, got {result}")
    ratios = [b["seconds"] / a["seconds"] for a, b in zip(ours, theirs, strict=True)]
    row = {
        "work": work,
        "peer": peer,
        "gpubatch_us": 1e6 * statistics.median(run["seconds"] for run in ours),
        "peer_us": 1e6 * statistics.median(run["seconds"] for run in theirs),
        "ratio": statistics.median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
    }
    print(
        f"{work:52} {peer:16} {row['gpubatch_us']:11,.1f} {row['peer_us']:11,.1f} {row['ratio']:8.2f} "
        f"({min(ratios):.2f} to {max(ratios):.2f})",
        flush=True,
    )
    return row


def conditions(threads: int, rounds: int) -> dict[str, Any]:
    """Machine, versions, threads and rounds."""
    import gpubatch as gb
    from gpubatch.ops import host_library

    found = [name for name in LIBRARIES if any(importlib.metadata.distributions(name=name))]
    versions = {"python": platform.python_version(), "gpubatch": gb.__version__}
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        commit = subprocess.run(describe, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    except OSError:  # no git
        commit = ""
    return {
        "date": date.today().isoformat(),
        "processor": f"{processor()}, {os.cpu_count()} cores",
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "commit": commit or "unknown",
        "versions": versions | {name: importlib.metadata.version(name) for name in found},
        "compiled": not isinstance(host_library(), str),
        "threads": threads,
        "rounds": rounds,
    }


def limit_threads(threads: int) -> None:
    """Limit this process and its children to ``threads`` cores, and each library to as many threads."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])  # the only limit that XLA obeys
    os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
    os.environ["JAX_PLATFORMS"] = "cpu"


def main() -> None:
    """Run all comparisons; with ``--one`` time one contender."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="number of rounds")
    parser.add_argument("--threads", type=int, default=2, help="number of cores and of threads")
    parser.add_argument("--budget", type=float, default=0.7, help="seconds per contender and round")
    parser.add_argument("--only", default="", help="only work with this text in its name")
    parser.add_argument("--peers", default="", help="only peers with these prefixes, such as PyTorch,JAX")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(time_here(*arguments.one, arguments.budget)))
        return
    if not 1 <= arguments.threads <= available_cores():
        parser.error(f"--threads must be from 1 to {available_cores()} (available cores), got {arguments.threads}")
    limit_threads(arguments.threads)
    wanted = tuple(arguments.peers.split(","))
    chosen = {
        work: peers
        for work, contenders in WORK.items()
        if arguments.only in work and (peers := [p for p in contenders if p != "gpubatch" and p.startswith(wanted)])
    }
    found = conditions(arguments.threads, arguments.rounds)
    print(f"{'work':52} {'peer':16} {'gpubatch µs':>11} {'peer µs':>11} {'ratio':>8}", flush=True)
    rows: list[dict[str, Any]] = []
    for number, (work, peers) in enumerate(chosen.items(), 1):
        print(f"{number} of {len(chosen)}: {work}", file=sys.stderr, flush=True)
        rows += compare(work, peers, arguments.rounds, arguments.budget)
        if arguments.out:
            arguments.out.write_text(json.dumps({**found, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
