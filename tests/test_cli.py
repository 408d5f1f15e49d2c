"""The command line as a person types it: what it prints, where, and how it ends."""

from __future__ import annotations

import gzip
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import numpy as np
import pytest
from families import every
from stand_in import queued_backend
from stand_in_lt import StandInLt

import gpubatch
from gpubatch.formula import rules

if importlib.util.find_spec("typer") is None:
    pytest.skip("the command line's extra is not installed", allow_module_level=True)

from gpubatch.cli.data import DataOptions
from gpubatch.cli.info import EXTRAS

SMALL = ["--layers", "16", "--epochs", "1"]


def run(*arguments: str, code: int = 0, **env: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "gpubatch", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "GPUBATCH_BACKEND": "cpu", "COLUMNS": "120", **env},
    )
    assert done.returncode == code, done.stderr
    return done


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes() + array.tobytes()


@pytest.fixture
def mnist(tmp_path: Path) -> Path:
    """A folder with a small MNIST: noise, and two bright rows whose position is the label."""
    rng = np.random.default_rng(0)
    for part, n in (("train", 300), ("t10k", 100)):
        labels = np.arange(n, dtype=np.uint8) % 10
        images = rng.integers(0, 100, (n, 28, 28)).astype(np.uint8)
        for image, label in zip(images, labels, strict=True):
            image[2 * label : 2 * label + 2] += 150
        (tmp_path / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
        (tmp_path / f"{part}-labels-idx1-ubyte").write_bytes(idx(labels))
    return tmp_path


def test_what_needs_no_command_imports_none() -> None:
    for option in ("--version", "--help"):
        code = (
            "import sys, atexit; atexit.register(lambda: print([m for m in sys.modules if m.startswith('gpubatch.')]))"
        )
        code += f"; sys.argv = ['gpubatch', '{option}']; from gpubatch.__main__ import main; main()"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert "gpubatch.cli.shared" in done.stdout.splitlines()[-1]
        assert not any(name in done.stdout for name in ("gpubatch.train", "gpubatch.nn", "gpubatch.plot"))


def test_train_ends_with_the_test_accuracy() -> None:
    done = run("train", *SMALL)
    last = done.stdout.splitlines()[-1]
    assert re.fullmatch(r"test accuracy \d\d\.\d\d % \([\d,]+ of 2,000\), test loss [\d.]+, in [\d.]+ s", last)
    assert "batches    64: " in done.stdout
    steps, epoch = done.stderr.splitlines()
    assert steps == "125 steps an epoch, 125 in all, batches of 64"
    assert epoch.startswith("epoch 1/1  loss ")


@pytest.mark.exhaustive
def test_train_reaches_the_promised_accuracy() -> None:
    """The output that the README shows; takes half a minute."""
    result = json.loads(run("train", "--json", "--no-progress").stdout)
    assert result["test_accuracy"] >= 0.965
    assert len(result["history"]["loss"]) <= 10


def test_json_is_all_that_stands_on_standard_output() -> None:
    done = run("train", "--json", *SMALL, "--seed", "3")
    result = json.loads(done.stdout)
    assert 0 < result["test_accuracy"] < 1
    assert result["test_accuracy"] == result["history"]["validation_accuracy"][-1]
    assert result["arguments"]["seed"] == 3
    assert result["versions"]["gpubatch"] == gpubatch.__version__


@pytest.mark.exhaustive
def test_one_seed_gives_one_result() -> None:
    first, second, other = (
        json.loads(run("train", "--json", "--no-progress", *SMALL, "--seed", seed).stdout)["history"]["step_loss"]
        for seed in ("1", "1", "2")
    )
    assert first == second
    assert first != other


def test_a_folder_of_ones_own(mnist: Path) -> None:
    done = run("train", str(mnist), "--layers", "", "--no-batch-norm", "--dropout", "0", "--batch-size", "50")
    assert f"MNIST in {mnist}: 300 to train on, 100 to test" in done.stdout
    assert "network    784 - 10, gelu, 7,850 parameters" in done.stdout


def test_a_set_of_other_names_sizes_and_labels(tmp_path: Path) -> None:
    """As EMNIST's folder: several sets, of which FOLDER/SET is one; a label that only the test set has is a class."""
    for name, highest in (("emnist-letters", 26), ("emnist-digits", 9)):
        for part, n in (("train", 40), ("test", 60)):
            labels = np.arange(n, dtype=np.uint8) % (highest + (part == "test"))
            (tmp_path / f"{name}-{part}-images-idx3-ubyte.gz").write_bytes(
                gzip.compress(idx(np.zeros((n, 6, 5), "u1")))
            )
            (tmp_path / f"{name}-{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels)))
    data = DataOptions([str(tmp_path / "emnist-letters")]).read()
    assert (data.name, data.features, data.outputs) == (f"emnist-letters in {tmp_path}", 30, 27)
    with pytest.raises(gpubatch.DataFormatError, match="expected one set, found emnist-digits, emnist-letters; name"):
        DataOptions([str(tmp_path)]).read()
    for path in tmp_path.glob("emnist-digits-*"):
        path.unlink()
    assert DataOptions([str(tmp_path)]).read().name == f"emnist-letters in {tmp_path}"


@pytest.mark.exhaustive
def test_classes_may_weigh_alike(mnist: Path) -> None:
    options = [str(mnist), "--layers", "", "--epochs", "2", "--no-progress", "--json"]
    plain, balanced = (
        json.loads(run("train", *options, *more).stdout) for more in ([], ["--class-weight", "balanced"])
    )
    assert balanced["arguments"]["class_weight"] == "balanced"
    assert balanced["test_loss"] != plain["test_loss"]


@every(
    "optimizer",
    (
        "sgd momentum heavy-ball nesterov adagrad rmsprop adam adamw nadam lion adamax radam adadelta adabelief yogi "
        "lars lamb"
    ).split(),
    ["nesterov", "lamb"],
)
def test_every_optimizer_learns_at_its_usual_rate(optimizer: str, mnist: Path) -> None:
    options = ["--layers", "32", "--epochs", "3", "--batch-size", "20", "--no-progress", "--json"]
    result = json.loads(run("train", str(mnist), "--optimizer", optimizer, *options).stdout)
    assert result["test_accuracy"] > 0.5
    assert np.mean(result["history"]["step_loss"][-5:]) < 0.8 * np.mean(result["history"]["step_loss"][:5])


DECAYS = "none inverse exponential sqrt staircase linear polynomial cosine restarts one-cycle".split()


@every("decay", DECAYS, ["none", "one-cycle"])
def test_every_decay_has_the_rate_as_its_highest(decay: str, mnist: Path) -> None:
    options = ["--layers", "8", "--epochs", "3", "--lr", "0.01", "--no-progress", "--json"]
    result = json.loads(run("train", str(mnist), "--decay", decay, *options).stdout)
    rates = result["history"]["step_lr"]
    assert max(rates) == rates[len(rates) // 2 if decay == "one-cycle" else 0] == 0.01
    assert (rates[-1] < 0.01) is (decay not in ("none", "restarts"))


@every("epochs", ["1", "2", "3", "4", "7", "10", "50"], ["10"])
def test_schedules_of_decays_are_made_for_the_number_of_epochs(epochs: str) -> None:
    """Each has the rate in some epoch, and what falls to 0 does so after the last one."""
    made, n = importlib.import_module("gpubatch.cli.options").DECAYS, int(epochs)
    assert [*made] == DECAYS
    for name, make in made.items():
        if name == "one-cycle" and n < 3:
            with pytest.raises(gpubatch.ArgumentError, match=f"one-cycle needs --epochs of at least 3, got {n}"):
                make(0.3, n)
            continue
        schedule = make(0.3, n)
        rates = [schedule(0, epoch) if callable(schedule) else schedule for epoch in range(n)]
        assert max(rates) == 0.3, name
        assert min(rates) > 0, name
        if name in ("linear", "polynomial", "cosine"):
            assert schedule(0, n) == 0  # type: ignore[operator]


def test_curves_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "curves.png"
    assert f"curves     {file}" in run("train", *SMALL, "--plot", str(file)).stdout
    assert file.read_bytes().startswith(b"\x89PNG")


def test_info_shows_backends_and_why_there_is_no_cuda() -> None:
    text = run("info").stdout
    assert f"gpubatch {gpubatch.__version__}" in text
    assert re.search(r"cpu +cpu +[\d.]+ GiB +[\d.]+ GiB", text)
    result = json.loads(run("info", "--json").stdout)
    assert result["backends"]["cpu"]["memory"]["available"] > 0
    assert result["auto"] == "cpu"
    if "cuda:0" not in result["backends"]:
        assert result["cuda"] in text
        assert "Remedy: " in text


@pytest.mark.exhaustive
def test_info_shows_the_extras() -> None:
    """Every one in pyproject.toml that a user installs, with the packages that it brings."""
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    declared = {
        name: {re.split(r"[\[>=]", package)[0] for package in packages}
        for name, packages in project["optional-dependencies"].items()
        if name not in ("all", "test", "bench", "emulate", "peers", "lint", "docs")
    }
    assert {name: {*packages} for name, (_, packages) in EXTRAS.items()} == declared
    text, found = run("info", COLUMNS="80").stdout, json.loads(run("info", "--json").stdout)["extras"]
    assert found["cli"]["typer"] == importlib.metadata.version("typer")
    for name, packages in found.items():
        lacking = any(version is None for version in packages.values())
        assert (f"gpubatch[{name}]" in text) is lacking


@pytest.mark.parametrize("there", [True, False])
def test_info_shows_what_multiplies_in_a_captured_step(there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from gpubatch.cli import app, info

    device = queued_backend("late")
    device.cupy.nvmath = StandInLt(device.cupy) if there else None
    backends = {"cpu": gpubatch.get_backend("cpu"), device.spec: device}
    monkeypatch.setattr(info, "available_backends", lambda: tuple(backends))
    monkeypatch.setattr(info, "get_backend", lambda spec="cpu": backends[spec])
    words = "cuBLASLt 12.9.3" if there else "none, nvmath-python is not installed: pip install 'gpubatch[cuda13]' (CUDA"
    lines = CliRunner().invoke(app, ["info"]).stdout.splitlines()
    (row,) = (line for line in lines if "products of a captured step" in line)
    assert row.startswith(f"matrix products of a captured step on cuda:99: {words}")
    result = json.loads(CliRunner().invoke(app, ["info", "--json"]).stdout)
    assert result["matrix_products"]["cuda:99"].startswith(words)
    assert f"kernels compiled for the CPU: {result['kernels']}." in lines
    assert f"matrix products on the CPU: {result['matrix_products']['cpu']}." in lines


@pytest.mark.parametrize(("execution", "found"), [("auto", "captured"), ("captured", "captured"), ("eager", "eager")])
def test_train_says_how_its_steps_were_run(
    execution: str, found: str, mnist: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from typer.testing import CliRunner

    from gpubatch.cli import app, data

    device = queued_backend("late")
    device.cupy.nvmath = StandInLt(device.cupy)
    monkeypatch.setattr(data, "get_backend", lambda spec: device)
    options = ["train", str(mnist), *SMALL, "--batch-size", "100", "--precision", "fast", "--no-progress"]
    options += [] if execution == "auto" else ["--execution", execution]
    text = CliRunner().invoke(app, options, catch_exceptions=False).stdout
    assert f"\nsteps      {found}\n" in text
    assert ", float32, precision fast\n" in text
    result = json.loads(CliRunner().invoke(app, [*options, "--json"]).stdout)
    assert result["history"]["execution"] == found
    assert (result["arguments"]["execution"], result["arguments"]["precision"]) == (execution, "fast")


def test_train_in_mixed_precision(mnist: Path) -> None:
    result = json.loads(run("train", str(mnist), "--layers", "16", "--precision", "mixed", "--json").stdout)
    assert result["test_accuracy"] > 0.5
    assert result["history"]["loss_scale"][-1] > 1
    assert result["history"]["execution"] == "eager"


@every("name", rules.__all__, ["adam", "lamb"])
def test_info_prints_every_kernel(name: str) -> None:
    from gpubatch.ops import update_source

    trace = getattr(rules, name).trace()
    text = run("info", "--kernel", name).stdout
    assert text.endswith(update_source(trace) + "\n")
    assert text.count("__global__ void reduce_arrays") == len(trace.passes) - 1
    if len(trace.passes) == 1:
        assert text == update_source(trace) + "\n"


ERRORS = {
    "optimizer": (
        ["train", "--optimizer", "adm"],
        "error: --optimizer must be one of .*got 'adm'; did you mean 'adam'?",
    ),
    "decay": (["train", "--decay", "cos"], "error: --decay must be one of 'none', .*got 'cos'"),
    "activation": (["train", "--activation", "rel"], "error: activation must be one of 'relu', .*did you mean 'relu'"),
    "lr": (["train", "--lr", "-1", "--no-progress"], r"error: lr must be finite and in \[0, inf\), got -1.0"),
    "layers": (["train", "--layers", "5,x"], "error: --layers must be made of integers, got 'x'"),
    "a layer of no width": (["train", "--layers", "5,,5"], "error: --layers must be made of integers, got ''"),
    "batch": (["train", "--batch-size", "0"], "error: batch_size must be an integer >= 1, got 0"),
    "dtype": (["train", "--dtype", "float16"], "error: --dtype must be one of 'float32', 'float64', got 'float16'"),
    "backend": (["train", "--backend", "gpu"], "error: backend must be 'auto', 'cpu', 'cuda', 'cuda:N'.* got 'gpu'"),
    "precision": (["train", "--precision", "ful"], "error: precision must be .*; did you mean 'full'?"),
    "execution": (["train", "--execution", "graph"], "error: --execution must be one of 'auto', .* got 'graph'"),
    "class weight": (
        ["train", "--class-weight", "even"],
        "error: --class-weight must be one of 'balanced', got 'even'",
    ),
    "no graphs": (
        ["train", "--execution", "captured", "--no-progress"],
        "error: execution must be 'auto' or 'eager' here, got 'captured': graphs are for a GPU",
    ),
    "no folder": (["train", "nowhere"], "error: DATA must be files or a folder that are there, got 'nowhere'"),
    "empty folder": (["train", "."], r"error: DATA has neither MNIST"),
    "plot": (
        ["train", "--plot", "curves.gif"],
        r"error: the plot file must end in .png, .pdf or .svg, got 'curves.gif'",
    ),
    "plot folder": (["train", "--plot", "no/curves.png"], "error: the folder of the plot file must exist"),
    "resume": (["train", "--resume"], "error: --resume needs --checkpoint DIR, the folder of the run"),
    "every": (["train", "--every", "5"], "error: --every needs --checkpoint DIR"),
    "every 0": (["train", "--checkpoint", "run", "--every", "0"], "error: every must be an integer >= 1, got 0"),
    "kernel": (["info", "--kernel", "adamm"], "error: --kernel must be one of .*; did you mean 'adam'?"),
}


@every("name", [*ERRORS], ["plot folder", "resume", "kernel"])
def test_errors_are_one_line(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments, message = ERRORS[name]
    monkeypatch.chdir(tmp_path)
    done = run(*arguments, code=2)
    assert re.match(message, done.stderr), done.stderr
    assert done.stderr.count("\n") == 1


def test_wrong_usage_is_exit_code_2() -> None:
    assert "No such option" in run("train", "--nonsense", code=2).stderr


def test_damaged_data_is_exit_code_1(mnist: Path, tmp_path: Path) -> None:
    shutil.copytree(mnist, tmp_path / "data")
    for path in (tmp_path / "data").iterdir():
        path.write_bytes(path.read_bytes()[:20])
    assert run("train", str(tmp_path / "data"), "--no-progress", code=1).stderr.startswith("error: ")


def test_the_version() -> None:
    assert run("--version").stdout == f"gpubatch {gpubatch.__version__}\n"
    assert "2 for a wrong option or value" in " ".join(run("--help").stdout.replace("│", "").split())


def test_learning_rate_is_another_name_of_lr(mnist: Path) -> None:
    options = ["train", str(mnist), "--layers", "8", "--epochs", "1", "--json", "--no-progress"]
    assert json.loads(run(*options, "--learning-rate", "0.25").stdout)["arguments"]["lr"] == 0.25


def test_ctrl_c_leaves_one_line_and_what_was_done(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "curves.png"
    process = subprocess.Popen(
        [sys.executable, "-m", "gpubatch", "train", "--epochs", "1000", "--json", "--plot", str(picture)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "GPUBATCH_BACKEND": "cpu"},
    )
    assert process.stderr is not None
    for _ in range(2):
        process.stderr.readline()  # how many steps there are; the first epoch is done, the second is running
    time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    printed, told = process.communicate(timeout=120)
    rest = told.splitlines()
    assert process.returncode == 130
    assert [line for line in rest if not line.startswith("epoch ")] == [rest[-1]]
    assert re.fullmatch(
        r"interrupted in epoch \d+ after step \d+; nothing of it is saved without --checkpoint DIR", rest[-1]
    )
    found = json.loads(printed)
    assert found["interrupted"] == rest[-1]
    assert found["test_accuracy"] == found["history"]["validation_accuracy"][-1]
    assert picture.stat().st_size > 1000


def killed_after_two_epochs(signal_number: int, *options: str) -> tuple[int, str]:
    """Run ``gpubatch train`` with a signal in its third epoch: exit code and last line of standard error."""
    process = subprocess.Popen(
        [sys.executable, "-m", "gpubatch", "train", "--epochs", "1000", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "GPUBATCH_BACKEND": "cpu"},
    )
    assert process.stderr is not None
    for _ in range(2):
        process.stderr.readline()
    process.send_signal(signal_number)
    lines = process.communicate(timeout=120)[1].splitlines()
    return process.returncode, lines[-1] if lines else ""


def test_a_run_that_was_killed_goes_on(mnist: Path, tmp_path: Path) -> None:
    options = [str(mnist), "--layers", "16", "--batch-size", "32", "--json", "--no-progress", "--decay", "none"]
    whole = json.loads(run("train", *options, "--epochs", "4").stdout)
    saved = [*options, "--checkpoint", str(tmp_path / "run"), "--every", "3", "--resume"]
    run("train", *saved, "--epochs", "2")  # with no checkpoint yet it starts from the start
    for path in sorted((tmp_path / "run").glob("checkpoint-*"))[1:]:
        path.unlink()  # as if killed before them: the remaining one is amid an epoch
    resumed = json.loads(run("train", *saved, "--epochs", "4").stdout)
    for result in (whole, resumed):
        del result["history"]["seconds"]
    assert resumed["history"] == whole["history"]
    assert (resumed["test_loss"], resumed["test_accuracy"]) == (whole["test_loss"], whole["test_accuracy"])


@every("of_0_1", {"0.1": True, "now": False}, ["0.1"])
def test_a_run_of_version_0_1_goes_on(of_0_1: bool, mnist: Path, tmp_path: Path) -> None:
    """It has biases before batch norm, and --resume makes them; "auto" is what is given where nothing is."""
    options = [str(mnist), "--layers", "16", "--batch-size", "32", "--json", "--no-progress", "--decay", "none"]
    saved = [*options, "--checkpoint", str(tmp_path / "run")]
    first = json.loads(run("train", *saved, "--epochs", "1", *(["--init", "v0.1"] if of_0_1 else [])).stdout)
    assert first["parameters"] == 784 * 16 + 2 * 16 + 16 * 10 + 10 + (16 if of_0_1 else 0)
    resumed = json.loads(run("train", *saved, "--epochs", "2", "--resume").stdout)
    assert resumed["parameters"] == first["parameters"]
    assert resumed["history"]["loss"][0] == first["history"]["loss"][0]


@pytest.mark.parametrize(
    ("number", "verb", "code"), [(signal.SIGINT, "interrupted", 130), (signal.SIGTERM, "terminated", 143)]
)
def test_a_signal_saves_the_run(number: int, verb: str, code: int, mnist: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    options = [str(mnist), "--layers", "16", "--batch-size", "32", "--checkpoint", str(folder)]
    found, last = killed_after_two_epochs(number, *options)
    assert found == code
    assert re.fullmatch(
        rf"{verb} in epoch \d+ after step \d+; the model holds this last complete step, and so does the newest "
        rf"checkpoint in {folder}",
        last,
    )
    epochs = int(last.split()[3]) + 2
    assert "test accuracy" in run("train", *options, "--resume", "--epochs", str(epochs)).stdout


@pytest.mark.exhaustive
def test_loss_and_metrics_by_options(mnist: Path) -> None:
    small = ("train", str(mnist), *SMALL)
    done = run(*small, "--label-smoothing", "0.1", "--metrics", "f1,top_3", "--json")
    result = json.loads(done.stdout)
    assert result["arguments"]["label_smoothing"] == 0.1
    assert list(result["history"]["metrics"]) == ["f1", "top_3"]
    assert "  top_3 " in done.stderr
    assert "loss       svm" in run(*small, "--loss", "svm").stdout
    assert "loss       softmax_focal" in run(*small, "--loss", "softmax_focal").stdout
    assert run(*small, "--loss", "svm", "--label-smoothing", "0.1", code=2).stderr.startswith(
        "error: --label-smoothing"
    )
    swept = run("sweep", "step-size", str(mnist), "--layers", "8", "--label-smoothing", "0.1")
    assert "softmax_cross_entropy(label_smoothing=0.1)" in swept.stdout


@pytest.mark.exhaustive
def test_callbacks_by_options(mnist: Path, tmp_path: Path) -> None:
    log = tmp_path / "log.csv"
    options = ["--early-stop", "1", "--average", "0.9", "--plateau", "0", "--log", str(log), "--lr", "0.5"]
    done = run("train", str(mnist), "--layers", "8", "--batch-size", "50", "--epochs", "40", *options, "--json")
    found = json.loads(done.stdout)
    losses = found["history"]["validation_loss"]
    assert losses[-1] > min(losses) == found["test_loss"] == losses[found["epoch"] - 1]
    assert found["epoch"] == len(losses) - 1 < 39
    assert len(log.read_text().splitlines()) == len(losses) + 1
    assert "validation is of the averaged weights" in done.stderr
    assert f"stopped early: validation_loss was no better in 1 epochs than {min(losses):.4g}" in done.stderr
    assert (found["arguments"]["early_stop"], found["arguments"]["average"]) == (1, 0.9)


def test_without_the_extra_it_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['typer'] = None")
    code = "import importlib.util, runpy\nfind = importlib.util.find_spec\n"
    code += "importlib.util.find_spec = lambda name: None if name == 'typer' else find(name)\n"
    code += "runpy.run_module('gpubatch', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "the command line needs typer: pip install 'gpubatch[cli]'\n"
