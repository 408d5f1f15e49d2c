// What the kernels of update rules read. The generated part above this one defines
//     T         the type of arithmetic and state,
//     S         the storage type of w and g: T or Half,
//     MASTER    whether the last array is a master copy of w in T, which the rule updates,
//     ARRAYS    the number of arrays of the rule: w, g and its state,
//     SCALARS   the number of scalars of the rule,
//     VALUES    the number of its reductions over each parameter,
//     KNOWN     how many of them earlier passes made.

enum : int {
    STORED = ARRAYS + MASTER,                       // arrays in a row of the table
    COLUMNS = STORED + 2 + (VALUES > 0 ? 4 : 0),  // numbers in it
};

// This block's row of the table: the addresses of a piece of each array, the piece's size in elements, and the number of
// its row of scalars; with reductions also the number of its parameter, this one's size, and the first and the number of
// its rows.
struct Row {
    const long long* words;

    __device__ Row(const long long* table) : words(table + (long long)blockIdx.x * COLUMNS) {}
    __device__ long long size() const { return words[STORED]; }
    __device__ long long scalars() const { return words[STORED + 1]; }
    __device__ long long parameter() const { return words[STORED + 2]; }
    __device__ long long elements() const { return words[STORED + 3]; }
    __device__ long long first() const { return words[STORED + 4]; }
    __device__ long long count() const { return words[STORED + 5]; }
    __device__ long long number() const { return blockIdx.x - first(); }
};

// The numbers that are the same for all elements of a row.
struct Constants {
    T k[SCALARS];      // the formula's scalars; a copy, since the compiler must assume that stores to arrays change them
    T v[KNOWN + 1];  // the reductions over the parameter

    __device__ Constants(const Row& row, const T* scalars, const double* values) {
        for (int s = 0; s < SCALARS; ++s) k[s] = scalars[row.scalars() * SCALARS + s];
        for (int j = 0; j < KNOWN; ++j) v[j] = T(values[row.parameter() * VALUES + j]);
    }
};

// The array at an address in global memory; the conversion tells the compiler that it is not shared memory.
template <class E>
__device__ inline E* global(long long address) {
    return static_cast<E*>(__cvta_global_to_generic(address));
}

// The number that w is before the step, from its master copy: something else may have changed w meanwhile, which then is
// not the rounded copy any more, and counts.
__device__ inline T current(T copy, S w) {
    S rounded;
    rounded = copy;
    return T(rounded) == T(w) ? copy : T(w);
}

// The numbers of one element in each array; w is the master copy, if there is one.
struct Element {
    T of[STORED];
};

// The arrays in a row of the table.
struct Arrays {
    S* w;
    const S* g;
    T* state[STORED];  // from 2 on

    __device__ Arrays(const long long* row) : w(global<S>(row[0])), g(global<const S>(row[1])) {
        for (int a = 2; a < STORED; ++a) state[a] = global<T>(row[a]);
    }

    __device__ Element element(T scale, long long i) const {
        Element x;
        for (int a = 2; a < STORED; ++a) x.of[a] = state[a][i];
        x.of[0] = MASTER ? current(x.of[STORED - 1], w[i]) : T(w[i]);
        x.of[1] = T(g[i]) * scale;
        return x;
    }
};
