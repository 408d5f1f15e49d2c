// What host.cpp and the kernels of every SIMD width agree on. A kernel works on rows or elements from `first` to `last`.
#pragma once

typedef long long Int;
typedef unsigned long long Word;

// One update rule as it was recorded, named by the digest of its text; see generate_host.py. `table` has a row for
// each piece: the address of the piece of every array, then how many elements it has.
template <class T>
struct Formula {
    const char* name;
    void (*run)(const Int* table, const T* scalars, Int first, Int last);
};

// An activation, named likewise. `k` are the scalars of the formula.
template <class T>
struct Activation {
    const char* name;
    // y = f(x + b); b may be null. `kept` takes the derivative where y does not tell it.
    void (*forward)(const T* x, const T* b, T* y, T* kept, const T* k, Int columns, Int first, Int last);
    // dx = dy f'; `kept` is y, or what forward kept. With `sums`, of `columns`, these become the sums of dx over the
    // rows.
    void (*backward)(const T* kept, const T* dy, T* dx, T* sums, const T* k, Int columns, Int first, Int last);
};

// A loss of single scores, named likewise: the sum of the losses, and with `gradient` their derivatives times `share`
// to dz.
template <class T>
struct ScoreLoss {
    const char* name;
    double (*run)(const T* z, const T* y, T* dz, const T* k, T share, bool gradient, Int first, Int last);
};

// The element types that samples are stored in: bool and uint8, int8, uint16, int16, uint32, int32, uint64, int64,
// float16, float32, float64.
constexpr int STORED = 11;

template <class T>
struct Table {
    const Formula<T>* formulas;
    Int formula_count;

    const Activation<T>* activations;
    Int activation_count;
    const ScoreLoss<T>* score_losses;
    Int score_loss_count;

    // Sums over the rows.
    void (*column_sums)(const T* x, T* sums, Int columns, Int first, Int last);
    // out = factor times the sum of `parts` rows.
    void (*add_parts)(const T* sums, T factor, T* out, Int parts, Int columns);

    // Losses of the rows, and their gradients times `scale` to dz, which is scratch without `gradient`. Either labels or
    // targets, rows of numbers. A label out of range makes the loss and the gradient of
    // its row NaN.
    void (*softmax)(const T* z, const Int* labels, const T* targets, T* dz, T* losses, T scale, bool gradient,
                    Int columns, Int first, Int last);
    void (*svm)(const T* z, const Int* labels, T* dz, T* losses, T scale, bool gradient, Int columns, Int first,
                Int last);

    // y = gamma (x - mean) inverse + beta.
    void (*normalise)(const T* x, const T* mean, const T* inverse, const T* gamma, const T* beta, T* y, Int columns,
                      Int first, Int last);
    // normal = x - mean; sums become those of its squares.
    void (*deviations)(const T* x, const T* mean, T* normal, T* sums, Int columns, Int first, Int last);
    // normal *= inverse; y = gamma normal + beta.
    void (*scale_and_shift)(T* normal, const T* inverse, const T* gamma, const T* beta, T* y, Int columns, Int first,
                            Int last);
    // Sums of dy and of dy times normal.
    void (*batch_norm_sums)(const T* normal, const T* dy, T* sums, T* products, Int columns, Int first, Int last);
    // dx = factor (dy - mean_dy - normal mean_product)
    void (*batch_norm_gradient)(const T* normal, const T* dy, const T* factor, const T* mean_dy, const T* mean_product,
                                T* dx, Int columns, Int first, Int last);

    // The blocks of eight random numbers from first to last; the first of n elements takes the given number.
    void (*dropout)(const T* x, T* y, T* mask, Word seed, Word layer, Word step, Word number, float rate, T scale,
                    Int n, Int first, Int last);

    // out = scale * source[index] + shift, rows of `columns`.
    void (*gather[STORED])(const void* source, const Int* index, T* out, T scale, T shift, Int columns, Int first,
                           Int last);
    // The sum of squares, and how many elements are not finite.
    void (*square_sum)(const T* x, double* sum, double* not_finite, Int first, Int last);
};

struct Kernels {
    const Table<float>& of_float;
    const Table<double>& of_double;
};
