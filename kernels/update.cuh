// The loop around every update rule. The generated part above this one defines
//     T         the element type,
//     ARRAYS    how many arrays the rule touches: w, g and its state,
//     SCALARS   how many scalars it needs,
//     update()  the formula, on one element of each array.
// A thread moves 16 bytes of every array at a time where all of them are aligned alike, one element otherwise.

constexpr int WIDTH = 16 / sizeof(T);

struct alignas(16) Pack {
    T at[WIDTH];
};

__device__ inline void update_one(T* const* arrays, const T* k, long long i) {
    T x[ARRAYS];
    for (int a = 0; a < ARRAYS; ++a) x[a] = arrays[a][i];
    update(x, k);
    for (int a = 0; a < ARRAYS; ++a)
        if (a != 1) arrays[a][i] = x[a];  // all but g
}

__device__ inline void update_pack(T* const* arrays, const T* k, long long i) {
    Pack packs[ARRAYS];
    for (int a = 0; a < ARRAYS; ++a) packs[a] = *reinterpret_cast<const Pack*>(arrays[a] + i);
    for (int lane = 0; lane < WIDTH; ++lane) {
        T x[ARRAYS];
        for (int a = 0; a < ARRAYS; ++a) x[a] = packs[a].at[lane];
        update(x, k);
        for (int a = 0; a < ARRAYS; ++a) packs[a].at[lane] = x[a];
    }
    for (int a = 0; a < ARRAYS; ++a)
        if (a != 1) *reinterpret_cast<Pack*>(arrays[a] + i) = packs[a];
}

// One launch for any number of arrays, one block for each row of `table`: the address of the row's piece of every
// array, then how many elements it has. A flat buffer is cut into such pieces too. `scalars` lie on the device, so
// that a captured launch sees those of the step.
extern "C" __global__ void update_arrays(const long long* table, const T* scalars) {
    const long long* row = table + (long long)blockIdx.x * (ARRAYS + 1);
    T* arrays[ARRAYS];
    for (int a = 0; a < ARRAYS; ++a) arrays[a] = reinterpret_cast<T*>(row[a]);
    const long long n = row[ARRAYS];
    T k[SCALARS];  // in registers: a store to an array might change what `scalars` points to
    for (int s = 0; s < SCALARS; ++s) k[s] = scalars[s];

    const long long offset = row[0] % 16;
    bool alike = offset % sizeof(T) == 0;
    for (int a = 1; a < ARRAYS; ++a) alike = alike && row[a] % 16 == offset;
    long long head = alike ? (16 - offset) % 16 / (long long)sizeof(T) : n;  // elements before the first aligned one
    if (head > n) head = n;
    const long long tail = head + (n - head) / WIDTH * WIDTH;                // the first one after the last whole pack

    for (long long i = threadIdx.x; i < head; i += blockDim.x) update_one(arrays, k, i);
    for (long long i = head + (long long)threadIdx.x * WIDTH; i < tail; i += (long long)blockDim.x * WIDTH)
        update_pack(arrays, k, i);
    for (long long i = tail + threadIdx.x; i < n; i += blockDim.x) update_one(arrays, k, i);
}
