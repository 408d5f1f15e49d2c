// Samples by number, as the network stores them. Sample, the type in which they lie in their source, and Target are
// defined before this text.

// out = scale * source[index] + shift, rows of `features` numbers. The index is in range. Where `batch` is not null,
// `index` is that of all batches, of `size` each, and *batch says which one is meant.
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
