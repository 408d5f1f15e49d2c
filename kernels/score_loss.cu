// A score loss: its mean and its gradient with respect to the scores, in one pass. `Score`, generated from the loss's
// formula, its SCALARS, and Target, the type of targets, are defined before this text. `share` is 1 / number of scores.
// dz is null if no gradient is wanted. The gradient is multiplied by *scale before it is stored; a null `scale` counts
// as 1.

struct Pair {
    T z, y;
};

extern "C" __global__ void __launch_bounds__(SUM_THREADS, 1)
    score_loss(const S* z, const Target* y, S* dz, const T* scale, long long n, T share, double* parts,
               unsigned* ticket, T* loss) {
    const T unit = share * value_at(scale, 1);
    const T k[] = SCALARS;
    double sum = 0;
    in_batches((long long)blockIdx.x * blockDim.x + threadIdx.x, n, (long long)gridDim.x * blockDim.x,
               [&](long long i) { return Pair{z[i], T(y[i])}; },
               [&](long long i, Pair of) {
                   T slope;
                   sum += Score::f(of.z, of.y, k, slope);
                   if (dz) dz[i] = slope * unit;
               });
    if (grid_sum(sum, parts, ticket)) *loss = T(sum / n);
}
