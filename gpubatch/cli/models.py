"""``gpubatch predict``, ``test`` and ``summary``: what is done with a model that ``train --save`` wrote."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import functools
import importlib
import importlib.util
import json
import os
import re
import sys
import time
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, TextIO

import numpy as np
import typer

from gpubatch import plot
from gpubatch.backend import Array
from gpubatch.checkpoint import replacing
from gpubatch.cli import options
from gpubatch.cli.data import Tested, Which, labelled_samples, raw_samples
from gpubatch.cli.options import spread
from gpubatch.cli.shared import (
    CommandReport,
    app,
    examples,
    given,
    in_percent,
    number_or_dash,
    print_json,
    table_of,
    versions,
)
from gpubatch.errors import ArgumentError, DataFormatError
from gpubatch.loader import Loader, rows_of
from gpubatch.metrics import counts_of, measures_of, of_batches
from gpubatch.model import Model, Preparation, load
from gpubatch.tables import some_of
from gpubatch.train import bar

SCREEN = 80  # columns that a confusion matrix may take
Out = Annotated[
    str | None, typer.Option(help="CSV file for the predictions, replaced if it exists; - for standard output.")
]
Probabilities = Annotated[bool, typer.Option("--probabilities", help="Add a column for the probability of each class.")]


@dataclasses.dataclass
class ModelOptions:
    """A model file, and how it is loaded."""

    panel: ClassVar[str] = "Model"
    model_file: Annotated[
        Path, typer.Argument(metavar="MODEL", help="A file that `gpubatch train --save` or `gb.save` wrote.")
    ]
    imports: Annotated[
        list[str] | None,
        typer.Option(
            "--import",
            help="Module or .py file with your own layers, losses and functions that the model names; it is run. "
            "Nothing else is imported. May be repeated.",
        ),
    ] = None
    backend: options.BackendName = "auto"

    def load(self) -> Model:
        """Load the model."""
        if self.model_file.suffix != ".safetensors":
            raise ArgumentError(f"MODEL must be a .safetensors file, got {str(self.model_file)!r}")
        custom: dict[str, Any] = {}
        for name in self.imports or []:
            custom |= contents(imported(name))
        try:
            return load(self.model_file, self.backend, custom)
        except ArgumentError as error:
            words = re.sub(r"gb\.load imports nothing that a file names; .*", "", str(error))
            if words == str(error) or isinstance(error, DataFormatError):
                raise
            raise ArgumentError(
                f"{words}nothing that a file names is imported by itself; give the module that has it: --import MODULE"
            ) from error


def imported(name: str) -> types.ModuleType:
    """The module of a name, or of a .py file."""
    try:
        if not name.endswith(".py"):
            sys.path.insert(0, "")  # as python -m has it
            return importlib.import_module(name)
        if not Path(name).is_file():
            raise ArgumentError(f"--import must name a module or a .py file that is there, got {name!r}")
        spec = importlib.util.spec_from_file_location(Path(name).stem, name)
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    except ArgumentError:
        raise
    except Exception as error:  # whatever the user's module raises
        raise ArgumentError(f"--import {name} failed: {type(error).__name__}: {error}") from error


def contents(module: types.ModuleType) -> dict[str, Any]:
    """Classes and functions of a module by the names that a model file has for them; those of a script, too."""
    found = [x for x in vars(module).values() if isinstance(x, (type, types.FunctionType))]
    own = {f"__main__:{x.__qualname__}": x for x in found if x.__module__ == module.__name__}
    return {**own, **{f"{x.__module__}:{x.__qualname__}": x for x in found}}


# --- predict ---------------------------------------------------------------------------------------------------------


@app.command(
    epilog=examples(
        to_the_screen="gpubatch predict trees.safetensors new.csv",
        to_a_file="gpubatch predict trees.safetensors new.csv --out predictions.csv --probabilities",
        the_bundled_digits="gpubatch predict digits.safetensors",
        layers_of_your_own="gpubatch predict own.safetensors --import my_layers.py",
    ),
)
@spread()
def predict(
    context: typer.Context,
    model: ModelOptions,
    data: Annotated[
        str | None,
        typer.Argument(
            metavar="DATA",
            help="A table as the model was trained on, without its label or with it, - for standard input; a .npy, "
            ".npz or IDX file; or a folder, whose test set is taken. By default the bundled digits' test set.",
        ),
    ] = None,
    out: Out = "-",
    probabilities: Probabilities = False,
    seed: options.Seed = 0,
    as_json: options.AsJson = False,
    progress: options.Progress = True,
) -> None:
    """Predict samples with a model; they are prepared as those that it was trained on.

    Samples are read, predicted and written in batches, so there may be more of them than memory holds.
    """
    out = "-" if out in (None, "", "/dev/stdout") else os.path.expanduser(out)
    check_out(out, [str(model.model_file), *([] if data is None else [data])])
    loaded = model.load()
    batches = loaded.batches(raw_samples(loaded, data, given(context, "seed")))
    began = time.perf_counter()
    with written(loaded, out, probabilities, as_json) as write, bar("predicting", progress) as show:
        for x, *_ in counted(batches, show):
            write(loaded.of_batch(x, probabilities))
    seconds = time.perf_counter() - began
    if as_json and out != "-":
        print_json(samples=batches.n_samples, out=out, columns=columns_of(loaded, probabilities), seconds=seconds)
    elif out != "-":
        typer.echo(f"{batches.n_samples:,} predictions in {out}, in {seconds:.1f} s", err=True)


def check_out(out: str | None, inputs: Sequence[str]) -> None:
    """Raise where a file that is read would be replaced, or CSV be written under another name."""
    if out is None or out == "-":
        return
    if Path(out).exists():
        for name in inputs:
            if Path(name).exists() and Path(out).samefile(name):
                raise ArgumentError(f"--out must be another file than those that are read, got {out!r}")
        if Path(out).is_dir():
            raise ArgumentError(f"--out must be a file, got the folder {out!r}")
    if Path(out).suffix.lower() not in ("", ".csv", ".txt"):
        raise ArgumentError(f"--out writes a CSV file, so it must end in .csv, got {out!r}; --json prints JSON")


def counted(batches: Loader, show: Callable[[int, int], Any]) -> Iterator[list[Array]]:
    """Batches as rows; ``show`` is told how many samples are done."""
    done = 0
    for batch in rows_of(batches):
        yield batch
        done += len(batch[0])
        show(done, batches.n_samples)


def columns_of(model: Model, probabilities: bool) -> list[str]:
    """The names of what is predicted."""
    net = model.net
    single = net.loss_function.least_outputs > 1 or net.outputs == 1
    names = ["prediction"] if single else [f"prediction{k}" for k in range(net.outputs)]
    if probabilities:
        net.loss_function.check_probabilities()
        known = range(max(2, net.outputs)) if model.classes is None else model.classes
        names += [f"p({name})" for name in known[-net.outputs :]]  # of one output, that of the second class
    return names


@contextlib.contextmanager
def written(
    model: Model, out: str, probabilities: bool, as_json: bool = False
) -> Iterator[Callable[[Iterable[np.ndarray]], None]]:
    """A function that writes what is predicted for a batch, as CSV to a file or as CSV or JSON to standard output."""
    names = columns_of(model, probabilities)
    if as_json and out == "-":
        with json_rows(sys.stdout, names) as write:
            yield write
    elif out == "-":
        yield csv_rows(sys.stdout, names)
    else:
        with replacing(Path(out).resolve()) as unfinished, unfinished.open("w", newline="", encoding="utf-8") as file:
            yield csv_rows(file, names)


def csv_rows(file: TextIO, names: list[str]) -> Callable[[Iterable[np.ndarray]], None]:
    """See :func:`written`."""
    rows = csv.writer(file, lineterminator="\n")
    rows.writerow(names)
    return lambda arrays: rows.writerows(zip(*as_columns(arrays, as_text=True), strict=True))


@contextlib.contextmanager
def json_rows(file: TextIO, names: list[str]) -> Iterator[Callable[[Iterable[np.ndarray]], None]]:
    """See :func:`written`; one object, a row of predictions in a line of its own."""
    before = ""

    def write(arrays: Iterable[np.ndarray]) -> None:
        nonlocal before
        for row in zip(*as_columns(arrays), strict=True):
            file.write(f"{before}\n{json.dumps(row)}")
            before = ","

    file.write(f'{{"columns": {json.dumps(names)}, "rows": [')
    yield write
    file.write(f'\n], "versions": {json.dumps(versions())}}}\n')


def as_columns(arrays: Iterable[np.ndarray], as_text: bool = False) -> list[list[Any]]:
    """The columns of a batch's results as lists; ``as_text`` writes floating numbers as their shortest text."""
    columns = [column for array in arrays for column in (array[:, None] if array.ndim == 1 else array).T]
    return [(column.astype(str) if as_text and column.dtype.kind == "f" else column).tolist() for column in columns]


