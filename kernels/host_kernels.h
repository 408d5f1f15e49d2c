// The interface between host.cpp and the kernels of each SIMD level. A kernel works on rows or elements `first` to
// `last`.
#pragma once

#include "host_simd.h"

typedef unsigned long long Word;

// A traced update rule, named by the digest of its text; see gpubatch/ops/host_source.py. `table` has a row for each
// piece: its address in each array, then its size in elements. A pass but the last writes the totals of its reductions
// over each row to `totals`; `values` are the reductions of earlier passes over the array of these rows.
template <class T>
struct Formula {
    const char* name;
    void (*run)(const Int* table, const T* scalars, const T* values, double* totals, Int pass, Int first, Int last);
};

// An activation, named likewise. `k` are the scalars of the formula.
template <class T>
struct Activation {
    const char* name;
    // y = f(x + b); b may be null. `kept` receives the slope, if the activation keeps it.
    void (*forward)(const T* x, const T* b, T* y, T* kept, const T* k, Int columns, Int first, Int last);
    // dx = dy f'; `kept` is y or the slope. sums[columns], if not null, receives the sums of dx over the rows.
    void (*backward)(const T* kept, const T* dy, T* dx, T* sums, const T* k, Int columns, Int first, Int last);
};

// A score loss, named likewise. run() returns the sum of the losses, and with `gradient` writes dz = share * dloss/dz.
template <class T>
struct ScoreLoss {
    const char* name;
    double (*run)(const T* z, const T* y, T* dz, const T* k, T share, const T* weights, Int columns, bool gradient,
                  Int first, Int last);
};

// The storage types of samples: bool and uint8, int8, uint16, int16, uint32, int32, uint64, int64, float16, float32,
// float64.
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

    // The losses of the rows; with `gradient` dz = scale * gradient, otherwise dz is scratch. Either labels or targets,
    // rows of numbers. A label out of range gives its row a NaN loss and gradient. Both are multiplied by the row's
    // weight; a weight of 0 makes them 0 whatever the row holds, and without weights each is 1. Of each target y only
    // kept * y + spread counts; with `relative`, the sum of y log y is added.
    void (*softmax)(const T* z, const Int* labels, const T* targets, const T* weights, T kept, T spread, bool relative,
                    T* dz, T* losses, T scale, bool gradient, Int columns, Int first, Int last);
    void (*focal)(const T* z, const Int* labels, const T* weights, T gamma, const T* alpha, T* dz, T* losses, T scale,
                  bool gradient, Int columns, Int first, Int last);
    void (*svm)(const T* z, const Int* labels, const T* weights, T delta, T* dz, T* losses, T scale, bool gradient,
                Int columns, Int first, Int last);
    void (*crammer_singer)(const T* z, const Int* labels, const T* weights, T delta, T* dz, T* losses, T scale,
                           bool gradient, Int columns, Int first, Int last);

    // y = gamma (x - mean) inverse + beta.
    void (*normalise)(const T* x, const T* mean, const T* inverse, const T* gamma, const T* beta, T* y, Int columns,
                      Int first, Int last);
    // normalised = x - mean; sums = the column sums of its squares.
    void (*deviations)(const T* x, const T* mean, T* normalised, T* sums, Int columns, Int first, Int last);
    // normalised *= inverse; y = gamma normalised + beta.
    void (*scale_and_shift)(T* normalised, const T* inverse, const T* gamma, const T* beta, T* y, Int columns,
                            Int first, Int last);
    // The column sums of dy, and of dy times normalised.
    void (*batch_norm_sums)(const T* normalised, const T* dy, T* sums, T* products, Int columns, Int first, Int last);
    // dx = factor (dy - mean_dy - normalised mean_product).
    void (*batch_norm_gradient)(const T* normalised, const T* dy, const T* factor, const T* mean_dy,
                                const T* mean_product, T* dx, Int columns, Int first, Int last);

    // Blocks first to last of eight random numbers; the first of the n elements takes random number `number`.
    void (*dropout)(const T* x, T* y, T* mask, Word seed, Word layer, Word step, Word number, float rate, T scale,
                    Int n, Int first, Int last);

    // out = scale * source[index] + shift, rows of `columns`.
    void (*gather[STORED])(const void* source, const Int* index, T* out, T scale, T shift, Int columns, Int first,
                           Int last);
    // g += factor w.
    void (*l2_gradient)(const T* w, T factor, T* g, Int first, Int last);
    // The sum of squares, and the number of elements that are not finite.
    void (*square_sum)(const T* x, double* sum, double* not_finite, Int first, Int last);
};

struct Kernels {
    const Table<float>& of_float;
    const Table<double>& of_double;

    // out[i] = the image of start + i under a permutation, whose numbers are as kernels/permutation.cuh has them.
    void (*permute)(const Word* permutation, Int start, Int* out, Int first, Int last);

    // places[i] = the number there on one side of a split, whose numbers are as kernels/permutation.cuh has them.
    void (*in_cells)(const Word* side, Int* places, Int first, Int last);
};
