"""``pytest --emulate-gpu``: run the tests marked gpu with the real CuPy on the emulated device."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import emulated_gpu
from emulated_gpu import Options, overlay

ran = pytest.StashKey[int]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--emulate-gpu",
        metavar="OPTIONS",
        nargs="?",
        const="",
        help="run CuPy on a CUDA device in main memory, such as timing=late,devices=2,capability=75,memory=2GiB",
    )


def pytest_configure(config: pytest.Config) -> None:
    given = config.getoption("--emulate-gpu", None)
    if given is None:
        return
    try:
        overlay.cupy_wheel()
        emulated_gpu.install(Options.parse(given))
    except (RuntimeError, ValueError) as error:
        # pytest takes an argument after the option without "=" for its value.
        hint = "" if not given or "=" in given else "; before a path, write '--emulate-gpu= PATH'"
        raise pytest.UsageError(f"{error}{hint}") from error
    config.stash[ran] = 0
    config.pluginmanager.register(Emulated(config), "emulated-gpu")


class Emulated:
    """The hooks of a run with the emulated device."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        name, version, _ = overlay.cupy_wheel()
        self._cupy = f"CuPy {version} ({name})"

    def pytest_report_header(self) -> str:
        return f"emulated GPU: {self._cupy}, {emulated_gpu.installed()}"

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> Iterator[None]:
        """Fail a test if the device noted a fault, and reset the device for the next test."""
        try:
            yield
        finally:
            if faults := emulated_gpu.faults():
                emulated_gpu.mend()
                pytest.fail("the emulated GPU noted: " + "; ".join(faults), pytrace=False)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and not report.skipped and "gpu" in report.keywords:
            self._config.stash[ran] += 1

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        count = self._config.stash[ran]
        terminalreporter.write_line(f"{count} gpu tests ran on the emulated device with {self._cupy}")
