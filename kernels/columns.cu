// Sums of columns of many rows in two steps, so that they always have the same bits: kernels write a row of partial
// sums for each chunk of rows, and this adds them up: to gradients, which are of S, or to statistics, for which S is T.

// first = factor * the sums of the columns of `partial`, (parts, features); those from column `split` on go to second.
extern "C" __global__ void add_partial(const T* partial, S* first, S* second, long long parts, long long features,
                                       long long width, long long split, T factor) {
    const Tile tile(parts, features, width);
    T sum = 0;
    tile.each([&](long long row) { return partial[tile.at(row)]; }, [&](long long, T value) { sum += value; });
    sum = column_sum(sum, width);
    if (tile.owner) *(tile.column < split ? first + tile.column : second + (tile.column - split)) = sum * factor;
}
