"""Orders of large sets, for tests with small ones."""

from __future__ import annotations

import pytest

from gpubatch.loader import order

__all__ = ["from_64_on"]


def from_64_on(patch: pytest.MonkeyPatch) -> None:
    """Sets of 64 samples are large."""
    patch.setattr(order, "LARGE", 64)
    patch.setattr(order, "LEAST", 8)
