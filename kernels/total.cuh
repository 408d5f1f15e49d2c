// One number from many: every block leaves its sum in double precision, one more launch adds them up. The bits depend on
// the numbers and on how many there are, nothing else. A single block is done at once.

enum { SUM_THREADS = 512 };

// out = share * sum, and with `add` what was there besides.
__device__ inline void write_total(double sum, T* out, T share, bool add) {
    *out = T(sum * share + (add ? double(*out) : 0.0));
}

// The last thing in a kernel: `sum` is each thread's. All threads must come here.
__device__ inline void leave_sum(double sum, double* parts, T* out, T share, bool add) {
    sum = combine<Sum>(sum, blockDim.x);
    if (threadIdx.x != 0) return;
    if (gridDim.x > 1) parts[blockIdx.x] = sum;
    else write_total(sum, out, share, add);
}

// One block, for what `count` blocks left.
extern "C" __global__ void add_parts(const double* parts, T* out, long long count, T share, long long add) {
    double sum = 0;
    for (long long i = threadIdx.x; i < count; i += blockDim.x) sum += parts[i];
    sum = combine<Sum>(sum, blockDim.x);
    if (threadIdx.x == 0) write_total(sum, out, share, add);
}
