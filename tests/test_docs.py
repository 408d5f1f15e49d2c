"""The site's pages: the reference has every public name, examples run, and what a page names exists.

`.ci/run` builds the site with warnings as errors, and so executes the pages with code cells.
"""

from __future__ import annotations

import doctest
import inspect
import re
import shlex
import tomllib
from pathlib import Path

import numpy as np
import pytest
from families import every
from needs import file_library

import gpubatch as gb

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
    assert set(modules) == {"nn.losses", "sources", "datasets", "metrics", "plot", "sklearn", "torch"}


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
    from typer.main import get_command

    from gpubatch.cli import app

    shell = "\n".join(fenced(PAGES[page], "sh"))
    for line in [
        *re.findall(r"^(gpubatch .*)$", shell, re.MULTILINE),
        *re.findall(r"^!(gpubatch .*)$", PAGES[page], re.M),
    ]:
        _, command, *words = shlex.split(line, comments=True)
        if command in ("--help", "--version"):
            continue
        known = {option for p in get_command(app).commands[command].params for option in p.opts} | {"--help"}
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
