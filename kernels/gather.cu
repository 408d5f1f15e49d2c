// Gather samples in an order and convert them from Sample, the type of the source, to Target, the type of the network.
// Both are defined before this text, and Order, which reads or computes the order.

// out = scale * source[order] + shift, rows of `features` numbers. Samples must be in range. If `order` is null, all
// rows are converted as they stand. If `batch` is not null, `order` covers all batches, `size` samples each, and the
// kernel gathers batch number *batch.
extern "C" __global__ void gather(const Sample* source, const long long* order, const long long* batch, Target* out,
                                  long long rows, long long features, long long width, long long lanes, long long size,
                                  T scale, T shift) {
    take_rows(source, Order(order, batch ? *batch * size : 0), out, rows, features, width, lanes, [&](Sample value) {
        const T scaled = scale == 1 ? T(value) : T(value) * scale;  // a product may flush denormals to 0
        Target made;
        made = shift == 0 ? scaled : scaled + shift;  // -0 stays -0
        return made;
    });
}
