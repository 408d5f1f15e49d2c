"""The core's operations, each with its NumPy, compiled and CUDA form; update rules, and matrix products."""

from gpubatch.ops.blas import cpu_products
from gpubatch.ops.cells import CELL_WORDS, CellSplit
from gpubatch.ops.compile import cuda_kernel, host_library, source_of
from gpubatch.ops.dropout import philox_generator
from gpubatch.ops.elementwise import IDENTITY
from gpubatch.ops.gather import gather_batch, gather_bytes, take_batch
from gpubatch.ops.grid import MOST_THREADS, Grid, blocks_for
from gpubatch.ops.host_compiler import own_form
from gpubatch.ops.operation import COMPUTE, Space, workspace_dtype
from gpubatch.ops.permutation import PERMUTATION_WORDS, Draws, Permutation, permutation_bytes, permute
from gpubatch.ops.products import PRECISIONS, ArrayProducts, Products, check_choices, products_for
from gpubatch.ops.program import check_slope
from gpubatch.ops.recording import recorded
from gpubatch.ops.sums import SQUARE_SUM_SIZE, square_grid
from gpubatch.ops.table import Ops, ops_for
from gpubatch.ops.update import CudaUpdate, Update, reduce_sources, update_for, update_source

__all__ = [
    "CELL_WORDS",
    "COMPUTE",
    "IDENTITY",
    "MOST_THREADS",
    "PERMUTATION_WORDS",
    "PRECISIONS",
    "SQUARE_SUM_SIZE",
    "ArrayProducts",
    "CellSplit",
    "CudaUpdate",
    "Draws",
    "Grid",
    "Ops",
    "Permutation",
    "Products",
    "Space",
    "Update",
    "blocks_for",
    "check_choices",
    "check_slope",
    "cpu_products",
    "cuda_kernel",
    "gather_batch",
    "gather_bytes",
    "host_library",
    "ops_for",
    "own_form",
    "permutation_bytes",
    "permute",
    "philox_generator",
    "products_for",
    "recorded",
    "reduce_sources",
    "source_of",
    "square_grid",
    "take_batch",
    "update_for",
    "update_source",
    "workspace_dtype",
]
