// cuBLAS of the emulated device: the functions that CuPy's products of matrices and of vectors call.
#include "blas.h"

namespace {

struct Handle {
    void* stream = nullptr;
    int math = 0;     // cublasMath_t
    int pointers = 0;  // 0: numbers are given, and taken, in host memory; 1: in device memory
};

struct Sizes {
    int m, n, k, batch = 1;
};

struct Operand {
    const void* at;
    int type, stride;
    long long apart = 0;  // elements between the matrices of a batch
    int turned = 0;
};

int multiply(const char* call, Handle* handle, Sizes sizes, const void* alpha, Operand a, Operand b, const void* beta,
             Operand c, int compute) {
    if (compute != FLOAT_SUMS && compute != FLOAT_PEDANTIC && compute != DOUBLE_SUMS && compute != DOUBLE_PEDANTIC &&
        compute != TF32)
        return fault(NOT_SUPPORTED, "%s: the compute type %d is not emulated", call, compute);
    for (const Operand& x : {a, b, c}) {
        if (x.type < FLOAT || x.type > HALF)
            return fault(NOT_SUPPORTED, "%s: elements of cudaDataType %d are not emulated", call, x.type);
        if (x.turned < 0 || x.turned > 1)
            return fault(NOT_SUPPORTED, "%s: the operation %d is not emulated", call, x.turned);
    }
    const auto [m, n, k, batch] = sizes;
    if (m < 0 || n < 0 || k < 0 || batch < 0 || a.stride < std::max(1, a.turned ? k : m) ||
        b.stride < std::max(1, b.turned ? n : k) || c.stride < std::max(1, m))
        return fault(INVALID_VALUE, "%s: %d x %d x %d does not fit strides of %d, %d and %d", call, m, n, k, a.stride,
                     b.stride, c.stride);
    if (k == 0 && m && n && batch) return fault(NOT_SUPPORTED, "%s: a sum of no terms is not emulated", call);
    for (int i = 0; m && n && i < batch; i++) {
        auto matrix = [i](const char* name, Operand x, long rows, long columns) {
            const char* at = static_cast<const char*>(x.at) + i * x.apart * static_cast<long long>(bytes_of(x.type));
            return x.turned ? Matrix{name, const_cast<char*>(at), x.type, columns, rows, x.stride, true}
                            : Matrix{name, const_cast<char*>(at), x.type, rows, columns, x.stride, false};
        };
        Product product{call, matrix("A", a, m, k), matrix("B", b, k, n), matrix("C", c, m, n), matrix("C", c, m, n)};
        product.compute = compute;
        if (handle->pointers) {
            product.alpha_at = alpha;
            product.beta_at = beta;
        } else {
            product.alpha = load<double>(alpha, product.in_double() ? DOUBLE : FLOAT, 0);
            product.beta = load<double>(beta, product.in_double() ? DOUBLE : FLOAT, 0);
        }
        if (const int status = enqueue(product, handle->stream)) return status;
    }
    return SUCCESS;
}

// A sum of products of two vectors, that is put into device memory.
template <class T>
int dot(const char* call, Handle* handle, int n, const T* x, int x_step, const T* y, int y_step, T* to) {
    struct Work {
        const char* call;
        const T *x, *y;
        T* to;
        long n, x_step, y_step;
        bool in_memory() const {
            return ::in_memory(call, "x", x, ((n - 1) * x_step + 1) * sizeof(T)) &&
                   ::in_memory(call, "y", y, ((n - 1) * y_step + 1) * sizeof(T)) &&
                   ::in_memory(call, "the result", to, sizeof(T));
        }
    };
    if (!handle->pointers) return fault(NOT_SUPPORTED, "%s: a result in host memory is not emulated", call);
    if (n < 1 || x_step < 1 || y_step < 1)
        return fault(NOT_SUPPORTED, "%s: %d elements %d and %d apart are not emulated", call, n, x_step, y_step);
    const Work work{call, x, y, to, n, x_step, y_step};
    if (!work.in_memory()) return EXECUTION_FAILED;
    auto run = [](void* context) {
        const Work& w = *static_cast<Work*>(context);
        if (!w.in_memory()) return;
        T sum = 0;
        for (long i = 0; i < w.n; i++) sum += w.x[i * w.x_step] * w.y[i * w.y_step];
        *w.to = sum;
    };
    auto release = [](void* context) { delete static_cast<Work*>(context); };
    return emulated_enqueue_owned(handle->stream, run, new Work(work), release, call) ? EXECUTION_FAILED : SUCCESS;
}

}  // namespace

extern "C" {

int cublasCreate_v2(Handle** handle) { return *handle = new Handle, SUCCESS; }
int cublasDestroy_v2(Handle* handle) { return delete handle, SUCCESS; }
int cublasGetVersion_v2(Handle*, int* version) { return *version = CUDA_MAJOR * 10000 + 900, SUCCESS; }
int cublasSetStream_v2(Handle* handle, void* stream) { return handle->stream = stream, SUCCESS; }
int cublasGetStream_v2(Handle* handle, void** stream) { return *stream = handle->stream, SUCCESS; }
int cublasSetMathMode(Handle* handle, int mode) {
    if (mode != 0 && mode != 1) return fault(NOT_SUPPORTED, "cublasSetMathMode: mode %d is not emulated", mode);
    return handle->math = mode, SUCCESS;  // the default, or the old name of what is the default since
}
int cublasGetMathMode(Handle* handle, int* mode) { return *mode = handle->math, SUCCESS; }
int cublasSetPointerMode_v2(Handle* handle, int mode) { return handle->pointers = mode, SUCCESS; }
int cublasGetPointerMode_v2(Handle* handle, int* mode) { return *mode = handle->pointers, SUCCESS; }

int cublasGemmEx(Handle* handle, int ta, int tb, int m, int n, int k, const void* alpha, const void* a, int a_type,
                 int lda, const void* b, int b_type, int ldb, const void* beta, void* c, int c_type, int ldc,
                 int compute, int) {
    return multiply("cublasGemmEx", handle, {m, n, k}, alpha, {a, a_type, lda, 0, ta}, {b, b_type, ldb, 0, tb}, beta,
                    {c, c_type, ldc}, compute);
}

int cublasGemmStridedBatchedEx(Handle* handle, int ta, int tb, int m, int n, int k, const void* alpha, const void* a,
                               int a_type, int lda, long long a_apart, const void* b, int b_type, int ldb,
                               long long b_apart, const void* beta, void* c, int c_type, int ldc, long long c_apart,
                               int batch, int compute, int) {
    return multiply("cublasGemmStridedBatchedEx", handle, {m, n, k, batch}, alpha, {a, a_type, lda, a_apart, ta},
                    {b, b_type, ldb, b_apart, tb}, beta, {c, c_type, ldc, c_apart}, compute);
}

int cublasSdot_v2(Handle* handle, int n, const float* x, int x_step, const float* y, int y_step, float* to) {
    return dot("cublasSdot", handle, n, x, x_step, y, y_step, to);
}

int cublasDdot_v2(Handle* handle, int n, const double* x, int x_step, const double* y, int y_step, double* to) {
    return dot("cublasDdot", handle, n, x, x_step, y, y_step, to);
}
}
