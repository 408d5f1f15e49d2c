// A matrix product of the emulated device: what cuBLAS and cuBLASLt both have.
#pragma once
#include "device.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdarg>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <thread>
#include <vector>

enum Status { SUCCESS = 0, INVALID_VALUE = 7, EXECUTION_FAILED = 13, NOT_SUPPORTED = 15 };  // of cublasStatus_t
enum Type { FLOAT = 0, DOUBLE = 1, HALF = 2 };                                               // of cudaDataType_t
enum Compute { FLOAT_SUMS = 68, FLOAT_PEDANTIC = 69, DOUBLE_SUMS = 70, DOUBLE_PEDANTIC = 71, TF32 = 77 };
enum Epilogue {  // bits of cublasLtEpilogue_t
    DEFAULT = 1, RELU = 2, BIAS = 4, DRELU = 8, BGRAD = 16, AUX = 128, BGRADA = 256, BGRADB = 512
};

// Says what the program did wrong, or what is not emulated; the status is what the caller is to return.
[[gnu::format(printf, 2, 3)]] inline int fault(int status, const char* format, ...) {
    char sentence[512];
    va_list rest;
    va_start(rest, format);
    vsnprintf(sentence, sizeof sentence, format, rest);
    va_end(rest);
    emulated_fault(sentence);
    return status;
}

inline size_t bytes_of(int type) { return type == DOUBLE ? 8 : type == HALF ? 2 : 4; }

template <class T> T load(const void* at, int type, size_t i) {
    if (type == DOUBLE) return static_cast<T>(static_cast<const double*>(at)[i]);
    if (type == FLOAT) return static_cast<T>(static_cast<const float*>(at)[i]);
    return static_cast<T>(static_cast<const _Float16*>(at)[i]);
}

template <class T> void store(void* at, int type, size_t i, T value) {
    if (type == DOUBLE) static_cast<double*>(at)[i] = value;
    else if (type == FLOAT) static_cast<float*>(at)[i] = static_cast<float>(value);
    else static_cast<_Float16*>(at)[i] = static_cast<_Float16>(value);
}

// Bytes in memory that some call reads or writes.
inline bool in_memory(const char* call, const char* name, const void* at, size_t bytes) {
    uint64_t first = 0, last = 0;
    const auto address = reinterpret_cast<uint64_t>(at);
    if (emulated_range(address, &first, &last) && bytes <= last - address) return true;
    fault(0, "%s: %s at %p is not %zu bytes of device memory", call, name, at, bytes);
    return false;
}

// A matrix by columns; with `turned` the product takes its transpose.
struct Matrix {
    const char* name = "";
    void* at = nullptr;
    int type = FLOAT;
    long rows = 0, columns = 0, stride = 0;
    bool turned = false;

    size_t bytes() const { return ((columns - 1) * stride + rows) * bytes_of(type); }
    long height() const { return turned ? columns : rows; }
    long width() const { return turned ? rows : columns; }
    long down() const { return turned ? stride : 1; }
    long across() const { return turned ? 1 : stride; }
};

// TF32 keeps ten bits of mantissa; the nearest, and of two the even one.
inline float to_tf32(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if ((bits & 0x7f800000) != 0x7f800000) bits = (bits + 0xfff + (bits >> 13 & 1)) & 0xffffe000;
    memcpy(&x, &bits, 4);
    return x;
}

// Rows of a factor in panels of `width`, zeros beyond the last: panel by panel, each by the dimension that is summed.
template <class T, class Stored>
void pack(T* to, const Stored* from, long rows, long depth, long down, long across, long width, bool tf32) {
    for (long first = 0; first < rows; first += width) {
        for (long p = 0; p < depth; p++, to += width) {
            for (long i = 0; i < width; i++) {
                const T x = first + i < rows ? static_cast<T>(from[(first + i) * down + p * across]) : T(0);
                to[i] = tf32 ? static_cast<T>(to_tf32(static_cast<float>(x))) : x;
            }
        }
    }
}

