// CUDA on the CPU: what a kernel's source expects to find, and a grid to run it on; see tests/emulate.py.
//
// The blocks run one after another. So do the threads of a block, each on a stack of its own, from one barrier to the
// next: what one thread wrote, another sees only if a barrier, or the order of the threads by chance, put it first.
#include <cmath>
#include <csetjmp>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <ucontext.h>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#else
inline void __sanitizer_start_switch_fiber(void**, const void*, size_t) {}
inline void __sanitizer_finish_switch_fiber(void*, const void**, size_t*) {}
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __constant__ static
#define __shared__ static __attribute__((section("shared")))  // all together, to be spoiled for every block

struct Index {
    unsigned x, y, z;
};
static Index gridDim, blockDim, blockIdx, threadIdx;
constexpr int warpSize = 32;

// --- the threads of one block --------------------------------------------------------------------------------------

extern char __start_shared[] __attribute__((visibility("hidden")));
extern char __stop_shared[] __attribute__((visibility("hidden")));

static void call_kernel();  // with the arguments in emulated::values

namespace emulated {

typedef unsigned long long u64;

constexpr unsigned MOST_THREADS = 1024;

#ifdef SYNCHRONISES
constexpr size_t STACK = 1 << 18;  // of each thread; pages that are never touched cost nothing
#else
constexpr size_t STACK = 0;
#endif

static char* stacks;
static char error[300];
__shared__ char some_shared_memory __attribute__((used));  // or there would be no such section

__attribute__((format(printf, 1, 2))) inline void fail(const char* format, ...) {
    va_list values;
    va_start(values, format);
    const int n = snprintf(error, sizeof error, "block (%u, %u): ", blockIdx.x, blockIdx.y);
    vsnprintf(error + n, sizeof error - n, format, values);
    va_end(values);
}

#define UNSANITIZED __attribute__((no_sanitize("address")))

// Byte by byte, since the address sanitizer lays red zones between shared arrays and looks into memset.
UNSANITIZED inline void spoil_shared_memory() {
    for (volatile char* at = __start_shared; at < __stop_shared; ++at) *at = (char)0xFF;
}

#ifdef SYNCHRONISES

enum State { READY, AT_BARRIER, AT_WARP, DONE };

// Where a thread begins, and where it goes on: by a jump, since swapcontext sets the mask of signals, a call of the
// system that costs more than what a thread does between two barriers.
struct Place {
    ucontext_t context;
    jmp_buf at;
    bool begun;
};

struct Thread {
    State state;
    int line;          // of the barrier or exchange that it waits at
    unsigned mask;     // of an exchange: the lanes that take part, as this one says;
    unsigned source;   // the lane whose value it wants;
    u64 value, votes;  // the value it gives, then the one it got; the lanes whose value is not zero
};

static Thread threads[MOST_THREADS];
static Place places[MOST_THREADS];
static Thread* current;
static Place scheduler;
static const void* scheduler_stack;
static size_t scheduler_size;

// Its frame stays on the stack of a thread that has finished: no red zones in it.
UNSANITIZED inline void change(Place& from, Place& to, const void* stack, size_t size) {
    void* frames = nullptr;
    __sanitizer_start_switch_fiber(&frames, stack, size);
#ifdef __SANITIZE_ADDRESS__  // which takes a jump for one that leaves frames
    swapcontext(&from.context, &to.context);
#else
    if (!_setjmp(from.at)) {
        if (to.begun) _longjmp(to.at, 1);
        to.begun = true;
        setcontext(&to.context);
    }
#endif
    __sanitizer_finish_switch_fiber(frames, nullptr, nullptr);
}

inline void wait(State state, int line) {
    current->state = state;
    current->line = line;
    change(places[threadIdx.x], scheduler, scheduler_stack, scheduler_size);
}

inline void fiber() {
    __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_size);
    for (;;) {  // once for every block
        call_kernel();
        wait(DONE, 0);
    }
}

inline void run(unsigned thread) {
    current = &threads[thread];
    threadIdx = {thread, 0, 0};
    change(scheduler, places[thread], stacks + thread * STACK, STACK);
}

// The exchange that `lane` waits for, once all of its lanes have come that will. A lane that has finished, or never
// was, gives nothing: who wants its value gets a spoiled one.
inline bool exchange(Thread* warp, unsigned lanes, unsigned lane) {
    const Thread first = warp[lane];
    unsigned here = 0;
    u64 votes = 0, values[warpSize];
    for (unsigned i = 0; i < lanes; ++i) {
        if (!(first.mask >> i & 1) || warp[i].state == DONE) continue;
        if (warp[i].state != AT_WARP || warp[i].mask != first.mask || warp[i].line != first.line) return false;
        here |= 1u << i;
        values[i] = warp[i].value;
        if (values[i]) votes |= 1u << i;
    }
    for (unsigned i = 0; i < lanes; ++i) {
        if (!(here >> i & 1)) continue;
        warp[i].value = here >> warp[i].source & 1 ? values[warp[i].source] : ~0ull;
        warp[i].votes = votes;
        warp[i].state = READY;
    }
    return true;
}

