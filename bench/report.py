"""Convert the JSON of pytest-benchmark to tables and a figure.

    pytest bench --benchmark-enable --benchmark-json run.json
    python bench/report.py run.json --plot run.png

Each benchmark function has one table: rows by size (batch size, number of parameters), columns by backend and other
parameters. Several files, for example from several machines, have their columns side by side. A cell is the median and
half the distance of the quartiles, the time per sample or parameter, and how many times the least such time of the
table that is.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

ACROSS, MOST = 2, 4  # panels of a figure that fits a screen


class Measurement(NamedTuple):
    """One benchmark.

    function: its name
    work: network, samples and optimizer, in words
    counted: the parameter that numbers the rows, such as "batch"
    row: the value of that parameter
    column: the other parameters
    units: the number of samples or parameters processed
    median, low, high: seconds, median and quartiles
    """

    function: str
    work: str
    counted: str
    row: int
    column: str
    units: int
    median: float
    low: float
    high: float


def read(path: Path) -> tuple[list[Measurement], str]:
    """The measurements in a file, and their conditions (machine, versions, date)."""
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise SystemExit(f"{path}: expected the JSON of pytest-benchmark: {error}") from None
    wanted = ("benchmarks", "machine_info", "datetime")
    if missing := [name for name in wanted if not isinstance(data, dict) or name not in data]:
        raise SystemExit(f"{path}: expected the JSON of pytest-benchmark, found no {missing[0]!r}")
    machine = data["machine_info"]
    cpu = machine.get("cpu", {})
    conditions = f"{path.name}: {cpu.get('brand_raw', machine.get('machine', 'unknown processor'))}, "
    conditions += f"{cpu.get('count', '?')} CPUs, Python {machine.get('python_version', '?')}, {data['datetime'][:10]}"
    return [found for entry in data["benchmarks"] if (found := measurement(entry)) is not None], conditions


def measurement(entry: dict[str, Any]) -> Measurement | None:
    """The measurement in an entry; None for a benchmark without an integer parameter."""
    params = dict(entry.get("params") or {})
    counted = next((name for name, value in params.items() if isinstance(value, int)), None)
    if counted is None:
        return None
    row = params.pop(counted)
    stats = entry["stats"]
    function = entry["name"].partition("[")[0].removeprefix("test_").replace("_", " ")
    column = " ".join(str(value) for value in params.values()) or "time"
    units = entry.get("extra_info", {}).get("samples", row)
    work = entry.get("extra_info", {}).get("work", "")
    return Measurement(function, work, counted, row, column, units, stats["median"], stats["q1"], stats["q3"])


def tables(found: Iterable[Measurement]) -> Iterable[str]:
    """Markdown tables, one for each function, and which entry is the fastest."""
    by_function: dict[str, list[Measurement]] = {}
    for m in found:
        by_function.setdefault(m.function, []).append(m)
    for function, entries in by_function.items():
        columns = list(dict.fromkeys(m.column for m in entries))
        cells: dict[tuple[int, str], Measurement] = {}
        for m in entries:
            if cells.setdefault((m.row, m.column), m) is not m:
                raise SystemExit(f"two benchmarks of {function} with {m.counted}={m.row} are both {m.column!r}")
        one = per_one(entries[0])
        best = min(entries, key=lambda m: m.median / m.units)
        works = list(dict.fromkeys(m.work for m in entries if m.work))
        lines = [
            f"### {function}\n",
            *([f"{'; '.join(works)}\n"] if works else []),
            f"| {entries[0].counted} | " + " | ".join(f"{column} | per {one} | ratio" for column in columns) + " |",
            "|--:|" + "--:|--:|--:|" * len(columns),
        ]
        for row in sorted({m.row for m in entries}):
            shown = []
            for column in columns:
                m = cells.get((row, column))
                if m is None:
                    shown += ["", "", ""]
                else:
                    spread = 50 * (m.high - m.low) / m.median
                    ratio = m.median / m.units / (best.median / best.units)
                    shown += [f"{seconds(m.median)} ±{spread:.0f} %", seconds(m.median / m.units), f"{ratio:.2f}"]
            lines.append(f"| {row:,} | " + " | ".join(shown) + " |")
        if len(entries) > 1:
            lines.append(f"\nFastest per {one}: {best.column}, {best.counted} {best.row:,}.")
        yield "\n".join(lines) + "\n"


def per_one(m: Measurement) -> str:
    """The unit of a cell's second number."""
    return {"batch": "sample", "size": "parameter"}.get(m.counted, m.counted)


