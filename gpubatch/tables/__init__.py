"""Tables of named columns as samples: :func:`read_table`."""

from gpubatch.tables.files import is_large
from gpubatch.tables.recipe import Category, Hashed, Numeric, Recipe
from gpubatch.tables.table import Table, read_table

__all__ = ["Category", "Hashed", "Numeric", "Recipe", "Table", "is_large", "read_table"]
