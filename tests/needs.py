"""What a test may need beyond Python and NumPy: skipped where it is missing, an error where expected.

``GPUBATCH_EXPECT=peers,compiler,nvrtc,nvmath,data,gpu`` names what a machine must have; there, a missing one fails the
test.
"""

from __future__ import annotations

import importlib
import os
from typing import Any, NoReturn

import pytest


def missing(what: str, reason: str) -> NoReturn:
    """Skip the test, or fail it where ``what`` is expected."""
    if what in os.environ.get("GPUBATCH_EXPECT", "").split(","):
        pytest.fail(f"{what} is expected here, but {reason}")
    pytest.skip(reason)


def peer(module: str) -> Any:
    """A library to compare with."""
    try:
        return importlib.import_module(module)
    except ImportError:
        missing("peers", f"{module} is not installed (pip install 'gpubatch[peers]')")
