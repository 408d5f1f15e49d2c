"""Training steps over ranks, beside PyTorch's DDP: ``python bench/ranks.py [--rounds 5] [--out FILE]``. Linux.

The step is that of ``bench/peers.py``: 784-512-256-10 with Adam in float32, here of batches of 64 to 4,096 rows over
all ranks. Contenders take turns for several rounds, each in processes of its own, which wait without work in between:

- gpubatch over 1, 2 and 4 ranks by mpiexec, a part of the batch and one thread for each rank, which is bound to a core;
  over 2 ranks also with 8 parts, and with the threads that a rank takes by itself, not bound;
- gpubatch in one process, without ranks, with the threads that it takes by itself;
- PyTorch's DistributedDataParallel over 2 processes with gloo, one thread each (as torchrun sets it), bound and not,
  with its fused Adam, gradients as views of the buckets and a static graph;
- the matrix products of a step alone, by NumPy in 2 processes that exchange nothing: no step is faster.

All steps start from the same weights and must have the same loss after as many steps. Times are means over a turn, of
the slowest rank; the table has medians over rounds, and ratios of the same round. The pieces of a step that
``bench/scale_model.py`` takes are measured, too.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from peers import (
    SIZES,
    TRAINING_LR,
    Step,
    batch_of,
    conditions,
    gpubatch_training,
    initial_layers,
    matrix_products,
    torch_network,
)

BATCHES = (64, 128, 256, 512, 1024, 2048, 4096)
TURN, LEAST_STEPS, WARM_UP = 0.25, 4, 3  # seconds of a turn, steps of one, steps before the first
TOLERANCE = 1e-4  # relative, of losses after as many steps
ALONE = {f"{name}_NUM_THREADS": "1" for name in ("OPENBLAS", "OMP", "MKL")} | {"GPUBATCH_THREADS": "1"}


class Contender(NamedTuple):
    """How a contender runs.

    ranks: its processes
    shards: parts of a batch
    alone: whether each process has one thread
    bound: whether each has a core of its own, as a launcher's ``-bind-to core``
    torch: whether it is PyTorch
    products: whether it computes matrix products alone
    """

    ranks: int
    shards: int | None
    alone: bool
    bound: bool = False
    torch: bool = False
    products: bool = False


ONE, OURS, DDP, BOUND = "1 rank", "2 ranks", "PyTorch DDP, 2 processes", "PyTorch DDP, bound"
PRODUCTS = "products alone, 2 processes"
CONTENDERS = {
    "one process": Contender(1, None, alone=False),
    ONE: Contender(1, 1, alone=True),
    OURS: Contender(2, 2, alone=True, bound=True),
    "2 ranks, 8 parts": Contender(2, 8, alone=True, bound=True),
    "2 ranks, not bound": Contender(2, 2, alone=False),
    "4 ranks": Contender(4, 4, alone=True, bound=True),
    DDP: Contender(2, None, alone=True, torch=True),
    BOUND: Contender(2, None, alone=True, bound=True, torch=True),
    PRODUCTS: Contender(2, None, alone=True, bound=True, products=True),
}


# --- a process of a contender --------------------------------------------------------------------------------------


def ranks_training(n: int, shards: int, ranks: Any) -> Step:
    """gpubatch's step over ranks."""
    import gpubatch as gb
    from gpubatch.passes import DataPass, Deal

    # As a loader with ``ranks=ranks, shards=shards`` gives a batch out, whose making is not measured.
    own = shards // ranks.size
    cuts = [n * part // shards for part in range(ranks.rank * own, (ranks.rank + 1) * own + 1)]
    x, y = (array[cuts[0] : cuts[-1]] for array in batch_of(n))
    given = DataPass(None, 0)
    given.begin()
    given.give_out((x, y), Deal(n, cuts[0], tuple(np.diff(cuts).tolist()), shards))
    net = gb.mlp(list(SIZES), backend="cpu")
    for view, values in zip(net.parameters.values(), itertools.chain(*initial_layers()), strict=True):
        view[...] = values
    opt = gb.Adam(net.parameters, lr=TRAINING_LR)

    def step() -> Any:
        loss, _ = net.loss_and_grad(x, y, ranks=ranks)
        opt.step()
        return loss

    return step


def ddp_training(n: int, rank: int, size: int) -> Step:
    """PyTorch's step over processes; its loss is that of this process's rows."""
    import torch
    import torch.distributed

    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", rank=rank, world_size=size)
        torch.set_num_threads(1)
    mine = slice(rank * n // size, (rank + 1) * n // size)
    x, y = (torch.tensor(part[mine]) for part in batch_of(n))
    net = torch.nn.parallel.DistributedDataParallel(torch_network(), gradient_as_bucket_view=True, static_graph=True)
    opt = torch.optim.Adam(net.parameters(), lr=TRAINING_LR, fused=True)

    def step() -> Any:
        opt.zero_grad()
        loss = torch.nn.functional.cross_entropy(net(x), y)
        loss.backward()
        opt.step()
        return loss.detach()

    return step


def seconds_of(work: Step, least: float = 0.2) -> float:
    """Median seconds of a piece."""
    times: list[float] = []
    while sum(times) < least or len(times) < 5:
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def pieces_of(ranks: Any) -> dict[str, float]:
    """What messages between two ranks take, adding, an update, and the sum of a step's gradients."""
    from mpi4py import MPI

    import gpubatch as gb

    world, n = MPI.COMM_WORLD, sum(a * b + b for a, b in itertools.pairwise(SIZES))
    other, turns = 1 - ranks.rank, 200

    def there_and_back(size: int) -> float:
        mine, theirs, times = np.zeros(size, np.uint8), np.zeros(size, np.uint8), []
        for _ in range(turns):
            world.Barrier()
            start = time.perf_counter()
            if ranks.rank:
                world.Recv(theirs, other)
                world.Send(mine, other)
            else:
                world.Send(mine, other)
                world.Recv(theirs, other)
            times.append((time.perf_counter() - start) / 2)
        return statistics.median(times)

    latency, large = there_and_back(0), 4 * n // 2
    gradients = np.zeros(n, np.float32)
    sums = []
    for _ in range(turns):
        ranks.barrier()
        start = time.perf_counter()
        ranks.sum_(gradients)
        sums.append(time.perf_counter() - start)
    a, b = np.zeros(n // 2, np.float32), np.zeros(n // 2, np.float32)
    params = gb.Parameters({"w": (n,)}, "cpu")
    opt = gb.Adam(params, lr=TRAINING_LR)
    return {
        "latency_us": 1e6 * latency,
        "GB_a_second": 1e-9 * large / (there_and_back(large) - latency),
        "added_GB_a_second": 1e-9 * a.nbytes / seconds_of(lambda: np.add(a, b, out=a)),
        "update_us": 1e6 * seconds_of(opt.step),
        "sum_us": 1e6 * statistics.median(sums),
    }


def work(contender: str, port: int) -> None:
    """Be a process of a contender."""
    how = CONTENDERS[contender]
    ranks: Any = None
    rank = int(os.environ.get("RANK", 0))
    if how.shards is not None:
        import gpubatch as gb

        ranks = gb.Ranks()
        rank = ranks.rank
    if how.bound:
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[rank % len(cores)]})
    steps: dict[int, Step] = {}
    done: dict[int, int] = {}
    with socket.create_connection(("127.0.0.1", port)) as connection, connection.makefile("rw") as lines:
        for line in lines:
            command = json.loads(line)
            if command.get("pieces"):
                answer: dict[str, Any] = pieces_of(ranks)
            else:
                n = command["batch"]
                if n not in steps:
                    if how.torch:
                        steps[n] = ddp_training(n, rank, how.ranks)
                    elif how.products:
                        steps[n] = matrix_products(n // how.ranks)
                    elif ranks is not None:
                        steps[n] = ranks_training(n, how.shards or 1, ranks)
                    else:
                        steps[n] = gpubatch_training(n)
                    for _ in range(WARM_UP):
                        first = steps[n]()
                    answer = {} if how.products else {"loss": np.asarray(first).item()}
                start = time.perf_counter()
                for _ in range(command["steps"]):
                    steps[n]()
                answer = {**(answer if not done.get(n) else {}), "seconds": time.perf_counter() - start}
                done[n] = done.get(n, 0) + command["steps"]
            lines.write(json.dumps(answer) + "\n")
            lines.flush()


# --- the contenders' processes -------------------------------------------------------------------------------------


class Team:
    """The processes of a contender, each at the end of a socket: a process that waits takes no time of a core."""

    def __init__(self, contender: str) -> None:
        how = CONTENDERS[contender]
        environment = {k: v for k, v in os.environ.items() if k not in ALONE} | (ALONE if how.alone else {})
        with socket.create_server(("127.0.0.1", 0), backlog=how.ranks) as server:
            server.settimeout(120)
            own = [sys.executable, __file__, "--work", contender, "--port", str(server.getsockname()[1])]
            if how.torch:
                with socket.create_server(("127.0.0.1", 0)) as free:
                    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
                place = [{**address, "RANK": str(r), "WORLD_SIZE": str(how.ranks)} for r in range(how.ranks)]
                started = [subprocess.Popen(own, env=environment | variables) for variables in place]
            elif how.shards is None:
                started = [subprocess.Popen(own, env=environment | {"RANK": str(r)}) for r in range(how.ranks)]
            else:
                mpiexec = str(Path(sys.executable).parent / "mpiexec")
                launch = [mpiexec, "-n", str(how.ranks), sys.executable, "-m", "mpi4py", *own[1:]]
                started = [subprocess.Popen(launch, env=environment)]
            self.processes = started
            self.ends = [server.accept()[0].makefile("rw") for _ in range(how.ranks)]

    def ask(self, **command: Any) -> dict[str, Any]:
        """The answer to a command, with the seconds of the slowest process and the mean of their losses."""
        for end in self.ends:
            end.write(json.dumps(command) + "\n")
            end.flush()
        found = [json.loads(end.readline() or sys.exit(f"a process failed at {command}")) for end in self.ends]
        answer: dict[str, Any] = found[0]
        if "seconds" in answer:
            answer["seconds"] = max(one["seconds"] for one in found)
        if "loss" in answer:
            answer["loss"] = statistics.fmean(one["loss"] for one in found)
        return answer

    def close(self) -> None:
        """End the processes."""
        for end in self.ends:
            end.close()
        for process in self.processes:
            process.wait()


@contextlib.contextmanager
def teams(names: list[str]) -> Iterator[dict[str, Team]]:
    """Teams that end with the block."""
    with contextlib.ExitStack() as stack:
        made = {}
        for name in names:
            made[name] = Team(name)
            stack.callback(made[name].close)
        yield made


def row_of(batch: int, times: dict[str, list[float]]) -> dict[str, Any]:
    """Medians of a batch size, and of each round's ratio to 2 ranks."""
    row: dict[str, Any] = {
        "batch": batch,
        "microseconds": {name: 1e6 * statistics.median(found) for name, found in times.items()},
    }
    if OURS in times:
        ratios = {
            name: [theirs / ours for theirs, ours in zip(found, times[OURS], strict=True)]
            for name, found in times.items()
            if name != OURS
        }
        row["times_of_2_ranks"] = {name: statistics.median(found) for name, found in ratios.items()}
        row["range"] = {name: [min(found), max(found)] for name, found in ratios.items()}
    return row


def measure(names: list[str], batches: list[int], rounds: int) -> dict[str, Any]:
    """Rows of all batch sizes, and the pieces."""
    rows, pieces = [], {}
    with teams(names) as made:
        for batch in batches:
            times: dict[str, list[float]] = {name: [] for name in names}
            steps = {}
            losses = {}
            for name, team in made.items():
                found = team.ask(batch=batch, steps=LEAST_STEPS)
                steps[name] = max(LEAST_STEPS, math.ceil(TURN * LEAST_STEPS / found["seconds"]))
                if "loss" in found:
                    losses[name] = found["loss"]
            for name, loss in losses.items():
                expected = next(iter(losses.values()))
                if not math.isclose(loss, expected, rel_tol=TOLERANCE):
                    sys.exit(f"batch {batch}: {name} must have the loss {expected}, got {loss}")
            for number in range(rounds):
                for name in names[number % len(names) :] + names[: number % len(names)]:
                    times[name].append(made[name].ask(batch=batch, steps=steps[name])["seconds"] / steps[name])
            row = row_of(batch, times)
            rows.append(row)
            print(f"| {batch} | " + " | ".join(f"{us:,.0f}" for us in row["microseconds"].values()) + " |", flush=True)
        if OURS in made:
            pieces = made[OURS].ask(pieces=True)
        if ONE in made:
            # Steps of the rows that a part may have.
            pieces["step_us"] = {row["batch"]: row["microseconds"][ONE] for row in rows}
            for n in sorted({batch // parts for batch in batches for parts in (2, 4, 8)} - set(batches)):
                found = [made[ONE].ask(batch=n, steps=20)["seconds"] / 20 for _ in range(rounds)]
                pieces["step_us"][n] = 1e6 * statistics.median(found)
    return {"rows": rows, "pieces": pieces}


def main() -> None:
    """Measure, print and save; with ``--work`` be a process of a contender."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="number of rounds")
    parser.add_argument("--batches", default=",".join(map(str, BATCHES)), help="rows of a batch over all ranks")
    parser.add_argument("--only", default="", help="contenders, separated by semicolons")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options.work, options.port)
        return
    names = options.only.split(";") if options.only else list(CONTENDERS)
    cores = len(os.sched_getaffinity(0))
    print("| batch | " + " | ".join(names) + " |\n|--:|" + "--:|" * len(names), flush=True)
    found = measure(names, [int(batch) for batch in options.batches.split(",")], options.rounds)
    for row in found["rows"]:
        for name, ratio in row.get("times_of_2_ranks", {}).items():
            low, high = row["range"][name]
            print(f"batch {row['batch']}: {name} takes {ratio:.2f} times what 2 ranks take ({low:.2f} to {high:.2f})")
    print(json.dumps(found["pieces"]))
    if options.out:
        described = {
            **conditions(1, options.rounds),
            "cores": cores,
            "layers": SIZES,
            "gradients": 4 * sum(a * b + b for a, b in itertools.pairwise(SIZES)),
            "contenders": {
                name: {"ranks": CONTENDERS[name].ranks, "shards": CONTENDERS[name].shards}
                if CONTENDERS[name].shards and CONTENDERS[name].alone
                else {}
                for name in names
            },
        }
        options.out.write_text(json.dumps({**described, **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
