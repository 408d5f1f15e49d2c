// A deterministic sum over the grid: each block stores its sum in double precision, the last block adds them up. The
// bits depend only on the numbers and their count.

enum : int { SUM_THREADS = 512 };  // with 1024, exp and log1p in double precision would run out of registers

// Replace each thread's `sum` by the sum over the grid, valid in the one thread that returns true. All threads must
// call it, at the end of a kernel.
__device__ inline bool grid_sum(double& sum, double* parts, unsigned* ticket) {
    sum = combine<Sum>(sum, blockDim.x);
    if (gridDim.x > 1) {
        if (threadIdx.x == 0) parts[blockIdx.x] = sum;
        if (!last_block(ticket)) return false;
        sum = 0;
        for (unsigned i = threadIdx.x; i < gridDim.x; i += blockDim.x) sum += parts[i];
        sum = combine<Sum>(sum, blockDim.x);
    }
    return threadIdx.x == 0;
}
