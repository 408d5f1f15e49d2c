// Batch norm: column sums, and the kernels that use them. For many rows, add_partial of columns.cu finishes the sums.

// Write factor * the column sums over a chunk of rows to a row of `partial`: of x, or given `mean`, of (x - mean)².
extern "C" __global__ void __launch_bounds__(MOST_THREADS, 1)
    moment(const S* x, const T* mean, T* partial, long long rows, long long features, long long width, T factor) {
    const Tile tile(rows, features, width);
    const T middle = mean && tile.column < features ? mean[tile.column] : T(0);
    T sum = 0;
    tile.each([&](long long row) { return x[tile.at(row)]; },
              [&](long long, T value) {
                  const T deviation = value - middle;
                  sum += mean ? deviation * deviation : value;
              });
    sum = column_sum(sum, width);
    if (tile.owner) partial[tile.at(blockIdx.y)] = sum * factor;
}

// y = gamma n + beta, n = (x - mean)/sqrt(var + eps). For the gradient, n goes to `normalised` and 1/sqrt(var + eps) to
// `inverse`; both may be null. x may be y.
extern "C" __global__ void normalise(const S* x, const T* mean, const T* var, const S* gamma, const S* beta, S* y,
                                     S* normalised, T* inverse, long long rows, long long features, long long width,
                                     T eps) {
    const Tile tile(rows, features, width);
    if (tile.column >= features) return;
    const T middle = mean[tile.column], factor = 1 / sqrt(var[tile.column] + eps);
    const T scale = gamma[tile.column], shift = beta[tile.column];
    tile.each([&](long long row) { return x[tile.at(row)]; },
              [&](long long row, T value) {
                  const T n = (value - middle) * factor;
                  if (normalised) normalised[tile.at(row)] = n;
                  y[tile.at(row)] = n * scale + shift;
              });
    if (inverse && tile.owner && blockIdx.y == 0) inverse[tile.column] = factor;
}

struct Pair {
    T normalised, dy;
};

// The column sums of dy n and of dy over a chunk of rows, one after the other in a row of `partial`, 2 * features long.
// With a single chunk `partial` is null and the sums go to dgamma and dbeta.
extern "C" __global__ void __launch_bounds__(MOST_THREADS, 1)
    gradient_sums(const S* normalised, const S* dy, T* partial, S* dgamma, S* dbeta, long long rows,
                  long long features, long long width) {
    const Tile tile(rows, features, width);
    T products = 0, plain = 0;
    tile.each([&](long long row) { return Pair{normalised[tile.at(row)], dy[tile.at(row)]}; },
              [&](long long, Pair of) {
                  products += of.dy * of.normalised;
                  plain += of.dy;
              });
    products = column_sum(products, width);
    plain = column_sum(plain, width);
    if (!tile.owner) return;
    if (partial) {
        partial[2 * blockIdx.y * features + tile.column] = products;
        partial[(2 * blockIdx.y + 1) * features + tile.column] = plain;
    } else {
        dgamma[tile.column] = products;
        dbeta[tile.column] = plain;
    }
}

// dx = gamma inverse (dy - dbeta share - n dgamma share), share = 1/rows. dx may be dy.
extern "C" __global__ void gradient(const S* normalised, const S* dy, const S* gamma, const T* inverse,
                                    const S* dgamma, const S* dbeta, S* dx, long long rows, long long features,
                                    long long width, T share) {
    const Tile tile(rows, features, width);
    if (tile.column >= features) return;
    const T factor = gamma[tile.column] * inverse[tile.column];
    const T products = dgamma[tile.column] * share, plain = dbeta[tile.column] * share;
    tile.each([&](long long row) { return Pair{normalised[tile.at(row)], dy[tile.at(row)]}; },
              [&](long long row, Pair of) { dx[tile.at(row)] = (of.dy - plain - of.normalised * products) * factor; });
}

// running = keep running + take fresh, elementwise.
extern "C" __global__ void update_running(T* running, const T* fresh, long long n, T keep, T take) {
    const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) running[i] = keep * running[i] + take * fresh[i];
}
