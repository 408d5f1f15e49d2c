// out = xᵀ of `rows` rows that lie `stride` elements apart. Each block turns one tile, in shared memory: both what it
// reads and what it writes are then whole lines of memory.
extern "C" __global__ void __launch_bounds__(256)
transpose(const S* x, S* out, long long rows, long long columns, long long stride) {
    __shared__ S tile[WARP][WARP + 1];  // of an odd width, so that neither rows nor columns of it lie in one bank
    const long long across = (columns + WARP - 1) / WARP;
    const long long row = blockIdx.x / across * WARP, column = blockIdx.x % across * WARP;
    const int lane = threadIdx.x % WARP, first = threadIdx.x / WARP, step = blockDim.x / WARP;
    for (int i = first; i < WARP; i += step)
        if (row + i < rows && column + lane < columns) tile[i][lane] = x[(row + i) * stride + column + lane];
    __syncthreads();
    for (int i = first; i < WARP; i += step)
        if (column + i < columns && row + lane < rows) out[(column + i) * rows + row + lane] = tile[lane][i];
}
