// Philox4x64-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011): four words from a counter and a
// key, the same on GPU and CPU. The numbers equal NumPy's, bit for bit: Generator(Philox(key=[seed, layer],
// counter=[0, step, 0, 0])).random(dtype=float32).

typedef unsigned long long u64;

__device__ inline void philox(u64 counter[4], u64 key0, u64 key1) {
    for (int round = 0; round < 10; ++round) {
        const u64 low0 = 0xD2E7470EE14C6C93ull * counter[0];
        const u64 high0 = __umul64hi(0xD2E7470EE14C6C93ull, counter[0]);
        const u64 low1 = 0xCA5A826395121157ull * counter[2];
        const u64 high1 = __umul64hi(0xCA5A826395121157ull, counter[2]);
        counter[0] = high1 ^ counter[1] ^ key0;
        counter[1] = low1;
        counter[2] = high0 ^ counter[3] ^ key1;
        counter[3] = low0;
        key0 += 0x9E3779B97F4A7C15ull;
        key1 += 0xBB67AE8584CAA73Bull;
    }
}

// Generate the eight uniform numbers of a block, independently of other blocks. The low half of a word comes first; a
// float takes the upper 24 bits of a half.
__device__ inline void uniform_block(u64 block, u64 seed, u64 layer, u64 step, float uniform[8]) {
    u64 word[4] = {block + 1, step, 0, 0};  // NumPy increments the counter first, so block 0 has counter 1
    philox(word, seed, layer);
    for (int j = 0; j < 8; ++j) {
        const unsigned int half = (unsigned int)(j % 2 == 0 ? word[j / 2] : word[j / 2] >> 32);
        uniform[j] = (half >> 8) * (1.0f / 16777216.0f);
    }
}
