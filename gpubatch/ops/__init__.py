"""The core's operations, each with its NumPy, compiled and CUDA form; update rules, and matrix products."""

from gpubatch.ops.blas import cpu_products as cpu_products
from gpubatch.ops.cells import CELL_WORDS as CELL_WORDS, CellSplit as CellSplit
from gpubatch.ops.compile import cuda_kernel as cuda_kernel, host_library as host_library, source_of as source_of
from gpubatch.ops.dropout import philox_generator as philox_generator
from gpubatch.ops.elementwise import IDENTITY as IDENTITY
from gpubatch.ops.gather import gather_batch as gather_batch, gather_bytes as gather_bytes, take_batch as take_batch
from gpubatch.ops.grid import MOST_THREADS as MOST_THREADS, Grid as Grid, blocks_for as blocks_for
from gpubatch.ops.host_compiler import own_form as own_form
from gpubatch.ops.operation import COMPUTE as COMPUTE, Space as Space, workspace_dtype as workspace_dtype
from gpubatch.ops.permutation import (
    PERMUTATION_WORDS as PERMUTATION_WORDS,
    Draws as Draws,
    Permutation as Permutation,
    permutation_bytes as permutation_bytes,
    permute as permute,
)
from gpubatch.ops.products import (
    PRECISIONS as PRECISIONS,
    ArrayProducts as ArrayProducts,
    Products as Products,
    check_choices as check_choices,
    products_for as products_for,
)
from gpubatch.ops.program import check_slope as check_slope
from gpubatch.ops.recording import KernelCalls as KernelCalls, recorded as recorded
from gpubatch.ops.sums import SQUARE_SUM_SIZE as SQUARE_SUM_SIZE, square_grid as square_grid
from gpubatch.ops.table import Ops as Ops, ops_for as ops_for
from gpubatch.ops.update import (
    CompiledUpdate as CompiledUpdate,
    CudaUpdate as CudaUpdate,
    Update as Update,
    reduce_sources as reduce_sources,
    update_for as update_for,
    update_source as update_source,
)
