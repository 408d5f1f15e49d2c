// Deterministic column sums over many rows, in two steps: kernels write a row of partial sums for each chunk of rows,
// and add_partial sums these rows to gradients (of type S) or statistics (with S = T).

// first = factor * the column sums of `partial` (parts, features); the columns from `split` on go to `second`.
extern "C" __global__ void add_partial(const T* partial, S* first, S* second, long long parts, long long features,
                                       long long width, long long split, T factor) {
    const Tile tile(parts, features, width);
    T sum = 0;
    tile.each([&](long long row) { return partial[tile.at(row)]; }, [&](long long, T value) { sum += value; });
    sum = column_sum(sum, width);
    if (tile.owner) *(tile.column < split ? first + tile.column : second + (tile.column - split)) = sum * factor;
}
