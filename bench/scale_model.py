"""Predict training on many GPUs from measured pieces: ``python bench/scale_model.py [--plot FILE] [--out FILE]``.

A step takes the longer of two things, since a loader prepares batches while others are computed: reading a rank's rows,
and computing its parts followed by the sum of the gradients. Nothing else overlaps: gpubatch sums after the backward
pass. Costs of messages are those of Thakur, Rabenseifner & Gropp, "Optimization of collective communication operations
in MPICH", IJHPCA 19(1), 2005: a message of m bytes takes α + m β, adding m bytes takes m γ. No time is added for ranks
that wait for the slowest one, for steps of different length, for validation or for checkpoints.

``--held-against FILE``, a result of ``bench/ranks.py``, predicts the steps that were measured there from the pieces
that were measured there, and prints the error of each. Every other number names its source.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RANKS = [2**k for k in range(11)]
PAYS = 1.5  # doubling the ranks pays while it makes an epoch at least so many times as fast


@dataclass(frozen=True)
class Link:
    """What carries messages.

    latency: seconds of a message of no bytes, α
    bandwidth: bytes a second in one direction, 1 / β
    source: of both numbers
    """

    name: str
    latency: float
    bandwidth: float
    source: str


@dataclass(frozen=True)
class Processor:
    """What computes.

    steps: (rows, seconds) of whole training steps, by rows; between them time is linear, as it is beyond them
    update: seconds of them that the optimizer takes, however many rows there are
    adding: seconds a byte of a sum of buffers, γ
    source: of these numbers
    """

    name: str
    steps: tuple[tuple[float, float], ...]
    update: float
    adding: float
    source: str

    def gradient(self, rows: float) -> float:
        """Seconds of forward and backward for ``rows`` rows; none for none."""
        if rows == 0:
            return 0.0
        pairs = list(itertools.pairwise(self.steps))
        (a, start), (b, end) = next((pair for pair in pairs if rows <= pair[1][0]), pairs[-1])
        return max(0.0, start + (end - start) * (rows - a) / (b - a) - self.update)


@dataclass(frozen=True)
class Cluster:
    """Nodes of equal ranks.

    per_node: ranks of a node, a power of two
    inside: the link of a rank to another of its node; every rank has its own
    between: the link of a node to the others; its ranks share the bandwidth
    start: seconds until an operation of all ranks begins
    at_once: messages of a rank to different ranks that are on their way at a time
    """

    name: str
    processor: Processor
    per_node: int
    inside: Link
    between: Link
    start: float = 0.0
    at_once: int = 1

    def nodes(self, ranks: int) -> int:
        """The nodes that so many ranks take."""
        return -(-ranks // self.per_node)


@dataclass(frozen=True)
class Store:
    """Where rows are.

    latency: seconds until a request's first byte
    stream: bytes a second of one request
    piece: bytes of a request
    at_once: requests of a rank that are on their way at a time
    node: bytes a second that all ranks of a node get together
    decoding: bytes a second that a rank makes into rows, with the one thread that prepares batches
    source: of these numbers
    """

    name: str
    latency: float
    stream: float
    piece: float
    at_once: int
    node: float
    decoding: float
    source: str

    def rate(self, ranks_of_node: int) -> float:
        """Bytes a second of each rank of a node."""
        waiting = self.latency + self.piece / self.stream
        asked = self.at_once * self.piece / waiting if waiting else math.inf
        return min(asked, self.node / ranks_of_node, self.decoding)


@dataclass(frozen=True)
class Work:
    """What is trained.

    samples: of an epoch
    row: bytes of a sample where it is stored
    gradients: bytes of all gradients
    batch: rows of a batch over all ranks; or of each rank, if ``each``
    shards: parts of a batch; with more ranks, one for each rank
    """

    name: str
    samples: float
    row: float
    gradients: float
    batch: int
    each: bool = False
    shards: int = 1

    def rows(self, ranks: int) -> int:
        """Rows of a batch over all ranks."""
        return self.batch * (ranks if self.each else 1)


@dataclass(frozen=True)
class Prediction:
    """Seconds of a step's parts, of the step and of an epoch; how many times as fast as one rank, by ranks."""

    ranks: int
    nodes: int
    rows: int
    compute: float
    sum: float
    read: float
    step: float
    epoch: float
    efficiency: float
    bound: str


