"""What a GPU does with gpubatch, in one command: ``python bench/gpu_check.py [--out DIR]``, under eight minutes.

Runs the tests that need a device, among them every kernel against NumPy in float64, and then times gpubatch beside
PyTorch and JAX, where they are installed, and beside plain copies. Every section has a process of its own with a limit
of time, so that one that fails costs no other. Contenders run in turn, after a warm-up, between device events (JAX, and
everything on a CPU, by the clock); figures are medians, with quartiles. Writes JSON and a Markdown table. It changes no
setting of the card. ``--rehearse`` runs all of it on the CPU with small sizes: that shows that it works, nothing else.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the checkout that this file belongs to, installed or not

import feeding  # noqa: E402  beside this file

import gpubatch as gb  # noqa: E402

ROUNDS = 5  # in which every contender has its turn
SIZES = [784, 512, 256, 10]
BYTES_PER_PARAMETER = {"adam": 28, "rmsprop": 20, "momentum": 20}  # what a step must read and write, float32
ASKED = {"adam": 1.0, "rmsprop": 2.0, "momentum": 1.0}  # times as fast as PyTorch
OURS = "gpubatch"

Work = Callable[[], Any]


@dataclass
class Place:
    """Where it runs: the backend, its name for PyTorch, and how large the work is."""

    backend: gb.Backend
    torch: str
    parameters: int
    samples: int

    @property
    def on_gpu(self) -> bool:
        return self.backend.name == "cuda"


@dataclass
class Contender:
    """One of those who do the same work: ``steps`` of it in a call of ``work``; ``library`` has its clock."""

    work: Work
    library: str = OURS
    steps: int = 1
    seconds: list[float] = field(default_factory=list)


def here(rehearse: bool) -> Place:
    """The GPU, with sizes that fit it; or the CPU."""
    if rehearse:
        return Place(gb.get_backend("cpu"), "cpu", 1 << 14, 512)
    backend = gb.get_backend("cuda")
    largest = backend.memory().available // (2 * 5 * 4)  # two contenders, five arrays each at most
    return Place(backend, "cuda", min(256 * 2**20, 1 << (largest.bit_length() - 1)), 60_000)


# --- time ---------------------------------------------------------------------------------------------------------


def clock(place: Place, library: str) -> tuple[Callable[[], Any], Callable[[Any, Any], float]]:
    """What marks a moment on the device, and what gives the seconds between two of them."""
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


def measure(place: Place, contenders: dict[str, Contender], budget: float = 0.3) -> dict[str, dict[str, float]]:
    """Seconds a step of each: its median and quartiles over rounds of about ``budget`` seconds."""
    for contender in contenders.values():
        for _ in range(3):
            contender.work()
    for _ in range(1 if not place.on_gpu else ROUNDS):
        for contender in contenders.values():
            mark, between = clock(place, contender.library)
            start = mark()
            contender.work()
            one = max(between(start, mark()), 1e-7)
            calls = max(1, min(int(budget / one / 5), 1000)) if place.on_gpu else 1
            for _ in range(5):
                start = mark()
                for _ in range(calls):
                    contender.work()
                contender.seconds.append(between(start, mark()) / calls / contender.steps)
    found = {}
    for name, contender in contenders.items():
        low, middle, high = statistics.quantiles(contender.seconds, n=4)
        found[name] = {"median": middle, "low": low, "high": high}
    return found


def has(*libraries: str) -> bool:
    return all(importlib.util.find_spec(library) for library in libraries)


# --- update rules -------------------------------------------------------------------------------------------------


def optimizers(place: Place) -> Iterator[dict[str, Any]]:
    """A step on one large buffer against PyTorch and a copy's bandwidth; a step on many small arrays."""
    n = place.parameters
    kinds: dict[str, Callable[[Any], gb.Optimizer]] = {
        "adam": gb.Adam,
        "rmsprop": gb.RMSProp,
        "momentum": lambda params: gb.HeavyBall(params, lr=1e-3),
    }
    for name, kind in kinds.items():
        contenders = {OURS: Contender(our_update(place, kind, n)), "copy": Contender(copy(place, n))}
        if has("torch"):
            form = "foreach" if name == "rmsprop" else "fused"
            contenders[f"torch {form}"] = Contender(torch_update(place, name, [n], **{form: True}), "torch")
        found = measure(place, contenders, 1.0)
        bandwidth = {"share": BYTES_PER_PARAMETER[name] / 8 * found["copy"]["median"] / found[OURS]["median"]}
        peers = {peer: ASKED[name] for peer in found if peer.startswith("torch")}
        yield {
            "work": f"{name}, {n:,} float32 parameters",
            "seconds": found,
            "asked": {**peers, "share": 0.92},
        } | bandwidth
        contenders.clear()
        give_back(place)
    arrays = {str(i): place.backend.zeros(10_000, "float32") for i in range(500)}
    grads = {name: a + np.float32(0.01) for name, a in arrays.items()}
    opt = gb.Adam(arrays)
    contenders = {OURS: Contender(lambda: opt.step(grads))}
    if has("torch"):
        contenders["torch fused"] = Contender(torch_update(place, "adam", [10_000] * 500, fused=True), "torch")
    yield {"work": "adam, 500 arrays of 10,000", "seconds": measure(place, contenders), "asked": {"torch fused": 3.0}}


