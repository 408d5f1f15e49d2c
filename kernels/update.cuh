// The loop around every update rule. The generated part above this one defines
//     T         the type of the arithmetic and of the state,
//     S         the type in which w and g are stored: T, or Half,
//     MASTER    whether w has a copy in T, the last array, that the rule works on,
//     ARRAYS    how many arrays the rule touches: w, g and its state,
//     SCALARS   how many scalars it needs,
//     update()  the formula, on one element of each array.
// A thread moves 16 bytes of w at a time, and as many elements of every other array, where all of them are aligned
// alike; one element otherwise.

constexpr int STORED = ARRAYS + MASTER;  // the arrays of a row of the table
constexpr int WIDTH = 16 / sizeof(S);

template <class E>
struct alignas(16) Pack {
    E at[WIDTH];
};

// The array at an address of the device's memory. That it is not shared memory the compiler cannot know by itself.
template <class E>
__device__ inline E* global(long long address) {
    return static_cast<E*>(__cvta_global_to_generic(address));
}

// The arrays of a row.
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

// The piece of every array that a row of the table says, by the scalars of a row; gradients count `scale` times.
__device__ inline void update_row(const long long* row, const T* scalars, T scale) {
    const Arrays arrays(row);
    const long long n = row[STORED];
    T k[SCALARS];  // in registers: a store to an array might change what `scalars` points to
    for (int s = 0; s < SCALARS; ++s) k[s] = scalars[s];

    // Elements before the first that is aligned to 16 bytes, in w and then in all the others.
    const long long beyond = row[0] % 16;
    long long head = (16 - beyond) % 16 / (long long)sizeof(S);
    bool alike = beyond % sizeof(S) == 0 && (row[1] + head * (long long)sizeof(S)) % 16 == 0;
    for (int a = 2; a < STORED; ++a) alike = alike && (row[a] + head * (long long)sizeof(T)) % 16 == 0;
    if (!alike || head > n) head = n;
    const long long tail = head + (n - head) / WIDTH * WIDTH;  // the first one after the last whole pack

    for (long long i = threadIdx.x; i < head; i += blockDim.x) arrays.update_one(k, scale, i);
    for (long long i = head + (long long)threadIdx.x * WIDTH; i < tail; i += (long long)blockDim.x * WIDTH)
        arrays.update_pack(k, scale, i);
    for (long long i = tail + threadIdx.x; i < n; i += blockDim.x) arrays.update_one(k, scale, i);
}

// One launch for any number of arrays, one block for each row of `table`: the address of the row's piece of every
// array, then how many elements it has. A flat buffer is cut into such pieces too. `control`, or null, holds what
// gradients are multiplied by, and whether (not 0) nothing is to be done: what wrote it need not have been waited for.
// `scalars` lie on the device, so that a captured launch sees those of the step: rows of them, of which `progress`, see
// step.cuh, says which one, or null for the first. With it this is the end of the step: the last block goes on to the
// next one, or back to the `count` running statistics from `before`.
extern "C" __global__ void update_arrays(const long long* table, const T* scalars, const T* control,
                                         long long* progress, T* running, const T* before, long long count) {
    const bool halted = progress ? progress[HALTED] != 0 : control && control[1] != 0;
    if (!halted)
        update_row(table + (long long)blockIdx.x * (STORED + 1), scalars + (progress ? progress[SLOT] * SCALARS : 0),
                   control ? control[0] : T(1));
    if (progress && last_block(reinterpret_cast<unsigned*>(progress + TICKET)))
        go_on(progress, running, before, count);
}
