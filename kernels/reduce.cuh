// A pass of an update rule that reduces values of the elements of each parameter. The generated part above this one
// defines, beside what arrays.cuh needs,
//     REDUCTIONS  the number of reductions of this pass,
//     operands()  what they reduce, of one element of each array,
//     EACH_REDUCTION(DO)  DO(j, F) for each of them; F is one of the structs below.
// The order of additions depends on sizes alone. They are in double precision, as the squares of float32 may overflow.

struct Norm {
    __device__ static double term(T x) { return (double)x * (double)x; }
    __device__ static double of(double x, double y) { return x + y; }
    __device__ static double finish(double total, long long) { return sqrt(total); }
};

struct Mean {
    __device__ static double term(T x) { return (double)x; }
    __device__ static double of(double x, double y) { return x + y; }
    __device__ static double finish(double total, long long n) { return total / (double)n; }
};

struct MaxAbs {  // NaN remains
    __device__ static double term(T x) { return fabs((double)x); }
    __device__ static double of(double x, double y) { return x > y || x != x ? x : y; }
    __device__ static double finish(double total, long long) { return total; }
};

// One launch for any number of parameters, one block for each row of `table`, as for update_arrays. Each block writes
// the totals of its row to `totals`; the last block of a parameter combines those of all its rows and writes `values`,
// from KNOWN on in its VALUES numbers. `tickets` has a number for each parameter, 0 between launches.
extern "C" __global__ void reduce_arrays(const long long* table, const T* scalars, long long step, const T* control,
                                         const long long* progress, double* totals, double* values,
                                         unsigned* tickets) {
    if (progress ? progress[HALTED] != 0 : control && control[1] != 0) return;
    const Row row(table);
    const Arrays arrays(row.words);
    const Constants constants(row, scalars + (progress ? progress[SLOT] * step : 0), values);
    const T scale = control ? control[0] : T(1);

    double total[REDUCTIONS] = {};
    in_batches(
        threadIdx.x, row.size(), blockDim.x, [&](long long i) { return arrays.element(scale, i); },
        [&](long long, Element element) {
            T x[REDUCTIONS];
            operands(element.of, constants.k, constants.v, x);
#define ADD(j, F) total[j] = F::of(total[j], F::term(x[j]));
            EACH_REDUCTION(ADD)
        });
    totals += REDUCTIONS * row.first();
#define SHARE(j, F) \
    total[j] = combine<F>(total[j], blockDim.x); \
    if (threadIdx.x == 0) totals[REDUCTIONS * row.number() + j] = total[j];
    EACH_REDUCTION(SHARE)

    if (!last_block(tickets + row.parameter(), (unsigned)row.count())) return;
    double all[REDUCTIONS] = {};
    for (long long i = threadIdx.x; i < row.count(); i += blockDim.x) {
#define GATHER(j, F) all[j] = F::of(all[j], totals[REDUCTIONS * i + j]);
        EACH_REDUCTION(GATHER)
    }
    values += VALUES * row.parameter() + KNOWN;
#define FINISH(j, F) \
    all[j] = combine<F>(all[j], blockDim.x); \
    if (threadIdx.x == 0) values[j] = F::finish(all[j], row.elements());
    EACH_REDUCTION(FINISH)
}
