// The core's kernels for the CPU: loops that the compiler vectorises. This file is compiled once for each SIMD level,
// with LEVEL as its name, and exports `kernels_LEVEL`; host.cpp chooses one when it is loaded.
//
// No two levels may share a function, or the linker might keep the one that needs the newer processor. So each level
// has its own namespaces and includes nothing of the standard library. A kernel works on a range of rows or elements,
// and host.cpp gives ranges to threads; sums are cut into parts that do not depend on the number of threads.

#include "host_kernels.h"

#define JOINED(a, b) a##b
#define NAMED(a, b) JOINED(a, b)
#define __constant__ static

namespace NAMED(common_, LEVEL) {

static inline Word __umul64hi(Word a, Word b) { return (Word)(((unsigned __int128)a * b) >> 64); }
#include "philox.cuh"

static inline float __uint_as_float(unsigned bits) {
    float x;
    __builtin_memcpy(&x, &bits, sizeof x);
    return x;
}

static inline unsigned __float_as_uint(float x) {
    unsigned bits;
    __builtin_memcpy(&bits, &x, sizeof bits);
    return bits;
}
#include "half.cuh"
#include "permutation.cuh"

// Each pass goes over the whole part, and then over what it left at n or above: so loops are without branches.
static void permute(const Word* permutation, Int start, Int* out, Int first, Int last) {
    constexpr Int PART = 1024;
    const Permutation p = *reinterpret_cast<const Permutation*>(permutation);
    u64 x[PART];
    int places[PART];  // of the images that are not below n yet
    for (Int begin = first; begin < last; begin += PART) {
        const int count = (int)(last - begin < PART ? last - begin : PART);
        Int* const to = out + begin;
        EACH for (int i = 0; i < count; ++i) to[i] = (Int)(p.first + p.step * (u64)(start + begin + i));
        if (p.bits == 0) continue;
        EACH for (int i = 0; i < count; ++i) to[i] = (Int)feistel((u64)to[i], p);
        int left = 0;
        for (int i = 0; i < count; ++i) {
            places[left] = i;
            left += (u64)to[i] >= p.n;
        }
        while (left) {
            for (int k = 0; k < left; ++k) x[k] = (u64)to[places[k]];
            EACH for (int k = 0; k < left; ++k) x[k] = feistel(x[k], p);
            int more = 0;
            for (int k = 0; k < left; ++k) {
                to[places[k]] = (Int)x[k];
                places[more] = places[k];
                more += x[k] >= p.n;
            }
            left = more;
        }
    }
}

static void in_cells(const Word* side, Int* places, Int first, Int last) {
    const CellSplit s = *reinterpret_cast<const CellSplit*>(side);
    for (Int i = first; i < last; ++i) places[i] = (Int)number_at(s, (long long)places[i]);
}

}  // namespace

namespace NAMED(float32_, LEVEL) {
using namespace NAMED(common_, LEVEL);
typedef float T;
#define ELEMENTWISE "elementwise_float32.h"
#include "host_loops.h"
#undef ELEMENTWISE
}

namespace NAMED(float64_, LEVEL) {
using namespace NAMED(common_, LEVEL);
typedef double T;
#define ELEMENTWISE "elementwise_float64.h"
#include "host_loops.h"
#undef ELEMENTWISE
}

extern const Kernels NAMED(kernels_, LEVEL);
const Kernels NAMED(kernels_, LEVEL) = {NAMED(float32_, LEVEL)::table, NAMED(float64_, LEVEL)::table,
                                       NAMED(common_, LEVEL)::permute, NAMED(common_, LEVEL)::in_cells};
