"""Tables of named columns as samples: :func:`read_table`."""

from gpubatch.tables.recipe import Recipe
from gpubatch.tables.table import Table, read_table

__all__ = ["Recipe", "Table", "read_table"]