# --- test ------------------------------------------------------------------------------------------------------------


@app.command(
    "test",
    epilog=examples(
        a_table="gpubatch test trees.safetensors test.csv --plot confusion.png",
        what_train_left_out="gpubatch test trees.safetensors trees.csv",
        the_bundled_digits="gpubatch test digits.safetensors --metrics f1,top_3",
        with_predictions="gpubatch test trees.safetensors test.csv --out predictions.csv --probabilities",
    ),
)
@spread()
def evaluate(
    context: typer.Context,
    model: ModelOptions,
    data: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="DATA...",
            help="A table with its label, arrays X.npy Y.npy, an .npz file, or a folder, whose test set is taken. By "
            "default the bundled digits' test set.",
        ),
    ] = None,
    held_out: Annotated[
        bool | None,
        typer.Option(
            "--held-out/--all-samples",
            help="Only the samples that training left out, or all. By default the former if DATA is what the model was "
            "trained on, as its file says.",
        ),
    ] = None,
    test_size: options.TestSize = 0.2,
    seed: options.Seed = 0,
    metrics: options.Metrics = "",
    out: Out = None,
    probabilities: Probabilities = False,
    plot_file: options.PlotFile = None,
    as_json: options.AsJson = False,
    progress: options.Progress = True,
) -> None:
    """Test a model on samples whose labels are known."""
    if plot_file is not None:
        plot.check_plot_file(plot_file)
    if out == "-" or (probabilities and out is None):
        raise ArgumentError(
            "--out must be a file, since the results are printed" if out else "--probabilities needs --out FILE"
        )
    out = None if out is None else os.path.expanduser(out)
    check_out(out, [str(model.model_file), *(data or [])])
    loaded = model.load()
    classifies = loaded.net.loss_function.classifies
    if plot_file is not None and not classifies:
        raise ArgumentError("--plot draws which classes are taken for which, and this model predicts numbers")
    own = ["accuracy", "confusion_matrix"] if classifies else ["r2", "rmse", "mae"]
    names = [*own, *(name for name in options.names_of(metrics) if name not in own)]
    measures_of(loaded.net, names)  # finds wrong names before the data is read
    of = labelled_samples(loaded, data or [], Which(held_out, given(context, "test_size"), given(context, "seed")))
    losses: list[tuple[float, int]] = []
    with contextlib.ExitStack() as stack:
        show = stack.enter_context(bar("testing", progress))
        write = None if out is None else stack.enter_context(written(loaded, out, probabilities))

        def watched() -> Iterator[list[Array]]:
            for x, y, *weights in counted(of.batches, show):
                losses.append((loaded.net.evaluate(x, y)[0], len(x)))
                if write is not None:
                    write(loaded.of_batch(x, probabilities))
                yield [x, y, *weights]

        found = of_batches(loaded.net, watched(), names)
    loss = float(np.average([loss for loss, _ in losses], weights=[n for _, n in losses]))
    recipe = None if loaded.preparation is None else loaded.preparation.table
    if recipe is not None and recipe.target is not None and not classifies:
        found |= {name: found[name] * recipe.target.deviation for name in ("rmse", "mae")}  # in the label's unit
    matrix = found.pop("confusion_matrix", None)
    by_class = {} if matrix is None else {"classes": loaded.classes, "confusion_matrix": matrix}
    values = {"samples": of.batches.n_samples, "loss": loss, **found, **by_class}
    shown = [*_results(loaded, of, loss, found), *([] if matrix is None else _by_class(loaded, matrix))]
    shown += [] if out is None else [f"predictions in {out}"]
    draw = functools.partial(plot.plot_confusion, matrix, loaded.classes)
    title = f"gpubatch test of {model.model_file} on {of.name}, accuracy {100 * found.get('accuracy', 0):.2f} %"
    CommandReport({**values, "data": of.name, "trained_on": of.trained}, shown, draw).print(as_json, title, plot_file)


