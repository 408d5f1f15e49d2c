// out = xᵀ; the rows of x are `stride` elements apart. Each block transposes one tile in shared memory, so that both
// reads and writes are coalesced.
extern "C" __global__ void __launch_bounds__(256)
transpose(const S* x, S* out, long long rows, long long columns, long long stride) {
    __shared__ S tile[WARP][WARP + 1];  // the odd width avoids bank conflicts in rows and columns
    const long long across = (columns + WARP - 1) / WARP;
    const long long row = blockIdx.x / across * WARP, column = blockIdx.x % across * WARP;
    const int lane = threadIdx.x % WARP, first = threadIdx.x / WARP, step = blockDim.x / WARP;
    for (int i = first; i < WARP; i += step)
        if (row + i < rows && column + lane < columns) tile[i][lane] = x[(row + i) * stride + column + lane];
    __syncthreads();
    for (int i = first; i < WARP; i += step)
        if (column + i < columns && row + lane < rows) out[(column + i) * rows + row + lane] = tile[lane][i];
}
