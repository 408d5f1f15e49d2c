// Gather samples in an order without scaling; Target is Sample, or a 64-bit integer. Both are defined before this text,
// and Order.

// out = source[order], rows of `features` elements, for batch *batch of `size` samples each.
extern "C" __global__ void take(const Sample* source, const long long* order, const long long* batch, Target* out,
                                long long rows, long long features, long long width, long long lanes, long long size) {
    take_rows(source, Order(order, *batch * size), out, rows, features, width, lanes,
              [](Sample value) { return Target(value); });
}
