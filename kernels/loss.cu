// Losses over rows of scores: the mean loss and the gradient with respect to the scores, in one launch.
//
// A warp or a block processes a row. `share` is 1 / rows. A label out of range gives its row a NaN loss and gradient,
// without any access out of bounds. dz is null if no gradient is wanted. The gradient is multiplied by *scale before it
// is stored, because small numbers underflow in float16; a null `scale` counts as 1. A row's loss and gradient are
// multiplied by its weight; a weight of 0 makes them 0 whatever the row holds, and with null `weights` each is 1.

constexpr T LOWEST = T(sizeof(T) == 4 ? -3.4028234663852886e38 : -1.7976931348623157e308);

struct Pair {
    T z, y;
};

// Whether the row has the weight 0: its gradient is then written as 0, and there is nothing else to do for it.
__device__ inline bool left_out(const T* weights, long long row, S* dz, long long columns, const Team& team) {
    if (!weights || weights[row] != 0) return false;
    if (dz)
        for (long long j = team.lane; j < columns; j += team.size) dz[row * columns + j] = T(0);
    return true;
}

// Σ_j y_j (log Σ_i exp(z_i) - z_j), with y from labels or target rows; the other of the two is null.
extern "C" __global__ void __launch_bounds__(SUM_THREADS, 1)
    softmax_cross_entropy(const S* z, const long long* labels, const T* targets, const T* weights, S* dz,
                          const T* scale, long long rows, long long classes, long long size, T share, double* parts,
                          unsigned* ticket, T* loss) {
    const Team team(size);
    double total = 0;
    const T scaled = share * value_at(scale, 1);
    for (long long row = team.first; row < rows; row += team.step) {
        if (left_out(weights, row, dz, classes, team)) continue;
        const T unit = weights ? scaled * weights[row] : scaled;
        const long long start = row * classes, label = labels ? labels[row] : 0;
        const auto score_and_target = [&](long long j) {
            return Pair{z[start + j], targets ? targets[start + j] : T(j == label)};
        };

        // Largest score and sum of exponentials in one pass: each larger score rescales the sum.
        T top = LOWEST, sum = 0, mass = 0;
        team.each(classes, score_and_target, [&](long long, Pair of) {
            if (of.z > top) {
                sum *= exp(top - of.z);
                top = of.z;
            }
            sum += exp(of.z - top);  // NaN where z is infinite, as it should be
            mass += of.y;
        });
        const T most = combine<Largest>(top, team.size);
        sum = combine<Sum>(sum * exp(top - most), team.size);
        mass = combine<Sum>(mass, team.size);
        if (!targets && mass == 0) mass = T(nan(""));  // the label is out of range

        T own = 0;  // Σ_j y_j (z_j - most); skips terms of other classes, which could be 0 times infinity
        const T factor = mass * unit / sum;
        team.each(classes, score_and_target, [&](long long j, Pair of) {
            if (targets || of.y) own += of.y * (of.z - most);
            if (dz) dz[start + j] = exp(of.z - most) * factor - of.y * unit;
        });
        own = combine<Sum>(own, team.size);
        if (team.lane == 0) {
            const T lost = log(sum) * mass - own;
            total += weights ? lost * weights[row] : lost;
        }
    }
    if (grid_sum(total, parts, ticket)) *loss = T(total / rows);
}

// Σ_{j≠y} max(0, z_j - z_y + 1); dz_j is 1 for each violated margin j, and dz_y is minus their number.
extern "C" __global__ void __launch_bounds__(SUM_THREADS, 1)
    svm(const S* z, const long long* labels, const T* weights, S* dz, const T* scale, long long rows,
        long long classes, long long size, T share, double* parts, unsigned* ticket, T* loss) {
    const Team team(size);
    double total = 0;
    const T scaled = share * value_at(scale, 1);
    for (long long row = team.first; row < rows; row += team.step) {
        if (left_out(weights, row, dz, classes, team)) continue;
        const T unit = weights ? scaled * weights[row] : scaled;
        const long long start = row * classes, label = labels[row];
        const bool known = 0 <= label && label < classes;
        const T own = known ? T(z[start + label]) : T(nan(""));
        T sum = 0, violated = 0;
        team.each(classes, [&](long long j) { return z[start + j]; },
                  [&](long long j, T score) {
                      if (j == label) return;
                      const T margin = larger_of(score - own + 1, T(0));
                      sum += margin;
                      violated += sign_of(margin);
                      if (dz) dz[start + j] = sign_of(margin) * unit;
                  });
        sum = combine<Sum>(sum, team.size);
        violated = combine<Sum>(violated, team.size);
        if (team.lane == 0) {
            total += weights ? sum * weights[row] : sum;
            if (dz && known) dz[start + label] = -violated * unit;
        }
    }
    if (grid_sum(total, parts, ticket)) *loss = T(total / rows);
}
