"""Tables of named columns as samples: :func:`read_table`."""

from gpubatch.tables.columns import listed
from gpubatch.tables.files import is_large
from gpubatch.tables.recipe import DIGESTED, Category, Hashed, Numeric, Recipe, TrainingRows
from gpubatch.tables.table import Table, read_table, some_of

__all__ = [
    "DIGESTED",
    "Category",
    "Hashed",
    "Numeric",
    "Recipe",
    "Table",
    "TrainingRows",
    "is_large",
    "listed",
    "read_table",
    "some_of",
]