def seconds(value: float) -> str:
    """A time with its unit, in three digits."""
    for unit, factor in (("s", 1), ("ms", 1e3), ("µs", 1e6)):
        if value * factor >= 1:
            return f"{value * factor:.3g} {unit}"
    return f"{value * 1e9:.3g} ns"


def draw(found: list[Measurement], path: Path, conditions: list[str]) -> None:
    """Plot a panel for each function: time by size, both logarithmic, quartiles shaded."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    functions = list(dict.fromkeys(m.function for m in found))
    down = -(-len(functions) // ACROSS)
    figure = Figure(figsize=(6 * min(ACROSS, len(functions)), 3.3 * down + 0.8), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle("gpubatch benchmarks, medians and quartiles\n" + "\n".join(conditions), fontsize=10)
    panels = [*figure.subplots(down, min(ACROSS, len(functions)), squeeze=False).flat]
    for axes in panels[len(functions) :]:
        axes.remove()
    for axes, function in zip(panels, functions, strict=False):
        entries = [m for m in found if m.function == function]
        for column in dict.fromkeys(m.column for m in entries):
            line = sorted((m for m in entries if m.column == column), key=lambda m: m.row)
            rows = [m.row for m in line]
            (curve,) = axes.plot(rows, [1e3 * m.median for m in line], "o-", markersize=4, label=column)
            low, high = ([1e3 * getattr(m, end) for m in line] for end in ("low", "high"))
            axes.fill_between(rows, low, high, color=curve.get_color(), alpha=0.2)
        axes.set_title(function, fontsize=10, loc="left")
        axes.set_xlabel({"batch": "batch size (samples)", "size": "parameters"}.get(entries[0].counted))
        axes.set_ylabel("time (ms)")
        axes.set_xscale("log", base=2 if entries[0].counted == "batch" else 10)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=100)


def names_of(paths: list[Path]) -> list[str]:
    """The shortest ends of the paths, without suffix, in which all differ: several machines number files alike."""
    parts = [path.absolute().with_suffix("").parts for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise SystemExit(f"a file must be given once, got {', '.join(map(str, paths))}")


def main(arguments: list[str] | None = None) -> None:
    """Print the tables; with ``--plot`` draw them."""
    parser = argparse.ArgumentParser(description="Tables and a figure from the JSON of pytest-benchmark.")
    parser.add_argument("files", nargs="+", type=Path, help="files of --benchmark-json or --benchmark-save")
    parser.add_argument("--only", default="", help="only functions whose names contain this, such as 'epoch'")
    parser.add_argument(
        "--plot", type=Path, help=f"file for the figure of at most {MOST} functions: .png, .pdf or .svg"
    )
    options = parser.parse_args(arguments)
    found: list[Measurement] = []
    conditions = []
    for path, name in zip(options.files, names_of(options.files), strict=True):
        some, words = read(path)
        if len(options.files) > 1:
            some = [m._replace(column=f"{m.column} ({name})") for m in some]
        found += [m for m in some if options.only in m.function]
        conditions.append(words)
    if not found:
        wanted = f" and {options.only!r} in its name" if options.only else ""
        raise SystemExit(f"no benchmark in these files has an integer parameter{wanted}")
    functions = {m.function for m in found}
    if options.plot is not None and len(functions) > MOST:
        raise SystemExit(f"--plot: at most {MOST} functions fit a screen; choose by --only among {sorted(functions)}")
    sys.stdout.write("\n".join([*conditions, "", *tables(found)]))
    if options.plot is not None:
        draw(found, options.plot, conditions)


if __name__ == "__main__":
    main()
