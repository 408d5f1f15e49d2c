// The sum of squares of a buffer, and the number of its elements that are not finite. The bits depend on the numbers
// alone, not on the buffer's alignment.
//
// In double precision, although consumer cards run it at a sixty-fourth of the speed: the square of a float32 may
// overflow or underflow in float32, and the sum must show by how much.

// Layout of `out`: the sum and the count over all calls, the ticket of last_block() (0 between launches), then a sum
// for each block and a count for each.
enum : int { PARTS_AT = 3 };

// out[0] += Σ x², out[1] += the number of x that are not finite; returns true in the thread that added. All threads
// must call it.
__device__ inline bool add_squares(const S* x, long long n, double* out) {
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
    double *sums = out + PARTS_AT, *counts = sums + gridDim.x;
    if (threadIdx.x == 0) {
        sums[blockIdx.x] = sum;
        counts[blockIdx.x] = (double)odd;
    }
    if (!last_block(reinterpret_cast<unsigned*>(out + 2))) return false;
    double all = 0, all_odd = 0;
    for (unsigned i = threadIdx.x; i < gridDim.x; i += blockDim.x) {
        all += sums[i];
        all_odd += counts[i];
    }
    all = combine<Sum>(all, blockDim.x);
    all_odd = combine<Sum>(all_odd, blockDim.x);
    if (threadIdx.x != 0) return false;
    out[0] += all;
    out[1] += all_odd;
    return true;
}
