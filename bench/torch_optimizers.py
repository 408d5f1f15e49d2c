"""Time gpubatch.torch beside torch.optim on the same tensors: ``python bench/torch_optimizers.py [--out FILE]``.

Each rule updates parameters of float32: one tensor of a million elements, ten of a million each, and 500 of 100 each.
Its contenders are gpubatch.torch and PyTorch's two forms, foreach and fused, where the rule has them; torch.optim has
no Lion, so its contender there is the algorithm written with ``torch._foreach_*``, as such implementations are. Each
contender is a process of its own; they take turns for several rounds and must end with the same numbers. Each step has
new gradient tensors, as after ``zero_grad()``, which are made outside of the measured time.

A loop beside them reads and writes the arrays of the rule, once each, and computes hardly anything. Under "bytes alone"
is how many times as fast as PyTorch's best form it is: a form that reads and writes them in every step can hardly have
a larger ratio.

With one thread the time is that of the processor, so other work on the machine counts little; with more it is the
clock's. ``--table FILE`` prints the table of an earlier run.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from peers import SkippedError, Worker, available_cores, compiled_bounds, conditions, limit_threads

import gpubatch as gb

SHAPES = {"1 x 1,000,000": [(1000, 1000)], "10 x 1,000,000": [(1000, 1000)] * 10, "500 x 100": [(100,)] * 500}
OURS = "gpubatch.torch"
FORMS = ("foreach", "fused")
BYTES = "bytes alone"
# The rule: gpubatch's class and its arguments, torch.optim's class and its, and how many times as fast ours shall be
# as the best form, for each of SHAPES.
RULES: dict[str, tuple[dict[str, Any], str, dict[str, Any], tuple[float, ...]]] = {
    "RMSProp": ({"lr": 1e-3, "rho": 0.99}, "RMSprop", {"lr": 1e-3}, (4, 4, 3)),
    "NAdam": ({"lr": 1e-3, "momentum_decay": 4e-3}, "NAdam", {"lr": 1e-3}, (3, 3, 3)),
    "RAdam": ({}, "RAdam", {}, (3, 3, 3)),
    "Lion": ({}, "", {}, (3, 3, 3)),
    "Adam": ({}, "Adam", {}, (1.1, 1.1, 3)),
    "AdamW": ({}, "AdamW", {}, ()),
    "Adagrad": ({}, "Adagrad", {}, ()),
    "Adamax": ({}, "Adamax", {}, ()),
    "Adadelta": ({}, "Adadelta", {}, ()),
    "HeavyBall": ({"lr": 0.1}, "SGD", {"lr": 0.1, "momentum": 0.9}, ()),
    "SGD": ({"lr": 0.1}, "SGD", {"lr": 0.1}, ()),
}
WARM_UP = 3  # steps, after which the last weight is compared
BUDGET = 0.1  # seconds of a contender in a round, but at least three steps
TOLERANCE = 1e-5  # of the last weight
MOST = 10  # tensors for which the loop of bytes is called


class ForeachLion:
    """Lion (Chen et al. 2023, algorithm 2) in PyTorch's operations on lists of tensors."""

    def __init__(self, params: list[Any], lr: float = 1e-4, betas: tuple[float, float] = (0.9, 0.99)) -> None:
        import torch

        self.foreach = torch
        self.params, self.lr, self.betas = params, lr, betas
        self.m = [torch.zeros_like(p) for p in params]

    def step(self) -> None:
        """One step."""
        torch, (beta1, beta2) = self.foreach, self.betas
        with torch.no_grad():
            g = [p.grad for p in self.params]
            update = torch._foreach_mul(self.m, beta1)
            torch._foreach_add_(update, g, alpha=1 - beta1)
            torch._foreach_sign_(update)
            torch._foreach_add_(self.params, update, alpha=-self.lr)
            torch._foreach_mul_(self.m, beta2)
            torch._foreach_add_(self.m, g, alpha=1 - beta2)


class BytesLoop:
    """Reads and writes what a step does: parameters, gradients and ``states`` states of each."""

    def __init__(self, params: list[Any], states: int) -> None:
        from gpubatch.torch import state_like

        self.loop = compiled_bounds().bytes_loop
        self.loop.argtypes, self.loop.restype = [ctypes.c_void_p, ctypes.c_int, ctypes.c_long], None
        self.params, self.states = params, [state_like(params) for _ in range(states)]
        for x in (x for tensors in self.states for x in tensors):
            x.zero_()

    def step(self) -> None:
        """One step."""
        for p, *states in zip(self.params, *self.states, strict=True):
            tensors = [p, p.grad, *states]
            addresses = (ctypes.c_void_p * len(tensors))(*(x.data_ptr() for x in tensors))
            self.loop(addresses, len(tensors), p.numel())


def optimizer(contender: str, rule: str, params: list[Any]) -> Any:
    """The contender's optimizer; None if it has no such rule or form."""
    import torch

    import gpubatch.torch

    ours, name, theirs, _ = RULES[rule]
    if contender == OURS:
        return getattr(gpubatch.torch, rule)(params, **ours)
    if contender == BYTES:
        opt = getattr(gb, rule)([np.zeros(1)], **ours)
        try:
            return BytesLoop(params, len(opt.rule.state))
        except SkippedError:
            return None
    if not name:
        return ForeachLion(params) if contender == "foreach" else None
    try:
        return getattr(torch.optim, name)(params, **theirs, **{contender: True})
    except TypeError:  # no such argument
        return None


