// Losses in which every score counts for itself: their mean and the gradient by the scores in one pass. `share` is one
// over the number of scores. Target, the type in which targets are stored, is defined before this text. Without a
// gradient, dz is null. `scale` points to what the gradient is multiplied by before it is stored; null is 1.

struct Pair {
    T z, y;
};

struct Term {
    T loss, gradient;
};

template <class F>
__device__ inline void over_scores(const S* z, const Target* y, S* dz, long long n, double* parts, unsigned* ticket,
                                   T* loss, F term) {
    double sum = 0;
    in_batches((long long)blockIdx.x * blockDim.x + threadIdx.x, n, (long long)gridDim.x * blockDim.x,
               [&](long long i) { return Pair{z[i], T(y[i])}; },
               [&](long long i, Pair of) {
                   const Term found = term(of.z, of.y);
                   sum += found.loss;
                   if (dz) dz[i] = found.gradient;
               });
    if (grid_sum(sum, parts, ticket)) *loss = T(sum / n);
}

// (z - y)²
extern "C" __global__ void __launch_bounds__(SUM_THREADS, 1)
    mse(const S* z, const Target* y, S* dz, const T* scale, long long n, T share, double* parts, unsigned* ticket,
        T* loss) {
    const T unit = 2 * share * value_at(scale, 1);
    over_scores(z, y, dz, n, parts, ticket, loss, [&](T score, T target) {
        const T difference = score - target;
        return Term{difference * difference, difference * unit};
    });
}

// max(z, 0) - z y + log(1 + exp(-|z|)), of which the gradient is σ(z) - y: nothing overflows, no logarithm of zero.
extern "C" __global__ void __launch_bounds__(SUM_THREADS, 1)
    sigmoid_cross_entropy(const S* z, const Target* y, S* dz, const T* scale, long long n, T share, double* parts,
                          unsigned* ticket, T* loss) {
    const T unit = share * value_at(scale, 1);
    over_scores(z, y, dz, n, parts, ticket, loss, [&](T score, T target) {
        const T small = exp(-fabs(score)), sigmoid = (score > 0 ? T(1) : small) / (1 + small);
        return Term{larger_of(score, T(0)) - score * target + log1p(small), (sigmoid - target) * unit};
    });
}