def our_update(place: Place, kind: Callable[[Any], gb.Optimizer], n: int) -> Work:
    params = gb.Parameters({"w": (n,)}, place.backend)
    params.grads.flat[...] = 0.01
    return kind(params).step


def copy(place: Place, n: int) -> Work:
    """Eight bytes an element: four are read, four are written."""
    source, target = (place.backend.zeros(n, "float32") for _ in range(2))

    def work() -> None:
        target[...] = source

    return work


def torch_update(place: Place, name: str, sizes: list[int], **form: bool) -> Work:
    import torch

    params = [torch.zeros(n, device=place.torch, requires_grad=True) for n in sizes]
    for p in params:
        p.grad = torch.full_like(p, 0.01)
    makers: dict[str, Callable[[Any], Any]] = {
        "adam": lambda p: torch.optim.Adam(p, **form),
        "rmsprop": lambda p: torch.optim.RMSprop(p, **form),
        "momentum": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9, **form),
    }
    return makers[name](params).step  # type: ignore[no-any-return]


def give_back(place: Place) -> None:
    """What the pools of gpubatch and PyTorch keep, so that the next one has room."""
    place.backend.free_unused()
    if place.on_gpu and "torch" in sys.modules:
        sys.modules["torch"].cuda.empty_cache()


# --- a training step ----------------------------------------------------------------------------------------------


def steps(place: Place) -> Iterator[dict[str, Any]]:
    """A whole training step of a small network, by batch size."""
    for batch in (32, 128, 512, 4096):
        yield training_step(
            place, batch, {"torch eager": 5.0, "torch compiled": 1.3, "jax scan": 1.2} if batch == 128 else {}
        )


def steps_in_tf32(place: Place) -> Iterator[dict[str, Any]]:
    """A large batch, with matrix products in TF32 for all: CuPy reads ``CUPY_TF32`` when it is imported."""
    if has("torch"):
        import torch

        torch.backends.cuda.matmul.allow_tf32 = True
    yield training_step(place, 16384 if place.on_gpu else 64, {"torch eager": 1.2}, " in TF32")


def training_step(place: Place, batch: int, asked: dict[str, float], how: str = "") -> dict[str, Any]:
    rng = np.random.default_rng(0)
    x, y = rng.random((batch, SIZES[0]), np.float32), rng.integers(0, SIZES[-1], batch)
    contenders = {OURS: Contender(our_step(place, x, y))}
    if has("torch"):
        contenders["torch eager"] = Contender(torch_step(place, x, y), "torch")
        if "torch compiled" in asked and place.on_gpu and has("triton"):
            contenders["torch compiled"] = Contender(torch_step(place, x, y, compiled=True), "torch")
    if "jax scan" in asked and has("jax", "optax"):
        contenders["jax scan"] = Contender(jax_steps(x, y, 50), "jax", 50)
    work = f"training step, {'-'.join(map(str, SIZES))}, Adam, batch {batch}{how}"
    return {"work": work, "seconds": measure(place, contenders), "asked": asked}


def our_step(place: Place, x: np.ndarray, y: np.ndarray) -> Work:
    net = gb.mlp(SIZES, backend=place.backend)
    opt = gb.Adam(net.parameters)
    X, Y = place.backend.asarray(x), place.backend.asarray(y)

    def step() -> None:
        net.step_loss(X, Y)
        opt.step()

    return step


def torch_network(place: Place) -> Any:
    import torch

    layers: list[Any] = []
    for inputs, outputs in itertools.pairwise(SIZES):
        layers += [torch.nn.Linear(inputs, outputs), torch.nn.ReLU()]
    return torch.nn.Sequential(*layers[:-1]).to(place.torch)


