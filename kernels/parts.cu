// What callbacks add to a step, by numbers that the host computes for each step. `numbers` has a row of `stride` numbers
// for each step of a chunk, and in a captured step `progress` says which one; without it the first row counts.

__device__ inline const double* numbers_of(const double* numbers, long long stride, const long long* progress,
                                           int before) {
    return progress ? numbers + (progress[SLOT] - before) * stride : numbers;
}

// Gradients that were multiplied by *factor (null: by 1) are kept between -limit and limit. What is not finite stays, so
// that the step is found out.
extern "C" __global__ void clip_values(S* g, long long n, const T* factor, const double* numbers, long long stride,
                                       const long long* progress) {
    const T limit = T(numbers_of(numbers, stride, progress, 0)[0]) * value_at(factor, 1);
    in_batches((long long)blockIdx.x * blockDim.x + threadIdx.x, n, (long long)gridDim.x * blockDim.x,
               [&](long long i) { return T(g[i]); },
               [&](long long i, T x) {
                   if (x - x == 0) g[i] = x > limit ? limit : x < -limit ? -limit : x;
               });
}

// Gradients that were multiplied by *factor plus normal numbers of a standard deviation, by Box and Muller from the
// uniform ones of philox.cuh: those of its block b are for the elements from 8 b on. The numbers of a step are the
// standard deviation and the counter.
extern "C" __global__ void add_noise(S* g, long long n, u64 seed, u64 place, const T* factor, const double* numbers,
                                     long long stride, const long long* progress) {
    const double* own = numbers_of(numbers, stride, progress, 0);
    const T deviation = T(own[0]) * value_at(factor, 1);
    const long long step = (long long)gridDim.x * blockDim.x;
    for (long long block = (long long)blockIdx.x * blockDim.x + threadIdx.x; 8 * block < n; block += step) {
        float uniform[8];
        uniform_block((u64)block, seed, place, (u64)own[1], uniform);
        for (int j = 0; j < 8; j += 2) {
            const float radius = sqrtf(-2 * logf(1 - uniform[j])), half_turns = 2 * uniform[j + 1];
            const long long i = 8 * block + j;
            if (i < n) g[i] = T(g[i]) + deviation * T(radius * cospif(half_turns));
            if (i + 1 < n) g[i + 1] = T(g[i + 1]) + deviation * T(radius * sinpif(half_turns));
        }
    }
}

// mean += take * (w - mean), after the update of a step: the mean of a weight that never changes is that weight. The
// number of a step is take.
extern "C" __global__ void average(const S* w, T* mean, long long n, const double* numbers, long long stride,
                                   const long long* progress) {
    if (progress && progress[HALTED]) return;
    const T take = T(numbers_of(numbers, stride, progress, 1)[0]);  // the update went on to the next step
    if (take == 0) return;
    in_batches((long long)blockIdx.x * blockDim.x + threadIdx.x, n, (long long)gridDim.x * blockDim.x,
               [&](long long i) { return mean[i] + take * (T(w[i]) - mean[i]); },
               [&](long long i, T value) { mean[i] = value; });
}
