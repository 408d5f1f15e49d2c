// The loops of host_kernels.cpp for one element type T, in a namespace of its own.

#include "host_math.h"
#include "math.cuh"
#include "host_formulas.h"
#include ELEMENTWISE
#include "formulas.h"

// --- sums over the rows ---

static void column_sums(const T* x, T* sums, Int columns, Int first, Int last) {
    for (Int j = 0; j < columns; ++j) sums[j] = 0;
    for (Int row = first; row < last; ++row) {
        EACH for (Int j = 0; j < columns; ++j) sums[j] += x[row * columns + j];
    }
}

static void add_parts(const T* sums, T factor, T* out, Int parts, Int columns) {
    for (Int j = 0; j < columns; ++j) out[j] = 0;
    for (Int part = 0; part < parts; ++part) {
        EACH for (Int j = 0; j < columns; ++j) out[j] += sums[part * columns + j];
    }
    EACH for (Int j = 0; j < columns; ++j) out[j] *= factor;
}

// --- losses ---

static inline T largest(const T* x, Int n) {
    T most = x[0];
    Int i = 0;
    if (n >= LANES) {
        Register lanes[REGISTERS];
        for (int r = 0; r < REGISTERS; ++r) lanes[r] = load(x + r * WIDE);
        for (i = LANES; i + LANES <= n; i += LANES)
            for (int r = 0; r < REGISTERS; ++r) {
                const Register other = load(x + i + r * WIDE);
                lanes[r] = (other > lanes[r]) | (other != other) ? other : lanes[r];
            }
        for (int l = 0; l < LANES; ++l) most = larger_of(lanes[l / WIDE][l % WIDE], most);
    }
    for (; i < n; ++i) most = larger_of(x[i], most);
    return most;
}

// The same of numbers, without a branch for each: a NaN counts or does not.
static inline T largest_number(const T* x, Int n) {
    T most = x[0];
    Int i = 0;
    if (n >= LANES) {
        Register lanes[REGISTERS];
        for (int r = 0; r < REGISTERS; ++r) lanes[r] = load(x + r * WIDE);
        for (i = LANES; i + LANES <= n; i += LANES)
            for (int r = 0; r < REGISTERS; ++r) {
                const Register other = load(x + i + r * WIDE);
                lanes[r] = other > lanes[r] ? other : lanes[r];
            }
        for (int l = 0; l < LANES; ++l) {
            const T other = lanes[l / WIDE][l % WIDE];
            most = other > most ? other : most;
        }
    }
    for (; i < n; ++i) most = x[i] > most ? x[i] : most;
    return most;
}

static inline T dot(const T* x, const T* y, Int n) {
    Register lanes[REGISTERS] = {};
    Int i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int r = 0; r < REGISTERS; ++r) lanes[r] += load(x + i + r * WIDE) * load(y + i + r * WIDE);
    T total = 0;
    if (i)
        for (int l = 0; l < LANES; ++l) total += lanes[l / WIDE][l % WIDE];
    for (; i < n; ++i) total += x[i] * y[i];
    return total;
}

// Whether the row has the weight 0: its results are then written as 0, and there is nothing else to do for it.
static inline bool left_out(const T* weights, Int row, T* d, T* losses, Int columns) {
    if (!weights || weights[row] != 0) return false;
    EACH for (Int j = 0; j < columns; ++j) d[j] = 0;
    losses[row] = 0;
    return true;
}

// Whether the label is out of range: the row's results are then written as NaN.
static inline bool unknown(Int label, Int row, T* d, T* losses, Int columns) {
    if (label >= 0 && label < columns) return false;
    for (Int j = 0; j < columns; ++j) d[j] = T(__builtin_nan(""));
    losses[row] = d[0];
    return true;
}

