// One number from many: every block leaves its sum in double precision, the last one adds them up. The bits depend on
// the numbers and on how many there are, nothing else.

enum : int { SUM_THREADS = 512 };  // exp and log1p in double precision need more registers than 1024 would have

// `sum` is each thread's; then it is the sum over the grid, for the one thread that gets true. All threads must come
// here, at the end of a kernel.
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
