"""Optional requirements of tests: a test without one is skipped, or fails if the requirement is expected.

``GPUBATCH_EXPECT=peers,compiler,nvrtc,nvmath,data,remote,parallel,gpu`` lists what a machine is expected
to have.
"""

from __future__ import annotations

import importlib
import os
from typing import Any, NoReturn

import pytest


def missing(what: str, reason: str) -> NoReturn:
    """Skip the test for want of ``what``, or fail it if ``what`` is expected."""
    if what in os.environ.get("GPUBATCH_EXPECT", "").split(","):
        pytest.fail(f"{what} is expected here, but {reason}")
    pytest.skip(reason, allow_module_level=True)


def file_library(module: str) -> Any:
    """Import a library that reads files; skip the test if it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError:
        missing("data", f"{module} is not installed (pip install 'gpubatch[data]')")


def peer(module: str) -> Any:
    """Import a library to compare with; skip the test if it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError:
        missing("peers", f"{module} is not installed (pip install 'gpubatch[peers]')")
