"""A student's job in gpubatch, scikit-learn and Keras: ``python bench/tables.py --out results.json``.

A CSV file of 3,000 rows, 20 columns of numbers of which 3 % are missing, and four classes as words. Train a network of
64 hidden units for 20 epochs of batches of 32, print the confusion matrix of a fifth of the rows, save it, and give the
probabilities of new rows in another process. The scripts below are run as they stand, each in a process of its own, in
turn; the table has their lines, the accuracy, and medians over ``--rounds`` of the seconds that pass and of CPU time,
each of both processes and with all imports.

``--stream ROWS`` trains one epoch from a CSV file of so many rows that is streamed, and says what its passes take.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

SCRIPTS = {
    "gpubatch": (
        """
import gpubatch as gb
train, test = gb.read_table("trees.csv", label="species").split(test_size=0.2, seed=SEED)
net = gb.mlp([train.features, 64, train.outputs], seed=SEED)
gb.fit(net, gb.Loader(train, batch_size=32, seed=SEED), gb.Adam(net.parameters), epochs=20, progress=False)
gb.save("trees.safetensors", net, loader=train)
print(gb.load("trees.safetensors").confusion_matrix(test))
""",
        """
import gpubatch as gb
print(gb.load("trees.safetensors").probabilities("new.csv"))
""",
    ),
    "scikit-learn": (
        """
import joblib
import pandas as pd
from sklearn.impute import SimpleImputer
from sklearn.metrics import confusion_matrix
from sklearn.model_selection import train_test_split
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
data = pd.read_csv("trees.csv")
X, y = data.drop(columns="species"), data["species"]
X_train, X_test, y_train, y_test = train_test_split(X, y, test_size=0.2, stratify=y, random_state=SEED)
net = MLPClassifier(64, batch_size=32, max_iter=20, random_state=SEED)
model = make_pipeline(SimpleImputer(strategy="median", add_indicator=True), StandardScaler(), net).fit(X_train, y_train)
joblib.dump(model, "trees.joblib")
print(confusion_matrix(y_test, model.predict(X_test)))
""",
        """
import joblib
import pandas as pd
print(joblib.load("trees.joblib").predict_proba(pd.read_csv("new.csv")))
""",
    ),
    "Keras": (
        """
import json
import keras
import numpy as np
import pandas as pd
from sklearn.metrics import confusion_matrix
from sklearn.model_selection import train_test_split
keras.utils.set_random_seed(SEED)
data = pd.read_csv("trees.csv")
X, (names, y) = data.drop(columns="species"), np.unique(data["species"], return_inverse=True)
X_train, X_test, y_train, y_test = train_test_split(X, y, test_size=0.2, stratify=y, random_state=SEED)
median = X_train.median()
X_train, X_test = (part.fillna(median).to_numpy("float32") for part in (X_train, X_test))
scale = keras.layers.Normalization()
scale.adapt(X_train)
layers = [scale, keras.layers.Dense(64, activation="relu"), keras.layers.Dense(len(names), activation="softmax")]
model = keras.Sequential(layers)
model.compile("adam", "sparse_categorical_crossentropy")
model.fit(X_train, y_train, batch_size=32, epochs=20, verbose=0)
model.save("trees.keras")
json.dump([median.to_dict(), names.tolist()], open("trees.json", "w"))
print(confusion_matrix(y_test, model.predict(X_test, verbose=0).argmax(1)))
""",
        """