// After all threads ran as far as they could: does the block go on?
inline bool release() {
    bool released = false;
    for (unsigned i = 0; i < blockDim.x; ++i) {
        const unsigned warp = i / warpSize * warpSize;
        const unsigned lanes = blockDim.x - warp < warpSize ? blockDim.x - warp : warpSize;
        if (threads[i].state == AT_WARP) released |= exchange(threads + warp, lanes, i - warp);
    }
    if (released) return true;
    unsigned waiting = 0;
    while (waiting < blockDim.x && threads[waiting].state == DONE) ++waiting;
    if (waiting == blockDim.x) return false;
    const Thread& first = threads[waiting];
    for (unsigned i = 0; i < blockDim.x; ++i) {
        const Thread& other = threads[i];
        if (other.state == first.state && other.line == first.line) continue;
        char elsewhere[40] = "has finished";
        if (other.state != DONE) snprintf(elsewhere, sizeof elsewhere, "waits at line %d", other.line);
        fail("deadlock: thread %u waits at line %d, thread %u %s", waiting, first.line, i, elsewhere);
        return false;
    }
    if (first.state == AT_WARP) {
        fail("deadlock: the masks of line %d do not agree", first.line);
        return false;
    }
    for (unsigned i = 0; i < blockDim.x; ++i) threads[i].state = READY;
    return true;
}

inline void make_threads() {
    for (unsigned i = 0; i < blockDim.x; ++i) {
        Place& place = places[i];
        getcontext(&place.context);
        place.context.uc_stack.ss_sp = stacks + i * STACK;
        place.context.uc_stack.ss_size = STACK;
        makecontext(&place.context, fiber, 0);
        place.begun = false;
    }
    scheduler.begun = true;
}

inline void run_block(bool reverse) {
    for (unsigned i = 0; i < blockDim.x; ++i) threads[i].state = READY;
    do {
        for (unsigned i = 0; i < blockDim.x && !*error; ++i) {
            const unsigned thread = reverse ? blockDim.x - 1 - i : i;
            if (threads[thread].state == READY) run(thread);
        }
    } while (!*error && release());
}

// What every exchange of a warp comes down to. `source` may name a lane beyond the warp: then it is this lane.
template <class V>
u64 give(unsigned mask, V value, unsigned source, int line) {
    static_assert(sizeof(V) <= sizeof(u64));
    const unsigned lane = threadIdx.x % warpSize;
    if (!(mask >> lane & 1)) {
        fail("thread %u is not in the mask %#x of line %d", threadIdx.x, mask, line);
        wait(DONE, line);
    }
    current->mask = mask;
    current->source = source < warpSize ? source : lane;
    current->value = 0;
    memcpy(&current->value, &value, sizeof value);
    wait(AT_WARP, line);
    return current->value;
}

template <class V>
V shuffle(unsigned mask, V value, unsigned source, int line) {
    const u64 got = give(mask, value, source, line);
    memcpy(&value, &got, sizeof value);
    return value;
}

#else  // a kernel without barriers: its threads are plain calls

inline void make_threads() {}

inline void run_block(bool reverse) {
    for (unsigned i = 0; i < blockDim.x; ++i) {
        threadIdx = {reverse ? blockDim.x - 1 - i : i, 0, 0};
        call_kernel();
    }
}

#endif

// An argument of a kernel: a number, both ways, or an address.
struct Value {
    long long integer;
    double real;
    template <class V>
    operator V() const {
        if constexpr (std::is_floating_point_v<V>) return (V)real;
        else return (V)integer;
    }
};

static const Value* values;

// What is wrong, or null.
extern "C" const char* emulate(const Value* arguments, unsigned blocks_x, unsigned blocks_y, unsigned n, int reverse) {
    if (n == 0 || n > MOST_THREADS || blocks_x == 0 || blocks_x > 0x7FFFFFFF || blocks_y == 0 || blocks_y > 0xFFFF)
        return "no device launches that: 1 to 2**31 - 1 blocks in x, to 65535 in y, 1 to 1024 threads";
    values = arguments;
    gridDim = {blocks_x, blocks_y, 1};
    blockDim = {n, 1, 1};
    *error = 0;
    stacks = (char*)malloc(n * STACK);
    make_threads();
    const u64 blocks = (u64)blocks_x * blocks_y;
    for (u64 i = 0; i < blocks && !*error; ++i) {
        const u64 block = reverse ? blocks - 1 - i : i;
        blockIdx = {(unsigned)(block % blocks_x), (unsigned)(block / blocks_x), 0};
        spoil_shared_memory();
        run_block(reverse);
    }
    free(stacks);
    return *error ? error : nullptr;
}

}  // namespace emulated

