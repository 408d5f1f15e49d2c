// What kernels share: which thread has which elements, and sums over a block that always have the same bits.
// T is the type of arithmetic, float or double, and S that in which batches, parameters and their gradients are stored:
// T, or Half. Both are defined before this text.

enum : int {  // constants would have the compiler warn of those that a kernel does not use
    WARP = 32,
    AT_ONCE = 4,             // loads that a thread has under way before it uses the first
    WIDTH = 16 / sizeof(S),  // elements in sixteen bytes
};

// --- sixteen bytes ---

struct alignas(16) Pack {
    S at[WIDTH];
};

__device__ inline bool aligned(const S* at) { return (unsigned long long)at % sizeof(Pack) == 0; }
__device__ inline Pack& pack(S* at) { return *reinterpret_cast<Pack*>(at); }
__device__ inline const Pack& pack(const S* at) { return *reinterpret_cast<const Pack*>(at); }

// --- numbers that the device has ---

__device__ inline T value_at(const T* at, T otherwise) { return at ? *at : otherwise; }

// --- loops ---

// use(i, load(i)) for every i from `first` to `last`, `step` apart. Several loads come before the first use: the
// compiler may not bring them forward by itself, since `use` writes to what may be the same array.
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

// A thread's elements of a matrix (rows, features): one column, and some rows of it. A block has `width` columns, a
// power of two, and as many rows at a time as that leaves threads; neighbours in memory go to neighbouring threads.
// gridDim.x blocks lie side by side, gridDim.y of them take turns with the rows.
struct Tile {
    long long column, features, first, last, step;
    bool owner;  // whether this thread writes what belongs to the column of this block

    __device__ Tile(long long rows, long long features, long long width) : features(features) {
        const int columns = (int)width, shift = __popc(columns - 1);  // a division takes longer than all of the rest
        const int lane = threadIdx.x >> shift, lanes = blockDim.x >> shift;
        column = blockIdx.x * width + (threadIdx.x & (columns - 1));
        owner = lane == 0 && column < features;
        first = (long long)blockIdx.y * lanes + lane;
        last = column < features ? rows : first;
        step = (long long)gridDim.y * lanes;
    }

    __device__ long long at(long long row) const { return row * features + column; }

    // use(row, load(row)) for its rows.
    template <class Load, class Use>
    __device__ void each(Load load, Use use) const {
        in_batches(first, last, step, load, use);
    }
};

// The sum over the threads of a block that have the same column of a tile, for its owner. All threads must come here.
__device__ inline T column_sum(T part, long long width) {
    __shared__ T parts[MOST_THREADS];
    __syncthreads();  // those of the sum before may still be read
    parts[threadIdx.x] = part;
    for (unsigned n = blockDim.x / 2; n >= width; n /= 2) {
        __syncthreads();
        if (threadIdx.x < n) parts[threadIdx.x] += parts[threadIdx.x + n];
    }
    return parts[threadIdx.x];
}

// --- rows ---

// The threads that share a row: a warp, or else the whole block of `size` threads.
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

struct Largest {  // of numbers, not NaN
    template <class V>
    __device__ static V of(V x, V y) { return x > y ? x : y; }
};

// All values of a team in one, the same for all of its threads, which must all come here.
template <class F, class V>
__device__ inline V combine(V x, int size) {
    __shared__ V of_warp[MOST_THREADS / WARP], of_block;
    for (int distance = WARP / 2; distance > 0; distance /= 2) x = F::of(x, __shfl_xor_sync(~0u, x, distance));
    x = __shfl_sync(~0u, x, 0);  // a product may have been contracted with the sum in one lane, not in the other
    if (size == WARP) return x;
    __syncthreads();  // both may still be read
    if (threadIdx.x % WARP == 0) of_warp[threadIdx.x / WARP] = x;
    __syncthreads();
    if (threadIdx.x < WARP) {  // one warp is enough: consumer cards add slowly in double precision
        x = of_warp[threadIdx.x % (size / WARP)];
        for (int distance = size / WARP / 2; distance > 0; distance /= 2)
            x = F::of(x, __shfl_xor_sync(~0u, x, distance));
        if (threadIdx.x == 0) of_block = x;
    }
    __syncthreads();
    return of_block;
}
