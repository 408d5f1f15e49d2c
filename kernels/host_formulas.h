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

// Works on PIECE scores at a time: their losses stay in the first-level cache, and sum() adds them. With `weights`, one
// for each row of so many `columns`, both results are multiplied by the row's; a weight of 0 makes them 0.
template <class F>
static double score_loss(const T* z, const T* y, T* dz, const T* k, T share, const T* weights, Int columns,
                         bool gradient, Int first, Int last) {
    constexpr Int PIECE = 256;
    double total = 0;
    for (Int start = first; start < last; start += PIECE) {
        const Int n = last - start < PIECE ? last - start : PIECE;
        T losses[PIECE], slopes[PIECE];
        EACH for (Int i = 0; i < n; ++i) losses[i] = F::f(z[start + i], y[start + i], k, slopes[i]);
        if (weights) {
            for (Int i = 0; i < n; ++i) {
                const T weight = weights[(start + i) / columns];
                losses[i] = weight == 0 ? T(0) : losses[i] * weight;
                slopes[i] = weight == 0 ? T(0) : slopes[i] * weight;
            }
        }
        total += sum(losses, n);
        if (gradient) {
            EACH for (Int i = 0; i < n; ++i) dz[start + i] = slopes[i] * share;
        }
    }
    return total;
}

// --- update rules ---

// Elements of a cache line, and how many further on a loop prefetches the lines of its arrays: what a processor
// prefetches by itself ends with a page of 4 KB, and all arrays change pages at once. On an Intel Xeon a step of Adam
// on ten million numbers takes 8 % less time so, and on a million, which the third-level cache holds, a third less.
constexpr Int LINE = 64 / sizeof(T), AHEAD = 2048 / sizeof(T);

// --- reductions in update rules: their terms in double precision, and how terms are combined ---

typedef double Doubles __attribute__((vector_size(REGISTER)));
typedef Int Mask __attribute__((vector_size(REGISTER)));

struct Numbers {
    static Doubles term(Doubles x) { return x; }
    static Doubles combine(Doubles x, Doubles y) { return x + y; }
};

struct Squares {
    static Doubles term(Doubles x) { return x * x; }
    static Doubles combine(Doubles x, Doubles y) { return x + y; }
};

struct Sizes {  // |x|, of which the largest counts; NaN remains
    static Doubles term(Doubles x) { return (Doubles)((Mask)x & ~(Int)(1ULL << 63)); }
    static Doubles combine(Doubles x, Doubles y) { return (x > y) | (x != x) ? x : y; }
};

constexpr Int AT_ONCE = 512;  // elements whose operands are computed before they are added

// The total over a piece of an array, in the order of gpubatch/formula/reductions.py.
template <class F>
struct Total {
    static constexpr int TERMS = 32, WIDTH = REGISTER / sizeof(double), COUNT = TERMS / WIDTH;
    Doubles lanes[COUNT] = {};

    // Go on with n elements, a multiple of TERMS but in the last call.
    void add(const T* x, Int n) {
        typedef T Narrow __attribute__((vector_size(WIDTH * sizeof(T))));
        Doubles sums[COUNT];  // a copy in registers
        for (int r = 0; r < COUNT; ++r) sums[r] = lanes[r];
        for (Int i = 0; i < n; i += TERMS) {
            T rest[TERMS] = {};  // a term of 0 changes nothing
            const T* from = x + i;
            if (i + TERMS > n) {
                for (Int j = i; j < n; ++j) rest[j - i] = x[j];
                from = rest;
            }
            for (int r = 0; r < COUNT; ++r) {
                Narrow narrow;
                __builtin_memcpy(&narrow, from + r * WIDTH, sizeof narrow);
                sums[r] = F::combine(sums[r], F::term(__builtin_convertvector(narrow, Doubles)));
            }
        }
        for (int r = 0; r < COUNT; ++r) lanes[r] = sums[r];
    }

    double sum() const {
        Doubles x[COUNT];
        for (int r = 0; r < COUNT; ++r) x[r] = lanes[r];
        for (int count = COUNT / 2; count; count /= 2)
            for (int r = 0; r < count; ++r) x[r] = F::combine(x[r], x[r + count]);
        for (int width = WIDTH / 2; width; width /= 2) {
            Doubles upper = x[0];
            for (int l = 0; l < width; ++l) upper[l] = x[0][l + width];
            x[0] = F::combine(x[0], upper);
        }
        return x[0][0];
    }
};