def work(contender: str, threads: int) -> None:
    """Answer commands on standard input, a line of JSON each: make an optimizer, or run some steps."""
    import torch

    torch.set_num_threads(threads)
    clock = time.process_time if threads == 1 else time.perf_counter
    params: list[Any] = []
    opt: Any = None

    def timed() -> float:
        for p, g in zip(params, gradients, strict=True):
            p.grad = g.clone()
        start = clock()
        opt.step()
        return clock() - start

    gradients: list[Any] = []
    for line in sys.stdin:
        command = json.loads(line)
        if "steps" in command:
            found = {"seconds": statistics.median(timed() for _ in range(command["steps"]))}
        else:
            opt = None
            generator = torch.Generator().manual_seed(0)
            shapes = SHAPES[command["shapes"]]
            params = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
            gradients = [torch.randn(shape, generator=generator) for shape in shapes]
            # With many small tensors calls of the loop from Python would be what is measured.
            small = contender == BYTES and len(params) > MOST
            opt = None if small else optimizer(contender, command["rule"], params)
            if opt is None:
                found = {"skipped": True}
            else:
                found = {"seconds": [timed() for _ in range(WARM_UP)][-1], "result": float(params[-1].detach().sum())}
        print(json.dumps(found), flush=True)


def worker_of(contender: str, threads: int) -> Worker:
    """A contender in a process of its own."""
    return Worker(__file__, contender, "--threads", str(threads))


def compare(rule: str, shapes: str, ask: dict[str, Callable[..., dict[str, Any]]], rounds: int) -> dict[str, Any]:
    """Run the contenders of a rule in turn; medians, and the median over the rounds of each round's ratio."""
    steps, results = dict[str, int](), dict[str, float]()
    for name, worker in ask.items():
        found = worker(rule=rule, shapes=shapes)
        if "skipped" not in found:
            steps[name] = max(3, min(200, int(BUDGET / max(found["seconds"], 1e-6))))
            if name != BYTES:
                results[name] = found["result"]
    for name, result in results.items():
        if not math.isclose(result, results[OURS], rel_tol=TOLERANCE, abs_tol=1e-2):
            sys.exit(f"{rule}, {shapes}: {name} must end with {results[OURS]}, got {result}")
    runs: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, count in steps.items():
            runs[name].append(ask[name](steps=count)["seconds"])
    medians = {name: statistics.median(times) for name, times in runs.items()}
    best = min((name for name in medians if name not in (OURS, BYTES)), key=lambda name: medians[name])
    asked = RULES[rule][3]

    def ratio(name: str) -> float:
        return statistics.median(a / b for a, b in zip(runs[best], runs[name], strict=True))

    return {
        "rule": rule,
        "tensors": shapes,
        "microseconds": {name: round(1e6 * seconds, 1) for name, seconds in medians.items()},
        "best": best,
        "ratio": ratio(OURS),
        "of_bytes_alone": ratio(BYTES) if BYTES in runs else None,
        "asked": asked[list(SHAPES).index(shapes)] if asked else None,
    }


def table(found: dict[str, Any]) -> str:
    """A run's results as a table in Markdown."""
    lines = [
        "| rule | tensors | gpubatch.torch | best of PyTorch | times as fast | asked | bytes alone |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for row in found["rows"]:
        ours, best = (f"{row['microseconds'][name]:,.0f} µs" for name in (OURS, row["best"]))
        cells = [
            row["rule"],
            row["tensors"],
            ours,
            f"{best} ({row['best']})",
            f"{row['ratio']:.2f}",
            row["asked"] or "",
            f"{bound:.2f}" if (bound := row.get("of_bytes_alone")) else "",
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main() -> None:
    """Time all rules; with ``--table`` print an earlier run, with ``--work`` be a contender."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="number of rounds")
    parser.add_argument("--threads", type=int, default=1, help="number of cores and of threads")
    parser.add_argument("--rules", default=",".join(RULES), help="names of rules, by comma")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    parser.add_argument("--table", type=Path, help="print the table of this JSON file")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work(arguments.work, arguments.threads)
        return
    if arguments.table:
        print(table(json.loads(arguments.table.read_text())))
        return
    if not 1 <= arguments.threads <= available_cores():
        parser.error(f"--threads must be from 1 to {available_cores()} (available cores), got {arguments.threads}")
    rules = arguments.rules.split(",")
    if unknown := set(rules) - set(RULES):
        parser.error(f"--rules must be of {', '.join(RULES)}; got {', '.join(sorted(unknown))}")
    limit_threads(arguments.threads)
    found: dict[str, Any] = {**conditions(arguments.threads, arguments.rounds), "rows": []}
    workers = {name: worker_of(name, arguments.threads) for name in (OURS, *FORMS, BYTES)}
    ask = {name: worker.ask for name, worker in workers.items()}
    for rule in rules:
        for shapes in SHAPES:
            print(f"{rule}, {shapes}", file=sys.stderr, flush=True)
            found["rows"].append(compare(rule, shapes, ask, arguments.rounds))
    for worker in workers.values():
        worker.close()
    print(table(found))
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
