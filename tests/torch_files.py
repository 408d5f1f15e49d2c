"""What the tests of gpubatch.torch have in common; imports torch, which those tests need."""

from __future__ import annotations

import io
from typing import Any

import torch


def through_a_file(d: Any) -> Any:
    """A state as ``torch.save`` writes it, read without pickled code."""
    file = io.BytesIO()
    torch.save(d, file)
    file.seek(0)
    return torch.load(file, weights_only=True)
