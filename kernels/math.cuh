// Functions that formulas call and that C++ lacks; NaN passes through each as it does in NumPy.

__device__ inline T sign_of(T x) { return x > 0 ? T(1) : x < 0 ? T(-1) : x == 0 ? T(0) : x; }
__device__ inline T larger_of(T x, T y) { return x > y || x != x ? x : y; }
__device__ inline T smaller_of(T x, T y) { return x < y || x != x ? x : y; }
__device__ inline T select(bool condition, T x, T y) { return condition ? x : y; }
