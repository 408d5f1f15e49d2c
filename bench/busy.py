"""Training steps beside a process that keeps one core busy: ``python bench/busy.py [--before DIR] [--out FILE]``.

The step is that of ``bench/peers.py``: 784-512-256-10 with Adam in float32. gpubatch, gpubatch on one thread (with
``--before`` also another checkout of it), PyTorch and a step's matrix products alone, each with the threads that it
takes by itself, work in processes of their own, in turn: first alone on the machine, then beside a process that does
nothing but count. No step on a quiet machine is faster than its products; beside that process one and a half of two
cores are left, so none is faster than 4/3 of that. A time is the mean over all steps of a turn, since a step that waits
for the scheduler is a hundred times longer than the others; the table has the medians over the rounds. A turn in which
other processes took more than ``OTHERS`` of a core is repeated.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peers import SIZES, Step, Worker, available_cores, conditions, gpubatch_training, matrix_products, torch_training

BATCHES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
OURS, ALONE, BEFORE, TORCH, PRODUCTS = "gpubatch", "one thread", "before", "PyTorch", "products alone"
MADE = {TORCH: torch_training, PRODUCTS: matrix_products}  # how a step of the others is made
STATES = ("quiet", "busy")
LEAST_STEPS = 3
WARM_UP = 0.3  # of a turn: for steps that are not counted
OTHERS, TRIES = 0.1, 10  # cores that other processes may take, and how often a turn is repeated for that


def work(contender: str) -> None:
    """Be a contender."""
    steps: dict[int, Step] = {}
    for line in sys.stdin:
        command = json.loads(line)
        n, seconds = command["batch"], command["seconds"]
        if n not in steps:
            steps[n] = MADE.get(contender, gpubatch_training)(n)
        cpu = time.process_time()
        turn(steps[n], WARM_UP * seconds)
        found = turn(steps[n], seconds)
        print(json.dumps({**found, "cpu": time.process_time() - cpu}), flush=True)


def turn(step: Step, seconds: float) -> dict[str, float]:
    """Mean and worst time of a step, over so many seconds."""
    began = last = time.perf_counter()
    worst = 0.0
    for count in itertools.count(1):
        step()
        now = time.perf_counter()
        worst, last = max(worst, now - last), now
        if now - began >= seconds and count >= LEAST_STEPS:
            break
    return {"mean": (last - began) / count, "worst": worst}


def seconds_of_all() -> float:
    """Processor time that all processes have taken; 0 where the system does not say it."""
    try:
        user, nice, system = map(int, Path("/proc/stat").read_text().split()[1:4])
    except OSError:
        return 0.0
    return (user + nice + system) / os.sysconf("SC_CLK_TCK")


def undisturbed(worker: Worker, spinners: int, **command: Any) -> dict[str, float]:
    """A turn with little work of other processes; where there is always more, that with the least."""
    runs = []
    for _ in range(TRIES):
        began, before = time.perf_counter(), seconds_of_all()
        found = worker.ask(**command)
        wall = time.perf_counter() - began
        found["others"] = max(0.0, (seconds_of_all() - before - found.pop("cpu")) / wall - spinners)
        runs.append(found)
        if found["others"] <= OTHERS:
            break
    return min(runs, key=lambda run: run["others"])


@contextlib.contextmanager
def machine(state: str) -> Iterator[None]:
    """The machine, with a busy core if ``state`` says so."""
    if state == "quiet":
        yield
        return
    spinner = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        spinner.kill()
        spinner.wait()


def environment(contender: str, before: Path | None) -> dict[str, str]:
    """The environment of a contender's process."""
    found = dict(os.environ)
    if contender == ALONE:
        found |= {"GPUBATCH_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    if contender == BEFORE:
        found["PYTHONPATH"] = str(before)
    return found


def compare(workers: dict[str, Worker], batches: list[int], rounds: int, seconds: float) -> list[dict[str, Any]]:
    """Medians over the rounds, in microseconds: a row for each batch size and state of the machine."""
    rows = []
    for state, n in itertools.product(STATES, batches):
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in workers}
        with machine(state):
            for _, (name, worker) in itertools.product(range(rounds), workers.items()):
                runs[name].append(undisturbed(worker, STATES.index(state), batch=n, seconds=seconds))
        times = {name: statistics.median(run["mean"] for run in found) for name, found in runs.items()}
        worst = {name: max(run["worst"] for run in found) for name, found in runs.items()}
        rows.append(
            {
                "machine": state,
                "batch": n,
                "microseconds": {name: round(1e6 * seconds, 1) for name, seconds in times.items()},
                "others": round(max(run["others"] for found in runs.values() for run in found), 2),
                "worst": {name: round(1e6 * seconds, 1) for name, seconds in worst.items()},
                "times_of_one_thread": round(times[OURS] / times[ALONE], 3),
                "times_as_fast": {name: round(t / times[OURS], 3) for name, t in times.items() if name != OURS},
            }
        )
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return rows


def table(found: dict[str, Any]) -> str:
    """A run's results as a table in Markdown."""
    names = list(found["rows"][0]["microseconds"])
    head = ["machine", "batch", *(f"{name}, µs" for name in names), *(f"{name} / gpubatch" for name in names[1:])]
    lines = [f"| {' | '.join(head)} |", f"|---{'|--:' * (len(head) - 1)}|"]
    for row in found["rows"]:
        cells = [f"{row['microseconds'][name]:,.0f}" for name in names]
        cells += [f"{row['times_as_fast'][name]:.2f}" for name in names[1:]]
        lines.append(f"| {' | '.join([row['machine'], str(row['batch']), *cells])} |")
    return "\n".join(lines)


def main() -> None:
    """Time all batch sizes; with ``--table`` print an earlier run, with ``--work`` be a contender."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="number of rounds")
    parser.add_argument("--seconds", type=float, default=0.4, help="length of a turn")
    parser.add_argument("--batches", default=",".join(map(str, BATCHES)), help="batch sizes, by comma")
    parser.add_argument("--before", type=Path, help="another checkout of gpubatch, with its compiled library")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    parser.add_argument("--table", type=Path, help="print the table of this JSON file")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work(arguments.work)
        return
    if arguments.table:
        print(table(json.loads(arguments.table.read_text())))
        return
    names = [OURS, ALONE, *([BEFORE] if arguments.before else []), TORCH, PRODUCTS]
    workers = {name: Worker(__file__, name, environment=environment(name, arguments.before)) for name in names}
    found: dict[str, Any] = {
        **conditions(available_cores(), arguments.rounds),
        "layers": list(SIZES),
        "seconds": arguments.seconds,
        "rows": compare(workers, list(map(int, arguments.batches.split(","))), arguments.rounds, arguments.seconds),
    }
    for worker in workers.values():
        worker.close()
    print(table(found))
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
