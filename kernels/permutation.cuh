// A random permutation of the numbers below n that is computed place by place: a Feistel network (Luby & Rackoff, "How
// to construct pseudorandom permutations from pseudorandom functions", 1988) on the bits of n - 1. It is applied again
// to what is not below n (Black & Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002, their second method).
// GPU, CPU and NumPy (gpubatch/ops/permutation.py) give the same integers.

typedef unsigned long long u64;

enum : int { ROUNDS = 8, WORDS = 4 + ROUNDS };

// The numbers of a permutation as they lie in memory. The image of `first` + `step` * i is asked for by i.
struct Permutation {
    u64 n;
    u64 bits;  // of n - 1, at least 2; 0: every number is its own image
    u64 first, step;
    u64 keys[ROUNDS];
};

// The upper `bits` bits of a product of both halves of the key with `half` (multipliers: Appleby, MurmurHash3).
__device__ inline unsigned mixed(unsigned half, u64 key, unsigned bits) {
    unsigned x = (half ^ (unsigned)key) * 0x85EBCA6Bu;
    x ^= x >> 16;
    return ((x ^ (unsigned)(key >> 32)) * 0xC2B2AE35u) >> (32 - bits);
}

// The network: each round changes one half, the upper or the lower one, which has a bit more where their number is odd.
// `change` is combined with every key.
__device__ inline u64 network(u64 x, unsigned bits, const u64* keys, u64 change) {
    const unsigned below = (bits + 1) / 2, above = bits - below;
    unsigned low = (unsigned)(x & ((1ull << below) - 1)), high = (unsigned)(x >> below);
    for (int round = 0; round < ROUNDS; round += 2) {
        high ^= mixed(low, keys[round] ^ change, above);
        low ^= mixed(high, keys[round + 1] ^ change, below);
    }
    return (u64)high << below | low;
}

__device__ inline u64 feistel(u64 x, const Permutation& p) { return network(x, (unsigned)p.bits, p.keys, 0); }

__device__ inline long long image(const Permutation& p, long long i) {
    u64 x = p.first + p.step * (u64)i;
    if (p.bits == 0) return (long long)x;
    do x = feistel(x, p);
    while (x >= p.n);
    return (long long)x;
}

// One side of a split of the numbers below n, of which some are held out (gpubatch/ops/cells.py): of each CELL_SIZE
// neighbours the images of a permutation of theirs, counted from the front on the larger side, else from the back.
enum : int { CELL_SIZE = 4096, CELL_BITS = 12, NO_SIDE = 0, LARGER_SIDE = 1, SMALLER_SIDE = 2 };

struct CellSplit {
    u64 n, side;       // NO_SIDE: every number is its own image
    u64 cells;         // the last one may be short
    u64 before;        // numbers of the smaller side in all cells but the last
    double each;       // likewise in a cell, on average
    double per_place;  // cells for each number of this side
    u64 keys[ROUNDS];
};

// How many of this side are before a cell. One product of floating-point numbers: the same on every processor.
__device__ inline long long begin_of(const CellSplit& s, long long cell) {
    const long long smaller = cell == (long long)s.cells - 1 ? (long long)s.before : (long long)((double)cell * s.each);
    return s.side == SMALLER_SIDE ? smaller : cell * CELL_SIZE - smaller;
}

// The number at a place of the side.
__device__ inline long long number_at(const CellSplit& s, long long place) {
    if (s.side == NO_SIDE) return place;
    const long long last = (long long)s.cells - 1;
    long long cell = (long long)((double)(place + 1) * s.per_place);
    if (cell > last) cell = last;
    while (begin_of(s, cell) > place) --cell;
    while (cell < last && begin_of(s, cell + 1) <= place) ++cell;
    const long long size = cell == last ? (long long)s.n - last * CELL_SIZE : CELL_SIZE;
    unsigned bits = CELL_BITS;
    if (size < CELL_SIZE)
        for (bits = 2; size > 1ll << bits;) ++bits;
    u64 change = ((u64)cell + 1) * 0x9E3779B97F4A7C15ull;  // SplitMix64 (Steele, Lea & Flood, 2014)
    change = (change ^ change >> 30) * 0xBF58476D1CE4E5B9ull;
    change = (change ^ change >> 27) * 0x94D049BB133111EBull;
    change ^= change >> 31;
    u64 x = (u64)(place - begin_of(s, cell));
    if (s.side == SMALLER_SIDE) x = (u64)size - 1 - x;
    do x = network(x, bits, s.keys, change);
    while (x >= (u64)size);
    return cell * CELL_SIZE + (long long)x;
}
