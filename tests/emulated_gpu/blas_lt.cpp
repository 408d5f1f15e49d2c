// cuBLASLt of the emulated device: descriptors, a heuristic with several algorithms to offer, epilogues.
//
// Numbers, sizes and defaults are those of cublasLt.h.
#include "blas.h"

#include <mutex>
#include <set>

namespace {

constexpr uint64_t MARK = 0x646574616c756d65;  // "emulated": the first word of every algorithm of ours

// What the heuristic can offer, its best first: how many terms are summed at a time, and the workspace it takes.
struct Algorithm {
    long depth;
    size_t workspace;
};
constexpr Algorithm ALGORITHMS[] = {{256, 64 << 10}, {128, 0},         {64, 1 << 20},  {32, 256 << 10},
                                    {16, 4 << 20},   {8, 0},           {4, 128 << 10}, {2, 32 << 20},
                                    {1, 0}};
constexpr int COUNT = sizeof ALGORITHMS / sizeof *ALGORITHMS;

}  // namespace

// For tests: what this library is to do wrong, and how slow its algorithms are.
extern "C" {
struct {
    uint32_t lacks[8];        // epilogues for which the heuristic finds nothing
    int relu_of_nan;          // 0: ReLU hides NaN
    int whole_bias;           // 0: the last column goes without
    int whole_sums;           // 0: the last term of a gradient of a bias is left out
    int microseconds[COUNT];  // that an algorithm takes at least
    int version;
} emulated_lt = {{}, 1, 1, 1, {}, CUDA_MAJOR * 10000 + 903};
}

namespace {

std::mutex of_living;
std::set<const void*> living;  // handles and descriptors

template <class T, class... Given> int create(T** to, Given&&... given) {
    *to = new T{std::forward<Given>(given)...};
    std::lock_guard lock(of_living);
    living.insert(*to);
    return SUCCESS;
}

bool lives(const char* call, const void* descriptor) {
    std::lock_guard lock(of_living);
    return living.count(descriptor) || fault(0, "%s: %p is no handle or descriptor, or no longer", call, descriptor);
}

template <class T> int destroy(const char* call, T* descriptor) {
    if (!lives(call, descriptor)) return INVALID_VALUE;
    std::lock_guard lock(of_living);
    living.erase(descriptor);
    return delete descriptor, SUCCESS;
}

struct Attribute {
    int number;
    size_t bytes;
    uint64_t value;
};

// A descriptor: attributes that have sizes, which are checked.
struct Descriptor {
    std::vector<Attribute> attributes;

