// The loop around every update rule. The generated part above this one defines what arrays.cuh needs, and
//     update()  the formula, on one element of each array.
// A thread processes 16 bytes of w at a time, and as many elements of the other arrays, if all have the same alignment;
// otherwise one element.

constexpr int WIDTH = 16 / sizeof(S);

template <class E>
struct alignas(16) Pack {
    E at[WIDTH];
};

__device__ inline void update_one(const Arrays& arrays, const Constants& constants, T scale, long long i) {
    Element x = arrays.element(scale, i);
    update(x.of, constants.k, constants.v);
    arrays.w[i] = x.of[0];
    if (MASTER) x.of[STORED - 1] = x.of[0];
    for (int a = 2; a < STORED; ++a) arrays.state[a][i] = x.of[a];
}

__device__ inline void update_pack(const Arrays& arrays, const Constants& constants, T scale, long long i) {
    Pack<S> weights = *reinterpret_cast<const Pack<S>*>(arrays.w + i);
    const Pack<S> gradients = *reinterpret_cast<const Pack<S>*>(arrays.g + i);
    Pack<T> packs[STORED];
    for (int a = 2; a < STORED; ++a) packs[a] = *reinterpret_cast<const Pack<T>*>(arrays.state[a] + i);
    for (int lane = 0; lane < WIDTH; ++lane) {
        T x[STORED];
        for (int a = 2; a < STORED; ++a) x[a] = packs[a].at[lane];
        x[0] = MASTER ? current(x[STORED - 1], weights.at[lane]) : T(weights.at[lane]);
        x[1] = T(gradients.at[lane]) * scale;
        update(x, constants.k, constants.v);
        weights.at[lane] = x[0];
        if (MASTER) x[STORED - 1] = x[0];
        for (int a = 2; a < STORED; ++a) packs[a].at[lane] = x[a];
    }
    *reinterpret_cast<Pack<S>*>(arrays.w + i) = weights;
    for (int a = 2; a < STORED; ++a) *reinterpret_cast<Pack<T>*>(arrays.state[a] + i) = packs[a];
}

// Update the pieces in one row of the table; gradients are multiplied by `scale`.
__device__ inline void update_row(const long long* row, long long n, const Constants& constants, T scale) {
    const Arrays arrays(row);
    // head: the elements before the first one aligned to 16 bytes in w, and if `alike` in all other arrays.
    const long long beyond = row[0] % 16;
    long long head = (16 - beyond) % 16 / (long long)sizeof(S);
    bool alike = beyond % sizeof(S) == 0 && (row[1] + head * (long long)sizeof(S)) % 16 == 0;
    for (int a = 2; a < STORED; ++a) alike = alike && (row[a] + head * (long long)sizeof(T)) % 16 == 0;
    if (!alike || head > n) head = n;
    const long long tail = head + (n - head) / WIDTH * WIDTH;  // the first element after the last whole pack

    for (long long i = threadIdx.x; i < head; i += blockDim.x) update_one(arrays, constants, scale, i);
    for (long long i = head + (long long)threadIdx.x * WIDTH; i < tail; i += (long long)blockDim.x * WIDTH)
        update_pack(arrays, constants, scale, i);
    for (long long i = tail + threadIdx.x; i < n; i += blockDim.x) update_one(arrays, constants, scale, i);
}

// One launch for any number of arrays, one block for each row of `table`. Flat buffers are cut into pieces too.
// control[0] scales the gradients; if control[1] is non-zero the step is skipped. `control` may be null; the host need
// not wait for the kernel that wrote it. `scalars` has a row for each group of parameters, in all `step` numbers. A
// captured launch reads those of the current step, the rows from progress[SLOT] * step on (see step.cuh). With
// `progress` this launch ends the step: the last block advances to the next one, or restores the `count` running
// statistics from `before`. `values` are those of reduce_arrays, for a rule with reductions.
extern "C" __global__ void update_arrays(const long long* table, const T* scalars, long long step, const T* control,
                                         long long* progress, T* running, const T* before, long long count,
                                         const double* values) {
    const bool halted = progress ? progress[HALTED] != 0 : control && control[1] != 0;
    if (!halted) {
        const Row row(table);
        const Constants constants(row, scalars + (progress ? progress[SLOT] * step : 0), values);
        update_row(row.words, row.size(), constants, control ? control[0] : T(1));
    }
    if (progress && last_block(reinterpret_cast<unsigned*>(progress + TICKET)))
        go_on(progress, running, before, count);
}