static void softmax(const T* z, const Int* labels, const T* targets, const T* weights, T kept, T spread, bool relative,
                    T* dz, T* losses, T scale, bool gradient, Int columns, Int first, Int last) {
    // Works on as many rows at a time as fit into the first-level cache: one loop of exp covers them all, even short
    // rows, and one of log.
    constexpr Int MOST = 128;
    const Int step = columns * MOST <= 2048 ? MOST : columns < 2048 ? 2048 / columns : 1;
    T sums[MOST], logs[MOST];
    for (Int start = first; start < last; start += step) {
        const Int stop = start + step < last ? start + step : last;
        for (Int row = start; row < stop; ++row) {
            const T *x = z + row * columns, *y = targets + row * columns;
            T* d = dz + row * columns;
            T entropy = 0;
            if (relative) {
                EACH for (Int j = 0; j < columns; ++j) {
                    const T number = kept * y[j] + spread;
                    d[j] = select(number == 0, T(0), number * log(number));
                }
                entropy = sum(d, columns);
            }
            // The largest exponential is 1, so the logarithm is finite; where there is a NaN, the sum is one anyway.
            const T most = largest_number(x, columns);
            EACH for (Int j = 0; j < columns; ++j) d[j] = x[j] - most;
            if (targets)
                losses[row] = dot(d, y, columns);
            else
                losses[row] = labels[row] >= 0 && labels[row] < columns ? d[labels[row]] : T(__builtin_nan(""));
            if (spread != 0) losses[row] = kept * losses[row] + spread * sum(d, columns);
            if (relative) losses[row] -= entropy;
        }
        EACH for (Int i = start * columns; i < stop * columns; ++i) dz[i] = exp(dz[i]);
        for (Int row = start; row < stop; ++row) sums[row - start] = sum(dz + row * columns, columns);
        EACH for (Int i = 0; i < stop - start; ++i) logs[i] = log(sums[i]);
        for (Int row = start; row < stop; ++row) {
            T* d = dz + row * columns;
            const T* y = targets + row * columns;
            if (left_out(weights, row, d, losses, columns)) continue;
            const T mass = targets ? kept * sum(y, columns) + spread * columns : T(1);
            losses[row] = logs[row - start] * mass - losses[row];
            if (weights) losses[row] *= weights[row];
            if (!gradient) continue;
            const T share = weights ? scale * weights[row] : scale;
            const bool number = losses[row] == losses[row];  // if NaN, the label may be out of range
            const T factor = number ? share / sums[row - start] * mass : losses[row];
            if (targets) {
                EACH for (Int j = 0; j < columns; ++j) d[j] = d[j] * factor - share * (kept * y[j] + spread);
            } else {
                EACH for (Int j = 0; j < columns; ++j) d[j] = d[j] * factor - share * spread;
                if (number) d[labels[row]] -= share * kept;
            }
        }
    }
}

static void focal(const T* z, const Int* labels, const T* weights, T gamma, const T* alpha, T* dz, T* losses, T scale,
                  bool gradient, Int columns, Int first, Int last) {
    for (Int row = first; row < last; ++row) {
        const T* x = z + row * columns;
        T* d = dz + row * columns;
        const Int label = labels[row];
        if (left_out(weights, row, d, losses, columns) || unknown(label, row, d, losses, columns)) continue;
        const T most = largest(x, columns);
        EACH for (Int j = 0; j < columns; ++j) d[j] = exp(x[j] - most);
        const T exponentials = sum(d, columns);
        d[label] = 0;
        const T miss = sum(d, columns) / exponentials;  // 1 - p, without cancellation
        const T lost = log(exponentials) - (x[label] - most);
        const T power = pow(miss, gamma) * (alpha ? alpha[label] : T(1)), weight = weights ? weights[row] : T(1);
        losses[row] = power * lost * weight;
        if (!gradient) continue;
        // d/dz_j = power (1 + gamma p (-log p) / (1 - p)) (p_j - y_j), and (-log p) / (1 - p) is 1 at p = 1.
        const T factor = power * (1 + gamma * (1 - miss) * (miss == 0 ? T(1) : lost / miss)) * (scale * weight);
        const T each = factor / exponentials;
        EACH for (Int j = 0; j < columns; ++j) d[j] *= each;
        d[label] = -miss * factor;
    }
}

static void svm(const T* z, const Int* labels, const T* weights, T delta, T* dz, T* losses, T scale, bool gradient,
                Int columns, Int first, Int last) {
    for (Int row = first; row < last; ++row) {
        const T* x = z + row * columns;
        T* d = dz + row * columns;
        const Int label = labels[row];
        if (left_out(weights, row, d, losses, columns) || unknown(label, row, d, losses, columns)) continue;
        const T own = x[label];
        EACH for (Int j = 0; j < columns; ++j) d[j] = larger_of(x[j] - own + delta, T(0));
        d[label] = 0;
        losses[row] = sum(d, columns);
        if (weights) losses[row] *= weights[row];
        if (!gradient) continue;
        EACH for (Int j = 0; j < columns; ++j) d[j] = sign_of(d[j]);  // 1 for a violated margin, else 0
        const T violated = sum(d, columns), share = weights ? scale * weights[row] : scale;
        EACH for (Int j = 0; j < columns; ++j) d[j] *= share;
        d[label] = -violated * share;
    }
}

