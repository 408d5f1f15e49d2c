// float16 as a storage type, the same on GPU and CPU; arithmetic is in float32. Conversion rounds to nearest, ties to
// even, and keeps subnormal numbers, infinities and NaN. The GPU uses its conversion instructions: without them,
// integer arithmetic and not memory would bound the kernels. The CPU does the same with bit operations.

struct Half {
    unsigned short bits;

    __device__ Half& operator=(float x) { return *this = of(x); }

#ifdef __CUDA_ARCH__
    __device__ operator float() const {
        float x;
        asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
        return x;
    }

    __device__ static Half of(float x) {
        Half half;
        asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half.bits) : "f"(x));
        return half;
    }
#else
    __device__ operator float() const {
        const unsigned exponent = bits >> 10 & 31, mantissa = bits & 1023;
        const float subnormal = mantissa * (1.0f / 16777216.0f);  // exact, without bit operations
        const unsigned widened = (exponent == 31 ? 255 : exponent + 112) << 23 | mantissa << 13;
        const float size = exponent == 0 ? subnormal : __uint_as_float(widened);
        return bits >> 15 ? -size : size;
    }

    __device__ static Half of(float x) {
        const unsigned word = __float_as_uint(x), size = word & 0x7fffffff;
        const unsigned rounded = (size + 0xfff + (size >> 13 & 1) - 0x38000000) >> 13;
        // Below 2^-14 the spacing is 2^-24, that of floats just above 1/2: adding 1/2 rounds.
        const unsigned subnormal = __float_as_uint(__uint_as_float(size) + 0.5f) - 0x3f000000;
        const unsigned special = size > 0x7f800000 ? 0x7e00 : 0x7c00;  // NaN, infinity
        const unsigned found = size >= 0x47800000 ? special : size < 0x38800000 ? subnormal : rounded;
        return {(unsigned short)(found | (word >> 16 & 0x8000))};
    }
#endif
};