// --- what the language has beyond C++ --------------------------------------------------------------------------------

#ifdef SYNCHRONISES

#define WHERE int line = __builtin_LINE()

inline void __syncthreads(WHERE) { emulated::wait(emulated::AT_BARRIER, line); }
inline void __syncwarp(unsigned mask = ~0u, WHERE) { emulated::give(mask, 0, ~0u, line); }

template <class V>
V __shfl_sync(unsigned mask, V value, unsigned source, WHERE) {
    return emulated::shuffle(mask, value, source % warpSize, line);
}
template <class V>
V __shfl_xor_sync(unsigned mask, V value, unsigned bits, WHERE) {
    return emulated::shuffle(mask, value, (threadIdx.x % warpSize) ^ bits, line);
}
template <class V>
V __shfl_down_sync(unsigned mask, V value, unsigned delta, WHERE) {
    return emulated::shuffle(mask, value, threadIdx.x % warpSize + delta, line);
}
template <class V>
V __shfl_up_sync(unsigned mask, V value, unsigned delta, WHERE) {
    return emulated::shuffle(mask, value, threadIdx.x % warpSize - delta, line);  // below 0 wraps: beyond the warp
}
inline unsigned __ballot_sync(unsigned mask, int condition, WHERE) {
    emulated::give(mask, condition, ~0u, line);
    return (unsigned)emulated::current->votes;
}
inline int __any_sync(unsigned mask, int condition, WHERE) { return __ballot_sync(mask, condition, line) != 0; }
inline int __all_sync(unsigned mask, int condition, WHERE) { return __ballot_sync(mask, !condition, line) == 0; }

#endif

inline void* __cvta_global_to_generic(size_t address) { return (void*)address; }
inline void __threadfence() {}
inline void __threadfence_block() {}

// One thread runs at a time, so anything is atomic.
template <class V>
V atomicExch(V* at, std::common_type_t<V> value) {
    const V old = *at;
    *at = value;
    return old;
}
template <class V>
V atomicAdd(V* at, std::common_type_t<V> value) {
    return atomicExch(at, *at + value);
}
inline unsigned atomicInc(unsigned* at, unsigned most) { return atomicExch(at, *at >= most ? 0 : *at + 1); }
template <class V>
V atomicMax(V* at, std::common_type_t<V> value) {
    return atomicExch(at, *at < value ? value : *at);
}
template <class V>
V atomicMin(V* at, std::common_type_t<V> value) {
    return atomicExch(at, value < *at ? value : *at);
}
template <class V>
V atomicCAS(V* at, std::common_type_t<V> expected, std::common_type_t<V> value) {
    return atomicExch(at, *at == expected ? value : *at);
}

template <class V>
V __ldg(const V* at) {
    return *at;
}
inline emulated::u64 __umul64hi(emulated::u64 a, emulated::u64 b) {
    return (emulated::u64)(((unsigned __int128)a * b) >> 64);
}
inline double __dadd_rn(double a, double b) { return a + b; }
inline float cospif(float x) { return (float)std::cos(3.141592653589793 * x); }
inline float sinpif(float x) { return (float)std::sin(3.141592653589793 * x); }
inline double __dmul_rn(double a, double b) { return a * b; }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline unsigned __float_as_uint(float x) {
    unsigned bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}
inline float __uint_as_float(unsigned bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

using std::ceil, std::cos, std::erf, std::erfc, std::exp, std::expm1, std::fabs, std::floor, std::fma, std::fmax;
using std::fmin, std::isfinite, std::isinf, std::isnan, std::log, std::log1p, std::pow, std::sin, std::sqrt, std::tanh;
template <class V>
V rsqrt(V x) {
    return 1 / sqrt(x);
}
inline float rsqrtf(float x) { return rsqrt(x); }

// CUDA's min and max of two floating-point numbers pass NaN over; those of std do not.
template <class V>
V max(V a, V b) {
    if constexpr (std::is_floating_point_v<V>) return fmax(a, b);
    else return a < b ? b : a;
}
template <class V>
V min(V a, V b) {
    if constexpr (std::is_floating_point_v<V>) return fmin(a, b);
    else return b < a ? b : a;
}
