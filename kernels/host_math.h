// exp and tanh as plain arithmetic, so that a compiler makes SIMD of the loops that call them. T is float or double.
// They are within three units of the last place, and give infinity, zero and NaN where the library's functions do.

static inline float power_of_two(float, int n) {
    const int bits = (n + 127) << 23;
    float y;
    __builtin_memcpy(&y, &bits, sizeof y);
    return y;
}

static inline double power_of_two(double, int n) {
    const long long bits = (long long)(n + 1023) << 52;
    double y;
    __builtin_memcpy(&y, &bits, sizeof y);
    return y;
}

// expm1(r) and two factors of 2^n, where x = n ln 2 + r and |r| <= ln 2 / 2. Two, since 2^n alone may lie outside the
// range of normal numbers where the result does not.
struct Reduced {
    T p, low, high;
};

static inline Reduced reduced(T x) {
    constexpr bool SINGLE = sizeof(T) == 4;
    const T top = SINGLE ? T(89) : T(710), bottom = SINGLE ? T(-104) : T(-746);  // beyond, exp is infinite or zero
    x = x > top ? top : x;
    x = x < bottom ? bottom : x;
    const T shift = SINGLE ? T(12582912.0) : T(6755399441055744.0);  // 1.5 2^23, 1.5 2^52: adding it rounds
    const T n = (x * T(1.4426950408889634) + shift) - shift;
    // ln 2 in two pieces, the first of so few bits that n times it is exact.
    const T r = SINGLE ? (x - n * T(0.693359375)) + n * T(2.12194440054690583e-4)
                       : (x - n * T(0.693147180369123816490)) - n * T(1.90821492927058770002e-10);
    // The series, to where its next term is below a unit of rounding.
    T p = SINGLE ? T(0) : T(1.0 / 6227020800);
    if (!SINGLE) {
        p = p * r + T(1.0 / 479001600);
        p = p * r + T(1.0 / 39916800);
        p = p * r + T(1.0 / 3628800);
        p = p * r + T(1.0 / 362880);
        p = p * r + T(1.0 / 40320);
    }
    p = p * r + T(1.0 / 5040);
    p = p * r + T(1.0 / 720);
    p = p * r + T(1.0 / 120);
    p = p * r + T(1.0 / 24);
    p = p * r + T(1.0 / 6);
    p = p * r + T(0.5);
    p = p * r * r + r;
    const int whole = (int)n, half = whole / 2;
    return {p, power_of_two(T(), half), power_of_two(T(), whole - half)};
}

static inline T exp(T x) {
    const Reduced e = reduced(x);
    const T y = (e.p + 1) * e.low * e.high;
    return x != x ? x : y;
}

static inline T tanh(T x) {
    const T most = sizeof(T) == 4 ? T(10) : T(20);  // 1 from here on
    T a = x < 0 ? -x : x;
    a = a > most ? most : a;
    const Reduced e = reduced(2 * a);
    const T power = e.low * e.high;
    const T m = power * e.p + (power - 1);  // expm1(2 a)
    const T y = m / (m + 2);
    return x != x ? x : x < 0 ? -y : y;
}
