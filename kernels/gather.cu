// Samples by number, as the network stores them. Sample, the type in which they lie in their source, is defined before
// this text.

// out = scale * source[index] + shift, rows of `features` numbers. The index is in range. Where `batch` is not null,
// `index` is that of all batches, of `size` each, and *batch says which one is meant.
extern "C" __global__ void gather(const Sample* source, const long long* index, const long long* batch, S* out,
                                  long long rows, long long features, long long width, long long size, T scale,
                                  T shift) {
    const Tile tile(rows, features, width);
    if (batch) index += *batch * size;
    tile.each([&](long long row) { return source[tile.at(index[row])]; },
              [&](long long row, Sample value) {
                  const T scaled = scale == 1 ? T(value) : T(value) * scale;  // a product may flush denormals to 0
                  out[tile.at(row)] = shift == 0 ? scaled : scaled + shift;  // -0 stays -0
              });
}
