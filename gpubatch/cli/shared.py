"""The application, and what its commands print: JSON, tables, numbers."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import typer
from rich import box
from rich.console import Console
from rich.table import Table
from typer.core import TyperGroup
from typer.main import get_command

import gpubatch
from gpubatch.errors import ArgumentError
from gpubatch.parallel import launched

# By name: the file of a command, and its line in ``gpubatch --help``.
COMMANDS = {
    "train": ("train", "Train a network by mini-batches, and test it."),
    "predict": ("models", "Predict samples with a model; they are prepared as those that it was trained on."),
    "test": ("models", "Test a model on samples whose labels are known."),
    "summary": ("models", "Show what a model is made of, what it takes and what it predicts."),
    "info": ("info", "Show the backends, their devices and memory, and why CUDA can be used or not."),
    "check-gradient": (
        "gradients",
        "Compare the gradients of every layer and loss with differences, in float64; exit code 1 where one is wrong.",
    ),
    "landscape": ("landscape", "Train a network, and evaluate the loss on a line or a plane through its parameters."),
    "sweep": ("sweep", "Train several times, with one thing different each time."),
    "batch-size": ("memory", "Plan the memory of training: the batch size that fits, and what every part of it needs."),
}


def command_named(name: str) -> Any:
    """Import the file of a command, which registers it; returns the command as typer makes it."""
    importlib.import_module(f"gpubatch.cli.{COMMANDS[name][0]}")
    return get_command(app).commands[name]  # type: ignore[attr-defined]


class Commands(TyperGroup):
    """Imports the file of the command that is called, and no other: each takes more time than NumPy."""

    def resolve_command(self, context: Any, arguments: list[str]) -> Any:
        """See click's class of this name."""
        if arguments[0] in COMMANDS:
            self.commands[arguments[0]] = command_named(arguments[0])
        return TyperGroup.resolve_command(self, context, arguments)


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


def examples(**commands: str) -> str:
    """The examples at the end of a command's help, by their titles with underscores for spaces."""
    lines = (f"- {words.replace('_', ' ')}: `{line}`" for words, line in commands.items())
    return "\n".join(["**Examples**", "", *lines])


def print_version(wanted: bool) -> None:
    """Print the version and exit, if --version was given."""
    if wanted:
        typer.echo(f"gpubatch {gpubatch.__version__}")
        raise typer.Exit


@app.callback(
    epilog="Exit codes: 0; 1 for an error in data, training or the machine; 2 for a wrong option or value; 130 after "
    "Ctrl-C, 143 after SIGTERM, 129 after SIGHUP."
)
def common(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=print_version)
    ] = False,
) -> None:
    """Train networks by mini-batches on NumPy or CuPy arrays."""
    if context.invoked_subcommand not in DIVIDED and (count := launched(os.environ)) != 1:
        raise ArgumentError(
            f"gpubatch {context.invoked_subcommand} is for one process, and a launcher started {count or 'several'}: "
            f"run it without mpiexec; only gpubatch {' and gpubatch '.join(DIVIDED)} work on several"
        )


for name, (_, words) in COMMANDS.items():  # for the help, until the file of the command is imported
    app.command(name, help=words)(lambda: None)

DIVIDED = ("train", "info")  # the commands that several processes run together
PRINTED = {"as_json", "plot_file", "save_file", "progress"}  # arguments that no result depends on


def arguments_of(context: typer.Context, **resolved: Any) -> dict[str, Any]:
    """The arguments of a command in the order of its help, for its JSON; ``resolved`` ones as the command used them."""
    names = (parameter.name for parameter in context.command.params if parameter.name not in PRINTED)
    return {name: resolved.get(name, context.params[name]) for name in names if name in context.params}


def versions() -> dict[str, str]:
    """The versions that a result depends on."""
    return {"gpubatch": gpubatch.__version__, "numpy": np.__version__, "python": platform.python_version()}


def print_json(**values: Any) -> None:
    """Print one object; dataclasses become objects, paths text, and what is not finite null."""
    typer.echo(json.dumps(_jsonable(values), allow_nan=False))


def _jsonable(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {name: _jsonable(item) for name, item in value.items()}
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_jsonable(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def console(quiet: bool = False) -> Console:
    """Standard output for lines and tables, in which names of files and classes stand as they are."""
    return Console(quiet=quiet, highlight=False, soft_wrap=True, markup=False, emoji=False)


class CommandReport(NamedTuple):
    """The results of a command: values for JSON, lines and tables for the screen, a function that draws a picture."""

    values: Mapping[str, Any]
    shown: Sequence[Any]
    draw: Callable[[Path, str], Any] | None = None

    def print(self, as_json: bool, title: str = "", plot_file: Path | None = None) -> None:
        """Draw it under a title, if a file is given, and print the rest."""
        if plot_file is not None and self.draw is not None:
            self.draw(plot_file, title)
        if as_json:
            print_json(**self.values, versions=versions())
            return
        out = console()
        for each in self.shown:
            out.print(each)
        if plot_file is not None:
            out.print(f"drawn in {plot_file}")


def table_of(*columns: str, numbers: bool = False) -> Table:
    """A table without lines between rows; with ``numbers``, which stand at the right, in all columns but the first."""
    table = Table(*columns, box=box.SIMPLE_HEAD, pad_edge=False)
    for column in table.columns[1:] if numbers else ():
        column.justify = "right"
    return table


def given(context: typer.Context, name: str) -> Any:
    """The value of an option that somebody gave; None for its default."""
    source = context.get_parameter_source(name)
    return None if source is None or source.name == "DEFAULT" else context.params[name]


def number_or_dash(value: float | None, factor: float = 1, form: str = "{:.3f}") -> str:
    """A number times ``factor`` in a format; a dash for None."""
    return "–" if value is None else form.format(factor * value)


def in_percent(accuracy: float, samples: int) -> str:
    """An accuracy on so many samples."""
    return f"{100 * accuracy:.2f} % ({round(accuracy * samples):,} of {samples:,})"
