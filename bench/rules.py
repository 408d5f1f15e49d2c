"""Time every update rule on the CPU, float32, in each of its forms: ``python bench/rules.py [--out FILE]``.

A rule of the table in tests/optimizer_table.py runs as NumPy calls, as the compiled built-in, and as the same formula
declared by a user, which is compiled on first use; beside it run PyTorch's best form of the rule (fused, or the faster
of foreach and its loop over tensors), optax compiled by JAX where PyTorch has no such rule, and a loop that moves the
28 bytes per parameter of a step of Adam and computes hardly anything. Each contender is a process of its own. They take
turns for several rounds, on the same cores with as many threads, and must end with the same numbers. With one thread
the time is that of the processor, so other work on the machine counts little; with more it is the clock's.

The CUDA form is not timed: an emulated device shows that its numbers are right, and says nothing about its speed.
``--table FILE`` prints an earlier run, ``--summary FILE`` a line for each of its rules. Arrays of 50 million need 6 GB
for all contenders together.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import inspect
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from peers import GRADIENT, ROOT, SkippedError, Worker, available_cores, conditions, copy_loop, limit_threads

sys.path.insert(0, str(ROOT / "tests"))

from optimizer_table import CASES, Case

import gpubatch as gb

Step = Callable[[], Any]  # returns the weights, or None

SIZES = (10_000, 1_000_000, 50_000_000)
BUDGET = 0.02  # seconds of a contender in a round, but at least one step
WARM_UP = 3  # steps, after which the last weight is compared
TOLERANCE = 1e-4  # relative, of the last weight
OURS = {"NumPy": "NumPy", "compiled": "compiled", "own rule": "compiled on first use"}  # what Optimizer.form says
FORMS = {"fused": {"fused": True}, "foreach": {"foreach": True}, "loop": {"foreach": False}}  # of PyTorch


def case_of(rule: str) -> Case:
    """The rule's case in the table: if possible one that PyTorch has, otherwise one that optax has."""
    found = [case for case in CASES.values() if case.make([np.zeros(1)]).rule is getattr(gb.rules, rule)]
    return min(found, key=lambda case: (case.torch is None, case.optax is None))


# --- contenders ------------------------------------------------------------------------------------------------------


def gpubatch_step(rule: str, n: int, form: str) -> Step:
    """A step of gpubatch in one of its forms; the NumPy form is chosen by GPUBATCH_HOST=0."""
    params = gb.Parameters({"w": (n,)}, "cpu")
    params.grads.flat[...] = GRADIENT
    opt = case_of(rule).make(params)
    if form == "own rule":
        opt = as_own_rule(opt, params)
    if not opt.form.startswith(OURS[form]):
        raise SkippedError(f"{form}: it runs as {opt.form}")

    def step() -> Any:
        if opt.t == WARM_UP:
            opt.lr = 0.0  # weights that a constant gradient drives on, as LAMB's are, would overflow
        opt.step()
        return params.flat

    return step


def as_own_rule(opt: gb.Optimizer, params: gb.Parameters) -> gb.Optimizer:
    """The same rule declared by a user: the names of its state are others, so the build does not have it."""
    state = {name: f"my_{name}" for name in opt.rule.state}
    rule = dataclasses.replace(opt.rule, name=f"my_{opt.rule.name}", state=tuple(state.values()))
    if not state:  # without a state the text would be the built-in's
        rule = dataclasses.replace(rule, formula=lambda w, g, t, *, lr: (w + -lr * g,))
    own = gb.Optimizer(rule, params, **opt.hyper)
    for name, mine in state.items():
        own.state[mine].flat[...] = opt.state[name].flat
    return own


class Form:
    """``torch.optim`` whose optimizers take one argument more, such as ``fused=True``."""

    def __init__(self, **form: bool) -> None:
        self.form = form

    def __getattr__(self, name: str) -> Callable[..., Any]:
        import torch

        kind = getattr(torch.optim, name)
        for argument in self.form:
            if argument not in inspect.signature(kind).parameters:
                raise SkippedError(f"PyTorch has no {argument} {name}")
        return functools.partial(kind, **self.form)


def torch_step(rule: str, n: int, form: str) -> Step:
    """A step of PyTorch."""
    import torch

    make = case_of(rule).torch
    if make is None:
        raise SkippedError("PyTorch has no such rule")
    w = torch.zeros(n, requires_grad=True)
    w.grad = torch.full_like(w, GRADIENT)
    opt = make(Form(**FORMS[form]), [w])

    def step() -> Any:
        opt.step()
        return w.detach()

    return step


