// L2 regularisation: its loss and gradient, for all weights in one launch. w and g are flat buffers; row i of `spans`
// is the start and stop of weight array i in both.

// loss += factor Σ w²
extern "C" __global__ void __launch_bounds__(SUM_THREADS, 1)
    l2_loss(const S* w, const long long* spans, long long count, T factor, double* parts, unsigned* ticket, T* loss) {
    const long long index = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    double sum = 0;
    for (long long span = 0; span < count; ++span)
        in_batches(spans[2 * span] + index, spans[2 * span + 1], (long long)gridDim.x * blockDim.x,
                   [&](long long i) { return w[i]; },
                   [&](long long, T value) { sum += (double)value * (double)value; });
    if (grid_sum(sum, parts, ticket)) *loss = T(*loss + sum * factor);
}

struct Pair {
    T w, g;
};

// g += factor * *scale * w; a null `scale` counts as 1
extern "C" __global__ void l2_gradient(const S* w, const long long* spans, long long count, S* g,
                                       const T* scale, T factor) {
    const T unit = factor * value_at(scale, 1);
    const long long index = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    for (long long span = 0; span < count; ++span)
        in_batches(spans[2 * span] + index, spans[2 * span + 1], (long long)gridDim.x * blockDim.x,
                   [&](long long i) { return Pair{w[i], g[i]}; },
                   [&](long long i, Pair of) { g[i] = of.g + unit * of.w; });
}
