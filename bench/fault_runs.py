"""Kill training runs at random moments and resume them: ``python bench/fault_runs.py --kills 200``.

Each run trains the same small network with a checkpoint after every second step, so that many kills (SIGKILL) hit a
write. A killed run is resumed and killed again until it ends. Its parameters, running statistics and history (except
``seconds``) must then equal those of an undisturbed run to the last bit. A resume that fails or skips a checkpoint
counts as failed. Every second run writes in the background.

``--ranks 2 4`` instead measures how soon all processes of a data-parallel run have ended after something happened to
one of them: the seconds from the fault to the end of the last process, for each fault of ``FAULTS``, by the mpiexec
beside this Python. Each must end, within 10 s; the exit code is 1 if one does not.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from first_run import machine, record

import gpubatch as gb
from gpubatch.checkpoint import Checkpoints

EPOCHS, EVERY = 4, 2
LIMIT = 60  # seconds after which a run on ranks hangs
WITHIN = 10.0  # seconds in which all processes must have ended
# What happens on one rank, and where: see tests/ranks_run.py.
FAULTS = [
    *(
        (fault, place)
        for place in ("on_step", "on_gradient", "on_validation", "on_end", "write", "read", "auto")
        for fault in ("killed", "raises", "exits", "interrupt", "SIGTERM")
    ),
    *((fault, "on_step") for fault in ("SIGINT", "no memory", "disk", "stops")),
    *((fault, "") for fault in ("seed", "network", "prepare", "damaged file", "damaged checkpoint", "ends early")),
]
TESTS = Path(__file__).resolve().parent.parent / "tests"


class Training:
    """A run before its first step; each forked process gets a copy, with all modules imported."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.samples = rng.standard_normal((500, 20)).astype(np.float32), rng.integers(0, 3, 500)
        self.net = gb.mlp([20, 32, 3], batch_norm=True, dropout=0.2, backend="cpu")
        self.loader = gb.Loader(*self.samples, batch_size=32, backend="cpu")
        self.opt = gb.Adam(self.net.parameters, gb.CosineDecay(0.01, total=EPOCHS * len(self.loader), per="step"))


def train(run: Training, folder: Path, background: bool) -> str:
    """Train from the start or the newest checkpoint to the end; return a digest of the results."""
    net, loader, opt = run.net, run.loader, run.opt
    store = Checkpoints(folder, every=EVERY, background=background)
    history = gb.fit(net, loader, opt, EPOCHS, run.samples, checkpoint=store, resume=True, progress=False)
    numbers = {name: value for name, value in history.to_dict().items() if name != "seconds"}
    digest = hashlib.sha256(json.dumps(numbers).encode())
    digest.update(net.parameters.flat.tobytes())
    digest.update(net.buffers.flat.tobytes())
    return digest.hexdigest()


def start(run: Training, folder: Path, result: Path, background: bool = False) -> int:
    """Start a run in a child process, which writes its digest to ``result``; return the process's id."""
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        warnings.simplefilter("error")  # a skipped checkpoint is a failure
        warnings.simplefilter("ignore", gb.FewStepsWarning)  # short runs are meant
        result.write_text(train(run, folder, background))
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def ended(process: int, seconds: float) -> bool:
    """Kill the run after ``seconds``; return whether it ended before. Raises RuntimeError for any other exit."""
    until = time.perf_counter() + seconds
    while True:
        found, status = os.waitpid(process, os.WNOHANG)
        if found == 0 and time.perf_counter() >= until:
            os.kill(process, signal.SIGKILL)
            _, status = os.waitpid(process, 0)
            found = process
        if found:
            code = os.waitstatus_to_exitcode(status)
            if code not in (0, -signal.SIGKILL):
                raise RuntimeError(f"a run ended with {code}")
            return code == 0
        time.sleep(0.0002)


