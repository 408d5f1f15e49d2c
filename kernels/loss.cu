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

struct LargestOrNaN {
    __device__ static T of(T x, T y) { return larger_of(x, y); }
};

struct Smallest {
    __device__ static long long of(long long x, long long y) { return x < y ? x : y; }
};

// Whether the row has the weight 0: its gradient is then written as 0, and there is nothing else to do for it.
__device__ inline bool left_out(const T* weights, long long row, S* dz, long long columns, const Team& team) {
    if (!weights || weights[row] != 0) return false;
    if (dz)
        for (long long j = team.lane; j < columns; j += team.size) dz[row * columns + j] = T(0);
    return true;
}

// The largest score of a row and the sum of exp(score - largest), in one pass: each larger score rescales the sum.
// load(column) is a Pair; also(column, pair) sees each.
template <class Load, class Also>
__device__ inline void exponentials(long long columns, const Team& team, T& most, T& sum, Load load, Also also) {
    T top = LOWEST, mine = 0;
    team.each(columns, load, [&](long long j, Pair of) {
        if (of.z > top) {
            mine *= exp(top - of.z);
            top = of.z;
        }
        mine += exp(of.z - top);  // NaN where z is infinite, as it should be
        also(j, of);
    });
    most = combine<Largest>(top, team.size);
    sum = combine<Sum>(mine * exp(top - most), team.size);
}

// The mean of the rows' losses. loss_of(row, unit), which a row's team calls, returns the loss before its weight, and
// writes the gradient times `unit`, which has the weight.
template <class LossOf>
__device__ inline void mean_over_rows(const Team& team, const T* weights, S* dz, const T* scale, long long rows,
                                      long long classes, T share, double* parts, unsigned* ticket, T* loss,
                                      LossOf loss_of) {
    double total = 0;
    const T scaled = share * value_at(scale, 1);
    for (long long row = team.first; row < rows; row += team.step) {
        if (left_out(weights, row, dz, classes, team)) continue;
        const T lost = loss_of(row, weights ? scaled * weights[row] : scaled);
        if (team.lane == 0) total += weights ? lost * weights[row] : lost;
    }
    if (grid_sum(total, parts, ticket)) *loss = T(total / rows);
}

// Σ_j y_j (log Σ_i exp(z_i) - z_j), with y from labels or target rows; the other of the two is null. Of each y only
// `kept` y + `spread` counts. With `relative` Σ_j y_j log y_j is added.
extern "C" __global__ void __launch_bounds__(SUM_THREADS, 1)
    softmax_cross_entropy(const S* z, const long long* labels, const T* targets, const T* weights, T kept, T spread,
                          long long relative, S* dz, const T* scale, long long rows, long long classes, long long size,
                          T share, double* parts, unsigned* ticket, T* loss) {
    const Team team(size);
    mean_over_rows(team, weights, dz, scale, rows, classes, share, parts, ticket, loss, [&](long long row, T unit) {
        const long long start = row * classes, label = labels ? labels[row] : 0;
        const auto score_and_target = [&](long long j) {
            return Pair{z[start + j], (targets ? targets[start + j] : T(j == label)) * kept + spread};
        };

        T most, sum, mass = 0;
        exponentials(classes, team, most, sum, score_and_target, [&](long long, Pair of) { mass += of.y; });
        if (targets) mass = combine<Sum>(mass, team.size);
        else mass = 0 <= label && label < classes ? T(1) : T(nan(""));

        // Σ_j y_j (z_j - most), without terms of y_j = 0 that are no targets: they could be 0 times infinity.
        T own = 0;
        const T factor = mass * unit / sum, whole = log(sum);
        team.each(classes, score_and_target, [&](long long j, Pair of) {
            if (relative) own += of.y == 0 ? T(0) : of.y * (of.z - most - whole - log(of.y));
            else if (targets || of.y) own += of.y * (of.z - most);
            if (dz) dz[start + j] = exp(of.z - most) * factor - of.y * unit;
        });
        own = combine<Sum>(own, team.size);
        return relative ? -own : whole * mass - own;
    });
}

