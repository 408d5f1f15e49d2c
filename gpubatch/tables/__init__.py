"""Tables of named columns as samples: :func:`read_table`."""

from gpubatch.tables.columns import listed as listed
from gpubatch.tables.files import is_large as is_large
from gpubatch.tables.recipe import (
    DIGESTED as DIGESTED,
    Category as Category,
    Hashed as Hashed,
    Numeric as Numeric,
    Recipe as Recipe,
    TrainingRows as TrainingRows,
)
from gpubatch.tables.table import Table as Table, read_table as read_table, some_of as some_of
