// Shared by the kernels: the elements of each thread, and deterministic sums over a block.
// T is the type of arithmetic, float or double. S is the storage type of batches, parameters and gradients, T or Half.
// Both are defined before this text.

enum : int {  // the compiler would warn of constants that a kernel does not use
    WARP = 32,
    AT_ONCE = 4,             // loads that a thread issues before it uses the first
    WIDTH = 16 / sizeof(S),  // elements in sixteen bytes
};

// --- packs of sixteen bytes ---

struct alignas(16) Pack {
    S at[WIDTH];
};

__device__ inline bool aligned(const S* at) { return (unsigned long long)at % sizeof(Pack) == 0; }
__device__ inline Pack& pack(S* at) { return *reinterpret_cast<Pack*>(at); }
__device__ inline const Pack& pack(const S* at) { return *reinterpret_cast<const Pack*>(at); }

// --- scalars in device memory ---

__device__ inline T value_at(const T* at, T otherwise) { return at ? *at : otherwise; }

// --- loops ---

// use(i, load(i)) for i = first, first + step, ... below `last`. Several loads precede the first use: the compiler
// cannot reorder them itself, because `use` may write to the array that `load` reads.
template <class Load, class Use>
__device__ inline void in_batches(long long first, long long last, long long step, Load load, Use use) {
#pragma unroll 1
    for (long long i = first; i < last; i += AT_ONCE * step) {
        decltype(load(i)) held[AT_ONCE];
        for (int k = 0; k < AT_ONCE; ++k) held[k] = load(i + k * step < last ? i + k * step : i);
        for (int k = 0; k < AT_ONCE; ++k)
            if (i + k * step < last) use(i + k * step, held[k]);
    }
}

// --- columns ---

// A thread's elements of a matrix (rows, features): some rows of one column. A block covers `width` columns, a power of
// two, and blockDim.x / width rows at a time; neighbouring threads have neighbouring addresses. gridDim.x blocks lie
// side by side, and gridDim.y blocks take the rows in turn.
struct Tile {
    long long column, features, first, last, step;
    bool owner;  // whether this thread writes the column's results for this block

    __device__ Tile(long long rows, long long features, long long width) : features(features) {
        const int columns = (int)width, shift = __popc(columns - 1);  // a division would cost more than all the rest
        const int lane = threadIdx.x >> shift, lanes = blockDim.x >> shift;
        column = blockIdx.x * width + (threadIdx.x & (columns - 1));
        owner = lane == 0 && column < features;
        first = (long long)blockIdx.y * lanes + lane;
        last = column < features ? rows : first;
        step = (long long)gridDim.y * lanes;
    }

    __device__ long long at(long long row) const { return row * features + column; }

    // use(row, load(row)) for the thread's rows.
    template <class Load, class Use>
    __device__ void each(Load load, Use use) const {
        in_batches(first, last, step, load, use);
    }
};

// The sum over a block's threads of the same column, valid in the column's owner. All threads must call it.
__device__ inline T column_sum(T part, long long width) {
    __shared__ T parts[MOST_THREADS];
    __syncthreads();  // the previous sum's parts may still be read
    parts[threadIdx.x] = part;
    for (unsigned n = blockDim.x / 2; n >= width; n /= 2) {
        __syncthreads();
        if (threadIdx.x < n) parts[threadIdx.x] += parts[threadIdx.x + n];
    }
    return parts[threadIdx.x];
}

// --- rows ---

// The threads that share a row: a warp or the whole block, `size` threads.
struct Team {
    int size, lane;
    long long first, step;  // rows

    __device__ Team(long long size_) : size((int)size_), lane(threadIdx.x % size) {
        const int teams = blockDim.x / size;
        first = (long long)blockIdx.x * teams + threadIdx.x / size;
        step = (long long)gridDim.x * teams;
    }

    // use(column, load(column)) for the thread's share of a row.
    template <class Load, class Use>
    __device__ void each(long long columns, Load load, Use use) const {
        in_batches(lane, columns, size, load, use);
    }
};

struct Sum {
    template <class V>
    __device__ static V of(V x, V y) { return x + y; }
};

struct Largest {  // for numbers other than NaN
    template <class V>
    __device__ static V of(V x, V y) { return x > y ? x : y; }
};

// Reduce the values of a team by F; all its threads get the same result. All threads must call it.
template <class F, class V>
__device__ inline V combine(V x, int size) {
    __shared__ V of_warp[MOST_THREADS / WARP], of_block;
    for (int distance = WARP / 2; distance > 0; distance /= 2) x = F::of(x, __shfl_xor_sync(~0u, x, distance));
    x = __shfl_sync(~0u, x, 0);  // lanes may differ: each may contract its own product with the sum
    if (size == WARP) return x;
    __syncthreads();  // the previous call's shared values may still be read
    if (threadIdx.x % WARP == 0) of_warp[threadIdx.x / WARP] = x;
    __syncthreads();
    if (threadIdx.x < WARP) {  // only one warp: consumer cards are slow in double precision
        x = of_warp[threadIdx.x % (size / WARP)];
        for (int distance = size / WARP / 2; distance > 0; distance /= 2)
            x = F::of(x, __shfl_xor_sync(~0u, x, distance));
        if (threadIdx.x == 0) of_block = x;
    }
    __syncthreads();
    return of_block;
}
