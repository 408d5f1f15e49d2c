"""What a GPU does with gpubatch, in one command: ``python bench/gpu_check.py [--out DIR]``, under eight minutes.

Runs the tests that need a device, then times gpubatch beside PyTorch (where it is installed) and beside a plain copy of
the same bytes: device events, warm-up, medians. Writes JSON and a Markdown table. It changes no setting of the card.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import itertools
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the checkout that this file belongs to, installed or not

import gpubatch as gb  # noqa: E402

REPEATS = 30
PARAMETERS = 256 * 2**20
BYTES_PER_PARAMETER = {"adam": 28, "rmsprop": 20, "momentum": 20}  # what a step must read and write, float32


def environment() -> dict[str, Any]:
    """Device, driver, versions, date and commit."""
    cupy = gb.backend.load_cupy()
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    versions = {"python": platform.python_version(), "numpy": np.__version__, "gpubatch": gb.__version__}
    for name in ("cupy", "torch", "jax"):
        if importlib.util.find_spec(name):
            versions[name] = __import__(name).__version__
    runtime = cupy.cuda.runtime
    return {
        "device": gb.get_backend("cuda").device,
        "driver serves CUDA": runtime.driverGetVersion(),
        "CUDA runtime": runtime.runtimeGetVersion(),
        "versions": versions,
        "date": date.today().isoformat(),
        "commit": commit,
    }


def run_tests() -> dict[str, Any]:
    """``pytest -m gpu``: its last line, and whether it passed."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "--no-header", "-p", "no:cacheprovider"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    lines = done.stdout.strip().splitlines()
    print("\n".join(lines[-40:]), flush=True)
    return {"passed": done.returncode == 0, "summary": lines[-1] if lines else done.stderr[-2000:]}


def kernel_times(out: Path) -> None:
    """Every kernel of the core on the device, as pytest-benchmark measures it, to ``out``; report.py shows it."""
    command = [sys.executable, "-m", "pytest", "bench/bench_kernels.py", "-m", "gpu", "-q", "--benchmark-enable"]
    subprocess.run([*command, "--benchmark-max-time=0.3", f"--benchmark-json={out}"], cwd=ROOT, check=False)


def device_seconds(work: Callable[[], Any], repeats: int = REPEATS) -> float:
    """The median time of ``work`` on the device, between two events; the work is larger than its caches."""
    cupy = gb.backend.load_cupy()
    for _ in range(3):
        work()
    times = []
    for _ in range(repeats):
        start, stop = cupy.cuda.Event(), cupy.cuda.Event()
        start.record()
        work()
        stop.record()
        stop.synchronize()
        times.append(cupy.cuda.get_elapsed_time(start, stop) / 1000)
    return statistics.median(times)


def wall_seconds(work: Callable[[], Any], synchronize: Callable[[], Any], steps: int = 200) -> float:
    """The median time of a step as a program sees it: many steps in a row, waited for once; for short steps."""
    work()
    synchronize()
    times = []
    for _ in range(7):
        start = time.perf_counter()
        for _ in range(steps):
            work()
        synchronize()
        times.append((time.perf_counter() - start) / steps)
    return statistics.median(times)


def copy_bandwidth(backend: gb.Backend) -> float:
    """Bytes per second, read and written, of a copy on the device."""
    source, target = backend.zeros(PARAMETERS, "float32"), backend.zeros(PARAMETERS, "float32")

    def copy() -> None:
        target[...] = source

    return 2 * source.nbytes / device_seconds(copy)


def free() -> None:
    """Give back what gpubatch's and PyTorch's pools keep, so that the next one has room."""
    gc.collect()
    gb.backend.load_cupy().get_default_memory_pool().free_all_blocks()
    if "torch" in sys.modules:
        sys.modules["torch"].cuda.empty_cache()


def optimizers() -> list[dict[str, Any]]:
    """A step on 256 M parameters against a copy's bandwidth and PyTorch."""
    backend = gb.get_backend("cuda")
    copy = copy_bandwidth(backend)
    rows = []
    kinds = {"adam": gb.Adam, "rmsprop": gb.RMSProp, "momentum": gb.Momentum}
    for name, kind in kinds.items():
        params = gb.Parameters({"w": (PARAMETERS,)}, backend)
        params.grads.flat[...] = 0.01
        opt = kind(params, lr=1e-3)
        seconds = device_seconds(opt.step)
        bandwidth = BYTES_PER_PARAMETER[name] * PARAMETERS / seconds
        del params, opt
        free()
        peer = torch_optimizer(name, [PARAMETERS])
        free()
        rows.append(
            {
                "work": f"{name}, 256 M float32 parameters",
                "gpubatch_ms": 1e3 * seconds,
                "torch_ms": peer and 1e3 * peer,
                "share of a copy's bandwidth": bandwidth / copy,
                "copy_TB_per_s": copy / 1e12,
            }
        )
    arrays = {str(i): backend.zeros(10_000, "float32") for i in range(500)}
    grads = {name: a + np.float32(0.01) for name, a in arrays.items()}
    opt = gb.Adam(arrays)
    rows.append(
        {
            "work": "adam, 500 arrays of 10 thousand",
            "gpubatch_ms": 1e3 * wall_seconds(lambda: opt.step(grads), backend.synchronize),
            "torch_ms": (peer := torch_optimizer("adam", [10_000] * 500)) and 1e3 * peer,
        }
    )
    return rows