def torch_step(place: Place, x: np.ndarray, y: np.ndarray, compiled: bool = False) -> Work:
    import torch

    net = torch_network(place)
    opt = torch.optim.Adam(net.parameters(), fused=True)
    X, Y = torch.tensor(x, device=place.torch), torch.tensor(y, device=place.torch)

    def loss_and_gradients() -> None:
        torch.nn.functional.cross_entropy(net(X), Y).backward()

    run = torch.compile(loss_and_gradients, mode="reduce-overhead") if compiled else loss_and_gradients

    def step() -> None:
        opt.zero_grad(set_to_none=True)
        run()
        opt.step()

    return step


def jax_steps(x: np.ndarray, y: np.ndarray, count: int) -> Work:
    """``count`` steps in one compiled loop, on parameters that are handed on."""
    import jax
    import optax

    rng = np.random.default_rng(0)
    weights = [
        (rng.normal(0, (2 / a) ** 0.5, (a, b)).astype(np.float32), np.zeros(b, np.float32))
        for a, b in itertools.pairwise(SIZES)
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

    def work() -> None:
        nonlocal carry
        carry, values = run(carry)
        values.block_until_ready()

    return work


# --- an epoch -----------------------------------------------------------------------------------------------------


def epochs(place: Place) -> Iterator[dict[str, Any]]:
    """An epoch of training on bytes that are on the device, batch 128."""
    rng = np.random.default_rng(0)
    X = rng.integers(0, 256, (place.samples, SIZES[0]), np.uint8)
    Y = rng.integers(0, SIZES[-1], place.samples)
    net = gb.mlp(SIZES, backend=place.backend)
    loader = gb.Loader(X, Y, batch_size=128, scale=1 / 255, backend=place.backend)
    opt = gb.Adam(net.parameters)
    contenders = {OURS: Contender(lambda: gb.fit(net, loader, opt, 1, progress=False))}
    if has("torch"):
        contenders["torch, data on the device"] = Contender(torch_epoch(place, X, Y), "torch")
    work = f"epoch of {place.samples:,} x {SIZES[0]} uint8, batch 128, on the device"
    yield {"work": work, "seconds": measure(place, contenders, 3.0), "asked": {"torch, data on the device": 5.0}}


def torch_epoch(place: Place, X: np.ndarray, Y: np.ndarray) -> Work:
    import torch

    net = torch_network(place)
    opt = torch.optim.Adam(net.parameters(), fused=True)
    data, labels = torch.tensor(X, device=place.torch), torch.tensor(Y, device=place.torch)

    def epoch() -> None:
        order = torch.randperm(len(data), device=place.torch)
        for start in range(0, len(data), 128):
            index = order[start : start + 128]
            x = data.index_select(0, index).float().mul_(1 / 255)
            opt.zero_grad(set_to_none=True)
            torch.nn.functional.cross_entropy(net(x), labels.index_select(0, index)).backward()
            opt.step()

    return epoch


def feeds(place: Place) -> Iterator[dict[str, Any]]:
    """Batches that go to the device while it computes, and those that are gathered there."""
    if place.on_gpu:
        yield from feeding.on_gpu()


# --- all of it ----------------------------------------------------------------------------------------------------

SECTIONS: dict[str, tuple[Callable[[Place], Iterator[dict[str, Any]]], int]] = {  # with a limit in seconds
    "optimizers": (optimizers, 60),
    "steps": (steps, 75),
    "steps in TF32": (steps_in_tf32, 25),
    "epochs": (epochs, 45),
    "feeding": (feeds, 45),
}


def environment(place: Place) -> dict[str, Any]:
    """Device, driver, versions, date and commit."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    versions = {"python": platform.python_version()}
    for name in ("gpubatch", "numpy", "cupy-cuda12x", "cupy-cuda13x", "cupy", "nvmath-python", "torch", "jax", "optax"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    found = {"device": place.backend.device, "date": date.today().isoformat(), "commit": commit, "versions": versions}
    if place.on_gpu:
        runtime = gb.backend.load_cupy().cuda.runtime
        found |= {"driver serves CUDA": runtime.driverGetVersion(), "CUDA runtime": runtime.runtimeGetVersion()}
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        with contextlib.suppress(FileNotFoundError):
            found["driver"] = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    return found


def tests(seconds: int) -> dict[str, Any]:
    """``pytest -m gpu``: its last line, and whether it passed."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "--no-header", "-p", "no:cacheprovider", "tests"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired as error:
        return {"passed": False, "summary": f"not done after {seconds} s", "end": text_of(error.stdout)[-4000:]}
    lines = done.stdout.strip().splitlines()
    print("\n".join(lines[-40:]), flush=True)
    summary = lines[-1] if lines else done.stderr[-2000:]
    return {"passed": done.returncode == 0, "summary": summary, "failed": [x for x in lines if x.startswith("FAILED")]}


def section(name: str, rehearse: bool) -> tuple[list[dict[str, Any]], str]:
    """The rows of a section, as many as came within its time, and what went wrong."""
    environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    if name == "steps in TF32":
        environment["CUPY_TF32"] = "1"
    command = [sys.executable, __file__, "--section", name, *(["--rehearse"] if rehearse else [])]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        try:
            code = subprocess.run(
                command, stdout=out, stderr=errors, env=environment, timeout=SECTIONS[name][1]
            ).returncode
            wrong = f"exit code {code}" if code else ""
        except subprocess.TimeoutExpired:
            wrong = f"not done after {SECTIONS[name][1]} s"
        out.seek(0)
        errors.seek(0)
        rows = [json.loads(line) for line in out if line.startswith("{") and line.endswith("}\n")]
        return rows, f"{wrong}: {errors.read()[-2000:]}" if wrong else ""


def kernel_times(out: Path) -> None:
    """Every kernel of the core on the device, as pytest-benchmark measures it, to ``out``; report.py shows it."""
    command = [sys.executable, "-m", "pytest", "bench/bench_kernels.py", "-m", "gpu", "-q", "--benchmark-enable"]
    limited = [*command, "--benchmark-max-time=0.2", f"--benchmark-json={out}"]
    try:
        subprocess.run(limited, cwd=ROOT, check=False, timeout=60)
    except subprocess.TimeoutExpired:
        print("the times of single kernels were not done after 60 s", file=sys.stderr)


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: each row beside its peers, with what is asked."""
    lines = ["| work | gpubatch | beside | ratio | asked |", "|:--|--:|:--|--:|--:|"]
    for row in rows:
        ours, work = row["seconds"][OURS]["median"], row["work"]
        mine = f"{1e3 * ours:.4g} ms"
        for peer, seconds in row["seconds"].items():
            if peer not in (OURS, "copy"):
                asked = row["asked"].get(peer)
                ratio = f"{seconds['median'] / ours:.2f}x"
                lines.append(
                    cells(work, mine, f"{peer}: {1e3 * seconds['median']:.4g} ms", ratio, asked and f"{asked}x")
                )
                work = mine = ""
        if "share" in row:
            share = f"{100 * row['share']:.1f} %"
            lines.append(
                cells(work, mine, row.get("of", "a copy's bandwidth"), share, f"{100 * row['asked']['share']:.0f} %")
            )
        elif len(row["seconds"]) == 1:
            lines.append(cells(work, mine, "", "", ""))
    return "\n".join(lines)


def cells(*texts: str | None) -> str:
    return f"| {' | '.join(text or '' for text in texts)} |"


def text_of(output: Any) -> str:
    return output.decode() if isinstance(output, bytes) else output or ""


def main() -> int:
    """Run everything; exit code 1 if a test or a section failed or there is no device."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results", help="folder for the results")
    parser.add_argument("--allow-missing", action="store_true", help="exit with 0 where there is no GPU")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, small, nothing is written")
    parser.add_argument("--section", choices=SECTIONS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    try:
        place = here(given.rehearse)
    except gb.BackendUnavailableError as error:
        print(error)
        return 0 if given.allow_missing else 1
    if given.section:
        for row in SECTIONS[given.section][0](place):
            print(json.dumps(row), flush=True)
        return 0
    found = environment(place)
    print(json.dumps(found, indent=1), flush=True)
    tested = {"passed": True, "summary": "not run"} if given.rehearse else tests(120)
    rows, wrong = [], {}
    for name in SECTIONS:
        some, error = section(name, given.rehearse)
        rows += some
        if error:
            wrong[name] = error
        print(table(some), error, sep="\n", flush=True)
    if not given.rehearse:
        given.out.mkdir(parents=True, exist_ok=True)
        name = f"gpu-{found['date']}-{found['commit'][:8] or 'unknown'}"
        result = {**found, "tests": tested, "rows": rows, "wrong": wrong}
        (given.out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
        (given.out / f"{name}.md").write_text(f"{found['device']}, {found['date']}\n\n{table(rows)}\n")
        kernel_times(given.out / f"{name}-kernels.json")
    return int(bool(wrong) or not tested["passed"])


if __name__ == "__main__":
    sys.exit(main())
