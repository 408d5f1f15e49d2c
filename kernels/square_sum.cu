// The sum of squares of a buffer in double precision, and how many of its elements are not finite: every block leaves
// its part, one more launch adds them to the first two of `out`. The bits depend on the numbers alone, not on where the
// buffer begins.

// `out` holds the two results, then a sum for each block, then a count for each.
extern "C" __global__ void square_sum(const S* x, double* out, long long n) {
    const bool packed = aligned(x);
    const long long first = ((long long)blockIdx.x * blockDim.x + threadIdx.x) * WIDTH;
    double sum = 0;
    long long odd = 0;
    in_batches(
        first, n, (long long)gridDim.x * blockDim.x * WIDTH,
        [&](long long i) {
            if (packed && i + WIDTH <= n) return pack(x + i);
            Pack values;
            for (int lane = 0; lane < WIDTH; ++lane) values.at[lane] = i + lane < n ? x[i + lane] : S();
            return values;
        },
        [&](long long, Pack values) {
            for (int lane = 0; lane < WIDTH; ++lane) {
                const T value = values.at[lane];
                sum += (double)value * (double)value;
                odd += !(value - value == 0);
            }
        });
    sum = combine<Sum>(sum, blockDim.x);
    odd = combine<Sum>(odd, blockDim.x);
    if (threadIdx.x == 0) {
        out[2 + blockIdx.x] = sum;
        out[2 + gridDim.x + blockIdx.x] = (double)odd;
    }
}

// One block, for what `parts` blocks left.
extern "C" __global__ void add_to_square_sum(double* out, long long parts) {
    double sum = 0, odd = 0;
    for (long long i = threadIdx.x; i < parts; i += blockDim.x) {
        sum += out[2 + i];
        odd += out[2 + parts + i];
    }
    sum = combine<Sum>(sum, blockDim.x);
    odd = combine<Sum>(odd, blockDim.x);
    if (threadIdx.x == 0) {
        out[0] += sum;
        out[1] += odd;
    }
}
