"""Train on a folder larger than the memory limit: ``python bench/folder.py [--gigabytes 6] [--out FILE]``. Linux.

Writes ``--files`` Parquet files of 128 columns of float32 and a label, in row groups of 10 MB, into a folder. Processes
with an address space of ``--limit`` read it, as in ``bench/files.py``: RLIMIT_AS counts code and libraries, threads'
stacks and reserved memory, but not the system's file cache. Arrow and the C library allocate as the variables in
``ALONE`` say: else their allocators reserve more address space than is used, Arrow's alone 1 GiB. These contenders take
turns, each in its own process, for several rounds, with the files in the system's cache:

- ``trained``: an epoch of ``gpubatch.fit`` of a network 128-64-10, batches of the size that "auto" chooses;
- ``shuffled``: a shuffled epoch of batches of 512, within a window of ``--window``; every sample must come once;
- ``in order``: the same without shuffling;
- ``pyarrow``: the row groups alone, decoded one after another.

In the first three a hook counts how often each row group is decoded, which must be once, and none before the first
batch. Ratios are of samples per second, shuffled to the contender in the same round.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from files import row_of
from peers import conditions

import gpubatch as gb
from gpubatch import sources
from gpubatch.sizing import parse_bytes

WIDTH, GROUP = 128, 20_000  # numbers in a row, rows in a row group
ROW = 4 * WIDTH + 8
ALONE = {"ARROW_DEFAULT_MEMORY_POOL": "system", "MALLOC_ARENA_MAX": "2"}
CONTENDERS = ("shuffled", "trained", "in order", "pyarrow")


def write(folder: Path, files: int, rows: int) -> None:
    """Write ``files`` files of ``rows`` rows in all.

    The first two numbers of a row are its number, the others noise; its label says in which tenth the third one is.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    noise = np.random.default_rng(0).standard_normal((WIDTH, GROUP), np.float32)
    labels = np.digitize(noise[2], np.quantile(noise[2], np.arange(0.1, 0.95, 0.1)))
    edges = np.linspace(0, rows, files + 1).astype(int)
    for k in range(files):
        fields = [*((f"c{i}", pa.float32()) for i in range(WIDTH)), ("y", pa.int64())]
        path, schema = folder / f"part-{k}.parquet", pa.schema(fields)
        with pq.ParquetWriter(path, schema, compression="none", use_dictionary=False) as writer:
            for start in range(edges[k], edges[k + 1], GROUP):
                number = np.arange(start, min(start + GROUP, edges[k + 1]))
                columns = [noise[i, : len(number)] for i in range(WIDTH)]
                columns[:2] = (number % 4096).astype(np.float32), (number // 4096).astype(np.float32)
                writer.write_table(pa.table([*columns, labels[: len(number)]], schema=schema), row_group_size=GROUP)


def work(folder: Path, contender: str, window: str) -> dict[str, Any]:
    """Run an epoch: its seconds, its samples, how often groups were decoded, and this process's peak memory."""
    decoded, table = Counter[tuple[str, int]](), sources.tables._Table
    original = table._decode

    def counted(self: Any, group: int) -> list[np.ndarray]:
        decoded[self.path, group] += 1
        return original(self, group)

    table._decode = counted  # type: ignore[method-assign]
    start = time.perf_counter()
    source: Any = sources.files(folder, label="y")
    opened, groups = time.perf_counter() - start, len(source.boundaries) - 1
    start, loss = time.perf_counter(), None
    if contender == "pyarrow":
        groups = rows_of_groups(folder)
    elif contender == "trained":
        loader = gb.Loader(source, window=window, backend="cpu", prepare=standardised)
        if decoded:
            raise SystemExit("row groups were decoded before the first batch")
        net = gb.mlp([WIDTH, 64, 10], backend="cpu")
        history = gb.fit(net, loader, gb.Adam(net.parameters, 1e-3), epochs=1, progress=False)
        loss = history.loss[-1]
    else:
        loader = gb.Loader(
            source, batch_size=512, window=window, shuffle=contender == "shuffled", dtype="float32", backend="cpu"
        )
        if decoded:
            raise SystemExit("row groups were decoded before the first batch")
        seen = np.zeros(len(source), bool)
        for x, _ in loader:
            number = x[:, :2].astype(np.int64) @ np.array([1, 4096])
            if seen[number].any():
                raise SystemExit("a sample came twice")
            seen[number] = True
        if not seen.all():
            raise SystemExit(f"{np.count_nonzero(~seen)} samples are missing")
    seconds = time.perf_counter() - start
    if contender != "pyarrow" and (len(decoded) != groups or set(decoded.values()) != {1}):
        raise SystemExit(
            f"{contender}: of {groups} row groups {sum(decoded.values())} were decoded: {decoded.most_common(3)}"
        )
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    most = {name: 1024 * int(status[key].split()[0]) for name, key in (("peak", "VmPeak"), ("resident", "VmHWM"))}
    planned = {} if contender == "pyarrow" else {"planned": loader.plan.needed, "batch_size": loader.batch_size}
    found = {"seconds": seconds, "opening": opened, "samples": len(source), "groups": groups, "loss": loss}
    return {**found, **planned, **most}


def standardised(x: np.ndarray) -> np.ndarray:
    """Samples whose first two numbers, the row's, are no larger than the others."""
    x[:, :2] /= 4096
    return x


def rows_of_groups(folder: Path) -> int:
    """Decode all row groups with pyarrow, and count them."""
    import pyarrow.parquet as pq

    groups = 0
    for path in sorted(folder.iterdir()):
        with pq.ParquetFile(path) as file:
            for group in range(file.num_row_groups):
                file.read_row_group(group)
                groups += 1
    return groups


def apart(folder: Path, contender: str, window: str, limit: int) -> dict[str, Any]:
    """Run :func:`work` in its own process, limited to ``limit`` bytes of address space."""
    command = [sys.executable, __file__, "--work", str(folder), contender, "--window", window, "--limit", f"{limit}B"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **ALONE})
    if done.returncode:
        sys.exit(f"{contender} failed:\n{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def main() -> None:
    """Measure, print and save; with ``--work`` run one epoch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=6, help="size of the folder")
    parser.add_argument("--files", type=int, default=60, help="number of files")
    parser.add_argument("--limit", default="1 GB", help="address space of each process")
    parser.add_argument("--window", default="256 MiB", help="window of the loader")
    parser.add_argument("--rounds", type=int, default=3, help="number of rounds")
    parser.add_argument(
        "--folder", type=Path, help="where the files are written; default: the system's folder for such"
    )
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    parser.add_argument("--work", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    limit = parse_bytes("--limit", given.limit)
    if given.work:
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        print(json.dumps(work(Path(given.work[0]), given.work[1], given.window)))
        return
    rows, runs = int(given.gigabytes * 1e9) // ROW, {name: list[dict[str, Any]]() for name in CONTENDERS}
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        folder = Path(name)
        write(folder, given.files, rows)
        size = sum(path.stat().st_size for path in folder.iterdir())
        for number in range(given.rounds):
            # Rounds start with different contenders, so that none always follows the same one.
            for contender in CONTENDERS[number % len(CONTENDERS) :] + CONTENDERS[: number % len(CONTENDERS)]:
                found = apart(folder, contender, given.window, limit)
                runs[contender].append(found)
                speed = f"{size / found['seconds'] / 1e9:5.2f} GB/s, {found['groups']} groups"
                memory = f"peak {found['peak'] / 1e6:,.0f} MB, resident {found['resident'] / 1e6:,.0f} MB"
                print(f"{contender:10} {speed}, {memory}", flush=True)
    seconds = {name: [run["seconds"] for run in found] for name, found in runs.items()}
    table = [row_of(name, seconds, rows) for name in CONTENDERS]
    print("\n| contender | samples/s | shuffled is |\n|:--|--:|--:|")
    for row in table:
        low, high = row["shuffled_ratio_range"]
        ratio = f"{row['shuffled_ratio']:.2f} ({low:.2f} to {high:.2f})"
        print(f"| {row['contender']} | {row['samples_a_second']:,.0f} | {ratio} |")
    if given.out:
        described = conditions(os.cpu_count() or 1, given.rounds)
        described["versions"]["pyarrow"] = importlib.metadata.version("pyarrow")
        results = {
            **described,
            "limit_bytes_of_address_space": limit,
            "environment": ALONE,
            "window": given.window,
            "bytes": size,
            "files": given.files,
            "samples": rows,
            "row_groups": runs["shuffled"][0]["groups"],
            "decoded": dict.fromkeys(CONTENDERS[:3], "each row group once"),
            "seconds_to_open": statistics.median(run["opening"] for run in runs["shuffled"]),
            "runs": {
                name: {
                    key: max(run[key] for run in found) for key in ("peak", "resident", "planned") if key in found[0]
                }
                for name, found in runs.items()
            },
            "trained": {key: runs["trained"][0][key] for key in ("batch_size", "loss")},
            "contenders": table,
        }
        given.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