def _results(model: Model, of: Tested, loss: float, found: dict[str, Any]) -> list[str]:
    """Data, loss and metrics, a line each."""
    samples, named = of.batches.n_samples, {"r2": "R²", "rmse": "RMSE", "mae": "MAE"}
    texts = {key: in_percent(x, samples) if key == "accuracy" else f"{x:.6g}" for key, x in found.items()}
    return [
        f"data       {of.name}: {samples:,} samples, {of.said}",
        f"loss       {loss:.4f}, {model.net.loss_name}",
        *(f"{named.get(key, key):<10} {text}" for key, text in texts.items()),
    ]


def _by_class(model: Model, matrix: np.ndarray) -> list[Any]:
    """The matrix, if the screen holds it; recall, precision and F1 of each class, or of each column of several."""
    shown: list[Any] = []
    classes = [str(name) for name in model.classes or range(len(matrix))]
    widths = [max(len(name), len(f"{matrix.max():g}")) + 2 for name in classes]
    if matrix.ndim == 2 and max(map(len, classes)) + sum(widths) < SCREEN:
        table = table_of("", *classes, numbers=True)
        for row, counts in zip(classes, matrix, strict=True):
            table.add_row(row, *(f"{count:g}" if count else "·" for count in counts))
        shown = ["\nclasses, and what their samples were taken for:", table]
    right, predicted, samples = counts_of(matrix)
    names = classes if len(classes) == len(right) else range(len(right))
    table = table_of("class", "samples", "recall (%)", "precision (%)", "F1 (%)", numbers=True)
    for name, hit, n, of in zip(names, right, samples, predicted, strict=True):
        parts = (hit / n if n else None, hit / of if of else None, 2 * hit / (n + of) if n + of else None)
        table.add_row(str(name), f"{n:,g}", *(number_or_dash(part, 100, "{:.2f}") for part in parts))
    return [*shown, table]


