// The order of samples in a kernel that takes them: Order is one of these structs.

// order[start + row]; without an order the samples are taken as they stand.
struct Listed {
    const long long* index;
    __device__ Listed(const long long* order, long long start) : index(order ? order + start : nullptr) {}
    __device__ long long at(long long row) const { return index ? index[row] : row; }
};

// The image of start + row under the permutation whose numbers are at `order`.
struct Computed {
    Permutation permutation;
    long long start;
    __device__ Computed(const long long* order, long long start)
        : permutation(*reinterpret_cast<const Permutation*>(order)), start(start) {}
    __device__ long long at(long long row) const { return image(permutation, start + row); }
};

// Draws with replacement from n samples: word `first` + `step` * i of Philox4x64-10 with the key (seed, epoch) decides
// draw i, as those of NumPy's random_raw do on a CPU. `sums`, if not null, are those of the samples' weights, and
// `factor` is the last of them times 2^-53.
struct Draws {
    u64 n, unused, first, step, seed, epoch;
    const double* sums;
    double factor;
};

// The draw start + row, whose numbers are at `order`.
struct Drawn {
    Draws draws;
    long long start;
    __device__ Drawn(const long long* order, long long start)
        : draws(*reinterpret_cast<const Draws*>(order)), start(start) {}
    __device__ long long at(long long row) const {
        const u64 place = draws.first + draws.step * (u64)(start + row);
        u64 word[4] = {place / 4 + 1, 0, 0, 0};  // NumPy increments the counter first
        philox(word, draws.seed, draws.epoch);
        const u64 low = place % 4 < 2 ? word[0] : word[2], high = place % 4 < 2 ? word[1] : word[3];
        const u64 found = place % 2 ? high : low;
        if (!draws.sums) return draws.n ? (long long)(found % draws.n) : 0;
        const double number = (double)(found >> 11) * draws.factor;
        u64 below = 0, above = draws.n;  // the first sum beyond the number is at `above`, or between them
        while (below < above) {
            const u64 middle = below + (above - below) / 2;
            if (draws.sums[middle] > number) above = middle;
            else below = middle + 1;
        }
        return (long long)below;
    }
};

// Not inlined: where several rows are taken at a time there is no room in registers for all that is computed.
__device__ __noinline__ long long number_of(const CellSplit& side, long long place) { return number_at(side, place); }

// The places of another order among those of one side of a split, whose numbers follow, and stay in memory.
template <class Places>
struct Among {
    Places places;
    const CellSplit& side;
    __device__ Among(const long long* order, long long start)
        : places(order, start), side(*reinterpret_cast<const CellSplit*>(order + WORDS)) {}
    __device__ long long at(long long row) const { return number_of(side, places.at(row)); }
};