def optax_step(rule: str, n: int) -> Step:
    """A step of optax, compiled, with donated buffers."""
    make = case_of(rule).optax
    if make is None:
        raise SkippedError("optax has no such rule")
    import jax
    import jax.numpy as jnp
    import optax

    made = make(optax)

    def update(w: Any, state: Any, g: Any) -> Any:
        updates, state = made.update(g, state, w)
        return optax.apply_updates(w, updates), state

    compiled = jax.jit(update, donate_argnums=(0, 1))
    w, g = jnp.zeros(n), jnp.full(n, GRADIENT)
    state = jax.tree.map(jnp.copy, made.init(w))  # some share arrays, which cannot be donated twice

    def step() -> Any:
        nonlocal w, state
        w, state = jax.block_until_ready(compiled(w, state, g))
        return w

    return step


CONTENDERS: dict[str, Callable[[str, int], Step]] = {
    **{form: functools.partial(gpubatch_step, form=form) for form in OURS},
    **{f"PyTorch {form}": functools.partial(torch_step, form=form) for form in FORMS},
    "optax": optax_step,
    "copy loop": lambda rule, n: copy_loop(n),
}


def peers_of(rule: str) -> list[str]:
    """The contenders of other libraries for a rule."""
    if case_of(rule).torch is not None:
        return [f"PyTorch {form}" for form in FORMS]
    return ["optax"] if case_of(rule).optax is not None else []


# --- a contender's process -------------------------------------------------------------------------------------------


def work(contender: str) -> None:
    """Answer commands on standard input, a line of JSON each: make a step, or run it some times."""
    step: Step | None = None
    for line in sys.stdin:
        command = json.loads(line)
        if "steps" in command:
            assert step is not None
            found = {"seconds": timed(step, command["steps"])}
        else:
            step = None  # gives its memory back
            try:
                step = CONTENDERS[contender](command["rule"], command["size"])
                value = [step() for _ in range(WARM_UP)][-1]
                result = None if value is None else float(np.asarray(value[-1]))
                found = {"seconds": timed(step), "result": result}
            except ModuleNotFoundError as error:
                found = {"skipped": f"{error.name} is not installed"}
            except SkippedError as error:
                found = {"skipped": str(error)}
        print(json.dumps(found), flush=True)


def timed(step: Step, steps: int = 1) -> float:
    """The time of a step: by the clock the median of so many, by the processor's slow one the mean."""
    if available_cores() == 1:
        start = time.process_time()
        for _ in range(steps):
            step()
        return (time.process_time() - start) / steps
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def worker_of(contender: str) -> Worker:
    """A contender in a process of its own."""
    return Worker(
        __file__, contender, environment={**os.environ, "GPUBATCH_HOST": "0"} if contender == "NumPy" else None
    )


# --- measuring -------------------------------------------------------------------------------------------------------


def compare(rule: str, size: int, workers: Mapping[str, Worker], rounds: int) -> dict[str, Any]:
    """Run the contenders for a rule in turn; return their medians and ratios."""
    steps, results = dict[str, int](), dict[str, float]()
    for name in (*OURS, *peers_of(rule), "copy loop"):
        if name in ("PyTorch foreach", "PyTorch loop") and "PyTorch fused" in steps:
            continue  # slower
        found = workers[name].ask(rule=rule, size=size)
        if "skipped" in found:
            continue
        steps[name] = max(1, min(1000, int(BUDGET / found["seconds"])))
        if found["result"] is not None:
            results[name] = found["result"]
    expected = results["compiled"]
    for name, result in results.items():
        if not math.isclose(result, expected, rel_tol=TOLERANCE):
            sys.exit(f"{rule}: {name} must end with the compiled form's {expected}, got {result}")
    runs: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, count in steps.items():
            runs[name].append(workers[name].ask(steps=count)["seconds"])
    medians = {name: statistics.median(times) for name, times in runs.items()}
    others = [name for name in medians if name in peers_of(rule)]
    best = min(others, key=lambda name: medians[name], default=None)

    def ratio(over: str | None, under: str) -> float | None:
        if over not in runs or under not in runs:
            return None
        return statistics.median(a / b for a, b in zip(runs[over], runs[under], strict=True))

    return {
        "rule": rule,
        "size": size,
        "microseconds": {name: 1e6 * seconds for name, seconds in medians.items()},
        "best_peer": best,
        "peer_over_compiled": ratio(best, "compiled"),
        "peer_over_own_rule": ratio(best, "own rule"),
        "numpy_over_compiled": ratio("NumPy", "compiled"),
        "own_rule_over_compiled": ratio("own rule", "compiled"),
        "copy_loop_over_compiled": ratio("copy loop", "compiled"),
        "bytes_per_parameter": 4 * (3 + 2 * len(getattr(gb.rules, rule).state)),
    }