import json
import keras
import pandas as pd
median, names = json.load(open("trees.json"))
print(keras.models.load_model("trees.keras").predict(pd.read_csv("new.csv").fillna(median).to_numpy("float32")))
""",
    ),
}
COMMANDS = (
    "gpubatch train trees.csv --label species --layers 64 --epochs 20 --batch-size 32 --seed SEED --save m.safetensors",
    "gpubatch test m.safetensors trees.csv --out probabilities.csv --probabilities",
)
SCRIPTS["gpubatch, command line"] = COMMANDS
NEEDS = {
    "gpubatch": ["pyarrow"],
    "gpubatch, command line": ["pyarrow", "typer"],
    "scikit-learn": ["sklearn", "pandas"],
    "Keras": ["keras", "torch", "pandas"],
}
VERSIONS = ("numpy", "pyarrow", "pandas", "scikit-learn", "keras", "torch")


ROWS = 3000


def write_trees(folder: Path, rows: int = ROWS, columns: int = 20, classes: int = 4) -> None:
    """The file to train on, and one of 100 new rows without a label."""
    rng = np.random.default_rng(0)
    kinds = rng.integers(0, classes, rows)
    values = 0.6 * rng.normal(size=(classes, columns))[kinds] + rng.normal(size=(rows, columns))
    missing = rng.random((rows, columns)) < 0.03
    names = [f"c{i}" for i in range(columns)]
    lines = [
        ",".join("" if gap else f"{x:.5g}" for x, gap in zip(row, gaps, strict=True))
        for row, gaps in zip(values, missing, strict=True)
    ]
    species = np.array(["oak", "ash", "elm", "fir"])[kinds]
    labelled = [f"{line},{name}" for line, name in zip(lines, species, strict=True)]
    (folder / "trees.csv").write_text("\n".join([",".join([*names, "species"]), *labelled]) + "\n")
    (folder / "new.csv").write_text("\n".join([",".join(names), *lines[:100]]) + "\n")


def run(script: str, folder: Path, seed: int) -> tuple[str, float, float]:
    """What a script or a command prints, and the seconds that passed and that a CPU worked."""
    text = script.replace("SEED", str(seed))
    command = [Path(sys.executable).with_name("gpubatch"), *text.split()[1:]]
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        command if script in COMMANDS else [sys.executable, "-W", "ignore", "-c", text],
        cwd=folder,
        env={**os.environ, "KERAS_BACKEND": "torch", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    passed, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    return done.stdout, passed, after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def compare(rounds: int) -> dict[str, Any]:
    """Lines, seconds and accuracy of each contender that is installed."""
    found: dict[str, dict[str, Any]] = {}
    names = [name for name in SCRIPTS if all(importlib.util.find_spec(module) for module in NEEDS[name])]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_trees(folder)
        for seed in range(rounds):
            for name in names:
                train, predict = SCRIPTS[name]
                printed, *first = run(train, folder, seed)
                found_last, *second = run(predict, folder, seed)
                if of_commands := re.search(r"accuracy .* \((\d+) of (\d+)\)", found_last):
                    right, samples = map(int, of_commands.groups())
                    found_last = (folder / "probabilities.csv").read_text()
                else:
                    matrix = np.array(re.findall(r"\d+", printed), int)[-16:].reshape(4, 4)
                    right, samples = int(np.trace(matrix)), int(matrix.sum())
                assert samples == ROWS // 5, printed
                assert re.search(r"\d\.\d", found_last), found_last
                of = found.setdefault(
                    name,
                    {
                        "lines": [len(script.strip().splitlines()) for script in (train, predict)],
                        "seconds": [],
                        "cpu_seconds": [],
                        "accuracy": [],
                    },
                )
                of["seconds"].append(first[0] + second[0])
                of["cpu_seconds"].append(first[1] + second[1])
                of["accuracy"].append(right / samples)
    print("| | lines | seconds | CPU seconds | accuracy, median (least to most) |\n|:--|--:|--:|--:|--:|")
    for name, of in found.items():
        seconds, cpu, accuracy = (statistics.median(of[key]) for key in ("seconds", "cpu_seconds", "accuracy"))
        print(
            f"| {name} | {sum(of['lines'])} | {seconds:.2f} | {cpu:.2f} | {accuracy:.3f} "
            f"({min(of['accuracy']):.3f} to {max(of['accuracy']):.3f}) |"
        )
    return found


STREAM = """
import json, re, sys, time
import gpubatch as gb
times = [time.perf_counter()]
table = gb.read_table("trees.csv", label="species", stream=True)
times.append(time.perf_counter())
train, test = table.split(0.1)
train.recipe
times.append(time.perf_counter())
net = gb.mlp([train.features, 64, train.outputs])
loader = gb.Loader(train, batch_size=256)
gb.fit(net, loader, gb.Adam(net.parameters), 1, progress=False)
times.append(time.perf_counter())
accuracy = gb.Model(net, loader).evaluate(test)[1]
peak = 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
print(json.dumps([times[1] - times[0], times[2] - times[1], times[3] - times[2], accuracy, peak]))
"""


def stream(rows: int) -> dict[str, Any]:
    """What the passes over a large file take."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_trees(folder, min(rows, 100_000))
        path = folder / "trees.csv"
        first, _, rest = path.read_text().partition("\n")
        with path.open("w") as file:
            file.write(first + "\n")
            for _ in range(max(1, rows // 100_000)):
                file.write(rest)
        size = path.stat().st_size
        opened, fitted, epoch, accuracy, peak = json.loads(run(STREAM, folder, 0)[0])
    print(
        f"{size / 1e6:.0f} MB of CSV: first pass {opened:.1f} s, second {fitted:.1f} s, epoch {epoch:.1f} s; "
        f"accuracy {accuracy:.3f}, peak memory {peak / 1e6:.0f} MB"
    )
    return {
        "rows": rows,
        "bytes": size,
        "first_pass_seconds": opened,
        "second_pass_seconds": fitted,
        "epoch_seconds": epoch,
        "accuracy": accuracy,
        "peak_bytes": peak,
    }


def version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--stream", type=int, metavar="ROWS", default=0)
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    given = parser.parse_args()
    results = {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "versions": {name: version(name) for name in VERSIONS},
        "job": compare(given.rounds) if given.rounds else {},
        "stream": stream(given.stream) if given.stream else {},
    }
    if given.out:
        given.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