template <class T>
void pack(T* to, const void* at, int type, long offset, long rows, long depth, long down, long across, long width,
          bool tf32) {
    if (type == DOUBLE) pack(to, static_cast<const double*>(at) + offset, rows, depth, down, across, width, tf32);
    else if (type == FLOAT) pack(to, static_cast<const float*>(at) + offset, rows, depth, down, across, width, tf32);
    else pack(to, static_cast<const _Float16*>(at) + offset, rows, depth, down, across, width, tf32);
}

// One tile of the product: two vectors of rows and six columns, which fit in the sixteen registers of AVX.
template <class T> struct Tile {
    typedef T Vector __attribute__((vector_size(32), aligned(sizeof(T)), may_alias));
    static constexpr long LANES = 32 / sizeof(T), ROWS = 2 * LANES, COLUMNS = 6;

    static void add(const T* a, const T* b, long depth, T* to, long stride, long rows, long columns) {
        Vector sums[COLUMNS][2] = {};
        for (long p = 0; p < depth; p++, a += ROWS, b += COLUMNS) {
            const Vector low = *reinterpret_cast<const Vector*>(a), high = *reinterpret_cast<const Vector*>(a + LANES);
            for (long j = 0; j < COLUMNS; j++) {
                sums[j][0] += low * b[j];
                sums[j][1] += high * b[j];
            }
        }
        for (long j = 0; j < columns; j++) {
            for (long i = 0; i < rows; i++) to[j * stride + i] += sums[j][i / LANES][i % LANES];
        }
    }
};

// op(A) op(B) by columns. The sum goes by `depth` terms at a time: another depth, other last bits.
template <class T> std::vector<T> multiply(const Matrix& A, const Matrix& B, long depth, bool tf32) {
    using Tile = ::Tile<T>;
    const long m = A.height(), n = B.width(), k = A.width();
    auto panels = [](long rows, long width) { return (rows + width - 1) / width; };
    std::vector<T> total(m * n), a(panels(m, Tile::ROWS) * Tile::ROWS * std::min(k, depth)),
        b(panels(n, Tile::COLUMNS) * Tile::COLUMNS * std::min(k, depth));
    for (long p = 0; p < k; p += depth) {
        const long terms = std::min(depth, k - p);
        pack(a.data(), A.at, A.type, p * A.across(), m, terms, A.down(), A.across(), Tile::ROWS, tf32);
        pack(b.data(), B.at, B.type, p * B.down(), n, terms, B.across(), B.down(), Tile::COLUMNS, tf32);
        for (long i = 0; i < m; i += Tile::ROWS) {
            for (long j = 0; j < n; j += Tile::COLUMNS) {
                Tile::add(&a[i * terms], &b[j * terms], terms, &total[j * m + i], m, std::min(Tile::ROWS, m - i),
                          std::min(Tile::COLUMNS, n - j));
            }
        }
    }
    return total;
}

// What both libraries launch: D = epilogue(alpha op(A) op(B) + beta C).
struct Product {
    const char* call;
    Matrix A, B, C, D;
    int compute = FLOAT_SUMS;
    const void* alpha_at = nullptr;  // null: the numbers below
    const void* beta_at = nullptr;
    double alpha = 1, beta = 0;
    uint32_t epilogue = DEFAULT;
    void* vector = nullptr;  // bias, or its gradient
    uint8_t* mask = nullptr;  // ReLU's, a bit for an element of D
    long mask_stride = 0;     // in bits
    void* workspace = nullptr;
    size_t workspace_bytes = 0;
    long depth = 256;
    int microseconds = 0;  // that it takes at least
    bool relu_of_nan = true, whole_bias = true, whole_sums = true;  // false: a fault that a library might have

    bool in_double() const { return compute == DOUBLE_SUMS || compute == DOUBLE_PEDANTIC; }
    long vector_length() const { return epilogue & BGRADB ? D.columns : D.rows; }