def _hops(ranks: int, cluster: Cluster) -> tuple[int, int]:
    """Ranks beside this one in its node, and ranks in other nodes."""
    within = min(ranks, cluster.per_node)
    return within - 1, ranks - within


def tree_sum(size: float, ranks: int, cluster: Cluster) -> float:
    """Seconds of gpubatch's sum of ``size`` bytes, whose order of additions is fixed.

    Each rank gets its piece of the buffer from all others (all-to-all, p - 1 messages of size / p), adds the p pieces
    as a tree, and sends the result to all (allgather in a ring). Without nodes these are Thakur, Rabenseifner &
    Gropp's (p - 1) α + (p - 1)/p n β for each, and (p - 1)/p n γ.

    The all-to-all does not know nodes: each of a node's ranks gets pieces from every rank elsewhere. In the ring only
    one message in a node's turn leaves it.
    """
    if ranks == 1:
        return 0.0
    within, outside = _hops(ranks, cluster)
    piece, nodes, inside, between = size / ranks, cluster.nodes(ranks), cluster.inside, cluster.between
    sharing = min(ranks, cluster.per_node)
    latencies = (within * inside.latency + outside * between.latency) / min(cluster.at_once, ranks - 1)
    spread = latencies + within * piece / inside.bandwidth + sharing * outside * piece / between.bandwidth
    return (
        2 * cluster.start + spread + (ranks - 1) * piece * cluster.processor.adding + _ring(size, ranks, nodes, cluster)
    )


def _ring(size: float, ranks: int, nodes: int, cluster: Cluster) -> float:
    """Seconds of an allgather, or of half an all-reduce, in a ring: p - 1 messages one after another.

    As NCCL counts it (src/graph/tuning.cc) nodes - 1 of them have the network's latency. Bytes pass both links at once.
    """
    slow = nodes - 1
    moved = (ranks - 1) * size / ranks
    bandwidth = min(cluster.inside.bandwidth, cluster.between.bandwidth) if slow else cluster.inside.bandwidth
    return (ranks - 1 - slow) * cluster.inside.latency + slow * cluster.between.latency + moved / bandwidth


def engine_sum(size: float, ranks: int, cluster: Cluster) -> float:
    """Seconds of the engine's own all-reduce, ``Ranks(exact=False)``: the better of a ring and a tree, as NCCL chooses.

    The ring is reduce-scatter and allgather, 2 (p - 1) α + 2 (p - 1)/p n β + (p - 1)/p n γ. The tree has
    2 (g - 1 + log₂ nodes) latencies and moves the buffer up and down, in pieces that follow one another.
    """
    if ranks == 1:
        return 0.0
    nodes, (within, _) = cluster.nodes(ranks), _hops(ranks, cluster)
    adding = (ranks - 1) / ranks * size * cluster.processor.adding
    ring = 2 * _ring(size, ranks, nodes, cluster)
    bandwidth = min(cluster.inside.bandwidth, cluster.between.bandwidth) if nodes > 1 else cluster.inside.bandwidth
    steps = within * cluster.inside.latency + math.ceil(math.log2(nodes)) * cluster.between.latency
    return cluster.start + adding + min(ring, 2 * (steps + size / bandwidth))


Sum = Callable[[float, int, Cluster], float]


def predict(work: Work, cluster: Cluster, store: Store, ranks: int, how: Sum = tree_sum) -> Prediction:
    """The step and the epoch of ``ranks`` ranks."""
    alone = ranks == 1
    rows, shards = work.rows(ranks), max(work.shards, ranks)
    parts, processor = shards // ranks, cluster.processor
    # The rank with the largest parts sets the pace.
    compute = parts * processor.gradient(math.ceil(rows / shards)) + processor.update
    total = how(work.gradients, ranks, cluster)
    read = rows / ranks * work.row / store.rate(min(ranks, cluster.per_node))
    step = max(compute + total, read)
    epoch = work.samples / rows * step
    first = epoch if alone else predict(work, cluster, store, 1, how).epoch
    bound = "reading" if read > compute + total else "sum" if total > compute else "computing"
    return Prediction(
        ranks, cluster.nodes(ranks), rows, compute, total, read, step, epoch, first / epoch / ranks, bound
    )


