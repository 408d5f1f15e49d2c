// Losses over rows of scores: the loss of every row and the gradient by its scores in one launch; then the mean.
//
// A row belongs to a warp or to a block. `share` is one over the number of rows. A label that is no class makes NaN of
// its row's loss and gradient: nothing out of bounds is touched. Without a gradient, dz is null. `scale` points to what
// the gradient is multiplied by before it is stored, since float16 has no small numbers; null is 1.

constexpr T LOWEST = T(sizeof(T) == 4 ? -3.4028234663852886e38 : -1.7976931348623157e308);

struct Pair {
    T z, y;
};

// Σ_j y_j (log Σ_i exp(z_i) - z_j), by labels or by target rows y; the other of the two is null.
extern "C" __global__ void softmax_cross_entropy(const S* z, const long long* labels, const T* targets, S* dz,
                                                 T* losses, const T* scale, long long rows, long long classes,
                                                 long long size, T share) {
    const Team team(size);
    const T unit = share * value_at(scale, 1);
    for (long long row = team.first; row < rows; row += team.step) {
        const long long start = row * classes, label = labels ? labels[row] : 0;
        const auto score_and_target = [&](long long j) {
            return Pair{z[start + j], targets ? targets[start + j] : T(j == label)};
        };

        // Largest score and sum of exponentials in one pass: the sum is scaled down when a larger score is met.
        T top = LOWEST, sum = 0, weight = 0;
        team.each(classes, score_and_target, [&](long long, Pair of) {
            if (of.z > top) {
                sum *= exp(top - of.z);
                top = of.z;
            }
            sum += exp(of.z - top);  // NaN where z is infinite, as it should be
            weight += of.y;
        });
        const T most = combine<Largest>(top, team.size);
        sum = combine<Sum>(sum * exp(top - most), team.size);
        weight = combine<Sum>(weight, team.size);
        if (!targets && weight == 0) weight = T(nan(""));  // no class has that label

        T own = 0;  // Σ_j y_j (z_j - most), without those that are 0 times infinity for want of being the label
        const T factor = weight * unit / sum;
        team.each(classes, score_and_target, [&](long long j, Pair of) {
            if (targets || of.y) own += of.y * (of.z - most);
            if (dz) dz[start + j] = exp(of.z - most) * factor - of.y * unit;
        });
        own = combine<Sum>(own, team.size);
        if (team.lane == 0) losses[row] = log(sum) * weight - own;
    }
}

// Σ_{j≠y} max(0, z_j - z_y + 1); the gradient is 1 for each j whose margin is violated, and for y minus their number.
extern "C" __global__ void svm(const S* z, const long long* labels, S* dz, T* losses, const T* scale, long long rows,
                               long long classes, long long size, T share) {
    const Team team(size);
    const T unit = share * value_at(scale, 1);
    for (long long row = team.first; row < rows; row += team.step) {
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
            losses[row] = sum;
            if (dz && known) dz[start + label] = -violated * unit;
        }
    }
}

// One block: out = the mean of n numbers.
extern "C" __global__ void mean(const T* x, T* out, long long n) {
    double sum = 0;
    for (long long i = threadIdx.x; i < n; i += blockDim.x) sum += x[i];
    sum = combine<Sum>(sum, blockDim.x);
    if (threadIdx.x == 0) *out = T(sum / n);
}
