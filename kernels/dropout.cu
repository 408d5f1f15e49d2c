// Inverted dropout: y = x * mask, mask = scale where a uniform random number is at least `rate`, else 0. The numbers
// are those of philox.cuh, from `number` on: element i depends only on block (number + i) / 8, so any thread can
// generate it. If `step_at` is not null, the kernel reads the step there when it runs. x may be y.

extern "C" __global__ void dropout(const S* x, S* y, S* mask, long long n, u64 seed, u64 layer, u64 step,
                                   const u64* step_at, u64 number, float rate, T scale) {
    if (step_at) step = *step_at;
    const int lead = (int)(number % 8);
    const bool packed = lead == 0 && aligned(x) && aligned(y) && aligned(mask);
    const long long stride = (long long)gridDim.x * blockDim.x;
    const long long blocks = (lead + n + 7) / 8;
    for (long long block = (long long)blockIdx.x * blockDim.x + threadIdx.x; block < blocks; block += stride) {
        float uniform[8];
        uniform_block(number / 8 + (u64)block, seed, layer, step, uniform);
        const long long start = 8 * block - lead;
        if (packed && start + 8 <= n) {
            for (int j = 0; j < 8; j += WIDTH) {
                Pack kept, value = pack(x + start + j);
                for (int lane = 0; lane < WIDTH; ++lane) {
                    kept.at[lane] = uniform[j + lane] >= rate ? scale : T(0);
                    value.at[lane] = value.at[lane] * kept.at[lane];
                }
                pack(mask + start + j) = kept;
                pack(y + start + j) = value;
            }
        } else {
            for (int j = 0; j < 8; ++j) {
                const long long i = start + j;
                if (0 <= i && i < n) {
                    S kept;
                    kept = uniform[j] >= rate ? scale : T(0);
                    mask[i] = kept;
                    y[i] = x[i] * kept;
                }
            }
        }
    }
}

// dx = dy * mask. dx may be dy.
extern "C" __global__ void dropout_gradient(const S* dy, const S* mask, S* dx, long long n) {
    in_batches((long long)blockIdx.x * blockDim.x + threadIdx.x, n, (long long)gridDim.x * blockDim.x,
               [&](long long i) { return dy[i] * mask[i]; }, [&](long long i, T value) { dx[i] = value; });
}
