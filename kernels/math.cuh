// Functions of formulas that C++ lacks; they propagate NaN as NumPy does.

__device__ inline T sign_of(T x) { return x > 0 ? T(1) : x < 0 ? T(-1) : x == 0 ? T(0) : x; }
__device__ inline T larger_of(T x, T y) { return x > y || x != x ? x : y; }
__device__ inline T smaller_of(T x, T y) { return x < y || x != x ? x : y; }
__device__ inline T select(bool condition, T x, T y) { return condition ? x : y; }
__device__ inline bool both(bool x, bool y) { return x & y; }
__device__ inline bool either(bool x, bool y) { return x | y; }
__device__ inline bool not_so(bool x) { return !x; }

// As in NumPy and Python, the quotient is rounded down and the remainder has the sign of y.
__device__ inline T remainder_of(T x, T y) {
    const T r = fmod(x, y);
    if (r == 0) return copysign(T(0), y);
    return (y < 0) != (r < 0) ? r + y : r;
}
__device__ inline T floor_quotient(T x, T y) {
    if (y == 0) return x / y;
    const T r = fmod(x, y);
    const T q = (x - r) / y - (r != 0 && (y < 0) != (r < 0) ? T(1) : T(0));
    if (q == 0) return copysign(T(0), x / y);
    const T below = floor(q);
    return q - below > T(0.5) ? below + 1 : below;
}