def pays_to(found: Sequence[Prediction]) -> int:
    """The largest number of ranks up to which every doubling made an epoch ``PAYS`` times as fast."""
    for fewer, more in itertools.pairwise(found):
        if fewer.epoch / more.epoch < PAYS:
            return fewer.ranks
    return found[-1].ranks


# --- pieces --------------------------------------------------------------------------------------------------------

LAYERS = (1024, 8192, 8192, 1000)
REACHED = 0.8  # of a link's or a memory's peak bandwidth
NCCL = "latency: NCCL's own model, src/graph/tuning.cc, ring, protocol Simple"


def parameters_of(layers: Sequence[int]) -> int:
    """Weights and biases of a network."""
    return sum(a * b + b for a, b in itertools.pairwise(layers))


def h100(layers: Sequence[int]) -> Processor:
    """A GPU that computes a network with ``precision="fast"`` and Adam."""
    n, memory = parameters_of(layers), REACHED * 3.35e12
    floor, row, update = 100e-6, 6 * n / (0.5 * 494.7e12), 28 * n / memory
    source = (
        "H100 SXM, NVIDIA's data sheet: 494.7 TFLOP/s TF32 without sparsity, 3.35 TB/s; assumed: half of the first and "
        f"{REACHED} of the second reached, 6 operations a parameter and row, 28 bytes a parameter for Adam, 100 µs for "
        "the launches of a part. Not measured."
    )
    return Processor("H100 SXM", ((0, floor + update), (1, floor + row + update)), update, 2 / memory, source)


def clusters(layers: Sequence[int]) -> list[Cluster]:
    """Eight GPUs a node, with fast links and with usual ones."""
    nvlink = Link("NVLink 4", 3.4e-6, REACHED * 450e9, f"450 GB/s a direction, data sheet, {REACHED} reached; {NCCL}")
    infiniband = Link(
        "8 InfiniBand NDR", 14e-6, REACHED * 8 * 50e9, f"400 Gbit/s a GPU, {REACHED} reached; {NCCL}, network"
    )
    pcie = Link("PCIe 5 x16", 5.7e-6, REACHED * 64e9, f"64 GB/s a direction, {REACHED} reached; {NCCL}, PCI")
    ethernet = Link(
        "Ethernet 100 Gbit/s", 50e-6, REACHED * 12.5e9, f"one card a node, {REACHED} reached; latency of TCP: assumed"
    )
    common: dict[str, Any] = {"processor": h100(layers), "per_node": 8, "start": 8.4e-6, "at_once": 8}
    return [
        Cluster("NVLink, InfiniBand", inside=nvlink, between=infiniband, **common),
        Cluster("PCIe, Ethernet", inside=pcie, between=ethernet, **common),
    ]


NPY = Store(
    "file .npy", 1e-4, 3e9, 4 << 20, 4, 12e9, 1.31e9,
    "decoding: 6 GB of rows of 1,024 bytes, shuffled in a window, bench/results/2026-11-21-cpu-files.json; a disk of "
    "3 GB/s a stream and 12 GB/s a node: assumed",
)  # fmt: skip
PARQUET = replace(
    NPY,
    name="Parquet",
    decoding=137e6,
    source="as a .npy file, but decoding: bench/results/2026-11-30-cpu-folder.json, on a busy machine",
)
S3 = Store(
    "object store", 0.15, 88e6, 1 << 20, 8, 12.5e9, 1.31e9,
    "Amazon S3, user guide, performance guidelines: 100 to 200 ms to the first byte, 85 to 90 MB/s a request; 8 "
    "requests of 1 MiB at a time: gpubatch/sources/remote.py; 100 Gbit/s a node: assumed; .npy files",
)  # fmt: skip

# --- against what was measured -------------------------------------------------------------------------------------


def measured_cluster(found: dict[str, Any], ranks: int) -> Cluster:
    """This machine, with the pieces of a result of ``bench/ranks.py``; more ranks than cores take turns."""
    pieces, crowd = found["pieces"], max(1.0, ranks / found["cores"])
    steps = tuple(sorted((float(rows), crowd * 1e-6 * us) for rows, us in pieces["step_us"].items()))
    link = Link("shared memory", crowd * 1e-6 * pieces["latency_us"], 1e9 * pieces["GB_a_second"] / crowd, "measured")
    processor = Processor(
        "a core", steps, crowd * 1e-6 * pieces["update_us"], crowd * 1e-9 / pieces["added_GB_a_second"], "measured"
    )
    return Cluster("here", processor, ranks, link, link)