def measure(kills: int, seed: int, base: Path) -> dict[str, Any]:
    """Kill and resume runs until ``kills`` kills are done and the last run has ended."""
    draw = random.Random(seed)
    result, run = base / "result", Training()
    started = time.perf_counter()
    ended(start(run, base / "undisturbed", result), 60)
    whole = time.perf_counter() - started
    expected = result.read_text()

    counts = dict.fromkeys(("kills", "kills_while_writing", "runs", "runs_that_differ", "failed_resumes"), 0)
    before_the_first = 0
    started = time.perf_counter()
    while counts["kills"] < kills:
        folder = base / str(counts["runs"])
        background = counts["runs"] % 2 == 1
        counts["runs"] += 1
        while True:
            seconds = draw.uniform(0, whole) if counts["kills"] < kills else 60
            try:
                if ended(start(run, folder, result, background), seconds):
                    break
            except RuntimeError:
                counts["failed_resumes"] += 1
                break
            counts["kills"] += 1
            left = list(folder.iterdir()) if folder.exists() else []
            counts["kills_while_writing"] += any(path.suffix == ".unfinished" for path in left)
            before_the_first += not any(path.suffix == ".safetensors" for path in left)
        counts["runs_that_differ"] += result.read_text() != expected
        result.write_text("")
    return {
        "steps": EPOCHS * len(run.loader),
        **counts,
        "kills_before_the_first_checkpoint": before_the_first,
        "seconds_of_an_undisturbed_run": whole,
        "seconds": time.perf_counter() - started,
    }


def ends(fault: str, place: str, size: int, base: Path) -> dict[str, Any]:
    """How a run of ``size`` processes ends: the seconds from the fault to the last one's end, and what was said."""
    base.mkdir()
    told, checkpoints = base / "told", str(base / "run")
    kind = "windowed" if "read" in place or "file" in fault else "plain"
    options = {"kind": kind, "fault": fault, "place": place, "told": str(told), "checkpoint": checkpoints, "every": 4}
    options["on"] = 0 if place == "write" or fault == "disk" else 1
    mpiexec = Path(sys.executable).parent / "mpiexec"
    version = subprocess.run([mpiexec, "--version"], capture_output=True, text=True, check=True).stdout
    start = [str(mpiexec), *(["--oversubscribe"] if "Open MPI" in version else []), "-n", str(size)]
    alone = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"), "1")

    def run(**more: Any) -> subprocess.CompletedProcess[str]:
        command = [*start, sys.executable, str(TESTS / "ranks_run.py"), str(base), json.dumps({**options, **more})]
        return subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, env={**os.environ, **alone})

    if fault == "damaged checkpoint":
        run(fault="SIGTERM", place="on_step", told="")
        options["resume"] = True
    try:
        done = run()
    except subprocess.TimeoutExpired:
        return {"seconds": None, "code": None, "said": ""}
    seconds = time.time() - float(told.read_text())
    messages = [json.loads(path.read_text()).get("message", "") for path in sorted(base.glob("rank*.json"))]
    said = [line for line in done.stderr.splitlines() if line.startswith("gpubatch: ")]
    return {"seconds": seconds, "code": done.returncode, "said": next(filter(None, [*said, *messages]), "")}


def measure_ranks(sizes: list[int], base: Path) -> dict[str, Any]:
    """How soon all processes end, by fault and number of ranks."""
    import mpi4py.MPI

    found = dict[str, dict[str, Any]]()
    for fault, place in FAULTS:
        name = f"{fault}, {place}" if place else fault
        found[name] = {str(size): ends(fault, place, size, base / f"{name}-{size}") for size in sizes}
        print(name, {size: one["seconds"] for size, one in found[name].items()}, file=sys.stderr, flush=True)
    seconds = [one["seconds"] for of in found.values() for one in of.values()]
    return {
        "mpi": mpi4py.MPI.Get_library_version().splitlines()[0].strip(" \0"),
        "runs": len(seconds),
        "hanging": seconds.count(None),
        "longest_seconds": max(filter(None, seconds)),
        "faults": found,
    }


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="number of kills")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments of the kills")
    parser.add_argument("--folder", type=Path, help="folder for checkpoints; default: the system's temporary folder")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    parser.add_argument("--ranks", type=int, nargs="+", help="numbers of ranks, of which one fails")
    arguments = parser.parse_args()
    with contextlib.ExitStack() as stack:
        base = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=arguments.folder)))
        results = {
            "date": date.today().isoformat(),
            "machine": machine(),
            **(
                measure_ranks(arguments.ranks, base)
                if arguments.ranks
                else {"steps_between_checkpoints": EVERY, **measure(arguments.kills, arguments.seed, base)}
            ),
        }
    record(results, arguments.out)
    if arguments.ranks:
        sys.exit(results["hanging"] > 0 or results["longest_seconds"] > WITHIN)


if __name__ == "__main__":
    main()
