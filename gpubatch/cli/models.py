"""``gpubatch predict`` and ``gpubatch summary``: what is done with a model that ``train --save`` wrote."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Annotated

import typer

from gpubatch.checkpoint import replacing
from gpubatch.cli import options
from gpubatch.cli.data import raw_samples
from gpubatch.cli.shared import app, print_json
from gpubatch.model import Preparation, load

__all__ = ["predict", "summary"]

ModelFile = Annotated[Path, typer.Argument(help="A file that `gpubatch train --save` or `gb.save` wrote.")]


@app.command(
    epilog="**Examples:** `gpubatch predict digits.safetensors images.npy` prints a line for each sample. "
    "`gpubatch predict digits.safetensors data/mnist --out predictions.csv --probabilities` writes a file.",
)
def predict(
    model_file: ModelFile,
    data: Annotated[Path, typer.Argument(help="A .npy file, an IDX file, or a folder, whose test set is taken.")],
    out: Annotated[str, typer.Option(help="File for the predictions, as CSV; - prints them.")] = "-",
    probabilities: Annotated[
        bool, typer.Option("--probabilities", help="Add a column for the probability of each class.")
    ] = False,
    backend: options.BackendName = "auto",
) -> None:
    """Predict samples with a model; the samples are prepared as those that it was trained on."""
    model = load(model_file, backend)
    raw = raw_samples(data)
    predicted = model.predict(raw)
    columns = [predicted] if predicted.ndim == 1 else [*predicted.T]
    names = ["prediction"] if len(columns) == 1 else [f"prediction{k}" for k in range(len(columns))]
    if probabilities:
        of_classes = model.probabilities(raw)
        columns += [*of_classes.T]
        known = model.classes if model.classes is not None and len(model.classes) == of_classes.shape[1] else None
        names += [f"p({name})" for name in known or range(of_classes.shape[1])]
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(names)
    rows.writerows(zip(*(column.tolist() for column in columns), strict=True))
    if out == "-":
        typer.echo(text.getvalue(), nl=False)
        return
    with replacing(Path(out).resolve()) as unfinished:
        unfinished.write_text(text.getvalue())
    typer.echo(f"{len(predicted):,} predictions in {out}", err=True)


@app.command(epilog="**Example:** `gpubatch summary digits.safetensors`.")
def summary(model_file: ModelFile, as_json: options.AsJson = False) -> None:
    """Show what a model is made of, what it takes and what it predicts."""
    model = load(model_file, "cpu")
    made, of = model.net.summary(), model.preparation
    if as_json:
        print_json(
            network=made,
            loss=model.net.loss_name,
            preparation=None if of is None else {**vars(of), "dtype": of.dtype.name, "prepare": named(of)},
            classes=model.classes,
            written_by=model.versions,
        )
        return
    lines = [str(made)]
    if of is not None:
        scaled = "" if of.scale is None else f", times {of.scale:.6g}"
        lines.append(
            f"samples: {of.dtype.name} of shape {of.sample_shape}{scaled}{f', {named(of)}' if of.prepare else ''}"
        )
    if model.classes is not None:
        lines.append(f"classes: {', '.join(map(str, model.classes))}")
    lines.append(f"written by {', '.join(f'{name} {version}' for name, version in model.versions.items())}")
    typer.echo("\n".join(lines))


def named(of: Preparation) -> str | None:
    """A preparation's function in words."""
    return None if of.prepare is None else getattr(of.prepare, "__name__", repr(of.prepare))
