// What one thread does: the semantics of PTX instructions, for the C++ that instructions.py writes.
//
// A register is an unsigned integer (a predicate is a bool). An instruction takes its operands out of registers with
// as<type> and puts its result back with bits. Functions are named as the instructions that call them.
#pragma once
#include "device.h"

#include <cstdint>
#include <cstring>

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;
typedef unsigned __int128 u128;
typedef int8_t s8;
typedef int16_t s16;
typedef int32_t s32;
typedef int64_t s64;
typedef _Float16 f16;
typedef float f32;
typedef double f64;

#define INLINE inline __attribute__((always_inline))

// --- the thread and its block (block.cpp) ----------------------------------------------------------------------------

struct Index {
    u32 x, y, z;
};

struct Range {  // of addresses that may be used
    u64 first, size;
};

struct ModuleVariable {
    const void* address;
    u64 size;
};

// A kernel, as translate.py describes it, and what it is launched with.
struct Launch {
    const char* kernel;
    void (*run)(struct Thread&);
    bool waits;                       // whether its threads wait for each other: at barriers, in shuffles
    const char* const* instructions;  // the texts of those that can be at fault; `at` is a place in this list
    u32 instruction_count;
    const ModuleVariable* variables;
    u32 variable_count;
    u64 static_shared, dynamic_shared, local_bytes;
    const char* parameters;
    u64 parameter_bytes;
    Index grid, block;
    const Hooks* hooks;
};

struct Thread {
    const Launch* launch;
    Index tid, ctaid;
    u32 number, lane;  // in the block; in the warp
    char* shared;      // of the block
    u64 shared_bytes;
    char *local, *local_free, *local_end;
    Range* ranges;  // for each instruction, the allocation that it used last
};

// The values that the lanes of a warp gave to one exchange, for those in `participants`.
struct Exchange {
    u32 participants;
    const u64* values;
};

enum Barrier { SYNC, ARRIVE };

extern "C" {
const char* emulated_launch(const Launch& launch);  // null, or what is wrong
[[noreturn]] void emulated_trap(Thread& me, u32 at, const char* format, ...) __attribute__((format(printf, 3, 4)));
void emulated_find_range(Thread& me, u32 at, u64 address, u32 bytes);
// Waits for the lanes of the mask; they must give the same mask, at the same instruction.
Exchange emulated_exchange(Thread& me, u32 at, u32 mask, u64 value);
// Waits for `count` threads of the block (0: all) and returns for how many of them the predicate is true.
u32 emulated_barrier(Thread& me, u32 at, Barrier kind, bool aligned, u32 id, u32 count, bool predicate);
}

// --- registers -------------------------------------------------------------------------------------------------------

template <class T> struct Bits {
    typedef T type;
};
template <> struct Bits<f16> {
    typedef u16 type;
};
template <> struct Bits<f32> {
    typedef u32 type;
};
template <> struct Bits<f64> {
    typedef u64 type;
};

// The low bits of a register, as a value of type T.
template <class T, class Register> INLINE T as(Register x) {
    return __builtin_bit_cast(T, static_cast<typename Bits<T>::type>(x));
}

// The bits of a value. Integers stay what they are, so that a wider register gets them sign- or zero-extended.
template <class T> INLINE typename Bits<T>::type bits(T x) { return __builtin_bit_cast(typename Bits<T>::type, x); }

template <class T> constexpr bool is_signed = T(-1) < T(0);
template <class T> constexpr bool is_integer = T(1) / T(2) == T(0);
template <class T> constexpr u32 width = 8 * sizeof(T);
template <class T> constexpr T lowest = is_signed<T> ? T(T(1) << (width<T> - 1)) : T(0);
template <class T> constexpr T highest = T(~lowest<T>);

// --- memory ----------------------------------------------------------------------------------------------------------

template <class T> INLINE T load(u64 address) {
    T x;
    memcpy(&x, reinterpret_cast<const void*>(address), sizeof x);
    return x;
}

template <class T> INLINE void store(u64 address, T x) { memcpy(reinterpret_cast<void*>(address), &x, sizeof x); }

