"""Sources of whatever users give."""

from __future__ import annotations

from typing import Any

from gpubatch.inputs import SparseMatrix, is_sparse
from gpubatch.sources.chunked import Chunked, is_chunked
from gpubatch.sources.parts import files, names_files
from gpubatch.sources.reader import Source


def is_read(x: Any) -> bool:
    """Whether samples are read from ``x`` by place, so that it may be larger than memory; a map is an array."""
    return names_files(x) or is_sparse(x) or is_chunked(x) or (hasattr(x, "read") and hasattr(x, "__len__"))


def as_source(name: str, x: Any) -> Source | None:
    """The source of ``x``, an argument called ``name``; None where ``x`` is an array."""
    if not is_read(x):
        return None
    if names_files(x):
        return files(x)
    found: Source = SparseMatrix(name, x) if is_sparse(x) else Chunked(x) if is_chunked(x) else x
    return found
