// A score loss: its mean and its gradient with respect to the scores, in one pass. `Score`, generated from the loss's
// formula, its SCALARS, and Target, the type of targets, are defined before this text. `share` is 1 / number of scores.
// dz is null if no gradient is wanted. The gradient is multiplied by *scale before it is stored; a null `scale` counts
// as 1. With `weights`, one for each row of so many `outputs`, a score's loss and gradient are multiplied by its row's;
// a weight of 0 makes them 0.

struct Pair {
    T z, y;
};

extern "C" __global__ void __launch_bounds__(SUM_THREADS, 1)
    score_loss(const S* z, const Target* y, const T* weights, S* dz, const T* scale, long long n, long long outputs,
               T share, double* parts, unsigned* ticket, T* loss) {
    const T unit = share * value_at(scale, 1);
    const T k[] = SCALARS;
    double sum = 0;
    in_batches((long long)blockIdx.x * blockDim.x + threadIdx.x, n, (long long)gridDim.x * blockDim.x,
               [&](long long i) { return Pair{z[i], T(y[i])}; },
               [&](long long i, Pair of) {
                   T slope;
                   T lost = Score::f(of.z, of.y, k, slope);
                   if (weights) {
                       const T weight = weights[i / outputs];
                       lost = weight == 0 ? T(0) : lost * weight;
                       slope = weight == 0 ? T(0) : slope * weight;
                   }
                   sum += lost;
                   if (dz) dz[i] = slope * unit;
               });
    if (grid_sum(sum, parts, ticket)) *loss = T(sum / n);
}
