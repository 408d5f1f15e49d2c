// The loop around every update rule. The generated part above this one defines
//     T         the type of arithmetic and state,
//     S         the storage type of w and g: T or Half,
//     MASTER    whether the last array is a master copy of w in T, which the rule updates,
//     ARRAYS    the number of arrays of the rule: w, g and its state,
//     SCALARS   the number of scalars of the rule,
//     update()  the formula, on one element of each array.
// A thread processes 16 bytes of w at a time, and as many elements of the other arrays, if all have the same alignment;
// otherwise one element.

constexpr int STORED = ARRAYS + MASTER;  // arrays in a row of the table
constexpr int WIDTH = 16 / sizeof(S);

template <class E>
struct alignas(16) Pack {
    E at[WIDTH];
};

// The array at an address in global memory; the conversion tells the compiler that it is not shared memory.
template <class E>
__device__ inline E* global(long long address) {
    return static_cast<E*>(__cvta_global_to_generic(address));
}

// The arrays in a row of the table.
struct Arrays {
    S* w;
    const S* g;
    T* state[STORED];  // from 2 on

    __device__ Arrays(const long long* row) : w(global<S>(row[0])), g(global<const S>(row[1])) {
        for (int a = 2; a < STORED; ++a) state[a] = global<T>(row[a]);
    }

    __device__ void update_one(const T* k, T scale, long long i) const {
        T x[STORED];
        for (int a = 2; a < STORED; ++a) x[a] = state[a][i];
        x[0] = MASTER ? x[STORED - 1] : T(w[i]);
        x[1] = T(g[i]) * scale;
        update(x, k);
        w[i] = x[0];
        if (MASTER) x[STORED - 1] = x[0];
        for (int a = 2; a < STORED; ++a) state[a][i] = x[a];
    }

    __device__ void update_pack(const T* k, T scale, long long i) const {
        Pack<S> weights = *reinterpret_cast<const Pack<S>*>(w + i);
        const Pack<S> gradients = *reinterpret_cast<const Pack<S>*>(g + i);
        Pack<T> packs[STORED];
        for (int a = 2; a < STORED; ++a) packs[a] = *reinterpret_cast<const Pack<T>*>(state[a] + i);
        for (int lane = 0; lane < WIDTH; ++lane) {
            T x[STORED];
            for (int a = 2; a < STORED; ++a) x[a] = packs[a].at[lane];
            x[0] = MASTER ? x[STORED - 1] : T(weights.at[lane]);
            x[1] = T(gradients.at[lane]) * scale;
            update(x, k);
            weights.at[lane] = x[0];
            if (MASTER) x[STORED - 1] = x[0];
            for (int a = 2; a < STORED; ++a) packs[a].at[lane] = x[a];
        }
        *reinterpret_cast<Pack<S>*>(w + i) = weights;
        for (int a = 2; a < STORED; ++a) *reinterpret_cast<Pack<T>*>(state[a] + i) = packs[a];
    }
};

// Update the pieces in one row of the table, with their row of scalars; gradients are multiplied by `scale`.
__device__ inline void update_row(const long long* row, const T* scalars, T scale) {
    const Arrays arrays(row);
    const long long n = row[STORED];
    scalars += row[STORED + 1] * SCALARS;
    T k[SCALARS];  // a copy in registers: the compiler must assume that stores to arrays change *scalars
    for (int s = 0; s < SCALARS; ++s) k[s] = scalars[s];

    // head: the elements before the first one aligned to 16 bytes in w, and if `alike` in all other arrays.
    const long long beyond = row[0] % 16;
    long long head = (16 - beyond) % 16 / (long long)sizeof(S);
    bool alike = beyond % sizeof(S) == 0 && (row[1] + head * (long long)sizeof(S)) % 16 == 0;
    for (int a = 2; a < STORED; ++a) alike = alike && (row[a] + head * (long long)sizeof(T)) % 16 == 0;
    if (!alike || head > n) head = n;
    const long long tail = head + (n - head) / WIDTH * WIDTH;  // the first element after the last whole pack

    for (long long i = threadIdx.x; i < head; i += blockDim.x) arrays.update_one(k, scale, i);
    for (long long i = head + (long long)threadIdx.x * WIDTH; i < tail; i += (long long)blockDim.x * WIDTH)
        arrays.update_pack(k, scale, i);
    for (long long i = tail + threadIdx.x; i < n; i += blockDim.x) arrays.update_one(k, scale, i);
}

// One launch for any number of arrays, one block for each row of `table`: the addresses of a piece of each array, the
// piece's size in elements, and the number of its row of scalars. Flat buffers are cut into pieces too. control[0]
// scales the gradients; if control[1] is non-zero the step is skipped. `control` may be null; the host need not wait for
// the kernel that wrote it. `scalars` has a row for each group of parameters, in all `step` numbers. A captured launch
// reads those of the current step, the rows from progress[SLOT] * step on (see step.cuh). With `progress` this launch
// ends the step: the last block advances to the next one, or restores the `count` running statistics from `before`.
extern "C" __global__ void update_arrays(const long long* table, const T* scalars, long long step, const T* control,
                                         long long* progress, T* running, const T* before, long long count) {
    const bool halted = progress ? progress[HALTED] != 0 : control && control[1] != 0;
    if (!halted)
        update_row(table + (long long)blockIdx.x * (STORED + 2), scalars + (progress ? progress[SLOT] * step : 0),
                   control ? control[0] : T(1));
    if (progress && last_block(reinterpret_cast<unsigned*>(progress + TICKET)))
        go_on(progress, running, before, count);
}
