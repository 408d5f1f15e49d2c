"""The site's pages: the reference has every public name, examples run, and what a page names exists.

`.ci/run` builds the site with warnings as errors, and so executes the pages with code cells.
"""

from __future__ import annotations

import doctest
import inspect
import os
import re
import shlex
import signal
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from families import every
from needs import file_library, peer

import gpubatch as gb
from gpubatch.nn import LOSSES

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = {str(page.relative_to(DOCS)): page.read_text() for page in sorted(DOCS.rglob("*.md"))}
EXECUTED = {name for name, text in PAGES.items() if text.startswith("---\nfile_format: mystnb")}
every_page = pytest.mark.parametrize("page", PAGES)


def fenced(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def test_the_reference_has_every_public_name_once() -> None:
    pages = "".join(page.read_text() for page in (DOCS / "reference").glob("*.rst"))
    shown = re.findall(r"^\.\. auto(?:class|function|exception):: (\w+)$", pages, re.MULTILINE)
    modules = re.findall(r"^\.\. automodule:: gpubatch\.([\w.]+)$", pages, re.MULTILINE)
    assert sorted(shown) == sorted(gb.HOMES.keys() - {"losses", "rules"})
    assert set(modules) == {"sources", "datasets", "metrics", "plot", "sklearn", "torch"}
    losses = re.findall(r"^\.\. autofunction:: gpubatch\.losses\.(\w+)$", pages, re.MULTILINE)
    assert sorted(losses) == sorted(LOSSES)
    opened = re.findall(r"`gb\.sources\.(\w+)", "".join(PAGES.values()))
    (members,) = re.findall(r"automodule:: gpubatch\.sources\n   :members: (.*)$", pages, re.MULTILINE)
    assert set(opened) <= set(members.split(", "))


# What gpubatch makes and gives to the user, modules, and classes to derive from, whose examples are classes.
WITHOUT_EXAMPLE = {"Loss", "losses", "Layer", "Context", "rules", "normal_cdf", "TrainingState"} | {
    "TrainingInterrupted",
    "TrainingTerminated",
}


def test_every_public_name_has_an_example() -> None:
    without = {name for name in gb.HOMES if ">>>" not in (inspect.getdoc(getattr(gb, name)) or "")}
    assert {name for name in without if gb.HOMES[name] != "errors"} == WITHOUT_EXAMPLE


@pytest.mark.parametrize("name", sorted(gb.HOMES))
def test_the_examples_of_docstrings_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if gb.HOMES[name] == "tables":
        file_library("pyarrow")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GPUBATCH_BACKEND", "cpu")
    names = {"gb": gb, "np": np, **{n: getattr(gb, n) for n in gb.HOMES}}
    flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    for test in doctest.DocTestFinder().find(getattr(gb, name), name, globs=names):
        report: list[str] = []
        doctest.DocTestRunner(optionflags=flags).run(test, out=report.append)
        assert report == [], "".join(report)


@every_page
def test_every_name_on_a_page_exists(page: str) -> None:
    for name in set(re.findall(r"\bgb((?:\.\w+)+)", PAGES[page])):
        thing = gb
        for part in name[1:].split("."):
            assert hasattr(thing, part), f"gb{name}"
            thing = getattr(thing, part)
            if not hasattr(thing, "__path__") and not isinstance(thing, type(gb)):
                break


@every_page
def test_every_option_on_a_page_exists(page: str) -> None:
    pytest.importorskip("typer")
    from gpubatch.cli import command_named

    shell = "\n".join(fenced(PAGES[page], "sh"))
    for line in [
        *re.findall(r"^(gpubatch .*)$", shell, re.MULTILINE),
        *re.findall(r"^!(gpubatch .*)$", PAGES[page], re.M),
    ]:
        _, command, *words = shlex.split(line, comments=True)
        if command in ("--help", "--version"):
            continue
        known = {option for p in command_named(command).params for option in p.opts} | {"--help"}
        assert {word for word in words if word.startswith("--")} <= known, line


@every("page", sorted(PAGES.keys() - EXECUTED - {"from-pytorch.md"}), ["guide/gpu.md"])
def test_the_python_of_pages_that_are_not_executed_runs(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPUBATCH_BACKEND", "cpu")
    monkeypatch.chdir(tmp_path)
    space: dict[str, object] = {}
    for block in fenced(PAGES[page], "python"):
        exec(block, space)
    for block in fenced(PAGES[page], "py"):  # what needs another library or a device is at least Python
        compile(block, page, "exec")


def test_the_command_line_s_page_has_every_command() -> None:
    pytest.importorskip("typer")
    from gpubatch.cli import COMMANDS

    shown = re.findall(r"^!.*gpubatch ([\w-]+) --help$", PAGES["reference/command-line.md"], re.MULTILINE)
    assert sorted(shown) == sorted(COMMANDS)


FIVE = {text.partition("\n")[0]: text for text in PAGES["start/five.md"].split("\n## ")[1:]}


def test_five_tasks_take_ten_lines_and_five_minutes_of_reading() -> None:
    words = len(PAGES["index.md"].split()) + len(PAGES["start/five.md"].partition("##")[0].split())
    for task, text in FIVE.items():
        code = re.findall(r"^```(?:\{code-cell\}|python)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
        lines = [line for block in code for line in block.splitlines() if line.strip() and line[0] != ":"]
        assert 1 <= len(lines) <= 10, task
        assert words + len(text.split()) <= 5 * 230, task
    assert len(FIVE) == 5


@pytest.mark.exhaustive
def test_the_rule_for_pytorch_of_the_five_tasks_runs() -> None:
    torch = peer("torch")
    model = torch.nn.Linear(3, 2)
    before = [p.detach().clone() for p in model.parameters()]
    space: dict[str, Any] = {"model": model}
    (block,) = fenced(FIVE["Your rule on PyTorch's parameters"], "python")
    exec(block, space)
    model(torch.ones(4, 3)).sum().backward()
    space["opt"].step()
    for p, old in zip(model.parameters(), before, strict=True):  # m = 0.1 g, and its sign is that of g
        torch.testing.assert_close(p.detach(), old - 1e-2 * p.grad.sign())


@pytest.mark.exhaustive
def test_the_program_that_resumes_of_the_five_tasks_is_killed_and_resumed(tmp_path: Path) -> None:
    (program,) = fenced(FIVE["Resume after a kill"], r"\{code-cell\}")
    program = re.sub(r"^:tags: .*$", "", program, flags=re.MULTILINE).replace("epochs=2", "epochs=2, progress=False")
    program += "print(net.parameters.flat.tobytes().hex())"
    dies = """
import os
import signal

import gpubatch as gb

step = gb.Optimizer.step


def until(opt, *args, **options):
    if opt.t == 157:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(opt, *args, **options)


gb.Optimizer.step = until
"""
    environment = os.environ | {"GPUBATCH_BACKEND": "cpu"}

    def run(folder: Path, before: str = "") -> subprocess.CompletedProcess[str]:
        folder.mkdir(exist_ok=True)
        return subprocess.run(
            [sys.executable, "-c", before + program],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=100,
        )

    killed = run(tmp_path / "killed", dies)
    assert killed.returncode == -signal.SIGKILL
    assert [*(tmp_path / "killed" / "runs" / "a").glob("*.safetensors")]
    resumed, whole = run(tmp_path / "killed"), run(tmp_path / "whole")
    assert (resumed.returncode, whole.returncode) == (0, 0), resumed.stderr + whole.stderr
    assert resumed.stdout == whole.stdout != ""


LINKED = [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "CITATION.cff"]


def test_addresses_of_other_sites_are_well_formed() -> None:
    files = [*LINKED, *DOCS.rglob("*.md"), *DOCS.rglob("*.rst"), *(ROOT / "gpubatch").rglob("*.py")]
    address = re.compile(r"\]\(([a-z]+:[^)]*)\)|(?<!\()(https?://\w[^\s)>\"'`,]*)")  # a Markdown link, or one in text
    targets = [(path.name, *filter(None, found)) for path in files for found in address.findall(path.read_text())]
    for name, target in targets:
        url = urlsplit(target.rstrip("."))
        if url.netloc == "host":  # an example
            continue
        assert url.scheme == "https", (name, target)
        assert re.fullmatch(r"[a-z0-9-]+(\.[a-z0-9-]+)*\.[a-z]{2,}", url.netloc), (name, target)
        assert not re.search(r"[\s\"'`,;]", target), (name, target)
    assert targets


@every_page
def test_every_extra_exists(page: str) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for names in re.findall(r"(?:\.|gpubatch|/src)\[([a-z0-9,]+)\]", PAGES[page]):
        assert set(names.split(",")) <= extras.keys()


@every_page
def test_every_file_on_a_page_exists(page: str) -> None:
    for path in re.findall(r"`((?:bench|tests|docs|kernels|gpubatch)/[\w/.-]+)`", PAGES[page]):
        assert (ROOT / path).exists(), path
    for name in re.findall(r"\b(\d{4}-\d\d-\d\d-cpu-[\w-]+\.json)`", PAGES[page]):
        assert (ROOT / "bench" / "results" / name).exists(), name
