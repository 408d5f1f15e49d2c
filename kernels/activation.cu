// An activation with its bias, and both gradients. `Activation`, generated from its formula, FORWARD_SCALARS and
// BACKWARD_SCALARS are defined before this text.

// y = f(x + b), and with KEEPS slope = f'(x + b); b may be null. x may be y.
extern "C" __global__ void activate(const S* x, const S* b, S* y, S* slope, long long rows, long long features,
                                    long long width) {
    const Tile tile(rows, features, width);
    const T k[] = FORWARD_SCALARS;
    if (tile.column >= features) return;
    const T bias = b ? T(b[tile.column]) : -T(0);  // x + -0 is x, also for x = -0
    tile.each([&](long long row) { return x[tile.at(row)]; },
              [&](long long row, T value) {
                  T derivative = 0;
                  y[tile.at(row)] = Activation::f(value + bias, k, derivative);
                  if (Activation::KEEPS) slope[tile.at(row)] = derivative;
              });
}

struct Pair {
    T kept, dy;
};

// dx = dy f', computed from `kept`: y or the slope. The column sums of dx over a chunk of rows go to a row of
// `partial`, or to db if there is only one chunk. dx, partial and db may be null. dx may be dy.
extern "C" __global__ void __launch_bounds__(MOST_THREADS, 1)
    activation_gradient(const S* kept, const S* dy, S* dx, T* partial, S* db, long long rows, long long features,
                        long long width) {
    const Tile tile(rows, features, width);
    const T k[] = BACKWARD_SCALARS;
    T sum = 0;
    tile.each([&](long long row) { return Pair{kept[tile.at(row)], dy[tile.at(row)]}; },
              [&](long long row, Pair of) {
                  const T d = Activation::gradient(of.dy, of.kept, k);
                  if (dx) dx[tile.at(row)] = d;
                  sum += d;
              });
    if (!partial && !db) return;
    sum = column_sum(sum, width);
    if (tile.owner && partial) partial[tile.at(blockIdx.y)] = sum;
    if (tile.owner && db) db[tile.column] = sum;
}