    Attribute* find(int number) {
        for (Attribute& x : attributes)
            if (x.number == number) return &x;
        return nullptr;
    }
    template <class T = int> T get(int number) { return (T)find(number)->value; }
};

struct Handle : Descriptor {};
struct Operation : Descriptor {};
struct Layout : Descriptor {};
struct Preference : Descriptor {};

enum { COMPUTE_TYPE = 0, SCALE_TYPE = 1, POINTER_MODE = 2, TRANSA = 3, TRANSB = 4, TRANSC = 5, FILL_MODE = 6 };
enum { EPILOGUE = 7, BIAS_POINTER = 8, AUX_POINTER = 11, AUX_LD = 12 };
enum { TYPE = 0, ORDER = 1, ROWS = 2, COLS = 3, LD = 4, BATCH_COUNT = 5, BATCH_OFFSET = 6 };
enum { SEARCH_MODE = 0, MAX_WORKSPACE = 1, REDUCTION_SCHEME = 3, MIN_ALIGNMENT_A = 5, IMPL_MASK = 12 };

int set(const char* call, Descriptor* descriptor, int number, const void* from, size_t bytes) {
    if (!lives(call, descriptor)) return INVALID_VALUE;
    Attribute* attribute = descriptor->find(number);
    if (!attribute) return fault(NOT_SUPPORTED, "%s: attribute %d is not emulated", call, number);
    if (!from || bytes != attribute->bytes)
        return fault(INVALID_VALUE, "%s: attribute %d has %zu bytes, not %zu", call, number, attribute->bytes, bytes);
    attribute->value = 0;
    memcpy(&attribute->value, from, bytes);
    return SUCCESS;
}

int get(const char* call, Descriptor* descriptor, int number, void* to, size_t bytes, size_t* written) {
    if (!lives(call, descriptor)) return INVALID_VALUE;
    const Attribute* attribute = descriptor->find(number);
    if (!attribute) return fault(NOT_SUPPORTED, "%s: attribute %d is not emulated", call, number);
    if (bytes == 0 && written) return *written = attribute->bytes, SUCCESS;
    if (!to || bytes != attribute->bytes)
        return fault(INVALID_VALUE, "%s: attribute %d has %zu bytes, not %zu", call, number, attribute->bytes, bytes);
    memcpy(to, &attribute->value, bytes);
    if (written) *written = bytes;
    return SUCCESS;
}

struct Problem {
    Operation* operation;
    Layout *a, *b, *c, *d;
};

// The product without its addresses; a status where cuBLASLt has no such product.
int describe(const char* call, Handle* handle, const Problem& problem, Product& product) {
    auto [op, a, b, c, d] = problem;
    for (const void* x : {(void*)handle, (void*)op, (void*)a, (void*)b, (void*)c, (void*)d})
        if (!lives(call, x)) return INVALID_VALUE;
    auto matrix = [](const char* name, Layout* x, bool turned) {
        return Matrix{name, nullptr, x->get(TYPE), x->get<long>(ROWS), x->get<long>(COLS), x->get<long>(LD), turned};
    };
    product.call = call;
    product.A = matrix("A", a, op->get(TRANSA));
    product.B = matrix("B", b, op->get(TRANSB));
    product.C = matrix("C", c, false);
    product.D = matrix("D", d, false);
    product.compute = op->get(COMPUTE_TYPE);
    product.epilogue = op->get<uint32_t>(EPILOGUE);
    product.mask_stride = op->get<long>(AUX_LD);
    if (op->get(POINTER_MODE) || op->get(TRANSC) || op->get(FILL_MODE) != 2 || op->get(TRANSA) > 1 ||
        op->get(TRANSB) > 1)
        return fault(NOT_SUPPORTED, "%s: this pointer mode, operation or fill mode is not emulated", call);
    for (Layout* x : {a, b, c, d}) {
        if (x->get(ORDER) || x->get(BATCH_COUNT) != 1)
            return fault(NOT_SUPPORTED, "%s: matrices by rows and batches are not emulated", call);
        if (x->get(TYPE) != a->get(TYPE)) return NOT_SUPPORTED;
    }
    const bool twice = product.in_double();
    if (op->get(SCALE_TYPE) != (twice ? DOUBLE : FLOAT) || (product.A.type == DOUBLE) != twice ||
        (product.compute == TF32 && product.A.type != FLOAT))
        return NOT_SUPPORTED;
    const Matrix &A = product.A, &B = product.B, &D = product.D;
    if (A.width() != B.height() || D.rows != A.height() || D.columns != B.width() || product.C.rows != D.rows ||
        product.C.columns != D.columns)
        return INVALID_VALUE;
    if (product.epilogue & AUX && (product.mask_stride % 128 || product.mask_stride < D.rows))
        return fault(INVALID_VALUE, "%s: the mask's columns of %ld bits are %ld apart, which must be a multiple of 128",
                     call, D.rows, product.mask_stride);
    switch (product.epilogue) {
        case DEFAULT: case RELU: case BIAS: case RELU | BIAS: case RELU | AUX: case RELU | AUX | BIAS:
        case DRELU | AUX: case DRELU | AUX | BGRAD: case BGRADA: case BGRADB: return SUCCESS;
        default: return fault(NOT_SUPPORTED, "%s: epilogue %u is not emulated", call, product.epilogue);
    }
}

// cublasLtMatmulAlgo_t, eight words: what an algorithm is for and what was promised to it.
struct Choice {
    uint64_t mark, version, number, problem;
    uint16_t alignment[8];  // of A, B, C, D, the epilogue's vector and its mask
    uint64_t unused[2];
};
static_assert(sizeof(Choice) == 64);

struct Result {  // cublasLtMatmulHeuristicResult_t
    Choice choice;
    size_t workspace;
    int state;
    float waves;
    int reserved[4];
};
static_assert(sizeof(Result) == 96);

uint64_t digest(const Product& p) {
    uint64_t sum = 14695981039346656037u;
    for (const Matrix* x : {&p.A, &p.B, &p.C, &p.D})
        for (long n : {long(x->type), x->rows, x->columns, x->stride, long(x->turned)})
            sum = (sum ^ n) * 1099511628211u;
    for (long n : {long(p.compute), long(p.epilogue), p.mask_stride}) sum = (sum ^ n) * 1099511628211u;
    return sum;
}

// No kernel loads more than 16 bytes of a vector at once.
uint16_t alignment_of(uint64_t address) { return address ? std::min<uint64_t>(16, address & -address) : 16; }

// The algorithm of a choice; null, and a status, if it is none for this product.
const Algorithm* chosen(const Choice& choice, const Product& product, int& status) {
    status = choice.mark != MARK || choice.number >= COUNT  ? INVALID_VALUE
             : choice.version != uint64_t(emulated_lt.version)                   ? NOT_SUPPORTED
             : choice.problem != digest(product)            ? INVALID_VALUE
                                                            : SUCCESS;
    return status ? nullptr : &ALGORITHMS[choice.number];
}

}  // namespace