static void crammer_singer(const T* z, const Int* labels, const T* weights, T delta, T* dz, T* losses, T scale,
                           bool gradient, Int columns, Int first, Int last) {
    for (Int row = first; row < last; ++row) {
        const T* x = z + row * columns;
        T* d = dz + row * columns;
        const Int label = labels[row];
        if (left_out(weights, row, d, losses, columns) || unknown(label, row, d, losses, columns)) continue;
        const T own = x[label];
        EACH for (Int j = 0; j < columns; ++j) d[j] = x[j] - own + delta;
        d[label] = -T(__builtin_inf());
        const T most = largest(d, columns);
        losses[row] = larger_of(most, T(0));
        if (gradient) {
            Int place = 0;
            while (place < columns && d[place] != most && d[place] == d[place]) ++place;
            const T slope = sign_of(losses[row]) * (weights ? scale * weights[row] : scale);
            EACH for (Int j = 0; j < columns; ++j) d[j] = 0;
            d[label] = -slope;
            if (place != label) d[place] = slope;
        }
        if (weights) losses[row] *= weights[row];
    }
}

// --- batch norm ---

static void normalise(const T* x, const T* mean, const T* inverse, const T* gamma, const T* beta, T* y, Int columns,
                      Int first, Int last) {
    for (Int row = first; row < last; ++row) {
        const Int start = row * columns;
        EACH for (Int j = 0; j < columns; ++j)
            y[start + j] = (x[start + j] - mean[j]) * inverse[j] * gamma[j] + beta[j];
    }
}

static void deviations(const T* x, const T* mean, T* normalised, T* sums, Int columns, Int first, Int last) {
    for (Int j = 0; j < columns; ++j) sums[j] = 0;
    for (Int row = first; row < last; ++row) {
        const Int start = row * columns;
        EACH for (Int j = 0; j < columns; ++j) {
            const T deviation = x[start + j] - mean[j];
            normalised[start + j] = deviation;
            sums[j] += deviation * deviation;
        }
    }
}

static void scale_and_shift(T* normalised, const T* inverse, const T* gamma, const T* beta, T* y, Int columns,
                            Int first, Int last) {
    for (Int row = first; row < last; ++row) {
        const Int start = row * columns;
        EACH for (Int j = 0; j < columns; ++j) {
            const T n = normalised[start + j] * inverse[j];
            normalised[start + j] = n;
            y[start + j] = n * gamma[j] + beta[j];
        }
    }
}

static void batch_norm_sums(const T* normalised, const T* dy, T* sums, T* products, Int columns, Int first, Int last) {
    for (Int j = 0; j < columns; ++j) sums[j] = products[j] = 0;
    for (Int row = first; row < last; ++row) {
        const Int start = row * columns;
        EACH for (Int j = 0; j < columns; ++j) {
            sums[j] += dy[start + j];
            products[j] += dy[start + j] * normalised[start + j];
        }
    }
}

static void batch_norm_gradient(const T* normalised, const T* dy, const T* factor, const T* mean_dy,
                                const T* mean_product, T* dx, Int columns, Int first, Int last) {
    for (Int row = first; row < last; ++row) {
        const Int start = row * columns;
        EACH for (Int j = 0; j < columns; ++j)
            dx[start + j] = (dy[start + j] - mean_dy[j] - normalised[start + j] * mean_product[j]) * factor[j];
    }
}

// --- dropout ---

static void dropout(const T* x, T* y, T* mask, Word seed, Word layer, Word step, Word number, float rate, T scale,
                    Int n, Int first, Int last) {
    for (Int block = first; block < last; ++block) {
        float uniform[8];
        uniform_block(number / 8 + (Word)block, seed, layer, step, uniform);
        const Int start = 8 * block - (Int)(number % 8), begin = start < 0 ? -start : 0;
        const Int end = n - start < 8 ? n - start : 8;
        EACH for (Int j = begin; j < end; ++j) {
            const T kept = uniform[j] >= rate ? scale : T(0);
            mask[start + j] = kept;
            y[start + j] = x[start + j] * kept;
        }
    }
}