# --- summary ---------------------------------------------------------------------------------------------------------


@app.command(epilog=examples(layers_and_columns="gpubatch summary trees.safetensors"))
@spread(backend="cpu")
def summary(model: ModelOptions, as_json: options.AsJson = False) -> None:
    """Show what a model is made of, what it takes and what it predicts."""
    loaded = model.load()
    made, of = loaded.net.summary(), loaded.preparation
    recipe = None if of is None else of.table
    label = None if recipe is None or recipe.target is None else recipe.target.name
    columns = None if recipe is None else [column.name for column in recipe.columns]
    if as_json:
        print_json(
            network=made,
            loss=loaded.net.loss_name,
            preparation=None
            if of is None
            else {
                **vars(of),
                "dtype": of.dtype.name,
                "prepare": named(of),
                "table": columns,
                "rows": None if of.rows is None else dataclasses.asdict(of.rows),
            },
            label=label,
            classes=loaded.classes,
            written_by=loaded.versions,
        )
        return
    lines = [str(made)]
    if columns is not None:
        lines.append(f"table: {len(columns)} columns, {some_of(columns, 12)}")
        lines += [f"label: {label}"] if label is not None else []
    elif of is not None:
        scaled = "" if of.scale is None else f", times {of.scale:.6g}"
        lines.append(
            f"samples: {of.dtype.name} of shape {of.sample_shape}{scaled}{f', {named(of)}' if of.prepare else ''}"
        )
    if of is not None and of.rows is not None:
        left = of.rows.rows - of.rows.trained
        lines.append(f"trained on {of.rows.trained:,} samples, {left:,} left out")
    if loaded.classes is not None:
        lines.append(f"classes: {', '.join(map(repr, loaded.classes))}")
    lines.append(f"written by {', '.join(f'{name} {version}' for name, version in loaded.versions.items())}")
    typer.echo("\n".join(lines))


def named(of: Preparation) -> str | None:
    """A preparation's function in words."""
    return None if of.prepare is None else getattr(of.prepare, "__name__", repr(of.prepare))