def torch_optimizer(name: str, sizes: list[int]) -> float | None:
    """PyTorch's best form of the same step."""
    if importlib.util.find_spec("torch") is None:
        return None
    import torch

    params = [torch.zeros(n, device="cuda", requires_grad=True) for n in sizes]
    for p in params:
        p.grad = torch.full_like(p, 0.01)
    makers: dict[str, Callable[[Any], Any]] = {
        "adam": lambda p: torch.optim.Adam(p, fused=True),
        "rmsprop": lambda p: torch.optim.RMSprop(p, foreach=True),
        "momentum": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9, fused=True),
    }
    opt = makers[name](params)
    return wall_seconds(opt.step, torch.cuda.synchronize, 20 if len(sizes) == 1 else 100)


def training_steps() -> list[dict[str, Any]]:
    """A whole training step of a small network, by batch size, against PyTorch eager."""
    backend = gb.get_backend("cuda")
    rng = np.random.default_rng(0)
    rows = []
    for batch in (32, 128, 512, 4096, 16384):
        net = gb.mlp([784, 512, 256, 10], backend=backend)
        opt = gb.Adam(net.parameters)
        x, y = rng.random((batch, 784), np.float32), rng.integers(0, 10, batch)
        xd, yd = backend.asarray(x), backend.asarray(y)

        def step(net: Any = net, opt: Any = opt, xd: Any = xd, yd: Any = yd) -> None:
            net.step_loss(xd, yd)
            opt.step()

        rows.append(
            {
                "work": f"training step, 784-512-256-10, Adam, batch {batch}",
                "gpubatch_ms": 1e3 * wall_seconds(step, backend.synchronize),
                "torch_ms": (peer := torch_step(x, y)) and 1e3 * peer,
            }
        )
    return rows


def torch_step(x: np.ndarray, y: np.ndarray) -> float | None:
    """The same step in PyTorch, eager, with its fused Adam."""
    if importlib.util.find_spec("torch") is None:
        return None
    import torch

    sizes = [784, 512, 256, 10]
    layers: list[Any] = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [torch.nn.Linear(inputs, outputs), torch.nn.ReLU()]
    net = torch.nn.Sequential(*layers[:-1]).cuda()
    opt = torch.optim.Adam(net.parameters(), fused=True)
    xd, yd = torch.tensor(x, device="cuda"), torch.tensor(y, device="cuda")

    def step() -> None:
        opt.zero_grad(set_to_none=True)
        torch.nn.functional.cross_entropy(net(xd), yd).backward()
        opt.step()

    return wall_seconds(step, torch.cuda.synchronize)


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: each row beside its peer."""
    lines = ["| work | gpubatch | PyTorch | ratio | of a copy's bandwidth |", "|---|---|---|---|---|"]
    for row in rows:
        peer = row["torch_ms"]
        share = row.get("share of a copy's bandwidth")
        cells = [
            row["work"],
            f"{row['gpubatch_ms']:.4g} ms",
            f"{peer:.4g} ms" if peer else "–",
            f"{peer / row['gpubatch_ms']:.2f}x" if peer else "–",
            f"{100 * share:.1f} %" if share else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Run everything; exit code 1 if a test failed or there is no device."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results", help="folder for the results")
    parser.add_argument("--allow-missing", action="store_true", help="exit with 0 where there is no GPU")
    arguments = parser.parse_args()
    try:
        gb.get_backend("cuda")
    except gb.BackendUnavailableError as error:
        print(error)
        sys.exit(0 if arguments.allow_missing else 1)
    found = environment()
    print(json.dumps(found, indent=1), flush=True)
    tests = run_tests()
    rows = [*optimizers(), *training_steps()]
    arguments.out.mkdir(parents=True, exist_ok=True)
    name = f"gpu-{found['date']}-{found['commit'][:8] or 'unknown'}"
    (arguments.out / f"{name}.json").write_text(json.dumps({**found, "tests": tests, "rows": rows}, indent=1) + "\n")
    (arguments.out / f"{name}.md").write_text(f"{found['device']}, {found['date']}\n\n{table(rows)}\n")
    print(table(rows), flush=True)
    kernel_times(arguments.out / f"{name}-kernels.json")
    sys.exit(0 if tests["passed"] else 1)


if __name__ == "__main__":
    main()