// -alpha (1 - p)^gamma log p, where p is the softmax of the label's score; null `alpha` counts as 1 for each label.
extern "C" __global__ void __launch_bounds__(SUM_THREADS, 1)
    softmax_focal(const S* z, const long long* labels, const T* weights, T gamma, const T* alpha, S* dz,
                  const T* scale, long long rows, long long classes, long long size, T share, double* parts,
                  unsigned* ticket, T* loss) {
    const Team team(size);
    mean_over_rows(team, weights, dz, scale, rows, classes, share, parts, ticket, loss, [&](long long row, T unit) {
        const long long start = row * classes, label = labels[row];
        const bool known = 0 <= label && label < classes;
        const auto score = [&](long long j) { return Pair{z[start + j], T(j == label)}; };

        T most, sum, others = 0;
        exponentials(classes, team, most, sum, score, [](long long, Pair) {});
        team.each(classes, score, [&](long long, Pair of) {
            if (of.y == 0) others += exp(of.z - most);
        });
        others = combine<Sum>(others, team.size);
        const T lost = known ? log(sum) - (T(z[start + label]) - most) : T(nan(""));
        const T miss = others / sum, power = pow(miss, gamma) * (known && alpha ? alpha[label] : T(1));
        // d/dz_j = power (1 + gamma p (-log p) / (1 - p)) (p_j - y_j), and (-log p) / (1 - p) is 1 at p = 1.
        const T factor = power * (1 + gamma * (1 - miss) * (miss == 0 ? T(1) : lost / miss)) * unit;
        if (dz)
            team.each(classes, score, [&](long long j, Pair of) {
                dz[start + j] = (of.y ? -miss : exp(of.z - most) / sum) * factor;
            });
        return power * lost;
    });
}

// Σ_{j≠y} max(0, z_j - z_y + delta); dz_j is 1 for each violated margin j, and dz_y is minus their number.
extern "C" __global__ void __launch_bounds__(SUM_THREADS, 1)
    svm(const S* z, const long long* labels, const T* weights, T delta, S* dz, const T* scale, long long rows,
        long long classes, long long size, T share, double* parts, unsigned* ticket, T* loss) {
    const Team team(size);
    mean_over_rows(team, weights, dz, scale, rows, classes, share, parts, ticket, loss, [&](long long row, T unit) {
        const long long start = row * classes, label = labels[row];
        const bool known = 0 <= label && label < classes;
        const T own = known ? T(z[start + label]) : T(nan(""));
        T sum = 0, violated = 0;
        team.each(classes, [&](long long j) { return z[start + j]; },
                  [&](long long j, T score) {
                      if (j == label) return;
                      const T margin = larger_of(score - own + delta, T(0));
                      sum += margin;
                      violated += sign_of(margin);
                      if (dz) dz[start + j] = sign_of(margin) * unit;
                  });
        sum = combine<Sum>(sum, team.size);
        violated = combine<Sum>(violated, team.size);
        if (team.lane == 0 && dz && known) dz[start + label] = -violated * unit;
        return sum;
    });
}

// max(0, max_{j≠y} z_j - z_y + delta); where it is above 0, dz is 1 for the first j of the largest score, and dz_y -1.
extern "C" __global__ void __launch_bounds__(SUM_THREADS, 1)
    crammer_singer(const S* z, const long long* labels, const T* weights, T delta, S* dz, const T* scale,
                   long long rows, long long classes, long long size, T share, double* parts, unsigned* ticket,
                   T* loss) {
    const Team team(size);
    mean_over_rows(team, weights, dz, scale, rows, classes, share, parts, ticket, loss, [&](long long row, T unit) {
        const long long start = row * classes, label = labels[row];
        const bool known = 0 <= label && label < classes;
        const T own = known ? T(z[start + label]) : T(nan(""));
        const auto margin = [&](long long j) { return j == label ? LOWEST : z[start + j] - own + delta; };
        T most = LOWEST;
        team.each(classes, margin, [&](long long, T found) { most = larger_of(most, found); });
        most = combine<LargestOrNaN>(most, team.size);
        long long place = classes;
        team.each(classes, margin, [&](long long j, T found) {
            if ((found == most || found != found) && j < place) place = j;
        });
        place = combine<Smallest>(place, team.size);
        const T lost = larger_of(most, T(0)), slope = sign_of(lost) * unit;
        if (dz)
            for (long long j = team.lane; j < classes; j += team.size)
                dz[start + j] = !known || j == place ? slope : j == label ? -slope : T(0);
        return lost;
    });
}
