// What all loops of the kernels for the CPU share. No includes: a formula of the user's own is compiled from this text,
// too (gpubatch/ops/host_source.py).

typedef long long Int;

#define __device__

// A loop whose iterations are independent, even if x and y are the same array. With EACH_ROLLED the elements after the
// last whole register remain a loop, and are not written out one by one: half the code, where there are many formulas.
#if defined(__clang__)
#define EACH _Pragma("clang loop vectorize(assume_safety)")
#define EACH_ROLLED EACH
#else
#define EACH _Pragma("GCC ivdep")
#define EACH_ROLLED EACH _Pragma("GCC unroll 1")
#endif

// Bytes of a SIMD register.
#if defined(__AVX512F__)
#define REGISTER 64
#elif defined(__AVX__)
#define REGISTER 32
#else
#define REGISTER 16
#endif