// --- samples ---

// Prefetch a row into the second-level cache.
static inline void prefetch(const char* row, Int bytes) {
    for (Int byte = 0; byte < bytes && byte < 4096; byte += 64) __builtin_prefetch(row + byte, 0, 1);
}

template <class S>
static void gather(const void* source, const Int* index, T* out, T scale, T shift, Int columns, Int first, Int last) {
    // The processor prefetches only sequential addresses, but rows are in random order: prefetch some rows ahead.
    // 60,000 rows of 784 bytes take 6 ms instead of 23; 11 ms with prefetching into the first-level cache.
    const Int bytes = columns * (Int)sizeof(S), ahead = bytes < 8192 ? 8192 / (bytes > 256 ? bytes : 256) : 1;
    const char* rows = (const char*)source;
    for (Int row = first; row < last && row < first + ahead; ++row) prefetch(rows + index[row] * bytes, bytes);
    for (Int row = first; row < last; ++row) {
        const S* from = (const S*)source + index[row] * columns;
        if (row + ahead < last) prefetch(rows + index[row + ahead] * bytes, bytes);
        T* to = out + row * columns;
        if (shift == 0) {
            EACH for (Int j = 0; j < columns; ++j) to[j] = (T)from[j] * scale;
        } else {
            EACH for (Int j = 0; j < columns; ++j) to[j] = (T)from[j] * scale + shift;
        }
    }
}

static void l2_gradient(const T* w, T factor, T* g, Int first, Int last) {
    EACH for (Int i = first; i < last; ++i) g[i] += factor * w[i];
}

static void square_sum(const T* x, double* sum, double* not_finite, Int first, Int last) {
    constexpr int WIDTH = REGISTER / sizeof(double), COUNT = LANES / WIDTH;
    typedef T Narrow __attribute__((vector_size(WIDTH * sizeof(T))));
    typedef double Double __attribute__((vector_size(REGISTER)));
    typedef Int Mask __attribute__((vector_size(REGISTER)));
    Double squares[COUNT] = {};
    Mask odd[COUNT] = {};  // minus the number of elements that are not finite
    Int i = first;
    for (; i + LANES <= last; i += LANES)
        for (int r = 0; r < COUNT; ++r) {
            Narrow narrow;
            __builtin_memcpy(&narrow, x + i + r * WIDTH, sizeof narrow);
            const Double wide = __builtin_convertvector(narrow, Double);
            squares[r] += wide * wide;
            odd[r] += wide - wide != 0;
        }
    double total = 0;
    Int count = 0;
    for (int l = 0; l < LANES; ++l) total += squares[l / WIDTH][l % WIDTH], count -= odd[l / WIDTH][l % WIDTH];
    for (; i < last; ++i) total += (double)x[i] * (double)x[i], count += x[i] - x[i] != 0;
    *sum = total;
    *not_finite = (double)count;
}

#define ENTRY(digest) {#digest, activate<activation_##digest>, activation_gradient<activation_##digest>},
static constexpr Activation<T> activations[] = {EVERY_ACTIVATION(ENTRY)};
#undef ENTRY
#define ENTRY(digest) {#digest, score_loss<score_##digest>},
static constexpr ScoreLoss<T> score_losses[] = {EVERY_SCORE(ENTRY)};
#undef ENTRY
#undef EVERY_ACTIVATION
#undef EVERY_SCORE

static constexpr Table<T> table = {
    formulas,
    sizeof(formulas) / sizeof(formulas[0]),
    activations,
    sizeof(activations) / sizeof(activations[0]),
    score_losses,
    sizeof(score_losses) / sizeof(score_losses[0]),
    column_sums,
    add_parts,
    softmax,
    focal,
    svm,
    crammer_singer,
    normalise,
    deviations,
    scale_and_shift,
    batch_norm_sums,
    batch_norm_gradient,
    dropout,
    {gather<unsigned char>, gather<signed char>, gather<unsigned short>, gather<short>, gather<unsigned int>,
     gather<int>, gather<unsigned long long>, gather<long long>, gather<Half>, gather<float>, gather<double>},
    l2_gradient,
    square_sum,
};
