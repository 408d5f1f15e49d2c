// Activations, one element at a time, for the GPU and the compiled CPU form alike: y = f(x), and dy f'(x) by
// what forward keeps of it. That is y itself, or with KEEPS the derivative. T is float or double; p is a parameter.
// Before this text stand math.cuh and normal_tail(x), the tail of the normal distribution over exp(-x²/2): see
// normal_tail_source() in gpubatch/ops.py.

struct Identity {
    static constexpr bool KEEPS = false;
    __device__ static T f(T x, T, T&) { return x; }
    __device__ static T gradient(T dy, T, T) { return dy; }
};

struct Step {
    static constexpr bool KEEPS = false;
    __device__ static T f(T x, T, T&) { return x > 0 ? 1 : 0; }
    __device__ static T gradient(T, T, T) { return 0; }
};

struct ReLU {
    static constexpr bool KEEPS = false;
    __device__ static T f(T x, T, T&) { return larger_of(x, T(0)); }
    __device__ static T gradient(T dy, T y, T) { return dy * (y > 0 ? T(1) : T(0)); }
};

struct LeakyReLU {
    static constexpr bool KEEPS = false;
    __device__ static T f(T x, T p, T&) { return larger_of(x, p * x); }
    __device__ static T gradient(T dy, T y, T p) { return dy * (y > 0 ? T(1) : p); }
};

struct Sigmoid {
    static constexpr bool KEEPS = false;
    __device__ static T f(T x, T, T&) { return 1 / (1 + exp(-x)); }
    __device__ static T gradient(T dy, T y, T) { return dy * (y * (1 - y)); }
};

struct Tanh {
    static constexpr bool KEEPS = false;
    __device__ static T f(T x, T, T&) { return tanh(x); }
    __device__ static T gradient(T dy, T y, T) { return dy * (1 - y * y); }
};

struct GELU {
    static constexpr bool KEEPS = true;
    __device__ static T f(T x, T, T& derivative) {
        const T density = exp(T(-0.5) * x * x);  // times sqrt(2 pi)
        const T tail = normal_tail(fabs(x)) * density;
        const T below = x < 0 ? tail : 1 - tail;
        derivative = below + x * density * T(0.3989422804014327);
        return x * below;
    }
    __device__ static T gradient(T dy, T kept, T) { return dy * kept; }
};

struct GELUTanh {
    static constexpr bool KEEPS = true;
    __device__ static T f(T x, T, T& derivative) {
        const T k = T(0.7978845608028654), cubic = T(0.044715);
        const T square = x * x;
        const T t = tanh(x * (k + k * cubic * square));
        derivative = T(0.5) * (1 + t + x * (1 - t * t) * (k + 3 * k * cubic * square));
        return x * (T(0.5) * (1 + t));
    }
    __device__ static T gradient(T dy, T kept, T) { return dy * kept; }
};
