"""Time from process start to an accuracy: ``python bench/to_accuracy.py gpubatch|torch FOLDER DEVICE TARGET``.

The time covers imports, starting the device, loading kernels and data, and epochs until the accuracy on held-out data
reaches the target. The data is uint8 on the device; batches of 128 are gathered there, Adam trains a 784-512-256-10
network, and each epoch ends with an evaluation. gpu_check.py writes the folder and runs this file.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the checkout that this file belongs to, installed or not

SIZES = [784, 512, 256, 10]
BATCH = 128
MOST = 40  # epochs
REACH = 2  # largest shift of a digit, in pixels

Digits = tuple[np.ndarray, np.ndarray]


class Run(NamedTuple):
    """A run that reached the accuracy; ``seconds`` are since the start of its process."""

    seconds: float
    epochs: int
    accuracy: float
    execution: str


def write_digits(folder: Path, train: int, test: int) -> None:
    """Write ``train`` images for training and ``test`` for testing, all different.

    Each is one of the 10,000 bundled digits, shifted by up to REACH pixels in both directions. Both parts may have the
    same digit with different shifts, so the accuracy is not comparable with MNIST's. 60,000 images need about ten
    epochs to 98 %.
    """
    import gpubatch as gb

    (X, Y), (X_test, Y_test) = gb.datasets.mnist_10k()
    padded = np.pad(np.concatenate([X, X_test]).reshape(-1, 28, 28), ((0, 0), (REACH, REACH), (REACH, REACH)))
    labels = np.concatenate([Y, Y_test])
    ways = 2 * REACH + 1
    drawn = np.random.default_rng(0).permutation(len(labels) * ways**2)[: train + test]
    image, down, across = np.unravel_index(drawn, (len(labels), ways, ways))
    moved = np.empty((len(drawn), 28, 28), np.uint8)
    for top, left in itertools.product(range(ways), repeat=2):
        these = (down == top) & (across == left)
        moved[these] = padded[image[these], top : top + 28, left : left + 28]
    for name, part in (("train", slice(train)), ("test", slice(train, None))):
        np.save(folder / f"{name}_x.npy", moved[part].reshape(-1, 784))
        np.save(folder / f"{name}_y.npy", labels[image[part]])


def seconds_to(target: float, library: str, folder: Path, device: str) -> Run:
    """Start a run in a new process, and time it until it reports the accuracy."""
    start = time.perf_counter()
    command = [sys.executable, __file__, library, str(folder), device, str(target)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        seconds = time.perf_counter() - start
    if process.returncode or not line:
        raise RuntimeError(f"{library} did not reach {target}: exit code {process.returncode}, {line.strip()!r}")
    return Run(seconds, **json.loads(line))


# --- in the process -------------------------------------------------------------------------------------------------


def by_gpubatch(train: Digits, test: Digits, device: str, target: float) -> dict[str, Any]:
    """``fit`` with its defaults."""
    import gpubatch as gb

    backend = gb.get_backend(device)
    net = gb.mlp(SIZES, backend=backend)
    loader = gb.Loader(*train, batch_size=BATCH, scale=1 / 255, backend=backend)

    def stop(state: gb.TrainingState) -> None:
        if state.history.validation_accuracy[-1] >= target:
            raise gb.StopTraining

    history = gb.fit(net, loader, gb.Adam(net.parameters), MOST, test, [stop], progress=False)
    reached = history.validation_accuracy
    return {"epochs": len(reached), "accuracy": reached[-1], "execution": history.execution}


def by_torch(train: Digits, test: Digits, device: str, target: float) -> dict[str, Any]:
    """Eager, because compiling takes longer than training; weights are initialised as gpubatch does."""
    import torch

    layers: list[Any] = []
    for inputs, outputs in itertools.pairwise(SIZES):
        layers += [torch.nn.Linear(inputs, outputs), torch.nn.ReLU()]
        torch.nn.init.kaiming_normal_(layers[-2].weight, nonlinearity="relu")
        torch.nn.init.zeros_(layers[-2].bias)
    net = torch.nn.Sequential(*layers[:-1]).to(device)
    opt = torch.optim.Adam(net.parameters(), fused=True)
    (X, Y), (X_test, Y_test) = ([torch.from_numpy(a).to(device) for a in part] for part in (train, test))
    X_test = X_test.float().mul_(1 / 255)
    reached: list[float] = []
    while len(reached) < MOST and (not reached or reached[-1] < target):
        order = torch.randperm(len(X), device=device)
        for start in range(0, len(X), BATCH):
            index = order[start : start + BATCH]
            x = X.index_select(0, index).float().mul_(1 / 255)
            opt.zero_grad(set_to_none=True)
            torch.nn.functional.cross_entropy(net(x), Y.index_select(0, index)).backward()
            opt.step()
        with torch.no_grad():
            reached.append((net(X_test).argmax(1) == Y_test).float().mean().item())
    return {"epochs": len(reached), "accuracy": reached[-1], "execution": "eager"}


def main() -> int:
    """Train and print the result; exit code 1 if the accuracy is below the target."""
    library, folder, device, target = sys.argv[1:]
    parts = (("train_x", "train_y"), ("test_x", "test_y"))
    train, test = (tuple(np.load(Path(folder) / f"{name}.npy") for name in names) for names in parts)
    found = {"gpubatch": by_gpubatch, "torch": by_torch}[library](train, test, device, float(target))
    print(json.dumps(found), flush=True)
    return int(found["accuracy"] < float(target))


if __name__ == "__main__":
    sys.exit(main())