// The address of `bytes` bytes (a power of two) in a state space, if they are memory and aligned; a trap if not.
INLINE u64 in_global(Thread& me, u32 at, u64 address, u32 bytes) {
    const Range& known = me.ranges[at];
    const u64 offset = address - known.first;
    if (__builtin_expect(offset >= known.size || known.size - offset < bytes || (address & (bytes - 1)), false))
        emulated_find_range(me, at, address, bytes);
    return address;
}

INLINE u64 in_const(Thread& me, u32 at, u64 address, u32 bytes) { return in_global(me, at, address, bytes); }

INLINE u64 in_shared(Thread& me, u32 at, u64 address, u32 bytes) {
    const u32 offset = static_cast<u32>(address);  // addresses of shared memory start at 0
    if (__builtin_expect(offset >= me.shared_bytes || me.shared_bytes - offset < bytes, false))
        emulated_trap(me, at, "%u bytes at %u are not in the block's %lu bytes of shared memory", bytes, offset,
                      me.shared_bytes);
    if (__builtin_expect(offset & (bytes - 1), false))
        emulated_trap(me, at, "%u bytes of shared memory at %u: misaligned", bytes, offset);
    return reinterpret_cast<u64>(me.shared) + offset;
}

INLINE bool is_shared(Thread& me, u64 address) { return address - reinterpret_cast<u64>(me.shared) < me.shared_bytes; }

INLINE bool is_local(Thread& me, u64 address) {
    return address - reinterpret_cast<u64>(me.local) < static_cast<u64>(me.local_end - me.local);
}

INLINE bool is_param(Thread& me, u64 address) {
    return address - reinterpret_cast<u64>(me.launch->parameters) < me.launch->parameter_bytes;
}

INLINE u64 in_local(Thread& me, u32 at, u64 address, u32 bytes) {
    if (!is_local(me, address) || reinterpret_cast<u64>(me.local_free) - address < bytes)
        emulated_trap(me, at, "%u bytes at %#lx are not in the thread's local memory", bytes, address);
    if (address & (bytes - 1)) emulated_trap(me, at, "%u bytes of local memory at %#lx: misaligned", bytes, address);
    return address;
}

INLINE u64 in_param(Thread& me, u32 at, u64 address, u32 bytes) {
    const u64 end = reinterpret_cast<u64>(me.launch->parameters) + me.launch->parameter_bytes;
    if (!is_param(me, address) || end - address < bytes)
        emulated_trap(me, at, "%u bytes at %#lx are not in the kernel's parameters", bytes, address);
    return address;
}

inline u64 in_generic(Thread& me, u32 at, u64 address, u32 bytes) {
    if (is_shared(me, address)) return in_shared(me, at, address - reinterpret_cast<u64>(me.shared), bytes);
    if (is_local(me, address)) return in_local(me, at, address, bytes);
    if (is_param(me, address)) return in_param(me, at, address, bytes);
    return in_global(me, at, address, bytes);
}

// Local memory of one call of a function, spoiled at its start so that what is read before it is written shows.
struct Frame {
    Thread& me;
    char* start;
    Frame(Thread& thread, u64 bytes) : me(thread), start(thread.local_free) {
        if (static_cast<u64>(me.local_end - start) < bytes) emulated_trap(me, 0, "local memory is used up: recursion");
        me.local_free += bytes;
        memset(start, 0xFF, bytes);
    }
    ~Frame() { me.local_free = start; }
    u64 operator+(u64 offset) const { return reinterpret_cast<u64>(start) + offset; }
};

