"""``gpubatch batch-size``."""

from __future__ import annotations

import dataclasses
import functools
from typing import Annotated

import typer
from rich import box
from rich.table import Table

from gpubatch import plot
from gpubatch.cli import options
from gpubatch.cli.data import DataOptions, network_for, used, words_of
from gpubatch.cli.options import BatchOptions, NetworkOptions, OptimizerOptions, TrainingOptions, spread
from gpubatch.cli.shared import CommandReport, app, arguments_of, examples
from gpubatch.errors import check_int
from gpubatch.loader import epochs_of
from gpubatch.sizing import BatchPlan, fits, format_bytes, parse_bytes
from gpubatch.train import plan_batches, validated

AROUND = 5  # powers of two on each side of the chosen size that the table of sizes has


@app.command(
    "batch-size",
    epilog=examples(
        for_this_machine="gpubatch batch-size",
        for_another="gpubatch batch-size data/mnist --layers 4096,4096 --memory '1 GB' --plot memory.png",
    ),
)
@spread()
def plan_memory(
    context: typer.Context,
    data: DataOptions,
    network: NetworkOptions,
    optimizer: OptimizerOptions,
    batches: BatchOptions,
    training: TrainingOptions,
    memory: Annotated[
        str | None, typer.Option(help="Memory to plan for, such as '2 GB'; by default what is available.")
    ] = None,
    plot_file: options.PlotFile = None,
    as_json: options.AsJson = False,
) -> None:
    """Plan the memory of training: the batch size that fits, and what every part of it needs.

    The parts are those of the moment at which most is in use. Nothing is trained; the data itself is not counted.
    """
    if plot_file is not None:
        plot.check_plot_file(plot_file)
    available = None if memory is None else _bytes("--memory", memory)
    found = data.read()
    net = network_for(found, network, data.seed)
    loader = found.loader(net, batches, data.seed)
    opt = optimizer.make(net, check_int("--epochs", training.epochs, 1))
    with validated(net, loader, found.validation) as held_out:
        plan_batches(net, loader, opt, held_out, available=available)
    plan = dataclasses.replace(loader.plan, reason=found.reason(loader, batches))
    curve = {n: epochs_of(loader).parts(n, plan.available) for n in _sizes(plan, len(found.X))}
    needed = {n: sum(parts.values()) for n, parts in curve.items()}
    words = words_of(net, found, network.activation, optimizer.optimizer or "")
    title = f"gpubatch batch-size, {len(found.X):,} samples\n{words}"
    report = CommandReport(
        {
            "plan": plan,
            "needed_by_size": needed,
            "parameters": net.parameters.size,
            "samples": len(found.X),
            "network": words,
            "arguments": arguments_of(context, **used(net, network, found.task), lr=optimizer.rate),
            "device": net.backend.device,
        },
        [title, _by_part(plan), _by_size(plan, needed), f"batch size {plan.batch_size}: {plan.reason}"],
        functools.partial(plot.plot_memory, plan, curve),
    )
    report.print(as_json, title, plot_file)


def _by_part(plan: BatchPlan) -> Table:
    table = Table("part", box=box.SIMPLE_HEAD, pad_edge=False, show_footer=True)
    table.columns[0].footer = f"needed by batches of {plan.batch_size}"
    table.add_column("memory", format_bytes(plan.needed), justify="right")
    table.add_column("share", "100.0 %", justify="right")
    for name, n in sorted(plan.parts.items(), key=lambda part: -part[1]):
        if n:
            table.add_row(name, format_bytes(n), f"{100 * n / plan.needed:.1f} %")
    return table


def _by_size(plan: BatchPlan, needed: dict[int, int]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for header in ("batch size", "memory", "of available"):
        table.add_column(header, justify="right")
    table.add_column()
    for n, whole in needed.items():
        chosen = n == plan.batch_size
        if not chosen and not plan.batch_size >> AROUND <= n <= plan.batch_size << AROUND:
            continue
        notes = ["chosen"] if chosen else []
        notes += [] if fits(whole, plan.available) else ["more than 90 %"]
        share = f"{100 * whole / plan.available:.1f} %" if plan.available else "–"
        table.add_row(f"{n}", format_bytes(whole), share, ", ".join(notes), style="bold" if chosen else None)
    return table


def _sizes(plan: BatchPlan, n_samples: int) -> list[int]:
    """Powers of two up to the whole set, the set itself, and the size of the plan."""
    return sorted({*(1 << power for power in range(n_samples.bit_length())), n_samples, plan.batch_size})


def _bytes(option: str, text: str) -> int:
    return check_int(option, int(text), 1) if text.isdecimal() else parse_bytes(option, text)
