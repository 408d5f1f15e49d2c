// Gather samples by index and convert them from Sample, the type of the source, to Target, the type of the network.
// Both are defined before this text.

// out = scale * source[index] + shift, rows of `features` numbers. Indices must be in range. If `index` is null, all
// rows are converted in order. If `batch` is not null, `index` covers all batches, `size` samples each, and the kernel
// gathers batch number *batch.
extern "C" __global__ void gather(const Sample* source, const long long* index, const long long* batch, Target* out,
                                  long long rows, long long features, long long width, long long lanes, long long size,
                                  T scale, T shift) {
    if (batch) index += *batch * size;
    take_rows(source, index, out, rows, features, width, lanes, [&](Sample value) {
        const T scaled = scale == 1 ? T(value) : T(value) * scale;  // a product may flush denormals to 0
        Target made;
        made = shift == 0 ? scaled : scaled + shift;  // -0 stays -0
        return made;
    });
}
