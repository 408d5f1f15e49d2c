// The loops of activations and score losses for one element type T; those of update rules are generated with the rule.
// No includes: a formula of the user's own is compiled from this text, too (gpubatch/ops/host_source.py).

// --- activations and biases ---

template <class F>
static void activate(const T* x, const T* b, T* y, T* kept, const T* k, Int columns, Int first, Int last) {
    if (!b) {
        EACH for (Int i = first * columns; i < last * columns; ++i) {
            T derivative = 0;
            y[i] = F::f(x[i], k, derivative);
            if (F::KEEPS) kept[i] = derivative;
        }
        return;
    }
    for (Int row = first; row < last; ++row) {
        const Int start = row * columns;
        EACH for (Int j = 0; j < columns; ++j) {
            T derivative = 0;
            y[start + j] = F::f(x[start + j] + b[j], k, derivative);
            if (F::KEEPS) kept[start + j] = derivative;
        }
    }
}

template <class F>
static void activation_gradient(const T* kept, const T* dy, T* dx, T* sums, const T* k, Int columns, Int first,
                                Int last) {
    if (!sums) {
        EACH for (Int i = first * columns; i < last * columns; ++i) dx[i] = F::gradient(dy[i], kept[i], k);
        return;
    }
    for (Int j = 0; j < columns; ++j) sums[j] = 0;
    for (Int row = first; row < last; ++row) {
        const Int start = row * columns;
        EACH for (Int j = 0; j < columns; ++j) {
            const T d = F::gradient(dy[start + j], kept[start + j], k);
            dx[start + j] = d;
            sums[j] += d;
        }
    }
}

// --- score losses ---

// A sum or maximum over a row has LANES partial results, the lanes of a few SIMD registers. So the order of additions
// does not depend on the width of a register.
constexpr int LANES = 16;
typedef T Register __attribute__((vector_size(REGISTER)));
constexpr int WIDE = REGISTER / sizeof(T), REGISTERS = LANES / WIDE;

static inline Register load(const T* x) {
    Register found;
    __builtin_memcpy(&found, x, sizeof found);
    return found;
}

static inline T sum(const T* x, Int n) {
    Register lanes[REGISTERS] = {};
    Int i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int r = 0; r < REGISTERS; ++r) lanes[r] += load(x + i + r * WIDE);
    T total = 0;
    if (i)
        for (int l = 0; l < LANES; ++l) total += lanes[l / WIDE][l % WIDE];
    for (; i < n; ++i) total += x[i];
    return total;
}

// Works on PIECE scores at a time: their losses stay in the first-level cache, and sum() adds them.
template <class F>
static double score_loss(const T* z, const T* y, T* dz, const T* k, T share, bool gradient, Int first, Int last) {
    constexpr Int PIECE = 256;
    double total = 0;
    for (Int start = first; start < last; start += PIECE) {
        const Int n = last - start < PIECE ? last - start : PIECE;
        T losses[PIECE], slopes[PIECE];
        EACH for (Int i = 0; i < n; ++i) losses[i] = F::f(z[start + i], y[start + i], k, slopes[i]);
        total += sum(losses, n);
        if (gradient) {
            EACH for (Int i = 0; i < n; ++i) dz[start + i] = slopes[i] * share;
        }
    }
    return total;
}
