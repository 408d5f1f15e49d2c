"""batch-size as a person types it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from families import every
from test_cli import mnist, run  # noqa: F401  # mnist is a fixture

import gpubatch as gb
from gpubatch.datasets import mnist_10k
from gpubatch.train import plan_batches
from gpubatch.train.validation import InMemory

SMALL = ["--layers", "32", "--dropout", "0", "--no-batch-norm", "--activation", "relu"]


def result(*arguments: str) -> Any:
    return json.loads(run("batch-size", *arguments, "--json").stdout)


def test_it_is_the_plan_of_fit() -> None:
    found = result(*SMALL, "--memory", "100 MB", "--optimizer", "momentum")
    (X, Y), (X_test, Y_test) = mnist_10k()
    net = gb.mlp([784, 32, 10], backend="cpu")
    loader = gb.Loader(X, Y, scale=1 / 255, backend="cpu", at_most=64)
    plan_batches(net, loader, gb.Momentum(net.parameters, 0.1), InMemory(X_test, Y_test, {}, X_test.size * 4))
    assert found["plan"]["parts"] == loader.plan.parts
    assert found["plan"]["needed"] == sum(loader.plan.parts.values())
    assert found["plan"]["available"] == 100_000_000
    assert (found["plan"]["batch_size"], found["samples"], found["parameters"]) == (64, 8000, 784 * 32 + 32 + 330)
    assert found["network"] == "784-32-10, relu, momentum, 10,000 bundled MNIST digits, float32, cpu"
    sizes = [int(n) for n in found["needed_by_size"]]
    assert sizes == [*(2**k for k in range(13)), 8000]
    assert found["needed_by_size"]["64"] == found["plan"]["needed"]
    assert list(found["needed_by_size"].values()) == sorted(found["needed_by_size"].values())


@pytest.mark.exhaustive
def test_less_memory_is_a_smaller_batch() -> None:
    sizes = result(*SMALL, "--at-most", "512")["needed_by_size"]
    between = (sizes["64"] + sizes["128"]) / 2 / 0.9
    plan = result(*SMALL, "--at-most", "512", "--memory", f"{between / 1024:.0f} KiB")["plan"]
    assert plan["batch_size"] == 64
    assert plan["reason"].startswith("memory limits the batch to 64: 128 samples would need ")
    assert result(*SMALL, "--at-most", "512", "--memory", f"{between:.0f}")["plan"]["batch_size"] == 64
    assert result(*SMALL, "--at-most", "100")["plan"]["batch_size"] == 64
    assert result(*SMALL, "--samples", "1500")["plan"]["batch_size"] == 32
    given = result(*SMALL, "--batch-size", "300", "--memory", "1 MB")["plan"]
    assert given["batch_size"] == 300
    assert given["reason"].startswith("batch_size=300 was given; it needs ")
    assert given["reason"].endswith(" of 976.6 KiB available, more than 90 % of that")


def test_the_tables(mnist: Path) -> None:  # noqa: F811
    done = run("batch-size", str(mnist), *SMALL, "--memory", "20 MB", "--batch-size", "64")
    lines = done.stdout.splitlines()
    assert lines[:2] == [
        "gpubatch batch-size, 300 samples",
        f"784-32-10, relu, adam, MNIST in {mnist}, float32, cpu",
    ]
    assert lines[-1].startswith("batch size 64: batch_size=64 was given; it needs ")
    shares = [
        float(share) for share in re.findall(r"^ .* ([\d.]+) % $", done.stdout.split("needed by")[0], re.MULTILINE)
    ]
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) == pytest.approx(100, abs=0.05 * len(shares))
    assert re.search(r"^ needed by batches of 64 +[\d.]+ [KM]iB +100\.0 % $", done.stdout, re.MULTILINE)
    assert re.findall(r"^ +(\d+) .*chosen", done.stdout, re.MULTILINE) == ["64"]
    assert re.findall(r"^ +(\d+) +[\d.]+ [KM]iB +[\d.]+ %", done.stdout, re.MULTILINE) == [
        *(str(2**k) for k in range(1, 9)),
        "300",
    ]
    assert "more than 90 %" not in done.stdout
    assert done.stderr == ""
    less = run("batch-size", str(mnist), *SMALL, "--memory", "200 KB", "--batch-size", "64").stdout
    assert less.count("more than 90 %") == 9 + 1  # every size, and the reason


def test_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "memory.png"
    done = run("batch-size", *SMALL, "--memory", "12 MB", "--plot", str(file))
    assert done.stdout.endswith(f"drawn in {file}\n")
    assert file.read_bytes().startswith(b"\x89PNG")
    assert int.from_bytes(file.read_bytes()[16:20], "big") == 800  # pixels wide


WRONG = {
    "memory 2 XB": "--memory, if not a number, must be bytes such as '256 MiB' or '1.5 GB', got '2 XB'",
    "memory 0": "--memory must be an integer >= 1, got 0",
    "memory 1000": "not even one sample fits in memory: it needs ",
    "layers a,b": "--layers must be made of integers, got 'a'",
    "optimizer newton": "--optimizer must be one of ",
    "batch-size many": "--batch-size must be made of integers, got 'many'",
    "plot memory.jpg": "the plot file must end in .png, .pdf or .svg, got 'memory.jpg'",
}


@every("wrong", [*WRONG], ["optimizer newton", "plot memory.jpg"])
def test_errors_are_one_line(wrong: str) -> None:
    option, _, value = wrong.partition(" ")
    done = run("batch-size", *SMALL, f"--{option}", value, code=1 if wrong == "memory 1000" else 2)
    assert done.stdout == ""
    assert done.stderr.startswith(f"error: {WRONG[wrong]}")
    assert done.stderr.count("\n") == 1


def test_help_has_an_example_and_wrong_usage_is_exit_code_2() -> None:
    text = " ".join(run("batch-size", "--help").stdout.replace("│", " ").split())
    assert "gpubatch batch-size data/mnist --layers 4096,4096 --memory '1 GB' --plot memory.png" in text
    run("batch-size", "--samples", "0", code=2)
