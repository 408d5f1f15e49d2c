// A loss in which every score counts for itself: its mean, and its gradient by the scores, in one pass. `Score` is
// generated from the loss's formula and defined before this text, and so are its SCALARS and Target, the type in which
// targets are stored. `share` is one over the number of scores. Without a gradient, dz is null. `scale` points to what
// the gradient is multiplied by before it is stored; null is 1.

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
