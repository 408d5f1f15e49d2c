"""The core's kernels: what a step does besides calling layers, for NumPy, compiled for the CPU, and for CUDA."""

from gpubatch.ops.cuda_ops import MOST_THREADS, CudaOps, source_of, square_grid
from gpubatch.ops.host_ops import HalfOps, ops_for
from gpubatch.ops.launch import CudaUpdate, cuda_kernel, host_library, update_for, update_source
from gpubatch.ops.numpy_ops import (
    COMPUTE,
    GATHER_BLOCK,
    IDENTITY,
    PARTS,
    SQUARE_SUM_SIZE,
    SUM_PARTS,
    Ops,
    philox_generator,
    workspace_dtype,
)
from gpubatch.ops.products import PRECISIONS, ArrayProducts, Products, check_choices, products_for
from gpubatch.ops.program import check_slope

__all__ = [
    "COMPUTE",
    "GATHER_BLOCK",
    "IDENTITY",
    "MOST_THREADS",
    "PARTS",
    "PRECISIONS",
    "SQUARE_SUM_SIZE",
    "SUM_PARTS",
    "ArrayProducts",
    "CudaOps",
    "CudaUpdate",
    "HalfOps",
    "Ops",
    "Products",
    "check_choices",
    "check_slope",
    "cuda_kernel",
    "host_library",
    "ops_for",
    "philox_generator",
    "products_for",
    "source_of",
    "square_grid",
    "update_for",
    "update_source",
    "workspace_dtype",
]
