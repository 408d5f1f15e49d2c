"""``gpubatch check-gradient``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import numpy as np
import typer

from gpubatch import explore
from gpubatch.backend import Array, Backend, get_backend
from gpubatch.cli import options
from gpubatch.cli.shared import CommandReport, app, examples, table_of
from gpubatch.nn import OF_LABELS, Network, layers, losses
from gpubatch.train import bar

# The losses that are checked with every layer; the others are checked behind Tanh.
WITH_EVERY_LAYER = ("softmax_cross_entropy", "sigmoid_cross_entropy", "mse", "svm")

# Every layer between two Dense layers; alone it would see no gradient from above, or have none to give.
CHECKED: dict[str, Callable[[int], layers.Layer]] = {
    "Dense": lambda n: layers.Dense(n, n),
    "BatchNorm": layers.BatchNorm,
    "ReLU": lambda n: layers.ReLU(),
    "LeakyReLU": lambda n: layers.LeakyReLU(0.1),
    "Sigmoid": lambda n: layers.Sigmoid(),
    "Tanh": lambda n: layers.Tanh(),
    "GELU": lambda n: layers.GELU(),
    "GELU tanh": lambda n: layers.GELU("tanh"),
    "Dropout": lambda n: layers.Dropout(0.5),
    "Step": lambda n: layers.Step(),
}


@app.command(
    "check-gradient",
    epilog=examples(
        every_element="gpubatch check-gradient",
        two_evaluations_for_a_direction="gpubatch check-gradient --directions 5",
    ),
)
def check_gradient(
    batch_size: Annotated[int, typer.Option(min=2, help="Random samples.")] = 20,
    features: Annotated[int, typer.Option(min=1, help="Numbers in a sample, and width of the hidden layers.")] = 8,
    h: Annotated[float, typer.Option(help="Step of the finite differences.")] = 1e-5,
    tolerance: Annotated[float, typer.Option(help="Largest relative error that passes.")] = 1e-7,
    directions: Annotated[int, typer.Option(help="Random directions to compare along; 0: compare each element.")] = 0,
    seed: Annotated[int, typer.Option(help="Seed of the data, the first weights and the directions.")] = 0,
    backend: options.BackendName = "auto",
    as_json: options.AsJson = False,
    progress: options.Progress = True,
) -> None:
    """Compare the gradients of every layer and loss with differences, in float64; exit code 1 where one is wrong.

    Every layer is checked with four losses, every other loss behind Tanh.

    The largest relative error over all parameters is shown for each pair, and how many elements lie on a kink.
    """
    where = get_backend(backend)
    found: dict[str, dict[str, dict[str, explore.GradientCheck]]] = {}
    with bar("gradients", progress) as show:
        for k, (name, make) in enumerate(CHECKED.items()):
            show(k, len(CHECKED))
            found[name] = {}
            for loss in losses.LOSSES if name == "Tanh" else WITH_EVERY_LAYER:
                stack = [layers.Dense(features, features), make(features), layers.Dense(features, 4)]
                net = Network(stack, loss, l2=0.01, backend=where, dtype="float64", seed=seed)
                X, Y = _sample(net, batch_size, seed)
                found[name][loss] = explore.check_network(net, X, Y, h, tolerance, directions, seed=seed)
    checks = [check for row in found.values() for one in row.values() for check in one.values()]
    failed = sum(not check.ok for check in checks)
    worst = max(check.max_relative_error for check in checks)
    values = {"ok": not failed, "max_relative_error": worst, "checks": found, "device": where.device}
    CommandReport(values, _shown(found, checks, failed, where)).print(as_json)
    if failed:
        raise typer.Exit(1)


def _sample(net: Network, rows: int, seed: int) -> tuple[Array, Array]:
    draw = np.random.default_rng(seed)
    X = net.backend.asarray(draw.standard_normal((rows, net.inputs)), net.dtype)
    if net.loss_name in OF_LABELS:
        return X, net.backend.asarray(draw.integers(0, net.outputs, rows))
    Y = draw.random((rows, net.outputs))
    return X, net.backend.asarray(np.round(Y) if "hinge" in net.loss_name else Y, net.dtype)


def _shown(found: Any, checks: list[explore.GradientCheck], failed: int, where: Backend) -> list[Any]:
    """Two tables of errors, what is wrong, and a verdict."""
    table, more = table_of("layer", *WITH_EVERY_LAYER), table_of("loss", "behind Tanh")
    for name, row in found.items():
        table.add_row(name, *(_cell(list(row[loss].values())) for loss in WITH_EVERY_LAYER))
        for loss in (loss for loss in row if loss not in WITH_EVERY_LAYER):
            more.add_row(loss, _cell(list(row[loss].values())))
    wrong = [
        f"WRONG: {name}, {loss}: {parameter}{list(check.worst_index or ())} is {check.analytic:.9g}, "
        f"by differences {check.numerical:.9g}"
        for name, row in found.items()
        for loss, one in row.items()
        for parameter, check in one.items()
        if not check.ok
    ]
    kinks, compared = sum(len(check.kinks) for check in checks), sum(check.compared for check in checks)
    verdict = f"{failed} of {len(checks)} gradients are wrong" if failed else f"all {len(checks)} gradients are right"
    limit = max(check.tolerance for check in checks)
    end = f"{verdict} to {limit:g} relative; {compared:,} compared, {kinks} on a kink; {where.device}"
    return [table, more, *wrong, end]


def _cell(checks: list[explore.GradientCheck]) -> str:
    kinks = sum(len(check.kinks) for check in checks)
    text = f"{max(check.max_relative_error for check in checks):.1e}"
    return text + (f", {kinks} kinks" if kinks else "") + ("" if all(check.ok for check in checks) else " WRONG")