extern "C" {

size_t emulated_lt_living() {
    std::lock_guard lock(of_living);
    return living.size();
}

size_t cublasLtGetVersion() { return emulated_lt.version; }
size_t cublasLtGetCudartVersion() { return CUDA_MAJOR * 1000; }
int cublasLtCreate(Handle** to) { return create(to); }
int cublasLtDestroy(Handle* handle) { return destroy("cublasLtDestroy", handle); }

const char* cublasLtGetStatusName(int status) {
    switch (status) {
        case SUCCESS: return "CUBLAS_STATUS_SUCCESS";
        case INVALID_VALUE: return "CUBLAS_STATUS_INVALID_VALUE";
        case EXECUTION_FAILED: return "CUBLAS_STATUS_EXECUTION_FAILED";
        case NOT_SUPPORTED: return "CUBLAS_STATUS_NOT_SUPPORTED";
        default: return "a status of no emulated function";
    }
}
const char* cublasLtGetStatusString(int status) { return cublasLtGetStatusName(status); }

int cublasLtMatmulDescCreate(Operation** to, int compute, int scale) {
    return create(to, Descriptor{{{COMPUTE_TYPE, 4, uint64_t(compute)},
                                  {SCALE_TYPE, 4, uint64_t(scale)},
                                  {POINTER_MODE, 4, 0},
                                  {TRANSA, 4, 0},
                                  {TRANSB, 4, 0},
                                  {TRANSC, 4, 0},
                                  {FILL_MODE, 4, 2},
                                  {EPILOGUE, 4, DEFAULT},
                                  {BIAS_POINTER, 8, 0},
                                  {AUX_POINTER, 8, 0},
                                  {AUX_LD, 8, 0}}});
}
int cublasLtMatmulDescDestroy(Operation* x) { return destroy("cublasLtMatmulDescDestroy", x); }
int cublasLtMatmulDescSetAttribute(Operation* x, int number, const void* from, size_t bytes) {
    return set("cublasLtMatmulDescSetAttribute", x, number, from, bytes);
}
int cublasLtMatmulDescGetAttribute(Operation* x, int number, void* to, size_t bytes, size_t* written) {
    return get("cublasLtMatmulDescGetAttribute", x, number, to, bytes, written);
}

int cublasLtMatrixLayoutCreate(Layout** to, int type, uint64_t rows, uint64_t columns, int64_t stride) {
    if (type < FLOAT || type > HALF)
        return fault(NOT_SUPPORTED, "cublasLtMatrixLayoutCreate: elements of cudaDataType %d are not emulated", type);
    if (!rows || !columns || stride < int64_t(rows))
        return fault(INVALID_VALUE, "cublasLtMatrixLayoutCreate: %ld rows, %ld columns, %ld apart", long(rows),
                     long(columns), long(stride));
    return create(to, Descriptor{{{TYPE, 4, uint64_t(type)},
                                  {ORDER, 4, 0},
                                  {ROWS, 8, rows},
                                  {COLS, 8, columns},
                                  {LD, 8, uint64_t(stride)},
                                  {BATCH_COUNT, 4, 1},
                                  {BATCH_OFFSET, 8, 0}}});
}
int cublasLtMatrixLayoutDestroy(Layout* x) { return destroy("cublasLtMatrixLayoutDestroy", x); }
int cublasLtMatrixLayoutSetAttribute(Layout* x, int number, const void* from, size_t bytes) {
    return set("cublasLtMatrixLayoutSetAttribute", x, number, from, bytes);
}
int cublasLtMatrixLayoutGetAttribute(Layout* x, int number, void* to, size_t bytes, size_t* written) {
    return get("cublasLtMatrixLayoutGetAttribute", x, number, to, bytes, written);
}

int cublasLtMatmulPreferenceCreate(Preference** to) {
    return create(to, Descriptor{{{SEARCH_MODE, 4, 0},
                                  {MAX_WORKSPACE, 8, 0},
                                  {REDUCTION_SCHEME, 4, 7},
                                  {MIN_ALIGNMENT_A, 4, 256},
                                  {MIN_ALIGNMENT_A + 1, 4, 256},
                                  {MIN_ALIGNMENT_A + 2, 4, 256},
                                  {MIN_ALIGNMENT_A + 3, 4, 256},
                                  {IMPL_MASK, 8, ~uint64_t(0)}}});
}
int cublasLtMatmulPreferenceDestroy(Preference* x) { return destroy("cublasLtMatmulPreferenceDestroy", x); }
int cublasLtMatmulPreferenceSetAttribute(Preference* x, int number, const void* from, size_t bytes) {
    return set("cublasLtMatmulPreferenceSetAttribute", x, number, from, bytes);
}
int cublasLtMatmulPreferenceGetAttribute(Preference* x, int number, void* to, size_t bytes, size_t* written) {
    return get("cublasLtMatmulPreferenceGetAttribute", x, number, to, bytes, written);
}

int cublasLtMatmulAlgoGetHeuristic(Handle* handle, Operation* operation, Layout* a, Layout* b, Layout* c, Layout* d,
                                   Preference* preference, int wanted, Result* results, int* found) {
    const char* call = "cublasLtMatmulAlgoGetHeuristic";
    Product product;
    if (!results || !found || wanted < 1 || !lives(call, preference)) return INVALID_VALUE;
    *found = 0;
    if (const int status = describe(call, handle, {operation, a, b, c, d}, product)) return status;
    if (preference->get(SEARCH_MODE) || preference->get(REDUCTION_SCHEME) != 7 || ~preference->get<uint64_t>(IMPL_MASK))
        return fault(NOT_SUPPORTED, "%s: a search of less than everything is not emulated", call);
    for (const uint32_t lacking : emulated_lt.lacks)
        if (product.epilogue == lacking) return NOT_SUPPORTED;
    for (uint64_t i = 0; i < COUNT && *found < wanted; i++) {
        if (ALGORITHMS[i].workspace > preference->get<size_t>(MAX_WORKSPACE)) continue;
        Result& result = results[(*found)++];
        result = {};
        result.choice = {MARK, uint64_t(emulated_lt.version), i, digest(product), {}, {}};
        for (int j = 0; j < 4; j++) result.choice.alignment[j] = preference->get<uint16_t>(MIN_ALIGNMENT_A + j);
        // Of these pointers the values stand for how they are aligned.
        result.choice.alignment[4] = alignment_of(operation->get<uint64_t>(BIAS_POINTER));
        result.choice.alignment[5] = alignment_of(operation->get<uint64_t>(AUX_POINTER));
        result.workspace = ALGORITHMS[i].workspace;
        result.waves = 1;
    }
    return *found ? SUCCESS : NOT_SUPPORTED;
}

int cublasLtMatmulAlgoCheck(Handle* handle, Operation* operation, Layout* a, Layout* b, Layout* c, Layout* d,
                            const Choice* choice, Result* result) {
    Product product;
    int status = describe("cublasLtMatmulAlgoCheck", handle, {operation, a, b, c, d}, product);
    if (status) return status;
    const Algorithm* algorithm = chosen(*choice, product, status);
    result->state = status;
    if (algorithm) result->workspace = algorithm->workspace, result->waves = 1;
    return status;
}

int cublasLtMatmul(Handle* handle, Operation* operation, const void* alpha, const void* a, Layout* a_layout,
                   const void* b, Layout* b_layout, const void* beta, const void* c, Layout* c_layout, void* d,
                   Layout* d_layout, const Choice* choice, void* workspace, size_t workspace_bytes, void* stream) {
    const char* call = "cublasLtMatmul";
    Product product;
    int status = describe(call, handle, {operation, a_layout, b_layout, c_layout, d_layout}, product);
    if (status) return fault(status, "%s: the operation and its layouts do not go together", call);
    if (!alpha || !beta) return fault(INVALID_VALUE, "%s: no alpha or no beta", call);
    if (!choice) return fault(NOT_SUPPORTED, "%s: a product without an algorithm is not emulated", call);
    const Algorithm* algorithm = chosen(*choice, product, status);
    if (!algorithm) return fault(status, "%s: an algorithm for another product or of another version", call);
    product.A.at = const_cast<void*>(a);
    product.B.at = const_cast<void*>(b);
    product.C.at = const_cast<void*>(c);
    product.D.at = d;
    product.vector = operation->get<void*>(BIAS_POINTER);
    product.mask = operation->get<uint8_t*>(AUX_POINTER);
    const void* pointers[] = {a, b, c, d, product.vector, product.mask};
    const char* names[] = {"A", "B", "C", "D", "the vector of the epilogue", "the mask of the epilogue"};
    for (int i = 0; i < 6; i++)
        if (reinterpret_cast<uint64_t>(pointers[i]) % choice->alignment[i])
            return fault(INVALID_VALUE, "%s: %s at %p is not aligned to %d bytes, which was promised", call, names[i],
                         pointers[i], choice->alignment[i]);
    if (workspace_bytes < algorithm->workspace || reinterpret_cast<uint64_t>(workspace) % 16)
        return fault(INVALID_VALUE, "%s: a workspace of %zu bytes at %p, where %zu are taken, aligned to 16", call,
                     workspace_bytes, workspace, algorithm->workspace);
    for (const Matrix* x : {&product.A, &product.B}) {
        const char *first = static_cast<char*>(x->at), *out = static_cast<char*>(d);
        if (first < out + product.D.bytes() && out < first + x->bytes())
            return fault(INVALID_VALUE, "%s: D lies over %s, which is read while D is written", call, x->name);
    }
    product.alpha = load<double>(alpha, product.in_double() ? DOUBLE : FLOAT, 0);
    product.beta = load<double>(beta, product.in_double() ? DOUBLE : FLOAT, 0);
    product.workspace = workspace;
    product.workspace_bytes = algorithm->workspace;
    product.depth = algorithm->depth;
    product.microseconds = emulated_lt.microseconds[choice->number];
    product.relu_of_nan = emulated_lt.relu_of_nan;
    product.whole_bias = emulated_lt.whole_bias;
    product.whole_sums = emulated_lt.whole_sums;
    return enqueue(product, stream);
}
}
