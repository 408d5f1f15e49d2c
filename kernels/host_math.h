// The functions of formulas for one element type T, float or double, that math.cuh does not have. exp, tanh, log and
// log1p are plain arithmetic, so that the compiler vectorises loops that call them: errors are within three units of the
// last place; infinity, zero and NaN result as from the library's functions.

static inline float fabs(float x) { return __builtin_fabsf(x); }
static inline double fabs(double x) { return __builtin_fabs(x); }
static inline float sqrt(float x) { return __builtin_sqrtf(x); }
static inline double sqrt(double x) { return __builtin_sqrt(x); }
static inline float pow(float x, float y) { return __builtin_powf(x, y); }
static inline double pow(double x, double y) { return __builtin_pow(x, y); }
static inline float floor(float x) { return __builtin_floorf(x); }
static inline double floor(double x) { return __builtin_floor(x); }
static inline float fmod(float x, float y) { return __builtin_fmodf(x, y); }
static inline double fmod(double x, double y) { return __builtin_fmod(x, y); }
static inline float copysign(float x, float y) { return __builtin_copysignf(x, y); }
static inline double copysign(double x, double y) { return __builtin_copysign(x, y); }

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

// p = expm1(r) and 2^n = low * high, where x = n ln 2 + r and |r| <= ln 2 / 2. 2^n has two factors because it may leave
// the range of normal numbers even if the result does not.
struct Reduced {
    T p, low, high;
};

static inline Reduced reduced(T x) {
    constexpr bool SINGLE = sizeof(T) == 4;
    const T top = SINGLE ? T(89) : T(710), bottom = SINGLE ? T(-104) : T(-746);  // beyond these, exp is infinite or 0
    x = x > top ? top : x;
    x = x < bottom ? bottom : x;
    const T shift = SINGLE ? T(12582912.0) : T(6755399441055744.0);  // 1.5 2^23, 1.5 2^52: adding them rounds
    const T n = (x * T(1.4426950408889634) + shift) - shift;
    // ln 2 in two pieces; the first has so few bits that its product with n is exact.
    const T r = SINGLE ? (x - n * T(0.693359375)) + n * T(2.12194440054690583e-4)
                       : (x - n * T(0.693147180369123816490)) - n * T(1.90821492927058770002e-10);
    // The Taylor series, until the next term is below rounding.
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
    const T most = sizeof(T) == 4 ? T(10) : T(20);  // tanh is 1 above this
    T a = x < 0 ? -x : x;
    a = a > most ? most : a;
    const Reduced e = reduced(2 * a);
    const T power = e.low * e.high;
    const T m = power * e.p + (power - 1);  // expm1(2 a)
    const T y = m / (m + 2);
    return x != x ? x : x < 0 ? -y : y;
}

static inline int exponent_bits(float x) {
    int bits;
    __builtin_memcpy(&bits, &x, sizeof bits);
    return bits;
}

static inline long long exponent_bits(double x) {
    long long bits;
    __builtin_memcpy(&bits, &x, sizeof bits);
    return bits;
}

static inline float from_bits(int bits) {
    float x;
    __builtin_memcpy(&x, &bits, sizeof x);
    return x;
}

static inline double from_bits(long long bits) {
    double x;
    __builtin_memcpy(&x, &bits, sizeof x);
    return x;
}

// x = m 2^n with m from sqrt(1/2) to sqrt(2); with s = (m - 1)/(m + 1), log m = 2 (s + s³/3 + s⁵/5 + ...).
static inline T log(T x) {
    constexpr bool SINGLE = sizeof(T) == 4;
    typedef decltype(exponent_bits(T())) Bits;
    constexpr int MANTISSA = SINGLE ? 23 : 52, BIAS = SINGLE ? 127 : 1023;
    const T normal = SINGLE ? T(1.17549435e-38) : T(2.2250738585072014e-308);  // the smallest normal number
    const T larger = x < normal ? x * (SINGLE ? T(16777216.0) : T(18014398509481984.0)) : x;  // times 2^24, 2^54
    const Bits bits = exponent_bits(larger), half = exponent_bits(T(0.70710678118654752));
    const Bits n = (bits - half) >> MANTISSA;
    const T m = from_bits(bits - (n << MANTISSA));
    const T s = (m - 1) / (m + 1), square = s * s;
    T p = 0;
    if (!SINGLE) {
        p = p * square + T(2.0 / 21);
        p = p * square + T(2.0 / 19);
        p = p * square + T(2.0 / 17);
        p = p * square + T(2.0 / 15);
        p = p * square + T(2.0 / 13);
    }
    p = p * square + T(2.0 / 11);
    p = p * square + T(2.0 / 9);
    p = p * square + T(2.0 / 7);
    p = p * square + T(2.0 / 5);
    p = p * square + T(2.0 / 3);
    const T whole = (T)n - (x < normal ? (SINGLE ? T(24) : T(54)) : T(0));
    // ln 2 in two pieces, as in exp.
    const T high = SINGLE ? T(0.693359375) : T(0.693147180369123816490);
    const T low = SINGLE ? T(-2.12194440054690583e-4) : T(1.90821492927058770002e-10);
    const T y = whole * high + (2 * s + (p * square * s + whole * low));
    const T infinity = T(__builtin_inf());
    return x == infinity || x != x ? x : x > 0 ? y : x == 0 ? -infinity : T(__builtin_nan(""));
}

// Kahan's formula: the quotient corrects the rounding error of 1 + x.
static inline T log1p(T x) {
    const T sum = 1 + x, of_sum = log(sum);
    const T y = of_sum * (x / (sum - 1));
    return sum == 1 ? x : sum - sum != 0 ? of_sum : y;
}
