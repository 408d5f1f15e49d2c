"""Measure a new user's first run, the import and ``gpubatch train``: ``python bench/first_run.py``.

Imports of NumPy and gpubatch take turns, each in its own process. The results are medians and ranges.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

IMPORT = "import time; start = time.perf_counter(); import {}; print(time.perf_counter() - start)"


def import_seconds(module: str) -> float:
    """The time of one import in a fresh interpreter."""
    return float(subprocess.run([sys.executable, "-c", IMPORT.format(module)], capture_output=True, check=True).stdout)


def imports(repeats: int) -> dict[str, Any]:
    """Import times of NumPy and gpubatch in turn, with the ratio of each pair."""
    for module in ("numpy", "gpubatch"):
        import_seconds(module)  # compiles modules to bytecode
    pairs = [(import_seconds("numpy"), import_seconds("gpubatch")) for _ in range(repeats)]
    ratios = [ours / theirs for theirs, ours in pairs]
    return {
        "repeats": repeats,
        "numpy_ms": 1000 * statistics.median(theirs for theirs, _ in pairs),
        "gpubatch_ms": 1000 * statistics.median(ours for _, ours in pairs),
        "ratio": statistics.median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
    }


def training(repeats: int) -> dict[str, Any]:
    """Time and accuracy of ``gpubatch train`` with its defaults on the CPU."""
    command = [sys.executable, "-m", "gpubatch", "train", "--json", "--no-progress", "--backend", "cpu"]
    runs = [json.loads(subprocess.run(command, capture_output=True, check=True).stdout) for _ in range(repeats)]
    seconds = [run["seconds"] for run in runs]
    return {
        "repeats": repeats,
        "test_accuracy": [run["test_accuracy"] for run in runs],
        "seconds": statistics.median(seconds),
        "seconds_range": [min(seconds), max(seconds)],
        "arguments": runs[0]["arguments"],
        "versions": runs[0]["versions"],
    }


def processor() -> str:
    """The processor's name, or the architecture if the system does not tell it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def machine() -> str:
    """Architecture, number of cores and Python version as text."""
    return f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"


def record(results: dict[str, Any], out: Path | None) -> None:
    """Print ``results`` as JSON, and write them to ``out`` if given."""
    text = json.dumps(results, indent=1)
    print(text)
    if out is not None:
        out.write_text(text + "\n")


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=25, help="number of pairs of imports")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    arguments = parser.parse_args()
    results = {
        "date": date.today().isoformat(),
        "processor": f"{processor()}, {os.cpu_count()} cores",
        "import": imports(arguments.repeats),
        "train": training(3),
    }
    record(results, arguments.out)


if __name__ == "__main__":
    main()
