"""Time epochs over files larger than the memory limit: ``python bench/files.py [--gigabytes 6] [--out FILE]``. Linux.

Writes an ``.npy`` file of uint8 rows, then one of float32 rows, 1024 bytes each, into ``--folder``. Processes with an
address space of ``--limit`` read it. RLIMIT_AS (``ulimit -v``) counts code, threads' stacks and reserved memory, but
not the system's file cache. First, a shuffled epoch must deliver every sample exactly once. Then these contenders take
turns, each in its own process, for several rounds:

- ``shuffled``: a shuffled epoch of float32 batches, within a window of ``--window``;
- ``in order``: the same batches without shuffling, from the same blocks and through the same window;
- ``in order, no window``: each batch is read when it is due;
- ``blocks``: the file alone, read in blocks of the same size into one buffer.

``cold``: the system dropped the file from its cache before each run; ``warm``: the file is in the cache. Ratios are of
samples per second, shuffled to the contender in the same round.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from peers import conditions

from gpubatch import Loader, sources
from gpubatch.sizing import parse_bytes

ROW, BATCH = 1024, 256
CONTENDERS = ("shuffled", "in order", "in order, no window", "blocks")


# --- the file ------------------------------------------------------------------------------------------------------


def write(path: Path, dtype: str, rows: int) -> None:
    """Write rows of random bytes as numbers of ``dtype``; the first of them encode the row's index."""
    noise = np.random.default_rng(0).integers(0, 256, (1 << 14, ROW // np.dtype(dtype).itemsize)).astype(dtype)
    with open(path, "wb") as file:
        header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": (rows, noise.shape[1])}
        np.lib.format.write_array_header_1_0(file, header)
        for start in range(0, rows, len(noise)):
            part = noise[: rows - start]
            number = np.arange(start, start + len(part), dtype=np.uint32)
            if dtype == "uint8":
                part[:, :4] = number[:, None].view(np.uint8)
            else:
                part[:, 0], part[:, 1] = number % 4096, number // 4096
            part.tofile(file)
        file.flush()
        os.fsync(file.fileno())  # unwritten pages cannot be dropped from the cache


def numbers(x: np.ndarray) -> np.ndarray:
    """Decode the row indices of a batch."""
    digits, base = (4, 256) if x.shape[1] == ROW else (2, 4096)
    found: np.ndarray = x[:, :digits].astype(np.int64) @ base ** np.arange(digits)
    return found


def blocks_of(path: Path, size: int) -> Iterator[int]:
    """Read the file in order, ``size`` bytes at a time, into one buffer."""
    buffer = memoryview(bytearray(size))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            yield count


def drop(path: Path) -> None:
    """Drop the file from the system's cache."""
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


# --- one process ---------------------------------------------------------------------------------------------------


def work(path: Path, contender: str, window: str, check: bool) -> dict[str, Any]:
    """Run an epoch: its seconds, its samples, and this process's peak memory."""
    arguments: dict[str, Any] = {"batch_size": BATCH, "dtype": "float32", "backend": "cpu", "window": window}
    if contender != "shuffled":
        arguments["shuffle"] = False
    if contender == "in order, no window":
        arguments["window"] = None
    loader = Loader(sources.npy(path), **arguments)
    seen = np.zeros(loader.n_samples if check else 0, bool)
    start = time.perf_counter()
    if contender == "blocks":
        samples = sum(blocks_of(path, loader.block * ROW)) // ROW
    else:
        for x in loader:
            if check:
                number = numbers(x)
                if seen[number].any() or len(np.unique(number)) < len(number):
                    raise SystemExit("a sample came twice")
                seen[number] = True
        samples = loader.stats.samples
    seconds = time.perf_counter() - start
    if not seen.all():
        raise SystemExit(f"{np.count_nonzero(~seen)} samples are missing")
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    most = {name: 1024 * int(status[key].split()[0]) for name, key in (("peak", "VmPeak"), ("resident", "VmHWM"))}
    return {"seconds": seconds, "samples": samples, "block": loader.block * ROW, **most}


def apart(path: Path, contender: str, window: str, limit: int, check: bool = False) -> dict[str, Any]:
    """Run :func:`work` in its own process, limited to ``limit`` bytes of address space."""
    command = [sys.executable, __file__, "--work", str(path), contender, "--window", window, "--limit", f"{limit}B"]
    done = subprocess.run(command + ["--check"] * check, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{contender} failed:\n{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


# --- all of them ---------------------------------------------------------------------------------------------------


def measure(path: Path, dtype: str, rows: int, given: argparse.Namespace, limit: int) -> dict[str, Any]:
    """Write the file, check an epoch, and time all contenders."""
    write(path, dtype, rows)
    whole = apart(path, "shuffled", given.window, limit, check=True)
    print(
        f"{dtype}: every one of {whole['samples']:,} samples came once, peak {whole['peak'] / 1e6:,.0f} MB", flush=True
    )
    times: dict[str, dict[str, list[float]]] = {}
    for state in ("cold", "warm"):
        runs = times[state] = {name: [] for name in CONTENDERS}
        if state == "warm":
            for _ in blocks_of(path, 1 << 20):
                pass
        for number in range(given.rounds):
            # Rounds start with different contenders, so that none always follows the same one.
            for name in CONTENDERS[number % len(CONTENDERS) :] + CONTENDERS[: number % len(CONTENDERS)]:
                if state == "cold":
                    drop(path)
                found = apart(path, name, given.window, limit)
                whole = {key: max(whole[key], found[key]) for key in whole}
                runs[name].append(found["seconds"])
                print(f"{dtype:8} {state} {name:20} {rows * ROW / found['seconds'] / 1e9:6.2f} GB/s", flush=True)
    path.unlink()
    return {
        "bytes": rows * ROW,
        "samples": rows,
        "peak_bytes": whole["peak"],
        "peak_resident_bytes": whole["resident"],
        "block_bytes": whole["block"],
        "states": {state: [row_of(name, runs, rows) for name in CONTENDERS] for state, runs in times.items()},
    }


def row_of(name: str, runs: dict[str, list[float]], rows: int) -> dict[str, Any]:
    """A contender's speed, and the ratio of shuffled to it."""
    ratios = [other / shuffled for shuffled, other in zip(runs["shuffled"], runs[name], strict=True)]
    return {
        "contender": name,
        "seconds": statistics.median(runs[name]),
        "seconds_range": [min(runs[name]), max(runs[name])],
        "samples_a_second": rows / statistics.median(runs[name]),
        "shuffled_ratio": statistics.median(ratios),
        "shuffled_ratio_range": [min(ratios), max(ratios)],
    }


def main() -> None:
    """Measure, print and save; with ``--work`` run one epoch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=6, help="size of each file")
    parser.add_argument("--limit", default="1 GB", help="address space of each process")
    parser.add_argument("--window", default="256 MiB", help="window of the loader")
    parser.add_argument("--rounds", type=int, default=5, help="number of rounds")
    parser.add_argument("--folder", type=Path, help="folder for the files; default: the system's temporary folder")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    parser.add_argument("--work", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--check", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    limit = parse_bytes("--limit", given.limit)
    if given.work:
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        print(json.dumps(work(Path(given.work[0]), given.work[1], given.window, given.check)))
        return
    results = {
        **conditions(os.cpu_count() or 1, given.rounds),
        "limit_bytes_of_address_space": limit,
        "window": given.window,
        "files": {},
    }
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        for dtype in ("uint8", "float32"):
            rows = int(given.gigabytes * 1e9) // ROW
            results["files"][dtype] = found = measure(Path(folder, "x.npy"), dtype, rows, given, limit)
            print(f"\n| {dtype} | contender | samples/s | shuffled is |\n|:--|:--|--:|--:|")
            for state, row in ((state, row) for state, rows_of in found["states"].items() for row in rows_of):
                low, high = row["shuffled_ratio_range"]
                ratio = f"{row['shuffled_ratio']:.2f} ({low:.2f} to {high:.2f})"
                print(f"| {state} | {row['contender']} | {row['samples_a_second']:,.0f} | {ratio} |", flush=True)
            print(f"peak of address space {found['peak_bytes']:,} of {limit:,} bytes\n")
    if given.out:
        given.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