    // Whether everything that it touches is device memory.
    bool in_memory() const {
        auto is = [this](const char* name, const void* at, size_t bytes) {
            return ::in_memory(call, name, at, bytes);
        };
        const size_t scalar = in_double() ? 8 : 4;
        return is("A", A.at, A.bytes()) && is("B", B.at, B.bytes()) && is("D", D.at, D.bytes()) &&
               (!alpha_at || is("alpha", alpha_at, scalar)) && (!beta_at || is("beta", beta_at, scalar)) &&
               (!(beta_at || beta != 0) || is("C", C.at, C.bytes())) &&
               (!(epilogue & (BIAS | BGRAD | BGRADA | BGRADB)) ||
                is("the vector of the epilogue", vector, vector_length() * bytes_of(D.type))) &&
               (!(epilogue & AUX) ||
                is("the mask of the epilogue", mask, ((D.columns - 1) * mask_stride + D.rows + 7) / 8)) &&
               (!workspace_bytes || is("the workspace", workspace, workspace_bytes));
    }

    void run() const {
        if (!in_memory()) return;  // what was memory when it was launched, or captured, may have been freed since
        if (microseconds) std::this_thread::sleep_for(std::chrono::microseconds(microseconds));
        if (workspace_bytes) memset(workspace, 0xA5, workspace_bytes);
        if (in_double()) finish<double>();
        else finish<float>();
    }

    template <class T> void finish() const {
        const std::vector<T> total = multiply<T>(A, B, depth, compute == TF32);
        const T scale = alpha_at ? *static_cast<const T*>(alpha_at) : static_cast<T>(alpha);
        const T kept = beta_at ? *static_cast<const T*>(beta_at) : static_cast<T>(beta);
        std::vector<T> sums(epilogue & BGRAD ? D.rows : 0);
        for (long j = 0; j < D.columns; j++) {
            const bool biased = epilogue & BIAS && (whole_bias || j + 1 < D.columns);
            for (long i = 0; i < D.rows; i++) {
                T x = scale * total[j * D.rows + i];
                if (kept != 0) x += kept * load<T>(C.at, C.type, j * C.stride + i);
                if (biased) x += load<T>(vector, D.type, i);
                const long bit = epilogue & AUX ? j * mask_stride + i : 0;
                const auto place = static_cast<uint8_t>(1 << bit % 8);
                if (epilogue & RELU) {
                    const bool passes = x > 0 || (std::isnan(x) && relu_of_nan);
                    if (epilogue & AUX) mask[bit / 8] = (mask[bit / 8] & ~place) | (passes ? place : 0);
                    if (!passes) x = 0;
                }
                if (epilogue & DRELU && !(mask[bit / 8] & place)) x = 0;
                if (epilogue & BGRAD && (whole_sums || j + 1 < D.columns)) sums[i] += x;
                store(D.at, D.type, j * D.stride + i, x);
            }
        }
        for (size_t i = 0; i < sums.size(); i++) store(vector, D.type, i, sums[i]);
        if (epilogue & BGRADA) sum_factor<T>(A, A.height(), A.down(), A.width(), A.across());
        if (epilogue & BGRADB) sum_factor<T>(B, B.width(), B.across(), B.height(), B.down());
    }

    // The vector: a factor's sums over the dimension that the product sums over.
    template <class T> void sum_factor(const Matrix& x, long length, long step, long terms, long along) const {
        for (long i = 0; i < length; i++) {
            T sum = 0;
            for (long p = 0; p < terms - !whole_sums; p++) sum += load<T>(x.at, x.type, i * step + p * along);
            store(vector, D.type, i, sum);
        }
    }
};

// Puts a product into a stream.
inline int enqueue(const Product& product, void* stream) {
    auto run = [](void* context) { static_cast<Product*>(context)->run(); };
    auto release = [](void* context) { delete static_cast<Product*>(context); };
    if (!product.in_memory()) return EXECUTION_FAILED;
    const int error = emulated_enqueue_owned(stream, run, new Product(product), release, product.call);
    return error ? EXECUTION_FAILED : SUCCESS;
}