def table(found: Mapping[str, Any]) -> str:
    """A run's results as a table in Markdown; the last columns have times as multiples of the compiled form's."""
    head = "| rule | parameters | NumPy | compiled | own rule | best of others | others | copy of 28 bytes |"
    lines = [head, "|---|--:|--:|--:|--:|--:|--:|--:|"]
    for row in found["rows"]:
        times = row["microseconds"]
        best = row["best_peer"]
        cells = [
            *(milliseconds(times.get(name)) for name in OURS),
            f"{milliseconds(times[best])} ({best})" if best else "none",
            "" if best is None else f"{row['peer_over_compiled']:.1f}x",
            "" if row["copy_loop_over_compiled"] is None else f"{row['copy_loop_over_compiled']:.2f}x",
        ]
        lines.append(f"| {row['rule']} | {row['size']:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def summary(found: Mapping[str, Any]) -> str:
    """A row for each rule: by size, the compiled form's time, and how many times that time the best of others takes."""
    sizes = list(dict.fromkeys(row["size"] for row in found["rows"]))
    lines = [f"| rule | beside | {' | '.join(f'{size:,}' for size in sizes)} |", "|---|---|" + "--:|" * len(sizes)]
    for rule in dict.fromkeys(row["rule"] for row in found["rows"]):
        rows = [row for row in found["rows"] if row["rule"] == rule]
        names = " or ".join(dict.fromkeys(row["best_peer"] or "none" for row in rows))
        cells = [
            milliseconds(row["microseconds"]["compiled"])
            + ("" if row["best_peer"] is None else f", {row['peer_over_compiled']:.1f}x")
            for row in rows
        ]
        lines.append(f"| {rule} | {names} | {' | '.join(cells)} |")
    return "\n".join(lines)


def milliseconds(microseconds: float | None) -> str:
    """A time with its unit, or nothing."""
    if microseconds is None:
        return ""
    return f"{microseconds:.3g} µs" if microseconds < 1000 else f"{microseconds / 1000:.3g} ms"


def main() -> None:
    """Time all rules, or print an earlier run; with ``--work`` be a contender."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="number of rounds")
    parser.add_argument("--threads", type=int, default=2, help="number of cores and of threads")
    parser.add_argument("--rules", default=",".join(gb.rules.__all__), help="names of rules, by comma")
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)), help="numbers of parameters, by comma")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    parser.add_argument("--table", type=Path, help="print the table of this JSON file")
    parser.add_argument("--summary", type=Path, help="print a line for each rule of this JSON file")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work(arguments.work)
        return
    if arguments.table:
        print(table(json.loads(arguments.table.read_text())))
        return
    if arguments.summary:
        print(summary(json.loads(arguments.summary.read_text())))
        return
    if not 1 <= arguments.threads <= available_cores():
        parser.error(f"--threads must be from 1 to {available_cores()} (available cores), got {arguments.threads}")
    rules, sizes = arguments.rules.split(","), [int(size) for size in arguments.sizes.split(",")]
    if unknown := set(rules) - set(gb.rules.__all__):
        parser.error(f"--rules must be of {', '.join(gb.rules.__all__)}; got {', '.join(sorted(unknown))}")
    limit_threads(arguments.threads)
    found: dict[str, Any] = {**conditions(arguments.threads, arguments.rounds), "rows": []}
    workers = {name: worker_of(name) for name in CONTENDERS}
    start = time.perf_counter()
    for number, rule in enumerate(rules, 1):
        print(f"{number} of {len(rules)}: {rule}", file=sys.stderr, flush=True)
        for size in sizes:
            found["rows"].append(compare(rule, size, workers, arguments.rounds))
    for worker in workers.values():
        worker.close()
    found["minutes"] = round((time.perf_counter() - start) / 60, 1)
    print(table(found))
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