def held_against(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Predicted and measured microseconds of each step of gpubatch's ranks, and the error in percent."""
    memory = Store("memory", 0, math.inf, 1, 1, math.inf, math.inf, "the batch is there")
    rows = []
    for row in found["rows"]:
        for contender, us in row["microseconds"].items():
            how = found["contenders"][contender]
            if how.get("ranks", 1) == 1:  # from which the pieces are
                continue
            work = Work("", row["batch"], 0, found["gradients"], row["batch"], shards=how["shards"])
            step = predict(work, measured_cluster(found, how["ranks"]), memory, how["ranks"]).step
            rows.append(
                {
                    "batch": row["batch"],
                    "contender": contender,
                    "predicted_us": 1e6 * step,
                    "measured_us": us,
                    "error_percent": 100 * (1e6 * step / us - 1),
                }
            )
    return rows


# --- tables and the picture ----------------------------------------------------------------------------------------

SUMS: dict[str, Sum] = {"fixed order": tree_sum, "exact=False": engine_sum}


def works(layers: Sequence[int], samples: float, batch: int, rows: int) -> list[Work]:
    """The same training with a batch of one size, and with a batch that grows with the ranks."""
    common: dict[str, Any] = {"samples": samples, "row": float(layers[0]), "gradients": 4.0 * parameters_of(layers)}
    return [
        Work(f"{batch:,} rows a batch", batch=batch, **common),
        Work(f"{rows:,} rows a GPU", batch=rows, each=True, **common),
    ]


def lines(layers: Sequence[int]) -> list[tuple[str, Cluster, Store, Sum]]:
    """What is compared: a name, links, where the rows are, and how gradients are summed."""
    found = [
        (f"{cluster.name}, {name}", cluster, NPY, how) for cluster in clusters(layers) for name, how in SUMS.items()
    ]
    fast = clusters(layers)[0]
    return [*found, *((f"{fast.name}, {store.name}", fast, store, tree_sum) for store in (PARQUET, S3))]


def duration(seconds: float) -> str:
    """Seconds in the unit that a reader thinks in."""
    units = (("years", 365.25 * 86400), ("days", 86400), ("h", 3600), ("min", 60), ("s", 1), ("ms", 1e-3))
    unit, size = next((pair for pair in units if seconds >= pair[1]), ("µs", 1e-6))
    return f"{seconds / size:.3g} {unit}"


def table(found: Sequence[Prediction]) -> str:
    """Numbers of ranks below one another."""
    head = "| GPUs | compute | sum | read | step | epoch | efficiency | bound by |\n|--:|--:|--:|--:|--:|--:|--:|:--|"
    return "\n".join(
        [
            head,
            *(
                f"| {p.ranks:,} | {duration(p.compute)} | {duration(p.sum)} | {duration(p.read)} | {duration(p.step)} "
                f"| {duration(p.epoch)} | {p.efficiency:.0%} | {p.bound} |"
                for p in found
            ),
        ]
    )


COLOURS = {"NVLink": "#1f4e9e", "PCIe": "#d1603d"}
STORES = {PARQUET.name: "#2b7a4b", S3.name: "#8a5fb0"}


def draw(path: Path, predictions: dict[str, dict[str, list[Prediction]]], title: str) -> None:
    """Draw epochs and efficiency by ranks, a column for each work; a dot is where doubling the ranks stops paying."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator, PercentFormatter

    figure = Figure(figsize=(10, 6.6), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=10)
    panels = figure.subplots(2, len(predictions), sharex=True, sharey="row")
    for column, (work, by_line) in enumerate(predictions.items()):
        above, below = panels[:, column]
        above.set_title(work, fontsize=10, loc="left")
        for name, found in by_line.items():
            first, how = name.split(", ", 1)[0], name.rsplit(", ", 1)[1]
            style: dict[str, Any] = {
                "color": STORES.get(how, COLOURS[first]),
                "linestyle": "--" if how == "exact=False" else "-",
                "linewidth": 1.4,
            }
            ranks, last = [p.ranks for p in found], RANKS.index(pays_to(found))
            for axes, values in ((above, [p.epoch for p in found]), (below, [p.efficiency for p in found])):
                axes.plot(ranks, values, label=name, **style)
                axes.plot(ranks[last], values[last], "o", color=style["color"], markersize=5, clip_on=False)
        above.set_yscale("log")
        below.set_ylim(0, 1.05)
        below.set_xscale("log", base=2)
        below.set_xlabel("GPUs")
        for axes in (above, below):
            axes.grid(alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
    panels[0, 0].set_ylabel("an epoch")
    panels[1, 0].set_ylabel("efficiency")
    times = {"1 min": 60, "10 min": 600, "1 h": 3600, "10 h": 36000, "4 days": 4 * 86400, "40 days": 40 * 86400}
    times |= {"1 year": 365.25 * 86400}
    low, high = panels[0, 0].get_ylim()
    shown = [seconds for seconds in times.values() if low <= seconds <= high]
    panels[0, 0].yaxis.set_major_locator(FixedLocator(shown))
    panels[0, 0].yaxis.set_minor_locator(NullLocator())
    panels[0, 0].yaxis.set_major_formatter(FuncFormatter({seconds: name for name, seconds in times.items()}.get))
    panels[1, 0].yaxis.set_major_formatter(PercentFormatter(1))
    panels[1, 0].xaxis.set_major_locator(FixedLocator(RANKS[::2]))
    panels[1, 0].xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    figure.legend(
        *panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=9
    )
    figure.savefig(path, dpi=100)


def main(arguments: list[str] | None = None) -> None:
    """Print the tables; with ``--plot`` draw them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", default=",".join(map(str, LAYERS)), help="widths of the network")
    parser.add_argument("--samples", type=float, default=1e12, help="samples of an epoch, a byte an input each")
    parser.add_argument("--batch", type=int, default=65_536, help="rows of a batch that stays as it is")
    parser.add_argument("--rows", type=int, default=8192, help="rows of each GPU in a batch that grows")
    parser.add_argument("--held-against", type=Path, help="a result of bench/ranks.py")
    parser.add_argument("--plot", type=Path, help="file for the picture: .png, .pdf or .svg")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    options = parser.parse_args(arguments)
    if options.held_against:
        rows = held_against(json.loads(options.held_against.read_text()))
        print("| batch | contender | predicted | measured | error |\n|--:|:--|--:|--:|--:|")
        for row in rows:
            times = f"{duration(1e-6 * row['predicted_us'])} | {duration(1e-6 * row['measured_us'])}"
            print(f"| {row['batch']:,} | {row['contender']} | {times} | {row['error_percent']:+.0f} % |")
        if options.out:
            options.out.write_text(json.dumps({"of": options.held_against.name, "rows": rows}, indent=1) + "\n")
        return
    layers = [int(width) for width in options.layers.split(",")]
    wanted = works(layers, options.samples, options.batch, options.rows)
    by_work: dict[str, dict[str, list[Prediction]]] = {}
    for work in wanted:
        by_work[work.name] = {}
        for name, cluster, store, how in lines(layers):
            found = [predict(work, cluster, store, ranks, how) for ranks in RANKS]
            by_work[work.name][name] = found
            print(f"\n{work.name}; {name}; doubling pays up to {pays_to(found):,} GPUs\n\n{table(found)}")
    if options.plot:
        words = "-".join(f"{width:,}" for width in layers)
        draw(
            options.plot,
            by_work,
            f"Predicted, not measured: {options.samples:,.0f} samples, network {words}, Adam, TF32",
        )
    if options.out:
        result = {
            "date": date.today().isoformat(),
            "predicted": "nothing here was measured on GPUs",
            "layers": layers,
            "samples": options.samples,
            "doubling pays from": PAYS,
            "clusters": [asdict(cluster) for cluster in clusters(layers)],
            "stores": [asdict(store) for store in (NPY, PARQUET, S3)],
            "predictions": [
                {"work": work, "line": name, "pays_to": pays_to(found), "ranks": [asdict(p) for p in found]}
                for work, by_line in by_work.items()
                for name, found in by_line.items()
            ],
        }
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