// Reads, changes and writes without another host thread in between.
template <class T, class Change> INLINE T atomic(u64 address, Change change) {
    typedef typename Bits<T>::type B;
    B* place = reinterpret_cast<B*>(address);
    B old = __atomic_load_n(place, __ATOMIC_SEQ_CST);
    while (!__atomic_compare_exchange_n(place, &old, static_cast<B>(bits(static_cast<T>(change(as<T>(old))))), false,
                                        __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {
    }
    return as<T>(old);
}

// --- floating point --------------------------------------------------------------------------------------------------

// NaN has no payload but in double precision: it is canonical.
INLINE f32 canonical(f32 x) { return __builtin_expect(x != x, false) ? as<f32>(0x7fffffffu) : x; }
INLINE f16 canonical(f16 x) { return (bits(x) & 0x7fff) > 0x7c00 ? as<f16>(0x7fffu) : x; }
INLINE f64 canonical(f64 x) { return x; }

// .ftz: subnormal numbers become zero with their sign.
INLINE f32 flush(f32 x) { return __builtin_fabsf(x) < 0x1p-126f ? __builtin_copysignf(0.0f, x) : x; }
INLINE f64 flush(f64 x) { return __builtin_fabs(x) < 0x1p-1022 ? __builtin_copysign(0.0, x) : x; }
INLINE f16 flush(f16 x) { return (bits(x) & 0x7c00) ? x : as<f16>(bits(x) & 0x8000u); }

// .sat: to [0, 1], NaN to 0.
template <class T> INLINE T saturate(T x) { return x > T(0) ? (x < T(1) ? x : T(1)) : T(0); }

template <class T> INLINE T add(T a, T b) { return static_cast<T>(a + b); }
template <class T> INLINE T sub(T a, T b) { return static_cast<T>(a - b); }
template <class T> INLINE T mul(T a, T b) { return static_cast<T>(a * b); }
template <class T> INLINE T div(T a, T b) { return a / b; }
INLINE f32 sqrt(f32 a) { return __builtin_sqrtf(a); }
INLINE f64 sqrt(f64 a) { return __builtin_sqrt(a); }
template <class T> INLINE T rcp(T a) { return T(1) / a; }
INLINE f32 fma(f32 a, f32 b, f32 c) { return __builtin_fmaf(a, b, c); }
INLINE f64 fma(f64 a, f64 b, f64 c) { return __builtin_fma(a, b, c); }

// One rounding: the sum in double is rounded to odd, from which the rounding to float16 is that of the exact sum.
inline f16 fma(f16 a, f16 b, f16 c) {
    const f64 product = static_cast<f64>(a) * static_cast<f64>(b), addend = static_cast<f64>(c);  // both exact
    const f64 sum = product + addend, part = sum - product;
    const f64 error = (product - (sum - part)) + (addend - part);
    u64 odd = bits(sum);
    if (error != 0 && !(odd & 1)) odd += (error > 0) == (sum > 0) ? 1 : -1;
    return static_cast<f16>(as<f64>(odd));
}

// The rounding of an instruction that is not to the nearest: of the processor, for this one operation.
enum Rounding : u32 { RN = 0, RM = 0x2000, RP = 0x4000, RZ = 0x6000 };  // as in MXCSR

template <Rounding ROUNDING, class Operation, class... Operands>
inline auto rounded(Operation operation, Operands... operands) {
    const u32 usual = __builtin_ia32_stmxcsr();
    __builtin_ia32_ldmxcsr((usual & ~0x6000u) | ROUNDING);
    (([&] { asm volatile("" : "+m"(operands)::"memory"); }()), ...);  // neither before the rounding is set ...
    auto result = operation(operands...);
    asm volatile("" : "+m"(result)::"memory");  // ... nor after it is set back
    __builtin_ia32_ldmxcsr(usual);
    return result;
}

// The smaller and the larger; -0 is less than +0, a number is taken before a NaN.
template <class T> INLINE T min(T a, T b) {
    if constexpr (!is_integer<T>) {
        if (a != a) return canonical(b);
        if (b != b) return a;
        if (a == b) return bits(a) >> (width<T> - 1) ? a : b;
    }
    return a < b ? a : b;
}
template <class T> INLINE T max(T a, T b) {
    if constexpr (!is_integer<T>) {
        if (a != a) return canonical(b);
        if (b != b) return a;
        if (a == b) return bits(a) >> (width<T> - 1) ? b : a;
    }
    return a > b ? a : b;
}

// .NaN: of a NaN and a number, NaN.
template <class T> INLINE T or_nan(T a, T b, T result) { return a != a || b != b ? canonical(static_cast<T>(a + b)) : result; }

// Approximations: here the exact value, rounded. Those of f64 take and give the upper 32 bits.
INLINE f32 rsqrt(f32 x) { return static_cast<f32>(1 / __builtin_sqrt(x)); }
INLINE f64 rsqrt(f64 x) { return 1 / __builtin_sqrt(x); }
INLINE f64 upper_half(f64 x) { return as<f64>(bits(x) & 0xffffffff00000000u); }
INLINE f32 ex2(f32 x) { return static_cast<f32>(__builtin_exp2(x)); }
INLINE f32 lg2(f32 x) { return static_cast<f32>(__builtin_log2(x)); }
INLINE f32 sin(f32 x) { return static_cast<f32>(__builtin_sin(x)); }
INLINE f32 cos(f32 x) { return static_cast<f32>(__builtin_cos(x)); }
INLINE f32 tanh(f32 x) { return static_cast<f32>(__builtin_tanh(x)); }

// --- conversions ------------------------------------------------------------------------------------------

// A number without fraction to an integer: clamped; NaN to 0, or to the upper bit where 64 bits are involved.
template <class I> INLINE I to_integer(f64 x, bool from_f64) {
    if (x != x) return from_f64 || sizeof(I) == 8 ? I(I(1) << (width<I> - 1)) : I(0);
    if (x < static_cast<f64>(lowest<I>)) return lowest<I>;
    if (x >= static_cast<f64>(I(1) << (width<I> - 2)) * (is_signed<I> ? 2 : 4)) return highest<I>;
    return static_cast<I>(x);
}

// .sat: an integer clamped to another type's range.
template <class To, class From> INLINE To clamp(From x) {
    if (is_signed<From> && x < From(0)) return is_signed<To> && s64(x) > s64(lowest<To>) ? To(x) : lowest<To>;
    return u64(x) < u64(highest<To>) ? To(x) : highest<To>;
}

INLINE f64 whole_rn(f64 x) { return __builtin_nearbyint(x); }
INLINE f64 whole_rz(f64 x) { return __builtin_trunc(x); }
INLINE f64 whole_rm(f64 x) { return __builtin_floor(x); }
INLINE f64 whole_rp(f64 x) { return __builtin_ceil(x); }

// --- integers -----------------------------------------------------------------------------------------

// The value of a division by zero is unspecified: here ones.
template <class T> INLINE T quotient(T a, T b) {
    if (b == T(0)) return T(~T(0));
    return is_signed<T> && b == T(-1) ? T(typename Bits<T>::type(0) - a) : T(a / b);
}
template <class T> INLINE T remainder(T a, T b) {
    if (b == T(0)) return T(~T(0));
    return is_signed<T> && b == T(-1) ? T(0) : T(a % b);
}

// An integer type of double width.
template <class T> struct Wide;
template <> struct Wide<u16> { typedef u32 type; };
template <> struct Wide<s16> { typedef s32 type; };
template <> struct Wide<u32> { typedef u64 type; };
template <> struct Wide<s32> { typedef s64 type; };
template <> struct Wide<u64> { typedef u128 type; };
template <> struct Wide<s64> { typedef __int128 type; };

template <class T> INLINE typename Wide<T>::type product(T a, T b) {
    typedef typename Wide<T>::type W;
    return static_cast<W>(a) * static_cast<W>(b);
}
template <class T> INLINE T high(T a, T b) { return static_cast<T>(product(a, b) >> width<T>); }

template <class T> INLINE T shl(T x, u32 n) { return n >= width<T> ? T(0) : T(x << n); }
template <class T> INLINE T shr(T x, u32 n) {
    if (n >= width<T>) return is_signed<T> && x < T(0) ? T(-1) : T(0);
    return T(x >> n);
}

// Funnel shifts of b:a, by an amount that is at most 32 or modulo 32.
INLINE u32 shf_l(u32 a, u32 b, u32 n) { return n == 32 ? a : static_cast<u32>((u64(b) << 32 | a) << n >> 32); }
INLINE u32 shf_r(u32 a, u32 b, u32 n) { return static_cast<u32>((u64(b) << 32 | a) >> n); }
INLINE u32 shift_clamp(u32 n) { return n < 32 ? n : 32; }
INLINE u32 shift_wrap(u32 n) { return n & 31; }

template <class T> INLINE u32 popc(T x) { return __builtin_popcountll(x); }
template <class T> INLINE u32 clz(T x) { return x ? __builtin_clzll(x) - (64 - width<T>) : width<T>; }
template <class T> INLINE T brev(T x) {
    T reversed = 0;
    for (u32 i = 0; i < width<T>; i++) reversed |= T(T(x >> i & 1) << (width<T> - 1 - i));
    return reversed;
}

// The place of the highest bit that is not a copy of the sign, or ones.
template <class T> INLINE u32 bfind(T x) {
    const u64 bits = is_signed<T> && x < T(0) ? ~u64(s64(x)) : u64(x);
    return bits ? 63 - __builtin_clzll(bits) : ~0u;
}

template <class T> INLINE T bfe(T x, u32 start, u32 length) {
    start &= 255;
    length &= 255;
    if (!length) return T(0);
    const u32 last = start + length - 1 < width<T> - 1 ? start + length - 1 : width<T> - 1;
    const bool sign = is_signed<T> && x >> last & 1;
    T field = sign ? T(-1) : T(0);
    for (u32 i = 0; i < length && i < width<T> && start + i < width<T>; i++) {
        const T bit = T(typename Bits<T>::type(1) << i);
        field = x >> (start + i) & 1 ? T(field | bit) : T(field & ~bit);
    }
    return field;
}
template <class T> INLINE T bfi(T field, T x, u32 start, u32 length) {
    start &= 255;
    length &= 255;
    if (start >= width<T>) return x;
    const T ones = length < width<T> ? T(T(1) << length) - 1 : ~T(0);
    return (x & ~(ones << start)) | ((field & ones) << start);
}

INLINE u32 prmt(u32 a, u32 b, u32 selection) {
    u32 result = 0;
    for (u32 i = 0; i < 4; i++) {
        const u32 choice = selection >> 4 * i & 15;
        const u8 byte = static_cast<u8>((u64(b) << 32 | a) >> 8 * (choice & 7));
        result |= (choice & 8 ? (byte & 0x80 ? 0xffu : 0u) : u32(byte)) << 8 * i;
    }
    return result;
}

// Any function of three bits, whose table is `table`.
template <class T> INLINE T lop3(T a, T b, T c, u32 table) {
    T result = 0;
    for (u32 i = 0; i < 8; i++)
        if (table >> i & 1) result |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
    return result;
}

// Sum, difference with the carry bit.
template <class T> INLINE T add_carry(T a, T b, u32 in, u32& out) {
    const u128 sum = u128(a) + b + in;
    out = static_cast<u32>(sum >> width<T>) & 1;
    return static_cast<T>(sum);
}
template <class T> INLINE T sub_carry(T a, T b, u32 in, u32& out) {
    out = u128(a) < u128(b) + in;
    return static_cast<T>(a - b - in);
}

// --- the lanes of a warp ---------------------------------------------------------------------

enum Mode { UP, DOWN, BFLY, IDX };

inline u32 shfl(Thread& me, u32 at, Mode mode, u32 value, u32 b, u32 c, u32 mask, bool& in_range) {
    const u32 lane = me.lane, offset = b & 31, segments = c >> 8 & 31;
    const u32 most = (lane & segments) | (c & 31 & ~segments), least = lane & segments;
    s32 source = 0;
    if (mode == UP) source = s32(lane) - s32(offset), in_range = source >= s32(most);
    if (mode == DOWN) source = s32(lane + offset), in_range = source <= s32(most);
    if (mode == BFLY) source = s32(lane ^ offset), in_range = source <= s32(most);
    if (mode == IDX) source = s32(least | (offset & ~segments)), in_range = source <= s32(most);
    if (!in_range) source = s32(lane);
    const Exchange all = emulated_exchange(me, at, mask, value);
    return all.participants >> source & 1 ? static_cast<u32>(all.values[source]) : ~0u;  // of others: undefined
}

// The lanes whose predicate, or whose value, is `value`.
inline u32 lanes_with(const Exchange& all, u64 value) {
    u32 lanes = 0;
    for (u32 i = 0; i < 32; i++)
        if (all.participants >> i & 1 && all.values[i] == value) lanes |= 1u << i;
    return lanes;
}

template <class T, class Operation> inline T redux(const Exchange& all, Operation operation) {
    const u32 first = __builtin_ctz(all.participants);
    T result = as<T>(all.values[first]);
    for (u32 i = first + 1; i < 32; i++)
        if (all.participants >> i & 1) result = operation(result, as<T>(all.values[i]));
    return result;
}
