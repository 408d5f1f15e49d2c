// What each sample of a batch counts: its weight over the mean weight, so that a mean over the batch is the weighted
// mean. `Weight` and `Label` are defined before this text. Null `weight` counts as 1 each; where `labels` are given, a
// sample whose label is `ignored` weighs 0. The sum of the weights goes to *total. If it is 0, or a weight is negative
// or not finite, every result is NaN. One block does it all, so that it is one launch: a batch has few samples.
extern "C" __global__ void __launch_bounds__(SUM_THREADS, 1)
    weigh(const Weight* weight, const Label* labels, long long ignored, T* out, double* total, long long rows) {
    const auto of = [&](long long i) {
        return labels && (long long)labels[i] == ignored ? T(0) : weight ? T(weight[i]) : T(1);
    };
    double sum = 0;
    in_batches(threadIdx.x, rows, blockDim.x, of, [&](long long, T w) { sum += w >= 0 ? w : T(nan("")); });
    sum = combine<Sum>(sum, blockDim.x);
    const double factor = 0 < sum && sum <= 1.7976931348623157e308 ? rows / sum : nan("");
    in_batches(threadIdx.x, rows, blockDim.x, of, [&](long long i, T w) { out[i] = T(w * factor); });
    if (threadIdx.x == 0) *total = sum;
}
