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
__device__ inline u64 feistel(u64 x, const Permutation& p) {
    const unsigned below = (unsigned)(p.bits + 1) / 2, above = (unsigned)p.bits - below;
    unsigned low = (unsigned)(x & ((1ull << below) - 1)), high = (unsigned)(x >> below);
    for (int round = 0; round < ROUNDS; round += 2) {
        high ^= mixed(low, p.keys[round], above);
        low ^= mixed(high, p.keys[round + 1], below);
    }
    return (u64)high << below | low;
}

__device__ inline long long image(const Permutation& p, long long i) {
    u64 x = p.first + p.step * (u64)i;
    if (p.bits == 0) return (long long)x;
    do x = feistel(x, p);
    while (x >= p.n);
    return (long long)x;
}
